"""Run the experiments of the paper (paper/protocol.py): at its scale, on one GPU, or on a CPU.

    python -m paper.experiments --name width --scale cpu                 paper/results/cpu/width.json and .png
    python -m paper.experiments --name width --scale paper --dry-run     the commands, and what they cost
    make width SCALE=cpu

Every point is an emm.py command, printed before it runs: sizes measured in full, or a search for EMM. Its
directory is named after what differs from the base, so that what experiments have in common is trained once,
and what was interrupted goes on. Each point has a run for each of --seeds, which draw training set,
weights and noise; its interval is Student's.
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
from images import shape_of, there
from paper import compare, figures
from paper.protocol import BASE, EXPERIMENTS, RANGE, SCALES, SEEDS
from run import option

ASSUMED_EMM = dict(paper=1000, gpu=500, cpu=20)  # to price searches


@dataclass(frozen=True)
class Options:
    name: str = option("size", "experiment, or all of them in order", ("all", *EXPERIMENTS))
    scale: str = option("cpu", "the paper's settings, hours of one GPU, or a day of two CPU cores", SCALES)
    seeds: tuple[int, ...] = option((), "a run of every point for each; 0,1,2 on a CPU by default, else 0")
    also: str = option("", "options of emm.py for all points, such as '--data my.zip --device cuda:1'")
    runs: str = option("runs", "directory of the runs")
    out: str = option("paper/results", "directory of result files and figures")
    dry_run: bool = option(False, "print the commands and what they cost, and run nothing")

    def __post_init__(self):
        if not self.seeds:
            object.__setattr__(self, "seeds", SEEDS[self.scale])
        own = {"sizes", "full", "train_seeds", "out"} & set(self.given)
        if own:
            raise ValueError(f"--also {self.also!r} has --{sorted(own)[0]}, "
                             "which the experiment gives itself; leave it out")

    @property
    def given(self):
        """What --also gives, as emm.py's options by name."""
        words = shlex.split(self.also)
        parsed = run.parse(emm.Options, words)
        names = (word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--"))
        return {name.removeprefix("no_"): getattr(parsed, name.removeprefix("no_")) for name in names}


def differences(options, usual):
    """The fields of a dataclass that are not as usual, by name."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)
            if getattr(options, field.name) != getattr(usual, field.name)}


def commands(options, name):
    """The emm.py runs of an experiment: emm.Options -> its points. Points that differ in |D| alone share one.

    What --also gives comes after what the scale has in common, and before what varies.
    """
    found, points = {}, getattr(EXPERIMENTS[name], options.scale)
    base = emm.Options(**BASE[options.scale] | options.given)
    for point in points:
        o = native(dataclasses.replace(base, **point.given))
        kind = "emm" if point.n is None else "full"
        out = Path(options.runs) / options.scale / f"{kind}-{directory(o, BASE[options.scale])}"
        how = RANGE[options.scale] | options.given if point.n is None else dict(
            full=True, sizes=tuple(dict.fromkeys(p.n for p in points if p.given == point.given)))
        o = dataclasses.replace(o, **{key: how[key] for key in how if key not in point.given},
                                train_seeds=options.seeds, out=str(out))
        found.setdefault(o, []).append(point)
    return found


def native(o):
    """The same options without what they have anyway, so that experiments share runs."""
    _, _, side, classes = source_shape(dataclasses.replace(o, resolution=0, classes=0))
    return dataclasses.replace(
        o, resolution=0 if o.resolution == side else o.resolution, classes=o.classes % classes,
        embedding=None if o.embedding == unet.ARCHITECTURES[o.arch]["embedding"] else o.embedding)


def directory(o, base):
    """A directory's name for options of emm.py: those unlike the base's, and a digest where that is long."""
    usual = run.recorded(emm.Options(**base))
    given = {key: value for key, value in run.recorded(o).items() if value != usual[key]}
    name = "_".join(f"{key}-{','.join(map(str, value)) if isinstance(value, list) else value}"
                    for key, value in sorted(given.items()))
    name = "".join(c if c.isalnum() or c in "._,-" else "-" for c in name) or "base"
    return name if len(name) <= 80 else f"{name[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def command(o):
    """Those options as a command, for people and shells."""
    words = []
    for name, value in differences(o, emm.Options()).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        else:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return f"python emm.py {shlex.join(words)}"


def price(options, o):
    """Images trained and FLOPs of a run of emm.py, sampling included, on all seeds.

    A search is priced as the sizes it measures if EMM is `ASSUMED_EMM`, every snapshot as sampled in full.
    """
    count, channels, side, classes = source_shape(o)
    share = dict.fromkeys(o.sizes, 1.0) or search.ahead(
        {}, ASSUMED_EMM[options.scale], n_min=o.n_min, n_max=count, eps=o.eps, tolerance=o.tolerance,
        multiple=search.balance(classes, o.n_min))
    trained = len(options.seeds) * sum(part * train.total_steps(o, n) * o.batch for n, part in share.items())
    drawn = len(options.seeds) * sum(part * len(train.snapshot_steps(o, n)) for n, part in share.items())
    labels = data.label_count(o.labels, max(share, default=1), classes)
    cost = cost_of(json.dumps([o.arch, o.precond, o.resolution or side, channels, labels, o.width, o.blocks,
                               o.channel_mult, o.attn_resolutions, o.embedding]))
    return round(trained), trained * cost.step_flops + plan.sampling_flops(cost, drawn, o.sample_count, o)


def source_shape(o):
    """Images, channels, pixels a side and classes of a command's data; what is not here is as CIFAR-10."""
    count, channels, side, classes = shape_of(o.data if there(o.data) else "cifar10", o.resolution)
    if o.classes:
        count, classes = count * o.classes // classes, o.classes
    return o.n_max or count, channels, side, classes


@lru_cache(maxsize=None)
def cost_of(shape):
    """plan.cost of a network, skips all kept: those that are not kept save next to nothing."""
    return plan.cost(unet.Denoiser(*json.loads(shape)))


def experiment(options):
    """Run an experiment, or print what it would be; returns the paths of its result files."""
    names = [name for name in EXPERIMENTS if getattr(EXPERIMENTS[name], options.scale)]
    if options.name not in ("all", *names):
        raise ValueError(f"--name {options.name} has no --scale {options.scale}; it has: {', '.join(names)}")
    names = names if options.name == "all" else [options.name]
    return dry_run(options, names) if options.dry_run else [one(options, name) for name in names]


def dry_run(options, names):
    """Print the commands, a line each, that a shell can run, and comments; returns no paths.

    What experiments have in common stands at the first of them, with the sizes of all, so that no two
    commands write into one directory.
    """
    merged, first, total = {}, {name: [] for name in names}, 0
    for name in names:
        for o in commands(options, name):
            if o.out not in merged:
                first[name].append(o.out)
            sizes = dict.fromkeys(merged.get(o.out, o).sizes + o.sizes)
            merged[o.out] = dataclasses.replace(o, sizes=tuple(sorted(sizes)))
    for name, outs in first.items():
        print(f"# {name}: {EXPERIMENTS[name].about}")
        for out in outs:
            trained, flops = price(options, merged[out])
            total += flops
            print(f"{command(merged[out])}    # {trained:,} images, {flops:.2g} FLOP")
    hours = (f", {plan.hours(total, 'H100', 'tf32'):,.1f} hours on an H100 in TF32 "
             f"at {plan.UTILISATION['tf32']:.0%} of its peak")
    print(f"# {total:.3g} FLOP in all, where a search counts as the sizes that it measures if EMM is "
          f"{ASSUMED_EMM[options.scale]:,}{'' if options.scale == 'cpu' else hours}")
    return []


def one(options, name):
    """Run an experiment, and write its result file and figures; returns the path of the result file."""
    results, shared, e = [], {}, EXPERIMENTS[name]
    folder = Path(options.out) / options.scale
    path = folder / f"{name}.json"
    if path.exists() and (also := run.read_json(path)["options"].get("also")) != options.also:
        raise ValueError(f"{path} was measured with --also {also!r}, and not {options.also!r}; "
                         "give another --out (RESULTS= of make), or remove it")
    for o, chosen in commands(options, name).items():
        print(command(o), flush=True)
        found = emm.find(o)
        runs = found.parent
        searches = [run.read_json(runs / part) for part in run.read_json(found)["searches"]]
        for point in chosen:
            extra = dict(command=command(o), runs=str(runs))
            if name == "optimum":
                both = compared(o, point, runs, folder)
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
    order = {(p.series, p.x, p.n): i for i, p in enumerate(getattr(e, options.scale))}
    results.sort(key=lambda r: order[r["series"], r["x"], r["n"]])
    run.write_json(path, dict(
        name=name, scale=options.scale, about=e.about, x=e.x,
        measure="ratio" if results[0]["n"] else "emm", seeds=options.seeds,
        published=published(name) if options.scale == "paper" else [],
        options=run.recorded(options), **run.provenance(), **shared, points=results))
    figures.draw(figures.Options(experiment=str(path)))
    return path


def compared(o, point, runs, folder):
    """paper.compare's comparisons of each seed's last weights with the closed form.

    The first seed's come with sheets of pairs.
    """
    found = []
    for seed in o.train_seeds:
        there = runs / f"seed{seed}" / f"n{point.n:06d}"
        sheets = {}
        if seed == o.train_seeds[0]:
            sheets = {name: there / f"{name}.png" for name in ("pairs", "pairs-closed-form")}
        new = not all(sheet.exists() for sheet in sheets.values())
        found.append(run.read_json(compare.compare(compare.Options(
            run=str(there), pairs=str(sheets["pairs"]) if new else "",
            **{name: getattr(o, name)
               for name in ("sample_count", "threshold", "precision", "device", "threads")}))))
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
    # as a ratio is: the highest of those that one place has, of several numbers of epochs
    found = [max((f for f in found if (f["series"], f["x"]) == key), key=lambda f: f["value"])
             for key in dict.fromkeys((f["series"], f["x"]) for f in found)]
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
