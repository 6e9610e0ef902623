import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import unet
from bench import plan
from conftest import ROOT
from diffusion import denoiser
from diffusion.solvers import Sampling
from kernels import layers

# forms that differ in what is counted: depth, resampling filters, labels, attention at several resolutions
NETWORKS = [dict(), dict(blocks=2, label_dim=10), dict(arch="ncsnpp", precond="edm"),
            dict(attn_resolutions=[16, 8], skip_connections=[1, 0, 1, 0], img_channels=1)]
COST = plan.Cost(parameters=10**8, evaluation_flops=10**10, step_flops=3 * 10**10, kept_bytes=10**8)


def network(arch="ddpmpp", precond="vp", img_channels=3, **given):
    given = dict(width=8, blocks=1, channel_mult=(1, 2)) | given
    return denoiser.Denoiser(arch, precond, 16, img_channels, **given)


def evaluate(D):
    labels = torch.zeros(1, dtype=torch.int64) if D.config["label_dim"] else None
    return D(torch.zeros(1, D.config["img_channels"], 16, 16), 1.0, labels)


@pytest.mark.parametrize("given", [given for given in NETWORKS if given.get("arch") != "ncsnpp"])
def test_flops_are_those_worked_out_by_hand(given, monkeypatch):
    D, flops = network(**given), {}

    def note(module, inputs, output):  # two a product
        if isinstance(module, unet.Block):
            _, channels, height, width = output.shape
            products = 2 * (height * width)**2 * channels + height * width * 3 * channels**2  # and q, k, v
            flops[module] = 2 * module.affine.weight.numel() + 2 * module.attention * products
        else:
            flops[module] = 2 * output.numel() * module.weight[0].numel()

    def convolve(module, *arguments):
        output = convolved(module, *arguments)
        note(module, arguments, output)
        if module.resample == "up" and module.weight[0, 0].numel() == 1:
            flops[module] //= 4  # convolved before it is enlarged
        return output

    convolved = unet.Conv2d.convolve
    handles = [module.register_forward_hook(note) for module in D.modules()
               if isinstance(module, (unet.Block, nn.Linear))]
    with monkeypatch.context() as patch:
        patch.setattr(unet.Conv2d, "convolve", convolve)
        evaluate(D)
    for handle in handles:
        handle.remove()
    needless = flops[D.model.enc["16x16_conv"]]  # a gradient for the image, and for what no weight decides
    needless += 0 if D.config["label_dim"] else flops[D.model.map_layer0]
    cost = plan.cost(D)
    assert cost.evaluation_flops == sum(flops.values())
    assert cost.step_flops == 3 * cost.evaluation_flops - needless


def test_storages_count_once_and_parameters_not_at_all():
    conv, x = nn.Conv2d(3, 4, 3, padding=1), torch.zeros(2, 3, 8, 8)
    with plan.kept(conv.parameters()) as storages:
        h = conv(x)                     # keeps x and the weight
        F.silu(h)                       # keeps h
        h.flatten(1)[:1].square()       # keeps a view of h
        h[:, :2] * 2                    # keeps nothing
    assert sorted(storage.nbytes() for storage in storages) == [4 * x.numel(), 4 * h.numel()]


@pytest.mark.parametrize("given", NETWORKS)
def test_bytes_are_those_of_a_real_step(given, monkeypatch):
    monkeypatch.setattr(layers, "fast", lambda x: False)  # as on a GPU
    monkeypatch.setattr(layers, "attention", F.scaled_dot_product_attention)
    D = network(**given).train()
    y = torch.zeros(3, D.config["img_channels"], 16, 16)
    labels = torch.zeros(3, dtype=torch.int64) if D.config["label_dim"] else None
    with sdpa_kernel(SDPBackend.MATH), plan.kept(D.parameters()) as storages:
        D.loss(y, torch.ones(3), torch.zeros_like(y), labels)
    # a CPU's products come in another layout than those of the meta device, and may be copied once
    assert sum(storage.nbytes() for storage in storages) == pytest.approx(plan.count(D, 3)[2], rel=0.01)


def test_counts_are_linear_in_the_batch():
    D = network()
    two, four, six = (plan.count(D, images) for images in (2, 4, 6))
    assert [b - a for a, b in zip(two, four)] == [b - a for a, b in zip(four, six)]
    assert four[:2] == (2 * two[0], 2 * two[1])
    assert four[2] == pytest.approx(2 * two[2], rel=1e-2)  # but for what no image owns, such as frequencies


def test_the_network_stays_as_it_is():
    D = network().eval().requires_grad_(False)
    before = {name: t.clone() for name, t in D.state_dict().items()}
    cost = plan.cost(D)
    assert cost == plan.cost(network())  # as for one that trains
    assert not D.training and not any(p.requires_grad or p.grad is not None for p in D.parameters())
    assert all(t.device.type == "cpu" and torch.equal(t, before[name]) for name, t in D.state_dict().items())
    assert cost.parameters == sum(p.numel() for p in D.parameters())
    assert cost.state_bytes == 20 * cost.parameters


def test_a_network_in_bf16_counts_as_in_fp32():
    D = network()
    cost = plan.cost(D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a CPU without bfloat16
        D.use("bf16")
    assert plan.cost(D) == cost and D.precision == "bf16"


def test_largest_batch_device():
    fixed = plan.CONTEXT_BYTES + COST.state_bytes
    for size in (1, 5, 7, 10, 70):
        gigabytes = (fixed + size * plan.FRAGMENTATION * COST.kept_bytes) / plan.GIGABYTE
        assert plan.largest_batch_device(COST, 70, gigabytes * 1.001) == size
        assert plan.largest_batch_device(COST, 70, gigabytes * 0.999) < size
    assert plan.largest_batch_device(COST, 70, fixed / plan.GIGABYTE) == 0
    assert plan.largest_batch_device(COST, 64, 1000) == 64


def test_hours():
    assert plan.hours(989e12 * plan.UTILISATION["bf16"] * 3600, "H100", "bf16") == pytest.approx(1)
    for gpu in plan.PEAK:
        for precision in plan.UTILISATION:
            assert plan.hours(6e18, gpu, precision) == pytest.approx(3 * plan.hours(2e18, gpu, precision))
    assert plan.sampling_flops(COST, 16) == 16 * 10_000 * 35 * COST.evaluation_flops
    guided = Sampling(sampler="euler", sample_steps=10, guidance=2.0)
    assert plan.sampling_flops(COST, 2, 500, guided) == 2 * 500 * 20 * COST.evaluation_flops


def test_report(monkeypatch):
    monkeypatch.setattr(plan, "cost", lambda D: COST)
    text = plan.report(None, n=2000, steps=1000, batch=512, batch_device=64, snapshots=4, samples=500)
    memory = COST.bytes(64) / plan.GIGABYTE
    training = plan.hours(1000 * 512 * COST.step_flops, "A100", "fp32")
    assert f"{memory:.1f} GB with 64 images at once" in text and "100,000,000 parameters" in text
    assert "4 snapshots, 500 samples" in text and "1.54e+16 FLOP" in text and "7e+14 FLOP" in text
    assert f"{training:.2g} + 0.021" in text and "share of its peak" in text
    assert f"--batch-device in 24 GB: {plan.largest_batch_device(COST, 512, 24)}" in text
    assert f"{COST.bytes(512) / plan.GIGABYTE:.1f} GB with 512" in plan.report(None, 2000, 1000, 512, 0, 4)
    monkeypatch.setattr(plan, "CARDS", (1,))
    assert "--batch-device in 1 GB: none" in plan.report(None, 2000, 1000, 512, 0, 4)


@pytest.mark.parametrize("width", [128, 320])
def test_networks_of_the_paper_cost_what_the_document_says(width):
    c = plan.cost(denoiser.Denoiser("ddpmpp", "vp", 32, 3, width=width))
    hours = " / ".join(plan.in_words(40e6 * c.step_flops, "H100", kind) for kind in plan.UTILISATION)
    cells = (width, 2, f"{c.parameters / 1e6:.1f}", f"{c.evaluation_flops / 1e9:.1f}",
             f"{c.step_flops / 1e9:.1f}", f"{c.kept_bytes / 2**20:.1f}",
             *(plan.largest_batch_device(c, 512, card) for card in plan.CARDS), hours)
    assert f"| {' | '.join(map(str, cells))} |" in (ROOT / "docs" / "cost.md").read_text()


def test_a_run_of_train_is_priced_by_its_options(capsys, monkeypatch):
    words = ["plan.py", "--data", "digits", "--n", "20", "--width", "8", "--steps", "3",
             "--sampler", "dpm-solver", "--sample-steps", "9"]
    monkeypatch.setattr(plan.sys, "argv", words)
    plan.main()
    text = capsys.readouterr().out
    assert "20 images, 3 steps of 512" in text and " 9 a sample" in text
    assert "GFLOP an image" in text and "H100" in text
    assert not list(plan.Path("runs").glob("train/*"))


@pytest.mark.parametrize("given", [dict(), dict(label_dim=10, img_channels=1, patch=4)])
def test_flops_of_a_transformer_by_hand(given):
    D = network(arch="dit", width=128, **given)
    tokens, width = (16 // D.config["patch"])**2, 128
    values = D.config["img_channels"] * D.config["patch"]**2
    block = tokens * 12 * width**2 + 2 * tokens**2 * width     # products of 1 block, 2 heads
    embedding = 256 * width + width**2 + 6 * width**2 + 2 * width**2
    assert D.model.flops() == 2 * (block + 2 * tokens * values * width)
    cost = plan.cost(D)
    assert cost.evaluation_flops == D.model.flops() + 2 * embedding
    assert cost.step_flops == pytest.approx(3 * cost.evaluation_flops, rel=0.02)


def test_a_quick_count_is_near_the_exact_one():
    D = network()
    assert D.model.flops() == pytest.approx(plan.cost(D).evaluation_flops, rel=0.3)
