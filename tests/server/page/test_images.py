"""Images that are dropped, pasted and painted over: img2img, inpainting, and recipes of others."""

import base64
import io

import httpx
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import expect
from sdonnx_runtime.request import Request
from support.browser import drop_file, paste_file
from support.images import photograph
from support.page import button, fill, make, number, prompt, saved, start

INFOTEXT = """a red apple
Negative prompt: blue, (green:1.2)
Steps: 6, Sampler: Euler a, Schedule type: Karras, CFG scale: 5.5, Seed: 123, Size: 64x48, Clip skip: 2"""


def as_png(image, **texts):
    chunks, stream = PngInfo(), io.BytesIO()
    for name, text in texts.items():
        chunks.add_text(name, text)
    image.save(stream, format="PNG", pnginfo=chunks)
    return stream.getvalue()


def decode(data):
    return Image.open(io.BytesIO(base64.b64decode(data.rpartition(",")[2])))


def init_image(page):
    return page.get_by_role("group", name="Init image")


@pytest.mark.parametrize("act", [drop_file, paste_file], ids=["dropped", "pasted"])
def test_an_image_without_parameters_becomes_the_init_image(page, server, pipeline, act):
    photo = photograph()
    act(page.locator("body"), as_png(photo))
    expect(init_image(page).get_by_role("img")).to_be_visible()
    job = make(page, "a red apple", Steps=6, Seed=5, Strength=0.6)
    expected = pipeline.generate("a red apple", image=photo, num_inference_steps=6, seed=5, strength=0.6)
    np.testing.assert_array_equal(saved(server, job), np.asarray(expected.images[0]))


def test_an_image_is_chosen_and_removed(page):
    with page.expect_file_chooser() as chooser:
        button(page, "Choose an image").click()
    chooser.value.set_files({"name": "photo.png", "mimeType": "image/png", "buffer": as_png(photograph())})
    expect(init_image(page).get_by_role("img")).to_be_visible()
    assert "image" in start(page, "a red apple", Steps=2).body
    init_image(page).get_by_role("button", name="Remove", exact=True).click()
    expect(init_image(page).get_by_role("img")).to_have_count(0)
    assert "image" not in start(page, "a red apple", Steps=2).body


def test_a_file_that_is_no_image_is_refused_in_words(page):
    drop_file(page.locator("body"), b"no image", "notes.txt", "text/plain")
    expect(page.get_by_role("alert").filter(has_text="image").first).to_be_visible()


def test_a_damaged_image_is_refused_in_words(page, visits):
    visits.refusals.add(400)
    drop_file(page.locator("body"), as_png(photograph())[:60])
    expect(init_image(page).get_by_text("not an image that the browser can read")).to_be_visible()
    expect(init_image(page).get_by_role("img")).to_have_count(0)


def test_a_painted_mask_leaves_the_pixels_outside_alone(page, server, pipeline):
    photo = photograph()
    drop_file(page.locator("body"), as_png(photo))
    button(page, "Paint a mask").click()
    dialog = page.get_by_role("dialog", name="Mask")
    canvas = dialog.get_by_role("application")
    expect(canvas).to_be_visible()
    box = canvas.bounding_box()
    across, down = (lambda part: box["x"] + part * box["width"]), (lambda part: box["y"] + part * box["height"])
    page.mouse.move(across(0.45), down(0.45))
    page.mouse.down()
    page.mouse.move(across(0.55), down(0.5), steps=5)
    page.mouse.up()
    button(dialog, "Done").click()
    expect(dialog).to_be_hidden()
    job = make(page, "a red apple", Steps=6, Seed=5)
    mask = decode(job.body["mask_image"])
    assert mask.size == photo.size
    settings = {"num_inference_steps": 6, "seed": 5}
    expected = pipeline.generate("a red apple", image=photo, mask_image=mask, **settings)
    image, before = saved(server, job), np.asarray(photo)
    np.testing.assert_array_equal(image, np.asarray(expected.images[0]))
    painted = np.asarray(mask.convert("RGBA").convert("L")) > 0
    assert 0 < painted.mean() < 0.5
    np.testing.assert_array_equal(image[~painted], before[~painted])
    assert (image[painted] != before[painted]).any()


def test_a_mask_stays_if_the_page_is_loaded_again(page):
    drop_file(page.locator("body"), as_png(photograph()))
    button(page, "Paint a mask").click()
    dialog = page.get_by_role("dialog", name="Mask")
    dialog.get_by_role("application").click()
    button(dialog, "Done").click()
    before = start(page, "a red apple", Steps=2).body
    page.reload()
    expect(init_image(page).get_by_role("img")).to_be_visible()
    after = start(page, Steps=2).body
    for name in ("image", "mask_image"):
        assert np.array_equal(decode(before[name]), decode(after[name]))


def test_an_image_of_sdonnx_restores_every_field(page, server):
    fields = {
        "prompt": "a (red:1.3) apple", "negative_prompt": "blue", "width": 48, "height": 64, "num_inference_steps": 5,
        "guidance_scale": 3.5, "seed": 2**60 + 1, "num_images": 1, "sampler": "euler_ancestral", "schedule": "karras",
        "eta": 0.5, "variation": [9, 0.25], "clip_skip": 2, "guidance_rescale": 0.5, "hires_scale": 1.5,
        "hires_strength": 0.6, "cache_interval": 3, "token_downsampling": True,
    }  # fmt: skip
    with httpx.Client(base_url=server.url, timeout=60) as client:
        job = client.post("/api/jobs", json=fields).json()
        server.wait_until_idle()
        (image,) = client.get(f"/api/jobs/{job['id']}").json()["images"]
        png = client.get(image["url"]).content
    drop_file(page.locator("body"), png)
    button(page, "Use its parameters").click()
    expect(prompt(page)).to_have_value("a (red:1.3) apple")
    again = make(page)
    defaults = {name: getattr(Request(prompt=""), name) for name in again.body if hasattr(Request(prompt=""), name)}
    sent = {name: value for name, value in again.body.items() if value != defaults.get(name, ...)}
    assert {name: value for name, value in fields.items() if name != "num_images"} == {
        name: value for name, value in sent.items() if name in fields
    }
    with httpx.Client(base_url=server.url, timeout=60) as client:
        made = Image.open(io.BytesIO(png))
        np.testing.assert_array_equal(saved(server, again), np.asarray(made))


@pytest.mark.parametrize("act", [drop_file, paste_file], ids=["dropped", "pasted"])
def test_an_image_of_a1111_restores_every_field(page, act):
    act(page.locator("body"), as_png(photograph(), parameters=INFOTEXT))
    button(page, "Use its parameters").click()
    expect(prompt(page)).to_have_value("a red apple")
    expect(page.get_by_role("textbox", name="Negative prompt")).to_have_value("blue, (green:1.2)")
    for name, value in {"Steps": 6, "Guidance": 5.5, "Seed": 123, "Width": 64, "Height": 48}.items():
        expect(number(page, name)).to_have_value(str(value))
    for name, value in {"Sampler": "euler_ancestral", "Schedule": "karras"}.items():
        expect(page.get_by_role("combobox", name=name)).to_have_value(value)
    job = start(page)
    assert job.body["clip_skip"] == 2
    assert "image" not in job.body


def test_an_image_with_parameters_may_be_the_init_image_all_the_same(page):
    drop_file(page.locator("body"), as_png(photograph(), parameters=INFOTEXT))
    button(page.locator("#offer"), "Use as init image").click()
    expect(init_image(page).get_by_role("img")).to_be_visible()
    expect(prompt(page)).not_to_have_value("a red apple")


def test_strength_is_a_slider_and_a_number(page):
    drop_file(page.locator("body"), as_png(photograph()))
    fill(page, Strength=0.4)
    slider = page.get_by_role("slider", name="Strength")
    expect(slider).to_have_value("0.4")
    slider.press("ArrowRight")
    expect(number(page, "Strength")).to_have_value("0.41")
