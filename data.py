"""Images and labels in, training sets out.

A source (images/) gives uint8 images [N, C, H, W] and int64 class labels [N]. A training set D is a
class-balanced subset of a source (nested: the subset of 500 lies inside that of 1,000), resized and
labelled for the experiment (paper, sections 3 and 5).
"""
import contextlib
import ctypes
import hashlib
import os
import sys
from dataclasses import dataclass, fields
from types import EllipsisType

import torch

import disk
import run
from images import place, read, there
from images.labels import give_labels, label_count, parse_labels
from images.subsets import balanced_order, in_part, repetition, shown
from run import option

CPU_FLOPS = 40e9  # a second and core, assumed: convolutions reach 57 to 90 (docs/performance.md)
# FLOP/s as UNet.flops counts, at width 128, 32x32 and batch 512 on an H100 (docs/gpu.md)
GPU_FLOPS = dict(fp32=35.2e12, tf32=186e12, bf16=381e12)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Subset(run.Checked):
    n: int = option(0, "training images, |D|; 0 takes all there are", least=0)
    classes: int = option(0, "keep the first this many classes; 0 keeps all", least=0)
    resolution: int = option(0, "crop to the middle square and resize to this many pixels a side (Lanczos); "
                                "0 keeps the size", least=0, below=4097)
    subset_seed: int | None = option(None, "draw the subset by this seed; none takes the first of each class",
                                     least=0, below=2**32)


@dataclass(frozen=True)
class Options(Subset):
    data: str = option("cifar10", "digits, cifar10, cifar100, mnist, fashion-mnist (-test: their test half), "
                       "or a path: image folder, zip of images, npz, npy or IDX file; with :K, class K alone")
    mix: str = option("", "a second source, mixed in within each class")
    mix_share: float = option(0.5, "its share of each class, from 0 to 1")
    labels: str = option("none", "labels the model is given: none, true, permuted (the true ones shuffled), "
                         "random:C, coarse:C (C random ones a class), clusters:K (k-means), unique or "
                         "unique:SHARE (unique for a share of D, one for the rest)")
    label_seed: int = option(0, "seed of labels that are drawn", least=0, below=2**32)
    part: str = option("", "draw D from the i-th of k disjoint, balanced parts of the data: i/k, such as 1/2")
    repeat: str = option("", "show a share of D, drawn by --subset-seed, K times as often as the rest: "
                             "K:share, such as 10:0.1. An epoch stays |D| images")

    def __post_init__(self):
        super().__post_init__()
        parse_labels(self.labels)
        in_part(torch.zeros(0), self.part)
        if self.repeat:
            repetition(self.repeat)
        if not 0 <= self.mix_share <= 1:
            raise ValueError(f"--mix-share {self.mix_share} is not a share from 0 to 1")
        if not self.mix and self.mix_share != Options.mix_share:
            raise ValueError(f"--mix-share {self.mix_share} is the share of a second source; "
                             "give it as --mix, or leave the share out")


@dataclass(frozen=True)
class Images:
    """Images uint8 [N, C, H, W], their labels int64 [N], the number of labels, and a name for each image.

    `shown` is an index of what one round of training shows: all images once, but for --repeat some K times.
    """
    images: torch.Tensor
    labels: torch.Tensor
    label_dim: int
    names: list
    shown: torch.Tensor | EllipsisType = ...

    def __len__(self):
        return len(self.images)

    @property
    def resolution(self):
        """Pixels a side. Raises ValueError if the images are not square, as the networks need."""
        height, width = self.images.shape[-2:]
        if height != width:
            raise ValueError(f"the images are {width}x{height}; the networks need square ones: "
                             "give --resolution")
        return height

    def fingerprint(self):
        """What a run directory records of its data: count, shape and SHA-256 of pixels and of labels."""
        return dict(count=len(self), shape=list(self.images.shape[1:]), sha256=sha256(self.images),
                    label_dim=self.label_dim, labels_sha256=sha256(self.labels) if self.label_dim else None,
                    **({} if self.shown is ... else dict(shown_sha256=sha256(self.shown))))


def load(options, more=False):
    """The training set that `options` describe, as `Images`: read, kept classes, subset, resized, labelled.

    With labels "none" label_dim is 0 and the labels are the true classes, which the model is not given. With
    `more`, the images that D would grow by follow those of D, labelled as held-out ones.
    Raises ValueError for what the source does not have.
    """
    images, classes, names, origin = sources(options)
    there_are = int(classes.max()) + 1
    if options.classes > there_are:
        raise ValueError(f"--classes {options.classes}: {options.data} has {there_are}")
    own = in_part(2 * classes + origin, options.part)
    share = options.mix_share if options.mix else 0.0
    index = own[balanced_order(classes[own], options.subset_seed, origin[own], share)]
    count = options.classes or there_are
    index = index[classes[index] < count]
    kept = f" in {count} classes" if options.classes else ""
    kept += f" in part {options.part}" if options.part else ""
    if not len(index):
        raise ValueError(f"{options.data} has no images{kept}; take more classes, or fewer parts")
    if options.labels in ("true", "permuted") and len(classes[index].unique()) < 2:
        raise ValueError(f"--labels {options.labels}: {options.data} has no classes here, or one; "
                         "take --labels none, or give it classes, such as a folder for each")
    n = options.n or len(index)
    if n > len(index):
        mixed = f" with a share of {share:g} of {options.mix}" if options.mix else ""
        raise ValueError(f"--n {n} is more than the {len(index)} images of {options.data}{mixed}{kept}; "
                         "lower --n")
    index = index if more else index[:n]
    images, classes = images[index], classes[index]
    labels = give_labels(options.labels, options.label_seed, images, classes, n)
    return Images(images, labels, label_count(options.labels, n, count), [names[i] for i in index.tolist()],
                  shown(n, options.repeat, options.subset_seed))


def sources(options):
    """Images, classes and names of --data, then those of --mix, and where each is from: 0 or 1."""
    images, classes, names = read(options.data, options.resolution)
    if not options.mix:
        return images, classes, names, torch.zeros_like(classes)
    others, other_classes, other_names = read(options.mix, options.resolution)
    if others.shape[1:] != images.shape[1:]:
        raise ValueError(f"--mix {options.mix} has images of shape {list(others.shape[1:])}, "
                         f"--data {options.data} of {list(images.shape[1:])}; "
                         "give --resolution, and sources of the same number of channels")
    if classes.unique().tolist() != other_classes.unique().tolist():
        raise ValueError(f"--mix {options.mix} and --data {options.data} have other classes; "
                         "take one of each with :K, such as cifar10:5")
    origin = torch.cat([torch.zeros_like(classes), torch.ones_like(other_classes)])
    return torch.cat([images, others]), torch.cat([classes, other_classes]), [*names, *other_names], origin


def outside(options, D, count=0, copies=False):
    """`count` images (0: all) of the source, or of its part, outside the training set D, as `Images`.

    They come in the order in which D would grow. With labels, only those whose label an image of D has.
    Those that equal an image of D to the pixel are left out, unless `copies`.
    Raises ValueError if there are fewer.
    """
    whole = load(options, more=True)
    index = torch.arange(len(D), len(whole))
    if D.label_dim:
        index = index[torch.isin(whole.labels[index], D.labels)]
    if not copies:
        index = index[~duplicates(torch.cat([D.images, whole.images[index]]))[len(D):]]
    if count > len(index):
        alike = " whose label an image there has" if D.label_dim else ""
        raise ValueError(f"{options.data} has {len(index)} images outside the training set{alike}, "
                         f"and not the {count} asked for; take fewer, or lower --n")
    index = index[:count or len(index)]
    names = [whole.names[i] for i in index.tolist()]
    return Images(whole.images[index], whole.labels[index], D.label_dim, names)


def sha256(tensor):
    """SHA-256 of a tensor's values, in hexadecimal."""
    return hashlib.sha256(tensor.contiguous().numpy()).hexdigest()


def duplicates(images):
    """bool [N]: whether an equal image stands earlier in uint8 images [N, ...]."""
    first = {}  # by checksums, as sorting takes ten times as long
    return torch.tensor([first.setdefault(sha256(image), i) != i for i, image in enumerate(images)])


def say_duplicates(D):
    """Say in a line how many images of a training set repeat an earlier one, if any do."""
    if count := int(duplicates(D.images).sum()):
        run.say(f"{count} of {len(D)} training images repeat an earlier one: copies of those cannot count as "
                "memorized")


def recorded(options):
    """What a file stores of options with data: those that decide the result, with absolute paths."""
    return run.recorded(options) | {name: place(getattr(options, name)) for name in disk.PLACES}


def of_run(directory, moved=""):
    """The training set of a run directory of train.py, whose data lie at `moved` if that is given.

    Raises ValueError if they are not there any more, or have changed since.
    """
    options = options_of_run(directory, moved)
    for source in filter(None, (options.data, options.mix)):
        if not there(source):
            raise ValueError(f"{source}, which {directory} was trained on, is not there; if it has moved, "
                             "say where it is now by --data")
    D = load(options)
    if D.fingerprint() != disk.read_json(disk.Directory(directory).config)["data"]:
        raise ValueError(f"{options.data} is no longer what {directory} was trained on; "
                         "restore it, or train again")
    return D


def options_of_run(directory, moved=""):
    """The `Options` of a run directory's training set, whose data lie at `moved` if that is given."""
    path = disk.Directory(directory).config
    config = disk.read_json(path) if path.is_file() else {}
    if config.get("stage") != "train":
        raise ValueError(f"{directory} is not a run directory of train.py: it has no config.json of one")
    options = {field.name: config["options"].get(field.name, field.default) for field in fields(Options)}
    return Options(**options | (dict(data=moved) if moved else {}))


def pick_device(name, threads=0, deterministic=False):
    """The torch device of a --device word: auto, cpu, cuda or cuda:N, which becomes the current one.

    `threads` limits a CPU's; `deterministic` keeps CUDA to kernels that always add in the same order.
    """
    if threads < 0:
        raise ValueError(f"--threads {threads} is negative; give 0 for all cores, or a number")
    try:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(best if name == "auto" else name)
        if device.type == "cuda" and device.index is None and run.size() > 1:  # a GPU a process of torchrun
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not a device of these scripts")
        torch.empty(0, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # for what takes the current one, such as pinned memory
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; "
                         "use auto, cpu, cuda or cuda:N") from None
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    if threads:
        torch.set_num_threads(threads)
    return device


def keep_memory():
    """Tell glibc to keep the memory of large tensors for the next ones, where a network is to run on a CPU.

    To give it back and fault it in again takes 11 to 20% of a step or an evaluation (width 8 and 16, Zen 5).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30), mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


_announced = []


def announce(name, device, flops=0, precision="fp32", at_once=0):
    """Say on stderr, once a process, what --device auto took, and how long so many FLOPs take if it is long.

    On a GPU also what another precision would change. A small network takes longer than its FLOPs say.
    """
    if run.rank() or _announced or name != "auto" and device.type == "cpu":
        return
    _announced.append(device)
    if device.type == "cuda":
        said = f"device: {device} ({torch.cuda.get_device_name(device)})"
        hours = {kind: flops / rate / 3600 for kind, rate in GPU_FLOPS.items()}
        if hours[precision] > 0.1:
            others = ", ".join(f"{kind} {time:,.1f}" for kind, time in hours.items() if kind != precision)
            part = f", up to {at_once} images at once" if at_once else ""
            said += (f", precision {precision}{part}: about {hours[precision]:,.1f} hours at the rates of an "
                     f"H100 (with --precision {others})")
    else:
        said = f"device: cpu ({disk.processor()}), as no GPU was found"
        days = flops / (CPU_FLOPS * torch.get_num_threads() * 24 * 3600)
        if days > 1:
            said += f"; this takes about {days:,.0f} days at an assumed {CPU_FLOPS / 1e9:g} GFLOP/s a core"
    print(said, file=sys.stderr)
