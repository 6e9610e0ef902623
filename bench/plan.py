"""What a run costs before it is made: parameters, FLOPs, memory, and hours on one H100 and one A100.

    python bench/plan.py --n 2000 --width 256          what train.py would cost with the same options
    python bench/plan.py --document > docs/cost.md     the paper's networks, in half a minute
    python bench/plan.py --machine "2-core AMD EPYC (Zen 4)" > docs/cost.md
                                                       and the memory checked here, 2 minutes

FLOPs and memory are counted on torch's meta device, where tensors have a shape and no data: nothing is
computed, and a network of any width takes a second. Hours are FLOPs over the peak of a data sheet times an
assumed utilisation, and images over the images a second of bench/results/gpu-CARD.json where
there is one.
"""
import contextlib
import copy
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import run
import train
import unet
from bench.machine import RESULTS
from run import option
from sample import EVALUATIONS

# FLOP/s, without sparsity, from the data sheets of the SXM models; fp32 is that of the CUDA cores
PEAK = dict(H100=dict(fp32=67e12, tf32=494e12, bf16=989e12),
            A100=dict(fp32=19.5e12, tf32=156e12, bf16=312e12))
# Shares of that peak, assumed. fp32 is bound by its convolutions. With tensor cores more of the time goes to
# norms, silu, dropout and sums, which are bound by memory and get no faster: the faster the cores, the
# smaller the share.
UTILISATION = dict(fp32=0.6, tf32=0.3, bf16=0.2)
SAMPLES = 10_000      # a snapshot, as published

FLOAT_BYTES = 4       # weights and activations are float32, with tf32 too; bf16 activations need less
STATE = 5             # copies of the weights: themselves, gradients, two moments of Adam, their average
FRAGMENTATION = 1.33  # reserved over live activations: glibc's gaps made it 0.75 to 1.38, assumed for CUDA's
CONTEXT_BYTES = 1e9   # assumed: CUDA, its libraries and kernels, the training images
GIGABYTE = 1e9        # a card sold as 24 GB holds 24 GiB, 7% more, of which its driver takes some
IMAGES = 2            # counted at once; a batch of one has ambiguous strides, which may leave out copies

BATCH, EPOCHS, SNAPSHOTS = 512, 40_000, 16  # the paper's base run
NETWORKS = [(width, 2) for width in (128, 192, 256, 320)] + [(128, blocks) for blocks in (4, 6, 8, 10, 12)]
SIZES = (1_000, 2_000, 5_000, 50_000)
CARDS = (24, 80)      # GB

CHECKED = (128, 320)      # widths whose memory is measured
CHECK_BATCHES = (1, 4)    # the slope between their peaks is the memory of an image
NO_GAPS = dict(MALLOC_MMAP_THRESHOLD_="65536")  # glibc gives freed memory back at once: resident is live


@dataclass(frozen=True)
class Cost:
    """What a network costs. FLOPs (a multiplication and an addition are two) and bytes are an image's."""
    parameters: int
    evaluation_flops: int  # of the denoiser: forward
    step_flops: int        # of training: forward and backward
    kept_bytes: int        # by the forward pass for the backward pass

    @property
    def state_bytes(self):
        return self.parameters * FLOAT_BYTES * STATE

    def bytes(self, batch_device):
        """Memory of a GPU that trains on that many images at once, margins included."""
        return CONTEXT_BYTES + self.state_bytes + FRAGMENTATION * batch_device * self.kept_bytes


@contextlib.contextmanager
def kept(parameters=()):
    """A list that gets, on leaving, the storages that autograd keeps for a backward pass, not `parameters`.

    Each once, however many operations keep it or views of it.
    """
    own, found, storages = {p.untyped_storage()._cdata for p in parameters}, {}, []

    def note(tensor):
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield storages
    storages += [storage for address, storage in found.items() if address not in own]


def count(D, images):
    """FLOPs forward, FLOPs forward and backward, and bytes kept in between, of training D on so many images.

    On the meta device attention takes its plain form, which keeps the matrix of all pairs of pixels: an upper
    bound on the memory of GPU kernels. (With the kernel of a CPU torch would count no FLOPs for it.)
    """
    meta = {id(p): torch.nn.Parameter(torch.empty_like(p, device="meta")) for p in D.parameters()}
    meta |= {id(b): torch.empty_like(b, device="meta") for b in D.buffers()}
    twin = copy.deepcopy(D, meta).train()  # with those tensors for D's, none of which is copied
    twin.precision = "fp32"  # the FLOPs are the same in each, and autocast knows no meta device
    side, channels = D.config["img_resolution"], D.config["img_channels"]
    y = torch.empty(images, channels, side, side, device="meta")
    labels = torch.zeros(images, dtype=torch.int64, device="meta") if D.config["label_dim"] else None
    with FlopCounterMode(display=False) as counter:
        with kept(twin.parameters()) as storages:
            loss = twin.loss(y, torch.ones(images, device="meta"), torch.empty_like(y), labels).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops(), sum(storage.nbytes() for storage in storages)


def cost(D):
    """The Cost of a Denoiser, on whatever device and in whatever mode it is."""
    some, twice = (count(D, images) for images in (IMAGES, 2 * IMAGES))  # what no image owns cancels out
    return Cost(sum(p.numel() for p in D.parameters()), *((b - a) // IMAGES for a, b in zip(some, twice)))


def largest_batch_device(cost, batch, gigabytes):
    """The largest divisor of the batch that fits a card of that size; 0 if not even one image does."""
    fit = (size for size in range(1, batch + 1)
           if batch % size == 0 and cost.bytes(size) <= gigabytes * GIGABYTE)
    return max(fit, default=0)


def hours(flops, gpu, precision):
    """Expected hours of that many FLOPs on one GPU of `PEAK`: an assumption, not a measurement."""
    return flops / (PEAK[gpu][precision] * UTILISATION[precision]) / 3600


def sampling_flops(cost, snapshots, samples=SAMPLES):
    return snapshots * samples * EVALUATIONS * cost.evaluation_flops


def report(D, n, steps, batch, batch_device, snapshots, samples=SAMPLES):
    """Lines of text: what training D on n images costs, and drawing the samples of every snapshot.

    `batch_device` is as in train.py: images at once, 0 for the batch.
    """
    c, at_once = cost(D), batch_device or batch
    training, sampling = steps * batch * c.step_flops, sampling_flops(c, snapshots, samples)
    lines = [
        f"network   {c.parameters:,} parameters",
        f"training  {n:,} images, {steps:,} steps of {batch}: {c.step_flops / 1e9:.3g} GFLOP an image, "
        f"{training:.3g} FLOP",
        f"sampling  {snapshots} snapshots, {samples:,} samples of each: {c.evaluation_flops / 1e9:.3g} GFLOP "
        f"an evaluation, {EVALUATIONS} a sample, {sampling:.3g} FLOP",
        f"memory    {c.bytes(at_once) / GIGABYTE:.1f} GB with {at_once} images at once: "
        f"{c.kept_bytes / 2**20:.1f} MiB an image, {c.state_bytes / GIGABYTE:.2f} GB of weights, gradients, "
        "Adam and average, and margins",
        *(f"          --batch-device in {gb} GB: {largest_batch_device(c, batch, gb) or 'none'}"
          for gb in CARDS),
        "hours     training + sampling on one GPU at the assumed share of its peak",
        "          " + "".join(f"{f'{kind} at {share:.0%}':>18}" for kind, share in UTILISATION.items())]
    for gpu in PEAK:
        cells = (" + ".join(_hours(flops, gpu, kind) for flops in (training, sampling))
                 for kind in UTILISATION)
        lines.append(f"  {gpu:<8}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def _hours(flops, gpu, precision):
    """Hours in words: two digits, more than the assumption is good for."""
    value = hours(flops, gpu, precision)
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}" if value >= 0.01 else "<0.01"


# ---- docs/cost.md

def paper_network(width, blocks=2):
    return unet.Denoiser("ddpmpp", "vp", 32, 3, width=width, blocks=blocks)


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells):
    return row(*cells) + "\n" + "|---" * len(cells) + "|"


def document(machine):
    """docs/cost.md, block by block; with a check of the memory on this machine if it is named."""
    costs = {network: cost(paper_network(*network)) for network in NETWORKS}
    widest = costs[320, 2]
    size = largest_batch_device(widest, BATCH, 24)
    most = (24 * GIGABYTE - CONTEXT_BYTES - widest.state_bytes) / (size * widest.kept_bytes)
    yield f"""\
# What the paper's runs cost

Printed by `bench/plan.py --document`: change that and not this. **All is estimated, but for hours from a
card's images a second and the check of the memory.**
`python bench/plan.py` with the options of a run prints what that would cost.

CIFAR-10 (32x32x3), DDPM++, VP, batch {BATCH}, {EPOCHS:,} epochs whatever the number of images,
{SNAPSHOTS} snapshots, {SAMPLES:,} samples of each.

- **FLOPs** are counted by torch (`FlopCounterMode`): convolutions, matrix products and attention, forward and
  backward, a multiplication and an addition as two. Norms, silu, dropout, sums and the optimizer are left
  out. A sample takes {EVALUATIONS} evaluations.
- **Hours** are FLOPs over the peak of the data sheet times an **assumed utilisation**, every run trained to
  its end.
  `train.py` computes in float32 (fp32) unless --precision says otherwise. Take a factor of two either
  way: `images_per_second` in the log.jsonl of a run of minutes tells better.
- **Memory** is {CONTEXT_BYTES / GIGABYTE:g} GB for CUDA (assumed), {STATE} float32 copies of the weights
  (themselves, gradients, two moments of Adam, average) and, for each image at once, the activations kept for
  the backward pass times {FRAGMENTATION} for the gaps of an allocator (assumed for CUDA's, and for the
  workspaces of its convolutions). Kept are the distinct storages that autograd saves, parameters aside.
  On a GPU they are less: dropout's mask counts 4 bytes a value and not none, attention its matrix of all
  pairs of pixels, bf16 counts as float32. 1 GB is 10^9 bytes.
- **Width 320 at batch {BATCH} in 24 GB**: `--batch-device {size}`, {widest.bytes(size) / GIGABYTE:.1f} GB by
  this estimate. It fits while the factor {FRAGMENTATION} is in truth at most {most:.2f};
  {size // 2} is the safe choice, with {widest.bytes(size // 2) / GIGABYTE:.1f} GB.
"""
    yield head("", *UTILISATION)
    for gpu, peaks in PEAK.items():
        yield row(f"peak of one {gpu} SXM, TFLOP/s", *(f"{peaks[kind] / 1e12:g}" for kind in UTILISATION))
    yield row("assumed utilisation", *(f"{share:.0%}" for share in UTILISATION.values()))
    yield "\n## Networks and memory\n"
    yield head("width", "blocks", "parameters, M", "GFLOP an evaluation", "GFLOP a training image",
               "MiB kept an image", f"weights x {STATE}, GB", f"all {BATCH} at once, GB",
               *(f"`--batch-device` in {gb} GB" for gb in CARDS))
    for network, c in costs.items():
        yield row(*network, f"{c.parameters / 1e6:.1f}", f"{c.evaluation_flops / 1e9:.1f}",
                  f"{c.step_flops / 1e9:.1f}", f"{c.kept_bytes / 2**20:.1f}",
                  f"{c.state_bytes / GIGABYTE:.2f}", f"{c.bytes(BATCH) / GIGABYTE:.0f}",
                  *(largest_batch_device(c, BATCH, gb) or "none" for gb in CARDS))
    for gpu in PEAK:
        yield f"\n## Hours on one {gpu}: {' / '.join(UTILISATION)}\n"
        yield head("width", "blocks", *(f"{n:,} images" for n in SIZES), "sampling, any size")
        for network, c in costs.items():
            work = [n * EPOCHS * c.step_flops for n in SIZES] + [sampling_flops(c, SNAPSHOTS)]
            yield row(*network, *(" / ".join(_hours(flops, gpu, kind) for kind in UTILISATION)
                                  for flops in work))
    yield from measured_hours()
    if machine:
        yield f"""
## The memory of an image, checked on a CPU

On a {machine}: peak resident memory of a forward and backward
pass, gradients already there, in a process of its own; the slope from {CHECK_BATCHES[0]} to
{CHECK_BATCHES[1]} images. Without gaps: glibc told to give freed memory back at once. With gaps: glibc as it
is (from 0.75 to 1.38 of the estimate in several runs).
"""
        yield head("width", "blocks", "estimated, MiB", "without gaps, MiB", "of the estimate",
                   "with gaps, MiB", "of the estimate")
        for width in CHECKED:
            estimated, cells = costs[width, 2].kept_bytes, []
            for environment in (NO_GAPS, {}):
                low, high = (measured_peak(width, images, environment) for images in CHECK_BATCHES)
                measured = (high - low) / (CHECK_BATCHES[1] - CHECK_BATCHES[0])
                cells += [f"{measured / 2**20:.1f}", f"{measured / estimated:.2f}"]
            yield row(width, 2, f"{estimated / 2**20:.1f}", *cells)


def measured_hours():
    """The hours of training on the cards of bench/results/gpu-CARD.json, from their images a second."""
    for path in sorted(RESULTS.glob("gpu-*.json")):
        record = run.read_json(path)
        rates = {line["name"]: line["images_a_second"] for line in record["lines"]
                 if line["what"] == "step" and line["name"].startswith("32x32") and "images_a_second" in line}
        yield f"\n## Hours of training on one {record['name']}, from its images a second\n"
        if "note" in record:
            yield record["note"] + ".\n"
        yield head("network", "images a second", *(f"{n:,} images" for n in SIZES))
        for name, rate in rates.items():
            yield row(name, f"{rate:,.0f}", *(f"{n * EPOCHS / rate / 3600:,.0f}" for n in SIZES))


def measured_peak(width, images, environment):
    """Peak resident bytes of a fresh process that runs `pass_once`."""
    code = f"from bench import plan; plan.pass_once({width}, {images})"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment,
                          cwd=RESULTS.parent.parent, check=True, capture_output=True, text=True)
    return int(done.stdout)


def pass_once(width, images):
    """One forward and backward pass on the CPU; prints the peak resident bytes of this process (Linux)."""
    D = paper_network(width).train()
    for p in D.parameters():
        p.grad = torch.ones_like(p)  # not zeros, whose pages would only become resident in the backward pass
    y = torch.ones(images, 3, 32, 32)
    D.loss(y, torch.ones(images), torch.randn_like(y)).sum().backward()
    # not ru_maxrss, which a process inherits
    print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)


@dataclass(frozen=True)
class Options(train.Options):
    document: bool = option(False, "print docs/cost.md instead")
    machine: str = option("", "print it with a check of an image's memory on this machine, so named (Linux)")


def plan(options):
    """What is printed, in lines: the cost of a run of train.py with these options, or docs/cost.md."""
    if options.document or options.machine:
        return "\n".join(document(options.machine))
    D = data.load(options)
    return report(unet.build(options, D), len(D), train.total_steps(options, len(D)), options.batch,
                  options.batch_device, len(train.snapshot_steps(options, len(D))))


def main():
    run.stage(plan, Options, __doc__, say=str)


if __name__ == "__main__":
    main()
