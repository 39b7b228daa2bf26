"""`<mask-editor>`: the mask is what was painted, to the pixel, and undo restores it."""

import numpy as np
import pytest
from playwright.sync_api import expect
from support.browser import drop_file
from support.mask_editor import assert_is_stroke, png


@pytest.mark.parametrize("end", [(200, 100), (100, 200), (217, 301), (100, 100)])
@pytest.mark.parametrize("scale", [1, 2])
def test_a_stroke_is_the_pixels_within_half_a_brush(open_editor, end, scale):
    editor = open_editor(device_scale_factor=scale)
    editor.set_size(20)
    editor.stroke((100, 100), end)
    assert_is_stroke(editor.mask(), (100, 100), end, 20)
    assert editor.changes == 1


@pytest.mark.parametrize(("size", "pixels"), [(1, 1), (2, 4), (3, 9)])
def test_small_brushes_are_whole_pixels(editor, size, pixels):
    editor.set_size(size)
    editor.stroke((100.5, 60.5))
    mask = editor.mask()
    assert mask.sum() == pixels
    assert mask[60, 100]


def test_a_line_of_one_pixel_has_no_gaps(editor):
    editor.set_size(1)
    editor.stroke((20.5, 30.5), (420.5, 190.5), steps=2)
    assert editor.mask()[:, 20:421].any(axis=0).all()


def test_a_stroke_may_leave_the_image(editor):
    editor.set_size(300)
    editor.stroke((-40, 256), (40, 256), (40, 560))
    mask = editor.mask()
    assert mask[256, 0]
    assert mask[511, 40]
    assert not mask[:, 200:].any()


def test_shift_and_a_click_draw_a_straight_line(editor):
    editor.set_size(16)
    editor.stroke((50, 60))
    editor.page.keyboard.down("Shift")
    editor.stroke((400, 330))
    editor.page.keyboard.up("Shift")
    assert_is_stroke(editor.mask(), (50, 60), (400, 330), 16)


def test_the_eraser_takes_pixels_away(editor):
    editor.set_size(60)
    editor.stroke((100, 100), (300, 100))
    before = editor.mask()
    editor.choose("Eraser")
    editor.set_size(20)
    editor.stroke((150, 100), (250, 100))
    after = editor.mask()
    assert not (after & ~before).any()
    assert_is_stroke(before & ~after, (150, 100), (250, 100), 20)


def test_undo_and_redo_restore_every_byte(editor):
    editor.set_size(30)
    masks = [editor.mask()]
    for k in range(12):
        editor.choose("Eraser" if k % 3 == 2 else "Brush")
        editor.stroke((30 + 40 * k, 400 - 30 * k), (480 - 35 * k, 60 + 30 * k))
        masks.append(editor.mask())
    editor.press("Invert")
    masks.append(editor.mask())
    for mask in masks[-2::-1]:
        editor.page.keyboard.press("Control+z")
        np.testing.assert_array_equal(editor.mask(), mask)
    expect(editor.page.get_by_role("button", name="Undo")).to_be_disabled()
    for k, mask in enumerate(masks[1:]):
        editor.page.keyboard.press(("Control+y", "Control+Shift+z")[k % 2])
        np.testing.assert_array_equal(editor.mask(), mask)
    expect(editor.page.get_by_role("button", name="Redo")).to_be_disabled()
    assert editor.blob() is not None


def test_a_new_stroke_ends_what_can_be_redone(editor):
    editor.stroke((100, 100), (200, 100))
    editor.press("Undo")
    editor.stroke((300, 300), (350, 300))
    expect(editor.page.get_by_role("button", name="Redo")).to_be_disabled()


def test_invert_and_clear(editor):
    editor.stroke((100, 100), (200, 100))
    mask = editor.mask()
    editor.press("Invert")
    np.testing.assert_array_equal(editor.mask(), ~mask)
    editor.press("Clear")
    assert editor.blob() is None
    assert editor.page.evaluate("document.querySelector('mask-editor').isEmpty")
    expect(editor.page.get_by_text("Mask 512 \u00d7 512, 0 % painted")).to_be_visible()
    editor.press("Undo")
    np.testing.assert_array_equal(editor.mask(), ~mask)
    assert editor.changes == 4


def test_the_share_that_is_painted_is_shown(editor):
    pixels = np.zeros((512, 512), np.uint8)
    pixels[:128, :256] = 255
    drop_file(editor.canvas, png(pixels))
    expect(editor.page.get_by_text("Mask 512 \u00d7 512, 13 % painted")).to_be_visible()
    editor.press("Clear")
    editor.press("Invert")
    expect(editor.page.get_by_text("Mask 512 \u00d7 512, 100 % painted")).to_be_visible()


def test_the_keyboard_paints(editor):
    editor.set_size(9)
    editor.page.get_by_label("Load a mask").focus()
    editor.page.keyboard.press("Tab")
    expect(editor.canvas).to_be_focused()
    for key in ("ArrowLeft", "Shift+ArrowUp", "ArrowDown", "ArrowDown"):
        editor.page.keyboard.press(key)
    expect(editor.page.get_by_role("status")).to_have_text("255, 248, not painted")
    editor.page.keyboard.press("Enter")
    assert_is_stroke(editor.mask(), (255.5, 248.5), (255.5, 248.5), 9)
    expect(editor.page.get_by_role("status")).to_contain_text("Painted")
    editor.page.keyboard.down(" ")
    editor.page.keyboard.press("Shift+ArrowRight")
    editor.page.keyboard.press("Shift+ArrowRight")
    editor.page.keyboard.up(" ")
    assert_is_stroke(editor.mask(), (255.5, 248.5), (275.5, 248.5), 9)
    assert editor.changes == 2
    editor.page.keyboard.press("e")
    editor.page.keyboard.press("Space")
    assert not editor.mask()[248, 275]
