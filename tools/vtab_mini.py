"""VTAB-mini: the pre-trained minis, frozen and fine-tuned, against the same network from scratch, from one command.

    python tools/vtab_mini.py

Thirteen offline tasks in VTAB's three groups, in two settings: 100 training examples a task, and all of them (1,000,
or 125 for the faces). For each checkpoint that is there (BiT-mini-S, -M, -L)

  finetuned  all weights, by the HyperRule, without the flips and crops that would change a task's labels
  ridge      ridge regression on the frozen features
  probe      multinomial logistic regression on the frozen features

and once, because they need no checkpoint,

  scratch    the same network from random weights, as many steps, at its own best of six learning rates
  untrained  ridge and probe on the features of random weights: what the architecture sees before it has learned
             anything, and so how much of a task is easy

The rate from scratch is chosen for each task and setting by the accuracy on the validation fifth of the training
images, over --rate-seeds. Test images are never used to choose anything.

Every result is saved in data/results/vtab_mini.json as soon as it is there, so the command can be stopped and given
again; a checkpoint that is not there yet is named, and joins when the command is given again. If a checkpoint was
replaced, its old results must go first: --forget BiT-mini-M.

    python tools/vtab_mini.py --plan

says how many runs are left and what they cost. One fine-tuning or training from scratch is 500 steps of 32 images at
64x64, about half a minute on a quiet CPU core; ridge and probe are a matter of seconds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from torch import nn

from bitlib.checkpoints import load_pretrained
from bitlib.evaluate import (
    SCRATCH_RATES,
    SUITE_METHODS,
    SuiteResults,
    evaluate_suite,
    read_suite,
    suite_tasks,
    write_json,
)
from bitlib.hyperrule import hyperrule
from bitlib.resnet import create_model

ROOT = Path(__file__).resolve().parent.parent
UNTRAINED = "untrained"
MODELS = (UNTRAINED, "BiT-mini-S", "BiT-mini-M", "BiT-mini-L")
ORDER = ("ridge", "probe", "finetuned", "scratch")  # the quick ones first
TOGETHER = (("ridge", "probe"), ("finetuned",), ("scratch",))  # the first two share their features


def setting(word: str) -> int | None:
    return None if word == "all" else int(word)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="checkpoints, by name or path")
    parser.add_argument("--methods", nargs="+", choices=SUITE_METHODS, default=list(ORDER), metavar="METHOD")
    parser.add_argument("--examples", nargs="+", type=setting, default=[100, None], help="a number, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tasks", nargs="+", choices=list(suite_tasks("vtab-mini")), metavar="TASK")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=list(SCRATCH_RATES), help="learning rates from scratch"
    )
    parser.add_argument("--rate-seeds", type=int, nargs="+", default=[0], help="seeds on which that rate is chosen")
    parser.add_argument("--steps", type=int, help="shorter runs, to try the tool; not the rule's")
    parser.add_argument("--predictions", type=Path, help="a folder for a file of predictions of each run")
    parser.add_argument("--forget", nargs="+", default=[], metavar="MODEL", help="drop these models' results first")
    parser.add_argument("--plan", action="store_true", help="run nothing; say what is left to do")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "vtab_mini.json")
    return parser.parse_args(argv)


def random_features(architecture: str = "R26x0.25") -> nn.Module:
    """The minis' network before any training."""
    torch.manual_seed(0)
    return create_model(architecture, num_classes=0)


def forget(path: Path, models: list[str]) -> None:
    """Take the results of some models out of the file ("scratch" is one of them)."""
    results = read_suite(path)
    results["rows"] = [row for row in results["rows"] if row["model"] not in models]
    results["models"] = {name: about for name, about in results["models"].items() if name not in models}
    results["summary"] = [entry for entry in results.get("summary", []) if entry["model"] not in models]
    if "scratch" in models:
        results["rates_tried"] = []
    write_json(path, results)


def users(method: str, models: dict) -> list[str]:
    """The names under which a method's results stand: a model's, or "scratch" for all of them."""
    if method == "scratch":
        return ["scratch"]
    return [name for name in models if method != "finetuned" or name != UNTRAINED]


def plan(args: argparse.Namespace, models: dict) -> str:
    """How many runs are left, and the optimiser steps in them."""
    results = read_suite(args.out) if args.out.exists() else SuiteResults(rows=[], rates_tried=[])
    done = {(r["model"], r["method"], r["examples"], r["task"], r["seed"]) for r in results["rows"]}
    tried = {(r["task"], r["examples"], r["rate"], r["seed"]) for r in results["rates_tried"]}
    tasks, settings = args.tasks or list(suite_tasks("vtab-mini")), [s or "all" for s in args.examples]
    left = dict.fromkeys(ORDER, 0)
    for method in args.methods:
        for name in users(method, models):
            wanted = {(name, method, s, task, seed) for s in settings for task in tasks for seed in args.seeds}
            left[method] += len(wanted - done)
    if "scratch" in args.methods:
        rates = {(task, s, r, seed) for task in tasks for s in settings for r in args.rates for seed in args.rate_seeds}
        left["scratch, to choose its rate"] = len(rates - tried)
    steps = args.steps or hyperrule(1_000, (32, 32)).steps
    lines = [f"{n:5d} x {method}" for method, n in left.items() if n]
    trained = sum(n for method, n in left.items() if method not in ("ridge", "probe"))
    return "\n".join([*lines, f"{trained:5d} trainings of {steps} steps: {trained * steps:,} optimiser steps"])


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.forget:
        forget(args.out, args.forget)
    models, absent = {}, []
    for name in args.models:
        if name == UNTRAINED:
            models[name] = random_features()
            continue
        try:
            models[Path(name).stem if Path(name).suffix else name] = load_pretrained(name)
        except (FileNotFoundError, ValueError) as error:
            absent.append(name)
            print(f"without {name}: {error}", file=sys.stderr)
    if not models:
        print("none of the checkpoints is there, so there is nothing to run", file=sys.stderr)
        return 1
    if args.plan:
        print(plan(args, models))
        return 0
    common = dict(tasks=args.tasks, out=args.out, steps=args.steps, predictions=args.predictions)
    results = SuiteResults(rows=[])
    for group in TOGETHER:
        methods = [method for method in group if method in args.methods]
        for examples in args.examples if methods else ():
            # from scratch only the architecture counts: the first one's
            chosen = [(name, models.get(name) or next(iter(models.values()))) for name in users(methods[0], models)]
            # one seed of all tasks after the other, so that a run cut short still has whole suites
            turns = [args.seeds] if "ridge" in methods or "probe" in methods else [[seed] for seed in args.seeds]
            for seeds, (name, model) in itertools.product(turns, chosen):
                results = evaluate_suite(
                    model,
                    name=name,
                    methods=methods,
                    examples=examples,
                    seeds=seeds,
                    rates=args.rates,
                    rate_seeds=args.rate_seeds,
                    progress=True,
                    **common,
                )
    print(results)
    if absent:
        print(f"\nnot there, so not in the tables: {', '.join(absent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
