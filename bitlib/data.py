"""Pictures in and out of the network, the upstream GlyphNet, and the downstream tasks.

Exported from chapters/01_data.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "shipped_file",
    "package_file",
    "to_tensor",
    "normalize",
    "denormalize",
    "resize",
    "resize_shorter_side",
    "center_crop",
    "random_crop",
    "random_flip",
    "resized_crop_boxes",
    "random_resized_crop",
    "cut_and_resize",
    "ImageTensorDataset",
    "TYPEFACES",
    "HELD_OUT_TYPEFACES",
    "N_HELD_OUT_CHARACTERS",
    "DIGITS",
    "LOOKALIKES",
    "UPSTREAM_PHOTOGRAPHS",
    "DOWNSTREAM_PHOTOGRAPHS",
    "SAME",
    "LIKE_A_DIGIT",
    "LIKE_A_LOOKALIKE",
    "CELL",
    "BOX",
    "Glyphs",
    "glyphs",
    "LabelGroup",
    "SIZES",
    "MIX",
    "N_VALIDATION",
    "MAX_COUNT",
    "PLACES",
    "N_INKS",
    "MARKS",
    "N_DARTS",
    "GlyphNet",
    "Task",
    "N_CHARACTERS",
    "SIDE",
    "photograph_blocks",
    "photograph_windows",
    "OPTIC_DISC",
    "BACKDROPS",
    "MAX_OBJECTS",
    "TASKS",
    "VTAB_MINI",
    "load_task",
]

import functools
import hashlib
import importlib.util
import io
import itertools
import math
import os
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageFont, ImageOps, features
from torch import Tensor
from torch.utils.data import Dataset


def shipped_file(name: str) -> Path:
    """The path of a file that ships with the book, such as "book.mplstyle".

    Looks in the installed package first (bitlib/shipped), then in the repository's data folder.
    Raises FileNotFoundError, naming the files that exist, for any other name.
    """
    package = Path(importlib.util.find_spec("bitlib").origin).parent
    folders = [package / "shipped", package.parent / "data"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    names = {str(f.relative_to(d)) for d in folders if d.is_dir() for f in d.rglob("*") if f.is_file()}
    raise FileNotFoundError(f"the book ships no file {name!r}; it ships {sorted(names)}")


def package_file(package: str, path: str) -> Path:
    """The path of a file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f'this needs files that {package} ships; pip install "bitlib[book]" brings it')
    file = Path(spec.origin).parent / path
    if not file.is_file():
        raise FileNotFoundError(f"this version of {package} does not ship {path}; see the book's requirements.txt")
    return file


def to_tensor(image: Image.Image | Tensor) -> Tensor:
    """Turn a picture into a uint8 tensor (3, height, width).

    Takes a PIL image of any 8-bit mode (and 16-bit grey), turned upright as its EXIF data say, or a uint8
    tensor (3, H, W), (1, H, W) or (H, W). Grey becomes three equal channels; transparency is dropped.
    Raises TypeError for anything else, ValueError for a tensor of another shape.
    """
    if isinstance(image, Image.Image):
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise TypeError(f"a PIL image of mode {image.mode!r} has no fixed range; convert it to 8 bits first")
        array = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()
    if not isinstance(image, Tensor):
        kind = f"{type(image).__module__}.{type(image).__qualname__}"
        raise TypeError(f"cannot read an image from {kind}; give a PIL image or a uint8 tensor")
    if image.dtype != torch.uint8:
        raise TypeError(f"an image tensor must be uint8, 0 to 255; got {image.dtype}")
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image has shape (3, H, W), (1, H, W) or (H, W); got {tuple(image.shape)}")
    return image.expand(3, -1, -1)


def normalize(image: Tensor) -> Tensor:
    """Map uint8 pixels (..., 3, H, W) to float32 in [-1, 1], the range that BiT was pre-trained on."""
    _check_images(image)
    return image.to(torch.float32) / 127.5 - 1.0


def denormalize(image: Tensor) -> Tensor:
    """The inverse of normalize: float in [-1, 1] to uint8, rounded and clipped."""
    return ((image + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _check_images(images: Tensor, ndim: int | None = None) -> None:
    """Complain unless images is uint8 (..., 3, H, W), or exactly (N, 3, H, W) with ndim=4."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        given = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a uint8 tensor, 0 to 255; got {given}")
    if images.ndim < 3 or images.shape[-3] != 3 or (ndim is not None and images.ndim != ndim):
        wanted = "(N, 3, H, W)" if ndim == 4 else "(..., 3, H, W)"
        raise ValueError(f"images must have shape {wanted}; got {tuple(images.shape)}")


def resize(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize to exactly size, (height, width) or one number for a square, whatever the shape was.

    images: uint8 (..., 3, H, W); returns uint8. Bilinear, with anti-aliasing when the picture shrinks.
    """
    _check_images(images)
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"cannot resize to {height}x{width}; both sides must be at least 1")
    flat = images.reshape(-1, *images.shape[-3:])
    # Only the CPU has a kernel for uint8, and torch 2.14's is wrong for a picture one pixel wide.
    if images.device.type != "cpu" or width == 1:
        flat = flat.float()
    flat = F.interpolate(flat, (height, width), mode="bilinear", antialias=True)
    if flat.is_floating_point():
        flat = flat.round().clamp(0, 255).to(torch.uint8)
    return flat.reshape(*images.shape[:-2], height, width)


def resize_shorter_side(images: Tensor, size: int) -> Tensor:
    """Resize so that the shorter side is size and the aspect ratio stays."""
    _check_images(images)
    height, width = images.shape[-2:]
    if height <= width:
        return resize(images, (size, int(size * width / height)))
    return resize(images, (int(size * height / width), size))


def center_crop(images: Tensor, size: int) -> Tensor:
    """The middle size x size pixels of uint8 (..., 3, H, W)."""
    _check_images(images)
    _check_crop(images, size)
    height, width = images.shape[-2:]
    top, left = int(round((height - size) / 2.0)), int(round((width - size) / 2.0))
    return images[..., top : top + size, left : left + size]


def random_crop(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cut a size x size window from each image of a batch (N, 3, H, W), each at its own random place."""
    _check_images(images, ndim=4)
    _check_crop(images, size)
    n, _, height, width = images.shape
    top = torch.randint(height - size + 1, (n, 1), generator=generator)
    left = torch.randint(width - size + 1, (n, 1), generator=generator)
    rows = (top + torch.arange(size))[:, None, :, None]  # (N, 1, size, 1)
    columns = (left + torch.arange(size))[:, None, None, :]  # (N, 1, 1, size)
    batch, channel = torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None]
    return images[batch, channel, rows, columns]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image of a batch (N, 3, H, W) left to right with probability one half."""
    _check_images(images, ndim=4)
    mirror = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirror[:, None, None, None], images.flip(-1), images)


def _check_crop(images: Tensor, size: int) -> None:
    height, width = images.shape[-2:]
    if not 1 <= size <= min(height, width):
        raise ValueError(f"cannot cut {size}x{size} out of {height}x{width}; resize the images first")


def resized_crop_boxes(
    n: int,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw n random windows (top, left, height, width) inside an image; returns long (n, 4).

    The area is uniform in scale (a fraction of the image), the aspect ratio log-uniform in ratio. Ten tries
    for a window that fits; if none does, the largest centred window whose ratio is allowed. The rule of
    Szegedy et al. (2015) in the form that torchvision made standard.
    """
    tries = 10
    u = torch.rand(n, tries, 4, generator=generator, dtype=torch.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * u[..., 1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = torch.arange(n), fits.int().argmax(dim=1)  # the first try that fits
    h, w = h[first], w[first]
    top = (u[..., 2][first] * (height - h + 1)).floor()
    left = (u[..., 3][first] * (width - w + 1)).floor()
    boxes = torch.stack([top, left, h, w], dim=1).long()
    whole_h = min(height, round(width / ratio[0]))
    whole_w = min(width, round(height * ratio[1]))
    fallback = torch.tensor([(height - whole_h) // 2, (width - whole_w) // 2, whole_h, whole_w])
    return torch.where(fits.any(dim=1)[:, None], boxes, fallback)


def random_resized_crop(
    images: Tensor, size: int, scale: tuple[float, float] = (0.08, 1.0), generator: torch.Generator | None = None
) -> Tensor:
    """Cut a random window from each image of a batch (N, 3, H, W) and resize it to size x size."""
    _check_images(images, ndim=4)
    boxes = resized_crop_boxes(len(images), *images.shape[-2:], scale=scale, generator=generator)
    return cut_and_resize(images, boxes, size)


def cut_and_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut a window (top, left, height, width) from each image (N, 3, H, W), resize it: uint8 (N, 3, size, size)."""
    crops = [resize(x[:, t : t + h, a : a + w], size) for x, (t, a, h, w) in zip(images, boxes.tolist(), strict=True)]
    return torch.stack(crops) if crops else images.new_empty(0, 3, size, size)


class ImageTensorDataset(Dataset):
    """A data set held in two tensors: images uint8 (N, 3, H, W) and labels long (N,).

    Raises ValueError if there are no images, if the lengths differ, or if a label lies outside
    0 ... n_classes - 1 (n_classes defaults to the largest label plus one).
    """

    def __init__(self, images: Tensor, labels: Tensor, n_classes: int | None = None):
        _check_images(images, ndim=4)
        labels = torch.as_tensor(labels)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers; got {labels.dtype}")
        if labels.ndim != 1 or len(labels) != len(images):
            raise ValueError(f"{len(images)} images need labels of shape ({len(images)},); got {tuple(labels.shape)}")
        if len(images) == 0:
            raise ValueError("the data set is empty; give at least one image")
        n_classes = int(labels.max()) + 1 if n_classes is None else n_classes
        if labels.min() < 0 or labels.max() >= n_classes:
            wrong = labels[(labels < 0) | (labels >= n_classes)][0].item()
            raise ValueError(f"label {wrong} is outside the {n_classes} classes; use 0 to {n_classes - 1}")
        self.images, self.labels, self.n_classes = images, labels.long(), n_classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


TYPEFACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
)
HELD_OUT_TYPEFACES = ("DejaVuSerif-Italic", "DejaVuSerif-BoldItalic")
N_HELD_OUT_CHARACTERS = 60
DIGITS = "0123456789"
LOOKALIKES = (  # decided by eye; the pictures find the rest
    "OoQØøθ○◯◌◦ºIl|ıZzSsBbqgGßð₴ЧчӋӌӴӵЗзӞӟҘҙЭэҔҕƧƨƷʒǮǯʓȜȝƻƼƽƄƅƐεɞʡʖƾɁ?˥ɥʮʯᶣȤȥⱿɀʐʑʣʤʥƸƹƺϘϙϛⱷՋջՁԶՇճზშგკნპჟყჩცხჱჳჵჷჹ"
)
UPSTREAM_PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "camera": ("skimage", "data/camera.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}
DOWNSTREAM_PHOTOGRAPHS = {
    "brick": ("skimage", "data/brick.png"),
    "cell": ("skimage", "data/cell.png"),
    "clock": ("skimage", "data/clock_motion.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "microaneurysms": ("skimage", "data/microaneurysms.png"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle-left": ("skimage", "data/motorcycle_left.png"),
    "motorcycle-right": ("skimage", "data/motorcycle_right.png"),
    "page": ("skimage", "data/page.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "text": ("skimage", "data/text.png"),
}


def _hash(stream: str, index: np.ndarray, n: int) -> np.ndarray:
    """Numbers that look random, uint64 (len(index), n): a function of the stream's name and the index alone.

    The generator is splitmix64: a counter, stepped by an odd constant and scrambled.
    """
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    state = _scramble(np.asarray(index, np.uint64) ^ np.uint64(key))
    return _scramble(state[:, None] + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _scramble(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


SAME = 0.994  # likeness of two pictures that count as one; 1 is equality
LIKE_A_DIGIT = 0.95
LIKE_A_LOOKALIKE = 0.97
CELL = 40  # a picture in the atlas is 40 x 40 pixels,
BOX = 30  # and the longer side of what is drawn in it is 30


def _drawn_characters() -> tuple[list[str], np.ndarray]:
    """All characters that the typefaces share, and their pictures: uint8 (typefaces, characters, CELL, CELL)."""
    from fontTools.ttLib import TTFont

    files = [package_file("matplotlib", f"mpl-data/fonts/ttf/{name}.ttf") for name in TYPEFACES]
    tables = [set(TTFont(file, lazy=True).getBestCmap()) for file in files]
    shared = [chr(c) for c in sorted(set.intersection(*tables))]
    marks_and_blanks = ("Mn", "Cf", "Zs")  # combining marks, format characters, spaces
    shared = [c for c in shared if unicodedata.category(c) not in marks_and_blanks and c != "\ufffc"]

    versions = f"1 {PIL.__version__} {features.version('freetype2')} {CELL} {BOX}"
    key = hashlib.sha256(b"".join([versions.encode(), *(file.read_bytes() for file in files)])).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitlib"
    cache, shape = folder / f"glyphs-{key}.npy", (len(TYPEFACES), len(shared), CELL, CELL)
    try:
        pictures = np.load(cache)
        if pictures.shape == shape and pictures.dtype == np.uint8:
            return shared, pictures
    except (OSError, ValueError, EOFError):
        pass  # not there yet, or damaged: draw again
    pictures = np.zeros(shape, np.uint8)
    for face, file in enumerate(files):
        font = ImageFont.truetype(str(file), 64, layout_engine=ImageFont.Layout.BASIC)
        for i, character in enumerate(shared):
            pictures[face, i] = _picture(font, character)
    pictures = _smooth(_smooth(pictures))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
            np.save(file, pictures)
        os.replace(file.name, cache)  # atomic: another process sees all of it or nothing
    except OSError:
        pass  # a read-only machine draws anew in every process
    return shared, pictures


def _picture(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """One character in the middle of a CELL x CELL square, its longer side BOX pixels long."""
    mask = font.getmask(character, "L")
    image = Image.frombytes("L", mask.size, bytes(mask))
    image = image.crop(image.getbbox())
    scale = BOX / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    cell = Image.new("L", (CELL, CELL))
    cell.paste(image.resize((width, height), Image.Resampling.BILINEAR), ((CELL - width) // 2, (CELL - height) // 2))
    return np.asarray(cell)


def _smooth(pictures: np.ndarray) -> np.ndarray:
    """Blur uint8 pictures with the weights 1, 2, 1 along both axes, in whole numbers."""
    for axis in (-2, -1):
        wide = np.moveaxis(pictures, axis, 0).astype(np.uint16)
        total = 2 * wide
        total[1:] += wide[:-1]
        total[:-1] += wide[1:]
        pictures = np.moveaxis(((total + 2) >> 2).astype(np.uint8), 0, axis)
    return np.ascontiguousarray(pictures)


@dataclass(frozen=True)
class Glyphs:
    """The characters that GlyphNet can draw.

    characters[c] is a string of all code points that draw the picture of class c; atlas is uint8
    (typefaces, classes, CELL, CELL). upstream and held_out list class numbers; excluded, those left out.
    """

    characters: tuple[str, ...]
    atlas: np.ndarray
    upstream: tuple[int, ...]
    held_out: tuple[int, ...]
    excluded: tuple[int, ...]

    def find(self, character: str) -> int:
        """The class that a character belongs to; ValueError if the typefaces do not share it."""
        for index, members in enumerate(self.characters):
            if character in members:
                return index
        raise ValueError(f"{character!r} is not among the characters that all {len(TYPEFACES)} typefaces draw")


@functools.cache
def glyphs() -> Glyphs:
    """Draw every shared character in every typeface, and sort out which are the same and which are left out.

    The drawings are cached in the user's cache folder when it can be written; the rest is arithmetic.
    """
    characters, pictures = _drawn_characters()
    shape = _shapes(pictures)

    # Two code points are one class if in every typeface their pictures agree.
    left, right = np.nonzero(np.triu(shape[0] @ shape[0].T >= SAME, k=1))
    agree = np.min([(face[left] * face[right]).sum(axis=1) for face in shape], axis=0) >= SAME
    group = np.arange(len(characters))
    for i, j in zip(left[agree], right[agree], strict=True):
        group[group == group[j]] = group[i]
    first, group = np.unique(group, return_inverse=True)
    members = tuple("".join(characters[j] for j in np.flatnonzero(group == c)) for c in range(len(first)))

    # Left out: numbers by Unicode's word, look-alikes by name, and whatever looks like either.
    digits, named = ([i for i, c in enumerate(characters) if c in names] for names in (DIGITS, LOOKALIKES))
    banned = np.array([unicodedata.numeric(c, None) is not None for c in characters])
    every_digit = shape[:, digits].reshape(-1, shape.shape[-1])  # in all typefaces
    for face in shape:
        banned |= (face @ every_digit.T).max(axis=1) >= LIKE_A_DIGIT
        banned |= (face @ face[named].T).max(axis=1) >= LIKE_A_LOOKALIKE
    excluded = np.unique(group[banned])

    # In an order that looks random. Held out are letters that resemble nothing else upstream; the rest is sorted
    # so that characters which are not composed of others come first, and the small sizes hold distinct ones.
    free = np.setdiff1d(np.arange(len(first)), excluded)
    free = free[np.argsort(_hash("characters", free, 1)[:, 0], kind="stable")]
    plain = np.array([not unicodedata.decomposition(characters[j]) for j in first[free]])
    letter = np.array([unicodedata.category(characters[j])[0] == "L" for j in first[free]])
    candidates = free[plain & letter][: 3 * N_HELD_OUT_CHARACTERS]
    likeness = np.max([face[first[candidates]] @ face[first[free]].T for face in shape], axis=0)
    likeness[candidates[:, None] == free] = 0.0  # with itself
    held_out = candidates[likeness.max(axis=1) < LIKE_A_LOOKALIKE][:N_HELD_OUT_CHARACTERS]
    rest = ~np.isin(free, held_out)
    upstream = np.concatenate([free[rest & plain], free[rest & ~plain]])
    return Glyphs(members, pictures[:, first], *(tuple(c.tolist()) for c in (upstream, held_out, excluded)))


def _shapes(pictures: np.ndarray) -> np.ndarray:
    """Unit vectors (typefaces, characters, 400) of the pictures at 20 x 20: their dot product is a likeness."""
    faces, n = pictures.shape[:2]
    small = pictures.reshape(faces, n, CELL // 2, 2, CELL // 2, 2).sum(axis=(3, 5), dtype=np.float64)
    small = small.reshape(faces, n, -1)
    return small / np.sqrt((small**2).sum(-1, keepdims=True))


def _stamp(
    faces: np.ndarray,
    classes: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    size: np.ndarray,
    frame: int,
    half: bool,
    half_tangent: np.ndarray,
    shear: np.ndarray,
    aspect: np.ndarray,
    threshold: np.ndarray,
    gain: np.ndarray,
    bend: np.ndarray | None = None,
) -> np.ndarray:
    """How much ink lies on each pixel: float32 (N, frame, frame) in [0, 1], for N characters.

    x, y, size: centre and longer side, in pixels of a 32 x 32 frame. The rotation is given by the tangent of
    half its angle, so that sine and cosine need no table. The atlas is blurred; cutting it at a threshold gives
    thick strokes (low) or thin ones (high), and gain says how sharp their edge is. Small drawings look at the
    atlas at half its resolution. bend (N, 2, 4): the coefficients of XX, XY, YY and YYY (for the rows: XXX) by which
    columns and rows are displaced, where X and Y run from -1 to 1 over the character.
    """
    if len(faces) == 0:
        return np.zeros((0, frame, frame), np.float32)
    cell, box = (CELL // 2, BOX / 2) if half else (CELL, BOX)
    norm = 1.0 + half_tangent**2
    cos, sin = (1.0 - half_tangent**2) / norm, 2.0 * half_tangent / norm
    step = box * 32.0 / (size * frame)  # atlas pixels per pixel of the frame
    ax, bx = step * (cos * aspect - shear * sin), step * (sin * aspect + shear * cos)
    ay, by = step * -sin / aspect, step * cos / aspect
    axis = (np.arange(frame) + 0.5).astype(np.float32)
    source = []
    for a, b in ((ax, bx), (ay, by)):  # where in the cell each pixel of the frame looks
        start = (cell - 1) / 2.0 - (a * x + b * y) * (frame / 32.0)
        a, b, start = (v.astype(np.float32)[:, None, None] for v in (a, b, start))
        source.append(np.clip(start + a * axis[None, None, :] + b * axis[None, :, None], 0.0, cell - 1.001))
    if bend is not None:
        centre, reach, c = np.float32((cell - 1) / 2.0), np.float32(box / 2.0), bend.astype(np.float32)[..., None, None]
        across, down = (np.clip((v - centre) / reach, -1.0, 1.0) for v in source)
        for i, (p, q) in enumerate([(across, down), (down, across)]):
            moved = p * (c[:, i, 0] * p + c[:, i, 1] * q) + q * q * (c[:, i, 2] + c[:, i, 3] * q)
            source[i] = np.clip(source[i] + reach * moved, 0.0, cell - 1.001)
    whole = [v.astype(np.int64) for v in source]
    right, down = (v - w.astype(np.float32) for v, w in zip(source, whole, strict=True))
    n_classes = len(glyphs().characters)
    corner = ((faces * n_classes + classes) * cell**2)[:, None, None] + whole[1] * cell + whole[0]
    atlas = _atlas(half)
    top, top_right, bottom, bottom_right = (
        atlas[offset:][corner].astype(np.float32) for offset in (0, 1, cell, cell + 1)
    )
    for near, far, part in ((top, top_right, right), (bottom, bottom_right, right), (top, bottom, down)):
        near += np.multiply(np.subtract(far, near, out=far), part, out=far)
    gain = gain.astype(np.float32)[:, None, None]
    return np.clip(top * (gain / 255.0) + (0.5 - gain * threshold.astype(np.float32)[:, None, None]), 0.0, 1.0)


@functools.cache
def _atlas(half: bool) -> np.ndarray:
    """The pictures of all characters in one row of bytes; at half the resolution for small drawings."""
    atlas = glyphs().atlas
    if half:
        faces, n = atlas.shape[:2]
        sums = atlas.reshape(faces, n, CELL // 2, 2, CELL // 2, 2).sum(axis=(3, 5), dtype=np.uint16)
        atlas = ((sums + 2) // 4).astype(np.uint8)
    return atlas.reshape(-1)


def _frame_cell(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which of the PLACES x PLACES parts of a 32 x 32 frame a point lies in."""
    row, column = (np.clip((v * (PLACES / 32.0)).astype(np.int64), 0, PLACES - 1) for v in (y, x))
    return row * PLACES + column


def _ink(u: dict) -> tuple[np.ndarray, np.ndarray]:
    """The colour to draw with, float32 (N, 3), and the number of its class."""
    label = (u["ink"] * N_INKS).astype(np.int64)
    hue = (label // 2 + 0.15 + 0.7 * u["hue"]) / 8.0
    lightness = np.where(label % 2 == 0, 0.2, 0.58) + 0.22 * u["lightness"]
    saturation = 0.6 + 0.4 * u["saturation"]
    grey = label >= 16
    lightness = np.where(grey, (label - 16) * 0.29 + 0.13 * u["lightness"], lightness)
    saturation = np.where(grey, 0.0, saturation)
    return _hsl_to_rgb(hue, saturation, lightness), label


def _hsl_to_rgb(hue: np.ndarray, saturation: np.ndarray, lightness: np.ndarray) -> np.ndarray:
    """Hue, saturation and lightness in [0, 1] to red, green, blue: float32 (N, 3)."""
    k = (np.array([0.0, 8.0, 4.0]) + 12.0 * hue[:, None]) % 12.0
    amount = (saturation * np.minimum(lightness, 1.0 - lightness))[:, None]
    wave = np.clip(np.minimum(k - 3.0, 9.0 - k), -1.0, 1.0)
    return (lightness[:, None] - amount * wave).astype(np.float32)


def _luminance(rgb: np.ndarray) -> np.ndarray:
    """How bright a colour (N, 3) looks, in [0, 1]."""
    return 0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2]


def _backdrop_range(u: dict, ink: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The range of brightness that leaves the ink visible, above it or below it: two float32 (N,)."""
    bright = _luminance(ink)
    light = np.where(bright < 0.35, True, np.where(bright > 0.65, False, u["polarity"] < 0.5))
    gap = 0.35 + 0.5 * u["contrast"]
    low = np.where(light, bright + gap * (1.0 - bright), 0.0)
    high = np.where(light, 1.0, bright - gap * bright)
    return low.astype(np.float32), high.astype(np.float32)


def _paint_gradients(canvas: np.ndarray, which: np.ndarray, u: dict, low: np.ndarray, high: np.ndarray) -> None:
    """Fill canvas[which] with gradients between two colours of allowed brightness, in any direction."""
    u = {name: u[name][which] for name in _GRADIENT}
    ends = []
    for end in "01":
        colour = _hsl_to_rgb(u[f"hue{end}"], 0.7 * u[f"saturation{end}"], np.full(len(which), 0.5))
        wanted = low[which] + (high - low)[which] * u[f"tone{end}"]
        colour += (wanted - _luminance(colour)).astype(np.float32)[:, None]
        ends.append(np.clip(colour, 0.0, 1.0)[:, :, None, None])
    size = canvas.shape[-1]
    axis = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
    slope_x, slope_y = (((2.0 * u[f"slope_{name}"] - 1.0) * 1.2).astype(np.float32)[:, None, None] for name in "xy")
    t = np.clip(0.5 + slope_x * axis[None, None, :] + slope_y * axis[None, :, None], 0.0, 1.0)[:, None]
    canvas[which] = ends[0] + t * (ends[1] - ends[0])


def _paint_photographs(
    canvas: np.ndarray, which: np.ndarray, u: dict, low: np.ndarray, high: np.ndarray, alone: np.ndarray
) -> np.ndarray:
    """Fill canvas[which] with crops of photographs at many scales; returns which place of which photograph.

    A photograph that stands alone keeps its contrast; one behind an ink is squeezed into [low, high].
    """
    u = {name: u[name][which] for name in _PHOTOGRAPH}
    size, pyramids = canvas.shape[-1], _photographs(canvas.shape[-1])
    crops, place = np.empty((len(which), 3, size, size), np.uint8), np.empty(len(which), np.int64)
    photo = (u["photo"] * len(pyramids)).astype(np.int64)
    for i, pyramid in enumerate(pyramids[p] for p in photo):
        level = pyramid[int(u["level"][i] * len(pyramid))]
        height, width = level.shape[1:]
        top, left = int(u["top"][i] * (height - size + 1)), int(u["left"][i] * (width - size + 1))
        crop = level[:, top : top + size, left : left + size]
        crops[i] = crop[:, :, ::-1] if u["mirror"][i] < 0.5 else crop
        row, column = PLACES * (2 * top + size) // (2 * height), PLACES * (2 * left + size) // (2 * width)
        place[i] = (photo[i] * PLACES + row) * PLACES + column
    tint = 0.9 + 0.2 * np.stack([u["red"], u["green"], u["blue"]], axis=1)
    gain = np.where(alone[which], 0.75 + 0.5 * u["gain"], 1.0)[:, None] * tint
    bias = np.where(alone[which], 0.2 * (u["bias"] - 0.5), 0.0)[:, None] + 0.5 - 0.5 * gain
    low, span = np.where(alone, 0.0, low)[which, None], np.where(alone, 1.0, high - low)[which, None]
    scale, offset = ((x).astype(np.float32)[:, :, None, None] for x in (gain * span / 255.0, low + bias * span))
    painted = crops.astype(np.float32)
    grey = u["grey"] < 0.3
    colour = painted[grey]
    painted[grey] = (0.299 * colour[:, 0] + 0.587 * colour[:, 1] + 0.114 * colour[:, 2])[:, None]
    canvas[which] = np.clip(painted * scale + offset, 0.0, 1.0)
    return place


@functools.cache
def _photographs(size: int) -> list[list[np.ndarray]]:
    """Each upstream photograph at scales from full down to little more than size: uint8 (3, height, width)."""
    pyramids = []
    for package, path in UPSTREAM_PHOTOGRAPHS.values():
        image = Image.open(package_file(package, path)).convert("RGB")
        pyramid, scale = [], 1.0
        while min(image.size) * scale >= 1.25 * size:
            shape = tuple(round(side * scale) for side in image.size)
            level = np.asarray(image.resize(shape, Image.Resampling.BOX, reducing_gap=None))
            pyramid.append(np.ascontiguousarray(level.transpose(2, 0, 1)))
            scale /= 1.4
        pyramids.append(pyramid)
    return pyramids


def _throw_darts(u: dict, wanted: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places for marks that do not touch: x, y (N, MAX_COUNT) in pixels of 32, and how many there are."""
    n, distance = len(wanted), 1.5 * size + 0.5
    x, y = np.full((n, MAX_COUNT), -99.0), np.full((n, MAX_COUNT), -99.0)
    count = np.zeros(n, np.int64)
    for i in range(N_DARTS):
        if (count == wanted).all():
            break
        reach = 32.0 - 1.3 * size
        dart_x, dart_y = (0.65 * size + reach * u[f"dart{i}_{name}"] for name in "xy")
        clear = ((x - dart_x[:, None]) ** 2 + (y - dart_y[:, None]) ** 2 >= (distance**2)[:, None]).all(axis=1)
        hit = np.flatnonzero(clear & (count < wanted))
        x[hit, count[hit]], y[hit, count[hit]] = dart_x[hit], dart_y[hit]
        count[hit] += 1
    return x, y, count


@functools.cache
def _mark_classes() -> np.ndarray:
    """The class numbers of MARKS."""
    return np.array([glyphs().find(mark) for mark in MARKS])


def _blur(images: np.ndarray, distance: int, axis: int) -> np.ndarray:
    """Half of each pixel and a quarter of each of its two neighbours at a distance along an axis of (N, 3, H, W)."""
    blurred = np.empty_like(images)
    source, target = np.moveaxis(images, axis, 0), np.moveaxis(blurred, axis, 0)
    np.add(source[: -2 * distance], source[2 * distance :], out=target[distance:-distance])
    np.add(source[:1], source[distance : 2 * distance], out=target[:distance])  # past the edge lies the edge again
    np.add(source[-2 * distance : -distance], source[-1:], out=target[-distance:])
    blurred *= 0.25
    blurred += 0.5 * images
    return blurred


def _degrade(canvas: np.ndarray, out: np.ndarray, u: dict) -> None:
    """Blur some of the images, add noise to most, write them to out, and pass some through JPEG."""
    for share, distances in ((0.3, (1,)), (0.12, (2, 2))):  # the second lot on top of the first
        soft = np.flatnonzero(u["blur"] < share)
        sharp = canvas[soft]
        blurred = sharp
        for distance, axis in itertools.product(distances, (2, 3)):
            blurred = _blur(blurred, distance, axis)
        blurred -= sharp
        blurred *= u["blur_amount"][soft].astype(np.float32)[:, None, None, None]
        sharp += blurred
        canvas[soft] = sharp

    table, size = _noise_table(), canvas.shape[-1]
    amount = 0.08 * np.maximum(0.0, u["noise"] * 1.4 - 0.4) ** 2
    noisy = np.flatnonzero(amount > 0.002)
    top, left = ((u[name][noisy] * (table.shape[-1] - size)).astype(np.int64) for name in ("noise_top", "noise_left"))
    for i, row, column in zip(noisy, top, left, strict=True):
        canvas[i] += np.float32(amount[i]) * table[:, row : row + size, column : column + size]
    canvas *= 255.0
    np.rint(canvas, out=canvas)
    np.clip(canvas, 0.0, 255.0, out=canvas)
    out[:] = canvas

    for i in np.flatnonzero(u["jpeg"] < 0.12):
        file = io.BytesIO()
        Image.frombytes("RGB", (size, size), out[i].transpose(1, 2, 0).tobytes()).save(
            file, "JPEG", quality=25 + int(70 * u["quality"][i])
        )
        # the decoder alone: the mode and size are known, so nobody need read the headers first
        decoded = Image.frombytes("RGB", (size, size), file.getvalue(), "jpeg", "RGB", "")
        out[i] = np.asarray(decoded).transpose(2, 0, 1)


@functools.cache
def _noise_table() -> np.ndarray:
    """Gaussian noise to cut pieces from: float32 (3, 384, 384). RandomState's stream never changes."""
    return np.random.RandomState(0).standard_normal((3, 384, 384)).astype(np.float32)


@dataclass(frozen=True)
class LabelGroup:
    """One question about an image: its name, how many answers it has, and its weight in the loss."""

    name: str
    n_classes: int
    weight: float


SIZES = {"S": (100, 10_000), "M": (1_000, 200_000), "L": (None, 2**31)}  # characters, images
MIX = {"character on a gradient": 0.40, "character on a photograph": 0.22, "photograph": 0.26, "marks": 0.12}
N_VALIDATION = 5_000
MAX_COUNT = 6
PLACES = 4  # a photograph is divided into 4 x 4 places, and so is the frame
N_INKS = 20  # 8 hues, each dark and light, and 4 greys
MARKS = "●■▲▼◆◗▬♥♠♣"
N_DARTS = 40
# The quantities that are drawn for an image, by what they are for.
_DRAWING = (
    *("kind", "character", "typeface", "size", "x", "y", "angle", "shear", "aspect", "weight", "softness"),
    *("ink", "hue", "saturation", "lightness", "polarity", "contrast"),
    *("hand", "bend0", "bend1", "bend2", "bend3", "bend4", "bend5", "bend6", "bend7"),
)
_PHOTOGRAPH = ("photo", "level", "top", "left", "mirror", "grey", "gain", "bias", "red", "green", "blue")
_GRADIENT = ("hue0", "hue1", "saturation0", "saturation1", "tone0", "tone1", "slope_x", "slope_y")
_AGEING = ("noise", "noise_top", "noise_left", "blur", "blur_amount", "jpeg", "quality")
_SCENE = ("count", "mark_size", "mark_backdrop", "mark_same")


@functools.cache
def _fields() -> tuple[str, ...]:
    """All quantities, in the order of their columns in the table of random numbers."""
    marks = [f"mark{i}_{what}" for i in range(MAX_COUNT) for what in ("kind", "size", "angle", "shape")]
    darts = [f"dart{i}_{axis}" for i in range(N_DARTS) for axis in "xy"]
    return (*_DRAWING, *_PHOTOGRAPH, *_GRADIENT, *_AGEING, *_SCENE, *marks, *darts)


class GlyphNet(Dataset):
    """Characters over gradients and photographs, photographs alone, and marks to count, with several labels.

    GlyphNet(size)[i] is (image uint8 (3, image_size, image_size), labels long (groups,)), where label g answers
    the question groups[g] and is -1 where the image has no answer. Image i is a function of (seed, split, size, i)
    and of nothing else: there are no files, and any batch in any process gives the same bytes.

    size: "S" (100 characters, 10,000 images), "M" (1,000 and 200,000) or "L" (all, and 2**31 images, to be
    indexed directly: do not shuffle it). split: "train", "val" (5,000 other images of the same characters), or
    "held-out" (on gradients, characters that no size shows, in typefaces that no size shows).
    """

    def __init__(self, size: str = "M", split: str = "train", seed: int = 0, image_size: int = 32):
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}; got {size!r}")
        if split not in ("train", "val", "held-out"):
            raise ValueError(f"split must be train, val or held-out; got {split!r}")
        if not 16 <= image_size <= 128:
            raise ValueError(f"image_size must lie between 16 and 128; got {image_size}")
        self.size, self.split, self.seed, self.image_size = size, split, seed, image_size
        # Images rendered at once: enough to amortise Python, few enough for the processor's cache.
        self.together = 512 * 32**2 // image_size**2
        n_characters, n_images = SIZES[size]
        table = glyphs()
        held_out = split == "held-out"
        self.character_classes = table.held_out if held_out else table.upstream[:n_characters]
        names = [name for name in TYPEFACES if (name in HELD_OUT_TYPEFACES) == held_out]
        self.typefaces = tuple(names)
        self.groups = (
            LabelGroup("character", len(self.character_classes), 1.0),
            LabelGroup("typeface", len(self.typefaces), 0.1),
            LabelGroup("ink", N_INKS, 0.3),
            LabelGroup("place", len(UPSTREAM_PHOTOGRAPHS) * PLACES**2, 0.5),
            LabelGroup("count", MAX_COUNT, 0.3),
            LabelGroup("position", PLACES**2, 0.1),
        )
        self._length = n_images if split == "train" else N_VALIDATION
        self._stream = f"glyphnet {size} {split} {seed}"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.batch([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*self.batch(indices), strict=True))

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Render several images together: uint8 (N, 3, size, size) and labels long (N, groups)."""
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(indices) and not (0 <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"GlyphNet has images 0 to {len(self) - 1}; asked for {indices.min()} to {indices.max()}")
        images = np.empty((len(indices), 3, self.image_size, self.image_size), np.uint8)
        labels = np.full((len(indices), len(self.groups)), -1, np.int64)
        for start in range(0, len(indices), self.together):
            chunk = slice(start, start + self.together)
            self._render(indices[chunk], images[chunk], labels[chunk])
        return torch.from_numpy(images), torch.from_numpy(labels)

    def _render(self, indices: np.ndarray, out: np.ndarray, labels: np.ndarray) -> None:
        """Render one chunk into out and labels.

        Only operations whose result for one image cannot depend on its neighbours are used: elementwise
        float32 arithmetic and look-ups, no matrix product, no sum whose order the library may choose.
        """
        bits = _hash(self._stream, indices, len(_fields())) >> np.uint64(11)
        u = {name: bits[:, i] * 2.0**-53 for i, name in enumerate(_fields())}  # each (N,), uniform in [0, 1)
        kind = np.searchsorted(np.cumsum(list(MIX.values()))[:-1], u["kind"], side="right")
        if self.split == "held-out":
            kind = np.zeros_like(kind)
        lone = kind <= 1  # a single character
        scene = kind == 3
        photo = (kind == 1) | (kind == 2) | (scene & (u["mark_backdrop"] < 0.25))
        inked = lone | scene

        ink, labels[inked, 2] = _ink(u)[0], _ink(u)[1][inked]
        low, high = _backdrop_range(u, ink)
        canvas = np.empty(out.shape, np.float32)
        _paint_gradients(canvas, np.flatnonzero(~photo), u, low, high)
        labels[photo, 3] = _paint_photographs(canvas, np.flatnonzero(photo), u, low, high, kind == 2)

        alpha = np.zeros((len(out), self.image_size, self.image_size), np.float32)
        which = np.flatnonzero(lone)
        labels[which, 0] = (u["character"][which] * len(self.character_classes)).astype(np.int64)
        labels[which, 1] = (u["typeface"][which] * len(self.typefaces)).astype(np.int64)
        labels[which, 5] = self._draw_characters(alpha, which, u, labels)
        which = np.flatnonzero(scene)
        labels[which, 4], labels[which, 5] = self._draw_marks(alpha, which, u)
        canvas += alpha[:, None] * (ink[:, :, None, None] - canvas)
        _degrade(canvas, out, u)

    def _draw_characters(self, alpha: np.ndarray, which: np.ndarray, u: dict, labels: np.ndarray) -> np.ndarray:
        """Draw one character into each alpha[which]; returns the part of the frame its centre lies in."""
        u = {name: u[name][which] for name in _DRAWING}
        faces = np.array([TYPEFACES.index(name) for name in self.typefaces])[labels[which, 1]]
        classes = np.array(self.character_classes)[labels[which, 0]]
        size = 33.0 - 19.0 * u["size"] ** 2  # in pixels of a 32 x 32 frame
        reach = np.maximum(32.0 - size, 0.0) / 2.0 + 1.5
        bend = np.stack([2.0 * u[f"bend{i}"] - 1.0 for i in range(8)], axis=1) * (0.28 * u["hand"])[:, None]
        x, y = (16.0 + reach * (2.0 * u[name] - 1.0) for name in "xy")
        alpha[which] = _stamp(
            *(faces, classes, x, y, size, self.image_size),
            half=False,
            half_tangent=0.16 * (2.0 * u["angle"] - 1.0),  # about 18 degrees either way
            shear=0.2 * (2.0 * u["shear"] - 1.0),
            aspect=0.85 + 0.3 * u["aspect"],
            threshold=0.25 + 0.27 * u["weight"],
            gain=1.5 + 4.5 * u["softness"],
            bend=bend.reshape(-1, 2, 4),
        )
        return _frame_cell(x, y)

    def _draw_marks(self, alpha: np.ndarray, which: np.ndarray, u: dict) -> tuple[np.ndarray, np.ndarray]:
        """Draw one to six marks that do not touch into each alpha[which]; returns (count - 1, position)."""
        u = {name: values[which] for name, values in u.items()}
        wanted = 1 + (u["count"] * MAX_COUNT).astype(np.int64)
        size = 3.8 + 3.0 * u["mark_size"]
        x, y, count = _throw_darts(u, wanted, size)
        solid = _mark_classes()
        known = np.array(self.character_classes)
        scene, i = np.nonzero(np.arange(MAX_COUNT) < count[:, None])  # every mark of every scene, scene by scene
        source = np.where(u["mark_same"][scene] < 0.6, 0, i)  # most scenes repeat one mark
        kind, shape, scale, angle = (
            np.stack([u[f"mark{j}_{name}"] for j in range(MAX_COUNT)], axis=1)
            for name in ("kind", "shape", "size", "angle")
        )
        shape = shape[scene, source]
        classes = np.where(
            kind[scene, source] < 0.6,
            solid[(shape * len(solid)).astype(np.int64)],
            known[(shape * len(known)).astype(np.int64)],
        )
        stamps = _stamp(
            *(np.full(len(scene), TYPEFACES.index("DejaVuSans-Bold")), classes, x[scene, i], y[scene, i]),
            *(size[scene] * (0.85 + 0.3 * scale[scene, i]), self.image_size),
            half=True,
            half_tangent=0.2 * (2.0 * angle[scene, i] - 1.0),
            shear=np.zeros(len(scene)),
            aspect=np.ones(len(scene)),
            threshold=np.full(len(scene), 0.3),
            gain=1.5 + 3.0 * u["softness"][scene],
        )
        if len(scene):  # each scene has a mark at least
            alpha[which] = np.maximum.reduceat(stamps, np.searchsorted(scene, np.arange(len(which))))
        return count - 1, np.where(count == 1, _frame_cell(x[:, 0], y[:, 0]), -1)


@dataclass(frozen=True)
class Task:
    """A downstream task: two data sets of (uint8 image, class index), the names of the classes, and a card.

    group: "natural", "specialized" or "structured", as VTAB sorts tasks. flip, crop: whether the label survives
    a mirror image, and a random crop; where it does not, fine-tuning must leave them out.
    """

    name: str
    train: Dataset
    test: Dataset
    classes: tuple[str, ...]
    description: str
    source: str
    licence: str
    group: str = "natural"
    flip: bool = True
    crop: bool = True

    @property
    def chance(self) -> float:
        """The accuracy of always answering the class that is most frequent in the test set."""
        return self.test.labels.bincount().max().item() / len(self.test)

    def train_val(self) -> tuple[Dataset, Dataset]:
        """The training set in two fixed parts, four fifths to train on and a fifth to choose settings with."""
        parts = _stratified_split(self.train.labels, len(self.train) * 4 // 5)
        return tuple(torch.utils.data.Subset(self.train, part.tolist()) for part in parts)

    def card(self) -> str:
        """What the task is, in a few lines of text."""
        survives = " and ".join(word for word, ok in (("flip", self.flip), ("crop", self.crop)) if ok) or "nothing"
        few = ", ".join(self.classes[:3])
        named = few if len(self.classes) <= 3 else f"{few} ... {self.classes[-1]}"
        return (
            f"{self.name} ({self.group}): {self.description}\n"
            f"  classes: {len(self.classes)} ({named}); chance {100 * self.chance:.1f} %\n"
            f"  images: {len(self.train):,} to train on, {len(self.test):,} to test on; label survives: {survives}\n"
            f"  source: {self.source}\n"
            f"  licence: {self.licence}"
        )


def _digits() -> Task:
    """Handwritten digits of 13 people, scanned; 8 x 8 pixels, enlarged to 32 x 32."""
    rows = np.loadtxt(package_file("sklearn", "datasets/data/digits.csv.gz"), delimiter=",")
    labels = torch.from_numpy(rows[:, -1].astype(np.int64))
    ink = torch.from_numpy(np.rint(rows[:, :-1] * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    images = resize(ink.expand(-1, 3, -1, -1), 32)
    train, test = _stratified_split(labels, 1_000)
    return Task(
        name="digits",
        train=ImageTensorDataset(images[train], labels[train], n_classes=10),
        test=ImageTensorDataset(images[test], labels[test], n_classes=10),
        classes=tuple(DIGITS),
        description="handwritten digits, scanned, 8x8 pixels in 17 levels of grey",
        source="Alpaydin and Kaynak (1998), UCI Machine Learning Repository; the copy in scikit-learn",
        licence="CC BY 4.0",
        flip=False,
    )


def _stratified_split(labels: Tensor, n_train: int) -> tuple[Tensor, Tensor]:
    """Indices of a fixed training part of n_train examples, each class in proportion, and of the rest."""
    order = np.argsort(_hash("split", np.arange(len(labels)), 1)[:, 0], kind="stable")
    counts = torch.bincount(labels).double() * n_train / len(labels)
    take = counts.floor().long()
    take[(counts - take).argsort(descending=True, stable=True)[: n_train - int(take.sum())]] += 1
    order = torch.from_numpy(order)
    train = torch.cat([order[labels[order] == c][:k] for c, k in enumerate(take.tolist())]).sort().values
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[train] = False
    return train, rest.nonzero().flatten()


def _faces() -> Task:
    """A hundred faces and a hundred snippets without one, 25 x 25 pixels in grey."""
    grey = np.load(package_file("skimage", "data/lfw_subset.npy"))
    images = torch.from_numpy(np.rint(grey * 255).astype(np.uint8))[:, None].expand(-1, 3, -1, -1)
    labels = torch.arange(len(images)) // 100  # scikit-image: the first hundred are faces
    train, test = _stratified_split(labels, 125)
    return Task(
        name="faces",
        train=ImageTensorDataset(resize(images[train], 32), labels[train]),
        test=ImageTensorDataset(resize(images[test], 32), labels[test]),
        classes=("face", "something else"),
        description="a face or not; snippets of photographs, 25x25 pixels in grey",
        source="Huang et al. (2012), Labeled Faces in the Wild; the subset in scikit-image",
        licence="for research, as LFW's page says; scikit-image ships the subset without a licence of its own",
    )


N_CHARACTERS = 50  # of the characters that GlyphNet holds out


def _characters() -> Task:
    """Characters that the upstream never shows; to train in one typeface that it never shows, to test in another."""
    held_out = GlyphNet("M", "held-out")
    images, labels = held_out.batch(range(len(held_out)))
    parts = []
    for typeface in range(len(HELD_OUT_TYPEFACES)):
        own = (labels[:, 1] == typeface).nonzero().flatten()
        chosen = [own[labels[own, 0] == c][:20] for c in range(N_CHARACTERS)]
        chosen = torch.cat(chosen).sort().values
        parts.append(ImageTensorDataset(images[chosen], labels[chosen, 0], N_CHARACTERS))
    return Task(
        name="characters",
        train=parts[0],
        test=parts[1],
        classes=tuple(glyphs().characters[c][0] for c in held_out.character_classes[:N_CHARACTERS]),
        description=f"{N_CHARACTERS} printed characters; trained in DejaVu Serif Italic, tested in Bold Italic",
        source="drawn as GlyphNet draws, from characters and typefaces that it leaves out",
        licence="the DejaVu fonts' own (free to use and embed); the images are the book's",
        flip=False,
    )


SIDE = 32  # of a task's images, in pixels


@functools.cache
def _pixels(name: str) -> Tensor:
    """A downstream photograph: uint8 (3, height, width)."""
    return to_tensor(Image.open(package_file(*DOWNSTREAM_PHOTOGRAPHS[name])))


def photograph_blocks(height: int, width: int, split: str) -> np.ndarray:
    """The blocks (top, left, height, width) of a photograph that belong to "train" or to "test"; long (n, 4)."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test; got {split!r}")
    rows, columns = max(2, height // 96), max(2, width // 96)
    y, x = height * np.arange(rows + 1) // rows, width * np.arange(columns + 1) // columns
    chosen = [
        (y[r], x[c], y[r + 1] - y[r], x[c + 1] - x[c])
        for r, c in itertools.product(range(rows), range(columns))
        if ((r + c) % 3 == 0) == (split == "test")
    ]
    return np.array(chosen)


def photograph_windows(
    name: str, split: str, n: int, smallest: int, largest: int, stream: str = "windows"
) -> np.ndarray:
    """n random square windows (top, left, side) of a downstream photograph, each inside a block of the split."""
    blocks = photograph_blocks(*_pixels(name).shape[1:], split)
    u = (_hash(f"{stream} {name} {split}", np.arange(n), 4) >> np.uint64(11)) * 2.0**-53
    top, left, height, width = blocks[(u[:, 0] * len(blocks)).astype(np.int64)].T
    side = np.minimum(smallest + (u[:, 1] * (largest - smallest + 1)).astype(np.int64), np.minimum(height, width))
    top, left = (
        top + (u[:, 2] * (height - side + 1)).astype(np.int64),
        left + (u[:, 3] * (width - side + 1)).astype(np.int64),
    )
    return np.stack([top, left, side], axis=1)


def _cut(pixels: Tensor, windows: np.ndarray) -> Tensor:
    """The windows of a photograph, each resized to SIDE x SIDE: uint8 (n, 3, SIDE, SIDE)."""
    return torch.stack([resize(pixels[:, t : t + s, a : a + s], SIDE) for t, a, s in windows.tolist()])


def _windows_task(name: str, photographs: Sequence[str], **card) -> Task:
    """Which of several photographs does a window come from?"""
    parts = []
    for split, total in (("train", 1_000), ("test", 500)):
        counts = [total // len(photographs) + (i < total % len(photographs)) for i in range(len(photographs))]
        images = [
            _cut(_pixels(photograph), photograph_windows(photograph, split, n, 32, 64))
            for photograph, n in zip(photographs, counts, strict=True)
        ]
        labels = torch.arange(len(photographs)).repeat_interleave(torch.tensor(counts))
        parts.append(ImageTensorDataset(torch.cat(images), labels))
    return Task(name, *parts, classes=tuple(photographs), **card)


def _which_photograph() -> Task:
    """Ten photographs of very different things."""
    return _windows_task(
        "photographs",
        ("cell", "clock", "coffee", "coins", "hubble", "ihc", "moon", "motorcycle-left", "page", "text"),
        description="which of ten photographs a window of 32 to 64 pixels comes from",
        source="scikit-image's data folder, which names each photographer",
        licence="public domain, CC0 or no known restrictions; the motorcycle for research; some not stated",
    )


def _textures() -> Task:
    """A brick wall, grass, gravel."""
    return _windows_task(
        "textures",
        ("brick", "grass", "gravel"),
        description="a brick wall, grass or gravel, in grey, in windows of 32 to 64 pixels",
        source="CC0Textures (brick, gravel) and linolafett on DeviantArt (grass); the copies in scikit-image",
        licence="CC0",
    )


OPTIC_DISC = (646, 234)  # row and column in the photograph of the retina, by eye


def _levels_task(
    name: str,
    photograph: str,
    sides: tuple[int, int],
    measure,
    n_levels: int,
    classes: tuple[str, ...],
    **card,
) -> Task:
    """Windows of one photograph, sorted into levels of what is measured in them.

    measure(windows) gives one number for each window (top, left, side); NaN takes a window out.
    """
    windows, values = {}, {}
    for split, n in (("train", 1_000), ("test", 500)):
        for tries in (1, 2, 4, 8):  # window i is the same however many are drawn
            drawn = photograph_windows(photograph, split, tries * n, *sides, stream=name)
            measured = measure(drawn)
            good = np.flatnonzero(~np.isnan(measured))[:n]
            if len(good) == n:
                break
        windows[split], values[split] = drawn[good], measured[good]
    edges = np.quantile(values["train"], np.arange(1, n_levels) / n_levels)
    parts = [
        ImageTensorDataset(
            _cut(_pixels(photograph), windows[split]),
            torch.from_numpy(np.searchsorted(edges, values[split], side="right")),
            n_levels,
        )
        for split in ("train", "test")
    ]
    return Task(name, *parts, classes=classes, **card)


def _mean_in(windows: np.ndarray, values: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """The mean of values (height, width) in each window (top, left, side), less a margin on every side of it."""
    cut = (windows[:, 2] * margin).astype(np.int64)
    return np.array(
        [
            values[t + m : t + s - m, a + m : a + s - m].mean()
            for (t, a, s), m in zip(windows.tolist(), cut.tolist(), strict=True)
        ]
    )


def _stain(pixels: np.ndarray) -> np.ndarray:
    """How much DAB there is at each pixel (Ruifrok and Johnston, 2001): (height, width), from uint8 (3, ...)."""
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])  # hematoxylin, eosin, DAB
    density = -np.log(np.maximum(pixels, 1) / 255.0)
    return np.tensordot(np.linalg.inv(stains)[:, 2], density, axes=1)


def _histology() -> Task:
    """How much of a brown stain there is in a window of a section of the colon."""
    stain = _stain(_pixels("ihc").numpy())
    return _levels_task(
        "histology",
        "ihc",
        (32, 64),
        lambda windows: _mean_in(windows, stain),
        4,
        ("least stained", "little stained", "much stained", "most stained"),
        description="the level of a brown stain (DAB) in a section of the colon, windows of 32 to 64 pixels",
        source="Center for Microscopy and Molecular Imaging (CMMI), immunohistochemistry of FHL2; in scikit-image",
        licence="no known copyright restrictions",
        group="specialized",
    )


def _retina() -> Task:
    """How far a window lies from the optic disc of a retina."""
    height, width = _pixels("retina").shape[1:]

    def distance(windows: np.ndarray) -> np.ndarray:
        top, left, side = windows.T
        y, x = top + side / 2, left + side / 2
        inside = np.hypot(y - height / 2, x - width / 2) + side / 2**0.5 < 0.48 * width  # the picture is a disc
        return np.where(inside, np.hypot(y - OPTIC_DISC[0], x - OPTIC_DISC[1]), np.nan)

    return _levels_task(
        "retina",
        "retina",
        (64, 96),
        distance,
        4,
        ("at the optic disc", "near it", "far from it", "farthest from it"),
        description="the level of distance from the optic disc, windows of 64 to 96 pixels of a retina",
        source="Haeggstroem (2014), fundus photograph, Wikimedia Commons; in scikit-image",
        licence="CC0",
        group="specialized",
    )


def _sky() -> Task:
    """How many stars and galaxies there are in a window of the Hubble telescope's deepest picture."""
    red, green, blue = _pixels("hubble").numpy().astype(np.int64)
    bright = ((299 * red + 587 * green + 114 * blue) // 1000).astype(np.uint8)

    def peaks(windows: np.ndarray) -> np.ndarray:
        counts = []
        for t, a, s in windows.tolist():
            soft = torch.from_numpy(_smooth(_smooth(bright[t : t + s, a : a + s]))).float()
            around = F.max_pool2d(soft[None], 5, stride=1, padding=2)[0]
            counts.append(int(((soft == around) & (soft > 40)).sum()))
        # windows differ in size, so what counts is the number on the same area
        return np.array(counts) * (64 / windows[:, 2]) ** 2

    return _levels_task(
        "sky",
        "hubble",
        (48, 64),
        peaks,
        4,
        ("fewest sources", "few sources", "many sources", "most sources"),
        description="the level of the number of stars and galaxies on a piece of the sky, windows of 48 to 64 pixels",
        source="NASA, ESA, the Hubble eXtreme Deep Field (2012); in scikit-image",
        licence="public domain",
        group="specialized",
    )


def _depth() -> Task:
    """How near the middle of a window is, by the disparity of a stereo pair."""
    with np.load(package_file("skimage", "data/motorcycle_disp.npz")) as file:
        disparity = file["arr_0"].astype(np.float64)
    disparity[~np.isfinite(disparity)] = np.nan  # seen by one camera only
    return _levels_task(
        "depth",
        "motorcycle-left",
        (48, 48),
        lambda windows: _mean_in(windows, disparity, margin=0.375),
        4,
        ("farthest", "far", "near", "nearest"),
        description="the level of disparity, so of nearness, in the middle of a window of 48 pixels",
        source="Scharstein et al. (2014), Middlebury stereo, left picture of Motorcycle; in scikit-image",
        licence="for research, as Middlebury's page says",
        group="structured",
        crop=False,
    )


BACKDROPS = ("brick", "clock", "coffee", "grass", "gravel", "motorcycle-left")
MAX_OBJECTS = 8


def _uniform(stream: str, n: int, *names: str) -> dict[str, np.ndarray]:
    """Named quantities for n images, each float64 (n,), uniform in [0, 1)."""
    bits = _hash(stream, np.arange(n), len(names)) >> np.uint64(11)
    return {name: bits[:, i] * 2.0**-53 for i, name in enumerate(names)}


def _backdrops(stream: str, split: str, n: int, dark: np.ndarray) -> np.ndarray:
    """Backdrops of little contrast, float32 (n, 3, SIDE, SIDE): below 0.45 where dark, above 0.55 elsewhere."""
    u = _uniform(f"{stream} backdrop", n, "kind", "which", *_GRADIENT)
    low, high = np.where(dark, 0.0, 0.55).astype(np.float32), np.where(dark, 0.45, 1.0).astype(np.float32)
    canvas = np.empty((n, 3, SIDE, SIDE), np.float32)
    photo = u["kind"] < 0.5
    _paint_gradients(canvas, np.flatnonzero(~photo), u, low, high)
    which = (u["which"] * len(BACKDROPS)).astype(np.int64)
    for i, name in enumerate(BACKDROPS):
        own = np.flatnonzero(photo & (which == i))
        crops = _cut(_pixels(name), photograph_windows(name, split, len(own), 32, 64, stream=stream)).numpy()
        canvas[own] = low[own, None, None, None] + 0.45 * (crops / np.float32(255.0))
    return canvas


def _draw_object(
    canvas: np.ndarray,
    which: np.ndarray,
    shape: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    radius: np.ndarray,
    angle: np.ndarray,
    colour: np.ndarray,
) -> None:
    """Draw one object into each canvas[which]: disc, square, bar or triangle (0 to 3), angle in radians, y upwards."""
    axis = np.arange(SIDE) + 0.5
    dx, dy = axis[None, None, :] - x[:, None, None], y[:, None, None] - axis[None, :, None]
    cos, sin, r = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None], radius[:, None, None]
    u, v = (cos * dx + sin * dy) / r, np.abs(cos * dy - sin * dx) / r
    disc = np.sqrt(u**2 + v**2) - 1.0
    square = np.maximum(np.abs(u), v) - 0.85
    bar = np.maximum(np.abs(u) - 1.0, v - 0.35)
    triangle = np.maximum(-u - 0.7, (0.75 * (u - 1.0) + 1.7 * v) / 1.86)
    outline = np.choose(shape[:, None, None], [disc, square, bar, triangle])
    alpha = np.clip(0.5 - r * outline, 0.0, 1.0)[:, None].astype(np.float32)
    canvas[which] += alpha * (colour[:, :, None, None] - canvas[which])


def _scene_task(name: str, draw, classes: tuple[str, ...], **card) -> Task:
    """1,000 training and 1,000 test scenes; draw(canvas, stream, colours) fills the canvas and returns the labels."""
    parts = []
    for split in ("train", "test"):
        n, stream = 1_000, f"scene {name} {split}"
        dark = _uniform(f"{stream} tone", n, "tone")["tone"] < 0.5
        canvas = _backdrops(stream, split, n, dark)
        fields = [f"{what}{i}" for i in range(MAX_OBJECTS) for what in ("hue", "saturation", "lightness")]
        u = _uniform(f"{stream} colour", n, *fields)
        colours = [
            _hsl_to_rgb(
                u[f"hue{i}"], 0.5 + 0.5 * u[f"saturation{i}"], np.where(dark, 0.68, 0.12) + 0.2 * u[f"lightness{i}"]
            )
            for i in range(MAX_OBJECTS)
        ]
        labels = draw(canvas, stream, colours)
        images = np.clip(np.rint(canvas * 255.0), 0, 255).astype(np.uint8)
        parts.append(ImageTensorDataset(torch.from_numpy(images), torch.from_numpy(labels), len(classes)))
    return Task(
        name,
        *parts,
        classes=classes,
        source="drawn by this chapter, half of them over pieces of photographs from scikit-image's data folder",
        licence="Apache 2.0; the photographs' own for the backdrops",
        group="structured",
        **card,
    )


def _draw_count(canvas: np.ndarray, stream: str, colours: list[np.ndarray]) -> np.ndarray:
    """One to eight objects, each in a cell of its own of a 4 x 4 grid."""
    n = len(canvas)
    fields = [f"{what}{i}" for i in range(MAX_OBJECTS) for what in ("shape", "radius", "angle", "x", "y")]
    u = _uniform(stream, n, "count", *fields)
    cells = np.argsort(_hash(f"{stream} cells", np.arange(n), 16), axis=1, kind="stable")
    count = (u["count"] * MAX_OBJECTS).astype(np.int64)
    for i in range(MAX_OBJECTS):
        has = np.flatnonzero(count >= i)
        own = {what: u[f"{what}{i}"][has] for what in ("shape", "radius", "angle", "x", "y")}
        radius = 1.8 + 1.2 * own["radius"]
        reach = 4.0 - radius  # an object stays in its cell of 8 x 8 pixels
        x, y = (
            8 * part + 4 + reach * (2 * own[axis] - 1)
            for axis, part in (("x", cells[has, i] % 4), ("y", cells[has, i] // 4))
        )
        shape = (4 * own["shape"]).astype(np.int64)
        _draw_object(canvas, has, shape, x, y, radius, 2 * math.pi * own["angle"], colours[i][has])
    return count


def _draw_orientation(canvas: np.ndarray, stream: str, colours: list[np.ndarray]) -> np.ndarray:
    """A triangle that points anywhere; the label is the sector of 45 degrees."""
    n = len(canvas)
    u = _uniform(stream, n, "sector", "within", "radius", "x", "y")
    sector = (8 * u["sector"]).astype(np.int64)
    radius = 6.0 + 6.0 * u["radius"]
    x, y = (16.0 + 4.0 * (2 * u[axis] - 1) for axis in "xy")
    _draw_object(canvas, np.arange(n), np.full(n, 3), x, y, radius, (sector + u["within"]) * math.pi / 4, colours[0])
    return sector


def _draw_position(canvas: np.ndarray, stream: str, colours: list[np.ndarray]) -> np.ndarray:
    """An object whose centre lies in one of eight columns."""
    n = len(canvas)
    u = _uniform(stream, n, "column", "within", "y", "radius", "shape", "angle")
    column = (8 * u["column"]).astype(np.int64)
    x, y = 4.0 + 3.0 * (column + u["within"]), 4.0 + 24.0 * u["y"]
    shape, radius = (4 * u["shape"]).astype(np.int64), 2.5 + 3.0 * u["radius"]
    _draw_object(canvas, np.arange(n), shape, x, y, radius, 2 * math.pi * u["angle"], colours[0])
    return column


def _draw_distance(canvas: np.ndarray, stream: str, colours: list[np.ndarray]) -> np.ndarray:
    """Three to five discs or squares of one size at several distances; the label is the range of the nearest."""
    n = len(canvas)
    fields = [f"{what}{i}" for i in range(5) for what in ("shape", "x", "y", "angle", "share")]
    u = _uniform(stream, n, "range", "within", "others", *fields)
    label = (6 * u["range"]).astype(np.int64)
    nearest = 2.5 * (9.0 / 2.5) ** ((label + u["within"]) / 6)  # its radius in pixels, on a scale of ratios
    others = 2 + (3 * u["others"]).astype(np.int64)
    for i in reversed(range(5)):  # far objects first, so that the nearest lies on top
        has = np.flatnonzero(others >= i)
        own = {what: u[f"{what}{i}"][has] for what in ("shape", "x", "y", "angle", "share")}
        radius = nearest[has] * (1.0 if i == 0 else 0.3 + 0.5 * own["share"])
        x, y = (radius + (SIDE - 2 * radius) * own[axis] for axis in "xy")
        _draw_object(
            canvas, has, (2 * own["shape"]).astype(np.int64), x, y, radius, 2 * math.pi * own["angle"], colours[i][has]
        )
    return 5 - label  # range 0 is the nearest


def _count() -> Task:
    return _scene_task(
        *("count", _draw_count, tuple(str(i + 1) for i in range(MAX_OBJECTS))),
        description="how many objects, one to eight, of any shape, colour and size",
        crop=False,
    )


def _orientation() -> Task:
    return _scene_task(
        *("orientation", _draw_orientation, tuple(f"{45 * i} to {45 * (i + 1)} degrees" for i in range(8))),
        description="in which of eight sectors a triangle points",
        flip=False,
    )


def _x_position() -> Task:
    return _scene_task(
        *("x-position", _draw_position, tuple(f"column {i + 1}" for i in range(8))),
        description="in which of eight columns the centre of an object lies",
        flip=False,
        crop=False,
    )


def _distance() -> Task:
    return _scene_task(
        *("distance", _draw_distance, tuple(f"range {i + 1}" for i in range(6))),
        description="in which of six ranges the nearest of several objects of one size lies; nearer is larger",
        crop=False,
    )


TASKS = {
    "digits": _digits,
    "faces": _faces,
    "photographs": _which_photograph,
    "textures": _textures,
    "characters": _characters,
    "histology": _histology,
    "retina": _retina,
    "sky": _sky,
    "count": _count,
    "orientation": _orientation,
    "x-position": _x_position,
    "distance": _distance,
    "depth": _depth,
}
VTAB_MINI = {  # VTAB's three groups, and which of our tasks is in which
    "natural": ("digits", "faces", "photographs", "textures", "characters"),
    "specialized": ("histology", "retina", "sky"),
    "structured": ("count", "orientation", "x-position", "distance", "depth"),
}


@functools.cache
def load_task(name: str) -> Task:
    """Load a downstream task by its name in TASKS. Nothing is downloaded, and each call gives the same bytes."""
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]()
