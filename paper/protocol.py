"""The experiments of the paper, and others, in one table: what each varies and claims, at several scales.

Read by paper.experiments, which runs them, by paper.report, which compares claims with what was measured, and
by the Makefile's tests. What varies is given as options of emm.py. Paper, sections 3 to 6.

    paper   the published settings: CIFAR-10, 40,000 epochs, one seed; weeks of a GPU
    gpu     photographs at 16x16 in hours of one GPU
    cpu     digits at 8x8, and Fashion-MNIST where digits cannot show it; a day on two CPU cores

The paper fixes the epochs, so that steps grow with |D|, and so do the others, with a floor of steps.
"""
from itertools import combinations

from paper.claims import ALL, FASHION, FIRST, LAST, Claim, Experiment, Point, over, sizes
from paper.questions import BEYOND

# What all points of a scale have in common; n_min, n_max and tolerance are of searches for EMM
BASE = dict(
    paper=dict(data="cifar10", snapshot_images=2_500_000),
    gpu=dict(data="cifar10", resolution=16, width=64, blocks=1, learning_rate=1e-3, epochs=2000,
             steps_min=4000, warmup_steps=200, ema_halflife=50, ema_rampup_steps=200, dropout=0, snapshots=4,
             sample_count=1000, n_min=100, n_max=5000),
    cpu=dict(data="digits", width=8, blocks=1, channel_mult=(2, 2), batch=64, learning_rate=4e-3, epochs=3000,
             steps_min=1500, warmup_steps=50, dropout=0, ema_halflife=10, ema_rampup_steps=50, snapshots=2,
             sample_count=256, n_min=10, n_max=160, tolerance=0.4, device="cpu", threads=1))


def skips(side, blocks, n, also=None, alone=()):
    """All skips; all of one resolution; all but one of it, where that is not one alone; and each alone.

    They are numbered from 1 in encoder order, blocks + 1 at each of three resolutions.
    """
    def kept(series, x, numbers):
        vector = tuple(int(i in numbers) for i in range(1, 3 * each + 1))
        return Point(series, x, dict(also or {}, skip_connections=vector), n)

    each, points = blocks + 1, [Point("all kept", "all", also or {}, n)]
    for level in range(3):
        here = range(level * each + 1, (level + 1) * each + 1)
        place = f"{side >> level}x{side >> level}"
        points.append(kept(ONE_RESOLUTION, place, here))
        if each > 2:
            points += [kept("two of one resolution", f"{place}: {'+'.join(map(str, some))}", some)
                       for some in combinations(here, each - 1)]
    return points + [kept(ONE_SKIP, str(i), [i]) for i in alone or range(1, 3 * each + 1)]


def random_labels(n, *counts):
    return [Point(f"|D| = {n}", count, dict(labels=f"random:{count}"), n) for count in counts]


ONE_RESOLUTION, ONE_SKIP = "one resolution", "one skip"
EMBEDDINGS = "positional", "fourier"
EDM = dict(precond="edm", blocks=4, learning_rate=1e-3)
THREE = dict(channel_mult=(2, 2, 2))  # resolutions, where the base on a CPU has two
NCSN = dict(arch="ncsnpp", precond="ve")
labels = {"none": {}, "true": dict(labels="true"), "random 10": dict(labels="random:10")}
batches = {b: dict(batch=b, learning_rate=b / 512 * 2e-4) for b in (128, 256, 384, 512, 640, 768, 896)}
cpu_batches = {32: dict(batch=32, learning_rate=2e-3), 64: {}, 128: dict(batch=128, learning_rate=8e-3)}
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
        # the trained model was EDM's public one: of these settings, and of augmented images
        paper=[Point("", x, EDM | dict(sample_count=50_000), 50_000) for x in ("closed form", "trained")],
        cpu=[Point("", x, {}, 80) for x in ("closed form", "trained")]),
    "size": Experiment(
        "training set size", "training images |D|",
        "The fewer the training images, the more of the samples are copies.",
        [Claim("the smallest training set is memorized more than the largest",
               (FIRST, FIRST), (FIRST, LAST))],
        # the base run's curve is known up to 5,000 images; the figure of all sizes is of EDM's settings
        paper=sizes(500, 1000, 2000, 5000, series="base run")
        + sizes(500, 1000, 2000, 5000, 10_000, 20_000, 50_000, series="EDM, 4 blocks", given=EDM),
        cpu=sizes(10, 20, 40, 80, 160, series="base run"),
        gpu=sizes(100, 200, 500, 1000, 2000, 5000, series="base run"), known="figure",
        published={("base run", None): ("labels", "unconditional")}),
    "epochs": Experiment(
        "budget of training", "epochs",
        "The ratio rises with the epochs, and so does EMM; the paper stops at 40,000.",
        [Claim("the longest training memorizes more than the shortest", ("", LAST), ("", FIRST))],
        paper=over("epochs", 10_000, 20_000, 40_000, n=2000),
        cpu=over("epochs", 3000, 6000, n=40),
        gpu=over("epochs", 1000, 2000, 4000, n=1000)),
    "epochs-emm": Experiment(
        "budget of training", "epochs",
        "EMM rises with the epochs; the paper stops at 40,000.",
        [Claim("the longest training has a larger EMM than the shortest", ("", LAST), ("", FIRST))],
        paper=over("epochs", 10_000, 20_000, 40_000),
        cpu=over("epochs", 3000, 6000, 12_000),
        gpu=over("epochs", 1000, 2000, 4000)),
    "resolution": Experiment(
        "resolution, the same images resized", "pixels a side",
        "EMM falls as resolution grows: about 7,600 images of 8x8, 4,500 of 16x16 and 1,060 of 32x32, "
        "where the curves of its figure cross 90%.",
        [Claim("the lowest resolution memorizes more than the highest", ("", LAST), ("", FIRST))],
        paper=over("resolution", 32, 16, 8),
        cpu=over("resolution", 16, 12, 8, n=20, also=FASHION),
        gpu=over("resolution", 16, 8), known="figure",
        published={("", None): ("resolution", None)}),
    "classes": Experiment(
        "number of classes", "classes",
        "More classes, a more diverse set, are memorized less, a weak effect.",
        [Claim("one class is memorized more than all ten", ("", FIRST), ("", LAST))],
        paper=over("classes", 1, 2, 5, 10),
        cpu=over("classes", 1, 2, 5, 10, n=20, also=FASHION),
        gpu=over("classes", 1, 10), known="second hand"),
    "mixture": Experiment(
        "share of a second, more diverse source", "share of the second source",
        "The more of the diverse source, the less is memorized.",
        [Claim("the first source alone is memorized more than the second alone", ("", FIRST), ("", LAST))],
        # imagenet-dogs: a folder of 2,000 pictures of ImageNet's 123 classes of dogs, which the user makes
        paper=over("mix_share", 0, 0.2, 0.5, 0.8, 1,
                   also=dict(data="cifar10:5", mix="imagenet-dogs", resolution=32, n_max=2000)),
        # of Fashion-MNIST the class whose images are most alike, sneakers, and the least, bags
        cpu=over("mix_share", 0, 0.5, 1, n=20,
                 also=dict(data="fashion-mnist:7", mix="fashion-mnist:8", resolution=8))),
    "width": Experiment(
        "width of the U-Net", "width", "Wider networks memorize more.",
        [Claim("the widest network memorizes more than the narrowest", ("", LAST), ("", FIRST))],
        paper=over("width", 128, 192, 256, 320), cpu=over("width", 8, 12, 16, n=40),
        gpu=over("width", 32, 64, 128), known="second hand"),
    "depth": Experiment(
        "residual blocks a resolution", "blocks", "Depth has no monotonic effect.", [],
        paper=over("blocks", 2, 4, 6, 8, 10, 12), cpu=over("blocks", 1, 2, 3, n=40), known="second hand"),
    "embedding": Experiment(
        "time embedding", "embedding",
        "Fourier features in DDPM++ memorize less than the positional embedding.",
        [Claim("positional embedding memorizes more than Fourier features, in the first setting",
               (FIRST, "positional"), (FIRST, "fourier")),
         Claim("positional embedding memorizes more than Fourier features, in the last setting",
               (LAST, "positional"), (LAST, "fourier"))],
        paper=[p for b in (2, 4)
               for p in over("embedding", *EMBEDDINGS, series=f"{b} blocks", also=dict(blocks=b))],
        # on 10 images, for Fourier features hardly memorize 40
        cpu=[p for n in (10, 40) for p in over("embedding", *EMBEDDINGS, n=n, series=f"|D| = {n}")],
        known="second hand"),
    "skips": Experiment(
        "skip connections kept, DDPM++ with VP", "skips kept",
        "Few skips are enough; those of the highest resolution carry memorization.", SKIP_CLAIMS,
        paper=skips(32, 2, 1000), cpu=skips(8, 1, 20, THREE, alone=(1, 6)), known="figure",
        seeds=dict(cpu=5),
        published={(ONE_SKIP, None): ("one_skip_kept", None),
                   (ONE_RESOLUTION, None): ("skips_kept_at_one_resolution", "three kept")}),
    "skips-ncsn": Experiment(
        "skip connections kept, NCSN++ with VE", "skips kept", "The same in NCSN++.", SKIP_CLAIMS,
        paper=skips(32, 2, 1000, NCSN), cpu=skips(8, 1, 20, NCSN | THREE, alone=(1, 6)), seeds=dict(cpu=5)),
    "batch": Experiment(
        "batch, the rate in proportion", "batch", "Larger batches memorize more.",
        [Claim("the largest batch memorizes more than the smallest, at equal epochs",
               ("equal epochs", LAST), ("equal epochs", FIRST)),
         Claim("the largest batch memorizes more than the smallest, at equal steps",
               ("equal steps", LAST), ("equal steps", FIRST))],
        paper=[Point("equal epochs", b, given, 2000) for b, given in batches.items()],
        cpu=[Point(series, b, given and given | duration, 40)
             for series, duration in (("equal epochs", dict(steps_min=0)),
                                      ("equal steps", dict(steps=1875)))  # as many as of batch 64
             for b, given in cpu_batches.items()],
        known="second hand", seeds=dict(cpu=5)),
    "batch-emm": Experiment(
        "batch, the rate in proportion", "batch", "Larger batches memorize more.",
        [Claim("the largest batch has a larger EMM than the smallest", ("", LAST), ("", FIRST))],
        paper=[Point("", b, given) for b, given in batches.items()],
        gpu=[Point("", b, dict(batch=b, learning_rate=b / 512 * 1e-3)) for b in (256, 512, 1024)],
        known="second hand"),
    "weight-decay": Experiment(
        "weight decay", "weight decay",
        "Weak decay changes little, strong decay prevents memorization.",
        [Claim("no decay memorizes more than the strongest", ("", FIRST), ("", LAST))],
        paper=over("weight_decay", 0, 1e-5, 1e-4, 1e-3, 1e-2, 2e-2, 5e-2, 8e-2, 1e-1, n=2000),
        cpu=over("weight_decay", 0, 1e-4, 1e-2, n=40), known="second hand"),
    "ema": Experiment(
        "rate of the average of the weights", "EMA rate", "The rate changes little.", [],
        paper=over("ema_rate", 0.99929, 0.999, 0.99, 0.9, 0.8, 0.5, 0.2, 0.1, 0, n=2000),
        cpu=over("ema_rate", 0.99, 0.9, 0, n=40),  # of 1,875 steps, and not of 156,000
        known="second hand"),
    "labels": Experiment(
        "labels the model is given", "training images |D|",
        "Conditioning on classes triggers memorization, and random labels do as much.",
        [Claim("true labels memorize more than none, on average over |D|", ("true", ALL), ("none", ALL)),
         Claim("ten random labels memorize more than none, on average over |D|",
               ("random 10", ALL), ("none", ALL))],
        paper=[p for s, given in labels.items()
               for p in sizes(1000, 2000, 3000, 4000, 5000, series=s, given=given)],
        cpu=[p for s, given in labels.items() for p in sizes(20, 40, series=s, given=given)],
        gpu=[p for s, given in labels.items() for p in sizes(500, 1000, 2000, series=s, given=given)],
        known="figure", seeds=dict(cpu=5),
        published={("none", None): ("labels", "unconditional"), ("true", None): ("labels", "true"),
                   ("random 10", None): ("labels", "random10")}),
    "random-labels": Experiment(
        "number of random labels", "random labels", "The more random labels, the more memorization.",
        [Claim("the most labels memorize more than one, on the fewest images", (FIRST, LAST), (FIRST, FIRST)),
         Claim("the most labels memorize more than one, on the most images", (LAST, LAST), (LAST, FIRST))],
        paper=random_labels(1000, 1, 2, 5, 10, 20, 50, 100)
        + random_labels(2000, 1, 2, 5, 10, 20, 50, 100)
        + random_labels(5000, 1, 10, 50, 100, 500, 1000),
        cpu=random_labels(20, 1, 5, 10) + random_labels(40, 1, 5, 10, 20), known="figure", seeds=dict(cpu=5),
        published={(f"|D| = {n}", None): ("random_labels", "random") for n in (1000, 2000, 5000)}),
    "unique": Experiment(
        "a label for every image", "labels",
        "With a label of its own for every image, even 50,000 images are memorized, after 12,000 epochs: "
        "65%, against none without labels. In the base run 2,000 images show the same.",
        [Claim("unique labels memorize more than none", (LAST, "unique"), (LAST, "none"))],
        paper=over("labels", "none", "true", "random:10", "unique", n=2000, series="|D| = 2000")
        + over("labels", "none", "unique", n=50_000, series="|D| = 50000", also=EDM | dict(epochs=12_000)),
        cpu=over("labels", "none", "unique", n=80, series="|D| = 80"), known="figure",
        published={("|D| = 50000", "unique"): ("unique_labels_50k", "unique (EDM preconditioning)"),
                   ("|D| = 50000", "none"): ("unique_labels_50k", "unconditional (EDM preconditioning)")}),
} | BEYOND
