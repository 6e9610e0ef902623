"""A trained model beside the optimum: of a nearly untrained model, everything about the optimum is known."""
import numpy as np
import pytest
import torch
from PIL import Image

import data
import disk
import train
from kernels import Optimum
from kernels.optimum import optimum_reference
from measure import denoisers
from paper import compare

TRAINING = dict(data="digits", n=20, width=4, blocks=1, channel_mult=(1, 1), batch=16, steps=2, snapshots=1,
                device="cpu")
# Relative: `Optimum` is within 1e-5 of the float64 form, and most of its loss is at large sigma
SAME_LOSS = 1e-6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "plain"
    train.train(train.Options(**TRAINING, out=str(out)))
    return out


def options(trained, **given):
    return compare.Options(**dict(dict(run=str(trained), sample_count=70, draws=40, device="cpu"), **given))


def mean_losses(nets, images, draws, seed=0):
    found = denoisers.losses(nets.values(), data.Images(images, None, 0, []), draws, seed)
    assert found.shape == (len(nets) + 1, len(denoisers.SIGMAS), draws)
    *loss, apart = found.mean(2).tolist()
    return dict(zip(nets, loss)), apart


def test_against_the_optimum(trained, tmp_path):
    path = compare.compare(options(trained, out=str(tmp_path / "compare.json")))
    result = disk.read_json(path)
    optimum, model = result["closed form"], result["trained"]
    assert optimum["ratio"] == 1 and model["ratio"] < 0.2 and optimum["samples"] == model["samples"] == 70
    assert result["images_outside"] == 1797 - 20
    # the least loss there is, where it is the optimum of these images
    for other in (model["loss"], optimum["loss_outside"]):
        assert all(a < b for a, b in zip(optimum["loss"], other))
    quantiles = optimum["distance_ratio_quantiles"]
    assert max(quantiles) < 1 / 3 and len(quantiles) == len(result["quantiles"])
    for name in ("trained", "closed-form"):
        with Image.open(tmp_path / f"compare-{name}.png") as image:
            assert image.width > 300
    before = path.stat()
    assert compare.compare(options(trained, out=str(path))) == path and path.stat() == before
    with pytest.raises(ValueError, match="other options or data .*draws"):
        compare.compare(options(trained, out=str(path), draws=41))
    other = tmp_path / "other"
    train.train(train.Options(**TRAINING | dict(n=10), out=str(other)))
    (other / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="model.safetensors is not of the run in"):
        compare.compare(options(other))


def test_losses_are_those_of_the_definition(trained):
    images = data.of_run(trained).images
    D = {"a": lambda x, sigma, _: optimum_reference(x.flatten(1), images.flatten(1), sigma).reshape(x.shape),
         "b": lambda x, sigma, labels: torch.zeros_like(x)}
    loss, apart = mean_losses(D, images, 300, seed=1)
    y = images[torch.arange(300) % 20].double() / 127.5 - 1
    assert loss["b"] == pytest.approx([float(y.square().mean())] * len(denoisers.SIGMAS))
    ours, _ = mean_losses({"a": Optimum(images), "b": D["b"]}, images, 300, seed=1)
    assert ours["a"] == pytest.approx(loss["a"], rel=SAME_LOSS, abs=1e-12)
    fewer, _ = mean_losses(D, images, 5)
    chosen = images[[0, 4, 8, 12, 16]].double() / 127.5 - 1
    assert fewer["b"][0] == pytest.approx(float(chosen.square().mean()))
    at = -1  # at the largest sigma the optimum is about the mean image
    assert loss["a"][at] == pytest.approx(float((y - y.mean(0)).square().mean()), rel=0.02) and apart[at] > 0
    assert np.diff(loss["a"]).min() > -1e-3 and loss["a"][0] < 1e-12


@pytest.mark.parametrize("labels, outside", [("true", 1797 - 20), ("unique", 0)])
def test_given_labels(tmp_path, labels, outside):
    """The optimum given an image's label knows it better; with a label for each image, at any noise."""
    train.train(train.Options(**TRAINING, labels=labels, out=str(tmp_path)))
    result = disk.read_json(compare.compare(options(tmp_path)))
    optimum, images = result["closed form"], data.of_run(tmp_path).images
    assert optimum["ratio"] == 1
    assert result["images_outside"] == outside and ("loss_outside" in optimum) == bool(outside)
    without, _ = mean_losses(dict.fromkeys("ab", Optimum(images)), images, 40)
    assert all(loss <= other + 1e-12 for loss, other in zip(optimum["loss"], without["a"]))
    assert optimum["loss"][-1] < 0.6 * without["a"][-1]  # 2 digits of a class, or 1, and not 20
    if labels == "unique":
        assert max(optimum["loss"]) == 0 and optimum["pixel_exact_copies"] == 70


def test_what_cannot_be_compared(trained, tmp_path):
    with pytest.raises(ValueError, match="not a run directory"):
        compare.compare(options(trained, run=str(tmp_path)))
    for given, words in ((dict(run=""), "give --run"), (dict(sample_count=0), "--sample-count 0")):
        with pytest.raises(ValueError, match=words):
            options(trained, **given)


def test_repeated_images_weigh_more(tmp_path):
    """Of the optimum, whose samples are as often of an image as that is shown."""
    train.train(train.Options(**TRAINING, repeat="20:0.2", out=str(tmp_path)))
    path = compare.compare(options(tmp_path, sample_count=300))
    found = disk.read_json(path)["closed form"]["repeated"]
    assert sum(found["copies"]) == 300 and found["images"] == [4, 16]
    assert found["interval"][0] < 20 < found["interval"][1] and found["interval"][0] > 10
