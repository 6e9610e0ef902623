import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from kernels import layers

# Of the largest value: a group of two values nearly the same divides their rounding by their distance
NEAR = 1e-4


def near(a, b):
    return float((a.double() - b).abs().max()) <= NEAR * max(1.0, float(b.abs().max()))


def draw(*shape, seed=0, channels_last=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def gradients(function, inputs):
    """What a function gives, and its inputs' gradients for a fixed gradient of it, in their precision."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, draw(*y.shape, seed=9).to(y.dtype))]


def compare(function, plain, inputs):
    fast, slow = gradients(function, inputs), gradients(plain, [x.double() for x in inputs])
    assert len(fast) == len(slow) and all(near(a, b) for a, b in zip(fast, slow))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(size=st.sampled_from([(1, 1), (2, 2), (1, 3), (4, 1), (2, 3), (4, 4), (8, 8)]),
       kernel=st.sampled_from([1, 3, 5]), batch=st.integers(1, 3), cin=st.integers(1, 5),
       cout=st.integers(1, 5), biased=st.booleans(), last=st.booleans())
def test_convolution_and_its_gradients_are_torchs(size, kernel, batch, cin, cout, biased, last):
    inputs = [draw(batch, cin, *size, channels_last=last), draw(cout, cin, kernel, kernel)]
    inputs += [draw(cout)] * biased
    compare(layers.conv2d, lambda *a: F.conv2d(*a, padding=kernel // 2), inputs)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(size=st.sampled_from([(1, 1), (2, 2), (3, 5), (8, 8)]), batch=st.integers(1, 3),
       groups=st.integers(1, 3), of_group=st.integers(2, 4), shifted=st.sampled_from([None, 1, "batch"]),
       silu=st.booleans(), dropout=st.sampled_from([0.0, 0.13]), last=st.booleans(),
       mean=st.sampled_from([0, 3]))
def test_norm_and_its_gradients_are_torchs(size, batch, groups, of_group, shifted, silu, dropout, last, mean):
    C = groups * of_group
    inputs = [draw(batch, C, *size, channels_last=last) + mean, draw(C, seed=1), draw(C, seed=2)]
    if shifted:
        inputs.append(draw(batch if shifted == "batch" else 1, C, seed=3))
    torch.manual_seed(5)
    mask = layers.image(layers.dropout_mask(inputs[0].numel(), dropout).view(batch, -1, C), inputs[0].shape)

    def plain(x, weight, bias, shift=None):
        h = F.group_norm(x if shift is None else x + shift[:, :, None, None], groups, weight, bias, 1e-3)
        return mask * (F.silu(h) if silu else h)

    def fast(x, weight, bias, shift=None):
        torch.manual_seed(5)
        return layers.norm(x, weight, bias, groups, 1e-3, shift, silu, dropout)

    compare(fast, plain, inputs)
    if not dropout:
        with torch.no_grad():
            assert near(fast(*inputs), plain(*(x.double() for x in inputs)))


def test_a_second_derivative_is_refused():
    x, one = draw(2, 8, 4, 4).requires_grad_(), torch.ones(8)
    g, = torch.autograd.grad(layers.norm(x, one, one, 2, 1e-6).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_a_large_mean_costs_no_precision():
    x = draw(2, 8, 8, 8, channels_last=True) + 1000
    y = layers.norm(x, torch.ones(8), torch.zeros(8), 2, 1e-6)
    exact = F.group_norm(x.double(), 2, eps=1e-6)
    assert (y - exact).abs().max() < 1e-3  # of values about 1; squares that cancel would be off by 0.1


def test_the_layout_stays_channels_last():
    x = draw(2, 8, 4, 4, channels_last=True).requires_grad_()
    for y in (layers.conv2d(x, draw(6, 8, 3, 3)), layers.conv2d(x, draw(6, 8, 1, 1)),
              layers.conv2d(x[:, :, :2, :2], draw(6, 8, 3, 3)),
              layers.norm(x, torch.ones(8), torch.zeros(8), 2, 1e-6, silu=True)):
        assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_other_precisions_take_the_plain_form():
    x = draw(2, 8, 4, 4)
    assert layers.fast(x) and not layers.fast(x.double()) and not layers.fast(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not layers.fast(x)
    assert layers.laid_out(x).is_contiguous(memory_format=torch.channels_last)
    assert layers.laid_out(x.double()).is_contiguous()
    one = torch.ones(8, dtype=torch.float64)
    y = layers.norm(x.double(), one, one, 2, 1e-6, shift=draw(2, 8).double(), silu=True, dropout=0.9)
    assert 0.5 < (y == 0).double().mean() < 1  # dropout is there too
    with torch.autocast("cpu", torch.bfloat16):
        assert 0.5 < (layers.norm(x, one.float(), one.float(), 2, 1e-6, dropout=0.9) == 0).float().mean() < 1


def test_sampling_and_training_share_what_is_kept_between_calls():
    layers.taps.cache_clear()
    layers.averaging.cache_clear()
    x, weight = draw(2, 4, 2, 2), draw(4, 4, 3, 3).requires_grad_()
    with torch.inference_mode():
        layers.norm(layers.conv2d(x, weight), torch.ones(4), torch.zeros(4), 1, 1e-6)
    layers.norm(layers.conv2d(x, weight), torch.ones(4), torch.zeros(4), 1, 1e-6).sum().backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("p", [0.13, 0.5, 0.9])
def test_dropout(p):
    torch.manual_seed(0)
    mask = layers.dropout_mask(1_000_003, p)  # a number that 4 does not divide
    assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-4)  # p is rounded to 1 / 65,536
    for part in (mask, mask[::4], mask[3::4]):  # of 4 in 64 bits
        share = (part > 0).float().mean()
        assert abs(share - (1 - p)) < 5 * (p * (1 - p) / 250_000) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(layers.dropout_mask(1_000_003, p), mask)


def test_triton_is_used_where_its_kernel_builds_and_is_right(monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda")
    assert layers.runs_triton(device, lambda device: True) and not recwarn
    assert not layers.runs_triton(device, lambda device: False)
    assert not layers.runs_triton(device, lambda device: 1 / 0)
    wrong, broken = (str(warning.message) for warning in recwarn)
    assert "(what it computes is wrong); plain forms serve" in wrong and "ZeroDivisionError" in broken

    def full(device):
        raise torch.OutOfMemoryError
    with pytest.raises(torch.OutOfMemoryError):  # says nothing of Triton
        layers.runs_triton(device, full)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not layers.runs_triton(device, full) and not layers.runs_triton(torch.device("cpu"), full)
