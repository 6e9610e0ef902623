"""What memorize.py compares: images of sources and run directories, or any extractor's vectors (npz)."""
import re
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import data
import disk
import run
from images import load_arrays, read

MAX_VALUES = 2**20     # of a vector


# Compared values, uint8 images [N, C, H, W] or vectors [N, D]; images of these (None without), their names,
# and of training images their true classes
Side = namedtuple("Side", "values images names classes", defaults=(None,))


def sides(options):
    """Samples, training images and held-out images as `Side`s, None for those that are not given.

    `options` are memorize.py's; `distinct` drops duplicates here. Raises ValueError for what cannot be read
    or compared.
    """
    samples, train, held_out = None, None, None
    if options.train:
        D, of = training_images(options)
        classes = data.load(replace(of, labels="none")).labels if options.which else None
        train = Side(D.images, D.images, D.names, classes)
    if options.samples and not options.snapshots:
        place = options.samples
        place = samples_of_run(place)[0][1] if is_run(place) else place
        samples = of_source(place, options.resolution)
    if options.sample_features:
        cosine = options.distance == "cosine"
        samples = of_vectors(options.sample_features, samples, cosine)
        train = of_vectors(options.train_features, train, cosine)
        held_out = of_vectors(options.held_out, None, cosine) if options.held_out else None
        for side in filter(None, (samples, held_out)):
            if side.values.shape[1] != train.values.shape[1]:
                raise ValueError(f"{side.names[0]} and the like have {side.values.shape[1]} values, training "
                                 f"vectors {train.values.shape[1]}; take both from one extractor")
    elif options.held_out == "rest":
        # whatever their labels, and copies too, which are counted
        rest = data.outside(replace(of, labels="none"), replace(D, label_dim=0), copies=True)
        if not len(rest):
            raise ValueError(f"--held-out rest: the part and classes of {of.data} that were trained on have "
                             f"no images but the {len(D)} of the training set; name a source of others")
        held_out = Side(rest.images, rest.images, rest.names)
    elif options.held_out:
        held_out = of_source(options.held_out, of.resolution)
    if options.distinct:
        keep = ~data.duplicates(train.values)
        train = Side(train.values[keep], None if train.images is None else train.images[keep],
                     [name for name, kept in zip(train.names, keep.tolist()) if kept],
                     None if train.classes is None else train.classes[keep])
    return samples, train, held_out


def of_source(source, resolution):
    images, _, names = read(source, resolution)
    return Side(images, images, names)


def training_images(options):
    """The training set of a run or of (a subset of) a source, and the `data.Options` that it is of."""
    subset = run.narrowed(options, data.Subset)
    if is_run(options.train):
        if subset != data.Subset():
            raise ValueError(f"--train {options.train} is a run directory, "
                             "which has its own n, classes, resolution and subset-seed; leave them out")
        return data.of_run(options.train, options.data), data.options_of_run(options.train, options.data)
    if options.data:
        raise ValueError(f"--data {options.data} says where the data of a run directory lie now, and "
                         f"--train {options.train} is none; leave it out")
    of = data.Options(data=options.train, **asdict(subset))
    return data.load(of), of


def of_vectors(path, side=None, cosine=False):
    """The vectors in `path` as a `Side`, whose images are those of `side`, if that is given."""
    values = vectors(path, cosine)
    if side and len(values) != len(side.names):
        raise ValueError(f"{path} has {len(values)} vectors for {len(side.names)} images; give one for each "
                         "image, in their order")
    names = side.names if side else [f"{Path(path).name}/{i:05d}" for i in range(len(values))]
    return Side(values, side and side.images, names, side and side.classes)


def is_run(place):
    return bool(place) and disk.Directory(place).config.is_file()


def samples_of_run(folder, every=False):
    """[(weights, samples file)] of the last weights sampled in a run directory, or of `every` one in order.

    Files are named samples-STEP.npz of a snapshot, samples.npz or samples-FIRST-LAST.npz (of seeds, as the
    Makefile names it) of the last weights; of several of the same, the largest is taken. Raises ValueError if
    there is none, or if other weights than those beside it made it.
    """
    files, found = disk.Directory(folder), {}
    for file in sorted(files.path.glob("samples*.npz"), key=lambda file: file.stat().st_size):
        step = re.fullmatch(r"samples-(\d+)", file.stem)
        found[files.snapshot(int(step[1])) if step else files.model] = file
    if not found:
        raise ValueError(f"{folder} has no samples yet; make them with: python sample.py --run {folder}")
    pairs = sorted(found.items(), key=lambda pair: (pair[0] == files.model, pair[0]))[0 if every else -1:]
    for weights, file in pairs:
        made_of = disk.metadata(file).get("source", {}).get("weights_sha256")
        if made_of and weights.is_file() and disk.file_sha256(weights) != made_of:
            raise ValueError(f"{file} was not drawn from {weights}; remove it and sample again")
    return pairs


def vectors(path, cosine=False):
    """Vectors float32 or float64 [N, D] of a file: its array `features`, or arr_0, or the only one.

    With `cosine` they are scaled to length one, in float64. Raises ValueError, naming the file, for what are
    no finite vectors.
    """
    def choose(names):
        known = [name for name in ("features", "arr_0") if name in names] or names
        if len(known) > 1 and known == names or not known:
            raise ValueError(f"arrays: {', '.join(names) or 'none'}; call one features")
        return known[:1]

    [x] = load_arrays(path, choose)
    if x.dtype.kind != "f" or x.ndim != 2 or not len(x) or not 1 <= x.shape[1] <= MAX_VALUES:
        raise ValueError(f"{path}: features are {x.dtype} {list(x.shape)}; save floats [N, D], a vector an "
                         "image, such as x.reshape(len(x), -1).astype(np.float32)")
    wrong = np.flatnonzero(~np.isfinite(x).all(1))
    if len(wrong):
        raise ValueError(f"{path}: {len(wrong)} vectors are not finite, the first of them number {wrong[0]}; "
                         "extract these again, or drop them")
    x = torch.from_numpy(x.astype(np.float64 if cosine or x.itemsize > 4 else np.float32))
    if cosine:
        zero = (x.abs().amax(1) == 0).nonzero()[:, 0].tolist()
        if zero:
            raise ValueError(f"{path}: vector {zero[0]} is zero and has no direction; drop it, or take "
                             "--distance l2")
        x = x / x.abs().amax(1, keepdim=True)  # so that no square overflows
        x = x / x.norm(dim=1, keepdim=True)
    return x
