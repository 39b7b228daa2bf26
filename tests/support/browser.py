"""A browser on the server's page, and what must never happen in it."""

import base64
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from chromium import find_chromium, open_chromium
from playwright.sync_api import Browser, BrowserContext, Error, Page, Response, expect

SECONDS = 20
"""What a browser on a busy machine may take for anything."""

_REPORT_VIOLATIONS = """
addEventListener("securitypolicyviolation", (event) => {
  console.error(`the policy forbids ${event.blockedURI} (${event.violatedDirective}) in ${event.sourceFile}`)
})
"""

_STATUS = re.compile(r"Failed to load resource: the server responded with a status of \d+")


@contextmanager
def installed_browser():
    """Start the installed Chromium, or skip the test if there is none.

    While it is open, the thread has a running event loop: no other test may use asyncio there.
    """
    program = find_chromium()
    if program is None:
        pytest.skip("Chromium is not installed")
    expect.set_options(timeout=SECONDS * 1000)
    with open_chromium(program) as browser:
        yield browser


@dataclass(frozen=True, kw_only=True)
class Visits:
    """Visitors of pages, each with cookies and a storage of its own, and what went wrong in any of them."""

    browser: Browser
    faults: list[str] = field(default_factory=list)
    refusals: set[int] = field(default_factory=set)
    """Statuses from 400 on that the test is about; others are faults."""
    contexts: list[BrowserContext] = field(default_factory=list)
    refused: list[Response] = field(default_factory=list)

    def __call__(self, url, *, wait_until="load", **options) -> Page:
        """Open a page as a new visitor; ``options`` are Playwright's of a context. `open_tab` opens another of him."""
        context = self.browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-GB", **options})
        self.contexts.append(context)
        context.set_default_timeout(SECONDS * 1000)
        context.add_init_script(_REPORT_VIOLATIONS)
        self._watch(context, urlsplit(url).netloc)
        page = context.new_page()
        page.goto(url, wait_until=wait_until)
        return page

    def close(self):
        """End all visits; fails if anything went wrong in them."""
        self.faults.extend(_describe(each) for each in self.refused if each.status not in self.refusals)
        for context in self.contexts:
            context.close()
        assert not self.faults, "\n".join(self.faults)

    def _watch(self, context, host):
        def on_console(message):
            if message.type in ("error", "warning") and not _STATUS.match(message.text):
                self.faults.append(f"console {message.type}: {message.text} ({message.location['url']})")

        def on_request(request):
            url = urlsplit(request.url)
            if url.scheme not in ("data", "blob") and url.netloc != host:
                self.faults.append(f"a request to elsewhere: {request.url}")

        def on_response(response):
            if response.status >= 400:
                self.refused.append(response)

        context.on("console", on_console)
        context.on("weberror", lambda error: self.faults.append(f"not caught: {error.error}"))
        context.on("request", on_request)
        context.on("response", on_response)


def _describe(response):
    try:
        text = response.text()[:500]
    except Error:  # of a page that is gone
        text = "?"
    request = response.request
    return f"status {response.status}: {request.method} {response.url} {(request.post_data or '')[:500]}: {text}"


def open_tab(page) -> Page:
    """Open another tab of the same visitor."""
    tab = page.context.new_page()
    tab.goto(page.url)
    return tab


def drop_file(target, data, name="image.png", kind="image/png"):
    """Drop a file on an element (a locator), as from a file manager."""
    transfer = _transfer(target.page, data, name, kind)
    for event in ("dragenter", "dragover", "drop"):
        target.dispatch_event(event, {"dataTransfer": transfer})


def paste_file(target, data, name="image.png", kind="image/png"):
    """Paste a file into an element (a locator)."""
    script = """(element, transfer) => element.dispatchEvent(
        new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true }))"""
    target.evaluate(script, _transfer(target.page, data, name, kind))


def _transfer(page, data, name, kind):
    script = """([data, name, type]) => {
      const transfer = new DataTransfer()
      const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0))
      transfer.items.add(new File([bytes], name, { type }))
      return transfer
    }"""
    return page.evaluate_handle(script, [base64.b64encode(data).decode(), name, kind])
