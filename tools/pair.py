"""Bring every chapter's notebook into line with its .py: sources and tags from the .py, outputs kept where they fit.

    python tools/pair.py [chapters/02_group_normalization.py ...]

One direction only: the notebook never changes the .py. After the stub of an exercise the notebook has one cell more,
the hint from the chapter's .yml, tagged `hint`, for whoever does not read the site.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from book import ROOT, BookError, chapter_paths, read_chapter
from companion import read_hints
from jupytext.combine import combine_inputs_with_outputs
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

FOLDED = {"hide-cell", "hide-input"}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def paired(source: Path, notebook: Path) -> NotebookNode:
    """The notebook of a chapter: cells of the .py, with the outputs and ids that the old notebook has for them."""
    read_chapter(source)  # raises where the cells cannot be told apart
    new = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    old_ids: set[str] = set()
    header = {key: value for key, value in new.metadata.get("bitlib", {}).items()}
    if notebook.exists():
        old = nbformat.read(notebook, as_version=4)
        old_ids = {cell.id for cell in old.cells}
        executed = old.metadata.get("bitlib", {}).get("executed")
        # jupytext warns if the old notebook has no jupytext metadata; the text alone decides here
        new = combine_inputs_with_outputs(new, old, fmt="py:percent")
        if executed:
            header["executed"] = executed
    new.metadata = NotebookNode(
        kernelspec=NotebookNode(KERNEL), language_info=NotebookNode(name="python"), bitlib=NotebookNode(header)
    )
    if not header:
        del new.metadata["bitlib"]
    new.nbformat, new.nbformat_minor = 4, 5
    taken: set[str] = set()
    for cell in new.cells:
        if cell.get("id") not in old_ids or cell.id in taken:
            cell.id = fresh_id(cell.source, taken)
        taken.add(cell.id)
        if FOLDED & set(cell.metadata.get("tags", ())):
            # what the site folds away by its tags, JupyterLab folds away by this
            cell.metadata["jupyter"] = NotebookNode(source_hidden=True)
        if "solution" in cell.metadata.get("tags", ()):
            cell.metadata["cellView"] = "form"  # and Colab by this
    new.cells = with_hints(new.cells, read_hints(source))
    return new


def checker(cell: NotebookNode) -> str | None:
    """The name of the checker that an exercise's stub ends with, commented out; None for any other cell."""
    found = re.search(r"# (check_\w+)\(", cell.source) if "exercise" in cell.metadata.get("tags", ()) else None
    return found[1] if found else None


def with_hints(cells: list[NotebookNode], hints: dict[str, str]) -> list[NotebookNode]:
    """The cells of a chapter, and after each exercise's stub its hint, folded."""
    result = []
    for cell in cells:
        result.append(cell)
        if (check := checker(cell)) in hints:
            text = f"<details><summary>A hint</summary>\n\n{hints[check].strip()}\n\n</details>"
            result.append(new_markdown_cell(text, id=f"hint-{check}", metadata={"tags": ["hint"]}))
    return result


def fresh_id(source: str, taken: set[str]) -> str:
    """An id for a new cell that depends on its text alone, so that pairing twice gives the same bytes."""
    count = 0
    while True:
        name = hashlib.sha256(f"{source}\0{count}".encode()).hexdigest()[:8]
        if name not in taken:
            return name
        count += 1


def write_notebook(notebook: NotebookNode, path: Path) -> bool:
    """Write atomically, and only if something changed; returns whether it did."""
    text = nbformat.writes(notebook).rstrip("\n") + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    temporary = path.with_suffix(".ipynb.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", type=Path, help="chapter sources; all of them by default")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    args = parser.parse_args(argv)
    for path in args.chapters or chapter_paths(args.root):
        try:
            path = path.with_suffix(".py")
            changed = write_notebook(paired(path, path.with_suffix(".ipynb")), path.with_suffix(".ipynb"))
        except BookError as error:
            print(error, file=sys.stderr)
            return 1
        if changed:
            print(f"paired {path.stem}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
