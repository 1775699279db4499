"""Does more data upstream help more when the network is larger? The shipped minis side by side, from one command.

    python tools/scaling.py

For each checkpoint in data/checkpoints (BiT-mini-S, -M and -L; another architecture has its name behind, as in
BiT-mini-M-R14x0.25) and for the same networks untrained, it fits ridge regression on the frozen features with 1, 5,
10 and 25 examples a class, over ten seeds, and measures top-1 on

  digits      the 797 test images of scikit-learn's handwritten digits
  characters  50 characters that no size of GlyphNet shows, learned in one typeface that no size shows, and
              recognised in another

Ridge regression chooses its strength within its training examples; nothing is chosen on test images. The result is
data/results/scaling.json. Everything is computed anew each time: features take seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from bitlib.checkpoints import load_pretrained
from bitlib.data import N_CHARACTERS, GlyphNet, ImageTensorDataset, load_task
from bitlib.evaluate import extract_features, few_shot_accuracy, write_json
from bitlib.resnet import create_model

ROOT = Path(__file__).resolve().parent.parent
SHOTS = (1, 5, 10, 25)
SEEDS = tuple(range(10))


def held_out_characters() -> tuple[ImageTensorDataset, ImageTensorDataset]:
    """To learn from, in the first held-out typeface, and to be tested on, in the second."""
    glyphnet = GlyphNet("M", "held-out")
    images, labels = glyphnet.batch(range(len(glyphnet)))
    character, typeface = labels[:, 0], labels[:, 1]
    parts = []
    for face in (0, 1):
        chosen = (character < N_CHARACTERS) & (typeface == face)
        parts.append(ImageTensorDataset(images[chosen], character[chosen], n_classes=N_CHARACTERS))
    return parts[0], parts[1]


def networks(folder: Path) -> list[tuple[str, str, nn.Module, str | None]]:
    """(upstream, architecture, model, hash of the file) for each checkpoint, and for each architecture untrained."""
    found: list[tuple[str, str, nn.Module, str | None]] = []
    for path in sorted(folder.glob("BiT-mini-*.safetensors")):
        model = load_pretrained(path).float()  # one of the files holds float16
        upstream = path.stem.removeprefix("BiT-mini-").partition("-")[0]
        found.append((upstream, model.name, model, hashlib.sha256(path.read_bytes()).hexdigest()))
    for architecture in sorted({name for _, name, _, _ in found}):
        torch.manual_seed(0)
        found.insert(0, ("none", architecture, create_model(architecture, num_classes=0), None))
    return found


def few_shot_tasks() -> dict[str, tuple[ImageTensorDataset, ImageTensorDataset]]:
    """Images to learn from and images to be tested on, for each task."""
    digits = load_task("digits")
    return {"digits": (digits.train, digits.test), "characters": held_out_characters()}


def few_shot_rows(model: nn.Module, tasks: dict, seeds: Sequence[int]) -> list[dict]:
    """Ridge regression on a network's frozen features: for each task and number of shots, the top-1 of every seed."""
    rows = []
    for task, (train, test) in tasks.items():
        pool, rest = extract_features(model, train), extract_features(model, test)
        for shots in SHOTS:
            top1 = few_shot_accuracy(pool, rest, shots, seeds).per_seed.tolist()
            rows.append({"task": task, "shots": shots, "top1": top1})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "data" / "checkpoints", help="a folder")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "scaling.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args(argv)
    tasks, rows = few_shot_tasks(), []
    for upstream, architecture, model, sha256 in tqdm(networks(args.checkpoints), unit="network"):
        named = {"upstream": upstream, "architecture": architecture, "sha256": sha256}
        rows += [named | row for row in few_shot_rows(model, tasks, args.seeds)]
    if not rows:
        sys.exit(f"no BiT-mini-*.safetensors in {args.checkpoints}")
    result = {"command": "python tools/scaling.py", "method": "ridge on frozen features", "seeds": args.seeds}
    write_json(args.out, result | {"rows": rows})
    for row in rows:
        mean, spread = statistics.mean(row["top1"]), statistics.stdev(row["top1"]) if len(row["top1"]) > 1 else 0.0
        name = f"{row['upstream']:5} {row['architecture']:9} {row['task']:11} {row['shots']:3} shots"
        print(f"{name}  {100 * mean:5.1f} ± {100 * spread:4.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
