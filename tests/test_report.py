"""Verdicts on claims from made-up results, and both forms of the report."""
import base64
import re

import pytest
from PIL import Image

import report
import run
from protocol import ALL, FIRST, LAST, Claim, EXPERIMENTS


def result(name, points, measure="ratio"):
    rows = [dict(series=s, x=x, n=8, values=v, mean=sum(v) / len(v) if None not in v else None, interval=[0.1, 1.2] if None not in v else None,
                 command=f"python emm.py --x '{x}'") for s, x, v in points]
    return dict(name=name, scale="cpu", x="x | y", about="a <b>", measure=measure, seeds=[0, 1, 2], points=rows, published=[],
                **run.provenance())


def test_verdicts():
    r = result("labels", [("none", 16, [.1, .2, .3]), ("none", 32, [.0, .0, .1]), ("true", 16, [.5, .6, .7]), ("true", 64, [.9, .9, .9]),
                          ("odd", 16, [.0, .3, .3]), ("lost", 16, [None, 1., 1.])])

    def verdict(more, less):
        return report.judge(r, Claim("words", more, less))
    found = verdict(("true", FIRST), ("none", FIRST))
    assert found["difference"] == pytest.approx(.4) and found["verdict"] == "agrees" and found["interval"] == pytest.approx([.4, .4])
    assert verdict(("none", FIRST), ("true", FIRST))["verdict"] == "disagrees"
    assert verdict(("odd", 16), ("none", 16))["verdict"] == "not resolved"
    assert verdict(("true", ALL), ("none", ALL))["difference"] == pytest.approx(.4)  # 16, which both have
    assert verdict((FIRST, LAST), (FIRST, FIRST))["difference"] == pytest.approx(-1 / 6)
    assert verdict(("lost", 16), ("none", 16))["verdict"].startswith("not measured")


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "cpu"
    run.write_json(folder / "width.json", result("width", [("", x, [x * 1., x + 1., x + 2.]) for x in (4, 8, 16)], "emm"))
    run.write_json(folder / "batch.json", result("batch", [("|D| = 16", x, [.1, .2, .3]) for x in (32, 64)]))
    run.write_json(folder / "depth.json", result("depth", [("", 1, [None, 2., 3.]), ("", 2, [2., 2., 3.])], "emm"))
    for name in ("width", "width-more", "batch", "batch-emm", "depth"):
        Image.new("RGB", (20, 10), "white").save(folder / f"{name}.png")
    (folder / "notes.md").write_text("On top.\n\n## width\n\nWhy `this` is <so>.\n\nAnd more.\n\n## depth\nOne line.\n")
    return tmp_path / "results"


def test_markdown(results, tmp_path):
    out = report.report(report.Options(results=str(results), out=str(tmp_path / "docs" / "r.md")))
    text = open(out).read()
    assert "| width | the widest network memorizes more than the narrowest | +12 | +12 to +12 | agrees |" in text
    assert "| batch | the largest batch memorizes more than the smallest | +0.0 | +0.0 to +0.0 | not resolved |" in text
    assert r"| series | x \| y | seed 0 | seed 1 | seed 2 | mean | 95% interval |" in text
    assert "| 1 | - | 2 | 3 | - | - |" in text and "Why `this` is <so>.\n\nAnd more." in text and "No direction" not in text
    assert "![width-more](../results/cpu/width-more.png)" in text and "batch-emm" not in text
    for link in re.findall(r"\]\((\S+)\)", text):
        assert (tmp_path / "docs" / link).exists()


def test_page_holds_everything(results, tmp_path):
    out = report.report(report.Options(results=str(results), out=str(tmp_path / "r.html")))
    text = open(out).read()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == 4 and base64.b64decode(pictures[0]).startswith(b"\x89PNG")
    assert "http" not in text and "<script" not in text and "python emm.py --x &#x27;4&#x27;" in text
    assert "<code>this</code> is &lt;so&gt;." in text and '<tr class="agrees">' in text


def test_errors(results, tmp_path):
    with pytest.raises(ValueError, match="has no results; make some with"):
        report.report(report.Options(results=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="must end in .html or .md"):
        report.Options(out="r.txt")
    (results / "cpu" / "notes.md").write_text("## breadth\nx\n")
    with pytest.raises(ValueError, match="notes on 'breadth'"):
        report.report(report.Options(results=str(results), out=str(tmp_path / "r.md")))


def test_every_experiment_has_a_finding():
    for e in EXPERIMENTS.values():
        assert e.finding.endswith(".") and all(claim.more != claim.less for claim in e.claims)
