"""Is a ratio above or below a target? A test that may be looked at after every sample, and the interval that goes with it.

For k hits among n independent samples and a uniform prior on the ratio, Robbins' mixture

    M_n(p) = integral of q^k (1 - q)^(n - k) dq / (p^k (1 - p)^(n - k)) = B(k + 1, n - k + 1) / (p^k (1 - p)^(n - k))

is a martingale of mean 1 if p is the true ratio. By Ville's inequality the chance that it ever reaches 1 / alpha is at
most alpha, whenever one stops and for whatever reason: {p: M_n(p) < 1 / alpha} is a confidence sequence.
Robbins, Statistical methods related to the law of the iterated logarithm (1970); Ville (1939); Howard, Ramdas,
McAuliffe and Sekhon, Time-uniform, nonparametric, nonasymptotic confidence sequences (2021).
"""
import math

BISECTIONS = 50  # halvings of [0, 1]: to the last bits of a float
CHUNK = 64       # samples before the first look, or more where they cost no more; then half as many again before each


def log_mixture(hits, count, p):
    """log M_n(p); infinite where p is impossible."""
    misses = count - hits
    if (hits and p <= 0) or (misses and p >= 1):
        return math.inf
    log_beta = math.lgamma(hits + 1) + math.lgamma(misses + 1) - math.lgamma(count + 2)
    return log_beta - (hits * math.log(p) if hits else 0) - (misses * math.log1p(-p) if misses else 0)


def interval(hits, count, alpha=0.05):
    """(low, high) that holds the true ratio with probability 1 - alpha at all counts together."""
    def excluded(p):
        return log_mixture(hits, count, p) >= -math.log(alpha)

    def end(outside, inside):  # M_n falls from either side towards hits / count
        if not count or not excluded(outside):
            return outside
        for _ in range(BISECTIONS):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if excluded(middle) else (outside, middle)
        return outside
    share = hits / count if count else 0.5
    return end(0.0, share), end(1.0, share)


def verdict(hits, count, target, alpha_above=0.01, alpha_below=0.01):
    """True if the ratio is above the target, False if below, None while it is open.

    If it is not above, "above" is ever said with probability alpha_above at most; and so for below.
    """
    if not count:
        return None
    log_m = log_mixture(hits, count, target)
    if hits > target * count and log_m >= -math.log(alpha_above):
        return True
    if hits < target * count and log_m >= -math.log(alpha_below):
        return False
    return None


def chunk(count, size=CHUNK):
    """How many samples to draw after the first `count`, before the next look: a multiple of `size`."""
    return max(size, count // 2 // size * size)


def interval_of_best(scores, alpha=0.05):
    """(low, high) that holds the largest of several ratios, given (hits, count) of each.

    With `alpha` the chance to err of each, however many there are: their upper and lower ends together hold for the best.
    """
    ends = [interval(hits, count, alpha) for hits, count in scores]
    return [max(end) for end in zip(*ends)]
