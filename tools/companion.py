"""What stands beside a chapter, in chapters/NN_topic.yml: hints, a quiz, disagreements of sources, and errata.

    hints:          name of a checker -> a hint for its exercise
    quiz:           question, and choices with text, why, and `right: true` on one of them
    disagreements:  id, title, says (paper, code, libraries, summaries), book, and cell: text that stands in exactly one
                    code cell of the chapter, the one that shows the difference
    errata:         id, date, wrong, right, and cell as above: errors that readers of a published version met

All text is MyST Markdown. Reading checks everything that can be checked without building the site.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from book import ROOT, Chapter, chapter_paths, read_chapter

SOURCES = {
    "paper": "The paper",
    "code": "The released code",
    "libraries": "timm, Hugging Face and other libraries",
    "summaries": "Two common summaries",
}
QUESTIONS = 3
CITED = re.compile(r"\{cite\}`([^`]+)`")
KEY = re.compile(r"^@\w+\{([^,]+),", re.M)


@dataclass(frozen=True)
class Choice:
    text: str
    why: str
    right: bool = False


@dataclass(frozen=True)
class Question:
    question: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Disagreement:
    id: str
    title: str
    says: dict[str, str]  # a key of SOURCES -> what it says
    book: str
    cell: str


@dataclass(frozen=True)
class Erratum:
    id: str
    date: str
    wrong: str
    right: str
    cell: str


@dataclass(frozen=True)
class Companion:
    """What one chapter's .yml holds."""

    chapter: Chapter
    hints: dict[str, str]
    quiz: tuple[Question, ...]
    disagreements: tuple[Disagreement, ...]
    errata: tuple[Erratum, ...]

    @property
    def shown(self) -> dict[str, str]:
        """The anchor of each cell that an entry points to -> the text that the cell contains."""
        return {anchor(entry): entry.cell for entry in (*self.disagreements, *self.errata)}


def anchor(entry: Disagreement | Erratum) -> str:
    return f"cell-{entry.id}"


def companion_path(chapter: Path) -> Path:
    return chapter.with_suffix(".yml")


def _load(chapter: Path) -> dict[str, Any]:
    file = companion_path(chapter)
    return (yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None) or {}


def read_hints(chapter: Path) -> dict[str, str]:
    """The hints alone: name of a checker -> Markdown. Nothing is checked."""
    return _load(chapter).get("hints", {})


def read_companion(path: Path) -> Companion:
    """Read what stands beside a chapter. Raises BookError, naming the file and the entry, where something is wrong."""
    chapter = read_chapter(path)
    file = companion_path(path)
    data = _load(path)

    def wrong(message: str) -> Exception:
        return chapter.error(f"{file.name}: {message}")

    def built(kind: type, entry: Any, what: str) -> Any:
        try:
            return kind(**entry)
        except TypeError as error:
            raise wrong(f"{what}: {error}") from None

    unknown = set(data) - {"hints", "quiz", "disagreements", "errata"}
    if unknown:
        raise wrong(f"unknown part {', '.join(sorted(unknown))}")
    quiz = []
    for number, entry in enumerate(data.get("quiz", ()), start=1):
        what = f"question {number} of the quiz"
        choices = tuple(built(Choice, choice, what) for choice in entry.get("choices", ()))
        quiz.append(built(Question, {**entry, "choices": choices}, what))
        if len(choices) < 2 or sum(choice.right for choice in choices) != 1:
            raise wrong(f"{what}: give two choices or more, of which exactly one has `right: true`")
        for choice in choices:
            if not isinstance(choice.text, str):
                raise wrong(f"{what}: put the choice {choice.text!r} into quotation marks; it is not text")
    disagreements = []
    for entry in data.get("disagreements", ()):
        found = built(Disagreement, entry, f"disagreement {entry.get('id', '?')!r}")
        if list(found.says) != list(SOURCES):
            raise wrong(f"disagreement {found.id!r}: `says` needs {', '.join(SOURCES)}, in this order")
        disagreements.append(found)
    errata = [built(Erratum, entry, f"erratum {entry.get('id', '?')!r}") for entry in data.get("errata", ())]
    companion = Companion(chapter, data.get("hints", {}), tuple(quiz), tuple(disagreements), tuple(errata))
    for name, text in companion.shown.items():
        cells = [cell for cell in chapter.code() if text in cell.source]
        if len(cells) != 1:
            raise wrong(f"{name}: {len(cells)} code cells contain {text!r}; quote something that stands in one")
        if cells[0].has("remove-cell"):
            raise wrong(f"{name}: the cell that contains {text!r} is not on the page")
    return companion


def read_companions(root: Path = ROOT) -> list[Companion]:
    return [read_companion(path) for path in chapter_paths(root)]


def cited(text: str) -> set[str]:
    """The keys that a text cites: {"kolesnikov2020big", ...}."""
    return {key.strip() for keys in CITED.findall(text) for key in keys.split(",")}


def known_references(root: Path = ROOT) -> set[str]:
    return set(KEY.findall((root / "references.bib").read_text(encoding="utf-8")))
