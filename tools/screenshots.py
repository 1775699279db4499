"""Take pictures of pages of the built site, to look at: light and dark, on a phone and on a desktop.

    python tools/screenshots.py [--out FOLDER] [--full] [intro chapters/02_group_normalization ...]

Without pages, takes the title page and the first chapters. Needs Chromium and a built site (`make book`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from book import ROOT
from playwright.sync_api import Browser, Page, Playwright, Request, Route, sync_playwright

SITE = ROOT / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {"phone": (390, 844), "desktop": (1280, 900)}
PAGES = ("intro", "chapters/02_group_normalization", "pages/disagreements", "pages/references")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port of this machine; gives the address."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def browser_path() -> str | None:
    """Where this machine's Chromium is, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def launch(playwright: Playwright) -> Browser:
    path = browser_path()
    if path is None:
        raise FileNotFoundError(f"none of {', '.join(BROWSERS)} is installed")
    # no sandbox: it does not work in a container as root, and the pages are our own
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])


def settle(page: Page) -> None:
    """Wait until the equations are set, every picture, also one further down, is there, and all of it is drawn."""
    page.evaluate("() => window.MathJax?.startup?.promise")
    page.evaluate(
        "() => Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode().catch(() => {}) }))"
    )
    # What was folded away a moment ago has its room at once, but is printed empty until a frame has been drawn.
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


class Visit:
    """A page of the site opened in a fresh browser context, with all that went wrong on the way."""

    def __init__(self, browser: Browser, site: str, path: str, theme: str = "light", width: int = 1280):
        self.problems: list[str] = []
        self.site = site
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.context.set_default_timeout(120_000)  # a busy machine is no fault of the page
        self.page: Page = self.context.new_page()
        self.page.route("**/*", self._only_local)
        self.page.on("console", lambda m: self._note(f"console: {m.text}") if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self._note(f"script: {error}"))
        self.page.on("requestfailed", self._failed)
        self.page.on("response", lambda r: self._note(f"{r.status}: {r.url}") if r.status >= 400 else None)
        self.page.goto(f"{site}/{path}", wait_until="load")
        settle(self.page)

    def _note(self, problem: str) -> None:
        self.problems.append(problem)

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # as the icon's is, if the page is loaded again before it came
            self._note(f"failed: {request.url}")

    def _only_local(self, route: Route) -> None:
        if route.request.url.startswith((self.site, "data:", "blob:")):
            route.continue_()
        else:
            self._note(f"leaves the site: {route.request.url}")
            route.abort()

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *exception: object) -> None:
        self.context.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=PAGES, help="pages, without .html")
    parser.add_argument("--out", type=Path, help="where to put the pictures; a new temporary folder by default")
    parser.add_argument("--full", action="store_true", help="the whole page rather than its first screen")
    parser.add_argument("--site", type=Path, default=SITE, help="the folder of the built site")
    args = parser.parse_args(argv)
    missing = [page for page in args.pages if not (args.site / f"{page}.html").exists()]
    if missing:
        print(f"not in {args.site}: {', '.join(missing)}; build the site with `make book`", file=sys.stderr)
        return 1
    out = args.out or Path(tempfile.mkdtemp(prefix="screenshots-"))
    out.mkdir(parents=True, exist_ok=True)
    with served(args.site) as address, sync_playwright() as playwright:
        browser = launch(playwright)
        for theme in ("light", "dark"):
            for device, (width, height) in WIDTHS.items():
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
                context.set_default_timeout(120_000)
                for name in args.pages:
                    page = context.new_page()
                    page.goto(f"{address}/{name}.html")
                    settle(page)
                    path = out / f"{name.replace('/', '-')}-{device}-{theme}.png"
                    page.screenshot(path=path, full_page=args.full)
                    page.close()
                    print(path)
                context.close()
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
