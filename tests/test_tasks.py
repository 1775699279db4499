"""VTAB-mini: splits by region that share no pixel, labels that are true, fixed bytes, fair classes, honest cards."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.color import rgb2hed

from bitlib import data
from bitlib.data import (
    BACKDROPS,
    DOWNSTREAM_PHOTOGRAPHS,
    HELD_OUT_TYPEFACES,
    MAX_OBJECTS,
    TASKS,
    TYPEFACES,
    UPSTREAM_PHOTOGRAPHS,
    VTAB_MINI,
    glyphs,
    load_task,
    package_file,
    photograph_blocks,
    photograph_windows,
)

PHOTOGRAPHIC = ("photographs", "textures", "histology", "retina", "sky", "depth")
DRAWN = ("count", "orientation", "x-position", "distance")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_the_protocol(name):
    task = load_task(name)
    n_classes = len(task.classes)
    assert task.name == name and name in VTAB_MINI[task.group]
    assert len(task.train) == (125 if name == "faces" else 1_000) and len(task.test) >= 75
    assert len(set(task.classes)) == n_classes
    for part in (task.train, task.test):
        assert part.images.dtype == torch.uint8 and part.images.shape[1:] == (3, 32, 32)
        assert part.n_classes == n_classes and part.labels.bincount(minlength=n_classes).min() > 0
        assert part.images.flatten(1).float().std(dim=1).median() > 2  # there is something to see
    train, val = task.train_val()
    assert len(train) == len(task.train) * 4 // 5 and set(train.indices).isdisjoint(val.indices)
    assert sorted(train.indices + val.indices) == list(range(len(task.train)))
    assert task.train.labels[val.indices].bincount(minlength=n_classes).min() > 0
    assert 1 / n_classes <= task.chance < 0.55
    assert task.chance == (task.test.labels == task.test.labels.mode().values).double().mean()


def test_the_groups_hold_every_task_once():
    listed = [name for names in VTAB_MINI.values() for name in names]
    assert sorted(listed) == sorted(TASKS) and len(listed) >= 10
    assert list(VTAB_MINI) == ["natural", "specialized", "structured"]


@pytest.mark.parametrize("name", TASKS)
def test_no_image_is_in_both_halves(name):
    task = load_task(name)
    train, test = ({image.numpy().tobytes() for image in part.images} for part in (task.train, task.test))
    assert not train & test


@pytest.mark.parametrize("name", TASKS)
def test_the_card_says_what_a_reader_must_know(name):
    task, lines = load_task(name), load_task(name).card().splitlines()
    assert lines[0] == f"{name} ({task.group}): {task.description}"
    assert f"classes: {len(task.classes)} " in lines[1] and f"chance {100 * task.chance:.1f} %" in lines[1]
    assert f"{len(task.train):,} to train on, {len(task.test):,} to test on" in lines[2]
    assert ("flip" in lines[2]) == task.flip and ("crop" in lines[2]) == task.crop
    assert lines[3].strip() == f"source: {task.source}" and lines[4].strip() == f"licence: {task.licence}"
    assert len(task.source) > 10 and len(task.licence) > 2


def test_the_exceptions_are_vtabs():
    """Position and orientation lose their meaning in a mirror, position, size and count by a crop."""
    assert {name for name in TASKS if not load_task(name).flip} == {"digits", "characters", "orientation", "x-position"}
    assert {name for name in TASKS if not load_task(name).crop} == {"count", "x-position", "distance", "depth"}


# --- photographs: no pixel of the test blocks reaches the training set ----------------------------------------------


@pytest.mark.parametrize("name", DOWNSTREAM_PHOTOGRAPHS)
def test_blocks_of_train_and_test_cover_a_photograph_without_overlap(name):
    height, width = Image.open(package_file(*DOWNSTREAM_PHOTOGRAPHS[name])).size[::-1]
    seen = np.zeros((height, width), int)
    for split in ("train", "test"):
        for top, left, h, w in photograph_blocks(height, width, split).tolist():
            seen[top : top + h, left : left + w] += 1
    assert (seen == 1).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(DOWNSTREAM_PHOTOGRAPHS)),
    st.sampled_from(["train", "test"]),
    st.integers(8, 40),
    st.integers(0, 60),
    st.integers(0, 99),
)
def test_every_window_lies_in_one_block(name, split, smallest, more, stream):
    pixels = data._pixels(name)
    blocks = photograph_blocks(*pixels.shape[1:], split)
    for top, left, side in photograph_windows(name, split, 30, smallest, smallest + more, f"test {stream}").tolist():
        assert side <= smallest + more
        inside = [
            t <= top and a <= left and top + side <= t + h and left + side <= a + w for t, a, h, w in blocks.tolist()
        ]
        assert sum(inside) == 1


def with_other_pixels(split):
    """Replaces data._pixels: all pixels of the blocks of one split are changed."""
    original = data._pixels

    @functools.cache
    def pixels(name):
        changed = original(name).clone()
        for top, left, height, width in photograph_blocks(*changed.shape[1:], split).tolist():
            changed[:, top : top + height, left : left + width] ^= 0b1010101
        return changed

    return pixels


@pytest.mark.parametrize("name", PHOTOGRAPHIC + DRAWN)
def test_no_test_pixel_is_seen_in_training_and_the_reverse(name, monkeypatch):
    task = load_task(name)
    monkeypatch.setattr(data, "_pixels", with_other_pixels("test"))
    other = TASKS[name]()
    assert torch.equal(other.train.images, task.train.images) and torch.equal(other.train.labels, task.train.labels)
    assert not torch.equal(other.test.images, task.test.images)
    monkeypatch.undo()
    monkeypatch.setattr(data, "_pixels", with_other_pixels("train"))
    other = TASKS[name]()
    assert torch.equal(other.test.images, task.test.images)
    assert not torch.equal(other.train.images, task.train.images)


def test_no_upstream_photograph_is_used_downstream():
    for name in UPSTREAM_PHOTOGRAPHS:
        with pytest.raises(KeyError):
            data._pixels(name)
    assert set(BACKDROPS) <= set(DOWNSTREAM_PHOTOGRAPHS)
    upstream = {package_file(*path).read_bytes() for path in UPSTREAM_PHOTOGRAPHS.values()}
    assert not upstream & {package_file(*path).read_bytes() for path in DOWNSTREAM_PHOTOGRAPHS.values()}


def test_blocks_refuse_another_split():
    with pytest.raises(ValueError, match="train or test; got 'val'"):
        photograph_blocks(100, 100, "val")


# --- labels ---------------------------------------------------------------------------------------------------------


def test_characters_are_those_that_glyphnet_never_shows():
    task, table = load_task("characters"), glyphs()
    assert len(task.classes) == 50 and set(task.classes).isdisjoint(
        "".join(table.characters[c] for c in table.upstream)
    )
    assert task.train.labels.bincount().tolist() == task.test.labels.bincount().tolist() == [20] * 50
    assert len(HELD_OUT_TYPEFACES) == 2 and set(HELD_OUT_TYPEFACES) < set(TYPEFACES)
    assert [task.classes[i] in table.characters[c] for i, c in enumerate(table.held_out[:50])] == [True] * 50


def test_faces_are_the_first_hundred():
    grey = np.rint(np.load(package_file("skimage", "data/lfw_subset.npy")) * 255).astype(np.uint8)
    task = load_task("faces")
    small = {data.resize(torch.from_numpy(g).expand(3, 25, 25), 32).numpy().tobytes(): i for i, g in enumerate(grey)}
    for part in (task.train, task.test):
        places = [small[image.numpy().tobytes()] for image in part.images]
        assert [place >= 100 for place in places] == part.labels.bool().tolist()


def test_the_stain_is_that_of_scikit_image():
    pixels = data._pixels("ihc").numpy()
    ours, theirs = data._stain(pixels), rgb2hed(pixels.transpose(1, 2, 0))[:, :, 2]
    free = (ours > 0.01) & (pixels.min(axis=0) > 0)
    assert np.corrcoef(ours[free], theirs[free])[0, 1] > 0.999


def test_levels_follow_the_measurement():
    stain = data._stain(data._pixels("ihc").numpy())
    windows = photograph_windows("ihc", "test", 500, 32, 64, stream="histology")
    values = np.array([stain[t : t + s, a : a + s].mean() for t, a, s in windows.tolist()])
    labels = load_task("histology").test.labels.numpy()
    tops = [values[labels == level].max() for level in range(4)]
    bottoms = [values[labels == level].min() for level in range(4)]
    assert all(top <= bottom for top, bottom in zip(tops, bottoms[1:], strict=False))


def scene(shape, radius, angle, x=16.0, y=16.0):
    canvas = np.zeros((1, 3, 32, 32), np.float32)
    one = np.ones(1)
    data._draw_object(
        canvas, np.array([0]), np.array([shape]), x * one, y * one, radius * one, angle * one, np.ones((1, 3))
    )
    return canvas[0, 0]


@pytest.mark.parametrize(
    ("shape", "area"),
    [(0, math.pi), (1, 1.7**2), (2, 2 * 0.7), (3, 1.7 * 1.5 / 2)],
    ids=["disc", "square", "bar", "triangle"],
)
@pytest.mark.parametrize("angle", [0.0, 0.4, 2.0])
def test_a_drawn_object_has_its_area_and_its_centre(shape, area, angle):
    ink = scene(shape, 9.0, angle)
    assert ink.sum() == pytest.approx(area * 81, rel=0.03)
    if shape < 3:
        rows, columns = np.indices(ink.shape) + 0.5
        assert (ink * columns).sum() / ink.sum() == pytest.approx(16, abs=0.05)
        assert (ink * rows).sum() / ink.sum() == pytest.approx(16, abs=0.05)


@pytest.mark.parametrize("sector", range(8))
def test_a_triangle_points_where_its_label_says(sector):
    angle = (sector + 0.5) * math.pi / 4
    ink = scene(3, 12.0, angle)
    far = np.array([[16 + r * math.cos(angle), 16 - r * math.sin(angle)] for r in (9.0, -9.0)])  # tip, behind the base
    tip, tail = (ink[int(y), int(x)] for x, y in far)
    assert tip > 0.5 and tail < 0.5


def drawn_alone(name, colours=1.0):
    """The labels of the task's first test scenes and the ink of each, drawn in white on black."""
    canvas = np.zeros((200, 3, 32, 32), np.float32)
    draw = {"count": data._draw_count, "x-position": data._draw_position, "distance": data._draw_distance}[name]
    white = [np.full((200, 3), colours, np.float32)] * MAX_OBJECTS
    return draw(canvas, f"scene {name} test", white), canvas[:, 0]


def test_the_count_is_the_number_of_objects():
    from scipy.ndimage import label

    labels, ink = drawn_alone("count")
    assert (labels == load_task("count").test.labels[:200].numpy()).all()
    found = np.array([label(picture > 0.25, structure=np.ones((3, 3)))[1] for picture in ink])
    # two objects in neighbouring cells may touch, and then are one for this simple counter, never more
    assert (found <= labels + 1).all() and (found == labels + 1).mean() > 0.5


def test_the_column_is_that_of_the_centre():
    labels, ink = drawn_alone("x-position")
    centre = (ink * (np.arange(32) + 0.5)).sum((1, 2)) / ink.sum((1, 2))
    assert (np.abs(centre - (4 + 3 * (labels + 0.5))) < 2.2).all()
    assert np.corrcoef(centre, labels)[0, 1] > 0.98


def test_a_nearer_range_is_a_larger_object():
    labels, ink = drawn_alone("distance")
    area = [np.median(ink[labels == k].sum((1, 2))) for k in range(6)]
    assert area == sorted(area, reverse=True)


# --- the same for everybody -----------------------------------------------------------------------------------------


def test_a_task_is_the_same_each_time_it_is_made():
    for name in ("textures", "count"):
        again = TASKS[name]()
        assert torch.equal(again.train.images, load_task(name).train.images)
        assert torch.equal(again.test.labels, load_task(name).test.labels)


def test_a_window_does_not_depend_on_how_many_are_drawn():
    assert (
        photograph_windows("coffee", "train", 200, 32, 64)[:50] == photograph_windows("coffee", "train", 50, 32, 64)
    ).all()


def test_unknown_tasks_are_refused_with_the_list():
    with pytest.raises(ValueError, match="no task 'facse'; the tasks are digits, faces"):
        load_task("facse")
