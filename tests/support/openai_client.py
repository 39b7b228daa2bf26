"""OpenAI's own client against a running server, and what it receives as images and pixels."""

import base64
import io

import numpy as np
import openai
from PIL import Image


def connect(server, **options):
    """OpenAI's client, which tries nothing twice unless told to."""
    return openai.OpenAI(base_url=f"{server.url}/v1", **{"api_key": "none", "max_retries": 0, **options})


def images(reply):
    """The images of a reply."""
    return [decode(each.b64_json) for each in reply.data]


def decode(text):
    """An image in base64."""
    return Image.open(io.BytesIO(base64.b64decode(text)))


def pixels(image):
    """(H, W, 3)."""
    return np.asarray(image.convert("RGB"))


def encode(image, **options):
    """The image as it is after it was saved with these options."""
    stream = io.BytesIO()
    image.save(stream, **options)
    return Image.open(stream)
