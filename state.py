"""What a training step changes: the optimizer, and the file with all that the next step needs."""
import os
import sys

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from run import differences
from tensors import read, write
from unet import load_weights

ADAM_EPS = 1e-8  # as published


class Optimizer:
    """torch's fused Adam, or its SGD, in place. Their classes in torch.optim import the compiler: 2 to 4 seconds."""

    def __init__(self, options, parameters):
        def zeros():
            return [torch.zeros_like(p) for p in parameters]
        self.options, self.parameters = options, parameters
        self.state = dict(momentum_buffer=zeros()) if options.optimizer == "sgd" else dict(
            exp_avg=zeros(), exp_avg_sq=zeros(), step=[torch.zeros((), device=p.device) for p in parameters])

    @torch.no_grad()
    def step(self, learning_rate):
        """One step by the gradients that are in place; the rate is a number, or a tensor on the same GPU."""
        o, gradients = self.options, [p.grad for p in self.parameters]
        if o.optimizer == "sgd":
            sgd(self.parameters, gradients, self.state["momentum_buffer"], momentum=o.momentum, dampening=0.0, nesterov=False,
                maximize=False, weight_decay=o.weight_decay, lr=learning_rate,
                **{"fused" if isinstance(learning_rate, torch.Tensor) else "foreach": True})
        else:
            adam(self.parameters, gradients, self.state["exp_avg"], self.state["exp_avg_sq"], [], self.state["step"],
                 amsgrad=False, beta1=o.momentum, beta2=o.beta2, eps=ADAM_EPS, weight_decay=o.weight_decay,
                 maximize=False, lr=learning_rate, fused=True)


@torch.no_grad()
def average(ema, parameters, weight):
    """ema += weight (parameters - ema), in place; the weight is a number, or a tensor on the same GPU."""
    if not isinstance(weight, torch.Tensor):
        return torch._foreach_lerp_(ema, parameters, weight)
    change = torch._foreach_sub(parameters, ema)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(ema, change)


def save(path, net, ema, optimizer, **about):
    """Publish all that the next step needs: weights, their average, the optimizer's state, the step.

    The state before it stays as state-previous.safetensors, should this one be damaged.
    """
    tensors = {f"net.{name}": t for name, t in net.model.state_dict().items()}
    tensors |= {f"ema.{name}": t for name, t in ema.items()}
    tensors |= {f"optimizer.{i}.{name}": t for name, all in optimizer.state.items() for i, t in enumerate(all)}
    if path.exists():
        previous(path).unlink(missing_ok=True)
        try:
            os.link(path, previous(path))  # so that there is a state at every moment
        except OSError:  # a file system without links
            os.replace(path, previous(path))
    write(path, tensors, about)


def previous(path):
    return path.with_stem(f"{path.stem}-previous")


def remove(path):
    """Remove a state and the one before it: the run is done."""
    for file in (path, previous(path)):
        file.unlink(missing_ok=True)


def load(path, net, ema, optimizer, about, defaults):
    """Put a saved state in place; returns its step and the seconds trained so far, or 0, 0 if there is none.

    `about` has the options and the data of this run, `defaults` the values of options that a file does not know. A
    damaged state is named on stderr, and the one before it taken.
    """
    problems, latest = [], path
    for path in (latest, previous(latest)):
        if not path.exists():
            continue
        try:
            tensors, there = read(path)
            if "step" not in there:
                raise ValueError(f"{path} was written by another version of these scripts; remove it")
            if different := differences(there, about, defaults):
                raise ValueError(f"{path} is the state of another run ({different}); remove it")
            step, seconds = int(there["step"]), float(there["seconds"])
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print(f"{problem}. Going on from {path}, step {step}", file=sys.stderr)
        if problems:
            os.replace(path, latest)  # or the next save would put the damaged one in its place
        load_weights(net, {name[4:]: t for name, t in tensors.items() if name.startswith("net.")})
        for name, t in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "ema":
                ema[rest].copy_(t)
            elif kind == "optimizer":
                i, key = rest.split(".")
                optimizer.state[key][int(i)].copy_(t)
        return step, seconds
    if problems:
        raise ValueError(f"{'; '.join(problems)}: without them it trains from the start")
    return 0, 0.0
