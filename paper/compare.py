"""Set a trained model beside the closed-form optimum of its training set: copies, distances, loss by noise.

    python -m paper.compare --run runs/n64 --sample-count 1000     runs/n64/compare.json; digits take seconds

The loss of a denoiser D at noise sigma is E |D(y + sigma n; sigma) - y|^2 / dim, for pixels in [-1, 1]. Over
the training images nothing is lower than the optimum D* (paper, eq. 2 and 3), and the model's excess is
E |D - D*|^2 / dim. Over images of the same source outside the training set it is the optimum that fails: what
a model does better there, it generalizes.
With labels, both are given the same: the drawn one of a sample, an image's own. Outside, images count whose
label a training image has too.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import data
import memorize
import run
import sample
import unet
from kernels import Optimum, References
from run import option

BATCH = 256                       # images a pass
QUANTILES = range(0, 101, 5)      # per cent, of the ratio of nearest distances
SIGMAS = [round(0.02 * 4000 ** (i / 15), 6) for i in range(16)]  # 0.02 to 80, evenly in the logarithm


@dataclass(frozen=True)
class Options:
    run: str = option("", "run directory of a finished train.py", recorded=False)
    data: str = option("", "where the data of the run lie now, if they have moved", recorded=False)
    sample_count: int = option(10000, "samples of each, seeds 0, 1, ...")
    draws: int = option(1024, "noisy images a noise level, of the training set and of the images outside it")
    seed: int = option(0, "of that noise")
    out: str = option("", "JSON to write; compare.json in the run directory by default", recorded=False)
    pairs: str = option("", "also draw the model's samples beside their originals in this PNG, "
                            "the optimum's in NAME-closed-form.png", recorded=False)
    threshold: str = option("1/3", "memorized below this ratio of nearest distances")
    precision: str = option("auto", "of the trained network; auto is tf32 on CUDA, else fp32",
                            unet.PRECISION_CHOICES)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", recorded=False)
    threads: int = option(0, "CPU threads; 0 takes all cores", recorded=False)

    def __post_init__(self):
        if not self.run:
            raise ValueError("give --run, the directory of a finished train.py")
        if self.sample_count < 1 or self.draws < 1 or self.seed < 0:
            raise ValueError(f"--sample-count {self.sample_count}, --draws {self.draws}, --seed {self.seed}: "
                             "need at least 1, 1 and 0")
        memorize.parse_threshold(self.threshold)
        if self.pairs and not self.pairs.endswith(".png"):
            raise ValueError(f"--pairs {self.pairs} must end in .png")


def compare(options):
    """Compare the model of a run with the optimum of its training set; returns the path of the JSON.

    Raises ValueError if the run is not finished, its model of another run or the JSON there of another model.
    """
    device, folder = data.pick_device(options.device, options.threads), Path(options.run)
    options = dataclasses.replace(options, precision=unet.precision_on(device, options.precision))
    D, chosen = data.of_run(folder, options.data), data.options_of_run(folder, options.data)
    files = run.Directory(folder)
    model = files.model
    if not model.is_file():
        raise ValueError(f"{folder} has no model.safetensors yet; finish its training first")
    out = Path(options.out) if options.out else files.compare
    source = dict(weights_sha256=run.file_sha256(model), train_sha256=D.fingerprint()["sha256"])
    about = dict(options=run.recorded(options), source=source)
    sheets = []
    if options.pairs:
        pairs = Path(options.pairs)
        sheets = [pairs, pairs.with_stem(f"{pairs.stem}-closed-form")]
    if out.is_file():
        if different := run.differences(run.read_json(out), about, run.defaults(Options)):
            raise ValueError(f"{out} holds another comparison ({different}); "
                             "choose another --out, or remove it")
        if not sheets:
            return out
    whole = data.load(dataclasses.replace(chosen, n=0))
    outside, outside_labels = whole.images[len(D):], whole.labels[len(D):]
    if D.label_dim:
        known = torch.isin(outside_labels, D.labels)
        outside, outside_labels = outside[known], outside_labels[known]
    trained, metadata = checkpoint.load_model(model, device)
    if different := sample.foreign(metadata, run.read_json(files.config)):
        raise ValueError(f"{model} is not of the run in {folder} ({different}); restore it, or train again")
    optimum = Optimum(D.images.to(device), D.labels.to(device) if D.label_dim else None)
    denoisers = {"trained": trained.use(options.precision), "closed form": optimum}
    result = {name: {} for name in denoisers}
    weights = sample.weigh_labels(metadata["label_counts"], unseen=False)
    data.announce(options.device, device, sample.EVALUATIONS * options.sample_count * trained.flops(),
                  options.precision)
    references, threshold = References(D.images.to(device)), memorize.parse_threshold(options.threshold)
    for name, sheet in zip(denoisers, sheets or (None, None)):
        samples, _ = sample.generate(denoisers[name], range(options.sample_count), weights, device=device)
        summary, _, distances, index = memorize.score(samples.to(device), D.images, threshold, references)
        result[name] |= summary | dict(distance_ratio_quantiles=quantiles(distances))
        if sheet:
            with run.publish(sheet) as temporary:
                memorize.pair_sheet(samples, D.images, distances, index).save(temporary, format="PNG")
    for where, images, labels in (("loss", D.images, D.labels), ("loss_outside", outside, outside_labels)):
        if len(images):
            labels = labels.to(device) if D.label_dim else None
            loss, excess = losses(denoisers, images.to(device), options.draws, options.seed, labels)
            for name in denoisers:
                result[name][where] = loss[name]
            if where == "loss":
                result["trained"]["excess"] = excess
    result |= dict(sigmas=SIGMAS, quantiles=list(QUANTILES), images_outside=len(outside))
    run.write_json(out, result | about | run.provenance(device))
    return out


def quantiles(distances):
    """`QUANTILES` of the ratio of nearest to second nearest distance, of their squares int64 [N, 2]."""
    shares = torch.tensor(QUANTILES, dtype=torch.float64) / 100
    return torch.quantile(memorize.distance_ratio(distances), shares).tolist()


@torch.inference_mode()
def losses(denoisers, images, draws, seed=0, labels=None):
    """Losses at `SIGMAS` of each of {name: denoiser} on images uint8 [N, C, H, W], and E |D - D*|^2 / dim.

    All get the same noisy images: `draws` of them, each image as often, or evenly chosen ones where they are
    more; and their labels, if `labels` int64 [N] are given.
    """
    loss, apart = {name: [] for name in denoisers}, []
    index = torch.arange(draws, device=images.device)
    index = index % len(images) if draws >= len(images) else index * len(images) // draws
    for level, sigma in enumerate(SIGMAS):
        generator = torch.Generator().manual_seed(seed * len(SIGMAS) + level)
        noise = torch.randn(draws, *images.shape[1:], generator=generator).to(images.device)
        sums, difference = dict.fromkeys(denoisers, 0.0), 0.0
        for i, n in zip(index.split(BATCH), noise.split(BATCH)):
            y = images[i].double() / 127.5 - 1                         # [B, C, H, W]
            x = y + sigma * n
            at = torch.tensor(sigma, dtype=torch.float64, device=x.device)
            found = [D(x, at, labels[i] if labels is not None else None).double() for D in denoisers.values()]
            for name, mean in zip(denoisers, found):
                sums[name] += float((mean - y).square().sum())
            difference += float((found[0] - found[1]).square().sum())
        for name in denoisers:
            loss[name].append(sums[name] / noise.numel())
        apart.append(difference / noise.numel())
    return loss, apart


def in_words(path):
    """A comparison for people, its losses at a noise level where the optimum still knows the image."""
    result, lines = run.read_json(path), []
    for name in ("closed form", "trained"):
        r = result[name]
        outside = f", {r['loss_outside'][6]:.2g} outside" if "loss_outside" in r else ""
        lines.append(f"{name:>12}: {r['memorized']} of {r['samples']} samples memorized; "
                     f"loss at sigma {SIGMAS[6]:.2g}: {r['loss'][6]:.2g} on the training images{outside}")
    return "\n".join([*lines, f"wrote {path}"])


def main():
    run.stage(compare, Options, __doc__, say=in_words)


if __name__ == "__main__":
    main()
