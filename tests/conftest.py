"""What the tests of the built site share: a server of it, and one browser."""

from collections.abc import Iterator

import pytest
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
