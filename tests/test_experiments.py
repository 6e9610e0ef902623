"""The table of experiments at both scales, without running it; and one experiment, tiny, to its figure."""
import re
import shlex
import subprocess

import pytest
from PIL import Image

import emm
import run
import unet
from conftest import ROOT
from paper import experiments, protocol
from paper.experiments import EXPERIMENTS, Options


@pytest.mark.parametrize("scale", protocol.SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_point_is_a_command_of_emm(name, scale):
    options = Options(name=name, scale=scale)
    found = experiments.commands(options, name)
    assert sum(map(len, found.values())) == len(experiments.points(name, options)) > 1
    for words, points in found.items():
        o = experiments.parsed(words)
        assert o.seeds == (0, 1, 2)
        assert set(o.sizes) == {p.n for p in points} if o.full else points[0].n is None
        side = o.resolution or (32 if scale == "paper" else 8)
        if name == "mixture":
            assert o.mix_share in protocol.SHARES and o.mix and side == (32 if scale == "paper" else 8)
        else:
            assert not o.mix
        assert name != "mixture" or scale == "cpu" or o.resolution == 32 and o.n_max == 2000
        D = unet.Denoiser(o.arch, o.precond, side, 1, 0, 8, o.blocks, o.channel_mult, o.attn_resolutions,
                          o.embedding, o.skip_connections)
        assert D.config["skip_connections"]
    if scale == "paper":  # what is not varied is the published procedure
        base = experiments.parsed(protocol.BASE["paper"])
        assert run.recorded(base) == run.recorded(emm.Options())


def test_names_of_directories_follow_the_options():
    name = experiments.directory
    assert name("--data digits --width 8", "--data digits") == "width-8"
    assert name("--width 8 --data digits --batch 512", "--data digits") == "width-8"
    assert name("", "") == "base" and len(name("--data " + "x" * 200, "")) < 80
    shared = [experiments.commands(Options(name=n, scale="paper"), n) for n in ("size", "labels")]
    outs = [{shlex.split(words)[-1] for words in commands} for commands in shared]
    assert outs[0] < outs[1]


def test_what_a_base_has_anyway_shares_its_runs():
    def outs(name, **given):
        o = Options(name=name, **given)
        return [(p.x, shlex.split(words)[-1].split("/")[-1])
                for words, ps in experiments.commands(o, name).items() for p in ps]
    assert ("8", "emm-base") in [(str(x), out) for x, out in outs("resolution")]
    assert (10, "emm-base") in outs("classes")
    assert ("positional", "emm-base") in outs("embedding")
    assert ("positional", "emm-blocks-2") in outs("embedding")
    assert (32, "emm-base") in outs("resolution", scale="paper")
    # what other data have is not known
    assert dict(outs("resolution", words="--data my.zip"))[8].endswith("resolution-8")
    assert dict(outs("classes", scale="paper", words="--resolution 16"))[1] == "emm-classes-1_resolution-16"


def test_words_change_what_is_common_and_not_what_varies():
    o = Options(name="width", words="--width 16 --n-max 200 --data 'my data.zip'", runs="my runs")
    found = [experiments.parsed(words) for words in experiments.commands(o, "width")]
    assert [f.width for f in found] == [8, 12, 16]
    assert all(f.n_max == 200 and f.data == "my data.zip" for f in found)
    assert all(f.out.startswith("my runs/cpu/") for f in found)
    for words in ("--sizes 3", "--full", "--seeds 3", "--out x"):
        with pytest.raises(ValueError, match="which the experiment gives itself"):
            Options(words=words)


def test_skips_kept():
    assert list(protocol.at_resolution(32, 2, 16)) == [4, 5, 6]
    assert protocol.skips(9, [4, 5, 6]) == "--skip-connections 0,0,0,1,1,1,0,0,0"
    points = EXPERIMENTS["skips"].paper
    words = [p.words for p in points if p.series == "one skip"]
    assert len(words) == 9
    assert words[0].endswith("1,0,0,0,0,0,0,0,0") and words[8].endswith("0,0,0,0,0,0,0,0,1")
    two = {p.x: p.words for p in points if p.series == "two of one resolution"}
    assert len(two) == 9 and two["16x16: 4+6"].endswith("0,0,0,1,0,1,0,0,0")


def test_claims_name_points():
    for name, e in EXPERIMENTS.items():
        for points in (e.cpu, e.paper):
            series = [p.series for p in points]
            for claim in e.claims:
                for s, x in (claim.more, claim.less):
                    s = {"first": series[0], "last": series[-1]}.get(s, s)
                    line = [p.x for p in points if p.series == s]
                    assert line and (x in line or x in ("first", "last", "all")), name


def test_published_points_have_places_in_the_figures():
    for name, e in EXPERIMENTS.items():
        if e.published:
            found, places = experiments.published(name), {(p.series, str(p.x)) for p in e.paper}
            places |= {("", "3000"), ("", "4000")}
            assert len(found) >= 2 and {(f["series"], f["x"]) for f in found} <= places, name


def test_emm_of_the_published_curves():
    found = {p["x"]: round(p["value"], -1) for p in experiments.published("resolution")}
    assert found == {"32": 1060, "16": 4470, "8": 7640}


def test_shared_sizes_are_priced_once():
    o = Options(name="size", scale="paper")
    words, = experiments.commands(o, "size")
    images, flops, new = experiments.price(o, words)
    assert {n for _, n in new} == {500, 1000, 2000, 5000, 10_000, 20_000, 50_000}
    assert images == pytest.approx(3 * 40_000 * 88_500, rel=1e-5)
    assert experiments.price(o, words, new)[0] == experiments.price(o, words, new)[1] == 0


def test_searches_and_data_are_priced_as_what_they_are(tmp_path, write_images, noise):
    """A search as the sizes that it measures, and a folder as the images in it."""
    o = Options(name="width", scale="cpu", seeds=(0,))
    write_images(tmp_path / "grey", noise(40, 16, 16, 1))
    search_of = "--steps 100 --batch 8 --snapshots 1 --n-min 2 --width 8 --channel-mult 1,1 --blocks 1"
    images, flops, new = experiments.price(o, f"{search_of} --data {tmp_path}/grey")
    sizes = sorted(n for _, n in new)
    assert 8 in sizes and len(sizes) > 3 and max(sizes) <= 40, "around the EMM of 8 that is assumed"
    share = [0.6 if n <= 8 else 1.0 for n in sizes]
    assert images == round(sum(share) * 100 * 8)
    small = experiments.price(o, f"{search_of} --data {tmp_path}/grey --resolution 8")
    assert small[0] == images and flops == pytest.approx(4 * small[1], rel=0.1), "four times the pixels"
    assert experiments.source_shape(experiments.parsed("--data digits:3"))[3] == 1
    assert experiments.source_shape(experiments.parsed(f"--data {tmp_path}/grey:0")) == (40, 1, 16, 1)
    assert experiments.source_shape(experiments.parsed("--data mnist-test")) == (10_000, 1, 28, 10)


def test_an_experiment_to_its_figure(tmp_path, capsys):
    o = Options(name="width", seeds=(0, 1), runs=str(tmp_path / "runs"), out=str(tmp_path / "results"),
                words="--steps 4 --warmup-steps 1 --ema-rampup-steps 4 --snapshots 1 --samples 64 --batch 8 "
                      "--channel-mult 1")
    path, = experiments.experiment(o)
    result = run.read_json(path)
    assert [p["x"] for p in result["points"]] == [8, 12, 16] and result["measure"] == "emm"
    # nothing is memorized in 4 steps
    assert all(p["values"] == [None, None] and p["mean"] is None for p in result["points"])
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > 500
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python emm.py ")]
    assert printed == [p["command"] for p in result["points"]]
    path = experiments.one(o, "optimum")
    result, folder = run.read_json(path), path.parent
    assert [p["values"] for p in result["points"]] == [[1, 1], [0, 0]]
    assert len(result["points"][0]["denoising"][0]["loss"]) == len(result["sigmas"])
    figures = {f"optimum{end}.png" for end in ("", "-loss", "-pairs", "-pairs-closed-form")}
    assert {path.name for path in folder.glob("optimum*.png")} == figures
    with pytest.raises(ValueError, match="was measured with --words .* give another --out"):
        experiments.one(Options(name="width", runs=o.runs, out=o.out), "width")
    result = run.read_json(experiments.one(o, "unique"))
    assert [p["n"] for p in result["points"]] == [64, 64] and result["measure"] == "ratio"
    for p in result["points"]:
        assert len(p["values"]) == len(p["trajectories"]) == 2 and p["interval"][0] <= p["mean"]


def test_make_knows_every_experiment():
    targets = re.search(r"^EXPERIMENTS = (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert targets == list(EXPERIMENTS)
    command = ["make", "-n", "-C", ROOT, "PYTHON=python", "labels", "SCALE=paper", "PLAN=1", "SEEDS=0 1"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    words = "--name labels --scale paper --runs runs --out paper/results --seeds 0,1"
    assert f"-m paper.experiments {words}" in text and "--dry-run" in text
