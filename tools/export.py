"""Write bitlib/ from the chapters: every cell tagged `export` goes, verbatim, into the module its chapter names.

    python tools/export.py            write bitlib/
    python tools/export.py --check    write nothing; fail if bitlib/ is not what the chapters say

Cells tagged `check` (the checkers of the exercises) go into bitlib/checks/<module>.py in the same way.
The same chapters always give the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tomllib
from pathlib import Path

from book import ROOT, BookError, Cell, Chapter, bitlib_imports, parse, read_chapters

ALLOWED = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def module_source(chapter: Chapter, tag: str, allowed_imports: list[str], seen: dict[str, int]) -> str:
    """The text of one module from the cells of a chapter that have the tag.

    allowed_imports: the modules of bitlib that it may import. seen: names already defined in this module, with
    their lines; it is filled. Raises BookError at the first rule that a cell breaks.
    """
    bodies, public = [], []
    for index, cell in enumerate(chapter.tagged(tag)):
        if cell.kind != "code":
            raise chapter.error(f"a {cell.kind} cell is tagged `{tag}`; only code can be exported", cell.line)
        for node in parse(chapter, cell).body:
            check_statement(chapter, cell, node, tag, first=index == 0)
            for name in defined_names(node):
                line = cell.line + node.lineno - 1
                if name in seen:
                    raise chapter.error(
                        f"`{name}` is defined twice, first on line {seen[name]}; give one of them another name", line
                    )
                seen[name] = line
                if not name.startswith("_"):
                    public.append(name)
        for name, lineno in bitlib_imports(ast.parse(cell.source)):
            if name.split(".")[0] not in allowed_imports:
                raise chapter.error(
                    f"`bitlib.{name}` is not a module of an earlier chapter ({', '.join(allowed_imports) or 'none'}); "
                    "a chapter builds only on what stands before it",
                    cell.line + lineno - 1,
                )
        bodies.append(cell.source.strip("\n"))
    what = chapter.summary or f"From the chapter {chapter.path.stem}."
    if tag == "check":
        what = f"Checkers for the exercises of the chapter {chapter.path.stem}: hand each your own object."
    note = f"Exported from chapters/{chapter.path.name} by tools/export.py: edit the chapter, not this file."
    header = f'"""{what}\n\n{note}\n"""'
    names = "".join(f'    "{name}",\n' for name in public)
    text = f"{header}\n\n__all__ = [\n{names}]\n\n" + "\n\n\n".join(bodies) + "\n"
    if tag == "export" and chapter.entry:
        if chapter.entry not in seen:
            raise chapter.error(f"the header names the entry `{chapter.entry}`, which no exported cell defines", 1)
        text += f'\n\nif __name__ == "__main__":\n    {chapter.entry}()\n'
    return text


def check_statement(chapter: Chapter, cell: Cell, node: ast.stmt, tag: str, first: bool) -> None:
    line = cell.line + node.lineno - 1
    if isinstance(node, ast.Import | ast.ImportFrom) and not first:
        raise chapter.error(
            f"an import outside the chapter's first `{tag}` cell; move it there, so that a reader finds them together",
            line,
        )
    if not isinstance(node, ALLOWED):
        what = "a call" if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else "a statement"
        raise chapter.error(
            f"{what} at module level in an exported cell; only imports, definitions and constants are exported: "
            "move it to a cell of its own without the tag",
            line,
        )
    if isinstance(node, ast.Assign | ast.AnnAssign):
        for part in ast.walk(node):
            if isinstance(part, ast.Call):
                raise chapter.error(
                    "a call at module level in an exported cell: a constant must be a literal; "
                    "compute it in a function, or move the cell out of the export",
                    cell.line + part.lineno - 1,
                )
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if not all(isinstance(target, ast.Name) for target in targets):
            raise chapter.error("an exported constant must be assigned to a plain name", line)


def defined_names(node: ast.stmt) -> list[str]:
    """The names that a module-level statement defines; names it only imports do not count."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def package_files(root: Path = ROOT) -> dict[str, str]:
    """Every file of bitlib/ as the chapters define it: path below bitlib/ -> text."""
    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    files: dict[str, str] = {}
    earlier: list[str] = []
    listing = []
    for chapter in read_chapters(root):
        module = chapter.module
        if module is None:
            for cell in chapter.tagged("export")[:1]:
                raise chapter.error("a cell is tagged `export`, but the header names no module", cell.line)
            for cell in chapter.tagged("check")[:1]:
                if chapter.checks is None:
                    raise chapter.error(
                        "a cell is tagged `check`, but the header names no module; give it `checks: NAME`", cell.line
                    )
                files[f"checks/{chapter.checks}.py"] = module_source(chapter, "check", earlier, {})
            continue
        if f"{module}.py" in files:
            raise chapter.error(f"the module `{module}` is already exported by an earlier chapter", 1)
        if not chapter.tagged("export"):
            raise chapter.error(f"the header names the module `{module}`, but no cell is tagged `export`", 1)
        files[f"{module}.py"] = module_source(chapter, "export", earlier, {})
        earlier = [*earlier, module]
        if chapter.tagged("check"):
            files[f"checks/{chapter.checks}.py"] = module_source(chapter, "check", earlier, {})
        listing.append(f"- {module}: {chapter.summary}")
    about = "Big Transfer (BiT) from scratch: the package that the book derives, one module a chapter, in their order."
    note = "Written by tools/export.py from the chapters: edit those, not this package."
    modules = "\n".join(listing)
    files["__init__.py"] = f'"""{about}\n\n{modules}\n\n{note}\n"""\n\n__version__ = "{version}"\n'
    files["checks/__init__.py"] = f'"""Checkers for the exercises, one module a chapter.\n\n{note}\n"""\n'
    return files


def differences(files: dict[str, str], package: Path) -> list[str]:
    """What is not as it should be in a package folder, one line for each file."""
    found = {str(path.relative_to(package)) for path in package.rglob("*.py")} if package.exists() else set()
    problems = [f"bitlib/{name} comes from no chapter" for name in sorted(found - files.keys())]
    for name, text in files.items():
        path = package / name
        if not path.exists():
            problems.append(f"bitlib/{name} is missing")
        elif path.read_bytes() != text.encode():
            problems.append(f"bitlib/{name} is not what its chapter exports")
    return problems


def write(files: dict[str, str], package: Path) -> list[str]:
    """Make a package folder hold exactly these modules; returns the names of those that changed."""
    changed = []
    for path in package.rglob("*.py"):
        if str(path.relative_to(package)) not in files:
            path.unlink()
            changed.append(str(path.relative_to(package)))
    for name, text in files.items():
        path = package / name
        if not path.exists() or path.read_bytes() != text.encode():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
            changed.append(name)
    return changed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if bitlib/ is out of date")
    parser.add_argument("--out", type=Path, help="write to this folder instead of bitlib/")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    args = parser.parse_args(argv)
    package = args.out or args.root / "bitlib"
    try:
        files = package_files(args.root)
    except BookError as error:
        print(error, file=sys.stderr)
        return 1
    if args.check:
        problems = differences(files, package)
        for problem in problems:
            print(f"{problem}; run `make export`", file=sys.stderr)
        return 1 if problems else 0
    changed = write(files, package)
    print(f"{len(files)} files in {package.name}/, {len(changed)} changed" + "".join(f"\n  {name}" for name in changed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
