"""From noise to samples: noise levels, solvers of the probability-flow equation, churn and guidance.

The equation is dx/dsigma = (x - D(x; sigma)) / sigma (EDM: Karras et al. 2022, eq. 1 with s = 1). Given D, an
Euler step from sigma to sigma' is x' = D + (sigma'/sigma) (x - D): deterministic DDIM (Song et al. 2021) is
the same step, and so `euler` is both.
"""
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from run import Checked, option

MOST_CHURN = math.sqrt(2) - 1  # by what share a noise level is raised, at most (EDM, algorithm 2)


@dataclass(frozen=True)
class Sampling(Checked):
    """How samples are drawn, whatever is sampled: options of sample.py and of emm.py."""
    sampler: str = option(
        "heun", "of second order, as published; euler is of first order, and is DDIM; dpm-solver is "
        "DPM-Solver++(2M), of second order with one evaluation a step", ("heun", "euler", "dpm-solver"))
    sample_steps: int = option(18, "sampling steps", least=2, below=10_001)
    sigma_min: float = option(0.002, "lowest noise level of sampling, raised to the network's")
    sigma_max: float = option(80.0, "highest noise level of sampling, lowered to the network's")
    rho: float = option(7.0, "exponent of the spacing of noise levels")
    churn: float = option(
        0.0, "EDM's S_churn: fresh noise before the steps, over all of them; 0 adds none", least=0)
    churn_min: float = option(0.0, "EDM's S_min: no fresh noise at noise levels below it", least=0)
    churn_max: float | None = option(None, "EDM's S_max: nor at those above it; none means no limit", least=0)
    churn_noise: float = option(1.0, "EDM's S_noise: standard deviation of the fresh noise", least=0)
    guidance: float = option(
        1.0, "weight W of classifier-free guidance, D_u + W (D_c - D_u), where D_u is not given the label",
        least=0)
    sample_labels: str = option(
        "uniform", "labels of samples: all equally likely, as published, as often as in training, or none",
        ("uniform", "training", "none"))

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.sigma_min < self.sigma_max < math.inf or not 0.1 <= self.rho < math.inf:
            raise ValueError(f"--sigma-min {self.sigma_min}, --sigma-max {self.sigma_max}, --rho {self.rho}: "
                             "need 0 < sigma_min < sigma_max and rho of 0.1 or more, all finite")
        if self.guidance != 1 and self.sample_labels == "none":
            raise ValueError(f"--guidance {self.guidance:g} weighs a label against none, and --sample-labels "
                             "none gives none; leave one of them out")
        if self.churn_max is not None and self.churn_max < self.churn_min:
            raise ValueError(f"--churn-min {self.churn_min:g} is above --churn-max {self.churn_max:g}, which "
                             "leaves no noise level for fresh noise; lower it")
        if self.churn and self.sampler == "dpm-solver":
            raise ValueError(f"--churn {self.churn} is for heun and euler: --sampler dpm-solver goes on with "
                             "the evaluation before, which fresh noise outdates; leave one of them out")

    @property
    def evaluations(self):
        """How many evaluations of the network a sample takes; the last Heun step is an Euler step."""
        steps = 2 * self.sample_steps - 1 if self.sampler == "heun" else self.sample_steps
        return steps if self.guidance == 1 else 2 * steps

    def levels(self, D, device=None):
        """The noise levels of sampling D, float64 [sample_steps + 1], within those D knows.

        Raises ValueError if there are none.
        """
        low, high = max(self.sigma_min, D.sigma_min), min(self.sigma_max, D.sigma_max)
        if low >= high:
            raise ValueError(f"--sigma-min {self.sigma_min:g} and --sigma-max {self.sigma_max:g} leave no "
                             f"noise level of those of the model, {D.sigma_min:g} to {D.sigma_max:g}")
        return noise_levels(low, high, self.sample_steps, self.rho, device)

    def solve(self, D, latents, sigmas, labels, seeds):
        """Samples of D, float64 [B, C, H, W] in about [-1, 1], from unit normal latents and their seeds."""
        if self.guidance != 1:
            D = guided(D, self.guidance)
        if self.sampler == "dpm-solver":
            return dpm_solver(D, latents, sigmas, labels)
        stir = partial(churned, seeds=seeds, sampling=self) if self.churn else None
        return heun(D, latents, sigmas, labels, stir, second=self.sampler == "heun")


def noise_levels(sigma_min, sigma_max, steps=18, rho=7.0, device=None):
    """sigma_0 > ... > sigma_{steps-1}, then 0, as float64 [steps + 1] (EDM, eq. 5)."""
    i = torch.arange(steps, dtype=torch.float64, device=device) / (steps - 1)
    sigma = (sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigma, sigma.new_zeros(1)])


@torch.inference_mode()
def heun(D, latents, sigmas, labels=None, stir=None, second=True):
    """Solve the equation from unit normal latents [B, C, H, W] by Heun steps, or Euler steps.

    Over `sigmas`, the last an Euler step, all of them without `second` (EDM, algorithm 1; algorithm 2 with
    `stir`: x and sigma before step k become stir(x, sigma, k)). Returns float64 [B, C, H, W].
    """
    x = latents.to(torch.float64) * sigmas[0]
    for i, (now, after) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        if stir:
            x, now = stir(x, now, i)
        slope = (x - D(x, now, labels).to(torch.float64)) / now
        ahead = x + (after - now) * slope
        if second and i < len(sigmas) - 2:
            slope_ahead = (ahead - D(ahead, after, labels).to(torch.float64)) / after
            ahead = x + (after - now) * (0.5 * slope + 0.5 * slope_ahead)
        x = ahead
    return x


@torch.inference_mode()
def dpm_solver(D, latents, sigmas, labels=None):
    """`heun`'s equation by DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    An Euler step is exact where D stays as it is. Here D goes on as it went in ln sigma over the step before,
    to the middle of this one. The first and the last step are Euler steps.
    """
    x, before = latents.to(torch.float64) * sigmas[0], None
    for i, (now, after) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        denoised = middle = D(x, now, labels).to(torch.float64)
        if 0 < i < len(sigmas) - 2:
            middle = denoised + (denoised - before) / 2 * (now / after).log() / (sigmas[i - 1] / now).log()
        x = after / now * x + (1 - after / now) * middle
        before = denoised
    return x


def churned(x, sigma, step, seeds, sampling):
    """x [B, C, H, W] with fresh noise, and the noise level to which that raises it (EDM, algorithm 2).

    The noise of each sample comes from (its seed, step) alone, and is drawn on the CPU.
    """
    highest = math.inf if sampling.churn_max is None else sampling.churn_max
    if not sampling.churn_min <= sigma <= highest:
        return x, sigma
    raised = sigma * (1 + min(sampling.churn / sampling.sample_steps, MOST_CHURN))
    # Philox counts: unlike hashes of 32 bits, two keys never share a stream
    noise = np.stack([np.random.Generator(np.random.Philox(key=[seed, step])).standard_normal(x.shape[1:])
                      for seed in seeds])
    scale = sampling.churn_noise * (raised**2 - sigma**2).sqrt()
    return x + scale * torch.from_numpy(noise).to(x.device), raised


def guided(D, weight):
    """D_u + weight (D_c - D_u) of D_c, which is given the labels, and D_u, which is not.

    Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), of denoisers instead of scores.
    """
    def D_guided(x, sigma, labels):
        without = D(x, sigma).to(torch.float64)
        return without + weight * (D(x, sigma, labels).to(torch.float64) - without)
    return D_guided


PUBLISHED = Sampling()  # 18 deterministic Heun steps
