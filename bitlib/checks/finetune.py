"""Checkers for the exercises of the chapter 08_finetuning: hand each your own object.

Exported from chapters/08_finetuning.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "check_few_shot",
    "check_head_gradient",
    "check_find_mirrored",
    "check_times_seen",
]

import torch
import torch.nn.functional as F


def check_few_shot(few_shot):
    """Check a function (labels, n_shots, seed) that returns a balanced, seeded list of indices."""
    labels = [0, 2, 1, 2, 2, 0, 1, 1, 0, 2, 0, 1, 1, 2, 0, 0, 1, 2, 2, 1]
    chosen = few_shot(labels, 3, 0)
    assert chosen is not None, "few_shot returned nothing"
    chosen = [int(i) for i in chosen]
    assert len(chosen) == len(set(chosen)), f"some index is drawn twice: {chosen}"
    counts = [sum(labels[i] == c for i in chosen) for c in range(3)]
    assert counts == [3, 3, 3], f"of the classes 0, 1, 2 the sample holds {counts}, not 3 each"
    assert chosen == [int(i) for i in few_shot(labels, 3, 0)], "the same seed gave two different samples"
    draws = {tuple(sorted(int(i) for i in few_shot(labels, 3, seed))) for seed in range(20)}
    assert len(draws) > 5, "other seeds give the same sample; does the seed reach the generator?"
    try:
        few_shot(labels, 7, 0)
    except ValueError:
        pass
    else:
        raise AssertionError("class 0 has 6 examples; asking for 7 should raise ValueError")
    print("check_few_shot: correct")


def check_head_gradient(head_gradient):
    """Check a function (features, labels, num_classes) that gives the first gradients of a zero head."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 0, 1, 1])
    head = torch.nn.Linear(4, 3)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    F.cross_entropy(head(features), labels).backward()
    answer = head_gradient(features, labels, 3)
    assert answer is not None, "head_gradient returned nothing"
    for name, mine, theirs in zip("Wb", answer, (head.weight.grad, head.bias.grad), strict=True):
        assert mine.shape == theirs.shape, (
            f"the gradient of {name} has shape {tuple(theirs.shape)}, not {tuple(mine.shape)}"
        )
        assert torch.allclose(mine, theirs, atol=1e-6), (
            f"the gradient of {name} is off by {(mine - theirs).abs().max():.3f}; "
            "p is 1/K, and the loss is a mean over N"
        )
    print("check_head_gradient: correct")


def check_find_mirrored(find_mirrored):
    """Check a function of two uint8 (N, 3, H, W) that lists the pairs (i, j) of mirrored copies."""
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=generator)
    test = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=generator)
    test[2], test[0] = train[4].flip(-1), train[1].flip(-2)
    pairs = find_mirrored(train, test)
    assert pairs is not None, "find_mirrored returned nothing"
    pairs = [(int(i), int(j)) for i, j in pairs]
    assert (1, 0) not in pairs, (
        "training image 1 stands on its head in the test set; only left and right are swapped here"
    )
    assert pairs == [(4, 2)], f"test image 2 is training image 4 mirrored, so the answer is [(4, 2)], not {pairs}"
    print("check_find_mirrored: correct")


def check_times_seen(times_seen):
    """Check a function (steps, batch_size, n) -> (fewest, most) times that an image is shown in a run."""
    for steps, batch_size, n in ((500, 64, 100), (500, 64, 10), (500, 512, 19_999), (3, 8, 100)):
        answer = times_seen(steps, batch_size, n)
        assert answer is not None, "times_seen returned nothing"
        total = steps * batch_size
        expected = (total // n, -(-total // n))
        assert tuple(answer) == expected, (
            f"{steps} steps of {batch_size} over {n} images show each {expected[0]} to {expected[1]} times, "
            f"not {answer}"
        )
    print("check_times_seen: correct")
