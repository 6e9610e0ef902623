import json
import os
import subprocess
import sys

import pytest
from PIL import Image

import plot
from conftest import ROOT


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
    with pytest.raises(ValueError, match="give --emm, one or more"):
        plot.Options()
    with pytest.raises(ValueError, match="must end in .png"):
        plot.Options(emm=("a",), out="x.pdf")
    (tmp_path / "emm.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        plot.plot(plot.Options(emm=(str(tmp_path / "emm.json"),)))
    (tmp_path / "emm.json").write_text("{}")
    with pytest.raises(ValueError, match="not an emm.json"):
        plot.plot(plot.Options(emm=(str(tmp_path / "emm.json"),)))


def test_stopped_sizes_are_hollow():
    axes = plot.ratios([result(8)], ["a"], published=True).axes[0]
    hollow = [line.get_xdata() for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert hollow == [[20]] and max(axes.lines, key=lambda line: line.zorder).get_xdata() == [20]
    assert list(axes.lines[0].get_ydata()) == plot.published_curve()[1]
