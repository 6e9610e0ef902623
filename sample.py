"""Draw samples from a snapshot of train.py, or from the closed-form optimum of a training set.

    python sample.py --run runs/n1000 --seeds 0-9999                  10,000 samples of the last EMA weights
    python sample.py --optimum --data digits --n 100 --seeds 0-999 --out optimum.npz    seconds on two cores

Makes an npz (arr_0 uint8 [N, H, W, C], seeds, labels, and the options as JSON) and beside it a grid of the
first hundred as PNG. The sampler is the published one: deterministic Heun, 18 steps, float64 state (EDM,
algorithm 1; paper, section 2). Sample i depends on its seed alone.
"""
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import parallel
import run
import unet
from images import picture
from kernels import Optimum
from kernels.graphs import Replayed
from run import option

# How many images a network sees at once (see `in_chunks`): at least, at most, and values in its first layer,
# which decide in between. Small networks, whose time is overhead, see more. A GPU takes as long for 4,096
# small images as for 256. At width 128 and 32x32, 2^26 values are 512 images, some 6 GB with all that is kept
# of them.
CHUNK, CHUNK_VALUES = (64, 256), 2**17
CHUNK_ON_GPU, CHUNK_VALUES_ON_GPU = (64, 4096), 2**26
LABELS_OPTION = option(
    "uniform", "labels of the samples: all equally likely, as published, as often as in training, or none",
    ("uniform", "training", "none"))
EVALUATIONS = 35   # of the denoiser for each sample: 18 Heun steps, the last an Euler step
MAX_SEEDS = 10**7  # in one file
GRID = 10         # images a side of the grid
GRID_PIXELS = 64  # small images are enlarged to about this


@dataclass(frozen=True)
class Options(data.Options):
    run: str = option("", "run directory (its last weights) or snapshot file", recorded=False)
    optimum: bool = option(False, "sample the closed-form optimum of --data or of the training set of --run")
    seeds: str = option("0-9999", "one sample a seed: ranges and numbers, such as 0-99,200")
    label: int | None = option(None, "give every sample this label; none draws them, see --sample-labels")
    sample_labels: str = LABELS_OPTION
    heun_steps: int = option(18, "sampling steps")
    sigma_min: float = option(0.002, "lowest noise level, raised to the network's")
    sigma_max: float = option(80.0, "highest noise level, lowered to the network's")
    rho: float = option(7.0, "exponent of the spacing of noise levels")
    precision: str = option(
        "auto", "of the network's products, whatever it was trained in; auto is tf32 on CUDA, else fp32. "
        "The sampler's state is float64", unet.PRECISION_CHOICES)
    at_once: int = option(
        256, "samples at once, more where a GPU wants more; changes no sample", recorded=False)
    out: str = option(
        "", "npz to write; RUN/samples.npz, or beside a snapshot file, by default", recorded=False)
    png: str = option("", "also write each sample as SEED.png into this folder", recorded=False)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", recorded=False)
    threads: int = option(0, "CPU threads; 0 takes all cores", recorded=False)

    def __post_init__(self):
        super().__post_init__()
        parse_seeds(self.seeds)
        if not self.run and not self.optimum:
            raise ValueError("nothing to sample from; give --run RUN, or --optimum and --data")
        if self.optimum and self.precision not in ("auto", "fp32"):
            raise ValueError(f"--precision {self.precision} is for networks; "
                             "the optimum has one precision, leave it out")
        defaults = run.defaults(data.Options)
        given = [name for name, value in defaults.items() if getattr(self, name) != value]
        if self.optimum and "data" in given:  # says where the data of a run lie now
            given.remove("data")
        if self.run and given:
            raise ValueError(f"--run {self.run} has its own data; leave out {', '.join(given)}")
        if self.out and not self.out.endswith(".npz"):
            raise ValueError(f"--out {self.out} must end in .npz")
        if self.label is not None and self.sample_labels == "none":
            raise ValueError(f"--label {self.label} is a label, and --sample-labels none is no label; "
                             "leave one of them out")
        if not 2 <= self.heun_steps <= 10_000 or self.at_once < 1:
            raise ValueError(f"--heun-steps {self.heun_steps}, --at-once {self.at_once}: "
                             "need 2 to 10,000, and at least 1")
        if not 0 < self.sigma_min < self.sigma_max < math.inf or not 0.1 <= self.rho < math.inf:
            raise ValueError(f"--sigma-min {self.sigma_min}, --sigma-max {self.sigma_max}, --rho {self.rho}: "
                             "need 0 < sigma_min < sigma_max and rho of 0.1 or more, all finite")


def parse_seeds(text):
    """The numbers in a list of ranges such as "0-99,200". Raises ValueError where it is not such a list."""
    seeds = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = first.isdecimal() and (last.isdecimal() or not dash)
        if not numbers or not int(first) <= int(last or first) < 2**32:
            raise ValueError(f"--seeds {text!r}: {part!r} is not a number or a rising range below 2^32; "
                             "write 0-9999 or 0-99,200")
        part = range(int(first), int(last or first) + 1)
        if len(seeds) + len(part) > MAX_SEEDS:
            raise ValueError(f"--seeds {text!r} are more than {MAX_SEEDS:,}; draw them in several files")
        seeds += part
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text!r}: one of them stands there twice, and would be the same sample")
    return seeds


def noise_levels(sigma_min, sigma_max, steps=18, rho=7.0, device=None):
    """sigma_0 > ... > sigma_{steps-1}, then 0, as float64 [steps + 1] (EDM, eq. 5)."""
    i = torch.arange(steps, dtype=torch.float64, device=device) / (steps - 1)
    sigma = (sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigma, sigma.new_zeros(1)])


@torch.inference_mode()
def heun(D, latents, sigmas, labels=None):
    """Solve the probability-flow ODE from unit normal latents [B, C, H, W].

    Deterministic second-order Heun steps over `sigmas`, the last an Euler step (EDM, algorithm 1). Returns
    float64 [B, C, H, W], in about [-1, 1].
    """
    x = latents.to(torch.float64) * sigmas[0]
    for i, (now, after) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        slope = (x - D(x, now, labels).to(torch.float64)) / now
        ahead = x + (after - now) * slope
        if i < len(sigmas) - 2:
            slope_ahead = (ahead - D(ahead, after, labels).to(torch.float64)) / after
            ahead = x + (after - now) * (0.5 * slope + 0.5 * slope_ahead)
        x = ahead
    return x


def chunk(D):
    """How many images the network of D sees at once, by its size and the kind of its device."""
    on_gpu = next(D.parameters()).is_cuda
    (least, most), values = (CHUNK_ON_GPU, CHUNK_VALUES_ON_GPU) if on_gpu else (CHUNK, CHUNK_VALUES)
    fit = values // (D.config["width"] * D.config["img_resolution"]**2)
    return max(least, min(most, fit // least * least))


def in_chunks(D):
    """D, evaluated on exactly `chunk` images at a time; copies fill up the last chunk.

    Convolution kernels change with the batch size, and with them the last bits of float32 and, now and
    then, a pixel by one level. In chunks of one size, a sample is the same whatever batch it is drawn in.
    On a GPU, evaluations are replayed as a CUDA graph.
    """
    size, replayed = chunk(D), Replayed(next(D.parameters()).is_cuda)

    def chunked(x, sigma, labels=None):
        pad = -len(x) % size
        index = torch.arange(len(x) + pad, device=x.device).clamp(max=len(x) - 1).split(size)
        found = [replayed(D, x[i], sigma, *(() if labels is None else (labels[i],))) for i in index]
        return torch.cat(found)[:len(x)]
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


def generate(D, seeds, label_weights=None, label=None, steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0,
             at_once=256, device="cpu"):
    """Samples of D, one a seed: uint8 [N, C, H, W] and their labels int64 [N] (None if unconditional)."""
    denoise = in_chunks(D) if isinstance(D, unet.Denoiser) else D
    if torch.device(device).type == "cuda":  # as many as fill it; a network would pad fewer
        wanted = chunk(D) if isinstance(D, unet.Denoiser) else getattr(D, "rows", at_once)
        at_once = max(at_once, wanted)
    sigmas = noise_levels(max(sigma_min, D.sigma_min), min(sigma_max, D.sigma_max), steps, rho, device)
    images, labels = [], []
    for i in tqdm(range(0, len(seeds), at_once), desc="sample", unit="chunk", disable=None):
        latents, drawn = draw(D, seeds[i:i + at_once], label_weights)
        if label is not None:
            drawn = torch.full((len(latents),), label)
        x = heun(denoise, latents.to(device), sigmas, drawn.to(device) if drawn is not None else None)
        images.append((x * 127.5 + 128).clip(0, 255).to(torch.uint8).cpu())
        labels.append(drawn)
    return torch.cat(images), torch.cat(labels) if labels[0] is not None else None


def sample(options):
    """Draw the samples that the options describe; returns the path of the npz. One that exists is kept.

    Raises ValueError if the npz there was made with other options or from other weights.
    """
    device = data.pick_device(options.device, options.threads)
    data.keep_memory()
    model = run.Directory(options.run).model if Path(options.run).is_dir() else Path(options.run)
    files = run.Directory(model.parent)
    precision = "fp32" if options.optimum else unet.precision_on(device, options.precision)
    options = dataclasses.replace(options, precision=precision)
    if options.optimum:
        moved = "" if options.data == data.Options.data else options.data
        D = data.of_run(model.parent, moved) if options.run else data.load(options)
        _ = D.resolution  # an error unless images are square
        fingerprint = D.fingerprint()
        source = dict(optimum_of=fingerprint["sha256"])
        source |= {key: fingerprint[key] for key in ("labels_sha256", "shown_sha256") if fingerprint.get(key)}
        out = files.optimum
    else:
        if not model.is_file():
            raise ValueError(f"no trained model at {model}; "
                             "give the run directory of a finished train.py, or a snapshot file")
        source = dict(weights_sha256=run.file_sha256(model))
        out = files.samples(model)
    out = Path(options.out) if options.out else out
    about = dict(options=data.recorded(options), source=source)
    if out.exists() and not out.is_file():
        raise ValueError(f"--out {out} is no regular file, and what is written there is read again; "
                         "choose another")
    if not out.exists():
        if options.optimum:
            images, labels = D.images[D.shown], D.labels[D.shown]
            counts = torch.bincount(labels, minlength=D.label_dim).tolist() if D.label_dim else None
            D = Optimum(images.to(device), labels.to(device) if counts else None)
        else:
            D, metadata = checkpoint.load_model(model, device)
            if Path(options.run).is_dir() and (different := foreign(metadata, run.read_json(files.config))):
                raise ValueError(f"{model} is not of the run in {model.parent} ({different}); "
                                 "restore it, or train again")
            D.use(options.precision)
            counts = metadata["label_counts"]
        if options.label is not None and not 0 <= options.label < len(counts or ()):
            raise ValueError(f"--label {options.label}: there are {len(counts or ())} labels, counted from 0")
        weights = weigh_labels(counts, options.sample_labels, unseen=not options.optimum)
        seeds = parse_seeds(options.seeds)
        if len(seeds) < parallel.size():
            raise ValueError(f"--seeds {options.seeds}: {len(seeds)} samples for "
                             f"{parallel.size()} processes; start fewer")
        if not options.optimum:
            evaluations = len(seeds) * (2 * options.heun_steps - 1) / parallel.size()
            data.announce(options.device, device, evaluations * D.flops(), precision)
        with parallel.group(device):
            part = generate(D, seeds[parallel.share(len(seeds))], weights, options.label, options.heun_steps,
                            options.sigma_min, options.sigma_max, options.rho, options.at_once, device)
            images, labels = (None if a is None else parallel.gather(a.to(device), len(seeds)).cpu().numpy()
                              for a in part)
        if parallel.rank():
            return out
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))  # [N, H, W, C]
        arrays = dict(arr_0=images, seeds=np.array(seeds), about=json.dumps(about | run.provenance(device)))
        with run.publish(out) as temporary:
            np.savez(temporary, **arrays, **(dict(labels=labels) if labels is not None else {}))
    there = run.about(out)
    try:
        with np.load(out, allow_pickle=False) as file:
            images, seeds = file["arr_0"], file["seeds"]
    except (OSError, ValueError, KeyError, *run.ZIP_ERRORS) as error:
        raise ValueError(f"{out} is not a whole npz of sample.py ({error}); "
                         "choose another --out, or remove it") from None
    different = run.differences(there, about, run.defaults(Options))
    if different:
        raise ValueError(f"{out} holds other samples ({different}); choose another --out, or remove it")
    images = torch.from_numpy(images).permute(0, 3, 1, 2)  # [N, C, H, W]
    with run.publish(out.with_suffix(".png")) as temporary:
        grid(images[:GRID * GRID]).save(temporary)
    if options.png:
        write_png(Path(options.png), seeds, images)
    return out


def foreign(metadata, config):
    """How a snapshot differs from those of the run with this config.json, in words; "" if it does not.

    Only the options that both have count.
    """
    both = metadata["options"].keys() & config["options"].keys()
    snapshot, run_there = (dict(side, options={key: side["options"][key] for key in both})
                           for side in (metadata, config))
    return run.differences(snapshot, run_there)


def write_png(folder, seeds, images):
    """Write each image [C, H, W] as SEED.png. Raises ValueError if the folder holds other PNG files."""
    names = [f"{seed:06d}.png" for seed in seeds]
    others = {path.name for path in folder.glob("[!.]*.png")} - set(names)
    if others:
        raise ValueError(f"--png {folder} holds other images, such as {min(others)}; choose another folder")
    for name, image in zip(names, images):
        with run.publish(folder / name, flush=False) as temporary:
            picture(image.numpy()).save(temporary)


def grid(images):
    """The images [N, C, H, W] as one picture of `GRID` columns, small ones enlarged."""
    blank = images.new_zeros(-len(images) % GRID, *images.shape[1:])
    rows = torch.cat([images, blank]).unflatten(0, (-1, GRID))            # [rows, GRID, C, H, W]
    sheet = rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2).numpy()  # [C, rows H, GRID W]
    scale = max(1, GRID_PIXELS // images.shape[-1])
    return picture(sheet.repeat(scale, 1).repeat(scale, 2))


def main():
    run.stage(sample, Options, __doc__, say="wrote {}".format)


if __name__ == "__main__":
    main()
