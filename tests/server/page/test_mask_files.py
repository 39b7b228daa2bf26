"""`<mask-editor>`: masks that come as files."""

import base64

import numpy as np
from playwright.sync_api import expect
from support.browser import drop_file, paste_file
from support.mask_editor import Editor, png


def test_a_dropped_mask_is_scaled_and_cut_at_half(open_editor):
    editor = open_editor(640, 384)
    pixels = np.zeros((48, 80, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:, :20, :3] = 255
    pixels[:, 20:40, :3] = 120
    pixels[:, 40:60, :3] = 140
    pixels[:, 60:] = (255, 255, 255, 0)
    drop_file(editor.canvas, png(pixels))
    expect(editor.page.get_by_text("Mask 640 \u00d7 384, 50 % painted")).to_be_visible()
    mask = editor.mask()
    columns = np.arange(640)
    for start, painted in ((0, True), (160, False), (320, True), (480, False)):
        inner = (columns > start + 8) & (columns < start + 152)
        assert (mask[:, inner] == painted).all()
    editor.press("Undo")
    assert editor.blob() is None


def test_masks_are_picked_and_pasted(editor):
    pixels = np.zeros((512, 512), np.uint8)
    pixels[40:90, 17:300] = 255
    editor.page.get_by_label("Load a mask").set_input_files(
        {"name": "mask.png", "mimeType": "image/png", "buffer": png(pixels)}
    )
    expect(editor.page.get_by_text("5.4 % painted")).to_have_count(1)
    np.testing.assert_array_equal(editor.mask(), pixels > 0)
    paste_file(editor.canvas, png(255 - pixels))
    expect(editor.page.get_by_text("95 % painted")).to_have_count(1)
    np.testing.assert_array_equal(editor.mask(), pixels == 0)


def test_a_file_that_is_no_image_is_refused(editor):
    editor.stroke((100, 100), (200, 100))
    mask = editor.mask()
    drop_file(editor.canvas, b"not an image")
    expect(editor.page.get_by_role("alert")).to_contain_text("choose a PNG, JPEG or WebP")
    np.testing.assert_array_equal(editor.mask(), mask)


def test_another_image_starts_with_its_mask_and_no_history(editor):
    pixels = np.zeros((300, 200), np.uint8)
    pixels[10:100, 20:30] = 255
    editor.stroke((100, 100), (200, 100))
    editor.page.evaluate(
        """([mask]) => {
          const blob = new Blob([Uint8Array.from(atob(mask), (each) => each.charCodeAt(0))])
          const canvas = new OffscreenCanvas(200, 300)
          canvas.getContext("2d")
          return document.querySelector("mask-editor").setImage(canvas.transferToImageBitmap(), blob)
        }""",
        [base64.b64encode(png(pixels)).decode()],
    )
    other = Editor(page=editor.page, width=200, height=300)
    np.testing.assert_array_equal(other.mask(), pixels > 0)
    expect(editor.page.get_by_role("button", name="Undo")).to_be_disabled()
