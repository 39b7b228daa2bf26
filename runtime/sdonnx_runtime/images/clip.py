"""Images for CLIP's image encoder (arXiv:2103.00020), as transformers' CLIPImageProcessor makes them."""

import numpy as np
from PIL import Image

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.images.preprocess import flatten_alpha

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images, for each channel."""


def clip_pixels(image: Image.Image, size: int) -> Array:
    """Resize an image's shorter side to ``size`` (bicubic), crop its middle and normalize it: (1, 3, size, size)."""
    image = flatten_alpha(image)
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)), np.float32) / np.float32(255)
    normalized = (pixels - np.array(_MEAN, np.float32)) / np.array(_DEVIATION, np.float32)
    return np.moveaxis(normalized, 2, 0)[None]
