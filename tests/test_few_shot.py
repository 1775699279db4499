"""The few-shot comparison: which images a run may use, what is chosen on what, going on, and what is still to do."""

import json

import few_shot_tasks
import pytest
import torch
from sweep_rule import split

from bitlib.checkpoints import save_checkpoint
from bitlib.data import ImageTensorDataset, Task, load_task, shipped_file
from bitlib.evaluate import right_images
from bitlib.resnet import create_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    return save_checkpoint(create_model("R14x0.25", 7), tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


def small_task(per_class, colour=False):
    """Two classes of dark and light noise, `per_class` images of each in the pool."""
    labels = torch.arange(2 * per_class) % 2
    noise = torch.randint(100, (2 * per_class, 3 if colour else 1, 32, 32), generator=torch.Generator().manual_seed(0))
    images = (noise + 100 * labels[:, None, None, None]).to(torch.uint8).expand(-1, 3, -1, -1)
    parts = [ImageTensorDataset(images, labels, 2)] * 2
    return Task("small", *parts, ("dark", "light"), description="", source="", licence="")


def test_every_task_has_real_pictures_and_enough_of_them():
    assert set(few_shot_tasks.TASKS).isdisjoint({"characters", "count", "orientation", "x-position", "distance"})
    for name in few_shot_tasks.TASKS:
        assert few_shot_tasks.enough(load_task(name), 25)
        train, val = split(load_task(name), 25, seed=0)
        assert set(train).isdisjoint(val)


def test_a_cell_without_images_to_validate_on_is_left_out():
    task = small_task(5)
    assert few_shot_tasks.enough(task, 4) and not few_shot_tasks.enough(task, 5)


def test_grey_pictures_are_one_channel_and_hog_sees_edges_not_brightness():
    assert few_shot_tasks.pixels(small_task(2))[0].shape == (4, 32 * 32)
    assert few_shot_tasks.pixels(small_task(2, colour=True))[0].shape == (4, 3 * 32 * 32)
    edge = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    edge[:, :, :, 16:] = torch.tensor([60, 120])[:, None, None, None]
    data = ImageTensorDataset(edge, torch.tensor([0, 1]), 2)
    one, other = few_shot_tasks.gradients(Task("edge", data, data, ("a", "b"), "", "", ""))[0]
    assert one.shape == (324,) and one.max() > 0.1
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_the_rate_from_scratch_is_the_best_on_validation_images_of_that_task():
    experiment = few_shot_tasks.Experiment.__new__(few_shot_tasks.Experiment)
    tried = [("a", 1, 0.1, 0.5), ("a", 1, 0.3, 0.7), ("a", 5, 0.1, 0.9), ("b", 1, 0.1, 0.9), ("a", 1, 0.01, 0.7)]
    rates = [dict(zip(("task", "shots", "rate", "val_top1"), values, strict=True)) for values in tried]
    experiment.results = {"rates_tried": rates}
    assert experiment.best_rate("a", 1) == 0.01 and experiment.best_rate("b", 1) == 0.1
    assert experiment.best_rate("b", 5) is None


def test_all_methods_run_are_planned_and_go_on_where_they_stopped(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(few_shot_tasks, "load_task", lambda name: small_task(4))
    out = tmp_path / "few.json"
    words = ["--tasks", "small", "--shots", "1", "5", "--seeds", "0", "--rates", "0.01", "0.1", "--steps", "2"]
    words += ["--model", str(tiny), "--out", str(out)]
    assert few_shot_tasks.main([*words, "--plan"]) == 0
    assert "4 trainings of 2 steps: 8 optimiser steps" in capsys.readouterr().out and not out.exists()
    assert few_shot_tasks.main(words) == 0
    text = capsys.readouterr().out
    assert "left out, for want of images: 5 shots" in text
    found = json.loads(out.read_text())
    ways = {"tiny finetuned", "tiny ridge", "tiny probe", "scratch", "logistic pixels", "logistic hog", "svm pixels"}
    assert {row["method"] for row in found["rows"]} == ways and len(found["rows"]) == 7
    assert len(found["rates_tried"]) == 2
    for row in found["rows"]:
        assert (row["task"], row["shots"], row["seed"]) == ("small", 1, 0)
        assert row["top1"] == pytest.approx(right_images(row).double().mean().item())
    by_method = {row["method"]: row for row in found["rows"]}
    assert by_method["logistic pixels"]["top1"] == 1  # dark and light
    best = max(found["rates_tried"], key=lambda row: (row["val_top1"], -row["rate"]))
    assert by_method["scratch"]["rate"] == best["rate"]

    def refuse(*args):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(few_shot_tasks.Experiment, "run", refuse)
    monkeypatch.setattr(few_shot_tasks.Experiment, "try_rate", refuse)
    assert few_shot_tasks.main(words) == 0 and capsys.readouterr().out == text
    with pytest.raises(SystemExit, match="another checkpoint"):
        few_shot_tasks.main([*words, "--steps", "3"])


def test_the_rate_of_the_minis_is_chosen_on_validation_images_only(tiny, tmp_path, capsys):
    words = ["--mini-rates", "0.01", "0.1", "--seeds", "0", "--steps", "1", "--model", str(tiny)]
    assert few_shot_tasks.main([*words, "--out", str(tmp_path / "rate.json")]) == 0
    found = json.loads((tmp_path / "rate.json").read_text())
    assert len(found["rates_tried"]) == 2 and not found["rows"] and "base_lr" not in found["about"]["rule"]
    assert "(1 seeds)" in capsys.readouterr().out


@pytest.mark.parametrize("checkpoint, name", [("BiT-mini-M", "few_shot_tasks"), ("BiT-mini-S", "few_shot_bit-mini-s")])
def test_the_committed_results_are_of_the_shipped_checkpoint(checkpoint, name, tmp_path):
    experiment = few_shot_tasks.Experiment(checkpoint, tmp_path / "none.json")
    found = json.loads(shipped_file(f"results/{name}.json").read_text())
    assert found["about"] == json.loads(json.dumps(experiment.about))
    keys = [(row["task"], row["method"], row["shots"], row["seed"]) for row in found["rows"]]
    assert len(keys) == len(set(keys)) and {key[0] for key in keys} <= set(few_shot_tasks.TASKS)
    for row in found["rows"]:
        assert len(right_images(row)) == len(load_task(row["task"]).test)
