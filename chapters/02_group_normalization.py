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
#     module: norm
#     summary: Group Normalization, derived from its equation.
# ---

# %% [markdown]
# # Group normalization
#
# At the end of this chapter we have `GroupNorm`, the only normalisation layer in BiT: derived from its equation,
# with a gradient worked out by hand, and equal to PyTorch's.
#
# **Runtime:** about a minute on two CPU cores.
#
# **Builds on:** basic PyTorch, and the digits of the data chapter.

# %% tags=["setup", "remove-cell"]
# Does nothing outside Colab; there it installs the book's package and what the chapters need.
import sys

if "google.colab" in sys.modules:
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", 'install -q "bitlib[book] @ git+https://github.com/OWNER/REPOSITORY"')

# %% tags=["export"]
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# %%
import copy

import matplotlib.pyplot as plt

from bitlib.data import load_task, normalize, resize, shipped_file

plt.style.use(shipped_file("book.mplstyle"))

# %% [markdown]
# ## The problem: a batch of two
#
# Batch normalization {cite}`ioffe2015batch` made deep networks easy to train. It gives every channel mean 0 and
# variance 1, and it takes that mean and that variance over *all the examples of the batch*. A network with it never
# sees one image alone: what it makes of an image depends on the image's company.
#
# BiT pre-trains on many devices with few images each, and fine-tunes on data sets of ten images. So the question is
# how far batch norm can be trusted when the company is small. Let us try the smallest that it allows: two images.
#
# Our data are scanned digits, 8 × 8 pixels, and our network is four small convolutions. The map shrinks from 8 × 8
# to 4 × 4, to 2 × 2 and, with `last_stride=2`, to a single position. The argument `norm` makes a normalisation layer
# for a number of channels, so that we can swap it.

# %%
task = load_task("digits")
x_train, x_test = (normalize(resize(part.images, 8))[:, :1] for part in (task.train, task.test))  # grey, in [-1, 1]
y_train, y_test = task.train.labels, task.test.labels
print(tuple(x_train.shape), tuple(x_test.shape))


# %%
def small_net(norm, last_stride=2):
    layers, channels = [], 1
    for out, stride in ((8, 1), (16, 2), (32, 2), (32, last_stride)):
        layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), norm(out), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def fit(net, x, y, batch_size, epochs, seed, frozen_norm=False):
    """Train with SGD in place; the learning rate is proportional to the batch size."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05 * batch_size / 32, momentum=0.9)
    net.train(not frozen_norm)  # eval mode, where batch norm uses and keeps its stored statistics
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(batch_size):
            loss = F.cross_entropy(net(x[index]), y[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def test_error(net, x):
    """Per cent of the test digits that the net gets wrong."""
    return 100 * (net(x).argmax(dim=1) != y_test).float().mean().item()


def batch_norm(channels):
    return nn.BatchNorm2d(channels)


def eight_to_a_group(channels):
    return nn.GroupNorm(channels // 8, channels)  # PyTorch's; ours comes below


# %% [markdown]
# Each run sees the same 1,000 training digits three times, in batches of 32 or of 2, and every case is run with five
# seeds. In four cases the last map has one position; in the fifth, batch norm again with batches of 2, we keep it at
# 2 × 2 (`last_stride=1`).
#
# **Before you run it:** which of the five lines will stand out, and will it be by one per cent or by ten?

# %% tags=["nbval-ignore-output"]
cases = {
    "batch norm, batch 32": (batch_norm, 32, 2),
    "group norm, batch 32": (eight_to_a_group, 32, 2),
    "batch norm, batch 2": (batch_norm, 2, 2),
    "group norm, batch 2": (eight_to_a_group, 2, 2),
    "batch norm, batch 2, last map 2 × 2": (batch_norm, 2, 1),
}
errors = {}
for name, (norm, batch_size, last_stride) in cases.items():
    runs = []
    for seed in range(5):
        torch.manual_seed(seed)
        net = small_net(norm, last_stride)
        runs.append(test_error(fit(net, x_train, y_train, batch_size, epochs=3, seed=seed), x_test))
    errors[name] = torch.tensor(runs)
    print(f"{name:36} {errors[name].mean():5.1f} ± {errors[name].std():4.1f} % wrong")

# %%
small, large = errors["batch norm, batch 2"], errors["batch norm, batch 32"]
assert small.min() > 30 and large.max() < 15  # every seed
assert errors["group norm, batch 2"].max() < 15 and errors["group norm, batch 32"].max() < 15
assert errors["batch norm, batch 2, last map 2 × 2"].max() < 15
assert large.mean() < errors["group norm, batch 32"].mean()  # in large company, batch norm is the better of the two

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test error of five seeds for five cases. Batch norm at batch size 2 gets more than a third of the digits wrong on every seed; batch norm at batch size 32, group norm at either size, and batch norm at batch size 2 with a last map of 2 by 2 all stay under 15 per cent."}}
figure, axes = plt.subplots()
for position, (name, runs) in enumerate(errors.items()):
    color = "C1" if name.startswith("batch") else "C0"
    axes.scatter(runs, [position] * len(runs), color=color, alpha=0.6)
    axes.plot(runs.mean(), position, "|", color="black", markersize=18)
axes.set_yticks(range(len(errors)), errors)
axes.invert_yaxis()
axes.set_xlim(0, 100)
axes.set_xlabel("test error, % (a dot per seed; the bar is their mean)")
plt.show()

# %% [markdown]
# With batches of two, the network with batch norm breaks down on every seed. Group norm does not notice.
#
# But look at the last row before you write "batch norm fails at batch size 2" into your notes. With a last map of
# 2 × 2 the same layer with the same batch size works. What counts is not the number of images: it is *how many
# numbers go into one mean*. In the last layer of the failing network that is two. And what does batch norm make of
# two numbers, $a$ and $b$? Their mean is $(a+b)/2$, their standard deviation $|a-b|/2$, so they become $+1$ and $-1$,
# whichever numbers they were:

# %%
pairs = torch.tensor([[3.0, 0.1, -5.0], [1.0, 0.2, 70.0]])[:, :, None, None]  # 2 images, 3 channels, one position
print(nn.BatchNorm2d(3)(pairs).flatten(1).detach().round(decimals=2))

# %% [markdown]
# All that is left of an image is, for each channel, whether it had more or less of it than its neighbour. The damage
# is worst at one position, and fades as the map grows. It also fades when we test, because then batch norm uses
# running averages; but then the network is tested on inputs unlike those it was trained on.
#
# A milder version of this is there at any batch size. We push one digit through the first two layers of an untrained
# network, in the company of other digits, and ask how much its own output moves when the company changes.

# %%
torch.manual_seed(0)
layers = nn.Sequential(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16, track_running_stats=False))


@torch.no_grad()
def movement(batch_size, draws=64):
    """The standard deviation of one digit's output over random companies."""
    generator = torch.Generator().manual_seed(1)
    outputs = []
    for _ in range(draws):
        company = x_train[torch.randint(1, len(x_train), (batch_size - 1,), generator=generator)]
        outputs.append(layers(torch.cat([x_train[:1], company]))[0])
    return torch.stack(outputs).std(dim=0).mean().item()


for batch_size in (2, 8, 32, 128):
    print(f"batch of {batch_size:3}: {movement(batch_size):.2f}")
assert movement(2) > 3 * movement(32) > 3 * 1.5 * movement(128)

# %% [markdown]
# The outputs have standard deviation 1, so these are shares of the signal. The noise falls like $1/\sqrt B$, $B$ being
# the batch size: each time we take four times the company, we halve the movement.
#
# ## One picture, four layers
#
# A convolution gives numbers $x_{n,c,h,w}$: image $n$ of $N$, channel $c$ of $C$, row $h$, column $w$. All four
# well-known normalisation layers do the same thing to them,
#
# $$ \hat x_i = \frac{x_i - \mu_i}{\sqrt{\sigma_i^2 + \epsilon}}, \qquad
#    \mu_i = \frac1m \sum_{k \in S_i} x_k, \qquad
#    \sigma_i^2 = \frac1m \sum_{k \in S_i} (x_k - \mu_i)^2, $$ (eq-normalise)
#
# and differ only in the set $S_i$ of the $m$ numbers that share a mean with $x_i$ {cite}`wu2018group`. Here is $S_i$
# for one entry $i$. A square is one image's map of one channel.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four grids with six channels across and four images down; the squares that share a mean with one marked square are dark. Batch norm: one column, that is one channel of all images. Layer norm: one row, that is all channels of one image. Instance norm: the marked square only. Group norm: half a row, that is a group of three neighbouring channels of one image."}}
n_images, n_channels, n_groups, marked = 4, 6, 2, (1, 1)
shares = {
    "batch norm": lambda n, c: c == marked[1],
    "layer norm": lambda n, c: n == marked[0],
    "instance norm": lambda n, c: (n, c) == marked,
    "group norm": lambda n, c: n == marked[0] and c * n_groups // n_channels == marked[1] * n_groups // n_channels,
}
figure, all_axes = plt.subplots(1, 4, sharey=True, gridspec_kw={"wspace": 0.15})
figure.set_figheight(2.2)
for axes, (name, same) in zip(all_axes, shares.items(), strict=True):
    grid = torch.tensor([[float(same(n, c)) for c in range(n_channels)] for n in range(n_images)])
    axes.pcolormesh(grid, cmap="Blues", vmin=-0.15, vmax=1.3, edgecolors="white", linewidth=2)
    axes.plot(marked[1] + 0.5, marked[0] + 0.5, "o", color="white", markersize=4)
    axes.set_title(name)
    axes.set_xlabel("channel")
    axes.set_aspect("equal")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
all_axes[0].set_ylabel("image")
all_axes[0].invert_yaxis()
plt.show()


# %% [markdown]
# Batch norm crosses images. Layer norm {cite}`ba2016layer` takes all channels of one image, instance norm
# {cite}`ulyanov2016instance` one channel of one image, and group norm something between: a group of neighbouring
# channels of one image. The last three never look at a second image, so for them the batch size does not exist.
#
# In code the set $S_i$ is the tuple of dimensions that we average over.


# %%
def normalize_over(x, dims, eps=1e-5):
    mu = x.mean(dim=dims, keepdim=True)
    var = (x - mu).square().mean(dim=dims, keepdim=True)
    return (x - mu) / torch.sqrt(var + eps)


x = torch.randn(4, 6, 5, 5)  # (N, C, H, W)
batch = normalize_over(x, (0, 2, 3))
layer = normalize_over(x, (1, 2, 3))
instance = normalize_over(x, (2, 3))
group = normalize_over(x.reshape(4, 2, 3, 5, 5), (2, 3, 4)).reshape(4, 6, 5, 5)  # C = 2 groups of 3

torch.testing.assert_close(batch, F.batch_norm(x, None, None, training=True))
torch.testing.assert_close(layer, F.layer_norm(x, (6, 5, 5)))
torch.testing.assert_close(instance, F.instance_norm(x))
torch.testing.assert_close(group, F.group_norm(x, 2))

# %% [markdown]
# Four layers, one function. Group norm needs the reshape because a group is not a dimension until we make it one:
# channels $0, 1, 2$ are the first group, $3, 4, 5$ the second.
#
# **Before you run the next cell:** we replace the last three images by others. In which of the four does image 0
# come out as before?

# %%
other = torch.cat([x[:1], 100 * torch.randn(3, 6, 5, 5)])
print("batch norm:", torch.allclose(normalize_over(other, (0, 2, 3))[0], batch[0]))
print("layer norm:", torch.allclose(normalize_over(other, (1, 2, 3))[0], layer[0]))
print("group norm:", torch.allclose(F.group_norm(other, 2)[0], group[0]))


# %% [markdown]
# ## The code
#
# Normalising throws away the scale of the activations, which the next layer may need, so each channel gets it back
# as something to learn: $y_i = \gamma_c \hat x_i + \beta_c$. That completes the equation, and here it is in code,
# a line for each symbol. With `math.gcd` the error can name a number of groups that would have worked.


# %% tags=["export"]
def _check_groups(num_channels: int, num_groups: int) -> None:
    """Raise ValueError unless num_channels can be split into num_groups groups of equal size."""
    if num_groups < 1 or num_channels < 1:
        raise ValueError(f"channels and groups are counted from 1; got {num_channels} channels, {num_groups} groups")
    if num_channels % num_groups:
        raise ValueError(
            f"{num_channels} channels cannot be split into {num_groups} groups; "
            f"use a multiple of {num_groups} or groups={math.gcd(num_channels, num_groups)}"
        )


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Give each group of channels of each example mean 0 and variance 1, then scale and shift every channel.

    x: (N, C, ...); weight and bias: (C,) or None. Returns the shape of x. ValueError if num_groups does not divide C.
    The equation of Wu and He (2018), line by line; `GroupNorm` computes the same faster.
    """
    _check_groups(x.shape[1], num_groups)
    groups = x.reshape(x.shape[0], num_groups, -1)  # (N, G, m): one row of m numbers per mean
    mu = groups.mean(dim=2, keepdim=True)
    var = (groups - mu).square().mean(dim=2, keepdim=True)  # divides by m, not by m - 1
    y = ((groups - mu) / torch.sqrt(var + eps)).reshape(x.shape)
    per_channel = (1, -1) + (1,) * (x.ndim - 2)  # (C,) seen as (1, C, 1, 1)
    if weight is not None:
        y = y * weight.reshape(per_channel)
    if bias is not None:
        y = y + bias.reshape(per_channel)
    return y


# %% [markdown]
# The layer keeps $\gamma$ and $\beta$ and calls PyTorch's own `F.group_norm`, which makes fewer passes over memory
# than our lines do. It is what the network of this book uses from here on, so we owe the proof that the two are
# equal; it follows below. Names and arguments are those of `torch.nn.GroupNorm`: either can load the other's weights.


# %% tags=["export"]
class GroupNorm(nn.Module):
    """Group normalization with a learned scale and shift for every channel.

    Takes (N, C, ...) with C = num_channels and keeps the shape, the dtype and the memory layout.
    The arguments, their order and the names in the state dict are those of torch.nn.GroupNorm.
    Raises ValueError where the groups do not divide the channels, or where the input has other channels.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5):
        super().__init__()
        _check_groups(num_channels, num_groups)
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        self.weight = nn.Parameter(torch.ones(num_channels))  # gamma
        self.bias = nn.Parameter(torch.zeros(num_channels))  # beta

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.num_channels:
            raise ValueError(
                f"this GroupNorm normalises {self.num_channels} channels, so it takes (N, {self.num_channels}, ...); "
                f"got an input of shape {tuple(x.shape)}"
            )
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps:g}"


# %% [markdown]
# BiT uses 32 groups in every layer, from 64 channels (two to a group) to 8,192, and $\epsilon = 10^{-5}$. A network
# that is not wide enough says so:

# %%
print(GroupNorm(32, 64))
try:
    GroupNorm(32, 48)
except ValueError as error:
    print("ValueError:", error)


# %% [markdown]
# ## The gradient
#
# Autograd differentiates those lines for us, but the derivative is worth having: it shows what a normalisation layer
# does to learning. Take one group of $m$ numbers, write $s = \sqrt{\sigma^2 + \epsilon}$, and let $g_i$ be the
# derivative of the loss by $\hat x_i$. Changing $x_j$ changes $\hat x_i$ in three ways: directly, through the mean and
# through $s$. From $\partial \mu / \partial x_j = 1/m$ and
#
# $$ \frac{\partial s}{\partial x_j} = \frac{1}{2s}\,\frac{\partial \sigma^2}{\partial x_j}
#    = \frac{1}{2s}\cdot\frac{2}{m}(x_j - \mu) = \frac{\hat x_j}{m} $$
#
# (moving one $x_j$ moves $\mu$ too, but that part cancels, as the deviations sum to 0) we get
#
# $$ \frac{\partial \hat x_i}{\partial x_j}
#    = \frac1s\Bigl(\delta_{ij} - \frac1m\Bigr) - \frac{x_i - \mu}{s^2}\cdot\frac{\hat x_j}{m}
#    = \frac1s\Bigl(\delta_{ij} - \frac1m - \frac{\hat x_i \hat x_j}{m}\Bigr), $$
#
# and, summing over $i$ with weights $g_i$,
#
# $$ \frac{\partial L}{\partial x_j} = \frac1s\Bigl(g_j - \frac1m\sum_i g_i
#    - \hat x_j\,\frac1m\sum_i g_i \hat x_i\Bigr). $$ (eq-gn-gradient)
#
# Read it from left to right. The gradient is divided by the scale of the activations: that is what keeps gradients
# of one size through fifty layers. Then its mean is taken off, and its part along $\hat x$: the layer's output does not
# change when we add a constant to $x$ or stretch it, so the gradient does not ask for either. With
# $y_i = \gamma_c \hat x_i + \beta_c$, the rest is $g_i = \gamma_c\,\partial L/\partial y_i$ and, for the two
# parameters, sums over the images and positions of a channel.


# %%
def group_norm_backward(grad_y, x, num_groups, weight, eps=1e-5):
    """The derivatives of the loss by x, weight and bias, from grad_y, its derivative by the output."""
    n, c = x.shape[:2]
    groups = x.reshape(n, num_groups, -1)
    s = torch.sqrt(groups.var(dim=2, correction=0, keepdim=True) + eps)
    x_hat = (groups - groups.mean(dim=2, keepdim=True)) / s
    g = (grad_y * weight.reshape(1, c, 1, 1)).reshape(groups.shape)
    along = (g * x_hat).mean(dim=2, keepdim=True)
    grad_x = (g - g.mean(dim=2, keepdim=True) - x_hat * along) / s
    grad_weight = (grad_y * x_hat.reshape(x.shape)).sum(dim=(0, 2, 3))
    return grad_x.reshape(x.shape), grad_weight, grad_y.sum(dim=(0, 2, 3))


x = torch.randn(2, 8, 3, 3, dtype=torch.float64, requires_grad=True)
weight, bias = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
grad_y = torch.randn(2, 8, 3, 3, dtype=torch.float64)

by_autograd = torch.autograd.grad(group_norm(x, 4, weight, bias), (x, weight, bias), grad_y)
by_hand = group_norm_backward(grad_y, x.detach(), 4, weight.detach())
torch.testing.assert_close(by_hand, by_autograd, rtol=1e-12, atol=1e-12)

# %% [markdown]
# Autograd could share a mistake of ours in the forward pass, so we also let PyTorch compare it with finite
# differences. And we check the reading: in every group the gradient sums to zero, and is all but orthogonal to
# $\hat x$ (exactly so for $\epsilon = 0$).

# %%
assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, 4, w, b), (x, weight, bias))
(grad_x,) = torch.autograd.grad(group_norm(x, 4), x, grad_y)
grad_x, x_hat = grad_x.reshape(2, 4, -1), group_norm(x.detach(), 4).reshape(2, 4, -1)
print("sum below 1e-12:", grad_x.sum(dim=2).abs().max().item() < 1e-12)
print("along x_hat below 1e-4:", (grad_x * x_hat).sum(dim=2).abs().max().item() < 1e-4)


# %% [markdown]
# ## A short cut that is wrong
#
# The variance is also $E[x^2] - E[x]^2$. It needs one pass over the data instead of two, and it is exact, on paper.
# A float32 has 24 significant bits, some seven digits. When the mean is 1,000 and the deviation 1, both terms are about
# a million, and their difference is in the digits that have just been rounded away.
#
# **Before you run it:** from which mean on will the short cut be off by more than 1 %?


# %%
def group_norm_short_cut(x, num_groups, eps=1e-5):
    groups = x.reshape(x.shape[0], num_groups, -1)
    mu = groups.mean(dim=2, keepdim=True)
    var = groups.square().mean(dim=2, keepdim=True) - mu.square()  # can even be negative
    return ((groups - mu) / torch.sqrt(var.clamp(min=0) + eps)).reshape(x.shape)


torch.manual_seed(0)
z = torch.randn(4, 64, 8, 8)
means = [1, 10, 100, 1_000, 10_000]
wrong = {"two passes": [], "short cut": [], "PyTorch": [], "PyTorch, channels last": []}
for mean in means:
    x = z + mean
    truth = group_norm(x.double(), 32).float()
    candidates = (
        group_norm(x, 32),
        group_norm_short_cut(x, 32),
        F.group_norm(x, 32),
        F.group_norm(x.to(memory_format=torch.channels_last), 32),
    )
    for values, candidate in zip(wrong.values(), candidates, strict=True):
        values.append((candidate - truth).abs().max().item())

assert wrong["two passes"][3] < 1e-3 and wrong["PyTorch"][3] < 1e-3
assert wrong["short cut"][2] < 0.05 < 0.1 < wrong["short cut"][3]
print("PyTorch's channels-last kernel at mean 1,000 is off by more than 0.1:", wrong["PyTorch, channels last"][3] > 0.1)
print("and at mean 10 by less than 0.001:", wrong["PyTorch, channels last"][1] < 1e-3)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Largest error of a normalised value against the mean of the input, both on logarithmic scales. Two passes and PyTorch's default stay near the float32 limit, rising in proportion to the mean. The short cut and PyTorch's channels-last kernel rise with the square of the mean and are useless above a mean of 1,000."}}
figure, axes = plt.subplots()
for (name, values), marker, style in zip(wrong.items(), "osDx", ("-", "-", "--", "--"), strict=True):
    axes.loglog(means, values, marker=marker, linestyle=style, label=name)
axes.axhline(1, color="grey", linewidth=0.8)
axes.set_xlabel("mean of the input (its standard deviation is 1)")
axes.set_ylabel("largest error of an output")
axes.legend()
plt.show()

# %% [markdown]
# The grey line is one standard deviation of the output: above it nothing is left of the signal. Two passes lose
# digits too, because the input itself has fewer after the shift, but only in proportion to the mean, and not to its
# square.
#
# There is a surprise in the picture. PyTorch's own kernel for `channels_last` tensors on the CPU takes the short cut,
# in the version that this book is pinned to; its kernel for ordinary tensors does not. We keep it, since a mean of
# ten standard deviations costs it less than a thousandth; but whoever normalizes numbers whose mean is hundreds of times
# their deviation, temperatures in kelvin or a nearly blank page, should know.
#
# ## Proof
#
# The exported layer against our derived lines and against `torch.nn.GroupNorm`, forward and backward. What we print
# is the largest difference, rounded up to a power of ten.


# %%
def below(a, b):
    """A power of ten that no entry's difference reaches."""
    largest = (a - b).abs().max().item()
    return f"1e{math.floor(math.log10(largest)) + 1:+03}" if largest else "equal"


torch.manual_seed(4)
ours, theirs = GroupNorm(32, 128), nn.GroupNorm(32, 128)
nn.init.uniform_(ours.weight)
nn.init.uniform_(ours.bias)
theirs.load_state_dict(ours.state_dict())

x = (3 * torch.randn(2, 128, 7, 7) + 2).requires_grad_()
inputs = (x, ours.weight, ours.bias)
derived = group_norm(x, 32, ours.weight, ours.bias)
grad_y = torch.randn_like(derived)
gradients = {
    "derived": torch.autograd.grad(derived, inputs, grad_y),
    "ours": torch.autograd.grad(ours(x), inputs, grad_y),
    "torch": torch.autograd.grad(theirs(x), (x, theirs.weight, theirs.bias), grad_y),
}
print("forward, layer and torch.nn.GroupNorm:", below(ours(x), theirs(x)))
print("forward, layer and derived lines:     ", below(ours(x), derived))
for name, a, b, c in zip(("x", "weight", "bias"), *gradients.values(), strict=True):
    print(f"gradient of {name:6}, derived and torch: {below(a, c)}; layer and torch: {below(b, c)}")
torch.testing.assert_close(derived, theirs(x))
torch.testing.assert_close(gradients["derived"], gradients["torch"], rtol=1e-4, atol=1e-4)
torch.testing.assert_close(gradients["ours"], gradients["torch"])


# %% [markdown]
# The sums for $\gamma$ and $\beta$ run over 98 numbers, in another order on either side, and so they differ in one
# digit more.
#
# ## Statistics that travel badly
#
# There is a second reason why BiT has no batch norm, and it matters more for transfer than the size of the batch.
# When batch norm is tested it uses *stored* statistics: a running average of the means and variances it has seen.
# They describe the pre-training data. What if the images of the new task have others?
#
# We train on ordinary digits with batches of 32, where batch norm is at home, and then turn down the contrast
# of the test digits: $x \to c\,x$. The strokes are as legible as before. Three ways to read them: batch norm with
# its stored statistics, batch norm with the statistics of the test batch itself, and group norm.
#
# **Before you run it:** sketch the three curves of error against $c$. One of them you can know exactly from equation
# {eq}`eq-normalise`.

# %% tags=["nbval-ignore-output"]
contrasts = (1.0, 0.7, 0.5, 0.3, 0.2)
curves = {"batch norm, stored statistics": [], "batch norm, statistics of the test batch": [], "group norm": []}
tuned = {"batch norm, stored statistics": [], "batch norm, new statistics": [], "group norm": []}
few_x, few_y = 0.25 * x_train[:100], y_train[:100]  # a new task: 100 digits in faint ink
for seed in range(5):
    nets = {}
    for norm in (batch_norm, eight_to_a_group):
        torch.manual_seed(seed)
        nets[norm] = fit(small_net(norm), x_train, y_train, 32, epochs=6, seed=seed)
    bn, gn = nets.values()
    own = copy.deepcopy(bn).train()  # in training mode, batch norm uses the batch that it is given
    for values, net in zip(curves.values(), (bn, own, gn), strict=True):
        values.append([test_error(net, c * x_test) for c in contrasts])
    for values, net, frozen_norm in zip(tuned.values(), (bn, bn, gn), (True, False, False), strict=True):
        net = fit(copy.deepcopy(net), few_x, few_y, 20, epochs=10, seed=seed, frozen_norm=frozen_norm)
        values.append(test_error(net, 0.25 * x_test))
curves = {name: torch.tensor(values) for name, values in curves.items()}  # (seeds, contrasts)
tuned = {name: torch.tensor(values) for name, values in tuned.items()}
for name, values in tuned.items():
    print(f"fine-tuned on 100 faint digits, {name:30} {values.mean():4.1f} ± {values.std():3.1f} % wrong")

# %%
stored, _, grouped = curves.values()
assert stored[:, 0].max() < 8  # at home
assert stored[:, 3].mean() > 50 and stored[:, 4].min() > 50  # at contrast 0.3 and 0.2
assert (grouped - grouped[:, :1]).abs().max() < 0.5 and grouped.max() < 8  # at every contrast the same
assert tuned["batch norm, stored statistics"].mean() > 1.5 * tuned["group norm"].mean()
assert tuned["batch norm, stored statistics"].mean() > 1.6 * tuned["batch norm, new statistics"].mean()

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test error against contrast, mean and range of five seeds. Batch norm with stored statistics rises from a few per cent at full contrast to far over half at contrast 0.3; batch norm with the test batch's statistics and group norm are flat at a few per cent."}}
figure, axes = plt.subplots()
for (name, values), marker in zip(curves.items(), "os^", strict=True):
    (line,) = axes.plot(contrasts, values.mean(dim=0), marker=marker, label=name)
    axes.fill_between(contrasts, values.amin(dim=0), values.amax(dim=0), color=line.get_color(), alpha=0.2)
axes.set_xlabel("contrast of the test digits, as a share of the training digits'")
axes.set_ylabel("test error, %")
axes.set_ylim(0, 100)
axes.invert_xaxis()
axes.legend()
plt.show()

# %% [markdown]
# With stored statistics, digits at 0.3 of the contrast are misread more often than not. Group norm gives the very
# same answers at any contrast: its first layer divides by a deviation that shrank with the image.
#
# Fine-tuning on the new task repairs some of this, not all. With the stored statistics *frozen*, as is often advised
# for small batches, the network makes about twice the errors of the same network allowed to take new statistics.
# Group norm has nothing to freeze and nothing to forget: the one recipe of the later chapters works at any batch
# size, on any number of images.
#
# Two things we did not show. Batch norm with plenty of company is an excellent layer: it beats group norm in our own
# runs at batch size 32, and in the paper's ablation too (75.6 against 70.2 % top-1 on ImageNet, ResNet-50, batch 4,096
# {cite}`kolesnikov2020big`). And group norm alone is not what BiT uses. In that table it needs the next chapter's
# idea to come out ahead, with 76.0 %. On transfer to VTAB, the order is 67.7 for batch norm, 68.8 for group norm and
# 70.4 for both ideas together.
#
# ```{admonition} Where sources disagree
# :class: note
# - One widely-copied summary of BiT draws its blocks with batch norm and advises to "reuse upstream BatchNorm running
#   statistics" always. BiT has no batch norm anywhere, and no running statistics to reuse: paper and released code
#   have group norm with 32 groups {cite}`kolesnikov2020big,bittransfer_code`. The experiment above shows what
#   re-used statistics do when the data differ.
# - The advice is not foolish in itself. For a network that *has* batch norm, fine-tuned with tiny batches on images
#   like the old ones, stored statistics are the lesser evil. It is advice about another network.
# - Some texts give the variance with $m-1$ below. Every normalisation layer of PyTorch divides by $m$. (Batch norm
#   has one odd exception; see exercise 3.)
# ```
#
# ## Exercises
#
# Each exercise is a stub to fill in and a check to hand your object to. Solutions are folded below the stubs.

# %% tags=["check", "hide-cell"]
import torch
import torch.nn.functional as F
from torch import nn


def _close(a, b) -> bool:
    return isinstance(a, torch.Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def check_group_norm(function) -> None:
    """function(x, num_groups, eps) must normalise each group of channels of each example."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(3, 6, 2, 2, generator=generator) + 1
    got, want = function(x, 3, 1e-5), F.group_norm(x, 3)
    assert isinstance(got, torch.Tensor), f"your function returned {type(got).__name__}; return the normalised tensor"
    assert got.shape == x.shape, f"the output has shape {tuple(got.shape)}; the input has {tuple(x.shape)}"
    m = 8
    mistakes = {
        "your variance divides by m-1; the layer divides by m": want * ((m - 1) / m) ** 0.5,
        "you normalised over the batch as well; a mean belongs to one example": _over_batch(x, 3),
        "your groups are channels 0, 3 / 1, 4 / 2, 5; a group is neighbours, 0, 1 / 2, 3 / 4, 5": _strided(x, 3),
        "you divided by the variance; divide by its root": _by_variance(x, 3),
        "you divided but did not subtract the mean": _uncentred(x, 3),
    }
    for message, mistake in mistakes.items():
        assert not torch.allclose(got, mistake, rtol=1e-4, atol=1e-5), message
    assert _close(got, want), "the values differ from F.group_norm; compare mean and variance of one group by hand"
    small = 1e-3 * x
    got, want = function(small, 3, 1e-5), F.group_norm(small, 3)
    outside = (small * 1e3 - _group_mean(small * 1e3, 3)) / (_group_std(small, 3) + 1e-5) * 1e-3
    assert not torch.allclose(got, outside, rtol=1e-3, atol=1e-4), "your eps is outside the root; it belongs inside"
    assert _close(got, want), "wrong for inputs near zero: does your function use eps, inside the root?"
    big = x + 1000
    assert (function(big, 3, 1e-5) - F.group_norm(big.double(), 3).float()).abs().max() < 1e-2, (
        "wrong for a mean of 1,000: subtract the mean before you square"
    )
    assert _close(function(x[:, :, 0, 0], 3, 1e-5), F.group_norm(x[:, :, 0, 0], 3)), "it should take (N, C) as well"
    print("check_group_norm: correct")


def _group_mean(x, g):
    return x.reshape(x.shape[0], g, -1).mean(2).repeat_interleave(x.shape[1] // g, 1)[:, :, None, None]


def _group_std(x, g):
    return x.reshape(x.shape[0], g, -1).std(2, correction=0).repeat_interleave(x.shape[1] // g, 1)[:, :, None, None]


def _over_batch(x, g):
    rows = x.reshape(x.shape[0], g, -1)
    std = (rows.var((0, 2), correction=0, keepdim=True) + 1e-5).sqrt()
    return ((rows - rows.mean((0, 2), keepdim=True)) / std).reshape(x.shape)


def _strided(x, g):
    order = torch.arange(x.shape[1]).reshape(-1, g).T.flatten()
    return F.group_norm(x[:, order], g)[:, order.argsort()]


def _by_variance(x, g):
    return (x - _group_mean(x, g)) / (_group_std(x, g).square() + 1e-5)


def _uncentred(x, g):
    return x / (_group_std(x, g).square() + 1e-5).sqrt()


def check_special_cases(layer, instance) -> None:
    """layer(x) and instance(x) must be layer norm and instance norm over (C, H, W) and (H, W)."""
    generator = torch.Generator().manual_seed(0)
    for channels in (4, 6):
        x = torch.randn(3, channels, 5, 5, generator=generator) * torch.arange(1.0, channels + 1)[:, None, None]
        wants = {"layer": F.layer_norm(x, x.shape[1:]), "instance": F.instance_norm(x)}
        gots = {"layer": layer(x), "instance": instance(x)}
        swapped = _close(gots["layer"], wants["instance"]) and _close(gots["instance"], wants["layer"])
        assert not swapped, "you have the two the wrong way round: instance norm has as many groups as channels"
        for name, want in wants.items():
            assert gots[name] is not None, f"your {name} norm returned nothing"
            assert _close(gots[name], want), (
                f"your {name} norm is wrong for {channels} channels; how many groups make one mean "
                + ("for all channels?" if name == "layer" else "for each channel?")
            )
    print("check_special_cases: correct")


def check_running_statistics(function) -> None:
    """function(x, mean, var, momentum) must return the new (mean, var) that nn.BatchNorm2d would store."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(2, 4, 2, 2, generator=generator) + 5
    for momentum in (0.1, 0.5):
        layer = nn.BatchNorm2d(4, momentum=momentum)
        mean, var = layer.running_mean.clone(), layer.running_var.clone()
        layer(x)
        got = function(x, mean, var, momentum)
        assert isinstance(got, tuple) and len(got) == 2, "return a pair: the new mean and the new variance"
        assert not _close(got[0], (1 - momentum) * x.mean((0, 2, 3)) + momentum * mean) or momentum == 0.5, (
            "momentum is the share of the new batch, not of the old average (PyTorch's convention)"
        )
        assert _close(got[0], layer.running_mean), "the mean is wrong; average over images, rows and columns"
        biased = (1 - momentum) * var + momentum * x.var((0, 2, 3), correction=0)
        assert not _close(got[1], biased), "your variance divides by m; here, and only here, PyTorch divides by m-1"
        assert _close(got[1], layer.running_var), "the variance is wrong"
    print("check_running_statistics: correct")


def check_group_norm_backward(function) -> None:
    """function(grad_y, x, num_groups) must return the derivative of the loss by x (weight 1, bias 0, eps 1e-5)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64) * 3 + 1
    grad_y = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(F.group_norm(leaf, 2), leaf, grad_y)
    got = function(grad_y, x, 2)
    assert isinstance(got, torch.Tensor) and got.shape == x.shape, "return a tensor of the shape of x"
    rows, grads = got.reshape(2, 2, -1), grad_y.reshape(2, 2, -1)
    s = (x.reshape(2, 2, -1).var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    assert not torch.allclose(rows, grads / s), "you kept only the direct term; x also acts through mean and variance"
    assert not torch.allclose(rows, (grads - grads.mean(2, keepdim=True)) / s), "the part by the variance is missing"
    assert not torch.allclose(got.reshape(2, 2, -1), want.reshape(2, 2, -1) * s), "divide by the standard deviation"
    assert rows.sum(2).abs().max() < 1e-8, "within a group the gradient must sum to 0; yours does not"
    assert torch.allclose(got, want), "the values differ from autograd's"
    print("check_group_norm_backward: correct")


# %% [markdown]
# **1. Write it yourself.** Without looking up: group norm from `mean`, `reshape` and arithmetic, for an input of any
# number of dimensions from two. (The check knows the usual slips by name.)


# %% tags=["exercise"]
def my_group_norm(x, num_groups, eps):
    return x  # your code


# check_group_norm(my_group_norm)


# %% tags=["solution", "hide-input"]
def my_group_norm(x, num_groups, eps):
    rows = x.reshape(len(x), num_groups, -1)
    centred = rows - rows.mean(dim=-1, keepdim=True)
    return (centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + eps)).reshape(x.shape)


check_group_norm(my_group_norm)


# %% [markdown]
# **2. The two ends of the scale.** Layer norm and instance norm are group norm with a special number of groups. Write
# each as one call of `group_norm`.


# %% tags=["exercise"]
def my_layer_norm(x):
    return group_norm(x, 2)  # which number?


def my_instance_norm(x):
    return group_norm(x, 2)


# check_special_cases(my_layer_norm, my_instance_norm)


# %% tags=["solution", "hide-input"]
def my_layer_norm(x):
    return group_norm(x, 1)


def my_instance_norm(x):
    return group_norm(x, x.shape[1])


check_special_cases(my_layer_norm, my_instance_norm)


# %% [markdown]
# **3. What batch norm stores.** In training, `nn.BatchNorm2d` updates its running mean by
# $\mu \leftarrow (1-a)\,\mu + a\,\mu_\text{batch}$, $a$ being what PyTorch calls momentum, and the running variance
# likewise. Write the update for `x` of shape $(N, C, H, W)$. One thing about the variance is odd.


# %% tags=["exercise"]
def my_running_statistics(x, mean, var, momentum):
    return mean, var  # your code


# check_running_statistics(my_running_statistics)


# %% tags=["solution", "hide-input"]
def my_running_statistics(x, mean, var, momentum):
    # Normalising divides by m, but what is stored is the unbiased variance, with m - 1.
    new_mean, new_var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=1)
    return (1 - momentum) * mean + momentum * new_mean, (1 - momentum) * var + momentum * new_var


check_running_statistics(my_running_statistics)


# %% [markdown]
# **4. Derive it.** Close the section on the gradient, and derive it again with paper and pencil for $\gamma = 1$,
# $\beta = 0$. Then write it down in code.


# %% tags=["exercise"]
def my_group_norm_backward(grad_y, x, num_groups, eps=1e-5):
    return grad_y  # your code


# check_group_norm_backward(my_group_norm_backward)


# %% tags=["solution", "hide-input"]
def my_group_norm_backward(grad_y, x, num_groups, eps=1e-5):
    g, rows = (t.reshape(len(x), num_groups, -1) for t in (grad_y, x))
    s = torch.sqrt(rows.var(dim=2, correction=0, keepdim=True) + eps)
    x_hat = (rows - rows.mean(dim=2, keepdim=True)) / s
    grad_x = (g - g.mean(dim=2, keepdim=True) - x_hat * (g * x_hat).mean(dim=2, keepdim=True)) / s
    return grad_x.reshape(x.shape)


check_group_norm_backward(my_group_norm_backward)

# %% [markdown]
# ## What to remember
#
# - Batch, layer, instance and group norm are one equation with four choices of which numbers share a mean. Only
#   batch norm crosses images.
# - What breaks batch norm is too few numbers per mean. Two give $\pm 1$, whatever they were.
# - Stored statistics belong to the data that they came from. Group norm stores none.
# - The gradient of a normalisation layer has no part along the constant and none along the output.
# - Subtract the mean before squaring.
