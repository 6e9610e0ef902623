"""What augmentation does to an image, against transformations that move whole pixels, and how often."""
import math

import pytest
import torch

from images import augment

SAME = 1e-5    # of values in [-1, 1], interpolated at positions in float32
FLIP_X, FLIP_Y, SCALE, COSINE, SINE, U, V, RIGHT, DOWN = range(9)


def how(**given):
    """A row of numbers, those not given 0."""
    row = torch.zeros(1, 9)
    for name, value in given.items():
        row[0, globals()[name]] = value
    return row


@pytest.fixture
def y():
    return 2 * torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)) - 1


def smooth(side=64):
    """A round blob off the middle, which interpolation changes little: [1, 1, side, side]."""
    place = (torch.arange(side) + 0.5) / side * 2 - 1
    x, y = torch.meshgrid(place, place, indexing="xy")
    return torch.exp(-((x - 0.2) ** 2 + (y + 0.1) ** 2) / 0.02)[None, None]


def moments(image):
    """The mean place (right, down) of an image, and its variances and covariance about it."""
    place = (torch.arange(image.shape[-1]) + 0.5) / image.shape[-1] * 2 - 1
    x, y = torch.meshgrid(place, place, indexing="xy")
    mass = image.sum()
    mx, my = (image * x).sum() / mass, (image * y).sum() / mass
    return torch.stack([mx, my, (image * (x - mx) ** 2).sum() / mass, (image * (y - my) ** 2).sum() / mass,
                        (image * (x - mx) * (y - my)).sum() / mass])


def test_whole_pixels_are_moved(y):
    quarter, pixel = dict(COSINE=-1, SINE=1), 1 / (12 * augment.SHIFT_STD)  # of a side of twelve
    for given, expected in (
            (dict(FLIP_X=1), y.flip(-1)), (dict(FLIP_Y=1), y.flip(-2)),
            (dict(FLIP_X=1, FLIP_Y=1), y.flip(-1, -2)),
            (quarter, y.rot90(-1, (2, 3))), (quarter | dict(FLIP_X=1), y.flip(-1).rot90(-1, (2, 3)))):
        assert (augment.warp(y, how(**given)) - expected).abs().max() < SAME, given
    moved = augment.warp(y, how(RIGHT=pixel, DOWN=2 * pixel))
    assert (moved[..., 2:, 1:] - y[..., :-2, :-1]).abs().max() < SAME
    assert (moved[..., 2:, 0] - y[..., :-2, 0]).abs().max() < SAME  # mirrored at the border
    assert torch.equal(augment.warp(y, how()), y)


def test_each_image_alone(y):
    rows = torch.cat([how(), how(SCALE=1, U=0.5), how(FLIP_X=1)])
    images = torch.cat([y, y.flip(1), y.flip(2)])
    alone = torch.cat([augment.warp(image[None], row[None]) for image, row in zip(images, rows)])
    assert torch.equal(augment.warp(images, rows), alone)


@pytest.mark.parametrize("scale", [-1.5, 1.0])
def test_scale(scale):
    before, after = moments(smooth()), moments(augment.warp(smooth(), how(SCALE=scale)))
    factor = 2 ** (augment.SCALE_STD * scale)
    assert torch.allclose(after[:2], factor * before[:2], atol=2e-3)
    assert torch.allclose(after[2:4], factor**2 * before[2:4], rtol=0.03)


@pytest.mark.parametrize("direction", [0.0, math.pi / 2, 0.6])
def test_stretching(direction):
    """By a factor along its direction, by the inverse across."""
    stretch = 1.5
    row = how(U=stretch * math.cos(2 * direction), V=stretch * math.sin(2 * direction))
    before, after = moments(smooth()), moments(augment.warp(smooth(), row))
    c, s = math.cos(direction), math.sin(direction)
    turn = torch.tensor([[c, s], [-s, c]])
    factor = 2 ** (augment.STRETCH_STD * stretch)
    expected = turn.T @ torch.diag(torch.tensor([factor, 1 / factor])) @ turn
    assert torch.allclose(after[:2], expected @ before[:2], atol=2e-3)
    (a, c, b), wide = after[2:].tolist(), expected @ expected * before[2]
    assert torch.allclose(torch.tensor([[a, b], [b, c]]), wide, atol=4e-4)


def test_what_is_drawn_and_how_often():
    torch.manual_seed(0)
    rows = augment.draw(20_000, 0.12)
    done = rows != 0
    assert rows.shape == (20_000, 9) and rows.dtype == torch.float32
    for columns, share in {(FLIP_X,): 0.5, (FLIP_Y,): 0.06, (SCALE,): 0.12, (COSINE, SINE): 0.12,
                           (U, V): 0.12, (RIGHT, DOWN): 0.12}.items():  # of EDM's code, flips as well
        some = done[:, columns].any(1)
        assert torch.equal(some, done[:, columns].all(1)) and abs(some.float().mean() - share) < 0.01
    together = (done[:, FLIP_X] & done[:, SCALE]).float().mean()
    assert abs(together - 0.06) < 0.01  # each on its own
    angle = torch.atan2(rows[:, SINE], 1 + rows[:, COSINE])[done[:, SINE]]
    assert torch.allclose((1 + rows[:, COSINE])**2 + rows[:, SINE]**2, torch.ones(20_000), atol=1e-5)
    assert abs(angle.mean()) < 0.15 and abs(angle.std() - math.pi / 3**0.5) < 0.1
    for column in (SCALE, RIGHT, DOWN):
        drawn = rows[done[:, column], column]
        assert abs(drawn.mean()) < 0.08 and abs(drawn.std() - 1) < 0.06
    assert abs(rows[done[:, U]][:, [U, V]].square().sum(1).mean() - 1) < 0.12
    assert not augment.draw(100, 0.0)[:, 1:].any()
