"""Checkers for the exercises of the chapter 03_weight_standardization: hand each your own object.

Exported from chapters/03_weight_standardization.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "check_standardize",
    "check_unbiased_factor",
    "check_standardize_backward",
    "check_accumulated_gradient",
]

import torch
import torch.nn.functional as F


def _filters(shape=(5, 4, 3, 3), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    strength = torch.tensor([1.0, 0.1, 0.01, 3.0, 0.5], dtype=dtype).reshape(-1, 1, 1, 1)
    return strength * torch.randn(shape, generator=generator, dtype=dtype) + 0.2 * strength


def check_standardize(function) -> None:
    """function(weight) must give every filter of (out, in, h, w) mean 0 and biased variance 1 (eps 1e-10, inside)."""
    w = _filters()
    got, want = function(w), F.layer_norm(w, w.shape[1:], eps=1e-10)
    assert isinstance(got, torch.Tensor), f"your function returned {type(got).__name__}; return the new weights"
    assert got.shape == w.shape, f"the result has shape {tuple(got.shape)}; the weights have {tuple(w.shape)}"
    every, each_input = (0, 1, 2, 3), (0, 2, 3)
    mistakes = {
        "your variance divides by m-1; BiT divides by m (correction=0)": _by_hand(w, (1, 2, 3), correction=1),
        "one mean for all filters; every filter needs its own": _by_hand(w, every),
        "a mean for every input channel; a filter is one slice along the first dimension": _by_hand(w, each_input),
        "a mean for every map of a filter; take the mean over the input channels too": _by_hand(w, (2, 3)),
        "you divided but did not subtract the mean": w / w.std((1, 2, 3), correction=0, keepdim=True),
        "you subtracted the mean but did not divide": w - w.mean((1, 2, 3), keepdim=True),
        "you divided by the variance; divide by its root": (w - w.mean((1, 2, 3), keepdim=True))
        / w.var((1, 2, 3), correction=0, keepdim=True),
    }
    for message, mistake in mistakes.items():
        assert not torch.allclose(got, mistake, rtol=1e-4, atol=1e-5), message
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5), "the values differ; look at mean and variance of one filter"
    tiny = (_filters(dtype=torch.float64)) * 1e-5
    want = F.layer_norm(tiny, tiny.shape[1:], eps=1e-10)
    assert torch.allclose(function(tiny), want, rtol=1e-4), "wrong for tiny filters: eps is 1e-10, inside the root"
    print("check_standardize: correct")


def _by_hand(w, dims, correction=0):
    return (w - w.mean(dims, keepdim=True)) / w.std(dims, correction=correction, keepdim=True)


def check_unbiased_factor(function) -> None:
    """function(conv) must give the factor by which the unbiased variance shrinks the filters of an nn.Conv2d."""
    for conv in (
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.Conv2d(16, 8, 1),
        torch.nn.Conv2d(8, 8, (3, 5)),
        torch.nn.Conv2d(8, 8, 3, groups=4),
    ):
        w = conv.weight.detach().double()
        want = (w / w.std((1, 2, 3), keepdim=True) * w.std((1, 2, 3), correction=0, keepdim=True) / w).mean().item()
        got = function(conv)
        assert not abs(got - want**2) < 1e-6, "that is the ratio of the variances; the filter is divided by a deviation"
        assert not abs(got * want - 1) < 1e-6, "upside down: a larger variance makes a smaller filter"
        hint = " (with groups, a filter sees in_channels / groups channels)" if conv.groups > 1 else ""
        assert abs(got - want) < 1e-6, f"for {conv} the factor is {want:.4f}, you have {got:.4f}{hint}"
    print("check_unbiased_factor: correct")


def check_standardize_backward(function) -> None:
    """function(g, weight, eps) must turn the derivative by the standardised weights into that by the weights."""
    w = _filters(dtype=torch.float64).requires_grad_()
    g = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (want,) = torch.autograd.grad(F.layer_norm(w, w.shape[1:], eps=1e-5), w, g)
    got = function(g, w.detach(), 1e-5)
    assert isinstance(got, torch.Tensor) and got.shape == w.shape, "return a tensor of the shape of the weights"
    s = (w.detach().var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    assert not torch.allclose(got, g / s), "you kept only the direct term; W also acts through mean and deviation"
    assert got.sum((1, 2, 3)).abs().max() < 1e-8, "the gradient of a filter must sum to 0; yours does not"
    assert not torch.allclose(got, (g - g.mean((1, 2, 3), keepdim=True)) / s), "take off the part along the filter too"
    assert not torch.allclose(got, want * s), "the division by the deviation is missing"
    assert torch.allclose(got, want), "the values differ from autograd's; is eps in your deviation?"
    print("check_standardize_backward: correct")


def check_accumulated_gradient(function) -> None:
    """function(weight, standardize, losses) must give the gradient of the mean loss, standardising only once."""
    weight, calls = _filters().requires_grad_(), []
    targets = [torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    losses = [lambda w, t=t: (w - t).pow(4).mean() for t in targets]

    def counted(w):
        calls.append(1)
        return F.layer_norm(w, w.shape[1:], eps=1e-10)

    (want,) = torch.autograd.grad(sum(f(counted(weight)) for f in losses) / 4, weight)
    calls.clear()
    got = function(weight, counted, losses)
    assert len(calls) > 0, "call the standardize that you are given"
    assert len(calls) == 1, f"you standardised {len(calls)} times; the weights do not change between micro-batches"
    assert isinstance(got, torch.Tensor) and got.shape == weight.shape, "return a tensor of the shape of the weights"
    assert not torch.allclose(got, 4 * want, rtol=1e-4), "that is the gradient of the sum; divide by how many losses"
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-7), (
        "the gradient is wrong; did you carry the gradient by the standardised weights back through standardize?"
    )
    print("check_accumulated_gradient: correct")
