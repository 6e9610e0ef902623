"""The control and the curve against counts written out, scipy, and what is known of the null hypothesis."""
import math

import numpy as np
import pytest
import torch
from scipy import stats

import data
from kernels.nearest import is_memorized
from measure import curve, neighbours
from search import wilson


def test_ratios():
    squares = torch.tensor([[1, 9, 25], [0, 0, 4], [0, 4, 16], [0, 0, 0]])
    assert curve.distance_ratio(squares).tolist() == pytest.approx([1 / 3, 1, 0, 1])
    assert curve.distance_ratio(squares, 3).tolist() == pytest.approx([1 / 3, 0, 0, 1])


def test_curve_counts_strictly_below():
    found = curve.curve([0.2, 0.25, 0.5, 1.0], [0.9, 0.9])
    at = dict(zip(found["thresholds"], zip(found["samples"], found["held_out"])))
    assert at[0.25] == (0.25, 0) and at[0.5] == (0.5, 0) and at[1.0] == (0.75, 1.0) and at[1 / 3] == (0.5, 0)
    assert len(at) == 121 and "held_out" not in curve.curve([0.5])


def test_band_is_massarts_and_holds_everywhere_at_once():
    assert curve.band(1000) == pytest.approx(math.sqrt(math.log(40) / 2000))
    draws = np.sort(np.random.RandomState(0).uniform(size=(2000, 50)), axis=1)
    steps = np.arange(51) / 50
    off = np.maximum(steps[1:] - draws, draws - steps[:-1]).max(1)  # Kolmogorov's statistic
    assert 0.95 <= (off <= curve.band(50)).mean() <= 0.98


def test_threshold_at_a_rate():
    ratios = list(np.random.RandomState(0).permutation(1000) / 1000)
    threshold, (low, high) = curve.threshold_at(0.01, ratios)
    assert threshold == 0.010 and sum(r < threshold for r in ratios) == 10
    # binomial of 1,000 at 1%: 2.5% and 97.5% at 4 and 17, so the 4th and the 18th smallest
    assert (low, high) == (0.003, 0.017)
    assert curve.threshold_at(0.01, [0.5, 0.7]) == (0.5, [0.0, 0.5])
    assert curve.threshold_at(0.01, [0.3] * 500)[0] == 0.3


def test_its_interval_holds_the_quantile():
    draws = np.random.RandomState(0).uniform(size=(2000, 400))
    intervals = [curve.threshold_at(0.01, row)[1] for row in draws]
    assert np.mean([low <= 0.01 <= high for low, high in intervals]) >= 0.95


def test_the_shares_interval_holds_for_the_noise_of_both():
    random, inside, width = np.random.RandomState(0), 0, []
    for _ in range(600):
        ratios = random.uniform(size=2000) ** 2
        share, (low, high) = curve.share_at(0.01, ratios, random.uniform(size=500))
        inside += low <= 0.01**0.5 <= high  # the share of squares below the true threshold, 0.01
        assert low <= share <= high
        width.append(high - low)
    assert inside / 600 >= 0.95 and np.mean(width) < 0.15
    # 300 of 1,000 samples under 0.5, where 99 of 100 held-out images lie: so few leave the lower end open
    ratios = np.repeat([0.4, 0.9], [300, 700])
    assert curve.share_at(0.01, ratios, np.array([0.3] + [0.5] * 99)) == (
        0.3, [0, pytest.approx(stats.binomtest(300, 1000).proportion_ci(0.975).high)])


def test_cells_of_huge_vectors_of_an_offset_and_of_mirrored_images(noise):
    random = np.random.RandomState(0)
    groups = random.randint(0, 4, 200)
    x = torch.from_numpy(100.0 * np.eye(4)[groups] + random.standard_normal((200, 4)))
    for factor, offset in ((1.0, 0.0), (1e300, 0.0), (1.0, 1e9)):  # float32 has neither 1e300 nor 1e9 + 1
        first, again = curve.cells(x[:100] * factor + offset, *[x * factor + offset] * 2)
        assert (first == again).all() and len(set(first)) > 4
        assert all(len(set(groups[first == c])) == 1 for c in set(first))
    images = torch.from_numpy(noise(300, 1, 8, 8))
    plain, flipped = curve.cells(images[:100], images, images.flip(-1))
    assert (plain != flipped).any()
    plain, flipped = curve.cells(images[:100], images, images.flip(-1), mirror=True)
    assert (plain == flipped).all() and len(set(plain)) == 10


@pytest.mark.parametrize("ties", [False, True])
def test_z_u_by_every_pair_and_by_scipy(ties):
    random = np.random.RandomState(0)
    a, b = random.normal(0.3, 1, 80), random.normal(0, 1, 130)
    if ties:
        a, b = a.round(), b.round()
    u = sum((x > y) + (x == y) / 2 for x in a for y in b)
    z = curve.z_u(a, b)
    assert z > 0 and curve.z_u(b, a) == pytest.approx(-z)
    if not ties:
        assert z == pytest.approx((u - 80 * 130 / 2) / math.sqrt(80 * 130 * 211 / 12))  # Meehan et al.
    p = stats.mannwhitneyu(a, b, use_continuity=False, method="asymptotic").pvalue
    assert 2 * stats.norm.sf(abs(z)) == pytest.approx(p)
    assert curve.z_u(np.ones(5), np.ones(7)) == 0


def test_c_t_weighs_cells_by_held_out_images():
    random = np.random.RandomState(0)
    a, b = random.normal(size=100), random.normal(size=90)
    a[:50] -= 3  # copying in the first cell alone
    cells_a, cells_b = np.repeat([0, 1], 50), np.repeat([0, 1, 2], 30)
    cells_a[95:] = 3  # too few to count, as is cell 2, which has no samples
    z = [curve.z_u(a[cells_a == c], b[cells_b == c]) for c in (0, 1)]
    assert curve.c_t(a, cells_a, b, cells_b) == (
        pytest.approx((30 * z[0] + 30 * z[1]) / 60), 2, pytest.approx(math.sqrt(0.5)))
    assert z[0] < -5 and abs(z[1]) < 3
    assert curve.c_t(a[:9], cells_a[:9], b, cells_b) == (None, 0, None)


def test_c_t_varies_by_chance_as_said():
    random, seen = np.random.RandomState(0), []
    for _ in range(200):
        a, b = random.normal(size=600), random.normal(size=600)
        found, _, deviation = curve.c_t(a, random.randint(0, 9, 600), b, random.randint(0, 9, 600))
        seen.append(found / deviation)
    assert abs(np.mean(seen)) < 0.25 and 0.85 < np.std(seen) < 1.15


def test_control_tells_copies_from_new_images():
    images = data.load(data.Options(data="digits")).images
    train, held_out, new = images[:300], images[300:1000], images[1000:]
    copies = train[torch.arange(600) % 300] ^ 1
    squares = {name: neighbours.compared(x, train)[0]
               for name, x in (("held_out", held_out), ("new", new), ("copies", copies))}
    found, held = {}, squares["held_out"]
    for name, x in (("new", new), ("copies", copies)):
        cells = curve.cells(train, x, held_out)
        found[name] = curve.control(squares[name], is_memorized(held), held, cells)
    assert found["copies"]["z_u"] < -20 and found["copies"]["c_t"] < -8
    new = found["new"]
    assert abs(new["z_u"]) < 4 and abs(new["c_t"]) < 6 * new["c_t_deviation"]  # other writers
    assert found["copies"]["samples_under_threshold"] == 1 > 0.05 > found["new"]["samples_under_threshold"]
    assert found["new"]["ratio"] == 0 and found["new"]["interval_95"] == list(wilson(0, 700))
    assert found["new"]["images"] == 700 and found["new"]["training_copies"] == 0


def test_real_photographs_in_halves(cifar10k):
    images = data.load(data.Options(data=cifar10k)).images
    train, held_out, new = images[:2000], images[2000:3000], images[3000:4000]
    a, b = (neighbours.compared(x, train)[0] for x in (new, held_out))
    found = curve.control(a, is_memorized(b), b, curve.cells(train, new, held_out))
    assert found["memorized"] == 0 and abs(found["z_u"]) < 3
    assert abs(found["c_t"]) < 3 * found["c_t_deviation"]
