"""Checkers for the exercises of the chapter 07_hyperrule: hand each your own object.

Exported from chapters/07_hyperrule.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "check_small_lr",
    "check_path_length",
    "check_mixup_loss",
]

from dataclasses import replace

import torch
import torch.nn.functional as F

from bitlib.hyperrule import hyperrule, mixup


def check_small_lr(small_lr):
    """Check a function of the step that gives the released code's rate for a small task."""
    rule = hyperrule(1, 32, variant="official")
    for step in (0, 1, 50, 99, 100, 200, 201, 300, 301, 400, 401, 499):
        answer, expected = small_lr(step), rule.lr(step)
        assert answer is not None, f"small_lr({step}) returned nothing"
        assert abs(answer - expected) < 1e-12, (
            f"at step {step} the released code uses {expected:g}, small_lr gives {answer:g}"
        )
    print("check_small_lr: correct")


def check_path_length(path_length):
    """Check a function of (steps, base_lr) that sums the paper's staircase over a run."""
    for n, base_lr in ((10, 0.003), (50_000, 0.003), (1_000_000, 0.003), (10, 0.1)):
        rule = replace(hyperrule(n, 32), base_lr=base_lr)
        expected = sum(rule.lr(step) for step in range(rule.steps))
        answer = path_length(rule.steps, rule.base_lr)
        assert answer is not None, "path_length returned nothing"
        assert abs(answer - expected) < 1e-9 * rule.steps, (
            f"{rule.steps} steps of base rate {rule.base_lr} add up to {expected:.5f}, not {answer:.5f}"
        )
    print("check_path_length: correct")


def check_mixup_loss(mixup_loss):
    """Check a function (logits, labels, lam, permutation) that uses class numbers and no one-hot vectors."""
    generator = torch.Generator().manual_seed(1)
    for lam in (0.0, 0.3, 1.0):
        logits = torch.randn(6, 4, generator=generator)
        labels = torch.tensor([0, 1, 2, 3, 0, 1])
        permutation = torch.randperm(6, generator=generator)
        _, soft = mixup(torch.zeros(6, 1), F.one_hot(labels, 4).float(), lam, permutation)
        answer = mixup_loss(logits, labels, lam, permutation)
        assert answer is not None, "mixup_loss returned nothing"
        expected = F.cross_entropy(logits, soft)
        assert torch.allclose(torch.as_tensor(answer), expected, atol=1e-5), (
            f"with lambda {lam} the loss is {expected:.4f}, not {float(answer):.4f}; which labels go with 1 - lambda?"
        )
    print("check_mixup_loss: correct")
