"""The K nearest against all distances written out in float64, or in whole numbers."""

import math

import numpy as np
import pytest
import torch

from kernels import nearest_two
from measure import neighbours


def all_nearest(x, y, k):
    """The k nearest by every difference, lower index first among equals."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    d = torch.stack([(row - y).square().sum(1) for row in x]).numpy()
    index = np.argsort(d, axis=1, kind="stable")[:, :k]
    return torch.from_numpy(np.take_along_axis(d, index, 1)), torch.from_numpy(index)


def vectors(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


@pytest.mark.parametrize("shape, k", [((3, 8, 8), 2), ((1, 8, 8), 50), ((3, 120, 120), 3)])
def test_images_of_every_kind(noise, shape, k):  # the last too large for int32: by float32
    x, y = (torch.from_numpy(noise(n, *shape, seed=n)) for n in (9, 60))
    y[7], y[30], x[0] = y[3], y[3], y[3]
    squares, index = neighbours.nearest(x, y, k)
    expected, where = all_nearest(x, y, k)
    assert squares.dtype == torch.int64 and squares.tolist() == expected.tolist()
    assert index.tolist() == where.tolist() and index[0, :2].tolist() == [3, 7]


def test_two_nearest_as_the_kernel(noise):
    x, y = (torch.from_numpy(noise(n, 1, 8, 8, seed=n) // 100) for n in (200, 500))  # many equal distances
    assert all(map(torch.equal, neighbours.nearest(x, y, 2), nearest_two(x, y)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (1e-30, 0.0), (1e150, 0.0), (1.0, 1e4)])
def test_vectors_that_float32_cannot_tell(dtype, scale, offset):
    if dtype == torch.float32 and scale == 1e150:
        scale = 1e15
    y = vectors(400, 24)
    y[1::2] = y[::2] + 1e-9 * vectors(200, 24, seed=1)  # near-duplicates
    x = y[:50] + 1e-8 * vectors(50, 24, seed=2)
    x, y = ((z * scale + offset).to(dtype) for z in (x, y))
    for k in (2, 5):
        squares, index = neighbours.nearest(x, y, k)
        expected, where = all_nearest(x, y, k)
        assert torch.equal(index, where)
        assert torch.allclose(squares, expected, rtol=1e-14, atol=0)  # sums of 24 terms in another order


def test_the_error_bound_holds():
    x, y = vectors(40, 300), vectors(80, 300, seed=1)
    for factor in (1e-6, 1.0, 1e6):
        distances, error = neighbours.squares_by_row(x * factor, y + factor)
        true = all_nearest(x * factor, y + factor, 80)
        exact = torch.empty(40, 80, dtype=torch.float64).scatter_(1, true[1], true[0])
        off = (distances(torch.arange(40)) - exact).abs().amax(1)
        assert bool((off <= error).all()) and float(error.max()) < 1e-11 * float(exact.max())


def test_queries_near_the_mean_keep_their_small_products():
    """Of vectors around which the others lie in opposite pairs, the terms of x.y are far below |y|^2."""
    D, eps, f = 20_000, 1e-15, 0.5
    v = torch.full((D,), 0.9, dtype=torch.float64)
    w = v * (1 - 2 * (torch.arange(D) % 2)) * (1 - f * eps)
    y, x = torch.stack([v, -v, w, -w] * 16), (eps * v).repeat(4, 1)
    distances, error = neighbours.squares_by_row(x, y)
    true = (x[:, None] - y).square().sum(2)
    assert bool(((distances(torch.arange(4)) - true).abs().amax(1) <= error).all())
    assert neighbours.nearest(x, y, 1)[1].flatten().tolist() == [0] * 4


def test_mirrored_images_count_once(noise):
    y, x = torch.from_numpy(noise(30, 3, 8, 8)), torch.from_numpy(noise(12, 3, 8, 8, seed=1))
    x[0], x[1] = y[4].flip(-1), y[5]
    y[6] = (y[6].float() * 0.5 + y[6].flip(-1).float() * 0.5).byte()  # close to its own mirror image
    x[2] = y[6]
    d = torch.stack([(x[:, None].double() - z).square().sum((2, 3, 4)) for z in (y, y.flip(-1))]).amin(0)
    for k in (2, 7):
        squares, index = neighbours.compared(x, y, k, mirror=True)
        order = d.argsort(dim=1, stable=True)[:, :k]
        assert torch.equal(index, order) and squares.tolist() == d.gather(1, order).tolist()
    assert index[0, 0] == 4 and squares[0, 0] == 0 and neighbours.compared(x, y)[0][0, 0] > 0


def test_near_the_mean():
    squares = torch.tensor([[4, 16, 36, 65], [4, 16, 36, 63], [0, 0, 0, 0], [0, 0, 0, 1]])
    assert neighbours.near_the_mean(squares, (2, 5)).tolist() == [True, False, False, True]  # 2 of 5 +- .02
    found = neighbours.near_the_mean(squares.double() ** 2, (1, 2))
    d = squares.double()
    assert found.tolist() == (d[:, 0] / d.mean(1) < 0.5).tolist()


def test_too_few(noise):
    x = torch.from_numpy(noise(5, 1, 4, 4))
    for y in (x, x.flatten(1).float()):  # of fewer samples than processes some have none
        assert [part.shape for part in neighbours.nearest(y[:0], y, 3)] == [(0, 3), (0, 3)]
    with pytest.raises(ValueError, match="50 nearest of 5 images"):
        neighbours.nearest(x, x, 50)


def test_cosine_distances():
    x, y = (torch.nn.functional.normalize(vectors(n, 16, seed=n), dim=1) for n in (20, 90))
    x[0] = torch.nn.functional.normalize(y[8] + 1e-9 * y[9], dim=0)
    squares, index = neighbours.compared(x, y, 2, cosine=True)
    expected = (1 - x @ y.T).sort(dim=1)
    assert torch.equal(index, expected.indices[:, :2])
    assert torch.allclose(squares.sqrt(), expected.values[:, :2], atol=1e-15)
    sine = math.sqrt(1 - float(y[8] @ y[9]) ** 2)
    assert float(squares[0, 0].sqrt()) == pytest.approx((1e-9 * sine) ** 2 / 2, rel=1e-6)


def test_near_the_mean_in_whole_numbers():
    tie = [4, 16, 36, 64]  # roots 2, 4, 6, 8: mean 5, and 2 is 2/5 of it
    squares = torch.tensor([tie, [4, 16, 36, 65], [4, 16, 36, 63], [0, 0, 0, 0], [0, 0, 0, 1]])
    assert neighbours.near_the_mean(squares, (2, 5)).tolist() == [False, True, False, False, True]
    large = torch.tensor(tie) * (2**17 - 1) ** 2  # the same tie, and one beside it by 3e-16 of the distance
    beside = large + torch.tensor([0, 0, 0, 1])
    assert neighbours.near_the_mean(torch.stack([large, beside]), (2, 5)).tolist() == [False, True]
    found = neighbours.near_the_mean(squares.double() ** 2, (1, 2))
    d = squares.double()
    assert found.tolist() == (d[:, 0] / d.mean(1) < 0.5).tolist()
