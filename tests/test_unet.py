import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

import checkpoint
import unet
from conftest import ROOT, SHARED
from diffusion import denoiser, objectives
from diffusion.denoiser import Denoiser
from kernels import layers

RELATIVE = 1e-4  # of float32 outputs of a deep network, against the published code's on another machine
ULPS = 2         # units in the last place by which that machine's logarithm and square root may move c_noise
GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.npz"))


def golden(path):
    """(config, arrays, D, labels) of a golden file; how its weights are drawn: shared/golden/README.md."""
    file = np.load(path, allow_pickle=False)
    config = json.loads(str(file["config"]))
    rs, tensors = np.random.RandomState(int(file["seed"])), {}
    for name, shape in json.loads(str(file["parameters"])):
        z = rs.standard_normal(shape).astype(np.float32)
        if name.endswith("freqs"):
            z = 16 * z
        elif len(shape) > 1:
            z = z / np.float32(math.sqrt(np.prod(shape[1:])))
        elif "norm" in name and name.endswith("weight"):
            z = 1 + np.float32(0.2) * z
        else:
            z = np.float32(0.1) * z
        tensors[name] = torch.from_numpy(z)
    other = "parameters", "sigma_min", "sigma_max"
    D = Denoiser(**{key: value for key, value in config.items() if key not in other})
    D.model.load_state_dict(tensors)
    arrays = {key: torch.from_numpy(file[key]) for key in file.files if file[key].ndim}
    labels = arrays["labels_onehot"].argmax(1) if "labels_onehot" in arrays else None
    return config, arrays, D.eval(), labels


def moved(a, b):
    """The largest difference, relative to the largest value of b."""
    return float((a - b).abs().max() / b.abs().max())


def close(a, b, tolerance=RELATIVE):
    return moved(a, b) <= tolerance


def tolerance(D, output):
    """RELATIVE, or more where output() itself moves by more with the last place of c_noise.

    VP takes c_noise up to 999, where float32 has steps of 6e-5, and Fourier features multiply it by 2 pi 16
    times a normal number: the phases of their sines come in steps of up to 0.03.
    """
    plain, most = output(), 0.0
    for end in (-math.inf, math.inf):
        def nudge(module, arguments, end=end):
            x, c_noise, *labels = arguments
            return x, torch.nextafter(c_noise, torch.full_like(c_noise, end)), *labels
        hook = D.model.register_forward_pre_hook(nudge)
        most = max(most, moved(output(), plain))
        hook.remove()
    return max(RELATIVE, ULPS * most)


def test_all_golden_files_are_here():
    assert len(GOLDEN) >= 5
    if (SHARED / "golden").exists():
        assert {p.name for p in GOLDEN} >= {p.name for p in (SHARED / "golden").glob("*.npz")}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_denoiser_and_loss_agree_with_the_published_networks(path):
    config, a, D, labels = golden(path)
    assert D.sigma_min == config["sigma_min"] and D.sigma_max == config["sigma_max"]
    assert sum(p.numel() for p in D.parameters()) == config["parameters"]
    with torch.no_grad():
        limit = tolerance(D, lambda: D(a["x"], a["sigma"], labels))
        assert close(D(a["x"], a["sigma"], labels), a["denoised"], limit)
        noise = (a["x"] - a["clean"]) / a["sigma"].reshape(-1, 1, 1, 1)
        loss = D.loss(a["clean"], a["sigma"], noise, labels)
        assert loss.shape == a["loss_per_image"].shape
        loss_limit = tolerance(D, lambda: D.loss(a["clean"], a["sigma"], noise, labels) / a["loss_per_image"])
        assert ((loss - a["loss_per_image"]).abs() <= loss_limit * a["loss_per_image"]).all()
    vague = path.stem == "ddpmpp-vp-fourier" and max(limit, loss_limit) < 5e-3
    assert {limit, loss_limit} == {RELATIVE} or vague


def reference(D, x, c_noise, labels=None):
    """F(x; c_noise, labels) plainly: transposed convolutions, one-hot labels, explicit softmax."""
    c, w = D.config, {name: t.detach() for name, t in D.model.state_dict().items()}
    taps = torch.tensor([1.0, 1.0] if c["arch"] == "ddpmpp" else [1.0, 3.0, 3.0, 1.0])
    f, pad = torch.outer(taps, taps)[None, None] / taps.sum()**2, (len(taps) - 1) // 2

    def conv(name, x, up=False, down=False):
        many = f.tile(x.shape[1], 1, 1, 1)
        if up:
            x = F.conv_transpose2d(x, many * 4, stride=2, padding=pad, groups=x.shape[1])
        if down:
            x = F.conv2d(x, many, stride=2, padding=pad, groups=x.shape[1])
        weight = w[name + ".weight"]
        return F.conv2d(x, weight, w[name + ".bias"], padding=weight.shape[-1] // 2)

    def norm(name, x):
        return F.group_norm(x, min(32, x.shape[1] // 4), w[name + ".weight"], w[name + ".bias"], 1e-6)

    def block(name, x, e):
        how = dict(up=name.endswith("_up"), down=name.endswith("_down"))
        h = conv(name + ".conv0", F.silu(norm(name + ".norm0", x)), **how)
        h = h + (e @ w[name + ".affine.weight"].T + w[name + ".affine.bias"])[:, :, None, None]
        h = conv(name + ".conv1", F.silu(norm(name + ".norm1", h)))
        x = (h + (conv(name + ".skip", x, **how) if name + ".skip.weight" in w else x)) / math.sqrt(2)
        if name + ".qkv.weight" in w:
            qkv = conv(name + ".qkv", norm(name + ".norm2", x))
            q, k, v = qkv.reshape(len(x), x.shape[1], 3, -1).unbind(2)
            attention = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(x.shape[1])).softmax(2)
            a = torch.einsum("nqk,nck->ncq", attention, v).reshape(x.shape)
            x = (conv(name + ".proj", a) + x) / math.sqrt(2)
        return x

    half = c["width"] * (1 if c["arch"] == "ddpmpp" else 2) // 2
    if c["embedding"] == "fourier":
        phase = c_noise[:, None] * (2 * math.pi * w["map_noise.freqs"])
    else:
        phase = c_noise[:, None] * (1 / 10000) ** (torch.arange(half) / (half - 1))
    e = torch.cat([phase.sin(), phase.cos()], 1)
    if c["label_dim"]:
        one_hot = torch.zeros(len(x), c["label_dim"])
        if labels is not None:
            one_hot = F.one_hot(labels, c["label_dim"]).float()
        e = e + (one_hot * math.sqrt(c["label_dim"])) @ w["map_label.weight"].T + w["map_label.bias"]
    for layer in ("map_layer0", "map_layer1"):
        e = F.silu(e @ w[layer + ".weight"].T + w[layer + ".bias"])

    skips, kept, pyramid = [], c["skip_connections"], x
    for name in D.model.enc:
        if name.endswith("aux_residual"):
            weight, bias = w[f"enc.{name}.weight"], w[f"enc.{name}.bias"]
            h = F.conv2d(pyramid, weight, padding=1 + pad)
            h = F.conv2d(h, f.tile(h.shape[1], 1, 1, 1), stride=2, groups=h.shape[1]) + bias[:, None, None]
            x = pyramid = (x + h) / math.sqrt(2)
            skips[-1] = x * kept[len(skips) - 1]
        else:
            x = conv("enc." + name, x) if name.endswith("_conv") else block("enc." + name, x, e)
            skips.append(x * kept[len(skips)])
    for name in D.model.dec:
        if name.endswith("aux_norm"):
            x = F.silu(norm("dec." + name, x))
        elif name.endswith("aux_conv"):
            x = conv("dec." + name, x)
        else:
            x = block("dec." + name, torch.cat([x, skips.pop()], 1) if "_block" in name else x, e)
    return x


@settings(max_examples=25, deadline=None, derandomize=True)
@given(arch=st.sampled_from(["ddpmpp", "ncsnpp"]), precond=st.sampled_from(["vp", "ve", "edm"]),
       resolution=st.sampled_from([8, 16, 32, 64]), channels=st.sampled_from([1, 3]),
       label_dim=st.sampled_from([0, 1, 7]), width=st.sampled_from([4, 8, 12, 32]), blocks=st.integers(1, 2),
       mult=st.sampled_from([(2, 2, 2), (1, 2), (2,), (1, 2, 2, 2)]),
       embedding=st.sampled_from([None, "positional", "fourier"]),
       attention=st.sampled_from([None, (), (8,), (64, 16, 4)]), draw=st.data())
def test_any_network_agrees_with_the_plain_reference(arch, precond, resolution, channels, label_dim, width,
                                                     blocks, mult, embedding, attention, draw):
    count = (blocks + 1) * len(mult)
    mask = draw.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    generator = torch.Generator().manual_seed(0)
    D = Denoiser(arch, precond, resolution, channels, label_dim, width, blocks, mult, attention, embedding,
                 mask).eval()
    with torch.no_grad():
        for p in D.parameters():  # weights of a trained network's size in every branch
            p.normal_(generator=generator).div_(p[0].numel() ** 0.5 if p.ndim > 1 else 5)
        x = torch.randn(2, channels, resolution, resolution, generator=generator)
        c_noise = torch.tensor([0.3, 400.0])
        labels = draw.draw(st.sampled_from([None, torch.tensor([0, label_dim - 1])])) if label_dim else None
        assert close(D.model(x, c_noise, labels), reference(D, x, c_noise, labels))


def test_preconditioning_reaches_the_identity_at_low_noise():
    for precond in objectives.PRECONDITIONINGS:
        D = Denoiser("ddpmpp", precond, 8, 1, width=8).eval()
        x = torch.rand(2, 1, 8, 8) * 2 - 1
        with torch.no_grad():
            for p in D.parameters():
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(p.numel()))
            assert torch.allclose(D(x, 1e-4), x, atol=1e-2)                  # a number for sigma
            assert not torch.allclose(D(x, 1.0), x, atol=1e-2)
            assert torch.equal(D(x.double(), torch.tensor([1e-4])), D(x, 1e-4))
            # embedded twice, which rounds otherwise
            assert close(D(x.double(), torch.tensor([1.0, 1.0])), D(x, 1.0))


def test_training_noise_levels():
    g = torch.Generator().manual_seed(0)
    vp, ve, edm = (Denoiser("ddpmpp", precond, 8, 1, width=8).objective.training_sigma(100_000, g)
                   for precond in ("vp", "ve", "edm"))
    assert vp.min() >= 9e-4 and vp.max() <= 152.2
    assert abs(vp.median() - float(objectives.vp_sigma(torch.tensor(0.5)))) < 0.1
    assert ve.min() >= 0.02 and ve.max() <= 100 and abs(ve.log().mean() - math.log(0.02 * 100) / 2) < 0.03
    assert abs(edm.log().mean() + 1.2) < 0.02 and abs(edm.log().std() - 1.2) < 0.02
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    assert torch.allclose(objectives.vp_sigma(t), (torch.tensor(19.9 / 2) * t**2 + 0.1 * t).expm1().sqrt())
    c_noise = objectives.vp_sigma_inverse(objectives.vp_sigma(t))
    assert torch.allclose(c_noise, t)


def test_initial_weights_are_the_published_ones():
    D = Denoiser("ncsnpp", "ve", 16, 3, label_dim=10, width=32, generator=torch.Generator().manual_seed(1))
    gains = dict(conv1=1e-5, proj=1e-5, aux_conv=1e-5, qkv=0.2**0.5)
    for name, p in D.model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            fan_out, fan_in = (n * p[0, 0].numel() for n in p.shape[:2])
            gain = next((g for word, g in gains.items() if name.endswith(word + ".weight")), 1.0)
            bound = gain * math.sqrt(6 / (fan_in + fan_out))
            assert p.abs().max() <= bound and p.abs().max() > 0.9 * bound, name
            assert abs(p.mean()) < 5 * bound / p.numel() ** 0.5, name
    assert 10 < D.model.map_noise.freqs.std() < 22
    again = Denoiser("ncsnpp", "ve", 16, 3, label_dim=10, width=32,
                     generator=torch.Generator().manual_seed(1)).model.state_dict()
    assert all(torch.equal(t, again[name]) for name, t in D.model.state_dict().items())


def test_defaults_follow_the_architecture():
    assert Denoiser("ddpmpp", "vp", 32, 3, width=8).config["embedding"] == "positional"
    D = Denoiser("ncsnpp", "ve", 32, 3, width=8)
    assert D.config["embedding"] == "fourier" and D.config["attn_resolutions"] == [16]
    assert D.config["skip_connections"] == [1] * 9


def test_base_run_has_the_published_size():
    with torch.device("meta"):
        D = unet.UNet("ddpmpp", 32, 3, 0, 128, 2, (2, 2, 2), (16,), "positional", [1] * 9, 0.13)
    assert sum(p.numel() for p in D.parameters()) == 35_125_251  # counted in the published network


@pytest.mark.parametrize("given, words", [
    (dict(img_resolution=10), "img_resolution=10 is not divisible by 4"),
    (dict(skip_connections=[1] * 8), "must be 9"),
    (dict(skip_connections=[2] * 9), "zeros or ones"), (dict(width=6), "width=6 is not a multiple of 4"),
    (dict(width=68), "multiple of 32"), (dict(arch="unet"), "'unet' is unknown"),
    (dict(precond="ddim"), "unknown"), (dict(embedding="learned"), "unknown"),
    (dict(blocks=0), "blocks=0"), (dict(channel_mult=()), "channel_mult"),
    (dict(dropout=1.0), "dropout=1.0"), (dict(img_channels=0), "img_channels=0")])
def test_what_cannot_be_built_is_named(given, words):
    base = dict(arch="ddpmpp", precond="vp", img_resolution=32, img_channels=3, width=8)
    with pytest.raises(ValueError, match=words):
        Denoiser(**{**base, **given})


def test_dropout_only_while_training():
    D = Denoiser("ddpmpp", "vp", 8, 1, width=8, dropout=0.5)
    with torch.no_grad():
        for p in D.parameters():
            p.normal_(std=0.3)
        x = torch.randn(4, 1, 8, 8)
        assert not torch.equal(D(x, 1.0), D(x, 1.0))
        D.eval()
        assert torch.equal(D(x, 1.0), D(x, 1.0))


def test_a_network_that_is_told_of_augmentation():
    """One more matrix, with EDM's name, in EDM's place; told of none, the network is as without it."""
    plain, told = (Denoiser("ddpmpp", "vp", 8, 1, width=8, augment_dim=dim).eval() for dim in (0, 9))
    names = list(plain.model.state_dict())
    assert list(told.model.state_dict()) == ["map_augment.weight", *names]
    assert told.model.map_augment.weight.shape == (8, 9) and "augment_dim" not in plain.config
    x, sigma, how = draw(2, 1, 8, 8), torch.ones(2), draw(2, 9)
    with torch.no_grad():
        for p in told.parameters():
            p.add_(0.1 * draw(*p.shape))
        plain.model.load_state_dict({name: told.model.state_dict()[name] for name in names})
        assert torch.equal(told(x, sigma), plain(x, sigma))
        assert torch.equal(told(x, sigma, augment=0 * how), plain(x, sigma))
        assert moved(told(x, sigma, augment=how), plain(x, sigma)) > 1e-3
        noise = draw(2, 1, 8, 8, seed=1)
        error = (told(x + noise, sigma, augment=how) - x).square().flatten(1).sum(1)
        assert torch.allclose(told.loss(x, sigma, noise, None, how), error)
        assert told.double()(x, sigma, augment=how).dtype == torch.float64


def test_minus_one_is_no_label():
    D, x, sigma = Denoiser("ddpmpp", "vp", 8, 1, label_dim=3, width=8).eval(), draw(4, 1, 8, 8), torch.ones(4)
    with torch.no_grad():
        for p in D.parameters():
            p.add_(0.1 * draw(*p.shape))
        some, each = D(x, sigma, torch.tensor([-1, 2, -1, 0])), D(x, sigma, torch.tensor([1, 2, 1, 0]))
        assert torch.equal(some[::2], D(x, sigma)[::2]) and torch.equal(some[1::2], each[1::2])
        assert moved(some[::2], each[::2]) > 1e-3


def test_save_and_load(tmp_path):
    D = Denoiser("ncsnpp", "edm", 8, 1, label_dim=3, width=8, skip_connections=[1, 0] * 4 + [1]).eval()
    checkpoint.write(tmp_path / "a.safetensors", D.model.state_dict(),
                     dict(network=D.config, step=7, options=dict(seed=1)))
    again, metadata = checkpoint.load_model(tmp_path / "a.safetensors")
    assert metadata["step"] == 7 and metadata["options"] == dict(seed=1)
    assert again.config == D.config and not again.training
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(D(x, 1.0, torch.tensor([0, 2])), again(x, 1.0, torch.tensor([0, 2])))


def test_damaged_snapshots_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    D = Denoiser("ddpmpp", "vp", 8, 1, width=8)
    checkpoint.write(path, D.model.state_dict(), dict(network=D.config))
    whole = path.read_bytes()
    for bad in (b"", b"torn", whole[:len(whole) // 2]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="a.safetensors"):
            checkpoint.load_model(path)


BFLOAT16_NEAR = 0.05  # 8 bits of mantissa, 0.4% a rounding, through some forty layers


def test_precisions():
    D = Denoiser("ddpmpp", "vp", 8, 1, width=16, blocks=1, generator=torch.Generator().manual_seed(0)).eval()
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.1, 1, 10, 50])
    with torch.no_grad():
        for p in D.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
        exact = D(x, sigma)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a CPU without bfloat16
            D.use("bf16")
        rough = D(x, sigma)
        assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
        network = ((exact - x) / sigma[:, None, None, None], (rough - x) / sigma[:, None, None, None])
        assert (network[0] - network[1]).norm() < BFLOAT16_NEAR * network[0].norm()
        assert torch.equal(D.use("fp32")(x, sigma), exact)
    with pytest.raises(ValueError, match="tf32 is a format of CUDA"):
        D.use("tf32")
    with pytest.raises(ValueError, match="'fp8' is unknown"):
        D.use("fp8")
    assert D.use("auto").precision == "fp32", "of a CPU"
    assert denoiser.precision_on(torch.device("cuda")) == "tf32"
    assert denoiser.precision_on(torch.device("cuda"), "bf16") == "bf16"


def network():
    """A small Denoiser with weights of a trained network's size, attention and both resamplings in it."""
    D = Denoiser("ddpmpp", "edm", 8, 1, width=8, blocks=1, channel_mult=(1, 2)).eval()
    with torch.no_grad():
        for p in D.parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
            p.div_(p[0].numel() ** 0.5 if p.ndim > 1 else 5)
    return D


SIGMA = 0.7
STEP, FINITE_DIFFERENCE = 1e-4, 1e-6  # in float64: the step squared, times third derivatives of some tens
SUMMED_OTHERWISE = 1e-4               # float32 sums of the plain forms and of the fast ones, of the largest


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def test_jvp_is_the_finite_difference():
    D, x, v = network().double(), draw(2, 1, 8, 8).double(), draw(2, 1, 8, 8, seed=1).double()
    value, product = torch.func.jvp(lambda x: D(x, SIGMA), (x,), (v,))
    with torch.no_grad():
        difference = (D(x + STEP * v, SIGMA) - D(x - STEP * v, SIGMA)) / (2 * STEP)
    assert relative(product, difference) < FINITE_DIFFERENCE
    value, product = torch.func.jvp(lambda x: network()(x, SIGMA), (x.float(),), (v.float(),))
    assert relative(product, difference) < SUMMED_OTHERWISE
    assert relative(value, D(x, SIGMA).detach()) < SUMMED_OTHERWISE
    with torch.autograd.forward_ad.dual_level():  # the same without torch.func
        dual = network()(torch.autograd.forward_ad.make_dual(x.float(), v.float()), SIGMA)
        assert relative(torch.autograd.forward_ad.unpack_dual(dual).tangent, difference) < SUMMED_OTHERWISE


def test_vjp_and_jacrev_are_what_backward_gives():
    D, x, g = network(), draw(1, 1, 8, 8), draw(1, 1, 8, 8, seed=1)
    x.requires_grad_()
    expected, = torch.autograd.grad(D(x, SIGMA), x, g)
    assert relative(torch.func.vjp(lambda x: D(x, SIGMA), x)[1](g)[0], expected) < SUMMED_OTHERWISE
    jacobian = torch.func.jacrev(lambda x: D(x, SIGMA))(x).reshape(64, 64)
    assert relative((g.flatten() @ jacobian).view_as(x), expected) < SUMMED_OTHERWISE
    forward = torch.func.jacfwd(lambda x: D(x, SIGMA))(x).reshape(64, 64)
    assert relative(forward, jacobian) < SUMMED_OTHERWISE


def test_vmap_takes_each_image_alone():
    D, x, sigma = network(), draw(5, 1, 8, 8), torch.tensor([0.1, 0.5, 1, 2, 10])
    with torch.no_grad():
        expected = D(x, sigma)
        assert relative(torch.func.vmap(lambda x, s: D(x[None], s)[0])(x, sigma), expected) < SUMMED_OTHERWISE

    def loss(weights, x):
        return torch.func.functional_call(D, weights, (x[None], SIGMA)).square().sum()
    weights = {name: p.detach() for name, p in D.named_parameters()}
    # the gradient of every image, for the NTK
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    (D(x, SIGMA).square().sum()).backward()
    for name, p in D.named_parameters():
        assert relative(each[name].sum(0), p.grad) < SUMMED_OTHERWISE, name


def test_second_derivatives_of_torch_func():
    """Of the norm of the gradient, beside float64 and backward, where every form is plain."""
    def norm_of_gradient(D, x):
        return torch.func.grad(lambda x: D(x, SIGMA).square().sum())(x).square().sum()
    x = draw(2, 1, 8, 8)
    single = torch.func.grad(lambda x: norm_of_gradient(network(), x))(x)
    x = x.double().requires_grad_()
    gradient, = torch.autograd.grad(network().double()(x, SIGMA).square().sum(), x, create_graph=True)
    double, = torch.autograd.grad(gradient.square().sum(), x)
    assert relative(single, double) < 10 * SUMMED_OTHERWISE  # a gradient of a gradient


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_float64_agrees_with_the_published_networks(path):
    config, a, D, labels = golden(path)
    with torch.no_grad():
        denoised = D.double()(a["x"], a["sigma"], labels)
    assert denoised.dtype == torch.float64
    # float32 phases of Fourier features with VP, whose c_noise reaches 999, lie 0.03 apart: files are rounded
    assert relative(denoised, a["denoised"]) < (2e-3 if path.stem == "ddpmpp-vp-fourier" else RELATIVE)


def norm_of_a_gpu(x, weight, bias, groups, eps, shift=None, silu=False, dropout=0.0):
    """A stand-in for kernels/norm_triton.py: the plain form, in channels_last."""
    y = F.dropout(layers.plain_norm(x, weight, bias, groups, eps, shift, silu), dropout)
    return y.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_forms_of_a_gpu_agree_with_the_published_networks(path, monkeypatch):
    pytest.importorskip("triton")
    config, a, D, labels = golden(path)
    gradients = []
    monkeypatch.setattr("kernels.norm_triton.norm", norm_of_a_gpu)
    monkeypatch.setattr("kernels.resample_triton.resample", layers.plain_resample)
    for fused in (False, True):
        monkeypatch.setattr(layers, "runs_triton", lambda device, right, fused=fused: fused)
        D.zero_grad()
        denoised = D(a["x"], a["sigma"], labels)
        assert close(denoised.detach(), a["denoised"])
        denoised.square().sum().backward()
        gradients.append([p.grad.clone() for p in D.parameters()])
    assert all(close(gpu, plain) for plain, gpu in zip(*gradients))
