"""Checkpoints: names and layouts both ways, what is refused, and downloads from a local server."""

import base64
import hashlib
import http.server
import multiprocessing
import os
import re
import stat
import threading
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitlib import checkpoints
from bitlib.checkpoints import (
    MINI_NAMES,
    OFFICIAL_NAMES,
    CheckpointError,
    cache_dir,
    checkpoint_card,
    checkpoint_url,
    convert_timm,
    download,
    from_official_name,
    from_timm_name,
    huggingface_name,
    load_npz,
    load_pretrained,
    load_weights,
    official_name,
    read_metadata,
    save_checkpoint,
    save_npz,
    timm_name,
    to_huggingface,
    to_timm,
)
from bitlib.conv import fold_weight_standardization
from bitlib.resnet import create_model

NAME = "R14x0.25"


def random_model(name: str = NAME, num_classes: int = 5, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = create_model(name, num_classes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def same(model, other) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def plain(state) -> dict[str, torch.Tensor]:
    """The state dict as save_file takes it: rows after rows, whatever the layout of the model."""
    return {key: tensor.contiguous() for key, tensor in state.items()}


def arrays_of(path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


@pytest.fixture
def model():
    return random_model()


@pytest.fixture
def npz(model, tmp_path):
    return save_npz(model, tmp_path / "official.npz")


# names


@pytest.mark.parametrize("architecture", ["R14x0.25", "R26x0.25", "R50x1", "R152x4"])
def test_names_go_there_and_back(architecture):
    with torch.device("meta"):
        names = list(create_model(architecture, 3).state_dict())
    assert len({official_name(name) for name in names}) == len(names)
    for name in names:
        assert from_official_name(official_name(name)) == name
        assert from_timm_name(timm_name(name)) == name
        assert from_timm_name(huggingface_name(name)) == name


def test_official_names_are_googles():
    assert official_name("root.conv.weight") == "root_block/standardized_conv2d/kernel"
    assert official_name("block3.unit01.proj.weight") == "block3/unit01/a/proj/standardized_conv2d/kernel"
    assert official_name("block4.unit03.norm2.bias") == "block4/unit03/b/group_norm/beta"
    assert official_name("head.bias") == "head/conv2d/bias"
    assert from_official_name("block1/unit02/c/standardized_conv2d_17/kernel") == "block1.unit02.conv3.weight"
    assert timm_name("block2.unit01.proj.weight") == "stages.1.blocks.0.downsample.conv.weight"
    assert huggingface_name("root.conv.weight") == "bit.embedder.convolution.weight"
    assert huggingface_name("block2.unit04.conv1.weight") == "bit.encoder.stages.1.layers.3.conv1.weight"


@pytest.mark.parametrize(
    "key",
    [
        "",
        "head",
        "block1/unit01/d/group_norm/gamma",
        "stages.0.blocks.0.proj.weight",
        "block1.unit01.conv4.weight",
    ],
)
def test_a_name_that_no_network_has_is_none(key):
    assert from_official_name(key) is None
    assert from_timm_name(key) is None
    for function in (official_name, timm_name, huggingface_name):
        with pytest.raises(KeyError):
            function(key)


# there and back


def test_layouts_in_the_file(model, npz):
    arrays = arrays_of(npz)
    assert arrays["resnet/root_block/standardized_conv2d/kernel"].shape == (7, 7, 3, 16)
    assert arrays["resnet/head/conv2d/kernel"].shape == (1, 1, model.num_features, 5)
    kernel = arrays["resnet/block2/unit01/b/standardized_conv2d/kernel"]
    weight = model.block2.unit01.conv2.weight
    assert kernel[0, 2, 3, 4] == weight[4, 3, 0, 2]
    assert arrays["resnet/head/conv2d/kernel"][0, 0, 7, 2] == model.head.weight[2, 7]


def test_every_route_is_bit_identical(model, npz, tmp_path):
    ours = save_checkpoint(load_pretrained(npz), tmp_path / "ours.safetensors")
    save_file(plain(to_timm(load_pretrained(ours).state_dict())), tmp_path / "timm.safetensors")
    torch.save(to_huggingface(load_pretrained(tmp_path / "timm.safetensors").state_dict()), tmp_path / "hf.bin")
    torch.save({"state_dict": load_pretrained(tmp_path / "hf.bin").state_dict()}, tmp_path / "ours.pth")
    last = load_pretrained(tmp_path / "ours.pth")
    assert same(model, last)
    assert (last.name, last.num_classes, last.training) == (NAME, 5, False)
    assert all(parameter.requires_grad for parameter in last.parameters())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), last(x))


@pytest.mark.parametrize("prefix", ["", "resnet/", "a/b/resnet/"])
def test_any_prefix_and_numbered_kernels(prefix, model, npz, tmp_path):
    arrays = {}
    for number, (key, value) in enumerate(arrays_of(npz).items()):
        key = key.removeprefix("resnet/").replace("standardized_conv2d/", f"standardized_conv2d_{number}/")
        arrays[prefix + key] = value
    np.savez(tmp_path / "odd.npz", **arrays)
    assert same(model, load_pretrained(tmp_path / "odd.npz"))


def test_compressed_and_big_endian_and_fortran(model, npz, tmp_path):
    arrays = {key: np.asfortranarray(value).astype(">f4") for key, value in arrays_of(npz).items()}
    np.savez_compressed(tmp_path / "odd.npz", **arrays)
    assert same(model, load_pretrained(tmp_path / "odd.npz"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_keep_theirs(dtype, tmp_path):
    model = random_model().to(dtype)
    path = save_checkpoint(model, tmp_path / "model.safetensors")
    again = load_pretrained(path)
    assert next(again.parameters()).dtype == dtype and same(model, again)
    assert load_pretrained(path, num_classes=3).head.weight.dtype == dtype
    if dtype == torch.bfloat16:
        with pytest.raises(CheckpointError, match="bfloat16"):
            save_npz(model, tmp_path / "model.npz")
    else:
        assert same(model, load_pretrained(save_npz(model, tmp_path / "model.npz")))


def test_heads(npz, model):
    assert torch.equal(load_pretrained(npz).head.weight, model.head.weight)
    new = load_pretrained(npz, num_classes=12)
    assert new.head.weight.shape == (12, model.num_features) and new.num_classes == 12
    assert not new.head.weight.any() and not new.head.bias.any()
    assert torch.equal(new.root.conv.weight, model.root.conv.weight)
    features = load_pretrained(npz, num_classes=0)
    assert features(torch.zeros(1, 3, 64, 64)).shape == (1, model.num_features)
    for bad in (-1, 2.0, "10", True):
        with pytest.raises(ValueError, match="num_classes"):
            load_pretrained(npz, num_classes=bad)


def test_a_checkpoint_without_a_head(tmp_path):
    model = random_model(num_classes=0)
    assert load_pretrained(save_npz(model, tmp_path / "a.npz")).num_classes == 0
    assert same(model, load_pretrained(save_checkpoint(model, tmp_path / "a.safetensors")))


@pytest.mark.skipif(os.name != "posix", reason="the umask is POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
@pytest.mark.parametrize("save", [save_checkpoint, save_npz])
def test_who_may_read_a_file_is_for_the_umask_to_say(save, umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        path = save(random_model(), tmp_path / f"model{'.npz' if save is save_npz else '.safetensors'}")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_load_into_a_model_you_have(npz, model, tmp_path):
    other = random_model(seed=1)
    load_npz(other, npz)
    assert same(model, other)
    timm_file = tmp_path / "timm.pth"
    torch.save(to_timm(random_model(seed=2).state_dict()), timm_file)
    load_weights(other, timm_file)
    assert same(random_model(seed=2), other)


def test_metadata_and_card(model, tmp_path):
    model.image_size = 96
    path = save_checkpoint(model, tmp_path / "card.safetensors", {"seed": "3", "upstream": "GlyphNet"})
    assert read_metadata(path) == {
        "architecture": NAME,
        "format": "pt",
        "image_size": "96",
        "num_classes": "5",
        "seed": "3",
        "upstream": "GlyphNet",
    }
    assert load_pretrained(path).image_size == 96
    card = checkpoint_card(path)
    assert "| upstream | GlyphNet |" in card and hashlib.sha256(path.read_bytes()).hexdigest() in card
    with pytest.raises(TypeError, match="seed"):
        save_checkpoint(model, path, {"seed": 3})
    with pytest.raises(ValueError, match="architecture"):
        save_checkpoint(model, path, {"architecture": "R50x1"})
    assert read_metadata(path)["seed"] == "3"


def test_any_safetensors_reader_reads_ours(model, tmp_path):
    state = load_file(save_checkpoint(model, tmp_path / "a.safetensors"))
    assert state.keys() == model.state_dict().keys()


def test_weights_keep_the_models_layout_in_memory(npz, model):
    fresh = create_model(NAME, 5)
    for loaded in (load_pretrained(npz), load_pretrained(npz, num_classes=3), fresh):
        if loaded is fresh:
            load_npz(loaded, npz)
        for name, parameter in loaded.named_parameters():
            if not name.startswith("head."):
                assert parameter.stride() == model.get_parameter(name).stride()


# what is refused, on saving


def test_nothing_is_saved_that_could_not_be_read_back(tmp_path):
    path = tmp_path / "a.safetensors"
    model = random_model()
    model.head.bias.data[1] = float("nan")
    with pytest.raises(CheckpointError, match="head.bias.*NaN"):
        save_checkpoint(model, path)
    with pytest.raises(CheckpointError, match="StdConv2d"):
        save_checkpoint(fold_weight_standardization(random_model()), path)
    model = random_model()
    model.head = torch.nn.Linear(model.num_features, 9)
    with pytest.raises(CheckpointError, match="head.weight.*has shape"):
        save_checkpoint(model, path)
    with pytest.raises(CheckpointError, match="cannot be built again"):
        save_checkpoint(torch.nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match=r"\.safetensors"):
        save_checkpoint(random_model(), tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = save_checkpoint(model, tmp_path / "a.safetensors")

    def fail(state, temporary, metadata):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(random_model(seed=1), path)
    monkeypatch.undo()
    assert same(model, load_pretrained(path)) and list(tmp_path.iterdir()) == [path]


# what is refused, on loading: the message names the tensor, and the model is untouched


def refused(path, match: str) -> None:
    model = random_model(seed=7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        load_weights(model, path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError):
        load_pretrained(path)


KERNEL = "resnet/block2/unit01/b/standardized_conv2d/kernel"
GAMMA = "resnet/block4/unit01/c/group_norm/gamma"
ROOT = "resnet/root_block/standardized_conv2d/kernel"


@pytest.mark.parametrize("key", [KERNEL, GAMMA, ROOT, "resnet/head/conv2d/bias", "resnet/group_norm/beta"])
def test_a_missing_tensor_is_named(key, npz, tmp_path):
    arrays = arrays_of(npz)
    del arrays[key]
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(tmp_path / "bad.npz", re.escape(key.removeprefix("resnet/")) + "' .*missing|missing")


def test_a_renamed_tensor_is_named_with_the_nearest(npz, tmp_path):
    arrays = arrays_of(npz)
    arrays["resnet/block4/unit01/c/group_norm/gama"] = arrays.pop(GAMMA)
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(tmp_path / "bad.npz", f"'{GAMMA}'.*missing; the nearest name is .*gama'")


def test_an_extra_tensor_is_named(npz, tmp_path):
    arrays = arrays_of(npz)
    for extra in ("resnet/global_step", "optimizer/x", KERNEL.replace("unit01", "unit09")):
        np.savez(tmp_path / "bad.npz", **arrays, **{extra: np.zeros(3, np.float32)})
        refused(tmp_path / "bad.npz", f"'{extra}' is no tensor of")


def test_the_same_tensor_twice_is_refused(npz, tmp_path):
    arrays = arrays_of(npz)
    arrays[KERNEL.replace("conv2d", "conv2d_3")] = arrays[KERNEL]
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(tmp_path / "bad.npz", "are the same tensor")


def test_two_networks_in_one_file_are_refused(npz, tmp_path):
    arrays = arrays_of(npz)
    np.savez(tmp_path / "bad.npz", **arrays, **{"ema/" + key: value for key, value in arrays.items()})
    refused(tmp_path / "bad.npz", "several networks")


@pytest.mark.parametrize("key", [KERNEL, GAMMA, ROOT, "resnet/head/conv2d/kernel"])
def test_another_shape_is_named(key, npz, tmp_path):
    arrays = arrays_of(npz)
    for wrong in (arrays[key][..., :-1], arrays[key][None], arrays[key].reshape(-1)[:1].reshape(())):
        np.savez(tmp_path / "bad.npz", **(arrays | {key: wrong}))
        refused(tmp_path / "bad.npz", f"'{key}' has shape" if key != ROOT or wrong.ndim == 4 else "root_block")


@pytest.mark.parametrize("dtype", ["f8", "f2", "i4", "c8", "U4", "V4", "?"])
def test_another_type_is_named(dtype, npz, tmp_path):
    arrays = arrays_of(npz)
    arrays[GAMMA] = np.zeros(arrays[GAMMA].shape, dtype)
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(tmp_path / "bad.npz", f"'{GAMMA}' is (torch.float|no array of weights: type)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named(value, model, npz, tmp_path):
    arrays = arrays_of(npz)
    arrays[KERNEL][0, 1, 2, 3] = value
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(tmp_path / "bad.npz", f"'{KERNEL}' holds NaN or inf")
    state = model.state_dict() | {"norm.bias": torch.full((model.num_features,), value)}
    save_file(plain(state), tmp_path / "bad.safetensors", {"architecture": NAME, "num_classes": "5"})
    refused(tmp_path / "bad.safetensors", "'norm.bias' holds NaN or inf")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
def test_truncated_empty_foreign_or_absent(suffix, model, tmp_path):
    good, bad = tmp_path / f"good{suffix}", tmp_path / f"bad{suffix}"
    if suffix == ".npz":
        save_npz(model, good)
    elif suffix == ".safetensors":
        save_checkpoint(model, good)
    else:
        torch.save(model.state_dict(), good)
    data = good.read_bytes()
    for damaged in (b"", data[:1], data[: len(data) // 2], data[:-1], b"<html>not found</html>", b"\0" * 100):
        bad.write_bytes(damaged)
        refused(bad, "bad")
    bad.unlink()
    refused(bad, "no file")
    with pytest.raises(FileNotFoundError):
        load_pretrained(bad)
    bad.mkdir()
    refused(bad, "not a readable")
    refused(tmp_path / "bad.ckpt", "ends in .npz")


def test_a_flipped_byte_is_found_by_the_checksum(npz, tmp_path):
    data = bytearray(npz.read_bytes())
    with zipfile.ZipFile(npz) as archive:
        data[archive.getinfo(KERNEL + ".npy").header_offset + 1000] ^= 1
    (tmp_path / "bad.npz").write_bytes(data)
    refused(tmp_path / "bad.npz", f"'{KERNEL}' cannot be read.*CRC")


class Bomb:
    """An object whose pickle, when opened, creates a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_no_pickle_is_opened(npz, tmp_path):
    target = tmp_path / "executed"
    arrays = arrays_of(npz)
    arrays[GAMMA] = np.array([Bomb(target)], dtype=object)
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(tmp_path / "bad.npz", f"'{GAMMA}'.*pickle")
    torch.save({"root.conv.weight": Bomb(target)}, tmp_path / "bad.pth")
    refused(tmp_path / "bad.pth", "bad.pth")
    assert not target.exists()
    np.load(tmp_path / "bad.npz", allow_pickle=True)[GAMMA]  # the trap is a real one
    assert target.exists()


def test_zip_bombs_are_refused_before_they_are_read(npz, tmp_path, monkeypatch):
    bomb = np.zeros((3, 3, 512, 4096), np.float32)  # 75 MB of zeros, 73 KB packed
    np.savez_compressed(tmp_path / "bad.npz", **{ROOT: np.ones((7, 7, 3, 16), np.float32), KERNEL: bomb})
    monkeypatch.setattr(checkpoints, "_read_npy", lambda *args: pytest.fail("an array was read"))
    refused(tmp_path / "bad.npz", "would unpack to")
    np.savez(tmp_path / "bad.npz", **(arrays_of(npz) | {KERNEL: bomb[:, :, :9]}))  # larger than it may be
    refused(tmp_path / "bad.npz", f"'{KERNEL}' has shape")


def test_a_header_that_lies_about_the_size(npz, tmp_path):
    with zipfile.ZipFile(npz) as source, zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        for member in source.infolist():
            data = source.read(member)
            if member.filename == GAMMA + ".npy":
                data = data.replace(b"(128,)", b"(999,)")
            archive.writestr(member.filename, data)
    refused(tmp_path / "bad.npz", f"'{GAMMA}'.*999")


def test_state_dicts_with_something_else_in_them(model, tmp_path):
    for bad in ({"epoch": 3}, {"norm.weight": torch.zeros(2, dtype=torch.int64)}, {"norm.weight": "text"}):
        torch.save(model.state_dict() | bad, tmp_path / "bad.pth")
        refused(tmp_path / "bad.pth", f"'{next(iter(bad))}'")
    torch.save([1, 2], tmp_path / "bad.pth")
    refused(tmp_path / "bad.pth", "a list")
    with pytest.raises(CheckpointError, match="stages.9"):
        convert_timm({"stages.9": torch.zeros(1)})


def test_loading_into_a_folded_model_is_refused(npz, model):
    with pytest.raises(CheckpointError, match="StdConv2d"):
        load_npz(fold_weight_standardization(model), npz)


def test_another_head_than_the_files(npz):
    with pytest.raises(CheckpointError, match=r"head/conv2d/kernel' has shape \(5, \d+\).*head.weight"):
        load_npz(random_model(num_classes=6), npz)


def test_metadata_that_lies(model, tmp_path):
    path = tmp_path / "bad.safetensors"
    for architecture, match in (
        ("R26x0.25", "missing"),
        ("R14x0.5", "shape"),
        ("R13x1", "bad"),
        ("x", "bad"),
    ):
        save_file(plain(model.state_dict()), path, {"architecture": architecture})
        with pytest.raises(CheckpointError, match=match):
            load_pretrained(path)
    save_file(plain(model.state_dict()), path, {"image_size": "large"})
    with pytest.raises(CheckpointError, match="large"):
        load_pretrained(path)


# names of checkpoints, and the cache


def test_known_names():
    assert len(OFFICIAL_NAMES) == 18 and "BiT-M-R152x4-ILSVRC2012" in OFFICIAL_NAMES
    assert checkpoint_url("BiT-S-R50x3") == "https://storage.googleapis.com/bit_models/BiT-S-R50x3.npz"
    url = checkpoint_url("timm/resnetv2_50x1_bit.goog_in21k")
    assert url == "https://huggingface.co/timm/resnetv2_50x1_bit.goog_in21k/resolve/main/model.safetensors"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("BiT-M-R51x1", "BiT-M-R50x1"),
        ("bit-s-r101x3", "BiT-S-R101x3"),
        ("BiT-M-R50x1-ILSVRC-2012", "BiT-M-R50x1-ILSVRC2012"),
        ("BiT-mini-XL", "BiT-mini-L"),
        ("BiT-L-R152x4", "BiT-"),
    ],
)
def test_an_unknown_name_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*nearest.*'{nearest}"):
        load_pretrained(name)


@pytest.mark.parametrize("name", MINI_NAMES)
def test_minis_are_shipped_or_their_absence_is_said(name):
    try:
        model = load_pretrained(name)
    except CheckpointError as error:
        assert isinstance(error, FileNotFoundError) and name in str(error)
    else:
        assert model.num_classes > 0 and not model.training
        assert model.name == ("R" + name.partition("-R")[2] if "-R" in name else "R26x0.25")
        assert {p.dtype for p in model.parameters()} == {torch.float32}  # one file holds float16


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("BITLIB_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("BITLIB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "bitlib"


# downloading, from a server on this machine


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append(asked)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if start >= len(server.data):
            self.send_error(416)
            return
        body = server.data[start:]
        self.send_response(206 if asked and server.ranges else 200)
        if asked and server.ranges:
            self.send_header("Content-Range", f"bytes {start + server.shift}-{len(server.data) - 1}/{len(server.data)}")
        self.send_header("Content-Length", str(len(body)))
        if server.md5:  # two header lines, as Google sends them
            self.send_header("x-goog-hash", "crc32c=AAAAAA==")
            self.send_header("x-goog-hash", f"md5={server.md5}")
        self.end_headers()
        limit = server.cuts.pop(0) if server.cuts else len(body)
        self.wfile.write(body[:limit])  # fewer than announced, and the connection closes

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.data = np.random.default_rng(0).bytes(300_000)
    server.md5 = base64.b64encode(hashlib.md5(server.data).digest()).decode()
    server.requests, server.cuts, server.ranges, server.status, server.shift = [], [], True, 200, 0
    server.url = f"http://127.0.0.1:{server.server_port}/file.npz"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_download_once(server, tmp_path):
    path = download(server.url, tmp_path / "sub" / "file.npz")
    assert path.read_bytes() == server.data
    assert download(server.url, path) == path and server.requests == [None]
    assert names(path.parent) == {"file.npz", "file.npz.sha256"}
    record = (path.parent / "file.npz.sha256").read_text()
    assert record == f"{hashlib.sha256(server.data).hexdigest()}  file.npz\n"


def test_an_interrupted_download_goes_on(server, tmp_path):
    server.cuts = [100_000, 50_000]
    path = download(server.url, tmp_path / "file.npz")
    assert path.read_bytes() == server.data
    assert server.requests == [None, "bytes=99999-", "bytes=149998-"]


def test_a_later_call_goes_on(server, tmp_path):
    server.cuts = [100_000, 0]
    with pytest.raises(CheckpointError, match="99,999 bytes are here"):
        download(server.url, tmp_path / "file.npz", attempts=2)
    assert names(tmp_path) == {"file.npz.part"}
    assert download(server.url, tmp_path / "file.npz").read_bytes() == server.data
    assert server.requests[-1] == "bytes=99998-"


def test_a_complete_part_is_only_checked(server, tmp_path):
    (tmp_path / "file.npz.part").write_bytes(server.data)
    assert download(server.url, tmp_path / "file.npz").read_bytes() == server.data
    assert server.requests == ["bytes=299999-"]


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "file.npz.part").write_bytes(server.data + b"more")
    assert download(server.url, tmp_path / "file.npz").read_bytes() == server.data
    assert server.requests[-1] is None


def test_a_part_of_another_file_is_found_out(server, tmp_path):
    (tmp_path / "file.npz.part").write_bytes(b"x" * 1000)
    with pytest.raises(CheckpointError, match="MD5"):
        download(server.url, tmp_path / "file.npz")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("damage", ["ranges", "shift"])
def test_a_server_that_does_not_resume_properly(damage, server, tmp_path):
    (tmp_path / "file.npz.part").write_bytes(server.data[:1000])
    server.ranges, server.shift = damage != "ranges", damage == "shift"
    assert download(server.url, tmp_path / "file.npz").read_bytes() == server.data


def test_a_wrong_hash_is_refused_and_removed(server, tmp_path):
    server.md5 = base64.b64encode(b"0" * 16).decode()
    with pytest.raises(CheckpointError, match="MD5.*removed"):
        download(server.url, tmp_path / "file.npz")
    assert names(tmp_path) == set()


def test_a_server_without_hashes(server, tmp_path):
    server.md5 = None
    assert download(server.url, tmp_path / "file.npz").read_bytes() == server.data


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_server_that_refuses(status, server, tmp_path):
    server.status = status
    with pytest.raises(CheckpointError, match=f"{status}.*put it at .*file.npz"):
        download(server.url, tmp_path / "file.npz")
    assert len(server.requests) == 1 and names(tmp_path) == set()


def test_a_cached_file_that_changed_is_refused(server, tmp_path):
    path = download(server.url, tmp_path / "file.npz")
    path.write_bytes(server.data[:-1] + b"x")
    with pytest.raises(CheckpointError, match="changed since"):
        download(server.url, path)


def test_only_the_web(tmp_path):
    with pytest.raises(ValueError, match="file:///etc/passwd"):
        download("file:///etc/passwd", tmp_path / "x")


def test_offline_says_where_to_put_the_file(monkeypatch, tmp_path, npz):
    monkeypatch.setenv("BITLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(checkpoints, "checkpoint_url", lambda name: f"http://127.0.0.1:9/{name}.npz")
    with pytest.raises(CheckpointError) as caught:
        load_pretrained("BiT-M-R50x1")
    assert "http://127.0.0.1:9/BiT-M-R50x1.npz" in str(caught.value)
    assert str(tmp_path / "cache" / "BiT-M-R50x1.npz") in str(caught.value)
    # put by hand, it is taken; but not if it is another network
    (tmp_path / "cache" / "BiT-M-R50x1.npz").write_bytes(npz.read_bytes())
    with pytest.raises(CheckpointError, match=f"is a {NAME}"):
        load_pretrained("BiT-M-R50x1")


def test_an_official_name_is_downloaded_once_and_loaded(server, model, monkeypatch, tmp_path):
    server.data = save_npz(model, tmp_path / "a.npz").read_bytes()
    server.md5 = base64.b64encode(hashlib.md5(server.data).digest()).decode()
    monkeypatch.setenv("BITLIB_CACHE", str(tmp_path / "cache"))
    name = f"BiT-M-{NAME}-ILSVRC2012"  # as if a network of the tests' size had been released
    monkeypatch.setattr(checkpoints, "OFFICIAL_NAMES", [name])
    monkeypatch.setattr(checkpoints, "checkpoint_url", lambda name: server.url)
    server.cuts = [len(server.data) // 2]
    assert same(model, load_pretrained(name))
    again = load_pretrained(name, num_classes=4)
    assert (again.name, again.num_classes, again.image_size) == (NAME, 4, 448)
    assert len(server.requests) == 2


def _download_in_a_process(url, path, barrier):
    barrier.wait()
    download(url, path)


def test_two_processes_download_once(server, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    path = tmp_path / "file.npz"
    workers = [context.Process(target=_download_in_a_process, args=(server.url, path, barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert path.read_bytes() == server.data and server.requests == [None]
