"""Print the built site into one PDF with Chromium, and check its pages.

    python tools/pdf.py [--out _build/book.pdf] [--pages intro chapters/02_group_normalization ...]

Prints one line for each fault and exits 1 if there is any: a block of code, table or equation that is wider than the
paper, a line of code or output that is not on it, or a character for which no font has a glyph. Needs Chromium and a
built site (`make book`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from book import ROOT
from playwright.sync_api import Page, sync_playwright
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, ContentStream, IndirectObject
from screenshots import SITE, launch, served, settle

OUT = ROOT / "_build" / "book.pdf"
# A4 less the margins below, in CSS pixels at 96 to the inch
PAPER = {"width": 210 / 25.4 * 96, "height": 297 / 25.4 * 96}
MARGIN = 16 / 25.4 * 96
FOOTER = (
    '<div style="font: 8px sans-serif; width: 100%; text-align: center; color: #555">'
    '<span class="title"></span> · <span class="pageNumber"></span></div>'
)
# what in the text is wider than the column it stands in, as it is laid out for print
TOO_WIDE = """() => {
  const article = document.querySelector('article');
  const right = article.getBoundingClientRect().right + 1;
  const wide = [];
  if (right > innerWidth + 2) wide.push(['article', '', Math.round(right - innerWidth)]);
  for (const e of article.querySelectorAll('pre, table, img, svg, mjx-container')) {
    if (!e.getClientRects().length) continue;
    const over = Math.max(e.getBoundingClientRect().right - right, e.scrollWidth - e.clientWidth - 1);
    if (e.tagName === 'MJX-CONTAINER' ? e.getBoundingClientRect().right > right : over > 0) {
      wide.push([e.tagName.toLowerCase(), (e.innerText || e.alt || '').trim().slice(0, 60), Math.round(over)]);
    }
  }
  return wide;
}"""

# the lines of code and output that are laid out for print
LINES = """() => [...document.querySelectorAll('article pre')].filter(e => e.getClientRects().length)
  .flatMap(e => e.innerText.split('\\n'))"""


def book_pages(root: Path = ROOT) -> list[str]:
    """The pages of the book, in the order of the table of contents."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]


def unfold(page: Page) -> None:
    """Open what is folded away, since paper cannot, and light up the page, whatever the theme."""
    page.evaluate(
        "() => document.querySelectorAll('article details').forEach(d => { d.open = true; d.hidden = false })"
    )
    page.evaluate("() => { document.documentElement.dataset.theme = 'light' }")


def print_page(page: Page, path: Path) -> tuple[list[str], list[str]]:
    """Print an open page; returns what does not fit on the paper, and the lines that belong on it."""
    unfold(page)
    page.emulate_media(media="print", color_scheme="light")
    page.set_viewport_size({"width": round(PAPER["width"] - 2 * MARGIN), "height": round(PAPER["height"])})
    settle(page)
    wide, lines = page.evaluate(TOO_WIDE), page.evaluate(LINES)
    margin = f"{MARGIN}px"
    page.pdf(
        path=path,
        format="A4",
        print_background=True,
        display_header_footer=True,
        header_template="<span></span>",
        footer_template=FOOTER,
        margin={"top": margin, "bottom": margin, "left": margin, "right": margin},
        outline=True,
        tagged=True,
    )
    return [f"{name} is {over} pixels too wide: {text!r}" for name, text, over in wide], lines


def lost_lines(reader: PdfReader, lines: list[str]) -> Iterator[str]:
    """Those of the lines that are not on the paper."""
    # without white space, because a long line is broken where the paper ends
    printed = "".join("".join(sheet.extract_text().split()) for sheet in reader.pages)
    for line in lines:
        if "".join(line.split()) not in printed:
            yield line.strip()


def missing_glyphs(reader: PdfReader) -> Iterator[tuple[int, str]]:
    """Where text is drawn with glyph 0, "not defined": pairs of (page number from 1, name of the font)."""
    for number, page in enumerate(reader.pages, start=1):
        fonts = page.get("/Resources", {}).get("/Font", {})
        fonts = fonts.get_object() if isinstance(fonts, IndirectObject) else fonts
        current = None
        for operands, operator in ContentStream(page.get_contents(), reader).operations:
            if operator == b"Tf":
                current = fonts[operands[0]].get_object()
            elif operator in (b"Tj", b"TJ") and current is not None and current.get("/Subtype") == "/Type0":
                strings = operands[0] if isinstance(operands[0], ArrayObject) else [operands[0]]
                for string in strings:
                    data = getattr(string, "original_bytes", b"")
                    if any(data[i : i + 2] == b"\0\0" for i in range(0, len(data) - 1, 2)):
                        yield number, str(current.get("/BaseFont", "?"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the file to write")
    parser.add_argument("--site", type=Path, default=SITE, help="the folder of the built site")
    parser.add_argument("--pages", nargs="+", help="pages, without .html; all of the book by default")
    args = parser.parse_args(argv)
    names = args.pages or book_pages()
    missing = [name for name in names if not (args.site / f"{name}.html").exists()]
    if missing:
        print(f"not in {args.site}: {', '.join(missing)}; build the site with `make book`", file=sys.stderr)
        return 1
    problems: list[str] = []
    writer = PdfWriter()
    with tempfile.TemporaryDirectory() as folder, served(args.site) as address, sync_playwright() as playwright:
        browser = launch(playwright)
        for name in names:
            page = browser.new_page()
            page.set_default_timeout(240_000)
            page.goto(f"{address}/{name}.html")
            settle(page)
            path = Path(folder) / f"{name.replace('/', '-')}.pdf"
            title = page.locator("article h1").first.inner_text().rstrip("#¶ \n")
            too_wide, lines = print_page(page, path)
            page.close()
            reader = PdfReader(path)
            problems += [f"{name}: {problem}" for problem in too_wide]
            problems += [f"{name}: not printed: {line!r}" for line in lost_lines(reader, lines)]
            glyphs = {(number, font) for number, font in missing_glyphs(reader)}
            problems += [
                f"{name}: page {number}: a character without a glyph in {font}" for number, font in sorted(glyphs)
            ]
            writer.append(reader, outline_item=title, import_outline=True)
        browser.close()
    writer.add_metadata({"/Title": "Big Transfer from scratch"})
    writer.compress_identical_objects()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    writer.write(args.out)
    print(f"{args.out}: {len(writer.pages)} pages, {args.out.stat().st_size / 1e6:.1f} MB")
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
