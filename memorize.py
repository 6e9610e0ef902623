"""Measure how many generated images are memorized: the share that all but repeats a training image.

    python memorize.py --samples runs/n1000 --train runs/n1000        a run's samples, its training set
    python memorize.py --samples my_samples/ --train my_training_images/ --pairs pairs.png --csv pairs.csv

A sample x is memorized if its L2 distance to the nearest training image is under 1/3 of that to the
second nearest (paper, section 2). Distances and verdicts are exact, in whole numbers. SAMPLES and TRAIN
are sources of images as for train.py --data, or run directories (their samples; their training set).
"""
import csv
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import data
import parallel
import run
import search
from images import picture, read
from kernels import memorized
from run import option

MAX_DENOMINATOR = 2**12   # of the threshold p/q: q^2 times a squared distance (below 2^39) stays within int64
CELL = 96                 # pixels a side of an image on the pair sheet


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
    out: str = option("", "JSON to write; memorize.json beside the samples of a run, by default",
                      recorded=False)
    csv: str = option("", "also write every sample with its two nearest training images here", recorded=False)
    pairs: str = option("", "also draw the most and the least memorized samples beside their nearest here",
                        recorded=False)
    pair_rows: int = option(8, "samples of each kind on the pair sheet", recorded=False)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", recorded=False)
    threads: int = option(0, "CPU threads; 0 takes all cores", recorded=False)

    def __post_init__(self):
        super().__post_init__()
        for name in ("samples", "train"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is needed: "
                                 "an image folder, a zip, an npz file or a run directory")
        parse_threshold(self.threshold)
        if Path(self.pairs).suffix.lower() not in ("", ".png"):
            raise ValueError(f"--pairs {self.pairs} is drawn as PNG; let it end in .png")
        if self.pair_rows < 1:
            raise ValueError(f"--pair-rows {self.pair_rows}: at least 1")


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


def score(samples, train, threshold=(1, 3), references=None):
    """Compare samples with training images, both uint8 [*, C, H, W] on one device.

    `references` are the training images prepared, which may then lie elsewhere themselves.
    Returns a summary for JSON, and verdicts bool [Q], distances int64 [Q, 2] and indices int64 [Q, 2].
    Distances in the summary are L2 over pixel values 0..255; divide by sqrt(C H W) for the RMS of a pixel
    (what the published scorer prints).
    """
    with parallel.group(samples.device):
        part = memorized(samples[parallel.share(len(samples))], references or train, threshold)
        verdict, distances, index = (parallel.gather(a, len(samples)).cpu() for a in part)
    hits, count = int(verdict.sum()), len(samples)
    low, high = search.wilson(hits, count)
    mean = distances.double().sqrt().mean(0).tolist()
    summary = dict(
        samples=count, training_images=len(train),
        memorized=hits, ratio=hits / count, interval_95=[low, high],
        threshold=f"{threshold[0]}/{threshold[1]}",
        copied_training_images=len(index[verdict, 0].unique()),
        pixel_exact_copies=int((distances[:, 0] == 0).sum()),
        copies_of_duplicates=int((distances[:, 1] == 0).sum()),
        mean_distance=mean[0], mean_second_distance=mean[1],
        duplicate_training_images=int(data.duplicates(train.cpu()).sum()))
    return summary, verdict, distances, index


def memorize(options):
    """Score the samples that the options name; returns the summary, which is also written to `out` if set.

    Raises ValueError for images that cannot be read or compared, or if `out` holds another result.
    """
    device = data.pick_device(options.device, options.threads)
    train, train_names = training_images(options)
    folder = Path(options.samples) if run.Directory(options.samples).config.is_file() else None
    samples, _, sample_names = read(samples_of_run(folder) if folder else options.samples, options.resolution)
    if options.distinct:
        keep = ~data.duplicates(train)
        train, train_names = train[keep], [name for name, kept in zip(train_names, keep.tolist()) if kept]
    about = dict(options=run.recorded(options),
                 source=dict(samples_sha256=data.sha256(samples), train_sha256=data.sha256(train)))
    out = Path(options.out) if options.out else run.Directory(folder).memorize if folder else None
    if out and out.is_file():
        there = run.read_json(out)
        different = run.differences(there, about, run.defaults(Options))
        if different:
            raise ValueError(f"{out} holds another result ({different}); choose another --out, or remove it")
        if not options.csv and not options.pairs:
            return there
    data.announce(options.device, device)
    threshold = parse_threshold(options.threshold)
    summary, verdict, distances, index = score(samples.to(device), train.to(device), threshold)
    if parallel.rank():
        return summary
    result = summary | about | run.provenance(device)
    if out:
        run.write_json(out, result)
    if options.csv:
        write_csv(options.csv, distances, index, verdict, sample_names, train_names)
    if options.pairs:
        with run.publish(options.pairs) as temporary:
            pair_sheet(samples, train, distances, index, options.pair_rows).save(temporary, format="PNG")
    return result


def samples_of_run(folder):
    """The samples file of a run directory; if several are there, the largest of its last weights.

    Its name is samples.npz, samples-STEP.npz (of a snapshot) or samples-FIRST-LAST.npz (of seeds, as the
    Makefile names it). Raises ValueError if there is none, or if other weights than those beside it made it.
    """
    def of(file):
        """The step of the snapshot that a samples file is of; "~", which sorts last, for the last weights."""
        words = file.stem.split("-")
        return words[1] if len(words) == 2 else "~"

    found = max(folder.glob("samples*.npz"), key=lambda file: (of(file), file.stat().st_size), default=None)
    if not found:
        raise ValueError(f"{folder} has no samples yet; make them with: python sample.py --run {folder}")
    files = run.Directory(folder)
    model = files.model if of(found) == "~" else files.snapshot(int(of(found)))
    made_of = run.about(found).get("source", {}).get("weights_sha256")
    if made_of and model.is_file() and run.file_sha256(model) != made_of:
        raise ValueError(f"{found} was not drawn from {model}; remove it and sample again")
    return str(found)


def training_images(options):
    """The training images uint8 [N, C, H, W] and their names, of a run or of (a subset of) a source."""
    subset = {name: getattr(options, name) for name in ("n", "classes", "resolution", "subset_seed")}
    if run.Directory(options.train).config.is_file():
        if subset != dict(n=0, classes=0, resolution=0, subset_seed=None):
            raise ValueError(f"--train {options.train} is a run directory, "
                             "which has its own n, classes, resolution and subset-seed; leave them out")
        D = data.of_run(options.train, options.data)
    else:
        D = data.load(data.Options(data=options.train, **subset))
    return D.images, D.names


def write_csv(path, distances, index, verdict, sample_names, train_names):
    """A line for each sample: whether it is memorized, the ratio, both distances (L2, 0..255), both images.

    In UTF-8; bytes of a name that are not UTF-8 are written as \\udc and their hexadecimal digits.
    """
    with run.publish(path) as temporary, \
            open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(["sample", "memorized", "ratio",
                        "distance", "second_distance", "nearest", "second_nearest"])
        for i, name in enumerate(sample_names):
            d, (a, b) = distances[i].double().sqrt().tolist(), index[i].tolist()
            table.writerow([name, int(verdict[i]), f"{d[0] / d[1]:.6f}" if d[1] else "",
                            f"{d[0]:.4f}", f"{d[1]:.4f}", train_names[a], train_names[b]])


def distance_ratio(distances):
    """Nearest by second nearest distance, float64 [N], of their squares int64 [N, 2]; 1 where both are 0."""
    d = distances.double().sqrt()
    return torch.where(d[:, 1] > 0, d[:, 0] / d[:, 1], 1.0)


def pair_sheet(samples, train, distances, index, rows=8):
    """The most (left) and the least (right) memorized samples: sample, nearest, second nearest, ratio."""
    d, ratio = distances.double().sqrt(), distance_ratio(distances)
    order = ratio.argsort(stable=True).tolist()
    rows = min(rows, len(order))
    panels = (("most memorized", order[:rows]), ("least memorized", order[::-1][:rows]))
    pad, head, text = 8, 44, 88
    width = 3 * (CELL + pad) + text
    sheet = Image.new("RGB", (2 * width + 3 * pad, head + rows * (CELL + pad) + pad), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for panel, (title, chosen) in enumerate(panels):
        left = pad + panel * (width + pad)
        pen.text((left, 4), title, fill="black", font=font)
        for column, word in enumerate(("sample", "nearest", "second", "ratio")):
            pen.text((left + column * (CELL + pad), 24), word, fill="black", font=font)
        for row, i in enumerate(chosen):
            top = head + row * (CELL + pad)
            for column, image in enumerate((samples[i], train[index[i, 0]], train[index[i, 1]])):
                cell = picture(image.numpy()).resize((CELL, CELL), Image.Resampling.NEAREST)
                sheet.paste(cell, (left + column * (CELL + pad), top))
            lines = [f"{ratio[i]:.3f}" if d[i, 1] > 0 else "0 / 0", f"d1 {d[i, 0]:.1f}", f"d2 {d[i, 1]:.1f}"]
            pen.multiline_text((left + 3 * (CELL + pad), top + CELL // 4), "\n".join(lines),
                               fill="black", font=font)
    return sheet


def report(result):
    """The summary in words, for people."""
    low, high = result["interval_95"]
    lines = [f"{result['memorized']} of {result['samples']} samples memorized: {result['ratio']:.2%} "
             f"(95% interval {low:.2%} to {high:.2%}), ratio of distances under {result['threshold']}",
             f"{result['copied_training_images']} of {result['training_images']} training images copied "
             f"at least once; {result['pixel_exact_copies']} samples equal a training image in every pixel",
             f"mean L2 distance to the nearest {result['mean_distance']:.1f}, to the second nearest "
             f"{result['mean_second_distance']:.1f} (pixel values 0 to 255)"]
    if result["duplicate_training_images"]:
        lines.append(f"{result['duplicate_training_images']} training images repeat an earlier one: "
                     f"copies of those ({result['copies_of_duplicates']} to the pixel) "
                     "cannot count as memorized; --distinct drops the repeats")
    return "\n".join(lines)


def main():
    run.stage(memorize, Options, __doc__, say=report)


if __name__ == "__main__":
    main()
