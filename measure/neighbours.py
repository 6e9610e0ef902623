"""The K nearest of vectors or images, exactly; the nearest with mirrored ones; Carlini's verdict.

Images are uint8 [N, ...], and their squared distances whole numbers, int64. Vectors are floats [N, D], and
their squared distances are sums of squared differences in float64. Of equally near ones the lower index comes
first.
"""
from decimal import Decimal, localcontext

import numpy as np
import torch

from kernels import References, nearest_two
from kernels.nearest_cpu import centred, float64_products, int8_products_are_exact, squared_norms

BLOCK = 2**23             # distances at once: 64 MB of float64
PAIRS = 2**22             # values of the pairs that are measured again at once: 32 MB of float64
UNIT = 2.0**-53           # the unit roundoff of float64
MAX_INT32_PIXELS = 2**31 // 255**2
# Float64 errs by UNIT in a square root and in each of K sums: far below this, for K up to thousands
UNDECIDED = 1e-11
DIGITS = 60               # sums of roots that agree to so many are called equal


def nearest(x, y, k):
    """Squared distances [Q, k], ascending, and indices int64 [Q, k] of the k nearest y of each x.

    x [Q, ...] and y [N, ...] are both uint8 or both floats, on one device. What `squares_by_row` puts above
    the k-th smallest by more than twice its error is further; the rest is measured again. Raises ValueError
    if N < k, or if shapes differ.
    """
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"images of shape {list(x.shape[1:])} cannot be compared with images of shape "
                         f"{list(y.shape[1:])}; resize or convert one of them")
    if len(y) < k:
        raise ValueError(f"{k} nearest of {len(y)} images; give more images, or a smaller K")
    x, y = x.flatten(1), y.flatten(1)
    distances, error = squares_by_row(x, y)
    found = [], []
    for rows in torch.arange(len(x), device=x.device).split(max(1, BLOCK // len(y))):
        d = distances(rows)
        kth = d.topk(k, dim=1, largest=False).values[:, -1]
        row, index = (d <= (kth + 2 * error[rows])[:, None]).nonzero(as_tuple=True)
        square = squares_of_pairs(x, y, rows[row], index).cpu().numpy()
        row, index = row.cpu().numpy(), index.cpu().numpy()
        order = np.lexsort((index, square, row))
        first = np.searchsorted(row, np.arange(len(rows)))  # rows are in order, each with k or more
        chosen = order[first[:, None] + np.arange(k)]
        found[0].append(torch.from_numpy(square[chosen])), found[1].append(torch.from_numpy(index[chosen]))
    return tuple(torch.cat(part).to(x.device) for part in found)


def squares_by_row(x, y):
    """(distances, error) of x [Q, D] and y [N, D]: distances(rows) [rows, N] is |x - y|^2 within error [Q].

    Of uint8 that is exact, int32 of small images on a CPU, and float64 else. Of floats it is
    |x|^2 + |y|^2 - 2 x.y about the mean of y in float64, which errs by less than 2 (D + 8) u (|x| + R)^2, R
    the largest |y| and u the unit roundoff, in any order of its sums (Higham 2002, section 3.1).
    """
    whole, D = x.dtype == torch.uint8, x.shape[1]
    if whole and x.device.type == "cpu" and D <= MAX_INT32_PIXELS:
        x, y = centred(x), centred(y)
        product = torch._int_mm if int8_products_are_exact(D) else float64_products
        a, b = squared_norms(x), squared_norms(y)
    else:
        mean = 128 if whole else y.double().mean(0)
        x, y, product = x.double() - mean, y.double() - mean, torch.matmul
        a, b = x.square().sum(1), y.square().sum(1)
    error = torch.zeros_like(a) if whole else 2 * (D + 8) * UNIT * (a.sqrt() + b.max().sqrt()) ** 2
    return lambda rows: torch.sub(b + a[rows, None], product(x[rows], y.T), alpha=2), error


def squares_of_pairs(x, y, row, column):
    """|x - y|^2 of pairs: int64 of uint8, float64 of floats."""
    at_once = max(1, PAIRS // x.shape[1])
    squares = torch.cat([(x[i].double() - y[j].double()).square_().sum(1)
                         for i, j in zip(row.split(at_once), column.split(at_once))])
    return squares.to(torch.int64) if x.dtype == torch.uint8 else squares


def compared(x, y, k=2, mirror=False, cosine=False):
    """`nearest` for k of 2 or more. `mirror` counts the nearer of each y and its mirror image.

    x is uint8 [Q, ...] or floats [Q, D]; y may be `References` where k is 2. `cosine` takes vectors of length
    one, and gives the squares of 1 - x.y, which is |x - y|^2 / 2: close ones lose no digits.
    """
    def search(queries):
        if isinstance(y, References) or k == 2 and x.dtype == torch.uint8:
            return nearest_two(queries, y)
        return nearest(queries, y, k)
    if not mirror:
        squares, index = search(x)
        return (squares / 2) ** 2 if cosine else squares, index
    # |x - mirrored y| = |mirrored x - y|. An image among the k nearest is among them in the search in which
    # it is nearer: all before it there are before it in both
    found = [torch.cat(parts, 1).cpu().numpy() for parts in zip(search(x), search(x.flip(-1)))]
    squares, index = _by(found, found[0], found[1])
    again = np.zeros(index.shape, bool)
    again[:, 1:] = index[:, 1:] == index[:, :-1]
    squares, index = _by((squares, index), index, squares, again)
    return tuple(torch.from_numpy(part[:, :k].copy()).to(x.device) for part in (squares, index))


def _by(arrays, *keys):
    """Arrays [Q, K] with each row in the order of keys, the last one first."""
    order = np.lexsort(keys, axis=1)
    return [np.take_along_axis(array, order, 1) for array in arrays]


def distance_ratio(squares, neighbours=0):
    """Nearest by second nearest distance, float64 [N], of their squares [N, K]; 1 where both are 0.

    With `neighbours`, nearest distance by the mean of all K.
    """
    d = squares.double().sqrt()
    other = d.mean(1) if neighbours else d[:, 1]
    return torch.where(other > 0, d[:, 0] / other, 1.0)


def near_the_mean(squares, threshold):
    """bool [Q]: whether the nearest is under p/q of the mean distance to the K nearest, of squares [Q, K].

    Carlini et al. (2301.13188) for CIFAR-10, with K = 50 and p/q = 1/2. Of whole numbers, what float64 cannot
    decide is decided to DIGITS digits.
    """
    p, q = threshold
    d = squares.double().sqrt()
    left, right = q * d.shape[1] * d[:, 0], p * d.sum(1)
    verdict = left < right
    if not squares.is_floating_point():
        close = ((left - right).abs() <= UNDECIDED * right).nonzero()[:, 0].tolist()
        with localcontext(prec=DIGITS + 10):
            for i in close:
                roots = [Decimal(s).sqrt() for s in squares[i].tolist()]
                gap = p * sum(roots) - q * len(roots) * roots[0]
                verdict[i] = gap > Decimal(10)**-(DIGITS - 20)
    return verdict
