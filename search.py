"""Where to look for EMM next, and what is known of it: the mathematics of emm.py, free of files and networks.

A measured size is a dict: `above` (whether its ratio is at least 1 - eps), `ratio` and `interval` (95%), and `whole`
(whether it was trained to its end: one stopped early is above, and its ratio a lower bound).
"""
import math
from fractions import Fraction

import numpy as np

ABOVE_SHARE = 0.6    # of its training that a size above 1 - eps takes until it is decided, for the expected cost
SLOPES = (1, 1.5, 2, 3, 4.5, 7)  # of logit ratio against -ln |D|: 2 to 4 in the paper's figures and in digits
LEAST_SHARE = 0.01   # of the price of a size that is trained already: samples are not free
MISFIT = 0.4         # standard deviation of a ratio's logit about such a line
EXTREME = 0.995      # ratios beyond it tell no more


def candidates(measured, n_min, n_max, tolerance=0.1, multiple=1):
    """Sizes worth measuring, ascending: n_min and n_max as they are given, those already measured, and between them
    multiples of `multiple` (the number of classes: balanced) in steps of the tolerance, or the least it allows."""
    n, sizes = n_min, {n_max, *measured}
    while n < n_max:
        sizes.add(n)
        n = max(n // multiple * multiple + multiple, math.floor(n * (1 + tolerance) / multiple) * multiple)
    return sorted(sizes)


def target(eps):
    """1 - eps as an exact fraction: 0.82 for eps 0.18, whose float is a little off."""
    return 1 - Fraction(str(eps))


def bracket(measured):
    """(low, high): the largest size above 1 - eps and the next larger one measured; None where there is none."""
    low = max((n for n, m in measured.items() if m["above"]), default=None)
    high = min((n for n in measured if low is None or n > low), default=None)
    return low, high


def rises(measured):
    """Pairs [a, b] of neighbouring sizes whose ratio rises from a to b beyond their intervals, or whose verdicts do."""
    sizes = sorted(measured)
    return [[a, b] for a, b in zip(sizes, sizes[1:])
            if measured[b]["above"] > measured[a]["above"]
            or measured[a]["whole"] and "interval" in measured[b]
            and measured[b]["interval"][0] > measured[a]["interval"][1]]


def climb(measured, n_max, multiple=1):
    """Where no size is above 1 - eps but the ratio rises with |D|: the next size up, None past its top; else False.

    At a fixed number of epochs small sets get few steps. What lies below them has fewer still: EMM, if anywhere, is
    further up.
    """
    if not rises(measured) or any(m["above"] for m in measured.values()):
        return False
    top = best(measured)
    return double(top, n_max, multiple) if top == max(measured) and top < n_max else None


def best(measured):
    """The size with the largest ratio."""
    return max(measured, key=lambda n: measured[n].get("ratio", 0.0))


def double(n, n_max, multiple):
    return min(math.ceil(2 * n / multiple) * multiple, n_max)


def logit(p):
    p = min(max(p, 1 - EXTREME), EXTREME)
    return math.log(p / (1 - p))


def belief(measured, sizes, eps=0.1, cells=slice(None)):
    """Probability of EMM below sizes[0], between its neighbours, and above sizes[-1], given that it is in one of `cells`.

    The logit of the ratio falls in a straight line with ln |D|, of unknown place (log-uniform) and slope; measured
    ratios are seen through binomial noise and MISFIT. It only decides where to look: verdicts alone make the bracket.
    """
    edges = np.log(sizes)
    edges = np.concatenate([[edges[0] - math.log(2)], edges, [edges[-1] + math.log(2)]])
    share = (np.arange(8) + 0.5) / 8
    places = (edges[:-1, None] + np.diff(edges)[:, None] * share)[..., None]  # [cells, 8, 1]: ln EMM
    log_p = np.broadcast_to(np.log(np.diff(edges))[:, None, None], places.shape[:2] + (len(SLOPES),)).copy()
    for n, m in measured.items():
        predicted = logit(1 - eps) - np.array(SLOPES) * (math.log(n) - places)
        if m["whole"]:
            low, high = (logit(p) for p in m["interval"])
            variance = MISFIT**2 + ((high - low) / 4) ** 2
            log_p -= (predicted - logit(m["ratio"])) ** 2 / (2 * variance)
        else:  # stopped early, or not there yet: its verdict alone
            side = 1 if m["above"] else -1
            log_p -= np.clip(side * (logit(1 - eps) - predicted), 0, None) ** 2 / (2 * MISFIT**2)
    log_p = log_p[cells]
    p = np.exp(log_p - log_p.max()).sum((1, 2))
    return p / p.sum()


def next_size(measured, n_min, n_max, eps=0.1, tolerance=0.1, multiple=1, order="cost", started=None,
              price=lambda n: n):
    """(size to measure next, expected cost of the search from here); None, 0 at its end.

    order "cost": the size that opens the search of least expected cost, where a size costs price(n), the share
    ABOVE_SHARE of it if it is above. `started` {n: share of its training that is done}, which costs nothing again.
    order "bisect": doubles from n_min, then halves on a log scale.
    """
    low, high = bracket(measured)
    if low is not None and high is not None and high <= low * (1 + tolerance):
        return None, 0.0
    if (n := climb(measured, n_max, multiple)) is not False:
        return n, float(price(n)) if n else 0.0
    started = {n: done for n, done in (started or {}).items() if n not in measured and n_min <= n <= n_max}
    sizes = candidates({**measured, **started}, n_min, n_max, tolerance, multiple)
    inside = [n for n in sizes if (low is None or n > low) and (high is None or n < high)]
    if not inside:  # rounding may have left a gap between two candidates
        n = bisect(low, high, n_min, n_max, multiple) if low is not None and high is not None else None
        return n, float(price(n)) if n else 0.0
    first = sizes.index(inside[0])
    mass = belief(measured, sizes, eps, slice(first, first + len(inside) + 1))  # between low, the sizes inside, and high
    prices = [price(n) * max(1 - started.get(n, 0), LEAST_SHARE) for n in inside]
    size, cost = cheapest_first(inside, prices, mass, low or 0, high or math.inf, tolerance)
    return (size if order == "cost" else bisect(low, high, n_min, n_max, multiple)), cost


def cheapest_first(sizes, prices, mass, low, high, tolerance):
    """Root of the decision tree over `sizes` with the least expected price, and that price.

    mass [len(sizes) + 1]: probability of EMM between low, each size, and high. Dynamic programming over intervals:
    cost[i, j] is the expected price, times its probability, of going on when EMM lies in cells i .. j - 1.
    (Optimal search trees: Knuth, Acta Informatica 1971; with prices: Charikar et al., STOC 2000.)
    """
    cells = len(mass)
    ends, prices = [low, *sizes, high], np.array([0.0, *prices])
    total = np.concatenate([[0], np.cumsum(mass)])
    cost, root = np.zeros((cells + 1, cells + 1)), None
    for width in range(2, cells + 1):
        for i in range(cells - width + 1):
            j = i + width
            if ends[j] <= ends[i] * (1 + tolerance):
                continue
            m = np.arange(i + 1, j)  # measuring ends[m] leaves the cells i .. m - 1 if it is below, m .. j - 1 if above
            paths = prices[m] * (total[m] - total[i] + ABOVE_SHARE * (total[j] - total[m])) + cost[i, m] + cost[m, j]
            best = int(paths.argmin())
            cost[i, j], root = paths[best], sizes[i + best]
    return root, float(cost[0, cells])


def next_sizes(measured, count, running=(), **options):
    """Up to `count` sizes to measure at once, beside those running: the next one, and those that would follow from
    either of its outcomes, and so on. Also the expected cost from here."""
    found, worlds, expected = [], [dict(measured)], None
    while worlds and (len(found) < count or expected is None):
        world = worlds.pop(0)
        n, cost = next_size(world, **options)
        expected = cost if expected is None else expected
        if n is None:
            continue
        if n not in running and n not in found:
            found.append(n)
        worlds += [world | {n: dict(above=above, whole=False)} for above in (True, False)]
    return found[:count], expected


def bisect(low, high, n_min, n_max, multiple):
    if low is None:
        return n_min if high is None or n_min < high else None
    if high is None:
        return double(low, n_max, multiple) if low < n_max else None
    middle = round(math.sqrt(low * high) / multiple) * multiple
    return middle if low < middle < high else None


def crossing(sizes, values, target):
    """The largest size at which the line through (sizes, values) is at the target: (size, end).

    end is "below" if no value reaches it (the size is then the first), "above" if the last one does, else None.
    """
    reached = [i for i, value in enumerate(values) if value >= target]
    if not reached:
        return sizes[0], "below"
    i = reached[-1]
    if i == len(sizes) - 1:
        return sizes[-1], "above"
    return sizes[i] + (sizes[i + 1] - sizes[i]) * (values[i] - target) / (values[i] - values[i + 1]), None


def estimate(measured, eps=0.1, tolerance=0.1, multiple=1):
    """What {n: measured} says of EMM, as a dict:

    emm        where the ratio, interpolated linearly inside the bracket, is 1 - eps; None if no bracket was found. Of a
               size stopped early the ratio is a lower bound, and EMM then lies low in its bracket
    interval   the same for the lower and for the upper ends of the ratios' 95% intervals; an end that was not found is
               None. A size stopped early is taken to reach 1. It covers the samples' noise at the measured sizes,
               and neither the choice of the training set nor initial weights: that takes several seeds.
    bracket    [low, high], None for an end that was not found
    rises      [[a, b], ...]: sizes between which the ratio rises; EMM is the largest size above 1 - eps all the same
    statement  in words; tolerance None if the sizes were not chosen by a search
    """
    least, (low, high) = float(target(eps)), bracket(measured)
    sizes = sorted(measured)
    emm, up = None, rises(measured)
    lower, below = crossing(sizes, [measured[n]["interval"][0] for n in sizes], least)
    upper, above = crossing(sizes, [measured[n]["interval"][1] if measured[n]["whole"] else 1.0 for n in sizes], least)
    interval = [None if below else lower, None if above else upper]
    if low is None and up:
        top = best(measured)
        statement = (f"EMM was not found: no ratio reaches {least:.0%}, and it rises with |D|, to "
                     f"{measured[top]['ratio']:.1%} at {top}, most likely because at a fixed number of epochs small "
                     "sets get few steps; raise --epochs, or give every size a floor of steps with --steps-min")
    elif low is None:
        m = measured[high]
        statement = (f"EMM is below {high}: the ratio there is {m['ratio']:.1%}, under {least:.0%}; "
                     + ("lower --n-min" if high > 2 else "raise --epochs"))
    elif high is None:
        statement = f"EMM is at least {low}: the ratio there is {measured[low]['ratio']:.1%}; raise --n-max, or take more data"
    else:
        a, b = measured[low]["ratio"], measured[high]["ratio"]
        emm = low + (high - low) * (a - least) / (a - b) if a > b else low
        ends = ["below " + str(sizes[0]) if below else f"{lower:.0f}", "above " + str(sizes[-1]) if above else f"{upper:.0f}"]
        statement = (f"EMM is about {emm:.0f} (95% interval {ends[0]} to {ends[1]}), between {low} "
                     f"({'at least ' * (not measured[low]['whole'])}{a:.1%}) and {high} ({b:.1%})")
        if tolerance and high > low * (1 + tolerance):
            statement += f"; no size in between is a multiple of {multiple}, so the tolerance of {tolerance:.0%} is not reached"
    if up and low is not None:
        statement += (f"; the ratio is not monotone: it rises from {' and from '.join(f'{a} to {b}' for a, b in up)}, "
                      f"and the largest size above {least:.0%} counts")
    return dict(emm=emm, interval=interval, bracket=[low, high], monotone=not up, rises=up, statement=statement)
