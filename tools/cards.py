"""Are the cards of the shipped models true? Measures each checkpoint again, and compares with what its card says.

    python tools/cards.py                     all of data/checkpoints
    python tools/cards.py BiT-mini-M          one, by name; or a path to a .safetensors that has its .json beside it

For each: the hash of the file, the number of parameters, and the accuracy in every kind of label on the validation
images of the upstream that the card names. Another processor rounds otherwise, so one image in a thousand may differ.
Exits with 1 if a card says something else than what is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch

from bitlib.checkpoints import load_pretrained
from bitlib.data import GlyphNet
from bitlib.pretrain import PretrainConfig, group_accuracy
from bitlib.resnet import ResNetV2

ROOT = Path(__file__).resolve().parent.parent
ROUNDING = 0.001


def measure(model: ResNetV2, config: PretrainConfig) -> dict[str, float]:
    """A model's top-1 in each kind of label on upstream's validation images, computed in its own precision."""
    held_out = GlyphNet(config.data, split="val", seed=config.seed)
    images, targets = held_out.batch(torch.arange(config.val_images))
    return group_accuracy(model.eval(), images, targets, held_out.groups, config.image_size)


def differences(checkpoint: Path) -> list[str]:
    """Measure a checkpoint, print its figures beside its card's, and say where the two differ."""
    card = json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8"))
    wrong = []
    if hashlib.sha256(checkpoint.read_bytes()).hexdigest() != card["sha256"]:
        wrong.append("the file has another SHA-256")
    config = PretrainConfig(**card["config"])
    model = load_pretrained(checkpoint).float()  # a file may hold float16; by its name it is loaded like this
    parameters = sum(p.numel() for p in model.parameters())
    found = measure(model, config)
    if parameters != card["parameters"]:
        wrong.append(f"the card says {card['parameters']:,} parameters, the model has {parameters:,}")
    print(f"{checkpoint.stem}: {config.val_images} validation images of GlyphNet-{config.data}")
    for group in sorted(found.keys() | card["val"].keys()):
        said, measured = card["val"].get(group), found.get(group)
        same = None not in (said, measured) and abs(said - measured) <= ROUNDING
        words = (f"{'-' if value is None else f'{100 * value:.2f} %'}" for value in (said, measured))
        print("    {:12s} card {:>8s}   measured {:>8s}".format(group, *words) + ("" if same else "   DIFFERS"))
        if not same:
            wrong.append(f"{group} is {measured}, and the card says {said}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", help="names or paths; all that the book ships by default")
    args = parser.parse_args(argv)
    folder = ROOT / "data" / "checkpoints"
    paths = [Path(c) if c.endswith(".safetensors") else folder / f"{c}.safetensors" for c in args.checkpoints]
    failed = False
    for path in paths or sorted(folder.glob("*.safetensors")):
        if not path.exists() or not path.with_suffix(".json").exists():
            print(f"{path} or its card, {path.stem}.json, is not there", file=sys.stderr)
            failed = True
            continue
        for line in differences(path):
            print(f"{path.stem}: {line}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
