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


def test_copies_of_isolated_images():
    train = data.load(data.Options(data="digits", n=200)).images
    own = compared(train, train)[0][:, 1]
    isolated = own.argsort(descending=True)[:40]
    samples = torch.cat([train[isolated].repeat(3, 1, 1, 1), train[:20]]) ^ 1
    verdict, _, index = memorized(samples, train)
    found = which.which(verdict, index, own)
    counts = torch.bincount(index[verdict, 0], minlength=200)
    assert found["copied"] == int((counts > 0).sum()) and found["copied"] + found["never"] == 200
    assert found["most_copies"] == 4 and found["copies_nearest_interval_95"][0] > 0.5


def test_no_copy_at_all(noise):
    train, x = torch.from_numpy(noise(20, 1, 8, 8)), torch.from_numpy(noise(9, 1, 8, 8, seed=1))
    verdict, _, index = memorized(x, train)
    found = which.which(verdict, index, compared(train, train)[0][:, 1])
    assert (found["copied"], found["never"], found["copies_nearest_correlation"]) == (0, 20, None)
