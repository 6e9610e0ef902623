"""The mathematics of emm.py: which size to measure next, when samples are enough, what is known of EMM.

A measured size is a dict: `above` (whether its ratio is at least 1 - eps), `ratio`, its 95% `interval`, and
`whole` (whether it was trained to its end: one stopped early is above, and its ratio a lower bound).

Samples are enough as soon as a test that may be looked at after every one of them says so. For k hits among n
independent samples and a uniform prior on the ratio, Robbins' mixture

    M_n(p) = B(k + 1, n - k + 1) / (p^k (1 - p)^(n - k)),   B the integral of q^k (1 - q)^(n - k) dq

is a martingale of mean 1 if p is the true ratio. By Ville's inequality the chance that it ever reaches
1 / alpha is at most alpha, whenever one stops and for whatever reason: {p: M_n(p) < 1 / alpha} is a
confidence sequence.
Robbins, Statistical methods related to the law of the iterated logarithm (1970); Ville (1939); Howard,
Ramdas, McAuliffe and Sekhon, Time-uniform, nonparametric, nonasymptotic confidence sequences (2021).
"""
import math
import statistics
from fractions import Fraction

from scipy import optimize, special, stats

SLOPE = 2.5        # of the ratio's logit against -ln |D| until two ratios tell: 2 to 4 in the paper's figures
SLOPES = 1, 6      # what two ratios, which are noisy, may make of it
PATIENCE = 6       # sizes about a bracket after which it is halved: that many lines have missed EMM
EXTREME = 0.995    # ratios beyond it tell no more
FIRST_LOOK = 64         # samples before the first look, at least; then half as many again before each
CONFIDENCE = 0.95  # of the reported intervals
NORMAL = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)  # half of one, in standard deviations
ONSETS = 0.01, 0.1, 0.5, 0.9  # ratios of whose first time a search tells


# ---- which size next

def target(eps):
    """1 - eps as an exact fraction: 0.82 for eps 0.18, whose float is a little off."""
    return 1 - Fraction(str(eps))


def bracket(measured):
    """(low, high): the largest size above 1 - eps and the next larger one measured; None for one missing."""
    low = max((n for n, m in measured.items() if m["above"]), default=None)
    high = min((n for n in measured if low is None or n > low), default=None)
    return low, high


def rises(measured):
    """Pairs [a, b] of neighbouring sizes whose verdict rises from a to b, or ratio beyond both intervals."""
    sizes = sorted(measured)
    return [[a, b] for a, b in zip(sizes, sizes[1:])
            if measured[b]["above"] > measured[a]["above"]
            or measured[a]["whole"] and measured[b]["interval"][0] > measured[a]["interval"][1]]


def logit(p):
    p = min(max(p, 1 - EXTREME), EXTREME)
    return math.log(p / (1 - p))


def next_size(measured, n_min, n_max, eps=0.1, tolerance=0.1, multiple=1):
    """The size to measure next, or None at the end of the search.

    Doubles from 2 n_min until a size is below 1 - eps, then measures where the ratios say that EMM lies;
    where they do not tell, it halves the bracket on a log scale. Sizes are n_min, n_max, and multiples of
    `multiple` (the number of classes: balanced) between them.
    """
    low, high = bracket(measured)
    start = low or n_min
    if high is None:
        doubled = math.ceil(2 * start / multiple) * multiple
        return min(doubled, n_max) if low is None or low < n_max else None
    if high <= (low * (1 + tolerance) if low else n_min):
        return None
    n = math.sqrt(start * high)
    tries = sum(start / 2 < m < 2 * high for m in measured)
    if tries <= PATIENCE and (emm := crossing_of_line(measured, eps)):
        # half a step of the tolerance below EMM; the size after it is then half a step above, and the last
        first, last = low * (1 + tolerance) if low else n_min, high / (1 + tolerance)
        n = min(max(emm / math.sqrt(1 + tolerance), first), last) if first < last else n
    n = max(math.floor(n / multiple), start // multiple + 1) * multiple
    if low is None and (n <= n_min or n >= high):
        return n_min
    return n if n < high else None


def crossing_of_line(measured, eps=0.1):
    """Where the ratio is 1 - eps if its logit is a straight line in ln |D|; None without a ratio below.

    The line goes through the first size below 1 - eps, and through the second if there is one.
    """
    high = bracket(measured)[1] or math.inf
    below = [n for n in sorted(measured) if n >= high and "ratio" in measured[n]][:2]
    if not below:
        return None
    drops = [logit(measured[n]["ratio"]) for n in below]
    slope = SLOPE
    if len(below) == 2:
        slope = min(max((drops[0] - drops[1]) / math.log(below[1] / below[0]), SLOPES[0]), SLOPES[1])
    return below[0] * math.exp((drops[0] - logit(1 - eps)) / slope)


def next_sizes(measured, count, running=(), **options):
    """Up to `count` sizes to measure at once, beside those running.

    They are the next size, those that would follow from either of its outcomes, and so on.
    """
    found, worlds = [], [measured]
    while worlds and len(found) < count:
        world = worlds.pop(0)
        if (n := next_size(world, **options)) is not None:
            found += [n] if n not in (*running, *found) else []
            worlds += [world | {n: dict(above=above)} for above in (True, False)]
    return found


# ---- what is known of EMM

def crossing(sizes, values, target):
    """The largest size at which the line through (sizes, values) falls to the target; None if it does not."""
    reached = [i for i, value in enumerate(values) if value >= target]
    if not reached or (i := reached[-1]) == len(sizes) - 1:
        return None
    return sizes[i] + (sizes[i + 1] - sizes[i]) * (values[i] - target) / (values[i] - values[i + 1])


def estimate(measured, eps=0.1, tolerance=0.1, multiple=1):
    """What {n: measured} says of EMM, as a dict:

    emm        where the ratio, interpolated linearly inside the bracket, is 1 - eps; None without a bracket.
               Of a size stopped early the ratio is a lower bound, and EMM then lies low in its bracket
    interval   the same for the lower and for the upper ends of the ratios' 95% intervals; None for an end
               that was not found. A size stopped early is taken to reach 1. It covers the samples' noise at
               the measured sizes, but neither the choice of training set nor initial weights; seeds do
    bracket    [low, high], None for an end that was not found
    rises      [[a, b], ...]: sizes between which the ratio rises; EMM is the largest size above all the same
    statement  in words; tolerance None if the sizes were not chosen by a search
    """
    least, (low, high), emm = float(target(eps)), bracket(measured), None
    sizes, up = sorted(measured), rises(measured)
    tops = [measured[n]["interval"][1] if measured[n]["whole"] else 1.0 for n in sizes]
    bottoms = [measured[n]["interval"][0] for n in sizes]
    interval = [crossing(sizes, ends, least) for ends in (bottoms, tops)]
    if low is None:
        statement = (f"EMM is below {high}: the ratio there is {measured[high]['ratio']:.1%}, "
                     f"under {least:.0%}; train for longer")
        if high > 2:
            statement += ", or lower --n-min" if tolerance else ", or measure smaller sizes"
    elif high is None:
        statement = (f"EMM is at least {low}: the ratio there is {measured[low]['ratio']:.1%}; "
                     + ("raise --n-max, or take more data" if tolerance else "measure larger sizes"))
    else:
        a, b = measured[low]["ratio"], measured[high]["ratio"]
        emm = low + (high - low) * max(0.0, a - least) / (a - b) if a > b else low
        ends = [f"{end:.0f}" if end else beyond
                for end, beyond in zip(interval, (f"below {sizes[0]}", f"above {sizes[-1]}"))]
        statement = (f"EMM is about {emm:.0f} (95% interval {ends[0]} to {ends[1]}), between {low} "
                     f"({'at least ' * (not measured[low]['whole'])}{a:.1%}) and {high} ({b:.1%})")
        if tolerance and high > low * (1 + tolerance):
            statement += (f"; no size in between is a multiple of {multiple}, "
                          f"so the tolerance of {tolerance:.0%} is not reached")
    if up:
        pairs = " and from ".join(f"{a} to {b}" for a, b in up)
        statement += f"; the ratio is not monotone: it rises from {pairs}, " + (
            f"and the largest size above {least:.0%} counts" if low else
            "most likely because at a fixed number of epochs small sets get few steps: "
            "raise --epochs, or give every size a floor of them, --steps-min")
    return dict(emm=emm, interval=interval, bracket=[low, high], rises=up, statement=statement)


def onset(trajectory, ratio):
    """When the snapshots of a run, dicts with epoch, step, ratio and interval, first reach a ratio: a dict.

    epoch, step  interpolated linearly in the logarithm of the epoch; 0 is no later than the first snapshot,
                 None not by the last
    interval     of the epoch, the same for the upper and for the lower ends of the snapshots' intervals. It
                 covers the samples' noise, but not how the ratio ran between two snapshots
    """
    def first(values):
        i = next((i for i, value in enumerate(values) if value >= ratio), None)
        if not i:
            return i
        part = (ratio - values[i - 1]) / (values[i] - values[i - 1])
        return epochs[i - 1] * (epochs[i] / epochs[i - 1]) ** part
    epochs, last = [t["epoch"] for t in trajectory], trajectory[-1]
    epoch = first([t["ratio"] for t in trajectory])
    lows, highs = zip(*(t["interval"] for t in trajectory))
    return dict(epoch=epoch, step=epoch and epoch * last["step"] / last["epoch"],
                interval=[first(highs), first(lows)])


def wilson(hits, count):
    """Wilson's score interval for a share of hits among count samples: (low, high)."""
    low, high = stats.binomtest(hits, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(low), float(high)


def student(values):
    """Mean of several values and half the width of its Student interval."""
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


# ---- when samples are enough

def log_mixture(hits, count, p):
    """log M_n(p); infinite where p is impossible."""
    misses = count - hits
    return special.betaln(hits + 1, misses + 1) - special.xlogy(hits, p) - special.xlog1py(misses, -p)


def interval(hits, count, alpha=0.05):
    """(low, high) that holds the true ratio with probability 1 - alpha at all counts together."""
    def excess(p):  # falls from either side towards hits / count, where it is negative
        return log_mixture(hits, count, p) + math.log(alpha)

    share = hits / count if count else 0.5
    return tuple(optimize.bisect(excess, end, share) if excess(end) >= 0 else end for end in (0.0, 1.0))


def verdict(hits, count, target, alpha_above=0.01, alpha_below=0.01):
    """True if the ratio is above the target, False if below, None while it is open.

    If it is not above, "above" is ever said with probability alpha_above at most; and so for below.
    """
    above = hits > target * count
    decided = log_mixture(hits, count, target) >= -math.log(alpha_above if above else alpha_below)
    return above if decided else None


def next_samples(count, size=FIRST_LOOK):
    """How many samples to draw after the first `count`, before the next look: a multiple of `size`."""
    return max(size, count // 2 // size * size)


def interval_of_best(scores, alpha=0.05):
    """(low, high) that holds the largest of several ratios, given (hits, count) of each.

    With `alpha` the chance to err of each: their upper and lower ends together hold for the best.
    """
    ends = [interval(hits, count, alpha) for hits, count in scores]
    return [max(end) for end in zip(*ends)]
