"""Draw results: of emm.py, the ratio of memorization against |D| and against epochs; of memorize.py, quality.

    python plot.py --emm runs/emm/emm.json                     runs/emm/emm.png and trajectory.png
    python plot.py --emm w128/emm.json,w256/emm.json --out width.png
                                                               several searches; and width-trajectory.png
    python plot.py --quality a.json,b.json --out quality.png   of memorize.py --quality, quality against ratio

Reads result files alone. Points are numbered in the order of measuring; hollow ones were stopped as soon as
they were above. The published curve (paper, figure 2) is drawn in grey where a search has its settings.
"""
import contextlib
import csv
import os
from dataclasses import dataclass
from pathlib import Path

import run
from run import option

PUBLISHED = Path(__file__).parent / "paper" / "digitised.csv"
# Okabe and Ito: told apart by everyone
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = "osD^vP"
# What the published curves that resolution alone tells apart were made with. Options that are not here decide
# which of many equal runs it is, or how it is measured
BASE_RUN = dict(
    data="cifar10", mix="", classes=0, labels="none", repeat="",
    arch="ddpmpp", precond="vp", width=128, blocks=2, channel_mult=[2, 2, 2],
    attn_resolutions=None, embedding=None, skip_connections=None, dropout=0.13,
    epochs=40000, steps=None, steps_min=0, warmup_epochs=200, warmup_steps=None,
    batch=512, optimizer="adam", learning_rate=2e-4, momentum=0.9, beta2=0.999,
    weight_decay=0.0, ema_halflife=500_000 / 512, ema_rampup_epochs=200, ema_rampup_steps=None, ema_rate=None,
    flip=False, augment=0.0, label_dropout=0.0, reshuffle=False, threshold="1/3", mirror=False)
RESOLUTIONS = (32, 16, 8)


@dataclass(frozen=True)
class Options:
    emm: tuple[str, ...] = option((), "emm.json files, separated by commas")
    quality: tuple[str, ...] = option((), "or results of memorize.py --quality, such as of each snapshot")
    out: str = option("", "PNG to write; emm.png or quality.png beside the first file by default")
    published: bool = option(False, "draw the published base run even if the settings are others")

    def __post_init__(self):
        if bool(self.emm) == bool(self.quality):
            raise ValueError("give either --emm RESULT/emm.json or --quality MEMORIZE.json to draw")
        if self.out and not self.out.endswith(".png"):
            raise ValueError(f"--out {self.out} must end in .png")


def published_rows(path=PUBLISHED):
    """The lines of the digitised figures, as dicts of text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def published_curve(path=PUBLISHED, experiment="resolution", series="32x32"):
    """|D| and ratio (0 to 1) of a curve digitised from the authors' figures; by default their base run."""
    points = sorted((int(row["n_train"]), float(row["ratio_percent"]) / 100) for row in published_rows(path)
                    if (row["experiment"], row["series"]) == (experiment, series))
    return [n for n, _ in points], [ratio for _, ratio in points]


def published_series(options):
    """The series of the published curve that a search with these options repeats; None if it does not."""
    resolution = options.get("resolution") or 32
    same = all(options.get(key, value) == value for key, value in BASE_RUN.items())
    return f"{resolution}x{resolution}" if same and resolution in RESOLUTIONS else None


def read(paths):
    """The searches in emm.json files, those of several seeds one by one."""
    found = []
    for path in map(Path, paths):
        result = run.read_json(path)
        if "searches" in result:
            found += read([path.parent / part for part in result["searches"]])
        elif "probes" in result and all("whole" in probe for probe in result["probes"]):
            found.append(result)
        else:
            raise ValueError(f"{path} is not an emm.json of emm.py")
    return found


def plot(options):
    """Draw the searches that the options name; returns the path of the PNG of ratio against |D|."""
    with plain_matplotlib():
        return draw(options)


@contextlib.contextmanager
def plain_matplotlib():
    """Within, matplotlib as it comes, and not as this machine's matplotlibrc, which may ask for LaTeX."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's would not even import here
    import matplotlib  # a second to import: only where it is used
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def draw(options):
    """`plot`, within `plain_matplotlib`."""
    if options.quality:
        out = Path(options.out) if options.out else Path(options.quality[0]).with_name("quality.png")
        save(tradeoff([run.read_json(path) for path in options.quality], options.quality), out)
        return out
    results = read(options.emm)
    names = [describe(result, results) for result in results]
    out = Path(options.out) if options.out else Path(options.emm[0]).with_name("emm.png")
    save(ratios(results, names, options.published), out)
    name = f"{out.stem}-trajectory.png" if options.out else "trajectory.png"
    save(trajectories(results, names), out.with_name(name))
    return out


def draw_curve(result, path):
    """Draw the shares under every threshold, of a result of memorize.py --curve, as a PNG at `path`."""
    with plain_matplotlib():
        save(shares(result), path)


def shares(result):
    """The distribution of the ratio of samples and of held-out images, with DKW bands."""
    found, (figure, axes) = result["curve"], subplots()
    for name, colour, line in (("samples", COLOURS[1], "-"), ("held_out", COLOURS[0], "--")):
        if name in found:
            x, y, half = found["thresholds"], found[name], found[f"{name}_band"]
            axes.plot(x, y, line, color=colour, label=name.replace("_", "-"))
            axes.fill_between(x, [max(0, v - half) for v in y], [min(1, v + half) for v in y],
                              color=colour, alpha=0.2, linewidth=0)
    p, q = map(int, result["threshold"].split("/"))
    axes.axvline(p / q, color="black", linewidth=1, linestyle=":", label=result["threshold"])
    k = result["options"]["neighbours"]
    other = f"mean of the {k} nearest" if k else "second nearest"
    axes.set(xlabel=f"threshold of nearest distance / {other}",
             ylabel="share below", xlim=(0, 1), ylim=(-0.03, 1.03))
    axes.legend(fontsize="small")
    return figure


def tradeoff(results, names):
    """Quality against memorization: shares and the Frechet distance, joined in the order given.

    If all have held-out images, quality is against these, and memorization the share of the samples under the
    threshold that these put at 1% of false positives: 1/3 is too strict to tell early snapshots apart.
    """
    if lacking := [name for name, result in zip(names, results) if "quality" not in result]:
        raise ValueError(f"{lacking[0]} has no quality; score its samples with memorize.py --quality")
    controlled = all("held_out" in r["quality"] for r in results)
    against = "held_out" if controlled else "training"
    found = [r["quality"][against] for r in results]
    ratios = [r["held_out"]["samples_under_threshold"] if controlled else r["ratio"] for r in results]
    rate = f" at {results[0]['held_out']['rate']:.0%} of false positives" if controlled else ""
    figure, (left, right) = subplots(2, 11)
    for name, colour, marker in zip(("precision", "recall", "coverage"), COLOURS, MARKERS):
        y = [q[name] for q in found]
        ends = [q[f"{name}_interval_95"] for q in found]
        error = [[max(0, v - e[0]) for v, e in zip(y, ends)], [max(0, e[1] - v) for v, e in zip(y, ends)]]
        left.errorbar(ratios, y, error, color=colour, marker=marker, capsize=2, linewidth=1, label=name)
    right.plot(ratios, [q["frechet"] for q in found], color=COLOURS[3], marker="o", linewidth=1)
    left.set(ylabel=f"share, against {against.replace('_', '-')} images", ylim=(-0.03, 1.03))
    right.set(ylabel="Frechet distance", ylim=(0, None))
    for axes in (left, right):
        axes.set(xlabel=f"memorization ratio{rate}")
    left.legend(fontsize="small")
    return figure


def subplots(columns=1, width=6.6):
    """A figure and its axes, without pyplot, which keeps every figure and asks for a screen."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    return figure, figure.subplots(1, columns)


def save(figure, path):
    with run.publish(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def ratios(results, names, published=False):
    """The ratio against |D|, with the intervals, order and bracket of each search."""
    from matplotlib import ticker
    figure, axes = subplots()
    curves = {published_series(result["options"]) for result in results} | {"32x32" if published else None}
    for series in sorted(curves - {None}):
        axes.plot(*published_curve(series=series), "--", marker=".", color="0.6",
                  label=f"published, digitised:\nCIFAR-10 {series}, DDPM++ width 128")
    for i, (result, name) in enumerate(zip(results, names)):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        probes = sorted(enumerate(result["probes"], 1), key=lambda pair: pair[1]["n"])
        emm = f": EMM {result['emm']:.0f}" if result["emm"] else ""
        axes.plot([p["n"] for _, p in probes], [p["ratio"] for _, p in probes],
                  color=colour, marker=marker, label=name + emm)
        for number, p in probes:
            error = [[p["ratio"] - p["interval"][0]], [p["interval"][1] - p["ratio"]]]
            axes.errorbar(p["n"], p["ratio"], error, capsize=3, marker=marker, color=colour,
                          markerfacecolor=colour if p["whole"] else "white")
            if len(results) == 1:
                axes.annotate(number, (p["n"], p["ratio"]), (4, -11),
                              textcoords="offset points", fontsize="small")
        if None not in result["bracket"]:
            axes.axvspan(*result["bracket"], color=colour, alpha=0.15, linewidth=0)
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
            error = [[t["ratio"] - t["interval"][0] for t in points],
                     [t["interval"][1] - t["ratio"] for t in points]]
            axes.errorbar([t["epoch"] for t in points], [t["ratio"] for t in points], error,
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
    run.stage(plot, Options, __doc__, say="wrote {}".format)


if __name__ == "__main__":
    main()
