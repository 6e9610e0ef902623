"""What the experiments beyond the paper measure of a trained run: a number for each seed.

Read by paper.experiments, where an experiment's `measure` names one of `MEASURES`. Each takes emm.Options and
a run directory of emm.py, and returns a number, or None where there is none.
"""
import dataclasses
from pathlib import Path

import numpy as np

import checkpoint
import data
import disk
import emm
import memorize
import sample
from kernels import Optimum
from measure import quality, which
from measure.denoisers import SIGMAS, losses, membership
from measure.neighbours import compared
from paper import agree, compare

SAMPLES = 2000  # of a model, to see which images are copied
DRAWS = 2000    # noisy images at a noise level
NOISY = 400     # of them for each snapshot
OUTSIDE = 500   # images outside D, to which samples are compared
LEVEL = 8       # of measure.denoisers.SIGMAS, at which membership is told: 1.7


def drawn(o, folder, count):
    """The training set of a run, its last model, `count` samples by the sampler of `o`, and their device."""
    device = data.pick_device(o.device, o.threads)
    D, _, net, counts, _ = compare.model_of(folder, o, device)
    x, _ = sample.generate(net, range(count), sample.weigh_labels(counts, o.sample_labels), sampling=o,
                           device=device)
    return D, net, x.to(device), device


def of_last_weights(o, folder):
    """Of a run's last weights, as a dict: measure.which of `SAMPLES` samples, `membership` and `repeated`.

    Membership is told by the loss at `SIGMAS[LEVEL]`: at less noise that of a model that memorizes tells all
    training images from those outside.
    """
    path = folder / f"beyond-{SAMPLES}.json"
    if not path.exists():
        D, net, x, device = drawn(o, folder, SAMPLES)
        _, verdict, _, index = memorize.score(x, D.images.to(device), memorize.parse_threshold(o.threshold))
        own = compared(D.images, D.images, 1 + which.NEIGHBOURS)[0].double().sqrt()
        found = which.which(verdict, index, own, D.labels)
        outside = data.outside(data.options_of_run(folder), D)
        if len(outside):
            of_both = [losses([net], images, DRAWS, device=device, levels=[LEVEL])[0, 0]
                      for images in (D, outside)]
            found["membership"] = membership(*of_both)
        if D.shown is not ...:
            found["repeated"] = compare.of_repeated(D, index[verdict, 0])
        disk.write_json(path, found)
    return disk.read_json(path)


def sample_precision(o, folder):
    """The share of the samples that are among images outside D, by measure.quality: their quality."""
    path = folder / f"precision-{o.sample_count}.json"
    if not path.exists():
        D, _, x, _ = drawn(o, folder, o.sample_count)
        others = data.outside(data.options_of_run(folder), D, OUTSIDE).images
        # on the CPU, where distances of images are whole numbers, and no TF32 rounds them
        disk.write_json(path, quality.prdc(quality.kind(others), quality.kind(x.cpu())))
    return disk.read_json(path)["precision"]


def excess(o, folder):
    """How far a model is from the optimum when half of its samples are copies: |D - optimum|^2 a pixel.

    A mean over `SIGMAS` of 0.2 to 2, of training images with noise; what the loss has in excess of its least.
    Interpolated between snapshots. None where fewer than half of the samples are copies at the end.
    """
    path = folder / "excess.json"
    if not path.exists():
        device, D = data.pick_device(o.device, o.threads), data.of_run(folder)
        optimum, rows = Optimum(D.images.to(device)), []
        middle = [level for level, sigma in enumerate(SIGMAS) if 0.2 <= sigma <= 2]
        for step, found in disk.read_json(disk.Directory(folder).scores)["snapshots"].items():
            net = checkpoint.load_model(folder / found["file"], device)[0].use(o.precision)
            _, _, apart = losses([net, optimum], D, NOISY, device=device, levels=middle)
            rows.append((int(step), found["hits"] / found["count"], float(apart.mean())))
        disk.write_json(path, dict(zip(("steps", "ratios", "apart"), zip(*rows))))
    found = disk.read_json(path)
    ratios, apart = found["ratios"], found["apart"]
    i = next((i for i, ratio in enumerate(ratios) if ratio >= 0.5), None)
    if i is None:
        return None
    if i == 0:
        raise ValueError(f"{folder}: {ratios[0]:.0%} are copies in its first snapshot; take earlier ones")
    return float(np.interp(0.5, ratios[i - 1:i + 1], apart[i - 1:i + 1]))


def likeness(o, folder):
    """How far the samples of a seed of models of disjoint halves are apart, as a share of that of two seeds.

    `o` and `folder` are of the first half, --part 1/2; the second is trained here.
    """
    other = dataclasses.replace(o, part="2/2", out=f"{o.out}-other-half")
    emm.find(other)
    found = disk.read_json(agree.agree(agree.Options(
        run=str(folder), other=str(Path(other.out, *folder.parts[-2:])), sample_count=o.sample_count,
        draws=DRAWS, device=o.device, precision=o.precision, threads=o.threads)))["samples"]
    return found["rms_a_seed"] / found["rms_two_seeds"]


def correlation(name):
    return lambda o, folder: of_last_weights(o, folder)[f"{name}_nearest_correlation"]


MEASURES = {
    # how many times as often a repeated image is copied as another
    "times as often": lambda o, folder: of_last_weights(o, folder)["repeated"]["times"],
    # the chance that the loss of a training image is below that of one outside
    "AUC": lambda o, folder: of_last_weights(o, folder)["membership"]["auc"],
    # Spearman's, of how often an image is copied with its distance to its nearest other
    "rank correlation of copies": correlation("copies"),
    # the same of the samples that are nearest to an image, memorized or not
    "rank correlation of samples": correlation("samples"),
    "precision of samples": sample_precision, "distance to the optimum": excess,
    "distance, as a share of that of two seeds": likeness}
