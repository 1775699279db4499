"""Every exercise: its checker accepts the solution, refuses the stub, and refuses plausible wrong answers helpfully.

WRONG holds, for each checker, answers that a reader might well give, and words of the message that should help.
"""

import ast
import importlib
import math
import re
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from book import Cell, Chapter, read_chapters

from bitlib.checkpoints import from_official_name
from bitlib.evaluate import ridge_primal, topk_accuracy
from bitlib.hyperrule import hyperrule
from bitlib.resnet import BLOCKS

CHAPTERS = read_chapters()
LEAST = 3  # exercises a chapter
WRONG_LEAST = 2  # wrong answers an exercise


def rows(x, groups):
    return x.reshape(len(x), groups, -1)


def npz_sizes(path):
    with zipfile.ZipFile(path) as archive:
        return {member.filename.removesuffix(".npy"): (member.file_size,) for member in archive.infolist()}


def npz_whole(path):
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name].shape for name in archive.files}


def block(block, x, proj_input="bare", shortcut="bare"):
    y = F.relu(block.norm1(x))
    if block.proj is None:
        short = x if shortcut == "bare" else y
    else:
        short = block.proj(x if proj_input == "bare" else y)
    y = block.conv2(F.relu(block.norm2(block.conv1(y))))
    return block.conv3(F.relu(block.norm3(y))) + short


def post_activation(block, x):
    y = block.norm1(x)
    shortcut = x if block.proj is None else block.proj(F.relu(y))
    y = block.conv2(block.norm2(block.conv1(F.relu(y))))
    return block.conv3(F.relu(block.norm3(y))) + shortcut


def few_shot_any(labels, n, seed):
    return np.random.default_rng(seed).permutation(len(labels))[: 3 * n].tolist()


def few_shot_first(labels, n, seed):
    return [i for c in sorted(set(labels)) for i in [j for j, k in enumerate(labels) if k == c][:n]]


def few_shot_short(labels, n, seed):
    rng = np.random.default_rng(seed)
    members = {c: [i for i, k in enumerate(labels) if k == c] for c in sorted(set(labels))}
    return [i for c in members for i in rng.permutation(members[c])[:n].tolist()]


def few_shot_replacing(labels, n, seed):
    rng = np.random.default_rng(seed)
    members = {c: [i for i, k in enumerate(labels) if k == c] for c in sorted(set(labels))}
    return [i for c in members for i in rng.choice(members[c], n).tolist()]


def ece(confidence, correct, n_bins, right=False, weighted=True):
    edges = torch.linspace(0, 1, n_bins + 1, dtype=confidence.dtype)
    bins = torch.bucketize(confidence, edges[1:-1], right=right)
    total = 0.0
    for m in range(n_bins):
        inside = bins == m
        if inside.any():
            gap = abs(correct[inside].double().mean() - confidence[inside].mean()).item()
            total += gap * (inside.double().mean().item() if weighted else 1 / n_bins)
    return total


def bootstrap(statistic, logits, labels, n_resamples, seed, size=None, seeded=True, together=True):
    generator = torch.Generator().manual_seed(seed)
    if not seeded:
        generator.seed()
    n, values = len(labels), []
    for _ in range(n_resamples):
        drawn = torch.randint(n, (size or n,), generator=generator)
        other = drawn if together else torch.randint(n, (size or n,), generator=generator)
        values.append(statistic(logits[drawn], labels[other]))
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist())


def pool_with(padding):
    return lambda x: F.max_pool2d(F.pad(x, padding), 3, 2)


def mean_of(w):
    return w.mean((1, 2, 3), keepdim=True)


def deviation_of(w, eps=0.0, correction=0):
    return (w.var((1, 2, 3), correction=correction, keepdim=True) + eps).sqrt()


def names_by_hand(keys):
    return {key: from_official_name(key.removeprefix("resnet/")) for key in keys}


def names_without_prefix(keys):
    return {key.removeprefix("resnet/"): from_official_name(key.removeprefix("resnet/")) for key in keys}


def accumulated_sum(weight, standardize, losses):
    w_hat = standardize(weight)
    return torch.autograd.grad(sum(f(w_hat) for f in losses), weight)[0]


def accumulated_cut(weight, standardize, losses):
    leaf = standardize(weight).detach().requires_grad_()
    return torch.autograd.grad(sum(f(leaf) for f in losses) / len(losses), leaf)[0]


def accumulated_again(weight, standardize, losses):
    return sum(torch.autograd.grad(f(standardize(weight)), weight)[0] for f in losses) / len(losses)


# checker -> [(what is wrong, the objects handed to the checker, a pattern of the message)]
WRONG = {
    # 01 data
    "check_channel_statistics": [
        ("in bytes", [lambda x: (x.float().mean((0, 2, 3)), x.float().std((0, 2, 3)))], "divide by 255"),
        ("one for all channels", [lambda x: ((x / 255).mean(), (x / 255).std())], r"shape \(3,\)"),
        (
            "divided by n - 1",
            [lambda x: ((x / 255).mean((0, 2, 3)), (x / 255).std((0, 2, 3)))],
            "divided by their number",
        ),
        (
            "mean of the images' deviations",
            [lambda x: ((x / 255).mean((0, 2, 3)), (x / 255).std((2, 3), correction=0).mean(0))],
            "over all pixels",
        ),
    ],
    "check_shard": [
        (
            "everyone draws everything",
            [lambda s, b, r, w, n: [(s * b + k) % n for k in range(b)]],
            "must render 4 images",
        ),
        ("forgets to start again", [lambda s, b, r, w, n: range(s * b + r, s * b + b, w)], "together the processes"),
        (
            "all take the first part",
            [lambda s, b, r, w, n: [(s * b + k) % n for k in range(b // w)]],
            "together the proc",
        ),
    ],
    "check_acceptance": [
        ("all fit", [lambda low, ratio: 1.0], "of the draws fit; yours says 1.0000"),
        (
            "uniform in the ratio, not its logarithm",
            [lambda low, ratio: ((math.log(ratio) / (ratio - 1)) - low) / (1 - low)],
            "of the draws fit",
        ),
        ("forgets the least area", [lambda low, ratio: (1 - 1 / ratio) / math.log(ratio)], "of the draws fit"),
    ],
    # 02 group normalization
    "check_group_norm": [
        (
            "unbiased variance",
            [
                lambda x, g, eps: (
                    (rows(x, g) - rows(x, g).mean(2, True)) / (rows(x, g).var(2, keepdim=True) + eps).sqrt()
                ).reshape(x.shape)
            ],
            "divides by m-1",
        ),
        (
            "eps outside the root",
            [
                lambda x, g, eps: (
                    (rows(x, g) - rows(x, g).mean(2, True)) / (rows(x, g).std(2, correction=0, keepdim=True) + eps)
                ).reshape(x.shape)
            ],
            "eps is outside the root",
        ),
        (
            "over the batch",
            [
                lambda x, g, eps: (
                    (rows(x, g) - rows(x, g).mean((0, 2), True))
                    / (rows(x, g).var((0, 2), correction=0, keepdim=True) + eps).sqrt()
                ).reshape(x.shape)
            ],
            "over the batch",
        ),
        (
            "E[x²] - E[x]²",
            [
                lambda x, g, eps: (
                    (rows(x, g) - rows(x, g).mean(2, True))
                    / (rows(x, g).square().mean(2, True) - rows(x, g).mean(2, True).square() + eps)
                    .clamp(min=eps)
                    .sqrt()
                ).reshape(x.shape)
            ],
            "subtract the mean before you square",
        ),
    ],
    "check_special_cases": [
        (
            "the wrong way round",
            [lambda x: F.group_norm(x, x.shape[1]), lambda x: F.group_norm(x, 1)],
            "wrong way round",
        ),
        ("both with two groups", [lambda x: F.group_norm(x, 2), lambda x: F.group_norm(x, 2)], "how many groups"),
        (
            "a fixed number of channels",
            [lambda x: F.group_norm(x, 1), lambda x: F.group_norm(x, 2)],
            "for each channel",
        ),
    ],
    "check_running_statistics": [
        (
            "the biased variance",
            [
                lambda x, m, v, a: (
                    (1 - a) * m + a * x.mean((0, 2, 3)),
                    (1 - a) * v + a * x.var((0, 2, 3), correction=0),
                )
            ],
            "divides by m-1",
        ),
        (
            "momentum the other way round",
            [lambda x, m, v, a: (a * m + (1 - a) * x.mean((0, 2, 3)), a * v + (1 - a) * x.var((0, 2, 3)))],
            "share of the new batch",
        ),
        (
            "the mean of one image",
            [lambda x, m, v, a: ((1 - a) * m + a * x[0].mean((1, 2)), (1 - a) * v + a * x.var((0, 2, 3)))],
            "the mean is wrong",
        ),
    ],
    "check_group_norm_backward": [
        (
            "the direct term only",
            [
                lambda g, x, n: (rows(g, n) / (rows(x, n).var(2, correction=0, keepdim=True) + 1e-5).sqrt()).reshape(
                    x.shape
                )
            ],
            "only the direct term",
        ),
        (
            "without the part by the variance",
            [
                lambda g, x, n: (
                    (rows(g, n) - rows(g, n).mean(2, True))
                    / (rows(x, n).var(2, correction=0, keepdim=True) + 1e-5).sqrt()
                ).reshape(x.shape)
            ],
            "part by the variance is missing",
        ),
    ],
    # 03 weight standardization
    "check_standardize": [
        ("unbiased variance", [lambda w: (w - mean_of(w)) / deviation_of(w, 1e-10, 1)], "divides by m-1"),
        ("one mean for all", [lambda w: (w - w.mean()) / w.std(correction=0)], "one mean for all filters"),
        ("not centred", [lambda w: w / deviation_of(w)], "did not subtract the mean"),
        ("another epsilon", [lambda w: (w - mean_of(w)) / deviation_of(w, 1e-5)], "values differ|eps is 1e-10"),
    ],
    "check_unbiased_factor": [
        ("the ratio of the variances", [lambda c: 1 - 1 / c.weight[0].numel()], "ratio of the variances"),
        ("upside down", [lambda c: (c.weight[0].numel() / (c.weight[0].numel() - 1)) ** 0.5], "upside down"),
        (
            "forgets the groups",
            [lambda c: (1 - 1 / (c.in_channels * c.kernel_size[0] * c.kernel_size[1])) ** 0.5],
            "in_channels / groups",
        ),
    ],
    "check_standardize_backward": [
        ("the direct term only", [lambda g, w, eps: g / deviation_of(w, eps)], "only the direct term"),
        ("the mean taken off only", [lambda g, w, eps: (g - mean_of(g)) / deviation_of(w, eps)], "along the filter"),
        (
            "without eps",
            [
                lambda g, w, eps: (
                    (
                        g
                        - mean_of(g)
                        - (w - mean_of(w)) / deviation_of(w) * mean_of(g * (w - mean_of(w)) / deviation_of(w))
                    )
                    / deviation_of(w)
                )
            ],
            "is eps in your deviation",
        ),
    ],
    "check_accumulated_gradient": [
        ("of the sum", [accumulated_sum], "gradient of the sum"),
        ("not carried back", [accumulated_cut], "back through standardize"),
        ("standardises every time", [accumulated_again], "standardised 4 times"),
    ],
    # 04 ResNet-v2
    "check_block_parameters": [
        (
            "without norms",
            [lambda i, o, s: i * o // 4 + 9 * (o // 4) ** 2 + o * o // 4 + (i * o if s != 1 or i != o else 0)],
            "each norm has two for every channel",
        ),
        (
            "always a projection",
            [lambda i, o, s: 2 * (i + o // 2) + i * o // 4 + 9 * (o // 4) ** 2 + o * o // 4 + i * o],
            "projection exists only where it must",
        ),
    ],
    "check_bottleneck": [
        ("projects the bare input", [block], "reads the pre-activated input"),
        (
            "shortcut carries the pre-activation",
            [lambda b, x: block(b, x, "activated", "activated")],
            "identity shortcut carries x",
        ),
        ("a ReLU is missing", [post_activation], "norm, ReLU, convolution"),
    ],
    "check_stem_pool": [
        ("pads with minus infinity", [lambda x: F.max_pool2d(x, 3, 2, padding=1)], "minus infinity"),
        ("no padding", [lambda x: F.max_pool2d(F.pad(x, (0, 2, 0, 2)), 3, 2)], "numbers differ|becomes"),
        ("a ReLU for all", [lambda x: F.max_pool2d(x, 3, 2, padding=1).clamp(min=0)], "numbers differ"),
    ],
    "check_field_of_stage": [
        (
            "all stages of one size",
            [lambda depth, stage: 11 + 8 * sum(BLOCKS[depth][:stage])],
            "it is 91 pixels|pixels, not",
        ),
        (
            "the stride counts before the 3×3",
            [lambda depth, stage: 11 + sum(2 * 4 * 2**k * n for k, n in enumerate(BLOCKS[depth][:stage]))],
            "pixels, not",
        ),
    ],
    # 05 checkpoints
    "check_to_oihw": [
        ("a reshape", [lambda k: k.reshape(5, 4, 2, 3)], "a reshape is not a permutation"),
        ("in and out exchanged", [lambda k: k.permute(2, 3, 0, 1)], r"must become \(5, 4, 2, 3\)"),
        ("width before height", [lambda k: k.permute(3, 2, 1, 0)], r"must become \(5, 4, 2, 3\)"),
    ],
    "check_our_names": [
        ("one prefix only", [names_by_hand], "keys|is our|official"),
        ("other keys", [names_without_prefix], "keys of the file must be your keys"),
    ],
    "check_shapes": [
        ("reads everything", [npz_whole], "the header is enough"),
        ("sizes instead of shapes", [npz_sizes], "expected"),
    ],
    "check_harmless": [
        ("any factor", [lambda a, b: b == 0], "ReLU"),
        ("anything positive", [lambda a, b: a > 0], "mid-grey"),
        ("nothing", [lambda a, b: False], "divides it out"),
    ],
    # 06 pre-training
    "check_decay_steps": [
        ("rounded down", [lambda e, n, b: [k * n // b for k in e]], "for ImageNet at batch 4,096"),
        ("rounds the epoch first", [lambda e, n, b: [k * round(n / b) for k in e]], "for ImageNet at batch 4,096"),
        ("not whole", [lambda e, n, b: [k * n / b for k in e]], "whole numbers"),
    ],
    "check_softmax_gradient": [
        (
            "not averaged",
            [lambda z, y, a: z.softmax(1) - (1 - a) * F.one_hot(y, z.shape[1]) - a / z.shape[1]],
            "divide by the number of images",
        ),
        ("hard targets", [lambda z, y, a: (z.softmax(1) - F.one_hot(y, z.shape[1])) / len(z)], "smoothed target"),
        (
            "the wrong sign",
            [lambda z, y, a: ((1 - a) * F.one_hot(y, z.shape[1]) + a / z.shape[1] - z.softmax(1)) / len(z)],
            "wrong for a",
        ),
    ],
    "check_other_momentum": [
        ("PyTorch's form", [lambda t, v, g, lr, mu: (t - lr * (mu * v + g), mu * v + g)], "wrong after step"),
        ("order of the results", [lambda t, v, g, lr, mu: (mu * v - lr * g, t + mu * v - lr * g)], "wrong after step"),
        ("adds the old velocity", [lambda t, v, g, lr, mu: (t + v, mu * v - lr * g)], "wrong after step 1"),
    ],
    "check_initial_bias": [
        ("minus log K", [lambda k: -math.log(k)], "gives probability"),
        ("the wrong sign", [lambda k: math.log(k - 1) if k > 2 else 1.0], "gives probability"),
    ],
    # 07 the HyperRule
    "check_small_lr": [
        (
            "on time",
            [lambda s: 0.003 * s / 100 if s < 100 else 0.003 / 10 ** sum(b <= s for b in (200, 300, 400))],
            "at step 200 the released code uses",
        ),
        ("no warm-up", [lambda s: 0.003 / 10 ** sum(b < s for b in (200, 300, 400))], "at step 0"),
        (
            "the paper's steps",
            [lambda s: 0.003 * s / 100 if s < 100 else 0.003 / 10 ** sum(b < s for b in (150, 300, 450))],
            "at step 200",
        ),
    ],
    "check_path_length": [
        ("constant rate", [lambda t, lr: t * lr], "add up to"),
        ("one rate for all", [lambda t, lr: 0.003 * t * 0.3331], "add up to"),
        ("thirds", [lambda t, lr: t * lr * (0.3 + 0.03 + 0.003)], "add up to"),
    ],
    "check_mixup_loss": [
        (
            "lambda the wrong way round",
            [lambda z, y, lam, p: (1 - lam) * F.cross_entropy(z, y) + lam * F.cross_entropy(z, y[p])],
            "which labels go with 1 - lambda",
        ),
        (
            "mixes the class numbers",
            [lambda z, y, lam, p: F.cross_entropy(z, (lam * y + (1 - lam) * y[p]).long())],
            "with lambda",
        ),
        (
            "permutes the logits",
            [lambda z, y, lam, p: lam * F.cross_entropy(z, y) + (1 - lam) * F.cross_entropy(z[p], y)],
            "with lambda",
        ),
    ],
    # 08 fine-tuning
    "check_few_shot": [
        ("any images", [few_shot_any], "not 3 each"),
        ("always the first", [few_shot_first], "does the seed reach"),
        ("gives fewer", [few_shot_short], "should raise ValueError"),
        ("draws again", [few_shot_replacing], "drawn twice"),
    ],
    "check_head_gradient": [
        (
            "of the sum",
            [lambda z, y, k: ((1 / k - F.one_hot(y, k).float()).T @ z, (1 / k - F.one_hot(y, k).float()).sum(0))],
            "mean over N",
        ),
        (
            "the wrong sign",
            [
                lambda z, y, k: (
                    (F.one_hot(y, k).float() - 1 / k).T @ z / len(z),
                    (F.one_hot(y, k).float() - 1 / k).mean(0),
                )
            ],
            "p is 1/K",
        ),
        (
            "not transposed",
            [
                lambda z, y, k: (
                    z.T @ (1 / k - F.one_hot(y, k).float()) / len(z),
                    (1 / k - F.one_hot(y, k).float()).mean(0),
                )
            ],
            "has shape",
        ),
    ],
    "check_find_mirrored": [
        (
            "upside down",
            [lambda a, b: [(i, j) for j in range(len(b)) for i in range(len(a)) if torch.equal(a[i].flip(-2), b[j])]],
            "stands on its head",
        ),
        (
            "the pair turned round",
            [lambda a, b: [(j, i) for j in range(len(b)) for i in range(len(a)) if torch.equal(a[i].flip(-1), b[j])]],
            r"\[\(4, 2\)\]",
        ),
        (
            "equal images",
            [lambda a, b: [(i, j) for j in range(len(b)) for i in range(len(a)) if torch.equal(a[i], b[j])]],
            r"\[\(4, 2\)\]",
        ),
    ],
    "check_times_seen": [
        ("always one more", [lambda s, b, n: (s * b // n, s * b // n + 1)], "show each"),
        ("per step", [lambda s, b, n: (s, s + 1)], "show each"),
        ("rounded", [lambda s, b, n: (round(s * b / n), round(s * b / n))], "show each"),
    ],
    # 09 evaluation
    "check_pessimistic_topk": [
        (
            "counts ties for it",
            [lambda z, y, k: ((z > z.gather(1, y[:, None])).sum(1) < k).double().mean().item()],
            "ties with everything",
        ),
        (
            "counts itself",
            [lambda z, y, k: ((z >= z.gather(1, y[:, None])).sum(1) < k).double().mean().item()],
            "without ties",
        ),
        (
            "torch.topk",
            [lambda z, y, k: (z.topk(k).indices == y[:, None]).any(1).double().mean().item()],
            "ties|first place",
        ),
    ],
    "check_right_closed_ece": [
        ("closed on the left", [lambda c, y, n: ece(c, y, n, right=True)], "belongs to the lower"),
        ("not weighted", [lambda c, y, n: ece(c, y, n, weighted=False)], "ECE 0.475"),
        ("one bin", [lambda c, y, n: abs(y.double().mean() - c.mean())], "belongs to the lower|random predictions"),
    ],
    "check_leave_one_out_errors": [
        ("the ordinary residuals", [lambda z, y, lam: y - z @ ridge_primal(z, y, lam)], "without its example"),
        (
            "divided by the root",
            [
                lambda z, y, lam: (
                    (y - z @ ridge_primal(z, y, lam))
                    / (1 - (z @ ridge_primal(z, torch.eye(len(z), dtype=z.dtype), lam)).diagonal()[:, None]).sqrt()
                )
            ],
            "without its example",
        ),
        ("one number an example", [lambda z, y, lam: (y - z @ ridge_primal(z, y, lam)).square().sum(1)], "shape of y"),
    ],
    "check_bootstrap_any": [
        ("half as many", [lambda f, z, y, r, s: bootstrap(f, z, y, r, s, size=200)], "width should be near"),
        ("drawn apart", [lambda f, z, y, r, s: bootstrap(f, z, y, r, s, together=False)], "same draw of indices"),
        ("no seed", [lambda f, z, y, r, s: bootstrap(f, z, y, r, s, seeded=False)], "same seed"),
        (
            "a point",
            [lambda f, z, y, r, s: (topk_accuracy(z, y) - 1e-3, topk_accuracy(z, y) + 1e-3)],
            "width should be",
        ),
    ],
    # 10 your own images
    "check_upright": [
        ("leaves it", [lambda x, o: x], "not the right picture"),
        ("always turned", [lambda x, o: x if o == 1 else np.rot90(x)], "pixels become"),
        ("flips only", [lambda x, o: x[::-1] if o in (3, 4) else x[:, ::-1] if o > 1 else x], "right picture|become"),
    ],
    "check_on_white": [
        ("drops it", [lambda rgb, alpha: rgb], "must be white"),
        ("on black", [lambda rgb, alpha: alpha[..., None] * rgb], "must be white"),
        ("the wrong way round", [lambda rgb, a: (1 - a[..., None]) * rgb + a[..., None]], "must stay as it is"),
    ],
    "check_threshold": [
        ("the lowest", [lambda c, r, t: c.min()], "the lowest confidence"),
        ("the target itself", [lambda c, r, t: t], "the lowest confidence"),
        (
            "strictly above",
            [lambda c, r, t: min((x for x in c if r[c > x].any() and r[c > x].mean() >= t), default=np.inf)],
            "or more",
        ),
    ],
    # 11 official models
    "check_batch_loss": [
        ("all the same", [lambda losses, sizes: sum(losses) / len(losses)], "as it has images"),
        ("a sum", [lambda losses, sizes: sum(x * n for x, n in zip(losses, sizes, strict=True))], "make"),
    ],
    "check_hours": [
        ("always small", [lambda n, size, speed: 500 * 512 / speed / 3_600], "10000 steps"),
        ("in seconds", [lambda n, size, speed: 512 * hyperrule(n, size).steps / speed], "take"),
    ],
    "check_micro_batch": [
        ("need not divide", [lambda b, f, p, n: min(n, int((b - f) / p))], "divides it"),
        (
            "forgets the fixed part",
            [lambda b, f, p, n: max(m for m in range(1, n + 1) if n % m == 0 and m * p <= b)],
            "fits",
        ),
    ],
}


def exercises(chapter: Chapter) -> list[tuple[str, Cell, Cell]]:
    """The checker's name, the stub's cell and the solution's cell of every exercise of a chapter."""
    code, found = chapter.code(), []
    for cell in chapter.tagged("exercise"):
        call = re.match(r"# (check_\w+)\(", cell.source.splitlines()[-1])
        found.append((call[1], cell, code[code.index(cell) + 1]))
    return found


EXERCISES = [(chapter, *exercise) for chapter in CHAPTERS for exercise in exercises(chapter)]
each_exercise = pytest.mark.parametrize(
    ("chapter", "name", "stub", "solution"), EXERCISES, ids=[name.removeprefix("check_") for _, name, _, _ in EXERCISES]
)


def checker(chapter: Chapter, name: str):
    """The checker as a reader in Colab gets it: from the package, not from the page."""
    modules = [other.checks for other in CHAPTERS if other.tagged("check")]
    found = [importlib.import_module(f"bitlib.checks.{module}") for module in modules]
    return next(getattr(module, name) for module in found if hasattr(module, name))


def namespace(chapter: Chapter) -> dict:
    """What a reader of the page has at hand: the chapter's imports and what it exports."""
    found: dict = {}
    if chapter.module:
        exec(f"from bitlib.{chapter.module} import *", found)
    for cell in chapter.code():
        for node in ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", cell.source)).body:
            if isinstance(node, ast.Import | ast.ImportFrom) and not cell.has("check"):
                exec(ast.unparse(node), found)
    return found


def handed_over(cell: Cell, chapter: Chapter) -> list:
    """The reader's objects of a stub or solution: what the cell hands to its checker."""
    names = namespace(chapter)
    call = re.search(r"^(?:# )?check_\w+\((.*)\)$", cell.source, re.M)
    exec(re.sub(r"(?m)^check_\w+\(.*\)$", "", cell.source), names)
    return [names[argument.strip()] for argument in call[1].split(",")]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.path.stem)
def test_every_chapter_has_its_exercises(chapter: Chapter):
    found = exercises(chapter)
    assert len(found) >= LEAST, f"{len(found)} exercises; a chapter has at least {LEAST}"
    assert len({name for name, _, _ in found}) == len(found), "each exercise has a checker of its own"


@each_exercise
def test_solution_passes_twice(chapter: Chapter, name: str, stub: Cell, solution: Cell):
    objects = handed_over(solution, chapter)
    before = torch.random.get_rng_state()
    for seed in (0, 1):  # a checker must not depend on the reader's random state
        torch.manual_seed(seed)
        checker(chapter, name)(*objects)
    torch.random.set_rng_state(before)


@each_exercise
def test_stub_fails(chapter: Chapter, name: str, stub: Cell, solution: Cell):
    with pytest.raises((AssertionError, NotImplementedError)) as error:
        checker(chapter, name)(*handed_over(stub, chapter))
    assert len(str(error.value)) > 20, "the message says too little"


@each_exercise
def test_wrong_answers_fail_with_a_helpful_message(chapter: Chapter, name: str, stub: Cell, solution: Cell):
    answers = WRONG.get(name, [])
    assert len(answers) >= WRONG_LEAST, f"WRONG needs {WRONG_LEAST} plausible wrong answers for {name}"
    for what, objects, pattern in answers:
        try:
            checker(chapter, name)(*objects)
        except AssertionError as error:
            message = str(error).splitlines()[0] if str(error) else ""
            assert len(message) > 15 and re.search(pattern, str(error)), f"{what}: {message!r} does not help"
        else:
            pytest.fail(f"{name} accepts a wrong answer: {what}")


def test_print_the_counts(capsys: pytest.CaptureFixture):
    names = {name for _, name, _, _ in EXERCISES}
    assert set(WRONG) <= names, f"wrong answers to no exercise: {sorted(set(WRONG) - names)}"
    exported = {
        name
        for chapter in CHAPTERS
        if chapter.tagged("check")
        for name in importlib.import_module(f"bitlib.checks.{chapter.checks}").__all__
    }
    assert names <= exported
    with capsys.disabled():
        print(
            f"\n{len(EXERCISES)} exercises in {len(CHAPTERS)} chapters, {len(names)} checkers, "
            f"{sum(map(len, WRONG.values()))} wrong answers refused"
        )
