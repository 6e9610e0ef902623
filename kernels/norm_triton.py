"""Group norm of x + shift, silu and dropout on CUDA: a Triton kernel forward and one back, in channels_last.

    h = (x + shift - mean) scale weight + bias;   y = mask h sigmoid(h);   scale = 1 / deviation of a group

In channels_last an image is [HW, C], and a group a block of C / groups columns. A program has one image and
as many whole groups as fit into CHANNELS of a pixel: what it reads of a pixel is one run of memory, and its
neighbours, which run at the same time, read the rest of the line. Where its block of x fits into registers
(`tiling`) it is read once, which is the least there is: 2 passes over memory forward (x, y) and 3 back
(gradient, x, its gradient). Else it goes over the block twice, in tiles of pixels, the second time in the L2
cache: what runs at one time takes 17 to 34 MB. Of ten ways to cut it, this is the fastest on an H100: 512
images of 256 channels at 32x32 take 0.49 ms forward and 0.92 back in float32, 0.35 and 0.60 in bfloat16.

All arithmetic is in float32, whatever x is; the variance is of differences from the mean, and tiles are
combined as by Chan et al. Dropout is drawn here, from one seed in the device's memory: back, the same mask is
drawn again and never stored. It takes 16 bits a value (p is rounded to 1 / 65,536) of Philox with 7 rounds,
the fewest that pass BigCrush (Salmon et al. 2011): with 10, and a number of its own for each value, drawing
would take longer than the memory.
`make kernel-report` prints registers, spills and the floor of each shape.
"""
import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels.plain import dropout_threshold

CHANNELS = 16           # of a pixel that a program reads at one time: a sector of a GPU's memory, or two
WHOLE = 2**14           # values of x that a program keeps in registers: 1,024 pixels of 16 channels
WHOLE_FORWARD = {2: 2**13, 4: 2**14}  # by bytes a value; back, what is read twice is also computed twice
TILE = 2**12            # values at one time where there are more; read again, they are still in L2
VALUES = 32, 16         # a thread, of a whole block and of a tile: without spills
ROUNDS = tl.constexpr(7)


def tiling(HW, C, groups, bytes, back=False):
    """How a kernel is cut and launched for images of HW pixels, C channels and so many bytes a value.

    Dropout is drawn by K and GROUPS, which are the same forward and back.
    """
    size = C // groups
    together = min(groups, max(1, CHANNELS // size))  # groups of a program
    K = max(8, triton.next_power_of_2(size * together))
    P = max(16, triton.next_power_of_2(HW))
    whole = P * K <= (WHOLE if back else WHOLE_FORWARD[bytes])
    P = P if whole else max(16, TILE // K)
    warps = max(1, P * K // (32 * VALUES[0 if whole else 1]))
    return dict(SIZE=size, GROUPS=together, K=K, P=P, WHOLE=whole, DRAWN=16 // bytes, num_warps=warps)


@triton.jit
def _group(s, K: tl.constexpr, SIZE: tl.constexpr):
    """For each channel [K], the sum of s over the channels of its group."""
    k = tl.arange(0, K)
    return tl.sum(tl.where(k[:, None] // SIZE == k[None, :] // SIZE, s[None, :], 0.0), 1)


@triton.jit
def _place(C, K: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """Of this program: its image, its channels [K], and which of them there are."""
    blocks = tl.cdiv(C, SIZE * GROUPS)
    k = tl.arange(0, K)
    channel = tl.program_id(0) % blocks * (SIZE * GROUPS) + k
    return tl.program_id(0) // blocks, channel, (k < SIZE * GROUPS) & (channel < C)


@triton.jit
def _read(X, pixel, HW, channel, there, C):
    """x [P, K] in float32, 0 where there is none."""
    mask = (pixel < HW)[:, None] & there[None, :]
    return tl.load(X + pixel[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32), mask


@triton.jit
def _kept(seed, pixel, HW, dropped, K: tl.constexpr, DRAWN: tl.constexpr):
    """Which values [P, K] dropout keeps. The DRAWN of a Philox number lie side by side, as a thread reads."""
    row = tl.program_id(0) * HW + pixel
    at = row[:, None] * (K // DRAWN) + tl.arange(0, K // DRAWN)[None, :]
    a, b, c, d = tl.randint4x(seed, at, ROUNDS)
    bits = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.uint32, bitcast=True)
    if DRAWN == 8:
        bits = tl.join(bits & 0xFFFF, bits >> 16)
    else:
        bits = bits >> 16
    return tl.reshape(bits, (pixel.shape[0], K)) >= dropped.to(tl.uint32)


@triton.jit
def _moments(x, mask, count, K: tl.constexpr, SIZE: tl.constexpr):
    """For each channel [K], its group's mean over `count` pixels, and the sum of squares about that mean."""
    mean = _group(tl.sum(x, 0), K, SIZE) / (count * SIZE)
    x = tl.where(mask, x - mean[None, :], 0.0)
    return mean, _group(tl.sum(x * x, 0), K, SIZE)


@triton.jit
def _write(Y, x, a, b, pixel, HW, channel, there, C, seed, dropped, factor,
           K: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr, DRAWN: tl.constexpr):
    h = x * a[None, :] + b[None, :]
    if SILU:
        h = h * tl.sigmoid(h)
    if DROPOUT:
        h = tl.where(_kept(seed, pixel, HW, dropped, K, DRAWN), h * factor, 0.0)
    mask = (pixel < HW)[:, None] & there[None, :]
    tl.store(Y + pixel[:, None] * C + channel[None, :], h.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(X, SHIFT, WEIGHT, BIAS, SEED, MEAN, SCALE, Y, HW, C, B, shift_row, eps, dropped,
                   factor, SILU: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr,
                   P: tl.constexpr, WHOLE: tl.constexpr, DRAWN: tl.constexpr):
    """X, Y [B, HW, C]; SHIFT [B, C], one row where shift_row is 0, or None; SEED None without dropout.

    MEAN, SCALE float32 [B, groups]. A value whose 16 bits are below `dropped` is 0; `factor` makes up for it.
    """
    DROPOUT: tl.constexpr = SEED is not None
    image, channel, there = _place(C, K, SIZE, GROUPS)
    X += image.to(tl.int64) * HW * C
    Y += image.to(tl.int64) * HW * C
    pixel = tl.arange(0, P)
    shift = tl.zeros((K,), tl.float32)
    if SHIFT is not None:
        shift = tl.load(SHIFT + image * shift_row + channel, mask=there, other=0.0).to(tl.float32)
    if WHOLE:
        x, mask = _read(X, pixel, HW, channel, there, C)
        mean, square = _moments(tl.where(mask, x + shift[None, :], 0.0), mask, HW, K, SIZE)
    else:
        mean, square = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.float32)
        for first in range(0, HW, P):
            x, mask = _read(X, first + pixel, HW, channel, there, C)
            count = tl.minimum(P, HW - first)
            m, s = _moments(tl.where(mask, x + shift[None, :], 0.0), mask, count, K, SIZE)
            square += s + (m - mean) * (m - mean) * (SIZE * count * (first / (first + count)))
            mean += (m - mean) * (count / (first + count))
    scale = tl.rsqrt(square / (HW * SIZE) + eps)
    a = scale * tl.load(WEIGHT + channel, mask=there, other=0.0).to(tl.float32)
    b = tl.load(BIAS + channel, mask=there, other=0.0).to(tl.float32) - (mean - shift) * a
    group = image * (C // SIZE) + channel // SIZE
    tl.store(MEAN + group, mean, mask=there & (channel % SIZE == 0))
    tl.store(SCALE + group, scale, mask=there & (channel % SIZE == 0))
    seed = tl.load(SEED) if DROPOUT else 0
    if WHOLE:
        _write(Y, x, a, b, pixel, HW, channel, there, C, seed, dropped, factor, K, SILU, DROPOUT, DRAWN)
    else:
        for first in range(0, HW, P):
            x, _ = _read(X, first + pixel, HW, channel, there, C)
            _write(Y, x, a, b, first + pixel, HW, channel, there, C, seed, dropped, factor,
                   K, SILU, DROPOUT, DRAWN)


@triton.jit
def _inner(X, G, shift, mean, scale, weight, bias, pixel, HW, channel, there, C, seed, dropped, factor,
           K: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr, DRAWN: tl.constexpr):
    """z = (x + shift - mean) scale, and the gradient of h, both [P, K]."""
    x, mask = _read(X, pixel, HW, channel, there, C)
    g, _ = _read(G, pixel, HW, channel, there, C)
    z = tl.where(mask, (x + (shift - mean)[None, :]) * scale[None, :], 0.0)
    if DROPOUT:
        g = tl.where(_kept(seed, pixel, HW, dropped, K, DRAWN), g * factor, 0.0)
    if SILU:
        h = z * weight[None, :] + bias[None, :]
        gate = tl.sigmoid(h)
        g = g * gate * (1 + h * (1 - gate))
    return z, g


@triton.jit
def backward_kernel(X, SHIFT, WEIGHT, BIAS, SEED, MEAN, SCALE, G, DX, SUMS, HW, C, B, shift_row, eps, dropped,
                    factor, SILU: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr,
                    P: tl.constexpr, WHOLE: tl.constexpr, DRAWN: tl.constexpr):
    """G, DX [B, HW, C], gradients of Y and X; SUMS float32 [3, B, C], of weight, bias and shift, by image."""
    DROPOUT: tl.constexpr = SEED is not None
    image, channel, there = _place(C, K, SIZE, GROUPS)
    X += image.to(tl.int64) * HW * C
    G += image.to(tl.int64) * HW * C
    DX += image.to(tl.int64) * HW * C
    pixel = tl.arange(0, P)
    shift = tl.zeros((K,), tl.float32)
    if SHIFT is not None:
        shift = tl.load(SHIFT + image * shift_row + channel, mask=there, other=0.0).to(tl.float32)
    group = image * (C // SIZE) + channel // SIZE
    mean = tl.load(MEAN + group, mask=there, other=0.0)
    scale = tl.load(SCALE + group, mask=there, other=0.0)
    weight = tl.load(WEIGHT + channel, mask=there, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + channel, mask=there, other=0.0).to(tl.float32)
    seed = tl.load(SEED) if DROPOUT else 0
    if WHOLE:
        z, g = _inner(X, G, shift, mean, scale, weight, bias, pixel, HW, channel, there, C, seed, dropped,
                      factor, K, SILU, DROPOUT, DRAWN)
        sum_z, sum_g, sum_gz = tl.sum(z, 0), tl.sum(g, 0), tl.sum(g * z, 0)
    else:
        sum_z = tl.zeros((K,), tl.float32)
        sum_g, sum_gz = sum_z, sum_z
        for first in range(0, HW, P):
            z, g = _inner(X, G, shift, mean, scale, weight, bias, first + pixel, HW, channel, there, C, seed,
                          dropped, factor, K, SILU, DROPOUT, DRAWN)
            sum_z += tl.sum(z, 0)
            sum_g += tl.sum(g, 0)
            sum_gz += tl.sum(g * z, 0)
    a = scale * weight
    constant = scale * _group(weight * sum_g, K, SIZE) / (HW * SIZE)
    slope = scale * _group(weight * sum_gz, K, SIZE) / (HW * SIZE)
    sums = SUMS + image * C + channel
    tl.store(sums, sum_gz, mask=there)
    tl.store(sums + B * C, sum_g, mask=there)
    if SHIFT is not None:
        tl.store(sums + 2 * B * C, a * sum_g - HW * constant - slope * sum_z, mask=there)
    if WHOLE:
        mask = (pixel < HW)[:, None] & there[None, :]
        dx = g * a[None, :] - constant[None, :] - z * slope[None, :]
        tl.store(DX + pixel[:, None] * C + channel[None, :], dx.to(DX.dtype.element_ty), mask=mask)
    else:
        for first in range(0, HW, P):
            z, g = _inner(X, G, shift, mean, scale, weight, bias, first + pixel, HW, channel, there, C, seed,
                          dropped, factor, K, SILU, DROPOUT, DRAWN)
            mask = (first + pixel < HW)[:, None] & there[None, :]
            dx = g * a[None, :] - constant[None, :] - z * slope[None, :]
            at = (first + pixel)[:, None] * C + channel[None, :]
            tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)


def norm(x, weight, bias, groups, eps, shift=None, silu=False, dropout=0.0):
    """`layers.norm` of float32 or bfloat16 x [B, C, H, W] on CUDA; in channels_last, as what it returns."""
    # the seed is drawn on the device, so that a CUDA graph replays with another
    seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropout else None
    return GroupNorm.apply(x, weight, bias, shift, seed, groups, eps, silu, dropout)


class GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, shift, seed, groups, eps, silu, dropout):
        mean, scale = torch.empty(2, len(x), groups, device=x.device)
        how = groups, eps, silu, dropout
        x = x.contiguous(memory_format=torch.channels_last)
        y = torch.empty_like(x)
        _launch(forward_kernel, x, weight, bias, shift, seed, mean, scale, y, how=how)
        ctx.save_for_backward(x, weight, bias, shift, seed, mean, scale)
        ctx.how = how
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, bias, shift, seed, mean, scale = ctx.saved_tensors
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
        dx, sums = torch.empty_like(x), torch.empty(3, *x.shape[:2], device=x.device)
        _launch(backward_kernel, x, weight, bias, shift, seed, mean, scale, g, dx, sums, how=ctx.how)
        dweight, dbias = sums[:2].sum(1)
        return dx, dweight, dbias, None if shift is None else sums[2].to(shift.dtype), *[None] * 5


def _launch(kernel, x, weight, bias, shift, *tensors, how):
    groups, eps, silu, dropout = how
    B, C, H, W = x.shape
    tile = tiling(H * W, C, groups, x.element_size(), kernel is backward_kernel)
    dropped = dropout_threshold(dropout)
    with torch.cuda.device(x.device if x.is_cuda else -1):  # triton launches on the current one
        kernel[(B * triton.cdiv(groups, tile["GROUPS"]),)](
            x, shift, weight, bias, *tensors, H * W, C, B, 0 if shift is None or len(shift) == 1 else C,
            eps, dropped, 2**16 / (2**16 - dropped), SILU=silu, **tile)
