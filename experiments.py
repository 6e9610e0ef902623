"""The experiments of the paper: what each varies, at the paper's scale and in minutes on a CPU; runs and results.

    python experiments.py --name width --scale cpu                 results/cpu/width.json and .png
    python experiments.py --name width --scale paper --dry-run     the commands, and what they cost
    make width SCALE=cpu

Every point is an emm.py command, printed before it runs: sizes measured in full, or a search for EMM. Its directory is
named after what differs from the base, so that what experiments have in common is trained once, and what was interrupted goes on.
Each point has a run for each of --seeds, which draw training set, weights and noise; its interval is Student's.
"""
import dataclasses
import hashlib
import json
import math
import shlex
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import data
import emm
import plan
import plot
import run
import train
import unet
from run import option

SCALES = ("cpu", "paper")
# What all points of a scale have in common. On a CPU: a recipe in which ratios lie between 10% and 95%.
BASE = dict(
    paper="--data cifar10",
    cpu="--data digits --width 8 --blocks 1 --channel-mult 2,2 --batch 64 --learning-rate 8e-3 --steps 400 --warmup-steps 50 "
        "--dropout 0 --ema-halflife 20 --ema-rampup-steps 50 --snapshots 2 --samples 256 --device cpu")
EMM_RANGE = dict(paper="--n-min 500", cpu="--n-min 3 --n-max 64 --tolerance 0.25")


@dataclass(frozen=True)
class Point:
    """A place in a figure: the line it belongs to, its x, the options that vary, and |D|; None asks for EMM."""
    series: str
    x: float | str
    words: str
    n: int | None = None


@dataclass(frozen=True)
class Experiment:
    about: str
    x: str
    paper: list
    cpu: list
    published: dict = field(default_factory=dict)  # series here -> (experiment, series) of paper/digitised.csv


def over(flag, *values, n=None, series="", also=""):
    """A point for each value of an option."""
    return [Point(series, value, f"{flag} {value} {also}".strip(), n) for value in values]


def sizes(*values, series="", words=""):
    """A point for each |D|."""
    return [Point(series, n, words, n) for n in values]


def each(words, n=None, series=""):
    """A point for each x: words."""
    return [Point(series, x, w, n) for x, w in words.items()]


def embeddings(*blocks):
    """Both time embeddings at each depth."""
    return [p for b in blocks for p in over("--embedding", "positional", "fourier", series=f"{b} blocks", also=f"--blocks {b}")]


def skips(levels, kept):
    """--skip-connections with those indices kept, counted from 1 in encoder order."""
    return "--skip-connections " + ",".join(str(int(i in kept)) for i in range(1, levels + 1))


def at_resolution(side, blocks, resolution):
    """Indices of the skips at one resolution, from 1."""
    level = int(math.log2(side // resolution))
    return range(level * (blocks + 1) + 1, (level + 1) * (blocks + 1) + 1)


def resolutions_of_skips(side, blocks, n, extra=""):
    count, parts = 3 * (blocks + 1), [side, side // 2, side // 4]
    points = [Point("all", "all", extra, n)]
    for r in parts:
        points.append(Point("one resolution", f"{r}x{r}", f"{skips(count, at_resolution(side, blocks, r))} {extra}".strip(), n))
    return points + [Point("one skip", str(i), f"{skips(count, [i])} {extra}".strip(), n) for i in range(1, count + 1)]


def random_labels(n, *counts):
    return each({count: f"--labels random:{count}" for count in counts}, n, f"|D| = {n}")


LABELS = {"none": "", "true": "--labels true", "random 10": "--labels random:10"}
THREE = "--channel-mult 2,2,2"  # resolutions, where the base on a CPU has two
NCSN = "--arch ncsnpp --precond ve"
BATCHES = {b: f"--batch {b} --learning-rate {b / 512 * 2e-4:g}" for b in (128, 256, 384, 512, 640, 768, 896)}
CPU_BATCHES = {b: f"--batch {b} --learning-rate {b / 64 * 8e-3:g} --steps {400 * 64 // b} --warmup-steps {50 * 64 // b}" for b in (32, 64, 128)}
DECAYS = ("0", "1e-5", "1e-4", "1e-3", "1e-2", "1e-1")
CPU_DECAYS = ("0", "1e-4", "1e-3", "1e-2", "1e-1")
EMA_RATES = ("0.99929", "0.999", "0.99", "0.9", "0.8", "0.5", "0.2", "0.1", "0")
CPU_EMA_RATES = ("0.99", "0.97", "0.9", "0.8", "0.5", "0")  # of 400 steps, and not of 78,000
UNIQUE = "--precond edm --blocks 4 --epochs 12000"

EXPERIMENTS = {
    "size": Experiment(
        "training set size", "training images |D|",
        sizes(500, 1000, 2000, 5000, 10_000, 20_000, 50_000), sizes(8, 16, 32, 64), {"": ("labels", "unconditional")}),
    "resolution": Experiment(
        "resolution, the same images resized", "pixels a side",
        over("--resolution", 32, 16, 8), over("--resolution", 16, 8, 4)),
    "classes": Experiment(
        "number of classes", "classes", over("--classes", 1, 2, 5, 10), over("--classes", 1, 2, 5, 10)),
    "width": Experiment("width of the U-Net", "width", over("--width", 128, 192, 256, 320), over("--width", 4, 8, 16)),
    "depth": Experiment("residual blocks a resolution", "blocks", over("--blocks", 2, 4, 6, 8, 10, 12), over("--blocks", 1, 2, 3)),
    "embedding": Experiment("time embedding", "embedding", embeddings(2, 4), embeddings(1, 2)),
    "skips": Experiment(
        "skip connections kept, DDPM++ with VP", "skips kept", resolutions_of_skips(32, 2, 1000), resolutions_of_skips(8, 1, 16, THREE),
        {"one skip": ("one_skip_kept", None), "one resolution": ("skips_kept_at_one_resolution", "three kept")}),
    "skips-ncsn": Experiment(
        "skip connections kept, NCSN++ with VE", "skips kept", resolutions_of_skips(32, 2, 1000, NCSN), resolutions_of_skips(8, 1, 16, f"{NCSN} {THREE}")),
    "batch": Experiment("batch, the rate in proportion", "batch", each(BATCHES, 2000, "|D| = 2000"), each(CPU_BATCHES, 16, "|D| = 16")),
    "batch-emm": Experiment("batch, the rate in proportion", "batch", each(BATCHES), each(CPU_BATCHES)),
    "weight-decay": Experiment(
        "weight decay", "weight decay", over("--weight-decay", *DECAYS, n=2000), over("--weight-decay", *CPU_DECAYS, n=16)),
    "ema": Experiment("rate of the average of the weights", "EMA rate", over("--ema-rate", *EMA_RATES, n=2000),
                      over("--ema-rate", *CPU_EMA_RATES, n=16)),
    "labels": Experiment(
        "labels the model is given", "training images |D|",
        [p for s, w in LABELS.items() for p in sizes(1000, 2000, 3000, 4000, 5000, series=s, words=w)],
        [p for s, w in LABELS.items() for p in sizes(16, 32, 64, series=s, words=w)],
        {"none": ("labels", "unconditional"), "true": ("labels", "true"), "random 10": ("labels", "random10")}),
    "random-labels": Experiment(
        "number of random labels", "random labels",
        random_labels(1000, 1, 2, 5, 10, 20, 50, 100) + random_labels(2000, 1, 2, 5, 10, 20, 50, 100)
        + random_labels(5000, 1, 10, 50, 100, 500, 1000),
        random_labels(32, 1, 2, 5, 10, 20),
        {f"|D| = {n}": ("random_labels", "random") for n in (1000, 2000, 5000)}),
    "unique": Experiment(
        "a label for every image, EDM preconditioning", "labels",
        over("--labels", "none", "unique", n=50_000, also=UNIQUE), over("--labels", "none", "unique", n=64, also="--precond edm")),
}


@dataclass(frozen=True)
class Options:
    name: str = option("size", "experiment, or all of them in order", ("all", *EXPERIMENTS))
    scale: str = option("cpu", "the paper's settings, or minutes on a CPU", SCALES)
    seeds: tuple[int, ...] = option((0, 1, 2), "a run of every point for each")
    words: str = option("", "options of emm.py for all points, such as '--data my.zip --device cuda:1'")
    runs: str = option("runs", "directory of the runs")
    out: str = option("results", "directory of result files and figures")
    dry_run: bool = option(False, "print the commands and what they cost, and run nothing")

    def __post_init__(self):
        if not self.seeds:
            raise ValueError("--seeds is empty; give one or more, such as 0,1,2")


def points(name, scale):
    return getattr(EXPERIMENTS[name], scale)


def commands(options, name):
    """The emm.py commands of an experiment: words -> its points. Points that differ in |D| alone share one."""
    found = {}
    for point in points(name, options.scale):
        if point.n is None:
            how = EMM_RANGE[options.scale]
        else:
            how = "--full --sizes " + ",".join(str(p.n) for p in points(name, options.scale) if p.words == point.words)
        base = " ".join(part for part in (BASE[options.scale], point.words, options.words) if part)
        out = Path(options.runs) / options.scale / f"{'emm' if point.n is None else 'full'}-{directory(base, BASE[options.scale])}"
        words = f"{base} {how} --seeds {','.join(map(str, options.seeds))} --out {out}"
        found.setdefault(words, []).append(point)
    return found


def directory(words, base):
    """A directory's name for options of emm.py: those that differ from the base's, and a digest where that is long.

    The same for the same options, however they are written: what two experiments share is found again.
    """
    usual = run.recorded(parsed(base))
    given = {key: value for key, value in run.recorded(parsed(words)).items() if value != usual[key]}
    name = "_".join(f"{key}-{','.join(map(str, value)) if isinstance(value, list) else value}" for key, value in sorted(given.items()))
    name = "".join(c if c.isalnum() or c in "._,-" else "-" for c in name) or "base"
    return name if len(name) <= 80 else f"{name[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def parsed(words):
    return run.parse(emm.Options, shlex.split(words))


def price(options, words):
    """Images trained and FLOPs of a command, training and sampling, on all seeds. EMM counts as one training of |D| =
    1,000 at paper scale, 32 on a CPU: what is not known before."""
    o = parsed(words)
    sizes = o.sizes or (1000 if options.scale == "paper" else 32,)
    side = o.resolution or (32 if o.data == "cifar10" else 8)
    D = unet.Denoiser(o.arch, o.precond, side, 1 if o.data == "digits" else 3, data.label_count(o.labels, max(sizes), 10), o.width, o.blocks,
                      o.channel_mult, o.attn_resolutions, o.embedding, o.skip_connections, o.dropout)
    cost = cost_of(json.dumps(D.config | dict(skip_connections=None, dropout=0)))
    trained = len(options.seeds) * sum(train.total_steps(o, n) * o.batch for n in sizes)
    sampled = len(options.seeds) * len(sizes) * plan.sampling_flops(cost, o.snapshots, o.samples)
    return trained, trained * cost.step_flops + sampled


@lru_cache(maxsize=None)
def cost_of(config):
    """plan.cost of a network, skips all kept: those that are not kept save next to nothing."""
    return plan.cost(unet.Denoiser(**json.loads(config)))


def experiment(options):
    """Run an experiment, or print what it would be; returns the paths of its result files."""
    names = list(EXPERIMENTS) if options.name == "all" else [options.name]
    if options.dry_run:
        done, total = set(), 0
        for name in names:
            print(f"# {name}: {EXPERIMENTS[name].about}")
            for words, chosen in commands(options, name).items():
                trained, flops = price(options, words)
                shared = words in done
                total += 0 if shared else flops
                done.add(words)
                print(f"python emm.py {words}    # {trained:,} images, {flops:.2g} FLOP"
                      f"{' (shared)' if shared else ''}{'' if chosen[0].n else ', for one size of the search'}")
        print(f"# {total:.3g} FLOP in all, {plan.hours(total, 'H100', 'fp32'):,.1f} hours on an H100 in float32 at the assumed "
              f"{plan.UTILISATION['fp32']:.0%} of its peak")
        return []
    return [one(options, name) for name in names]


def one(options, name):
    results = []
    for words, chosen in commands(options, name).items():
        print(f"python emm.py {words}", flush=True)
        path = emm.find(parsed(words))
        searches = [run.read_json(path.parent / part) for part in run.read_json(path)["searches"]]
        for point in chosen:
            probes = [next(p for p in search["probes"] if p["n"] == point.n) for search in searches] if point.n else []
            values = [probe["ratio"] for probe in probes] or [search["emm"] for search in searches]
            mean = emm.mean_interval(values)
            results.append(dataclasses.asdict(point) | dict(
                command=f"python emm.py {words}", runs=str(path.parent), values=values, mean=mean["emm"], interval=mean["interval"],
                trajectories=[probe["trajectory"] for probe in probes]))
    path = Path(options.out) / options.scale / f"{name}.json"
    order = {(p.series, p.x, p.n): i for i, p in enumerate(points(name, options.scale))}
    results.sort(key=lambda r: order[r["series"], r["x"], r["n"]])
    e = EXPERIMENTS[name]
    run.write_json(path, dict(
        name=name, scale=options.scale, about=e.about, x=e.x, measure="ratio" if results[0]["n"] else "emm", seeds=options.seeds,
        published=published(e) if options.scale == "paper" else [], options=run.recorded(options), **run.provenance(), points=results))
    plot.plot(plot.Options(experiment=str(path)))
    return path


def published(e):
    """The published points of an experiment, read off the paper's figures: series, x and ratio of each."""
    found = []
    for row in plot.published_rows():
        for series, (name, theirs) in e.published.items():
            same_size = not series.startswith("|D|") or series == f"|D| = {row['n_train']}"
            if row["experiment"] == name and theirs in (None, row["series"]) and same_size:
                x = f"{row['x']}x{row['x']}" if row["x_name"] == "resolution" else row["x"]
                found.append(dict(series=series, x=x, ratio=float(row["ratio_percent"]) / 100))
    return found


def main():
    for path in run.stage(experiment, Options, __doc__):
        print(f"wrote {path} and its figure")


if __name__ == "__main__":
    main()
