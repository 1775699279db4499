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
#     module: checkpoints
#     summary: "Checkpoints: official .npz, timm and transformers weights, safetensors; load_pretrained."
# ---

# %% [markdown]
# # Checkpoints
#
# At the end of this chapter one call, `load_pretrained`, takes Google's released files, timm's and transformers'
# copies of them, and our own, and gives the same network each time: proved against timm, and safe on a file from a
# stranger.
#
# **Runtime:** about 15 seconds on two CPU cores. No network is needed.
#
# **Builds on:** the image ranges of the data chapter, weight standardization, and the network of the chapter before.

# %% tags=["setup", "remove-cell"]
# Does nothing outside Colab; there it installs the book's package and what the chapters need.
import sys

if "google.colab" in sys.modules:
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", 'install -q "bitlib[book] @ git+https://github.com/OWNER/REPOSITORY"')

# %% tags=["export"]
import base64
import difflib
import hashlib
import io
import os
import re
import secrets
import statistics
import struct
import urllib.request
import zipfile
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from bitlib.conv import StdConv2d
from bitlib.data import shipped_file
from bitlib.resnet import BLOCKS, ResNetV2, create_model


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file, the tensor and what is wrong with it."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint on this machine."""


# %% [markdown]
# ## The problem, seen
#
# The released weights were written by TensorFlow. There a convolution's kernel lies in memory as
# (height, width, in, out), HWIO for short; PyTorch wants (out, in, height, width), OIHW. A loader must permute the
# four axes, and there are $4! = 24$ ways to do it, of which one is right. PyTorch compares shapes, so it stops the
# bad ones. Does it?
#
# R50x1 has 53 convolutions. Let us count how many of their kernels come out with the shape PyTorch expects under the
# right order and under two wrong ones: height and width exchanged, and input and output exchanged.

# %%
with torch.device("meta"):  # shapes without memory
    kernels = [weight for weight in create_model("R50x1").state_dict().values() if weight.ndim == 4]

ORDERS = {"right": (3, 2, 0, 1), "height and width exchanged": (3, 2, 1, 0), "in and out exchanged": (2, 3, 0, 1)}
accepted = {}
for label, order in ORDERS.items():
    stored = [weight.permute(2, 3, 1, 0) for weight in kernels]  # as the file has them, HWIO
    accepted[label] = sum(a.permute(order).shape == b.shape for a, b in zip(stored, kernels, strict=True))
    print(f"{label:28} {accepted[label]} of {len(kernels)} kernels have the expected shape")
assert accepted["height and width exchanged"] == len(kernels) == 53
assert 0 < accepted["in and out exchanged"] < len(kernels)

# %% [markdown]
# Every kernel in the network is square, so exchanging height and width passes every test of shapes: a strict
# `load_state_dict` succeeds and every later line runs. What went wrong shows only in what the network sees. Below, a
# filter that answers to vertical edges is stored as HWIO and loaded both ways. Before you look: which half of the
# picture will light up in which column?

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three panels. Left: a picture whose left half has vertical stripes and whose right half has horizontal stripes. Middle, loaded correctly: the response is strong on the vertical stripes and zero on the horizontal ones. Right, loaded with height and width exchanged: the opposite."}}
import matplotlib.pyplot as plt
import torch.nn.functional as F

plt.style.use(shipped_file("book.mplstyle"))
stripes = (torch.arange(48) // 4 % 2).float()
picture = torch.cat([stripes[None, :24].expand(48, 24), stripes[:, None].expand(48, 24)], dim=1)
vertical_edges = torch.tensor([[-1.0, 0.0, 1.0]] * 3)[:, :, None, None]  # HWIO, one channel in, one out
figure, axes = plt.subplots(1, 3, figsize=(6.4, 2.4))
panels = {"picture": picture}
for label, order in list(ORDERS.items())[:2]:
    panels[f"loaded: {label}"] = F.conv2d(picture[None, None], vertical_edges.permute(order), padding=1)[0, 0].abs()
for axis, (label, panel) in zip(axes, panels.items(), strict=True):
    axis.imshow(panel, cmap="gray")
    axis.set_title(label, fontsize=8)
    axis.set_axis_off()
plt.show()

# %%
inside = slice(4, -4)
right, wrong = [panels[f"loaded: {label}"][inside] for label in list(ORDERS)[:2]]
assert right[:, 4:20].mean() > 1 and right[:, 28:44].max() == 0
assert wrong[:, 4:20].max() == 0 and wrong[:, 28:44].mean() > 1

# %% [markdown]
# The filter for vertical edges has become one for horizontal edges, in silence. A network loaded so is not noise; it
# is a network that expects the world mirrored about the diagonal, and fine-tuning may hide the mistake. Shapes cannot prove a loader. An independent implementation that reads the same
# file and gives the same numbers can, and at the end of this chapter one does.
#
# ## What is in an official file
#
# An `.npz` is a zip archive with one `.npy` file for each array. The arrays of the released files
# {cite}`bittransfer_code` are named after the scopes of the TensorFlow program that made them. Each of our names has
# one counterpart:
#
# | ours | theirs, after the prefix `resnet/` |
# |---|---|
# | `root.conv.weight` | `root_block/standardized_conv2d/kernel` |
# | `block2.unit01.conv1.weight` | `block2/unit01/a/standardized_conv2d/kernel` |
# | `block2.unit01.norm1.weight`, `.bias` | `block2/unit01/a/group_norm/gamma`, `beta` |
# | `conv2`, `norm2`; `conv3`, `norm3` | the same under `b`; under `c` |
# | `block2.unit01.proj.weight` | `block2/unit01/a/proj/standardized_conv2d/kernel` |
# | `norm.weight`, `.bias` | `group_norm/gamma`, `beta` |
# | `head.weight`, `.bias` | `head/conv2d/kernel`, `bias` |
#
# TensorFlow gives a second layer of one name a number, so some files say `standardized_conv2d_17` where others say
# `standardized_conv2d`. The number carries no information, and we drop it, as the loader
# of the authors' later code, [big_vision](https://github.com/google-research/big_vision), does.

# %% tags=["export"]
_OFFICIAL_NET = {
    "root.conv.weight": "root_block/standardized_conv2d/kernel",
    "norm.weight": "group_norm/gamma",
    "norm.bias": "group_norm/beta",
    "head.weight": "head/conv2d/kernel",
    "head.bias": "head/conv2d/bias",
}
_OFFICIAL_UNIT = {
    "norm1.weight": "a/group_norm/gamma",
    "norm1.bias": "a/group_norm/beta",
    "conv1.weight": "a/standardized_conv2d/kernel",
    "norm2.weight": "b/group_norm/gamma",
    "norm2.bias": "b/group_norm/beta",
    "conv2.weight": "b/standardized_conv2d/kernel",
    "norm3.weight": "c/group_norm/gamma",
    "norm3.bias": "c/group_norm/beta",
    "conv3.weight": "c/standardized_conv2d/kernel",
    "proj.weight": "a/proj/standardized_conv2d/kernel",
}


def official_name(name: str) -> str:
    """What Google's .npz files call one of our tensors, without their prefix `resnet/`.

    Raises KeyError for a name that no ResNetV2 has.
    """
    unit = re.fullmatch(r"(block\d)\.(unit\d\d)\.(.+)", name)
    if unit:
        return f"{unit[1]}/{unit[2]}/{_OFFICIAL_UNIT[unit[3]]}"
    return _OFFICIAL_NET[name]


def from_official_name(key: str) -> str | None:
    """Our name for a tensor of an official .npz, given without its prefix; None for a name we do not know.

    `standardized_conv2d_17/kernel`, as some of the files have it, counts as `standardized_conv2d/kernel`.
    """
    key = re.sub(r"\bstandardized_conv2d_\d+/", "standardized_conv2d/", key)
    unit = re.fullmatch(r"(block\d)/(unit\d\d)/(.+)", key)
    table = {theirs: ours for ours, theirs in (_OFFICIAL_UNIT if unit else _OFFICIAL_NET).items()}
    ours = table.get(unit[3] if unit else key)
    return f"{unit[1]}.{unit[2]}.{ours}" if unit and ours else ours


# %%
with torch.device("meta"):
    names = list(create_model("R50x1").state_dict())
assert all(from_official_name(official_name(name)) == name for name in names)
print(official_name("block3.unit06.norm2.bias"))
print(from_official_name("block1/unit01/a/proj/standardized_conv2d_4/kernel"))
print(from_official_name("block1/unit01/d/group_norm/gamma"))

# %% [markdown]
# Two things change besides the names. Kernels are permuted, and the head, in the file a 1×1 convolution over a 1×1
# feature map, becomes the matrix of a linear layer.


# %% tags=["export"]
def from_hwio(name: str, kernel: Tensor) -> Tensor:
    """A tensor of an official file in PyTorch's layout; name is ours.

    Kernels go from (height, width, in, out) to (out, in, height, width); the head, there a 1x1 convolution,
    becomes the (classes, features) matrix of a linear layer. Gains and biases stay as they are.
    """
    if kernel.ndim != 4:
        return kernel
    kernel = kernel.permute(3, 2, 0, 1)
    return kernel.flatten(1) if name == "head.weight" else kernel


def to_hwio(name: str, weight: Tensor) -> Tensor:
    """The inverse of `from_hwio`."""
    if name == "head.weight":
        weight = weight[:, :, None, None]
    return weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight


# %% [markdown]
# We can now write a miniature official file by hand, random weights and all, and list it as NumPy sees it.

# %%
import tempfile

workspace = tempfile.TemporaryDirectory()  # removed when the notebook ends
folder = Path(workspace.name)
torch.manual_seed(0)
mini = create_model("R14x0.25", num_classes=5).eval()
with torch.no_grad():
    for parameter in mini.parameters():  # nothing stays at a special value: no zero head, no gain of one
        parameter.copy_(torch.randn_like(parameter))

arrays = {"resnet/" + official_name(name): to_hwio(name, tensor).numpy() for name, tensor in mini.state_dict().items()}
np.savez(folder / "by-hand.npz", **arrays)
with np.load(folder / "by-hand.npz", allow_pickle=False) as archive:
    print(f"{len(archive.files)} arrays, among them:")
    for key in archive.files:
        if "/block" not in key or "block2" in key:
            print(f"{key:54} {archive[key].dtype} {archive[key].shape}")

# %% [markdown]
# ## Reading a file that you did not write
#
# A checkpoint is a file from the internet, and a file can attack whoever opens it.
#
# **Pickle.** Python's own format stores instructions, not data: opening it runs them. `torch.load` uses it, and so
# does NumPy for arrays of objects. Here is such an array. Its "weights" make a folder when they are opened.

# %%
trap = folder / "made-by-a-checkpoint"


class Trap:
    def __reduce__(self):
        return (os.mkdir, (str(trap),))


np.savez(folder / "trap.npz", weights=np.array([Trap()], dtype=object))
with np.load(folder / "trap.npz", allow_pickle=True) as archive:
    archive["weights"]
assert trap.exists()
trap.rmdir()

with np.load(folder / "trap.npz", allow_pickle=False) as archive:
    try:
        archive["weights"]
    except ValueError as error:
        print(error)
assert not trap.exists()

# %% [markdown]
# So the rule is `np.load(allow_pickle=False)`, `torch.load(weights_only=True)`, or a format that cannot hold code at
# all: [safetensors](https://github.com/huggingface/safetensors), which is a header of JSON and then bare numbers.
#
# **Bombs.** A zip archive announces the size of its members, and zeros pack a thousand to one. A small download can
# so ask for all the memory there is. Weights are close to noise and hardly pack at all:

# %%
np.savez_compressed(folder / "bomb.npz", weights=np.zeros(2**24, np.float32))
np.savez_compressed(folder / "packed.npz", **arrays)
for file in ("bomb.npz", "packed.npz"):
    with zipfile.ZipFile(folder / file) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    print(f"{file}: {unpacked / (folder / file).stat().st_size:.1f} times its size when unpacked")

# %% [markdown]
# The remedy is to look before reading. The directory of the archive gives the size of every array, and the first
# hundred bytes of an `.npy` give its type and shape; with both, we know all that we need to refuse a file and have
# not unpacked one number. We parse that header ourselves. It is a Python dictionary, and
# `ast.literal_eval` reads such a thing without executing anything.
#
# So every format is opened in two steps: first an `_Entry` for each tensor, with its name, shape and type and the
# means to read it; then, when all entries have been compared with the network that they are for, the numbers. A
# tensor that is missing, superfluous, or of another shape or type, is found in the first step; a damaged one, or one
# with a NaN, in the second. The network is filled only after both, so a bad file leaves it as it was.


# %% tags=["export"]
@dataclass(frozen=True)
class _Entry:
    """One tensor of a file, described before it is read. Shape and tensor are in PyTorch's layout."""

    key: str  # what the file calls it
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class _Source:
    """What a checkpoint file says that it holds."""

    where: str  # the file, for messages
    entries: dict[str, _Entry]  # by our names
    unknown: list[str]  # the file's keys for which we have no name
    spell: Callable[[str], str]  # our name -> what this file would call it
    metadata: dict[str, str]


def _nearest(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; the nearest name is {near[0]!r}" if near else ""


def _read_checked(source: _Source, expected: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, checked against those it is to fill; nothing is filled here.

    Names, shapes and types are compared before the first tensor is read, then every value must be finite.
    Raises CheckpointError.
    """
    where, entries = source.where, source.entries
    strangers = source.unknown + [entry.key for name, entry in entries.items() if name not in expected]
    for name in expected:
        if name not in entries:
            key = source.spell(name)
            near = _nearest(key, strangers) if strangers else ""
            raise CheckpointError(f"{where}: the tensor {key!r} of {architecture} is missing{near}")
    if strangers:
        near = _nearest(strangers[0], [entry.key for entry in entries.values() if entry.key not in strangers])
        raise CheckpointError(f"{where}: {strangers[0]!r} is no tensor of {architecture}{near}")
    for name, tensor in expected.items():
        entry = entries[name]
        if entry.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{where}: {entry.key!r} has shape {entry.shape} (in PyTorch's order), "
                f"but {name} of {architecture} is {tuple(tensor.shape)}"
            )
        if entry.dtype != tensor.dtype:
            raise CheckpointError(
                f"{where}: {entry.key!r} is {entry.dtype}, but {name} of {architecture} is {tensor.dtype}"
            )
    values = {}
    for name, tensor in expected.items():
        entry = entries[name]
        try:
            read = entry.read()
        except Exception as error:
            raise CheckpointError(f"{where}: {entry.key!r} cannot be read: {error}") from error
        if read.shape != entry.shape or read.dtype != entry.dtype:
            raise CheckpointError(f"{where}: {entry.key!r} is not what the file announced")
        value = torch.empty_like(tensor, device="cpu").copy_(read)  # laid out in memory as the model has it
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{where}: {entry.key!r} holds NaN or infinite values")
        values[name] = value
    return values


# %% tags=["export"]
_NPY_HEADER_LIMIT = 10_000  # bytes; NumPy's own limit
_UNPACK_LIMIT = 64  # weights hardly compress; a file that grows more than this is a trap
_NUMPY_FLOATS = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}


def _refuse_bomb(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise CheckpointError if a zip archive announces far more than its own size, or packs unusually."""
    total, size = sum(member.file_size for member in archive.infolist()), path.stat().st_size
    if total > _UNPACK_LIMIT * size + 2**20:
        raise CheckpointError(
            f"{path.name}: {size:,} bytes that would unpack to {total:,}; weights do not compress like that"
        )
    for member in archive.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CheckpointError(f"{path.name}: {member.filename!r} is packed in a way that NumPy does not use")


def _npy_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of one array of an .npz archive, from its first bytes; no data is read.

    Raises ValueError if the member is not a plain array of floating-point numbers of the size it announces.
    """
    with archive.open(member) as file:
        start = file.read(8)
        if start[:6] != b"\x93NUMPY":
            raise ValueError("not a NumPy array")
        prefix = "<H" if start[6] == 1 else "<I"
        (length,) = struct.unpack(prefix, file.read(struct.calcsize(prefix)))
        if length > _NPY_HEADER_LIMIT:
            raise ValueError(f"a header of {length:,} bytes")
        header = literal_eval(file.read(length).decode("latin1").strip())
    shape, dtype = header["shape"], np.dtype(header["descr"])
    if dtype.hasobject:
        raise ValueError("Python objects, that is, a pickle; it was not opened")
    if f"{dtype.kind}{dtype.itemsize}" not in _NUMPY_FLOATS:
        raise ValueError(f"type {dtype.name}, not a floating-point type")
    if not all(isinstance(side, int) and side >= 0 for side in shape):
        raise ValueError(f"shape {shape}")
    numbers = 1
    for side in shape:
        numbers *= side
    size = len(start) + struct.calcsize(prefix) + length + numbers * dtype.itemsize
    if size != member.file_size:
        raise ValueError(f"{member.file_size:,} bytes where the shape {shape} needs {size:,}")
    return tuple(shape), dtype


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> Tensor:
    with archive.open(member) as file:
        data = file.read(member.file_size + 1)  # one more than there is: at the end zipfile compares the checksum
    array = np.load(io.BytesIO(data), allow_pickle=False)
    return from_hwio(name, torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False)))


@contextmanager
def _open_npz(path: Path) -> Iterator[_Source]:
    with zipfile.ZipFile(path) as archive:
        _refuse_bomb(archive, path)
        keys = [member.filename.removesuffix(".npy") for member in archive.infolist()]
        roots = [re.fullmatch(r"((?:.*/)?)root_block/standardized_conv2d(?:_\d+)?/kernel", key) for key in keys]
        prefixes = sorted({root[1] for root in roots if root})
        if not prefixes:
            near = _nearest("resnet/root_block/standardized_conv2d/kernel", keys)
            raise CheckpointError(f"{path.name}: the tensor 'root_block/standardized_conv2d/kernel' is missing{near}")
        if len(prefixes) > 1:
            raise CheckpointError(f"{path.name}: holds several networks, under {prefixes}; one was expected")
        entries: dict[str, _Entry] = {}
        unknown = []
        for key, member in zip(keys, archive.infolist(), strict=True):
            name = from_official_name(key.removeprefix(prefixes[0])) if key.startswith(prefixes[0]) else None
            if name is None or not member.filename.endswith(".npy"):
                unknown.append(key)
                continue
            if name in entries:
                raise CheckpointError(f"{path.name}: {entries[name].key!r} and {key!r} are the same tensor")
            try:
                shape, dtype = _npy_header(archive, member)
            except Exception as error:
                raise CheckpointError(f"{path.name}: {key!r} is no array of weights: {error}") from error
            shape = tuple(from_hwio(name, torch.empty(shape, device="meta")).shape)
            torch_dtype = _NUMPY_FLOATS[f"{dtype.kind}{dtype.itemsize}"]
            entries[name] = _Entry(key, shape, torch_dtype, partial(_read_npy, archive, member, name))
        yield _Source(path.name, entries, unknown, lambda name: prefixes[0] + official_name(name), {})


# %% [markdown]
# ## Three more dialects
#
# timm {cite}`wightman2019timm` counts stages and blocks from 0, calls the projection `downsample`, and keeps the head
# as a 1×1 convolution. The transformers library renamed timm's layers once more. In both, the kernels are already
# PyTorch's, so only names change.

# %% tags=["export"]
_TIMM_NET = {
    "root.conv.weight": "stem.conv.weight",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "head.weight": "head.fc.weight",
    "head.bias": "head.fc.bias",
}
_HUGGINGFACE_NET = {
    "root.conv.weight": "bit.embedder.convolution.weight",
    "norm.weight": "bit.norm.weight",
    "norm.bias": "bit.norm.bias",
    "head.weight": "classifier.1.weight",
    "head.bias": "classifier.1.bias",
}


def timm_name(name: str) -> str:
    """What timm's ResNetV2 calls one of our tensors. KeyError for a name that our networks do not have."""
    unit = re.fullmatch(r"block(\d)\.unit(\d\d)\.(.+)", name)
    if not unit:
        return _TIMM_NET[name]
    if unit[3] not in _OFFICIAL_UNIT:
        raise KeyError(name)
    return f"stages.{int(unit[1]) - 1}.blocks.{int(unit[2]) - 1}.{unit[3].replace('proj.', 'downsample.conv.')}"


def huggingface_name(name: str) -> str:
    """What transformers' BitForImageClassification calls one of our tensors. KeyError as in `timm_name`."""
    if name in _HUGGINGFACE_NET:
        return _HUGGINGFACE_NET[name]
    return "bit.encoder." + timm_name(name).replace(".blocks.", ".layers.")


def from_timm_name(key: str) -> str | None:
    """Our name for a tensor of a timm or transformers state dict; None for a name we do not know."""
    for table in (_TIMM_NET, _HUGGINGFACE_NET):
        for ours, theirs in table.items():
            if key == theirs:
                return ours
    unit = re.fullmatch(r"(?:stages\.(\d)\.blocks|bit\.encoder\.stages\.(\d)\.layers)\.(\d+)\.(.+)", key)
    if not unit or unit[4].startswith("proj."):
        return None
    part = unit[4].replace("downsample.conv.", "proj.")
    stage = int(unit[1] or unit[2]) + 1
    return f"block{stage}.unit{int(unit[3]) + 1:02d}.{part}" if part in _OFFICIAL_UNIT else None


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One of our state dicts as timm's ResNetV2 takes it, whose head is a 1x1 convolution."""
    return {
        timm_name(name): tensor[:, :, None, None] if name == "head.weight" else tensor for name, tensor in state.items()
    }


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One of our state dicts as BitForImageClassification of the transformers library takes it."""
    return {huggingface_name(name): tensor for name, tensor in state.items()}


def convert_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A timm or transformers state dict of a BiT network under our names, its head (classes, features).

    Raises CheckpointError that names the first tensor a BiT network does not have.
    """
    converted = {}
    for key, tensor in state.items():
        name = from_timm_name(key)
        if name is None:
            raise CheckpointError(f"{key!r} is no tensor of a BiT network in timm or transformers")
        converted[name] = tensor.flatten(1) if name == "head.weight" else tensor
    return converted


# %%
for name in ("root.conv.weight", "block2.unit01.proj.weight", "head.bias"):
    print(f"{name:26} {timm_name(name):40} {huggingface_name(name)}")
assert all(from_timm_name(timm_name(name)) == name == from_timm_name(huggingface_name(name)) for name in names)

# %% [markdown]
# A state dict, in a safetensors file or in a `.pth`, says through its names whose it is.

# %% tags=["export"]
_SAFETENSORS_FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def _our_name(key: str) -> str | None:
    """The key itself if one of our networks has a tensor of that name."""
    try:
        official_name(key)
    except KeyError:
        return None
    return key


def _flat(entry: _Entry) -> Tensor:
    return entry.read().flatten(1)


def _by_our_names(where: str, found: list[_Entry], metadata: dict[str, str]) -> _Source:
    """Sort the tensors of a state dict by our names; it is ours, timm's or the transformers library's."""
    ours = sum(_our_name(entry.key) is not None for entry in found)
    theirs = sum(from_timm_name(entry.key) is not None for entry in found)
    rename = _our_name if ours >= theirs else from_timm_name
    spell = timm_name
    if rename is _our_name:
        spell = str
    elif any(entry.key.startswith("bit.") for entry in found):
        spell = huggingface_name
    entries, unknown = {}, []
    for entry in found:
        name = rename(entry.key)
        if name is None:
            unknown.append(entry.key)
        elif name in entries:
            raise CheckpointError(f"{where}: {entries[name].key!r} and {entry.key!r} are the same tensor")
        elif name == "head.weight" and len(entry.shape) == 4:  # timm's head is a 1x1 convolution
            shape = tuple(torch.empty(entry.shape, device="meta").flatten(1).shape)
            entries[name] = _Entry(entry.key, shape, entry.dtype, partial(_flat, entry))
        else:
            entries[name] = entry
    return _Source(where, entries, unknown, spell, metadata)


@contextmanager
def _open_safetensors(path: Path) -> Iterator[_Source]:
    with safe_open(path, framework="pt") as file:
        found = []
        for key in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
            part = file.get_slice(key)
            if part.get_dtype() not in _SAFETENSORS_FLOATS:
                raise CheckpointError(f"{path.name}: {key!r} has type {part.get_dtype()}, not a floating-point type")
            dtype = _SAFETENSORS_FLOATS[part.get_dtype()]
            found.append(_Entry(key, tuple(part.get_shape()), dtype, partial(file.get_tensor, key)))
        yield _by_our_names(path.name, found, file.metadata() or {})


@contextmanager
def _open_torch(path: Path) -> Iterator[_Source]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _refuse_bomb(archive, path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path.name}: holds a {type(state).__name__}, not a state dict")
    yield _of_state_dict(path.name, state)


def _of_state_dict(where: str, state: Mapping[str, Tensor]) -> _Source:
    found = []
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{where}: {key!r} is {kind}, not a tensor of floating-point numbers")
        found.append(_Entry(str(key), tuple(tensor.shape), tensor.dtype, tensor.detach))
    return _by_our_names(where, found, {})


_FORMATS = {
    ".npz": _open_npz,
    ".safetensors": _open_safetensors,
    ".pth": _open_torch,
    ".pt": _open_torch,
    ".bin": _open_torch,
}


@contextmanager
def _open(path: str | Path, suffix: str | None = None) -> Iterator[_Source]:
    """Open a checkpoint of any of the formats; whatever goes wrong in it becomes a CheckpointError."""
    path = Path(path)
    suffix = suffix or path.suffix
    if suffix not in _FORMATS:
        raise CheckpointError(f"{path.name}: a checkpoint ends in {', '.join(_FORMATS)}")
    if not path.exists():
        raise CheckpointNotFoundError(f"there is no file {path}")
    try:
        with _FORMATS[suffix](path) as source:
            yield source
    except CheckpointError:
        raise
    except Exception as error:  # the file may come from anywhere, and so may what it makes a parser raise
        raise CheckpointError(f"{path.name}: not a readable {suffix} checkpoint: {error}") from error


# %% [markdown]
# ## From a file to a model
#
# Official files do not say which architecture they hold, but their tensors do: count the units of each stage, and
# divide the channels by those of width 1. Should one tensor be damaged, a majority of three still names the right
# network, and the check above names the damaged tensor.
#
# The model is first built on PyTorch's `meta` device: names, shapes and types, with no memory behind them. So a file
# that claims to be an R152x4000 costs nothing to refuse.


# %% tags=["export"]
def _skeleton(architecture: str, num_classes: int, dtype: torch.dtype) -> ResNetV2:
    """A model that has names, shapes and types but no memory behind them."""
    with torch.device("meta"):
        return create_model(architecture, num_classes).to(dtype).eval()


def _guess_architecture(source: _Source) -> str:
    """The name of the architecture that the tensors of a checkpoint fit best.

    The depth is the one whose units are nearest in number, the width what most of three tensors say, so that
    one damaged tensor does not mislead. It is found, and named, when all are checked.
    """
    entries = source.entries
    widths = []
    for name, base in (("root.conv.weight", 64), ("norm.weight", 2048), ("block4.unit01.conv1.weight", 512)):
        if name in entries and entries[name].shape and entries[name].shape[0] > 0:
            widths.append(entries[name].shape[0] / base)
    if not widths:
        near = _nearest(source.spell("root.conv.weight"), source.unknown)
        raise CheckpointError(
            f"{source.where}: no tensor {source.spell('root.conv.weight')!r}{near}; not a BiT network"
        )
    width = f"{statistics.mode(widths):g}"

    units = [len({name.split(".")[1] for name in entries if name.startswith(f"block{i}.")}) for i in (1, 2, 3, 4)]
    depth = min(BLOCKS, key=lambda depth: sum(abs(n - m) for n, m in zip(BLOCKS[depth], units, strict=True)))
    return f"R{depth}x{width}"


def _build(source: _Source, num_classes: int | None) -> ResNetV2:
    """The model that a checkpoint holds; a number of classes puts a new head of zeros in place of its own."""
    entries = source.entries
    architecture = source.metadata.get("architecture") or _guess_architecture(source)
    own_classes = 0
    if num_classes is not None:
        kept = {name: entry for name, entry in entries.items() if not name.startswith("head.")}
        source = _Source(source.where, kept, source.unknown, source.spell, source.metadata)
    elif "head.weight" in entries or "head.bias" in entries:
        own_classes = ((entries.get("head.weight") or entries["head.bias"]).shape or (0,))[0]
    dtypes = [entry.dtype for entry in entries.values()]
    model = _skeleton(architecture, own_classes, statistics.mode(dtypes))
    model.load_state_dict(_read_checked(source, model.state_dict(), architecture), assign=True)
    model.lay_out_filters()
    if num_classes:
        model.reset_head(num_classes)
    if "image_size" in source.metadata:
        model.image_size = int(source.metadata["image_size"])
    return model.eval()


# %% [markdown]
# ## Saving, and loading what was saved
#
# Both directions, then. Three habits are built in. A file is written under a temporary name and renamed when it is
# whole, so that a crash or a full disk never leaves half a checkpoint in the place of a good one. Nothing is saved
# that could not be read back: a NaN, or a network whose weight standardization was folded away, is an error while
# the run that made it can still be saved. And our own format carries its metadata with it.


# %% tags=["export"]
def _refuse_folded(model: nn.Module, what: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, StdConv2d):
            raise CheckpointError(
                f"{name} is a {type(module).__name__}, not a StdConv2d: {what} the model as it was before "
                "fold_weight_standardization, and fold it afterwards"
            )


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill a model from a checkpoint file: official .npz, our .safetensors, timm's or transformers'.

    Everything is read and checked before the first weight of the model changes. Raises CheckpointError, which
    names the tensor, if one is missing, superfluous, of another shape or type, or not finite.
    """
    _load_into(model, path, Path(path).suffix)


def load_npz(model: nn.Module, path: str | Path) -> None:
    """Fill a model from an official .npz file, as `load_weights` does."""
    _load_into(model, path, ".npz")


def _load_into(model: nn.Module, path: str | Path, suffix: str) -> None:
    _refuse_folded(model, "load into")
    with _open(path, suffix) as source:
        values = _read_checked(source, model.state_dict(), getattr(model, "name", "") or type(model).__name__)
    model.load_state_dict(values)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside path; it takes path's place when the block ends well, and vanishes when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _checked_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors, on the CPU; CheckpointError if no loader here could read them back."""
    _refuse_folded(model, "save")
    state = model.state_dict()
    architecture, classes = getattr(model, "name", ""), getattr(model, "num_classes", 0)
    source = _of_state_dict("the model", state)
    try:
        expected = _skeleton(architecture, classes, next(iter(state.values())).dtype).state_dict()
    except Exception as error:
        raise CheckpointError(f"a model called {architecture!r} cannot be built again: {error}") from error
    _read_checked(source, expected, f"{architecture} with {classes} classes")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_npz(model: nn.Module, path: str | Path) -> Path:
    """Write a model as an official .npz: prefix `resnet/`, kernels (height, width, in, out), the head 1x1.

    Raises CheckpointError for bfloat16, which NumPy lacks, and for a model that could not be read back.
    """
    path = Path(path)
    arrays = {}
    for name, tensor in _checked_state(model).items():
        if tensor.dtype == torch.bfloat16:
            raise CheckpointError(f"{name} is bfloat16, which an .npz cannot hold; convert with model.float() first")
        arrays["resnet/" + official_name(name)] = to_hwio(name, tensor).contiguous().numpy()
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    return path


_OWN_METADATA = ("format", "architecture", "num_classes", "image_size")


def save_checkpoint(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a model as safetensors that `load_pretrained` reads back, bit for bit.

    metadata: text to keep in the file's header, beside the architecture, the number of classes and the image
    size, which are always there. The file appears at once and whole, or not at all.
    Raises CheckpointError for a model that could not be read back, TypeError for metadata that is not text.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path.name}: our checkpoints end in .safetensors (save_npz writes an official .npz)")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata is text only; {key!r} is {value!r}")
        if key in _OWN_METADATA:
            raise ValueError(f"the model itself says its {key!r}; leave it out of the metadata")
    state = _checked_state(model)
    values = ("pt", model.name, str(model.num_classes), str(model.image_size))
    own = dict(zip(_OWN_METADATA, values, strict=True))
    with _replacing(path) as temporary:
        save_file(state, temporary, metadata=own | dict(metadata or {}))
    return path


def load_checkpoint(path: str | Path, num_classes: int | None = None) -> ResNetV2:
    """The model in a checkpoint file, in eval mode; formats and errors as in `load_weights`.

    The architecture is what the file's metadata says or, failing that, what its tensors show.
    num_classes: None keeps the checkpoint's own head, a number gives a new head of zeros, 0 gives no head.
    """
    with _open(path) as source:
        return _build(source, num_classes)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text that a .safetensors file carries in its header, by key; empty for the other formats."""
    with _open(path) as source:
        return dict(sorted(source.metadata.items()))


def _digests(path: Path) -> tuple[str, str]:
    """The MD5 (base64, as Google Cloud Storage states it) and the SHA-256 (hexadecimal) of a file."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            md5.update(chunk)
            sha256.update(chunk)
    return base64.b64encode(md5.digest()).decode(), sha256.hexdigest()


def checkpoint_card(path: str | Path) -> str:
    """What a checkpoint file is, as Markdown to keep beside it: measured from the file, and its metadata."""
    path, metadata = Path(path), read_metadata(path)
    model = load_checkpoint(path)
    rows = {
        "architecture": model.name,
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "classes": f"{model.num_classes:,}",
        "image size": str(model.image_size),
        "bytes": f"{path.stat().st_size:,}",
        "SHA-256": f"`{_digests(path)[1]}`",
    } | {key: text for key, text in metadata.items() if key not in _OWN_METADATA}
    lines = [
        f"# {path.stem}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {text} |" for key, text in rows.items()),
    ]
    return "\n".join(lines) + "\n"


# %% [markdown]
# Now the file that we wrote by hand can be read, and every route from there leads back to the same bits.

# %%
first = load_checkpoint(folder / "by-hand.npz")
save_checkpoint(first, folder / "ours.safetensors", {"upstream": "none: random weights", "seed": "0"})
torch.save(to_timm(load_checkpoint(folder / "ours.safetensors").state_dict()), folder / "timm.pth")
torch.save(to_huggingface(load_checkpoint(folder / "timm.pth").state_dict()), folder / "transformers.bin")
last = load_checkpoint(folder / "transformers.bin")
assert all(torch.equal(tensor, last.state_dict()[name]) for name, tensor in mini.state_dict().items())
print(last.name, last.num_classes, "classes")

# %% [markdown]
# The metadata makes a card: what the file is, measured from the file itself, and what its maker said. Every
# checkpoint that ships with this book has one.

# %%
print("\n".join(line for line in checkpoint_card(folder / "ours.safetensors").splitlines() if "SHA" not in line))

# %% [markdown]
# And here is what a bad file meets. Each message names the tensor, and none of these files changed the model.

# %%
KERNEL, GAMMA = "resnet/block2/unit01/b/standardized_conv2d/kernel", "resnet/block4/unit01/c/group_norm/gamma"
spoiled = arrays[KERNEL].copy()
spoiled[0, 0, 0, 0] = np.nan
damaged = {
    "renamed": {key if key != GAMMA else GAMMA.replace("mm", "m"): array for key, array in arrays.items()},
    "extra": arrays | {"resnet/momentum": arrays[GAMMA]},
    "reshaped": arrays | {KERNEL: arrays[KERNEL][:2]},
    "not a number": arrays | {KERNEL: spoiled},
    "integers": arrays | {GAMMA: arrays[GAMMA].astype(np.int32)},
    "a pickle": arrays | {GAMMA: np.array([Trap()], dtype=object)},
    "a bomb": {key: np.zeros((2**22,), np.float32) for key in list(arrays)[:8]},
}
before = {name: tensor.clone() for name, tensor in mini.state_dict().items()}
for what, content in damaged.items():
    np.savez_compressed(folder / "bad.npz", **content)
    try:
        load_npz(mini, folder / "bad.npz")
    except CheckpointError as error:
        print(f"{what}: {error}\n")
    else:
        raise AssertionError(f"{what} was accepted")
assert all(torch.equal(before[name], tensor) for name, tensor in mini.state_dict().items()) and not trap.exists()

# %% [markdown]
# ## Proof: the same file in timm
#
# timm's ResNetV2 was written by other hands and has its own reader for the official files. We write one file and
# read it twice. One difference must be put aside first: timm's weight standardization adds $\epsilon = 10^{-8}$ to
# the variance of a filter where the released code adds $10^{-10}$, so we set timm's to the latter.

# %%
from functools import partial as fixed

import timm
from timm.models.resnetv2 import ResNetV2 as TimmResNetV2


def timm_twin(name: str, num_classes: int) -> nn.Module:
    """timm's network of our name, with the released epsilon. The minis have fewer groups, so we say how many."""
    depth, width = name.removeprefix("R").split("x")
    return TimmResNetV2(
        layers=BLOCKS[int(depth)],
        width_factor=float(width),
        num_classes=num_classes,
        stem_type="fixed",
        conv_layer=fixed(timm.layers.StdConv2d, eps=1e-10),
        norm_layer=fixed(timm.layers.GroupNormAct, num_groups=min(32, int(32 * float(width)))),
    ).eval()


def randomized(name: str, num_classes: int) -> nn.Module:
    torch.manual_seed(1)
    model = create_model(name, num_classes).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 and parameter_name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)  # the gains of the norms
            else:
                parameter.normal_(0, 0.2 if parameter.ndim == 1 else 0.05)
    return model


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


for name, sizes in {"R26x0.25": [(128, 128), (224, 224), (97, 131)], "R50x1": [(97, 131)]}.items():
    path = save_npz(randomized(name, 11), folder / f"{name}.npz")
    ours, theirs = load_checkpoint(path), timm_twin(name, 11)
    theirs.load_pretrained(str(path))  # timm's own reader
    for height, width in sizes:
        images = torch.rand(2, 3, height, width) * 2 - 1
        with torch.no_grad():
            found = relative_difference(ours(images), theirs(images))
        assert found < 1e-4
        print(f"{name} at {height}x{width}: the logits differ by less than 1e-4 of the largest")

# %% [markdown]
# Training needs the gradients to agree too. In float32 two correct programs differ there by more than one expects:
# a rounding error carries an activation across zero, its ReLU closes, and a whole path through the network is gone
# from one gradient and not from the other. In float64 that does not happen, and it is there that we compare. The
# tests of this book do so for R50x1, and compare logits up to R152x2.

# %%
ours, theirs = load_checkpoint(folder / "R26x0.25.npz").double(), timm_twin("R26x0.25", 11)
theirs.load_pretrained(str(folder / "R26x0.25.npz"))
theirs.double()
images = torch.rand(2, 3, 97, 131, dtype=torch.float64) * 2 - 1
for model in (ours, theirs):
    F.cross_entropy(model(images), torch.tensor([3, 8])).backward()
mine = {name: parameter.grad for name, parameter in ours.named_parameters()}
other = convert_timm({name: parameter.grad for name, parameter in theirs.named_parameters()})
assert mine.keys() == other.keys()
assert max(relative_difference(mine[name], other[name]) for name in mine) < 1e-9
print(f"the gradients of all {len(mine)} parameters agree")

# %% [markdown]
# And the wrong order of axes from the beginning of the chapter, which PyTorch let pass?

# %%
state = randomized("R26x0.25", 11).state_dict()
swapped = create_model("R26x0.25", 11).eval()
swapped.load_state_dict({name: t.transpose(2, 3) if t.ndim == 4 else t for name, t in state.items()}, strict=True)
images = torch.rand(2, 3, 97, 131) * 2 - 1
with torch.no_grad():
    wrong, right = swapped(images), theirs.float()(images)
    mirrored = theirs(images.transpose(2, 3))
print(f"height and width exchanged: the logits differ by {relative_difference(wrong, right):.0%} of the largest")
assert relative_difference(wrong, right) > 0.2
assert relative_difference(wrong, mirrored) < 1e-4

# %% [markdown]
# They are the logits of the mirrored images, to the last assert: exchanging the axes of every kernel is the same as
# exchanging those of the picture. A network that knows the world upright now sees it lying on its side.
#
# ## What the numbers in a pixel mean
#
# The weights are right only together with the input that they were trained on. The `.npz` files take pixels in
# $[-1, 1]$. The TF-Hub modules of the same networks take $[0, 1]$, and convert inside
# ([issue 16](https://github.com/google-research/big_transfer/issues/16) of the released code, answered by an
# author). The files do not say so. What happens to those who guess wrong?
#
# A little algebra predicts it. Feed $x' = a x + b$ instead of $x$. A standardised filter sums to zero, so wherever it
# lies wholly inside the image the shift vanishes, $\hat W * (a x + b) = a\,(\hat W * x)$. The maximum of the stem
# passes on a factor $a > 0$, and the first thing every path meets next is a group norm, which divides it out again.
# What remains is the border. There the image is padded with zeros, and a zero means mid-grey in $[-1, 1]$ but black
# in $[0, 1]$. Does the whole difference really come from the frame?

# %%
model = load_checkpoint(folder / "R26x0.25.npz")
generator = torch.Generator().manual_seed(2)
pixels = F.interpolate(torch.rand(4, 3, 16, 16, generator=generator), size=224, mode="bicubic").clamp(0, 1)
mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
inputs = {
    "[-1, 1]": 2 * pixels - 1,
    "[-0.5, 0.5]": pixels - 0.5,
    "[0, 1]": pixels,
    "[0, 255]": 255 * pixels,
    "ImageNet mean and std": (pixels - mean[:, None, None]) / std[:, None, None],
}
with torch.no_grad():
    expected = model(inputs["[-1, 1]"])
    off = {label: relative_difference(model(x), expected) for label, x in inputs.items()}
    stem = [model.root.conv(inputs[label])[..., 3:-3, 3:-3] for label in ("[-1, 1]", "[0, 1]")]
for label, found in off.items():
    print(f"{label:22} logits off by {100 * found:4.1f} % of the largest")
torch.testing.assert_close(stem[0], 2 * stem[1], rtol=1e-4, atol=1e-4)  # inside, only the factor 2 remains
assert off["[-0.5, 0.5]"] < 1e-5 and off["[0, 1]"] > 0.03
assert abs(off["[0, 255]"] - off["[0, 1]"]) < 1e-4

# %% [markdown]
# It does. A factor alone changes nothing, $[0, 255]$ is as wrong as $[0, 1]$ and no more, and the difference is that
# of a black frame instead of a grey one. (Normalising each channel by its own mean and deviation scales the channels
# against each other, which is a change of colour and not only of the frame.) How much accuracy such a frame costs a
# trained network is not measured here; at a small resolution, where more of the image is border, it is more. The
# remedy is to feed what `bitlib.data.normalize` gives.
#
# ## What was released
#
# | | trained on | images | labels | released |
# |---|---|---|---|---|
# | BiT-S | ILSVRC-2012 {cite}`russakovsky2015imagenet` | 1.28 million | 1,000, one to an image | yes |
# | BiT-M | ImageNet-21k {cite}`deng2009imagenet` | 14.2 million | about 21,000, several to an image | yes |
# | BiT-L | JFT-300M {cite}`sun2017revisiting` | 300 million | 18,291, noisy, several to an image | never |
#
# The sizes are those of the paper {cite}`kolesnikov2020big`. BiT-S and BiT-M exist in the six architectures below,
# BiT-M also fine-tuned on ILSVRC-2012; there are files fine-tuned on each task of VTAB-1k as well, and a few distilled
# ones {cite}`bittransfer_code`. How large is a file? Four bytes a parameter:

# %%
rows = []
for name in ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4"):
    with torch.device("meta"):
        backbone, small, large = (sum(p.numel() for p in create_model(name, k).parameters()) for k in (0, 1000, 21843))
    rows.append((name, backbone, small, large))
print("          backbone   BiT-S: 1,000 classes   BiT-M: 21,843 classes")
for name, backbone, small, large in rows:
    print(f"{name:7} {backbone / 1e6:7.1f} M {small * 4 / 1e6:17,.0f} MB {large * 4 / 1e6:20,.0f} MB")
assert rows[0][3] == 68_256_659 and round(rows[0][3] / 1e6, 1) == 68.3  # the figure of timm's model card
assert rows[0][3] - rows[0][1] == 21843 * (2048 + 1)

# %% [markdown]
# Nearly two thirds of BiT-M-R50x1 is its head. It has 21,843 outputs where ImageNet-21k has 21,841 classes; asked
# about the two, an author answered that they may be entries of the class list without images
# ([issue 18](https://github.com/google-research/big_transfer/issues/18)). For transfer it does not matter, because
# the head is thrown away, but a program that expects 21,841 rows will fail.

# %%
print(f"the head is {(rows[0][3] - rows[0][1]) / rows[0][3]:.0%} of BiT-M-R50x1")
assert 0.6 < (rows[0][3] - rows[0][1]) / rows[0][3] < 2 / 3

# %% [markdown]
# ## Downloading once
#
# The addresses follow a pattern, `https://storage.googleapis.com/bit_models/BiT-M-R50x1.npz`, and timm keeps copies
# on Hugging Face. Not every name of the pattern is a file, so we list those that are.

# %% tags=["export"]
_RELEASED = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")
OFFICIAL_NAMES = [
    f"BiT-{variant}-{architecture}{tuned}"
    for variant, tuned in (("S", ""), ("M", ""), ("M", "-ILSVRC2012"))
    for architecture in _RELEASED
]
HUGGINGFACE_NAMES = [
    f"timm/resnetv2_{size}_bit.{tag}"
    for size in ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4")
    for tag in ("goog_in21k", "goog_in21k_ft_in1k")
] + [
    "timm/resnetv2_50x1_bit.goog_distilled_in1k",
    "timm/resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k",
    "timm/resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k_384",
]
MINI_NAMES = ["BiT-mini-S", "BiT-mini-M", "BiT-mini-L", "BiT-mini-M-R14x0.25", "BiT-mini-M-R26x0.5"]


def cache_dir() -> Path:
    """Where downloads are kept: $BITLIB_CACHE, else $XDG_CACHE_HOME/bitlib, else ~/.cache/bitlib."""
    if os.environ.get("BITLIB_CACHE"):
        return Path(os.environ["BITLIB_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bitlib"


def checkpoint_url(name: str) -> str:
    """The address of an official checkpoint or of timm's copy of it on Hugging Face.

    Raises ValueError, which names the nearest, for a name that is none.
    """
    if name in OFFICIAL_NAMES:
        return f"https://storage.googleapis.com/bit_models/{name}.npz"
    if name in HUGGINGFACE_NAMES:
        return f"https://huggingface.co/{name}/resolve/main/model.safetensors"
    known = {other.lower(): other for other in MINI_NAMES + OFFICIAL_NAMES + HUGGINGFACE_NAMES}
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0)
    raise ValueError(f"no checkpoint is called {name!r}; the nearest name is {known[near[0]]!r}")


# %% [markdown]
# A file of a gigabyte wants care. The download goes to a `.part` file, and a connection that breaks is taken up
# where it stopped, with the `Range` header of HTTP. Google's storage states the MD5 of the whole file in a header of
# its answer, `x-goog-hash`; with it we know that what arrived is what is stored there. (An MD5 protects from
# accidents, not from a forger; against him there is HTTPS.) Only then does the file get its name. We keep its
# SHA-256 beside it and check it whenever the file is used again, and a lock lets one process download while others
# that want the same file wait.


# %% tags=["export"]
def _fetch(url: str, part: Path) -> str | None:
    """Append to a partial file what it lacks; returns the MD5 that the server states, if it does.

    Raises OSError when the connection fails or ends early; what has arrived stays in the partial file.
    """
    # ask for the last byte again, so that the answer is never empty, not even when only the renaming is left
    have = max(part.stat().st_size - 1, 0) if part.exists() else 0
    headers = {"User-Agent": "bitlib"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as reply:
        if reply.status != 206:  # the server starts from the beginning
            have = 0
        elif not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise ConnectionError("the server sent another part of the file than was asked for")
        length = reply.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            open(part, "r+b" if have else "wb") as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            file.seek(have)
            file.truncate()
            while chunk := reply.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
            arrived = file.tell()
        stated = ",".join(reply.headers.get_all("x-goog-hash") or [])
    if total is not None and arrived != total:
        raise ConnectionError(f"the connection ended after {arrived:,} of {total:,} bytes")
    md5 = re.search(r"md5=([\w+/]+=*)", stated)
    return md5[1] if md5 else None


def download(url: str, path: str | Path, attempts: int = 3) -> Path:
    """Fetch a file once. Returns path.

    An interrupted download goes on where it stopped (HTTP Range), now or in a later call. Size and MD5, where
    the server states one, are checked before the file gets its name; its SHA-256 is kept beside it, in
    `<name>.sha256`, and checked whenever the file is used again. Of several processes one downloads while the
    others wait. A file that was put there by hand is taken as it is, and its SHA-256 kept from then on.
    Raises CheckpointError if the file cannot be had, saying where to put it by hand, or is not what it should
    be.
    """
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"{url!r} is not the address of a file on the web")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, record = path.with_name(path.name + ".part"), path.with_name(path.name + ".sha256")
    with FileLock(f"{path}.lock"):
        if path.exists():
            sha256 = _digests(path)[1]
            if not record.exists():
                record.write_text(f"{sha256}  {path.name}\n")
            elif record.read_text().split()[:1] != [sha256]:
                raise CheckpointError(
                    f"{path} has changed since it was downloaded: its SHA-256 is not the one in "
                    f"{record.name}; remove both and load again"
                )
            return path
        for attempt in range(1, attempts + 1):
            before = part.stat().st_size if part.exists() else 0
            try:
                stated = _fetch(url, part)
                break
            except OSError as error:
                if getattr(error, "code", None) == 416:  # we have more than there is
                    part.unlink(missing_ok=True)
                if before and not part.exists():  # what we had was no use: start again
                    before = -1
                after = part.stat().st_size if part.exists() else 0
                if attempt == attempts or after <= before:  # nothing came: trying again at once will not help
                    kept = f"{after:,} bytes are here, and the next call goes on from them. " if after else ""
                    raise CheckpointError(
                        f"{path.name} is not in the cache and {url} cannot be read ({error}). {kept}"
                        f"Without a network, fetch it elsewhere and put it at {path}"
                    ) from error
        md5, sha256 = _digests(part)
        if stated and stated != md5:
            part.unlink()
            raise CheckpointError(f"{url}: what arrived has the MD5 {md5}, the server states {stated}; it was removed")
        record.write_text(f"{sha256}  {path.name}\n")
        os.replace(part, path)
    return path


# %% [markdown]
# To see it work without a network, we let this machine be the server, and a bad one: it hangs up in the middle of
# its first answer.

# %%
import http.server
import threading


class BadServer(http.server.BaseHTTPRequestHandler):
    """Serves one file with ranges and Google's hash header; the first answer breaks off half-way."""

    data = (folder / "R26x0.25.npz").read_bytes()
    asked: list[str | None] = []

    def do_GET(self):
        wanted = self.headers["Range"]
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Range", f"bytes {start}-{len(self.data) - 1}/{len(self.data)}")
        self.send_header("Content-Length", str(len(self.data) - start))
        self.send_header("x-goog-hash", "md5=" + base64.b64encode(hashlib.md5(self.data).digest()).decode())
        self.end_headers()
        self.wfile.write(self.data[start:] if wanted else self.data[: len(self.data) // 2])

    def log_message(self, *args):
        pass


os.environ["no_proxy"] = "127.0.0.1"
with http.server.ThreadingHTTPServer(("127.0.0.1", 0), BadServer) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for _ in range(2):  # the second call finds the file and asks nobody
        path = download(f"http://127.0.0.1:{server.server_port}/mini.npz", folder / "cache" / "mini.npz")
    server.shutdown()
assert path.read_bytes() == BadServer.data
assert BadServer.asked == [None, f"bytes={len(BadServer.data) // 2 - 1}-"]
print(sorted(file.name for file in path.parent.iterdir() if file.suffix != ".lock"))

# %% [markdown]
# ## One call for all of it


# %% tags=["export"]
def load_pretrained(name_or_path: str | Path, num_classes: int | None = None) -> ResNetV2:
    """A pre-trained model, in eval mode.

    name_or_path: `BiT-mini-{S,M,L}` (R26x0.25) and `BiT-mini-M-{R14x0.25,R26x0.5}`, which ship with the book,
    in float32; an official name, `BiT-{S,M}-R...` or `BiT-M-R...-ILSVRC2012`, or timm's copy,
    `timm/resnetv2_..._bit...` (downloaded once, checked, cached); or a path to an official .npz, to our
    .safetensors, or to a timm or transformers checkpoint.
    num_classes: None keeps the checkpoint's own head, a number gives a new head of zeros, 0 gives no head.
    `model.image_size` is the resolution to evaluate at. Inputs are in [-1, 1].
    Raises ValueError for an unknown name, CheckpointError for a file that cannot be had or used.
    """
    if num_classes is not None and (
        not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 0
    ):
        raise ValueError(f"num_classes is None or a number of classes, not {num_classes!r}")
    name = str(name_or_path)
    if name in MINI_NAMES:
        try:
            path = shipped_file(f"checkpoints/{name}.safetensors")
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(f"{name} is not in this copy of the book: {error}") from error
        return load_checkpoint(path, num_classes).float()  # the largest is stored in float16
    downloadable = name in OFFICIAL_NAMES or name in HUGGINGFACE_NAMES
    if not downloadable and (isinstance(name_or_path, Path) or "/" in name or Path(name).suffix in _FORMATS):
        return load_checkpoint(name_or_path, num_classes)
    url = checkpoint_url(name)
    path = download(url, cache_dir() / (name.replace("/", "--") + Path(url).suffix))
    model = load_checkpoint(path, num_classes)
    if model.name.removeprefix("R") not in re.split(r"-R|-|_", name):
        raise CheckpointError(f"{path} is a {model.name}, not what its name says; remove it and load again")
    model.image_size = _evaluation_size(name)
    return model


# %% tags=["export"]
def _evaluation_size(name: str) -> int:
    """The resolution at which timm evaluates a released checkpoint; BiT's own depends on the task."""
    if name.endswith("-ILSVRC2012") or name.endswith(".goog_in21k_ft_in1k"):
        return 480 if "152x4" in name else 448
    return 384 if name.endswith("_384") else 224


# %%
features = load_pretrained(folder / "R26x0.25.npz", num_classes=0)
new_task = load_pretrained(folder / "R26x0.25.npz", num_classes=3)
with torch.no_grad():
    print(tuple(features(images).shape), new_task(images).tolist(), new_task.training)
try:
    load_pretrained("BiT-M-R51x1")
except ValueError as error:
    print(error)

# %% [markdown]
# ```{admonition} Where sources disagree
# - **Input range.** An official tutorial divides by 255 and stops there, because it uses the TF-Hub module; the
#   training code of the same release goes to $[-1, 1]$, as the `.npz` files need. Both are right, each for its file.
# - **What BiT-M was trained on.** timm's documentation page of these models says JFT-300M; its model cards, the
#   paper and the release say ImageNet-21k {cite}`kolesnikov2020big,bittransfer_code,wightman2019timm`.
# - **Epsilon.** The released code standardises with $10^{-10}$, timm and transformers with $10^{-8}$. On random
#   weights this moves the logits by less than a thousandth (a test of this book pins it); a filter whose variance is itself near $10^{-8}$, as
#   weight decay can make it, would come out smaller.
# - **Resolution of the `-ILSVRC2012` files.** The release does not state it. The paper's rule crops to 384 (480 for
#   R152x4), the released rule to 480, and timm evaluates at 448 (480 for R152x4). `load_pretrained` sets
#   `image_size` to timm's value, for which accuracies of these very files are published {cite}`wightman2019timm`.
# - **How many architectures.** One paragraph of the release counts five, the next adds R152x2; there are six.
# ```
#
# ## Exercises
#
# **1. The right order.** Write the permutation without looking: from the file's (height, width, in, out) to
# PyTorch's (out, in, height, width). The check uses a kernel whose four sides differ. Why must it?

# %% tags=["check", "hide-cell"]
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitlib.checkpoints import from_hwio, from_official_name


# %% tags=["check", "hide-cell"]
def check_to_oihw(to_oihw: Callable[[Tensor], Tensor]) -> None:
    """Check a function that takes a kernel from HWIO to OIHW."""
    kernel = torch.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    found = to_oihw(kernel)
    assert isinstance(found, Tensor), f"a tensor is wanted, not {type(found).__name__}"
    assert found.shape == (5, 4, 2, 3), f"a (2, 3, 4, 5) kernel must become (5, 4, 2, 3); yours is {tuple(found.shape)}"
    expected = from_hwio("root.conv.weight", kernel)
    assert torch.equal(found, expected), "the shape is right and the numbers are not: a reshape is not a permutation"
    print("check_to_oihw: correct")


# %% tags=["exercise"]
def my_to_oihw(kernel: Tensor) -> Tensor:
    """Your code here: (height, width, in, out) -> (out, in, height, width)."""
    return kernel


# check_to_oihw(my_to_oihw)


# %% tags=["solution", "hide-input"]
def my_to_oihw(kernel: Tensor) -> Tensor:
    return kernel.permute(3, 2, 0, 1)


check_to_oihw(my_to_oihw)

# %% [markdown]
# **2. Any prefix, any number.** Suppose that a file's keys may stand under `resnet/...` or under another scope, and come
# with numbered kernels. Turn a list of such keys into a dictionary from key to our name. All keys of a file share
# one prefix, and exactly one ends in `root_block/standardized_conv2d/kernel`, perhaps with a number.


# %% tags=["check", "hide-cell"]
def check_our_names(our_names: Callable[[list[str]], dict[str, str]]) -> None:
    """Check a function that gives our name for every key of an official file."""
    plain = [
        "root_block/standardized_conv2d/kernel",
        "block1/unit01/a/proj/standardized_conv2d/kernel",
        "block3/unit02/b/standardized_conv2d/kernel",
        "block3/unit02/b/group_norm/gamma",
        "group_norm/beta",
        "head/conv2d/kernel",
    ]
    for prefix in ("resnet/", "", "a/module_2/resnet/"):
        for numbered in (False, True):
            keys = [
                prefix + (key.replace("ized_conv2d/", f"ized_conv2d_{i}/") if numbered else key)
                for i, key in enumerate(plain)
            ]
            found = our_names(keys)
            assert isinstance(found, dict) and found.keys() == set(keys), "the keys of the file must be your keys"
            for key, simple in zip(keys, plain, strict=True):
                expected = from_official_name(simple)
                assert found[key] == expected, f"{key!r} is our {expected!r}, not {found[key]!r}"
    print("check_our_names: correct")


# %% tags=["exercise"]
def my_our_names(keys: list[str]) -> dict[str, str]:
    """Your code here; `from_official_name` takes a key without its prefix."""
    return {key: key for key in keys}


# check_our_names(my_our_names)


# %% tags=["solution", "hide-input"]
def my_our_names(keys: list[str]) -> dict[str, str]:
    found = [re.fullmatch(r"(.*?)root_block/standardized_conv2d(_\d+)?/kernel", key) for key in keys]
    prefix = next(match[1] for match in found if match)
    return {key: from_official_name(key.removeprefix(prefix)) for key in keys}


check_our_names(my_our_names)

# %% [markdown]
# **3. Look, do not read.** Give the shape of every array of an `.npz`, by name, without unpacking any data: the
# archive of the check has arrays that cannot be read to their end. An `.npy` file of version 1 starts with eight
# bytes that you can skip, then two for the length of the header (little-endian), then the header.


# %% tags=["check", "hide-cell"]
def check_shapes(shapes: Callable[[Path], dict[str, tuple[int, ...]]]) -> None:
    """Check a function that gives the shapes in an .npz archive from the headers of its arrays alone."""
    expected = {"a": (64, 33), "b/c": (7, 7, 3, 16), "scalar": ()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.npz"
        np.savez(path, **{name: np.ones(shape, np.float32) for name, shape in expected.items()})
        data = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist()[:2]:  # the third is so short that zipfile reads it whole at once
                data[member.header_offset + 30 + len(member.filename) + 20 + member.file_size - 1] ^= 255
        path.write_bytes(data)
        try:
            found = shapes(path)
        except zipfile.BadZipFile:
            raise AssertionError("you read an array to its end; the header is enough") from None
    assert found == expected, f"expected {expected}, found {found}"
    print("check_shapes: correct")


# %% tags=["exercise"]
def my_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Your code here; this one reads everything."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name].shape for name in archive.files}


# check_shapes(my_shapes)


# %% tags=["solution", "hide-input"]
def my_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                file.read(8)
                header = literal_eval(file.read(int.from_bytes(file.read(2), "little")).decode("latin1").strip())
            found[member.filename.removesuffix(".npy")] = header["shape"]
    return found


check_shapes(my_shapes)

# %% [markdown]
# **4. Which ranges are harmless?** A stranger feeds a BiT network $a x + b$ instead of $x$. From the algebra of the
# section on pixels: for which $(a, b)$ are the logits the same, up to the $\epsilon$ of the norms? Mind negative
# $a$, and mind the frame.


# %% tags=["check", "hide-cell"]
def check_harmless(harmless: Callable[[float, float], bool]) -> None:
    """Check a function that says whether a * x + b instead of x leaves the logits of a BiT network alone."""
    cases = {(0.5, 0.0): True, (127.5, 0.0): True, (0.5, 0.5): False, (1.0, -0.1): False, (-1.0, 0.0): False}
    why = {
        (0.5, 0.0): "a factor meets a group norm, which divides it out",
        (127.5, 0.0): "a factor meets a group norm, which divides it out",
        (0.5, 0.5): "the padding is 0, and 0 is no longer mid-grey",
        (1.0, -0.1): "the padding is 0, and 0 is no longer mid-grey",
        (-1.0, 0.0): "the negative of a feature map has another maximum and another ReLU",
    }
    for (a, b), expected in cases.items():
        assert bool(harmless(a, b)) is expected, (
            f"a = {a}, b = {b} is {'' if expected else 'not '}harmless: {why[a, b]}"
        )
    print("check_harmless: correct")


# %% tags=["exercise"]
def my_harmless(a: float, b: float) -> bool:
    """Your code here."""
    return True


# check_harmless(my_harmless)


# %% tags=["solution", "hide-input"]
def my_harmless(a: float, b: float) -> bool:
    return a > 0 and b == 0


check_harmless(my_harmless)

# %% [markdown]
# ## What to remember
#
# - Matching shapes prove nothing: with square kernels, a wrong order of axes loads without a word. Equal outputs
#   from an independent implementation prove a loader.
# - A checkpoint is somebody else's file. Never unpickle it; compare names, shapes and types before reading numbers;
#   change the model only when everything has been checked.
# - The `.npz` files want $[-1, 1]$. Inside the image weight standardization and group norm forgive any other affine
#   range, which is why the mistake goes unnoticed; the padded frame does not.
# - BiT-S and BiT-M were released in six architectures, BiT-L never. BiT-M's head has 21,843 outputs, two more than
#   ImageNet-21k has classes.
# - Save under a temporary name, rename at the end, and keep with the weights what a stranger would ask.
