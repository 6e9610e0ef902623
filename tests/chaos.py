"""Kill, damage and mislead the stages, and count what survives.

    python tests/chaos.py                     the long form, `make chaos`: figures for docs/reliability.md
    pytest tests/test_chaos.py                a short form of each

Stages run in forks of this process, which imports torch once and computes nothing itself, so that a kill
costs a fraction of a second. They are the scripts' own functions with command-line words, on a tiny network
and digits.
"""
import contextlib
import hashlib
import io
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork must not inherit threads that do not exist in it
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import numpy as np
import torch

import bad_input
import checkpoint
import disk
import emm
import images
import inputs
import memorize
import plot
import run
import sample
import train
from paper import compare, experiments, report
from run import option

STAGES = dict(train=(train.train, train.Options), sample=(sample.sample, sample.Options),
              memorize=(memorize.memorize, memorize.Options), emm=(emm.find, emm.Options))
SCRIPTS = STAGES | dict(compare=(compare.compare, compare.Options), plot=(plot.plot, plot.Options),
                        report=(report.report, report.Options),
                        experiments=(experiments.experiment, experiments.Options))
NETWORK = ("--data digits --width 4 --blocks 1 --channel-mult 1,1 --batch 8 --warmup-steps 2 "
           "--learning-rate 2e-3 --device cpu")
# The stages that each needs first, and its words; DIR is its directory. save-seconds 0: a state every step
WORK = dict(
    train=([], f"{NETWORK} --n 16 --steps 20 --snapshots 4 --log-steps 5 --save-seconds 0 --out DIR/run"),
    sample=(["train"], "--run DIR/run --seeds 0-99 --sample-steps 6 --device cpu"),
    memorize=(["train", "sample"], "--samples DIR/run --train DIR/run --csv DIR/run/every.csv "
                                   "--pairs DIR/run/pairs.png --device cpu"),
    emm=([], f"{NETWORK} --steps 8 --snapshots 2 --save-seconds 0 --sizes 4,6 --sample-count 64 --full "
             "--out DIR/emm"))
# What each ends with
RESULTS = dict(train="run/model.safetensors", sample="run/samples.npz", memorize="run/memorize.json",
               emm="emm/emm.json")
# Differ from run to run
TIMES = ("started", "seconds", "training_seconds", "sampling_seconds", "images_per_second", "memory_mb")


@dataclass(frozen=True)
class Options:
    kills: int = option(320, "SIGKILLs, a quarter at each of train, sample, memorize and emm")
    damages: int = option(400, "files to damage")
    fuzz: int = option(20_000, "random command lines and files")
    seed: int = option(0, "of it all")


def words(stage, folder):
    return [word.replace("DIR", str(folder)) for word in WORK[stage][1].split()]


def fork(stage, argv, output):
    """Start `stage` with these words in a fork whose output goes to a file; returns its process number."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv[0] = f"{stage}.py"
        try:
            run.stage(*SCRIPTS[stage], "", argv)
            status = 0
        except SystemExit as end:
            status = end.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def call(stage, argv, folder):
    """Run `stage` to its end in a fork; returns its exit status, its output, and its peak memory in MB."""
    output = Path(folder) / ".output"
    _, status, usage = os.wait4(fork(stage, argv, output), 0)
    return os.waitstatus_to_exitcode(status), output.read_text(errors="replace"), usage.ru_maxrss // 1024


def must(stage, argv, folder):
    status, text, _ = call(stage, argv, folder)
    assert status == 0, text


def prepared(stage, folder):
    """Make in `folder` what `stage` needs."""
    folder.mkdir(parents=True)
    for before in WORK[stage][0]:
        must(before, words(before, folder), folder)
    return folder


def content(path):
    """What a file says, without times: equal for equal runs.

    Raises ValueError, or a library's error, if it is not whole.
    """
    if path.suffix == ".json":
        return without_times(disk.read_json(path))
    if path.suffix == ".jsonl":
        return without_times(disk.read_log(path))
    if path.suffix == ".safetensors":
        found, about = checkpoint.read(path)
        return checkpoint.digest(found, without_times(about))
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {key: hashlib.sha256(file[key]).hexdigest() for key in file.files}
    if path.suffix == ".png":
        from PIL import Image
        with Image.open(path) as picture:
            picture.load()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(v) for key, v in value.items() if key not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def contents(folder):
    """Every file of a directory but locks and what is half-written, with its content."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")}


def lasting(stage, found):
    """Of files, those that must be there ever after: finished snapshots, results, scores of snapshots."""
    if stage == "emm":
        return {(name, step, score["count"]) for name, value in found.items() if name.endswith("scores.json")
                for step, score in value["snapshots"].items()}
    return {(name, str(value)) for name, value in found.items()
            if "snapshot-" in name or name.endswith(("model.safetensors", "samples.npz", "memorize.json"))}


def kill(stage, count, folder, rng):
    """SIGKILL `stage` `count` times at random moments, going on after each.

    Returns kills, files lost, ends, unequal ends, and temporary files left at the ends by stages that hold
    their directory. After each kill every file must be whole, and nothing finished may be gone; each end is
    compared with that of an uninterrupted run.
    """
    whole = prepared(stage, folder / "whole")
    start = time.perf_counter()
    must(stage, words(stage, whole), whole)
    usual = time.perf_counter() - start
    there = prepared(stage, folder / "ready")
    kills = lost = unequal = ends = left = 0
    work = folder / "whole2"  # of the same length, so that paths in files agree in it
    while kills < count:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(there, work)
        before = set()
        for attempt in itertools.count():
            pid = fork(stage, words(stage, work), work / ".output")
            # longer and longer: a stage without a state, once slower than usual, would never end
            deadline = time.perf_counter() + rng.uniform(0, (1.2 + 0.1 * attempt) * usual)
            while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.perf_counter() < deadline:
                time.sleep(0.001)
            if ended != (0, 0):
                assert ended[1] == 0, (work / ".output").read_text()
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            try:
                after = lasting(stage, contents(work))
                lost += len(before - after)
                before = after
            except Exception as error:  # a file that cannot be read
                print(f"{stage}: {error!r}")
                lost += 1
        ends += 1
        unequal += contents(work) != contents(whole)
        if stage in ("train", "emm"):
            left += sum(path.name not in (".lock", ".output") for path in work.rglob(".*"))
    return dict(kills=kills, lost=lost, ends=ends, unequal=unequal, left=left)


DAMAGES = ("truncated", "bit flipped", "emptied", "swapped")
BINARY = (".safetensors", ".npz")  # text may be edited by hand, and a bit flipped there is such an edit
# file of a finished or stopped run -> the stage that reads it next
VICTIMS = {"run/state.safetensors": "train", "run/config.json": "train", "run/log.jsonl": "train",
           "run/model.safetensors": "sample", "run/samples.npz": "memorize", "run/memorize.json": "memorize",
           "emm/n000004/scores.json": "emm", "emm/n000004/log.jsonl": "emm",
           "emm/n000004/config.json": "emm", "emm/config.json": "emm"}


def damage(path, kind, other, rng):
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        del data[rng.randrange(len(data)):]
    elif kind == "bit flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "emptied":
        data.clear()
    else:
        data = other.read_bytes()
    path.write_bytes(data)


def seeded(stage, folder, seed):
    """The words of `stage`, with another seed: all its files differ."""
    seeds = dict(sample=["--seeds", f"{seed}-99"], memorize=[])
    return words(stage, folder) + seeds.get(stage, ["--seed", str(seed)])


def damages(count, folder, rng):
    """Damage a file of a run and start the stage that reads it.

    Returns how often it was named, was made good, or changed nothing; `missed` are those that went into a
    result.
    """
    for name, seed in (("a", 0), ("b", 1)):  # b: whose files a's are swapped with
        home = folder / name
        home.mkdir(parents=True)
        for stage in ("train", "sample", "memorize", "emm"):
            must(stage, seeded(stage, home, seed), home)
        # and a training stopped at step 10 or a little later, with its state
        stopped = home / "stopped"
        stopped.mkdir()
        pid = fork("train", seeded("train", stopped, seed), stopped / ".output")
        while not (stopped / "run" / "snapshot-00000010.safetensors").exists():
            time.sleep(0.001)
        os.kill(pid, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == run.INTERRUPTED, (stopped / ".output").read_text()
    seen = dict(tried=0, named=0, restored=0, harmless=0, missed=0)
    for i in range(count):
        victim, kind = rng.choice(list(VICTIMS)), DAMAGES[i % len(DAMAGES)]
        while kind == "bit flipped" and not victim.endswith(BINARY):
            victim = rng.choice(list(VICTIMS))
        stage = VICTIMS[victim]
        source = "a/stopped" if stage == "train" else "a"
        work = folder / "a2"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder / source, work, ignore=shutil.ignore_patterns("stopped"))
        if stage != "train" and RESULTS[stage] != victim:
            (work / RESULTS[stage]).unlink()
        damage(work / victim, kind, folder / source.replace("a", "b", 1) / victim, rng)
        status, text, _ = call(stage, seeded(stage, work, 0), work)
        seen["tried"] += 1
        named = Path(victim).name in text or f"{(work / victim).parent} was made with other options" in text
        if status == 1 and named and text.count("\n") <= 1:
            seen["named"] += 1
        elif status == 0 and content(work / RESULTS[stage]) == content(folder / "a" / RESULTS[stage]):
            seen["restored" if Path(victim).name in text else "harmless"] += 1
        else:
            seen["missed"] += 1
            print(f"{victim} {kind}: status {status}, {text[-400:]}")
    return seen


def bad_inputs(folder):
    """Go through bad_input.py: the number of cases refused as they should be, and those that were not.

    Also the highest peak of memory, in MB beyond that of a process that refuses its command line at once.
    """
    must("train", [word for word in words("train", folder)], folder)
    base = call("train", ["--bogus"], folder)[2]
    refused, wrong, peak = 0, [], 0
    for stage, text, status, say in bad_input.cases(folder):
        ended, output, memory = call(stage, bad_input.filled(text, folder), folder)
        trouble = bad_input.problem(ended, output, status, say, folder)
        shutil.rmtree(folder / "out", ignore_errors=True)
        refused += not trouble
        peak = max(peak, memory - base)
        if trouble:
            wrong.append(f"{stage}.py {text}: {trouble}")
    return dict(refused=refused, wrong=wrong, peak_mb=peak)


def fuzz(count, folder, rng):
    """Random command lines to every stage's parser, and random damage to every reader's files.

    All in this process. A parser must give options or exit with 2; a reader must give images, tensors or a
    dict, or raise ValueError. Returns cases and those that ended otherwise.
    """
    made = list(bad_input.files(folder / "files")) and folder / "files"
    readers = [(images.read, made / path) for path in (
        "colour32/0.png", "flipped.zip", "labels.npz", "strange/dataset.json")]
    list(inputs.read(folder / "inputs"))
    readers += [(images.read, folder / "inputs" / name) for name in (
        "formats/1.WebP", "formats/2.bmp", "formats/4.tif", "gif/0.gif", "phone/a.jpg", "turned-PNG/6.png",
        "opaque/2.png", "fortran.npy", "keras.npz", "labels-one-hot/dataset.json",
        "mnist/train-images-idx3-ubyte.gz", "mnist/t10k-images-idx3-ubyte")]
    readers += [(checkpoint.read, folder / "run" / "model.safetensors"),
                (disk.metadata, folder / "run" / "model.safetensors"),
                (disk.read_log, folder / "run" / "log.jsonl"),
                (disk.read_json, folder / "run" / "config.json")]
    values = ["", "0", "-1", "nan", "1e999", "none", "1,2", ",", "x", "\0", "9" * 30, "%s", "é", "--", "-",
              "1/3", "random:", "0-9", "9-", "../..", "auto"]
    odd = []
    for i in range(count):
        if i % 2:
            stage, cls = rng.choice([(name, cls) for name, (_, cls) in SCRIPTS.items()])
            flags = ["--" + name.replace("_", "-") for name in cls.__dataclass_fields__]
            flags += ["--bogus", "--no-plan", "-x", "word"]
            argv = [rng.choice(flags + values) if rng.random() < 0.3 else word
                    for _ in range(rng.randrange(1, 5)) for word in (rng.choice(flags), rng.choice(values))]
            try:
                with contextlib.redirect_stderr(io.StringIO()) as said, \
                        contextlib.redirect_stdout(io.StringIO()):
                    run.parse(cls, argv)
            except SystemExit as end:
                if end.code not in (0, 2) or said.getvalue().count("\n") > 1:
                    odd.append(f"{stage}.py {argv}: {end.code} {said.getvalue()}")
            except Exception as error:
                odd.append(f"{stage}.py {argv}: {error!r}")
            continue
        reader, path = rng.choice(readers)
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 1, 4, 32))):
            data[rng.randrange(len(data))] = rng.choice((0, 255, 127, rng.randrange(256)))
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)):]
        place = folder / "fuzz"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if path.name == "dataset.json":
            shutil.copy(made / "colour32" / "0.png", place)
        (place / path.name).write_bytes(data)
        try:
            whole = path.suffix.lower() in images.files.SUFFIXES or path.name == "dataset.json"
            reader(place if whole else place / path.name)
        except ValueError:
            pass
        except Exception as error:
            odd.append(f"{path.name}: {error!r}")
    return dict(cases=count, odd=odd)


def chaos(options):
    rng = random.Random(options.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for stage in STAGES:
            killed = kill(stage, -(-options.kills // len(STAGES)), folder / stage, rng)
            print(f"{stage}: {killed}", flush=True)
        print(f"damaged files: {damages(options.damages, folder / 'damaged', rng)}", flush=True)
        (folder / "bad").mkdir()
        print(f"bad input: {bad_inputs(folder / 'bad')}", flush=True)
        print(f"fuzz: {fuzz(options.fuzz, folder / 'bad', rng)}", flush=True)


if __name__ == "__main__":
    run.stage(chaos, Options, __doc__)
