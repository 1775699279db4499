"""Group normalization: equal to PyTorch's, in every shape, dtype and layout that the book uses."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitlib.checks import norm as checks
from bitlib.norm import GroupNorm, group_norm


@st.composite
def shapes(draw):
    """(groups, shape of the input) with at least two numbers in a group."""
    groups, per_group = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    spatial = draw(st.lists(st.integers(1, 6), min_size=0, max_size=3))
    if per_group == 1 and all(size == 1 for size in spatial):
        spatial = [2, *spatial]
    return groups, (draw(st.integers(1, 4)), groups * per_group, *spatial)


def randomised(groups, channels):
    layer = GroupNorm(groups, channels)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(0, 2**31), st.sampled_from([1e-5, 1e-3]))
def test_equals_pytorch_forward_and_backward(shape, seed, eps):
    groups, size = shape
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(size, generator=generator, dtype=torch.float64) * 3 + 1).requires_grad_()
    weight, bias = (torch.randn(size[1], generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    grad_y = torch.randn(size, generator=generator, dtype=torch.float64)
    ours, theirs = group_norm(x, groups, weight, bias, eps), F.group_norm(x, groups, weight, bias, eps)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (x, weight, bias), grad_y),
        torch.autograd.grad(theirs, (x, weight, bias), grad_y),
        rtol=1e-6,
        atol=1e-8,
    )


@settings(max_examples=30, deadline=None)
@given(shapes(), st.integers(0, 2**31))
def test_layer_equals_the_derived_form(shape, seed):
    groups, size = shape
    torch.manual_seed(seed)
    layer, x = randomised(groups, size[1]), torch.randn(size)
    torch.testing.assert_close(
        layer(x), group_norm(x, groups, layer.weight, layer.bias, layer.eps), rtol=1e-4, atol=1e-4
    )


@settings(max_examples=30, deadline=None)
@given(shapes(), st.integers(0, 2**31))
def test_an_example_does_not_feel_its_company(shape, seed):
    groups, size = shape
    torch.manual_seed(seed)
    x = torch.randn(size)
    together = group_norm(x, groups)
    for index in range(size[0]):
        torch.testing.assert_close(group_norm(x[index : index + 1], groups)[0], together[index])


def test_gradcheck():
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, 3, w, b), (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda x: group_norm(x, 3), (x,))


def test_weight_and_bias_are_each_optional():
    x, weight = torch.randn(2, 4, 3, 3), torch.randn(4)
    torch.testing.assert_close(group_norm(x, 2, weight), F.group_norm(x, 2, weight))
    torch.testing.assert_close(group_norm(x, 2, bias=weight), F.group_norm(x, 2, None, weight))


@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_large_means_cost_digits_only_in_proportion(mean):
    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0)) + mean
    truth = F.group_norm(x.double(), 32).float()
    for candidate in (group_norm(x, 32), GroupNorm(32, 64)(x)):
        assert (candidate - truth).abs().max() < 1e-6 * mean  # the short cut E[x²]-E[x]² is off by over 1 at 1e4


def test_state_dict_is_that_of_pytorch():
    ours, theirs = randomised(4, 16), nn.GroupNorm(4, 16)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(ours(x), theirs(x))
    back = GroupNorm(4, 16)
    back.load_state_dict(theirs.state_dict())
    assert torch.equal(back(x), ours(x))
    assert ours.eps == theirs.eps == 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    layer, x = randomised(4, 16), torch.randn(2, 16, 5, 5)
    y = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(y.float(), layer(x), rtol=tolerance, atol=tolerance)


def test_autocast_with_bfloat16_activations():
    layer, x = randomised(4, 16), torch.randn(2, 16, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-2, atol=5e-2)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_channels_last_stays_channels_last():
    layer = randomised(4, 16)
    x = torch.randn(2, 16, 5, 5)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    y = layer(last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)


def test_compile_export_and_deepcopy():
    layer, x = randomised(4, 16), torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    more = torch.randn(5, 16, 5, 5)
    torch.testing.assert_close(exported(more), layer(more))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.zero_()
    assert layer.weight.abs().max() > 0


def test_prints_well():
    assert repr(GroupNorm(32, 64)) == "GroupNorm(32, 64, eps=1e-05)"


@pytest.mark.parametrize(
    ("groups", "channels", "message"),
    [
        (32, 48, "48 channels cannot be split into 32 groups; use a multiple of 32 or groups=16"),
        (32, 7, "7 channels cannot be split into 32 groups; use a multiple of 32 or groups=1"),
        (0, 8, "counted from 1; got 8 channels, 0 groups"),
        (-2, 8, "counted from 1; got 8 channels, -2 groups"),
        (4, 0, "counted from 1; got 0 channels, 4 groups"),
    ],
)
def test_groups_that_do_not_divide(groups, channels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GroupNorm(groups, channels)
    if channels:
        with pytest.raises(ValueError, match=re.escape(message)):
            group_norm(torch.randn(2, channels, 3), groups)


@pytest.mark.parametrize("shape", [(16,), (2, 8, 5, 5), (16, 5, 5)])
def test_input_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match=re.escape(f"takes (N, 16, ...); got an input of shape {shape}")):
        GroupNorm(4, 16)(torch.randn(shape))


# The checkers of the exercises


def test_checkers_accept_what_is_right(capsys):
    checks.check_group_norm(lambda x, groups, eps: F.group_norm(x, groups, eps=eps))
    checks.check_special_cases(lambda x: F.layer_norm(x, x.shape[1:]), F.instance_norm)
    checks.check_running_statistics(_running_statistics)
    checks.check_group_norm_backward(_backward)
    assert capsys.readouterr().out.count("correct") == 4


def _running_statistics(x, mean, var, momentum, correction=1):
    new_mean, new_var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=correction)
    return (1 - momentum) * mean + momentum * new_mean, (1 - momentum) * var + momentum * new_var


def _backward(grad_y, x, groups):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.group_norm(x, groups), x, grad_y)[0]


def _rows(x, groups):
    return x.reshape(len(x), groups, -1)


def _with(x, groups, eps, correction=0, outside=False):
    rows = _rows(x, groups)
    var = rows.var(2, correction=correction, keepdim=True)
    std = var.sqrt() + eps if outside else (var + eps).sqrt()
    return ((rows - rows.mean(2, keepdim=True)) / std).reshape(x.shape)


def _short_cut(x, groups, eps):
    rows = _rows(x, groups)
    mu = rows.mean(2, keepdim=True)
    var = (rows.square().mean(2, keepdim=True) - mu.square()).clamp(min=0)
    return ((rows - mu) / (var + eps).sqrt()).reshape(x.shape)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, g, e: None, "returned NoneType"),
        (lambda x, g, e: _rows(x, g), "has shape"),
        (lambda x, g, e: x, "differ from F.group_norm"),
        (lambda x, g, e: _with(x, g, e, correction=1), "divides by m-1"),
        (lambda x, g, e: _with(x, g, e, outside=True), "eps is outside the root"),
        (lambda x, g, e: _with(x, g, 0.0), "near zero"),
        (_short_cut, "subtract the mean before you square"),
    ],
)
def test_check_group_norm_names_the_mistake(wrong, message):
    with pytest.raises(AssertionError, match=message):
        checks.check_group_norm(wrong)


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        ("check_special_cases", (F.instance_norm, lambda x: F.layer_norm(x, x.shape[1:])), "wrong way round"),
        ("check_special_cases", (lambda x: x, F.instance_norm), "your layer norm is wrong"),
        (
            "check_special_cases",
            (lambda x: F.layer_norm(x, x.shape[1:]), lambda x: F.group_norm(x, 2)),
            "your instance norm is wrong",
        ),
        ("check_running_statistics", (lambda *a: _running_statistics(*a, correction=0),), "PyTorch divides by m-1"),
        (
            "check_running_statistics",
            (lambda x, m, v, a: _running_statistics(x, m, v, 1 - a),),
            "momentum is the share of the new batch",
        ),
        ("check_running_statistics", (lambda x, m, v, a: m,), "return a pair"),
        ("check_running_statistics", (lambda x, m, v, a: (m, v),), "the mean is wrong"),
        ("check_group_norm_backward", (lambda g, x, n: g,), "sum to 0"),
        (
            "check_group_norm_backward",
            (
                lambda g, x, n: (_rows(g, n) / (_rows(x, n).var(2, correction=0, keepdim=True) + 1e-5).sqrt()).view_as(
                    x
                ),
            ),
            "only the direct term",
        ),
        ("check_group_norm_backward", (lambda g, x, n: 2 * _backward(g, x, n),), "differ from autograd"),
    ],
)
def test_other_checkers_name_the_mistake(check, arguments, message):
    with pytest.raises(AssertionError, match=message):
        getattr(checks, check)(*arguments)
