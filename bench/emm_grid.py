"""emm.py beside a plain full grid, run for real: EMM of digits for two widths and three seeds, and its cost.

    python bench/emm_grid.py     an hour and a half on one core; the same command resumes it

The grid is the paper's way: the same sizes for every width and seed, in steps of the tolerance, each
trained to its end, with all samples drawn from every snapshot. The search may draw up to as many samples of
a snapshot, and stops when it has enough. The two ways share no runs.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import emm
from bench import machine
from bench.simulate_search import steps
from disk import provenance, read_json
from run import option, stage

RECIPE = dict(data="digits", channel_mult=(2, 2), blocks=1, batch=32, learning_rate=4e-3,
              steps=1200, warmup_steps=50, dropout=0.0, ema_halflife=50.0, ema_rampup_steps=1200,
              snapshots=4, device="cpu")


@dataclass(frozen=True)
class Options:
    out: str = option("runs/bench-emm", "directory of the runs")
    widths: tuple[int, ...] = option((8, 12), "widths of the network")
    train_seeds: tuple[int, ...] = option((0, 1, 2), "seeds of training set and training")
    n_min: int = option(6, "smallest size")
    n_max: int = option(36, "largest size")
    tolerance: float = option(0.3, "of the bracket, and the steps of the grid")
    sample_count: int = option(1000, "samples a snapshot: all of them for the grid, at most for the search")


def bench(options):
    grid = steps(options.n_min, options.n_max, options.tolerance)
    rows = []
    print(f"sizes of the grid: {', '.join(map(str, grid))}", file=sys.stderr)
    for width in options.widths:
        for seed in options.train_seeds:
            for way, how in (("search", dict()), ("grid", dict(full=True, sizes=tuple(grid)))):
                out = Path(options.out) / f"{way}-w{width}-s{seed}"
                found = read_json(emm.find(emm.Options(
                    **RECIPE, width=width, seed=seed, subset_seed=seed, out=str(out),
                    n_min=options.n_min, n_max=options.n_max,
                    tolerance=options.tolerance, sample_count=options.sample_count, **how)))
                seconds = sum(p["training_seconds"] + p["sampling_seconds"] for p in found["probes"])
                rows.append(dict(
                    way=way, width=width, seed=seed,
                    emm=found["emm"], interval=found["interval"], bracket=found["bracket"],
                    rises=found["rises"], sizes=len(found["probes"]), images=found["images_trained"],
                    samples=found["samples_drawn"], seconds=round(seconds)))
    print("\nwidth  seed  way     EMM   interval         sizes  images trained  samples drawn  seconds")
    for row in rows:
        low, high = ("" if end is None else f"{end:.0f}" for end in row["interval"])
        print(f"{row['width']:>5} {row['seed']:>5}  {row['way']:<6} {row['emm'] or float('nan'):>5.0f}   "
              f"{low + ' to ' + high:<15} {row['sizes']:>6} {row['images']:>15,} {row['samples']:>14,} "
              f"{row['seconds']:>8,}")
    total = {way: [sum(row[key] for row in rows if row["way"] == way)
                   for key in ("images", "samples", "seconds")]
             for way in ("search", "grid")}
    shares = [a / b for a, b in zip(total["search"], total["grid"])]
    print("search / grid: {:.2f} of the images trained, {:.3f} of the samples drawn, "
          "{:.2f} of the seconds".format(*shares))
    record = dict(provenance(), machine=machine.name(), rows=rows, shares=shares, recipe=RECIPE)
    print(machine.save("emm-grid", record))


def main():
    stage(bench, Options, __doc__)


if __name__ == "__main__":
    main()
