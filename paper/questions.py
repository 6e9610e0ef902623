"""The experiments beyond the paper: what it leaves open, and what else is known of memorization."""
import math

from paper.claims import FASHION, FIRST, LAST, Claim, Experiment, Point, Slope, named, over, sizes

# Powers that paper.dynamics fits: what grows, over what, and what was found elsewhere
DYNAMICS = {
    "tau_mem": ("steps until 10% are memorized", "|D|", "1 (Bonnaire et al., Favero et al.)"),
    "tau_gen": ("steps until the Frechet distance is near its least", "|D|", "0 (Bonnaire et al.)"),
    "tau_loss": ("steps until the held-out loss is least", "|D|", ""),
    "emm_power_of_steps": ("EMM", "steps", ""), "emm_power_of_epochs": ("EMM", "epochs", "")}

# What varies, by its name in the figures
LABELS = "none", "true", "random:10", "unique:0.5"
KINDS = {kind: kind for kind in ("none", "permuted", "random:10", "true", "clusters:10", "random:20",
                                 "coarse:2", "unique")}
APART = (
    ("random images under a label (permuted) memorize more than alike ones (true)", "permuted", "true"),
    ("permuted labels memorize more than none", "permuted", "none"),
    ("ten random labels memorize more than ten clusters", "random:10", "clusters:10"),
    ("two random labels in each class memorize more than twenty random ones", "coarse:2", "random:20"),
    ("a label for every image memorizes more than none", "unique", "none"))
AUGMENTATIONS = {"none": {}, "flip": dict(flip=True), "flip, mirrored too": dict(flip=True, mirror=True),
                 "augment 0.12": dict(augment=0.12)}
OBJECTIVES = {"VP": {}, "EDM": dict(precond="edm"), "flow": dict(precond="flow"),
              "VP, image": dict(predict="image"), "VP, velocity": dict(predict="velocity"),
              "VP, min-SNR": dict(loss_weight="min-snr"), "VP, L1": dict(loss="l1"),
              "VP, Huber": dict(loss="huber")}
SAME, TWICE = 0.005, "SGD, twice as long"  # a fifth of Adam's distance at CPU scale, 0.026
# on a CPU of 1e-2 the loss is NaN, and 1e-4 learns less; elsewhere, as there, a quarter of Adam's rate
SGD = {scale: dict(optimizer="sgd", learning_rate=rate)
       for scale, rate in dict(cpu=1e-3, gpu=2.5e-4, paper=5e-5).items()}
SAMPLERS = {"Heun, 18 steps": {}, "Euler, 18 steps": dict(sampler="euler"),
            "DPM-Solver, 18 steps": dict(sampler="dpm-solver"), "churn 40": dict(churn=40.0)}
LEFT_OUT = {"none": {}, "0.02 to 0.2": dict(sigma_skip=(0.02, 0.2)),
            "0.2 to 2": dict(sigma_skip=(0.2, 2.0)), "2 to 20": dict(sigma_skip=(2.0, 20.0))}
PRICED = LEFT_OUT | dict(list(SAMPLERS.items())[1:])
DISTANCE, DIMENSION = "distance to the nearest, in grey levels", "dimension by PCA"
# Of sources: how far an image is from the nearest of others, root mean square in grey levels, on average, and
# the dimension by PCA, (sum v)^2 / sum v^2 of the variances v. Of 19 others at 8x8, and of 499 at 16x16 and
# 32x32, where of CIFAR-10 the first 1,000 images of each class were taken
SOURCES = dict(
    cpu={"digits": (62.4, 13.2), "fashion-mnist": (42.0, 4.5), "fashion-mnist:1": (20.5, 4.0),
         "fashion-mnist:2": (29.7, 2.4), "fashion-mnist:5": (32.9, 6.6), "fashion-mnist:7": (22.8, 4.2),
         "fashion-mnist:8": (39.8, 4.3)},
    gpu={"fashion-mnist": (34.3, 6.1), "cifar10": (47.3, 8.3), "cifar10:1": (52.7, 9.5),
         "cifar10:2": (40.8, 5.6), "cifar10:4": (39.0, 7.7), "cifar10:9": (53.4, 14.6)},
    paper={"fashion-mnist": (42.4, 7.4), "cifar10": (50.0, 9.1), "cifar10:1": (56.8, 10.7),
           "cifar10:2": (43.0, 6.0), "cifar10:4": (41.4, 8.5), "cifar10:9": (57.2, 16.6)})
# of as many parameters, or FLOPs, as the U-Net of a scale; channel_mult as by default, for a DiT has none
DITS = {scale: {name: dict(arch="dit", width=width, blocks=blocks, channel_mult=(2, 2, 2))
                for name, (width, blocks) in zip(("DiT", "DiT, equal FLOPs"), sides)}
        for scale, sides in dict(cpu=((32, 3), (48, 4)), gpu=((256, 5), (384, 5)),
                                 paper=((384, 13), (384, 25))).items()}
PARAMETERS = {8: 66_961, 12: 149_209, 16: 263_969, 24: 591_025}  # of the base on a CPU, by its width


def of_labels(kind):
    """Options of labels. Those of unequal numbers of images, some of none, are sampled as trained."""
    equal = kind in ("none", "true", "permuted", "unique", "random:1")
    return dict(labels=kind) | ({} if equal else dict(sample_labels="training"))


def labelled(n, kinds, series, also=None):
    """A point for each kind of labels of n images; `kinds` is {x: kind}."""
    return [Point(series, x, dict(also or {}) | of_labels(kind), n) for x, kind in kinds.items()]


def given_or_not(n, kind):
    """A model that is trained with labels, a tenth of the time without, and sampled with them and without."""
    if kind == "none":
        return [Point(kind, "not given", {}, n)]
    how = of_labels(kind) | dict(label_dropout=0.1)
    return [Point(kind, "given", how, n), Point(kind, "not given", how | dict(sample_labels="none"), n)]


def sharing(n, *counts):
    """{count: kind of labels} where so many of n images share a label."""
    return {count: "unique" if count == 1 else f"random:{n // count}" for count in counts}


def of_sources(scale, n, resolution):
    """A point for each source of a scale in each series, in order of its number there."""
    return [Point(series, numbers[i], dict(data=source, resolution=resolution), n)
            for i, series in enumerate((DISTANCE, DIMENSION))
            for source, numbers in sorted(SOURCES[scale].items(), key=lambda item: item[1][i])]


def trained_by(scale, n, epochs, **also):
    """A point for each way of training; `also` has the snapshots, where the published are too few."""
    ways = {"Adam": {}, "Muon": dict(optimizer="muon"),
            TWICE: SGD[scale] | dict(epochs=2 * epochs), "flow, Adam": dict(precond="flow")}
    return named(n, ways, also)


def optimizers(scale, n):
    return over("optimizer", "adam", "muon", n=n) + [Point("", "sgd", SGD[scale], n)]


def networks(scale, n, **also):
    """A U-Net, and a transformer of as many parameters and one of as many FLOPs; `n` None asks for EMM."""
    return named(n, {"U-Net": {}} | DITS[scale], dict(precond="flow", **also))


BEYOND = {
    "capacity": Experiment(
        "EMM against the network's size: widths 8 to 24", "parameters",
        "Theory and experiments elsewhere have the number of images that fit grow as the parameters to the "
        "power of 1/2 (of random features) or 1.",
        [Slope("EMM grows as the parameters to a power between 1/2 and 1", (0.5, 1))],
        cpu=[Point("", PARAMETERS[w], dict(width=w, n_min=5)) for w in PARAMETERS], known="beyond",
        seeds=dict(cpu=5)),
    "membership": Experiment(
        "membership from the loss at sigma 1.7", "training images |D|",
        "The loss tells training images from others, the better the fewer they are.",
        [Claim("membership is told better on the fewest images than on the most", ("", FIRST), ("", LAST)),
         Claim("the loss tells members of the most images better than chance",
               ("", LAST), range=(0.5, math.inf))],
        cpu=sizes(40, 80), measure="AUC", known="beyond", seeds=dict(cpu=5)),
    "copied": Experiment(
        "which images are copied", "training images |D|",
        "Isolated images are copied more (one of two papers of 2026; the other has typical ones).",
        [Claim("isolated images are copied more, on the most images", ("", LAST))],
        cpu=sizes(40, 80), measure="rank correlation of copies", known="beyond", seeds=dict(cpu=5)),
    "attracted": Experiment(
        "which images attract samples, whether copies or not", "training images |D|",
        "The verdict asks for a distant second nearest, and so prefers isolated images; this does not.",
        [Claim("isolated images attract more samples, on the most images", ("", LAST))],
        cpu=sizes(40, 80), measure="rank correlation of samples", known="beyond", seeds=dict(cpu=5)),
    "repeats": Experiment(
        "duplicates on purpose: a tenth of D is shown K times as often", "K",
        "Repeated images are copied more, the strongest factor known (Carlini et al.).",
        [Claim("images shown eight times as often are copied more often than others", ("", LAST),
               range=(1, math.inf))],
        cpu=[Point("", k, dict(repeat=f"{k}:0.1"), 80) for k in (2, 8)], measure="times as often",
        known="beyond"),
    "halves": Experiment(
        "two models of disjoint halves of the data, from the same seeds", "training images |D|",
        "Few images are replayed, by each model its own; many let both draw the same (Kadkhodaie et al.).",
        [Claim("models of the most images draw more alike than those of the fewest",
               ("", FIRST), ("", LAST))],
        cpu=sizes(20, 80, 320, given=dict(part="1/2", steps=2000, steps_min=0)),
        measure="distance, as a share of that of two seeds", known="beyond"),
    "labels-apart": Experiment(
        "labels taken apart", "labels",
        "The paper leaves open whether it is how many images share a label, or how alike these are.",
        [Claim(f"{place}: {text}", (place, more), (place, less))
         for place in ("digits", "Fashion-MNIST", "CIFAR-10") for text, more, less in APART],
        paper=labelled(2000, KINDS, "CIFAR-10"), gpu=labelled(1000, KINDS, "CIFAR-10"),
        cpu=labelled(40, KINDS, "digits") + labelled(40, KINDS, "Fashion-MNIST", FASHION),
        known="beyond", seeds=dict(cpu=5)),
    "images-a-label": Experiment(
        "how many images share a label, random labels", "images a label",
        "With as many labels as images each image is named; with one label there might as well be none.",
        [Claim(f"{place}: {text}", (place, more), (place, less))
         for place in ("digits", "Fashion-MNIST", "CIFAR-10") for text, more, less in (
             ("a label for each image memorizes more than one for all", 1, LAST),
             ("a label for each image memorizes more than one for four", 1, 4),
             ("a label for four images memorizes more than one for all", 4, LAST))],
        paper=labelled(2000, sharing(2000, 1, 4, 40, 400, 2000), "CIFAR-10"),
        gpu=labelled(1000, sharing(1000, 1, 4, 40, 200, 1000), "CIFAR-10"),
        cpu=labelled(40, sharing(40, 1, 2, 4, 8, 40), "digits")
        + labelled(40, sharing(40, 1, 2, 4, 8, 40), "Fashion-MNIST", FASHION),
        known="beyond", seeds=dict(cpu=5)),
    "labels-given": Experiment(
        "labels of training given at sampling or not", "labels",
        "Whether it matters that the sampler knows the label: a tenth of training is without.",
        [Claim("random labels memorize more where the sampler is given them",
               ("random:10", "given"), ("random:10", "not given")),
         Claim("true labels memorize more where the sampler is given them",
               ("true", "given"), ("true", "not given")),
         Claim("without them at sampling, a model trained with random labels memorizes more than one "
               "trained without", ("random:10", "not given"), ("none", "not given")),
         Claim("labels of their own for half of the images memorize more than none",
               ("unique:0.5", "given"), ("none", "not given"))],
        paper=[p for kind in LABELS for p in given_or_not(2000, kind)],
        gpu=[p for kind in LABELS for p in given_or_not(1000, kind)],
        cpu=[p for kind in LABELS for p in given_or_not(40, kind)], known="beyond", seeds=dict(cpu=5)),
    "data": Experiment(
        "sources, and classes of them", "a number of the data",
        "A number that is known before training may tell how much is memorized.",
        [Slope("the ratio grows with the distance to the nearest training image", (0, math.inf), DISTANCE),
         Slope("the ratio grows with the dimension by PCA", (0, math.inf), DIMENSION)],
        paper=of_sources("paper", 2000, 32), gpu=of_sources("gpu", 500, 16), cpu=of_sources("cpu", 20, 8),
        known="beyond"),
    "augmentation": Experiment(
        "augmentation", "augmentation",
        "Flips double the data, and the copies of mirrored images count only if these are compared with too; "
        "EDM's augmentation is told to the network, which is to leave it out of samples.",
        [Claim("flips lower the ratio", ("", "none"), ("", "flip")),
         Claim("where mirrored images are compared with too, flips change it by at most 10 points",
               ("", "none"), ("", "flip, mirrored too"), range=(-0.1, 0.1)),
         Claim("EDM's augmentation lowers the ratio", ("", "none"), ("", "augment 0.12"))],
        paper=named(2000, AUGMENTATIONS), gpu=named(500, AUGMENTATIONS),
        cpu=named(20, AUGMENTATIONS, FASHION), known="beyond", seeds=dict(cpu=5)),
    "augmentation-price": Experiment(
        "quality beside `augmentation`", "augmentation",
        "What augmentation takes from the copies it may take from the samples too: precision.",
        [Claim("flips cost at most 5 points of precision",
               ("", "none"), ("", "flip"), range=(-math.inf, 0.05)),
         Claim("EDM's augmentation costs at most 5 points of precision",
               ("", "none"), ("", "augment 0.12"), range=(-math.inf, 0.05))],
        paper=named(2000, AUGMENTATIONS), gpu=named(500, AUGMENTATIONS),
        cpu=named(20, AUGMENTATIONS, FASHION), measure="precision of samples", known="beyond",
        seeds=dict(cpu=5)),
    "objectives": Experiment(
        "objective", "objective",
        "Objectives with one optimum differ in how soon a network comes near it.",
        [Claim("flow matching memorizes more than VP", ("", "flow"), ("", "VP")),
         Claim("EDM memorizes more than VP", ("", "EDM"), ("", "VP")),
         Claim("min-SNR weights memorize less than the published", ("", "VP"), ("", "VP, min-SNR"))],
        paper=named(2000, OBJECTIVES), gpu=named(1000, OBJECTIVES), cpu=named(40, OBJECTIVES),
        known="beyond", seeds=dict(cpu=5)),
    "optimizer": Experiment(
        "optimizer", "optimizer", "In as many steps; at the same loss see `same-distance`.",
        [Claim("Muon memorizes more than Adam", ("", "muon"), ("", "adam")),
         Claim("SGD memorizes less than Adam", ("", "adam"), ("", "sgd"))],
        paper=optimizers("paper", 2000), gpu=optimizers("gpu", 1000), cpu=optimizers("cpu", 40),
        known="beyond", seeds=dict(cpu=5)),
    "same-distance": Experiment(
        "distance to the optimum where half of the samples are copies", "trained by",
        "At the same loss it may be the same memorization, whatever the optimizer and the objective.",
        [Claim(f"{what}: within {SAME} of Adam's distance to the optimum", ("", what), ("", "Adam"),
               range=(-SAME, SAME)) for what in ("Muon", TWICE, "flow, Adam")],
        paper=trained_by("paper", 2000, 40_000), gpu=trained_by("gpu", 1000, 2000, snapshots="log:24"),
        cpu=trained_by("cpu", 40, 3000, snapshots="log:24"), measure="distance to the optimum",
        known="beyond", seeds=dict(cpu=5)),
    "network": Experiment(
        "a transformer instead of the U-Net, flow matching", "network",
        "A DiT of as many parameters, or of as many FLOPs, in the same number of steps.",
        [Claim("the U-Net memorizes more than the transformer of as many parameters",
               ("", "U-Net"), ("", "DiT")),
         Claim("the U-Net memorizes more than the transformer of as many FLOPs",
               ("", "U-Net"), ("", "DiT, equal FLOPs"))],
        paper=networks("paper", 2000), gpu=networks("gpu", 500), cpu=networks("cpu", 10, steps=3000),
        known="beyond"),
    "network-emm": Experiment(
        "a transformer instead of the U-Net, flow matching", "network", "The same networks by their EMM.",
        [Claim("the U-Net has a larger EMM than the transformer of as many parameters",
               ("", "U-Net"), ("", "DiT")),
         Claim("the U-Net has a larger EMM than the transformer of as many FLOPs",
               ("", "U-Net"), ("", "DiT, equal FLOPs"))],
        paper=networks("paper", None), gpu=networks("gpu", None),
        cpu=networks("cpu", None, steps=3000, n_min=4), known="beyond"),
    "samplers": Experiment(
        "sampler", "sampler", "The ratio is one of a model and a sampler.",
        [Claim("fresh noise (churn 40) memorizes more than the published sampler",
               ("", "churn 40"), ("", "Heun, 18 steps")),
         Claim("Euler's 18 steps memorize less", ("", "Heun, 18 steps"), ("", "Euler, 18 steps"))],
        paper=named(2000, SAMPLERS), gpu=named(1000, SAMPLERS), cpu=named(40, SAMPLERS), known="beyond"),
    "noise-levels": Experiment(
        "noise levels left out of training", "noise levels left out",
        "The middle noise levels are those that decide what is copied (arXiv 2602.17846).",
        [Claim("leaving out the middle lowers the ratio more than leaving out the low",
               ("", "0.02 to 0.2"), ("", "0.2 to 2"))],
        paper=named(2000, LEFT_OUT), gpu=named(1000, LEFT_OUT), cpu=named(40, LEFT_OUT), known="beyond"),
    "price": Experiment(
        "quality beside `noise-levels` and `samplers`", "left out, or the sampler",
        "A lower ratio may be bought with the samples' quality: precision, the share among images outside D.",
        [Claim("without the middle noise levels precision is lower", ("", "none"), ("", "0.2 to 2")),
         Claim("without the low noise levels precision is lower by at most 5 points",
               ("", "none"), ("", "0.02 to 0.2"), range=(-math.inf, 0.05)),
         Claim("Euler's 18 steps cost at most 5 points of precision",
               ("", "none"), ("", "Euler, 18 steps"), range=(-math.inf, 0.05))],
        paper=named(2000, PRICED), gpu=named(1000, PRICED), cpu=named(40, PRICED),
        measure="precision of samples", known="beyond"),
}
