"""Fine-tuning: a head of zeros, few-shot sampling, a leakage check, the downstream loop.

Exported from chapters/08_finetuning.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "labels_of",
    "few_shot",
    "Duplicate",
    "find_duplicates",
    "mlp_head",
    "TRAINABLE",
    "trainable_parameters",
    "CACHE_BYTES",
    "FinetuneResult",
    "finetune",
]

import copy
import dataclasses
import hashlib
import operator
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from bitlib.data import normalize, random_crop, random_flip, resize, to_tensor
from bitlib.hyperrule import Rule, hyperrule, mixup, mixup_permutation, mixup_weight
from bitlib.pretrain import History, shard_indices, train


def labels_of(dataset: Dataset | Tensor | Sequence[int]) -> Tensor:
    """The labels of a data set as long (N,), without decoding an image.

    Takes the labels themselves, anything with `labels` or `targets` as torchvision's data sets have them, and
    subsets and concatenations of those. TypeError for a data set that does not list its labels.
    """
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.long)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([labels_of(part) for part in dataset.datasets])
    for name in ("labels", "targets", "_labels"):
        if getattr(dataset, name, None) is not None:
            return labels_of(getattr(dataset, name))
    if not isinstance(dataset, (Tensor, np.ndarray, list, tuple, range)):
        raise TypeError(
            f"{type(dataset).__name__} does not list its labels (no `labels` or `targets`); pass the labels themselves"
        )
    labels = torch.as_tensor(dataset)
    if labels.ndim != 1 or (labels.is_floating_point() and len(labels)) or labels.dtype == torch.bool:
        raise TypeError(f"labels must be whole numbers of shape (N,), not {labels.dtype} of {tuple(labels.shape)}")
    return labels.long()


def few_shot(
    dataset_or_labels: Dataset | Tensor | Sequence[int],
    n_shots: int,
    seed: int = 0,
    exclude: Iterable[int] = (),
) -> list[int]:
    """Draw `n_shots` examples of every class: a list of indices in rising order.

    Balanced and seeded; no image is decoded. With one seed, fewer shots are a subset of more.
    exclude: indices that must not be drawn, such as those of a validation set.
    Raises ValueError where a class has too few examples.
    """
    n_shots = operator.index(n_shots)
    if n_shots < 1:
        raise ValueError(f"n_shots must be at least 1, not {n_shots}")
    labels = labels_of(dataset_or_labels)
    if len(labels) == 0:
        raise ValueError("there are no examples to draw from; the labels are empty")
    if labels.min() < 0:
        raise ValueError(f"label {int(labels.min())} is no class; classes are numbered from 0")
    free = torch.ones(len(labels), dtype=torch.bool)
    free[torch.as_tensor(list(exclude), dtype=torch.long)] = False
    chosen: list[int] = []
    for label in labels.unique().tolist():
        candidates = (free & (labels == label)).nonzero().flatten()
        if len(candidates) < n_shots:
            raise ValueError(
                f"class {label} has {len(candidates)} examples to draw from, too few for n_shots={n_shots}; "
                f"use at most {len(candidates)} or take the class out"
            )
        order = np.random.default_rng([seed, label]).permutation(len(candidates))
        chosen += candidates[order[:n_shots]].tolist()
    return sorted(chosen)


class Duplicate(NamedTuple):
    """A pair of images, by their places in two data sets. distance: root mean square, in grey levels."""

    train_index: int
    test_index: int
    distance: float
    identical: bool


def find_duplicates(train_set: Dataset, test_set: Dataset, threshold: float = 4.0) -> list[Duplicate]:
    """Find images of one data set that are also in another: the same, but perhaps for compression and size.

    Two images are reported where their pixels are identical, or where, shrunk to 16x16, they differ by less
    than `threshold` grey levels (root mean square over pixels and channels). Each test image is given with
    its closest partner only. Sorted by distance. An empty list is what one hopes for.
    """
    (train_small, train_hash), (test_small, test_hash) = _fingerprints(train_set), _fingerprints(test_set)
    where = {digest: i for i, digest in reversed(list(enumerate(train_hash)))}
    found = []
    for start in range(0, len(test_small), 1024):
        distance = torch.cdist(test_small[start : start + 1024], train_small) / train_small.shape[1] ** 0.5
        for i, (d, j) in enumerate(zip(*(t.tolist() for t in distance.min(dim=1)), strict=True), start=start):
            if test_hash[i] in where:
                found.append(Duplicate(where[test_hash[i]], i, 0.0, True))
            elif d < threshold:
                found.append(Duplicate(j, i, d, False))
    return sorted(found, key=lambda pair: (pair.distance, pair.test_index))


def _fingerprints(dataset: Dataset, size: int = 16) -> tuple[Tensor, list[bytes]]:
    """Every image shrunk, float (N, 3 * size * size), and the hash of its shape and pixels."""
    small, digests = [], []
    for i in range(len(dataset)):
        image = to_tensor(dataset[i][0])
        small.append(resize(image, size).flatten().float())
        digests.append(hashlib.sha256(str(image.shape).encode() + image.numpy().tobytes()).digest())
    if not small:
        raise ValueError("an empty data set cannot be compared")
    return torch.stack(small), digests


def mlp_head(num_features: int, hidden: int, num_classes: int) -> nn.Sequential:
    """A head of two layers: random, ReLU, then zeros, so that the first prediction is uniform."""
    last = nn.Linear(hidden, num_classes)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(num_features, hidden), nn.ReLU(), last)


TRAINABLE = ("full", "head", "last1", "last2", "last3")


def trainable_parameters(model: nn.Module, trainable: str = "full") -> list[nn.Parameter]:
    """The parameters that a fine-tuning moves: all, the head's, or the last stages' with norm and head."""
    if trainable not in TRAINABLE:
        raise ValueError(f"unknown choice trainable={trainable!r}; use one of {', '.join(map(repr, TRAINABLE))}")
    if trainable == "full":
        return list(model.parameters())
    parts = [model.head]
    if trainable != "head":
        stages = [model.block1, model.block2, model.block3, model.block4]
        parts = [*stages[-int(trainable[-1]) :], model.norm, model.head]
    return [parameter for part in parts for parameter in part.parameters()]


CACHE_BYTES = 4 * 2**30  # decoded images are kept in memory up to this size


class _Images:
    """A data set as squares of bytes: decoded once if that fits into CACHE_BYTES, else whenever asked for."""

    def __init__(self, dataset: Dataset, size: int):
        self.dataset, self.size, self.kept = dataset, size, None
        if len(dataset) * 3 * size * size <= CACHE_BYTES:
            self.kept = self._decode(range(len(dataset)))
        self.labels = self.kept[1] if self.kept is not None else labels_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (N, 3, size, size) and long (N,)."""
        if self.kept is None:
            return self._decode(indices.tolist())
        return self.kept[0][indices], self.kept[1][indices]

    def _decode(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """These examples, decoded and resized by several threads; the order is that of the indices."""

        def square(index: int) -> tuple[Tensor, int]:
            image, label = _example(self.dataset, index)
            return resize(image, self.size), label

        with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:  # Pillow decodes in parallel
            images, labels = zip(*pool.map(square, indices), strict=True)
        return torch.stack(images), torch.tensor(labels)


def _example(dataset: Dataset, index: int) -> tuple[Tensor, int]:
    """One image, uint8 (3, H, W), and its class; TypeError or ValueError that names the place."""
    item = dataset[index]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(f"example {index} of the data set must be (image, class index), not {type(item).__name__}")
    try:
        image = to_tensor(item[0])
    except (TypeError, ValueError) as error:
        raise type(error)(f"example {index} of the data set: {error}") from error
    try:
        return image, operator.index(item[1])
    except TypeError as error:
        raise TypeError(
            f"example {index} of the data set: the class must be a whole number, not {item[1]!r}"
        ) from error


def _checked_length(dataset: Dataset, what: str) -> int:
    try:
        n = len(dataset)
    except TypeError as error:
        raise TypeError(f"{what} must be a data set with a length, not {type(dataset).__name__}") from error
    if n == 0:
        raise ValueError(f"{what} is empty; give at least one image of each class")
    return n


def _typical_size(dataset: Dataset) -> tuple[int, int]:
    """Height and width of the image of median area among up to 32 images spread over the data set."""
    places = sorted(set(np.linspace(0, len(dataset) - 1, 32).astype(int).tolist()))
    sizes = sorted((tuple(_example(dataset, i)[0].shape[1:]) for i in places), key=lambda size: size[0] * size[1])
    return sizes[len(sizes) // 2]


def _class_names(dataset: Dataset, labels: Tensor, num_classes: int | None) -> tuple[str, ...]:
    """The names of the classes: the data set's own, or numbers up to num_classes or to the largest label."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    if names is not None and num_classes in (None, len(names)):
        return tuple(map(str, names))
    n = num_classes or getattr(dataset, "n_classes", None) or int(labels.max()) + 1
    return tuple(map(str, range(n)))


def _check_labels(labels: Tensor, num_classes: int, what: str) -> None:
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"example {i} of {what} has label {int(labels[i])}, outside the {num_classes} classes; "
            f"use 0 to {num_classes - 1}"
        )


def _generator(seed: int, step: int) -> torch.Generator:
    """A generator of its own for every (seed, step)."""
    (word,) = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(word) >> 1)


@dataclass
class FinetuneResult:
    """What a fine-tuning gives back. The model is in eval mode; evaluate it at its image_size."""

    model: nn.Module
    rule: Rule
    history: History
    classes: tuple[str, ...]
    trainable: str
    seed: int

    def __repr__(self) -> str:
        name = getattr(self.model, "name", "") or type(self.model).__name__
        text = f"FinetuneResult({name}, {len(self.classes)} classes, {self.rule.steps} steps, {self.trainable}"
        if self.history.best:
            best = next(e for e in self.history.evals if e["step"] == self.history.best["step"])
            text += f", kept step {best['step']}: validation top-1 {100 * best['top1']:.1f} %"
        return text + ")"


def finetune(
    model: nn.Module,
    train_set: Dataset,
    rule: Rule | None = None,
    seed: int = 0,
    val_set: Dataset | None = None,
    run_dir=None,
    trainable: str = "full",
    progress: bool | None = None,
    *,
    keep: str = "best",
    num_classes: int | None = None,
    head: nn.Module | None = None,
    eval_every: int | None = None,
    micro_batch: int | None = None,
    save_every: int = 100,
) -> FinetuneResult:
    """Fine-tune a copy of a pre-trained network, in float32, on a data set of (PIL image or uint8 tensor, class index).

    rule: the BiT-HyperRule for this data set and this model by default. Images are resized, cropped, flipped
        and normalised as it says; the caller does none of that.
    val_set: every `eval_every` steps (a tenth of the run by default) the model is tried on it.
    keep: "best" gives the weights that were best on val_set (top-1, among equals the lower loss); "last", or no
        val_set, gives those of the last step, as BiT does.
    run_dir: a folder that makes the run safe to interrupt; the same call goes on, to the same bits.
    trainable: "full" (BiT), "head", or "last1", "last2", "last3" for the last stages, final norm and head.
    num_classes: taken from the data set's `classes` or labels by default.
    head: a last layer of one's own, from model.num_features to num_classes; by default a linear one of zeros.
    micro_batch: work through each batch in parts of this many images where memory is short; same result.

    Neither the given model nor the given head is changed. Raises TypeError or ValueError for a data set that
    cannot be learned from: empty, of a single class, with a wrong label, or with something that is no image.
    """
    if not hasattr(model, "reset_head"):
        raise TypeError(f"model must be a network of this book (a ResNetV2), not {type(model).__name__}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0, not {seed!r}")
    if keep not in ("best", "last"):
        raise ValueError(f'keep must be "best" or "last", not {keep!r}')
    n = _checked_length(train_set, "the training set")
    if rule is None:
        rule = hyperrule(n, _typical_size(train_set), model=model)
    elif not isinstance(rule, Rule):
        raise TypeError(f"rule must be a Rule, as hyperrule(...) makes it, not {type(rule).__name__}")

    images = _Images(train_set, rule.resize if rule.random_crop else rule.crop)
    classes = _class_names(train_set, images.labels, num_classes)
    _check_labels(images.labels, len(classes), "the training set")
    if len(images.labels.unique()) < 2:
        raise ValueError("the training set holds a single class; there is nothing to tell apart")

    tuned = copy.deepcopy(model).float()  # half precision, as a file may hold, would round small steps away
    with torch.random.fork_rng(devices=[]):  # a linear layer draws random weights even if they become zeros
        tuned.reset_head(len(classes))
    tuned.head.to(next(model.parameters()).device)
    if head is not None:
        tuned.head = copy.deepcopy(head)
        shape = tuple(tuned.head(next(head.parameters()).new_zeros(1, tuned.num_features)).shape)
        if shape != (1, len(classes)):
            raise ValueError(f"the head gives {shape[-1]} outputs for {len(classes)} classes")
    tuned.image_size = rule.crop
    parameters = trainable_parameters(tuned, trainable)

    def batch_fn(step: int) -> tuple[Tensor, Tensor]:
        generator = _generator(seed, step)
        x, y = images.batch(shard_indices(step, rule.batch_size, n, seed))
        if rule.random_crop:
            x = random_crop(x, rule.crop, generator)
        if rule.flip:
            x = random_flip(x, generator)
        x = normalize(x)
        if not rule.mixup_alpha:
            return x, y
        lam = mixup_weight(rule.mixup_alpha, generator)
        return mixup(x, F.one_hot(y, len(classes)).float(), lam, mixup_permutation(len(x), generator))

    eval_fn = None
    if val_set is not None:
        _checked_length(val_set, "the validation set")
        held_out = _Images(val_set, rule.crop)
        _check_labels(held_out.labels, len(classes), "the validation set")

        def eval_fn(net: nn.Module) -> dict[str, float]:
            return _validate(net, held_out)

    digest = 0
    if run_dir is not None:  # the same call must mean the same start and the same data
        for tensor in [*tuned.state_dict().values(), *(images.kept or (images.labels,))]:
            digest = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), digest)
    config = {
        **dataclasses.asdict(rule),
        "seed": seed,
        "trainable": trainable,
        "classes": list(classes),
        "n_examples": n,
        "start and data": digest,
        "validation images": 0 if val_set is None else len(val_set),
        "keep": keep if val_set is not None else "last",
    }
    history = train(
        tuned,
        batch_fn,
        F.cross_entropy,
        rule.lr,
        rule.steps,
        momentum=rule.momentum,
        weight_decay=rule.weight_decay,
        parameters=parameters,
        micro_batch=micro_batch,
        run_dir=run_dir,
        config=config,
        save_every=save_every,
        eval_fn=eval_fn,
        eval_every=eval_every or max(1, rule.steps // 10),
        keep_best="score" if val_set is not None and keep == "best" else None,
        progress=progress,
    )
    return FinetuneResult(tuned.eval(), rule, history, classes, trainable, seed)


@torch.no_grad()
def _validate(model: nn.Module, images: _Images, batch_size: int = 256) -> dict[str, float]:
    """Top-1 and mean loss; `score` orders by the number of right answers and, among equals, by the loss."""
    device = next(model.parameters()).device
    right, loss = 0, 0.0
    for start in range(0, len(images), batch_size):
        x, y = images.batch(torch.arange(start, min(start + batch_size, len(images))))
        logits, y = model(normalize(x).to(device)).float(), y.to(device)
        right += (logits.argmax(dim=1) == y).sum().item()
        loss += F.cross_entropy(logits, y, reduction="sum").item()
    nll = loss / len(images)
    return {"top1": right / len(images), "nll": nll, "score": right + 1 / (1 + nll)}
