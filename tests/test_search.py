import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

import search
from search import interval, log_mixture, verdict

SIMULATIONS = 2000


def falling(half, slope=4.0):
    """A ratio that falls with n, one half at n = half."""
    return lambda n: 1 / (1 + (n / half) ** slope)


def record(ratio, eps=0.1, whole=None, count=None):
    above = ratio >= 1 - eps
    ends = interval(round(ratio * count), count) if count else (ratio, ratio)
    return dict(above=above, ratio=ratio, interval=ends, whole=not above if whole is None else whole)


def run(ratio, *arguments, known=None, interpolate=True, **options):
    """Search to the end with a measure that is called once a size: the records and the sizes in order.

    Without `interpolate` it is told no ratio, and halves.
    """
    measured, order = dict(known or {}), []

    def told():
        return measured if interpolate else {n: dict(above=m["above"]) for n, m in measured.items()}
    while (n := search.next_size(told(), *arguments, **options)) is not None:
        assert n not in measured, "nothing is measured twice"
        order.append(n)
        measured[n] = record(ratio(n), options.get("eps", 0.1))
    return measured, order


def test_it_doubles_then_halves_or_follows_the_ratios():
    measured, order = run(falling(1850), 500, 50000, multiple=10, interpolate=False)
    assert order[:3] == [1000, 2000, 1410]
    followed, sizes = run(falling(1850), 500, 50000, multiple=10)
    assert sizes[:2] == order[:2] and len(sizes) < len(order)
    first = 2000 * math.exp((search.logit(falling(1850)(2000)) - search.logit(0.9)) / search.SLOPE) / 1.1**0.5
    assert first < 1100 == sizes[2], "EMM lies low in the bracket, as the ratios say: near its lower end"
    low, high = search.bracket(measured)
    assert low <= 1850 / 9 ** 0.25 <= high <= 1.1 * low


@settings(max_examples=150, deadline=None)
@given(half=st.floats(5, 1e5), slope=st.floats(0.5, 8), n_min=st.integers(2, 3000),
       n_max=st.integers(3000, 50000), eps=st.floats(0.02, 0.5), tolerance=st.floats(0.03, 1),
       multiple=st.sampled_from([1, 2, 10, 100]), interpolate=st.booleans())
def test_any_falling_curve_is_bracketed(half, slope, n_min, n_max, eps, tolerance, multiple, interpolate):
    ratio, n_max = falling(half, slope), max(n_min, n_max)
    measured, sizes = run(ratio, n_min, n_max, eps=eps, tolerance=tolerance, multiple=multiple,
                          interpolate=interpolate)
    assert sizes and all(n % multiple == 0 or n in (n_min, n_max) for n in sizes) and len(sizes) < 60
    assert n_min <= min(sizes) and max(sizes) <= n_max
    found = search.estimate(measured, eps, tolerance, multiple)
    low, high = found["bracket"]
    if low is not None and high is not None:
        assert ratio(low) >= 1 - eps > ratio(high) and low <= found["emm"] <= high
        # as narrow as asked, or as the multiple allows
        assert high <= low * (1 + tolerance) or high // multiple * multiple <= low + multiple
    else:
        assert found["emm"] is None and (low == n_max or high == n_min)
    assert not found["rises"]


def test_both_ends_of_the_range_end_with_a_statement():
    for interpolate in (True, False):
        never, sizes = run(lambda n: 0.2, 500, 5000, interpolate=interpolate)
        found = search.estimate(never)
        assert sizes[-1] == 500 and found["emm"] is None and found["bracket"] == [None, 500]
        assert found["statement"] == ("EMM is below 500: the ratio there is 20.0%, under 90%; "
                                      "train for longer, or lower --n-min")
        assert found["interval"] == [None, None]
        always, sizes = run(lambda n: 1.0, 500, 5000, interpolate=interpolate)
        found = search.estimate(always)
        assert sizes[-1] == 5000 and found["bracket"] == [5000, None]
        assert "at least 5000" in found["statement"]
        assert found["interval"][1] is None
    for measured, remedy in (({2: record(0.2)}, "under 90%; train for longer"),
                             ({8: record(0.2)}, "train for longer, or measure smaller sizes"),
                             ({8: record(1.0)}, "measure larger sizes")):
        assert search.estimate(measured, tolerance=None)["statement"].endswith(remedy)


def test_a_curve_that_rises_is_reported_and_the_largest_size_counts():
    measured = {n: record(r) for n, r in {100: 0.95, 200: 0.85, 140: 0.80, 170: 0.91}.items()}
    found = search.estimate(measured, tolerance=0.2)
    assert found["bracket"] == [170, 200] and found["rises"] == [[140, 170]]
    said = "not monotone: it rises from 140 to 170, and the largest size above 90% counts"
    assert said in found["statement"]
    assert search.next_size(measured, 100, 1000, tolerance=0.2) is None
    noise = {100: record(0.80, count=300), 200: record(0.82, count=300)}  # within their intervals: not a rise
    assert not search.estimate(noise)["rises"]
    below = search.estimate({100: record(0.2), 200: record(0.5)})  # at fixed epochs small sets get few steps
    assert below["bracket"] == [None, 100] and below["rises"] == [[100, 200]]
    assert "it rises from 100 to 200" in below["statement"] and "--steps-min" in below["statement"]


def test_the_target_is_a_whole_fraction():
    assert search.target(0.18) * 500 == 410 and search.target(1e-3) * 1000 == 999
    assert search.target(0.1) == search.target(1e-1)


def test_a_killed_search_goes_on_the_same():
    expected, sizes = run(falling(1850), 500, 50000, multiple=10)
    known = {}
    for n in sizes:  # killed after each
        assert search.next_size(known, 500, 50000, multiple=10) == n
        known[n] = expected[n]
    assert run(falling(1850), 500, 50000, multiple=10, known=known) == (expected, [])


def test_known_sizes_are_used():
    ratio = falling(1850)
    known = {n: record(ratio(n)) for n in (1000, 1200)}
    measured, order = run(ratio, 500, 50000, multiple=10, known=known)
    assert order and all(1000 <= n <= 1200 for n in order)


def test_lines_that_miss_end_in_halving():
    """A cliff from 100% to 5%, where every line through the ratios is wrong."""
    for emm in (520, 777, 990, 1900, 3333, 49_000):
        _, sizes = run(lambda n, emm=emm: 1.0 if n <= emm else 0.05, 500, 50_000, tolerance=0.02)
        halvings = math.log2(math.log(2) / math.log(1.02))
        assert len(sizes) <= math.ceil(math.log2(emm / 500)) + 2 + search.PATIENCE + halvings


def test_several_at_once_prepare_for_either_outcome():
    measured = {500: record(0.99), 4000: record(0.3)}
    options = dict(n_min=500, n_max=50000)
    sizes = search.next_sizes(measured, 3, **options)
    assert len(set(sizes)) == 3 and sizes[0] == search.next_size(measured, **options)
    above = search.next_size(measured | {sizes[0]: dict(above=True, whole=False)}, **options)
    below = search.next_size(measured | {sizes[0]: dict(above=False, whole=False)}, **options)
    assert sizes[1:] == [above, below]
    assert search.next_sizes(measured, 1, running=sizes[:1], **options) == [above]
    assert search.next_sizes({500: record(0.99), 540: record(0.5)}, 2, **options) == []


def test_interval_carries_the_samples():
    measured = {1000: record(0.92, whole=True, count=10000), 1100: record(0.88, count=10000)}
    found = search.estimate(measured)
    assert found["emm"] == pytest.approx(1050)
    assert 1000 < found["interval"][0] < 1050 < found["interval"][1] < 1100
    few = search.estimate({n: record(m["ratio"], whole=True, count=200) for n, m in measured.items()})
    assert few["interval"] == [None, None] and "below 1000 to above 1100" in few["statement"]
    early = search.estimate(measured | {1000: record(0.92, whole=False, count=10000)})  # it may reach 1
    assert early["interval"][0] == found["interval"][0] and early["interval"][1] > found["interval"][1]
    assert "between 1000 (at least 92.0%)" in early["statement"]


def test_a_tolerance_that_class_balance_forbids_is_said():
    measured, _ = run(falling(60), 10, 1000, tolerance=0.05, multiple=10)
    found = search.estimate(measured, tolerance=0.05, multiple=10)
    said = "no size in between is a multiple of 10, so the tolerance of 5% is not reached"
    assert said in found["statement"]


def trajectory(*points):
    """Snapshots (epoch, hits of 100), of 4 steps an epoch."""
    return [dict(epoch=epoch, step=4 * epoch, ratio=hits / 100, interval=search.wilson(hits, 100))
            for epoch, hits in points]


def test_onset_is_interpolated_on_a_logarithmic_axis():
    points = trajectory((10, 0), (100, 0), (1000, 40), (10_000, 80), (100_000, 30))
    found = search.onset(points, 0.1)
    assert found["epoch"] == pytest.approx(100 * 10 ** 0.25) and found["step"] == 4 * found["epoch"]
    half = search.onset(points, 0.6)
    assert half["epoch"] == pytest.approx(1000 * 10 ** 0.5)
    # the upper ends are 49% and 87%, the lower ones 31% and 71%
    (low, high), (highs, lows) = half["interval"], zip(*((p["interval"][1], p["interval"][0])
                                                         for p in points[2:4]))
    for end, (before, after) in ((low, highs), (high, lows)):
        assert end == pytest.approx(1000 * 10 ** ((0.6 - before) / (after - before)))
    assert low < half["epoch"] < high
    # 0 of 100 is under 3.7% alone: 1% may have been passed before the first snapshot
    assert search.onset(points, 0.01)["interval"][0] == 0 < search.onset(points, 0.01)["epoch"]
    assert search.onset(points, 0.9) == dict(epoch=None, step=None, interval=[None, None])
    assert search.onset(trajectory((10, 95)), 0.9) == dict(epoch=0, step=0, interval=[0, None])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=8), st.sampled_from(search.ONSETS))
def test_onset_lies_in_its_interval(hits, ratio):
    found = search.onset(trajectory(*((2**i, h) for i, h in enumerate(hits))), ratio)
    low, epoch, high = (math.inf if end is None else end
                        for end in (found["interval"][0], found["epoch"], found["interval"][1]))
    assert low <= epoch <= high


# ---- when samples are enough

@settings(max_examples=100, deadline=None)
@given(hits=st.integers(0, 300), misses=st.integers(0, 300), p=st.floats(0.01, 0.99))
def test_mixture_is_the_average_likelihood_ratio(hits, misses, p):
    count = hits + misses
    log_likelihood = hits * math.log(p) + misses * math.log1p(-p)
    log_average = -math.log(count + 1) - math.log(math.comb(count, hits))
    assert log_mixture(hits, count, p) == pytest.approx(log_average - log_likelihood, abs=1e-8)


def test_mixture_at_the_ends():
    assert log_mixture(0, 10, 0.0) == log_mixture(10, 10, 1.0) == pytest.approx(-math.log(11))
    assert log_mixture(1, 10, 0.0) == log_mixture(9, 10, 1.0) == math.inf


@settings(max_examples=100, deadline=None)
@given(hits=st.integers(0, 2000), misses=st.integers(0, 2000), alpha=st.floats(0.001, 0.3))
def test_interval_holds_what_is_not_excluded(hits, misses, alpha):
    count = hits + misses
    low, high = interval(hits, count, alpha)
    assert 0 <= low <= (hits / count if count else 0.5) <= high <= 1
    for p in np.linspace(0, 1, 41):
        if abs(p - low) > 1e-9 and abs(p - high) > 1e-9:
            assert (low < p < high) == (log_mixture(hits, count, p) < -math.log(alpha)) or p in (low, high)


def test_interval_is_wider_than_one_for_a_fixed_count_and_shrinks():
    low, high = interval(900, 1000)
    exact = stats.binomtest(900, 1000).proportion_ci(0.95)
    assert low < exact.low and exact.high < high and high - low < 2 * (exact.high - exact.low)
    wide = interval(90, 100)
    assert wide[0] < low and high < wide[1] and interval(0, 0) == (0.0, 1.0)


def test_verdict_agrees_with_the_interval():
    for hits in range(0, 201):
        low, high = interval(hits, 200, 0.01)
        assert verdict(hits, 200, 0.9, 0.01, 0.01) == (True if low >= 0.9 else False if high <= 0.9 else None)
    assert verdict(0, 0, 0.9) is None and verdict(64, 64, 0.9, 1e-9) is None and verdict(0, 64, 0.9)is False


@pytest.mark.parametrize("p", [0.5, 0.85, 0.89, 0.9, 0.91, 0.95, 1.0])
def test_errors_stay_under_alpha_however_often_one_looks(p):
    """Looks after every one of 3,000 samples, the greediest way to stop; at p itself both verdicts err."""
    alpha, target, n = 0.05, 0.9, 3000
    generator = np.random.default_rng(0)
    hits = (generator.random((SIMULATIONS, n)) < p).cumsum(1)
    count = np.arange(1, n + 1)
    log_beta = np.vectorize(math.lgamma)
    table = log_beta(np.arange(1, n + 3))  # lgamma(1), lgamma(2), ...
    log_likelihood = hits * math.log(target) + (count - hits) * math.log1p(-target)
    log_m = table[hits] + table[count - hits] - table[count + 1] - log_likelihood
    assert log_m[3, 500] == pytest.approx(log_mixture(int(hits[3, 500]), 501, target))
    decided = log_m >= -math.log(alpha)
    first = decided.argmax(1)
    above = decided.any(1) & (hits[np.arange(SIMULATIONS), first] > target * count[first])
    below = decided.any(1) & ~above
    if p <= target:
        assert above.mean() <= alpha
    if p >= target:
        assert below.mean() <= alpha
    if p in (0.5, 1.0):
        assert (above if p > target else below).all()  # and it does decide
