"""Find the EMM of a training procedure: the largest |D| at which it still memorizes 90% of its samples.

    python emm.py --width 256 --out runs/emm-w256                                    the paper's, on a GPU
    python emm.py --data digits --width 8 ... --n-min 20 --samples 500 --out runs/emm   minutes on two CPU cores

Each probed size is a run directory OUT/n000040 of train.py with the samples of its best snapshot and
probe.json, its ratio at every snapshot. OUT/emm.json has the result and OUT can be searched again with
another --eps or --tolerance: what has been trained is reused. Paper, section 2 (definition of EMM).
"""
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import data
import memorize
import run
import sample
import train
import unet
from run import option


@dataclass(frozen=True)
class Options(train.Options):
    n: int = option(0, "chosen by the search", hidden=True)
    out: str = option("runs/emm", "directory of the search, with a run directory for each size", recorded=False)
    n_min: int = option(500, "first size; doubled until the ratio falls under 1 - eps", recorded=False)
    n_max: int = option(0, "largest size; 0 means all images of the data", recorded=False)
    eps: float = option(0.1, "EMM is the largest |D| with a ratio of at least 1 - eps", recorded=False)
    tolerance: float = option(0.1, "stop when the bracket's ends differ by no more than this share", recorded=False)
    samples: int = option(10000, "samples a snapshot, seeds 0, 1, ...")
    threshold: str = option("1/3", "memorized below this ratio of nearest distances")

    def __post_init__(self):
        super().__post_init__()
        memorize.parse_threshold(self.threshold)
        if not 0 < self.eps < 1 or not self.tolerance > 0:
            raise ValueError(f"--eps {self.eps}, --tolerance {self.tolerance}: need 0 < eps < 1 and tolerance > 0")
        if self.n_min < 2 or self.n_max < 0 or self.samples < 1:
            raise ValueError(f"--n-min {self.n_min}, --n-max {self.n_max}, --samples {self.samples}: "
                             "need at least 2, 0 and 1")


def next_size(ratios, n_min, n_max, eps=0.1, tolerance=0.1, multiple=1):
    """The size to measure next, given the ratios {n: ratio} so far; None when the search is over.

    Doubles from n_min until the ratio falls under 1 - eps, then bisects on a log scale. Sizes are multiples
    of `multiple` (the number of classes), so that every training set is class-balanced.
    """
    low, high = bracket(ratios, eps)

    def rounded(n):  # at least two images: the verdict needs a second nearest
        least = math.ceil(2 / multiple) * multiple
        return min(max(round(n / multiple) * multiple, least), max(n_max // multiple * multiple, least))

    if low is None:
        return rounded(n_min) if rounded(n_min) not in ratios else None
    if high is None:
        return rounded(2 * low) if rounded(2 * low) > low else None
    middle = rounded(math.sqrt(low * high))
    return middle if high > low * (1 + tolerance) and low < middle < high else None


def bracket(ratios, eps=0.1):
    """(low, high): the largest size at or above 1 - eps and the next larger one measured; None where there is none."""
    low = max((n for n, ratio in ratios.items() if ratio >= 1 - eps), default=None)
    high = min((n for n in ratios if low is None or n > low), default=None)
    return low, high


def search(measure, n_min, n_max, eps=0.1, tolerance=0.1, multiple=1, known=None):
    """Find EMM with `measure(n)`, which returns the memorization ratio at size n; pure but for that call.

    `known` {n: ratio} are sizes measured before, which are not measured again. Returns a dict:
      emm        interpolated linearly at 1 - eps inside the bracket; None if the range does not hold it
      bracket    [low, high], None for an end that was not found
      probes     [[n, ratio], ...] in the order of measuring, the known ones first
      monotone   whether the ratio never rises with n
      statement  the result in words
    """
    ratios = dict(known or {})
    while (n := next_size(ratios, n_min, n_max, eps, tolerance, multiple)) is not None:
        ratios[n] = measure(n)
    low, high = bracket(ratios, eps)
    sizes = sorted(ratios)
    rises = [[a, b] for a, b in zip(sizes, sizes[1:]) if ratios[b] > ratios[a]]
    emm = None
    if low is None:
        statement = f"EMM is below {high}: the ratio there is {ratios[high]:.1%}, under {1 - eps:.0%}; lower --n-min"
    elif high is None:
        statement = f"EMM is at least {low}: the ratio there is {ratios[low]:.1%}; raise --n-max, or take more data"
    else:
        emm = low + (high - low) * (ratios[low] - (1 - eps)) / (ratios[low] - ratios[high])
        statement = f"EMM is about {emm:.0f}, between {low} ({ratios[low]:.1%}) and {high} ({ratios[high]:.1%})"
        if high > low * (1 + tolerance):
            statement += f"; no size in between is a multiple of {multiple}, so the tolerance of {tolerance:.0%} is not reached"
    if rises:
        statement += f"; the ratio is not monotone: it rises from {' and from '.join(f'{a} to {b}' for a, b in rises)}"
    return dict(emm=emm, bracket=[low, high], eps=eps, probes=[list(pair) for pair in ratios.items()],
                monotone=not rises, rises=rises, statement=statement)


def probe(options, n):
    """Train on n images, sample and score every snapshot; returns and writes what OUT/n.../probe.json holds.

    A killed probe goes on where it was: each snapshot's score is a file.
    """
    out = Path(options.out) / f"n{n:06d}"
    names = [field.name for field in dataclasses.fields(train.Options)]
    training = train.Options(**{name: getattr(options, name) for name in names} | dict(n=n, out=str(out)))
    train.train(training)
    result = out / "probe.json"
    if result.exists():
        return run.read_json(result)
    D, device = data.load(training), data.pick_device(options.device)
    threshold = memorize.parse_threshold(options.threshold)
    start, trajectory = time.perf_counter(), []
    for snapshot in train.snapshots(out):
        about = unet.read_metadata(snapshot)
        scored, samples = out / f"memorize-{about['step']:08d}.json", sample.default_out(snapshot)
        if not scored.exists():
            sample.sample(sample.Options(run=str(snapshot), seeds=f"0-{options.samples - 1}", device=options.device))
            images, _, _ = data.read(str(samples))
            summary, *_ = memorize.score(images.to(device), D.images.to(device), threshold)
            run.write_json(scored, summary)
        summary = run.read_json(scored)
        trajectory.append(dict(step=about["step"], epoch=about["epoch"], snapshot=snapshot.name, samples=samples.name,
                               ratio=summary["ratio"], interval_95=summary["interval_95"]))
        best = max(trajectory, key=lambda point: point["ratio"])  # the earliest of equals
        for point in trajectory:
            if point is not best:  # only the best samples stay
                (out / point["samples"]).unlink(missing_ok=True)
    log = run.read_log(out / "log.jsonl")
    run.write_json(result, dict(
        n=n, ratio=best["ratio"], interval_95=best["interval_95"], best=best, last_ratio=trajectory[-1]["ratio"],
        images_trained=log[-1]["images"], samples_drawn=len(trajectory) * options.samples,
        training_seconds=log[-1]["seconds"], sampling_seconds=round(time.perf_counter() - start, 3),
        finished=time.time(), trajectory=trajectory))
    return run.read_json(result)


def find(options):
    """Search for EMM as the options say, with a line for each probe; returns the path of OUT/emm.json."""
    out = Path(options.out)
    whole = data.load(data.Options(data=options.data, classes=options.classes, resolution=options.resolution))
    classes = len(whole.labels.unique())
    multiple = classes if classes <= options.n_min else 1  # many classes, few images: no balance to keep
    n_max = min(options.n_max or len(whole), len(whole))
    if options.n_min > n_max:
        raise ValueError(f"--n-min {options.n_min} is more than the {n_max} images of --n-max and --data; lower it")
    about = dict(stage="emm", options=run.recorded(options), data=whole.fingerprint(),
                 **run.provenance(data.pick_device(options.device)))
    run.claim(out, about, run.defaults(Options))
    done = sorted((run.read_json(path) for path in out.glob("n*/probe.json")), key=lambda p: p["finished"])
    probes = {p["n"]: p for p in done}
    print(f"{'|D|':>7} {'ratio':>7} {'95% interval':>15} {'best epoch':>10} {'last':>7} {'train s':>8} {'sample s':>8}  ratio >= {1 - options.eps:g}?")

    def line(p):
        low, high = p["interval_95"]
        print(f"{p['n']:7d} {p['ratio']:7.2%} {low:7.2%}-{high:7.2%} {p['best']['epoch']:10.0f} {p['last_ratio']:7.2%} "
              f"{p['training_seconds']:8.0f} {p['sampling_seconds']:8.0f}  {'yes' if p['ratio'] >= 1 - options.eps else 'no'}", flush=True)

    def measure(n):
        probes[n] = probe(options, n)
        line(probes[n])
        return probes[n]["ratio"]

    for p in done:
        line(p)
    found = search(measure, options.n_min, n_max, options.eps, options.tolerance, multiple,
                   {n: p["ratio"] for n, p in probes.items()})
    print(found["statement"])
    run.write_json(out / "emm.json", found | dict(probes=list(probes.values()), tolerance=options.tolerance, **about))
    return out / "emm.json"


def main():
    print(f"wrote {run.stage(find, Options, __doc__)}")


if __name__ == "__main__":
    main()
