"""The BiT-HyperRule, data set size and image size in, every hyper-parameter out; and MixUp.

Exported from chapters/07_hyperrule.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "VARIANTS",
    "MINI_BATCH_SIZE",
    "MINI_BASE_LR",
    "MINI_RESIZE",
    "MINI_CROP",
    "Rule",
    "hyperrule",
    "mixup",
    "mixup_weight",
    "mixup_permutation",
]

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
