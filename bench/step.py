"""Milliseconds a training step and images sampled a second, beside the paper's published code.

    git clone https://github.com/sail-sg/DiffMemorize peer
    python bench/step.py --peer peer [--data ../cifar10.zip]      27 minutes on 2 cores
    python bench/step.py                                          ours alone
    python bench/step.py --device cuda --peer peer                3 minutes on an H200, on paper

A step is forward, backward, optimizer and average of the weights, at the published settings (DDPM++, VP, two
blocks a resolution, dropout 0.13), on images that lie in memory for both: the peer's data loader, statistics
and gradient buckets are left out, in its favour. Each method has its own process, set up as its scripts do;
they take turns in blocks, and the median block counts. Sampling is timed over 2 Heun steps, 3 evaluations of
the network, and reported for 18 steps, 35 evaluations; each draws as many images at once as by default.

On a GPU the processes run one after the other, for two would share its memory, and each result is a line of
JSON. There each method takes as much of the batch at once as fits.
"""
import contextlib
import json
import multiprocessing
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import data
import sample
import train
from bench import machine
from diffusion import denoiser, steps
from diffusion.solvers import Sampling, heun
from disk import provenance
from run import option, stage

# data ("" for the real images of --data), resolution, width, batch, blocks; a GPU's first is of digits
CASES = dict(cpu=[("digits", 8, width, 128, 2) for width in (8, 16, 32)]
             + [("", r, width, 64, 2) for r in (8, 16, 32) for width in (16, 32)],
             cuda=[("digits", 8, 8, 128, 1), ("", 32, 128, 512, 2), ("", 32, 256, 512, 2)])
IMAGES = 1000  # of the training set
SAMPLING = Sampling(sample_steps=2)
PUBLISHED_BATCH = 64  # of generate_edm.py
WARM_UP = 4           # calls before the first that counts
BLOCK_SECONDS = 0.2   # of a block at least, which has one call at least
FAST = ("fp32", "bf16") if torch.cpu._is_avx512_bf16_supported() else ("fp32",)


@dataclass(frozen=True)
class Options:
    peer: str = option("", "checkout of github.com/sail-sg/DiffMemorize to time beside ours")
    data: str = option("cifar10", "real images of 32x32 or more")
    repeats: int = option(7, "blocks of each method at least; the median is reported")
    seconds: float = option(15.0, "of turns for each number, at least")
    device: str = option("cpu", "cpu, cuda or cuda:N; on a GPU TF32 and bfloat16 are timed too")
    threads: tuple[int, ...] = option((1, 2), "threads to time with on a CPU")
    cases: tuple[int, ...] = option((), "rows of the device's table to time, counted from 0; all by default")
    precisions: tuple[str, ...] = option((), "precisions of ours; by default those that are fast here")
    sampling: bool = option(True, "time sampling too")


def published(directory):
    """The networks, losses and sampler of the peer's checkout. What they import and never call is stubbed."""
    persistence = types.ModuleType("persistence")
    persistence.persistent_class = lambda cls: cls  # pickles a class with its source
    stubs = dict(click=mock.MagicMock(), dnnlib=mock.MagicMock(), torch_utils=types.ModuleType("torch_utils"))
    stubs["torch_utils"].persistence = persistence
    stubs["torch_utils"].distributed = mock.MagicMock()
    sys.path.insert(0, str(Path(directory).resolve()))
    try:
        with mock.patch.dict(sys.modules, stubs):
            import generate_edm
            from training import loss, networks
    except ImportError as error:
        raise ValueError(f"--peer {directory} is no checkout of github.com/sail-sg/DiffMemorize "
                         f"({error})") from None
    finally:
        sys.path.pop(0)
    return networks, loss, generate_edm


class Published:
    """The published training step and sampler (training_loop.py, lines 118 to 160; generate_edm.py)."""

    def __init__(self, peer, options, D, device):
        networks, losses, self.sampler = peer
        self.net = networks.VPPrecond(
            D.resolution, D.images.shape[1], embedding_type="positional", encoder_type="standard",
            decoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1],
            attn_resolutions=[D.resolution // 2], model_channels=options.width,
            channel_mult=list(options.channel_mult), num_blocks=options.blocks, dropout=options.dropout,
            skip_connections=[1] * 3 * (options.blocks + 1)).train().to(device)
        self.loss, self.options, self.images = losses.VPLoss(), options, D.images.to(device)
        self.at_once = options.batch  # its --batch-gpu
        self.ema = [p.detach().clone() for p in self.net.parameters()]
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=options.learning_rate, betas=(0.9, 0.999),
                                          eps=1e-8)

    def step(self, step):
        index = steps.batch_index(len(self.images), self.options.batch, step, 0, device=self.images.device)
        while not self.gradients(index):
            self.at_once //= 2
            torch.cuda.empty_cache()
        for p in self.net.parameters():
            torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        self.optimizer.step()
        for average, p in zip(self.ema, self.net.parameters()):
            average.copy_(p.detach().lerp(average, 0.999))

    def gradients(self, index):
        """Put the gradients of the batch in place, part by part; returns whether a part fits into memory."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            for part in index.split(self.at_once):
                y = self.images[part].to(torch.float32) / 127.5 - 1
                self.loss(net=self.net, images=y, labels=None).sum().mul(1 / len(index)).backward()
        except torch.OutOfMemoryError:
            if self.at_once == 1:
                raise
            return False
        return True

    @torch.no_grad()
    def draw(self):
        self.net.eval()
        latents = torch.randn(PUBLISHED_BATCH, *self.images.shape[1:], device=self.images.device)
        self.sampler.edm_sampler(self.net, latents, num_steps=SAMPLING.sample_steps)
        self.net.train()
        return PUBLISHED_BATCH


class Ours:
    def __init__(self, options, D, device):
        self.net = denoiser.build(options, D).to(device).use(options.precision).train()
        self.work = steps.Work(options, self.net, D)
        self.denoise = sample.in_chunks(self.net)  # kept: on a GPU it records a graph

    @property
    def at_once(self):
        return self.work.at_once

    def step(self, step):
        self.work.take(step)

    def draw(self):
        count, device = sample.chunk(self.net), self.work.images.device
        self.work.rest()  # as before a sampler in emm.py
        self.net.eval()
        latents = sample.draw(self.net, range(count))[0].to(device)
        heun(self.denoise, latents, SAMPLING.levels(self.net, device)).cpu()
        self.net.train()
        return count


def serve(connection, name, peer, options, threads):
    """A process of one method: for each (kind, calls) sent to it, seconds, steps or images, and about it."""
    if name == "published":
        device = torch.device(options.device)  # as the peer sets it up: by itself
        with contextlib.redirect_stdout(None):  # its constructor prints
            method = Published(published(peer), options, data.load(options), device)
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    else:
        device = data.pick_device(options.device, threads)
        data.keep_memory()
        method = Ours(options, data.load(options), device)
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    step = 0
    while message := connection.recv():
        kind, calls = message
        wait()
        start, count = time.perf_counter(), 0
        for _ in range(calls):
            if kind == "step":
                method.step(step)
                step, count = step + 1, count + 1
            else:
                count += method.draw()
        wait()
        seconds, about = time.perf_counter() - start, dict(part=method.at_once)
        if device.type == "cuda":
            about["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 1)
        connection.send((seconds, count, about))


def turns(methods, kind, repeats, seconds, about=None):
    """Seconds a step, or an image: {name: [of each block]} of methods {name: connection}, in turns.

    The dict `about` gets the part of the batch and the peak memory of a GPU so far, of the last method.
    """
    def block(connection, calls):
        connection.send((kind, calls))
        return connection.recv()

    slowest = 0
    for connection in methods.values():
        for _ in range(WARM_UP):  # kernels are chosen, and on a GPU the third step is recorded as a graph
            block(connection, 1)
        slowest = max(slowest, block(connection, 1)[0])
    calls, end = max(1, round(BLOCK_SECONDS / slowest)), time.perf_counter() + seconds
    seen = {name: [] for name in methods}
    while time.perf_counter() < end or len(next(iter(seen.values()))) < repeats:
        for name, connection in methods.items():
            spent, count, last = block(connection, calls)
            (about if about is not None else {}).update(last)
            seen[name].append(spent / count)
    return seen


@contextlib.contextmanager
def processes(arguments):
    """Connections {name: connection} to a process of `serve` for each name, with its arguments."""
    context, connections, started = multiprocessing.get_context("spawn"), {}, []
    try:
        for name, more in arguments.items():
            connections[name], theirs = context.Pipe()
            started.append(context.Process(target=serve, args=(theirs, name, *more), daemon=True))
            started[-1].start()
            theirs.close()  # or its end would not be seen
        yield connections
    finally:
        for connection in connections.values():
            with contextlib.suppress(OSError):  # of one that failed
                connection.send(None)
        for process in started:
            process.join()


def settings(options, case, name):
    """The training that a method is timed with."""
    source, resolution, width, batch, blocks = case
    return train.Options(data=source or options.data, resolution=resolution, width=width, batch=batch,
                         blocks=blocks, n=IMAGES, device=options.device,
                         precision="fp32" if name == "published" else name)


def drawn(times):
    """Images a second with 18 steps, of the seconds an image of each block."""
    return SAMPLING.evaluations / Sampling().evaluations / median(times)


def on_gpu(options, cases=CASES["cuda"]):
    """Yield a dict for each case, method and kind of work; one that fails is a dict that says so."""
    for case in (cases[i] for i in options.cases or range(len(cases))):
        base = {}  # images a second of the published code, by kind
        # the slowest last: a limit of bench/gpu.sh may cut it off
        precisions = options.precisions or denoiser.PRECISIONS[::-1]
        for name in ["published"] * bool(options.peer) + list(precisions):
            yield from alone(options, case, name, base)


def alone(options, case, name, base):
    """`on_gpu` of one case and method."""
    _, resolution, width, batch, blocks = case
    line = dict(name=f"{resolution}x{resolution}, width {width}, {name}", method=name, width=width,
                resolution=resolution, blocks=blocks, batch=batch)
    about, threads = {}, torch.get_num_threads()
    try:
        with processes({name: (options.peer, settings(options, case, name), threads)}) as methods:
            for kind in ["step"] + ["sample"] * options.sampling:
                times = turns(methods, kind, options.repeats, options.seconds, about)[name]
                rate = batch / median(times) if kind == "step" else drawn(times)
                if name == "published":
                    base[kind] = rate
                ms = dict(ms=round(1e3 * median(times), 2)) if kind == "step" else {}
                ratio = dict(times_published=round(rate / base[kind], 2)) if kind in base else {}
                yield dict(what=kind, **line, **ms, images_a_second=round(rate, 1), **about, **ratio)
    except (EOFError, OSError):  # its process ended
        yield dict(line, what="failed", error="it ended early; its last words are in the log")


def on_cpu(options):
    """Print a line for each case and number of threads; returns the record."""
    names, rows = ["published"] * bool(options.peer) + list(options.precisions or FAST), []
    kinds, cases = ["step"] + ["sample"] * options.sampling, CASES["cpu"]
    print("images, width, batch    threads   " + " ".join(f"{name:>22}" for name in names))
    for case in (cases[i] for i in options.cases or range(len(cases))):
        chosen = {name: settings(options, case, name) for name in names}
        data.load(chosen[names[0]])  # or an error now
        for threads in options.threads:
            source, resolution, width, batch, _ = case
            row = dict(data=source or "real images", resolution=resolution, width=width, batch=batch,
                       threads=threads)
            with processes({name: (options.peer, chosen[name], threads) for name in names}) as methods:
                for kind in kinds:
                    row[kind] = turns(methods, kind, options.repeats, options.seconds)
            rows.append(row)
            label = f"{row['data']} {resolution}x{resolution}, {width}, {batch}"
            print(f"{label:<26} {threads:>4}   ", end="")  # milliseconds, then images a second
            for kind in kinds:
                for name, times in row[kind].items():
                    ratio = ""
                    if options.peer and name != "published":
                        ratio = f" ({median(row[kind]['published']) / median(times):.2f}x)"
                    value = f"{drawn(times):.1f} images/s"
                    if kind == "step":
                        value = f"{1e3 * median(times):.0f} ms"
                    print(f"{value + ratio:>22} ", end="")
            print(flush=True)
    record = dict(rows=rows)
    if options.peer:
        record["ratios"] = {
            f"{kind} {name}": geometric_mean(median(row[kind]["published"]) / median(row[kind][name])
                                             for row in rows)
            for kind in kinds for name in names if name != "published"}
        for name, ratio in record["ratios"].items():
            print(f"{name}: {ratio:.2f}x the published code (geometric mean)")
    return record


def bench(options):
    if options.peer:
        published(options.peer)  # or an error now
    if options.device == "cpu":
        print(f"{machine.name()}\n")
        record = on_cpu(options)
    else:
        record = dict(rows=[])
        for line in on_gpu(options):
            record["rows"].append(line)
            print(json.dumps(line), flush=True)
    print(f"\n{machine.save('step', dict(provenance(), machine=machine.name(), **record))}")


def main():
    stage(bench, Options, __doc__)


if __name__ == "__main__":
    main()
