import pytest
import torch

import checkpoint
import data
import train
from diffusion import denoiser
from diffusion.steps import Work


def made(seed=0):
    """The work on a tiny network, whose average is not its weights."""
    net = denoiser.Denoiser("ddpmpp", "vp", 8, 1, width=8, blocks=1,
                        generator=torch.Generator().manual_seed(seed))
    work = Work(train.Options(), net, data.load(data.Options(data="digits", n=2)))
    for average in work.ema.values():
        average.add_(1)
    return work


def test_a_state_puts_all_tensors_back(tmp_path):
    path, about = tmp_path / "state.safetensors", dict(options=dict(width=8))
    saved, other = made(), made(seed=1)
    saved.optimizer.state["exp_avg"][0].fill_(3.0)
    assert checkpoint.load_state(path, other, about, {}) == (0, 0.0)
    checkpoint.write(path, checkpoint.state(saved), dict(about, step=5, seconds=1.5))
    assert checkpoint.load_state(path, other, about, {}) == (5, 1.5)
    there, here = map(checkpoint.state, (saved, other))
    assert there.keys() == here.keys() and all(torch.equal(t, here[name]) for name, t in there.items())
    with pytest.raises(ValueError, match="other options or data .width: 8 there, 16 asked.*or remove it"):
        checkpoint.load_state(path, other, dict(options=dict(width=16)), {})
    tensors, stored = checkpoint.read(path)
    tensors.pop("optimizer.0.step")
    checkpoint.write(path, tensors, stored)
    with pytest.raises(ValueError, match="1 names or shapes differ, such as optimizer.0.step"):
        checkpoint.load_state(path, other, about, {})


def test_weights_may_be_read_by_others(tmp_path):
    checkpoint.write(tmp_path / "weights.safetensors", dict(a=torch.ones(2)), {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
