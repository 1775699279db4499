"""The suite runner: what a run may see, resuming, scores and intervals, missing tasks, predictions, corruptions."""

import io
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from bitlib import evaluate as module
from bitlib.data import VTAB_MINI, ImageTensorDataset, load_task
from bitlib.evaluate import (
    CORRUPTIONS,
    SuiteResults,
    corrupt,
    draw_examples,
    evaluate_suite,
    on_photographs,
    read_suite,
    right_images,
    robustness,
    score_predictions,
    suite_difference,
    suite_plot,
    suite_scores,
    suite_summary,
    suite_table,
    suite_tasks,
    task_rule,
    write_predictions,
)
from bitlib.resnet import create_model

ROOT = Path(__file__).resolve().parent.parent
TASKS = tuple(suite_tasks("vtab-mini"))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = create_model("R14x0.25", 10)
    model.image_size = 16
    return model


# --- which examples a run may use -----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_examples_are_drawn_as_evenly_as_can_be(labels, data):
    n, seed = data.draw(st.integers(1, len(labels))), data.draw(st.integers(0, 99))
    chosen = draw_examples(torch.tensor(labels), n, seed)
    assert len(set(chosen)) == n and chosen == sorted(chosen) and chosen == draw_examples(labels, n, seed)
    taken, there = np.bincount(np.array(labels)[chosen], minlength=7), np.bincount(labels, minlength=7)
    short = taken < there  # the classes that could have given more
    if short.any():
        assert taken.max() - taken[short].min() <= 1


def test_examples_depend_on_the_seed_and_refuse_too_many():
    labels = torch.arange(100) % 10
    assert len({tuple(draw_examples(labels, 20, seed)) for seed in range(10)}) == 10
    for n in (0, 101):
        with pytest.raises(ValueError, match=f"cannot draw {n} of 100 examples"):
            draw_examples(labels, n)


@pytest.mark.parametrize("name", TASKS)
def test_a_run_sees_no_image_that_it_is_judged_on(name):
    task = load_task(name)
    for examples in (100, None):
        few, test = module._task_split(task, examples, seed=1, validate=False)
        assert test is task.test and len(few) == (examples or len(task.train))
        chosen, val = module._task_split(task, examples, seed=1, validate=True)
        assert not set(chosen) & set(val.indices)  # a rate is not chosen on what was trained on
        assert set(val.indices).isdisjoint(few) or examples is None


def test_the_rule_leaves_out_what_would_change_the_label(tiny):
    rule = task_rule(load_task("x-position"), tiny)
    assert not rule.flip and not rule.random_crop and rule.steps == 500
    rule = task_rule(load_task("faces"), tiny, steps=50)
    assert rule.flip and rule.random_crop and rule.steps == 50 and rule.decay_steps == (15, 30, 45)


# --- a run, its file, and going on with it --------------------------------------------------------------------------


def test_a_suite_runs_writes_and_goes_on(tiny, tmp_path, monkeypatch):
    out, kept = tmp_path / "suite.json", tmp_path / "predictions"
    call = dict(
        name="tiny", tasks=("faces", "textures"), examples=20, out=out, steps=2, predictions=kept, rates=(0.01, 0.1)
    )
    first = evaluate_suite(tiny, methods=("ridge", "probe", "finetuned", "scratch"), seeds=(0,), **call)
    assert len(first["rows"]) == 8 and len(first["rates_tried"]) == 4 and read_suite(out) == first
    for row in first["rows"]:
        right = right_images(row)
        assert len(right) == len(load_task(row["task"]).test)
        assert row["top1"] == pytest.approx(right.double().mean().item(), abs=1e-6)
        assert row["nll_scaled"] < math.inf and 0.01 <= row["temperature"] <= 100
        again = score_predictions(kept / f"{row['model']}-{row['method']}-20-{row['task']}-0.json")
        assert again["top1"] == pytest.approx(row["top1"], abs=1e-6)
    for task in ("faces", "textures"):
        tried = {r["rate"]: r["val_top1"] for r in first["rates_tried"] if r["task"] == task}
        (row,) = (r for r in first["rows"] if r["method"] == "scratch" and r["task"] == task)
        assert tried[row["rate"]] == max(tried.values())

    def forbidden(*args, **kwargs):
        raise AssertionError("this was run before")

    monkeypatch.setattr(module, "finetune", forbidden)
    assert evaluate_suite(tiny, methods=("finetuned", "scratch"), seeds=(0,), **call) == first
    more = evaluate_suite(tiny, methods=("ridge",), seeds=(0, 1), **call)
    assert len(more["rows"]) == 10 and more["rows"][:8] == first["rows"]


def test_the_same_call_gives_the_same_and_leaves_the_model_alone(tiny, tmp_path):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    state = torch.random.get_rng_state()
    call = dict(methods=("finetuned", "scratch"), tasks=("faces",), examples=20, steps=2, rates=(0.1,))
    assert evaluate_suite(tiny, **call) == evaluate_suite(tiny, **call)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_other_weights_of_the_same_name_are_refused(tiny, tmp_path):
    out = tmp_path / "suite.json"
    evaluate_suite(tiny, name="tiny", methods=("ridge",), tasks=("faces",), out=out)
    torch.manual_seed(1)
    other = create_model("R14x0.25", 10)
    with pytest.raises(ValueError, match="results of another tiny; move the file away"):
        evaluate_suite(other, name="tiny", methods=("ridge",), tasks=("faces",), out=out)
    with pytest.raises(ValueError, match="holds vtab-mini with steps=None"):
        evaluate_suite(tiny, name="tiny", methods=("ridge",), tasks=("faces",), out=out, steps=3)
    headed = create_model("R14x0.25", 3)
    headed.load_state_dict({k: v for k, v in tiny.state_dict().items() if "head" not in k}, strict=False)
    headed.image_size = 16
    evaluate_suite(headed, name="tiny", methods=("ridge",), tasks=("faces",), out=out)  # another head is the same model


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"suite": "vtab"}, "no suite 'vtab'; there are vtab-mini and vtab-1k"),
        ({"tasks": ("face",)}, "no task 'face' in vtab-mini; there are digits, faces"),
        ({"methods": ("svm",)}, "no method 'svm' in vtab-mini; there are finetuned, ridge"),
    ],
)
def test_a_suite_refuses(tiny, given_, words):
    with pytest.raises(ValueError, match=words):
        evaluate_suite(tiny, **given_)


def test_the_tool_can_be_killed_and_given_again(tmp_path):
    """A real kill in the middle of the runs; the second call does only what is left, and the file is the same."""
    command = [
        *(
            sys.executable,
            ROOT / "tools" / "vtab_mini.py",
            "--models",
            "BiT-mini-M",
            "--methods",
            "finetuned",
            "scratch",
        ),
        *("--tasks", "faces", "--seeds", "0", "1", "--examples", "20", "--steps", "2", "--rates", "0.01", "0.1"),
    ]
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    subprocess.run([*command, "--out", whole], check=True, capture_output=True)
    process = subprocess.Popen([*command, "--out", killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not killed.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(read_suite(killed)["rows"]) <= 4  # a whole file, whenever it was killed
    run = subprocess.run([*command, "--out", killed], check=True, capture_output=True, text=True)
    assert read_suite(killed) == read_suite(whole) and "20 training examples a task" in run.stdout
    plan = subprocess.run([*command, "--out", killed, "--plan"], check=True, capture_output=True, text=True).stdout
    assert "0 trainings of 2 steps" in plan


def test_the_tool_names_a_checkpoint_that_is_not_there(tmp_path):
    command = [sys.executable, ROOT / "tools" / "vtab_mini.py", "--models", "BiT-mini-X", "--out", tmp_path / "x.json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "without BiT-mini-X" in run.stderr and not (tmp_path / "x.json").exists()


# --- scores ---------------------------------------------------------------------------------------------------------


def made_up(rates, seeds=5, n=400, examples=100):
    """Results in which method m of task t is right with probability rates[m][t]."""
    generator, rows = torch.Generator().manual_seed(0), []
    for method, by_task in rates.items():
        for task, rate in by_task.items():
            for seed in range(seeds):
                bits = "".join("01"[int(u < rate)] for u in torch.rand(n, generator=generator))
                row = {"model": "M", "method": method, "examples": examples, "task": task, "seed": seed}
                rows.append(row | {"top1": bits.count("1") / n, "right": f"{int('1' + bits, 2):x}"})
    return SuiteResults(suite="vtab-mini", steps=None, models={}, rates_tried=[], rows=rows, failed={})


def test_scores_are_means_over_tasks_and_over_groups():
    rates = {"ridge": {task: 0.3 + 0.04 * i for i, task in enumerate(TASKS)}}
    results = made_up(rates)
    scores = suite_scores(results, "M", "ridge", 100)
    top1 = {task: np.mean([r["top1"] for r in results["rows"] if r["task"] == task]) for task in TASKS}
    assert scores["mean"].mean == pytest.approx(np.mean(list(top1.values())))
    for group, names in VTAB_MINI.items():
        assert scores[group].mean == pytest.approx(np.mean([top1[name] for name in names]))
        assert scores[group].low < scores[group].mean < scores[group].high and scores[group].n_seeds == 5
    # of 13 x 400 images, drawn again with the seeds
    assert 0.01 < scores["mean"].high - scores["mean"].low < 0.04
    assert suite_scores(results, "M", "ridge", "all")["mean"] is None


def test_a_missing_task_leaves_the_score_empty():
    results = made_up({"ridge": {task: 0.5 for task in TASKS[1:]}})
    scores = suite_scores(results, "M", "ridge", 100)
    assert scores["mean"] is None and scores["natural"] is None and scores["structured"] is not None
    (entry,) = suite_summary(results)
    assert entry["missing"] == ["digits"] and entry["scores"]["mean"] is None
    results["failed"]["digits"] = "OSError: gone"
    text = suite_table(results, 100)
    assert "not run: digits" in text and "could not be loaded: digits: OSError: gone" in text
    assert "M ridge" in str(results)


def test_a_difference_is_paired_and_finds_what_is_there():
    results = made_up({"ridge": dict.fromkeys(TASKS, 0.6), "probe": dict.fromkeys(TASKS, 0.55)})
    gain = suite_difference(results, ("M", "ridge"), ("M", "probe"), 100)
    assert gain["mean"].low > 0 and gain["mean"].mean == pytest.approx(0.05, abs=0.02)
    same = suite_difference(results, ("M", "ridge"), ("M", "ridge"), 100)
    assert same["mean"][:3] == (0, 0, 0)  # the same images cancel
    back = suite_difference(results, ("M", "probe"), ("M", "ridge"), 100)
    assert back["mean"].mean == pytest.approx(-gain["mean"].mean)
    assert suite_difference(results, ("M", "ridge"), ("S", "ridge"), 100)["mean"] is None


def test_the_plot_shows_whole_methods_only():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    plt.figure()
    suite_plot(made_up({"ridge": dict.fromkeys(TASKS, 0.6), "probe": dict.fromkeys(TASKS[1:], 0.6)}), 100)
    assert [text.get_text() for text in plt.gca().get_legend().get_texts()] == ["M ridge"]
    assert [text.get_text() for text in plt.gca().get_yticklabels()][::-1] == ["mean", *VTAB_MINI]
    plt.close("all")


def test_only_common_seeds_are_compared():
    results = made_up({"ridge": dict.fromkeys(TASKS, 0.6), "probe": dict.fromkeys(TASKS, 0.6)})
    results["rows"] = [r for r in results["rows"] if r["method"] == "ridge" or r["seed"] in (1, 3)]
    assert suite_difference(results, ("M", "ridge"), ("M", "probe"), 100)["mean"].n_seeds == 2


def test_the_committed_results_are_of_this_suite():
    results = read_suite(ROOT / "data" / "results" / "vtab_mini.json")
    assert results["suite"] == "vtab-mini" and results["steps"] is None and not results["failed"]
    assert {row["task"] for row in results["rows"]} == set(TASKS)
    if "summary" in results:  # not while runs are under way
        assert results["summary"] == json.loads(json.dumps(suite_summary(results)))
    for row in results["rows"]:
        assert row["top1"] == pytest.approx(right_images(row).double().mean().item(), abs=1e-6)


# --- predictions ----------------------------------------------------------------------------------------------------


def test_predictions_are_written_and_scored_again(tmp_path):
    predicted, labels = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2])
    write_predictions(tmp_path / "a" / "p.json", "toy", ("x", "y", "z"), predicted, labels)
    scored = score_predictions(tmp_path / "a" / "p.json")
    assert scored["task"] == "toy" and scored["n"] == 4 and scored["top1"] == 0.75
    assert scored["mean_per_class"] == pytest.approx((1 + 1 + 0.5) / 3)
    with pytest.raises(ValueError, match=r"\(3,\) predictions do not fit \(4,\) labels"):
        write_predictions(tmp_path / "q.json", "toy", ("x",), predicted[:3], labels)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "is no file of predictions"),
        ("[1, 2]", "is no file of predictions"),
        ('{"predicted": [0]}', "is no file of predictions"),
        ('{"task": "t", "classes": ["a"], "predicted": [], "labels": []}', "at least one"),
        ('{"task": "t", "classes": ["a"], "predicted": [0, 0], "labels": [0]}', "as many predictions as labels"),
        ('{"task": "t", "classes": ["a"], "predicted": [0.5], "labels": [0]}', "whole numbers"),
        ('{"task": "t", "classes": ["a", "b"], "predicted": [2], "labels": [0]}', "holds class 2, but the task has 2"),
    ],
)
def test_a_damaged_file_of_predictions_is_refused(tmp_path, text, words):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        score_predictions(tmp_path / "p.json")


# --- corruptions ----------------------------------------------------------------------------------------------------


def photographs(n=6, side=40, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_keeps_form_and_grows_with_strength(kind):
    images = load_task("photographs").test.images[::50]
    distances = []
    for strength in range(6):
        spoilt = corrupt(images, kind, strength)
        assert spoilt.shape == images.shape and spoilt.dtype == torch.uint8
        assert torch.equal(spoilt, corrupt(images, kind, strength))  # seeded
        distances.append((spoilt.float() - images.float()).square().mean().item())
    assert distances[0] == 0 and distances == sorted(distances) and distances[1] > 0


@pytest.mark.parametrize("strength", range(1, 6))
def test_blur_and_jpeg_equal_torchvision_and_pillow(strength):
    images, sigma = photographs(), CORRUPTIONS["blur"][strength - 1]
    theirs = tv.gaussian_blur(images, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)
    assert (corrupt(images, "blur", strength).int() - theirs.int()).abs().max() <= 1
    file = io.BytesIO()
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=CORRUPTIONS["jpeg"][strength - 1])
    assert torch.equal(
        corrupt(images, "jpeg", strength)[0], torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    )


@pytest.mark.parametrize("strength", range(1, 6))
def test_noise_and_contrast_do_what_they_say(strength):
    grey = torch.full((8, 3, 64, 64), 128, dtype=torch.uint8)
    sigma, spoilt = CORRUPTIONS["noise"][strength - 1], corrupt(grey, "noise", strength).float()
    assert spoilt.mean() == pytest.approx(128, abs=1) and spoilt.std() == pytest.approx(sigma, rel=0.05)
    images, share = photographs(), CORRUPTIONS["contrast"][strength - 1]
    spoilt = corrupt(images, "contrast", strength).float()
    torch.testing.assert_close(spoilt.mean((1, 2, 3)), images.float().mean((1, 2, 3)), atol=0.6, rtol=0)
    torch.testing.assert_close(spoilt.std((1, 2, 3)), share * images.float().std((1, 2, 3)), atol=0.6, rtol=0.02)


def test_corruptions_refuse():
    with pytest.raises(ValueError, match="no corruption 'fog'; there are noise, blur, contrast, jpeg"):
        corrupt(photographs(), "fog", 1)
    for strength in (-1, 6, 1.5):
        with pytest.raises(ValueError, match="strength must be a whole number from 0 to 5"):
            corrupt(photographs(), "blur", strength)
    for images in (photographs().float(), photographs()[0]):
        with pytest.raises(ValueError, match="images must be uint8"):
            corrupt(images, "blur", 1)


class Brightness(nn.Module):
    """Two classes by the mean brightness."""

    image_size = 40

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def test_robustness_is_the_accuracy_on_the_spoilt_images():
    images = torch.cat(
        [torch.full((5, 3, 40, 40), 60, dtype=torch.uint8), torch.full((5, 3, 40, 40), 200, dtype=torch.uint8)]
    )
    labels = torch.arange(10) // 5
    table = robustness(Brightness(), images, labels)
    assert list(table) == list(CORRUPTIONS) and all(values == [1.0] * 6 for values in table.values())
    wrong = robustness(Brightness(), images, 1 - labels)
    assert all(values == [0.0] * 6 for values in wrong.values())


def test_ink_stays_and_black_becomes_photograph():
    ink = load_task("digits").test.images[:40]
    assert torch.equal(on_photographs(ink, share=0.0), ink)
    moved = on_photographs(ink)
    assert (moved >= ink).all() and torch.equal(moved[ink == 255], ink[ink == 255])
    black = (ink == 0).all(dim=1, keepdim=True).expand_as(ink)
    assert moved[black].float().mean() > 30 and moved[black].max() <= 0.6 * 255 + 1
    assert torch.equal(moved, on_photographs(ink)) and not torch.equal(moved, on_photographs(ink, seed=1))
    assert torch.equal(ImageTensorDataset(moved, torch.zeros(40, dtype=torch.long))[0][0], moved[0])
