"""Figures of experiments from made-up results."""
import json

import pytest
from PIL import Image

from paper import figures


def test_epochs_of_an_experiment(tmp_path):
    def snapshots(shift):
        return [dict(epoch=e, ratio=r - shift) for e, r in ((50, 0.1), (100, 0.5))]
    points = [dict(series="", x=n, n=n, values=[0.5, 0.45], mean=0.475, interval=[0.2, 0.8],
                   trajectories=[snapshots(0), snapshots(0.05)]) for n in (8, 16)]
    (tmp_path / "size.json").write_text(json.dumps(dict(
        name="size", scale="cpu", about="size", x="|D|", measure="ratio", seeds=[0, 1], points=points,
        published=[dict(series="", x="8", value=0.4)])))
    assert Image.open(figures.draw(figures.Options(experiment=str(tmp_path / "size.json")))).width > 800
    figure = figures.epochs(json.loads((tmp_path / "size.json").read_text()))
    line = figure.axes[0].lines[0]
    assert line.get_ydata() == pytest.approx([0.075, 0.475]) and line.get_label() == "|D| = 8"
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="not a result file"):
        figures.draw(figures.Options(experiment=str(tmp_path / "other.json")))
