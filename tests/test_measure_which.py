"""Who is copied: against counts written out, simulation and scipy."""
import numpy as np
import pytest
import torch
from scipy import stats

import data
from kernels import memorized
from measure import which
from measure.neighbours import compared


def test_rank_correlation_and_its_interval():
    random = np.random.RandomState(0)
    a, b = (torch.from_numpy(random.poisson(3, 200)) for _ in range(2))
    rho, (low, high) = which.rank_correlation(a, b)
    ranks = [stats.rankdata(v.numpy()) for v in (a, b)]
    assert rho == pytest.approx(np.corrcoef(*ranks)[0, 1])
    half = 1.959964 * np.sqrt((1 + rho**2 / 2) / 197)
    assert (low, high) == pytest.approx((np.tanh(np.arctanh(rho) - half), np.tanh(np.arctanh(rho) + half)))
    assert which.rank_correlation(a, a) == (1.0, [1.0, 1.0])
    assert which.rank_correlation(a, torch.ones(200)) == (None, None)


def test_the_interval_holds_the_correlation_as_often_as_it_says():
    random, inside = np.random.RandomState(0), 0
    true = 6 / np.pi * np.arcsin(0.5 / 2)  # Spearman's of Gaussians with correlation 0.5
    for _ in range(400):
        a, b = random.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 60).T
        low, high = which.rank_correlation(torch.from_numpy(a.copy()), torch.from_numpy(b.copy()))[1]
        inside += low <= true <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_uniform_draws_touch_so_many():
    assert which.drawn(1, 10) == (pytest.approx(1), pytest.approx(0, abs=1e-7))
    assert which.drawn(0, 10)[0] == 0
    random = np.random.RandomState(0)
    touched = [len(set(random.randint(0, 50, 80))) for _ in range(4000)]
    mean, deviation = which.drawn(80, 50)
    assert np.mean(touched) == pytest.approx(mean, abs=0.15)
    assert np.std(touched) == pytest.approx(deviation, rel=0.05)


def around(train):
    """Distances of training images to themselves and their ten nearest others."""
    return compared(train, train, 11)[0].double().sqrt()


def test_copies_of_isolated_images_and_of_a_class():
    images = data.load(data.Options(data="digits", n=200))
    train, classes = images.images, images.labels
    distances = around(train)
    isolated = distances[:, 1].argsort(descending=True)[:40]
    samples = torch.cat([train[isolated].repeat(3, 1, 1, 1), train[:20]]) ^ 1
    verdict, _, index = memorized(samples, train)
    found = which.which(verdict, index, distances, classes)
    counts = torch.bincount(index[verdict, 0], minlength=200)
    assert int(counts.sum()) == int(verdict.sum()) and found["copied"] == int((counts > 0).sum())
    assert found["copied"] + found["never"] == 200 and found["most_copies"] == 4
    assert found["copies_nearest_interval_95"][0] > 0.5 and found["copies_density_correlation"] > 0.4
    assert found["copied"] < found["copied_if_uniform_95"][0]
    rank = stats.spearmanr(counts, distances[:, 1:].mean(1)).statistic
    assert found["copies_density_correlation"] == pytest.approx(rank)
    means = [float(counts[classes == c].double().mean()) for c in range(10)]
    assert found["class_copies"] == pytest.approx(means)


def test_classes():
    counts, classes = torch.tensor([3, 4, 5, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    means, p = which.of_classes(counts, classes)
    assert means == pytest.approx([4, 1 / 3])
    assert p == pytest.approx(stats.kruskal([3, 4, 5], [0, 0, 1]).pvalue)
    assert which.of_classes(counts, classes * 0) == ([pytest.approx(13 / 6)], None)
    assert which.of_classes(counts * 0, classes) == ([0, 0], None)


def test_no_copy_at_all(noise):
    train, x = torch.from_numpy(noise(20, 1, 8, 8)), torch.from_numpy(noise(9, 1, 8, 8, seed=1))
    verdict, _, index = memorized(x, train)
    found = which.which(verdict, index, around(train), torch.zeros(20, dtype=torch.int64))
    assert (found["copied"], found["copied_if_uniform"], found["copies_nearest_correlation"]) == (0, 0, None)
