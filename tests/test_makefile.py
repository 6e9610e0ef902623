"""What `make` would run: names of directories, files as targets, and imports that point down only."""
import ast
import subprocess
import sys

import pytest

from conftest import ROOT


def make(*words):
    return subprocess.run(["make", "--no-print-directory", "-C", str(ROOT), f"PYTHON={sys.executable}", *words],
                          capture_output=True, text=True)


def test_help_lists_targets_and_variables():
    text = make("help").stdout
    for word in ("setup", "train", "sample", "memorize", "emm", "plot", "demo", "test", "bench", "kernel-report", "clean", "WIDTH=128", "FLAGS="):
        assert word in text


def test_emm_of_another_width():
    text = make("-n", "emm", "WIDTH=256").stdout
    assert "emm.py --out runs/cifar10-w256-b2-B512-e40000-s0-emm" in text and "--width 256" in text
    assert "--seeds" not in text and "--devices" not in text
    assert "--seeds 0,1,2 --devices cuda:0,cuda:1" in make("-n", "emm", "SEEDS=0 1 2", "DEVICES=cuda:0 cuda:1").stdout
    assert "plot.py --emm runs/cifar10-w256-b2-B512-e40000-s0-emm/emm.json" in text


def test_every_variable_and_flag_enters_the_name():
    changed = dict(DATA="x/y.zip", RES=8, CLASSES=2, LABELS="random:10", ARCH="ncsnpp", WIDTH=64, BLOCKS=4, BATCH=64,
                   EPOCHS=9, SEED=3, N=50, FLAGS="--precond ve --channel-mult 1,2 --dropout=0")
    base, names = make("-n", "train").stdout, set()
    for key, value in changed.items():
        text = make("-n", "train", f"{key}={value}").stdout
        out = text.split("--out ")[1].split()[0]
        assert out not in names and out not in base and not set(out) & set(":=, ")
        names.add(out)
    assert make("-n", "train", "FLAGS=--precond ve --dropout=0").stdout.count("--precond ve --dropout=0") == 1


def test_data_of_one_name_in_two_folders_do_not_meet():
    outs = {make("-n", "train", f"DATA={data}").stdout.split("--out ")[1].split()[0] for data in ("a/x.zip", "b/x.zip", "../x.zip", "x.zip", "x", "/x/")}
    assert len(outs) == 6 and make("-n", "train", "DATA=x/").stdout.split("--data")[0] == make("-n", "train", "DATA=x").stdout.split("--data")[0]


def test_files_are_targets(tmp_path):
    common = [f"RUNS={tmp_path}", "DATA=digits", "WIDTH=4", "BLOCKS=1", "BATCH=16", "N=20", "SAMPLES=12",
              "FLAGS=--channel-mult 1,1 --steps 3 --snapshots 1 --device cpu"]
    first = make("memorize", *common)
    assert first.returncode == 0 and "of 12 samples memorized" in first.stdout, first.stderr
    out, = tmp_path.iterdir()
    made = {"model.safetensors", *(f"seeds-0-11{end}" for end in (".npz", ".png", ".json", "-pairs.png", "-pairs.csv"))}
    assert made <= {p.name for p in out.iterdir()}
    again = make("-n", "memorize", *common).stdout
    assert "train.py" not in again and "sample.py" not in again
    fewer = make("memorize", *common, "SAMPLES=5")
    assert "of 5 samples memorized" in fewer.stdout and "train.py" not in fewer.stdout
    emm = make("emm", *common, "N_MIN=10", "N_MAX=20", "EPS=0.5")
    assert emm.returncode == 0 and "EMM is " in emm.stdout, emm.stderr
    assert (tmp_path / (out.name.removesuffix("-n20") + "-emm") / "emm.png").exists()


ALLOWED = {  # which modules of this project each may import: down only
    "run": set(), "parallel": set(), "plan": {"run", "unet"}, "images": {"run"}, "data": {"run", "images"}, "tensors": {"run"},
    "layers": set(), "unet": {"layers", "tensors"}, "state": {"run", "tensors", "unet"}, "kernels": {"kernels"}, "plot": {"run"},
    "train": {"run", "data", "parallel", "plan", "state", "unet", "kernels"},
    "sample": {"run", "data", "images", "parallel", "unet", "kernels"}, "memorize": {"run", "data", "images", "parallel", "unet", "kernels", "search"}, "search": set(),
    "emm": {"run", "data", "parallel", "unet", "kernels", "state", "train", "sample", "memorize", "search"},
    "compare": {"run", "data", "unet", "kernels", "sample", "memorize"}, "protocol": set(),
    "experiments": {"run", "compare", "data", "images", "emm", "plan", "plot", "protocol", "search", "train", "unet"},
    "report": {"run", "emm", "protocol"},
    "bench": {"run", "data", "unet", "kernels", "train", "sample", "memorize", "search", "emm", "plot", "state", "bench"}}


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("bench/*.py")]), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported & set(ALLOWED) <= ALLOWED[name]
    if name == "run":
        assert imported <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("stage", ["train", "sample", "memorize", "emm", "plot"])
def test_heavy_libraries_are_imported_where_they_are_used(stage):
    code = f"import {stage}, sys; print(*(m for m in ('torchvision', 'sklearn', 'matplotlib', 'triton') if m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == ""
