"""What an image carries besides pixels: color profile, orientation, text, transparency."""

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo
from sdonnx_runtime.images.preprocess import check_image, flatten_alpha, open_image, outpaint_canvas, to_depth, to_rgb
from sdonnx_runtime.packages.concat import CONCAT, ConcatInputs
from support.images import disc, photograph

import sdonnx


def swapped_profile():
    """sRGB with red and blue interchanged."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    return swapped.replace("sRGB".encode("utf-16-be"), "BGR ".encode("utf-16-be"))


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def channels(image):
    return np.asarray(image).astype(int)


def test_colors_are_converted_from_the_profile():
    image = photograph()
    image.info["icc_profile"] = swapped_profile()
    found = to_rgb(image)
    assert np.abs(channels(found) - channels(photograph())[..., ::-1]).max() <= 2
    assert found.info == {}
    transparent = image.convert("RGBA")
    transparent.putalpha(disc())
    transparent.info["icc_profile"] = swapped_profile()
    found = channels(to_rgb(transparent))
    inside = np.asarray(disc()) > 0
    assert np.abs(found - channels(photograph())[..., ::-1])[inside].max() <= 2
    assert (found[~inside] == 255).all()
    canvas, _ = outpaint_canvas(image, (64, 0, 0, 0), area=128 * 64, multiple=8)
    assert np.abs(channels(canvas)[:, 64:] - channels(photograph())[..., ::-1]).max() <= 2


def test_a_transparent_color_is_transparent_with_a_profile_too():
    """PNG's tRNS chunk: the color that stands for none is white, not converted."""
    image = Image.new("RGB", (2, 1), (10, 200, 30))
    image.putpixel((1, 0), (200, 10, 30))
    image.info |= {"transparency": (10, 200, 30), "icc_profile": swapped_profile()}
    opaque = Image.new("RGB", (1, 1), (200, 10, 30))
    opaque.info["icc_profile"] = swapped_profile()
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(image).getpixel((1, 0)) == to_rgb(opaque).getpixel((0, 0)) != (200, 10, 30)


@pytest.mark.parametrize("profile", [SRGB, b"", b"no profile", SRGB[:300]])
def test_pixels_stay_as_they_are_with_srgb_or_a_damaged_profile(profile):
    image = photograph()
    image.info["icc_profile"] = profile
    np.testing.assert_array_equal(to_rgb(image), photograph())


def test_a_profile_that_does_not_fit_the_mode_is_ignored():
    gray = photograph().convert("L")
    gray.info["icc_profile"] = swapped_profile()
    np.testing.assert_array_equal(to_rgb(gray), photograph().convert("L").convert("RGB"))


def test_masks_and_control_images_are_numbers_not_colors():
    image = photograph()
    image.info["icc_profile"] = swapped_profile()
    np.testing.assert_array_equal(flatten_alpha(image), photograph())
    np.testing.assert_array_equal(to_depth(image), to_depth(photograph()))


def photograph_file(path):
    """A JPEG or PNG with a profile, EXIF data (turned by 90 degrees), a comment and a resolution."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret place"
    text = PngInfo()
    text.add_text("parameters", "another program's")
    image = photograph(64, 96).rotate(90, expand=True)
    image.save(path, exif=exif, icc_profile=SRGB, dpi=(300, 300), pnginfo=text)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("crop", [None, 8])
def test_the_saved_image_has_the_runs_own_text_alone(package, tmp_path, suffix, crop):
    image = open_image(photograph_file(tmp_path / f"photo.{suffix}"))
    mask = ImageOps.exif_transpose(disc(64, 96))
    assert image.size == mask.size == (64, 96), "upright"
    with sdonnx.load(package) as pipe:
        asked = {"image": image, "mask_image": mask, "padding_mask_crop": crop, "num_inference_steps": 1}
        result = pipe.generate("a cat", seed=1, **asked)
    assert result.images[0].info == {}
    sdonnx.save_png(result, 0, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert {*saved.info} == {"parameters", "sdonnx", "XML:com.adobe.xmp", "xmp"}
        assert len(saved.getexif()) == 0
    assert b"secret" not in (tmp_path / "a.png").read_bytes()
    outside = np.asarray(mask) == 0
    np.testing.assert_array_equal(np.asarray(result.images[0])[outside], np.asarray(image.convert("RGB"))[outside])


def depth_latents(image):
    depth = to_depth(image)[None, None]
    inputs = ConcatInputs(mask=depth[:, :0], depth=depth, mean=depth[:, :0], sample=lambda: depth, entries=1)
    return CONCAT["depth"].latents(inputs)


@pytest.mark.parametrize(
    "flat",
    [
        Image.new("L", (9, 7), 128),
        Image.new("RGB", (9, 7)),
        Image.fromarray(np.full((7, 9), 60000, np.uint16)),
        Image.fromarray(np.full((7, 9), 0.1, np.float32)),
        Image.new("L", (1, 1), 9),
    ],
)
def test_a_flat_depth_map_is_the_background(flat):
    """As in training, where 0.001 was added to the range: -1."""
    check_image("depth_image", flat)
    assert (depth_latents(flat) == -1).all()


def test_depth_maps_of_floating_point_and_far_away():
    values = np.linspace(1e6, 1e6 + 3, 63).reshape(7, 9)
    wanted = 2 * (values - values.min()) / (values.max() - values.min()) - 1
    image = Image.fromarray((values - 1e6).astype(np.float32))
    check_image("depth_image", image)
    np.testing.assert_allclose(depth_latents(image)[0, 0], wanted, atol=1e-6)
    whole = Image.fromarray(np.arange(10**6, 10**6 + 63, dtype=np.int32).reshape(7, 9))
    np.testing.assert_allclose(depth_latents(whole)[0, 0], wanted, atol=1e-6)


def test_depth_that_is_not_finite_names_the_image():
    values = np.ones((4, 4), np.float32)
    values[1, 1] = np.nan
    with pytest.raises(sdonnx.RequestError, match="depth_image has pixels that are not finite"):
        check_image("depth_image", Image.fromarray(values))
    with pytest.raises(sdonnx.RequestError, match="image has Pillow's mode F"):
        check_image("image", Image.fromarray(values))
