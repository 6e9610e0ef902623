"""What only a GPU can show, in sizes of real work.

`make check-gpu` runs it, and DEVICE=cpu rehearses it in tiny sizes. The kernels at every shape are in
test_nearest_triton.py and test_norm_triton.py.
"""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import disk
import sample
import train
from bench import step
from conftest import ROOT
from diffusion import denoiser, solvers
from kernels import References, nearest_two
from kernels.nearest import nearest_two_reference
from test_unet import GOLDEN, RELATIVE, close, golden, tolerance

DEVICE = os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "")
GPU = DEVICE.startswith("cuda")
pytestmark = pytest.mark.skipif(not DEVICE, reason="needs a GPU, or DEVICE=cpu to rehearse")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
precisions = pytest.mark.parametrize("precision", denoiser.PRECISIONS if GPU else ("fp32",))
# width, pixels a side, channels, batch
shapes = pytest.mark.parametrize("shape", [(8, 8, 1, 128), (64, 16, 3, 32), (128, 32, 3, 16), (256, 32, 3, 8)]
                                 if GPU else [(4, 8, 1, 16)], ids=str)
# Of outputs, against float32 ones: tf32 has 10 bits of mantissa, bf16 7, and errors add up over 30 layers
LIMITS = dict(fp32=RELATIVE, tf32=2e-2, bf16=1e-1)
# Of the gradient of each tensor, which sums products of such outputs: against float64
GRADIENT_LIMITS = dict(fp32=1e-4, tf32=3e-2, bf16=3e-1)
NEAREST = (2000, 5000, 3072) if GPU else (20, 50, 192)


def pixels(*shape, seed=0, high=256):
    return torch.randint(0, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def work(shape, precision, **given):
    """The published training step of ours on random images."""
    width, side, channels, batch = shape
    D = data.Images(pixels(40, channels, side, side), torch.zeros(40, dtype=torch.int64), 0, [])
    options = train.Options(width=width, batch=batch, precision=precision, device=DEVICE, warmup_steps=1,
                            **given)
    torch.manual_seed(0)  # of the weights
    return step.Ours(options, D, torch.device(DEVICE)).work


@pytest.fixture(autouse=True)
def room():
    """Give back the memory of a test: several processes share the card, and cuDNN chooses by what is free."""
    yield
    if GPU:
        torch.cuda.empty_cache()


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def nearest_images(kind):
    """Queries and references that are random, equally far, near-duplicates, or black, white and grey."""
    Q, N, D = NEAREST
    if kind == "random":
        return pixels(Q, D), pixels(N, D, seed=1)
    if kind == "tied":
        return pixels(Q, D, high=2), pixels(N // 10, D, seed=1, high=2).repeat(10, 1)
    if kind == "near-duplicates":  # of one bright image: float32 has no digits for their distances
        y = 200 + pixels(1, D, high=56).repeat(N, 1)
        y[torch.arange(N), torch.arange(N) % D] ^= 1 + torch.arange(N, dtype=torch.uint8) % 3
        return y[:Q].roll(1, 1), y
    flat = torch.tensor([0, 255, 128, 127], dtype=torch.uint8)[:, None].repeat(1, D)
    return torch.cat([flat, pixels(Q, D)]), torch.cat([flat[:3], flat.repeat(N // 4, 1)])


@pytest.mark.parametrize("kind", ["random", "tied", "near-duplicates", "extreme"])
def test_nearest_two(kind):
    x, y = (images.to(DEVICE) for images in nearest_images(kind))
    expected = nearest_two_reference(x, y)
    for references in (References(y), y):
        assert all(map(torch.equal, nearest_two(x, references), expected))


@precisions
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_published_networks(path, precision):
    _, arrays, D, labels = golden(path)
    a = {name: t.to(DEVICE) for name, t in arrays.items()}
    labels = None if labels is None else labels.to(DEVICE)
    D.to(DEVICE).use(precision)
    sigmas = solvers.Sampling().levels(D, DEVICE)
    outputs = dict(denoised=lambda: D(a["x"], a["sigma"], labels),
                   sampled=lambda: solvers.heun(D, a["latents"], sigmas, labels))
    with torch.no_grad():
        for name, output in outputs.items():
            assert close(output(), a[name], max(LIMITS[precision], tolerance(D, output))), name


@precisions
@shapes
def test_gradients(shape, precision):
    """Beside those of the plain forms in float64 on the CPU."""
    width, side, channels, _ = shape
    y, found = pixels(2, channels, side, side).double() / 127.5 - 1, []
    noise = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, DEVICE)):
        D = denoiser.Denoiser("ddpmpp", "vp", side, channels, width=width, blocks=1, dropout=0.0,
                          generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for p in D.parameters():  # some start at zero
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        D = D.double() if dtype == torch.float64 else D.to(device).use(precision)
        D.loss(*(t.to(device, dtype) for t in (y, torch.tensor([0.3, 2.0]), noise))).sum().backward()
        found.append([p.grad.double().cpu() for p in D.parameters()])
    assert all(close(b, a, GRADIENT_LIMITS[precision]) for a, b in zip(*found))


def same_as_a_graph(shape, precision, **given):
    plain, recorded = work(shape, precision, **given), work(shape, precision, **given)
    plain.replayed.wanted = False
    for k in range(6):
        assert torch.equal(plain.take(k), recorded.take(k))
    assert (recorded.replayed.graph is not None) == GPU
    assert all(map(torch.equal, [*plain.parameters, *plain.ema.values()],
                   [*recorded.parameters, *recorded.ema.values()]))


@precisions
@shapes
def test_a_step_as_a_graph_gives_the_same_weights(shape, precision, deterministic):
    same_as_a_graph(shape, precision)


WAYS = {
    "flow": dict(precond="flow"), "muon": dict(optimizer="muon"), "sgd": dict(optimizer="sgd"),
    "augmented": dict(flip=True, augment=0.12), "transformer": dict(arch="dit", precond="flow"),
    "weighed": dict(predict="image", loss="huber", loss_weight="min-snr", sigma_skip=(0.2, 2.0))}


@precisions
@pytest.mark.parametrize("given", WAYS.values(), ids=list(WAYS))
def test_steps_of_other_kinds_as_a_graph_give_the_same_weights(given, precision, deterministic):
    shape = (64, 16, 3, 32) if GPU else (4, 8, 1, 16)
    same_as_a_graph(shape, precision, **given)


@precisions
@shapes
def test_an_evaluation_as_a_graph_gives_the_same_images(shape, precision):
    """From the first call on, and those of the launches one by one but for what cuDNN chooses otherwise."""
    D = work(shape, precision).net.eval()
    denoise, count = sample.in_chunks(D), sample.chunk(D)
    with torch.inference_mode():
        found = []
        for k in (0, 1, 2, 0):
            generator = torch.Generator().manual_seed(k)
            x = torch.randn(count, shape[2], shape[1], shape[1], generator=generator).double().to(DEVICE)
            sigma = torch.tensor(0.5 + k, dtype=torch.float64, device=DEVICE)
            found.append(denoise(x, sigma))
            assert close(found[-1], D(x, sigma), RELATIVE)
        assert torch.equal(found[0], found[3])


@precisions
def test_guidance_replays_two_graphs(precision):
    D = denoiser.Denoiser("ddpmpp", "vp", 8, 1, label_dim=3, width=16, blocks=1)
    D = D.to(DEVICE).eval().use(precision)
    labels = torch.arange(sample.chunk(D), device=DEVICE) % 3
    plain, replayed = (solvers.guided(denoise, 2.0) for denoise in (D, sample.in_chunks(D)))
    with torch.inference_mode():
        for k in range(5):
            x = torch.randn(len(labels), 1, 8, 8, dtype=torch.float64, device=DEVICE)
            sigma = torch.tensor(0.5 + k, dtype=torch.float64, device=DEVICE)
            # W and W - 1 times what cuDNN chooses otherwise for one evaluation
            assert close(replayed(x, sigma, labels), plain(x, sigma, labels), 3 * RELATIVE)


@pytest.mark.parametrize("precision", ("fp32", "bf16") if GPU else ("fp32",))
def test_a_killed_run_ends_with_the_same_weights(precision, tmp_path):
    words = (f"--data digits --n 20 --width {16 if GPU else 4} --blocks 1 --batch 64 --steps 40 "
             "--warmup-steps 3 --snapshots 1 --save-seconds 0 --deterministic").split()
    command = [sys.executable, "train.py", *words, "--precision", precision, "--device", DEVICE, "--out"]
    subprocess.run([*command, tmp_path / "whole"], cwd=ROOT, check=True)
    killed = disk.Directory(tmp_path / "killed")
    with subprocess.Popen([*command, killed.path], cwd=ROOT) as process:
        while process.poll() is None and not killed.state.exists():
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not killed.model.exists()
    subprocess.run([*command, killed.path], cwd=ROOT, check=True)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@needs_gpu
def test_a_batch_that_does_not_fit_is_taken_in_parts():
    shape, found = (32, 32, 3, 256), []
    torch.cuda.empty_cache()
    there = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for parts in (False, True):
        one = work(shape, "fp32", dropout=0.0)
        one.take(0)
        assert (one.at_once < one.options.batch) == parts
        found.append([p.grad.clone() for p in one.parameters])
        peak = torch.cuda.max_memory_allocated()
        del one
        torch.cuda.empty_cache()
        all_of_it = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction((there + peak) / 2 / all_of_it)
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(close(b, a) for a, b in zip(*found))


@needs_gpu
def test_running_out_of_memory_names_the_remedy(tmp_path):
    """A batch whose first layer would take 500 GB, in one allocation: the card is not filled for it."""
    np.savez(tmp_path / "large.npz", images=np.zeros((2, 1024, 1024), np.uint8))
    words = ("--width 256 --channel-mult 1 --blocks 1 --precision fp32 --steps 1 --batch 512 "
             f"--batch-device 512 --device {DEVICE} --data").split()
    command = [sys.executable, "train.py", *words, tmp_path / "large.npz", "--out", tmp_path / "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "out of memory" in last and "--batch-device" in last
