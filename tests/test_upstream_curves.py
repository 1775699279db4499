"""Curves of pre-training runs: their evaluations in order, each step once, and only of runs that have ended."""

import json

import pytest
import upstream_curves


def run_folder(folder, rows):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_evaluations_are_kept_once_and_other_rows_left_out(tmp_path, capsys):
    rows = [{"step": 5, "loss": 2.0}, {"step": 10, "eval/ink": 0.2}, {"step": 15, "loss": 1.0}]
    rows += [{"step": 10, "eval/ink": 0.3}, {"step": 20, "eval/ink": 0.5}]  # after a stop, step 10 came again
    run = run_folder(tmp_path / "run", rows)
    out = tmp_path / "curves.json"
    with pytest.raises(SystemExit, match="no finished run in .*run"):
        upstream_curves.main([str(run), "--out", str(out)])
    assert not out.exists()
    (run / "card.json").write_text(json.dumps({"command": "python -m x", "val": {"ink": 0.5}}))
    assert upstream_curves.main([str(run), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["runs"] == [
        {"command": "python -m x", "steps": [10, 20], "val": {"ink": [0.3, 0.5]}}
    ]
    assert "python -m x: 20 steps, ink 50.0%" in capsys.readouterr().out
