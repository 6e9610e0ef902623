"""Which training images are copied: isolated or typical ones, of which class, and how evenly."""
import math

import torch
from scipy import stats

from measure.neighbours import nearest
from search import NORMAL

NEIGHBOURS = 10   # whose mean distance tells how dense the training set is about an image


def surroundings(train, k=NEIGHBOURS):
    """L2 distance of each image to the nearest other, and its mean over the k nearest others: float64 [N].

    Of fewer than k + 1 images the mean is over all others.
    """
    k = min(k, len(train) - 1)
    # the first is the image itself, or a duplicate, at 0 as well
    d = nearest(train, train, k + 1)[0].cpu().double().sqrt()
    return d[:, 1], d[:, 1:].mean(1)


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


def copies(verdict, index, count):
    """How many memorized samples are nearest to each of `count` training images: int64 [count]."""
    return torch.bincount(index[verdict, 0], minlength=count)


def of_classes(counts, classes):
    """Copies an image in each class, as a list, and the p-value of Kruskal and Wallis; None of one class."""
    groups = [counts[classes == c].numpy() for c in classes.unique().tolist()]
    means = [float(g.mean()) for g in groups]
    if len(groups) < 2 or len(counts.unique()) < 2:
        return means, None
    return means, float(stats.kruskal(*groups).pvalue)


def which(verdict, index, train, classes):
    """Who is copied, for JSON.

    verdict bool [Q] and index int64 [Q, K] as of `memorized`; train [N, ...], classes int64 [N]. Correlations
    above 0 mean that isolated images are copied more, below 0 typical ones. The verdict itself asks for a
    distant second nearest, which favours isolated images: `samples` has the correlations of the number of
    samples, memorized or not, that are nearest to each image.
    """
    own, density = surroundings(train)
    counts = dict(copies=copies(verdict, index, len(train)),
                  samples=torch.bincount(index[:, 0], minlength=len(train)))
    hits, touched = int(verdict.sum()), int((counts["copies"] > 0).sum())
    mean, deviation = drawn(hits, len(train))
    half = NORMAL * deviation
    found = dict(copied=touched, never=len(train) - touched, most_copies=int(counts["copies"].max()),
                 copied_if_uniform=mean,
                 copied_if_uniform_95=[max(0.0, mean - half), min(len(train), mean + half)])
    for name, count in counts.items():
        for what, value in (("nearest", own), ("density", density)):
            rho, interval = rank_correlation(count, value)
            found |= {f"{name}_{what}_correlation": rho, f"{name}_{what}_interval_95": interval}
    found["class_copies"], found["class_p"] = of_classes(counts["copies"], classes)
    return found
