"""What a run costs before it is made: parameters, FLOPs, memory, and hours on one H100 and one A100.

    python bench/plan.py --n 2000 --width 256     what train.py would cost with the same options,
                                                  and sampling with those of sample.py

FLOPs and memory are counted on torch's meta device, where tensors have a shape and no data: nothing is
computed, and a network of any width takes a second. Hours are FLOPs over the peak of a data sheet times an
assumed utilisation.
"""
import contextlib
import copy
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import run
import train
from diffusion import denoiser
from diffusion.solvers import PUBLISHED, Sampling
from images import shape_of, there

# FLOP/s, without sparsity, from the data sheets of the SXM models; fp32 is that of the CUDA cores
PEAK = dict(H100=dict(fp32=67e12, tf32=494e12, bf16=989e12),
            A100=dict(fp32=19.5e12, tf32=156e12, bf16=312e12))
# Shares of that peak, measured on an H100 at width 128, 32x32, batch 512 (docs/gpu.md), assumed elsewhere
UTILISATION = dict(fp32=0.48, tf32=0.35, bf16=0.35)
SAMPLES = 10_000      # a snapshot, as published

FLOAT_BYTES = 4       # weights and activations are float32, with tf32 too; bf16 activations need less
STATE = 5             # copies of the weights: themselves, gradients, two moments of Adam, their average
FRAGMENTATION = 1.33  # reserved over live activations: glibc's gaps made it 0.75 to 1.38, assumed for CUDA's
CONTEXT_BYTES = 1e9   # assumed: CUDA, its libraries and kernels, the training images
GIGABYTE = 1e9        # a card sold as 24 GB holds 24 GiB, 7% more, of which its driver takes some
IMAGES = 2            # counted at once; a batch of one has ambiguous strides, which may leave out copies
CARDS = (24, 80)      # GB
SEARCH = 4.5          # whole trainings of as many images that a search costs (docs/search.md)


@dataclass(frozen=True)
class Options(Sampling, train.Options):
    pass


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
    """Expected hours of that many FLOPs on one GPU of `PEAK`."""
    return flops / (PEAK[gpu][precision] * UTILISATION[precision]) / 3600


def sampling_flops(cost, snapshots, samples=SAMPLES, sampling=PUBLISHED):
    return snapshots * samples * sampling.evaluations * cost.evaluation_flops


@lru_cache(maxsize=None)
def cost_of(*shape):
    """The Cost of a Denoiser of that shape, skips all kept: those that are not kept save next to nothing."""
    return cost(denoiser.Denoiser(*shape))


def source_shape(source, resolution=0):
    """`images.shape_of` a source; one that is not here is as CIFAR-10."""
    return shape_of(source if there(source) else "cifar10", resolution)


def search_price(o, emm):
    """Images trained and FLOPs of a run of emm.py with options `o`, sampling included, on all its seeds.

    A search is priced as `SEARCH` trainings of `emm` images, every snapshot as sampled in full.
    """
    channels, side, classes = source_shape(o.data, o.resolution)
    sizes, times = (o.sizes, 1) if o.sizes else ((emm,), SEARCH)
    times *= len(o.train_seeds)
    trained = times * sum(train.total_steps(o, n) * o.batch for n in sizes)
    drawn = times * sum(len(train.snapshot_steps(o, n)) for n in sizes)
    labels = data.label_count(o.labels, max(sizes), o.classes or classes)
    c = cost_of(o.arch, o.precond, o.resolution or side, channels, labels, o.width, o.blocks,
                o.channel_mult, o.attn_resolutions, o.embedding)
    return round(trained), trained * c.step_flops + sampling_flops(c, drawn, o.sample_count, o)


def report(D, n, steps, batch, batch_device, snapshots, samples=SAMPLES, sampling=PUBLISHED):
    """Lines of text: what training D on n images costs, and drawing the samples of every snapshot.

    `batch_device` is as in train.py: images at once, 0 for the batch.
    """
    c, at_once = cost(D), batch_device or batch
    training, drawing = steps * batch * c.step_flops, sampling_flops(c, snapshots, samples, sampling)
    lines = [
        f"network   {c.parameters:,} parameters",
        f"training  {n:,} images, {steps:,} steps of {batch}: {c.step_flops / 1e9:.3g} GFLOP an image, "
        f"{training:.3g} FLOP",
        f"sampling  {snapshots} snapshots, {samples:,} samples of each: {c.evaluation_flops / 1e9:.3g} GFLOP "
        f"an evaluation, {sampling.evaluations} a sample, {drawing:.3g} FLOP",
        f"memory    {c.bytes(at_once) / GIGABYTE:.1f} GB with {at_once} images at once: "
        f"{c.kept_bytes / 2**20:.1f} MiB an image, {c.state_bytes / GIGABYTE:.2f} GB of weights, gradients, "
        "Adam and average, and margins",
        *(f"          --batch-device in {gb} GB: {largest_batch_device(c, batch, gb) or 'none'}"
          for gb in CARDS),
        "hours     training + sampling on one GPU at that share of its peak",
        "          " + "".join(f"{f'{kind} at {share:.0%}':>18}" for kind, share in UTILISATION.items())]
    for gpu in PEAK:
        cells = (" + ".join(in_words(flops, gpu, kind) for flops in (training, drawing))
                 for kind in UTILISATION)
        lines.append(f"  {gpu:<8}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def in_words(flops, gpu, precision):
    """Hours in words: two digits, more than the assumption is good for."""
    value = hours(flops, gpu, precision)
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}" if value >= 0.01 else "<0.01"


def plan(options):
    """The cost of a run of train.py with these options, in lines."""
    D = data.load(options)
    return report(denoiser.build(options, D), len(D), train.total_steps(options, len(D)), options.batch,
                  options.batch_device, len(train.snapshot_steps(options, len(D))), sampling=options)


def main():
    run.stage(plan, Options, __doc__, words=str)


if __name__ == "__main__":
    main()
