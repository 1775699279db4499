"""What the other tools share: where the chapters are, how to read one, and how to say what is wrong with it."""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import jupytext
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"^# %%(?!%)")


class BookError(Exception):
    """Something in a chapter breaks a rule of the book. The message names the place and what to do."""


@dataclass(frozen=True)
class Cell:
    """One cell of a chapter: its kind ("code" or "markdown"), source, tags, and the line its source starts at."""

    kind: str
    source: str
    tags: tuple[str, ...]
    line: int

    def has(self, tag: str) -> bool:
        return tag in self.tags


@dataclass(frozen=True)
class Chapter:
    """A chapter's source file, read."""

    path: Path
    module: str | None  # the module of bitlib that it exports, or None
    summary: str
    entry: str | None  # the function that `python -m bitlib.<module>` calls
    checks: str | None  # the module of bitlib.checks that its checkers go to: its module's name, or one of its own
    cells: tuple[Cell, ...]

    @property
    def notebook(self) -> Path:
        return self.path.with_suffix(".ipynb")

    def tagged(self, tag: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.has(tag)]

    def code(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == "code"]

    def error(self, message: str, line: int | None = None) -> BookError:
        place = f"chapters/{self.path.name}" + (f":{line}" if line is not None else "")
        return BookError(f"{place}: {message}")


def chapter_paths(root: Path = ROOT) -> list[Path]:
    return sorted((root / "chapters").glob("[0-9][0-9]_*.py"))


def read_chapter(path: Path) -> Chapter:
    """Read a py:percent chapter. Raises BookError where its cells cannot be told apart."""
    text = path.read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    header = notebook.metadata.get("bitlib", {})
    lines = [number for number, line in enumerate(text.splitlines(), start=1) if MARKER.match(line)]
    if len(lines) != len(notebook.cells):
        raise BookError(
            f"chapters/{path.name}: {len(notebook.cells)} cells but {len(lines)} '# %%' markers; "
            "start every cell, the first one too, with a marker in the first column"
        )
    cells = tuple(
        Cell(
            kind=cell.cell_type,
            source=cell.source,
            tags=tuple(cell.metadata.get("tags", ())),
            # the source of a code cell begins on the line after its marker
            line=line + 1,
        )
        for cell, line in zip(notebook.cells, lines, strict=True)
    )
    module = header.get("module")
    checks = header.get("checks", module)
    return Chapter(path, module, header.get("summary", ""), header.get("entry"), checks, cells)


def read_chapters(root: Path = ROOT) -> list[Chapter]:
    return [read_chapter(path) for path in chapter_paths(root)]


def parse(chapter: Chapter, cell: Cell) -> ast.Module:
    """The syntax tree of a code cell, or a BookError that names the line."""
    for offset, line in enumerate(cell.source.splitlines()):
        if line.lstrip().startswith(("%", "!")):
            raise chapter.error(
                f"a magic or shell line in an exported cell: {line.strip()!r}; move it to a cell that is not exported",
                cell.line + offset,
            )
    try:
        return ast.parse(cell.source)
    except SyntaxError as error:
        raise chapter.error(f"this cell does not parse: {error.msg}", cell.line + (error.lineno or 1) - 1) from None


def bitlib_imports(tree: ast.AST) -> list[tuple[str, int]]:
    """Every module of bitlib that the tree imports, anywhere in it, with the line: [("norm", 3), ...]."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                names = ["bitlib." + (node.module or alias.name) for alias in node.names]
            elif node.module == "bitlib":
                names = [f"bitlib.{alias.name}" for alias in node.names]
            else:
                names = [node.module or ""]
        else:
            continue
        found += [(name.removeprefix("bitlib."), node.lineno) for name in names if name.startswith("bitlib.")]
    return found


def imported_modules(chapter: Chapter) -> set[str]:
    """The modules of bitlib that any code cell of the chapter imports; cells with magics are read leniently."""
    found: set[str] = set()
    for cell in chapter.code():
        lines = [line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        try:
            found |= {name.split(".")[0] for name, _ in bitlib_imports(ast.parse("\n".join(lines)))}
        except SyntaxError:
            continue
    return found


def digest(chapter: Chapter, root: Path = ROOT) -> str:
    """A hash of all that the outputs of a chapter follow from, so far as files of the project go.

    That is its code cells, every module of bitlib that it imports (and those that they import), and every file
    under data/ whose name, or name without its ending, stands in the chapter or in one of those modules.
    """
    sources = [cell.source + "\0" + " ".join(cell.tags) for cell in chapter.code()]
    seen: set[str] = set()
    queue = sorted(imported_modules(chapter) - {"checks"})
    while queue:
        name = queue.pop(0)
        path = root / "bitlib" / f"{name}.py"
        if name in seen or not path.exists():
            continue
        seen.add(name)
        sources.append(path.read_text(encoding="utf-8"))
        queue += sorted({other.split(".")[0] for other, _ in bitlib_imports(ast.parse(sources[-1]))})
    text = "\0".join(sources)
    state = hashlib.sha256(text.encode())
    for path in sorted(path for path in (root / "data").rglob("*") if path.is_file()):
        if path.suffix != ".md" and (path.name in text or f'"{path.stem}"' in text):
            state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()


def own_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """A notebook's cells but the hints, which pairing adds: one for each cell of the .py."""
    return [cell for cell in notebook.cells if "hint" not in cell.metadata.get("tags", ())]


def clean_outputs(notebook: NotebookNode) -> None:
    """Take out of an executed notebook what changes from run to run without meaning anything."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        outputs: list[NotebookNode] = []
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name == "stderr":  # progress bars
                    continue
                if outputs and outputs[-1].output_type == "stream":
                    outputs[-1].text += output.text
                    continue
            if "metadata" in output:
                output.metadata = NotebookNode()
            outputs.append(output)
        cell.outputs = outputs
