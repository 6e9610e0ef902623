"""Images and labels in, training sets out.

A source is `cifar10`, `digits`, an image folder, a zip of images or an npz file. All give uint8
images [N, C, H, W] and int64 class labels [N]. A training set D is a class-balanced subset of a
source (nested: the subset of 500 lies inside that of 1,000), resized and labelled for the
experiment (paper, sections 3 and 5).
"""
import contextlib
import ctypes
import hashlib
import io
import json
import os
import sys
import zipfile
import zlib
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from run import option, read_json

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
CIFAR10_ROOT = "data"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# What zipfile raises for damaged, encrypted and unknown-compression archives
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class Subset:
    n: int = option(0, "size of the training set |D|; 0 takes all there is")
    classes: int = option(0, "keep the first this many classes; 0 keeps all")
    resolution: int = option(0, "resize to this many pixels a side (Lanczos); 0 keeps the size")
    subset_seed: int | None = option(None, "draw the subset by this seed; none takes the first of each class")

    def __post_init__(self):
        for name in ("n", "classes", "resolution"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} is negative; give 0 or more")
        if self.subset_seed is not None and not 0 <= self.subset_seed < 2**32:
            raise ValueError(f"--subset-seed {self.subset_seed} is not in 0..2^32-1")


@dataclass(frozen=True)
class Options(Subset):
    data: str = option("cifar10", "cifar10, digits, or a path: image folder, zip of images, npz")
    labels: str = option("none", "labels the model is given: none, true, random:C or unique")
    label_seed: int = option(0, "seed of random:C labels")

    def __post_init__(self):
        super().__post_init__()
        label_count(self.labels, n=1, classes=1)
        if not 0 <= self.label_seed < 2**32:
            raise ValueError(f"--label-seed {self.label_seed} is not in 0..2^32-1")


@dataclass(frozen=True)
class Images:
    """Images uint8 [N, C, H, W], their labels int64 [N], the number of labels, and a name for each image."""
    images: torch.Tensor
    labels: torch.Tensor
    label_dim: int
    names: list

    def __len__(self):
        return len(self.images)

    @property
    def resolution(self):
        """Pixels a side. Raises ValueError if the images are not square, as the networks need."""
        height, width = self.images.shape[-2:]
        if height != width:
            raise ValueError(f"the images are {width}x{height}; the networks need square ones: give --resolution")
        return height

    def fingerprint(self):
        """What a run directory records of its data: count, shape and SHA-256 of pixels and of labels."""
        return dict(count=len(self), shape=list(self.images.shape[1:]), sha256=sha256(self.images),
                    label_dim=self.label_dim, labels_sha256=sha256(self.labels) if self.label_dim else None)


def load(options):
    """The training set that `options` describe, as `Images`: read, kept classes, subset, resized, labelled.

    With labels "none" label_dim is 0 and the labels are the true classes, which the model is not given.
    Raises ValueError for what the source does not have.
    """
    images, classes, names = read(options.data, options.resolution)
    if options.classes > int(classes.max()) + 1:
        raise ValueError(f"--classes {options.classes}: {options.data} has {int(classes.max()) + 1}")
    count = options.classes or int(classes.max()) + 1
    index = balanced_order(classes, options.subset_seed)
    index = index[classes[index] < count]
    n = options.n or len(index)
    if n > len(index):
        raise ValueError(f"--n {n} is more than the {len(index)} images of {options.data}"
                         f"{f' in {count} classes' if options.classes else ''}; lower --n")
    index = index[:n]
    images, classes = images[index], classes[index]
    label_dim = label_count(options.labels, n, count)
    if options.labels == "unique":
        labels = torch.arange(n)
    elif options.labels.startswith("random:"):
        # drawn one after the other, so that the labels of the subset of 500 are those of the first 500 of 1,000
        labels = torch.from_numpy(np.random.RandomState(options.label_seed).randint(label_dim, size=n, dtype=np.int64))
    else:
        labels = classes
    return Images(images, labels, label_dim, [names[i] for i in index.tolist()])


def sha256(tensor):
    """SHA-256 of a tensor's values, in hexadecimal."""
    return hashlib.sha256(tensor.contiguous().numpy()).hexdigest()


def of_run(directory):
    """The training set of a run directory of train.py. Raises ValueError if its data have changed since."""
    path = Path(directory) / "config.json"
    config = read_json(path) if path.is_file() else {}
    if config.get("stage") != "train":
        raise ValueError(f"{directory} is not a run directory of train.py: it has no config.json of one")
    options = Options(**{field.name: config["options"].get(field.name, field.default) for field in fields(Options)})
    D = load(options)
    if D.fingerprint() != config["data"]:
        raise ValueError(f"{options.data} is no longer what {directory} was trained on; restore it, or train again")
    return D


def label_count(labels, n, classes):
    """How many labels the mode `labels` gives a model: 0, the classes, C of random:C, or n (unique)."""
    mode, _, number = labels.partition(":")
    if mode == "random" and number.isdigit() and int(number) > 0:
        return int(number)
    counts = dict(none=0, true=classes, unique=n)
    if labels not in counts:
        raise ValueError(f"--labels {labels!r} is unknown; use none, true, random:C (such as random:10) or unique")
    return counts[labels]


def balanced_order(classes, seed=None):
    """An order of the images (int64 [N]) each of whose prefixes is class-balanced as evenly as can be.

    The first of class 0, the first of class 1, ..., the second of class 0, ...: prefixes are nested.
    Within a class images stand in the order of the source, as published, or as drawn by `seed`.
    """
    order = torch.arange(len(classes))
    if seed is not None:
        order = torch.from_numpy(np.random.RandomState(seed).permutation(len(classes)))
    rank = torch.empty(len(classes), dtype=torch.int64)
    for c in classes.unique().tolist():
        members = order[classes[order] == c]
        rank[members] = torch.arange(len(members))
    return torch.from_numpy(np.lexsort((classes.numpy(), rank.numpy())))


def read(source, resolution=0):
    """All of a source: images uint8 [N, C, H, W], classes int64 [N] (zeros where there are none), names.

    Raises ValueError, naming the file, for what cannot be read.
    """
    if source == "cifar10":
        images, classes, names = read_cifar10()
    elif source == "digits":
        images, classes, names = read_digits()
    elif Path(source).is_dir():
        return read_folder(Path(source), resolution)
    elif not Path(source).exists():
        raise ValueError(f"no data at {source!r}; give cifar10, digits, an image folder, a zip or an npz file")
    elif str(source).endswith(".zip"):
        return read_zip(source, resolution)
    elif str(source).endswith(".npz"):
        images, classes, names = read_npz(source)
    else:
        raise ValueError(f"{source} is not an image folder, a zip or an npz file")
    if resolution and images.shape[-2:] != (resolution, resolution):
        images = np.stack([_to_array(_resize(picture(image), resolution)) for image in images])
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(classes), names


def read_cifar10():
    """The 50,000 training images of CIFAR-10, downloaded into data/ and checksummed if not there yet."""
    from torchvision.datasets import CIFAR10  # seconds to import: only where it is used
    try:
        source = CIFAR10(CIFAR10_ROOT, train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"CIFAR-10 is not under {CIFAR10_ROOT}/ and cannot be downloaded ({error}). Put cifar-10-python.tar.gz "
            f"there by hand, or use --data with digits, an image folder, a zip or an npz file") from None
    return source.data.transpose(0, 3, 1, 2), np.array(source.targets, np.int64), [f"cifar10/{i:05d}" for i in range(len(source))]


def read_digits():
    """scikit-learn's 1,797 handwritten digits, 8x8 grey in 17 levels, scaled to 0..255. Needs no network."""
    # found, not imported: scikit-learn takes seconds to start, and this is one file of it
    package = find_spec("sklearn")
    if package is None:
        raise ValueError("--data digits needs scikit-learn, which brings them; pip install scikit-learn")
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")  # [N, 65]
    images = np.round(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return images, table[:, 64].astype(np.int64), [f"digits/{i:04d}" for i in range(len(images))]


def read_npz(path):
    """An npz of images: arr_0 uint8 [N, H, W, C] (ADM, and sample.py), or images and labels.

    `images` may be [N, H, W, C], [N, C, H, W] or grey [N, H, W]; labels are `labels` or ADM's arr_1.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("arr_0", "arr_1", "images", "labels") if key in file.files}
    except (ValueError, OSError, EOFError, TypeError, *ZIP_ERRORS) as error:
        raise ValueError(f"{path} is not a readable npz file ({error})") from None
    images = arrays.get("arr_0", arrays.get("images"))
    if images is None:
        raise ValueError(f"{path} has neither arr_0 nor images")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise ValueError(f"{path} holds {images.dtype} {list(images.shape)}; images must be uint8 [N, H, W, C]")
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    elif "arr_0" in arrays or images.shape[1] not in (1, 3):
        raise ValueError(f"{path} holds images of shape {list(images.shape)}; they need 1 or 3 channels")
    classes = arrays.get("labels", arrays.get("arr_1"))
    if classes is None:
        classes = np.zeros(len(images), np.int64)
    if classes.ndim == 2 and classes.shape[1] > 1:
        classes = classes.argmax(1)  # one-hot
    return images, _check_labels(classes.reshape(-1), len(images), path), \
        [f"{Path(path).name}/{i:05d}" for i in range(len(images))]


def read_folder(folder, resolution=0):
    """PNG and JPEG images of a folder; the class is the first subfolder, or stands in dataset.json (EDM)."""
    files = (p for p in folder.rglob("*") if p.is_file())
    names = _image_names(p.relative_to(folder).as_posix() for p in files)
    table = read_json(folder / "dataset.json") if (folder / "dataset.json").is_file() else None
    return _read_files(str(folder), names, table, lambda name: (folder / name).read_bytes(), resolution)


def read_zip(path, resolution=0):
    """PNG and JPEG images of a zip file, read in memory; classes as in `read_folder`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = _image_names(archive.namelist())
            table = json.loads(archive.read("dataset.json")) if "dataset.json" in archive.namelist() else None
            return _read_files(str(path), names, table, archive.read, resolution)
    except (EOFError, *ZIP_ERRORS) as error:
        raise ValueError(f"{path} is not a readable zip file ({error})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"dataset.json in {path} is not valid JSON ({error})") from None


def _image_names(names):
    """The PNG and JPEG files among names, sorted; without hidden ones, such as macOS's and half-written files."""
    return sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES)
                  and not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))


def _read_files(source, names, table, content, resolution):
    """Images, classes and names of files in a folder or zip; `content(name)` gives a file's bytes."""
    if not names:
        raise ValueError(f"{source} holds no PNG or JPEG images")
    pictures = [_decode(content(name), f"{source}/{name}") for name in names]
    if any(p.mode == "RGB" for p in pictures):  # a few grey files among colour ones
        pictures = [p.convert("RGB") for p in pictures]
    if resolution:
        pictures = [_resize(p, resolution) for p in pictures]
    for name, picture in zip(names, pictures):
        if picture.size != pictures[0].size:
            raise ValueError(f"{source}/{name} is {picture.width}x{picture.height}, {names[0]} is {pictures[0].width}x"
                             f"{pictures[0].height}; give --resolution to resize all to one size")
    images = np.stack([_to_array(p) for p in pictures])
    labels = table.get("labels") if isinstance(table, dict) else table
    if labels:
        try:
            wanted = dict(labels)
            classes = np.array([wanted[name] for name in names])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"dataset.json of {source} has no label for {error}; name every image or remove it") from None
    else:
        folders = [name.split("/")[0] if "/" in name else "" for name in names]
        classes = np.unique(folders, return_inverse=True)[1]
    return torch.from_numpy(images), torch.from_numpy(_check_labels(classes, len(names), source)), names


def _decode(content, name):
    """A PNG or JPEG file's bytes as a grey (L) or RGB picture."""
    try:
        picture = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as PNG or JPEG ({error})") from None
    if picture.mode in ("1", "P") and "transparency" not in picture.info:
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    if picture.mode not in ("L", "RGB"):
        raise ValueError(f"{name} has mode {picture.mode}; convert it to 8-bit grey or RGB without alpha")
    return picture


def _resize(picture, resolution):
    # Lanczos on the 8-bit picture, as published (dataset_tool's --resolution)
    return picture if picture.size == (resolution, resolution) else \
        picture.resize((resolution, resolution), Image.Resampling.LANCZOS)


def picture(array):
    """A uint8 array [C, H, W] of 1 or 3 channels as a PIL picture."""
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def _to_array(picture):
    array = np.asarray(picture)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)  # [C, H, W]


def _check_labels(classes, count, source):
    if classes.shape != (count,) or not np.issubdtype(classes.dtype, np.integer) or classes.min() < 0:
        raise ValueError(f"{source}: labels must be {count} whole numbers from 0 up, "
                         f"not {classes.dtype} {list(classes.shape)}")
    return classes.astype(np.int64)


def pick_device(name):
    """The torch device of a --device word: auto, cpu, cuda or cuda:N. On CUDA, float32 stays float32, as published."""
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:  # a GPU for each process of torchrun
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not a device of these scripts")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; use auto, cpu, cuda or cuda:N") from None
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    keep_memory()
    return device


@lru_cache
def keep_memory():
    """Let glibc reuse the memory of large tensors instead of giving it back and faulting it in again: 5% of a step."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(M_MMAP_THRESHOLD, 2**30), mallopt(M_TRIM_THRESHOLD, 2**31 - 1)

