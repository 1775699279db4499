"""The recipes of pages/contributing.md, followed step by step in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import book_extension
import companion
import pytest
import yaml
from book import ROOT, BookError

PAGE = (ROOT / "pages" / "contributing.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", PAGE, re.M | re.S)
    return [textwrap.dedent(body) for _, body in found]


CHAPTER, CHECKER, STUB, WRONG = blocks("python")
QUIZ, HINTS, ERRATUM = blocks("yaml")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which the recipes have been followed up to `make export`."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("chapters", "bitlib", "tools", "data", "pages"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "_config.yml", "references.bib"):
        shutil.copy(ROOT / name, root / name)
    cells = CHAPTER + "\n" + CHECKER + "\n" + STUB
    (root / "chapters" / "98_example.py").write_text(cells, encoding="utf-8")
    (root / "chapters" / "98_example.yml").write_text(QUIZ + HINTS + ERRATUM, encoding="utf-8")
    run(root, "tools/stamp.py")
    run(root, "tools/export.py")
    return root


def run(root: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_all_the_blocks():
    for name in ("98_example", "_toc.yml", "make notebooks", "tests/test_exercises.py"):
        assert name in PAGE
    assert "WRONG" in (ROOT / "tests" / "test_exercises.py").read_text(encoding="utf-8")


def test_a_new_chapter_exports_its_module_and_executes(copy: Path):
    assert (
        run(copy, "-c", "import torch, bitlib.example as e; print(e.mean_abs(torch.tensor([-1., 2.])).item())")
        == "1.5\n"
    )
    run(copy, "tools/execute.py", "chapters/98_example.py")
    run(copy, "tools/check.py", "chapters/98_example.py")
    text = (copy / "chapters" / "98_example.ipynb").read_text(encoding="utf-8")
    assert "check_mean_square: correct" in text and "1.5" in text


def test_a_new_exercise_refuses_stub_and_wrong_answers(copy: Path):
    code = f"""
import torch
from bitlib.checks.example import check_mean_square
from bitlib.example import *
{STUB.replace("check_mean_square(mean_square)", "pass").replace("# pass", "stub = mean_square")}
check_mean_square(mean_square)
answers = {{{WRONG}}}
import re
for what, objects, pattern in [("stub", [stub], "nothing")] + answers["check_mean_square"]:
    try:
        check_mean_square(*objects)
    except AssertionError as error:
        assert re.search(pattern, str(error)), (what, str(error))
    else:
        raise SystemExit(what)
print("done")
"""
    assert run(copy, "-c", code).endswith("done\n")


def test_quiz_hint_and_erratum_are_read_and_shown(copy: Path, monkeypatch: pytest.MonkeyPatch):
    found = companion.read_companion(copy / "chapters" / "98_example.py")
    assert set(found.hints) == {"check_mean_square"} and len(found.quiz) == len(found.errata) == 1
    monkeypatch.setattr(book_extension, "read_companions", lambda: [found])
    text = book_extension.errata()
    assert "was given as 0.5" in text and "<cell-example-of-an-erratum>" in text and "98_example.ipynb" in text


def test_the_recipes_would_be_caught_if_they_broke(copy: Path):
    """The checks above can fail: an erratum that quotes no cell, a question without a right answer."""
    path = copy / "chapters" / "98_example.yml"
    text = path.read_text(encoding="utf-8")
    for good, bad in (("print(mean_abs(x).item())", "print(nothing)"), ("right: true", "right: false")):
        assert good in text
        path.write_text(text.replace(good, bad), encoding="utf-8")
        with pytest.raises(BookError):
            companion.read_companion(copy / "chapters" / "98_example.py")
    path.write_text(text, encoding="utf-8")
    assert yaml.safe_load(text).keys() == {"quiz", "hints", "errata"}


def test_every_committed_result_is_listed_with_a_command_that_exists():
    table = dict(re.findall(r"^\| `(\S+\.json)` \| `([^`]+)`", PAGE, re.M))
    assert set(table) == {path.name for path in (ROOT / "data" / "results").glob("*.json")}
    for command in table.values():
        if command.startswith("make "):
            assert f"\n{command.removeprefix('make ')}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
            continue
        script, *words = command.removeprefix("python ").split()
        text = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in words if word.startswith("--")), command
