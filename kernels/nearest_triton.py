"""nearest_two on CUDA: a Triton kernel over tiles of queries and references, one before and one after it.

For pixels - 128 as int8, a reference y orders by its score s = |y|^2 - 2 x.y (|x|^2 is the same for all).
A tile of products x.y comes from the int8 tensor cores as int32 and never leaves the registers:

    p = (s - 16256 D) 2^G + group          one multiply-add an element; a group is BN / 2^G references
    two smallest p of each row             a tournament of min and max, no index beside them
    merged into the running two            by score, then by (tile, group): a few instructions a row

so a row ends with its two smallest scores, exactly, and the groups that hold them. The merge kernel takes
them over all splits of the references, measures those two groups again, and writes distances, indices
(lower first on ties) and the verdict. References are prepared once: int8, padded, |y|^2 and group in a key.

No overflow: s lies in [-2^14 D, 48896 D], so |s - 16256 D| <= 32640 D, and G is the most bits for which
32640 D 2^G + 2^G - 1 < 2^31 - 1 (`group_bits`): at 3,072 pixels 4, at 12,288 2, at MAX_INT32_PIXELS 1. Larger
images have int64 scores, sums of int32 products of INT32_TERMS pixels each, in smaller tiles.

10,000 x 50,000 x 3,072 took an H100 2.71 ms, 0.23 for the merge and 0.02 for the queries' pixels, and 3.4
with what is allocated for it; cuBLAS's bare product took an H200 4.15. What each part must cost on paper, and
so what bounds it, is printed by `make kernel-report`: an H100 is bound by what tiles load from L2, which is
(BQ + BN) D bytes for BQ BN elements, and wants the wide tile; an A100 is near the balance. Two blocks a
multiprocessor, to hide the epilogue of one behind the products of the other, need the narrow tile, whose
traffic costs more than they win. Descriptors (TMA) compile to fewer registers, the same tensor-core
instructions and the same one block, so pointers stay. Blocks run in groups of GROUP query tiles: 3.1 MB of X
and a few tiles of Y at 3,072 pixels, which stay in the L2 cache. The references are split so that the last
wave wastes least. With 3 stages, groups of 32 and half the splits an H200 was each time a little slower.
"""
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

REACH = 32640          # of the scores of a pixel, from their middle
MAX_INT32_PIXELS = (2**31 - 2) // (2 * REACH)  # an image whose scores leave a bit of an int32 for the group
INT32_TERMS = 2**17 - 2**12  # products of int8 values that an int32 sums, where scores are int64
GROUP = 8              # query tiles that run beside each other
MAX_SPLITS = 64
ROWS, COLUMNS = 8, 512  # images and pixels that a program of `prepare_kernel` reads at one time

# Tiles by compute capability: queries, references and pixels of a tile, warps, stages of the pipeline.
# Each compiles without spills (`make kernel-report`). Of seven tried on an H200, that of 90 was the fastest.
TILES = {
    80: dict(BQ=128, BN=256, BK=64, num_warps=8, num_stages=4),
    86: dict(BQ=128, BN=256, BK=64, num_warps=8, num_stages=3),  # consumer GPUs have 99 KiB of shared memory
    90: dict(BQ=128, BN=256, BK=128, num_warps=8, num_stages=4),
    100: dict(BQ=128, BN=128, BK=128, num_warps=8, num_stages=3),  # wider ones spill in Triton 3.6
}


def tiles(capability, D=1):
    """The tile for a compute capability such as 90, its own or that of the next lower one, and D pixels."""
    if D <= MAX_INT32_PIXELS:
        return TILES[max(c for c in TILES if c <= capability)]
    # scores are int64, and stay in registers where they are sums of several int32
    return dict(BQ=128 if D <= INT32_TERMS else 64, BN=128, BK=128, num_warps=8, num_stages=3)


def group_bits(D, BN):
    """G: how many bits below a score of D pixels are free for the group of its column."""
    largest = 2**31 - 1 if D <= MAX_INT32_PIXELS else 2**63 - 1
    bits = BN.bit_length() - 1
    while REACH * D * 2**bits + 2**bits - 1 >= largest:
        bits -= 1
    return bits


def merge_pixels(W, BK):
    """Pixels that the merge takes of its 2 W images at one time: 8,192 values, 64 a thread."""
    return min(BK, 4096 // W)


def best_splits(q_tiles, n_tiles, at_once):
    """Into how many parts to cut n_tiles, if `at_once` blocks run at one time.

    The most that cost up to 2% above the least time, as short blocks level out: for 79 x 196 tiles an H200
    took 2% less in 10 parts than in 5. Times are in tiles; a block takes half a tile's to fill its pipeline
    and to write.
    """
    def time(splits):
        return triton.cdiv(q_tiles * splits, at_once) * (triton.cdiv(n_tiles, splits) + 0.5)
    choices = range(1, min(MAX_SPLITS, n_tiles) + 1)
    least = min(map(time, choices))
    return max(splits for splits in choices if time(splits) <= 1.02 * least)


@triton.jit(do_not_specialize=["N"])
def prepare_kernel(IMAGES, OUT, KEYS, N, PIXELS: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
                   BN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """OUT int8 [rows, D] = pixels - 128 of IMAGES [N, PIXELS] (uint8, seen as int8).

    Padded with black pixels, which change no distance, and rows of zeros, whose products are 0.

    KEYS int32 or int64 [rows] = (|y|^2 - 16256 D) 2^G + group, in the padding the largest number; none if BN
    is 0.
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n64 = n[:, None].to(tl.int64)
    # other=-128 would do, but of four bytes read at one time Triton 3.6 and 3.8 fill three with -1
    row = tl.where(n[:, None] < N, -1, 0).to(tl.int8)
    squares = tl.zeros((ROWS, COLUMNS), tl.int32)
    for i in range(0, D, COLUMNS):
        k = i + tl.arange(0, COLUMNS)[None, :]
        pixel = tl.load(IMAGES + n64 * PIXELS + k, mask=(n64 < N) & (k < PIXELS), other=0)
        pixel = (pixel ^ -128) & row
        tl.store(OUT + n64 * D + k, pixel, mask=k < D)
        square = pixel.to(tl.int32) * pixel.to(tl.int32)
        squares += square if D % COLUMNS == 0 else tl.where(k < D, square, 0)
    if BN > 0:
        largest: tl.constexpr = 2147483647 if KEYS.dtype.element_ty == tl.int32 else 9223372036854775807
        key = ((tl.sum(squares.to(tl.int64), 1) - 16256 * D) << G) + n % BN // (BN >> G)
        tl.store(KEYS + n, tl.where(n < N, key, largest).to(KEYS.dtype.element_ty))


@triton.jit
def _two_smallest(a1, a2, b1, b2):
    """The two smallest of two ascending pairs."""
    return tl.minimum(a1, b1), tl.minimum(tl.maximum(a1, b1), tl.minimum(a2, b2))


@triton.jit
def _merge(m1, c1, m2, c2, v1, k1, v2, k2):
    """Put the ascending pair (v1, k1), (v2, k2) into the running (m1, c1), (m2, c2), which wins ties."""
    first = v1 < m1
    old, old_code = tl.where(first, m1, m2), tl.where(first, c1, c2)
    new, new_code = tl.where(first, v2, v1), tl.where(first, k2, k1)
    second = new < old
    return (tl.where(first, v1, m1), tl.where(first, k1, c1),
            tl.where(second, new, old), tl.where(second, new_code, old_code))


@triton.jit(do_not_specialize=["Q", "N", "tiles_a_split", "splits"])
def nearest_two_kernel(X, Y, KEYS, SCORES, CODES, Q, N, tiles_a_split, splits,
                       D: tl.constexpr, G: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
                       BK: tl.constexpr, GROUP: tl.constexpr, TERMS: tl.constexpr):
    """Two smallest scores, and the codes (tile * 2^G + group) that hold them, of BQ queries in one split.

    X int8 [>= Q, D], Y int8 [>= N, D] and KEYS [>= N] are of `prepare_kernel`, padded to whole tiles. SCORES
    [splits, Q, 2] is of the type of KEYS, CODES [splits, Q, 2] int32. An int32 sums TERMS products at most.
    """
    tl.static_assert(TERMS % BK == 0)
    program, q_tiles = tl.program_id(0), tl.cdiv(Q, BQ)
    first_q_tile = program // (GROUP * splits) * GROUP
    height = tl.minimum(q_tiles - first_q_tile, GROUP)
    q_tile = first_q_tile + program % (GROUP * splits) % height
    split = program % (GROUP * splits) // height

    q = q_tile * BQ + tl.arange(0, BQ)
    k = tl.arange(0, BK)
    x_pointers = X + q[:, None].to(tl.int64) * D + k[None, :]
    largest: tl.constexpr = 2147483647 if KEYS.dtype.element_ty == tl.int32 else 9223372036854775807
    m1 = tl.full((BQ,), largest, KEYS.dtype.element_ty)
    m2 = tl.full((BQ,), largest, KEYS.dtype.element_ty)
    c1 = tl.zeros((BQ,), tl.int32)
    c2 = tl.zeros((BQ,), tl.int32)
    start = split * tiles_a_split
    for tile in tl.range(start, tl.minimum(start + tiles_a_split, tl.cdiv(N, BN)), num_stages=1):
        n = tile * BN + tl.arange(0, BN)
        y_pointers = Y + n[:, None].to(tl.int64) * D + k[None, :]
        p = tl.zeros((BQ, BN), KEYS.dtype.element_ty)
        for first in tl.range(0, D, TERMS, num_stages=1):
            dots = tl.zeros((BQ, BN), tl.int32)
            for i in range(first, tl.minimum(first + TERMS, D), BK):
                x, y = tl.load(x_pointers + i), tl.load(y_pointers + i)
                dots = tl.dot(x, tl.trans(y), dots, out_dtype=tl.int32)
            p -= dots.to(KEYS.dtype.element_ty) * (2 << G)
        p += tl.load(KEYS + n)[None, :]
        # the first round of the tournament is between columns that one thread holds: no second smallest yet
        even, odd = tl.split(tl.reshape(p, (BQ, BN // 2, 2)))
        p1, p2 = tl.reduce((tl.minimum(even, odd), tl.maximum(even, odd)), 1, _two_smallest)
        m1, c1, m2, c2 = _merge(m1, c1, m2, c2, p1 >> G, (tile << G) | (p1 & ((1 << G) - 1)).to(tl.int32),
                                p2 >> G, (tile << G) | (p2 & ((1 << G) - 1)).to(tl.int32))
    out = (split.to(tl.int64) * Q + q) * 2
    tl.store(SCORES + out, m1, mask=q < Q)
    tl.store(SCORES + out + 1, m2, mask=q < Q)
    tl.store(CODES + out, c1, mask=q < Q)
    tl.store(CODES + out + 1, c2, mask=q < Q)


@triton.jit(do_not_specialize=["Q", "N", "splits", "p2", "q2"])
def merge_kernel(X, Y, SCORES, CODES, DISTANCES, INDEX, VERDICT, Q, N, splits, p2, q2,
                 D: tl.constexpr, W: tl.constexpr, BK: tl.constexpr):
    """Distances int64 [Q, 2], indices int64 [Q, 2] and verdict int8 [Q] of one query a program.

    W references to a group; p2, q2 are the squares of the threshold's terms.
    """
    q = tl.program_id(0).to(tl.int64)
    m1 = tl.load(SCORES + q * 2)
    c1 = tl.load(CODES + q * 2)
    m2 = tl.load(SCORES + q * 2 + 1)
    c2 = tl.load(CODES + q * 2 + 1)
    i = q * 2
    for _ in range(1, splits):
        i += 2 * Q
        m1, c1, m2, c2 = _merge(m1, c1, m2, c2, tl.load(SCORES + i), tl.load(CODES + i),
                                tl.load(SCORES + i + 1), tl.load(CODES + i + 1))
    member = tl.arange(0, 2 * W)
    n = tl.where(member < W, c1 * W + member, c2 * W + member - W)
    valid = (n < N) & ((member < W) | (c1 != c2))  # both in one group: its members once
    d = tl.zeros((2 * W,), tl.int64)
    for i in range(0, D, BK):
        k = i + tl.arange(0, BK)
        x = tl.load(X + q * D + k).to(tl.int32)
        y = tl.load(Y + n[:, None].to(tl.int64) * D + k[None, :], mask=valid[:, None], other=0).to(tl.int32)
        d += tl.sum((x[None, :] - y) * (x[None, :] - y), 1)
    d = tl.where(valid, d, 9223372036854775807)
    d1 = tl.min(d, 0)
    i1 = tl.min(tl.where(valid & (d == d1), n, 2147483647), 0)
    rest = valid & (n != i1)
    d2 = tl.min(tl.where(rest, d, 9223372036854775807), 0)
    i2 = tl.min(tl.where(rest & (d == d2), n, 2147483647), 0)
    tl.store(DISTANCES + q * 2, d1)
    tl.store(DISTANCES + q * 2 + 1, d2)
    tl.store(INDEX + q * 2, i1.to(tl.int64))
    tl.store(INDEX + q * 2 + 1, i2.to(tl.int64))
    tl.store(VERDICT + q, (q2 * d1 < p2 * d2).to(tl.int8))


@dataclass(frozen=True)
class Prepared:
    """References as the kernel reads them: int8 [>= count, D] and keys [>= count], padded to whole tiles."""
    images: torch.Tensor
    keys: torch.Tensor
    count: int
    tile: dict


def prepared(images, tile=None):
    """`Prepared` of uint8 images [N, D]. `tile` replaces the device's own (for tests and tuning)."""
    if tile is None:
        major, minor = torch.cuda.get_device_capability(images.device)
        tile = tiles(10 * major + minor, images.shape[1])
    return Prepared(*_pixels(images, tile["BN"], tile["BK"], keys=True), len(images), tile)


def nearest_two_cuda(x, y, threshold=(1, 3), splits=None):
    """Verdict bool [Q], distances int64 [Q, 2], indices int64 [Q, 2] of uint8 images [Q, D] in `Prepared` y.

    Three launches. `splits` replaces the device's own (for tests and tuning).
    """
    Q, D, N, device = len(x), y.images.shape[1], y.count, x.device
    BQ, BN, BK = y.tile["BQ"], y.tile["BN"], y.tile["BK"]
    q_tiles, n_tiles, G = triton.cdiv(Q, BQ), len(y.images) // BN, group_bits(D, BN)
    if splits is None:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        splits = best_splits(q_tiles, n_tiles, processors)
    tiles_a_split = triton.cdiv(n_tiles, min(splits, n_tiles))
    splits = triton.cdiv(n_tiles, tiles_a_split)  # without those that would be left empty
    x, _ = _pixels(x, BQ, BK)
    scores = torch.empty(splits, Q, 2, dtype=y.keys.dtype, device=device)
    codes = torch.empty(splits, Q, 2, dtype=torch.int32, device=device)
    distances, index = (torch.empty(Q, 2, dtype=torch.int64, device=device) for _ in range(2))
    verdict = torch.empty(Q, dtype=torch.bool, device=device)
    p, q = threshold
    with torch.cuda.device(device if device.type == "cuda" else -1):
        nearest_two_kernel[(q_tiles * splits,)](
            x, y.images, y.keys, scores, codes, Q, N, tiles_a_split, splits, D, G, BQ, BN, BK, GROUP,
            INT32_TERMS, num_warps=y.tile["num_warps"], num_stages=y.tile["num_stages"])
        merge_kernel[(Q,)](x, y.images, scores, codes, distances, index, verdict.view(torch.int8), Q, N,
                           splits, p * p, q * q, D, BN >> G, merge_pixels(BN >> G, BK))
    return verdict, distances, index


def _pixels(images, rows, columns, keys=False):
    """uint8 images [N, D] as int8, padded to multiples of rows and columns, and, if asked for, their keys."""
    (N, PIXELS), device = images.shape, images.device
    padded, D = triton.cdiv(N, rows) * rows, triton.cdiv(PIXELS, columns) * columns
    out = torch.empty(padded, D, dtype=torch.int8, device=device)
    score = torch.int32 if D <= MAX_INT32_PIXELS else torch.int64
    key = torch.empty(padded if keys else 0, dtype=score, device=device)
    with torch.cuda.device(device if device.type == "cuda" else -1):  # triton launches on the current one
        prepare_kernel[(padded // ROWS,)](images.contiguous().view(torch.int8), out, key, N, PIXELS, D,
                                          group_bits(D, rows), rows if keys else 0, ROWS, COLUMNS)
    return out, key
