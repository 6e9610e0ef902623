"""Pixels out of a file's bytes, and labels out of numbers: image files, npz and npy arrays.

Pixels are what a viewer shows, or the file is refused: 8 bits a channel, grey or RGB, upright, opaque. What a
file may take of memory is bounded before it is taken, and nothing is unpickled. Every error is a ValueError
that names the file and says what to do.
"""
import io
import warnings
import zipfile

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from run import say

FORMATS = "PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"
TIFF_BITS = 258         # the tag BitsPerSample
MAX_AREA = 2**24        # pixels of one image: 4,096 x 4,096
MAX_BYTES = 2**34       # of all images of a source, and of an array: 16 GiB
MAX_LABEL = 2**20       # largest class number

# Names that people and tools give to arrays; the first that is there counts
IMAGE_NAMES = "arr_0", "images", "image", "x", "samples", "x_train", "train_images", "data"
LABEL_NAMES = "labels", "label", "y", "targets", "y_train", "train_labels", "arr_1"


def decode(content, name):
    """An image file's bytes as a grey (L) or RGB picture, upright as its EXIF says."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of damaged EXIF, and of sizes that are checked here
            picture = Image.open(io.BytesIO(content), formats=FORMATS)  # reads the header
            bits = content[24] if picture.format == "PNG" else 8  # Pillow would drop the lower ones of 16
            if picture.format == "TIFF":
                bits = max(picture.tag_v2.get(TIFF_BITS, (1,)))
            if picture.width * picture.height > MAX_AREA:
                raise ValueError(f"{picture.width}x{picture.height}: at most {MAX_AREA:,} pixels are read")
            # of a phone's MPO the first picture counts
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                raise ValueError("an animation, or several pages; split it into images")
            if bits > 8 or picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                raise ValueError(f"{picture.mode}, {bits} bits a channel; convert it to 8 bits, grey or RGB")
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            if picture.has_transparency_data and picture.convert("RGBA").getextrema()[3][0] < 255:
                raise ValueError("transparent in places, alpha under 255; paint it on a background")
            return picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{name} cannot be read as {', '.join(FORMATS)}: it is none, or its beginning is "
                         "damaged") from None
    except Exception as error:  # damaged files make decoders raise almost anything
        raise ValueError(f"{name} cannot be read ({error})") from None


def resize(picture, resolution):
    """The middle square of a picture at `resolution` pixels a side: Lanczos on 8 bits, as published."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((resolution, resolution), Image.Resampling.LANCZOS)


def picture(array):
    """A uint8 array [C, H, W] of 1 or 3 channels as a PIL picture."""
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def to_array(picture):
    """A grey or RGB picture as a uint8 array [C, H, W]."""
    values = np.asarray(picture)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def load_arrays(path, choose):
    """The arrays of an npz file that `choose(names)` names, as a list; of an npy file its only one.

    Raises ValueError, naming the file, for what is neither, for pickled objects, and if `choose` does.
    """
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                return [np.lib.format.read_array(file, allow_pickle=False)]
        with zipfile.ZipFile(path) as archive:
            names = choose([name[:-4] for name in archive.namelist() if name.endswith(".npy")])
            return [np.lib.format.read_array(archive.open(bounded(archive, f"{name}.npy", MAX_BYTES)),
                                             allow_pickle=False) for name in names]
    except Exception as error:  # damaged files make numpy and zipfile raise almost anything
        why = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read as an npz or npy file of plain numbers ({why})") from None


def bounded(archive, name, limit):
    """The ZipInfo of a member that declares at most `limit` bytes.

    Raises ValueError for more, and for unusual compressions, which may unpack to any size at once.
    """
    info = archive.getinfo(name)
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{archive.filename}: {name} is encrypted or compressed in an unusual way; pack it "
                         "stored or deflated, without a password")
    if info.file_size > limit:
        raise ValueError(f"{archive.filename}: {name} has {info.file_size:,} bytes; "
                         f"at most {limit:,} are read")
    return info


def read_array(path):
    """Images [N, C, H, W] of an npz or npy file, and its labels (None without).

    Images are uint8 [N, H, W, C], [N, C, H, W] or grey [N, H, W]; in an npz the first of `IMAGE_NAMES`, or
    the only array. Labels are the first of `LABEL_NAMES`.
    """
    def choose(names):
        known = {name.lower(): name for name in names}
        images = [known[name] for name in IMAGE_NAMES if name in known] or names[:len(names) == 1]
        if not images:
            raise ValueError(f"its arrays are {', '.join(names) or 'none'}; call one images")
        chosen = images[:1] + [known[name] for name in LABEL_NAMES if name in known][:1]
        if others := sorted({*names} - {*chosen, "seeds", "about"}):  # those are sample.py's
            say(f"{path}: read {' and '.join(chosen)}; left out {', '.join(others)}")
        return chosen

    x, labels = [*load_arrays(path, choose), None][:2]
    shape = [*x.shape]
    if x.ndim == 3 and shape[2] > 4:  # not one image [H, W, C]
        x = x[:, None]
    elif x.ndim == 4 and shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3) or not x.size:
        raise ValueError(f"{path} holds {x.dtype} {shape}; images must be uint8 [N, H, W, C] with 1 or 3 "
                         "channels, or [N, H, W]: save one as x[None], without alpha x[..., :3], and floats "
                         "from 0 to 1 as (x * 255).round().astype(np.uint8)")
    return x, labels


def check_labels(labels, count, source):
    """Labels int64 [N] of whole numbers [N] or [N, 1], integers or floats, or of one-hot vectors [N, K].

    Raises ValueError for what is neither, such as attributes, soft labels or several labels an image.
    """
    x = labels if labels.dtype.kind in "biuf" and labels.ndim in (1, 2) else np.array([np.nan])
    if x.ndim == 2 and x.shape[1] > 1 and ((x == 0) | (x == 1)).all() and (x.sum(1) == 1).all():
        x = x.argmax(1)
    if x.size != count or len(x) != count or not ((0 <= x) & (x <= MAX_LABEL) & (x == np.floor(x))).all():
        raise ValueError(f"{source}: labels {labels.dtype} {list(labels.shape)} do not give each of {count} "
                         f"images one class; make them whole numbers from 0 to {MAX_LABEL:,} or one-hot "
                         "vectors, or leave them out")
    return x.reshape(-1).astype(np.int64)
