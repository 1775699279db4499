"""Each notebook in a fresh environment, as in Colab: torch is there already, the set-up cell installs the rest.

An environment of its own, of the newest Python here for which torch is installed. It sees torch and what torch itself
needs from this one, as Colab has them; the set-up cell's own line, with the built wheel in place of the repository's
address, has to bring everything else. The notebooks then run in an empty folder, away from the repository.
Needs a package index; without one the tests skip and say so.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

import pytest
from book import ROOT, chapter_paths, read_chapter
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow
# Colab's own image has these; what they need comes along
PREINSTALLED = ("torch", "torchvision", "ipykernel", "pip")


def closure(names: tuple[str, ...]) -> set[str]:
    """The distributions installed here that these need, and those that they need, by name."""
    found: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(key)
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return found


def link_distribution(name: str, target: Path) -> None:
    """Make an installed distribution visible in another environment, by links to its top-level files."""
    distribution = importlib.metadata.distribution(name)
    here = Path(str(distribution.locate_file("")))
    tops = {Path(str(file)).parts[0] for file in distribution.files or () if not str(file).startswith("..")}
    for top in tops - {"__pycache__"}:
        source, link = here / top, target / top
        if source.exists() and not link.exists():
            link.symlink_to(source)


def site_packages(environment: Path) -> Path:
    (found,) = (environment / "lib").glob("python*/site-packages")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that the set-up cell's line has made ready."""
    environment = tmp_path_factory.mktemp("colab") / "env"
    venv.create(environment, symlinks=True)
    # beside the environment, not in it: pip leaves alone what lies outside
    target = environment.parent / "preinstalled"
    target.mkdir()
    (site_packages(environment) / "preinstalled.pth").write_text(f"{target}\n", encoding="utf-8")
    for name in sorted(closure(PREINSTALLED)):
        link_distribution(name, target)
    python = environment / "bin" / "python"
    run(python, "-c", "import torch, torchvision")
    missing = subprocess.run([python, "-c", "import sklearn"], capture_output=True)
    assert missing.returncode, "the environment is not fresh: it has scikit-learn already"
    done = subprocess.run(
        [python, "-m", "pip", "install", *options(wheel)], cwd=environment, capture_output=True, text=True, timeout=1200
    )
    if done.returncode and re.search(
        "No matching distribution|Could not find a version|Temporary failure", done.stderr
    ):
        pytest.skip("no package index here")
    assert done.returncode == 0, done.stdout + done.stderr
    return python


def options(wheel: Path) -> list[str]:
    """What the set-up cell gives pip, with the wheel in place of the repository."""
    (setup,) = read_chapter(chapter_paths()[1]).tagged("setup")
    line = re.search(r'"pip", \'install (.*)\'\)', setup.source)[1]
    option, requirement = re.fullmatch(r'(-q) "(.*)"', line).groups()
    assert requirement.startswith("bitlib[book] @ git+https://")
    return [option, "--disable-pip-version-check", f"bitlib[book] @ {wheel.as_uri()}"]


def run(python: Path, *arguments: str, folder: Path | None = None, timeout: int = 1800) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, env=clean, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_everything_imports_from_the_wheel_away_from_the_repository(python: Path, tmp_path: Path):
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "bitlib").rglob("[a-z]*.py")]
    code = f"import importlib; print([importlib.import_module(m).__file__ for m in {modules!r}])"
    files = run(python, "-c", code, folder=tmp_path)
    assert str(ROOT) not in files and str(python.parent.parent) in files


def test_only_the_declared_packages_were_installed(python: Path):
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"))
    names = {row["name"].lower() for row in listed}
    assert {"bitlib", "timm", "torchmetrics", "scikit-image"} <= names
    assert not names & {"jupyter-book", "pytest", "playwright"}


@pytest.mark.parametrize("path", chapter_paths(), ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(python: Path, path: Path, tmp_path: Path):
    """The cells in order, in one process, as Colab's kernel runs them."""
    shutil.copy(path.with_suffix(".ipynb"), tmp_path / "notebook.ipynb")
    (tmp_path / "run.py").write_text(RUNNER, encoding="utf-8")
    output = run(python, "run.py", folder=tmp_path)
    assert output.endswith("ran to the end\n")


# IPython without a kernel: magics and top-level await work, plots go nowhere
RUNNER = """
import json, os, sys
os.environ["MPLBACKEND"] = "Agg"
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
for number, cell in enumerate(json.load(open("notebook.ipynb"))["cells"], start=1):
    if cell["cell_type"] != "code":
        continue
    result = shell.run_cell("".join(cell["source"]))
    error = result.error_before_exec or result.error_in_exec
    if error and "raises-exception" not in cell["metadata"].get("tags", []):
        print(f"cell {number} fails: {error!r}", file=sys.stderr)
        sys.exit(1)
print("ran to the end")
"""
