"""Check that every chapter keeps the book's rules, and that its committed notebook is what its .py says.

    python tools/check.py [chapters/02_group_normalization.py ...]

Prints one line for each breach, with the chapter, the line and what to do; exits 1 if there is any.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat
from book import ROOT, BookError, Chapter, chapter_paths, digest, own_cells, read_chapter
from companion import read_hints
from nbformat import NotebookNode
from pair import with_hints
from stamp import address

TAGS = {
    "check",
    "exercise",
    "export",
    "hide-cell",
    "hide-input",
    "hide-output",
    "nbval-ignore-output",
    "raises-exception",
    "remove-cell",
    "remove-output",
    "setup",
    "solution",
}
IGNORED_SHARE = 5  # at most one code cell in this many may hide its output from the comparison
# a path of the machine that executed the notebook, or an object's address in memory
VOLATILE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|var|opt)/[\w./-]+|0x[0-9a-f]{8,}")


def check_source(chapter: Chapter, root: Path = ROOT) -> list[str]:
    """What is wrong with a chapter's .py, one line each."""
    problems = []

    def breach(message: str, line: int | None) -> None:
        problems.append(str(chapter.error(message, line)))

    titles = [cell for cell in chapter.cells if cell.kind == "markdown" and re.search(r"^# ", cell.source, re.M)]
    if len(titles) != 1 or chapter.cells[0] is not titles[0]:
        breach("the first cell, and no other, must hold the chapter's one '# ' title", chapter.cells[0].line)
    setup = chapter.tagged("setup")
    if len(setup) != 1:
        breach(f"{len(setup)} cells are tagged `setup`; there must be one, right after the title", None)
    elif f"git+{address(root)}" not in setup[0].source:
        breach("the set-up cell names another address than _config.yml; run `make export`", setup[0].line)
    for cell in chapter.cells:
        for tag in set(cell.tags) - TAGS:
            breach(f"unknown tag `{tag}`; known are {', '.join(sorted(TAGS))}", cell.line)
    code = chapter.code()
    ignored = chapter.tagged("nbval-ignore-output")
    if len(ignored) * IGNORED_SHARE > len(code):
        breach(f"{len(ignored)} of {len(code)} code cells are tagged `nbval-ignore-output`; at most one in five", None)
    for cell in ignored:
        following = code[code.index(cell) + 1] if cell is not code[-1] else None
        if following is None or "assert" not in following.source:
            breach(
                "the outputs of this cell are not compared, so the code cell after it must assert what the text says",
                cell.line,
            )
    for cell in chapter.tagged("exercise"):
        following = code[code.index(cell) + 1] if cell is not code[-1] else None
        if following is None or not following.has("solution"):
            breach("an exercise without a solution; tag the next code cell `solution`", cell.line)
        if not re.match(r"# check_\w+\(.*\)$", cell.source.splitlines()[-1]):
            breach("an exercise's last line must be its check, commented out: `# check_it(my_it)`", cell.line)
    return problems


def check_notebook(chapter: Chapter, root: Path = ROOT) -> list[str]:
    """What is wrong with a chapter's committed notebook, one line each."""
    if not chapter.notebook.exists():
        return [str(chapter.error("there is no notebook beside it; run `make notebooks`"))]
    notebook = nbformat.read(chapter.notebook, as_version=4)
    problems = []
    cells = own_cells(notebook)
    if len(cells) != len(chapter.cells):
        counts = f"the notebook has {len(cells)} cells, the .py {len(chapter.cells)}"
        return [str(chapter.error(f"{counts}; run `make notebooks`"))]
    hinted = [(cell.id, cell.source) for cell in with_hints(cells, read_hints(chapter.path))]
    if hinted != [(cell.id, cell.source) for cell in notebook.cells]:
        problems.append(str(chapter.error("the notebook's hints are not those of the .yml; run `make notebooks`")))
    count = 0
    for cell, source in zip(cells, chapter.cells, strict=True):
        kinds = (cell.cell_type, tuple(cell.metadata.get("tags", ())))
        if cell.source != source.source or kinds != (source.kind, source.tags):
            difference = "the notebook's cell differs from the .py; run `make notebooks`"
            problems.append(str(chapter.error(difference, source.line)))
            continue
        if cell.cell_type == "code":
            count += 1
            problems += [str(chapter.error(text, source.line)) for text in check_outputs(cell, count)]
    if not problems and notebook.metadata.get("bitlib", {}).get("executed") != digest(chapter, root):
        problems.append(
            str(chapter.error("its outputs are older than its code, bitlib or data/; run `make notebooks`"))
        )
    return problems


def check_outputs(cell: NotebookNode, count: int) -> list[str]:
    """What is wrong with the stored outputs of one code cell, the count-th of its notebook."""
    problems = []
    if cell.execution_count is None:
        problems.append("this cell was never executed, so nbval compares nothing; run `make notebooks`")
    elif cell.execution_count != count:
        problems.append(f"executed as number {cell.execution_count}, not {count}; run `make notebooks`")
    for output in cell.outputs:
        if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", ()):
            problems.append(f"this cell fails: {output.ename}: {output.evalue}")
        text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
        for found in VOLATILE.findall(text):
            problems.append(f"the output names {found}, which no other machine will print; print something else")
        if any(kind.startswith("image/") for kind in output.get("data", {})):
            if not cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "").strip():
                problems.append('a figure without alt text; add mystnb={"image": {"alt": "..."}} to the cell marker')
    return problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", type=Path, help="chapter sources; all of them by default")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    args = parser.parse_args(argv)
    problems: list[str] = []
    for path in args.chapters or chapter_paths(args.root):
        try:
            chapter = read_chapter(path.with_suffix(".py").resolve())
            problems += check_source(chapter, args.root) + check_notebook(chapter, args.root)
        except BookError as error:
            problems.append(str(error))
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
