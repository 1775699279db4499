"""The cards of the shipped checkpoints say what is measured; and the tool that says so notices when they do not."""

import json
import shutil
from pathlib import Path

import cards
import pytest
import ship
import torch

from bitlib.checkpoints import load_pretrained

SHIPPED = sorted((cards.ROOT / "data" / "checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_card_is_true_and_its_file_small(path: Path, capsys):
    assert cards.main([str(path)]) == 0
    assert "DIFFERS" not in capsys.readouterr().out
    assert path.stat().st_size <= 10 * 2**20 and path.with_suffix(".log.jsonl").exists()


def test_a_card_that_is_not_true_is_noticed(tmp_path: Path, capsys):
    path = Path(shutil.copy(SHIPPED[0], tmp_path))
    card = json.loads(SHIPPED[0].with_suffix(".json").read_text())
    card["val"]["character"] += 0.02
    card["parameters"] += 1
    del card["val"]["ink"]
    path.with_suffix(".json").write_text(json.dumps(card))
    assert cards.main([str(path)]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("DIFFERS") == 2 and "character is" in shown.err and "parameters" in shown.err


def test_a_file_without_a_card_is_named(tmp_path: Path, capsys):
    path = Path(shutil.copy(SHIPPED[0], tmp_path))
    assert cards.main([str(path)]) == 1 and f"{path.stem}.json" in capsys.readouterr().err
    assert cards.main(["BiT-mini-X"]) == 1 and "BiT-mini-X" in capsys.readouterr().err


def finished_run(folder: Path) -> Path:
    """A shipped checkpoint as the run that it came from."""
    folder.mkdir()
    for ending, name in ((".safetensors", "model.safetensors"), (".json", "card.json"), (".log.jsonl", "log.jsonl")):
        shutil.copy(SHIPPED[0].with_suffix(ending), folder / name)
    return folder


@pytest.mark.parametrize("half", [False, True])
def test_a_run_is_shipped_with_a_true_card(half: bool, tmp_path: Path, capsys):
    run = finished_run(tmp_path / "run")
    assert ship.main([str(run), "BiT-mini-X", "--folder", str(tmp_path), *(["--half"] if half else [])]) == 0
    path = tmp_path / "BiT-mini-X.safetensors"
    assert cards.main([str(path)]) == 0
    card, before = (json.loads(file.read_text()) for file in (path.with_suffix(".json"), run / "card.json"))
    assert card.get("stored") == ("float16" if half else None)
    assert {**card, "val": 0, "sha256": 0, "stored": 0} == {**before, "val": 0, "sha256": 0, "stored": 0}
    ours, theirs = load_pretrained(path).state_dict(), load_pretrained(run / "model.safetensors").state_dict()
    if half:
        assert path.stat().st_size < 0.52 * (run / "model.safetensors").stat().st_size
        theirs = {name: tensor.half() for name, tensor in theirs.items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_cannot_be_shipped_is_refused(tmp_path: Path, capsys, monkeypatch):
    run = finished_run(tmp_path / "run")
    with pytest.raises(SystemExit):
        ship.main([str(run), "R26x0.5"])
    monkeypatch.setattr(ship, "LIMIT", 10**6)
    assert ship.main([str(run), "BiT-mini-X", "--folder", str(tmp_path)]) == 1
    (run / "card.json").unlink()
    assert ship.main([str(run), "BiT-mini-X", "--folder", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "more than 10; nothing was written" in said and "card.json is not there" in said
    assert not list(tmp_path.glob("BiT-mini-X*"))
