"""A Sphinx extension for what _config.yml cannot say: header, dead buttons, folds, names of buttons, and MathJax."""

from __future__ import annotations

import filecmp
import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ExtensionError

PLACEHOLDER = "OWNER/REPOSITORY"
BUTTONS = ("use_repository_button", "use_issues_button", "use_edit_page_button", "use_source_button")
FOLDED = {"solution": "the solution", "check": "the checker"}  # tag -> what it holds
# MathJax's combined component for TeX in, HTML out; the other files are those that it loads on demand.
MATHJAX = "mathjax/tex-chtml.js"
MATHJAX_FILES = (
    "tex-chtml.js",
    "a11y/*.js",
    "input/tex/extensions/*.js",
    "output/chtml/fonts/woff-v2/*.woff",
    "sre/mathmaps/base.json",
    "sre/mathmaps/en.json",
)


def hide_dead_buttons(app: Sphinx, config: Config) -> None:
    """Take away every button that leads to the repository, as long as its address is the placeholder."""
    options: dict[str, Any] = config.html_theme_options
    if PLACEHOLDER in options.get("repository_url", PLACEHOLDER):
        options.pop("repository_url", None)
        options["launch_buttons"] = {}
        options.update(dict.fromkeys(BUTTONS, False))


def set_header(app: Sphinx, config: Config) -> None:
    """The title beside the logo, and one search field, in the side bar, rather than two."""
    config.html_theme_options["logo"] = {"text": config.html_title}
    config.html_theme_options.setdefault("navbar_persistent", [])
    config.html_context.setdefault("default_mode", "auto")  # light or dark, as the reader's system has it


def use_local_mathjax(app: Sphinx, config: Config) -> None:
    config.mathjax_path = MATHJAX


def copy_mathjax(app: Sphinx) -> None:
    """Put MathJax beside the pages, so that equations need no network."""
    if app.builder.format != "html":
        return
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise ExtensionError("sphinx-mathjax-offline is not installed; `make` installs it from requirements.txt")
    source = Path(spec.origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    for path in sorted(path for pattern in MATHJAX_FILES for path in source.glob(pattern)):
        copy = target / path.relative_to(source)
        if not copy.exists() or not filecmp.cmp(path, copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def name_folded_cells(app: Sphinx, doctree: nodes.document) -> None:
    """Say what is folded away: "Show the solution" rather than "Show code cell source"."""
    for cell in doctree.findall(nodes.container):
        for tag, name in FOLDED.items():
            if f"tag_{tag}" in cell.get("classes", []) and "hide_mode" in cell:
                if tag == "check" and "def check_" not in cell.astext():
                    name = "what the checkers need"
                cell["prompt_show"], cell["prompt_hide"] = f"Show {name}", f"Hide {name}"


# What a screen reader announces must contain what is written (WCAG 2.5.3); the theme's templates do not keep to it.
RENAMED = (
    (re.compile(r'<summary aria-label="Toggle hidden content">'), "<summary>"),
    (re.compile(r'(<i class="theme-switch [^>]*?)\s+title="[^"]*"'), r'\1 aria-hidden="true"'),
    (re.compile(r'(<button class="btn search-button-field [^>]*?)\s+title="Search" aria-label="Search"'), r"\1"),
    # Roles that a later edition of the standard has given up (DPUB-ARIA 1.1): an entry of a list is a list item.
    (re.compile(r'role="doc-biblioentry"'), 'role="listitem"'),
)


def name_buttons(app: Sphinx, exception: Exception | None) -> None:
    """Correct the accessible names in the pages that were written."""
    if exception or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        if "_static" in path.relative_to(app.outdir).parts:
            continue
        text = old = path.read_text(encoding="utf-8")
        for pattern, replacement in RENAMED:
            text = pattern.sub(replacement, text)
        if text != old:
            path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    # before the theme reads its options
    app.connect("config-inited", set_header, priority=100)
    app.connect("config-inited", hide_dead_buttons, priority=100)
    app.connect("config-inited", use_local_mathjax, priority=100)
    app.connect("builder-inited", copy_mathjax)
    app.connect("doctree-read", name_folded_cells)
    app.connect("build-finished", name_buttons)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
