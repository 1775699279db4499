"""Checkers for the exercises of the chapter 01_data: hand each your own object.

Exported from chapters/01_data.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "check_channel_statistics",
    "check_shard",
    "check_acceptance",
]

import math

import torch


def check_channel_statistics(channel_statistics) -> None:
    """channel_statistics(images) -> (mean, std), each (3,), of the pixels of uint8 (N, 3, H, W) in units of 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (7, 3, 5, 9), generator=generator, dtype=torch.uint8)
    images[:, 1] //= 3
    result = channel_statistics(images)
    assert isinstance(result, tuple) and len(result) == 2, f"return a pair (mean, std); got {type(result).__name__}"
    mean, std = (torch.as_tensor(r).float() for r in result)
    pixels = images.float() / 255
    for name, given, right in (
        ("mean", mean, pixels.mean((0, 2, 3))),
        ("std", std, pixels.std((0, 2, 3), correction=0)),
    ):
        assert given.shape == (3,), f"{name} must have one value per channel, shape (3,); got {tuple(given.shape)}"
        assert given.max() <= 1, f"{name} {given.tolist()} is in bytes; divide by 255"
        error = (given - right).abs().max().item()
        assert error < 1e-5, (
            f"{name} is {given.tolist()}, off by {error:.2g}; std is over all pixels, divided by their number"
        )
    x = (pixels - mean[:, None, None]) / std[:, None, None]
    assert x.mean().abs() < 1e-5 and (x.std(correction=0) - 1).abs() < 1e-5
    print("check_channel_statistics: correct")


def check_shard(shard) -> None:
    """shard(step, batch_size, rank, world_size, length) -> the image numbers that one process renders in a step."""
    for step, batch_size, world_size, length in ((0, 8, 1, 100), (3, 8, 2, 100), (12, 12, 4, 50), (999, 6, 3, 7)):
        whole = [(step * batch_size + k) % length for k in range(batch_size)]
        parts = [list(map(int, shard(step, batch_size, rank, world_size, length))) for rank in range(world_size)]
        sizes = [len(part) for part in parts]
        share = batch_size // world_size
        assert sizes == [share] * world_size, f"{world_size} processes must render {share} images each; got {sizes}"
        together = sorted(i for part in parts for i in part)
        assert together == sorted(whole), (
            f"step {step}, batch {batch_size}, length {length}: together the processes must render {sorted(whole)}; "
            f"yours render {together}"
        )
    print("check_shard: correct")


def check_acceptance(acceptance) -> None:
    """acceptance(low, ratio) -> the share of draws that fit a large square picture, in closed form."""
    for low, ratio in ((0.08, 4 / 3), (0.5, 4 / 3), (0.0, 2.0)):
        fitted = acceptance(low, ratio)
        n = 200_001
        log_r = torch.linspace(-math.log(ratio), math.log(ratio), n, dtype=torch.float64)
        right = (((-log_r.abs()).exp() - low).clamp(min=0) / (1 - low)).mean().item()
        assert abs(fitted - right) < 1e-4, (
            f"area from {low} to 1, ratio to {ratio:.3f}: {right:.4f} of the draws fit; yours says {float(fitted):.4f}"
        )
    print("check_acceptance: correct")
