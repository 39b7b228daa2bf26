"""Chromium on the page of a server of pictogram. A test fails if the console, the policy or a request complains."""

from contextlib import ExitStack

import httpx
import pytest
from support.browser import Visits, installed_browser
from support.mask_editor import OPEN, Editor, editor_site
from support.server import running_server


@pytest.fixture(scope="package")
def browser():
    with installed_browser() as opened:
        yield opened


@pytest.fixture
def serve():
    """Starts servers of other `Settings`, which outlast the visits: ``serve(memory="300M")``."""
    with ExitStack() as servers:
        yield lambda **settings: servers.enter_context(running_server(**settings))


@pytest.fixture
def visits(browser, serve):
    """Opens pages, each call as a new visitor: ``visits(server.url, color_scheme="dark")``."""
    opened = Visits(browser=browser)
    yield opened
    opened.close()


@pytest.fixture
def page(server, visits):
    """The page of `server` as a new visitor sees it once it is ready; its jobs end with the test."""
    opened = visits(server.url)
    if server.context.settings.token is None:
        opened.wait_for_selector("body.ready")
    yield opened
    token = {"Authorization": f"Bearer {server.context.settings.token}"}
    with httpx.Client(base_url=server.url, headers=token, timeout=60) as client:
        for job in client.get("/api/jobs").json()["jobs"]:
            if job["state"] in ("queued", "running"):
                client.delete(f"/api/jobs/{job['id']}")
    server.wait_until_idle()


@pytest.fixture(scope="package")
def mask_site():
    with editor_site() as url:
        yield url


@pytest.fixture
def open_editor(mask_site, visits):
    """Opens a mask editor on a black image: ``open_editor(width, height, device_scale_factor=2)``."""

    def open_editor(width=512, height=512, **options):
        page = visits(mask_site, **options)
        page.evaluate(OPEN, [width, height])
        return Editor(page=page, width=width, height=height)

    return open_editor


@pytest.fixture
def editor(open_editor):
    return open_editor()
