"""Figures of the paper's experiments: one each, and all of them small on one page.

    python -m paper.figures --experiment paper/results/cpu/width.json      paper/results/cpu/width.png

Reads the result files of paper.experiments alone. The published points, where there are some, are in grey.
"""
from dataclasses import dataclass
from pathlib import Path

import run
from plot import COLOURS, MARKERS, plain_matplotlib, save, subplots
from run import option

VERDICTS = dict(agrees="#009e73", disagrees="#d55e00")  # colours of titles


@dataclass(frozen=True)
class Options:
    experiment: str = option("", "a result file of paper.experiments")

    def __post_init__(self):
        if not self.experiment:
            raise ValueError("give --experiment, a result file such as paper/results/cpu/width.json")


def draw(options):
    """Draw a result beside its file; returns the path of its PNG."""
    out, result = Path(options.experiment).with_suffix(".png"), run.read_json(options.experiment)
    if "measure" not in result or "points" not in result:
        raise ValueError(f"{options.experiment} is not a result file of paper.experiments")
    with plain_matplotlib():
        save(points(result), out)
        if result["name"] == "size":
            save(epochs(result), out.with_stem(f"{out.stem}-epochs"))
        if "denoising" in result["points"][0]:
            save(denoising(result), out.with_stem(f"{out.stem}-loss"))
    return out


def points(result):
    """An experiment's points and intervals over seeds, a line for each series; published ones in grey."""
    figure, axes = subplots()
    draw_points(axes, result)
    axes.set(xlabel=result["x"], ylabel="EMM" if result["measure"] == "emm" else "memorization ratio",
             title=f"{result['about']} ({result['scale']} scale, {len(result['seeds'])} seeds, "
                   "95% intervals)")
    axes.title.set_fontsize("medium")
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize="small")
    return figure


def grid(results, verdicts, path, columns=4):
    """Write a PNG of many experiments, small, with the verdict on each in its title."""
    with plain_matplotlib():
        import matplotlib
        from matplotlib.figure import Figure
        matplotlib.rcParams["font.size"] = 7
        rows = -(-len(results) // columns)
        figure = Figure(figsize=(3 * columns, 2.2 * rows), layout="constrained")
        every = figure.subplots(rows, columns, squeeze=False).flat
        for result, verdict, axes in zip(results, verdicts, every):
            draw_points(axes, result, small=True)
            axes.set_xlabel(result["x"])
            axes.set_title(f"{result['name']}: {verdict}",
                           color=VERDICTS.get(verdict.partition(",")[0], "black"))
        for axes in list(every):
            axes.remove()
        save(figure, path)


def draw_points(axes, result, small=False):
    """The points of an experiment on axes of matplotlib, without titles."""
    from matplotlib import ticker
    found = result["points"]
    places = list(dict.fromkeys(str(p["x"]) for p in found))
    numbers = [p["x"] for p in found]
    numeric = all(isinstance(x, (int, float)) and x > 0 for x in numbers)

    def place(x):
        return float(x) if numeric else places.index(str(x))

    def ordered(line):  # values of an option, and not names
        return all(str(p["x"]).replace(".", "", 1).replace("e-", "", 1).isdigit() for p in line)
    for i, series in enumerate(dict.fromkeys(p["series"] for p in found)):
        line = [p for p in found if p["series"] == series]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        for p in line:  # every seed, small
            values = [float("nan") if v is None else v for v in p["values"]]
            axes.plot([place(p["x"])] * len(values), values,
                      linestyle="none", marker=".", markersize=4, color=colour, alpha=0.6)
        for p in line:
            for value, (low, high) in zip(p["values"], p.get("brackets", ())):
                if value is None:
                    named = "outside the range searched" in axes.get_legend_handles_labels()[1]
                    axes.plot(place(p["x"]), low or high, linestyle="none", color=colour,
                              marker="v" if low is None else "^", markerfacecolor="white",
                              label=None if named else "outside the range searched")
        line = [p for p in line if p["mean"] is not None]
        floor, ceiling = (0, 1) if result["measure"] == "ratio" else (0, float("inf"))
        # not below 0, which rounding may give where all values are equal
        error = [[max(0, p["mean"] - max(floor, p["interval"][0])) for p in line],
                 [max(0, min(ceiling, p["interval"][1]) - p["mean"]) for p in line]]
        axes.errorbar([place(p["x"]) for p in line], [p["mean"] for p in line], error, capsize=3,
                      label=series or "measured", marker=marker, color=colour,
                      linestyle=("-", "--", ":", "-.")[i % 4] if ordered(line) else "none")
    for i, series in enumerate(dict.fromkeys(p["series"] for p in result["published"])):
        line = [p for p in result["published"] if p["series"] == series and (numeric or p["x"] in places)]
        axes.plot([place(p["x"]) for p in line], [p["value"] for p in line],
                  marker=MARKERS[i % len(MARKERS)], color="0.6", linestyle="--" if ordered(line) else "none",
                  label=f"published, digitised: {series}".rstrip(": "))
    if numeric and max(numbers) >= 8 * min(numbers):
        axes.set_xscale("log")
    if numeric:
        axes.set_xticks(sorted(set(numbers)))
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.set_xticks(range(len(places)), places, rotation=30 if len(places) > (3 if small else 8) else 0)
    axes.set_ylim(bottom=0, top=1.03 if result["measure"] == "ratio" else None)
    if small and len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize="xx-small")


def epochs(result):
    """The ratio of every snapshot against epochs, for each |D|: a line of means over seeds, dots of seeds."""
    figure, axes = subplots()
    for i, p in enumerate(result["points"]):
        look = dict(marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)])
        snapshots = list(zip(*p["trajectories"]))  # [snapshots, seeds]
        means = [sum(t["ratio"] for t in s) / len(s) for s in snapshots]
        axes.plot([s[0]["epoch"] for s in snapshots], means,
                  label=f"|D| = {p['n']:,}", linestyle=("-", "--", ":", "-.")[i % 4], **look)
        for s in snapshots:
            axes.plot([t["epoch"] for t in s], [t["ratio"] for t in s],
                      linestyle="none", markersize=3, alpha=0.5, **look)
    axes.set(xlabel="epochs", ylabel="memorization ratio of the snapshot", ylim=(-0.03, 1.03), xscale="log",
             title=f"against epochs ({result['scale']} scale, mean of {len(result['seeds'])} seeds)")
    axes.title.set_fontsize("medium")
    axes.legend(fontsize="small")
    return figure


def denoising(result):
    """Loss against sigma, and the samples' ratios of distances: of the optimum and of the trained model."""
    figure, (left, right) = subplots(2, 11)
    for p, colour, marker in zip(result["points"], COLOURS, MARKERS):
        for key, where, line in (("loss", "training images", "-"), ("loss_outside", "images outside", "--")):
            for i, d in enumerate(d for d in p["denoising"] if key in d):
                left.plot(result["sigmas"], d[key], line,
                          color=colour, marker=marker, markersize=4, linewidth=1,
                          markerfacecolor=colour if line == "-" else "white",
                          label=f"{p['x']}, {where}" if i == 0 else None)
        for i, d in enumerate(p["denoising"]):
            right.plot(d["distance_ratio_quantiles"], [q / 100 for q in result["quantiles"]],
                       color=colour, marker=marker, markersize=4, linewidth=1,
                       label=p["x"] if i == 0 else None)
    # a loss of exactly zero, of the optimum at little noise, has no place on a logarithmic axis
    left.set(xscale="log", yscale="log", ylim=(1e-7, None),
             xlabel="noise level sigma", ylabel="denoising loss a pixel")
    right.axvline(1 / 3, color="black", linewidth=1, linestyle=":", label="1/3")
    right.set(xlabel="nearest distance / second nearest", ylabel="share of the samples below",
              ylim=(-0.03, 1.03))
    for axes in (left, right):
        axes.legend(fontsize="small")
    return figure


def main():
    run.stage(draw, Options, __doc__, say="wrote {}".format)


if __name__ == "__main__":
    main()
