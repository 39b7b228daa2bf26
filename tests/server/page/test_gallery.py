"""The gallery: images of this server, each with its recipe."""

import io
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect
from support.page import button, make, number, prompt, region, saved
from support.server import running_server


@pytest.fixture
def server():
    """One without images."""
    with running_server() as running:
        yield running


@pytest.fixture
def made(page):
    """An image in the gallery, and a form that has other values since."""
    page.get_by_role("textbox", name="Negative prompt").fill("blue")
    job = make(page, "a red apple", Steps=4, Guidance=3, Seed=17)
    page.get_by_role("textbox", name="Negative prompt").fill("")
    for name in ("Steps", "Guidance", "Seed"):
        number(page, name).fill("")
    prompt(page).fill("a fox")
    return job


def images(page):
    return region(page, "Gallery").get_by_role("list").get_by_role("button")


def open_first(page):
    images(page).first.click()
    dialog = page.get_by_role("dialog", name="Image parameters")
    expect(dialog).to_be_visible()
    return dialog


def test_the_recipe_is_shown_and_used(page, server, made):
    dialog = open_first(page)
    for text in ("a red apple", "blue", "17"):
        expect(dialog.get_by_text(text, exact=True).first).to_be_visible()
    button(dialog, "Use everything").click()
    expect(dialog).to_be_hidden()
    expect(prompt(page)).to_have_value("a red apple")
    again = make(page)
    np.testing.assert_array_equal(saved(server, again), saved(server, made))


def test_the_prompt_or_the_seed_alone_is_used(page, made):
    button(open_first(page), "Use the seed").click()
    expect(number(page, "Seed")).to_have_value("17")
    expect(prompt(page)).to_have_value("a fox")
    button(open_first(page), "Use the prompt").click()
    expect(prompt(page)).to_have_value("a red apple")
    expect(page.get_by_role("textbox", name="Negative prompt")).to_have_value("blue")
    expect(number(page, "Steps")).to_have_value("")


def test_an_image_becomes_the_init_image(page, server, made):
    button(open_first(page), "Use as init image").click()
    expect(page.get_by_role("group", name="Init image").get_by_role("img")).to_be_visible()
    assert "image" in make(page, "a red apple", Steps=3).body


def test_an_image_is_downloaded_as_it_is_on_disk(page, server, made):
    dialog = open_first(page)
    with page.expect_download() as download:
        dialog.get_by_text("Download", exact=True).click()
    data = Path(download.value.path()).read_bytes()
    assert download.value.suggested_filename.endswith(".png")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), saved(server, made))
    assert "a red apple" in Image.open(io.BytesIO(data)).info["parameters"]


def test_a_deleted_image_goes_from_every_page(page, server, visits, made):
    other = visits(server.url)
    expect(images(other)).to_have_count(1)
    dialog = open_first(page)
    button(dialog, "Delete").click()
    button(dialog, "Delete for good").click()
    for each in (page, other):
        expect(images(each)).to_have_count(0)
    assert httpx.get(f"{server.url}/api/images", timeout=60).json()["images"] == []


def test_images_of_others_wait_so_that_nothing_moves(page, server, visits):
    make(visits(server.url), "a fox", Steps=2)
    button(page, "Show 1 new image").click()
    expect(images(page)).to_have_count(1)


def test_thumbnails_have_texts_and_keys_open_and_close_them(page, made):
    expect(images(page).first.get_by_role("img")).to_have_attribute("alt", re.compile("^a red apple, "))
    images(page).first.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Image parameters")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(images(page).first).to_be_focused()
