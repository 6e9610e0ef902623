"""Whole files, run directories, logs and provenance."""
import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import disk
import run
from conftest import ROOT


@dataclass(frozen=True)
class Options:
    width: int = run.option(128, "channels")
    mult: tuple[int, ...] = run.option((2, 2), "multipliers")
    out: str = run.option("runs", "where", recorded=False)


def test_publish_is_whole_or_nothing(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with disk.whole_file(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError), disk.whole_file(path) as temporary:
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
    with pytest.raises(OSError) as raised, disk.whole_file(path) as temporary:
        temporary.write_text("new")
        if step == "write":
            fail()
    monkeypatch.undo()
    assert raised.value.errno == number
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]
    disk.write_json(path, dict(a=1))
    assert disk.read_json(path) == dict(a=1) and os.listdir(tmp_path) == ["file.txt"]


def test_a_link_stays_and_what_is_no_regular_file_is_written_into(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file.txt")
    for text in ("new", "newer"):
        with disk.whole_file(tmp_path / "link") as temporary:
            temporary.write_text(text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file.txt").read_text() == text
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    for place in (tmp_path / "pipe", os.devnull):
        with disk.whole_file(place) as temporary:
            temporary.write_text("new")
    assert reader.communicate(timeout=60)[0] == "new" and not os.path.isfile(os.devnull)
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]


def test_json_may_be_edited_by_hand(tmp_path):
    path = tmp_path / "a.json"
    disk.write_json(path, dict(ratio=0.5, sizes={3: 1}))
    assert disk.read_json(path) == dict(ratio=0.5, sizes={"3": 1})
    path.write_text(path.read_text().replace("0.5", "0.6"))
    assert disk.read_json(path) == dict(ratio=0.6, sizes={"3": 1})


@pytest.mark.parametrize("text, words", [("", "is not valid JSON"), ("{", "is not valid JSON"),
                                         (b"\xff", "is not valid JSON"), ("[" * 10**5, "is not valid JSON"),
                                         ("[1]", "is not valid JSON, or no object")])
def test_damaged_json_is_named_in_a_line(text, words, tmp_path):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"config.json {words}") as raised:
        with disk.claim(tmp_path, {}):
            pass
    assert "\n" not in str(raised.value)


def test_claim_names_each_difference(tmp_path):
    out = tmp_path / "run"
    record = dict(options=run.recorded(Options()), data=dict(sha256="ab"))
    with disk.claim(out, record):
        pass
    for name in ("config.json", "log.jsonl", "snapshot-00000004.safetensors", "samples.npz"):
        left = f"import disk, os\nwith disk.whole_file('{name}') as t: t.write_text('half'); os._exit(1)"
        subprocess.run([sys.executable, "-c", left], cwd=out, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    (out / ".tmpAbCd12").write_text("of safetensors, left by a killed process")
    assert len(os.listdir(out)) == 7
    with disk.claim(out, record):
        pass
    # what other processes write there may be in the making
    lock, left, config = sorted(os.listdir(out))
    assert (lock, config) == (".lock", "config.json") and re.fullmatch(r"\.part\d+-samples.npz", left)
    assert "out" not in json.loads((out / "config.json").read_text())["options"]
    other = dict(options=run.recorded(Options(width=8, mult=(1,))), data=dict(sha256="cd"))
    said = r"mult: \[2, 2\] there, \[1\] asked; width: 128 there, 8 asked; sha256: ab there"
    with pytest.raises(ValueError, match=said):
        with disk.claim(out, other):
            pass


def test_runs_outlive_new_options(tmp_path):
    old = dict(options={"width": 8}, data={})
    with disk.claim(tmp_path / "run", old):
        pass
    with disk.claim(tmp_path / "run", dict(options={"width": 8, "rate": 1.0}, data={}), {"rate": 1.0}):
        pass
    with pytest.raises(ValueError, match="rate: 1.0 there, 2.0 asked"):
        with disk.claim(tmp_path / "run", dict(options={"width": 8, "rate": 2.0}, data={}), {"rate": 1.0}):
            pass


def test_claim_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / ".thesis.pdf.part").write_text("somebody else's download")
    with pytest.raises(ValueError, match="not empty"):
        with disk.claim(tmp_path, {}):
            pass
    assert sorted(os.listdir(tmp_path)) == [".thesis.pdf.part", "thesis.tex"]


def test_a_directory_is_held_by_one_process(tmp_path):
    code = (f"import disk; hold = disk.claim({str(tmp_path)!r}, dict(options={{}})); hold.__enter__(); "
            "print('held', flush=True)")
    start = [sys.executable, "-c", code + "; input()"]
    other = subprocess.Popen(start, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="in use by another process; wait for it, or choose another --out"):
        with disk.claim(tmp_path, dict(options={})):
            pass
    other.kill()  # a lock ends with its process
    other.wait()
    with disk.claim(tmp_path, dict(options={})):
        again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert "in use" in again.stderr
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_file_systems_without_locks(tmp_path, monkeypatch, capsys):
    def flock(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(disk.fcntl, "flock", flock)
    with disk.claim(tmp_path / "run", dict(options=dict(width=8))):
        pass
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{tmp_path / 'run'} cannot be locked" in said


def test_log_drops_what_will_be_made_again(tmp_path):
    path = tmp_path / "log.jsonl"
    log = disk.Log(path)
    for step in (1, 2, 3):
        log.write(step=step)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert [line["step"] for line in disk.read_log(path)] == [1, 2, 3]
    disk.Log(path, step=2).write(step=3, again=True)
    assert disk.read_log(path) == [dict(step=1), dict(step=2), dict(step=3, again=True)]


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "[2]", "{}", '{"step": "2"}', "\xff"])
def test_a_damaged_line_of_the_log_is_named(line, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 of .*log.jsonl is damaged; remove that line"):
        disk.read_log(path)


def test_provenance_names_the_machine():
    about = disk.provenance("cpu")
    assert about["device"] == "cpu" and about["versions"]["torch"] and about["host"]


def test_an_earlier_result_is_the_same_or_refused(tmp_path):
    path, about = tmp_path / "result.json", dict(options=dict(width=8), source=dict(x_sha256="a" * 64))
    assert disk.earlier(path, about, {}) == {}
    disk.write_json(path, about | dict(ratio=0.5))
    assert disk.earlier(path, about, dict(later=1))["ratio"] == 0.5
    for other in (dict(options=dict(width=9)), dict(source=dict(x_sha256="b" * 64))):
        with pytest.raises(ValueError, match="result.json was made with other options or data .* asked"):
            disk.earlier(path, about | other, {})
    with pytest.raises(ValueError, match="is a directory; give a file"):
        disk.earlier(tmp_path, about, {})
