import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import search
from sequential import interval


def falling(half, slope=4.0):
    """A ratio that falls with n, one half at n = half."""
    return lambda n: 1 / (1 + (n / half) ** slope)


def record(ratio, eps=0.1, whole=None, count=None):
    above = ratio >= 1 - eps
    ends = interval(round(ratio * count), count) if count else (ratio, ratio)
    return dict(above=above, ratio=ratio, interval=ends, whole=not above if whole is None else whole)


def run(ratio, *arguments, known=None, **options):
    """Search to the end with a measure that is called once a size: the records and the sizes in order."""
    measured, order = dict(known or {}), []
    while True:
        n, cost = search.next_size(measured, *arguments, **options)
        if n is None:
            return measured, order
        assert n not in measured and cost > 0, "nothing is measured twice"
        order.append(n)
        measured[n] = record(ratio(n), options.get("eps", 0.1))


def test_bisect_doubles_then_halves():
    measured, order = run(falling(1850), 500, 50000, multiple=10, order="bisect")
    assert order[:4] == [500, 1000, 2000, 1410]
    low, high = search.bracket(measured)
    assert low <= 1850 / 9 ** 0.25 <= high <= 1.1 * low


@settings(max_examples=150, deadline=None)
@given(half=st.floats(5, 1e5), slope=st.floats(0.5, 8), n_min=st.integers(2, 3000), n_max=st.integers(3000, 50000),
       eps=st.floats(0.02, 0.5), tolerance=st.floats(0.03, 1), multiple=st.sampled_from([1, 2, 10, 100]),
       order=st.sampled_from(["cost", "bisect"]))
def test_any_falling_curve_is_bracketed(half, slope, n_min, n_max, eps, tolerance, multiple, order):
    ratio, n_max = falling(half, slope), max(n_min, n_max)
    measured, sizes = run(ratio, n_min, n_max, eps=eps, tolerance=tolerance, multiple=multiple, order=order)
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
    assert found["monotone"]


def test_both_ends_of_the_range_end_with_a_statement():
    for order in ("cost", "bisect"):
        never, sizes = run(lambda n: 0.2, 500, 5000, order=order)
        found = search.estimate(never)
        assert sizes[-1] == 500 and found["emm"] is None and found["bracket"] == [None, 500]
        assert "EMM is below 500: the ratio there is 20.0%" in found["statement"] and found["interval"] == [None, None]
        always, sizes = run(lambda n: 1.0, 500, 5000, order=order)
        found = search.estimate(always)
        assert sizes[-1] == 5000 and found["bracket"] == [5000, None] and "at least 5000" in found["statement"]
        assert found["interval"][1] is None


def test_a_curve_that_rises_is_reported_and_the_largest_size_counts():
    measured = {n: record(r) for n, r in {100: 0.95, 200: 0.85, 140: 0.80, 170: 0.91}.items()}
    found = search.estimate(measured, tolerance=0.2)
    assert found["bracket"] == [170, 200] and not found["monotone"] and found["rises"] == [[140, 170]]
    assert "not monotone: it rises from 140 to 170, and the largest size above 90% counts" in found["statement"]
    assert search.next_size(measured, 100, 1000, tolerance=0.2) == (None, 0.0)
    noise = {100: record(0.80, count=300), 200: record(0.82, count=300)}  # within their intervals: not a rise
    assert search.estimate(noise)["monotone"]


def test_a_ratio_that_rises_from_below_is_followed_upwards():
    """Photographs of 8x8 pixels at a fixed number of epochs: 50 images 40%, 60 67%, 90 84%; EMM lies further up."""
    for order in ("cost", "bisect"):
        known = {n: record(r, count=1000) for n, r in {50: 0.40, 60: 0.67, 90: 0.84}.items()}
        for top in (180, 360):
            n, cost = search.next_size(known, 20, 2000, order=order)
            assert n == top and cost == n
            assert search.next_sizes(known, 1, n_min=20, n_max=2000, order=order)[0] == [top]
            known[n] = record(0.84 + n / 9000, count=1000)
        assert "no ratio reaches 90%, and it rises with |D|, to 88.0% at 360" in search.estimate(known)["statement"]
        reached = known | {720: record(0.95, count=1000), 1440: record(0.5, count=1000)}
        assert 720 < search.next_size(reached, 20, 2000, order=order)[0] < 1440  # an ordinary search again
    fell = {50: record(0.4, count=1000), 100: record(0.8, count=1000), 200: record(0.3, count=1000)}
    assert search.next_size(fell, 20, 2000) == (None, 0.0)
    assert "--steps-min" in search.estimate(fell)["statement"]


def test_the_target_is_a_whole_fraction():
    assert search.target(0.18) * 500 == 410 and search.target(0.1) == search.target(1e-1) and search.target(1e-3) * 1000 == 999


def test_a_killed_search_goes_on_the_same():
    for order in ("cost", "bisect"):
        expected, sizes = run(falling(1850), 500, 50000, multiple=10, order=order)
        known = {}
        for n in sizes:  # killed after each
            assert search.next_size(known, 500, 50000, multiple=10, order=order)[0] == n
            known[n] = expected[n]
        assert run(falling(1850), 500, 50000, multiple=10, order=order, known=known) == (expected, [])


def test_known_and_started_sizes_are_used():
    ratio = falling(1850)
    known = {n: record(ratio(n)) for n in (1000, 1200)}
    measured, order = run(ratio, 500, 50000, multiple=10, known=known)
    assert all(1000 <= n <= 1200 for n in order)
    n, _ = search.next_size({}, 500, 50000, multiple=10)
    near = n + 10
    for done in (0.9, 1.0):
        n, cost = search.next_size({}, 500, 50000, multiple=10, started={near: done})
        assert n == near and cost > 0
    between = {500: record(0.99), 600: record(0.5)}
    assert search.next_size(between, 500, 50000, started={550: 1.0})[1] > 0


def test_cost_looks_low_first_and_saves():
    """Above 1 - eps is cheap and large sizes are dear, so the first size is below the middle."""
    n, cost = search.next_size({}, 500, 50000)
    assert n < math.sqrt(500 * 50000) / 2 and cost > n
    mass = np.full(4, 0.25)
    root, cost = search.cheapest_first([10, 20, 40], [10, 20, 40], mass, 5, 80, 0.1)
    share = search.ABOVE_SHARE
    by_hand = min(  # 20 first, then 10 or 40; 10 first, then 20, 40; 10, then 40, 20; ...
        20 * (.5 + share * .5) + 10 * (.25 + share * .25) + 40 * (.25 + share * .25),
        10 * (.25 + share * .75) + 20 * (.25 + share * .5) + 40 * (.25 + share * .25),
        10 * (.25 + share * .75) + 40 * (.5 + share * .25) + 20 * (.25 + share * .25))
    assert cost == pytest.approx(by_hand) and root in (10, 20)


def test_several_at_once_prepare_for_either_outcome():
    measured = {500: record(0.99), 4000: record(0.3)}
    options = dict(n_min=500, n_max=50000)
    sizes, cost = search.next_sizes(measured, 3, **options)
    assert len(set(sizes)) == 3 and sizes[0] == search.next_size(measured, **options)[0] and cost > 0
    above = search.next_size(measured | {sizes[0]: dict(above=True, whole=False)}, **options)[0]
    below = search.next_size(measured | {sizes[0]: dict(above=False, whole=False)}, **options)[0]
    assert sizes[1:] == [above, below]
    more, _ = search.next_sizes(measured, 1, running=sizes[:1], **options)
    assert more == [above]
    assert search.next_sizes({500: record(0.99), 540: record(0.5)}, 2, **options) == ([], 0.0)


def test_belief_follows_the_ratios():
    sizes = [500, 700, 1000, 1400, 2000, 2800, 4000]
    flat = search.belief({}, sizes)
    assert flat.sum() == pytest.approx(1) and np.allclose(flat[1:-1], flat[1], rtol=0.1)
    far = search.belief({4000: record(0.05, whole=True)}, sizes)
    near = search.belief({4000: record(0.8, whole=True)}, sizes)
    assert (far * np.arange(8)).sum() < (near * np.arange(8)).sum()  # 80% at 4,000: EMM is near it
    assert search.belief({1000: record(0.95)}, sizes)[:2].sum() < flat[:2].sum() / 5


def test_belief_of_what_contradicts_itself():
    measured = {n: record(0.0) for n in range(500, 4000, 150)} | {4000: record(0.95)}
    n, cost = search.next_size(measured, 500, 50000)
    assert n > 4000 and math.isfinite(cost)


def test_interval_carries_the_samples():
    measured = {1000: record(0.92, whole=True, count=10000), 1100: record(0.88, count=10000)}
    found = search.estimate(measured)
    assert found["emm"] == pytest.approx(1050) and 1000 < found["interval"][0] < 1050 < found["interval"][1] < 1100
    few = search.estimate({n: record(m["ratio"], whole=True, count=200) for n, m in measured.items()})
    assert few["interval"] == [None, None] and "below 1000 to above 1100" in few["statement"]
    early = search.estimate(measured | {1000: record(0.92, whole=False, count=10000)})  # it may reach 1
    assert early["interval"][0] == found["interval"][0] and early["interval"][1] > found["interval"][1]
    assert "between 1000 (at least 92.0%)" in early["statement"]


def test_a_tolerance_that_class_balance_forbids_is_said():
    measured, _ = run(falling(60), 10, 1000, tolerance=0.05, multiple=10)
    found = search.estimate(measured, tolerance=0.05, multiple=10)
    assert "no size in between is a multiple of 10, so the tolerance of 5% is not reached" in found["statement"]
