"""The tools that export, pair, execute, stamp and check the book, fed with what they must refuse."""

import subprocess
import sys
from pathlib import Path

import check
import execute
import export
import nbformat
import pair
import pytest
import stamp
from book import BookError, digest, read_chapter

URL = "https://github.com/OWNER/REPOSITORY"
HEADER = """\
# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   bitlib:
#     module: {module}
#     summary: About {module}.
# ---

# %% [markdown]
# # A chapter on {module}

# %% tags=["setup", "remove-cell"]
import sys

if "google.colab" in sys.modules:
    print("bitlib[book] @ git+{url}")
"""
NORM = """
# %% tags=["export"]
import math

LIMIT = 3


# %% [markdown]
# A sentence.

# %% tags=["export"]
def root(x: float) -> float:
    return math.sqrt(x)


# %%
print(round(root(2.0), 4))
"""
CONV = """
# %% tags=["export"]
from bitlib.norm import root


# %% tags=["export"]
def twice(x: float) -> float:
    return 2 * root(x)


# %%
twice(4.0)
"""


class Project:
    """A small book in a temporary folder."""

    def __init__(self, root: Path):
        self.root = root
        (root / "chapters").mkdir()
        (root / "data").mkdir()
        (root / "pyproject.toml").write_text('[project]\nname = "bitlib"\nversion = "1.2.3"\n')
        (root / "_config.yml").write_text(f"repository:\n  url: {URL}\n")

    def chapter(self, name: str, body: str, module: str | None = None) -> Path:
        path = self.root / "chapters" / f"{name}.py"
        path.write_text(HEADER.format(module=module or name[3:], url=URL) + body)
        return path

    def line(self, path: Path, text: str) -> int:
        """The line of a chapter on which a text stands."""
        return next(n for n, line in enumerate(path.read_text().splitlines(), start=1) if text in line)

    def problems(self, path: Path) -> list[str]:
        chapter = read_chapter(path)
        return check.check_source(chapter, self.root) + check.check_notebook(chapter, self.root)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def refused(project: Project, path: Path, *expected: str) -> None:
    with pytest.raises(BookError) as error:
        export.package_files(project.root)
    for text in (path.name, *expected):
        assert text in str(error.value)


# --- export -----------------------------------------------------------------------------------------------------


def test_export_copies_cells_verbatim_and_in_order(project):
    project.chapter("01_norm", NORM)
    project.chapter("02_conv", CONV)
    files = export.package_files(project.root)
    assert files["norm.py"] == (
        '"""About norm.\n\n'
        'Exported from chapters/01_norm.py by tools/export.py: edit the chapter, not this file.\n"""\n'
        '\n__all__ = [\n    "LIMIT",\n    "root",\n]\n\n'
        "import math\n\nLIMIT = 3\n\n\ndef root(x: float) -> float:\n    return math.sqrt(x)\n"
    )
    assert '__version__ = "1.2.3"' in files["__init__.py"]
    assert "print" not in files["norm.py"]


def test_exported_package_imports(project):
    project.chapter("01_norm", NORM)
    project.chapter("02_conv", CONV)
    assert export.main(["--root", str(project.root)]) == 0
    code = "import bitlib.conv; print(bitlib.conv.twice(4.0))"
    run = subprocess.run([sys.executable, "-c", code], cwd=project.root, capture_output=True, text=True, check=True)
    assert run.stdout == "4.0\n"


def test_export_is_the_same_every_time_and_check_sees_a_change(project):
    path = project.chapter("01_norm", NORM)
    arguments = ["--root", str(project.root)]
    assert export.main([*arguments, "--check"]) == 1
    assert export.main(arguments) == 0
    first = (project.root / "bitlib/norm.py").read_bytes()
    assert export.main(arguments) == 0
    assert (project.root / "bitlib/norm.py").read_bytes() == first
    assert export.main([*arguments, "--check"]) == 0
    path.write_text(path.read_text().replace("LIMIT = 3", "LIMIT = 4"))
    assert export.main([*arguments, "--check"]) == 1
    stray = project.root / "bitlib/stray.py"
    assert export.main(arguments) == 0
    stray.write_text("x = 1\n")
    assert export.main([*arguments, "--check"]) == 1
    assert export.main(arguments) == 0
    assert not stray.exists()


def test_entry_becomes_a_main_guard(project):
    path = project.chapter("01_norm", NORM)
    path.write_text(path.read_text().replace("#     module: norm\n", "#     module: norm\n#     entry: root\n"))
    assert export.package_files(project.root)["norm.py"].endswith('\n\nif __name__ == "__main__":\n    root()\n')
    path.write_text(path.read_text().replace("entry: root", "entry: start"))
    refused(project, path, "start")


def test_magic_in_an_exported_cell_is_refused(project):
    path = project.chapter("01_norm", NORM + '\n# %% tags=["export"]\n# %time\ny = 1\n')
    refused(project, path, f":{project.line(path, '# %time')}", "magic", "not exported")


@pytest.mark.parametrize(
    ("statement", "word"),
    [
        ("print(1)", "call"),
        ("X = math.sqrt(2)", "literal"),
        ("for i in range(3):\n    pass", "statement"),
        ("if True:\n    y = 1", "statement"),
        ("LIMITS.x = 3", "plain name"),
    ],
)
def test_a_statement_with_an_effect_is_refused(project, statement, word):
    path = project.chapter("01_norm", NORM + f'\n# %% tags=["export"]\n{statement}\n')
    refused(project, path, f":{project.line(path, statement.splitlines()[0])}:", word)


def test_a_duplicate_name_is_refused(project):
    path = project.chapter("01_norm", NORM + '\n# %% tags=["export"]\ndef root(y):\n    return y\n')
    refused(project, path, f":{project.line(path, 'def root(y)')}:", "`root` is defined twice")


def test_an_import_outside_the_first_exported_cell_is_refused(project):
    path = project.chapter("01_norm", NORM + '\n# %% tags=["export"]\nimport os\n')
    refused(project, path, f":{project.line(path, 'import os')}:", "first `export` cell")


@pytest.mark.parametrize(
    "statement", ["from bitlib.conv import twice", "import bitlib.conv", "from bitlib import conv"]
)
def test_an_import_of_a_later_chapter_is_refused(project, statement):
    path = project.chapter("01_norm", NORM.replace("import math", f"import math\n{statement}"))
    project.chapter("02_conv", CONV)
    refused(project, path, f":{project.line(path, statement)}:", "earlier chapter")


def test_a_hidden_import_of_a_later_chapter_is_refused(project):
    body = NORM.replace("    return math", "    from bitlib.conv import twice\n    return twice and math")
    path = project.chapter("01_norm", body)
    project.chapter("02_conv", CONV)
    refused(project, path, f":{project.line(path, 'from bitlib.conv')}:", "earlier chapter")


def test_a_cell_that_does_not_parse_is_refused(project):
    path = project.chapter("01_norm", NORM + '\n# %% tags=["export"]\ndef broken(:\n    pass\n')
    refused(project, path, f":{project.line(path, 'def broken')}:", "does not parse")


def test_a_module_exported_twice_or_never_is_refused(project):
    project.chapter("01_norm", NORM)
    path = project.chapter("02_norm_again", NORM, module="norm")
    refused(project, path, "already exported")
    path.write_text(path.read_text().replace("module: norm", "module: other").replace(' tags=["export"]', ""))
    refused(project, path, "no cell is tagged `export`")


def test_checkers_are_exported_beside_the_modules(project):
    checker = "from bitlib.norm import root\n\n\ndef check_root(f):\n    assert f(4.0) == root(4.0)\n"
    body = NORM + '\n# %% tags=["check", "hide-cell"]\n' + checker
    project.chapter("01_norm", body)
    files = export.package_files(project.root)
    assert "def check_root" in files["checks/norm.py"]
    assert "check_root" not in files["norm.py"]


# --- pair, execute, check ---------------------------------------------------------------------------------------


@pytest.fixture
def executed(project) -> tuple[Project, Path]:
    """A project whose one chapter was exported and executed."""
    path = project.chapter("01_norm", NORM)
    export.main(["--root", str(project.root)])
    execute.execute(path, project.root)
    assert project.problems(path) == []
    return project, path


def test_executing_stores_outputs_without_what_is_volatile(executed):
    _, path = executed
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert notebook.cells[-1].outputs[0].text == "1.4142\n"
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == [1, 2, 3, 4]
    assert "execution" not in notebook.cells[-1].metadata
    assert "version" not in notebook.metadata.language_info


def test_pairing_twice_gives_the_same_bytes_and_keeps_ids_and_outputs(executed):
    project, path = executed
    notebook = path.with_suffix(".ipynb")
    before = notebook.read_bytes()
    assert pair.main(["--root", str(project.root)]) == 0
    assert notebook.read_bytes() == before
    ids = [cell.id for cell in nbformat.read(notebook, as_version=4).cells]
    path.write_text(path.read_text().replace("# A sentence.", "# Another sentence."))
    assert pair.main(["--root", str(project.root)]) == 0
    after = nbformat.read(notebook, as_version=4)
    assert after.cells[-1].outputs
    assert sum(one != two for one, two in zip(ids, [cell.id for cell in after.cells], strict=True)) <= 1


def test_a_newer_notebook_never_overwrites_its_source(executed):
    project, path = executed
    source = path.read_text()
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    notebook.cells[-1].source = "print('edited by hand')"
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    pair.main(["--root", str(project.root)])
    assert path.read_text() == source
    assert nbformat.read(path.with_suffix(".ipynb"), as_version=4).cells[-1].source == "print(round(root(2.0), 4))"


def test_a_notebook_that_differs_from_its_source_is_reported(executed):
    project, path = executed
    path.write_text(path.read_text().replace("print(round(root(2.0), 4))", "print(round(root(2.0), 5))"))
    (problem,) = project.problems(path)
    assert f"{path.name}:{project.line(path, 'print(round')}:" in problem and "make notebooks" in problem


def test_a_notebook_whose_tags_differ_is_reported(executed):
    project, path = executed
    text = path.read_text().replace("# %%\nprint", '# %% tags=["hide-input"]\nprint')
    path.write_text(text)
    assert any("differs from the .py" in problem for problem in project.problems(path))


def test_a_notebook_with_other_hints_is_reported(executed):
    project, path = executed
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    notebook.cells.append(nbformat.v4.new_markdown_cell("Look at the sky.", metadata={"tags": ["hint"]}))
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    (problem,) = project.problems(path)
    assert "hints are not those of the .yml" in problem and "make notebooks" in problem


def test_a_notebook_with_stripped_outputs_is_reported(executed):
    project, path = executed
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    problems = project.problems(path)
    assert len(problems) == 4
    assert all("never executed" in problem and "make notebooks" in problem for problem in problems)
    assert f":{project.line(path, 'print(round')}:" in problems[-1]


def test_a_missing_notebook_is_reported(project):
    path = project.chapter("01_norm", NORM)
    (problem,) = project.problems(path)
    assert "no notebook" in problem and "make notebooks" in problem


def test_outputs_older_than_a_module_they_use_are_reported(project):
    project.chapter("01_norm", NORM)
    path = project.chapter("02_conv", CONV)
    export.main(["--root", str(project.root)])
    before = digest(read_chapter(path), project.root)
    module = project.root / "bitlib/norm.py"
    module.write_text(module.read_text() + "\n# changed\n")
    assert digest(read_chapter(path), project.root) != before


def test_a_failing_cell_leaves_the_notebook_alone(executed):
    project, path = executed
    before = path.with_suffix(".ipynb").read_bytes()
    path.write_text(path.read_text() + "\n# %%\nassert 1 + 1 == 3\n")
    with pytest.raises(BookError, match="AssertionError"):
        execute.execute(path, project.root)
    assert path.with_suffix(".ipynb").read_bytes() == before


def test_a_cell_that_warns_is_refused(executed):
    project, path = executed
    path.write_text(path.read_text() + "\n# %%\nimport warnings\n\nwarnings.warn('mind the gap')\n")
    with pytest.raises(BookError, match="mind the gap"):
        execute.execute(path, project.root)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('\n# %% tags=["nbval-ignore-output"]\nx = 1\n', "must assert"),
        ("\n# %% [markdown]\n# # Another title\n", "one '# ' title"),
        ('\n# %% tags=["exprot"]\nx = 1\n', "unknown tag `exprot`"),
        ('\n# %% tags=["exercise"]\nf = None\n# check_f(f)\n', "without a solution"),
        ('\n# %% tags=["exercise"]\nf = None\n\n# %% tags=["solution"]\nf = abs\n', "commented out"),
    ],
)
def test_a_source_that_breaks_a_rule_is_reported(project, body, message):
    path = project.chapter("01_norm", NORM + body)
    problems = check.check_source(read_chapter(path), project.root)
    assert any(message in problem and path.name in problem for problem in problems)


def test_too_many_uncompared_cells_are_reported(project):
    body = "".join(f'\n# %% tags=["nbval-ignore-output"]\nx = {i}\n\n# %%\nassert x == {i}\n' for i in range(5))
    path = project.chapter("01_norm", NORM + body)
    assert any("one in five" in problem for problem in check.check_source(read_chapter(path), project.root))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (nbformat.v4.new_output("stream", text="saved to /home/me/run/model.safetensors\n"), "/home/me/run"),
        (nbformat.v4.new_output("stream", text="<object at 0x7f0123456789>\n"), "0x7f0123456789"),
        (nbformat.v4.new_output("display_data", data={"image/png": "AAAA"}), "alt text"),
        (nbformat.v4.new_output("error", ename="ValueError", evalue="no"), "fails"),
    ],
)
def test_an_output_that_no_other_machine_gives_is_reported(executed, output, message):
    project, path = executed
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    notebook.cells[-1].outputs.append(output)
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    (problem,) = project.problems(path)
    assert message in problem and f":{project.line(path, 'print(round')}:" in problem


def test_text_before_the_first_marker_is_refused(project):
    path = project.chapter("01_norm", NORM)
    path.write_text(path.read_text().replace("# %% [markdown]\n# # A", "x = 1\n\n# %% [markdown]\n# # A"))
    with pytest.raises(BookError, match="marker"):
        read_chapter(path)


# --- stamp ------------------------------------------------------------------------------------------------------


def test_stamp_brings_the_address_into_every_chapter(project):
    path = project.chapter("01_norm", NORM)
    arguments = ["--root", str(project.root)]
    assert stamp.main([*arguments, "--check"]) == 0
    (project.root / "_config.yml").write_text("repository:\n  url: https://example.org/a/b/\n")
    assert stamp.main([*arguments, "--check"]) == 1
    assert any("another address" in problem for problem in check.check_source(read_chapter(path), project.root))
    assert stamp.main(arguments) == 0
    assert 'git+https://example.org/a/b"' in path.read_text()
    assert stamp.main([*arguments, "--check"]) == 0
