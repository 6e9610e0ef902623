"""Milliseconds a training step and images sampled a second, beside the paper's published code.

    git clone https://github.com/sail-sg/DiffMemorize peer
    python bench/step.py --peer peer [--data ../cifar10.zip]      about half an hour on 2 cores
    python bench/step.py                                          ours alone

A step is forward, backward, optimizer and average of the weights, at the published settings (DDPM++, VP, two blocks a
resolution, dropout 0.13), on images that lie in memory for both: the peer's data loader, statistics and gradient
buckets are left out, in its favour. Methods take turns in blocks; the median block counts. Sampling is timed over
2 Heun steps, 3 evaluations of the network, and reported for 18 steps, 35 evaluations.
"""
import contextlib
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
import state  # noqa: E402
import train  # noqa: E402
import unet  # noqa: E402
from bench import machine  # noqa: E402
from run import option, provenance, stage  # noqa: E402

# data ("" for the real images of --data), resolution, width, batch
CASES = [("digits", 8, width, 128) for width in (8, 16, 32)] + [("", r, width, 64) for r in (8, 16, 32) for width in (16, 32)]
IMAGES = 1000  # of the training set
HEUN_STEPS, EVALUATIONS, EVALUATIONS_OF_18_STEPS = 2, 3, 35
FAST = ("fp32", "bf16") if torch.cpu._is_avx512_bf16_supported() else ("fp32",)


@dataclass(frozen=True)
class Options:
    peer: str = option("", "checkout of github.com/sail-sg/DiffMemorize to time beside ours")
    data: str = option("cifar10", "real images of 32x32 or more")
    repeats: int = option(7, "blocks of each method; the median is reported")
    seconds: float = option(1.0, "of a block, which has one step at least")
    threads: tuple[int, ...] = option((1, 2), "threads to time with")
    cases: tuple[int, ...] = option(tuple(range(len(CASES))), "rows of the table to time")
    precisions: tuple[str, ...] = option(FAST, "precisions of ours; bf16 by default where the CPU has it")
    samples: int = option(64, "images drawn at once; 0 leaves sampling out")


def published(directory):
    """The peer's networks, losses and sampler, from its checkout. What they import and never call here is stubbed."""
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
        raise ValueError(f"--peer {directory} is no checkout of github.com/sail-sg/DiffMemorize ({error})") from None
    finally:
        sys.path.pop(0)
    return networks, loss, generate_edm


class Published:
    """The published training step and sampler (training_loop.py, lines 118 to 160; generate_edm.py)."""

    def __init__(self, peer, options, D):
        networks, losses, self.sampler = peer
        self.net = networks.VPPrecond(
            D.resolution, D.images.shape[1], embedding_type="positional", encoder_type="standard", decoder_type="standard",
            channel_mult_noise=1, resample_filter=[1, 1], attn_resolutions=[D.resolution // 2], model_channels=options.width,
            channel_mult=list(options.channel_mult), num_blocks=options.blocks, dropout=options.dropout,
            skip_connections=[1] * 3 * (options.blocks + 1)).train()
        self.loss, self.options, self.images = losses.VPLoss(), options, D.images
        self.ema = [p.detach().clone() for p in self.net.parameters()]
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=options.learning_rate, betas=(0.9, 0.999), eps=1e-8)

    def step(self, step):
        index = torch.from_numpy(train.batch_index(len(self.images), self.options.batch, step, 0))
        self.optimizer.zero_grad(set_to_none=True)
        y = self.images[index].to(torch.float32) / 127.5 - 1
        self.loss(net=self.net, images=y, labels=None).sum().mul(1 / len(y)).backward()
        for p in self.net.parameters():
            torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        self.optimizer.step()
        for average, p in zip(self.ema, self.net.parameters()):
            average.copy_(p.detach().lerp(average, 0.999))

    @torch.no_grad()
    def draw(self, count):
        self.net.eval()
        self.sampler.edm_sampler(self.net, torch.randn(count, *self.images.shape[1:]), num_steps=HEUN_STEPS)
        self.net.train()


class Ours:
    def __init__(self, options, D):
        self.options, self.images = options, D.images
        self.net = unet.Denoiser(options.arch, options.precond, D.resolution, D.images.shape[1], 0, options.width, options.blocks,
                                 options.channel_mult, dropout=options.dropout).use(options.precision).train()
        parameters = dict(self.net.model.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in parameters.items()}
        self.optimizer = state.Optimizer(options, list(parameters.values()))

    def step(self, step):
        train.train_step(self.options, self.net, self.ema, self.optimizer, self.images, None, step)

    def draw(self, count):
        self.net.eval()
        sample.generate(self.net, list(range(count)), steps=HEUN_STEPS, batch=count)
        self.net.train()


def blocks(calls, repeats, seconds):
    """Seconds a call, `repeats` of each of the `calls` {name: function of a number}, in turns."""
    for call in calls.values():
        call(0)  # warm
    start = time.perf_counter()
    for call in calls.values():
        call(1)
    count = max(1, round(seconds * len(calls) / (time.perf_counter() - start)))
    seen = {name: [] for name in calls}
    for block in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            for i in range(count):
                call(2 + block * count + i)
            seen[name].append((time.perf_counter() - start) / count)
    return seen


def bench(options):
    peer = published(options.peer) if options.peer else None
    names = ["published"] * bool(peer) + list(options.precisions)
    print(f"{machine.name()}\n\nimages, width, batch    threads   " + " ".join(f"{name:>22}" for name in names))
    rows = []
    for source, resolution, width, batch in (CASES[i] for i in options.cases):
        def settings(**more):
            return train.Options(data=source or options.data, resolution=resolution, width=width, batch=batch, n=IMAGES, **more)
        D = data.load(settings())
        with contextlib.redirect_stdout(None):  # its constructor prints
            methods = {"published": Published(peer, settings(), D)} if peer else {}
        methods |= {precision: Ours(settings(precision=precision), D) for precision in options.precisions}
        for threads in options.threads:
            torch.set_num_threads(threads)
            row = dict(data=source or "real images", resolution=resolution, width=width, batch=batch, threads=threads)
            row["step"] = blocks({name: method.step for name, method in methods.items()}, options.repeats, options.seconds)
            drawn = {name: methods[name] for name in methods if name in ("published", "fp32")} if options.samples else {}
            row["sample"] = blocks({name: lambda _, m=method: m.draw(options.samples) for name, method in drawn.items()},
                                   options.repeats, options.seconds)
            rows.append(row)
            label = f"{row['data']} {resolution}x{resolution}, {width}, {batch}"
            print(f"{label:<26} {threads:>4}   ", end="")  # milliseconds, then images a second
            for kind in ("step", "sample"):
                for name, times in row[kind].items():
                    ratio = f" ({median(row[kind]['published']) / median(times):.2f}x)" if peer and name != "published" else ""
                    drawn = options.samples * EVALUATIONS / EVALUATIONS_OF_18_STEPS / median(times)
                    value = f"{1e3 * median(times):.0f} ms" if kind == "step" else f"{drawn:.1f} images/s"
                    print(f"{value + ratio:>22} ", end="")
            print(flush=True)
    record = dict(provenance(), machine=machine.name(), rows=rows)
    if peer:
        record["ratios"] = {f"{kind} {name}": geometric_mean(median(row[kind]["published"]) / median(row[kind][name]) for row in rows)
                            for kind in ("step", "sample") for name in rows[0][kind] if name != "published"}
        for name, ratio in record["ratios"].items():
            print(f"{name}: {ratio:.2f}x the published code (geometric mean)")
    print(f"\n{machine.save('step', record)}")


def main():
    stage(bench, Options, __doc__)


if __name__ == "__main__":
    main()
