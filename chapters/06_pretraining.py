# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   bitlib:
#     module: pretrain
#     summary: "Upstream pre-training: SGD with momentum, schedules, losses, and a training loop that survives."
#     entry: main
# ---

# %% [markdown]
# # Pre-training
#
# At the end of this chapter we have what the release of BiT left out: the code that pre-trains. (Its authors later
# published configurations for it in another repository {cite}`bigvision_code`, which differ from the paper; the box at
# the end says where.) `train` is one loop that can be killed at any moment and goes on as if nothing had happened;
# `pretrain` puts GlyphNet and a network into it; and a small network will have learned, on this page, to read a hundred
# characters.
#
# **Runtime:** about a minute on two CPU cores.
#
# **Builds on:** the data chapter (GlyphNet), the ResNet-v2 chapter, and the checkpoints chapter.

# %% tags=["setup", "remove-cell"]
# Does nothing outside Colab; there it installs the book's package and what the chapters need.
import sys

if "google.colab" in sys.modules:
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", 'install -q "bitlib[book] @ git+https://github.com/OWNER/REPOSITORY"')

# %% tags=["export"]
import argparse
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bitlib.checkpoints import load_pretrained, save_checkpoint
from bitlib.data import GlyphNet, cut_and_resize, normalize, resized_crop_boxes
from bitlib.resnet import ResNetV2, create_model

# %%
import subprocess
import tempfile

import matplotlib.pyplot as plt
from safetensors.torch import load_file

import bitlib
from bitlib.conv import StdConv2d
from bitlib.data import LabelGroup, random_resized_crop, shipped_file

plt.style.use(shipped_file("book.mplstyle"))

# %% [markdown]
# ## The problem: a valley
#
# A loss is seldom a round bowl. In some directions it is steep, in others nearly flat. The simplest such landscape has
# two weights,
#
# $$ L(\theta) = \tfrac12 \left( h_1 \theta_1^2 + h_2 \theta_2^2 \right), \qquad h_1 = 1, \quad h_2 = \tfrac{1}{300}. $$
#
# Gradient descent multiplies $\theta_i$ by $1 - \eta h_i$ at each step. In the steep direction this grows as soon as
# $\eta h_1 > 2$, so the rate is limited by $h_1$; and with that rate the flat direction hardly moves. The best
# compromise is $\eta = 2 / (h_1 + h_2)$, where both directions shrink equally fast.
#
# **Before you run it:** by what factor does the loss fall in 200 steps at that best rate? And what changes if each step
# also keeps nine tenths of the step before?

# %%
h = torch.tensor([1.0, 1 / 300], dtype=torch.float64)
eta = 2 / h.sum()


def descend(momentum, steps=200):
    theta, v, losses = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), []
    for _ in range(steps):
        losses.append(0.5 * (h * theta.square()).sum().item())
        v = momentum * v + h * theta  # h * theta is the gradient
        theta = theta - eta * v
    return losses


plain, heavy = descend(0.0), descend(0.9)
print(
    f"after 200 steps the loss is {plain[-1] / plain[0]:.2f} of the first without momentum, {heavy[-1] / heavy[0]:.0e} with"
)
assert plain[-1] > 0.05 * plain[0] and heavy[-1] < 1e-6 * heavy[0]

# %% tags=["hide-input"] mystnb={"image": {"alt": "Loss against step on a logarithmic axis, in a valley 300 times steeper across than along. Gradient descent falls along a straight line by about a factor of ten in 200 steps. With momentum 0.9 at the same learning rate the loss falls by about nine powers of ten, wavering as it goes."}}
figure, axes = plt.subplots()
axes.semilogy(plain, label="gradient descent at its best rate")
axes.semilogy(heavy, "--", label="the same rate, momentum 0.9")
axes.set_xlabel("step")
axes.set_ylabel("loss")
axes.legend()
plt.show()

# %% [markdown]
# Momentum makes the difference between a crawl and a run, and costs one more number per weight. The rest of the chapter
# is about spending it well: how large the rate may be, when, for which batch, on which loss, and how not to lose a
# month of it when the power fails.
#
# ## Stochastic gradient descent
#
# Near $\theta$ the loss is $L(\theta + d) \approx L(\theta) + g^\top d$ with the gradient $g$. This knows no bounds, so
# we pay for long steps and minimise $g^\top d + \lVert d \rVert^2 / 2\eta$. Setting the derivative $g + d / \eta$ to
# zero gives the step $d = -\eta g$. The learning rate $\eta$ says how far we trust the approximation.
#
# We never see $g$ itself, only its mean over a batch of $B$ images drawn at random. That mean is right on average, and
# its variance is $1/B$ of a single image's. *Stochastic* gradient descent takes it for the gradient.
#
# Momentum replaces the gradient by a sum of all past gradients that fades by $\mu$ a step:
#
# $$ v_{t+1} = \mu v_t + g_t, \qquad \theta_{t+1} = \theta_t - \eta v_{t+1},
#    \qquad\text{so}\quad v_{t+1} = \sum_{k \ge 0} \mu^k g_{t-k}. $$ (eq-sgd)
#
# Where gradients agree from step to step, $v$ grows to $g / (1 - \mu)$: with $\mu = 0.9$ ten gradients strong. Where
# they flip their sign, as across the valley, they cancel. So the flat direction is hurried and the steep one is not.
# The method is Polyak's; it became standard in deep learning once it was shown how much it matters together with a
# good start {cite}`sutskever2013importance`. BiT trains with it throughout, upstream and downstream, $\mu = 0.9$
# {cite}`kolesnikov2020big`.
#
# One more term. *Weight decay* adds $\frac{\lambda}{2} \lVert \theta \rVert^2$ to the loss. Its gradient is
# $\lambda \theta$, so all we need is $g_t \leftarrow g_t + \lambda \theta_t$ before {eq}`eq-sgd`.


# %% tags=["export"]
class SGD:
    """Stochastic gradient descent with momentum: equal to torch.optim.SGD, step by step.

    Weight decay is L2: lambda * theta joins the gradient before the momentum does. A parameter whose gradient is
    None is left alone. The rate is read at each step from the attribute `lr`, which a schedule sets.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float = 0.0, momentum: float = 0.9, weight_decay: float = 0.0):
        self.parameters = list(parameters)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.velocity = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        for theta, v in zip(self.parameters, self.velocity, strict=True):
            if theta.grad is None:
                continue
            g = theta.grad.add(theta, alpha=self.weight_decay) if self.weight_decay else theta.grad
            v.mul_(self.momentum).add_(g)  # v <- mu v + g
            theta.add_(v, alpha=-self.lr)  # theta <- theta - eta v

    def zero_grad(self) -> None:
        for theta in self.parameters:
            theta.grad = None


# %% [markdown]
# Does it equal `torch.optim.SGD`? We let both train the same small network for 60 steps, with weight decay and a rate
# that changes on the way, and compare every weight after every step, without any tolerance.


# %%
def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 5))


ours, theirs = small_net(), small_net()
our_sgd = SGD(ours.parameters(), momentum=0.9, weight_decay=1e-3)
their_sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, foreach=False)
generator = torch.Generator().manual_seed(1)
for step in range(60):
    x, y = torch.randn(16, 10, generator=generator), torch.randint(5, (16,), generator=generator)
    our_sgd.lr = their_sgd.param_groups[0]["lr"] = 0.1 if step < 30 else 0.01
    for net, optimizer in ((ours, our_sgd), (theirs, their_sgd)):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
print("equal, bit for bit, after each of 60 steps")

# %% [markdown]
# ### The other momentum
#
# Many texts write $v_{t+1} = \mu v_t - \eta g_t$ and $\theta_{t+1} = \theta_t + v_{t+1}$. With a constant rate this is
# the same method: their $v$ is our $v$ times $-\eta$. When the rate changes it is not. In {eq}`eq-sgd` the new rate
# multiplies the whole of $v$, old gradients included, at once. In the other form the old gradients keep the rate they
# came with.
#
# **Before you run it:** the gradient is always 1, and after 50 steps the rate drops from 1 to 0.1. How long is the step
# right after the drop, in each form?

# %%
v_ours = v_other = 0.0
lengths = []
for step in range(80):
    eta = 1.0 if step < 50 else 0.1
    v_ours, v_other = 0.9 * v_ours + 1.0, 0.9 * v_other - eta * 1.0
    lengths.append((eta * v_ours, -v_other))
for step in (49, 50, 55, 60, 79):
    print(f"step {step}: {lengths[step][0]:5.2f} in ours, {lengths[step][1]:5.2f} in the other form")
assert (
    abs(lengths[49][0] - lengths[49][1]) < 1e-9
    and lengths[50][1] > 8 * lengths[50][0]
    and lengths[60][1] > 3 * lengths[60][0]
)

# %% [markdown]
# Ours obeys at once; ten steps later the other is still more than three times too fast. During a warm-up it is the other way round: ours
# drags old gradients up to the new, higher rate. Goyal and others noticed that this difference spoils comparisons at
# large batches {cite}`goyal2017accurate`. PyTorch uses {eq}`eq-sgd`, and so did BiT's released fine-tuning code; we do
# too.
#
# ### What weight decay does under weight standardization
#
# The usual story is that weight decay keeps weights small, hence the function smooth. For a standardised filter that
# cannot be: $10 W$ computes exactly what $W$ does. What does change is the gradient. If $f(aW) = f(W)$ for every
# $a > 0$, the chain rule gives $\nabla f(aW) = \nabla f(W) / a$.

# %%
torch.manual_seed(0)
conv = StdConv2d(8, 16, 3, bias=False)
x = torch.randn(4, 8, 10, 10)
gradients = []
for a in (1.0, 10.0):
    w = (a * conv.weight).detach().requires_grad_()
    conv_output = torch.func.functional_call(conv, {"weight": w}, (x,))
    gradients.append(torch.autograd.grad(conv_output.square().mul(torch.linspace(0, 1, 8)).sum(), w)[0])
torch.testing.assert_close(gradients[1], gradients[0] / 10, rtol=1e-3, atol=1e-4)
print("ten times the weights, a tenth of the gradient")

# %% [markdown]
# So a step turns the filter by an angle in proportion to $\eta / \lVert W \rVert^2$. The gradient is also orthogonal to
# $W$ (moving along $W$ changes nothing), so by Pythagoras every step makes $W$ longer (with momentum nearly every one,
# since older gradients were orthogonal to an older $W$), and the effective rate sinks by itself. Weight decay pulls the other way. Under standardisation $\lambda$ sets the *effective learning rate*, not the
# smoothness. The paper decays by $10^{-4}$ upstream and not at all in fine-tuning {cite}`kolesnikov2020big`. (Where the
# rate and the decay should be set apart, decay the weights directly and not through the gradient
# {cite}`loshchilov2019decoupled`; BiT does not.)
#
# ## The learning rate over time
#
# Two regimes. At the start the weights are random, the curvature is high, and a full-sized step throws the network
# off: the rate *warms up* from near 0. At the end the noise of the batches keeps the weights rattling around the
# minimum, at a distance that shrinks with the rate: the rate *decays*.
#
# BiT warms up linearly for 5,000 steps, then divides the rate by 10 at 30, 60 and 80 of 90 epochs (BiT-L: at 10, 23, 30
# and 37 of 40) {cite}`kolesnikov2020big`. Later work often prefers half a cosine {cite}`loshchilov2017sgdr` or a
# polynomial. With $t$ the share of the steps after the warm-up that are done:
#
# $$ \text{step: } \eta\, 10^{-\#\{\text{decays so far}\}} \qquad
#    \text{cosine: } \tfrac{\eta}{2} (1 + \cos \pi t) \qquad
#    \text{polynomial: } \eta\, (1 - t)^p $$
#
# (The figure warms up for 5 epochs. At batch 4,096 those 5,000 steps are 16 of BiT-S's 90 epochs and 1.4 of BiT-M's.)
#
# Ours are plain functions of the step. Nothing has to be remembered, so nothing can be forgotten when a run is resumed.


# %% tags=["export"]
def warmup(step: int, warmup_steps: int) -> float:
    """The factor of a linear warm-up: 1/w, 2/w, ... in the first w steps, then 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def warmup_step_lr(
    step: int, base_lr: float, warmup_steps: int, decay_steps: Sequence[int], factor: float = 0.1
) -> float:
    """Warm-up, then the rate times `factor` at each of `decay_steps`: the schedule of the paper."""
    return base_lr * warmup(step, warmup_steps) * factor ** sum(step >= s for s in decay_steps)


def warmup_cosine_lr(step: int, base_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Warm-up, then half a period of a cosine from `base_lr` down to 0 at `total_steps`."""
    t = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base_lr * warmup(step, warmup_steps) * 0.5 * (1 + math.cos(math.pi * min(1.0, t)))


def warmup_polynomial_lr(step: int, base_lr: float, warmup_steps: int, total_steps: int, power: float = 1.0) -> float:
    """Warm-up, then base_lr * (1 - t)^power, where t goes from 0 to 1 at `total_steps`; power 1 is a line."""
    t = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base_lr * warmup(step, warmup_steps) * (1 - min(1.0, t)) ** power


def linear_scaling(batch_size: int, base_lr: float = 0.03, base_batch: int = 256) -> float:
    """The learning rate for a batch size, in proportion. The defaults are the paper's: 0.48 at batch 4,096."""
    return base_lr * batch_size / base_batch


# %% tags=["hide-input"] mystnb={"image": {"alt": "Learning rate, relative to its highest value, against epoch from 0 to 90 for four schedules. All rise along a straight line over the first 5 epochs. The step schedule stays at 1 until epoch 30, then falls to 0.1, to 0.01 at epoch 60 and to 0.001 at epoch 80. The cosine falls in an S shape, the polynomial of power 1 along a line and that of power 2 along a curve, all three to 0 at epoch 90."}}
epochs = torch.arange(0, 90, 0.1)
per_epoch = 10  # steps, for the picture
curves = {
    "step, ÷10 at 30, 60, 80": lambda s: warmup_step_lr(s, 1.0, 50, [300, 600, 800]),
    "cosine": lambda s: warmup_cosine_lr(s, 1.0, 50, 900),
    "polynomial, power 1": lambda s: warmup_polynomial_lr(s, 1.0, 50, 900),
    "polynomial, power 2": lambda s: warmup_polynomial_lr(s, 1.0, 50, 900, power=2.0),
}
figure, axes = plt.subplots()
for (name, curve), style in zip(curves.items(), ("-", "--", "-.", ":"), strict=True):
    axes.plot(epochs, [curve(s) for s in range(900)], style, label=name)
axes.set_xlabel("epoch")
axes.set_ylabel("learning rate / highest")
axes.legend()
plt.show()

# %% [markdown]
# PyTorch has the same decays as objects that are stepped. Without a warm-up they must agree with ours at every step.

# %%
schedulers = torch.optim.lr_scheduler
pairs = {
    "step": (lambda o: schedulers.MultiStepLR(o, [30, 60, 80]), lambda s: warmup_step_lr(s, 0.5, 0, [30, 60, 80])),
    "cosine": (lambda o: schedulers.CosineAnnealingLR(o, 90), lambda s: warmup_cosine_lr(s, 0.5, 0, 90)),
    "polynomial": (
        lambda o: schedulers.PolynomialLR(o, 90, power=2.0),
        lambda s: warmup_polynomial_lr(s, 0.5, 0, 90, power=2.0),
    ),
}
for name, (make, ours) in pairs.items():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = make(optimizer)
    for step in range(90):
        assert math.isclose(optimizer.param_groups[0]["lr"], ours(step), rel_tol=1e-9, abs_tol=1e-12), (name, step)
        optimizer.step()
        scheduler.step()
assert warmup_step_lr(0, 1.0, 4, [10]) == 0.25 and warmup_step_lr(3, 1.0, 4, [10]) == 1.0
print("equal at every step:", ", ".join(pairs))

# %% [markdown]
# Our warm-up starts at $\eta / w$, not at 0: a first step of length 0 would only waste a batch.
#
# ## The loss
#
# ### Cross-entropy, and smoothed labels
#
# For logits $z$ let $p = \operatorname{softmax}(z)$. With a target distribution $q$ over $K$ classes the loss is
# $-\sum_k q_k \log p_k$, and its gradient is $p - q$. It vanishes only where $p = q$. For a one-hot $q$ that needs
# infinite logits, so the network never stops pushing them apart.
#
# *Label smoothing* {cite}`szegedy2016rethinking` asks for less: it gives a share $\alpha$ of the probability to all
# classes alike,
#
# $$ q_k = (1 - \alpha)\, [k = y] + \frac{\alpha}{K}
#    \quad\Longrightarrow\quad
#    L = -(1 - \alpha) \log p_y - \frac{\alpha}{K} \sum_k \log p_k . $$ (eq-smoothing)
#
# Now $p = q$ is reached at finite logits. Those of the wrong classes are equal, and the right one stands above them by
#
# $$ z_y - z_k = \log \frac{q_y}{q_k} = \log \left( \frac{K (1 - \alpha)}{\alpha} + 1 \right). $$ (eq-gap)
#
# ### One question or many: the sigmoid
#
# Softmax makes the classes compete for one unit of probability. That is wrong for an image that *is* several things:
# a dog, a poodle and a pet. ImageNet-21k is like that, and so is GlyphNet. Then we can ask $K$ separate questions, each
# with its own probability $\sigma(z_k) = 1 / (1 + e^{-z_k})$, and add up the losses:
#
# $$ L = -\sum_k \left[ y_k \log \sigma(z_k) + (1 - y_k) \log (1 - \sigma(z_k)) \right]
#      = \sum_k \left[ \max(z_k, 0) - z_k y_k + \log (1 + e^{-|z_k|}) \right]. $$ (eq-sigmoid)
#
# The second form never takes the exponential of a positive number, so it cannot overflow. The gradient is again
# prediction minus target, $\sigma(z_k) - y_k$. BiT's ImageNet-21k models used this loss, by the word of one of the
# authors in the released code's discussion pages {cite}`bittransfer_code`; so does the configuration that they published
# later, and the one for ImageNet has softmax {cite}`bigvision_code`. For JFT nobody has said.
#
# GlyphNet allows both. Its labels come in groups: which character, which typeface, which ink. Within a group they
# exclude each other, so one softmax per group is exact, and our default. The sigmoid needs no groups, but it has to
# learn from mostly empty answers. When every label excludes the others, take softmax; when several can be true and you
# cannot say which exclude which, take the sigmoid.
#
# In both cases an image may lack a label ($-1$: a photograph has no character). Its loss in that group is 0 with
# softmax; with the sigmoid, "none of these" is itself an answer. We divide by the number of *images*, never by the
# number of labels. This looks like a detail, and we will need it twice.


# %% tags=["export"]
def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """Cross-entropy of softmax(logits) against classes smoothed towards uniform, as F.cross_entropy computes it.

    logits: (N, K). target: (N,) class indices. The smoothed target of class k is (1 - a) [k = target] + a / K.
    Returns the mean, or with reduction="none" the loss of each example, (N,).
    """
    log_p = _at_least_float32(logits).log_softmax(dim=1)
    loss = -log_p.gather(1, target[:, None])[:, 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(dim=1)
    return loss.mean() if reduction == "mean" else loss


def sigmoid_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy summed over the classes, mean over the images. Both arguments (N, K); target in [0, 1]."""
    z = _at_least_float32(logits)
    loss = z.clamp(min=0) - z * target + torch.log1p(torch.exp(-z.abs()))  # never exp of a large number
    return loss.sum(dim=1).mean()


def upstream_loss(
    logits: Tensor, targets: Tensor, groups: Sequence, kind: str = "softmax", label_smoothing: float = 0.0
) -> Tensor:
    """The loss over several groups of labels, weighted, averaged over the images.

    logits: (N, sum of the groups' n_classes), one block of columns a group. targets: (N, number of groups); -1 says
    that the image has no label in the group. groups: objects with n_classes and weight, such as GlyphNet's.

    kind "softmax": one cross-entropy a group; an image without a label adds 0 to it. kind "sigmoid": one yes-or-no
    question a class; an image without a label answers "no" to all. Either way the sum is divided by N and never by
    the number of labels, so that the losses of parts of a batch, weighted by size, add up to that of the whole.
    """
    total = logits.new_zeros(())
    blocks = logits.split([group.n_classes for group in groups], dim=1)
    for block, target, group in zip(blocks, targets.T, groups, strict=True):
        known = target >= 0
        if kind == "softmax":
            loss = cross_entropy(block, target.clamp(min=0), label_smoothing, reduction="none")
            total = total + group.weight * (loss * known).mean()
        elif kind == "sigmoid":
            one_hot = F.one_hot(target.clamp(min=0), group.n_classes) * known[:, None]
            total = total + group.weight * sigmoid_cross_entropy(block, one_hot)
        else:
            raise ValueError(f'unknown loss {kind!r}; use "softmax" or "sigmoid"')
    return total


# %% [markdown]
# The proofs: against PyTorch on random input, {eq}`eq-gap` by letting gradient descent find the optimum, and the
# stability with logits of a thousand.

# %%
generator = torch.Generator().manual_seed(0)
z, y = 5 * torch.randn(64, 10, generator=generator), torch.randint(10, (64,), generator=generator)
for a in (0.0, 0.1, 0.5):
    torch.testing.assert_close(cross_entropy(z, y, a), F.cross_entropy(z, y, label_smoothing=a))
yes = (torch.rand(64, 10, generator=generator) < 0.2).float()
torch.testing.assert_close(
    sigmoid_cross_entropy(z, yes),
    10 * F.binary_cross_entropy_with_logits(z, yes),  # torch's mean is over classes too
)
assert torch.isfinite(sigmoid_cross_entropy(1000 * z, yes))

logits = torch.zeros(1, 10, requires_grad=True)
optimizer = SGD([logits], lr=1.0)
for _ in range(500):
    optimizer.zero_grad()
    cross_entropy(logits, torch.tensor([3]), 0.1).backward()
    optimizer.step()
gap = (logits[0, 3] - logits[0, 0]).item()
print(f"gap between the right logit and the others: {gap:.4f} found, {math.log(10 * 0.9 / 0.1 + 1):.4f} by the formula")
assert abs(gap - math.log(10 * 0.9 / 0.1 + 1)) < 1e-3

groups = (LabelGroup("letter", 6, 1.0), LabelGroup("ink", 4, 0.3))
targets = torch.stack(
    [torch.randint(-1, 6, (64,), generator=generator), torch.randint(-1, 4, (64,), generator=generator)], 1
)
by_torch = sum(
    weight * F.cross_entropy(block, target, ignore_index=-1, reduction="sum") / 64
    for block, target, weight in zip(z.split([6, 4], dim=1), targets.T, (1.0, 0.3), strict=True)
)
torch.testing.assert_close(upstream_loss(z, targets, groups), by_torch)
print("equal to torch's: smoothed cross-entropy, sigmoid cross-entropy, groups with absent labels")

# %% [markdown]
# A warning for large heads. All heads here start at zero. With softmax the first loss is $\log K$ per image; with the
# sigmoid every class starts at probability one half, and the loss at $K \log 2$.

# %%
K = 21_843  # BiT-M's head
zeros = torch.zeros(1, K)
first = {"softmax": cross_entropy(zeros, torch.tensor([0])).item()}
first["sigmoid"] = sigmoid_cross_entropy(zeros, F.one_hot(torch.tensor([0]), K)).item()
print(", ".join(f"{name}: {value:,.1f}" for name, value in first.items()))
assert abs(first["softmax"] - math.log(K)) < 1e-3 and abs(first["sigmoid"] / (K * math.log(2)) - 1) < 1e-4

# %% [markdown]
# All but one of those 21,843 questions have the answer "no", and the first steps do nothing but learn that. Starting
# the bias low cures it; the last exercise works out how low.
#
# ## The learning rate and the batch
#
# Take $k$ steps of rate $\eta$ with batches $1, \dots, k$, or one step of rate $\eta'$ with all of them together:
#
# $$ \theta_{t+k} = \theta_t - \eta \sum_{j=1}^{k} g_j(\theta_{t+j-1})
#    \qquad\text{against}\qquad
#    \theta_{t+1}' = \theta_t - \eta' \, \frac1k \sum_{j=1}^{k} g_j(\theta_t) . $$
#
# If the gradients do not change much over $k$ steps, the two are the same for $\eta' = k \eta$: the rate should grow in
# proportion to the batch {cite}`goyal2017accurate`. BiT takes $0.03 \times B / 256$, hence 0.48 at its batch of 4,096
# {cite}`kolesnikov2020big`.

# %%
print(f"batch 256: {linear_scaling(256):.2f}, batch 4,096: {linear_scaling(4096):.2f}")
assert linear_scaling(256) == 0.03 and math.isclose(linear_scaling(4096), 0.48)

# %% [markdown]
# "If the gradients do not change much" is a condition, so let us test it. A small network learns the ink of GlyphNet
# characters, always in four passes over the same 6,144 images. We start at batch 16 with a gentle and a bold rate, and
# raise the batch to 1,024, once with the rate fixed and once in proportion. There is no momentum in the two formulas, and
# none here: it starts at zero and comes up to speed in ten steps or so, and of the 24 steps at batch 1,024 that alone
# would cost a third.
#
# **Before you run it:** which of the four curves stay flat, and where does the first one break?

# %% tags=["nbval-ignore-output"]
images, labels = GlyphNet("S").batch(torch.arange(8_300))
inked = labels[:, 2] >= 0
x_ink = F.avg_pool2d(normalize(images[inked]), 4).flatten(1)[:6_144]  # 8x8 pixels of 3 colours
y_ink = labels[inked, 2][:6_144]
assert len(x_ink) == 6_144


def loss_after_four_passes(batch, rate, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 20))
    optimizer = SGD(net.parameters(), lr=rate, momentum=0.0)
    for chosen in torch.cat([torch.randperm(len(x_ink)) for _ in range(4)]).split(batch):
        cross_entropy(net(x_ink[chosen]), y_ink[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return cross_entropy(net(x_ink), y_ink).item()


batches = (16, 64, 256, 1024)
curves = {}
for name, rate in (("gentle", 0.008), ("bold", 0.02)):
    start = loss_after_four_passes(16, rate)
    curves[f"{name}, fixed"] = [start] + [loss_after_four_passes(b, rate) for b in batches[1:]]
    curves[f"{name}, in proportion"] = [start] + [loss_after_four_passes(b, rate * b / 16) for b in batches[1:]]
for name, values in curves.items():
    print(f"{name:23}" + "".join(f"{value:8.1f}" for value in values))

# %%
for name in ("gentle", "bold"):
    fixed, scaled = curves[f"{name}, fixed"], curves[f"{name}, in proportion"]
    assert all(f > s + 0.2 for f, s in zip(fixed[1:], scaled[1:3], strict=False)), "the rule helps"
    assert abs(scaled[2] - scaled[0]) < 0.1 < fixed[2] - fixed[0], "flat up to a batch 16 times as large"
gentle, bold = (curves[f"{name}, in proportion"] for name in ("gentle", "bold"))
assert abs(gentle[3] - gentle[0]) < 0.1, "the gentle rate is flat up to 64 times"
assert not bold[3] < bold[2] + 0.1, "the bold one is not"

# %% tags=["hide-input"] mystnb={"image": {"alt": "Loss after four passes over the images against batch size, 16 to 1,024. With the rate fixed, both curves rise steadily. With the rate in proportion to the batch both stay flat up to batch 256; at 1,024 the gentle one is still flat, and the bold one has risen steeply."}}
figure, axes = plt.subplots()
for (name, values), style in zip(curves.items(), ("C0o:", "C0o-", "C1s:", "C1s-"), strict=True):
    axes.semilogx(batches, values, style, base=2, label=name)
axes.set_xticks(batches, [f"{b:,}" for b in batches])
axes.set_xlabel("batch size (four passes in all cases)")
axes.set_ylabel("loss at the end")
axes.legend()
plt.show()

# %% [markdown]
# With the gentle rate the rule holds over a factor of 64. With the bold one it holds over 16 and then breaks: sixty-four
# times as long, a step is so long that the gradient changes on the way. What the rule runs into is not a largest batch
# but a largest rate. A warm-up, which is short steps while the gradients change fastest, moves that limit out, and that
# is how BiT gets to 4,096.
#
# ## Large batches on small machines
#
# A batch of 4,096 images does not fit a small machine. It need not: the gradient of a mean is a mean of gradients. We
# work through *micro-batches*, let PyTorch add their gradients into `.grad`, and step once. The loss of part $j$ with
# $n_j$ of the $B$ images must be weighted by $n_j / B$:
#
# $$ \frac1B \sum_{i=1}^{B} \ell_i = \sum_j \frac{n_j}{B} \Big( \frac{1}{n_j} \sum_{i \in j} \ell_i \Big). $$
#
# Common code divides by the number of parts instead, so a last part of 4 images weighs as much as a full one of 32;
# BiT's released code does so too {cite}`bittransfer_code`. Neither batch size nor number of parts may matter, and with our weights they do not:
# normalisation is by group, within each image, so the network computes the same for an image in any company. (Batch
# norm would not. Its statistics are those of the micro-batch.)
#
# Here is also why `upstream_loss` divides by images. Divided by labels, the parts' means would have to be weighted by
# their number of labels, a different one for each group.


# %% tags=["export"]
def accumulate(
    net: nn.Module, x: Tensor, target, loss_fn: Callable, total: int, micro_batch: int | None = None, amp: bool = False
) -> Tensor:
    """Add to the gradients those of a batch's mean loss, in parts of at most micro_batch images; returns the loss.

    total: the images in the batch of all processes together. Each part's mean counts by its share of them, so a
    smaller last part counts less. DistributedDataParallel averages over the processes, where a sum is wanted: its
    loss is multiplied by their number. They exchange gradients once, after the last part.
    """
    device = next(net.parameters()).device
    parallel = isinstance(net, DistributedDataParallel)
    size = micro_batch or len(x)
    loss = 0.0
    for start in range(0, len(x), size):
        end = min(start + size, len(x))
        with net.no_sync() if parallel and end < len(x) else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = net(_rows(x, start, end, device))
                part = loss_fn(logits, _rows(target, start, end, device)) * ((end - start) / total)
            (part * dist.get_world_size() if parallel else part).backward()
        loss = loss + part.detach()
    return loss


def _rows(value, start: int, end: int, device: torch.device):
    """Rows start:end of a tensor, or of each in a tuple of tensors, on the device."""
    if isinstance(value, tuple | list):
        return tuple(_rows(v, start, end, device) for v in value)
    return value[start:end].to(device, non_blocking=True)


def clip_gradients(gradients: Sequence[Tensor], max_norm: float | None) -> Tensor:
    """The norm of all the gradients together; where it is above max_norm, they are scaled down to that."""
    norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)
    return norm


# %% [markdown]
# A batch of 100 in parts of 32, 32, 32 and 4, in double precision so that rounding does not hide anything.

# %%
torch.manual_seed(0)
net = create_model("R14x0.25", num_classes=10).double()
nn.init.normal_(net.head.weight, std=0.1)  # a head of zeros would send no gradient to the rest
x, y = torch.rand(100, 3, 32, 32, dtype=torch.float64) * 2 - 1, torch.randint(10, (100,))


def gradient_of(backward):
    net.zero_grad()
    backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


whole = gradient_of(lambda: F.cross_entropy(net(x), y).backward())
parts = gradient_of(lambda: accumulate(net, x, y, F.cross_entropy, total=100, micro_batch=32))
naive = gradient_of(
    lambda: [(F.cross_entropy(net(a), b) / 4).backward() for a, b in zip(x.split(32), y.split(32), strict=True)]
)


def error(gradient):
    return ((gradient - whole).norm() / whole.norm()).item()


print(f"relative error below 1e-12 with weights: {error(parts) < 1e-12}; above 5 % without: {error(naive) > 0.05}")
assert error(parts) < 1e-12 and error(naive) > 0.05

# %% [markdown]
# ### Clipping
#
# One odd batch can throw the weights far off. *Clipping* sets a bound: where the norm of all gradients together is above
# it, all of them are scaled down to it, so that the step is shorter and its direction the same. The paper does not speak
# of it; the authors' later configurations clip at 1 {cite}`bigvision_code`. Ours, `clip_gradients` above, is off by
# default, and equal to PyTorch's.

# %%
generator = torch.Generator().manual_seed(2)
by_hand = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
length = torch.cat([g.flatten() for g in by_hand]).norm()
for bound in (0.5, 100.0):
    holders = [nn.Parameter(torch.zeros_like(g)) for g in by_hand]
    for holder, g in zip(holders, by_hand, strict=True):
        holder.grad = g.clone()
    clipped = [g.clone() for g in by_hand]
    torch.testing.assert_close(clip_gradients(clipped, bound), length)
    torch.testing.assert_close(nn.utils.clip_grad_norm_(holders, bound), length)
    torch.testing.assert_close(clipped, [holder.grad for holder in holders])
    after = torch.cat([g.flatten() for g in clipped]).norm()
    print(f"bound {bound}: {length:.2f} becomes {after:.2f}")
    assert after <= bound + 1e-5

# %% [markdown]
# ### Half the bits
#
# On a GPU most of the work can be done in bfloat16, which keeps the exponent of float32 and 7 of the 23 bits of its
# fraction.
# `torch.autocast` chooses by operation: convolutions and matrix products in bfloat16, sums and logarithms in float32.
# The weights, their gradients and the momentum stay float32, and since bfloat16 reaches as far as float32, no loss
# scaling is needed. Our loop switches it on where the device has it. On the CPU we only look at the error.

# %%
net = net.float().eval()
with torch.no_grad():
    exact = net.features(x[:8].float())
    with torch.autocast("cpu", torch.bfloat16):
        rough = net.features(x[:8].float())
relative = ((rough.float() - exact).norm() / exact.norm()).item()
print("relative error of the features between 0.1 % and 5 %:", 0.001 < relative < 0.05)
assert 0.001 < relative < 0.05

# %% [markdown]
# ## A loop that survives
#
# Pre-training takes days where fine-tuning takes minutes, and sooner or later the machine goes away.
# What must a checkpoint hold so that a resumed run ends with *the same bits* as one that was never stopped?
#
# - the weights, and the momentum of each;
# - the number of steps done: it gives the learning rate, because our schedules are functions of the step;
# - the place in the data: the same number again, because we make every batch a pure function of the step;
# - the state of the random generators, for anything that draws from them (dropout, say);
# - the configuration, to refuse to go on with another one.
#
# And it must be there when we come back. A file that is being written when the power fails is half a file. So we write
# to a temporary name, ask the system to push it to the disk (`fsync`), and rename it. On any POSIX system a rename
# happens wholly or not at all. We keep the last two checkpoints, with checksums, in case the disk itself lies.


# %% tags=["export"]
class TrainingError(RuntimeError):
    """Training cannot go on. The message says why, at which step, and what is kept."""


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; the state was saved. `signum` is the signal's number."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


@dataclass
class History:
    """What happened at each step (the loss, the gradient's norm before clipping, the rate) and at each evaluation."""

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)  # {"step": 500, and what eval_fn returned}
    best: dict | None = None  # {"step", "value"} of the evaluation that `keep_best` keeps

    def recent(self, n: int) -> dict[str, float]:
        """The mean loss and gradient norm of the last n steps, and the last rate."""
        return {"loss": sum(self.loss[-n:]) / n, "grad_norm": sum(self.grad_norm[-n:]) / n, "lr": self.lr[-1]}


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, push it to the disk, then give it its name: whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name is on the disk only once its folder is
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _checksum(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def save_state(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Write tensors and a JSON-able dict to one safetensors file, atomically, with a checksum."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = json.dumps({**about, "crc32": _checksum(tensors)})
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"about": about}))


def load_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Read what `save_state` wrote. Raises ValueError where the file is truncated or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    if about.get("crc32") != _checksum(tensors):
        raise ValueError(f"{path.name} is damaged: its checksum is wrong")
    return tensors, about


def newest_state(run_dir: Path) -> Path | None:
    """The newest checkpoint in a run folder that can be read, or None where there is none at all.

    A damaged one is reported, set aside under the name `*.damaged`, and the one before it taken. Where every one
    is damaged, TrainingError is raised: starting again silently would throw away a run.
    """
    damaged = []
    for path in sorted(run_dir.glob("step-*.safetensors"), reverse=True):
        try:
            load_state(path)
        except ValueError as error:
            damaged.append(path.name)
            path.rename(path.with_name(path.name + ".damaged"))
            print(f"{error}; falling back to the checkpoint before it", file=sys.stderr)
        else:
            return path
    if damaged:
        raise TrainingError(
            f"no checkpoint in {run_dir} can be read ({', '.join(damaged)}); empty the folder to start again"
        )
    return None


# %% [markdown]
# Much of a real loop is not training: a folder that may not be writable, a log, a progress bar. It lives in a class of
# its own, out of the loop's way.


# %% tags=["export"]
class _Run:
    """A run folder: its checkpoints, log.jsonl, and the reports on the terminal. Without a folder, only the reports.

    Only the first process of a group writes; all of them read the same checkpoint.
    """

    def __init__(self, run_dir, steps: int, keep: int, progress: bool | None, tensorboard: bool):
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least the last checkpoint must be kept")
        self.dir = Path(run_dir) if run_dir is not None else None
        self.steps, self.keep, self.writes = steps, keep, _rank_and_world()[0] == 0
        terminal = sys.stderr.isatty()
        self.show_bar = self.writes and (terminal if progress is None else progress)
        self.show_lines = self.writes and progress is None and not terminal and self.dir is not None
        self.wants_board = tensorboard
        self.bar = self.log = self.board = self.last_saved = None
        self.seconds, self.since = 0.0, time.monotonic()  # of training in all sittings; the clock's last reading

    def find(self) -> Path | None:
        """Make the folder ready to write to; the checkpoint to go on from, if there is one."""
        newest = None
        if self.dir is not None and self.writes:
            try:
                self.dir.mkdir(parents=True, exist_ok=True)
                for left_over in self.dir.glob(".*.tmp"):
                    left_over.unlink()
            except OSError as error:
                raise TrainingError(f"cannot use {self.dir} as a run folder: {error.strerror}") from error
            newest = newest_state(self.dir)
        return _from_first(newest)

    def open(self, step: int) -> None:
        """Start the reports at `step`. What the log says of later steps, from a run that was killed, is cut off."""
        if self.show_bar:
            self.bar = tqdm(total=self.steps, initial=step, unit="step", dynamic_ncols=True)
        if self.dir is not None and self.writes:
            path = self.dir / "log.jsonl"
            with self.writing(path.name):
                lines = path.read_text().splitlines() if path.exists() else []
                kept = "".join(line + "\n" for line in lines if 0 <= _step_of(line) <= step)
                write_atomically(path, lambda temporary: temporary.write_text(kept))
                self.log = open(path, "a", buffering=1)
            if self.wants_board:
                try:
                    from torch.utils.tensorboard import SummaryWriter
                except ImportError as error:
                    raise ImportError("tensorboard=True needs TensorBoard: pip install tensorboard") from error
                self.board = SummaryWriter(str(self.dir / "tensorboard"), purge_step=step + 1)
        self.since = time.monotonic()

    def lap(self) -> float:
        """The seconds since the last call."""
        before, self.since = self.since, time.monotonic()
        self.seconds += self.since - before
        return self.since - before

    def report(self, step: int, row: dict) -> None:
        """One row of numbers: to the log, and to the terminal."""
        if self.log is not None:
            with self.writing("log.jsonl"):
                self.log.write(json.dumps({"step": step, **row, "seconds": round(self.seconds, 1)}) + "\n")
        text = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        if self.show_lines:
            print(f"step {step}/{self.steps}  {text}", file=sys.stderr, flush=True)
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, step)

    def save(self, state: "_State") -> None:
        """Write the checkpoint of a step, then delete all but the last `keep`."""
        if self.dir is None or not self.writes or self.last_saved == state.step:
            return
        tensors, about = state.pack()
        path = self.dir / f"step-{state.step:09d}.safetensors"
        with self.writing(path.name):
            if self.last_saved is None:
                need = (self.keep + 1) * sum(t.numel() * t.element_size() for t in tensors.values())
                free = shutil.disk_usage(self.dir).free
                if free < need:
                    raise OSError(
                        0, f"{free / 1e6:.0f} MB are free, {self.keep + 1} checkpoints take {need / 1e6:.0f} MB"
                    )
            save_state(path, tensors, {**about, "seconds": self.seconds})
            self.last_saved = state.step
            for old in sorted(self.dir.glob("step-*.safetensors"))[: -self.keep]:
                old.unlink()

    @contextmanager
    def writing(self, what: str):
        """Turn a failure to write into a TrainingError that says what is kept."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            kept = (
                "nothing was trained"
                if self.last_saved is None
                else f"the checkpoint of step {self.last_saved} is kept"
            )
            reason = getattr(error, "strerror", None) or str(error)
            raise TrainingError(
                f"cannot write {what} in {self.dir}: {reason}; {kept}. Make room there and run the same command again"
            ) from error

    def kept(self) -> str:
        """What there is to go on from."""
        if self.dir is None:
            return "no run_dir, so nothing is kept"
        return f"{self.dir} has the last good checkpoint, of step {self.last_saved}"

    def close(self) -> None:
        for thing in (self.bar, self.log, self.board):
            if thing is not None:
                thing.close()


def _step_of(line: str) -> int:
    """The step of a line of log.jsonl; -1 for a line that was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


# %% [markdown]
# What goes into a checkpoint and comes out again:


# %% tags=["export"]
class _State:
    """Everything that a checkpoint holds, and how it goes into tensors and back."""

    def __init__(self, model: nn.Module, optimizer: SGD, settings: dict, place: dict):
        self.model, self.optimizer = model, optimizer
        self.settings, self.place = json.loads(json.dumps(settings)), place
        self.step = self.images = 0
        self.history = History()
        name_of = {id(p): name for name, p in model.named_parameters()}
        self.velocity = {name_of[id(p)]: v for p, v in zip(optimizer.parameters, optimizer.velocity, strict=True)}
        self.device = next(model.parameters()).device

    def pack(self) -> tuple[dict[str, Tensor], dict]:
        """The tensors, and the rest as a dict for JSON."""
        history = dataclasses.asdict(self.history)
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"velocity.{name}": tensor for name, tensor in self.velocity.items()}
        for name in ("loss", "grad_norm", "lr"):
            tensors[f"history.{name}"] = torch.tensor(history.pop(name), dtype=torch.float64)
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors, {
            "step": self.step,
            "images": self.images,
            "settings": self.settings,
            "place": self.place,
            **history,
        }

    def unpack(self, path: Path, lr: Callable[[int], float]) -> dict:
        """Take over a checkpoint; returns its dict. TrainingError where it is of another run or another model."""
        tensors, about = load_state(path)
        parts: dict[str, dict] = {"model": {}, "velocity": {}, "history": {}, "random": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = tensor
        rates = {name: values.tolist() for name, values in parts["history"].items()}
        differ = _differences(about["settings"], self.settings)
        for step, old in enumerate(rates["lr"]):
            if not differ and lr(step) != old:
                differ = f"\n  the rate at step {step}: the checkpoint has {old}, this run has {lr(step)}"
        if differ:
            raise TrainingError(
                f"{path} is from a run with another configuration:{differ}\n"
                "Use another run folder, or the same configuration"
            )
        try:
            self.model.load_state_dict(parts["model"])
            for name, velocity in self.velocity.items():
                velocity.copy_(parts["velocity"][name])
        except (RuntimeError, KeyError) as error:
            raise TrainingError(f"{path} does not fit this model: {error}") from error
        torch.set_rng_state(parts["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in parts["random"]:
            torch.cuda.set_rng_state(parts["random"]["cuda"], self.device)
        self.step, self.images = about["step"], about["images"]
        self.history = History(**rates, evals=about["evals"], best=about["best"])
        return about

    def record(self, rows: list[tuple[float, Tensor]], kept: str) -> None:
        """Add (rate, [loss, gradient norm]) of the last steps to the history; stop at the first that is not finite."""
        if not rows:
            return
        values = torch.stack([row for _, row in rows])
        if _rank_and_world()[1] > 1:
            dist.all_reduce(losses := values[:, 0].contiguous())
            values[:, 0] = losses
        for (rate, _), (loss, norm) in zip(rows, values.tolist(), strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingError(
                    f"step {len(self.history.loss) + 1}: the loss is {loss}, the gradient's norm {norm}; {kept}. "
                    "A lower learning rate, a longer warm-up or clip_norm may help"
                )
            self.history.loss.append(loss)
            self.history.grad_norm.append(norm)
            self.history.lr.append(rate)
        rows.clear()


def _differences(old: dict, new: dict) -> str:
    missing = "(not set)"
    return "".join(
        f"\n  {name}: the checkpoint has {old.get(name, missing)}, this run has {new.get(name, missing)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, missing) != new.get(name, missing)
    )


# %% [markdown]
# And the small services: several processes, signals, reproducible kernels.


# %% tags=["export"]
def _rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) unless torch.distributed runs."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _from_first(value):
    """The value that the first process of the group has."""
    if _rank_and_world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _agree(stop: int, size: int, device: torch.device) -> tuple[int, int]:
    """A signal that any process received (0: none), and the number of images in all their batches together."""
    rank, world = _rank_and_world()
    if world == 1:
        return stop, size
    table = torch.zeros(world, 2, dtype=torch.int64)
    table[rank] = torch.tensor([stop, size])
    dist.all_reduce(table := table.to(device))
    return int(table[:, 0].max()), int(table[:, 1].sum())


@contextmanager
def _signals(enabled: bool):
    """Yields a list that receives SIGINT or SIGTERM; the old handlers come back at the end.

    The same signal again stops at once. Not so in a process group, where torchrun may pass on what the terminal sent.
    """
    received: list[int] = []

    def handle(signum, frame):
        if signum in received and _rank_and_world()[1] == 1:
            raise KeyboardInterrupt
        received.append(signum)

    if not enabled or threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _deterministic(device: torch.device):
    """On a GPU, choose kernels that give the same bits every time, where there are any. A CPU's do already."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _channels_last(model: nn.Module) -> None:
    """Lay the convolutions' filters out as (out, height, width, in): equal to rounding, and faster.

    A 1x1 filter is the same either way, and DistributedDataParallel warns of its strides if it is touched.
    """
    for p in model.parameters():
        if p.ndim == 4 and p.shape[2:] != (1, 1):
            p.data = p.data.contiguous(memory_format=torch.channels_last)


@contextmanager
def _ahead(load: Callable[[int], tuple], steps: int, device: torch.device):
    """Yields a function that gives the batch of a step, and has the next one made meanwhile where a core is free.

    Where the computation has a thread on every core, one more would hold it up: at the end of every operation all
    threads wait for the one whose core was taken away.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cpu" and torch.get_num_threads() >= cores:
        yield load
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        made = {}

        def batch(step: int) -> tuple:
            ready = (made.pop(step, None) or pool.submit(load, step)).result()
            if step + 1 < steps:
                made[step + 1] = pool.submit(load, step + 1)
            return ready

        yield batch


@functools.cache
def _keep_freed_memory() -> None:
    """Have the C library keep the memory that a step frees for the next step.

    glibc gives large blocks back to the kernel, which then fills every page with zeros before a step gets it anew:
    thousands of page faults a step. Blocks over 32 MiB still go back at once. Elsewhere this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # not glibc
        return
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 32 * 2**20)


@contextmanager
def _only(model: nn.Module, trained: Sequence[Tensor]):
    """Let only `trained` have gradients for a while."""
    chosen = {id(p) for p in trained}
    before = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(id(p) in chosen)
    try:
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


# %% [markdown]
# Now the loop. In the middle stand six lines that we have derived: set the rate, accumulate, clip, step, forget the
# gradients, count. Where a core is free, or a GPU computes, a thread meanwhile makes the next batch, so that the data
# never keep the network waiting. `batch_fn` may not draw from the global generator, because nobody could say in which
# order; a generator seeded with the step is all it needs.


# %% tags=["export"]
def train(
    model: nn.Module,
    batch_fn: Callable[[int], tuple],
    loss_fn: Callable[..., Tensor],
    lr: Callable[[int], float],
    steps: int,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    micro_batch: int | None = None,
    parameters: Iterable[Tensor] | None = None,
    amp: bool | None = None,
    run_dir: str | os.PathLike | None = None,
    config: dict | None = None,
    save_every: int = 500,
    keep: int = 2,
    log_every: int = 50,
    eval_fn: Callable[[nn.Module], dict] | None = None,
    eval_every: int | None = None,
    keep_best: str | None = None,
    on_step: Callable[[int, nn.Module], None] | None = None,
    progress: bool | None = None,
    tensorboard: bool = False,
) -> History:
    """Train a model in place by SGD with momentum; the one loop of the book, upstream and downstream.

    batch_fn(step) -> (x, target): the batch of a step, a pure function of the step (it may run ahead in a thread of its
        own, and must draw nothing from the global generator). target: a tensor or a tuple of tensors, N rows each.
    loss_fn(logits, target) -> the mean over the images. lr(step) -> the rate. Steps count from 0.
    micro_batch: work through the batch in parts of at most this many images, and add up their gradients.
    parameters: which of the model's to train; all that require a gradient by default.
    amp: bfloat16 autocast; by default on a GPU that has it.

    run_dir: a folder for checkpoints (every `save_every` steps, the last `keep`) and log.jsonl. Where it holds a
        checkpoint of the same configuration, training goes on from it and ends with the same bits as a run that was
        never stopped. config: JSON-able facts that must be the same then; a difference raises TrainingError.
    eval_fn(model) -> a dict of numbers, every `eval_every` steps and at the end. keep_best names one of them: the
        model ends with the weights that had it highest.
    on_step(step, model): called after each update; step is the number of updates done.
    progress: a bar on the terminal; by default where stderr is one (else lines, if there is a run_dir). False: none.

    In a process group (torchrun), batch_fn gives this process's share of the batch and gradients are averaged by
    DistributedDataParallel. Raises TrainingError (a loss that is not finite, a disk that is full, a configuration
    that differs) and, after SIGINT or SIGTERM with a run_dir, TrainingInterrupted.
    """
    rank, world = _rank_and_world()
    device = next(model.parameters()).device
    if amp is None:
        amp = device.type == "cuda" and torch.cuda.is_bf16_supported()
    own = {id(p) for p in model.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
    if not trained or any(id(p) not in own for p in trained):
        raise ValueError("nothing to train: `parameters` must be parameters of the model, at least one")
    if device.type == "cpu":
        _keep_freed_memory()
    if device.type == "cpu" and isinstance(model, ResNetV2):
        model.lay_out_filters()
    else:
        _channels_last(model)
    optimizer = SGD(trained, momentum=momentum, weight_decay=weight_decay)
    settings = {"steps": steps, "momentum": momentum, "weight_decay": weight_decay, "clip_norm": clip_norm}
    place = {"torch": torch.__version__, "device": device.type, "amp": amp, "threads": torch.get_num_threads()}
    place |= {"processes": world, "micro_batch": micro_batch}
    state = _State(model, optimizer, settings | (config or {}), place)
    run = _Run(run_dir, steps, keep, progress, tensorboard)
    best = None

    def load(step: int):
        x, target = batch_fn(step)
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        return (x.pin_memory() if device.type == "cuda" else x), target

    try:
        with _only(model, trained), _signals(run.dir is not None) as received, _deterministic(device):
            if (checkpoint := run.find()) is None:
                run.save(state)  # step 0: shows that the folder can be written to before an hour is spent
            else:
                about = state.unpack(checkpoint, lr)
                run.seconds, run.last_saved = about["seconds"], about["step"]
                if keep_best and state.history.best:
                    best = load_state(run.dir / "best.safetensors")[0]
                if rank == 0:
                    note = _differences(about["place"], place)
                    note = f". Equal to a run without the stop to rounding only, for:{note}" if note else ""
                    print(f"going on from step {state.step} of {steps} in {run.dir}{note}", file=sys.stderr)
            run.open(state.step)
            net = DistributedDataParallel(model) if world > 1 else model
            model.train()
            optimizer.zero_grad()  # of gradients that the caller may have left
            rows: list[tuple[float, Tensor]] = []
            lap_images, lap_seconds = 0, 0.0
            with _ahead(load, steps, device) as batch:
                while state.step < steps:
                    x, target = batch(state.step)
                    stop, total = _agree(received[0] if received else 0, len(x), device)
                    if stop:
                        state.record(rows, run.kept())
                        run.lap()
                        run.save(state)
                        raise TrainingInterrupted(
                            f"stopped by {signal.Signals(stop).name}, saved at step {state.step} of {steps} "
                            f"in {run.dir}; the same command goes on from there",
                            stop,
                        )

                    optimizer.lr = lr(state.step)
                    loss = accumulate(net, x, target, loss_fn, total, micro_batch, amp)
                    norm = clip_gradients([p.grad for p in trained if p.grad is not None], clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()

                    state.step += 1
                    state.images += total
                    lap_images += total
                    rows.append((optimizer.lr, torch.stack([loss, norm])))
                    if on_step is not None:
                        on_step(state.step, model)
                    if run.bar is not None:
                        run.bar.update()
                    end = state.step == steps
                    log_now = end or state.step % log_every == 0
                    eval_now = eval_fn is not None and (end or bool(eval_every) and state.step % eval_every == 0)
                    save_now = end or state.step % save_every == 0
                    if device.type == "cpu" or log_now or eval_now or save_now:  # a GPU need not wait at every step
                        state.record(rows, run.kept())
                    lap_seconds += run.lap()
                    if log_now:
                        row = state.history.recent((state.step - 1) % log_every + 1)
                        run.report(
                            state.step, row | {"images_per_second": round(lap_images / max(lap_seconds, 1e-9), 1)}
                        )
                        lap_images, lap_seconds = 0, 0.0
                    if eval_now:
                        model.eval()
                        metrics = _from_first(eval_fn(model) if rank == 0 else None)
                        model.train()
                        run.lap()
                        state.history.evals.append({"step": state.step, **metrics})
                        run.report(state.step, {f"eval/{name}": value for name, value in metrics.items()})
                        if keep_best and (
                            state.history.best is None or metrics[keep_best] > state.history.best["value"]
                        ):
                            state.history.best = {"step": state.step, "value": metrics[keep_best]}
                            best = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
                            if run.dir is not None and rank == 0:
                                with run.writing("best.safetensors"):
                                    save_state(run.dir / "best.safetensors", best, state.history.best)
                    if save_now:
                        run.save(state)
            if best is not None:
                model.load_state_dict(best)
    finally:
        run.close()
    return state.history


# %% [markdown]
# ### Does it survive?
#
# A job of 30 steps, with dropout so that random numbers matter, checkpoints every 5 steps. We pull the plug at step 13,
# between two checkpoints, by an exception that the loop knows nothing of, and start the same job again. The test suite
# does the same with `kill -9`, at twenty random moments.

# %%
folder = Path(tempfile.mkdtemp())


def job(name, on_step=None, **changes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 5))

    def batch_fn(step):
        x = torch.randn(32, 10, generator=torch.Generator().manual_seed(step))
        return x, x[:, :5].argmax(dim=1)

    settings = {"weight_decay": 1e-4, "steps": 30, "lr": lambda s: warmup_cosine_lr(s, 0.1, 5, 30)} | changes
    train(
        net, batch_fn, F.cross_entropy, run_dir=folder / name, save_every=5, on_step=on_step, progress=False, **settings
    )
    return net.state_dict()


class PowerCut(BaseException):
    pass


def cut(step, model):
    if step == 13:
        raise PowerCut


undisturbed = job("undisturbed")
try:
    job("disturbed", on_step=cut)
except PowerCut:
    print("left behind:", ", ".join(sorted(path.name for path in (folder / "disturbed").iterdir())))
resumed = job("disturbed")
print("every bit equal:", all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed))
assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)

# %% [markdown]
# The newest checkpoint may be damaged all the same. Then the one before it is taken, and the loop says so. Another
# configuration is refused with the difference, and a loss that is not a number stops the run and names the step.

# %%
newest = folder / "disturbed" / "step-000000030.safetensors"
newest.write_bytes(newest.read_bytes()[:1_000])
repaired = job("disturbed")
assert all(torch.equal(undisturbed[name], repaired[name]) for name in undisturbed)
print("after the damage:", ", ".join(sorted(path.name for path in (folder / "disturbed").iterdir())), end="\n\n")

for name, changes in (("disturbed", {"weight_decay": 1e-3}), ("diverging", {"lr": lambda s: 1e30})):
    try:
        job(name, **changes)
        raise AssertionError("this should have failed")
    except TrainingError as error:
        print(str(error).replace(str(folder), "RUNS"), end="\n\n")

# %% [markdown]
# | what happens | what the loop does |
# |---|---|
# | `kill -9`, a power cut | the same command goes on from the last checkpoint |
# | Ctrl-C, or SIGTERM from a cluster | finishes the step, saves, says how to resume, exits with 130 or 143 |
# | the disk is full, the folder read-only | fails before the first step, or keeps the last good checkpoint |
# | the newest checkpoint is damaged | sets it aside, falls back to the one before |
# | the loss is not finite | stops and names the step; what is on the disk is from before it |
# | another configuration | refuses, shows the difference |
# | another number of threads or processes | goes on, and says that only rounding will differ |
#
# ## Pre-training
#
# `pretrain` fills in the pieces: GlyphNet, a network, the loss over its groups, and validation accuracy in each group.
# Its configuration is a frozen dataclass, so that a run can be printed, compared and repeated.
#
# The data order is arithmetic, too. Step $t$ takes positions $tB, \dots, (t+1)B - 1$ of an endless sequence of epochs,
# each a permutation made from (seed, epoch). Of several processes, each takes its share of these positions.


# %% tags=["export"]
@dataclass(frozen=True)
class PretrainConfig:
    """Everything that the result of a pre-training run follows from."""

    model: str = "R26x0.25"
    data: str = "M"  # the size of GlyphNet, S, M or L; or a name for data of your own
    steps: int = 5_500
    batch_size: int = 128
    lr: float | None = None  # None: in proportion to the batch, from 0.1 at 128 (minis) or the paper's 0.03 at 256
    warmup_steps: int = 100
    decay: str = "step"  # step, cosine or polynomial (a line)
    decay_at: tuple[float, ...] = (30 / 90, 60 / 90, 80 / 90)  # where "step" divides the rate by 10: the paper's
    weight_decay: float = 1e-4
    momentum: float = 0.9
    label_smoothing: float = 0.0
    loss: str = "softmax"
    group_weights: tuple[float, ...] | None = None  # instead of the weights that the data set gives its groups
    clip_norm: float | None = None
    image_size: int = 64
    seed: int = 0
    init: str | None = None  # a checkpoint to start from: a path or a name; its head is kept where it fits
    crop: float = 1.0  # of each image a random window, at least this share of its area; 1: the whole image
    val_images: int = 2_000

    def __post_init__(self):
        for name in ("steps", "batch_size", "image_size", "val_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is {self.crop}; it is the least share of an image that a window keeps, up to 1")
        if self.decay not in ("step", "cosine", "polynomial"):
            raise ValueError(f"no schedule {self.decay!r}; use step, cosine or polynomial")
        if self.loss not in ("softmax", "sigmoid"):
            raise ValueError(f"no loss {self.loss!r}; use softmax or sigmoid")
        if self.loss == "sigmoid" and self.label_smoothing:
            raise ValueError("label smoothing is for the softmax loss; use loss='softmax' or label_smoothing=0")

    @property
    def base_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        mini = float(self.model.partition("x")[2]) < 1
        return linear_scaling(self.batch_size, 0.1, 128) if mini else linear_scaling(self.batch_size)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if self.decay == "cosine":
            return warmup_cosine_lr(step, self.base_lr, self.warmup_steps, self.steps)
        if self.decay == "polynomial":
            return warmup_polynomial_lr(step, self.base_lr, self.warmup_steps, self.steps)
        decay_steps = [round(fraction * self.steps) for fraction in self.decay_at]
        return warmup_step_lr(step, self.base_lr, self.warmup_steps, decay_steps)

    def command(self) -> str:
        """The command line that trains this model."""
        words = [f"--model {self.model} --data {self.data} --steps {self.steps}"]
        for item in dataclasses.fields(self)[3:]:
            value = getattr(self, item.name)
            if value != item.default:
                text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                words.append(f"--{item.name.replace('_', '-')} {text}")
        return "python -m bitlib.pretrain " + " ".join(words)


@functools.lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))


def _share(batch_size: int, rank: int, world: int) -> slice:
    """The part of a batch that one of `world` processes works on."""
    return slice(rank * batch_size // world, (rank + 1) * batch_size // world)


def shard_indices(step: int, batch_size: int, n: int, seed: int = 0, rank: int = 0, world: int = 1) -> Tensor:
    """Which examples of n a process sees at a step: its share of the batch, by arithmetic alone.

    The shares of all the processes, one after the other, are the batch of a single process, so the number of
    processes may change between two steps. Every epoch is a new permutation; more than 2^24 examples are taken
    in order, which for an endless stream of independent samples is as good.
    """
    position = step * batch_size + torch.arange(batch_size)[_share(batch_size, rank, world)]
    if n > 2**24:
        return position % n
    epoch, offset = position // n, position % n
    index = torch.empty_like(position)
    for e in epoch.unique().tolist():
        index[epoch == e] = _epoch_order(n, seed, e)[offset[epoch == e]]
    return index


def step_windows(
    step: int, batch_size: int, image: tuple[int, int], smallest: float, seed: int = 0, rank: int = 0, world: int = 1
) -> Tensor:
    """The random window of each of this process's images (height, width) in a step: long (n, 4), as in Inception crop.

    smallest: the least share of the area. A function of (seed, step) and of the image's place in the whole batch, so
    that neither a stop nor another number of processes changes a window.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    boxes = resized_crop_boxes(batch_size, *image, scale=(smallest, 1.0), generator=generator)
    return boxes[_share(batch_size, rank, world)]


def enlarge(images: Tensor, size: int) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 in [-1, 1], (N, 3, size, size), bilinear; channels innermost in memory."""
    x = normalize(images.contiguous(memory_format=torch.channels_last))
    return x if x.shape[-1] == size else F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


def upstream_batches(
    upstream, config: PretrainConfig, rank: int = 0, world: int = 1
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A function of the step: this process's share of the batch, float (n, 3, size, size), and its labels (n, groups).

    upstream.together: up to how many images are made in one call of `upstream.batch`; without it, a share at a time.
    Where shares are smaller, those of the next steps are made too. Steps may be asked for in any order, by one thread
    at a time.
    """
    shape = (config.batch_size, len(upstream), config.seed, rank, world)
    share = len(range(config.batch_size)[_share(config.batch_size, rank, world)])
    at_once = max(1, getattr(upstream, "together", 0) // share)
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def batch_fn(step: int) -> tuple[Tensor, Tensor]:
        if step not in made:
            made.clear()
            steps = range(step, max(step + 1, min(step + at_once, config.steps)))
            images, targets = upstream.batch(torch.cat([shard_indices(s, *shape) for s in steps]))
            made.update(zip(steps, zip(images.split(share), targets.split(share), strict=True), strict=True))
        images, targets = made.pop(step)
        if config.crop < 1:
            frame = tuple(images.shape[-2:])
            boxes = step_windows(step, config.batch_size, frame, config.crop, config.seed, rank, world)
            images = cut_and_resize(images, boxes, config.image_size)
        return enlarge(images, config.image_size), targets

    return batch_fn


@torch.no_grad()
def group_accuracy(
    model: nn.Module, images: Tensor, targets: Tensor, groups: Sequence, image_size: int, batch_size: int = 250
) -> dict[str, float]:
    """Top-1 accuracy within each group of labels, over the images that have one: {"character": 0.81, ...}."""
    device = next(model.parameters()).device
    right = torch.zeros(len(groups))
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        blocks = model(enlarge(images[part], image_size).to(device)).split([g.n_classes for g in groups], dim=1)
        for i, block in enumerate(blocks):
            right[i] += (block.argmax(dim=1).cpu() == targets[part, i]).sum()  # an absent label, -1, never matches
    known = (targets >= 0).sum(dim=0).clamp(min=1)
    return {group.name: round(value, 4) for group, value in zip(groups, (right / known).tolist(), strict=True)}


# %%
one = shard_indices(step=7, batch_size=10, n=33)
three = [shard_indices(step=7, batch_size=10, n=33, rank=r, world=3) for r in range(3)]
assert torch.equal(one, torch.cat(three))
epoch = torch.cat([shard_indices(step, 11, n=33) for step in range(3)])
assert torch.equal(epoch.sort().values, torch.arange(33))
print("shares of three processes:", [len(part) for part in three], "images; an epoch shows every image once")

# %% [markdown]
# GlyphNet draws 512 images in one call faster than in four calls of 128, because less of the time goes to Python. So
# `upstream_batches` has the images of four steps of 128 made together. The batches are the same to the bit.

# %%
seen = PretrainConfig(data="S", steps=10, batch_size=128, seed=3)
small = GlyphNet("S", seed=3)
for step, batch_fn in ((0, upstream_batches(small, seen)), (5, upstream_batches(small, seen))):
    for s in range(step, step + 3):
        alone, its_labels = small.batch(shard_indices(s, 128, len(small), seed=3))
        x, y = batch_fn(s)
        assert torch.equal(x, enlarge(alone, 64)) and torch.equal(y, its_labels)


# %% tags=["export"]
@dataclass
class Pretrained:
    """What `pretrain` gives back."""

    model: nn.Module
    history: History
    val: dict[str, float]


def pretrain(
    config: PretrainConfig,
    run_dir: str | os.PathLike | None = None,
    *,
    upstream=None,
    held_out=None,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    save_every: int = 500,
    eval_every: int | None = 500,
    log_every: int = 50,
    keep: int = 2,
    progress: bool | None = None,
    tensorboard: bool = False,
) -> Pretrained:
    """Pre-train a model on GlyphNet. With a run folder it can be stopped at any moment and called again.

    The folder receives checkpoints, log.jsonl and, at the end, model.safetensors and card.json. Under torchrun
    every process calls this, each works on its share of every batch, and the first one writes.
    upstream, held_out: your own data instead of GlyphNet's two splits. Like those they need a length, `groups`
    and `batch(indices) -> (uint8 images (N, 3, H, W), long labels (N, groups))`, a pure function of the indices.
    """
    rank, world, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device is None:
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"no device {device!r}; use cpu, cuda or cuda:1, for example") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{device} is asked for, but PyTorch sees no GPU here")
    if config.batch_size < world:
        raise ValueError(f"a batch of {config.batch_size} cannot be shared by {world} processes")
    joined = world > 1 and not dist.is_initialized()
    if joined:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if upstream is None:
            upstream = GlyphNet(config.data, split="train", seed=config.seed)
        if held_out is None:
            held_out = GlyphNet(config.data, split="val", seed=config.seed)
        groups = list(upstream.groups)
        if config.group_weights is not None:
            if len(config.group_weights) != len(groups):
                raise ValueError(
                    f"{len(config.group_weights)} group weights for {len(groups)} groups: "
                    + ", ".join(g.name for g in groups)
                )
            groups = [dataclasses.replace(g, weight=w) for g, w in zip(groups, config.group_weights, strict=True)]
        if config.val_images > len(held_out):
            raise ValueError(f"val_images is {config.val_images}; there are {len(held_out)}")
        classes = sum(group.n_classes for group in groups)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = load_pretrained(config.init) if config.init else create_model(config.model, classes)
        if model.name != config.model:
            raise ValueError(f"{config.init} is a {model.name}, not a {config.model}")
        if model.num_classes != classes:
            model.reset_head(classes)
        model.image_size = config.image_size
        model.to(device)

        # A group's weight is meant for the images that have a label in it; upstream_loss averages over all images.
        weighted = groups
        if config.loss == "softmax":
            share = (upstream.batch(torch.arange(min(2_000, len(upstream))))[1] >= 0).float().mean(dim=0).tolist()
            weighted = [
                dataclasses.replace(g, weight=g.weight / max(s, 1e-3)) for g, s in zip(groups, share, strict=True)
            ]

        def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
            return upstream_loss(logits, targets, weighted, config.loss, config.label_smoothing)

        val_images, val_targets = held_out.batch(torch.arange(config.val_images)) if rank == 0 else (None, None)

        def eval_fn(model: nn.Module) -> dict[str, float]:
            return group_accuracy(model, val_images, val_targets, groups, config.image_size)

        history = train(
            model,
            upstream_batches(upstream, config, rank, world),
            loss_fn,
            config.lr_at,
            config.steps,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            micro_batch=micro_batch,
            run_dir=run_dir,
            config=dataclasses.asdict(config),
            save_every=save_every,
            keep=keep,
            log_every=log_every,
            eval_fn=eval_fn,
            eval_every=eval_every,
            progress=progress,
            tensorboard=tensorboard,
        )
        model.eval()
        val = {name: value for name, value in history.evals[-1].items() if name != "step"}
        if run_dir is not None and rank == 0:
            write_model(Path(run_dir), model, config, groups, val)
        return Pretrained(model, history, val)
    finally:
        if joined:
            dist.destroy_process_group()


def write_model(run_dir: Path, model: nn.Module, config: PretrainConfig, groups: Sequence, val: dict) -> None:
    """Write model.safetensors and its card: the command, the figures, the hash."""
    about = {
        "command": config.command(),
        "config": dataclasses.asdict(config),
        "groups": [{"name": g.name, "n_classes": g.n_classes, "weight": g.weight} for g in groups],
        "images_seen": config.steps * config.batch_size,
        "val": val,
    }
    path = run_dir / "model.safetensors"
    save_checkpoint(model, path, {name: v if isinstance(v, str) else json.dumps(v) for name, v in about.items()})
    card = {
        "architecture": config.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        **about,
        "torch": torch.__version__,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    text = json.dumps(card, indent=2) + "\n"
    write_atomically(run_dir / "card.json", lambda temporary: temporary.write_text(text))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: python -m bitlib.pretrain --model R26x0.25 --data M --steps 5500 --out RUN."""
    parser = argparse.ArgumentParser(
        prog="python -m bitlib.pretrain",
        description="Pre-train a model on GlyphNet. Stop it at any moment; the same command goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    about = {
        "model": "the architecture, such as R26x0.25 or R50x1",
        "data": "the size of GlyphNet: S, M or L",
        "steps": "optimiser steps",
        "batch_size": "images a step, over all processes",
        "lr": "the highest learning rate; left out, 0.1 x batch / 128 for minis and the paper's 0.03 x batch / 256",
        "warmup_steps": "steps of linear warm-up",
        "decay": "step, cosine or polynomial",
        "decay_at": "the shares of the steps at which --decay step divides the rate by 10",
        "weight_decay": "the factor of half the squared norm of the weights",
        "label_smoothing": "the share of probability that the softmax targets spread over all classes",
        "loss": "softmax (one a group of labels) or sigmoid (one question a class)",
        "group_weights": "a weight for each group of labels, instead of the data set's",
        "clip_norm": "scale gradients down to this norm",
        "image_size": "enlarge the images to this many pixels a side",
        "init": "a checkpoint to start from: a path or a name",
        "crop": "show a random window of each image, at least this share of its area; 1 shows all of it",
        "val_images": "how many validation images",
    }
    kinds = {"group_weights": float, "decay_at": float, "lr": float, "clip_norm": float}
    for item in dataclasses.fields(PretrainConfig):
        many = {"nargs": "+"} if item.name in ("decay_at", "group_weights") else {}
        kind = kinds.get(item.name, str if item.default is None else type(item.default))
        parser.add_argument(
            f"--{item.name.replace('_', '-')}", type=kind, default=item.default, help=about.get(item.name, " "), **many
        )
    parser.add_argument("--out", required=True, metavar="RUN", help="the run folder")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; the GPU where there is one by default")
    parser.add_argument("--micro-batch", type=int, help="work through a batch in parts of at most this many images")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--eval-every", type=int, default=500, help="steps between evaluations")
    parser.add_argument("--log-every", type=int, default=50, help="steps between lines of the log")
    parser.add_argument("--keep", type=int, default=2, help="how many checkpoints to keep")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard files to RUN/tensorboard")
    args = vars(parser.parse_args(argv))
    out = args.pop("out")
    chosen = {item.name: args.pop(item.name) for item in dataclasses.fields(PretrainConfig)}
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        config = PretrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()})
        result = pretrain(config, out, **args)
    except TrainingInterrupted as stop:
        if first:
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)
    except (TrainingError, ValueError, ImportError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if first:
        figures = ", ".join(f"{name} {100 * value:.1f} %" for name, value in result.val.items())
        print(f"{out}/model.safetensors: {config.model} after {config.steps} steps; validation top-1: {figures}")


# %% [markdown]
# Now live: R14x0.25, one block a stage, 0.64 million weights. It sees 38,400 images of GlyphNet-S at 32×32, in 600
# steps of batch 64. Everything after the colon in the command below is what a shell would take.
#
# **Before you run it:** there are 100 characters, 10 typefaces, 20 inks, 112 places in photographs, up to 6 marks to
# count, and 16 parts of the frame in which a character may stand, though nearly all stand in the middle four. Which will
# it learn first, and which hardly at all?

# %% tags=["nbval-ignore-output"]
config = PretrainConfig(
    model="R14x0.25", data="S", steps=600, batch_size=64, lr=0.05, warmup_steps=30, decay="cosine", image_size=32
)
print("the same from a shell:", config.command(), "--out RUN")
result = pretrain(config, folder / "live", eval_every=100, progress=False)
for row in result.history.evals:
    print(f"step {row['step']:3}  " + "  ".join(f"{name} {row[name]:4.0%}" for name in result.val))

# %%
history, val = result.history, result.val
start, end = (sum(part) / 20 for part in (history.loss[:20], history.loss[-20:]))
assert end < 0.7 * start, (start, end)
assert val["character"] > 0.2, "chance is 1 in 100"
_, answers = GlyphNet("S", split="val").batch(torch.arange(2_000))
constant = {  # the accuracy of always giving the most frequent answer
    group.name: (known := answers[:, i][answers[:, i] >= 0]).bincount().max().item() / len(known)
    for i, group in enumerate(GlyphNet("S").groups)
}
assert val["position"] > max(0.35, constant["position"] + 0.1) and val["count"] > constant["count"] + 0.1
assert 0.2 < constant["position"] < 0.3 and constant["count"] < 0.25
assert val["typeface"] < 0.3, "chance is 1 in 10"
print("characters above 20 %, typeface below 30 %, the loss down by 30 %;")
print("ten points or more above always giving the most frequent answer: position and count")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels over 600 steps. Above, the loss, noisy, starts near 9, rises slightly while the rate warms up and falls to between 4 and 5. Below, the norm of the gradient on a logarithmic axis, within a factor of a few throughout."}}
figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(6.4, 4.8))
smooth = F.avg_pool1d(torch.tensor(history.loss)[None, None], 21, stride=1)[0, 0]
above.plot(history.loss, color="C5", linewidth=0.6, label="each step")
above.plot(range(10, len(history.loss) - 10), smooth, color="C0", label="mean of 21 steps")
above.set_ylabel("loss")
above.legend()
below.semilogy(history.grad_norm, color="C1", linewidth=0.8)
below.set_ylabel("norm of the gradient")
below.set_xlabel("step")
plt.show()

# %% [markdown]
# The ink comes first and the character soon after; the typeface, a matter of a pixel here and there at this size, hardly
# comes at all. (The place seems to be known from the start, but always to name the same of the middle four parts is right
# every fourth time.) The bounds in the cell leave room, because another seed or machine gives other figures; a slow test
# holds them for five seeds.
#
# Watch both curves in any run. A loss that leaps together with the gradient's norm is a rate too high or a warm-up too
# short; a norm that collapses while the loss stands still is a network that has stopped learning.
#
# What we hold is a real, if small, upstream model, written as `model.safetensors` with a card: the command, the
# configuration, the figures, the file's hash.

# %%
card = json.loads((folder / "live" / "card.json").read_text())
print(card["architecture"], f"{card['parameters']:,} parameters,", f"{card['images_seen']:,} images seen")
assert card["sha256"] == hashlib.sha256((folder / "live" / "model.safetensors").read_bytes()).hexdigest()
again = load_pretrained(folder / "live" / "model.safetensors")
assert all(
    torch.equal(a, b) for a, b in zip(again.state_dict().values(), result.model.state_dict().values(), strict=True)
)

# %% [markdown]
# ## Two processes
#
# One machine is soon too small. In *data-parallel* training each process holds the whole network, takes its share of
# the batch, and the processes average their gradients before the step; then all have the same weights again. That is
# accumulation in space instead of time, and PyTorch's `DistributedDataParallel` does the averaging while the backward
# pass still runs. On CPUs the processes talk by gloo, on GPUs by NCCL.
#
# So the weights must be those of one process with the same global batch, up to rounding. We let `torchrun` start two
# processes, here on this machine, give them a batch of 15, which two cannot share evenly, and compare.

# %%
tiny = PretrainConfig(
    model="R14x0.25", data="S", steps=4, batch_size=15, lr=0.02, warmup_steps=0, image_size=32, val_images=50
)

words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
words += tiny.command().split()[1:] + ["--out", str(folder / "two")]
outcome = subprocess.run(
    words,
    env={**os.environ, "PYTHONPATH": str(Path(bitlib.__file__).parent.parent), "OMP_NUM_THREADS": "1"},
    capture_output=True,
    text=True,
)
assert outcome.returncode == 0, outcome.stderr
single = pretrain(tiny, progress=False).model.state_dict()
double = load_file(folder / "two" / "model.safetensors")
difference = max((single[name] - double[name]).abs().max().item() for name in single)
print("largest difference of any weight below 1e-4:", difference < 1e-4)
assert difference < 1e-4

# %% [markdown]
# A run may even change its number of processes when it is resumed, because both the data order and the checkpoint are
# those of the whole.
#
# ## Your own pictures upstream
#
# The largest GlyphNet is endless and never shows the same picture twice, so it needs no augmentation; a flip would make
# characters that do not exist. Photographs are finite. BiT cut a random window out of each, resized it to 224×224 and
# flipped half of them {cite}`kolesnikov2020big`. It calls that an "Inception crop": of 8 to 100 % of the area in the paper
# of that name {cite}`szegedy2015going`, of 5 to 100 % in the authors' later code {cite}`bigvision_code`. The option `crop`
# cuts such windows, of that share of the area at least; whether the labels survive it, nobody but you can know.
#
# `pretrain` takes any data with three things: a length, `groups`, and a `batch` that is a pure function of the indices.
# Flips, or whatever else you do to a picture, belong in there. A crop seeded with the index makes finite pictures
# endless: index $i$ is picture $i \bmod n$ with crop number $i$.


# %%
class Pictures:
    """uint8 pictures (n, 3, H, W) with one class each, shown `times` times, cropped differently each time."""

    def __init__(self, pictures, classes, size, times):
        self.pictures, self.classes, self.size, self.times = pictures, classes, size, times
        self.groups = (LabelGroup("class", int(classes.max()) + 1, 1.0),)

    def __len__(self):
        return len(self.pictures) * self.times

    def batch(self, indices):
        chosen = [i % len(self.pictures) for i in indices.tolist()]
        crops = [
            random_resized_crop(self.pictures[c : c + 1], self.size, generator=torch.Generator().manual_seed(i))
            for c, i in zip(chosen, indices.tolist(), strict=True)
        ]
        return torch.cat(crops), self.classes[chosen][:, None]


has_photograph = (labels[:300, 3] >= 0).long()
pictures = Pictures(images[:200], has_photograph[:200], size=32, times=100)
held_out = Pictures(images[200:300], has_photograph[200:], size=32, times=1)  # other pictures, to validate on
own = dataclasses.replace(tiny, data="my pictures", val_images=100)
print(f"{len(pictures):,} crops;", pretrain(own, upstream=pictures, held_out=held_out, progress=False).model.head)

# %% [markdown]
# ## The shipped models, and BiT's own
#
# The book ships `BiT-mini-S`, `-M` and `-L`: R26x0.25, trained by the very command on their cards, for longer than a
# page allows; and a smaller and a larger network, trained as BiT-mini-M was. The largest is stored in float16, in half
# the bytes, and its card gives what the rounded weights reach.
#
# All of them keep the full rate for 70 % of the steps and drop it by ten there, at 85 and at 95 %, where the paper's
# 30, 60 and 80 of 90 epochs would have dropped it after a third: a short run has no steps to lose at a small rate. The
# full rate is 0.1 at batch 128, nearly seven times the paper's for that batch, after a warm-up of 100 steps; nobody
# searched for a better one. This cell prints what the cards say.

# %%
from bitlib.checkpoints import MINI_NAMES

for name in MINI_NAMES:
    card = json.loads(shipped_file(f"checkpoints/{name}.json").read_text())
    print(f"{name}: {card['command']}")
    print("    " + ", ".join(f"{group} {value:.1%}" for group, value in card["val"].items()))

# %% [markdown]
# The small one's command has two options more. In 6,000 steps it sees each of its 10,000 images 77 times, and without
# these options its accuracy on others stood still after a sixth of them. `--crop 0.3` shows a random window of an image
# each time, at least three tenths of its area; `--weight-decay 0.0005` is five times the default. We trained on
# GlyphNet-S in three ways and kept the one with the best accuracy on upstream's validation images.
# `tools/upstream_curves.py` collected the curves.

# %% mystnb={"image": {"alt": "Validation accuracy in characters against steps, three lines. With whole images it stands still at about seventy per cent from step 500 on; with windows it goes on rising, and it jumps where the rate drops, furthest with the larger weight decay."}}
curves = json.loads(shipped_file("results/upstream_s.json").read_text())["runs"]
own = json.loads(shipped_file("checkpoints/BiT-mini-S.json").read_text())
fig, ax = plt.subplots()
for run, style in zip(curves, ("o:", "s--", "^-"), strict=True):
    name = run["command"].partition("0.95")[2].strip() or "whole images"
    ax.plot(run["steps"], [100 * value for value in run["val"]["character"]], style, label=name)
    print(f"{name}: " + ", ".join(f"{group} {values[-1]:.1%}" for group, values in run["val"].items()))
ax.set(xlabel="steps", ylabel="characters right, validation images (%)")
ax.legend()
plt.show()
best = max(curves, key=lambda run: run["val"]["character"][-1])
assert best["command"] == own["command"] and best["val"]["character"][-1] == own["val"]["character"]
whole = curves[0]["val"]["character"]
assert max(whole) - whole[1] < 0.01  # nothing gained after step 1,000
assert min(run["val"]["character"][-1] for run in curves[1:]) > whole[-1] + 0.1
assert all(run["val"]["position"][-1] < curves[0]["val"]["position"][-1] - 0.05 for run in curves[1:])

# %% [markdown]
# One kind of label surely pays for it: where a character stands. Where a thing stands in a window is not where it stood
# in the image, while the label stays. (A window may cut marks away too, so the count may pay as well; some 250 of the
# validation images show marks, too few to tell.) BiT crops its upstream images too {cite}`kolesnikov2020big`; its labels,
# what kind of thing an image shows, mostly survive that.

# %% [markdown]
# Is more upstream better? `tools/scaling.py` measures it in the way that needs the least tuning: ridge regression on
# frozen features, which chooses its strength within the training examples, ten seeds, for each shipped checkpoint and for
# the same network untrained. Two tasks:
# handwritten digits, and characters that no size of GlyphNet shows, learned in one typeface and recognised in another.
# These are results of a mini on GlyphNet, and of three commands that differ in more than the data; below we compare with
# all else equal.

# %%
scaling = json.loads(shipped_file("results/scaling.json").read_text())
top1 = {
    (row["task"], row["upstream"], row["shots"]): 100 * torch.tensor(row["top1"], dtype=torch.float64)
    for row in scaling["rows"]
    if row["architecture"] == "R26x0.25"
}
upstreams = [name for name in ("none", "S", "M", "L") if ("digits", name, 1) in top1]
print(f"{'R26x0.25, top-1 in %':26}" + "".join(f"{f'{shots} shots':>14}" for shots in (1, 5, 10, 25)))
for task in ("digits", "characters"):
    for name in upstreams:
        cells = [top1[task, name, shots] for shots in (1, 5, 10, 25)]
        print(f"{task:11} upstream {name:6}" + "".join(f"{c.mean():8.1f} ± {c.std():3.1f}" for c in cells))
for task in ("digits", "characters"):
    for shots in (1, 5, 10, 25):
        assert (top1[task, "M", shots] > top1[task, "none", shots] + 10).all()  # at every seed
for shots in (1, 5, 10, 25):
    small, medium, large = (top1["characters", name, shots] for name in "SML")
    assert (medium > small + 10).all() and large.mean() > medium.mean() + 2
    small, medium, large = (top1["digits", name, shots] for name in "SML")
    assert medium.mean() > small.mean() + 0.5 and abs((large - medium).mean()) < medium.std()

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, digits and unseen characters. Top-1 against examples a class, one line with error bars for each upstream. The lines of the pre-trained networks lie far above that of the untrained one, which on the characters stays near chance."}}
fig, axes = plt.subplots(1, 2, sharey=True)
for ax, task in zip(axes, ("digits", "characters"), strict=True):
    for name, style in zip(upstreams, ("o:", "s--", "^-", "D-."), strict=False):
        cells = [top1[task, name, shots] for shots in (1, 5, 10, 25)]
        label = "untrained" if name == "none" else f"BiT-mini-{name}"
        ax.errorbar((1, 5, 10, 25), [c.mean() for c in cells], [c.std() for c in cells], fmt=style, label=label)
    ax.set(xscale="log", xlabel="examples a class", title=task)
    ax.set_xticks((1, 5, 10, 25), ("1", "5", "10", "25"))
axes[0].set(ylabel="top-1, %")
axes[0].legend()
plt.show()

# %% [markdown]
# On the unseen characters each larger upstream is better, at every number of examples. On the digits M is better than S,
# the more so the fewer the examples, and L is no better than M: beyond a thousand characters more of them do not help to
# read ten digits.
#
# ### Data and size together
#
# More data for a larger network: that is BiT's recipe. In the paper's figure the small network gains nothing from the
# largest upstream, the large one much {cite}`kolesnikov2020big`. `tools/size_grid.py` pre-trains three networks on each
# of the three sizes of GlyphNet, all nine for the same number of steps at the same rate, and measures them as above, on
# ten draws of examples; untrained, each with five draws of its weights. The error bars are standard deviations over the
# draws. Each network was pre-trained once, so they do not show how much another pre-training would differ.

# %% mystnb={"image": {"alt": "Two panels, digits and unseen characters, with ten examples a class. Top-1 against the size of the upstream, none, S, M and L, one line with error bars for each of three networks."}}
grid = json.loads(shipped_file("results/size_grid.json").read_text())
nets, sizes = ("R14x0.25", "R26x0.25", "R26x0.5"), ("none", "S", "M", "L")
few = {}  # (network, upstream, task, examples a class) -> top-1 of each draw, in per cent
for row in grid["rows"]:
    few.setdefault(tuple(row[key] for key in ("architecture", "upstream", "task", "shots")), []).extend(row["top1"])
few = {key: 100 * torch.tensor(values, dtype=torch.float64) for key, values in few.items()}
fig, axes = plt.subplots(1, 2, sharey=True)
for ax, task in zip(axes, ("digits", "characters"), strict=True):
    for i, (net, style) in enumerate(zip(nets, ("o:", "s--", "^-"), strict=True)):
        cells = [few[net, size, task, 10] for size in sizes]
        x = [place + 0.06 * (i - 1) for place in range(4)]
        ax.errorbar(x, [c.mean() for c in cells], [c.std() for c in cells], fmt=style, label=net)
    ax.set(xlabel="upstream", title=task)
    ax.set_xticks(range(4), sizes)
axes[0].set(ylabel="top-1 with 10 examples a class, %")
axes[0].legend()
plt.show()

# %%
val = {(row["architecture"], row["upstream"]): row["val"] for row in grid["networks"]}
weights = {row["architecture"]: row["parameters"] for row in grid["networks"] if row["upstream"] == "S"}
print(f"{grid['about']['steps']:,} steps each; characters right on upstream's validation images,")
print("then top-1 with 10 examples a class; in %")
print(f"{'':21}" + "".join(f"{size:>12}" for size in sizes))
for net in nets:
    print(f"{net}, {weights[net] / 1e6:.1f} million parameters")
    print(f"{'  upstream':21}{'-':>12}" + "".join(f"{100 * val[net, size]['character']:12.1f}" for size in sizes[1:]))
    for task in ("digits", "characters"):
        cells = [few[net, size, task, 10] for size in sizes]
        print(f"  {task:19}" + "".join(f"{f'{c.mean():.1f} ± {c.std():.1f}':>12}" for c in cells))

# %% [markdown]
# From S to M every network gains, on the unseen characters more than twenty-five points at every draw. From M to L none
# does, and the smaller the network, the more it loses: on the unseen characters more than five points, about four, and
# nothing. In 3,000 steps GlyphNet-L shows many more characters, each fewer times, and by then no network tells half of
# them apart. More data asks for a larger network, as in the paper, and for more steps: BiT-mini-L, the same R26x0.25
# after 14,000, was ahead of BiT-mini-M on the unseen characters in the table before.
#
# The widest network is the best after each upstream. Depth alone bought less: on the digits
# R26x0.25 is no better than R14x0.25 after GlyphNet-M, and untrained it is ten points worse.

# %%
loss = {}
for net in nets:
    small, medium, large = (few[net, size, "characters", 10] for size in "SML")
    assert (medium > small + 25).all()
    loss[net] = (medium - large).mean().item()
    assert (few[net, "M", "digits", 10] - few[net, "L", "digits", 10]).mean() > 1
    for size in "SML":
        for task in ("digits", "characters"):
            assert few["R26x0.5", size, task, 10].mean() >= few[net, size, task, 10].mean()
assert max(val[net, "L"]["character"] for net in nets) < 0.5 < min(val[net, "M"]["character"] for net in nets)
assert loss["R14x0.25"] > 5 and 3 < loss["R26x0.25"] < 5 and abs(loss["R26x0.5"]) < 0.5
assert top1["characters", "L", 10].mean() > top1["characters", "M", 10].mean() + 1
assert abs((few["R26x0.25", "M", "digits", 10] - few["R14x0.25", "M", "digits", 10]).mean()) < 1
assert 9 < (few["R14x0.25", "none", "digits", 10].mean() - few["R26x0.25", "none", "digits", 10].mean()) < 11
print("points lost on unseen characters from M to L:", {net: round(value, 1) for net, value in loss.items()})

# %% [markdown]
# Three thousand steps compare, but do not make a model to use. So the book ships the two other networks as well, after
# BiT-mini-M's own command with another `--model`: 12,000 steps on GlyphNet-M. The same two tasks:

# %%
names = {net: "BiT-mini-M" if net == "R26x0.25" else f"BiT-mini-M-{net}" for net in nets}
longer = {net: json.loads(shipped_file(f"checkpoints/{name}.json").read_text()) for net, name in names.items()}
sized = {
    (row["task"], row["architecture"], row["shots"]): 100 * torch.tensor(row["top1"], dtype=torch.float64)
    for row in scaling["rows"]
    if row["upstream"] == "M"
}
print("upstream, characters right: " + ", ".join(f"{net} {longer[net]['val']['character']:.1%}" for net in nets))
print(f"{'GlyphNet-M, top-1 in %':26}" + "".join(f"{f'{shots} shots':>14}" for shots in (1, 5, 10, 25)))
for task in ("digits", "characters"):
    for net in nets:
        cells = [sized[task, net, shots] for shots in (1, 5, 10, 25)]
        print(f"{task:11} {net:13}" + "".join(f"{c.mean():8.1f} ± {c.std():3.1f}" for c in cells))
for smaller, larger in zip(nets, nets[1:], strict=False):
    assert longer[smaller]["command"].replace(smaller, larger) == longer[larger]["command"]
    assert longer[smaller]["val"]["character"] < longer[larger]["val"]["character"]
    for shots in (1, 5, 10, 25):
        assert sized["characters", larger, shots].mean() > sized["characters", smaller, shots].mean() + 1
for shots in (5, 10, 25):
    means = [sized["digits", net, shots].mean() for net in nets]
    assert max(means) - min(means) < 1

# %% [markdown]
# Each larger network has learned its upstream better, and is better on the unseen characters, at every number of examples.
# On the digits, from five examples a class on, the three lie within a point of each other: for that task the smallest
# network would do, and the same upstream serves them all.

# %% [markdown]
# ### Which norm, and are filters standardized?
#
# {doc}`02_group_normalization` and {doc}`03_weight_standardization` gave reasons for group normalization (GN) and weight
# standardization (WS). The paper gives a table: a ResNet-50 with each of the four combinations, batch 4,096, its accuracy
# on ImageNet and its mean over the tasks of VTAB {cite}`kolesnikov2020big`. `tools/norm_ablation.py` does the same small:
# R26x0.25 on GlyphNet-S, batch 128, several pre-trainings of each combination with its own best of three rates. The rate
# was chosen after 200 steps with another seed, where plain GN and plain BN still read few characters, so for these two
# the choice says little.

# %%
ablation = json.loads(shipped_file("results/norm_ablation.json").read_text())
paper = {"BN": (75.6, 67.72), "BN+WS": (75.8, 66.78), "GN": (70.2, 68.77), "GN+WS": (76.0, 70.39)}
runs = {name: [row for row in ablation["rows"] if row["variant"] == name] for name in paper}
ours = {
    name: {
        **{kind: [100 * row["val"][kind] for row in rows] for kind in ("character", "ink")},
        **{task: [100 * row["few_shot"][task] for row in rows] for task in ("digits", "characters")},
    }
    for name, rows in runs.items()
}
print(f"ours: {ablation['about']['steps']} steps, mean ± standard deviation over {len(runs['BN'])} pre-trainings")
print("best of three rates: " + ", ".join(f"{name} {rows[0]['rate']}" for name, rows in runs.items()))
print("character, ink: upstream; digits, unseen characters: ridge, 10 examples")
print(
    f"{'':6}{'paper: ImageNet  VTAB':>22}" + "".join(f"{name:>12}" for name in ("character", "ink", "digits", "unseen"))
)
for name, (imagenet, vtab) in paper.items():
    cells = [torch.tensor(values, dtype=torch.float64) for values in ours[name].values()]
    print(f"{name:6}{imagenet:15.1f}{vtab:7.2f}" + "".join(f"{f'{c.mean():.1f} ± {c.std():.1f}':>12}" for c in cells))
for gn_ws, gn, bn_ws, bn in zip(*(runs[name] for name in ("GN+WS", "GN", "BN+WS", "BN")), strict=True):
    assert gn_ws["seed"] == gn["seed"] == bn_ws["seed"] == bn["seed"]
    assert gn_ws["val"]["character"] > gn["val"]["character"] + 0.05
    assert gn_ws["few_shot"]["characters"] > gn["few_shot"]["characters"] + 0.03
    assert gn_ws["val"]["ink"] > max(other["val"]["ink"] for other in (gn, bn_ws, bn)) + 0.02
    assert bn_ws["val"]["character"] > max(gn_ws["val"]["character"], bn["val"]["character"])
    assert bn_ws["few_shot"]["digits"] > gn_ws["few_shot"]["digits"]
assert max(ours["BN"]["character"]) > min(ours["BN"]["character"]) + 20
assert max(ours["BN+WS"]["character"]) < min(ours["BN+WS"]["character"]) + 2

# %% [markdown]
# Half of it comes out as in the paper. Group normalization needs weight standardization: without it, the network reads
# fewer characters in each of the pre-trainings, and names only a fifth of the inks. With it, GN tells the inks best of
# all. Batch normalization gains from it here too, upstream and downstream: without it, one of the three pre-trainings fell
# more than twenty points behind the best, perhaps for its rate, and with it they end within two of each other. In the
# paper BN gains 0.2 points by it on ImageNet and loses 0.9 on VTAB.
#
# The other half does not. At our size BN with WS is ahead of GN with WS, in the characters upstream and on the digits
# downstream. A whole batch of 128 on one machine is the best case of batch normalization. BiT gave it up because of a
# large network only a few images fit on a device, and because its running statistics do not transfer
# {cite}`kolesnikov2020big`;
# {doc}`02_group_normalization` shows both. Nor do 800 steps of a small network decide which of two good layers is better.
# What they show is that GN without WS would not do.

# %% [markdown]
# ### What BiT-L took
#
# What would BiT-L take? The paper trained R152x4 on JFT-300M's 300 million images for 40 epochs at batch 4,096 on 512
# cores of Cloud TPUv3; BiT-M on the 14.2 million of ImageNet-21k for 90 epochs {cite}`kolesnikov2020big`. We can count
# the rest. A convolution does $C_\text{in} k^2$ multiply-adds for each number it puts out; a hook on every layer adds
# them up. On the "meta" device tensors have shapes and no contents, so even R152x4 costs nothing to run.


# %%
def multiply_adds(name, image_size=224):
    """Multiply-adds of the convolutions and the head, for one image, forwards; and the number of parameters."""
    with torch.device("meta"):
        model = create_model(name, num_classes=21_843)
        total = 0

        def count(module, inputs, output):
            nonlocal total
            per_output = module.weight[0].numel()
            total += per_output * output.numel()

        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        model(torch.empty(1, 3, image_size, image_size))
    return total, sum(p.numel() for p in model.parameters())


assert abs(multiply_adds("R50x1")[0] / 1e9 - 4.1) < 0.2  # the 4.1 billion commonly given for a ResNet-50
for name in ("R50x1", "R101x3", "R152x4"):
    work, parameters = multiply_adds(name)
    print(
        f"{name:7} {work / 1e9:6.1f} billion multiply-adds an image at 224x224, {parameters / 1e6:5.0f} million parameters"
    )

# %% [markdown]
# A multiply-add is two operations, and a training step costs three times a forward pass: one forwards, and backwards
# one for the gradient of the activations and one for that of the weights. For the time we need three assumptions, which
# you should replace by your own: the peak of one NVIDIA H100 in bfloat16, the share of it that a convolutional network
# gets, and the price of an hour. For the share there is a hint. The authors' later configuration for ImageNet says that
# R50x1 takes 32 minutes for its 90 epochs on a TPUv3 of 128 cores {cite}`bigvision_code`; what share of its peak is that?

# %%
PEAK = 989e12  # operations a second: the data sheet of the SXM version, dense
SHARE = 0.2  # of the peak, an assumption; measure yours
PRICE = 3.0  # dollars for a GPU-hour, an assumption

TPU = 123e12  # operations a second of a TPUv3 chip, which has two cores: Google's documentation
theirs = 3 * 2 * multiply_adds("R50x1")[0] * 90 * 0.99 * 1.28e6 / (32 * 60) / (64 * TPU)
print(f"share of the peak that the authors got with R50x1: {theirs:.0%}\n")
assert abs(theirs - SHARE) < 0.03

print("                        steps   operations   GPU-days   64 GPUs: days   dollars")
days = {}
for name, model, images_seen in (
    ("BiT-M R50x1", "R50x1", 90 * 14.2e6),
    ("BiT-M R152x4", "R152x4", 90 * 14.2e6),
    ("BiT-L R152x4", "R152x4", 40 * 300e6),
):
    operations = 3 * 2 * multiply_adds(model)[0] * images_seen
    days[name] = operations / (PEAK * SHARE) / 86_400
    dollars = days[name] * 24 * PRICE
    print(
        f"{name:14}{images_seen / 4096:15,.0f}{operations:13.1e}{days[name]:11,.1f}{days[name] / 64:16.1f}{dollars:10,.0f}"
    )
assert days["BiT-L R152x4"] > 2 * 365 and 1.5 < days["BiT-M R50x1"] < 2.5

# %% [markdown]
# BiT-M at R50x1 is about two days on one GPU, within reach of a patient person. (Larger networks get a larger share of the
# peak, so for them the table is rather too high.) BiT-L is in the order of two years of one GPU, and
# its data were never public. That is why the released checkpoints matter, and why this book's upstream is small enough
# to be yours.
#
# ```{admonition} Where sources disagree
# :class: note
#
# - **Label smoothing.** Common summaries of BiT name it as part of pre-training. The paper does not
#   {cite}`kolesnikov2020big`. Ours is off by default.
# - **Decay.** Summaries give a cosine or polynomial with a warm-up of 5 to 10 % of the epochs; the paper gives steps at
#   30, 60 and 80 of 90 epochs and 5,000 warm-up steps. The authors' later configurations have a cosine, after 5,000 steps
#   for ImageNet-21k and 1,000 for ImageNet {cite}`bigvision_code`. All are here; `pretrain` drops the rate where the
#   paper does unless told otherwise, after a warm-up of 100 steps, since its runs are short.
# - **Clipping.** The paper names none. The same configurations clip the gradient's norm at 1, and for ImageNet have a rate
#   of 0.1 for 256 images instead of 0.03.
# - **Length on JFT.** Summaries say 7 to 14 epochs, the paper 40.
# - **Momentum.** One summary writes $v \leftarrow \mu v - \eta g$; PyTorch and the released code use
#   $v \leftarrow \mu v + g$. They differ whenever the rate changes.
# - **Weight decay.** One summary writes $\lambda \lVert\theta\rVert^2$, another $\frac{\lambda}{2} \lVert\theta\rVert^2$.
#   The gradients are $2\lambda\theta$ and $\lambda\theta$, so the same $\lambda$ means twice the decay in the first. PyTorch's
#   `weight_decay`, and ours, is the second.
# - **Loss.** The paper does not say which; softmax is what summaries assume. An author named the sigmoid for
#   ImageNet-21k, and the later configurations have it there, and softmax for ImageNet.
# - **Cosine.** One summary has $\eta_t = \eta_0 \cos(t / T)$. As written, that ends at $0.54\, \eta_0$; what is meant is
#   $\frac{\eta_0}{2} (1 + \cos \pi t / T)$.
# ```
#
# ## Exercises
#
# **1. A year in steps.** BiT-L divides its rate by 10 after 10, 23, 30 and 37 epochs. Write
# `my_decay_steps(epochs, n_images, batch_size)` that turns a list of epochs into a list of steps, rounded to whole ones.

# %% tags=["check", "hide-cell"]
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


# %% tags=["exercise"]
def my_decay_steps(epochs: list[int], n_images: int, batch_size: int) -> list[int]: ...


# check_decay_steps(my_decay_steps)


# %% tags=["solution", "hide-input"]
def my_decay_steps(epochs, n_images, batch_size):
    return [round(epoch * n_images / batch_size) for epoch in epochs]


check_decay_steps(my_decay_steps)

# %% [markdown]
# **2. Prediction minus target.** Derive the gradient of the smoothed cross-entropy {eq}`eq-smoothing`, averaged over $N$
# images, with respect to the logits, and write it without autograd.


# %% tags=["exercise"]
def my_gradient(logits: Tensor, target: Tensor, a: float) -> Tensor: ...


# check_softmax_gradient(my_gradient)


# %% tags=["solution", "hide-input"]
def my_gradient(logits, target, a):
    n, k = logits.shape
    q = (1 - a) * F.one_hot(target, k) + a / k
    return (logits.softmax(dim=1) - q) / n


check_softmax_gradient(my_gradient)

# %% [markdown]
# **3. The other momentum.** Write one step of $v \leftarrow \mu v - \eta g$, $\theta \leftarrow \theta + v$. Then try it in
# the valley of the first section, with the rate divided by ten at step 100: which form is ahead at step 110, and which
# at step 120?


# %% tags=["exercise"]
def my_step(theta, v, g, lr, mu): ...


# check_other_momentum(my_step)


# %% tags=["solution", "hide-input"]
def my_step(theta, v, g, lr, mu):
    v = mu * v - lr * g
    return theta + v, v


check_other_momentum(my_step)


def loss_in_the_valley(step_of, steps):
    h, loss = torch.tensor([1.0, 1 / 300], dtype=torch.float64), {}
    theta, v = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for step in range(max(steps) + 1):
        loss[step] = 0.5 * (h * theta.square()).sum().item()
        theta, v = step_of(theta, v, h * theta, (2 if step < 100 else 0.2) / h.sum().item(), 0.9)
    return [loss[step] for step in steps]


ours = loss_in_the_valley(lambda theta, v, g, lr, mu: (theta - lr * (mu * v + g), mu * v + g), (110, 120))
other = loss_in_the_valley(my_step, (110, 120))
print(
    "at steps 110 and 120:", *(f"{a:.0e} in ours, {b:.0e} in the other form;" for a, b in zip(ours, other, strict=True))
)
assert ours[0] < other[0] and ours[1] > other[1]  # the other one swings through the valley, so it depends on the step

# %% [markdown]
# **4. How low should the bias start?** With the sigmoid loss and $K$ classes of which one is right, choose the bias of
# the head such that every class starts at probability $1/K$. Show that the first loss is then
# $\log K + (K - 1) \log \frac{K}{K - 1} \approx 1 + \log K$, instead of $K \log 2$. (The authors' configuration for
# ImageNet-21k starts it at $-10$ {cite}`bigvision_code`. What do you get for its 21,843 classes?)


# %% tags=["exercise"]
def my_bias(n_classes: int) -> float: ...


# check_initial_bias(my_bias)


# %% tags=["solution", "hide-input"]
def my_bias(n_classes):
    return -math.log(n_classes - 1)


check_initial_bias(my_bias)

# %% [markdown]
# ## What to remember
#
# - Momentum hurries the flat directions and calms the steep ones. PyTorch multiplies the *whole* velocity by today's
#   rate.
# - Warm up, then decay. Written as functions of the step, schedules resume by themselves.
# - Label smoothing makes the optimum finite. The sigmoid asks each class by itself; start its bias low.
# - The rate grows with the batch, as long as the gradients do not change much from one step to the next.
# - The parts of a batch count by their size. Divide by images, not by labels, and parts and processes add up exactly.
# - A batch that is a function of the step, and a checkpoint that is whole or absent: that is all that exact resumption
#   takes.
#
# Next: fine-tuning wants a learning rate, a length and a resolution for every data set. The BiT-HyperRule says what they
# are.
