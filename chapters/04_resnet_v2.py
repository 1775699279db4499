# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   bitlib:
#     module: resnet
#     summary: ResNet-v2 with pre-activation bottlenecks, from R50x1 to R152x4, and its mini variants.
# ---

# %% [markdown]
# # ResNet-v2
#
# At the end of this chapter you have BiT's network, from the mini that trains in minutes to R152x4 with its 928
# million parameters, as one short module that you can prove equal to timm's and that, in float32 on a CPU, runs
# somewhat faster.
#
# **Runtime:** about a minute on two CPU cores. **Builds on:** the group normalization and the weight
# standardization of the two chapters before.

# %% tags=["setup", "remove-cell"]
# Does nothing outside Colab; there it installs the book's package and what the chapters need.
import sys

if "google.colab" in sys.modules:
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", 'install -q "bitlib[book] @ git+https://github.com/OWNER/REPOSITORY"')

# %% tags=["export"]
import difflib
import operator
import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlib.conv import StdConv2d, standardize
from bitlib.norm import GroupNorm

# %%
import json

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits, load_sample_image

from bitlib.conv import fold_weight_standardization
from bitlib.data import normalize, shipped_file

plt.style.use(shipped_file("book.mplstyle"))

# %% [markdown]
# ## The problem: depth alone does not help
#
# Norms and standardised convolutions keep the scale of the signal right. Is that not enough to stack layers as
# high as we like? Let us try: small images of handwritten digits, a stem, a stack of $n$ units of two 3×3
# convolutions with 16 channels, and a linear head. The units come in three forms:
#
# - **plain**: convolution, norm, ReLU, twice;
# - **post-activation**, as in the first ResNet {cite}`he2016deep`: the input is added, and *then* comes the last ReLU;
# - **pre-activation**, as in ResNet-v2 {cite}`he2016identity`: norm and ReLU come before each convolution, and
#   nothing comes after the addition.


# %%
class Unit(nn.Module):
    """Two 3x3 convolutions with a norm and a ReLU each, and one of three shortcuts."""

    def __init__(self, kind, channels=16):
        super().__init__()
        self.kind = kind
        self.conv1, self.conv2 = (StdConv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (GroupNorm(4, channels) for _ in range(2))

    def forward(self, x):
        if self.kind == "pre-activation":
            return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y) if self.kind == "plain" else F.relu(x + y)


class Stack(nn.Module):
    """A stem, n units of one kind, norm, ReLU, average pool, linear."""

    def __init__(self, kind, n_units, channels=16):
        super().__init__()
        self.stem = StdConv2d(1, channels, 3, padding=1, bias=False)
        self.units = nn.ModuleList(Unit(kind, channels) for _ in range(n_units))
        self.norm, self.head = GroupNorm(4, channels), nn.Linear(channels, 10)

    def forward(self, x, seen=None):
        x = self.stem(x)
        for unit in self.units:
            x = unit(x)
            if seen is not None:
                x.retain_grad()
                seen.append(x)
        return self.head(F.relu(self.norm(x)).mean(dim=(2, 3)))


KINDS = ("plain", "post-activation", "pre-activation")
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
labels = torch.tensor(digits.target)

# %% [markdown]
# Before any training, one backward pass through 64 units tells us most of the story. We record the gradient of
# the loss at the output of every unit. What do you expect of the plain stack, whose every convolution is normalised:
# does its gradient shrink on the way down, stay, or grow?


# %%
def gradient_norms(kind, n_units, seed):
    """The norm of the loss's gradient at the output of each unit, at initialisation."""
    torch.manual_seed(seed)
    net, seen = Stack(kind, n_units), []
    F.cross_entropy(net(images[:64], seen), labels[:64]).backward()
    return [x.grad.norm().item() for x in seen]


norms = {kind: torch.tensor([gradient_norms(kind, 64, seed) for seed in range(3)]) for kind in KINDS}
growth = {kind: norms[kind][:, 0] / norms[kind][:, -1] for kind in KINDS}  # first unit over last, by seed
assert growth["plain"].min() > 1e8
assert max(growth["post-activation"].max(), growth["pre-activation"].max()) < 100
for kind in KINDS:
    orders = growth[kind].log10().mean().item()
    print(f"{kind:16s} from the last unit down to the first, the gradient grows by 10 to the power {orders:.0f}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Norm of the gradient at each of 64 units, on a logarithmic axis, three seeds for each kind of unit. From the last unit down to the first the gradient of the plain stack grows steadily by ten orders of magnitude; those of the two residual stacks rise by no more than two orders of magnitude."}}
fig, ax = plt.subplots()
for kind, style in zip(KINDS, ("-", "--", "-."), strict=True):
    for seed in range(3):
        ax.semilogy(
            range(1, 65), norms[kind][seed], style, color=f"C{KINDS.index(kind)}", label=kind if seed == 0 else None
        )
ax.set(xlabel="unit", ylabel="norm of the gradient at its output", title="At initialisation, 64 units, three seeds")
ax.legend()
plt.show()

# %% [markdown]
# It *explodes*. Normalization holds the forward signal, but the way back multiplies by the Jacobian of each of the 128
# layers, and such a product grows (or, with other scales, shrinks) exponentially. In the two residual stacks it grows by
# one or two powers of ten over the whole depth. Can the plain one be trained nevertheless? Eighty steps of SGD with momentum, 40 units:


# %% tags=["nbval-ignore-output"]
def final_loss(kind, seed, n_units=40, steps=80, lr=0.05):
    """Mean training loss over the last ten steps."""
    torch.manual_seed(seed)
    net = Stack(kind, n_units)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        batch = torch.randint(0, 1500, (64,))
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


loss_of = {kind: [final_loss(kind, seed) for seed in range(3)] for kind in KINDS}
for kind, losses in loss_of.items():
    print(f"{kind:16s}", " ".join(f"{loss:.2f}" for loss in losses))

# %%
guessing = np.log(10)  # the loss of ten equal probabilities
assert min(loss_of["plain"]) > guessing - 0.3  # has learned next to nothing
assert max(loss_of["post-activation"] + loss_of["pre-activation"]) < guessing - 0.5  # both have learned

# %% [markdown]
# The plain stack has not left the loss of guessing, 2.3; both residual ones have. So shortcuts are what depth
# needs. Where the ReLU stands is a finer point, which forty units do not decide; it is about what happens when stages
# are stacked to hundreds of layers, and the next section is the argument.
#
# ## Identity mappings
#
# With nothing after the addition, unit $l$ computes
#
# $$x_{l+1} = x_l + \mathcal F(x_l, W_l), \qquad\text{so}\qquad x_L = x_l + \sum_{i=l}^{L-1} \mathcal F(x_i, W_i)$$
#
# for *any* two depths $l < L$ {cite}`he2016identity`. A later map is an earlier one plus a sum. The gradient of a
# loss $\mathcal E$ inherits the sum:
#
# $$\frac{\partial \mathcal E}{\partial x_l} = \frac{\partial \mathcal E}{\partial x_L}
# \Big(1 + \frac{\partial}{\partial x_l} \sum_{i=l}^{L-1} \mathcal F(x_i, W_i)\Big).$$
#
# The 1 carries the gradient at the top to every unit below, undiminished, whatever the weights are. A ReLU after
# the addition, as in the first ResNet, breaks the sum: $x_{l+1} = \max(0, x_l + \mathcal F(x_l, W_l))$ can only
# keep what is positive. To see the 1 alone, silence the branches, $\mathcal F = 0$, and send a gradient of ones down
# eight units.

# %%
torch.manual_seed(0)
for kind in KINDS[1:]:
    net = Stack(kind, 8)
    for unit in net.units:
        unit.conv2.register_forward_hook(lambda module, args, output: 0 * output)
    x = torch.randn(64, 16, 8, 8, requires_grad=True)
    y = x
    for unit in net.units:
        y = unit(y)
    y.sum().backward()
    expected = torch.ones_like(x) if kind == "pre-activation" else (x > 0).float()
    torch.testing.assert_close(x.grad, expected)
    print(f"{kind:16s} {100 * x.grad.mean():3.0f} % of the gradient arrives")

# %% [markdown]
# ## The block
#
# For deep networks two 3×3 convolutions on many channels are too expensive. The **bottleneck** {cite}`he2016deep`
# works on a quarter of the channels: a 1×1 convolution down, a 3×3 there, a 1×1 up again. With the norm and
# the ReLU before each of them this is BiT's block. Let us walk through one that also halves the resolution, the
# first of the second stage.

# %%
torch.manual_seed(0)
x = torch.randn(2, 256, 56, 56)  # (N, C, H, W)
norm1, norm2, norm3 = GroupNorm(32, 256), GroupNorm(32, 128), GroupNorm(32, 128)
conv1 = StdConv2d(256, 128, 1, bias=False)  # down to a quarter of the block's 512 output channels
conv2 = StdConv2d(128, 128, 3, stride=2, padding=1, bias=False)  # the stride stands here
conv3 = StdConv2d(128, 512, 1, bias=False)

y1 = F.relu(norm1(x))
y2 = F.relu(norm2(conv1(y1)))
y3 = F.relu(norm3(conv2(y2)))
branch = conv3(y3)
for name, tensor in {"x": x, "y1": y1, "y2": y2, "y3": y3, "branch": branch}.items():
    print(f"{name:6s} {tuple(tensor.shape)}")

# %% [markdown]
# `branch` cannot be added to `x`: it has twice the channels and half the resolution. Where that happens, once in
# each stage, the shortcut is a **projection**, a 1×1 convolution with the block's stride. Two details matter to
# anyone who wants to load BiT's weights:
#
# - it reads the **pre-activated** input `y1`, not `x`: the norm and the ReLU stand before the fork;
# - it has no norm of its own, and nothing follows the addition.

# %%
proj = StdConv2d(256, 512, 1, stride=2, bias=False)
out = branch + proj(y1)
print("out   ", tuple(out.shape))
print("reading x instead would change it by", f"{((proj(x) - proj(y1)).norm() / out.norm()).item():.1f}", "of its norm")

# %% [markdown]
# A stride of 2 on a 1×1 convolution throws three quarters of the pixels away unseen. The projection does that, on
# the shortcut; on the branch BiT leaves it to the 3×3, which sees them all. Here is the block as a module. Its
# forward pass is the lines above, but for the first two, which the next section explains.


# %% tags=["export"]
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


# %% [markdown]
# ## The same block, faster
#
# *You can skip this section at a first reading: it changes no number, only time and memory.*
#
# The block as written is fast on a GPU. On a CPU three things cost more than they need to.
#
# **The order of the numbers in memory.** If the channels of a pixel lie side by side (PyTorch calls it
# `channels_last`; the shape stays (N, C, H, W)), a 1×1 convolution is one product of matrices, with a row for every
# pixel, and no library has to rearrange anything. So the network works in this order, all but its last stage: there
# the maps are small, the filters are large, and rearranging the maps costs less than rearranging the filters.
#
# **Nobody else reads it.** A norm keeps its input for the way back, not its output, and a convolution keeps what it
# read, not what it gave. So the ReLU may overwrite the one and the sum with the shortcut the other.
#
# **What is cheap to compute need not be kept.** For the way back, autograd keeps the input $x$ of each norm, the
# output $y$ of each ReLU and the standardised filters $\hat W$. But $y$ is one multiplication and one addition away
# from $x$: with the mean $\mu$ and the deviation $\sigma$ of the group, which are tiny,
#
# $$y = \max\Big(0,\ \gamma\,\frac{x - \mu}{\sigma} + \beta\Big) = \max(0,\ a x + b),
# \qquad a = \frac{\gamma}{\sigma},\quad b = \beta - a \mu,$$
#
# and $\hat W = (W - \mu_W) / \sigma_W$ is just as near to $W$. So we can keep $x$, $W$ and the moments, and compute
# $y$ and $\hat W$ again when the gradient comes by. That pays where the maps outweigh the filters: $y$ is large there,
# and the $\hat W$ that must be computed again is small. To do it, norm, ReLU and convolution become one
# `torch.autograd.Function` with a backward pass by hand. Its parts are PyTorch's own kernels, so there is nothing to
# compile.


# %% tags=["export"]
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


# %% tags=["export"]
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


# %% [markdown]
# That is more code than the equation needed, so it had better be the same function. In float64 we compare the
# outputs and every gradient of both forms of a block, with and without a projection, then let PyTorch compare our
# backward pass with finite differences, first and second derivatives.


# %%
def largest_difference(block, x):
    """Between the fused and the plain form of a block: outputs and all gradients, relative to the largest value."""
    results = []
    for fused in (True, False):
        block.fused = fused
        leaf = x.clone().requires_grad_()
        y = block(leaf)
        grads = torch.autograd.grad(y.square().sum(), [leaf, *block.parameters()])
        results.append([y.detach(), *grads])
    del block.fused  # back to the default of the class
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))


torch.manual_seed(0)
for arguments in ((16, 32, 2, 4), (16, 32, 1, 4), (32, 32, 1, 8)):
    block = PreActBottleneck(*arguments).double()
    for norm in (block.norm1, block.norm2, block.norm3):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    difference = largest_difference(block, torch.randn(3, arguments[0], 7, 6, dtype=torch.double))
    assert difference < 1e-12
    print(f"{block}: equal to 12 digits")

small, x = PreActBottleneck(8, 16, 2, 4).double(), torch.randn(2, 8, 4, 3, dtype=torch.double, requires_grad=True)
print("first derivatives:", torch.autograd.gradcheck(small, (x,), fast_mode=True))
print("second derivatives:", torch.autograd.gradgradcheck(small, (x,), fast_mode=True))

# %% [markdown]
# The fused form steps aside, for the plain one, on a GPU, under autocast, while `torch.compile` or `torch.export`
# reads along, and where a hook watches a part of the block. Setting `PreActBottleneck.fused = False` turns it off.
# How much it gains is measured [below](how-fast), once there is a whole network to measure.

# %% [markdown]
# ## The stem
#
# Before the first block the image shrinks to a quarter of its size: a 7×7 convolution of stride 2, and a 3×3
# maximum of stride 2. No norm, no ReLU: each block brings its own. One detail is easily missed:
# BiT pads the map with **zeros** before the maximum. PyTorch's `MaxPool2d(padding=1)` pads with $-\infty$, so that the
# padding never wins. Where all values in a window at the border are negative, the two differ. Predict both
# corners:

# %%
window = -torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)  # -1 to -9
print(window[0, 0])
print("zeros:     ", F.max_pool2d(F.pad(window, (1, 1, 1, 1)), 3, 2).flatten().tolist())
print("-infinity: ", F.max_pool2d(window, 3, 2, padding=1).flatten().tolist())

# %% [markdown]
# All four windows of this map touch the border, so zero wins them all. On real images it is the rim of the map
# that changes. How much of the rim? After a standardised convolution about half of all numbers are negative, and a
# window of four or six of them is all negative now and then:


# %%
def photograph(size=224):
    """A centre crop of a photograph that scikit-learn ships, as a batch of one in [-1, 1]."""
    image = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return normalize(image[:, top : top + size, left : left + size])[None]


# %% tags=["export"]
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


# %%
torch.manual_seed(0)
stem = Stem(64)
image = photograph()
with torch.no_grad():
    ours, other = stem(image), F.max_pool2d(stem.conv(image), 3, 2, padding=1)
differs = (ours != other)[0].float().mean(dim=0)  # share of the channels, by place: (56, 56)
inside = differs[1:, 1:]
assert inside.max() == 0
print(f"stem: {tuple(image.shape)} -> {tuple(ours.shape)}")
print(f"differs in {100 * differs[0].mean():.0f} % of the top row, {100 * inside.mean():.0f} % of the inside")

# %% [markdown]
# ## The network
#
# Four stages of blocks follow. In each, the first block doubles the channels (from the stem's 64 to 256 in the first
# stage) and, from the second stage on, halves the resolution. Then norm and ReLU, which the last block still
# lacks, the mean over all places, and a linear layer. A name such as R101x3 says the rest: the depth says how many
# blocks each stage has, and the **width factor** multiplies every number of channels.
#
# The depth counts the layers with weights: three in each block, the stem and the head. Check it below: do
# (3, 4, 6, 3) blocks make 50 layers?

# %% tags=["export"]
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


# %%
for depth, blocks in BLOCKS.items():
    assert 3 * sum(blocks) + 2 == depth
    print(f"R{depth}: {blocks} blocks, 3 x {sum(blocks)} + 2 = {depth} layers")

# %% [markdown]
# R14 and R26 are our **minis**: the same code at a depth and width that two CPU cores can pre-train. One thing
# must scale with the width: the groups of the norm. R50x1 has 64 channels in its narrowest norm, so each of its 32
# groups has 2 channels. At a quarter of the width, 32 groups would not even divide 16 channels. Below width 1 we
# therefore take 32 times the width factor groups, 8 at width 0.25: every group has as many channels as in R50x1.


# %% tags=["export"]
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


# %% tags=["export"]
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


# %% [markdown]
# `intermediates` gives what the network computes on its way, under the names that BiT's authors use in
# `big_vision`. Before you run it: what is the resolution after each stage, for an image of 224×224?

# %%
torch.manual_seed(0)
model = create_model("R50x1")
with torch.no_grad():
    steps = model.intermediates(image)
for name, tensor in steps.items():
    print(f"{name:11s} {tuple(tensor.shape)}")
torch.testing.assert_close(steps["pre_logits"], model.features(image).mean(dim=(2, 3)))
torch.testing.assert_close(steps["logits"], model(image))

# %% [markdown]
# And a mini, printed. `num_classes=0` leaves the head away, and the model gives the pooled features.

# %%
mini = create_model("R26x0.25", num_classes=0)
print(mini)
print(tuple(mini(torch.zeros(1, 3, 64, 64)).shape))
for norm in (module for module in mini.modules() if isinstance(module, GroupNorm)):
    assert norm.num_groups == 8 and norm.num_channels % 8 == 0

# %% [markdown]
# Wrong input is refused with a word on what would be right.

# %%
for wrong in (lambda: create_model("R51x1"), lambda: create_model("R50x1", -1), lambda: mini(image[0]),
              lambda: mini(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))):  # fmt: skip
    try:
        wrong()
    except (ValueError, TypeError) as error:
        print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ## A head of zeros
#
# The head starts at zero, weight and bias. So every class begins with the same probability, and the first loss is
# $\ln K$, whatever the backbone says. There is a second consequence. With logits $z = W_h f$ of the features $f$,
#
# $$\frac{\partial \mathcal E}{\partial f} = W_h^\top \frac{\partial \mathcal E}{\partial z} = 0
# \qquad\text{while } W_h = 0:$$
#
# the backbone $\theta$ gets *no* gradient until the head has taken its first step.

# %%
torch.manual_seed(0)
model = create_model("R14x0.25", num_classes=10)
x, y = torch.randn(8, 3, 64, 64), torch.arange(8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(2):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    head = model.head.weight.grad.norm()
    backbone = sum(p.grad.square().sum() for name, p in model.named_parameters() if not name.startswith("head")).sqrt()
    assert (backbone == 0) == (step == 0) and head > 0
    print(f"step {step}: loss {loss:.4f}, gradient of the head {head:.3f}, of the backbone {backbone:.3f}")
    optimizer.step()

# %% [markdown]
# ## How large are they?
#
# PyTorch's `meta` device computes shapes without numbers, so that even R152x4, which takes 3.7 GB, costs nothing
# to build and to run. A convolution does, for each number that it puts out, one multiplication and addition for
# each weight of its filter; hooks add them up.


# %%
def multiply_adds(model, size=224):
    """Multiplications (each with an addition) of all convolutions and linear layers for one image, by module name."""
    counts, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def count(module, args, output, name=name):
                counts[name] = output.numel() * module.weight[0].numel()

            hooks.append(module.register_forward_hook(count))
    model(torch.empty(1, 3, size, size, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return counts


backbone, with_head, macs = {}, {}, {}
for name in MODELS:
    with torch.device("meta"):
        model = create_model(name, 1000)
        with_head[name] = sum(p.numel() for p in create_model(name, 21843).parameters())
    backbone[name] = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.head.parameters())
    macs[name] = multiply_adds(model)

print("            parameters,         with 21,843   billion multiply-adds")
print("            without the head    classes       at 224x224, 1000 classes")
for name in MODELS:
    print(f"{name:9s} {backbone[name]:>14,d} {with_head[name]:>18,d} {sum(macs[name].values()) / 1e9:>12.2f}")

# %% [markdown]
# Compare with what is published. The paper gives its largest model 928 million parameters
# {cite}`kolesnikov2020big`: that is R152x4 *without* its head. The original ResNets are listed with 3.8, 7.6 and 11.3
# billion multiply-adds {cite}`he2016deep`; ours need more. Can you say why, before reading on?
#
# It is the stride. The original bottleneck has it on its first 1×1, which then makes a quarter as many numbers; in
# BiT that convolution runs at full resolution. Taking the difference away reproduces the old figures.

# %%
assert round(backbone["R152x4"] / 1e6) == 928
assert with_head["R50x1"] == 68_256_659  # as timm counts for resnetv2_50x1_bit
for name, published in {"R50x1": 3.8, "R101x1": 7.6, "R152x1": 11.3}.items():
    first = sum(macs[name][f"block{stage}.unit01.conv1"] for stage in (2, 3, 4))
    ours, original = sum(macs[name].values()) / 1e9, (sum(macs[name].values()) - 0.75 * first) / 1e9
    assert abs(original - published) < 0.1
    print(f"{name}: {ours:.2f}; with the stride on the first 1x1 {original:.2f}; published {published}")

# %% [markdown]
# Widening by 4 multiplies almost everything by 16, because a convolution's weights grow with both its inputs and
# its outputs; three times the depth, R152 for R50, costs less than three times as much. BiT goes both ways.
#
# ## What does one number see?
#
# The **receptive field** of a number in the last map is the square of the image that can influence it through the
# convolutions. Going through the layers, let $r$ be the field's side and $j$ the distance, in pixels of the image, of
# two neighbours in the map. A layer with a $k \times k$ window and stride $s$ makes
#
# $$r \leftarrow r + (k - 1)\, j, \qquad j \leftarrow s\, j.$$


# %%
def receptive_field(depth):
    """Side, in pixels, of the square that a number of the last map sees through a network of this depth."""
    r, j = 1, 1
    layers = [(7, 2), (3, 2)]  # the stem
    for stage, n_blocks in enumerate(BLOCKS[depth], start=1):
        for unit in range(1, n_blocks + 1):
            layers.append((3, 2 if stage > 1 and unit == 1 else 1))  # a 1x1 adds nothing
    for k, s in layers:
        r, j = r + (k - 1) * j, s * j
    return r


print({f"R{depth}": receptive_field(depth) for depth in BLOCKS})

# %% [markdown]
# We can also measure it. The gradient of one number of the last map with respect to the image is zero outside the
# field. For the gradient to be non-zero everywhere inside it, nothing may cancel: we take the norms out, make
# every filter an average (all weights positive), and feed a positive image, so that no ReLU closes.


# %%
def input_gradient(model, size):
    """The absolute gradient of the central place of the last map, over all channels, for every pixel: (size, size)."""
    torch.manual_seed(0)
    x = torch.rand(1, 3, size, size, dtype=torch.double, requires_grad=True)
    centre = model.features(x)[0, :, size // 64, size // 64].sum()
    return torch.autograd.grad(centre, x)[0].abs().sum(dim=(0, 1))


def averaging(model):
    """A copy without norms in which every filter is an average."""
    model = fold_weight_standardization(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, GroupNorm):
            model.set_submodule(name, nn.Identity())
        elif isinstance(module, nn.Conv2d):
            module.weight.data.fill_(1 / module.weight[0].numel())
    return model


measured = {}
for depth, size in {14: 160, 26: 320, 50: 640}.items():
    model = create_model(f"R{depth}x0.25", 0).double()
    seen = input_gradient(averaging(model), size) > 0
    measured[depth] = (seen.any(dim=0).sum().item(), seen.any(dim=1).sum().item())
    assert measured[depth] == (receptive_field(depth),) * 2
print("measured:", measured)

# %% [markdown]
# So from R50 on, a number in the middle of the last map sees past a 224×224 image on every side. But *seeing* is not *using*.
# With its own random weights the same network listens mostly to the middle of its field: many more paths lead
# from there. And a second thing comes to light: with the norms in place the gradient is zero nowhere, even
# outside the field. Group norm takes its mean over the whole map, and through it every pixel reaches every number.

# %%
torch.manual_seed(0)
model = create_model("R26x0.25", 0).double()
real, ideal = input_gradient(model, 320), input_gradient(averaging(model), 320)
outside = (ideal == 0).flatten()
share_outside = real.flatten()[outside].sum() / real.sum()
assert (real > 0).all() and 0 < share_outside < 0.5
half = real.flatten().sort(descending=True).values.cumsum(0) < real.sum() / 2
print(f"the field covers {100 * (~outside).float().mean():.0f} % of the image")
print(
    f"half of the gradient lies in {100 * half.float().mean():.0f} % of the image, {100 * share_outside:.0f} % outside the field"
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two maps over a 320 by 320 image, on a logarithmic grey scale. Left, without norms and with averaging filters: a sharp square of 195 pixels, brightest at its centre. Right, the real network with random weights: brightest at the centre too, but non-zero over the whole image, because of group norm."}}
fig, axes = plt.subplots(1, 2, sharey=True)
for ax, gradient, title in zip(axes, (ideal, real), ("averages, no norm", "real weights, group norm"), strict=True):
    level = (gradient / gradient.max()).clamp(min=1e-6).log10()
    shown = ax.imshow(level, vmin=-6, vmax=0)
    ax.set(title=title, xlabel="pixel")
    ax.grid(False)
axes[0].set_ylabel("pixel")
fig.colorbar(shown, ax=axes, label="gradient, powers of ten below the largest", shrink=0.8)
plt.show()

# %% [markdown]
# ## What the maps look like
#
# Here are the first channels of what R50x1 computes from a photograph. The weights are random, so nothing has been
# learned yet; what you see is the architecture: maps that shrink and multiply, edges and areas that survive even
# random filters, and numbers that grow from block to block because every block adds to the sum.

# %% tags=["hide-input"] mystnb={"image": {"alt": "A photograph of a Chinese temple, and below it a row of four maps for each of stem and stages 1, 2 and 3 of R50x1 with random weights: outlines of roof and trees at the stem and in stage 1, coarser and blockier in stages 2 and 3."}}
rows = ("stem", "stage1", "stage2", "stage3")
fig, axes = plt.subplots(len(rows), 5, figsize=(6.4, 5.2))
for row, name in zip(axes, rows, strict=True):
    row[0].imshow((image[0].permute(1, 2, 0) + 1) / 2)
    row[0].set_ylabel(f"{name}\n{tuple(steps[name].shape[1:])}", rotation=0, ha="right", va="center")
    for channel, ax in enumerate(row[1:]):
        ax.imshow(steps[name][0, channel], cmap="gray")
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
plt.show()

# %% [markdown]
# The growth is worth a number. Within a stage, each branch ends in a standardised convolution and adds about the same
# variance as the one before; a projection starts a new sum. Nobody minds, because only norms read the sum. In which
# stage do you expect it to grow most?

# %%
variances = {name: steps[name].var().item() for name in ("stem", "stage1", "stage2", "stage3", "stage4")}
print({name: float(f"{value:.2g}") for name, value in variances.items()})
assert list(variances.values())[1:] == sorted(list(variances.values())[1:])

# %% [markdown]
# ## Proof: the same network as timm's
#
# timm {cite}`wightman2019timm` has BiT's networks under names such as `resnetv2_50x1_bit`. We copy random weights from
# ours, tensor by tensor, and compare logits. Two differences need care: timm's epsilon is 1e-8 in the
# weight standardization, so we set ours to that; and its head is a 1×1 convolution.


# %%
def timm_name(name):
    """timm's name for one of our parameters: block1.unit01.conv1.weight is stages.0.blocks.0.conv1.weight there."""
    if match := re.fullmatch(r"block(\d)\.unit(\d\d)\.(.+)", name):
        part = match[3].replace("proj.", "downsample.conv.")
        return f"stages.{int(match[1]) - 1}.blocks.{int(match[2]) - 1}.{part}"
    return name.replace("root.", "stem.").replace("head.", "head.fc.")


import timm  # noqa: I001, only to compare with

torch.manual_seed(0)
ours = create_model("R50x1", num_classes=10).eval()
for parameter in ours.parameters():
    if parameter.ndim < 2:
        nn.init.normal_(parameter, mean=1.0, std=0.3)  # gains and biases that matter
nn.init.normal_(ours.head.weight, std=0.02)
theirs = timm.create_model("resnetv2_50x1_bit", pretrained=False, num_classes=10).eval()
shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
theirs.load_state_dict({timm_name(n): t.reshape(shapes[timm_name(n)]) for n, t in ours.state_dict().items()})

for module in ours.modules():
    if isinstance(module, StdConv2d):
        module.eps = 1e-8
for size in ((64, 64), (97, 131)):
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        a, b = ours(x), theirs(x)
    difference = ((a - b).abs().max() / b.abs().max()).item()
    assert difference < 1e-5
    print(f"images of {size}: the largest difference is below a hundred-thousandth of the largest logit")

# %% [markdown]
# (how-fast)=
# ## How fast
#
# `make bench` measures R50x1 beside timm's and beside the plain formula of the released code, in one process, one
# call of each in turn, in float32. This is its last result, as committed in `data/results/bench_resnet.json`; the
# ratios are of medians, and larger is better. "Needed" and "aim" were set before the code was written.

# %%
bench = json.loads(shipped_file("results/bench_resnet.json").read_text())
about = bench["metadata"]
print(f"torch {about['torch']}, timm {about['timm']}, {about['threads']} threads, {about['instruction_set']}\n")
print(f"{'ratio':50s} measured  needed   aim")
for name, row in bench["ratios"].items():
    print(f"{name:50s} {row['ratio']:8.2f}  {row['needed']:6.2f}  {row['aim']:4.2f}")

# %% [markdown]
# And everything that took part, in milliseconds. The rows that are neither ours as it ships nor one of the two
# opponents show what each idea is worth.

# %%
for task, rows in bench["times"].items():
    print(task)
    for name, row in sorted(rows.items(), key=lambda item: item[1]["median_ms"]):
        low, high = row["quartiles_ms"]
        print(f"   {name:34s} {row['median_ms']:8.0f}   middle half of the rounds {low:.0f} to {high:.0f}")
print("peak memory of a training step, MiB")
for name, row in bench["memory"].items():
    print(
        f"   {name:34s} {row['peak_mib']:8.0f}   with the allocator's defaults {row['peak_mib_default_allocator']:.0f}"
    )

# %%
assert not about["quick"]
ratios = list(bench["ratios"].values())
assert all(row["ratio"] > 1 for row in ratios) and not any(row["ratio"] >= row["aim"] for row in ratios)
short = [row for row in ratios if row["ratio"] < row["needed"]]
assert len(short) == 3 and len(ratios) == 5

# %% [markdown]
# So all five come out ahead, three of them short of what we had called needed, and none reaches its aim. Beside timm the
# training step gains least, and the middle halves of the two's rounds overlap.
#
# ```{admonition} Where sources disagree
# :class: note
# - **Stride.** The original bottleneck halves the resolution in its first 1×1; BiT in the 3×3. Same parameters, more
#   multiplications, and another function.
# - **Projection.** Common summaries write the shortcut as $W_s x$, a convolution of the block's input. BiT's is
#   $W_s \max(0, \mathrm{GN}(x))$, of the pre-activated input; an identity shortcut does carry the bare $x$.
# - **Stem.** One of the two widely-copied summaries has a norm and a ReLU between the 7×7 and the maximum, as the
#   first ResNet does. BiT has neither. And the maximum is over a map padded with zeros, not with $-\infty$.
# - **Which networks exist.** Common summaries list R152x1 and R152x3 among BiT's. The released ones are R50x1, R50x3,
#   R101x1, R101x3, R152x2 and R152x4 {cite}`bittransfer_code`; our code builds all twelve.
# - **Parameter counts** differ by the head: R50x1 has 23.5 million without, 25.5 with 1,000 classes and 68.3 with
#   the 21,843 of BiT-M. The paper's 928 million for R152x4 are without.
# - **Epsilon** of the weight standardization: 1e-10 in BiT's code, 1e-8 in timm and Hugging Face.
# - **Head.** A 1×1 convolution in the released code and in timm, a linear layer here: the same after the average pool.
# ```

# %%
assert [round(n / 1e6, 1) for n in (backbone["R50x1"], backbone["R50x1"] + 2049 * 1000, with_head["R50x1"])] == [
    23.5,
    25.5,
    68.3,
]

# %% [markdown]
# ## Exercises
#
# **1. Count a block.** How many parameters has a `PreActBottleneck` with these input and output channels and
# stride? Do not build one: write the sum.

# %% tags=["check", "hide-cell"]
import torch
import torch.nn.functional as F
from torch import nn

from bitlib.resnet import BLOCKS, PreActBottleneck, Stem


def check_block_parameters(block_parameters):
    """Check a function (in_channels, out_channels, stride) that counts a PreActBottleneck's parameters."""
    for arguments in ((64, 256, 1), (256, 256, 1), (256, 512, 2), (512, 512, 2), (1024, 2048, 2)):
        answer = block_parameters(*arguments)
        assert answer is not None, "block_parameters returned nothing"
        with torch.device("meta"):
            expected = sum(p.numel() for p in PreActBottleneck(*arguments).parameters())
        assert answer == expected, (
            f"a block with (in_channels, out_channels, stride) = {arguments} has {expected:,} parameters, "
            f"not {answer:,}; each norm has two for every channel, and the projection exists only where it must"
        )
    print("check_block_parameters: correct")


def check_bottleneck(bottleneck):
    """Check a function (block, x) that computes a PreActBottleneck's output from the block's parts."""
    torch.manual_seed(0)
    for arguments in ((8, 16, 1, 4), (16, 16, 1, 4), (16, 32, 2, 4)):
        block, x = PreActBottleneck(*arguments).double(), torch.randn(2, arguments[0], 6, 6, dtype=torch.double)
        for norm in (block.norm1, block.norm2, block.norm3):
            nn.init.normal_(norm.bias)
        answer, expected = bottleneck(block, x), block(x)
        assert answer is not None, "bottleneck returned nothing"
        assert answer.shape == expected.shape, f"the shape is {tuple(expected.shape)}, not {tuple(answer.shape)}"
        if block.proj is not None and not torch.allclose(answer, expected):
            bare = answer - block.proj(x) + block.proj(F.relu(block.norm1(x)))
            assert not torch.allclose(bare, expected), "the projection reads the pre-activated input, not x itself"
        if block.proj is None and not torch.allclose(answer, expected):
            y = F.relu(block.norm1(x))
            assert not torch.allclose(answer - y + x, expected), "the identity shortcut carries x, before the norm"
        assert torch.allclose(answer, expected), f"{block}: the numbers differ; norm, ReLU, convolution, in this order"
    print("check_bottleneck: correct")


def check_stem_pool(stem_pool):
    """Check a function that pads and pools a map as BiT's stem does, without calling F.pad or Stem."""
    torch.manual_seed(0)
    for size in ((6, 6), (7, 5), (1, 4)):
        x = torch.randn(2, 4, *size) - 1
        answer = stem_pool(x)
        assert answer is not None, "stem_pool returned nothing"
        stem = Stem(4)
        stem.conv = nn.Identity()
        expected = stem(x)
        assert answer.shape == expected.shape, (
            f"{size} becomes {tuple(expected.shape[2:])}, not {tuple(answer.shape[2:])}"
        )
        minus_infinity = F.max_pool2d(x, 3, 2, padding=1)
        assert torch.equal(answer, expected) or not torch.equal(answer, minus_infinity), (
            "this pads with minus infinity: at the rim, where zero should win over negative numbers, it does not"
        )
        assert torch.equal(answer, expected), f"the numbers differ for a map of {size}"
    print("check_stem_pool: correct")


def check_field_of_stage(field_of_stage):
    """Check a function (depth, stage) that gives the receptive field of the map after a stage."""
    for depth, blocks in BLOCKS.items():
        for stage in range(1, 5):
            answer = field_of_stage(depth, stage)
            assert answer is not None, "field_of_stage returned nothing"
            expected, jump = 11, 4
            for before, n_blocks in enumerate(blocks[:stage], start=1):
                expected += 2 * jump
                jump *= 1 if before == 1 else 2
                expected += 2 * jump * (n_blocks - 1)
            assert answer == expected, f"after stage {stage} of R{depth} it is {expected} pixels, not {answer}"
    print("check_field_of_stage: correct")


# %% tags=["exercise"]
def block_parameters(in_channels, out_channels, stride):
    return None  # your code here


# check_block_parameters(block_parameters)


# %% tags=["solution", "hide-input"]
def block_parameters(in_channels, out_channels, stride):
    width = out_channels // 4
    norms = 2 * (in_channels + width + width)
    convolutions = in_channels * width + 9 * width * width + width * out_channels
    projection = in_channels * out_channels if stride != 1 or in_channels != out_channels else 0
    return norms + convolutions + projection


check_block_parameters(block_parameters)

# %% [markdown]
# **2. The block by heart.** Given a block and its input, compute the output from the block's parts: `norm1`, `conv1`,
# `norm2`, `conv2`, `norm3`, `conv3`, and `proj`, which may be `None`.


# %% tags=["exercise"]
def bottleneck(block, x):
    return None  # your code here


# check_bottleneck(bottleneck)


# %% tags=["solution", "hide-input"]
def bottleneck(block, x):
    y = F.relu(block.norm1(x))
    shortcut = x if block.proj is None else block.proj(y)
    y = block.conv2(F.relu(block.norm2(block.conv1(y))))
    return block.conv3(F.relu(block.norm3(y))) + shortcut


check_bottleneck(bottleneck)

# %% [markdown]
# **3. Zero padding without padding.** Pool a map as the stem does, with PyTorch's own `padding=1` and no `F.pad`. A
# hint: which number would have to win, and where?


# %% tags=["exercise"]
def stem_pool(x):
    return None  # your code here


# check_stem_pool(stem_pool)


# %% tags=["solution", "hide-input"]
# A zero takes part in exactly those windows that leave the map: the first row and column always, the last where the
# size is odd. There, and only there, a maximum is at least zero.
def stem_pool(x):
    y = F.max_pool2d(x, 3, 2, padding=1)
    height, width = x.shape[2:]
    y[:, :, 0] = y[:, :, 0].clamp(min=0)
    y[:, :, :, 0] = y[:, :, :, 0].clamp(min=0)
    if height % 2:
        y[:, :, -1] = y[:, :, -1].clamp(min=0)
    if width % 2:
        y[:, :, :, -1] = y[:, :, :, -1].clamp(min=0)
    return y


check_stem_pool(stem_pool)

# %% [markdown]
# **4. The field of a stage.** Dense prediction reads the maps of earlier stages too. Derive, from the recursion for
# $r$ and $j$, the receptive field of the map after a stage as a sum over the blocks, for any depth.


# %% tags=["exercise"]
def field_of_stage(depth, stage):
    return None  # your code here


# check_field_of_stage(field_of_stage)


# %% tags=["solution", "hide-input"]
# The stem gives r = 1 + 6 + 2 * 2 = 11 and j = 4. A block adds 2 j, with the j before its stride.
def field_of_stage(depth, stage):
    r, j = 11, 4
    for number, n_blocks in enumerate(BLOCKS[depth][:stage], start=1):
        after = j if number == 1 else 2 * j
        r += 2 * j + 2 * after * (n_blocks - 1)
        j = after
    return r


check_field_of_stage(field_of_stage)

# %% [markdown]
# ## What to remember
#
# - Norms keep the forward signal in scale, but only shortcuts keep the gradient: with pre-activation a later map is
#   an earlier one plus a sum, and the gradient has a 1 in it.
# - BiT's block: norm, ReLU, 1×1; norm, ReLU, 3×3 with the stride; norm, ReLU, 1×1. The projection reads the
#   pre-activated input and has no norm.
# - The stem pads with zeros before its maximum.
# - A name fixes everything: the depth the blocks of the four stages, the width factor all channels. R152x4 has 928
#   million parameters without its head.
# - With a head of zeros, the backbone waits one step for its first gradient.
# - The same function can be computed faster: the numbers in another order in memory, sums and ReLUs in place, and
#   what is cheap computed again instead of kept.
#
# The next chapter fills this network with the official weights.
