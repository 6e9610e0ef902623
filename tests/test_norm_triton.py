"""The fused norm for CUDA: right under Triton's interpreter (or on a GPU), sound as machine code for others.

As in test_nearest_triton.py, what launches the kernels runs in a second pytest with TRITON_INTERPRET=1.
"""
import os

import pytest
import torch

import unet
from diffusion import denoiser
from kernels import layers

pytest.importorskip("triton")
import interpreter
from kernels.norm_triton import WHOLE, GroupNorm, norm, tiling
from kernels.plain import dropout_threshold

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
EPS = 1e-3
NEAR = {torch.float32: 1e-5,    # float32 sums over a group, of the largest value
        torch.bfloat16: 8e-3}   # 8 bits of mantissa in what is stored, 2^-7 a unit, and float32 inside
# 512 threads have 128 registers each: with 71 spills they were faster on an H100 than tiles without any
SPILLS = 90
launches = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs a GPU or TRITON_INTERPRET=1")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
if INTERPRETED:
    interpreter.mend()


def draw(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def near(a, b, tolerance=None):
    return float((a - b).abs().max()) <= (tolerance or NEAR[a.dtype]) * max(1.0, float(b.abs().max()))


def groups(C):
    return min(32, C // 4)


def mask_of(x, seed, how):
    """Dropout's factors for x, as drawn from `seed`: a norm that is 1 everywhere, in the same kernel."""
    groups, eps, _, dropout = how
    one = torch.ones(x.shape[1], device=x.device)
    kept = GroupNorm.apply(x.detach(), 0 * one, one, None, seed, groups, eps, False, dropout) > 0
    return kept * (2**16 / (2**16 - dropout_threshold(dropout)))


def check(B, C, H, W, dtype=torch.float32, shifted=None, silu=True, dropout=0.0, mean=0.0, tolerance=None):
    """The kernels' value and gradients beside the plain form's in float64, under the mask that they drew."""
    inputs = [draw(B, C, H, W, dtype=dtype) + mean, 1 + 0.3 * draw(C, seed=1), 0.3 * draw(C, seed=2)]
    inputs += [draw(shifted, C, seed=3, dtype=dtype)] if shifted else [None]
    g = draw(B, C, H, W, seed=4, dtype=dtype)
    seed = torch.tensor([2**40 + 5], device=DEVICE) if dropout else None
    how = groups(C), EPS, silu, dropout
    mask = mask_of(inputs[0], seed, how).double() if dropout else None

    def plain(x, weight, bias, shift):
        y = layers.plain_norm(x, weight, bias, groups(C), EPS, shift, silu)
        return y if mask is None else mask * y
    found = []
    for kind, function in ((None, lambda *inputs: GroupNorm.apply(*inputs, seed, *how)),
                           (torch.float64, plain)):
        given = [t if t is None else t.detach().to(kind or t.dtype).requires_grad_() for t in inputs]
        y = function(*given)
        found.append([y, *torch.autograd.grad(y, [t for t in given if t is not None], g.to(y.dtype))])
    assert all(near(a.detach(), b.detach(), tolerance) for a, b in zip(*found))
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(GPU or INTERPRETED, reason="this is the second process, or a GPU runs them here")
def test_under_the_interpreter():
    interpreter.check_tests(__file__)


@launches
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("B, C, H, W", [
    (2, 4, 1, 1), (3, 8, 2, 2), (1, 16, 3, 5), (2, 96, 4, 4), (2, 128, 8, 8), (2, 160, 2, 2), (1, 192, 4, 4),
    (1, 320, 3, 3), (1, 1024, 2, 1), (1, 12, 32, 32), (2, 20, 40, 30), (1, 128, 17, 31)])
def test_right_at_any_shape(B, C, H, W, dtype):
    check(B, C, H, W, dtype, shifted=B)


@launches
@pytest.mark.parametrize("shifted", [None, 1, 3])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.13])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_right_with_and_without_its_parts(shifted, silu, dropout, dtype):
    check(3, 24, 5, 3, dtype, shifted, silu, dropout)
    if shifted == 3:
        check(3, 24, 23, 23, dtype, shifted, silu, dropout)  # in tiles


@launches
@pytest.mark.parametrize("H", [8, 23])  # whole, and in tiles
def test_a_large_mean_costs_no_precision(H):
    # float32 numbers lie 6e-5 apart; squares would be 0.1 off
    check(1, 16, H, H, mean=1000.0, tolerance=1e-3)


@launches
@pytest.mark.parametrize("H", [8, 23])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_dropout_has_its_rate_and_its_seed(H, dtype):
    x, p = draw(2, 32, H, H, dtype=dtype), 0.13
    masks = [mask_of(x, torch.tensor([seed], device=DEVICE), (8, EPS, True, p)) for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert masks[0].unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-4)  # p rounded to 1 / 65,536
    count = masks[0].numel()
    same = (masks[0] == masks[2]).float().mean()  # of two independent masks
    kept = [((masks[0][:, i::step] > 0).float().mean(), 1 - p, count / step)
            for step in (1, 8) for i in range(step)]
    for share, expected, n in (*kept, (same, p**2 + (1 - p)**2, count)):
        assert abs(share - expected) < 5 * (expected * (1 - expected) / n) ** 0.5
    first, second = masks[0][:, :, :-1], masks[0][:, :, 1:]  # neighbours, too
    assert abs((first == second).float().mean() - (p**2 + (1 - p)**2)) < 5 * (0.18 / first.numel()) ** 0.5


@launches
def test_the_seed_comes_from_torchs_generator():
    x, one = draw(2, 16, 4, 4), torch.ones(16, device=DEVICE)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(norm(x, one, one, 4, EPS, dropout=0.5))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@launches
def test_a_network_of_these_norms(monkeypatch):
    """A U-Net beside the same one of plain norms: values, every gradient, and dropout by torch's seed."""
    found, x = [], draw(2, 3, 8, 8)
    for fused in (True, False):
        monkeypatch.setattr(layers, "runs_triton", lambda device, right, fused=fused: fused)
        D = denoiser.Denoiser("ddpmpp", "edm", 8, 3, width=16, blocks=1, channel_mult=(1, 2), dropout=0.0,
                          generator=torch.Generator().manual_seed(0)).to(DEVICE).use("fp32")
        with torch.no_grad():
            for p in D.parameters():
                p.add_(0.1 * draw(*p.shape))
        y = D(x, 1.0)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in D.parameters())])
    assert all(float((a - b).abs().max()) <= 1e-4 * float(b.abs().max()) for a, b in zip(*found))
    monkeypatch.setattr(layers, "runs_triton", lambda device, right: True)
    for block in D.modules():
        if isinstance(block, unet.Block):
            block.dropout = 0.5
    drawn = [(torch.manual_seed(seed), D(x, 1.0).detach())[1] for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(D.eval()(x, 1.0).detach(), D(x, 1.0).detach())


def test_tiles():
    for HW, C in ((1, 4), (4, 1024), (64, 128), (256, 256), (1024, 512), (4096, 20), (1000, 320)):
        for bytes in (2, 4):
            there, back = (tiling(HW, C, groups(C), bytes, back) for back in (False, True))
            for t in (there, back):
                assert t["SIZE"] * groups(C) == C and t["SIZE"] * t["GROUPS"] <= t["K"]
                assert t["P"] * t["K"] <= WHOLE
                assert t["WHOLE"] == (t["P"] >= HW) and t["K"] % t["DRAWN"] == 0
            assert all(there[key] == back[key] for key in ("SIZE", "GROUPS", "K", "DRAWN"))  # the same mask


@compiles
@pytest.mark.parametrize("capability, HW, C",
                         [(90, 256, 256), *((c, 1024, 384) for c in (80, 86, 89, 90, 100, 120))])
@pytest.mark.parametrize("element", ["fp32", "bf16"])
def test_machine_code(capability, HW, C, element):  # whole, and in tiles
    from bench.aot import compile_norm
    for back in (False, True):
        report = compile_norm(capability, HW, C, element, back)
        assert report.spills <= (SPILLS if report.registers == 128 else 0) and report.shared_bytes <= 2**14
