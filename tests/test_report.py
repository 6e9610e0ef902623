"""Verdicts on claims from made-up results, and the report."""
import dataclasses
import math
import re

import pytest
from PIL import Image

import disk
from conftest import ROOT
from paper import report
from paper.claims import ALL, FIRST, KNOWN, LAST, SCALES, Claim, Slope
from paper.protocol import EXPERIMENTS


def made(name, measure):
    """A result of an experiment of the table at CPU scale: values 1, 2 and 3, tenfold at its last point."""
    table = EXPERIMENTS[name].cpu

    def values(p):
        factor = (10 if p is table[-1] else 1) / (100 if measure == "ratio" else 1)
        return [factor * value for value in (1., 2., 3.)]
    points = [(p.series, p.x, values(p)) for p in table]
    found = result(name, points, measure)
    for row, p in zip(found["points"], table):
        row["n"] = p.n
    return found


def result(name, points, measure="ratio"):
    rows = []
    for series, x, values in points:
        mean, interval = (None, None) if None in values else (sum(values) / 3, [0, sum(values)])
        rows.append(dict(series=series, x=x, n=8, values=values, mean=mean, interval=interval,
                         command=f"python emm.py --x '{x}'"))
    return dict(name=name, scale="cpu", x="x | y", about="a <b>", measure=measure, seeds=[0, 1, 2],
                points=rows, options=dict(also="--steps 9" if name == "width" else ""),
                **disk.provenance())


def test_verdicts():
    r = result("labels", [("none", 16, [.1, .2, .3]), ("none", 32, [.0, .0, .1]),
                          ("true", 16, [.5, .6, .7]), ("true", 64, [.9, .9, .9]),
                          ("odd", 16, [.0, .3, .3]), ("lost", 16, [None, 1., 1.])])

    def judged(more, less, *range):
        return report.judge(r, Claim("words", more, less, *range))
    value, interval, verdict = judged(("true", FIRST), ("none", FIRST))
    assert value == pytest.approx(.4) and interval == pytest.approx((.4, .4)) and verdict == "agrees"
    assert judged(("none", FIRST), ("true", FIRST))[2] == "disagrees"
    assert judged(("odd", 16), ("none", 16))[2] == "not resolved"
    assert judged(("none", 16), ("none", 16))[2] == "not resolved"  # no difference at all
    assert judged(("true", ALL), ("none", ALL))[0] == pytest.approx(.4)  # 16, which both have
    assert judged((FIRST, LAST), (FIRST, FIRST))[0] == pytest.approx(-1 / 6)
    assert judged(("true", FIRST), ("none", FIRST), (.3, .5))[2] == "agrees"
    assert judged(("true", FIRST), ("none", FIRST), (-.1, .1))[2] == "disagrees"
    assert judged(("lost", 16), ("none", 16))[::2] == (None, "not resolved")
    r["seeds"] = [0]
    assert judged(("true", 16), ("none", 16)) == (None, None, "not resolved")


def test_a_power_is_judged_by_its_range():
    """Each seed has a power of its own: 0.5, 0.6 and 0.7, of any constant."""
    places = ("a", 10, 3), ("a", 100, 3), ("a", 1000, 3), ("b", 10, 9)
    r = result("width", [(s, x, [c * x**power for power in (.5, .6, .7)]) for s, x, c in places], "emm")
    value, (low, high), verdict = report.judge(r, Slope("words", (0.1, 1), "a"))
    assert value == pytest.approx(.6) and (low + high) / 2 == pytest.approx(.6) and verdict == "agrees"
    assert high - low == pytest.approx(2 * 4.303 * .1 / 3**.5, rel=1e-3)
    for range, verdict in (((.5, 1), "not resolved"), ((1, 2), "disagrees"), ((0, .1), "disagrees")):
        assert report.judge(r, Slope("words", range, "a"))[2] == verdict
    assert report.judge(r, Slope("words", (0.1, 1)))[0] != pytest.approx(value)  # of all points
    r["points"][0]["values"][1] = None
    assert report.judge(r, Slope("words", (0.1, 1), "a")) == (None, (-math.inf, math.inf), "not resolved")


def test_an_emm_outside_the_range_is_a_bound():
    r = result("embedding", [("a", 1, [7., 8., None]), ("b", 1, [None, None, 3.])], "emm")
    r["points"][0]["brackets"] = [[6, 8], [7, 9], [9, None]]
    r["points"][1]["brackets"] = [[None, 2], [None, 2], [2, 4]]
    value, (low, high), verdict = report.judge(r, Claim("words", ("a", 1), ("b", 1)))
    assert value is None and high == math.inf and verdict == "agrees"
    assert low == pytest.approx((5 + 6 + 6) / 3 - 4.303 * (1 / 3)**.5 / 3**.5, rel=1e-3)
    _, (least, most), verdict = report.judge(r, Claim("words", ("b", 1), ("a", 1)))
    assert (least, most) == (-math.inf, -low) and verdict == "disagrees"
    r["points"][1]["brackets"] = [[None, 20], [None, 20], [2, 4]]
    for more, less in ("ab", "ba"):
        assert report.judge(r, Claim("words", (more, 1), (less, 1)))[2] == "not resolved"
    r["points"][0]["values"][2], r["points"][1]["brackets"] = 9., [[None, 2], [None, 2], [2, 4]]
    assert report.point_rows(r)[1:] == [["a", "8", "1", "7.0", "8.0", "9.0", "-", "-"],
                                        ["b", "8", "1", "under 2", "under 2", "3.0", "-", "-"]]


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "cpu"
    depth = made("depth", "emm")
    depth["points"][0].update(values=[None, 2., 3.], mean=None, interval=None,
                              brackets=[[9, None], [1, 3], [2, 4]])
    for made_up in (made("width", "emm"), made("batch", "ratio"), depth):
        disk.write_json(folder / f"{made_up['name']}.json", made_up)
    for name in ("width.more", "batch-emm"):
        Image.new("RGB", (20, 10), "white").save(folder / f"{name}.png")
    (folder / "notes.md").write_text("\n## width \n\nWhy `this` is <so>.\n\nAnd more.\n\n"
                                     "| a | b |\n|---|---|\n| 1 | <2> |\n\n## depth\nOne line.")
    return tmp_path / "results"


def test_markdown(results, tmp_path):
    out = report.report(report.Options(results=str(results), out=str(tmp_path / "docs" / "r.md")))
    text = open(out).read()
    claim = "| width | the widest network memorizes more than the narrowest "
    assert claim + "| +18.0 | -4.4 to +40.4 | not resolved |" in text
    assert "Claims: 3, not resolved: 3." in text and "Beyond the paper" not in text
    assert "Paper (second hand, no number seen): Wider networks memorize more." in text
    assert r"| series | \|D\| | x \| y | seed 0 | seed 1 | seed 2 | mean | 95% interval |" in text
    assert "| equal steps | 40 | 128 | 10.0% | 20.0% | 30.0% |" in text
    assert "| 1 | 9 or more | 2.0 | 3.0 | - | - |" in text
    assert "Why `this` is <so>.\n\nAnd more." in text and "One line." in text
    assert "![width.more](../results/cpu/width.more.png)" in text and "batch-emm" not in text
    for link in re.findall(r"\]\((\S+)\)", text):
        assert (tmp_path / "docs" / link).exists()


def test_what_is_beyond_the_paper_comes_last_and_counts_apart(results, tmp_path, monkeypatch):
    claims = [Slope("EMM grows with less than the square of the width", (0, 2))]
    monkeypatch.setitem(EXPERIMENTS, "width", dataclasses.replace(
        EXPERIMENTS["width"], known="beyond", claims=claims, finding="Ours."))
    text = open(report.report(report.Options(results=str(results), out=str(tmp_path / "r.md")))).read()
    paper, beyond = text.split("\n# Beyond the paper\n")
    assert "Claims: 2, not resolved: 2." in paper and "## width" not in paper
    assert "\nClaims: 1, disagrees: 1." in beyond and "\nOurs.\n" in beyond and "## batch" not in beyond
    power = math.log(10) * math.log(16 / 8 * 16 / 12) / sum(  # regression on three points, the last tenfold
        (math.log(x) - math.log(8 * 12 * 16) / 3)**2 for x in (8, 12, 16)) / 3
    assert f"| +{power:.2f} | +{power:.2f} to +{power:.2f} | disagrees |" in beyond
    for name in ("r.png", "r-beyond.png"):
        assert Image.open(tmp_path / name).width > 300


def test_errors(results, tmp_path):
    with pytest.raises(ValueError, match="has no results; make some with"):
        report.report(report.Options(results=str(tmp_path / "none")))
    o = report.Options(results=str(results), out=str(tmp_path / "r.md"))
    (results / "cpu" / "notes.md").write_text("## breadth\nx\n")
    with pytest.raises(ValueError, match="notes on 'breadth'"):
        report.report(o)
    for other in ({}, result("width", [("", 4, [1., 2., 3.])], "emm")):
        disk.write_json(results / "cpu" / "width.json", other)
        with pytest.raises(ValueError, match="width.json is of another protocol.py"):
            report.report(o)


def test_amounts():
    assert report.amount(1060.4, "emm") == "1,060" and report.amount(0.5, "ratio") == "50.0%"
    assert report.amount(-8.26, "emm", True) == "-8.3"
    assert report.between([-0.2, 1.3], "ratio") == "0.0% to 100.0%"
    assert report.between([-0.2, 1.3], "ratio", True) == "-20.0 to +130.0"
    assert report.between([5.72, math.inf], "emm", True) == "+5.7 to +inf"
    assert report.amount(0.314, "power", True) == "+0.31"


def test_the_committed_report_is_that_of_the_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    o = report.Options(out="docs/results.md")
    results = report.read(o)
    assert results and all(len(r["seeds"]) >= 3 for r in results)
    pieces = report.markdown(o, results, report.notes(ROOT / "paper" / "results" / "cpu"))
    assert (ROOT / "docs" / "results.md").read_text() == "\n".join(pieces)


def test_every_experiment_has_a_finding():
    for e in EXPERIMENTS.values():
        assert e.finding.endswith(".") and e.known in KNOWN and e.seeds.keys() <= set(SCALES)
