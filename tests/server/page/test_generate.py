"""Making an image: what is said before, during and after it."""

import re

import httpx
import numpy as np
from playwright.sync_api import expect
from sdonnx_models import DEFAULT, bundled
from support.browser import open_tab
from support.page import (
    LONG,
    button,
    expect_result,
    make,
    number,
    prompt,
    region,
    saved,
    shown,
    start,
    status,
)


def test_one_key_makes_the_first_image(page, server, pipeline):
    """The page opens with an example prompt of pictogram, and tells how to get a real model."""
    expect(prompt(page)).not_to_have_value("")
    expect(page.get_by_text("sdonnx export")).to_be_visible()
    expect(page.locator("#plan")).to_have_text(re.compile(r"\d.* s .*\d.* [GM]B"))
    job = start(page)
    expect_result(page, job)
    button(page, "Last seed").click()
    seed = int(number(page, "Seed").input_value())
    expected = pipeline.generate(prompt(page).input_value(), seed=seed)
    np.testing.assert_array_equal(saved(server, job), np.asarray(expected.images[0]))
    assert page.evaluate("document.querySelector('#shown img').naturalWidth") == 64


def test_defaults_of_the_package_are_placeholders(page):
    for name, default in {"Steps": "25", "Guidance": "4", "Width": "64", "Height": "64", "Images": "1"}.items():
        expect(number(page, name)).to_have_value("")
        expect(number(page, name)).to_have_attribute("placeholder", default)


def test_settings_are_those_of_the_job(page, server, pipeline):
    page.get_by_role("textbox", name="Negative prompt").fill("blue")
    page.get_by_role("combobox", name="Sampler").select_option(label="Euler a")
    page.get_by_role("combobox", name="Schedule").select_option(label="Karras")
    page.get_by_role("combobox", name="Seamless tiling").select_option(label="Left to right")
    job = make(page, "a red apple", Steps=5, Guidance=3.5, Seed=7, Width=64, Height=48, Images=2)
    fields = {"negative_prompt": "blue", "sampler": "euler_ancestral", "schedule": "karras", "num_images": 2}
    fields |= {"tiling": "x"}
    fields |= {"num_inference_steps": 5, "guidance_scale": 3.5, "seed": 7, "width": 64, "height": 48}
    assert {"prompt": "a red apple", **fields}.items() <= job.body.items()
    expected = pipeline.generate("a red apple", **fields)
    for index, image in enumerate(expected.images):
        np.testing.assert_array_equal(saved(server, job, index), np.asarray(image))


def test_steps_and_previews_are_shown_as_they_come(page):
    start(page, "a tiger", **LONG)
    expect(shown(page)).to_have_attribute("src", re.compile("preview"))
    first = shown(page).get_attribute("src")
    expect(shown(page)).not_to_have_attribute("src", first)
    expect(status(page)).to_have_text(re.compile(r"Step \d+ of 100"))
    expect(status(page)).to_have_text(re.compile(r" left$"))
    bar = region(page, "Image").get_by_role("progressbar")
    before = bar.evaluate("(bar) => bar.value")
    page.wait_for_function("(before) => document.querySelector('#progress').value > before", arg=before)
    expect(page).to_have_title(re.compile(r"^\(\d+ %\) sdonnx"))
    button(page, "Cancel").click()
    expect(page).to_have_title(re.compile(r"^sdonnx"))


def test_cancel_and_escape_end_the_job(page, server):
    for cancel in (button(page, "Cancel").click, lambda: page.keyboard.press("Escape")):
        start(page, "a tiger", **LONG)
        expect(status(page)).to_have_text(re.compile(r"Step \d+"))
        cancel()
        expect(status(page)).to_have_text(re.compile(r"Cancelled after step \d+"))
        server.wait_until_idle()
        assert server.context.queue.jobs[-1].state.value == "cancelled"
    make(page, "a tiger", Steps=2, Images=1)


def test_a_reload_goes_on_with_the_job(page):
    start(page, "a tiger", Seed=11, **LONG)
    expect(status(page)).to_have_text(re.compile(r"Step \d+"))
    page.reload()
    expect(prompt(page)).to_have_value("a tiger")
    for name, value in {"Seed": 11, **LONG}.items():
        expect(number(page, name)).to_have_value(str(value))
    expect(status(page)).to_have_text(re.compile(r"Step \d+ of 100"))
    expect(shown(page)).to_have_attribute("src", re.compile("preview"))
    expect(shown(page)).not_to_have_attribute("src", shown(page).get_attribute("src"))
    page.keyboard.press("Escape")
    expect(status(page)).to_have_text(re.compile(r"Cancelled after step \d+"))


def test_what_ended_while_the_page_was_closed_is_shown(page, server):
    job = start(page, "a fox", Steps=4, Seed=3)
    page.goto("about:blank")
    server.wait_until_idle()
    page.goto(server.url)
    expect_result(page, job)
    expect(region(page, "Gallery").get_by_role("button").first).to_be_visible()


def test_two_tabs_and_two_visitors_share_the_queue(page, server, visits):
    start(page, "a tiger", **LONG)
    start(page, "a fox")
    tab, visitor = open_tab(page), visits(server.url)
    for each in (page, tab, visitor):
        expect(each.locator("#queue-count")).to_have_text(re.compile("2"))
    for each in (tab, visitor):
        each.get_by_role("button", name="Queue").click()
        jobs = region(each, "Queue").get_by_role("listitem")
        expect(jobs).to_have_count(2)
        expect(jobs.nth(0)).to_contain_text("a tiger")
        expect(jobs.nth(1)).to_contain_text("a fox")
    region(visitor, "Queue").get_by_role("listitem").nth(0).get_by_role("button", name="Cancel job").click()
    expect(region(tab, "Queue").get_by_role("listitem").first).to_contain_text("a fox")


def test_a_wrong_number_is_told_beside_it(page, server, visits):
    visits.refusals.add(400)
    jobs = len(server.context.queue.jobs)
    wrong = (("Steps", 2000, "at most 200"), ("Guidance", 2000, "-1000 to 1000"), ("Images", 65, "at most 64"))
    for name, value, words in wrong:
        field = number(page, name)
        field.fill(str(value))
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_have_accessible_description(re.compile(words))
        prompt(page).press("Control+Enter")
        field.fill("")
        expect(field).not_to_have_attribute("aria-invalid", "true")
    assert len(server.context.queue.jobs) == jobs


def test_sides_become_multiples_and_swap(page):
    number(page, "Width").fill("50")
    number(page, "Width").press("Tab")
    expect(number(page, "Width")).to_have_value("52")
    button(page, "Swap width and height").click()
    expect(number(page, "Width")).to_have_value("64")
    expect(number(page, "Height")).to_have_value("52")
    size = page.get_by_role("combobox", name="Size")
    size.select_option(index=0)
    expect(number(page, "Width")).to_have_value("")
    size.select_option(label=size.get_by_role("option").nth(2).inner_text())
    expect(number(page, "Width")).not_to_have_value("")


def test_what_does_not_fit_into_memory_is_told_before(server, serve, visits):
    """What would fit is offered, and one click makes it so."""
    large = {"prompt": "a fox", "width": 2048, "height": 2048}
    smallest = httpx.post(f"{server.url}/api/plan", json=large, timeout=60).json()["memory"]["smallest"]
    server = serve(memory=f"{(smallest - 200_000_000) // 1_000_000}M")
    page = visits(server.url)
    plan = page.locator("#plan")
    visits.refusals.add(400)
    expect(plan).to_have_text(re.compile("About"))
    number(page, "Width").fill("2048")
    number(page, "Height").fill("2048")
    expect(plan).to_have_text(re.compile(r"requires at least .* of memory; the server has"))
    smaller = page.get_by_role("button", name=re.compile(r"^Use \d+ . \d+"))
    expect(smaller).to_be_visible()
    with page.expect_response("**/api/jobs") as reply:
        prompt(page).press("Control+Enter")
    assert reply.value.status == 400
    expect(page.get_by_text(reply.value.json()["detail"])).to_be_visible()
    smaller.click()
    expect(plan).to_have_text(re.compile("About"))
    assert int(number(page, "Width").input_value()) < 2048


def test_tokens_are_counted_with_the_chunks_borders(page):
    prompt(page).fill("cat " * 31)
    expect(page.locator("#tokens")).to_have_text(re.compile(r"31"))
    prompt(page).fill("a cat")
    expect(page.locator("#tokens")).to_have_text(re.compile(r"\b2\b"))


def test_the_keys_of_a1111_weight_words(page):
    prompt(page).fill("a red apple")
    prompt(page).evaluate("(box) => box.setSelectionRange(2, 5)")
    prompt(page).press("Control+ArrowUp")
    expect(prompt(page)).to_have_value("a (red:1.1) apple")
    prompt(page).press("Control+ArrowDown")
    prompt(page).press("Control+ArrowDown")
    expect(prompt(page)).to_have_value("a (red:0.9) apple")


def test_hires_fix_and_fast_are_switches(page, server):
    page.get_by_role("checkbox", name="Hires fix").check()
    page.get_by_role("checkbox", name="Fast").check()
    job = make(page, "a fox", Steps=3)
    assert job.body["hires_scale"] > 1
    assert job.body["cache_interval"] == 3
    assert saved(server, job).shape[0] > 64


def test_hires_fix_with_another_upscaler(visits, serve, upscaler):
    other = serve(packages=(bundled()[DEFAULT], upscaler[1]))
    page = visits(other.url)
    page.wait_for_selector("body.ready")
    choice = page.get_by_role("combobox", name="Upscaler")
    expect(choice).to_be_hidden()
    page.get_by_role("checkbox", name="Hires fix").check()
    assert choice.locator("option").all_inner_texts() == ["Latent", "Lanczos", "sharp-onnx"]
    assert "hires_upscaler" not in make(page, "a fox", Steps=2).body
    choice.select_option("sharp-onnx")
    job = make(page, "a fox", Steps=2)
    assert job.body["hires_upscaler"] == "sharp-onnx"
    page.reload()
    expect(choice).to_have_value("sharp-onnx")


def test_what_is_typed_while_the_page_loads_stays(server, visits):
    page = visits(server.url, wait_until="commit")
    prompt(page).fill("a whale")
    number(page, "Steps").fill("3")
    page.wait_for_selector("body.ready")
    expect(prompt(page)).to_have_value("a whale")
    assert make(page).body.items() >= {"prompt": "a whale", "num_inference_steps": 3}.items()


def test_a_refused_job_is_told_until_something_changes(page, visits):
    visits.refusals.add(400)
    page.route("**/api/jobs", lambda route: route.continue_(post_data='{"prompt": "x", "schedule": "no"}'))
    prompt(page).press("Control+Enter")
    error = page.get_by_text("schedule is 'no'; choose", exact=False)
    expect(error).to_be_visible()
    page.wait_for_timeout(1000)
    expect(error).to_be_visible()
    expect(status(page)).not_to_contain_text("Starting")
