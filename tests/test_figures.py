"""Figures of experiments from made-up results."""
import json

import pytest
from PIL import Image

from paper import figures
from plot import subplots


def result(points, **more):
    return dict(name="size", scale="cpu", about="size", x="|D|", measure="emm", seeds=[0, 1],
                points=points) | more


def test_means_intervals_seeds_and_ends_of_the_range():
    points = [dict(x=8, values=[5., 6.], mean=5.5, interval=[4., 7.], brackets=[[4, 6], [5, 7]]),
              dict(x=80, values=[None, 9.], mean=None, interval=None, brackets=[[40, None], [8, 10]]),
              dict(x=90, values=[7.], mean=7., interval=None, brackets=[[6, 8]])]  # of one seed
    _, axes = subplots()
    figures.draw_points(axes, result([dict(series="", **point) for point in points]), "small")
    dots = [(line.get_marker(), *line.get_xydata()[0]) for line in axes.lines if len(line.get_xydata()) == 1]
    assert dots == [(".", 8, 5), (".", 8, 6), ("^", 80, 40), (".", 80, 9), (".", 90, 7)]
    bars, = axes.containers
    assert [list(xy) for xy in bars.lines[0].get_xydata()] == [[8, 5.5], [90, 7]]
    assert bars.lines[2][0].get_segments()[0][:, 1] == pytest.approx([4, 7])
    assert axes.get_xscale() == "log"


def test_a_figure_of_an_experiment(tmp_path):
    loss = dict(loss=[0.1, 0.2], distance_ratio_quantiles=[0.1, 0.5, 0.9])
    points = [dict(series="", x=name, n=8, values=[0.5, 0.45], mean=0.475, interval=[0.2, 0.8],
                   denoising=[loss, loss]) for name in ("closed form", "trained")]
    (tmp_path / "optimum.json").write_text(json.dumps(result(
        points, measure="ratio", sigmas=[0.1, 1.0], quantiles=[0, 50, 100])))
    assert Image.open(figures.draw(tmp_path / "optimum.json")).width > 800
    assert Image.open(tmp_path / "optimum.loss.png").width > 800
