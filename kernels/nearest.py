"""The two nearest training images of each generated image, exactly, and the verdict (paper, section 2).

Images are uint8, so squared distances are whole numbers; so is all arithmetic here, and the verdict
that is made of it. float32 distances, the usual way, name wrong neighbours of near-duplicates.

On a CPU `nearest_two` takes int8 products (nearest_cpu.py), on a GPU a Triton kernel (nearest_triton.py), and
for images too large for the CPU's, or a GPU too old, the plain form that they are tested against. The Q x N
matrix of distances is never held.
"""
import torch

from kernels.layers import runs_triton
from kernels.nearest_cpu import centred, nearest_two_cpu, squared_norms

BLOCK_BYTES = 64 * 2**20  # of the reference's blocks of images and of distances
INDEX_BITS = 24           # a reference's index, below its squared distance in an int64: 39 bits for that
MAX_PIXELS = 2**(63 - INDEX_BITS) // 255**2  # an image, such as 1,600 x 1,600 x 3
# With pixels - 128 as int8, |y|^2 - 2 x.y lies in [-2^14 D, 48896 D]: inside an int32 up to this D.
MAX_INT8_PIXELS = 2**31 // 48896


class References:
    """Images uint8 [N, D] or [N, C, H, W] to search, 2 <= N < 2^24, prepared once for any number of calls.

    It holds an int8 copy of them and a number for each, or, where only the plain form serves, the images.
    `prepare=False` leaves the preparation on a CPU to every call, block by block: less memory, more time.
    Raises ValueError for images that are not so.
    """

    def __init__(self, images, prepare=True):
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, not {images.dtype}")
        if images.ndim < 2 or not 2 <= len(images) < 2**INDEX_BITS:
            raise ValueError(f"{len(images)} reference images; the second nearest needs at least 2, and at "
                             f"most {2**INDEX_BITS - 1} are served")
        self.shape, self.device = images.shape[1:], images.device
        self.images, self.norms, self.prepared = images.flatten(1), None, None
        D = self.images.shape[1]
        if D > MAX_PIXELS:
            raise ValueError(f"images of {D} values; at most {MAX_PIXELS} are exact here")
        self.int8 = self.device.type == "cpu" and D <= MAX_INT8_PIXELS
        if runs_triton(self.device, _is_right):
            from kernels.nearest_triton import prepared
            self.images, self.prepared = None, prepared(self.images)
        elif self.int8 and prepare:
            self.images = centred(self.images)
            self.norms = squared_norms(self.images)

    def queries(self, images):
        """Queries uint8 [Q, D] or [Q, C, H, W] as [Q, D]. Raises ValueError if they cannot be compared."""
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, not {images.dtype}")
        if images.device != self.device:
            raise ValueError(f"queries are on {images.device}, references on {self.device}; move them to one "
                             "device")
        if images.ndim < 2 or images.shape[1:] != self.shape:
            raise ValueError(f"images of shape {list(images.shape[1:])} cannot be compared with images of "
                             f"shape {list(self.shape)}; resize or convert one of them")
        return images.flatten(1)


def nearest_two(queries, references):
    """Squared L2 distances and indices of the two nearest references of each query.

    queries [Q, D] or [Q, C, H, W] uint8; references `References`, or such images, N >= 2, on the same device.
    Returns distances int64 [Q, 2], ascending, in squared units of the pixel values 0..255, and indices
    int64 [Q, 2]. Of references equally near, the lower index comes first.
    Raises ValueError if the images cannot be compared.
    """
    return memorized(queries, references)[1:]


def memorized(queries, references, threshold=(1, 3)):
    """Whether each query is memorized (bool [Q]), with the distances and indices of `nearest_two`.

    Memorized: the nearest distance is under p/q of the second nearest, for threshold (p, q).
    """
    y = references if isinstance(references, References) else References(references, prepare=False)
    x = y.queries(queries)
    if y.prepared:
        from kernels.nearest_triton import nearest_two_cuda
        return nearest_two_cuda(x, y.prepared, threshold)
    distances, index = nearest_two_cpu(x, y.images, y.norms) if y.int8 else nearest_two_reference(x, y.images)
    return is_memorized(distances, threshold), distances, index


def _is_right(device):
    """Whether the Triton kernel agrees with the plain form on two images."""
    from kernels.nearest_triton import nearest_two_cuda, prepared
    images = torch.tensor([[0, 7], [0, 9]], dtype=torch.uint8, device=device)
    found = nearest_two_cuda(images, prepared(images))[1:]
    return all(map(torch.equal, found, nearest_two_reference(images, images)))


def is_memorized(distances, threshold=(1, 3)):
    """bool [Q] of squared distances int64 [Q, 2]: sqrt(d1) / sqrt(d2) < p / q, decided in whole numbers.

    A query at d1 = d2 = 0 copies an image that the references hold twice: by the ratio, not memorized.
    """
    p, q = threshold
    return q * q * distances[:, 0] < p * p * distances[:, 1]


def nearest_two_reference(x, y):
    """`nearest_two` of flat images [Q, D], [N, D] in float64, whose terms are whole numbers below 2^53."""
    keys = torch.full((len(x), 2), torch.iinfo(torch.int64).max, device=x.device)
    rows = max(1, min(2048, BLOCK_BYTES // 8 // x.shape[1]))
    for n in range(0, len(y), rows):
        y_block = y[n:n + rows].to(torch.float64)
        index = torch.arange(n, n + len(y_block), device=y.device)
        for q in range(0, len(x), rows):
            x_block = x[q:q + rows].to(torch.float64)
            norms = x_block.square().sum(1)[:, None] + y_block.square().sum(1)
            d = torch.addmm(norms, x_block, y_block.T, alpha=-2)  # |x|^2 + |y|^2 - 2 x.y
            # one number orders by distance, then by index: ties cannot go wrong
            key = (d.to(torch.int64) << INDEX_BITS) | index
            key = torch.cat([keys[q:q + rows], key], dim=1)
            keys[q:q + rows] = key.topk(2, dim=1, largest=False, sorted=True).values
    return keys >> INDEX_BITS, keys & (2**INDEX_BITS - 1)

