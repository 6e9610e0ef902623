"""Which training images are copied: isolated ones, or those with a near neighbour."""
import math

import torch
from scipy import stats

from search import NORMAL


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


def which(verdict, index, own):
    """Who is copied, for JSON.

    verdict bool [Q] and index int64 [Q, K] as of `memorized`; own [N] is the distance of each training image
    to the nearest other, or any that rises with it. Correlations above 0 mean that isolated images are copied
    more, below 0 those with a near neighbour. The verdict itself asks for a distant second nearest, which
    favours isolated images: `samples` has the correlation of the number of samples, memorized or not, that
    are nearest to each image.
    """
    copies, samples = (torch.bincount(nearest, minlength=len(own))
                       for nearest in (index[verdict, 0], index[:, 0]))
    copied = int((copies > 0).sum())
    found = dict(copied=copied, never=len(own) - copied, most_copies=int(copies.max()))
    for name, count in (("copies", copies), ("samples", samples)):
        rho, interval = rank_correlation(count, own)
        found |= {f"{name}_nearest_correlation": rho, f"{name}_nearest_interval_95": interval}
    return found
