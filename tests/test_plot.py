import json
import os
import subprocess
import sys

import pytest
from PIL import Image

import plot
import run
from conftest import ROOT
from measure import curve


def result(width, emm=23.0, bracket=(20, 30), **options):
    def point(r):
        return dict(ratio=r, interval=[r - 0.02, min(1, r + 0.02)])
    probes = [dict(point(r), n=n, whole=n > 20,
                   trajectory=[dict(point(r / 2), epoch=10), dict(point(r), epoch=20)])
              for n, r in ((40, 0.5), (20, 0.96), (30, 0.8))]
    given = dict(data="x/digits", arch="ddpmpp", width=width, epochs=6000.0, resolution=0) | options
    return dict(emm=emm, bracket=list(bracket), eps=0.1, probes=probes, options=given)


def test_published_numbers():
    sizes, ratios = plot.published_curve()
    assert sizes == [500, 1000, 2000, 4000] and ratios == [0.995, 0.919, 0.609, 0.175]
    assert plot.published_curve(experiment="resolution", series="8x8")[0][-1] == 16000
    assert (ROOT / "paper" / "digitised.csv").read_text().startswith("# Memorization ratios")


def test_figures_do_not_ask_the_environment(tmp_path):
    (tmp_path / "emm.json").write_text(json.dumps(result(8)))
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 10\n")
    command = [sys.executable, str(ROOT / "plot.py"), "--emm", "emm.json"]
    images = []
    for backend in (None, "module://matplotlib_inline.backend_inline", "no-such-backend"):
        given = {} if backend is None else dict(MPLBACKEND=backend)
        environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"} | given
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and done.stdout == "wrote emm.png\n", done.stderr
        images.append((tmp_path / "emm.png").read_bytes())
    (tmp_path / "matplotlibrc").unlink()
    plot.plot(plot.Options(emm=(str(tmp_path / "emm.json"),)))
    assert set(images) == {(tmp_path / "emm.png").read_bytes()}


def test_draws_one_and_several(tmp_path):
    for width, found in ((8, result(8)), (16, result(16, None, (None, 20)))):
        (tmp_path / str(width)).mkdir()
        (tmp_path / str(width) / "emm.json").write_text(json.dumps(found))
    one = plot.plot(plot.Options(emm=(str(tmp_path / "8/emm.json"),)))
    assert one == tmp_path / "8" / "emm.png" and Image.open(one).width > 800
    assert Image.open(tmp_path / "8" / "trajectory.png").width > 800
    more = plot.plot(plot.Options(emm=(str(tmp_path / "8/emm.json"),), published=True,
                                  out=str(tmp_path / "more.png")))
    assert one.read_bytes() != more.read_bytes() and (tmp_path / "more-trajectory.png").exists()
    both = plot.plot(plot.Options(emm=tuple(str(tmp_path / w / "emm.json") for w in ("8", "16")),
                                  out=str(tmp_path / "b.png")))
    assert len(Image.open(both).convert("RGB").getcolors(10**6)) > 50
    (tmp_path / "emm.json").write_text(json.dumps(dict(searches=["8/emm.json", "16/emm.json"])))
    seeds = plot.plot(plot.Options(emm=(str(tmp_path / "emm.json"),)))
    assert seeds.read_bytes() == both.read_bytes()


def test_names_say_what_differs():
    a, b = result(8), result(8)
    b["options"]["epochs"] = 9000.0
    names = [plot.describe(r, [a, b]) for r in (a, b)]
    assert names == ["digits, ddpmpp width 8, epochs 6000.0", "digits, ddpmpp width 8, epochs 9000.0"]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="give either --emm"):
        plot.Options()
    with pytest.raises(ValueError, match="must end in .png"):
        plot.Options(emm=("a",), out="x.pdf")
    (tmp_path / "emm.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        plot.plot(plot.Options(emm=(str(tmp_path / "emm.json"),)))
    (tmp_path / "emm.json").write_text("{}")
    with pytest.raises(ValueError, match="not an emm.json"):
        plot.plot(plot.Options(emm=(str(tmp_path / "emm.json"),)))


def test_shares_below_every_threshold():
    found = dict(curve=curve.curve([0.2, 0.25, 0.9], [0.95] * 9), threshold="1/3", options=dict(neighbours=0))
    axes = plot.shares(found).axes[0]
    samples, held_out, threshold = axes.lines
    assert dict(zip(samples.get_xdata(), samples.get_ydata()))[0.5] == pytest.approx(2 / 3)
    assert held_out.get_label() == "held-out" and threshold.get_xdata()[0] == pytest.approx(1 / 3)
    band = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert band.max() == 1 and curve.band(9) in band
    figure = plot.shares(found | dict(options=dict(neighbours=50)))
    assert "mean of the 50 nearest" in figure.axes[0].get_xlabel()


def test_stopped_sizes_are_hollow():
    axes = plot.ratios([result(8)], ["a"], published=True).axes[0]
    hollow = [line.get_xdata() for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert hollow == [[20]] and max(axes.lines, key=lambda line: line.zorder).get_xdata() == [20]
    assert list(axes.lines[0].get_ydata()) == plot.published_curve()[1]
def test_quality_against_memorization(tmp_path):
    def result(ratio, *kinds):
        q = dict(frechet=10 * ratio)
        for name in ("precision", "recall", "coverage"):
            q |= {name: 1 - ratio, f"{name}_interval_95": [0.9 - ratio, 1 - ratio]}
        return dict(ratio=ratio, quality={kind: q for kind in kinds},
                    held_out=dict(samples_under_threshold=2 * ratio, rate=0.01))
    both = [result(0.1, "training", "held_out"), result(0.3, "training", "held_out")]
    left, right = plot.tradeoff(both, "ab").axes
    assert left.get_ylabel() == "share, against held-out images"
    assert right.lines[0].get_xdata() == pytest.approx([0.2, 0.6])
    assert right.lines[0].get_ydata() == pytest.approx([1, 3])
    assert right.get_xlabel() == "memorization ratio at 1% of false positives"
    steps = plot.tradeoff([r | dict(step=1000 * i) for i, r in enumerate(both, 1)], "ab").axes[1].texts
    assert [(text.get_text(), text.xy[0]) for text in steps] == [("step 1,000", 0.2), ("step 2,000", 0.6)]
    left, right = plot.tradeoff([*both, result(0.5, "training")], "abc").axes
    assert right.lines[0].get_xdata() == pytest.approx([0.1, 0.3, 0.5])
    assert (left.get_xlabel(), left.get_ylabel()) == ("memorization ratio", "share, against training images")
    for name, found in (("a", both[0]), ("b", dict(ratio=1.0))):
        run.write_json(tmp_path / f"{name}.json", found)
    assert Image.open(plot.plot(plot.Options(quality=(str(tmp_path / "a.json"),)))).width > 800
    run.write_json(tmp_path / "snapshots.json", dict(snapshots=both))
    several = tmp_path / "snapshots.json", tmp_path / "a.json"
    assert Image.open(plot.plot(plot.Options(quality=tuple(map(str, several))))).width > 800
    with pytest.raises(ValueError, match="b.json has no quality; score its samples with memorize.py"):
        plot.plot(plot.Options(quality=(str(tmp_path / "b.json"),)))
