import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import disk
import run
import train
from conftest import ROOT
from diffusion import steps

TINY = dict(data="digits", n=20, width=4, blocks=1, channel_mult=(1, 1), batch=16, steps=12, warmup_steps=3,
            learning_rate=2e-3, snapshots=3, log_steps=5, device="cpu")


SAME_LOSS = 1e-5  # relative: float32 sums in parts of another size


def options(out, **given):
    return train.Options(**{**TINY, "out": str(out), **given})


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_steps_grow_with_the_data():
    assert train.total_steps(train.Options(), 1000) == 78125 == -(-40000 * 1000 // 512)
    assert train.total_steps(train.Options(), 500) == 39063
    assert train.total_steps(train.Options(steps=7), 500) == 7
    floor = train.Options(steps_min=50_000)
    assert train.total_steps(floor, 500) == 50_000 and train.total_steps(floor, 1000) == 78125


def test_snapshots_lie_apart_in_steps_or_in_images():
    assert train.snapshot_steps(train.Options(steps=8, snapshots=4), 500) == [2, 4, 6, 8]
    assert train.snapshot_steps(train.Options(steps=2, snapshots=16), 500) == [1, 2]
    assert train.snapshot_steps(train.Options(steps=10**4, snapshots="log:4"), 500) == [10, 100, 1000, 10**4]
    assert train.snapshot_steps(train.Options(steps=4, snapshots="log:9"), 500) == [1, 2, 3, 4]
    given = [run.parse(train.Options, ["--snapshots", word]).snapshots for word in ("log:4", "4")]
    assert given == ["log:4", 4]
    published = train.Options(snapshot_images=2_500_000)
    counts = {n: len(train.snapshot_steps(published, n)) for n in (500, 1000, 5000)}
    assert counts == {500: 8, 1000: 16, 5000: 80}
    steps = train.snapshot_steps(published, 500)
    assert steps[0] == 4883 and steps[-1] == 39063 == train.total_steps(published, 500)
    with pytest.raises(ValueError, match="makes 20,000,256 snapshots of 500 images.* give 2001 or more"):
        train.snapshot_steps(train.Options(snapshot_images=1), 500)


def test_a_run_and_its_files(tmp_path):
    o = options(tmp_path / "run", labels="true")
    model = train.train(o)
    D, about = checkpoint.load_model(model)
    assert about["options"]["precision"] == "fp32", "what auto means on a CPU"
    assert about["step"] == 12 and about["options"]["n"] == 20 and about["label_counts"] == [2] * 10
    assert D.config["label_dim"] == 10 and D.config["img_resolution"] == 8 and about["device"] == "cpu"
    assert [disk.metadata(p)["step"] for p in disk.Directory(o.out).snapshots()] == [4, 8, 12]
    log = disk.read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in log] == [4, 5, 8, 10, 12] and log[-1]["images"] == 192
    assert {"epoch", "loss", "images_per_second", "memory_mb", "batch_device", "seconds"} <= set(log[0])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["count"] == 20 and config["versions"]["torch"] == torch.__version__.split("+")[0]
    assert not (tmp_path / "run" / "state.safetensors").exists()
    before = digest(model), model.stat().st_mtime_ns
    assert train.train(o) == model and (digest(model), model.stat().st_mtime_ns) == before  # at once
    with pytest.raises(ValueError, match="width: 4 there, 8 asked"):
        train.train(options(tmp_path / "run", labels="true", width=8))


def test_the_same_seed_gives_the_same_weights(tmp_path):
    paths = [train.train(options(tmp_path / name, seed=seed, steps=4))
             for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    weights = [checkpoint.load_model(path)[0].model.state_dict() for path in paths]
    assert all(torch.equal(x, y) for x, y in zip(weights[0].values(), weights[1].values()))
    assert not all(torch.equal(x, y) for x, y in zip(weights[0].values(), weights[2].values()))


def test_validation_changes_no_weight_and_goes_on_where_it_stopped(tmp_path):
    given = dict(dropout=0.13, labels="true", snapshots="log:3")  # after steps 2, 5 and 12
    o = options(tmp_path / "run", validate=30, **given)
    with contextlib.closing(train.training(o)) as snapshots:
        next(snapshots)
    model, plain = train.train(o), train.train(options(tmp_path / "plain", **given))
    weights = [checkpoint.load_model(path)[0].model.state_dict() for path in (model, plain)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values()))
    log = disk.read_log(tmp_path / "run" / "log.jsonl")
    logged = {line["step"]: line.get("validation_loss") for line in log}
    assert set(logged) == {2, 5, 10, 12} and logged[10] is None
    for path in disk.Directory(o.out).snapshots():
        D, about = checkpoint.load_model(path)
        assert about["validation_loss"] == logged[about["step"]]
        # of its own weights, on the 30 images that follow the training set
        held_out = data.load(data.Options(data="digits", n=50, labels="true"))
        y = held_out.images[20:].float() / 127.5 - 1
        generator = torch.Generator().manual_seed(steps.seed_of(0, "validation"))
        sigma, noise = D.objective.training_sigma(30, generator), torch.randn(y.shape, generator=generator)
        loss = D.loss(y, sigma, noise, held_out.labels[20:]).mean()
        assert float(loss) == pytest.approx(about["validation_loss"], rel=SAME_LOSS)
    assert "validation_loss" not in disk.metadata(plain)
    with pytest.raises(ValueError, match="made with other options .validate: 30 there, 0 asked"):
        train.train(options(tmp_path / "run", **given))


def test_an_older_run_is_the_same_run(tmp_path):
    """Its config.json and snapshots know none of the options that came later."""
    model = train.train(options(tmp_path / "run"))
    about, path = checkpoint.load_model(model)[1], tmp_path / "run" / "config.json"
    config = disk.read_json(path)
    for options_there in (config["options"], about["options"]):
        for name in ("part", "repeat", "validate"):
            del options_there[name]
    disk.write_json(path, config)
    weights = checkpoint.read(model)[0]
    checkpoint.write(model, weights, {key: value for key, value in about.items() if key != "sha256"})
    before = digest(model)
    assert train.train(options(tmp_path / "run")) == model and digest(model) == before


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_interrupted_anywhere_and_gone_on_is_the_same_run(tmp_path, monkeypatch, optimizer):
    given = dict(dropout=0.13, optimizer=optimizer)
    whole = train.train(options(tmp_path / "whole", **given))
    o, calls, take = options(tmp_path / "broken", **given), [], steps.Work.take

    def interrupt(work, step):
        calls.append(step)
        if len(calls) in (1, 4, 8):
            os.kill(os.getpid(), signal.SIGINT)
        return take(work, step)

    monkeypatch.setattr(steps.Work, "take", interrupt)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt, match="goes on from there"):
            train.train(o)
    broken = train.train(o)
    assert calls == list(range(12))  # nothing done twice
    whole_run, broken_run = (disk.Directory(tmp_path / name).snapshots() for name in ("whole", "broken"))
    for a, b in zip(whole_run, broken_run):
        wa, wb = (checkpoint.load_model(path)[0].model.state_dict() for path in (a, b))
        assert all(torch.equal(wa[name], wb[name]) for name in wa)
    assert digest(whole) == digest(broken)


COMMAND = [sys.executable, str(ROOT / "train.py"),
           "--data", "digits", "--n", "20", "--width", "4", "--blocks", "1",
           "--channel-mult", "1,1", "--batch", "16", "--warmup-steps", "5", "--device", "cpu"]


def test_killed_half_way_resumes_to_the_same_weights(tmp_path):
    flags = ["--steps", "40", "--snapshots", "4", "--save-seconds", "0"]
    subprocess.run([*COMMAND, *flags, "--out", tmp_path / "whole"], check=True, capture_output=True)
    process = subprocess.Popen([*COMMAND, *flags, "--out", tmp_path / "killed"], stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "snapshot-00000020.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert (tmp_path / "killed" / "state.safetensors").exists()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    subprocess.run([*COMMAND, *flags, "--out", tmp_path / "killed"], check=True, capture_output=True)
    for name in ("snapshot-00000020.safetensors", "model.safetensors"):
        assert digest(tmp_path / "whole" / name) == digest(tmp_path / "killed" / name)
    steps = [line["step"] for line in disk.read_log(tmp_path / "killed" / "log.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 40


def test_ctrl_c_answers_saves_and_says_so(tmp_path):
    process = subprocess.Popen([*COMMAND, "--steps", "100000", "--log-steps", "1", "--out", tmp_path / "run"],
                               stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or not log.stat().st_size:  # a first step is taken
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    answer, said = error.splitlines()
    assert process.returncode == 130 and "stopping" in answer and "the same command goes on" in said
    assert (tmp_path / "run" / "state.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was(tmp_path):
    o = options(tmp_path / "run", learning_rate=1e30, steps=40, snapshots=40, warmup_steps=0)
    words = r"the (loss of step \d+ is|weights are not finite after step).*--learning-rate"
    with pytest.raises(ValueError, match=words):
        train.train(o)
    kept = disk.Directory(o.out).snapshots()
    assert kept and not (tmp_path / "run" / "model.safetensors").exists()
    for path in kept:
        assert all(t.isfinite().all() for t in checkpoint.load_model(path)[0].model.state_dict().values())


def test_weights_that_are_not_finite_are_never_published(tmp_path):
    o = options(tmp_path / "run", optimizer="sgd", learning_rate=1e38, warmup_steps=0, steps=2)
    with pytest.raises(ValueError, match="weights are not finite after step 2"):
        train.train(o)
    kept = [checkpoint.load_model(path)[0] for path in disk.Directory(o.out).snapshots()]
    assert len(kept) == 1  # after step 1 they were
    assert all(p.isfinite().all() for p in kept[0].parameters())


@pytest.mark.parametrize("given, words", [
    (dict(batch_device=5), "does not divide"), (dict(learning_rate=-1.0), "learning-rate -1.0"),
    (dict(learning_rate=float("nan")), "finite"), (dict(ema_rate=1.0), "ema-rate"),
    (dict(steps=0), "--steps 0"), (dict(snapshots=0), "snapshots"),
    (dict(attn_resolutions=(5,)), "attn-resolutions"), (dict(device="tpu"), "--device tpu"),
    (dict(device="meta"), "--device meta"), (dict(device="cuda:99"), "--device cuda:99"),
    (dict(device="cpu", precision="tf32"), "--precision tf32"),
    (dict(sigma_skip=(2.0, 1.0)), "--sigma-skip 2.0,1.0 is no range"),
    (dict(sigma_skip=(0.0, 1e6)), "skips all or none of the noise levels"),
    (dict(skip_connections=(1, 1)), "must be 4"), (dict(n=2000), "more than the 1797")])
def test_bad_options_are_named(tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        train.train(options(tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()


def stop_at(o, name):
    """Train until that snapshot."""
    with contextlib.closing(train.training(o)) as snapshots:
        assert name in (path.name for path in snapshots)


def test_a_damaged_state_is_named(tmp_path):
    whole = train.train(options(tmp_path / "whole"))
    out = tmp_path / "run"
    o, state = options(out, save_seconds=0.0), out / "state.safetensors"
    stop_at(o, "snapshot-00000008.safetensors")
    assert disk.metadata(state)["step"] == 8
    whole_state = state.read_bytes()
    content = bytearray(whole_state)
    content[len(content) // 2] ^= 1
    for damaged, words in ((content, "is damaged: its checksum differs"),
                           (whole_state.replace(rb'\"step\": 8', rb'\"step\": 9'), "is damaged: its"),
                           (b"torn", "is not a whole")):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"state.safetensors {words}.*; remove it"):
            train.train(o)
    state.unlink()
    stop_at(options(tmp_path / "other", seed=1, save_seconds=0.0), "snapshot-00000004.safetensors")
    (tmp_path / "other" / "state.safetensors").rename(state)
    with pytest.raises(ValueError, match="state.safetensors was made with .*seed: 1 there, 0 asked"):
        train.train(o)
    state.unlink()
    assert digest(train.train(o)) == digest(whole), "without it, from the start, to the same weights"


def test_a_gradient_that_is_not_finite_stops_at_its_step(tmp_path, monkeypatch):
    taken, real = [], torch.nn.utils.get_total_norm

    def norm(gradients):
        taken.append(1)
        return real(gradients) * (float("nan") if len(taken) == 6 else 1)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", norm)
    o = options(tmp_path / "run")
    words = ("norm of the gradient of step 6 is nan; what was saved before is kept. "
             "Lower --learning-rate")
    with pytest.raises(ValueError, match=words):
        train.train(o)
    assert [path.name for path in disk.Directory(o.out).snapshots()] == ["snapshot-00000004.safetensors"]
    assert "of step 6 is nan" in disk.read_log(tmp_path / "run" / "log.jsonl")[-1]["stopped"]


HEAVY = ("matplotlib", "torchvision", "triton", "torch._dynamo")


def test_no_stage_imports_what_it_does_not_use(tmp_path):
    """Seconds of start-up each: train, sample and score run, and emm.py is imported, without any of them."""
    code = f"""
import sys, emm, memorize, sample, train
train.main(); sys.argv[1:] = ['--run', 'run', '--seeds', '0-3', '--device', 'cpu']
sample.main(); sys.argv[1:] = ['--samples', 'run', '--train', 'run', '--device', 'cpu']
memorize.main()
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
"""
    command = [sys.executable, "-c", code, "--data", "digits", "--n", "8", "--width", "4", "--blocks", "1",
               "--channel-mult", "1,1", "--batch", "4", "--steps", "2", "--device", "cpu", "--out", "run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                            env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_a_file_of_weights_is_written_without_copies(tmp_path):
    """128 MB of weights, whose file took three more such pieces of memory once."""
    script = f"""
import pathlib, re, sys, torch; sys.path.insert(0, {str(ROOT)!r}); import checkpoint
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) // 1024
weights = {{name: torch.ones(16, 1024, 1024) for name in "ab"}}
before = peak()
checkpoint.write(pathlib.Path("weights.safetensors"), weights, dict(step=1))
print(peak() - before)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64, "megabytes"
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_disk_that_is_full_names_the_file(tmp_path):
    """safetensors raises an error of its own, which is no OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="weights.safetensors cannot be written .*File too large"):
            checkpoint.write(tmp_path / "weights.safetensors", dict(a=torch.ones(1000)), dict(step=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_progress_in_a_log_is_whole_lines(capsys, monkeypatch):
    monkeypatch.setattr(train, "LINE_SECONDS", 0)
    monkeypatch.setattr(train.sys.stderr, "isatty", lambda: False)
    with train.progress_bar("runs/x", 2, 6) as bar:
        for _ in range(4):
            bar.update(1)
    lines = capsys.readouterr().err.split("\n")
    assert lines[-1] == "" and lines[-2].startswith("runs/x: step 6 of 6, ") and "\r" not in "".join(lines)
