"""Options, run directories, whole files and logs: what every stage shares that is not mathematics.

    python run.py show FILE   prints what a stage's file records: options, commit, machine, inputs

Standard library only, so that it imports in milliseconds and runs anywhere.

    parse(Options)            a frozen dataclass from the command line, with --help
    stage(function, Options)  a stage's `main`: errors in one line, no traceback
    publish(path)             a temporary path that becomes `path` whole, or not at all
    claim(directory, record)  hold a run directory: make it, or check that it is the one asked for
"""
import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import typing
import zipfile
import zlib
from importlib import metadata
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or newer is needed, and this is {platform.python_version()}")

# What zipfile raises for damaged, encrypted and unknown-compression archives
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)
ABOUT_BYTES = 2**24  # a samples file's record of itself is at most this long
# What torch's errors say, for a GPU, for a CPU and from NVIDIA's libraries
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|_ALLOC_FAILED")
PLACES = {"data", "mix"}  # options that say where data lie; the data are compared by their fingerprint
USAGE = 2                 # exit status for invalid options, as in argparse
INTERRUPTED = 130         # the shell's exit status for a command ended by Ctrl-C

_signals = []             # that have come within `interruptible`


def option(default, help, choices=None, recorded=True, hidden=False, none=None):
    """A dataclass field for `parse`: its default, its text in --help, and the values allowed.

    `hidden` keeps it off the command line. `none` is what the word "none" means to an optional one.
    `recorded=False` marks options of the machine (device, where to write) that do not change what
    is computed: a run may be resumed with other values of these.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, recorded=recorded, hidden=hidden, none=none))


def parse(cls, argv=None, description=None):
    """Build the dataclass `cls` from the command line (`sys.argv` by default).

    A bool becomes --x / --no-x, a tuple takes comma-separated items, an optional value takes "none".
    Unknown options, invalid values and whatever the dataclass itself refuses (ValueError) exit with status 2
    and one line on stderr.
    """
    parser = _Parser(description=description, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        flag, about, default = "--" + field.name.replace("_", "-"), field.metadata, field.default
        help = about["help"].replace("%", "%%")
        if about["hidden"]:
            continue
        if types[field.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default,
                                help=f"{help} (default: {'yes' if default else 'no'})")
            continue
        # otherwise the help itself says what happens if it is not given
        if default != "" and not (default is None and about["none"] is not None):
            help += f" (default: {_show(default)})"
        parser.add_argument(flag, type=functools.partial(_convert, types[field.name], about["none"]),
                            choices=about["choices"], default=default, help=help,
                            metavar=None if about["choices"] else field.name.upper())
    values = vars(parser.parse_args(argv))
    try:
        return cls(**values)
    except (ValueError, OverflowError) as error:
        parser.error(str(error))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(USAGE, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


def _show(value):
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else value


def _convert(kind, none, word):
    """A command line argument as a value of type `kind`: int, float, str, int | str, a tuple, or optional."""
    if type(None) in typing.get_args(kind):
        if word.lower() == "none":
            return none
        kind = typing.get_args(kind)[0]
    try:
        if kind == int | str:
            return int(word) if word.isdecimal() else word
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return tuple(item(part) for part in word.split(",") if part)
        return kind(word)
    except (ValueError, OverflowError):
        name = getattr(kind, "__name__", "number")  # a union has none
        if typing.get_origin(kind) is tuple:
            name = f"comma-separated list of {item.__name__}"
        raise argparse.ArgumentTypeError(f"{word!r} is not a valid {name}") from None


def stage(function, cls, description, argv=None, say=None):
    """Parse the options, run `function(options)`, print `say` of its result, and return that result.

    Errors print one line on stderr. Invalid options exit with status 2; ValueError, OSError and running out
    of memory, of the machine or of a GPU, with 1; an interrupt with 130. Anything else is a defect of this
    program and keeps its traceback. A failed write to stdout or stderr does not stop the work; if it was to
    stdout, a line at the end says so, and the exit status is 1.
    """
    name, first = Path(sys.argv[0]).name, rank() == 0
    # All processes of torchrun meet the same errors, and one reports them.
    quiet = not first and "TORCHELASTIC_RUN_ID" in os.environ
    while os.open(os.devnull, os.O_RDWR) < 2:  # if stderr is closed, the next file opened would become it
        pass
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = Output(sys.stdout if first else open(os.devnull, "w"))
    log = Output(open(os.devnull, "w") if quiet else sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(log):
        try:
            result = function(parse(cls, argv, description))
            if say and result is not None:
                print(say(result))
        except KeyboardInterrupt as interrupt:
            print("; ".join([f"{name}: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
            sys.exit(INTERRUPTED)
        except (ValueError, OverflowError, OSError, MemoryError, RuntimeError) as error:
            text = in_words(error, cls)
            if text is None:
                raise
            alone = isinstance(error, (MemoryError, RuntimeError))  # one process may run out of memory alone
            sys.exit(1 if quiet and not alone else f"{name}: {text}")
        finally:
            out.flush(), log.flush()
    if out.error:
        sys.exit(f"{name}: the output cannot be written ({out.error})")
    return result


class Output:
    """A stream whose failures raise nothing: what it cannot write is dropped, and `error` says why."""

    def __init__(self, stream):
        self.error = None if stream else "it is closed"
        self.stream = stream or open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self._dropping(self.stream.write, text)

    def flush(self):
        self._dropping(self.stream.flush)

    def _dropping(self, call, *arguments):
        try:
            return call(*arguments)
        except OSError as error:
            self.error = error.strerror
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # takes what is still buffered


def in_words(error, cls):
    """What went wrong, in one line, in a stage with the options `cls`; None for a defect of the program."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(text):
        return None
    if not isinstance(error, (RuntimeError, MemoryError)):
        return text
    remedy = "take fewer or smaller images"
    for flag in ("at_once", "batch_device"):
        if flag in cls.__dataclass_fields__:
            remedy = f"compute fewer images at once with --{flag.replace('_', '-')}"
    start = ". ".join(text.split(". ")[:2])  # the rest is about torch's allocator
    return f"out of memory ({start}); {remedy}"


def size():
    """How many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank():
    """Which of them this is, from 0. Without torchrun, a RANK left in the environment is ignored."""
    return int(os.environ.get("RANK") or 0) if size() > 1 else 0


def part(options, cls, **changed):
    """The options of the dataclass `cls` among `options`, which have more, with some of them `changed`."""
    return cls(**{f.name: getattr(options, f.name) for f in dataclasses.fields(cls)} | changed)


def recorded(options):
    """The options that decide the result, as read back from JSON: a file stores and `claim` compares them."""
    return json.loads(json.dumps({f.name: getattr(options, f.name) for f in dataclasses.fields(options)
                                  if f.metadata.get("recorded", True)}))


def defaults(cls):
    """The default of each option of a dataclass, as read back from JSON."""
    return json.loads(json.dumps({f.name: f.default for f in dataclasses.fields(cls)}))


def provenance(device=None):
    """Where a file comes from, as a dict for JSON: commit, library versions, machine and device."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "triton", "safetensors", "pillow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return dict(commit=commit, versions=versions, host=platform.node(), machine=platform.machine(),
                processor=processor(), device=str(device) if device is not None else None)


def processor():
    """Name and cores of this machine's processor, such as "AMD EPYC, 2 cores"."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.M)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name[1] if name else platform.processor() or platform.machine()}, {cores} cores"


@functools.lru_cache
def say(text):
    """Print a line on stderr, once a process; under torchrun only rank 0 prints."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def publish(path, flush=True):
    """Yield a temporary path beside `path`; on success it becomes `path`, on any error it is removed.

    The file is flushed to disk before it takes its name, and the folder afterwards: a file that exists is
    whole. `flush=False` is for many small files that are quickly made again: whole after a kill, but perhaps
    not after a power cut. Of a link, the target is replaced; a device or a pipe is written into.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        yield Path(path)
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".part{os.getpid()}-{path.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes a file of its own there, which others may not read
        if flush:
            sync(temporary)
        temporary.replace(path)
        if flush:
            sync(path.parent)
    except OSError as error:
        if error.errno and not error.filename:  # such as that of a full disk
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync(path):
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path):
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path, value):
    """Publish a dict as JSON at `path`, one key a line."""
    with publish(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path):
    """The JSON object in `path` as a dict. Raises ValueError naming the file if it is none."""
    try:
        value = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); mend it, or remove it and run again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; mend it, or remove it and run again")
    return value


class Directory:
    """The files in a run directory: of train.py, and of the stages that use it."""

    def __init__(self, path):
        self.path = Path(path)
        self.config, self.log = self.path / "config.json", self.path / "log.jsonl"
        self.state, self.model = self.path / "state.safetensors", self.path / "model.safetensors"
        self.scores = self.path / "scores.json"      # of emm.py: memorized samples of each snapshot
        self.memorize = self.path / "memorize.json"  # of memorize.py: memorized ones of the last samples
        self.compare = self.path / "compare.json"    # of paper/compare.py: the model beside the optimum
        self.agree = self.path / "agree.json"        # of paper/agree.py: the model beside another
        self.optimum = self.path / "optimum.npz"     # samples of its training set's closed-form optimum

    def snapshot(self, step):
        return self.path / f"snapshot-{step:08d}.safetensors"

    def snapshots(self):
        """The snapshot files that exist, in order of their steps, the final model last."""
        return sorted(self.path.glob("snapshot-*.safetensors")) + [self.model] * self.model.exists()

    @staticmethod
    def samples(weights):
        """Where the samples of a snapshot file go: samples.npz or samples-STEP.npz beside it."""
        stem = weights.stem.replace("model", "samples").replace("snapshot", "samples")
        return weights.with_name(f"{stem}.npz")


@contextlib.contextmanager
def claim(directory, record, defaults=None):
    """Hold `directory` as the run directory of `record`: make it, or check that it is of the same record.

    Within, no other process holds it, and what a killed one left half-written is gone. `record` is a dict
    for config.json; its "options" and "data" decide what is computed. `defaults` stand for options that the
    record there does not have yet. Raises ValueError naming each value that differs, or if the directory
    holds something else, or if another process holds it.
    """
    path = Directory(directory).config
    if not path.exists() and any(path.parent.glob("[!.]*")):
        raise ValueError(f"{directory} is not empty and has no config.json; choose another --out")
    with locked(directory):
        if path.exists():
            there = read_json(path)
            if different := differences(there, record, defaults):
                raise ValueError(f"{directory} was made with other options ({different}); "
                                 "choose another --out, or remove it")
            options, asked = there.get("options", {}), record.get("options", {})
            places = {key: asked[key] for key in PLACES & asked.keys()}
            if options | places != options:  # the data have moved
                write_json(path, there | dict(options=options | places))
        else:
            write_json(path, record)
        for pattern in (".part*-*", ".tmp??????"):  # of `publish`, and of safetensors within it
            for leftover in path.parent.glob(pattern):
                leftover.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def locked(directory):
    """Hold `directory`, made if need be, until the end of the block or of the process.

    Raises ValueError if another process holds it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{directory} is in use by another process ({file.read() or 'starting'}); "
                             "wait for it, or choose another --out") from None
        except OSError as error:  # some file systems have no locks
            say(f"{directory} cannot be locked ({error.strerror}): let only one process use it at a time")
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


def differences(old, new, defaults=None):
    """What differs between two records, in words; "" if nothing that decides what is computed does.

    An option that one of them lacks counts as its default: scripts gain options, and old runs stay valid.
    Where the data lie does not count, but their fingerprints do.
    """
    found = []
    for part in ("options", "data", "source"):
        there, asked = ((defaults or {} if part == "options" else {}) | (side.get(part) or {})
                        for side in (old, new))
        found += [f"{key}: {there.get(key)!r} there, {asked.get(key)!r} asked"
                  for key in sorted((there.keys() | asked.keys()) - PLACES)
                  if there.get(key) != asked.get(key)]
    return "; ".join(found)


class Log:
    """log.jsonl of a run directory: one JSON object a line, appended and flushed at once.

    When it is opened, a torn last line (of a process killed while writing) and lines after step `step`
    (which will be made again) are dropped.
    """

    def __init__(self, path, step=0):
        self.path = Path(path)
        if self.path.exists():
            lines = [line for line in read_log(self.path) if line["step"] <= step]
            with publish(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write(self, **values):
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")


def read_log(path):
    """The lines of a log.jsonl as dicts, but for a torn last one.

    Raises ValueError naming the first line that is not one of Log's.
    """
    lines = []
    for number, text in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError
        except (ValueError, RecursionError):
            raise ValueError(f"line {number} of {path} is damaged; "
                             "remove that line to go on without it") from None
        lines.append(line)
    return lines


def about(path):
    """What a file records of itself, as a dict: options, commit, versions, device, checksums of its inputs.

    Raises ValueError for a file that is missing, that none of these scripts wrote, or that is damaged there.
    """
    path = Path(path)
    if path.suffix == ".json":
        return read_json(path)
    try:
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = file.read(min(length, path.stat().st_size))
            text = json.loads(header)["__metadata__"]["about"]
        else:
            with zipfile.ZipFile(path) as archive, archive.open("about.npy") as file:
                array = file.read(ABOUT_BYTES)  # of numpy: a header line, then UTF-32
            text = array[array.index(b"\n") + 1:].decode("utf-32-le")
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("what it says of itself is no JSON object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, *ZIP_ERRORS) as error:
        raise ValueError(f"{path} is not a whole file of these scripts ({error}); "
                         "remove it, if one of them wrote it") from None
    return value


@contextlib.contextmanager
def interruptible():
    """Within, only note SIGINT and SIGTERM, for `interrupted` to tell; a second signal acts at once."""
    def note(number, frame):
        _signals.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _signals.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def interrupted():
    """Whether a signal has come within `interruptible`."""
    return bool(_signals)


def main():
    if len(sys.argv) != 3 or sys.argv[1] != "show":
        print("run.py: usage: python run.py show FILE", file=sys.stderr)
        sys.exit(USAGE)
    try:
        values = about(sys.argv[2])
    except (ValueError, OSError) as error:
        sys.exit(f"run.py: {error}")
    out = Output(sys.stdout)
    short = {key: value for key, value in values.items() if not isinstance(value, list)}
    print(json.dumps(short, indent=1), file=out, flush=True)
    if out.error:
        sys.exit(f"run.py: the output cannot be written ({out.error})")


if __name__ == "__main__":
    main()
