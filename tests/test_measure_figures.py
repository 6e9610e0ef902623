"""measure/figures.py: the shares under every threshold, and quality against memorization."""
import pytest
from PIL import Image

import disk
from measure import curve, figures


def test_shares_below_every_threshold():
    found = dict(curve=curve.curve([0.2, 0.25, 0.9], [0.95] * 9), threshold="1/3", options=dict(neighbours=0))
    axes = figures.shares(found).axes[0]
    samples, held_out, threshold = axes.lines
    assert dict(zip(samples.get_xdata(), samples.get_ydata()))[0.5] == pytest.approx(2 / 3)
    assert held_out.get_label() == "held-out" and threshold.get_xdata()[0] == pytest.approx(1 / 3)
    band = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert band.max() == 1 and curve.band(9) in band
    figure = figures.shares(found | dict(options=dict(neighbours=50)))
    assert "mean of the 50 nearest" in figure.axes[0].get_xlabel()


def test_quality_against_memorization(tmp_path):
    def result(ratio, *kinds):
        q = dict(frechet=10 * ratio)
        for name in ("precision", "recall", "coverage"):
            q |= {name: 1 - ratio, f"{name}_interval_95": [0.9 - ratio, 1 - ratio]}
        return dict(ratio=ratio, quality={kind: q for kind in kinds},
                    held_out=dict(samples_under_threshold=2 * ratio, rate=0.01))
    both = [result(0.1, "training", "held_out"), result(0.3, "training", "held_out")]
    left, right = figures.tradeoff(both, "ab").axes
    assert left.get_ylabel() == "share, against held-out images"
    assert right.lines[0].get_xdata() == pytest.approx([0.2, 0.6])
    assert right.lines[0].get_ydata() == pytest.approx([1, 3])
    assert right.get_xlabel() == "memorization ratio at 1% of false positives"
    steps = figures.tradeoff([r | dict(step=1000 * i) for i, r in enumerate(both, 1)], "ab").axes[1].texts
    assert [(text.get_text(), text.xy[0]) for text in steps] == [("step 1,000", 0.2), ("step 2,000", 0.6)]
    left, right = figures.tradeoff([*both, result(0.5, "training")], "abc").axes
    assert right.lines[0].get_xdata() == pytest.approx([0.1, 0.3, 0.5])
    assert (left.get_xlabel(), left.get_ylabel()) == ("memorization ratio", "share, against training images")
    for name, found in (("a", both[0]), ("b", dict(ratio=1.0))):
        disk.write_json(tmp_path / f"{name}.json", found)
    assert Image.open(figures.draw(figures.Options(quality=(str(tmp_path / "a.json"),)))).width > 800
    disk.write_json(tmp_path / "snapshots.json", dict(snapshots=both))
    several = tmp_path / "snapshots.json", tmp_path / "a.json"
    assert Image.open(figures.draw(figures.Options(quality=tuple(map(str, several))))).width > 800
    with pytest.raises(ValueError, match="b.json has no quality; score its samples with memorize.py"):
        figures.draw(figures.Options(quality=(str(tmp_path / "b.json"),)))


def test_bad_input():
    with pytest.raises(ValueError, match="give --quality, one or more"):
        figures.Options()
    with pytest.raises(ValueError, match="must end in .png"):
        figures.Options(quality=("a",), out="x.pdf")
