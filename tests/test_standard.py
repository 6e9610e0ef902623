"""Standard data sets, found, downloaded and damaged. Other arrays are in inputs.py."""
import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import images
import inputs
import run
from images import read, standard


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """Standard data are looked for in tmp_path/data and tmp_path/more, and not in this machine's."""
    images.files._read.cache_clear()
    run.say.cache_clear()
    monkeypatch.setattr(standard, "FOLDERS", (tmp_path / "data", tmp_path / "more"))
    yield tmp_path / "data", tmp_path / "more"
    images.files._read.cache_clear()


def cifar(name, noise):
    """An archive in the form of CIFAR's authors: its path's name, its bytes, and the rows of each half."""
    archive, _, labels = standard.CIFAR[name]
    content, halves = io.BytesIO(), [[], []]
    files = ["test_batch.bin", "data_batch_1.bin", "data_batch_2.bin", "batches.meta.txt"]
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=0) as tar:
        for i, file in enumerate(files if name == "cifar10" else ["test.bin", "train.bin", "readme.html"]):
            part = np.concatenate([noise(4, labels, seed=i) % 100, noise(4, 3072, seed=7 * i)], 1)
            info = tarfile.TarInfo(f"cifar-batches-bin/{file}")
            info.size = part.size
            tar.addfile(info, io.BytesIO(part.tobytes()))
            if file.endswith(".bin"):
                halves["test" in file].append(part)
    return archive, content.getvalue(), [np.concatenate(half) for half in halves]


@pytest.mark.parametrize("name", list(standard.CIFAR))
def test_cifar_of_its_authors_archive(name, folders, monkeypatch, tmp_path, noise, capsys):
    archive, content, halves = cifar(name, noise)
    (tmp_path / archive).write_bytes(content)
    monkeypatch.setattr(standard, "CIFAR_URL", f"{tmp_path.as_uri()}/")
    with pytest.raises(ValueError, match=f"{archive} is not what its authors published.*; remove it"):
        read(name)
    _, _, labels = standard.CIFAR[name]
    monkeypatch.setitem(standard.CIFAR, name, (archive, hashlib.md5(content).hexdigest(), labels))
    for half, rows in zip(("", "-test"), halves):
        found, classes, names = read(name + half)
        assert (found.flatten(1).numpy() == rows[:, labels:]).all() and found.shape[1:] == (3, 32, 32)
        assert classes.tolist() == rows[:, labels - 1].tolist()  # the last label is the fine one
        assert names[1] == f"{name}{half}/00001"
    assert (folders[1] / archive).read_bytes() == content
    assert capsys.readouterr().err.count("downloading") == 1
    assert torch.equal(read(tmp_path / archive)[0], read(name)[0])  # by its path
    (folders[1] / archive).write_bytes(content[:1000])
    images.files._read.cache_clear()
    with pytest.raises(ValueError, match=f"{archive} is not what its authors published"):
        read(name)
    (folders[1] / archive).unlink()
    (tmp_path / archive).unlink()
    with pytest.raises(ValueError, match="cannot be downloaded .* use --data with digits"):
        read(name)


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")])
def test_idx_files_where_torchvision_puts_them(name, folder, folders, monkeypatch, tmp_path, noise):
    halves = [(noise(n, 28, 28, seed=n), noise(n, seed=n + 1) % 10) for n in (20, 10)]
    files = {}
    for half, (pixels, labels) in zip(("train", "t10k"), halves):
        files[f"{half}-images-idx3-ubyte"] = inputs.idx(pixels)
        files[f"{half}-labels-idx1-ubyte"] = inputs.idx(labels)
    sums = [hashlib.md5(content).hexdigest() for content in files.values()]
    packed = {f"{file}.gz": gzip.compress(content) for file, content in files.items()}
    url = inputs.put(tmp_path / "host", packed)
    monkeypatch.setitem(standard.MNIST, name, (folder, (), f"{url.as_uri()}/", (sums[:2], sums[2:])))

    def check():
        for half, (pixels, labels) in zip(("", "-test"), halves):
            found, classes, names = read(name + half)
            assert (found[:, 0].numpy() == pixels).all() and classes.tolist() == labels.tolist()
            assert names[3] == f"{name}{half}/00003"
        images.files._read.cache_clear()
    check()  # downloaded
    assert {path.name for path in (folders[1] / folder).iterdir()} == set(packed)
    inputs.put(folders[0] / folder, files)
    for path in (folders[1] / folder).iterdir():
        path.write_bytes(b"")
    check()  # found unpacked, in the first folder
    (folders[0] / folder / "train-labels-idx1-ubyte").write_bytes(inputs.idx(halves[0][1][::-1]))
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is not what its authors published"):
        read(name)
    assert len(read(folders[0] / folder)[0]) == 20  # a path is anyone's


def test_real_fashion_mnist():
    """Debian's dataset-fashion-mnist, where it is installed."""
    if not Path(standard.MNIST["fashion-mnist"][1][0]).is_dir():
        pytest.skip("the package dataset-fashion-mnist is not installed")
    found, classes, _ = read("fashion-mnist")
    assert found.shape == (60_000, 1, 28, 28) and torch.bincount(classes).tolist() == [6000] * 10
    assert images.shape_of("fashion-mnist") == (*found.shape[1:3], 10)
    test, classes, _ = read("fashion-mnist-test")
    assert test.shape == (10_000, 1, 28, 28) and torch.bincount(classes).tolist() == [1000] * 10
    # as published: mean and standard deviation
    assert abs(float(found.double().mean()) / 255 - 0.2860) < 5e-5
    assert abs(float(found.double().std()) / 255 - 0.3530) < 5e-5
    D = data.load(data.Options(data="fashion-mnist", n=100, labels="true", resolution=16))
    assert D.label_dim == 10 and D.images.shape == (100, 1, 16, 16)
