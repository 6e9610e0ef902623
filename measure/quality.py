"""Quality of samples beside their memorization: precision, recall, density, coverage, Frechet distance.

Kynkaanniemi et al. (2019) and Naeem et al. (2020), with the k-th nearest of the own kind as the radius of a
ball about each image; Dowson and Landau (1982) as in Heusel et al. (2017). On pixels or on vectors of any
extractor: numbers compare with published ones only on the same vectors and counts.
"""
import math

import torch

from measure.neighbours import BLOCK, approximate, nearest, squares_of_pairs
from search import NORMAL, wilson

NEAREST = 5        # k, as Naeem et al. take
MOST = 10_000      # of each kind that are compared, the first


def radii(x, k=NEAREST):
    """Squared distance [N] of each x [N, ...] to its k-th nearest other. Raises ValueError for k or fewer."""
    if len(x) <= k:
        raise ValueError(f"quality needs more than {k} images of each kind, and here are {len(x)}")
    return nearest(x, x, k + 1)[0][:, k]


def prdc(real, fake, k=NEAREST, real_radii=None, fake_radii=None):
    """Precision, recall, density and coverage of fake [M, ...] against real [N, ...], with 95% intervals.

    With B(y) the open ball about y that reaches to its k-th nearest of its kind (Naeem et al.):

    precision  share of fakes inside some B(real)       recall    share of reals inside some B(fake)
    density    mean number of B(real) about a fake / k  coverage  share of B(real) that hold a fake

    Intervals are Wilson's of shares, and of density normal: for the noise of one kind, the other being given.
    """
    r, s = (radii(x, k) if known is None else known
            for x, known in ((real, real_radii), (fake, fake_radii)))
    around = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    recalled, covered = [], []
    x, y = real.flatten(1), fake.flatten(1)
    distances, error, unit = approximate(x, y)
    r_unit, s_unit = r.double() / unit, s.double() / unit  # float32 would round squares above 2^24
    for rows in torch.arange(len(x), device=x.device).split(max(1, BLOCK // len(y))):
        d = distances(rows)
        inside, near = d < r_unit[rows, None], d < s_unit
        if error.is_floating_point():  # what float32 cannot decide
            margin = error[rows, None]
            i, j = (((d - r_unit[rows, None]).abs() <= margin)
                    | ((d - s_unit).abs() <= margin)).nonzero(as_tuple=True)
            d = squares_of_pairs(x, y, rows[i], j)
            inside[i, j], near[i, j] = d < r[rows[i]], d < s[j]
        around += inside.sum(0)
        covered.append(inside.any(1)), recalled.append(near.any(1))
    shares = dict(precision=around > 0, recall=torch.cat(recalled), coverage=torch.cat(covered))
    density = around.double() / k
    half = NORMAL * float(density.std(correction=1)) / math.sqrt(len(density))
    found = dict(density=float(density.mean()), density_interval_95=[float(density.mean()) - half,
                                                                     float(density.mean()) + half])
    for name, hits in shares.items():
        hits, count = int(hits.sum()), len(hits)
        found |= {name: hits / count, f"{name}_interval_95": list(wilson(hits, count))}
    return found


def frechet(x, y):
    """Frechet distance between Gaussians fitted to x [N, ...] and y [M, ...], N and M of 2 or more; float.

    |mean x - mean y|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances. With A = R'R and B = S'S the
    trace of the root is the sum of the singular values of R S': no root of a matrix, which would fail where
    images are fewer than pixels. In squared units of x; too large of few images, by more the fewer.
    """
    (a, R), (b, S) = (_moments(z.flatten(1).double()) for z in (x, y))
    root = torch.linalg.svdvals(R @ S.T).sum()
    return float((a - b).square().sum() + R.square().sum() + S.square().sum() - 2 * root)


def _moments(x):
    """The mean [D] of x [N, D], and R, [N, D] or smaller, with R'R the covariance."""
    mean = x.mean(0)
    R = (x - mean) / math.sqrt(len(x) - 1)
    return mean, torch.linalg.qr(R, mode="r").R if len(x) > x.shape[1] else R


def quality(samples, train, held_out=None, k=NEAREST):
    """`prdc` and `frechet` of samples against training and held-out images, at most MOST of each, for JSON.

    With held-out images also these against the training images: what new images of the same kind would get.
    """
    kinds = dict(samples=samples[:MOST], training=train[:MOST])
    if held_out is not None:
        kinds["held_out"] = held_out[:MOST]
    r = {name: radii(x, k) for name, x in kinds.items()}
    pairs = dict(training=("training", "samples"), held_out=("held_out", "samples"),
                 held_out_against_training=("training", "held_out"))
    found = dict(nearest=k, images={name: len(x) for name, x in kinds.items()})
    for name, (real, fake) in pairs.items():
        if real in kinds and fake in kinds:
            found[name] = prdc(kinds[real], kinds[fake], k, r[real], r[fake])
            found[name]["frechet"] = frechet(kinds[real], kinds[fake])
    return found
