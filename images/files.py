"""Images of a source, with their classes: a standard data set, a folder or zip of image files, one array.

Files may be a stranger's: no code is read from them, nothing is unpacked to disk, and what they may take of
memory is bounded before it is taken. Nothing is dropped or changed in silence: what is passed over or cropped
is said in one line on stderr (docs/inputs.md). Every error is a ValueError that names the file.
"""
import json
import os
import stat
import zipfile
from collections import Counter, deque
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from images.pixels import (
    MAX_BYTES,
    MAX_LABEL,
    check_labels,
    decode,
    picture,
    read_npy,
    read_npz,
    resize,
    to_array,
)
from images.standard import ARCHIVES, STANDARD, find_idx, read_cifar, read_idx_pair, read_standard
from run import ZIP_ERRORS, bounded, say

SUFFIXES = ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"
# Folders of thumbnails and trash that file managers, NAS boxes and archivers make, beside hidden ones
NOT_OURS = ("__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information",
            "lost+found")
HALVES = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
MAX_FILE_BYTES = 2**26  # of one image file, or dataset.json: 64 MiB, room for every data set of the field


def read(source, resolution=0):
    """All of a source: images uint8 [N, C, H, W], classes int64 [N] (zeros where there are none), names.

    SOURCE:K is class K alone, as class 0. Decoded once a process: the tensors are not to be changed. Raises
    ValueError, naming the file, for what cannot be read.
    """
    source = str(source)
    whole, colon, number = source.rpartition(":")
    if colon and number.isdecimal() and not os.path.exists(source):
        images, classes, names = read(whole, resolution)
        kept = (classes == int(number)).nonzero()[:, 0] if int(number) <= MAX_LABEL else ()
        if not len(kept):
            last = int(classes.max())
            raise ValueError(f"{whole} has no class {number}; its classes are numbered 0 to {last}")
        return images[kept], torch.zeros_like(kept), [names[i] for i in kept.tolist()]
    if not there(source):
        raise ValueError(f"no data at {source!r}; give digits, cifar10 or another standard data set, an "
                         "image folder, a zip or an npz file")
    if source in STANDARD and os.path.exists(source):
        say(f"{source} is the standard data set, and not what is called so here; give ./{source} for that")
    return _read(source, resolution, _files(source))


def shape_of(source, resolution=0):
    """Images, channels, pixels a side and classes of a source that is there.

    A standard data set is not read for it, and one class is taken to have an equal share of the images.
    """
    name, _, one_class = str(source).partition(":")
    if name not in STANDARD:
        images, classes, _ = read(source, resolution)
        return len(images), images.shape[1], images.shape[3], len(classes.unique())
    count, channels, side, classes = STANDARD[name]
    return (count // classes, channels, side, 1) if one_class else STANDARD[name]


def there(source):
    """Whether a source can be found: a standard data set, or a path, perhaps with :K."""
    whole, _, number = source.rpartition(":")
    return source in STANDARD or os.path.exists(source) or number.isdecimal() and there(whole)


def place(source):
    """A source as it can be found from any folder: paths are absolute."""
    standard = source in STANDARD or source.rpartition(":")[0] in STANDARD and not os.path.exists(source)
    return source if standard or not source else os.path.abspath(source)


def _files(source):
    """What tells a source from others, and from itself before a change: its files, their sizes and times."""
    if source in STANDARD:
        return None
    found = _walk(source) if os.path.isdir(source) else [(source, os.stat(source))]
    return tuple((name, about.st_size, about.st_mtime_ns) for name, about in found)


@lru_cache(maxsize=2)  # a source, and what is mixed into it
def _read(source, resolution, files):
    """`read` of a source that is there; `files` is what `_files` says of it."""
    path = Path(source)
    if found := _array(source):
        images, classes = found
        if classes is None:
            classes = np.zeros(len(images), np.int64)
        classes = check_labels(classes, len(images), source)
        names = [f"{path.name}/{i:0{4 if source == 'digits' else 5}d}" for i in range(len(images))]
        if resolution and images.shape[2:] != (resolution, resolution):
            _fits(source, len(images) * images.shape[1] * resolution**2)
            if images.shape[2] != images.shape[3]:
                say(f"{source}: {len(images)} images; {_cropped(len(images))}")
            images = np.stack([to_array(resize(picture(image), resolution)) for image in images])
    elif path.is_dir():
        images, classes, names = read_folder(path, [name for name, *_ in files], resolution)
    elif path.suffix.lower() == ".zip":
        images, classes, names = read_zip(path, resolution)
    else:
        raise ValueError(f"{source} is not an image folder, a zip, an npz, npy or IDX file")
    return torch.from_numpy(np.require(images, requirements="CW")), torch.from_numpy(classes), names


def _array(source):
    """Images uint8 [N, C, H, W] and classes (None without) of a source that is an array; None for others."""
    path = Path(source)
    if source in STANDARD:
        return read_standard(source)
    if idx := find_idx(path):
        return read_idx_pair(idx)
    if path.is_dir():
        return None
    if path.name in ARCHIVES:
        return read_cifar(ARCHIVES[path.name], path)
    read = {".npz": read_npz, ".npy": read_npy}.get(path.suffix.lower())
    return read(path) if read else None


def _walk(folder):
    """The files below a folder, as (name with "/", os.stat_result).

    Links to folders are followed, and each folder is read once, under a name of its own if it has one here.
    Hidden folders, those of file managers, and links to what is read already are not entered; they end in
    "/". Raises ValueError for a link that leads nowhere.
    """
    found, seen, folders, links = [], set(), deque([""]), deque()
    while folders or links:
        inside = (folders or links).popleft()
        path = os.path.join(folder, inside)
        about = os.stat(path)
        if (about.st_dev, about.st_ino) in seen:
            found.append((inside, about))
            continue
        seen.add((about.st_dev, about.st_ino))
        with os.scandir(path) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        for entry in entries:
            name, hidden = inside + entry.name, entry.name.startswith(".")
            if entry.is_symlink() and not hidden and not os.path.exists(entry.path):
                raise ValueError(f"{entry.path} is a link that leads nowhere; remove it, or bring back what "
                                 "it leads to")
            if entry.is_dir() and not _not_ours(entry.name):
                (links if entry.is_symlink() else folders).append(f"{name}/")
            elif entry.is_dir():
                found.append((f"{name}/", entry.stat()))
            elif entry.is_file():  # no device or pipe
                found.append((name, entry.stat()))
    return found


def _not_ours(part):
    """What the name of a file or folder that is not the data's own is called, "" for the data's own."""
    return "hidden" if part.startswith(".") else part if part in NOT_OURS else ""


def read_folder(folder, files, resolution=0):
    """Images of `files` below a folder; a class is a folder there, or a label in dataset.json (EDM)."""
    def content(name):
        size = (folder / name).stat().st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{folder}/{name} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        return (folder / name).read_bytes()
    return _read_files(str(folder), files, content, resolution)


def read_zip(path, resolution=0):
    """Images of a zip file, read in memory; classes as in `read_folder`."""
    try:
        with zipfile.ZipFile(path) as archive:
            def content(name):
                return archive.read(bounded(archive, name, MAX_FILE_BYTES))
            for info in archive.infolist():
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise ValueError(f"{path}: {info.filename} is a link, which is not followed in a zip; "
                                     "pack the files themselves")
            files = [name for name in archive.namelist() if not name.endswith(("/", "\\"))]
            return _read_files(str(path), files, content, resolution)
    except (OSError, *ZIP_ERRORS) as error:
        raise ValueError(f"{path} is not a readable zip file ({error})") from None


def _read_files(source, listed, content, resolution):
    """Images uint8 [N, C, H, W], classes int64 [N] and names of files; `content(file)` gives its bytes."""
    files = {_plain(file): file for file in listed}
    names, passed = _image_names(files)
    passed["of a name that another has"] = len(listed) - len(files)
    kinds = sorted((-count, kind) for kind, count in passed.items() if count)
    notes = ["passed over " + ", ".join(f"{-count} {kind}" for count, kind in kinds)] * bool(kinds)
    if not names:
        raise ValueError(f"{source} holds no images ({' '.join(SUFFIXES)}){'; '.join(['', *notes])}")
    classes = _classes(source, names, files, content, notes)
    pictures = _pictures(source, names, lambda name: content(files[name]), resolution, notes)
    if notes:
        say(f"{source}: {len(names)} images; {'; '.join(notes)}")
    return np.stack([to_array(p) for p in pictures]), check_labels(classes, len(names), source), names


def _plain(name):
    """A file's name as zip files should have it: "/" between its parts, and none of them "."."""
    parts = name.replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".")) + "/" * name.endswith("/")


def _image_names(names):
    """The images among names, sorted, and how many of each kind the others are (a Counter).

    What comes with every folder and can be no image of the data, such as .DS_Store, is not counted.
    """
    images, passed = [], Counter()
    for name in names:
        *folders, last = name.rstrip("/").split("/")
        suffix = os.path.splitext(last)[1].lower()
        if foreign := next(filter(None, map(_not_ours, [*folders, last])), ""):
            passed[foreign] += suffix in SUFFIXES or name.endswith("/")
        elif name.endswith("/"):
            passed["links to folders that are read already"] += 1
        elif suffix in SUFFIXES:
            images.append(name)
        elif last not in ("dataset.json", "Thumbs.db", "desktop.ini"):
            passed[suffix if suffix[1:].isalnum() else "of no known kind"] += 1
    return sorted(images), passed


def _classes(source, names, files, content, notes):
    """Class [N] of each image: what dataset.json says, or the place of its folder, below those around all."""
    around = os.path.commonprefix([name.split("/")[:-1] for name in names])
    tables = [parts for name in files if (parts := name.split("/"))[-1] == "dataset.json"]
    tables = ["/".join(parts) for parts in tables if not any(map(_not_ours, parts))]
    if len(tables) > 1 or tables and tables[0].split("/")[:-1] != around[:tables[0].count("/")]:
        raise ValueError(f"{source}: {tables[-1]} has not the labels of all images; keep one, at the top")
    if tables:
        inside = tables[0].removesuffix("dataset.json")
        return _labelled(source, [n.removeprefix(inside) for n in names], content(files[tables[0]]), notes)
    folders = [(name.split("/")[len(around):-1] or [""])[0] for name in names]
    found = sorted(set(folders), key=_number_first)
    if len(found) > 1 and {folder.lower() for folder in found} <= HALVES:
        raise ValueError(f"{source} holds {' and '.join(found)}, which are no classes; give one of these")
    if len(found) > 1 and "" in found:
        notes.append(f"{folders.count('')} in no folder of a class, which make one of their own")
    order = {folder: c for c, folder in enumerate(found)}
    return np.array([order[folder] for folder in folders])


def _number_first(name):
    """A key that sorts names that are numbers as numbers, and before others."""
    number = name.lstrip("0") if name.isascii() and name.isdigit() else None
    return number is None, len(number or ""), number or "", name


def _labelled(source, names, table, notes):
    """Labels [N] of dataset.json, or [N, K] where they are vectors, zeros where it has none."""
    try:
        table = json.loads(table)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"dataset.json of {source} is not valid JSON ({error})") from None
    if isinstance(table, dict) and "labels" not in table:
        raise ValueError(f'dataset.json of {source} has no "labels"; give it [[NAME, CLASS], ...] or null')
    labels = table["labels"] if isinstance(table, dict) else table
    if not labels:
        return np.zeros(len(names), np.int64)
    try:
        labels = {_plain(str(name)): label for name, label in dict(labels).items()}
        classes = np.array([labels[name] for name in names])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"dataset.json of {source} has no label for {error}; name every image with one, or "
                         "remove it") from None
    if len(labels) > len(names):
        notes.append(f"{len(labels) - len(names)} that dataset.json names are not there")
    return classes


def _pictures(source, names, content, resolution, notes):
    """The images as PIL pictures of one size, all grey or all RGB."""
    _fits(source, len(names) * 3 * resolution**2)
    pictures, total, oblong = [], 0, 0
    for name in names:
        picture = decode(content(name), f"{source}/{name}")
        oblong += picture.width != picture.height
        if resolution and picture.mode == "RGB":  # grey ones wait for what the others are
            picture = resize(picture, resolution)
        total += picture.width * picture.height * 3  # grey ones among colour ones become colour
        _fits(source, total)
        pictures.append(picture)
    if any(p.mode == "RGB" for p in pictures):  # a few grey files among colour ones
        pictures = [p.convert("RGB") for p in pictures]
    if resolution:
        pictures = [resize(p, resolution) for p in pictures]
        notes += [_cropped(oblong)] * (oblong > 0)
    for name, picture in zip(names, pictures):
        if picture.size != pictures[0].size:
            raise ValueError(f"{source}/{name} is {picture.width}x{picture.height}, {names[0]} is "
                             f"{pictures[0].width}x{pictures[0].height}; give --resolution for one size")
    return pictures


def _fits(source, size):
    if size > MAX_BYTES:
        raise ValueError(f"{source} has {size:,} bytes of pixels; at most {MAX_BYTES:,} are read: lower "
                         "--resolution, or give fewer images")


def _cropped(count):
    return f"{count} are not square, and cropped to their centre for --resolution"
