"""A headless Chromium for the tests of the page. They skip, with the reason, where there is none."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60_000  # milliseconds; a hang limit


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a Playwright browser without a window."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright drives the browser: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """An open page, with the requests and errors that it made.

    ``url``: of the server; ``options``: of Playwright's new_context, such as a viewport or a colour scheme.
    """

    def __init__(self, browser: Any, url: str, **options: Any):
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.goto(url)

    def ask(self, text: str) -> Any:
        """Type a message and send it with Enter. Returns the answer's element, which may still grow."""
        before = self.page.locator(".assistant").count()
        self.page.get_by_label("Message").fill("")
        self.page.get_by_label("Message").press_sequentially(text)
        self.page.get_by_label("Message").press("Enter")
        return self.page.locator(".assistant").nth(before)

    def answer(self, text: str) -> Any:
        """Ask and wait for the end of the answer."""
        answer = self.ask(text)
        self.until("#send", "Send")
        return answer

    def tokens(self, answer: Any) -> list[tuple[str, str]]:
        """Return (text, title) of each token of an answer; the title explains the colour."""
        found = answer.locator(".token").evaluate_all("all => all.map(one => [one.textContent, one.title])")
        return [tuple(one) for one in found]

    def dial(self, name: str, key: str, times: int = 1) -> None:
        """Move a slider with the keyboard."""
        slider = self.page.get_by_role("slider", name=name)
        for _ in range(times):
            slider.press(key)

    def until(self, selector: str, text: str) -> None:
        """Wait until an element has exactly this text."""
        self.page.locator(selector).filter(has_text=re.compile(f"^{re.escape(text)}$")).wait_for()

    def some(self, count: int) -> None:
        """Wait for ``count`` tokens."""
        self.page.locator(".token").nth(count - 1).wait_for(state="attached")

    def text(self, selector: str) -> str:
        """Return the text of an element."""
        return str(self.page.locator(selector).text_content())

    def close(self) -> None:
        """Close the page."""
        self.context.close()
