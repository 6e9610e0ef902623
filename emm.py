"""Find the EMM of a training procedure: the largest |D| at which it still memorizes 90% of its samples.

    python emm.py --width 256 --out runs/emm-w256                              the paper's, on a GPU
    python emm.py --data digits --width 8 --blocks 1 --batch 128 --learning-rate 4e-3 --epochs 6000 \\
        --warmup-steps 50 --dropout 0 --ema-halflife 50 --ema-rampup-epochs 6000 --snapshots 4 \\
        --n-min 20 --n-max 200 --sample-count 500 --out runs/emm-digits             minutes on two CPU cores

Each probed size is a run directory OUT/n000040 of train.py, with scores.json: how many samples of each
snapshot are memorized. A snapshot is sampled until a sequential test says whether its ratio is above or
below 1 - eps. A size is above as soon as one of its snapshots is, and its training stops there. Sizes
double from 2 n-min until one is below; from then on the ratios say where EMM lies (search.py).

OUT/emm.json has the result and the whole history, which a search with another eps or tolerance reuses. A
killed search resumes at the step that it had reached. Paper, section 2 (definition of EMM).
"""
import contextlib
import dataclasses
import multiprocessing
import signal
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import data
import disk
import memorize
import parallel
import run
import sample
import search
import train
from diffusion import denoiser
from diffusion.solvers import Sampling
from images.labels import are_drawn
from kernels import References
from run import option
from search import CONFIDENCE

SEEDS = "seed", "subset_seed", "label_seed"  # that --train-seeds sets


@dataclass(frozen=True)
class Options(Sampling, train.Options):
    n: int = option(0, None)  # chosen by the search
    out: str = option("runs/emm", "directory of the search; each size has one in it", recorded=False)
    n_min: int = option(500, "smallest size; others are balanced over the classes", recorded=False, least=2)
    n_max: int = option(0, "largest size of a search; 0 means all of the data", recorded=False, least=0)
    eps: float = option(0.1, "EMM is the largest |D| with a ratio of at least 1 - eps", recorded=False)
    tolerance: float = option(0.1, "by what share the bracket's ends may differ at the end", recorded=False)
    sample_count: int = option(10000, "samples a snapshot at most, seeds 0, 1, ...", recorded=False, least=1)
    alpha: float = option(0.01, "chance of a wrong verdict on a size, at most", recorded=False)
    full: bool = option(False, "train to the end and draw all samples, as published", recorded=False)
    sizes: tuple[int, ...] = option((), "measure these sizes instead of searching", recorded=False,
                                     distinct=True)
    train_seeds: tuple[int, ...] = option(
        (), "search once for each, as --seed, --subset-seed and --label-seed: other weights, images, labels",
        recorded=False, least=0, below=2**32, distinct=True)
    devices: tuple[str, ...] = option((), "a size on each at once, such as cuda:0,cuda:1", recorded=False)
    threshold: str = option("1/3", "memorized below this ratio of nearest distances")
    mirror: bool = option(False, "also compare with mirrored training images")

    def __post_init__(self):
        super().__post_init__()
        if self.guidance != 1 and self.labels == "none":
            raise ValueError(f"--guidance {self.guidance:g} weighs a label against none; give --labels too")
        if self.train_seeds and any(getattr(self, name) != getattr(Options, name) for name in SEEDS):
            raise ValueError(f"--train-seeds {','.join(map(str, self.train_seeds))} sets --seed, "
                             "--subset-seed and --label-seed of each; leave those out, or --train-seeds")
        if parallel.size() > 1:
            raise ValueError("emm.py is one process, which starts its own: "
                             "give it --devices cuda:0,cuda:1 instead of torchrun")
        memorize.parse_threshold(self.threshold)
        if not 0 < self.eps < 1 or not self.tolerance > 0 or not 0 < self.alpha < 1:
            raise ValueError(f"--eps {self.eps}, --tolerance {self.tolerance}, --alpha {self.alpha}: "
                             "need 0 < eps < 1, tolerance > 0 and 0 < alpha < 1")


class Probe:
    """One size n of a search: its run directory, and the scores of its snapshots.

    `scores` is {step: dict(epoch, file, hits, count)}: of `count` samples, `hits` are memorized.
    """

    def __init__(self, options, n):
        self.options, self.n = options, n
        self.files = disk.Directory(Path(options.out) / f"n{n:06d}")
        self.training = run.narrowed(options, train.Options, n=n, out=str(self.files.path))
        self.snapshot_steps = train.snapshot_steps(self.training, n)
        sampling = run.recorded(run.narrowed(options, Sampling))
        self.about = dict(options=data.recorded(self.training) | sampling)
        there = dict(snapshots={}, sampling_seconds=0.0, started=time.time())
        there |= disk.earlier(self.files.scores, self.about, run.defaults(Options))
        self.scores = {int(step): score for step, score in there["snapshots"].items()}
        self.sampling_seconds, self.started = there["sampling_seconds"], there["started"]

    def verdict(self, score):
        """True if this snapshot is above 1 - eps, False if below, None if that takes more samples."""
        o = self.options
        decided = None if o.full else self.tested(score)
        if decided is None and score["count"] >= o.sample_count:
            return score["hits"] >= search.target(o.eps) * score["count"]
        if decided is None and not o.full and not (self.files.path / score["file"]).exists():
            return False  # a snapshot that was removed was not the best, and cannot be sampled again
        return decided

    def tested(self, score):
        """The verdict of the sequential test alone, None while it is open.

        One snapshot above makes a size above: all of them share alpha, the chance to err that way.
        """
        o = self.options
        alpha_above = o.alpha / len(self.snapshot_steps)
        return search.verdict(score["hits"], score["count"], 1 - o.eps, alpha_above, o.alpha)

    def above(self):
        """True once one snapshot is above 1 - eps, False if all are below, None if that is still open."""
        verdicts = [self.verdict(score) for score in self.scores.values()]
        if any(verdicts) and (self.whole() or not self.options.full):
            return True
        return False if self.whole() and None not in verdicts else None

    def whole(self):
        """Whether the end of the training has been scored."""
        return any(score["file"] == self.files.model.name for score in self.scores.values())

    def measure(self):
        """Train and sample until `above` is known. A killed probe resumes at the step it had reached."""
        references = References(data.load(self.training).images.to(data.pick_device(self.options.device)))
        with contextlib.closing(train.training(self.training)) as snapshots:  # which holds the directory
            for snapshot in snapshots:
                if self.score(snapshot, references) and not self.options.full:
                    break
            self.files.state.unlink(missing_ok=True)  # large, and a decided size takes no more steps
        if self.above() is None:
            raise ValueError(f"{self.files.path} has lost snapshots whose verdict is open; "
                             f"remove it to measure |D| = {self.n} again")

    def score(self, snapshot, references):
        """Sample a snapshot file until its verdict, and return that; a search keeps the best and the last."""
        o, device, D = self.options, data.pick_device(self.options.device), None
        about = disk.metadata(snapshot)
        fresh = dict(epoch=about["epoch"], file=snapshot.name, hits=0, count=0)
        if "validation_loss" in about:
            fresh["validation_loss"] = about["validation_loss"]
        score = self.scores.setdefault(about["step"], fresh)
        labels = sample.weigh_labels(about["label_counts"], o.sample_labels)
        while (verdict := self.verdict(score)) is None:
            start = time.perf_counter()
            D = D or checkpoint.load_model(snapshot, device)[0].use(o.precision)
            more = o.sample_count if o.full else search.next_samples(score["count"], sample.chunk(D))
            seeds = range(score["count"], min(score["count"] + more, o.sample_count))
            x, _ = sample.generate(D, seeds, labels, sampling=o, device=device)
            copied = memorize.measured(x.to(device), references, memorize.parse_threshold(o.threshold),
                                       mirror=o.mirror)[0]
            score["hits"] += int(copied.sum())
            score["count"] += len(x)
            self.sampling_seconds += time.perf_counter() - start
            disk.write_json(self.files.scores, dict(
                snapshots=self.scores, sampling_seconds=round(self.sampling_seconds, 3),
                started=self.started, **self.about))
            if run.interrupted():
                raise KeyboardInterrupt(f"the scores so far are in {self.files.scores}; "
                                        "the same command goes on from there")
        if D:
            low, high = search.interval(score["hits"], score["count"], 1 - CONFIDENCE)
            print(f"|D| = {self.n}, epoch {score['epoch']:.0f}: {ratio_of(score):.2%} of {score['count']} "
                  f"samples memorized (95% interval at any look {low:.2%} to {high:.2%}), "
                  f"{'above' if verdict else 'below'} {100 * (1 - o.eps):g}%", flush=True)
        if not o.full:  # weights are large
            best = max(self.scores.values(), key=ratio_of)["file"]
            for path in self.files.snapshots()[:-1]:
                if path.name != best and path.name in {s["file"] for s in self.scores.values()}:
                    path.unlink()
        return verdict

    def record(self):
        """What is known of this size, for search.py and emm.json; None if it is not decided."""
        above = self.above()
        if above is None:
            return None
        trajectory = [dict(step=step, **score, ratio=ratio_of(score), interval=search.interval(
            score["hits"], score["count"], 1 - CONFIDENCE)) for step, score in sorted(self.scores.items())]
        verdicts = [self.tested(t) for t in trajectory]
        best = max(trajectory, key=ratio_of)
        known = [t for t in trajectory if "validation_loss" in t]
        return dict(
            n=self.n, started=self.started, above=above, whole=self.whole(), ratio=best["ratio"],
            interval=search.interval_of_best([(t["hits"], t["count"]) for t in trajectory],
                                             (1 - CONFIDENCE) / len(self.snapshot_steps)),
            decided=any(verdicts) if above else all(verdict is False for verdict in verdicts),
            best=best,
            at_least_validation_loss=min(known, key=lambda t: t["validation_loss"], default=None),
            images_trained=trajectory[-1]["step"] * self.options.batch,
            samples_drawn=sum(t["count"] for t in trajectory),
            training_seconds=max(
                (line.get("seconds", 0) for line in disk.read_log(self.files.log)), default=0),
            sampling_seconds=round(self.sampling_seconds, 3),
            trajectory=trajectory, onset={f"{r:g}": search.onset(trajectory, r) for r in search.ONSETS})


def ratio_of(score):
    return score["hits"] / score["count"] if score["count"] else 0.0


def measure(options, n):
    """Measure one size, in this process or in one of its own; returns its record."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        probe = Probe(options, n)
        probe.measure()
        return probe.record()
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def workers(devices):
    """Yield [(device, submit)], where submit(function, *arguments) returns a future.

    Each of several devices has a process of its own, so that the memory which torch caches is used again.
    SIGTERM stops a measurement there, and is ignored between two of them. With one device, `submit` runs the
    function in this process, at once.
    """
    def here(function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future

    if len(devices) < 2:
        yield [(devices[0], here)]
        return
    with contextlib.ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        ignore = signal.signal, (signal.SIGTERM, signal.SIG_IGN)
        processes = [stack.enter_context(ProcessPoolExecutor(1, context, *ignore)) for _ in devices]
        try:
            yield [(device, process.submit) for device, process in zip(devices, processes)]
        finally:  # after an error elsewhere, or once no more is needed: what still runs saves its state
            for process in multiprocessing.active_children():
                process.terminate()


def source(options):
    """All images that training sets are drawn from."""
    return data.load(run.narrowed(options, data.Options, n=0, subset_seed=None, labels="none"))


def find(options):
    """Search for EMM as the options say, printing a line a snapshot; returns the path of OUT/emm.json."""
    devices = options.devices or (options.device,)
    device = data.pick_device(devices[0])
    options = dataclasses.replace(options, precision=denoiser.precision_on(device, options.precision))
    if options.train_seeds:
        return find_each(options)
    out, images = Path(options.out), source(options)
    data.say_duplicates(images)
    sample.say_untrained(options, run.recorded(options))
    how = ways(options, images)
    about = dict(stage="emm", options=data.recorded(options), data=images.fingerprint(),
                 **disk.provenance(device))
    del images  # each probe loads its own images
    with disk.claim(out, about, run.defaults(Options)), workers(devices) as free:
        records = measure_all(options, how, free)
        found = search.estimate(records, options.eps, None if options.sizes else options.tolerance,
                                how["multiple"])
        undecided = [n for n in sorted(records) if not records[n]["decided"]]
        if undecided:
            at = ", ".join(map(str, undecided))
            found["statement"] += (f"; at |D| = {at} the samples ran out before a "
                                   "verdict, and the measured ratio decides")
        print(found["statement"])
        disk.write_json(out / "emm.json", found | dict(
            {name: getattr(options, name) for name in ("eps", "tolerance", "alpha", "sample_count", "full")},
            confidence=CONFIDENCE, undecided=undecided,
            probes=sorted(records.values(), key=lambda r: r["started"]), **about,
            **{key: sum(r[key] for r in records.values()) for key in ("images_trained", "samples_drawn")}))
    return out / "emm.json"


def ways(options, images):
    """What search.py's functions need besides records. Raises ValueError for sizes that cannot be."""
    most = max(0, len(images) - options.validate)  # those are outside every size
    n_max = min(options.n_max or most, most)
    if options.n_min > n_max and not options.sizes:
        fewer = "lower it, or " if options.n_min > 2 else ""
        raise ValueError(f"--n-min {options.n_min} is more than the {n_max} images there are"
                         f"{' up to --n-max' if options.n_max == n_max else ''}; {fewer}take more images")
    if any(not 2 <= n <= most for n in options.sizes):
        raise ValueError(f"--sizes {options.sizes}: each must be from 2 to the {most} images of --data"
                         f"{' that --validate leaves' * (options.validate > 0)}")
    classes = len(images.labels.unique())  # sizes are balanced, unless those are many and the images few
    return dict(n_min=options.n_min, n_max=n_max, eps=options.eps, tolerance=options.tolerance,
                multiple=classes if classes <= options.n_min else 1)


def measure_all(options, how, free):
    """Measure size after size on the workers that are free; returns the records {n: record} of all."""
    probes = [Probe(options, int(path.parent.name[1:])) for path in Path(options.out).glob("n*/scores.json")]
    probes.sort(key=lambda probe: probe.started)
    records = {probe.n: record for probe in probes if (record := probe.record())}
    running = {}
    while True:
        busy = [n for n, _ in running.values()]
        if options.sizes:
            sizes = [n for n in options.sizes if n not in records and n not in busy]
        elif search.next_size(records, **how) is None:
            return records  # what still runs cannot change the bracket
        else:
            sizes = search.next_sizes(records, len(free), running=busy, **how)
        for n in sizes[:len(free)]:
            device, submit = worker = free.pop(0)
            one = dataclasses.replace(options, device=device, devices=())
            running[submit(measure, one, n)] = n, worker
        if not running:
            return records
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            n, worker = running.pop(future)
            records[n] = future.result()
            free.append(worker)


def find_each(options):
    """`find` for each of --train-seeds, which also draw the training sets and their labels.

    OUT/emm.json has their mean and its interval.
    """
    out = Path(options.out)
    names = SEEDS if are_drawn(options.labels) else SEEDS[:2]
    varied = dict.fromkeys(names, "each of --train-seeds")
    about = dict(stage="emm", options=data.recorded(options) | varied, data=source(options).fingerprint(),
                 **disk.provenance())
    with disk.claim(out, about, run.defaults(Options)):
        paths = [find(dataclasses.replace(options, train_seeds=(), out=str(out / f"seed{seed}"),
                                          **dict.fromkeys(names, seed)))
                 for seed in options.train_seeds]
        values = [disk.read_json(path)["emm"] for path in paths]
        result = dict(seeds=options.train_seeds, emms=values,
                      searches=[str(path.relative_to(out)) for path in paths],
                      confidence=CONFIDENCE, **mean_interval(values), **about)
        print(result["statement"])
        disk.write_json(out / "emm.json", result)
    return out / "emm.json"


def mean_interval(values):
    """The mean of EMM over seeds, its Student interval, and a statement of both.

    Where a seed has no value, there is no mean; a single seed gives its value without an interval.
    """
    if None in values:
        found = ", ".join("none" if value is None else f"{value:.0f}" for value in values)
        few = f" for every seed ({found}), and so has no mean" if len(values) > 1 else ""
        return dict(emm=None, interval=None, statement=f"EMM was not found{few}")
    if len(values) == 1:
        return dict(emm=values[0], interval=None,
                    statement=f"EMM is {values[0]:.0f}, of one seed: no interval over seeds")
    mean, half = search.student(values)
    low, high = interval = [mean - half, mean + half]
    return dict(emm=mean, interval=interval, statement=(
        f"EMM is {mean:.0f} on average over {len(values)} seeds (training set, initial weights, noise), "
        f"95% interval {low:.0f} to {high:.0f}"))


def main():
    run.stage(find, Options, __doc__, words="wrote {}".format)


if __name__ == "__main__":
    main()
