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

import data
import disk
import memorize
import run
import sample
from diffusion import denoiser
from diffusion.solvers import PUBLISHED
from kernels import Optimum
from measure import sheets, which
from measure.denoisers import QUANTILES, SIGMAS, losses, membership
from run import option


@dataclass(frozen=True)
class Options(run.Checked):
    run: str = option("", "run directory of a finished train.py", recorded=False)
    data: str = option("", "where the data of the run lie now, if they have moved", recorded=False)
    sample_count: int = option(10000, "samples of each, seeds 0, 1, ...", least=1)
    draws: int = option(1024, "noisy images a noise level, of the training set and of the images outside it",
                        least=1)
    seed: int = option(0, "of that noise", least=0)
    out: str = option("", "JSON to write; compare.json in the run directory by default", recorded=False)
    threshold: str = option("1/3", "memorized below this ratio of nearest distances")
    precision: str = option("auto", "of the trained network; auto is tf32 on CUDA, else fp32",
                            denoiser.PRECISION_CHOICES)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", recorded=False)
    threads: int = option(0, "CPU threads; 0 takes all cores", recorded=False, least=0)

    def __post_init__(self):
        super().__post_init__()
        if not self.run:
            raise ValueError("give --run, the directory of a finished train.py")
        if self.out and not self.out.endswith(".json"):
            raise ValueError(f"--out {self.out} must end in .json")
        memorize.parse_threshold(self.threshold)


def compare(options):
    """Compare the model of a run with the optimum of its training set; returns the path of the JSON.

    Raises ValueError if the run is not finished, its model of another run or the JSON there of another model.
    """
    device = data.pick_device(options.device, options.threads)
    options = dataclasses.replace(options, precision=denoiser.precision_on(device, options.precision))
    D, chosen, trained, counts, source = model_of(options.run, options, device)
    out = Path(options.out) if options.out else Path(options.run) / "compare.json"
    about = dict(options=run.recorded(options),
                 source=source | dict(train_sha256=D.fingerprint()["sha256"]))
    if disk.earlier(out, about, run.defaults(Options)):
        return out
    outside = data.outside(chosen, D)
    shown = data.Images(D.images[D.shown], D.labels[D.shown], D.label_dim, [])
    optimum = Optimum(shown.images.to(device), shown.labels.to(device) if D.label_dim else None)
    nets, result = {"trained": trained, "closed form": optimum}, {}
    announce([trained], options, device)
    weights = sample.weigh_labels(counts, unseen=False)
    for name, each in nets.items():
        samples, summary, copied, distances, index = scored(each, D, weights, options, device)
        shares = torch.tensor(QUANTILES, dtype=torch.float64) / 100
        quantiles = torch.quantile(memorize.distance_ratio(distances), shares)
        result[name] = summary | dict(distance_ratio_quantiles=quantiles.tolist())
        if chosen.repeat:
            result[name]["repeated"] = of_repeated(D, index[copied, 0])
        sheets.save(sheets.pair_sheet(samples, D.images, distances, index),
                    out.with_name(f"{out.stem}-{name.replace(' ', '-')}.png"))
    inside = losses(nets.values(), shown, options.draws, options.seed, device)
    for name, loss in zip(nets, inside):
        result[name]["loss"] = loss.mean(1).tolist()
    if len(outside):
        others = losses(nets.values(), outside, options.draws, options.seed, device)
        for name, loss, other in zip(nets, inside, others):
            result[name]["loss_outside"] = other.mean(1).tolist()
            result[name]["membership"] = [membership(*both) for both in zip(loss, other)]
    result |= dict(sigmas=SIGMAS, quantiles=list(QUANTILES), images_outside=len(outside))
    disk.write_json(out, result | about | disk.provenance(device))
    return out


def model_of(folder, options, device):
    """A run's training set, its `data.Options`, its last model, images a label, and what identifies that."""
    D, chosen = data.of_run(folder, options.data), data.options_of_run(folder, options.data)
    net, counts, source, _ = sample.trained(
        sample.Options(run=str(folder), precision=options.precision), device)
    return D, chosen, net, counts, source


def announce(nets, options, device):
    """`data.announce` what it takes to sample networks."""
    flops = PUBLISHED.evaluations * options.sample_count * sum(net.model.flops() for net in nets)
    data.announce(options.device, device, flops, options.precision)


def scored(net, D, label_weights, options, device):
    """`sample_count` samples of a denoiser by the published sampler, and their `memorize.score`."""
    x, _ = sample.generate(net, range(options.sample_count), label_weights, device=device)  # [N, C, H, W]
    return x, *memorize.score(x.to(device), D.images.to(device),
                              memorize.parse_threshold(options.threshold))


def of_repeated(D, copied):
    """`which.times_as_often` of images that --repeat repeats and the rest, given those copied, int64 [M]."""
    repeated = torch.bincount(D.shown) > 1
    hits = int(repeated[copied].sum())
    return which.times_as_often((hits, len(copied) - hits), (int(repeated.sum()), int((~repeated).sum())))


def main():
    run.stage(compare, Options, __doc__, words="wrote {}".format)


if __name__ == "__main__":
    main()
