"""Weights, and all that a training step changes, in safetensors files with a description and a checksum."""
import hashlib
import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import disk
from diffusion import denoiser


def load_model(path, device="cpu"):
    """The Denoiser of a snapshot file, in evaluation mode on `device`, and the file's metadata."""
    weights, metadata = read(path)
    try:
        # before memory is taken for what the file claims to hold
        check_shapes(denoiser.shapes(metadata["network"]), weights)
        D = denoiser.Denoiser(**metadata["network"])
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} describes no network of these scripts ({error}); "
                         "give a snapshot of train.py") from None
    D.model.load_state_dict(weights)
    return D.to(device).eval().requires_grad_(False), metadata


def check_shapes(there, tensors):
    """Raise ValueError, naming one, unless named tensors are those of a network: {name: shape}."""
    wrong = [name for name in there.keys() | tensors.keys() if name not in there or name not in tensors
             or there[name] != tuple(tensors[name].shape)]
    if wrong:
        raise ValueError(f"the weights do not fit the network: {len(wrong)} names or shapes differ, "
                         f"such as {min(wrong)}")


def state(work):
    """By name, all tensors that the next step of a `Work` needs: weights, their average, the optimizer's."""
    tensors = {f"net.{name}": t for name, t in work.net.model.state_dict().items()}
    tensors |= {f"ema.{name}": t for name, t in work.ema.items()}
    for name, each in work.optimizer.state.items():
        tensors |= {f"optimizer.{i}.{name}": t for i, t in enumerate(each)}
    return tensors


@torch.no_grad()
def load_state(path, work, about, defaults):
    """Put a saved state in place; returns its step and the seconds trained so far, or 0, 0 if there is none.

    `about` has this run's options and data, `defaults` the values of options that a file does not know.
    Raises ValueError for a state that is damaged or of another run.
    """
    if not disk.earlier(path, about, defaults):
        return 0, 0.0
    saved, there = read(path)
    tensors = state(work)
    check_shapes({name: tuple(t.shape) for name, t in tensors.items()}, saved)
    for name, t in tensors.items():
        t.copy_(saved[name])
    return there["step"], there["seconds"]


def write(path, tensors, about):
    """Write named tensors and a dict about them as safetensors, with a checksum of both."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = about | dict(sha256=digest(tensors, about))
    with disk.whole_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        # one entry: safetensors orders several at random, and equal snapshots would differ in their bytes
        try:
            save_file(tensors, temporary, dict(about=json.dumps(about)))
        except SafetensorError as error:  # a full disk, which is no OSError here
            raise OSError(f"{path} cannot be written ({error})") from None
        temporary.chmod(mode)  # safetensors makes a file of its own there, which others may not read


def read(path):
    """The tensors that `write` stored, and the dict about them. Raises ValueError if they are damaged."""
    about = disk.metadata(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); remove it") from None
    if about.get("sha256", "") not in ("", digest(tensors, about)):  # a file made by hand has none
        raise ValueError(f"{path} is damaged: its checksum differs; remove it")
    return tensors, about


def digest(tensors, about):
    """SHA-256 of named tensors on the CPU (names, dtypes, shapes, values) and of the dict about them."""
    sha = hashlib.sha256(json.dumps(about | dict(sha256=""), sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        sha.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        sha.update(t.contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()
