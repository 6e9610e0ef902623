"""The fused kernel: exact under Triton's interpreter (or on a GPU, if there is one), sound as machine code for others.

The interpreter and the compiler cannot share a process: what launches the kernel runs in a second pytest with
TRITON_INTERPRET=1, which `test_under_the_interpreter` starts.
"""
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

from conftest import ROOT
from kernels.nearest import MAX_CUDA_PIXELS, is_memorized, memorized, nearest_two_reference

pytest.importorskip("triton")
import interpreter  # noqa: E402
from kernels.nearest_triton import LARGEST, REACH, TILES, best_splits, group_bits, nearest_two_cuda, tiles  # noqa: E402

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
SMALL = dict(BQ=16, BN=32, BK=32, num_warps=4, num_stages=2)  # the interpreter takes as long for a tile of any size
launches = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs a GPU or TRITON_INTERPRET=1")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
if INTERPRETED:
    interpreter.mend()
UNROLLED_SPILLS = 16  # a thread, once a tile: an older ptxas, where the loop over few pixels has been unrolled


def images(rows, D, low=0, high=256, seed=0):
    return torch.randint(low, high, (rows, D), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def check(x, y, threshold=(1, 3), tile=SMALL, splits=1):
    if x.shape[1] > 1024:
        tile = dict(tile, BK=1024)
    how = dict(tile=tile, splits=splits)
    verdict, distances, index = (t.cpu() for t in nearest_two_cuda(x.to(DEVICE), y.to(DEVICE), threshold, **how))
    expected, expected_index = nearest_two_reference(x, y)
    assert torch.equal(distances, expected) and torch.equal(index, expected_index)
    assert torch.equal(verdict, is_memorized(expected, threshold))


@pytest.mark.skipif(GPU or INTERPRETED, reason="this is the second process, or a GPU runs them here")
def test_under_the_interpreter():
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compiles", __file__],
                          cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " 0 passed" not in done.stdout and "passed" in done.stdout


@launches
@pytest.mark.parametrize("Q, N, D", [(1, 2, 64), (1, 3, 192), (5, 127, 192), (33, 127, 64), (3, 1000, 64), (17, 100, 768),
                                     (2, 40, 3072), (2, 33, 12288), (1, 2, MAX_CUDA_PIXELS)])
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
@pytest.mark.parametrize("D", [64, 3072, 12288, MAX_CUDA_PIXELS])
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
@given(Q=st.integers(1, 20), N=st.integers(2, 90), D=st.integers(1, 100), splits=st.integers(1, 4),
       high=st.sampled_from([2, 5, 256]), seed=st.integers(0, 2**16))
def test_any_shape(Q, N, D, splits, high, seed):
    check(images(Q, D, 0, high, seed), images(N, D, 0, high, seed + 1), splits=splits)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("Q, N, D", [(10_000, 5000, 3072), (1000, 50_000, 192), (1, 2, 12288), (300, 2000, 12288)])
def test_on_this_gpu(Q, N, D):
    x, y = images(Q, D).cuda(), images(N, D, seed=1).cuda()
    verdict, distances, index = memorized(x, y)
    expected, expected_index = nearest_two_reference(x, y)
    assert torch.equal(distances, expected) and torch.equal(index, expected_index)
    assert torch.equal(verdict, is_memorized(expected))


@pytest.mark.parametrize("BN", [32, 128, 256])
def test_no_score_overflows_with_its_group(BN):
    for D in (1, 64, 192, 768, 3072, 4112, 4113, 12288, 16448, 16449, MAX_CUDA_PIXELS + 127):
        bits = group_bits(D, BN)
        assert bits >= 0 and 2**bits <= BN
        # the largest score in its group, and the padding above it, which sorts behind every score after the shift too
        assert REACH * D * 2**bits + 2**bits - 1 < LARGEST and REACH * D < LARGEST >> bits


def test_splits_fill_the_last_wave():
    assert best_splits(79, 196, 132) == 5   # 395 blocks in 3 waves of 40 tiles; one split would take 196 tiles
    assert best_splits(1, 1, 132) == 1 and best_splits(1000, 3, 108) in (1, 2, 3)
    assert tiles(89) == TILES[86] and tiles(103) == TILES[90] and tiles(121) == TILES[120]


@compiles
@pytest.mark.parametrize("D", [64, 192, 768, 3072, 12288])
@pytest.mark.parametrize("capability, instruction", [(80, "IMMA"), (86, "IMMA"), (89, "IMMA"), (90, "IGMMA"),
                                                     (100, "UTCIMMA"), (120, "IMMA")])
def test_machine_code(capability, instruction, D):
    from kernels.aot import SHARED_BYTES, compile_nearest, compile_product
    known = {op.split(".")[0] for op in compile_product(capability).tensor_core}
    if known != {instruction}:
        pytest.skip(f"this Triton multiplies int8 by {known or 'no tensor core'} on sm_{capability}, and not by {instruction}")
    report, tile = compile_nearest(capability, D), tiles(capability)
    if D <= tile["BK"] * tile["num_stages"]:
        assert report.spills <= UNROLLED_SPILLS
    else:
        assert report.spills == 0 and report.stack_bytes == 0
    assert {op.split(".")[0] for op in report.tensor_core} == {instruction}
    assert report.shared_bytes <= SHARED_BYTES[capability]


@compiles
@pytest.mark.parametrize("capability", [80, 90])
def test_arguments_of_one_are_compiled_in(capability):
    """Triton makes integers equal to 1 constants: one query, one split, a threshold of 1/q."""
    from kernels.aot import compile_merge, compile_nearest
    ones = dict(Q=1, tiles_a_split=1, splits=1)
    assert compile_nearest(capability, 192, ones=ones).spills == 0
    assert compile_merge(capability, 192, ones=dict(Q=1, splits=1, p2=1)).spills == 0


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("D", [3072, 12288, MAX_CUDA_PIXELS])
def test_machine_code_of_the_merge(capability, D):
    from kernels.aot import compile_merge
    report = compile_merge(capability, D)
    assert report.spills == 0 and report.stack_bytes == 0
