import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import checkpoint
import disk
import sample
import train
from diffusion import denoiser
from diffusion.denoiser import Denoiser
from diffusion.dit import DiT
from diffusion.solvers import Sampling

SUMMED_OTHERWISE = 1e-4  # float32 sums in another order, of the largest value
BFLOAT16_NEAR = 0.05     # 8 bits of mantissa, through a dozen layers


def transformer(**given):
    return Denoiser("dit", "vp", **dict(img_resolution=8, img_channels=1, width=16, blocks=2) | given)


def awake(D, seed=0):
    """D with weights of a trained network's size everywhere, also where they start at 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in D.parameters():
            p.normal_(generator=generator).div_(p[0].numel() ** 0.5 if p.ndim > 1 else 5)
    return D.eval()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wave(position, channels):
    """Sines and cosines of a number, one by one."""
    half = channels // 2
    phases = [position / 10_000 ** (i / half) for i in range(half)]
    return torch.tensor([math.sin(p) for p in phases] + [math.cos(p) for p in phases])


def reference(D, x, c_noise, label):
    """F of one image x [C, H, W], with torch's multi-head attention and a loop over patches."""
    c, w = D.config, D.model.state_dict()
    p, width = c["patch"], c["width"]
    side, heads = c["img_resolution"] // p, max(1, width // 64)

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, shift, scale):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    e = linear("map_layer1", F.silu(linear("map_layer0", wave(c_noise, 256))))
    e = F.silu(e if label is None else e + w["map_label.weight"][label])
    places = [(i, j) for i in range(side) for j in range(side)]
    tokens = [x[:, i * p:(i + 1) * p, j * p:(j + 1) * p].flatten() for i, j in places]
    at = [torch.cat([wave(i, width // 2), wave(j, width // 2)]) for i, j in places]
    h = linear("first", torch.stack(tokens)) + torch.stack(at)
    for k in range(c["blocks"]):
        name = f"blocks.{k}"
        shift0, scale0, gate0, shift1, scale1, gate1 = linear(f"{name}.affine", e).chunk(6)
        attention = nn.MultiheadAttention(width, heads, batch_first=True)
        attention.load_state_dict({"in_proj_weight": w[f"{name}.qkv.weight"],
                                   "in_proj_bias": w[f"{name}.qkv.bias"],
                                   "out_proj.weight": w[f"{name}.proj.weight"],
                                   "out_proj.bias": w[f"{name}.proj.bias"]})
        n = norm(h, shift0, scale0)[None]
        h = h + gate0 * attention(n, n, n, need_weights=False)[0][0]
        wide = F.gelu(linear(f"{name}.mlp0", norm(h, shift1, scale1)), approximate="tanh")
        h = h + gate1 * linear(f"{name}.mlp1", wide)
    h, out = linear("last", norm(h, *linear("affine", e).chunk(2))), torch.empty_like(x)
    for token, (i, j) in zip(h, places):
        out[:, i * p:(i + 1) * p, j * p:(j + 1) * p] = token.view(-1, p, p)
    return out


@pytest.mark.parametrize("given", [
    dict(), dict(patch=4, img_resolution=12, img_channels=3), dict(width=128, label_dim=7, blocks=1),
    dict(patch=1, img_resolution=5, width=192, blocks=1), dict(width=96, img_channels=3, label_dim=1)])
def test_any_transformer_agrees_with_the_plain_reference(given):
    D = awake(transformer(**given))
    side, c_noise = D.config["img_resolution"], [0.3, 40, 999]
    x = draw(3, D.config["img_channels"], side, side)
    labels = torch.tensor([0, -1, D.config["label_dim"] - 1]) if D.config["label_dim"] else None
    with torch.no_grad():
        found = D.model(x, torch.tensor(c_noise), labels)
        for i in range(3):
            label = None if labels is None or labels[i] < 0 else int(labels[i])
            expected = reference(D, x[i], c_noise[i], label)
            assert (found[i] - expected).abs().max() < SUMMED_OTHERWISE * expected.abs().max()
        assert torch.equal(D.model(x, torch.tensor(c_noise)),
                           D.model(x, torch.tensor(c_noise), None if labels is None else labels * 0 - 1))


@pytest.mark.parametrize("precond", ["vp", "edm", "flow"])
def test_the_output_is_zero_at_the_start(precond):
    D = Denoiser("dit", precond, 8, 3, 10, 32, 2)
    x, labels = draw(4, 3, 8, 8), torch.tensor([0, 1, 5, 9])
    for training in (True, False):
        D.train(training)
        assert not D.model(x, torch.arange(4.0), labels).any()
        assert D(x, 1.0, labels).shape == x.shape
    # the last layer learns first, and through it the rest
    D.loss(x, torch.ones(4), draw(4, 3, 8, 8, seed=1), labels).sum().backward()
    moved = {name for name, p in D.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"last.weight", "last.bias"}


def test_initial_weights_are_drawn_from_the_generator():
    one, again, other = (
        transformer(label_dim=3, generator=torch.Generator().manual_seed(seed)).model.state_dict()
        for seed in (1, 1, 2))
    assert all(torch.equal(t, again[name]) for name, t in one.items())
    zero = {name for name in one if not one[name].any()}
    gates = {name for name in one if "affine" in name}
    assert zero == gates | {name for name in one if name.endswith("bias")} | {"last.weight"}
    assert not any(torch.equal(t, other[name]) for name, t in one.items() if name not in zero)
    assert one["map_layer0.weight"].std() == pytest.approx(0.02, rel=0.1)
    bound = math.sqrt(6 / (16 + 48))
    assert 0.9 * bound < one["blocks.0.qkv.weight"].abs().max() <= bound


def test_dropout_only_while_training():
    D, x = awake(transformer(dropout=0.5)), draw(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(D(x, 1.0), D(x, 1.0))
        D.train()
        assert not torch.equal(D(x, 1.0), D(x, 1.0))


def test_bf16_is_near_and_float64_nearer():
    D, x, sigma = awake(transformer(width=64)), draw(4, 1, 8, 8), torch.tensor([0.1, 1, 10, 50])
    with torch.no_grad():
        exact = awake(transformer(width=64)).double()(x, sigma)
        single = D(x, sigma)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a CPU without bfloat16
            rough = D.use("bf16")(x, sigma)
    scale = ((exact - x) / sigma[:, None, None, None]).norm()
    errors = [(((y - exact) / sigma[:, None, None, None]).norm() / scale).item() for y in (single, rough)]
    assert exact.dtype == torch.float64 and rough.dtype == torch.float32
    assert errors[0] < SUMMED_OTHERWISE < errors[1] < BFLOAT16_NEAR


def test_transforms_go_through():
    D = awake(transformer(width=128)).double()
    x, v = draw(2, 1, 8, 8).double(), draw(2, 1, 8, 8, seed=1).double()
    product = torch.func.jvp(lambda x: D(x, 0.7), (x,), (v,))[1]
    step = 1e-4
    with torch.no_grad():
        difference = (D(x + step * v, 0.7) - D(x - step * v, 0.7)) / (2 * step)
    assert (product - difference).abs().max() < 1e-6 * difference.abs().max()


TINY = dict(data="digits", n=20, arch="dit", width=32, blocks=2, batch=16, warmup_steps=3, labels="true",
            learning_rate=2e-3, device="cpu", log_steps=10)


def test_it_learns_digits_and_its_run_goes_on_where_it_stopped(tmp_path):
    def options(name):
        return train.Options(**TINY, steps=100, snapshots=4, out=str(tmp_path / name))
    whole = train.train(options("whole"))
    losses = [line["loss"] for line in disk.read_log(tmp_path / "whole" / "log.jsonl")]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    snapshots = train.training(options("broken"))
    next(snapshots), next(snapshots), snapshots.close()
    assert train.train(options("broken")).read_bytes() == whole.read_bytes()
    D, about = checkpoint.load_model(whole)
    assert isinstance(D.model, DiT) and D.config["patch"] == 2 and about["label_counts"] == [2] * 10
    images, labels = sample.generate(D, range(3), about["label_counts"], sampling=Sampling(sample_steps=3))
    assert images.shape == (3, 1, 8, 8) and labels.shape == (3,) and images.float().std() > 10


@pytest.mark.parametrize("given, words", [
    (dict(patch=3), "patch=3 does not divide img_resolution=8"), (dict(patch=0), "patch=0"),
    (dict(width=200), "width=200 does not divide into 3 heads"), (dict(width=6), "multiple of 4"),
    (dict(blocks=0), "blocks=0")])
def test_what_cannot_be_built_is_named(given, words):
    with pytest.raises(ValueError, match=words):
        transformer(**given)


@pytest.mark.parametrize("given", [dict(channel_mult=(1, 2)), dict(attn_resolutions=()),
                                   dict(embedding="fourier"), dict(skip_connections=(1,) * 9)])
def test_options_of_the_other_kind_of_network_are_refused(given):
    name = next(iter(given)).replace("_", "-")
    with pytest.raises(ValueError, match=f"--arch dit has no --{name};"):
        train.Options(arch="dit", **given)
    train.Options(**given)
    with pytest.raises(ValueError, match="--arch ncsnpp has no --patch;"):
        train.Options(arch="ncsnpp", patch=4)


def test_no_side_of_a_patch_needs_levels():
    """A side that three levels of a U-Net do not divide."""
    assert denoiser.shapes(transformer(img_resolution=6).config)["last.weight"] == (4, 16)
