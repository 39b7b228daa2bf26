"""The page reads well: at every width, in the dark, by keyboard and screen reader, and nothing jumps."""

import base64
import re
from pathlib import Path

import pytest
from chromium import read_layout_shifts, watch_layout_shifts
from playwright.sync_api import expect
from support.browser import drop_file
from support.images import in_base64, photograph
from support.javascript import install_packages
from support.page import LONG, button, make, prompt, region, shown, start, status

WIDTHS = (360, 768, 1280, 2560)


@pytest.fixture(scope="module")
def axe():
    folder = install_packages(Path(__file__).parent / "js")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture
def photo():
    return base64.b64decode(in_base64(photograph()))


def overflow(page):
    """What is wider than the window, or outside of it."""
    return page.evaluate("""() => {
      const width = document.documentElement.clientWidth
      const wide = [...document.body.querySelectorAll("*")].filter((each) => {
        const box = each.getBoundingClientRect()
        const scrolls = each.closest("pre, .visually-hidden, mask-editor")
        return box.width > 0 && !scrolls && (box.right > width + 1 || box.left < -1)
      })
      const scrolls = document.documentElement.scrollWidth > width ? ["the page scrolls sideways"] : []
      return [...scrolls, ...wide.map((each) => `${each.nodeName}#${each.id} ${each.className}`)]
    }""")


def violations(page, axe):
    page.evaluate(axe)
    found = page.evaluate("() => axe.run({ resultTypes: ['violations'] })")["violations"]
    return [f"{each['id']}: {node['html'][:200]} {node['failureSummary']}" for each in found for node in each["nodes"]]


def loaded(page):
    expect(page.locator("#plan")).not_to_be_empty()
    return page


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(server, visits, photo, width):
    page = visits(server.url, viewport={"width": width, "height": 800}, has_touch=width < 800)
    make(loaded(page), "a fox " + "on a very-long-word-that-never-ends" * 8, Steps=2)
    assert overflow(page) == []
    drop_file(page.locator("body"), photo)
    expect(page.get_by_role("group", name="Init image").get_by_role("img")).to_be_visible()
    assert overflow(page) == []
    button(page, "Paint a mask").click()
    assert overflow(page) == []
    button(page.get_by_role("dialog", name="Mask"), "Cancel").click()
    region(page, "Gallery").get_by_role("list").get_by_role("button").first.click()
    expect(page.get_by_role("dialog", name="Image parameters")).to_be_visible()
    assert overflow(page) == []


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 1280), ("dark", 360)], ids=["light", "dark", "phone"]
)
def test_axe_finds_nothing(server, visits, photo, axe, scheme, width):
    page = visits(server.url, color_scheme=scheme, viewport={"width": width, "height": 800}, reduced_motion="reduce")
    assert violations(loaded(page), axe) == []
    make(page, "a fox", Steps=2)
    drop_file(page.locator("body"), photo)
    assert violations(page, axe) == []
    button(page, "Paint a mask").click()
    assert violations(page, axe) == []
    button(page.get_by_role("dialog", name="Mask"), "Cancel").click()
    region(page, "Gallery").get_by_role("list").get_by_role("button").first.click()
    expect(page.get_by_role("dialog", name="Image parameters")).to_be_visible()
    assert violations(page, axe) == []
    page.keyboard.press("Escape")
    start(page, **LONG)
    page.get_by_role("button", name="Queue").click()
    expect(region(page, "Queue").get_by_role("listitem").first).to_be_visible()
    assert violations(page, axe) == []
    page.keyboard.press("Escape")
    button(page, "Cancel").click()


def test_dark_is_dark_and_light_is_light(server, visits):
    def brightness(scheme):
        page = visits(server.url, color_scheme=scheme)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor || 'none'")
        channels = [float(each) for each in colour.removeprefix("rgba(").removeprefix("rgb(").rstrip(")").split(",")]
        return sum(channels[:3]) / 3

    assert brightness("light") > 220
    assert brightness("dark") < 60


def test_nothing_moves_for_those_who_asked_for_it(server, visits):
    page = visits(server.url, reduced_motion="reduce")
    start(loaded(page), "a fox", **LONG)
    expect(status(page)).to_contain_text("Step")
    assert page.evaluate("document.getAnimations().filter((each) => each.effect.getTiming().duration > 1).length") == 0
    button(page, "Cancel").click()


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_jumps_while_an_image_is_made(server, visits, width):
    page = visits(server.url, viewport={"width": width, "height": 800})
    loaded(page)
    page.wait_for_timeout(500)
    watch_layout_shifts(page)
    make(page, "a fox", Steps=30, Images=2)
    start(page, "a tiger", **LONG)
    expect(status(page)).to_contain_text("Step")
    button(page, "Cancel").click()
    expect(status(page)).to_contain_text("Cancelled")
    assert read_layout_shifts(page) == []


def test_nothing_jumps_while_the_page_loads(server, visits):
    page = visits(server.url)
    loaded(page)
    page.wait_for_timeout(500)
    watch_layout_shifts(page, from_load=True)
    assert read_layout_shifts(page) == []


def test_the_keyboard_alone_makes_an_image(page):
    """Enter makes the first; later, Tab goes through all in its order, and each shows its focus."""
    loaded(page)
    page.keyboard.press("Enter")
    expect(shown(page)).to_have_attribute("alt", re.compile("Result"))
    page.reload()
    loaded(page)
    seen, wanted = [], ["Model", "Prompt", "Negative prompt", "Generate", "Steps", "Seed"]
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outlined = page.evaluate("""() => {
          const element = document.activeElement, style = getComputedStyle(element)
          const label = element.getAttribute("aria-label") || element.labels?.[0]?.firstChild.textContent
          return [(label || element.textContent).trim(), style.outlineStyle !== "none" || style.boxShadow !== "none"]
        }""")
        seen.append(name)
        assert outlined, f"{name} shows no focus"
        if name == "Prompt":
            page.keyboard.press("Control+a")
            page.keyboard.type("a fox")
        if name == "Steps":
            page.keyboard.type("3")
        if name == "Seed":
            break
    assert [each for each in seen if each in wanted] == wanted
    page.keyboard.press("Enter")
    expect(shown(page)).to_have_attribute("alt", re.compile("Result"))
    expect(prompt(page)).to_have_value("a fox")


def test_progress_is_announced_seldom(page):
    """A live region speaks at milestones, not at every step."""
    loaded(page)
    page.evaluate("""() => {
      window.said = []
      for (const region of document.querySelectorAll("[role=status], [role=alert], [aria-live]"))
        new MutationObserver(() => window.said.push(region.textContent.trim()))
          .observe(region, { childList: true, characterData: true, subtree: true })
    }""")
    make(page, "a fox", Steps=100)
    said = page.evaluate("window.said.filter((text) => text)")
    assert 1 <= len(said) <= 10, said


def test_axe_finds_nothing_at_the_door(serve, visits, axe):
    visits.refusals.add(401)
    page = visits(serve(token="correct-horse").url)
    expect(page.get_by_role("dialog", name="Sign in")).to_be_visible()
    assert violations(page, axe) == []
