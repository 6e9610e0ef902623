"""Figures of the paper's experiments: one each, and all of them small on one page."""
from pathlib import Path

import disk
from plot import COLOURS, MARKERS, plain_matplotlib, save, subplots

APART = 0.85  # at most the quotient of two neighbouring ticks
VERDICTS = dict(agrees="#009e73", disagrees="#d55e00")  # colours of titles


@plain_matplotlib()
def draw(path):
    """Draw a result file of paper.experiments, as PNGs beside it; returns the path of its points."""
    out, result = Path(path).with_suffix(".png"), disk.read_json(path)
    figure, axes = subplots()
    draw_points(axes, result, "small")
    labels = dict(emm="EMM", ratio="memorization ratio")
    axes.set_ylabel(labels.get(result["measure"], result["measure"]))
    axes.set_title(f"{result['about']} ({result['scale']} scale, {len(result['seeds'])} seeds, "
                   "95% intervals)", fontsize="medium")
    save(figure, out)
    if "denoising" in result["points"][0]:
        save(denoising(result), out.with_suffix(".loss.png"))
    return out


@plain_matplotlib()
def grid(results, verdicts, path, columns=4):
    """Write a PNG of many experiments, small, with the verdict on each in its title."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams["font.size"] = 7
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(3 * columns, 2.2 * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flat
    for result, verdict, axes in zip(results, verdicts, every):
        draw_points(axes, result, "xx-small")
        axes.tick_params("x", rotation=30 if len(axes.get_xticks()) > 3 else 0)
        axes.set_title(f"{result['name']}: {verdict or 'no direction claimed'}",
                       color=VERDICTS.get(verdict.partition(",")[0], "black"))
    for axes in list(every):
        axes.remove()
    save(figure, path)


def draw_points(axes, result, size):
    """The points of an experiment on axes of matplotlib: small dots of seeds, means with their intervals.

    Where there are several series, they are named in a legend with letters of that size.

    Published ones, where the result has any, are grey.
    An EMM outside the range searched is an arrow at its end.
    """
    found = result["points"]
    xs = list(dict.fromkeys(p["x"] for p in found))
    numeric = all(isinstance(x, (int, float)) and x > 0 for x in xs)
    place = {x: x if numeric else i for i, x in enumerate(xs)}
    for i, series in enumerate(dict.fromkeys(p["series"] for p in found)):
        line, colour = [p for p in found if p["series"] == series], COLOURS[i % len(COLOURS)]
        for p in line:
            for value, (low, high) in zip(p["values"], p.get("brackets", [(None, None)] * len(p["values"]))):
                marker = "." if value is not None else "v" if low is None else "^"
                axes.plot(place[p["x"]], low or high if value is None else value,
                          marker=marker, markersize=4, color=colour, alpha=0.6)
        line = [p for p in line if p["mean"] is not None]
        half = [p["mean"] - p["interval"][0] if p["interval"] else 0 for p in line]
        named = any(isinstance(p["x"], str) for p in line)
        axes.errorbar([place[p["x"]] for p in line], [p["mean"] for p in line], half, capsize=3,
                      label=series or "measured", marker=MARKERS[i % len(MARKERS)], color=colour,
                      linestyle="none" if named else ("-", "--", ":", "-.")[i % 4])
    places, theirs = {str(x): where for x, where in place.items()}, result.get("published", ())
    for i, series in enumerate(dict.fromkeys(p["series"] for p in theirs)):
        line = [p for p in theirs if p["series"] == series and str(p["x"]) in places]
        axes.plot([places[str(p["x"])] for p in line], [p["value"] for p in line], "--", color="0.6",
                  marker=MARKERS[i % len(MARKERS)], label=f"published, digitised: {series}".rstrip(": "))
    if numeric:
        axes.set_xscale("log" if max(xs) >= 8 * min(xs) else "linear")
        ticks = [max(xs)]
        for x in sorted(xs, reverse=True):  # those that can be read beside each other
            ticks += [x] if x < APART * ticks[-1] else []
        axes.set_xticks(ticks, [f"{x:,g}" for x in ticks])
        axes.minorticks_off()
    else:
        axes.set_xticks(range(len(xs)), xs, rotation=30 if len(xs) > 8 else 0)
    if result["measure"] in ("ratio", "emm", "distance to the optimum"):
        axes.set_ylim(bottom=0, top=1.03 if result["measure"] == "ratio" else None)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=size)
    axes.set_xlabel(result["x"])


def denoising(result):
    """Loss against sigma, and the samples' ratios of distances: of the optimum and of the trained model."""
    figure, (left, right) = subplots(2, 11)
    for p, colour, marker in zip(result["points"], COLOURS, MARKERS):
        for i, d in enumerate(p["denoising"]):  # of each seed, named once
            look = dict(color=colour, marker=marker, markersize=4, linewidth=1)
            left.plot(result["sigmas"], d["loss"], **look, label=None if i else f"{p['x']}, training images")
            if "loss_outside" in d:
                left.plot(result["sigmas"], d["loss_outside"], "--", **look, fillstyle="none",
                          label=None if i else f"{p['x']}, images outside")
            right.plot(d["distance_ratio_quantiles"], [q / 100 for q in result["quantiles"]], **look,
                       label=None if i else p["x"])
    # a loss of exactly zero, of the optimum at little noise, has no place on a logarithmic axis
    left.set(xscale="log", yscale="log", ylim=(1e-7, None),
             xlabel="noise level sigma", ylabel="denoising loss a pixel")
    right.axvline(1 / 3, color="black", linewidth=1, linestyle=":", label="1/3")
    right.set(xlabel="nearest distance / second nearest", ylabel="share of the samples below",
              ylim=(-0.03, 1.03))
    left.legend(fontsize="small"), right.legend(fontsize="small")
    return figure
