"""GlyphNet: no digits, nothing of the downstream tasks, and every image a function of its number."""

import hashlib
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from bitlib import data
from bitlib.data import (
    DOWNSTREAM_PHOTOGRAPHS,
    HELD_OUT_TYPEFACES,
    LOOKALIKES,
    MIX,
    SIZES,
    TYPEFACES,
    UPSTREAM_PHOTOGRAPHS,
    GlyphNet,
    glyphs,
    package_file,
)

# By name, and not by the constants under test: what a reader of digits would take for one.
DIGIT_LIKE = {
    "0": "0OoΟοОоՕօØøΘθ°º⁰₀ϴӨɵ○",
    "1": "1lI|ıΙІӀӏ¹₁│∣ǀ",
    "2": "2ZzΖƧƨ²₂ƻշ",
    "3": "3ЗзƷʒƎϽ³₃ӠЭэɜვȜȝᴈ",
    "4": "4Чч⁴₄Ӌӌ",
    "5": "5SsЅѕƼƽ⁵₅",
    "6": "6bбƄƅ⁶₆ნ",
    "7": "7⁷₇",
    "8": "8BВΒ⁸₈",
    "9": "9gq⁹₉ց",
    "more": "½⅓¼¾⅛①②❶⓪Ⅰ٣५",
}


@pytest.fixture(scope="module")
def table():
    return glyphs()


def seen(table):
    return set("".join(table.characters[c] for c in table.upstream + table.held_out))


# --- what is in it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digit", DIGIT_LIKE)
def test_no_digit_and_no_lookalike(table, digit):
    allowed = {"○", "º", "Ͻ"}  # a circle, an underlined small o, a reversed C: other pictures, see below
    assert not seen(table) & (set(DIGIT_LIKE[digit]) - allowed)


def test_no_number_in_any_script(table):
    for c in seen(table):
        assert unicodedata.numeric(c, None) is None and unicodedata.category(c)[0] != "N", unicodedata.name(c)
        assert not any(d.isdigit() for d in unicodedata.normalize("NFKD", c)), unicodedata.name(c)
    assert not seen(table) & set(LOOKALIKES)


def test_nothing_that_is_drawn_resembles_a_digit(table):
    shapes = data._shapes(table.atlas)
    digits = shapes[:, [table.find(d) for d in "0123456789"]].reshape(-1, 400)
    stayed = list(table.upstream + table.held_out)
    assert max((face[stayed] @ digits.T).max() for face in shapes) < 0.95


def test_counts(table):
    drawn = sum(map(len, table.characters))
    assert drawn > 2000 and len(TYPEFACES) == 12
    assert len(table.held_out) >= 50 and len(table.upstream) > 1700 > SIZES["M"][0]
    parts = table.upstream + table.held_out + table.excluded
    assert sorted(parts) == list(range(len(table.characters)))  # each class in exactly one part
    assert table.atlas.shape == (12, len(table.characters), 40, 40) and table.atlas.dtype == np.uint8
    assert table.atlas.reshape(12, len(table.characters), -1).max(-1).min() > 60  # nothing is blank


def test_same_pictures_are_one_class(table):
    assert table.find("A") == table.find("Α") == table.find("А")  # Latin, Greek, Cyrillic
    assert table.find("T") == table.find("Τ") == table.find("Т")
    assert len({table.find(c) for c in "AaCЖжΣ♣é"}) == 8
    first = np.ascontiguousarray(table.atlas.transpose(1, 0, 2, 3)).reshape(len(table.characters), -1)
    assert len(np.unique(first, axis=0)) == len(first)  # no two classes draw the same in every typeface
    with pytest.raises(ValueError, match="typefaces"):
        table.find("漢")


def test_held_out_characters_and_typefaces_are_in_no_size(table):
    assert set(HELD_OUT_TYPEFACES) < set(TYPEFACES)
    for size in SIZES:
        for split in ("train", "val"):
            ds = GlyphNet(size, split)
            assert not set(ds.character_classes) & set(table.held_out)
            assert not set(ds.typefaces) & set(HELD_OUT_TYPEFACES)
    ds = GlyphNet("M", "held-out")
    assert set(ds.character_classes) == set(table.held_out) and set(ds.typefaces) == set(HELD_OUT_TYPEFACES)
    assert not set(data._mark_classes().tolist()) & set(table.held_out)
    assert not set(data._mark_classes().tolist()) & set(table.excluded)


def test_held_out_characters_resemble_nothing_upstream(table):
    shapes = data._shapes(table.atlas)
    held, rest = list(table.held_out), list(table.upstream)
    assert max((face[held] @ face[rest].T).max() for face in shapes) < data.LIKE_A_LOOKALIKE


def test_sizes_are_nested():
    small, medium, large = (GlyphNet(size) for size in "SML")
    assert (len(small), len(medium), len(large)) == (10_000, 200_000, 2**31)
    assert len(small.character_classes) == 100 and len(medium.character_classes) == 1000
    assert large.character_classes[:1000] == medium.character_classes
    assert medium.character_classes[:100] == small.character_classes


# --- photographs ----------------------------------------------------------------------------------------------------


def load(files):
    return {name: Image.open(package_file(*where)) for name, where in files.items()}


def window_hashes(image, step):
    """A hash of each 16 x 16 window at multiples of step, but for the nearly uniform ones."""
    grey = np.asarray(image.convert("L")).astype(np.uint64)
    n = 16
    for multiplier in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F):  # once along each axis
        m, total = np.uint64(multiplier), None
        for k in range(n):
            part = grey[k : len(grey) - n + 1 + k]
            total = part.copy() if total is None else total * m + part
        grey = total.T
    levels = np.asarray(image.convert("L")).astype(np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(levels, (n, n))[::step, ::step]
    busy = np.ptp(windows.reshape(*windows.shape[:2], -1), axis=-1) > 8 if step > 1 else None
    hashes = grey[::step, ::step]
    return set(hashes[busy].tolist() if busy is not None else hashes.ravel().tolist())


def test_photographs_are_other_files_and_other_pixels():
    assert not set(UPSTREAM_PHOTOGRAPHS) & set(DOWNSTREAM_PHOTOGRAPHS)
    assert not set(UPSTREAM_PHOTOGRAPHS.values()) & set(DOWNSTREAM_PHOTOGRAPHS.values())
    # Every 32 x 32 crop holds a 16 x 16 window whose corner is a multiple of 16, at least the busy ones of which
    # would be found at some place of the downstream photograph if a crop were shared.
    upstream = set().union(*(window_hashes(image, 16) for image in load(UPSTREAM_PHOTOGRAPHS).values()))
    assert len(upstream) > 1000
    for name, image in load(DOWNSTREAM_PHOTOGRAPHS).items():
        if name != "retina":  # 2 million places; its file is checked above, and it is no crop of a smaller one
            assert not upstream & window_hashes(image, 1), name


def test_the_window_test_can_fail():
    image = load({"camera": UPSTREAM_PHOTOGRAPHS["camera"]})["camera"]
    shifted = image.crop((101, 57, 101 + 200, 57 + 200))
    assert window_hashes(image, 16) & window_hashes(shifted, 1)


# --- a function of the number ---------------------------------------------------------------------------------------


def digest(images, labels):
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("split", ["train", "val", "held-out"])
def test_any_batch_gives_the_same_bytes(size, split):
    ds = GlyphNet(size, split, seed=3)
    numbers = torch.randint(len(ds), (257,), generator=torch.Generator().manual_seed(1))
    images, labels = ds.batch(numbers)
    assert images.dtype == torch.uint8 and images.shape == (257, 3, 32, 32)
    assert labels.dtype == torch.int64 and labels.shape == (257, len(ds.groups))
    order = torch.randperm(257, generator=torch.Generator().manual_seed(2))
    other_images, other_labels = ds.batch(numbers[order])
    assert torch.equal(other_images, images[order]) and torch.equal(other_labels, labels[order])
    for k in range(40):
        image, label = ds[int(numbers[k])]
        assert torch.equal(image, images[k]) and torch.equal(label, labels[k])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 199_999), min_size=1, max_size=20), st.integers(0, 2**40))
def test_a_batch_is_its_images(numbers, seed):
    ds = GlyphNet("M", seed=seed)
    images, labels = ds.batch(numbers)
    pairs = ds.__getitems__(numbers)
    assert all(torch.equal(p[0], x) and torch.equal(p[1], y) for p, x, y in zip(pairs, images, labels, strict=True))
    image, label = ds[numbers[-1]]
    assert torch.equal(image, images[-1]) and torch.equal(label, labels[-1])


def test_other_processes_and_workers_give_the_same_bytes():
    program = (
        "import hashlib; from bitlib.data import GlyphNet; x, y = GlyphNet('S', seed=7).batch(range(64));"
        "print(hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    ds = GlyphNet("S", seed=7)
    assert out.strip() == digest(*ds.batch(range(64)))
    loader = DataLoader(ds, batch_size=16, num_workers=2, sampler=range(64))
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert digest(images, labels) == out.strip()


def test_seed_split_and_size_matter():
    first = GlyphNet("M").batch(range(50))[0]
    for other in (GlyphNet("M", seed=1), GlyphNet("M", "val"), GlyphNet("S"), GlyphNet("L")):
        assert not (other.batch(range(50))[0] == first).flatten(1).all(1).any()


def test_a_read_only_or_damaged_cache_changes_nothing(tmp_path, monkeypatch):
    few = ("DejaVuSans", "DejaVuSerif")
    monkeypatch.setattr(data, "TYPEFACES", few)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    original = data._picture
    # drawing everything is slow, and beside the point: draw 40 characters, and repeat the last
    calls = []

    def quick(font, character):
        if len(calls) < 40:
            calls.append(original(font, character))
        return calls[-1]

    monkeypatch.setattr(data, "_picture", quick)
    names, pictures = data._drawn_characters()
    (cached,) = (tmp_path / "bitlib").iterdir()
    good = cached.read_bytes()
    monkeypatch.setattr(data, "_picture", None)  # from here on only the cache can answer
    assert np.array_equal(data._drawn_characters()[1], pictures)
    calls.clear()
    monkeypatch.setattr(data, "_picture", quick)
    for damage in (b"", good[:1000], b"nonsense"):
        cached.write_bytes(damage)
        calls.clear()
        assert np.array_equal(data._drawn_characters()[1], pictures)
        assert cached.read_bytes() == good
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    calls.clear()
    assert np.array_equal(data._drawn_characters()[1], pictures)
    assert not [p for p in (tmp_path / "bitlib").iterdir() if p.suffix == ".tmp"]


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample():
    ds = GlyphNet("M")
    return ds, *ds.batch(range(6_000))


def test_labels_lie_in_their_groups(sample):
    ds, _, labels = sample
    assert [g.name for g in ds.groups] == ["character", "typeface", "ink", "place", "count", "position"]
    assert [g.weight for g in ds.groups] == [1.0, 0.1, 0.3, 0.5, 0.3, 0.1]
    assert labels.min() == -1
    for g, group in enumerate(ds.groups):
        assert labels[:, g].max() < group.n_classes, group
    rare = [ds.groups[g].n_classes - len(labels[:, g].unique()) + 1 for g in (1, 2, 3, 4, 5)]
    assert rare[0] == rare[1] == rare[3] == rare[4] == 0 and rare[2] < 10  # every class occurs


def test_mix_and_which_labels_go_together(sample):
    _, _, labels = sample
    character, typeface, ink, place, count, position = (labels >= 0).T
    assert sum(MIX.values()) == pytest.approx(1)
    kinds = [character & ~place, character & place, ~character & ~count, count]
    for (name, share), kind in zip(MIX.items(), kinds, strict=True):
        assert abs(kind.double().mean() - share) < 0.025, name
    assert torch.equal(character, typeface)
    assert torch.equal(ink, character | count)
    assert not (character & count).any()
    assert (place | ink).all()  # no image without a label
    assert torch.equal(position, character | (labels[:, 4] == 0))


def test_the_count_is_what_one_counts():
    """Draw the marks of a scene without noise, and count the connected parts."""
    from scipy.ndimage import label

    numbers = np.arange(1000)
    _, labels = GlyphNet("M").batch(numbers)
    ds = GlyphNet("M", image_size=128)
    which = np.flatnonzero(labels[:, 4].numpy() >= 0)
    bits = data._hash(ds._stream, numbers, len(data._fields())) >> np.uint64(11)
    u = {name: bits[:, i] * 2.0**-53 for i, name in enumerate(data._fields())}
    for name in list(u):
        if name.endswith("_kind") and name.startswith("mark"):
            u[name] = u[name] * 0.5  # solid marks only: a letter such as i has two parts
    alpha = np.zeros((len(numbers), 128, 128), np.float32)
    count, _ = ds._draw_marks(alpha, which, u)
    assert np.array_equal(count, labels[which, 4].numpy())
    parts = np.array([label(alpha[i] > 0.5, np.ones((3, 3)))[1] for i in which])
    assert (parts == count + 1).mean() > 0.99  # a club may lose its stem to a thin stroke


def test_ink_and_position_labels_are_what_the_image_shows():
    ds = GlyphNet("M", "held-out", seed=1)
    images, labels = ds.batch(range(400))
    numbers = np.arange(400)
    bits = data._hash(ds._stream, numbers, len(data._fields())) >> np.uint64(11)
    u = {name: bits[:, i] * 2.0**-53 for i, name in enumerate(data._fields())}
    colours, inks = data._ink(u)
    assert np.array_equal(inks, labels[:, 2].numpy())
    # In most images some pixel has, nearly, the colour of the ink.
    distance = (images.float() / 255 - torch.from_numpy(colours)[:, :, None, None]).abs().amax(1).flatten(1).amin(1)
    assert (distance < 0.08).double().mean() > 0.9
    assert len(set(inks[colours.max(1) - colours.min(1) < 1e-6]) - set(range(16, 20))) == 0  # greys are greys


def test_backdrops_leave_the_ink_visible():
    u = {name: np.random.RandomState(i).rand(2000) for i, name in enumerate(data._fields())}
    ink, _ = data._ink(u)
    low, high = data._backdrop_range(u, ink)
    bright = data._luminance(ink)
    gap = np.maximum(low - bright, bright - high)
    assert gap.min() > 0.1 and (low <= high).all() and low.min() >= 0 and high.max() <= 1


def test_other_image_sizes():
    small, large = GlyphNet("S", image_size=32), GlyphNet("S", image_size=64)
    x, y = small.batch(range(64))
    big, labels = large.batch(range(64))
    assert big.shape == (64, 3, 64, 64)
    same = [0, 1, 2, 4, 5]  # the place of a photograph depends on the size of the window
    assert torch.equal(y[:, same], labels[:, same])
    flat = (y[:, 0] >= 0) & (y[:, 3] < 0)
    shrunk = data.resize(big, 32).float()
    assert (shrunk - x.float()).abs()[flat].mean() < 20


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": "XL"}, "one of S, M, L; got 'XL'"),
        ({"split": "test"}, "train, val or held-out; got 'test'"),
        ({"image_size": 8}, "between 16 and 128; got 8"),
    ],
)
def test_refuses_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        GlyphNet(**arguments)


def test_refuses_numbers_outside():
    ds = GlyphNet("S")
    for wrong in (-1, 10_000):
        with pytest.raises(IndexError, match="images 0 to 9999"):
            ds[wrong]
    assert ds.batch([])[0].shape == (0, 3, 32, 32)
    GlyphNet("L")[2**31 - 1]
