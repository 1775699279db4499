"""The tool behind the status page measures a real kernel, and the page shows what it wrote."""

import json
import re
from pathlib import Path

import book_extension
import pytest
import status
from book import ROOT, chapter_paths

STATUS = ROOT / book_extension.STATUS
CHAPTER = """# %% [markdown]
# # Tiny

# %%
import time

block = bytearray({mebibytes} * 2**20)
for i in range(0, len(block), 4096):
    block[i] = 1
time.sleep({seconds})
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "chapters").mkdir()
    (tmp_path / "chapters" / "01_small.py").write_text(CHAPTER.format(mebibytes=1, seconds=0))
    (tmp_path / "chapters" / "02_large.py").write_text(CHAPTER.format(mebibytes=300, seconds=2))
    return tmp_path


def test_time_and_memory_are_measured_and_notebooks_left_alone(root: Path):
    out = root / "status.json"
    assert status.main(["--root", str(root), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    small, large = found["chapters"]["01_small"], found["chapters"]["02_large"]
    assert large["seconds"] >= 2 and 250 < large["peak_mib"] - small["peak_mib"] < 500
    assert found["machine"]["cpus"] >= 1 and found["machine"]["torch"]
    assert not list(root.rglob("*.ipynb"))


def test_a_failing_chapter_is_reported_and_nothing_written(root: Path, capsys: pytest.CaptureFixture):
    (root / "chapters" / "01_small.py").write_text("# %% [markdown]\n# # Bad\n\n# %%\n1 / 0\n")
    assert status.main(["--root", str(root), "--out", str(root / "status.json")]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert not (root / "status.json").exists()


def test_the_page_shows_every_chapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = [path.stem for path in chapter_paths()]
    runs = {
        "date": "2026-01-31",
        "machine": {"processor": "a processor", "cpus": 2, "memory_gib": 24, "python": "3.13", "torch": "2.14"},
        "chapters": {name: {"seconds": 61.4, "peak_mib": 1234} for name in names[1:]},
    }
    (tmp_path / "status.json").write_text(json.dumps(runs))
    monkeypatch.setattr(book_extension, "STATUS", str(tmp_path / "status.json"))
    text = book_extension.status()
    assert text.count("| 61 s | 1,234 MiB |") == len(names) - 1
    assert f"{names[0]}.ipynb) | not measured yet | not measured yet |" in text
    assert "2 CPU cores (a processor)" in text
    assert book_extension.measured(names[0]) == ""
    assert book_extension.measured(names[1]) == " ([measured](../pages/status.md): 61 s)"


SPOKEN = {"half a minute": 30, "a minute": 60, "a minute and a half": 90, "two minutes": 120, "three minutes": 180}


def stated_seconds(path: Path) -> int:
    """The rounded runtime that a chapter's head states."""
    (text,) = book_extension.RUNTIME_LINE.findall(path.read_text(encoding="utf-8"))
    number = re.fullmatch(r"(\d+) seconds", text)
    return int(number[1]) if number else SPOKEN[text]


@pytest.mark.parametrize("path", chapter_paths(), ids=lambda path: path.stem)
def test_the_head_of_a_chapter_states_about_what_was_measured(path: Path):
    stated = stated_seconds(path)
    run = json.loads(STATUS.read_text(encoding="utf-8"))["chapters"].get(path.stem) if STATUS.exists() else None
    if run is None:
        pytest.skip("not measured yet: make status")
    assert stated / 2 < run["seconds"] < stated * 2, "round the measured seconds in the chapter's head"


def test_the_committed_measurement_is_of_chapters_that_exist():
    if not STATUS.exists():
        pytest.skip("not measured yet: make status")
    found = json.loads(STATUS.read_text(encoding="utf-8"))
    assert set(found["chapters"]) <= {chapter.stem for chapter in chapter_paths()}
    assert all(run["seconds"] > 0 and run["peak_mib"] > 50 for run in found["chapters"].values())
