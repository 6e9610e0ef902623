import subprocess
import sys

import pytest
import torch

import data
import kernels.optimum
from conftest import ROOT
from kernels import Optimum
from kernels.optimum import LARGEST, base256, optimum_reference

SIGMAS = [0.002, 0.02, 0.1, 0.5, 2.0, 5.0, 20.0, 80.0]
SAME_MEAN = 1e-9    # two float64 forms that sum in another order, in [-1, 1] units
CLOSE_MEAN = 1e-5   # what `Optimum` promises
has_int8 = kernels.optimum.int8_products_are_exact(192)
needs_int8 = pytest.mark.skipif(not has_int8, reason="a CPU without VNNI: only the float64 form is used")


def posterior_mean(images, x, sigma):
    """Equation 3 as it is written, by differences."""
    y = images.double() / 127.5 - 1
    d = (x.double()[:, None] - y[None]).flatten(2).square().sum(2)
    sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1)
    return torch.einsum("bn,nchw->bchw", (-d / (2 * sigma**2)).softmax(1), y)


def noisy(images, sigma, seed=0):
    x = images.double() / 127.5 - 1
    generator = torch.Generator().manual_seed(seed)
    return x + sigma * torch.randn(x.shape, dtype=torch.float64, generator=generator)


@pytest.fixture
def hard(noise):
    """300 images with duplicates, one-pixel twins, all black and all white ones, and two nearly so."""
    images = torch.from_numpy(noise(300, 3, 8, 8))
    images[1] = images[0]
    images[3] = images[2]
    images[3, 0, 0, 0] ^= 1
    images[4:7], images[7:10] = 0, 255
    images[6, 1, 2, 3], images[9, 1, 2, 3] = 1, 254
    return images


@pytest.fixture
def forms(monkeypatch):
    """The calls of the float64 form, each with the count of images that its rows kept (None: all)."""
    calls, form = [], Optimum._float64_mean

    def counted(self, x, sigma, kept):
        calls.append(None if kept is None else int(kept.sum()))
        return form(self, x, sigma, kept)
    monkeypatch.setattr(Optimum, "_float64_mean", counted)
    return calls


@pytest.mark.parametrize("sigma", SIGMAS)
def test_posterior_mean(hard, sigma, monkeypatch):
    x = noisy(hard[:60], sigma)
    expected = posterior_mean(hard, x, sigma)
    found = Optimum(hard)(x, sigma)
    assert found.dtype == torch.float64 and found.shape == x.shape
    assert (found - expected).abs().max() < CLOSE_MEAN
    found = Optimum(hard)(x.float(), torch.full((60,), sigma))
    assert (found - posterior_mean(hard, x.float(), sigma)).abs().max() < CLOSE_MEAN
    small = Optimum(hard, block_bytes=200_000)  # many blocks of images and of queries
    assert small.rows < 10 and small.columns < 30
    assert (small(x, sigma) - expected).abs().max() < CLOSE_MEAN
    monkeypatch.setattr(kernels.optimum, "int8_products_are_exact", lambda D: False)
    for block_bytes in (2**28, 200_000):
        assert (Optimum(hard, block_bytes=block_bytes)(x, sigma) - expected).abs().max() < SAME_MEAN


@needs_int8
def test_which_form_is_used(hard, forms, monkeypatch):
    D = Optimum(hard)
    D(noisy(hard[10:30], 0.1), 0.1)
    assert forms.pop() == 20                        # each query has one candidate
    D(noisy(hard[10:30], 5.0), 5.0)
    D(noisy(hard[10:30], 80.0), 80.0)
    assert not any(forms)                           # digits alone
    D(noisy(hard[10:30], 0.1).fill_(torch.inf), 0.1)
    assert forms.pop() is None
    monkeypatch.setattr(kernels.optimum, "int8_products_are_exact", lambda D: False)
    Optimum(hard)(noisy(hard[10:30], 80.0), 80.0)
    assert forms.pop() is None


@needs_int8
@pytest.mark.parametrize("level", [0.0, 1 / 3, -1 / 255])
@pytest.mark.parametrize("sigma", [0.05, 0.6, 3.0, 12.0, 80.0])
def test_black_and_white_images_alone(level, sigma):
    """The most that an error of x can do: all its pixels round alike, and half of the weight is on white."""
    images = torch.zeros(64, 3, 16, 16, dtype=torch.uint8)
    images[::2] = 255
    x = torch.full((4, 3, 16, 16), level, dtype=torch.float64)
    x[1::2] *= 1e-3
    x[2:] += 0.1 * torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (Optimum(images)(x, sigma) - posterior_mean(images, x, sigma)).abs().max() < CLOSE_MEAN


def test_a_sigma_for_each_row_and_no_row_sees_another(hard):
    sigma = torch.logspace(-2.7, 1.9, 60, dtype=torch.float64)
    x = noisy(hard[:60], sigma[:, None, None, None])
    D = Optimum(hard)
    together = D(x, sigma)
    assert (together - posterior_mean(hard, x, sigma)).abs().max() < CLOSE_MEAN
    alone = torch.cat([D(x[i:i + 1], sigma[i]) for i in range(60)])
    assert (together - alone).abs().max() < SAME_MEAN


@pytest.mark.parametrize("int8", [pytest.param(True, marks=needs_int8), False])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_given_labels(hard, sigma, int8, monkeypatch):
    """The mean over the images of a row's label alone: of about 99 images, of two nearly equal, of one."""
    if not int8:
        monkeypatch.setattr(kernels.optimum, "int8_products_are_exact", lambda D: False)
    of_images = torch.arange(300) % 3
    of_images[[6, 9]], of_images[150] = 3, 5  # 4 is nobody's label
    labels = torch.tensor([0, 1, 2, 3, 5]).repeat(12)
    x = noisy(hard[:60], sigma)
    expected = torch.empty_like(x)
    for label in labels.unique():
        at = labels == label
        part = x[at].flatten(1), hard[of_images == label].flatten(1), torch.full((12, 1), sigma).double()
        expected[at] = optimum_reference(*part).reshape(12, 3, 8, 8)
    for D in (Optimum(hard, of_images), Optimum(hard, of_images, block_bytes=200_000)):
        assert (D(x, sigma, labels) - expected).abs().max() < CLOSE_MEAN
        assert (D(x, sigma) - posterior_mean(hard, x, sigma)).abs().max() < CLOSE_MEAN


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_label_for_each_image_returns_that_image(hard, sigma):
    labels = torch.arange(300).flip(0)
    found = Optimum(hard, torch.arange(300))(noisy(hard, sigma), sigma, labels)
    assert torch.equal(found, hard.flip(0).double() / 127.5 - 1)


def test_labels_that_no_image_has(hard):
    x = noisy(hard[:2], 1.0)
    with pytest.raises(ValueError, match="label 7: no training image has it"):
        Optimum(hard, torch.arange(300) % 3)(x, 1.0, torch.tensor([1, 7]))
    with pytest.raises(ValueError, match="images of this optimum have none"):
        Optimum(hard)(x, 1.0, torch.tensor([1, 1]))


@pytest.mark.parametrize("sigma", [1e-6, 0.002, 1.0, 80.0, 1e6])
def test_far_away_and_at_the_origin(hard, sigma):
    x = torch.zeros(6, 3, 8, 8, dtype=torch.float64)
    x[1], x[2], x[3], x[4, 0], x[5] = 1e6, -1e6, 1e-300, 1e9, 300.0
    found = Optimum(hard)(x, sigma)
    assert found.isfinite().all() and found.abs().max() <= 1 + CLOSE_MEAN
    level = torch.full((6, 1), sigma, dtype=torch.float64)
    expected = optimum_reference(x.flatten(1), hard.flatten(1), level).view(x.shape)
    assert (found - expected)[[0, 3, 5]].abs().max() < CLOSE_MEAN
    x[0, 0, 0, 0] = torch.nan
    assert Optimum(hard)(x, sigma)[0].isnan().all()


@needs_int8
@pytest.mark.parametrize("N, D", [(1, 5), (2, 1), (700, 7)])
def test_small_shapes_and_sums_in_parts(noise, N, D, monkeypatch):
    monkeypatch.setattr(kernels.optimum, "MAX_TERMS", 97)
    images = torch.from_numpy(noise(N, 1, 1, D))
    for sigma in SIGMAS:
        x = noisy(images[:5], sigma)
        assert (Optimum(images)(x, sigma) - posterior_mean(images, x, sigma)).abs().max() < CLOSE_MEAN


@pytest.mark.parametrize("digits", [2, 3, 4])
def test_digits(digits):
    largest = LARGEST[digits]
    a = torch.tensor([[-largest, largest, 0, -1, 127.5, 128, -129, 255.25, 32768, -32640]]).double()
    a = a.clamp(-largest, largest)
    dither = torch.linspace(0, 0.999, a.shape[1], dtype=torch.float64)
    parts = base256(a.clone(), dither, digits)
    assert len(parts) == digits and all(part.dtype == torch.int8 for part in parts)
    total = sum(part.long() * 256**j for j, part in enumerate(reversed(parts)))
    assert torch.equal(total, (a + dither).floor().long())


def test_real_images(cifar10k):
    images = data.load(data.Options(data=cifar10k, n=2000)).images
    D = Optimum(images)
    for sigma in (0.1, 3.2, 13.0, 80.0):
        x = noisy(images[:32], sigma)
        level = torch.full((32, 1), sigma, dtype=torch.float64)
        expected = optimum_reference(x.flatten(1), images.flatten(1), level)
        assert (D(x, sigma).flatten(1) - expected).abs().max() < CLOSE_MEAN


@pytest.mark.parametrize("sigma", [0.1, 10.0])
def test_memory_is_bounded(sigma):
    """128 queries and 30,000 images: their logits are 31 MB, the images as float64 184 MB."""
    code = f"""if True:
        import resource, torch
        from kernels import Optimum
        rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        images = torch.randint(0, 256, (30000, 3, 16, 16), dtype=torch.uint8)
        x = images[:128] / 127.5 - 1 + {sigma} * torch.randn(128, 3, 16, 16)
        Optimum(images[:2000])(x[:8], {sigma})  # what the libraries keep for themselves
        before = rss()
        Optimum(images, block_bytes=8 * 2**20)(x, {sigma})
        print(rss() - before)"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # MB: a copy of the images, the blocks, and what malloc leaves unused
    assert float(found.stdout) < 22 + 8 + 10
