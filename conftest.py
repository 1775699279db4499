"""How `pytest --nbval` compares notebooks: every output, except what may differ without meaning anything."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent
NBVAL_DEFAULT_TIMEOUT = 2000
CELL_TIMEOUT = 600  # seconds; a busy machine may need several times what a quiet one does


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if not (getattr(option, "nbval", False) or getattr(option, "nbval_lax", False)):
        return
    if not option.nbval_kernel_name:
        option.nbval_current_env = True
    option.nbval_sanitize_with = option.nbval_sanitize_with or str(ROOT / "tests" / "nbval_sanitize.cfg")
    if option.nbval_cell_timeout == NBVAL_DEFAULT_TIMEOUT:
        option.nbval_cell_timeout = CELL_TIMEOUT


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Compare that a figure is there, which nbval leaves out; do not compare stderr (progress bars)."""
    if type(collector).__name__ == "IPyNbFile":
        # the sanitize file reduces a picture to one word, so that comparing pictures compares their number
        kept = set(collector.skip_compare) - {"image/png", "image/jpeg"}
        collector.skip_compare = (*sorted(kept), "stderr")
