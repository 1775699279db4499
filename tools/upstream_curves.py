"""How the validation accuracy of pre-training runs went, collected from their folders into one small file.

    python tools/upstream_curves.py RUN [RUN ...]

Each RUN is a folder that `python -m bitlib.pretrain ... --out RUN` has finished. The file, by default
data/results/upstream_s.json (three ways to pre-train on GlyphNet-S), holds for each run its command, with which the
folder can be made again, and the accuracy in each kind of label at every evaluation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bitlib.evaluate import write_json

ROOT = Path(__file__).resolve().parent.parent


def curve(folder: Path) -> dict:
    """The run's command, the steps of its evaluations (the later of two that are equal), and each kind's accuracies."""
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    rows = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    evals = {row["step"]: row for row in rows if any(key.startswith("eval/") for key in row)}
    steps = sorted(evals)
    val = {name: [evals[step][f"eval/{name}"] for step in steps] for name in card["val"]}
    return {"command": card["command"], "steps": steps, "val": val}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "upstream_s.json")
    args = parser.parse_args(argv)
    missing = [str(run) for run in args.runs if not (run / "card.json").exists()]
    if missing:
        sys.exit(f"no finished run in {', '.join(missing)}")
    curves = [curve(run) for run in args.runs]
    write_json(args.out, {"command": "python tools/upstream_curves.py RUN ...", "runs": curves})
    for run in curves:
        print(
            f"{run['command']}: {run['steps'][-1]} steps, "
            + ", ".join(f"{k} {v[-1]:.1%}" for k, v in run["val"].items())
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
