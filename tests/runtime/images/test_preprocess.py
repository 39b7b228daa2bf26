"""Images that come in: files, depths, fitting, masks, and canvases for outpainting."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.images.preprocess import (
    bicubic,
    blur_mask_inward,
    flatten_alpha,
    latent_mask,
    open_image,
    outpaint_canvas,
    resize_to_fit,
    snap_mask_to_latents,
    suitable_size,
    to_mask,
)
from support.images import disc, photograph

import sdonnx


def test_the_latent_pixels_of_a_mask():
    mask = Image.new("L", (32, 16))
    mask.paste(255, (7, 0, 17, 9))
    assert latent_mask(mask, 8).tolist() == [[[[1, 1, 1, 0], [1, 1, 1, 0]]]]
    assert latent_mask(mask, 8, first_pixel=True).tolist() == [[[[0, 1, 1, 0], [0, 1, 1, 0]]]]
    theirs = torch.nn.functional.interpolate(torch.from_numpy(np.asarray(mask) / 255.0)[None, None], size=(2, 4))
    assert latent_mask(mask, 8, first_pixel=True).tolist() == theirs.tolist()  # as StableDiffusionInpaintPipeline
    grown = snap_mask_to_latents(mask, 8)
    assert grown.getbbox() == (0, 0, 24, 16)
    assert latent_mask(grown, 8).tolist() == latent_mask(grown, 8, first_pixel=True).tolist()


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((512, 512), (512, 512)), ((500, 260), (496, 256)), ((4000, 3000), (592, 440)), ((3, 200), (8, 200))],
)
def test_a_suitable_size(size, wanted):
    assert suitable_size(Image.new("RGB", size), area=512 * 512, multiple=8) == wanted


def test_fitting():
    wide = Image.new("RGB", (200, 100), "red")
    wide.paste("blue", (50, 0, 150, 100))
    assert resize_to_fit(wide, (200, 100), "crop") is wide
    cropped, padded, stretched = (np.asarray(resize_to_fit(wide, (64, 64), fit)) for fit in ("crop", "pad", "stretch"))
    assert (cropped[:, 4:-4] == (0, 0, 255)).all()
    assert (padded[:15] == 0).all()
    assert (padded[17:-17, 0] == (255, 0, 0)).all()
    assert (stretched[:, 0] == (255, 0, 0)).all()
    assert (stretched[:, 32] == (0, 0, 255)).all()


def test_a_mask_is_what_is_white_and_opaque():
    mask = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (2, 2, 5, 5))
    assert to_mask(mask).getbbox() == (2, 2, 5, 5)
    assert to_mask(Image.new("L", (8, 8), 127)).getbbox() is None
    assert to_mask(Image.new("1", (8, 8), 1)).getbbox() == (0, 0, 8, 8)


@pytest.mark.parametrize("name", ["gray.png", "gray.tif", "gray.pgm", "transparent.png"])
def test_sixteen_bits_become_eight(name, tmp_path):
    values = (np.arange(64 * 64, dtype=np.uint32).reshape(64, 64) * 16).astype(np.uint16)
    settings = {"transparency": int(values[9, 9])} if name == "transparent.png" else {}
    Image.fromarray(values).save(tmp_path / name, **settings)
    image = open_image(tmp_path / name)
    wanted = np.round(values / 257).astype(np.uint8)
    white = to_mask(image)
    np.testing.assert_array_equal(np.asarray(white) == 255, wanted >= 128)
    if settings:
        wanted[9, 9] = 255
    np.testing.assert_array_equal(np.asarray(flatten_alpha(image)), np.repeat(wanted[:, :, None], 3, axis=2))


@pytest.mark.parametrize(
    "mode", ["1", "CMYK", "HSV", "L", "LA", "LAB", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr"]
)
def test_modes_of_eight_bits_are_read_as_they_look(package, mode):
    shape = disc().convert("RGB")
    image = shape.convert("RGBA" if mode == "RGBa" else "L" if mode in ("LA", "PA") else "RGB").convert(mode)
    np.testing.assert_array_equal(to_mask(image), disc())
    assert np.abs(np.asarray(flatten_alpha(image), int) - np.asarray(shape, int)).max() <= 2
    with sdonnx.load(package) as pipe:
        pipe.resolve("a cat", image=image, mask_image=image)


def test_a_mask_fades_out_inwards_only():
    faded = np.asarray(blur_mask_inward(disc(), 4), int)
    assert (faded[np.asarray(disc()) == 0] == 0).all()
    assert faded.max() == 255
    assert set(np.unique(faded)) == {0, 51, 102, 153, 204, 255}
    np.testing.assert_array_equal(blur_mask_inward(disc(), 0), disc())
    assert (np.asarray(blur_mask_inward(Image.new("L", (20, 20), 255), 9)) == 255).all(), (
        "the image's border is not an edge"
    )


def test_a_mask_fades_by_the_mean_of_its_erosions():
    rng = np.random.default_rng(0)
    for shape, pixels in (((1, 1), 3), ((3, 2), 1), ((40, 33), 0), ((40, 33), 5)):
        mask = (rng.random(shape) < 0.9).astype(np.uint8) * 255
        eroded = [mask]
        for _ in range(pixels):
            windows = np.lib.stride_tricks.sliding_window_view(np.pad(eroded[-1], 1, mode="edge"), (3, 3))
            eroded.append(windows.min(axis=(2, 3)))
        wanted = (np.sum(eroded, axis=0, dtype=np.float32) / (pixels + 1)).round().astype(np.uint8)
        np.testing.assert_array_equal(blur_mask_inward(Image.fromarray(mask), pixels), wanted)


def test_files_that_are_not_images(tmp_path, monkeypatch):
    whole = tmp_path / "whole.png"
    photograph(200, 200).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "text.png").write_text("not an image")
    photograph().save(tmp_path / "drawing.eps")  # Pillow would run Ghostscript on it
    with pytest.raises(RequestError, match="it is not an image"):
        open_image(tmp_path / "drawing.eps")
    for name, message in {"cut.png": "damaged", "text.png": "not an image", "none.png": "No such file"}.items():
        with pytest.raises(RequestError, match=message):
            open_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    with pytest.raises(RequestError, match="million pixels"):
        open_image(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(RequestError, match="million pixels"):
        open_image(whole)


@pytest.mark.parametrize("suffix", ["avif", "bmp", "gif", "jp2", "jpg", "png", "qoi", "tga", "tif", "webp"])
def test_damaged_images_of_every_format_are_refused_or_read(suffix, tmp_path):
    path, rng = tmp_path / f"a.{suffix}", np.random.default_rng(0)
    try:
        photograph(16, 16).save(path)
    except (KeyError, OSError, ValueError):
        pytest.skip("this Pillow does not write it")
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(200):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        with suppress(RequestError):
            assert open_image(path).width > 0


@pytest.mark.parametrize(
    ("margins", "message"),
    [
        ((0, 0, 0, 0), "of 0 or more"),
        ((-8, 0, 16, 0), "of 0 or more"),
        ((4, 0, 0, 7), "4 more at a side, 1 more above"),
        ((0, 10**9, 0, 0), "64x1000000064 pixels; use smaller margins"),
        ((9000, 9000, 0, 6000), "89 million in all"),
        ((10**30, 0, 0, 0), "16384 per side"),
    ],
)
def test_margins_that_make_no_canvas(margins, message):
    with pytest.raises(RequestError, match=message):
        outpaint_canvas(photograph(), margins, area=512 * 512, multiple=8)


def test_margins_are_held_to_the_factor_where_the_canvas_keeps_its_size():
    for margins, multiple, area in (((4, 0, 0, 8), 4, 72 * 72), ((1, 2, 3, 4), 8, 64 * 64)):
        canvas, mask = outpaint_canvas(photograph(), margins, area=area, multiple=multiple)
        left, top, right, bottom = margins
        assert canvas.size == mask.size == (64 + left + right, 64 + top + bottom)
        np.testing.assert_array_equal(np.asarray(canvas)[top : top + 64, left : left + 64], photograph())
        assert (np.asarray(mask)[top : top + 64, left : left + 64] == 0).all()
        assert (np.asarray(mask) == 255).sum() == canvas.width * canvas.height - 64 * 64


@pytest.mark.parametrize(("height", "width"), [(3, 4), (20, 9), (5, 31)])
def test_a_depth_map_is_resized_as_torch_does(height, width):
    values = np.random.default_rng(0).standard_normal((11, 17)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(torch.from_numpy(values)[None, None], (height, width), mode="bicubic")
    np.testing.assert_allclose(bicubic(values, height, width), wanted[0, 0], atol=1e-5)


@pytest.mark.parametrize("orientation", [1, 6])
def test_few_bytes_with_many_pixels_are_refused(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("L", (9000, 9000)).save(tmp_path / "mask.png", exif=exif)
    assert open_image(tmp_path / "mask.png").size == (9000, 9000)
    Image.new("RGB", (9000, 9000)).save(tmp_path / "image.png", exif=exif)
    with pytest.raises(RequestError, match=r"image\.png has 9000x9000 pixels in \d+ bytes"):
        open_image(tmp_path / "image.png")
