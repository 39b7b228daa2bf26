"""Images as CLIP's image encoders read them."""

import numpy as np
from PIL import Image

from sdonnx_runtime.arrays import Array

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
"""Of the images that CLIP was trained on, arXiv:2103.00020."""


def clip_pixel_values(image: Image.Image, size: int) -> Array:
    """Resize (bicubic), crop at the center and normalize an image, as transformers' CLIPImageProcessor does.

    Args:
        image: RGB.
        size: width and height of what the encoder reads.

    Returns:
        (1, 3, size, size).
    """
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = np.asarray(resized, np.float32) / np.float32(255)  # (size, size, 3)
    return np.moveaxis((pixels - _MEAN) / _STD, 2, 0)[None]
