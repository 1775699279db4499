"""Checkers for the exercises of the chapter 09_evaluation: hand each your own object.

Exported from chapters/09_evaluation.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "check_pessimistic_topk",
    "check_right_closed_ece",
    "check_leave_one_out_errors",
    "check_bootstrap_any",
]

from collections.abc import Callable

import torch
from torch import Tensor

from bitlib.evaluate import ridge_primal, topk_accuracy


def check_pessimistic_topk(function: Callable) -> None:
    """Check a top-k accuracy that counts ties against the classifier."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (200,), generator=generator)
    distinct = torch.rand(200, 6, generator=generator)
    for k in (1, 3, 6):
        got, expected = float(function(distinct, labels, k)), topk_accuracy(distinct, labels, k)
        assert abs(got - expected) < 1e-6, f"without ties, top-{k} should be {expected:.4f}, not {got:.4f}"
    zeros = float(function(torch.zeros(200, 6), labels, 5))
    assert zeros == 0, f"a head of zeros ties with everything, so its top-5 of 6 should be 0, not {zeros:.4f}"
    assert float(function(torch.zeros(200, 6), labels, 6)) == 1, "all K classes always contain the true one"
    pair, first = torch.tensor([[2.0, 2.0, 1.0]] * 2), torch.tensor([0, 1])
    assert float(function(pair, first, 1)) == 0, "two equal logits at the top: neither class is alone in first place"
    assert float(function(pair, first, 2)) == 1, "two equal logits at the top are both among the first two"
    print("check_pessimistic_topk: correct")


def check_right_closed_ece(function: Callable) -> None:
    """Check an expected calibration error whose bins are closed on the right, as Guo et al. define them."""
    at_one = float(function(torch.tensor([1.0, 0.95]).double(), torch.tensor([False, True]), 10))
    assert abs(at_one - 0.475) < 1e-6, (
        "1.0 and 0.95 share the last of ten bins, with accuracy 0.5 and mean confidence 0.975: "
        f"ECE 0.475, not {at_one:.4f}"
    )
    edge = float(function(torch.tensor([0.5, 0.4, 0.6]).double(), torch.tensor([True, False, True]), 2))
    assert abs(edge - 1 / 6) < 1e-6, (
        f"of two bins, 0.5 belongs to the lower; with 0.4 there and 0.6 above, the ECE is 0.1667, not {edge:.4f}"
    )
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator, dtype=torch.float64)
    correct = torch.rand(500, generator=generator, dtype=torch.float64) < 0.5  # too sure above, not enough below
    expected = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        expected += (correct[inside].double().sum() - confidence[inside].sum()).abs().item() / 500
    got = float(function(confidence, correct, 15))
    assert abs(got - expected) < 1e-9, f"on 500 random predictions the ECE is {expected:.6f}, not {got:.6f}"
    print("check_right_closed_ece: correct")


def check_leave_one_out_errors(function: Callable[..., Tensor]) -> None:
    """Check the leave-one-out residuals of ridge regression (without intercept) against n separate fits."""
    generator = torch.Generator().manual_seed(0)
    for n, d in ((12, 4), (8, 20)):
        z = torch.randn(n, d, generator=generator, dtype=torch.float64)
        y = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        others = [torch.arange(n) != i for i in range(n)]
        expected = torch.stack([y[i] - z[i] @ ridge_primal(z[keep], y[keep], 0.7) for i, keep in enumerate(others)])
        got = function(z, y, 0.7)
        assert got.shape == y.shape, f"the errors should have the shape of y, {tuple(y.shape)}, not {tuple(got.shape)}"
        worst = (got - expected).abs().max().item()
        assert worst < 1e-8, (
            f"for n = {n}, d = {d} an error differs by {worst:.3g} from that of a fit without its example"
        )
    print("check_leave_one_out_errors: correct")


def check_bootstrap_any(function: Callable) -> None:
    """Check a percentile bootstrap for any statistic of (logits, labels)."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(400, 3, generator=generator), torch.randint(3, (400,), generator=generator)
    logits[range(400), labels] += 2  # well above chance, which is all that logits and labels drawn apart would give
    low, high = (float(end) for end in function(topk_accuracy, logits, labels, 2000, 0))
    share = topk_accuracy(logits, labels)
    half = 1.96 * (share * (1 - share) / 400) ** 0.5
    assert low < share < high, (
        f"the interval {low:.3f} to {high:.3f} should hold the sample's own accuracy {share:.3f}; "
        "the same draw of indices serves logits and labels"
    )
    assert abs((high - low) / (2 * half) - 1) < 0.15, (
        f"for an accuracy of {share:.3f} on 400 examples the width should be near {2 * half:.3f}, "
        f"not {high - low:.3f}; "
        "draw as many examples as there are, with replacement, logits and labels together"
    )
    # of the mean logit, which takes any value: shares of 400 coincide by chance
    once, again = (tuple(map(float, function(lambda z, y: z.mean().item(), logits, labels, 100, 0))) for _ in range(2))
    assert once == again, "the same seed should give the same interval; use a torch.Generator"
    print("check_bootstrap_any: correct")
