"""ControlNets, LoRAs, textual inversions, VAEs and distilled packages through AUTOMATIC1111's API."""

import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from sdonnx_models import bundled
from sdonnx_runtime.images.canny import canny
from support.images import photograph
from support.server import running_server
from webuiapi import ControlNetUnit, WebUIApi, raw_b64_img

import sdonnx

SIZE = {"width": 64, "height": 64}
SENT = {"prompt": "a red circle", "seed": 7, "steps": 2, "cfg_scale": 4, "sampler_name": "DPM++ 2M", **SIZE}
WANTED = {"seed": 7, "num_inference_steps": 2, "guidance_scale": 4, "sampler": "dpmpp_2m", **SIZE}
LAYER = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


def connect(server):
    host, port = server.address
    return WebUIApi(host=host, port=port)


def assert_same(result, wanted):
    assert np.array_equal(np.asarray(result.image), np.asarray(wanted.images[0]))


@pytest.fixture(scope="module")
def controlled(package, control, image_prompter):
    with running_server(packages=(package, control, image_prompter)) as running:
        yield running


def test_a_control_and_then_none(controlled, package, control):
    api, image = connect(controlled), photograph()
    with sdonnx.load(package, controls=[control], memory="max") as pipe, sdonnx.load(package) as plain:
        given = sdonnx.Control(image=image, scale=0.8, start=0.0, end=0.5)
        wanted, without = (
            pipe.generate("a red circle", controls=(given,), **WANTED),
            plain.generate("a red circle", **WANTED),
        )
    model, adapter = api.controlnet_model_list()
    assert model.startswith("edges-onnx [") and adapter.startswith("style-onnx [")
    unit = ControlNetUnit(image=image, model=model, weight=0.8, guidance_end=0.5)
    result = api.txt2img(**SENT, controlnet_units=[unit])
    assert_same(result, wanted)
    assert "ControlNet 0" in result.info["infotexts"][0]
    assert_same(api.txt2img(**SENT), without)  # webuiapi sends the last call's unit again unless /scripts has m2m


def test_canny_and_guess_mode(controlled, package, control):
    api, image = connect(controlled), photograph()
    with sdonnx.load(package, controls=[control], memory="max") as pipe:
        edges = sdonnx.Control(image=canny(image, 50, 150))
        wanted = pipe.generate("a red circle", controls=(edges,), control_guess=True, **WANTED)
    unit = ControlNetUnit(
        image=image, model="edges-onnx", module="canny", threshold_a=50, threshold_b=150, control_mode=2
    )
    assert_same(api.txt2img(**SENT, controlnet_units=[unit]), wanted)
    detected = api.controlnet_detect([image], module="canny", threshold_a=50, threshold_b=150)
    assert np.array_equal(np.asarray(detected.image), np.asarray(canny(image, 50, 150)))
    assert detected.info == "Success"


def test_an_ip_adapter_s_unit_and_job(controlled, package, control, image_prompter):
    api, image, edges = connect(controlled), photograph(80, 60), photograph()
    given = {
        "controls": (sdonnx.Control(image=edges),),
        "ip_adapters": (sdonnx.IPAdapter(image=image, scale=0.6, end=0.5),),
    }
    with sdonnx.load(package, controls=[control], ip_adapters=[image_prompter], memory="max") as pipe:
        wanted = pipe.generate("a red circle", **given, **WANTED)
    how = {"model": "style-onnx", "module": "ip-adapter-auto", "weight": 0.6, "guidance_end": 0.5}
    units = [ControlNetUnit(image=image, **how), ControlNetUnit(image=edges, model="edges-onnx")]
    result = api.txt2img(**SENT, controlnet_units=units)
    assert_same(result, wanted)
    text = result.info["infotexts"][0]
    assert 'ControlNet 1: "Module: ip-adapter-auto, Model: ip-adapter_tiny.bin, Weight: 0.6' in text
    encoded = {each: raw_b64_img(made) for each, made in {"style": image, "edges": edges}.items()}
    adapter = {"package": "style-onnx", "image": encoded["style"], "scale": 0.6, "end": 0.5}
    job = {"prompt": "a red circle", **WANTED, "ip_adapters": [adapter]}
    job["controls"] = [{"package": "edges-onnx", "image": encoded["edges"]}]
    posted = httpx.post(f"{controlled.url}/api/jobs", json=job).json()
    with httpx.stream("GET", f"{controlled.url}/api/jobs/{posted['id']}/events", timeout=60) as events:
        assert len(list(events.iter_lines())) > 0  # they end with the job
    done = httpx.get(f"{controlled.url}/api/jobs/{posted['id']}").json()
    assert done["result"]["ip_adapters"] == ["ip-adapter_tiny.bin"]
    made = httpx.get(f"{controlled.url}{done['images'][0]['url']}").content
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(made))), np.asarray(wanted.images[0]))
    listed = httpx.get(f"{controlled.url}/api/models").json()["ip_adapters"]
    assert [each["name"] for each in listed] == ["style-onnx"] and "plain, 4 tokens" in listed[0]["description"]


def test_the_image_stands_for_a_unit_s(controlled, package, control):
    image = photograph()
    with sdonnx.load(package, controls=[control], memory="max") as pipe:
        given = {"image": image, "strength": 0.75, "fit": "stretch", "controls": (sdonnx.Control(image=image),)}
        wanted = pipe.generate("a red circle", **given, **WANTED)
    unit = ControlNetUnit(model="edges-onnx")
    assert_same(connect(controlled).img2img([image], **SENT, controlnet_units=[unit]), wanted)


def test_what_the_extension_lists(controlled):
    api = connect(controlled)
    assert api.controlnet_version() == 2
    assert api.controlnet_module_list()[:3] == ["none", "canny", "ip-adapter-auto"]
    types = httpx.get(f"{controlled.url}/controlnet/control_types").json()["control_types"]
    assert types["Canny"]["default_option"] == "canny"
    assert [name.partition(" ")[0] for name in types["All"]["model_list"]] == ["None", "edges-onnx", "style-onnx"]
    assert types["IP-Adapter"]["default_model"].startswith("style-onnx [")


@pytest.mark.parametrize(
    ("unit", "status", "text"),
    [
        ({"model": "other"}, 404, "edges-onnx"),
        ({"model": "None"}, 400, "no model"),
        ({"module": "openpose"}, 422, "openpose"),
        ({"module": "ip-adapter-auto"}, 400, "requires the model of an IP-Adapter"),
        ({"module": "canny", "model": "style-onnx"}, 400, "is not for IP-Adapters"),
        ({"control_mode": "My prompt is more important"}, 400, "control_mode"),
        ({"weight": "heavy"}, 422, "args.weight"),
        ({"weight": 1e9}, 400, "scale"),
        ({"image": "http://127.0.0.1/x.png"}, 400, "URL"),
        ({"image": None}, 400, "no image"),
        ({"guidance_start": 1, "guidance_end": 0}, 400, "starts"),
    ],
)
def test_units_that_are_refused(controlled, unit, status, text):
    args = [{"image": raw_b64_img(photograph()), "model": "edges-onnx", **unit}]
    sent = {**SENT, "alwayson_scripts": {"controlnet": {"args": args}}}
    reply = httpx.post(f"{controlled.url}/sdapi/v1/txt2img", json=sent)
    assert (reply.status_code, text in json.dumps(reply.json()["detail"])) == (status, True)
    args[0]["enabled"] = False
    if unit.get("weight") != "heavy":
        assert httpx.post(f"{controlled.url}/sdapi/v1/txt2img", json=sent).status_code == 200


def test_control_images_are_not_resized_to_sizes_that_are_refused(controlled):
    unit = {"image": raw_b64_img(photograph()), "model": "edges-onnx", "resize_mode": "Just Resize"}
    sent = {**SENT, "width": 300_000, "height": 300_008, "alwayson_scripts": {"controlnet": {"args": [unit]}}}
    reply = httpx.post(f"{controlled.url}/sdapi/v1/txt2img", json=sent)
    assert reply.status_code == 400
    assert reply.json()["detail"].startswith("width is 300000")


def test_a_control_of_another_model_is_the_client_s_mistake(control):
    with running_server(packages=(bundled()["pictogram"], control)) as server:
        unit = ControlNetUnit(image=photograph(), model="edges-onnx")
        with pytest.raises(RuntimeError, match="400"):
            connect(server).txt2img(**SENT, controlnet_units=[unit])


def test_loras_and_embeddings(tmp_path, rng):
    loras, embeddings = tmp_path / "loras", tmp_path / "embeddings"
    loras.mkdir()
    embeddings.mkdir()
    up, down = rng.normal(size=(128, 2)).astype(np.float32), rng.normal(size=(2, 128)).astype(np.float32)
    tensors = {f"{LAYER}.lora_up.weight": up, f"{LAYER}.lora_down.weight": down}
    save_file(tensors, loras / "ink.safetensors", {"ss_output_name": "pen"})
    save_file({"emb_params": rng.normal(size=(2, 192)).astype(np.float32)}, embeddings / "glow.safetensors")
    save_file({"emb_params": np.ones((1, 7), np.float32)}, embeddings / "other.safetensors")
    with running_server(lora_folder=loras, embedding_folder=embeddings) as server:
        api = connect(server)
        assert api.get_loras() == [
            {"name": "ink", "alias": "pen", "path": "ink.safetensors", "metadata": {"ss_output_name": "pen"}}
        ]
        found = api.get_embeddings()
        assert (list(found["loaded"]), list(found["skipped"])) == (["glow"], ["other"])
        assert (found["loaded"]["glow"]["shape"], found["loaded"]["glow"]["vectors"]) == (192, 2)
        prompt = "a red circle, glow <lora:ink:0.8>"
        with sdonnx.load(
            "pictogram", lora_folder=loras, embeddings=[embeddings / "glow.safetensors"], memory="max"
        ) as pipe:
            wanted, plain = pipe.generate(prompt, **WANTED), pipe.generate("a red circle, glow", **WANTED)
        assert_same(api.txt2img(**{**SENT, "prompt": prompt}), wanted)
        assert not np.array_equal(np.asarray(wanted.images[0]), np.asarray(plain.images[0]))
        sent = {**SENT, "prompt": "a red circle, glow ", "lora": [{"path": "ink.safetensors", "multiplier": 0.8}]}
        api.txt2img(**SENT)
        reply = httpx.post(f"{server.url}/sdapi/v1/txt2img", json=sent)
        assert_same(api._to_api_result(reply), wanted)
        with pytest.raises(RuntimeError, match="400.*missing"):
            api.txt2img(**{**SENT, "prompt": "a <lora:missing:1>"})


def distilled(folder, **defaults):
    """Pictogram, as if it took few steps."""
    folder.mkdir()
    for path in bundled()["pictogram"].iterdir():
        if path.name != "sdonnx.json":
            (folder / path.name).symlink_to(path)
    manifest = json.loads((bundled()["pictogram"] / "sdonnx.json").read_text())
    manifest["defaults"] |= defaults
    (folder / "sdonnx.json").write_text(json.dumps(manifest))
    return folder


def test_distilled_packages_take_their_own_steps_and_guidance(tmp_path):
    turbo = distilled(tmp_path / "turbo", num_inference_steps=2, guidance_scale=1.0)
    sent = {**SENT, "steps": 20, "cfg_scale": 7}
    with running_server(packages=(turbo, bundled()["pictogram"])) as server:
        reply = httpx.post(f"{server.url}/sdapi/v1/txt2img", json=sent)
        info = json.loads(reply.json()["info"])
        assert (info["steps"], info["cfg_scale"]) == (2, 1)
        assert "steps 20 was lowered to 2" in info["comments"]
        assert reply.headers["x-sdonnx-note"] == info["comments"].replace("\n", "; ")
        with sdonnx.load(turbo, memory="max") as pipe:
            wanted = pipe.generate("a red circle", **{**WANTED, "guidance_scale": 1})
        assert_same(connect(server)._to_api_result(reply), wanted)
        image = connect(server).img2img([photograph()], **{**sent, "denoising_strength": 0.5})
        assert image.info["steps"] == 4  # of which 2 are made
        few = httpx.post(f"{server.url}/sdapi/v1/txt2img", json={**sent, "steps": 1, "cfg_scale": 1})
        assert "x-sdonnx-note" not in few.headers
        other = {**SENT, "steps": 4, "override_settings": {"sd_model_checkpoint": "pictogram"}}
        made = connect(server).txt2img(**other)
        assert (made.info["steps"], made.info["sd_model_name"]) == (4, "pictogram")
        assert connect(server).util_get_current_model().startswith("turbo [")
        kept = {**other, "override_settings_restore_afterwards": False}
        connect(server).txt2img(**kept)
        assert connect(server).util_get_current_model().startswith("pictogram [")
    with running_server(packages=(turbo,), as_asked=True) as server:
        reply = httpx.post(f"{server.url}/sdapi/v1/txt2img", json={**SENT, "steps": 3})
        assert (json.loads(reply.json()["info"])["steps"], "x-sdonnx-note" in reply.headers) == (3, False)
