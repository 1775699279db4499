"""What stands beside the chapters: hints, quizzes and disagreements are there, complete, and point to what exists."""

import itertools
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from book import ROOT, BookError, chapter_paths
from bs4 import BeautifulSoup
from companion import (
    QUESTIONS,
    SOURCES,
    Companion,
    anchor,
    cited,
    companion_path,
    known_references,
    read_companion,
    read_companions,
)

SITE = ROOT / "_build" / "html"
CHAPTERS = chapter_paths()
built = pytest.mark.skipif(not (SITE / "pages" / "disagreements.html").exists(), reason="the site is not built")


@pytest.fixture(scope="module", params=CHAPTERS, ids=lambda path: path.stem)
def companion(request: pytest.FixtureRequest) -> Companion:
    return read_companion(request.param)


def test_quiz_has_its_questions_and_explains_every_choice(companion: Companion):
    assert len(companion.quiz) == QUESTIONS, (
        f"{companion_path(companion.chapter.path).name} needs {QUESTIONS} questions"
    )
    for question in companion.quiz:
        assert question.question.rstrip().endswith(("?", ":"))
        assert len({choice.text for choice in question.choices}) == len(question.choices) >= 3
        for choice in question.choices:
            assert re.search(r"\w", re.sub(r"\$[^$]*\$", "", choice.text)), f"{choice.text!r} has no words to label it"
            assert len(choice.why) > 15, f"{choice.text!r} needs a reason"


@built
def test_the_right_answer_is_not_always_in_the_same_place():
    pages = [BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in SITE.glob("chapters/*.html")]
    forms = [form for page in pages for form in page.select("form.quiz")]
    places = ["data-right" in str(form.select("input")[0]) for form in forms]
    assert 0.1 < sum(places) / len(places) < 0.6


def test_every_exercise_has_a_hint_and_every_hint_an_exercise(companion: Companion):
    checks = [re.search(r"^# (check_\w+)\(", cell.source, re.M)[1] for cell in companion.chapter.tagged("exercise")]
    assert sorted(companion.hints) == sorted(checks)


def test_disagreements_are_complete_and_cite_what_the_references_have(companion: Companion):
    known = known_references()
    for entry in companion.disagreements:
        texts = [*entry.says.values(), entry.book]
        assert all(len(text.strip()) > 5 for text in texts), f"{entry.id}: a part is empty"
        keys = set().union(*map(cited, texts))
        assert keys, f"{entry.id} cites nothing"
        assert not keys - known, f"{entry.id} cites {keys - known}, which references.bib does not have"


def test_ids_are_unique_and_print_the_counts(capsys: pytest.CaptureFixture):
    companions = read_companions()
    entries = [entry.id for c in companions for entry in (*c.disagreements, *c.errata)]
    assert len(entries) == len(set(entries))
    with capsys.disabled():
        print(
            f"\n{len(entries)} disagreements and errata, {sum(len(c.quiz) for c in companions)} quiz questions, "
            f"{sum(len(c.hints) for c in companions)} hints"
        )
    # what any reader of the two summaries would stumble over
    assert {"input-range", "batch-norm-block", "steps", "label-smoothing", "stem-padding", "ws-epsilon"} <= set(entries)
    assert {"stride-place", "decay-steps", "large-resolution", "names-that-do-not-exist"} <= set(entries)


@built
def test_every_entry_is_on_the_page_and_leads_to_its_cell(companion: Companion):
    page = BeautifulSoup((SITE / "pages" / "disagreements.html").read_text(encoding="utf-8"), "html.parser")
    name = companion.chapter.path.stem
    chapter = BeautifulSoup((SITE / "chapters" / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
    for entry in companion.disagreements:
        assert page.find(id=entry.id), f"{entry.id} is not on the page; build the site again"
        (place,) = [a for a in page.find_all("a") if a["href"] == f"../chapters/{name}.html#{anchor(entry)}"]
        section = place.find_parent("section")
        assert [dt.text for dt in section.find_all("dt")] == [*SOURCES.values(), "This book"]
        assert entry.title[:10] in section.find("h3").text
        cell = chapter.find(id=anchor(entry))
        cell = cell if "cell" in cell.get("class", ()) else cell.find_parent(class_="cell")
        assert entry.cell in cell.find("pre").get_text(), f"{anchor(entry)} is at another cell"


def test_hints_are_in_the_notebook_after_the_stubs(companion: Companion):
    cells = nbformat.read(companion.chapter.notebook, as_version=4).cells
    before = {cell.id: stub for stub, cell in itertools.pairwise(cells) if "hint" in cell.metadata.get("tags", ())}
    assert sorted(before) == sorted(f"hint-{name}" for name in companion.hints)
    assert all(f"# {name.removeprefix('hint-')}(" in stub.source for name, stub in before.items())


@built
def test_quiz_and_hints_are_on_the_page(companion: Companion):
    name = companion.chapter.path.stem
    chapter = BeautifulSoup((SITE / "chapters" / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
    assert len(chapter.select("form.quiz")) == len(companion.quiz)
    for form in chapter.select("form.quiz"):
        assert len(form.select("input[data-right]")) == 1
        assert form.find("details").find("strong").get_text(strip=True), "the answer is there without a script"
    assert len(chapter.select("details.sd-dropdown")) >= len(companion.hints)


GOOD = {
    "quiz": [{"question": "Why?", "choices": [{"text": "a", "why": "so", "right": True}, {"text": "b", "why": "no"}]}],
    "disagreements": [{"id": "x", "title": "X", "says": dict.fromkeys(SOURCES, "y"), "book": "z", "cell": "x = 1"}],
}
FAULTS = {
    "unknown part": (lambda d: d | {"quizzes": []}, "unknown part quizzes"),
    "two right answers": (
        lambda d: (
            d | {"quiz": [{"question": "Why?", "choices": [{"text": t, "why": "w", "right": True} for t in "ab"]}]}
        ),
        "exactly one has",
    ),
    "a source is missing": (
        lambda d: d | {"disagreements": [d["disagreements"][0] | {"says": {"paper": "y"}}]},
        "`says` needs paper, code",
    ),
    "no such cell": (
        lambda d: d | {"disagreements": [d["disagreements"][0] | {"cell": "x = 2"}]},
        "0 code cells contain",
    ),
    "a part is missing": (lambda d: d | {"disagreements": [{"id": "x", "says": {}}]}, "missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_entry_is_refused_by_name(fault: str, tmp_path: Path):
    """The checks above can fail."""
    (tmp_path / "01_x.py").write_text("# %% [markdown]\n# # X\n\n# %%\nx = 1\n")
    path = tmp_path / "01_x.py"
    companion_path(path).write_text(yaml.safe_dump(GOOD, sort_keys=False))
    assert read_companion(path).disagreements[0].id == "x"
    change, message = FAULTS[fault]
    companion_path(path).write_text(yaml.safe_dump(change(GOOD), sort_keys=False))
    with pytest.raises(BookError, match=re.escape(message)):
        read_companion(path)
