"""Set a trained model beside the closed-form optimum of its training set: copies, distances, loss by noise.

    python -m paper.compare --run runs/n64 --sample-count 1000     digits take seconds

Writes runs/n64/compare.json, and beside it the samples with their originals, compare-trained.png and
compare-closed-form.png.

The loss of a denoiser D at noise sigma is E |D(y + sigma n; sigma) - y|^2 / dim, for pixels in [-1, 1]. Over
the training images nothing is lower than the optimum (paper, eq. 2 and 3). Over images of the same source
outside the training set it is the optimum that fails: what a model does better there, it generalizes.
How well the loss tells the training images from those is `membership`, at each noise level. Of a run with
--repeat it is counted how much more often repeated images are copied.
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
import search
import unet
from diffusion.solvers import Sampling
from kernels import Optimum
from run import option

BATCH = 256                       # images a pass
MOST_FALSE = 0.01                 # of the images outside that a test of membership takes for members
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


def compare(options):
    """Compare the model of a run with the optimum of its training set; returns the path of the JSON.

    Raises ValueError if the run is not finished, its model of another run or the JSON there of another model.
    """
    device, folder = data.pick_device(options.device, options.threads), Path(options.run)
    options = dataclasses.replace(options, precision=unet.precision_on(device, options.precision))
    D, chosen = data.of_run(folder, options.data), data.options_of_run(folder, options.data)
    trained, metadata = trained_model(folder, device)
    out = Path(options.out) if options.out else folder / "compare.json"
    source = dict(weights_sha256=run.file_sha256(run.Directory(folder).model),
                  train_sha256=D.fingerprint()["sha256"])
    about = dict(options=run.recorded(options), source=source)
    if out.is_file():
        if different := run.differences(run.read_json(out), about, run.defaults(Options)):
            raise ValueError(f"{out} holds another comparison ({different}); "
                             "choose another --out, or remove it")
        return out
    outside = data.outside(chosen, D)
    shown = data.Images(D.images[D.shown], D.labels[D.shown], D.label_dim, [])
    optimum = Optimum(shown.images.to(device), shown.labels.to(device) if D.label_dim else None)
    denoisers = {"trained": trained.use(options.precision), "closed form": optimum}
    result, weights = {}, sample.weigh_labels(metadata["label_counts"], unseen=False)
    data.announce(options.device, device, Sampling().evaluations * options.sample_count * trained.flops(),
                  options.precision)
    images, threshold = D.images.to(device), memorize.parse_threshold(options.threshold)
    for name, denoiser in denoisers.items():
        samples, _ = sample.generate(denoiser, range(options.sample_count), weights, device=device)
        summary, copied, distances, index = memorize.score(samples.to(device), images, threshold)
        shares = torch.tensor(QUANTILES, dtype=torch.float64) / 100
        quantiles = torch.quantile(memorize.distance_ratio(distances), shares)
        result[name] = summary | dict(distance_ratio_quantiles=quantiles.tolist())
        if chosen.repeat:
            result[name]["repeated"] = of_repeated(D, index[copied, 0])
        with run.publish(out.with_name(f"{out.stem}-{name.replace(' ', '-')}.png")) as temporary:
            memorize.pair_sheet(samples, D.images, distances, index).save(temporary, format="PNG")
    loss, _ = losses(denoisers, shown, options.draws, options.seed, device)
    for name in denoisers:
        result[name]["loss"] = loss[name].mean(1).tolist()
    if len(outside):
        others, _ = losses(denoisers, outside, options.draws, options.seed, device)
        for name in denoisers:
            result[name]["loss_outside"] = others[name].mean(1).tolist()
            result[name]["membership"] = [membership(*both) for both in zip(loss[name], others[name])]
    result |= dict(sigmas=SIGMAS, quantiles=list(QUANTILES), images_outside=len(outside))
    run.write_json(out, result | about | run.provenance(device))
    return out


def trained_model(folder, device="cpu"):
    """The model of a finished run directory, and what its file records of itself.

    Raises ValueError if the run is not finished, or its model of another run.
    """
    files = run.Directory(folder)
    if not files.model.is_file():
        raise ValueError(f"{folder} has no model.safetensors yet; finish its training first")
    D, metadata = checkpoint.load_model(files.model, device)
    if different := run.differences(metadata, run.read_json(files.config)):
        raise ValueError(f"{files.model} is not of the run in {folder} ({different}); "
                         "restore it, or train again")
    return D, metadata


def of_repeated(D, copied):
    """`search.times_as_often` of images that --repeat repeats and the rest, given those copied, int64 [M]."""
    repeated = torch.bincount(D.shown) > 1
    hits = int(repeated[copied].sum())
    return search.times_as_often((hits, len(copied) - hits), (int(repeated.sum()), int((~repeated).sum())))


def membership(members, others, most=MOST_FALSE):
    """How well low losses tell members from others, float64 [*] and [*], as a dict:

    auc  the chance that a member's is the lower, where equal ones count half
    tpr  the share of members under the threshold that at most a share `most` of others is under
    """
    sorted_others = others.sort().values
    lower, no_higher = (torch.searchsorted(sorted_others, members, right=right) for right in (False, True))
    threshold = sorted_others[int(most * len(others) + 1e-9)]  # 0.29 * 100 is 28.999...
    return dict(auc=1 - float((lower + no_higher).double().mean()) / (2 * len(others)),
                tpr=float((members < threshold).double().mean()))


@torch.inference_mode()
def losses(denoisers, D, draws, seed=0, device="cpu"):
    """Losses at `SIGMAS` of two {name: denoiser} on images D (data.Images), and |one - other|^2 / dim.

    float64 [levels, draws] each. Both get the same noisy images, each of D as often, or evenly chosen ones
    where those are more than draws; and their labels, if D has any.
    """
    loss, apart = {name: [] for name in denoisers}, []
    index = torch.arange(draws)
    index = index % len(D) if draws >= len(D) else index * len(D) // draws
    for level, sigma in enumerate(SIGMAS):
        generator = torch.Generator().manual_seed(seed * len(SIGMAS) + level)
        noise = torch.randn(draws, *D.images.shape[1:], generator=generator)
        for i, n in zip(index.split(BATCH), noise.split(BATCH)):
            y = D.images[i].to(device).double() / 127.5 - 1            # [B, C, H, W]
            x = y + sigma * n.to(device)
            at = torch.tensor(sigma, dtype=torch.float64, device=device)
            labels = D.labels[i].to(device) if D.label_dim else None
            one, other = (denoise(x, at, labels).double() for denoise in denoisers.values())
            for name, mean in zip(denoisers, (one, other)):
                loss[name].append((mean - y).square().flatten(1).mean(1).cpu())
            apart.append((one - other).square().flatten(1).mean(1).cpu())
    levels = (len(SIGMAS), draws)
    return {name: torch.cat(loss[name]).reshape(levels) for name in loss}, torch.cat(apart).reshape(levels)


def main():
    run.stage(compare, Options, __doc__, say="wrote {}".format)


if __name__ == "__main__":
    main()
