"""The cards of the shipped checkpoints say what is measured; and the tool that says so notices when they do not."""

import json
import shutil
from pathlib import Path

import cards
import pytest

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
