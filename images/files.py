"""Images of a source, with their classes: a standard data set, a folder or zip of image files, one array.

Files may be a stranger's: no code is read from them, nothing is unpacked to disk, and what they may take of
memory is bounded before it is taken. Every error is a ValueError that names the file (docs/inputs.md).
"""
import json
import os
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from disk import ZIP_ERRORS
from images.pixels import MAX_BYTES, bounded, check_labels, decode, picture, read_array, resize, to_array
from images.standard import ARCHIVES, STANDARD, find_idx, read_cifar, read_idx_pair, read_standard
from run import say

SUFFIXES = ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"
# What file managers, NAS boxes and archivers leave in folders, beside hidden files
NOT_OURS = ("__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information",
            "lost+found", "Thumbs.db", "desktop.ini")
HALVES = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
MAX_FILE_BYTES = 2**26  # of one file in a zip: 64 MiB


def read(source, resolution=0):
    """All of a source: images uint8 [N, C, H, W], classes int64 [N] (zeros where there are none), names.

    SOURCE:K is class K alone, as class 0. Decoded once a process: the tensors are not to be changed. Raises
    ValueError, naming the file, for what cannot be read.
    """
    source, one_class = parsed(str(source))
    if one_class is not None:
        images, classes, names = read(source, resolution)
        kept = [i for i, c in enumerate(classes.tolist()) if c == one_class]
        if not kept:
            last = int(classes.max())
            raise ValueError(f"{source} has no class {one_class}; its classes are numbered 0 to {last}")
        return images[kept], torch.zeros(len(kept), dtype=torch.int64), [names[i] for i in kept]
    if not there(source):
        raise ValueError(f"no data at {source!r}; give digits, cifar10 or another standard data set, an "
                         "image folder, a zip or an npz file")
    if source in STANDARD and os.path.exists(source):
        say(f"{source} is the standard data set, and not what is called so here; give ./{source} for that")
    return _read(source, resolution, _files(source))


def parsed(source):
    """A source without :K, and K, or None where it is whole."""
    whole, _, number = source.rpartition(":")
    if whole and number.isdecimal() and not os.path.exists(source):
        return whole, int(number)
    return source, None


def shape_of(source, resolution=0):
    """Channels, pixels a side and classes of a source; a standard data set is not read for that."""
    whole, one_class = parsed(source)
    if whole not in STANDARD:
        images, classes, _ = read(source, resolution)
        return images.shape[1], images.shape[3], len(classes.unique())
    channels, side, classes = STANDARD[whole]
    return channels, side, classes if one_class is None else 1


def there(source):
    """Whether a source can be found: a standard data set, or a path, perhaps with :K."""
    whole, _ = parsed(source)
    return whole in STANDARD or os.path.exists(whole)


def place(source):
    """A source as it can be found from any folder: paths are absolute."""
    return source if not source or parsed(source)[0] in STANDARD else os.path.abspath(source)


def _files(source):
    """The names of its files, their times and sizes: what tells a source from itself before a change."""
    if source in STANDARD:
        return ()
    names = _walk(source) if os.path.isdir(source) else [""]
    stats = [os.stat(Path(source, name)) for name in names]
    return tuple((name, about.st_mtime_ns, about.st_size) for name, about in zip(names, stats))


def _walk(folder):
    """Names of the files below a folder. Links are followed, but every folder is read once.

    A folder counts under its own name rather than a link's, if it has one here.
    """
    found, seen, folders, links = [], set(), [""], []
    while folders or links:
        inside = (folders or links).pop(0)
        path = os.path.join(folder, inside)
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        for name in sorted(os.listdir(path)):
            entry = os.path.join(path, name)
            if _is_foreign(name):
                continue
            if os.path.isdir(entry):
                (links if os.path.islink(entry) else folders).append(f"{inside}{name}/")
            elif os.path.isfile(entry):
                found.append(inside + name)
            else:
                raise ValueError(f"{entry} is a link that leads nowhere, or no file; remove it, or mend it")
    return found


def _is_foreign(name):
    """Whether a file or folder is hidden, or another program's."""
    return name.startswith(".") or name in NOT_OURS


@lru_cache(maxsize=2)  # a source, and what is mixed into it
def _read(source, resolution, files):
    """`read` of a source that is there; `files` is what `_files` says of it."""
    path = Path(source)
    if found := _array(source):
        images, classes = found
        names = [f"{path.name}/{i:05d}" for i in range(len(images))]
        if resolution and images.shape[2:] != (resolution, resolution):
            _check_size(source, len(images) * images.shape[1] * resolution**2)
            images = np.stack([to_array(resize(picture(image), resolution)) for image in images])
    elif path.is_dir():
        files = {_plain(name): path / name for name, *_ in files}
        images, classes, names = _read_files(source, files, Path.read_bytes, resolution)
    elif path.suffix.lower() == ".zip":
        images, classes, names = _read_zip(path, resolution)
    else:
        raise ValueError(f"{source} is not an image folder, a zip, an npz, npy or IDX file")
    classes = check_labels(np.zeros(len(images)) if classes is None else classes, len(images), source)
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
    return read_array(path) if path.suffix.lower() in (".npz", ".npy") else None


def _read_zip(path, resolution):
    """Images of a zip file, read in memory; classes as in a folder."""
    def content(name):
        info = bounded(archive, name, MAX_FILE_BYTES)
        with archive.open(info) as file:
            return file.read(info.file_size)  # of what holds more than it says, no more is unpacked
    try:
        with zipfile.ZipFile(path) as archive:
            files = {_plain(name): name for name in archive.namelist() if not name.endswith(("/", "\\"))}
            files = {name: stored for name, stored in files.items()
                     if not any(map(_is_foreign, name.split("/")))}
            return _read_files(str(path), files, content, resolution)
    except (OSError, *ZIP_ERRORS) as error:
        raise ValueError(f"{path} is not a readable zip file ({error})") from None


def _plain(name):
    """A file's name as zip files should have it: "/" between its parts, and none of them "."."""
    return os.path.normpath(name.replace("\\", "/"))


def _read_files(source, files, content, resolution):
    """Images uint8 [N, C, H, W], classes and names of `files`, {name: what `content` gives its bytes for}."""
    names = sorted(name for name in files if os.path.splitext(name)[1].lower() in SUFFIXES)
    tables = [name for name in files if os.path.basename(name) == "dataset.json"]
    if not names:
        raise ValueError(f"{source} holds no images ({' '.join(SUFFIXES)})")
    if others := sorted(files.keys() - {*names, *tables}):
        say(f"{source}: {len(names)} images; files of other kinds passed over: {len(others)}, such as "
            f"{others[0]}")
    if len(tables) > 1:
        raise ValueError(f"{source} holds {tables[0]} and {tables[1]}; keep one, at the top")
    if tables:
        classes = _labels(source, tables[0], names, content(files[tables[0]]))
    else:
        classes = _classes(source, names)
    return _pixels(source, names, lambda name: content(files[name]), resolution), classes, names


def _classes(source, names):
    """Class [N] of each image: the place of its folder, below those around all, numbers as numbers."""
    around = len(os.path.commonprefix([name.split("/")[:-1] for name in names]))
    folders = [(name.split("/")[around:-1] or [""])[0] for name in names]
    found = sorted(set(folders), key=lambda name: (name.zfill(20) if name.isdecimal() else name, name))
    if len(found) > 1 and {folder.lower() for folder in found} <= HALVES:
        raise ValueError(f"{source} holds {' and '.join(found)}, which are no classes; give one of these")
    order = {folder: c for c, folder in enumerate(found)}
    return np.array([order[folder] for folder in folders])


def _labels(source, table, names, content):
    """Labels [N] of dataset.json (EDM), or [N, K] where they are vectors; None where it has none."""
    try:
        labels = dict(json.loads(content)["labels"] or {})
        around = os.path.dirname(table)
        labels = {_plain(os.path.join(around, name)): label for name, label in labels.items()}
        return np.array([labels[name] for name in names]) if labels else None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{table} of {source} does not give every image a label ({error!r}); write "
                         '{"labels": [[NAME, CLASS], ...]} of all, or null') from None


def _pixels(source, names, content, resolution):
    """The images as one array uint8 [N, C, H, W]; a few grey ones among colour ones become colour."""
    arrays = []
    for name in names:
        picture = decode(content(name), f"{source}/{name}")
        array = to_array(resize(picture, resolution) if resolution else picture)
        arrays.append(array)
        (H, W), (h, w) = array.shape[1:], arrays[0].shape[1:]
        if (H, W) != (h, w):
            raise ValueError(f"{source}/{name} is {W}x{H}, {names[0]} is {w}x{h}; give --resolution for one "
                             "size")
        _check_size(source, len(names) * 3 * H * W)
    C = max(map(len, arrays))
    return np.stack([np.broadcast_to(array, (C, *array.shape[1:])) for array in arrays])


def _check_size(source, size):
    if size > MAX_BYTES:
        raise ValueError(f"{source} has {size:,} bytes of pixels; at most {MAX_BYTES:,} are read: lower "
                         "--resolution, or give fewer images")
