import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import data
import disk
import memorize
import run
import sample
import train
from conftest import ROOT
from images import read, shape_of
from paper import compare


def options(**given):
    return data.Options(**dict(dict(data="digits"), **given))


def test_digits():
    D = data.load(options())
    assert D.images.shape == (1797, 1, 8, 8) and D.images.dtype == torch.uint8
    assert D.images.max() == 255 and D.images.min() == 0
    assert D.labels.dtype == torch.int64 and set(D.labels.tolist()) == set(range(10)) and D.label_dim == 0
    published = load_digits()
    images, classes, _ = read("digits")
    assert (images[:, 0] == np.round(published.images * (255 / 16))).all()  # of 17 levels
    assert (classes == published.target).all() and shape_of("digits") == (1, 8, 10)


@pytest.mark.parametrize("seed", [None, 3])
def test_subsets_are_balanced_and_nested(seed):
    large, small = (data.load(options(n=n, subset_seed=seed, labels="true")) for n in (500, 130))
    assert torch.bincount(large.labels).tolist() == [50] * 10
    assert torch.bincount(small.labels).tolist() == [13] * 10
    assert set(small.names) < set(large.names)
    assert large.names[:130] == small.names


def test_default_subset_is_the_first_of_each_class():
    images, classes, _ = read("digits")
    D = data.load(options(n=30, labels="true"))
    for c in range(10):
        assert torch.equal(D.images[D.labels == c], images[classes == c][:3])


def test_subset_seeds_differ():
    names = [tuple(data.load(options(n=50, subset_seed=seed)).names) for seed in (None, 0, 1)]
    assert len(set(names)) == 3


def test_classes_keeps_the_first():
    D = data.load(options(classes=3, n=31, labels="true"))
    assert torch.bincount(D.labels).tolist() == [11, 10, 10] and D.label_dim == 3


def test_resolution_is_lanczos_of_8_bit_images(tmp_path, write_images, noise):
    images = noise(3, 32, 32, 3)
    D = data.load(options(data=str(write_images(tmp_path / "a", images)), resolution=8))
    expected = [np.asarray(Image.fromarray(i).resize((8, 8), Image.Resampling.LANCZOS)) for i in images]
    assert np.array_equal(D.images.permute(0, 2, 3, 1).numpy(), expected)
    assert data.load(options(n=20, resolution=16)).images.shape == (20, 1, 16, 16)


@pytest.mark.parametrize("given, words", [
    (dict(n=1798), "1798 is more than the 1797"), (dict(n=-1), "--n -1"), (dict(classes=11), "has 10"),
    (dict(data="digits:3", labels="true"), "digits:3 has no classes here, or one; take --labels none"),
    (dict(classes=1, labels="true"), "--labels true: digits has no classes"),
    (dict(classes=1, labels="permuted"), "--labels permuted: digits has no classes"),
    (dict(labels="random"), "unknown"), (dict(labels="random:0"), "unknown"), (dict(labels="all"), "unknown"),
    (dict(subset_seed=-1), "subset-seed")])
def test_bad_options(given, words):
    with pytest.raises(ValueError, match=words):
        data.load(options(**given))


def test_fingerprint_sees_pixels_and_labels():
    prints = [data.load(options(n=20, **more)).fingerprint() for more in
              (dict(), dict(subset_seed=1), dict(labels="unique"), dict(labels="random:3"))]
    assert len({json.dumps(p) for p in prints}) == 4
    assert prints[0] == data.load(options(n=20)).fingerprint()


def test_real_cifar(cifar10k):
    D = data.load(options(data=cifar10k, n=500, labels="true"))
    assert D.images.shape == (500, 3, 32, 32) and torch.bincount(D.labels).tolist() == [50] * 10
    assert D.names[0] == "airplane/0000.jpg" and D.names[10] == "airplane/0001.jpg"


def test_a_mixture_of_two_sources(noise, tmp_path):
    D = data.load(options(data="digits:0", mix="digits:8", mix_share=0.2, n=100))
    zeros, eights = (set(read(f"digits:{k}")[2]) for k in (0, 8))
    assert sum(name in eights for name in D.names) == 20 and sum(name in zeros for name in D.names) == 80
    smaller = data.load(options(data="digits:0", mix="digits:8", mix_share=0.2, n=37))
    assert smaller.names == D.names[:37]
    for share, only in ((0.0, zeros), (1.0, eights)):
        assert set(data.load(options(data="digits:0", mix="digits:8", mix_share=share)).names) == only
    np.savez(tmp_path / "large.npz", arr_0=noise(4, 16, 16, 1))
    large = str(tmp_path / "large.npz")
    with pytest.raises(ValueError, match="shape .1, 16, 16., --data digits of .1, 8, 8.; give --res"):
        data.load(options(mix=large))
    # one more zero, and no noise after it
    assert len(data.load(options(data="digits:0", mix=large, resolution=8))) == 9
    for wrong, words in ((dict(mix_share=1.5, mix="digits"), "--mix-share 1.5"),
                         (dict(mix_share=0.2), "give it as --mix")):
        with pytest.raises(ValueError, match=words):
            options(**wrong)
    few = "349 images of digits:0 with a share of 0.5 of digits:8"
    for wrong, words in ((dict(mix="digits"), "have other classes"), (dict(mix="digits:8", n=400), few)):
        with pytest.raises(ValueError, match=words):
            data.load(options(data="digits:0", **wrong))


@pytest.mark.parametrize("seed", [None, 3])
def test_parts_are_disjoint_balanced_and_nested(seed):
    whole = data.load(options(labels="true"))
    parts = [data.load(options(part=f"{i}/3", subset_seed=seed, labels="true")) for i in (1, 2, 3)]
    assert sorted(name for part in parts for name in part.names) == sorted(whole.names)
    counts = torch.stack([torch.bincount(part.labels) for part in parts])
    assert (counts.amax(0) - counts.amin(0)).max() <= 1  # of each class
    small = data.load(options(part="2/3", subset_seed=seed, n=100, labels="true"))
    assert torch.bincount(small.labels).tolist() == [10] * 10 and small.names == parts[1].names[:100]
    other = data.load(options(part="1/3", subset_seed=9))  # of another seed
    assert not set(other.names) & set(parts[1].names)
    assert data.load(options(part="1/1", subset_seed=seed, n=40)).names == data.load(
        options(subset_seed=seed, n=40)).names


def test_parts_of_a_mixture_have_its_share():
    mixed = dict(data="digits:0", mix="digits:8", mix_share=0.5)
    eights = set(read("digits:8")[2])
    halves = [data.load(options(**mixed, part=f"{i}/2", n=80)).names for i in (1, 2)]
    assert [sum(name in eights for name in names) for names in halves] == [40, 40]
    assert not set(halves[0]) & set(halves[1])
    with pytest.raises(ValueError, match="--n 300 is more than the .* in part 1/2"):
        data.load(options(data="digits:0", part="1/2", n=300))


def test_repeated_images():
    D = data.load(options(n=30, repeat="5:0.2"))
    times = torch.bincount(D.shown)
    assert sorted(times.tolist()) == [1] * 24 + [5] * 6 and len(D) == 30
    plain = data.load(options(n=30))
    assert torch.equal(D.images, plain.images) and plain.images[plain.shown].shape == plain.images.shape
    one, other = (data.load(options(n=30, repeat="5:0.2", subset_seed=seed)).shown for seed in (1, 2))
    assert not torch.equal(one, other)
    prints = [data.load(options(n=30, **more)).fingerprint() for more in
              (dict(), dict(repeat="5:0.2"), dict(repeat="6:0.2"))]
    assert len({json.dumps(p) for p in prints}) == 3 and "shown_sha256" not in prints[0]


@pytest.mark.parametrize("more", [dict(), dict(part="1/2", subset_seed=1),
                                  dict(labels="true", repeat="3:0.5")])
def test_what_is_outside_a_training_set(more):
    o = options(n=6, **more)
    D = data.load(o)
    larger = data.load(options(**more | dict(repeat="")))
    kept = [name for name, label in zip(larger.names[6:], larger.labels[6:])
            if "labels" not in more or label < 6]  # the first of six classes are in D
    rest, few = data.outside(o, D), data.outside(o, D, 5)
    assert rest.names == kept and few.names == kept[:5] and few.label_dim == D.label_dim
    assert torch.equal(few.images, rest.images[:5]) and torch.equal(few.labels, rest.labels[:5])
    with pytest.raises(ValueError, match=f"has {len(kept)} images outside .*not the 2000 asked for"):
        data.outside(o, D, 2000)


def test_device_auto_says_once_what_it_took(monkeypatch, capsys):
    monkeypatch.setattr(data, "_announced", [])
    cpu = torch.device("cpu")
    data.announce("cpu", cpu)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        data.announce("auto", cpu)
    assert capsys.readouterr().err == f"device: cpu ({disk.processor()}), as no GPU was found\n"
    monkeypatch.setattr(data, "_announced", [])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    data.announce("auto", torch.device("cuda"))
    assert capsys.readouterr().err == "device: cuda (H100)\n"


def test_device_auto_says_how_many_days_a_cpu_takes(monkeypatch, capsys):
    a_day = data.CPU_FLOPS * 2 * 24 * 3600
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    for flops, says in ((a_day * 12, "; this takes about 12 days at an assumed 40 GFLOP/s a core\n"),
                        (a_day * 0.99, " was found\n"), (0, " was found\n")):
        monkeypatch.setattr(data, "_announced", [])
        data.announce("auto", torch.device("cpu"), flops)
        assert capsys.readouterr().err.endswith(says)
    torch.set_num_threads(threads)


TINY = dict(width=4, blocks=1, channel_mult=(1, 1), batch=4, steps=1, device="cpu")


def test_a_run_is_tied_to_its_data_and_not_to_where_they_lie(tmp_path, write_images, noise, monkeypatch):
    images = noise(6, 8, 8, 1)
    write_images(tmp_path / "a" / "imgs", images)
    (tmp_path / "b").mkdir()
    out = tmp_path / "run"

    def trained(path, **more):
        return train.train(train.Options(data=path, out=str(out), **TINY | more))

    def recorded():
        return disk.read_json(out / "config.json")["options"]["data"]
    monkeypatch.chdir(tmp_path / "a")
    model = trained("imgs")
    assert recorded() == str(tmp_path / "a" / "imgs")
    model.unlink()
    for path in ("imgs/", "./imgs", "../a/imgs", str(tmp_path / "a" / "imgs")):
        assert trained(path) == model  # made once, and returned after that
    monkeypatch.chdir(tmp_path / "b")
    assert len(data.of_run(out)) == 6 and trained("../a/imgs") == model
    os.rename(tmp_path / "a", tmp_path / "c")
    with pytest.raises(ValueError, match="a/imgs, which .*run was trained on, is not there.* by --data"):
        data.of_run(out)
    assert torch.equal(data.of_run(out, "../c/imgs").images, data.load(data.Options(data="../c/imgs")).images)
    assert trained("../c/imgs") == model and recorded() == str(tmp_path / "c" / "imgs")
    assert len(data.of_run(out)) == 6
    with pytest.raises(ValueError, match="made with other options .n: 0 there, 3 asked"):
        trained("../c/imgs", n=3)
    Image.fromarray(noise(8, 8, seed=5)).save(tmp_path / "c" / "imgs" / "0000.png")
    with pytest.raises(ValueError, match="sha256"):
        trained("../c/imgs")
    with pytest.raises(ValueError, match="is no longer what .*run was trained on"):
        data.of_run(out)


def test_runs_made_before_paths_were_absolute(tmp_path, write_images, noise, monkeypatch):
    write_images(tmp_path / "imgs", noise(6, 8, 8, 1))
    monkeypatch.chdir(tmp_path)
    train.train(train.Options(data="imgs", out="run", **TINY))
    config = disk.read_json("run/config.json")
    config["options"]["data"] = "imgs/"
    del config["options"]["mix"]  # older than that option
    disk.write_json("run/config.json", config)
    assert len(data.of_run("run")) == 6
    train.train(train.Options(data="./imgs", out="run", **TINY))
    assert disk.read_json("run/config.json")["options"]["data"] == str(tmp_path / "imgs")


def test_duplicates_of_a_training_set_are_named(tmp_path, write_images, noise, capsys):
    images = noise(6, 8, 8, 1)
    images[4:] = images[0]
    D = data.load(options(data=str(write_images(tmp_path / "a", images))))
    assert data.duplicates(D.images).tolist() == [False] * 4 + [True] * 2
    run.say.cache_clear()
    train.train(train.Options(data=str(tmp_path / "a"), out=str(tmp_path / "run"), **TINY))
    said = "2 of 6 training images repeat an earlier one: copies of those cannot count as memorized\n"
    assert said in capsys.readouterr().err
    run.say.cache_clear()
    train.train(train.Options(data=str(tmp_path / "a"), n=4, out=str(tmp_path / "other"), **TINY))
    assert "repeat" not in capsys.readouterr().err


def test_a_run_is_scored_from_any_folder_and_after_its_data_moved(tmp_path, write_images, noise, monkeypatch):
    write_images(tmp_path / "imgs", noise(6, 8, 8, 1))
    monkeypatch.chdir(tmp_path)
    train.train(train.Options(data="imgs", out="run", **TINY))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    where, few = dict(run="../run", device="cpu"), dict(optimum=True, seeds="0-3", out="optimum.npz")

    def score(moved):
        sample.sample(sample.Options(**where, **few, **dict(data=moved) if moved else {}))
        memorize.memorize(memorize.Options(samples="optimum.npz", train="../run", data=moved, device="cpu"))
        compare.compare(compare.Options(**where, data=moved, sample_count=4, draws=6))
        return disk.read_json("../run/compare.json")["source"]
    found = score("")
    (tmp_path / "imgs").rename(tmp_path / "moved")
    for stage, options in ((sample.sample, sample.Options(**where, **few)),
                           (compare.compare, compare.Options(**where))):
        with pytest.raises(ValueError, match="imgs, which ../run was trained on, is not there"):
            stage(options)
    assert score("../moved") == found  # the same files, of which none is refused
    with pytest.raises(ValueError, match="has its own data; leave out --n"):
        sample.Options(**where, **few, data="../moved", n=3)
    with pytest.raises(ValueError, match="has its own data; leave out --data"):
        sample.Options(**where, data="../moved")


def test_a_new_option_is_one_line_and_every_stage_has_it(tmp_path):
    """In a copy of the project: on the command line, in what a run records, and in what it is compared by."""
    packages = (ROOT / name for name in ("diffusion", "images", "kernels", "measure"))
    for path in [*ROOT.glob("*.py"), *packages]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    text = (ROOT / "data.py").read_text()
    last = '    label_seed: int = option(0, "seed of labels that are drawn", least=0, below=2**32)\n'
    assert last in text
    (tmp_path / "data.py").write_text(text.replace(last, f'{last}    flavour: int = option(0, "new")\n'))
    training = ("--data digits --width 4 --blocks 1 --channel-mult 1 --batch 4 --steps 2 --snapshots 1 "
                "--device cpu --flavour").split()

    def stage(*words):
        return subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)

    assert stage("train.py", "--n", "4", *training, "3", "--out", "run").returncode == 0
    assert disk.read_json(tmp_path / "run" / "config.json")["options"]["flavour"] == 3
    other = stage("train.py", "--n", "4", *training, "4", "--out", "run")
    assert other.returncode == 1 and "flavour: 3 there, 4 asked" in other.stderr
    assert stage("sample.py", "--optimum", "--data", "digits", "--n", "4", "--flavour", "5", "--seeds", "0-1",
                 "--device", "cpu", "--out", "o.npz").returncode == 0
    assert disk.metadata(tmp_path / "o.npz")["options"]["flavour"] == 5
    search = stage("emm.py", *training, "6", "--sizes", "4", "--sample-count", "4", "--out", "e")
    assert search.returncode == 0
    for path in ("emm.json", "n000004/config.json"):
        assert disk.read_json(tmp_path / "e" / path)["options"]["flavour"] == 6
