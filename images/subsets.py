"""Which images a training set has, in which order it grows, and how often it shows each of them."""
import re

import numpy as np
import torch

MOST_TIMES = 10_000  # an image is shown, and parts of the data; more is a typing error


def balanced_order(classes, seed=None, origin=None, share=0.0):
    """An order of the images (int64 [N]) each of whose prefixes is class-balanced as evenly as can be.

    The first of class 0, the first of class 1, ..., the second of class 0, ...: prefixes are nested.
    Within a class images stand in the order of the source, as published, or as drawn by `seed`.

    With an `origin` (0 or 1) for each image, floor(share k) of the first k images of a class are of origin 1.
    A class ends where the next image would have to come from an origin that has no more.
    """
    order = torch.arange(len(classes))
    if seed is not None:
        order = torch.from_numpy(np.random.RandomState(seed).permutation(len(classes)))
    origin = torch.zeros_like(classes) if origin is None else origin
    turn = np.full(len(classes), -1)  # of each image in its class
    for c in classes.unique():
        members = order[classes[order] == c]
        waiting = [iter(members[origin[members] == o].tolist()) for o in (0, 1)]
        due = np.floor(np.arange(len(members) + 1) * share + 1e-9)  # 0.29 * 100 is 28.999...
        for k, second in enumerate(np.diff(due).astype(int).tolist()):
            image = next(waiting[second], None)
            if image is None:
                break
            turn[image] = k
    kept = np.flatnonzero(turn >= 0)
    return torch.from_numpy(kept[np.lexsort((classes.numpy()[kept], turn[kept]))])


def in_part(groups, part):
    """The images (int64 [M]) of the part i/k, given a number for the group of each: every k-th of a group.

    "" takes all. Whatever the subset seed, parts are disjoint, and have as many of a group as can be.
    """
    i, slash, k = (part or "1/1").partition("/")
    if not (i.isdecimal() and k.isdecimal() and 1 <= int(i) <= int(k) <= MOST_TIMES):
        raise ValueError(f"--part {part!r} is not one of at most {MOST_TIMES:,} parts; "
                         "write i/k, such as 1/2")
    if k == "1":
        return torch.arange(len(groups))
    mine = torch.zeros(len(groups), dtype=torch.bool)
    for group in groups.unique():
        mine[(groups == group).nonzero()[int(i) - 1::int(k), 0]] = True
    return mine.nonzero()[:, 0]


def repetition(repeat):
    """(K, share) of --repeat K:share. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d{1,9}):(0?\.\d*[1-9]\d*)", repeat)
    if not found or not 2 <= int(found[1]) <= MOST_TIMES:
        raise ValueError(f"--repeat {repeat!r} is not a number from 2 to {MOST_TIMES:,} and a share strictly "
                         "between 0 and 1; write K:share, such as 10:0.1")
    return int(found[1]), float(found[2])


def shown(n, repeat, seed):
    """`data.Images.shown` of n images: those that --repeat draws, by the seed, stand there K times."""
    if not repeat:
        return ...
    times, share = repetition(repeat)
    count = round(share * n)
    if not 0 < count < n:
        raise ValueError(f"--repeat {repeat} repeats {count} of {n} images; "
                         "give a share that repeats some of them, and not all")
    each = torch.ones(n, dtype=torch.int64)
    each[torch.from_numpy(np.random.RandomState(seed or 0).permutation(n)[:count])] = times
    return torch.arange(n).repeat_interleave(each)
