"""Checkers for the exercises of the chapter 06_pretraining: hand each your own object.

Exported from chapters/06_pretraining.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "check_decay_steps",
    "check_softmax_gradient",
    "check_other_momentum",
    "check_initial_bias",
]

import math

import torch
import torch.nn.functional as F

from bitlib.pretrain import sigmoid_cross_entropy


def check_decay_steps(decay_steps) -> None:
    """decay_steps(epochs, n_images, batch_size) -> the steps, whole numbers."""
    found = decay_steps([30, 60, 80], 1_281_167, 4_096)
    expected = [9_384, 18_767, 25_023]
    assert found is not None, "nothing came back; return the list"
    assert all(isinstance(step, int) for step in found), "steps are whole numbers: int, please"
    assert list(found) == expected, f"for ImageNet at batch 4,096 it should be {expected}, not {list(found)}"
    assert list(decay_steps([1], 1_000, 10)) == [100], "one epoch of 1,000 images is 100 steps of 10"
    print("check_decay_steps: correct")


def check_softmax_gradient(gradient) -> None:
    """gradient(logits, target, a) -> the gradient of the mean smoothed cross-entropy with respect to the logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (6,), generator=generator)
    for a in (0.0, 0.1, 1.0):
        leaf = logits.clone().requires_grad_()
        F.cross_entropy(leaf, target, label_smoothing=a).backward()
        found = gradient(logits, target, a)
        assert found is not None, "nothing came back; return the gradient"
        assert found.shape == logits.shape, f"the gradient has the shape of the logits, {tuple(logits.shape)}"
        if torch.allclose(found, 6 * leaf.grad):
            raise AssertionError("right for each image, but the loss is a mean: divide by the number of images")
        assert torch.allclose(found, leaf.grad), f"wrong for a = {a}; it is (softmax(z) - q) / N, q the smoothed target"
    print("check_softmax_gradient: correct")


def check_other_momentum(step) -> None:
    """step(theta, v, g, lr, mu) -> (theta, v), by v <- mu v - lr g."""
    theta, v = torch.tensor(1.0), torch.tensor(0.0)
    expected_theta, expected_v = 1.0, 0.0
    for t in range(20):
        lr = 0.1 if t < 10 else 0.01
        result = step(theta, v, theta, lr, 0.9)  # the gradient of theta^2 / 2 is theta
        assert isinstance(result, tuple) and len(result) == 2, "return the two new values, (theta, v)"
        theta, v = result
        expected_v = 0.9 * expected_v - lr * expected_theta
        expected_theta = expected_theta + expected_v
        hint = "; the old velocity must keep the rate it came with" if t >= 10 else ""
        assert abs(float(theta) - expected_theta) < 1e-5, f"wrong after step {t + 1}{hint}"
    print("check_other_momentum: correct")


def check_initial_bias(initial_bias) -> None:
    """initial_bias(n_classes) -> the bias at which every sigmoid starts at probability 1 / n_classes."""
    for k in (2, 10, 1_000):
        b = initial_bias(k)
        assert b is not None, "nothing came back; return the bias"
        p = 1 / (1 + math.exp(-float(b)))
        assert abs(p - 1 / k) < 1e-6, f"with {k} classes the bias {float(b):.3f} gives probability {p:.4f}, not {1 / k}"
    logits = torch.full((1, 1_000), float(initial_bias(1_000)))
    loss = sigmoid_cross_entropy(logits, F.one_hot(torch.tensor([0]), 1_000)).item()
    assert abs(loss - (1 + math.log(1_000))) < 0.01
    print("check_initial_bias: correct; the first loss is about 1 + log K instead of K log 2")
