"""Measure how long each chapter runs and how much memory it takes, for the status page.

    python tools/status.py [chapters/02_group_normalization.py ...]

Executes the chapters one after another, each in a fresh kernel, and writes data/results/status.json. The notebooks stay
as they are. Measure on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
from book import ROOT, BookError, chapter_paths
from execute import CELL_TIMEOUT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell
from pair import paired

OUT = ROOT / "data" / "results" / "status.json"
# the kernel's largest resident size so far, in KiB
PEAK = (
    "import re, resource, pathlib\n"
    "_status = pathlib.Path('/proc/self/status')\n"
    "print(int(re.search(r'VmHWM:\\s+(\\d+)', _status.read_text())[1]) if _status.exists()\n"
    "      else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
)


def measure(path: Path) -> dict[str, float | int]:
    """Run a chapter from its first cell; gives its seconds, without the kernel's start, and its peak memory in MiB."""
    notebook = paired(path, path.with_suffix(".ipynb"))
    notebook.cells.append(new_code_cell(PEAK))
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources=resources)
    start = time.perf_counter()
    try:
        with client.setup_kernel():
            start = time.perf_counter()
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
            seconds = time.perf_counter() - start
    except CellExecutionError as error:
        raise BookError(f"chapters/{path.name}: a cell fails:\n{error}") from None
    return {"seconds": round(seconds, 1), "peak_mib": round(int(notebook.cells[-1].outputs[0].text) / 1024)}


def machine() -> dict[str, str | int]:
    return {
        "processor": processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.machine()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", type=Path, help="chapter sources; all of them by default")
    parser.add_argument("--out", type=Path, default=OUT, help="the file to write")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    args = parser.parse_args(argv)
    known = json.loads(args.out.read_text(encoding="utf-8"))["chapters"] if args.out.exists() else {}
    names = {path.stem for path in chapter_paths(args.root)}
    runs = {name: run for name, run in known.items() if name in names}
    for path in [path.with_suffix(".py").resolve() for path in args.chapters] or chapter_paths(args.root):
        print(f"{path.stem} ... ", end="", flush=True)
        try:
            runs[path.stem] = measure(path)
        except BookError as error:
            print(f"failed\n{error}", file=sys.stderr)
            return 1
        print("{seconds} s, {peak_mib} MiB".format(**runs[path.stem]))
        result = {
            "command": "python tools/status.py",
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "chapters": dict(sorted(runs.items())),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
