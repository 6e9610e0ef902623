"""The labels that a model is given: the classes of its images, or meaningless ones (paper, section 5).

    none            no labels: the model is unconditional
    true            the classes of the data
    permuted        the classes in a random order: sizes as they are, but the wrong images
    random:C        one of C labels, at random
    coarse:C        one of the C labels that an image's class has for itself, at random
    clusters:K      k-means of the pixels of D, with K clusters
    unique          a label of its own for every image
    unique:SHARE    a label of its own for this share of D, drawn at random; one more for all others

What is random is drawn by --label-seed.
"""
import re

import numpy as np
import torch

INITS = 1  # runs of k-means, which starts from k-means++; more of them find slightly tighter clusters


def parse_labels(labels):
    """The kind that --labels names and its number: C or K, SHARE, or None. Raises ValueError for others."""
    kind, colon, number = labels.partition(":")
    if not colon and kind in ("none", "true", "permuted", "unique"):
        return kind, None
    if kind in ("random", "coarse", "clusters") and number.isdecimal() and int(number) > 0:
        return kind, int(number)
    if kind == "unique" and re.fullmatch(r"0?\.\d*[1-9]\d*", number):
        return kind, float(number)
    raise ValueError(f"--labels {labels!r} is unknown; use none, true, permuted, random:C (such as "
                     "random:10), coarse:C, clusters:K, unique or unique:SHARE (such as unique:0.5)")


def are_drawn(labels):
    """Whether --label-seed changes the labels."""
    kind, number = parse_labels(labels)
    return kind in ("permuted", "clusters") or kind not in ("none", "true") and number not in (None, 1)


def label_count(labels, n, classes):
    """How many labels --labels gives a model of n images in so many classes; 0 for none."""
    kind, number = parse_labels(labels)
    if kind == "coarse":
        return classes * number
    if kind == "unique":
        return n if number is None else round(number * n) + 1
    return dict(none=0, true=classes, permuted=classes).get(kind, number)


def give_labels(labels, seed, images, classes, n):
    """Labels int64 [N] of images uint8 [N, C, H, W] with classes int64 [N], the first n of which are D.

    The images after those of D are held out, and get the label that fits them: their class, a random one, the
    nearest cluster of D, the label of all others, or, with "unique", one that no image of D has.
    """
    kind, number = parse_labels(labels)
    random = np.random.RandomState(seed)
    if kind == "permuted":
        return torch.cat([classes[:n][torch.from_numpy(random.permutation(n))], classes[n:]])
    if kind in ("random", "coarse"):
        # drawn in turn, so that the labels of the subset of 500 are those of the first 500 of 1,000
        drawn = torch.from_numpy(random.randint(number, size=len(classes), dtype=np.int64))
        return drawn if kind == "random" else classes * number + drawn
    if kind == "clusters":
        return nearest_cluster(images, n, number, seed)
    if kind == "unique" and number is None:
        return torch.arange(len(classes))
    if kind == "unique":
        own = round(number * n)
        if not 0 < own < n:
            raise ValueError(f"--labels {labels} gives {own} of {n} images a label of their own; "
                             "give a share that is some of them, and not all")
        given = torch.full((len(classes),), own)
        given[torch.from_numpy(random.permutation(n)[:own])] = torch.arange(own)
        return given
    return classes


def nearest_cluster(images, n, count, seed):
    """The cluster int64 [N] of images uint8 [N, C, H, W] by k-means (Lloyd) of the first n, in float64.

    Raises ValueError for more clusters than distinct images.
    """
    from sklearn.cluster import KMeans  # takes a second
    from threadpoolctl import threadpool_limits

    distinct = len({image.tobytes() for image in images[:n].numpy()})
    if count > distinct:
        raise ValueError(f"--labels clusters:{count}: the training set has {distinct} distinct images; "
                         "take fewer clusters")
    x = images.flatten(1).double().numpy()
    with threadpool_limits(1):  # several threads would add in the order in which they end
        found = KMeans(count, n_init=INITS, random_state=seed).fit(x[:n]).predict(x)
    return torch.from_numpy(found).long()
