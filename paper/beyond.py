"""What the experiments beyond the paper measure of a trained run: a number for each seed.

Read by paper.experiments, where an experiment's `measure` names one of these. Each takes a run directory of
emm.py, its emm.Options and the place in the table, and returns a number, or None where there is none.
"""
import dataclasses
from pathlib import Path

import numpy as np
import torch

import checkpoint
import data
import emm
import memorize
import run
import sample
from kernels import Optimum
from measure import neighbours as nearest, quality, which
from paper import agree, compare

SAMPLES = 2000  # of a model, to see which images are copied
DRAWS = 2000    # noisy images at each noise level
NOISY = 400     # noisy images at each noise level, for each snapshot
OUTSIDE = 500   # images outside D, to which samples are compared
LEVEL = 8       # of compare.SIGMAS, at which membership is told: 1.7


def compared(o, folder):
    """What paper.compare finds of a run."""
    there = compare.Options(run=str(folder), sample_count=SAMPLES, draws=DRAWS, threshold=o.threshold,
                            precision=o.precision, device=o.device, threads=o.threads,
                            out=str(folder / "beyond.json"))
    return run.read_json(compare.compare(there))


def repeated(o, folder, point):
    """How many times as often a repeated image is copied as another; None if no other is."""
    return compared(o, folder)["trained"]["repeated"]["times"]


def membership(o, folder, point):
    """The chance that the loss of a training image is below that of one outside, at `SIGMAS[LEVEL]`.

    At less noise the loss of a model that memorizes tells all of them apart.
    """
    return compared(o, folder)["trained"]["membership"][LEVEL]["auc"]


def isolation(o, folder, point):
    """Spearman's correlation of how often an image is copied with its distance to its nearest other."""
    return chosen(o, folder)["copies_nearest_correlation"]


def attraction(o, folder, point):
    """The same of the samples that are nearest to an image, memorized or not."""
    return chosen(o, folder)["samples_nearest_correlation"]


def chosen(o, folder):
    """measure.which of `SAMPLES` samples of a run's last weights."""
    path = folder / f"which-{SAMPLES}.json"
    if not path.exists():
        device, D = data.pick_device(o.device, o.threads), data.of_run(folder)
        net, about = compare.trained_model(folder, device)
        weights = sample.weigh_labels(about["label_counts"])
        x, _ = sample.generate(net.use(o.precision), range(SAMPLES), weights, device=device)
        _, verdict, _, index = memorize.score(x.to(device), D.images.to(device),
                                              memorize.parse_threshold(o.threshold))
        own = nearest.compared(D.images, D.images, 1 + which.NEIGHBOURS)[0].double().sqrt()
        run.write_json(path, which.which(verdict, index, own, D.labels))
    return run.read_json(path)


def precision(o, folder, point):
    """The share of the samples that are among images outside D, by measure.quality: their quality."""
    path = folder / f"precision-{o.sample_count}.json"
    if not path.exists():
        device, D = data.pick_device(o.device, o.threads), data.of_run(folder)
        net, about = compare.trained_model(folder, device)
        x, _ = sample.generate(net.use(o.precision), range(o.sample_count), sampling=o, device=device,
                               label_weights=sample.weigh_labels(about["label_counts"], o.sample_labels))
        others = data.outside(data.options_of_run(folder), D, OUTSIDE).images
        run.write_json(path, quality.prdc(*(quality.kind(images.to(device)) for images in (others, x))))
    return run.read_json(path)["precision"]


def excess(o, folder, point):
    """How far a model is from the optimum when half of its samples are copies: |D - optimum|^2 a pixel.

    A mean over `SIGMAS` of 0.2 to 2, of training images with noise; what the loss has in excess of its least.
    Interpolated between snapshots. None where fewer than half of the samples are copies at the end.
    """
    path = folder / "excess.json"
    if not path.exists():
        device, D = data.pick_device(o.device, o.threads), data.of_run(folder)
        optimum, rows = Optimum(D.images.to(device)), []
        middle = [0.2 <= sigma <= 2 for sigma in compare.SIGMAS]
        for step, found in run.read_json(run.Directory(folder).scores)["snapshots"].items():
            net, _ = checkpoint.load_model(folder / found["file"], device)
            with torch.inference_mode():
                _, apart = compare.losses(dict(net=net, optimum=optimum), D, NOISY, device=device)
            rows.append((int(step), found["hits"] / found["count"], float(apart[middle].mean())))
        run.write_json(path, dict(zip(("steps", "ratios", "apart"), zip(*rows))))
    found = run.read_json(path)
    ratios, apart = found["ratios"], found["apart"]
    i = next((i for i, ratio in enumerate(ratios) if ratio >= 0.5), 0)
    return float(np.interp(0.5, ratios[i - 1:i + 1], apart[i - 1:i + 1])) if i else None


def agreement(o, folder, point):
    """The share of seeds from which models of disjoint halves draw samples that are nearer to each other than
    each is to its own training images. `o` is of the first half; the second is trained here.
    """
    return halves(o, folder, point)["samples"]["share"]


def likeness(o, folder, point):
    """The distance of those samples as a share of that of two samples of different seeds."""
    found = halves(o, folder, point)["samples"]
    return found["rms_a_seed"] / found["rms_two_seeds"]


def halves(o, folder, point):
    """What paper.agree finds of a run on the first half, --part 1/2, beside one on the second."""
    seed = int(folder.parent.name.removeprefix("seed"))
    other = dataclasses.replace(o, part="2/2", out=o.out.replace("part-1-2", "part-2-2"))
    emm.find(other)
    there = Path(other.out) / f"seed{seed}" / f"n{point.n:06d}"
    return run.read_json(agree.agree(agree.Options(
        run=str(folder), other=str(there), sample_count=o.sample_count, draws=DRAWS, device=o.device,
        precision=o.precision, threads=o.threads)))




MEASURES = {"times as often": repeated, "AUC": membership, "precision": precision,
            "distance to the optimum": excess, "rank correlation of copies": isolation,
            "rank correlation of samples": attraction, "share that agrees": agreement,
            "distance, as a share of that of two seeds": likeness}
