"""Put a finished pre-training run where `load_pretrained` finds it by name: its model, its card and its log.

    python tools/ship.py RUN BiT-mini-M-R26x0.5 --half

RUN is the folder that `python -m bitlib.pretrain --out RUN` has filled. The files become data/checkpoints/NAME with
the endings .safetensors, .json and .log.jsonl. With --half the weights are stored in float16, in half the bytes (a
shipped file has at most 10 MiB); the card then says so, and its figures are measured again, with the rounded weights.
A checkpoint that is there already is replaced.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shutil
import sys
from pathlib import Path

from cards import ROOT, measure

from bitlib.checkpoints import _OWN_METADATA, load_checkpoint, read_metadata, save_checkpoint
from bitlib.pretrain import PretrainConfig

LIMIT = 10 * 2**20


def ship(run: Path, name: str, folder: Path, half: bool) -> Path:
    """Copy a run's model, card and log into a folder; returns the path of the model."""
    card = json.loads((run / "card.json").read_text(encoding="utf-8"))
    path = folder / f"{name}.safetensors"
    if half:
        about = read_metadata(run / "model.safetensors")
        about = {key: text for key, text in about.items() if key not in _OWN_METADATA}
        rounded = load_checkpoint(run / "model.safetensors").half()
        val = measure(copy.deepcopy(rounded).float(), PretrainConfig(**card["config"]))
        save_checkpoint(rounded, path, about | {"val": json.dumps(val), "stored": "float16"})
        card |= {"val": val, "stored": "float16", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    else:
        shutil.copyfile(run / "model.safetensors", path)
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(run / "log.jsonl", path.with_suffix(".log.jsonl"))
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("name", help="the name to load it by; it starts with BiT-mini-")
    parser.add_argument("--half", action="store_true", help="store float16")
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "checkpoints")
    args = parser.parse_args(argv)
    if not args.name.startswith("BiT-mini-"):
        parser.error(f"the name of a shipped model starts with BiT-mini-, not {args.name}")
    missing = [name for name in ("model.safetensors", "card.json", "log.jsonl") if not (args.run / name).exists()]
    if missing:
        print(f"{args.run} is not a finished run: {', '.join(missing)} is not there", file=sys.stderr)
        return 1
    size = (args.run / "model.safetensors").stat().st_size // (2 if args.half else 1)
    if size > LIMIT:
        print(f"{args.name} would have {size / 2**20:.1f} MiB, more than 10; nothing was written", file=sys.stderr)
        return 1
    path = ship(args.run, args.name, args.folder, args.half)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
