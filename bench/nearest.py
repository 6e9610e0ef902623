"""Nearest two of 10,000 queries among 50,000 images of 32x32x3, beside the paper's scorer and libraries.

    python bench/nearest.py [--data ../cifar10.zip] [--repeats 5]     an hour on 2 cores, a minute on a GPU

Every method runs in processes of its own. On a CPU each timing has one, and the methods take turns, so that
a slow minute of the machine meets all of them; on a GPU one process takes all timings, by events. Times
include what a method does to its inputs (conversion, norms, an index), except for `prepared`: our references
as emm.py prepares them, once for a training set. The inputs of all methods are the uint8 images. Memory is
the peak of resident memory (of torch's on the GPU) during the call, less what was in use before it. `wrong`
counts the verdicts, of 256, that a method gets wrong where the squared distances of the two nearest are a
and 9 a - 1, 9 a or 9 a + 1.
"""
import importlib.util
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from bench import machine
from disk import provenance
from kernels import References, nearest_two
from kernels.nearest import is_memorized
from kernels.nearest_cpu import centred, squared_norms
from run import option, stage

ROWS = 512  # queries at a time for the scorers that hold a row of distances a query


@dataclass(frozen=True)
class Options:
    data: str = option("cifar10", "real images; flips and shifts of them make up the number asked for")
    queries: int = option(10_000, "queries")
    references: int = option(50_000, "references")
    sizes: tuple[int, ...] = option(
        (1000, 2000, 5000, 10_000, 20_000, 50_000), "numbers of references to time the first method with")
    repeats: int = option(5, "timings of each; the median is reported")
    methods: tuple[str, ...] = option((), "methods to time; by default all that are installed for the device")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: tuple[int, ...] = option((1, 2), "threads of a CPU to time them with")
    worker: str = option("", "time this one method in this process; the script starts itself with it")


# A method takes uint8 images [Q, D], [N, D] and returns squared distances and indices, both [Q, 2].

def ours(x, y):
    return nearest_two(x, y)


def cdist(x, y):
    """The paper's scorer: float32 distances by matrix products, and topk."""
    y = y.float()
    parts = [torch.cdist(part.float(), y).topk(2, largest=False) for part in x.split(ROWS)]
    distances, index = map(torch.cat, zip(*parts))
    return distances.square(), index


def int_mm(x, y):
    """int8 products by torch._int_mm, whole scores, and topk."""
    x, y = centred(x), centred(y)
    norms = squared_norms(y)
    parts = [(norms - 2 * torch._int_mm(part, y.T)).topk(2, largest=False) for part in x.split(ROWS)]
    score, index = map(torch.cat, zip(*parts))
    return score + squared_norms(x)[:, None], index


def numkong(x, y):
    """uint8 products, float32 distances, and numpy's partition, a thread for each of torch's."""
    import numkong
    packed = numkong.dots_pack(y.numpy())

    def part(rows):
        distances = np.asarray(numkong.euclideans_packed(rows.numpy(), packed))
        index = distances.argpartition(1)[:, :2]
        return np.take_along_axis(distances, index, 1) ** 2, index
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return map(np.concatenate, zip(*pool.map(part, x.split(ROWS))))


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
    neighbours = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(y.float().numpy())
    distances, index = neighbours.kneighbors(x.float().numpy())
    return distances ** 2, index


def cuvs(x, y):
    """RAPIDS cuVS, brute force on the GPU: float32."""
    from cuvs.neighbors import brute_force
    found = brute_force.search(brute_force.build(y.float(), metric="sqeuclidean"), x.float(), 2)
    return [torch.as_tensor(values, device=x.device) for values in found]


# function, kind of device, and module that it needs
METHODS = {"ours": (ours, "cpu cuda", "torch"), "prepared": (ours, "cpu cuda", "torch"),
           "cdist": (cdist, "cpu cuda", "torch"), "int-mm": (int_mm, "cpu cuda", "torch"),
           "numkong": (numkong, "cpu", "numkong"), "faiss-flat": (faiss_flat, "cpu", "faiss"),
           "sklearn": (sklearn, "cpu", "sklearn"), "faiss-sq8": (faiss_sq8, "cpu", "faiss"),
           "cuvs": (cuvs, "cuda", "cuvs")}


def serving(kind):
    """Names of the methods that are installed and run on a kind of device."""
    return [name for name, (_, kinds, module) in METHODS.items()
            if kind in kinds and importlib.util.find_spec(module)]


def images(source, queries, references):
    """uint8 [Q, D] and [N, D]: the source's last fifth as queries, the others as references.

    Flips and shifts make up the numbers asked for.
    """
    real = data.load(data.Options(data=source)).images
    held_out = len(real) // 5

    def cycled(part, count):
        turns = -(-count // len(part))
        moved = [torch.roll(part.flip(3) if turn % 2 else part, turn // 2, 3) for turn in range(turns)]
        return torch.cat(moved)[:count].flatten(1).contiguous()
    return cycled(real[-held_out:], queries), cycled(real[:-held_out], references)


def near_ties(real):
    """Queries and references, of uint8 images [N, D], whose verdicts hang on one unit of a squared distance.

    A query lies a from one reference and 9 a - 1, 9 a or 9 a + 1 from another: pixels changed by one level.
    The other references are real images.
    """
    x, (N, D) = real[:256], real.shape
    near, far = x.clone(), x.clone()
    generator = torch.Generator().manual_seed(0)
    for i in range(len(x)):
        a = 1 + i % (D // 9 - 1)
        near[i, torch.randperm(D, generator=generator)[:a]] ^= 1
        far[i, torch.randperm(D, generator=generator)[:9 * a + i % 3 - 1]] ^= 1
    return x, torch.cat([real[256:256 + (N - 256) // 8 * 8], near, far])


def wrong(method, real, device):
    """How many verdicts of `near_ties` a method gets wrong."""
    x, y = (images.to(device) for images in near_ties(real))
    found, exact = (torch.as_tensor(distances).double().cpu()
                    for distances in (list(method(x, y))[0], nearest_two(x, y)[0]))
    return int((is_memorized(found) != is_memorized(exact)).sum())


def status(field):
    """Kilobytes of resident memory: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def launches(call):
    """How many kernels, copies and fills a call launches on the GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    call()  # compiled
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in seen.events())


def timed_on_cpu(call):
    """Seconds and extra megabytes of a call."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    start = time.perf_counter()
    call()
    return time.perf_counter() - start, (status("VmHWM") - before) / 1024


def timed_on_cuda(call):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, (torch.cuda.max_memory_allocated() - before) / 2**20


def work(options):
    """Time one method, as a line of JSON."""
    device = data.pick_device(options.device, options.threads[0])
    x, y = (part.to(device) for part in images(options.data, options.queries, options.references))
    method, *_ = METHODS[options.worker]
    method(x[:64], y[:2000])  # libraries loaded and warm
    result = dict(wrong=wrong(method, y[:4096].cpu(), device))
    prepared = References(y) if options.worker == "prepared" else y
    if device.type == "cpu":
        result |= dict(calls=[timed_on_cpu(lambda: method(x, prepared))], launches=None)
    else:
        method(x, prepared)  # compiled for this shape, memory there
        result |= dict(calls=[timed_on_cuda(lambda: method(x, prepared)) for _ in range(options.repeats)],
                       launches=launches(lambda: method(x, prepared)))
    print(json.dumps(result))


def started(method, threads, options, references):
    """The result of `work` in a process of its own."""
    command = [sys.executable, __file__, "--worker", method, "--threads", str(threads),
               "--data", options.data, "--queries", str(options.queries), "--references", str(references),
               "--device", options.device, "--repeats", str(options.repeats)]
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    pinned = os.environ | dict.fromkeys(variables, str(threads))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=pinned)
    return json.loads(done.stdout.splitlines()[-1])


def bench(options):
    kind = data.pick_device(options.device).type
    methods, rows, scaling, base = options.methods or serving(kind), [], [], None
    print(f"{options.queries:,} queries, {options.references:,} references of {options.data}; "
          f"{machine.name()}\n")
    print("method       threads         ms (range)              times ours   extra MB   wrong   launches")
    for threads in options.threads if kind == "cpu" else options.threads[:1]:
        seen = {method: [] for method in methods}
        for _ in range(options.repeats if kind == "cpu" else 1):
            for method in methods:
                seen[method].append(started(method, threads, options, options.references))
        for method, found in seen.items():
            seconds, megabytes = zip(*(call for one in found for call in one["calls"]))
            row = dict(method=method, threads=threads, seconds=sorted(seconds), megabytes=max(megabytes),
                       wrong=found[0]["wrong"], launches=found[0]["launches"])
            rows.append(row)
            if method == methods[0]:
                base = median(seconds)
            times = f"{1e3 * median(seconds):.4g} ({1e3 * min(seconds):.4g} to {1e3 * max(seconds):.4g})"
            print(f"{method:<12} {threads:>7}   {times:<32} {median(seconds) / base:>8.2f} "
                  f"{row['megabytes']:>10.0f} {row['wrong']:>7}   {row['launches'] or '':>8}", flush=True)
        for n in options.sizes:
            calls = [call for _ in range(min(3, options.repeats) if kind == "cpu" else 1)
                     for call in started(methods[0], threads, options, n)["calls"]]
            seconds = median(call[0] for call in calls)
            scaling.append(dict(references=n, threads=threads, seconds=seconds))
            print(f"{methods[0]} at {n:>6,} references, {threads} threads: {1e3 * seconds:.4g} ms, "
                  f"{seconds / n / options.queries * 1e9:.3g} ns a pair", flush=True)
    record = dict(provenance(), machine=machine.name(), device=kind, queries=options.queries,
                  references=options.references, methods=rows, scaling=scaling)
    print(f"\n{machine.save('nearest', record)}")


def main():
    stage(lambda options: work(options) if options.worker else bench(options), Options, __doc__)


if __name__ == "__main__":
    main()
