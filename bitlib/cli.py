"""Your own images: a folder of pictures in, a classifier and a report out, from the command line.

Exported from chapters/10_your_own_images.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "BadImageError",
    "MAX_PIXELS",
    "FORMATS",
    "SUFFIXES",
    "read_image",
    "KEEP_BYTES",
    "SYSTEM_FILES",
    "DataError",
    "LeftOut",
    "ImageFiles",
    "image_folder",
    "NAMED_SETS",
    "image_list",
    "LabelledImages",
    "torchvision_images",
    "hugging_face_images",
    "named_images",
    "open_images",
    "Checked",
    "check_images",
    "split_examples",
    "STYLE",
    "MAX_TABLE",
    "worst_mistakes",
    "write_report",
    "Run",
    "load_run",
    "finetune_command",
    "evaluate_command",
    "predict_command",
    "pretrain_command",
    "main",
]

import base64
import csv
import dataclasses
import functools
import hashlib
import html
import io
import json
import os
import platform
import shlex
import stat
import sys
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import PIL
import torch
import torchvision
import typer
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from tqdm import tqdm

import bitlib
from bitlib.checkpoints import CheckpointError, load_pretrained, read_metadata, save_checkpoint
from bitlib.data import ImageTensorDataset, normalize, resize, to_tensor
from bitlib.evaluate import (
    SUITE_METHODS,
    Evaluation,
    Metrics,
    SuiteResults,
    evaluate_suite,
    predict_logits,
    suite_label,
    suite_tasks,
    weights_digest,
)
from bitlib.finetune import Duplicate, few_shot, find_duplicates, finetune, labels_of
from bitlib.hyperrule import Rule, hyperrule
from bitlib.pretrain import History, TrainingError, TrainingInterrupted, write_atomically
from bitlib.pretrain import main as pretrain_main


class BadImageError(ValueError):
    """A file that gives no picture. `path` and `reason` say which, and why."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


MAX_PIXELS = 64_000_000
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".mpo", ".png", ".pgm", ".ppm", ".tif", ".tiff", ".webp"),
)


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read a picture as a uint8 tensor (3, height, width), as a person would see it.

    PNG, JPEG, WebP, TIFF, GIF, BMP, AVIF and a few more; grey, palette, transparent, CMYK, 16-bit grey. Turned
    upright as its EXIF data say; transparent parts on white; the first picture of an animation or a stack.
    Raises BadImageError with the reason for anything else, and for more than max_pixels.
    """
    try:
        about = os.stat(path)
    except OSError as error:
        raise BadImageError(path, error.strerror.lower()) from error
    if not stat.S_ISREG(about.st_mode):
        raise BadImageError(path, "a folder" if stat.S_ISDIR(about.st_mode) else "not a regular file")
    if about.st_size == 0:
        raise BadImageError(path, "the file is empty")
    Image.init()
    try:
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImageError(
                    path, f"{width} x {height} pixels, more than the limit of {max_pixels:,} (--max-pixels)"
                )
            image.load()
            return to_tensor(_on_white(ImageOps.exif_transpose(image)))
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(path, f"far more pixels than the limit of {max_pixels:,} (--max-pixels)") from error
    except UnidentifiedImageError as error:
        raise BadImageError(path, "not a picture in a format that can be read (PNG, JPEG, WebP, TIFF ...)") from error
    except Exception as error:  # a damaged file makes a decoder fail in any way it likes
        raise BadImageError(path, f"cannot be decoded: {error}") from error


def _on_white(image: Image.Image) -> Image.Image:
    """The picture on white paper where it is transparent; any other as it is."""
    if image.mode.startswith("I;16") or not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image)
    return paper.convert("RGB")


KEEP_BYTES = 2**30  # decoded pictures of a data set are kept in memory up to this size
SYSTEM_FILES = ("Thumbs.db", "desktop.ini", "__MACOSX")  # beside names that begin with a dot


class DataError(ValueError):
    """Data that cannot be learned from. The message names the place and what would work."""


class LeftOut(NamedTuple):
    """A file that is no part of the data set, and why."""

    name: str
    reason: str


class ImageFiles(Dataset):
    """Picture files with labels: (uint8 image (3, H, W), class index), read when asked for.

    names: what to call each picture in a report. left_out: files that were seen and not taken.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int],
        classes: Sequence[str],
        names: Sequence[str] | None = None,
        left_out: Sequence[LeftOut] = (),
        max_pixels: int = MAX_PIXELS,
    ):
        self.paths, self.classes, self.max_pixels = list(paths), tuple(classes), max_pixels
        self.labels = torch.tensor(labels, dtype=torch.long)
        self.names = list(names) if names is not None else [str(path) for path in paths]
        self.left_out = list(left_out)
        self._kept: dict[int, Tensor] = {}
        self._room = KEEP_BYTES

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._kept.get(index)
        if image is None:
            image = read_image(self.paths[index], self.max_pixels)
            if image.numel() <= self._room:
                self._kept[index] = image
                self._room -= image.numel()
        return image, int(self.labels[index])


def image_folder(folder: str | Path, max_pixels: int = MAX_PIXELS, min_classes: int = 2) -> ImageFiles:
    """A folder with one sub-folder of pictures for each class; the classes are the names, in order.

    Names that begin with a dot are ignored. Raises DataError for a folder in which a class cannot be told: missing,
    empty, flat, nested, fewer than min_classes, an empty class, names that differ in case only, a link to itself.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root} is {'not a folder' if root.exists() else 'not there'}; give a folder of class folders")
    entries = _listing(root)
    classes = [entry.name for entry in entries if _is_folder(entry, root)]
    left_out = [LeftOut(e.name, "lies beside the class folders") for e in entries if e.name not in classes]
    if not classes and any(entry.name.lower().endswith(SUFFIXES) for entry in entries):
        raise DataError(f"the pictures lie in {root} itself; put those of each class into a sub-folder with its name")
    if not classes:
        raise DataError(f"{root} has no sub-folder; it needs one for each class, with pictures in it")
    _refuse_twins(classes, str(root))
    if len(classes) < min_classes:
        raise DataError(f"{root} holds a single class, {classes[0]!r}; there is nothing to tell apart")

    paths, labels = [], []
    for label, name in enumerate(classes):
        found = 0
        for entry in _listing(root / name):
            if _is_folder(entry, root):
                hint = f"; did you mean {root / 'train'}?" if name in ("train", "val", "test") else ""
                raise DataError(
                    f"{name}/{entry.name} in {root} is a folder inside a class folder; a class has one folder{hint}"
                )
            if entry.name.lower().endswith(SUFFIXES):
                paths.append(Path(entry.path))
                labels.append(label)
                found += 1
            else:
                left_out.append(LeftOut(f"{name}/{entry.name}", "not a picture, by its ending"))
        if not found:
            raise DataError(f"the class folder {name!r} in {root} holds no picture; fill it or remove it")
    names = [path.relative_to(root).as_posix() for path in paths]
    return ImageFiles(paths, labels, classes, names, left_out, max_pixels)


def _listing(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, by name, without the files that systems leave there."""
    try:
        with os.scandir(folder) as entries:
            shown = [e for e in entries if not e.name.startswith(".") and e.name not in SYSTEM_FILES]
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror.lower()}") from error
    return sorted(shown, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry, root: Path) -> bool:
    """Whether it is a folder, also through a link; DataError for a link that leads back to where we are."""
    try:
        is_folder = entry.is_dir()
        loop = is_folder and entry.is_symlink() and root.resolve().is_relative_to(Path(entry.path).resolve())
    except OSError:
        loop = True
    if loop:
        raise DataError(f"{entry.path} is a symbolic link that leads back to itself or its own folder; remove it")
    return is_folder


def _refuse_twins(classes: Sequence[str], where: str) -> None:
    """DataError where two class names differ in upper and lower case, or in how an accent is written, only."""
    seen: dict[str, str] = {}
    for name in classes:
        key = unicodedata.normalize("NFC", name).casefold().strip()
        if key in seen:
            raise DataError(f"{where} has the classes {seen[key]!r} and {name!r}; give them one name, or clearer ones")
        seen[key] = name


NAMED_SETS = ("cifar10", "cifar100", "pets", "flowers102")


def image_list(path: str | Path, max_pixels: int = MAX_PIXELS, min_classes: int = 2) -> ImageFiles:
    """A CSV file with the columns `path` and `label`; paths are relative to the file's folder.

    Raises DataError, with the line, for a table in which something is missing or said twice.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror.lower()}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file in UTF-8; save it as CSV in UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = [name.strip() for name in reader.fieldnames or ()]
    if "path" not in header or "label" not in header:
        raise DataError(f"{path} needs a first line with the columns path and label; it has {', '.join(header) or '-'}")
    reader.fieldnames = header
    names, words, lines = [], [], {}
    for row in reader:
        name, word = ((row[key] or "").strip() for key in ("path", "label"))
        if not name or not word:
            raise DataError(f"{path}, line {reader.line_num}: the {'label' if name else 'path'} is missing")
        if name in lines:
            raise DataError(f"{path}, line {reader.line_num}: {name} is already listed in line {lines[name]}")
        lines[name] = reader.line_num
        names.append(name)
        words.append(word)
    if not names:
        raise DataError(f"{path} lists no picture")
    classes = sorted(set(words))
    _refuse_twins(classes, str(path))
    if len(classes) < min_classes:
        raise DataError(f"{path} holds a single class, {classes[0]!r}; there is nothing to tell apart")
    paths = [path.parent / name for name in names]
    return ImageFiles(paths, [classes.index(word) for word in words], classes, names, max_pixels=max_pixels)


class LabelledImages(Dataset):
    """Any data set of images with its labels, its class names, and a name for each image."""

    def __init__(self, dataset: Dataset, labels: Sequence[int] | Tensor, classes: Sequence[str], name: str = "image"):
        self.dataset, self.labels, self.classes = dataset, torch.as_tensor(labels).long(), tuple(map(str, classes))
        self.names, self.left_out = [f"{name}[{i}]" for i in range(len(self.labels))], []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_tensor(_on_white(self._image(index))), int(self.labels[index])

    def _image(self, index: int) -> Image.Image:
        image = self.dataset[index][0]
        return image if isinstance(image, Image.Image) else Image.fromarray(to_tensor(image).permute(1, 2, 0).numpy())


class _HuggingFaceImages(LabelledImages):
    """The same for rows that are dictionaries."""

    column = "image"

    def _image(self, index: int) -> Image.Image:
        return self.dataset[index][self.column]


def torchvision_images(dataset: Dataset, name: str = "image") -> LabelledImages:
    """A torchvision classification data set (or several, concatenated) as ours. No image is decoded."""
    first = dataset
    while isinstance(first, Subset | ConcatDataset):
        first = first.dataset if isinstance(first, Subset) else first.datasets[0]
    labels = labels_of(dataset)
    return LabelledImages(dataset, labels, getattr(first, "classes", None) or range(int(labels.max()) + 1), name)


def hugging_face_images(dataset: Dataset, name: str = "image") -> LabelledImages:
    """A data set of the library `datasets`, with a column of images and one of class labels, as ours.

    The columns are found by their types. Raises DataError where there is none, or more than one, of a kind.
    """
    kinds = {column: type(feature).__name__ for column, feature in dataset.features.items()}
    chosen = {}
    for kind in ("Image", "ClassLabel"):
        columns = [column for column, its in kinds.items() if its == kind]
        if len(columns) != 1:
            raise DataError(f"one column of type {kind} is needed; the columns are {kinds}")
        (chosen[kind],) = columns
    labels = list(dataset[chosen["ClassLabel"]])
    images = _HuggingFaceImages(dataset, labels, dataset.features[chosen["ClassLabel"]].names, name)
    images.column = chosen["Image"]
    return images


def named_images(name: str, part: str = "train", root: str | Path | None = None) -> LabelledImages:
    """CIFAR-10, CIFAR-100, Oxford-IIIT Pets or Flowers-102 by name, downloaded once to `root`.

    part: "train" or "test", as in the BiT paper: of Pets `trainval`, of Flowers `train` and `val` together.
    """
    from torchvision import datasets

    root = Path(root or os.environ.get("BITLIB_DATA", Path.home() / ".cache" / "bitlib" / "data"))
    try:
        if name == "cifar10":
            dataset = datasets.CIFAR10(root, train=part == "train", download=True)
        elif name == "cifar100":
            dataset = datasets.CIFAR100(root, train=part == "train", download=True)
        elif name == "pets":
            dataset = datasets.OxfordIIITPet(root, split="trainval" if part == "train" else "test", download=True)
        elif name == "flowers102":
            splits = ("train", "val") if part == "train" else ("test",)
            dataset = ConcatDataset([datasets.Flowers102(root, split=split, download=True) for split in splits])
        else:
            raise DataError(f"no data set {name!r}; by name there are {', '.join(NAMED_SETS)}")
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} cannot be had: {error}. Put torchvision's copy of it into {root}") from error
    return torchvision_images(dataset, f"{name}/{part}")


def open_images(
    source: str, part: str = "train", max_pixels: int = MAX_PIXELS, min_classes: int = 2
) -> ImageFiles | LabelledImages:
    """What a command is given: a folder of class folders, a CSV file, or the name of a data set."""
    path = Path(source)
    if path.is_dir() or (path.exists() and path.suffix.lower() != ".csv"):
        return image_folder(path, max_pixels, min_classes)
    if path.suffix.lower() == ".csv":
        return image_list(path, max_pixels, min_classes)
    if source in NAMED_SETS:
        return named_images(source, part)
    raise DataError(f"{source} is no folder, no CSV file, and not the name of a data set ({', '.join(NAMED_SETS)})")


@dataclass
class Checked:
    """The pictures of a data set that can be used: their places in it, sizes, fingerprints; and the others."""

    good: list[int]
    sizes: list[tuple[int, int]]
    digests: list[str]
    small: Tensor
    left_out: list[LeftOut]


def check_images(dataset: ImageFiles | LabelledImages, progress: bool = False) -> Checked:
    """Decode every picture once, in several threads. What fails is listed with the reason; nothing is raised."""

    def look(index: int) -> tuple[tuple[int, int], str, Tensor] | LeftOut:
        try:
            image, _ = dataset[index]
        except BadImageError as error:
            return LeftOut(dataset.names[index], error.reason)
        except Exception as error:  # whatever a data set of somebody else raises
            return LeftOut(dataset.names[index], f"cannot be decoded: {error}")
        digest = hashlib.sha256(str(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes()).hexdigest()
        return tuple(image.shape[1:]), digest, resize(image, 16)

    with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
        places = range(len(dataset))
        seen = list(tqdm(pool.map(look, places), "reading", len(dataset), unit="image", disable=not progress))
    good = [i for i in places if not isinstance(seen[i], LeftOut)]
    sizes, digests, small = zip(*(seen[i] for i in good), strict=True) if good else ((), (), ())
    return Checked(
        good,
        list(sizes),
        list(digests),
        torch.stack(small) if good else torch.empty(0, 3, 16, 16, dtype=torch.uint8),
        [*dataset.left_out, *(found for found in seen if isinstance(found, LeftOut))],
    )


def split_examples(
    labels: Sequence[int] | Tensor, groups: Sequence[str], share: float = 0.2, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Places for training and places held out: about `share` of every class, equal `groups` on one side.

    At least one group of a class is held out where it has two, and at least one always stays. Both lists rise.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share to hold out must be at least 0 and below 1, not {share}")
    members: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    labels = [int(label) for label in labels]
    held_out: list[int] = []
    for label in sorted(set(labels)):
        own = [places for places in members.values() if labels[places[0]] == label]
        wanted = max(1, round(share * sum(map(len, own)))) if share else 0
        taken = 0
        for i in np.random.default_rng([seed, label]).permutation(len(own))[1:]:  # the first group always stays
            if taken < wanted:
                held_out += own[i]
                taken += len(own[i])
    return sorted(set(range(len(labels))) - set(held_out)), sorted(held_out)


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  background: #fff }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem }
img { max-width: 100% } figure { margin: 0 0 1rem } figcaption { font-size: .85rem; overflow-wrap: anywhere }
table { border-collapse: collapse } th, td { padding: .2rem .6rem; border: 1px solid #bbb; text-align: right }
th { background: #f2f2f2; font-weight: 600 } th.name, td.name { text-align: left } pre { overflow-x: auto }
.scroll { overflow-x: auto } .big { font-size: 1.3rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem }
.pictures img { width: 9rem; height: 9rem; object-fit: contain; background: #eee }
"""
MAX_TABLE = 20  # classes in a confusion table; more are drawn as a picture


def _picture(image: Tensor, size: int = 144) -> str:
    """A thumbnail of a uint8 image (3, H, W) as a data address."""
    thumbnail = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    thumbnail.thumbnail((size, size))
    buffer = io.BytesIO()
    thumbnail.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _drawing(draw: Callable, alt: str, width: float = 6.0, height: float = 3.2) -> str:
    """What draw(axes) draws, as an HTML image; the same drawing always gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "bitlib", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}"></figure>'


def _table(header: Sequence[str], rows: Sequence[Sequence], label: str = "") -> str:
    """An HTML table; the first column names its row. Everything is escaped."""
    cells = "".join(f'<th scope="col"{_left(i)}>{html.escape(str(h))}</th>' for i, h in enumerate(header))
    lines = [f"<tr>{cells}</tr>"]
    for row in rows:
        first, *rest = (html.escape(str(value)) for value in row)
        lines.append(
            f'<tr><th scope="row" class="name">{first}</th>' + "".join(f"<td>{v}</td>" for v in rest) + "</tr>"
        )
    return f'<div class="scroll"><table aria-label="{html.escape(label)}">{"".join(lines)}</table></div>'


def _left(column: int) -> str:
    return ' class="name"' if column == 0 else ""


def _history_figures(history: History, rule: Rule) -> str:
    def loss(axes) -> None:
        axes.plot(range(1, len(history.loss) + 1), history.loss, linewidth=0.8, color="#0b5394")
        axes.set(xlabel="step", ylabel="training loss", yscale="log")
        for step in rule.decay_steps:
            axes.axvline(step, color="0.5", linewidth=0.8, linestyle=":")

    def accuracy(axes) -> None:
        steps, top1 = [e["step"] for e in history.evals], [100 * e["top1"] for e in history.evals]
        axes.plot(steps, top1, marker="o", color="#b45f06")
        axes.set(xlabel="step", ylabel="held-out top-1 (%)", ylim=(0, 103))

    text = _drawing(loss, f"Training loss over {len(history.loss)} steps, from {history.loss[0]:.2f} to "
                    f"{history.loss[-1]:.3g}; dotted lines mark where the learning rate falls")  # fmt: skip
    if history.evals:
        last = history.evals[-1]["top1"]
        text += _drawing(accuracy, f"Held-out accuracy over the steps; {100 * last:.1f} % at the end")
    return text


def _confusion(metrics: Evaluation, classes: Sequence[str]) -> str:
    confusion = metrics["confusion"]
    if len(classes) <= MAX_TABLE:
        rows = [[name, *row] for name, row in zip(classes, confusion.tolist(), strict=True)]
        text = _table(["true class ↓, predicted →", *classes], rows, "confusion matrix")
    else:

        def draw(axes) -> None:
            share = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
            axes.imshow(share.numpy(), cmap="cividis", vmin=0, vmax=1)
            axes.set(xlabel="predicted class", ylabel="true class")
            axes.grid(False)

        text = _drawing(draw, f"Confusion matrix of {len(classes)} classes; the diagonal is right", 5, 5)
    wrong = [
        (int(n), classes[i], classes[j])
        for i, row in enumerate(confusion.tolist())
        for j, n in enumerate(row)
        if i != j and n
    ]
    if wrong:
        worst = sorted(wrong, key=lambda item: -item[0])[:10]
        text += "<p>Most frequent confusions:</p>"
        text += _table(["true class", "taken for", "pictures"], [(a, b, n) for n, a, b in worst], "confusions")
    return text


def _reliability(metrics: Evaluation) -> str:
    curve = metrics["reliability"]
    x, y, n = (values.numpy() for values in curve)

    def draw(axes) -> None:
        axes.plot([0, 1], [0, 1], color="0.6", linestyle="--")
        axes.plot(x, y, color="#0b5394")
        axes.scatter(x, y, s=300 * n / n.sum() + 5, color="#0b5394")
        axes.set(xlabel="confidence", ylabel="share right", xlim=(0, 1.03), ylim=(0, 1.03))

    alt = f"Reliability diagram: share of right answers against confidence; expected calibration error {curve.ece:.3f}"
    return _drawing(draw, alt, 3.6, 3.4)


def worst_mistakes(logits: Tensor, labels: Tensor, n: int = 12) -> list[tuple[int, int, float]]:
    """The n wrong answers given with the most confidence: (place, predicted class, probability), surest first."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    order = wrong[confidence[wrong].argsort(descending=True, stable=True)][:n]
    return [(int(i), int(predicted[i]), float(confidence[i])) for i in order]


def write_report(
    title: str,
    classes: Sequence[str],
    rule: Rule,
    history: History,
    train_labels: Tensor,
    held_out: Dataset | None,
    held_out_names: Sequence[str],
    logits: Tensor | None,
    labels: Tensor | None,
    notes: Sequence[str],
    left_out: Sequence[LeftOut],
    duplicates: Sequence[tuple[str, str, float]],
    command: str,
) -> str:
    """The report of a run as one HTML page that needs no other file.

    logits, labels: of the held-out images, or None where nothing is held out. duplicates: pairs of names, one from
    training and one held out, and their distance in grey levels.
    """
    text, count = html.escape, torch.bincount(train_labels, minlength=len(classes)).tolist()
    body = [f"<h1>{text(title)}</h1>"]
    metrics = None
    if logits is None:
        body.append("<p>Nothing was held out, so this run cannot say how good the classifier is.</p>")
    else:
        metrics = Metrics(len(classes)).update(logits, labels).compute()
        low, high = metrics["top1_interval"]
        body.append(
            f'<p class="big">{100 * metrics["top1"]:.1f} % of {metrics["n"]} held-out pictures right '
            f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %).</p>"
        )
    if notes:
        body.append("<ul>" + "".join(f"<li>{text(note)}</li>" for note in notes) + "</ul>")
    body.append("<h2>Curves</h2>" + _history_figures(history, rule))
    if metrics is not None:
        tested = metrics["confusion"].sum(dim=1).tolist()
        right = metrics["confusion"].diagonal().tolist()
        rows = [
            (name, count[i], tested[i], f"{100 * right[i] / tested[i]:.0f} %" if tested[i] else "-")
            for i, name in enumerate(classes)
        ]
        body.append("<h2>Classes</h2>" + _table(["class", "training", "held out", "right"], rows, "classes"))
        body.append("<h2>Confusion matrix</h2>" + _confusion(metrics, classes))
        body.append(
            f"<h2>Can its probabilities be believed?</h2><p>On the dashed line they can. Expected calibration error "
            f"{metrics['ece']:.3f}, negative log-likelihood {metrics['nll']:.3f}.</p>" + _reliability(metrics)
        )
        mistakes = worst_mistakes(logits, labels)
        figures = [
            f'<figure><img alt="{text(held_out_names[i])}" src="{_picture(to_tensor(held_out[i][0]))}"><figcaption>'
            f"{text(held_out_names[i])}<br>is {text(classes[int(labels[i])])}, "
            f"taken for {text(classes[predicted])} ({100 * probability:.0f} %)</figcaption></figure>"
            for i, predicted, probability in mistakes
        ]
        none = "<p>There is none among the held-out pictures.</p>"
        shown = f'<div class="pictures">{"".join(figures)}</div>' if mistakes else none
        body.append(f"<h2>Worst mistakes</h2>{shown}")
    else:
        body.append(
            "<h2>Classes</h2>" + _table(["class", "training"], list(zip(classes, count, strict=True)), "classes")
        )
    if left_out:
        body.append(f"<h2>Left out: {len(left_out)} files</h2>" + _table(["file", "reason"], left_out, "left out"))
    if duplicates:
        rows = [(a, b, f"{d:.1f}") for a, b, d in duplicates[:50]]
        body.append(
            f"<h2>In both parts: {len(duplicates)} pairs</h2><p>Pictures of the training part that are held out too, "
            "or nearly. They make the figures above look better than they are.</p>"
            + _table(["training", "held out", "distance"], rows, "duplicates")
        )
    body.append(f"<h2>Again</h2><pre>{text(command)}</pre><pre>{text(str(rule))}</pre>")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>{STYLE}</style>'
        f"</head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _write(path: Path, content: str) -> None:
    """Whole or not at all, under its name."""
    write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def _csv(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue()


def _say(text: str) -> None:
    typer.echo(text, err=True)


@dataclass
class Run:
    """A finished run: the model in eval mode, the names of its classes, and what run.json says."""

    model: nn.Module
    classes: tuple[str, ...]
    about: dict

    @torch.inference_mode()
    def probabilities(self, images: Sequence[Tensor]) -> Tensor:
        """The probability of each class, (N, K), for uint8 images (3, H, W) of any sizes."""
        device = next(self.model.parameters()).device
        parts = []
        for start in range(0, len(images), 64):
            x = torch.stack([resize(image, self.model.image_size) for image in images[start : start + 64]])
            parts.append(self.model(normalize(x).to(device)).float().softmax(dim=1).cpu())
        return torch.cat(parts) if parts else torch.empty(0, len(self.classes))


def load_run(folder: str | Path, device: str | None = None) -> Run:
    """The classifier in a run folder. Raises DataError where there is none, or where it is not finished."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise DataError(f"{folder} is no run of `bitlib finetune`: it has no run.json")
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{folder / 'run.json'} is damaged: {error}") from error
    if about.get("result") is None:
        raise DataError(f"the run in {folder} is not finished; give the same command again: {about.get('command')}")
    path = folder / "model.safetensors"
    model = load_pretrained(path).to(_device(device))
    return Run(model, tuple(json.loads(read_metadata(path)["classes"])), about)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DataError(f"no device {name!r}; use cpu, cuda or cuda:1, for example") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"{device} is asked for, but PyTorch sees no GPU here")
    return device


def _relabelled(dataset: ImageFiles | LabelledImages, classes: Sequence[str], whose: str) -> None:
    """Number a data set's labels as `classes` does; DataError for a class that is not among them."""
    unknown = [name for name in dataset.classes if name not in classes]
    if unknown:
        known = ", ".join(map(repr, classes[:10])) + (" ..." if len(classes) > 10 else "")
        raise DataError(f"the class {unknown[0]!r} is not one of {whose}; those are {known}")
    places = torch.tensor([classes.index(name) for name in dataset.classes], dtype=torch.long)
    dataset.labels, dataset.classes = places[dataset.labels], tuple(classes)


def _stop_or_note(checked: Checked, on_bad: str, where: str) -> None:
    """List what is left out on the terminal; DataError where that must not be, or where nothing is left."""
    for name, reason in checked.left_out[:20]:
        _say(f"left out: {name}: {reason}")
    if len(checked.left_out) > 20:
        _say(f"left out: {len(checked.left_out) - 20} more")
    if checked.left_out and on_bad == "stop":
        raise DataError(f"{len(checked.left_out)} files in {where} cannot be used, listed above (--on-bad-image skip)")
    if not checked.good:
        raise DataError(f"no picture in {where} can be used")


def _versions() -> dict[str, str]:
    return {
        "bitlib": bitlib.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
    }


def _open_run(out: Path, settings: dict, command: str) -> dict:
    """Make the run folder ready. Returns what its run.json says; DataError where it belongs to something else."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise DataError(f"cannot use {out} as a run folder: {error.strerror.lower()}") from error
    path = out / "run.json"
    if held and not path.is_file():
        raise DataError(f"{out} holds other files ({', '.join(sorted(held)[:3])}); give a new folder with --out")
    if held:
        about = json.loads(path.read_text(encoding="utf-8"))
        old, new = about["settings"], json.loads(json.dumps(settings))
        differ = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        differ = [key for key in differ if key != "rule"] or differ  # the rule follows from the others
        if differ:
            said = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in differ)
            raise DataError(f"{out} holds another run: {said}. Give another --out, or the same command")
        return about
    about = {"command": command, "settings": settings, "versions": _versions(), "result": None}
    _write(path, json.dumps(about, indent=2) + "\n")
    return about


def _one_line_errors(command: Callable) -> Callable:
    """What a user can cause ends in one line and status 1, not in a traceback."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs) -> None:
        # read_image has a limit of its own and says so
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        try:
            command(*args, **kwargs)
        except TrainingInterrupted as stop:
            _say(str(stop))
            raise typer.Exit(128 + stop.signum) from None
        except (DataError, BadImageError, CheckpointError, TrainingError, ValueError, OSError) as error:
            _say(f"error: {error}")
            raise typer.Exit(1) from None

    return wrapped


@_one_line_errors
def finetune_command(
    context: typer.Context,
    data: Annotated[str, typer.Argument(metavar="FOLDER", help="Class folders, a CSV of path,label, or cifar10 ...")],
    out: Annotated[Path, typer.Option(metavar="RUN", help="The run folder. The same command goes on after a stop.")],
    model: Annotated[str, typer.Option(help="BiT-mini-M, an official name such as BiT-M-R50x1, or a file.")] = (
        "BiT-mini-M"
    ),
    val: Annotated[str | None, typer.Option(help="Measure on this folder or list, not on a share of FOLDER.")] = None,
    val_share: Annotated[float, typer.Option(min=0, max=0.9, help="The share of every class to hold out.")] = 0.2,
    shots: Annotated[int | None, typer.Option(min=1, help="Learn from this many pictures of each class only.")] = None,
    variant: Annotated[Literal["paper", "official", "simplified"], typer.Option(help="Whose HyperRule.")] = "paper",
    steps: Annotated[int | None, typer.Option(min=1, help="Another number of steps than the rule's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Another batch; the rate goes in proportion.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Images at a time, where memory is short.")] = None,
    flip: Annotated[bool, typer.Option(help="Mirror at random. Not for letters, digits, left and right.")] = True,
    crop: Annotated[bool, typer.Option(help="Crop at random. Not where the place in the picture counts.")] = True,
    trainable: Annotated[
        Literal["full", "head", "last1", "last2", "last3"], typer.Option(help="Which layers may move.")
    ] = "full",
    keep: Annotated[Literal["last", "best"], typer.Option(help="The last weights, or the best on held-out.")] = "last",
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of everything random.")] = 0,
    on_bad_image: Annotated[Literal["skip", "stop"], typer.Option(help="Go on without a bad file, or stop.")] = "skip",
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse pictures with more pixels than this.")] = MAX_PIXELS,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU where there is one.")] = None,
) -> None:
    """Fine-tune a pre-trained network on pictures of yours by the BiT-HyperRule, and report how good it is."""
    chosen = {name: value for name, value in context.params.items() if name not in ("out", "device", "save_every")}
    pretrained = load_pretrained(model).to(_device(device))
    progress = sys.stderr.isatty()

    dataset = open_images(data, "train", max_pixels)
    checked = check_images(dataset, progress)
    _stop_or_note(checked, on_bad_image, data)
    labels = dataset.labels[checked.good]
    present = set(labels.tolist())
    missing = [name for i, name in enumerate(dataset.classes) if i not in present]
    if missing:
        raise DataError(f"no picture of the class {missing[0]!r} in {data} can be used")
    notes, left_out = [], list(checked.left_out)
    words: dict[str, set[str]] = {}
    for digest, label in zip(checked.digests, labels.tolist(), strict=True):
        words.setdefault(digest, set()).add(dataset.classes[label])
    contradictions = [names for names in words.values() if len(names) > 1]
    if contradictions:
        notes.append(
            f"{len(contradictions)} pictures are there under more than one class, such as "
            + " and ".join(sorted(contradictions[0]))
        )

    kept, held_out = split_examples(labels, checked.digests, 0.0 if val else val_share, seed)
    if shots is not None:
        kept = [kept[i] for i in few_shot(labels[kept], shots, seed)]
    train_set = Subset(dataset, [checked.good[i] for i in kept])
    held_dataset, held_checked = dataset, checked
    if val:
        held_dataset = open_images(val, "test", max_pixels, min_classes=1)
        _relabelled(held_dataset, dataset.classes, data)
        held_checked = check_images(held_dataset, progress)
        _stop_or_note(held_checked, on_bad_image, val)
        left_out += held_checked.left_out
        held_out = list(range(len(held_checked.good)))
    val_set = Subset(held_dataset, [held_checked.good[i] for i in held_out]) if held_out else None
    train_names = [dataset.names[i] for i in train_set.indices]
    val_names = [held_dataset.names[i] for i in val_set.indices] if val_set else []
    duplicates: list[tuple[str, str, float]] = []
    if val_set:
        zeros = torch.zeros(max(len(kept), len(held_out)), dtype=torch.long)
        parts = (checked.small[kept], held_checked.small[held_out])
        pairs = find_duplicates(*(ImageTensorDataset(part, zeros[: len(part)]) for part in parts))
        duplicates = [_named(pair, train_names, val_names) for pair in pairs]
        if duplicates:
            notes.append(f"{len(duplicates)} held-out pictures are in the training part too, or nearly; see below")
        tested = set(labels_of(val_set).tolist())
        without = [name for i, name in enumerate(dataset.classes) if i not in tested]
        if without:
            notes.append(f"nothing is held out of {len(without)} classes, such as {without[0]!r}")
        if keep == "best":
            notes.append("the held-out pictures chose the checkpoint, so their accuracy is the best of several tries")
    for note in notes:
        _say(f"note: {note}")

    areas = sorted(checked.sizes, key=lambda size: size[0] * size[1])
    rule = hyperrule(len(train_set), areas[len(areas) // 2], variant, pretrained)
    rule = dataclasses.replace(rule, flip=flip, random_crop=crop)
    rule = rule.with_steps(steps) if steps else rule
    rule = rule.scaled(batch_size) if batch_size else rule
    train_labels = labels_of(train_set)
    rows = [
        (part, name, dataset.classes[label], digest)
        for part, names, part_labels, digests in (
            ("training", train_names, train_labels, [checked.digests[i] for i in kept]),
            ("held out", val_names, labels_of(val_set) if val_set else [], [held_checked.digests[i] for i in held_out]),
        )
        for name, label, digest in zip(names, part_labels, digests, strict=True)
    ]
    listing = _csv(("part", "picture", "class", "sha256"), rows)
    settings = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()},
        "rule": dataclasses.asdict(rule),
        "start": weights_digest(pretrained.state_dict()),
        "files": hashlib.sha256(listing.encode()).hexdigest(),
    }
    command = _command_line(context)
    about = _open_run(out, settings, command)
    if about["result"] is not None:
        _say(f"{out} is finished; nothing to do")
        typer.echo(_summary(about["result"], out))
        return
    _write(out / "files.csv", listing)
    _write(out / "left_out.csv", _csv(("file", "reason"), left_out))
    _write(out / "labels.json", json.dumps(dataset.classes, ensure_ascii=False, indent=1) + "\n")
    _write(out / "rule.json", json.dumps(dataclasses.asdict(rule), indent=1) + "\n")
    _say(
        f"{len(train_set)} pictures of {len(dataset.classes)} classes to learn from, {len(val_names)} held out\n{rule}"
    )

    result = finetune(
        pretrained,
        train_set,
        rule,
        seed=seed,
        val_set=val_set,
        run_dir=out,
        trainable=trainable,
        keep=keep,
        num_classes=len(dataset.classes),
        micro_batch=micro_batch,
        save_every=save_every,
    )
    logits = val_labels = None
    found: dict = {"n": 0}
    if val_set:
        logits, val_labels = predict_logits(result.model, val_set)
        metrics = Metrics(len(dataset.classes)).update(logits, val_labels).compute().to_dict()
        found = {
            name: metrics[name] for name in ("n", "top1", "top1_interval", "mean_per_class", "nll", "brier", "ece")
        }
    page = write_report(
        f"{Path(data).name}: {len(dataset.classes)} classes, by {Path(model).name}",
        dataset.classes,
        rule,
        result.history,
        train_labels,
        val_set,
        val_names,
        logits,
        val_labels,
        notes,
        left_out,
        duplicates,
        command,
    )
    _write(out / "report.html", page)
    metadata = {"classes": json.dumps(dataset.classes), "rule": json.dumps(dataclasses.asdict(rule)), "from": model}
    save_checkpoint(result.model.cpu(), out / "model.safetensors", metadata)
    about["result"] = found | {"weights": weights_digest(result.model.state_dict())}
    _write(out / "run.json", json.dumps(about, indent=2) + "\n")  # last: from here on the run is finished
    for path in [*out.glob("step-*.safetensors"), *out.glob("best.safetensors")]:
        path.unlink()
    typer.echo(_summary(about["result"], out))


def _named(pair: Duplicate, train_names: Sequence[str], val_names: Sequence[str]) -> tuple[str, str, float]:
    return train_names[pair.train_index], val_names[pair.test_index], pair.distance


def _command_line(context: typer.Context) -> str:
    """The command with every option that is not its default, as one would type it."""
    words = ["bitlib", context.info_name or "finetune"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        if parameter.param_type_name == "argument":
            words += [str(value)]
        elif value != parameter.default and value is not None:
            on_off = isinstance(value, bool)
            words += [(parameter.opts if value or not on_off else parameter.secondary_opts)[0]]
            words += [] if on_off else [str(value)]
    return shlex.join(words)


def _summary(result: dict, out: Path) -> str:
    if not result["n"]:
        return f"{out}: finished; nothing was held out. See {out / 'report.html'}"
    low, high = result["top1_interval"]
    return (
        f"{out}: {100 * result['top1']:.1f} % of {result['n']} held-out pictures right "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %). See {out / 'report.html'}"
    )


_SUITE_ONLY = ("examples", "methods", "tasks", "seeds", "out", "data_dir")


@_one_line_errors
def evaluate_command(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run; for a suite also a checkpoint.")],
    data: Annotated[
        str | None, typer.Argument(metavar="FOLDER", help="Class folders, a CSV of path,label, or cifar10 ...")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    on_bad_image: Annotated[Literal["skip", "stop"], typer.Option(help="Go on without a bad file, or stop.")] = "skip",
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse pictures with more pixels than this.")] = MAX_PIXELS,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU where there is one.")] = None,
    suite: Annotated[str | None, typer.Option(help="In place of FOLDER: vtab-mini, or vtab-1k.")] = None,
    examples: Annotated[str, typer.Option(help="Suite: training images a task, a number or all.")] = "100",
    methods: Annotated[
        list[str], typer.Option(metavar="METHOD...", help=f"Suite: some of {', '.join(SUITE_METHODS)}.")
    ] = ("ridge",),
    tasks: Annotated[list[str] | None, typer.Option(metavar="TASK...", help="Suite: some tasks, not all.")] = None,
    seeds: Annotated[list[int], typer.Option(metavar="SEED...", min=0, help="Suite: one draw of images each.")] = (
        *range(5),
    ),
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Suite: save each result; go on from there.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Suite vtab-1k: where the data sets are.")] = None,
) -> None:
    """Measure a classifier on labelled pictures: accuracy with its interval, loss, calibration.

    With --suite, measure what a checkpoint is worth for a suite of other tasks: bitlib evaluate BiT-mini-M --suite
    vtab-mini. RUN is then a run, a checkpoint's name or its file, and comes first; options that take several values
    (--methods, --tasks, --seeds) take them one after the other.
    """
    if (data is None) == (suite is None):
        raise DataError("give either a FOLDER of labelled pictures or --suite vtab-mini" + (", not both" * bool(data)))
    if suite is not None:
        _evaluate_suite(run, suite, examples, methods, tasks, seeds, out, data_dir, device, as_json)
        return
    for name in _SUITE_ONLY:
        if context.get_parameter_source(name).name == "COMMANDLINE":
            raise DataError(f"--{name.replace('_', '-')} is for a suite; add --suite vtab-mini, or leave it out")
    run = Path(run)
    loaded = load_run(run, device)
    dataset = open_images(data, "test", max_pixels, min_classes=1)
    _relabelled(dataset, loaded.classes, f"{run}")
    checked = check_images(dataset, sys.stderr.isatty())
    _stop_or_note(checked, on_bad_image, data)
    with open(run / "files.csv", newline="", encoding="utf-8") as file:
        learned = {row["sha256"] for row in csv.DictReader(file) if row["part"] == "training"}
    seen = sum(digest in learned for digest in checked.digests)
    if seen:
        _say(f"note: {seen} of these {len(checked.good)} pictures are among those it learned from")
    logits, labels = predict_logits(loaded.model, Subset(dataset, checked.good))
    metrics = Metrics(len(loaded.classes)).update(logits, labels).compute()
    if as_json:
        left_out = [{"file": name, "reason": reason} for name, reason in checked.left_out]
        extra = {"classes": list(loaded.classes), "learned_from": seen, "left_out": left_out}
        typer.echo(json.dumps(metrics.to_dict() | extra))
    else:
        typer.echo(repr(metrics))


def _evaluate_suite(start, suite, examples, methods, tasks, seeds, out, data_dir, device, as_json) -> None:
    """Run a suite for a checkpoint or a run, and print its tables; exit status 1 if a task cannot be loaded."""
    suite_tasks(suite)  # an unknown one is refused before anything is read
    if examples != "all" and (not examples.isdecimal() or int(examples) < 1):
        raise DataError(f"--examples is a number of at least 1, or all; not {examples!r}")
    path = Path(start)
    results = evaluate_suite(
        load_run(path, device).model if path.is_dir() else load_pretrained(start).to(_device(device)),
        suite,
        name=path.resolve().name if path.is_dir() else path.stem if path.suffix else start,
        methods=tuple(dict.fromkeys(methods)),
        examples=None if examples == "all" else int(examples),
        tasks=tasks and tuple(dict.fromkeys(tasks)),
        seeds=tuple(dict.fromkeys(seeds)),
        out=out,
        data_dir=data_dir,
        progress=sys.stderr.isatty(),
    )
    if as_json:
        typer.echo(json.dumps(results))
    elif results["rows"]:
        typer.echo(f"{results}\n\n{_by_task(results)}")
    for task, reason in results["failed"].items():
        _say(f"error: the task {task} could not be loaded: {reason}")
    if results["failed"]:
        raise typer.Exit(1)


def _by_task(results: SuiteResults) -> str:
    """The mean top-1 of each task, in per cent: a line a task, a column for each model, method and setting."""
    columns = {f"({chr(97 + i)})": entry for i, entry in enumerate(results["summary"])}
    lines = [f"{key} {suite_label(e['model'], e['method'])}, {e['examples']} examples" for key, e in columns.items()]
    lines.append(f"{'top-1, %':14s}" + "".join(f"{key:>8s}" for key in columns))
    for task in suite_tasks(results["suite"]):
        cells = [entry["tasks"].get(task) for entry in columns.values()]
        if any(cell is not None for cell in cells):
            lines.append(f"{task:14s}" + "".join(f"{'-' if c is None else f'{100 * c:.1f}':>8s}" for c in cells))
    return "\n".join(lines)


@_one_line_errors
def predict_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all the probabilities.")] = False,
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse pictures with more pixels than this.")] = MAX_PIXELS,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU where there is one.")] = None,
) -> None:
    """Say what is in pictures: path, label and probability, one line each."""
    loaded = load_run(run, device)
    rows: list[dict] = []
    for path in images:
        row: dict = {"path": str(path)}
        try:
            (p,) = loaded.probabilities([read_image(path, max_pixels)]).tolist()
            best = max(range(len(p)), key=p.__getitem__)
            row |= {"label": loaded.classes[best], "probability": p[best]}
            row["probabilities"] = dict(zip(loaded.classes, p, strict=True))
        except BadImageError as error:
            row["error"] = error.reason
        rows.append(row)
        if "error" in row:
            _say(f"error: {path}: {row['error']}")
        elif not as_json:
            typer.echo(f"{path}\t{row['label']}\t{row['probability']:.4f}")
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
    if any("error" in row for row in rows):
        raise typer.Exit(1)


def pretrain_command(context: typer.Context) -> None:
    """Pre-train a network on GlyphNet; the options are those of python -m bitlib.pretrain --help."""
    pretrain_main(context.args)


class _Several(typer.core.TyperCommand):
    """A command whose repeatable options also take several values at once: --seeds 0 1 2."""

    def parse_args(self, context: typer.Context, args: list[str]) -> list[str]:
        several = {name for parameter in self.params if parameter.multiple for name in parameter.opts}
        spread: list[str] = []
        current = None
        for word in args:
            if word.startswith("-"):
                current = word if word in several else None
            elif current and spread[-1] != current:
                spread.append(current)
            spread.append(word)
        return super().parse_args(context, spread)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: bitlib finetune FOLDER --out RUN, evaluate, predict, pretrain."""
    app = typer.Typer(
        name="bitlib",
        help="Big Transfer from scratch: a folder of pictures in, a classifier and a report out.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.command("finetune")(finetune_command)
    app.command("evaluate", cls=_Several)(evaluate_command)
    app.command("predict")(predict_command)
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("pretrain", context_settings=passed_on, add_help_option=False)(pretrain_command)
    app(args=None if argv is None else list(argv), prog_name="bitlib")


if __name__ == "__main__":
    main()
