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
import shlex
from dataclasses import dataclass
from pathlib import Path

import disk
import emm
import plot
import run
import search
import unet
from bench import plan
from measure.denoisers import QUANTILES, SIGMAS
from paper import compare, figures
from paper.beyond import MEASURES
from paper.claims import SCALES, SEEDS
from paper.protocol import BASE, EXPERIMENTS
from run import option

ASSUMED_EMM = dict(paper=1000, gpu=500, cpu=20)  # to price searches


@dataclass(frozen=True)
class Options(run.Checked):
    name: str = option("size", "experiment, or all of them in order", ("all", *EXPERIMENTS))
    scale: str = option("cpu", "the paper's settings, hours of one GPU, or a day of two CPU cores", SCALES)
    seeds: tuple[int, ...] = option((), "a run of every point for each; by default 0, 1, ..., "
                                        "as many as the table says", least=0, below=2**32, distinct=True)
    also: str = option("", "options of emm.py for all points, such as '--data my.zip --device cuda:1'")
    runs: str = option("runs", "directory of the runs")
    out: str = option("paper/results", "directory of result files and figures")
    dry_run: bool = option(False, "print the commands and what they cost, and run nothing")


def commands(options, name):
    """The emm.py runs of an experiment: emm.Options -> its points. Points that differ in |D| alone share one.

    What --also gives comes after what the scale has in common, and before what varies.
    """
    e, found = EXPERIMENTS[name], {}
    points, usual = getattr(e, options.scale), emm.Options(**BASE[options.scale])
    also = differences(run.parse(emm.Options, words(usual) + shlex.split(options.also)), usual)
    if own := {"sizes", "full", "train_seeds", "out"} & also.keys():
        raise ValueError(f"--also {options.also!r} has --{min(own).replace('_', '-')}, "
                         "which the experiment gives itself; leave it out")
    seeds = options.seeds or tuple(range(e.seeds.get(options.scale, SEEDS[options.scale])))
    for point in points:
        o = native(dataclasses.replace(usual, **also | point.given))
        sizes = tuple(dict.fromkeys(p.n for p in points if p.n and p.given == point.given))
        out = Path(options.runs) / options.scale / f"{'full' if sizes else 'emm'}-{directory(o, usual)}"
        o = dataclasses.replace(o, sizes=sizes, full=bool(sizes), train_seeds=seeds, out=str(out))
        found.setdefault(o, []).append(point)
    return found


def differences(options, usual):
    """The fields of a dataclass that are not as usual, by name."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)
            if getattr(options, field.name) != getattr(usual, field.name)}


def native(o):
    """The same options without what they have anyway, so that experiments share runs."""
    _, side, classes = plan.source_shape(o.data)
    return dataclasses.replace(
        o, resolution=0 if o.resolution == side else o.resolution, classes=o.classes % classes,
        embedding=None if o.embedding == unet.FORMS.get(o.arch, {}).get("embedding") else o.embedding)


def directory(o, usual):
    """A directory's name for options of emm.py: those unlike the usual, and a digest where that is long."""
    recorded = run.recorded(o).keys()
    name = "_".join(f"{key}-{','.join(map(str, value)) if isinstance(value, tuple) else value}"
                    for key, value in sorted(differences(o, usual).items()) if key in recorded)
    name = "".join(c if c.isalnum() or c in "._,-" else "-" for c in name) or "base"
    return name if len(name) <= 80 else f"{name[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def words(o):
    """Those options on a command line, as a list."""
    found = []
    for name, value in differences(o, emm.Options()).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{'' if value else 'no-'}{flag}")
        else:
            found += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return found


def command(o):
    """Those options as a command, for people and shells."""
    return f"python emm.py {shlex.join(words(o))}"


def experiment(options):
    """Run an experiment, or print what it would be; returns the paths of its result files."""
    names = [name for name in EXPERIMENTS if getattr(EXPERIMENTS[name], options.scale)]
    if options.name not in ("all", *names):
        raise ValueError(f"--name {options.name} has no --scale {options.scale}; it has: {', '.join(names)}")
    names = names if options.name == "all" else [options.name]
    return dry_run(options, names) if options.dry_run else [one(options, name) for name in names]


def dry_run(options, names):
    """Print the commands, a line each, that a shell can run, and comments; returns no paths.

    What experiments have in common stands at the first of them, with the sizes and seeds of all, so that no
    two commands write into one directory.
    """
    merged, first, total = {}, {}, 0
    for name in names:
        for o in commands(options, name):
            first.setdefault(o.out, name)
            other = merged.get(o.out, o)
            merged[o.out] = dataclasses.replace(o, sizes=tuple(sorted({*o.sizes, *other.sizes})),
                                                train_seeds=max(o.train_seeds, other.train_seeds, key=len))
    for name in names:
        print(f"# {name}: {EXPERIMENTS[name].about}")
        for out in (out for out in merged if first[out] == name):
            trained, flops = plan.search_price(merged[out], ASSUMED_EMM[options.scale])
            total += flops
            print(f"{command(merged[out])}    # {trained:,} images, {flops:.2g} FLOP")
    hours = (f", {plan.hours(total, 'H100', 'tf32'):,.1f} hours on an H100 in TF32 "
             f"at {plan.UTILISATION['tf32']:.0%} of its peak")
    print(f"# {total:.3g} FLOP in all, where a search counts as {plan.SEARCH} trainings of "
          f"{ASSUMED_EMM[options.scale]:,} images{'' if options.scale == 'cpu' else hours}")


def one(options, name):
    """Run an experiment, and write its result file and figures; returns the path of the result file."""
    e, path = EXPERIMENTS[name], Path(options.out) / options.scale / f"{name}.json"
    table, rows, machines = getattr(e, options.scale), {}, set()
    if path.exists() and (also := disk.read_json(path)["options"].get("also")) != options.also:
        raise ValueError(f"{path} was measured with --also {also!r}, and not {options.also!r}; "
                         "give another --out (RESULTS= of make), or remove it")
    for o, points in commands(options, name).items():
        print(command(o), flush=True)
        folder = emm.find(o).parent
        machines |= {disk.read_json(file)["processor"] for seed in o.train_seeds
                     for file in folder.glob(f"seed{seed}/n*/config.json")}
        for point in points:
            values, extra = measured(name, o, point, folder, path.parent)
            mean = emm.mean_interval(values)
            rows[table.index(point)] = dataclasses.asdict(point) | dict(
                values=values, mean=mean["emm"], interval=mean["interval"],
                command=command(o), runs=str(folder), **extra)
    axes = dict(sigmas=SIGMAS, quantiles=[*QUANTILES]) if name == "optimum" else {}
    disk.write_json(path, axes | dict(
        name=name, scale=options.scale, about=e.about, x=e.x,
        measure=e.measure or ("ratio" if table[0].n else "emm"),
        seeds=o.train_seeds, published=published(name) if options.scale == "paper" else [],
        options=run.recorded(options), **disk.provenance(), trained_on=sorted(machines),
        points=[rows[i] for i in sorted(rows)]))
    figures.draw(path)
    return path


def measured(name, o, point, folder, results):
    """What an experiment measures of a point, a value a seed, and what else the result file has of it."""
    places = [folder / f"seed{seed}" / f"n{point.n or 0:06d}" for seed in o.train_seeds]
    if measure := EXPERIMENTS[name].measure:
        return [MEASURES[measure](o, place) for place in places], {}
    if name == "optimum":
        how = ("sample_count", "threshold", "precision", "device", "threads")
        paths = [compare.compare(compare.Options(run=str(place), **{key: getattr(o, key) for key in how}))
                 for place in places]
        both = [disk.read_json(path)[point.x] for path in paths]
        for sheet in places[0].glob("compare-*.png"):
            with disk.whole_file(results / sheet.name.replace("compare-", "optimum.")) as temporary:
                temporary.write_bytes(sheet.read_bytes())
        return [each["ratio"] for each in both], dict(denoising=both)
    searches = [disk.read_json(folder / path) for path in disk.read_json(folder / "emm.json")["searches"]]
    if not point.n:
        return [s["emm"] for s in searches], dict(brackets=[s["bracket"] for s in searches])
    probes = [next(p for p in s["probes"] if p["n"] == point.n) for s in searches]
    return [p["ratio"] for p in probes], dict(trajectories=[p["trajectory"] for p in probes])


def published(name):
    """An experiment's points read off the paper's figures: series, x, and ratio or EMM, of each."""
    if name == "resolution":  # where its curves cross 90%
        return [dict(series="", x=side, value=search.crossing(
            *plot.published_curve(series=f"{side}x{side}"), 0.9)) for side in (32, 16, 8)]
    found = {}
    for row in plot.published_rows():
        for (series, x), theirs in EXPERIMENTS[name].published.items():
            same_size = not series.startswith("|D|") or series == f"|D| = {row['n_train']}"
            if row["experiment"] == theirs[0] and theirs[1] in (None, row["series"]) and same_size:
                there = f"{row['x']}x{row['x']}" if row["x_name"] == "resolution" else row["x"]
                key, value = (series, there if x is None else x), float(row["ratio_percent"]) / 100
                found[key] = max(value, found.get(key, 0))  # of several numbers of epochs
    return [dict(series=series, x=x, value=value) for (series, x), value in found.items()]


def main():
    run.stage(experiment, Options, __doc__,
              words=lambda paths: "\n".join(f"wrote {path} and its figure" for path in paths))


if __name__ == "__main__":
    main()
