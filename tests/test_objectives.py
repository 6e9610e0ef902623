import math

import pytest
import torch

import checkpoint
import disk
import sample
import train
from diffusion import objectives
from diffusion.denoiser import Denoiser
from diffusion.objectives import Objective
from diffusion.solvers import heun, noise_levels
from kernels import Optimum

TRIPLES = [(precond, predict) for precond in objectives.PRECONDITIONINGS for predict in objectives.PREDICTIONS
           if (precond, predict) != ("ve", "velocity")]
ROUNDING = 1e-9     # of float64, relative
NEAR = 1e-4         # of the closed-form optimum, which is within 1e-5 of the exact one, over sigma
SIGMAS = (0.05, 0.3, 1.0, 4.0, 30.0)


class Output(torch.nn.Module):
    """In place of a network: it says `value`, whatever it is asked."""

    def __init__(self, value):
        super().__init__()
        self.value, self.map_layer0 = torch.nn.Parameter(value), torch.nn.Linear(1, 1, dtype=torch.float64)

    def forward(self, x, c_noise, labels=None, augment=None):
        self.x, self.c_noise = x, c_noise
        return self.value.expand_as(x)


def saying(value, precond, predict=None, **given):
    D = Denoiser("ddpmpp", precond, 4, 1, width=4, blocks=1, channel_mult=(1,), predict=predict, **given)
    D.model = Output(value)
    return D


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def target(precond, predict, y, n, sigma):
    """What the network is to say, and the factor of |F - target|^2 in the loss, as each is derived alone."""
    data = 0.5 if precond == "edm" else 1.0
    published = dict(vp=sigma**-2, ve=sigma**-2, edm=sigma**-2 + 4, flow=(1 + sigma)**2 / sigma**2)[precond]
    sign = -1 if precond in ("ve", "edm") else 1
    if predict == "image":
        return y, published
    if predict == "noise":
        return sign * n, published * sigma**2
    if precond == "flow":
        return n - y, 1.0
    angle = math.atan2(sigma, data)  # of the path cos(angle) y / data + sin(angle) n
    velocity = math.cos(angle) * n - math.sin(angle) * y / data
    return sign * velocity, published * (sigma * data)**2 / (sigma**2 + data**2)


@pytest.mark.parametrize("precond, predict", TRIPLES)
def test_the_loss_is_that_of_what_the_network_predicts(precond, predict):
    y, n, said = draw(1, 1, 4, 4), draw(1, 1, 4, 4, seed=1), draw(1, 1, 4, 4, seed=2)
    for sigma in SIGMAS:
        goal, factor = target(precond, predict, y, n, sigma)
        level = torch.tensor([sigma], dtype=torch.float64)
        loss = saying(said, precond, predict).loss(y, level, n)
        assert loss.item() == pytest.approx(factor * float((said - goal).square().sum()), rel=ROUNDING)
        assert saying(goal, precond, predict).loss(y, level, n).item() < ROUNDING * factor
    if predict == objectives.PUBLISHED[precond]:
        assert torch.equal(loss, saying(said, precond).loss(y, level, n))
        assert precond == "edm" or factor == pytest.approx(1.0), "as published: the same at every sigma"


def expected_loss(D, images, x, sigma):
    """E[loss(y)] of the posterior of images y given x at sigma, exactly: a sum over all images."""
    y = images.double() / 127.5 - 1
    weights = (-(x - y).square().flatten(1).sum(1) / (2 * sigma**2)).softmax(0)
    level = torch.full((len(y),), sigma, dtype=torch.float64)
    return (weights * D.loss(y, level, (x - y) / sigma)).sum()


@pytest.mark.parametrize("precond, predict", TRIPLES)
@pytest.mark.parametrize("given, keeps", [
    (dict(), True), (dict(loss_weight="min-snr"), True),
    (dict(loss="l1"), False), (dict(loss="huber"), False)])
def test_the_closed_form_optimum_has_the_least_expected_l2_loss(precond, predict, given, keeps):
    images = torch.randint(0, 256, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for sigma in (1.5, 4.0):  # where more than one image carries weight
        x = images[:1].double() / 127.5 - 1 + sigma * draw(1, 1, 4, 4)
        c_skip, c_out, *_ = Objective(precond, predict).coefficients(torch.tensor(sigma, dtype=torch.float64))
        best = saying((Optimum(images)(x, sigma) - c_skip * x) / c_out, precond, predict, **given)
        assert (best(x, sigma) - Optimum(images)(x, sigma)).abs().max() < NEAR
        loss = expected_loss(best, images, x, sigma)
        gradient, = torch.autograd.grad(loss, best.model.value)
        assert (gradient.abs().max() < NEAR * loss.item()) == keeps
        for seed in range(3):
            moved = best.model.value.detach() + 0.01 * draw(1, 1, 4, 4, seed=seed)
            other = saying(moved, precond, predict, **given)
            assert not keeps or expected_loss(other, images, x, sigma) > loss


def test_least_l1_is_at_the_median():
    """Of three images with the same weight, pixel by pixel; the mean is the optimum of l2."""
    images = torch.tensor([0, 10, 250], dtype=torch.uint8)[:, None, None, None].expand(3, 1, 4, 4)
    y, sigma = images.double() / 127.5 - 1, torch.full((3,), 1e4, dtype=torch.float64)
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    for loss, best in (("l1", y[1]), ("l2", y.mean(0))):
        losses = [saying(said[None], "vp", "image", loss=loss).loss(y, sigma, (x - y) / 1e4).sum().item()
                  for said in (*y, y.mean(0))]
        at = min(range(4), key=losses.__getitem__)
        assert torch.equal((*y, y.mean(0))[at], best)


def test_losses_of_an_image_by_hand():
    error = torch.tensor([[3.0, -4.0], [0.0, 2.0]]).reshape(2, 2, 1, 1)
    sigma = torch.tensor([1.0, 0.5])
    c = 0.00054 * math.sqrt(2)
    by_hand = dict(l2=[25, 16], l1=[7, 4],
                   huber=[math.sqrt(25 + c**2) - c, math.sqrt(16 + c**2) - c])
    for loss, expected in by_hand.items():
        assert Objective("vp", loss=loss).measure(error, sigma).tolist() == pytest.approx(expected)
    small = torch.full((1, 2, 1, 1), 1e-6, dtype=torch.float64)
    small = Objective("vp", loss="huber").measure(small, torch.ones(1, dtype=torch.float64))
    assert small.item() == pytest.approx(2e-12 / (2 * c), rel=1e-4), "a square where e is far below c"


@pytest.mark.parametrize("precond", objectives.PRECONDITIONINGS)
def test_min_snr_is_the_weight_of_hang_et_al(precond):
    sigma = torch.tensor([0.01, 0.4, 1.0, 10.0])
    weight = Objective(precond, loss_weight="min-snr").weight(sigma)
    assert weight.tolist() == pytest.approx([5, 5, 1, 0.01])


def test_flow_is_the_straight_path():
    """x / (1 + sigma) is (1 - t) y + t n, and c_noise is t; t is uniform, and its range that of sigma."""
    o, sigma = Objective("flow"), torch.tensor(SIGMAS, dtype=torch.float64)
    t = sigma / (1 + sigma)
    y, n = draw(5), draw(5, seed=1)
    _, _, c_in, c_noise = o.coefficients(sigma)
    assert torch.allclose(c_in * (y + sigma * n), (1 - t) * y + t * n)
    assert torch.allclose(c_noise, 999 * t)
    drawn = o.training_sigma(100_000, torch.Generator().manual_seed(0))
    low, high = o.sigma_range()
    assert low <= drawn.min() * (1 + 1e-4) and drawn.max() <= high * (1 + 1e-4), "float32 roundings of 1 - t"
    shares = torch.histc(drawn / (1 + drawn), 10, 0, 1) / len(drawn)
    assert (shares - 0.1).abs().max() < 0.005
    assert low / (1 + low) == pytest.approx(1e-3) and high / (1 + high) == pytest.approx(1 - 1e-3)


def test_a_step_along_the_velocity_is_a_step_of_the_sampler():
    """dx_t / dt = n - y, as F says it, and dx / dsigma = (x - D) / sigma of the sampler: the same motion."""
    D, x, sigma = saying(draw(1, 1, 4, 4), "flow"), draw(1, 1, 4, 4, seed=1), 0.7
    with torch.no_grad():
        slope = (x - D(x, sigma)) / sigma
        velocity, t = D.model.value, sigma / (1 + sigma)
    step = 1e-6
    ahead = (x + step * slope) / (1 + sigma + step)
    moved = ahead - x / (1 + sigma)
    dt = (sigma + step) / (1 + sigma + step) - t
    assert torch.allclose(moved / dt, velocity, atol=1e-5)


@pytest.mark.parametrize("given", [dict(precond="flow"), dict(precond="flow", predict="image", loss="huber"),
                                   dict(predict="velocity", loss_weight="min-snr", loss="l1")])
def test_a_run_keeps_its_objective(tmp_path, given):
    """In its snapshots, and so in its samples, which are finite; with another it is another run."""
    o = dict(data="digits", n=20, width=4, blocks=1, channel_mult=(1, 1), batch=16, steps=60, warmup_steps=3,
             learning_rate=4e-3, dropout=0.0, snapshots=1, log_steps=10, device="cpu", out=str(tmp_path))
    D, _ = checkpoint.load_model(train.train(train.Options(**o, **given)))
    assert D.objective == Objective(**dict(precond="vp") | given)
    losses = [line["loss"] for line in disk.read_log(tmp_path / "log.jsonl")]
    assert losses[-1] < 0.9 * losses[0]
    x = heun(D, *_latents(D))
    assert x.isfinite().all() and x.abs().max() < 10
    with pytest.raises(ValueError, match="made with other options"):
        train.train(train.Options(**o))


def _latents(D):
    levels = noise_levels(max(0.002, D.sigma_min), min(80.0, D.sigma_max), 6)
    return sample.draw(D, range(4))[0], levels


@pytest.mark.parametrize("given, words", [
    (dict(precond="ddim"), "'ddim' is unknown; choose one of vp, ve, edm, flow"),
    (dict(predict="score"), "noise, image, velocity"), (dict(loss="l3"), "l2, l1, huber"),
    (dict(loss_weight="snr"), "published, min-snr"),
    (dict(precond="ve", predict="velocity"), "--predict velocity: .* give --predict noise")])
def test_what_does_not_exist_is_named(given, words):
    with pytest.raises(ValueError, match=words):
        Objective(**dict(precond="vp") | given)
