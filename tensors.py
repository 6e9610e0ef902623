"""Named tensors in safetensors files, with a dict about them and checksums of both. No code is read from a file."""
import hashlib
import json

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from run import publish, sealed, unsealed


def digest(tensors):
    """SHA-256 of named tensors on the CPU: names, dtypes, shapes and values."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        sha.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        sha.update(t.contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def write(path, tensors, about):
    """Publish named tensors and a dict about them as safetensors, with checksums of both."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = sealed(about | dict(tensors_sha256=digest(tensors)))
    with publish(path) as temporary:
        # one entry: safetensors writes several in random order, and equal snapshots would differ in their bytes
        save_file(tensors, temporary, dict(about=json.dumps(about)))


def read_about(path):
    """The dict that `write` stored. Raises ValueError if `path` is not such a file, or is damaged there."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); remove it") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path} is no safetensors file of these scripts")
    return unsealed(about, path)


def read(path):
    """The tensors that `write` stored, and the dict about them. Raises ValueError if they are damaged."""
    about = read_about(path)
    tensors = load_file(path)
    if about.get("tensors_sha256", "") not in ("", digest(tensors)):
        raise ValueError(f"{path} is damaged: the checksum of its tensors differs; remove it")
    return tensors, about
