"""When memorization sets in, and when samples are good: one grid of runs over training set size and time.

    python -m paper.dynamics                    paper/results/cpu/dynamics.json and .png; an hour of one core
    make dynamics SCALE=gpu PLAN=1              the runs of that scale, and nothing more

Trains each |D| with each seed for the same number of steps, and measures every snapshot, spaced
logarithmically: the memorization ratio, the Frechet distance of pixels to images outside D, and the loss on
these. From one grid come

    tau_mem   the step at which 10% of the samples are memorized first, as a power of |D|
    tau_gen   the step at which the Frechet distance is first within 10% of its least, likewise
    EMM       as a function of the steps, and the phase diagram of the ratio over (|D|, steps)

Bonnaire et al. (arXiv 2505.17638) and Favero et al. (2505.16959) find tau_mem ~ |D| and tau_gen constant, in
steps. Each power is fitted for each seed; intervals are Student's over seeds. A process a seed, side by side:
--seeds 0, --seeds 1, ...; the same command with all of them then writes the result.
"""
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpoint
import data
import disk
import emm
import plot
import run
import sample
import search
import train
from kernels import References, memorized
from measure.quality import NEAREST, frechet, kind
from paper.claims import SCALES
from paper.protocol import BASE
from run import option

# Sizes and steps of each scale: as long as the largest size takes to memorize
GRID = dict(cpu=dict(sizes=(10, 20, 40, 80, 160), steps=8000),
            gpu=dict(sizes=(100, 200, 500, 1000, 2000), steps=20_000),
            paper=dict(sizes=(500, 1000, 2000, 5000), steps=400_000))
ONSET = 0.1         # of the ratio, at tau_mem
NEAR = 1.1          # times the least Frechet distance, at tau_gen


@dataclass(frozen=True)
class Options(run.Checked):
    scale: str = option("cpu", "settings and sizes, as in paper/protocol.py", SCALES)
    seeds: tuple[int, ...] = option((0, 1, 2), "a grid for each, of training set and training",
                                    least=0, below=2**32, distinct=True)
    sizes: tuple[int, ...] = option((), "training set sizes; those of the scale by default", distinct=True)
    steps: int = option(0, "steps of every run; those of the scale by default")
    snapshots: int = option(24, "of each run, spaced logarithmically over its steps")
    held_out: int = option(500, "images outside D, for the loss and the Frechet distance")
    sample_count: int = option(256, "samples a snapshot")
    data: str = option("", "training images, as for train.py; those of the scale by default")
    device: str = option("auto", "auto, cpu, cuda or cuda:N", recorded=False)
    threads: int = option(1, "CPU threads", recorded=False, least=0)
    runs: str = option("runs", "directory of the runs", recorded=False)
    out: str = option("paper/results", "directory of result files and figures", recorded=False)
    dry_run: bool = option(False, "print the runs, and run nothing", recorded=False)

    def __post_init__(self):
        super().__post_init__()
        sizes, steps = self.sizes or GRID[self.scale]["sizes"], self.steps or GRID[self.scale]["steps"]
        if len(sizes) < 2 or min(sizes) < 2:
            raise ValueError(f"--sizes {sizes}: give two sizes or more, of 2 images at least")
        if not self.seeds or steps < 2 or self.snapshots < 2:
            raise ValueError(f"--seeds {self.seeds}, --steps {steps}, --snapshots {self.snapshots}: "
                             "need one seed at least, and 2 steps and snapshots")
        if min(self.sample_count, self.held_out) <= NEAREST:
            raise ValueError(f"--sample-count {self.sample_count}, --held-out {self.held_out}: "
                             f"need more than {NEAREST}")
        object.__setattr__(self, "sizes", tuple(sorted(sizes)))
        object.__setattr__(self, "steps", steps)

    def training(self, n, seed):
        """The training of a place of the grid."""
        base, name = emm.Options(**BASE[self.scale]), f"dynamics-{self.steps}-n{n:06d}-seed{seed}"
        return run.narrowed(
            base, train.Options, data=self.data or base.data, n=n, seed=seed, subset_seed=seed,
            steps=self.steps, steps_min=0, snapshots=f"log:{self.snapshots}", snapshot_images=0,
            validate=self.held_out, device=self.device, threads=self.threads,
            out=str(Path(self.runs) / self.scale / name))


def measured(options, n, seed):
    """A dict for each snapshot of a place: step, epoch, hits, count, ratio, interval, frechet and
    validation_loss. What was measured before is read."""
    o = options.training(n, seed)
    device = data.pick_device(o.device, o.threads)
    D = data.load(o)
    held_out = kind(data.outside(o, D, options.held_out).images, radius=0)  # which frechet does not need
    references = References(D.images.to(device))
    files, found = disk.Directory(o.out), []
    for snapshot in train.training(o):
        path = files.path / f"dynamics-{snapshot.stem}-{options.sample_count}.json"
        if not path.exists():
            net, about = checkpoint.load_model(snapshot, device)
            weights = sample.weigh_labels(about["label_counts"])
            x, _ = sample.generate(net.use(o.precision), range(options.sample_count), weights, device=device)
            hits = int(memorized(x.to(device), references)[0].sum())
            disk.write_json(path, dict(
                step=about["step"], epoch=about["epoch"], hits=hits, count=len(x), ratio=hits / len(x),
                interval=search.wilson(hits, len(x)), frechet=frechet(held_out, kind(x, radius=0)),
                validation_loss=about["validation_loss"]))
        found.append(disk.read_json(path))
    return found


def quality_step(trajectory):
    """The first step whose Frechet distance is within `NEAR` of the least."""
    least = min(t["frechet"] for t in trajectory)
    return next(t["step"] for t in trajectory if t["frechet"] <= NEAR * least)


def power(sizes, times):
    """The b of time = c |D|^b, by least squares in logarithms over the sizes that have a time.

    None with fewer than three.
    """
    known = [(math.log(n), math.log(t)) for n, t in zip(sizes, times) if t]
    return statistics.linear_regression(*zip(*known)).slope if len(known) >= 3 else None


def emm_over_steps(sizes, grid):
    """[(step, EMM of each seed)] for the steps at which every seed has one between the ends of the sizes.

    `grid` has for each seed the trajectory of each size, all of the same steps.
    """
    found, least = [], float(search.target(0.1))
    for k, first in enumerate(grid[0][0]):
        emms = [search.crossing(sizes, [t[k]["ratio"] for t in each], least) for each in grid]
        if None not in emms:
            found.append((first["step"], emms))
    return found


STOPS = {"least held-out loss": "validation_loss", "least Frechet distance": "frechet", "end": ""}


def stops(found):
    """What it costs to stop early: for each |D| and each of STOPS (|D|, stop, steps, ratios, Frechet
    distances as multiples of the run's least), lists over seeds."""
    rows = []
    for i, n in enumerate(found["sizes"]):
        for name, key in STOPS.items():
            seeds = [each[i] for each in found["grid"]]
            chosen = [min(t, key=lambda s: s[key]) if key else t[-1] for t in seeds]
            rows.append((n, name, [s["step"] for s in chosen], [s["ratio"] for s in chosen],
                         [s["frechet"] / min(each["frechet"] for each in t) for s, t in zip(chosen, seeds)]))
    return rows


def with_interval(values):
    """Values of seeds with their mean and Student's interval, as a dict; those that are None are left out."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return dict(values=values, mean=known[0] if known else None, interval=None)
    mean, half = search.student(known)
    return dict(values=values, mean=mean, interval=[mean - half, mean + half])


def dynamics(options):
    """Measure the grid; returns the path of the JSON, and draws the figure beside it."""
    places = [(n, seed) for n in options.sizes for seed in options.seeds]
    if options.dry_run:
        for n, seed in places:
            o = options.training(n, seed)
            print(f"{o.out}: {o.steps:,} steps of {o.batch} images on |D| = {n}, seed {seed}")
        return None
    trajectories = {place: measured(options, *place) for place in places}
    grid = [[trajectories[n, seed] for n in options.sizes] for seed in options.seeds]
    times = dict(
        tau_mem=[[search.onset(t, ONSET)["step"] for t in each] for each in grid],
        tau_gen=[[quality_step(t) for t in each] for each in grid],
        tau_loss=[[min(t, key=lambda s: s["validation_loss"])["step"] for t in each] for each in grid])
    crossed = emm_over_steps(options.sizes, grid)
    of_steps = [power([step for step, _ in crossed], emms) for emms in zip(*(emms for _, emms in crossed))]
    result = dict(
        sizes=options.sizes, seeds=options.seeds, grid=grid, **times,
        powers={name: with_interval([power(options.sizes, each) for each in value])
                for name, value in times.items()},
        emm=[dict(step=step, **with_interval(emms)) for step, emms in crossed],
        emm_power_of_steps=with_interval(of_steps),
        # epochs are steps * batch / EMM there: if EMM ~ steps^c, it is ~ epochs^(c / (1 - c))
        emm_power_of_epochs=with_interval([c and c / (1 - c) for c in of_steps]),
        options=run.recorded(options), **disk.provenance())
    path = Path(options.out) / options.scale / "dynamics.json"
    disk.write_json(path, result)
    plot.save(figure(result), path.with_suffix(".png"))
    return path


@plot.plain_matplotlib()
def figure(result):
    """The phase diagram with tau_mem and tau_gen, quality and memorization over steps, EMM over epochs."""
    drawn, (phase, time, over) = plot.subplots(3, 15)
    sizes, grid = result["sizes"], result["grid"]
    steps = [t["step"] for t in grid[0][0]]
    ratios, distances = (np.array([[[t[key] for t in each] for each in seed] for seed in grid])
                         for key in ("ratio", "frechet"))  # [seeds, sizes, steps]
    shade = phase.pcolormesh(sizes, steps, ratios.mean(0).T, cmap="viridis", vmin=0, vmax=1,
                             shading="nearest")
    drawn.colorbar(shade, ax=phase, label="memorization ratio, mean over seeds")
    for name, colour, label in (("tau_mem", "white", f"{ONSET:.0%} memorized"),
                                ("tau_gen", "#d55e00", "Frechet distance near its least")):
        seeds = phase.plot(sizes, np.array(result[name], float).T, "-o", color=colour, markersize=3,
                           linewidth=1)  # None is nan
        seeds[0].set_label(label)
    phase.set(xscale="log", yscale="log", xlabel="training images |D|", ylabel="steps")
    phase.legend(fontsize="small", labelcolor="white", facecolor="0.3")
    quality = time.twinx()
    for i, (n, colour) in enumerate(zip(sizes, plot.COLOURS)):
        seeds = time.plot(steps, ratios[:, i].T, color=colour, linewidth=1)
        seeds[0].set_label(f"|D| = {n}")
        quality.plot(steps, distances[:, i].T, ":", color=colour, linewidth=1)
    time.set(xscale="log", xlabel="steps", ylabel="memorization ratio (lines)")
    quality.set(yscale="log", ylabel="Frechet distance to images outside D, pixels (dotted)")
    time.legend(fontsize="small")
    over.plot([p["step"] for p in result["emm"]], [p["values"] for p in result["emm"]], "-o",
              color=plot.COLOURS[0], linewidth=1)
    over.set(xscale="log", yscale="log", xlabel="steps", ylabel="EMM of each seed",
             ylim=(sizes[0], sizes[-1]))
    over.set_yticks(sizes, map(str, sizes))
    over.minorticks_off()
    return drawn


def main():
    run.stage(dynamics, Options, __doc__, words="wrote {} and its figure".format)


if __name__ == "__main__":
    main()
