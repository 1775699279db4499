"""What `pytest --nbval` lets pass and what it does not, as conftest.py sets it up: it must be able to fail."""

import base64
import subprocess
import sys
import zlib
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent


def png(grey: int) -> str:
    """A picture of one pixel, base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (1).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes([0, grey]))) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def figure(grey: int, text: str = "<Figure size 768x432 with 1 Axes>") -> dict:
    return new_output("display_data", {"image/png": png(grey), "text/plain": text})


SHOW = f"""import base64
from IPython.display import publish_display_data
publish_display_data({{"image/png": "{png(0)}", "text/plain": "<Figure size 768x432 with 1 Axes>"}})"""
PRINTED = new_output("stream", name="stdout", text="loss 0.30\n")
# name: (source, stored outputs, whether the comparison should pass)
CASES = {
    "same number": ("print('loss 0.30')", [PRINTED], True),
    "another number": ("print('loss 0.31')", [PRINTED], False),
    "another result": ("0.31", [new_output("execute_result", {"text/plain": "0.3"}, execution_count=1)], False),
    "nothing stored": ("print('loss 0.30')", [], False),
    "nothing printed": ("pass", [PRINTED], False),
    "same picture": (SHOW, [figure(0)], True),
    "other pixels": (SHOW, [figure(255)], True),
    "other figure size": (SHOW, [figure(0, "<Figure size 640x480 with 2 Axes>")], True),
    "picture gone": ("pass", [figure(0)], False),
    "picture gone, text there": ("print('<Figure size 768x432 with 1 Axes>')", [figure(0)], False),
    "one picture more": (SHOW, [figure(0), figure(0)], False),
    "stderr": ("import sys; print('37%', file=sys.stderr)", [], True),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Every case as one cell of one notebook, run by pytest --nbval with the book's conftest.py."""
    folder = tmp_path_factory.mktemp("nbval")
    cells = [
        new_code_cell(source, outputs=outputs, execution_count=number)
        for number, (source, outputs, _) in enumerate(CASES.values(), start=1)
    ]
    nbformat.write(new_notebook(cells=cells), folder / "cases.ipynb")
    (folder / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (folder / "tests").mkdir()
    (folder / "tests" / "nbval_sanitize.cfg").write_text((ROOT / "tests" / "nbval_sanitize.cfg").read_text())
    command = [sys.executable, "-m", "pytest", "--nbval", "-rA", "--color=no", "--rootdir", ".", "cases.ipynb"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    passed = {name: f"PASSED cases.ipynb::Cell {number}\n" in done.stdout + "\n" for number, name in enumerate(CASES)}
    assert f"{sum(passed.values())} passed" in done.stdout, done.stdout + done.stderr
    return passed


@pytest.mark.parametrize("name", CASES)
def test_comparison(outcomes: dict[str, bool], name: str):
    assert outcomes[name] == CASES[name][2]
