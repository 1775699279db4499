"""Few-shot transfer to tasks of real pictures: the pre-trained mini against everything else, from one command.

    python tools/few_shot_tasks.py

For each task, each number of examples a class and each seed it trains, on the same images,

  finetuned         BiT-mini-M fine-tuned by the BiT-HyperRule, without flips and crops that would change a label
  ridge             ridge regression on the frozen features of the same checkpoint
  probe             multinomial logistic regression on the same features
  scratch           the same network from random weights, the same steps and augmentations, with a warm-up
  logistic pixels   logistic regression on the 32x32 pixels in [0, 1], C = 1
  logistic hog      multinomial logistic regression on histograms of oriented gradients (HOG) of these pixels
  svm pixels        a support vector machine (RBF) on the pixels

and measures top-1 on the task's test images. Nothing is chosen for the rule and for logistic regression on pixels;
ridge, probe and the regression on HOG choose their strength within their training images. The network from scratch
chooses its learning rate among six, and the support vector machine its C among six, on up to 20 validation images a
class from what is left of the training pool: labels that the others do not get. Test images are never used to choose.
The rate from scratch is chosen for each task and number of shots by the mean validation accuracy over the first
--rate-seeds seeds. Where a class has too few images for a number of shots, that cell is left out, and said.

Every result is saved in data/results/few_shot_tasks.json as soon as it is there, so the command can be stopped and
given again. --tasks, --methods, --seeds, --shots, --rates and --rate-seeds make it shorter or longer, and

    python tools/few_shot_tasks.py --plan

says how many runs are left and what they cost. A fine-tuning or a training from scratch is 500 steps of 32 images at
64x64, about half a minute on a quiet CPU core; the other methods take seconds.

    python tools/few_shot_tasks.py --model BiT-mini-S --tasks digits --methods finetuned ridge

does the first two for another checkpoint, in data/results/few_shot_bit-mini-s.json. In the results a method that uses
a checkpoint has its name in front: "bit-mini-m ridge".

    python tools/few_shot_tasks.py --mini-rates 0.003 0.01 0.03 0.1 0.3 --seeds 0 1

is how the learning rate of the minis' rule (MINI_BASE_LR of the HyperRule chapter) is chosen: fine-tune on the digits
with 10 shots at each rate, measure on the validation images only, write data/results/mini_rate.json.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import statistics
import sys
from pathlib import Path

import torch
from skimage.feature import hog
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from sweep_rule import split
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from bitlib.checkpoints import load_pretrained
from bitlib.data import Task, load_task
from bitlib.evaluate import (
    SCRATCH_RATES,
    extract_features,
    linear_probe,
    predict_logits,
    ridge_classifier,
    right_bits,
    task_rule,
    topk_accuracy,
    weights_digest,
    write_json,
)
from bitlib.finetune import finetune
from bitlib.hyperrule import hyperrule
from bitlib.resnet import create_model

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("digits", "textures", "histology", "sky", "photographs", "retina", "depth", "faces")  # all of real pictures
COMMAND, MODEL = "python tools/few_shot_tasks.py", "BiT-mini-M"
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # C of the support vector machine
METHODS = ("finetuned", "ridge", "probe", "scratch", "logistic pixels", "logistic hog", "svm pixels")
NETWORKS = ("finetuned", "scratch")
OF_THE_CHECKPOINT = ("finetuned", "ridge", "probe")


def named(method: str, checkpoint: str) -> str:
    """What a method is called in the results."""
    return f"{Path(checkpoint).stem.lower()} {method}" if method in OF_THE_CHECKPOINT else method


def enough(task: Task, shots: int) -> bool:
    """Whether every class of the pool has `shots` images, and at least one more to validate on."""
    return bool(task.train.labels.bincount(minlength=len(task.classes)).min() > shots)


@functools.cache
def pixels(task: Task) -> list[Tensor]:
    """The pixels of pool and test images in [0, 1], float64 (N, d); of grey pictures one channel."""
    pair = [part.images for part in (task.train, task.test)]
    grey = all((images == images[:, :1]).all() for images in pair)
    return [(images[:, :1] if grey else images).flatten(1).double() / 255 for images in pair]


@functools.cache
def gradients(task: Task) -> list[Tensor]:
    """HOG of pool and test images, float64 (N, 324): 9 directions in cells of 8x8, normalised over blocks of 2x2."""
    options = dict(orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=0)
    pair = [part.images.numpy() for part in (task.train, task.test)]
    return [torch.stack([torch.from_numpy(hog(image, **options)) for image in images]) for images in pair]


@dataclasses.dataclass
class Experiment:
    """The pre-trained network, its rule, and the results so far in a JSON file."""

    checkpoint: str
    out: Path
    steps: int | None = None
    choosing: bool = False  # the rate of the rule itself, which is then no part of what must stay the same

    def __post_init__(self):
        self.pretrained = load_pretrained(self.checkpoint)
        self._features: dict[str, list[Tensor]] = {}
        rule = hyperrule(1, 32, model=self.pretrained)
        self.about = {
            "command": COMMAND + (f" --model {self.checkpoint}" if self.checkpoint != MODEL else ""),
            "checkpoint": self.checkpoint,
            "weights_sha256": weights_digest(self.pretrained.state_dict()),
            "architecture": self.pretrained.name,
            "rule": dataclasses.asdict(rule.with_steps(self.steps) if self.steps else rule),
            "validation_images_per_class": "up to 20",
        }
        if self.choosing:
            del self.about["rule"]["base_lr"]
        self.results = {"about": self.about, "rates_tried": [], "rows": []}
        if self.out.exists():
            self.results = json.loads(self.out.read_text())
            if self.results["about"] != json.loads(json.dumps(self.about)):
                sys.exit(f"{self.out} is of another checkpoint or rule; move it away, or give another --out")

    def features(self, task: Task) -> list[Tensor]:
        """The pretrained network's features of pool and test images."""
        if task.name not in self._features:
            pair = (task.train, task.test)
            self._features[task.name] = [extract_features(self.pretrained, part)[0] for part in pair]
        return self._features[task.name]

    def network(self, method: str, task: Task, shots: int, seed: int, rate: float | None = None) -> nn.Module:
        train, _ = split(task, shots, seed)
        rule, model = task_rule(task, self.pretrained, self.steps), self.pretrained
        if rate is not None:
            rule = dataclasses.replace(rule, base_lr=rate)
        if method == "scratch":
            torch.manual_seed(seed)
            model = create_model(self.pretrained.name, len(task.classes))
            rule = dataclasses.replace(rule, warmup_steps=rule.steps // 10)
        return finetune(model, Subset(task.train, train), rule, seed=seed, progress=False).model

    def best_rate(self, task: str, shots: int) -> float | None:
        """The rate from scratch with the best mean validation accuracy; among equals the smaller."""
        tried: dict[float, list[float]] = {}
        for row in self.results["rates_tried"]:
            if (row["task"], row["shots"]) == (task, shots):
                tried.setdefault(row["rate"], []).append(row["val_top1"])
        return max(sorted(tried), key=lambda rate: statistics.mean(tried[rate]), default=None)

    def try_rate(self, name: str, shots: int, seed: int, rate: float) -> None:
        task = load_task(name)
        model = self.network(NETWORKS[0] if self.choosing else "scratch", task, shots, seed, rate)
        top1 = topk_accuracy(*predict_logits(model, Subset(task.train, split(task, shots, seed)[1])))
        row = {"task": name, "shots": shots, "seed": seed, "rate": rate, "val_top1": top1}
        self.results["rates_tried"].append(row)
        self.save()

    def run(self, name: str, method: str, shots: int, seed: int) -> None:
        row: dict = {"task": name, "method": named(method, self.checkpoint), "shots": shots, "seed": seed}
        task = load_task(name)
        labels, n_classes = task.train.labels, len(task.classes)
        train, val = split(task, shots, seed)
        if method in NETWORKS:
            if method == "scratch":
                row["rate"] = self.best_rate(name, shots)
            model = self.network(method, task, shots, seed, row.get("rate"))
            predicted = predict_logits(model, task.test)[0].argmax(dim=1)
        elif method in ("ridge", "probe", "logistic hog"):
            pool, test = gradients(task) if method == "logistic hog" else self.features(task)
            fit = ridge_classifier if method == "ridge" else linear_probe
            predicted = fit(pool[train], labels[train], num_classes=n_classes, seed=seed)(test).argmax(dim=1)
        else:
            pool, test = pixels(task)
            if method == "logistic pixels":
                fitted = LogisticRegression(C=1.0, max_iter=2000).fit(pool[train], labels[train])
            else:
                tried = {c: SVC(C=c).fit(pool[train], labels[train]) for c in STRENGTHS}
                row["C"] = max(STRENGTHS, key=lambda c: tried[c].score(pool[val], labels[val]))
                fitted = tried[row["C"]]
            predicted = torch.from_numpy(fitted.predict(test))
        self.results["rows"].append(row | accuracy(predicted, task.test.labels))
        self.save()

    def save(self) -> None:
        write_json(self.out, self.results)


def accuracy(predicted: Tensor, labels: Tensor) -> dict:
    """Top-1, and which images were right, as `right_images` reads it."""
    right = predicted == labels
    return {"top1": right.double().mean().item(), "right": right_bits(right)}


def jobs(results: dict, args: argparse.Namespace) -> list[tuple]:
    """What is still to be done, the quick parts first; ("run" or "rate", task, ...)."""
    done = {(r["task"], r["method"], r["shots"], r["seed"]) for r in results["rows"]}
    tried = {(r["task"], r["shots"], r["seed"], r["rate"]) for r in results["rates_tried"]}
    todo: list[tuple] = []
    if args.mini_rates:
        todo = [("rate", "digits", 10, seed, rate) for seed in args.seeds for rate in args.mini_rates]
        return [job for job in todo if job[1:] not in tried]
    cells = [(name, shots) for name in args.tasks for shots in args.shots if enough(load_task(name), shots)]
    quick = [m for m in args.methods if m not in NETWORKS]
    todo += [("run", name, m, shots, seed) for name, shots in cells for m in quick for seed in args.seeds]
    if "scratch" in args.methods:
        rate_seeds = args.seeds[: args.rate_seeds]
        rates = [("rate", *cell, seed, rate) for cell in cells for seed in rate_seeds for rate in args.rates]
    # one seed of everything after the other, so that a run cut short still has whole tables
    for method in NETWORKS:
        if method in args.methods:
            todo += rates if method == "scratch" else []
            todo += [("run", name, method, shots, seed) for seed in args.seeds for name, shots in cells]

    def is_done(kind: str, task: str, method, *rest) -> bool:
        return (task, method, *rest) in tried if kind == "rate" else (task, named(method, args.model), *rest) in done

    return [job for job in todo if not is_done(*job)]


def plan(todo: list[tuple], steps: int) -> str:
    """How many runs are left, and the optimiser steps in them."""
    left = collections.Counter(job[2] if job[0] == "run" else "rates tried, each a training" for job in todo)
    trained = sum(job[0] == "rate" or job[2] in NETWORKS for job in todo)
    lines = [f"{n:5d} x {what}" for what, n in left.items()]
    return "\n".join([*lines, f"{trained:5d} trainings of {steps} steps: {trained * steps:,} optimiser steps"])


def table(results: dict, args: argparse.Namespace) -> str:
    """For each task, mean and standard deviation of top-1 over the seeds, in per cent; fewer seeds than asked in ()."""
    lines = []
    for task in args.tasks:
        lines.append(f"{task + ', top-1, %':<22}" + "".join(f"{f'{s} shots':>18}" for s in args.shots))
        for method in METHODS:
            name = named(method, args.model)
            own = [r for r in results["rows"] if (r["task"], r["method"]) == (task, name)]
            cells = []
            for shots in args.shots:
                top1 = [100 * r["top1"] for r in own if r["shots"] == shots]
                spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
                few = f"({len(top1)})" if len(top1) < len(args.seeds) else ""
                cells.append(f"{statistics.mean(top1):5.1f} ± {spread:4.1f} {few:>4}" if top1 else "-     ")
            lines.append(f"{name:<22}" + "".join(f"{cell:>18}" for cell in cells))
        missing = [str(shots) for shots in args.shots if not enough(load_task(task), shots)]
        if missing:
            lines.append(f"  left out, for want of images: {', '.join(missing)} shots")
    return "\n".join(lines)


def rate_table(results: dict) -> str:
    """Mean validation top-1 of each rate tried, in per cent."""
    lines = ["rate      validation top-1, %"]
    for rate in sorted({row["rate"] for row in results["rates_tried"]}):
        top1 = [100 * row["val_top1"] for row in results["rates_tried"] if row["rate"] == rate]
        lines.append(f"{rate:<10g}{statistics.mean(top1):5.1f}  ({len(top1)} seeds)")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help="of bitlib.data.TASKS")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 10, 25])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=list(SCRATCH_RATES), help="learning rates from scratch"
    )
    parser.add_argument("--rate-seeds", type=int, default=1, help="seeds on which the rate from scratch is chosen")
    parser.add_argument("--model", default=MODEL, help="a checkpoint's name or path")
    parser.add_argument("--steps", type=int, help="shorter runs, to try the tool; not the rule's")
    parser.add_argument("--mini-rates", type=float, nargs="+", help="choose the rate of the minis' rule among these")
    parser.add_argument("--plan", action="store_true", help="run nothing; say what is left to do")
    parser.add_argument("--out", type=Path, help="the JSON file; by default in data/results")
    args = parser.parse_args(argv)
    name = "few_shot_tasks.json" if args.model == MODEL else f"few_shot_{Path(args.model).stem.lower()}.json"
    name = "mini_rate.json" if args.mini_rates else name
    out = args.out or ROOT / "data" / "results" / name
    experiment = Experiment(args.model, out, args.steps, choosing=bool(args.mini_rates))
    todo = jobs(experiment.results, args)
    if args.plan:
        print(plan(todo, experiment.about["rule"]["steps"]))
        return 0
    for kind, *job in tqdm(todo, unit="run"):
        (experiment.run if kind == "run" else experiment.try_rate)(*job)
    print(rate_table(experiment.results) if args.mini_rates else table(experiment.results, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
