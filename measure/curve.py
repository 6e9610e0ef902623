"""The ratio of nearest distances, whole: its distribution, held-out images as a control, two-sample tests.

A held-out image cannot be a copy, but for near-duplicates in the data: the share of them under a threshold is
the threshold's false positive rate.
"""
import math
import warnings

import numpy as np
from scipy import stats
from scipy.cluster.vq import kmeans2, vq

from measure.neighbours import distance_ratio
from search import CONFIDENCE, wilson

RATE = 0.01       # of false positives, at which the threshold is given
STEPS = 120       # of the thresholds from 0 to 1: 1/2, 1/3, 1/4 and 1/5 are among them
CELLS, ROUNDS = 10, 20  # of k-means, for C_T
LEAST = 20        # samples that a cell of C_T must hold: from about there U is near normal
FIT = 10_000      # training images that k-means is fitted to


def band(count):
    """Half the height of the DKW band: the true distribution lies within it everywhere at once.

    P(sup |F_n - F| > e) <= 2 exp(-2 n e^2), for every F (Dvoretzky, Kiefer and Wolfowitz 1956; Massart 1990).
    """
    return math.sqrt(math.log(2 / (1 - CONFIDENCE)) / (2 * count))


def curve(samples, held_out=None):
    """The shares of ratios below every threshold i / STEPS, for JSON, and half the heights of their bands."""
    thresholds = np.arange(STEPS + 1) / STEPS
    found = dict(thresholds=thresholds.tolist())
    for name, ratios in (("samples", samples), ("held_out", held_out)):
        if ratios is not None:
            below = np.searchsorted(np.sort(ratios), thresholds, side="left")
            found |= {name: (below / len(ratios)).tolist(), f"{name}_band": band(len(ratios))}
    return found


def threshold_at(rate, ratios, confidence=CONFIDENCE):
    """(threshold, [low, high]): the largest under which at most `rate` of the ratios lie, and its interval.

    The interval is of order statistics: it holds the quantile of the distribution that the ratios are from
    with probability `confidence` at least, whatever that is. An end that so few ratios do not show is 0 or 1.
    """
    n, ordered = len(ratios), np.sort(ratios)
    # the quantile lies between the l-th and the u-th smallest if between l and u - 1 ratios lie below it
    low, high = (int(stats.binom.ppf(p, n, rate)) for p in ((1 - confidence) / 2, (1 + confidence) / 2))
    interval = [float(ordered[low - 1]) if low else 0.0, float(ordered[high]) if high < n else 1.0]
    return float(ordered[min(n - 1, math.floor(rate * n + 1e-9))]), interval


def share_at(rate, ratios, held_out):
    """(share, [low, high]): of the ratios [N] under the threshold at which `rate` of held-out ones [M] lie.

    The interval holds for the noise of both, by Bonferroni: with probability 97.5% at least the threshold
    lies within its own interval, and with as much the share is no less than Clopper and Pearson's lower end
    at the lower of these two, and no more than their upper end at the upper.
    """
    each = (1 + CONFIDENCE) / 2
    ends = [stats.binomtest(int((ratios < end).sum()), len(ratios)).proportion_ci(each)
            for end in threshold_at(rate, held_out, each)[1]]
    share = (ratios < threshold_at(rate, held_out)[0]).mean()
    return float(share), [float(ends[0].low), float(ends[1].high)]


def z_u(samples, held_out):
    """Z-scored Mann-Whitney U of the samples' distances against those of held-out images, 0 if all are equal.

    U counts pairs in which the sample is further from the training images, ties half. Far below 0: samples
    are nearer to the training images than new images are, copies. Far above: further, underfitting (Meehan,
    Chaudhuri and Dasgupta, 2004.05675). The variance is that under ties.
    """
    m, n = len(samples), len(held_out)
    ranks = stats.rankdata(np.concatenate([samples, held_out]))
    u = ranks[:m].sum() - m * (m + 1) / 2
    variance = m * n * (m + n + 1) / 12 * stats.tiecorrect(ranks)
    return float((u - m * n / 2) / math.sqrt(variance)) if variance > 0 else 0.0


def c_t(sample_distances, sample_cells, held_out_distances, held_out_cells):
    """(C_T, cells used, its standard deviation by chance); (None, 0, None) if no cell has enough.

    C_T is the mean of Z_U over cells, weighted by held-out images: of C equal cells it varies by 1 / sqrt(C).

    Cells int [N] cut the space in pieces; distances are to the nearest of all training images. Those with
    fewer than LEAST samples or no held-out image say nothing (Meehan et al., C_T with tau LEAST / M).
    """
    scores, weights = [], []
    for c in np.unique(sample_cells):
        a, b = sample_distances[sample_cells == c], held_out_distances[held_out_cells == c]
        if len(a) >= LEAST and len(b):
            scores.append(z_u(a, b)), weights.append(len(b))
    if not scores:
        return None, 0, None
    deviation = float(np.linalg.norm(weights) / np.sum(weights))
    return float(np.average(scores, weights=weights)), len(scores), deviation


def cells(train, *others, mirror=False):
    """Cells of k-means on the training images, for each of `others`: int arrays [N].

    In float64, and scaled so that no square overflows. With `mirror` an image and its mirror image share a
    cell: both are replaced by the sum of the two.
    """
    def flat(x):
        x = x.cpu().double()
        return (x + x.flip(-1) if mirror else x).flatten(1).numpy()  # [N, D]
    y = flat(train[:FIT])
    scale = np.abs(y).max() or 1.0
    mean = (y / scale).mean(0)
    y = y / scale - mean
    first = y[np.random.RandomState(0).permutation(len(y))[:CELLS]]
    with warnings.catch_warnings(action="ignore"):  # of a centre without images, which stays where it is
        centres, _ = kmeans2(y, first, ROUNDS, minit="matrix")
    return [vq(flat(x) / scale - mean, centres)[0] for x in others]


def control(squares, held_verdict, held_squares, cells_of, neighbours=0):
    """What held-out images say of the samples, for JSON; squares [N, K] and [M, K] of nearest distances.

    `cells_of` are the cells int [N] and [M] of both.
    """
    ratios, held_ratios = (distance_ratio(s, neighbours).numpy() for s in (squares, held_squares))
    d, held_d = (s[:, 0].double().sqrt().numpy() for s in (squares, held_squares))
    hits, count = int(held_verdict.sum()), len(held_squares)
    found = dict(images=count, memorized=hits, ratio=hits / count, interval_95=list(wilson(hits, count)),
                 training_copies=int((held_squares[:, 0] == 0).sum()), rate=RATE)
    found["threshold"], found["threshold_interval_95"] = threshold_at(RATE, held_ratios)
    found["samples_under_threshold"], found["samples_interval_95"] = share_at(RATE, ratios, held_ratios)
    found["z_u"] = z_u(d, held_d)
    found["c_t"], found["c_t_cells"], found["c_t_deviation"] = c_t(d, cells_of[0], held_d, cells_of[1])
    return found
