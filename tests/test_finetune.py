"""Fine-tuning: few-shot sampling, the leakage check, the zero head, and the loop, on tiny nets and images."""

import copy
import dataclasses
import io
import math
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

import bitlib.finetune as module
from bitlib.checks.finetune import (
    check_few_shot,
    check_find_mirrored,
    check_head_gradient,
    check_times_seen,
)
from bitlib.data import ImageTensorDataset, load_task, normalize
from bitlib.finetune import (
    TRAINABLE,
    FinetuneResult,
    few_shot,
    find_duplicates,
    finetune,
    labels_of,
    mlp_head,
    trainable_parameters,
)
from bitlib.hyperrule import Rule, hyperrule
from bitlib.pretrain import TrainingError, shard_indices
from bitlib.resnet import create_model

RULE = Rule(
    steps=6,
    warmup_steps=0,
    decay_steps=(3, 5),
    base_lr=0.05,
    momentum=0.9,
    weight_decay=0.0,
    batch_size=8,
    resize=20,
    crop=16,
    mixup_alpha=0.0,
)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return create_model("R14x0.25", num_classes=7)


def colours(n_per_class=4, size=16, classes=3, seed=0):
    """Images of one dominant colour channel each: a task that a net learns in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(n_per_class)
    images = torch.randint(0, 100, (len(labels), 3, size, size), dtype=torch.uint8, generator=generator)
    images[torch.arange(len(labels)), labels] += 150
    return ImageTensorDataset(images, labels, n_classes=classes)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class LabelsOnly(Dataset):
    """A data set whose images must not be touched."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        raise AssertionError("an image was decoded")


class Pairs(Dataset):
    """A data set that is a plain list of examples, and lists nothing else."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


# ---------------------------------------------------------------- few-shot sampling


@pytest.mark.parametrize("n_shots", [1, 2, 5])
@pytest.mark.parametrize("wrap", [list, np.array, torch.tensor, LabelsOnly])
def test_few_shot_is_balanced_and_decodes_nothing(n_shots, wrap):
    labels = [3, 1, 4, 1, 4, 3] * 10
    chosen = few_shot(wrap(labels), n_shots, seed=2)
    assert Counter(labels[i] for i in chosen) == {1: n_shots, 3: n_shots, 4: n_shots}
    assert chosen == sorted(set(chosen)) and all(type(i) is int for i in chosen)


def test_few_shot_is_seeded_nested_and_leaves_the_global_generators_alone():
    labels = torch.arange(10).repeat(30)
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    five = few_shot(labels, 5, seed=3)
    assert five == few_shot(labels, 5, seed=3)
    assert len({tuple(few_shot(labels, 5, seed=s)) for s in range(10)}) == 10
    assert set(few_shot(labels, 1, seed=3)) < set(five) < set(few_shot(labels, 25, seed=3))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_few_shot_draws_every_example_equally_often():
    labels = [0] * 8 + [1] * 3
    counts = Counter(i for seed in range(2_000) for i in few_shot(labels, 2, seed=seed))
    assert all(abs(counts[i] / 2_000 - 2 / 8) < 0.05 for i in range(8))
    assert all(abs(counts[i] / 2_000 - 2 / 3) < 0.05 for i in range(8, 11))


def test_few_shot_excludes():
    labels = torch.arange(4).repeat(6)
    train = few_shot(labels, 3, seed=0)
    val = few_shot(labels, 3, seed=0, exclude=train)
    assert not set(train) & set(val) and len(train) == len(val) == 12


def test_few_shot_says_which_class_is_too_small():
    with pytest.raises(ValueError, match="class 1 has 2 examples .* n_shots=3; use at most 2"):
        few_shot([0, 0, 0, 1, 1], 3)
    with pytest.raises(ValueError, match="class 0 has 1 examples"):
        few_shot([0, 0, 0, 1, 1, 1], 2, exclude=[0, 1])
    for bad in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            few_shot([0, 1], bad)
    with pytest.raises(ValueError, match="empty"):
        few_shot([], 1)
    with pytest.raises(ValueError, match="label -1 is no class"):
        few_shot([0, -1, 1], 1)


def test_labels_of_subsets_and_concatenations():
    a, b = LabelsOnly([5, 6, 7]), colours(1)
    assert labels_of(Subset(a, [2, 0])).tolist() == [7, 5]
    assert labels_of(ConcatDataset([a, Subset(Subset(b, [2, 1]), [0])])).tolist() == [5, 6, 7, 2]
    with pytest.raises(TypeError, match="Pairs does not list its labels"):
        labels_of(Pairs([]))
    with pytest.raises(TypeError, match="whole numbers"):
        labels_of([0.5, 1.0])


# ---------------------------------------------------------------- leakage


def test_duplicates_identical_near_and_absent():
    rng = torch.Generator().manual_seed(0)
    base = torch.rand(8, 3, 4, 4, generator=rng)
    images = (F.interpolate(base, (32, 32), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(images[5].permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=90)
    jpeg = Image.open(buffer)
    larger = F.interpolate(images[6][None].float(), (48, 48), mode="bilinear")[0].round().to(torch.uint8)
    train = Pairs([(images[i], 0) for i in range(7)])
    test = Pairs([(images[7], 0), (images[2], 1), (jpeg, 1), (larger, 0)])
    found = find_duplicates(train, test)
    assert [(d.train_index, d.test_index, d.identical) for d in sorted(found, key=lambda d: d.test_index)] == [
        (2, 1, True),
        (5, 2, False),
        (6, 3, False),
    ]
    assert (
        found[0].identical
        and found[0].distance == 0
        and [d.distance for d in found] == sorted(d.distance for d in found)
    )
    assert find_duplicates(Pairs(train.pairs[:2]), Pairs(test.pairs[:1])) == []
    with pytest.raises(ValueError, match="empty"):
        find_duplicates(train, Pairs([]))


def test_the_digits_share_no_image():
    task = load_task("digits")
    assert find_duplicates(task.train, task.test) == []
    assert len(find_duplicates(Subset(task.test, [4, 9]), task.test)) >= 2


# ---------------------------------------------------------------- head and freezing


def test_the_first_loss_is_log_k_and_the_backbone_waits(net):
    seen = {}
    result = finetune(net, colours(), dataclasses.replace(RULE, steps=1, decay_steps=()))
    assert result.history.loss[0] == pytest.approx(math.log(3), abs=1e-6)
    for name, before in net.state_dict().items():
        seen[name.split(".")[0]] = torch.equal(before, result.model.state_dict()[name]) if "head" not in name else False
    assert [part for part, same in seen.items() if not same] == ["head"]
    assert result.model.head.weight.abs().sum() > 0


def test_the_given_model_stays_as_it_was(net):
    before, size = weights(net), net.image_size
    result = finetune(net, colours(), RULE)
    assert torch.equal(before, weights(net)) and net.head.out_features == 7 and net.image_size == size
    assert result.model.head.out_features == 3 and result.model.num_classes == 3
    assert result.model.image_size == RULE.crop and not result.model.training
    assert all(p.requires_grad for p in result.model.parameters())


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_what_may_move(net, trainable):
    moved_parts = {
        "full": {"root", "block1", "block2", "block3", "block4", "norm", "head"},
        "head": {"head"},
        "last1": {"block4", "norm", "head"},
        "last2": {"block3", "block4", "norm", "head"},
        "last3": {"block2", "block3", "block4", "norm", "head"},
    }[trainable]
    result = finetune(net, colours(), RULE, trainable=trainable)
    state = net.state_dict()
    moved = {
        n.split(".")[0] for n, v in result.model.state_dict().items() if "head" in n or not torch.equal(v, state[n])
    }
    assert moved == moved_parts
    count = sum(p.numel() for p in trainable_parameters(net, trainable))
    assert count == sum(p.numel() for n, p in net.named_parameters() if n.split(".")[0] in moved_parts)


def test_unknown_trainable_names_the_choices(net):
    with pytest.raises(ValueError, match="'full', 'head', 'last1'"):
        finetune(net, colours(), RULE, trainable="linear probe")


def test_mlp_head(net):
    torch.manual_seed(0)
    head = mlp_head(net.num_features, 16, 3)
    before = weights(head)
    result = finetune(net, colours(), RULE, head=head)
    assert result.history.loss[0] == pytest.approx(math.log(3), abs=1e-6)
    assert isinstance(result.model.head[1], torch.nn.ReLU) and torch.equal(before, weights(head))
    with pytest.raises(ValueError, match="4 outputs for 3 classes"):
        finetune(net, colours(), RULE, head=mlp_head(net.num_features, 16, 4))


# ---------------------------------------------------------------- the loop


def test_it_learns(net):
    rule = dataclasses.replace(RULE, steps=30, decay_steps=(20,))
    result = finetune(net, colours(), rule)
    assert len(result.history.loss) == 30 and result.history.loss[-1] < 0.5 * result.history.loss[0]
    test = colours(seed=9)
    with torch.no_grad():
        predicted = result.model(normalize(test.images)).argmax(dim=1)
    assert (predicted == test.labels).float().mean() >= 0.9


def test_it_is_plain_sgd_on_the_batches_of_the_stream(net):
    data = colours()
    rule = dataclasses.replace(RULE, steps=4, decay_steps=(2,), resize=16, random_crop=False, flip=False)
    ours = finetune(net, data, rule, seed=5).model
    theirs = create_model("R14x0.25", num_classes=7)
    theirs.load_state_dict(net.state_dict())
    theirs.reset_head(3)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1, momentum=0.9)
    for step, lr in enumerate((0.05, 0.05, 0.005, 0.005)):
        optimizer.param_groups[0]["lr"] = lr
        index = shard_indices(step, 8, len(data), seed=5)
        optimizer.zero_grad()
        F.cross_entropy(theirs(normalize(data.images[index])), data.labels[index]).backward()
        optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_seeds(net):
    a, b, c = (finetune(net, colours(), RULE, seed=s) for s in (0, 0, 1))
    assert torch.equal(weights(a.model), weights(b.model)) and a.history.loss == b.history.loss
    assert not torch.equal(weights(a.model), weights(c.model))
    for bad in (-1, 0.5, "0", True):
        with pytest.raises(ValueError, match="seed"):
            finetune(net, colours(), RULE, seed=bad)


def test_it_leaves_the_global_generators_alone(net):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    finetune(net, colours(), dataclasses.replace(RULE, steps=2, mixup_alpha=0.4))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_micro_batches_change_nothing(net, alpha):
    rule = dataclasses.replace(RULE, mixup_alpha=alpha)
    whole, parts = (finetune(net, colours(), rule, micro_batch=m) for m in (None, 3))
    torch.testing.assert_close(whole.model.state_dict(), parts.model.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("switch", [{"flip": False}, {"random_crop": False}, {"mixup_alpha": 0.4}])
def test_every_augmentation_is_really_switched(net, switch):
    rule = dataclasses.replace(RULE, steps=3, decay_steps=())
    plain = finetune(net, colours(), rule)
    other = finetune(net, colours(), dataclasses.replace(rule, **switch))
    assert not torch.equal(weights(plain.model), weights(other.model))


def test_no_flip_and_no_crop_means_the_very_images(net, monkeypatch):
    def refuse(*args):
        raise AssertionError("an augmentation was called")

    monkeypatch.setattr(module, "random_flip", refuse)
    monkeypatch.setattr(module, "random_crop", refuse)
    finetune(net, colours(), dataclasses.replace(RULE, flip=False, random_crop=False, steps=2))
    with pytest.raises(AssertionError, match="augmentation"):
        finetune(net, colours(), dataclasses.replace(RULE, steps=2))


def test_images_that_do_not_fit_into_memory_give_the_same_run(net, monkeypatch):
    kept = finetune(net, colours(), RULE, val_set=colours(seed=3))
    monkeypatch.setattr(module, "CACHE_BYTES", 0)
    decoded = finetune(net, colours(), RULE, val_set=colours(seed=3))
    assert torch.equal(weights(kept.model), weights(decoded.model))


def test_images_are_decoded_by_several_threads(net):
    class Together(Pairs):
        """Gives an example only while another one is being asked for."""

        barrier = threading.Barrier(2, timeout=60)

        def __getitem__(self, index):
            self.barrier.wait()
            return super().__getitem__(index)

    data = colours()
    images = module._Images(Together([data[i] for i in range(len(data))]), 16)
    assert torch.equal(images.kept[0], data.images) and torch.equal(images.kept[1], data.labels)


def test_pil_images_and_tensors_of_any_size_are_taken(net):
    data = colours()
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in data.images]
    same = finetune(net, Pairs(list(zip(pictures, data.labels.tolist(), strict=True))), RULE)
    assert torch.equal(weights(same.model), weights(finetune(net, data, RULE).model))
    mixed = [(Image.new("L", (30, 9)), 0), (torch.zeros(3, 40, 21, dtype=torch.uint8), np.int64(1))]
    mixed += [(Image.new("RGBA", (5, 5)), torch.tensor(0)), (Image.new("P", (64, 64)), 1)]
    assert finetune(net, Pairs(mixed), dataclasses.replace(RULE, steps=1)).classes == ("0", "1")


def test_the_default_rule_is_the_hyperrule_for_this_set_and_model(net, monkeypatch):
    asked = []

    def short(n, size, model):
        asked.append((n, size, model))
        return dataclasses.replace(RULE, steps=1)

    monkeypatch.setattr(module, "hyperrule", short)
    sizes = [(10, 10)] * 3 + [(20, 30)] * 5 + [(100, 90)] * 2
    pairs = [(torch.zeros(3, *size, dtype=torch.uint8), i % 2) for i, size in enumerate(sizes)]
    result = finetune(net, Pairs(pairs))
    assert asked == [(10, (20, 30), net)] and result.rule.steps == 1
    assert hyperrule(10, (20, 30), model=net).crop == 64


def test_classes(net):
    one = dataclasses.replace(RULE, steps=1, decay_steps=())
    data = colours()
    assert finetune(net, data, one).classes == ("0", "1", "2")
    data.classes = ["red", "green", "blue"]
    assert finetune(net, data, one).classes == ("red", "green", "blue")
    assert finetune(net, Subset(Subset(data, range(11)), [0, 5, 1]), one).classes == ("red", "green", "blue")
    wider = finetune(net, data, one, num_classes=5)
    assert wider.classes == ("0", "1", "2", "3", "4") and wider.model.head.out_features == 5


# ---------------------------------------------------------------- validation


def test_the_best_checkpoint_is_kept(net):
    val = colours(seed=4)
    result = finetune(net, colours(), RULE, val_set=val, eval_every=1)
    assert [e["step"] for e in result.history.evals] == [1, 2, 3, 4, 5, 6]
    best = max(result.history.evals, key=lambda e: (e["top1"], -e["nll"]))
    assert result.history.best["step"] == best["step"]
    images = module._Images(val, RULE.crop)
    again = module._validate(result.model, images)
    assert again["top1"] == best["top1"] and again["nll"] == pytest.approx(best["nll"], abs=1e-5)
    assert f"kept step {best['step']}" in repr(result) and "R14x0.25" in repr(result)


def test_an_earlier_checkpoint_can_win(net):
    wrong = colours(seed=4)
    wrong.labels = (wrong.labels + 1) % 3  # the better the net gets, the worse it does here
    result = finetune(net, colours(), dataclasses.replace(RULE, steps=20, decay_steps=()), val_set=wrong, eval_every=1)
    assert result.history.best["step"] < 20
    images = module._Images(wrong, RULE.crop)
    assert module._validate(result.model, images)["top1"] >= result.history.evals[-1]["top1"]


def test_the_last_weights_can_be_kept(net):
    wrong = colours(seed=4)
    wrong.labels = (wrong.labels + 1) % 3
    rule = dataclasses.replace(RULE, steps=20, decay_steps=())
    best, last = (finetune(net, colours(), rule, val_set=wrong, eval_every=1, keep=k) for k in ("best", "last"))
    assert last.history.best is None and len(last.history.evals) == 20 and "kept" not in repr(last)
    assert torch.equal(weights(last.model), weights(finetune(net, colours(), rule).model))
    assert not torch.equal(weights(last.model), weights(best.model))
    with pytest.raises(ValueError, match="keep must be"):
        finetune(net, colours(), RULE, keep="first")


def test_score_orders_by_accuracy_then_loss():
    class Fixed(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor(logits))

        def forward(self, x):
            return self.logits.expand(len(x), -1)

    images = module._Images(colours(2, classes=2), 16)
    sure, unsure, lucky = (module._validate(Fixed(z), images) for z in ([3.0, 0.0], [0.1, 0.0], [0.0, 9.0]))
    assert sure["top1"] == unsure["top1"] == lucky["top1"] == 0.5
    assert unsure["score"] > sure["score"] > lucky["score"]
    assert all(int(s["score"]) == 2 for s in (sure, unsure, lucky))


def test_without_validation_the_last_weights_count(net):
    result = finetune(net, colours(), RULE)
    assert result.history.best is None and result.history.evals == []
    assert "validation" not in repr(result) and isinstance(result, FinetuneResult)


# ---------------------------------------------------------------- run folders


def test_a_finished_run_is_not_repeated(net, tmp_path):
    first = finetune(net, colours(), RULE, run_dir=tmp_path, val_set=colours(seed=4), progress=False)
    again = finetune(net, colours(), RULE, run_dir=tmp_path, val_set=colours(seed=4), progress=False)
    assert torch.equal(weights(first.model), weights(again.model)) and first.history.loss == again.history.loss
    free = finetune(net, colours(), RULE, val_set=colours(seed=4))
    assert torch.equal(weights(first.model), weights(free.model))


@pytest.mark.parametrize("other", ["seed", "data", "model", "rule", "trainable"])
def test_a_run_folder_belongs_to_one_run(net, tmp_path, other):
    finetune(net, colours(), RULE, run_dir=tmp_path, progress=False)
    call = {"model": net, "train_set": colours(), "rule": RULE, "seed": 0, "trainable": "full"}
    torch.manual_seed(1)
    call |= {
        "seed": {"seed": 1},
        "data": {"train_set": colours(seed=1)},
        "model": {"model": create_model("R14x0.25", 7)},
        "rule": {"rule": dataclasses.replace(RULE, flip=False)},
        "trainable": {"trainable": "head"},
    }[other]
    with pytest.raises(TrainingError, match="another configuration"):
        finetune(**call, run_dir=tmp_path, progress=False)


SCRIPT = """
    import dataclasses, sys, time, torch
    sys.path.insert(0, {tests!r})
    from test_finetune import RULE, colours, create_model, finetune
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rule = dataclasses.replace(RULE, steps=40, decay_steps=(25,), mixup_alpha=0.2)
    net = create_model("R14x0.25", 7)
    result = finetune(net, colours(), rule, seed=3, val_set=colours(seed=4), eval_every=5, run_dir={run!r},
                      save_every=4, progress=False)
    torch.save(result.model.state_dict(), {out!r})
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, how):
    def start(run, out):
        code = textwrap.dedent(SCRIPT).format(tests=str(tmp_path), run=str(tmp_path / run), out=str(tmp_path / out))
        return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)

    (tmp_path / "test_finetune.py").write_text(open(__file__).read())
    straight = start("a", "a.pt")
    broken = start("b", "b.pt")
    deadline = time.monotonic() + 400
    while not any(int(p.stem[5:]) >= 4 for p in (tmp_path / "b").glob("step-*.safetensors")):
        assert time.monotonic() < deadline and broken.poll() is None, broken.stderr.read().decode()
        time.sleep(0.005)
    broken.send_signal(how)
    assert broken.wait(200) != 0 and not (tmp_path / "b.pt").exists()
    assert start("b", "b.pt").wait(400) == 0 and straight.wait(400) == 0
    a, b = (torch.load(tmp_path / name) for name in ("a.pt", "b.pt"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_model_in_half_precision_is_trained_in_float32(net):
    same = finetune(copy.deepcopy(net).half().float(), colours(), RULE).model
    half = copy.deepcopy(net).half()
    tuned = finetune(half, colours(), RULE).model
    assert weights(half).dtype == torch.float16 and weights(tuned).dtype == torch.float32
    assert torch.equal(weights(tuned), weights(same)) and not torch.equal(weights(tuned), weights(half))


# ---------------------------------------------------------------- bad input


def test_empty_sets(net):
    with pytest.raises(ValueError, match="training set is empty"):
        finetune(net, Pairs([]), RULE)
    with pytest.raises(ValueError, match="training set is empty"):
        finetune(net, Pairs([]))
    with pytest.raises(ValueError, match="validation set is empty"):
        finetune(net, colours(), RULE, val_set=Pairs([]))


def test_a_single_class(net):
    with pytest.raises(ValueError, match="single class"):
        finetune(net, colours(classes=1), RULE)
    with pytest.raises(ValueError, match="single class"):
        finetune(net, Subset(colours(), [0, 1, 2]), RULE)


def test_labels_outside_the_classes(net):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"example 1 of the training set has label -1"):
        finetune(net, Pairs([(image, 0), (image, -1), (image, 1)]), RULE)
    with pytest.raises(ValueError, match=r"label 2, outside the 2 classes; use 0 to 1"):
        finetune(net, colours(), RULE, num_classes=2)
    with pytest.raises(ValueError, match=r"example 2 of the validation set has label 9, outside the 3"):
        finetune(net, colours(), RULE, val_set=Pairs([(image, 0), (image, 1), (image, 9)]))
    with pytest.raises(TypeError, match=r"example 1 .* whole number, not 0.5"):
        finetune(net, Pairs([(image, 0), (image, 0.5)]), RULE)


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (torch.zeros(3, 8, 8), TypeError, "uint8"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ValueError, r"\(1, 3, 8, 8\)"),
        (torch.zeros(5, 8, 8, dtype=torch.uint8), ValueError, r"\(5, 8, 8\)"),
        (np.zeros((8, 8, 3), np.uint8), TypeError, "ndarray"),
        ("cat.png", TypeError, "str"),
        (None, TypeError, "NoneType"),
    ],
)
def test_what_is_no_image(net, image, error, words):
    good = torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(error, match=rf"example 1 of the data set: .*{words}"):
        finetune(net, Pairs([(good, 0), (image, 1)]), RULE)


def test_what_is_no_data_set_no_model_no_rule(net):
    with pytest.raises(TypeError, match=r"must be \(image, class index\), not Tensor"):
        finetune(net, Pairs([torch.zeros(3, 8, 8, dtype=torch.uint8)] * 2), RULE)
    with pytest.raises(TypeError, match="with a length, not generator"):
        finetune(net, (x for x in ()), RULE)
    with pytest.raises(TypeError, match="not Linear"):
        finetune(torch.nn.Linear(2, 2), colours(), RULE)
    with pytest.raises(TypeError, match="not dict"):
        finetune(net, colours(), {"steps": 3})


# ---------------------------------------------------------------- the exercises' checkers can say no


def test_checkers_accept_and_refuse(capsys):
    def gradient(z, y, k):
        error = (1 / k - F.one_hot(y, k).float()) / len(y)
        return error.T @ z, error.sum(dim=0)

    def mirrored(train, test):
        return [(i, j) for j, b in enumerate(test) for i, a in enumerate(train) if torch.equal(a.flip(-1), b)]

    check_few_shot(few_shot)
    check_head_gradient(gradient)
    check_find_mirrored(mirrored)
    check_times_seen(lambda steps, b, n: (steps * b // n, math.ceil(steps * b / n)))
    assert capsys.readouterr().out.count(": correct") == 4

    for wrong, words in (
        (lambda labels, n, seed: [0, 5, 8, 10, 14, 1, 3, 4, 2], "of the classes 0, 1, 2"),
        (lambda labels, n, seed: few_shot(labels, n, 0), "does the seed reach"),
        (lambda labels, n, seed: few_shot(labels, min(n, 6), seed), "should raise ValueError"),
    ):
        with pytest.raises(AssertionError, match=words):
            check_few_shot(wrong)
    with pytest.raises(AssertionError, match="mean over N"):
        check_head_gradient(lambda z, y, k: tuple(g * len(y) for g in gradient(z, y, k)))
    with pytest.raises(AssertionError, match="shape"):
        check_head_gradient(lambda z, y, k: (gradient(z, y, k)[0].T, gradient(z, y, k)[1]))
    with pytest.raises(AssertionError, match=r"\[\(4, 2\)\]"):
        check_find_mirrored(lambda train, test: [])
    with pytest.raises(AssertionError, match="on its head"):
        check_find_mirrored(lambda train, test: [(1, 0), (4, 2)])
    with pytest.raises(AssertionError, match="times"):
        check_times_seen(lambda steps, b, n: (0, steps))
    for check in (check_few_shot, check_head_gradient, check_find_mirrored, check_times_seen):
        with pytest.raises(AssertionError, match="returned nothing"):
            check(lambda *args: None)
