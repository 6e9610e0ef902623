"""The closed-form optimum of denoising score matching (paper, eq. 3).

For a training set y_1..y_N the loss is least at D*(x; sigma) = sum_i w_i y_i with
w = softmax(-|x - y_i|^2 / (2 sigma^2)): it can only replay its training images. Given a label, the sum is
over the images of that label.

The weights amplify rounding by 1 / sigma^2: float32 distances, the published way, are wrong by up to 8e-3
on near-duplicates at sigma = 0.002. All that is returned is float64 here. On a CPU with VNNI, int8 products
find the few images that carry weight at low noise, so that not all need to be multiplied.
"""
import math

import torch

from kernels.nearest import MAX_INT8_PIXELS
from kernels.nearest_cpu import centred, int8_products_are_exact

# By device: queries and images of a block, at most, and bytes beyond the images. On a CPU the products of a
# block share a cache. On an H200, 256 queries and 50,000 images took 4.1 ms with these, 9.0 with a CPU's.
BLOCKS = dict(cpu=(256, 2048, 2**28), cuda=(1024, 8192, 2**32))
DROPPED_WEIGHT = 1e-8  # of all images left out of a mean together
FEW = 8                # images that may carry weight: float64 takes them, and not all images
LARGEST = 0x7F7F       # number in two base-256 digits of -128 to 127


class Optimum:
    """D*(x; sigma, labels) of images uint8 [N, C, H, W] and labels int64 [N], called like `unet.Denoiser`.

    Within 1e-7 of `optimum_reference`. `block_bytes` bounds the memory beyond the images, a second copy of
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
        # bytes of a row: scores, products, weights; x and its digits. Of an image: float64, int8
        self.rows = max(1, min(rows, half // (24 * N + 64 * D)))
        self.columns = max(1, min(columns, half // (20 * D)))
        # 127.5 |y|^2 / 2 up to a constant, where y in [-1, 1] is (pixel - 127.5) / 127.5
        self.half_norms = torch.empty(N, dtype=torch.float64, device=images.device)
        for block, norms in zip(self.images.split(self.columns), self.half_norms.split(self.columns)):
            pixel = block.to(torch.float64)
            norms.copy_(pixel.mul_(pixel - 255).sum(1).div_(255))
        self.int8 = images.device.type == "cpu" and D <= MAX_INT8_PIXELS and int8_products_are_exact(D)
        self.y = centred(self.images) if self.int8 else None  # pixels - 128

    @torch.no_grad()
    def __call__(self, x, sigma, labels=None):
        """The posterior mean of the training set, float64 [B, C, H, W], given x [B, C, H, W] at noise sigma.

        labels int64 [B]: of the images of that label alone. None: of all.
        Raises ValueError for a label that no image has.
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1).expand(len(x), 1)
        if labels is not None:
            self._check(labels)
        means = []
        for i in range(0, len(x), self.rows):
            part = slice(i, i + self.rows)
            kept = None if labels is None else labels[part, None] == self.labels
            means.append(self._mean(x[part].to(torch.float64).flatten(1), sigma[part], kept))
        return torch.cat(means).reshape(x.shape)

    def _check(self, labels):
        if self.labels is None:
            raise ValueError("labels were given, but the images of this optimum have none; leave them out")
        missing = labels[~torch.isin(labels, self.labels)]
        if len(missing):
            raise ValueError(f"label {int(missing[0])}: no training image has it, so there is no optimum; "
                             "give the label of an image")

    def _mean(self, x, sigma, kept):
        """The mean given x float64 [b, D] at sigma [b, 1]; what a row takes depends on that row alone.

        kept bool [b, N] names the images that carry weight; None means all.
        """
        if not self.int8 or not x.isfinite().all():
            return self._float64_mean(x, sigma, kept)
        found = self._candidates(x, sigma, kept)
        few, mean = found.sum(1) <= FEW, torch.empty_like(x)
        for rows, of in ((few, found), (~few, kept)):
            if rows.any():
                mean[rows] = self._float64_mean(x[rows], sigma[rows], None if of is None else of[rows])
        return mean

    def _candidates(self, x, sigma, kept):
        """bool [b, N]: the images that may carry weight, by int8 products of x rounded to two digits."""
        step = x.abs().amax(1, keepdim=True).clamp_min(1) / LARGEST
        whole = (x / step).round_().to(torch.int32)
        first = (whole + 128) >> 8
        digits = torch.cat([first, whole - 256 * first]).to(torch.int8)
        scores = self.half_norms / -step  # in units of step, up to a constant of the row
        for n in range(0, len(self.y), self.columns):
            first, second = torch._int_mm(digits, self.y[n:n + self.columns].T).view(2, len(x), -1)
            scores[:, n:n + self.columns].add_(first, alpha=256).add_(second)
        if kept is not None:
            scores.masked_fill_(~kept, -math.inf)
        # x is off by half a step a pixel, so differences of scores by 127.5; weights differ by the log
        margin = 127.5 * (x.shape[1] + sigma**2 / step * math.log(len(self.y) / DROPPED_WEIGHT))
        return scores >= scores.amax(1, keepdim=True) - margin

    def _float64_mean(self, x, sigma, kept):
        """`_mean` by float64 products of the images that any row keeps."""
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


def optimum_reference(x, images, sigma):
    """`Optimum` in its plain form: float64 [b, D] of x [b, D] and sigma [b, 1], float64, and uint8 [N, D]."""
    y = images.to(torch.float64) / 127.5 - 1
    logits = (x @ y.T - y.square().sum(1) / 2) / sigma**2  # softmax does not see |x|^2, the same for all
    return logits.softmax(1) @ y
