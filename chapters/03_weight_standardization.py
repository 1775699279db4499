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
#     module: conv
#     summary: Weight Standardization; standardised convolutions, and folding them away for inference.
# ---

# %% [markdown]
# # Weight standardization
#
# At the end of this chapter we have `StdConv2d`, the convolution of BiT, and `fold_weight_standardization`, which
# takes the standardising out of a trained network without changing one bit of what it computes.
#
# **Runtime:** about 25 seconds on two CPU cores.
#
# **Builds on:** group normalization, the chapter before this one.

# %% tags=["setup", "remove-cell"]
# Does nothing outside Colab; there it installs the book's package and what the chapters need.
import sys

if "google.colab" in sys.modules:
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", 'install -q "bitlib[book] @ git+https://github.com/OWNER/REPOSITORY"')

# %% tags=["export"]
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# %%
import matplotlib.pyplot as plt

from bitlib.data import load_task, normalize, resize, shipped_file
from bitlib.norm import GroupNorm

plt.style.use(shipped_file("book.mplstyle"))

# %% [markdown]
# ## The problem: what group norm lost
#
# We left batch norm for group norm because group norm does not care about the batch. It cost us something. Batch norm
# gives *every channel* its own mean and deviation; group norm gives one to a whole group. A channel that is a hundred
# times weaker than its neighbours in the group stays a hundred times weaker after the layer, and the layer after that
# hardly sees it. Nothing in the network will bring it back.
#
# **Before you run it:** we draw 32 filters, shrink each by a factor between 1 and 100, and pass the digits through
# them. What is the standard deviation of each channel after batch norm, and after group norm with four groups?

# %%
task = load_task("digits")
x_train, x_test = (normalize(resize(part.images, 8))[:, :1] for part in (task.train, task.test))  # grey, in [-1, 1]
y_train, y_test = task.train.labels, task.test.labels

torch.manual_seed(0)
conv = nn.Conv2d(1, 32, 3, bias=False)
shrink = 10 ** (-2 * torch.rand(32, 1, 1, 1))
with torch.no_grad():
    conv.weight.mul_(shrink)
    after = {
        "batch norm": nn.BatchNorm2d(32)(conv(x_train)),
        "group norm, 4 groups": GroupNorm(4, 32)(conv(x_train)),
    }
    strength = {name: y.std(dim=(0, 2, 3)) for name, y in after.items()}
weakest, strongest = strength["group norm, 4 groups"].aminmax()
assert strength["batch norm"].min() > 0.8 and weakest < 0.2 and strongest > 2

# %% tags=["hide-input"] mystnb={"image": {"alt": "Standard deviation of 32 channels after normalisation against the factor by which each filter was shrunk, on logarithmic axes. After batch norm all lie at 1. After group norm they range from about 0.1 to over 2, the more shrunk the weaker."}}
figure, axes = plt.subplots()
for (name, std), marker in zip(strength.items(), "os", strict=True):
    axes.loglog(shrink.flatten(), std, marker, label=name, alpha=0.8)
axes.set_xlim(0.009, 1.1)
axes.set_xlabel("factor by which the filter was shrunk")
axes.set_ylabel("standard deviation of its channel\nafter the normalisation")
axes.legend()
plt.show()

# %% [markdown]
# We made the trouble on purpose here. In training it comes by itself: the authors of weight standardization call
# channels that fade away *elimination singularities*, and show that networks with group norm drift towards them where
# networks with batch norm do not {cite}`qiao2019weight`.
#
# Their remedy does not touch the activations at all. The channels have different strengths because their filters
# have. So give every *filter* the same mean and the same variance. Weights are the same for every image; no batch is
# involved.
#
# ## The idea
#
# The filter of output channel $o$ is a row of $m = C_\text{in} \cdot h \cdot w$ numbers $W_{o,1}, \dots, W_{o,m}$. We keep $W$ as the
# parameter that the optimiser changes, and convolve with
#
# $$ \hat W_{o,i} = \frac{W_{o,i} - \mu_o}{\sqrt{\sigma_o^2 + \epsilon}}, \qquad
#    \mu_o = \frac1m \sum_i W_{o,i}, \qquad
#    \sigma_o^2 = \frac1m \sum_i (W_{o,i} - \mu_o)^2. $$ (eq-ws)


# %%
def standardize_as_written(weight, eps=1e-10):
    mu = weight.mean(dim=(1, 2, 3), keepdim=True)  # (out, 1, 1, 1)
    var = (weight - mu).square().mean(dim=(1, 2, 3), keepdim=True)
    return (weight - mu) / torch.sqrt(var + eps)


weight = 0.05 * torch.randn(16, 8, 3, 3) + 0.02
w_hat = standardize_as_written(weight)
print("mean of every filter 0:    ", torch.allclose(w_hat.mean(dim=(1, 2, 3)), torch.zeros(16), atol=1e-6))
print("variance of every filter 1:", torch.allclose(w_hat.var(dim=(1, 2, 3), correction=0), torch.ones(16)))

# %% [markdown]
# There is no learned gain here, as in group norm; the $\gamma$ of the next normalisation layer does that.
#
# **Before you run it:** which of these three changes of $W$ changes the output of the layer? Stretching every filter
# by a factor of its own, adding a constant to every filter, turning a filter upside down.

# %%
x = torch.randn(2, 8, 10, 10)
y = F.conv2d(x, standardize_as_written(weight))
factor, constant = torch.rand(16, 1, 1, 1) + 0.5, torch.randn(16, 1, 1, 1)
print("stretched:  ", torch.allclose(F.conv2d(x, standardize_as_written(factor * weight)), y, atol=1e-3))
print("shifted:    ", torch.allclose(F.conv2d(x, standardize_as_written(weight + constant)), y, atol=1e-3))
print("upside down:", torch.allclose(F.conv2d(x, standardize_as_written(weight.flip(2))), y, atol=1e-3))

# %% [markdown]
# ### We have seen this equation before
#
# Compare equation {eq}`eq-ws` with the one picture of the last chapter. There a row was an image and we normalised
# over all its channels and positions; that was *layer norm*. Here a row is a filter. Weight standardization is a
# layer norm over each filter, and PyTorch has a fast layer norm:

# %%
as_layer_norm = F.layer_norm(weight, weight.shape[1:], eps=1e-10)
torch.testing.assert_close(as_layer_norm, w_hat, rtol=1e-5, atol=1e-6)

# %% [markdown]
# This matters for more than elegance. All the weights of a network are standardised in every training step, forward and
# backward. Each of our lines makes a pass of its own over them, and keeps its result for the backward pass; the
# layer norm does it in one function.
#
# ### Where epsilon sits
#
# The $\epsilon$ in equation {eq}`eq-ws` only has to prevent a division by zero. Implementations disagree on it:
# BiT's released code has $10^{-10}$ inside the root {cite}`bittransfer_code`, timm and Hugging Face
# load BiT with $10^{-8}$ inside the root {cite}`wightman2019timm`, and the code of the weight standardization paper
# adds $10^{-5}$ to the deviation, outside the root, and takes the *unbiased* variance {cite}`qiao2019weight`.
# The three agree as long as a filter is not small. How small is small?

# %%
variants = {
    "1e-10 inside (BiT)": lambda w: F.layer_norm(w, w.shape[1:], eps=1e-10),
    "1e-8 inside (timm)": lambda w: F.layer_norm(w, w.shape[1:], eps=1e-8),
    "1e-5 outside (WS paper)": lambda w: (
        (w - w.mean(dim=(1, 2, 3), keepdim=True)) / (w.std(dim=(1, 2, 3), keepdim=True) + 1e-5)
    ),
}
unit = standardize_as_written(torch.randn(64, 3, 3, 3, dtype=torch.float64))  # 27 numbers: 3 × 3 on an RGB image
deviations = [10.0**-k for k in range(1, 7)]
result = {
    name: [f(deviation * unit).square().mean().sqrt().item() for deviation in deviations]
    for name, f in variants.items()
}
print(f"{'deviation of W':24}" + "".join(f"{d:9.0e}" for d in deviations))
for name, values in result.items():
    print(f"{name:24}" + "".join(f"{value:9.3f}" for value in values))

# %% [markdown]
# Each row should read 1. Down to a deviation of $10^{-3}$ it does, within half a per cent for BiT and timm.
# At $10^{-4}$ timm's epsilon, $(10^{-4})^2$, is as large as the variance, and it gives $1/\sqrt 2$; BiT's
# $10^{-10}$ gets there at $10^{-5}$. So a checkpoint with such weak filters behaves differently in the two, and
# whoever compares them has to set the same $\epsilon$.
#
# The third row is off by 2 % even for strong filters, because the unbiased variance is $m/(m-1)$ times the biased one.
# With 27 numbers in a filter,

# %%
strong = result["1e-5 outside (WS paper)"][0]
print(f"sqrt(26/27) = {(26 / 27) ** 0.5:.4f}, measured {strong:.4f}")
assert abs(strong - (26 / 27) ** 0.5) < 1e-3
assert abs(result["1e-8 inside (timm)"][3] - 0.5**0.5) < 1e-3 and abs(result["1e-10 inside (BiT)"][4] - 0.5**0.5) < 1e-3

# %% [markdown]
# Does that matter? If a group norm follows at once, no: all filters of a layer have the same $m$, so the whole output is
# scaled by one factor, and group norm divides it away. But a residual network adds the outputs of
# two convolutions with different $m$ (the last of the block and the shortcut), and there the factors do not cancel.
#
# ### Epsilon in half precision
#
# A float16 has nothing between 0 and $6 \cdot 10^{-8}$. What happens to the equation in it?

# %%
print("1e-10 in float16:", torch.tensor(1e-10, dtype=torch.float16).item())
small = (1e-4 * torch.randn(4, 8, 3, 3)).half()  # a variance of 1e-8: representable as a weight, but not squared
print("finite, as written, in float16:", standardize_as_written(small).isfinite().all().item())
print("finite, in float32:            ", standardize_as_written(small.float()).half().isfinite().all().item())

# %% [markdown]
# The squared deviations are rounded to 0, so is $\epsilon$, and we divide by it. So we standardise in float32, and
# round the result. (In mixed-precision training this happens by itself: the weights stay in float32, and autocast
# rounds $\hat W$ when it meets the image.)
#
# ## The code
#
# One more detail. Convolutions on many devices run faster on `channels_last` weights, the ones whose channels lie
# together in memory. `F.layer_norm` works along memory and gives back ordinary weights:

# %%
w_last = weight.to(memory_format=torch.channels_last)
plain = F.layer_norm(w_last, w_last.shape[1:], eps=1e-10)
rows = w_last.permute(0, 2, 3, 1)  # (out, height, width, in): the order in which they lie in memory
kept = F.layer_norm(rows, rows.shape[1:], eps=1e-10).permute(0, 3, 1, 2)
print("layer norm keeps channels last:         ", plain.is_contiguous(memory_format=torch.channels_last))
print("through the permuted view, it keeps them:", kept.is_contiguous(memory_format=torch.channels_last))
torch.testing.assert_close(kept, plain, rtol=1e-5, atol=1e-6)

# %% [markdown]
# A mean does not care about the order of its terms. So here is the whole of weight standardization, and the
# convolution with it:


# %% tags=["export"]
def standardize(weight: Tensor, eps: float = 1e-10) -> Tensor:
    """Give every filter of a convolution mean 0 and variance 1.

    weight: (out, in, height, width). Returns the same shape, dtype and memory layout.
    The variance is the biased one, and eps sits inside the root, as in BiT's released code.
    Half precision is standardised in float32: in float16, 1e-10 is 0.
    """
    if weight.dtype in (torch.float16, torch.bfloat16):
        return standardize(weight.float(), eps).to(weight.dtype)
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        rows = weight.permute(0, 2, 3, 1)  # the same filters in the order in which they lie in memory
        return F.layer_norm(rows, rows.shape[1:], eps=eps).permute(0, 3, 1, 2)
    return F.layer_norm(weight, weight.shape[1:], eps=eps)


# %% tags=["export"]
class StdConv2d(nn.Conv2d):
    """A convolution that standardises its filters before it uses them.

    Takes the arguments of nn.Conv2d and keeps its names in the state dict; `weight` is what the optimiser changes,
    `standardize(weight)` what meets the image. eps is BiT's, 1e-10; set the attribute for another (timm: 1e-8).
    """

    eps: float = 1e-10

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardize(self.weight, self.eps), self.bias)


# %% [markdown]
# `_conv_forward` is what `nn.Conv2d` itself calls with its weight. All that a convolution can do (stride, padding of
# any mode, dilation, groups, bias) comes with it. In a convolution with groups, a filter has `in / groups` channels,
# and `weight.shape[1:]` knows that.
#
# ## Proof
#
# timm has a `StdConv2d` too. Its way is a batch norm of the weights, seen as one image whose channels are the filters.
# With the same $\epsilon$, output and gradients agree. We print the largest difference as a share of the largest
# entry.

# %%
from timm.layers import StdConv2d as TimmStdConv2d

torch.manual_seed(0)
ours = StdConv2d(32, 64, 3, stride=2, padding=1, bias=True)
theirs = TimmStdConv2d(32, 64, 3, stride=2, padding=1, bias=True, eps=1e-10)
theirs.load_state_dict(ours.state_dict())
x = torch.randn(4, 32, 15, 15, requires_grad=True)
grad_y = torch.randn(4, 64, 8, 8)


def output_and_gradients(y, parameters):
    return y, *torch.autograd.grad(y, (x, *parameters), grad_y)


by_ours = output_and_gradients(ours(x), (ours.weight, ours.bias))
by_timm = output_and_gradients(theirs(x), (theirs.weight, theirs.bias))
written = F.conv2d(x, standardize_as_written(ours.weight), ours.bias, stride=2, padding=1)
by_formula = output_and_gradients(written, (ours.weight, ours.bias))
for name, a, b, c in zip(
    ("output", "gradient of x", "gradient of weight", "gradient of bias"), by_ours, by_timm, by_formula, strict=True
):
    timm_off, formula_off = ((a - other).abs().max() / a.abs().max() for other in (b, c))
    print(
        f"{name:20} differs from timm's and the formula's by less than 3e-6:", max(timm_off, formula_off).item() < 3e-6
    )
print(ours)

# %% [markdown]
# ## The same problem again
#
# Now for the trouble of the first section, in training. A small network on the digits, three ways: batch norm; group
# norm; group norm and standardised filters. Each is started as usual, and also with filters shrunk by random
# factors between 1 and 100. Five seeds, batches of 32, three passes over 1,000 digits.


# %%
def small_net(conv, norm):
    layers, channels = [], 1
    for out, stride in ((8, 1), (16, 2), (32, 2), (32, 2)):
        layers += [conv(channels, out, 3, stride, padding=1, bias=False), norm(out), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def eight_to_a_group(channels):
    return GroupNorm(channels // 8, channels)


def convolutions(net):
    return [module for module in net.modules() if isinstance(module, nn.Conv2d)]


@torch.no_grad()
def shrink_filters(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for module in convolutions(net):
        module.weight.mul_(10 ** (-2 * torch.rand(module.out_channels, 1, 1, 1, generator=generator)))


def fit(net, x, y, lr, epochs, seed, batch_size=32, watch=None):
    """Train with SGD in place; watch(step, net), if given, is called before every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    step = 0
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(batch_size):
            if watch is not None:
                watch(step, net)
            loss = F.cross_entropy(net(x[index]), y[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
    return net.eval()


@torch.no_grad()
def test_error(net, x):
    """Per cent of the test digits that the net gets wrong."""
    return 100 * (net(x).argmax(dim=1) != y_test).float().mean().item()


# %% [markdown]
# While the two networks with group norm train from the usual start, we also look at their loss surface. From the
# current weights we go one small step down the gradient and ask how much the gradient itself has changed there:
#
# $$ \frac{\lVert \nabla L(W - \tau) - \nabla L(W) \rVert}{\lVert \nabla L(W) \rVert}, \qquad
#    \tau = 0.01\,\lVert W \rVert\, \frac{\nabla L(W)}{\lVert \nabla L(W) \rVert}. $$
#
# That is the curvature that a step of gradient descent meets. On a smooth surface it is near 0, and the gradient can be
# trusted for the length of the step; at 1 it is of no more use. Measuring the step in shares of $\lVert W \rVert$
# matters: a network with standardised filters computes the same when all of $W$ is doubled, while its second
# derivatives fall to a quarter, so curvature in fixed units could be made to say anything.
#
# **Before you run it:** the paper's explanation is that standardised filters make the loss surface smoother. Where in
# training would you expect the largest difference?


# %%
def gradient_change(net, x, y, share=0.01):
    """How much the gradient by the filters changes over a step of `share` of their norm, relative to itself."""
    weights = [module.weight for module in convolutions(net)]

    def gradient():
        return torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(net(x), y), weights)])

    before = [weight.detach().clone() for weight in weights]
    here = gradient()
    scale = share * torch.cat([weight.flatten() for weight in before]).norm() / here.norm()
    with torch.no_grad():
        for weight, part in zip(weights, here.split([w.numel() for w in weights]), strict=True):
            weight.sub_(scale * part.view_as(weight))
    there = gradient()
    with torch.no_grad():
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
    return ((there - here).norm() / here.norm()).item()


# %% tags=["nbval-ignore-output"]
kinds = {
    "batch norm": (nn.Conv2d, nn.BatchNorm2d),
    "group norm": (nn.Conv2d, eight_to_a_group),
    "group norm + WS": (StdConv2d, eight_to_a_group),
}
looked_at = (0, 1, 2, 4, 8, 16, 32, 64, 95)
errors = {(kind, start): [] for start in ("usual", "shrunk") for kind in kinds}
changes = {kind: [] for kind in kinds if kind != "batch norm"}
for (kind, start), runs in errors.items():
    for seed in range(5):
        torch.manual_seed(seed)
        net = small_net(*kinds[kind])
        watch, seen = None, []
        if start == "shrunk":
            shrink_filters(net, 100 + seed)
        elif kind in changes:
            changes[kind].append(seen)

            def watch(step, net, seen=seen):
                if step in looked_at:
                    seen.append(gradient_change(net, x_train[:256], y_train[:256]))

        runs.append(test_error(fit(net, x_train, y_train, lr=0.05, epochs=3, seed=seed, watch=watch), x_test))
errors = {case: torch.tensor(runs) for case, runs in errors.items()}
changes = {kind: torch.tensor(values) for kind, values in changes.items()}  # (seeds, steps)
for (kind, start), runs in errors.items():
    print(f"{start:7} start, {kind:16} {runs.mean():5.1f} ± {runs.std():3.1f} % wrong")
print("gradient change at step", "".join(f"{step:6}" for step in looked_at))
for kind, values in changes.items():
    print(f"{kind:23}", "".join(f"{value:6.2f}" for value in values.mean(dim=0)))

# %%
mean_error = {case: runs.mean().item() for case, runs in errors.items()}
for start, least in (("usual", 1.3), ("shrunk", 1.4)):
    assert mean_error["group norm", start] > least * mean_error["group norm + WS", start]
assert abs(mean_error["group norm + WS", "usual"] - mean_error["batch norm", "usual"]) < 3
cost = {kind: mean_error[kind, "shrunk"] - mean_error[kind, "usual"] for kind in kinds}
assert cost["group norm"] > 2 * cost["group norm + WS"]
without, with_ws = changes.values()
assert without[:, 0].mean() > 1.2 * with_ws[:, 0].mean()  # at the start: smoother
assert 0.6 < without[:, 4:].mean() / with_ws[:, 4:].mean() < 1.6  # from step 8 on: no such gap

# %% tags=["hide-input"] mystnb={"image": {"alt": "Relative change of the gradient over one small step, against the training step, mean and range of five seeds, with and without weight standardization. At the first steps the curve with weight standardization lies clearly below; after a few steps the two ranges overlap."}}
figure, axes = plt.subplots()
for (kind, values), marker in zip(changes.items(), "os", strict=True):
    (line,) = axes.plot(looked_at, values.mean(dim=0), marker=marker, label=kind)
    axes.fill_between(looked_at, values.amin(dim=0), values.amax(dim=0), color=line.get_color(), alpha=0.2)
axes.set_xscale("symlog", linthresh=1)
axes.set_xticks(looked_at, looked_at)
axes.set_ylim(0, None)
axes.set_xlabel("training step")
axes.set_ylabel("change of the gradient\nover a step of 1 % of the weights")
axes.legend()
plt.show()

# %% [markdown]
# Take the errors first. Standardised filters bring group norm back to about where batch norm is. Shrunken filters cost
# the network with group norm alone at least twice as much as the one with standardised filters. (That one is not quite
# indifferent to them, although it computes the same: its *gradients* are scaled, as the next section shows.)
#
# Now the surface. At the start the standardised network's gradient changes less over a step: the surface is smoother
# there, as the paper says, and as was found earlier for batch norm {cite}`santurkar2018does`. After a handful of steps the gap has gone. In this
# network smoothness is a head start, not the whole story; that the channels keep their strength goes on to the
# end. Our network has four layers. We would not conclude from it that the same holds for fifty.
#
# ## The gradient
#
# We have its equation already: a filter is one group, so {eq}`eq-gn-gradient` holds with $W$ for $x$. Let $g$ be the
# derivative of the loss by $\hat W_o$, and $s = \sqrt{\sigma_o^2 + \epsilon}$. Then
#
# $$ \frac{\partial L}{\partial W_o} = \frac1s \Bigl(g - \frac1m (\mathbf 1^\top g)\,\mathbf 1
#      - \frac1m (\hat W_o^\top g)\,\hat W_o \Bigr). $$ (eq-ws-gradient)
#
# Multiply by $\mathbf 1^\top$: as $\mathbf 1^\top \mathbf 1 = m$ and $\mathbf 1^\top \hat W_o = 0$, the result is 0.
# Multiply by $\hat W_o^\top$: as $\hat W_o^\top \hat W_o = m\,\sigma^2/(\sigma^2+\epsilon)$, which is $m$ but
# for $\epsilon$, the result is 0 again. So the gradient of a filter is **orthogonal to the constant filter and to the
# filter itself**. That had to be so: along these two directions the output does not change.

# %%
w = (0.05 * torch.randn(16, 8, 3, 3, dtype=torch.float64) + 0.02).requires_grad_()
x = torch.randn(2, 8, 10, 10, dtype=torch.float64)
target = torch.randn(2, 16, 8, 8, dtype=torch.float64)

w_hat = standardize(w)
loss = (F.conv2d(x, w_hat) - target).square().mean()
g, gradient = torch.autograd.grad(loss, (w_hat, w))


def dot(a, b):
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)


m, s = w[0].numel(), torch.sqrt(w.var(dim=(1, 2, 3), correction=0, keepdim=True) + 1e-10)
by_hand = (g - g.mean(dim=(1, 2, 3), keepdim=True) - dot(w_hat, g) / m * w_hat) / s
torch.testing.assert_close(by_hand, gradient)
assert torch.autograd.gradcheck(standardize, w[:2])

size = gradient.flatten(1).norm(dim=1)
print("along the constant filter:", (gradient.sum(dim=(1, 2, 3)) / size).abs().max().item() < 1e-10)
print("along the centred filter: ", (dot(gradient, w_hat).flatten() / size).abs().max().item() < 1e-4)
print("along the filter:         ", (dot(gradient, w).flatten() / size).abs().max().item() < 1e-4)

# %% [markdown]
# Two consequences follow that you will meet in training. A step of plain gradient descent is at a right angle to $W$,
# so by Pythagoras every step makes the filter longer, $\lVert W - \eta G \rVert^2 = \lVert W \rVert^2 + \eta^2 \lVert G \rVert^2$.
# And a filter that is $c$ times as long gets a gradient that is $c$ times smaller, so a step turns it by an angle
# that is $c^2$ times smaller: the learning rate that counts is $\eta / \lVert W \rVert^2$.
#
# **Before you run it:** by what factor does the gradient change when we make all filters ten times as long?

# %%
with torch.no_grad():
    stepped = (w - 0.5 * gradient).square().sum()
    print("Pythagoras:", torch.allclose(stepped, w.square().sum() + 0.25 * gradient.square().sum()))
longer = (10 * w.detach()).requires_grad_()
loss = (F.conv2d(x, standardize(longer)) - target).square().mean()
print("gradient divided by ten:", torch.allclose(torch.autograd.grad(loss, longer)[0], gradient / 10, rtol=1e-3))


# %% [markdown]
# So weight decay does not keep these weights from fitting the data too well, as it does in a plain network: short
# filters and long ones compute the same. What it does is to shorten them, and so to raise the learning rate that counts.
# BiT has it upstream, where it balances the growth, and drops it in fine-tuning.
#
# ## Folding it away
#
# When training is over, $W$ is constant, and so is $\hat W$. There is no reason to compute it again for every image: we
# store $\hat W$ in a plain convolution. For a network that classifies one image at a time this is a good part of the
# work.
#
# We work on a deep copy, and turn each `StdConv2d` of it into the `nn.Conv2d` that it is derived from. Giving an object
# another class looks odd, but it is the shortest way to keep everything else that belongs to the layer.


# %% tags=["export"]
def fold_weight_standardization(model: nn.Module) -> nn.Module:
    """Copy a trained model for inference, with every standardisation done once and for all.

    Each StdConv2d of the copy is a plain nn.Conv2d that holds the standardised filters: the outputs are the same, bit
    for bit, and the work of standardising is gone. The copy is in eval mode and none of its parameters asks for a
    gradient, because it must not be trained: without standardisation its gradients point elsewhere.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for module in folded.modules():
        if isinstance(module, StdConv2d):
            module.weight = nn.Parameter(standardize(module.weight, module.eps), requires_grad=False)
            module.__class__ = nn.Conv2d  # keeps stride, padding, dilation, groups, hooks
            module.__dict__.pop("eps", None)
    return folded


# %%
torch.manual_seed(0)
net = fit(small_net(*kinds["group norm + WS"]), x_train, y_train, lr=0.05, epochs=3, seed=0)
folded = fold_weight_standardization(net)
with torch.no_grad():
    print("outputs identical, bit for bit:", torch.equal(folded(x_test), net(x_test)))
print(net[0], "->", folded[0])

# %% [markdown]
# ### Why a folded network must not be trained
#
# It computes the same function, so its loss is the same. Its gradient is not. In the folded network the parameter *is*
# $\hat W$, so its gradient is $g$, with the two parts that {eq}`eq-ws-gradient` takes off, and without the factor
# $1/s$. In the unfolded network a step of rate $\eta$ moves $\hat W$ by about $-\frac{\eta}{s}\frac{\partial L}{\partial W}$,
# which has a factor $1/s^2$. The filters of our trained network have deviations between about 0.3 in the first layer and
# 0.06 in the last, so that factor is between ten and a few hundred.
#
# We take one and the same step, 100 digits at a rate of $10^{-4}$, in both, and compare how the filters that meet the
# image moved.


# %% tags=["nbval-ignore-output"]
def filters_after_a_step(net, lr=1e-4):
    """The filters as the image meets them, before and after one SGD step of a copy of the net, in float64."""
    net = copy.deepcopy(net).double().requires_grad_(True)

    def filters():
        return [standardize(c.weight) if isinstance(c, StdConv2d) else c.weight.clone() for c in convolutions(net)]

    before = filters()
    F.cross_entropy(net(-x_train[:100].double()), y_train[:100]).backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.sub_(lr * parameter.grad)
    return before, filters()


moves = []
for network in (net, folded):
    before, after = filters_after_a_step(network)
    moves.append([(b - a).detach() for a, b in zip(before, after, strict=True)])
print("layer   s of W    1/s²   moved, unfolded / folded")
deviations, ratios = [], []
for number, (conv, a, b) in enumerate(zip(convolutions(net), *moves, strict=True), start=1):
    s = conv.weight.detach().std(dim=(1, 2, 3), correction=0).square().mean().sqrt().item()
    ratio = (a.norm() / b.norm()).item()
    print(f"{number:5} {s:8.2f} {s**-2:7.0f} {ratio:15.0f}")
    deviations.append(s)
    ratios.append(ratio)

# %%
assert 0.2 < deviations[0] < 0.4 and 0.04 < deviations[-1] < 0.08
for s, ratio in zip(deviations, ratios, strict=True):
    assert 0.25 < ratio * s**2 < 2  # s differs from filter to filter, and part of g is taken off
drift = moves[1][0].mean(dim=(1, 2, 3)).abs().max() / moves[0][0].mean(dim=(1, 2, 3)).abs().max()
print("the folded step moves the means of the filters, the other does not:", drift.item() > 1e6)

# %% [markdown]
# The same rate is a different step, and the two networks part at once. To see what it means, we fine-tune both on
# a task that needs new filters: the digits in inverse, black on white, from 200 examples, at the HyperRule's rate of
# 0.003.

# %% tags=["nbval-ignore-output"]
inverse_errors = {"unfolded": [], "folded": []}
for seed in range(5):
    torch.manual_seed(seed)
    unfolded = fit(small_net(*kinds["group norm + WS"]), x_train, y_train, lr=0.05, epochs=3, seed=seed)
    for name, tuned in (("folded", fold_weight_standardization(unfolded)), ("unfolded", unfolded)):
        tuned = fit(tuned.requires_grad_(True), -x_train[:200], y_train[:200], 0.003, 10, seed, batch_size=20)
        inverse_errors[name].append(test_error(tuned, -x_test))
inverse_errors = {name: torch.tensor(runs) for name, runs in inverse_errors.items()}
for name, runs in inverse_errors.items():
    print(f"{name:8} {runs.mean():5.1f} ± {runs.std():4.1f} % wrong")

# %%
assert inverse_errors["folded"].mean() > 1.5 * inverse_errors["unfolded"].mean()
assert (inverse_errors["folded"] > inverse_errors["unfolded"] + 10).all()  # on every seed

# %% [markdown]
# The folded network hardly learns. A higher rate would help it along, but then it is a plain network with group norm,
# with the troubles that this chapter began with, and no recipe made for BiT fits it. That is why
# `fold_weight_standardization` returns a network whose parameters ask for no gradient: `loss.backward()` raises an error
# instead of training the wrong thing. (Give it a new head, and the head alone will train.) Keep the unfolded network;
# fold a copy.
#
# ```{admonition} Where sources disagree
# :class: note
# - **Biased or unbiased.** BiT's released code divides by $m$ {cite}`bittransfer_code`; the weight standardization
#   paper's code, and tutorials that follow it, by $m-1$ (`torch.std` with its default). With 27 numbers in a filter that is 2 %.
# - **Epsilon.** $10^{-10}$ inside the root in BiT, $10^{-8}$ in timm and Hugging Face, $10^{-5}$ outside the root in
#   the paper's code. For filters with a deviation of $10^{-3}$ or more, BiT's and timm's agree to 0.5 %.
# - **A gain.** Later work multiplies $\hat W$ by a learned gain and by $1/\sqrt m$, so that it works without any
#   normalisation of the activations {cite}`brock2021high`. BiT has neither.
# ```
#
# ## Exercises

# %% tags=["check", "hide-cell"]
import torch
import torch.nn.functional as F


def _filters(shape=(5, 4, 3, 3), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    strength = torch.tensor([1.0, 0.1, 0.01, 3.0, 0.5], dtype=dtype).reshape(-1, 1, 1, 1)
    return strength * torch.randn(shape, generator=generator, dtype=dtype) + 0.2 * strength


def check_standardize(function) -> None:
    """function(weight) must give every filter of (out, in, h, w) mean 0 and biased variance 1 (eps 1e-10, inside)."""
    w = _filters()
    got, want = function(w), F.layer_norm(w, w.shape[1:], eps=1e-10)
    assert isinstance(got, torch.Tensor), f"your function returned {type(got).__name__}; return the new weights"
    assert got.shape == w.shape, f"the result has shape {tuple(got.shape)}; the weights have {tuple(w.shape)}"
    every, each_input = (0, 1, 2, 3), (0, 2, 3)
    mistakes = {
        "your variance divides by m-1; BiT divides by m (correction=0)": _by_hand(w, (1, 2, 3), correction=1),
        "one mean for all filters; every filter needs its own": _by_hand(w, every),
        "a mean for every input channel; a filter is one slice along the first dimension": _by_hand(w, each_input),
        "a mean for every map of a filter; take the mean over the input channels too": _by_hand(w, (2, 3)),
        "you divided but did not subtract the mean": w / w.std((1, 2, 3), correction=0, keepdim=True),
        "you subtracted the mean but did not divide": w - w.mean((1, 2, 3), keepdim=True),
        "you divided by the variance; divide by its root": (w - w.mean((1, 2, 3), keepdim=True))
        / w.var((1, 2, 3), correction=0, keepdim=True),
    }
    for message, mistake in mistakes.items():
        assert not torch.allclose(got, mistake, rtol=1e-4, atol=1e-5), message
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5), "the values differ; look at mean and variance of one filter"
    tiny = (_filters(dtype=torch.float64)) * 1e-5
    want = F.layer_norm(tiny, tiny.shape[1:], eps=1e-10)
    assert torch.allclose(function(tiny), want, rtol=1e-4), "wrong for tiny filters: eps is 1e-10, inside the root"
    print("check_standardize: correct")


def _by_hand(w, dims, correction=0):
    return (w - w.mean(dims, keepdim=True)) / w.std(dims, correction=correction, keepdim=True)


def check_unbiased_factor(function) -> None:
    """function(conv) must give the factor by which the unbiased variance shrinks the filters of an nn.Conv2d."""
    for conv in (
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.Conv2d(16, 8, 1),
        torch.nn.Conv2d(8, 8, (3, 5)),
        torch.nn.Conv2d(8, 8, 3, groups=4),
    ):
        w = conv.weight.detach().double()
        want = (w / w.std((1, 2, 3), keepdim=True) * w.std((1, 2, 3), correction=0, keepdim=True) / w).mean().item()
        got = function(conv)
        assert not abs(got - want**2) < 1e-6, "that is the ratio of the variances; the filter is divided by a deviation"
        assert not abs(got * want - 1) < 1e-6, "upside down: a larger variance makes a smaller filter"
        hint = " (with groups, a filter sees in_channels / groups channels)" if conv.groups > 1 else ""
        assert abs(got - want) < 1e-6, f"for {conv} the factor is {want:.4f}, you have {got:.4f}{hint}"
    print("check_unbiased_factor: correct")


def check_standardize_backward(function) -> None:
    """function(g, weight, eps) must turn the derivative by the standardised weights into that by the weights."""
    w = _filters(dtype=torch.float64).requires_grad_()
    g = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (want,) = torch.autograd.grad(F.layer_norm(w, w.shape[1:], eps=1e-5), w, g)
    got = function(g, w.detach(), 1e-5)
    assert isinstance(got, torch.Tensor) and got.shape == w.shape, "return a tensor of the shape of the weights"
    s = (w.detach().var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    assert not torch.allclose(got, g / s), "you kept only the direct term; W also acts through mean and deviation"
    assert got.sum((1, 2, 3)).abs().max() < 1e-8, "the gradient of a filter must sum to 0; yours does not"
    assert not torch.allclose(got, (g - g.mean((1, 2, 3), keepdim=True)) / s), "take off the part along the filter too"
    assert not torch.allclose(got, want * s), "the division by the deviation is missing"
    assert torch.allclose(got, want), "the values differ from autograd's; is eps in your deviation?"
    print("check_standardize_backward: correct")


def check_accumulated_gradient(function) -> None:
    """function(weight, standardize, losses) must give the gradient of the mean loss, standardising only once."""
    weight, calls = _filters().requires_grad_(), []
    targets = [torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    losses = [lambda w, t=t: (w - t).pow(4).mean() for t in targets]

    def counted(w):
        calls.append(1)
        return F.layer_norm(w, w.shape[1:], eps=1e-10)

    (want,) = torch.autograd.grad(sum(f(counted(weight)) for f in losses) / 4, weight)
    calls.clear()
    got = function(weight, counted, losses)
    assert len(calls) > 0, "call the standardize that you are given"
    assert len(calls) == 1, f"you standardised {len(calls)} times; the weights do not change between micro-batches"
    assert isinstance(got, torch.Tensor) and got.shape == weight.shape, "return a tensor of the shape of the weights"
    assert not torch.allclose(got, 4 * want, rtol=1e-4), "that is the gradient of the sum; divide by how many losses"
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-7), (
        "the gradient is wrong; did you carry the gradient by the standardised weights back through standardize?"
    )
    print("check_accumulated_gradient: correct")


# %% [markdown]
# **1. Write it yourself**, from `mean`, `square` and arithmetic, without a normalisation function.


# %% tags=["exercise"]
def my_standardize(weight):
    return weight  # your code


# check_standardize(my_standardize)


# %% tags=["solution", "hide-input"]
def my_standardize(weight):
    centred = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
    return centred / torch.sqrt(centred.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-10)


check_standardize(my_standardize)


# %% [markdown]
# **2. The wrong variance.** Somebody standardises with the unbiased variance. By what factor are the filters of a given
# `nn.Conv2d` shorter than BiT's? (For the stem of BiT, 147 numbers a filter, it is 0.9966; a 1×1 convolution of a
# narrow network is worse.)


# %% tags=["exercise"]
def my_unbiased_factor(conv):
    return 1.0  # your code


# check_unbiased_factor(my_unbiased_factor)


# %% tags=["solution", "hide-input"]
def my_unbiased_factor(conv):
    m = conv.weight[0].numel()  # in_channels / groups * height * width
    return ((m - 1) / m) ** 0.5


check_unbiased_factor(my_unbiased_factor)
assert round(my_unbiased_factor(nn.Conv2d(3, 64, 7)), 4) == 0.9966


# %% [markdown]
# **3. Derive the gradient.** With paper and pencil, from $\hat W$ to $W$, with $\epsilon$; then in code. What is left
# of $\hat W^\top \partial L / \partial W$ when $\epsilon$ is not 0?


# %% tags=["exercise"]
def my_standardize_backward(g, weight, eps):
    return g  # your code


# check_standardize_backward(my_standardize_backward)


# %% tags=["solution", "hide-input"]
def my_standardize_backward(g, weight, eps):
    def mean(t):
        return t.mean(dim=(1, 2, 3), keepdim=True)

    s = torch.sqrt(mean((weight - mean(weight)).square()) + eps)
    w_hat = (weight - mean(weight)) / s
    # What is left along w_hat is (1 - mean(w_hat²)) = eps / s² of the part that g had.
    return (g - mean(g) - w_hat * mean(g * w_hat)) / s


check_standardize_backward(my_standardize_backward)


# %% [markdown]
# **4. Once per step.** A large batch is often taken in several micro-batches whose gradients are added up before one step of
# the optimiser. The weights change once per step, so they need standardising once per step, and not once per
# micro-batch. You are given the weights, a function that standardises, and a list of functions, one for each
# micro-batch, from standardised weights to a loss. Return the gradient of the mean loss by the weights. Autograd frees
# its record of `standardize` in the first backward pass; so cut the record there, and mend it once at the end.


# %% tags=["exercise"]
def my_accumulated_gradient(weight, standardize, losses):
    loss = sum(f(standardize(weight)) for f in losses) / len(losses)  # right, but standardises every time
    return torch.autograd.grad(loss, weight)[0]


# check_accumulated_gradient(my_accumulated_gradient)


# %% tags=["solution", "hide-input"]
def my_accumulated_gradient(weight, standardize, losses):
    w_hat = standardize(weight)
    leaf = w_hat.detach().requires_grad_()  # the same numbers, without a record of where they came from
    for f in losses:
        (f(leaf) / len(losses)).backward()  # adds to leaf.grad
    return torch.autograd.grad(w_hat, weight, leaf.grad)[0]


check_accumulated_gradient(my_accumulated_gradient)

# %% [markdown]
# ## What to remember
#
# - Group norm lets channels of a group differ in strength; weight standardization takes the difference out at the source,
#   the filters, and needs no batch for it.
# - It is a layer norm over each filter: biased variance, $\epsilon = 10^{-10}$ inside the root, no gain, in float32.
# - Length and mean of a filter do not matter for the output, so the gradient is orthogonal to both, and the rate that counts is
#   $\eta / \lVert W \rVert^2$.
# - Fold it away for inference; never train what is folded.
