import contextlib
import dataclasses
import json
import math
import signal
import subprocess
import sys

import pytest
import torch

import data
import disk
import emm
import images
import run
import train
from conftest import ROOT

TINY = dict(data="digits", width=4, blocks=1, channel_mult=(1, 1), batch=16,
            steps=4, warmup_steps=1, snapshots=2,
            n_min=10, n_max=40, sample_count=150, device="cpu")
CHANGING = ("training_seconds", "sampling_seconds", "started")


def lasting(result):
    """The probes of a search in the order of their sizes, without what changes from run to run."""
    probes = sorted(result["probes"], key=lambda p: p["n"])
    return [{key: value for key, value in p.items() if key not in CHANGING} for p in probes]


@pytest.fixture(autouse=True)
def looks(monkeypatch):
    """A look after every 64 samples, for networks of any size."""
    monkeypatch.setattr(emm.sample, "CHUNK", (64, 64))


@pytest.fixture
def ratios(monkeypatch):
    """{n: share of samples that counts as memorized at the end}, with a seeded noise; half of it on the way.

    Without an entry all are. Networks are trained and sampled all the same.
    """
    ratios, draws = {}, torch.Generator().manual_seed(0)

    def fake(x, references, threshold, mirror):
        return torch.rand(len(x), generator=draws) < ratios.get(len(references.images), 1.0), None, None
    monkeypatch.setattr(emm.memorize, "measured", fake)
    return ratios


def options(out, **more):
    return emm.Options(**{**TINY, "out": str(out), **more})


def test_always_memorizes(tmp_path, capsys, ratios):
    result = disk.read_json(emm.find(options(tmp_path / "emm")))
    assert result["bracket"] == [40, None] and result["emm"] is None and result["interval"][1] is None
    assert [p["n"] for p in result["probes"]][-1] == 40 and all(p["above"] for p in result["probes"])
    for probe in result["probes"]:  # decided by the first snapshot, and trained and sampled no further
        assert not probe["whole"] and probe["decided"] and [t["step"] for t in probe["trajectory"]] == [2]
        assert probe["images_trained"] == 32 and probe["samples_drawn"] < 150 and probe["ratio"] == 1.0
    folder = tmp_path / "emm" / "n000040"
    assert [p.name for p in disk.Directory(folder).snapshots()] == ["snapshot-00000002.safetensors"]
    assert not list(folder.glob("state*")), "a size that is decided keeps no state"
    assert json.loads((folder / "config.json").read_text())["options"]["n"] == 40
    assert "EMM is at least 40" in capsys.readouterr().out


def test_never_memorizes(tmp_path, ratios):
    ratios |= {n: 0.1 for n in range(10, 41)}
    result = disk.read_json(emm.find(options(tmp_path / "emm")))
    assert result["emm"] is None and result["bracket"] == [None, 10]
    assert "EMM is below 10" in result["statement"]
    probe = result["probes"][-1]
    assert probe["whole"] and not probe["above"] and [t["step"] for t in probe["trajectory"]] == [2, 4]
    assert probe["samples_drawn"] == 128  # 64 a snapshot are enough
    assert result["samples_drawn"] == sum(p["samples_drawn"] for p in result["probes"])


def test_bracket_and_what_is_kept_and_reused(tmp_path, ratios, monkeypatch):
    ratios |= {n: 0.03 for n in range(21, 41)}
    out = tmp_path / "emm"
    result = disk.read_json(emm.find(options(out, tolerance=1.0)))
    low, high = result["bracket"]
    assert (low, high) == (20, 40) and low <= result["emm"] <= high and result["eps"] == 0.1
    assert result["images_trained"] == sum(p["images_trained"] for p in result["probes"])
    whole = out / f"n{high:06d}"
    assert len(disk.Directory(whole).snapshots()) == 2 and not (whole / "state.safetensors").exists()

    with monkeypatch.context() as patch:
        patch.setattr(train.Work, "take", lambda *a: pytest.fail("trained again"))
        patch.setattr(emm.sample, "generate", lambda *a, **k: pytest.fail("sampled again"))
        again = disk.read_json(emm.find(options(out, tolerance=1.0)))
        assert {p["n"]: p for p in again["probes"]} == {p["n"]: p for p in result["probes"]}
        # decided by the samples that are there
        other = disk.read_json(emm.find(options(out, tolerance=1.0, eps=0.6)))
        assert other["eps"] == 0.6 and other["bracket"] == result["bracket"]
    finer = disk.read_json(emm.find(options(out, tolerance=0.4)))
    assert finer["bracket"] == [20, 30] and len(finer["probes"]) == len(result["probes"]) + 1
    assert "is a multiple of 10, so the tolerance of 40% is not reached" in finer["statement"]
    with pytest.raises(ValueError, match="width: 4 there, 8 asked"):
        emm.find(options(out, width=8))


def test_more_samples_go_on_with_those_there(tmp_path, ratios, capsys):
    ratios |= {n: 0.9 for n in range(10, 41)}  # at the very target: samples run out
    few = disk.read_json(emm.find(options(tmp_path / "emm", sizes=(20,))))
    assert few["undecided"] == [20] and "at |D| = 20 the samples ran out before a verdict" in few["statement"]
    before = few["probes"][0]
    assert not before["decided"] and before["samples_drawn"] in (150, 300)
    more = disk.read_json(emm.find(options(tmp_path / "emm", sizes=(20,), sample_count=300)))["probes"][0]
    assert more["samples_drawn"] > before["samples_drawn"] and more["best"]["step"] in (2, 4)


def test_full_trains_to_the_end_and_draws_all(tmp_path, ratios):
    wide = options(tmp_path / "emm", n_min=5000, sizes=(20,), full=True)  # sizes are not searched
    probe, = disk.read_json(emm.find(wide))["probes"]
    assert probe["whole"] and probe["above"] and probe["samples_drawn"] == 300
    assert [(t["step"], t["count"]) for t in probe["trajectory"]] == [(2, 150), (4, 150)]


def test_when_a_size_memorizes_and_when_it_generalizes_best(tmp_path, ratios):
    ratios |= {10: 0.8}
    o = options(tmp_path / "emm", sizes=(10,), full=True, validate=20, snapshots="log:3", steps=8)
    probe, = disk.read_json(emm.find(o))["probes"]
    assert [t["step"] for t in probe["trajectory"]] == [2, 4, 8]
    assert probe["onset"].keys() == {"0.01", "0.1", "0.5", "0.9"}
    first = probe["onset"]["0.5"]
    assert first["epoch"] == 0 and first["interval"][0] == 0 and probe["onset"]["0.9"]["epoch"] is None
    losses = {t["step"]: t["validation_loss"] for t in probe["trajectory"]}
    least = probe["at_least_validation_loss"]
    assert least["validation_loss"] == min(losses.values()) and least in probe["trajectory"]
    assert least["ratio"] == least["hits"] / least["count"]
    assert (tmp_path / "emm" / "n000010" / least["file"]).exists()
    with pytest.raises(ValueError, match="from 2 to the 1777 images of --data that --validate leaves"):
        emm.find(options(tmp_path / "other", sizes=(1790,), validate=20))


def test_not_monotone_is_reported(tmp_path, ratios):
    ratios |= {20: 0.1, 40: 0.1}
    result = disk.read_json(emm.find(options(tmp_path / "emm", sizes=(10, 20, 30, 40))))
    assert result["bracket"] == [30, 40] and result["rises"] == [[20, 30]]


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_killed_search_goes_on_to_the_same_end(tmp_path, monkeypatch, at):
    """Real verdicts depend on seeds alone: a search killed while sampling goes on to the same history."""
    how = dict(TINY, n_max=20, eps=0.99, tolerance=0.5, sample_count=100)
    whole = disk.read_json(emm.find(emm.Options(**how, out=str(tmp_path / "whole"))))
    generate, calls = emm.sample.generate, []

    def killed(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == at:
            raise KeyboardInterrupt
        return generate(*arguments, **keywords)
    monkeypatch.setattr(emm.sample, "generate", killed)
    broken = emm.Options(**how, out=str(tmp_path / "broken"))
    if sum(math.ceil(t["count"] / 64) for p in whole["probes"] for t in p["trajectory"]) >= at:
        with pytest.raises(KeyboardInterrupt):
            emm.find(broken)
    again = disk.read_json(emm.find(broken))
    assert lasting(again) == lasting(whole) and again["statement"] == whole["statement"]
    assert [p["n"] for p in again["probes"]] == [p["n"] for p in whole["probes"]]
    drawn = [seed for arguments in calls[:at - 1] + calls[at:] for seed in arguments[1]]
    assert len(drawn) == whole["samples_drawn"]  # nothing was drawn twice


def test_a_signal_ends_sampling_after_the_chunk(tmp_path, ratios, monkeypatch):
    ratios[20] = 0.9
    monkeypatch.setattr(run, "interrupted", lambda: True)
    with pytest.raises(KeyboardInterrupt, match="scores so far are in"):
        probe = emm.Probe(options(tmp_path), 20)
        references = emm.References(torch.zeros(20, 1, 8, 8, dtype=torch.uint8))
        last = train.train(dataclasses.replace(probe.training, steps=1, snapshots=1))
        probe.score(last, references)
    assert [s["count"] for s in disk.read_json(probe.files.scores)["snapshots"].values()] == [64]


def test_snapshots_that_tie_and_runs_of_others(tmp_path, ratios, monkeypatch):
    """No snapshot is lost unscored: not where the best is the first of equals, nor in a run of train.py."""
    ratios[20] = 0.0
    probe = emm.Probe(options(tmp_path / "a", snapshots=4), 20)
    train.train(dataclasses.replace(probe.training, out=str(tmp_path / "other")))
    generate, calls = emm.sample.generate, []

    def killed(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments, **keywords)
    monkeypatch.setattr(emm.sample, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        probe.measure()
    assert [p.name[9:17] for p in probe.files.snapshots()] == ["00000001", "00000002", "00000003"]
    for there in (probe.files.path, tmp_path / "other"):
        again = emm.Probe(options(tmp_path / "a", snapshots=4), 20)
        again.files = disk.Directory(there)
        again.training = dataclasses.replace(again.training, out=str(there))
        if there != probe.files.path:
            again.scores = {}
        again.measure()
        assert sorted(again.scores) == [1, 2, 3, 4] and again.above() is False
        names = [p.name for p in disk.Directory(there).snapshots()]
        assert names == ["snapshot-00000001.safetensors", "model.safetensors"]


def test_a_removed_snapshot_proves_nothing(tmp_path, ratios):
    """45 of 64 is below 90%, and soon removed: others have to tell now whether 70% is reached."""
    probe = emm.Probe(options(tmp_path), 20)
    gone = dict(epoch=1.0, file="snapshot-00000002.safetensors", hits=45, count=64)
    assert probe.verdict(gone) is False
    ratios[20] = 0.1
    train.train(probe.training)
    assert emm.Probe(options(tmp_path, eps=0.3), 20).verdict(gone) is None
    disk.Directory(probe.files.path).snapshot(2).unlink()
    assert emm.Probe(options(tmp_path, eps=0.3), 20).verdict(gone) is False
    disk.write_json(probe.files.scores, dict(
        probe.about, snapshots={2: gone}, sampling_seconds=0.0, started=1.0))
    with pytest.raises(ValueError, match="has lost snapshots whose verdict is open; remove it to measure"):
        emm.Probe(options(tmp_path, full=True), 20).measure()


def test_samplers(tmp_path, ratios, monkeypatch):
    """All options of sampling reach the sampler and stand in the scores, which another sampler refuses."""
    given = dict(sampler="euler", sample_steps=3, churn=1.0, guidance=2.0, sample_labels="training")
    o, drawn = options(tmp_path / "emm", sizes=(20,), labels="true", **given), []
    generate = emm.sample.generate

    def noted(*arguments, sampling, **keywords):
        drawn.append(sampling)
        return generate(*arguments, sampling=sampling, **keywords)
    monkeypatch.setattr(emm.sample, "generate", noted)
    emm.find(o)
    assert drawn and all(getattr(one, key) == value for one in drawn for key, value in given.items())
    scores = tmp_path / "emm" / "n000020" / "scores.json"
    assert disk.read_json(scores)["options"].items() >= given.items()
    with pytest.raises(ValueError, match="scores.json was made with .*churn: 1.0 there, 0.0 asked"):
        emm.Probe(options(tmp_path / "emm", labels="true"), 20)
    scores.unlink()  # and the snapshots are drawn from again
    monkeypatch.setattr(train.Work, "take", lambda *a: pytest.fail("trained again"))
    emm.Probe(options(tmp_path / "emm", labels="true"), 20).measure()
    assert drawn[-1].sampler == "heun" and drawn[-1].guidance == 1
    with pytest.raises(ValueError, match="--guidance 2 weighs a label against none; give --labels"):
        options(tmp_path / "x", guidance=2.0)


def test_two_searches_in_one_place(tmp_path):
    with disk.claim(tmp_path, dict(options={})):
        command = [sys.executable, "emm.py", "--data", "digits", "--n-min", "10", "--out", str(tmp_path),
                   "--device", "cpu"]
        other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 1 and "in use by another process" in other.stderr
    assert len(other.stderr.splitlines()) == 1


@pytest.mark.parametrize("labels", ["permuted", "coarse:2", "clusters:3", "unique:0.5"])
def test_every_kind_of_labels(tmp_path, labels):
    """Drawn and dropped in training, and at sampling uniform or left out, which are other searches."""
    how = dict(labels=labels, label_dropout=0.5, sizes=(10,), sample_count=10)
    result = disk.read_json(emm.find(options(tmp_path / "a", **how, sample_labels="none")))
    assert [p["n"] for p in result["probes"]] == [10]
    with pytest.raises(ValueError, match="sample_labels: 'none' there, 'uniform' asked"):
        emm.find(options(tmp_path / "a", **how))


def test_mirrored_copies_count_if_asked_for(tmp_path, monkeypatch):
    D = data.load(data.Options(data="digits", n=10))

    def mirrored(net, seeds, *labels, **how):
        return D.images[torch.tensor(list(seeds)) % 10].flip(-1), None
    monkeypatch.setattr(emm.sample, "generate", mirrored)
    for mirror, ratio in ((False, 0.0), (True, 1.0)):
        path = emm.find(options(tmp_path / str(mirror), mirror=mirror, flip=mirror, sizes=(10,)))
        result = disk.read_json(path)
        assert result["probes"][0]["ratio"] == ratio
        assert result["options"]["mirror"] is mirror


def test_several_devices_find_the_same(tmp_path):
    how = dict(TINY, n_max=20, eps=0.99, tolerance=0.5, sample_count=64)
    one = disk.read_json(emm.find(emm.Options(**how, out=str(tmp_path / "one"), sizes=(10, 20))))
    words = []
    for name, value in how.items():
        words += [f"--{name.replace('_', '-')}", str(value).strip("()").replace(" ", "")]
    command = [sys.executable, "emm.py", *words, "--out", tmp_path / "two",
               "--sizes", "10,20", "--devices", "cpu,cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    two = disk.read_json(tmp_path / "two" / "emm.json")
    assert lasting(one) == lasting(two) and one["statement"] == two["statement"]


def test_a_process_that_waits_is_not_killed(monkeypatch, tmp_path):
    """A SIGTERM interrupts what a process measures; while it waits, killing it would break the others."""
    previous = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(emm.Probe, "measure", lambda probe: signal.raise_signal(signal.SIGTERM))
    try:
        with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as emm.workers starts it
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                emm.measure(options(tmp_path / "emm"), 20)
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_remedy_can_be_followed(tmp_path):
    for n_min, remedy in ((30, "lower it, or take more images"), (2, "take more images")):
        with pytest.raises(ValueError, match=f"--n-min {n_min} is more than the .*; {remedy}"):
            emm.find(options(tmp_path / "emm", n_min=n_min, n_max=n_min - 1))


def test_the_target_is_met_in_whole_numbers(tmp_path):
    probe = emm.Probe(options(tmp_path / "emm", eps=0.18, sample_count=500), 20)
    assert probe.verdict(dict(hits=410, count=500)) and not probe.verdict(dict(hits=409, count=500))


def test_the_smallest_size_is_the_one_asked_for(tmp_path, ratios):
    ratios |= {n: 0.1 for n in range(10, 51)}
    result = disk.read_json(emm.find(options(tmp_path / "emm", n_min=25, n_max=50)))
    assert min(p["n"] for p in result["probes"]) == 25 and "EMM is below 25" in result["statement"]


def test_seeds(tmp_path, ratios, capsys):
    ratios |= {n: 0.2 for n in range(21, 41)}
    result = disk.read_json(emm.find(options(tmp_path / "emm", tolerance=0.5, train_seeds=(3, 4))))
    assert result["searches"] == ["seed3/emm.json", "seed4/emm.json"] and len(result["emms"]) == 2
    one, other = (disk.read_json(tmp_path / "emm" / path) for path in result["searches"])
    assert one["options"]["seed"] == one["options"]["subset_seed"] == 3 and one["data"] == other["data"]
    assert result["interval"][0] <= result["emm"] <= result["interval"][1]
    assert "on average over 2 seeds" in result["statement"]
    with pytest.raises(ValueError, match="seed: 'each of --train-seeds' there, 0 asked"):
        emm.find(options(tmp_path / "emm"))
    with pytest.raises(ValueError, match="width: 4 there, 8 asked"):
        emm.find(options(tmp_path / "emm", train_seeds=(5, 6), width=8))
    three = emm.mean_interval([10.0, 12.0, 14.0])
    assert three["interval"] == pytest.approx([12 - 4.9683, 12 + 4.9683], abs=1e-3)
    assert emm.mean_interval([10.0, None])["emm"] is None
    none = emm.mean_interval([10.0, None])["statement"]
    assert none == "EMM was not found for every seed (10, none), and so has no mean"
    assert emm.mean_interval([None])["statement"] == "EMM was not found"
    alone = emm.mean_interval([7.0])
    assert alone["emm"] == 7.0 and alone["interval"] is None and "of one seed" in alone["statement"]
    for given in (dict(seed=1), dict(subset_seed=0), dict(label_seed=1)):
        with pytest.raises(ValueError, match="--train-seeds 3,4 sets --seed, --subset-seed and --label-seed"):
            options(tmp_path / "emm", train_seeds=(3, 4), **given)
    for labels, drawn in {"random:2": 3, "true": 0}.items():  # labels that are drawn are drawn by the seed
        there = emm.find(options(tmp_path / labels, labels=labels, sizes=(20,), train_seeds=(3,))).parent
        assert disk.read_json(there / "seed3" / "emm.json")["options"]["label_seed"] == drawn


def test_data_are_decoded_once_and_may_move(tmp_path, ratios, monkeypatch, write_images, noise, capsys):
    pixels, decode, names = noise(40, 8, 8, 1), images.files.decode, []
    pixels[1] = pixels[0]
    write_images(tmp_path / "imgs", pixels)

    def counted(content, name):
        names.append(name)
        return decode(content, name)
    monkeypatch.setattr(images.files, "decode", counted)
    monkeypatch.chdir(tmp_path)
    run.say.cache_clear()
    how = dict(data="imgs", sizes=(10, 20, 30), train_seeds=(0, 1))
    emm.find(options(tmp_path / "emm", **how))
    assert len(names) == 40
    # once for all seeds and sizes
    assert capsys.readouterr().err.count("1 of 40 training images repeat an earlier one") == 1
    (tmp_path / "imgs").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    monkeypatch.setattr(train.Work, "take", lambda *a: pytest.fail("trained again"))
    emm.find(options(tmp_path / "emm", **how | dict(data=f"{tmp_path}/./moved/")))


@pytest.mark.parametrize("given, words", [
    (dict(eps=0.0), "--eps 0.0"), (dict(tolerance=0.0), "--tolerance 0.0"), (dict(n_min=1), "--n-min 1"),
    (dict(alpha=1.0), "--alpha 1.0"), (dict(sample_count=0), "--sample-count 0"),
    (dict(threshold="3"), "threshold"),
    (dict(n_min=5000, n_max=0), "more than the 1797 images there are"),
    (dict(sizes=(20, 20)), "twice"), (dict(train_seeds=(0, 0)), "twice"),
    (dict(sizes=(1,)), "--sizes"), (dict(sizes=(2000,)), "--sizes")])
def test_bad_options(tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        emm.find(options(tmp_path / "x", **given))
