"""Few-shot digits: the pre-trained mini against everything else, from one command.

    python tools/few_shot_digits.py

For each number of examples a class and each seed it trains, on the same images of scikit-learn's digits,

  bit-mini-m finetuned  BiT-mini-M fine-tuned by the BiT-HyperRule (no flip: a mirrored 2 is no 2)
  bit-mini-m ridge      ridge regression on the frozen features of the same checkpoint
  scratch               the same network from random weights, the same steps and random shifts, with a warm-up
  logistic pixels       logistic regression on the 32x32 pixels in [0, 1], C = 1
  svm pixels            a support vector machine (RBF) on the same pixels

and measures top-1 on the 797 test images. Nothing is chosen for the rule and for logistic regression, and ridge
chooses its strength within its training images. The network from scratch chooses its learning rate among six, and the
support vector machine its C among six, on 20 validation images a class from the training pool: labels that the others
do not get. Test images are never used to choose. The rate from scratch is chosen for each number of shots by the mean
validation accuracy over the first --rate-seeds seeds.

Every result is saved as soon as it is there, so the command can be stopped and given again. With the defaults there
are 20 fine-tunings, 20 trainings from scratch and 24 more to find their rates, each of about a minute on two quiet
CPU cores: about an hour in all. --seeds, --shots, --rates and --rate-seeds make it shorter or longer.

    python tools/few_shot_digits.py --mini-rates 0.003 0.01 0.03 0.1 0.3 --seeds 0 1

is how the learning rate of the minis' rule (MINI_BASE_LR of the HyperRule chapter) is chosen: fine-tune with 10 shots
at each rate, measure on the validation images only, write data/results/mini_rate.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import statistics
import sys
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from bitlib.checkpoints import load_pretrained
from bitlib.data import Task, load_task, normalize, resize
from bitlib.evaluate import extract_features, ridge_classifier
from bitlib.finetune import few_shot, finetune
from bitlib.hyperrule import Rule, hyperrule
from bitlib.resnet import create_model

ROOT = Path(__file__).resolve().parent.parent
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # C of the support vector machine
RATES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.3)
METHODS = ("bit-mini-m finetuned", "bit-mini-m ridge", "scratch", "logistic pixels", "svm pixels")
NETWORKS = ("bit-mini-m finetuned", "scratch")


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The classes of uint8 images, each resized straight to the model's resolution."""
    parts = [model(normalize(resize(part, model.image_size))) for part in images.split(200)]
    return torch.cat(parts).argmax(dim=1)


@dataclasses.dataclass
class Experiment:
    """The data, the pre-trained network and its rule, and the results so far in a JSON file."""

    task: Task
    checkpoint: str
    out: Path
    steps: int | None = None
    choosing: bool = False  # the rate of the rule itself, which is then no part of what must stay the same

    def __post_init__(self):
        self.pretrained = load_pretrained(self.checkpoint)
        self.images, self.labels = self.task.train.images, self.task.train.labels
        self.pixels = [part.images[:, 0].flatten(1).double() / 255 for part in (self.task.train, self.task.test)]
        self._features: list[Tensor] | None = None
        weights = b"".join(t.contiguous().numpy().tobytes() for t in self.pretrained.state_dict().values())
        self.about = {
            "command": "python tools/few_shot_digits.py",
            "task": f"digits: {len(self.task.train)} pool, {len(self.task.test)} test images",
            "checkpoint": self.checkpoint,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "architecture": self.pretrained.name,
            "rule": dataclasses.asdict(self.rule(100)),
            "validation_images_per_class": 20,
        }
        if self.choosing:
            del self.about["rule"]["base_lr"]
        self.results = {"about": self.about, "rates_tried": [], "rows": []}
        if self.out.exists():
            self.results = json.loads(self.out.read_text())
            if self.results["about"] != json.loads(json.dumps(self.about)):
                sys.exit(f"{self.out} is of another checkpoint or rule; move it away, or give another --out")

    def rule(self, n: int) -> Rule:
        rule = dataclasses.replace(hyperrule(n, image_size=(32, 32), model=self.pretrained), flip=False)
        if self.steps:
            rule = rule.with_steps(self.steps)
        return rule

    def features(self) -> list[Tensor]:
        if self._features is None:
            self._features = [extract_features(self.pretrained, part)[0] for part in (self.task.train, self.task.test)]
        return self._features

    def split(self, shots: int, seed: int) -> tuple[list[int], list[int]]:
        train = few_shot(self.labels, shots, seed=seed)
        return train, few_shot(self.labels, 20, seed=1_000 + seed, exclude=train)

    def accuracy(self, predicted: Tensor) -> dict:
        """Top-1 on the test set, and which images were right, a bit each, as hexadecimal digits."""
        right = predicted == self.task.test.labels
        bits = "".join("01"[int(r)] for r in right)
        return {"top1": right.double().mean().item(), "right": f"{int('1' + bits, 2):x}"}

    def network(self, method: str, shots: int, seed: int, rate: float | None = None) -> nn.Module:
        train, _ = self.split(shots, seed)
        rule, model = self.rule(len(train)), self.pretrained
        if rate is not None:
            rule = dataclasses.replace(rule, base_lr=rate)
        if method == "scratch":
            torch.manual_seed(seed)
            model = create_model(self.pretrained.name, 10)
            rule = dataclasses.replace(rule, warmup_steps=rule.steps // 10)
        return finetune(model, Subset(self.task.train, train), rule, seed=seed, progress=False).model

    def best_rate(self, shots: int) -> float | None:
        """The rate from scratch with the best mean validation accuracy; among equals the smaller."""
        tried: dict[float, list[float]] = {}
        for row in self.results["rates_tried"]:
            if row["shots"] == shots:
                tried.setdefault(row["rate"], []).append(row["val_top1"])
        return max(sorted(tried), key=lambda rate: statistics.mean(tried[rate]), default=None)

    def try_rate(self, shots: int, seed: int, rate: float) -> None:
        _, val = self.split(shots, seed)
        method = NETWORKS[0] if self.choosing else "scratch"
        predicted = predict(self.network(method, shots, seed, rate), self.images[val])
        top1 = (predicted == self.labels[val]).double().mean().item()
        self.results["rates_tried"].append({"shots": shots, "seed": seed, "rate": rate, "val_top1": top1})
        self.save()

    def run(self, method: str, shots: int, seed: int) -> None:
        row: dict = {"method": method, "shots": shots, "seed": seed}
        train, val = self.split(shots, seed)
        if method == "bit-mini-m finetuned":
            predicted = predict(self.network(method, shots, seed), self.task.test.images)
        elif method == "scratch":
            row["rate"] = self.best_rate(shots)
            predicted = predict(self.network(method, shots, seed, row["rate"]), self.task.test.images)
        elif method == "bit-mini-m ridge":
            pool, test = self.features()
            classifier = ridge_classifier(pool[train], self.labels[train], num_classes=10, seed=seed)
            predicted = classifier(test).argmax(dim=1)
        else:
            pool, test = self.pixels
            if method == "logistic pixels":
                fitted = LogisticRegression(C=1.0, max_iter=2000).fit(pool[train], self.labels[train])
            else:
                tried = {c: SVC(C=c).fit(pool[train], self.labels[train]) for c in STRENGTHS}
                row["C"] = max(STRENGTHS, key=lambda c: tried[c].score(pool[val], self.labels[val]))
                fitted = tried[row["C"]]
            predicted = torch.from_numpy(fitted.predict(test))
        self.results["rows"].append(row | self.accuracy(predicted))
        self.save()

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(temporary, self.out)


def jobs(experiment: Experiment, args: argparse.Namespace) -> list[tuple]:
    """What is still to be done, the quick parts first."""
    done = {(r["method"], r["shots"], r["seed"]) for r in experiment.results["rows"]}
    tried = {(r["shots"], r["seed"], r["rate"]) for r in experiment.results["rates_tried"]}
    todo: list[tuple] = []
    if args.mini_rates:
        todo = [("rate", 10, seed, rate) for seed in args.seeds for rate in args.mini_rates]
        return [job for job in todo if job[1:] not in tried]
    quick = [m for m in args.methods if m not in NETWORKS]
    todo += [("run", m, shots, seed) for m in quick for shots in args.shots for seed in args.seeds]
    if "bit-mini-m finetuned" in args.methods:
        todo += [("run", "bit-mini-m finetuned", shots, seed) for seed in args.seeds for shots in args.shots]
    if "scratch" in args.methods:
        todo += [("rate", s, seed, r) for s in args.shots for seed in args.seeds[: args.rate_seeds] for r in args.rates]
        todo += [("run", "scratch", shots, seed) for shots in args.shots for seed in args.seeds]
    return [job for job in todo if job[1:] not in (done if job[0] == "run" else tried)]


def table(results: dict, shots: list[int]) -> str:
    """Mean and standard deviation of top-1 over the seeds, in per cent."""
    lines = [f"{'top-1, %':<22}" + "".join(f"{f'{s} shots':>14}" for s in shots)]
    for method in METHODS:
        cells = []
        for s in shots:
            top1 = [100 * r["top1"] for r in results["rows"] if r["method"] == method and r["shots"] == s]
            spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
            cells.append(f"{statistics.mean(top1):5.1f} ± {spread:4.1f}" if top1 else "-")
        lines.append(f"{method:<22}" + "".join(f"{cell:>14}" for cell in cells))
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 10, 25])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates from scratch")
    parser.add_argument("--rate-seeds", type=int, default=1, help="seeds on which the rate from scratch is chosen")
    parser.add_argument("--model", default="BiT-mini-M", help="a checkpoint's name or path")
    parser.add_argument("--steps", type=int, help="shorter runs, to try the tool; not the rule's")
    parser.add_argument("--mini-rates", type=float, nargs="+", help="choose the rate of the minis' rule among these")
    parser.add_argument("--out", type=Path, help="the JSON file; by default in data/results")
    args = parser.parse_args(argv)
    name = "mini_rate.json" if args.mini_rates else "few_shot_digits.json"
    out = args.out or ROOT / "data" / "results" / name
    experiment = Experiment(load_task("digits"), args.model, out, args.steps, choosing=bool(args.mini_rates))
    for kind, *job in tqdm(jobs(experiment, args), unit="run"):
        (experiment.run if kind == "run" else experiment.try_rate)(*job)
    print(rate_table(experiment.results) if args.mini_rates else table(experiment.results, args.shots))
    return 0


if __name__ == "__main__":
    sys.exit(main())
