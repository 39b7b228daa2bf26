"""``sdonnx serve --safety``: what clients of each API get of flagged images."""

import base64
import io
import json

import httpx
import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from PIL import Image
from support.cli import run_cli
from support.safety import THREE
from support.server import running_server

BODY = {"prompt": THREE.prompt, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def refusing(checked):
    with running_server(packages=(checked.path,), safety="refuse") as running:
        yield running


@pytest.fixture(scope="module")
def kept(checked):
    return [index for index, flagged in enumerate(checked.flags) if not flagged]


def decoded(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_a1111_gets_the_images_that_are_not_refused(refusing, checked, kept):
    body = {**BODY, "seed": 1, "steps": 1, "batch_size": 3}
    reply = httpx.post(f"{refusing.url}/sdapi/v1/txt2img", json=body, timeout=60).json()
    assert [
        np.array_equal(decoded(text), checked.images[index]) for text, index in zip(reply["images"], kept, strict=True)
    ]
    info = json.loads(reply["info"])
    assert info["all_seeds"] == [index + 1 for index in kept]
    assert info["seed"] == kept[0] + 1, "the first image's that there is"
    assert [f"Seed: {index + 1}," in text for index, text in zip(kept, info["infotexts"], strict=True)]
    assert [each["flagged"] for each in info["safety"]] == checked.flags
    assert info["comments"].count("is refused: StableDiffusionSafetyChecker") == sum(checked.flags)


def test_a1111_names_the_drawn_prompt_of_the_first_image_that_is_kept(refusing, checked, kept):
    assert kept[0] > 0
    body = {**BODY, "prompt": f"{{{THREE.prompt}|{THREE.prompt} }}", "seed": 1, "steps": 1, "batch_size": 3}
    info = json.loads(httpx.post(f"{refusing.url}/sdapi/v1/txt2img", json=body, timeout=60).json()["info"])
    assert (info["prompt"], info["seed"]) == (info["all_prompts"][0], info["all_seeds"][0])
    assert info["infotexts"][0].startswith(info["prompt"])


def test_jobs_tell_the_scores_and_show_no_previews(refusing, checked, kept):
    body = {**BODY, "seed": 1, "num_inference_steps": 1, "num_images": 3}
    job = httpx.post(f"{refusing.url}/api/jobs", json=body).json()["id"]
    refusing.wait_until_idle()
    found = httpx.get(f"{refusing.url}/api/jobs/{job}").json()
    assert [each["flagged"] for each in found["safety"]] == checked.flags
    assert [int(each["name"][-5]) for each in found["images"]] == kept
    assert httpx.get(f"{refusing.url}/api/jobs/{job}/preview").status_code == 404
    assert not httpx.get(f"{refusing.url}/api/models").json()["models"][0]["preview"]


def test_openai_gets_content_policy_violation(refusing, checked, kept):
    refused = next(index for index, flagged in enumerate(checked.flags) if flagged)
    client = OpenAI(base_url=f"{refusing.url}/v1", api_key="none", max_retries=0)

    def generate(seed):
        extra = {"seed": seed, "steps": 1}
        return client.images.generate(prompt=THREE.prompt, size="64x64", moderation="low", extra_body=extra)

    with pytest.raises(BadRequestError, match="the image is refused") as raised:
        generate(refused + 1)
    assert raised.value.code == "content_policy_violation"
    reply = generate(kept[0] + 1)
    assert np.array_equal(decoded(reply.data[0].b64_json), checked.images[kept[0]])
    assert reply.data[0].safety["flagged"] is False
    assert not list(refusing.context.store.folder.glob("*.npz")), "the latents of refused images are not kept"


def test_a_remote_run_gets_what_is_kept(refusing, checked, kept, tmp_path):
    asked = (THREE.prompt, "--seed", 1, "--count", 3, "--size", "64x64", "--steps", 1, "-o", tmp_path / "a.png")
    ran = run_cli("run", *asked, "--server", refusing.url)
    assert ran.returncode == 1
    assert "1 of 3 images is refused" in ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a-{index + 1}.png" for index in kept]


def test_without_a_checker_the_server_does_not_start(package, monkeypatch, tmp_path):
    monkeypatch.setattr("sdonnx_runtime.safety.checkers.find_spec", lambda _name: None)
    ran = run_cli("serve", "-m", package, "--safety", "mark", cwd=tmp_path)
    assert ran.returncode == 2
    assert 'tiny has none; pip install "sdonnx[safety]"' in ran.stderr
