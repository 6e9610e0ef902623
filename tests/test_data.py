import hashlib
import io
import json
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from sklearn.datasets import load_digits

import data
import images as sources
import plan
import run
import unet
from images import read


def options(**given):
    return data.Options(**dict(dict(data="digits"), **given))


def test_digits():
    D = data.load(options())
    assert D.images.shape == (1797, 1, 8, 8) and D.images.dtype == torch.uint8
    assert D.images.max() == 255 and D.images.min() == 0
    assert D.labels.dtype == torch.int64 and set(D.labels.tolist()) == set(range(10)) and D.label_dim == 0
    published = load_digits()  # read here without importing scikit-learn
    images, classes, _ = read("digits")
    assert (images[:, 0] == np.round(published.images * (255 / 16))).all() and (classes == published.target).all()


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


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.none() | st.integers(0, 9), st.data())
def test_any_prefix_is_as_even_as_it_can_be(classes, seed, draw):
    classes = torch.tensor(classes)
    order = data.balanced_order(classes, seed)
    assert sorted(order.tolist()) == list(range(len(classes)))
    n = draw.draw(st.integers(1, len(classes)))
    available, taken = torch.bincount(classes, minlength=5), torch.bincount(classes[order[:n]], minlength=5)
    most = taken.max()
    assert all(t >= most - 1 or t == a for t, a in zip(taken, available))  # behind only where a class is used up


def test_classes_keeps_the_first():
    D = data.load(options(classes=3, n=31, labels="true"))
    assert torch.bincount(D.labels).tolist() == [11, 10, 10] and D.label_dim == 3


@pytest.mark.parametrize("labels, label_dim", [("none", 0), ("true", 10), ("random:4", 4), ("unique", 60)])
def test_labels(labels, label_dim):
    D = data.load(options(n=60, labels=labels))
    assert D.label_dim == label_dim
    if labels == "unique":
        assert D.labels.tolist() == list(range(60))
    if labels == "random:4":
        assert set(D.labels.tolist()) == set(range(4))
        assert D.labels.tolist() == data.load(options(n=90, labels=labels)).labels[:60].tolist()
        assert D.labels.tolist() != data.load(options(n=60, labels=labels, label_seed=1)).labels.tolist()


def test_resolution_is_lanczos_of_8_bit_images(tmp_path, write_images, noise):
    images = noise(3, 32, 32, 3)
    D = data.load(options(data=str(write_images(tmp_path / "a", images)), resolution=8))
    expected = [np.asarray(Image.fromarray(i).resize((8, 8), Image.Resampling.LANCZOS)) for i in images]
    assert np.array_equal(D.images.permute(0, 2, 3, 1).numpy(), expected)
    assert data.load(options(n=20, resolution=16)).images.shape == (20, 1, 16, 16)


def test_folder_flat_and_with_classes(tmp_path, write_images, noise):
    images = noise(4, 8, 8, 3)
    flat = write_images(tmp_path / "flat", images)
    found, classes, names = read(str(flat))
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), images)
    assert classes.tolist() == [0] * 4 and names[2] == "0002.png"
    write_images(tmp_path / "classes" / "cat", images[:1])
    write_images(tmp_path / "classes" / "ant", images[1:])
    Image.fromarray(images[0]).save(tmp_path / "classes" / "cat" / "photo.JPEG")
    _, classes, names = read(str(tmp_path / "classes"))
    assert classes.tolist() == [0, 0, 0, 1, 1] and names[-1] == "cat/photo.JPEG"


def test_grey_palette_and_bilevel_files(tmp_path, noise):
    grey = noise(8, 8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey > 127).save(tmp_path / "b.png")
    images, _, _ = read(str(tmp_path))
    assert images.shape == (2, 1, 8, 8) and np.array_equal(images[0, 0], grey)
    Image.fromarray(noise(8, 8, 3)).quantize(16).save(tmp_path / "c.png")
    images, _, _ = read(str(tmp_path))
    assert images.shape == (3, 3, 8, 8) and np.array_equal(images[0, 2], grey)  # grey among colour: all RGB


def write_zip(path, images, labels=None):
    with zipfile.ZipFile(path, "w") as archive:
        for i, image in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            archive.writestr(f"00000/img{i:08d}.png", file.getvalue())
        if labels is not None:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return str(path)


def test_zip_of_edm(tmp_path, noise):
    images = noise(3, 8, 8, 3)
    labels = [[f"00000/img{i:08d}.png", c] for i, c in enumerate((2, 0, 1))]
    found, classes, _ = read(write_zip(tmp_path / "a.zip", images, labels))
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), images) and classes.tolist() == [2, 0, 1]
    assert read(write_zip(tmp_path / "b.zip", images))[1].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="no label for '00000/img00000002.png'"):
        read(write_zip(tmp_path / "c.zip", images, labels[:2]))


@pytest.mark.parametrize("key, axes", [("arr_0", (0, 1, 2, 3)), ("images", (0, 1, 2, 3)), ("images", (0, 3, 1, 2))])
@pytest.mark.parametrize("channels", [1, 3])
def test_npz(tmp_path, noise, key, axes, channels):
    images = noise(5, 8, 8, channels)
    np.savez(tmp_path / "a.npz", **{key: images.transpose(axes)}, labels=np.arange(5))
    found, classes, _ = read(str(tmp_path / "a.npz"))
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), images) and classes.tolist() == list(range(5))


@pytest.mark.parametrize("arrays, words", [
    (dict(arr_0=np.zeros((2, 8, 8, 3))), "uint8"), (dict(x=np.zeros(3)), "neither arr_0 nor images"),
    (dict(arr_0=np.zeros((2, 8, 8, 4), np.uint8)), "1 or 3 channels"), (dict(arr_0=np.zeros((0, 8, 8, 3), np.uint8)), "uint8"),
    (dict(arr_0=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([0.5, 1])), "whole numbers"),
    (dict(arr_0=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([-1, 1])), "whole numbers"),
    (dict(arr_0=np.array([None])), "not a readable npz")])
def test_bad_npz(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        read(str(tmp_path / "a.npz"))


def test_bad_files(tmp_path, write_images, noise):
    with pytest.raises(ValueError, match="no data at"):
        read(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no PNG or JPEG"):
        read(str(tmp_path))
    folder = write_images(tmp_path / "mixed", noise(2, 8, 8, 3))
    Image.fromarray(noise(16, 16, 3)).save(folder / "z.png")
    with pytest.raises(ValueError, match=r"mixed/z.png is 16x16, 0000.png is 8x8; give --resolution"):
        read(str(folder))
    assert read(str(folder), 8)[0].shape == (3, 3, 8, 8)
    (folder / "z.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="z.png cannot be read"):
        read(str(folder))
    Image.fromarray(noise(8, 8, 4), "RGBA").save(folder / "z.png")
    with pytest.raises(ValueError, match="z.png has mode RGBA"):
        read(str(folder))
    for name in ("a.zip", "a.npz", "a.txt"):
        (tmp_path / name).write_bytes(b"torn")
        with pytest.raises(ValueError, match=name):
            read(str(tmp_path / name))
    np.save(tmp_path / "b.npy", np.zeros(3))
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(ValueError, match="b.npz is not a readable npz"):
        read(str(tmp_path / "b.npz"))


def test_damaged_archives(tmp_path, noise):
    np.savez_compressed(tmp_path / "a.npz", arr_0=noise(9, 8, 8, 3))
    write_zip(tmp_path / "a.zip", noise(2, 8, 8, 3))
    for name in ("a.npz", "a.zip"):
        content = bytearray((tmp_path / name).read_bytes())
        content[100:120] = bytes(20)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read(str(tmp_path / name))
    for labels in ([], {}):
        assert read(write_zip(tmp_path / "b.zip", noise(2, 8, 8, 3), labels))[1].tolist() == [0, 0]
    with pytest.raises(ValueError, match="dataset.json"):
        read(write_zip(tmp_path / "b.zip", noise(2, 8, 8, 3), "x"))


def test_hidden_files_are_no_images(tmp_path, write_images, noise):
    folder = write_images(tmp_path / "a", noise(2, 8, 8, 3))
    (folder / "._0000.png").write_bytes(b"macOS")
    (folder / ".0001.png.x.part.png").write_bytes(b"")
    assert len(read(str(folder))[0]) == 2


@pytest.mark.parametrize("given, words", [
    (dict(n=1798), "1798 is more than the 1797"), (dict(n=-1), "--n -1"), (dict(classes=11), "has 10"),
    (dict(labels="random"), "unknown"), (dict(labels="random:0"), "unknown"), (dict(labels="all"), "unknown"),
    (dict(subset_seed=-1), "subset-seed")])
def test_bad_options(given, words):
    with pytest.raises(ValueError, match=words):
        data.load(options(**given))


def test_cifar10_of_its_authors_archive(monkeypatch, tmp_path, noise):
    pixels, path = noise(50_000, 3, 4, seed=1), tmp_path / "cifar.tar.gz"
    rows = np.zeros((50_000, 3073), np.uint8)
    rows[:, 0], rows[:, 1:13] = np.arange(50_000) % 10, pixels.reshape(50_000, 12)
    made = tmp_path / "made.tar.gz"
    with tarfile.open(made, "w:gz", compresslevel=1) as archive:
        for i in range(5):
            part = rows[10_000 * i:10_000 * (i + 1)].tobytes()
            info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i + 1}.bin")
            info.size = len(part)
            archive.addfile(info, io.BytesIO(part))
    monkeypatch.setattr(sources, "CIFAR10", path)
    monkeypatch.setattr(sources, "CIFAR10_URL", made.as_uri())
    with pytest.raises(ValueError, match="cannot be downloaded .its checksum is wrong.* use --data with digits"):
        data.load(options(data="cifar10"))
    assert not path.exists()
    monkeypatch.setattr(sources, "CIFAR10_MD5", hashlib.md5(made.read_bytes()).hexdigest())
    D = data.load(options(data="cifar10", labels="true"))
    assert D.images.shape == (50_000, 3, 32, 32) and D.labels[:10].tolist() == list(range(10)) and path.exists()
    assert (D.images[7].flatten()[:12].numpy() == pixels[7].flatten()).all()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cifar.tar.gz is damaged"):
        data.load(options(data="cifar10"))
    monkeypatch.setattr(sources, "CIFAR10", tmp_path / "none")
    monkeypatch.setattr(sources, "CIFAR10_URL", "file:///nowhere")
    with pytest.raises(ValueError, match="cannot be downloaded .* use --data with digits"):
        data.load(options(data="cifar10"))


def test_fingerprint_sees_pixels_and_labels():
    prints = [data.load(options(n=20, **more)).fingerprint() for more in
              (dict(), dict(subset_seed=1), dict(labels="unique"), dict(labels="random:3"))]
    assert len({json.dumps(p) for p in prints}) == 4
    assert prints[0] == data.load(options(n=20)).fingerprint()


def test_real_cifar(cifar10k):
    D = data.load(options(data=cifar10k, n=500, labels="true"))
    assert D.images.shape == (500, 3, 32, 32) and torch.bincount(D.labels).tolist() == [50] * 10
    assert D.names[0] == "airplane/0000.jpg" and D.names[10] == "airplane/0001.jpg"


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["a.png", "a.jpg", "a.zip", "a.npz", "dataset.json"]), head=st.sampled_from(
    [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"PK\x03\x04", b"{"]), body=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(name, head, body, tmp_path, noise):
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if name == "dataset.json":
        Image.fromarray(noise(8, 8)).save(folder / "a.png")
    (folder / name).write_bytes(head + body)
    try:
        found = read(str(folder / name if name.endswith(("zip", "npz")) else folder))
    except ValueError as error:
        assert str(folder) in str(error) or name == "dataset.json"
    else:
        assert found[0].dtype == torch.uint8


def test_one_class_of_a_source(noise, tmp_path):
    images, classes, names = read("digits:3")
    whole, all_classes, _ = read("digits")
    assert torch.equal(images, whole[all_classes == 3]) and not classes.any() and len(names) == len(images)
    np.savez(tmp_path / "a.npz", arr_0=noise(4, 8, 8, 1))
    (tmp_path / "a.npz").rename(tmp_path / "b:1")  # a path that exists is a path
    with pytest.raises(ValueError, match="b:1 is not an image folder"):
        read(str(tmp_path / "b:1"))
    for wrong, words in (("digits:10", "no class 10; its classes are numbered 0 to 9"), ("digits:" + "9" * 30, "no class 999"), ("digits:x", "no data at")):
        with pytest.raises(ValueError, match=words):
            read(wrong)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=80), st.floats(0, 1), st.none() | st.integers(0, 9))
def test_any_prefix_of_a_mixture_has_its_share(members, share, seed):
    classes, origin = (torch.tensor(column) for column in zip(*members))
    order = data.balanced_order(classes, seed, origin, share)
    assert len(set(order.tolist())) == len(order)
    for c in classes.unique():
        own = order[classes[order] == c]
        for k in range(1, len(own) + 1):
            assert abs(int(origin[own[:k]].sum()) - share * k) < 1 + 1e-6
        turn = int(np.floor((len(own) + 1) * share + 1e-9) > np.floor(len(own) * share + 1e-9))  # where it ends, none is left of the source due
        used = own[origin[own] == turn]
        assert len(used) == int(((classes == c) & (origin == turn)).sum())
    longest = data.balanced_order(classes, seed, torch.zeros_like(origin), 0.0)
    assert longest.tolist() == data.balanced_order(classes, seed).tolist()


def test_a_mixture_of_two_sources(noise, tmp_path):
    D = data.load(options(data="digits:0", mix="digits:8", mix_share=0.2, n=100, labels="true"))
    zeros, eights = (set(read(f"digits:{k}")[2]) for k in (0, 8))
    assert D.label_dim == 1 and sum(name in eights for name in D.names) == 20 and sum(name in zeros for name in D.names) == 80
    smaller = data.load(options(data="digits:0", mix="digits:8", mix_share=0.2, n=37))
    assert smaller.names == D.names[:37]
    for share, only in ((0.0, zeros), (1.0, eights)):
        assert set(data.load(options(data="digits:0", mix="digits:8", mix_share=share)).names) == only
    np.savez(tmp_path / "large.npz", arr_0=noise(4, 16, 16, 1))
    with pytest.raises(ValueError, match="has images of 1 x 16 x 16, --data digits of 1 x 8 x 8; give --resolution"):
        data.load(options(mix=str(tmp_path / "large.npz")))
    assert len(data.load(options(data="digits:0", mix=str(tmp_path / "large.npz"), resolution=8))) == 9  # one more zero, and no noise after it
    for given, words in ((dict(mix_share=1.5, mix="digits"), "--mix-share 1.5"), (dict(mix_share=0.2), "give it as --mix")):
        with pytest.raises(ValueError, match=words):
            options(**given)
    for given, words in ((dict(mix="digits"), "have other classes"), (dict(mix="digits:8", n=400), "349 images of digits:0 with a share of 0.5 of digits:8")):
        with pytest.raises(ValueError, match=words):
            data.load(options(data="digits:0", **given))


def test_device_auto_says_once_what_it_took(monkeypatch, capsys):
    monkeypatch.setattr(data, "_announced", [])
    cpu = torch.device("cpu")
    data.announce("cpu", cpu)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        data.announce("auto", cpu)
    assert capsys.readouterr().err == f"device: cpu ({run.processor()}), as no GPU was found\n"
    monkeypatch.setattr(data, "_announced", [])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    data.announce("auto", torch.device("cuda"))
    assert capsys.readouterr().err == "device: cuda (H100)\n"


def test_device_auto_says_how_many_days_a_cpu_takes(monkeypatch, capsys):
    D = unet.Denoiser("ddpmpp", "vp", 8, 1, width=8)
    a_day = round(data.CPU_FLOPS * 2 * 24 * 3600 / plan.cost(D).evaluation_flops)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    for evaluations, says in ((a_day * 12, "; this takes about 12 days at an assumed 40 GFLOP/s a core\n"),
                              (round(a_day * 0.99), " was found\n"), (10, " was found\n")):
        monkeypatch.setattr(data, "_announced", [])
        data.announce("auto", torch.device("cpu"), D, evaluations)
        assert capsys.readouterr().err.endswith(says)
    torch.set_num_threads(threads)


def test_the_attention_of_cudnn_is_off():
    data.pick_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
