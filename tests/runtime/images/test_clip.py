"""Images for CLIP's image encoder against transformers'."""

import numpy as np
import pytest
from PIL import Image
from sdonnx_runtime.images.clip import clip_pixels
from support.images import photograph
from transformers import CLIPImageProcessor


@pytest.mark.parametrize(
    ("size", "mode"),
    [((640, 427), "RGB"), ((31, 57), "RGB"), ((300, 300), "L"), ((224, 225), "RGB"), ((1000, 40), "RGB")],
)
def test_pixels_are_those_of_transformers(size, mode):
    image = photograph(64, 64).resize(size).convert(mode)
    expected = CLIPImageProcessor(size=28, crop_size=28)(image, return_tensors="np").pixel_values
    found = clip_pixels(image, 28)
    assert found.shape == (1, 3, 28, 28)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_transparent_parts_are_white():
    image = Image.new("RGBA", (20, 30), (10, 20, 30, 0))
    np.testing.assert_array_equal(clip_pixels(image, 8), clip_pixels(Image.new("RGB", (20, 30), "white"), 8))
