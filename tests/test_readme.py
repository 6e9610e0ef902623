"""README and docs: commands that parse, links that lead somewhere, and a picture that says what `ls` says."""
import importlib
import re
import shlex
import subprocess

import pytest

import run
from conftest import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MOST_LINES, MOST_BYTES = 150, 11_000  # of a README that is read in one sitting


def commands(page):
    """The command lines of a page, continued ones joined: its sh blocks, and what README names in passing."""
    text = page.read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`((?:make|python) [^`]+)`", text) if page == README else []
    return blocks + inline


def check(words):
    """Raise SystemExit or AssertionError unless its script, or the Makefile, takes the words of a command."""
    if words[0] == "torchrun":
        words = ["python", *words[words.index("--") + 1:]]
    if words[0] == "make":
        made = subprocess.run(["make", "-n", "-C", str(ROOT), "PYTHON=python", *words[1:]],
                              capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        for line in made.stdout.replace("\\\n", " ").splitlines():
            if re.match(r"python (-m paper\.)?\w+(\.py)? --", line):
                check(shlex.split(line.replace("$FLAGS", "").split(" > ")[0]))
    elif words[0] == "for":  # name in ...; do command; done
        check([word.rstrip(";") for word in words[words.index("do") + 1:-1]])
    elif words[0] == "python":
        name = words.pop(2) if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
        run.parse(importlib.import_module(name).Options, words[2:])
    else:
        assert words[:2] == ["git", "clone"], words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_parses(page):
    for line in commands(page):
        assert "..." not in line
        if words := shlex.split(line, comments=True):
            check(words)


@pytest.mark.parametrize("line", [
    "make emn", "make emm WDITH=256", "make emm FLAGS=--wdith 2", "python train.py --wdith 256",
    "python -m paper.experiments --name wdith", "torchrun --standalone -- train.py --wdith 256",
    "for f in a b; do python sample.py --rnu $f; done", "pip install torch"])
def test_commands_with_a_typing_error_are_found(line):
    with pytest.raises((SystemExit, AssertionError)):
        check(shlex.split(line))


def test_readme_has_commands_of_every_kind():
    found = " ".join(line.split()[0] + line.split()[1] for line in commands(README))
    for word in ("maketest", "makedemo", "makeemm", "pythontrain.py", "pythonsample.py", "pythonmemorize.py"):
        assert word in found


def test_readme_can_be_read_in_one_sitting():
    text = README.read_bytes()
    assert text.count(b"\n") <= MOST_LINES and len(text) <= MOST_BYTES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link.split("#")[0]).exists(), link


def test_the_picture_names_what_is_there():
    picture = re.search(r"## The house\n+```text\n(.*?)```", README.read_text(encoding="utf-8"), re.S)[1]
    named = set(re.findall(r"\w+\.py", picture))
    folders = set(re.findall(r"(?<![\w/])(\w+)/", picture))
    assert named == {path.name for path in ROOT.glob("*.py")}
    assert all((ROOT / folder).is_dir() for folder in folders)
    assert {path.parent.name for path in ROOT.glob("*/*.py")} <= folders
