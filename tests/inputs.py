"""Files of images as people have them, and what has to come of each: `read` and `refused` make them in a folder.

Both yield a source below the folder and the --resolution to read it at; `read` then its pixels uint8 [N, H, W, C], its
classes and the words that stderr must hold ("" for an empty one); `refused` the words of the error.
"""
import gzip
import io
import json
import struct
import warnings
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageDraw

ORIENTATION = 0x112


def noise(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def file(image, format="PNG", **how):
    """The bytes of an image file; image uint8 [H, W, C] or [H, W], or a PIL picture."""
    content = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(content, format, **how)
    return content.getvalue()


def put(root, files):
    """Write {name: bytes, text, or an image as PNG} below a folder that is returned."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        content = content.encode() if isinstance(content, str) else content if isinstance(content, bytes) else file(content)
        (root / name).write_bytes(content)
    return root


def packed(path, files, compression=zipfile.ZIP_STORED):
    """The same in a zip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a name that is there already
                archive.writestr(name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name),
                                 content if isinstance(content, (bytes, str)) else file(content))
    return path


def deep_png(channels):
    """A PNG of 16 bits a channel, 2x2: 1 is grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", 2, 2, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = (b"\0" + b"\x12\x34" * 2 * channels) * 2
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def idx(array):
    """The bytes of an IDX file of uint8 values."""
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def moving(format):
    frames = [Image.fromarray(noise(4, 4, seed=i)) for i in range(3)]
    return file(frames[0], format, save_all=True, append_images=frames[1:])


def turned(image, orientation):
    """What a viewer shows of an image [H, W, C] whose EXIF has this orientation, written out."""
    rows, columns = image, image.transpose(1, 0, 2)
    return {1: rows, 2: rows[:, ::-1], 3: rows[::-1, ::-1], 4: rows[::-1], 5: columns, 6: columns[:, ::-1],
            7: columns[::-1, ::-1], 8: columns[::-1]}[orientation]


def read(root):
    yield from readable_files(root)
    yield from readable_folders(root)
    yield from readable_zips(root)
    yield from readable_labels(root)
    yield from readable_arrays(root)


def readable_files(root):
    x, grey = noise(8, 4, 4, 3), noise(3, 4, 4)
    zeros = [0] * 8
    files = {"0.png": file(x[0]), "1.WebP": file(x[1], "WEBP", lossless=True), "2.bmp": file(x[2], "BMP"), "3.TIFF": file(x[3], "TIFF"),
             "4.tif": file(x[4], "TIFF", compression="tiff_lzw"), "5.PNG": file(x[5]), "6.png": file(x[6], "BMP"), "7.png": file(x[7])}
    others = {"read me.txt": "hello", "b.mp4": b"", "a.TXT": "", "LICENSE": "", ".DS_Store": b"", "Thumbs.db": b"", ".notes.txt": ""}
    yield put(root / "formats", files | others), 0, x, zeros, "8 images; passed over 2 .txt, 1 .mp4, 1 of no known kind"
    yield put(root / "gif", {f"{i}.gif": file(grey[i], "GIF") for i in range(3)}), 0, np.stack([grey] * 3, 3), [0] * 3, ""
    flat = np.full((8, 8, 3), 100, np.uint8)
    phone = file(flat, "MPO", save_all=True, append_images=[Image.fromarray(flat + 100)])
    yield put(root / "phone", {"a.jpg": phone}), 0, flat[None], [0], ""

    oblong = noise(4, 6, 3)
    for format in ("PNG", "WEBP", "TIFF"):
        files = {}
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            files[f"{orientation}.{format.lower()}"] = file(x[0], format, exif=exif, **(dict(lossless=True) if format == "WEBP" else {}))
        yield put(root / f"turned-{format}", files), 0, np.stack([turned(x[0], o) for o in range(1, 9)]), zeros, ""
    exif[ORIENTATION] = 6
    yield put(root / "turned", {"0.png": file(oblong, exif=exif)}), 0, turned(oblong, 6)[None], [0], ""

    opaque = np.dstack([x[0], np.full((4, 4), 255, np.uint8)])
    palette = Image.fromarray(x[0]).quantize(16)
    unused = Image.fromarray(np.full((4, 4, 3), 9, np.uint8))
    files = {"0.png": opaque, "1.png": np.dstack([grey[0], opaque[..., 3]]), "2.png": file(palette, transparency=bytes([255] * 16)),
             "3.png": file(unused, transparency=(1, 2, 3)), "4.png": file(palette), "5.webp": file(opaque, "WEBP", lossless=True)}
    shown = [x[0], np.dstack([grey[0]] * 3), np.asarray(palette.convert("RGB")), np.asarray(unused), np.asarray(palette.convert("RGB")), x[0]]
    yield put(root / "opaque", files), 0, np.stack(shown), [0] * 6, ""
    bits = grey[0] > 127
    yield put(root / "bits", {"0.png": bits, "1.png": grey[1]}), 0, np.stack([bits * 255, grey[1]])[..., None], [0, 0], ""

    wide, high = noise(4, 7, 3), noise(9, 4, 3, seed=1)
    middle = np.stack([x[0], wide[:, 1:5], high[2:6]])
    folder = put(root / "oblong", {"0.png": x[0], "1.png": wide, "2.png": high})
    yield folder, 4, middle, [0] * 3, "3 images; 2 are not square, and cropped to their centre"
    smaller = [np.asarray(Image.fromarray(image).resize((2, 2), Image.Resampling.LANCZOS)) for image in middle]
    yield folder, 2, np.stack(smaller), [0] * 3, "2 are not square"
    np.savez(root / "oblong.npz", images=wide[None])
    yield root / "oblong.npz", 4, middle[1:2], [0], "1 are not square"


def readable_folders(root):
    x = noise(6, 4, 4, 3)
    names = [f"{folder}/{i}.png" for folder in ("cat", "dog") for i in range(3)]
    classes, two = [0] * 3 + [1] * 3, dict(zip(names, x))
    for around in ("train/", "a/b/", "My.Data/"):
        yield put(root / "around" / around.replace("/", "_"), {around + name: image for name, image in two.items()}), 0, x, classes, ""
    numbers = [0, 1, 2, 10, 11, 100]
    yield put(root / "numbers", {f"{n}/0.png": x[i] for n, i in zip(numbers, (0, 1, 5, 2, 4, 3))}), 0, \
        x, [0, 1, 3, 5, 4, 2], ""  # in the order of names as text, classes in that of numbers
    yield put(root / "train-is-a-class", {f"{name}/0.png": image for name, image in zip(("bus", "test", "train"), x)}), 0, x[:3], [0, 1, 2], ""
    yield put(root / "loose", {"0.png": x[0], "cat/1.png": x[1]}), 0, x[:2], [0, 1], "1 in no folder of a class"
    junk = ("@eaDir/0.png@SYNOPHOTO.png", "cat/@eaDir/0.png", ".thumbnails/0.png", "__MACOSX/cat/._0.png", "cat/._0.png", "#recycle/9.png")
    yield put(root / "junk", two | {name: x[0] for name in junk}), 0, x, classes, "passed over 2 @eaDir, 2 hidden, 1 #recycle, 1 __MACOSX"
    yield put(root / "backslashes", {name.replace("/", "\\"): image for name, image in two.items()}), 0, x, classes, ""
    (root / "with an empty folder" / "bird").mkdir(parents=True)
    yield put(root / "with an empty folder", two), 0, x, classes, ""

    store = put(root / "store", two)
    linked = put(root / "linked", {name: image for name, image in two.items() if "cat" in name})
    (linked / "dog").symlink_to(store / "dog")
    yield linked, 0, x, classes, ""
    (root / "files-linked").mkdir()
    for i, name in enumerate(names):
        (root / "files-linked" / f"{i}.png").symlink_to(store / name)
    yield root / "files-linked", 0, x, [0] * 6, ""
    loop = put(root / "loop", two)
    (loop / "cat" / "again").symlink_to("..")
    (loop / "cats").symlink_to("cat")
    (loop / "a-first").symlink_to("dog")
    yield loop, 0, x, classes, "passed over 3 links to folders that are read already"


def readable_zips(root):
    x = noise(6, 4, 4, 3)
    names = [f"{folder}/{i}.png" for folder in ("cat", "dog") for i in range(3)]
    classes, two = [0] * 3 + [1] * 3, dict(zip(names, x))
    yield packed(root / "deflated.ZIP", two, zipfile.ZIP_DEFLATED), 0, x, classes, ""
    junk = {"__MACOSX/mydata/cat/._0.png": x[0], "mydata/cat/.DS_Store": b"", "mydata/cat/": b"", "mydata/": b"", "mydata/a.txt": b""}
    yield packed(root / "mac.zip", {f"mydata/{name}": image for name, image in two.items()} | junk), 0, x, classes, "1 .txt, 1 __MACOSX"
    yield packed(root / "dots.zip", {f"./{name}": image for name, image in two.items()}), 0, x, classes, ""
    yield packed(root / "windows.zip", {f"data\\{name}".replace("/", "\\"): image for name, image in two.items()} | {"data\\cat\\": b""}), 0, x, classes, ""
    yield packed(root / "twice.zip", {zipfile.ZipInfo("0.png"): x[0], "0.png": x[1], "1.png": x[2]}), 0, x[1:3], [0, 0], "1 of a name that another has"
    labels = json.dumps(dict(labels=[[name, i % 2] for i, name in enumerate(names)]))
    inside = {f"mydata/{name}": image for name, image in two.items()} | {"mydata/dataset.json": labels}
    yield packed(root / "inside.zip", inside), 0, x, [0, 1] * 3, ""
    labels = json.dumps(dict(labels=[[f".\\{name}", i % 2] for i, name in enumerate(names + ["gone.png"])]))
    yield packed(root / "slashes.zip", two | {"dataset.json": labels}), 0, x, [0, 1] * 3, "1 that dataset.json names are not there"


def readable_labels(root):
    x = noise(3, 4, 4, 3)
    names = ["00000/0.png", "00000/1.png", "00001/2.png"]
    for name, labels, classes in (
            ("null", None, [0] * 3), ("empty", [], [0] * 3), ("whole", [2, 0, 1], [2, 0, 1]), ("whole-floats", [2.0, 0.0, 1.0], [2, 0, 1]),
            ("one-hot", [[0, 1], [1, 0], [0, 1]], [1, 0, 1]), ("one-hot-floats", [[0, 0, 1.0], [1.0, 0, 0], [0, 1.0, 0]], [2, 0, 1]),
            ("column", [[2], [0], [1]], [2, 0, 1])):
        table = dict(labels=list(zip(names, labels)) if labels else labels)
        yield put(root / f"labels-{name}", dict(zip(names, x)) | {"dataset.json": json.dumps(table)}), 0, x, classes, ""
        if labels:
            np.savez(root / f"labels-{name}.npz", x=x, y=np.array(labels))
            yield root / f"labels-{name}.npz", 0, x, classes, ""
    yield put(root / "labels-dict", dict(zip(names, x)) | {"dataset.json": json.dumps(dict(labels=dict(zip(names, [2, 0, 1]))))}), 0, x, [2, 0, 1], ""


def readable_arrays(root):
    x, labels = noise(5, 8, 8, 3), np.array([2, 0, 1, 0, 2])
    for images, classes in (("arr_0", "arr_1"), ("images", "labels"), ("image", "label"), ("x", "y"), ("X", "Y"), ("samples", "labels"), ("x_train", "y_train")):
        np.savez(root / f"{images}.npz", **{images: x, classes: labels})
        yield root / f"{images}.npz", 0, x, labels.tolist(), ""
    np.savez_compressed(root / "keras.NPZ.npz", x_train=x, y_train=labels, x_test=x[:2], y_test=labels[:2])
    yield root / "keras.NPZ.npz", 0, x, labels.tolist(), "images are x_train; left out x_test"
    np.savez(root / "own-name.npz", faces=x, features=np.zeros((5, 7)), about="made by hand")
    yield root / "own-name.npz", 0, x, [0] * 5, ""
    np.savez(root / "labels-first.npz", labels, x)
    yield root / "labels-first.npz", 0, x, labels.tolist(), ""
    np.savez(root / "lists.npz", images=x, names=np.array(["a", None], dtype=object))
    yield root / "lists.npz", 0, x, [0] * 5, ""
    np.savez(root / "first.npz", images=x.transpose(0, 3, 1, 2))
    yield root / "first.npz", 0, x, [0] * 5, ""
    np.save(root / "a.npy", np.asfortranarray(x))
    yield root / "a.npy", 0, x, [0] * 5, ""
    np.save(root / "grey.npy", x[..., 0])
    yield root / "grey.npy", 0, x[..., :1], [0] * 5, ""
    np.save(root / "opaque.npy", np.concatenate([x, np.full((5, 8, 8, 1), 255, np.uint8)], 3))
    yield root / "opaque.npy", 0, x, [0] * 5, ""
    (root / "SHOUTED.NPY").write_bytes((root / "a.npy").read_bytes())
    yield root / "SHOUTED.NPY", 0, x, [0] * 5, ""

    values = labels.astype(np.uint8)
    files = {"train-images-idx3-ubyte.gz": gzip.compress(idx(x[..., 0])), "train-labels-idx1-ubyte": idx(values),
             "t10k-images-idx3-ubyte": idx(x[:2, ..., 1]), "t10k-labels-idx1-ubyte.gz": gzip.compress(idx(values[:2]))}
    folder = put(root / "mnist" / "raw", files)
    yield folder, 0, x[..., :1], labels.tolist(), ""
    yield folder / "t10k-images-idx3-ubyte", 0, x[:2, ..., 1:2], [2, 0], ""
    yield put(root / "alone", {"emnist-images.idx3-ubyte": idx(x[..., 2])}), 0, x[..., 2:], [0] * 5, ""


def refused(root):
    yield from refused_files(root)
    yield from refused_sources(root)
    yield from refused_zips(root)
    yield from refused_labels(root)
    yield from refused_arrays(root)


def refused_files(root):
    x, grey = noise(4, 4, 3), noise(4, 4)
    clear = np.dstack([x, np.full((4, 4), 255, np.uint8)])
    clear[0, 0, 3] = 254
    drawn = Image.new("P", (4, 4))
    drawn.putpalette([0, 0, 0, 255, 255, 255])
    ImageDraw.Draw(drawn).point((1, 1), 1)
    for name, content, say in (
            ("alpha.png", clear, "is transparent in places (alpha under 255); paint it"), ("alpha.webp", file(clear, "WEBP", lossless=True), "transparent"),
            ("grey-alpha.png", np.dstack([grey, clear[..., 3]]), "transparent"), ("palette.png", file(drawn, transparency=1), "transparent"),
            ("key.png", file(x, transparency=tuple(x[0, 0].tolist())), "transparent"), ("grey-key.png", file(grey, transparency=int(grey[2, 2])), "transparent"),
            ("palette.gif", file(drawn, "GIF", transparency=1), "transparent"), ("alpha.tif", file(clear, "TIFF"), "transparent"),
            *((f"deep{channels}.png", deep_png(channels), "16 bits a channel; convert it to 8") for channels in (1, 2, 3, 4)),
            ("deep.tif", file(grey.astype(np.uint16), "TIFF"), "16 bits a channel"), ("float.tif", file(grey.astype(np.float32), "TIFF"), "32 bits a channel"),
            ("moving.gif", moving("GIF"), "an animation, or several pages; split it"), ("moving.png", moving("PNG"), "an animation"),
            ("moving.webp", moving("WEBP"), "an animation"), ("pages.tif", moving("TIFF"), "several pages"),
            ("print.jpg", file(Image.fromarray(clear, "CMYK"), "JPEG"), "mode CMYK; convert"), ("text.webp", b"hello", "text.webp cannot be read as PNG"),
            ("torn.bmp", file(x, "BMP")[:70], "cannot be read")):
        yield put(root / f"no-{name}", {name: content}), 0, say
    yield put(root / "two sizes", {"0.png": x, "1.png": x[:3]}), 0, "1.png is 4x3, 0.png is 4x4; give --resolution for one"


def refused_sources(root):
    x = noise(4, 4, 3)
    for name in ("gone.png", "gone"):
        folder = put(root / f"broken-{name}", {"0.png": x})
        (folder / name).symlink_to("nowhere")
        yield folder, 0, f"{name} is a link that leads nowhere"
    folder = put(root / "itself", {"0.png": x})
    (folder / "cat").symlink_to("cat")
    yield folder, 0, "cat is a link that leads nowhere"
    yield put(root / "halves", {"train/cat/0.png": x, "test/cat/0.png": x}), 0, "holds test and train, which are no classes; give one"
    yield put(root / "half-labelled", {"train/0.png": x, "train/dataset.json": '{"labels": [["0.png", 1]]}', "more/0.png": x}), 0, "has not the labels of all images"
    yield put(root / "labelled-twice", {"a/0.png": x, "dataset.json": '{"labels": null}', "a/dataset.json": '{"labels": null}'}), 0, "keep one, at the top"
    yield put(root / "only-others", {"a.txt": "", "b.heic": b"", "@eaDir/0.png": x}), 0, "holds no images (.png"
    yield put(root / "named", {"a.txt": "", "b.heic": b"", "c.heic": b""}), 0, "passed over 2 .heic, 1 .txt"
    (root / "empty").mkdir()
    yield root / "empty", 0, "holds no images"


def refused_zips(root):
    x = noise(4, 4, 3)
    for method, name in ((zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "lzma")):
        path = root / f"{name}.zip"
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("0.png", file(x))
        yield path, 0, f"{name}.zip: 0.png is compressed by {name}; pack it stored or deflated"
    # flags and method stand at 6 and 8 of a member's own header, at 8 and 10 of the one in the archive's directory
    for name, field, value, say in (("zstd", 2, 93, "compressed by zstd"), ("locked", 0, 1, "is encrypted; pack it without a password")):
        path = packed(root / f"{name}.zip", {"0.png": x})
        content = bytearray(path.read_bytes())
        content[6 + field] = content[content.index(b"PK\x01\x02") + 8 + field] = value
        path.write_bytes(content)
        yield path, 0, say
    link = zipfile.ZipInfo("cat")
    link.external_attr = 0o120777 << 16
    yield packed(root / "link.zip", {link: b"../store/cat", "0.png": x}), 0, "link.zip: cat is a link"
    yield packed(root / "broken.zip", {"0.png": b"PNG", "a.zip": b""}), 0, "broken.zip/0.png cannot be read as PNG"


def refused_labels(root):
    x = noise(3, 4, 4, 3)
    for name, labels, say in (
            ("hot", [[1, 0, 1]] * 3, "are not one-hot: attributes"), ("soft", [[0.5, 0.5]] * 3, "not one-hot"), ("signs", [[-1, 1]] * 3, "not one-hot"),
            ("nan", [[float("nan"), 1]] * 3, "not one-hot"), ("none-hot", [[0, 0]] * 3, "not one-hot"), ("twos", [[2, 0]] * 3, "not one-hot"),
            ("halves", [0.5, 0, 1], "3 whole numbers"), ("nans", [0, 1, float("nan")], "3 whole numbers"), ("endless", [0, 1, float("inf")], "3 whole numbers"),
            ("words", ["cat", "dog", "cat"], "3 whole numbers"), ("deep", [[[0]]] * 3, "3 whole numbers"), ("negative", [-1, 0, 1], "3 whole numbers")):
        table = json.dumps(dict(labels=[[f"{i}.png", label] for i, label in enumerate(labels)]))
        yield put(root / f"wrong-{name}", {f"{i}.png": x[i] for i in range(3)} | {"dataset.json": table}), 0, say
        if name != "deep":  # which may be images
            np.savez(root / f"wrong-{name}.npz", images=x, labels=np.array(labels))
            yield root / f"wrong-{name}.npz", 0, say
    for name, table, say in (("ragged", dict(labels=[["0.png", [1, 0]], ["1.png", 1], ["2.png", 1]]), "dataset.json"), ("bare", {"0.png": 1}, 'has no "labels"')):
        yield put(root / f"wrong-{name}", {f"{i}.png": x[i] for i in range(3)} | {"dataset.json": json.dumps(table)}), 0, say


def refused_arrays(root):
    x = noise(5, 8, 8, 3)
    for name, array, say in (
            ("floats", x / 255, "(x * 255).round().astype(np.uint8), for x in [-1, 1]"), ("first", x.transpose(0, 3, 1, 2), "save x.transpose(0, 2, 3, 1)"),
            ("bits", x > 127, "save x.astype(np.uint8) * 255"), ("deep", x.astype(np.uint16), "x / 257"), ("whole", x.astype(int), "save x.astype(np.uint8) if"),
            ("one", x[0], "if it is one image, save x[None]"), ("none", x[:0], "these are none"), ("clear", np.concatenate([x, x[..., :1]], 3), "paint x on a background"),
            ("pair", x[..., :2], "1 or 3 channels")):
        np.savez(root / f"array-{name}.npz", samples=array)
        yield root / f"array-{name}.npz", 0, say
        np.save(root / f"array-{name}.npy", array)
        yield root / f"array-{name}.npy", 0, say
    np.save(root / "array-flat.npy", x.ravel())
    yield root / "array-flat.npy", 0, "uint8 [960]"
    objects = np.empty(5, object)
    objects[:] = list(x)
    np.savez(root / "objects.npz", images=objects)
    yield root / "objects.npz", 0, "images object [5]; pickled objects are not read, save np.stack(list(x))"
    np.savez(root / "keys.npz", encoded=np.zeros((5, 7)), ids=np.arange(5))
    yield root / "keys.npz", 0, "no array that may be images: encoded float64 [5, 7], ids int64 [5]. Name one images, uint8 [N, H, W, C]"
    np.savez(root / "two.npz", left=x, right=x)
    yield root / "two.npz", 0, "several arrays that may be images"
    yield put(root / "several", {f"emnist-{part}-images-idx3-ubyte": idx(x[..., 0]) for part in ("letters", "digits")}), 0, "several sets of images"
    for name, content, say in (("torn", idx(x[..., 0])[:99], "which its 83 bytes are not"), ("flat", idx(x.ravel()), "holds an array [960]"),
                               ("ints", b"\0\0\x0c\x01" + bytes(8), "does not begin"), ("large", b"\0\0\x08\x03" + b"\xff" * 12, "says it is")):
        yield put(root / f"idx-{name}", {"a-images-idx3-ubyte": content}), 0, say
    yield put(root / "idx-gz", {"a-images-idx3-ubyte.gz": gzip.compress(idx(x[..., 0]))[:60]}), 0, "is not a readable IDX file"
    yield put(root / "images.tar", {"x": b""}) / "x", 0, "is not an image folder, a zip, an npz, npy or IDX file"
