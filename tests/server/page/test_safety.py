"""The page says which images a safety checker refused."""

import pytest
from playwright.sync_api import expect
from support.page import make, region, status
from support.safety import THREE


@pytest.fixture
def refusing(serve, checked):
    return serve(packages=(checked.path,), safety="refuse")


def test_refused_images_leave_no_place_and_are_told(refusing, visits):
    page = visits(refusing.url)
    page.wait_for_selector("body.ready")
    make(page, THREE.prompt, Steps=1, Seed=1, Width=64, Height=64, Images=3)
    expect(status(page)).to_have_text("Done · 1 of 3 refused as not safe for work · choose an image to use it")
    expect(region(page, "Image").locator("#shown img")).to_have_count(2)
    expect(page.locator("li.place")).to_have_count(0)
