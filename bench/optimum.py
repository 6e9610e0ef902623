"""The closed-form optimum of 10,000 images beside the published way: float32 cdist, softmax and product.

    python bench/optimum.py [--data ../cifar10.zip] [--n 10000]     four minutes on 2 cores, seconds on a GPU

x = y + sigma noise for 256 training images y. Both ways run in turn; the error is the largest difference
from float64, in units of [-1, 1]. The last line evaluates each level of the EDM schedule of 18 Heun steps
once.
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import sample
from bench import machine
from disk import provenance
from kernels.optimum import Optimum, optimum_reference
from run import option, stage


@dataclass(frozen=True)
class Options:
    data: str = option("cifar10", "real images")
    n: int = option(10_000, "training images")
    batch: int = option(256, "noisy images at once")
    sigmas: tuple[float, ...] = option((0.002, 0.01, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 80.0),
                                       "noise levels")
    repeats: int = option(5, "timings of each; the median is reported")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: tuple[int, ...] = option((1, 2), "threads of a CPU")


def published(x, y, sigma):
    """D* of x [B, D] in float32; y float32 [N, D]."""
    return (-torch.cdist(x, y).square() / (2 * sigma**2)).softmax(1) @ y


def clock(function, x, device):
    """Seconds that `function(x)` takes, not counting work that was queued before it, and its result."""
    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
    start = now()
    result = function(x)
    return now() - start, result


def bench(options):
    device = data.pick_device(options.device)
    images = data.load(data.Options(data=options.data, n=options.n)).images.to(device)
    y = images.flatten(1).float() / 127.5 - 1
    D = Optimum(images)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(images), generator=generator)[:options.batch]
    clean = images[chosen.to(device)].double() / 127.5 - 1
    levels = sample.noise_levels(0.002, 80.0)[:-1].tolist()

    def ours_of(batches):
        return [D(x, level) for level, x in batches.items()]

    def published_of(batches):
        return [published(x.flatten(1).float(), y, level) for level, x in batches.items()]
    ways, rows = (ours_of, published_of), []
    print(f"{len(clean)} noisy images, {len(images):,} training images of {y.shape[1]:,} values of "
          f"{options.data}, on {device.type}; {machine.name()}\n")
    print("threads    sigma   ours ms  published ms  published / ours   error: ours  published")
    for threads in options.threads if device.type == "cpu" else options.threads[:1]:
        torch.set_num_threads(threads)
        for sigma in (*options.sigmas, None):
            noise = torch.randn(clean.shape, dtype=torch.float64, generator=generator).to(device)
            batches = {level: clean + level * noise for level in (levels if sigma is None else [sigma])}
            for way in reversed(ways):  # warm
                clock(way, batches, device)
            runs = [[clock(way, batches, device) for way in ways] for _ in range(options.repeats)]
            ours, theirs = (median(pair[way][0] for pair in runs) for way in (0, 1))
            row = dict(threads=threads, sigma=sigma, ours=ours, published=theirs)
            errors = ""
            if sigma is not None:
                exact = optimum_reference(batches[sigma].flatten(1), images.flatten(1), sigma)
                row["errors"] = [float((result[0].flatten(1) - exact).abs().max()) for _, result in runs[0]]
                errors = "{:>10.1e} {:>10.1e}".format(*row["errors"])
            rows.append(row)
            level = "schedule" if sigma is None else sigma
            print(f"{threads:>7} {level:>8} {1e3 * ours:>9.4g} {1e3 * theirs:>13.4g} "
                  f"{theirs / ours:>17.2f}   {errors}", flush=True)
    record = dict(provenance(), machine=machine.name(), device=device.type, images=len(images), rows=rows)
    print(f"\n{machine.save('optimum', record)}")


def main():
    stage(bench, Options, __doc__)


if __name__ == "__main__":
    main()
