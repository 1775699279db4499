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
#     module: hyperrule
#     summary: The BiT-HyperRule, data set size and image size in, every hyper-parameter out; and MixUp.
# ---

# %% [markdown]
# # The BiT-HyperRule
#
# At the end of this chapter you can name every hyper-parameter of a fine-tuning run from two facts about the
# data, how many labelled images there are and how large they are, and you know which of those values come
# from the paper, which from the released code, and where the two differ.
#
# **Runtime:** about 10 seconds on two CPU cores. **Builds on:** the network of the ResNet-v2 chapter and the
# schedules of the pre-training chapter.

# %% tags=["setup", "remove-cell"]
# Does nothing outside Colab; there it installs the book's package and what the chapters need.
import sys

if "google.colab" in sys.modules:
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", 'install -q "bitlib[book] @ git+https://github.com/OWNER/REPOSITORY"')

# %%
import itertools
import json

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from bitlib.data import load_task, normalize, resize, shipped_file
from bitlib.pretrain import shard_indices
from bitlib.resnet import create_model

plt.style.use(shipped_file("book.mplstyle"))

# %% [markdown]
# ## The problem: two knobs are already too many
#
# Fine-tuning asks for a learning rate, a number of steps, a batch size, a resolution, a crop, a decay, a
# warm-up, a weight decay and an augmentation. Nobody knows them for a new data set, and few people can afford
# to search.
#
# To see how much hangs on the choice, take the smallest possible learner, one linear layer from zero on the
# pixels of 100 scanned digits, and turn only two knobs: learning rate and number of steps. Before you run it:
# if you halve the learning rate and double the number of steps, what changes?

# %%
task = load_task("digits")


def pixels(dataset, n):
    images = torch.stack([dataset[i][0] for i in range(n)])
    labels = torch.tensor([dataset[i][1] for i in range(n)])
    return normalize(resize(images, 8)).flatten(1), labels


def linear_accuracy(lr, steps, train, test):
    weight = torch.zeros(train[0].shape[1], 10, requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(F.cross_entropy(train[0] @ weight, train[1]), weight)
        weight = (weight - lr * gradient).detach().requires_grad_()
    return ((test[0] @ weight).argmax(1) == test[1]).double().mean().item()


train, test = pixels(task.train, 100), pixels(task.test, len(task.test))
rates, lengths = [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1], [10, 30, 100, 300]
accuracy = torch.tensor([[linear_accuracy(lr, steps, train, test) for lr in rates] for steps in lengths])
best, median, worst = (f"{100 * a:.0f} %" for a in (accuracy.max(), accuracy.median(), accuracy.min()))
print(f"best {best}, median {median}, worst {worst}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Heat map of test accuracy over learning rate and number of steps. Accuracy is low in the corner of small rates and few steps, high in the corner of large rates and many steps, and about equal along the diagonals where rate times steps is constant."}}
fig, ax = plt.subplots()
image = ax.imshow(100 * accuracy, origin="lower", aspect="auto", cmap="cividis")
ax.set_xticks(range(len(rates)), rates)
ax.set_yticks(range(len(lengths)), lengths)
ax.set_xlabel("learning rate")
ax.set_ylabel("number of steps")
ax.grid(False)
for i in range(len(lengths)):
    for j in range(len(rates)):
        dark = accuracy[i, j] < accuracy.mean()
        ax.text(j, i, f"{100 * accuracy[i, j]:.0f}", ha="center", va="center", color="white" if dark else "black")
fig.colorbar(image, label="test accuracy (%)")
plt.show()

# %% [markdown]
# The same data and the same model, and the accuracy differs by tens of points:

# %%
assert accuracy.max() - accuracy.min() > 0.25
diagonal = [accuracy[i, j] for i, j in ((3, 1), (2, 2), (1, 3), (0, 4))]  # rate x steps = 0.3
print("rate x steps = 0.3:", [f"{100 * a:.0f} %" for a in diagonal])
assert max(diagonal) - min(diagonal) < 0.05

# %% [markdown]
# Along a diagonal of the table, where rate × steps is constant, almost nothing changes. So to first order
# there is one quantity, *how far the weights may move*, and only because rate and length trade against each
# other does it look like two. That is why a rule that fixes the rate once and for all and varies only the
# length has a chance.
#
# How much does it give up? The paper's appendix A measures it: 40 random settings were tried for each of the
# 19 tasks of VTAB-1k, and the best by a validation split were kept {cite}`kolesnikov2020big`.

# %%
# BiT-L on VTAB-1k, mean accuracy in %, from appendix A of the paper
searched, rule_alone, trials = 78.72, 76.29, 40
print(f"{trials} trainings a task gain {searched - rule_alone:.2f} points over one training by the rule")
assert round(searched - rule_alone, 2) == 2.43

# %% [markdown]
# Forty times the cost buys 2.43 points. The BiT-HyperRule is the other end of the bargain: *one* training, no
# search.
#
# ## The rule
#
# Most values are constants: SGD with momentum 0.9, learning rate 0.003, batch size 512, no weight decay
# {cite}`kolesnikov2020big`. Three depend on the data:
#
# | number of labelled images $n$ | class | steps | MixUp |
# |---|---|---|---|
# | $n < 20{,}000$ | small | 500 | no |
# | $20{,}000 \le n < 500{,}000$ | medium | 10,000 | $\alpha = 0.1$ |
# | $n \ge 500{,}000$ | large | 20,000 | $\alpha = 0.1$ |
#
# | image area | resize to | crop |
# |---|---|---|
# | $h \cdot w < 96^2$ | 160×160 | 128×128 |
# | otherwise | 448×448 | 384×384 |
# | otherwise, with R152x4 | 512×512 | 480×480 |
#
# The learning rate falls by a factor of 10 at 30 %, 60 % and 90 % of the steps. That is the entire rule. We
# write it as a function that returns a small frozen record, so that a run can store it, print it, and compare
# it with another.

# %% tags=["export"]
import math
import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

VARIANTS = ("paper", "official", "simplified")

# What a mini (any net narrower than x1) is fine-tuned with, in place of the paper's 0.003 at batch 512 and
# 160 -> 128. The batch makes 500 steps a matter of a minute on two CPU cores. The rate is a separate choice:
# linear scaling would give 0.003 * 32 / 512 = 0.0001875, at which 500 steps hardly move a net of this width.
# It was picked on validation images, never on test images; the chapter says how.
MINI_BATCH_SIZE = 32
MINI_BASE_LR = 0.03
MINI_RESIZE = 80
MINI_CROP = 64


@dataclass(frozen=True)
class Rule:
    """Every hyper-parameter of one fine-tuning run.

    Steps count from 0: a run performs steps 0, 1, ..., `steps - 1`; `lr(step)` is the rate that step uses.

    steps: optimiser steps in all.
    warmup_steps: length of the linear warm-up from 0; 0 means none.
    decay_steps: the first step of each rate ten times smaller; empty for a cosine.
    base_lr, momentum, weight_decay: of SGD. batch_size: images an optimiser step.
    resize, crop: side in pixels of the square that an image is resized to, and of the random crop taken from
        it. At evaluation the image is resized straight to `crop`, without cropping.
    mixup_alpha: MixUp draws its weight from Beta(alpha, alpha); 0 means no MixUp.
    decay: "step" (by 10 at each of decay_steps) or "cosine" (from the end of the warm-up to 0 at `steps`).
    flip, random_crop: augmentations to turn off where they change the label, such as the flip of a letter.
    """

    steps: int
    warmup_steps: int
    decay_steps: tuple[int, ...]
    base_lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    resize: int
    crop: int
    mixup_alpha: float
    decay: str = "step"
    flip: bool = True
    random_crop: bool = True
    variant: str = "paper"

    def lr(self, step: int) -> float:
        """The learning rate of step 0 <= step < steps; ValueError outside."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is not part of this run; its {self.steps} steps are 0 to {self.steps - 1}")
        if step < self.warmup_steps:
            return self.base_lr * step / self.warmup_steps
        if self.decay == "cosine":
            progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
            return self.base_lr * 0.5 * (1 + math.cos(math.pi * progress))
        rate = self.base_lr
        for first in self.decay_steps:
            if step >= first:
                rate /= 10
        return rate

    def scaled(self, batch_size: int) -> "Rule":
        """The same rule at another batch size, with the learning rate in proportion (Goyal et al., 2017).

        The number of steps stays, so a smaller batch also sees fewer images.
        """
        batch_size = _positive_int(batch_size, "batch_size")
        return replace(self, batch_size=batch_size, base_lr=self.base_lr * batch_size / self.batch_size)

    def with_steps(self, steps: int) -> "Rule":
        """The same rule for another number of steps: warm-up and decays come at the same shares of the run."""
        steps = _positive_int(steps, "steps")
        decays = tuple(max(1, step * steps // self.steps) for step in self.decay_steps)
        return replace(self, steps=steps, warmup_steps=self.warmup_steps * steps // self.steps, decay_steps=decays)

    def for_mini(self) -> "Rule":
        """The same rule for a net narrower than x1 that was pre-trained at 64x64, on a small machine."""
        return replace(self, resize=MINI_RESIZE, crop=MINI_CROP, batch_size=MINI_BATCH_SIZE, base_lr=MINI_BASE_LR)

    def __str__(self) -> str:
        decay = "cosine" if self.decay == "cosine" else "/10 at " + ", ".join(f"{s:,}" for s in self.decay_steps)
        off = [name for name, on in (("no flip", self.flip), ("no random crop", self.random_crop)) if not on]
        rows = {
            "steps": f"{self.steps:,}",
            "learning rate": f"{self.base_lr:g}, {decay}",
            "warm-up": f"{self.warmup_steps} steps" if self.warmup_steps else "none",
            "batch size": str(self.batch_size),
            "SGD": f"momentum {self.momentum:g}, weight decay {self.weight_decay:g}",
            "images": ", ".join([f"resize {self.resize}, crop {self.crop}", *off]),
            "MixUp": f"alpha {self.mixup_alpha:g}" if self.mixup_alpha else "none",
        }
        return "\n".join([f"BiT-HyperRule ({self.variant})", *(f"  {k:<14} {v}" for k, v in rows.items())])


def hyperrule(
    n_examples: int,
    image_size: int | tuple[int, int],
    variant: str = "paper",
    model: nn.Module | None = None,
) -> Rule:
    """The BiT-HyperRule: every hyper-parameter from the size of the data set and of its images.

    n_examples: labelled training images. image_size: (height, width) in pixels as they come, or one number.
    variant: "paper" (Kolesnikov et al., 2020, section 3.3), "official" (the released code, whose decays come
    one step late) or "simplified" (as in common summaries: shorter runs, a cosine, no MixUp; not BiT's own).
    model: the network to be fine-tuned. R152x4 gets its larger images; a mini, which is any net narrower than
    x1, gets the scaled rule of `Rule.for_mini`. Without a model the rule is that of R50x1 to R101x3.
    Raises ValueError for a number, size or variant that means nothing.

    The paper does not state a warm-up, so variant "paper" has none; "official" warms up for 100 or 500 steps.
    """
    n = _positive_int(n_examples, "n_examples")
    height, width = _height_width(image_size)
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; use one of {', '.join(map(repr, VARIANTS))}")
    if model is not None and not hasattr(model, "num_features"):
        raise ValueError(f"model must be a network of this book (a ResNetV2), not {type(model).__name__}")

    size_class = 0 if n < 20_000 else 1 if n < 500_000 else 2
    steps = (500, 10_000, 20_000)[size_class]
    warmup_steps = 0
    decay_steps = (3 * steps // 10, 6 * steps // 10, 9 * steps // 10)
    decay = "step"
    mixup_alpha = (0.0, 0.1, 0.1)[size_class]
    large = (512, 480) if "R152x4" in getattr(model, "name", "") else (448, 384)
    if variant == "official":
        warmup_steps = (100, 500, 500)[size_class]
        decay_steps = ((201, 301, 401), (3_001, 6_001, 9_001), (6_001, 12_001, 18_001))[size_class]
        large = (512, 480)
    elif variant == "simplified":
        steps = (500, 2_500, 10_000)[size_class]
        decay_steps, decay = (), "cosine"
        mixup_alpha = 0.0
    size, crop = (160, 128) if height * width < 96 * 96 else large

    rule = Rule(
        steps=steps,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        base_lr=0.003,
        momentum=0.9,
        weight_decay=0.0,
        batch_size=512,
        resize=size,
        crop=crop,
        mixup_alpha=mixup_alpha,
        decay=decay,
        variant=variant,
    )
    is_mini = model is not None and model.num_features < 2048  # 2048 features is width x1
    return rule.for_mini() if is_mini else rule


def _positive_int(value: int, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    return number


def _height_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = tuple(image_size) if isinstance(image_size, (tuple, list, torch.Size)) else (image_size, image_size)
    if len(sides) != 2:
        raise ValueError(f"image_size must be (height, width) in pixels or one number, not {image_size!r}")
    return _positive_int(sides[0], "image_size"), _positive_int(sides[1], "image_size")


# %%
print(hyperrule(n_examples=1_000, image_size=(32, 32)))
print(hyperrule(n_examples=50_000, image_size=(32, 32)))

# %% [markdown]
# ### What a step count means
#
# Steps, not epochs, is an unusual choice. A run of $T$ steps at batch $B$ over $n$ images passes over each
# image $T B / n$ times. Try to predict: how often does the rule show each image when there are 10 of them?
# When there are 19,999? 20,000?

# %%
for n in (10, 1_000, 19_999, 20_000, 50_000, 499_999, 500_000, 1_281_167):
    rule = hyperrule(n, 224)
    print(f"n = {n:>9,}: {rule.steps:>6,} steps, each image {rule.steps * rule.batch_size / n:>9,.1f} times")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Passes over each image against the number of training images, both logarithmic. The line falls as one over n from 256,000 at one image, jumps up twentyfold at 20,000 images, falls again, and doubles at 500,000."}}
counts = torch.logspace(0, 7, 2000).long().unique().tolist()
fig, ax = plt.subplots()
ax.loglog(counts, [hyperrule(n, 224).steps * 512 / n for n in counts])
for edge in (20_000, 500_000):
    ax.axvline(edge, color="black", linewidth=0.8, linestyle=":")
ax.set_xlabel("labelled training images $n$")
ax.set_ylabel("times each image is shown")
plt.show()

# %% [markdown]
# Ten images are shown 25,600 times each, and still the paper's networks do not over-fit badly. The paper uses
# neither weight decay nor dropout downstream and finds that a suitable length of the schedule regularises
# enough {cite}`kolesnikov2020big`. At the upper end of each class the number of passes is 12.8, 10.2 and (on
# ImageNet) 8.0.

# %%
assert 500 * 512 / 10 == 25_600
assert [round(t * 512 / n, 1) for t, n in ((500, 19_999), (10_000, 499_999), (20_000, 1_281_167))] == [
    12.8,
    10.2,
    8.0,
]

# %% [markdown]
# ## The schedule, and an off-by-one
#
# With steps counted from 0, the paper's staircase is
#
# $$\eta_t = \eta_0 \cdot 10^{-k(t)}, \qquad k(t) = \#\{s \in \{0.3\,T,\ 0.6\,T,\ 0.9\,T\} : s \le t\}.$$
#
# The released code {cite}`bittransfer_code` has other decay points, a warm-up, and a strict inequality: it
# counts the supports $s$ with $s < t$. So the step whose number *is* the support still runs at the higher
# rate. We write the released rule down independently of ours, in the form it takes there.


# %%
def released_lr(step, supports, base_lr=0.003):
    """The released rule in its own terms: the end of warm-up, three decays, and the end of the run."""
    warm_up, *decays, end = supports
    if step < warm_up:
        return base_lr * step / warm_up
    assert step < end
    for s in decays:
        if s < step:  # strict: this is the off-by-one
            base_lr /= 10
    return base_lr


for n, supports in (
    (19_999, (100, 200, 300, 400, 500)),
    (499_999, (500, 3_000, 6_000, 9_000, 10_000)),
    (500_000, (500, 6_000, 12_000, 18_000, 20_000)),
):
    rule = hyperrule(n, 224, variant="official")
    assert all(rule.lr(step) == released_lr(step, supports) for step in range(rule.steps))
    print(f"n = {n:>7,}: all {rule.steps:,} steps equal; decays at", rule.decay_steps)

# %% [markdown]
# Every step of every size class is equal, to the last bit. Around the first decay:

# %%
official, paper = hyperrule(1_000, 224, variant="official"), hyperrule(1_000, 224)
for step in (0, 1, 99, 100, 149, 150, 199, 200, 201):
    print(f"step {step:>3}: paper {paper.lr(step):.5f}   official {official.lr(step):.5f}")

# %% [markdown]
# Two things to see. The official rate is still 0.003 at step 200, where one would expect 0.0003. And at step
# 0 it is exactly 0: the first of the 500 steps leaves the weights as they are and only fills the momentum
# buffer. Neither matters to the result; both matter if you want to reproduce a run bit for bit.
#
# The third variant, `"simplified"`, is put together from two widely-copied summaries: the fewer steps and the missing
# MixUp of one, and the cosine {cite}`loshchilov2017sgdr` that both name in place of the staircase,
#
# $$\eta_t = \frac{\eta_0}{2} \left(1 + \cos\frac{\pi t}{T}\right).$$
#
# It is a sensible recipe. It is not BiT's.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three panels, small, medium and large data sets, each with the learning rate over steps on a logarithmic axis for three variants. Paper and official are staircases of three drops with the official's drops later in the small class and its start a short warm-up; simplified is a cosine that ends far earlier in the medium and large classes."}}
fig, axes = plt.subplots(1, 3, sharey=True, layout="constrained")
for ax, n, title in zip(axes, (1_000, 100_000, 1_000_000), ("small", "medium", "large"), strict=True):
    for variant, style in (("paper", "-"), ("official", "--"), ("simplified", ":")):
        rule = hyperrule(n, 224, variant=variant)
        grid = range(0, rule.steps, max(1, rule.steps // 1000))
        ax.semilogy(grid, [max(rule.lr(t), 1e-9) for t in grid], style, label=variant)
    ax.set_title(title)
    ax.set_xlabel("step")
    ax.set_ylim(1e-6, 6e-3)
    ax.locator_params(axis="x", nbins=3)
axes[0].set_ylabel("learning rate")
axes[0].legend()
plt.show()

# %% [markdown]
# ## The resolution
#
# The paper looks at the area of the images as they come: below $96 \times 96$ pixels they are enlarged to 160
# and cropped to 128; everything else goes to 448 and 384. Three details are easy to miss.
#
# - It is the *area* that counts, not a side: 64×144 has exactly $96^2$ pixels and counts as large.
# - The resize is to a square, whatever the aspect ratio was.
# - At test time the image is resized straight to 128 (or 384). Nothing is cropped away, so the whole object
#   is seen, a little smaller than in training.

# %%
for size in ((32, 32), (95, 96), (96, 96), (64, 144), (480, 640)):
    sizes = [(rule.resize, rule.crop) for rule in (hyperrule(1_000, size), hyperrule(1_000, size, "official"))]
    print(f"{size[0]:>3} x {size[1]:<3} (resize, crop): paper {sizes[0]}, code {sizes[1]}")

with torch.device("meta"):  # the shapes of the largest network, without its memory
    giant = create_model("R152x4")
rule = hyperrule(1_000, (480, 640), model=giant)
print(f"R152x4, 480 x 640: paper {rule.resize} -> {rule.crop}")

# %% [markdown]
# A 95×96 image is trained on as $128^2$ pixels and a 96×96 image as $384^2$: one pixel row makes the run nine
# times as expensive. That is the price of a rule with a threshold, and a reason to think before using it
# blindly near one.

# %% [markdown]
# ## MixUp
#
# The authors found MixUp {cite}`zhang2018mixup` useful for data sets of middle size and not for a few examples a class
# {cite}`kolesnikov2020big`. So for medium and large tasks the rule adds it: the net is shown a blend of two images and asked for the same blend of
# their labels,
#
# $$\tilde x = \lambda x_i + (1 - \lambda)\, x_j, \qquad \tilde y = \lambda y_i + (1 - \lambda)\, y_j, \qquad
# \lambda \sim \mathrm{Beta}(\alpha, \alpha),$$
#
# where $y$ is a one-hot vector of $K$ classes. How strong is that at $\alpha = 0.1$? The density of
# $\mathrm{Beta}(\alpha, \alpha)$ is $\lambda^{\alpha - 1} (1 - \lambda)^{\alpha - 1} / \mathrm B(\alpha,
# \alpha)$. Below $\alpha = 1$ it piles up at both ends. Guess what share of the draws mixes in less than a
# tenth of the other image.

# %%
share = {}
for alpha in (0.1, 0.4, 1.0):
    density = torch.distributions.Beta(torch.tensor(alpha, dtype=torch.float64), torch.tensor(alpha))
    inner = torch.linspace(0.1, 0.9, 100_001, dtype=torch.float64)
    share[alpha] = 1 - torch.trapezoid(density.log_prob(inner).exp(), inner).item()
    print(f"alpha {alpha}: {100 * share[alpha]:.0f} % of the draws are within 0.1 of one of the two images")
assert 0.8 < share[0.1] < 0.85

# %% tags=["hide-input"] mystnb={"image": {"alt": "Density of Beta(alpha, alpha) for alpha 0.1, 0.4 and 1. At 0.1 the curve is a deep U, almost flat near 0.2 in the middle and rising steeply at 0 and 1. At 0.4 the U is shallow, and at 1 the density is constant."}}
grid = torch.linspace(0.001, 0.999, 999)
fig, ax = plt.subplots()
for alpha in share:
    density = torch.distributions.Beta(alpha, alpha).log_prob(grid).exp()
    ax.plot(grid, density, label=rf"$\alpha = {alpha}$")
ax.set_ylim(0, 4)
ax.set_xlabel(r"$\lambda$")
ax.set_ylabel("density")
ax.legend()
plt.show()

# %% [markdown]
# Four draws in five leave the image almost alone: at $\alpha = 0.1$ MixUp is a light touch.
#
# ### One loss, two ways to write it
#
# Cross-entropy is linear in the target. With $p = \mathrm{softmax}(z)$,
#
# $$-\sum_k \tilde y_k \log p_k = -\sum_k \big(\lambda y_{ik} + (1-\lambda) y_{jk}\big) \log p_k
# = \lambda\, \mathrm{CE}(z, y_i) + (1 - \lambda)\, \mathrm{CE}(z, y_j).$$
#
# So blending the labels and blending the two losses are the same thing, and we may use whichever is handier.
# The released code blends losses. We blend labels, because then a MixUp batch is just a batch, images and
# soft targets, and the training loop of the pre-training chapter need not know about it.


# %% tags=["export"]
def mixup(images: Tensor, targets: Tensor, lam: float, permutation: Tensor) -> tuple[Tensor, Tensor]:
    """Blend every image of a batch, and its target, with another of the same batch (Zhang et al., 2018).

    images: (N, 3, H, W), already normalised. targets: (N, K), one-hot or soft; class numbers cannot be mixed.
    lam: the share of the image itself. permutation: (N,), which image to blend with.
    Returns images and targets of the same shapes.
    """
    if not targets.is_floating_point():
        raise TypeError(f"targets must be (N, K) probabilities, not {targets.dtype}; use F.one_hot(...).float()")
    mixed_images = lam * images + (1 - lam) * images[permutation]
    mixed_targets = lam * targets + (1 - lam) * targets[permutation]
    return mixed_images, mixed_targets


def mixup_weight(alpha: float, generator: torch.Generator) -> float:
    """Draw lambda from Beta(alpha, alpha), one for a whole optimiser step.

    Joehnk's method: of two uniform numbers u and v take a = u^(1/alpha) and b = v^(1/alpha); if a + b <= 1,
    then a / (a + b) has the distribution wanted, otherwise draw again. Meant for the small alpha of MixUp.
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be above 0, not {alpha}; at 0 there is no MixUp")
    while True:
        a, b = (torch.rand(2, dtype=torch.float64, generator=generator) ** (1 / alpha)).tolist()
        if 0 < a + b <= 1:
            return a / (a + b)


def mixup_permutation(n: int, generator: torch.Generator, micro_batch: int | None = None) -> Tensor:
    """Draw the partner of each of n images: a random permutation, within blocks of `micro_batch` if given."""
    size = micro_batch or n
    blocks = [start + torch.randperm(min(size, n - start), generator=generator) for start in range(0, n, size)]
    return torch.cat(blocks)


# %%
generator = torch.Generator().manual_seed(0)
logits, labels = torch.randn(8, 5, generator=generator), torch.randint(5, (8,), generator=generator)
lam, permutation = mixup_weight(0.1, generator), mixup_permutation(8, generator)
_, soft = mixup(torch.zeros(8, 3, 4, 4), F.one_hot(labels, 5).float(), lam, permutation)
blended_labels = F.cross_entropy(logits, soft)
blended_losses = lam * F.cross_entropy(logits, labels) + (1 - lam) * F.cross_entropy(logits, labels[permutation])
torch.testing.assert_close(blended_labels, blended_losses)
print(f"lambda {lam:.4f}: {blended_labels:.6f} = {blended_losses:.6f}")

# %% [markdown]
# Does the sampler draw from $\mathrm{Beta}(0.1, 0.1)$? The variance of $\mathrm{Beta}(\alpha, \alpha)$ is $1
# / (4 (2 \alpha + 1))$, and we know the share near the ends from the integral above.

# %%
draws = torch.tensor([mixup_weight(0.1, generator) for _ in range(20_000)])
near = (abs(draws - 0.5) > 0.4).double().mean()
print(f"mean {draws.mean():.2f}, variance {draws.var():.2f}, near an end {100 * near:.0f} %")
assert abs(draws.mean() - 0.5) < 0.02
assert abs(draws.var() - 1 / (4 * 1.2)) < 0.01
assert abs(near - share[0.1]) < 0.02

# %% [markdown]
# ### One weight for an optimiser step, also when gradients are accumulated
#
# A batch of 512 that does not fit into memory is computed as micro-batches whose gradients are added up. What
# must MixUp do then? The step should be what it would have been with enough memory. One $\lambda$ is drawn
# for the step, so every micro-batch uses it. The partners may come from the whole batch, if it is at hand, or
# from the micro-batch alone, as in the released code, which never holds more. Either way the blending happens
# before the split, and the loss of the batch is the mean over its images, so splitting changes nothing:

# %%
net = torch.nn.Linear(3 * 4 * 4, 5)
images, onehot = torch.randn(12, 3, 4, 4, generator=generator), F.one_hot(torch.arange(12) % 5, 5).float()
lam, permutation = mixup_weight(0.1, generator), mixup_permutation(12, generator, micro_batch=4)
print("partners:", permutation.tolist())

mixed_images, mixed_targets = mixup(images, onehot, lam, permutation)
(whole,) = torch.autograd.grad(F.cross_entropy(net(mixed_images.flatten(1)), mixed_targets), net.weight)
accumulated = torch.zeros_like(whole)
for block in torch.arange(12).split(4):  # each micro-batch mixes its own images with the common lambda
    x, y = mixup(images[block], onehot[block], lam, permutation[block] - block[0])
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(x.flatten(1)), y), net.weight)
    accumulated += gradient * len(block) / 12
torch.testing.assert_close(accumulated, whole)
print("accumulated gradient equals the whole batch's")

# %% [markdown]
# ### Proof against torchvision
#
# `torchvision.transforms.v2.MixUp` pairs each image with its predecessor in the batch instead of a random
# one. With its $\lambda$ and its pairing, ours gives the same batch.

# %%
from torchvision.transforms import v2

batch, classes = torch.rand(6, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])
torch.manual_seed(0)
lam = torch.distributions.Beta(torch.tensor([0.1]), torch.tensor([0.1])).sample().item()
torch.manual_seed(0)
expected = v2.MixUp(alpha=0.1, num_classes=5)(batch, classes)
ours = mixup(batch, F.one_hot(classes, 5).float(), lam, torch.arange(6).roll(1))
for mine, theirs in zip(ours, expected, strict=True):
    torch.testing.assert_close(mine, theirs)
worst = max((a - b).abs().max().item() for a, b in zip(ours, expected, strict=True))
print("largest difference below 1e-6:", worst < 1e-6)
assert worst < 1e-6

# %% [markdown]
# ## A smaller machine
#
# Batch 512 at 384×384 does not fit everywhere. Accumulating gradients keeps the rule as it is and only costs
# time. Shrinking the batch saves time too, and then the learning rate should shrink with it. The argument of
# the linear scaling rule {cite}`goyal2017accurate`: take $k$ steps of rate $\eta'$ over batches of $B/k$
# images. While the weights hardly move, all $k$ gradients are taken at about the same point, and
#
# $$\sum_{i=1}^{k} \eta'\, g_i \approx \eta' k\, \bar g .$$
#
# One step of rate $\eta$ over all $B$ images moves by $\eta\, \bar g$. The two agree for $\eta' = \eta / k$:
# the rate goes in proportion to the batch. Note what the argument assumes: **$k$ times as many steps**.
# `Rule.scaled` changes the rate and leaves the number of steps, because the rule fixes it; a run of 500
# smaller steps then moves $k$ times less far. What did the authors do?

# %%
rule = hyperrule(50_000, (32, 32), variant="official")
smaller = rule.scaled(batch_size=128)
print(f"batch {rule.batch_size}: {rule.base_lr}, batch {smaller.batch_size}: {smaller.base_lr}, README: 0.001")
assert smaller.base_lr == 0.00075

# %% [markdown]
# The CIFAR tables in the released README were made with batch 128 and learning rate 0.001 at the same number
# of steps {cite}`bittransfer_code`: a third of the rate for a quarter of the batch, somewhat more than
# linear. The scaling rule is a starting point, not a law.
#
# Let us measure it where everything can be measured: the linear layer on the pixels of 1,000 digits, SGD with
# momentum, 100 steps of the paper's rate at batch 512. Then batch 32, sixteen times smaller, in three ways.
# Where does each end, compared with the large batch? Guess the three lengths before you run it.


# %%
def end_point(lr, steps, batch_size, seed):
    """Where SGD with momentum takes a linear layer that starts at zero."""
    weight, velocity = torch.zeros(192, 10, requires_grad=True), 0
    for step in range(steps):
        i = shard_indices(step, batch_size, len(pool[0]), seed)
        (gradient,) = torch.autograd.grad(F.cross_entropy(pool[0][i] @ weight, pool[1][i]), weight)
        velocity = 0.9 * velocity + gradient
        weight = (weight - lr * velocity).detach().requires_grad_()
    return weight.detach()


pool = pixels(task.train, 1_000)
large = end_point(0.003, 100, 512, seed=0)
ways = {
    "rate / 16, steps x 16": (0.003 / 16, 1_600),
    "rate / 16, same steps": (0.003 / 16, 100),
    "as it was": (0.003, 100),
}
ends = {way: end_point(lr, steps, 32, seed=1) for way, (lr, steps) in ways.items()}
for way, end in ends.items():
    length, distance = end.norm() / large.norm(), (end - large).norm() / large.norm()
    print(f"batch 32, {way:<22} moves {length:.1f} times as far, and ends {100 * distance:.0f} % of the way off")
off = [(end - large).norm() / large.norm() for end in ends.values()]
assert off[0] < 0.1 and off[1] > 0.8 and off[2] < 0.1

# %% [markdown]
# The argument holds to a few per cent: a sixteenth of the rate for sixteen times the steps arrives at the
# same place. `scaled` with the same number of steps stops after a tenth of the way. And the third line is
# worth a thought: the small batch at the *unscaled* rate arrives there too, because at this rate the noise of
# the small batches averages out. Scaling the rate down with the batch guards against noise and instability, which
# a short run at a low rate does not suffer from; it pays for the guard in distance. In a deep network at a high rate
# it is needed {cite}`goyal2017accurate`. Which of the two is your case, only a validation set can say.
#
# Another number of *steps* is the other way to save. `rule.with_steps(100)` keeps every share of the run, the
# decays at 30, 60 and 90 %; by the first figure of this chapter it also shortens the way.

# %%
short = hyperrule(1_000, (32, 32)).with_steps(100)
print(f"{short.steps} steps, decays at {short.decay_steps}")
assert short.decay_steps == (30, 60, 90)

# %% [markdown]
# ### The rule for our minis
#
# The mini networks were pre-trained at 64×64, have a quarter of R50x1's width and must be fine-tuned in about
# a minute on two cores. So their rule departs from the paper's in three ways, and
# `hyperrule(..., model=mini)` makes all three:
#
# - **Resolution.** 160 → 128 halves to 80 → 64, for images of any size. A mini has never seen anything finer
#   than 64, and the large setting, halved to 224 → 192, would cost nine times as much.
# - **Batch.** 32 in place of 512. Five hundred steps then see 16,000 images in place of 256,000.
# - **Rate.** Scaling linearly gives 0.0001875. By the argument above that is right only for sixteen times as
#   many steps, and the paper's 0.003 was found for far larger nets. So we do not derive the rate of the minis.
#   We choose it once, and then hold it fixed for every task, as a rule must.
#
# The choice was made on the digits, with ten examples of each class to train on and twenty others to validate,
# by `python tools/few_shot_tasks.py --mini-rates 0.003 0.01 0.03 0.1 0.3 --seeds 0 1`. The test images took no
# part in it. Of rates that do equally well we take the smallest.

# %%
tried = json.loads(shipped_file("results/mini_rate.json").read_text())["rates_tried"]
validation = {
    rate: 100 * sum(row["val_top1"] for row in tried if row["rate"] == rate) / sum(row["rate"] == rate for row in tried)
    for rate in sorted({row["rate"] for row in tried})
}
for rate, top1 in validation.items():
    print(f"rate {rate:<6g} validation top-1 {top1:.1f} %")
best = max(validation.values())
assert min(rate for rate, top1 in validation.items() if top1 == best) == MINI_BASE_LR

# %%
mini = create_model("R26x0.25", num_classes=10)
print(hyperrule(100, (32, 32), model=mini))
print(f"\nlinear scaling would give {hyperrule(100, (32, 32)).scaled(batch_size=MINI_BATCH_SIZE).base_lr}")

# %% [markdown]
# ### How good is the rule's choice?
#
# How were BiT's constants found? The paper says that no hyper-parameters were swept downstream and does not describe
# how it arrived at its rule. What it reports is the price of the rule once it stood: the gain of a random search over it,
# which we saw at the start of this chapter {cite}`kolesnikov2020big`. The same can be asked of the rule for our
# minis, and on a small task everything around the rule's choice can be looked at.
#
# `tools/sweep_rule.py` did so beforehand. It fine-tuned BiT-mini-M at every combination of a few rates and lengths, on
# several draws of training images from three tasks, with everything else as the rule has it. Of each run
# `data/results/rule_sweep.json` holds two accuracies. One is on validation images from what was left of the training
# pool: labels that a search needs and the rule does without. The other is on the test images.
#
# Learning rate times length was what mattered to the linear layer at the start of this chapter. Where in a map of the
# two do you expect a pre-trained network to be good, and how wide is that place?

# %%
sweep = json.loads(shipped_file("results/rule_sweep.json").read_text())
runs = {(run["task"], run["seed"], run["rate"], run["steps"]): run for run in sweep["rows"]}
swept_tasks, draws, swept_rates, swept_steps = (sorted(set(values)) for values in zip(*runs, strict=True))
chosen = (MINI_BASE_LR, hyperrule(1, 32, model=mini).steps)
print(
    f"{len(swept_rates)} rates x {len(swept_steps)} lengths x {len(swept_tasks)} tasks x {len(draws)} draws: "
    f"{len(runs)} runs, {sweep['about']['shots']} examples a class"
)
assert len(runs) == len(swept_rates) * len(swept_steps) * len(swept_tasks) * len(draws)  # none is missing
assert (sweep["about"]["rule"]["base_lr"], sweep["about"]["rule"]["steps"]) == chosen

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three heat maps, one a task, of test accuracy over learning rate, on the horizontal axis, and number of steps, on the vertical one. Each cell holds its mean accuracy over the draws in per cent. A coloured frame marks the cell of the rule, which has a rate in the middle and the largest number of steps."}}
fig, axes = plt.subplots(1, len(swept_tasks), figsize=(7, 2.4), sharey=True, layout="constrained")
for ax, name in zip(axes, swept_tasks, strict=True):
    settings = itertools.product(draws, swept_rates, swept_steps)
    top1 = torch.tensor([100 * runs[name, *setting]["test_top1"] for setting in settings])
    means = top1.view(len(draws), len(swept_rates), len(swept_steps)).mean(dim=0).T
    ax.imshow(means, origin="lower", aspect="auto", cmap="cividis")
    for i in range(len(swept_steps)):
        for j in range(len(swept_rates)):
            dark = means[i, j] < (means.min() + means.max()) / 2
            ink = "white" if dark else "black"
            ax.text(j, i, f"{means[i, j]:.1f}", ha="center", va="center", fontsize=8, color=ink)
    corner = (swept_rates.index(chosen[0]) - 0.5, swept_steps.index(chosen[1]) - 0.5)
    ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor="C1", linewidth=2.5, clip_on=False))
    ax.set(title=name, xlabel="learning rate")
    ax.set_xticks(range(len(swept_rates)), swept_rates, fontsize=8)
    ax.grid(False)
axes[0].set_ylabel("number of steps")
axes[0].set_yticks(range(len(swept_steps)), swept_steps)
plt.show()

# %% [markdown]
# How much does the rule lose? For each task and each draw we compare its test accuracy with that of two others.
#
# - **(a) What a search would have chosen:** the setting with the best accuracy on the validation images. It is what
#   one gets for all these trainings and all these labels.
# - **(b) What turned out best on the test images.** Nobody can choose it, and it is too good even as a bound: the best
#   of many runs was also the luckiest.
#
# The difference is the *regret*. Before the sweep was run we set a bound to the first of the two: two points, on
# average over tasks and draws.


# %%
def regret(task, draw):
    """Points of test accuracy that the rule loses on one draw: to a search, and to the best on the test images."""
    own = [run for run in runs.values() if (run["task"], run["seed"]) == (task, draw)]
    # of settings that are equal on the validation images a search takes the cheapest
    searched = max(own, key=lambda run: (run["val_top1"], -run["steps"], -run["rate"]))["test_top1"]
    rule_alone = runs[task, draw, *chosen]["test_top1"]
    return 100 * (searched - rule_alone), 100 * (max(run["test_top1"] for run in own) - rule_alone)


regrets = {name: torch.tensor([regret(name, draw) for draw in draws], dtype=torch.float64) for name in swept_tasks}
regrets["all"] = torch.cat(list(regrets.values()))
print(f"{'regret in points of test top-1':32}{'(a) to a search':>18}{'(b) to the best':>18}")
for name, values in regrets.items():
    error = values.std(dim=0) / len(values) ** 0.5
    cells = (f"{m:.1f} ± {e:.1f}" for m, e in zip(values.mean(dim=0).tolist(), error.tolist(), strict=True))
    print(f"{name:32}" + "".join(f"{cell:>18}" for cell in cells))
assert regrets["all"][:, 0].mean() <= 2
assert all(regrets[name][:, 0].mean() > 2 for name in ("histology", "textures"))
means = {
    (name, rate, steps): sum(runs[name, draw, rate, steps]["test_top1"] for draw in draws) / len(draws)
    for name, _, rate, steps in runs
}
for name in ("digits", "textures"):  # nearly the same product, at two rates
    assert means[name, 0.1, 250] > means[name, 0.3, 100] + 0.15
assert max(swept_rates) == max((key for key in means if key[0] == "histology"), key=means.get)[1]

# %% [markdown]
# The bound holds by a hair, and the standard error is far larger than the margin. It holds because of the digits, on which
# the rate was picked; on the two other tasks the mean regret is above two points. On histology the best setting is at
# the largest rate that we tried, so a wider search might find the rule worse still. And the product of rate and length is
# not what matters here: at nearly the same product, a high rate for few steps is far worse on the digits and the textures
# than a third of the rate for more than twice as many.
#
# A mean comes with its standard error over the draws, and in the last line over tasks and draws together, as if they
# were independent; draws of one task have more in common than that. A regret below zero in column (a) means that the
# validation images led the search astray: a few images of each class cannot tell good settings apart, and whoever
# chooses among many by them also chooses by chance. One thing calls for caution. The rule's rate had been picked on the
# digits, on fewer examples a class but partly on the same ones, so that for the digits the rule is not put to a new test.
# The other tasks had no part in it.

# %% [markdown]
# ## Where sources disagree
#
# ```{admonition} Where sources disagree
# :class: note
# - **Length.** Paper and code: 500, 10,000 and 20,000 steps. Common summaries: 500, 2,500 and 10,000.
# - **Decay.** Paper: by 10 at 30, 60 and 90 %. Code: at 40, 60 and 80 % of the small schedule and 30, 60 and
#   90 % of the others, each one step late. Common summaries: a cosine, or the paper's staircase.
# - **Warm-up.** Paper: none stated. Code: 100 steps for small tasks, 500 for the others. Our `"paper"` has
#   none.
# - **Large images.** Paper: 448 → 384, and 512 → 480 for R152x4 only. Code: 512 → 480 for every network. One
#   of the summaries names 128 for everything, with 224 or 384 "for better performance"; our `"simplified"`
#   keeps the paper's resolutions.
# - **MixUp.** Paper and code: $\alpha = 0.1$ for medium and large tasks. Common summaries: none.
# - **Input range.** Paper's and code's networks expect $[-1, 1]$. One summary says $[0, 1]$. That is a
#   property of the checkpoint rather than of the rule; our `finetune` always feeds $[-1, 1]$.
# - **Batch and rate.** Paper and code: 512 and 0.003. The README's CIFAR tables: 128 and 0.001.
# - **Flips and crops.** Paper (appendix F): no flip for dSprites orientation and location and SmallNORB
#   azimuth; no random crop for Clevr count and distance, DMLab, KITTI distance and dSprites location. The
#   code has no such switch; our `Rule` has `flip` and `random_crop`.
# - **How the rule was found.** The paper says that no hyper-parameters were swept downstream and does not
#   describe how the constants were arrived at; its appendix A compares the rule, once fixed, with 40 random
#   trials a task.
# ```
#
# The last row but one matters in practice: a rule that knows only $n$ and the image size cannot know that a
# mirrored 2 is not a 2. A reader who fine-tunes on letters, digits, or left and right hands must turn the
# flip off:

# %%
print(replace(hyperrule(100, (32, 32), model=mini), flip=False))

# %% [markdown]
# ## Exercises
#
# **1. The released schedule.** Write the learning rate of the released code for a small task (fewer than
# 20,000 images), off-by-one and warm-up included.

# %% tags=["check", "hide-cell"]
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


# %% tags=["exercise"]
def small_lr(step):
    return None  # your code here


# check_small_lr(small_lr)


# %% tags=["solution", "hide-input"]
def small_lr(step):
    if step < 100:
        return 0.003 * step / 100
    return 0.003 / 10 ** sum(s < step for s in (200, 300, 400))


check_small_lr(small_lr)

# %% [markdown]
# **2. How far can a run move?** For the linear layer rate × steps was what counted. Derive a closed form for the sum of
# the learning rates of the paper's staircase over $T$ steps with base rate $\eta_0$ ($T$ is a multiple of
# 10).


# %% tags=["exercise"]
def path_length(steps, base_lr):
    return None  # your code here


# check_path_length(path_length)


# %% tags=["solution", "hide-input"]
# The staircase spends 30 % of the steps at the base rate, 30 % at a tenth, 30 % at a hundredth and 10 % at a
# thousandth of it: a third of what a constant rate would give, nine tenths of which fall into the first 30 %.
def path_length(steps, base_lr):
    return base_lr * steps * (0.3 + 0.03 + 0.003 + 0.0001)


check_path_length(path_length)

# %% [markdown]
# **3. MixUp without one-hot vectors.** With a thousand classes a one-hot matrix is a thousand times as large
# as the class numbers. Write the MixUp loss from logits (N, K), labels (N,), $\lambda$ and the permutation.


# %% tags=["exercise"]
def mixup_loss(logits, labels, lam, permutation):
    return None  # your code here


# check_mixup_loss(mixup_loss)


# %% tags=["solution", "hide-input"]
def mixup_loss(logits, labels, lam, permutation):
    return lam * F.cross_entropy(logits, labels) + (1 - lam) * F.cross_entropy(logits, labels[permutation])


check_mixup_loss(mixup_loss)

# %% [markdown]
# ## What to remember
#
# - Two facts about the data, $n$ and the image area, fix every hyper-parameter; only the length, the
#   resolution and MixUp depend on them.
# - The rule replaces a search. In the paper, 40 trials a task gained 2.43 points over it.
# - For a linear layer, learning rate and number of steps act mostly through their product. For a deep network at a high
#   rate they do not, as the sweep shows.
# - MixUp is one $\lambda$ a step; blending labels equals blending losses because cross-entropy is linear in
#   the target.
# - Sources disagree about the details. Say which rule you ran: `paper`, `official` or `simplified`.
#
# The next chapter runs it.
