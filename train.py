"""Train a diffusion model on a training set D and write EMA snapshots of it.

    python train.py --data cifar10 --n 1000 --out runs/n1000                  the paper's base run
    python train.py --data digits --n 20 --width 8 --blocks 1 --batch 128 --learning-rate 4e-3 \\
        --steps 600 --warmup-steps 50 --dropout 0 --ema-halflife 30 --ema-rampup-steps 600 --out runs/digits
                                                                              half a minute on two CPU cores

Makes OUT/model.safetensors, the last EMA weights with their options; OUT/snapshot-STEP.safetensors on the
way; OUT/config.json and OUT/log.jsonl. The defaults are the published procedure (paper, section 2 and
appendix A): a number of epochs and not of steps, so that steps grow with |D|. The same command resumes an
interrupted run. On a CPU, with the same machine and software, it ends with the same weights, bit for bit.
"""
import contextlib
import dataclasses
import math
import resource
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import checkpoint
import data
import disk
import parallel
import run
from diffusion import denoiser, objectives
from diffusion.steps import Work, seed_of, validation_loss
from run import option

EMA_IMAGES_A_STEP = 512  # the published half-life counts this many images a step, whatever the batch
MOST = 10**12            # of steps and epochs; more is a typing error
MOST_SNAPSHOTS = 10_000  # likewise
LINE_SECONDS = 20        # between lines of progress where stderr is no terminal
SIGNAL_STEPS = 10        # between the steps at which several processes ask each other for a signal to stop


@dataclass(frozen=True)
class Options(data.Options):
    out: str = option("runs/train", "run directory", recorded=False)
    # model
    arch: str = option("ddpmpp", "network", denoiser.ARCHITECTURES)
    precond: str = option("vp", "preconditioning and the loss that goes with it", objectives.PRECONDITIONINGS)
    predict: str | None = option(
        None, "noise, image or velocity: what the network predicts; none means as published with --precond")
    loss_weight: str = option(
        "published", "weight of a noise level in the loss; min-snr is min(1 / sigma^2, 5)",
        objectives.LOSS_WEIGHTS)
    loss: str = option("l2", "error of an image; huber is pseudo-Huber", objectives.LOSSES)
    width: int = option(128, "channels of the first convolution; of a token of dit")
    blocks: int = option(2, "residual blocks a resolution (the paper's depth); all blocks of dit")
    patch: int = option(2, "pixels a side of a token of dit")
    channel_mult: tuple[int, ...] = option((2, 2, 2), "channels of each level, in units of the width")
    attn_resolutions: tuple[int, ...] | None = option(
        None, "resolutions with attention, or none; half of the images' if not given")
    embedding: str | None = option(
        None, "time embedding; positional for ddpmpp and fourier for ncsnpp if not given")
    skip_connections: tuple[int, ...] | None = option(
        None, "0/1 mask of the skips kept, encoder order; all if not given")
    dropout: float = option(0.13, "dropout probability")
    # training
    sigma_skip: tuple[float, ...] = option((), "LOW,HIGH: noise levels not trained on, of loss 0")
    epochs: float = option(40000, "duration in passes over the training set", least=0, below=MOST)
    steps: int | None = option(None, "duration in steps, instead of epochs", least=1, below=MOST)
    steps_min: int = option(
        0, "train for at least this many steps, however few images there are; as published, no such floor",
        least=0)
    warmup_epochs: float = option(200, "the learning rate rises linearly over this many epochs", least=0)
    warmup_steps: int | None = option(None, "or over this many steps", least=0)
    batch: int = option(512, "images a step", least=1)
    batch_device: int = option(0, "images at once, to save memory (gradients add up); 0 means the batch, "
                                  "on a GPU as many as fit", least=0)
    optimizer: str = option(
        "adam", "optimizer; muon takes the matrices inside the network, and adam the rest, at the same rate",
        ("adam", "sgd", "muon"))
    learning_rate: float = option(2e-4, "learning rate after the warm-up", least=0)
    momentum: float = option(0.9, "momentum of sgd and of muon; beta1 of adam", least=0, below=1)
    beta2: float = option(0.999, "beta2 of adam", least=0, below=1)
    weight_decay: float = option(0.0, "L2 penalty added to the gradient; of muon, apart from it", least=0)
    ema_halflife: float = option(
        500_000 / EMA_IMAGES_A_STEP, "half-life of the averaged weights in steps", least=0)
    ema_rampup_epochs: float = option(200, "the half-life rises linearly over this many epochs", least=0)
    ema_rampup_steps: int | None = option(None, "or over this many steps", least=0)
    ema_rate: float | None = option(
        None, "EMA rate a step after the ramp, instead of the half-life's; 0 takes the last weights",
        least=0, below=1)
    flip: bool = option(False, "mirror half of the images shown, drawn anew at each step")
    augment: float = option(0.0, "probability of EDM's augmentations, of which the network is told, so "
                                 "that samples may be without; half of the images are mirrored; EDM: 0.12",
                            least=0, below=1)
    label_dropout: float = option(
        0.0, "probability that an image is shown without its label", least=0, below=1)
    precision: str = option(
        "auto", "of the network's products; auto is tf32 on CUDA, else fp32", denoiser.PRECISION_CHOICES)
    seed: int = option(0, "of initial weights, order of the data, noise and dropout", least=0)
    reshuffle: bool = option(False, "draw a new order of the data each epoch instead of one for all")
    # files
    snapshots: int | str = option(
        16, "snapshots over the run, evenly spaced, the last at its end; log:K spaces K logarithmically")
    snapshot_images: int = option(
        0, "a snapshot each time this many images were seen instead, and at the end; published: 2500000",
        least=0)
    validate: int = option(
        0, "at each snapshot, measure the loss on this many images of the data outside the training set",
        least=0)
    log_steps: int = option(100, "steps a line of log.jsonl", recorded=False, least=1)
    save_seconds: float = option(300, "write the resume state this often", recorded=False, least=0)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", recorded=False)
    threads: int = option(
        0, "CPU threads; 0 takes all cores. Another number rounds otherwise", recorded=False, least=0)
    deterministic: bool = option(
        False, "on CUDA, only kernels that give the same bits each time; slower", recorded=False)

    def __post_init__(self):
        super().__post_init__()
        absent = ("patch",) if self.arch != "dit" else (
            "channel_mult", "attn_resolutions", "embedding", "skip_connections")
        for name in absent:
            if getattr(self, name) != getattr(Options, name):
                raise ValueError(f"--arch {self.arch} has no --{name.replace('_', '-')}; leave it out")
        objectives.Objective(self.precond, self.predict, self.loss_weight, self.loss)
        count = str(self.snapshots).removeprefix("log:")
        if not (count != self.snapshots and count.isdecimal() and 1 <= int(count) <= MOST_SNAPSHOTS):
            raise ValueError(f"--snapshots {self.snapshots} is neither a number nor log:K, "
                             f"from 1 to {MOST_SNAPSHOTS:,}")
        if self.validate and self.labels == "unique":
            raise ValueError(f"--validate {self.validate} takes images whose label the training set has, and "
                             "with --labels unique there are none; leave one of them out")
        if self.snapshot_images and isinstance(self.snapshots, str):
            raise ValueError(f"--snapshots {self.snapshots} and --snapshot-images {self.snapshot_images} "
                             "both say where snapshots lie; leave one of them out")
        skip = self.sigma_skip
        if skip and not (len(skip) == 2 and 0 <= skip[0] < skip[1]):
            raise ValueError(f"--sigma-skip {','.join(map(str, skip))} is no range of noise levels; "
                             "write LOW,HIGH, such as 0.2,2")
        if self.label_dropout and self.labels == "none":
            raise ValueError(f"--label-dropout {self.label_dropout} leaves labels out, and --labels none "
                             "has none; leave one of them out")
        if self.steps and self.steps < self.steps_min:
            raise ValueError(f"--steps {self.steps} is less than --steps-min {self.steps_min}; "
                             "leave one of them out")
        if self.ema_rate and not self.ema_halflife:
            raise ValueError("--ema-halflife 0 turns averaging off, "
                             f"and --ema-rate {self.ema_rate} asks for it; leave one of them out")
        if self.batch_device and self.batch % self.batch_device:
            raise ValueError(f"--batch-device {self.batch_device} does not divide --batch {self.batch}")


def total_steps(options, n):
    """Steps of a run on n images: `steps`, or enough for `epochs` passes and at least `steps_min`."""
    return options.steps or max(1, options.steps_min, math.ceil(options.epochs * n / options.batch))


def snapshot_steps(options, n):
    """The steps, ascending, after which a run on n images writes a snapshot; the last is its end."""
    total = total_steps(options, n)
    if options.snapshot_images:
        count = math.ceil(total * options.batch / options.snapshot_images)
        if count > MOST_SNAPSHOTS:
            enough = total * options.batch // MOST_SNAPSHOTS + 1
            raise ValueError(f"--snapshot-images {options.snapshot_images} makes {count:,} snapshots of "
                             f"{n} images; at most {MOST_SNAPSHOTS:,} are written, so give {enough} or more")
        before = {math.ceil(i * options.snapshot_images / options.batch) for i in range(1, count)}
        return sorted({*before, total})
    if isinstance(options.snapshots, str):  # log:K
        count = int(options.snapshots.removeprefix("log:"))
        return sorted({round(total ** (i / count)) for i in range(1, count + 1)})
    return sorted({round(total * i / options.snapshots) for i in range(1, options.snapshots + 1)} - {0})


def train(options):
    """Train as the options say; returns the path of the final model. A finished run returns at once.

    Raises ValueError if the run directory was made with other options or data, or is in use, or if the loss
    becomes infinite or NaN; KeyboardInterrupt after a signal, once the state is saved.
    """
    *_, model = training(options, alone=True)
    return model


def training(options, alone=False):
    """`train`, as a generator of its snapshot files in the order of their steps, the final model last.

    Files that an earlier start has made come first. A caller that has seen enough closes the generator; the
    same call resumes later. `alone` reports duplicate training images; a search reports them itself, once.
    """
    D = data.load(options)
    held_out = data.outside(options, D, options.validate) if options.validate else None
    files = disk.Directory(options.out)
    device = data.pick_device(options.device, options.threads, options.deterministic)
    data.keep_memory()
    options = dataclasses.replace(options, precision=denoiser.precision_on(device, options.precision))
    generator = torch.Generator().manual_seed(seed_of(options.seed, "weights"))
    net = denoiser.build(options, D, generator).to(device).use(options.precision)
    skip = options.sigma_skip
    if skip and (skip[0] <= net.sigma_min < net.sigma_max <= skip[1]
                 or skip[1] <= net.sigma_min or net.sigma_max <= skip[0]):
        raise ValueError(f"--sigma-skip {skip[0]:g},{skip[1]:g} skips all or none of the noise levels that "
                         f"--precond {options.precond} trains on; those are from {net.sigma_min:g} to "
                         f"{net.sigma_max:g}")
    if alone:
        data.say_duplicates(D)
    if options.batch < parallel.size():
        raise ValueError(f"--batch {options.batch} is smaller than the number of processes, "
                         f"{parallel.size()}")
    about = dict(stage="train", options=data.recorded(options), data=D.fingerprint(),
                 **disk.provenance(device))
    writes = parallel.rank() == 0
    with parallel.group(device), \
            disk.claim(files.path, about, run.defaults(Options)) if writes else contextlib.nullcontext():
        parallel.barrier()  # until rank 0 has claimed and swept the directory
        yield from (path for path in files.snapshots() if path.exists())  # the caller may remove others
        if parallel.total(files.model.exists(), device):
            checkpoint.load_model(files.model)  # which must be whole
            disk.earlier(files.model, about, run.defaults(Options))
            if alone:
                run.say(f"{files.model} is there already, of these options; nothing is trained")
            return
        yield from take_steps(options, D, held_out, net, files, about)


def take_steps(options, D, held_out, net, files, about):
    """Take the steps of `training` that are left, in the run directory `files` that rank 0 holds."""
    work = Work(options, net.train(), D)
    step, seconds = checkpoint.load_state(files.state, work, about, run.defaults(Options))
    device, n = work.device, len(D)
    total, snapshots = total_steps(options, n), set(snapshot_steps(options, n))
    # forward, and twice that back
    flops = 3 * (total - step) * options.batch / parallel.size() * net.model.flops()
    data.announce(options.device, device, flops, options.precision, work.at_once)
    output, bar = Output(work, D, held_out, files, about, step), progress_bar(files.path, step, total)
    taken, tick, saved = [], time.perf_counter(), time.perf_counter()
    with run.interruptible(), contextlib.closing(bar):
        while step < total:
            taken.append(work.take(step))
            step += 1
            stop, late = asked_to_stop(step, device), time.perf_counter() - saved > options.save_seconds
            # on a GPU this check would wait for the step to finish
            lost = device.type == "cpu" and not taken[-1].isfinite().all()
            due = step in snapshots or step % options.log_steps == 0
            if not (stop or lost or due or late and parallel.size() == 1):
                continue  # several processes, whose clocks differ, pass at the same steps
            values = torch.stack(taken).cpu()  # [steps, 2]; waits for the device
            now = time.perf_counter()
            seconds += now - tick
            output.check_finite(step, values)
            if step in snapshots:
                output.validate()
            output.line(step, values, now - tick, seconds)
            bar.set_postfix(loss=f"{values[:, 0].mean():.4g}", refresh=False)
            bar.update(step - bar.n)
            if step in snapshots:
                snapshot = output.snapshot(step, last=step == total)
            if step < total and (stop or late or step in snapshots):
                output.state(step, seconds)
                saved = time.perf_counter()
            if stop and step < total:
                raise KeyboardInterrupt(f"the state of step {step} is in {files.path}; "
                                        "the same command goes on from there")
            if step in snapshots:
                yield snapshot
            taken, tick = [], time.perf_counter()
    parallel.barrier()


class Output:
    """What a run writes as it goes: log.jsonl, snapshots, its state. Only rank 0 writes."""

    def __init__(self, work, D, held_out, files, about, step):
        self.work, self.files, self.about = work, files, about
        self.held_out, self.validation = held_out, {}
        counts = torch.bincount(D.labels[D.shown], minlength=D.label_dim) if D.label_dim else None
        self.label_counts = counts if counts is None else counts.tolist()
        self.writes = parallel.rank() == 0
        self.log = disk.Log(files.log, step) if self.writes else None
        if work.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(work.device)  # memory_mb is this run's

    def epoch(self, step):
        return step * self.work.options.batch / len(self.work.images)

    def check_finite(self, step, taken):
        """Raise ValueError, naming the step, unless the last steps and the weights after them are finite.

        `taken` [steps, 2] holds the loss and the norm of the gradient of each. The error is logged too.
        """
        if wrong := (~taken.isfinite()).nonzero().tolist():
            i, which = wrong[0]
            name = ("loss", "norm of the gradient")[which]
            bad = f"{name} of step {step - len(taken) + 1 + i} is {float(taken[i, which])}"
        elif not all(p.isfinite().all() for p in self.work.ema.values()):
            bad = f"weights are not finite after step {step}"
        else:
            return
        said = (f"the {bad}; what was saved before is kept. Lower --learning-rate "
                f"{self.work.options.learning_rate:g} or lengthen the warm-up, and choose another --out")
        if self.writes:
            self.log.write(step=step, stopped=said)
        raise ValueError(said)

    def validate(self):
        """Measure the loss on held-out images, if there are any, for the next line and snapshot."""
        self.work.rest()
        if self.held_out and self.writes:
            self.validation = dict(validation_loss=validation_loss(self.work, self.held_out))

    def line(self, step, taken, took, seconds):
        """Log the steps `taken` [steps, 2], which took so many seconds, of `seconds` so far."""
        if self.writes:
            batch, (loss, norm) = self.work.options.batch, taken.mean(0).tolist()
            self.log.write(step=step, epoch=round(self.epoch(step), 3), images=step * batch,
                           loss=loss, gradient_norm=norm,
                           images_per_second=round(len(taken) * batch / took, 1),
                           memory_mb=memory_mb(self.work.device), batch_device=self.work.at_once,
                           seconds=round(seconds, 3), **self.validation)

    def snapshot(self, step, last):
        """Write the averaged weights; returns the path of that file. The last one needs no state."""
        path = self.files.model if last else self.files.snapshot(step)
        if self.writes:
            model = self.work.net.model.state_dict() | self.work.ema
            checkpoint.write(path, model, dict(
                network=self.work.net.config, step=step, epoch=self.epoch(step),
                label_counts=self.label_counts, **self.validation, **self.about))
            if last:
                self.files.state.unlink(missing_ok=True)
        self.validation = {}
        return path

    def state(self, step, seconds):
        """Write all that the next step needs."""
        if self.writes:
            checkpoint.write(self.files.state, checkpoint.state(self.work),
                             dict(self.about, step=step, seconds=seconds))


def asked_to_stop(step, device):
    """Whether a signal to stop has come. Several processes ask each other, every `SIGNAL_STEPS` steps."""
    if parallel.size() == 1:
        return run.interrupted()
    return step % SIGNAL_STEPS == 0 and parallel.total(run.interrupted(), device) > 0


class Lines:
    """Standard error for tqdm where it is no terminal: each drawing is a line of its own."""
    @staticmethod
    def write(text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    @staticmethod
    def flush():
        sys.stderr.flush()


def progress_bar(out, step, total):
    """A bar on a terminal, elsewhere a line every `LINE_SECONDS`; on stderr."""
    how = {} if sys.stderr.isatty() else dict(
        file=Lines, delay=LINE_SECONDS, mininterval=LINE_SECONDS,
        bar_format="{desc}: step {n_fmt} of {total_fmt}, {elapsed}, {remaining} left, {rate_fmt}{postfix}")
    return tqdm(desc=str(out), initial=step, total=total, unit="step", disable=parallel.rank() > 0, **how)


def memory_mb(device):
    """Peak memory so far in MB: the GPU's, or the process's on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS and in KB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def main():
    run.stage(train, Options, __doc__, words="wrote {}".format)


if __name__ == "__main__":
    main()
