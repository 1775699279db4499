"""The BiT-HyperRule against values written down by hand from the paper and from the released code."""

import dataclasses
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlib.checks.hyperrule import check_mixup_loss, check_path_length, check_small_lr
from bitlib.hyperrule import (
    MINI_BASE_LR,
    MINI_BATCH_SIZE,
    Rule,
    hyperrule,
    mixup,
    mixup_permutation,
    mixup_weight,
)
from bitlib.resnet import create_model

SMALL, MEDIUM, LARGE = (1, 10, 1_000, 19_999), (20_000, 50_000, 499_999), (500_000, 1_281_167, 10**9)


def on_meta(name):
    with torch.device("meta"):
        return create_model(name, num_classes=10)


# ---------------------------------------------------------------- the table, row by row


@pytest.mark.parametrize("variant", ["paper", "official", "simplified"])
@pytest.mark.parametrize("n", [*SMALL, *MEDIUM, *LARGE])
def test_constants_are_the_same_everywhere(n, variant):
    rule = hyperrule(n, (32, 32), variant=variant)
    assert (rule.base_lr, rule.momentum, rule.weight_decay, rule.batch_size) == (0.003, 0.9, 0.0, 512)
    assert rule.flip and rule.random_crop
    assert rule.variant == variant


@pytest.mark.parametrize(
    ("n", "steps", "decays", "alpha"),
    [(n, 500, (150, 300, 450), 0.0) for n in SMALL]
    + [(n, 10_000, (3_000, 6_000, 9_000), 0.1) for n in MEDIUM]
    + [(n, 20_000, (6_000, 12_000, 18_000), 0.1) for n in LARGE],
)
def test_paper_rows(n, steps, decays, alpha):
    rule = hyperrule(n, (32, 32))
    assert (rule.steps, rule.warmup_steps, rule.decay_steps, rule.mixup_alpha) == (steps, 0, decays, alpha)


@pytest.mark.parametrize(
    ("n", "steps", "warmup", "decays", "alpha"),
    [(n, 500, 100, (201, 301, 401), 0.0) for n in SMALL]
    + [(n, 10_000, 500, (3_001, 6_001, 9_001), 0.1) for n in MEDIUM]
    + [(n, 20_000, 500, (6_001, 12_001, 18_001), 0.1) for n in LARGE],
)
def test_official_rows(n, steps, warmup, decays, alpha):
    rule = hyperrule(n, (32, 32), variant="official")
    assert (rule.steps, rule.warmup_steps, rule.decay_steps, rule.mixup_alpha) == (
        steps,
        warmup,
        decays,
        alpha,
    )


@pytest.mark.parametrize(
    ("n", "steps"), [(n, 500) for n in SMALL] + [(n, 2_500) for n in MEDIUM] + [(n, 10_000) for n in LARGE]
)
def test_simplified_rows(n, steps):
    rule = hyperrule(n, (32, 32), variant="simplified")
    assert (rule.steps, rule.warmup_steps, rule.decay_steps, rule.mixup_alpha) == (steps, 0, (), 0.0)
    assert rule.decay == "cosine"


# ---------------------------------------------------------------- every step


def runs(*parts):
    """[(count, rate), ...] as one flat list of rates."""
    return list(itertools.chain.from_iterable([rate] * count for count, rate in parts))


@pytest.mark.parametrize(
    ("n", "warmup", "lengths"),
    [
        # after the warm-up: steps at the full rate, a tenth, a hundredth, a thousandth
        (19_999, 100, (101, 100, 100, 99)),  # 100..200, 201..300, 301..400, 401..499
        (20_000, 500, (2_501, 3_000, 3_000, 999)),  # 500..3000, 3001..6000, 6001..9000, 9001..9999
        (499_999, 500, (2_501, 3_000, 3_000, 999)),
        (500_000, 500, (5_501, 6_000, 6_000, 1_999)),  # 500..6000, 6001..12000, 12001..18000, 18001..19999
    ],
)
def test_official_at_every_step(n, warmup, lengths):
    rule = hyperrule(n, 224, variant="official")
    rates = (0.003, 0.003 / 10, 0.003 / 10 / 10, 0.003 / 10 / 10 / 10)
    expected = [0.003 * t / warmup for t in range(warmup)] + runs(*zip(lengths, rates, strict=True))
    assert len(expected) == rule.steps
    assert [rule.lr(t) for t in range(rule.steps)] == expected


@pytest.mark.parametrize(
    ("n", "lengths"),
    [
        (19_999, (150, 150, 150, 50)),
        (20_000, (3_000, 3_000, 3_000, 1_000)),
        (500_000, (6_000, 6_000, 6_000, 2_000)),
    ],
)
def test_paper_at_every_step(n, lengths):
    rule = hyperrule(n, 224)
    expected = runs(*zip(lengths, (0.003, 0.0003, 0.00003, 0.000003), strict=True))
    assert len(expected) == rule.steps
    assert [rule.lr(t) for t in range(rule.steps)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "steps"), [(100, 500), (100_000, 2_500), (1_000_000, 10_000)])
def test_simplified_at_every_step(n, steps):
    rule = hyperrule(n, 224, variant="simplified")
    expected = [0.0015 * (1 + math.cos(math.pi * t / steps)) for t in range(steps)]
    assert [rule.lr(t) for t in range(rule.steps)] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert rule.lr(0) == 0.003
    assert rule.lr(steps // 2) == pytest.approx(0.0015)
    assert 0 < rule.lr(steps - 1) < 3e-8


@pytest.mark.parametrize("step", [-1, 500, 501])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(ValueError, match=r"500 steps are 0 to 499"):
        hyperrule(10, 32).lr(step)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**7), st.sampled_from(["paper", "official", "simplified"]))
def test_rates_rise_during_warm_up_and_fall_after(n, variant):
    rule = hyperrule(n, 224, variant=variant)
    rates = [rule.lr(t) for t in range(rule.steps)]
    start = rule.warmup_steps
    assert all(a < b for a, b in itertools.pairwise(rates[: start + 1]))
    assert all(a >= b for a, b in itertools.pairwise(rates[start:]))
    assert max(rates) == rule.base_lr


# ---------------------------------------------------------------- resolution and networks


@pytest.mark.parametrize("size", [32, (32, 32), (95, 96), (1, 9215), (8, 8), [28, 28], torch.Size([64, 64])])
def test_small_images(size):
    for variant in ("paper", "official", "simplified"):
        rule = hyperrule(100, size, variant=variant)
        assert (rule.resize, rule.crop) == (160, 128)


@pytest.mark.parametrize("size", [96, (96, 96), (64, 144), (224, 224), (480, 640)])
def test_large_images(size):
    assert (hyperrule(100, size).resize, hyperrule(100, size).crop) == (448, 384)
    official = hyperrule(100, size, variant="official")
    assert (official.resize, official.crop) == (512, 480)
    simplified = hyperrule(100, size, variant="simplified")
    assert (simplified.resize, simplified.crop) == (448, 384)


def test_networks_of_full_width():
    for name in ("R50x1", "R101x3"):
        assert hyperrule(100, 224, model=on_meta(name)) == hyperrule(100, 224)
    r152x4 = hyperrule(100, 224, model=on_meta("R152x4"))
    assert (r152x4.resize, r152x4.crop) == (512, 480)
    assert hyperrule(100, 32, model=on_meta("R152x4")).crop == 128


@pytest.mark.parametrize("size", [(32, 32), (480, 640)])
def test_mini_networks(size):
    mini = create_model("R26x0.25", num_classes=10)
    rule = hyperrule(100, size, model=mini)
    assert (rule.resize, rule.crop) == (80, 64)
    assert (rule.batch_size, rule.base_lr) == (MINI_BATCH_SIZE, MINI_BASE_LR)
    assert (rule.steps, rule.decay_steps) == (500, (150, 300, 450))
    assert hyperrule(100, (32, 32)).for_mini() == rule
    mini.image_size = 192  # as after a fine-tuning at another resolution: still a mini
    assert hyperrule(100, size, model=mini) == rule


def test_scaling_is_linear_in_the_batch_and_leaves_the_rest():
    rule = hyperrule(50_000, 32)
    scaled = rule.scaled(batch_size=128)
    assert (scaled.batch_size, scaled.base_lr) == (128, 0.00075)
    assert dataclasses.replace(scaled, batch_size=512, base_lr=0.003) == rule
    assert rule.scaled(batch_size=1024).base_lr == 0.006
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match="batch_size"):
            rule.scaled(batch_size=bad)


# ---------------------------------------------------------------- bad input and manners


@pytest.mark.parametrize("n", [0, -5, 1000.0, "1000", None, True, float("nan")])
def test_bad_n_examples(n):
    with pytest.raises(ValueError, match="n_examples must be a whole number of at least 1"):
        hyperrule(n, 32)


@pytest.mark.parametrize("size", [0, -1, (32,), (32, 0), (32, 32, 3), "32x32", (31.5, 32), None])
def test_bad_image_size(size):
    with pytest.raises(ValueError, match="image_size"):
        hyperrule(10, size)


@pytest.mark.parametrize("variant", ["Paper", "timm", "", None])
def test_bad_variant_names_the_good_ones(variant):
    with pytest.raises(ValueError, match="'paper', 'official', 'simplified'"):
        hyperrule(10, 32, variant=variant)


def test_bad_model():
    with pytest.raises(ValueError, match="not Linear"):
        hyperrule(10, 32, model=torch.nn.Linear(2, 2))


def test_numpy_integers_are_integers():
    assert hyperrule(np.int64(1_000), (np.int32(32), 32)) == hyperrule(1_000, 32)


def test_a_rule_is_a_value():
    rule = hyperrule(1_000, 32)
    assert rule == hyperrule(999, 31) and rule != hyperrule(1_000, 32, variant="official")
    assert len({rule, hyperrule(1_000, 32)}) == 1
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert Rule(**dataclasses.asdict(rule)) == rule
    assert eval(repr(rule)) == rule
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.steps = 1


def test_a_rule_prints_what_matters():
    text = str(dataclasses.replace(hyperrule(50_000, 224, variant="official"), flip=False))
    for part in (
        "official",
        "10,000",
        "0.003",
        "3,001, 6,001, 9,001",
        "500 steps",
        "512, crop 480",
        "alpha 0.1",
        "no flip",
    ):
        assert part in text
    assert "cosine" in str(hyperrule(1, 1, variant="simplified"))


# ---------------------------------------------------------------- MixUp


def test_mixup_by_hand():
    images = torch.tensor([0.0, 10.0]).reshape(2, 1, 1, 1)
    targets = torch.eye(2)
    mixed, soft = mixup(images, targets, 0.75, torch.tensor([1, 0]))
    assert mixed.flatten().tolist() == [2.5, 7.5]
    assert soft.tolist() == [[0.75, 0.25], [0.25, 0.75]]
    assert images.flatten().tolist() == [0.0, 10.0]


def test_mixup_at_one_changes_nothing():
    images, targets = torch.rand(4, 3, 2, 2), torch.eye(4)
    mixed, soft = mixup(images, targets, 1.0, torch.tensor([1, 2, 3, 0]))
    assert torch.equal(mixed, images) and torch.equal(soft, targets)


def test_class_numbers_cannot_be_mixed():
    with pytest.raises(TypeError, match="one_hot"):
        mixup(torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), 0.5, torch.tensor([1, 0]))


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_soft_labels_and_blended_losses_agree(lam, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (7,), generator=generator)
    permutation = mixup_permutation(7, generator)
    _, soft = mixup(torch.zeros(7, 1, dtype=torch.float64), F.one_hot(labels, 5).double(), lam, permutation)
    blended = lam * F.cross_entropy(logits, labels) + (1 - lam) * F.cross_entropy(logits, labels[permutation])
    torch.testing.assert_close(F.cross_entropy(logits, soft), blended)


@pytest.mark.parametrize("micro_batch", [None, 1, 4, 5, 12, 100])
def test_partners_stay_in_their_micro_batch(micro_batch):
    permutation = mixup_permutation(12, torch.Generator().manual_seed(3), micro_batch)
    assert sorted(permutation.tolist()) == list(range(12))
    size = micro_batch or 12
    assert all(i // size == int(j) // size for i, j in enumerate(permutation))


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0])
def test_the_weight_has_the_moments_of_a_beta(alpha):
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([mixup_weight(alpha, generator) for _ in range(20_000)], dtype=torch.float64)
    assert 0 <= draws.min() and draws.max() <= 1
    assert abs(draws.mean() - 0.5) < 0.015
    assert abs(draws.var() - 1 / (4 * (2 * alpha + 1))) < 0.006
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    reference = torch.from_numpy(np.random.default_rng(0).beta(alpha, alpha, 200_000))
    torch.testing.assert_close(draws.quantile(quantiles), reference.quantile(quantiles), atol=0.03, rtol=0)


def test_the_weight_is_seeded_and_needs_an_alpha():
    a, b = (mixup_weight(0.1, torch.Generator().manual_seed(5)) for _ in range(2))
    assert a == b
    with pytest.raises(ValueError, match="above 0"):
        mixup_weight(0.0, torch.Generator())


# ---------------------------------------------------------------- the exercises' checkers can say no


def test_checkers_accept_and_refuse(capsys):
    check_small_lr(hyperrule(5, 32, variant="official").lr)
    check_path_length(lambda steps, lr: 0.3331 * steps * lr)
    check_mixup_loss(lambda z, y, lam, p: lam * F.cross_entropy(z, y) + (1 - lam) * F.cross_entropy(z, y[p]))
    assert capsys.readouterr().out.count(": correct") == 3
    with pytest.raises(AssertionError, match="step 200"):
        check_small_lr(lambda t: 0.003 * t / 100 if t < 100 else 0.003 / 10 ** sum(s <= t for s in (200, 300, 400)))
    with pytest.raises(AssertionError, match="add up"):
        check_path_length(lambda steps, lr: steps * lr)
    with pytest.raises(AssertionError, match="1 - lambda"):
        check_mixup_loss(lambda z, y, lam, p: F.cross_entropy(z, y))
    for check in (check_small_lr, check_path_length, check_mixup_loss):
        with pytest.raises(AssertionError, match="returned nothing"):
            check(lambda *args: None)


# ---------------------------------------------------------------- another number of steps


@pytest.mark.parametrize("variant", ["paper", "official", "simplified"])
def test_with_steps_keeps_the_shares_of_the_run(variant):
    rule = hyperrule(50_000, 32, variant=variant)
    short = rule.with_steps(rule.steps // 10)
    assert short == dataclasses.replace(
        rule,
        steps=rule.steps // 10,
        warmup_steps=rule.warmup_steps // 10,
        decay_steps=tuple(step // 10 for step in rule.decay_steps),
    )
    assert rule.with_steps(rule.steps) == rule
    assert [short.lr(t) for t in range(short.steps)][-1] < rule.base_lr
    assert min(rule.with_steps(1).decay_steps, default=1) == 1 and rule.with_steps(1).lr(0) >= 0
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, not 0"):
        rule.with_steps(0)
