"""The standard data sets by their names, and the IDX files of MNIST and its kind.

Read from their authors' own files, whose checksums are known, without pickles. Every error is a ValueError
that names the file.
"""
import gzip
import hashlib
import http.client
import io
import tarfile
import urllib.request
import zlib
from pathlib import Path

import numpy as np

from disk import whole_file
from run import say

# Looked for in these folders, and downloaded into the last
FOLDERS = Path("data"), Path(__file__).resolve().parent.parent / "data"
# The form of CIFAR's authors that holds no pickles: archive, its MD5 as they give it, labels of an image (the
# last is its class)
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR = {"cifar10": ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 1),
         "cifar100": ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 2)}
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
# Channels, pixels a side and classes of each
STANDARD = {"digits": (1, 8, 10)} | {
    name + half: shape for half in ("", "-test")
    for name, shape in {"cifar10": (3, 32, 10), "cifar100": (3, 32, 100),
                        "mnist": (1, 28, 10), "fashion-mnist": (1, 28, 10)}.items()}

IDX = "*images[-.]idx3-ubyte", "*images[-.]idx3-ubyte.gz"
MAX_IDX_BYTES = 2**30  # unpacked: EMNIST has half of that


def read_standard(name):
    """A standard data set: its training half, or its test half where the name ends in -test.

    Returns images uint8 [N, C, H, W] and classes int64 [N]. Downloads what is in none of `FOLDERS`.
    """
    if name == "digits":  # scikit-learn's, grey in 17 levels, scaled to 0..255; offline
        from sklearn.datasets import load_digits  # here, as it takes a second or two
        images, classes = load_digits(return_X_y=True)  # [N, 64]
        return np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8), classes
    return read_cifar(name) if name.removesuffix("-test") in CIFAR else read_mnist(name)


def read_cifar(name, path=None):
    """50,000 training or 10,000 test images of CIFAR-10 or -100 [N, 3, 32, 32], and their (fine) classes."""
    archive, md5, labels = CIFAR[name.removesuffix("-test")]
    path = path or find([folder / archive for folder in FOLDERS], CIFAR_URL + archive)
    content = path.read_bytes()
    check(path, content, md5)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:  # its checksum vouches for what is in it
        files = sorted(file for file in tar.getnames() if file.endswith(".bin"))
        parts = [tar.extractfile(file).read() for file in files
                 if ("test" in file) == name.endswith("-test")]
    rows = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, labels + CIFAR_IMAGE)
    return rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1]


def read_mnist(name):
    """60,000 training or 10,000 test images of MNIST or Fashion-MNIST [N, 1, 28, 28], and their classes."""
    place, others, url, checksums = MNIST[name.removesuffix("-test")]
    half, test = ("t10k", 1) if name.endswith("-test") else ("train", 0)
    folders = [*map(Path, others), *(folder / place for folder in FOLDERS)]
    files = f"{half}-images-idx3-ubyte", f"{half}-labels-idx1-ubyte"
    images, labels = (read_idx(find([folder / f"{file}{end}" for folder in folders for end in ("", ".gz")],
                                    f"{url}{file}.gz"), md5) for file, md5 in zip(files, checksums[test]))
    return images[:, None], labels


def find(paths, url):
    """The first of `paths` that is a file; the last, downloaded there from `url`, if none is."""
    if found := next(filter(Path.is_file, paths), None):
        return found
    path = paths[-1]
    say(f"downloading {url}")
    try:
        with whole_file(path) as temporary, urllib.request.urlopen(url, timeout=60) as source:
            temporary.write_bytes(source.read())
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{path} is not there and {url} cannot be downloaded ({error}). Put the file there "
                         "by hand, or use --data with digits, an image folder, a zip or an npz") from None
    return path


def check(path, content, md5):
    if hashlib.md5(content).hexdigest() != md5:
        raise ValueError(f"{path} is not what its authors published: its checksum differs; remove it, and it "
                         "is downloaded, or give its folder as --data if it is another data set")


def find_idx(path):
    """The IDX file of images at a path or in a folder, None without; of both halves the training half."""
    if not path.is_dir():
        return path if any(map(path.match, IDX)) else None
    found = sorted(file for pattern in IDX for file in path.glob(pattern))  # unpacked before .gz
    found = [file for file in found if "train" in file.name] or found
    if len({file.name.removesuffix(".gz") for file in found}) > 1:
        raise ValueError(f"{path} holds several sets of images, {found[0].name} and {found[-1].name}; give "
                         "one of these files")
    return found[0] if found else None


def read_idx_pair(path):
    """Images [N, 1, H, W] of an IDX file, and the labels [N] of the one beside it (None without)."""
    images = read_idx(path)
    if images.ndim != 3 or not images.size:
        raise ValueError(f"{path} holds an array {list(images.shape)}; images must be [N, H, W]")
    name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = next(filter(Path.is_file, (path.with_name(name), path.with_name(f"{name}.gz"))), None)
    return images[:, None], read_idx(labels) if labels else None


def read_idx(path, md5=None):
    """The array uint8 of an IDX file, or of a .gz of one. Raises ValueError if its unpacked MD5 differs."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(MAX_IDX_BYTES)
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as one of bytes does")
        shape = np.frombuffer(content, ">u4", content[3], offset=4).tolist()
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (ValueError, OSError, EOFError, IndexError, zlib.error) as error:
        raise ValueError(f"{path} is not a readable IDX file ({error})") from None
    if md5:
        check(path, content, md5)
    return array
