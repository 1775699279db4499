"""Checkers for the exercises of the chapter 04_resnet_v2: hand each your own object.

Exported from chapters/04_resnet_v2.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "check_block_parameters",
    "check_bottleneck",
    "check_stem_pool",
    "check_field_of_stage",
]

import torch
import torch.nn.functional as F
from torch import nn

from bitlib.resnet import BLOCKS, PreActBottleneck, Stem


def check_block_parameters(block_parameters):
    """Check a function (in_channels, out_channels, stride) that counts a PreActBottleneck's parameters."""
    for arguments in ((64, 256, 1), (256, 256, 1), (256, 512, 2), (512, 512, 2), (1024, 2048, 2)):
        answer = block_parameters(*arguments)
        assert answer is not None, "block_parameters returned nothing"
        with torch.device("meta"):
            expected = sum(p.numel() for p in PreActBottleneck(*arguments).parameters())
        assert answer == expected, (
            f"a block with (in_channels, out_channels, stride) = {arguments} has {expected:,} parameters, "
            f"not {answer:,}; each norm has two for every channel, and the projection exists only where it must"
        )
    print("check_block_parameters: correct")


def check_bottleneck(bottleneck):
    """Check a function (block, x) that computes a PreActBottleneck's output from the block's parts."""
    torch.manual_seed(0)
    for arguments in ((8, 16, 1, 4), (16, 16, 1, 4), (16, 32, 2, 4)):
        block, x = PreActBottleneck(*arguments).double(), torch.randn(2, arguments[0], 6, 6, dtype=torch.double)
        for norm in (block.norm1, block.norm2, block.norm3):
            nn.init.normal_(norm.bias)
        answer, expected = bottleneck(block, x), block(x)
        assert answer is not None, "bottleneck returned nothing"
        assert answer.shape == expected.shape, f"the shape is {tuple(expected.shape)}, not {tuple(answer.shape)}"
        if block.proj is not None and not torch.allclose(answer, expected):
            bare = answer - block.proj(x) + block.proj(F.relu(block.norm1(x)))
            assert not torch.allclose(bare, expected), "the projection reads the pre-activated input, not x itself"
        if block.proj is None and not torch.allclose(answer, expected):
            y = F.relu(block.norm1(x))
            assert not torch.allclose(answer - y + x, expected), "the identity shortcut carries x, before the norm"
        assert torch.allclose(answer, expected), f"{block}: the numbers differ; norm, ReLU, convolution, in this order"
    print("check_bottleneck: correct")


def check_stem_pool(stem_pool):
    """Check a function that pads and pools a map as BiT's stem does, without calling F.pad or Stem."""
    torch.manual_seed(0)
    for size in ((6, 6), (7, 5), (1, 4)):
        x = torch.randn(2, 4, *size) - 1
        answer = stem_pool(x)
        assert answer is not None, "stem_pool returned nothing"
        stem = Stem(4)
        stem.conv = nn.Identity()
        expected = stem(x)
        assert answer.shape == expected.shape, (
            f"{size} becomes {tuple(expected.shape[2:])}, not {tuple(answer.shape[2:])}"
        )
        minus_infinity = F.max_pool2d(x, 3, 2, padding=1)
        assert torch.equal(answer, expected) or not torch.equal(answer, minus_infinity), (
            "this pads with minus infinity: at the rim, where zero should win over negative numbers, it does not"
        )
        assert torch.equal(answer, expected), f"the numbers differ for a map of {size}"
    print("check_stem_pool: correct")


def check_field_of_stage(field_of_stage):
    """Check a function (depth, stage) that gives the receptive field of the map after a stage."""
    for depth, blocks in BLOCKS.items():
        for stage in range(1, 5):
            answer = field_of_stage(depth, stage)
            assert answer is not None, "field_of_stage returned nothing"
            expected, jump = 11, 4
            for before, n_blocks in enumerate(blocks[:stage], start=1):
                expected += 2 * jump
                jump *= 1 if before == 1 else 2
                expected += 2 * jump * (n_blocks - 1)
            assert answer == expected, f"after stage {stage} of R{depth} it is {expected} pixels, not {answer}"
    print("check_field_of_stage: correct")
