import json

import pytest
from PIL import Image

import plot
from conftest import ROOT


def result(width, emm=23.0, bracket=(20, 30)):
    probes = [dict(n=n, ratio=r, interval_95=[r - 0.02, min(1, r + 0.02)], trajectory=[dict(epoch=10, ratio=r / 2), dict(epoch=20, ratio=r)])
              for n, r in ((40, 0.5), (20, 0.96), (30, 0.8))]
    return dict(emm=emm, bracket=list(bracket), eps=0.1, probes=probes,
                options=dict(data="x/digits", arch="ddpmpp", width=width, epochs=6000.0, resolution=0))


def test_published_numbers():
    sizes, ratios = plot.published_curve()
    assert sizes == [500, 1000, 2000, 4000] and ratios == [0.995, 0.919, 0.609, 0.175]
    assert plot.published_curve(experiment="resolution", series="8x8")[0][-1] == 16000
    assert (ROOT / "paper" / "digitised.csv").read_text().startswith("# Memorization ratios")


def test_draws_one_and_several(tmp_path):
    for width, found in ((8, result(8)), (16, result(16, None, (None, 20)))):
        (tmp_path / str(width)).mkdir()
        (tmp_path / str(width) / "emm.json").write_text(json.dumps(found))
    one = plot.plot(plot.Options(emm=(str(tmp_path / "8/emm.json"),)))
    assert one == tmp_path / "8" / "emm.png" and Image.open(one).width > 1000
    bare = plot.plot(plot.Options(emm=(str(tmp_path / "8/emm.json"),), published=False, out=str(tmp_path / "bare.png")))
    assert one.read_bytes() != bare.read_bytes()
    both = plot.plot(plot.Options(emm=tuple(str(tmp_path / w / "emm.json") for w in ("8", "16")), out=str(tmp_path / "b.png")))
    assert len(Image.open(both).convert("RGB").getcolors(10**6)) > 50


def test_names_say_what_differs():
    a, b = result(8), result(8)
    b["options"]["epochs"] = 9000.0
    assert [plot.describe(r, [a, b]) for r in (a, b)] == ["digits, ddpmpp width 8, epochs 6000.0", "digits, ddpmpp width 8, epochs 9000.0"]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.Options()
    (tmp_path / "emm.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        plot.plot(plot.Options(emm=(str(tmp_path / "emm.json"),)))
    (tmp_path / "emm.json").write_text("{}")
    with pytest.raises(ValueError, match="not an emm.json"):
        plot.plot(plot.Options(emm=(str(tmp_path / "emm.json"),)))
