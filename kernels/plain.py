"""Layers in plain torch, which the fast forms of kernels/layers.py and of Triton are tested against."""
from torch.nn import functional as F


def plain_norm(x, weight, bias, groups, eps, shift=None, silu=False):
    """Group norm of x [B, C, H, W] + shift [B, C], then silu."""
    if shift is not None:
        x = x + shift[:, :, None, None]
    x = F.group_norm(x.contiguous(), groups, weight, bias, eps)  # its derivatives fail in other layouts
    return F.silu(x) if silu else x


def plain_resample(x, up):
    """x of twice the size, each pixel repeated, or of half, the mean of 2 x 2 pixels."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if up else F.avg_pool2d(x, 2)


def dropout_threshold(p):
    """The number of 16 bits below which dropout of probability p drops a value."""
    return min(round(p * 2**16), 2**16 - 1)
