"""nearest_two on CUDA: one fused Triton kernel over tiles of queries and references, and a small merge.

For pixels - 128 as int8, a reference y orders by its score s = |y|^2 - 2 x.y (|x|^2 is the same for all).
A tile of products x.y comes from the int8 tensor cores as int32 and never leaves the registers:

    p = (s - 16256 D) 2^G + group          one multiply-add an element; a group is BN / 2^G references
    two smallest p of each row             a tournament of min and max, no index beside them
    merged into the running two            by score, then by (tile, group): a few instructions a row

so a row ends with its two smallest scores, exactly, and the groups that hold them. The merge kernel takes
them over all splits of the references, measures those two groups again, and writes distances, indices
(lower first on ties) and the verdict.

No overflow: s lies in [-2^14 D, 48896 D], so |s - 16256 D| <= 32640 D, and G is the most bits for which
32640 D 2^G + 2^G - 1 < 2^31 - 1 (`group_bits`): at 3,072 pixels 4, at 12,288 2, at nearest.MAX_CUDA_PIXELS 0.

What to expect for 10,000 x 50,000 x 3,072, on paper (`make kernel-report`; no GPU has run it yet):

    products    3.07e12 int8 operations: 1.55 ms at the 1,979 TOPS of an H100 SXM, 4.92 ms at an A100's 624
    epilogue    at most 7 to 8.5 instructions an element: 0.25 and 0.45 ms at 64 a clock, beside no product of its block
    L2 to SM    a tile loads (BQ + BN) D bytes for BQ BN elements: 18 GB at 128 x 256, 24 GB at 128 x 128;
                at an assumed 5.5 TB/s (H100) and 4.5 TB/s (A100) 3.3 and 4.0 ms, against 4.4 and 5.4
    HBM         X and Y once, 0.2 GB: 0.06 ms, if what runs at one time stays in the L2 cache
    merge       two groups of 16 images a query, 1.0 GB: 0.3 ms at 3.35 TB/s, 0.5 at an A100's 2.0

An H100 is bound by L2 and wants the wide tile, an A100 is near the balance. Two blocks a multiprocessor, to hide
the epilogue of one behind the products of the other, need the narrow tile: its traffic costs more than they win.
Descriptors (TMA) compile to 166 registers instead of 208, the same tensor-core instructions and the same one block,
so pointers stay. Blocks run in groups of GROUP query tiles: 12.6 MB of X and a few tiles of Y at 3,072 pixels, half
of an H100's L2, where all of X would not fit. The references are split so that the last wave wastes least.
"""
import torch
import triton
import triton.language as tl

from kernels.nearest_cpu import centred, squared_norms

LARGEST = 2**31 - 1
MIDDLE, REACH = 16256, 32640          # of the scores, a pixel
GROUP = 32                            # query tiles that run beside each other
MAX_SPLITS = 64

# Tiles by compute capability: queries, references and pixels of a tile, warps, stages of the software pipeline.
# Each compiles without spills and fills a multiprocessor alone (`make kernel-report`).
TILES = {
    80: dict(BQ=128, BN=256, BK=64, num_warps=8, num_stages=4),
    86: dict(BQ=128, BN=256, BK=64, num_warps=8, num_stages=3),  # consumer GPUs have 99 KiB of shared memory
    90: dict(BQ=128, BN=256, BK=128, num_warps=8, num_stages=3),
    120: dict(BQ=128, BN=256, BK=64, num_warps=8, num_stages=3),
}


def tiles(capability):
    """The tile configuration for a compute capability such as 90: its own, or that of the next lower one."""
    return TILES[max(c for c in TILES if c <= capability)]


def group_bits(D, BN):
    """G: how many bits below a score of D pixels are free for the group of its column."""
    bits = BN.bit_length() - 1
    while REACH * D * 2**bits + 2**bits - 1 >= LARGEST:
        bits -= 1
    return bits


def merge_pixels(W, BK):
    """Pixels that the merge takes of its 2 W images at one time: 8,192 values, 64 a thread."""
    return min(BK, 4096 // W)


def best_splits(q_tiles, n_tiles, at_once):
    """Into how many parts to cut n_tiles, if `at_once` blocks run at one time: the least time, in tiles.

    A block takes half a tile's time to fill its pipeline and to write.
    """
    def time(splits):
        return triton.cdiv(q_tiles * splits, at_once) * (triton.cdiv(n_tiles, splits) + 0.5)
    return min(range(1, min(MAX_SPLITS, n_tiles) + 1), key=time)


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


@triton.jit
def nearest_two_kernel(X, Y, KEYS, SCORES, CODES, Q, N, tiles_a_split, splits, D: tl.constexpr, G: tl.constexpr,
                       BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """Two smallest scores, and the codes (tile * 2^G + group) that hold them, of BQ queries in one split.

    X int8 [>= Q, D], Y int8 [>= N, D] and KEYS int32 [>= N] are padded to whole tiles. KEYS holds
    (|y|^2 - 16256 D) 2^G + group, LARGEST in the padding. SCORES, CODES int32 [splits, Q, 2].
    """
    program, q_tiles = tl.program_id(0), tl.cdiv(Q, BQ)
    first_q_tile = program // (GROUP * splits) * GROUP
    height = tl.minimum(q_tiles - first_q_tile, GROUP)
    q_tile = first_q_tile + program % (GROUP * splits) % height
    split = program % (GROUP * splits) // height

    q = q_tile * BQ + tl.arange(0, BQ)
    k = tl.arange(0, BK)
    x_pointers = X + q[:, None].to(tl.int64) * D + k[None, :]
    m1 = tl.full((BQ,), 2147483647, tl.int32)
    m2 = tl.full((BQ,), 2147483647, tl.int32)
    c1 = tl.zeros((BQ,), tl.int32)
    c2 = tl.zeros((BQ,), tl.int32)
    start = split * tiles_a_split
    for tile in tl.range(start, tl.minimum(start + tiles_a_split, tl.cdiv(N, BN)), num_stages=1):
        n = tile * BN + tl.arange(0, BN)
        y_pointers = Y + n[:, None].to(tl.int64) * D + k[None, :]
        dots = tl.zeros((BQ, BN), tl.int32)
        for i in range(0, D, BK):
            dots = tl.dot(tl.load(x_pointers + i), tl.trans(tl.load(y_pointers + i)), dots, out_dtype=tl.int32)
        p = tl.load(KEYS + n)[None, :] - dots * (2 << G)
        # the first round of the tournament is between columns that one thread holds: no second smallest yet
        even, odd = tl.split(tl.reshape(p, (BQ, BN // 2, 2)))
        p1, p2 = tl.reduce((tl.minimum(even, odd), tl.maximum(even, odd)), 1, _two_smallest)
        m1, c1, m2, c2 = _merge(m1, c1, m2, c2, p1 >> G, (tile << G) | (p1 & ((1 << G) - 1)),
                                p2 >> G, (tile << G) | (p2 & ((1 << G) - 1)))
    out = (split.to(tl.int64) * Q + q) * 2
    tl.store(SCORES + out, m1, mask=q < Q)
    tl.store(SCORES + out + 1, m2, mask=q < Q)
    tl.store(CODES + out, c1, mask=q < Q)
    tl.store(CODES + out + 1, c2, mask=q < Q)


@triton.jit
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
    d = tl.zeros((2 * W,), tl.int32)
    for i in range(0, D, BK):
        k = i + tl.arange(0, BK)
        x = tl.load(X + q * D + k).to(tl.int32)
        y = tl.load(Y + n[:, None].to(tl.int64) * D + k[None, :], mask=valid[:, None], other=0).to(tl.int32)
        d += tl.sum((x[None, :] - y) * (x[None, :] - y), 1)
    d = tl.where(valid, d, 2147483647)
    d1 = tl.min(d, 0)
    i1 = tl.min(tl.where(valid & (d == d1), n, 2147483647), 0)
    rest = valid & (n != i1)
    d2 = tl.min(tl.where(rest, d, 2147483647), 0)
    i2 = tl.min(tl.where(rest & (d == d2), n, 2147483647), 0)
    tl.store(DISTANCES + q * 2, d1.to(tl.int64))
    tl.store(DISTANCES + q * 2 + 1, d2.to(tl.int64))
    tl.store(INDEX + q * 2, i1.to(tl.int64))
    tl.store(INDEX + q * 2 + 1, i2.to(tl.int64))
    tl.store(VERDICT + q, (q2 * d1.to(tl.int64) < p2 * d2.to(tl.int64)).to(tl.int8))


def nearest_two_cuda(x, y, threshold=(1, 3), tile=None, splits=None):
    """Verdict bool [Q], distances int64 [Q, 2], indices int64 [Q, 2] of uint8 images [Q, D], [N, D] on one GPU.

    Q >= 1, N >= 2, D <= nearest.MAX_CUDA_PIXELS. `tile` and `splits` replace the device's own (for tests and tuning).
    """
    Q, N, device = len(x), len(y), x.device
    if tile is None:
        major, minor = torch.cuda.get_device_capability(device)
        tile = tiles(10 * major + minor)
    BQ, BN, BK = tile["BQ"], tile["BN"], tile["BK"]
    x, y = _padded(x, BQ, BK), _padded(y, BN, BK)
    D, q_tiles, n_tiles = x.shape[1], len(x) // BQ, len(y) // BN
    G = group_bits(D, BN)
    if splits is None:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        splits = best_splits(q_tiles, n_tiles, processors)
    tiles_a_split = triton.cdiv(n_tiles, min(splits, n_tiles))
    splits = triton.cdiv(n_tiles, tiles_a_split)  # without those that would be left empty
    n = torch.arange(len(y), device=device)
    keys = ((squared_norms(y).long() - MIDDLE * D) << G) + n % BN // (BN >> G)
    keys = torch.where(n < N, keys, LARGEST).to(torch.int32)
    scores, codes = (torch.empty(splits, Q, 2, dtype=torch.int32, device=device) for _ in range(2))
    distances, index = (torch.empty(Q, 2, dtype=torch.int64, device=device) for _ in range(2))
    verdict = torch.empty(Q, dtype=torch.int8, device=device)
    p, q = threshold
    with torch.cuda.device(device if device.type == "cuda" else -1):  # triton launches on the current one
        nearest_two_kernel[(q_tiles * splits,)](
            x, y, keys, scores, codes, Q, N, tiles_a_split, splits, D, G, BQ, BN, BK, GROUP,
            num_warps=tile["num_warps"], num_stages=tile["num_stages"])
        merge_kernel[(Q,)](x, y, scores, codes, distances, index, verdict, Q, N, splits, p * p, q * q, D, BN >> G,
                           merge_pixels(BN >> G, BK))
    return verdict.bool(), distances, index


def _padded(images, rows, columns):
    """Pixels - 128 as int8, padded with zeros to multiples of rows and columns."""
    n, d = images.shape
    out = torch.zeros(triton.cdiv(n, rows) * rows, triton.cdiv(d, columns) * columns, dtype=torch.int8,
                      device=images.device)
    out[:n, :d] = centred(images)
    return out
