"""Options, run directories, whole files and logs: what every stage shares that is not mathematics.

    python run.py show FILE   prints what a stage's file records: options, commit, machine, inputs

Standard library only, so that it imports in milliseconds and runs anywhere.

    parse(Options)            a frozen dataclass from the command line, with --help
    claim(directory, record)  hold a run directory: make it, or check that it is the one asked for
    publish(path)             a temporary path that becomes `path` whole, or not at all
    stage(function, Options)  a stage's `main`: errors in one line, no traceback
"""
import argparse
import contextlib
import dataclasses
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import typing
import zipfile
import zlib
from importlib import metadata
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or newer is needed, and this is {platform.python_version()}")

# What zipfile raises for damaged, encrypted and unknown-compression archives
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)

_held = set()      # directories that this process has locked
_signals = []      # that have come within `interruptible`
UMASK = os.umask(0o022)
os.umask(UMASK)    # the only way to read it; once, before there are threads
ABOUT_BYTES = 2**24  # a samples file's record of itself is at most this long
# What torch's errors say, for a GPU, for a CPU and from NVIDIA's libraries
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|_ALLOC_FAILED")
# What flock raises on file systems without locks
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
PLACES = ("data", "mix")  # options that say where data lie; the data are compared by their fingerprint
REMOVED = dict(compile=False)  # former options, with the value that runs without them had
USAGE = 2          # exit status for invalid options, as in argparse
INTERRUPTED = 130  # the shell's exit status for a command ended by Ctrl-C


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

    A bool becomes --x / --no-x, a tuple takes comma-separated items, an optional value takes
    "none". A field without a default must be given. Unknown options, invalid values and whatever the
    dataclass itself refuses (ValueError) exit with status 2 and one line on stderr.
    """
    parser = _Parser(description=description, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        flag, about = "--" + field.name.replace("_", "-"), dict(field.metadata)
        help = about["help"].replace("%", "%%")
        if about["hidden"]:
            continue
        if types[field.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default,
                                help=f"{help} (default: {'yes' if field.default else 'no'})")
            continue
        if field.default is dataclasses.MISSING:
            how = dict(required=True, help=help)
        else:
            how = dict(default=field.default, help=f"{help} (default: {_show(field.default)})")
        if field.default == "" or field.default is None and about["none"] is not None:
            how["help"] = help  # which itself says what happens if it is not given
        parser.add_argument(flag, type=functools.partial(_convert, types[field.name], about["none"]),
                            choices=about["choices"],
                            metavar=None if about["choices"] else field.name.upper(), **how)
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
    """A command line argument as a value of type `kind`: int, float, str, optional of these, or a tuple."""
    if type(None) in typing.get_args(kind):
        if word.lower() == "none":
            return none
        kind = typing.get_args(kind)[0]
    try:
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return tuple(item(part) for part in word.split(",") if part)
        return kind(word)
    except (ValueError, OverflowError):
        name = kind.__name__
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
    name = Path(sys.argv[0]).name
    while os.open(os.devnull, os.O_RDWR) < 2:  # if stderr is closed, the next file opened would become it
        pass
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        first = rank() == 0
    except ValueError as error:
        sys.exit(f"{name}: {error}")
    out, log = Output(sys.stdout if first else open(os.devnull, "w")), Output(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(log):
        try:
            with contextlib.nullcontext() if first else contextlib.redirect_stderr(out):
                options = parse(cls, argv, description)
            result = function(options)
            if say and result is not None:
                print(say(result))
        except KeyboardInterrupt as interrupt:
            print(f"{name}: interrupted{'; ' + str(interrupt) if str(interrupt) else ''}", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except (ValueError, OverflowError, OSError, MemoryError, RuntimeError) as error:
            text = in_words(error, cls)
            if text is None:
                raise
            # Under torchrun all processes meet the same errors, and one reports them; but one may run out of
            # memory alone.
            everyone = (isinstance(error, (ValueError, OverflowError, OSError))
                        and "TORCHELASTIC_RUN_ID" in os.environ)
            sys.exit(f"{name}: {text}" if first or not everyone else 1)
        except SystemExit as end:
            if end.code:
                raise
            result = None  # after --help
        finally:
            out.flush(), log.flush()
    if out.error:
        sys.exit(f"{name}: the output cannot be written ({out.error.strerror})")
    return result


class Output:
    """A stream whose failures raise nothing: what it cannot write is dropped, and `error` says why."""

    def __init__(self, stream):
        self.error = None if stream else OSError(errno.EBADF, os.strerror(errno.EBADF))
        self.stream = stream or open(os.devnull, "w")
        with contextlib.suppress(AttributeError):  # a replaced stream may lack it
            self.stream.reconfigure(errors="backslashreplace")  # file names need not be valid text

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
            self.error = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # takes what is still buffered


def in_words(error, cls):
    """What went wrong, in one line, in a stage with the options `cls`; None for a defect of the program."""
    text = " ".join(str(error).split()) or type(error).__name__
    torch_memory = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(text)
    if not isinstance(error, MemoryError) and not torch_memory:
        return None if isinstance(error, RuntimeError) else text
    flag = next((flag for flag in ("batch_device", "batch") if flag in cls.__dataclass_fields__), None)
    remedy = "take fewer or smaller images"
    if flag:
        remedy = f"compute fewer images at once with --{flag.replace('_', '-')}"
    start = ". ".join(text.split(". ")[:2])  # the rest is about torch's allocator
    return f"out of memory ({start}); {remedy}"


def size():
    """How many processes torchrun started, 1 without it."""
    return _number("WORLD_SIZE", 1)


def rank():
    """Which of them this is, from 0. Without torchrun, a RANK left in the environment is ignored."""
    return _number("RANK", 0) if size() > 1 else 0


def _number(variable, default):
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal():
        raise ValueError(f"{variable}={text} in the environment is not a number; "
                         "unset it, or start with torchrun")
    return int(text) or default


def part(options, cls, **changed):
    """The options of the dataclass `cls` among `options`, which have more, with some of them `changed`."""
    return cls(**{f.name: getattr(options, f.name) for f in dataclasses.fields(cls)} | changed)


def recorded(options):
    """The options that decide the result, as read back from JSON: a file stores and `claim` compares them."""
    return json.loads(json.dumps({f.name: getattr(options, f.name) for f in dataclasses.fields(options)
                                  if f.metadata.get("recorded", True)}))


def defaults(cls):
    """The default of each option of a dataclass, as read back from JSON."""
    return json.loads(json.dumps({f.name: f.default for f in dataclasses.fields(cls)
                                  if f.default is not dataclasses.MISSING}))


def provenance(device=None):
    """Where a file comes from, as a dict for JSON: commit, library versions, machine and device."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run([*git, "describe", "--always", "--dirty", "--abbrev=12"],
                                capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
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
    whole. It keeps the mode of the file that it replaces. Temporary files of killed processes are swept.
    `flush=False` is for many small files that are quickly made again: whole after a kill, but perhaps not
    after a power cut. A `path` that is no regular file (a device, a pipe) is written into; of a link, the
    target is replaced.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / f"new{path.suffix}"
            yield temporary
            with naming(path), open(temporary, "rb") as new, open(path, "wb") as file:
                shutil.copyfileobj(new, file)
        return
    if path.is_symlink():
        path, link = Path(os.path.realpath(path)), path
        if link.parts[:2] == ("/", "dev"):  # a shell's >, or >>, whose file would be replaced
            raise ValueError(f"{link} is {path} here; write to that file, or into a pipe")
    path.parent.mkdir(parents=True, exist_ok=True)
    if flush:
        sweep(path.parent, f".{glob.escape(path.name)}.*.part*")
    handle, temporary = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=".part" + path.suffix, dir=path.parent)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH)  # held while this process lives: see `sweep`
        with naming(path):
            yield Path(temporary)
            if flush:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~UMASK)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    finally:
        os.close(handle)
    if flush:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def naming(path):
    """Make an OSError within that names no file, such as that of a full disk, name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def sweep(folder, pattern):
    """Remove temporary files of `publish` in `folder` that no living process holds by its lock."""
    for leftover in Path(folder).glob(pattern):
        # in use, gone, or not ours to touch
        with contextlib.suppress(OSError), open(leftover, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def file_sha256(path):
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(value):
    """A dict as read back from JSON, with a checksum of itself as its last entry."""
    value = json.loads(json.dumps(value))
    return value | dict(checksum=hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest())


def unsealed(value, path):
    """The dict that `sealed` was given. Files of older versions have no checksum, and pass as they are.

    Raises ValueError naming `path`, the file it comes from, if the checksum is wrong.
    """
    if "checksum" not in value:
        return value
    content = {key: v for key, v in value.items() if key != "checksum"}
    if sealed(content) != value:
        raise ValueError(f"{path} is damaged, or was edited: its checksum differs; remove it and run again")
    return content


def write_json(path, value):
    """Publish a dict as JSON at `path`, one key a line, sealed."""
    with publish(path) as temporary:
        temporary.write_text(json.dumps(sealed(value), indent=1) + "\n")


def read_json(path):
    """The JSON object in `path` as a dict, its checksum verified; ValueError naming the file if damaged."""
    try:
        value = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); remove it and run again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; remove it and run again")
    return unsealed(value, path)


def member(archive, name, limit):
    """The bytes of a member of an open zip file: as many as it declares, which is at most `limit`."""
    info = bounded(archive, name, limit)
    with archive.open(info) as file:
        return file.read(info.file_size)


def bounded(archive, name, limit):
    """The ZipInfo of a member that declares at most `limit` bytes.

    Raises ValueError for more, and for unusual compressions, which may unpack to any size at once.
    """
    info = archive.getinfo(name)
    if info.flag_bits & 1:
        raise ValueError(f"{archive.filename}: {name} is encrypted; pack it without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        names = zipfile.compressor_names | {93: "zstd", 95: "xz"}
        method = names.get(info.compress_type, f"method {info.compress_type}")
        raise ValueError(f"{archive.filename}: {name} is compressed by {method}; pack it stored or deflated")
    if info.file_size > limit:
        raise ValueError(f"{archive.filename}: {name} has {info.file_size:,} bytes; "
                         f"at most {limit:,} are read")
    return info


class Directory:
    """The files in a run directory: of train.py, and of the stages that use it."""

    def __init__(self, path):
        self.path = Path(path)
        self.config, self.log = self.path / "config.json", self.path / "log.jsonl"
        self.state, self.model = self.path / "state.safetensors", self.path / "model.safetensors"
        self.scores = self.path / "scores.json"      # of emm.py: memorized samples of each snapshot
        self.memorize = self.path / "memorize.json"  # of memorize.py: memorized ones of the last samples
        self.compare = self.path / "compare.json"    # of paper/compare.py: the model beside the optimum
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

    Within, no other process holds it, and what a killed one left half-written is swept. `record` is a dict
    for config.json; its "options" and "data" decide what is computed. `defaults` stand for options that the
    record there does not have yet. Raises ValueError naming each value that differs, or if the directory
    holds something else, or if another process holds it.
    """
    path = Directory(directory).config
    if not path.exists() and path.parent.exists():
        if any(not entry.name.startswith(".") for entry in path.parent.iterdir()):
            raise ValueError(f"{directory} is not empty and has no config.json; choose another --out")
    with locked(directory):
        if path.exists():
            there = read_json(path)
            different = differences(there, record, defaults)
            if different:
                raise ValueError(f"{directory} was made with other options ({different}); "
                                 "choose another --out, or remove it")
            moved = {key: value for key, value in record.get("options", {}).items()
                     if key in PLACES and there["options"].get(key, value) != value}
            if moved:
                write_json(path, there | dict(options=there["options"] | moved))
        else:
            write_json(path, record)
        for pattern in (".*.part*", ".tmp??????"):  # ours, and those of safetensors' save_file
            sweep(path.parent, pattern)  # not before the directory is known to be ours
        yield


@contextlib.contextmanager
def locked(directory):
    """Hold `directory`, made if need be, until the end of the block or of the process.

    Raises ValueError if another process holds it. This process may hold it several times.
    """
    directory = Path(directory).resolve()
    if directory in _held:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{directory} is in use by another process ({file.read() or 'starting'}); "
                             "wait for it, or choose another --out") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"{directory} is on a file system without locks ({error.strerror}): "
                  "let only one process use it at a time", file=sys.stderr)
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        _held.add(directory)
        try:
            yield
        finally:
            _held.discard(directory)


def differences(old, new, defaults=None):
    """What differs between two records, in words; "" if nothing that decides what is computed does.

    An option that one of them lacks counts as its default: scripts gain options, and old runs stay valid.
    Where the data lie does not count, but their fingerprints do.
    """
    found, defaults = [], REMOVED | (defaults or {})
    for part in ("options", "data", "source"):
        there, asked = old.get(part) or {}, new.get(part) or {}
        keys = there.keys() | asked.keys()
        if part == "options":
            keys -= set(PLACES)
            there, asked = ({key: defaults.get(key) for key in keys} | side for side in (there, asked))
        found += [f"{key}: {there.get(key)!r} there, {asked.get(key)!r} asked"
                  for key in sorted(keys) if there.get(key) != asked.get(key)]
    return "; ".join(found)


class Log:
    """log.jsonl of a run directory: one JSON object a line, appended and flushed at once.

    Each line carries a checksum. When the log is opened, a torn last line (of a process killed while
    writing) and lines after step `step` (which will be made again) are dropped.
    """

    def __init__(self, path, step=0):
        self.path = Path(path)
        if self.path.exists():
            lines = [line for line in read_log(self.path) if line["step"] <= step]
            with publish(self.path) as temporary:
                temporary.write_text("".join(map(_log_line, lines)))

    def write(self, **values):
        with naming(self.path), open(self.path, "a") as file:
            file.write(_log_line(values))


def _log_line(values):
    text = json.dumps(values)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'


def read_log(path):
    """The lines of a log.jsonl as dicts, but for a torn last one.

    Raises ValueError naming the first line that is damaged.
    """
    lines = []
    for number, text in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            values = {key: value for key, value in line.items() if key != "crc"}
            if "crc" in line and f"{text.decode()}\n" != _log_line(values):
                raise ValueError
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"line {number} of {path} is damaged; "
                             "remove that line to go on without it") from None
        lines.append(values)
    return lines


def about(path):
    """What a file records of itself, as a dict: options, commit, versions, device, checksums of its inputs.

    Raises ValueError for a file that is damaged or that none of these scripts wrote.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > path.stat().st_size:
                    raise ValueError("its header is longer than the file")
                value = json.loads(json.loads(file.read(size))["__metadata__"]["about"])
        elif path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                text = member(archive, "about.npy", ABOUT_BYTES)  # of numpy: a header line, then UTF-32
                value = json.loads(text[text.index(b"\n") + 1:].decode("utf-32-le"))
        elif path.suffix == ".json":
            return read_json(path)
        else:
            raise ValueError("it is no .safetensors, .npz or .json")
        if not isinstance(value, dict):
            raise ValueError("what it says of itself is no JSON object")
    except (ValueError, KeyError, TypeError, RecursionError, *ZIP_ERRORS) as error:
        raise ValueError(f"{path} is not a whole file of these scripts ({error})") from None
    return unsealed(value, path)


@contextlib.contextmanager
def terminable():
    """Within, SIGTERM raises KeyboardInterrupt, as SIGINT does. Outside the main thread it does nothing."""
    previous = None
    with contextlib.suppress(ValueError):
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def interruptible():
    """Within, only note SIGINT and SIGTERM, for `interrupted` to tell; a second signal acts at once.

    Outside the main thread, where Python takes no signals, it does nothing.
    """
    def note(number, frame):
        _signals.append(number)
        signal.signal(number, previous[number])

    previous = {}
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
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
    if sys.argv[1:] == ["--help"]:
        print(__doc__)
        return
    if len(sys.argv) != 3 or sys.argv[1] != "show":
        print("run.py: say: python run.py show FILE", file=sys.stderr)
        sys.exit(USAGE)
    try:
        values = about(sys.argv[2])
    except (ValueError, OSError) as error:
        sys.exit(f"run.py: {error}")
    out = Output(sys.stdout)
    short = {key: value for key, value in values.items() if not isinstance(value, list)}
    print(json.dumps(short, indent=1), file=out, flush=True)
    if out.error:
        sys.exit(f"run.py: the output cannot be written ({out.error.strerror})")


if __name__ == "__main__":
    main()
