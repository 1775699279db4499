"""The built site, as a reader's browser sees it: `make book` first, then `pytest tests/test_site.py`.

Links and sources are checked without a browser; the rest needs Chromium, and says so where there is none.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup
from pdf import book_pages
from playwright.sync_api import Browser
from screenshots import ROOT, SITE, Visit, browser_path, served
from site_extension import PLACEHOLDER, hide_dead_buttons
from vendor import folder

CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.py"))
# genindex and search are Sphinx's own pages
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "_static" not in path.parts)
BOOK_PAGES = [page for page in PAGES if page not in ("genindex.html", "search.html", "index.html")]

built = pytest.mark.skipif(not PAGES, reason="the site is not built: make book")
in_browser = [
    built,
    pytest.mark.skipif(browser_path() is None, reason="no Chromium here: on Debian, apt install chromium"),
]


def soup(page: str) -> BeautifulSoup:
    return BeautifulSoup((SITE / page).read_text(encoding="utf-8"), "html.parser")


AXE = folder("axe-core") / "axe.min.js"
has_axe = pytest.mark.skipif(not AXE.exists(), reason="axe-core is not here: python tools/vendor.py (npm, a network)")


# --- without a browser -----------------------------------------------------------------------------------------------


@built
def test_every_chapter_has_its_page():
    missing = [path.stem for path in CHAPTERS if f"chapters/{path.stem}.html" not in PAGES]
    assert not missing, f"in chapters/ but not on the site; add them to _toc.yml: {missing}"


@built
def test_no_link_inside_the_site_is_dead():
    pages = {page: soup(page) for page in PAGES}
    anchors = {page: {tag["id"] for tag in html.find_all(id=True)} for page, html in pages.items()}
    dead, seen = [], 0
    for page, html in pages.items():
        for tag in html.find_all(["a", "link", "img", "script", "source"]):
            target = tag.get("href") or tag.get("src")
            parts = urlsplit(target or "")
            if not target or parts.scheme or parts.netloc:
                continue
            seen += 1
            path = (SITE / page).parent / unquote(parts.path) if parts.path else SITE / page
            name = str(path.resolve().relative_to(SITE.resolve())) if path.exists() else None
            if name is None:
                dead.append(f"{page}: {target}")
            elif parts.fragment and name in anchors and unquote(parts.fragment) not in anchors[name]:
                dead.append(f"{page}: {target} (no such place on that page)")
    assert seen > len(pages)
    assert not dead, "\n".join(sorted(set(dead)))


@built
@pytest.mark.parametrize("page", BOOK_PAGES)
def test_page_has_one_title_and_described_pictures(page: str):
    article = soup(page).find("article")
    titles = article.find_all("h1")
    assert len(titles) == 1, f"{len(titles)} titles"
    for image in article.find_all("img"):
        alt = image.get("alt", "").strip()
        assert alt and not alt.endswith((".png", ".jpg", ".svg")), f"no alt text: {image['src']}"
        assert len(alt) >= 10, f"alt text says too little: {alt!r}"


@built
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_download_button_gives_the_notebook(path: Path):
    page = f"chapters/{path.stem}.html"
    links = [a["href"] for a in soup(page).select("a[href$='.ipynb']") if "_sources" in a["href"]]
    assert links, "no button to download the notebook"
    notebook = json.loads((SITE / page).parent.joinpath(links[0]).resolve().read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and any(cell["cell_type"] == "code" for cell in notebook["cells"])


@built
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_repository_buttons_only_with_an_address(path: Path):
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    links = [a["href"] for a in soup(f"chapters/{path.stem}.html").select(".article-header-buttons a[href^=http]")]
    if PLACEHOLDER in address:
        assert not links
    else:
        repository = address.removeprefix("https://github.com/")
        assert any("colab" in link and f"/{repository}/" in link and link.endswith(".ipynb") for link in links)
        assert address in links


@built
def test_every_page_of_the_table_of_contents_is_there_and_every_page_is_in_it():
    named = {f"{name}.html" for name in book_pages()}
    assert named == set(BOOK_PAGES), "pages/ and _toc.yml differ, or the site holds pages of an older build"


@built
def test_print_the_links_to_other_sites(capsys: pytest.CaptureFixture):
    """They are listed, not followed: no test needs a network."""
    links = {a["href"] for page in BOOK_PAGES for a in soup(page).find("article").find_all("a", href=True)}
    outside = sorted({urlsplit(link).netloc for link in links if link.startswith("http")})
    assert all(link.startswith("https://") for link in links if link.startswith("http")), "a link without encryption"
    with capsys.disabled():
        print(f"\n{len([link for link in links if link.startswith('http')])} links to {len(outside)} other sites")


class FakeConfig:
    def __init__(self, url: str):
        self.html_theme_options = {
            "repository_url": url,
            "launch_buttons": {"colab_url": "https://colab.research.google.com"},
            "use_repository_button": True,
            "use_issues_button": True,
            "use_edit_page_button": True,
        }


def test_placeholder_hides_every_button_to_the_repository():
    config = FakeConfig(f"https://github.com/{PLACEHOLDER}")
    hide_dead_buttons(None, config)
    assert not any(config.html_theme_options.values())


def test_a_real_address_keeps_them():
    config = FakeConfig("https://github.com/someone/book")
    hide_dead_buttons(None, config)
    assert config.html_theme_options == FakeConfig("https://github.com/someone/book").html_theme_options


def test_title_page_maps_every_chapter_to_its_module():
    rows = (ROOT / "intro.md").read_text(encoding="utf-8")
    for path in CHAPTERS:
        module = re.search(r"^#     module: (\w+)$", path.read_text(encoding="utf-8"), re.M)
        row = re.search(rf"^\|.*\(chapters/{path.stem}\.ipynb\).*$", rows, re.M)
        assert row, f"intro.md's table has no row for {path.stem}"
        if module:
            assert f"`bitlib.{module[1]}`" in row[0], f"intro.md names another module for {path.stem}"


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=BOOK_PAGES)
def visit(request: pytest.FixtureRequest, browser: Browser, site: str) -> Iterator[Visit]:
    """Every page of the book in turn, opened once for all the tests of TestPage."""
    with Visit(browser, site, request.param) as visit:
        yield visit


class TestPage:
    pytestmark = in_browser

    def test_opens_without_an_error(self, visit: Visit):
        assert not visit.problems, "\n".join(visit.problems)
        broken = visit.page.eval_on_selector_all("img", "all => all.filter(i => !i.naturalWidth).map(i => i.src)")
        assert not broken, f"pictures that did not load: {broken}"

    def test_equations_are_rendered(self, visit: Visit):
        formulas = visit.page.locator(".math").count()
        assert visit.page.locator(".math mjx-container").count() >= formulas, "an equation was not rendered"
        wrong = visit.page.eval_on_selector_all(
            "mjx-merror, [data-mjx-error]", "all => all.map(e => e.getAttribute('data-mjx-error') || e.textContent)"
        )
        assert not wrong, f"TeX that MathJax does not understand: {wrong}"
        prose = " ".join(visit.page.locator("article :is(p, li, td, h1, h2, h3)").all_inner_texts())
        raw = re.findall(r"\\\(|\\\[|\$\$|\{(?:cite|eq|ref|doc|numref)\b", prose)
        assert not raw, f"markup that was not rendered: {raw}"

    def test_never_scrolls_sideways(self, visit: Visit):
        for width in (320, 390, 768, 1440):
            visit.page.set_viewport_size({"width": width, "height": 900})
            widest = visit.page.evaluate("document.scrollingElement.scrollWidth")
            assert widest <= width, f"{widest} pixels wide on a screen of {width}"
        visit.page.set_viewport_size({"width": 1280, "height": 900})

    @has_axe
    def test_keeps_to_wcag(self, visit: Visit):
        """No violation of WCAG 2.2 AA that axe can find: light on a desktop, dark on the narrowest phone."""
        assert violations(visit, "light", 1440) == []
        assert violations(visit, "dark", 320) == []

    def test_keyboard_reaches_the_page_and_shows_where_it_is(self, visit: Visit):
        visit.page.evaluate("document.activeElement.blur()")
        visit.page.keyboard.press("Tab")
        assert "Skip to" in visit.page.evaluate("document.activeElement.textContent")
        visit.page.keyboard.press("Enter")
        seen = set()
        for _ in range(4):
            visit.page.keyboard.press("Tab")
            seen.add(visit.page.evaluate(FOCUS))
        assert len(seen) > 1, "the Tab key leads nowhere"
        assert not [place for place in seen if place.endswith(" invisible")], seen

    @pytest.mark.slow
    @has_axe
    def test_keeps_to_wcag_in_both_themes_at_every_width(self, visit: Visit):
        for theme in ("light", "dark"):
            for width in (320, 768, 1440):
                assert violations(visit, theme, width) == [], (theme, width)

    def test_dark_mode(self, visit: Visit):
        visit.page.emulate_media(color_scheme="dark")
        visit.page.wait_for_selector("html[data-theme=dark]", timeout=20_000)
        visit.page.wait_for_timeout(400)  # colours fade over
        ground, text = visit.page.evaluate(
            "() => [document.body, document.querySelector('article p')].map((e, i) =>"
            " getComputedStyle(e)[i ? 'color' : 'backgroundColor'])"
        )
        assert brightness(ground) < 60 < 150 < brightness(text), f"text {text} on {ground}"
        for plate in visit.page.eval_on_selector_all(
            ".cell_output img", "all => all.map(e => getComputedStyle(e).backgroundColor)"
        ):
            assert brightness(plate) > 200, f"a figure's dark labels on {plate}"


# where the focus is, and whether one can see it there
FOCUS = """() => {
  const e = document.activeElement, style = getComputedStyle(e);
  const ring = style.outlineStyle !== 'none' || style.boxShadow !== 'none';
  return `${e.tagName} ${e.className} ${(e.textContent || '').trim().slice(0, 30)}${ring ? '' : ' invisible'}`;
}"""
# every success criterion of WCAG 2.2, levels A and AA, that can be checked by a program
AXE_OPTIONS = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"],
    "resultTypes": ["violations"],
}


def violations(visit: Visit, theme: str, width: int) -> list[str]:
    """What axe objects to on a page in this theme and at this width."""
    page = visit.page
    page.emulate_media(color_scheme=theme)
    page.wait_for_selector(f"html[data-theme={theme}]", timeout=20_000)
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(400)  # colours fade over
    if not page.evaluate("Boolean(window.axe)"):
        page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("options => axe.run(document, options)", AXE_OPTIONS)["violations"]
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 900})
    return [f"{v['id']}: {node['html'][:120]}" for v in found for node in v["nodes"]]


def brightness(colour: str) -> float:
    """The mean channel of a CSS colour such as rgb(20, 24, 32)."""
    return sum(float(value) for value in re.findall(r"[\d.]+", colour)[:3]) / 3


class TestSite:
    pytestmark = in_browser

    def test_search_finds_weight_standardization(self, browser: Browser, site: str):
        with Visit(browser, site, "search.html?q=weight+standardization") as visit:
            visit.page.wait_for_selector("#search-results li a", timeout=20_000)
            found = visit.page.eval_on_selector_all(
                "#search-results li a", "all => all.map(a => a.getAttribute('href'))"
            )
            assert any("03_weight_standardization" in link for link in found), found
            assert not visit.problems, "\n".join(visit.problems)

    def test_theme_button_switches_to_dark(self, browser: Browser, site: str):
        with Visit(browser, site, BOOK_PAGES[0]) as visit:
            seen = set()
            for _ in range(3):
                seen.add(visit.page.get_attribute("html", "data-theme"))
                visit.page.locator(".theme-switch-button:visible").first.click()
            assert seen >= {"light", "dark"} or "dark" in {*seen, visit.page.get_attribute("html", "data-theme")}

    def test_title_page_leads_to_every_chapter(self, browser: Browser, site: str):
        with Visit(browser, site, "intro.html") as visit:
            for path in CHAPTERS:
                assert visit.page.locator(f"article a[href*='{path.stem}.html']").count(), f"no link to {path.stem}"
            visit.page.locator("article a[href*='chapters/']").first.click()
            visit.page.wait_for_load_state()
            assert "/chapters/" in visit.page.url

    def test_the_shown_site_would_be_caught_if_it_broke(self, browser: Browser, site: str, tmp_path: Path):
        """The checks above can fail: a page with one fault of each kind is caught."""
        page = tmp_path / "bad.html"
        page.write_text("<article><h1>Bad</h1><img src='none.png'><script>nope()</script></article>")
        with served(tmp_path) as address, Visit(browser, address, "bad.html") as visit:
            visit.page.evaluate("fetch('https://example.com/x.js').catch(() => {})")
            kinds = " ".join(visit.problems)
            assert "404" in kinds and "nope" in kinds and "leaves the site" in kinds
