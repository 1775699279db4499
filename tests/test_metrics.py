"""The metrics of bitlib.evaluate against scikit-learn, SciPy and torchmetrics, and their own laws."""

import math
import warnings

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import sklearn.metrics
import torch
import torchmetrics.functional.classification as tm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from bitlib.evaluate import (
    Metrics,
    bootstrap_interval,
    brier_score,
    confusion_matrix,
    expected_calibration_error,
    mcnemar,
    mean_per_class_accuracy,
    negative_log_likelihood,
    per_class_accuracy,
    reliability_curve,
    temperature_scaling,
    topk_accuracy,
    wilson_interval,
)

settings.register_profile("book", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("book")


@st.composite
def predictions(draw, min_classes=1, max_n=60):
    """Logits and labels of every kind: random, nearly certain, tied, of one class, with empty classes."""
    n = draw(st.integers(1, max_n))
    n_classes = draw(st.integers(min_classes, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    kind = draw(st.sampled_from(["random", "certain", "tied", "zeros", "right", "wide"]))
    logits = torch.randn(n, n_classes, generator=generator, dtype=dtype)
    high = n_classes if draw(st.booleans()) else draw(st.integers(1, n_classes))  # the rest have no example
    labels = torch.randint(high, (n,), generator=generator)
    if kind == "certain":
        logits = logits * 100  # softmax is exactly 1 somewhere
    elif kind == "tied":
        logits = logits.round()
    elif kind == "zeros":
        logits = torch.zeros_like(logits)
    elif kind == "right":
        logits[torch.arange(n), labels] += 50
    elif kind == "wide":
        logits = logits * 1e4
    return logits, labels


def tied(logits):
    """Whether any row holds two equal logits."""
    ordered = logits.sort(1).values
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())


@given(predictions(min_classes=3), st.integers(1, 8))
def test_topk_equals_scikit_learn_and_torchmetrics_without_ties(data, k):
    logits, labels = data
    assume(k <= logits.shape[1] and not tied(logits))
    ours = topk_accuracy(logits, labels, k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = sklearn.metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(logits.shape[1]))
    # torchmetrics takes a softmax of what lies outside 0 to 1; where that saturates, it has ties
    if k < logits.shape[1] and not tied(logits.softmax(1)):
        other = tm.multiclass_accuracy(logits, labels, logits.shape[1], top_k=k, average="micro")
        assert ours == pytest.approx(other.item(), abs=1e-6)
    assert ours == pytest.approx(theirs, abs=1e-12)


@given(predictions())
def test_topk_breaks_ties_like_a_stable_descending_sort(data):
    logits, labels = data
    order = logits.sort(dim=1, descending=True, stable=True).indices
    for k in range(1, logits.shape[1] + 1):
        expected = (order[:, :k] == labels[:, None]).any(1).double().mean().item()
        assert topk_accuracy(logits, labels, k) == pytest.approx(expected, abs=1e-12)
    assert topk_accuracy(logits, labels, 1) == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert topk_accuracy(logits, labels, logits.shape[1]) == 1


def test_top1_of_a_zero_head_is_the_share_of_the_first_class():
    assert topk_accuracy(torch.zeros(6, 3), torch.tensor([0, 0, 1, 2, 2, 2])) == pytest.approx(2 / 6)


@given(predictions())
def test_confusion_and_mean_per_class_equal_scikit_learn(data):
    logits, labels = data
    confusion = confusion_matrix(logits, labels)
    expected = sklearn.metrics.confusion_matrix(labels, logits.argmax(1), labels=range(logits.shape[1]))
    assert confusion.dtype == torch.int64 and (confusion.numpy() == expected).all()
    with warnings.catch_warnings():  # it warns of classes that are predicted and have no example, or of a single one
        warnings.simplefilter("ignore")
        balanced = sklearn.metrics.balanced_accuracy_score(labels, logits.argmax(1))
    assert mean_per_class_accuracy(logits, labels) == pytest.approx(balanced, abs=1e-9)
    empty = torch.bincount(labels, minlength=logits.shape[1]) == 0
    assert torch.equal(per_class_accuracy(confusion).isnan(), empty)


@given(predictions(min_classes=2))
def test_nll_and_brier_equal_scikit_learn(data):
    logits, labels = data
    probabilities = logits.double().softmax(1).numpy()
    nll, brier = negative_log_likelihood(logits, labels), brier_score(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert nll == pytest.approx(expected, rel=1e-5, abs=1e-6)
    if probabilities.min() > 1e-12:  # below, scikit-learn clips
        theirs = sklearn.metrics.log_loss(labels, probabilities, labels=range(logits.shape[1]))
        assert nll == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    given = probabilities if logits.shape[1] > 2 else probabilities[:, 1]
    theirs = sklearn.metrics.brier_score_loss(labels, given, labels=range(logits.shape[1]), scale_by_half=False)
    assert brier == pytest.approx(theirs, abs=1e-5 if logits.dtype == torch.float32 else 1e-9)


@given(predictions(min_classes=2), st.integers(1, 30))
def test_equal_width_ece_equals_torchmetrics(data, n_bins):
    logits, labels = data
    probabilities = logits.softmax(1)  # torchmetrics would take logits that lie between 0 and 1 for probabilities
    theirs = tm.multiclass_calibration_error(probabilities, labels, logits.shape[1], n_bins=n_bins).item()
    assert expected_calibration_error(logits, labels, n_bins) == pytest.approx(theirs, abs=1e-6)


@given(predictions(), st.integers(1, 20))
def test_equal_width_ece_equals_its_definition(data, n_bins):
    logits, labels = data
    confidence, prediction = logits.softmax(1).amax(1), logits.argmax(1)
    edges = torch.linspace(0, 1, n_bins + 1, dtype=logits.dtype)
    expected = 0.0
    for low, high in zip(edges, [*edges[1:-1], torch.tensor(1.0)], strict=False):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            gap = (prediction[inside] == labels[inside]).double().mean() - confidence[inside].double().mean()
            expected += inside.double().mean().item() * gap.abs().item()
    one = confidence == 1
    if one.any():
        expected += one.double().mean().item() * (1 - (prediction[one] == labels[one]).double().mean().item())
    assert expected_calibration_error(logits, labels, n_bins) == pytest.approx(expected, abs=1e-9)


@given(st.integers(1, 200), st.integers(1, 20), st.integers(2, 6), st.floats(0.1, 5), st.integers(0, 2**31))
def test_equal_mass_curve_equals_scikit_learn(n, n_bins, n_classes, scale, seed):
    assume(math.gcd(n - 1, n_bins) == 1)  # else a quantile is an element, and rounding decides its side there
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(n_classes, (n,), generator=generator)
    confidence, prediction = logits.softmax(1).max(1)
    correct = (prediction == labels).numpy()
    accuracy, mean = calibration_curve(correct, confidence.numpy(), n_bins=n_bins, strategy="quantile")
    curve = reliability_curve(logits, labels, n_bins, bins="mass")
    np.testing.assert_allclose(curve.accuracy, accuracy, atol=1e-9)
    np.testing.assert_allclose(curve.confidence, mean, atol=1e-9)
    expected = np.average(np.abs(accuracy - mean), weights=curve.count)
    assert expected_calibration_error(logits, labels, n_bins, bins="mass") == pytest.approx(expected, abs=1e-9)


@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 1000))
def test_equal_mass_bins_hold_equal_counts(per_bin, n_bins, seed):
    n = per_bin * n_bins
    logits = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    count = reliability_curve(logits, torch.zeros(n, dtype=torch.long), n_bins, bins="mass").count
    assert count.sum() == n and count.max() - count.min() <= 1


def test_equal_confidences_share_one_bin():
    logits, labels = torch.zeros(10, 4), torch.arange(10) % 4
    for bins in ("width", "mass"):
        curve = reliability_curve(logits, labels, 5, bins)
        assert curve.count.tolist() == [10]
        assert curve.ece == pytest.approx(abs(0.3 - 0.25))


@given(predictions())
def test_bounds(data):
    logits, labels = data
    result = Metrics(logits.shape[1]).update(logits, labels).compute()
    for key in ("top1", "top5", "mean_per_class", "ece"):
        assert 0 <= result[key] <= 1 + 1e-12
    assert result["top1"] <= result["top5"]
    assert result["nll"] >= 0 and -1e-12 <= result["brier"] <= 2 + 1e-6
    low, high = result["top1_interval"]
    assert 0 <= low <= result["top1"] <= high <= 1
    assert result["confusion"].sum() == result["n"] == len(labels)
    mass = expected_calibration_error(logits, labels, bins="mass")
    assert 0 <= mass <= 1 + 1e-12


KEYS = ("top1", "top5", "mean_per_class", "nll", "brier", "ece")


@given(predictions(), st.integers(0, 2**31))
def test_the_order_of_the_examples_does_not_matter(data, seed):
    logits, labels = data
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first = Metrics(logits.shape[1]).update(logits, labels).compute()
    second = Metrics(logits.shape[1]).update(logits[order], labels[order]).compute()
    assert all(first[key] == pytest.approx(second[key], rel=1e-12, abs=1e-12) for key in KEYS)
    for bins in ("width", "mass"):
        one = expected_calibration_error(logits, labels, bins=bins)
        assert one == pytest.approx(expected_calibration_error(logits[order], labels[order], bins=bins), abs=1e-12)


@given(predictions(), st.integers(0, 2**31))
def test_the_names_of_the_classes_do_not_matter_without_ties(data, seed):
    logits, labels = data
    assume(not tied(logits))
    order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(seed))
    first = Metrics(logits.shape[1]).update(logits, labels).compute()
    second = Metrics(logits.shape[1]).update(logits[:, order], order.argsort()[labels]).compute()
    assert all(first[key] == pytest.approx(second[key], rel=1e-5, abs=1e-5) for key in KEYS if key != "ece")


@given(predictions(), st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_streaming_gives_the_same_for_any_batches(data, sizes):
    logits, labels = data
    whole, stream = Metrics(logits.shape[1]).update(logits, labels).compute(), Metrics(logits.shape[1])
    start, i = 0, 0
    while start < len(labels):
        size = sizes[i % len(sizes)]
        stream.update(logits[start : start + size], labels[start : start + size])
        start, i = start + size, i + 1
    result = stream.compute()
    assert all(whole[key] == pytest.approx(result[key], rel=1e-12, abs=1e-12) for key in KEYS)
    assert torch.equal(whole["confusion"], result["confusion"])
    assert torch.equal(whole["reliability"].count, result["reliability"].count)
    assert whole["top1_interval"] == result["top1_interval"]


@given(predictions())
def test_streaming_equals_the_functions(data):
    logits, labels = data
    result = Metrics(logits.shape[1], n_bins=10).update(logits, labels).compute()
    assert result["top1"] == pytest.approx(topk_accuracy(logits, labels))
    assert result["top5"] == pytest.approx(topk_accuracy(logits, labels, min(5, logits.shape[1])))
    assert result["mean_per_class"] == pytest.approx(mean_per_class_accuracy(logits, labels))
    assert result["nll"] == pytest.approx(negative_log_likelihood(logits, labels))
    assert result["brier"] == pytest.approx(brier_score(logits, labels))
    assert result["ece"] == pytest.approx(expected_calibration_error(logits, labels, 10))


def test_streaming_keeps_no_examples():
    metrics = Metrics(3)
    sizes = []
    for _ in range(3):
        metrics.update(torch.randn(1000, 3), torch.randint(3, (1000,)))
        sizes.append(sum(v.numel() for v in vars(metrics).values() if isinstance(v, torch.Tensor)))
        assert not any(isinstance(v, list | dict) for v in vars(metrics).values())
    assert len(set(sizes)) == 1 and sizes[0] == 9 + 16 * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_single(dtype):
    logits, labels = torch.randn(50, 4).to(dtype), torch.randint(4, (50,))
    assert negative_log_likelihood(logits, labels) == pytest.approx(
        negative_log_likelihood(logits.float(), labels), abs=1e-12
    )


def test_probabilities_go_in_as_their_logarithm():
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.0, 0.8]], dtype=torch.float64)
    labels = torch.tensor([0, 2])
    assert negative_log_likelihood(probabilities.log(), labels) == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2)
    assert brier_score(probabilities.log(), labels) == pytest.approx((0.5 + 0.08) / 2)
    assert negative_log_likelihood(probabilities.log(), torch.tensor([2, 2])) == math.inf


METRICS = [
    topk_accuracy,
    confusion_matrix,
    mean_per_class_accuracy,
    negative_log_likelihood,
    brier_score,
    expected_calibration_error,
    reliability_curve,
    temperature_scaling,
    lambda logits, labels: Metrics(3).update(logits, labels),
]
ok = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
nan, inf = ok[0].clone(), ok[0].clone()
nan[2, 1], inf[1, 0] = math.nan, math.inf
BAD = {
    "NaN": (nan, ok[1], ValueError, "NaN or infinity, the first is row 2"),
    "infinity": (inf, ok[1], ValueError, "NaN or infinity, the first is row 1"),
    "nothing but -inf": (torch.full((1, 3), -math.inf), ok[1][:1], ValueError, "NaN or infinity"),
    "label too high": (
        ok[0],
        torch.tensor([0, 1, 3, 0]),
        ValueError,
        r"label 3 is outside the 3 classes.*0 to 2",
    ),
    "label too low": (ok[0], torch.tensor([0, 1, -1, 0]), ValueError, "label -1 is outside"),
    "no examples": (ok[0][:0], ok[1][:0], ValueError, "at least one"),
    "rank 1": (ok[0][0], ok[1][:3], ValueError, r"shape \(N, K\).*got \(3,\)"),
    "rank 3": (ok[0][None], ok[1], ValueError, r"got \(1, 4, 3\)"),
    "no classes": (ok[0][:, :0], ok[1], ValueError, r"got \(4, 0\)"),
    "unequal length": (ok[0], ok[1][:3], ValueError, r"shape \(4,\), got \(3,\)"),
    "one-hot labels": (ok[0], torch.eye(3)[ok[1]].long(), ValueError, r"got \(4, 3\)"),
    "integer logits": (ok[0].long(), ok[1], TypeError, "floating-point"),
    "float labels": (ok[0], ok[1].float(), TypeError, "class indices"),
    "boolean labels": (ok[0], ok[1].bool(), TypeError, "class indices"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_refuses(metric, case):
    logits, labels, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        metric(logits, labels)


def test_a_refused_batch_adds_nothing():
    metrics = Metrics(3).update(*ok)
    before = metrics.compute()
    with pytest.raises(ValueError):
        metrics.update(nan, ok[1])
    assert metrics.n == 4 and metrics.compute()["nll"] == before["nll"]
    with pytest.raises(ValueError, match="2 classes given to metrics for 3"):
        metrics.update(ok[0][:, :2], torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one"):
        Metrics(3).compute()
    with pytest.raises(ValueError, match="at least 1"):
        Metrics(0)


def test_bad_settings():
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and the number of classes, 3; got {k}"):
            topk_accuracy(*ok, k=k)
    with pytest.raises(ValueError, match="'width' or 'mass', got 'equal'"):
        reliability_curve(*ok, bins="equal")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        expected_calibration_error(*ok, n_bins=0)


@given(predictions(min_classes=2), st.floats(0.2, 5))
def test_temperature_scaling_finds_the_minimum(data, factor):
    logits, labels = data
    logits = (logits * factor).double()
    temperature = temperature_scaling(logits, labels)
    assert 0.01 <= temperature <= 100

    def nll(log_t):
        return negative_log_likelihood(logits / math.exp(log_t), labels)

    best = scipy.optimize.minimize_scalar(nll, bounds=(-math.log(100), math.log(100)), method="bounded")
    assert nll(math.log(temperature)) <= min(best.fun, nll(0)) * (1 + 1e-6) + 1e-6
    assert topk_accuracy(logits / temperature, labels) == topk_accuracy(logits, labels)


def test_temperature_scaling_recovers_a_known_temperature():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert temperature_scaling(3 * logits, labels) == pytest.approx(3, rel=0.05)
    assert temperature_scaling(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])) == pytest.approx(1)
    right = torch.eye(3)[[0, 1, 2]]
    sharp = temperature_scaling(right, torch.arange(3))  # nothing is too sharp, until the NLL rounds to 0
    assert 0.01 <= sharp < 0.05 and negative_log_likelihood(right / sharp, torch.arange(3)) < 1e-9
    assert temperature_scaling(right, torch.tensor([1, 2, 0])) == pytest.approx(100)


def test_temperature_scaling_takes_tensors_from_inference():
    with torch.inference_mode():
        logits = torch.randn(30, 3, dtype=torch.float64)
    labels = torch.randint(3, (30,))
    with torch.no_grad():
        assert temperature_scaling(logits, labels) > 0


@given(st.integers(1, 3000), st.floats(0, 1), st.floats(0.5, 0.999))
def test_wilson_equals_scipy(n, share, level):
    successes = round(share * n)
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    low, high = wilson_interval(successes, n, level)
    assert low == pytest.approx(theirs.low, abs=1e-9) and high == pytest.approx(theirs.high, abs=1e-9)
    assert 0 <= low <= successes / n <= high <= 1


def test_wilson_refuses():
    for successes, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="is not a share"):
            wilson_interval(successes, n)
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson_interval(1, 2, level=95)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300))
def test_mcnemar_equals_the_binomial_test(pairs):
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    b, c, p = mcnemar(first, second)
    assert b == sum(x and not y for x, y in pairs) and c == sum(y and not x for x, y in pairs)
    expected = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert p == pytest.approx(expected, abs=1e-9)
    assert mcnemar(second, first) == (c, b, p)


def test_mcnemar_is_exact_for_many_disagreements_and_refuses():
    first, second = torch.arange(6000) < 2900, torch.arange(6000) >= 2900
    assert mcnemar(first, second).p_value == pytest.approx(scipy.stats.binomtest(2900, 6000).pvalue, rel=1e-9)
    assert mcnemar(torch.ones(3), torch.ones(3)).p_value == 1
    with pytest.raises(ValueError, match="same images"):
        mcnemar(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="right or wrong"):
        mcnemar(torch.tensor([0.2, 0.9]), torch.tensor([1.0, 0.0]))


def test_bootstrap_covers_about_as_often_as_it_says():
    generator, held = torch.Generator().manual_seed(0), 0
    for trial in range(200):
        sample = torch.randn(80, generator=generator, dtype=torch.float64) + 2
        low, high = bootstrap_interval(sample, level=0.9, n_resamples=400, seed=trial)
        held += low < 2 < high
    assert 165 <= held <= 195


def test_bootstrap_equals_scipy_within_its_own_noise():
    values = torch.rand(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = bootstrap_interval(values)
    theirs = scipy.stats.bootstrap((values.numpy(),), np.mean, method="percentile", rng=0).confidence_interval
    assert low == pytest.approx(theirs.low, abs=0.005) and high == pytest.approx(theirs.high, abs=0.005)
    assert bootstrap_interval(values) == (low, high)  # seeded
    assert bootstrap_interval(values, seed=1) != (low, high)


def test_bootstrap_of_a_table_draws_rows_and_columns():
    same_rows = (torch.rand(1, 100) < 0.5).double().expand(5, 100)  # seeds differ in nothing, images in all
    same_columns = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])[:, None].expand(5, 100)
    assert bootstrap_interval(same_rows) == pytest.approx(bootstrap_interval(same_rows[0]), abs=0.02)
    assert bootstrap_interval(same_columns) == pytest.approx(bootstrap_interval(same_columns[:, 0]), abs=0.02)
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9])[:, None]
    table = (torch.rand(5, 100, generator=generator) < rates).double()

    def width(values):
        low, high = bootstrap_interval(values)
        return high - low

    assert width(table) > max(width(table.mean(1)), width(table.mean(0)))
    assert bootstrap_interval(torch.full((7,), 0.25)) == pytest.approx((0.25, 0.25))


def test_bootstrap_refuses():
    for values in (torch.tensor([]), torch.tensor(1.0), torch.tensor([1.0, math.nan]), torch.zeros(2, 2, 2)):
        with pytest.raises(ValueError, match="must be finite, of shape"):
            bootstrap_interval(values)
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_interval(torch.ones(3), level=1)
    with pytest.raises(ValueError, match="n_resamples"):
        bootstrap_interval(torch.ones(3), n_resamples=0)
