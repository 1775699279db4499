"""Accuracy, calibration, intervals, paired tests, protocols and few-shot evaluation.

Exported from chapters/09_evaluation.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "topk_accuracy",
    "confusion_matrix",
    "per_class_accuracy",
    "mean_per_class_accuracy",
    "wilson_interval",
    "negative_log_likelihood",
    "brier_score",
    "ReliabilityCurve",
    "reliability_curve",
    "expected_calibration_error",
    "reliability_diagram",
    "temperature_scaling",
    "Evaluation",
    "Metrics",
    "eval_resize",
    "predict_logits",
    "evaluate",
    "extract_features",
    "ridge_primal",
    "ridge_dual",
    "LinearClassifier",
    "ridge_classifier",
    "linear_probe",
    "McNemar",
    "mcnemar",
    "bootstrap_interval",
    "FewShotAccuracy",
    "few_shot_accuracy",
    "right_bits",
    "right_images",
    "SUITE_METHODS",
    "SCRATCH_RATES",
    "suite_tasks",
    "draw_examples",
    "task_rule",
    "suite_label",
    "SuiteResults",
    "read_suite",
    "weights_digest",
    "write_json",
    "evaluate_suite",
    "SuiteScore",
    "suite_scores",
    "suite_difference",
    "suite_summary",
    "suite_table",
    "write_predictions",
    "score_predictions",
    "suite_plot",
    "CORRUPTIONS",
    "corrupt",
    "on_photographs",
    "robustness",
    "VTAB_1K",
    "CLEVR_DISTANCES",
    "KITTI_DISTANCES",
    "vtab_label",
    "VtabImages",
    "VtabTask",
    "load_vtab_task",
]

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from bitlib.data import (
    DOWNSTREAM_PHOTOGRAPHS,
    VTAB_MINI,
    ImageTensorDataset,
    Task,
    load_task,
    package_file,
    photograph_windows,
)
from bitlib.data import center_crop as _center_crop
from bitlib.data import normalize as _normalize
from bitlib.data import resize as _resize
from bitlib.data import resize_shorter_side as _resize_shorter_side
from bitlib.data import to_tensor as _to_tensor
from bitlib.finetune import few_shot as _few_shot
from bitlib.finetune import finetune, labels_of
from bitlib.hyperrule import Rule, hyperrule
from bitlib.pretrain import write_atomically
from bitlib.resnet import create_model


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K) in float32 or float64 and labels (N,) in int64, or an error that says what is wrong."""
    logits, labels = torch.as_tensor(logits).detach(), torch.as_tensor(labels)
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating-point numbers, got {logits.dtype}; for class indices use labels")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be class indices (integers), got {labels.dtype}")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape (N, K) with K of at least 1, got {tuple(logits.shape)}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} need labels of shape ({len(logits)},), got {tuple(labels.shape)}"
        )
    if len(labels) == 0:
        raise ValueError("there are no examples; a metric needs at least one")
    n_classes, low, high = logits.shape[1], int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise ValueError(
            f"label {low if low < 0 else high} is outside the {n_classes} classes of the logits; "
            f"they are 0 to {n_classes - 1}"
        )
    broken = ~torch.isfinite(logits.amax(1))  # NaN anywhere, +inf anywhere, or nothing but -inf
    if broken.any():
        raise ValueError(
            f"{int(broken.sum())} of {len(labels)} rows of logits hold NaN or infinity, the first is row "
            f"{int(broken.nonzero()[0])}; a loss that diverged or a half-precision overflow does that"
        )
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    return logits, labels.to(logits.device, torch.int64)


def _rank(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the true one, (N,); of equal logits the lowest index stands first."""
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | (earlier & (logits == own))).sum(1)


def topk_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """The share of examples whose true class is among the k largest logits.

    logits: (N, K); labels: (N,). Ties are broken as argmax breaks them: the lowest class index first.
    Raises ValueError for k outside 1 to K.
    """
    logits, labels = _checked(logits, labels)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k must lie between 1 and the number of classes, {logits.shape[1]}; got {k}")
    return (_rank(logits, labels) < k).double().mean().item()


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts (K, K), int64: the row is the true class, the column the predicted one."""
    logits, labels = _checked(logits, labels)
    n_classes = logits.shape[1]
    return torch.bincount(labels * n_classes + logits.argmax(1), minlength=n_classes**2).view(n_classes, n_classes)


def per_class_accuracy(confusion: Tensor) -> Tensor:
    """The accuracy of each class (K,) from a confusion matrix; NaN for a class without examples."""
    return confusion.diagonal().double() / confusion.sum(1)


def mean_per_class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """The average of the classes' accuracies over the classes that have examples (balanced accuracy)."""
    return per_class_accuracy(confusion_matrix(logits, labels)).nanmean().item()


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, 0.95 for instance; got {level}")


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The interval for a share of which `successes` of n were seen (Wilson, 1927); it lies within 0 to 1."""
    _check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n} is not a share; give 0 <= successes <= n and n >= 1")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    middle = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
    # the ends touch 0 and 1 exactly there; rounding must not say otherwise
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def _nll_each(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(1).gather(1, labels[:, None])[:, 0]


def _brier_each(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])).square().sum(1)


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """The mean of -log p(true class), in nats; infinite if a true class has probability zero."""
    return _nll_each(*_checked(logits, labels)).double().mean().item()


def brier_score(logits: Tensor, labels: Tensor) -> float:
    """The mean squared distance of the probabilities from the one-hot truth, summed over classes: 0 to 2."""
    return _brier_each(*_checked(logits, labels)).double().mean().item()


class ReliabilityCurve(NamedTuple):
    """Predictions in bins of confidence: mean confidence, accuracy and count of each non-empty bin."""

    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def ece(self) -> float:
        """The expected calibration error: the gaps between accuracy and confidence, weighted by bin size."""
        weights = self.count.double() / self.count.sum()
        return (weights * (self.accuracy - self.confidence).abs()).sum().item()


def _confidence(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    confidence = logits.softmax(1).amax(1)
    return confidence, logits.argmax(1) == labels


def _bin_sums(bins: Tensor, n_bins: int, confidence: Tensor, correct: Tensor) -> Tensor:
    """(n_bins, 3) in float64: for each bin the count, the sum of the confidences, the number right."""
    values = torch.stack([torch.ones_like(confidence), confidence, correct.to(confidence)], dim=1).double()
    return torch.zeros(n_bins, 3, dtype=torch.float64, device=bins.device).index_add_(0, bins, values)


def _equal_width_sums(confidence: Tensor, correct: Tensor, n_bins: int) -> Tensor:
    """Bins [b/M, (b+1)/M), and one more for a confidence of exactly 1, as in torchmetrics: (M + 1, 3)."""
    edges = torch.linspace(0, 1, n_bins + 1, dtype=confidence.dtype, device=confidence.device)
    return _bin_sums(torch.bucketize(confidence, edges, right=True) - 1, n_bins + 1, confidence, correct)


def _equal_mass_sums(confidence: Tensor, correct: Tensor, n_bins: int) -> Tensor:
    """Bins that end at the quantiles of the confidence; equal confidences always share one: (M, 3)."""
    ordered, last = confidence.double().sort().values, len(confidence) - 1
    place = last * torch.arange(1, n_bins, device=confidence.device)  # of the quantiles 1/M, 2/M, ..., times M
    below = place // n_bins
    edges = ordered[below].lerp(ordered[(below + 1).clamp(max=last)], (place % n_bins).double() / n_bins)
    return _bin_sums(torch.bucketize(confidence.double(), edges), n_bins, confidence, correct)


def _curve(sums: Tensor) -> ReliabilityCurve:
    count, confidence, correct = sums[sums[:, 0] > 0].T
    return ReliabilityCurve(confidence / count, correct / count, count.long())


def reliability_curve(logits: Tensor, labels: Tensor, n_bins: int = 15, bins: str = "width") -> ReliabilityCurve:
    """Accuracy against confidence, for the predictions grouped by confidence (Guo et al., 2017).

    bins: "width" for bins of equal width, closed on the left, with a confidence of exactly 1 in a bin of its
    own (as in torchmetrics); "mass" for bins that end at the quantiles (as in scikit-learn), so of about
    equal count. Empty bins are left out. Raises ValueError for another kind of bins, or for fewer than one.
    """
    kinds = {"width": _equal_width_sums, "mass": _equal_mass_sums}
    if bins not in kinds:
        raise ValueError(f"bins must be 'width' or 'mass', got {bins!r}")
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}; 15 is usual")
    return _curve(kinds[bins](*_confidence(*_checked(logits, labels)), n_bins))


def expected_calibration_error(logits: Tensor, labels: Tensor, n_bins: int = 15, bins: str = "width") -> float:
    """The mean gap between confidence and accuracy over bins of confidence, weighted by bin size: 0 to 1."""
    return reliability_curve(logits, labels, n_bins, bins).ece


def reliability_diagram(curves: dict[str, ReliabilityCurve]) -> None:
    """Draw accuracy against confidence on matplotlib's current axes; a point's area grows with its count."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('drawing needs matplotlib; install it with: pip install "bitlib[book]"') from error
    plt.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="calibrated")
    for name, curve in curves.items():
        (line,) = plt.plot(curve.confidence.cpu(), curve.accuracy.cpu(), label=f"{name}, ECE {curve.ece:.3f}")
        areas = 400 * curve.count.cpu() / curve.count.sum().cpu()
        plt.scatter(curve.confidence.cpu(), curve.accuracy.cpu(), s=areas, color=line.get_color(), alpha=0.5)
    plt.xlabel("confidence")
    plt.ylabel("accuracy")
    plt.legend()


@torch.enable_grad()
def temperature_scaling(logits: Tensor, labels: Tensor) -> float:
    """The temperature T, 0.01 to 100, for which logits / T has the smallest NLL (Guo et al., 2017).

    logits: (N, K), labels: (N,), of images that the model was neither trained nor is to be judged on.
    """
    logits, labels = _checked(logits, labels)
    logits, limit = logits.double().clone(), math.log(100)

    def loss(log_t: Tensor) -> Tensor:
        return F.cross_entropy(logits / log_t.clamp(-limit, limit).exp(), labels)

    grid = torch.linspace(-limit, limit, 41, dtype=torch.float64, device=logits.device)
    grid = grid[grid.abs().argsort()]  # T = 1 first: the answer if all temperatures are equally good
    log_t = grid[torch.stack([loss(value) for value in grid]).argmin()].clone().requires_grad_()
    optimiser = torch.optim.LBFGS([log_t], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(log_t)
        value.backward()
        return value

    optimiser.step(closure)
    return min(max(math.exp(log_t.item()), 0.01), 100.0)


class Evaluation(dict):
    """The metrics of one evaluation, by name. It prints as a table; `to_dict()` is for JSON."""

    def __repr__(self) -> str:
        low, high = self["top1_interval"]
        rows = [
            ("examples", f"{self['n']:d}", ""),
            ("top-1", f"{self['top1']:.2%}", f"95 % interval {low:.2%} to {high:.2%}"),
            (f"top-{min(5, len(self['confusion']))}", f"{self['top5']:.2%}", ""),
            ("mean per-class", f"{self['mean_per_class']:.2%}", ""),
            ("NLL", f"{self['nll']:.4f}", "nats"),
            ("Brier score", f"{self['brier']:.4f}", "0 to 2"),
            ("ECE", f"{self['ece']:.4f}", "equal-width bins"),
        ]
        return "\n".join(f"{name:15s}{value:>9s}  {note}".rstrip() for name, value, note in rows)

    def to_dict(self) -> dict:
        """The same in plain Python, for JSON: lists in place of tensors and tuples."""
        return {
            **self,
            "top1_interval": list(self["top1_interval"]),
            "confusion": self["confusion"].tolist(),
            "reliability": {name: values.tolist() for name, values in self["reliability"]._asdict().items()},
        }


class Metrics:
    """Adds up what the metrics need, batch by batch, in memory that does not grow: K x K counts, some sums.

    `Metrics(10).update(logits, labels).update(logits, labels).compute()`.
    """

    def __init__(self, num_classes: int, n_bins: int = 15):
        if num_classes < 1 or n_bins < 1:
            raise ValueError(f"num_classes and n_bins must be at least 1, got {num_classes} and {n_bins}")
        self.num_classes, self.n_bins, self.k = num_classes, n_bins, min(5, num_classes)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.bins = torch.zeros(n_bins + 1, 3, dtype=torch.float64)
        self.topk_hits, self.nll, self.brier = 0, 0.0, 0.0

    @property
    def n(self) -> int:
        """The number of examples seen."""
        return int(self.confusion.sum())

    def update(self, logits: Tensor, labels: Tensor) -> "Metrics":
        """Add a batch: logits (N, K), labels (N,). What the metric functions refuse adds nothing."""
        logits, labels = _checked(logits, labels)
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"logits of {logits.shape[1]} classes given to metrics for {self.num_classes}")
        self.confusion += confusion_matrix(logits, labels).cpu()
        self.bins += _equal_width_sums(*_confidence(logits, labels), self.n_bins).cpu()
        self.topk_hits += int((_rank(logits, labels) < self.k).sum())
        self.nll += _nll_each(logits, labels).double().sum().item()
        self.brier += _brier_each(logits, labels).double().sum().item()
        return self

    def compute(self) -> Evaluation:
        """The metrics of everything seen so far. Raises ValueError if that is nothing."""
        n, hits, curve = self.n, int(self.confusion.diagonal().sum()), _curve(self.bins)
        if n == 0:
            raise ValueError("there are no examples; update the metrics with at least one before computing them")
        return Evaluation(
            n=n,
            top1=hits / n,
            top1_interval=wilson_interval(hits, n),
            top5=self.topk_hits / n,
            mean_per_class=per_class_accuracy(self.confusion).nanmean().item(),
            nll=self.nll / n,
            brier=self.brier / n,
            ece=curve.ece,
            reliability=curve,
            confusion=self.confusion.clone(),
        )


_CENTER_SHARE = 0.875  # 224 of 256


def eval_resize(images: Tensor, size: int, resize: str = "square") -> Tensor:
    """Bring uint8 images (..., 3, H, W) to (..., 3, size, size) for evaluation; nothing random.

    resize: "square" goes straight to the square, as BiT does; "center" scales the shorter side to size /
    0.875, keeping the shape, and takes the central square. Raises ValueError for another word.
    """
    if resize == "square":
        return _resize(images, size)
    if resize == "center":
        return _center_crop(_resize_shorter_side(images, round(size / _CENTER_SHARE)), size)
    raise ValueError(f"resize must be 'square' or 'center', got {resize!r}")


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode within, and in the mode it had afterwards, whatever happens."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; load_pretrained() gives one")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _collate(items: Sequence[tuple], size: int, resize: str) -> tuple[Tensor, list]:
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(f"each example must be a pair (image, class index), got {type(item).__name__}")
    images = [_to_tensor(image) for image, _ in items]
    if len({image.shape for image in images}) == 1:
        batch = eval_resize(torch.stack(images), size, resize)
    else:
        batch = torch.stack([eval_resize(image, size, resize) for image in images])
    return batch, [label for _, label in items]


def _label_tensor(labels: list, first: int, num_classes: int | None) -> Tensor:
    """The class indices of a batch whose first example is number `first`; errors name the example."""
    for i, label in enumerate(labels, start=first):
        value = label.item() if hasattr(label, "item") and getattr(label, "ndim", 0) == 0 else label
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"the label of example {i} is {label!r}; each example needs one class index, an integer")
        if value < 0 or (num_classes is not None and value >= num_classes):
            classes = "the class indices, which start at 0" if num_classes is None else f"the {num_classes} classes"
            raise ValueError(f"the label of example {i} is {value}, outside {classes} of the model")
    return torch.tensor([int(label) for label in labels])


def _batches(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int,
    resize: str,
    image_size: int | None,
    num_workers: int,
    progress: bool,
) -> Iterator[tuple[Tensor, list, int]]:
    """Batches on the model's device and in its precision: images, labels as given, index of the first."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    sequence = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not (sequence or isinstance(dataset, IterableDataset)):
        raise TypeError(
            f"a dataset of (image, class index) is needed, got {type(dataset).__name__}; "
            "a DataLoader has its data set as .dataset"
        )
    if sequence and len(dataset) == 0:
        raise ValueError("the data set is empty; evaluation needs at least one (image, class index)")
    size = image_size if image_size is not None else getattr(model, "image_size", None)
    if size is None:
        raise ValueError("the model has no image_size; say which with evaluate(..., image_size=224)")
    parameter = next(model.parameters(), torch.empty(0))
    loader = DataLoader(
        dataset,
        batch_size,
        num_workers=num_workers,
        collate_fn=partial(_collate, size=size, resize=resize),
        generator=torch.Generator(),  # a loader without one draws from the global random state
    )
    if progress:
        from tqdm.auto import tqdm

        loader = tqdm(loader, desc="evaluate", unit="batch")
    first = 0
    for images, labels in loader:
        yield _normalize(images.to(parameter.device)).to(parameter.dtype), labels, first
        first += len(labels)


def _forward(model: nn.Module, images: Tensor, flip: bool) -> Tensor:
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must give logits of shape (N, classes), got {got}")
    if not flip:
        return logits
    both = torch.stack([logits, model(images.flip(-1))]).float().log_softmax(-1)
    return both.logsumexp(0) - math.log(2)  # the logarithm of the mean of the two probabilities


def predict_logits(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int = 256,
    *,
    resize: str = "square",
    image_size: int | None = None,
    flip: bool = False,
    num_workers: int = 0,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """The logits (N, K) and labels (N,) of a data set, on the CPU; arguments and errors as in `evaluate`."""
    logits, labels = [], []
    with _eval_mode(model), torch.inference_mode():
        for images, given, first in _batches(model, dataset, batch_size, resize, image_size, num_workers, progress):
            logits.append(_forward(model, images, flip).cpu())
            labels.append(_label_tensor(given, first, logits[-1].shape[1]))
    if not labels:
        raise ValueError("the data set is empty; evaluation needs at least one (image, class index)")
    return torch.cat(logits), torch.cat(labels)


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int = 256,
    *,
    resize: str = "square",
    image_size: int | None = None,
    flip: bool = False,
    n_bins: int = 15,
    num_workers: int = 0,
    progress: bool = False,
) -> Evaluation:
    """How good a classifier is on a data set, and how far its probabilities can be believed.

    dataset: (PIL image or uint8 tensor (3, H, W), class index) of any sizes; they are resized and normalised
    here. resize: "square", BiT's protocol, or "center"; see `eval_resize`. image_size: the model's own
    (`model.image_size`) unless given. flip: average the probabilities of each image and its mirror image.
    n_bins: for the ECE.

    Returns a dict with top1, top1_interval (Wilson, 95 %), top5 (top-K if there are only K < 5 classes),
    mean_per_class, nll, brier, ece, reliability (a ReliabilityCurve), confusion (K, K) and n. It prints as a
    table. Memory does not grow with the data set. The model runs in eval mode; its modes are restored. Raises
    ValueError for an empty set, a label outside the model's classes, logits with NaN or of the wrong rank,
    and TypeError for what is not a model, an image or a class index.
    """
    metrics = None
    with _eval_mode(model), torch.inference_mode():
        for images, given, first in _batches(model, dataset, batch_size, resize, image_size, num_workers, progress):
            logits = _forward(model, images, flip)
            metrics = metrics or Metrics(logits.shape[1], n_bins)
            metrics.update(logits, _label_tensor(given, first, metrics.num_classes))
    if metrics is None:
        raise ValueError("the data set is empty; evaluation needs at least one (image, class index)")
    return metrics.compute()


def extract_features(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int = 256,
    *,
    resize: str = "square",
    image_size: int | None = None,
    num_workers: int = 0,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """The pooled features (N, d) of a data set's images, and its labels (N,), on the CPU.

    The model's head is not used. Images are prepared, modes restored and errors raised as in `evaluate`.
    """
    if not callable(getattr(model, "features", None)):
        raise TypeError(f"{type(model).__name__} has no method features(x); create_model(...) gives a model that has")
    features, labels = [], []
    with _eval_mode(model), torch.inference_mode():
        for images, given, first in _batches(model, dataset, batch_size, resize, image_size, num_workers, progress):
            features.append(model.features(images).mean(dim=(2, 3)).float().cpu())
            labels.append(_label_tensor(given, first, None))
    if not labels:
        raise ValueError("the data set is empty; there are no features without at least one (image, class index)")
    return torch.cat(features), torch.cat(labels)


def ridge_primal(z: Tensor, y: Tensor, lam: float) -> Tensor:
    """The weights (d, K) that minimise |zw - y|^2 + lam |w|^2, from a d x d system: for n >= d.

    z: (n, d), y: (n, K), both centred if an intercept is wanted.
    """
    return torch.linalg.solve(z.T @ z + lam * torch.eye(z.shape[1], dtype=z.dtype, device=z.device), z.T @ y)


def ridge_dual(z: Tensor, y: Tensor, lam: float) -> Tensor:
    """The same weights from an n x n system: for n < d."""
    return z.T @ torch.linalg.solve(z @ z.T + lam * torch.eye(z.shape[0], dtype=z.dtype, device=z.device), y)


_STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # fractions of the features' squared size
_UNSPLIT_STRENGTH = 1e-2  # used when no class has a second example to validate on


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """A linear classifier of features: weight (K, d), bias (K,), and the regularisation of its fit."""

    weight: Tensor
    bias: Tensor
    strength: float

    def __call__(self, features: Tensor) -> Tensor:
        """Scores (N, K) for features (N, d), in float64."""
        return F.linear(torch.as_tensor(features).to(self.weight), self.weight, self.bias)

    def __repr__(self) -> str:
        n_classes, width = self.weight.shape
        return f"LinearClassifier({width} features, {n_classes} classes, strength={self.strength:.3g})"

    def as_head(self) -> nn.Linear:
        """The same function as the head of a network, in float32."""
        head = nn.Linear(self.weight.shape[1], self.weight.shape[0])
        head.load_state_dict({"weight": self.weight.float(), "bias": self.bias.float()})
        return head


def _checked_features(features: Tensor, labels: Tensor, num_classes: int | None) -> tuple[Tensor, Tensor, int]:
    features, labels = torch.as_tensor(features).detach().double().clone(), torch.as_tensor(labels)
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"features must have shape (n, d) with n of at least 1, got {tuple(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError("features hold NaN or infinity; look at the model that gave them")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be class indices (integers), got {labels.dtype}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"{len(features)} rows of features need as many labels, got {tuple(labels.shape)}")
    n_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, outside 0 to {n_classes - 1}")
    return features, labels.to(features.device, torch.int64), n_classes


def _validation_mask(labels: Tensor, seed: int, share: float = 0.2) -> Tensor:
    """True for a fifth of the examples of each class, at least one of every class that has two."""
    generator, mask = torch.Generator().manual_seed(seed), torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique():
        members = (labels == c).nonzero().flatten().cpu()
        held = max(1, round(share * len(members))) if len(members) > 1 else 0
        mask[members[torch.randperm(len(members), generator=generator)[:held]]] = True
    return mask.to(labels.device)


def _choose_strength(
    fit: Callable[[Tensor, Tensor, float], LinearClassifier],
    loss: Callable[[Tensor, Tensor], Tensor],
    features: Tensor,
    labels: Tensor,
    val: tuple[Tensor, Tensor] | None,
    seed: int,
    patience: int = 7,
) -> float:
    """The relative strength with the smallest loss on `val` or, without it, on a fifth of the examples.

    From strong to weak; after `patience` strengths in a row that were no better, the weaker ones are not tried.
    """
    if val is None:
        held = _validation_mask(labels, seed)
        if not held.any():
            return _UNSPLIT_STRENGTH
        val, features, labels = (features[held], labels[held]), features[~held], labels[~held]
    losses: dict[float, float] = {}
    for strength in reversed(_STRENGTHS):
        losses[strength] = loss(fit(features, labels, strength)(val[0]), val[1]).item()
        best = min(reversed(losses), key=losses.get)  # of equals the weakest
        if list(losses).index(best) + patience < len(losses):
            break
    return best


def _signs(labels: Tensor, num_classes: int) -> Tensor:
    return 2 * F.one_hot(labels, num_classes).double() - 1


def ridge_classifier(
    features: Tensor,
    labels: Tensor,
    lam: float | None = None,
    *,
    num_classes: int | None = None,
    val: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> LinearClassifier:
    """Ridge regression of features (n, d) onto targets of +1 (the class) and -1 (the others), in closed form.

    Minimises the sum of squares + lam |W|^2 with a free intercept, in the primal or the dual form, whichever
    inverts the smaller matrix. Without `lam`, it is chosen by squared error on `val` (features, labels) or,
    if there is none, on a fifth of the examples of each class drawn with `seed`; the fit then uses all of
    `features`. num_classes: the highest label plus one unless given. Raises ValueError and TypeError for
    unfit input.
    """
    features, labels, n_classes = _checked_features(features, labels, num_classes)

    def solve(features: Tensor, labels: Tensor, lam: float) -> LinearClassifier:
        y = _signs(labels, n_classes)
        z_mean, y_mean = features.mean(0), y.mean(0)
        system = ridge_primal if features.shape[0] >= features.shape[1] else ridge_dual
        weight = system(features - z_mean, y - y_mean, lam).T
        return LinearClassifier(weight, y_mean - weight @ z_mean, lam)

    def fit(features: Tensor, labels: Tensor, strength: float) -> LinearClassifier:
        size = (features - features.mean(0)).square().sum().item()
        return solve(features, labels, strength * size if size > 0 else strength)

    if lam is not None:
        if not lam > 0:
            raise ValueError(f"lam must be above 0, got {lam}; without it one is chosen on a validation split")
        return solve(features, labels, float(lam))
    if val is not None:
        val = _checked_features(*val, n_classes)[:2]
    strength = _choose_strength(
        fit, lambda scores, y: F.mse_loss(scores, _signs(y, n_classes)), features, labels, val, seed
    )
    return fit(features, labels, strength)


@torch.enable_grad()
def _fit_softmax(features: Tensor, labels: Tensor, n_classes: int, l2: float, max_iter: int = 1000) -> LinearClassifier:
    """Multinomial logistic regression by L-BFGS: mean cross-entropy + l2 / 2 |W|^2, the intercept free."""
    mean = features.mean(0)
    scale = (features - mean).square().sum(1).mean().sqrt().clamp(min=1e-12)
    z = (features - mean) / scale  # the same problem in better units; L-BFGS needs fewer steps
    w = torch.zeros(n_classes, z.shape[1], dtype=z.dtype, device=z.device, requires_grad=True)
    b = torch.zeros(n_classes, dtype=z.dtype, device=z.device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [w, b], max_iter=max_iter, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(z, w, b), labels) + l2 / (2 * scale**2) * w.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    weight = w.detach() / scale
    return LinearClassifier(weight, b.detach() - weight @ mean, l2)


def linear_probe(
    features: Tensor,
    labels: Tensor,
    l2: float | None = None,
    *,
    num_classes: int | None = None,
    val: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> LinearClassifier:
    """Multinomial logistic regression on features (n, d): minimises mean cross-entropy + l2 / 2 |W|^2.

    Its scores are logits. Without `l2`, it is chosen by NLL in the manner of `ridge_classifier`, but with fits of at
    most 100 iterations, and from strong to weak until two in a row are worse: weak ones take very long to fit.
    scikit-learn's LogisticRegression(C=1 / (n * l2)) finds the same minimum.
    """
    features, labels, n_classes = _checked_features(features, labels, num_classes)

    def fit(features: Tensor, labels: Tensor, strength: float, max_iter: int = 100) -> LinearClassifier:
        size = (features - features.mean(0)).square().sum(1).mean().item()
        return _fit_softmax(features, labels, n_classes, strength * size if size > 0 else strength, max_iter)

    if l2 is not None:
        if not l2 > 0:
            raise ValueError(f"l2 must be above 0, got {l2}; without it one is chosen on a validation split")
        return _fit_softmax(features, labels, n_classes, float(l2))
    if val is not None:
        val = _checked_features(*val, n_classes)[:2]
    strength = _choose_strength(fit, F.cross_entropy, features, labels, val, seed, patience=2)
    return fit(features, labels, strength, max_iter=1000)


class McNemar(NamedTuple):
    """How two classifiers differ: images only the first got right, only the second, and the exact p-value."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first_correct: Tensor, second_correct: Tensor) -> McNemar:
    """The exact two-sided test of whether two classifiers are equally good (McNemar, 1947).

    Both arguments: (N,) booleans, or 0 and 1, whether each image was classified rightly.
    """
    first, second = torch.as_tensor(first_correct), torch.as_tensor(second_correct)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"the same images must be judged for both, as two tensors (N,); got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    for values in (first, second):
        if not ((values == 0) | (values == 1)).all():
            raise ValueError("both must say right or wrong for each image (True or False, 1 or 0), not scores")
    first, second = first.bool(), second.bool()
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    term = total = 1  # binomial coefficients (n over 0), (n over 1), ..., each from the one before
    for i in range(min(b, c)):
        term = term * (b + c - i) // (i + 1)
        total += term
    return McNemar(b, c, min(1.0, 2 * total / 2 ** (b + c)))


def bootstrap_interval(
    values: Tensor, level: float = 0.95, n_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean (Efron, 1979).

    values: (n,), independent values, such as the accuracy at each seed or right and wrong on each image; or
    (seeds, n), right and wrong on the same n images at each seed: then seeds and images are both drawn again.
    Of very few values the interval is too narrow, because the sample shows less spread than the world.
    """
    _check_level(level)
    table = torch.as_tensor(values).detach().cpu().double()
    if table.ndim not in (1, 2) or table.numel() == 0 or not torch.isfinite(table).all():
        raise ValueError(f"values must be finite, of shape (n,) or (seeds, n), and not empty; got {tuple(table.shape)}")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    table = table[None] if table.ndim == 1 else table
    means = _resampled_means(table, n_resamples, torch.Generator().manual_seed(seed))
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _resampled_means(table: Tensor, n_resamples: int, generator: torch.Generator) -> Tensor:
    """The means of a table (rows, columns) when rows and columns are drawn again, n_resamples times."""

    def shares(times: int, n: int) -> Tensor:
        """How often each of n values was drawn, over n: (times, n)."""
        drawn = torch.randint(n, (times, n), generator=generator)
        return torch.zeros(times, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(times, n).double()) / n

    means, chunk = [], max(1, 2**20 // table.shape[1])
    for start in range(0, n_resamples, chunk):
        times = min(chunk, n_resamples - start)
        means.append(((shares(times, table.shape[0]) @ table) * shares(times, table.shape[1])).sum(1))
    return torch.cat(means)


class FewShotAccuracy(NamedTuple):
    """Top-1 over seeded episodes: mean, 95 % bootstrap interval over seeds, and the values (seeds,)."""

    mean: float
    low: float
    high: float
    per_seed: Tensor

    def __repr__(self) -> str:
        return f"{self.mean:.2%} ({self.low:.2%} to {self.high:.2%}, {len(self.per_seed)} seeds)"


def few_shot_accuracy(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    n_shots: int,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    fit: Callable[..., LinearClassifier] = ridge_classifier,
) -> FewShotAccuracy:
    """Fit to n_shots examples a class, test on all of `test`; once for each seed.

    train, test: (features, labels), as `extract_features` gives them. fit: `ridge_classifier`,
    `linear_probe`, or anything called as fit(features, labels, num_classes=K, seed=seed) that returns a
    function from features to scores.
    """
    features, labels, n_classes = _checked_features(*train, None)
    if len(seeds) == 0:
        raise ValueError("no seeds were given; each makes one episode, range(5) for instance")
    top1 = []
    for seed in seeds:
        chosen = torch.as_tensor(_few_shot(labels, n_shots, seed))
        classifier = fit(features[chosen], labels[chosen], num_classes=n_classes, seed=seed)
        top1.append(topk_accuracy(classifier(test[0]), test[1]))
    values = torch.tensor(top1, dtype=torch.float64)
    return FewShotAccuracy(values.mean().item(), *bootstrap_interval(values), values)


def right_bits(right: Tensor) -> str:
    """Which images were right, booleans (N,), as text: a bit for each after a leading 1, in hexadecimal."""
    return f"{int('1' + ''.join('01'[int(r)] for r in right), 2):x}"


def right_images(row: dict) -> Tensor:
    """Which test images a row of results got right, booleans (N,): what `right_bits` wrote down."""
    return torch.tensor([bit == "1" for bit in f"{int(row['right'], 16):b}"[1:]])


SUITE_METHODS = ("finetuned", "ridge", "probe", "scratch")
SCRATCH_RATES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.3)


def suite_tasks(suite: str) -> dict[str, str]:
    """The tasks of a suite, in order, each with its group. Suites: "vtab-mini" (offline) and "vtab-1k"."""
    if suite == "vtab-mini":
        return {name: group for group, names in VTAB_MINI.items() for name in names}
    if suite == "vtab-1k":
        return {name: row[0] for name, row in VTAB_1K.items()}
    raise ValueError(f"no suite {suite!r}; there are vtab-mini and vtab-1k")


def draw_examples(labels: Tensor, n: int, seed: int = 0) -> list[int]:
    """Draw n examples as evenly over the classes as they allow: indices in rising order, a function of the seed."""
    labels = labels_of(labels)
    if not 1 <= n <= len(labels):
        raise ValueError(f"cannot draw {n} of {len(labels)} examples")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    turn = torch.empty(len(labels), dtype=torch.long)  # the first of each class, the second of each, ...
    for label in labels.unique():
        members = labels[order] == label
        turn[members] = torch.arange(int(members.sum()))
    return sorted(order[turn.argsort(stable=True)[:n]].tolist())


def task_rule(task: Task, model: nn.Module, steps: int | None = None) -> Rule:
    """The HyperRule for a task, without the augmentations that would change its labels.

    steps: a shorter run, its decays at the same shares of it; to try things out, not the rule's.
    """
    rule = hyperrule(len(task.train), tuple(_to_tensor(task.train[0][0]).shape[1:]), model=model)
    rule = rule if steps is None else rule.with_steps(steps)
    return replace(rule, flip=rule.flip and task.flip, random_crop=rule.random_crop and task.crop)


def _task_split(task: Task, examples: int | None, seed: int, validate: bool) -> tuple[list[int], Dataset]:
    """Which training images a run may use, and the data set it is judged on."""
    train, val = task.train_val()
    chosen = list(train.indices)
    if examples is not None:
        labels = labels_of(task.train)[chosen]
        chosen = [chosen[i] for i in draw_examples(labels, min(examples, len(chosen)), seed)]
    elif not validate:
        chosen = list(range(len(task.train)))
    return chosen, (val if validate else task.test)


def _fit_network(task: Task, model: nn.Module, method: str, chosen: list[int], seed: int, rate, steps) -> nn.Module:
    """Fine-tune the model, or train its architecture from random weights, on the chosen images."""
    rule = task_rule(task, model, steps)
    if method == "scratch":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = create_model(model.name, len(task.classes))
        rule = replace(rule, base_lr=rate, warmup_steps=rule.steps // 10)
    data = Subset(task.train, chosen)
    return finetune(model, data, rule, seed=seed, num_classes=len(task.classes), progress=False).model


def suite_label(model: str, method: str) -> str:
    """What a model used by a method is called in tables: both, but only the method for "scratch"."""
    return method if model == "scratch" else f"{model} {method}"


class SuiteResults(dict):
    """The results of a suite: what was run, a row for each run, a summary. It prints as tables."""

    def __repr__(self) -> str:
        settings = dict.fromkeys(row["examples"] for row in self["rows"])
        return "\n\n".join(suite_table(self, examples) for examples in settings) or "no runs yet"


def read_suite(path: str | Path) -> SuiteResults:
    """Read the JSON file that `evaluate_suite` writes."""
    return SuiteResults(json.loads(Path(path).read_text(encoding="utf-8")))


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the names and values of tensors, such as a model's state dict, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_json(path: Path, value: dict) -> None:
    """Write a dict as JSON, whole or not at all, making the folder where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def evaluate_suite(
    model: nn.Module,
    suite: str = "vtab-mini",
    *,
    name: str | None = None,
    methods: Sequence[str] = ("finetuned", "ridge"),
    examples: int | None = None,
    seeds: Sequence[int] = (0,),
    tasks: Sequence[str] | None = None,
    out: str | Path | None = None,
    predictions: str | Path | None = None,
    rates: Sequence[float] = SCRATCH_RATES,
    rate_seeds: Sequence[int] = (0,),
    steps: int | None = None,
    data_dir: str | Path | None = None,
    progress: bool = False,
) -> SuiteResults:
    """Run a suite of tasks with one model, and return (and write) the results.

    name: what the model is called in the results; its architecture unless given. methods: of SUITE_METHODS;
    "scratch" uses only the model's architecture. examples: training images a task, drawn evenly over the
    classes for each seed; None for all. tasks: some of the suite's instead of all. out: a JSON file, written
    after each run; the same call goes on where it was stopped, and other calls add to it. predictions: a
    folder for a file of predictions of each run, see `write_predictions`. rates, rate_seeds: for scratch; the
    rate with the best mean accuracy on the validation fifth is used, among equals the smallest. steps: a
    shorter run than the rule's, to try things. data_dir: for vtab-1k, where the data sets are.

    Raises ValueError for an unknown suite, task or method, and if `out` holds other weights of that name.
    A task that cannot be loaded stands under "failed" with the reason, and is not counted in any mean.
    """
    groups, name = suite_tasks(suite), name or getattr(model, "name", type(model).__name__)
    wanted = list(groups) if tasks is None else list(tasks)
    for given, known, what in ((wanted, groups, "task"), (methods, SUITE_METHODS, "method")):
        for word in given:
            if word not in known:
                raise ValueError(f"no {what} {word!r} in {suite}; there are {', '.join(known)}")
    # without the head: a suite gives each task one of its own
    backbone = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    about = {"architecture": model.name, "weights_sha256": weights_digest(backbone)}
    results = SuiteResults(suite=suite, steps=steps, models={}, rates_tried=[], rows=[], failed={})
    if out is not None and Path(out).exists():
        results = read_suite(out)
        if results["suite"] != suite or results["steps"] != steps:
            raise ValueError(f"{out} holds {results['suite']} with steps={results['steps']}; give another file")
        if results["models"].get(name, about) != about and set(methods) != {"scratch"}:
            raise ValueError(f"{out} holds results of another {name}; move the file away, or give another name")
    if set(methods) != {"scratch"}:
        results["models"][name] = about
    key_of = {m: "scratch" if m == "scratch" else name for m in methods}
    setting = "all" if examples is None else examples
    done = {(r["model"], r["method"], r["examples"], r["task"], r["seed"]) for r in results["rows"]}
    todo = [
        (task, method, seed)
        for task in wanted
        for method in methods
        for seed in seeds
        if (key_of[method], method, setting, task, seed) not in done
    ]

    def save() -> None:
        if out is not None:
            write_json(Path(out), results)

    if todo:
        results.pop("summary", None)  # until it is made anew, at the end
    if progress:
        from tqdm.auto import tqdm

        todo = tqdm(todo, desc=suite, unit="run")
    task, features, failed = None, {}, set()
    for task_name, method, seed in todo:
        if task_name in failed:
            continue
        if task is None or task.name != task_name:
            try:
                task = load_task(task_name) if suite == "vtab-mini" else load_vtab_task(task_name, data_dir)
            except Exception as error:  # whatever it was, the reader must know, and the other tasks must run
                results["failed"][task_name] = f"{type(error).__name__}: {error}"
                failed.add(task_name)
                save()
                continue
        results["failed"].pop(task_name, None)
        row = {"model": key_of[method], "method": method, "examples": setting, "task": task_name, "seed": seed}
        chosen, test = _task_split(task, examples, seed, validate=False)
        held = None if examples is None else list(task.train_val()[1].indices)  # for the temperature only
        if method in ("ridge", "probe"):
            if task_name not in features:
                features.clear()
                features[task_name] = *extract_features(model, task.train), *extract_features(model, task.test)
            pool, pool_labels, seen, labels = features[task_name]
            fit = ridge_classifier if method == "ridge" else linear_probe
            classifier = fit(pool[chosen], pool_labels[chosen], num_classes=len(task.classes), seed=seed)
            logits = classifier(seen).float()
            on_held = None if held is None else (classifier(pool[held]), pool_labels[held])
        else:
            if method == "scratch":
                row["rate"] = _scratch_rate(results, task, model, examples, rates, rate_seeds, steps, save)
            network = _fit_network(task, model, method, chosen, seed, row.get("rate"), steps)
            logits, labels = predict_logits(network, test)
            on_held = None if held is None else predict_logits(network, Subset(task.train, held))
        results["rows"].append(row | _suite_scores(logits, labels, on_held))
        if predictions is not None:
            file = f"{row['model']}-{method}-{setting}-{task_name}-{seed}.json"
            write_predictions(Path(predictions) / file, task_name, task.classes, logits.argmax(1), labels)
        save()
    results["summary"] = suite_summary(results)
    save()
    return results


def _scratch_rate(results, task, model, examples, rates, rate_seeds, steps, save) -> float:
    """The rate with the best mean validation accuracy among `rates`, trying those not tried yet."""
    setting = "all" if examples is None else examples
    tried = {
        (r["rate"], r["seed"]): r for r in results["rates_tried"] if (r["task"], r["examples"]) == (task.name, setting)
    }
    for rate in rates:
        for seed in rate_seeds:
            if (rate, seed) in tried:
                continue
            chosen, val = _task_split(task, examples, seed, validate=True)
            network = _fit_network(task, model, "scratch", chosen, seed, rate, steps)
            top1 = topk_accuracy(*predict_logits(network, val))
            row = {"task": task.name, "examples": setting, "rate": rate, "seed": seed, "val_top1": round(top1, 6)}
            results["rates_tried"].append(row)
            tried[rate, seed] = row
            save()
    means = {
        rate: sum(tried[rate, seed]["val_top1"] for seed in rate_seeds) / len(rate_seeds) for rate in sorted(rates)
    }
    return max(means, key=means.get)


def _suite_scores(logits: Tensor, labels: Tensor, held: tuple[Tensor, Tensor] | None) -> dict:
    """Top-1; NLL and ECE, also after temperature scaling on held-out images; and which test images were right.

    The last as `right_bits` writes it.
    """
    row = {"top1": topk_accuracy(logits, labels)}
    scaled = {"": logits}
    if held is not None:
        row["temperature"] = temperature_scaling(*held)
        scaled["_scaled"] = logits / row["temperature"]
    for suffix, values in scaled.items():
        row[f"nll{suffix}"] = negative_log_likelihood(values, labels)
        row[f"ece{suffix}"] = expected_calibration_error(values, labels)
    row = {key: round(value, 6) for key, value in row.items()}
    return row | {"right": right_bits(logits.argmax(1) == labels)}


class SuiteScore(NamedTuple):
    """A mean over tasks with its 95 % bootstrap interval, and over how many seeds."""

    mean: float
    low: float
    high: float
    n_seeds: int


def _outcomes(results: dict, model: str, method: str, examples, tasks: Sequence[str]) -> dict[str, dict] | None:
    """For each task, seed -> which images were right; None if a task is missing."""
    found: dict[str, dict[int, Tensor]] = {task: {} for task in tasks}
    for row in results["rows"]:
        if (row["model"], row["method"], row["examples"]) == (model, method, examples) and row["task"] in found:
            found[row["task"]][row["seed"]] = right_images(row).double()
    return found if all(found.values()) else None


def _mean_over_tasks(tables: Sequence[Tensor], n_resamples: int = 2_000) -> SuiteScore:
    """The mean over tasks of the mean of each table (seeds, images), and its interval."""
    generator = torch.Generator().manual_seed(0)
    resampled = torch.stack([_resampled_means(table, n_resamples, generator) for table in tables]).mean(0)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean = sum(table.mean().item() for table in tables) / len(tables)
    return SuiteScore(mean, low, high, min(len(table) for table in tables))


def _suite_parts(suite: str) -> dict[str, list[str]]:
    groups = suite_tasks(suite)
    return {"mean": list(groups), **{g: [t for t in groups if groups[t] == g] for g in dict.fromkeys(groups.values())}}


def suite_scores(results: dict, model: str, method: str, examples: int | str = "all") -> dict[str, SuiteScore | None]:
    """The score over all tasks ("mean") and over each group; None where a task is missing.

    The interval draws seeds and test images again, within each task; the tasks stay. Windows cut from one
    photograph overlap, so that for those tasks images are not independent and the interval is too narrow.
    """
    parts = {}
    for part, tasks in _suite_parts(results["suite"]).items():
        found = _outcomes(results, model, method, examples, tasks)
        parts[part] = found and _mean_over_tasks([torch.stack(list(found[task].values())) for task in tasks])
    return parts


def suite_difference(
    results: dict, first: tuple[str, str], second: tuple[str, str], examples: int | str = "all"
) -> dict[str, SuiteScore | None]:
    """How much better the first (model, method) is than the second, over all tasks and over each group.

    Paired: the same images, and the seeds that both have. None where one of the two misses a task.
    """
    parts = {}
    for part, tasks in _suite_parts(results["suite"]).items():
        pair = [_outcomes(results, *side, examples, tasks) for side in (first, second)]
        seeds = {} if None in pair else {task: sorted(pair[0][task].keys() & pair[1][task].keys()) for task in tasks}
        parts[part] = None
        if seeds and all(seeds.values()):
            gains = [torch.stack([pair[0][task][seed] - pair[1][task][seed] for seed in seeds[task]]) for task in tasks]
            parts[part] = _mean_over_tasks(gains)
    return parts


def suite_summary(results: dict) -> list[dict]:
    """For each model, method and setting: mean accuracy on each task, the scores with intervals, what is missing."""
    groups, summary = suite_tasks(results["suite"]), []
    for model, method, examples in dict.fromkeys((r["model"], r["method"], r["examples"]) for r in results["rows"]):
        own = [r for r in results["rows"] if (r["model"], r["method"], r["examples"]) == (model, method, examples)]
        tasks = {task: [r["top1"] for r in own if r["task"] == task] for task in groups}
        scores = suite_scores(results, model, method, examples)
        summary.append(
            {
                "model": model,
                "method": method,
                "examples": examples,
                "tasks": {task: round(sum(values) / len(values), 4) for task, values in tasks.items() if values},
                "missing": [task for task, values in tasks.items() if not values],
                "scores": {
                    part: None if score is None else [round(value, 4) for value in score[:3]] + [score.n_seeds]
                    for part, score in scores.items()
                },
            }
        )
    return summary


def suite_table(results: dict, examples: int | str = "all") -> str:
    """The scores of one setting as text, in per cent, with intervals; and what is missing."""
    lines = [f"{results['suite']}, {examples} training examples a task; top-1, %"]
    parts = list(_suite_parts(results["suite"]))
    lines.append(f"{'':24s}{'mean (95 % interval)':24s}" + "".join(f"{part:>13s}" for part in parts[1:]))
    for entry in results.get("summary") or suite_summary(results):
        if entry["examples"] != examples:
            continue
        name = suite_label(entry["model"], entry["method"])
        scores = [entry["scores"][part] for part in parts]
        whole = "-" if scores[0] is None else "{:.1f} ({:.1f} to {:.1f})".format(*(100 * v for v in scores[0][:3]))
        lines.append(
            f"{name:24s}{whole:24s}" + "".join(f"{'-' if s is None else f'{100 * s[0]:.1f}':>13s}" for s in scores[1:])
        )
        if entry["missing"]:
            lines.append(f"  not run: {', '.join(entry['missing'])}")
    for task, reason in results["failed"].items():
        lines.append(f"  could not be loaded: {task}: {reason}")
    return "\n".join(lines)


def write_predictions(path: str | Path, task: str, classes: Sequence[str], predicted: Tensor, labels: Tensor) -> None:
    """Write what was predicted for each test image of a task, and what is true, as JSON."""
    if predicted.shape != labels.shape or predicted.ndim != 1:
        raise ValueError(f"{tuple(predicted.shape)} predictions do not fit {tuple(labels.shape)} labels")
    about = {"task": task, "classes": list(map(str, classes))}
    write_json(Path(path), about | {"predicted": predicted.tolist(), "labels": labels.tolist()})


def score_predictions(path: str | Path) -> dict:
    """Score a file that `write_predictions` wrote: task, n, top1, its Wilson interval, mean_per_class.

    Raises ValueError if the file is not such a file, or holds a class that the task does not have.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        predicted, labels, classes = held["predicted"], held["labels"], held["classes"]
        whole = len(predicted) == len(labels) > 0 and all(type(v) is int for v in predicted + labels)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of predictions: {error!r}") from error
    if not whole:
        raise ValueError(f"{path} must hold as many predictions as labels, as whole numbers, and at least one")
    wrong = [v for v in predicted + labels if not 0 <= v < len(classes)]
    if wrong:
        raise ValueError(f"{path} holds class {wrong[0]}, but the task has {len(classes)}")
    logits, truth = F.one_hot(torch.tensor(predicted), len(classes)).float(), torch.tensor(labels)
    hits = int((logits.argmax(1) == truth).sum())
    return {
        "task": held["task"],
        "n": len(labels),
        "top1": hits / len(labels),
        "top1_interval": wilson_interval(hits, len(labels)),
        "mean_per_class": mean_per_class_accuracy(logits, truth),
    }


def suite_plot(results: dict, examples: int | str = "all") -> None:
    """Draw the scores of one setting with their intervals on matplotlib's current axes: a row for each mean."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('drawing needs matplotlib; install it with: pip install "bitlib[book]"') from error
    summary = results.get("summary") or suite_summary(results)
    whole = [entry for entry in summary if entry["examples"] == examples and not entry["missing"]]
    parts = list(_suite_parts(results["suite"]))[::-1]
    for i, entry in enumerate(whole):
        label = suite_label(entry["model"], entry["method"])
        middle, low, high = ([100 * entry["scores"][part][k] for part in parts] for k in range(3))
        place = [row + 0.7 * (0.5 - (i + 1) / (len(whole) + 1)) for row in range(len(parts))]
        ends = [[m - b for m, b in zip(middle, low, strict=True)], [t - m for m, t in zip(middle, high, strict=True)]]
        plt.errorbar(middle, place, xerr=ends, fmt="osD^vPX*<>"[i % 10], markersize=5, label=label)
    plt.yticks(range(len(parts)), parts)
    plt.xlabel(f"top-1 accuracy with {examples} training examples a task, %")
    plt.legend(fontsize=7)


CORRUPTIONS = {
    "noise": (8.0, 16.0, 24.0, 40.0, 64.0),  # standard deviation, in grey levels of 255
    "blur": (0.5, 1.0, 1.5, 2.0, 3.0),  # standard deviation of the Gaussian, in pixels
    "contrast": (0.7, 0.5, 0.3, 0.2, 0.1),  # the share of each pixel's distance from the image's mean that is left
    "jpeg": (50, 30, 20, 10, 5),  # quality
}


def corrupt(images: Tensor, kind: str, strength: int, seed: int = 0) -> Tensor:
    """Spoil uint8 images (N, 3, H, W): "noise", "blur", "contrast" or "jpeg", strength 1 to 5, or 0 for none.

    What each strength means stands in CORRUPTIONS. Raises ValueError for another kind or strength.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"no corruption {kind!r}; there are {', '.join(CORRUPTIONS)}")
    if strength not in range(6):
        raise ValueError(f"strength must be a whole number from 0 to 5; got {strength!r}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (N, 3, H, W); got {images.dtype} {tuple(images.shape)}")
    if strength == 0:
        return images
    amount = CORRUPTIONS[kind][strength - 1]
    if kind == "jpeg":
        return torch.stack([_jpeg(image, amount) for image in images])
    x = images.float()
    if kind == "noise":
        x = x + amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    elif kind == "contrast":
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = mean + amount * (x - mean)
    else:
        reach = min(math.ceil(3 * amount), min(x.shape[-2:]) - 1)
        weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / amount) ** 2)
        weights = (weights / weights.sum()).expand(3, 1, 1, -1)
        x = F.conv2d(F.pad(x, (reach,) * 4, mode="reflect"), weights, groups=3)
        x = F.conv2d(x, weights.transpose(2, 3), groups=3)
    return x.round().clamp(0, 255).to(torch.uint8)


def _jpeg(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return _to_tensor(Image.open(file, formats=["JPEG"]))


def on_photographs(
    images: Tensor,
    photographs: Sequence[str] = ("brick", "coffee", "grass", "gravel"),
    share: float = 0.6,
    seed: int = 0,
) -> Tensor:
    """Light ink on black, uint8 (N, 3, S, S), over windows of downstream photographs in place of the black.

    share: how bright the photographs are; 0 gives the images back. The windows are of the blocks for testing.
    """
    background = torch.zeros_like(images)
    side = images.shape[-1]
    for i, name in enumerate(photographs):
        pixels = _to_tensor(Image.open(package_file(*DOWNSTREAM_PHOTOGRAPHS[name])))
        own = torch.arange(i, len(images), len(photographs))
        windows = photograph_windows(name, "test", len(own), 32, 64, stream=f"background {seed}")
        for j, (top, left, size) in zip(own.tolist(), windows.tolist(), strict=True):
            background[j] = _resize(pixels[:, top : top + size, left : left + size], side)
    ink = images.float() / 255
    return (images + share * (1 - ink) * background).round().to(torch.uint8)


def robustness(model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> dict[str, list[float]]:
    """Top-1 at strengths 0 (clean) to 5 of each of CORRUPTIONS, for uint8 images (N, 3, H, W)."""
    clean = topk_accuracy(*predict_logits(model, ImageTensorDataset(images, labels)))
    spoilt = {
        kind: [ImageTensorDataset(corrupt(images, kind, strength, seed), labels) for strength in range(1, 6)]
        for kind in CORRUPTIONS
    }
    return {kind: [clean, *(topk_accuracy(*predict_logits(model, d)) for d in sets)] for kind, sets in spoilt.items()}


VTAB_1K = {  # group, name in TensorFlow Datasets, classes, test split, augmentations that are left out
    "caltech101": ("natural", "caltech101", 102, "test", ""),
    "cifar100": ("natural", "cifar100", 100, "test", ""),
    "dtd": ("natural", "dtd", 47, "test", ""),
    "oxford_flowers102": ("natural", "oxford_flowers102", 102, "test", ""),
    "oxford_iiit_pet": ("natural", "oxford_iiit_pet", 37, "test", ""),
    "sun397": ("natural", "sun397/tfds", 397, "test", ""),
    "svhn": ("natural", "svhn_cropped", 10, "test", ""),
    "patch_camelyon": ("specialized", "patch_camelyon", 2, "test", ""),
    "eurosat": ("specialized", "eurosat/rgb", 10, "train[80%:]", ""),
    "resisc45": ("specialized", "resisc45", 45, "train[80%:]", ""),
    "diabetic_retinopathy": ("specialized", "diabetic_retinopathy_detection/btgraham-300", 5, "test", ""),
    "clevr_count": ("structured", "clevr", 8, "validation", "crop"),
    "clevr_distance": ("structured", "clevr", 6, "validation", "crop"),
    "dmlab": ("structured", "dmlab", 6, "test", "crop"),
    "kitti_distance": ("structured", "kitti", 4, "test", "crop"),
    "dsprites_location": ("structured", "dsprites", 16, "train[90%:]", "flip crop"),
    "dsprites_orientation": ("structured", "dsprites", 16, "train[90%:]", "flip"),
    "smallnorb_azimuth": ("structured", "smallnorb", 18, "test[50%:]", "flip"),
    "smallnorb_elevation": ("structured", "smallnorb", 9, "test[50%:]", ""),
}
CLEVR_DISTANCES = (8.0, 8.5, 9.0, 9.5, 10.0)
KITTI_DISTANCES = (8.0, 20.0, 999.0)  # in metres; beyond the last, there is no vehicle


def vtab_label(task: str, example: dict) -> int:
    """The label of an example of TensorFlow Datasets in one of VTAB's tasks, as the benchmark derives it."""
    if task == "clevr_count":
        return len(example["objects"]["size"]) - 3
    if task == "clevr_distance":
        nearest = min(float(point[2]) for point in example["objects"]["pixel_coords"])
        return sum(nearest > edge for edge in CLEVR_DISTANCES)
    if task == "kitti_distance":
        objects = zip(example["objects"]["type"], example["objects"]["location"], strict=True)
        nearest = min((float(place[2]) for kind, place in objects if kind < 3), default=1000.0)  # car, van, truck
        return sum(nearest > edge for edge in KITTI_DISTANCES)
    if task == "dsprites_location":
        return int(example["label_x_position"]) * 16 // 32
    if task == "dsprites_orientation":
        return int(example["label_orientation"]) * 16 // 40
    if task.startswith("smallnorb_"):
        return int(example["label_" + task.removeprefix("smallnorb_")])
    return int(example["label"])


class VtabImages(Dataset):
    """A data source of TensorFlow Datasets as (uint8 (3, H, W), class index)."""

    def __init__(self, source: Sequence[dict], task: str):
        self.source, self.task, self.n_classes = source, task, VTAB_1K[task][2]
        self._labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        example = self.source[index]
        pixels = torch.from_numpy(example["image"].copy()).permute(2, 0, 1)
        if self.task.startswith("dsprites_"):
            pixels = pixels * 255  # stored as 0 and 1
        return _to_tensor(pixels), self._label(index, example)

    def _label(self, index: int, example: dict) -> int:
        label = vtab_label(self.task, example)
        if not 0 <= label < self.n_classes:
            raise ValueError(f"example {index} of {self.task} has label {label}, outside its {self.n_classes} classes")
        return label

    @property
    def labels(self) -> Tensor:
        """All labels, long (N,); read once."""
        if self._labels is None:
            self._labels = torch.tensor([self._label(i, self.source[i]) for i in range(len(self))])
        return self._labels


@dataclass(frozen=True)
class VtabTask(Task):
    """A task of VTAB-1k: 1,000 training images, of which the first 800 are to train on and 200 to choose with."""

    @property
    def chance(self) -> float:
        """One over the number of classes; to know the most frequent one would mean to read the whole test set."""
        return 1 / len(self.classes)

    def train_val(self) -> tuple[Dataset, Dataset]:
        """train[:800] and train[800:1000]."""
        return Subset(self.train, range(800)), Subset(self.train, range(800, 1000))


def load_vtab_task(name: str, data_dir: str | Path | None = None, download: bool = True) -> VtabTask:
    """Load one of VTAB-1k's nineteen tasks through TensorFlow Datasets, without TensorFlow.

    data_dir: where its files are or shall be, ~/tensorflow_datasets unless given. If they are not there, and with
    `download`, it tries to download and prepare them, for which most of these data sets need TensorFlow.

    Raises ValueError for an unknown name, ImportError if the extra `vtab` is not installed, FileNotFoundError
    for files that must be fetched by hand, saying which and where to put them, and RuntimeError with the reason
    for anything else that goes wrong in loading.
    """
    if name not in VTAB_1K:
        raise ValueError(f"no task {name!r} in vtab-1k; there are {', '.join(VTAB_1K)}")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(f'{name} needs TensorFlow Datasets; pip install "bitlib[vtab]" ({error})') from error
    group, dataset, n_classes, test_split, left_out = VTAB_1K[name]
    builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")

    def images(split: str) -> VtabImages:
        source = tfds.data_source(
            dataset, split=split, data_dir=data_dir, download=download, builder_kwargs={"file_format": "array_record"}
        )
        return VtabImages(source, name)

    try:
        train, test = images("train[:1000]"), images(test_split)
    except (Exception, SystemExit) as error:
        by_hand = (builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").strip()
        if by_hand:
            folder = Path(builder.data_dir).parents[builder.info.full_name.count("/")] / "downloads" / "manual"
            raise FileNotFoundError(
                f"{name} must be downloaded by hand. {' '.join(by_hand.split())} Put it into the folder {folder}"
            ) from error
        reason = f"{type(error).__name__}: {error}"
        if getattr(error, "name", None) == "tensorflow" or "No module named 'tensorflow'" in str(error):
            reason = (
                "its files are not there yet, and TensorFlow Datasets prepares them with TensorFlow. Do that once, "
                f"on any machine that has it: `tfds build {dataset} --file_format=array_record`; "
                "then give the folder as data_dir"
            )
        raise RuntimeError(f"{name} ({dataset}) could not be loaded: {reason}") from error
    if len(train) != 1000:
        raise RuntimeError(f"{name} must have 1,000 training images; this copy of {dataset} has {len(train)}")
    return VtabTask(
        name=name,
        train=train,
        test=test,
        classes=tuple(map(str, range(n_classes))),
        description=" ".join((builder.info.description or dataset).split())[:200],
        source=f"TensorFlow Datasets, {dataset}; test set {test_split}",
        licence="the data set's own",
        group=group,
        flip="flip" not in left_out,
        crop="crop" not in left_out,
    )
