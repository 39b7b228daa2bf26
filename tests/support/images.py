"""An image and a mask to start from."""

import base64
import io

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


def in_base64(image):
    """The image as PNG in base64."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()
