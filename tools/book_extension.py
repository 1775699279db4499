"""A Sphinx extension for what the site generates from the book itself.

Into each chapter's page go the hints, the quiz and the anchors that tools/companion.py reads, and an index entry for
every public name it exports. A line `% generated: NAME` in a page of pages/ becomes what GENERATED[NAME] writes.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import re
import shutil
import zlib
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import yaml
from book import ROOT, Chapter, chapter_paths, imported_modules, read_chapters
from companion import SOURCES, anchor, companion_path, read_companion, read_companions
from docutils import nodes
from docutils.parsers.rst import directives
from export import defined_names
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective
from vendor import available, folder

MARK = re.compile(r"^% generated: ([\w-]+)$", re.M)
RUNTIME_LINE = re.compile(r"\*\*Runtime:\*\* about ([\w ]+) on two\s+CPU\s+cores")
STATUS = "data/results/status.json"
DEMO = "pages/_static/demo"
RUNTIME = "onnxruntime-web"


def title(chapter: Chapter) -> str:
    return next(line.removeprefix("# ") for line in chapter.cells[0].source.splitlines() if line.startswith("# "))


def definition(chapter: Chapter, name: str) -> str:
    """The anchor of the cell that defines a name; a reference knows no capitals, so a class gets a mark of its own."""
    return f"def-{chapter.module}-{name}".lower() + "-class" * (name != name.lower())


def link(chapter: Chapter) -> str:
    return f"[{title(chapter)}](../chapters/{chapter.path.stem}.ipynb)"


# --- what goes into a chapter's page ---------------------------------------------------------------------------------


def add_companion(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put hints after the stubs of a notebook, the quiz at its end and its runtime at its head; fill a page's marks."""
    path = ROOT / f"{docname}.py"
    if path in chapter_paths():
        notebook = json.loads(source[0])
        companion = read_companion(path)
        for cell in notebook["cells"]:
            if "hint" in cell["metadata"].get("tags", ()):  # the page has a nicer fold than a notebook can
                hint = companion.hints[cell["id"].removeprefix("hint-")]
                cell["source"] = f"```{{dropdown}} A hint\n{hint}\n```"
            elif cell["cell_type"] == "markdown":
                cell["source"] = RUNTIME_LINE.sub(rf"\g<0>{measured(path.stem)}", "".join(cell["source"]))
        if companion.quiz:
            text = f"## Quiz\n\n```{{quiz}} {companion_path(path).relative_to(ROOT)}\n```"
            notebook["cells"].append(markdown_cell("quiz", text))
        source[0] = json.dumps(notebook)
    elif docname.startswith("pages/"):
        source[0] = MARK.sub(lambda mark: GENERATED[mark[1]](), source[0])


def measured(stem: str) -> str:
    """What follows the rounded runtime at a chapter's head: what the status page has, if anything was measured."""
    path = ROOT / STATUS
    runs = json.loads(path.read_text(encoding="utf-8"))["chapters"] if path.exists() else {}
    return f" ([measured](../pages/status.md): {runs[stem]['seconds']:.0f} s)" if stem in runs else ""


def markdown_cell(name: str, text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


class Quiz(SphinxDirective):
    """The questions of one YAML file, as a form that a script makes answer; without it, the answers unfold."""

    required_arguments = 1
    option_spec = {"key": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        path = ROOT / self.arguments[0]
        self.env.note_dependency(str(path))
        questions = yaml.safe_load(path.read_text(encoding="utf-8"))["quiz"]
        return [node for number, entry in enumerate(questions, start=1) for node in self.question(number, entry)]

    def question(self, number: int, entry: dict[str, Any]) -> list[nodes.Node]:
        name = f"quiz-{number}"
        right = next(choice for choice in entry["choices"] if choice.get("right"))
        found = [html(f'<form class="quiz"><fieldset><legend id="{name}"><span>Question {number}.</span> ')]
        found += [*self.inline(entry["question"]), html("</legend>")]
        for index, choice in enumerate(sorted(entry["choices"], key=shuffled)):
            attributes = f'type="radio" name="{name}" id="{name}-{index}"' + (" data-right" * (choice is right))
            found += [html(f'<div class="quiz-choice"><input {attributes}><label for="{name}-{index}">')]
            found += [*self.inline(choice["text"]), html('</label><p class="quiz-why" hidden>')]
            found += [*self.inline(choice["why"]), html("</p></div>")]
        found += [html('<p class="quiz-buttons"><button type="submit" hidden>Check</button></p>')]
        found += [html('<div class="quiz-reply" role="status"></div>')]
        found += [html(f'<details><summary>Answer<span class="sr-only"> to question {number}</span></summary><p>')]
        stop = " " if right["text"].endswith(".") else ". "
        found += [nodes.strong("", "", *self.inline(right["text"])), nodes.Text(stop), *self.inline(right["why"])]
        found += [html("</p></details></fieldset></form>")]
        return found

    def inline(self, text: str) -> list[nodes.Node]:
        found, messages = self.state.inline_text(text, self.lineno)
        return [*found, *messages]


def shuffled(choice: dict[str, Any]) -> str:
    """A key that puts the choices into an order that says nothing of which is right, always the same."""
    return hashlib.sha256(choice["why"].encode()).hexdigest()


def html(text: str) -> nodes.raw:
    return nodes.raw("", text, format="html")


class CellAnchors(SphinxTransform):
    """Give an anchor to every cell that an entry points to, and an index entry to every public name exported."""

    default_priority = 800  # before the index and the labels are gathered

    def apply(self, **kwargs: Any) -> None:
        path = ROOT / f"{self.env.docname}.py"
        if path not in chapter_paths():
            return
        for name in (path, companion_path(path)):
            self.env.note_dependency(str(name))
        companion = read_companion(path)
        for cell in self.document.findall(nodes.container):
            if cell.get("nb_element") != "cell_code":
                continue
            code = next((node.astext() for node in cell.findall(nodes.literal_block)), "")
            for name, text in companion.shown.items():
                if text in code:
                    cell["ids"].append(name)
                    self.label(name)
            if "tag_export" in cell["classes"]:
                self.index(cell, code, companion.chapter)

    def label(self, name: str) -> None:
        labels = self.env.get_domain("std").data
        labels["anonlabels"][name] = self.env.docname, name
        labels["labels"][name] = self.env.docname, name, "the cell"

    def index(self, cell: nodes.container, code: str, chapter: Chapter) -> None:
        names = [name for node in ast.parse(code).body for name in defined_names(node) if not name.startswith("_")]
        entries = []
        for name in names:
            label = definition(chapter, name)
            cell["ids"].append(label)
            self.label(label)
            entries.append(("single", f"{name} (in bitlib.{chapter.module})", label, "", None))
        if entries:
            cell.insert(0, addnodes.index(entries=entries))


# --- what goes into the pages ----------------------------------------------------------------------------------------


def disagreements() -> str:
    """Every entry, by chapter: who says what, what the book does, and where it shows."""
    parts = []
    for companion in read_companions():
        if not companion.disagreements:
            continue
        parts.append(f"## {title(companion.chapter)}\n")
        for entry in companion.disagreements:
            rows = [f"{SOURCES[source]}\n: {text}\n" for source, text in entry.says.items()]
            rows.append(f"This book\n: {entry.book}\n")
            where = f"See {{ref}}`the cell that shows it <{anchor(entry)}>` in the chapter {link(companion.chapter)}."
            parts.append(f"({entry.id})=\n### {entry.title}\n\n" + "\n".join(rows) + f"\n{where}\n")
    return "\n".join(parts)


def errata() -> str:
    """The errors that readers of a published version met, newest first."""
    found = [(entry, companion) for companion in read_companions() for entry in companion.errata]
    if not found:
        return f"None is known in version {version()} of the book."
    rows = []
    for entry, companion in sorted(found, key=lambda pair: pair[0].date, reverse=True):
        where = f"{{ref}}`the cell <{anchor(entry)}>` in {link(companion.chapter)}"
        rows.append(f"{entry.date}\n: Was: {entry.wrong}\n\n  Is: {entry.right}\n\n  See {where}.\n")
    return "\n".join(rows)


def version() -> str:
    return re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]


def chapter_map() -> str:
    """Which chapter exports which module, what that imports, and what it gives."""
    chapters = read_chapters()
    order = [chapter.module for chapter in chapters if chapter.module]
    rows = ["{.stacked .map}", "| chapter | module | builds on | gives |", "|---|---|---|---|"]
    for chapter in chapters:
        names = f"`bitlib.{chapter.module}`" if chapter.module else "none: it uses what is there"
        needs = needed(chapter, order)
        rows.append(
            f"| {link(chapter)} | {names} | {', '.join(f'`{name}`' for name in needs) or 'nothing before it'} |"
            f" {chapter.summary} |"
        )
    return map_picture(chapters) + "\n\n" + "\n".join(rows)


def needed(chapter: Chapter, order: list[str]) -> list[str]:
    """The modules that what a chapter exports imports; for a chapter without a module, those that its cells import."""
    if chapter.module is None:
        return [name for name in order if name in imported_modules(chapter)]
    exported = replace(chapter, cells=tuple(chapter.tagged("export")))
    return [name for name in order if name in imported_modules(exported)]


def index() -> str:
    """Every public name that a chapter exports, in alphabetical order, with the cell that defines it."""
    found = []
    for chapter in read_chapters():
        for cell in chapter.tagged("export"):
            for node in ast.parse(cell.source).body:
                names = [name for name in defined_names(node) if not name.startswith("_")]
                found += [(name.lower().lstrip("_"), name, chapter) for name in names]
    parts = []
    for letter, group in itertools.groupby(sorted(found, key=lambda f: (f[0], f[2].path)), key=lambda f: f[0][0]):
        rows = [
            f"{{ref}}`{name} <{definition(chapter, name)}>`\n: `bitlib.{chapter.module}`, in {link(chapter)}\n"
            for _, name, chapter in group
        ]
        parts.append(f"## {letter.upper()}\n\n" + "\n".join(rows))
    return "\n".join(parts)


def map_picture(chapters: list[Chapter]) -> str:
    """The import graph as a picture: one row a module, an arc from each to every module that it imports."""
    order = [chapter.module for chapter in chapters if chapter.module]
    row, left, top = 34, 210, 12
    height = top * 2 + row * len(order)
    width = left + 40 + 17 * len(order)
    lines = []
    for index, name in enumerate(order):
        y = top + row * index + row / 2
        lines.append(f'<text x="{left - 14}" y="{y + 5}" text-anchor="end">bitlib.{name}</text>')
        lines.append(f'<circle cx="{left}" cy="{y}" r="4.5"/>')
    sentences = []
    for chapter in chapters:
        needs = needed(chapter, order) if chapter.module else []
        if needs:
            sentences.append(f"{chapter.module} imports {', '.join(needs)}")
        for name in needs:
            start, end = (top + row * order.index(n) + row / 2 for n in (name, chapter.module))
            reach = 17 * (order.index(chapter.module) - order.index(name)) + 18
            lines.append(f'<path d="M{left} {end} C{left + reach} {end} {left + reach} {start} {left} {start}"/>')
    label = "The modules in the order of the chapters; an arc leads from a module up to each that it imports: "
    return (
        f'```{{raw}} html\n<svg class="chapter-map" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label + "; ".join(sentences))}.">{"".join(lines)}</svg>\n```'
    )


def status() -> str:
    """How long each chapter ran and how much memory it took, as tools/status.py measured it last."""
    path = ROOT / STATUS
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"chapters": {}}
    rows = ["| chapter | runtime | peak memory | cells |", "|---|---:|---:|---:|"]
    for chapter in read_chapters():
        run = runs["chapters"].get(chapter.path.stem)
        figures = f"{run['seconds']:.0f} s | {run['peak_mib']:,} MiB" if run else "not measured yet | not measured yet"
        rows.append(f"| {link(chapter)} | {figures} | {len(chapter.code())} |")
    if not runs["chapters"]:
        return "\n".join(rows)
    machine = runs["machine"]
    text = (
        f"Measured on {runs['date']} with {machine['cpus']} CPU cores ({machine['processor']}), "
        f"{machine['memory_gib']} GiB of memory, Python {machine['python']}, PyTorch {machine['torch']}."
    )
    total = sum(run["seconds"] for run in runs["chapters"].values())
    return text + "\n\n" + "\n".join(rows) + f"\n\nTogether: {total / 60:.0f} minutes."


def quiz_count() -> str:
    companions = read_companions()
    return (
        f"{len(companions)} chapters, {sum(len(c.hints) for c in companions)} exercises, "
        f"{sum(len(c.quiz) for c in companions)} quiz questions and "
        f"{sum(len(c.disagreements) for c in companions)} disagreements of sources."
    )


def demo() -> str:
    """The demo's script, or, where its runtime could not be fetched, a sentence that says so."""
    script = f'<script src="../_static/demo.js" data-runtime="{folder(RUNTIME).name}" defer></script>'
    if available(RUNTIME):
        return f"```{{raw}} html\n{script}\n```"
    return (
        "```{admonition} Only a picture here\n:class: note demo-missing\n"
        "The program that runs the network in a browser, onnxruntime-web, is not committed with the book; it is "
        "fetched by npm when the site is built. When this copy was built there was no npm or no network. "
        "`make book` on a machine that has both brings the demo to life.\n```"
    )


def demo_card() -> str:
    """How the demo's network was made, from the card that tools/demo.py wrote."""
    card = json.loads((ROOT / DEMO / "card.json").read_text(encoding="utf-8"))
    return (
        f"{card['checkpoint']} was fine-tuned on {card['trained_on']} ({card['rule']}). On the {card['test_images']} "
        f"test images it is right for {100 * card['test_top1']:.1f} %, as exported for "
        f"{100 * card['test_top1_of_the_exported_net']:.1f} %. The file has {card['onnx_bytes'] / 1e6:.1f} MB. "
        f"`{card['command']}` makes it again."
    )


def copy_runtime(app: Sphinx) -> None:
    """Put the demo's runtime beside the pages, if it is there."""
    if app.builder.format == "html" and available(RUNTIME):
        target = Path(app.outdir) / "_static" / "vendor" / folder(RUNTIME).name
        target.mkdir(parents=True, exist_ok=True)
        for path in folder(RUNTIME).iterdir():
            if not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


GENERATED = {
    "demo": demo,
    "demo-card": demo_card,
    "disagreements": disagreements,
    "errata": errata,
    "chapter-map": chapter_map,
    "index": index,
    "status": status,
    "counts": quiz_count,
}


def depend_on_chapters(app: Sphinx, docname: str, source: list[str]) -> None:
    """A page with a marked line is read again when a chapter, its companion or the status changes; a chapter, too."""
    if docname.startswith("chapters/"):
        app.env.note_dependency(str(ROOT / STATUS))
    if docname.startswith("pages/") and MARK.search(source[0]):
        for path in chapter_paths():
            for name in (path, companion_path(path)):
                app.env.note_dependency(str(name))
        app.env.note_dependency(str(ROOT / STATUS))


def setup(app: Sphinx) -> dict[str, bool | int]:
    app.add_directive("quiz", Quiz)
    app.add_transform(CellAnchors)
    app.connect("source-read", depend_on_chapters, priority=400)
    app.connect("source-read", add_companion)
    app.connect("builder-inited", copy_runtime)
    # whether the runtime is there may have changed since the last build, and no source says so
    app.connect("env-get-outdated", lambda *_: ["pages/demo"])
    # another version of this file reads every page again
    state = zlib.crc32(Path(__file__).read_bytes())
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": state}
