"""A real browser, headless. `make test-page` runs these tests, in a pytest of their own.

Its driver keeps an event loop running in the main thread, in which no other test could start one.
Elsewhere they are not collected, and the last lines of the run say so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = os.environ.get("MODESEEK_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HOW = "install one (Debian: apt install chromium) or name one: MODESEEK_CHROMIUM=/path/to/chromium"

WANTED = os.environ.get("MODESEEK_PAGE_TESTS") == "required"

if WANTED and CHROMIUM is None:
    raise pytest.UsageError(f"the page's tests need a Chromium: {HOW}")
collect_ignore_glob = [] if WANTED else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not WANTED:
        terminalreporter.write_line(
            "NOT RUN here: the page in a browser; `make test-page` does.", yellow=True
        )


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not work for root, as which containers run tests.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """`open_page(url, **options of the context)`; an error in the page's own code fails the test."""
    contexts: list[Any] = []
    errors: list[str] = []

    def open_(url: str, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda said: errors.append(said.text) if "Content Security Policy" in said.text else None,
        )
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert errors == []
