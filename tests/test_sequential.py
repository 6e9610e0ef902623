import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from sequential import interval, log_mixture, verdict

SIMULATIONS = 2000


@settings(max_examples=100, deadline=None)
@given(hits=st.integers(0, 300), misses=st.integers(0, 300), p=st.floats(0.01, 0.99))
def test_mixture_is_the_average_likelihood_ratio(hits, misses, p):
    count = hits + misses
    log_likelihood = hits * math.log(p) + misses * math.log1p(-p)
    assert log_mixture(hits, count, p) == pytest.approx(-math.log(count + 1) - math.log(math.comb(count, hits)) - log_likelihood, abs=1e-8)


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
    """Looks after every one of 3,000 samples, the most greedy way to stop; at p itself both verdicts are errors."""
    alpha, target, n = 0.05, 0.9, 3000
    generator = np.random.default_rng(0)
    hits = (generator.random((SIMULATIONS, n)) < p).cumsum(1)
    count = np.arange(1, n + 1)
    log_beta = np.vectorize(math.lgamma)
    table = log_beta(np.arange(1, n + 3))  # lgamma(1), lgamma(2), ...
    log_m = table[hits] + table[count - hits] - table[count + 1] - hits * math.log(target) - (count - hits) * math.log1p(-target)
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
