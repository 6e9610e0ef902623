"""Run the experiments of the paper (paper/protocol.py) at the paper's scale or in minutes on a CPU.

    python -m paper.experiments --name width --scale cpu                 paper/results/cpu/width.json and .png
    python -m paper.experiments --name width --scale paper --dry-run     the commands, and what they cost
    make width SCALE=cpu

Every point is an emm.py command, printed before it runs: sizes measured in full, or a search for EMM. Its
directory is named after what differs from the base, so that what experiments have in common is trained once,
and what was interrupted goes on. Each point has a run for each of --seeds, which draw training set, weights
and noise; its interval is Student's.
"""
import dataclasses
import hashlib
import json
import shlex
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import data
import emm
import plot
import run
import search
import train
import unet
from bench import plan
from images import read, there
from paper import compare
from paper.protocol import BASE, EMM_RANGE, EXPERIMENTS, NATIVE, SCALES
from run import option

ASSUMED_EMM = dict(paper=1000, cpu=8)  # to price searches: the paper's base run, and this table's on a CPU


@dataclass(frozen=True)
class Options:
    name: str = option("size", "experiment, or all of them in order", ("all", *EXPERIMENTS))
    scale: str = option("cpu", "the paper's settings, or minutes on a CPU", SCALES)
    seeds: tuple[int, ...] = option((0, 1, 2), "a run of every point for each")
    words: str = option("", "options of emm.py for all points, such as '--data my.zip --device cuda:1'")
    runs: str = option("runs", "directory of the runs")
    out: str = option("paper/results", "directory of result files and figures")
    dry_run: bool = option(False, "print the commands and what they cost, and run nothing")

    def __post_init__(self):
        if not self.seeds:
            raise ValueError("--seeds is empty; give one or more, such as 0,1,2")
        given, usual = parsed(self.words), emm.Options()
        for name in ("sizes", "full", "seeds", "out"):
            if getattr(given, name) != getattr(usual, name):
                raise ValueError(f"--words {self.words!r} has --{name}, "
                                 "which the experiment gives itself; leave it out")


def points(name, options):
    """The points of an experiment, without options that say what the base has anyway: they share its runs."""
    base = parsed(f"{BASE[options.scale]} {options.words}")
    native = NATIVE.get(base.data, ()) if base.arch == "ddpmpp" else ()

    def short(words):
        for said in native if "--data" not in words else ():
            words = f" {words} ".replace(f" {said} ", " ").strip()
        return words
    return [dataclasses.replace(p, words=short(p.words)) for p in getattr(EXPERIMENTS[name], options.scale)]


def commands(options, name):
    """The emm.py commands of an experiment: words -> its points. Points that differ in |D| alone share one.

    --words come after what the scale has in common, and before what varies, which they cannot change.
    """
    found, all_points = {}, points(name, options)
    for point in all_points:
        base = " ".join(part for part in (BASE[options.scale], options.words, point.words) if part)
        kind = "emm" if point.n is None else "full"
        out = Path(options.runs) / options.scale / f"{kind}-{directory(base, BASE[options.scale])}"
        if point.n is None:
            how = f"{EMM_RANGE[options.scale]} {base}"
        else:
            sizes = dict.fromkeys(p.n for p in all_points if p.words == point.words)
            how = f"{base} --full --sizes {','.join(map(str, sizes))}"
        words = f"{how} --seeds {','.join(map(str, options.seeds))} --out {shlex.quote(str(out))}"
        found.setdefault(words, []).append(point)
    return found


def directory(words, base):
    """A directory's name for options of emm.py: those unlike the base's, and a digest where that is long.

    The same for the same options, however they are written: what two experiments share is found again.
    """
    usual = run.recorded(parsed(base))
    given = {key: value for key, value in run.recorded(parsed(words)).items() if value != usual[key]}
    name = "_".join(f"{key}-{','.join(map(str, value)) if isinstance(value, list) else value}"
                    for key, value in sorted(given.items()))
    name = "".join(c if c.isalnum() or c in "._,-" else "-" for c in name) or "base"
    return name if len(name) <= 80 else f"{name[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def parsed(words):
    return run.parse(emm.Options, shlex.split(words))


def price(options, words, done=()):
    """Images trained and FLOPs of a command, sampling included, on all seeds, for sizes that are not `done`.

    A search is priced as the sizes it measures if EMM is `ASSUMED_EMM`, every snapshot as sampled in full.
    """
    o = parsed(words)
    count, channels, side, classes = source_shape(o)
    share = dict.fromkeys(o.sizes, 1.0) or search.ahead(
        {}, ASSUMED_EMM[options.scale], n_min=o.n_min, n_max=count, eps=o.eps, tolerance=o.tolerance,
        multiple=search.balance(classes, o.n_min))
    share = {n: part for n, part in share.items() if (o.out, n) not in done}
    trained = len(options.seeds) * sum(part * train.total_steps(o, n) * o.batch for n, part in share.items())
    drawn = len(options.seeds) * sum(part * len(train.snapshot_steps(o, n)) for n, part in share.items())
    labels = data.label_count(o.labels, max(share, default=1), classes)
    cost = cost_of(json.dumps([o.arch, o.precond, o.resolution or side, channels, labels, o.width, o.blocks,
                               o.channel_mult, o.attn_resolutions, o.embedding]))
    flops = trained * cost.step_flops + plan.sampling_flops(cost, drawn, o.samples)
    return round(trained), flops, {(o.out, n) for n in share}


def source_shape(o):
    """Images, channels, pixels a side and classes of a command's data; what is not here is as CIFAR-10."""
    name, _, one_class = o.data.partition(":")
    known = {"digits": (1797, 1, 8, 10), "cifar10": (50_000, 3, 32, 10), "cifar100": (50_000, 3, 32, 100),
             # not downloaded to be priced
             "mnist": (60_000, 1, 28, 10), "fashion-mnist": (60_000, 1, 28, 10)}
    known |= {f"{key}-test": (10_000, *shape) for key, (_, *shape) in known.items() if key != "digits"}
    if name not in known and there(o.data):
        images, labels, _ = read(o.data, o.resolution)
        count, channels, side, classes = len(images), images.shape[1], images.shape[-1], len(labels.unique())
    else:
        count, channels, side, classes = known.get(name, known["cifar10"])
        count, classes = (count // classes, 1) if one_class else (count, classes)
    if o.classes:
        count, classes = count * o.classes // classes, o.classes
    return o.n_max or count, channels, side, classes


@lru_cache(maxsize=None)
def cost_of(shape):
    """plan.cost of a network, skips all kept: those that are not kept save next to nothing."""
    return plan.cost(unet.Denoiser(*json.loads(shape)))


def experiment(options):
    """Run an experiment, or print what it would be; returns the paths of its result files."""
    names = list(EXPERIMENTS) if options.name == "all" else [options.name]
    if options.dry_run:
        done, total = set(), 0
        for name in names:
            print(f"# {name}: {EXPERIMENTS[name].about}")
            for words in commands(options, name):
                trained, flops, new = price(options, words, done)
                total += flops
                done |= new
                print(f"python emm.py {words}    # "
                      + (f"{trained:,} images, {flops:.2g} FLOP" if new else "shared"))
        hours = (f", {plan.hours(total, 'H100', 'fp32'):,.1f} hours on an H100 in float32 "
                 f"at the assumed {plan.UTILISATION['fp32']:.0%} of its peak")
        print(f"# {total:.3g} FLOP in all, where a search counts as the sizes that it measures if EMM is "
              f"{ASSUMED_EMM[options.scale]:,}{hours if options.scale == 'paper' else ''}")
        return []
    return [one(options, name) for name in names]


def one(options, name):
    """Run an experiment, and write its result file and figures; returns the path of the result file."""
    results, shared, e = [], {}, EXPERIMENTS[name]
    folder = Path(options.out) / options.scale
    path = folder / f"{name}.json"
    if path.exists() and (words := run.read_json(path)["options"]["words"]) != options.words:
        raise ValueError(f"{path} was measured with --words {words!r}, and not {options.words!r}; "
                         "give another --out (RESULTS= of make), or remove it")
    for words, chosen in commands(options, name).items():
        print(f"python emm.py {words}", flush=True)
        found = emm.find(parsed(words))
        runs = found.parent
        searches = [run.read_json(runs / part) for part in run.read_json(found)["searches"]]
        for point in chosen:
            extra = dict(command=f"python emm.py {words}", runs=str(runs))
            if name == "optimum":
                both = compared(options, point, words, runs, folder)
                values = [c[point.x]["ratio"] for c in both]
                extra |= dict(denoising=[c[point.x] for c in both])
                shared = dict(sigmas=both[0]["sigmas"], quantiles=both[0]["quantiles"])
            elif point.n:
                probes = [next(p for p in search["probes"] if p["n"] == point.n) for search in searches]
                values = [probe["ratio"] for probe in probes]
                extra |= dict(trajectories=[probe["trajectory"] for probe in probes])
            else:
                values = [search["emm"] for search in searches]
                extra |= dict(brackets=[search["bracket"] for search in searches])
            mean = emm.mean_interval(values)
            measured = dict(values=values, mean=mean["emm"], interval=mean["interval"])
            results.append(dataclasses.asdict(point) | measured | extra)
    order = {(p.series, p.x, p.n): i for i, p in enumerate(points(name, options))}
    results.sort(key=lambda r: order[r["series"], r["x"], r["n"]])
    run.write_json(path, dict(
        name=name, scale=options.scale, about=e.about, x=e.x,
        measure="ratio" if results[0]["n"] else "emm", seeds=options.seeds,
        published=published(name) if options.scale == "paper" else [],
        options=run.recorded(options), **run.provenance(), **shared, points=results))
    plot.plot(plot.Options(experiment=str(path)))
    return path


def compared(options, point, words, runs, folder):
    """paper.compare's comparisons of each seed's last weights with the closed form.

    The first seed's come with sheets of pairs.
    """
    o, found = parsed(words), []
    for seed in options.seeds:
        there = runs / f"seed{seed}" / f"n{point.n:06d}"
        sheets = {}
        if seed == options.seeds[0]:
            sheets = {name: there / f"{name}.png" for name in ("pairs", "pairs-closed-form")}
        new = not all(sheet.exists() for sheet in sheets.values())
        found.append(run.read_json(compare.compare(compare.Options(
            run=str(there), pairs=str(sheets["pairs"]) if new else "",
            **{name: getattr(o, name)
               for name in ("samples", "threshold", "precision", "device", "threads")}))))
        for name, sheet in sheets.items():
            with run.publish(folder / f"optimum-{name}.png") as temporary:
                temporary.write_bytes(sheet.read_bytes())
    return found


def published(name):
    """An experiment's points read off the paper's figures: series, x, and ratio or EMM, of each."""
    found = []
    for row in plot.published_rows():
        for (series, x), theirs in EXPERIMENTS[name].published.items():
            same_size = not series.startswith("|D|") or series == f"|D| = {row['n_train']}"
            if row["experiment"] == theirs[0] and theirs[1] in (None, row["series"]) and same_size:
                there = f"{row['x']}x{row['x']}" if row["x_name"] == "resolution" else row["x"]
                found.append(dict(series=series, x=there if x is None else x,
                                  value=float(row["ratio_percent"]) / 100))
    if name == "resolution":  # where its curves cross 90%
        emms = {side: search.crossing(*plot.published_curve(series=f"{side}x{side}"), 0.9)[0]
                for side in (32, 16, 8)}
        found = [dict(series="", x=str(side), value=value) for side, value in emms.items()]
    return found


def main():
    run.stage(experiment, Options, __doc__,
              say=lambda paths: "\n".join(f"wrote {path} and its figure" for path in paths))


if __name__ == "__main__":
    main()
