"""Each kind of labels, in a training set and for held-out images."""
import numpy as np
import pytest
import torch

import data
from images.labels import are_drawn, label_count, nearest_cluster


def load(labels, n=60, **given):
    return data.load(data.Options(data="digits", n=n, labels=labels, **given))


CLASSES = load("true").labels


@pytest.mark.parametrize("labels, count", [
    ("none", 0), ("true", 10), ("permuted", 10), ("random:4", 4), ("coarse:3", 30), ("clusters:7", 7),
    ("unique", 60), ("unique:0.25", 16)])
def test_how_many_labels_there_are(labels, count):
    D = load(labels)
    assert D.label_dim == count == label_count(labels, 60, 10) and len(D.labels) == 60
    assert D.labels.dtype == torch.int64 and D.labels.min() >= 0
    assert torch.equal(D.labels, load(labels).labels) and torch.equal(D.images, load("none").images)
    assert are_drawn(labels) == (labels not in ("none", "true", "unique"))
    if are_drawn(labels):
        assert not torch.equal(D.labels, load(labels, label_seed=1).labels)
    assert count == 0 or D.labels.max() < count


def test_unique_labels():
    assert load("unique").labels.tolist() == list(range(60))


def test_random_labels_are_nested():
    assert set(load("random:4").labels.tolist()) == set(range(4))
    assert torch.equal(load("random:4").labels, load("random:4", n=90).labels[:60])


def test_permuted_labels_are_the_true_ones_at_other_images():
    found = load("permuted").labels
    assert torch.equal(found.bincount(), CLASSES.bincount())
    assert (found == CLASSES).float().mean() < 0.3  # of ten classes by chance 0.1


def test_coarse_labels_say_the_class():
    found = load("coarse:3", n=600).labels
    assert torch.equal(found // 3, load("true", n=600).labels)
    assert set((found % 3).tolist()) == {0, 1, 2} and torch.equal(load("coarse:3").labels, found[:60])


def test_a_share_of_unique_labels():
    found = load("unique:0.25").labels
    own = found[found < 15]
    assert sorted(own.tolist()) == list(range(15)) and (found == 15).sum() == 45
    assert (found[:15] == 15).any(), "which images they are is drawn"


def test_clusters_are_those_of_k_means():
    """At a minimum of k-means each image is nearest to the mean of its own cluster."""
    D = load("clusters:7", n=300)
    x = D.images.flatten(1).double()
    means = torch.stack([x[D.labels == k].mean(0) for k in range(7)])
    assert torch.equal(torch.cdist(x, means).argmin(1), D.labels)
    apart = (x - means[D.labels]).square().sum()
    assert apart < 0.7 * (x - x.mean(0)).square().sum()  # ten random groups leave 0.97


def test_clusters_that_are_plain_to_see():
    centres = np.repeat([[0], [120], [250]], [4, 3, 2], axis=0)
    images = torch.from_numpy((centres[..., None, None] + np.arange(4).reshape(2, 2)).astype(np.uint8))
    images[::2] += 1
    found = nearest_cluster(images, 9, 3, seed=0)
    assert [len(set(part.tolist())) for part in found.split([4, 3, 2])] == [1, 1, 1]
    assert len(found.unique()) == 3
    held_out = torch.cat([images, images[4:5] + 30])
    assert nearest_cluster(held_out, 9, 3, seed=0).tolist() == [*found.tolist(), int(found[4])]
    with pytest.raises(ValueError, match="clusters:7: the training set has 6 distinct images; take fewer"):
        nearest_cluster(images, 9, 7, seed=0)


@pytest.mark.parametrize("labels", ["permuted", "coarse:2", "clusters:7", "unique:0.5"])
def test_held_out_images_have_labels_of_the_training_set(labels):
    o = data.Options(data="digits", n=60, labels=labels)
    D = data.load(o)
    rest = data.outside(o, D)
    assert rest.label_dim == D.label_dim and len(rest) > 500
    assert set(rest.labels.tolist()) <= set(D.labels.tolist())
    if labels == "unique:0.5":
        assert (rest.labels == 30).all()
    if labels == "clusters:7":
        x, y = (side.images.flatten(1).double() for side in (rest, D))
        means = torch.stack([y[D.labels == k].mean(0) for k in range(7)])
        assert torch.equal(torch.cdist(x, means).argmin(1), rest.labels)


@pytest.mark.parametrize("labels, words", [
    ("coarse", "unknown"), ("coarse:0", "unknown"), ("clusters:-1", "unknown"), ("none:3", "unknown"),
    ("true:", "unknown"), ("unique:0", "unknown"), ("unique:0.0", "unknown"), ("unique:1", "unknown"),
    ("unique:nan", "unknown"), ("unique:half", "unknown"),
    ("unique:0.001", "gives 0 of 60 images"), ("unique:0.999", "gives 60 of 60 images"),
    ("clusters:61", "the training set has 60 distinct images")])
def test_bad_labels(labels, words):
    with pytest.raises(ValueError, match=f"--labels .?{labels}.*{words}"):
        load(labels)
