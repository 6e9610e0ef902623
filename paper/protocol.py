"""The experiments of the paper in one table: what each varies and claims, at the paper's scale and a CPU's.

Read by experiments.py, which runs them, by report.py, which compares claims with what was measured, and by
the Makefile's tests. A point is a set of options of emm.py. Paper, sections 3 to 6.
"""
import math
from dataclasses import dataclass, field

SCALES = ("cpu", "paper")
# What all points of a scale have in common. On a CPU: a recipe in which ratios lie between 10% and 95%.
BASE = dict(
    paper="--data cifar10",
    cpu="--data digits --width 8 --blocks 1 --channel-mult 2,2 --batch 64 --learning-rate 8e-3 "
        "--steps 400 --warmup-steps 50 --dropout 0 --ema-halflife 20 --ema-rampup-steps 50 --snapshots 2 "
        "--samples 256 --device cpu")
EMM_RANGE = dict(paper="--n-min 500", cpu="--n-min 2 --n-max 64 --tolerance 0.4")
# What a base has anyway and points that name no data of their own need not say, so that runs are shared
NATIVE = dict(digits=("--resolution 8", "--classes 10", "--embedding positional"),
              cifar10=("--resolution 32", "--classes 10", "--embedding positional"))


@dataclass(frozen=True)
class Point:
    """A place in a figure: its line, its x, the options that vary, and |D|; None asks for EMM."""
    series: str
    x: float | str
    words: str
    n: int | None = None


@dataclass(frozen=True)
class Claim:
    """More memorization at the first place than at the second.

    A place is (series, x): `FIRST` and `LAST` are the ends of the series, and `ALL` its mean over the x that
    both series have.
    """
    words: str
    more: tuple
    less: tuple


@dataclass(frozen=True)
class Experiment:
    about: str
    x: str
    finding: str                                   # the paper's, in our words
    claims: list
    paper: list
    cpu: list
    # (series, x, or None for that of the file) here -> (experiment, series or None for all) of the figures
    published: dict = field(default_factory=dict)


FIRST, LAST, ALL = "first", "last", "all"


def over(flag, *values, n=None, series="", also=""):
    """A point for each value of an option."""
    return [Point(series, value, f"{flag} {value} {also}".strip(), n) for value in values]


def sizes(*values, series="", words=""):
    """A point for each |D|."""
    return [Point(series, n, words, n) for n in values]


def each(words, n=None, series=""):
    """A point for each x: words."""
    return [Point(series, x, w, n) for x, w in words.items()]


def embeddings(*blocks):
    """Both time embeddings at each depth."""
    return [p for b in blocks for p in over("--embedding", "positional", "fourier", also=f"--blocks {b}",
                                            series=f"{b} blocks" if b > 1 else "1 block")]


def skips(count, kept, extra=""):
    """--skip-connections with those indices kept, counted from 1 in encoder order."""
    return f"--skip-connections {','.join(str(int(i in kept)) for i in range(1, count + 1))} {extra}".strip()


def at_resolution(side, blocks, resolution):
    """Indices of the skips at one resolution, from 1."""
    level = int(math.log2(side // resolution))
    return range(level * (blocks + 1) + 1, (level + 1) * (blocks + 1) + 1)


def resolutions_of_skips(side, blocks, n, extra=""):
    """All skips; all of one resolution; all but one of it, where that is not one alone; and each alone."""
    count, points = 3 * (blocks + 1), [Point(ALL_KEPT, "all", extra, n)]
    for r in (side, side // 2, side // 4):
        here = at_resolution(side, blocks, r)
        points.append(Point(ONE_RESOLUTION, f"{r}x{r}", skips(count, here, extra), n))
        if len(here) > 2:
            for left in reversed(here):
                kept = [i for i in here if i != left]
                place = f"{r}x{r}: {'+'.join(map(str, kept))}"
                points.append(Point(TWO_KEPT, place, skips(count, kept, extra), n))
    return points + [Point(ONE_SKIP, str(i), skips(count, [i], extra), n) for i in range(1, count + 1)]


def random_labels(n, *counts):
    return each({count: f"--labels random:{count}" for count in counts}, n, f"|D| = {n}")


ALL_KEPT, ONE_RESOLUTION = "all kept", "one resolution"
TWO_KEPT, ONE_SKIP = "two of one resolution", "one skip"
LABELS = {"none": "", "true": "--labels true", "random 10": "--labels random:10"}
# Three resolutions, where the base on a CPU has two; with few skips training takes longer
THREE = "--channel-mult 2,2,2 --steps 500"
NCSN = "--arch ncsnpp --precond ve"
BATCHES = {b: f"--batch {b} --learning-rate {b / 512 * 2e-4:g}" for b in (128, 256, 384, 512, 640, 768, 896)}
CPU_BATCHES = {b: f"--batch {b} --learning-rate {b / 64 * 8e-3:g} "
                  f"--steps {400 * 64 // b} --warmup-steps {50 * 64 // b}" for b in (32, 64, 128)}
DECAYS = ("0", "1e-5", "1e-4", "1e-3", "1e-2", "2e-2", "5e-2", "8e-2", "1e-1")
CPU_DECAYS = ("0", "1e-4", "1e-3", "1e-2", "1e-1")
EMA_RATES = ("0.99929", "0.999", "0.99", "0.9", "0.8", "0.5", "0.2", "0.1", "0")
CPU_EMA_RATES = ("0.99", "0.97", "0.9", "0.8", "0.5", "0")  # of 400 steps, and not of 78,000
SHARES = (0, 0.2, 0.5, 0.8, 1)
UNIQUE = "--precond edm --blocks 4 --epochs 12000 --learning-rate 1e-3"
SKIP_CLAIMS = [
    Claim("skips of the highest resolution matter most: "
          "kept alone, they memorize more than those of the lowest",
          (ONE_RESOLUTION, FIRST), (ONE_RESOLUTION, LAST)),
    Claim("the first skip alone memorizes more than the last alone", (ONE_SKIP, FIRST), (ONE_SKIP, LAST))]

EXPERIMENTS = {
    "optimum": Experiment(
        "the closed-form optimum beside a trained model", "denoiser",
        "The optimum of the training loss replays training images; "
        "a model trained on all of CIFAR-10 does not.",
        [Claim("the optimum memorizes more than the trained model", ("", "closed form"), ("", "trained"))],
        [Point("", "closed form", "", 50_000), Point("", "trained", "", 50_000)],
        [Point("", "closed form", "", 64), Point("", "trained", "", 64)]),
    "size": Experiment(
        "training set size", "training images |D|",
        "The fewer the training images, the more of the samples are copies.",
        [Claim("the smallest training set is memorized more than the largest", ("", FIRST), ("", LAST))],
        sizes(500, 1000, 2000, 5000, 10_000, 20_000, 50_000), sizes(8, 16, 24, 32, words="--snapshots 8"),
        {("", None): ("labels", "unconditional")}),
    "resolution": Experiment(
        "resolution, the same images resized", "pixels a side",
        "EMM falls as resolution grows: about 7,600 images of 8x8, 4,500 of 16x16 and 1,060 of 32x32, "
        "where the curves of its figure cross 90%.",
        [Claim("EMM is larger at the lowest resolution than at that of the images themselves",
               ("", LAST), ("", FIRST))],
        over("--resolution", 32, 16, 8),
        over("--resolution", 16, series="enlarged from 8") + over("--resolution", 8, 4),
        {("", None): ("resolution", None)}),
    "classes": Experiment(
        "number of classes", "classes",
        "More classes, a more diverse set, are memorized less.",
        [Claim("one class is memorized more than all ten", ("", FIRST), ("", LAST))],
        over("--classes", 1, 2, 5, 10), over("--classes", 1, 2, 5, 10)),
    "width": Experiment(
        "width of the U-Net", "width", "Wider networks memorize more.",
        [Claim("the widest network memorizes more than the narrowest", ("", LAST), ("", FIRST))],
        over("--width", 128, 192, 256, 320), over("--width", 8, 12, 16)),
    "depth": Experiment(
        "residual blocks a resolution", "blocks", "Depth has no monotonic effect.", [],
        over("--blocks", 2, 4, 6, 8, 10, 12), over("--blocks", 1, 2, 3)),
    "embedding": Experiment(
        "time embedding", "embedding",
        "Fourier features in DDPM++ memorize less than the positional embedding.",
        [Claim("positional embedding memorizes more than Fourier features, at the smallest depth",
               (FIRST, "positional"), (FIRST, "fourier")),
         Claim("and at the largest", (LAST, "positional"), (LAST, "fourier"))],
        embeddings(2, 4), embeddings(1, 2)),
    "skips": Experiment(
        "skip connections kept, DDPM++ with VP", "skips kept",
        "Few skips are enough; those of the highest resolution carry memorization.", SKIP_CLAIMS,
        resolutions_of_skips(32, 2, 1000), resolutions_of_skips(8, 1, 8, THREE),
        {(ONE_SKIP, None): ("one_skip_kept", None),
         (ONE_RESOLUTION, None): ("skips_kept_at_one_resolution", "three kept")}),
    "skips-ncsn": Experiment(
        "skip connections kept, NCSN++ with VE", "skips kept", "The same in NCSN++.", SKIP_CLAIMS,
        resolutions_of_skips(32, 2, 1000, NCSN), resolutions_of_skips(8, 1, 8, f"{NCSN} {THREE}")),
    "batch": Experiment(
        "batch, the rate in proportion", "batch", "Larger batches memorize more.",
        [Claim("the largest batch memorizes more than the smallest", (FIRST, LAST), (FIRST, FIRST))],
        each(BATCHES, 2000, "|D| = 2000"), each(CPU_BATCHES, 16, "|D| = 16")),
    "batch-emm": Experiment(
        "batch, the rate in proportion", "batch", "Larger batches memorize more.",
        [Claim("the largest batch has a larger EMM than the smallest", ("", LAST), ("", FIRST))],
        each(BATCHES), each(CPU_BATCHES)),
    "weight-decay": Experiment(
        "weight decay", "weight decay", "Weak decay changes little, strong decay prevents memorization.",
        [Claim("no decay memorizes more than the strongest", ("", FIRST), ("", LAST))],
        over("--weight-decay", *DECAYS, n=2000), over("--weight-decay", *CPU_DECAYS, n=16)),
    "ema": Experiment(
        "rate of the average of the weights", "EMA rate", "The rate changes little.", [],
        over("--ema-rate", *EMA_RATES, n=2000), over("--ema-rate", *CPU_EMA_RATES, n=16)),
    "labels": Experiment(
        "labels the model is given", "training images |D|",
        "Conditioning on classes triggers memorization, and random labels do as much.",
        [Claim("true labels memorize more than none, on average over |D|", ("true", ALL), ("none", ALL)),
         Claim("ten random labels memorize more than none, on average over |D|",
               ("random 10", ALL), ("none", ALL))],
        [p for s, w in LABELS.items() for p in sizes(1000, 2000, 3000, 4000, 5000, series=s, words=w)],
        [p for s, w in LABELS.items() for p in sizes(16, 24, 32, series=s, words=w)],
        {("none", None): ("labels", "unconditional"), ("true", None): ("labels", "true"),
         ("random 10", None): ("labels", "random10")}),
    "random-labels": Experiment(
        "number of random labels", "random labels", "The more random labels, the more memorization.",
        [Claim("the most labels memorize more than one, on the fewest images", (FIRST, LAST), (FIRST, FIRST)),
         Claim("and on the most images", (LAST, LAST), (LAST, FIRST))],
        random_labels(1000, 1, 2, 5, 10, 20, 50, 100)
        + random_labels(2000, 1, 2, 5, 10, 20, 50, 100)
        + random_labels(5000, 1, 10, 50, 100, 500, 1000),
        random_labels(16, 1, 2, 5, 10, 16) + random_labels(32, 1, 2, 5, 10, 20),
        {(f"|D| = {n}", None): ("random_labels", "random") for n in (1000, 2000, 5000)}),
    "unique": Experiment(
        "a label for every image, EDM preconditioning", "labels",
        "With a label of its own for every image, even 50,000 images are memorized: "
        "65%, against none without labels.",
        [Claim("unique labels memorize more than none", ("", "unique"), ("", "none"))],
        over("--labels", "none", "unique", n=50_000, also=UNIQUE),
        over("--labels", "none", "unique", n=64, also="--precond edm"),
        {("", "unique"): ("unique_labels_50k", "unique (EDM preconditioning)"),
         ("", "none"): ("unique_labels_50k", "unconditional (EDM preconditioning)")}),
    "mixture": Experiment(
        "share of a second, more diverse source", "share of the second source",
        "The more of the diverse source, the less is memorized.",
        [Claim("the first source alone is memorized more than the second alone", ("", FIRST), ("", LAST))],
        # imagenet-dogs: a flat folder of 2,000 pictures of dogs, which the user makes of ImageNet
        over("--data cifar10:5 --mix imagenet-dogs --resolution 32 --n-max 2000 --mix-share", *SHARES),
        over("--data digits:0 --mix digits:8 --mix-share", *SHARES, n=8)),
}
