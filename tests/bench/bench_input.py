"""Does fine-tuning wait for its images? Steps with decoded images in memory, beside steps that decode every time.

    python tests/bench/bench_input.py [--steps 20] [--side 800] [--images 64]

Writes JPEG photographs of side x side pixels to a temporary folder, and fine-tunes a mini on them by its rule three
times: with the images kept in memory (the default, where they fit), decoded again for every batch by several threads
while the step before it computes, and the same by one thread. Reports images a second, after the first step, and what
share of the first one's speed the others have: 1 is a loop that never waits.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image

import bitlib.finetune as module
from bitlib.cli import image_folder
from bitlib.hyperrule import hyperrule
from bitlib.resnet import create_model


def speed(model, folder: Path, rule, cache: bool, threads: int | None) -> float:
    """Images a second from the end of the first step to that of the last."""
    files, times = image_folder(folder), []
    files._room = 0  # keeps no decoded file: what is measured is the cache of fine-tuning
    before = module.CACHE_BYTES, module.ThreadPoolExecutor, module.train
    module.CACHE_BYTES = before[0] if cache else 0
    if threads:
        module.ThreadPoolExecutor = lambda max_workers: ThreadPoolExecutor(threads)

    def timed(*args, **kwargs):
        return before[2](*args, **kwargs, on_step=lambda step, net: times.append(time.perf_counter()))

    module.train = timed
    try:
        module.finetune(model, files, rule, progress=False)
    finally:
        module.CACHE_BYTES, module.ThreadPoolExecutor, module.train = before
    return rule.batch_size * (len(times) - 1) / (times[-1] - times[0])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", type=int, default=800)
    parser.add_argument("--images", type=int, default=64)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = create_model("R26x0.25", num_classes=10)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.images):
            path = Path(folder) / f"class {i % 2}" / f"{i}.jpg"
            path.parent.mkdir(exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (args.side // 8, args.side // 8, 3), dtype=np.uint8))
            small.resize((args.side, args.side), Image.Resampling.BICUBIC).save(path, quality=90)
        rule = dataclasses.replace(hyperrule(args.images, args.side, model=model)).with_steps(args.steps)
        kept = speed(model, Path(folder), rule, cache=True, threads=None)
        several = speed(model, Path(folder), rule, cache=False, threads=None)
        one = speed(model, Path(folder), rule, cache=False, threads=1)
    print(f"kept in memory            {kept:7.1f} images/s")
    print(f"decoded, several threads  {several:7.1f} images/s, {several / kept:.2f} of that")
    print(f"decoded, one thread       {one:7.1f} images/s, {one / kept:.2f} of that")
    return 0


if __name__ == "__main__":
    sys.exit(main())
