"""Several processes under torchrun: this one's part of the work, and the parts brought together.

    torchrun --standalone --nproc-per-node=2 -- train.py --data cifar10 --n 1000 --out runs/n1000

(The bare -- keeps torchrun from reading --n as its own.) Started any other way there is one process, rank 0
of 1, and everything here does nothing. Only rank 0 writes; several machines need one file system.
"""
import contextlib

import torch
import torch.distributed as dist

from run import rank, size


@contextlib.contextmanager
def group(device):
    """Join the other processes, over nccl on GPUs and gloo on CPUs, until the end of the block."""
    if size() == 1:
        yield
        return
    try:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)  # which the first barrier would guess
        else:
            dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:  # a port in use, an unknown name, a missing variable
        raise ValueError(f"cannot join the other processes ({str(error).splitlines()[0]}); "
                         "start them with torchrun --standalone, or with another --master-port") from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(count):
    """The slice of `count` items that falls to this process, in order and near equal."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def gather(part):
    """All items on the CPU of every process, each of which holds its `share` of them along dimension 0."""
    if size() == 1:
        return part.cpu()
    parts = [None] * size()
    dist.all_gather_object(parts, part.cpu())
    return torch.cat(parts)


def total(value, device):
    """The sum of a number over all processes."""
    return summed(torch.tensor(float(value), dtype=torch.float64, device=device)).item()


def summed(tensor):
    """A tensor, added up over all processes in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier():
    """Wait for all processes."""
    if size() > 1:
        dist.barrier()
