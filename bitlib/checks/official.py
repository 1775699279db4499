"""Checkers for the exercises of the chapter 11_official_models: hand each your own object.

Exported from chapters/11_official_models.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "check_batch_loss",
    "check_hours",
    "check_micro_batch",
]

from bitlib.hyperrule import hyperrule


def check_batch_loss(batch_loss):
    """Check a function (mean losses of the parts, their sizes) that gives the mean loss of the batch."""
    for losses, sizes in (([1.0, 2.0, 6.0], [4, 4, 2]), ([3.0], [7]), ([0.5, 4.5], [3, 1])):
        answer = batch_loss(losses, sizes)
        assert answer is not None, "batch_loss returned nothing"
        expected = sum(loss * n for loss, n in zip(losses, sizes, strict=True)) / sum(sizes)
        assert abs(answer - expected) < 1e-9, (
            f"parts of {sizes} images with mean losses {losses} make {expected:g} a batch, not {answer:g}; "
            "a part weighs as much as it has images"
        )
    print("check_batch_loss: correct")


def check_hours(hours):
    """Check a function (number of images, image size, images a second) that gives the hours of a run by the rule."""
    for n, size, speed in ((50, 32, 500.0), (50_000, 32, 500.0), (2_040, 500, 60.0), (1_281_167, 400, 1_000.0)):
        rule = hyperrule(n, size)
        answer, expected = hours(n, size, speed), rule.steps * rule.batch_size / speed / 3_600
        assert answer is not None, "hours returned nothing"
        assert abs(answer - expected) < 1e-6 * expected, (
            f"{n} images of {size} pixels: {rule.steps} steps of {rule.batch_size} at {speed:g} images a second "
            f"take {expected:.2f} hours, not {answer:.2f}"
        )
    print("check_hours: correct")


def check_micro_batch(micro_batch):
    """Check a function (budget, fixed, per image, batch size) -> the largest part that fits and divides the batch."""
    for budget, fixed, per_image, batch in ((16, 1, 0.1, 512), (4, 1, 0.1, 512), (4, 1, 0.1, 100), (2, 1, 0.9, 8)):
        answer = micro_batch(budget, fixed, per_image, batch)
        assert answer is not None, "micro_batch returned nothing"
        expected = max(m for m in range(1, batch + 1) if batch % m == 0 and fixed + m * per_image <= budget)
        assert answer == expected, (
            f"a budget of {budget}, {fixed} fixed and {per_image} an image: the largest part of {batch} that fits and "
            f"divides it is {expected}, not {answer}"
        )
    print("check_micro_batch: correct")
