"""`<mask-editor>`: zoom, pan, touch, sizes of images and windows."""

from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect
from support.javascript import install_packages
from support.mask_editor import assert_is_stroke


@pytest.mark.parametrize("scale", [1, 2])
def test_painting_lands_where_the_pointer_is_when_zoomed(open_editor, scale):
    editor = open_editor(device_scale_factor=scale)
    editor.set_size(1)
    x, y = editor.at(130.5, 350.5)
    editor.page.mouse.move(x, y)
    editor.page.keyboard.down("Control")
    for _ in range(6):
        editor.page.mouse.wheel(0, -100)
    editor.page.keyboard.up("Control")
    editor.page.mouse.down()
    editor.page.mouse.up()
    assert np.argwhere(editor.mask()).tolist() == [[350, 130]]
    assert zoom(editor) > 5


def zoom(editor):
    """How many times larger than fitting a brush is shown."""
    editor.set_size(10)
    editor.page.mouse.move(*editor.at(256, 256))
    shown = editor.page.locator(".mask-brush").bounding_box()["width"]
    one = editor.at(10, 0)[0] - editor.at(0, 0)[0]
    return shown / one


def test_buttons_and_keys_zoom(editor):
    assert zoom(editor) == pytest.approx(1, abs=0.02)
    editor.press("Zoom in")
    editor.page.keyboard.press("+")
    assert zoom(editor) == pytest.approx(1.25**2, rel=0.02)
    editor.page.keyboard.press("-")
    editor.press("Zoom out")
    editor.press("Zoom out")
    assert zoom(editor) == pytest.approx(0.8, rel=0.02)
    editor.page.keyboard.press("0")
    assert zoom(editor) == pytest.approx(1, abs=0.02)
    assert editor.blob() is None


@pytest.mark.parametrize("how", ["left", "middle"])
def test_space_or_the_middle_button_pans(editor, how):
    editor.set_size(1)
    mouse, keyboard = editor.page.mouse, editor.page.keyboard
    mouse.click(600, 500)
    mask = editor.mask()
    editor.press("Undo")
    mouse.click(20, 500)  # beside the image
    editor.canvas.focus()
    mouse.move(600, 500)
    if how == "left":
        keyboard.down(" ")
    mouse.down(button=how)
    mouse.move(640, 470, steps=4)
    mouse.up(button=how)
    if how == "left":
        keyboard.up(" ")
    assert editor.blob() is None
    mouse.click(640, 470)
    np.testing.assert_array_equal(editor.mask(), mask)


def test_wheel_and_brackets_change_the_brush(editor):
    editor.set_size(1)
    slider = editor.page.get_by_role("slider", name="Brush size")
    editor.canvas.hover()
    editor.page.keyboard.press("]")
    expect(slider).to_have_value("2")
    editor.page.mouse.wheel(0, -100)
    expect(slider).to_have_value("3")
    editor.page.mouse.wheel(0, 100)
    editor.page.keyboard.press("[")
    editor.page.keyboard.press("[")
    expect(slider).to_have_value("1")
    editor.set_size(500)
    editor.page.keyboard.press("]")
    expect(slider).to_have_value("500")
    assert editor.changes == 0


def test_one_finger_paints_and_two_zoom(open_editor):
    editor = open_editor(viewport={"width": 360, "height": 740}, device_scale_factor=3, has_touch=True, is_mobile=True)
    session = editor.page.context.new_cdp_session(editor.page)

    def touch(kind, *points):
        fingers = [dict(zip("xy", editor.at(*point), strict=True), id=k) for k, point in enumerate(points)]
        session.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": fingers})

    editor.set_size(20)
    touch("Start", (100, 100))
    touch("Move", (150, 100))
    touch("Move", (200, 100))
    touch("End")
    mask = editor.mask()
    assert_is_stroke(mask, (100, 100), (200, 100), 20, slack=1.5)

    touch("Start", (200, 250))
    touch("Start", (200, 250), (300, 250))
    touch("Move", (150, 250), (350, 250))
    touch("Move", (100, 250), (400, 250))
    touch("End", (100, 250))
    touch("Move", (110, 260))
    touch("End")
    np.testing.assert_array_equal(editor.mask(), mask)
    assert editor.changes == 1
    assert zoom(editor) == pytest.approx(3, rel=0.05)


def test_large_masks_keep_their_history_within_bounds(open_editor):
    editor = open_editor(4096, 4096)
    session = editor.page.context.new_cdp_session(editor.page)
    editor.set_size(200)

    def used():
        session.send("HeapProfiler.collectGarbage")
        return session.send("Runtime.getHeapUsage")["backingStorageSize"]

    before = used()
    for k in range(50):
        editor.stroke((80 * k, 40 * k), (80 * k + 100, 40 * k + 60), steps=3)
    mask = editor.mask()
    assert used() - before < 16 * 2**20
    for _ in range(50):
        editor.page.keyboard.press("Control+z")
    assert editor.blob() is None
    for _ in range(50):
        editor.page.keyboard.press("Control+y")
    np.testing.assert_array_equal(editor.mask(), mask)


def test_it_fits_a_phone(open_editor):
    editor = open_editor(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    assert editor.page.evaluate("document.documentElement.scrollWidth") == 360
    heights = editor.page.evaluate(
        "[...document.querySelectorAll('mask-editor :is(button, label)')].map((each) => each.offsetHeight)"
    )
    assert min(heights) >= 40
    assert editor.canvas.bounding_box()["height"] > 400


def test_in_a_dialog_the_crosshair_starts_in_the_middle(editor):
    editor.page.evaluate("""() => {
      const dialog = document.body.appendChild(document.createElement("dialog"))
      dialog.append(document.querySelector("mask-editor"))
      dialog.style.width = dialog.style.height = "600px"
    }""")
    editor.page.keyboard.press("Tab")
    editor.page.evaluate("""() => {
      document.querySelector("dialog").showModal()
      document.querySelector("mask-editor canvas").focus()
    }""")
    editor.set_size(1)
    editor.canvas.press("Enter")
    assert np.argwhere(editor.mask()).tolist() == [[256, 256]]


def test_nothing_is_said_against_it_by_axe(editor):
    tools = install_packages(Path(__file__).parent / "js")
    editor.stroke((100, 100), (200, 100))
    script = (tools / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
    editor.page.evaluate(script)
    for scheme in ("light", "dark"):
        editor.page.emulate_media(color_scheme=scheme)
        found = editor.page.evaluate("axe.run('mask-editor', {resultTypes: ['violations']})")["violations"]
        assert not found, found
