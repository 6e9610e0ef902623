"""The two nearest training images of each generated image, exactly (paper, section 2).

Images are uint8, so squared distances are whole numbers. All arithmetic here is exact, and so is
the verdict that is made of it: float32 distances are wrong on near-duplicates.
"""
import torch

BLOCK_BYTES = 128 * 2**20  # of one block of distances: memory beyond the inputs is a small multiple of this
REFERENCES_A_BLOCK = 2048
INDEX_BITS = 31            # a reference's index; its squared distance has the 32 bits above it

# Squared distances must fit 32 bits beside the index in an int64 (and the products float64's 53 bits).
MAX_PIXELS = 2**32 // 255**2


def nearest_two(queries, references):
    """Squared L2 distances and indices of the two nearest references of each query.

    queries [Q, D] or [Q, C, H, W], references [N, D] or [N, C, H, W], uint8 on one device, N >= 2.
    Returns distances int64 [Q, 2], ascending, in squared units of the pixel values 0..255, and indices
    int64 [Q, 2]. Of references equally near, the lower index comes first.
    Raises ValueError if the images cannot be compared.
    """
    if queries.dtype != torch.uint8 or references.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {queries.dtype} and {references.dtype}")
    if queries.ndim < 2 or references.ndim < 2 or queries.shape[1:] != references.shape[1:]:
        raise ValueError(f"images of shape {list(queries.shape[1:])} cannot be compared with images of shape "
                         f"{list(references.shape[1:])}; resize or convert one of them")
    x, y = queries.flatten(1), references.flatten(1)
    if len(y) < 2:
        raise ValueError(f"{len(y)} reference images; the second nearest needs at least 2")
    if x.shape[1] > MAX_PIXELS:
        raise ValueError(f"images of {x.shape[1]} values; at most {MAX_PIXELS} are exact here")
    keys = torch.full((len(x), 2), torch.iinfo(torch.int64).max, device=x.device)
    rows = max(1, BLOCK_BYTES // 8 // REFERENCES_A_BLOCK)
    for n in range(0, len(y), REFERENCES_A_BLOCK):
        y_block = y[n:n + REFERENCES_A_BLOCK].to(torch.float64)
        index = torch.arange(n, n + len(y_block), device=y.device)
        for q in range(0, len(x), rows):
            d = _squared_distances(x[q:q + rows].to(torch.float64), y_block)
            # one number orders by distance, then by index: ties cannot go wrong
            key = (d.to(torch.int64) << INDEX_BITS) | index
            key = torch.cat([keys[q:q + rows], key], dim=1)
            keys[q:q + rows] = key.topk(2, dim=1, largest=False, sorted=True).values
    return keys >> INDEX_BITS, keys & (2**INDEX_BITS - 1)


def _squared_distances(x, y):
    """|x - y|^2 [Q, N] of float64 images of whole numbers: every term is a whole number below 2^53, so exact."""
    return torch.addmm(x.square().sum(1)[:, None] + y.square().sum(1), x, y.T, alpha=-2)
