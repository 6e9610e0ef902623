"""Figures of memorize.py's numbers: shares under every threshold, quality against memorization.

    python -m measure.figures --quality one.json,another.json --out quality.png    results of several commands
"""
from dataclasses import dataclass
from pathlib import Path

import disk
import plot
import run
from run import option


@dataclass(frozen=True)
class Options:
    quality: tuple[str, ...] = option((), "results of memorize.py --quality or --snapshots to draw")
    out: str = option("", "PNG to write; quality.png beside the first file by default")

    def __post_init__(self):
        if not self.quality:
            raise ValueError("give --quality, one or more results of memorize.py --quality, to draw")
        if self.out and not self.out.endswith(".png"):
            raise ValueError(f"--out {self.out} must end in .png")


def draw(options):
    """Draw the quality in result files against their memorization; returns the path of the PNG."""
    out = Path(options.out) if options.out else Path(options.quality[0]).with_name("quality.png")
    found = ((path, disk.read_json(path)) for path in options.quality)
    points = [(path, row) for path, result in found for row in result.get("snapshots", [result])]
    plot.save(tradeoff([row for _, row in points], [path for path, _ in points]), out)
    return out


def draw_shares(result, path):
    """Draw the curve of a result of memorize.py --curve as PNG."""
    plot.save(shares(result), path)


@plot.plain_matplotlib()
def shares(result):
    """Of a result of memorize.py --curve: shares of samples and held-out images under every threshold."""
    found, (figure, axes) = result["curve"], plot.subplots()
    for name, colour, line in (("samples", plot.COLOURS[1], "-"), ("held_out", plot.COLOURS[0], "--")):
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


@plot.plain_matplotlib()
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
    figure, (left, right) = plot.subplots(2, 11)
    for name, colour, marker in zip(("precision", "recall", "coverage"), plot.COLOURS, plot.MARKERS):
        y = [q[name] for q in found]
        bars = plot.error(y, [q[f"{name}_interval_95"] for q in found])
        left.errorbar(ratios, y, bars, color=colour, marker=marker, capsize=2, linewidth=1, label=name)
    right.plot(ratios, [q["frechet"] for q in found], color=plot.COLOURS[3], marker="o", linewidth=1)
    for result, ratio, q in zip(results, ratios, found):
        if result.get("step"):
            right.annotate(f"step {result['step']:,}", (ratio, q["frechet"]), (4, 4),
                           textcoords="offset points", fontsize="x-small")
    left.set(ylabel=f"share, against {against.replace('_', '-')} images", ylim=(-0.03, 1.03))
    right.set(ylabel="Frechet distance", ylim=(0, None))
    for axes in (left, right):
        axes.set(xlabel=f"memorization ratio{rate}")
    left.legend(fontsize="small")
    return figure


def main():
    run.stage(draw, Options, __doc__, words="wrote {}".format)


if __name__ == "__main__":
    main()
