"""Quality against formulas written out: those of prdc and torch-fidelity, which are not installed here."""
import numpy as np
import pytest
import scipy.linalg
import torch

from measure import quality
from measure.neighbours import nearest


def plain_prdc(real, fake, k):
    """The four shares from whole matrices of distances, as Naeem et al. publish them."""
    real, fake = (x.flatten(1).double() for x in (real, fake))

    def distances(x, y):
        return torch.stack([(row - y).square().sum(1).sqrt() for row in x])
    r, s = (distances(x, x).sort(1).values[:, k] for x in (real, fake))
    d = distances(real, fake)
    return dict(precision=float((d < r[:, None]).any(0).double().mean()),
                recall=float((d < s).any(1).double().mean()),
                density=float((d < r[:, None]).sum(0).double().mean()) / k,
                coverage=float((d.min(1).values < r).double().mean()))


def prdc(real, fake, k):
    return quality.prdc(quality.kind(real, k), quality.kind(fake, k), k)


def frechet(x, y):
    return quality.frechet(quality.kind(x, 1), quality.kind(y, 1))


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("floats", [False, True])
def test_prdc_as_written_out(noise, k, floats):
    real, fake = (torch.from_numpy(noise(n, 1, 4, 4, seed=n)) for n in (120, 90))
    real[100:] = real[100:] // 8  # a cluster that fakes miss
    fake[:20] = (fake[:20] > 127) * 255  # far from all
    fake[20:50], fake[50:60] = real[20:50] // 2 + 60, real[50:60]  # the latter exactly on borders of others
    if floats:
        real, fake = real.float() / 7, fake.float() / 7
    found, expected = prdc(real, fake, k), plain_prdc(real, fake, k)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert 0.1 < found["precision"] < 0.99 and 0.1 < found["recall"] < 0.99
    for name in expected:
        low, high = found[f"{name}_interval_95"]
        assert low < found[name] < high


def test_whole_numbers_that_float32_rounds():
    """A fake one unit inside the ball about a real image, of squares above 2^24."""
    real = torch.zeros(2, 3, 12, 12, dtype=torch.uint8)
    real[1].flatten()[:400], real[1].flatten()[400] = 255, 3          # |real 0 - real 1|^2 = 26,010,009
    fake = real[1].clone()
    fake.flatten()[400], fake.flatten()[401], fake.flatten()[402] = 2, 2, 0
    fake = torch.stack([fake, torch.full_like(fake, 128)])            # 26,010,008 from real 0
    assert quality.kind(real, 1).radius.tolist() == [26_010_009] * 2
    twice = quality.kind(real[:1].repeat(2, 1, 1, 1), 1, torch.tensor([26_010_009] * 2))
    found = quality.prdc(twice, quality.kind(fake, 1), 1)
    assert int((fake[0].double() - real[0].double()).square().sum()) == 26_010_008
    assert found["coverage"] == 1


def test_expected_density_and_coverage_of_one_distribution():
    """Naeem et al. 2020: density 1, coverage 1 - (N-1)...(N-k) / ((M+N-1)...(M+N-k))."""
    random, N, M, k = np.random.RandomState(0), 500, 400, 5
    found = [prdc(*(torch.from_numpy(random.standard_normal((n, 8))) for n in (N, M)), k)
             for _ in range(8)]
    i = np.arange(1, k + 1)
    expected = 1 - np.prod((N - i) / (M + N - i))
    assert np.mean([f["coverage"] for f in found]) == pytest.approx(expected, abs=0.01)
    assert np.mean([f["density"] for f in found]) == pytest.approx(1, abs=0.04)


def test_frechet_by_roots_of_matrices():
    random = np.random.RandomState(0)
    x = random.standard_normal((300, 12))
    y = random.standard_normal((200, 12)) @ random.standard_normal((12, 12))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    found = frechet(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(expected, rel=1e-9)
    assert frechet(torch.from_numpy(x), torch.from_numpy(x)) == pytest.approx(0, abs=1e-9)


def test_frechet_of_few_images_and_of_known_gaussians():
    x, y = (torch.from_numpy(np.random.RandomState(n).standard_normal((n, 40))) for n in (7, 9))
    a, b = (torch.cov(z.T) for z in (x, y))
    value, vector = torch.linalg.eigh(a)  # of rank 6: the root by its eigenvalues
    root = vector @ torch.diag(value.clamp(min=0).sqrt()) @ vector.T
    trace = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * trace
    assert frechet(x, y) == pytest.approx(float(expected), rel=1e-6)
    # N(0, 1) and N(3, 2^2) in one dimension: 3^2 + (2 - 1)^2
    line = torch.linspace(-3, 3, 1001, dtype=torch.float64)[:, None]
    line = (line - line.mean()) / line.std()
    assert frechet(line, 2 * line + 3) == pytest.approx(10)


def test_all_of_them_and_the_baseline(noise):
    train, held_out, x = (torch.from_numpy(noise(40, 1, 4, 4, seed=s)) for s in range(3))
    found = quality.against(train, held_out)(x)
    assert found["images"] == dict(samples=40, training=40, held_out=40)
    assert found["held_out_against_training"]["frechet"] == pytest.approx(frechet(held_out, train))
    assert found["training"]["coverage"] == plain_prdc(train, x, 5)["coverage"]
    assert found["held_out"]["recall"] == plain_prdc(held_out, x, 5)["recall"]
    assert set(quality.against(train)(x)) == {"nearest", "images", "training"}


def test_known_distances_are_not_measured_again(noise, monkeypatch):
    train, x = (torch.from_numpy(noise(40, 1, 4, 4, seed=s)) for s in range(2))
    expected, own, calls = quality.against(train)(x), nearest(train, train, 6)[0], []
    monkeypatch.setattr(quality, "nearest", lambda *of: calls.append(of) or nearest(*of))
    assert quality.against(train, own=own)(x) == expected
    assert [len(of) for of in calls] == [3] and calls[0][0] is not train  # of the samples alone
    monkeypatch.setattr(quality, "MOST", 30)  # those are of 40 images, and 30 are compared
    assert quality.against(train, own=own)(x) == quality.against(train)(x)


def test_radii_leave_an_image_itself_out(noise):
    x = torch.from_numpy(noise(30, 1, 4, 4))
    assert torch.equal(quality.kind(x, 3).radius, nearest(x, x, 4)[0][:, 3])
    assert quality.kind(x, 1).radius.min() > 0
    with pytest.raises(ValueError, match="more than 5 images of each kind, and here are 5"):
        quality.kind(x[:5])
