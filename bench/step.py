"""Milliseconds a training step and images sampled a second, beside the paper's published code.

    git clone https://github.com/sail-sg/DiffMemorize peer
    python bench/step.py --peer peer [--data ../cifar10.zip]      27 minutes on 2 cores
    python bench/step.py                                          ours alone
    python bench/step.py --device cuda --peer peer                on a GPU, some 10 minutes

A step is forward, backward, optimizer and average of the weights, at the published settings (DDPM++, VP, two
blocks a resolution, dropout 0.13), on images that lie in memory for both: the peer's data loader, statistics
and gradient buckets are left out, in its favour. Each method has its own process, set up as its scripts do;
they take turns in blocks, and the median block counts. Sampling is timed over 2 Heun steps, 3 evaluations of
the network, and reported for 18 steps, 35 evaluations; each draws as many images at once as by default.
"""
import contextlib
import multiprocessing
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

import data  # noqa: E402
import sample  # noqa: E402
import steps  # noqa: E402
import train  # noqa: E402
import unet  # noqa: E402
from bench import machine  # noqa: E402
from run import option, provenance, stage  # noqa: E402

# data ("" for the real images of --data), resolution, width, batch
CASES = dict(cpu=[("digits", 8, width, 128) for width in (8, 16, 32)]
             + [("", r, width, 64) for r in (8, 16, 32) for width in (16, 32)],
             cuda=[("digits", 8, 8, 128), ("", 32, 128, 512), ("", 32, 256, 512)])
IMAGES = 1000  # of the training set
HEUN_STEPS, EVALUATIONS, EVALUATIONS_OF_18_STEPS = 2, 3, 35
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
        self.ema = [p.detach().clone() for p in self.net.parameters()]
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=options.learning_rate, betas=(0.9, 0.999),
                                          eps=1e-8)

    def step(self, step):
        index = steps.batch_index(len(self.images), self.options.batch, step, 0, device=self.images.device)
        self.optimizer.zero_grad(set_to_none=True)
        y = self.images[index].to(torch.float32) / 127.5 - 1
        self.loss(net=self.net, images=y, labels=None).sum().mul(1 / len(y)).backward()
        for p in self.net.parameters():
            torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        self.optimizer.step()
        for average, p in zip(self.ema, self.net.parameters()):
            average.copy_(p.detach().lerp(average, 0.999))

    @torch.no_grad()
    def draw(self):
        self.net.eval()
        latents = torch.randn(PUBLISHED_BATCH, *self.images.shape[1:], device=self.images.device)
        self.sampler.edm_sampler(self.net, latents, num_steps=HEUN_STEPS)
        self.net.train()
        return PUBLISHED_BATCH


class Ours:
    def __init__(self, options, D, device):
        self.net = unet.build(options, D).to(device).use(options.precision).train()
        parameters = dict(self.net.model.named_parameters())
        ema = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer = steps.Optimizer(options, list(parameters.values()))
        self.work = steps.Work(options, self.net, ema, optimizer, D.images.to(device), None)

    def step(self, step):
        self.work.take(step)

    def draw(self):
        count = sample.chunk(self.net)
        self.net.eval()
        device = next(self.net.parameters()).device
        sample.generate(self.net, list(range(count)), steps=HEUN_STEPS, batch=count, device=device)
        self.net.train()
        return count


def serve(connection, name, peer, options, threads):
    """A process of one method: for each (kind, calls) sent to it, seconds, steps or images, and peak GB."""
    if name == "published":
        device = torch.device(options.device)  # as the peer sets it up: by itself
        with contextlib.redirect_stdout(None):  # its constructor prints
            method = Published(published(peer), options, data.load(options), device)
        torch.set_num_threads(threads)
    else:
        device = data.pick_device(options.device, threads)
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
        peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
        connection.send((time.perf_counter() - start, count, peak))


def turns(methods, kind, repeats, seconds, peaks):
    """Seconds a step, or an image: {name: [of each block]} of methods {name: connection}, in turns.

    `peaks` {name: GB} gets the most memory of a GPU that each has held so far.
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
            spent, count, peaks[name] = block(connection, calls)
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
        yield connections
    finally:
        for connection in connections.values():
            with contextlib.suppress(OSError):  # of one that failed
                connection.send(None)
        for process in started:
            process.join()


def bench(options):
    if options.peer:
        published(options.peer)  # or an error now
    kind_of_device = options.device.partition(":")[0]
    precisions = options.precisions or (FAST if kind_of_device == "cpu" else ("fp32", "tf32", "bf16"))
    names = ["published"] * bool(options.peer) + list(precisions)
    kinds, cases = ["step"] + ["sample"] * options.sampling, CASES[kind_of_device]
    print(f"{machine.name()}\n\nimages, width, batch    threads   "
          + " ".join(f"{name:>22}" for name in names))
    rows = []
    for source, resolution, width, batch in (cases[i] for i in options.cases or range(len(cases))):
        settings = {name: train.Options(
            data=source or options.data, resolution=resolution, width=width, batch=batch, n=IMAGES,
            precision="fp32" if name == "published" else name, device=options.device) for name in names}
        data.load(settings[names[0]])  # or an error now
        for threads in options.threads if kind_of_device == "cpu" else options.threads[-1:]:
            row = dict(data=source or "real images", resolution=resolution, width=width, batch=batch,
                       threads=threads, peak_gb={})
            with processes({name: (options.peer, settings[name], threads) for name in names}) as methods:
                for kind in kinds:
                    row[kind] = turns(methods, kind, options.repeats, options.seconds, row["peak_gb"])
            rows.append(row)
            label = f"{row['data']} {resolution}x{resolution}, {width}, {batch}"
            print(f"{label:<26} {threads:>4}   ", end="")  # milliseconds, then images a second
            for kind in kinds:
                for name, times in row[kind].items():
                    ratio = ""
                    if options.peer and name != "published":
                        ratio = f" ({median(row[kind]['published']) / median(times):.2f}x)"
                    drawn = EVALUATIONS / EVALUATIONS_OF_18_STEPS / median(times)
                    value = f"{1e3 * median(times):.0f} ms" if kind == "step" else f"{drawn:.1f} images/s"
                    print(f"{value + ratio:>22} ", end="")
            print(flush=True)
    record = dict(provenance(), machine=machine.name(), rows=rows)
    if options.peer:
        record["ratios"] = {
            f"{kind} {name}": geometric_mean(median(row[kind]["published"]) / median(row[kind][name])
                                             for row in rows)
            for kind in kinds for name in names if name != "published"}
        for name, ratio in record["ratios"].items():
            print(f"{name}: {ratio:.2f}x the published code (geometric mean)")
    print(f"\n{machine.save('step', record)}")


def main():
    stage(bench, Options, __doc__)


if __name__ == "__main__":
    main()
