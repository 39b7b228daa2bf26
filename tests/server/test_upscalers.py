"""Upscaler packages over HTTP: listed, run as jobs, and between the passes of hires fix."""

import base64
import io
import threading

import httpx
import numpy as np
import pytest
from PIL import Image
from sdonnx_models import DEFAULT, bundled
from support.images import in_base64, photograph
from support.server import running_server, wait_until
from webuiapi import WebUIApi

import sdonnx

SENT = {"prompt": "a red circle", "seed": 7, "steps": 2, "cfg_scale": 4, "sampler_name": "DPM++ 2M", "width": 64,
        "height": 64}  # fmt: skip
HIRES = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.7, "hr_second_pass_steps": 2}
JOB = {"prompt": "a red circle", "seed": 7, "num_inference_steps": 2, "width": 64, "height": 64, "hires_scale": 1.5}


@pytest.fixture(scope="module")
def server(upscaler):
    with running_server(packages=(bundled()[DEFAULT], upscaler[1])) as running:
        yield running


@pytest.fixture
def api(server):
    host, port = server.address
    return WebUIApi(host=host, port=port)


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as each:
        yield each


@pytest.fixture(scope="module")
def ours(upscaler):
    with sdonnx.load_upscaler(upscaler[1], threads=1) as opened:
        yield opened.upscale


def pixels(image):
    return np.asarray(image.convert("RGB"))


def assert_same(found, wanted):
    np.testing.assert_array_equal(pixels(found), pixels(wanted))


def decode(reply):
    return Image.open(io.BytesIO(reply.content))


def test_packages_are_listed(api, client):
    by_name = {each["name"]: each for each in api.get_upscalers()}
    assert list(by_name) == ["None", "Lanczos", "Nearest", "sharp-onnx"]
    assert (by_name["sharp-onnx"]["scale"], by_name["sharp-onnx"]["model_name"]) == (4, "sharp.safetensors")
    models = client.get("/api/models").json()
    assert [(each["name"], each["scale"]) for each in models["upscalers"]] == [("sharp-onnx", 4)]
    assert "sharp-onnx" not in [each["name"] for each in models["models"]]
    choices = client.get("/api/fields").json()["fields"]["hires_upscaler"]["choices"]
    assert choices == ["latent", "lanczos", "sharp-onnx"]


@pytest.mark.parametrize("name", ["sharp-onnx", "sharp", "sharp.safetensors"])
def test_an_image_is_upscaled_as_a_job(api, server, ours, name):
    image = photograph(20, 12)
    found = api.extra_single_image(image, upscaler_1=name, upscaling_resize=3).image
    assert_same(found, ours(image, scale=3))
    job = server.context.queue.jobs[-1]
    assert (job.kind, job.model, job.state.value, job.progress) == ("upscaling", "sharp-onnx", "done", 1)
    assert_same(Image.open(server.context.store.folder / job.files[0]), found)


def test_the_infotext_of_an_image_stays(api):
    made = api.txt2img(**SENT).image
    upscaled = api.extra_single_image(made, upscaler_1="sharp-onnx", upscaling_resize=1.5).image
    assert upscaled.info["parameters"] == made.info["parameters"]
    assert upscaled.info["postprocessing"] == "Postprocess upscale by: 1.5, Postprocess upscaler: sharp.safetensors"


def test_a_box_and_a_second_upscaler(api, ours):
    images = [photograph(20, 10), photograph(12, 24)]
    box = {"resize_mode": 1, "upscaling_resize_w": 40, "upscaling_resize_h": 40}
    blend = {"upscaler_2": "Nearest", "extras_upscaler_2_visibility": 0.25}
    found = api.extra_batch_images(images, upscaler_1="sharp-onnx", **box, **blend).images
    crops = [(20, 0, 60, 40), (0, 20, 40, 60)]
    for image, made, scale, crop in zip(images, found, (4, 40 / 12), crops, strict=True):
        sharp = ours(image, scale=scale)
        nearest = image.resize(sharp.size, Image.Resampling.NEAREST)
        assert_same(made, Image.blend(sharp.crop(crop), nearest.crop(crop), 0.25))
    whole = api.extra_single_image(images[0], upscaler_1="sharp-onnx", upscaling_crop=False, **box).image
    assert_same(whole, ours(images[0], scale=4))


def test_a_second_upscaler_that_is_the_first_does_nothing_twice(api, server, ours):
    image = photograph(20, 12)
    blend = {"upscaler_2": "sharp", "extras_upscaler_2_visibility": 0.5}
    assert_same(
        api.extra_single_image(image, upscaler_1="sharp-onnx", upscaling_resize=2, **blend).image, ours(image, scale=2)
    )
    job = server.context.queue.jobs[-1]
    assert job.step == job.num_steps == 1


def test_hires_fix(api, upscaler):
    made = api.txt2img(**SENT, **HIRES, hr_upscaler="sharp-onnx")
    with sdonnx.load("pictogram", upscaler=upscaler[1], threads=1, memory="max") as pipe:
        request = {"hires_scale": 1.5, "hires_steps": 2, "hires_strength": 1.0, "num_inference_steps": 2}
        asked = {"guidance_scale": 4, "seed": 7, "width": 64, "height": 64, "sampler": "dpmpp_2m"}
        wanted = pipe.generate("a red circle", **request, **asked)
    assert_same(made.image, wanted.images[0])
    assert "Hires upscaler: sharp," in made.info["infotexts"][0]
    again = httpx.post(f"{api.baseurl}/txt2img", json={"infotext": made.info["infotexts"][0]}).json()
    assert_same(made.image, Image.open(io.BytesIO(base64.b64decode(again["images"][0]))))


def finish(client, reply):
    assert reply.status_code == 202, reply.text
    client.get(f"/api/jobs/{reply.json()['id']}/events")
    return client.get(f"/api/jobs/{reply.json()['id']}").json()


def test_the_own_api(client, ours):
    image = photograph(20, 12)
    job = finish(client, client.post("/api/upscale", json={"image": in_base64(image), "upscaler": "sharp-onnx"}))
    assert {name: job[name] for name in ("kind", "state", "model", "request", "result")} == {
        "kind": "upscaling", "state": "done", "model": "sharp-onnx", "request": {"width": 80, "height": 48},
        "result": None,
    }  # fmt: skip
    assert_same(decode(client.get(job["images"][0]["url"])), ours(image))


def test_jobs_and_plans_with_hires_fix(client):
    job = finish(client, client.post("/api/jobs", json={**JOB, "hires_upscaler": "sharp-onnx"}))
    assert (job["state"], job["request"]["hires_upscaler"]) == ("done", "sharp.safetensors")
    info = client.get(f"{job['images'][0]['url']}/info").json()
    assert info["fields"]["hires_upscaler"] == "sharp-onnx"
    plan = client.post("/api/plan", json={**JOB, "hires_upscaler": "sharp-onnx"}).json()
    assert "upscaler/upscaler" in [each["name"] for each in plan["memory"]["components"]]
    assert plan["seconds_from"] == "measured"


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/api/jobs", {**JOB, "hires_upscaler": "blurry"}, 404, "'blurry' is not served; there are: sharp-onnx"),
        ("/api/upscale", {"upscaler": "blurry", "image": "x"}, 404, "'blurry' is not served"),
        ("/api/upscale", {"upscaler": "sharp-onnx", "image": "x"}, 400, "image"),
        ("/api/upscale", {"upscaler": "sharp-onnx", "image": "PNG", "scale": "4"}, 400, "scale is '4'; give a number"),
        ("/api/upscale", {"upscaler": "sharp-onnx", "image": "PNG", "scale": 17}, 400, "scale is 17; give a number"),
        ("/api/upscale", {"upscaler": "sharp-onnx", "image": "PNG", "scale": 1e9}, 413, "pixels"),
        ("/api/upscale", {"upscaler": "sharp-onnx", "image": "PNG", "scale": -1}, 413, "pixels"),
        ("/sdapi/v1/extra-single-image", {"upscaler_1": "blurry", "image": "PNG"}, 400, "Nearest or sharp-onnx"),
        ("/sdapi/v1/txt2img", {**SENT, **HIRES, "hr_upscaler": "x"}, 400, "choose sharp-onnx, Latent, Lanczos or None"),
    ],
)  # fmt: skip
def test_what_is_refused(client, path, body, status, text):
    image = in_base64(photograph(16, 16))
    reply = client.post(path, json={**body, "image": image} if body.get("image") == "PNG" else body)
    assert (reply.status_code, text in reply.json()["detail"]) == (status, True), reply.text


def test_an_upscaling_that_does_not_fit_is_refused(upscaler):
    with running_server(packages=(bundled()[DEFAULT], upscaler[1]), memory="30MB") as server:
        body = {"image": in_base64(photograph(16, 16)), "upscaler": "sharp-onnx"}
        reply = httpx.post(f"{server.url}/api/upscale", json=body)
    assert (reply.status_code, "the server may use 30 MB" in reply.json()["detail"]) == (400, True), reply.text


def test_an_upscaling_is_interrupted_within_its_image(api, server):
    errors = []

    def ask():
        try:
            api.extra_single_image(photograph(2000, 1500), upscaler_1="sharp-onnx", upscaling_resize=1)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: (job := server.context.queue.current) is not None and job.step > 0)
    job = server.context.queue.current
    api.interrupt()
    thread.join()
    assert job.state.value == "cancelled"
    assert job.step < job.num_steps
    assert "interrupted" in errors[0]
    assert job.upscaling.images == ()
