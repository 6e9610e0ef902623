"""Several processes under torchrun: this one's part of the work, and the parts brought together.

    torchrun --standalone --nproc_per_node=2 -- train.py --data cifar10 --n 1000 --out runs/n1000

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
    if size() == 1 or dist.is_initialized():
        yield
        return
    try:
        if device.type == "cuda":
            # without the device the first barrier guesses it, and warns that it does
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:  # a port in use, an unknown name, a missing variable
        raise ValueError(f"cannot join the other processes ({str(error).splitlines()[0]}); "
                         "start them with torchrun --standalone, or with another --master-port") from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(count, process=None):
    """The slice of `count` items that falls to a process (by default this one), in order and near equal."""
    process = rank() if process is None else process
    return slice(count * process // size(), count * (process + 1) // size())


def gather(part, count):
    """All `count` items as one tensor in every process, each of which holds its `share` along dimension 0."""
    if size() == 1:
        return part
    if part.dtype == torch.bool:  # not for every backend
        return gather(part.byte(), count).bool()
    longest = -(-count // size())
    padded = part.new_zeros(longest, *part.shape[1:])
    padded[:len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(parts, padded)
    shares = [share(count, process) for process in range(size())]
    return torch.cat([p[:s.stop - s.start] for p, s in zip(parts, shares)])


def total(value, device):
    """The sum of a number over all processes."""
    if size() == 1:
        return value
    return summed(torch.tensor(float(value), dtype=torch.float64, device=device)).item()


def summed(tensor):
    """A tensor, added up over all processes in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


class Loss(torch.nn.Module):
    """net.loss as a module's forward, which is what DistributedDataParallel wraps."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *arguments):
        return self.net.loss(*arguments)


def wrap(net, device):
    """net.loss with gradients averaged over all processes as they are made; None if there is one process."""
    if size() == 1:
        return None
    device_ids = [device] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(Loss(net), device_ids=device_ids)


def barrier():
    """Wait for all processes."""
    if size() > 1:
        dist.barrier()
