"""A training step: which images, which learning rate and EMA rate, and what it does to the weights.

All that happens in step k depends on (seed, k) alone, so that a run goes on anywhere.
"""
import copy
import hashlib
import sys
from functools import lru_cache

import numpy as np
import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

import parallel
from images import augment
from kernels.graphs import Replayed

ADAM_EPS = 1e-8  # as published
NEWTON_SCHULZ, ITERATIONS, NORM_EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7  # Muon's, as published
ADAM_RMS = 0.2   # root mean square of an update of Adam over its rate; Muon's is given the same


def schedule(options, n, step):
    """Learning-rate factor and EMA rate (weight of the old average) at a step, counted from 0.

    As published, the first step has rate 0, and beta = 0.5^(1 / half-life) with a half-life that rises
    from 0 over the first 200 epochs: 0.99929 thereafter at any |D| and batch. An `ema_rate` takes the
    place of 0.99929 and rises in the same way.
    """
    epoch = step * options.batch / n

    def progress(epochs, steps):  # 0 to 1 over the given epochs, or steps
        done, span = (epoch, epochs) if steps is None else (step, steps)
        return min(done / span, 1.0) if span > 0 else float(step > 0)

    halflife = options.ema_halflife * progress(options.ema_rampup_epochs, options.ema_rampup_steps)
    beta = 0.5 ** (1 / halflife) if halflife > 0 else 0.0
    if options.ema_rate is not None and beta:
        beta *= options.ema_rate / 0.5 ** (1 / options.ema_halflife)
    return progress(options.warmup_epochs, options.warmup_steps), beta


def seed_of(*parts):
    """A seed of 32 bits (all that torch's CPU generator takes) from numbers and words, well spread."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest(), "big")


@lru_cache(maxsize=64)
def _order(n, seed, epoch, device):
    return torch.from_numpy(np.random.RandomState(seed_of(seed, "order", epoch)).permutation(n)).to(device)


def batch_index(n, batch, step, seed, reshuffle=False, device="cpu"):
    """The images (int64 [batch]) of a step: the data in an order drawn by seed, read round and round."""
    first = step * batch
    epochs = range(first // n, (first + batch - 1) // n + 1)
    order = torch.cat([_order(n, seed, epoch if reshuffle else 0, device) for epoch in epochs])
    return order[first % n:][:batch]


class Work:
    """The steps of a run on D (data.Images), in place: `take(step)`, `at_once` images in memory at a time.

    On a GPU that is as many as fit, found by the first step, unless --batch-device gives one;
    and from the third step on the work of a step is replayed as a CUDA graph.
    """

    def __init__(self, options, net, D):
        self.options, self.net = options, net
        parameters = dict(net.model.named_parameters())
        self.parameters = list(parameters.values())
        self.ema = {name: p.detach().clone() for name, p in parameters.items()}
        self.optimizer = Optimizer(options, self.parameters, net.model.matrices())
        self.device = self.parameters[0].device
        self.images = D.images.to(self.device)
        self.labels = D.labels.to(self.device) if D.label_dim else None
        self.shown = torch.arange(len(D))[D.shown].to(self.device)
        self.at_once = options.batch_device or options.batch
        self.may_shrink = not options.batch_device and parallel.size() == 1
        self.replayed = Replayed(self.images.is_cuda and parallel.size() == 1)

    def take(self, step):
        """Take one step; returns without waiting its mean loss and gradient norm [2].

        All randomness comes from (seed, step). With another `at_once`, or several processes, noise is the
        same; dropout, which is drawn in the forward pass, does not.
        """
        o, self.step = self.options, step
        turn = batch_index(len(self.shown), o.batch, step, o.seed, o.reshuffle, self.device)
        index = self.shown[turn]
        factor, beta = schedule(o, len(self.images), step)
        numbers = self.numbers(o.learning_rate * factor, 1 - beta)
        while True:
            torch.manual_seed(seed_of(o.seed, step))
            try:
                return self.replayed(self.run, index, *numbers)
            except RuntimeError as error:
                # the first is torch's, the second cuBLAS's
                full = isinstance(error, torch.OutOfMemoryError) or "_ALLOC_FAILED" in str(error)
                if not full or not self.may_shrink or self.at_once == 1:
                    raise
            self.shrink()  # here, where nothing holds the memory of what failed

    def numbers(self, *numbers):
        """As the work takes them: on a GPU tensors, for a graph would replay the numbers of its recording."""
        on_gpu = self.device.type == "cuda"
        return [torch.full((), x, device=self.device) if on_gpu else x for x in numbers]

    def shrink(self):
        """Halve `at_once`, to a divisor of the batch."""
        batch = self.options.batch
        self.at_once = next(part for part in range(self.at_once // 2, 0, -1) if batch % part == 0)
        self.net.zero_grad(set_to_none=True)
        if self.images.is_cuda:
            torch.cuda.empty_cache()

    def rest(self):
        """Give back the memory that a graph holds between steps: a sampler wants it."""
        self.replayed.forget()
        self.net.zero_grad(set_to_none=True)

    def run(self, index, rate, weight):
        """The work on images `index` [batch]; `weight` is that of the new weights in their average."""
        loss = self.gradients(index)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters])
        if self.may_shrink and self.at_once < self.options.batch:
            print(f"--batch {self.options.batch} does not fit into memory at once: "
                  f"{self.at_once} images at a time, with the same gradients", file=sys.stderr, flush=True)
        self.may_shrink = False  # the weights change from here on
        self.optimizer.step(rate)
        average(list(self.ema.values()), self.parameters, weight)
        return torch.stack([loss, norm])

    def gradients(self, index):
        """Put the gradients of the batch in place, part by part; returns its mean loss."""
        y = self.images[index].float() / 127.5 - 1                              # [B, C, H, W]
        sigma = self.net.objective.training_sigma(len(y), device=y.device)
        noise = torch.randn_like(y)
        labels = None if self.labels is None else self.labels[index]
        if drop := self.options.label_dropout:  # -1 is no label
            labels = labels.masked_fill(torch.rand(len(y), device=y.device) < drop, -1)
        if self.options.flip:
            mirrored = torch.rand(len(y), 1, 1, 1, device=y.device) < 0.5
            y = torch.where(mirrored, y.flip(-1), y)
        how = None
        if self.options.augment:
            how = augment.draw(len(y), self.options.augment, y.device)          # [B, 9]
            y = augment.warp(y, how)
        if parallel.size() > 1:
            torch.manual_seed(seed_of(self.options.seed, self.step, parallel.rank()))  # of dropout
        total = torch.zeros((), device=y.device)
        self.net.zero_grad(set_to_none=True)
        mine = parallel.share(len(y))
        for i in range(mine.start, mine.stop, self.at_once):
            part = slice(i, min(i + self.at_once, mine.stop))
            given = [each if each is None else each[part] for each in (labels, how)]
            each = self.net.loss(y[part], sigma[part], noise[part], *given)     # [part]
            if skip := self.options.sigma_skip:
                each = each * ((sigma[part] <= skip[0]) | (sigma[part] >= skip[1]))
            loss = each.sum() / len(y)
            loss.backward()
            total += loss.detach()
        if parallel.size() > 1:
            for tensor in (total, *(p.grad for p in self.parameters)):
                parallel.summed(tensor)
        return total


class Optimizer:
    """torch's fused Adam, or its SGD, in place; or Muon for `matrices` and Adam for the other parameters.

    The functions, because their classes in torch.optim import the compiler, which takes 2 to 4 seconds.
    """

    def __init__(self, options, parameters, matrices=()):
        def zeros(some):
            return [torch.zeros_like(p) for p in some]
        self.options, self.matrices = options, list(matrices) if options.optimizer == "muon" else []
        apart = {id(p) for p in self.matrices}
        self.parameters = [p for p in parameters if id(p) not in apart]
        if options.optimizer == "sgd":
            self.state = dict(momentum_buffer=zeros(self.parameters))
        else:
            self.state = dict(
                exp_avg=zeros(self.parameters), exp_avg_sq=zeros(self.parameters),
                step=[torch.zeros((), device=p.device) for p in self.parameters],
                momentum_buffer=zeros(self.matrices))

    @torch.no_grad()
    def step(self, learning_rate):
        """One step by the gradients that are in place; the rate is a number, or a tensor on the same GPU."""
        o, gradients = self.options, [p.grad for p in self.parameters]
        if o.optimizer == "sgd":
            sgd(self.parameters, gradients, self.state["momentum_buffer"],
                momentum=o.momentum, dampening=0.0, nesterov=False, maximize=False,
                weight_decay=o.weight_decay, lr=learning_rate,
                **{"fused" if isinstance(learning_rate, torch.Tensor) else "foreach": True})
        else:
            if self.matrices:
                muon(self.matrices, self.state["momentum_buffer"], learning_rate, o.momentum, o.weight_decay)
            adam(self.parameters, gradients,
                 self.state["exp_avg"], self.state["exp_avg_sq"], [], self.state["step"],
                 amsgrad=False, beta1=o.momentum, beta2=o.beta2, eps=ADAM_EPS, weight_decay=o.weight_decay,
                 maximize=False, lr=learning_rate, fused=True)


@torch.no_grad()
def muon(parameters, buffers, rate, momentum, weight_decay):
    """A step of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with Nesterov momentum.

    A convolution [K, C, k, k] is a matrix [K, C k k]. Updates have the size of Adam's (Liu et al. 2025, arXiv
    2502.16982), so that a rate serves for both. In place. torch's own takes no rate that is a tensor, and a
    graph of a GPU needs one.
    """
    gradients = [p.grad for p in parameters]
    torch._foreach_lerp_(buffers, gradients, 1 - momentum)
    for p, g in zip(parameters, torch._foreach_lerp(gradients, buffers, momentum)):
        g = g.flatten(1)
        update = orthogonalized(g).view(p.shape) * (ADAM_RMS * max(g.shape)**0.5)
        p.mul_(1 - rate * weight_decay).sub_(rate * update)


def orthogonalized(g):
    """About U V^T of g = U S V^T [m, n]: singular values that are not tiny come to between 0.68 and 1.14.

    By products alone, and on a GPU in bfloat16, as published.
    """
    a, b, c = NEWTON_SCHULZ
    x = g.bfloat16() if g.is_cuda else g
    x = (x.T if len(g) > g.shape[1] else x) / x.norm().clamp(min=NORM_EPS)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if len(g) > g.shape[1] else x).to(g.dtype)


@torch.inference_mode()
def validation_loss(work, D):
    """The mean denoising loss of the averaged weights on held-out images `D` (data.Images), without dropout.

    Noise levels are drawn as in training, once an image, and by the seed alone: each snapshot gets the same.
    """
    device, twin = work.device, copy.deepcopy(work.net).eval()
    twin.model.load_state_dict({**work.net.model.state_dict(), **work.ema})
    generator = torch.Generator().manual_seed(seed_of(work.options.seed, "validation"))
    sigma = twin.objective.training_sigma(len(D), generator)
    noise, total = torch.randn(D.images.shape, generator=generator), 0.0
    for i in torch.arange(len(D)).split(work.at_once):
        y = D.images[i].to(device).float() / 127.5 - 1                          # [B, C, H, W]
        labels = D.labels[i].to(device) if D.label_dim else None
        total += float(twin.loss(y, sigma[i].to(device), noise[i].to(device), labels).double().sum())
    return total / len(D)


@torch.no_grad()
def average(ema, parameters, weight):
    """ema += weight (parameters - ema), in place; the weight is a number, or a tensor on the same GPU."""
    if not isinstance(weight, torch.Tensor):
        return torch._foreach_lerp_(ema, parameters, weight)
    change = torch._foreach_sub(parameters, ema)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(ema, change)
