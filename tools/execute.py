"""Execute the notebooks whose outputs are out of date, and store the outputs in them.

    python tools/execute.py                      what changed
    python tools/execute.py --all                everything
    python tools/execute.py chapters/02_group_normalization.py

A notebook is out of date when its code, a module of bitlib that it uses, or a file of data/ that it names changed
since it was executed. It is paired with its .py first. If a cell fails, the notebook stays as it was.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from book import ROOT, BookError, chapter_paths, clean_outputs, digest, own_cells, read_chapter
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from pair import paired, write_notebook

CELL_TIMEOUT = 600  # seconds; a whole chapter should take under three minutes


def out_of_date(path: Path, root: Path = ROOT) -> bool:
    notebook = path.with_suffix(".ipynb")
    if not notebook.exists():
        return True
    metadata = nbformat.read(notebook, as_version=4).metadata
    return metadata.get("bitlib", {}).get("executed") != digest(read_chapter(path), root)


def execute(path: Path, root: Path = ROOT) -> float:
    """Pair a chapter, run it from its first cell, store the outputs; returns the seconds it took.

    Raises BookError if a cell fails or warns; the notebook on disk is then left alone.
    """
    chapter = read_chapter(path)
    notebook = paired(path, chapter.notebook)
    mark = digest(chapter, root)
    # only a terminal needs a live progress bar; what is stored is the same either way
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    start = time.perf_counter()
    try:
        client.execute()
    except CellExecutionError as error:
        raise BookError(f"chapters/{path.name}: a cell fails:\n{error}") from None
    seconds = time.perf_counter() - start
    for cell, source in zip(own_cells(notebook), chapter.cells, strict=True):
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and output.name == "stderr" and "Warning:" in output.text:
                raise chapter.error(f"this cell warns; a reader would see:\n{output.text}", source.line)
    clean_outputs(notebook)
    notebook.metadata.setdefault("bitlib", nbformat.NotebookNode())["executed"] = mark
    notebook.metadata["language_info"] = nbformat.NotebookNode(name="python")
    write_notebook(notebook, chapter.notebook)
    return seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", type=Path, help="chapter sources; what changed by default")
    parser.add_argument("--all", action="store_true", help="execute every chapter")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    args = parser.parse_args(argv)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    paths = [path.with_suffix(".py").resolve() for path in args.chapters] or chapter_paths(args.root)
    failed = False
    for path in paths:
        try:
            if not args.all and not args.chapters and not out_of_date(path, args.root):
                continue
            print(f"{path.stem} ... ", end="", flush=True)
            print(f"{execute(path, args.root):.0f} s")
        except BookError as error:
            print(f"failed\n{error}", file=sys.stderr)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
