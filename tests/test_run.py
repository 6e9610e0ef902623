import contextlib
import io
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import run
from conftest import ROOT


@dataclass(frozen=True)
class Options:
    width: int = run.option(128, "channels, 100% of them")
    rate: float = run.option(2e-4, "rate")
    mult: tuple[int, ...] = run.option((2, 2), "multipliers")
    mask: tuple[int, ...] | None = run.option(None, "mask")
    seed: int | None = run.option(None, "seed")
    arch: str = run.option("a", "network", ("a", "b"))
    shuffle: bool = run.option(False, "shuffle")
    out: str = run.option("runs", "where", recorded=False)
    note: str = run.option("", "a note", recorded=False)
    inner: int = run.option(7, None)


def test_parse_defaults_and_words():
    assert run.parse(Options, []) == Options()
    words = "--width 8 --rate 1e-3 --mult 1,2,2 --mask 1,0 --seed 3 --arch b --shuffle --out x".split()
    assert run.parse(Options, words) == Options(8, 1e-3, (1, 2, 2), (1, 0), 3, "b", True, "x")
    assert run.parse(Options, ["--mask", "none", "--no-shuffle"]) == Options(mask=())


@pytest.mark.parametrize("words", ["--width x", "--mult 1,x", "--arch c", "--wid 8", "--inner 3", "--rate"])
def test_parse_refuses(words, capsys):
    with pytest.raises(SystemExit) as exit:
        run.parse(Options, words.split())
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(
    st.sampled_from(["--width", "--rate", "--mult", "--mask", "--seed", "--arch", "--shuffle", "--out",
                     "--inner"]),
    st.text(max_size=8), st.integers().map(str), st.floats().map(str))))
def test_parse_gives_options_or_one_line(words):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            assert isinstance(run.parse(Options, words), Options)
        except SystemExit as exit:
            assert exit.code in (0, 2)
    assert len(said.getvalue().splitlines()) <= 1


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        run.parse(Options, ["--help"], "About.\n    kept as it is")
    text = capsys.readouterr().out
    assert "100% of them" in text and "    kept as it is" in text
    assert "default: 2,2" in text and "default: False" in text and "default: )" not in text
    assert "--inner" not in text


@pytest.mark.parametrize("error, status", [(ValueError("n=3 is odd;\nuse 4"), 1),
                                           (FileNotFoundError("no file"), 1),
                                           (KeyboardInterrupt("saved"), 130)])
def test_stage_reports_in_one_line(error, status, capsys):
    def fail(options):
        raise error
    with pytest.raises(SystemExit) as exit:
        run.stage(fail, Options, "About.", [])
    message = capsys.readouterr().err if status == 130 else exit.value.code + "\n"
    # a string: status 1
    assert exit.value.code == status if status == 130 else isinstance(exit.value.code, str)
    assert message.count("\n") == 1 and str(error).split()[-1] in message


@pytest.mark.parametrize("error", [
    KeyError("x"), RuntimeError("shapes differ"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`")])
def test_stage_keeps_the_traceback_of_defects(error):
    def fail(options):
        raise error
    with pytest.raises(type(error)):
        run.stage(fail, Options, "About.", [])


CUDA = ("CUDA out of memory. Tried to allocate 20.00 MiB. "
        "GPU 0 has a total capacity of 79.19 GiB of which 9.00 MiB is free. "
        "If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True")


@pytest.mark.parametrize("fail, says", [
    (lambda: raising(RuntimeError(CUDA)),
     "out of memory (CUDA out of memory. Tried to allocate 20.00 MiB); "),
    (lambda: raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED "
                                  "when calling `cublasCreate(handle)`")),
     "out of memory (CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`); "),
    (lambda: raising(MemoryError()), "out of memory (MemoryError); "),
    (lambda: torch.empty(2**50, dtype=torch.uint8), "DefaultCPUAllocator"),
    (lambda: np.empty(2**50, np.uint8), "out of memory (Unable to allocate 1.00 PiB")])
def test_out_of_memory_says_what_to_lower(fail, says):
    with pytest.raises(SystemExit) as exit:
        run.stage(lambda options: fail(), Options, "About.", [])
    text = exit.value.code
    assert says in text and "compute fewer images at once with --batch-device" in text and "\n" not in text


def raising(error):
    raise error


STAGE = """
import dataclasses, run, time
@dataclasses.dataclass(frozen=True)
class Options:
    pass
run.stage(lambda options: time.sleep(0.2) or "result", Options, "", [], words="wrote {}".format)
"""


@pytest.mark.parametrize("given, command, status, said", [
    ({}, '"$PYTHON" -c "$STAGE"', 0, ""),
    ({}, '("$PYTHON" -c "$STAGE"; echo $? >status) | true', 1, ""),
    (dict(WORLD_SIZE="x"), '"$PYTHON" -c "$STAGE"', 1, "-c: WORLD_SIZE=x in the environment is no number; "),
    (dict(WORLD_SIZE="2", RANK="y"), '"$PYTHON" -c "$STAGE"', 1, "-c: RANK=y in the environment is no")])
def test_a_reader_that_goes_or_a_wrong_environment_is_no_traceback(given, command, status, said, tmp_path):
    given = os.environ | dict(STAGE=STAGE, PYTHON=sys.executable, PYTHONPATH=str(ROOT)) | given
    done = subprocess.run(["sh", "-c", command if "status" in command else f"{command}; echo $? >status"],
                          cwd=tmp_path, capture_output=True, text=True, env=given)
    assert (tmp_path / "status").read_text() == f"{status}\n"
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_ranks(monkeypatch):
    for variables, rank, size in (
            (dict(), 0, 1), (dict(RANK="1"), 0, 1), (dict(RANK="", WORLD_SIZE=""), 0, 1),
            (dict(RANK="1", WORLD_SIZE="2"), 1, 2), (dict(RANK="x"), 0, 1)):
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert (run.rank(), run.size()) == (rank, size)


def test_an_older_python_is_named():
    code = "import sys; sys.version_info = (3, 10, 14, 'final', 0); import run"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("Python 3.11 or newer is needed")


def test_interruptible_notes_the_first_signal_only():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
    with run.interruptible():
        assert not run.interrupted()
        signal.raise_signal(signal.SIGINT)  # in this thread, at once
        assert run.interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not run.interrupted()


@dataclass(frozen=True)
class Bounds(run.Checked):
    count: int = run.option(1, "", least=1, below=5)
    more: int | None = run.option(None, "", least=2)
    share: float = run.option(0.5, "", least=0, below=1)
    rate: float = run.option(0.1, "", least=0)
    free: float = run.option(0.0, "")
    seeds: tuple[int, ...] = run.option((), "", least=0, below=2**32, distinct=True)


@pytest.mark.parametrize("given, said", [
    (dict(count=5), "--count 5 must be from 1 to 4"), (dict(more=1), "--more 1 must be 2 or more"),
    (dict(share=1.0), "--share 1.0 must be at least 0 and below 1"),
    (dict(rate=math.inf), "--rate inf must be a finite number of at least 0"),
    (dict(rate=math.nan), "--rate nan must be a finite number of at least 0"),
    (dict(seeds=(0, -1)), "--seeds -1 must be from 0 to 4,294,967,295"),
    (dict(seeds=(3, 4, 3)), "--seeds 3,4,3: one of them stands there twice")])
def test_bounds_are_those_of_the_option(given, said):
    with pytest.raises(ValueError, match=said):
        Bounds(**given)
    Bounds(count=4, more=2, share=0.0, free=math.inf, seeds=(0, 2**32 - 1))
