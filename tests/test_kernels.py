import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import bench.nearest
import kernels.nearest
import kernels.nearest_cpu
from conftest import ROOT
from kernels import References, memorized, nearest_two
from kernels.nearest import nearest_two_reference


def brute_force(queries, references):
    """Distances and indices by whole-number subtraction and a stable sort."""
    x, y = (t.flatten(1).numpy().astype(np.int64) for t in (queries, references))
    d = ((x[:, None] - y[None]) ** 2).sum(2)
    order = d.argsort(1, kind="stable")[:, :2]
    return torch.from_numpy(np.take_along_axis(d, order, 1)), torch.from_numpy(order)


def check(queries, references):
    d, i = nearest_two(queries, references)
    expected_d, expected_i = brute_force(queries, references)
    assert d.dtype == i.dtype == torch.int64
    assert torch.equal(d, expected_d) and torch.equal(i, expected_i)


@pytest.mark.parametrize("Q, N, shape", [(1, 2, (64,)), (5, 3, (1, 8, 8)),
                                         (17, 127, (3, 8, 8)), (9, 1000, (3, 16, 16)),
                                         (3, 50, (3, 32, 32)), (2, 5, (3, 64, 64))])
def test_random_images(noise, Q, N, shape):
    check(torch.from_numpy(noise(Q, *shape)), torch.from_numpy(noise(N, *shape, seed=1)))


def test_ties_duplicates_twins_and_extremes(noise):
    y = torch.from_numpy(noise(40, 3072))
    y[7] = y[3]                      # an exact duplicate
    y[20] = y[5]
    y[20, 100] ^= 1                  # a one-pixel twin
    y[30:34] = 0
    y[34:36] = 255
    x = torch.cat([y[[3, 7, 5, 20, 30, 34]],
                   torch.tensor([0, 255, 128], dtype=torch.uint8)[:, None].expand(3, 3072)])
    check(x, y)
    d, i = nearest_two(x, y)
    assert i[0].tolist() == i[1].tolist() == [3, 7] and d[2].tolist() == [0, 1] and i[4].tolist() == [30, 31]


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 128, 128)])
def test_references_prepared_once(noise, shape):
    y = torch.from_numpy(noise(300, *shape))
    references, chunks = References(y), [torch.from_numpy(noise(n, *shape, seed=n)) for n in (1, 5, 17)]
    whole = torch.cat(chunks)
    once, expected = nearest_two(whole, y), nearest_two(whole, references)
    assert torch.equal(once[0], expected[0]) and torch.equal(once[1], expected[1])
    parts = [memorized(chunk, references, (9, 10)) for chunk in chunks]
    for part, all_at_once in zip(zip(*parts), memorized(whole, y, (9, 10))):
        assert torch.equal(torch.cat(part), all_at_once)
    assert nearest_two(whole[:0], references)[0].shape == (0, 2)
    with pytest.raises(ValueError, match="cannot be compared"):
        nearest_two(whole.flatten(1), references)
    with pytest.raises(ValueError, match="uint8"):
        nearest_two(whole.float(), references)


def test_verdicts_that_hang_on_one_unit(noise):
    """The benchmark's hard set: squared distances a and 9 a - 1, 9 a or 9 a + 1; only the last is a copy."""
    x, y = bench.nearest.near_ties(torch.from_numpy(noise(600, 3072)))
    verdict, distances, index = memorized(x, y)
    a, more = 1 + torch.arange(256) % 340, torch.arange(256) % 3 - 1
    assert torch.equal(distances, torch.stack([a, 9 * a + more], 1))
    assert torch.equal(index, 344 + torch.stack([torch.arange(256), torch.arange(256) + 256], 1))
    assert torch.equal(verdict, more == 1)
    assert bench.nearest.wrong(nearest_two, torch.from_numpy(noise(600, 3072)), "cpu") == 0


@settings(max_examples=60, deadline=None)
@given(Q=st.integers(1, 20), N=st.integers(2, 60), D=st.integers(1, 40),
       levels=st.sampled_from([1, 2, 4, 256]), seed=st.integers(0, 99))
def test_any_shape_over_several_blocks(Q, N, D, levels, seed):
    rs = np.random.RandomState(seed)
    x, y = (torch.from_numpy(rs.randint(0, levels, (n, D)).astype(np.uint8)) for n in (Q, N))
    expected = brute_force(x, y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.nearest, "BLOCK_BYTES", 8 * 7 * D)
        patch.setattr(kernels.nearest_cpu, "REFERENCES_A_BLOCK", 7)
        patch.setattr(kernels.nearest_cpu, "QUERIES_A_BLOCK", 3)
        found = [nearest_two(x, y), nearest_two(x, References(y)), nearest_two_reference(x, y)]
    for distances, index in found:
        assert torch.equal(distances, expected[0]) and torch.equal(index, expected[1])


@pytest.mark.parametrize("D", [kernels.nearest.MAX_INT8_PIXELS, kernels.nearest.MAX_INT8_PIXELS + 1,
                               3 * 512 * 512])
def test_largest_distances_are_exact(D):
    x = torch.tensor([[0], [255], [128]], dtype=torch.uint8).expand(3, D)
    y = torch.tensor([[255], [0], [255], [127]], dtype=torch.uint8).expand(4, D)
    d, i = nearest_two(x, y)
    assert d.tolist() == [[0, D * 127**2], [0, 0], [D, D * 127**2]] and i.tolist() == [[1, 3], [0, 2], [3, 0]]


def test_too_large_images_are_refused():
    x = torch.zeros(1, dtype=torch.uint8).expand(2, kernels.nearest.MAX_PIXELS + 1)
    with pytest.raises(ValueError, match="at most"):
        nearest_two(x, x)


def test_the_fallback_of_a_cpu_without_vnni(monkeypatch):
    """oneDNN held to AVX2 saturates int8 products silently: the probe notices, and the result stays exact."""
    code = """if True:
        import torch
        from kernels import nearest_two
        from kernels.nearest import nearest_two_reference
        from kernels.nearest_cpu import int8_products_are_exact
        generator = torch.Generator().manual_seed(1)
        x, y = (torch.randint(0, 256, (n, 3072), dtype=torch.uint8, generator=generator) for n in (50, 300))
        assert all(torch.equal(a, b) for a, b in zip(nearest_two(x, y), nearest_two_reference(x, y)))
        print(int8_products_are_exact(3072))"""
    for isa in ("AVX2", "DEFAULT"):
        found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                               env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa})
        assert found.returncode == 0, found.stderr
    monkeypatch.setattr(kernels.nearest_cpu, "int8_products_are_exact", lambda D: False)

    def noise(*shape, seed=0):
        return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)
    test_random_images(noise, 9, 1000, (3, 16, 16))


@pytest.mark.parametrize("x, y, words", [
    (torch.zeros(1, 4), torch.zeros(2, 4), "uint8"),
    (torch.zeros(1, 4, dtype=torch.uint8), torch.zeros(1, 4, dtype=torch.uint8), "at least 2"),
    (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
     "cannot be compared")])
def test_what_cannot_be_compared(x, y, words):
    with pytest.raises(ValueError, match=words):
        nearest_two(x, y)
