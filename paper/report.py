"""What the experiments found, beside what the paper claims: a page of Markdown, which links its figures.

    python -m paper.report --scale cpu                        docs/results.md and docs/results.png

Reads paper/results/SCALE/NAME.json and the figures beside them, as paper.experiments wrote them, and
notes.md there, in which `## NAME` heads what a person has to say of an experiment. A claim is judged by the
differences between its two places, seed by seed (the same seed has the same training set where the data are
the same): it agrees, or disagrees, if Student's 95% interval of their mean lies on one side of zero, and is
not resolved if zero lies inside.
"""
import os
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import emm
import run
from paper import figures as drawn
from paper.protocol import ALL, EXPERIMENTS, FIRST, LAST, SCALES
from run import option


@dataclass(frozen=True)
class Options:
    scale: str = option("cpu", "results to report", SCALES)
    results: str = option("paper/results", "directory of result files, as --out of paper.experiments")
    out: str = option("docs/results.md", "page to write; a figure of all experiments comes beside it")

    def __post_init__(self):
        if not self.out.endswith(".md"):
            raise ValueError(f"--out {self.out} must end in .md")


def place(result, series, x, end):
    """The values of a place of a Claim, one a seed, by x.

    An EMM outside the range searched counts as an end of its bracket: for end 0 the most it surely reaches,
    for end 1 what it surely does not exceed, or None.
    """
    names = list(dict.fromkeys(p["series"] for p in result["points"]))
    series = {FIRST: names[0], LAST: names[-1]}.get(series, series)
    line = [p for p in result["points"] if p["series"] == series]
    if x != ALL:
        line = [line[0] if x == FIRST else line[-1] if x == LAST else next(p for p in line if p["x"] == x)]

    def ends(p):
        brackets = p.get("brackets", [(None, None)] * len(p["values"]))
        bounds = [bracket[end] if bracket[end] is not None or end else 0 for bracket in brackets]
        return [bound if v is None else v for v, bound in zip(p["values"], bounds)]
    return {p["x"] if x == ALL else None: ends(p) for p in line}


def judge(result, claim):
    """A Claim against a result: its words, the mean difference over seeds, its interval, and a verdict.

    `bound` says what the difference is: "", or "at least " or "at most " where an EMM lay outside the range
    searched.
    """
    def differences(end):  # none greater for end 0, none smaller for end 1
        more, less = place(result, *claim.more, end), place(result, *claim.less, 1 - end)
        pairs = [[(more[x][i], less[x][i]) for x in more if x in less] for i in range(len(result["seeds"]))]
        known = all(None not in pair for seed in pairs for pair in seed)
        return [statistics.mean(a - b for a, b in seed) for seed in pairs] if known else None

    least, most = differences(0), differences(1)
    found = dict(claim=claim.text, difference=None, interval=None, bound="", verdict="not resolved")
    if len(result["seeds"]) < 2:
        return found | dict(verdict="not resolved: one seed")
    least, most = ({} if d is None else emm.mean_interval(d) for d in (least, most))
    if least and least["interval"][0] > 0:
        return found | dict(difference=least["emm"], interval=least["interval"],
                            bound="" if least == most else "at least ", verdict="agrees")
    if most and most["interval"][1] < 0:
        return found | dict(difference=most["emm"], interval=most["interval"],
                            bound="" if least == most else "at most ", verdict="disagrees")
    return found | (dict(difference=least["emm"], interval=least["interval"]) if least == most else
                    dict(verdict="not resolved: an EMM lies outside the range searched"))


def figures(folder, name):
    """The pictures of an experiment: NAME.png, then NAME-*.png. Raises ValueError without the first."""
    if not (folder / f"{name}.png").exists():
        raise ValueError(f"{folder / name}.png is missing; "
                         f"draw it with: python -m paper.figures --experiment {folder / name}.json")
    others = [other for other in EXPERIMENTS if other.startswith(f"{name}-")]
    return [folder / f"{name}.png"] + [
        path for path in sorted(folder.glob(f"{name}-*.png"))
        if not any(path.stem == other or path.stem.startswith(f"{other}-") for other in others)]


def notes(folder):
    """The notes of notes.md by experiment, {} without one. Raises ValueError for text under no heading."""
    path = folder / "notes.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, *parts = re.split(r"^##[ \t]+(.*?)[ \t]*$", text, flags=re.M)
    names = parts[::2]
    wrong = [name for name in names if name not in EXPERIMENTS or names.count(name) > 1]
    fault = "text before its first heading" if before.strip() else ""
    if wrong:
        fault = f"notes on {wrong[0]!r}, which is no experiment or stands there twice"
    if fault:
        raise ValueError(f"{path} has {fault}; head each note with ## and a name of protocol.py")
    return dict(zip(names, map(str.strip, parts[1::2])))


def amount(value, measure, signed=False):
    """A ratio as percent, a difference of ratios in points, an EMM in images."""
    if value is None:
        return "-"
    sign = "+" if signed else ""
    if measure == "ratio":
        return f"{100 * value:{sign}.1f}" + ("" if signed else "%")
    return f"{value:{sign},.0f}" if abs(value) >= 100 else f"{value:{sign}.1f}"


def between(interval, measure, signed=False):
    """An interval; one of values, and not of differences, ends where they can."""
    if interval is None:
        return "-"
    low, high = interval
    if not signed:
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


CLAIM_HEAD = ["claim", "difference", "95% interval", "verdict"]


def claim_rows(result):
    """The claims on an experiment as rows of text."""
    measure = result["measure"]
    judged = [judge(result, claim) for claim in EXPERIMENTS[result["name"]].claims]
    return [[j["claim"], j["bound"] + amount(j["difference"], measure, True),
             between(j["interval"], measure, True), j["verdict"]] for j in judged]


def read(options):
    """A scale's results in the order of the table. Raises ValueError without any, or for another table's."""
    folder, found = Path(options.results) / options.scale, []
    for name, e in EXPERIMENTS.items():
        if (path := folder / f"{name}.json").exists():
            result = run.read_json(path)
            places = [[p.get("series"), p.get("x"), p.get("n")] for p in result.get("points", ())]
            table = [[p.series, p.x, p.n] for p in getattr(e, options.scale)]
            if places != table or (result["name"], result["scale"]) != (name, options.scale):
                raise ValueError(f"{path} is of another protocol.py; run it again with: "
                                 f"python -m paper.experiments --name {name} --scale {options.scale}")
            found.append(result)
    if not found:
        raise ValueError(f"{folder} has no results; make some with: "
                         f"python -m paper.experiments --name size --scale {options.scale}")
    return found


def summary(results):
    """All claims as rows of text, with their experiments."""
    none = [["(no direction claimed)", "", "", ""]]
    return [[r["name"], *row] for r in results for row in claim_rows(r) or none]


def claimed(experiment):
    """The paper's finding, and how it is known."""
    source = "by its figure, digitised" if experiment.published else "by its text"
    source = "no number seen" if "second hand" in experiment.finding else source
    return f"Paper ({source}): {experiment.finding}"


def setting(result):
    """Where and how a result was measured, in words."""
    versions = result["versions"]
    said = f"with `{result['options']['also']}`; " if result["options"]["also"] else ""
    return (f"{said}{result['processor']}; torch {versions['torch']}, python {versions['python']}; "
            f"commit {result['commit']}")


def introduction(options, results):
    seeds = sorted({len(r["seeds"]) for r in results})
    counts = [row[-1].split(":")[0] for row in summary(results) if row[-1]]
    said = ", ".join(f"{verdict}: {counts.count(verdict)}" for verdict in dict.fromkeys(counts))
    yield (f"Measured at {options.scale} scale, {' or '.join(map(str, seeds))} seeds a point, "
           "each with its own training set, weights and noise; intervals are Student's, 95%, over seeds. "
           f"`make NAME SCALE={options.scale}` repeats an experiment.")
    yield ("A claim is judged by the differences between its two places, seed by seed: "
           "it agrees, or disagrees, if the interval of their mean lies on one side of zero, "
           f"and is not resolved otherwise. {len(counts)} claims{' - ' if said else ''}{said}. "
           "Nothing is corrected for their number, and an EMM's bracket is not in its interval; "
           "an interval of equal values has no width, "
           "and one of few values can reach beyond what is possible. "
           "Differences of ratios are in percentage points, of EMM in images.")


def markdown(options, results, said):
    """The report as Markdown, piece by piece; figures are links."""
    def table(head, rows):
        lines = [head, ["---"] * len(head), *rows]
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        return "\n".join("| " + " | ".join(line) + " |" for line in escaped) + "\n"

    words = f"--scale {options.scale} --results {options.results} --out {options.out}"
    yield f"# Results at {options.scale} scale\n"
    yield f"Written by `python -m paper.report {words}`: change that, or notes.md, and not this.\n"
    yield from (text + "\n" for text in introduction(options, results))
    yield f"![all experiments]({Path(options.out).with_suffix('.png').name})\n"
    yield table(["experiment", *CLAIM_HEAD], summary(results))
    for r in results:
        e, name = EXPERIMENTS[r["name"]], r["name"]
        yield f"## {name}: {e.about}\n\n{claimed(e)}\n"
        head, *rows = point_rows(r)
        yield table(head, rows)
        if e.claims:
            yield table(CLAIM_HEAD, claim_rows(r))
        if name in said:
            yield said[name] + "\n"
        folder = Path(os.path.relpath(Path(options.results) / options.scale, Path(options.out).parent))
        for path in figures(Path(options.results) / options.scale, name):
            yield f"![{path.stem}]({folder / path.name})\n"
        yield f"`make {name} SCALE={options.scale}`; {setting(r)}\n"


def report(options):
    """Write the report that the options describe; returns its path."""
    results, said = read(options), notes(Path(options.results) / options.scale)
    text = "\n".join(markdown(options, results, said))
    drawn.grid(results, [in_short(result) for result in results], Path(options.out).with_suffix(".png"))
    with run.publish(options.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return options.out


def in_short(result):
    """The verdicts on an experiment's claims in a few words, such as "agrees, not resolved"."""
    verdicts = [row[-1].partition(":")[0] for row in claim_rows(result)]
    return ", ".join(dict.fromkeys(verdicts)) or "no direction claimed"


def main():
    run.stage(report, Options, __doc__, say="wrote {}".format)


if __name__ == "__main__":
    main()
