"""Your own images: files and folders as they come, the commands, and a run that survives, with tiny nets."""

import csv
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from screenshots import browser_path, launch
from torchvision import datasets

import bitlib.cli as module
from bitlib.checkpoints import load_pretrained, read_metadata, save_checkpoint
from bitlib.checks.cli import check_on_white, check_threshold, check_upright
from bitlib.cli import (
    BadImageError,
    DataError,
    LabelledImages,
    check_images,
    hugging_face_images,
    image_folder,
    image_list,
    load_run,
    main,
    named_images,
    open_images,
    read_image,
    split_examples,
    torchvision_images,
    worst_mistakes,
)
from bitlib.data import load_task, package_file
from bitlib.evaluate import evaluate, evaluate_suite, read_suite
from bitlib.finetune import finetune
from bitlib.hyperrule import hyperrule
from bitlib.resnet import create_model

ROOT = Path(__file__).resolve().parent.parent


def photo(seed=0, size=(30, 20)):
    """A smooth picture, PIL RGB, (width, height) in pixels."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def pixels(image):
    return np.asarray(image).transpose(2, 0, 1)


def saved(image, suffix, **options):
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that claims a size and holds nothing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(64))
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, body)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# ---------------------------------------------------------------- twenty kinds of odd picture that must be read


def grey16():
    return saved(Image.fromarray(np.asarray(photo().convert("L")).astype(np.uint16) * 256 + 7), "png")


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(photo().rotate(90, expand=True), "tif", exif=exif)


def transparent():
    image = photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return saved(image, "png")


def on_white():
    alpha = np.asarray(Image.linear_gradient("L").resize((30, 20)))[..., None] / 255
    return (np.asarray(photo()) * alpha + 255 * (1 - alpha)).transpose(2, 0, 1)


def grey():
    return np.repeat(np.asarray(photo().convert("L"))[None], 3, axis=0)


def few_colours():
    return pixels(photo().quantize(256).convert("RGB"))


def two_colours():
    return np.repeat(np.asarray(photo().convert("1"), dtype=float)[None] * 255, 3, axis=0)


def frames(suffix):
    return saved(photo(), suffix, save_all=True, append_images=[photo(1), photo(2)])


ODD = {
    "grey.png": (lambda: saved(photo().convert("L"), "png"), grey, 0),
    "grey-alpha.png": (lambda: saved(photo().convert("LA"), "png"), grey, 0),
    "grey16.png": (grey16, grey, 0),
    "black-and-white.png": (lambda: saved(photo().convert("1"), "png"), two_colours, 0),
    "palette.png": (lambda: saved(photo().quantize(256), "png"), few_colours, 0),
    "palette-transparent.png": (lambda: saved(photo().quantize(255), "png", transparency=0), None, 0),
    "palette.gif": (lambda: saved(photo().quantize(256), "gif"), few_colours, 0),
    "rgba.png": (transparent, on_white, 2),
    "rgba.webp": (
        lambda: saved(Image.open(io.BytesIO(transparent())), "webp", lossless=True, exact=True), on_white, 2),
    "cmyk.jpg": (lambda: saved(photo().convert("CMYK"), "jpg", quality=100, subsampling=0),
                 lambda: pixels(photo()), 12),
    "ycbcr.tif": (lambda: saved(photo().convert("YCbCr"), "tif"), lambda: pixels(photo()), 4),
    "jpeg.jpg": (lambda: saved(photo(), "jpg", quality=100, subsampling=0), lambda: pixels(photo()), 12),
    "progressive.jpg": (lambda: saved(photo(), "jpg", quality=100, subsampling=0, progressive=True),
                        lambda: pixels(photo()), 12),
    "rotated.tif": (rotated, lambda: pixels(photo()), 0),
    "animated.gif": (lambda: frames("gif"), few_colours, 12),
    "animated.webp": (lambda: saved(photo(), "webp", save_all=True, append_images=[photo(1)], lossless=True),
                      lambda: pixels(photo()), 2),
    "pages.tif": (lambda: frames("tif"), lambda: pixels(photo()), 0),
    "lzw.tiff": (lambda: saved(photo(), "tif", compression="tiff_lzw"), lambda: pixels(photo()), 0),
    "one-pixel.bmp": (lambda: saved(Image.new("RGB", (1, 1), (9, 8, 7)), "bmp"),
                      lambda: np.array([9, 8, 7]).reshape(3, 1, 1), 0),
    "really-a-jpeg.png": (lambda: saved(photo(), "jpg", quality=100, subsampling=0), lambda: pixels(photo()), 12),
    "thin.png": (lambda: saved(photo(size=(900, 1)), "png"), lambda: pixels(photo(size=(900, 1))), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_read_as_a_person_sees_them(name, tmp_path):
    make, expected, tolerance = ODD[name]
    (tmp_path / name).write_bytes(make())
    image = read_image(tmp_path / name)
    assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3
    if expected is not None:
        wanted = np.asarray(expected(), dtype=float)
        assert tuple(image.shape) == wanted.shape
        assert np.abs(image.numpy() - wanted).mean() <= tolerance / 2 + 0.5
        assert np.abs(image.numpy() - wanted).max() <= 2 * tolerance + 1


# ---------------------------------------------------------------- twenty kinds of broken picture


def flipped_byte():
    data = bytearray(saved(photo(), "png"))
    data[data.index(b"IDAT") + 12] ^= 0xFF
    return bytes(data)


BROKEN = {
    "empty.png": (lambda: b"", "the file is empty"),
    "text.jpg": (lambda: b"not a picture", "not a picture in a format"),
    "page.jpg": (lambda: b"<!DOCTYPE html><html>404 Not Found</html>", "not a picture in a format"),
    "zeros.png": (lambda: bytes(4096), "not a picture in a format"),
    "noise.jpg": (lambda: np.random.default_rng(0).bytes(4096), "not a picture in a format"),
    "half.png": (lambda: saved(photo(size=(200, 200)), "png")[:6000], "cannot be decoded"),
    "half.jpg": (lambda: saved(photo(size=(200, 200)), "jpg")[:1500], "cannot be decoded"),
    "half.webp": (lambda: saved(photo(size=(200, 200)), "webp")[:800], "not a picture|cannot be decoded"),
    "half.tif": (lambda: saved(photo(size=(200, 200)), "tif")[:9000], "not a picture|cannot be decoded"),
    "half.gif": (lambda: saved(photo(size=(200, 200)).quantize(16), "gif")[:700], "cannot be decoded"),
    "header-only.jpg": (lambda: saved(photo(), "jpg")[:20], "not a picture|cannot be decoded"),
    "header-only.png": (lambda: png_header(30, 20), "not a picture|cannot be decoded"),
    "flipped.png": (flipped_byte, "cannot be decoded"),
    "huge.png": (lambda: png_header(9_000, 9_000), r"9000 x 9000 pixels, more than the limit of 64,000,000"),
    "bomb.png": (lambda: png_header(200_000, 200_000), "far more pixels than the limit of 64,000,000"),
    "nothing.png": (lambda: png_header(0, 20), "not a picture|cannot be decoded"),
    "float.tif": (lambda: saved(Image.fromarray(np.full((5, 5), np.nan, np.float32)), "tif"), "no fixed range"),
    "int32.tif": (lambda: saved(Image.fromarray(np.full((5, 5), 10**6, np.int32)), "tif"), "no fixed range"),
    "drawing.png": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture in a format"),
    "script.jpg": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in a format"),
    "archive.png": (lambda: b"PK\x03\x04" + bytes(100), "not a picture in a format"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_say_why(name, tmp_path):
    make, reason = BROKEN[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(BadImageError, match=reason) as error:
        read_image(tmp_path / name)
    assert error.value.path == str(tmp_path / name) and "\n" not in error.value.reason


def test_what_is_no_file_says_so(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, reason in (
        ("folder.png", "a folder"),
        ("pipe.png", "not a regular file"),
        ("dangling.png", "no such file"),
        ("loop.png", "symbolic links"),
        ("missing.png", "no such file"),
    ):
        with pytest.raises(BadImageError, match=reason):
            read_image(tmp_path / name)


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    photo().save(path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)  # the tests may run as root, whom no mode stops
    with pytest.raises(BadImageError, match="Permission denied"):
        read_image(path)


def test_the_limit_of_pixels_is_the_callers(tmp_path):
    photo(size=(100, 100)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=10_000).shape == (3, 100, 100)
    with pytest.raises(BadImageError, match=r"limit of 9,999"):
        read_image(tmp_path / "a.png", max_pixels=9_999)


# ---------------------------------------------------------------- folders


def make_folder(root, classes=("cat", "dog", "owl"), n=6, size=(20, 16), seed=0):
    """A colour for each class, with noise: a task that a net learns in a few steps."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            array = rng.integers(0, 110, (size[1], size[0], 3))
            array[..., label % 3] += 140
            Image.fromarray(array.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def test_a_folder_as_torchvision_reads_it(tmp_path):
    make_folder(tmp_path)
    photo().save(tmp_path / "cat" / "UPPER.PNG")
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "__MACOSX").mkdir()
    ours, theirs = image_folder(tmp_path), datasets.ImageFolder(str(tmp_path), allow_empty=True)
    assert list(ours.classes) == [name for name in theirs.classes if name != "__MACOSX"] == ["cat", "dog", "owl"]
    assert [str(path) for path in ours.paths] == [path for path, _ in theirs.samples]
    assert len(ours) == 19 and ours.left_out == [] and ours.names[0] == "cat/0.png"
    assert ours[3][0].shape == (3, 16, 20) and ours[18] is not None and ours[18][1] == 2


def empty(root):
    pass


def flat(root):
    photo().save(root / "a.png")


def only_text(root):
    (root / "notes.txt").write_text("x")


def one_class(root):
    make_folder(root, ["cat"])


def empty_class(root):
    make_folder(root)
    (root / "fox").mkdir()


def nested(root):
    make_folder(root)
    make_folder(root / "dog" / "poodle", ["small"])


def splits(root):
    make_folder(root / "train")
    make_folder(root / "val")


def twins_by_case(root):
    make_folder(root, ["Cat", "cat"])


def twins_by_accent(root):
    make_folder(root, ["caf\u00e9", "cafe\u0301"])


def link_to_itself(root):
    make_folder(root)
    (root / "fox").symlink_to(root / "fox")


def link_loop(root):
    make_folder(root)
    (root / "dog" / "again").symlink_to(root)


def class_of_text(root):
    make_folder(root)
    (root / "fox").mkdir()
    (root / "fox" / "readme.md").write_text("x")


BROKEN_FOLDERS = [
    (empty, "no sub-folder; it needs one for each class"),
    (flat, "pictures lie in .* itself; put those of each class into a sub-folder"),
    (only_text, "no sub-folder"),
    (one_class, "single class, 'cat'; there is nothing to tell apart"),
    (empty_class, "class folder 'fox' .* holds no picture; fill it or remove it"),
    (nested, r"dog/poodle in .* is a folder inside a class folder"),
    (splits, r"train/cat in .* did you mean .*train\?"),
    (twins_by_case, "classes 'Cat' and 'cat'; give them one name"),
    (twins_by_accent, "give them one name"),
    (link_to_itself, "symbolic link that leads back"),
    (link_loop, "symbolic link that leads back"),
    (class_of_text, "class folder 'fox' .* holds no picture"),
]


@pytest.mark.parametrize(("make", "words"), BROKEN_FOLDERS, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_folders_say_what_to_do(make, words, tmp_path, capsys):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(DataError, match=words):
        image_folder(root)
    assert command("finetune", root, "--out", tmp_path / "RUN", "--model", "BiT-mini-M") == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "RUN").exists()


def test_folders_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="not there"):
        image_folder(tmp_path / "x")
    (tmp_path / "x").write_text("")
    with pytest.raises(DataError, match="not a folder"):
        image_folder(tmp_path / "x")
    with pytest.raises(DataError, match="no folder, no CSV file, and not the name of a data set .cifar10"):
        open_images(str(tmp_path / "y"))

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be read: permission denied"):
        image_folder(tmp_path)


def test_what_is_not_taken_is_listed(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "list.csv").write_text("x")
    (tmp_path / "dog" / "2.png").write_bytes(b"")
    checked = check_images(image_folder(tmp_path))
    assert dict(checked.left_out) == {
        "list.csv": "lies beside the class folders",
        "cat/notes.txt": "not a picture, by its ending",
        "dog/2.png": "the file is empty",
    }
    assert len(checked.good) == 17 == len(checked.digests) == len(checked.sizes) == len(checked.small)
    assert checked.sizes[0] == (16, 20) and len(set(checked.digests)) == 17


def test_class_folders_may_be_links(tmp_path):
    make_folder(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert len(image_folder(tmp_path / "data")) == 12


def test_pictures_are_kept_while_they_fit(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.setattr(module, "KEEP_BYTES", 3 * 960)
    files = image_folder(tmp_path)
    first = [files[i][0] for i in range(6)]
    for path in files.paths:
        path.unlink()
    assert all(torch.equal(files[i][0], first[i]) for i in range(3))
    with pytest.raises(BadImageError, match="no such file"):
        files[3]


# ---------------------------------------------------------------- lists and data sets of other people


def test_a_list(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbflabel, path,more\r\ncat,cat/0.png,1\r\nb,dog/1.png,2\r\n")
    files = open_images(str(tmp_path / "list.csv"))
    assert files.classes == ("b", "cat") and files.labels.tolist() == [1, 0] and files[0][0].shape == (3, 16, 20)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "columns path and label; it has -"),
        (b"cat/0.png,cat\n", "columns path and label; it has cat/0.png, cat"),
        (b"path,label\n", "lists no picture"),
        (b"path,label\na.png,cat\nb.png\n", "line 3: the label is missing"),
        (b"path,label\n,cat\n", "line 2: the path is missing"),
        (b"path,label\na.png,cat\nb.png,dog\na.png,dog\n", "line 4: a.png is already listed in line 2"),
        (b"path,label\na.png,cat\nb.png,Cat\n", "classes 'Cat' and 'cat'|classes 'cat' and 'Cat'"),
        (b"path,label\na.png,cat\n", "single class, 'cat'"),
        (b"path,label\n\xff\xfe.png,cat\n", "not a text file in UTF-8"),
    ],
)
def test_broken_lists_say_what_to_do(text, words, tmp_path):
    (tmp_path / "list.csv").write_bytes(text)
    with pytest.raises(DataError, match=words):
        image_list(tmp_path / "list.csv")


def test_a_listed_file_that_is_missing_is_left_out(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "list.csv").write_text("path,label\ncat/0.png,cat\ngone.png,cat\ndog/0.png,dog\n")
    checked = check_images(image_list(tmp_path / "list.csv"))
    assert checked.good == [0, 2] and checked.left_out == [("gone.png", "no such file or directory")]


def fake_cifar(root):
    """CIFAR-10 as torchvision unpacks it, with 20 random images a file."""
    import pickle

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": list(range(10)) * 2}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


def test_named_sets(tmp_path, monkeypatch):
    fake_cifar(tmp_path)
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    monkeypatch.setenv("BITLIB_DATA", str(tmp_path))
    train, test = open_images("cifar10"), open_images("cifar10", "test")
    assert (len(train), len(test), train.classes[3]) == (100, 20, "cat") and train.names[7] == "cifar10/train[7]"
    assert train[5][0].shape == (3, 32, 32) and train[5][1] == 5
    with pytest.raises(DataError, match="no data set 'mnist'; by name there are cifar10"):
        named_images("mnist")


def test_a_named_set_without_a_network_says_so(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in module.NAMED_SETS:
        with pytest.raises(DataError, match=f"{name} cannot be had: .* Put torchvision's copy of it into"):
            named_images(name, root=tmp_path)


def test_torchvision_sets_decode_nothing_to_know_their_labels(tmp_path):
    make_folder(tmp_path)
    folder = datasets.ImageFolder(str(tmp_path))
    folder.loader = None  # would fail at the first image
    images = torchvision_images(torch.utils.data.Subset(folder, [0, 7, 13]), "mine")
    assert images.classes == ("cat", "dog", "owl") and images.labels.tolist() == [0, 1, 2]
    assert images.names == ["mine[0]", "mine[1]", "mine[2]"]
    checked = check_images(images)
    assert checked.good == [] and "cannot be decoded" in checked.left_out[0].reason


class Rows(list):
    """As much of a Hugging Face data set as we use: rows by number, columns by name, features."""

    def __init__(self, rows, features):
        super().__init__(rows)
        self.features = features

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def test_hugging_face_sets():
    Image_ = type("Image", (), {})
    ClassLabel = type("ClassLabel", (), {"names": ["ham", "spam"]})
    features = {"id": type("Value", (), {})(), "picture": Image_(), "kind": ClassLabel()}
    rows = Rows([{"id": i, "picture": photo(i), "kind": i % 2} for i in range(4)], features)
    images = hugging_face_images(rows)
    assert images.classes == ("ham", "spam") and images.labels.tolist() == [0, 1, 0, 1]
    assert (images[3][0].numpy() == pixels(photo(3))).all() and images[3][1] == 1
    with pytest.raises(DataError, match="one column of type ClassLabel is needed; the columns are"):
        hugging_face_images(Rows(rows, {"picture": Image_()}))


def test_real_hugging_face_sets():
    library = pytest.importorskip("datasets")
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["a", "b"])})
    data = library.Dataset.from_dict({"image": [photo(0), photo(1)], "label": [1, 0]}, features=features)
    images = hugging_face_images(data)
    assert images.labels.tolist() == [1, 0] and (images[1][0].numpy() == pixels(photo(1))).all()


def test_labelled_images_take_tensors():
    images = LabelledImages([(torch.zeros(3, 4, 5, dtype=torch.uint8), 0)], [0], ["a"])
    assert images[0][0].shape == (3, 4, 5)


# ---------------------------------------------------------------- the split


def test_the_split_keeps_identical_pictures_together_and_classes_in_proportion():
    labels = torch.arange(4).repeat_interleave(25)
    groups = [str(i - 1 if i % 10 == 1 else i) for i in range(100)]  # every tenth picture has a twin
    seen = set()
    for seed in range(20):
        train, held_out = split_examples(labels, groups, 0.2, seed)
        assert sorted(train + held_out) == list(range(100))
        assert not {groups[i] for i in train} & {groups[i] for i in held_out}
        assert all(5 <= n <= 7 for n in labels[held_out].bincount(minlength=4).tolist())
        seen.add(tuple(held_out))
    assert len(seen) == 20 and split_examples(labels, groups, 0.2, 3) == split_examples(labels, groups, 0.2, 3)


def test_the_split_at_its_edges():
    assert split_examples([0, 0, 1], list("abc"), 0.0) == ([0, 1, 2], [])
    train, held_out = split_examples([0, 0, 1], list("abc"), 0.2)
    assert len(held_out) == 1 and held_out[0] in (0, 1) and 2 in train
    assert split_examples([0, 0, 0, 1, 1], list("aaabb"), 0.9) == ([0, 1, 2, 3, 4], [])
    for bad in (-0.1, 1.0):
        with pytest.raises(ValueError, match="share"):
            split_examples([0], ["a"], bad)


# ---------------------------------------------------------------- the commands


def command(*words):
    """Run the command line in this process; its exit status."""
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return done.value.code or 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of a small random net."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    return save_checkpoint(create_model("R14x0.25", num_classes=7), path)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A folder with oddities, and a finished run on it."""
    home = tmp_path_factory.mktemp("finished")
    data = make_folder(home / "data", ["cat", "dog <b>&", "大"], n=10)
    (data / "cat" / "broken.png").write_bytes(b"")
    (data / "cat" / "1.png").write_bytes((data / "cat" / "0.png").read_bytes())
    (data / "大" / "copy.png").write_bytes((data / "cat" / "2.png").read_bytes())
    assert command("finetune", data, "--model", tiny, "--out", home / "RUN", "--steps", "20", "--seed", "1") == 0
    return home


def assert_same_model(a, b):
    """Every weight to the last bit, and what the file says of itself; its header has no fixed order."""
    one, two = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert read_metadata(a / "model.safetensors") == read_metadata(b / "model.safetensors")
    results = [json.loads((folder / "run.json").read_text())["result"] for folder in (a, b)]
    assert results[0] == results[1] and len(results[0]["weights"]) == 64


def test_a_run_folder_holds_everything(finished, tiny):
    run = finished / "RUN"
    assert sorted(path.name for path in run.iterdir()) == [
        *("files.csv", "labels.json", "left_out.csv", "log.jsonl", "model.safetensors"),
        *("report.html", "rule.json", "run.json"),
    ]
    assert json.loads((run / "labels.json").read_text()) == ["cat", "dog <b>&", "大"]
    about = json.loads((run / "run.json").read_text())
    rule = json.loads((run / "rule.json").read_text())
    assert about["settings"]["rule"] == rule and rule["steps"] == 20 and rule["crop"] == 64
    assert about["command"].startswith("bitlib finetune ") and about["command"].endswith("--steps 20 --seed 1")
    assert about["versions"]["torch"] == torch.__version__
    assert about["result"]["n"] == 6 and 0 <= about["result"]["top1"] <= 1
    with open(run / "files.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 31 and sum(row["part"] == "held out" for row in rows) == 6
    sides = {}
    for row in rows:
        sides.setdefault(row["sha256"], set()).add(row["part"])
    assert all(len(parts) == 1 for parts in sides.values()) and len(sides) == 29
    assert (run / "left_out.csv").read_text() == "file,reason\ncat/broken.png,the file is empty\n"
    assert len((run / "log.jsonl").read_text().splitlines()) >= 10
    assert (run / "model.safetensors").stat().st_mode == (run / "rule.json").stat().st_mode


def test_the_command_can_be_given_again_from_what_the_folder_says(finished, tmp_path):
    import shlex

    about = json.loads((finished / "RUN" / "run.json").read_text())
    words = shlex.split(about["command"])[1:]
    words[words.index("--out") + 1] = str(tmp_path / "AGAIN")
    assert command(*words) == 0
    assert_same_model(tmp_path / "AGAIN", finished / "RUN")
    for name in ("files.csv", "left_out.csv", "rule.json", "labels.json"):
        assert (tmp_path / "AGAIN" / name).read_bytes() == (finished / "RUN" / name).read_bytes()


def test_the_command_is_the_library(finished, tiny):
    """The weights are those of `finetune` on the pictures that the run lists."""
    files = image_folder(finished / "data")
    with open(finished / "RUN" / "files.csv", newline="") as file:
        listed = [row["picture"] for row in csv.DictReader(file) if row["part"] == "training"]
    train = torch.utils.data.Subset(files, [files.names.index(name) for name in listed])
    net = load_pretrained(tiny)
    rule = hyperrule(len(train), (16, 20), model=net).with_steps(20)
    by_hand = finetune(net, train, rule, seed=1, progress=False)
    loaded = load_run(finished / "RUN")
    assert loaded.classes == by_hand.classes == files.classes
    for (name, a), b in zip(by_hand.model.state_dict().items(), loaded.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_finished_run_is_not_repeated_and_another_is_refused(finished, tiny, capsys):
    words = ["finetune", finished / "data", "--model", tiny, "--out", finished / "RUN", "--steps", "20", "--seed"]
    before = (finished / "RUN" / "model.safetensors").stat().st_mtime_ns
    assert command(*words, 1) == 0
    assert "is finished; nothing to do" in capsys.readouterr().err
    assert command(*words, 2) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and "holds another run: " in err and "seed was 1, is 2" in err
    assert (finished / "RUN" / "model.safetensors").stat().st_mtime_ns == before


def test_other_peoples_folders_are_left_alone(tiny, tmp_path, capsys):
    make_folder(tmp_path / "data")
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "thesis.tex").write_text("x")
    assert command("finetune", tmp_path / "data", "--model", tiny, "--out", tmp_path / "RUN", "--steps", "2") == 1
    assert "holds other files (thesis.tex)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "RUN").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("x")
    assert command("finetune", tmp_path / "data", "--model", tiny, "--out", tmp_path / "file", "--steps", "2") == 1
    assert "cannot use" in capsys.readouterr().err


def test_evaluate_agrees_with_the_library_and_notices_what_was_learned_from(finished, tmp_path, capsys):
    data = make_folder(tmp_path / "test", ["cat", "dog <b>&"], seed=5)
    (data / "cat" / "seen.png").write_bytes((finished / "data" / "cat" / "0.png").read_bytes())
    (data / "cat" / "bad.png").write_bytes(b"x")
    assert command("evaluate", finished / "RUN", data, "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "1 of these 13 pictures are among those it learned from" in err or found["learned_from"] == 0
    loaded = load_run(finished / "RUN")
    files = image_folder(data)
    wanted = evaluate(
        loaded.model, torch.utils.data.Subset(files, [i for i in range(14) if files.names[i] != "cat/bad.png"])
    )
    assert found["top1"] == wanted["top1"] and found["n"] == 13 and found["nll"] == pytest.approx(wanted["nll"])
    assert found["left_out"][0]["file"] == "cat/bad.png" and found["classes"] == ["cat", "dog <b>&", "大"]
    assert command("evaluate", finished / "RUN", data) == 0
    assert "top-1" in capsys.readouterr().out
    assert command("evaluate", finished / "RUN", data, "--on-bad-image", "stop") == 1
    assert "1 files in" in capsys.readouterr().err
    make_folder(tmp_path / "strange", ["cat", "ox"])
    assert command("evaluate", finished / "RUN", tmp_path / "strange") == 1
    assert "the class 'ox' is not one of" in capsys.readouterr().err


def test_evaluate_numbers_classes_as_the_run_does(finished, tmp_path, capsys):
    make_folder(tmp_path / "one", ["大"], seed=9)  # class 0 here, class 2 there, and blue in neither colour
    for path in (tmp_path / "one" / "大").iterdir():
        array = np.random.default_rng(0).integers(0, 110, (16, 20, 3))
        array[..., 2] += 140
        Image.fromarray(array.astype(np.uint8)).save(path)
    assert command("evaluate", finished / "RUN", tmp_path / "one", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [sum(row) for row in found["confusion"]] == [0, 0, 6]


def test_a_suite_is_the_librarys_and_goes_on_from_its_file(tiny, tmp_path, capsys, monkeypatch):
    words = ["evaluate", tiny, "--suite", "vtab-mini", "--methods", "ridge", "probe", "--tasks", "faces", "--seeds", 0]
    words += ["--examples", 20, "--out", tmp_path / "suite.json"]
    assert command(*words) == 0
    out, err = capsys.readouterr()
    assert "vtab-mini, 20 training examples a task" in out and "(b) tiny probe, 20 examples" in out and not err
    found = read_suite(tmp_path / "suite.json")
    call = dict(name="tiny", methods=("ridge", "probe"), tasks=("faces",), seeds=(0,), examples=20)
    assert found == evaluate_suite(load_pretrained(tiny), **call)
    assert f"{'faces':14s}" + "".join(f"{100 * row['top1']:8.1f}" for row in found["rows"]) in out

    def refuse(*args, **kwargs):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr("bitlib.evaluate.extract_features", refuse)
    assert command(*words, "--seeds", 0, 0, "--json") == 0  # a seed that is given twice is one
    assert json.loads(capsys.readouterr().out) == found


def test_a_suite_takes_runs_and_names_and_all_examples(finished, capsys):
    words = ["--suite", "vtab-mini", "--tasks", "faces", "--seeds", 0, "--json", "--examples", "all"]
    assert command("evaluate", finished / "RUN", *words) == 0
    (row,) = (found := json.loads(capsys.readouterr().out))["rows"]
    model = load_run(finished / "RUN").model
    assert found == evaluate_suite(model, name="RUN", methods=("ridge",), tasks=("faces",), examples=None)
    assert command("evaluate", "BiT-mini-M", *words) == 0
    (other,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["model"], other["model"], other["examples"]) == ("RUN", "BiT-mini-M", "all")


def test_a_suite_says_which_task_could_not_be_loaded(tiny, capsys, monkeypatch):
    def missing(name):
        raise OSError("no such picture")

    monkeypatch.setattr("bitlib.evaluate.load_task", missing)
    assert command("evaluate", tiny, "--suite", "vtab-mini", "--tasks", "faces") == 1
    out, err = capsys.readouterr()
    assert err == "error: the task faces could not be loaded: OSError: no such picture\n" and not out


def test_predict(finished, tmp_path, capsys):
    good = [finished / "data" / "cat" / f"{i}.png" for i in (3, 4)]
    assert command("predict", finished / "RUN", *good) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(path) for path in good]
    assert all(0 < float(line.split("\t")[2]) <= 1 and line.split("\t")[1] in "cat dog <b>& 大" for line in lines)
    (tmp_path / "bad.png").write_bytes(b"x")
    assert command("predict", finished / "RUN", good[0], tmp_path / "bad.png", tmp_path, good[1], "--json") == 1
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [("error" in row) for row in rows] == [False, True, True, False] and err.count("error: ") == 2
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)
    assert rows[0]["probability"] == max(rows[0]["probabilities"].values())
    assert rows[0]["probability"] == pytest.approx(float(lines[0].split("\t")[2]), abs=1e-4)
    assert command("predict", tmp_path, good[0]) == 1
    assert "is no run of `bitlib finetune`" in capsys.readouterr().err


def test_options(tiny, tmp_path, capsys):
    data, other = make_folder(tmp_path / "data", n=8), make_folder(tmp_path / "other", n=3, seed=7)
    (other / "cat" / "same.png").write_bytes((data / "cat" / "0.png").read_bytes())
    words = ["finetune", data, "--model", tiny, "--out", tmp_path / "RUN", "--steps", "10", "--val", other]
    words += ["--shots", "2", "--variant", "official", "--batch-size", "8", "--no-flip", "--no-crop"]
    assert command(*words, "--trainable", "head", "--keep", "best", "--micro-batch", "3") == 0
    rule = json.loads((tmp_path / "RUN" / "rule.json").read_text())
    assert (rule["variant"], rule["batch_size"], rule["flip"], rule["random_crop"]) == ("official", 8, False, False)
    assert rule["warmup_steps"] == 2 and rule["decay_steps"] == [4, 6, 8] and rule["base_lr"] == 0.03 / 4
    with open(tmp_path / "RUN" / "files.csv", newline="") as file:
        parts = [row["part"] for row in csv.DictReader(file)]
    assert parts.count("training") == 6 and parts.count("held out") == 10
    start, end = load_pretrained(tiny), load_run(tmp_path / "RUN").model
    assert torch.equal(start.block4.unit01.conv1.weight, end.block4.unit01.conv1.weight)
    page = (tmp_path / "RUN" / "report.html").read_text()
    assert "chose the checkpoint" in page and "--trainable head" in page and "--no-flip" in page


def test_a_held_out_copy_of_a_training_picture_is_reported(tiny, tmp_path, capsys):
    data, other = make_folder(tmp_path / "data"), make_folder(tmp_path / "other", n=3, seed=7)
    (other / "owl" / "same.png").write_bytes((data / "owl" / "4.png").read_bytes())
    Image.fromarray(np.asarray(Image.open(data / "dog" / "3.png")) // 2 * 2).save(other / "dog" / "coarser.png")
    out = tmp_path / "RUN"
    assert command("finetune", data, "--model", tiny, "--out", out, "--steps", "2", "--val", other) == 0
    assert "2 held-out pictures are in the training part too, or nearly" in capsys.readouterr().err
    page = (out / "report.html").read_text()
    assert "In both parts: 2 pairs" in page and "owl/same.png" in page and "dog/coarser.png" in page


def test_a_class_of_one_picture_is_learned_and_not_measured(tiny, tmp_path, capsys):
    data = make_folder(tmp_path / "data", n=5)
    (data / "rare").mkdir()
    photo().save(data / "rare" / "only.png")
    assert command("finetune", data, "--model", tiny, "--out", tmp_path / "RUN", "--steps", "2") == 0
    assert "nothing is held out of 1 classes, such as 'rare'" in capsys.readouterr().err
    assert load_run(tmp_path / "RUN").classes == ("cat", "dog", "owl", "rare")


def test_bad_pictures_stop_the_run_if_asked(tiny, tmp_path, capsys):
    data = make_folder(tmp_path / "data")
    (data / "cat" / "x.png").write_bytes(b"x")
    words = ["finetune", data, "--model", tiny, "--out", tmp_path / "RUN", "--steps", "2", "--on-bad-image"]
    assert command(*words, "stop") == 1
    err = capsys.readouterr().err
    assert "left out: cat/x.png: not a picture" in err and "--on-bad-image skip" in err
    assert not (tmp_path / "RUN").exists() and command(*words, "skip") == 0
    assert (tmp_path / "RUN" / "left_out.csv").read_text().count("\n") == 2


def test_a_class_of_broken_pictures_only(tiny, tmp_path, capsys):
    data = make_folder(tmp_path / "data")
    for path in (data / "dog").iterdir():
        path.write_bytes(b"x")
    assert command("finetune", data, "--model", tiny, "--out", tmp_path / "RUN") == 1
    assert "no picture of the class 'dog' in" in capsys.readouterr().err


def test_two_pictures_nothing_held_out(tiny, tmp_path, capsys):
    data = make_folder(tmp_path / "data", ["a", "b"], n=1)
    assert command("finetune", data, "--model", tiny, "--out", tmp_path / "RUN", "--steps", "2") == 0
    assert "nothing was held out" in capsys.readouterr().out
    assert "cannot say how good" in (tmp_path / "RUN" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--help"], 0, "finetune"),
        (["finetune", "--help"], 0, "--on-bad-image"),
        (["evaluate", "--help"], 0, "--json"),
        (["evaluate", "--help"], 0, "--suite"),
        (["evaluate", "x"], 1, "error: give either a FOLDER of labelled pictures or --suite vtab-mini\n"),
        (["evaluate", "x", "y", "--suite", "vtab-mini"], 1, "or --suite vtab-mini, not both"),
        (["evaluate", "x", "--suite", "vtab"], 1, "no suite 'vtab'; there are vtab-mini and vtab-1k"),
        (["evaluate", "x", "y", "--seeds", "0", "1"], 1, "--seeds is for a suite"),
        (["evaluate", "x", "--suite", "vtab-mini"], 1, "no checkpoint is called 'x'"),
        (["evaluate", "x", "--suite", "vtab-mini", "--examples", "few"], 1, "1, or all; not 'few'"),
        (["evaluate", "x", "--suite", "vtab-mini", "--seeds", "-1"], 2, "--seeds"),
        (["evaluate", "BiT-mini-M", "--suite", "vtab-mini", "--methods", "ride"], 1, "no method 'ride' in vtab-mini"),
        (["evaluate", "BiT-mini-M", "--suite", "vtab-mini", "--tasks", "digit"], 1, "no task 'digit' in vtab-mini"),
        (["predict", "--help"], 0, "IMAGE..."),
        (["pretrain", "--help"], 0, "--steps"),
        (["finetune"], 2, "Missing argument"),
        (["finetune", "x"], 2, "--out"),
        (["finetune", "x", "--out", "y", "--variant", "mine"], 2, "paper"),
        (["finetune", "x", "--out", "y", "--val-share", "1"], 2, "0.9"),
        (["finetune", "x", "--out", "y", "--model", "BiT-mini-XXL"], 1, "BiT-mini-XXL"),
        (["finetune", "x", "--out", "y", "--model", "none.safetensors"], 1, "none.safetensors"),
        (["finetune", "x", "--out", "y", "--device", "warp"], 1, "no device 'warp'"),
        (["pretrain", "--steps", "0", "--out", "y"], 1, "steps is 0"),
        (["serve"], 2, "serve"),
    ],
)
def test_every_command_answers(words, status, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(*words) == status
    out, err = capsys.readouterr()
    assert says in out + err and "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


def test_worst_mistakes_are_the_surest():
    logits = torch.tensor([[5.0, 0, 0], [0, 9, 0], [0, 2, 0], [0, 0, 3]])
    found = worst_mistakes(logits, torch.tensor([0, 0, 2, 1]), n=2)
    assert [place for place, _, _ in found] == [1, 3] and [label for _, label, _ in found] == [1, 2]
    assert found[0][2] > found[1][2] > 0.8


# ---------------------------------------------------------------- interruption


def start(words, home, out):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "bitlib.cli", *map(str, words)], cwd=home, env=environment, stderr=out, stdout=out
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_bits(tiny, tmp_path, how):
    make_folder(tmp_path / "data")
    words = ["finetune", "data", "--model", tiny, "--steps", "40", "--save-every", "5", "--keep", "best", "--out"]
    with open(tmp_path / "log", "w") as log:
        broken = start([*words, "BROKEN"], tmp_path, log)
        deadline = time.monotonic() + 400
        while not any(int(path.stem[5:]) >= 5 for path in (tmp_path / "BROKEN").glob("step-*.safetensors")):
            assert time.monotonic() < deadline and broken.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        broken.send_signal(how)
        assert broken.wait(200) == (-9 if how == signal.SIGKILL else 130)
        assert not (tmp_path / "BROKEN" / "model.safetensors").exists()
        with pytest.raises(DataError, match="not finished; give the same command again: bitlib finetune data"):
            load_run(tmp_path / "BROKEN")
        assert start([*words, "BROKEN"], tmp_path, log).wait(400) == 0
        assert start([*words, "WHOLE"], tmp_path, log).wait(400) == 0
    assert "going on from step" in (tmp_path / "log").read_text()
    assert_same_model(tmp_path / "BROKEN", tmp_path / "WHOLE")
    for name in ("files.csv", "rule.json"):
        assert (tmp_path / "BROKEN" / name).read_bytes() == (tmp_path / "WHOLE" / name).read_bytes()
    pages = [(tmp_path / run / "report.html").read_text().replace(run, "RUN") for run in ("BROKEN", "WHOLE")]
    assert pages[0] == pages[1]


def test_pictures_that_changed_under_a_stopped_run_are_noticed(tiny, tmp_path, capsys, monkeypatch):
    data = make_folder(tmp_path / "data")
    words = ["finetune", data, "--model", tiny, "--steps", "6", "--out", tmp_path / "RUN"]

    def stop(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(module, "write_report", stop)
    assert command(*words) == 1
    monkeypatch.undo()
    photo().save(data / "cat" / "0.png")
    assert command(*words) == 1
    assert "holds another run: files was" in capsys.readouterr().err


# ---------------------------------------------------------------- the page, in a browser


def visit(page_path, look):
    """Open a page in Chromium with nothing else reachable; what `look(page)` gives, and what went wrong."""
    from playwright.sync_api import sync_playwright

    problems = []
    with sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page()
        page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else problems.append(r.url))
        page.goto(page_path.resolve().as_uri(), wait_until="load", timeout=120_000)
        try:
            return look(page), problems
        finally:
            browser.close()


needs_browser = pytest.mark.skipif(browser_path() is None, reason="no Chromium here: on Debian, apt install chromium")


@needs_browser
def test_the_report_in_a_browser(finished):
    def look(page):
        images = page.locator("img")
        return types.SimpleNamespace(
            title=page.title(),
            headings=page.locator("h2").all_inner_texts(),
            loaded=images.evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 0)"),
            alts=images.evaluate_all("all => all.every(i => i.alt.length > 3)"),
            cells=page.locator("table[aria-label='confusion matrix'] td").all_inner_texts(),
            head=page.locator("table[aria-label='confusion matrix'] tr").first.inner_text(),
            text=page.locator("body").inner_text(),
            bold=page.locator("b").count(),
            wide=page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"),
        )

    seen, problems = visit(finished / "RUN" / "report.html", look)
    assert problems == []
    assert seen.title.startswith("data: 3 classes") and seen.loaded and seen.alts and seen.wide
    assert {"Curves", "Confusion matrix", "Worst mistakes", "Left out: 1 files", "Again"} <= set(seen.headings)
    assert sum(map(int, seen.cells)) == 6 and len(seen.cells) == 9
    assert "dog <b>&" in seen.head and "大" in seen.head and seen.bold == 0  # other people's text is only text
    assert "of 6 held-out pictures right" in seen.text and "cat/broken.png" in seen.text
    assert "1 pictures are there under more than one class" in seen.text


@needs_browser
def test_the_report_shows_mistakes_and_many_classes(tiny, tmp_path):
    names = [f"class {i:02d}" for i in range(24)]  # more than a table holds, and colours that say nothing
    data = make_folder(tmp_path / "data", names, n=3)
    assert command("finetune", data, "--model", tiny, "--out", tmp_path / "RUN", "--steps", "3") == 0
    (thumbnails, tables), problems = visit(
        tmp_path / "RUN" / "report.html",
        lambda page: (
            page.locator(".pictures figure").all_inner_texts(),
            page.locator("table[aria-label='confusion matrix']").count(),
        ),
    )
    assert problems == [] and tables == 0 and len(thumbnails) == 12
    assert all("taken for class" in text for text in thumbnails)


@pytest.mark.slow
@needs_browser
def test_a_users_whole_way_from_an_installed_wheel(installed, tmp_path):
    """Ten digits, twenty PNGs each, in an empty folder, without the repository and without a network."""
    python = installed / "bin" / "python"
    (site_packages,) = (installed / "lib").glob("python*/site-packages")
    (site_packages / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*args, **kwargs):\n    raise OSError('the network is off')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
    )
    home = tmp_path / "empty"
    task = load_task("digits")
    for digit in range(10):
        (home / "digits" / str(digit)).mkdir(parents=True)
        (home / "unseen" / str(digit)).mkdir(parents=True)
        for part, dataset, n in (("digits", task.train, 20), ("unseen", task.test, 10)):
            for i in (dataset.labels == digit).nonzero().flatten()[:n].tolist():
                Image.fromarray(dataset.images[i].permute(1, 2, 0).numpy()).save(home / part / str(digit) / f"{i}.png")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def bitlib(*words):
        script = installed / "bin" / "bitlib"
        done = subprocess.run([script, *words], cwd=home, env=environment, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr
        return done.stdout

    offline = "from urllib.request import urlopen\ntry:\n    urlopen('http://127.0.0.1')\nexcept OSError as e: print(e)"
    assert "the network is off" in subprocess.run([python, "-c", offline], capture_output=True, text=True).stdout
    assert package_file("bitlib", "cli.py").is_relative_to(ROOT)  # this process has the repository's; the next has not
    bitlib("finetune", "digits", "--no-flip", "--model", "BiT-mini-M", "--out", "RUN")
    found = json.loads(bitlib("evaluate", "RUN", "unseen", "--json"))
    assert found["n"] == 100 and found["top1"] > 0.8 and found["learned_from"] == 0
    images = sorted(str(path.relative_to(home)) for path in (home / "unseen").glob("*/*.png"))
    rows = json.loads(bitlib("predict", "RUN", *images, "--json"))
    right = sum(Path(row["path"]).parent.name == row["label"] for row in rows)
    assert right == round(100 * found["top1"])
    headings, problems = visit(home / "RUN" / "report.html", lambda page: page.locator("h2").all_inner_texts())
    assert problems == [] and {"Curves", "Confusion matrix", "Worst mistakes"} <= set(headings)


# ---------------------------------------------------------------- the exercises' checkers can say no


def test_checkers_accept_and_refuse(capsys):
    def upright(pixels, orientation):
        pixels = pixels.transpose(1, 0, 2) if orientation >= 5 else pixels
        pixels = pixels[::-1] if orientation in (3, 4, 7, 8) else pixels
        return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels

    def threshold(confidence, correct, target):
        return min((t for t in confidence if correct[confidence >= t].mean() >= target), default=np.inf)

    check_upright(upright)
    check_on_white(lambda rgb, alpha: alpha[..., None] * rgb + 1 - alpha[..., None])
    check_threshold(threshold)
    assert capsys.readouterr().out.count(": correct") == 3
    for check, wrong, words in (
        (check_upright, lambda pixels, o: pixels, "not the right picture"),
        (check_upright, lambda pixels, o: upright(pixels, o).transpose(1, 0, 2), "2 x 3 pixels become"),
        (check_on_white, lambda rgb, alpha: rgb, "must be white"),
        (check_on_white, lambda rgb, alpha: alpha[..., None] * rgb, "must be white"),
        (check_threshold, lambda c, r, t: c.min(), "the lowest confidence"),
    ):
        with pytest.raises(AssertionError, match=words):
            check(wrong)
    for check in (check_upright, check_on_white, check_threshold):
        with pytest.raises(AssertionError, match="returned nothing"):
            check(lambda *args: None)
