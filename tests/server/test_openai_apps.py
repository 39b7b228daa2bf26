"""Requests as chat apps write them, byte by byte, and what these apps read of the replies."""

import io
import json
import re

import pytest
from PIL import Image
from support.openai_client import decode
from urllib3 import PoolManager

HTTP = PoolManager(retries=False)


@pytest.fixture(scope="module")
def photo():
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(stream, format="PNG")
    return stream.getvalue()


def post(server, path, body, **headers):
    found = HTTP.request("POST", f"{server.url}/v1{path}", body=body, headers={"Authorization": "Bearer ", **headers})
    assert found.status == 200, found.data
    return json.loads(found.data)


def post_json(server, path, data):
    return post(server, path, json.dumps(data), **{"Content-Type": "application/json"})


def post_form(server, path, *parts):
    """Send a form of (header lines, content)."""
    lines = [b"".join([b"--XX\r\n", head.encode(), b"\r\n\r\n", content, b"\r\n"]) for head, content in parts]
    return post(server, path, b"".join([*lines, b"--XX--\r\n"]), **{"Content-Type": "multipart/form-data; boundary=XX"})


def open_webui_field(name, text):
    """As aiohttp writes it."""
    return f'Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name="{name}"', text.encode()


def open_webui_image(name, content):
    head = f'Content-Type: image/png\r\nContent-Disposition: form-data; name="{name}"; filename="a1b2.png"'
    return head, content


def librechat_field(name, text):
    """As npm's form-data writes it."""
    return f'Content-Disposition: form-data; name="{name}"', text.encode()


def librechat_image(content):
    head = 'Content-Disposition: form-data; name="image[]"; filename="cat.png"\r\nContent-Type: image/png'
    return head, content


def open_webui_images(reply):
    """A URL comes first, which it refuses for a local server; base64 without a prefix is PNG."""
    assert all(not each.get("url") and "," not in each["b64_json"] for each in reply["data"])
    return [decode(each["b64_json"]) for each in reply["data"]]


@pytest.mark.parametrize(
    "chosen",
    [
        {"model": "gpt-image-1.5", "size": "64x64"},  # names for which it asks for no format
        {"model": "pictogram", "size": "64x64", "response_format": "b64_json"},
        {
            "model": "dall-e-3",
            "response_format": "b64_json",
            "steps": 2,
            "cfg_scale": 1.0,
        },  # with an admin's parameters
    ],
)
def test_open_webui_generates(server, chosen):
    body = {"prompt": "a red star", "n": 1, **chosen}
    reply = post_json(server, "/images/generations?api-version=2024-02-01", body)
    assert [image.format for image in open_webui_images(reply)] == ["PNG"]


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_open_webui_edits(server, photo, name):
    texts = {"model": "gpt-image-1", "prompt": "a red star", "n": "1", "size": "64x64", "response_format": "b64_json"}
    fields = [open_webui_field(key, text) for key, text in texts.items()]
    reply = post_form(server, "/images/edits", *fields, open_webui_image(name, photo))
    assert [image.size for image in open_webui_images(reply)] == [(64, 64)]


def test_librechat_generates(server):
    body = {
        "model": "gpt-image-1", "prompt": "a red star", "n": 1, "background": "auto", "output_format": "webp",
        "output_compression": 100, "quality": "auto", "size": "auto",
    }  # fmt: skip
    assert decode(post_json(server, "/images/generations", body)["data"][0]["b64_json"]).format == "WEBP"


def test_librechat_edits(server, photo):
    texts = {"model": "gpt-image-1", "prompt": "a red star", "quality": "auto", "size": "auto"}
    fields = [librechat_field(key, text) for key, text in texts.items()]
    reply = post_form(server, "/images/edits", *fields, librechat_image(photo))
    assert len(reply["data"]) == 1 and decode(reply["data"][0]["b64_json"]).format == "PNG"


def test_librechat_with_dall_e(server):
    body = {
        "model": "dall-e-3", "quality": "standard", "style": "vivid", "size": "64x64", "prompt": "a red star", "n": 1
    }  # fmt: skip
    url = post_json(server, "/images/generations", body)["data"][0]["url"]
    assert re.search(r"[\w\d]+\.png$", url)
    found = HTTP.request("GET", url)
    assert found.headers["Content-Type"] == "image/png" and found.data.startswith(b"\x89PNG")
