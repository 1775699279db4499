"""Checkers for the exercises of the chapter 05_checkpoints: hand each your own object.

Exported from chapters/05_checkpoints.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "check_to_oihw",
    "check_our_names",
    "check_shapes",
    "check_harmless",
]

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitlib.checkpoints import from_hwio, from_official_name


def check_to_oihw(to_oihw: Callable[[Tensor], Tensor]) -> None:
    """Check a function that takes a kernel from HWIO to OIHW."""
    kernel = torch.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    found = to_oihw(kernel)
    assert isinstance(found, Tensor), f"a tensor is wanted, not {type(found).__name__}"
    assert found.shape == (5, 4, 2, 3), f"a (2, 3, 4, 5) kernel must become (5, 4, 2, 3); yours is {tuple(found.shape)}"
    expected = from_hwio("root.conv.weight", kernel)
    assert torch.equal(found, expected), "the shape is right and the numbers are not: a reshape is not a permutation"
    print("check_to_oihw: correct")


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
