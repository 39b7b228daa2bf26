"""The installed Chromium, for Playwright: it is the distribution's, so that nothing is downloaded."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """Find the program; None if it is not installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def open_chromium(program: str) -> Iterator[Browser]:
    """Start the browser without a window."""
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*sandbox, "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


def watch_layout_shifts(page: Page, *, from_load: bool = False) -> None:
    """Record what jumps from now on, or since the page was loaded; shifts after input count too."""
    page.evaluate(
        """(buffered) => {
          window.layoutShifts = []
          new PerformanceObserver((list) => {
            for (const { value, sources } of list.getEntries()) {
              const moved = sources.map(({ node, previousRect: { x, y }, currentRect: to }) =>
                `${node?.nodeName}#${node?.id ?? ""} from ${x}, ${y} to ${to.x}, ${to.y}`)
              window.layoutShifts.push({ value, moved })
            }
          }).observe({ type: "layout-shift", buffered })
        }""",
        from_load,
    )


def read_layout_shifts(page: Page) -> list[dict[str, Any]]:
    """What jumped: ``{"value", "moved"}``, its part of the cumulative layout shift, and the elements."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
    return page.evaluate("window.layoutShifts")
