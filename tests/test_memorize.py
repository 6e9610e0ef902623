import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from scipy.stats import binomtest

import data
import disk
import kernels.nearest
import memorize
import sample
import search
from conftest import ROOT
from images import read
from measure import sides, which
from measure.neighbours import compared


def options(samples, train, **given):
    return memorize.Options(samples=str(samples), train=str(train), device="cpu", **given)


@given(st.integers(0, 2**39 - 1), st.integers(0, 2**39 - 1), st.integers(1, 2**12), st.integers(1, 2**12))
def test_verdict_is_exact(d1, d2, p, q):
    if p < q:
        verdict = kernels.nearest.is_memorized(torch.tensor([[d1, d2]]), (p, q))
        assert bool(verdict[0]) == (q * q * d1 < p * p * d2)  # Python's whole numbers do not overflow


def test_verdict_at_the_border():
    d = torch.tensor([[99, 900], [100, 900], [101, 900], [0, 0], [0, 1], [2**32 // 9, 2**32 - 1]])
    verdicts = kernels.nearest.is_memorized(d).tolist()
    assert verdicts == [True, False, False, False, True, 9 * (2**32 // 9) < 2**32 - 1]


@pytest.mark.parametrize("text, fraction", [("1/3", (1, 3)), ("0.5", (1, 2)), ("2/4", (1, 2)),
                                            ("0.333", (333, 1000))])
def test_thresholds(text, fraction):
    assert memorize.parse_threshold(text) == fraction


@pytest.mark.parametrize("text", ["0", "1", "4/3", "-1/3", "1/0", "x", "1/99999", "nan", "inf"])
def test_bad_thresholds(text):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        memorize.parse_threshold(text)


@pytest.mark.parametrize("hits, count", [(0, 10), (10, 10), (3, 7), (9000, 10000)])
def test_wilson_agrees_with_scipy(hits, count):
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert search.wilson(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def two_folders(tmp_path, write_images, noise):
    """Training images, and samples of which the first 6 all but repeat training images 0, 0, 1, 2, 3, 4."""
    train_images = noise(30, 8, 8, 3)
    samples = noise(10, 8, 8, 3, seed=1)
    samples[:6] = train_images[[0, 0, 1, 2, 3, 4]] ^ 1
    samples[5] = train_images[4]
    return write_images(tmp_path / "samples", samples), write_images(tmp_path / "train", train_images)


def test_two_folders_of_png_files(tmp_path, write_images, noise):
    samples, train = two_folders(tmp_path, write_images, noise)
    command = [sys.executable, str(ROOT / "memorize.py"), "--samples", samples, "--train", train,
               "--device", "cpu", "--out", tmp_path / "X.json",
               "--csv", tmp_path / "x.csv", "--pairs", tmp_path / "pairs.png"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "6 of 10 samples memorized: 60.00%" in result.stdout
    assert "5 of 30 training images copied" in result.stdout
    found = json.loads((tmp_path / "X.json").read_text())
    assert (found["samples"], found["memorized"], found["ratio"]) == (10, 6, 0.6)
    assert found["training_images"] == 30 and found["copied_training_images"] == 5
    assert found["pixel_exact_copies"] == 1 and found["duplicate_training_images"] == 0
    assert found["interval_95"] == pytest.approx(search.wilson(6, 10))
    with open(tmp_path / "x.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["memorized"] for row in rows] == ["1"] * 6 + ["0"] * 4
    assert rows[2]["sample"] == "0002.png" and rows[2]["nearest"] == "0001.png"
    assert float(rows[2]["distance"]) == pytest.approx(192**0.5, abs=1e-4)
    sheet = Image.open(tmp_path / "pairs.png")
    assert sheet.mode == "RGB" and len(sheet.getcolors(10**6)) > 100


def test_mean_distances(tmp_path, write_images, noise):
    samples, train = two_folders(tmp_path, write_images, noise)
    x, y = (read(str(f))[0].flatten(1).double() for f in (samples, train))
    nearest = torch.cdist(x, y).topk(2, largest=False).values.mean(0)
    found = memorize.memorize(options(samples, train))
    assert (found["mean_distance"], found["mean_second_distance"]) == pytest.approx(nearest.tolist())


def test_the_same_again_returns_and_another_is_refused(tmp_path, write_images, noise):
    samples, train = two_folders(tmp_path, write_images, noise)
    first = memorize.memorize(options(samples, train, out=str(tmp_path / "X.json")))
    again = memorize.memorize(options(samples, train, out=str(tmp_path / "X.json")))
    assert again == json.loads(json.dumps(first))
    memorize.memorize(options(f"{samples}/", f"{train}/", out=str(tmp_path / "X.json")))  # spelled otherwise
    with pytest.raises(ValueError, match="threshold: '1/3' there, '1/2' asked"):
        memorize.memorize(options(samples, train, out=str(tmp_path / "X.json"), threshold="1/2"))
    Image.fromarray(noise(8, 8, 3, seed=9)).save(samples / "0000.png")
    with pytest.raises(ValueError, match="samples_sha256"):
        memorize.memorize(options(samples, train, out=str(tmp_path / "X.json")))


def test_duplicates_in_the_training_set(tmp_path, write_images, noise):
    train_images = noise(20, 8, 8, 1)
    train_images[10:13] = train_images[0]
    train = write_images(tmp_path / "train", train_images)
    samples = write_images(tmp_path / "samples", train_images[[0, 5]])
    found = memorize.memorize(options(samples, train))
    assert (found["duplicate_training_images"], found["copies_of_duplicates"]) == (3, 1)
    assert found["memorized"] == 1
    assert "--distinct drops the repeats" in memorize.report(found)
    found = memorize.memorize(options(samples, train, distinct=True))
    assert (found["duplicate_training_images"], found["training_images"]) == (0, 17)
    assert found["memorized"] == 2


def test_optimum_is_memorized_and_held_out_images_are_not(tmp_path):
    npz = sample.sample(sample.Options(optimum=True, data="digits", n=200, seeds="0-499", device="cpu",
                                       out=str(tmp_path / "o.npz")))
    assert memorize.memorize(options(npz, "digits", n=200))["ratio"] >= 0.99
    D = data.load(data.Options(data="digits"))
    train, held_out = D.images[:200], D.images[200:]
    summary, *_ = memorize.score(held_out, train)
    assert summary["ratio"] <= 0.01


def test_optimum_and_held_out_on_real_cifar(tmp_path, cifar10k):
    npz = sample.sample(sample.Options(optimum=True, data=cifar10k, n=500, resolution=16, seeds="0-99",
                                       out=str(tmp_path / "o.npz"), device="cpu"))
    assert memorize.memorize(options(npz, cifar10k, n=500, resolution=16))["ratio"] >= 0.99
    D = data.load(data.Options(data=cifar10k))
    assert memorize.score(D.images[1000:2000], D.images[:1000])[0]["ratio"] <= 0.01


def test_run_directories(tmp_path):
    import train
    out = tmp_path / "run"
    train.train(train.Options(data="digits", n=20, width=4, blocks=1, channel_mult=(1, 1), batch=16, steps=2,
                              out=str(out), device="cpu"))
    with pytest.raises(ValueError, match="no samples yet; make them with: python sample.py --run"):
        memorize.memorize(options(out, out))
    sample.sample(sample.Options(run=str(out), seeds="0-4", device="cpu"))
    found = memorize.memorize(options(out, out))
    assert found["training_images"] == 20 and found["samples"] == 5
    assert disk.read_json(out / "memorize.json") == json.loads(json.dumps(found))
    with pytest.raises(ValueError, match="has its own n"):
        memorize.memorize(options(out, out, n=10))


def test_the_largest_samples_of_the_last_weights_are_taken(tmp_path):
    model = tmp_path / "model.safetensors"
    for name, size in (("samples-00000010.npz", 9), ("samples-0-4.npz", 5), ("samples-0-11.npz", 12)):
        np.savez(tmp_path / name, arr_0=np.zeros((size, 8, 8, 1), np.uint8), about="{}")
        # each before those that were there
        assert [file for _, file in sides.samples_of_run(tmp_path)] == [tmp_path / name]
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((7, 8, 8, 1), np.uint8), about="{}")
    assert sides.samples_of_run(tmp_path) == [(model, tmp_path / "samples-0-11.npz")]
    np.savez(tmp_path / "samples-00000005.npz", arr_0=np.zeros((7, 8, 8, 1), np.uint8), about="{}")
    assert [file.name for _, file in sides.samples_of_run(tmp_path, every=True)] == [
        "samples-00000005.npz", "samples-00000010.npz", "samples-0-11.npz"]


def test_the_result_comes_first_and_the_table_in_utf8_whatever_the_names(tmp_path, write_images, noise):
    samples, train = two_folders(tmp_path, write_images, noise)
    os.rename(os.fsencode(samples / "0001.png"), os.fsencode(samples) + b"/0001\xff\xc3\xa9.png")
    command = [sys.executable, str(ROOT / "memorize.py"), "--samples", samples, "--train", train,
               "--device", "cpu"]
    ascii_only = os.environ | dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    where = "--out", tmp_path / "a.json", "--csv", tmp_path / "a.csv"
    subprocess.run([*command, *where], env=ascii_only, check=True)
    subprocess.run([*command, "--out", tmp_path / "b.json", "--csv", tmp_path / "b.csv"], check=True)
    assert (tmp_path / "a.json").exists() and "0001\\udcff" in (tmp_path / "b.csv").read_text("utf-8")
    assert len((tmp_path / "a.csv").read_text("utf-8").splitlines()) == 11
    (tmp_path / "folder.csv").mkdir()
    where = "--out", tmp_path / "c.json", "--csv", tmp_path / "folder.csv"
    done = subprocess.run([*command, *where], capture_output=True, text=True)
    assert done.returncode == 1 and "folder.csv" in done.stderr and (tmp_path / "c.json").exists()


def test_outputs_that_are_no_regular_files(tmp_path, write_images, noise):
    samples, train = two_folders(tmp_path, write_images, noise)
    os.mkfifo(tmp_path / "pipe")
    read_all = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    found = memorize.memorize(options(samples, train, out=os.devnull, csv=str(tmp_path / "pipe")))
    assert found["memorized"] == 6 and len(read_all.communicate(timeout=60)[0].splitlines()) == 11
    assert not os.path.isfile(os.devnull) and not os.path.isfile(tmp_path / "pipe")


OLD_FIELDS = [
    "samples", "training_images", "memorized", "ratio", "interval_95", "threshold", "copied_training_images",
    "pixel_exact_copies", "copies_of_duplicates", "mean_distance", "mean_second_distance",
    "duplicate_training_images", "options", "source", "commit", "versions", "host", "machine", "processor",
    "device"]


def test_more_fields_for_who_asks_alone(tmp_path, write_images, noise):
    samples, train = two_folders(tmp_path, write_images, noise)
    held_out = noise(50, 8, 8, 3, seed=5)
    held_out[7] = noise(30, 8, 8, 3)[11]
    held_out = str(write_images(tmp_path / "held-out", held_out))
    out = str(tmp_path / "X.json")
    first = memorize.memorize(options(samples, train, out=out))
    assert list(first) == OLD_FIELDS and len(memorize.report(first).splitlines()) == 3
    more = memorize.memorize(options(
        samples, train, out=out, held_out=held_out, quality=True, spurious=True,
        curve=str(tmp_path / "curve.png"), which=str(tmp_path / "which.png")))
    assert {name: more[name] for name in OLD_FIELDS} == first
    assert set(more) == {*OLD_FIELDS, "held_out", "curve", "quality", "which", "spurious"}
    assert more["curve"]["samples"][40] == 0.6 and more["curve"]["held_out"][40] == 0.02
    assert more["held_out"]["names_in_training"] == ["0007.png"]
    words = memorize.report(more)
    for line in ("control: 1 of 50 held-out images would count as memorized, 2.00% (0.35% to 10.50%)",
                 "1 held-out images equal a training image, and count among the false positives: 0007.png;",
                 "5 training images copied, one of them 2 times", "0 samples spurious", "\nZ_U -",
                 "C_T: no cell holds enough samples", "held-out against training images: precision"):
        assert line in words
    for name in ("curve", "which"):
        assert len(Image.open(tmp_path / f"{name}.png").convert("RGB").getcolors(10**6)) > 50
    assert memorize.memorize(options(samples, train, out=out)) == json.loads(json.dumps(more))  # it all stays
    with pytest.raises(ValueError, match="mirror: False there, True asked"):
        memorize.memorize(options(samples, train, out=out, mirror=True))


def test_numbers_of_other_held_out_images_are_refused(tmp_path, write_images, noise):
    samples, train = two_folders(tmp_path, write_images, noise)
    held_out = [str(write_images(tmp_path / f"h{i}", noise(50, 8, 8, 3, seed=5 + i))) for i in range(2)]
    given = dict(out=str(tmp_path / "X.json"))
    memorize.memorize(options(samples, train, **given, held_out=held_out[0]))
    found = memorize.memorize(options(samples, train, **given, held_out=held_out[0], quality=True))
    for more in (dict(quality=True), dict(curve=str(tmp_path / "c.png")), {}):
        with pytest.raises(ValueError, match="X.json is of other held-out images; choose"):
            memorize.memorize(options(samples, train, **given, **more, held_out=held_out[1]))
    assert disk.read_json(tmp_path / "X.json") == json.loads(json.dumps(found))


def test_what_else_is_asked_follows_mirror(tmp_path, write_images, noise):
    x, y = noise(60, 8, 8, 3), noise(12, 8, 8, 3, seed=1)
    y[6] = y[1][:, ::-1]       # without mirroring far from all others
    x[:30] = y[np.arange(30) % 6][:, :, ::-1] ^ 1
    samples, train = write_images(tmp_path / "x", x), write_images(tmp_path / "y", y)
    held_out = write_images(tmp_path / "h", noise(40, 8, 8, 3))
    given = dict(which=str(tmp_path / "w.png"), held_out=str(held_out))
    plain, mirrored = (memorize.memorize(options(samples, train, mirror=mirror, **given))
                       for mirror in (False, True))
    assert (plain["which"]["copied"], mirrored["which"]["copied"]) == (1, 5)  # image 1 has a twin then
    own = compared(*[torch.from_numpy(y).permute(0, 3, 1, 2)] * 2, mirror=True)[0][:, 1]
    expected = which.rank_correlation(torch.tensor([5, 0, 5, 5, 5, 5] + [0] * 6), own)[0]
    assert mirrored["which"]["copies_nearest_correlation"] == pytest.approx(expected)


def test_spurious_samples(tmp_path, write_images, noise):
    train, x = noise(20, 8, 8), noise(9, 8, 8, seed=1)
    x[1], x[3], x[5] = x[0] ^ 1, train[2], train[2] ^ 1  # a pair of samples, and two copies of an image
    samples, train = (write_images(tmp_path / name, images[..., None])
                      for name, images in (("x", x), ("y", train)))
    for more, threshold in (({}, "1/3"), (dict(neighbours=10, threshold="1/2"), "1/2")):
        found = memorize.memorize(options(samples, train, spurious=True, **more))
        assert found["memorized"] == found["spurious"]["samples"] == 2
        assert f"2 samples spurious, 22.22% (6.32% to 54.74%): not memorized, and another sample is under " \
               f"{threshold} of the distance to the nearest training image" in memorize.report(found)


def test_every_snapshot_of_a_run(tmp_path):
    import train
    out = tmp_path / "run"
    train.train(train.Options(data="digits", n=20, width=4, blocks=1, channel_mult=(1, 1), batch=16, steps=4,
                              learning_rate=0.01, warmup_steps=0, ema_halflife=1, snapshots=2, out=str(out),
                              device="cpu"))
    with pytest.raises(ValueError, match="has no samples yet"):
        memorize.memorize(options(out, out, snapshots=True))
    with pytest.raises(ValueError, match="--samples digits is none"):
        memorize.memorize(options("digits", out, snapshots=True))
    for weights in (out, out / "snapshot-00000002.safetensors"):
        sample.sample(sample.Options(run=str(weights), seeds="0-7", device="cpu"))
    found = memorize.memorize(options(out, out, held_out="rest", snapshots=True))
    again = memorize.memorize(options(out, out, held_out="rest", snapshots=True))
    assert disk.read_json(out / "snapshots.json") == again == json.loads(json.dumps(found))
    early, last = found["snapshots"]
    assert memorize.report(found).splitlines()[1].startswith("samples.npz: 0.00% memorized, ")
    assert [(row["step"], row["file"]) for row in found["snapshots"]] == [
        (2, "samples-00000002.npz"), (4, "samples.npz")]
    alone = memorize.memorize(options(out, out, held_out="rest", quality=True))
    for name in ("samples", "ratio", "interval_95", "mean_distance", "held_out", "quality"):
        assert last[name] == alone[name]
    assert early["quality"]["held_out_against_training"] == last["quality"]["held_out_against_training"]
    assert early["mean_distance"] != last["mean_distance"]
    assert Image.open(out / "snapshots.png").width > 800
    with pytest.raises(ValueError, match="snapshots.json was made with .*held_out_sha256"):
        memorize.memorize(options(out, out, snapshots=True))


def test_carlinis_ratio_and_mirrored_images(tmp_path, write_images, noise):
    samples, train = two_folders(tmp_path, write_images, noise)
    found = memorize.memorize(options(samples, train, neighbours=20, threshold="1/2",
                                      csv=str(tmp_path / "a.csv")))
    assert found["memorized"] == 6 and "under 1/2 of the mean of the 20 nearest" in memorize.report(found)
    x, y = (read(str(f))[0].flatten(1).double() for f in (samples, train))
    d = torch.cdist(x, y).topk(20, largest=False).values
    with open(tmp_path / "a.csv") as file:
        ratios = [float(row["distance_ratio"]) for row in csv.DictReader(file)]
    assert ratios == pytest.approx((d[:, 0] / d.mean(1)).tolist(), abs=1e-6)
    flipped = read(str(samples))[0].flip(-1).permute(0, 2, 3, 1).numpy()
    flipped = write_images(tmp_path / "flipped", flipped)
    assert memorize.memorize(options(flipped, train))["memorized"] == 0
    assert memorize.memorize(options(flipped, train, mirror=True))["memorized"] == 6
    with pytest.raises(ValueError, match="31 nearest of 30 images; give more images, or a smaller K"):
        memorize.memorize(options(samples, train, neighbours=31))


def test_vectors_get_the_same_verdicts(tmp_path, write_images, noise):
    samples, train = two_folders(tmp_path, write_images, noise)
    files = dict(sample_features=str(tmp_path / "a.npz"), train_features=str(tmp_path / "b.npz"))
    for path, folder in zip(files.values(), (samples, train)):
        np.savez(path, features=read(str(folder))[0].flatten(1).numpy().astype(np.float32))
    pixels = memorize.memorize(options(samples, train))
    found = memorize.memorize(options("", "", **files))
    for name in ("memorized", "copied_training_images", "pixel_exact_copies", "mean_distance"):
        assert found[name] == pytest.approx(pixels[name])
    assert "vectors of 192" in memorize.report(found) and "in every value" in memorize.report(found)
    more = memorize.memorize(options(samples, train, **files, pairs=str(tmp_path / "p.png"),
                                     held_out=files["train_features"], out=str(tmp_path / "X.json")))
    assert more["memorized"] == 6 and more["held_out"]["training_copies"] == 30
    assert Image.open(tmp_path / "p.png").mode == "RGB"
    cosine = memorize.memorize(options(samples, train, **files, distance="cosine",
                                       held_out=files["train_features"]))
    assert cosine["memorized"] == 6 and cosine["held_out"]["training_copies"] == 30
    assert "mean cosine distance to the nearest" in memorize.report(cosine)


VECTORS = dict(sample_features="a.npz", train_features="b.npz")


@pytest.mark.parametrize("given, words", [
    (dict(neighbours=1), "--neighbours 1: give 2 or more"), (dict(neighbours=-5), "--neighbours -5"),
    (dict(curve="x.pdf"), "--curve x.pdf is drawn as PNG"), (dict(which="x.jpg"), "--which x.jpg"),
    (dict(sample_features="x"), "give both"), (dict(train_features="x"), "give both"),
    (VECTORS | dict(mirror=True), "--mirror is for images"), (dict(distance="cosine"), "is for vectors"),
    (VECTORS | dict(distance="cosine", quality=True), "--quality is of L2"),
    (VECTORS | dict(samples="", which="x.png"), "--pairs and --which draw images; give these too"),
    (dict(samples=""), "--samples is needed"), (dict(pairs="x.jpg"), "--pairs x.jpg is drawn as PNG"),
    (dict(train=""), "--train is needed"), (dict(threshold="4/3"), "4/3"),
    (dict(mirror=True, quality=True), "leave out --mirror"),
    (dict(mirror=True, snapshots=True), "leave out --mirror"),
    (dict(snapshots=True, curve="x.png"), "--which and --spurious are of one"),
    (VECTORS | dict(snapshots=True), "--snapshots takes many")])
def test_bad_options(given, words):
    with pytest.raises(ValueError, match=words):
        memorize.Options(**{**dict(samples="a", train="b"), **given})


def test_images_that_cannot_be_compared(tmp_path, write_images, noise):
    small = write_images(tmp_path / "a", noise(3, 8, 8, 3))
    large = write_images(tmp_path / "b", noise(3, 16, 16, 3))
    words = r"\[3, 8, 8\] cannot be compared with images of shape \[3, 16, 16\]; resize"
    with pytest.raises(ValueError, match=words):
        memorize.memorize(options(small, large))
    assert memorize.memorize(options(small, large, resolution=8))["samples"] == 3
    one = write_images(tmp_path / "c", noise(1, 8, 8, 3))
    with pytest.raises(ValueError, match="at least 2"):
        memorize.memorize(options(small, one))


def test_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "memorize.py"), "--samples", tmp_path / "x", "--train", "digits",
               "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "no data at" in result.stderr
