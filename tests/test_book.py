"""The book keeps its own rules: modules are what the chapters export, notebooks are what the chapters say."""

import ast
import os
import re
import subprocess
import sys

import check
import export
import nbformat
import pytest
import stamp
from book import ROOT, bitlib_imports, chapter_paths, read_chapter, read_chapters

CHAPTERS = {path.stem: path for path in chapter_paths()}


def test_bitlib_is_exactly_what_the_chapters_export(tmp_path):
    files = export.package_files()
    export.write(files, tmp_path / "bitlib")
    for name in files:
        assert (tmp_path / "bitlib" / name).read_bytes() == (ROOT / "bitlib" / name).read_bytes(), "run `make export`"
    assert export.differences(files, ROOT / "bitlib") == []


def test_the_exported_package_imports_in_a_fresh_process(tmp_path):
    files = export.package_files()
    export.write(files, tmp_path / "bitlib")
    names = sorted("bitlib." + name.removesuffix(".py").replace("/", ".") for name in files if "__init__" not in name)
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n    importlib.import_module(name)\n"
        "print(sys.modules['bitlib'].__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path))


def test_one_chapter_one_module_and_only_backwards():
    order = [chapter.module for chapter in read_chapters() if chapter.module]
    assert len(order) == len(set(order))
    for index, module in enumerate(order):
        tree = ast.parse((ROOT / "bitlib" / f"{module}.py").read_text(encoding="utf-8"))
        for name, _ in bitlib_imports(tree):
            assert name in order[:index], f"bitlib.{module} imports bitlib.{name}"


def test_a_changed_exported_line_is_noticed(tmp_path):
    """The check above can fail: an edit of any chapter's exported code shows in the package."""
    files = export.package_files()
    for chapter in read_chapters():
        if not chapter.module:
            continue
        cell = chapter.tagged("export")[-1]
        for name in ("chapters", "data"):
            (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        for path in chapter_paths():
            (tmp_path / "chapters" / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        lines = chapter.path.read_text(encoding="utf-8").splitlines()
        lines.insert(cell.line - 1, "CHANGED = True")
        (tmp_path / "chapters" / chapter.path.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        changed = export.package_files(tmp_path)
        assert [name for name in files if files[name] != changed[name]] == [f"{chapter.module}.py"]


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_keeps_the_rules(name):
    chapter = read_chapter(CHAPTERS[name])
    assert check.check_source(chapter) == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_notebook_is_what_the_chapter_says(name):
    chapter = read_chapter(CHAPTERS[name])
    assert check.check_notebook(chapter) == []


def test_the_repository_address_stands_in_one_place():
    assert stamp.main(["--check"]) == 0
    url = stamp.address()
    for chapter in read_chapters():
        (setup,) = chapter.tagged("setup")
        assert f"git+{url}" in setup.source
        notebook = nbformat.read(chapter.notebook, as_version=4)
        assert any(f"git+{url}" in cell.source for cell in notebook.cells)


def test_every_chapter_is_in_the_table_of_contents():
    toc = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    assert re.findall(r"file: chapters/(\w+)", toc) == list(CHAPTERS)


@pytest.mark.parametrize("name", CHAPTERS)
def test_exercises_refuse_the_stub_and_accept_the_solution(name):
    chapter = read_chapter(CHAPTERS[name])
    exercises = chapter.tagged("exercise")
    assert len(exercises) >= 3, "every chapter has at least three exercises"
    code = chapter.code()
    namespace = {}
    if chapter.module:
        exec(f"from bitlib.{chapter.module} import *", namespace)
    exec(f"from bitlib.checks.{chapter.checks} import *", namespace)
    # names that the chapter itself imports are there for the reader, so they are there for the stub too
    for cell in code:
        for node in ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", cell.source)).body:
            if isinstance(node, ast.Import | ast.ImportFrom) and not cell.has("check"):
                exec(ast.unparse(node), namespace)
    for cell in exercises:
        stub = dict(namespace)
        exec(cell.source, stub)
        call = cell.source.splitlines()[-1].removeprefix("# ")
        with pytest.raises((AssertionError, NotImplementedError)) as error:
            exec(call, stub)
        assert len(str(error.value)) > 20, f"{call} says too little to a reader whose answer is wrong"
        solved = dict(namespace)
        exec(code[code.index(cell) + 1].source, solved)
        exec(call, solved)
