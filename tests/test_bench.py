"""The measurements of bench/ that stand without a GPU: a rehearsal of bench/gpu.sh, and its record."""
import json
import os
import subprocess
import sys

import pytest
import torch

import data
from bench import gpu, step
from conftest import ROOT
from disk import read_json

RECORD = ROOT / "bench" / "results" / "gpu-nvidia-h100-80gb-hbm3.json"


def rehearse(folder, *sections, **more):
    """Exit status and lines of bench/gpu.sh on a CPU, in tiny sizes."""
    given = dict(PYTHON=sys.executable, DEVICE="cpu", OUT=str(folder), OMP_NUM_THREADS="1", **more)
    done = subprocess.run(["bash", "bench/gpu.sh", *sections], cwd=ROOT, env=os.environ | given, text=True,
                          capture_output=True)
    lines = [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]
    assert all(json.dumps(line) in done.stdout for line in lines)
    return done, lines


def test_a_rehearsal_of_all_sections(tmp_path):
    done, lines = rehearse(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line["what"] for line in lines} == {"check", "nearest", "optimum", "step", "sample", "search"}
    checks = {line["name"].partition("[")[0].partition("::")[2] for line in lines if line["what"] == "check"}
    assert checks >= {f"test_{name}" for name in (
        "nearest_two", "published_networks", "gradients", "a_step_as_a_graph_gives_the_same_weights",
        "an_evaluation_as_a_graph_gives_the_same_images", "a_killed_run_ends_with_the_same_weights")}
    assert all(line["ok"] for line in lines if line["what"] == "check")
    record, = tmp_path.glob("gpu-*.json")
    assert read_json(record)["lines"] == lines and gpu.table(lines) in done.stdout


def test_a_section_that_fails_is_a_line_and_stops_no_other(tmp_path):
    done, lines = rehearse(tmp_path, "photographs", "optimum", DATA="nowhere.zip")
    failed = dict(what="failed", name="photographs", status=1)
    assert [failed | line == line for line in lines] == [False, True] and lines[0]["what"] == "optimum"
    assert done.returncode == 1 and "nowhere.zip" in (tmp_path / "photographs.log").read_text()
    assert not list(tmp_path.glob("gpu-*.json"))  # of some sections there is no record


def test_a_method_that_ends_early_is_a_line():
    options = step.Options(precisions=("tf32", "fp32"), device="cpu", repeats=1, seconds=0.0, sampling=False)
    failed, found = step.on_gpu(options, [("digits", 8, 4, 16, 1)])
    assert failed["what"] == "failed" and failed["method"] == "tf32"
    assert found["images_a_second"] == pytest.approx(16e3 / found["ms"], rel=0.01)


def test_the_record_stands_in_the_docs():
    lines = read_json(RECORD)["lines"]
    assert gpu.table(lines) in (ROOT / "docs" / "gpu.md").read_text()
    assert gpu.hours(lines) in (ROOT / "README.md").read_text()


def test_what_a_gpu_is_said_to_take_is_of_the_record(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    D = step.denoiser.Denoiser("ddpmpp", "vp", 32, 3, width=128)
    monkeypatch.setattr(data, "_announced", [])
    data.announce("cuda", torch.device("cuda"), 3 * D.model.flops() * 40e6, "tf32", at_once=512)
    said = capsys.readouterr().err
    assert "HBM3), precision tf32, up to 512 images at once: about 4.9 hours" in said
    assert "fp32 26" in said and "bf16 2.4" in said
    steps = {line["name"]: line for line in read_json(RECORD)["lines"] if line["what"] == "step"}
    for precision, hours in dict(fp32=26, tf32=4.9, bf16=2.4).items():
        measured = steps[f"32x32, width 128, {precision}"]["images_a_second"]
        assert abs(hours / (40e6 / measured / 3600) - 1) < 0.1
