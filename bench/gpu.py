"""Is everything right on this GPU, and how fast: in 8 minutes, a JSON object a line as it goes, then a table.

    python bench/gpu.py                      make bench-gpu: right first, then timed, then searches end to end
    python bench/gpu.py --check              make check-gpu: right only, 4 minutes
    python bench/gpu.py --data images.zip    photographs too; --peer DIR times the published code beside ours
    python bench/gpu.py --device cpu         a rehearsal in small: what needs a GPU is skipped, and says so

Each section is a process of its own with a limit. One that fails or runs out of time is a line, and the
others go on.
Lines go to OUT/gpu.jsonl, and without --check to bench/results/gpu-CARD.json.
"""
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import numpy as np
import torch

import data
import sample
import steps
import train
import unet
from bench import machine, step as bench_step
from kernels import Optimum, References, memorized
from kernels.layers import plain_norm, triton_norm
from kernels.nearest import is_memorized, nearest_two_reference
from run import option, provenance, read_json, stage, write_json

CUDA = torch.cuda.is_available()
# Sections in order, and seconds each may take: what must be right, what is timed alone, whole searches
RIGHT = dict(nearest_right=40, norm_right=40, golden=40, graphs=60, resume=60, out_of_memory=40)
TIMED = dict(nearest=40, optimum=30, training=150, sampling=60)
WHOLE = dict(search_digits=60, search_photographs=120)
# Relative errors of a deep network's output: float32 sums; products of 10 and of 8 bits of mantissa (an H200
# had 3e-6, 4e-3 and 4e-2). Fourier features with VP move by 1e-3 with the last bit of the noise level.
GOLDEN, FOURIER = dict(fp32=1e-4, tf32=1e-2, bf16=1e-1), 5e-3
NORM_ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # of the largest; half a unit of what is stored
DEMO = ("--data digits --width 8 --blocks 1 --batch 128 --learning-rate 4e-3 --warmup-steps 50 --dropout 0 "
        "--ema-halflife 50 --ema-rampup-epochs 6000 --snapshots 4 ")


@dataclass(frozen=True)
class Options:
    out: str = option("runs/gpu", "directory of lines and runs")
    check: bool = option(False, "only whether all is right")
    device: str = option("cuda", "cuda or cuda:N; cpu rehearses")
    data: str = option("", "photographs to search too, as in train.py")
    peer: str = option("", "checkout of github.com/sail-sg/DiffMemorize to time beside ours")
    seconds: int = option(470, "for all sections together")
    section: str = option("", "run this section alone")
    table: str = option("", "print the table of a record instead, such as bench/results/gpu-nvidia-h200.json")


def check(name, ok, **values):
    return dict(what="check", name=name, ok=bool(ok), **values)


def milliseconds(function, device, repeats=7):
    """Median time of a call, after two that warm up."""
    def once():
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)
    return round(median([once() for _ in range(repeats + 2)][2:]), 3)


# ---- right

def nearest_right(o, device):
    generator = np.random.RandomState(0)
    N, D = (20_000, 3072) if device.type == "cuda" else (300, 192)
    random = generator.randint(0, 256, (N, D)).astype(np.uint8)
    near = np.repeat(random[:50], 6, 0)
    near[np.arange(len(near)), generator.randint(0, D, len(near))] ^= 1  # twins: one unit apart in one value
    extremes = 255 * (random[:200] > 127).astype(np.uint8)
    sets = dict(random=random, twins=near, ties=np.repeat(random[:40], 3, 0), extremes=extremes,
                wide=np.tile(random[:40], (1, 12)))
    for name, y in sets.items():
        y = torch.from_numpy(y).to(device)
        x = y[generator.permutation(len(y))[:200]].clone()
        x[::2, 0] ^= 3
        verdict, distances, index = memorized(x, References(y))
        expected = nearest_two_reference(x, y)
        same = torch.equal(distances, expected[0]) and torch.equal(index, expected[1])
        yield check(f"nearest two: {name}", same and torch.equal(verdict, is_memorized(expected[0])),
                    queries=len(x), references=len(y))


def norm_right(o, device):
    norm = triton_norm(device)
    if norm is None:
        yield dict(what="skipped", name="norm", why="Triton's norm does not run here")
        return
    for dtype, limit in NORM_ERROR.items():
        for B, C, size in ((8, 128, 32), (64, 256, 16), (512, 32, 8), (3, 512, 4)):
            x = torch.randn(B, C, size, size, device=device).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            weight, bias, shift = (torch.randn(*n, device=device) for n in ((C,), (C,), (B, C)))
            g, found = torch.randn_like(x), []
            for kind, function in ((None, norm), (torch.float64, None)):
                inputs = [t.detach().to(kind or t.dtype).requires_grad_() for t in (x, weight, bias, shift)]
                y = function(*inputs[:3], min(32, C // 4), 1e-6, inputs[3], True, 0.0) if function \
                    else plain_norm(*inputs, None, min(32, C // 4), 1e-6, True)
                found.append([y, *torch.autograd.grad(y, inputs, g.to(y.dtype))])
            error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found))
            yield check(f"norm {dtype} {B} x {C} x {size}", error < 4 * limit, error=error)


def golden(o, device):
    from test_unet import GOLDEN as files, golden as load
    for path in files:
        for precision in ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32",):
            config, arrays, D, labels = load(path)
            D = D.to(device).use(precision)
            with torch.no_grad():
                x, sigma = arrays["x"].to(device), arrays["sigma"].to(device)
                denoised = D(x, sigma, None if labels is None else labels.to(device)).cpu()
            error = float((denoised - arrays["denoised"]).abs().max() / arrays["denoised"].abs().max())
            limit = max(GOLDEN[precision], FOURIER if path.stem == "ddpmpp-vp-fourier" else 0)
            yield check(f"{path.stem}, {precision}", error < limit, error=error)


def work(o, device, recorded, **given):
    """`steps.Work` of a small run, recorded as a graph or not."""
    options = train.Options(data="digits", n=100, blocks=1, learning_rate=2e-3, warmup_steps=2,
                            device=o.device, **given)
    D = data.load(options)
    net = unet.build(options, D, torch.Generator().manual_seed(0)).train().to(device).use(options.precision)
    ema = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    optimizer = steps.Optimizer(options, list(net.parameters()))
    made = steps.Work(options, net, ema, optimizer, D.images.to(device), None)
    made.replayed.wanted = made.replayed.wanted and recorded
    return made


def graphs(o, device):
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    for width, batch in ((8, 128), (64, 512)) if device.type == "cuda" else ((8, 16),):
        for precision in ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32",):
            plain, graph = (work(o, device, recorded, width=width, batch=batch, precision=precision)
                            for recorded in (False, True))
            same = all(torch.equal(plain.take(step), graph.take(step)) for step in range(8))
            same &= all(map(torch.equal, [*plain.parameters, *plain.ema], [*graph.parameters, *graph.ema]))
            recorded = graph.replayed.graph is not None
            yield check(f"a step as a graph: width {width}, {precision}", same, recorded=recorded)
            D, size = graph.net.eval(), sample.chunk(graph.net)
            images, _ = sample.generate(D, range(size), steps=6, device=device)
            alone, _ = sample.generate(D, [3], steps=6, device=device)
            yield check(f"a sample depends on its seed alone: width {width}, {precision}",
                        np.array_equal(images[3], alone[0]), chunk=size)


def resume(o, device):
    words = ("--data digits --n 100 --width 16 --blocks 1 --batch 64 --snapshots 2 --warmup-steps 5 "
             f"--save-seconds 0 --log-steps 10 --device {o.device} --deterministic --steps ").split()
    words.append("300" if device.type == "cuda" else "40")
    folder = Path(o.out) / f"resume-{os.getpid()}"
    command = [sys.executable, str(ROOT / "train.py"), *words, "--out"]
    subprocess.run([*command, folder / "whole"], check=True, capture_output=True)
    for name, end in (("SIGKILL", signal.SIGKILL), ("SIGTERM", signal.SIGTERM)):
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen([*command, folder / name], **silent)
        while process.poll() is None and not (folder / name / "state.safetensors").exists():
            time.sleep(0.02)
        process.send_signal(end)
        process.wait()
        subprocess.run([*command, folder / name], check=True, capture_output=True)
        whole, again = ((folder / run / "model.safetensors").read_bytes() for run in ("whole", name))
        yield check(f"the same weights after {name}", whole == again)


def out_of_memory(o, device):
    if device.type == "cpu":
        yield dict(what="skipped", name="out of memory", why="needs a GPU")
        return
    gib = math.ceil(torch.cuda.get_device_properties(device).total_memory / 2**30)
    batch = str(32 * gib)
    words = ("--data digits --n 100 --resolution 128 --width 256 --blocks 4 --steps 1 "
             f"--device {o.device} --batch {batch} --out").split()
    for more, name in ((["--batch-device", batch], "named"), ([], "made smaller by itself")):
        out = Path(o.out) / f"memory-{os.getpid()}-{len(more)}"
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words, out, *more],
                              capture_output=True, text=True)
        said = done.stderr.strip().splitlines()[-1:]
        ok = done.returncode == 1 and "--batch-device" in said[0] if more else done.returncode == 0
        yield check(f"out of memory is {name}", ok, said=said)


# ---- timed, alone

def nearest(o, device):
    Q, N, D = (10_000, 50_000, 3072) if device.type == "cuda" else (100, 1000, 192)
    x, y = (torch.randint(0, 256, (n, D), dtype=torch.uint8, device=device) for n in (Q, N))
    references = References(y)

    def cdist():
        for part in x.float().split(1000):
            torch.cdist(part, y_float).topk(2, largest=False)
    y_float = y.float()
    for name, call, repeats in (("nearest_two, references prepared", lambda: memorized(x, references), 7),
                                ("nearest_two and preparation", lambda: memorized(x, References(y)), 7),
                                ("cdist + topk, float32", cdist, 3)):
        yield dict(what="nearest", name=name, ms=milliseconds(call, device, repeats), queries=Q, references=N)


def optimum(o, device):
    N, B, side = (50_000, 1024, 32) if device.type == "cuda" else (500, 16, 8)
    images = torch.randint(0, 256, (N, 3, side, side), dtype=torch.uint8, device=device)
    D, y = Optimum(images), images.flatten(1).float() / 127.5 - 1
    for sigma in (0.1, 2.0, 20.0):
        x = (images[:B].float() / 127.5 - 1) + sigma * torch.randn(B, 3, side, side, device=device)

        def published(x=x, sigma=sigma):
            return (-torch.cdist(x.flatten(1), y).square() / (2 * sigma**2)).softmax(1) @ y
        ours = milliseconds(lambda x=x, sigma=sigma: D(x, sigma), device, repeats=3)
        theirs = milliseconds(published, device, repeats=3)
        yield dict(what="optimum", name=f"sigma {sigma:g}", ms=ours, float32_ms=theirs, rows=B, images=N)


def photographs(o):
    """Data of 32x32 for timing: --data, or noise, which takes as long."""
    if o.data:
        return o.data
    path = Path(o.out) / "noise.npz"
    np.savez(path, arr_0=np.random.RandomState(0).randint(0, 256, (1000, 32, 32, 3)).astype(np.uint8))
    return str(path)


def timed(o, device, kind):
    on_gpu = device.type == "cuda"
    cases = bench_step.CASES["cuda"] if on_gpu else [("digits", 8, 8, 16)]
    for source, resolution, width, batch in cases:
        for name in ["published"] * bool(o.peer) + (["fp32", "tf32", "bf16"] if on_gpu else ["fp32"]):
            options = train.Options(
                data=source or photographs(o), resolution=resolution, width=width, batch=batch, n=1000,
                precision="fp32" if name == "published" else name, device=o.device)
            label = dict(what=kind, name=f"{resolution}x{resolution}, width {width}, {name}", batch=batch)
            try:
                with bench_step.processes({name: (o.peer, options, 0 if on_gpu else 1)}) as methods:
                    peaks = {}
                    seconds = bench_step.turns(methods, kind, 5, 3.0 if on_gpu else 0.1, peaks)[name]
            except (EOFError, ConnectionError):
                yield dict(label, error="it ended early: out of memory?")
                continue
            if kind == "step":
                yield dict(label, ms=round(1e3 * median(seconds), 2),
                           images_a_second=round(batch / median(seconds), 1), peak_gb=round(peaks[name], 1))
            else:
                rate = bench_step.EVALUATIONS / bench_step.EVALUATIONS_OF_18_STEPS / median(seconds)
                yield dict(label, images_a_second=round(rate, 1), peak_gb=round(peaks[name], 1))


def training(o, device):
    yield from timed(o, device, "step")


def sampling(o, device):
    yield from timed(o, device, "sample")


# ---- whole searches

def search(o, name, words):
    out = Path(o.out) / f"{name}-{os.getpid()}"
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "emm.py"), *words.split(), "--device", o.device, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        yield dict(what="failed", name=name, error=done.stderr.strip().splitlines()[-1:])
        return
    found = json.loads((out / "emm.json").read_text())
    yield dict(what="search", name=name, seconds=round(time.perf_counter() - start, 1),
               statement=found["statement"],
               sizes=[dict(n=p["n"], ratio=round(p["ratio"], 4)) for p in found["probes"]])


def search_digits(o, device):
    if device.type == "cuda":
        yield from search(o, "digits", DEMO + "--epochs 6000 --n-min 20 --n-max 200 --samples 500")
    else:
        yield from search(o, "digits", DEMO + "--steps 4 --n-min 10 --n-max 20 --samples 64 "
                                              "--channel-mult 1,1")


def search_photographs(o, device):
    if not o.data:
        yield dict(what="skipped", name="photographs", why="no --data")
        return
    words = ("--resolution 8 --width 64 --blocks 1 --learning-rate 2e-3 --steps-min 3000 --epochs 4000 "
             "--warmup-steps 100 --snapshots 2 --n-min 100 --n-max 800 --samples 1000 --tolerance 0.5")
    yield from search(o, "photographs", f"--data {os.path.abspath(o.data)} {words}")


# ---- all of them

def sections(options):
    return RIGHT if options.check else RIGHT | TIMED | WHOLE


def run_section(name, options, limit):
    """The lines of a section, run in a process of its own; one says so if it failed or ran out of time."""
    words = [f"--{f}={getattr(options, f)}" for f in ("out", "device", "data", "peer")]
    process = subprocess.Popen([sys.executable, __file__, *words, f"--section={name}"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    start = time.perf_counter()
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it started
        out, err = process.communicate()
        err = f"over its limit of {limit} s"
    for line in out.splitlines():
        if line.startswith("{"):
            yield dict(json.loads(line), section=name)
    if process.returncode:
        said = err.strip().splitlines() or ["no word"]
        yield dict(what="failed", name=name, section=name, error=said[-1])
    yield dict(what="section", name=name, section=name, seconds=round(time.perf_counter() - start, 1))


def bench(options):
    """All sections, or the one that is named; returns what is printed last."""
    if options.table:
        return table(read_json(options.table)["lines"])
    device, start = data.pick_device(options.device), time.perf_counter()
    Path(options.out).mkdir(parents=True, exist_ok=True)
    if options.section:
        for line in globals()[options.section](options, device):
            print(json.dumps(line), flush=True)
        return None
    lines = [dict(what="machine", name=machine.name(), **provenance(options.device))]
    with open(Path(options.out) / "gpu.jsonl", "w") as file:
        for name, limit in sections(options).items():
            left = options.seconds - (time.perf_counter() - start)
            skipped = [dict(what="skipped", name=name, why=f"the {options.seconds} s were over")]
            for line in run_section(name, options, min(limit, left)) if left > 5 else skipped:
                lines.append(line)
                print(json.dumps(line), flush=True)
                file.write(json.dumps(line) + "\n")
                file.flush()
    wrong = [line["name"] for line in lines if line["what"] == "failed" or line.get("ok") is False]
    if device.type == "cuda" and not options.check:
        card = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
        write_json(machine.RESULTS / f"gpu-{card}.json", dict(lines=lines, **lines[0]))
    print(table(lines))
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(lines)} lines are wrong: {', '.join(wrong)}")
    return f"all right; lines in {options.out}/gpu.jsonl"


def table(lines):
    """The lines that hold numbers, as a Markdown table."""
    rows = ["| what | | ms | images a second | peak GB |", "|---|---|---|---|---|"]
    for line in lines:
        if line["what"] in ("step", "sample", "nearest", "optimum", "search"):
            numbers = (f"{line[key]:,}" if key in line else ""
                       for key in ("ms", "images_a_second", "peak_gb"))
            rows.append(f"| {line['what']} | {line['name']} | {' | '.join(numbers)} |")
    return "\n".join(rows)


def main():
    stage(bench, Options, __doc__, say=str)


if __name__ == "__main__":
    main()
