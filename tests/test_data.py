"""Pictures in and out: conversions and transforms against Pillow and torchvision, data sets, tasks, bad input."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from bitlib import data
from bitlib.checks import data as checks
from bitlib.data import (
    ImageTensorDataset,
    center_crop,
    denormalize,
    load_task,
    normalize,
    random_crop,
    random_flip,
    random_resized_crop,
    resize,
    resize_shorter_side,
    resized_crop_boxes,
    shipped_file,
    to_tensor,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=1, height=37, width=53, seed=0):
    return torch.randint(0, 256, (n, 3, height, width), generator=seeded(seed), dtype=torch.uint8)


# --- files ----------------------------------------------------------------------------------------------------------


def test_shipped_file_finds_and_names():
    assert shipped_file("book.mplstyle").is_file()
    with pytest.raises(FileNotFoundError, match=r"no file 'nonsense'.*book\.mplstyle"):
        shipped_file("nonsense")


def test_package_file_says_what_is_missing():
    assert data.package_file("skimage", "data/camera.png").is_file()
    with pytest.raises(ImportError, match=r"bitlib\[book\]"):
        data.package_file("no_such_package_anywhere", "x")
    with pytest.raises(FileNotFoundError, match="skimage"):
        data.package_file("skimage", "data/no_such_picture.png")


def test_import_is_light():
    program = (
        "import sys, bitlib.data; print([m for m in sys.modules if m in {'matplotlib', 'sklearn', 'skimage', 'scipy'}])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_to_tensor_takes_every_8_bit_mode(mode):
    tensor = to_tensor(Image.new(mode, (5, 4)))
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, 4, 5)


def test_to_tensor_keeps_pixels_and_channel_order():
    array = np.random.RandomState(0).randint(0, 256, (6, 7, 3), np.uint8)
    assert torch.equal(to_tensor(Image.fromarray(array)), torch.from_numpy(array).permute(2, 0, 1))


def test_to_tensor_scales_16_bits():
    array = np.array([[0, 255, 256, 65535]], np.uint16)
    assert to_tensor(Image.fromarray(array))[0].tolist() == [[0, 0, 1, 255]]


def test_to_tensor_turns_upright(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif)
    assert to_tensor(Image.open(tmp_path / "x.jpg")).shape == (3, 8, 4)


def test_to_tensor_from_tensors():
    grey = pictures()[0, 0]
    for shape in (grey, grey[None], grey.expand(3, -1, -1)):
        assert torch.equal(to_tensor(shape), grey.expand(3, -1, -1))


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (np.zeros((3, 4, 5), np.uint8), TypeError, "numpy.ndarray.*PIL image or a uint8 tensor"),
        ("cat.jpg", TypeError, "builtins.str"),
        (torch.zeros(3, 4, 5), TypeError, "float32"),
        (torch.zeros(4, 4, 5, dtype=torch.uint8), ValueError, r"\(4, 4, 5\)"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.uint8), ValueError, r"\(1, 3, 4, 5\)"),
        (Image.new("F", (2, 2)), TypeError, "mode 'F'"),
    ],
)
def test_to_tensor_refuses(wrong, error, words):
    with pytest.raises(error, match=words):
        to_tensor(wrong)


def test_normalize_equals_torchvision_and_inverts():
    x = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, 256)
    steps = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    torch.testing.assert_close(normalize(x), steps(x), rtol=0, atol=1e-6)
    assert normalize(x).min() == -1 and normalize(x).max() == 1
    assert torch.equal(denormalize(normalize(x)), x)
    assert denormalize(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


@pytest.mark.parametrize("function", [normalize, lambda x: resize(x, 4), lambda x: center_crop(x, 2)])
def test_transforms_refuse_what_is_no_picture(function):
    with pytest.raises(TypeError, match="float32"):
        function(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"\(1, 4, 4\)"):
        function(torch.zeros(1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        function(torch.zeros(4, 4, dtype=torch.uint8))


# --- sizes ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 90), st.integers(2, 90))
def test_resize_equals_torchvision(height, width, new_height, new_width):
    x = pictures(2, height, width)
    theirs = v2.functional.resize(x, [new_height, new_width], antialias=True)
    assert (resize(x, (new_height, new_width)).int() - theirs.int()).abs().max() <= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 70), st.integers(8, 70), st.integers(2, 90))
def test_resize_shorter_side_equals_torchvision(height, width, size):
    x = pictures(1, height, width)
    theirs = v2.functional.resize(x, [size], antialias=True)
    ours = resize_shorter_side(x, size)
    assert ours.shape == theirs.shape and min(ours.shape[-2:]) == size
    assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (1, 9), (60, 1)])
def test_resize_to_one_pixel_wide(shape):
    # torch's kernel for uint8 fails or gives wrong pixels at width 1, so torchvision's result is no oracle here
    x = pictures(2)
    right = v2.functional.resize(x.float(), list(shape), antialias=True).round()
    assert (resize(x, shape) - right).abs().max() <= 1


def test_resize_any_leading_shape_and_identity():
    x = pictures(6)
    assert torch.equal(resize(x, (37, 53)), x)
    assert torch.equal(resize(x.reshape(2, 3, 3, 37, 53), 20), resize(x, 20).reshape(2, 3, 3, 20, 20))
    assert torch.equal(resize(x[0], 20), resize(x, 20)[0])
    with pytest.raises(ValueError, match="0x0"):
        resize(x, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 37), st.integers(0, 20))
def test_center_crop_equals_torchvision(size, extra):
    x = pictures(1, 37 + extra, 53)
    assert torch.equal(center_crop(x, size), v2.functional.center_crop(x, [size, size]))


@pytest.mark.parametrize("crop", [center_crop, lambda x, s: random_crop(x, s, seeded())])
@pytest.mark.parametrize("size", [0, 38])
def test_crops_refuse_what_does_not_fit(crop, size):
    with pytest.raises(ValueError, match=f"cannot cut {size}x{size} out of 37x53"):
        crop(pictures(), size)


def test_random_crop_cuts_every_window():
    x = torch.arange(25, dtype=torch.uint8).reshape(1, 1, 5, 5).expand(600, 3, 5, 5)
    crops = random_crop(x, 3, seeded())
    corners = crops[:, 0, 0, 0].long()
    top, left = corners // 5, corners % 5
    assert set(zip(top.tolist(), left.tolist(), strict=True)) == {(i, j) for i in range(3) for j in range(3)}
    window = (torch.arange(3)[:, None] * 5 + torch.arange(3))[None] + corners[:, None, None]
    assert torch.equal(crops.long(), window[:, None].expand(-1, 3, -1, -1))
    assert torch.equal(crops, random_crop(x, 3, seeded()))
    assert random_crop(x, 5, seeded()).equal(x)


def test_random_flip_mirrors_half():
    x = pictures(500, 4, 5)
    y = random_flip(x, seeded())
    mirrored = (y == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(y[~mirrored], x[~mirrored])
    assert 200 < mirrored.sum() < 300


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**31))
def test_boxes_lie_inside(height, width, seed):
    top, left, h, w = resized_crop_boxes(20, height, width, generator=seeded(seed)).T
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_boxes_have_the_stated_area_and_ratio():
    boxes = resized_crop_boxes(5000, 1000, 1000, generator=seeded()).double()
    area, ratio = boxes[:, 2] * boxes[:, 3] / 1e6, boxes[:, 3] / boxes[:, 2]
    assert 0.079 < area.min() < 0.09 and 0.95 < area.max() <= 1
    assert 0.745 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.34
    assert abs(ratio.log().mean()) < 0.01
    whole = resized_crop_boxes(50, 100, 100, scale=(1.0, 1.0), ratio=(1.0, 1.0), generator=seeded())
    assert whole.unique(dim=0).tolist() == [[0, 0, 100, 100]]


def test_boxes_fall_back_to_the_middle():
    # A picture of 10 x 200: no window of ratio at most 4/3 has 8 % of its area, so all ten tries fail.
    boxes = resized_crop_boxes(4, 10, 200, scale=(0.9, 1.0), generator=seeded())
    assert boxes.unique(dim=0).tolist() == [[0, 93, 10, 13]]


def test_random_resized_crop_equals_torchvision():
    x = pictures(30)
    ours = random_resized_crop(x, 24, generator=seeded(5))
    for image, crop, box in zip(x, ours, resized_crop_boxes(30, 37, 53, generator=seeded(5)).tolist(), strict=True):
        theirs = v2.functional.resized_crop(image, *box, [24, 24], antialias=True)
        assert (crop.int() - theirs.int()).abs().max() <= 1
    assert random_resized_crop(x[:0], 24, generator=seeded()).shape == (0, 3, 24, 24)


# --- data sets ------------------------------------------------------------------------------------------------------


def test_image_tensor_dataset():
    x = pictures(4)
    ds = ImageTensorDataset(x, torch.tensor([2, 0, 1, 2]))
    assert len(ds) == 4 and ds.n_classes == 3 and ds.labels.dtype == torch.int64
    image, label = ds[3]
    assert torch.equal(image, x[3]) and label == 2 and isinstance(label, int)
    assert [label for _, label in ds] == [2, 0, 1, 2]


@pytest.mark.parametrize(
    ("n", "labels", "n_classes", "error", "words"),
    [
        (0, [], None, ValueError, "empty"),
        (3, [0, 1], None, ValueError, r"3 images need labels of shape \(3,\); got \(2,\)"),
        (2, [[0], [1]], None, ValueError, r"\(2, 1\)"),
        (2, [0, 10], 10, ValueError, "label 10 is outside the 10 classes; use 0 to 9"),
        (2, [0, -1], None, ValueError, "label -1"),
        (2, [0.0, 1.0], None, TypeError, "float32"),
    ],
)
def test_image_tensor_dataset_refuses(n, labels, n_classes, error, words):
    labels = torch.tensor(labels) if labels else torch.tensor([], dtype=torch.long)
    with pytest.raises(error, match=words):
        ImageTensorDataset(pictures(4)[:n], labels, n_classes)


def test_image_tensor_dataset_refuses_other_images():
    with pytest.raises(TypeError, match="float32"):
        ImageTensorDataset(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        ImageTensorDataset(pictures()[0], torch.tensor([0]))


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    task, theirs = load_task("digits"), load_digits()
    assert (len(task.train), len(task.test), len(task.classes)) == (1000, 797, 10)
    images = torch.cat([task.train.images, task.test.images])
    labels = torch.cat([task.train.labels, task.test.labels])
    pixels = torch.from_numpy(np.rint(theirs.images * (255 / 16)).astype(np.uint8))
    expected = resize(pixels[:, None].expand(-1, 3, -1, -1), 32)
    rows = sorted(bytes(i.numpy().tobytes()) + bytes([int(y)]) for i, y in zip(images, labels, strict=True))
    right = sorted(
        i.contiguous().numpy().tobytes() + bytes([int(y)]) for i, y in zip(expected, theirs.target, strict=True)
    )
    assert rows == right
    share = task.train.labels.bincount() / labels.bincount()
    assert (share - 1000 / 1797).abs().max() < 0.01
    assert torch.equal(images[:, 0], images[:, 2])


def test_digits_split_is_fixed():
    train = load_task("digits").train.labels
    assert train[:20].tolist() == [0, 1, 3, 4, 5, 7, 8, 9, 2, 3, 5, 9, 0, 1, 2, 3, 4, 5, 7, 0]


def test_split_is_exact_and_disjoint():
    labels = torch.randint(0, 7, (501,), generator=seeded())
    for n in (0, 100, 333, 501):
        train, test = data._stratified_split(labels, n)
        assert len(train) == n
        assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(501))


def test_unknown_task_names_those_that_exist():
    with pytest.raises(ValueError, match="no task 'digit'; the tasks are digits"):
        load_task("digit")


# --- exercises ------------------------------------------------------------------------------------------------------


def test_checks_refuse_wrong_answers():
    with pytest.raises(AssertionError, match="divide by 255"):
        checks.check_channel_statistics(lambda x: (x.float().mean((0, 2, 3)), x.float().std((0, 2, 3))))
    with pytest.raises(AssertionError, match="off by"):
        checks.check_channel_statistics(lambda x: ((x / 255).mean((0, 2, 3)), (x / 255).std((0, 2, 3))))
    with pytest.raises(AssertionError, match="must render"):
        checks.check_shard(lambda step, batch, rank, world, length: range(step * batch, (step + 1) * batch))
    with pytest.raises(AssertionError, match="together"):
        checks.check_shard(lambda step, batch, rank, world, length: [step * batch % length] * (batch // world))
    with pytest.raises(AssertionError, match="of the draws fit"):
        checks.check_acceptance(lambda low, ratio: 1.0)


def test_checks_take_another_right_answer(capsys):
    def statistics(x):
        mean = x.double().mean((0, 2, 3))
        return mean / 255, (x.double().square().mean((0, 2, 3)) - mean**2).sqrt() / 255

    def shard(step, batch, rank, world, length):
        share = batch // world
        return [(step * batch + rank * share + k) % length for k in range(share)]

    checks.check_channel_statistics(statistics)
    checks.check_shard(shard)
    assert capsys.readouterr().out.count("correct") == 2
