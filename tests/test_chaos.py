"""A short form of chaos.py: some kills, damages, bad and random inputs. `make chaos` is the long form."""
import json
import subprocess
import sys

import pytest

from conftest import ROOT

# in a process of its own, whose forks must not inherit threads
CODE = """
import sys; sys.path.insert(0, "tests")
import json, random, chaos, torch
from pathlib import Path
torch.set_num_threads(1)
folder, rng = Path(sys.argv[1]), random.Random(0)
print(json.dumps({}))
"""


def chaos(call, folder):
    command = [sys.executable, "-c", CODE.format(call), str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", ["train", "sample", "memorize", "emm"])
def test_kills_lose_nothing_and_change_nothing(stage, tmp_path):
    seen = chaos(f"chaos.kill({stage!r}, 4, folder / 'kill', rng)", tmp_path)
    assert seen["kills"] >= 4 and seen["ends"] >= 1, seen
    assert seen["lost"] == seen["unequal"] == seen["left"] == 0, seen


def test_damaged_files_are_named_or_made_good(tmp_path):
    seen = chaos("chaos.damages(24, folder / 'damage', rng)", tmp_path)
    assert seen["tried"] == 24 and seen["missed"] == 0 and seen["named"] > 8, seen


def test_bad_input_is_refused_in_a_line(tmp_path):
    seen = chaos("chaos.bad_inputs(folder)", tmp_path)
    assert not seen["wrong"] and seen["refused"] >= 100, "\n".join(seen["wrong"])
    assert seen["peak_mb"] < 512


def test_random_input_raises_nothing_else(tmp_path):
    seen = chaos("[chaos.must('train', chaos.words('train', folder), folder), "
                 "chaos.fuzz(500, folder, rng)][1]", tmp_path)
    assert not seen["odd"], "\n".join(seen["odd"])
