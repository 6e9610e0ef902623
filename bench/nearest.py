"""Nearest two of 10,000 queries among 50,000 images of 32x32x3, beside the paper's scorer, faiss and scikit-learn.

    python bench/nearest.py [--data ../cifar10.zip] [--repeats 5]     about 45 minutes on 2 cores; needs faiss-cpu

Every timing runs in a process of its own, the methods in turn, so that a slow minute of the machine meets all of
them. Times include what a method does to its inputs (conversion, norms, an index). Memory is the peak of resident
memory during the call, less what was resident before it; for all methods the inputs are the uint8 images.
"""
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from bench import machine  # noqa: E402
from kernels.nearest import nearest_two  # noqa: E402
from run import option, provenance, stage  # noqa: E402

ROWS = 512  # queries at a time for the scorers that hold a row of distances a query


@dataclass(frozen=True)
class Options:
    data: str = option("cifar10", "real images; cycled through flips and shifts up to as many as are asked for")
    queries: int = option(10_000, "queries")
    references: int = option(50_000, "references")
    sizes: tuple[int, ...] = option((1000, 2000, 5000, 10_000, 20_000, 50_000), "numbers of references to time ours at")
    repeats: int = option(5, "timings of each; the median is reported")
    methods: tuple[str, ...] = option(("ours", "cdist", "faiss-flat", "sklearn", "faiss-sq8"), "methods to time")
    threads: tuple[int, ...] = option((1, 2), "threads to time them with")
    worker: str = option("", "time this one method once, in this process: what the script starts itself with")


def ours(x, y):
    return nearest_two(x, y)


def cdist(x, y):
    """The paper's scorer: float32 distances by matrix products, and topk."""
    import torch
    y = y.float()
    return [torch.cdist(part.float(), y).topk(2, largest=False) for part in x.split(ROWS)]


def faiss_flat(x, y):
    import faiss
    index = faiss.IndexFlatL2(y.shape[1])
    index.add(y.float().numpy())
    return index.search(x.float().numpy(), 2)


def faiss_sq8(x, y):
    """8 bits a value, which hold the images exactly, but distances in float32."""
    import faiss
    index = faiss.IndexScalarQuantizer(y.shape[1], faiss.ScalarQuantizer.QT_8bit_direct, faiss.METRIC_L2)
    index.add(y.float().numpy())
    return index.search(x.float().numpy(), 2)


def sklearn(x, y):
    from sklearn.neighbors import NearestNeighbors
    return NearestNeighbors(n_neighbors=2, algorithm="brute").fit(y.float().numpy()).kneighbors(x.float().numpy())


def launches(call):
    """How many kernels, copies and fills a call launches on the GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    call()  # compiled
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in seen.events())


METHODS = {"ours": ours, "cdist": cdist, "faiss-flat": faiss_flat, "sklearn": sklearn, "faiss-sq8": faiss_sq8}


def images(source, queries, references):
    """uint8 [Q, D] and [N, D]: the source's last images as queries, the others as references, flipped and shifted
    as often as it takes."""
    import torch
    real = data.load(data.Options(data=source)).images
    held_out = len(real) // 5

    def cycled(part, count):
        turns = -(-count // len(part))
        moved = [torch.roll(part.flip(3) if turn % 2 else part, turn // 2, 3) for turn in range(turns)]
        return torch.cat(moved)[:count].flatten(1).contiguous()
    return cycled(real[-held_out:], queries), cycled(real[:-held_out], references)


def status(field):
    """Kilobytes of resident memory: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def work(options):
    """Seconds and extra megabytes of one call, as a line of JSON."""
    import torch
    torch.set_num_threads(options.threads[0])
    x, y = images(options.data, options.queries, options.references)
    method = METHODS[options.worker]
    method(x[:64], y[:2000])  # libraries loaded and warm
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    start = time.perf_counter()
    method(x, y)
    print(json.dumps([time.perf_counter() - start, (status("VmHWM") - before) / 1024]))


def timed(method, threads, options, references):
    command = [sys.executable, __file__, "--worker", method, "--threads", str(threads), "--data", options.data,
               "--queries", str(options.queries), "--references", str(references)]
    pinned = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=pinned).stdout)


def bench(options):
    methods, rows, scaling = options.methods, [], []
    print(f"{options.queries:,} queries, {options.references:,} references of {options.data}; {machine.name()}\n")
    print("method       threads   seconds (range)         times ours   extra MB")
    for threads in options.threads:
        seen = {method: [] for method in methods}
        for _ in range(options.repeats):
            for method in methods:
                seen[method].append(timed(method, threads, options, options.references))
        base = median(seconds for seconds, _ in seen[methods[0]])
        for method, calls in seen.items():
            seconds = sorted(call[0] for call in calls)
            rows.append(dict(method=method, threads=threads, seconds=seconds, megabytes=max(call[1] for call in calls)))
            print(f"{method:<12} {threads:>7}   {median(seconds):>7.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})"
                  f"   {median(seconds) / base:>10.2f}   {rows[-1]['megabytes']:>8.0f}", flush=True)
    for n in options.sizes:
        seconds = median(timed(methods[0], threads, options, n)[0] for _ in range(min(3, options.repeats)))
        scaling.append(dict(references=n, threads=threads, seconds=seconds))
        print(f"{methods[0]} at {n:>6,} references, {threads} threads: {seconds:.2f} s, "
              f"{seconds / n / options.queries * 1e9:.2f} ns a pair", flush=True)
    record = dict(provenance(), machine=machine.name(), queries=options.queries, references=options.references,
                  methods=rows, scaling=scaling)
    print(f"\n{machine.save('nearest', record)}")


def main():
    stage(lambda options: work(options) if options.worker else bench(options), Options, __doc__)


if __name__ == "__main__":
    main()
