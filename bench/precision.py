"""Does --precision change what is memorized? The same trainings in float32 and in bfloat16, seed by seed.

    python bench/precision.py                                                 digits, 12 minutes on one core
    python bench/precision.py --data images.zip --resolution 8 --width 16     photographs, half an hour

Each seed draws training set, initial weights and noise, the same for both precisions. Writes the ratio of
every run at its last snapshot, and the mean difference with its Student interval. The same command resumes
it after a stop.
"""
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import emm
from bench import machine
from disk import provenance, read_json
from run import option, recorded, stage

RECIPE = dict(blocks=1, learning_rate=4e-3, warmup_steps=50, dropout=0.0, ema_halflife=50.0,
              snapshots=1, full=True)


@dataclass(frozen=True)
class Options(data.Options):
    data: str = option("digits", "training images, as in train.py")
    n: int = option(48, "size of the training set; choose it so that about half of the samples are memorized")
    width: int = option(8, "width of the network")
    batch: int = option(64, "images a step")
    steps: int = option(2500, "steps a run")
    sample_count: int = option(1000, "samples a run")
    train_seeds: tuple[int, ...] = option((0, 1, 2, 3, 4), "seeds, each with a run of either precision")
    precisions: tuple[str, ...] = option(
        ("fp32", "bf16"), "precisions; the others are compared with the first")
    device: str = option("cpu", "auto, cpu, cuda or cuda:N")
    threads: int = option(0, "CPU threads; 0 takes all cores")
    runs: str = option("runs/bench-precision", "directory of the runs", recorded=False)


def bench(options):
    """Train, sample and score every run; returns the path of the result file."""
    o, ratios = options, {precision: [] for precision in options.precisions}
    name = f"{Path(o.data).stem.replace(':', '-')}-{o.resolution or 'native'}-w{o.width}-n{o.n}"
    for seed in o.train_seeds:
        for precision in o.precisions:
            found = read_json(emm.find(emm.Options(
                **RECIPE, data=o.data, resolution=o.resolution, width=o.width, batch=o.batch, steps=o.steps,
                ema_rampup_steps=o.steps, sizes=(o.n,), sample_count=o.sample_count, seed=seed,
                subset_seed=seed, precision=precision, device=o.device, threads=o.threads,
                out=str(Path(o.runs) / f"{name}-{precision}-s{seed}"))))
            ratios[precision].append(found["probes"][0]["ratio"])
    base, differences = o.precisions[0], {}
    for precision in o.precisions:
        print(f"{precision}: {statistics.mean(ratios[precision]):.1%} memorized on average "
              f"({', '.join(f'{ratio:.1%}' for ratio in ratios[precision])})")
        if precision != base:
            apart = emm.mean_interval([b - a for a, b in zip(ratios[base], ratios[precision])])
            differences[precision] = dict(mean=apart["emm"], interval=apart["interval"])
            low, high = (100 * end for end in apart["interval"])
            print(f"{precision} less {base}: {100 * apart['emm']:+.1f} points, "
                  f"95% interval {low:+.1f} to {high:+.1f}")
    return machine.save(f"precision-{name}", dict(
        provenance(o.device), machine=machine.name(), options=recorded(o),
        recipe=RECIPE, ratios=ratios, differences=differences))


def main():
    print(f"wrote {stage(bench, Options, __doc__)}")


if __name__ == "__main__":
    main()
