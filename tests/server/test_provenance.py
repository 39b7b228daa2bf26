"""Images of every API and format say that they are AI-generated, as ExifTool reads it."""

import base64
import io

import httpx
import numpy as np
import pytest
from PIL import Image
from support.exiftool import COMPOSITE, GENERATED, read_xmp_tags
from support.images import photograph
from support.server import running_server

BODY = {"prompt": "a red circle", "seed": 7, "steps": 1, "width": 64, "height": 64}
FORMATS = ("png", "jpeg", "webp")


@pytest.fixture(scope="module")
def image(server):
    """The name of an image on the server."""
    httpx.post(f"{server.url}/sdapi/v1/txt2img", json=BODY, timeout=60)
    return httpx.get(f"{server.url}/api/images").json()["images"][0]["name"]


def test_exiftool_reads_the_source_of_every_format(server, image, tmp_path):
    paths = []
    for form in FORMATS:
        for side in ("", "&side=32"):
            path = tmp_path / f"{len(paths)}.{form}"
            path.write_bytes(httpx.get(f"{server.url}/api/images/{image}?format={form}{side}").content)
            paths.append(path)
    assert read_xmp_tags(*paths) == [GENERATED] * 6
    info = httpx.post(
        f"{server.url}/sdapi/v1/png-info", json={"image": base64.b64encode(paths[2].read_bytes()).decode()}
    )
    assert info.json()["info"].startswith("a red circle\nSteps: 1, ")


def test_every_api_keeps_it(server, tmp_path):
    sent = io.BytesIO()
    photograph().resize((64, 64)).save(sent, "PNG")
    form = {**BODY, "steps": 2, "init_images": [base64.b64encode(sent.getvalue()).decode()]}
    form["override_settings"] = {"samples_format": "webp"}
    edited = httpx.post(f"{server.url}/sdapi/v1/img2img", json=form, timeout=60).json()["images"][0]
    body = {"prompt": "a red circle", "size": "64x64", "steps": 1, "output_format": "jpeg"}
    made = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()["data"][0]["b64_json"]
    upscaling = {"image": edited, "upscaler_1": "Lanczos", "upscaling_resize": 2}
    larger = httpx.post(f"{server.url}/sdapi/v1/extra-single-image", json=upscaling, timeout=60).json()["image"]
    paths = [tmp_path / name for name in ("edited.webp", "made.jpeg", "larger.png")]
    for path, text in zip(paths, (edited, made, larger), strict=True):
        path.write_bytes(base64.b64decode(text))
    assert read_xmp_tags(*paths) == [COMPOSITE, GENERATED, COMPOSITE]


def test_a_server_without_provenance_makes_the_same_pixels(server, image, tmp_path):
    with running_server(provenance=False) as other:
        reply = httpx.post(f"{other.url}/sdapi/v1/txt2img", json=BODY, timeout=60).json()
    png, path = base64.b64decode(reply["images"][0]), tmp_path / "a.png"
    path.write_bytes(png)
    kept = httpx.get(f"{server.url}/api/images/{image}").content
    assert np.array_equal(*(np.asarray(Image.open(io.BytesIO(data))) for data in (png, kept)))
    assert read_xmp_tags(path) == [{}]
