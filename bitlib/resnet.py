"""ResNet-v2 with pre-activation bottlenecks, from R50x1 to R152x4, and its mini variants.

Exported from chapters/04_resnet_v2.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "PreActBottleneck",
    "Stem",
    "BLOCKS",
    "MODELS",
    "ResNetV2",
    "create_model",
]

import difflib
import operator
import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlib.conv import StdConv2d, standardize
from bitlib.norm import GroupNorm


class PreActBottleneck(nn.Module):
    """The residual block of BiT: three convolutions, each after a norm and a ReLU, and a shortcut around them.

    (N, in_channels, H, W) becomes (N, out_channels, H/stride, W/stride), rounded up. The 1x1, 3x3 and 1x1
    convolutions work on out_channels / 4 channels, and the stride is the 3x3's. Where the shapes differ, the shortcut
    is a 1x1 convolution of the pre-activated input, without a norm of its own.
    Set `fused = False` on a block, or on the class, to run the equation as written instead of the faster equal form.
    """

    fused = True

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, num_groups: int = 32):
        super().__init__()
        if out_channels % 4:
            raise ValueError(
                f"a bottleneck works on a quarter of its output channels; 4 does not divide {out_channels}"
            )
        width = out_channels // 4
        self.norm1 = GroupNorm(num_groups, in_channels)
        self.conv1 = StdConv2d(in_channels, width, 1, bias=False)
        self.norm2 = GroupNorm(num_groups, width)
        self.conv2 = StdConv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm3 = GroupNorm(num_groups, width)
        self.conv3 = StdConv2d(width, out_channels, 1, bias=False)
        self.proj = None
        if stride != 1 or in_channels != out_channels:
            self.proj = StdConv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and _can_fuse(self, x):
            return _fused_bottleneck(self, x)
        y = F.relu(self.norm1(x))  # the pre-activation, which the projection reads as well
        shortcut = x if self.proj is None else self.proj(y)
        y = self.conv1(y)
        y = self.conv2(F.relu(self.norm2(y)))
        y = self.conv3(F.relu(self.norm3(y)))
        return y + shortcut

    def __repr__(self) -> str:
        if any(type(part) not in (GroupNorm, StdConv2d, nn.Conv2d) for part in self.children()):
            return super().__repr__()  # someone has put a part of their own in: show every part
        conv, shortcut = self.conv2, "identity" if self.proj is None else "projection"
        return (
            f"PreActBottleneck({self.conv1.in_channels} -> {conv.out_channels} -> {self.conv3.out_channels}, "
            f"stride={conv.stride[0]}, groups={self.norm1.num_groups}, shortcut={shortcut})"
        )


def _can_fuse(block: PreActBottleneck, x: Tensor) -> bool:
    """Whether the fast form of a block may stand in for the plain one, so that nobody can tell but by the clock.

    Not on other devices or in lower precision, where PyTorch's own kernels do better; not while a compiler or an
    exporter reads along; and not where a part of the block was replaced or is being watched by a hook.
    """
    if x.device.type != "cpu" or x.ndim != 4 or x.dtype not in (torch.float32, torch.float64):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    for part in block.children():
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return False
        if type(part) in (StdConv2d, nn.Conv2d):
            same = tuple(size // 2 for size in part.kernel_size)  # the padding that keeps the size
            if part.bias is not None or part.groups > 1 or part.dilation != (1, 1) or part.padding != same:
                return False
        elif type(part) is not GroupNorm:
            return False
        if part.weight.dtype != x.dtype:
            return False
    return x.shape[1] == block.norm1.num_channels


def _fused_bottleneck(block: PreActBottleneck, x: Tensor) -> Tensor:
    """PreActBottleneck.forward in the order of memory of its 3x3 filters, overwriting what nobody else reads."""
    pixels_inside = block.conv2.weight.is_contiguous()
    x = x.contiguous(memory_format=torch.contiguous_format if pixels_inside else torch.channels_last)
    filters = sum(part.weight.numel() for part in block.children() if isinstance(part, nn.Conv2d))
    step = _recomputed if torch.is_grad_enabled() and x.numel() > filters else _overwritten
    if block.proj is None:
        shortcut, (y,) = x, step(x, block.norm1, block.conv1)
    else:
        y, shortcut = step(x, block.norm1, block.conv1, block.proj)
    (y,) = step(y, block.norm2, block.conv2)
    (y,) = step(y, block.norm3, block.conv3)
    return y.add_(shortcut)


def _overwritten(x: Tensor, norm: GroupNorm, *convs: nn.Conv2d) -> list[Tensor]:
    """conv(relu(norm(x))) for each of the convolutions, the ReLU in place."""
    y = F.relu(norm(x), inplace=True)
    return [conv(y) for conv in convs]


def _recomputed(x: Tensor, norm: GroupNorm, *convs: nn.Conv2d) -> tuple[Tensor, ...]:
    """The same, keeping x alone for the way back."""
    # Without an epsilon the filters are taken as they are: folding has standardised them already.
    how = [(conv.stride[0], conv.eps if isinstance(conv, StdConv2d) else None) for conv in convs]
    weights = [conv.weight for conv in convs]
    return _NormReluConv.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, how, *weights)


class _NormReluConv(torch.autograd.Function):
    """Group norm, ReLU and standardised convolutions that keep only the input for the way back.

    What the convolutions read, relu(norm(x)), and the standardised filters are cheap to compute and large to keep:
    backward computes them again, from the means and deviations that forward saved.
    """

    @staticmethod
    def forward(ctx, x, gamma, beta, groups, eps, how, *weights):
        n, c, h, w = x.shape
        y, mu, rstd = torch.native_group_norm(x, gamma, beta, n, c, h * w, groups, eps)
        y.relu_()
        outputs, moments = [], []
        for (stride, ws_eps), weight in zip(how, weights, strict=True):
            mean = inverse = None
            if ws_eps is not None:
                filters = _filters(weight, weight)
                hat, mean, inverse = torch.native_layer_norm(filters, filters.shape[1:], None, None, ws_eps)
                weight = _unfilters(hat, weight)
            moments += [mean, inverse]
            outputs.append(F.conv2d(y, weight, stride=stride, padding=weight.shape[2] // 2))
        ctx.groups, ctx.eps, ctx.how = groups, eps, how
        ctx.save_for_backward(x, gamma, beta, mu, rstd, *weights, *moments)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        x, gamma, beta, mu, rstd, *rest = ctx.saved_tensors
        weights, moments = rest[: len(grads)], rest[len(grads) :]
        if torch.is_grad_enabled():  # someone will differentiate this gradient: leave it to autograd
            return _NormReluConv.plain_backward(ctx, grads, x, gamma, beta, *weights)
        n, c, h, w = x.shape
        scale = rstd.unsqueeze(2) * gamma.view(ctx.groups, -1)  # (N, G, C/G)
        shift = torch.addcmul(beta.view(ctx.groups, -1), mu.unsqueeze(2), scale, value=-1)
        y = torch.addcmul(shift.view(n, c, 1, 1), x, scale.view(n, c, 1, 1)).relu_()
        gy, gweights = None, []
        for i, (grad, weight, (stride, ws_eps)) in enumerate(zip(grads, weights, ctx.how, strict=True)):
            mean, inverse = moments[2 * i : 2 * i + 2]
            filters, hat = _filters(weight, weight), weight
            if ws_eps is not None:
                hat = _unfilters(torch.addcmul(-mean * inverse, filters, inverse), weight)
            wanted = (any(ctx.needs_input_grad[:3]), ctx.needs_input_grad[6 + i])
            part, gweight = _conv_backward(grad, y, hat, stride, *wanted)
            if ws_eps is not None and gweight is not None:
                gfilters, _, _ = torch.ops.aten.native_layer_norm_backward(
                    _filters(gweight, weight),
                    filters,
                    filters.shape[1:],
                    mean,
                    inverse,
                    None,
                    None,
                    [True, False, False],
                )
                gweight = _unfilters(gfilters, weight)
            gweights.append(gweight)
            gy = part if gy is None else gy.add_(part)
        if gy is None:  # nothing before the convolutions needs a gradient
            return None, None, None, None, None, None, *gweights
        torch.ops.aten.threshold_backward.grad_input(gy, y, 0, grad_input=gy)
        gx, ggamma, gbeta = torch.ops.aten.native_group_norm_backward(
            gy, x, mu, rstd, gamma, n, c, h * w, ctx.groups, ctx.needs_input_grad[:3]
        )
        return gx, ggamma, gbeta, None, None, None, *gweights

    @staticmethod
    def plain_backward(ctx, grads, x, gamma, beta, *weights):
        """The same gradients by autograd, which can differentiate them again."""
        outputs = []
        y = F.relu(F.group_norm(x, ctx.groups, gamma, beta, ctx.eps))
        for weight, (stride, ws_eps) in zip(weights, ctx.how, strict=True):
            hat = weight if ws_eps is None else standardize(weight, ws_eps)
            outputs.append(F.conv2d(y, hat, stride=stride, padding=hat.shape[2] // 2))
        inputs = (x, gamma, beta, *weights)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
        gx, ggamma, gbeta, *gweights = (next(found) if tensor.requires_grad else None for tensor in inputs)
        return gx, ggamma, gbeta, None, None, None, *gweights


def _conv_backward(grad: Tensor, y: Tensor, weight: Tensor, stride: int, needs_y: bool, needs_weight: bool):
    """The gradients of a convolution for y and for the weight; None for one that nobody needs."""
    padding, mask = weight.shape[2] // 2, [needs_y, needs_weight, False]
    return torch.ops.aten.convolution_backward(
        grad, y, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, mask
    )[:2]


def _filters(weight: Tensor, layout: Tensor) -> Tensor:
    """A view of the weight that keeps the numbers of a filter together, given a tensor laid out like it."""
    return weight if layout.is_contiguous() else weight.permute(0, 2, 3, 1)


def _unfilters(filters: Tensor, layout: Tensor) -> Tensor:
    """The inverse of _filters."""
    return filters if layout.is_contiguous() else filters.permute(0, 3, 1, 2)


class Stem(nn.Module):
    """From the image to the first feature map, at a quarter of the resolution.

    A standardised 7x7 convolution of stride 2, then a 3x3 maximum of stride 2 over a map padded with zeros, not with
    the minus infinity of nn.MaxPool2d(padding=1). (N, 3, H, W) becomes (N, out_channels, about H/4, about W/4).
    """

    def __init__(self, out_channels: int):
        super().__init__()
        self.conv = StdConv2d(3, out_channels, 7, stride=2, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(self.conv(x), (1, 1, 1, 1)), kernel_size=3, stride=2)


BLOCKS = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}  # residual blocks in each of the four stages, by depth

MODELS = (
    *("R50x1", "R50x2", "R50x3", "R50x4"),
    *("R101x1", "R101x2", "R101x3", "R101x4"),
    *("R152x1", "R152x2", "R152x3", "R152x4"),
    *("R14x0.25", "R26x0.25", "R26x0.5"),
)  # the names that the book uses; create_model takes every depth in BLOCKS at other widths too


class ResNetV2(nn.Module):
    """BiT's network: stem, four stages of PreActBottleneck, norm, ReLU, global average pool, linear head of zeros.

    blocks: residual blocks in each of the four stages. width_factor multiplies all channels.
    num_classes: outputs of the head; 0 leaves it out, and the model gives the pooled features.
    num_groups: groups of each norm; by default 32, or 32 * width_factor below width 1.
    image_size: the resolution that the model is meant for; it is recorded, not enforced.
    Takes float images (N, 3, H, W) in [-1, 1] and returns (N, num_classes), or (N, num_features).
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        width_factor: float = 1,
        num_classes: int = 1000,
        num_groups: int | None = None,
        name: str = "",
        image_size: int = 224,
    ):
        super().__init__()
        width = round(64 * width_factor)
        groups = num_groups or (32 if width_factor >= 1 else round(32 * width_factor))
        self.name, self.width_factor, self.image_size = name, width_factor, image_size
        self.root = Stem(width)
        channels = width
        for stage, n_blocks in enumerate(blocks, start=1):
            out_channels = width * 4 * 2 ** (stage - 1)
            units = OrderedDict()
            for unit in range(1, n_blocks + 1):
                stride = 2 if stage > 1 and unit == 1 else 1
                units[f"unit{unit:02d}"] = PreActBottleneck(channels, out_channels, stride, groups)
                channels = out_channels
            self.add_module(f"block{stage}", nn.Sequential(units))
        self.norm = GroupNorm(groups, channels)
        self.num_features = channels
        self.reset_head(num_classes)
        self.lay_out_filters()

    def lay_out_filters(self) -> None:
        """Put the filters in the order of memory that is fastest on a CPU; neither shapes nor values change.

        The channels lie innermost, but for the last stage, where filters outweigh maps. 1x1 filters have no order.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 4 and parameter.shape[2:] != (1, 1):
                last = torch.contiguous_format if name.startswith("block4.") else torch.channels_last
                parameter.data = parameter.data.contiguous(memory_format=last)

    def reset_head(self, num_classes: int) -> None:
        """Give the model a new head of zeros with num_classes outputs, or none with 0."""
        try:
            num_classes = operator.index(num_classes)
        except TypeError:
            raise TypeError(f"num_classes is a whole number; got {num_classes!r}") from None
        if num_classes < 0:
            raise ValueError(f"num_classes is 0 (no head: pooled features) or more; got {num_classes}")
        self.num_classes = num_classes
        if num_classes == 0:
            self.head = nn.Identity()
            return
        gain = self.norm.weight  # for the device and dtype of the rest
        self.head = nn.Linear(self.num_features, num_classes, device=gain.device, dtype=gain.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """The last feature map, after norm and ReLU: (N, num_features, about H/32, about W/32), none negative."""
        x = self.root(_as_images(x))
        x = self.block4(self.block3(self.block2(self.block1(x))))
        return F.relu(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))

    def intermediates(self, x: Tensor) -> dict[str, Tensor]:
        """What the network computes on its way, under big_vision's names, in the order of computation.

        "stem" and "stage1" to "stage4" are feature maps (each stage before the norm that follows it), "pre_logits"
        the pooled features (N, num_features), "logits" the output of the head, absent from a model without one.
        """
        out = {"stem": self.root(_as_images(x))}
        y = out["stem"]
        for stage in range(1, 5):
            y = out[f"stage{stage}"] = self.get_submodule(f"block{stage}")(y)
        out["pre_logits"] = F.relu(self.norm(y)).mean(dim=(2, 3))
        if self.num_classes:
            out["logits"] = self.head(out["pre_logits"])
        return out

    def extra_repr(self) -> str:
        millions = sum(p.numel() for p in self.parameters()) / 1e6
        return f"{self.name or 'unnamed'}, {millions:.1f} million parameters, image_size={self.image_size}"


def _as_images(x: Tensor) -> Tensor:
    """The batch with its channels innermost in memory. Raises where it is not a batch of float images."""
    if x.ndim != 4 or x.shape[1] != 3:
        hint = "; one image alone: image.unsqueeze(0)" if x.ndim == 3 else ""
        raise ValueError(f"the network takes a batch of images of shape (N, 3, H, W); got {tuple(x.shape)}{hint}")
    if not x.is_floating_point():
        raise TypeError(f"the network takes float images in [-1, 1]; got {x.dtype}: use bitlib.data.normalize first")
    if torch._C._are_functorch_transforms_active():
        return x  # vmap knows no layouts
    return x.contiguous(memory_format=torch.channels_last)


def create_model(name: str, num_classes: int = 1000) -> ResNetV2:
    """A network by its name, such as "R50x1" (depth 50, width factor 1) or the mini "R26x0.25", with random weights.

    num_classes: outputs of the head, which starts at zero; 0 gives the pooled features instead.
    Raises ValueError for a name that no network has, and names the nearest that one has.
    """
    match = re.fullmatch(r"R([1-9][0-9]*)x([0-9]+(?:\.[0-9]+)?)", name)
    depth, width_factor = (int(match[1]), float(match[2])) if match else (0, 0.0)
    # Whole groups: below width 1 there are 32 * width_factor of them, above it 64 * width_factor channels share 32.
    whole = (width_factor * (32 if width_factor < 1 else 2)).is_integer()
    if depth not in BLOCKS or not width_factor or not whole:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0)[0]
        raise ValueError(
            f"there is no model {name!r}; did you mean {near!r}? A name is R<depth>x<width factor>: the depth one of "
            f"{', '.join(map(str, BLOCKS))}, the width factor a multiple of 1/32 below 1 and of 1/2 above"
        )
    image_size = 224 if width_factor >= 1 else 64  # the minis are pre-trained at 64
    return ResNetV2(BLOCKS[depth], width_factor, num_classes, name=f"R{depth}x{width_factor:g}", image_size=image_size)
