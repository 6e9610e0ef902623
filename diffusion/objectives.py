"""What a network predicts, how its error is weighed and at which noise levels: see docs/objectives.md.

All of it is said of D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), which denoises x = y + sigma n: an
image y plus unit normal noise n. VP, VE and EDM are as published (Karras et al. 2022, table 1). Flow matching
(Lipman et al. 2023, arXiv 2210.02747) has the path x_t = (1 - t) y + t n, which is x / (1 + sigma) at
sigma = t / (1 - t), and its F predicts the velocity n - y.
"""
import math
from dataclasses import dataclass

import torch

PUBLISHED = dict(vp="noise", ve="noise", edm="velocity", flow="velocity")  # what F predicts, up to its sign
PRECONDITIONINGS = tuple(PUBLISHED)
PREDICTIONS = ("noise", "image", "velocity")
LOSS_WEIGHTS = ("published", "min-snr")
LOSSES = ("l2", "l1", "huber")

VP_BETA_D, VP_BETA_MIN, VP_EPSILON_T, VP_STEPS = 19.9, 0.1, 1e-5, 1000
VE_SIGMA_MIN, VE_SIGMA_MAX = 0.02, 100.0
EDM_SIGMA_DATA, EDM_P_MEAN, EDM_P_STD = 0.5, -1.2, 1.2
FLOW_EPSILON_T = 1e-3  # t stays this far from 0 and 1, where 1 / sigma and sigma are infinite
MIN_SNR_GAMMA = 5.0    # Hang et al. (2023)
HUBER = 0.00054        # c of the pseudo-Huber loss over the root of the dimension: Song and Dhariwal (2024)


@dataclass(frozen=True)
class Objective:
    """A preconditioning and how it is trained. Raises ValueError for what does not exist.

    precond      "vp", "ve", "edm" or "flow"
    predict      "noise", "image" or "velocity", what F is; None means as in `PUBLISHED`
    loss_weight  "published", by the preconditioning whatever F is, or "min-snr"
    loss         "l2", "l1" or "huber"
    """
    precond: str
    predict: str | None = None
    loss_weight: str = "published"
    loss: str = "l2"

    def __post_init__(self):
        choices = ((self.precond, PRECONDITIONINGS), (self.predict, (None, *PREDICTIONS)),
                   (self.loss_weight, LOSS_WEIGHTS), (self.loss, LOSSES))
        for value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{value!r} is unknown; choose one of {', '.join(filter(None, allowed))}")
        if (self.precond, self.predict) == ("ve", "velocity"):
            raise ValueError("--predict velocity: the velocity of VE's path y + sigma n is n itself; "
                             "give --predict noise")

    def coefficients(self, sigma):
        """c_skip, c_out, c_in and c_noise, of the shape of sigma or numbers."""
        if self.precond in ("vp", "edm"):
            data = EDM_SIGMA_DATA if self.precond == "edm" else 1
            total = sigma**2 + data**2
            c_in = 1 / total.sqrt()
            c_noise = sigma.log() / 4 if self.precond == "edm" else (VP_STEPS - 1) * vp_sigma_inverse(sigma)
        elif self.precond == "ve":
            c_in, c_noise = 1, (0.5 * sigma).log()
        else:
            c_in = 1 / (1 + sigma)
            c_noise = (VP_STEPS - 1) * sigma * c_in  # t, in VP's units
        signed = -sigma if self.precond in ("vp", "flow") else sigma  # F of VE and EDM: minus noise, velocity
        predict = self.predict or PUBLISHED[self.precond]
        if predict == "noise":
            c_skip, c_out = 1, signed
        elif predict == "image":
            c_skip, c_out = 0, 1
        elif self.precond == "flow":
            c_skip, c_out = c_in, signed * c_in
        else:
            c_skip, c_out = data**2 / total, signed * data / total.sqrt()
        return c_skip, c_out, c_in, c_noise

    def weight(self, sigma):
        """The weight of |D - y|^2 at sigma [B]: [B].

        Min-SNR's is min(SNR, gamma) with SNR = 1 / sigma^2, as of data with unit variance.
        """
        if self.loss_weight == "min-snr":
            return (1 / sigma**2).clamp(max=MIN_SNR_GAMMA)
        if self.precond == "flow":
            return (1 + 1 / sigma)**2
        return 1 / sigma**2 + (1 / EDM_SIGMA_DATA**2 if self.precond == "edm" else 0)

    def measure(self, error, sigma):
        """The loss [B] of errors D - y [B, C, H, W] at sigma [B].

        With the vector e = sqrt(weight) (D - y) of an image, l2 is |e|^2, l1 the sum of its absolute values,
        and huber sqrt(|e|^2 + c^2) - c: of the whole image, not of each pixel, as by Song and Dhariwal.
        """
        weight = self.weight(sigma)
        if self.loss == "l2":
            return weight * error.square().flatten(1).sum(1)
        e = weight.sqrt()[:, None] * error.flatten(1)
        if self.loss == "l1":
            return e.abs().sum(1)
        c = HUBER * math.sqrt(e.shape[1])
        return (e.square().sum(1) + c**2).sqrt() - c

    def training_sigma(self, count, generator=None, device=None):
        """Noise levels [count] drawn as this preconditioning is trained with."""
        if self.precond == "edm":
            z = torch.randn(count, generator=generator, device=device)
            return (z * EDM_P_STD + EDM_P_MEAN).exp()
        u = torch.rand(count, generator=generator, device=device)
        if self.precond == "flow":  # t is uniform
            t = FLOW_EPSILON_T + u * (1 - 2 * FLOW_EPSILON_T)
            return t / (1 - t)
        return vp_sigma(1 + u * (VP_EPSILON_T - 1)) if self.precond == "vp" \
            else VE_SIGMA_MIN * (VE_SIGMA_MAX / VE_SIGMA_MIN) ** u

    def sigma_range(self):
        """The lowest and the highest noise level that D is for."""
        if self.precond == "vp":
            return tuple(float(vp_sigma(torch.tensor(t))) for t in (VP_EPSILON_T, 1.0))
        if self.precond == "flow":
            return FLOW_EPSILON_T / (1 - FLOW_EPSILON_T), (1 - FLOW_EPSILON_T) / FLOW_EPSILON_T
        return (VE_SIGMA_MIN, VE_SIGMA_MAX) if self.precond == "ve" else (0.0, math.inf)


def vp_sigma(t):
    """sigma(t) of the VP process. exp(.) - 1, not expm1: in float32 these are the published noise levels."""
    return ((0.5 * VP_BETA_D * t**2 + VP_BETA_MIN * t).exp() - 1).sqrt()


def vp_sigma_inverse(sigma):
    return ((VP_BETA_MIN**2 + 2 * VP_BETA_D * (1 + sigma**2).log()).sqrt() - VP_BETA_MIN) / VP_BETA_D
