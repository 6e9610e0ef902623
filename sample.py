"""Draw samples from a snapshot of train.py, or from the closed-form optimum of a training set.

    python sample.py --run runs/n1000 --seeds 0-9999                  10,000 samples of the last EMA weights
    python sample.py --optimum --data digits --n 100 --seeds 0-999 --out optimum.npz    seconds on two cores

Makes an npz (arr_0 uint8 [N, H, W, C], seeds, labels, and the options as JSON) and beside it a sheet as PNG.
The sampler is as published: deterministic Heun, 18 steps, float64 state (EDM, algorithm 1; paper, section
2); others are options (diffusion/solvers.py). Sample i depends on its seed alone.
"""
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import disk
import parallel
import run
from diffusion import denoiser
from diffusion.solvers import PUBLISHED, Sampling
from kernels import Optimum
from kernels.graphs import Replayed
from measure.sheets import sample_sheet, save
from run import option

# How many images a network sees at once (see `in_chunks`): at least, at most, and values in its first layer,
# which decide in between. Small networks, whose time is overhead, see more. A GPU takes as long for 4,096
# small images as for 256. At width 128 and 32x32, 2^26 values are 512 images, some 6 GB with all that is kept
# of them.
CHUNK, CHUNK_VALUES = (64, 256), 2**17
CHUNK_ON_GPU, CHUNK_VALUES_ON_GPU = (64, 4096), 2**26
OTHERS = 256      # images at once of a denoiser that is no network, and does not say how many
MAX_SEEDS = 10**7  # in one file


@dataclass(frozen=True)
class Options(Sampling, data.Options):
    run: str = option("", "run directory (its last weights) or snapshot file", recorded=False)
    snapshot: str = option(
        "last", "of a run directory: the last, or that of the least loss on the images held out by "
        "train.py --validate", ("last", "best-validation"), recorded=False)
    optimum: bool = option(False, "sample the closed-form optimum of --data or of the training set of --run")
    seeds: str = option("0-9999", "one sample a seed: 0-9999 are 10,000 samples, 7 is one")
    label: int | None = option(None, "give every sample this label; none draws them, see --sample-labels")
    precision: str = option(
        "auto", "of the network's products, whatever it was trained in; auto is tf32 on CUDA, else fp32. "
        "The sampler's state is float64", denoiser.PRECISION_CHOICES)
    out: str = option(
        "", "npz to write; RUN/samples.npz, or beside a snapshot file, by default", recorded=False)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", recorded=False)
    threads: int = option(0, "CPU threads; 0 takes all cores", recorded=False, least=0)

    def __post_init__(self):
        super().__post_init__()
        parse_seeds(self.seeds)
        if not self.run and not self.optimum:
            raise ValueError("nothing to sample from; give --run RUN, or --optimum and --data")
        if self.optimum and self.precision not in ("auto", "fp32"):
            raise ValueError(f"--precision {self.precision} is for networks; "
                             "the optimum has one precision, leave it out")
        given = [name for name, value in run.defaults(data.Options).items() if getattr(self, name) != value
                 and not (self.optimum and name == "data")]  # which says where the data of a run lie now
        if self.run and given:
            raise ValueError(f"--run {self.run} has its own data; leave out "
                             + ", ".join(f"--{name.replace('_', '-')}" for name in given))
        if self.out and not self.out.endswith(".npz"):
            raise ValueError(f"--out {self.out} must end in .npz")
        if self.label is not None and self.sample_labels == "none":
            raise ValueError(f"--label {self.label} is a label, and --sample-labels none is no label; "
                             "leave one of them out")


def parse_seeds(text):
    """The range of numbers that "0-99" or "7" stands for. Raises ValueError for anything else."""
    first, dash, last = text.partition("-")
    if not first.isdecimal() or dash and not last.isdecimal():
        raise ValueError(f"--seeds {text!r} is not a number or a range; write 7 or 0-9999")
    seeds = range(int(first), int(last or first) + 1)
    if not 0 < len(seeds) <= MAX_SEEDS or seeds[-1] >= 2**32:
        raise ValueError(f"--seeds {text!r} is no rising range below 2^32 of at most {MAX_SEEDS:,}")
    return seeds


def chunk(D):
    """How many images the network of D sees at once, by its size and the kind of its device."""
    on_gpu = next(D.parameters()).is_cuda
    (least, most), values = (CHUNK_ON_GPU, CHUNK_VALUES_ON_GPU) if on_gpu else (CHUNK, CHUNK_VALUES)
    fit = values // (D.config["width"] * D.config["img_resolution"]**2)
    return max(least, min(most, fit // least * least))


def in_chunks(D):
    """D, evaluated on exactly `chunk` images, of which at most so many are given; copies make up the rest.

    Convolution kernels change with the batch size, and with them the last bits of float32 and, now and
    then, a pixel by one level. In chunks of one size, a sample is the same whatever batch it is drawn in.
    On a GPU, evaluations are replayed as a CUDA graph: one with labels, and one without.
    """
    size, on_gpu = chunk(D), next(D.parameters()).is_cuda
    replayed = [Replayed(on_gpu, pure=True) for _ in range(2)]

    def chunked(x, sigma, labels=None):
        index = torch.arange(size, device=x.device).clamp(max=len(x) - 1)
        given = [] if labels is None else [labels[index]]
        return replayed[len(given)](D, x[index], sigma, *given)[:len(x)]
    return chunked


def weigh_labels(counts, how="uniform", unseen=True):
    """The weights by which `draw` draws labels, given `counts`, the training images of each label.

    "uniform", as published, draws labels without images as well, unless `unseen` is False: the closed-form
    optimum does not exist for them. "training" draws labels as often as the training set has them. With
    "none", or `counts` None of an unconditional model, the weights are None: samples get no label.
    """
    if how == "none":
        return None
    if how == "training" or not counts:
        return counts
    return [int(unseen or count > 0) for count in counts]


def draw(D, seeds, label_weights=None):
    """Latents float32 [B, C, H, W] and labels [B] (None for an unconditional D), each from its seed alone.

    They are drawn on the CPU, so that every device gets the same. Labels are drawn in proportion to
    `label_weights`.
    """
    shape = [D.config["img_channels"], D.config["img_resolution"], D.config["img_resolution"]]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = torch.stack([torch.randn(shape, generator=g) for g in generators])
    if not label_weights:
        return latents, None
    share = torch.tensor(label_weights, dtype=torch.float64).cumsum(0)
    u = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
    return latents, torch.searchsorted(share, u * share[-1], right=True)


def generate(D, seeds, label_weights=None, label=None, sampling=PUBLISHED, device="cpu"):
    """Samples of D, one a seed: uint8 [N, C, H, W] and their labels int64 [N] (None if unconditional).

    Raises ValueError for guidance without labels.
    """
    if sampling.guidance != 1 and not label_weights:
        raise ValueError(f"--guidance {sampling.guidance:g} weighs a label against none, and this model is "
                         "not given labels; leave it out")
    network = isinstance(D, denoiser.Denoiser)
    denoise, at_once = (in_chunks(D), chunk(D)) if network else (D, getattr(D, "rows", OTHERS))
    sigmas, images, labels = sampling.levels(D, device), [], []
    for i in tqdm(range(0, len(seeds), at_once), desc="sample", unit="chunk", disable=None):
        part = seeds[i:i + at_once]
        latents, drawn = draw(D, part, label_weights)
        if label is not None:
            drawn = torch.full((len(latents),), label)
        x = sampling.solve(denoise, latents.to(device), sigmas, None if drawn is None else drawn.to(device),
                           part)
        images.append((x * 127.5 + 128).clip(0, 255).to(torch.uint8).cpu())
        labels.append(drawn)
    return torch.cat(images), torch.cat(labels) if labels[0] is not None else None


def sample(options):
    """Draw the samples that the options describe; returns the path of the npz. One that exists is kept.

    Raises ValueError if the npz there was made with other options or from other weights.
    """
    device = data.pick_device(options.device, options.threads)
    data.keep_memory()
    precision = "fp32" if options.optimum else denoiser.precision_on(device, options.precision)
    options = dataclasses.replace(options, precision=precision)
    D, counts, source, out = (optimum if options.optimum else trained)(options, device)
    out, about = Path(options.out or out), dict(options=data.recorded(options), source=source)
    if disk.earlier(out, about, run.defaults(Options)):
        return out
    if options.label is not None and not 0 <= options.label < len(counts or ()):
        there = f"there are {len(counts)} labels, counted from 0" if counts else "there are no labels"
        raise ValueError(f"--label {options.label}: {there}")
    weights = weigh_labels(counts, options.sample_labels, unseen=not options.optimum)
    seeds = parse_seeds(options.seeds)
    if len(seeds) < parallel.size():
        raise ValueError(f"--seeds {options.seeds}: {len(seeds)} samples for "
                         f"{parallel.size()} processes; start fewer")
    if not options.optimum:
        evaluations = len(seeds) * options.evaluations / parallel.size()
        data.announce(options.device, device, evaluations * D.model.flops(), precision)
    with parallel.group(device):
        part = generate(D, seeds[parallel.share(len(seeds))], weights, options.label, options, device)
        images, labels = (a if a is None else parallel.gather(a) for a in part)
    if not parallel.rank():
        write(out, images, labels, seeds, about | disk.provenance(device))
    return out


def optimum(options, device):
    """What `sample` needs of a closed-form optimum: it, images a label, what identifies it, the usual npz."""
    there = Path(options.run)
    folder = there if there.is_dir() else there.parent
    moved = "" if options.data == data.Options.data else options.data
    train = data.of_run(folder, moved) if options.run else data.load(options)
    _ = train.resolution  # an error unless images are square
    source = {key: value for key, value in train.fingerprint().items() if value and key.endswith("sha256")}
    labels = train.labels[train.shown].to(device) if train.label_dim else None
    counts = torch.bincount(labels, minlength=train.label_dim).tolist() if train.label_dim else None
    return Optimum(train.images[train.shown].to(device), labels), counts, source, folder / "optimum.npz"


def trained(options, device):
    """The same of a trained model."""
    path, files = Path(options.run), disk.Directory(options.run)
    if path.is_dir():
        path = best(files) if options.snapshot == "best-validation" else files.model
    elif options.snapshot != "last":
        raise ValueError(f"--snapshot {options.snapshot} chooses within a run directory, and --run "
                         f"{options.run} is none; leave one of them out")
    if not path.is_file():
        raise ValueError(f"no trained model at {path}; "
                         "give the run directory of a finished train.py, or a snapshot file")
    D, metadata = checkpoint.load_model(path, device)
    if files.path.is_dir() and (different := disk.differences(metadata, disk.read_json(files.config))):
        raise ValueError(f"{path} is not of the run in {path.parent} ({different}); "
                         "restore it, or train again")
    say_untrained(options, metadata["options"])
    source = dict(weights_sha256=disk.file_sha256(path))
    out = path.with_stem(path.stem.replace("model", "samples").replace("snapshot", "samples"))
    return D.use(options.precision), metadata["label_counts"], source, out.with_suffix(".npz")


def say_untrained(sampling, training):
    """Say it where samples need a model without labels and training, a dict of options, always gave them."""
    always = training.get("labels", "none") != "none" and not training.get("label_dropout")
    if always and (sampling.guidance != 1 or sampling.sample_labels == "none"):
        run.say("the model has always seen labels and is asked for images without: that was not trained; "
                "--label-dropout 0.1 would")


def best(files):
    """The snapshot file in a run directory whose loss on held-out images is the least."""
    losses = {path: disk.metadata(path).get("validation_loss") for path in files.snapshots()}
    if not losses or None in losses.values():
        raise ValueError(f"the snapshots in {files.path} have no loss on held-out images; "
                         "train with --validate, or leave --snapshot out")
    return min(losses, key=losses.get)


def write(out, images, labels, seeds, about):
    """Write samples uint8 [N, C, H, W], their labels (or None) and seeds as npz, and their sheet."""
    save(sample_sheet(images, seeds), out.with_suffix(".png"))
    arrays = dict(arr_0=np.ascontiguousarray(images.permute(0, 2, 3, 1)), seeds=np.array(seeds))
    arrays |= {} if labels is None else dict(labels=labels.numpy())
    with disk.whole_file(out) as temporary:
        np.savez(temporary, **arrays, about=json.dumps(about))


def main():
    run.stage(sample, Options, __doc__, words="wrote {}".format)


if __name__ == "__main__":
    main()
