"""The printed book: what `make pdf` prints fits on its paper and has a glyph for every character."""

from pathlib import Path

import pdf
import pytest
from pypdf import PdfReader
from screenshots import SITE, browser_path

pytestmark = pytest.mark.skipif(browser_path() is None, reason="no Chromium here: on Debian, apt install chromium")
built = pytest.mark.skipif(not (SITE / "intro.html").exists(), reason="the site is not built: make book")


@built
def test_a_chapter_and_a_page_print_without_a_fault(tmp_path: Path):
    out = tmp_path / "book.pdf"
    pages = ["intro", "chapters/02_group_normalization", "pages/explore"]
    assert pdf.main(["--out", str(out), "--pages", *pages]) == 0
    reader = PdfReader(out)
    assert len(reader.pages) > 8
    titles = [item.title for item in reader.outline if not isinstance(item, list)]
    assert "Big Transfer from scratch" in titles[0] and any("Group normalization" in title for title in titles)
    text = "\n".join(page.extract_text() for page in reader.pages)
    assert "check_group_norm: correct" in text  # outputs are printed
    assert "centred.square().mean" in text.replace("\n", "")  # and so are the solutions, unfolded


@built
@pytest.mark.slow
def test_the_whole_book_prints_without_a_fault(tmp_path: Path):
    assert pdf.main(["--out", str(tmp_path / "book.pdf")]) == 0
    assert len(PdfReader(tmp_path / "book.pdf").pages) > 100


def test_a_wide_block_a_lost_line_and_a_missing_glyph_are_found(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The checks above can fail: an image wider than the paper, a line beside it, a code point that no font has."""
    (tmp_path / "bad.html").write_text(
        "<!doctype html><meta charset=utf-8><title>Bad</title><article><h1>Bad</h1>"
        "<p>Here is one that nobody draws: \U000f1234.</p>"
        "<pre>here = 1\n<span style='position: fixed; left: -99in'>gone = 2</span></pre>"
        "<svg width=2000 height=10></svg></article>",
        encoding="utf-8",
    )
    assert pdf.main(["--site", str(tmp_path), "--out", str(tmp_path / "bad.pdf"), "--pages", "bad"]) == 1
    said = capsys.readouterr().err
    assert "svg is" in said and "pixels too wide" in said
    assert "without a glyph" in said
    assert "not printed: 'gone = 2'" in said and "here = 1" not in said


def test_a_page_that_is_not_built_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert pdf.main(["--site", str(tmp_path), "--pages", "nothing"]) == 1
    assert "make book" in capsys.readouterr().err
