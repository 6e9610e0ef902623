"""Which training images are copied: isolated or typical ones, of which class, and how evenly."""
import math

import torch
from scipy import stats

from search import NORMAL, wilson

NEIGHBOURS = 10   # whose mean distance tells how dense the training set is about an image


def rank_correlation(a, b):
    """Spearman's correlation of a [N] and b [N] and its 95% interval: (rho, [low, high]).

    Fisher's z with the variance (1 + rho^2 / 2) / (N - 3) of Bonett and Wright (2000). (None, None) where one
    of them is constant, or N < 4.
    """
    if len(a) < 4 or len(set(a.tolist())) < 2 or len(set(b.tolist())) < 2:
        return None, None
    rho = float(stats.spearmanr(a.numpy(), b.numpy()).statistic)
    if abs(rho) >= 1 - 1e-12:
        return rho, [rho, rho]
    half = NORMAL * math.sqrt((1 + rho**2 / 2) / (len(a) - 3))
    return rho, [math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)]


def drawn(hits, count):
    """How many of `count` images `hits` uniform draws touch: mean and standard deviation.

    The classical occupancy problem (Johnson and Kotz, Urn Models, 1977).
    """
    one, two = ((1 - i / count) ** hits for i in (1, 2))
    variance = count * one + count * (count - 1) * two - (count * one) ** 2
    return count * (1 - one), math.sqrt(max(0.0, variance))


def of_classes(counts, classes):
    """Copies an image in each class, as a list, and the p-value of Kruskal and Wallis; None of one class."""
    groups = [counts[classes == c].numpy() for c in classes.unique().tolist()]
    means = [float(g.mean()) for g in groups]
    if len(groups) < 2 or len(counts.unique()) < 2:
        return means, None
    return means, float(stats.kruskal(*groups).pvalue)


def times_as_often(copies, images):
    """How many times as often an image of one group is copied as one of another, and its interval: a dict.

    `copies` and `images` are pairs of counts. Of all copies the first group has a binomial share: its Wilson
    interval, as odds, over the odds of the images. None is infinite, or unknown where nothing is copied.
    """
    def times(share):
        return share / (1 - share) * images[1] / images[0] if share < 1 else None
    total = sum(copies)
    ends = wilson(copies[0], total) if total else (0.0, 1.0)
    return dict(copies=list(copies), images=list(images), times=times(copies[0] / total) if total else None,
                interval=[times(end) for end in ends])


def which(verdict, index, distances, classes):
    """Who is copied, for JSON.

    verdict bool [Q] and index int64 [Q, K] as of `memorized`; distances [N, K] of each training image to
    itself and the nearest others, and classes int64 [N]. Correlations with the distance to the nearest other,
    and with the mean over those K, are above 0 if isolated images are copied more, below 0 if typical ones
    are. The verdict itself asks for a distant second nearest, which favours isolated images: `samples` has
    the correlations of the number of samples, memorized or not, that are nearest to each image.
    """
    copies, samples = (torch.bincount(nearest, minlength=len(distances))
                       for nearest in (index[verdict, 0], index[:, 0]))
    copied = int((copies > 0).sum())
    mean, deviation = drawn(int(verdict.sum()), len(distances))
    half = NORMAL * deviation
    found = dict(copied=copied, never=len(distances) - copied, most_copies=int(copies.max()),
                 copied_if_uniform=mean,
                 copied_if_uniform_95=[max(0.0, mean - half), min(len(distances), mean + half)])
    for name, count in (("copies", copies), ("samples", samples)):
        for what, value in (("nearest", distances[:, 1]), ("density", distances[:, 1:].mean(1))):
            rho, interval = rank_correlation(count, value)
            found |= {f"{name}_{what}_correlation": rho, f"{name}_{what}_interval_95": interval}
    found["class_copies"], found["class_p"] = of_classes(copies, classes)
    return found
