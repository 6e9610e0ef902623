"""The fused kernel: exact under Triton's interpreter (or on a GPU), sound as machine code for other GPUs.

The interpreter and the compiler cannot share a process: what launches the kernel runs in a second pytest with
TRITON_INTERPRET=1, which `test_under_the_interpreter` starts.
"""
import os

import pytest
import torch
from hypothesis import given, settings, strategies as st

from kernels.nearest import MAX_PIXELS, is_memorized, memorized, nearest_two_reference

pytest.importorskip("triton")
import bench.nearest
import interpreter
import kernels.nearest_triton
from kernels.nearest_triton import (
    INT32_TERMS,
    MAX_INT32_PIXELS,
    REACH,
    TILES,
    best_splits,
    group_bits,
    nearest_two_cuda,
    prepared,
    tiles,
)

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
# The interpreter takes as long for a tile of any size
SMALL = dict(BQ=16, BN=32, BK=32, num_warps=4, num_stages=2)
launches = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs a GPU or TRITON_INTERPRET=1")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
if INTERPRETED:
    interpreter.mend()


def images(rows, D, low=0, high=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (rows, D), dtype=torch.uint8, generator=generator)


def check(x, y, threshold=(1, 3), tile=SMALL, splits=1):
    D = x.shape[1]
    if D > 1024:  # few steps, and no padding where there is none on a GPU
        tile = dict(tile, BK=min(4096, D & -D) if D % 128 == 0 else 1024)
    found = nearest_two_cuda(x.to(DEVICE), prepared(y.to(DEVICE), tile), threshold, splits)
    verdict, distances, index = (t.cpu() for t in found)
    expected, expected_index = nearest_two_reference(x, y)
    assert torch.equal(distances, expected) and torch.equal(index, expected_index)
    assert torch.equal(verdict, is_memorized(expected, threshold))


@pytest.mark.skipif(GPU or INTERPRETED, reason="this is the second process, or a GPU runs them here")
def test_under_the_interpreter():
    interpreter.check_tests(__file__)


@launches
@pytest.mark.parametrize("Q, N, D", [(1, 2, 64), (1, 3, 192), (5, 127, 192), (33, 127, 64), (3, 1000, 64),
                                     (17, 100, 768), (2, 40, 3072), (2, 33, 12288),
                                     (1, 2, MAX_INT32_PIXELS), (2, 33, 49152)])
@pytest.mark.parametrize("splits", [1, 3])
def test_exact(Q, N, D, splits):
    check(images(Q, D), images(N, D, seed=1), splits=splits)


@launches
def test_in_the_tile_of_a_gpu():
    check(images(130, 100), images(300, 100, seed=1), tile=tiles(90), splits=2)


@launches
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_ties_duplicates_and_twins(splits):
    y = images(160, 48, 0, 2)              # few values: many equal distances
    y[37], y[150] = y[5], y[5]             # exact duplicates in other tiles and splits
    y[64] = y[63]                          # and in neighbouring ones
    twin = y[90].clone()
    twin[7] ^= 255
    y[91] = twin
    x = torch.cat([y[[5, 63, 90, 91]], images(12, 48, 0, 2, seed=1)])
    check(x, y, splits=splits)
    check(x, y[:1].repeat(50, 1), splits=splits)  # all references equal


@launches
@pytest.mark.parametrize("D", [64, 3072, 12288, MAX_INT32_PIXELS, MAX_INT32_PIXELS + 1, 147456])
def test_extreme_images_do_not_overflow(D):
    black, white = torch.zeros(1, D, dtype=torch.uint8), torch.full((1, D), 255, dtype=torch.uint8)
    grey = torch.full((1, D), 128, dtype=torch.uint8)
    every = torch.cat([black, white, grey, images(1, D)])
    for y in (torch.cat([white, white]), torch.cat([black, white, grey]), torch.cat([white] * 33 + [black])):
        check(every, y, splits=1)


@launches
def test_verdict_of_other_thresholds():
    y = images(40, 64)
    x = (y[:20] ^ (images(20, 64, seed=3) & 15 * (torch.arange(20) % 3 > 0).to(torch.uint8)[:, None]))
    for threshold in ((1, 2), (2, 5), (9, 10)):
        check(x, y, threshold, splits=2)


@launches
@settings(max_examples=20, deadline=None)
@given(Q=st.integers(0, 20), N=st.integers(2, 90), D=st.integers(1, 100), splits=st.integers(1, 4),
       high=st.sampled_from([2, 5, 256]), int64=st.booleans(), seed=st.integers(0, 2**16))
def test_any_shape(Q, N, D, splits, high, int64, seed):
    with pytest.MonkeyPatch.context() as patch:
        if int64:  # the form of large images, its sums in parts
            patch.setattr(kernels.nearest_triton, "MAX_INT32_PIXELS", 0)
            patch.setattr(kernels.nearest_triton, "INT32_TERMS", 64)
        check(images(Q, D, 0, high, seed), images(N, D, 0, high, seed + 1), splits=splits)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("Q, N, D", [(10_000, 5000, 3072), (1000, 50_000, 192), (1, 2, 12288),
                                     (300, 2000, 12288), (100, 1000, 49152), (20, 300, 196608)])
def test_on_this_gpu(Q, N, D):
    x, y = images(Q, D).cuda(), images(N, D, seed=1).cuda()
    verdict, distances, index = memorized(x, y)
    assert bench.nearest.launches(lambda: memorized(x, y)) <= 5
    expected, expected_index = nearest_two_reference(x, y)
    assert torch.equal(distances, expected) and torch.equal(index, expected_index)
    assert torch.equal(verdict, is_memorized(expected))


@pytest.mark.parametrize("BN", [32, 128, 256])
def test_no_score_overflows_with_its_group(BN):
    for D in (1, 64, 192, 768, 3072, 4112, 4113, 12288, 16448, 16449,
              MAX_INT32_PIXELS, MAX_INT32_PIXELS + 128, MAX_PIXELS):
        bits, largest = group_bits(D, BN), 2**31 - 1 if D <= MAX_INT32_PIXELS else 2**63 - 1
        assert bits >= 1 and 2**bits <= BN
        # the largest score in its group, and the padding above it, which sorts last after the shift too
        assert REACH * D * 2**bits + 2**bits - 1 < largest and REACH * D < largest >> bits
    assert 2**14 * INT32_TERMS < 2**31


def test_splits_fill_the_last_wave():
    assert best_splits(79, 196, 132) == 10  # 790 blocks in 6 waves of 20 tiles; one split would take 196
    assert best_splits(1, 1, 132) == 1 and best_splits(1000, 3, 108) in (1, 2, 3)
    assert best_splits(0, 5, 132) in range(1, 6)
    assert tiles(89) == TILES[86] and tiles(103) == tiles(121) == TILES[100]
    assert tiles(90, MAX_INT32_PIXELS) == TILES[90] and tiles(90, MAX_INT32_PIXELS + 1)["BQ"] == 128


@compiles
@pytest.mark.parametrize("D", [64, 192, 768, 3072, 49152, 196608])
@pytest.mark.parametrize("capability, instruction", [(80, "IMMA"), (86, "IMMA"), (89, "IMMA"), (90, "IGMMA"),
                                                     (100, "UTCIMMA"), (120, "IMMA")])
def test_machine_code(capability, instruction, D):
    from bench.aot import SHARED_BYTES, compile_nearest, compile_product
    report = compile_nearest(capability, D)
    assert report.spills == 0 and report.stack_bytes == 0
    assert report.shared_bytes <= SHARED_BYTES[capability]
    known = {op.split(".")[0] for op in compile_product(capability).tensor_core}
    if known != {instruction}:
        pytest.skip(f"this Triton multiplies int8 by {known or 'no tensor core'} on sm_{capability}")
    assert {op.split(".")[0] for op in report.tensor_core} == {instruction}


@compiles
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("D", [192, 3072, 196608])
def test_machine_code_before_and_after(capability, D):
    from bench.aot import compile_merge, compile_prepare
    for report in (compile_prepare(capability, D), compile_merge(capability, D)):
        assert report.spills == 0 and report.stack_bytes == 0
        assert report.fills <= {"0"}  # of others, as of int8 below zero, Triton fills only the last byte
