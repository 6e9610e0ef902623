import contextlib
import errno
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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


def test_publish_is_whole_or_nothing(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with run.whole_file(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError), run.whole_file(path) as temporary:
        temporary.write_text("tw")
        raise RuntimeError
    assert path.read_text() == "one" and os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_publish_survives_a_failure_at_every_step(step, number, tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(*arguments, **named):
        raise OSError(number, os.strerror(number))
    if step != "write":
        owner, name = dict(fsync=(os, "fsync"), rename=(Path, "replace"))[step]
        monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError) as raised, run.whole_file(path) as temporary:
        temporary.write_text("new")
        if step == "write":
            fail()
    monkeypatch.undo()
    assert raised.value.errno == number
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]
    run.write_json(path, dict(a=1))
    assert run.read_json(path) == dict(a=1) and os.listdir(tmp_path) == ["file.txt"]


def test_a_link_stays_and_what_is_no_regular_file_is_written_into(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file.txt")
    for text in ("new", "newer"):
        with run.whole_file(tmp_path / "link") as temporary:
            temporary.write_text(text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file.txt").read_text() == text
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    for place in (tmp_path / "pipe", os.devnull):
        with run.whole_file(place) as temporary:
            temporary.write_text("new")
    assert reader.communicate(timeout=60)[0] == "new" and not os.path.isfile(os.devnull)
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]


def test_json_may_be_edited_by_hand(tmp_path):
    path = tmp_path / "a.json"
    run.write_json(path, dict(ratio=0.5, sizes={3: 1}))
    assert run.read_json(path) == dict(ratio=0.5, sizes={"3": 1})
    path.write_text(path.read_text().replace("0.5", "0.6"))
    assert run.read_json(path) == dict(ratio=0.6, sizes={"3": 1})


@pytest.mark.parametrize("text, words", [("", "is not valid JSON"), ("{", "is not valid JSON"),
                                         (b"\xff", "is not valid JSON"), ("[" * 10**5, "is not valid JSON"),
                                         ("[1]", "is not valid JSON, or no object")])
def test_damaged_json_is_named_in_a_line(text, words, tmp_path):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"config.json {words}") as raised:
        with run.claim(tmp_path, {}):
            pass
    assert "\n" not in str(raised.value)


def test_claim_names_each_difference(tmp_path):
    out = tmp_path / "run"
    record = dict(options=run.recorded(Options()), data=dict(sha256="ab"))
    with run.claim(out, record):
        pass
    for name in ("config.json", "log.jsonl", "snapshot-00000004.safetensors", "samples.npz"):
        left = f"import run, os\nwith run.whole_file('{name}') as t: t.write_text('half'); os._exit(1)"
        subprocess.run([sys.executable, "-c", left], cwd=out, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    (out / ".tmpAbCd12").write_text("of safetensors, left by a killed process")
    assert len(os.listdir(out)) == 7
    with run.claim(out, record):
        pass
    # what other processes write there may be in the making
    lock, left, config = sorted(os.listdir(out))
    assert (lock, config) == (".lock", "config.json") and re.fullmatch(r"\.part\d+-samples.npz", left)
    assert "out" not in json.loads((out / "config.json").read_text())["options"]
    other = dict(options=run.recorded(Options(width=8, mult=(1,))), data=dict(sha256="cd"))
    said = r"mult: \[2, 2\] there, \[1\] asked; width: 128 there, 8 asked; sha256: ab there"
    with pytest.raises(ValueError, match=said):
        with run.claim(out, other):
            pass


def test_runs_outlive_new_options(tmp_path):
    old = dict(options={"width": 8}, data={})
    with run.claim(tmp_path / "run", old):
        pass
    with run.claim(tmp_path / "run", dict(options={"width": 8, "rate": 1.0}, data={}), {"rate": 1.0}):
        pass
    with pytest.raises(ValueError, match="rate: 1.0 there, 2.0 asked"):
        with run.claim(tmp_path / "run", dict(options={"width": 8, "rate": 2.0}, data={}), {"rate": 1.0}):
            pass


def test_claim_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / ".thesis.pdf.part").write_text("somebody else's download")
    with pytest.raises(ValueError, match="not empty"):
        with run.claim(tmp_path, {}):
            pass
    assert sorted(os.listdir(tmp_path)) == [".thesis.pdf.part", "thesis.tex"]


def test_a_directory_is_held_by_one_process(tmp_path):
    code = (f"import run; hold = run.claim({str(tmp_path)!r}, dict(options={{}})); hold.__enter__(); "
            "print('held', flush=True)")
    start = [sys.executable, "-c", code + "; input()"]
    other = subprocess.Popen(start, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="in use by another process; wait for it, or choose another --out"):
        with run.claim(tmp_path, dict(options={})):
            pass
    other.kill()  # a lock ends with its process
    other.wait()
    with run.claim(tmp_path, dict(options={})):
        again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert "in use" in again.stderr
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_file_systems_without_locks(tmp_path, monkeypatch, capsys):
    def flock(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(run.fcntl, "flock", flock)
    with run.claim(tmp_path / "run", dict(options=dict(width=8))):
        pass
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{tmp_path / 'run'} cannot be locked" in said


def test_log_drops_what_will_be_made_again(tmp_path):
    path = tmp_path / "log.jsonl"
    log = run.Log(path)
    for step in (1, 2, 3):
        log.write(step=step)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert [line["step"] for line in run.read_log(path)] == [1, 2, 3]
    run.Log(path, step=2).write(step=3, again=True)
    assert run.read_log(path) == [dict(step=1), dict(step=2), dict(step=3, again=True)]


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "[2]", "{}", '{"step": "2"}', "\xff"])
def test_a_damaged_line_of_the_log_is_named(line, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 of .*log.jsonl is damaged; remove that line"):
        run.read_log(path)


def test_interruptible_notes_the_first_signal_only():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
    with run.interruptible():
        assert not run.interrupted()
        signal.raise_signal(signal.SIGINT)  # in this thread, at once
        assert run.interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not run.interrupted()


def test_provenance_names_the_machine():
    about = run.provenance("cpu")
    assert about["device"] == "cpu" and about["versions"]["torch"] and about["host"]


@dataclass(frozen=True)
class Bounds(run.Checked):
    count: int = run.option(1, "", least=1, below=5)
    more: int | None = run.option(None, "", least=2)
    share: float = run.option(0.5, "", least=0, below=1)
    rate: float = run.option(0.1, "", least=0)
    free: float = run.option(0.0, "")
    seeds: tuple[int, ...] = run.option((), "", least=0, below=2**32)


@pytest.mark.parametrize("given, said", [
    (dict(count=5), "--count 5 must be from 1 to 4"), (dict(more=1), "--more 1 must be 2 or more"),
    (dict(share=1.0), "--share 1.0 must be at least 0 and below 1"),
    (dict(rate=math.inf), "--rate inf must be a finite number of at least 0"),
    (dict(rate=math.nan), "--rate nan must be a finite number of at least 0"),
    (dict(seeds=(0, -1)), "--seeds -1 must be from 0 to 4,294,967,295")])
def test_bounds_are_those_of_the_option(given, said):
    with pytest.raises(ValueError, match=said):
        Bounds(**given)
    Bounds(count=4, more=2, share=0.0, free=math.inf, seeds=(0, 2**32 - 1))


def test_an_earlier_result_is_the_same_or_refused(tmp_path):
    path, about = tmp_path / "result.json", dict(options=dict(width=8), source=dict(x_sha256="a" * 64))
    assert run.earlier(path, about, {}) == {}
    run.write_json(path, about | dict(ratio=0.5))
    assert run.earlier(path, about, dict(later=1))["ratio"] == 0.5
    for other in (dict(options=dict(width=9)), dict(source=dict(x_sha256="b" * 64))):
        with pytest.raises(ValueError, match="result.json was made with other options or data .* asked"):
            run.earlier(path, about | other, {})
    with pytest.raises(ValueError, match="is a directory; give a file"):
        run.earlier(tmp_path, about, {})
