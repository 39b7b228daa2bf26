"""The requests that apps send to AUTOMATIC1111's API, as their sources have them, and what they read of the replies."""

import base64
import io
import json
import subprocess
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from support.images import in_base64, photograph
from support.javascript import install_packages

SIZE = {"width": 64, "height": 64}


@pytest.fixture
def client(server):
    with httpx.Client(base_url=f"{server.url}/sdapi/v1/", timeout=30) as made:
        yield made


def decoded(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text, validate=True))))


def test_open_webui(client, pipeline):
    headers = {"authorization": ""}  # which it sends without a password
    assert client.get("options", headers=headers).status_code == 200  # the check of the address
    models = client.get("sd-models", headers=headers).json()
    assert [model["model_name"] for model in models] == ["pictogram"]
    options = client.get("options", headers=headers).json()
    assert options["sd_model_checkpoint"] == models[0]["title"]
    options["sd_model_checkpoint"] = models[0]["title"]
    client.post("options", json=options, headers=headers).raise_for_status()
    sent = {"prompt": "a red circle", "batch_size": 1, **SIZE}
    reply = client.post("txt2img", json={**sent, "steps": 2, "negative_prompt": "blue"}, headers=headers).json()
    seed = json.loads(reply["info"])["seed"]
    wanted = pipeline.generate("a red circle", negative_prompt="blue", seed=seed, num_inference_steps=2, **SIZE)
    assert np.array_equal(decoded(reply["images"][0]), np.asarray(wanted.images[0]))
    info = json.loads(client.post("txt2img", json=sent, headers=headers).json()["info"])
    assert (info["steps"], info["cfg_scale"]) == (25, 4.0)  # the package's: it sends neither


def test_librechat(client):
    sent = {
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "cfg_scale": 4.5,
        "steps": 2,
        **SIZE,
    }  # its own is 1024
    reply = client.post("txt2img", json=sent)
    assert reply.status_code == 200
    image, info = reply.json()["images"][0], json.loads(reply.json()["info"])
    assert decoded(image.split(",", 1)[0]).shape == (64, 64, 3)
    assert (info["height"], info["width"], type(info["seed"])) == (64, 64, int)
    assert info["infotexts"][0].split("\n").pop().startswith("Steps: 2, Sampler: DPM++ 2M, CFG scale: 4.5, Seed: ")


def test_swarmui(client):
    checkpoint = client.get("options").json()["sd_model_checkpoint"]
    assert checkpoint.rpartition(" [")[0] == "pictogram"
    assert "Euler" in [sampler["name"] for sampler in client.get("samplers").json()]
    (title,) = [model["title"] for model in client.get("sd-models").json()]
    reply = client.post("options", json={"sd_model_checkpoint": title.rpartition(" [")[0]})
    assert reply.json() is None
    sent = {
        "prompt": "a red circle",
        "negative_prompt": "",
        "seed": 5,
        "steps": 2,
        **SIZE,
        "batch_size": 2,
        "cfg_scale": 4,
    }
    sent |= {"subseed": -1, "subseed_strength": 0, "sampler_name": "Euler"}
    assert len(client.post("txt2img", json=sent).json()["images"]) == 2
    sent |= {"init_images": [in_base64(photograph())], "denoising_strength": 0.6}
    assert decoded(client.post("img2img", json=sent).json()["images"][1]).shape == (64, 64, 3)


def test_kobold_lite(client, server):
    model = client.get("sd-models").json()[0]["title"]
    options = client.get("options").json()
    assert (options["samples_format"], options["sd_model_checkpoint"]) == ("png", model)
    overrides = {"sd_model_checkpoint": model, "eta_noise_seed_delta": 0.0, "CLIP_stop_at_last_layers": 1.0}
    overrides |= {"ddim_discretize": "uniform", "img2img_fix_steps": False, "sd_hypernetwork": "None"}
    overrides |= {"inpainting_mask_weight": 1.0, "initial_noise_multiplier": 1.0, "comma_padding_backtrack": 20.0}
    sent = {"prompt": "a red circle", "seed": 5, "sampler_name": "Euler a", "batch_size": 1, "n_iter": 1, "steps": 2}
    sent |= {"cfg_scale": 4, **SIZE, "negative_prompt": "blue", "do_not_save_samples": True, "do_not_save_grid": True}
    sent |= {"enable_hr": False, "eta": 0, "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 1}
    sent |= {"override_settings": overrides, "scheduler": "karras", "clip_skip": 1}
    reply = client.post("txt2img", json=sent).json()
    assert decoded(reply["images"][0]).shape == (64, 64, 3)
    request = server.context.queue.jobs[-1].request
    assert (request.eta, request.schedule, request.sampler) == (0, "karras", "euler_ancestral")
    assert "ddim_discretize" in json.loads(reply["info"])["comments"]
    sent |= {"init_images": [f"data:image/png;base64,{in_base64(photograph())}"], "denoising_strength": 0.6}
    assert client.post("img2img", json=sent).status_code == 200
    refused = client.post("interrogate", json={"image": in_base64(photograph()), "model": "clip"})
    assert (refused.status_code, refused.json().get("caption")) == (501, None)


def sillytavern(**changes):
    sent = {"url": "http://127.0.0.1:7860", "auth": "a:b", "prompt": "a red circle", "negative_prompt": "blue"}
    sent |= {"sampler_name": "DPM++ 2M", "scheduler": "automatic", "steps": 2, "cfg_scale": 4, **SIZE}
    sent |= {"restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 1.5}
    sent |= {"denoising_strength": 0.7, "hr_second_pass_steps": 0, "seed": 3, "clip_skip": 1}
    sent |= {"override_settings": {"CLIP_stop_at_last_layers": 1}, "override_settings_restore_afterwards": True}
    sent |= {"hr_additional_modules": [], "save_images": True, "send_images": True}
    return {**sent, "do_not_save_grid": False, "do_not_save_samples": False, **changes}


def test_sillytavern(client, pipeline):
    lists = [client.get(name) for name in ("samplers", "schedulers", "upscalers", "latent-upscale-modes", "sd-vae")]
    samplers, schedulers, upscalers, modes, vaes = (reply.raise_for_status().json() for reply in lists)
    assert "DPM++ 2M" in [each["name"] for each in samplers]
    assert schedulers[0]["name"] == "automatic"
    names = [each["name"] for each in upscalers]
    names[1:1] = [each["name"] for each in modes]
    assert names == ["None", "Latent", "Lanczos", "Nearest"]
    assert [each["model_name"] for each in vaes] == []
    client.post("options", json={"sd_model_checkpoint": client.get("sd-models").json()[0]["title"]}).raise_for_status()
    progress = client.get("progress").json()
    assert (progress["progress"], progress["state"]["job_count"]) == (0, 0)
    made = client.post("txt2img", json=sillytavern()).json()["images"][0]
    common = {"negative_prompt": "blue", "seed": 3, "num_inference_steps": 2, "guidance_scale": 4, **SIZE}
    wanted = pipeline.generate("a red circle", sampler="dpmpp_2m", **common)
    assert np.array_equal(decoded(made), np.asarray(wanted.images[0]))
    hires = client.post("txt2img", json=sillytavern(enable_hr=True, hr_upscaler="None"))
    assert decoded(hires.json()["images"][0]).shape == (96, 96, 3)


def test_sillytavern_goes_away(server):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/sdapi/v1/txt2img", json=sillytavern(steps=200), timeout=0.3)
    assert httpx.post(f"{server.url}/sdapi/v1/interrupt").json() == {}
    server.wait_until_idle()
    assert server.context.queue.jobs[-1].state.value == "cancelled"


def test_several_clients_wait_for_each_other(server, pipeline):
    replies = {}

    def ask(seed):
        sent = sillytavern(seed=seed)
        replies[seed] = httpx.post(f"{server.url}/sdapi/v1/txt2img", json=sent, timeout=60).json()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    common = {"negative_prompt": "blue", "num_inference_steps": 2, "guidance_scale": 4, "sampler": "dpmpp_2m", **SIZE}
    wanted = pipeline.generate("a red circle", seed=0, num_images=4, **common).images
    for seed, image in enumerate(wanted):
        assert np.array_equal(decoded(replies[seed]["images"][0]), np.asarray(image))


def test_the_npm_client(server, pipeline):
    folder = install_packages(Path(__file__).parent / "js")
    host, port = server.address
    command = ["node", "a1111.cjs", host, str(port)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    wanted = pipeline.generate(
        "a red circle", seed=3, num_inference_steps=2, guidance_scale=4, sampler="dpmpp_2m", **SIZE
    )
    assert base64.b64decode(found["made"]) == np.asarray(wanted.images[0]).tobytes()
    assert (found["again"], found["sizes"], found["edges"]) == (1, [128, 128], 1)
    assert found["lists"] == [True] * 8
    assert found["error"] == "ECONNABORTED"
    assert found["progress"]["current_image"] is None
    server.wait_until_idle()
    assert server.context.queue.jobs[-1].state.value == "cancelled"
