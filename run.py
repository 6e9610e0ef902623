"""How a stage runs: its options on the command line, its errors in a line, signals, processes.

Standard library only, so that it imports in milliseconds and runs anywhere.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import re
import signal
import sys
import typing
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or newer is needed, and this is {platform.python_version()}")

OUT_OF_MEMORY = re.compile("out of memory|allocate memory|_ALLOC_FAILED")  # of a GPU, a CPU, cuBLAS
INTERRUPTED = 130  # the shell's exit status for a command ended by Ctrl-C

_signals = []  # that have come within `interruptible`


def option(default, help, choices=None, recorded=True, least=-math.inf, below=math.inf, distinct=False):
    """A dataclass field for `parse`: its default, its text in --help, and the values allowed.

    Without a text it is not on the command line. `recorded=False` marks options of the machine (device,
    where to write) that do not change what is computed: a run may be resumed with other values of these.
    `Checked` refuses a number, or one in a tuple, that is less than `least`, or not below `below`, and a
    tuple that has an item twice and is to be `distinct`.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, recorded=recorded, bounds=(least, below), distinct=distinct))


class Checked:
    """A dataclass of options; raises ValueError, naming it, for a value that its `option` does not allow.

    A subclass with rules of its own calls super first.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            given, (least, below) = getattr(self, field.name), field.metadata["bounds"]
            if field.metadata["distinct"] and len(set(given)) < len(given):
                raise ValueError(f"--{field.name.replace('_', '-')} {','.join(map(str, given))}: one of them "
                                 "stands there twice")
            if (least, below) == (-math.inf, math.inf):
                continue
            for value in given if isinstance(given, tuple) else (given,):
                if not isinstance(value, (int, float)) or least <= value < below:
                    continue
                whole = isinstance(value, int)
                rule = (f"from {least:,} to {below - 1:,}" if whole and below < math.inf else
                        f"{least:,} or more" if whole else
                        f"at least {least:,} and below {below:,}" if below < math.inf else
                        f"a finite number of at least {least:,}")
                raise ValueError(f"--{field.name.replace('_', '-')} {value} must be {rule}")


def parse(cls, argv=None, description=None):
    """Build the dataclass `cls` from the command line (`sys.argv` by default).

    A bool becomes --x / --no-x, and a tuple takes comma-separated items, or "none". Unknown options, invalid
    values and whatever the dataclass itself refuses (ValueError) exit with status 2 and one line on stderr.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda said: parser.exit(  # in one line, without the usage
        2, f"{parser.prog}: {' '.join(said.split())}; see {parser.prog} --help\n")
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, default, help = types[field.name], field.default, field.metadata["help"]
        if help is None:
            continue
        if default not in ("", None, ()):  # of those, the help itself says what happens
            help += f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        else:
            how = dict(type=_converter(kind), choices=field.metadata["choices"])
        parser.add_argument("--" + field.name.replace("_", "-"), default=default,
                            help=help.replace("%", "%%"), **how)
    values = vars(parser.parse_args(argv))
    try:
        return cls(**values)
    except (ValueError, OverflowError) as error:
        parser.error(str(error))


def _converter(kind):
    """What makes a value of a word: int, float, str, int | str, or a tuple of one of them.

    A kind that may be None takes "none" for it; of a tuple that is the empty one.
    """
    if type(None) in typing.get_args(kind):
        given = _converter(kind := typing.get_args(kind)[0])
        if typing.get_origin(kind) is not tuple:
            def unless_none(word):
                return None if word == "none" else given(word)
            unless_none.__name__ = kind.__name__  # for the errors of argparse
            return unless_none
    if kind == int | str:
        return lambda word: int(word) if word.isdecimal() else word
    if typing.get_origin(kind) is not tuple:
        return kind
    item = typing.get_args(kind)[0]

    def items(word):
        return tuple(item(part) for part in word.split(",") if part) if word != "none" else ()
    items.__name__ = f"comma-separated {item.__name__}"  # for the errors of argparse
    return items


def stage(function, cls, description, argv=None, words=None):
    """Parse the options, run `function(options)`, print `words` of its result, and return that result.

    Errors print one line on stderr. Invalid options exit with status 2; ValueError, OSError and running out
    of memory, of the machine or of a GPU, with 1; an interrupt with 130. Anything else is a defect of this
    program and keeps its traceback.
    """
    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = function(parse(cls, argv, description))
        if words and result is not None and rank() == 0:
            print(words(result), flush=True)
        return result
    except KeyboardInterrupt as interrupt:
        print("; ".join([f"{name}: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of stdout, such as head, has gone; Python would still flush to it
        os._exit(1)
    except (ValueError, OverflowError, OSError) as error:
        text = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        said = ". ".join(str(error).split(". ")[:2])  # the rest is about torch's allocator
        text = (f"out of memory ({said or 'MemoryError'}); compute fewer images at once with --batch-device "
                "(training), or take fewer or smaller images")
    sys.exit(f"{name}: {' '.join(text.split())}")


def size():
    """How many processes torchrun started, 1 without it."""
    return max(1, _environment("WORLD_SIZE"))


def rank():
    """Which of them this is, from 0. Without torchrun, a RANK left in the environment is ignored."""
    return _environment("RANK") if size() > 1 else 0


def _environment(variable):
    word = os.environ.get(variable) or "0"
    if not word.isdecimal():
        raise ValueError(f"{variable}={word} in the environment is no number; unset it, or use torchrun")
    return int(word)


def narrowed(options, cls, **changed):
    """The options of the dataclass `cls` among `options`, which have more, with some of them `changed`."""
    return cls(**{f.name: getattr(options, f.name) for f in dataclasses.fields(cls)} | changed)


def recorded(options):
    """The options that decide the result, as read back from JSON: a file stores and `claim` compares them."""
    return json.loads(json.dumps({f.name: getattr(options, f.name) for f in dataclasses.fields(options)
                                  if f.metadata.get("recorded", True)}))


def defaults(cls):
    """The default of each option of a dataclass, as read back from JSON."""
    return json.loads(json.dumps({f.name: f.default for f in dataclasses.fields(cls)}))


@functools.lru_cache
def say(text):
    """Print a line on stderr, once a process; under torchrun only rank 0 prints."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def interruptible():
    """Within, only note SIGINT and SIGTERM, for `interrupted` to tell; a second signal acts at once."""
    def note(number, frame):
        _signals.append(number)
        signal.signal(number, previous[number])
        os.write(2, b"stopping once the state is saved; the same signal again ends it at once\n")

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
