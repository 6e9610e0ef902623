"""Draw the result of emm.py: the memorization ratio against |D|, and against epochs for each size.

    python plot.py --emm runs/emm/emm.json                              makes runs/emm/emm.png
    python plot.py --emm w128/emm.json,w256/emm.json --out width.png    several searches in one picture

Reads result files alone. The published curve of the base run (paper, figure 2) is drawn in grey.
"""
import csv
from dataclasses import dataclass
from pathlib import Path

import run
from run import option

PUBLISHED = Path(__file__).parent / "paper" / "digitised.csv"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito: told apart by everyone
MARKERS = "osD^vP"


@dataclass(frozen=True)
class Options:
    emm: tuple[str, ...] = option((), "emm.json files, separated by commas")
    out: str = option("", "PNG to write; emm.png beside the first file, by default")
    published: bool = option(True, "draw the published curve too")

    def __post_init__(self):
        if not self.emm:
            raise ValueError("nothing to draw; give --emm RESULT/emm.json")


def published_curve(path=PUBLISHED, experiment="resolution", series="32x32"):
    """|D| and ratio (0 to 1) of a published curve, digitised from the authors' figures; the base run by default."""
    with open(path, newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        points = sorted((int(row["n_train"]), float(row["ratio_percent"]) / 100) for row in rows
                        if (row["experiment"], row["series"]) == (experiment, series))
    return [n for n, _ in points], [ratio for _, ratio in points]


def plot(options):
    """Draw the searches that the options name; returns the path of the PNG."""
    import matplotlib  # a second to import: only where it is used
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt, ticker
    results = [run.read_json(path) for path in options.emm]
    for path, result in zip(options.emm, results):
        if "probes" not in result:
            raise ValueError(f"{path} is not an emm.json of emm.py")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names = [describe(result, results) for result in results]
    if options.published:
        left.plot(*published_curve(), "--", marker=".", color="0.6", label="published, digitised:\nCIFAR-10, DDPM++ width 128")
    for i, (result, name) in enumerate(zip(results, names)):
        probes = sorted(result["probes"], key=lambda p: p["n"])
        sizes, ratios = [p["n"] for p in probes], [p["ratio"] for p in probes]
        error = [[p["ratio"] - p["interval_95"][0] for p in probes], [p["interval_95"][1] - p["ratio"] for p in probes]]
        emm = f": EMM {result['emm']:.0f}" if result["emm"] else ""
        left.errorbar(sizes, ratios, error, marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)],
                      capsize=3, label=name + emm)
        if None not in result["bracket"]:
            left.axvspan(*result["bracket"], color=COLOURS[i % len(COLOURS)], alpha=0.15, linewidth=0)
    target = 1 - results[0]["eps"]
    left.axhline(target, color="black", linewidth=1, linestyle=":", label=f"{target:.0%}")
    left.set(xscale="log", xlabel="training images |D|", ylabel="memorization ratio", ylim=(-0.03, 1.03))
    left.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.xaxis.set_minor_formatter("")
    left.legend(fontsize="small")
    for i, (result, name) in enumerate(zip(results, names)):
        probes = sorted(result["probes"], key=lambda p: p["n"])
        for j, p in enumerate(probes):
            shade = 1 - 0.7 * j / max(1, len(probes) - 1)
            right.plot([t["epoch"] for t in p["trajectory"]], [t["ratio"] for t in p["trajectory"]], alpha=shade,
                       marker=MARKERS[j % len(MARKERS)], color=COLOURS[i % len(COLOURS)],
                       label=f"{name}: {p['n']}" if len(results) > 1 else f"|D| = {p['n']}")
    right.axhline(target, color="black", linewidth=1, linestyle=":")
    right.set(xlabel="epochs", ylabel="memorization ratio of the snapshot", ylim=(-0.03, 1.03))
    right.legend(fontsize="x-small", ncols=len(results))
    out = Path(options.out) if options.out else Path(options.emm[0]).with_name("emm.png")
    with run.publish(out) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return out


def describe(result, results):
    """The data, and the options in which this search differs from the others, as a curve's name."""
    options = result["options"]
    differing = [key for key in options if any(r["options"].get(key) != options[key] for r in results)]
    return ", ".join([Path(options["data"]).stem, f"{options['arch']} width {options['width']}"]
                     + [f"{key} {options[key]}" for key in differing if key not in ("data", "arch", "width")])


def main():
    print(f"wrote {run.stage(plot, Options, __doc__)}")


if __name__ == "__main__":
    main()
