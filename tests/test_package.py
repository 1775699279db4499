"""The package as a reader gets it: what the wheel holds, and that importing it is light."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "bitlib").rglob("*.py")
)
# what `import bitlib.anything` must not pull in: the extras, and the tools of the book
HEAVY = {
    "matplotlib",
    "IPython",
    "jupyter",
    "ipykernel",
    "nbformat",
    "sklearn",
    "skimage",
    "scipy",
    "timm",
    "torchmetrics",
}
CORE = {"torch", "torchvision", "numpy", "PIL", "safetensors", "tqdm", "filelock", "typer", "bitlib"}
EXTRAS = {"matplotlib", "fontTools", "sklearn", "skimage", "timm", "torchmetrics"}
VTAB = {"tensorflow_datasets"}  # the extra `vtab`, for the real VTAB-1k


def test_wheel_holds_the_package_and_what_ships_with_it(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bitlib").rglob("*.py")}
    data = [path for path in (ROOT / "data").rglob("*") if path.is_file() and path.name != ".DS_Store"]
    shipped = {f"bitlib/shipped/{path.relative_to(ROOT / 'data').as_posix()}" for path in data}
    assert "bitlib/shipped/book.mplstyle" in shipped
    assert names == modules | shipped


def test_shipped_files_are_small():
    large = [path for path in (ROOT / "data").rglob("*") if path.is_file() and path.stat().st_size > 10 * 2**20]
    assert not large, f"larger than 10 MiB: {large}"


def fresh_import(modules: list[str], folder: Path) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after importing the modules in another folder."""
    code = (
        f"import sys, json, {', '.join(modules)}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_importing_everything_loads_no_plotting_and_no_notebook(tmp_path: Path):
    loaded = fresh_import([module for module in MODULES if not module.startswith("bitlib.checks")], tmp_path)
    assert "bitlib" in loaded
    assert not loaded & HEAVY, f"import bitlib pulls in {sorted(loaded & HEAVY)}"


def test_importing_bitlib_alone_loads_nothing(tmp_path: Path):
    loaded = fresh_import(["bitlib"], tmp_path)
    assert not loaded & (HEAVY | CORE - {"bitlib"})


@pytest.mark.parametrize("path", sorted((ROOT / "bitlib").rglob("*.py")), ids=lambda path: path.stem)
def test_imports_only_what_the_package_asks_for(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = {ast.Import: lambda n: [a.name for a in n.names], ast.ImportFrom: lambda n: [n.module or "bitlib"]}
        for name in names.get(type(node), lambda n: [])(node):
            package = name.split(".")[0]
            allowed = CORE | set(sys.stdlib_module_names) | (set() if id(node) in top else EXTRAS | VTAB)
            assert package in allowed, f"line {node.lineno} imports {package}"


def test_every_import_is_a_declared_dependency():
    distribution = {"PIL": "pillow", "fontTools": "fonttools", "sklearn": "scikit-learn", "skimage": "scikit-image"}
    core = " ".join(PROJECT["dependencies"])
    book = " ".join(PROJECT["optional-dependencies"]["book"])
    assert not [name for name in CORE - {"bitlib"} if f"{distribution.get(name, name)}>=" not in core]
    assert not [name for name in EXTRAS if f"{distribution.get(name, name)}>=" not in book]
    vtab = " ".join(PROJECT["optional-dependencies"]["vtab"])
    assert not [name for name in VTAB if f"{name.replace('_', '-')}>=" not in vtab]


def test_requirements_pin_every_dependency_exactly():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {name.lower().replace("_", "-") for name in pins}
    for requirement in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["book"]:
        assert requirement.split(">=")[0] in pinned, f"{requirement} is not pinned in requirements.txt"
    assert pins["torch"] == "2.14.1" and pins["torchvision"] == "0.29.1", "torch and torchvision change together"
    assert int(pins["jupyter-book"].split(".")[0]) < 2, "version 2 has no _config.yml"


def readme_example() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    return code


def test_readme_imports_names_that_exist():
    imports = [node for node in ast.parse(readme_example()).body if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(node.module)
        assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


@pytest.mark.slow
def test_readme_example_runs(tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", readme_example()], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rule, top1 = done.stdout.splitlines()
    assert rule == "500 160 128" and float(top1) > 0.9


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment_away_from_the_repository(installed: Path, tmp_path: Path):
    """Installed by pip into an environment of its own, which sees this one's torch; from an empty folder."""
    python = installed / "bin" / "python"
    folder = tmp_path / "empty"
    folder.mkdir()
    code = """
import bitlib, bitlib.finetune
from bitlib.data import shipped_file
style = shipped_file("book.mplstyle")
assert "env" in bitlib.__file__ and "env" in str(style), (bitlib.__file__, style)
assert "axes.prop_cycle" in style.read_text()
print("works")
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "works\n", done.stdout + done.stderr
