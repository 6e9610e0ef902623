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
KINDS = "none", "permuted", "random:10", "true", "clusters:10", "random:20", "coarse:2", "unique"
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
SGD = dict(optimizer="sgd", learning_rate=1e-3)  # of 1e-2 the loss is NaN, and 1e-4 learns less
TRAINED_BY = {"Adam": {}, "Muon": dict(optimizer="muon"), "SGD, twice as long": SGD | dict(epochs=6000),
              "flow, Adam": dict(precond="flow")}
SAMPLERS = {"Heun, 18 steps": {}, "Euler, 18 steps": dict(sampler="euler"),
            "DPM-Solver, 18 steps": dict(sampler="dpm-solver"), "churn 40": dict(churn=40.0)}
LEVELS_LEFT_OUT = {"none": {}, "0.02 to 0.2": dict(sigma_skip=(0.02, 0.2)),
                   "0.2 to 2": dict(sigma_skip=(0.2, 2.0)), "2 to 20": dict(sigma_skip=(2.0, 20.0))}
DISTANCE, DIMENSION = "distance to the nearest, in grey levels", "dimension by PCA"
# Of sources at 8x8: how far an image is from the nearest of 19 others, root mean square in grey levels, on
# average, and the dimension by PCA, (sum v)^2 / sum v^2 of the variances v
SOURCES = {
    "digits": (62.4, 13.2), "fashion-mnist": (42.0, 4.5), "fashion-mnist:1": (20.5, 4.0),
    "fashion-mnist:2": (29.7, 2.4), "fashion-mnist:5": (32.9, 6.6), "fashion-mnist:7": (22.8, 4.2),
    "fashion-mnist:8": (39.8, 4.3)}
PARAMETERS = {8: 66_961, 12: 149_209}  # of the base on a CPU, by its width


def given_or_not(n, kind):
    """A model that is trained with labels, a tenth of the time without, and sampled with them and without."""
    if kind == "none":
        return [Point(kind, "not given", {}, n)]
    how = dict(labels=kind, label_dropout=0.1)
    return [Point(kind, "given", how, n), Point(kind, "not given", how | dict(sample_labels="none"), n)]


BEYOND = {
    "capacity": Experiment(
        "EMM against the network's size: widths 8 and 12", "parameters",
        "Theory and experiments elsewhere have the number of images that fit grow as the parameters to the "
        "power of 1/2 (of random features) or 1.",
        [Slope("EMM grows as the parameters to a power between 1/2 and 1", (0.5, 1))],
        cpu=[Point("", PARAMETERS[w], dict(width=w, n_min=5)) for w in PARAMETERS], known="beyond"),
    "membership": Experiment(
        "membership from the loss at sigma 1.7", "training images |D|",
        "The loss tells training images from others, the better the fewer they are.",
        [Claim("membership is told better on the fewest images than on the most", ("", FIRST), ("", LAST)),
         Claim("the loss tells members of the most images better than chance",
               ("", LAST), range=(0.5, math.inf))],
        cpu=sizes(40, 80), measure="AUC", known="beyond"),
    "copied": Experiment(
        "which images are copied", "training images |D|",
        "Isolated images are copied more (one of two papers of 2026; the other has typical ones).",
        [Claim("isolated images are copied more, on the most images", ("", LAST))],
        cpu=sizes(40, 80), measure="rank correlation of copies", known="beyond"),
    "attracted": Experiment(
        "which images attract samples, whether copies or not", "training images |D|",
        "The verdict asks for a distant second nearest, and so prefers isolated images; this does not.",
        [Claim("isolated images attract more samples, on the most images", ("", LAST))],
        cpu=sizes(40, 80), measure="rank correlation of samples", known="beyond"),
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
        "labels taken apart, 40 images", "labels",
        "The paper leaves open whether it is how many images share a label, or how alike these are.",
        [Claim(f"{place} data set: {text}", (place, more), (place, less))
         for place in (FIRST, LAST) for text, more, less in APART],
        paper=over("labels", *KINDS, n=2000, series="CIFAR-10"),
        cpu=over("labels", *KINDS, n=40, series="digits")
        + over("labels", *KINDS, n=40, series="Fashion-MNIST", also=FASHION),
        known="beyond", seeds=dict(cpu=5)),
    "labels-given": Experiment(
        "labels of training given at sampling or not, 40 images", "labels",
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
        cpu=[p for kind in LABELS for p in given_or_not(40, kind)], known="beyond", seeds=dict(cpu=5)),
    "data": Experiment(
        "digits, Fashion-MNIST and five of its classes, 20 images of 8x8", "a number of the data",
        "A number that is known before training may tell how much is memorized.",
        [Slope("the ratio grows with the distance to the nearest training image", (0, math.inf), DISTANCE),
         Slope("the ratio grows with the dimension by PCA", (0, math.inf), DIMENSION)],
        cpu=[Point(series, numbers[i], dict(data=source, resolution=8), 20)
             for i, series in enumerate((DISTANCE, DIMENSION))
             for source, numbers in sorted(SOURCES.items(), key=lambda item: item[1][i])],
        known="beyond"),
    "augmentation": Experiment(
        "augmentation, 20 images of Fashion-MNIST", "augmentation",
        "Flips double the data, and the copies of mirrored images count only if these are compared with too; "
        "EDM's augmentation does not leak.",
        [Claim("flips lower the ratio", ("", "none"), ("", "flip")),
         Claim("where mirrored images are compared with too, flips change it by at most 10 points",
               ("", "none"), ("", "flip, mirrored too"), range=(-0.1, 0.1)),
         Claim("EDM's augmentation lowers the ratio", ("", "none"), ("", "augment 0.12"))],
        paper=named(2000, AUGMENTATIONS), cpu=named(20, AUGMENTATIONS, FASHION), known="beyond"),
    "objectives": Experiment(
        "objective, 40 images", "objective",
        "Objectives with one optimum differ in how soon a network comes near it.",
        [Claim("flow matching memorizes more than VP", ("", "flow"), ("", "VP")),
         Claim("EDM memorizes more than VP", ("", "EDM"), ("", "VP")),
         Claim("min-SNR weights memorize less than the published", ("", "VP"), ("", "VP, min-SNR"))],
        paper=named(2000, OBJECTIVES), cpu=named(40, OBJECTIVES), known="beyond", seeds=dict(cpu=5)),
    "optimizer": Experiment(
        "optimizer, 40 images", "optimizer", "In as many steps; at the same loss see `same-distance`.",
        [Claim("Muon memorizes more than Adam", ("", "muon"), ("", "adam")),
         Claim("SGD memorizes less than Adam", ("", "adam"), ("", "sgd"))],
        paper=over("optimizer", "adam", "muon", n=2000)
        + [Point("", "sgd", SGD | dict(learning_rate=5e-5), 2000)],  # a quarter of Adam's, as on a CPU
        cpu=over("optimizer", "adam", "muon", n=40) + [Point("", "sgd", SGD, 40)],
        known="beyond", seeds=dict(cpu=5)),
    "same-distance": Experiment(
        "how near the optimum a model is when half of its samples are copies, 40 images", "trained by",
        "At the same loss it may be the same memorization, whatever the optimizer and the objective.",
        [Claim("Muon's is further from the optimum than Adam's", ("", "Muon"), ("", "Adam"))],
        cpu=named(40, TRAINED_BY, dict(snapshots="log:24")), measure="distance to the optimum",
        known="beyond"),
    "network": Experiment(
        "a transformer instead of the U-Net, flow matching, 10 images", "network",
        "A DiT of as many parameters, or of as many FLOPs, in the same number of steps.",
        [Claim("the U-Net memorizes more than the transformer of as many parameters",
               ("", "U-Net"), ("", "DiT")),
         Claim("the U-Net memorizes more than the transformer of as many FLOPs",
               ("", "U-Net"), ("", "DiT, equal FLOPs"))],
        paper=named(2000, {"U-Net": {}, "DiT": dict(arch="dit", width=384, blocks=13),
                           "DiT, equal FLOPs": dict(arch="dit", width=384, blocks=25)}, dict(precond="flow")),
        cpu=named(10, {"U-Net": {}, "DiT": dict(arch="dit", width=32, blocks=3, channel_mult=(2, 2, 2)),
                       "DiT, equal FLOPs": dict(arch="dit", width=48, blocks=4, channel_mult=(2, 2, 2))},
                  dict(precond="flow", steps=3000)), known="beyond"),
    "samplers": Experiment(
        "sampler, 40 images", "sampler", "The ratio is one of a model and a sampler.",
        [Claim("fresh noise (churn 40) memorizes more than the published sampler",
               ("", "churn 40"), ("", "Heun, 18 steps")),
         Claim("Euler's 18 steps memorize less", ("", "Heun, 18 steps"), ("", "Euler, 18 steps"))],
        paper=named(2000, SAMPLERS), cpu=named(40, SAMPLERS), known="beyond"),
    "noise-levels": Experiment(
        "noise levels left out of training, 40 images", "noise levels left out",
        "The middle noise levels are those that decide what is copied (arXiv 2602.17846).",
        [Claim("leaving out the middle lowers the ratio more than leaving out the low",
               ("", "0.02 to 0.2"), ("", "0.2 to 2"))],
        paper=named(2000, LEVELS_LEFT_OUT), cpu=named(40, LEVELS_LEFT_OUT), known="beyond"),
    "price": Experiment(
        "quality beside `noise-levels` and `samplers`, 40 images", "left out, or the sampler",
        "A lower ratio may be bought with the samples' quality: precision, the share among images outside D.",
        [Claim("without the middle noise levels precision is lower", ("", "none"), ("", "0.2 to 2")),
         Claim("without the low noise levels precision is lower by at most 5 points",
               ("", "none"), ("", "0.02 to 0.2"), range=(-0.05, 0.05)),
         Claim("Euler's 18 steps cost at most 5 points of precision",
               ("", "none"), ("", "Euler, 18 steps"), range=(-0.05, 0.05))],
        cpu=named(40, LEVELS_LEFT_OUT | dict(list(SAMPLERS.items())[1:])), measure="precision of samples",
        known="beyond"),
}
