"""What early verdicts, sequential sampling and the choice of sizes save in finding EMM: a simulation.

    python bench/simulate_search.py     half a minute on one core

A curve gives the ratio at the end of training on n images; at 16 snapshots on the way, the ratio is the
share (1 - exp(-4 t)) / (1 - exp(-4)) of it. Samples are drawn with that probability, so that the sequential
test errs as often as it would in earnest.

    grid     sizes in steps of 10% from 500 images until two are below (published curves: all sizes of the
             paper's figure), each trained to its end, 10,000 samples of every snapshot
    bisect   doubling and halving to a bracket of 10%, each size trained and sampled the same way
    early    doubling and halving; training and sampling end when the sequential test decides
    emm.py   likewise; inside the bracket, the next size is where a line through the ratios puts EMM
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import search
from plot import published_curve
from run import option, stage

SNAPSHOTS, SAMPLES, EPS, TOLERANCE, ALPHA = 16, 10_000, 0.1, 0.1, 0.01
N_MIN, N_MAX, CLASSES = 500, 50_000, 10
MOST_BY_HAND = 10  # sizes of a grid that is run to its end
WAYS = ("grid", "bisect", "early", "emm.py")


@dataclass(frozen=True)
class Options:
    curves: int = option(200, "random curves: EMM from 500 to 20,000, slope of the logit from 1.5 to 5")
    seed: int = option(0, "of curves and samples")


def line(emm_, slope):
    """A ratio whose logit falls by slope in ln n and is 1 - eps at emm_."""
    return lambda n: 1 / (1 + EPS / (1 - EPS) * (n / emm_) ** slope)


def through(sizes, ratios):
    """The published points, joined by lines in logit against ln n; the outer lines go on beyond them."""
    x, y = np.log(sizes), np.array([search.logit(r) for r in ratios])

    def ratio(n):
        i = min(max(np.searchsorted(x, np.log(n)) - 1, 0), len(x) - 2)
        slope = (y[i + 1] - y[i]) / (x[i + 1] - x[i])
        return 1 / (1 + np.exp(-(y[i] + (np.log(n) - x[i]) * slope)))
    return ratio


def crossing(ratio):
    """EMM of a falling ratio."""
    sizes = np.geomspace(10, 10**6, 20001)
    return float(sizes[np.searchsorted(-np.array([ratio(n) for n in sizes]), -(1 - EPS))])


def measure(ratio, n, generator, early):
    """A record of the size n, the images trained (n for a whole training) and the samples drawn."""
    scores, drawn = [], 0
    for s in range(1, SNAPSHOTS + 1):
        p = ratio(n) * (1 - np.exp(-4 * s / SNAPSHOTS)) / (1 - np.exp(-4))
        hits, count, verdict = 0, 0, None
        while count < SAMPLES and verdict is None:
            more = min(search.next_samples(count) if early else SAMPLES, SAMPLES - count)
            hits, count = hits + generator.binomial(more, p), count + more
            verdict = search.verdict(hits, count, 1 - EPS, ALPHA / SNAPSHOTS, ALPHA) if early else None
        drawn += count
        scores.append((hits, count))
        if verdict:
            break
    hits, count = max(scores, key=lambda score: score[0] / score[1])
    record = dict(above=verdict or hits >= (1 - EPS) * count, whole=s == SNAPSHOTS, ratio=hits / count,
                  interval=search.interval_of_best(scores, 0.05 / SNAPSHOTS))
    return record, n * s / SNAPSHOTS, drawn


def steps(first, last, tolerance, multiple=1):
    """Sizes from first to last in steps of the tolerance: a grid, as one would choose it by hand."""
    def after(n):
        return max(math.floor(n * (1 + tolerance) / multiple), n // multiple + 1) * multiple

    sizes = [first]
    while (n := after(sizes[-1])) < last:
        sizes.append(n)
    return [*sizes, last]


def find(ratio, way, grid, generator):
    """(estimate, images trained, samples drawn, sizes) of one search."""
    measured, trained, drawn = {}, 0, 0
    while True:
        if way == "grid":
            left = [n for n in grid if n not in measured]
            enough = len(grid) > MOST_BY_HAND and sum(not m["above"] for m in measured.values()) == 2
            n = left[0] if left and not enough else None
        else:
            known = measured  # without ratios a search can only halve
            if way != "emm.py":
                known = {n: dict(above=m["above"]) for n, m in measured.items()}
            n = search.next_size(known, N_MIN, N_MAX, EPS, TOLERANCE, CLASSES)
        if n is None:
            return search.estimate(measured, EPS, TOLERANCE, CLASSES), trained, drawn, len(measured)
        measured[n], images, samples = measure(ratio, n, generator, early=way in ("early", "emm.py"))
        trained, drawn = trained + images, drawn + samples


def table(title, curves, seed):
    print(f"\n{title}\n")
    print("way      sizes   images trained / EMM   samples drawn   "
          "against the grid: images  samples   error of EMM   interval holds it")
    for way in WAYS:
        runs = [(find(ratio, way, grid, np.random.default_rng([seed, i])), truth)
                for i, (ratio, truth, grid) in enumerate(curves)]
        sizes = mean(found[3] for found, _ in runs)
        trained = mean(found[1] / truth for found, truth in runs)
        drawn = mean(found[2] for found, _ in runs)
        if way == "grid":
            base = trained, drawn
        errors = [abs(found[0]["emm"] / truth - 1) for found, truth in runs if found[0]["emm"]]
        intervals = [(*found[0]["interval"], truth) for found, truth in runs]
        holds = mean(float((low or 0) <= truth <= (high or np.inf)) for low, high, truth in intervals)
        print(f"{way:<8} {sizes:>5.1f}   {trained:>20.2f}   {drawn:>13,.0f}   "
              f"{trained / base[0]:>24.2f}  {drawn / base[1]:>7.3f}   "
              f"{mean(errors):>12.1%}   {holds:>17.0%}")


def bench(options):
    generator = np.random.default_rng(options.seed)
    fine = steps(N_MIN, N_MAX, TOLERANCE, CLASSES)
    random = []
    for _ in range(options.curves):
        truth = np.exp(generator.uniform(np.log(N_MIN), np.log(20_000)))
        slope = generator.uniform(1.5, 5)
        random.append((line(truth, slope), truth, fine))
    table(f"{options.curves} random curves", random, options.seed)
    curves = [("resolution", "32x32"), ("resolution", "16x16"), ("resolution", "8x8"),
              ("labels", "unconditional"), ("labels", "true"), ("labels", "random10")]
    published = []
    for experiment, series in curves:
        sizes, ratios = published_curve(experiment=experiment, series=series)
        ratio = through(sizes, ratios)
        published.append((ratio, crossing(ratio), sizes))
    table("6 published curves, digitised, 20 times each; the grid is the sizes of the paper's figure",
          published * 20, options.seed)


def main():
    stage(bench, Options, __doc__)


if __name__ == "__main__":
    main()
