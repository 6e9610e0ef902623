"""Pixels out of a file's bytes, and labels out of numbers: image files, npz and npy arrays.

Pixels are what a viewer shows, or the file is refused: 8 bits a channel, grey or RGB, upright, opaque. What a
file may take of memory is bounded before it is taken, and nothing is unpickled. Every error is a ValueError
that names the file, and where a line of numpy helps, that line.
"""
import io
import math
import struct
import tokenize
import warnings
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from run import ZIP_ERRORS, bounded, say

FORMATS = "PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"
TIFF_BITS = 258         # the tag BitsPerSample
MAX_PIXELS = 2**24      # of one image: 4,096 x 4,096
MAX_BYTES = 2**34       # of all images of a source: 16 GiB
MAX_LABEL = 2**20       # largest class number

# Names that people and tools give to arrays; the first that is there counts
IMAGE_NAMES = "arr_0", "images", "image", "x", "samples", "x_train", "train_images", "data"
LABEL_NAMES = "labels", "label", "y", "targets", "y_train", "train_labels", "arr_1", "arr_0"
NO_LABELS = "seeds",  # of sample.py


def decode(content, name):
    """An image file's bytes as a grey (L) or RGB picture, upright as its EXIF says."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of EXIF that is damaged, and may stay so
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=FORMATS)  # reads the header
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width}x{picture.height}: at most {MAX_PIXELS:,} pixels are read")
            # of a phone's MPO the first picture counts
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                raise ValueError("an animation, or several pages; split it into images")
            if (bits := _bits(picture, content)) > 8:  # Pillow would drop the lower ones
                raise ValueError(f"{bits} bits a channel; convert it to 8")
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
    except UnidentifiedImageError:
        raise ValueError(f"{name} cannot be read as {', '.join(FORMATS)}: it is none, or its beginning is "
                         "damaged") from None
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, struct.error,
            zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} cannot be read ({error})") from None
    return _opaque(picture, name)


def _bits(picture, content):
    if picture.format == "PNG":
        return content[24]  # of its header, which comes first
    return max(picture.tag_v2.get(TIFF_BITS, (1,))) if picture.format == "TIFF" else 8


def _opaque(picture, name):
    """The picture as L or RGB. Raises ValueError if any of it is transparent, or it has other channels."""
    if picture.has_transparency_data:
        picture = picture.convert("LA" if picture.mode in ("1", "L", "LA", "La") else "RGBA")
        if picture.getextrema()[-1][0] < 255:
            raise ValueError(f"{name} is transparent in places (alpha under 255); paint it on a background")
    if picture.mode in ("1", "LA", "P", "RGBA"):
        picture = picture.convert("L" if picture.mode in ("1", "LA") else "RGB")
    if picture.mode not in ("L", "RGB"):
        raise ValueError(f"{name} has mode {picture.mode}; convert it to 8-bit grey or RGB")
    return picture


def resize(picture, resolution):
    """The middle square of a picture at `resolution` pixels a side: Lanczos on 8 bits, as published."""
    side = min(picture.size)
    if picture.width != picture.height:
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    size = resolution, resolution
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def picture(array):
    """A uint8 array [C, H, W] of 1 or 3 channels as a PIL picture."""
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def to_array(picture):
    """A grey or RGB picture as a uint8 array [C, H, W]."""
    values = np.asarray(picture)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def read_npz(path):
    """Images [N, C, H, W] of an npz file, and its labels (None without).

    Images are the first of `IMAGE_NAMES`, or the one array of 3 or 4 dimensions: uint8 [N, H, W, C] or grey
    [N, H, W]; an array named `images` may be [N, C, H, W]. Labels are the first of `LABEL_NAMES`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            headers = {}
            for name in archive.namelist():
                if name.endswith(".npy"):
                    info = bounded(archive, name, MAX_BYTES)
                    with archive.open(info) as file:
                        headers[name[:-4]] = _header(file, info.file_size, f"{path}: {name}")
            key, labels = _chosen(path, headers)
            _check_images(f"{path}: {key}", *headers[key], either=key.lower() == "images")
            arrays = {}
            for name in filter(None, (key, labels)):
                with archive.open(f"{name}.npy") as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, *ZIP_ERRORS) as error:
        raise ValueError(f"{path} is not a readable npz file ({error})") from None
    return _channels_first(arrays[key], f"{path}: {key}"), arrays.get(labels)


def read_npy(path):
    """Images [N, C, H, W] of an npy file, uint8 [N, H, W, C] or grey [N, H, W], and None for its labels."""
    with open(path, "rb") as file:
        _check_images(path, *_header(file, path.stat().st_size, path))
        file.seek(0)
        return _channels_first(np.lib.format.read_array(file, allow_pickle=False), path), None


def _header(file, size, name):
    """Shape and dtype of an array in npy form. Raises ValueError if its `size` in bytes is another."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"its npy version is {version}")
        read = [np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0][version[0] - 1]
        shape, _, dtype = read(file)
    except (ValueError, SyntaxError, TypeError, RecursionError, tokenize.TokenError) as error:
        raise ValueError(f"{name} is not a readable array ({str(error).splitlines()[0]})") from None
    there = file.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or not dtype.hasobject and there != size:
        raise ValueError(f"{name} says it is {dtype} {list(shape)}, which its {size:,} bytes are not")
    return shape, dtype


def _chosen(path, headers):
    """Names of the arrays of images and of labels (None without) among {name: (shape, dtype)}."""
    def first(names, among):
        return next((key for name in names for key in among if key.lower() == name), None)

    shaped = [key for key, (shape, _) in headers.items() if len(shape) in (3, 4)]
    key = first(IMAGE_NAMES, shaped) or (shaped[0] if len(shaped) == 1 else None)
    if key is None:
        found = ", ".join(f"{name} {dtype} {list(shape)}" for name, (shape, dtype) in headers.items())
        if any(dtype.hasobject for _, dtype in headers.values()):
            found += "; pickled objects are not read, save np.stack(list(x))"
        raise ValueError(f"{path} has {'several arrays' if shaped else 'no array'} that may be images: "
                         f"{found or 'it is empty'}. Name one images, uint8 [N, H, W, C]")
    if len(shaped) > 1:
        say(f"{path}: images are {key}; left out {', '.join(name for name in shaped if name != key)}")
    flat = [name for name, (shape, _) in headers.items() if name != key and len(shape) in (1, 2)]
    labels = first(LABEL_NAMES, flat)
    perhaps = [name for name in flat if headers[name][0] == headers[key][0][:1]
               and headers[name][1].kind in "iu" and name not in NO_LABELS]
    if perhaps and not labels:
        say(f"{path}: no labels are read; if {' or '.join(perhaps)} holds them, name it labels")
    return key, labels


def _check_images(name, shape, dtype, either=False):
    """Raise ValueError, with lines of numpy that help, unless an array is uint8 [N, H, W, C] or [N, H, W],
    or [N, C, H, W] where `either` will do."""
    channels_last = len(shape) == 4 and shape[3] in (1, 3, 4)
    channels_first = len(shape) == 4 and shape[1] in (1, 3) and not channels_last
    of_shape = ((dtype.hasobject, "pickled objects are not read, save np.stack(list(x))"),
                (len(shape) not in (3, 4) or 0 in shape, "these are none"),
                (len(shape) == 3 and shape[2] in (1, 3), "if it is one image, save x[None]"),
                (channels_first and not either, "save x.transpose(0, 2, 3, 1)"),
                (len(shape) == 4 and not channels_first and not channels_last, "choose the channels"))
    of_type = ((dtype.kind == "f", "for x in [0, 1] save (x * 255).round().astype(np.uint8), for x in "
                                   "[-1, 1] ((x + 1) * 127.5).round().clip(0, 255).astype(np.uint8)"),
               (dtype.kind == "b", "save x.astype(np.uint8) * 255"),
               (dtype == np.uint16, "save (x / 257).round().astype(np.uint8) where 65535 is white"),
               (dtype not in (np.uint8, object), "save x.astype(np.uint8) if its values are 0 to 255"))
    remedies = [next((remedy for wrong, remedy in kind if wrong), "") for kind in (of_shape, of_type)]
    if any(remedies):
        raise ValueError(f"{name} is {dtype} {list(shape)}; images must be uint8 [N, H, W, C] with 1 or 3 "
                         f"channels, or [N, H, W]: {'; and '.join(filter(None, remedies))}")


def _channels_first(images, name):
    """[N, C, H, W] of images that `_check_images` let pass. Raises ValueError for alpha under 255."""
    if images.ndim == 3:
        return images[:, None]
    if images.shape[3] == 4:
        if (images[..., 3] < 255).any():
            raise ValueError(f"{name} has 4 channels, and 1 or 3 channels are read: paint x on a background, "
                             "or save x[..., :3]")
        images = images[..., :3]
    return images.transpose(0, 3, 1, 2) if images.shape[3] in (1, 3) else images


def check_labels(labels, count, source):
    """Labels int64 [N] of whole numbers [N] or [N, 1], integers or floats, or of one-hot vectors [N, K].

    Raises ValueError for what is neither, such as attributes, soft labels or several labels an image.
    """
    what = f"{labels.dtype} {list(labels.shape)}"
    sound = labels.dtype.kind in "biuf" and labels.ndim in (1, 2) and len(labels) == count <= labels.size
    if sound and labels.ndim == 2 and labels.shape[1] > 1:
        if not (((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()):
            raise ValueError(f"{source}: labels {what} are not one-hot: attributes, soft labels or several "
                             "labels an image; give each image one class, or leave the labels out")
        return labels.argmax(1)
    if not sound or not ((labels >= 0) & (labels <= MAX_LABEL) & (labels == np.floor(labels))).all():
        raise ValueError(f"{source}: labels must be {count} whole numbers from 0 to {MAX_LABEL:,} or one-hot "
                         f"vectors, not {what}")
    return labels.reshape(-1).astype(np.int64)
