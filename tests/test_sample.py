import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import sample
import train
import unet
from images import read
from kernels import Optimum
from test_unet import GOLDEN, RELATIVE, close, golden, tolerance

TRAINING = dict(data="digits", n=20, width=4, blocks=1, channel_mult=(1, 1), batch=16, steps=2, snapshots=2,
                device="cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "labelled"
    train.train(train.Options(**TRAINING, labels="random:3", out=str(out)))
    return out


def options(**given):
    return sample.Options(**{**dict(seeds="0-9", device="cpu"), **given})


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_sampler_agrees_with_the_published_one(path):
    config, a, D, labels = golden(path)
    sigmas = sample.noise_levels(max(0.002, D.sigma_min), min(80, D.sigma_max))
    x = sample.heun(D, a["latents"], sigmas, labels)
    limit = tolerance(D, lambda: sample.heun(D, a["latents"], sigmas, labels))
    assert limit == RELATIVE or path.stem == "ddpmpp-vp-fourier" and limit < 5e-3
    assert x.dtype == torch.float64 and close(x, a["sampled"], limit)


def test_noise_levels():
    sigmas = sample.noise_levels(0.002, 80.0)
    assert len(sigmas) == 19 and sigmas[0] == pytest.approx(80)
    assert sigmas[-2] == pytest.approx(0.002) and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all() and sigmas.dtype == torch.float64


def test_heun_is_of_second_order():
    """For one training image y the flow is linear: x(sigma) - y falls as sigma does, at any step size."""
    y = torch.full((1, 1, 2, 2), 0.25, dtype=torch.float64)
    sigmas = sample.noise_levels(0.002, 80.0)
    x = sample.heun(lambda x, sigma, labels: y.expand_as(x), torch.randn(3, 1, 2, 2), sigmas)
    assert torch.allclose(x, y.expand_as(x), atol=1e-12)

    # Gaussian data of variance 1: D(x) = x / (1 + sigma^2), and x(0) = x(sigma) / sqrt(1 + sigma^2)
    def error(steps):
        sigmas = sample.noise_levels(0.002, 80.0, steps)
        x = sample.heun(lambda x, sigma, labels: x / (1 + sigma**2), torch.ones(1, 1, 1, 1), sigmas)
        return float((x - 80 / (1 + 80**2) ** 0.5).abs())
    assert error(36) < 0.35 * error(18)


@pytest.mark.parametrize("text, seeds", [("3", [3]), ("0-3", [0, 1, 2, 3]), ("5,0-1", [5, 0, 1])])
def test_seeds(text, seeds):
    assert sample.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "5-1", "a", "1-", "-3", "1,,2"])
def test_bad_seeds(text):
    with pytest.raises(ValueError, match="not a number or a rising range"):
        options(seeds=text, run="x")


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp"])
def test_a_sample_depends_on_its_seed_alone(arch):
    D = unet.Denoiser(arch, "edm", 8, 1, label_dim=4, width=16, blocks=1,
                      generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for p in D.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    counts = [1, 2, 0, 1]
    whole, labels = sample.generate(D, list(range(70)), counts, steps=4)
    for batch in (1, 3, 64):
        chosen = [69, 3, 12, 40]
        images, drawn = sample.generate(D, chosen, counts, steps=4, at_once=batch)
        assert torch.equal(images, whole[chosen]) and torch.equal(drawn, labels[chosen])


def test_chunks_fill_a_gpu():
    """By the size of the network: 4,096 small images, 512 of the paper's base run."""
    def size(width, resolution, on_gpu):
        D = SimpleNamespace(config=dict(width=width, img_resolution=resolution),
                            parameters=lambda: iter([SimpleNamespace(is_cuda=on_gpu)]))
        return sample.chunk(D)
    assert [size(w, r, True) for w, r in ((8, 8), (64, 8), (128, 32), (320, 32))] == [4096, 4096, 512, 192]
    assert [size(8, 8, False), size(16, 8, False), size(128, 32, False)] == [256, 128, 64]


def test_labels_are_drawn_by_their_weights():
    assert sample.weigh_labels([5, 0, 10, 5]) == [1, 1, 1, 1], "as published, also labels that no image has"
    assert sample.weigh_labels([5, 0, 10, 5], "training") == [5, 0, 10, 5]
    assert sample.weigh_labels(None) is None and sample.weigh_labels([5, 0, 10, 5], "none") is None
    D = unet.Denoiser("ddpmpp", "vp", 8, 1, label_dim=4, width=4)
    latents, labels = sample.draw(D, list(range(4000)), [5, 0, 10, 5])
    share = torch.bincount(labels, minlength=4) / 4000
    assert share[1] == 0 and torch.allclose(share, torch.tensor([0.25, 0, 0.5, 0.25]), atol=0.04)
    assert torch.equal(latents[7], torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(7)))
    assert sample.draw(D, [0], None)[1] is None


def test_labels_of_a_conditional_run(trained, tmp_path):
    """Uniform over all labels by default; in training label 0 is the commonest of the run's three."""
    drawn = {}
    for how in ("uniform", "training"):
        path = sample.sample(options(run=str(trained), seeds="0-599", heun_steps=2, sample_labels=how,
                                     out=str(tmp_path / f"{how}.npz")))
        with np.load(path) as file:
            drawn[how] = np.bincount(file["labels"], minlength=3) / 600
    counts = checkpoint.read_metadata(trained / "model.safetensors")["label_counts"]
    assert np.allclose(drawn["uniform"], 1 / 3, atol=0.08)
    assert np.allclose(drawn["training"], np.array(counts) / sum(counts), atol=0.08)


def test_samples_without_a_label_of_a_conditional_run(trained, tmp_path):
    given = dict(run=str(trained), sample_labels="none")
    with np.load(sample.sample(options(**given, out=str(tmp_path / "a.npz")))) as file:
        assert "labels" not in file
        D, _ = checkpoint.load_model(trained / "model.safetensors")
        expected, _ = sample.generate(D, list(range(10)))
        assert np.array_equal(file["arr_0"], expected.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="--label 1 is a label.*leave one of them out"):
        options(**given, label=1)


def test_files_of_a_run(trained, tmp_path):
    out = sample.sample(options(run=str(trained), png=str(tmp_path / "png")))
    assert out == trained / "samples.npz"
    with np.load(out, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        images = file["arr_0"]
        assert images.shape == (10, 8, 8, 1) and images.dtype == np.uint8
        assert file["seeds"].tolist() == list(range(10))
        assert file["labels"].shape == (10,) and file["labels"].max() < 3
    assert about["options"]["heun_steps"] == 18 and "batch" not in about["options"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / "000007.png")), images[7, ..., 0])
    with pytest.raises(ValueError, match="holds other images, such as 000000.png"):
        sample.sample(options(run=str(trained), seeds="50-51", png=str(tmp_path / "png"),
                              out=str(tmp_path / "o.npz")))
    assert Image.open(trained / "samples.png").size == (640, 64)
    assert read(str(out))[0].shape == (10, 1, 8, 8)
    stamp = out.stat().st_mtime_ns
    assert sample.sample(options(run=str(trained))) == out and out.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="seeds: '0-9' there, '0-3' asked"):
        sample.sample(options(run=str(trained), seeds="0-3"))
    early = sample.sample(options(run=str(trained / "snapshot-00000001.safetensors")))
    assert early == trained / "samples-00000001.npz"


def test_stale_samples_are_refused(trained, tmp_path):
    out = sample.sample(options(run=str(trained), out=str(tmp_path / "a.npz")))
    with pytest.raises(ValueError, match="weights_sha256"):
        sample.sample(options(run=str(trained / "snapshot-00000001.safetensors"), out=str(out)))


def test_torn_samples_are_named(trained, tmp_path):
    for content in (b"", b"torn"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match="a.npz is not a whole file of these scripts"):
            sample.sample(options(run=str(trained), out=str(tmp_path / "a.npz")))


def test_optimum_of_images_that_are_not_square(tmp_path, noise):
    np.savez(tmp_path / "wide.npz", arr_0=noise(5, 8, 12, 3))
    with pytest.raises(ValueError, match="12x8; the networks need square ones"):
        sample.sample(options(optimum=True, data=str(tmp_path / "wide.npz"), out=str(tmp_path / "o.npz")))


def test_given_label(trained, tmp_path):
    out = sample.sample(options(run=str(trained), label=2, out=str(tmp_path / "a.npz")))
    assert np.load(out)["labels"].tolist() == [2] * 10
    with pytest.raises(ValueError, match="--label 3: there are 3 labels"):
        sample.sample(options(run=str(trained), label=3, out=str(tmp_path / "b.npz")))


def test_optimum_replays_its_training_set(tmp_path, trained):
    out = sample.sample(options(optimum=True, data="digits", n=40, seeds="0-199",
                                out=str(tmp_path / "a.npz")))
    images = torch.from_numpy(np.load(out)["arr_0"]).permute(0, 3, 1, 2)
    train_images = data.load(data.Options(data="digits", n=40)).images
    gap = (images[:, None].int() - train_images[None].int()).abs().amax((2, 3, 4)).amin(1)
    assert (gap <= 1).all()
    of_run = sample.sample(options(optimum=True, run=str(trained), out=str(tmp_path / "b.npz")))
    D = data.of_run(trained)
    counts = torch.bincount(D.labels).tolist()
    direct, _ = sample.generate(Optimum(D.images, D.labels), list(range(10)), counts)
    assert np.array_equal(np.load(of_run)["arr_0"], direct.permute(0, 2, 3, 1))


def test_optimum_given_labels(tmp_path):
    """A sample copies an image of its label: with a label for each image, that image to the pixel."""
    given = dict(optimum=True, data="digits", n=40, seeds="0-49")
    drawn = {}
    for labels in ("none", "true", "unique", "random:100"):
        out = tmp_path / f"{labels[:6]}.npz"
        with np.load(sample.sample(options(**given, labels=labels, out=str(out)))) as file:
            drawn[labels] = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2), file.get("labels")
    assert drawn["none"][1] is None
    for labels, gap in (("true", 1), ("unique", 0), ("random:100", 1)):
        D = data.load(data.Options(data="digits", n=40, labels=labels))
        for image, label in zip(*drawn[labels]):
            of_label = D.images[D.labels == int(label)]
            assert (image.int() - of_label.int()).abs().amax((1, 2, 3)).min() <= gap
    assert not torch.equal(drawn["unique"][0], drawn["none"][0])
    out = sample.sample(options(**given, labels="unique", label=7, out=str(tmp_path / "7.npz")))
    images = data.load(data.Options(data="digits", n=40)).images
    assert (np.load(out)["arr_0"] == images[7].permute(1, 2, 0).numpy()).all()
    unused = min(set(range(100)) - set(D.labels.tolist()))
    for label, words in ((unused, f"label {unused}: no training image has it"), (100, "are 100 labels")):
        with pytest.raises(ValueError, match=words):
            out = tmp_path / "unused.npz"
            sample.sample(options(**given, labels="random:100", label=label, out=str(out)))
    assert not (tmp_path / "unused.npz").exists()
    with pytest.raises(ValueError, match="labels: 'none' there, 'unique' asked"):
        sample.sample(options(**given, labels="unique", out=str(tmp_path / "none.npz")))


@pytest.mark.parametrize("given, words", [
    (dict(), "nothing to sample from"), (dict(run="x", n=7, labels="true"), "leave out n, labels"),
    (dict(run="x", out="x.png"), "must end in .npz"), (dict(run="x", rho=float("nan")), "rho"),
    (dict(run="x", seeds="99999999999"), "below 2\\^32"),
    (dict(run="nowhere"), "no trained model at nowhere"), (dict(run="x", heun_steps=1), "heun-steps"),
    (dict(run="x", sigma_min=90.0), "sigma_min"), (dict(run="x", at_once=0), "--at-once 0")])
def test_bad_options(given, words):
    with pytest.raises(ValueError, match=words):
        sample.sample(options(**given))


def test_grid_of_colour_images(noise):
    sheet = np.asarray(sample.grid(torch.from_numpy(noise(12, 32, 32, 3)).permute(0, 3, 1, 2)))
    assert sheet.shape == (2 * 64, 10 * 64, 3)
    assert np.array_equal(sheet[64:128:2, 64:128:2], noise(12, 32, 32, 3)[11]) and not sheet[64:, 128:].any()


def test_a_model_of_another_run_is_refused(tmp_path, trained):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(trained / name, tmp_path / name)
    o = sample.Options(run=str(tmp_path), seeds="0-1", heun_steps=2, device="cpu")
    metadata = checkpoint.read_metadata(tmp_path / "model.safetensors")
    weights, _ = checkpoint.read(tmp_path / "model.safetensors")
    options = metadata["options"]
    other = metadata | dict(options=options | dict(seed=7, later=1))
    checkpoint.write(tmp_path / "model.safetensors", weights, other)
    with pytest.raises(ValueError, match="is not of the run in .*seed: 7 there, 0 asked"):
        sample.sample(o)
    newer = metadata | dict(options=options | dict(later=1))
    checkpoint.write(tmp_path / "model.safetensors", weights, newer)
    assert sample.sample(o).exists()  # an option that the run did not know yet tells nothing


def test_a_snapshot_that_claims_more_than_it_holds_takes_no_memory(tmp_path, trained):
    weights, metadata = checkpoint.read(trained / "model.safetensors")
    right = metadata["network"]
    for network, words in ((right | dict(width=4096), "do not fit"),
                           (right | dict(odd=1), "describes no network")):
        checkpoint.write(tmp_path / "model.safetensors", weights, metadata | dict(network=network))
        with pytest.raises(ValueError, match=words):
            checkpoint.load_model(tmp_path / "model.safetensors")
