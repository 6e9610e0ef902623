"""Quality of samples beside their memorization: precision, recall, density, coverage, Frechet distance.

Kynkaanniemi et al. (2019) and Naeem et al. (2020), with the k-th nearest of the own kind as the radius of a
ball about each image; Dowson and Landau (1982) as in Heusel et al. (2017). On pixels or on vectors of any
extractor: numbers compare with published ones only on the same vectors and counts.
"""
import math
from collections import namedtuple

import torch

from measure.neighbours import BLOCK, nearest, squares_by_row
from search import NORMAL, wilson

NEAREST = 5        # k, as Naeem et al. take
MOST = 10_000      # of each kind that are compared, the first


# x [N, ...] of one kind; squared radius [N] to the k-th nearest other; mean [D]; R [*, D], R'R the covariance
Kind = namedtuple("Kind", "x radius mean R")


def kind(x, k=NEAREST, radius=None):
    """The `Kind` of x [N, ...]; `radius` where that is known. Raises ValueError for k or fewer."""
    if len(x) <= k:
        raise ValueError(f"quality needs more than {k} images of each kind, and here are {len(x)}")
    flat = x.flatten(1).double()
    mean = flat.mean(0)
    R = torch.linalg.qr((flat - mean) / math.sqrt(len(x) - 1), mode="r").R
    return Kind(x, nearest(x, x, k + 1)[0][:, k] if radius is None else radius, mean, R)


def prdc(real, fake, k=NEAREST):
    """Precision, recall, density and coverage of fake (`Kind` of M) against real (of N), with 95% intervals.

    With B(y) the open ball about y that reaches to its k-th nearest of its kind (Naeem et al.):

    precision  share of fakes inside some B(real)       recall    share of reals inside some B(fake)
    density    mean number of B(real) about a fake / k  coverage  share of B(real) that hold a fake

    Intervals are Wilson's of shares, and of density normal: for the noise of one kind, the other being given.
    """
    x, y, r, s = real.x.flatten(1), fake.x.flatten(1), real.radius, fake.radius
    around = torch.zeros(len(y), dtype=torch.int64, device=y.device)
    recalled, covered = [], []
    distances, error = squares_by_row(x, y)
    for rows in torch.arange(len(x), device=x.device).split(max(1, BLOCK // len(y))):
        d = distances(rows) + error[rows, None]  # what may lie on the border of a ball is outside
        inside, near = d < r[rows, None], d < s
        around += inside.sum(0)
        covered.append(inside.any(1)), recalled.append(near.any(1))
    shares = dict(precision=around > 0, recall=torch.cat(recalled), coverage=torch.cat(covered))
    density = around.double() / k
    mean, half = float(density.mean()), NORMAL * float(density.std(correction=1)) / math.sqrt(len(density))
    found = dict(density=mean, density_interval_95=[mean - half, mean + half])
    for name, hits in shares.items():
        hits, count = int(hits.sum()), len(hits)
        found |= {name: hits / count, f"{name}_interval_95": list(wilson(hits, count))}
    return found


def frechet(one, other):
    """Frechet distance between Gaussians fitted to two `Kind`s, a float.

    |mean x - mean y|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances. With A = R'R and B = S'S the
    trace of the root is the sum of the singular values of R S': no root of a matrix, which would fail where
    images are fewer than pixels. In squared units of x; too large of few images, by more the fewer.
    """
    root = torch.linalg.svdvals(one.R @ other.R.T).sum()
    return max(0.0, float((one.mean - other.mean).square().sum() + one.R.square().sum()
                          + other.R.square().sum() - 2 * root))  # rounding would make it less


def against(train, held_out=None, own=None):
    """A function of samples, which gives their `prdc` and `frechet` against training and held-out images.

    It takes at most MOST of each, and returns a dict for JSON. With held-out images also these against the
    training images: what new images of the same kind would get. `own` are squared distances [N, K] of
    training images to their nearest, where they are known.
    """
    def scores(real, fake):
        return prdc(real, fake) | dict(frechet=frechet(real, fake))
    known = own is not None and len(own) <= MOST and own.shape[1] > NEAREST
    others = dict(training=kind(train[:MOST], radius=own[:, NEAREST] if known else None))
    baseline = {}
    if held_out is not None:
        others["held_out"] = kind(held_out[:MOST])
        baseline["held_out_against_training"] = scores(others["training"], others["held_out"])

    def quality(samples):
        fake = kind(samples[:MOST])
        images = dict(samples=len(fake.x)) | {name: len(real.x) for name, real in others.items()}
        return dict(nearest=NEAREST, images=images) | {
            name: scores(real, fake) for name, real in others.items()} | baseline
    return quality
