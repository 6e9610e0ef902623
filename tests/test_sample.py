import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import disk
import run
import sample
import train
from diffusion import denoiser
from diffusion.solvers import Sampling
from images import read
from kernels import Optimum

TRAINING = dict(data="digits", n=20, width=4, blocks=1, channel_mult=(1, 1), batch=16, steps=2, snapshots=2,
                device="cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "labelled"
    train.train(train.Options(**TRAINING, labels="random:3", out=str(out)))
    return out


def network(arch):
    """A network of four labels, with weights of some size."""
    D = denoiser.Denoiser(arch, "edm", 8, 1, label_dim=4, width=16, blocks=1,
                      generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for p in D.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return D


def options(**given):
    return sample.Options(**{**dict(seeds="0-9", device="cpu"), **given})


@pytest.mark.parametrize("text, seeds", [("3", [3]), ("0-3", [0, 1, 2, 3])])
def test_seeds(text, seeds):
    assert list(sample.parse_seeds(text)) == seeds


@pytest.mark.parametrize("text", ["", "5-1", "a", "1-", "-3", "1,2", "0-99999999"])
def test_bad_seeds(text):
    with pytest.raises(ValueError, match=f"--seeds '{text}' is no"):
        options(seeds=text, run="x")


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp"])
def test_a_sample_depends_on_its_seed_alone(arch):
    D = network(arch)
    counts = [1, 2, 0, 1]
    for given in (dict(), dict(churn=2.0), dict(guidance=2.0, sampler="dpm-solver")):
        sampling = Sampling(sample_steps=4, **given)
        whole, labels = sample.generate(D, list(range(70)), counts, sampling=sampling)
        for chosen in ([69], [69, 3, 12, 40]):
            images, drawn = sample.generate(D, chosen, counts, sampling=sampling)
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
    D = denoiser.Denoiser("ddpmpp", "vp", 8, 1, label_dim=4, width=4)
    latents, labels = sample.draw(D, list(range(4000)), [5, 0, 10, 5])
    share = torch.bincount(labels, minlength=4) / 4000
    assert share[1] == 0 and torch.allclose(share, torch.tensor([0.25, 0, 0.5, 0.25]), atol=0.04)
    assert torch.equal(latents[7], torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(7)))
    assert sample.draw(D, [0], None)[1] is None


def test_labels_of_a_conditional_run(trained, tmp_path):
    """Uniform over all labels by default; in training label 0 is the commonest of the run's three."""
    drawn = {}
    for how in ("uniform", "training"):
        path = sample.sample(options(run=str(trained), seeds="0-599", sample_steps=2, sample_labels=how,
                                     out=str(tmp_path / f"{how}.npz")))
        with np.load(path) as file:
            drawn[how] = np.bincount(file["labels"], minlength=3) / 600
    counts = checkpoint.read(trained / "model.safetensors")[1]["label_counts"]
    assert np.allclose(drawn["uniform"], 1 / 3, atol=0.08)
    assert np.allclose(drawn["training"], np.array(counts) / sum(counts), atol=0.08)


def test_samples_without_a_label_of_a_conditional_run(trained, tmp_path, capsys):
    given = dict(run=str(trained), sample_labels="none")
    with np.load(sample.sample(options(**given, out=str(tmp_path / "a.npz")))) as file:
        assert "labels" not in file
        D, _ = checkpoint.load_model(trained / "model.safetensors")
        expected, _ = sample.generate(D, list(range(10)))
        assert np.array_equal(file["arr_0"], expected.permute(0, 2, 3, 1))
    assert "always seen labels" in capsys.readouterr().err
    run.say.cache_clear()
    sample.say_untrained(options(**given), dict(labels="true", label_dropout=0.1))
    assert "always seen labels" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="--label 1 is a label.*leave one of them out"):
        options(**given, label=1)


def test_files_of_a_run(trained):
    out = sample.sample(options(run=str(trained)))
    assert out == trained / "samples.npz"
    with np.load(out, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        images = file["arr_0"]
        assert images.shape == (10, 8, 8, 1) and images.dtype == np.uint8
        assert file["seeds"].tolist() == list(range(10))
        assert file["labels"].shape == (10,) and file["labels"].max() < 3
    assert about["options"]["sample_steps"] == 18 and "batch" not in about["options"]
    assert Image.open(trained / "samples.png").size == (1256, 144)
    assert read(str(out))[0].shape == (10, 1, 8, 8)
    stamp = out.stat().st_mtime_ns
    assert sample.sample(options(run=str(trained))) == out and out.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="seeds: '0-9' there, '0-3' asked"):
        sample.sample(options(run=str(trained), seeds="0-3"))
    early = sample.sample(options(run=str(trained / "snapshot-00000001.safetensors")))
    assert early == trained / "samples-00000001.npz"


def test_guidance(monkeypatch):
    """Weight 1 gives the samples of no guidance, by half the evaluations; weight 0 those without a label."""
    D, forward, calls, drawn = network("ddpmpp"), denoiser.Denoiser.forward, [], {}

    def counted(D, x, sigma, labels=None):
        calls.append(labels is not None)
        return forward(D, x, sigma, labels)
    monkeypatch.setattr(denoiser.Denoiser, "forward", counted)
    for weight in (None, 1.0, 2.0, 0.0):
        sampling = Sampling(sample_steps=3, **{} if weight is None else dict(guidance=weight))
        calls.clear()
        drawn[weight], _ = sample.generate(D, range(8), [1] * 4, sampling=sampling)
        assert calls == ([True] * 5 if weight in (None, 1.0) else [False, True] * 5)
    assert torch.equal(drawn[None], drawn[1.0]) and not torch.equal(drawn[1.0], drawn[2.0])
    free, _ = sample.generate(D, range(8), sampling=Sampling(sample_steps=3))
    assert torch.equal(drawn[0.0], free) and not torch.equal(drawn[1.0], free)


def test_samples_of_another_sampler_are_refused(trained, tmp_path):
    how = dict(run=str(trained), seeds="0-3", sample_steps=3)
    out = sample.sample(options(**how, out=str(tmp_path / "a.npz")))
    for given in (dict(sampler="euler"), dict(churn=1.0), dict(guidance=2.0)):
        with pytest.raises(ValueError, match=f"{min(given)}: .* there, .* asked"):
            sample.sample(options(**how, **given, out=str(out)))
    with pytest.raises(ValueError, match="--guidance 2 weighs a label against none"):
        sample.sample(options(optimum=True, data="digits", n=20, guidance=2.0, out=str(tmp_path / "o.npz")))
    given = dict(optimum=True, data="digits", n=20, labels="true", guidance=0.0)
    with np.load(sample.sample(options(**given, out=str(tmp_path / "o.npz")))) as file:
        images = data.load(data.Options(data="digits", n=20)).images
        free, _ = sample.generate(Optimum(images), range(10))
        assert np.array_equal(file["arr_0"], free.permute(0, 2, 3, 1))


def test_the_snapshot_of_least_loss_on_held_out_images(tmp_path, trained):
    with pytest.raises(ValueError, match="no loss on held-out images; train with --validate"):
        sample.sample(options(run=str(trained), snapshot="best-validation"))
    out = tmp_path / "run"
    train.train(train.Options(**TRAINING | dict(steps=6, snapshots=3), validate=10, out=str(out)))
    files = disk.Directory(out)
    for path, loss in zip(files.snapshots(), (2.0, 1.0, 3.0), strict=True):
        weights, metadata = checkpoint.read(path)
        assert metadata["validation_loss"] > 0
        checkpoint.write(path, weights, metadata | dict(validation_loss=loss))
    assert sample.best(files) == files.snapshot(4)
    how = dict(run=str(out), seeds="0-1", sample_steps=2)
    assert sample.sample(options(**how, snapshot="best-validation")) == out / "samples-00000004.npz"
    assert sample.sample(options(**how)) == out / "samples.npz"


def test_stale_samples_are_refused(trained, tmp_path):
    out = sample.sample(options(run=str(trained), out=str(tmp_path / "a.npz")))
    with pytest.raises(ValueError, match="weights_sha256"):
        sample.sample(options(run=str(trained / "snapshot-00000001.safetensors"), out=str(out)))


def test_torn_samples_are_named(trained, tmp_path):
    for content in (b"", b"torn"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match="a.npz is not a whole file of these scripts"):
            sample.sample(options(run=str(trained), out=str(tmp_path / "a.npz")))
    whole = bytearray(sample.sample(options(run=str(trained), out=str(tmp_path / "b.npz"))).read_bytes())
    whole[300] ^= 1  # a pixel
    (tmp_path / "b.npz").write_bytes(whole)
    with pytest.raises(ValueError, match="b.npz is not a whole file of these scripts"):
        sample.sample(options(run=str(trained), out=str(tmp_path / "b.npz")))


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
    (dict(), "nothing to sample from"), (dict(run="x", n=7, labels="true"), "leave out --n, --labels"),
    (dict(run="x", out="x.png"), "must end in .npz"),
    (dict(run="x", seeds="99999999999"), "below 2\\^32"),
    (dict(run="nowhere"), "no trained model at nowhere"), (dict(run="x", sample_steps=1), "sample-steps"),
    (dict(run="x", sigma_min=90.0), "sigma_min"), (dict(run="x", n=-1), "--n -1 must be 0 or more")])
def test_bad_options(given, words):
    with pytest.raises(ValueError, match=words):
        sample.sample(options(**given))


def test_a_model_of_another_run_is_refused(tmp_path, trained):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(trained / name, tmp_path / name)
    o = sample.Options(run=str(tmp_path), seeds="0-1", sample_steps=2, device="cpu")
    weights, metadata = checkpoint.read(tmp_path / "model.safetensors")
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
