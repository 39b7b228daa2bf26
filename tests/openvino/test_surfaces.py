"""OpenVINO by the ways that users reach it: previews, upscaling, safety, the command line and the server."""

import base64
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image
from support.cli import run_cli
from support.drawing import SMALL, OnBoth
from support.images import in_base64, photograph
from support.reference import psnr
from support.safety import THREE
from support.server import running_server

import sdonnx

pytestmark = pytest.mark.usefixtures("openvino")

ON_OPENVINO = ("--device", "openvino")


def test_pictogram_in_the_device_s_own_choice():
    """In bfloat16 where the CPU has it; the result says so."""
    request = sdonnx.Request(**{**SMALL, "prompt": "a cat on a yellow background", "num_inference_steps": 4})
    with OnBoth("pictogram", compute="auto") as both:
        found = both.assert_same(least=35, **vars(request))
        wanted = both.cpu.generate(request)
    assert (found.compute == "bf16") != np.allclose(found.latents, wanted.latents, atol=1e-4)


def test_previews_are_those_of_the_cpu_provider(package):
    request = sdonnx.Request(**SMALL)
    with OnBoth(package, preview_vae=package) as both:
        found, wanted = ([step.preview() for step in pipe.stream(request)] for pipe in (both.openvino, both.cpu))
        assert len(found) == len(wanted) == 2
        assert all(psnr(image, other) >= 60 for image, other in zip(found, wanted, strict=True))


def test_leaving_the_loop_leaves_a_pipeline_that_works(package):
    with OnBoth(package) as both:
        for _step in both.openvino.stream(sdonnx.Request(**SMALL)):
            break
        both.assert_same()


def test_a_safety_checker_flags_what_it_flags_on_the_cpu(checked):
    with OnBoth(checked.path, safety="mark") as both:
        found = both.assert_same(**vars(THREE))
    assert [each.flagged for each in found.safety] == checked.flags


def test_an_upscaler(upscaler):
    _, package = upscaler
    image = photograph(40, 24)
    results = []
    for device in ("openvino", "cpu"):
        with sdonnx.load_upscaler(package, device=device, compute="f32", threads=1) as network:
            results.append(network.upscale(image))
    assert results[0].size == (160, 96)
    assert np.asarray(results[1]).std() > 5
    assert psnr(*results) >= 60


def test_run_and_info(tmp_path):
    path = tmp_path / "apple.png"
    asked = ("--steps", 2, "--seed", 7, "--threads", 1, "--no-enlarge", "-o", path)
    ran = run_cli("run", "a red apple", *ON_OPENVINO, *asked)
    assert ran.returncode == 0, ran.stderr
    with sdonnx.load("pictogram", device="openvino", threads=1) as pipe, Image.open(path) as image:
        result = pipe.generate("a red apple", num_inference_steps=2, seed=7)
        assert psnr(image, result.images[0]) >= 60
        assert json.loads(image.info["sdonnx"]).get("compute", "f32") == result.compute
    shown = json.loads(run_cli("info", "pictogram", *ON_OPENVINO, "--json").stdout)
    assert set(shown["nodes"]) == set(shown["components"])
    for name, text in shown["nodes"].items():
        assert "nodes on openvino" in text and "on the CPU" not in text, name


def test_bench_opens_every_component_on_openvino():
    asked = ("--steps", 1, "--repeat", 1, "--threads", 1, "--json")
    ran = run_cli("bench", "pictogram", *ON_OPENVINO, "--compute", "f32", *asked)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    for figures in report["components"]:
        assert figures["provider"] == "OpenVINOExecutionProvider"
        assert figures["compute"] == "f32"
        assert figures["on_cpu"] == {}


def test_the_server_draws_what_it_draws_on_the_cpu():
    sent = {"prompt": "a red apple", "seed": 7, "steps": 2, "width": 64, "height": 64, "cfg_scale": 4}
    sent |= {"init_images": [in_base64(photograph())], "denoising_strength": 0.5}
    drawn = []
    for settings in ({"device": "openvino", "compute": "f32"}, {"device": "cpu"}):
        with running_server(**settings) as server:
            for kind in ("txt2img", "img2img"):
                answer = httpx.post(f"{server.url}/sdapi/v1/{kind}", json=sent, timeout=60)
                assert answer.status_code == 200, answer.text
                drawn.append(Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))).convert("RGB"))
    assert psnr(drawn[0], drawn[1]) < 40
    assert all(psnr(drawn[index], drawn[index + 2]) >= 60 for index in (0, 1))
