"""Weight standardization: equal to its equation and to timm's, in every dtype and layout; and folding it away."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import StdConv2d as TimmStdConv2d
from torch import nn

from bitlib.checks import conv as checks
from bitlib.conv import StdConv2d, fold_weight_standardization, standardize
from bitlib.norm import GroupNorm


def as_written(weight, eps=1e-10):
    """The released code of BiT: var_mean with the biased variance, eps inside the root."""
    var, mu = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
    return (weight - mu) / torch.sqrt(var + eps)


weights = st.tuples(st.integers(1, 8), st.integers(2, 8), st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(0, 2**31), st.sampled_from([1e-4, 1.0, 1e3]), st.sampled_from([0.0, 1.0]))
def test_equals_the_equation_forward_and_backward(shape, seed, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    w = scale * (torch.randn(shape, generator=generator, dtype=torch.float64) + shift)
    w.requires_grad_()
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(standardize(w), as_written(w))
    (ours,) = torch.autograd.grad(standardize(w), w, g)
    (theirs,) = torch.autograd.grad(as_written(w), w, g)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8 / scale)


@settings(max_examples=30, deadline=None)
@given(weights, st.integers(0, 2**31), st.floats(0.1, 10), st.floats(-3, 3))
def test_scale_and_mean_of_a_filter_do_not_matter(shape, seed, scale, shift):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if w.flatten(1).var(dim=1, correction=0).min() < 1e-2:
        return  # two nearly equal numbers: eps is not negligible there
    torch.testing.assert_close(standardize(scale * w + shift), standardize(w), rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(weights, st.integers(0, 2**31))
def test_gradient_is_orthogonal_to_the_constant_and_to_the_filter(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad(standardize(w, eps=0.0), w, g)
    scale = grad.flatten(1).norm(dim=1) * w.flatten(1).norm(dim=1) + 1e-12
    bound = 1e-6 * torch.maximum(scale, g.flatten(1).norm(dim=1) / w.flatten(1).var(dim=1).sqrt())
    assert (grad.sum(dim=(1, 2, 3)).abs() <= bound).all()
    assert ((grad * w).sum(dim=(1, 2, 3)).abs() <= bound).all()


def test_gradcheck():
    w = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(standardize, (w,))
    assert torch.autograd.gradgradcheck(standardize, (w,))


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_constant_filter_gives_a_finite_one(value, dtype):
    w = torch.full((2, 3, 3, 3), value, dtype=dtype, requires_grad=True)
    w_hat = standardize(w)
    assert w_hat.abs().max() < 1e-1
    w_hat.float().square().sum().backward()
    assert w.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1e-1])
def test_half_precision_is_standardised_in_float32(dtype, scale):
    w = (scale * torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
    w_hat = standardize(w)
    assert w_hat.dtype == dtype
    assert torch.equal(w_hat, as_written(w.float()).to(dtype)) or torch.allclose(
        w_hat.float(), as_written(w.float()), rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(8, 16, 3, 3), (8, 16, 1, 1), (8, 3, 7, 7), (8, 1, 3, 3)])
def test_memory_layout_is_kept(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        laid_out = w.to(memory_format=memory_format).requires_grad_()
        w_hat = standardize(laid_out)
        assert w_hat.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(w_hat, as_written(w), rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad(w_hat.pow(3).sum(), laid_out)
        plain = w.clone().requires_grad_()
        (want,) = torch.autograd.grad(as_written(plain).pow(3).sum(), plain)
        torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-3)


SETTINGS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": 2, "dilation": 2},
    {"groups": 4},
    {"bias": False},
    {"padding": "same"},
    {"padding": 1, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_layer_is_a_convolution_with_standardised_filters(settings):
    torch.manual_seed(0)
    ours, plain = StdConv2d(8, 16, 3, **settings), nn.Conv2d(8, 16, 3, **settings)
    plain.load_state_dict(ours.state_dict())  # the same names
    with torch.no_grad():
        plain.weight.copy_(as_written(plain.weight))
    x = torch.randn(2, 8, 9, 11)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)
    assert repr(ours) == repr(plain).replace("Conv2d", "StdConv2d")


@pytest.mark.parametrize("eps", [1e-10, 1e-8, 1e-6])
def test_equals_timm_forward_and_backward(eps):
    torch.manual_seed(0)
    ours = StdConv2d(8, 16, 3, stride=2, padding=1, bias=True)
    ours.eps = eps
    theirs = TimmStdConv2d(8, 16, 3, stride=2, padding=1, bias=True, eps=eps)
    theirs.load_state_dict(ours.state_dict())
    x, grad_y = torch.randn(2, 8, 9, 9, requires_grad=True), torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    by_ours = torch.autograd.grad(ours(x), (x, ours.weight, ours.bias), grad_y)
    by_theirs = torch.autograd.grad(theirs(x), (x, theirs.weight, theirs.bias), grad_y)
    torch.testing.assert_close(by_ours, by_theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_layer_in_other_dtypes(dtype):
    torch.manual_seed(0)
    layer, x = StdConv2d(8, 16, 3), torch.randn(2, 8, 9, 9)
    y = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-2, atol=0.5 if dtype != torch.float64 else 1e-4)


def test_autocast_standardises_in_float32(monkeypatch):
    torch.manual_seed(0)
    layer, x = StdConv2d(8, 16, 3), torch.randn(2, 8, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert standardize(layer.weight).dtype == torch.float32
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-2, atol=0.5)
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.isfinite().all()


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        StdConv2d(3, 8, 3, stride=2, padding=1, bias=False),
        GroupNorm(4, 8),
        nn.ReLU(),
        nn.Sequential(StdConv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 1)),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 5),
    )


def test_compile_export_and_deepcopy():
    net, x = small_net(), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    compiled(x).sum().backward()
    assert net[0].weight.grad is not None
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    more = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(exported(more), net(more))
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    assert twin[0].weight.data_ptr() != net[0].weight.data_ptr()


@pytest.mark.slow
def test_compile_with_the_default_backend():
    net, x = small_net(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.compile(net)(x), net(x), rtol=1e-4, atol=1e-4)


# Folding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_folding_changes_no_bit(dtype, memory_format):
    net = small_net().to(dtype).to(memory_format=memory_format).eval()
    x = torch.randn(2, 3, 16, 16, dtype=dtype).to(memory_format=memory_format)
    folded = fold_weight_standardization(net)
    with torch.no_grad():
        assert torch.equal(folded(x), net(x))
    for a, b in zip(folded.parameters(), net.parameters(), strict=True):
        assert a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and a.stride() == b.stride()


def test_folding_under_autocast_changes_no_bit():
    net, x = small_net().eval(), torch.randn(2, 3, 16, 16)
    folded = fold_weight_standardization(net)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(folded(x), net(x))


def test_folding_leaves_the_model_alone_and_gives_plain_convolutions():
    net = small_net().train()
    net[0].eps = 1e-8
    before = copy.deepcopy(net.state_dict())
    folded = fold_weight_standardization(net)
    assert net.training and all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert type(net[0]) is StdConv2d and net[0].eps == 1e-8
    assert not folded.training and not any(module.training for module in folded.modules())
    assert not any(isinstance(module, StdConv2d) for module in folded.modules())
    assert type(folded[0]) is nn.Conv2d and type(folded[3][0]) is nn.Conv2d
    assert not hasattr(folded[0], "eps")
    assert torch.equal(folded[3][1].weight, net[3][1].weight)  # a plain convolution stays what it was
    assert folded.state_dict().keys() == before.keys()


@pytest.mark.parametrize("settings", SETTINGS)
def test_folding_keeps_the_settings_of_a_layer_even_as_the_root(settings):
    layer = StdConv2d(8, 16, 3, **settings).eval()
    folded = fold_weight_standardization(layer)
    assert type(folded) is nn.Conv2d
    assert repr(folded) == repr(nn.Conv2d(8, 16, 3, **settings))
    x = torch.randn(2, 8, 9, 11)
    with torch.no_grad():
        assert torch.equal(folded(x), layer(x))


def test_folding_uses_the_eps_of_each_layer():
    layer = StdConv2d(8, 16, 3)
    layer.eps = 1.0
    torch.testing.assert_close(fold_weight_standardization(layer).weight, as_written(layer.weight, 1.0))


def test_folding_a_layer_or_a_weight_that_is_used_twice():
    shared = StdConv2d(4, 4, 3, padding=1)
    net = nn.ModuleDict({"a": shared, "b": shared, "c": StdConv2d(4, 4, 3, padding=1)}).eval()
    net["c"].weight = shared.weight
    folded, x = fold_weight_standardization(net), torch.randn(1, 4, 5, 5)
    assert folded["a"] is folded["b"]
    with torch.no_grad():
        for name in net:
            assert torch.equal(folded[name](x), net[name](x))


def test_folding_twice_and_folding_nothing():
    net, x = small_net().eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(fold_weight_standardization(fold_weight_standardization(net))(x), net(x))
    assert isinstance(fold_weight_standardization(nn.Linear(2, 2)), nn.Linear)


def test_training_a_folded_network_is_an_error():
    folded = fold_weight_standardization(small_net())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        folded(torch.randn(2, 3, 16, 16)).sum().backward()


def test_a_step_in_the_folded_network_is_another_step():
    torch.manual_seed(0)
    layer, x, target = StdConv2d(4, 4, 3).double(), torch.randn(2, 4, 6, 6).double(), torch.randn(2, 4, 4, 4).double()
    folded = fold_weight_standardization(layer).requires_grad_(True)
    for module in (layer, folded):
        F.mse_loss(module(x), target).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.sub_(1e-2 * parameter.grad)
    assert not torch.allclose(standardize(layer.weight), folded.weight, rtol=1e-3, atol=1e-3)
    assert standardize(layer.weight).mean(dim=(1, 2, 3)).abs().max() < 1e-12
    assert folded.weight.mean(dim=(1, 2, 3)).abs().max() > 1e-6


# The checkers of the exercises


def _correct_backward(g, w, eps):
    w = w.clone().requires_grad_()
    return torch.autograd.grad(as_written(w, eps), w, g)[0]


def _once(weight, standardize, losses):
    w_hat = standardize(weight)
    leaf = w_hat.detach().requires_grad_()
    (sum(f(leaf) for f in losses) / len(losses)).backward()
    return torch.autograd.grad(w_hat, weight, leaf.grad)[0]


def test_checkers_accept_what_is_right(capsys):
    checks.check_standardize(as_written)
    checks.check_unbiased_factor(lambda conv: (1 - 1 / conv.weight[0].numel()) ** 0.5)
    checks.check_standardize_backward(_correct_backward)
    checks.check_accumulated_gradient(_once)
    assert capsys.readouterr().out.count("correct") == 4


def _normalised(w, dims, correction=0):
    return (w - w.mean(dims, keepdim=True)) / w.std(dims, correction=correction, keepdim=True)


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        ("check_standardize", lambda w: None, "returned NoneType"),
        ("check_standardize", lambda w: w[0], "has shape"),
        ("check_standardize", lambda w: w, "the values differ"),
        ("check_standardize", lambda w: _normalised(w, (1, 2, 3), 1), "divides by m-1"),
        ("check_standardize", lambda w: _normalised(w, (0, 1, 2, 3)), "one mean for all filters"),
        ("check_standardize", lambda w: _normalised(w, (0, 2, 3)), "every input channel"),
        ("check_standardize", lambda w: _normalised(w, (2, 3)), "every map of a filter"),
        ("check_standardize", lambda w: w - w.mean((1, 2, 3), keepdim=True), "did not divide"),
        ("check_standardize", lambda w: as_written(w, 1e-8), "eps is 1e-10"),
        ("check_standardize", lambda w: _normalised(w, (1, 2, 3)), "eps is 1e-10"),
        ("check_unbiased_factor", lambda c: 1 - 1 / c.weight[0].numel(), "ratio of the variances"),
        ("check_unbiased_factor", lambda c: (1 - 1 / c.weight[0].numel()) ** -0.5, "upside down"),
        (
            "check_unbiased_factor",
            lambda c: (1 - 1 / (c.in_channels * c.kernel_size[0] * c.kernel_size[1])) ** 0.5,
            re.escape("in_channels / groups"),
        ),
        ("check_standardize_backward", lambda g, w, eps: g, "sum to 0"),
        (
            "check_standardize_backward",
            lambda g, w, eps: g / (w.var((1, 2, 3), correction=0, keepdim=True) + eps).sqrt(),
            "only the direct term",
        ),
        ("check_standardize_backward", lambda g, w, eps: _correct_backward(g, w, 1e-10), "is eps in your deviation"),
        (
            "check_accumulated_gradient",
            lambda w, s, losses: torch.autograd.grad(sum(f(s(w)) for f in losses), w)[0],
            "you standardised 4 times",
        ),
        ("check_accumulated_gradient", lambda w, s, losses: len(losses) * _once(w, s, losses), "gradient of the sum"),
        ("check_accumulated_gradient", lambda w, s, losses: s(w).detach(), "did you carry the gradient"),
    ],
)
def test_checkers_name_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError, match=message):
        getattr(checks, check)(wrong)
