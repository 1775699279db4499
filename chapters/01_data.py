# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   bitlib:
#     module: data
#     summary: Pictures in and out of the network, the upstream GlyphNet, and the downstream tasks.
# ---

# %% [markdown]
# # Data
#
# At the end of this chapter we can bring any picture into the form that BiT expects, and we have data for the whole
# book without a download: *GlyphNet* to pre-train on, and scanned handwriting to transfer to.
#
# **Runtime:** about half a minute on two CPU cores.
#
# **Builds on:** basic PyTorch. Nothing else in the book comes before it.

# %% tags=["setup", "remove-cell"]
# Does nothing outside Colab; there it installs the book's package and what the chapters need.
import sys

if "google.colab" in sys.modules:
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", 'install -q "bitlib[book] @ git+https://github.com/OWNER/REPOSITORY"')

# %% tags=["export"]
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

# %% [markdown]
# Two small helpers come first. Every file that the book ships lies in one folder, whether the book was cloned or
# installed; `shipped_file` finds it, beginning with the style of our figures. And `package_file` finds a file that
# another package ships, such as a photograph or a font, without importing that package.


# %% tags=["export"]
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


# %%
import matplotlib.pyplot as plt
from torch import nn
from torchvision.transforms import v2

plt.style.use(shipped_file("book.mplstyle"))

# %% [markdown]
# ## The problem: nothing complains
#
# A picture on disk holds whole numbers from 0 to 255. A network wants small real numbers, and there are four
# customs of making them, each as good as the others:
#
# | range | from a pixel $p$ | who uses it |
# |---|---|---|
# | $[0, 1]$ | $p / 255$ | `torchvision`'s conversion to float |
# | $[-0.5, 0.5]$ | $p / 255 - 0.5$ | several older code bases |
# | $[-1, 1]$ | $(p / 255 - 0.5) / 0.5$ | **BiT** |
# | mean and standard deviation | $(p / 255 - \mu) / \sigma$ | most networks trained on ImageNet {cite}`deng2009imagenet` |
#
# In the last one, $\mu$ and $\sigma$ are per channel, and taken over the training set. For ImageNet they are
# $\mu = (0.485, 0.456, 0.406)$ and $\sigma = (0.229, 0.224, 0.225)$.
#
# A network trained in one range and used in another raises no error. All shapes are right. What does it cost? Let
# us take the smallest network that is worth the name: one random convolution with a ReLU, average pooling to 4 × 4,
# and a linear classifier fitted by ridge regression in closed form {cite}`hoerl1970ridge`. The data are the 1,797
# scanned digits that ship with scikit-learn {cite}`pedregosa2011sklearn`. We train it once in each range and test
# each result in every range. Before you run the cell: how much will be lost between $[-1, 1]$ and $[0, 1]$?

# %%
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
RANGES = {
    "[0, 255]": lambda p: p.float(),
    "[0, 1]": lambda p: p / 255,
    "[-0.5, 0.5]": lambda p: p / 255 - 0.5,
    "[-1, 1]": lambda p: (p / 255 - 0.5) / 0.5,
    "mean, std": lambda p: (p / 255 - IMAGENET_MEAN) / IMAGENET_STD,
}


def digit_pictures():
    """1,000 training and 797 test pictures (N, 3, 32, 32), uint8, with their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))
    pixels = pixels[:, None].expand(-1, 3, -1, -1).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(pixels)))
    pixels, labels = pixels[order], torch.from_numpy(digits.target)[order]
    return (pixels[:1000], labels[:1000]), (pixels[1000:], labels[1000:])


def range_table(seed):
    """Accuracy of the small network for every pair of a range to train in and a range to test in."""
    (x_train, y_train), (x_test, y_test) = digit_pictures()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 64, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())

    @torch.no_grad()
    def features(x):
        f = net(x).double()
        return torch.cat([f, torch.ones(len(f), 1)], dim=1)  # a column of ones for the bias

    accuracy = torch.zeros(len(RANGES), len(RANGES))
    tests = [features(to_range(x_test)) for to_range in RANGES.values()]
    for i, to_range in enumerate(RANGES.values()):
        f = features(to_range(x_train))
        ridge = 1e-3 * f.square().mean() * len(f)
        weights = torch.linalg.solve(f.T @ f + ridge * torch.eye(f.shape[1]), f.T @ torch.eye(10).double()[y_train])
        for j, test in enumerate(tests):
            accuracy[i, j] = ((test @ weights).argmax(dim=1) == y_test).double().mean()
    return accuracy


accuracy = torch.stack([range_table(seed) for seed in range(5)]).mean(dim=0)

# %% tags=["hide-input"] mystnb={"image": {"alt": "A five by five table of accuracies, one row for each range the network was trained in and one column for each range it was tested in. The diagonal is 98 or 99 percent; the other entries lie between 18 and 94 percent."}}
fig, ax = plt.subplots(figsize=(6.4, 3.4))
ax.imshow(accuracy, vmin=0, vmax=1, cmap="cividis", aspect="auto")
for i in range(len(RANGES)):
    for j in range(len(RANGES)):
        shade = "white" if accuracy[i, j] < 0.6 else "black"
        ax.text(j, i, f"{100 * accuracy[i, j]:.0f} %", ha="center", va="center", color=shade)
ax.set_xticks(range(len(RANGES)), RANGES)
ax.set_yticks(range(len(RANGES)), RANGES)
ax.set(xlabel="range at test time", ylabel="range in training", title="Digits classified rightly, mean of five seeds")
ax.grid(False)
plt.show()

# %%
names = list(RANGES)
matched = accuracy.diagonal()
assert matched.min() > 0.97 and matched.max() - matched.min() < 0.01
assert accuracy[names.index("[-1, 1]"), names.index("[0, 1]")] < 0.5 and accuracy.min() < 0.2
print(f"matched: {100 * matched.min():.0f} to {100 * matched.max():.0f} %")

# %% [markdown]
# On the diagonal all ranges are equally good, within one per cent. Off it, accuracy falls, in places below one in
# five. So no range is right or wrong: what counts is that **fine-tuning and testing use the range of
# pre-training**. A network that was trained in $[-1, 1]$ and is tested in $[0, 1]$ loses more than half of its
# answers, in silence.
#
# Not every mismatch hurts alike. From $[-1, 1]$ to "mean, std" little changes, for the two ranges nearly coincide.
# That is the nastiest case in practice: a loss of some per cent that nobody notices.
#
# The cure is to let one function do it, and to let nobody else do it. In this book data sets hold bytes; the
# conversion happens in `normalize`, right before the network.

# %% [markdown]
# ## From a picture to numbers
#
# First a picture becomes a tensor of bytes, channels first. Files come in many modes: grey, palette, CMYK,
# with transparency, 16 bits deep, lying on their side with a note in the EXIF data saying so. All of them leave
# `to_tensor` as uint8 of shape $(3, H, W)$, or not at all.


# %% tags=["export"]
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


# %%
photograph = Image.new("RGB", (5, 4), (255, 128, 0))
print(tuple(to_tensor(photograph).shape), to_tensor(photograph)[:, 0, 0].tolist())
for mode in ("L", "P", "RGBA", "CMYK", "1", "I;16"):
    assert to_tensor(Image.new(mode, (5, 4))).shape == (3, 4, 5), mode
for wrong in (np.zeros((4, 5, 3)), torch.zeros(3, 4, 5), torch.zeros(4, 4, 5, dtype=torch.uint8)):
    try:
        to_tensor(wrong)
    except (TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")

# %% [markdown]
# Then the range. With $p$ a byte,
#
# $$x = \frac{p / 255 - 0.5}{0.5} = \frac{p}{127.5} - 1 .$$


# %% tags=["export"]
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


# %% [markdown]
# It equals torchvision's two steps, and undoing it gives every byte back:

# %%
every_byte = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])(every_byte)
torch.testing.assert_close(normalize(every_byte), theirs, rtol=0, atol=1e-6)
assert torch.equal(denormalize(normalize(every_byte)), every_byte)
print(normalize(every_byte).min().item(), normalize(every_byte).max().item())

# %% [markdown]
# ## From any size to one size
#
# A batch is a tensor, so all its pictures must have one size. BiT resizes to a *square*, whatever the shape was, and
# cuts out random squares in training. At test time it resizes straight to the size of the crop and cuts nothing
# {cite}`kolesnikov2020big`. The older custom keeps the aspect ratio: resize the *shorter side*, then cut out the
# middle. We need both.
#
# Shrinking a picture by taking every tenth pixel gives moiré. Anti-aliasing averages over the pixels that fall
# into one new pixel; it is the difference between Pillow's result and that of a plain bilinear look-up.


# %% tags=["export"]
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


# %% [markdown]
# Crops and flips act on a batch, and each picture of the batch gets its own draw. The draws come from a generator
# that the caller passes in. This is how a run can be repeated: there is no hidden state in this module.


# %% tags=["export"]
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


# %% [markdown]
# All of them agree with torchvision on real pixels. Enlarged and shrunk pictures may differ by one grey level of
# 255 on processors where torchvision resizes in floating point.

# %%
chelsea = to_tensor(Image.open(package_file("skimage", "data/chelsea.png")))
print(tuple(chelsea.shape))


def largest_difference(ours, theirs):
    return (ours.int() - theirs.int()).abs().max().item()


for size in ((64, 64), (160, 160), (700, 500)):
    assert largest_difference(resize(chelsea, size), v2.functional.resize(chelsea, list(size), antialias=True)) <= 1
for size in (32, 200, 480):
    theirs = v2.functional.resize(chelsea, [size], antialias=True)
    assert resize_shorter_side(chelsea, size).shape == theirs.shape
    assert largest_difference(resize_shorter_side(chelsea, size), theirs) <= 1
for size in (1, 127, 300):
    assert torch.equal(center_crop(chelsea, size), v2.functional.center_crop(chelsea, [size, size]))

batch = chelsea.expand(400, -1, -1, -1)[:, :, 100:148, 200:248]
flipped = random_flip(batch, torch.Generator().manual_seed(0))
is_flipped = (flipped == v2.functional.horizontal_flip(batch)).flatten(1).all(dim=1)
assert (is_flipped | (flipped == batch).flatten(1).all(dim=1)).all()
print(f"{is_flipped.float().mean():.2f} of the pictures are mirrored")

crops = random_crop(batch, 32, torch.Generator().manual_seed(0))
places = {(y, x): batch[0, :, y : y + 32, x : x + 32] for y in range(17) for x in range(17)}
found = [next(place for place, window in places.items() if torch.equal(window, crop)) for crop in crops]
print(f"400 crops lie at {len(set(found))} of {17 * 17} places, rows {min(found)[0]} to {max(found)[0]}")

# %% [markdown]
# ### The random resized crop
#
# Upstream, BiT uses a stronger crop, often called the *Inception crop* {cite}`szegedy2015going`: a window whose area
# is between 8 % and 100 % of the picture and whose aspect ratio is between 3/4 and 4/3, resized to a square. It shows
# the same thing at many sizes, and sometimes only a part of it. Draw
#
# $$a \sim U(0.08, 1), \qquad \log r \sim U\left(\log \tfrac34, \log \tfrac43\right), \qquad
# w = \sqrt{a H W r}, \quad h = \sqrt{a H W / r},$$
#
# with $H, W$ the picture's height and width. A window with $w > W$ or $h > H$ does not fit, and the draw is
# repeated, at most ten times. (How often does that happen? Exercise 3.) The logarithm makes a ratio and its inverse equally
# likely.


# %% tags=["export"]
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


# %% [markdown]
# The proof has two parts. Given a window, our picture must be torchvision's. And the windows must be distributed as
# torchvision's are; we compare the averages and spreads of the four numbers over 4,000 draws.

# %%
generator = torch.Generator().manual_seed(0)
ours = random_resized_crop(chelsea.expand(20, -1, -1, -1), 64, generator=generator)
boxes = resized_crop_boxes(20, *chelsea.shape[-2:], generator=torch.Generator().manual_seed(0))
for crop, (top, left, height, width) in zip(ours, boxes.tolist(), strict=True):
    theirs = v2.functional.resized_crop(chelsea, top, left, height, width, [64, 64], antialias=True)
    assert largest_difference(crop, theirs) <= 1

torch.manual_seed(0)
their_crop = v2.RandomResizedCrop(64, antialias=True)
theirs = [their_crop.make_params([chelsea]) for _ in range(4000)]
theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in theirs]).double()
ours = resized_crop_boxes(4000, *chelsea.shape[-2:], generator=torch.Generator().manual_seed(1)).double()
for statistic in (lambda b: b.mean(dim=0), lambda b: b.std(dim=0)):
    torch.testing.assert_close(statistic(ours), statistic(theirs), rtol=0.05, atol=2)
print("mean top, left, height, width:", [round(v) for v in ours.mean(dim=0).tolist()])

# %% tags=["hide-input"] mystnb={"image": {"alt": "A photograph of a cat, then what four preparations make of it: a square resize that squeezes it sideways, a resize of the shorter side followed by a centre crop that loses the left and right edges, and four random resized crops: a patch of cheek with whiskers, and the face at three sizes."}}
square = resize(chelsea, 128)
centre = center_crop(resize_shorter_side(chelsea, 128), 128)
random = random_resized_crop(chelsea.expand(4, -1, -1, -1), 128, generator=torch.Generator().manual_seed(3))
pictures = {"the file": chelsea, "square resize": square, "shorter side,\ncentre crop": centre}
pictures |= {f"random\nresized crop {i + 1}": crop for i, crop in enumerate(random)}
widths = [p.shape[2] / p.shape[1] for p in pictures.values()]
fig, axes = plt.subplots(1, len(pictures), figsize=(6.4, 1.5), width_ratios=widths)
for ax, (name, picture) in zip(axes, pictures.items(), strict=True):
    ax.imshow(picture.permute(1, 2, 0))
    ax.set_title(name, fontsize=6, loc="center")
    ax.axis("off")
plt.show()

# %% [markdown]
# ## A data set in two tensors
#
# Small data sets fit into memory. Then a data set is two tensors, and mistakes are caught when it is made, not in
# the middle of an epoch.


# %% tags=["export"]
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


# %%
images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
for make in (
    lambda: ImageTensorDataset(images, torch.tensor([0, 1, 2, 10]), n_classes=10),
    lambda: ImageTensorDataset(images, torch.tensor([0, 1])),
    lambda: ImageTensorDataset(images[:0], torch.tensor([]).long()),
    lambda: ImageTensorDataset(images[:, 0], torch.tensor([0, 1, 2, 3])),
    lambda: ImageTensorDataset(images.float(), torch.tensor([0, 1, 2, 3])),
):
    try:
        make()
    except (TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ## An upstream that needs no download
#
# BiT's authors pre-trained on ImageNet-21k, 14 million photographs, and on JFT-300M, which never left Google
# {cite}`kolesnikov2020big,sun2017revisiting`. We want to pre-train on a laptop, today, without a network. What must
# such an upstream have, to be worth transferring from?
#
# - **Many classes, finely divided.** A network learns the features that its labels ask for.
# - **More than one kind of question.** If the only question is "which character?", then colour and texture are
#   nuisances, and the best a network can do is to become blind to them. It will then do badly on photographs. The
#   labels of ImageNet-21k are rich: animals, materials, places. So we ask for the character, but also for its
#   typeface, its ink, the place where the background comes from, the number of marks.
# - **Nothing of the downstream tasks.** We will transfer to handwritten digits. So no image may show a digit, nor
#   anything that looks like one.
# - **Any size, and the same everywhere.** Image $i$ must be a function of $i$: then the data set has no files, no
#   order, no worker processes that must agree, and a run that was killed can go on at the exact image.
#
# We call it *GlyphNet*. matplotlib {cite}`hunter2007matplotlib` ships the DejaVu typefaces, and scikit-image
# {cite}`vanderwalt2014skimage`, scikit-learn and matplotlib ship photographs. That is all that we need.

# %% tags=["export"]
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

# %% [markdown]
# Two typefaces and sixty characters are held out: no image of the upstream shows them, and a downstream task will.
# The two lists of photographs have none in common. (Two of the upstream photographs show a face, and in the end there
# is a downstream task about faces: other people, another collection.)

# %%
assert not set(UPSTREAM_PHOTOGRAPHS.values()) & set(DOWNSTREAM_PHOTOGRAPHS.values())
files = {}
for name, (package, path) in (UPSTREAM_PHOTOGRAPHS | DOWNSTREAM_PHOTOGRAPHS).items():
    files[name] = hashlib.sha256(package_file(package, path).read_bytes()).hexdigest()
assert len(set(files.values())) == len(files)
print(
    f"{len(UPSTREAM_PHOTOGRAPHS)} photographs upstream, {len(DOWNSTREAM_PHOTOGRAPHS)} others kept for downstream tasks"
)

# %% [markdown]
# ### Random numbers without a state
#
# A usual generator hands out numbers one after the other, and the thousandth can only be had after the 999 before
# it. A *counter-based* generator {cite}`salmon2011parallel` computes the number for a counter directly: it scrambles
# the counter until it looks random. Ours is splitmix64 {cite}`steele2014fast`: three shifts and two multiplications
# of 64-bit integers, which all processors compute alike. The *stream*, a name such as "glyphnet M train 0", picks
# the starting point; the index of the image follows; and each of the image's quantities has its own column.


# %% tags=["export"]
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


# %%
u = (_hash("demonstration", np.arange(100_000), 3) >> np.uint64(11)) * 2.0**-53  # the top 53 bits, as a fraction
print("means", u.mean(axis=0).round(3), "standard deviations", u.std(axis=0).round(3))
assert np.allclose(u.mean(axis=0), 0.5, atol=0.005) and np.allclose(u.std(axis=0), 12**-0.5, atol=0.005)
assert np.abs(np.corrcoef(u.T) - np.eye(3)).max() < 0.02
assert np.array_equal(
    _hash("demonstration", np.array([70_000]), 3), _hash("demonstration", np.arange(100_000), 3)[70_000:70_001]
)

# %% [markdown]
# ### The characters
#
# A typeface file holds a table from code points, the numbers that Unicode gives to characters, to outlines. We take
# the code points that all twelve typefaces share and draw each one once, in the middle of a square of 40 × 40, so
# that the longer side of its ink is 30 pixels long. The result is the *atlas*. Drawing it takes seconds; so it is
# kept in the user's cache folder, under a name made from the font files and the versions of the libraries. If that
# folder cannot be written, we draw again next time.

# %% tags=["export"]
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


# %% mystnb={"image": {"alt": "The characters sigma, zhe, a pilcrow, the Georgian letter pari, an arrow and a black club, each in twelve typefaces: sans, monospaced and serif, upright and slanted, regular and bold. The last two columns are the italic serifs."}}
drawn, pictures = _drawn_characters()
print(f"{len(drawn):,} code points in {len(pictures)} typefaces")
assert len(drawn) > 2000

show = "ΣЖ¶ფ↻♣"
rows = [np.concatenate([pictures[face, drawn.index(c)] for face in range(len(TYPEFACES))], axis=1) for c in show]
fig, ax = plt.subplots(figsize=(6.4, 4.4))
ax.imshow(255 - np.concatenate(rows), cmap="gray")
labels = [name.removeprefix("DejaVu") + ("\n(held out)" if name in HELD_OUT_TYPEFACES else "") for name in TYPEFACES]
ax.set_xticks([CELL * (i + 0.5) for i in range(len(TYPEFACES))], labels, rotation=60, ha="right", fontsize=7)
ax.set_yticks([])
ax.grid(False)
plt.show()

# %% [markdown]
# ### Which of them are the same, and which are left out
#
# Latin A, Greek Alpha and Cyrillic А are three code points with one picture. As three classes they would be a question
# without an answer. We compare pictures: both at 20 × 20 pixels, as vectors of length 1, whose product is their
# *likeness*, 1 for equal pictures. If the likeness of two code points is at least 0.994 in **every** typeface, they
# are one class. (Exact equality would be too strict: a rounded pixel separates some of the Cyrillic capitals from
# their Latin twins.)
#
# Then the digits. Three rules say what is left out, and a fourth spreads the verdict:
#
# 1. What Unicode calls a number: digits, superscripts, fractions, circled and other scripts' digits.
# 2. What we name as a look-alike, in `LOOKALIKES`: the letters O, l, I, Z, S, B and their like, circles, and letters
#    that the eye takes for a 3, a 4, a 6, an 8 or a 9.
# 3. What the pictures tell: a likeness of 0.95 or more to a digit, any typeface against any, or of 0.97 to one of the
#    named look-alikes.
# 4. If one member of a class is left out, the class is.
#
# An O under an accent stays. No digit wears an accent. And the rules speak of characters as the typefaces draw them:
# bent and turned, as we will draw them below, a letter may come near a digit by accident, as it may in handwriting.


# %% tags=["export"]
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


# %%
table = glyphs()
count = {name: len(getattr(table, name)) for name in ("characters", "upstream", "held_out", "excluded")}
points = {
    name: sum(len(table.characters[c]) for c in getattr(table, name)) for name in ("upstream", "held_out", "excluded")
}
assert count["upstream"] + count["held_out"] + count["excluded"] == count["characters"]
assert sum(points.values()) == len(drawn)
print(f"{len(drawn):,} code points draw {count['characters']:,} different pictures")
for name in points:
    print(f"{name:9} {count[name]:5,} classes of {points[name]:5,} code points")
print("one picture, several code points:", " ".join(m for m in table.characters if len(m) > 2))

# %% [markdown]
# What was left out? All of it can be printed, and so can what came closest among the characters that stayed. The
# figure shows these, sorted by their likeness to a digit in any typeface: brackets, blocks, an Omega, an I or a U
# under an accent. Look for one that you would take for a digit.

# %%
print(" ".join(table.characters[c] for c in table.excluded))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Upper row: the ten digits. Below, three rows with the thirty characters that most resemble a digit among those that stayed, such as a bracket, Omega, a reversed E, a black block, and the letters I and U under accents. Each is marked with its nearest digit and its likeness, which is just below 0.95."}}
digit_classes = [table.find(c) for c in DIGITS]
shapes = _shapes(table.atlas)
every_digit = shapes[:, digit_classes].reshape(-1, shapes.shape[-1])
likeness = np.stack([face @ every_digit.T for face in shapes])  # (typefaces, classes, typefaces * digits)
likeness = likeness.reshape(*likeness.shape[:2], len(TYPEFACES), 10).max(axis=(0, 2))  # (classes, digits)
stayed = np.array(table.upstream + table.held_out)
closest = stayed[np.argsort(-likeness[stayed].max(axis=1), kind="stable")][:30]
fig, axes = plt.subplots(4, 10, figsize=(6.4, 3.4))
for ax, c in zip(axes.flat, [*digit_classes, *closest], strict=True):
    ax.imshow(255 - table.atlas[1, c], cmap="gray")
    if c in closest:
        ax.set_title(f"{likeness[c].argmax()}: {likeness[c].max():.2f}", fontsize=7, loc="center")
    ax.axis("off")
plt.show()

# %%
shown = set("".join(table.characters[c] for c in stayed))
assert not shown & set(DIGITS) and not shown & set(LOOKALIKES)
assert not any(unicodedata.numeric(c, None) is not None for c in shown)
assert likeness[stayed].max() < 0.95
assert not set(table.upstream) & set(table.held_out)
print("held out:", " ".join(table.characters[c] for c in table.held_out))

# %% [markdown]
# ### Drawing a character
#
# For each pixel of the frame we ask which point of the atlas lies under it. Rotation by $\phi$, shear $s$, aspect
# $q$ and the step $d$ (atlas pixels per pixel of the frame) make a linear map,
#
# $$\begin{pmatrix} x' \\ y' \end{pmatrix} = d
# \begin{pmatrix} q & s \\ 0 & 1/q \end{pmatrix}
# \begin{pmatrix} \cos\phi & \sin\phi \\ -\sin\phi & \cos\phi \end{pmatrix}
# \begin{pmatrix} x \\ y \end{pmatrix},$$
#
# and between four pixels of the atlas we interpolate. Three details matter.
#
# *No tables of sines.* Two machines may disagree in the last bit of a sine, and we want the same bytes everywhere. With
# $t = \tan(\phi/2)$, we have $\cos\phi = (1 - t^2)/(1 + t^2)$ and $\sin\phi = 2t/(1 + t^2)$: multiplications and a
# division, which are exact to the last bit by standard. So we draw $t$ instead of $\phi$.
#
# *Stroke weight.* The atlas is slightly blurred. Cut it at a threshold, and the outline moves: a low threshold gives
# thick strokes and a high one thin strokes. How steeply we cut says how sharp the edge is. (Where threshold and
# steepness are both low, a thin veil of ink lies over the whole frame, as at the top left of the figure. We let it:
# fog is one more thing that a network should see through.)
#
# *Hands do not write in straight lines.* Twelve typefaces are few, and each draws a character in one way only. So
# before a pixel looks, its point is displaced by a polynomial of second and third degree: straight strokes become
# curved, a bowl becomes wider above than below. Polynomials again, since their values are exact to the last bit.


# %% tags=["export"]
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


# %% mystnb={"image": {"alt": "The Cyrillic letter Zhe drawn with thresholds 0.2, 0.3, 0.4, 0.5 and 0.6, its strokes getting thinner from left to right, in an upper row with a soft edge and a lower row with a sharp edge. In the upper left picture the background is grey."}}
thresholds, gains = np.array([0.2, 0.3, 0.4, 0.5, 0.6] * 2), np.repeat([1.5, 6.0], 5)
same = np.ones(10)
stamps = _stamp(
    *(np.zeros(10, int), np.full(10, table.find("Ж")), 16 * same, 16 * same, 26 * same),
    frame=64,
    half=False,
    half_tangent=0 * same,
    shear=0 * same,
    aspect=same,
    threshold=thresholds,
    gain=gains,
)
fig, axes = plt.subplots(2, 5, figsize=(6.4, 2.9))
for ax, stamp, threshold, gain in zip(axes.flat, stamps, thresholds, gains, strict=True):
    ax.imshow(1 - stamp, cmap="gray", vmin=0, vmax=1)
    ax.set_title(f"threshold {threshold}, gain {gain}", fontsize=7, loc="center")
    ax.axis("off")
plt.show()

# %% mystnb={"image": {"alt": "The letters R and Zhe seven times each. From left to right they are bent more and more: strokes that were straight become curved, and the letters lean, widen or narrow."}}
draws = np.random.RandomState(0)
strength = np.tile(np.linspace(0.0, 0.28, 7), 2)
same = np.ones(14)
stamps = _stamp(
    *(np.zeros(14, int), np.repeat([table.find("R"), table.find("Ж")], 7), 16 * same, 16 * same, 27 * same),
    frame=64,
    half=False,
    half_tangent=0 * same,
    shear=0 * same,
    aspect=same,
    threshold=0.35 * same,
    gain=3 * same,
    bend=(2 * draws.rand(14, 8) - 1).reshape(-1, 2, 4) * strength[:, None, None],
)
fig, axes = plt.subplots(2, 7, figsize=(6.4, 2.0))
for ax, stamp in zip(axes.flat, stamps, strict=True):
    ax.imshow(1 - stamp, cmap="gray", vmin=0, vmax=1)
    ax.axis("off")
plt.show()

# %% [markdown]
# ### Inks and backdrops
#
# An ink is one of twenty: eight hues, each dark or light, and four greys. The label is the bin; within it, the colour
# varies. A backdrop is a gradient or a crop of a photograph, and it must leave the ink visible. So its brightness is
# confined to a range wholly above that of the ink or wholly below it. This also gives dark on light and light on
# dark, so that the network cannot rely on either.
#
# Crops come at many scales, from the full resolution to nearly the whole photograph. Each photograph is stored as a
# pyramid of ever smaller copies, and a crop is a window into one of them: a copy of bytes, nothing to interpolate.
# Some are mirrored, three in ten lose their colour, all have their tint and contrast changed a little. The label says
# which photograph it is, and in which of its 4 × 4 parts the middle of the window lies.


# %% tags=["export"]
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


# %% tags=["export"]
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


# %% [markdown]
# ### Marks to count, and the marks of time
#
# Nothing so far asks *how many*. So some images show one to six marks: discs, squares, hearts, small letters. They
# may not touch. We throw darts: a random place is kept if it is far enough from those kept before, until the number
# is reached or forty darts are thrown. The label is the number of marks that found a place. For a single mark, as for
# a single character, a further label says in which of 4 × 4 parts of the frame it lies. (Most characters stand within a
# few pixels of the middle of the frame, so nearly all of them in one of the middle four parts.)


# %% tags=["export"]
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


# %% [markdown]
# At last the image ages: some are blurred, a few so much that they look like a drawing of 8 × 8 pixels enlarged, most
# get noise, and one in eight goes through a real JPEG encoder.


# %% tags=["export"]
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


# %% tags=["export"]
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


# %% [markdown]
# ### All together
#
# The class below is an ordinary PyTorch data set. `batch` is the fast way in: it renders many images together, in
# chunks. `__getitems__` lets PyTorch's `DataLoader` use it. An image has one label for each *group* of classes, and
# −1 where a group has nothing to say: a photograph alone has no character. The weights say how much each group counts
# in the loss. They are larger for the questions that we think matter more downstream; chapter 06 trains with them.
#
# Look at how `_render` keeps the promise that an image does not depend on its neighbours. Results of a matrix product
# or of a long sum may depend on the size of the batch, since libraries choose the order of summation. So there are
# none: only elementwise arithmetic and look-ups.


# %% tags=["export"]
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


# %% [markdown]
# Here is what it looks like, with its labels.


# %% tags=["hide-input"] mystnb={"image": {"alt": "Twenty-four GlyphNet images with captions: single letters and symbols in many colours, some bent or blurred, on gradients and on faint photographs, crops of photographs with a face, a space suit, a roof and the sky, and two images with several small marks."}}
def caption(dataset, labels):
    """The labels of one image in words."""
    character, typeface, ink, place, count, position = labels.tolist()
    words = []
    if character >= 0:
        members = glyphs().characters[dataset.character_classes[character]]
        words.append(f"{members[0]}  {dataset.typefaces[typeface].removeprefix('DejaVu')}")
    if count >= 0:
        words.append(f"{count + 1} mark" + "s" * (count > 0))
    if place >= 0:
        words.append(f"{list(UPSTREAM_PHOTOGRAPHS)[place // PLACES**2]} {place % PLACES**2}")
    if position >= 0 or ink >= 0:
        words.append(f"ink {ink}" + f", at {position}" * (position >= 0))
    return "\n".join(words)


glyphnet = GlyphNet("M")
images, labels = glyphnet.batch(range(24))
fig, axes = plt.subplots(4, 6, figsize=(6.4, 6.2))
for ax, image, label in zip(axes.flat, images, labels, strict=True):
    ax.imshow(image.permute(1, 2, 0))
    ax.set_title(caption(glyphnet, label), fontsize=6, loc="center")
    ax.axis("off")
plt.show()

# %% [markdown]
# And this is the mix, counted over 20,000 images. The share of each kind is fixed by `MIX`: 40 % of the images show
# a character on a gradient, 22 % one on a photograph, 26 % a photograph alone, 12 % marks.

# %%
_, many = glyphnet.batch(range(20_000))
has = many >= 0
for group, share in zip(glyphnet.groups, has.double().mean(dim=0).tolist(), strict=True):
    print(f"{group.name:9} {group.n_classes:5,} classes, weight {group.weight}, in {100 * share:.0f} % of the images")
character, place, counted = has[:, 0], has[:, 3], has[:, 4]
kinds = [character & ~place, character & place, ~character & ~counted, counted]
for (kind, share), seen in zip(MIX.items(), kinds, strict=True):
    assert abs(seen.double().mean().item() - share) < 0.015, kind
assert many[has[:, 0], 0].bincount(minlength=1000).min() > 0  # every character occurs
print("marks", (many[counted, 4].bincount() / counted.sum()).numpy().round(2), "for a count of 1 to 6")

# %% [markdown]
# There are three sizes, nested as BiT's data sets are in spirit: the hundred characters of S are among the thousand
# of M, and these among those of L, whose images never end. Characters that are not composed of others come first, so
# S and M ask fewer questions of the kind "which accent?". BiT-S, -M and -L of this book are pre-trained on them.

# %%
for size in SIZES:
    ds = GlyphNet(size)
    print(f"{size}: {ds.groups[0].n_classes:5,} characters, {len(ds):13,} images")
small, medium, large = (GlyphNet(size).character_classes for size in "SML")
assert small == medium[:100] and medium == large[:1000]

# %% [markdown]
# ### Proof: an image is a function of its number
#
# We render the same image alone, in the middle of 257 others, in another order and in another process. Each time
# the bytes must be the same. They must differ in the validation split, and for another seed.

# %%
numbers = torch.arange(1_000, 1_257)
images, labels = glyphnet.batch(numbers)
order = torch.randperm(257, generator=torch.Generator().manual_seed(0))
assert torch.equal(glyphnet.batch(numbers[order])[0], images[order])
for i in range(0, 257, 16):
    image, label = glyphnet[1_000 + i]
    assert torch.equal(image, images[i]) and torch.equal(label, labels[i])
pairs = glyphnet.__getitems__([1_003, 1_001])
assert torch.equal(pairs[0][0], images[3]) and torch.equal(pairs[1][0], images[1])

program = (
    "import hashlib; from bitlib.data import GlyphNet;"
    "print(hashlib.sha256(GlyphNet('M').batch(range(1000, 1257))[0].numpy().tobytes()).hexdigest())"
)
import subprocess

there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
assert there == hashlib.sha256(images.numpy().tobytes()).hexdigest()

for other in (GlyphNet("M", "val"), GlyphNet("M", seed=1), GlyphNet("L")):
    assert not (other.batch(numbers)[0] == images).flatten(1).all(dim=1).any()
print("the same bytes in any batch, any order and another process")

# %% [markdown]
# ## Downstream: VTAB-mini
#
# A *task* is what a network is transferred to: a training set, a test set, the names of the classes, and where the
# data come from. One task proves little. VTAB, the benchmark that BiT reports, has nineteen in three groups
# {cite}`zhai2019vtab`: *natural* (ordinary photographs and writing), *specialized* (medicine, satellites) and
# *structured* (how many, how far, which way up). Each allows 1,000 labelled examples.
#
# We build thirteen small ones in the same groups, out of what our packages ship. The rules are VTAB's: 1,000 training
# examples or all there are, of which one in five serves to choose settings; a test set that is fixed once and for all;
# and for each task a note whether its label survives a mirror image and a crop. All pictures are 32 × 32 pixels,
# like GlyphNet's.


# %% tags=["export"]
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


# %% [markdown]
# ### Pictures that come one by one
#
# The first task is the digits of the experiment above: written by 13 people, scanned, and reduced to 8 × 8 pixels
# with 17 levels of grey {cite}`alpaydin1998optical`. We enlarge them to 32 × 32, and split them into 1,000 images to
# train on (or to choose few-shot examples from) and 797 to test on. The split keeps the share of each class, and it
# comes from our counter-based generator, so it is the same for everybody.
#
# The second are the 200 snippets of 25 × 25 pixels that scikit-image took from *Labeled Faces in the Wild*: a face, or
# something else. The third are the characters and the typefaces that GlyphNet holds out. We train in one typeface and
# test in the other, so that not even the outlines are the same.


# %% tags=["export"]
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


# %% [markdown]
# ### Pieces of photographs
#
# Other tasks are cut from single photographs. Here a split at random would be a fraud: two windows that overlap share
# pixels, and the network would be tested on what it was trained on. So we first divide the *photograph*, into blocks
# about 100 pixels wide. Every third diagonal of blocks is for testing. A window lies wholly in one block, and nothing
# outside the window takes part in shrinking it. So no test pixel is ever seen in training. (Neighbouring blocks still
# show the same wall. This is a test of recognising a place or a material again, not of recognising walls in general.)


# %% tags=["export"]
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


# %% [markdown]
# ### Measurements
#
# The label may also be a number that is measured, sorted into *levels* with about equally many training examples in
# each. We measure four things:
#
# - **Histology.** A section of the colon, in which a stain called DAB marks a protein in brown. Pathologists score such
#   stains from 0 to 3. Light that passes through a stain is weakened by a factor for each layer, so the logarithm of a
#   pixel is a sum over stains, and a 3 × 3 matrix takes it apart {cite}`ruifrok2001quantification`. The label is the
#   level of DAB.
# - **Retina.** How far a window lies from the optic disc, where vessels and nerve enter the eye.
# - **Sky.** How many stars and galaxies a window of the Hubble telescope's deepest picture shows: the local maxima
#   of brightness.
# - **Depth.** A motorcycle in a garage, photographed by two cameras side by side. A near point lies at different
#   places in the two pictures, a far one at nearly the same; the difference is the *disparity*, inverse to the distance,
#   and was measured with structured light {cite}`scharstein2014high`. The network sees one picture only, and is asked
#   for the level of disparity in the middle of a window. In VTAB, where distances are asked for in the same way, such
#   tasks are *structured*.
#
# The edges between levels come from the training windows alone.


# %% tags=["export"]
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


# %% [markdown]
# ### Drawn scenes
#
# The last four are drawn, as Clevr's and dSprites' pictures are in VTAB. A *disc*, a *square*, a *bar* or a *triangle* has a
# centre, a radius $r$ and an angle; its outline is where a function of the turned coordinates $u, v$ is 0, such as
# $\max(|u|, |v|) - 0.85$ for the square. With $r$ times that function as a distance in pixels, half a pixel on both sides
# becomes a soft edge. The backdrop is a gradient or a window of a downstream photograph, of the task's own half, with
# its contrast reduced.
#
# - **Count**: one to eight objects, each with a shape, a colour and a size of its own.
# - **Orientation**: in which of eight sectors a triangle points.
# - **X-position**: in which of eight columns the centre of an object lies.
# - **Distance**: several objects of one size at several distances, the radius inverse to the distance. In which of six
#   ranges is the nearest one? This is Clevr's "closest object distance".
#
# Upstream, GlyphNet asks for a count and a position too. These scenes differ from its marks in shapes, colours and
# backdrops, but the question is one that the network has met. Keep it in mind when you read the results.


# %% tags=["export"]
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


# %% [markdown]
# ### One call for any task

# %% tags=["export"]
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


# %% [markdown]
# The cards of all thirteen:

# %%
for name in TASKS:
    print(load_task(name).card())

# %% tags=["hide-input"] mystnb={"image": {"alt": "Thirteen rows of ten small pictures, one row for each task: scanned digits; faces and snippets of background in grey; pieces of photographs with coins, text, a motorcycle; brick, grass and gravel; single printed characters; stained tissue; orange pieces of a retina with vessels; dots of light on black; one to eight coloured shapes; triangles that point anywhere; a shape at some place; discs and squares of several sizes; pieces of a photograph of a motorcycle."}}
fig, axes = plt.subplots(len(TASKS), 10, figsize=(6.4, 10.4), gridspec_kw={"hspace": 0.25})
for row, name in zip(axes, TASKS, strict=True):
    task = load_task(name)
    spread = torch.linspace(0, len(task.test) - 1, 10).long()
    order = task.test.labels.argsort(stable=True)[spread]
    for ax, i in zip(row, order.tolist(), strict=True):
        ax.imshow(task.test[i][0].permute(1, 2, 0))
        ax.axis("off")
    words = f"{name}, {len(task.classes)} classes ({task.group})"
    row[0].text(-0.5, -4, words, fontsize=7).set_in_layout(False)  # a title would widen its column
axes[0, 9].set_title("test set", fontsize=7, loc="right")
plt.show()

# %% [markdown]
# ### Proof
#
# Our digits are scikit-learn's, and our stain is scikit-image's but for its scale.

# %%
from skimage.color import rgb2hed
from sklearn.datasets import load_digits

task = load_task("digits")
assert len(task.train) == 1000 and len(task.test) == 797
everything = torch.cat([task.train.labels, task.test.labels]).bincount()
assert torch.equal(everything, torch.from_numpy(load_digits().target).bincount())
share = task.train.labels.bincount() / everything
print(f"of every class of digits, {100 * share.min():.1f} to {100 * share.max():.1f} % are for training")

tissue = _pixels("ihc").numpy()
ours, theirs = _stain(tissue), rgb2hed(tissue.transpose(1, 2, 0))[:, :, 2]
free = (ours > 0.01) & (tissue.min(axis=0) > 0)  # theirs cuts off what is negative, and treats black otherwise
print(f"stain: correlation with scikit-image's {np.corrcoef(ours[free], theirs[free])[0, 1]:.4f}")
assert np.corrcoef(ours[free], theirs[free])[0, 1] > 0.999

# %% [markdown]
# And no test pixel is seen in training. The direct proof: change every pixel of the test blocks, in all photographs,
# build the tasks again, and compare. The training images must be the same bytes; the test images must not.

# %%
intact, from_photographs = (
    _pixels,
    ("photographs", "textures", "histology", "retina", "sky", "count", "distance", "depth"),
)


@functools.cache
def with_other_test_blocks(name):
    pixels = intact(name).clone()
    for top, left, height, width in photograph_blocks(*pixels.shape[1:], "test").tolist():
        pixels[:, top : top + height, left : left + width] ^= 0b1010101
    return pixels


try:
    _pixels = with_other_test_blocks
    rebuilt = {name: TASKS[name]() for name in from_photographs}
finally:
    _pixels = intact
for name in from_photographs:
    before, after = load_task(name), rebuilt[name]
    assert torch.equal(before.train.images, after.train.images) and torch.equal(before.train.labels, after.train.labels)
    assert not torch.equal(before.test.images, after.test.images)
print("no test pixel is seen in training:", ", ".join(from_photographs))

# %% [markdown]
# Two more rules of fairness. No two photographs are shared with the upstream (asserted above, where the lists are). And
# every class of every task can be learned: it occurs in the training set, in both parts of it.

# %%
for name in TASKS:
    task = load_task(name)
    train, val = task.train_val()
    assert task.name == name and name in VTAB_MINI[task.group]
    for part in (task.train.labels, task.train.labels[train.indices], task.train.labels[val.indices]):
        assert part.bincount(minlength=len(task.classes)).min() > 0
    assert not set(train.indices) & set(val.indices) and len(train) + len(val) == len(task.train)
print(f"{sum(map(len, VTAB_MINI.values()))} tasks in {len(VTAB_MINI)} groups")

# %% [markdown]
# This is the distance that transfer must bridge in the first half of the book: from printed characters in colour to
# handwriting, tissue and triangles; from hundreds of thousands of examples to a hundred.

# %% [markdown]
# ```{admonition} Where sources disagree
# :class: note
# - **The range.** Two widely-copied summaries of BiT feed images in $[0, 1]$, or normalised with ImageNet's mean and
#   standard deviation. The released code {cite}`bittransfer_code` normalises with mean 0.5 and standard deviation 0.5,
#   that is to $[-1, 1]$, and its `.npz` weights need that. The same models on TensorFlow Hub take $[0, 1]$, because
#   they contain the conversion. Both are right about their own files.
# - **Evaluation.** The paper and the released code resize to a square, straight to the size of the training crops.
#   Summaries often give "shorter side to 256, centre crop of 224", the older ImageNet custom. The two see different
#   parts of a picture at different sizes, and that alone moves accuracy {cite}`touvron2019fixing`.
# - **The random resized crop.** It is named after the Inception networks, whose paper {cite}`szegedy2015going` draws
#   the aspect ratio between 3/4 and 4/3 without a word about its distribution. torchvision takes the logarithm as
#   uniform and falls back to a centred window after ten failures; we follow it.
# ```

# %% [markdown]
# ## Exercises
#
# Each exercise has a check that takes your own function. Take the `#` off the last line to run it.

# %% tags=["check", "hide-cell"]
import math

import torch


def check_channel_statistics(channel_statistics) -> None:
    """channel_statistics(images) -> (mean, std), each (3,), of the pixels of uint8 (N, 3, H, W) in units of 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (7, 3, 5, 9), generator=generator, dtype=torch.uint8)
    images[:, 1] //= 3
    result = channel_statistics(images)
    assert isinstance(result, tuple) and len(result) == 2, f"return a pair (mean, std); got {type(result).__name__}"
    mean, std = (torch.as_tensor(r).float() for r in result)
    pixels = images.float() / 255
    for name, given, right in (
        ("mean", mean, pixels.mean((0, 2, 3))),
        ("std", std, pixels.std((0, 2, 3), correction=0)),
    ):
        assert given.shape == (3,), f"{name} must have one value per channel, shape (3,); got {tuple(given.shape)}"
        assert given.max() <= 1, f"{name} {given.tolist()} is in bytes; divide by 255"
        error = (given - right).abs().max().item()
        assert error < 1e-5, (
            f"{name} is {given.tolist()}, off by {error:.2g}; std is over all pixels, divided by their number"
        )
    x = (pixels - mean[:, None, None]) / std[:, None, None]
    assert x.mean().abs() < 1e-5 and (x.std(correction=0) - 1).abs() < 1e-5
    print("check_channel_statistics: correct")


def check_shard(shard) -> None:
    """shard(step, batch_size, rank, world_size, length) -> the image numbers that one process renders in a step."""
    for step, batch_size, world_size, length in ((0, 8, 1, 100), (3, 8, 2, 100), (12, 12, 4, 50), (999, 6, 3, 7)):
        whole = [(step * batch_size + k) % length for k in range(batch_size)]
        parts = [list(map(int, shard(step, batch_size, rank, world_size, length))) for rank in range(world_size)]
        sizes = [len(part) for part in parts]
        share = batch_size // world_size
        assert sizes == [share] * world_size, f"{world_size} processes must render {share} images each; got {sizes}"
        together = sorted(i for part in parts for i in part)
        assert together == sorted(whole), (
            f"step {step}, batch {batch_size}, length {length}: together the processes must render {sorted(whole)}; "
            f"yours render {together}"
        )
    print("check_shard: correct")


def check_acceptance(acceptance) -> None:
    """acceptance(low, ratio) -> the share of draws that fit a large square picture, in closed form."""
    for low, ratio in ((0.08, 4 / 3), (0.5, 4 / 3), (0.0, 2.0)):
        fitted = acceptance(low, ratio)
        n = 200_001
        log_r = torch.linspace(-math.log(ratio), math.log(ratio), n, dtype=torch.float64)
        right = (((-log_r.abs()).exp() - low).clamp(min=0) / (1 - low)).mean().item()
        assert abs(fitted - right) < 1e-4, (
            f"area from {low} to 1, ratio to {ratio:.3f}: {right:.4f} of the draws fit; yours says {float(fitted):.4f}"
        )
    print("check_acceptance: correct")


# %% [markdown]
# **Exercise 1. Your own mean and standard deviation.** A network trained from scratch may use the statistics of its
# own data. Compute them for a data set: one mean and one standard deviation per channel, over all pixels of all
# images, in units of 0 to 1. Which standard deviation makes the normalised data have exactly standard deviation 1?


# %% tags=["exercise"]
def my_channel_statistics(images):
    """images: uint8 (N, 3, H, W). Returns (mean, std), each of shape (3,)."""
    return torch.zeros(3), torch.ones(3)


# check_channel_statistics(my_channel_statistics)


# %% tags=["solution", "hide-input"]
def my_channel_statistics(images):
    """images: uint8 (N, 3, H, W). Returns (mean, std), each of shape (3,)."""
    pixels = images.float() / 255
    return pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3), correction=0)


check_channel_statistics(my_channel_statistics)

# %% [markdown]
# **Exercise 2. Sharing the work.** Several processes train together. In step $s$ with batch size $B$, one process
# alone would render the images $sB, sB + 1, \dots, sB + B - 1$, starting again from 0 after the last image of the data
# set. Write down which images process `rank` out of `world_size` renders, so that together they render exactly these,
# each an equal part. ($B$ is a multiple of `world_size`.) Why does this need no communication between the processes?


# %% tags=["exercise"]
def my_shard(step, batch_size, rank, world_size, length):
    """The numbers of the images that process `rank` renders in this step."""
    return range(step * batch_size, (step + 1) * batch_size)


# check_shard(my_shard)


# %% tags=["solution", "hide-input"]
def my_shard(step, batch_size, rank, world_size, length):
    """The numbers of the images that process `rank` renders in this step."""
    # Every process can compute every image from its number, so knowing one's rank is enough.
    return [(step * batch_size + k) % length for k in range(rank, batch_size, world_size)]


check_shard(my_shard)

# %% [markdown]
# **Exercise 3. How often does a window not fit?** Take a large square picture, so that rounding does not matter. The
# window's area is a share $a \sim U(a_0, 1)$ of it, and $\log r \sim U(-\log R, \log R)$. Derive the probability that
# the first draw fits. (Start with: for a given $r$, up to which $a$ does the window fit?) Assume $a_0 < 1/R$.


# %% tags=["exercise"]
def my_acceptance(low, ratio):
    """The probability that a window with area from `low` to 1 and ratio from 1/`ratio` to `ratio` fits."""
    return 1.0


# check_acceptance(my_acceptance)


# %% tags=["solution", "hide-input"]
def my_acceptance(low, ratio):
    """The probability that a window with area from `low` to 1 and ratio from 1/`ratio` to `ratio` fits."""
    # In a unit square w = sqrt(a r) <= 1 and h = sqrt(a / r) <= 1 mean a <= min(r, 1/r) = exp(-|log r|).
    # Given r that has probability (exp(-|log r|) - low) / (1 - low). Averaged over log r, uniform up to L = log R,
    # exp(-|log r|) gives (1 - exp(-L)) / L.
    log_ratio = math.log(ratio)
    return ((1 - 1 / ratio) / log_ratio - low) / (1 - low)


check_acceptance(my_acceptance)

# %%
first_draw = my_acceptance(0.08, 4 / 3)
print(
    f"{100 * first_draw:.1f} % of first draws fit; ten fail in a row {100 * (1 - first_draw) ** 10:.1e} % of the time"
)

# %% [markdown]
# ## What to remember
#
# - A network must see pixels in the range that it was pre-trained in. A mismatch raises no error. For BiT the range
#   is $[-1, 1]$, and in this book `normalize` alone makes it.
# - BiT resizes to a square and ignores the aspect ratio; its upstream crop takes 8 to 100 % of the area.
# - An upstream is as good as the questions it asks. GlyphNet asks several of each image, and shows no digit.
# - If image $i$ is a function of $i$, then batches, workers, shards and interrupted runs need no further care.
