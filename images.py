"""Images of a source, with their classes: cifar10, digits, an image folder, a zip of images, an npz file.

Files may be a stranger's: no code is read from them, nothing is unpacked to disk, and what they may take of memory is
bounded before it is taken. Every error is a ValueError that names the file.
"""
import hashlib
import http.client
import io
import json
import math
import shutil
import stat
import struct
import tarfile
import urllib.request
import warnings
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from run import ZIP_ERRORS, bounded, member, publish

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
CIFAR10 = Path("data") / "cifar-10-binary.tar.gz"  # the form of the authors that holds no pickles
CIFAR10_URL = f"https://www.cs.toronto.edu/~kriz/{CIFAR10.name}"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"   # as its authors give it
CIFAR10_BATCH = 10_000 * (1 + 3 * 32 * 32)         # bytes: a label and an image, 10,000 times

# Bounds on what a file can ask for; each leaves room for every data set of the field
MAX_FILE_BYTES = 2**26    # of one image file, or dataset.json: 64 MiB
MAX_PIXELS = 2**24        # of one image: 4,096 x 4,096
MAX_BYTES = 2**34         # of all images of a source: 16 GiB
MAX_LABEL = 2**20         # largest class number


def read(source, resolution=0):
    """All of a source: images uint8 [N, C, H, W], classes int64 [N] (zeros where there are none), names.

    SOURCE:K is class K alone, as class 0. Raises ValueError, naming the file, for what cannot be read.
    """
    whole, colon, number = str(source).rpartition(":")
    if colon and number.isdecimal() and not Path(source).exists():
        images, classes, names = read(whole, resolution)
        kept = (classes == int(number)).nonzero()[:, 0] if int(number) <= MAX_LABEL else ()
        if not len(kept):
            raise ValueError(f"{whole} has no class {number}; its classes are numbered 0 to {int(classes.max())}")
        return images[kept], torch.zeros_like(kept), [names[i] for i in kept.tolist()]
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
        _fits(source, len(images) * images.shape[1] * resolution**2)
        images = np.stack([_to_array(_resize(picture(image), resolution)) for image in images])
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(classes), names


def read_cifar10():
    """The 50,000 training images of CIFAR-10, downloaded into data/ and checksummed if not there yet."""
    if not CIFAR10.exists():
        download(CIFAR10_URL, CIFAR10, CIFAR10_MD5)
    try:
        with tarfile.open(CIFAR10) as archive:
            parts = [archive.extractfile(f"cifar-10-batches-bin/data_batch_{i}.bin").read(CIFAR10_BATCH) for i in range(1, 6)]
        rows = np.frombuffer(b"".join(parts), np.uint8).reshape(50_000, -1)
    except (tarfile.TarError, OSError, EOFError, KeyError, AttributeError, ValueError, zlib.error) as error:
        raise ValueError(f"{CIFAR10} is damaged ({error}); remove it, and it is downloaded again") from None
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64), [f"cifar10/{i:05d}" for i in range(len(rows))]


def download(url, path, md5):
    """Publish what `url` gives at `path`, if its MD5 is right."""
    print(f"downloading {url}", flush=True)
    try:
        with publish(path) as temporary:
            with urllib.request.urlopen(url, timeout=60) as source, open(temporary, "wb") as file:
                shutil.copyfileobj(source, file)
            with open(temporary, "rb") as file:
                if hashlib.file_digest(file, "md5").hexdigest() != md5:
                    raise OSError("its checksum is wrong")
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{path} is not there and {url} cannot be downloaded ({error}). Put the file there by hand, or use "
                         "--data with digits, an image folder, a zip or an npz file") from None


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
        with zipfile.ZipFile(path) as archive:
            there = [key for key in ("arr_0", "images", "arr_1", "labels") if f"{key}.npy" in archive.namelist()]
            pixels, labels = [key for key in there if key in ("arr_0", "images")], [key for key in there if key in ("arr_1", "labels")]
            arrays = {key: _npz_array(archive, key) for key in pixels[:1] + labels[-1:]}
    except (ValueError, OSError, EOFError, TypeError, SyntaxError, KeyError, *ZIP_ERRORS) as error:
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
    if classes.ndim == 2 and classes.shape[1] > 1 and classes.dtype.kind in "iufb":
        classes = classes.argmax(1)  # one-hot
    return images, _check_labels(classes.reshape(-1), len(images), path), \
        [f"{Path(path).name}/{i:05d}" for i in range(len(images))]


def _npz_array(archive, key):
    """One array of an open npz file; its header is held against its size before memory is taken."""
    info = bounded(archive, f"{key}.npy", MAX_BYTES)
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if header is None:
            raise ValueError(f"{key} has the npy version {version}")
        shape, _, dtype = header(file)
        if dtype.hasobject or file.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ValueError(f"{key} says it is {dtype} {list(shape)}, which its {info.file_size:,} bytes are not")
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def read_folder(folder, resolution=0):
    """PNG and JPEG images of a folder; the class is the first subfolder, or stands in dataset.json (EDM)."""
    files = (p for p in folder.rglob("*") if p.is_file())
    names = _image_names(p.relative_to(folder).as_posix() for p in files)

    def content(name):
        size = (folder / name).stat().st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{folder}/{name} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read of one file")
        return (folder / name).read_bytes()
    table = _table(folder, content("dataset.json")) if (folder / "dataset.json").is_file() else None
    return _read_files(str(folder), names, table, content, resolution)


def read_zip(path, resolution=0):
    """PNG and JPEG images of a zip file, read in memory; classes as in `read_folder`."""
    try:
        with zipfile.ZipFile(path) as archive:
            links = {info.filename for info in archive.infolist() if stat.S_ISLNK(info.external_attr >> 16)}
            names = _image_names(set(archive.namelist()) - links)

            def content(name):
                return member(archive, name, MAX_FILE_BYTES)
            table = _table(path, content("dataset.json")) if "dataset.json" in archive.namelist() else None
            return _read_files(str(path), names, table, content, resolution)
    except (OSError, *ZIP_ERRORS) as error:
        raise ValueError(f"{path} is not a readable zip file ({error})") from None


def _table(source, content):
    """The value in a dataset.json."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"dataset.json of {source} is not valid JSON ({error})") from None


def _fits(source, size):
    if size > MAX_BYTES:
        raise ValueError(f"{source} has {size:,} bytes of pixels; at most {MAX_BYTES:,} are read: lower --resolution, or "
                         "give fewer images")


def _image_names(names):
    """The PNG and JPEG files among names, sorted; without hidden ones, such as macOS's and half-written files."""
    return sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES)
                  and not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))


def _read_files(source, names, table, content, resolution):
    """Images, classes and names of files in a folder or zip; `content(name)` gives a file's bytes."""
    if not names:
        raise ValueError(f"{source} holds no PNG or JPEG images")
    _fits(source, len(names) * 3 * resolution**2)
    pictures, total = [], 0
    for name in names:
        picture = _decode(content(name), f"{source}/{name}")
        if resolution and picture.mode == "RGB":  # grey ones wait for what the others are
            picture = _resize(picture, resolution)
        total += picture.width * picture.height * 3  # grey ones among colour ones become colour
        _fits(source, total)
        pictures.append(picture)
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
            raise ValueError(f"dataset.json of {source} has no label for {error}; name every image with one, or remove it") from None
    else:
        folders = [name.split("/")[0] if "/" in name else "" for name in names]
        classes = np.unique(folders, return_inverse=True)[1]
    return torch.from_numpy(images), torch.from_numpy(_check_labels(classes, len(names), source)), names


def _decode(content, name):
    """A PNG or JPEG file's bytes as a grey (L) or RGB picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))  # reads the header
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width}x{picture.height}: at most {MAX_PIXELS:,} pixels are read")
        if getattr(picture, "is_animated", False):
            raise ValueError(f"an animation of {picture.n_frames} frames; split it into images")
        picture.load()
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, struct.error, zlib.error,
            Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
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
    if classes.shape != (count,) or not np.issubdtype(classes.dtype, np.integer) \
            or classes.min() < 0 or classes.max() > MAX_LABEL:
        raise ValueError(f"{source}: labels must be {count} whole numbers from 0 to {MAX_LABEL:,}, "
                         f"not {classes.dtype} {list(classes.shape)}")
    return classes.astype(np.int64)
