"""The sweep around the HyperRule: what it counts as regret, and that it goes on where it stopped."""

import json

import pytest
import sweep_rule
import torch

from bitlib.checkpoints import save_checkpoint
from bitlib.resnet import create_model

RULE = (0.03, 500)


def row(seed, rate, steps, val, test, task="digits"):
    return {"task": task, "seed": seed, "rate": rate, "steps": steps, "val_top1": val, "test_top1": test}


def test_regret_is_against_what_a_search_would_find_and_against_the_best():
    rows = [row(0, *RULE, 0.8, 0.75), row(0, 0.1, 500, 0.9, 0.78), row(0, 0.3, 500, 0.7, 0.80)]
    rows += [row(1, *RULE, 0.9, 0.75), row(1, 0.1, 500, 0.8, 0.70), row(1, 0.3, 500, 0.7, 0.71)]
    searched, best = sweep_rule.regrets(rows, RULE)
    assert searched == pytest.approx([3, 0]) and best == pytest.approx([5, 0])
    text = sweep_rule.table(rows, RULE)
    assert "75.0*" in text and "a search on validation images: 1.5 ± 1.5 points" in text
    assert "the best of all: 2.5 ± 2.5 points" in text


def test_a_search_takes_the_cheaper_of_two_that_look_equal():
    rows = [row(0, 0.03, 500, 0.9, 0.9), row(0, 0.03, 100, 0.9, 0.6), row(0, 0.1, 100, 0.9, 0.5)]
    assert sweep_rule.regrets(rows, (0.03, 500))[0] == pytest.approx([-30])


def test_it_goes_on_where_it_stopped_and_refuses_another_checkpoint(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    one, two = (save_checkpoint(create_model("R14x0.25", 7), tmp_path / f"{name}.safetensors") for name in "ab")
    words = ["--tasks", "digits", "--rates", "0.03", "--steps", "1", "2", "--shots", "1", "--seeds", "0"]
    words += ["--out", str(tmp_path / "sweep.json"), "--model"]
    assert sweep_rule.main([*words, str(one)]) == 0
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert len(found["rows"]) == 2 and {r["steps"] for r in found["rows"]} == {1, 2}
    assert all(0 <= r["val_top1"] <= 1 and 0 <= r["test_top1"] <= 1 for r in found["rows"])

    def refuse(*args):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(sweep_rule, "run", refuse)
    assert sweep_rule.main([*words, str(one)]) == 0
    assert "digits, test top-1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another checkpoint"):
        sweep_rule.main([*words, str(two)])
