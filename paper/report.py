"""What the experiments found, beside what the paper claims: a page of Markdown and its figures.

    python -m paper.report --scale cpu     docs/results.md, results.png, results-beyond.png; a minute

Reads paper/results/SCALE/NAME.json, as paper.experiments wrote them, draws the figures of each beside it, and
puts in what a person has to say under `## NAME` in notes.md there. Experiments beyond the paper come last.
"""
import math
import os
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import disk
import run
import search
from paper import dynamics, figures
from paper.claims import ALL, FIRST, LAST, SCALES, Slope
from paper.protocol import EXPERIMENTS
from paper.questions import DYNAMICS
from run import option

SHARES = "ratio", "precision of samples"  # measures that are shown in percent,
SMALL = "distance to the optimum"         # and with more digits
CLAIM_HEAD = ["experiment", "claim", "measured", "95% interval", "verdict"]
METHOD = """\
Each seed has its own training set, weights and noise; intervals are Student's, 95%, over seeds. A claim is
about one value, about the difference between two places, seed by seed (of shares in percentage points), or
about the power by which EMM or the ratio grows. It agrees if the interval lies where the claim says,
disagrees if it lies elsewhere, and is not resolved otherwise. An EMM outside the range searched leaves the
difference open, and the interval covers whatever it may be. Nothing is corrected for the number of claims,
and an EMM's bracket is not in its interval; an interval of equal values has no width, and one of few values
can reach beyond what is possible.
"""


@dataclass(frozen=True)
class Options:
    scale: str = option("cpu", "results to report", SCALES)
    results: str = option("paper/results", "directory of result files, as --out of paper.experiments")
    out: str = option("docs/results.md", "page to write; figures of all experiments come beside it")


def bounds(point):
    """What each seed's value is at least and at most: an EMM outside the range has an end of its bracket."""
    brackets = point.get("brackets", [(None, None)] * len(point["values"]))
    return [(low or 0, high or math.inf) if value is None else (value, value)
            for value, (low, high) in zip(point["values"], brackets)]


def place(result, series, x):
    """The points of a place of a Claim."""
    points = result["points"]
    series = {FIRST: points[0]["series"], LAST: points[-1]["series"]}.get(series, series)
    line = [p for p in points if p["series"] == series]
    ends = {FIRST: line[:1], LAST: line[-1:], ALL: line}
    return ends[x] if x in ends else [p for p in line if p["x"] == x]


def differences(result, claim):
    """Of a Claim, what the difference is at least and at most, each a list over seeds."""
    more, seeds = place(result, *claim.more), range(len(result["seeds"]))
    if not claim.less:
        return [[bounds(p)[i][end] for p in more for i in seeds] for end in (0, 1)]
    pairs = [(bounds(a), bounds(b)) for a in more for b in place(result, *claim.less)
             if a["x"] == b["x"] or claim.more[1] != ALL]
    return [[statistics.fmean(a[i][end] - b[i][1 - end] for a, b in pairs) for i in seeds]
            for end in (0, 1)]


def slopes(result, claim):
    """The same of a Slope: equal, or unbounded where an EMM or a ratio has no logarithm."""
    line = [p for p in result["points"] if claim.series in (ALL, p["series"])]
    if not all(value for p in line for value in p["values"]):
        return [-math.inf], [math.inf]
    x = [math.log(p["x"]) for p in line]
    found = [statistics.linear_regression(x, [math.log(value) for value in seed]).slope
             for seed in zip(*(p["values"] for p in line))]
    return found, found


def judge(result, claim):
    """What a claim is about, a mean over seeds or None if that is open, its interval, and a verdict."""
    if len(result["seeds"]) < 2:
        return None, None, "not resolved"
    ends = slopes(result, claim) if isinstance(claim, Slope) else differences(result, claim)
    (least, below), (most, above) = (
        search.student(seeds) if all(map(math.isfinite, seeds)) else (0, math.inf) for seeds in ends)
    (low, high), (bottom, top) = (least - below, most + above), claim.range
    verdict = "disagrees" if high < bottom or top < low else "not resolved"
    if bottom < low and high <= top:
        verdict = "agrees"
    return least if ends[0] == ends[1] else None, (low, high), verdict


def amount(value, measure, signed=False):
    """A ratio as percent, a difference of ratios in points, an EMM in images, other numbers as they are."""
    sign = "+" if signed else ""
    if value is None:
        return "-"
    if measure in SHARES:
        return f"{100 * value:{sign}.1f}" + ("" if signed else "%")
    if measure == "emm":
        return f"{value:{sign},.0f}" if abs(value) >= 100 else f"{value:{sign}.1f}"
    return f"{value:{sign}.{4 if measure == SMALL else 2}f}"


def between(interval, measure, signed=False):
    """An interval; one of values, and not of differences, ends where they can."""
    if interval is None:
        return "-"
    low, high = interval
    if not signed and measure in ("ratio", "emm"):
        low, high = max(0, low), min(1, high) if measure == "ratio" else high
    return f"{amount(low, measure, signed)} to {amount(high, measure, signed)}"


def point_rows(result):
    """The points of a result as rows of text, the head first."""
    measure, several = result["measure"], any(p["series"] for p in result["points"])
    sized = any(p["n"] not in (None, p["x"]) for p in result["points"])
    rows = [["series"] * several + ["|D|"] * sized
            + [result["x"], *(f"seed {seed}" for seed in result["seeds"]), "mean", "95% interval"]]
    for p in result["points"]:
        cells = [amount(v, measure) for v in p["values"]]
        for i, (low, high) in enumerate(p.get("brackets", ())):
            if p["values"][i] is None:
                cells[i] = f"under {high}" if low is None else f"{low} or more"
        rows.append([p["series"]] * several + ([f"{p['n']:,}"] if sized else [])
                    + [str(p["x"]), *cells, amount(p["mean"], measure), between(p["interval"], measure)])
    return rows


def claim_rows(result):
    """The claims on an experiment as rows of text."""
    rows = []
    for claim in EXPERIMENTS[result["name"]].claims:
        if not isinstance(claim, Slope) and not place(result, *claim.more):
            continue  # of a series that this scale has not
        measure = "power" if isinstance(claim, Slope) else result["measure"]
        signed = isinstance(claim, Slope) or bool(claim.less)  # and not of one value
        value, interval, verdict = judge(result, claim)
        rows.append([result["name"], claim.text, amount(value, measure, signed),
                     between(interval, measure, signed), verdict])
    return rows


def read(options):
    """A scale's results in the order of the table. Raises ValueError without any, or for another table's."""
    folder, found = Path(options.results) / options.scale, []
    for name, e in EXPERIMENTS.items():
        if (path := folder / f"{name}.json").exists():
            result = disk.read_json(path)
            places = [[p.get("series"), p.get("x"), p.get("n")] for p in result.get("points", ())]
            table = [[p.series, p.x, p.n] for p in getattr(e, options.scale)]
            if places != table:
                raise ValueError(f"{path} is of another protocol.py; run it again with: "
                                 f"python -m paper.experiments --name {name} --scale {options.scale}")
            found.append(result)
    if not found:
        raise ValueError(f"{folder} has no results; make some with: "
                         f"python -m paper.experiments --name size --scale {options.scale}")
    return found


def notes(folder):
    """The notes of notes.md by experiment, {} without one. Raises ValueError for what no experiment is."""
    path = folder / "notes.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = re.split(r"^##[ \t]+(.*?)[ \t]*$", text, flags=re.M)
    said = dict(zip(parts[1::2], map(str.strip, parts[2::2])))
    if unknown := said.keys() - EXPERIMENTS.keys() - {"dynamics"}:
        raise ValueError(f"{path} has notes on {min(unknown)!r}, which is no experiment of protocol.py")
    return said


def parts(options, results):
    """Title, figure and results of the paper's experiments and of those beyond it, where there are any."""
    out, beyond = Path(options.out), [r for r in results if EXPERIMENTS[r["name"]].known == "beyond"]
    papers = [r for r in results if r not in beyond]
    found = ((f"Results at {options.scale} scale", out.with_suffix(".png"), papers),
             ("Beyond the paper", out.with_name(f"{out.stem}-beyond.png"), beyond))
    return [part for part in found if part[-1]]


def table(head, *rows):
    """Rows of text as a table of Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped) + "\n"


def markdown(options, results, said):
    """The report as Markdown, piece by piece; figures are links."""
    words = f"--scale {options.scale} --results {options.results} --out {options.out}"
    for i, (title, picture, part) in enumerate(parts(options, results)):
        yield f"# {title}\n"
        if i == 0:
            yield f"Written by `python -m paper.report {words}`: change that, or notes.md, and not this.\n"
            yield METHOD
        rows = [row for r in part for row in claim_rows(r)]
        verdicts = [row[-1] for row in rows]
        counts = [f"{verdict}: {verdicts.count(verdict)}" for verdict in dict.fromkeys(verdicts)]
        yield f"Claims: {len(rows)}, {', '.join(counts)}.\n" if rows else "No claims.\n"
        yield f"![{title}]({picture.name})\n"
        yield table(CLAIM_HEAD, *rows)
        for result in part:
            yield from section(options, result, said.get(result["name"]))
    path = Path(options.results) / options.scale / "dynamics.json"
    if path.exists():
        yield from of_dynamics(options, path, said.get("dynamics"))


def section(options, result, note):
    """The report on an experiment, piece by piece."""
    name, e = result["name"], EXPERIMENTS[result["name"]]
    source = {"figure": "Paper (by its figure, digitised): ", "text": "Paper (by its text): ",
              "second hand": "Paper (second hand, no number seen): "}.get(e.known, "")
    yield f"## {name}: {e.about}\n\n{source}{e.finding}\n"
    yield table(*point_rows(result))
    yield from ending(options, name, result, note)


def ending(options, name, result, note):
    """What a person says of a result, its figures, and where it is from."""
    if note:
        yield note + "\n"
    folder = Path(options.results) / options.scale
    for path in (folder / f"{name}.png", *sorted(folder.glob(f"{name}.*.png"))):
        yield f"![{path.stem}]({os.path.relpath(path, Path(options.out).parent)})\n"
    versions, also = result["versions"], result["options"].get("also")
    machines = " and ".join(result.get("trained_on", [result["processor"]]))
    yield (f"`make {name} SCALE={options.scale}`; {f'with `{also}`; ' if also else ''}{machines}; "
           f"torch {versions['torch']}, python {versions['python']}; commit {result['commit']}\n")


def of_dynamics(options, path, note):
    """The report on what paper.dynamics measured, piece by piece."""
    found, rows = disk.read_json(path), []
    for name, (what, over, others) in DYNAMICS.items():
        power = found["powers"].get(name) or found[name]
        rows.append([f"{what}, over {over}", *(amount(v, "power") for v in power["values"]),
                     amount(power["mean"], "power"), between(power["interval"], "power"), others])
    yield "## dynamics: when memorization sets in, and when samples are good\n"
    sizes = ", ".join(map(str, found["sizes"]))
    yield f"|D| of {sizes}, {found['options']['steps']:,} steps each. What grows as which power of what:\n"
    yield table(["what", *(f"seed {seed}" for seed in found["seeds"]), "power", "95% interval", "elsewhere"],
                *rows)
    yield "What it costs to stop early, each seed: copies, and the distance of samples to images outside D.\n"
    yield table(["|D|", "stopped at", "steps", "memorized", "Frechet distance, times its least"],
                *([f"{n:,}", f"the {name}", listed(steps, ","), listed(ratios, ".1%"), listed(times, ".2f")]
                  for n, name, steps, ratios, times in dynamics.stops(found)))
    yield from ending(options, "dynamics", found, note)


def listed(values, how):
    return ", ".join(format(value, how) for value in values)


def report(options):
    """Write the report that the options describe; returns its path."""
    folder, results = Path(options.results) / options.scale, read(options)
    said = notes(folder)
    for result in results:
        figures.draw(folder / f"{result['name']}.json")
    for _, picture, part in parts(options, results):
        verdicts = [", ".join(dict.fromkeys(row[-1] for row in claim_rows(result))) for result in part]
        figures.grid(part, verdicts, picture)
    with disk.whole_file(options.out) as temporary:
        temporary.write_text("\n".join(markdown(options, results, said)), encoding="utf-8")
    return options.out


def main():
    run.stage(report, Options, __doc__, words="wrote {}".format)


if __name__ == "__main__":
    main()
