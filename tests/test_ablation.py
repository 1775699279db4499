"""The four networks of the norm ablation differ in what they are said to differ in, and in nothing else."""

import norm_ablation
import pytest
import torch
from torch import nn

from bitlib.conv import StdConv2d
from bitlib.norm import GroupNorm
from bitlib.resnet import create_model


def count(model: nn.Module, kind: type) -> int:
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.parametrize("name", norm_ablation.VARIANTS)
def test_a_variant_has_its_norm_and_its_filters(name):
    plain = create_model("R14x0.25", 10)
    model = norm_ablation.variant(name, "R14x0.25", 10)
    norms, filters = count(plain, GroupNorm), count(plain, StdConv2d)
    assert count(model, GroupNorm) == (norms if "GN" in name else 0)
    assert count(model, nn.BatchNorm2d) == (norms if "BN" in name else 0)
    assert count(model, StdConv2d) == (filters if "WS" in name else 0)
    assert count(model, nn.Conv2d) == (0 if "WS" in name else filters)
    shapes = {key: value.shape for key, value in plain.named_parameters()}
    assert {key: value.shape for key, value in model.named_parameters()} == shapes
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def gradient(model: nn.Module, parts: list[torch.Tensor]) -> torch.Tensor:
    """Of a sum over images, worked through in parts, for the first filter."""
    model.double().train()
    for part in parts:
        model(part.double()).sum().backward()
    return model.root.conv.weight.grad


@pytest.mark.parametrize("name", norm_ablation.VARIANTS)
def test_only_batch_normalization_notices_a_batch_in_parts(name):
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for size in (8, 2):
        torch.manual_seed(0)
        model = norm_ablation.variant(name, "R14x0.25", 10)
        nn.init.normal_(model.head.weight, std=0.1)
        found.append(gradient(model, list(images.split(size))))
    assert torch.allclose(*found, rtol=1e-6, atol=1e-9) == ("GN" in name)
