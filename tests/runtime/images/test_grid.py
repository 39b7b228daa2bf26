"""Grids of images: the geometry of AUTOMATIC1111's, the pixels of diffusers'."""

import numpy as np
import pytest
from diffusers.utils import make_image_grid
from PIL import Image
from support.images import photograph

import sdonnx

SHAPES = {1: (1, 1), 2: (1, 2), 3: (2, 2), 4: (2, 2), 6: (2, 3), 7: (3, 3), 8: (3, 3), 10: (3, 4), 20: (4, 5)}
"""Rows and columns that AUTOMATIC1111's ``image_grid`` chooses with its own settings."""


@pytest.mark.parametrize("count", SHAPES)
def test_a_grid_is_that_of_others(count):
    rows, columns = SHAPES[count]
    images = [photograph(12, 10, seed=seed) for seed in range(count)]
    free = [Image.new("RGB", (12, 10), "white")] * (rows * columns - count)
    expected = make_image_grid([*images, *free], rows=rows, cols=columns)
    np.testing.assert_array_equal(np.asarray(sdonnx.make_grid(images)), np.asarray(expected))


def test_a_smaller_image_is_in_the_middle_of_its_cell():
    grid = sdonnx.make_grid([photograph(12, 10), Image.new("L", (6, 4))])
    cell = Image.new("RGB", (12, 10), "white")
    cell.paste((0, 0, 0), (3, 3, 9, 7))
    np.testing.assert_array_equal(np.asarray(grid.crop((12, 0, 24, 10))), np.asarray(cell))


def test_grids_that_are_refused():
    with pytest.raises(sdonnx.RequestError, match="requires images"):
        sdonnx.make_grid([])
    with pytest.raises(sdonnx.RequestError, match=r"20x10 pixels; give fewer or smaller .* 0 million"):
        sdonnx.make_grid([photograph(10, 10)] * 2, max_pixels=199)
