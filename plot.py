"""Draw searches of emm.py: the ratio of memorization against |D|, and against epochs.

    python plot.py --emm runs/emm/emm.json                               runs/emm/emm.png and trajectory.png
    python plot.py --emm w128/emm.json,w256/emm.json --out width.png     several; and width-trajectory.png

Reads result files alone. Points are numbered in the order of measuring; hollow ones were stopped as soon as
they were above. --published draws the published base run (paper, figure 2: CIFAR-10, 40,000 epochs) in grey.
"""
import contextlib
import csv
import os
from dataclasses import dataclass
from pathlib import Path

import disk
import run
from run import option

PUBLISHED = Path(__file__).parent / "paper" / "digitised.csv"
# Okabe and Ito: told apart by everyone
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = "osD^vP"


@dataclass(frozen=True)
class Options:
    emm: tuple[str, ...] = option((), "emm.json files, separated by commas")
    out: str = option("", "PNG to write; emm.png beside the first file by default")
    published: bool = option(False, "draw the published base run even if the settings are others")

    def __post_init__(self):
        if not self.emm:
            raise ValueError("give --emm, one or more emm.json files of emm.py, to draw")
        if self.out and not self.out.endswith(".png"):
            raise ValueError(f"--out {self.out} must end in .png")


def published_rows():
    """The lines of the digitised figures, as dicts of text."""
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def published_curve(experiment="resolution", series="32x32"):
    """|D| and ratio (0 to 1) of a curve digitised from the authors' figures; by default their base run."""
    points = sorted((int(row["n_train"]), float(row["ratio_percent"]) / 100) for row in published_rows()
                    if (row["experiment"], row["series"]) == (experiment, series))
    return [n for n, _ in points], [ratio for _, ratio in points]


def read(paths):
    """The searches in emm.json files, those of several seeds one by one."""
    found = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"{path} is no file; give the emm.json that emm.py (make emm) writes at the end")
        result = disk.read_json(path)
        if "searches" in result:
            found += read([path.parent / part for part in result["searches"]])
        elif "probes" in result and all("whole" in probe for probe in result["probes"]):
            found.append(result)
        else:
            raise ValueError(f"{path} is not an emm.json of emm.py")
    return found


@contextlib.contextmanager
def plain_matplotlib():
    """Within, matplotlib as it comes, and not as this machine's matplotlibrc, which may ask for LaTeX."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's would not even import here
    import matplotlib  # a second to import: only where it is used
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


@plain_matplotlib()
def plot(options):
    """Draw the searches that the options name; returns the path of the PNG over |D|."""
    results = read(options.emm)
    names = [describe(result, results) for result in results]
    out = Path(options.out) if options.out else Path(options.emm[0]).with_name("emm.png")
    save(ratios(results, names, options.published), out)
    name = f"{out.stem}-trajectory.png" if options.out else "trajectory.png"
    save(trajectories(results, names), out.with_name(name))
    return out


def error(values, intervals):
    """The bars of matplotlib's errorbar: how far each value is from the ends of its interval."""
    return [[max(0, y - low) for y, (low, _) in zip(values, intervals)],
            [max(0, high - y) for y, (_, high) in zip(values, intervals)]]


def subplots(columns=1, width=6.6):
    """A figure and its axes, without pyplot, which keeps every figure and asks for a screen."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    return figure, figure.subplots(1, columns)


@plain_matplotlib()
def save(figure, path):
    with disk.whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def ratios(results, names, published=False):
    """The ratio against |D|, with the intervals, order and bracket of each search."""
    from matplotlib import ticker
    figure, axes = subplots()
    if published:
        axes.plot(*published_curve(), "--", marker=".", color="0.6",
                  label="published, digitised:\nCIFAR-10 32x32, DDPM++ width 128")
    for i, (result, name) in enumerate(zip(results, names)):
        look = dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)])
        numbered = sorted(enumerate(result["probes"], 1), key=lambda pair: pair[1]["n"])
        n, y = [[p[key] for _, p in numbered] for key in ("n", "ratio")]
        emm = f": EMM {result['emm']:.0f}" if result["emm"] else ""
        ends = [p["interval"] for _, p in numbered]
        axes.errorbar(n, y, error(y, ends), capsize=3, label=name + emm, **look)
        for number, p in numbered:
            if not p["whole"]:
                axes.plot(p["n"], p["ratio"], markerfacecolor="white", zorder=3, **look)
            if len(results) == 1:
                axes.annotate(number, (p["n"], p["ratio"]), (4, -11),
                              textcoords="offset points", fontsize="small")
        if None not in result["bracket"]:
            axes.axvspan(*result["bracket"], color=look["color"], alpha=0.15, linewidth=0)
    target = 1 - results[0]["eps"]
    axes.axhline(target, color="black", linewidth=1, linestyle=":", label=f"{target:.0%}")
    axes.set(xscale="log", xlabel="training images |D|", ylabel="memorization ratio", ylim=(-0.03, 1.03))
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.legend(fontsize="small")
    return figure


def trajectories(results, names):
    """The ratio of every snapshot against epochs, a line for each size."""
    figure, axes = subplots()
    for i, (result, name) in enumerate(zip(results, names)):
        probes = sorted(result["probes"], key=lambda p: p["n"])
        for j, p in enumerate(probes):
            points = p["trajectory"]
            y = [t["ratio"] for t in points]
            axes.errorbar([t["epoch"] for t in points], y, error(y, [t["interval"] for t in points]),
                          capsize=2, linewidth=1, alpha=1 - 0.7 * j / max(1, len(probes) - 1),
                          marker=MARKERS[j % len(MARKERS)], color=COLOURS[i % len(COLOURS)],
                          label=f"{name}: {p['n']}" if len(results) > 1 else f"|D| = {p['n']}")
    axes.axhline(1 - results[0]["eps"], color="black", linewidth=1, linestyle=":")
    axes.set(xlabel="epochs", ylabel="memorization ratio of the snapshot", ylim=(-0.03, 1.03))
    axes.legend(fontsize="x-small", ncols=len(results))
    return figure


def describe(result, results):
    """The data, and the options in which this search differs from the others, as a curve's name."""
    options = result["options"]
    differing = [key for key in options if any(r["options"].get(key) != options[key] for r in results)]
    return ", ".join([Path(options["data"]).stem, f"{options['arch']} width {options['width']}"]
                     + [f"{key} {options[key]}" for key in differing if key not in ("data", "arch", "width")])


def main():
    run.stage(plot, Options, __doc__, words="wrote {}".format)


if __name__ == "__main__":
    main()
