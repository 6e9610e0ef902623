"""The standard data sets by their names, and the IDX files of MNIST and its kind.

Read from their authors' own files, whose checksums are known, without pickles. Every error is a ValueError
that names the file.
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
import zlib
from pathlib import Path

import numpy as np

from run import publish, say

# Looked for in these folders, and downloaded into the last
FOLDERS = Path("data"), Path(__file__).resolve().parent.parent / "data"
# The form of CIFAR's authors that holds no pickles: archive, its MD5 as they give it, labels of an image (the
# last is its class), files of the training and of the test half
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR = dict(
    cifar10=("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 1, (
        [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)],
        ["cifar-10-batches-bin/test_batch.bin"])),
    cifar100=("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 2, (
        ["cifar-100-binary/train.bin"],
        ["cifar-100-binary/test.bin"])))
CIFAR_IMAGE = 3 * 32 * 32  # bytes
ARCHIVES = {archive: name for name, (archive, *_) in CIFAR.items()}
# torchvision's folder of the IDX files, others that may hold them, where they are downloaded, and for both
# halves the MD5 of images and of labels, unpacked
MNIST = {
    "mnist": ("MNIST/raw", (), "https://ossci-datasets.s3.amazonaws.com/mnist/", (
        ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624"),
        ("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"))),
    "fashion-mnist": (
        "FashionMNIST/raw", ("/usr/share/datasets/fashion-mnist",),  # of Debian's dataset-fashion-mnist
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", (
            ("f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9"),
            ("8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965")))}
# Images, channels, pixels a side and classes of each
STANDARD = {"digits": (1797, 1, 8, 10)} | {
    name + half: (count, *shape)
    for name, train, *shape in (("cifar10", 50_000, 3, 32, 10), ("cifar100", 50_000, 3, 32, 100),
                                ("mnist", 60_000, 1, 28, 10), ("fashion-mnist", 60_000, 1, 28, 10))
    for half, count in (("", train), ("-test", 10_000))}

IDX = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")
MAX_RATIO = 1032  # gzip makes at most so many bytes of one


def read_standard(name):
    """A standard data set: its training half, or its test half where the name ends in -test.

    Returns images uint8 [N, C, H, W] and classes int64 [N]. Downloads what is in none of `FOLDERS`.
    """
    if name == "digits":
        return read_digits()
    return read_cifar(name) if name.removesuffix("-test") in CIFAR else read_mnist(name)


def read_digits():
    """scikit-learn's 1,797 handwritten digits [N, 1, 8, 8], grey in 17 levels, scaled to 0..255; offline."""
    from sklearn.datasets import load_digits  # here, as it takes a second or two
    images, classes = load_digits(return_X_y=True)  # [N, 64]
    return np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8), classes.astype(np.int64)


def read_cifar(name, path=None):
    """50,000 training or 10,000 test images of CIFAR-10 or -100 [N, 3, 32, 32], and their (fine) classes."""
    archive, md5, labels, halves = CIFAR[name.removesuffix("-test")]
    path = path or _first(folder / archive for folder in FOLDERS) or \
        download(CIFAR_URL + archive, FOLDERS[-1] / archive, md5)
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != md5:
            raise ValueError(f"{path} is damaged: its checksum is wrong; remove it to download it again")
    with tarfile.open(path) as tar:  # its checksum vouches for what is in it
        parts = [tar.extractfile(member).read() for member in halves[name.endswith("-test")]]
    rows = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, labels + CIFAR_IMAGE)
    return rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1].astype(np.int64)


def read_mnist(name):
    """60,000 training or 10,000 test images of MNIST or Fashion-MNIST [N, 1, 28, 28], and their classes."""
    place, others, url, checksums = MNIST[name.removesuffix("-test")]
    half, test = ("t10k", 1) if name.endswith("-test") else ("train", 0)
    folders = [*(folder / place for folder in FOLDERS), *map(Path, others)]
    arrays = []
    for file, md5 in zip((f"{half}-images-idx3-ubyte", f"{half}-labels-idx1-ubyte"), checksums[test]):
        path = _first(folder / f"{file}{end}" for folder in folders for end in ("", ".gz")) or \
            download(f"{url}{file}.gz", FOLDERS[-1] / place / f"{file}.gz", md5, gzip.open)
        arrays.append(read_idx(path, md5))
    return arrays[0][:, None], arrays[1].astype(np.int64)


def _first(paths):
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
        raise ValueError(f"{path} is not there and {url} cannot be downloaded ({error}). Put the file there "
                         "by hand, or use --data with digits, an image folder, a zip or an npz") from None
    return path


def find_idx(path):
    """The IDX file of images at a path or in a folder, None without; of both halves the training half."""
    if not path.is_dir():
        return path if IDX.search(path.name) else None
    found = sorted(p for p in path.iterdir() if IDX.search(p.name))  # unpacked before .gz
    found = [p for p in found if "train" in p.name] or found
    if len({p.name.removesuffix(".gz") for p in found}) > 1:
        raise ValueError(f"{path} holds several sets of images, {found[0].name} and {found[-1].name}; give "
                         "one of these files")
    return found[0] if found else None


def read_idx_pair(path):
    """Images [N, 1, H, W] of an IDX file, and the labels [N] of the one beside it (None without)."""
    images = read_idx(path)
    if images.ndim != 3 or not images.size:
        raise ValueError(f"{path} holds an array {list(images.shape)}; images must be [N, H, W]")
    name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = _first((path.with_name(name), path.with_name(f"{name}.gz")))
    return images[:, None], read_idx(labels) if labels else None


def read_idx(path, md5=None):
    """The array uint8 of an IDX file, or of a .gz of one. Raises ValueError if its unpacked MD5 differs."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            head = file.read(4)
            if head[:3] != b"\0\0\x08":
                raise ValueError("it does not begin as one of bytes does")
            sizes = file.read(4 * head[3])
            shape = struct.unpack(f">{head[3]}I", sizes)
            count = math.prod(shape)
            if count > MAX_RATIO * path.stat().st_size:  # before memory is taken
                raise ValueError(f"it says it is {list(shape)}, more than a file of its size can hold")
            values = file.read(count + 1)
        if len(values) != count:
            raise ValueError(f"it says it is {list(shape)}, which its {len(values):,} bytes are not")
        array = np.frombuffer(values, np.uint8).reshape(shape)
    except (ValueError, OSError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is not a readable IDX file ({error})") from None
    if md5 and hashlib.md5(head + sizes + values).hexdigest() != md5:
        raise ValueError(f"{path} is not what its authors published: its checksum differs; remove it, and it "
                         "is downloaded, or give its folder as --data if it is another data set")
    return array
