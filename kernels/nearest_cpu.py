"""nearest_two on a CPU: int8 products in blocks that stay in cache, and a vectorised reduction.

|x - y|^2 = |x|^2 + (|y|^2 - 2 x.y), with pixels - 128 as int8 and x.y in int32: torch._int_mm, which uses
AVX512-VNNI. The bracket orders the references of a query; numpy's argmin finds its two smallest, many
times faster than torch's min with index or topk.
"""
from functools import lru_cache

import numpy as np
import torch

# int8 rows and int32 products that share a cache, measured on Zen 4
QUERIES_A_BLOCK, REFERENCES_A_BLOCK = 1024, 2048
LARGEST = np.iinfo(np.int32).max

# Squares of int8 values are at most 2^14, so float32 sums of 1,024 are whole numbers up to 2^24: exact.
EXACT_TERMS = 1024


def nearest_two_cpu(x, y, norms=None):
    """Distances int64 [Q, 2] and indices int64 [Q, 2] for uint8 images [Q, D], [N, D], D <= MAX_INT8_PIXELS.

    Where `norms` are given, y is `centred` already. Memory beyond the images: a copy of x, and blocks that do
    not grow with Q or N.
    """
    x = centred(x)
    product = torch._int_mm if int8_products_are_exact(x.shape[1]) else float64_products
    best = np.full((len(x), 2), LARGEST, np.int32)
    index = np.zeros((len(x), 2), np.int64)
    work = torch.empty(QUERIES_A_BLOCK * REFERENCES_A_BLOCK, dtype=torch.int32)
    for n in range(0, len(y), REFERENCES_A_BLOCK):
        block = slice(n, n + REFERENCES_A_BLOCK)
        y_block = y[block] if norms is not None else centred(y[block])
        y_norms = norms[block] if norms is not None else squared_norms(y_block)
        for q in range(0, len(x), QUERIES_A_BLOCK):
            rows = slice(q, q + QUERIES_A_BLOCK)
            size = len(x[rows]), len(y_block)
            # one piece of memory for all blocks: page faults cost 3%
            score = work[:size[0] * size[1]].view(size)
            product(x[rows], y_block.T, out=score)
            torch.sub(y_norms, score, alpha=2, out=score)
            _merge(best[rows], index[rows], score.numpy(), n)
    return torch.from_numpy(best).to(torch.int64) + squared_norms(x)[:, None], torch.from_numpy(index)


def _merge(best, index, score, offset):
    """Put the two smallest of each row of a block of scores, which is used up, into the running two.

    argmin names the first of equals, and the running two have lower indices and win ties: lower index first.
    """
    row = np.arange(len(score))
    first = score.argmin(1)
    first_score = score[row, first]
    score[row, first] = LARGEST  # scores are below it: MAX_INT8_PIXELS
    second = score.argmin(1)
    values = np.stack([best[:, 0], best[:, 1], first_score, score[row, second]], 1)
    indices = np.stack([index[:, 0], index[:, 1], first + offset, second + offset], 1)
    order = values.argsort(1, kind="stable")[:, :2]
    best[:], index[:] = np.take_along_axis(values, order, 1), np.take_along_axis(indices, order, 1)


def centred(images):
    """uint8 pixels - 128 as int8: one bit of each flips."""
    return (images ^ 128).view(torch.int8)


def squared_norms(x):
    """|x|^2 int32 [N] of int8 images [N, D]: exact float32 sums, then whole numbers, in blocks of rows."""
    def of_block(rows):
        parts = [chunk.float().square_().sum(1).to(torch.int32) for chunk in rows.split(EXACT_TERMS, dim=1)]
        return torch.stack(parts).sum(0, dtype=torch.int32)
    return torch.cat([of_block(rows) for rows in x.split(REFERENCES_A_BLOCK)])


def float64_products(x, y, out=None):
    """x @ y int32 [Q, N] of int8 [Q, D], [D, N], exact on any CPU and at any setting of torch's precision."""
    products = (x.double() @ y.double()).to(torch.int32)
    return products if out is None else out.copy_(products)


@lru_cache(maxsize=None)
def int8_products_are_exact(D):
    """Whether torch._int_mm is right here: without VNNI it saturates pairs at 16 bits, and does not say so.

    Asked once for each D with random images in a block's own shape, which a saturating product gets wrong
    in every row. All-extreme images would not show it.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (QUERIES_A_BLOCK, D), dtype=torch.int8, generator=generator)
    y = torch.randint(-128, 128, (REFERENCES_A_BLOCK, D), dtype=torch.int8, generator=generator)
    return torch.equal(torch._int_mm(x, y.T, out=torch.empty(len(x), len(y), dtype=torch.int32))[:, ::64],
                       float64_products(x, y[::64].T))
