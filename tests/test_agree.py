"""Two trained models beside each other: numbers of small cases that are known, and of two runs on halves."""
import numpy as np
import pytest
from PIL import Image

import data
import disk
import train
from paper import agree

TRAINING = dict(data="digits", n=20, width=4, blocks=1, channel_mult=(1, 1), batch=16, steps=2, snapshots=1,
                device="cpu")


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for i in (1, 2):
        train.train(train.Options(**TRAINING, part=f"{i}/2", out=str(folder / str(i))))
    return folder


def options(folder, **given):
    usual = dict(run=str(folder / "1"), other=str(folder / "2"), sample_count=70, draws=40, device="cpu")
    return agree.Options(**usual | given)


def test_two_runs_on_halves(halves, tmp_path):
    path = agree.agree(options(halves))
    result = disk.read_json(path)
    with Image.open(halves / "1" / "agree.png") as image:
        assert image.width > 500
    denoisers = result["denoisers"]
    rest = len(data.load(data.Options(data="digits", part="1/2"))) - 20
    assert {name: d["images"] for name, d in denoisers.items()} == dict(first=20, second=20, neither=rest)
    for d in denoisers.values():  # two models that are nearly untrained, from the same initial weights
        assert all(0 < a < b for a, b in zip(d["apart"], d["loss"]["first"]))
    s = result["samples"]
    assert s["rms_a_seed"] < s["rms_two_seeds"] and s["count"] == 70 and result["ratios"] == [0, 0]
    assert (result["training_images"], result["shared_training_images"]) == ([20, 20], 0)
    assert "in both" not in agree.in_words(path)
    before = path.read_bytes()
    assert agree.agree(options(halves)) == path and path.read_bytes() == before
    with pytest.raises(ValueError, match="other options or data .*draws"):
        agree.agree(options(halves, draws=41))
    o = options(halves, other=str(halves / "1"), out=str(tmp_path / "a.json"))
    itself = disk.read_json(agree.agree(o))
    assert itself["shared_training_images"] == 20
    assert "20 images are in both training sets, of 20 and 20: " in agree.in_words(o.out)
    assert itself["samples"]["rms_a_seed"] == 0 and itself["samples"]["share"] == 1
    assert not any(d["apart"] != [0] * 16 for d in itself["denoisers"].values())


def test_images_in_both_training_sets(halves, tmp_path):
    images = data.load(data.Options(data="digits", n=20, part="1/2")).images.permute(0, 2, 3, 1).numpy()
    images[15:] = 255 - images[15:]   # 15 are shared,
    images[1] = images[0]             # 14 of them distinct
    np.savez(tmp_path / "some.npz", images=images)
    train.train(train.Options(**TRAINING | dict(data=str(tmp_path / "some.npz")), out=str(tmp_path / "run")))
    path = agree.agree(options(halves, other=str(tmp_path / "run"), out=str(tmp_path / "a.json")))
    assert disk.read_json(path)["shared_training_images"] == 14
    assert agree.in_words(path).startswith("14 images are in both training sets, of 20 and 20: ")
    older = {key: value for key, value in disk.read_json(path).items() if "training_images" not in key}
    disk.write_json(tmp_path / "older.json", older)  # of versions that did not count them
    assert "in both" not in agree.in_words(tmp_path / "older.json")


def test_what_cannot_be_compared(halves, tmp_path):
    for given, words in ((dict(other=""), "give --other"), (dict(run=""), "give --run"),
                         (dict(out="a.txt"), "must end in .json")):
        with pytest.raises(ValueError, match=words):
            options(halves, **given)
    for name, given in dict(a=dict(labels="true"), b=dict(resolution=4, channel_mult=(1,))).items():
        train.train(train.Options(**TRAINING | given, out=str(tmp_path / name)))
        with pytest.raises(ValueError, match="take runs alike in both"):
            agree.agree(options(halves, other=str(tmp_path / name)))
    with pytest.raises(ValueError, match="not a run directory"):
        agree.agree(options(halves, other=str(tmp_path)))
