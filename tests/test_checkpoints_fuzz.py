"""Random damage to checkpoint files: always a CheckpointError or the very same weights, never half a load."""

import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from bitlib.checkpoints import CheckpointError, load_pretrained, load_weights, save_checkpoint, save_npz
from bitlib.resnet import create_model

SETTINGS = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
NAME = "R14x0.25"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model, and the bytes of its files by suffix."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = create_model(NAME, 3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    torch.save(model.state_dict(), folder / "a.pth")
    save_npz(model, folder / "a.npz")
    save_checkpoint(model, folder / "a.safetensors")
    return model, {suffix: (folder / f"a{suffix}").read_bytes() for suffix in (".npz", ".safetensors", ".pth")}


def check(data: bytes, suffix: str, good, folder) -> bool:
    """Load the file into a model; True if it was accepted. Whatever it holds, no half of it may arrive."""
    model, _ = good
    path = folder / f"fuzz{suffix}"
    path.write_bytes(data)
    other = create_model(NAME, 3)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    try:
        load_weights(other, path)
    except CheckpointError as error:
        assert "fuzz" in str(error)
        assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
        return False
    assert all(torch.isfinite(value).all() for value in other.state_dict().values())
    assert other.state_dict().keys() == model.state_dict().keys()
    return True


def same(model, other) -> bool:
    return all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def arrays(good) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(good[1][".npz"]), allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def npz(found: dict[str, np.ndarray], packed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(buffer, **found)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
@SETTINGS
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated(suffix, share, good, tmp_path):
    data = good[1][suffix]
    assert not check(data[: int(share * len(data))], suffix, good, tmp_path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
@SETTINGS
@given(noise=st.binary(max_size=200))
def test_noise(suffix, noise, good, tmp_path):
    assert not check(noise, suffix, good, tmp_path)


@SETTINGS
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_damaged_byte_of_an_npz(place, flip, good, tmp_path):
    data = bytearray(good[1][".npz"])
    data[int(place * len(data))] ^= flip
    if check(bytes(data), ".npz", good, tmp_path):  # a byte that means nothing, such as a date
        assert same(good[0], load_pretrained(tmp_path / "fuzz.npz"))


@SETTINGS
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_damaged_byte_of_the_headers(place, flip, good, tmp_path):
    """The central directory of the archive, and the header of the safetensors file."""
    data = bytearray(good[1][".npz"])
    start = data.index(b"PK\x01\x02")
    data[start + int(place * (len(data) - start))] ^= flip
    if check(bytes(data), ".npz", good, tmp_path):
        assert same(good[0], load_pretrained(tmp_path / "fuzz.npz"))
    data = bytearray(good[1][".safetensors"])
    end = 8 + int.from_bytes(data[:8], "little")
    data[int(place * end)] ^= flip
    check(bytes(data), ".safetensors", good, tmp_path)


@SETTINGS
@given(which=st.integers(0, 10**6), name=st.text(min_size=1, max_size=40))
def test_renamed(which, name, good, tmp_path):
    found = arrays(good)
    key = sorted(found)[which % len(found)]
    if name != key and "\x00" not in name and not any(0xD800 <= ord(letter) < 0xE000 for letter in name):
        found[name] = found.pop(key)
        assert not check(npz(found), ".npz", good, tmp_path)
        state = {key: tensor.contiguous() for key, tensor in good[0].state_dict().items()}
        key = sorted(state)[which % len(state)]
        state[name] = state.pop(key)
        assert not check(save(state), ".safetensors", good, tmp_path)


@SETTINGS
@given(which=st.integers(0, 10**6), shape=st.lists(st.integers(0, 5), max_size=5))
def test_reshaped(which, shape, good, tmp_path):
    found = arrays(good)
    key = sorted(found)[which % len(found)]
    if found[key].shape != tuple(shape):
        found[key] = np.zeros(shape, np.float32)
        assert not check(npz(found), ".npz", good, tmp_path)
        with pytest.raises(CheckpointError):
            load_pretrained(tmp_path / "fuzz.npz")


@SETTINGS
@given(
    which=st.integers(0, 10**6),
    dtype=st.sampled_from(["f2", "f8", "i1", "u4", "c16", "?", "S3", "U2", "M8[s]", "V7"]),
)
def test_retyped(which, dtype, good, tmp_path):
    found = arrays(good)
    key = sorted(found)[which % len(found)]
    found[key] = np.zeros(found[key].shape, dtype)
    assert not check(npz(found), ".npz", good, tmp_path)


@SETTINGS
@given(which=st.integers(0, 10**6), place=st.integers(0, 10**6), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_not_finite(which, place, value, good, tmp_path):
    found = arrays(good)
    key = sorted(found)[which % len(found)]
    found[key] = found[key].copy()
    found[key].flat[place % found[key].size] = value
    assert not check(npz(found), ".npz", good, tmp_path)


class Trap:
    """An object whose pickle, when opened, fails the test."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@SETTINGS
@given(which=st.integers(0, 10**6), nested=st.booleans())
def test_a_pickle_inside(which, nested, good, tmp_path):
    found = arrays(good)
    key = sorted(found)[which % len(found)]
    found[key] = np.array([Trap()] * 2, dtype=object)
    assert not check(npz(found, packed=nested), ".npz", good, tmp_path)
    state = dict(good[0].state_dict())
    state[sorted(state)[which % len(state)]] = [Trap()] if nested else Trap()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert not check(buffer.getvalue(), ".pth", good, tmp_path)


@SETTINGS
@given(
    which=st.integers(0, 10**6),
    header=st.one_of(
        st.binary(max_size=60),
        st.sampled_from(
            [
                b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,)}",
                b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -16)}",
                b"{'descr': '|O', 'fortran_order': False, 'shape': (16,)}",
                b"{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (16,)}",
                b"{'descr': '<f4'}",
                b"__import__('os').abort()",
                b"(" * 9000,
                b"-" * 9000 + b"1",
                b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1," * 4000 + b")}",
            ]
        ),
    ),
    version=st.sampled_from([1, 2, 3, 9]),
)
def test_a_header_of_an_array(which, header, version, good, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good[1][".npz"])) as source, zipfile.ZipFile(buffer, "w") as target:
        for number, member in enumerate(source.infolist()):
            data = source.read(member)
            if number == which % len(source.infolist()):
                length = len(header).to_bytes(2 if version == 1 else 4, "little")
                data = b"\x93NUMPY" + bytes([version, 0]) + length + header + data[128:]
            target.writestr(member.filename, data)
    assert not check(buffer.getvalue(), ".npz", good, tmp_path)


@SETTINGS
@given(which=st.integers(0, 10**6), megabytes=st.integers(8, 64))
def test_a_bomb(which, megabytes, good, tmp_path):
    """One array announces far more than it may hold, packed small; nothing of it is unpacked."""
    found = {key: value[..., :1] for key, value in arrays(good).items()}
    key = sorted(found)[which % len(found)]
    found[key] = np.zeros((megabytes, 2**18), np.float32)
    assert not check(npz(found, packed=True), ".npz", good, tmp_path)
