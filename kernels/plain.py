"""Layers as torch has them: what the fast forms are tested against, and what serves under transforms.

Their derivatives have derivatives; the fast forms' backward passes, written by hand, have none.
"""
import torch
from torch.autograd import forward_ad
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


def plain_attention(q, k, v):
    """Softmax attention of q, k, v [B, 1, HW, C]; holds the HW x HW weights."""
    return (q @ k.mT * q.shape[-1]**-0.5).softmax(-1) @ v


def transformed():
    """Whether torch.func (jvp, vmap, ...) or forward-mode differentiation is active; they need plain code."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
