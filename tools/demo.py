"""Make what the demo page and the reliability figure need: a mini fine-tuned on digits, as ONNX, and test vectors.

    python tools/demo.py [--model BiT-mini-M]

Writes into pages/_static/demo/: digits.onnx (8 x 8 levels of grey in, ten logits out), vectors.json (test images with
PyTorch's logits), reliability.js (logits of a linear probe on the checkpoint's frozen features that saw five images of
each digit) and card.json, which says how they were made. A few minutes on two cores. Run it again when the
checkpoint changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from book import ROOT
from torch import Tensor, nn

from bitlib.checkpoints import load_pretrained
from bitlib.conv import fold_weight_standardization
from bitlib.data import load_task, package_file, resize, shipped_file
from bitlib.evaluate import evaluate, extract_features, linear_probe, topk_accuracy
from bitlib.finetune import few_shot, finetune
from bitlib.hyperrule import hyperrule

OUT = ROOT / "pages" / "_static" / "demo"
OPSET = 17
SHOTS = 5
VECTORS = 4  # test images of each digit


class DigitReader(nn.Module):
    """From levels of grey (N, 1, 8, 8), 0 to 255, to logits (N, 10): enlarges as the digits task and the rule do."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.size = model, model.image_size

    def forward(self, levels: Tensor) -> Tensor:
        images = F.interpolate(levels, (32, 32), mode="bilinear")
        images = F.interpolate(images, (self.size, self.size), mode="bilinear")
        return self.model((images / 127.5 - 1).expand(-1, 3, -1, -1))


def levels_of(images: Tensor) -> Tensor:
    """The 8 x 8 levels that the digits task enlarged to (N, 3, 32, 32), back from scikit-learn's file."""
    rows = np.loadtxt(package_file("sklearn", "datasets/data/digits.csv.gz"), delimiter=",")
    levels = torch.from_numpy(np.rint(rows[:, :-1] * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    known = {image.numpy().tobytes(): i for i, image in enumerate(resize(levels.expand(-1, 3, -1, -1), 32))}
    return levels[[known[image.numpy().tobytes()] for image in images]]


def export(reader: nn.Module, example: Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about itself
        torch.onnx.export(
            reader,
            (example,),
            str(path),
            input_names=["levels"],
            output_names=["logits"],
            dynamic_axes={"levels": {0: "n"}, "logits": {0: "n"}},
            opset_version=OPSET,
            dynamo=False,
        )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rounded(logits: Tensor, digits: int) -> list[list[float]]:
    return [[round(value, digits) for value in row] for row in logits.tolist()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="BiT-mini-M", help="the name of a checkpoint that ships with the book")
    parser.add_argument("--steps", type=int, help="shorter runs, to try the tool; not the rule's")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write into")
    args = parser.parse_args(argv)
    task, model = load_task("digits"), load_pretrained(args.model)
    # a mirrored 2 is no 2
    rule = replace(hyperrule(len(task.train), (32, 32), model=model), flip=False)
    if args.steps:
        rule = rule.with_steps(args.steps)
    tuned = finetune(model, task.train, rule, seed=0).model
    result = evaluate(tuned, task.test)
    few = torch.utils.data.Subset(task.train, few_shot(task.train, SHOTS, seed=0))
    probe = linear_probe(*extract_features(model, few), l2=1e-6, num_classes=10)  # hardly any penalty: too sure
    features, few_labels = extract_features(model, task.test)
    few_logits = probe(features)
    images, labels = task.test.images, task.test.labels
    reader = DigitReader(fold_weight_standardization(tuned)).eval()
    chosen = [i for digit in range(10) for i in (labels == digit).nonzero().flatten()[:VECTORS].tolist()]
    levels = levels_of(images)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "digits.onnx"
    export(reader, levels[chosen].float(), path)
    with torch.no_grad():
        logits = reader(levels.float())
    vectors = {
        "levels": levels[chosen].flatten(1).tolist(),
        "labels": labels[chosen].tolist(),
        "logits": rounded(logits[chosen], 6),
    }
    (args.out / "vectors.json").write_text(json.dumps(vectors) + "\n", encoding="utf-8")

    spread = {"shots": SHOTS, "labels": few_labels.tolist(), "logits": rounded(few_logits, 4)}
    text = f"window.bitReliability = {json.dumps(spread)};\n"  # a script, not JSON, so that it loads from a file too
    (args.out / "reliability.js").write_text(text, encoding="utf-8")

    card = {
        "command": f"python tools/demo.py --model {args.model}" + (f" --steps {args.steps}" if args.steps else ""),
        "checkpoint": args.model,
        "checkpoint_sha256": sha256(shipped_file(f"checkpoints/{args.model}.safetensors")),
        "rule": f"{rule.steps} steps of {rule.batch_size}, rate {rule.base_lr:g}, "
        f"resize {rule.resize}, crop {rule.crop}, no flip",
        "trained_on": f"the {len(task.train):,} training images of the digits task",
        "test_images": len(labels),
        "test_top1": round(result["top1"], 4),
        "test_top1_of_the_exported_net": round(topk_accuracy(logits, labels), 4),
        "few_shot_test_top1": round(topk_accuracy(few_logits, few_labels), 4),
        "onnx_sha256": sha256(path),
        "onnx_bytes": path.stat().st_size,
        "onnx_opset": OPSET,
        "licence": "network: CC BY 4.0; test images in vectors.json: UCI Machine Learning Repository, CC BY 4.0",
    }
    (args.out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(card, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
