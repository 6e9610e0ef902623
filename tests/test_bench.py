"""The measurements of bench/ that stand without a GPU: the rehearsal of bench/gpu.py, and its record."""
import json
import subprocess
import sys

from bench import gpu
from conftest import ROOT
from run import read_json


def test_the_rehearsal_on_a_cpu(tmp_path):
    """Sections that take seconds on a CPU; what needs a GPU says that it was left out."""
    lines = []
    for name in ("nearest_right", "norm_right", "golden", "out_of_memory", "nearest", "optimum"):
        command = [sys.executable, "bench/gpu.py", "--device", "cpu", "--out", tmp_path, "--section", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines += map(json.loads, done.stdout.splitlines())
    assert sum(line["what"] == "check" for line in lines) == 10
    assert all(line.get("ok", True) for line in lines)
    assert [line["name"] for line in lines if line["what"] == "skipped"] == ["norm", "out of memory"]
    assert all(line["ms"] > 0 for line in lines if line["what"] in ("nearest", "optimum"))


def test_a_section_that_fails_or_hangs_is_a_line(tmp_path, monkeypatch):
    o = gpu.Options(out=str(tmp_path / "none" / "there"), device="cpu")
    *_, failed, end = gpu.run_section("golden", o, limit=0.2)
    assert failed["what"] == "failed" and "over its limit of 0.2 s" in failed["error"]
    assert end["what"] == "section"
    *_, failed, end = gpu.run_section("no such section", o, limit=60)
    assert failed["what"] == "failed" and "no such section" in failed["error"]


def test_the_record_stands_in_the_docs():
    lines = read_json(ROOT / "bench" / "results" / "gpu-nvidia-h200.json")["lines"]
    assert gpu.table(lines) in (ROOT / "docs" / "gpu.md").read_text()
