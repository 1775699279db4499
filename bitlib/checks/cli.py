"""Checkers for the exercises of the chapter 10_your_own_images: hand each your own object.

Exported from chapters/10_your_own_images.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "check_upright",
    "check_on_white",
    "check_threshold",
]

import numpy as np
from PIL import Image, ImageOps


def check_upright(upright):
    """Check a function (pixels (H, W, 3), orientation 1 to 8) that turns pixels as EXIF says."""
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for orientation in range(1, 9):
        image = Image.fromarray(pixels)
        image.getexif()[0x0112] = orientation
        expected = np.asarray(ImageOps.exif_transpose(image))
        answer = upright(pixels, orientation)
        assert answer is not None, "upright returned nothing"
        assert np.shape(answer) == expected.shape, (
            f"orientation {orientation}: 2 x 3 pixels become {expected.shape[:2]}, not {np.shape(answer)[:2]}"
        )
        assert np.array_equal(answer, expected), f"orientation {orientation}: the right size, but not the right picture"
    print("check_upright: correct")


def check_on_white(on_white):
    """Check a function (rgb (H, W, 3), alpha (H, W)), both in [0, 1], that lays a picture on white paper."""
    rgb = np.array([[[0.2, 0.4, 0.6], [1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]]])
    alpha = np.array([[1.0, 0.5], [0.0, 0.25]])
    answer = on_white(rgb, alpha)
    assert answer is not None, "on_white returned nothing"
    assert np.shape(answer) == rgb.shape, f"the result has shape {np.shape(answer)}, not {rgb.shape}"
    assert np.allclose(answer[0][0], rgb[0, 0]), "an opaque pixel must stay as it is"
    assert np.allclose(answer[1][0], 1), "an invisible pixel must be white, whatever its colour"
    assert np.allclose(answer[0][1], [1, 0.5, 0.5]), "red that is half transparent is pink: (1, 0.5, 0.5)"
    assert np.allclose(answer[1][1], 0.875), "a quarter of 0.5 and three quarters of white make 0.875"
    print("check_on_white: correct")


def check_threshold(threshold):
    """Check a function (confidence (N,), correct (N,), target) -> the lowest confidence worth an answer."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        confidence = np.round(rng.random(30), 2)  # with ties
        correct = rng.random(30) < confidence
        answer = threshold(confidence, correct, 0.9)
        assert answer is not None, "threshold returned nothing"
        good = [t for t in confidence if correct[confidence >= t].mean() >= 0.9]
        expected = min(good) if good else np.inf
        assert answer == expected, (
            f"the lowest confidence t such that 90 % of the answers at t or more are right is {expected}, not {answer}"
        )
    print("check_threshold: correct")
