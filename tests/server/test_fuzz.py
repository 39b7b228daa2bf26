"""Nothing that a client sends to any route gives a 5xx, ends the worker, or leaves something behind."""

import base64
import io
import json
import os
import re
import threading

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.routing import Route
from support.server import running_server

EXAMPLES = int(os.environ.get("SDONNX_FUZZ_EXAMPLES", "4"))
"""Requests to each route."""

NAMES = {
    "/v1": [
        "prompt", "model", "n", "size", "quality", "response_format", "output_format", "output_compression",
        "background", "moderation", "style", "user", "stream", "partial_images", "seed", "steps", "cfg_scale",
        "negative_prompt", "sampler", "image", "mask",
    ],
    "/api": [
        "prompt", "negative_prompt", "seed", "num_images", "num_inference_steps", "guidance_scale", "width", "height",
        "sampler", "schedule", "eta", "image", "strength", "mask_image", "fit", "controls", "variation", "hires_scale",
        "clip_skip", "model", "vae", "preview_every", "text", "token", "hires_upscaler", "upscaler", "scale", "styles",
        "ip_adapters",
    ],
    "": [
        "prompt", "negative_prompt", "seed", "subseed", "subseed_strength", "steps", "cfg_scale", "width", "height",
        "batch_size", "n_iter", "sampler_name", "sampler_index", "scheduler", "eta", "s_tmax", "enable_hr", "hr_scale",
        "hr_resize_x", "denoising_strength", "init_images", "mask", "mask_blur", "inpainting_fill", "inpaint_full_res",
        "override_settings", "alwayson_scripts", "script_name", "styles", "infotext", "force_task_id", "clip_skip",
        "image", "imageList", "upscaler_1", "upscaling_resize", "controlnet_images", "id_task", "id_live_preview",
        "hr_upscaler", "save_images", "sd_model_checkpoint", "CLIP_stop_at_last_layers", "controlnet", "args",
    ],
}  # fmt: skip
"""Keys of bodies, by the beginning of the path; the last ones are A1111's."""


def _image(mode="RGB", form="PNG", size=(16, 16)):
    stream = io.BytesIO()
    Image.new(mode, size, 100).save(stream, form)
    return stream.getvalue()


FILES = [_image(), _image("L"), _image(form="JPEG"), _image(size=(1, 500)), _image()[:60], b"", b"GIF89a"]
IMAGES = [base64.b64encode(each).decode() for each in FILES] + ["data:image/png;base64,", "http://localhost/a.png"]
TYPICAL = {
    "/v1": {"prompt": "a cat", "steps": 1, "size": "64x64"},
    "/api": {"prompt": "a cat", "num_inference_steps": 1, "width": 64, "height": 64},
    "": {"prompt": "a cat", "steps": 1, "width": 64, "height": 64, "init_images": IMAGES[:1]},
}
PLAUSIBLE = [
    "pictogram", "euler", "Euler a", "Karras", "automatic", "a cat", "<lora:a:1>", "[a:b:0.5]", "(((", "64x64", "auto",
    "b64_json", "url", "png", "webp", "low", "opaque", "../../etc/passwd", "\ud800", "\0", "-1", "1e999", "true",
]  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.sampled_from([0, 1, 2, 64, 65, -1, 2**31, 2**63, 10**400, 0.5, 1.0, 1e308])
    | st.sampled_from(PLAUSIBLE) | st.sampled_from(IMAGES) | st.text(max_size=20)
)  # fmt: skip
DEEP = ["[" * 100_000, '{"a":' * 5000]
TEXTS = st.sampled_from([*DEEP, "", "{", "NaN", '{"prompt": Infinity}', "9" * 5000, '"\\ud800"'])


@st.composite
def objects(draw, api):
    """Draw a body: often a request that is right, but for a few keys."""
    names = st.sampled_from(NAMES[api])
    values = st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=5
    )
    if draw(st.integers(0, 9)) == 0:
        return draw(values)
    base = {name: value for name, value in TYPICAL[api].items() if draw(st.integers(0, 9))}
    return {**base, **draw(st.dictionaries(names, values, max_size=draw(st.sampled_from([0, 1, 1, 5]))))}


FORM_VALUES = st.sampled_from([*FILES, "a cat", "64x64", "\0", "2"])
QUERY = ["after", "before", "count", "format", "quality", "side", "skip_current_image", "limit", "state"]
PATHS = ["pictogram", "missing", "..", "%2e%2e%2f", "%00", "%ff", "a" * 300, "0", "-1", "20260101-000000-a-0.png"]

OPTIONS = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


def endpoints(app):
    """The methods and paths of all routes."""
    found = [(method, each.path) for each in app.routes if isinstance(each, Route) for method in each.methods]
    return sorted(pair for pair in found if pair[0] != "HEAD")


@st.composite
def requests(draw, method, path):
    """Draw the arguments of `httpx.Client.request`."""
    url = re.sub(r"\{[^}]*\}", lambda _: draw(st.sampled_from(PATHS)), path)
    api = next(each for each in NAMES if path.startswith(each))
    query = draw(st.dictionaries(st.sampled_from(QUERY), st.text(max_size=5), max_size=2))
    arguments = {"method": method, "url": url, "params": {k: v.encode("utf-8", "replace") for k, v in query.items()}}
    kind = draw(st.sampled_from(["json"] * 4 + ["text", "bytes", "form"])) if method == "POST" else "none"
    if kind in ("json", "text"):
        body = json.dumps(draw(objects(api))) if kind == "json" else draw(TEXTS)
        arguments |= {"content": body.encode("utf-8", "surrogatepass"), "headers": {"Content-Type": "application/json"}}
    elif kind == "bytes":
        types = ["application/json", "multipart/form-data; boundary=a", "multipart/form-data", "text/plain", "a"]
        arguments |= {
            "content": draw(st.binary(max_size=50)),
            "headers": {"Content-Type": draw(st.sampled_from(types))},
        }
    elif kind == "form":
        names = st.sampled_from([*NAMES[api], "image[]"])
        parts = [
            (name, ("a.png", value, "image/png") if isinstance(value, bytes) else (None, value.encode()))
            for name, value in draw(st.lists(st.tuples(names, FORM_VALUES), max_size=5))
        ]
        arguments |= {"files": parts or [("a", (None, b"b"))]}
    return arguments


def exchange(client, arguments):
    """Send a request; returns the status and text of the answer, of the stream that has no end its beginning."""
    with client.stream(**arguments) as answer:
        if answer.url.path == "/api/events":
            return answer.status_code, next(answer.iter_text())
        answer.read()
        return answer.status_code, answer.text


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    limits = {"max_steps": 2, "max_pixels": 64 * 64, "max_images": 2, "max_body": 1 << 20}
    with running_server(output=tmp_path / "images", memory="auto", **limits) as running:
        yield running


def test_every_route(server, pipeline, tmp_path, caplog):
    found, threads = endpoints(server.app), threading.active_count()
    failures, statuses = [], set()
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for method, path in found:

            @settings(OPTIONS, max_examples=EXAMPLES if method == "POST" or "{" in path else 2)
            @given(requests(method, path))
            def send(arguments):
                status, text = exchange(client, arguments)
                statuses.add(status)
                if status >= 500 and status not in (501, 503):
                    failures.append((status, arguments, text[:300]))
                assert "Traceback" not in text

            send()
    assert failures == []
    assert statuses >= {200, 202, 400, 404}
    assert "Traceback" not in caplog.text
    server.wait_until_idle()
    assert {each.name for each in tmp_path.iterdir()} == {"images"}
    strangers = [each.name for each in (tmp_path / "images").iterdir() if not re.fullmatch(r"[\w()-]+\.png", each.name)]
    assert strangers == []
    assert threading.active_count() <= threads + 40  # anyio's and asyncio's pools
    assert_still_generates(server, pipeline)


def assert_still_generates(server, pipeline):
    reply = httpx.post(
        server.url + "/v1/images/generations", json={"prompt": "a cat", "steps": 2, "seed": 3, "size": "64x64"}
    )
    made = Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"])))
    expected = pipeline.generate("a cat", num_inference_steps=2, seed=3, width=64, height=64).images[0]
    assert made.tobytes() == expected.tobytes()
