"""Images and vectors that memorize.py compares, and what it refuses to."""
import numpy as np
import pytest
import torch

import data
import memorize
from measure import sides


def options(**given):
    return memorize.Options(**dict(samples="digits", train="digits", device="cpu") | given)


def save(path, array, **more):
    np.savez(path, features=array, **more)
    return str(path)


def test_the_rest_of_a_source():
    _, train, held_out = sides.sides(options(n=100, subset_seed=3, held_out="rest"))
    D = data.load(data.Options(data="digits", n=100, subset_seed=3))
    assert torch.equal(train.values, D.images) and len(held_out.values) == 1697
    everything = {*train.names, *held_out.names}
    assert len(everything) == 1797 and not {*train.names} & {*held_out.names}
    with pytest.raises(ValueError, match="have no images but the 1797 of the training set; name a source"):
        sides.sides(options(held_out="rest"))


def test_the_rest_of_a_run_with_random_labels(tmp_path):
    import train
    out = str(tmp_path / "run")
    train.train(train.Options(data="digits", n=20, classes=2, labels="random:3", width=4, blocks=1, steps=1,
                              batch=4, channel_mult=(1, 1), out=out, device="cpu"))
    _, D, held_out = sides.sides(options(train=out, held_out="rest"))
    whole = data.load(data.Options(data="digits", classes=2))
    assert torch.equal(torch.cat([D.values, held_out.values]), whole.images)


def test_duplicates_are_dropped_with_their_names(tmp_path, noise):
    images = noise(6, 8, 8)
    images[4] = images[1]
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(6) % 3)
    _, train, _ = sides.sides(options(train=str(tmp_path / "a.npz"), distinct=True))
    assert train.names == [f"a.npz/{i:05d}" for i in (0, 1, 2, 3, 5)]
    assert torch.equal(train.images, train.values)


def test_vectors(tmp_path):
    x = np.random.RandomState(0).standard_normal((5, 3)).astype(np.float16)
    assert torch.equal(sides.vectors(save(tmp_path / "a.npz", x)), torch.from_numpy(x.astype(np.float32)))
    np.savez(tmp_path / "b.npz", whatever=x.astype(np.float64))
    assert sides.vectors(tmp_path / "b.npz").dtype == torch.float64
    np.savez(tmp_path / "c.npz", other=x[:1], arr_0=x)
    assert len(sides.vectors(tmp_path / "c.npz")) == 5


@pytest.mark.parametrize("array, words", [
    (np.array([[1.0, np.nan], [0, 1]]), "1 vectors are not finite, the first of them number 0"),
    (np.array([[1.0, 2], [0, np.inf]]), "number 1; extract these again"),
    (np.zeros((3, 4), np.uint8), r"features are uint8 \[3, 4\]; save floats"),
    (np.zeros((3, 2, 2)), "save floats"), (np.zeros((0, 4)), "save floats"),
    (np.array([dict(a=1)], dtype=object), "allow_pickle")])
def test_vectors_that_are_none(tmp_path, array, words):
    with pytest.raises(ValueError, match=words):
        sides.vectors(save(tmp_path / "a.npz", array))


def test_files_that_hold_none(tmp_path):
    (tmp_path / "torn.npz").write_bytes(b"PK")
    np.savez(tmp_path / "two.npz", a=np.eye(2), b=np.eye(2))
    np.savez(tmp_path / "none.npz")
    for name, words in (("torn", "torn.npz cannot be read"),
                        ("two", "a, b; call one features"), ("none", "arrays: none"),
                        ("missing", "missing.npz cannot be read")):
        with pytest.raises(ValueError, match=words):
            sides.vectors(tmp_path / f"{name}.npz")


def test_vectors_of_other_lengths_or_counts(tmp_path):
    a, b = save(tmp_path / "a.npz", np.eye(4)), save(tmp_path / "b.npz", np.eye(5))
    given = dict(samples="", train="", sample_features=a)
    with pytest.raises(ValueError, match="a.npz/00000 and the like have 4 values, training vectors 5"):
        sides.sides(options(**given, train_features=b))
    with pytest.raises(ValueError, match="b.npz/00000 and the like have 5 values, training vectors 4"):
        sides.sides(options(**given, train_features=a, held_out=b))
    with pytest.raises(ValueError, match="a.npz has 4 vectors for 10 images; give one for each image"):
        sides.sides(options(sample_features=b, train_features=a, samples="", train="digits", n=10))
    samples, train, held_out = sides.sides(options(**given, train_features=a, held_out=a))
    assert samples.names[2] == "a.npz/00002" and samples.images is None and len(held_out.values) == 4
