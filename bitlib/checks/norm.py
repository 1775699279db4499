"""Checkers for the exercises of the chapter 02_group_normalization: hand each your own object.

Exported from chapters/02_group_normalization.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "check_group_norm",
    "check_special_cases",
    "check_running_statistics",
    "check_group_norm_backward",
]

import torch
import torch.nn.functional as F
from torch import nn


def _close(a, b) -> bool:
    return isinstance(a, torch.Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def check_group_norm(function) -> None:
    """function(x, num_groups, eps) must normalise each group of channels of each example."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(3, 6, 2, 2, generator=generator) + 1
    got, want = function(x, 3, 1e-5), F.group_norm(x, 3)
    assert isinstance(got, torch.Tensor), f"your function returned {type(got).__name__}; return the normalised tensor"
    assert got.shape == x.shape, f"the output has shape {tuple(got.shape)}; the input has {tuple(x.shape)}"
    m = 8
    mistakes = {
        "your variance divides by m-1; the layer divides by m": want * ((m - 1) / m) ** 0.5,
        "you normalised over the batch as well; a mean belongs to one example": _over_batch(x, 3),
        "your groups are channels 0, 3 / 1, 4 / 2, 5; a group is neighbours, 0, 1 / 2, 3 / 4, 5": _strided(x, 3),
        "you divided by the variance; divide by its root": _by_variance(x, 3),
        "you divided but did not subtract the mean": _uncentred(x, 3),
    }
    for message, mistake in mistakes.items():
        assert not torch.allclose(got, mistake, rtol=1e-4, atol=1e-5), message
    assert _close(got, want), "the values differ from F.group_norm; compare mean and variance of one group by hand"
    small = 1e-3 * x
    got, want = function(small, 3, 1e-5), F.group_norm(small, 3)
    outside = (small * 1e3 - _group_mean(small * 1e3, 3)) / (_group_std(small, 3) + 1e-5) * 1e-3
    assert not torch.allclose(got, outside, rtol=1e-3, atol=1e-4), "your eps is outside the root; it belongs inside"
    assert _close(got, want), "wrong for inputs near zero: does your function use eps, inside the root?"
    big = x + 1000
    assert (function(big, 3, 1e-5) - F.group_norm(big.double(), 3).float()).abs().max() < 1e-2, (
        "wrong for a mean of 1,000: subtract the mean before you square"
    )
    assert _close(function(x[:, :, 0, 0], 3, 1e-5), F.group_norm(x[:, :, 0, 0], 3)), "it should take (N, C) as well"
    print("check_group_norm: correct")


def _group_mean(x, g):
    return x.reshape(x.shape[0], g, -1).mean(2).repeat_interleave(x.shape[1] // g, 1)[:, :, None, None]


def _group_std(x, g):
    return x.reshape(x.shape[0], g, -1).std(2, correction=0).repeat_interleave(x.shape[1] // g, 1)[:, :, None, None]


def _over_batch(x, g):
    rows = x.reshape(x.shape[0], g, -1)
    std = (rows.var((0, 2), correction=0, keepdim=True) + 1e-5).sqrt()
    return ((rows - rows.mean((0, 2), keepdim=True)) / std).reshape(x.shape)


def _strided(x, g):
    order = torch.arange(x.shape[1]).reshape(-1, g).T.flatten()
    return F.group_norm(x[:, order], g)[:, order.argsort()]


def _by_variance(x, g):
    return (x - _group_mean(x, g)) / (_group_std(x, g).square() + 1e-5)


def _uncentred(x, g):
    return x / (_group_std(x, g).square() + 1e-5).sqrt()


def check_special_cases(layer, instance) -> None:
    """layer(x) and instance(x) must be layer norm and instance norm over (C, H, W) and (H, W)."""
    generator = torch.Generator().manual_seed(0)
    for channels in (4, 6):
        x = torch.randn(3, channels, 5, 5, generator=generator) * torch.arange(1.0, channels + 1)[:, None, None]
        wants = {"layer": F.layer_norm(x, x.shape[1:]), "instance": F.instance_norm(x)}
        gots = {"layer": layer(x), "instance": instance(x)}
        swapped = _close(gots["layer"], wants["instance"]) and _close(gots["instance"], wants["layer"])
        assert not swapped, "you have the two the wrong way round: instance norm has as many groups as channels"
        for name, want in wants.items():
            assert gots[name] is not None, f"your {name} norm returned nothing"
            assert _close(gots[name], want), (
                f"your {name} norm is wrong for {channels} channels; how many groups make one mean "
                + ("for all channels?" if name == "layer" else "for each channel?")
            )
    print("check_special_cases: correct")


def check_running_statistics(function) -> None:
    """function(x, mean, var, momentum) must return the new (mean, var) that nn.BatchNorm2d would store."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(2, 4, 2, 2, generator=generator) + 5
    for momentum in (0.1, 0.5):
        layer = nn.BatchNorm2d(4, momentum=momentum)
        mean, var = layer.running_mean.clone(), layer.running_var.clone()
        layer(x)
        got = function(x, mean, var, momentum)
        assert isinstance(got, tuple) and len(got) == 2, "return a pair: the new mean and the new variance"
        assert not _close(got[0], (1 - momentum) * x.mean((0, 2, 3)) + momentum * mean) or momentum == 0.5, (
            "momentum is the share of the new batch, not of the old average (PyTorch's convention)"
        )
        assert _close(got[0], layer.running_mean), "the mean is wrong; average over images, rows and columns"
        biased = (1 - momentum) * var + momentum * x.var((0, 2, 3), correction=0)
        assert not _close(got[1], biased), "your variance divides by m; here, and only here, PyTorch divides by m-1"
        assert _close(got[1], layer.running_var), "the variance is wrong"
    print("check_running_statistics: correct")


def check_group_norm_backward(function) -> None:
    """function(grad_y, x, num_groups) must return the derivative of the loss by x (weight 1, bias 0, eps 1e-5)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64) * 3 + 1
    grad_y = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(F.group_norm(leaf, 2), leaf, grad_y)
    got = function(grad_y, x, 2)
    assert isinstance(got, torch.Tensor) and got.shape == x.shape, "return a tensor of the shape of x"
    rows, grads = got.reshape(2, 2, -1), grad_y.reshape(2, 2, -1)
    s = (x.reshape(2, 2, -1).var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    assert not torch.allclose(rows, grads / s), "you kept only the direct term; x also acts through mean and variance"
    assert not torch.allclose(rows, (grads - grads.mean(2, keepdim=True)) / s), "the part by the variance is missing"
    assert not torch.allclose(got.reshape(2, 2, -1), want.reshape(2, 2, -1) * s), "divide by the standard deviation"
    assert rows.sum(2).abs().max() < 1e-8, "within a group the gradient must sum to 0; yours does not"
    assert torch.allclose(got, want), "the values differ from autograd's"
    print("check_group_norm_backward: correct")
