"""How much does the HyperRule give up? Learning rate x steps on three downstream tasks, around the rule's choice.

    python tools/sweep_rule.py

Fine-tunes a mini checkpoint at every setting of --rates and --steps, on --shots examples a class of each task, with
each seed; everything else is the rule's. Writes, for each run, the top-1 on validation images (up to 20 a class, from
what is left of the training pool) and on the test images to data/results/rule_sweep.json, as soon as it is there: the
command can be stopped and given again. A file of another checkpoint or rule is refused.

Two regrets are printed, in points of test accuracy, with their standard error over the tasks and seeds: of the rule
against the setting that does best on the validation images, which is what a search would have found; and against the
setting that happens to do best on the test images, which is more than any search can find.

With the defaults there are 5 rates x 3 lengths x 3 tasks x 3 seeds = 135 runs of 100 to 500 steps: on two quiet CPU
cores about an hour and a half.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import sys
from pathlib import Path

from torch.utils.data import Subset
from tqdm import tqdm

from bitlib.checkpoints import load_pretrained
from bitlib.data import Task, load_task
from bitlib.evaluate import predict_logits, task_rule, topk_accuracy, write_json
from bitlib.finetune import few_shot, finetune, labels_of
from bitlib.hyperrule import hyperrule

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("digits", "textures", "histology")
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
STEPS = (100, 250, 500)


def split(task: Task, shots: int, seed: int) -> tuple[list[int], list[int]]:
    """Training and validation places in a task's pool: `shots` of each class, and up to 20 of what is left."""
    labels = labels_of(task.train)
    train = few_shot(labels, shots, seed=seed)
    left = labels.bincount() - shots
    n_val = min(20, int(left[left >= 0].min()))
    if n_val < 1:
        sys.exit(f"{task.name} has only {int(labels.bincount().min())} images of some class; use fewer --shots")
    return train, few_shot(labels, n_val, seed=1_000 + seed, exclude=train)


def run(pretrained, task: Task, shots: int, seed: int, rate: float | None, steps: int | None) -> dict:
    train, val = split(task, shots, seed)
    rule = task_rule(task, pretrained, steps)
    rule = dataclasses.replace(rule, base_lr=rate or rule.base_lr)
    model = finetune(pretrained, Subset(task.train, train), rule, seed=seed, progress=False).model
    parts = {"val_top1": Subset(task.train, val), "test_top1": task.test}
    return {name: topk_accuracy(*predict_logits(model, part)) for name, part in parts.items()}


def mean_by(rows: list[dict], key: str) -> dict[tuple[float, int], float]:
    """The mean of one of the figures for each setting."""
    found: dict[tuple[float, int], list[float]] = {}
    for row in rows:
        found.setdefault((row["rate"], row["steps"]), []).append(row[key])
    return {setting: statistics.mean(values) for setting, values in found.items()}


def regrets(rows: list[dict], chosen: tuple[float, int]) -> tuple[list[float], list[float]]:
    """Points of test accuracy that the rule's setting loses, for each task and seed: to a search, to the best."""
    searched, best = [], []
    for task, seed in sorted({(row["task"], row["seed"]) for row in rows}):
        own = {(r["rate"], r["steps"]): r for r in rows if (r["task"], r["seed"]) == (task, seed)}
        if chosen not in own:
            continue
        # among settings that are equal on the validation images a search would take the cheaper
        found = max(own.values(), key=lambda r: (r["val_top1"], -r["steps"], -r["rate"]))
        rule = own[chosen]["test_top1"]
        searched.append(100 * (found["test_top1"] - rule))
        best.append(100 * (max(r["test_top1"] for r in own.values()) - rule))
    return searched, best


def table(rows: list[dict], chosen: tuple[float, int]) -> str:
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        means = mean_by([row for row in rows if row["task"] == task], "test_top1")
        rates, steps = (sorted({setting[i] for setting in means}) for i in (0, 1))
        lines.append(f"{task}, test top-1, %" + "".join(f"{f'{s} steps':>12}" for s in steps))
        for rate in rates:
            cells = (
                f"{100 * means[rate, s]:.1f}{'*' if (rate, s) == chosen else ' '}" if (rate, s) in means else "-"
                for s in steps
            )
            lines.append(f"  rate {rate:<{len(task) + 8}g}" + "".join(f"{cell:>12}" for cell in cells))
    for name, values in zip(("a search on validation images", "the best of all"), regrets(rows, chosen), strict=True):
        if values:
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            lines.append(f"regret against {name}: {statistics.mean(values):.1f} ± {error:.1f} points")
    return "\n".join([*lines, "* the rule's own setting"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--shots", type=int, default=25)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="BiT-mini-M", help="a mini checkpoint's name or path")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "rule_sweep.json")
    args = parser.parse_args(argv)

    pretrained = load_pretrained(args.model)
    weights = b"".join(t.contiguous().numpy().tobytes() for t in pretrained.state_dict().values())
    tasks = {name: load_task(name) for name in args.tasks}
    rule = hyperrule(1, 32, model=pretrained)
    about = {
        "command": "python tools/sweep_rule.py",
        "checkpoint": args.model,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "shots": args.shots,
        "rule": dataclasses.asdict(rule),
    }
    results = {"about": about, "rows": []}
    if args.out.exists():
        results = json.loads(args.out.read_text())
        if results["about"] != json.loads(json.dumps(about)):
            sys.exit(
                f"{args.out} is of another checkpoint, rule or number of shots; move it away, or give another --out"
            )
    done = {(row["task"], row["seed"], row["rate"], row["steps"]) for row in results["rows"]}
    todo = [(t, seed, r, s) for seed in args.seeds for t in tasks for r in args.rates for s in args.steps]
    for name, seed, rate, steps in tqdm([job for job in todo if job not in done], unit="run"):
        row = {"task": name, "seed": seed, "rate": rate, "steps": steps}
        results["rows"].append(row | run(pretrained, tasks[name], args.shots, seed, rate, steps))
        write_json(args.out, results)
    print(table(results["rows"], (rule.base_lr, rule.steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
