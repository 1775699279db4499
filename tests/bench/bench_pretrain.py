"""What does the pre-training loop cost beside the bare computation? And does it ever wait for its images?

    python tests/bench/bench_pretrain.py [--rounds 9] [--steps 12] [--model R26x0.25]

Takes in turn, round after round in one process, so that whatever slows the machine slows both:

  loop   `bitlib.pretrain.train` on GlyphNet at batch 128: it renders every image, clips, logs, handles signals
  bare   forward, loss, backward and torch.optim.SGD on images that are in memory already

and then GlyphNet's rendering of a batch alone. Prints images a second as medians over the rounds, and the two shares
that matter: the loop's speed beside the bare one's (1 is a loop that costs nothing), and how much of a step's time the
rendering of its batch takes, which the loop does between two steps, or meanwhile where a core is free.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from bitlib.data import GlyphNet
from bitlib.pretrain import PretrainConfig, train, upstream_batches, upstream_loss
from bitlib.resnet import create_model

BATCH, SIDE = 128, 64


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=12, help="steps of each contestant in a round")
    parser.add_argument("--model", default="R26x0.25")
    args = parser.parse_args(argv)

    data = GlyphNet("M")
    groups = list(data.groups)
    torch.manual_seed(0)
    models = [create_model(args.model, sum(group.n_classes for group in groups)) for _ in range(2)]
    models[1].lay_out_filters()  # what train() does to its own: the loops are compared, not the layouts

    def loss_fn(logits, targets):
        return upstream_loss(logits, targets, groups, "softmax", 0.0)

    block = data.together // BATCH  # the images of so many steps are rendered at once
    args.steps = -(-args.steps // block) * block
    render = upstream_batches(data, PretrainConfig(steps=block + args.steps, batch_size=BATCH, image_size=SIDE))
    ready = [render(step) for step in range(args.steps)]
    ready = [(x.contiguous(memory_format=torch.channels_last), targets) for x, targets in ready]
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    models[1].train()

    def loop() -> float:
        """From the end of the first block of steps to the end of the last: as many are rendered as are computed."""
        times: list[float] = []
        train(
            models[0],
            render,
            loss_fn,
            lambda step: 0.01,
            block + args.steps,
            weight_decay=1e-4,
            clip_norm=10.0,
            progress=False,
            on_step=lambda step, model: times.append(time.perf_counter()),
        )
        return times[-1] - times[block - 1]

    def bare() -> float:
        start = time.perf_counter()
        for x, targets in ready:
            optimizer.zero_grad()
            loss_fn(models[1](x), targets).backward()
            optimizer.step()
        return time.perf_counter() - start

    def rendering() -> float:
        start = time.perf_counter()
        for step in range(args.steps):
            render(step)
        return time.perf_counter() - start

    contestants = {"loop": loop, "bare": bare, "rendering alone": rendering}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(args.rounds + 1):
        for name, run in contestants.items():
            took = run()
            if number:  # the first round warms up
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{args.model}, batch {BATCH} at {SIDE}x{SIDE}, {torch.get_num_threads()} threads, {args.rounds} rounds")
    for name, median in medians.items():
        print(f"{name:16s}{BATCH * args.steps / median:9.1f} images/s")
    print(f"the loop's speed is {medians['bare'] / medians['loop']:.2f} of the bare one's")
    print(f"rendering a batch takes {medians['rendering alone'] / medians['loop']:.2f} of a step's time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
