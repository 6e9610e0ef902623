"""The table of experiments at all scales, without running it; and one experiment, tiny, to its figure."""
import dataclasses
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

import disk
import emm
import plot
import run
import search
import train
from bench import plan
from conftest import ROOT
from diffusion import denoiser
from paper import claims, experiments, protocol
from paper.experiments import EXPERIMENTS, Options

TINY = ("--steps 4 --steps-min 0 --warmup-steps 1 --ema-rampup-steps 4 --snapshots 1 --sample-count 64 "
        "--batch 8 --channel-mult 1")
EVERY = [(name, scale) for name, e in EXPERIMENTS.items() for scale in claims.SCALES if getattr(e, scale)]


@pytest.mark.parametrize("name, scale", EVERY)
def test_every_point_is_a_command_of_emm(name, scale):
    options = Options(name=name, scale=scale)
    found, table = experiments.commands(options, name), getattr(EXPERIMENTS[name], scale)
    assert sum(map(len, found.values())) == len(table) > 1
    for o, points in found.items():
        words = shlex.split(experiments.command(o))
        assert run.parse(emm.Options, words[2:]) == o  # what people see is what runs
        many = EXPERIMENTS[name].seeds.get("cpu", 3)
        assert o.train_seeds == (tuple(range(many)) if scale == "cpu" else (0,))
        assert set(o.sizes) == {p.n for p in points} if o.full else points[0].n is None
        assert bool(o.mix) == (name == "mixture")
        assert scale != "paper" or o.snapshot_images == 2_500_000
        side = o.resolution or (32 if scale == "paper" else 16)
        D = denoiser.Denoiser(o.arch, o.precond, side, 1, 0, 8, o.blocks, o.channel_mult, o.attn_resolutions,
                          o.embedding, o.skip_connections)
        assert o.arch == "dit" or D.config["skip_connections"]


def test_the_paper_s_base_is_the_published_procedure():
    base = emm.Options(**protocol.BASE["paper"])
    assert experiments.differences(base, emm.Options()) == dict(snapshot_images=2_500_000)
    counts = [len(train.snapshot_steps(base, n)) for n in (500, 1000, 5000)]
    assert counts == [8, 16, 80]


def settings(name, scale="paper"):
    """{(series, x): emm.Options} of an experiment."""
    found = experiments.commands(Options(name=name, scale=scale), name)
    return {(p.series, p.x): o for o, points in found.items() for p in points}


def test_settings_that_are_not_the_base_run_s():
    edm = dict(precond="edm", blocks=4, learning_rate=1e-3)
    base, sizes, unique = emm.Options(), settings("size"), settings("unique")
    assert experiments.differences(sizes["EDM, 4 blocks", 50_000], base).items() >= edm.items()
    assert sizes["EDM, 4 blocks", 50_000].sizes == (500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
    assert sizes["base run", 500].sizes == (500, 1000, 2000, 5000) and sizes["base run", 500].precond == "vp"
    assert experiments.differences(unique["|D| = 50000", "unique"], base).items() >= dict(
        **edm, labels="unique", epochs=12_000, sizes=(50_000,)).items()
    assert [unique["|D| = 2000", x].labels for x in ("none", "unique")] == ["none", "unique"]
    assert unique["|D| = 2000", "none"].precond == "vp"
    optimum = settings("optimum")["", "trained"]
    assert experiments.differences(optimum, base).items() >= dict(**edm, sample_count=50_000).items()
    assert {o.sizes for name in ("weight-decay", "ema") for o in settings(name).values()} == {(2000,)}
    assert {o.n_max for o in settings("mixture").values()} == {2000}


def test_names_of_directories_follow_the_options():
    def name(**given):
        return experiments.directory(emm.Options(**given), emm.Options(data="digits"))
    assert name(data="digits", width=8) == "width-8"
    assert name(data="digits") == "base" and len(name(data="x" * 200)) < 80
    outs = [{o.out for o in settings(name).values()} for name in ("size", "labels")]
    assert outs[0] & outs[1] == {"runs/paper/full-base"}


def test_what_a_base_has_anyway_shares_its_runs():
    def outs(name, **given):
        return {p.x: o.out.split("/")[-1]
                for o, ps in experiments.commands(Options(name=name, **given), name).items() for p in ps}
    assert outs("classes", scale="paper")[10] == outs("resolution", scale="paper")[32] == "emm-base"
    assert outs("embedding")["positional"] == outs("width")[8] == outs("batch")[64] == "full-base"
    assert outs("classes")[10] == outs("resolution")[8] == "full-data-fashion-mnist_resolution-8"
    # what other data have is not known
    assert outs("resolution", scale="paper", also="--data my.zip")[8].endswith("resolution-8")


def test_also_changes_what_is_common_and_not_what_varies():
    o = Options(name="width", scale="paper", runs="my runs",
                also="--width 16 --n-max 200 --data 'my data.zip'")
    found = list(experiments.commands(o, "width"))
    assert [f.width for f in found] == [128, 192, 256, 320]
    assert all(f.n_max == 200 and f.data == "my data.zip" and f.n_min == 500 for f in found)
    assert all(f.out.startswith("my runs/paper/") for f in found)
    for also in ("--sizes 3", "--full", "--train-seeds 3", "--out x"):
        with pytest.raises(ValueError, match="which the experiment gives itself"):
            experiments.commands(Options(also=also), "size")


def test_skips_kept():
    points = EXPERIMENTS["skips"].paper
    one = {p.x: p.given["skip_connections"] for p in points if p.series == "one resolution"}
    assert list(one) == ["32x32", "16x16", "8x8"] and one["16x16"] == (0, 0, 0, 1, 1, 1, 0, 0, 0)
    alone = [p.given["skip_connections"] for p in points if p.series == "one skip"]
    assert alone == [tuple(int(i == j) for j in range(9)) for i in range(9)]
    two = {p.x: p.given["skip_connections"] for p in points if p.series == "two of one resolution"}
    assert len(two) == 9 and two["16x16: 4+6"] == (0, 0, 0, 1, 0, 1, 0, 0, 0)


def test_a_name_that_a_scale_lacks_is_refused():
    with pytest.raises(ValueError, match="--name batch-emm has no --scale cpu; it has: optimum, size"):
        experiments.experiment(Options(name="batch-emm"))


@pytest.mark.parametrize("scale", claims.SCALES)
def test_the_dry_run_is_a_list_of_commands_for_directories_of_their_own(scale, capsys):
    experiments.experiment(Options(name="all", scale=scale, dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("#", "python emm.py --")) for line in lines) and len(lines) >= 20
    found = [run.parse(emm.Options, shlex.split(line, comments=True)[2:]) for line in lines if line[0] != "#"]
    assert len({o.out for o in found}) == len(found)
    every = [experiments.commands(Options(name=name, scale=scale), name) for name, s in EVERY if s == scale]
    wanted = {(o.out, n, seed) for runs in every for o in runs for n in o.sizes for seed in o.train_seeds}
    assert {(o.out, n, seed) for o in found for n in o.sizes for seed in o.train_seeds} >= wanted


def test_its_commands_side_by_side(tmp_path, monkeypatch):
    """As docs/cluster.md has it: xargs runs the points, and the experiment finds them done."""
    o = Options(name="epochs", seeds=(0, 1), runs=str(tmp_path / "runs"), out=str(tmp_path / "results"),
                also=f"{TINY} --width 4")
    words = ["--name", "epochs", "--seeds", "0,1", "--runs", o.runs, "--out", o.out, f"--also={o.also}"]
    line = f"{sys.executable} -m paper.experiments {shlex.join(words)} --dry-run | grep ^python"
    subprocess.run(f"{line} | sed 's:^python:{sys.executable}:' | xargs -P 2 -I{{}} sh -c '{{}}'", shell=True,
                   cwd=ROOT, check=True, capture_output=True)
    monkeypatch.setattr(train, "training", None)  # nothing is left to train
    assert len(disk.read_json(experiments.one(o, "epochs"))["points"]) == 2


def test_claims_name_points():
    for name, e in EXPERIMENTS.items():
        scales = [points for points in (e.cpu, e.gpu, e.paper) if points]
        there = {p.series for points in scales for p in points} | {"first", "last", "all"}
        for points in scales:
            series = [p.series for p in points]
            for claim in e.claims:
                if isinstance(claim, claims.Slope):
                    line = [p.x for p in points if claim.series in ("all", p.series)]
                    assert len(line) > 1 and min(line) > 0 and claim.range[0] < claim.range[1], name
                    continue
                assert claim.more[0] in there, name
                if claim.more[0] not in (*series, "first", "last"):
                    continue  # of a series of another scale
                for s, x in filter(None, (claim.more, claim.less)):
                    s = {"first": series[0], "last": series[-1]}.get(s, s)
                    line = [p.x for p in points if p.series == s]
                    assert line and (x in line or x in ("first", "last", "all")), name


def test_numbers_in_findings_are_those_of_the_published_figures():
    emms = [search.crossing(*plot.published_curve(series=f"{side}x{side}"), 0.9) for side in (8, 16, 32)]
    said = "about {:,} images of 8x8, {:,} of 16x16 and {:,} of 32x32"
    assert said.format(*(round(emm, -2) for emm in emms[:2]), round(emms[2], -1)) \
        .replace(".0", "") in EXPERIMENTS["resolution"].finding
    rows = [row for row in plot.published_rows() if row["experiment"] == "unique_labels_50k"]
    best = max(float(row["ratio_percent"]) for row in rows if row["series"].startswith("unique ("))
    assert f"{best:.0f}%" in EXPERIMENTS["unique"].finding


def test_the_price_of_sizes():
    o = Options(name="size", scale="paper")
    images, flops = plan.search_price(list(experiments.commands(o, "size"))[1], 1000)
    assert images == pytest.approx(40_000 * 88_500, rel=1e-5) and flops > images * 1e9


def test_searches_and_data_are_priced_as_what_they_are(tmp_path, write_images, noise):
    """A search as several trainings, and a folder as the images in it."""
    write_images(tmp_path / "grey", noise(60, 16, 16, 1))
    search_of = emm.Options(steps=100, batch=8, snapshots=1, n_min=2, width=8, channel_mult=(1, 1), blocks=1,
                            data=f"{tmp_path}/grey", train_seeds=(0,))
    images, flops = plan.search_price(search_of, 20)
    assert images == 4.5 * 100 * 8
    small = plan.search_price(dataclasses.replace(search_of, resolution=8), 20)
    assert small[0] == images and flops == pytest.approx(4 * small[1], rel=0.1), "four times the pixels"


def test_an_experiment_to_its_figure(tmp_path, capsys):
    o = Options(name="epochs", seeds=(0, 1), runs=str(tmp_path / "runs"), out=str(tmp_path / "results"),
                also=f"{TINY} --width 4")
    path, = experiments.experiment(o)
    result = disk.read_json(path)
    assert [p["x"] for p in result["points"]] == [3000, 6000] and result["measure"] == "ratio"
    for p in result["points"]:
        assert len(p["values"]) == len(p["trajectories"]) == 2 and p["interval"][0] <= p["mean"]
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > 500
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python emm.py ")]
    assert printed == [p["command"] for p in result["points"]]
    path = experiments.one(o, "optimum")
    result, folder = disk.read_json(path), path.parent
    assert [p["values"] for p in result["points"]] == [[1, 1], [0, 0]]
    assert len(result["points"][0]["denoising"][0]["loss"]) == len(result["sigmas"])
    figures = {f"optimum{end}.png" for end in ("", ".loss", ".trained", ".closed-form")}
    assert {path.name for path in folder.glob("optimum*.png")} == figures
    with pytest.raises(ValueError, match="was measured with --also .* give another --out"):
        experiments.one(Options(name="epochs", runs=o.runs, out=o.out), "epochs")


def test_searches_of_an_experiment(tmp_path, monkeypatch):
    points = [claims.Point("", w, dict(width=w)) for w in (4, 8)]
    monkeypatch.setitem(EXPERIMENTS, "width", dataclasses.replace(EXPERIMENTS["width"], cpu=points))
    o = Options(name="width", seeds=(0, 1), runs=str(tmp_path / "runs"), out=str(tmp_path / "results"),
                also=TINY)
    result = disk.read_json(experiments.one(o, "width"))
    assert result["measure"] == "emm"  # and nothing is memorized in 4 steps
    assert all(p["values"] == [None, None] and p["mean"] is None for p in result["points"])


def test_make_knows_every_experiment():
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    targets = re.search(r"^EXPERIMENTS = (.+)$", text, re.M)[1].split()
    assert targets == list(EXPERIMENTS)
    command = ["make", "-n", "-C", ROOT, "PYTHON=python", "labels", "SCALE=paper", "PLAN=1", "SEEDS=0 1"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    words = "--name labels --scale paper --runs runs --out paper/results --seeds 0,1"
    assert f"-m paper.experiments {words}" in text and "--dry-run" in text


def test_published_points_have_places_in_the_figures():
    for name, e in EXPERIMENTS.items():
        if e.published:
            found, places = experiments.published(name), {(p.series, str(p.x)) for p in e.paper}
            places |= {("base run", "3000"), ("base run", "4000")}
            assert len(found) >= 2 and {(f["series"], str(f["x"])) for f in found} <= places, name


def test_emm_of_the_published_curves():
    found = {p["x"]: round(p["value"], -1) for p in experiments.published("resolution")}
    assert found == {32: 1060, 16: 4470, 8: 7640}
