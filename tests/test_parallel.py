"""torchrun with gloo on CPUs: several processes make what one makes."""
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import disk
import parallel
from conftest import ROOT

SAME_WEIGHTS = 2e-5  # float32 sums of gradients in another order, after 20 Adam steps of 1e-3
TRAIN = ["--data", "digits", "--n", "40", "--width", "4", "--blocks", "1", "--channel-mult", "1,1",
         "--batch", "16", "--dropout", "0", "--steps", "20", "--warmup-steps", "5", "--learning-rate", "1e-3",
         "--snapshots", "2", "--log-steps", "5", "--device", "cpu"]


def launch(processes, *command, **more):
    start = []
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
    command = [sys.executable, *start, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, **more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same 20 steps by one and by two processes."""
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        done = launch(processes, "train.py", *TRAIN, "--out", folder / str(processes))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote") == 1
    return folder


def test_training_agrees(runs):
    one, two = (load_file(runs / p / "model.safetensors") for p in "12")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < SAME_WEIGHTS
    logs = [disk.read_log(runs / p / "log.jsonl") for p in "12"]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [5, 10, 15, 20]
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-4) for a, b in zip(*logs))
    assert sorted(p.name for p in (runs / "1").iterdir()) == sorted(p.name for p in (runs / "2").iterdir())


@pytest.mark.parametrize("processes", [2, 3])
def test_samples_and_verdicts_are_the_same(runs, tmp_path, processes):
    results = []
    for count in (1, processes):
        out = tmp_path / str(count) / "a.npz"
        out.parent.mkdir()
        drawn = launch(count, "sample.py", "--run", runs / "1", "--seeds", "0-99", "--out", out,
                       "--device", "cpu")
        assert drawn.returncode == 0
        table = tmp_path / f"{count}.csv"
        done = launch(count, "memorize.py", "--samples", out, "--train", runs / "1", "--csv", table,
                      "--out", tmp_path / f"{count}.json", "--device", "cpu")
        assert done.returncode == 0 and done.stdout.count("samples memorized") == 1, done.stderr
        with np.load(out) as file:
            results.append((file["arr_0"], file["seeds"], table.read_text(), done.stdout))
    (images, seeds, *words), (other, other_seeds, *other_words) = results
    assert np.array_equal(images, other) and np.array_equal(seeds, other_seeds) and words == other_words
    assert not (tmp_path / "1.json").read_text() == ""


def test_every_process_says_in_a_line_what_is_wrong(runs, tmp_path):
    for command in (
            ["train.py", *TRAIN, "--out", tmp_path / "x", "--width", "5"],
            ["train.py", *TRAIN, "--batch", "1", "--out", tmp_path / "y"],
            ["sample.py", "--run", runs / "1", "--seeds", "3", "--device", "cpu",
             "--out", tmp_path / "z.npz"],
            ["emm.py", "--data", "digits"]):
        done = launch(2, *command)
        lines = [line for line in done.stderr.splitlines() if line.startswith(str(command[0]) + ":")]
        assert done.returncode and len(set(lines)) == 1, done.stderr


def test_shares_cover_everything_once(monkeypatch):
    for size in (1, 2, 3, 7):
        monkeypatch.setenv("WORLD_SIZE", str(size))
        for count in (0, 1, 5, 64, 100):
            parts = []
            for rank in range(size):
                monkeypatch.setenv("RANK", str(rank))
                parts += range(count)[parallel.share(count)]
            assert parts == list(range(count))


def test_one_process_does_nothing_of_it():
    x = torch.arange(3)
    with parallel.group(torch.device("cpu")):
        assert parallel.gather(x) is x and parallel.summed(x) is x and parallel.total(5, "cpu") == 5
    assert parallel.barrier() is None


def test_a_process_that_torchrun_did_not_start_says_itself_what_is_wrong(tmp_path):
    left = dict(RANK="1", WORLD_SIZE="2")  # in the environment, by something else
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER")} | left
    command = [sys.executable, ROOT / "train.py", *TRAIN, "--out", tmp_path / "run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "cannot join the other processes" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_in_use_is_named_in_a_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        where = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost",
                     MASTER_PORT=str(taken.getsockname()[1]))
        command = [sys.executable, ROOT / "train.py", *TRAIN, "--out", tmp_path / "run"]
        result = subprocess.run(command, env=os.environ | where, capture_output=True, text=True)
    assert result.returncode == 1 and "cannot join the other processes" in result.stderr
    assert "Traceback" not in result.stderr
