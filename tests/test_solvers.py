import math

import numpy as np
import pytest
import torch

from diffusion import denoiser
from diffusion.solvers import Sampling, churned, dpm_solver, guided, heun, noise_levels
from test_unet import GOLDEN, RELATIVE, close, golden, tolerance

ROUNDING = 1e-10  # of float64 states up to 80, over 18 steps summed in another order


def gaussian(x, sigma, labels=None):
    """D of data of variance 1: x(sigma) goes in proportion to sqrt(1 + sigma^2)."""
    return x / (1 + sigma**2)


def end(steps, **given):
    """How far a sample of `gaussian` ends from the exact one, whose latent is 1."""
    o = Sampling(sample_steps=steps, **given)
    sigmas = noise_levels(0.002, 80.0, steps)
    x = o.solve(gaussian, torch.ones(1, 1, 1, 1), sigmas, None, [0])
    return abs(float(x) - 80 / (1 + 80**2) ** 0.5)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_sampler_agrees_with_the_published_one(path):
    config, a, D, labels = golden(path)
    sigmas = Sampling().levels(D)
    x = heun(D, a["latents"], sigmas, labels)
    assert torch.equal(x, Sampling().solve(D, a["latents"], sigmas, labels, range(len(x))))
    limit = tolerance(D, lambda: heun(D, a["latents"], sigmas, labels))
    assert limit == RELATIVE or path.stem == "ddpmpp-vp-fourier" and limit < 5e-3
    assert x.dtype == torch.float64 and close(x, a["sampled"], limit)


def test_noise_levels():
    sigmas = noise_levels(0.002, 80.0)
    assert len(sigmas) == 19 and sigmas[0] == pytest.approx(80)
    assert sigmas[-2] == pytest.approx(0.002) and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all() and sigmas.dtype == torch.float64
    D = denoiser.Denoiser("ddpmpp", "ve", 8, 1, width=4, blocks=1)
    sigmas = Sampling(sigma_max=1000.0, sample_steps=5).levels(D)
    assert len(sigmas) == 6 and sigmas[0] == pytest.approx(D.sigma_max)
    assert sigmas[-2] == pytest.approx(D.sigma_min)


@pytest.mark.parametrize("sampler", ["heun", "euler", "dpm-solver"])
def test_a_single_image_is_reached_exactly(sampler):
    """For one training image y the flow is linear: x(sigma) - y falls as sigma does, at any step size."""
    y = torch.full((1, 1, 2, 2), 0.25, dtype=torch.float64)
    o = Sampling(sampler=sampler)
    x = o.solve(lambda x, sigma, labels: y.expand_as(x), torch.randn(3, 1, 2, 2), noise_levels(0.002, 80.0),
                None, range(3))
    assert torch.allclose(x, y.expand_as(x), atol=1e-12)


def test_orders():
    """Half the step quarters the error of a method of second order, and halves that of one of first."""
    assert end(72) < 0.3 * end(36) < 0.09 * end(18)
    assert end(72, sampler="dpm-solver") < 0.3 * end(36, sampler="dpm-solver")
    assert 0.4 < end(72, sampler="euler") / end(36, sampler="euler") < 0.6
    assert end(18) < end(18, sampler="dpm-solver") < end(18, sampler="euler")


def test_ddim_is_euler():
    """DDIM as published, over x / sqrt(1 + sigma^2) and the noise that is predicted there."""
    sigmas = noise_levels(0.02, 80.0, 10)
    latents = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha = 1 / (1 + sigmas**2)  # its cumulative product; sigma^2 = (1 - alpha) / alpha
    z = latents * sigmas[0] * alpha[0].sqrt()
    for now, after in zip(alpha[:-1], alpha[1:]):
        sigma = ((1 - now) / now).sqrt()
        y = torch.tanh(z / now.sqrt() / (1 + sigma**2))
        noise = (z - now.sqrt() * y) / (1 - now).sqrt()
        z = after.sqrt() * y + (1 - after).sqrt() * noise
    x = heun(lambda x, sigma, labels: torch.tanh(x / (1 + sigma**2)), latents, sigmas, second=False)
    assert torch.allclose(x, z, atol=ROUNDING, rtol=0)


def test_dpm_solver_is_the_published_algorithm():
    """Lu et al., algorithm 2, in its own terms: lambda = -ln sigma, h and r of each step."""
    sigmas = noise_levels(0.02, 80.0, 8).tolist()
    latents = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def D(x, sigma, labels=None):
        return torch.tanh(x / (1 + sigma**2))
    x, denoised = latents * sigmas[0], []
    for i in range(7):
        denoised.append(D(x, sigmas[i]))
        h, mixed = math.log(sigmas[i] / sigmas[i + 1]), denoised[-1]
        if i:
            r = math.log(sigmas[i - 1] / sigmas[i]) / h
            mixed = (1 + 1 / (2 * r)) * denoised[-1] - 1 / (2 * r) * denoised[-2]
        x = sigmas[i + 1] / sigmas[i] * x - math.expm1(-h) * mixed
    assert torch.allclose(dpm_solver(D, latents, torch.tensor(sigmas, dtype=torch.float64)), D(x, sigmas[7]),
                          atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("second", [True, False])
def test_churn_is_algorithm_2(second):
    """The whole of EDM's algorithm 2 for one sample at a time, beside a batch of three."""
    o = Sampling(sampler="heun" if second else "euler", churn=3.0, churn_min=0.05, churn_max=50.0,
                 churn_noise=1.003, sample_steps=12)
    seeds, t = [4, 9, 2**32 - 1], noise_levels(0.02, 80.0, 12).tolist()
    latents = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    x = o.solve(gaussian, latents, torch.tensor(t, dtype=torch.float64), None, seeds)
    raised = 0
    for seed, latent, found in zip(seeds, latents.double().numpy(), x.numpy()):
        plain = latent * t[0]
        for i in range(12):
            gamma = min(3.0 / 12, 2**0.5 - 1) if 0.05 <= t[i] <= 50.0 else 0
            raised += gamma > 0
            noise = np.random.Generator(np.random.Philox(key=[seed, i])).standard_normal((1, 2, 2)) * 1.003
            hat = t[i] + gamma * t[i]
            there = plain + (hat**2 - t[i]**2)**0.5 * noise
            d = (there - gaussian(there, hat)) / hat
            plain = there + (t[i + 1] - hat) * d
            if t[i + 1] and second:
                d_after = (plain - gaussian(plain, t[i + 1])) / t[i + 1]
                plain = there + (t[i + 1] - hat) * (d / 2 + d_after / 2)
        assert np.allclose(plain, found, atol=ROUNDING, rtol=0)
    assert 0 < raised < 3 * 12
    still = heun(gaussian, latents, torch.tensor(t), second=second)
    assert not torch.allclose(still, x, atol=1e-3)


def test_churn_adds_the_variance_that_it_says():
    x, sigma = torch.zeros(2000, 1, 1, 1, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    noisy, raised = churned(x, sigma, 0, range(2000), Sampling(churn=1e9))
    assert raised == pytest.approx(2 * 2**0.5) and noisy.std() == pytest.approx(2.0, rel=0.05)
    assert torch.equal(noisy[7:9], churned(x[:2], sigma, 0, [7, 8], Sampling(churn=1e9))[0])
    assert not torch.equal(noisy, churned(x, sigma, 1, range(2000), Sampling(churn=1e9))[0])
    assert churned(x, sigma, 0, range(2000), Sampling(churn=1.0, churn_max=1.9)) == (x, sigma)


def test_guidance_is_two_evaluations():
    D = denoiser.Denoiser("ddpmpp", "edm", 8, 1, label_dim=3, width=8, blocks=1,
                      generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for p in D.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        x, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 2, 1, 1])
        conditional, without = D(x, 0.7, labels).double(), D(x, 0.7).double()
        assert not torch.allclose(conditional, without, atol=1e-4)
        assert torch.equal(guided(D, 2.5)(x, 0.7, labels), without + 2.5 * (conditional - without))
        assert torch.allclose(guided(D, 0.0)(x, 0.7, labels), without)


@pytest.mark.parametrize("given, count", [
    (dict(), 35), (dict(sampler="euler"), 18), (dict(sampler="dpm-solver", sample_steps=10), 10),
    (dict(churn=40.0), 35), (dict(guidance=1.5), 70), (dict(sampler="euler", guidance=0.0), 36)])
def test_evaluations_are_counted_right(given, count):
    calls, o = [], Sampling(**given)

    def D(x, sigma, labels=None):
        calls.append(labels)
        return gaussian(x, sigma)
    sigmas = noise_levels(0.002, 80.0, o.sample_steps)
    o.solve(D, torch.ones(1, 1, 1, 1), sigmas, torch.zeros(1, dtype=torch.int64), [0])
    assert len(calls) == o.evaluations == count
    assert sum(labels is None for labels in calls) == (count // 2 if o.guidance != 1 else 0)


@pytest.mark.parametrize("given, words", [
    (dict(sample_steps=1), "--sample-steps 1"), (dict(rho=float("nan")), "--rho nan"),
    (dict(sigma_min=90.0), "sigma_min"), (dict(churn=-1.0), "--churn -1.0"),
    (dict(churn_max=math.inf), "--churn-max inf"), (dict(churn_noise=math.nan), "--churn-noise nan"),
    (dict(guidance=math.inf), "--guidance inf"),
    (dict(churn=1.0, sampler="dpm-solver"), "for heun and euler")])
def test_bad_options(given, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**given)
