"""Weight Standardization; standardised convolutions, and folding them away for inference.

Exported from chapters/03_weight_standardization.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "standardize",
    "StdConv2d",
    "fold_weight_standardization",
]

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def standardize(weight: Tensor, eps: float = 1e-10) -> Tensor:
    """Give every filter of a convolution mean 0 and variance 1.

    weight: (out, in, height, width). Returns the same shape, dtype and memory layout.
    The variance is the biased one, and eps sits inside the root, as in BiT's released code.
    Half precision is standardised in float32: in float16, 1e-10 is 0.
    """
    if weight.dtype in (torch.float16, torch.bfloat16):
        return standardize(weight.float(), eps).to(weight.dtype)
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        rows = weight.permute(0, 2, 3, 1)  # the same filters in the order in which they lie in memory
        return F.layer_norm(rows, rows.shape[1:], eps=eps).permute(0, 3, 1, 2)
    return F.layer_norm(weight, weight.shape[1:], eps=eps)


class StdConv2d(nn.Conv2d):
    """A convolution that standardises its filters before it uses them.

    Takes the arguments of nn.Conv2d and keeps its names in the state dict; `weight` is what the optimiser changes,
    `standardize(weight)` what meets the image. eps is BiT's, 1e-10; set the attribute for another (timm: 1e-8).
    """

    eps: float = 1e-10

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardize(self.weight, self.eps), self.bias)


def fold_weight_standardization(model: nn.Module) -> nn.Module:
    """Copy a trained model for inference, with every standardisation done once and for all.

    Each StdConv2d of the copy is a plain nn.Conv2d that holds the standardised filters: the outputs are the same, bit
    for bit, and the work of standardising is gone. The copy is in eval mode and none of its parameters asks for a
    gradient, because it must not be trained: without standardisation its gradients point elsewhere.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for module in folded.modules():
        if isinstance(module, StdConv2d):
            module.weight = nn.Parameter(standardize(module.weight, module.eps), requires_grad=False)
            module.__class__ = nn.Conv2d  # keeps stride, padding, dilation, groups, hooks
            module.__dict__.pop("eps", None)
    return folded
