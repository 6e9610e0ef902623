"""Images of a source, with their classes: a standard data set, a folder or zip of image files, one array in a file.

Files may be a stranger's: no code is read from them, nothing is unpacked to disk, and what they may take of memory is
bounded before it is taken. Nothing is dropped or changed in silence: what is passed over, and what is cropped, is said
in one line on stderr (docs/inputs.md). Every error is a ValueError that names the file.
"""
import io
import json
import os
import stat
import struct
import warnings
import zipfile
import zlib
from collections import Counter, deque
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from arrays import MAX_BYTES, MAX_LABEL, STANDARD, check_labels, is_array, read_array, read_standard
from run import ZIP_ERRORS, member, say

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
TIFF_BITS = 258  # the tag BitsPerSample
# Folders that file managers, NAS boxes and archivers make, beside hidden ones: thumbnails, trash
NOT_OURS = ("__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
HALVES = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}

# Bounds on what a file can ask for; each leaves room for every data set of the field
MAX_FILE_BYTES = 2**26    # of one image file, or dataset.json: 64 MiB
MAX_PIXELS = 2**24        # of one image: 4,096 x 4,096


def read(source, resolution=0):
    """All of a source: images uint8 [N, C, H, W], classes int64 [N] (zeros where there are none), names.

    SOURCE:K is class K alone, as class 0. Decoded once a process: the tensors are not to be changed. Raises ValueError,
    naming the file, for what cannot be read.
    """
    source = str(source)
    whole, colon, number = source.rpartition(":")
    if colon and number.isdecimal() and not os.path.exists(source):
        images, classes, names = read(whole, resolution)
        kept = (classes == int(number)).nonzero()[:, 0] if int(number) <= MAX_LABEL else ()
        if not len(kept):
            raise ValueError(f"{whole} has no class {number}; its classes are numbered 0 to {int(classes.max())}")
        return images[kept], torch.zeros_like(kept), [names[i] for i in kept.tolist()]
    if source not in STANDARD and not there(source):
        raise ValueError(f"no data at {source!r}; give {', '.join(STANDARD[:2])} or another standard data set, an image "
                         "folder, a zip or an npz file")
    if source in STANDARD and os.path.exists(source):
        say(f"{source} is the standard data set, and not what is called so here; give ./{source} for that")
    return _read(source, resolution, _files(source))


def there(source):
    """Whether a source can be found: a standard data set, or a path, each perhaps with :K."""
    whole, _, number = source.rpartition(":")
    return bool(source) and (source in STANDARD or os.path.exists(source) or number.isdecimal() and there(whole))


def place(source):
    """A source as it can be found from any folder: paths are absolute."""
    standard = source in STANDARD or source.rpartition(":")[0] in STANDARD and not os.path.exists(source)
    return source if standard or not source else os.path.abspath(source)


@lru_cache(maxsize=2)  # a source and what is mixed into it
def _read(source, resolution, files):
    path = Path(source)
    if source in STANDARD or is_array(path):
        images, classes, names = read_standard(source) if source in STANDARD else read_array(path)
        if resolution and images.shape[-2:] != (resolution, resolution):
            _fits(source, len(images) * images.shape[1] * resolution**2)
            if images.shape[2] != images.shape[3]:
                say(f"{source}: {len(images)} images; {_cropped(len(images))}")
            images = np.stack([_to_array(_resize(picture(image), resolution)) for image in images])
    elif path.is_dir():
        images, classes, names = read_folder(path, [name for name, *_ in files], resolution)
    elif path.suffix.lower() == ".zip":
        images, classes, names = read_zip(path, resolution)
    else:
        raise ValueError(f"{source} is not an image folder, a zip, an npz, npy or IDX file")
    return torch.from_numpy(np.require(images, requirements="CW")), torch.from_numpy(classes), names


def _files(source):
    """What tells a source from another, or from itself before a change: its files, each with its size and time."""
    if source in STANDARD:
        return None
    if not os.path.isdir(source):
        about = os.stat(source)
        return ((source, about.st_size, about.st_mtime_ns),)
    return tuple((name, about.st_size, about.st_mtime_ns) for name, about in _walk(source))


def _walk(folder):
    """The files below a folder, as (name with "/", os.stat_result).

    Links to folders are followed; each folder is read once, under its own name if it has one here. Hidden folders and
    those of file managers are not entered, but yielded, with "/" at their end, as are links to what is read already.
    Raises ValueError for a link that leads nowhere.
    """
    found, seen, folders, links = [], set(), deque([""]), deque()
    while folders or links:
        inside = (folders or links).popleft()
        about = os.stat(os.path.join(folder, inside))
        if (about.st_dev, about.st_ino) in seen:
            found.append((inside, about))
            continue
        seen.add((about.st_dev, about.st_ino))
        with os.scandir(os.path.join(folder, inside)) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        for entry in entries:
            name = inside + entry.name
            if entry.is_symlink() and not entry.name.startswith(".") and not os.path.exists(entry.path):
                raise ValueError(f"{entry.path} is a link that leads nowhere; remove it, or bring back what it leads to")
            if not entry.is_dir():
                if entry.is_file():  # no device or pipe
                    found.append((name, entry.stat()))
            elif _not_ours(entry.name):
                found.append((f"{name}/", entry.stat()))
            else:
                (links if entry.is_symlink() else folders).append(f"{name}/")
    return found


def _not_ours(part):
    """What a name of a file or folder that is not the data's own is called, "" for the data's own."""
    return "hidden" if part.startswith(".") else part if part in NOT_OURS else ""


def read_folder(folder, files, resolution=0):
    """Images of `files` below a folder; the class is the first folder below, or stands in dataset.json (EDM)."""
    def content(name):
        size = (folder / name).stat().st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{folder}/{name} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read of one file")
        return (folder / name).read_bytes()
    return _read_files(str(folder), files, content, resolution)


def read_zip(path, resolution=0):
    """Images of a zip file, read in memory; classes as in `read_folder`."""
    try:
        with zipfile.ZipFile(path) as archive:
            link = next((i.filename for i in archive.infolist() if stat.S_ISLNK(i.external_attr >> 16)), None)
            if link:
                raise ValueError(f"{path}: {link} is a link, which is not followed in a zip; pack the files themselves")
            files = [name for name in archive.namelist() if not name.endswith(("/", "\\"))]
            return _read_files(str(path), files, lambda name: member(archive, name, MAX_FILE_BYTES), resolution)
    except (OSError, *ZIP_ERRORS) as error:
        raise ValueError(f"{path} is not a readable zip file ({error})") from None


def _read_files(source, listed, content, resolution):
    """Images uint8 [N, C, H, W], classes int64 [N] and names of files that are `listed`; `content(file)` gives the bytes."""
    files = {_plain(file): file for file in listed}
    names, passed = _image_names(files)
    passed["of a name that another has"] += len(listed) - len(files)
    kinds = [f"{count} {kind}" for kind, count in sorted(passed.items(), key=lambda item: (-item[1], item[0])) if count]
    notes = [f"passed over {', '.join(kinds)}"] * bool(kinds)
    if not names:
        raise ValueError(f"{source} holds no images ({' '.join(IMAGE_SUFFIXES)}){'; '.join(['', *notes])}")
    tables = [name for name in files if name.split("/")[-1] == "dataset.json" and not any(map(_not_ours, name.split("/")))]
    classes = _classes(source, names, tables, lambda name: content(files[name]), notes)
    pictures = _pictures(source, names, lambda name: content(files[name]), resolution, notes)
    if notes:
        say(f"{source}: {len(names)} images; {'; '.join(notes)}")
    return np.stack([_to_array(p) for p in pictures]), check_labels(classes, len(names), source), names


def _plain(name):
    """A file's name as zip files should have it: "/" between its parts, and no "." among them."""
    parts = name.replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".")) + "/" * name.endswith("/")


def _image_names(names):
    """The images among names, sorted, and how many of which kind the others are (a Counter); what cannot be an image of
    the data, such as .DS_Store, is not counted."""
    images, passed = [], Counter()
    for name in names:
        *folders, last = name.rstrip("/").split("/")
        suffix = os.path.splitext(last)[1].lower()
        kind = next(filter(None, map(_not_ours, [*folders, last])), "")
        if kind:
            passed[kind] += suffix in IMAGE_SUFFIXES or name.endswith("/")
        elif name.endswith("/"):
            passed["links to folders that are read already"] += 1
        elif suffix in IMAGE_SUFFIXES:
            images.append(name)
        elif last not in ("dataset.json", "Thumbs.db", "desktop.ini"):
            passed[suffix if suffix[1:].isalnum() else "of no known kind"] += 1
    return sorted(images), passed


def _classes(source, names, tables, content, notes):
    """Class [N] of each image: as dataset.json says, or its folder below those that hold all, in order of their names."""
    around = os.path.commonprefix([name.split("/")[:-1] for name in names])
    if len(tables) > 1 or tables and tables[0].split("/")[:-1] != around[:tables[0].count("/")]:
        raise ValueError(f"{source}: {tables[-1]} is not the labels of all images; keep one dataset.json, at the top")
    if tables:
        return _labelled(source, names, tables[0].removesuffix("dataset.json"), content(tables[0]), notes)
    folders = [(name.split("/")[len(around):-1] or [""])[0] for name in names]
    found = set(folders)
    if len(found) > 1 and {folder.lower() for folder in found} <= HALVES:
        raise ValueError(f"{source} holds {' and '.join(sorted(found))}, which are no classes; give one of these folders")
    if "" in found and len(found) > 1:
        notes.append(f"{folders.count('')} in no folder of a class, which make one of their own")
    order = {folder: c for c, folder in enumerate(sorted(found, key=_number_first))}
    return np.array([order[folder] for folder in folders])


def _number_first(name):
    """Sorts names that are numbers as numbers, before all others."""
    number = name.lstrip("0") if name.isascii() and name.isdigit() else None
    return number is None, len(number or ""), number or "", name


def _labelled(source, names, inside, table, notes):
    """Labels [N], or [N, K] where they are vectors, of dataset.json in the folder `inside`; zeros where it has none."""
    try:
        table = json.loads(table)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"dataset.json of {source} is not valid JSON ({error})") from None
    if isinstance(table, dict) and "labels" not in table:
        raise ValueError(f'dataset.json of {source} has no "labels"; write {{"labels": [[NAME, CLASS], ...]}} or null for none')
    labels = table["labels"] if isinstance(table, dict) else table
    if not labels:
        return np.zeros(len(names), np.int64)
    try:
        labels = {_plain(str(name)): label for name, label in dict(labels).items()}
        classes = np.array([labels[name.removeprefix(inside)] for name in names])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"dataset.json of {source} has no label for {error}; name every image with one, or remove it") from None
    if len(labels) > len(names):
        notes.append(f"{len(labels) - len(names)} that dataset.json names are not there")
    return classes


def _pictures(source, names, content, resolution, notes):
    """The images as PIL pictures of one size, all grey or all RGB."""
    _fits(source, len(names) * 3 * resolution**2)
    pictures, total, oblong = [], 0, 0
    for name in names:
        picture = _decode(content(name), f"{source}/{name}")
        oblong += picture.width != picture.height
        if resolution and picture.mode == "RGB":  # grey ones wait for what the others are
            picture = _resize(picture, resolution)
        total += picture.width * picture.height * 3  # grey ones among colour ones become colour
        _fits(source, total)
        pictures.append(picture)
    if any(p.mode == "RGB" for p in pictures):  # a few grey files among colour ones
        pictures = [p.convert("RGB") for p in pictures]
    if resolution:
        pictures = [_resize(p, resolution) for p in pictures]
        notes += [_cropped(oblong)] * (oblong > 0)
    for name, picture in zip(names, pictures):
        if picture.size != pictures[0].size:
            raise ValueError(f"{source}/{name} is {picture.width}x{picture.height}, {names[0]} is {pictures[0].width}x"
                             f"{pictures[0].height}; give --resolution to resize all to one size")
    return pictures


def _fits(source, size):
    if size > MAX_BYTES:
        raise ValueError(f"{source} has {size:,} bytes of pixels; at most {MAX_BYTES:,} are read: lower --resolution, or "
                         "give fewer images")


def _decode(content, name):
    """An image file's bytes as a grey (L) or RGB picture, upright as its EXIF says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=FORMATS)  # reads the header
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width}x{picture.height}: at most {MAX_PIXELS:,} pixels are read")
        if getattr(picture, "is_animated", False) and picture.format != "MPO":  # of a phone: its first picture counts
            raise ValueError("an animation, or several pages; split it into images")
        bits = content[24] if picture.format == "PNG" else \
            max(picture.tag_v2.get(TIFF_BITS, (1,))) if picture.format == "TIFF" else 8
        if bits > 8:  # Pillow would drop the lower ones
            raise ValueError(f"{bits} bits a channel; convert it to 8")
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
    except UnidentifiedImageError:
        raise ValueError(f"{name} cannot be read as {', '.join(FORMATS)}: it is none, or its beginning is damaged") from None
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, struct.error, zlib.error,
            Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} cannot be read ({error})") from None
    return _without_alpha(picture, name)


def _without_alpha(picture, name):
    """The picture as L or RGB. Raises ValueError if any of it is transparent, or it is in another colour space."""
    if picture.has_transparency_data:
        picture = picture.convert("LA" if picture.mode in ("1", "L", "LA", "La") else "RGBA")
        if picture.getextrema()[-1][0] < 255:
            raise ValueError(f"{name} is transparent in places (its alpha is under 255); paint it on a background")
    if picture.mode in ("1", "LA", "P", "RGBA"):
        picture = picture.convert("L" if picture.mode in ("1", "LA") else "RGB")
    if picture.mode not in ("L", "RGB"):
        raise ValueError(f"{name} has mode {picture.mode}; convert it to 8-bit grey or RGB")
    return picture


def _cropped(count):
    return f"{count} are not square, and cropped to their centre for --resolution"


def _resize(picture, resolution):
    """The middle square of a picture at `resolution` pixels a side: Lanczos on the 8-bit picture, as published."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture if picture.width == picture.height else picture.crop((left, top, left + side, top + side))
    return picture if side == resolution else picture.resize((resolution, resolution), Image.Resampling.LANCZOS)


def picture(array):
    """A uint8 array [C, H, W] of 1 or 3 channels as a PIL picture."""
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def _to_array(picture):
    array = np.asarray(picture)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)  # [C, H, W]
