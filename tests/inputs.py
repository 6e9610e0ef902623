"""Files of images as people have them, and what has to come of each: `read` and `refused` make them.

Both make them below a folder, and yield each as a source and the --resolution to read it at. `read` then
yields its pixels uint8 [N, H, W, C], its classes, and words that stderr must hold ("" where it must be
empty), `refused` words of the error.
"""
import gzip
import io
import json
import struct
import warnings
import zipfile
import zlib

import numpy as np
from PIL import Image

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
        content = content.encode() if isinstance(content, str) else content
        (root / name).write_bytes(content if isinstance(content, bytes) else file(content))
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


def chunk(kind, body):
    """A part of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def deep_png(channels):
    """A PNG of 16 bits a channel, 2x2: 1 is grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
    head = struct.pack(">IIBBBBB", 2, 2, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = (b"\0" + b"\x12\x34" * 2 * channels) * 2
    chunks = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


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
    x, grey, zeros = noise(8, 4, 4, 3), noise(3, 4, 4), [0] * 8
    files = {"0.png": x[0], "1.WebP": file(x[1], "WEBP", lossless=True), "2.bmp": file(x[2], "BMP"),
             "3.TIFF": file(x[3], "TIFF"), "4.tif": file(x[4], "TIFF", compression="tiff_lzw"), "5.PNG": x[5],
             "6.png": file(x[6], "BMP"), "7.png": x[7]}
    others = {"read me.txt": "", "b.mp4": "", "LICENSE": "", ".DS_Store": "", "Thumbs.db": ""}
    said = "8 images; files of other kinds passed over: 3, such as LICENSE"
    yield put(root / "formats", files | others), 0, x, zeros, said
    files = {f"{i}.gif": file(grey[i], "GIF") for i in range(3)}
    yield put(root / "gif", files), 0, np.stack([grey] * 3, 3), [0] * 3, ""
    flat = np.full((8, 8, 3), 100, np.uint8)
    phone = file(flat, "MPO", save_all=True, append_images=[Image.fromarray(flat + 100)])
    yield put(root / "phone", {"a.jpg": phone}), 0, flat[None], [0], ""

    for format in ("PNG", "WEBP", "TIFF"):
        files = {}
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            how = dict(exif=exif, lossless=True) if format == "WEBP" else dict(exif=exif)
            files[f"{orientation}.{format.lower()}"] = file(x[0], format, **how)
        shown = np.stack([turned(x[0], orientation) for orientation in range(1, 9)])
        yield put(root / f"turned-{format}", files), 0, shown, zeros, ""
    exif[ORIENTATION] = 6
    oblong = noise(4, 6, 3)
    yield put(root / "turned", {"0.png": file(oblong, exif=exif)}), 0, turned(oblong, 6)[None], [0], ""

    alpha = np.full((4, 4), 255, np.uint8)
    palette = Image.fromarray(x[0]).quantize(16)
    one = np.full((4, 4, 3), 9, np.uint8)
    files = {"0.png": np.dstack([x[0], alpha]), "1.png": np.dstack([grey[0], alpha]), "2.png": palette,
             "3.png": file(palette, transparency=bytes([255] * 16)),
             "4.png": file(one, transparency=(1, 2, 3)),
             "5.webp": file(np.dstack([x[0], alpha]), "WEBP", lossless=True)}
    colours = np.asarray(palette.convert("RGB"))
    shown = np.stack([x[0], np.dstack([grey[0]] * 3), colours, colours, one, x[0]])
    yield put(root / "opaque", files), 0, shown, [0] * 6, ""
    bits = grey[0] > 127
    shown = np.stack([bits * 255, grey[1]])[..., None]
    yield put(root / "bits", {"0.png": bits, "1.png": grey[1]}), 0, shown, [0, 0], ""

    wide, high = noise(4, 7, 3), noise(9, 4, 3, seed=1)
    middle = np.stack([x[0], wide[:, 1:5], high[2:6]])
    folder = put(root / "oblong", {"0.png": x[0], "1.png": wide, "2.png": high})
    yield folder, 4, middle, [0] * 3, ""
    smaller = [np.asarray(Image.fromarray(y).resize((2, 2), Image.Resampling.LANCZOS)) for y in middle]
    yield folder, 2, np.stack(smaller), [0] * 3, ""
    np.savez(root / "oblong.npz", images=wide[None])
    yield root / "oblong.npz", 4, middle[1:2], [0], ""


def two_classes():
    """Three images of cat and three of dog, by name, their pixels and classes."""
    x, names = noise(6, 4, 4, 3), [f"{folder}/{i}.png" for folder in ("cat", "dog") for i in range(3)]
    return dict(zip(names, x)), x, [0] * 3 + [1] * 3


def readable_folders(root):
    two, x, classes = two_classes()
    for around in ("train/", "a/b/", "My.Data/"):
        files = {around + name: image for name, image in two.items()}
        yield put(root / "around" / around.replace("/", "_"), files), 0, x, classes, ""
    # in the order of names as text, with classes in that of numbers
    files = {f"{number}/0.png": image for number, image in zip((0, 1, 10, 100, 11, 2), x)}
    yield put(root / "numbers", files), 0, x, [0, 1, 3, 5, 4, 2], ""
    files = {f"{name}/0.png": image for name, image in zip(("bus", "test", "train"), x)}
    yield put(root / "train-is-a-class", files), 0, x[:3], [0, 1, 2], ""
    files = {"0.png": x[0], "cat/1.png": x[1]}
    yield put(root / "loose", files), 0, x[:2], [0, 1], ""
    junk = ("@eaDir/0.png@SYNOPHOTO.png", "cat/@eaDir/0.png", ".thumbnails/0.png", "__MACOSX/cat/._0.png",
            "cat/._0.png", "#recycle/9.png")
    yield put(root / "junk", two | {name: x[0] for name in junk}), 0, x, classes, ""
    files = {name.replace("/", "\\"): image for name, image in two.items()}
    yield put(root / "backslashes", files), 0, x, classes, ""
    (root / "with an empty folder" / "bird").mkdir(parents=True)
    yield put(root / "with an empty folder", two), 0, x, classes, ""

    store = put(root / "store", two)
    linked = put(root / "linked", {name: image for name, image in two.items() if "cat" in name})
    (linked / "dog").symlink_to(store / "dog")
    yield linked, 0, x, classes, ""
    (root / "files-linked").mkdir()
    for i, name in enumerate(two):
        (root / "files-linked" / f"{i}.png").symlink_to(store / name)
    yield root / "files-linked", 0, x, [0] * 6, ""
    loop = put(root / "loop", two)
    (loop / "cat" / "again").symlink_to("..")
    (loop / "cats").symlink_to("cat")
    (loop / "a-first").symlink_to("dog")
    yield loop, 0, x, classes, ""


def readable_zips(root):
    two, x, classes = two_classes()
    yield packed(root / "deflated.ZIP", two, zipfile.ZIP_DEFLATED), 0, x, classes, ""
    inside = {f"mydata/{name}": image for name, image in two.items()}
    junk = {"__MACOSX/mydata/cat/._0.png": x[0], "mydata/cat/.DS_Store": "", "mydata/cat/": "",
            "mydata/a.txt": ""}
    yield packed(root / "mac.zip", inside | junk), 0, x, classes, "files of other kinds passed over: 1,"
    yield packed(root / "dots.zip", {f"./{name}": image for name, image in two.items()}), 0, x, classes, ""
    files = {name.replace("/", "\\"): image for name, image in inside.items()}
    yield packed(root / "windows.zip", files | {"mydata\\cat\\": ""}), 0, x, classes, ""
    files = {zipfile.ZipInfo("0.png"): x[0], "0.png": x[1], "1.png": x[2]}
    yield packed(root / "twice.zip", files), 0, x[1:3], [0, 0], ""
    table = table_of(two, [0, 1] * 3)
    yield packed(root / "inside.zip", inside | {"mydata/dataset.json": table}), 0, x, [0, 1] * 3, ""
    table = table_of([f".\\{name}" for name in (*two, "gone.png")], [0, 1] * 4)
    yield packed(root / "slashes.zip", two | {"dataset.json": table}), 0, x, [0, 1] * 3, ""


def table_of(names, labels):
    """The text of a dataset.json."""
    return json.dumps(dict(labels=list(zip(names, labels))))


def readable_labels(root):
    x, names = noise(3, 4, 4, 3), ["00000/0.png", "00000/1.png", "00001/2.png"]
    files = dict(zip(names, x))
    for name, labels, classes in (
            ("whole", [2, 0, 1], [2, 0, 1]), ("whole-floats", [2.0, 0.0, 1.0], [2, 0, 1]),
            ("column", [[2], [0], [1]], [2, 0, 1]), ("one-hot", [[0, 1], [1, 0], [0, 1]], [1, 0, 1]),
            ("one-hot-floats", [[0, 0, 1.0], [1.0, 0, 0], [0, 1.0, 0]], [2, 0, 1])):
        table = {"dataset.json": table_of(names, labels)}
        yield put(root / f"labels-{name}", files | table), 0, x, classes, ""
        np.savez(root / f"labels-{name}.npz", x=x, y=np.array(labels))
        yield root / f"labels-{name}.npz", 0, x, classes, ""
    for name, labels, classes in (("null", None, [0] * 3), ("empty", [], [0] * 3),
                                  ("dict", dict(zip(names, [2, 0, 1])), [2, 0, 1])):
        table = json.dumps(dict(labels=labels))
        yield put(root / f"labels-{name}", files | {"dataset.json": table}), 0, x, classes, ""


def readable_arrays(root):
    x, labels = noise(5, 8, 8, 3), [2, 0, 1, 0, 2]

    def saved(name, **arrays):
        np.savez(root / name, **arrays)
        return root / name
    for images, classes in (("arr_0", "arr_1"), ("images", "labels"), ("image", "label"), ("x", "y"),
                            ("X", "Y"), ("samples", "labels"), ("x_train", "y_train")):
        yield saved(f"{images}.npz", **{images: x, classes: labels}), 0, x, labels, ""
    arrays = dict(x_test=x[:2], y_test=labels[:2], x_train=x, y_train=labels)
    yield saved("keras.npz", **arrays), 0, x, labels, "read x_train and y_train; left out x_test, y_test"
    yield saved("own.npz", faces=x), 0, x, [0] * 5, ""
    yield saved("named.npz", images=x, target=labels), 0, x, [0] * 5, "read images; left out target"
    yield saved("seeds.npz", arr_0=x, seeds=labels), 0, x, [0] * 5, ""
    pickles = np.array(["a", None], dtype=object)
    yield saved("pickles.npz", images=x, names=pickles), 0, x, [0] * 5, "left out names"
    yield saved("grey.npz", arr_0=x[..., :1]), 0, x[..., :1], [0] * 5, ""
    for name, array, shown in (("fortran.npy", np.asfortranarray(x), x), ("grey.npy", x[..., 0], x[..., :1]),
                               ("channels.npy", x.transpose(0, 3, 1, 2), x)):
        np.save(root / name, array)
        yield root / name, 0, shown, [0] * 5, ""
    (root / "SHOUTED.NPY").write_bytes((root / "fortran.npy").read_bytes())
    yield root / "SHOUTED.NPY", 0, x, [0] * 5, ""

    values = np.array(labels, np.uint8)
    folder = put(root / "mnist", {
        "train-images-idx3-ubyte.gz": gzip.compress(idx(x[..., 0])), "train-labels-idx1-ubyte": idx(values),
        "t10k-images-idx3-ubyte": idx(x[:2, ..., 1]),
        "t10k-labels-idx1-ubyte.gz": gzip.compress(idx(values[:2]))})
    yield folder, 0, x[..., :1], labels, ""
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
    drawn.putpixel((1, 1), 1)
    for name, content in (
            ("alpha.png", clear), ("alpha.webp", file(clear, "WEBP", lossless=True)),
            ("alpha.tif", file(clear, "TIFF")), ("grey.png", np.dstack([grey, clear[..., 3]])),
            ("palette.png", file(drawn, transparency=1)), ("palette.gif", file(drawn, "GIF", transparency=1)),
            ("colour.png", file(x, transparency=tuple(x[0, 0].tolist()))),
            ("one-grey.png", file(grey, transparency=int(grey[2, 2])))):
        say = f"{name} cannot be read (transparent in places, alpha under 255; paint it on a background)"
        yield put(root / f"no-{name}", {name: content}), 0, say
    for name, content, say in (
            *((f"deep{n}.png", deep_png(n), "16 bits a channel; convert it to 8 bits") for n in (1, 2, 3, 4)),
            ("deep.tif", file(grey.astype(np.uint16), "TIFF"), "16 bits a channel"),
            ("float.tif", file(grey.astype(np.float32), "TIFF"), "32 bits a channel"),
            ("moving.gif", moving("GIF"), "an animation, or several pages; split it"),
            ("moving.png", moving("PNG"), "an animation"), ("moving.webp", moving("WEBP"), "an animation"),
            ("pages.tif", moving("TIFF"), "several pages"),
            ("print.jpg", file(Image.fromarray(clear, "CMYK"), "JPEG"), "CMYK, 8 bits a channel; convert it"),
            ("text.webp", b"hello", "text.webp cannot be read as PNG"),
            ("torn.bmp", file(x, "BMP")[:70], "torn.bmp cannot be read")):
        yield put(root / f"no-{name}", {name: content}), 0, say
    files = {"0.png": x, "1.png": x[:3]}
    yield put(root / "two sizes", files), 0, "1.png is 4x3, 0.png is 4x4; give --resolution for one size"


def refused_sources(root):
    x, none = noise(4, 4, 3), '{"labels": null}'
    for name, target in (("gone.png", "nowhere"), ("gone", "nowhere"), ("itself", "itself")):
        folder = put(root / f"broken-{name}", {"0.png": x})
        (folder / name).symlink_to(target)
        yield folder, 0, f"{name} is a link that leads nowhere, or no file; remove it"
    for name, files, say in (
            ("halves", {"train/cat/0.png": x, "test/cat/0.png": x}, "which are no classes; give one"),
            ("half", {"train/0.png": x, "train/dataset.json": table_of(["0.png"], [1]), "more/0.png": x},
             "train/dataset.json of"),
            ("twice", {"a/0.png": x, "dataset.json": none, "a/dataset.json": none}, "keep one, at the top"),
            ("others", {"a.txt": "", "b.heic": "", "@eaDir/0.png": x}, "holds no images (.png"),
            ("empty", {".keep": ""}, "holds no images")):
        yield put(root / f"source-{name}", files), 0, say
    (root / "images.tar").write_bytes(b"")
    yield root / "images.tar", 0, "is not an image folder, a zip, an npz, npy or IDX file"


def refused_zips(root):
    x = noise(4, 4, 3)
    # a member's flags and method stand at 6 and 8 of its own header, at 8 and 10 of that in the list
    for name, field, value in (("lzma", 2, zipfile.ZIP_LZMA), ("zstd", 2, 93), ("locked", 0, 1)):
        path = packed(root / f"{name}.zip", {"0.png": x})
        content = bytearray(path.read_bytes())
        content[6 + field] = content[content.index(b"PK\x01\x02") + 8 + field] = value
        path.write_bytes(content)
        yield path, 0, "0.png is encrypted or compressed in an unusual way; pack it stored or deflated"
    link = zipfile.ZipInfo("0.png")
    link.external_attr = 0o120777 << 16
    yield packed(root / "link.zip", {link: b"../store/0.png"}), 0, "link.zip/0.png cannot be read as PNG"
    yield packed(root / "broken.zip", {"0.png": b"PNG"}), 0, "broken.zip/0.png cannot be read as PNG"


def refused_labels(root):
    x, names, nan = noise(3, 4, 4, 3), [f"{i}.png" for i in range(3)], float("nan")
    files = dict(zip(names, x))
    for labels in ([[1, 0, 1]] * 3, [[0.5, 0.5]] * 3, [[-1, 1]] * 3, [[nan, 1]] * 3, [[0, 0]] * 3,
                   [[2, 0]] * 3, [0.5, 0, 1], [0, 1, nan], [0, 1, float("inf")], [-1, 0, 1], ["a", "b", "a"]):
        say = "do not give each of 3 images one class; make them whole numbers from 0"
        name = f"wrong-{labels[0]}-{labels[2]}"
        yield put(root / name, files | {"dataset.json": table_of(names, labels)}), 0, say
        np.savez(root / f"{name}.npz", images=x, labels=np.array(labels))
        yield root / f"{name}.npz", 0, say
    none = "does not give every image a label"
    for name, table, say in (("deep", table_of(names, [[[0]]] * 3), "do not give each of 3 images one class"),
                             ("ragged", table_of(names, [[1, 0], 1, 1]), none),
                             ("missing", table_of(names[:2], [0, 1]), none + " (KeyError('2.png')); write"),
                             ("bare", '{"0.png": 1}', none), ("torn", "{", none)):
        yield put(root / f"wrong-{name}", files | {"dataset.json": table}), 0, say


def refused_arrays(root):
    x = noise(5, 8, 8, 3)
    for name, array, say in (
            ("floats", x / 255, "holds float64 [5, 8, 8, 3]; images must be uint8 [N, H, W, C]"),
            ("bits", x > 127, "holds bool"), ("deep", x.astype(np.uint16), "holds uint16"),
            ("one", x[0], "save one as x[None]"), ("none", x[:0], "holds uint8 [0, 8, 8, 3]"),
            ("clear", np.concatenate([x, x[..., :1]], 3), "without alpha x[..., :3]"),
            ("pair", x[..., :2], "1 or 3 channels")):
        np.savez(root / f"array-{name}.npz", samples=array)
        yield root / f"array-{name}.npz", 0, say
        np.save(root / f"array-{name}.npy", array)
        yield root / f"array-{name}.npy", 0, say
    np.save(root / "flat.npy", x.ravel())
    yield root / "flat.npy", 0, "holds uint8 [960]"
    objects = np.empty(5, object)
    objects[:] = list(x)
    np.savez(root / "objects.npz", images=objects)
    yield root / "objects.npz", 0, "of plain numbers (Object arrays cannot be loaded"
    np.savez(root / "keys.npz", encoded=np.zeros((5, 7)), ids=np.arange(5))
    yield root / "keys.npz", 0, "its arrays are encoded, ids; call one images"

    files = {f"emnist-{part}-images-idx3-ubyte": idx(x[..., 0]) for part in ("letters", "digits")}
    yield put(root / "several", files), 0, "several sets of images"
    for name, content, say in (
            ("torn", idx(x[..., 0])[:99], "cannot reshape array of size 83"),
            ("flat", idx(x.ravel()), "holds an array [960]"),
            ("ints", b"\0\0\x0c\x01" + bytes(8), "does not begin"),
            ("large", b"\0\0\x08\x03" + b"\xff" * 12, "not a readable IDX file")):
        yield put(root / f"idx-{name}", {"a-images-idx3-ubyte": content}), 0, say
    torn = put(root / "idx-gz", {"a-images-idx3-ubyte.gz": gzip.compress(idx(x[..., 0]))[:60]})
    yield torn, 0, "is not a readable IDX file"
