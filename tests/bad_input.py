"""Bad options and bad files: each must end in one line on stderr that names it, and leave nothing behind.

`cases(folder)` makes the files and yields (stage, words, exit status, what the line must say); `OUT` in words
is a directory that must not be there afterwards. chaos.py goes through them, and measures their memory too.
"""
import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

import inputs

TRAIN = ("--data digits --n 8 --width 4 --blocks 1 --channel-mult 1,1 --batch 4 --steps 1 --device cpu "
         "--out OUT")
SEARCH = TRAIN.replace("--n 8 ", "")
BOMB = 2**28  # bytes that a small file unpacks to


# stage, exit status, words, and after the bar what the line must say. TRAIN, FILES, RUN and OUT: see `filled`
OPTIONS = """
train    2 TRAIN --learning-rate nan | learning-rate nan
train    2 TRAIN --learning-rate -1 | learning-rate -1
train    2 TRAIN --learning-rate inf | learning-rate inf
train    2 TRAIN --n -3 | --n -3
train    2 TRAIN --n 1e3 | 1e3
train    2 TRAIN --width x | 'x'
train    2 TRAIN --steps 0 | --steps 0
train    2 TRAIN --batch 0 | --batch 0
train    2 TRAIN --batch-device 3 | --batch-device 3
train    2 TRAIN --weight-decay -1 | weight-decay
train    2 TRAIN --ema-rate 1 | ema-rate 1
train    2 TRAIN --ema-rate nan | ema-rate nan
train    2 TRAIN --arch resnet | resnet
train    2 TRAIN --precond ddim | ddim
train    2 TRAIN --precision fp8 | fp8
train    2 TRAIN --labels some | some
train    2 TRAIN --labels random:0 | random:0
train    2 TRAIN --labels random:-1 | random:-1
train    2 TRAIN --labels clusters:0 | clusters:0
train    2 TRAIN --labels true:5 | true:5
train    2 TRAIN --labels unique:1.5 | unique:1.5
train    2 TRAIN --label-dropout 0.5 | --labels none has none
train    2 TRAIN --augment -0.1 | augment -0.1
train    2 TRAIN --augment 1 | augment 1
train    2 TRAIN --labels true --label-dropout 1 | label-dropout 1
train    1 TRAIN --labels clusters:99999999999 | clusters:99999999999
train    1 TRAIN --labels unique:0.001 | a label of their own
train    2 TRAIN --resolution -8 | --resolution -8
train    2 TRAIN --resolution 100000 | 100000
train    2 TRAIN --classes -1 | --classes -1
train    2 TRAIN --subset-seed -1 | subset-seed -1
train    2 TRAIN --subset-seed 5000000000 | 5000000000
train    2 TRAIN --snapshots 0 | snapshots 0
train    2 TRAIN --snapshots log:x | --snapshots log:x
train    2 TRAIN --snapshots log:0 | --snapshots log:0
train    2 TRAIN --snapshots -1 | --snapshots -1
train    2 TRAIN --snapshots 10001 | --snapshots 10001
train    2 TRAIN --snapshots log:2 --snapshot-images 5 | leave one of them out
train    2 TRAIN --validate -1 | --validate -1
train    1 TRAIN --validate 1790 | has 1789 images outside the training set
train    2 TRAIN --validate 1 --labels unique | leave one of them out
train    2 TRAIN --part 3/2 | --part '3/2'
train    2 TRAIN --part 1 | --part '1'
train    1 TRAIN --part 400/400 | digits has no images in part 400/400
train    2 TRAIN --repeat 1:0.1 | --repeat '1:0.1'
train    2 TRAIN --repeat 10 | --repeat '10'
train    2 TRAIN --repeat 10:nan | --repeat '10:nan'
train    1 TRAIN --repeat 10:0.01 | repeats 0 of 8 images
train    2 TRAIN --epochs -1 | epochs -1
train    2 TRAIN --channel-mult 1,x | 1,x
train    2 TRAIN --channel-mult | expected one argument
train    2 TRAIN --epochs 1e308 | epochs
train    2 TRAIN --steps 10^400 | steps
train    2 TRAIN --bogus 1 | --bogus
train    2 TRAIN --threads -1 | threads -1
train    2 TRAIN --seed -1 | --seed -1
train    1 TRAIN --n 2000 | 1797
train    1 TRAIN --classes 11 | 11
train    1 TRAIN --skip-connections 1,0 | skip_connections
train    1 TRAIN --skip-connections 2,2,2,2 | skip_connections
train    1 TRAIN --width 6 | width=6
train    1 TRAIN --width 0 | width=0
train    1 TRAIN --width 1000000 | width=1000000
train    1 TRAIN --blocks 0 | blocks=0
train    1 TRAIN --blocks 10000000 | blocks=10000000
train    1 TRAIN --width 8192 --blocks 100 | parameters
train    1 TRAIN --data digits --resolution 4096 | lower --resolution
train    1 TRAIN --channel-mult 1,1,1,1,1 | img_resolution=8
train    1 TRAIN --channel-mult 0 | channel_mult
train    1 TRAIN --attn-resolutions 3 | attn-resolutions
train    1 TRAIN --dropout 1 | dropout
train    1 TRAIN --dropout nan | dropout
train    1 TRAIN --device tpu | tpu
train    1 TRAIN --device cuda:99 | cuda:99
train    1 TRAIN --precision tf32 | tf32
train    1 TRAIN --sigma-skip 500,600 | skips all or none
train    1 TRAIN --data nowhere | nowhere
train    1 TRAIN --labels random:99999999999 | 99999999999
sample   2 --run RUN --device cpu --seeds 5-1 | 5-1
sample   2 --run RUN --device cpu --seeds x | 'x'
sample   2 --run RUN --device cpu --seeds 3,3 | 3,3
sample   2 --run RUN --device cpu --seeds 0-4294967295 | at most
sample   2 --run RUN --device cpu --sample-steps 0 | sample-steps 0
sample   2 --run RUN --device cpu --sigma-min nan | sigma
sample   2 --run RUN --device cpu --sigma-max 0 | sigma
sample   2 --run RUN --device cpu --churn -1 | --churn -1
sample   2 --run RUN --device cpu --churn 5 --sampler dpm-solver | is for heun and euler
sample   2 --run RUN --device cpu --guidance nan | --guidance nan
sample   2 --run RUN --device cpu --guidance 2 --sample-labels none | gives none
sample   2 --run RUN --device cpu --churn 1 --churn-min 5 --churn-max 1 | --churn-min 5
sample   1 --run RUN --device cpu --sigma-min 200 --sigma-max 300 --out OUT/x.npz | no noise level
sample   1 --run RUN/model.safetensors --device cpu --snapshot best-validation | within a run directory
sample   1 --run RUN --device cpu --guidance 2 --out OUT/x.npz | not given labels
sample   1 --run RUN --device cpu --snapshot best-validation | --validate
sample   2 --run RUN --device cpu --rho 0 | rho
sample   2 --run RUN --device cpu --out x.png | x.png
sample   2 --run RUN --device cpu --rho 0.001 | rho
sample   2 --run RUN --device cpu --sample-steps 99999999999999999999 | sample-steps
sample   1 --run nowhere --device cpu | nowhere
sample   1 --run RUN --label 3 --device cpu --out OUT/x.npz | --label 3
sample   2 --device cpu | --run
memorize 2 --samples digits --train digits --threshold 0 | threshold
memorize 2 --samples digits --train digits --threshold 1 | threshold
memorize 2 --samples digits --train digits --threshold 1/0 | threshold
memorize 2 --samples digits --train digits --threshold -1/3 | threshold
memorize 2 --samples digits --train digits --threshold nan | threshold
memorize 2 --samples digits --train digits --threshold 1e-9 | threshold
memorize 2 --samples digits | --train
memorize 2 --samples digits --train digits --neighbours 1 | --neighbours 1
memorize 2 --samples digits --train digits --mirror --quality | leave out --mirror
memorize 2 --samples digits --train digits --curve x.pdf | x.pdf
memorize 2 --sample-features FILES/other.npz | both
memorize 2 --sample-features FILES/other.npz --train-features FILES/other.npz --held-out rest | is of images
memorize 1 --samples digits --train digits --neighbours 5000 --device cpu | 5000 nearest of 1797
memorize 1 --samples digits --train digits --held-out rest --device cpu | the 1797 of the training set
memorize 1 --samples digits --train digits --n 9 --held-out FILES/colour32 --device cpu | [3, 32, 32]
memorize 1 --samples digits --train digits --n 4 --quality --device cpu | more than 5
memorize 1 --sample-features FILES/other.npz --train-features FILES/other.npz --device cpu | float64 [3]
memorize 1 --samples digits --train digits --n 1 --device cpu | second nearest
emm      2 TRAIN --eps 0 | eps
emm      2 TRAIN --alpha 2 | alpha
emm      2 TRAIN --tolerance 0 | tolerance
emm      2 TRAIN --n-min 1 | n-min
emm      2 TRAIN --sample-count 0 | sample-count
emm      2 TRAIN --train-seeds 1,1 | seeds
emm      2 TRAIN --guidance 2 | give --labels
emm      2 TRAIN --churn nan | --churn nan
emm      1 TRAIN --n-min 5000 | 5000
emm      1 TRAIN --sizes 1 | sizes
memorize 1 --samples digits --train FILES/colour32 --device cpu | [1, 8, 8]
train    2 TRAIN --mix-share 0.2 | give it as --mix
train    2 TRAIN --mix digits --mix-share 1.1 | --mix-share 1.1
train    1 TRAIN --mix digits:3 | other classes
train    1 TRAIN --mix FILES/colour32 | give --resolution
train    1 TRAIN --mix FILES/nowhere | no data at
train    1 TRAIN --data digits:12 | no class 12
compare  2 --sample-count 3 | --run
compare  1 --run FILES | not a run directory
report   1 --results FILES --out OUT.md | has no results
plot     2 --out a.png | give --emm
plot     1 --emm nowhere/emm.json | is no file
experiments 2 --seeds 0,x | 0,x
experiments 2 --name breadth | breadth
experiments 2 --seeds 0,0 | stands there twice
experiments 2 --seeds -1 | --seeds
"""


def options():
    """(stage, words, exit status, what the line must say) of command lines with a mistake."""
    for row in OPTIONS.strip().splitlines():
        command, say = row.rsplit(" | ", 1)
        stage, status, text = command.split(maxsplit=2)
        text = text.replace("TRAIN", TRAIN if stage == "train" else SEARCH).replace("10^400", "1" + "0" * 400)
        yield stage, text, int(status), say


def npy_header(text):
    text = text.encode() + b" " * 10 + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def raw_png(side, *chunks):
    """A grey PNG that says it is of that size, whatever its chunks hold."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = (b"IHDR", header), *chunks, (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(inputs.chunk(*each) for each in chunks)


def endless_tiff():
    """One of pages whose last is followed by the first."""
    tiff = bytearray(inputs.moving("TIFF"))
    first = last = int.from_bytes(tiff[4:8], "little")
    while True:
        link = last + 2 + 12 * int.from_bytes(tiff[last:last + 2], "little")
        if not any(tiff[link:link + 4]):
            break
        last = int.from_bytes(tiff[link:link + 4], "little")
    tiff[link:link + 4] = struct.pack("<I", first)
    return bytes(tiff)


def files(folder):
    """Make the files; yields (name, what the line must say) of those that cannot be read.

    What inputs.py has is not repeated: these are the hostile ones, and one of each kind of mistake.
    """
    good = inputs.file(np.zeros((32, 32, 3), np.uint8))
    inputs.put(folder, {f"colour32/{i}.png": good for i in range(3)})
    text = b"k\0\0" + zlib.compress(bytes(BOMB))
    bomb = raw_png(8, (b"zTXt", text), (b"IDAT", zlib.compress(bytes(72))))
    huge, large = (raw_png(side, (b"IDAT", b"")) for side in (60_000, 11_000))  # Pillow's error, its warning
    for name, content, say in (
            ("deep16.png", inputs.deep_png(1), "16 bits a channel"), ("torn.png", good[:40], "torn.png"),
            ("empty.png", b"", "empty.png"), ("huge.png", huge, "cannot be read"),
            ("wide.png", large, "at most 16,777,216 pixels"), ("text-bomb.png", bomb, "text-bomb.png"),
            ("endless.tif", endless_tiff(), "several pages")):
        inputs.put(folder / Path(name).stem, {name: content})
        yield Path(name).stem, say
    inputs.put(folder, {"nothing/.keep": ""})
    yield "nothing", "holds no images"
    cat = inputs.table_of(["0.png", "1.png"], ["cat", "dog"])
    for name, table, say in (("unlabelled", inputs.table_of(["0.png"], [1]), "1.png"),
                             ("strange", cat, "whole numbers"),
                             ("deep-json", "[" * 100_000, "RecursionError")):
        inputs.put(folder / name, {"0.png": good, "1.png": good, "dataset.json": table})
        yield name, say

    deflated = zipfile.ZIP_DEFLATED
    for name, members, say in (
            ("none.zip", {"readme.txt": "hello"}, "holds no images"),
            ("bomb.zip", {"a.png": bytes(BOMB)}, "at most 67,108,864 are read"),
            ("json-bomb.zip", {"a.png": good, "dataset.json": b" " * BOMB}, "at most 67,108,864 are read"),
            ("bad-json.zip", {"a.png": good, "dataset.json": b"\xff\xfe{"}, "every image a label")):
        inputs.packed(folder / name, members, deflated)
        yield name, say
    content = inputs.packed(folder / "lying.zip", {"a.png": bytes(BOMB)}, deflated).read_bytes()
    inputs.put(folder, {"lying.zip": content.replace(struct.pack("<I", BOMB), struct.pack("<I", 10))})
    yield "lying.zip", "lying.zip"
    content = bytearray(inputs.packed(folder / "flipped.zip", {"a.png": good}).read_bytes())
    content[60] ^= 255
    inputs.put(folder, {"flipped.zip": bytes(content), "torn.zip": b"PK\x03\x04 not a zip"})
    yield "flipped.zip", "flipped.zip"
    yield "torn.zip", "not a readable zip"

    pixels = np.zeros((4, 8, 8, 1), np.uint8)
    for name, arrays, say in (
            ("float", dict(arr_0=np.zeros(pixels.shape)), "float64"),
            ("other", dict(x=np.zeros(3)), "float64 [3]"),
            ("labels", dict(arr_0=pixels, labels=np.zeros(3, np.int64)), "labels"),
            ("records", dict(arr_0=pixels, labels=np.zeros((4, 2), "i4,i4")), "labels"),
            ("pickled", dict(arr_0=np.array([dict(a=1)], dtype=object)), "of plain numbers"),
            ("oblong", dict(arr_0=pixels[:, :, :6]), "6x8")):
        np.savez(folder / f"{name}.npz", **arrays)
        yield f"{name}.npz", say
    claim = npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000, 1000, 3)}")
    for name, content in (("claims", claim + bytes(9)), ("code", npy_header("__import__('os').abort()")),
                          ("long", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(9))):
        inputs.packed(folder / f"{name}.npz", {"arr_0.npy": content})
        yield f"{name}.npz", "cannot be read as an npz"


def cases(folder):
    """Yield (stage, words, exit status, what its line must say) of all, whose files it makes in `folder`."""
    broken = list(files(folder / "files"))
    yield from options()
    any_data = TRAIN.replace("--n 8", "").replace("--data digits", "")
    for name, say in broken:
        yield "train", f"{any_data} --data FILES/{name}", 1, say
    if os.getuid():  # root may read everything
        path = folder / "files" / "locked"
        shutil.copytree(folder / "files" / "colour32", path)
        os.chmod(path / "0.png", 0)
        yield "train", f"{TRAIN} --data FILES/locked", 1, "0.png"


def filled(text, folder):
    for name, path in (("OUT", "out"), ("FILES", "files"), ("RUN", "run")):
        text = text.replace(name, str(folder / path))
    return text.split()


def problem(status, text, wanted, say, folder):
    """What is wrong with how a case ended, "" if nothing is."""
    if status != wanted:
        return f"status {status} instead of {wanted}: {text[-500:]}"
    if text.count("\n") != 1 or "Traceback" in text:
        return f"not one line: {text[-500:]}"
    if say not in text:
        return f"does not say {say!r}: {text}"
    if Path(folder / "out").exists():
        return "something was written"
    return ""
