"""evaluate() and the few-shot tools: protocol, modes, bad input, ridge and probe against scikit-learn."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import sklearn.linear_model
import torch
import torchvision.transforms.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from bitlib.data import ImageTensorDataset, normalize, resize
from bitlib.evaluate import (
    Metrics,
    eval_resize,
    evaluate,
    extract_features,
    few_shot_accuracy,
    linear_probe,
    predict_logits,
    reliability_diagram,
    ridge_classifier,
    ridge_dual,
    ridge_primal,
    topk_accuracy,
)
from bitlib.finetune import few_shot
from bitlib.resnet import create_model

NUMBERS = ("top1", "top5", "mean_per_class", "nll", "brier", "ece")


class Mean(nn.Module):
    """Three classes by the mean of each channel, seen at 4x4; remembers what it was given."""

    image_size = 4

    def __init__(self, scale=5.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.dropout = nn.Dropout(0.9)
        self.seen = []

    def features(self, x):
        return self.dropout(x)

    def forward(self, x):
        self.seen.append(x)
        return self.scale * self.features(x).mean((2, 3))


def colours(n=37, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return ImageTensorDataset(images, torch.randint(3, (n,), generator=generator))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = create_model("R14x0.25", num_classes=10)
    nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture(scope="module")
def digits():
    from bitlib.data import load_task

    return load_task("digits")


def test_evaluate_is_metrics_of_the_resized_normalised_images():
    dataset, model = colours(), Mean()
    x = normalize(resize(dataset.images, 4))
    expected = Metrics(3).update(5 * x.mean((2, 3)), dataset.labels).compute()
    result = evaluate(model, dataset)
    assert all(result[key] == pytest.approx(expected[key], abs=1e-6) for key in NUMBERS)
    assert torch.equal(result["confusion"], expected["confusion"]) and result["n"] == 37
    assert result["top1_interval"] == expected["top1_interval"]
    assert model.seen[0].shape == (37, 3, 4, 4) and -1 <= model.seen[0].min() and model.seen[0].max() <= 1


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 50))
def test_the_batch_size_does_not_matter(batch_size):
    whole, result = evaluate(Mean(), colours(), 37), evaluate(Mean(), colours(), batch_size)
    assert all(whole[key] == pytest.approx(result[key], abs=1e-6) for key in NUMBERS)
    assert torch.equal(whole["confusion"], result["confusion"])


def test_a_real_network_gives_the_same_for_any_batch_size(tiny, digits):
    some = ImageTensorDataset(digits.test.images[:20], digits.test.labels[:20])
    first, second = evaluate(tiny, some, 20), evaluate(tiny, some, 3)
    assert first["top1"] == second["top1"] and first["nll"] == pytest.approx(second["nll"], rel=1e-4)


def test_images_may_be_pil_or_tensors_of_any_shape_and_labels_any_integer():
    grey = Image.new("L", (9, 5), 128)
    palette = Image.new("RGB", (7, 7), (255, 0, 0)).convert("P")
    tensor = torch.full((3, 8, 3), 30, dtype=torch.uint8)
    items = [(grey, 0), (palette, np.int64(0)), (tensor, torch.tensor(2)), (tensor[:1], np.uint8(1))]
    result = evaluate(Mean(), items, batch_size=3)
    assert result["n"] == 4 and result["confusion"][0, 0] == 2

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(items)

    assert evaluate(Mean(), Stream(), batch_size=3)["nll"] == pytest.approx(result["nll"])


def test_every_modules_mode_is_restored_also_after_an_error():
    model = Mean().train()
    model.dropout.eval()  # frozen by its owner
    evaluate(model, colours())
    assert model.training and not model.dropout.training
    with pytest.raises(ValueError):
        evaluate(model, [(colours()[0][0], 7)])
    assert model.training and not model.dropout.training
    model.eval()
    extract_features(model, colours())
    assert not model.training


def test_runs_in_eval_mode_without_gradients_and_leaves_the_random_state_alone():
    model = Mean().train()
    state = torch.random.get_rng_state()
    first, second = evaluate(model, colours()), evaluate(model, colours())
    assert first["nll"] == second["nll"]  # no dropout
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(x.is_inference() for x in model.seen) or not model.seen[0].requires_grad
    features, labels = extract_features(model, colours())
    logits, _ = predict_logits(model, colours())
    assert not features.is_inference() and not logits.is_inference() and not logits.requires_grad
    assert torch.equal(labels, colours().labels)


def test_workers_give_the_same():
    assert evaluate(Mean(), colours(), 8, num_workers=1)["nll"] == evaluate(Mean(), colours(), 8)["nll"]


def test_flip_averages_probabilities():
    class Left(nn.Module):
        image_size = 4

        def forward(self, x):
            return torch.stack([x[:, 0, 0, 0], x[:, 0, 0, -1], x[:, 1, 0, 0]], 1)

    x = normalize(resize(colours().images, 4))
    mean = (Left()(x).softmax(1) + Left()(x.flip(-1)).softmax(1)) / 2
    logits, _ = predict_logits(Left(), colours(), flip=True)
    torch.testing.assert_close(logits.softmax(1), mean)
    assert not torch.allclose(predict_logits(Left(), colours())[0].softmax(1), mean)
    mirrored = ImageTensorDataset(colours().images.flip(-1), colours().labels)
    assert evaluate(Left(), mirrored, flip=True)["nll"] == pytest.approx(evaluate(Left(), colours(), flip=True)["nll"])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(8, 60), st.integers(8, 60), st.sampled_from([7, 14, 21, 28]))
def test_center_protocol_equals_torchvision(height, width, size):
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    expected = tv.center_crop(tv.resize(image, round(size / 0.875), antialias=True), size)
    ours = eval_resize(image, size, "center")
    assert ours.shape == (3, size, size) and ours.dtype == torch.uint8
    assert (ours.int() - expected.int()).abs().max() <= 1
    square = eval_resize(image, size)
    assert (square.int() - tv.resize(image, (size, size), antialias=True).int()).abs().max() <= 1


def test_square_keeps_the_border_and_center_cuts_it():
    image = torch.zeros(3, 32, 64, dtype=torch.uint8)
    image[:, :, :8] = 255
    assert eval_resize(image, 16).max() == 255 and eval_resize(image, 16, "center").max() == 0
    with pytest.raises(ValueError, match="'square' or 'center', got 'centre'"):
        evaluate(Mean(), colours(), resize="centre")


class Returns(nn.Module):
    """A model that gives a constant, whatever it sees."""

    image_size = 4

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


image = torch.zeros(3, 6, 6, dtype=torch.uint8)
BAD = {
    "empty list": (Mean(), [], ValueError, "data set is empty"),
    "label too high": (Mean(), [(image, 0), (image, 3)], ValueError, "example 1 is 3, outside the 3 classes"),
    "label too low": (Mean(), [(image, -1)], ValueError, "example 0 is -1, outside"),
    "label is a word": (Mean(), [(image, "cat")], TypeError, "example 0 is 'cat'.*an integer"),
    "label is a float": (Mean(), [(image, 1.0)], TypeError, "example 0 is 1.0"),
    "label is a bool": (Mean(), [(image, True)], TypeError, "example 0 is True"),
    "label is a vector": (Mean(), [(image, torch.tensor([1, 2]))], TypeError, "one class index"),
    "no label": (Mean(), [image], TypeError, r"pair \(image, class index\), got Tensor"),
    "float image": (Mean(), [(image.float(), 0)], TypeError, "uint8"),
    "rank of an image": (Mean(), [(image[None], 0)], ValueError, "shape"),
    "NaN": (Returns(torch.full((1, 3), math.nan)), [(image, 0)], ValueError, "NaN"),
    "rank of the logits": (
        Returns(torch.zeros(1, 3, 2)),
        [(image, 0)],
        ValueError,
        r"\(N, classes\), got \(1, 3, 2\)",
    ),
    "no tensor": (Returns({"out": 1}), [(image, 0)], ValueError, "got dict"),
    "not a model": (lambda x: x, [(image, 0)], TypeError, "torch.nn.Module, got function"),
    "a loader": (Mean(), DataLoader(colours()), TypeError, "got DataLoader.*as .dataset"),
    "a number": (Mean(), 3, TypeError, "got int"),
    "no image size": (nn.Linear(3, 3), [(image, 0)], ValueError, "image_size=224"),
}


@pytest.mark.parametrize("case", BAD)
def test_evaluate_refuses(case):
    model, dataset, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        evaluate(model, dataset)


def test_more_bad_input():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(Mean(), colours(), batch_size=0)
    with pytest.raises(TypeError, match=r"no method features"):
        extract_features(nn.Conv2d(3, 3, 1), colours())
    with pytest.raises(ValueError, match="outside the class indices"):
        extract_features(Mean(), [(image, -1)])

    class Nothing(IterableDataset):
        def __iter__(self):
            return iter(())

    for function in (evaluate, extract_features, predict_logits):
        with pytest.raises(ValueError, match="empty"):
            function(Mean(), Nothing())


def test_image_size_can_be_given():
    model = Mean()
    evaluate(model, colours(), image_size=5)
    assert model.seen[0].shape[-2:] == (5, 5)
    x = torch.zeros(2, 3, 4, 4)
    assert evaluate(Mean().double(), colours())["n"] == 37 and x.dtype == torch.float32  # the model's precision


def test_the_result_prints_as_a_table_and_goes_into_json():
    result = evaluate(Mean(), colours())
    lines = str(result).splitlines()
    assert len(lines) == 7 and lines[0].split() == ["examples", "37"] and lines[2].startswith("top-3")
    assert f"{result['top1']:.2%}" in lines[1] and "interval" in lines[1]
    back = json.loads(json.dumps(result.to_dict()))
    assert back["top1"] == result["top1"] and back["confusion"] == result["confusion"].tolist()
    assert isinstance(result, dict) and set(back) == set(result)


def test_progress_goes_to_stderr(capsys):
    evaluate(Mean(), colours(), progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "evaluate" in captured.err


# Ridge regression and the probe


def problem(n, d, n_classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % n_classes
    centres = torch.randn(n_classes, d, generator=generator)
    return centres[labels] + torch.randn(n, d, generator=generator) + 3, labels


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 5), st.floats(1e-3, 1e3), st.integers(0, 1000))
def test_primal_equals_dual_equals_scikit_learn(n, d, k, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(n, k, generator=generator, dtype=torch.float64)
    primal, dual = ridge_primal(z, y, lam), ridge_dual(z, y, lam)
    torch.testing.assert_close(primal, dual, atol=1e-8, rtol=1e-6)
    theirs = sklearn.linear_model.Ridge(alpha=lam, fit_intercept=False, solver="svd").fit(z, y).coef_.reshape(k, d)
    np.testing.assert_allclose(primal.T, theirs, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(("n", "d"), [(40, 8), (20, 50), (10, 10)])
@pytest.mark.parametrize("lam", [1e-2, 1.0, 100.0])
def test_ridge_classifier_equals_scikit_learn(n, d, lam):
    features, labels = problem(n, d, 4)
    ours = ridge_classifier(features, labels, lam)
    signs = 2 * np.eye(4)[labels] - 1
    theirs = sklearn.linear_model.Ridge(alpha=lam).fit(features.double(), signs)
    np.testing.assert_allclose(ours(features), theirs.predict(features.double()), atol=1e-8)
    one_hot = sklearn.linear_model.Ridge(alpha=lam).fit(features.double(), np.eye(4)[labels])
    assert (one_hot.predict(features.double()).argmax(1) == ours(features).argmax(1).numpy()).all()
    head = ours.as_head()
    torch.testing.assert_close(head(features).double(), ours(features), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_linear_probe_equals_scikit_learn(l2):
    features, labels = problem(60, 12, 3)
    ours = linear_probe(features, labels, l2)
    theirs = sklearn.linear_model.LogisticRegression(C=1 / (60 * l2), tol=1e-10, max_iter=10_000)
    theirs.fit(features.double(), labels)
    np.testing.assert_allclose(ours(features).softmax(1), theirs.predict_proba(features.double()), atol=1e-5)


@pytest.mark.parametrize("fit", [ridge_classifier, linear_probe])
def test_strength_is_chosen_without_looking_at_anything_else(fit):
    features, labels = problem(60, 200, 3)
    first = fit(features, labels)
    assert fit(features, labels).strength == first.strength and "200 features, 3 classes" in repr(first)
    # with a validation set whose labels say nothing, the strongest regularisation is best
    noise = torch.randn(400, 200), torch.arange(400) % 3
    assert fit(features, labels, val=noise).strength > first.strength
    # the strength has the units of the features, so scaling them changes nothing
    scaled = fit(1000 * features, labels)
    torch.testing.assert_close(scaled(1000 * features), first(features), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("fit", [ridge_classifier, linear_probe])
def test_few_examples_and_odd_shapes(fit):
    features, labels = problem(4, 7, 4)  # one example a class: nothing to validate on
    assert (fit(features, labels)(features).argmax(1) == labels).all()
    assert fit(features, torch.zeros(4, dtype=torch.long))(features).shape == (4, 1)
    assert fit(features, labels, num_classes=6)(features).shape == (4, 6)
    constant = fit(torch.ones(6, 3), torch.arange(6) % 2)
    assert torch.isfinite(constant(torch.ones(2, 3))).all()


@pytest.mark.parametrize("fit", [ridge_classifier, linear_probe])
def test_fits_refuse(fit):
    features, labels = problem(12, 5, 3)
    broken = features.clone()
    broken[1, 1] = math.nan
    for x, y, kind, message in (
        (features[0], labels[:5], ValueError, r"shape \(n, d\)"),
        (features[:0], labels[:0], ValueError, "n of at least 1"),
        (broken, labels, ValueError, "NaN"),
        (features, labels[:3], ValueError, "12 rows"),
        (features, labels.float(), TypeError, "class indices"),
        (features, labels - 1, ValueError, "outside 0"),
    ):
        with pytest.raises(kind, match=message):
            fit(x, y)
    for strength in (0, -1.0):
        with pytest.raises(ValueError, match="above 0"):
            fit(features, labels, strength)


def test_a_fitted_head_makes_the_network_the_same_classifier(tiny, digits):
    train = ImageTensorDataset(digits.train.images[:60], digits.train.labels[:60])
    features, labels = extract_features(tiny, train)
    assert features.shape == (60, tiny.num_features) and torch.equal(labels, train.labels)
    classifier = ridge_classifier(features, labels, num_classes=10)
    model = copy.deepcopy(tiny)
    model.head = classifier.as_head()
    assert evaluate(model, train)["top1"] == topk_accuracy(classifier(features), labels)
    assert topk_accuracy(classifier(features), labels) > 0.8  # it has seen these


def test_the_search_for_a_strength_stops_early_but_not_too_early():
    from bitlib.evaluate import _STRENGTHS, _choose_strength

    tried = []

    def search(losses, patience):
        tried.clear()

        def fit(features, labels, strength):
            tried.append(strength)
            return lambda _: torch.tensor(losses[strength])

        data = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)
        return _choose_strength(fit, lambda score, _: score, *data, data, 0, patience)

    losses = dict(zip(reversed(_STRENGTHS), [5.0, 4.0, 3.0, 3.5, 3.2, 9.0, 1.0], strict=True))
    assert search(losses, 7) == 1e-6 and len(tried) == 7  # all of them
    assert search(losses, 2) == 1e-2 and tried == [1.0, 1e-1, 1e-2, 1e-3, 1e-4]
    assert search(dict.fromkeys(_STRENGTHS, 1.0), 2) == 1e-6  # of equals the weakest


def test_few_shot_accuracy_is_the_mean_over_its_episodes():
    train, test = problem(90, 20, 3), problem(300, 20, 3)
    result = few_shot_accuracy(train, test, 5, seeds=(3, 7))
    expected = []
    for seed in (3, 7):
        chosen = few_shot(train[1], 5, seed)
        classifier = ridge_classifier(train[0][chosen], train[1][chosen], seed=seed)
        expected.append(topk_accuracy(classifier(test[0]), test[1]))
    assert result.per_seed.tolist() == pytest.approx(expected)
    assert result.mean == pytest.approx(sum(expected) / 2) and result.low <= result.mean <= result.high
    more = few_shot_accuracy(train, test, 25, seeds=(0, 1), fit=linear_probe)
    assert more.mean > result.mean and len(more.per_seed) == 2 and "2 seeds" in repr(more)
    with pytest.raises(ValueError, match="no seeds"):
        few_shot_accuracy(train, test, 5, seeds=())
    with pytest.raises(ValueError, match="n_shots=40"):
        few_shot_accuracy(train, test, 40)


def test_the_diagram_draws():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    reliability_diagram({"a": evaluate(Mean(), colours())["reliability"]})
    assert plt.gca().get_xlabel() == "confidence"
    plt.close("all")


def test_import_pulls_in_no_oracle():
    code = (
        "import sys, bitlib.evaluate; "
        "bad = {'sklearn', 'skimage', 'scipy', 'torchmetrics', 'matplotlib', 'timm'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
