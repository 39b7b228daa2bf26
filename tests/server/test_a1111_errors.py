"""What AUTOMATIC1111's API refuses, and how; and the readers of its requests, which take anything."""

import json
import threading
import time
from dataclasses import fields
from types import NoneType
from typing import get_args, get_origin, get_type_hints

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sdonnx_models import bundled
from support.images import in_base64, photograph
from support.server import running_server, wait_until

import sdonnx
from sdonnx.server.a1111.errors import Unprocessable
from sdonnx.server.a1111.fields import ImageToImage, TextToImage, parse_body, read_form
from sdonnx.server.a1111.options import Options
from sdonnx.server.a1111.prepare import prepare
from sdonnx.server.infotext import infotext_fields, parse_infotext, read_infotext, second_pass_steps
from sdonnx.server.library import Library
from sdonnx.server.planning import Planner
from sdonnx.server.settings import Settings

SMALL = {"prompt": "a red circle", "width": 64, "height": 64, "steps": 1}


@pytest.fixture(scope="module")
def server():
    with running_server(max_queued=2, max_body=200_000, max_pixels=200 * 200) as running:
        yield running


def post(server, path, **options):
    return httpx.post(f"{server.url}/sdapi/v1/{path}", **options)


@pytest.mark.parametrize(
    ("sent", "status", "text"),
    [
        ({"steps": "many"}, 422, "whole number"),
        ({"override_settings": []}, 422, "object"),
        ({"batch_size": 0}, 422, "1 or more"),
        ({"styles": ["film"]}, 400, "--styles"),
        ({"styles": [1]}, 422, "styles"),
        ({"script_name": "x/y/z plot"}, 422, "x/y/z plot"),
        ({"alwayson_scripts": {"reactor": {"args": ["data:"]}}}, 422, "reactor"),
        ({"sampler_name": "DPM++ 2N"}, 404, "DPM++ 2M"),
        ({"scheduler": "polyexponential"}, 404, "karras"),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, 404, "pictogram"),
        ({"override_settings": {"sd_vae": "other"}}, 404, "other"),
        ({"override_settings": {"samples_format": "gif"}}, 422, "png"),
        ({"steps": 5000}, 400, "steps is 5000"),
        ({"steps": 500}, 400, "takes at most 200"),
        ({"width": 63}, 400, "multiple"),
        ({"width": 1024, "height": 1024}, 400, "pixels"),
        ({"batch_size": 100, "n_iter": 100}, 400, "batch_size * n_iter"),
        ({"seed_resize_from_h": 64}, 400, "seed_resize"),
        ({"s_churn": 5, "s_tmin": 1, "sampler_name": "Euler"}, 400, "s_tmin"),
        ({"s_churn": 5, "sampler_name": "Heun"}, 400, "s_churn"),
        ({"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}, 400, "hr_upscaler"),
        ({"enable_hr": True, "hr_upscaler": "Latent (bicubic)"}, 400, "hr_upscaler"),
        ({"enable_hr": True, "hr_prompt": "a cat"}, 400, "hr_prompt"),
        ({"enable_hr": True, "hr_resize_x": 96, "hr_resize_y": 128}, 400, "aspect"),
        ({"refiner_checkpoint": "other", "refiner_switch_at": 0.8}, 404, "other"),
        ({"force_task_id": "../x"}, 400, "id"),
        ({"lora": [{"path": "<x"}]}, 422, "lora"),
        ({"prompt": "\ud800"}, 400, "Unicode"),
        ({"eta": 7, "sampler_name": "Euler a"}, 400, "eta"),
    ],
)
def test_values_that_are_refused_by_name(server, sent, status, text):
    reply = post(server, "txt2img", content=json.dumps({**SMALL, **sent}))
    assert (reply.status_code, text in json.dumps(reply.json()["detail"])) == (status, True), reply.text
    if status == 400:
        assert set(reply.json()) == {"error", "detail", "body", "errors"}


@pytest.mark.parametrize(
    ("sent", "status", "text"),
    [
        ({"init_images": []}, 404, "Init image not found"),
        ({}, 404, "Init image not found"),
        ({"init_images": ["AAAA"]}, 400, "init_images"),
        ({"init_images": ["http://127.0.0.1/"]}, 400, "URL"),
        ({"init_images": [in_base64(photograph())] * 2}, 400, "one image"),
        ({"init_images": [in_base64(Image.new("1", (999, 999)))]}, 400, "pixels"),
        ({"resize_mode": 4}, 400, "resize_mode"),
        ({"inpainting_fill": 2, "mask": in_base64(photograph())}, 400, "inpainting_fill"),
        ({"initial_noise_multiplier": 1.1}, 400, "initial_noise_multiplier"),
        ({"denoising_strength": 1.5}, 400, "strength"),
        ({"mask": in_base64(photograph(32, 32))}, 400, "mask"),
    ],
)
def test_images_that_are_refused(server, sent, status, text):
    images = {} if sent == {} else {"init_images": [in_base64(photograph())]}
    reply = post(server, "img2img", json={**SMALL, **images, **sent})
    assert (reply.status_code, text in str(reply.json()["detail"])) == (status, True), reply.text


@pytest.mark.parametrize(
    "sent",
    [
        {"restore_faces": True},
        {"alwayson_scripts": {"ADetailer": {"args": [False]}, "animatediff": {"args": []}}},
        {
            "steps": "1",
            "cfg_scale": "4",
            "seed": 3.0,
            "enable_hr": "false",
            "batch_size": None,
            "mask": 5,
            "unknown": {},
        },
        {"script_args": [1, 2], "hr_sampler_name": "Euler", "hr_prompt": "without hires fix", "eta": 1.0, "s_tmax": 0},
        {"prompt": "", "negative_prompt": "", "sampler_index": "Euler"},
        {"refiner_checkpoint": "None", "styles": [], "script_name": ""},
    ],
)
def test_values_that_are_not(server, sent):
    reply = post(server, "txt2img", json={**SMALL, **sent})
    assert reply.status_code == 200, reply.text
    comments = json.loads(reply.json()["info"])["comments"]
    assert ("restore_faces is not supported" in comments) == ("restore_faces" in sent)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"steps": NaN}', b'{"steps": 1e999}', b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("path", ["txt2img", "options", "png-info"])
def test_bodies_that_are_no_objects(server, path, body):
    assert post(server, path, content=body).status_code == 422


def test_a_byte_order_mark_is_skipped(server):
    assert post(server, "options", content=b"\xef\xbb\xbf{}").status_code == 200


def test_too_large_a_body(server):
    assert post(server, "txt2img", content=b'{"prompt": "' + b"a" * 300_000 + b'"}').status_code == 413


def test_a_full_queue(server):
    long = {**SMALL, "steps": 200}
    threads = [threading.Thread(target=lambda: post(server, "txt2img", json=long, timeout=60)) for _ in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    wait_until(lambda: len(server.context.queue.waiting) == 2)
    reply = post(server, "txt2img", json=SMALL)
    assert (reply.status_code, set(reply.json())) == (429, {"error", "detail", "body", "errors"})
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert post(server, "txt2img", json={**SMALL, "sampler_name": "no"}).status_code == 404
    while any(thread.is_alive() for thread in threads):
        post(server, "interrupt")
        time.sleep(0.02)


NUMBERS = st.integers(-2, 300) | st.floats(-1, 3) | st.sampled_from([0, 1, 2, 64, 2**62, 1e300, 5e-324])

WHOLE = st.integers(-2, 100) | st.sampled_from([0, 1, 2, 3, 64, 96, 2**62, -(2**63)])

LIKELY = {
    "sampler_name": st.sampled_from(["Euler a", "Euler", "DDIM", "Heun Karras", "automatic", "k_lms", "TCD"]),
    "scheduler": st.sampled_from(["Karras", "automatic", "sgm_uniform"]),
    "hr_upscaler": st.sampled_from(["Latent", "None", "Lanczos"]),
    "resize_mode": st.integers(0, 3),
    "inpainting_fill": st.integers(0, 2),
    "mask": st.just(in_base64(photograph(48, 32))),
    "infotext": st.sampled_from(["a\nSteps: 3, Sampler: Euler a, CFG scale: 7, Size: 64x64, Hires upscale: 1.5", "a"]),
    "alwayson_scripts": st.sampled_from([{}, {"controlnet": {"args": [{"enabled": False}]}}, {"x": 1}]),
    "batch_size": st.integers(1, 3),
    "n_iter": st.integers(1, 3),
    "denoising_strength": NUMBERS,
    "refiner_checkpoint": st.sampled_from(["None", "pictogram"]),
    "width": st.sampled_from([64, 32, 96, 63]),
    "height": st.sampled_from([64, 32, 96, 0]),
    "enable_hr": st.booleans(),
}
"""Values that are often right; other fields have any of the right type."""

TYPES = {
    bool: st.booleans(),
    int: WHOLE,
    float: NUMBERS,
    str: st.sampled_from(["", "None", "a (b:1.1) [c|d]", "\ud800"]),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    settings = Settings(packages=(bundled()["pictogram"],), output=tmp_path_factory.mktemp("out"), memory="max")
    return Library(settings)


@st.composite
def bodies(draw, kind):
    """A few fields of a request, with the right types."""
    types = {name: hint for name, hint in get_type_hints(kind).items() if name not in ("given", "init_images")}
    sent = {"init_images": [in_base64(photograph(48, 32))]}
    for name in draw(st.lists(st.sampled_from(sorted(types)), max_size=8)):
        plain = {types[name], *get_args(types[name])} if get_origin(types[name]) is not dict else set()
        found = next((each for kind_of, each in TYPES.items() if kind_of in plain), st.none())
        sent[name] = draw(LIKELY.get(name, found))
    return sent


@pytest.mark.parametrize("kind", [TextToImage, ImageToImage])
def test_any_request_is_resolved_or_refused(library, kind):
    planner = Planner(library)

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(bodies(kind))
    def check(sent):
        form = read_form(kind, parse_body(json.dumps(sent).encode()))
        try:
            planner.check(prepare(library, Options(), form).generation)
        except sdonnx.RequestError as error:
            assert str(error)

    check()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(each.name for each in fields(ImageToImage) if each.name != "given")), JSON)
def test_any_value_of_a_field_is_read_or_refused(name, value):
    try:
        assert type(getattr(read_form(ImageToImage, {name: value}), name)) in (
            str,
            int,
            float,
            bool,
            list,
            dict,
            NoneType,
        )
    except Unprocessable as error:
        assert error.detail[0]["loc"] == ["body", name]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from(["Steps: ", "9", ", ", '"', "Size: 1x2", "\n", "x: ", "\\"])).map("".join)
)
def test_any_text_is_an_infotext(text):
    assert {"Prompt", "Negative prompt"} <= parse_infotext(text).keys()
    infotext_fields(text, family="sdxl")


def test_an_infotext_of_automatic1111():
    text = (
        "a (red:1.2) cat,\nin a hat <lora:ink:0.8>\nNegative prompt: blue,\nugly\n"
        'Steps: 20, Sampler: DPM++ 2M, Schedule type: Align Your Steps, CFG scale: 6.5, Seed: 965400086, '
        'Size: 512x768, '
        'Model hash: 45dee52b, Model: dream, Denoising strength: 0.7, Clip skip: 2, Hires upscale: 2, Hires steps: 10, '
        'Hires upscaler: Latent, Tiling: True, ControlNet 0: "Module: canny, Model: edges", Version: v1.9.4'
    )  # fmt: skip
    settings = parse_infotext(text)
    assert settings["Prompt"] == "a (red:1.2) cat,\nin a hat <lora:ink:0.8>"
    assert settings["Negative prompt"] == "blue,\nugly"
    assert settings["ControlNet 0"] == "Module: canny, Model: edges"
    found = infotext_fields(text, family="sdxl")
    assert {name: found[name] for name in ("width", "height", "seed", "guidance_scale", "clip_skip", "schedule")} == {
        "width": 512, "height": 768, "seed": 965400086, "guidance_scale": 6.5, "clip_skip": 2, "schedule": "ays_sdxl",
    }  # fmt: skip
    assert (found["hires_scale"], found["hires_steps"], found["hires_upscaler"]) == (2, 14, "latent")
    assert int(found["hires_steps"] * found["hires_strength"]) == 10
    assert "strength" not in found
    assert found["tiling"] == "xy"
    values = {value: infotext_fields(text.replace("True", value), family="sdxl") for value in ("x", "False", "z")}
    assert [fields.get("tiling") for fields in values.values()] == ["x", None, None]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_file_without_an_infotext():
    assert read_infotext(photograph()) is None
    damaged = photograph()
    damaged.info["exif"] = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"
    assert read_infotext(damaged) is None


@pytest.mark.parametrize("count", [1, 2, 7, 11, 20, 33, 50, 150])
@pytest.mark.parametrize("strength", [0.01, 0.3, 0.55, 0.7, 0.75, 0.999, 1.0])
def test_the_second_pass_makes_all_its_steps(count, strength):
    total, share = second_pass_steps(count, strength)
    assert total == int(count / min(strength, 0.999))
    assert int(total * share) == count
    assert 0 <= share - min(strength, 0.999) <= strength / total + 1e-5


def test_the_server_s_end_is_no_empty_reply():
    replies = []
    with running_server() as ending:
        sent = {**SMALL, "steps": 200}
        thread = threading.Thread(target=lambda: replies.append(post(ending, "txt2img", json=sent, timeout=60)))
        thread.start()
        wait_until(lambda: (job := ending.context.queue.current) is not None and job.step > 0)
    thread.join()
    assert (replies[0].status_code, replies[0].json()["error"]) == (503, "ShuttingDown")


def test_a_route_that_is_not_there(server):
    assert post(server, "artists").status_code == 404
    assert httpx.get(f"{server.url}/sdapi/v1/txt2img").status_code == 405


@pytest.mark.parametrize("box", [(0, 3), (3, -100_000), (-5, 3), (-5, -5)])
def test_images_without_pixels_are_refused(server, box):
    sizes = dict(zip(("upscaling_resize_w", "upscaling_resize_h"), box, strict=True))
    image = in_base64(Image.new("RGB", (5, 5)))
    body = {"image": image, "upscaler_1": "Nearest", "resize_mode": 1, "upscaling_crop": True, **sizes}
    reply = post(server, "extra-single-image", json=body)
    assert reply.status_code == 400
    assert f"{box[0]}x{box[1]} has no pixels" in reply.json()["detail"]


@pytest.mark.parametrize(
    ("path", "body", "most"),
    [
        ("/sdapi/v1/extra-batch-images", {"imageList": [{"data": "x"}] * 65}, 64),
        ("/controlnet/detect", {"controlnet_input_images": ["x"] * 11}, 10),
        ("/sdapi/v1/txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"model": "x", "image": "x"}] * 11}}}, 10),
        ("/api/jobs", {"controls": [{"package": "x", "image": "x"}] * 11}, 10),
    ],
)
def test_images_of_a_request_are_bounded_before_they_are_decoded(server, path, body, most):
    """A file of 22 kB can have the pixels of 50 MB, and a body 3,000 of them."""
    reply = httpx.post(f"{server.url}{path}", json=body)
    assert reply.status_code == 400
    assert f"are too many; give up to {most}" in reply.json()["detail"]
