"""Verdicts on claims from made-up results, and the report."""
import re

import pytest
from PIL import Image

import run
from conftest import ROOT
from paper import report
from paper.protocol import ALL, EXPERIMENTS, FIRST, LAST, Claim


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
        mean, interval = (None, None) if None in values else (sum(values) / len(values), [0.1, 1.2])
        rows.append(dict(series=series, x=x, n=8, values=values, mean=mean, interval=interval,
                         command=f"python emm.py --x '{x}'"))
    return dict(name=name, scale="cpu", x="x | y", about="a <b>", measure=measure, seeds=[0, 1, 2],
                points=rows, published=[], options=dict(also="--steps 9" if name == "width" else ""),
                **run.provenance())


def test_verdicts():
    r = result("labels", [("none", 16, [.1, .2, .3]), ("none", 32, [.0, .0, .1]),
                          ("true", 16, [.5, .6, .7]), ("true", 64, [.9, .9, .9]),
                          ("odd", 16, [.0, .3, .3]), ("lost", 16, [None, 1., 1.])])

    def verdict(more, less):
        return report.judge(r, Claim("words", more, less))
    found = verdict(("true", FIRST), ("none", FIRST))
    assert found["difference"] == pytest.approx(.4) and found["verdict"] == "agrees"
    assert found["interval"] == pytest.approx([.4, .4])
    assert verdict(("none", FIRST), ("true", FIRST))["verdict"] == "disagrees"
    assert verdict(("odd", 16), ("none", 16))["verdict"] == "not resolved"
    assert verdict(("true", ALL), ("none", ALL))["difference"] == pytest.approx(.4)  # 16, which both have
    assert verdict((FIRST, LAST), (FIRST, FIRST))["difference"] == pytest.approx(-1 / 6)
    lost = verdict(("lost", 16), ("none", 16))
    assert lost["verdict"] == "not resolved: an EMM lies outside the range searched"


def test_an_emm_outside_the_range_is_a_bound():
    r = result("embedding", [("a", 1, [7., 8., None]), ("b", 1, [None, None, 3.])], "emm")
    r["points"][0]["brackets"] = [[6, 8], [7, 9], [9, None]]
    r["points"][1]["brackets"] = [[None, 2], [None, 2], [2, 4]]
    found = report.judge(r, Claim("words", ("a", 1), ("b", 1)))
    assert found["bound"] == "at least " and found["verdict"] == "agrees"
    assert found["difference"] == pytest.approx((5 + 6 + 6) / 3)
    other = report.judge(r, Claim("words", ("b", 1), ("a", 1)))
    assert other["bound"] == "at most " and other["verdict"] == "disagrees"
    assert other["difference"] == pytest.approx(-(5 + 6 + 6) / 3)
    r["points"][1]["brackets"] = [[None, 20], [None, 20], [2, 4]]
    for more, less in ("ab", "ba"):
        other = report.judge(r, Claim("words", (more, 1), (less, 1)))
        assert other["difference"] is None
        assert other["verdict"] == "not resolved: an EMM lies outside the range searched"
    r["points"][0]["values"][2], r["points"][1]["brackets"] = 9., [[None, 2], [None, 2], [2, 4]]
    assert report.judge(r, Claim("words", ("a", 1), ("a", 1)))["bound"] == ""
    assert report.point_rows(r)[1:] == [["a", "8", "1", "7.0", "8.0", "9.0", "-", "-"],
                                        ["b", "8", "1", "under 2", "under 2", "3.0", "-", "-"]]


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "cpu"
    depth = made("depth", "emm")
    depth["points"][0].update(values=[None, 2., 3.], mean=None, interval=None)
    for made_up in (made("width", "emm"), made("batch", "ratio"), depth):
        run.write_json(folder / f"{made_up['name']}.json", made_up)
    for name in ("width", "width-more", "batch", "batch-emm", "depth"):
        Image.new("RGB", (20, 10), "white").save(folder / f"{name}.png")
    (folder / "notes.md").write_text("\n## width \n\nWhy `this` is <so>.\n\nAnd more.\n\n"
                                     "| a | b |\n|---|---|\n| 1 | <2> |\n\n## depth\nOne line.")
    return tmp_path / "results"


def test_markdown(results, tmp_path):
    out = report.report(report.Options(results=str(results), out=str(tmp_path / "docs" / "r.md")))
    text = open(out).read()
    claim = "| width | the widest network memorizes more than the narrowest "
    assert claim + "| +18.0 | -4.4 to +40.4 | not resolved |" in text
    assert "| depth | (no direction claimed) |" in text and "3 claims - not resolved: 3." in text
    assert r"| series | \|D\| | x \| y | seed 0 | seed 1 | seed 2 | mean | 95% interval |" in text
    assert "| equal steps | 40 | 128 | 10.0% | 20.0% | 30.0% |" in text
    assert "| 1 | - | 2.0 | 3.0 | - | - |" in text
    assert "Why `this` is <so>.\n\nAnd more." in text and "One line." in text
    assert "![width-more](../results/cpu/width-more.png)" in text and "batch-emm" not in text
    for link in re.findall(r"\]\((\S+)\)", text):
        assert (tmp_path / "docs" / link).exists()


def test_errors(results, tmp_path):
    with pytest.raises(ValueError, match="has no results; make some with"):
        report.report(report.Options(results=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="must end in .md"):
        report.Options(out="r.txt")
    o = report.Options(results=str(results), out=str(tmp_path / "r.md"))
    for text, words in (("## breadth\nx\n", "notes on 'breadth'"),
                        ("## width\n## width\n", "stands there twice"), ("Hm.\n## width\n", "text before")):
        (results / "cpu" / "notes.md").write_text(text)
        with pytest.raises(ValueError, match=words):
            report.report(o)
    (results / "cpu" / "notes.md").unlink()
    (results / "cpu" / "width.png").unlink()
    with pytest.raises(ValueError, match="width.png is missing; draw it with"):
        report.report(o)
    for other in ({}, result("width", [("", 4, [1., 2., 3.])], "emm"),
                  made("width", "emm") | dict(scale="paper")):
        run.write_json(results / "cpu" / "width.json", other)
        with pytest.raises(ValueError, match="width.json is of another protocol.py"):
            report.report(o)


def test_amounts():
    assert report.amount(1060.4, "emm") == "1,060" and report.amount(0.5, "ratio") == "50.0%"
    assert report.amount(-8.26, "emm", True) == "-8.3"
    assert report.between([-0.2, 1.3], "ratio") == "0.0% to 100.0%"
    assert report.between([-0.2, 1.3], "ratio", True) == "-20.0 to +130.0"


def test_the_committed_report_is_that_of_the_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    o = report.Options(out="docs/results.md")
    results = report.read(o)
    assert results and all(len(r["seeds"]) >= 3 for r in results)
    pieces = report.markdown(o, results, report.notes(ROOT / "paper" / "results" / "cpu"))
    assert (ROOT / "docs" / "results.md").read_text() == "\n".join(pieces)


def test_every_experiment_has_a_finding():
    for e in EXPERIMENTS.values():
        assert e.finding.endswith(".") and all(claim.more != claim.less for claim in e.claims)
