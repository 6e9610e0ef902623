"""The closed-form optimum of denoising score matching (paper, eq. 3).

For a training set y_1..y_N the loss is least at D*(x; sigma) = sum_i w_i y_i with
w = softmax(-|x - y_i|^2 / (2 sigma^2)): it can only replay its training images.

The weights amplify rounding by 1 / sigma^2: float32 distances, the published way, are wrong by up to 8e-3
on near-duplicates at sigma = 0.002. The plain form here is float64. On a CPU with VNNI int8 products, which
are exact, find the few images that carry weight for it, or where those are many, stand in for it altogether.
"""
import math

import torch

from kernels.nearest_cpu import centred, int8_products_are_exact, squared_norms

BLOCK_BYTES = 256 * 2**20
ROWS, COLUMNS = 256, 2048         # queries and images of a block, at most: their products share a cache
DROPPED_WEIGHT = 1e-8             # of all images left out of a mean together
FEW = 8                           # images that may carry weight: float64 takes them, and not all images
MAX_TERMS = 2**31 // 128**2 - 1   # products of int8 values whose sum an int32 holds
LARGEST = {2: 0x7F7E, 3: 0x7F7F7E, 4: 0x7F7F7F7E}  # whole number in so many digits of -128 to 127, one to spare
# Standard deviations of an output's error, at most, from rounding x and the weights: 1e-5 is 4.4 of both together,
# for the worst of images, posteriors that are half all-white and half all-black. See `base256`.
X_ERROR, WEIGHT_ERROR = 2e-6, 1e-6


class Optimum:
    """D*(x; sigma) of images uint8 [N, C, H, W]; called as D(x, sigma, labels) like `unet.Denoiser`.

    Within 1e-5 of `optimum_reference`. `block_bytes` bounds the memory beyond the images, a second copy of them
    on a CPU, and x and the result themselves.
    """
    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, images, block_bytes=BLOCK_BYTES):
        self.config = dict(img_resolution=images.shape[-1], img_channels=images.shape[1], label_dim=0)
        self.images = images.flatten(1)
        N, D = self.images.shape
        # bytes of a row: logits, weights, their digits; x, its digits, products. Of an image: float64 and whole numbers
        self.rows = max(1, min(ROWS, block_bytes // 2 // (24 * N + 64 * D)))
        self.columns = max(1, min(COLUMNS, block_bytes // 2 // (20 * D)))
        self.int8 = images.device.type == "cpu" and D <= MAX_TERMS and int8_products_are_exact(D)
        if self.int8:
            self.y = centred(self.images)  # pixels - 128: y in [-1, 1] is (pixel - 128 + 1/2) / 127.5
            self.half_norms = torch.empty(N, dtype=torch.float64)  # 127.5 |y|^2 / 2 up to a constant
            for block, norms in zip(self.y.split(self.columns), self.half_norms.split(self.columns)):
                norms.copy_(squared_norms(block) + block.sum(1)).div_(255)
            self.dither = torch.rand(max(N, D), dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def __call__(self, x, sigma, labels=None):
        """The posterior mean of the training set, float64 [B, C, H, W], given x [B, C, H, W] at noise sigma."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1).expand(len(x), 1)
        means = [self._mean(part.to(torch.float64).flatten(1), s)
                 for part, s in zip(x.split(self.rows), sigma.split(self.rows))]
        return torch.cat(means).reshape(x.shape)

    def _mean(self, x, sigma):
        """`optimum_reference` of x float64 [b, D], sigma [b, 1]. What a row takes depends on that row alone."""
        largest = x.abs().amax(1, keepdim=True).clamp_min(1)
        if not self.int8 or not largest.isfinite().all():
            return optimum_reference(x, self.images, sigma, self.columns)
        # An error of x moves D* by Cov(y | x) / sigma^2 times it, and no row of Cov is longer than sqrt(D).
        finest = largest / sigma**2 * (x.shape[1]**0.5 / 2 / X_ERROR)
        needed = torch.where(finest <= LARGEST[3], 3, torch.where(finest <= LARGEST[4], 4, 2))[:, 0]
        mean = torch.empty_like(x)
        for digits in needed.unique().tolist():  # 2 are enough to find candidates, at any sigma
            rows = needed == digits
            mean[rows] = self._digits_mean(x[rows], sigma[rows], largest[rows], digits)
        return mean

    def _digits_mean(self, x, sigma, largest, digits):
        """`_mean` by x in base-256 digits. Constants of a row are left out of its logits."""
        N, D = self.y.shape
        step = largest / LARGEST[digits]
        unit = step * 256.0**(digits - 1)  # of the first digit, and of the logits, times 127.5 sigma^2
        x_digits = base256(x / step, self.dither[:D], digits)
        logits = self.half_norms / -unit
        self._add_products(logits, x_digits[:2])

        # Two digits leave an error of unit / 256 a pixel: two logits are off by this much, and may differ by the log.
        margin = 127.5 * (2 * D / 256 + sigma**2 / unit * math.log(N / DROPPED_WEIGHT))
        best = logits.amax(1, keepdim=True)
        kept = logits >= best - margin
        few = (kept.sum(1) <= FEW) | (digits == 2)
        mean = torch.empty_like(x)
        mean[few] = optimum_reference(x[few], self.images, sigma[few], self.columns, kept[few])
        if few.all():
            return mean

        many = ~few
        logits, best, scale = logits[many], best[many], (unit / (127.5 * sigma**2))[many]
        self._add_products(logits, [digit[many] for digit in x_digits[2:]], first=2)
        # float32 from here: with the largest logit near 0 it costs the weights a share of about 1e-7
        weights = logits.sub_(best).mul_(scale).float().softmax(1)
        mean[many] = self._weighted(weights).add_(0.5).div_(127.5)
        return mean

    def _weighted(self, weights):
        """weights [b, N], used up, @ (pixels - 128), float64 [b, D]: a row's largest as it is, the rest by digits."""
        N, row = len(self.y), torch.arange(len(weights))
        top = torch.from_numpy(weights.numpy().argmax(1))  # many times faster than torch's max with index
        out = self.y[top] * weights[row, top].double()[:, None]
        weights[row, top] = 0
        step = 2 * WEIGHT_ERROR / N**0.5
        largest = weights.amax(1) / step + 1
        digits = base256(weights.div_(step), self.dither[:N].float(), 4)
        rows = [(largest > 127 * 256.0**(2 - j)).nonzero()[:, 0] for j in range(4)]  # in others the digit is 0
        digits = torch.cat([digit[r] for digit, r in zip(digits, rows)])
        # Exact like x's: it is the CPU, not the number of terms, that decides whether products saturate.
        for n in range(0, N, MAX_TERMS):
            products = torch._int_mm(digits[:, n:n + MAX_TERMS], self.y[n:n + MAX_TERMS]).split([len(r) for r in rows])
            for j, (r, product) in enumerate(zip(rows, products)):
                out.index_add_(0, r, product.double(), alpha=step * 256.0**(3 - j))
        return out

    def _add_products(self, logits, digits, first=0):
        """logits [b, N] += sum_j 256^-(first + j) digits[j] @ (pixels - 128).T, of int8 digits [m, b, D]."""
        for n in range(0, len(self.y), self.columns):
            block = logits[:, n:n + self.columns]
            products = torch._int_mm(torch.cat(digits), self.y[n:n + self.columns].T).view(len(digits), *block.shape)
            for j, product in enumerate(products, first):
                block.add_(product, alpha=256.0**-j)


def optimum_reference(x, images, sigma, columns=COLUMNS, kept=None):
    """D* float64 [b, D] of x [b, D], sigma [b, 1], both float64, and images uint8 [N, D].

    `kept`, bool [b, N], names the images that carry weight in each row; None means all.
    """
    used = torch.arange(len(images), device=images.device) if kept is None else kept.any(0).nonzero()[:, 0]
    logits = torch.empty(len(x), len(used), dtype=torch.float64, device=x.device)
    for index, block in zip(used.split(columns), logits.split(columns, dim=1)):
        y = pixels(images[index])
        torch.sub(x @ y.T, y.square_().sum(1) / 2, out=block)  # |x|^2 is the same for all: softmax does not see it
    if kept is not None:
        logits.masked_fill_(~kept[:, used], -math.inf)
    weights = logits.div_(sigma**2).softmax(1)
    mean = torch.zeros_like(x)
    for index, block in zip(used.split(columns), weights.split(columns, dim=1)):
        mean.addmm_(block, pixels(images[index]))
    return mean


def pixels(images):
    """uint8 as float64 in [-1, 1]."""
    return images.to(torch.float64).div_(127.5).sub_(1)


def base256(a, dither, digits):
    """The last base-256 digits of a float [b, K], which is used up: a list of int8 [b, K], the most significant first.

    They hold values up to LARGEST, rounded at a random threshold for each column, the same for all rows. So errors
    of columns are independent and average to zero whatever the values are: of K of them, at most sqrt(K) / 2.
    """
    whole = a.add_(dither).floor_().to(torch.int32)
    whole.add_(0x808080).bitwise_xor_(0x808080)  # bytes, as int8, are now digits from -128 to 127
    last_first = whole.view(torch.int8).view(*a.shape, 4)  # little-endian
    return [last_first[..., i] for i in reversed(range(digits))]
