"""What `make` would run: names of directories, files as targets, and imports that point down only."""
import subprocess
import sys

import pytest

from conftest import ROOT


def make(*words):
    command = ["make", "--no-print-directory", "-C", str(ROOT), f"PYTHON={sys.executable}", *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_lists_targets_and_variables():
    text = make("help").stdout
    for word in ("setup", "train", "sample", "memorize", "emm", "plot", "demo", "lint", "test", "bench",
                 "kernel-report", "clean", "WIDTH=128", "FLAGS="):
        assert word in text


def test_emm_of_another_width():
    text = make("-n", "emm", "WIDTH=256").stdout
    assert "emm.py --out runs/cifar10-w256-b2-B512-e40000-s0-emm" in text and "--width 256" in text
    assert "--seeds" not in text and "--devices" not in text
    several = make("-n", "emm", "SEEDS=0 1 2", "DEVICES=cuda:0 cuda:1").stdout
    assert "--train-seeds 0,1,2 --devices cuda:0,cuda:1" in several
    assert "plot.py --emm runs/cifar10-w256-b2-B512-e40000-s0-emm/emm.json" in text


def test_every_variable_and_flag_enters_the_name():
    changed = dict(DATA="x/y.zip", RES=8, CLASSES=2, LABELS="random:10", ARCH="ncsnpp", WIDTH=64, BLOCKS=4,
                   BATCH=64, EPOCHS=9, SEED=3, N=50, FLAGS="--precond ve --channel-mult 1,2 --dropout=0")
    base, names = make("-n", "train").stdout, set()
    for key, value in changed.items():
        text = make("-n", "train", f"{key}={value}").stdout
        out = text.split("--out ")[1].split()[0]
        assert out not in names and out not in base and not set(out) & set(":=, ")
        names.add(out)
    assert make("-n", "train", "FLAGS=--precond ve --dropout=0").stdout.count("--precond ve --dropout=0") == 1


def test_data_of_one_name_in_two_folders_do_not_meet():
    def before_data(data):
        return make("-n", "train", f"DATA={data}").stdout.split("--data")[0]
    outs = {before_data(data) for data in ("a/x.zip", "b/x.zip", "../x.zip", "x.zip", "x", "/x/")}
    assert len(outs) == 6 and before_data("x/") == before_data("x")


def test_files_are_targets(tmp_path):
    common = [f"RUNS={tmp_path}", "DATA=digits", "WIDTH=4", "BLOCKS=1", "BATCH=16", "N=20", "SAMPLES=12",
              "FLAGS=--channel-mult 1,1 --steps 3 --snapshots 1 --device cpu"]
    first = make("memorize", *common)
    assert first.returncode == 0 and "of 12 samples memorized" in first.stdout, first.stderr
    out, = tmp_path.iterdir()
    ends = ".npz", ".png", ".json", "-pairs.png", "-pairs.csv"
    made = {"model.safetensors", *(f"samples-0-11{end}" for end in ends)}
    assert made <= {p.name for p in out.iterdir()}
    command = [sys.executable, str(ROOT / "memorize.py"), "--samples", out, "--train", out, "--device", "cpu"]
    assert first.stdout.endswith(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    again = make("-n", "memorize", *common).stdout
    assert "train.py" not in again and "sample.py" not in again
    fewer = make("memorize", *common, "SAMPLES=5")
    assert "of 5 samples memorized" in fewer.stdout and "train.py" not in fewer.stdout
    emm = make("emm", *common, "N_MIN=10", "N_MAX=20", "EPS=0.5")
    assert emm.returncode == 0 and "EMM is " in emm.stdout, emm.stderr
    assert (tmp_path / (out.name.removesuffix("-n20") + "-emm") / "emm.png").exists()


@pytest.mark.parametrize("word, says", [
    *((f"SAMPLES={value}", f"SAMPLES={value}: give a whole number")
      for value in ("10k", "10,000", "1e4", "0", "016", "", "1'x", "10000001")),
    ("RUNS=my runs", "RUNS=my runs: give a value without spaces"), ("DATA=my data.zip", "without spaces"),
    ("WDITH=64", "WDITH: no such variable")])
def test_what_would_go_wrong_later_is_said_before_anything_starts(word, says):
    done = make("-n", "memorize", word)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and says in done.stderr
    right = make("-n", "memorize", "SAMPLES=10000000", "FLAGS=--device cpu --steps 3")
    assert right.returncode == 0 and right.stdout.count("--device=cpu") == 3  # train.py has it as it is


def test_the_demo_of_sizes_that_all_memorize(tmp_path):
    """Every size is stopped above: none has a model.safetensors, and the largest's last snapshot is drawn."""
    for name in ("Makefile", "emm.py", "plot.py", "sample.py", "memorize.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    recipe = ("--data digits --width 4 --blocks 1 --channel-mult 1,1 --batch 8 --steps 4 --snapshots 2 "
              "--n-min 4 --n-max 8 --sample-count 64 --eps 0.5 --threshold 4095/4096 --device cpu")
    command = ["make", "-C", tmp_path, f"PYTHON={sys.executable}", "demo", f"DEMO={recipe}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "of 500 samples memorized" in done.stdout, done.stderr
    assert (tmp_path / "demo" / "pairs.png").exists() and not list(tmp_path.glob("demo/*/model.safetensors"))
    assert (tmp_path / "demo" / "n000008" / "samples-00000002.npz").exists()


@pytest.mark.parametrize("stage", ["train", "sample", "memorize", "emm", "plot"])
def test_heavy_libraries_are_imported_where_they_are_used(stage):
    heavy = "torchvision", "sklearn", "matplotlib", "triton"
    code = f"import {stage}, sys; print(*(m for m in {heavy} if m in sys.modules))"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == ""
