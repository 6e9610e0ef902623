"""The table of experiments at both scales, without running it; and one experiment, tiny, to its figure."""
import re
import shlex
import subprocess

import pytest

import emm
import experiments
import run
import unet
from conftest import ROOT
from experiments import EXPERIMENTS, Options
from PIL import Image


@pytest.mark.parametrize("scale", experiments.SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_point_is_a_command_of_emm(name, scale):
    found = experiments.commands(Options(name=name, scale=scale), name)
    assert sum(map(len, found.values())) == len(experiments.points(name, scale)) > 1
    for words, points in found.items():
        o = experiments.parsed(words)
        assert o.seeds == (0, 1, 2) and not o.full or set(o.sizes) == {p.n for p in points}
        side = o.resolution or (32 if scale == "paper" else 8)
        D = unet.Denoiser(o.arch, o.precond, side, 1, 0, 8, o.blocks, o.channel_mult, o.attn_resolutions, o.embedding, o.skip_connections)
        assert D.config["skip_connections"]
    if scale == "paper":  # what is not varied is the published procedure
        base = experiments.parsed(experiments.BASE["paper"])
        assert run.recorded(base) == run.recorded(emm.Options())


def test_names_of_directories_follow_the_options():
    name = experiments.directory
    assert name("--data digits --width 8", "--data digits") == name("--width 8 --data digits --batch 512", "--data digits") == "width-8"
    assert name("", "") == "base" and len(name("--data " + "x" * 200, "")) < 80
    shared = [experiments.commands(Options(name=n), n) for n in ("size", "labels")]
    outs = [{shlex.split(words)[-1] for words in commands} for commands in shared]
    assert outs[0] < outs[1]


def test_skips_kept():
    assert list(experiments.at_resolution(32, 2, 16)) == [4, 5, 6]
    assert experiments.skips(9, [4, 5, 6]) == "--skip-connections 0,0,0,1,1,1,0,0,0"
    words = [p.words for p in experiments.points("skips", "paper") if p.series == "one skip"]
    assert len(words) == 9 and words[0].endswith("1,0,0,0,0,0,0,0,0") and words[8].endswith("0,0,0,0,0,0,0,0,1")


def test_published_points_have_places_in_the_figures():
    for name, e in EXPERIMENTS.items():
        if e.published:
            found, places = experiments.published(e), {(p.series, str(p.x)) for p in e.paper}
            assert len(found) >= 5 and {(f["series"], f["x"]) for f in found} <= places | {("", "3000"), ("", "4000")}, name


def test_an_experiment_to_its_figure(tmp_path, capsys):
    o = Options(name="width", seeds=(0, 1), runs=str(tmp_path / "runs"), out=str(tmp_path / "results"),
                words="--steps 4 --warmup-steps 1 --ema-rampup-steps 4 --snapshots 1 --samples 64 --batch 8 --channel-mult 1")
    path, = experiments.experiment(o)
    result = run.read_json(path)
    assert [p["x"] for p in result["points"]] == [4, 8, 16] and result["measure"] == "emm"
    assert all(p["values"] == [None, None] and p["mean"] is None for p in result["points"])  # nothing is memorized in 4 steps
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > 500
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python emm.py ")]
    assert printed == [p["command"] for p in result["points"]]
    result = run.read_json(experiments.one(o, "unique"))
    assert [p["n"] for p in result["points"]] == [64, 64] and result["measure"] == "ratio"
    assert all(len(p["values"]) == len(p["trajectories"]) == 2 and p["interval"][0] <= p["mean"] for p in result["points"])


def test_make_knows_every_experiment():
    targets = re.search(r"^EXPERIMENTS = (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert targets == list(EXPERIMENTS)
    text = subprocess.run(["make", "-n", "-C", ROOT, "PYTHON=python", "labels", "SCALE=paper", "PLAN=1", "SEEDS=0 1"], capture_output=True, text=True).stdout
    assert "experiments.py --name labels --scale paper --seeds 0,1" in text and "--dry-run" in text
