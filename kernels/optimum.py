"""The closed-form optimum of denoising score matching (paper, eq. 3).

For a training set y_1..y_N the loss is least at D*(x; sigma) = sum_i w_i y_i with
w = softmax(-|x - y_i|^2 / (2 sigma^2)): it can only replay its training images. Given a label, the sum is
over the images of that label.

The weights amplify rounding by 1 / sigma^2: float32 distances, the published way, are wrong by up to 8e-3
on near-duplicates at sigma = 0.002. The plain form here is float64. On a CPU with VNNI int8 products, which
are exact, find the few images that carry weight for it, or where those are many, stand in for it altogether.
"""
import math

import torch

from kernels.nearest_cpu import centred, int8_products_are_exact

# By device: queries and images of a block, at most, and bytes beyond the images. On a CPU the products of a
# block share a cache. On an H200, 256 queries and 50,000 images took 4.1 ms with these, 9.0 with a CPU's.
BLOCKS = dict(cpu=(256, 2048, 2**28), cuda=(1024, 8192, 2**32))
DROPPED_WEIGHT = 1e-8             # of all images left out of a mean together
FEW = 8                           # images that may carry weight: float64 takes them, and not all images
MAX_TERMS = 2**31 // 128**2 - 1   # products of int8 values whose sum an int32 holds
LARGEST = {2: 0x7F7E, 3: 0x7F7F7E, 4: 0x7F7F7F7E}  # number in so many digits of -128 to 127, one to spare
# Standard deviations of an output's error, at most, from rounding x and the weights: 1e-5 is 4.4 of both
# together, for the worst of images, posteriors that are half all-white and half all-black. See `base256`.
X_ERROR, WEIGHT_ERROR = 2e-6, 1e-6


class Optimum:
    """D*(x; sigma, labels) of images uint8 [N, C, H, W] and labels int64 [N], called like a `Denoiser`.

    Within 1e-5 of `optimum_reference`. `block_bytes` bounds the memory beyond the images, a second copy of
    them on a CPU, and x and the result themselves.
    """
    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, images, labels=None, block_bytes=None):
        self.config = dict(img_resolution=images.shape[-1], img_channels=images.shape[1],
                           label_dim=int(labels.max()) + 1 if labels is not None else 0)
        self.images, self.labels = images.flatten(1), labels
        N, D = self.images.shape
        rows, columns, most = BLOCKS[images.device.type]
        half = (block_bytes or most) // 2
        # bytes of a row: logits, weights, their digits; x, its digits, products. Of an image: float64, int8
        self.rows = max(1, min(rows, half // (24 * N + 64 * D)))
        self.columns = max(1, min(columns, half // (20 * D)))
        # 127.5 |y|^2 / 2 up to a constant, where y in [-1, 1] is (pixel - 127.5) / 127.5
        self.half_norms = torch.empty(N, dtype=torch.float64, device=images.device)
        for block, norms in zip(self.images.split(self.columns), self.half_norms.split(self.columns)):
            pixel = block.to(torch.float64)
            norms.copy_(pixel.mul_(pixel - 255).sum(1).div_(255))
        self.int8 = images.device.type == "cpu" and D <= MAX_TERMS and int8_products_are_exact(D)
        if self.int8:
            self.y = centred(self.images)  # pixels - 128
            generator = torch.Generator().manual_seed(0)
            self.dither = torch.rand(max(N, D), dtype=torch.float64, generator=generator)

    @torch.no_grad()
    def __call__(self, x, sigma, labels=None):
        """The posterior mean of the training set, float64 [B, C, H, W], given x [B, C, H, W] at noise sigma.

        labels int64 [B]: of the images of that label alone. None: of all.
        Raises ValueError for a label that no image has.
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1).expand(len(x), 1)
        if labels is not None and self.labels is None:
            raise ValueError("labels were given, but the images of this optimum have none; leave them out")
        if labels is not None and len(missing := labels[~torch.isin(labels, self.labels)]):
            raise ValueError(f"label {int(missing[0])}: no training image has it, so there is no optimum; "
                             "give the label of an image")
        means = []
        for i in range(0, len(x), self.rows):
            part = slice(i, i + self.rows)
            kept = None if labels is None else labels[part, None] == self.labels
            means.append(self._mean(x[part].to(torch.float64).flatten(1), sigma[part], kept))
        return torch.cat(means).reshape(x.shape)

    def _mean(self, x, sigma, kept):
        """The mean given x float64 [b, D] at sigma [b, 1]; what a row takes depends on that row alone.

        kept bool [b, N] names the images that carry weight; None means all.
        """
        largest = x.abs().amax(1, keepdim=True).clamp_min(1)
        if not self.int8 or not largest.isfinite().all():
            return self._float64_mean(x, sigma, kept)
        # An error of x moves D* by Cov(y | x) / sigma^2 times it, and no row of Cov is longer than sqrt(D).
        finest = largest / sigma**2 * (x.shape[1]**0.5 / 2 / X_ERROR)
        needed = torch.where(finest <= LARGEST[3], 3, torch.where(finest <= LARGEST[4], 4, 2))[:, 0]
        mean = torch.empty_like(x)
        for digits in needed.unique().tolist():  # 2 are enough to find candidates, at any sigma
            rows = needed == digits
            mean[rows] = self._digits_mean(x[rows], sigma[rows], largest[rows], digits,
                                           None if kept is None else kept[rows])
        return mean

    def _float64_mean(self, x, sigma, kept):
        """`_mean` by float64 products."""
        used = None if kept is None else kept.any(0).nonzero()[:, 0]
        count = len(self.images if kept is None else used)
        parts = [slice(n, n + self.columns) for n in range(0, count, self.columns)]
        images = parts if kept is None else [used[part] for part in parts]
        logits = x.new_empty(len(x), count)
        for i, part in zip(images, parts):
            y = self.images[i].to(torch.float64)
            torch.addmm(self.half_norms[i], x, y.T, beta=-1, out=logits[:, part])
        if kept is not None:
            logits.masked_fill_(~kept[:, used], -math.inf)
        weights = logits.div_(127.5 * sigma**2).softmax(1)  # the rest of -|x - y|^2 / 2 is the same for all y
        mean = torch.zeros_like(x)
        for i, part in zip(images, parts):
            mean.addmm_(weights[:, part], self.images[i].to(torch.float64))
        return mean.div_(127.5).sub_(1)

    def _digits_mean(self, x, sigma, largest, digits, kept):
        """`_mean` by x in base-256 digits. Constants of a row are left out of its logits."""
        N, D = self.y.shape
        step = largest / LARGEST[digits]
        unit = step * 256.0**(digits - 1)  # of the first digit, and of the logits, times 127.5 sigma^2
        x_digits = base256(x / step, self.dither[:D], digits)
        logits = self.half_norms / -unit
        self._add_products(logits, x_digits[:2])
        if kept is not None:
            logits.masked_fill_(~kept, -math.inf)

        # Two digits leave an error of unit / 256 a pixel: logits are off by this, and may differ by the log.
        margin = 127.5 * (2 * D / 256 + sigma**2 / unit * math.log(N / DROPPED_WEIGHT))
        best = logits.amax(1, keepdim=True)
        kept = logits >= best - margin
        few = (kept.sum(1) <= FEW) | (digits == 2)
        mean = torch.empty_like(x)
        mean[few] = self._float64_mean(x[few], sigma[few], kept[few])
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
        """weights [b, N], used up, @ (pixels - 128), float64 [b, D].

        The largest weight of a row is taken as it is, the rest by their digits.
        """
        N, row = len(self.y), torch.arange(len(weights))
        top = torch.from_numpy(weights.numpy().argmax(1))  # many times faster than torch's max with index
        out = self.y[top] * weights[row, top].double()[:, None]
        weights[row, top] = 0
        step = 2 * WEIGHT_ERROR / N**0.5
        largest = weights.amax(1) / step + 1
        digits = base256(weights.div_(step), self.dither[:N].float(), 4)
        # in rows that are left out the digit is 0
        rows = [(largest > 127 * 256.0**(2 - j)).nonzero()[:, 0] for j in range(4)]
        digits = torch.cat([digit[r] for digit, r in zip(digits, rows)])
        # Exact like x's: it is the CPU, not the number of terms, that decides whether products saturate.
        for n in range(0, N, MAX_TERMS):
            products = torch._int_mm(digits[:, n:n + MAX_TERMS], self.y[n:n + MAX_TERMS])
            products = products.split([len(r) for r in rows])
            for j, (r, product) in enumerate(zip(rows, products)):
                out.index_add_(0, r, product.double(), alpha=step * 256.0**(3 - j))
        return out

    def _add_products(self, logits, digits, first=0):
        """logits [b, N] += sum_j 256^-(first + j) digits[j] @ (pixels - 128).T, of int8 digits [m, b, D]."""
        for n in range(0, len(self.y), self.columns):
            block = logits[:, n:n + self.columns]
            products = torch._int_mm(torch.cat(digits), self.y[n:n + self.columns].T)
            products = products.view(len(digits), *block.shape)
            for j, product in enumerate(products, first):
                block.add_(product, alpha=256.0**-j)


def optimum_reference(x, images, sigma):
    """`Optimum` in its plain form: float64 [b, D] of x [b, D] and sigma [b, 1], float64, and uint8 [N, D]."""
    y = images.to(torch.float64) / 127.5 - 1
    logits = (x @ y.T - y.square().sum(1) / 2) / sigma**2  # softmax does not see |x|^2, the same for all
    return logits.softmax(1) @ y


def base256(a, dither, digits):
    """The last base-256 digits of a float [b, K], used up: a list of int8 [b, K], most significant first.

    They hold values up to LARGEST, rounded at a random threshold for each column, the same for all rows. So
    errors of columns are independent and average to zero whatever the values are: of K of them, at most
    sqrt(K) / 2.
    """
    whole = a.add_(dither).floor_().to(torch.int32)
    whole.add_(0x808080).bitwise_xor_(0x808080)  # bytes, as int8, are now digits from -128 to 127
    last_first = whole.view(torch.int8).view(*a.shape, 4)  # little-endian
    return [last_first[..., i] for i in reversed(range(digits))]
