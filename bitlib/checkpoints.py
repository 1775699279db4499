"""Checkpoints: official .npz, timm and transformers weights, safetensors; load_pretrained.

Exported from chapters/05_checkpoints.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "CheckpointError",
    "CheckpointNotFoundError",
    "official_name",
    "from_official_name",
    "from_hwio",
    "to_hwio",
    "timm_name",
    "huggingface_name",
    "from_timm_name",
    "to_timm",
    "to_huggingface",
    "convert_timm",
    "load_weights",
    "load_npz",
    "save_npz",
    "save_checkpoint",
    "load_checkpoint",
    "read_metadata",
    "checkpoint_card",
    "OFFICIAL_NAMES",
    "HUGGINGFACE_NAMES",
    "MINI_NAMES",
    "cache_dir",
    "checkpoint_url",
    "download",
    "load_pretrained",
]

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


def _evaluation_size(name: str) -> int:
    """The resolution at which timm evaluates a released checkpoint; BiT's own depends on the task."""
    if name.endswith("-ILSVRC2012") or name.endswith(".goog_in21k_ft_in1k"):
        return 480 if "152x4" in name else 448
    return 384 if name.endswith("_384") else 224
