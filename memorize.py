"""Measure how many generated images are memorized: the share that all but repeats a training image.

    python memorize.py --samples runs/n1000 --train runs/n1000        a run's samples, its training set
    python memorize.py --samples my_samples/ --train my_training_images/ --pairs pairs.png --csv pairs.csv

A sample x is memorized if its L2 distance to the nearest training image is under 1/3 of that to the
second nearest (paper, section 2). Distances and verdicts are exact, in whole numbers. SAMPLES and TRAIN
are sources of images as for train.py --data, or run directories (their samples; their training set).

    python memorize.py --samples runs/n1000 --train runs/n1000 --held-out rest --curve curve.png --quality
    python memorize.py --samples runs/n1000 --train runs/n1000 --held-out rest --snapshots      all of a run
    python memorize.py --sample-features a.npz --train-features b.npz

What the other numbers answer, and how they mislead: docs/measure.md.
"""
import csv
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch

import data
import disk
import parallel
import run
import search
from kernels.nearest import is_memorized
from measure import curve, figures, quality, which, words
from measure.neighbours import compared, distance_ratio, near_the_mean
from measure.sheets import copied_sheet, pair_sheet, save
from measure.sides import is_run, of_source, samples_of_run, sides
from run import option

MAX_DENOMINATOR = 2**12   # of the threshold p/q: q^2 times a squared distance (below 2^39) stays within int64
NAMED = 20                # held-out images that are training images, by name at most
MORE = ("csv", "pairs", "curve", "which", "held_out", "quality", "spurious")


@dataclass(frozen=True)
class Options(data.Subset):
    samples: str = option("", "generated images: folder, zip, npz or npy file, or run directory",
                          recorded=False)
    train: str = option("", "training images: a source as for train.py --data, or run directory",
                        recorded=False)
    data: str = option("", "where the data of the run directory --train lie now, if they have moved",
                       recorded=False)
    threshold: str = option("1/3", "memorized below this ratio of nearest distances, "
                                   "a fraction p/q in (0, 1)")
    distinct: bool = option(False, "drop exact duplicates from the training images first")
    neighbours: int = option(0, "compare the nearest distance with the mean of this many nearest (50: "
                                "Carlini et al.); 0 takes the second nearest")
    mirror: bool = option(False, "also compare with mirrored training images")
    sample_features: str = option("", "npz of vectors [N, D] to measure in place of the samples' pixels",
                                  recorded=False)
    train_features: str = option("", "npz of the training images' vectors", recorded=False)
    distance: str = option("l2", "between vectors: l2 or cosine (one minus the similarity)", ("l2", "cosine"))
    held_out: str = option("", "also score images that were not trained on, the control: a source, or an npz "
                               "of vectors, or rest for those of --train's source that it leaves out",
                           recorded=False)
    quality: bool = option(False, "also precision, recall, density, coverage and Frechet distance",
                           recorded=False)
    snapshots: bool = option(False, "score the samples of every snapshot of the run directory --samples, and "
                                    "their quality: snapshots.json and snapshots.png there", recorded=False)
    spurious: bool = option(False, "also count samples that repeat other samples, and no training image",
                            recorded=False)
    curve: str = option("", "also the shares under every threshold, drawn here as PNG", recorded=False)
    which: str = option("", "also who is copied, with the most and the never copied images drawn here as PNG",
                        recorded=False)
    out: str = option("", "JSON to write; memorize.json or snapshots.json beside the samples of a run, by "
                          "default", recorded=False)
    csv: str = option("", "also write every sample with its two nearest training images here", recorded=False)
    pairs: str = option("", "also draw the most and the least memorized samples beside their nearest here",
                        recorded=False)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", recorded=False)
    threads: int = option(0, "CPU threads; 0 takes all cores", recorded=False, least=0)

    def __post_init__(self):
        super().__post_init__()
        vectors = bool(self.sample_features)
        for name in ("samples", "train"):
            if not getattr(self, name) and not vectors:
                raise ValueError(f"--{name} is needed: "
                                 "an image folder, a zip, an npz file or a run directory")
        parse_threshold(self.threshold)
        for name in ("pairs", "curve", "which"):
            if Path(value := getattr(self, name)).suffix.lower() not in ("", ".png"):
                raise ValueError(f"--{name} {value} is drawn as PNG; let it end in .png")
        for wrong, remedy in (
                (vectors != bool(self.train_features),
                 "--sample-features and --train-features are compared with each other; give both"),
                (self.out.endswith((".npz", ".safetensors")), f"--out {self.out} is JSON; name it .json"),
                (self.neighbours < 0 or self.neighbours == 1,
                 f"--neighbours {self.neighbours}: give 2 or more, such as 50, or 0 for the second nearest"),
                (not vectors and self.distance != "l2",
                 "--distance is for vectors; give --sample-features and --train-features"),
                (self.quality and self.distance != "l2",
                 "--quality is of L2 distances; leave out --distance"),
                (vectors and self.held_out == "rest",
                 "--held-out rest is of images; give the npz of their vectors"),
                (vectors and self.mirror, "--mirror is for images; give the vectors of mirrored ones too"),
                (vectors and (self.pairs or self.which) and not (self.samples and self.train),
                 "--pairs and --which draw images; give these too, in the vectors' order"),
                (self.mirror and (self.quality or self.snapshots),
                 "--quality compares images as they are; leave out --mirror"),
                (self.snapshots and (vectors or self.csv or self.pairs or self.curve or self.which
                                     or self.spurious),
                 "--snapshots takes many samples files, and --sample-features, --csv, --pairs, --curve, "
                 "--which and --spurious are of one; leave it, or these, out")):
            if wrong:
                raise ValueError(remedy)


def parse_threshold(text):
    """(p, q) of a threshold such as "1/3" or "0.5". Raises ValueError unless it lies strictly in (0, 1)."""
    try:
        ratio = Fraction(text)
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(0)
    if not 0 < ratio < 1 or ratio.denominator > MAX_DENOMINATOR:
        raise ValueError(f"--threshold {text!r} is not a fraction p/q strictly between 0 and 1 "
                         f"with q <= {MAX_DENOMINATOR}; give one such as 1/3")
    return ratio.numerator, ratio.denominator


def measured(x, train, threshold=(1, 3), neighbours=0, **how):
    """Verdicts bool [Q], squared distances [Q, K] and indices [Q, K] of x, on the CPU.

    x [Q, ...] and train [N, ...] are on one device, uint8 or floats; K is `neighbours`, or 2 without. Under
    torchrun every process measures its share, and has all. `how` is as for `compared`.
    """
    part = x[parallel.share(len(x))]
    squares, index = compared(part, train, neighbours or 2, **how)
    verdict = (near_the_mean if neighbours else is_memorized)(squares, threshold)
    return [parallel.gather(result) for result in (verdict, squares, index)]


def score(samples, train, threshold=(1, 3), neighbours=0, **how):
    """Compare samples with training images, both uint8 [*, C, H, W], or vectors, on one device.

    Returns a summary for JSON, and what `measured` does, to which `how` goes.
    Distances in the summary are L2 over pixel values 0..255; divide by sqrt(C H W) for the RMS of a pixel
    (what the published scorer prints).
    """
    verdict, squares, index = measured(samples, train, threshold, neighbours, **how)
    hits, count = int(verdict.sum()), len(samples)
    low, high = search.wilson(hits, count)
    mean = squares[:, :2].double().sqrt().mean(0).tolist()
    summary = dict(
        samples=count, training_images=len(train),
        memorized=hits, ratio=hits / count, interval_95=[low, high],
        threshold=f"{threshold[0]}/{threshold[1]}",
        copied_training_images=len(index[verdict, 0].unique()),
        pixel_exact_copies=int((squares[:, 0] == 0).sum()),
        copies_of_duplicates=int((squares[:, 1] == 0).sum()),
        mean_distance=mean[0], mean_second_distance=mean[1],
        duplicate_training_images=int(data.duplicates(train.cpu()).sum()))
    return summary, verdict, squares, index


def memorize(options):
    """Score the samples that the options name; returns the summary, which is also written to `out` if set.

    Raises ValueError for images that cannot be read or compared, or if `out` holds another result.
    """
    device = data.pick_device(options.device, options.threads)
    if options.snapshots:
        return memorize_snapshots(options, device)
    samples, train, held_out = sides(options)
    about = dict(options=run.recorded(options),
                 source=dict(samples_sha256=data.sha256(samples.values),
                             train_sha256=data.sha256(train.values)))
    out = Path(options.out) if options.out else None
    if not out and is_run(options.samples):
        out = Path(options.samples) / "memorize.json"
    there = disk.earlier(out, about, run.defaults(Options)) if out else {}
    if held_out and "held_out" in there and there["held_out"]["sha256"] != data.sha256(held_out.values):
        raise ValueError(f"{out} is of other held-out images; choose another --out, or remove it")
    if there and not any(getattr(options, name) for name in MORE):
        return there
    data.announce(options.device, device)
    with parallel.group(device):
        summary, found = scorer(options, train, held_out, device)(samples)
    if parallel.rank():
        return summary
    result = there | summary | about | disk.provenance(device)
    if out:
        disk.write_json(out, result)
    else:
        run.say("the result is only printed; --out FILE.json keeps it")
    verdict, squares, index = found
    if options.csv:
        write_csv(options.csv, verdict, squares, index, samples.names, train.names, options.neighbours)
    if options.curve:
        figures.draw_shares(result, options.curve)
    if options.pairs:
        save(pair_sheet(samples.images, train.images, squares, index, options.neighbours), options.pairs)
    if options.which:
        copies = torch.bincount(index[verdict, 0], minlength=len(train.names))
        save(copied_sheet(train.images, copies), options.which)
    return result


def memorize_snapshots(options, device):
    """`memorize` for every samples file of a run directory, with quality: a row for each, and a figure."""
    if not is_run(options.samples):
        raise ValueError(f"--snapshots takes a run directory, and --samples {options.samples} is none")
    pairs = samples_of_run(options.samples, every=True)
    _, train, held_out = sides(options)
    out = Path(options.out) if options.out else Path(options.samples) / "snapshots.json"
    about = dict(options=run.recorded(options), source=dict(
        samples_sha256=[disk.file_sha256(file) for _, file in pairs], train_sha256=data.sha256(train.values),
        held_out_sha256=held_out and data.sha256(held_out.values)))
    if there := disk.earlier(out, about, run.defaults(Options)):
        return there
    data.announce(options.device, device)
    if missing := len(disk.Directory(options.samples).snapshots()) - len(pairs):
        run.say(f"{missing} snapshots have no samples yet, and no row: "
                f"draw them with sample.py --run {options.samples}/SNAPSHOT.safetensors")
    rows = []
    with parallel.group(device):
        score_of = scorer(replace(options, quality=True), train, held_out, device)
        for weights, file in pairs:
            step = disk.metadata(weights).get("step") if weights.is_file() else None
            summary, _ = score_of(of_source(file, options.resolution))
            rows.append(dict(step=step, file=file.name) | summary)
    if parallel.rank():
        return dict(snapshots=[])
    result = dict(snapshots=rows) | about | disk.provenance(device)
    disk.write_json(out, result)
    figures.draw(figures.Options(quality=(str(out),), out=str(out.with_suffix(".png"))))
    return result


def scorer(options, train, held_out, device):
    """A function of samples (`Side`), which gives all that the options ask of them, and what `measured` does.

    The former is a dict for JSON, of rank 0 alone whole. What takes no samples is computed here, once.
    """
    y, h = (side and side.values.to(device) for side in (train, held_out))
    k, threshold = options.neighbours, parse_threshold(options.threshold)
    how = dict(mirror=options.mirror, cosine=options.distance == "cosine")
    held, own = h is not None and measured(h, y, threshold, k, **how), None
    if options.which:  # the first is the image itself
        own = compared(y, y, min(1 + which.NEIGHBOURS, len(y)), **how)[0]
    quality_of = options.quality and quality.against(y, h, own)

    def score_of(samples):
        x = samples.values.to(device)
        summary, *found = score(x, y, threshold, k, **how)
        verdict, squares, index = found
        if parallel.rank():
            return summary, found
        if options.sample_features:
            summary["vector_length"] = x.shape[1]
        if held:
            cells = curve.cells(y, x, h, mirror=options.mirror)
            control = curve.control(squares, *held[:2], cells, k)
            copied = (held[1][:, 0] == 0).nonzero()[:NAMED, 0].tolist()
            summary["held_out"] = control | dict(sha256=data.sha256(held_out.values),
                                                 names_in_training=[held_out.names[i] for i in copied])
        if options.curve:
            summary["curve"] = curve.curve(*(distance_ratio(f[1], k) for f in (found, held) if f))
        if options.quality:
            summary["quality"] = quality_of(x)
        if options.which:
            summary["which"] = which.which(verdict, index, own.cpu().double().sqrt(), train.classes)
        if options.spurious:
            # Pham et al. (2505.21777); the first is the sample itself, or its equal, at 0 as well
            other = compared(x, x, 2, **how)[0][:, 1].cpu()
            hits = int((~verdict & is_memorized(torch.stack([other, squares[:, 0]], 1), threshold)).sum())
            summary["spurious"] = dict(samples=hits, ratio=hits / len(x),
                                       interval_95=list(search.wilson(hits, len(x))))
        return summary, found
    return score_of


def write_csv(path, verdict, distances, index, sample_names, train_names, neighbours=0):
    """A line for each sample: whether it is memorized, its distances (L2, 0..255), and both images.

    In UTF-8; bytes of a name that are not UTF-8 are written as \\udc and their hexadecimal digits.
    """
    with disk.whole_file(path) as temporary, \
            open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(["sample", "memorized", "distance_ratio",
                        "distance", "second_distance", "nearest", "second_nearest"])
        ratios = distance_ratio(distances, neighbours).tolist()
        for i, name in enumerate(sample_names):
            d, (a, b, *_) = distances[i].double().sqrt().tolist(), index[i].tolist()
            table.writerow([name, int(verdict[i]), f"{ratios[i]:.6f}" if d[-1] else "",
                            f"{d[0]:.4f}", f"{d[1]:.4f}", train_names[a], train_names[b]])


def report(result):
    """The summary in words, for people."""
    if "snapshots" in result:
        return words.of_snapshots(result["snapshots"])
    given, (low, high) = result.get("options", {}), result["interval_95"]
    k, distance = given.get("neighbours", 0), given.get("distance", "l2").replace("l2", "L2")
    unit = f"vectors of {result['vector_length']}" if "vector_length" in result else "pixel values 0 to 255"
    lines = [f"{result['memorized']} of {result['samples']} samples memorized: {result['ratio']:.2%} "
             f"(95% interval {low:.2%} to {high:.2%}), ratio of distances under {result['threshold']}"
             + f" of the mean of the {k} nearest" * bool(k),
             f"{result['copied_training_images']} of {result['training_images']} training images copied "
             f"at least once; {result['pixel_exact_copies']} samples equal a training image in every value",
             f"mean {distance} distance to the nearest {result['mean_distance']:.4g}, to the second nearest "
             f"{result['mean_second_distance']:.4g} ({unit})"]
    if result["duplicate_training_images"]:
        lines.append(f"{result['duplicate_training_images']} training images repeat an earlier one: "
                     f"copies of those ({result['copies_of_duplicates']} exact ones) "
                     "cannot count as memorized; --distinct drops the repeats")
    return "\n".join(lines + words.beside(result))


def main():
    run.stage(memorize, Options, __doc__, words=report)


if __name__ == "__main__":
    main()
