"""The network of chapter 04: its size, its two equal forms, and everything that PyTorch users do to a model."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitlib.conv import StdConv2d, fold_weight_standardization
from bitlib.norm import GroupNorm
from bitlib.resnet import BLOCKS, MODELS, PreActBottleneck, ResNetV2, Stem, create_model

MINI = "R14x0.25"


def mini(num_classes: int = 5, dtype: torch.dtype = torch.float32, name: str = MINI) -> ResNetV2:
    """A small network in which no parameter is zero or one, so that every one of them matters."""
    torch.manual_seed(0)
    model = create_model(name, num_classes).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.5)
    if num_classes:
        nn.init.normal_(model.head.weight, std=0.1)
    return model


def plain(model: nn.Module) -> nn.Module:
    """A copy whose blocks run as the derivation writes them."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, PreActBottleneck):
            module.fused = False
    return model


def images(n: int = 2, size: tuple[int, int] = (40, 40), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def fused_calls(model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many blocks take the fused form in one forward pass."""
    import bitlib.resnet

    calls, real = [], bitlib.resnet._fused_bottleneck
    monkeypatch.setattr(bitlib.resnet, "_fused_bottleneck", lambda block, x: calls.append(block) or real(block, x))
    model(x)
    return len(calls)


# The right network


def test_published_parameter_counts():
    def count(name, num_classes):
        with torch.device("meta"):
            return sum(p.numel() for p in create_model(name, num_classes).parameters())

    assert count("R50x1", 21843) == 68_256_659  # BiT-M
    assert count("R50x1", 1000) == 25_549_352
    # Millions, with ImageNet's 1,000 classes, as in timm's table of results
    table = {"R50x3": 217.32, "R101x1": 44.54, "R101x3": 387.93, "R152x2": 236.34, "R152x4": 936.53}
    assert {name: round(count(name, 1000) / 1e6, 2) for name in table} == table


@pytest.mark.parametrize("name", ["R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4"])
def test_parameters_are_timms(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours = create_model(name, 21843)
        theirs = timm.create_model(f"resnetv2_{name[1:]}_bit", pretrained=False, num_classes=21843)
    # Same tensors up to the head, which is a 1x1 convolution there.
    assert sorted(tuple(p.flatten(1).shape) if p.ndim > 1 else tuple(p.shape) for p in ours.parameters()) == sorted(
        tuple(p.flatten(1).shape) if p.ndim > 1 else tuple(p.shape) for p in theirs.parameters()
    )


def test_largest_backbone_has_the_papers_928_million():
    with torch.device("meta"):
        model = create_model("R152x4", 0)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 928


def test_names_in_the_state_dict():
    names = list(create_model("R26x0.25", 7).state_dict())
    assert names[0] == "root.conv.weight"
    assert names[-4:] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    unit = [name.removeprefix("block3.unit01.") for name in names if name.startswith("block3.unit01.")]
    norms = [f"norm{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")]
    assert sorted(unit) == sorted([*norms, "conv1.weight", "conv2.weight", "conv3.weight", "proj.weight"])
    assert not any("proj" in name for name in names if "unit02" in name)
    assert "block4.unit02.conv3.weight" in names and "block4.unit03.conv3.weight" not in names


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_its_shapes_groups_and_strides(name):
    depth, width = int(name[1:].split("x")[0]), float(name.split("x")[1])
    with torch.device("meta"):
        model = create_model(name, 3)
        out = model.intermediates(torch.empty(2, 3, 96, 64))
    assert model.name == name and model.width_factor == width and model.num_classes == 3
    assert model.image_size == (224 if width >= 1 else 64)
    assert model.num_features == 2048 * width
    assert tuple(out["stem"].shape) == (2, 64 * width, 24, 16)
    for stage in range(1, 5):
        units = model.get_submodule(f"block{stage}")
        assert len(units) == BLOCKS[depth][stage - 1]
        shrink = 2 ** (stage - 1)
        assert tuple(out[f"stage{stage}"].shape) == (2, 256 * width * shrink, 24 // shrink, 16 // shrink)
        for i, unit in enumerate(units):
            assert unit.conv1.stride == unit.conv3.stride == (1, 1)
            assert unit.conv2.stride == ((2, 2) if stage > 1 and i == 0 else (1, 1))
            assert (unit.proj is not None) == (i == 0)
    groups = {module.num_groups for module in model.modules() if isinstance(module, GroupNorm)}
    assert groups == {32 if width >= 1 else int(32 * width)}
    assert list(out) == ["stem", "stage1", "stage2", "stage3", "stage4", "pre_logits", "logits"]
    assert tuple(out["logits"].shape) == (2, 3)


def test_logits_are_timms():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("resnetv2_50x1_bit", pretrained=False, num_classes=6).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    nn.init.normal_(theirs.head.fc.weight, std=0.02)
    ours = create_model("R50x1", 6).eval()
    state, loaded = theirs.state_dict(), {}
    for name, tensor in ours.state_dict().items():
        timm_name = name.replace("root.", "stem.").replace("head.", "head.fc.").replace("proj.", "downsample.conv.")
        if name.startswith("block"):
            stage, unit, part = timm_name.split(".", 2)
            timm_name = f"stages.{int(stage[5:]) - 1}.blocks.{int(unit[4:]) - 1}.{part}"
        loaded[name] = state[timm_name].reshape(tensor.shape)
    ours.load_state_dict(loaded)
    for module in ours.modules():
        if isinstance(module, StdConv2d):
            module.eps = 1e-8
    x = images(2, (64, 45))
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_stem_pads_with_zeros():
    stem = Stem(1)
    stem.conv = nn.Identity()
    negative = -torch.ones(1, 1, 3, 3)
    assert stem(negative).eq(0).all()
    assert F.max_pool2d(negative, 3, 2, padding=1).eq(-1).all()  # what it must not be


def test_projection_reads_the_preactivated_input_and_identity_the_bare_one():
    torch.manual_seed(0)
    for in_channels, stride in ((8, 2), (16, 1)):
        block = PreActBottleneck(in_channels, 16, stride, 4).double()
        nn.init.normal_(block.norm1.bias)
        x = images(2, (6, 6), torch.double).repeat(1, 6, 1, 1)[:, :in_channels]
        y = F.relu(block.norm1(x))
        shortcut = x if block.proj is None else block.proj(y)
        block.conv3.eps = 1e30  # silences the branch
        torch.testing.assert_close(block(x), shortcut, rtol=0, atol=1e-9)


# What a caller asks of it


def test_without_classes_it_gives_pooled_features():
    model = mini(0)
    x = images()
    assert isinstance(model.head, nn.Identity) and model.num_classes == 0
    features = model.features(x)
    assert tuple(features.shape) == (2, 512, 2, 2) and (features >= 0).all()
    torch.testing.assert_close(model(x), features.mean(dim=(2, 3)))
    out = model.intermediates(x)
    assert "logits" not in out
    torch.testing.assert_close(out["pre_logits"], model(x))


def test_intermediates_are_what_forward_computes():
    model, x = mini(), images()
    with torch.no_grad():
        out = model.intermediates(x)
        torch.testing.assert_close(out["logits"], model(x))
        torch.testing.assert_close(out["stage2"], model.block2(out["stage1"]))
        before = {name: tensor.clone() for name, tensor in out.items()}
        model.block2(out["stage1"])  # a block must not change what it is given
        assert all(torch.equal(out[name], before[name]) for name in out)


def test_a_new_head_is_zero_and_keeps_the_rest():
    model = mini(5, torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("head")}
    model.reset_head(9)
    assert model.num_classes == 9 and model.head.weight.dtype == torch.float64
    assert model(images(dtype=torch.float64)).eq(0).all()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    model.reset_head(0)
    assert isinstance(model.head, nn.Identity)


def test_backbone_has_no_gradient_until_the_head_has_moved():
    model = create_model(MINI, 4)
    x, y = images(4), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if step == 0:
            assert loss.item() == pytest.approx(math.log(4))
        assert (model.root.conv.weight.grad.abs().max().item() == 0) == (step == 0)
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("R51x1", "R50x1"), ("R50x1.25", "R50x"), ("R50x0", "R50x"), ("BiT-M-R101x3", "R101x3"), ("r50x1", "R50x1"),
     ("R26x0.3", "R26x0."), ("", "R"), ("R50x-1", "R50x1"), ("R50x1 ", "R50x1"), ("R050x1", "R50x1")],
)  # fmt: skip
def test_unknown_name(name, nearest):
    with pytest.raises(ValueError) as error:
        create_model(name)
    assert repr(name) in str(error.value) and f"did you mean '{nearest}" in str(error.value)
    assert "R<depth>x<width factor>" in str(error.value)


@pytest.mark.parametrize("name", ["R26x0.5", "R50x1.5", "R14x0.03125", "R26x1", "R101x2.0"])
def test_other_widths_work(name):
    with torch.device("meta"):
        assert tuple(create_model(name, 2)(torch.empty(1, 3, 32, 32)).shape) == (1, 2)
    assert create_model("R14x2.0", 0).name == "R14x2"


def test_bad_numbers_of_classes():
    with pytest.raises(ValueError, match="-1"):
        create_model(MINI, -1)
    for wrong in (2.5, "10", None):
        with pytest.raises(TypeError, match="whole number"):
            create_model(MINI, wrong)
    with pytest.raises(ValueError, match="quarter"):
        PreActBottleneck(8, 18, 1, 2)
    with pytest.raises(ValueError, match="groups"):
        PreActBottleneck(48, 192, 1, 32)


def test_bad_input():
    model = mini()
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\).*\(3, 32, 32\).*unsqueeze"):
        model(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match=r"\(2, 1, 32, 32\)"):
        model(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"\(2, 32, 32, 3\)"):
        model(torch.zeros(2, 32, 32, 3))
    with pytest.raises(TypeError, match="uint8.*normalize"):
        model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    for call in (model.features, model.intermediates):
        with pytest.raises(ValueError):
            call(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="channels"):
        model.block2(torch.zeros(1, 16, 8, 8))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 23), (33, 31), (64, 64)])
def test_any_image_size(size):
    model = mini()
    x = images(2, size)
    torch.testing.assert_close(model(x), plain(model)(x), rtol=1e-4, atol=1e-4)


def test_prints_on_one_screen():
    text = repr(create_model("R50x1", 10))
    assert len(text.splitlines()) < 40
    assert "R50x1" in text and "PreActBottleneck(256 -> 128 -> 512, stride=2, groups=32, shortcut=projection)" in text
    model = mini()
    model.block1.unit01.conv2 = nn.Sequential(model.block1.unit01.conv2)
    assert "norm3" in repr(model.block1.unit01)  # a part of the reader's own is not hidden


# The fused form


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", ["R14x0.25", "R26x0.5"])
def test_fused_form_equals_the_derivation(name, folded, monkeypatch):
    model = mini(5, torch.float64, name)
    if folded:
        model = fold_weight_standardization(model)
        model.requires_grad_()
    x = images(2, (37, 50), torch.float64)
    assert fused_calls(model, x, monkeypatch) == sum(BLOCKS[model_depth(model)])
    reference = plain(model)
    assert fused_calls(reference, x, monkeypatch) == 0
    torch.testing.assert_close(model(x), reference(x), rtol=1e-12, atol=1e-12)
    for ours, expected in zip(gradients(model, x), gradients(reference, x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def test_both_ways_of_a_training_step_are_taken(monkeypatch):
    """Early blocks compute again what they read, late ones overwrite; at inference all overwrite."""
    import bitlib.resnet

    model, x = mini(5, torch.float64, "R26x0.5"), images(8, (64, 64), torch.float64)
    taken = []
    for name in ("_recomputed", "_overwritten"):
        real = getattr(bitlib.resnet, name)
        monkeypatch.setattr(bitlib.resnet, name, lambda *a, name=name, real=real: taken.append(name) or real(*a))
    ours = gradients(model, x)
    assert taken[0] == "_recomputed" and taken[-1] == "_overwritten"
    taken.clear()
    with torch.no_grad():
        model(x)
    assert set(taken) == {"_overwritten"}
    for a, b in zip(ours, gradients(plain(model), x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * b.abs().max().item())


def model_depth(model: ResNetV2) -> int:
    return int(model.name[1:].split("x")[0])


def test_fused_gradients_and_their_gradients():
    torch.manual_seed(0)
    for arguments in ((8, 16, 2, 4), (16, 16, 1, 4)):
        block = PreActBottleneck(*arguments).double()
        x = torch.randn(2, arguments[0], 4, 3, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(block, (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(block, (x,), fast_mode=True)
        weights = list(block.parameters())

        def second(block=block, x=x, weights=weights):
            first = torch.autograd.grad(block(x).square().sum(), weights, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), weights)

        fused = second()
        block.fused = False
        for a, b in zip(fused, second(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("trainable", ["head", "norm", "conv", "block4", "input"])
def test_partly_frozen(trainable):
    """Where only some parameters are trained, they get the same gradients, and the others none."""
    model = mini(5, torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    x = images(2, dtype=torch.float64).requires_grad_(trainable == "input")
    reference, x2 = plain(model), x.detach().clone().requires_grad_(trainable == "input")
    model(x).square().sum().backward()
    reference(x2).square().sum().backward()
    for (name, ours), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (trainable not in name)
        if ours.grad is not None:
            torch.testing.assert_close(
                ours.grad, expected.grad, rtol=1e-9, atol=1e-9 * expected.grad.abs().max().item()
            )
    if trainable == "input":
        torch.testing.assert_close(x.grad, x2.grad)


def test_fused_form_keeps_less():
    """What forward leaves for backward, without parameters, in bytes; of many images, which outweigh the filters."""

    def kept(model):
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(images(64, (64, 64))).sum()
        total = sum(sizes.values())
        loss.backward()
        return total

    model = mini(name="R26x0.5")
    assert kept(plain(model)) > 1.5 * kept(model)


def test_fused_form_steps_aside(monkeypatch):
    x = images()
    assert fused_calls(mini(), x, monkeypatch) == 4
    hooked = mini()
    hooked.block2.unit01.conv2.register_forward_hook(lambda *args: None)
    assert fused_calls(hooked, x, monkeypatch) == 3
    dilated = mini()
    conv = dilated.block4.unit01.conv2
    conv.stride, conv.dilation, conv.padding = (1, 1), (2, 2), (2, 2)
    dilated.block4.unit01.proj.stride = (1, 1)
    assert fused_calls(dilated, x, monkeypatch) == 3
    assert tuple(dilated.features(x).shape) == (2, 512, 3, 3)
    for part in ("norm1", "norm2"):
        replaced = mini()
        replaced.block1.unit01.set_submodule(part, nn.Identity())
        assert fused_calls(replaced, x, monkeypatch) == 3
    assert fused_calls(mini(dtype=torch.bfloat16), x.bfloat16(), monkeypatch) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_calls(mini(), x, monkeypatch) == 0


def test_hooks_see_every_convolution():
    model, seen = mini(), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
    model(images())
    assert len(seen) == 1 + 4 * 4


# What PyTorch's users do to a model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model, x = mini(), images()
    expected = model.double()(x.double())
    model = mini().to(dtype)
    out = model(x.to(dtype))
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-4, torch.float64: 0.0, torch.bfloat16: 0.2}[dtype]
    assert (out.double() - expected).abs().max() <= tolerance * expected.abs().max() + 1e-12
    assert all(torch.isfinite(g).all() for g in gradients(model, x.to(dtype)))


def test_autocast():
    model, x = mini(), images()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
    reference = model(x)
    assert (out.float() - reference).abs().max() < 0.2 * reference.abs().max()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_memory_formats():
    """Weights and images may be laid out either way; the numbers stay, and gradients are laid out as the weights."""
    x = images(3, (45, 33), torch.float64)
    model = mini(dtype=torch.float64)
    assert model.block1.unit01.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    expected, expected_gradients = model(x), gradients(model, x)
    for weights in (torch.contiguous_format, torch.channels_last):
        for inputs in (torch.contiguous_format, torch.channels_last):
            other = copy.deepcopy(model).to(memory_format=weights)
            torch.testing.assert_close(other(x.contiguous(memory_format=inputs)), expected)
            for parameter, a, b in zip(other.parameters(), gradients(other, x), expected_gradients, strict=True):
                torch.testing.assert_close(a, b)
                assert a.stride() == parameter.stride() or 1 in a.shape
    block = model.block2.unit01
    y = torch.randn(2, 64, 5, 4, dtype=torch.double)
    torch.testing.assert_close(block(y), plain(block)(y))


def test_deepcopy_pickle_and_state_dict():
    model, x = mini(), images()
    expected = model(x)
    twin = copy.deepcopy(model)
    fresh = create_model(MINI, 5)
    result = fresh.load_state_dict(model.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    for other in (twin, fresh, pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    with torch.no_grad():
        twin.root.conv.weight.mul_(-1)
    assert torch.equal(model(x), expected)


@pytest.mark.slow
def test_compile():
    model, x = mini(), images()
    compiled = torch.compile(model)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
    for a, b in zip(gradients(compiled, x), gradients(model, x), strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm() + 1e-4


@pytest.mark.slow
def test_traces_whole_graph():
    """torch.compile's front end takes the whole network, training or not, without a break."""
    model, x = mini(), images()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
    compiled(x).sum().backward()
    assert model.root.conv.weight.grad is not None


def test_export():
    model, x = mini().eval(), images(3)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    for n in (1, 3, 5):
        x = images(n)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-3, atol=1e-4)


def test_functional_transforms():
    model = mini(dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = images(3, dtype=torch.float64)

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for (name, summed), g in zip(per_sample.items(), gradients(model, x), strict=True):
        torch.testing.assert_close(summed.sum(0), g, rtol=1e-8, atol=1e-8 * g.abs().max().item(), msg=name)


def test_gradient_checkpointing():
    model, x = mini(dtype=torch.float64), images(dtype=torch.float64)
    expected = gradients(model, x)

    class Checkpointed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    other = copy.deepcopy(model)
    other.block2 = Checkpointed(other.block2)
    for a, b in zip(gradients(other, x), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("error:Grad strides do not match")
def test_distributed_data_parallel(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no distributed package")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        model, x = mini(), images()
        expected = gradients(model, x)
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        for a, b in zip(gradients(wrapped, x), expected, strict=True):
            torch.testing.assert_close(a, b)
    finally:
        torch.distributed.destroy_process_group()


def test_folding_keeps_the_outputs():
    model, x = mini().eval(), images()
    folded = fold_weight_standardization(model)
    assert not any(isinstance(module, StdConv2d) for module in folded.modules())
    with torch.inference_mode():
        assert torch.equal(folded(x), model(x))


def test_committed_benchmark_can_be_read():
    """The chapter shows these fields; a quick run must not be committed."""
    import json

    from bitlib.data import shipped_file

    result = json.loads(shipped_file("results/bench_resnet.json").read_text())
    assert result["metadata"]["quick"] is False
    assert len(result["ratios"]) == 5
    for row in result["ratios"].values():
        assert set(row) == {"ratio", "needed", "aim"}
    for rows in result["times"].values():
        assert all(row["median_ms"] > 0 for row in rows.values())
