import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

import images
import inputs
import run
from images import read


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return list(inputs.read(folder)), list(inputs.refused(folder))


def test_files_as_people_have_them(made, capsys):
    wrong = []
    for path, resolution, pixels, classes, words in made[0]:
        run.say.cache_clear()
        try:
            found, labels, names = images.read(path, resolution)
        except ValueError as error:
            wrong.append(f"{path}: {error}")
            continue
        said = capsys.readouterr().err
        if found.shape[0] != len(names) or not np.array_equal(found.permute(0, 2, 3, 1).numpy(), pixels):
            wrong.append(f"{path}: other pixels, {list(found.shape)}")
        if labels.tolist() != list(classes):
            wrong.append(f"{path}: classes {labels.tolist()}, not {classes}")
        if words not in said or said.count("\n") != bool(words):
            wrong.append(f"{path}: says {said!r}, not {words!r}")
    assert not wrong, "\n".join(wrong)


def test_files_that_are_refused(made):
    wrong = []
    for path, resolution, words in made[1]:
        try:
            found, labels, _ = images.read(path, resolution)
            wrong.append(f"{path}: read as {list(found.shape)}, classes {labels.tolist()}")
        except ValueError as error:
            said = str(error)
            if words not in said or str(path) not in said or "BytesIO" in said or "\n" in said:
                wrong.append(f"{path}: {error}, not {words}")
    assert not wrong, "\n".join(wrong)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="no data at '.*nowhere'; give digits, cifar10 or another"):
        read(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no data at ''"):
        read("")
    for name in ("a.zip", "a.npz", "a.txt"):
        (tmp_path / name).write_bytes(b"torn")
        with pytest.raises(ValueError, match=name):
            read(str(tmp_path / name))


def test_damaged_archives(tmp_path, noise):
    np.savez_compressed(tmp_path / "a.npz", arr_0=noise(9, 8, 8, 3))
    inputs.packed(tmp_path / "a.zip", {f"{i}.png": image for i, image in enumerate(noise(2, 8, 8, 3))})
    for name in ("a.npz", "a.zip"):
        content = bytearray((tmp_path / name).read_bytes())
        content[100:120] = bytes(20)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read(str(tmp_path / name))


def test_a_source_is_decoded_once_until_it_changes(tmp_path, write_images, noise, monkeypatch):
    folder, decode, names = write_images(tmp_path / "a", noise(3, 8, 8, 3)), images.files.decode, []

    def counted(content, name):
        names.append(name)
        return decode(content, name)
    monkeypatch.setattr(images.files, "decode", counted)
    first = read(str(folder))[0]
    assert torch.equal(read(folder)[0], first) and len(names) == 3
    assert read(f"{folder}:0")[0].shape == (3, 3, 8, 8) and len(names) == 3
    read(str(folder), 4)
    assert len(names) == 6
    Image.fromarray(noise(8, 8, 3, seed=9)).save(folder / "0001.png")
    assert not torch.equal(read(str(folder))[0], first) and len(names) == 9
    (folder / "0001.png").unlink()
    assert len(read(str(folder))[0]) == 2 and len(names) == 11


def test_a_folder_of_a_standard_name_is_not_shadowed_in_silence(tmp_path, noise, monkeypatch, capsys):
    inputs.put(tmp_path / "digits", {"0.png": noise(4, 4)})
    monkeypatch.chdir(tmp_path)
    run.say.cache_clear()
    assert len(read("digits")[0]) == 1797
    said = "digits is the standard data set, and not what is called so here; give ./digits for that\n"
    assert capsys.readouterr().err == said
    assert len(read("./digits")[0]) == len(read("digits/")[0]) == 1 and not capsys.readouterr().err
    assert images.place("digits:3") == "digits:3" and images.place("") == ""
    assert images.place("./digits") == images.place("digits/") == str(tmp_path / "digits")


def test_many_links_do_not_multiply(tmp_path, noise):
    """Forty folders with two links to the next in each: 2^40 paths, one image."""
    for i in range(40):
        (tmp_path / f"a/{i}").mkdir(parents=True)
        for name in ("left", "right") if i < 39 else ():
            (tmp_path / f"a/{i}/{name}").symlink_to(f"../{i + 1}")
    inputs.put(tmp_path / "a", {"39/0.png": noise(4, 4)})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "first").symlink_to("../a/0")
    assert len(read(str(tmp_path / "a"))[0]) == len(read(str(tmp_path / "b"))[0]) == 1


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
    for wrong, words in (("digits:10", "no class 10; its classes are numbered 0 to 9"),
                         ("digits:" + "9" * 30, "no class 999"), ("digits:x", "no data at")):
        with pytest.raises(ValueError, match=words):
            read(wrong)
