"""Convolution, norm with silu and dropout, and attention, in the forms that are fastest on CPU and on GPU.

    y = conv2d(x, weight, bias)                                          # padded to the same size
    y = norm(x, weight, bias, groups, eps, shift, silu=True, dropout=p)

On a CPU convolutions are two thirds of a training step, and oneDNN's are a third faster where the channels
of a pixel lie side by side (torch.channels_last), because oneDNN need not reorder other layouts there and
back. torch's group norm is slower in that layout, and so it is written out here, in passes over [B, HW, C].
The gain of each is in docs/performance.md.

On a GPU the channels lie side by side too, as tensor cores read them. torch's group norm returns the other
layout there, and so costs 225 copies a step (91 of 377 ms: DDPM++ of width 128, batch 512, TF32, an H200),
besides the passes that silu and dropout take; kernels/norm_triton.py does all of it in one.

The CPU's forms are for float32, the GPU's for float32 and bfloat16. Under torch.compile, torch.func and on
other devices each function is the plain one, which the fast ones are tested against. A fast form, whose
backward pass is written by hand, has no second derivative: take torch.func for that, or float64.
"""
import warnings
from functools import lru_cache

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.plain import dropout_threshold, plain_norm, plain_resample

FEW_TOKENS = 256  # up to here the HW x HW weights of attention are fewer than its inputs, at 256 channels
FEW_PIXELS = 4  # up to here a convolution is one product of matrices: the lowest level of 8x8 images


def transformed():
    """Whether torch.func (jvp, vmap, ...) or forward-mode differentiation is active; they need plain code."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def plain_only():
    return transformed() or torch.compiler.is_compiling()


def fast(x):
    """Whether x is for the forms of this file."""
    return (x.device.type == "cpu" and x.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu") and not plain_only())


@lru_cache(maxsize=None)
def runs_triton(device, right):
    """Whether a Triton kernel can be used: on an NVIDIA GPU of compute capability 8.0 or later, if right.

    `right(device)` compares it with its plain form, once. It may fail to build, too: Triton compiles what
    launches it with the machine's C compiler, which may be missing.
    """
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        if right(device):
            return True
        why = "what it computes is wrong"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # ImportError, or whatever its compilers raise
        why = repr(error)
    warnings.warn(f"Triton does not run here ({why}); plain forms serve, which are slower", stacklevel=2)
    return False


def forms_are_right(device):
    """Whether the norm and the resampling of Triton agree with the plain ones on a small x."""
    from kernels.norm_triton import norm
    from kernels.resample_triton import resample
    x, one = torch.arange(32.0, device=device).sin().view(1, 8, 2, 2), torch.ones(8, device=device)
    y = plain_norm(x, one, one, 2, 1e-6, silu=True)
    return (torch.allclose(norm(x, one, one, 2, 1e-6, silu=True), y, atol=1e-5)
            and all(torch.allclose(resample(x, up), plain_resample(x, up)) for up in (False, True)))


def fused(x):
    """Whether x is for the forms of kernels/norm_triton.py and resample_triton.py."""
    return (x.dtype in (torch.float32, torch.bfloat16) and not plain_only()
            and runs_triton(x.device, forms_are_right))


def laid_out(x):
    """x in the layout that the fast forms read."""
    return x.contiguous(memory_format=torch.channels_last) if fast(x) or fused(x) else x


def pixels(x):
    """[B, C, H, W] as [B, HW, C]: a view in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def image(x, shape):
    """The inverse of `pixels`, for an image of that shape."""
    return x.view(shape[0], *shape[2:], -1).permute(0, 3, 1, 2)


def conv2d(x, weight, bias=None):
    """x [B, C, H, W] with weight [K, C, k, k], k odd, padded to the same size: [B, K, H, W]."""
    k, (H, W) = weight.shape[-1], x.shape[2:]
    if k == 1 and (fast(x) or fused(x)):  # on a GPU, cuBLAS adds the bias as it writes
        return image(F.linear(pixels(x), weight.flatten(1), bias), x.shape)
    if fast(x) and H * W <= FEW_PIXELS:
        bias = bias if bias is None else bias.repeat(H * W)
        return image(F.linear(pixels(x).flatten(1), matrix(weight, H, W), bias), x.shape)
    return F.conv2d(x, weight, bias, padding=k // 2)


def matrix(weight, H, W):
    """The matrix [HWK, HWC] that a convolution with weight [K, C, k, k] is on images of H x W pixels."""
    K, C, k, _ = weight.shape
    rows = taps(H, W, k) @ weight.permute(2, 3, 0, 1).reshape(k * k, K * C)
    return rows.view(H * W, H * W, K, C).transpose(1, 2).reshape(H * W * K, H * W * C)


@lru_cache
@torch.inference_mode(False)
def taps(H, W, k):
    """0 or 1 [HW * HW, k * k]: which tap of a k x k filter takes each pixel (second) to each (first)."""
    y, x = torch.arange(H * W) // W, torch.arange(H * W) % W
    row, column = y - y[:, None] + k // 2, x - x[:, None] + k // 2
    inside = (0 <= row) & (row < k) & (0 <= column) & (column < k)
    hot = F.one_hot((row * k + column).where(inside, k * k), k * k + 1)[..., :-1]
    return hot.to(torch.float32).flatten(0, 1)


def norm(x, weight, bias, groups, eps, shift=None, silu=False, dropout=0.0):
    """Group norm of x [B, C, H, W] + shift [B, C], then silu, then dropout."""
    if fused(x):
        from kernels import norm_triton
        return norm_triton.norm(x, weight, bias, groups, eps, shift, silu, dropout)
    B, C, H, W = x.shape
    mask = None
    if dropout and x.device.type == "cpu" and not plain_only():
        mask = dropout_mask(x.numel(), dropout).view(B, H * W, C)
    if fast(x):
        return GroupNorm.apply(x, weight, bias, shift, mask, groups, eps, silu)
    y = plain_norm(x, weight, bias, groups, eps, shift, silu)
    return F.dropout(y, dropout) if mask is None else y * mask.view(x.shape).to(x.dtype)


class GroupNorm(torch.autograd.Function):
    """With the mean m and the standard deviation d of x + shift in a group, c = m - shift and a = weight / d:

    h = a (x - c) + bias;   y = mask h gate, gate = sigmoid(h)
    """

    @staticmethod
    def forward(ctx, x, weight, bias, shift, mask, groups, eps, silu):
        inputs, shape, n = (x, weight, bias, shift), x.shape, x[0, 0].numel()
        average = averaging(shape[1], groups, n)
        x = pixels(x)                                                 # [B, HW, C]
        sum_x = x.sum(1)                                              # [B, C]
        if shift is None:
            c = sum_x @ average
        else:
            c = (torch.add(sum_x, shift, alpha=n) @ average).sub_(shift)
        y = torch.ops.aten.mse_loss(x, c[:, None], 0)                 # (x - c)^2 in one pass
        scale = (y.sum(1) @ average).add_(eps).rsqrt_()               # 1 / d
        a = scale * weight
        torch.addcmul(torch.addcmul(bias, a, c, value=-1)[:, None], x, a[:, None], out=y)
        gate = torch.sigmoid(y) if silu else None
        for factor in (gate, mask):
            if factor is not None:
                y.mul_(factor)
        ctx.save_for_backward(*inputs, mask, sum_x, c, scale, average, gate, y if silu else None)
        return image(y, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, bias, shift, mask, sum_x, c, scale, average, gate, y = ctx.saved_tensors
        shape, x, g = x.shape, pixels(x), pixels(g)
        if gate is not None:  # dy / dh = mask gate + y (1 - gate)
            g = torch.lerp(y, y.new_ones(()) if mask is None else mask, gate).mul_(g)
        elif mask is not None:
            g = g * mask
        gx, a = g * x, scale * weight
        sum_g = g.sum(1)                                              # [B, C]
        weight_g = gx.sum(1).addcmul_(sum_g, c, value=-1).mul_(scale)
        slope = ((a * weight_g) @ average).mul_(scale).neg_()
        constant = ((a * sum_g) @ average).addcmul_(slope, c).neg_()
        torch.addcmul(constant[:, None], g, a[:, None], out=gx).addcmul_(x, slope[:, None])
        shift = None
        if ctx.needs_input_grad[3]:  # the sum of gx over pixels
            shift = constant.mul_(x.shape[1]).addcmul_(a, sum_g).addcmul_(slope, sum_x)
        return image(gx, shape), weight_g.sum(0), sum_g.sum(0), shift, None, None, None, None


def resample(x, up):
    """x [B, C, H, W] of twice the size, each pixel repeated, or of half, the mean of 2 x 2 pixels."""
    if fused(x):
        from kernels import resample_triton
        return resample_triton.resample(x, up)
    return plain_resample(x, up)


def scaled_sum(conv, h, x, skip, scale):
    """(conv(h) + skip(x)) scale, of convolutions as unet.Conv2d; skip may be None."""
    if fused(h):  # no passes of their own: the weights take the scale, and a product adds the biases
        if skip is None:
            return torch.add(conv.convolve(h, scale * conv.bias, scale), x, alpha=scale)
        return conv.convolve(h, None, scale) + skip.convolve(x, scale * (conv.bias + skip.bias), scale)
    h, x = conv(h), x if skip is None else skip(x)
    # in place, but for transforms, which need what was there
    return (h + x) * scale if transformed() else h.add_(x).mul_(scale)


@lru_cache
@torch.inference_mode(False)
def averaging(channels, groups, n):
    """[C, C] that takes sums [B, C] over n pixels to means over all pixels and channels of a group."""
    size = channels // groups
    return torch.block_diag(*torch.ones(groups, size, size)) * (groups / channels / n)


def dropout_mask(count, p):
    """0 with probability p, or 1 / (1 - p), count times.

    p is rounded to 1 / 65,536: 16 random bits a value take a fifth of the time of torch's dropout.
    """
    dropped = dropout_threshold(p)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)[:count]
    mask = torch.empty(count)
    torch.ge(bits, dropped - 2**15, out=mask)  # 0 or 1, without a tensor of booleans
    return mask.mul_(2**16 / (2**16 - dropped))


def attention(q, k, v):
    """Softmax attention of q, k, v [B, heads, T, C], where torch can without holding the HW x HW weights."""
    # torch's other kernels for float32 use no tensor cores of an H100
    few = q.is_cuda and q.dtype == torch.float32 and q.shape[2] <= FEW_TOKENS
    if few or q.dtype == torch.float64 or transformed():
        return (q @ k.mT * q.shape[-1]**-0.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)
