"""Set two trained models beside each other: do both draw what the distribution has, or each its own images?

    python -m paper.agree --run runs/half1 --other runs/half2     runs/half1/agree.json and agree.png

For runs of train.py on disjoint training sets, such as --part 1/2 and --part 2/2. Both models get the same
seeds and the same noisy images. Those that replay differ as their training images do; those that have learnt
the distribution draw nearly the same sample from a seed (Kadkhodaie et al., arXiv 2310.02557). So do models
that are hardly trained, far from any image: only together with low losses does agreement tell anything.
Samples differ by the root mean square of a pixel, of 0 to 255, denoisers by E |D_1 - D_2|^2 / dim, for pixels
in [-1, 1].
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import disk
import plot
import run
import sample
from diffusion import denoiser
from measure.denoisers import QUANTILES, SIGMAS, agreement, losses
from paper import compare
from run import option


@dataclass(frozen=True)
class Options(compare.Options):
    other: str = option("", "run directory of the second", recorded=False)
    out: str = option("", "JSON to write, with a PNG beside it; agree.json in the run directory by default",
                      recorded=False)

    def __post_init__(self):
        super().__post_init__()
        if not self.other:
            raise ValueError("give --other, the directory of the second finished train.py")


def agree(options):
    """Compare the models of two runs; returns the path of the JSON. One that exists is kept.

    Raises ValueError for runs that are not finished, or whose models cannot be given the same.
    """
    device = data.pick_device(options.device, options.threads)
    options = dataclasses.replace(options, precision=denoiser.precision_on(device, options.precision))
    models = [compare.model_of(folder, options, device) for folder in (options.run, options.other)]
    sets, chosen, nets, counts, sources = zip(*models)
    if sets[0].images.shape[1:] != sets[1].images.shape[1:] or chosen[0].labels != chosen[1].labels \
            or sets[0].label_dim != sets[1].label_dim or chosen[0].labels not in ("none", "true"):
        raise ValueError(f"{options.run} and {options.other} differ in the shape of images or the meaning "
                         "of labels; take runs alike in both, with --labels none or true")
    out = Path(options.out) if options.out else Path(options.run) / "agree.json"
    about = dict(options=run.recorded(options), source={
        f"weights_sha256_of_{which}": source["weights_sha256"]
        for which, source in zip(("first", "second"), sources)})
    if disk.earlier(out, about, run.defaults(Options)):
        return out
    compare.announce(nets, options, device)
    samples, summaries, _, distances, _ = zip(*(
        compare.scored(net, D, sample.weigh_labels(counts[0]), options, device)
        for net, D in zip(nets, sets)))
    neither, shared = outside_both(chosen[0], *sets)
    result = dict(other=str(Path(options.other).resolve()), training_images=[len(D) for D in sets],
                  shared_training_images=shared, ratios=[summary["ratio"] for summary in summaries],
                  samples=agreement(*samples, *(squares[:, 0] for squares in distances)),
                  sigmas=SIGMAS, denoisers={})
    for where, images in (("first", sets[0]), ("second", sets[1]), ("neither", neither)):
        if len(images):  # of a training set that takes all of its part, nothing is left
            first, second, apart = losses(
                nets, images, options.draws, options.seed, device).mean(2).tolist()
            result["denoisers"][where] = dict(
                images=len(images), apart=apart, loss=dict(first=first, second=second))
    plot.save(figure(result), out.with_suffix(".png"))
    disk.write_json(out, result | about | disk.provenance(device))
    return out


def outside_both(options, D, other):
    """The images of D's source, by its `data.Options`, outside both, as `Images`; how many both have."""
    rest = data.outside(options, D)
    known = data.duplicates(torch.cat([D.images, other.images, rest.images]))
    _, in_other, in_rest = known.split([len(D), len(other), len(rest)])
    shared = int((in_other & ~data.duplicates(other.images)).sum())
    return data.Images(rest.images[~in_rest], rest.labels[~in_rest], rest.label_dim, []), shared


@plot.plain_matplotlib()
def figure(result):
    """Left the distances of samples, right those of the denoisers at each noise level."""
    drawn, (left, right) = plot.subplots(2, width=11)
    names = dict(a_seed="the other's of that seed", two_seeds="the other's of another seed",
                 training="its nearest training image")
    for (name, label), colour in zip(names.items(), plot.COLOURS):
        left.plot(result["samples"][f"quantiles_{name}"], list(QUANTILES), color=colour, label=label)
    left.set(xlabel="from a sample to ..., root mean square of a pixel of 0 to 255", xlim=0, ylim=(0, 100),
             ylabel="% of the samples")
    for (where, found), colour in zip(result["denoisers"].items(), plot.COLOURS):
        right.loglog(result["sigmas"], found["apart"], color=colour, label=f"images of {where}: difference")
        right.loglog(result["sigmas"], found["loss"]["first"], ":", color=colour, label="loss of the first")
    right.set(xlabel=r"noise $\sigma$", ylabel="mean square of a pixel of -1 to 1")
    left.legend(fontsize="x-small"), right.legend(fontsize="x-small")
    return drawn


def in_words(path):
    """A comparison for people."""
    result = disk.read_json(path)
    s, (low, high), (first, second) = result["samples"], result["samples"]["interval"], result["ratios"]
    lines = []
    if shared := result.get("shared_training_images"):  # files of older versions do not say
        sizes = " and ".join(map(str, result["training_images"]))
        lines.append(f"{shared} images are in both training sets, of {sizes}: "
                     "models that replay them agree as well; train on --part 1/2 and --part 2/2")
    return "\n".join(lines + [
        f"{s['closer']} of {s['count']} pairs of a seed are closer than their training images: "
        f"{s['share']:.2%} (95% interval {low:.2%} to {high:.2%})",
        f"root mean square of a pixel, of 0 to 255: {s['rms_a_seed']:.1f} between samples of a seed, "
        f"{s['rms_two_seeds']:.1f} of two seeds, {s['rms_training']:.1f} to training images",
        f"memorized: {first:.2%} and {second:.2%} of the samples", f"wrote {path}"])


def main():
    run.stage(agree, Options, __doc__, words=in_words)


if __name__ == "__main__":
    main()
