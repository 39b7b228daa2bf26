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


MISS_THE_END = """{
  const add = EventSource.prototype.addEventListener
  EventSource.prototype.addEventListener = function (kind, call) {
    if (kind !== "done") add.call(this, kind, call)
  }
}"""


def test_the_seed_is_that_of_the_image_that_is_left(refusing, visits, checked):
    """Also where the page missed the job's last event, and asks for the job instead."""
    assert checked.flags[:2] == [True, False]
    visits.refusals.add(400)  # the plan of hires fix, for which one step is too few
    page = visits(refusing.url)
    for misses_the_end in (False, True):
        if misses_the_end:
            page.add_init_script(MISS_THE_END)
            page.reload()
        page.wait_for_selector("body.ready")
        make(page, THREE.prompt, Steps=1, Seed=1, Width=64, Height=64, Images=2)
        expect(status(page)).to_have_text("Done · 1 of 2 refused as not safe for work · seed 2")
