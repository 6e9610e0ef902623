"""A section of bench/gpu.sh: each result is a line of JSON as soon as it is there.

    python bench/gpu.py --section nearest --device cuda
    python bench/gpu.py --table bench/results/gpu-nvidia-h100-80gb-hbm3.json      the table of docs/gpu.md

A line says what it is (check, step, sample, nearest, optimum, search or failed), its name, and its numbers.
"""
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import torch

import bench.nearest
import bench.optimum
import data
import disk
import run
from bench import machine, step
from kernels import Optimum, References
from run import option

SECTIONS = "checks", "nearest", "optimum", "training", "digits", "photographs", "record"
TESTS = ["tests/test_gpu.py", "tests/test_nearest_triton.py", "tests/test_norm_triton.py",
         "tests/test_resample_triton.py",
         "-k", "not machine_code and not interpreter"]
SCORERS = "cdist", "int-mm", "ours", "prepared"  # of bench/nearest.py; the first is the published one
REPEATS = 5
# Sizes on a GPU, and in a rehearsal on a CPU
SEARCHED = dict(cuda=(10_000, 50_000, 3072), cpu=(64, 256, 192))  # queries, references, pixels
OPTIMA = dict(cuda=(10_000, 50_000), cpu=(100,))                  # training images
NETWORKS = dict(cuda=step.CASES["cuda"], cpu=[("digits", 8, 4, 16, 1)])
# Searches of a minute on a GPU: of digits, and of photographs with a floor of steps
RECIPE = "--blocks 1 --warmup-steps 50 --dropout 0 --ema-halflife 50 --snapshots 4 --n-min 20 --tolerance 0.3"
DIGITS = ("--data digits --width 8 --batch 128 --learning-rate 4e-3 --epochs 6000 --ema-rampup-epochs 6000 "
          "--n-max 200 --sample-count 500 --precision fp32")
PHOTOGRAPHS = ("--resolution 8 --width 32 --batch 512 --learning-rate 2e-3 --epochs 4000 --steps-min 2000 "
               "--ema-rampup-epochs 4000 --n-max 640 --sample-count 1000")
SHORT = dict(cuda="", cpu="--epochs 2 --steps-min 4 --n-min 10 --n-max 10 --sample-count 64 --width 4 "
             "--batch 16")
NEAR_A_CPUS = 20, 50  # EMM of those digits, of which a CPU finds 31


@dataclass(frozen=True)
class Options:
    section: str = option("", "what to do", SECTIONS)
    out: str = option("runs/gpu", "directory of what is written")
    device: str = option("cuda", "cuda or cuda:N; cpu rehearses in tiny sizes")
    data: str = option("", "photographs to search, as in train.py")
    peer: str = option("", "checkout of github.com/sail-sg/DiffMemorize to time beside ours")
    table: str = option("", "print the table of this record instead")


def checks(o, kind):
    """The tests that need a GPU, side by side."""
    command = [sys.executable, "-m", "pytest", "-v", "-n", "6" if kind == "cuda" else "2",
               "-p", "no:cacheprovider", *TESTS]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", file=sys.stderr)  # the log
            if found := re.search(r"(PASSED|FAILED|ERROR) tests/(.*\S)", line):
                yield dict(what="check", name=found[2], ok=found[1] == "PASSED")
    if process.returncode:
        raise ValueError(f"pytest ended with status {process.returncode}")


def random_images(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def nearest(o, kind):
    """nearest_two, with references prepared or not, beside the paper's scorer and plain int8 products."""
    Q, N, D = SEARCHED[kind]
    x, y = random_images(Q + N, D).to(o.device).split([Q, N])
    timed = bench.nearest.timed_on_cuda if kind == "cuda" else bench.nearest.timed_on_cpu
    prepared, published = References(y), None
    for name in SCORERS:
        def call(method=bench.nearest.METHODS[name][0], references=prepared if name == "prepared" else y):
            return method(x, references)
        call()
        ms = 1e3 * median(timed(call)[0] for _ in range(REPEATS))
        published = published or ms
        yield dict(what="nearest", name=f"{Q:,} x {N:,} x {D:,}, {name}", ms=round(ms, 3),
                   times_published=round(published / ms, 2))


def optimum(o, kind):
    """The closed-form optimum of 256 noisy images at one noise level, beside the published way."""
    for N in OPTIMA[kind]:
        images = random_images(N, 3, 32, 32).to(o.device)
        x, y = images[:256].double() / 127.5 - 1, images.flatten(1).float() / 127.5 - 1
        x += torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        ours = Optimum(images)
        ways = (lambda x, ours=ours: ours(x, 1.0),
                lambda x, y=y: bench.optimum.published(x.flatten(1).float(), y, 1.0))
        ms = []
        for way in ways:
            way(x)
            ms.append(1e3 * median(bench.optimum.clock(way, x, x.device)[0] for _ in range(REPEATS)))
        yield dict(what="optimum", name=f"{len(x)} x {N:,}", ms=round(ms[0], 3),
                   times_published=round(ms[1] / ms[0], 2))


def training(o, kind):
    """Training steps and sampling by bench/step.py, on random images."""
    path = Path(o.out) / "random.npz"
    np.savez(path, images=random_images(step.IMAGES, 32, 32, 3).numpy())
    options = step.Options(device=o.device, peer=o.peer, data=str(path), repeats=3, seconds=1.0)
    if kind == "cpu":
        options = replace(options, seconds=0.1, precisions=("fp32",))
    yield from step.on_gpu(options, NETWORKS[kind])


def search(o, kind):
    """A whole search of emm.py."""
    if o.section == "photographs" and not o.data:
        return
    words = DIGITS.split() if o.section == "digits" else ["--data", o.data, *PHOTOGRAPHS.split()]
    out, start = Path(o.out) / o.section, time.perf_counter()
    command = [sys.executable, "emm.py", *RECIPE.split(), *words, *SHORT[kind].split(), "--device", o.device]
    subprocess.run([*command, "--out", out.absolute()], cwd=ROOT, stdout=sys.stderr, check=True)
    found = disk.read_json(out / "emm.json")
    keys = "emm", "bracket", "statement", "images_trained", "samples_drawn"
    yield dict(what="search", name=o.section, seconds=round(time.perf_counter() - start, 1),
               **{key: found[key] for key in keys})
    if o.section == "digits" and kind == "cuda":
        low, high = NEAR_A_CPUS
        yield dict(what="check", name="EMM of digits is near a CPU's", ok=low <= (found["emm"] or 0) <= high)


def record(o, kind):
    """Write what all sections have found, and tell it."""
    lines = [json.loads(line) for line in (Path(o.out) / "gpu.jsonl").read_text().splitlines()]
    card = torch.cuda.get_device_name(o.device) if kind == "cuda" else disk.processor()
    whole = dict(name=card, date=time.strftime("%Y-%m-%d"), **disk.provenance(o.device), lines=lines)
    if {"check", "nearest", "optimum", "step", "search"} <= {line["what"] for line in lines}:
        for folder in [Path(o.out), *[machine.RESULTS] * (kind == "cuda")]:
            machine.save("gpu", whole, card, folder)
    checks = [line for line in lines if line["what"] == "check"]
    yield table(lines)
    yield f"{sum(line['ok'] for line in checks)} of {len(checks)} checks hold"
    yield from (f"WRONG: {json.dumps(line)}" for line in lines
                if line["what"] == "failed" or not line.get("ok", True))


def table(lines):
    """The lines with numbers, as a Markdown table."""
    rows = ["| what | | ms | images a second | peak GB | published / ours |", "|---|---|---|---|---|---|"]
    for line in lines:
        if line["what"] in ("step", "sample", "nearest", "optimum"):
            numbers = (f"{line[key]:,}" if key in line else ""
                       for key in ("ms", "images_a_second", "peak_gb", "times_published"))
            rows.append(f"| {line['what']} | {line['name']} | {' | '.join(numbers)} |")
        if line["what"] == "search":
            found = line["statement"].partition(" (")[0]
            rows.append(f"| search | {line['name']}, {line['seconds']:.0f} s: {found} |  |  |  |  |")
    return "\n".join(rows)


def hours(lines):
    """README's table of a record: a training of 40 million images of 32x32, the paper's of |D| = 1,000.

    Of each width and precision it has the largest batch.
    """
    steps = [line for line in lines if line["what"] == "step" and line["resolution"] == 32]
    steps = {(line["width"], line["method"]): line for line in sorted(steps, key=lambda line: line["batch"])}
    rows = ["| width, precision | batch | a step | hours | memory |", "|---|---|---|---|---|"]
    for line in sorted(steps.values(), key=lambda line: (line["width"], line["images_a_second"])):
        memory = f"{line['peak_gb']:.0f} GB" if "peak_gb" in line else "not measured"
        rows.append(f"| {line['width']}, {line['method']} | {line['batch']} | {line['ms']:,.0f} ms | "
                    f"{40e6 / line['images_a_second'] / 3600:.2g} | {memory} |")
    return "\n".join(rows)


def work(options):
    if options.table:
        print(table(disk.read_json(options.table)["lines"]))
        return
    kind, functions = data.pick_device(options.device).type, dict(
        checks=checks, nearest=nearest, optimum=optimum, training=training, digits=search,
        photographs=search, record=record)
    for line in functions[options.section](options, kind):
        print(line if isinstance(line, str) else json.dumps(line), flush=True)


def main():
    run.stage(work, Options, __doc__)


if __name__ == "__main__":
    main()
