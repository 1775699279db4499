"""What tests share: a server of the built site, one browser, the built wheel, and an environment that holds it."""

import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from book import ROOT
from playwright.sync_api import Browser, sync_playwright
from screenshots import SITE, launch, served


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address of the built site, served on this machine."""
    with served(SITE) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's wheel, built once."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """The folder of an environment into which pip put the wheel; it sees this one's torch, and no repository."""
    environment = tmp_path / "env"
    venv.create(environment, with_pip=True, symlinks=True)
    python = environment / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    (site_packages,) = (environment / "lib").glob("python*/site-packages")
    (here,) = {path for path in sys.path if path.endswith("site-packages")}
    (site_packages / "packages.pth").write_text(here)
    return environment
