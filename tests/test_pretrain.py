"""Chapter 06: SGD, schedules, losses, accumulation, the data order, the loop's hooks, and the command line."""

import dataclasses
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitlib import pretrain as module
from bitlib.checkpoints import load_pretrained, read_metadata
from bitlib.data import LabelGroup
from bitlib.pretrain import (
    SGD,
    PretrainConfig,
    accumulate,
    clip_gradients,
    cross_entropy,
    enlarge,
    group_accuracy,
    linear_scaling,
    main,
    pretrain,
    shard_indices,
    sigmoid_cross_entropy,
    step_windows,
    train,
    upstream_batches,
    upstream_loss,
    warmup_cosine_lr,
    warmup_polynomial_lr,
    warmup_step_lr,
)

ROOT = Path(__file__).resolve().parent.parent
TINY = PretrainConfig(
    model="R14x0.25", data="S", steps=3, batch_size=6, lr=0.02, warmup_steps=0, image_size=32, val_images=20
)


def mlp(seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)).to(dtype)


def batch_fn(step, n=10, dtype=torch.float32):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
    return x, x[:, :4].argmax(dim=1)


def run(model, steps=12, **options):
    options = {"lr": lambda step: 0.1, "progress": False} | options
    return train(model, options.pop("batch_fn", batch_fn), F.cross_entropy, steps=steps, **options)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# SGD


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_sgd_equals_torch_at_every_step(momentum, weight_decay):
    ours, theirs = mlp(), mlp()
    a = SGD(ours.parameters(), momentum=momentum, weight_decay=weight_decay)
    b = torch.optim.SGD(theirs.parameters(), lr=1.0, momentum=momentum, weight_decay=weight_decay, foreach=False)
    for step in range(25):
        a.lr = b.param_groups[0]["lr"] = 0.2 / (1 + step)
        x, y = batch_fn(step)
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert same(ours, theirs), step


def test_sgd_leaves_alone_what_has_no_gradient():
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    optimizer = SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, True, False]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# schedules


def test_step_schedule_divides_at_the_step_itself():
    rate = [warmup_step_lr(s, 1.0, 4, [6, 8]) for s in range(10)]
    assert rate == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01])
    assert warmup_step_lr(0, 0.3, 0, [5]) == 0.3


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_smooth_schedules_begin_at_the_full_rate_and_end_at_zero(warmup):
    for schedule in (warmup_cosine_lr, warmup_polynomial_lr):
        rates = [schedule(s, 0.5, warmup, 100) for s in range(101)]
        assert max(rates) == pytest.approx(0.5)
        assert rates[100] == pytest.approx(0.0, abs=1e-12)
        after = rates[warmup:]
        assert all(a >= b for a, b in zip(after, after[1:], strict=False))
        assert schedule(500, 0.5, warmup, 100) == pytest.approx(0.0, abs=1e-12), "past the end it stays at 0"
    assert warmup_cosine_lr(50, 1.0, 0, 100) == pytest.approx(0.5)
    assert warmup_polynomial_lr(50, 1.0, 0, 100, power=2.0) == pytest.approx(0.25)


def test_schedules_equal_torch_schedulers():
    lr_scheduler = torch.optim.lr_scheduler
    for make, ours in (
        (lambda o: lr_scheduler.MultiStepLR(o, [3, 7]), lambda s: warmup_step_lr(s, 0.4, 0, [3, 7])),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 20), lambda s: warmup_cosine_lr(s, 0.4, 0, 20)),
        (lambda o: lr_scheduler.PolynomialLR(o, 20, 3.0), lambda s: warmup_polynomial_lr(s, 0.4, 0, 20, 3.0)),
    ):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
        scheduler = make(optimizer)
        for step in range(20):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(ours(step), abs=1e-12)
            optimizer.step()
            scheduler.step()


def test_linear_scaling_gives_the_papers_rate():
    assert linear_scaling(4096) == pytest.approx(0.48)
    assert linear_scaling(64, 0.1, 128) == pytest.approx(0.05)


# losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("scale", [1, 100])
def test_cross_entropy_equals_torch(smoothing, scale):
    z = scale * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    y = torch.arange(50) % 7
    for reduction in ("mean", "none"):
        expected = F.cross_entropy(z, y, label_smoothing=smoothing, reduction=reduction)
        torch.testing.assert_close(cross_entropy(z, y, smoothing, reduction), expected)
    assert cross_entropy(z.bfloat16(), y, smoothing).dtype == torch.float32
    assert cross_entropy(z.double(), y, smoothing).dtype == torch.float64


def test_sigmoid_cross_entropy_equals_torch_and_does_not_overflow():
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(50, 7, generator=g), torch.rand(50, 7, generator=g)
    for scale in (1, 30, 1e4):
        expected = F.binary_cross_entropy_with_logits(scale * z, y, reduction="none").sum(dim=1).mean()
        torch.testing.assert_close(sigmoid_cross_entropy(scale * z, y), expected)
    z.requires_grad_()
    sigmoid_cross_entropy(1e4 * z, y).backward()
    assert torch.isfinite(z.grad).all()


GROUPS = (LabelGroup("character", 5, 1.0), LabelGroup("ink", 3, 0.25))


def labelled(n=12, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 8, generator=g, dtype=dtype)
    return z, torch.stack([torch.randint(-1, 5, (n,), generator=g), torch.randint(-1, 3, (n,), generator=g)], dim=1)


def test_upstream_softmax_ignores_absent_labels_and_weighs_groups():
    z, t = labelled()
    expected = F.cross_entropy(z[:, :5], t[:, 0], ignore_index=-1, reduction="sum") / 12
    expected += 0.25 * F.cross_entropy(z[:, 5:], t[:, 1], ignore_index=-1, reduction="sum") / 12
    torch.testing.assert_close(upstream_loss(z, t, GROUPS), expected)
    z.requires_grad_()
    upstream_loss(z, t, GROUPS, label_smoothing=0.1).backward()
    assert (z.grad[t[:, 0] < 0, :5] == 0).all() and (z.grad[t[:, 1] < 0, 5:] == 0).all()
    assert (z.grad[t[:, 0] >= 0, :5] != 0).all()


def test_upstream_sigmoid_takes_absent_for_no():
    z, t = labelled()
    yes = torch.zeros(12, 8, dtype=torch.float64)
    for i, (a, b) in enumerate(t.tolist()):
        if a >= 0:
            yes[i, a] = 1
        if b >= 0:
            yes[i, 5 + b] = 1
    weight = torch.tensor([1.0] * 5 + [0.25] * 3, dtype=torch.float64)
    expected = (F.binary_cross_entropy_with_logits(z, yes, reduction="none") * weight).sum(dim=1).mean()
    torch.testing.assert_close(upstream_loss(z, t, GROUPS, "sigmoid"), expected)


def test_a_batch_without_any_label_of_a_group_is_no_nan():
    z, _ = labelled()
    loss = upstream_loss(z, torch.full((12, 2), -1), GROUPS)
    assert loss == 0


@given(split=st.integers(1, 11), kind=st.sampled_from(["softmax", "sigmoid"]), seed=st.integers(0, 99))
def test_parts_of_a_batch_add_up_whatever_labels_they_have(split, kind, seed):
    z, t = labelled(seed=seed)
    whole = upstream_loss(z, t, GROUPS, kind)
    parts = split * upstream_loss(z[:split], t[:split], GROUPS, kind)
    parts += (12 - split) * upstream_loss(z[split:], t[split:], GROUPS, kind)
    torch.testing.assert_close(parts / 12, whole)


def test_unknown_loss_is_named():
    with pytest.raises(ValueError, match="hinge.*softmax.*sigmoid"):
        upstream_loss(*labelled(), GROUPS, "hinge")


# accumulation and clipping


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 13), micro_batch=st.one_of(st.none(), st.integers(1, 15)))
def test_accumulation_equals_the_large_batch(n, micro_batch):
    model, x_y = mlp(dtype=torch.float64), batch_fn(0, n, torch.float64)
    F.cross_entropy(model(x_y[0]), x_y[1]).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = accumulate(model, *x_y, F.cross_entropy, n, micro_batch)
    torch.testing.assert_close(loss, F.cross_entropy(model(x_y[0]), x_y[1]).detach())
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_training_with_micro_batches_equals_training_without():
    a, b = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    fn = lambda step: batch_fn(step, 10, torch.float64)  # noqa: E731
    run(a, batch_fn=fn, weight_decay=1e-3)
    run(b, batch_fn=fn, weight_decay=1e-3, micro_batch=4)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_clipping_equals_torch():
    for max_norm in (None, 0.1, 1e6):
        ours, theirs = mlp(), mlp()
        for model in (ours, theirs):
            F.cross_entropy(model(batch_fn(0)[0]), batch_fn(0)[1]).backward()
        norm = clip_gradients([p.grad for p in ours.parameters()], max_norm)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf)
        torch.testing.assert_close(norm, expected)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


# the data order


@given(
    step=st.integers(0, 500),
    batch=st.integers(1, 40),
    n=st.integers(1, 60),
    world=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_shares_of_all_processes_are_the_batch_of_one(step, batch, n, world, seed):
    whole = shard_indices(step, batch, n, seed)
    shares = [shard_indices(step, batch, n, seed, rank, world) for rank in range(world)]
    assert torch.equal(whole, torch.cat(shares))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len(whole) == batch and whole.min() >= 0 and whole.max() < n


def test_every_epoch_is_another_permutation():
    stream = torch.cat([shard_indices(step, 7, 30) for step in range(30)])  # 7 epochs, batches across their borders
    epochs = stream[:210].view(7, 30)
    assert (epochs.sort(dim=1).values == torch.arange(30)).all()
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 7
    assert not torch.equal(shard_indices(0, 30, 30, seed=0), shard_indices(0, 30, 30, seed=1))


def test_an_endless_stream_is_taken_in_order():
    assert shard_indices(5, 4, 2**31).tolist() == [20, 21, 22, 23]
    assert shard_indices(2**29, 4, 2**31).tolist() == [0, 1, 2, 3], "and begins again after its end"


# the loop


def test_history_has_every_step_and_the_rates_used():
    history = run(mlp(), steps=7, lr=lambda step: 0.1 / (1 + step), log_every=3)
    assert len(history.loss) == len(history.grad_norm) == 7
    assert history.lr == [0.1 / (1 + step) for step in range(7)]
    x, y = batch_fn(0)
    assert history.loss[0] == pytest.approx(F.cross_entropy(mlp()(x), y).item())


@pytest.fixture(params=["a core is free", "no core is free"])
def cores(request, monkeypatch):
    """Whether the batches are made ahead, in a thread of their own."""
    free = request.param == "a core is free"
    many = set(range(torch.get_num_threads() + free))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: many, raising=False)
    return free


def test_each_batch_is_asked_for_once_and_in_order(cores):
    asked, elsewhere = [], []

    def fn(step):
        asked.append(step)
        elsewhere.append(threading.current_thread() is not threading.main_thread())
        return batch_fn(step)

    run(mlp(), batch_fn=fn)
    assert asked == list(range(12))
    assert elsewhere == [cores] * 12


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's memory is told what to keep")
def test_a_step_finds_the_memory_of_the_step_before():
    """In a process of its own: thousands of pages a step are touched, and hardly one is new to the process."""
    code = """
import resource, torch
from torch import nn
from bitlib.pretrain import train
x, y, faults = torch.ones(64, 3, 64, 64), torch.zeros(64, dtype=torch.long), []
net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
count = lambda *_: faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
train(net, lambda step: (x[: 8 + 4 * (step % 2)] + step, y[: 8 + 4 * (step % 2)]), nn.functional.cross_entropy,
      lambda step: 0.1, 12, progress=False, on_step=count)
print((faults[-1] - faults[-7]) / 6)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 500  # a map of 12 images alone has 1,400 pages


def test_the_loop_is_plain_sgd(cores):
    model, expected = mlp(), mlp()
    run(model, momentum=0.8, weight_decay=0.01, clip_norm=0.5)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.8, weight_decay=0.01)
    for step in range(12):
        x, y = batch_fn(step)
        optimizer.zero_grad()
        F.cross_entropy(expected(x), y).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        optimizer.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_only_the_chosen_parameters_move():
    model, before = mlp(), mlp()
    model[0].bias.requires_grad_(False)
    run(model, parameters=model[2].parameters())
    assert torch.equal(model[0].weight, before[0].weight) and not torch.equal(model[2].weight, before[2].weight)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True], "left as it was found"


def test_parameters_of_another_model_are_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        run(mlp(), parameters=mlp().parameters())
    with pytest.raises(ValueError, match="nothing to train"):
        run(mlp(), parameters=[])


def test_targets_may_be_tuples():
    def mixed(logits, target):
        a, b, share = target
        each = [F.cross_entropy(logits, labels, reduction="none") for labels in (a, b)]
        return (share * each[0] + (1 - share) * each[1]).mean()

    def fn(step):
        x, y = batch_fn(step)
        return x, (y, y.flip(0), torch.full((10,), 0.7))

    a, b = mlp(), mlp()
    for model, size in ((a, None), (b, 3)):
        train(model, fn, mixed, lambda step: 0.1, 5, micro_batch=size, progress=False)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_evaluations_and_the_best_weights(tmp_path):
    scores = {4: 0.2, 8: 0.9, 12: 0.5}
    seen = []

    def eval_fn(model):
        assert not model.training
        seen.append({name: t.clone() for name, t in model.state_dict().items()})
        return {"score": scores[4 * len(seen)]}

    for run_dir in (None, tmp_path / "run"):
        seen.clear()
        model = mlp()
        history = run(model, eval_fn=eval_fn, eval_every=4, keep_best="score", run_dir=run_dir)
        assert history.evals == [{"step": step, "score": score} for step, score in scores.items()]
        assert history.best == {"step": 8, "value": 0.9}
        assert all(torch.equal(t, seen[1][name]) for name, t in model.state_dict().items())
    again = mlp(seed=5)
    assert run(again, eval_fn=eval_fn, eval_every=4, keep_best="score", run_dir=tmp_path / "run") == history
    assert same(again, model), "a finished run gives its best weights again"


def test_on_step_sees_the_updated_model():
    steps = []
    run(mlp(), on_step=lambda step, model: steps.append((step, model.training)))
    assert steps == [(step, True) for step in range(1, 13)]


def test_an_error_in_the_data_comes_through(cores):
    def fn(step):
        if step == 3:
            raise KeyError("no such picture")
        return batch_fn(step)

    with pytest.raises(KeyError, match="no such picture"):
        run(mlp(), batch_fn=fn)


def test_the_log_has_one_line_a_report(tmp_path):
    run(mlp(), run_dir=tmp_path, log_every=5, eval_fn=lambda model: {"acc": 0.5}, eval_every=6)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], "eval/acc" in line) for line in lines] == [
        (5, False), (6, True), (10, False), (12, False), (12, True)
    ]  # fmt: skip
    assert lines[0]["images_per_second"] > 0 and lines[0]["lr"] == 0.1


def test_handlers_come_back_and_other_threads_need_none(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(mlp(), run_dir=tmp_path / "a")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    failed = []

    def work():
        try:
            run(mlp(), run_dir=tmp_path / "b")
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


def test_keep_must_keep_something(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        run(mlp(), run_dir=tmp_path, keep=0)


def test_bfloat16_autocast_trains_float32_weights():
    model = mlp()
    history = run(model, amp=True)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    exact = run(mlp())
    assert history.loss != exact.loss and history.loss == pytest.approx(exact.loss, rel=0.05)


# pre-training


def test_enlarge():
    images = torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(enlarge(images, 32), images.float() / 127.5 - 1) or enlarge(images, 32).abs().max() <= 1
    large = enlarge(images, 64)
    assert large.shape == (2, 3, 64, 64) and large.dtype == torch.float32
    expected = F.interpolate(enlarge(images, 32), scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(large, expected)
    assert torch.equal(large, expected.contiguous()) and large.is_contiguous(memory_format=torch.channels_last)


def test_group_accuracy_counts_only_what_is_labelled():
    class Says(nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(1))

        def forward(self, x):  # always class 1 of the first group and class 2 of the second
            return torch.tensor([[0.0, 1, 0, 0, 0, 0, 0, 1]]).expand(len(x), -1)

    targets = torch.tensor([[1, 2], [1, -1], [0, 0], [-1, -1]])
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    for batch_size in (1, 3, 4):
        found = group_accuracy(Says(), images, targets, GROUPS, 32, batch_size)
        assert found == {"character": pytest.approx(2 / 3, abs=1e-4), "ink": 0.5}


def test_pretrain_writes_a_model_that_loads_and_a_card_that_is_true(tmp_path):
    result = pretrain(TINY, tmp_path, progress=False)
    path = tmp_path / "model.safetensors"
    loaded = load_pretrained(path)
    assert loaded.name == "R14x0.25" and loaded.image_size == 32
    assert same(loaded, result.model)
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert card["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert card["images_seen"] == 18 and card["val"] == result.val
    assert sum(group["n_classes"] for group in card["groups"]) == loaded.num_classes
    assert json.loads(read_metadata(path)["config"])["seed"] == 0
    again = pretrain(TINY, tmp_path, progress=False)  # finished: nothing is trained
    assert same(again.model, result.model) and again.history == result.history
    other = pretrain(dataclasses.replace(TINY, seed=1), progress=False)
    assert not same(other.model, result.model)


def test_pretrain_goes_on_from_a_checkpoint(tmp_path):
    pretrain(TINY, tmp_path, progress=False)
    start = load_pretrained(tmp_path / "model.safetensors")
    config = dataclasses.replace(TINY, init=str(tmp_path / "model.safetensors"), lr=0.0, weight_decay=0.0)
    assert same(pretrain(config, progress=False).model, start), "with a rate of 0 it stays where it began"
    with pytest.raises(ValueError, match="is a R14x0.25, not a R26x0.25"):
        pretrain(dataclasses.replace(config, model="R26x0.25"), progress=False)


def test_pretrain_takes_other_data_and_the_sigmoid():
    class Stripes:
        groups = (LabelGroup("stripe", 4, 1.0),)

        def __len__(self):
            return 100

        def batch(self, indices):
            classes = indices % 4
            images = torch.zeros(len(indices), 3, 32, 32, dtype=torch.uint8)
            for image, c in zip(images, classes.tolist(), strict=True):
                image[:, :, 8 * c : 8 * c + 8] = 255
            return images, classes[:, None]

    config = dataclasses.replace(TINY, data="stripes", steps=30, batch_size=16, loss="sigmoid", lr=0.05)
    result = pretrain(config, upstream=Stripes(), held_out=Stripes(), progress=False)
    assert result.model.num_classes == 4
    assert result.val["stripe"] > 0.9


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_windows_of_a_step_do_not_depend_on_who_cuts_them(world):
    whole = step_windows(5, 10, (24, 32), 0.3, seed=2)
    parts = [step_windows(5, 10, (24, 32), 0.3, seed=2, rank=rank, world=world) for rank in range(world)]
    assert torch.equal(whole, torch.cat(parts))
    assert [len(part) for part in parts] == [len(shard_indices(5, 10, 100, 2, rank, world)) for rank in range(world)]
    top, left, height, width = whole.T
    assert (height * width >= 0.25 * 24 * 32).all() and (top + height <= 24).all() and (left + width <= 32).all()
    for other in (step_windows(6, 10, (24, 32), 0.3, seed=2), step_windows(5, 10, (24, 32), 0.3, seed=3)):
        assert not torch.equal(whole, other)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("crop", [1.0, 0.4])
def test_images_of_several_steps_rendered_at_once_are_those_of_each(world, crop):
    class Counting:
        """Images that say which they are, and a list of how many were asked for."""

        together, asked = 30, []

        def __len__(self):
            return 35

        def batch(self, indices):
            self.asked.append(len(indices))
            values = torch.arange(8 * 8).reshape(8, 8) + 3 * indices[:, None, None]
            return values[:, None].expand(-1, 3, -1, -1).to(torch.uint8).clone(), indices[:, None]

    class Alone(Counting):
        together, asked = 0, []

    config = PretrainConfig(data="numbers", steps=8, batch_size=11, seed=4, crop=crop, image_size=8)
    for rank in range(world):
        at_once, alone = (upstream_batches(data, config, rank, world) for data in (Counting(), Alone()))
        for step in (0, 1, 2, 3, 5, 6, 7, 2, 7):  # also as after a stop, and backwards
            (x, y), (right_x, right_y) = at_once(step), alone(step)
            assert torch.equal(x, right_x) and torch.equal(y, right_y)
            assert torch.equal(y[:, 0], shard_indices(step, 11, 35, 4, rank, world))
    assert max(Counting.asked) <= 30 and len(Counting.asked) < len(Alone.asked)
    assert max(Alone.asked) == 11 // world + (world > 1)


def test_pretrain_shows_windows():
    """The left and the right half are of one colour each, so a window's mean colour says how much it has of them."""

    class Halves:
        groups = (LabelGroup("half", 2, 1.0),)

        def __len__(self):
            return 50

        def batch(self, indices):
            images = torch.zeros(len(indices), 3, 32, 32, dtype=torch.uint8)
            images[..., 16:] = 255
            return images, torch.zeros(len(indices), 1, dtype=torch.long)

    seen = []
    real = module.enlarge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "enlarge", lambda images, size: seen.append(images) or real(images, size))
        config = dataclasses.replace(TINY, data="halves", crop=0.2)
        pretrain(config, upstream=Halves(), held_out=Halves(), progress=False)
    shown = torch.cat([images for images in seen if len(images) == TINY.batch_size]).float().mean(dim=(1, 2, 3))
    assert shown.std() > 20 and seen[0].shape[-1] == TINY.image_size


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"decay": "linear"}, "no schedule 'linear'"),
        ({"loss": "hinge"}, "no loss 'hinge'"),
        ({"loss": "sigmoid", "label_smoothing": 0.1}, "label smoothing"),
        ({"data": "XL"}, "XL"),
        ({"model": "R27x0.25"}, "R27x0.25"),
        ({"group_weights": (1.0,)}, "1 group weights for"),
        ({"val_images": 10**6}, "val_images is 1000000"),
        ({"crop": 0.0}, "crop is 0.0"),
        ({"crop": 1.5}, "crop is 1.5"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(dataclasses.replace(TINY, **changes), progress=False)


def test_the_rate_follows_the_batch_unless_given():
    assert PretrainConfig().base_lr == pytest.approx(0.1)
    assert PretrainConfig(batch_size=64).base_lr == pytest.approx(0.05)
    assert PretrainConfig(model="R50x1", batch_size=4096).base_lr == pytest.approx(0.48)
    assert PretrainConfig(lr=0.7).base_lr == 0.7
    config = PretrainConfig(steps=90, warmup_steps=0, lr=1.0)
    assert [config.lr_at(s) for s in (0, 29, 30, 60, 80)] == pytest.approx([1, 1, 0.1, 0.01, 0.001])
    assert dataclasses.replace(config, decay="cosine").lr_at(45) == pytest.approx(0.5)
    assert dataclasses.replace(config, decay="polynomial").lr_at(45) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "config",
    [
        PretrainConfig(),
        PretrainConfig(lr=0.3, decay_at=(0.7, 0.9), seed=4, clip_norm=1.0, group_weights=(1.0, 0.5), init="x/y"),
        PretrainConfig(decay="cosine", loss="sigmoid", image_size=48, weight_decay=0.0, crop=0.25),
    ],
)
def test_the_command_on_the_card_gives_the_configuration_again(config, monkeypatch):
    seen = []

    def instead(config, run_dir, **options):
        seen.append((config, run_dir, options))
        raise module.TrainingError("enough")

    monkeypatch.setattr(module, "pretrain", instead)
    words = config.command().split()
    assert words[:3] == ["python", "-m", "bitlib.pretrain"]
    with pytest.raises(SystemExit):
        main([*words[3:], "--out", "run", "--micro-batch", "8"])
    assert seen[0][:2] == (config, "run") and seen[0][2]["micro_batch"] == 8


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "R1x1"], "R1x1"),
        (["--steps", "0"], "steps is 0"),
        (["--init", "nowhere/model.safetensors"], "nowhere"),
        (["--device", "warp"], "warp"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_a_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--data", "S", "--val-images", "5", *words, "--out", str(tmp_path / "run")])
    assert stop.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].startswith("error: ") and message in lines[0]


def test_the_command_line_refuses_what_it_does_not_know(capsys):
    for words in ([], ["--out", "x", "--stepps", "3"], ["--out", "x", "--steps", "many"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_chapters_claims_about_its_live_run_hold_for_five_seeds(seed):
    config = PretrainConfig(
        model="R14x0.25", data="S", steps=600, batch_size=64, lr=0.05, warmup_steps=30, decay="cosine", image_size=32,
        seed=seed,
    )  # fmt: skip
    result = pretrain(config, eval_every=None, progress=False)
    start, end = (sum(part) / 20 for part in (result.history.loss[:20], result.history.loss[-20:]))
    assert end < 0.7 * start
    assert result.val["character"] > 0.2 and result.val["position"] > 0.35 and result.val["count"] > 0.3
    assert result.val["typeface"] < 0.3


# the exercises' checkers


def test_checkers_refuse_wrong_answers():
    from bitlib.checks import pretrain as checks

    wrong = {
        checks.check_decay_steps: [lambda e, n, b: None, lambda e, n, b: [x * n / b for x in e]],
        checks.check_softmax_gradient: [
            lambda z, y, a: z.softmax(dim=1) - F.one_hot(y, z.shape[1]),
            lambda z, y, a: (z.softmax(dim=1) - F.one_hot(y, z.shape[1])) / len(z),
        ],
        checks.check_other_momentum: [lambda theta, v, g, lr, mu: (theta - lr * (mu * v + g), mu * v + g)],
        checks.check_initial_bias: [lambda k: 0.0, lambda k: -math.log(k)],
    }
    for check, answers in wrong.items():
        for answer in answers:
            with pytest.raises(AssertionError):
                check(answer)
