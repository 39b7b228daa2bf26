"""What a user does on the page, by the names that he reads or hears."""

import io
import re
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image
from playwright.sync_api import expect

LONG = {"Steps": 100, "Images": 60}
"""A job that runs until it is cancelled."""


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A job that the page queued."""

    id: str
    body: dict[str, Any]
    """What the page sent."""


def region(page, name):
    return page.get_by_role("region", name=name, exact=True)


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def number(page, name):
    return page.get_by_role("spinbutton", name=name, exact=True)


def prompt(page):
    return page.get_by_role("textbox", name="Prompt", exact=True)


def shown(page):
    """The image that the page shows: a preview, or the result."""
    return region(page, "Image").locator("#shown img").first


def status(page):
    """The line about progress."""
    return page.locator("#status")


def fill(page, text=None, **numbers):
    """Fill the prompt in and numbers by their names, such as ``Steps=4``."""
    for name, value in numbers.items():
        number(page, name).fill(str(value))
    if text is not None:
        prompt(page).fill(text)


def start(page, text=None, **numbers) -> Queued:
    """Queue a job with the keyboard."""
    fill(page, text, **numbers)
    with page.expect_response(lambda each: each.url.endswith("/api/jobs") and each.request.method == "POST") as reply:
        prompt(page).press("Control+Enter")
    assert reply.value.status == 202, reply.value.text()
    return Queued(id=reply.value.json()["id"], body=reply.value.request.post_data_json)


def expect_result(page, job):
    """Wait until the page shows the image of a job."""
    expect(shown(page)).to_have_attribute("src", re.compile(rf"/api/images/[^/]*{job.id}"))
    expect(shown(page)).to_be_visible()


def make(page, text=None, **numbers) -> Queued:
    """Make an image and wait until it is shown."""
    job = start(page, text, **numbers)
    expect_result(page, job)
    return job


def download(server, path):
    """An image of the server's, as it is on disk."""
    return Image.open(io.BytesIO(httpx.get(f"{server.url}{path}", timeout=60).raise_for_status().content))


def saved(server, job, index=0):
    """The pixels of a job's image on disk."""
    described = httpx.get(f"{server.url}/api/jobs/{job.id}", timeout=60).json()
    assert described["state"] == "done", described["error"]
    return np.asarray(download(server, described["images"][index]["url"]))
