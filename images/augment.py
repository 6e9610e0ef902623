"""Augmentations that are not to show in samples: the network is told what was done to an image it is shown.

After Karras et al. (2022, appendix F.2), with the same six changes of an image, as often, and the same
spreads of what they draw. It differs from their code in this:

- all is one warp, by bicubic interpolation at the pixels themselves, where theirs interpolates linearly
  between two wavelet filters at twice the resolution;
- their stretching is along an axis of the image half of the time. The two numbers that name it are the same
  there for a stretching and its inverse; here the angle is doubled, and they name one stretching alone;
- beyond its border an image goes on mirrored, here with its outermost pixels twice.
"""
import math

import torch
from torch.nn import functional as F

DIM = 9              # numbers that say what was done to an image
SCALE_STD = 0.2      # of the binary logarithm of the factor
STRETCH_STD = 0.2    # likewise, of the factor along the direction; across, it is the inverse
SHIFT_STD = 0.125    # of the side


def draw(count, probability, device=None):
    """How to change each of `count` images, by torch's default generator: float32 [count, 9].

    Horizontal and vertical flip (0 or 1), scale (unit normal), cosine - 1 and sine of the rotation,
    stretching (unit normal times the cosine and the sine of twice its direction), shift right and down (unit
    normals). Each is done with this probability, and else zero, but for the flips: half of all images are
    mirrored, and of those to be turned upside down half are.
    """
    flip_y, scales, rotates, stretches, shifts = (torch.rand(5, count, device=device) < probability).float()
    flip_x, half = (torch.rand(2, count, device=device) < 0.5).float()
    scale, stretch, right, down = torch.randn(4, count, device=device)
    rotation, direction = math.pi * (2 * torch.rand(2, count, device=device) - 1)
    rotation, stretch = rotation * rotates, stretch * stretches
    return torch.stack([
        flip_x, flip_y * half, scale * scales, rotation.cos() - 1, rotation.sin(),
        stretch * (2 * direction).cos(), stretch * (2 * direction).sin(), right * shifts, down * shifts], 1)


def warp(y, how):
    """The square images y [B, C, H, H] flipped, scaled, turned, stretched and shifted as `how` [B, 9] says.

    All about their middle. What is not changed at all stays as it is, bit for bit.
    """
    # in float64, whose products TF32 does not round
    places = F.affine_grid(inverse(how.double()), y.shape, align_corners=False).to(y.dtype)  # [B, H, H, 2]
    warped = F.grid_sample(y, places, mode="bicubic", padding_mode="reflection", align_corners=False)
    return torch.where(how.any(1)[:, None, None, None], warped, y)


def inverse(how):
    """Matrices [B, 2, 3] from each place of a changed image to that in the original, given `how` [B, 9].

    Places are (right, down), from -1 to 1.
    """
    scale, cosine, sine, u, v = how[:, 2:7].unbind(1)
    flips = torch.diag_embed(1 - 2 * how[:, :2])
    rotation = matrix(1 + cosine, sine, -sine, 1 + cosine)
    # exp(-k [[u, v], [v, -u]]) is a factor of exp(-k size) along the direction, and exp(k size) across
    size, k = (u**2 + v**2).sqrt(), math.log(2) * STRETCH_STD
    even, odd = (k * size).cosh(), -(k * size).sinh() / size.clamp(min=torch.finfo(size.dtype).tiny)
    stretch = matrix(even + odd * u, odd * v, odd * v, even - odd * u)
    linear = (-SCALE_STD * scale).exp2()[:, None, None] * flips @ rotation @ stretch
    shift = 2 * SHIFT_STD * how[:, 7:, None]  # [B, 2, 1]
    return torch.cat([linear, -linear @ shift], 2)


def matrix(a, b, c, d):
    """[[a, b], [c, d]] of numbers [B] each: [B, 2, 2]."""
    return torch.stack([a, b, c, d], 1).unflatten(1, (2, 2))
