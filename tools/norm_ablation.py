"""Which norm, and are filters standardized? The paper's ablation at the mini scale, from one command.

    python tools/norm_ablation.py

Pre-trains four versions of R26x0.25 on GlyphNet-S, which differ in nothing but

  GN / BN        group normalization, or batch normalization in its place
  WS / plain     standardized filters, or filters as they are

for --steps steps at batch 128, each with its own best of --rates: chosen after --rate-steps steps by the accuracy on
upstream's validation images, characters, with a seed of its own. A rate at which the loss is not finite is out.
Measures the upstream accuracy at the end, and ridge regression on the frozen features, 10 examples a class:
handwritten digits, and characters that GlyphNet never shows.

With --micro-batch the batch is worked through in parts and the gradients are added up; group normalization does not
notice, batch normalization sees parts. Every result is saved in data/results/norm_ablation.json as soon as it is
there; the command can be stopped and given again.

These are short runs of a small network. They show whether the four differ here, not what they reach at BiT's scale.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from scaling import few_shot_tasks
from torch import nn
from tqdm import tqdm

from bitlib.conv import StdConv2d
from bitlib.data import GlyphNet
from bitlib.evaluate import extract_features, few_shot_accuracy, write_json
from bitlib.norm import GroupNorm
from bitlib.pretrain import (
    PretrainConfig,
    TrainingError,
    group_accuracy,
    train,
    upstream_batches,
    upstream_loss,
)
from bitlib.resnet import create_model

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("GN+WS", "GN", "BN+WS", "BN")
RATE_SEED = 100


def variant(name: str, architecture: str, num_classes: int) -> nn.Module:
    """R26x0.25 with another norm or with filters that are not standardized; weights drawn from the global generator."""
    model = create_model(architecture, num_classes)
    for path, module in list(model.named_modules()):
        parent = model.get_submodule(path.rpartition(".")[0])
        leaf = path.rpartition(".")[2]
        if "BN" in name and type(module) is GroupNorm:
            setattr(parent, leaf, nn.BatchNorm2d(module.weight.numel()))
        if "WS" not in name and type(module) is StdConv2d:
            conv = nn.Conv2d(
                module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding, bias=False
            )
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            setattr(parent, leaf, conv)
    return model


def pretrained(name: str, config: PretrainConfig, micro_batch: int | None) -> tuple[nn.Module, dict]:
    """Pre-train a variant: the model, and its upstream validation accuracy for each kind of label."""
    upstream, held_out = (GlyphNet(config.data, split, seed=config.seed) for split in ("train", "val"))
    groups = list(upstream.groups)
    torch.manual_seed(config.seed)
    model = variant(name, config.model, sum(group.n_classes for group in groups))

    train(
        model,
        upstream_batches(upstream, config),
        lambda logits, targets: upstream_loss(logits, targets, groups, config.loss),
        config.lr_at,
        config.steps,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        micro_batch=micro_batch,
        progress=False,
    )
    model.eval()
    images, targets = held_out.batch(torch.arange(config.val_images))
    return model, group_accuracy(model, images, targets, groups, config.image_size)


def few_shot(model: nn.Module) -> dict[str, float]:
    """Ridge regression on the frozen features at 10 examples a class, the mean of ten draws."""
    found = {}
    for task, (pool, test) in few_shot_tasks().items():
        scores = few_shot_accuracy(extract_features(model, pool), extract_features(model, test), 10, range(10))
        found[task] = scores.per_seed.mean().item()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--rate-steps", type=int, default=200)
    parser.add_argument("--micro-batch", type=int, help="the whole batch of 128 by default")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "norm_ablation.json")
    args = parser.parse_args(argv)
    about = {"command": "python tools/norm_ablation.py", "architecture": "R26x0.25", "data": "S"}
    about |= {"steps": args.steps, "rate_steps": args.rate_steps, "rates": args.rates}
    results = {"about": about, "rates_tried": [], "rows": []}
    if args.out.exists():
        results = json.loads(args.out.read_text(encoding="utf-8"))
        if results["about"] != about:
            sys.exit(f"{args.out} is of other settings: {results['about']}; move it away, or give another --out")

    def save() -> None:
        write_json(args.out, results)

    def config(steps: int, seed: int, rate: float) -> PretrainConfig:
        return PretrainConfig(
            data="S", steps=steps, seed=seed, lr=rate, warmup_steps=min(100, steps // 4), val_images=2_000
        )

    def of(kind: str, name: str) -> list[dict]:
        return [r for r in results[kind] if (r["variant"], r["micro_batch"]) == (name, args.micro_batch)]

    jobs = [(name, seed) for seed in args.seeds for name in args.variants]
    for name, seed in tqdm(jobs, unit="run"):
        key = {"variant": name, "micro_batch": args.micro_batch}
        for rate in args.rates:
            if rate not in {row["rate"] for row in of("rates_tried", name)}:
                try:
                    val = pretrained(name, config(args.rate_steps, RATE_SEED, rate), args.micro_batch)[1]
                except TrainingError:  # the loss is not finite
                    val = None
                results["rates_tried"].append(key | {"rate": rate, "val": val})
                save()
        if seed in {row["seed"] for row in of("rows", name)}:
            continue
        ended = [row for row in of("rates_tried", name) if row["rate"] in args.rates and row["val"] is not None]
        if not ended:
            sys.exit(f"{name} diverges at every rate; give lower --rates")
        tried = {row["rate"]: row["val"]["character"] for row in ended}
        rate = max(sorted(tried), key=tried.get)
        model, val = pretrained(name, config(args.steps, seed, rate), args.micro_batch)
        results["rows"].append(key | {"seed": seed, "rate": rate, "val": val, "few_shot": few_shot(model)})
        save()

    print(f"{'':14}{'rate':>6}{'characters upstream':>22}{'digits':>16}{'unseen characters':>20}  (seeds)")
    for name in args.variants:
        rows = of("rows", name)
        cells = [[100 * row["val"]["character"] for row in rows]]
        cells += [[100 * row["few_shot"][task] for row in rows] for task in ("digits", "characters")]
        words = [f"{statistics.mean(c):.1f} ± {statistics.stdev(c) if len(c) > 1 else 0.0:.1f}" for c in cells]
        print(f"{name:14}{rows[0]['rate']:6g}{words[0]:>22}{words[1]:>16}{words[2]:>20}  ({len(rows)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
