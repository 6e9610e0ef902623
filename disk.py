"""What is on disk: whole files, run directories, logs, and what a file says of itself.

Standard library only.
"""
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import zipfile
import zlib
from pathlib import Path

from run import say

# What zipfile raises for damaged, encrypted and unknown-compression archives
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)
PLACES = {"data", "mix"}  # options that say where data lie; the data are compared by their fingerprint
# Files that only the process which holds their run directory writes
HELD = "config.json", "log.jsonl", "scores.json", "emm.json", "*.safetensors"


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`; on success it becomes `path`, on any error it is removed.

    It is flushed to disk before it takes its name: a file that exists is whole. A device or a pipe is
    written into.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        yield Path(path)
        return
    path = Path(os.path.realpath(path))  # a link stays
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".part{os.getpid()}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path):
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path, value):
    """Write a dict as JSON at `path`, one key a line."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path):
    """The JSON object in `path` as a dict. Raises ValueError naming the file if it is none."""
    try:
        return dict(json.loads(Path(path).read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON, or no object ({error}); "
                         "mend it, or remove it and run again") from None


class Directory:
    """The files in a run directory: of train.py, and of the stages that use it."""

    def __init__(self, path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.log = self.path / "log.jsonl"
        self.state = self.path / "state.safetensors"
        self.model = self.path / "model.safetensors"
        self.scores = self.path / "scores.json"  # of emm.py: memorized samples of each snapshot

    def snapshot(self, step):
        return self.path / f"snapshot-{step:08d}.safetensors"

    def snapshots(self):
        """The snapshot files that exist, in order of their steps, the final model last."""
        return sorted(self.path.glob("snapshot-*.safetensors")) + [self.model] * self.model.exists()


@contextlib.contextmanager
def claim(directory, about, defaults=None):
    """Hold `directory` as the run directory of `about`: make it, or check that it is of the same.

    Within, no other process holds it, and what a killed one left half-written is gone. `about` is a dict
    for config.json; its "options" and "data" decide what is computed. `defaults` stand for options that
    config.json does not have yet. Raises ValueError naming each value that differs, or if the directory
    holds something else, or if another process holds it.
    """
    path = Directory(directory).config
    if not path.exists() and any(path.parent.glob("[!.]*")):
        raise ValueError(f"{directory} is not empty and has no config.json; choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(".lock"), "w") as lock:  # until the end of the block or of the process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{directory} is in use by another process; "
                             "wait for it, or choose another --out") from None
        except OSError as error:  # some file systems have no locks
            say(f"{directory} cannot be locked ({error.strerror}): let only one process use it at a time")
        there = read_json(path) if path.exists() else about
        if different := differences(there, about, defaults):
            raise ValueError(f"{directory} was made with other options ({different}); "
                             "choose another --out, or remove it")
        if not path.exists() or there.get("options") != about["options"]:  # the data have moved
            write_json(path, there | dict(options=about["options"]))
        for pattern in *(f".part*-{name}" for name in HELD), ".tmp??????":  # the last is of safetensors
            for leftover in path.parent.glob(pattern):
                leftover.unlink()
        yield


def earlier(path, about, defaults):
    """What the result file at `path` says of itself, as a dict; {} if there is none.

    Raises ValueError, naming each value that differs, if its options, data or sources are others.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give a file as --out")
    if not path.is_file():
        return {}
    there = metadata(path) if path.suffix in (".npz", ".safetensors") else read_json(path)
    if different := differences(there, about, defaults):
        raise ValueError(f"{path} was made with other options or data ({different}); "
                         "choose another --out, or remove it to make it again")
    return there


def differences(old, new, defaults=None):
    """What differs between two such dicts, in words; "" if nothing that decides what is computed does.

    An option that one of them lacks counts as its default: scripts gain options, and old runs stay valid.
    Without `defaults` only the options that both have count. Where the data lie does not count, but their
    fingerprints do.
    """
    found = []
    for part, usual in (("options", defaults or {}), ("data", {}), ("source", {})):
        there, asked = usual | old.get(part, {}), usual | new.get(part, {})
        keys = there.keys() | asked.keys()
        if part == "options" and defaults is None:
            keys = there.keys() & asked.keys()
        for key in sorted(keys - PLACES):
            if there.get(key) != asked.get(key):
                old_value, new_value = (value[:12] if "sha256" in key and isinstance(value, str) else
                                        repr(value) for value in (there.get(key), asked.get(key)))
                found.append(f"{key}: {old_value} there, {new_value} asked")
    return "; ".join(found)


class Log:
    """log.jsonl of a run directory: one JSON object a line, appended and flushed at once.

    When it is opened, lines after step `step`, which will be made again, are dropped.
    """

    def __init__(self, path, step=0):
        self.path = Path(path)
        lines = read_log(path, step) if self.path.exists() else []
        with whole_file(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write(self, **values):
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")


def read_log(path, last=float("inf")):
    """The lines of a log.jsonl up to step `last` as dicts, but for a torn last line.

    Raises ValueError naming the first line that is not one of Log's.
    """
    lines = []
    for number, text in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            if line["step"] <= last:
                lines.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"line {number} of {path} is damaged; "
                             "remove that line to go on without it") from None
    return lines


def metadata(path):
    """What weights or samples record of themselves, as a dict: options, versions, checksums of inputs.

    Raises ValueError for a file that is missing, that none of these scripts wrote, or that is damaged there.
    """
    try:
        if Path(path).suffix == ".safetensors":
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = file.read(min(length, os.path.getsize(path)))
            text = json.loads(header)["__metadata__"]["about"]
        else:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of {damaged} differs")
                array = archive.open("about.npy").read(2**24)
            text = array[array.index(b"\n") + 1:].decode("utf-32-le")  # numpy's, after a header line
        return dict(json.loads(text))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, *ZIP_ERRORS) as error:
        raise ValueError(f"{path} is not a whole file of these scripts ({error}); "
                         "remove it, if one of them wrote it") from None


def provenance(device=None):
    """Where a file comes from, as a dict for JSON: commit, library versions, machine and device."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit, versions = None, {"python": platform.python_version()}
    with contextlib.suppress(OSError):  # no git here
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    for package in ("torch", "numpy", "triton", "safetensors", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return dict(commit=commit, versions=versions, host=platform.node(), machine=platform.machine(),
                processor=processor(), device=str(device) if device is not None else None)


def processor():
    """Name and cores of this machine's processor, such as "AMD EPYC, 2 cores"."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.M)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name[1] if name else platform.processor() or platform.machine()}, {cores} cores"
