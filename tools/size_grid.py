"""Size of the upstream x size of the network, in the manner of the paper's figure: nine networks from one command.

    python tools/size_grid.py --runs FOLDER

Pre-trains R14x0.25, R26x0.25 and R26x0.5 on GlyphNet-S, -M and -L: nine runs of the same number of steps at the same
rate, each in FOLDER/DATA-NETWORK by `python -m bitlib.pretrain`. Then measures each of them, and each network untrained
(five draws of its weights), by ridge regression on frozen features as `tools/scaling.py` does: handwritten digits and
characters that no size of GlyphNet shows, ten draws of 1, 5, 10 and 25 examples a class.

A run that is there already is not run again, and one that was stopped goes on; --jobs and --threads say how many runs
work at once and on how many cores each. On two cores the nine take about two and a half hours. The result,
data/results/size_grid.json, holds the accuracies upstream and downstream, each run's command and the hash of its
weights. The runs are short, of one seed, and every network has the same steps: they compare, and do not show what a
network reaches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from scaling import ROOT, SEEDS, few_shot_rows, few_shot_tasks
from tqdm import tqdm

from bitlib.checkpoints import load_pretrained
from bitlib.evaluate import write_json
from bitlib.resnet import create_model

ARCHITECTURES = ("R14x0.25", "R26x0.25", "R26x0.5")
UPSTREAMS = ("S", "M", "L")
UNTRAINED_SEEDS = tuple(range(5))


def command(architecture: str, upstream: str, steps: int) -> list[str]:
    """The run's command, after `python`; the folder comes behind it."""
    words = ["-m", "bitlib.pretrain", "--model", architecture, "--data", upstream, "--steps", str(steps)]
    return [*words, "--decay-at", "0.7", "0.85", "0.95"]


def run_folder(runs: Path, architecture: str, upstream: str) -> Path:
    return runs / f"{upstream}-{architecture}"


def pretrain(words: list[str], folder: Path, threads: int) -> None:
    """Run one in a process of its own, unless it has ended already; its messages go to the folder's name with .txt."""
    if (folder / "card.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    messages = folder.with_name(folder.name + ".txt")
    with messages.open("a") as file:
        done = subprocess.run([sys.executable, *words, "--out", str(folder)], stdout=file, stderr=file, env=environment)
    if done.returncode:
        raise RuntimeError(f"the run in {folder} ended with {done.returncode}; its last words are in {messages}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="the folder of the nine runs")
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--upstreams", nargs="+", choices=UPSTREAMS, default=list(UPSTREAMS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="cores for each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the draws of examples")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "size_grid.json")
    args = parser.parse_args(argv)
    wanted = [(architecture, upstream) for architecture in args.architectures for upstream in args.upstreams]

    with ThreadPoolExecutor(args.jobs) as pool:
        started = [
            pool.submit(pretrain, command(a, u, args.steps), run_folder(args.runs, a, u), args.threads)
            for a, u in wanted
        ]
        try:
            for future in tqdm(started, unit="run", desc="pre-training"):
                future.result()
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(str(error))

    tasks, networks, rows = few_shot_tasks(), [], []
    for architecture in tqdm(args.architectures, unit="network", desc="measuring"):
        for seed in UNTRAINED_SEEDS:
            torch.manual_seed(seed)
            untrained = create_model(architecture, num_classes=0)
            named = {"architecture": architecture, "upstream": "none", "init": seed}
            rows += [named | row for row in few_shot_rows(untrained, tasks, args.seeds)]
        for upstream in args.upstreams:
            folder = run_folder(args.runs, architecture, upstream)
            card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
            weights = folder / "model.safetensors"
            sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
            if card["command"] != " ".join(["python", *command(architecture, upstream, args.steps)]):
                sys.exit(f"{folder} is another run than asked for: {card['command']}; give another --runs")
            named = {"architecture": architecture, "upstream": upstream}
            networks.append(named | {key: card[key] for key in ("command", "parameters", "images_seen", "val")})
            networks[-1]["sha256"] = sha256
            rows += [named | row for row in few_shot_rows(load_pretrained(weights), tasks, args.seeds)]
    about = {"command": "python tools/size_grid.py --runs FOLDER", "method": "ridge on frozen features"}
    about |= {"steps": args.steps, "seeds": args.seeds, "torch": torch.__version__}
    write_json(args.out, {"about": about, "networks": networks, "rows": rows})

    for task in tasks:
        print(f"\n{task}, 10 examples a class, top-1 in %")
        print(f"{'':10}" + "".join(f"{name:>14}" for name in ("none", *args.upstreams)))
        for architecture in args.architectures:
            cells = []
            for upstream in ("none", *args.upstreams):
                place = (architecture, upstream, task, 10)
                found = [r for r in rows if (r["architecture"], r["upstream"], r["task"], r["shots"]) == place]
                top1 = [100 * value for row in found for value in row["top1"]]
                cells.append(f"{statistics.mean(top1):8.1f} ± {statistics.pstdev(top1):3.1f}")
            print(f"{architecture:10}" + "".join(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
