"""An image and a mask to start from."""

import numpy as np
from PIL import Image, ImageDraw


def photograph(width=64, height=64, seed=5):
    """Smooth colours and an edge."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill=(250, 40, 30))
    return image


def disc(width=64, height=64):
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse((width // 5, height // 6, width * 4 // 5, height * 3 // 4), fill=255)
    return mask
