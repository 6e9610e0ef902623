"""Images that lie in one array: npz, npy and IDX files, and the standard data sets by their names.

All are read without pickles, and what a header says is held against the size of its file before memory is taken.
Every error is a ValueError that names the file.
"""
import gzip
import hashlib
import http.client
import math
import re
import shutil
import struct
import tarfile
import urllib.request
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from run import ZIP_ERRORS, bounded, publish, say

MAX_BYTES = 2**34         # of all images of a source: 16 GiB
MAX_LABEL = 2**20         # largest class number
GZIP_RATIO = 1032         # deflate makes at most so many bytes of one

# Names that people and tools give to arrays, in the order in which they are preferred
IMAGE_NAMES = ("arr_0", "images", "image", "x", "samples", "x_train", "train_images", "data")
LABEL_NAMES = ("labels", "label", "y", "targets", "y_train", "train_labels", "arr_1", "arr_0")

# Standard data are looked for in these folders, and downloaded into the last
FOLDERS = (Path("data"), Path(__file__).resolve().parent / "data")
# The binary form of CIFAR's authors, which holds no pickles: archive, its MD5 as they give it, labels of an image (the
# last is the class), files of the training and of the test half
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR = dict(
    cifar10=("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 1,
             ([f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)], ["cifar-10-batches-bin/test_batch.bin"])),
    cifar100=("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 2,
              (["cifar-100-binary/train.bin"], ["cifar-100-binary/test.bin"])))
CIFAR_IMAGE = 3 * 32 * 32  # bytes
# IDX files: torchvision's folder, others, where they are downloaded, and the MD5 of images and labels, unpacked, of
# both halves
MNIST = {
    "mnist": ("MNIST/raw", (), "https://ossci-datasets.s3.amazonaws.com/mnist/",
              (("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624"),
               ("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"))),
    "fashion-mnist": ("FashionMNIST/raw", ("/usr/share/datasets/fashion-mnist",),  # of Debian's dataset-fashion-mnist
                      "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                      (("f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9"),
                       ("8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965")))}
STANDARD = ("digits", *(name + half for name in (*CIFAR, *MNIST) for half in ("", "-test")))
IDX = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")


def read_standard(name):
    """A standard data set, its training half, or with "-test" its test half.

    Returns images uint8 [N, C, H, W], classes int64 [N] and names. Downloads what is in none of `FOLDERS`.
    """
    if name == "digits":
        images, classes = read_digits()
    elif name.removesuffix("-test") in CIFAR:
        images, classes = read_cifar(name)
    else:
        images, classes = read_mnist(name)
    return images, classes, _names(name, images)


def is_array(path):
    """Whether a path that exists is one of `read_array`'s."""
    return bool(_idx(path)) or path.name in [archive for archive, *_ in CIFAR.values()] or path.suffix.lower() in (".npz", ".npy")


def read_array(path):
    """Images uint8 [N, C, H, W], classes int64 [N] (zeros where there are none) and names of a file, or a folder of IDX files."""
    if path.suffix.lower() == ".npz":
        images, classes = read_npz(path)
    elif path.suffix.lower() == ".npy":
        images, classes = read_npy(path), None
    elif _idx(path):
        images, classes = read_idx_pair(path)
    else:
        images, classes = read_cifar(next(name for name, (archive, *_) in CIFAR.items() if archive == path.name), path)
    if classes is None:
        classes = np.zeros(len(images), np.int64)
    return images, check_labels(classes, len(images), path), _names(path.name, images)


def _names(source, images):
    return [f"{source}/{i:0{4 if source == 'digits' else 5}d}" for i in range(len(images))]


def read_cifar(name, path=None):
    """50,000 training or 10,000 test images of CIFAR-10 or CIFAR-100 [N, 3, 32, 32], and their (fine) classes."""
    archive, md5, labels, halves = CIFAR[name.removesuffix("-test")]
    path = path or _find([folder / archive for folder in FOLDERS]) or \
        download(CIFAR_URL + archive, FOLDERS[-1] / archive, md5)
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != md5:
            raise ValueError(f"{path} is damaged (its checksum is wrong); remove it, and it is downloaded again")
    with tarfile.open(path) as tar:  # what its checksum vouches for
        content = b"".join(tar.extractfile(member).read() for member in halves[name.endswith("-test")])
    rows = np.frombuffer(content, np.uint8).reshape(-1, labels + CIFAR_IMAGE)
    return rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1].astype(np.int64)


def read_mnist(name):
    """60,000 training or 10,000 test images of MNIST or Fashion-MNIST [N, 1, 28, 28], and their classes."""
    place, others, url, checksums = MNIST[name.removesuffix("-test")]
    half = "t10k" if name.endswith("-test") else "train"
    folders = [folder / place for folder in FOLDERS] + [Path(other) for other in others]
    arrays = []
    for file, md5 in zip((f"{half}-images-idx3-ubyte", f"{half}-labels-idx1-ubyte"), checksums[half == "t10k"]):
        path = _find([folder / f"{file}{end}" for folder in folders for end in ("", ".gz")]) or \
            download(f"{url}{file}.gz", FOLDERS[-1] / place / f"{file}.gz", md5, gzip.open)
        arrays.append(read_idx(path, md5))
    return arrays[0][:, None], arrays[1].astype(np.int64)


def read_digits():
    """scikit-learn's 1,797 handwritten digits [N, 1, 8, 8], grey in 17 levels, scaled to 0..255. Needs no network."""
    # found, not imported: scikit-learn takes seconds to start, and this is one file of it
    package = find_spec("sklearn")
    if package is None:
        raise ValueError("--data digits needs scikit-learn, which brings them; pip install scikit-learn")
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")  # [N, 65]
    return np.round(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8), table[:, 64].astype(np.int64)


def _find(paths):
    return next((path for path in paths if path.is_file()), None)


def download(url, path, md5, opened=open):
    """Publish what `url` gives at `path`, if its MD5, as `opened` reads it, is right; returns the path."""
    say(f"downloading {url}")
    try:
        with publish(path) as temporary:
            with urllib.request.urlopen(url, timeout=60) as source, open(temporary, "wb") as file:
                shutil.copyfileobj(source, file)
            with opened(temporary, "rb") as file:
                if hashlib.file_digest(file, "md5").hexdigest() != md5:
                    raise OSError("its checksum is wrong")
    except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:
        raise ValueError(f"{path} is not there and {url} cannot be downloaded ({error}). Put the file there by hand, or "
                         "use --data with digits, an image folder, a zip or an npz file") from None
    return path


def _idx(path):
    """The IDX file of images at a path or in a folder, None if there is none. Of two halves the training half."""
    if not path.is_dir():
        return path if IDX.search(path.name) else None
    found = sorted(p for p in path.iterdir() if IDX.search(p.name))  # unpacked before .gz
    found = [p for p in found if "train" in p.name] or found
    if len({p.name.removesuffix(".gz") for p in found}) > 1:
        raise ValueError(f"{path} holds several sets of images, {found[0].name} and {found[-1].name}; give one of these files")
    return found[0] if found else None


def read_idx_pair(path):
    """Images [N, 1, H, W] of an IDX file, or of a folder of IDX files, and the labels [N] beside them (None without)."""
    path = _idx(path)
    images = read_idx(path)
    if images.ndim != 3 or not images.size:
        raise ValueError(f"{path} holds an array {list(images.shape)}; images must be [N, H, W]")
    name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = _find([path.with_name(name), path.with_name(f"{name}.gz")])
    return images[:, None], read_idx(labels) if labels else None


def read_idx(path, md5=None):
    """The array uint8 of an IDX file, which may be packed by gzip. Raises ValueError if its MD5, unpacked, is another."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            head = file.read(4)
            if head[:3] != b"\0\0\x08":
                raise ValueError("it does not begin as one of bytes does")
            sizes = file.read(4 * head[3])
            shape = struct.unpack(f">{head[3]}I", sizes)
            count = math.prod(shape)
            if count > min(MAX_BYTES, GZIP_RATIO * path.stat().st_size):
                raise ValueError(f"it says it is {list(shape)}")
            values = file.read(count + 1)
        if len(values) != count:
            raise ValueError(f"it says it is {list(shape)}, which its {len(values):,} bytes are not")
        array = np.frombuffer(values, np.uint8).reshape(shape)
    except (ValueError, OSError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is not a readable IDX file ({error})") from None
    if md5 and hashlib.md5(head + sizes + values).hexdigest() != md5:
        raise ValueError(f"{path} is not what its authors published (its checksum differs); remove it, and it is "
                         "downloaded, or give its folder as --data if it is another data set")
    return array


def read_npz(path):
    """Images [N, C, H, W] of an npz file, and its labels (None without).

    Images are the one array of 3 or 4 dimensions, or the first of `IMAGE_NAMES`: uint8 [N, H, W, C] or grey [N, H, W];
    an array named `images` may be [N, C, H, W]. Labels are the first of `LABEL_NAMES`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            there = {name[:-4]: _header(archive, name) for name in archive.namelist() if name.endswith(".npy")}
            key, labels = _chosen(path, there)
            shape, dtype = there[key]
            check_images(f"{path}: {key}", shape, dtype, key.lower() == "images")
            arrays = {name: _array(archive, name) for name in (key, labels) if name}
    except (OSError, EOFError, TypeError, SyntaxError, KeyError, *ZIP_ERRORS) as error:
        raise ValueError(f"{path} is not a readable npz file ({error})") from None
    return channels_first(arrays[key], f"{path}: {key}"), arrays.get(labels)


def read_npy(path):
    """Images [N, C, H, W] of an npy file: uint8 [N, H, W, C] or grey [N, H, W]."""
    try:
        with open(path, "rb") as file:
            shape, dtype = npy_header(file, path.stat().st_size, path)
            check_images(path, shape, dtype)
            file.seek(0)
            return channels_first(np.lib.format.read_array(file, allow_pickle=False), path)
    except (EOFError, TypeError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable npy file ({error})") from None


def _header(archive, name):
    info = bounded(archive, name, MAX_BYTES)
    with archive.open(info) as file:
        return npy_header(file, info.file_size, f"{archive.filename}: {name}")


def _array(archive, key):
    with archive.open(f"{key}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def npy_header(file, size, name):
    """Shape and dtype of an array in npy form. Raises ValueError if they are not those of its `size` in bytes."""
    try:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if header is None:
            raise ValueError(f"{name} has the npy version {version}, which is not read")
        shape, _, dtype = header(file)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"{name} is not a readable array ({str(error).splitlines()[0]})") from None
    if not dtype.hasobject and file.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} says it is {dtype} {list(shape)}, which its {size:,} bytes are not")
    return shape, dtype


def _chosen(path, there):
    """Names of the arrays of images and of labels (None without) among {name: (shape, dtype)}."""
    def named(names, among):
        return next((key for name in names for key in among if key.lower() == name), None)

    shaped = [key for key, (shape, _) in there.items() if len(shape) in (3, 4)]
    key = named(IMAGE_NAMES, shaped) or (shaped[0] if len(shaped) == 1 else None)
    if key is None:
        found = ", ".join(f"{name} {dtype} {list(shape)}" for name, (shape, dtype) in there.items()) or "no array"
        pickled = "; pickled objects are not read, save np.stack(list(x))" * any(d.hasobject for _, d in there.values())
        raise ValueError(f"{path} has {'several arrays' if shaped else 'no array'} that may be images: {found}{pickled}. "
                         "Name one images, uint8 [N, H, W, C]")
    if len(shaped) > 1:
        say(f"{path}: images are {key}; left out {', '.join(name for name in shaped if name != key)}")
    return key, named(LABEL_NAMES, [name for name, (shape, _) in there.items() if name != key and len(shape) in (1, 2)])


def check_images(name, shape, dtype, either=False):
    """Raise ValueError, with the line of numpy that helps, unless an array is images uint8 [N, H, W, C] or [N, H, W],
    or `either` of that and [N, C, H, W]."""
    def refuse(remedy):
        raise ValueError(f"{name} is {dtype} {list(shape)}; images must be uint8 [N, H, W, C] with 1 or 3 channels, or "
                         f"[N, H, W]: {remedy}")

    if dtype.hasobject:
        refuse("pickled objects are not read; if it is a list of arrays x, save np.stack(list(x))")
    if dtype.kind == "f":
        refuse("for x in [0, 1] save (x * 255).round().astype(np.uint8), for x in [-1, 1] "
               "((x + 1) * 127.5).round().clip(0, 255).astype(np.uint8)")
    if dtype.kind == "b":
        refuse("save x.astype(np.uint8) * 255")
    if dtype == np.uint16:
        refuse("save (x / 257).round().astype(np.uint8) where 65535 is white")
    if dtype != np.uint8:
        refuse("save x.astype(np.uint8) if its values are 0 to 255")
    if len(shape) not in (3, 4) or not math.prod(shape):
        refuse("these are none")
    if len(shape) == 3 and shape[2] in (1, 3):
        refuse("if it is one image, save x[None]")
    if len(shape) == 4 and shape[3] not in (1, 3, 4) and not (either and shape[1] in (1, 3)):
        refuse("save x.transpose(0, 2, 3, 1)" if shape[1] in (1, 3) else "choose the channels")


def channels_first(images, name):
    """[N, C, H, W] of images that `check_images` let pass. Raises ValueError for alpha that is not 255 everywhere."""
    if images.ndim == 3:
        return images[:, None]
    if images.shape[3] == 4 and (images[..., 3] == 255).all():
        images = images[..., :3]
    if images.shape[3] == 4:
        raise ValueError(f"{name} has 4 channels, and 1 or 3 channels are read: save x[..., :3], or paint x on a background")
    return images.transpose(0, 3, 1, 2) if images.shape[3] in (1, 3) else images


def check_labels(labels, count, source):
    """Labels int64 [N] of whole numbers [N] or [N, 1], integers or floats, or of one-hot vectors [N, K].

    Raises ValueError for what is neither, such as attributes, soft labels or several labels an image.
    """
    wrong = ValueError(f"{source}: labels must be {count} whole numbers from 0 to {MAX_LABEL:,} or one-hot vectors, "
                       f"not {labels.dtype} {list(labels.shape)}")
    if labels.dtype.kind not in "biuf" or labels.ndim not in (1, 2) or len(labels) != count:
        raise wrong
    if labels.ndim == 2 and labels.shape[1] > 1:
        if not (((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()):
            raise ValueError(f"{source}: labels {labels.dtype} {list(labels.shape)} are not one-hot: attributes, soft labels "
                             "or several labels an image; give each image one class, or leave the labels out")
        return labels.argmax(1)
    labels = labels.reshape(-1)
    if not ((labels >= 0) & (labels <= MAX_LABEL) & (labels == np.floor(labels))).all():
        raise wrong
    return labels.astype(np.int64)
