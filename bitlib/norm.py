"""Group Normalization, derived from its equation.

Exported from chapters/02_group_normalization.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "group_norm",
    "GroupNorm",
]

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _check_groups(num_channels: int, num_groups: int) -> None:
    """Raise ValueError unless num_channels can be split into num_groups groups of equal size."""
    if num_groups < 1 or num_channels < 1:
        raise ValueError(f"channels and groups are counted from 1; got {num_channels} channels, {num_groups} groups")
    if num_channels % num_groups:
        raise ValueError(
            f"{num_channels} channels cannot be split into {num_groups} groups; "
            f"use a multiple of {num_groups} or groups={math.gcd(num_channels, num_groups)}"
        )


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Give each group of channels of each example mean 0 and variance 1, then scale and shift every channel.

    x: (N, C, ...); weight and bias: (C,) or None. Returns the shape of x. ValueError if num_groups does not divide C.
    The equation of Wu and He (2018), line by line; `GroupNorm` computes the same faster.
    """
    _check_groups(x.shape[1], num_groups)
    groups = x.reshape(x.shape[0], num_groups, -1)  # (N, G, m): one row of m numbers per mean
    mu = groups.mean(dim=2, keepdim=True)
    var = (groups - mu).square().mean(dim=2, keepdim=True)  # divides by m, not by m - 1
    y = ((groups - mu) / torch.sqrt(var + eps)).reshape(x.shape)
    per_channel = (1, -1) + (1,) * (x.ndim - 2)  # (C,) seen as (1, C, 1, 1)
    if weight is not None:
        y = y * weight.reshape(per_channel)
    if bias is not None:
        y = y + bias.reshape(per_channel)
    return y


class GroupNorm(nn.Module):
    """Group normalization with a learned scale and shift for every channel.

    Takes (N, C, ...) with C = num_channels and keeps the shape, the dtype and the memory layout.
    The arguments, their order and the names in the state dict are those of torch.nn.GroupNorm.
    Raises ValueError where the groups do not divide the channels, or where the input has other channels.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5):
        super().__init__()
        _check_groups(num_channels, num_groups)
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        self.weight = nn.Parameter(torch.ones(num_channels))  # gamma
        self.bias = nn.Parameter(torch.zeros(num_channels))  # beta

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.num_channels:
            raise ValueError(
                f"this GroupNorm normalises {self.num_channels} channels, so it takes (N, {self.num_channels}, ...); "
                f"got an input of shape {tuple(x.shape)}"
            )
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps:g}"
