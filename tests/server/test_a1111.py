"""AUTOMATIC1111's API, as its Python client webuiapi uses it: the images are the library's own."""

import asyncio
import base64
import io
import json
import threading
import time

import httpx
import numpy as np
import pytest
from PIL import Image
from support.images import disc, photograph
from webuiapi import HiResUpscaler, WebUIApi

import sdonnx

SIZE = {"width": 64, "height": 64}
SENT = {"prompt": "a red circle", "seed": 7, "steps": 2, "cfg_scale": 4, "sampler_name": "DPM++ 2M", **SIZE}
WANTED = {"seed": 7, "num_inference_steps": 2, "guidance_scale": 4, "sampler": "dpmpp_2m", **SIZE}


@pytest.fixture
def api(server):
    host, port = server.address
    return WebUIApi(host=host, port=port)


def pixels(image):
    return np.asarray(image.convert("RGB"))


def assert_same(result, images):
    assert len(result.images) == len(images)
    for found, wanted in zip(result.images, images, strict=True):
        assert np.array_equal(pixels(found), pixels(wanted))


def test_every_getter_returns_json(api):
    getters = [name for name in dir(api) if name.startswith("get_")]
    getters = [name for name in getters if name not in ("get_endpoint", "get_artists", "get_artist_categories")]
    assert len(getters) == 17
    for name in getters:
        assert isinstance(getattr(api, name)(), (dict, list)), name
    for name in ("refresh-checkpoints", "refresh-loras", "refresh-vae", "refresh-embeddings"):
        assert httpx.post(f"{api.baseurl}/{name}").json() is None
    assert httpx.post(f"{api.baseurl}/unload-checkpoint").json() == {}
    assert api.interrupt() == {}
    assert api.skip() is None


def test_images_are_those_of_the_library(api, pipeline):
    result = api.txt2img(**SENT, negative_prompt="blue", batch_size=2, n_iter=1)
    wanted = pipeline.generate("a red circle", negative_prompt="blue", num_images=2, **WANTED)
    assert_same(result, wanted.images)
    assert result.info["all_seeds"] == [7, 8]
    assert result.info["infotexts"] == [image.info["parameters"] for image in result.images]
    names = ("steps", "cfg_scale", "seed", "width", "height", "sampler_name", "batch_size", "negative_prompt")
    assert [result.info[name] for name in names] == [2, 4, 7, 64, 64, "DPM++ 2M", 2, "blue"]
    assert result.info["sd_model_name"] == "pictogram"
    assert result.parameters["prompt"] == "a red circle"


def test_tiling(api, server, pipeline):
    """Of a request, of the settings, and of an infotext; a request's own counts most."""
    tiled, plain = (pipeline.generate("a red circle", **WANTED, tiling=axes).images for axes in ("xy", None))
    result = api.txt2img(**SENT, tiling=True)
    assert_same(result, tiled)
    assert "Tiling: True" in result.info["infotexts"][0]

    def post(path, **sent):
        return httpx.post(f"{api.baseurl}/{path}", json=sent)

    def image(**sent):
        reply = post("txt2img", **sent).json()["images"][0]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply))))

    assert np.array_equal(image(infotext=result.info["infotexts"][0]), np.asarray(tiled[0]))
    assert np.array_equal(image(**SENT, override_settings={"tiling": True}), np.asarray(tiled[0]))
    assert post("options", tiling=True).status_code == 200
    assert api.get_options()["tiling"] is True
    assert_same(api.txt2img(**SENT, tiling=False), plain)
    assert post("options", tiling="yes").status_code == 422
    assert post("options", tiling=False).status_code == 200


def test_tiling_is_left_out_where_a_crop_is_inpainted(api):
    sent = {"images": [photograph()], "mask_image": disc(), "denoising_strength": 0.5, "tiling": True}
    sent |= {name: each for name, each in SENT.items() if name not in SIZE} | SIZE
    comments = [api.img2img(**sent, inpaint_full_res=crop).info["comments"] for crop in (True, False)]
    assert ["tiling is not supported with inpaint_full_res" in each for each in comments] == [True, False]


def test_its_default_sampler_and_noise(api, pipeline):
    sent = {name: value for name, value in SENT.items() if name != "sampler_name"}
    wanted = pipeline.generate("a red circle", **{**WANTED, "sampler": "euler_ancestral"})
    assert_same(api.txt2img(**sent), wanted.images)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "sampler_wanted", "schedule"),
    [
        ("DPM++ 2M Karras", "automatic", "dpmpp_2m", "karras"),
        ("Euler", "Karras", "euler", "karras"),
        ("k_euler_a", "exponential", "euler_ancestral", "exponential"),
        ("k_dpmpp_2m_ka", "", "dpmpp_2m", "karras"),
        ("dpmpp_2m", "SGM Uniform", "dpmpp_2m", "sgm_uniform"),
        ("DPM++ 2M", "align_your_steps", "dpmpp_2m", "ays"),
        ("Automatic", "Automatic", None, None),
    ],
)
def test_names_of_samplers_and_schedules(api, server, sampler, scheduler, sampler_wanted, schedule):
    sent = {**SENT, "steps": 2, "sampler_name": sampler, "scheduler": scheduler}
    httpx.post(f"{api.baseurl}/txt2img", json=sent).raise_for_status()
    request = server.context.queue.jobs[-1].request
    assert (request.sampler, request.schedule) == (sampler_wanted or "dpmpp_2m", schedule)


def test_variation(api, pipeline):
    result = api.txt2img(**SENT, subseed=5, subseed_strength=0.3, batch_size=2)
    wanted = pipeline.generate("a red circle", variation=(5, 0.3), num_images=2, **WANTED)
    assert_same(result, wanted.images)
    assert (result.info["all_seeds"], result.info["all_subseeds"]) == ([7, 7], [5, 6])


def test_a_random_seed_is_told(api, pipeline):
    result = api.txt2img(**{**SENT, "seed": -1})
    wanted = pipeline.generate("a red circle", **{**WANTED, "seed": result.info["seed"]})
    assert_same(result, wanted.images)


@pytest.mark.parametrize(("mode", "fit"), [(0, "stretch"), (1, "crop"), (2, "pad"), (3, "stretch")])
def test_image_to_image(api, pipeline, mode, fit):
    image = photograph(96, 64)
    result = api.img2img([image], **SENT, resize_mode=mode, denoising_strength=0.7)
    assert_same(result, pipeline.generate("a red circle", image=image, strength=0.7, fit=fit, **WANTED).images)
    assert result.parameters["init_images"] is None
    assert result.info["denoising_strength"] == 0.7


def test_inpainting(api, pipeline):
    image, mask = photograph(), disc()
    sent = {**SENT, "denoising_strength": 0.9, "mask_blur": 2}
    wanted = {"image": image, "strength": 0.9, "mask_blur": 2, "fit": "stretch", **WANTED}
    whole = api.img2img([image], mask_image=mask, inpaint_full_res=False, **sent)
    assert_same(whole, pipeline.generate("a red circle", mask_image=mask, **wanted).images)
    masked = api.img2img([image], mask_image=mask, inpaint_full_res_padding=8, **sent)
    assert_same(masked, pipeline.generate("a red circle", mask_image=mask, padding_mask_crop=8, **wanted).images)
    inverted = Image.eval(mask, lambda value: 255 - value)
    other = api.img2img([image], mask_image=inverted, inpainting_mask_invert=1, inpaint_full_res=False, **sent)
    assert_same(other, [whole.image])
    painted = Image.new("RGBA", mask.size, (0, 0, 0, 0))
    painted.paste((0, 0, 0, 255), mask=mask)
    drawn = api.img2img([image], mask_image=painted, inpaint_full_res=False, **sent)
    assert_same(drawn, [whole.image])


@pytest.mark.parametrize(
    ("size", "upscaler"), [({"hr_scale": 1.5}, "latent"), ({"hr_resize_x": 96, "hr_resize_y": 96}, "lanczos")]
)
def test_hires_fix_makes_all_steps_of_the_second_pass(api, pipeline, size, upscaler):
    chosen = {"latent": HiResUpscaler.Latent, "lanczos": HiResUpscaler.Lanczos}[upscaler]
    more = {"enable_hr": True, "denoising_strength": 0.7, "hr_second_pass_steps": 4, "hr_upscaler": chosen}
    result = api.txt2img(**SENT, **more, **size)
    second = {"hires_scale": 1.5, "hires_steps": int(4 / 0.7), "hires_strength": 0.8, "hires_upscaler": upscaler}
    resolved = pipeline.resolve("a red circle", **second, **WANTED)
    assert [each.steps for each in resolved.passes] == [2, 4]
    assert_same(result, pipeline.generate(resolved).images)
    assert result.image.size == (96, 96)


def test_an_infotext_round_trip(api):
    made = api.txt2img(**SENT, enable_hr=True, hr_scale=1.5, denoising_strength=0.7, hr_second_pass_steps=2, subseed=3,
                       subseed_strength=0.25, scheduler="karras")  # fmt: skip
    read = api.png_info(made.image)
    assert read.info == made.info["infotexts"][0]
    assert read.parameters["Seed"] == "7"
    assert (read.parameters["Size-1"], read.parameters["Prompt"]) == ("64", "a red circle")
    reply = httpx.post(f"{api.baseurl}/txt2img", json={"infotext": read.info})
    (again,) = reply.json()["images"]
    assert_same(made, [Image.open(io.BytesIO(base64.b64decode(again)))])


def test_what_a_request_gives_wins_over_its_infotext(api, server):
    infotext = "a cat\nNegative prompt: dog\nSteps: 9, Sampler: Euler, CFG scale: 3, Seed: 1, Size: 64x64"
    sent = {"infotext": infotext, "steps": 2, "seed": 5}
    httpx.post(f"{api.baseurl}/txt2img", json=sent).raise_for_status()
    request = server.context.queue.jobs[-1].request
    assert (request.prompt, request.negative_prompt, request.sampler, request.guidance_scale) == (
        "a cat",
        "dog",
        "euler",
        3,
    )
    assert (request.num_inference_steps, request.seed) == (2, 5)


@pytest.mark.parametrize(("name", "form"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_other_formats_carry_the_infotext_too(api, name, form):
    result = api.txt2img(**SENT, override_settings={"samples_format": name})
    assert result.image.format == form
    sent = {"image": result.json["images"][0]}
    assert httpx.post(f"{api.baseurl}/png-info", json=sent).json()["info"] == result.info["infotexts"][0]
    assert api.get_options()["samples_format"] == "png"


def test_the_model_changes_by_title_and_by_name(api):
    (title,) = api.util_get_model_names()
    for name in (title, "pictogram", "pictogram.safetensors"):
        api.util_set_model(name, find_closest=False)
        api.set_options({**api.get_options(), "sd_model_checkpoint": name, "unknown": [1]})
        assert api.util_get_current_model() == title
    api.util_wait_for_ready(check_interval=0.1)
    assert httpx.post(f"{api.baseurl}/options", json={"sd_model_checkpoint": "other"}).status_code == 404


def test_progress_and_interrupting_within_a_step(api, server):
    replies = []
    thread = threading.Thread(target=lambda: replies.append(api.txt2img(**{**SENT, "steps": 200})))
    thread.start()
    deadline = time.monotonic() + 20
    while (progress := api.get_progress())["state"]["sampling_step"] < 1 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert 0 < progress["progress"] < 1
    assert progress["state"]["job_count"] == 1
    assert progress["state"]["sampling_steps"] == 200
    assert progress["eta_relative"] > 0
    skipped = httpx.get(f"{api.baseurl}/progress?skip_current_image=true").json()
    assert skipped["current_image"] is None
    assert Image.open(io.BytesIO(base64.b64decode(api.get_progress()["current_image"]))).size == (64, 64)
    (job,) = [each for each in server.context.queue.jobs if not each.state.is_final]
    before = job.step
    api.interrupt()
    thread.join(5)
    assert replies[0].images == []
    assert "interrupted" in replies[0].info["comments"]
    assert job.step <= before + 5 < 200
    api.util_wait_for_ready(check_interval=0.05)


def test_a_client_that_goes_away_ends_its_job(api, server):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{api.baseurl}/txt2img", json={**SENT, "steps": 200}, timeout=0.3)
    job = server.context.queue.jobs[-1]
    deadline = time.monotonic() + 5
    while not job.state.is_final and time.monotonic() < deadline:
        time.sleep(0.01)
    assert job.state.value == "cancelled"


def test_a_task_by_its_id(api, server):
    progress, sent = [], {**SENT, "steps": 10, "force_task_id": "task(abc)"}
    thread = threading.Thread(target=lambda: httpx.post(f"{api.baseurl}/txt2img", json=sent))
    thread.start()
    while thread.is_alive():
        progress.append(httpx.post(f"{server.url}/internal/progress", json={"id_task": "task(abc)"}).json())
        time.sleep(0.01)
    thread.join()
    active = [each for each in progress if each["active"]]
    assert any(each["live_preview"] and each["live_preview"].startswith("data:image/png;base64,") for each in active)
    assert [each["progress"] for each in active] == sorted(each["progress"] for each in active)
    done = httpx.post(f"{server.url}/internal/progress", json={"id_task": "task(abc)"}).json()
    assert (done["active"], done["queued"], done["completed"]) == (False, False, True)
    assert httpx.get(f"{server.url}/internal/pending-tasks").json() == {"size": 0, "tasks": []}
    assert httpx.post(f"{api.baseurl}/txt2img", json=sent).status_code == 400


def test_asynchronously(api, pipeline):
    async def both():
        return await asyncio.gather(*(api.txt2img(**{**SENT, "seed": seed}, use_async=True) for seed in (7, 8)))

    results = asyncio.run(both())
    for result, seed in zip(results, (7, 8), strict=True):
        assert_same(result, pipeline.generate("a red circle", **{**WANTED, "seed": seed}).images)


def test_images_are_enlarged(api):
    image = photograph(20, 10)
    lanczos = api.extra_single_image(image, upscaler_1="Lanczos", upscaling_resize=3).image
    assert np.array_equal(pixels(lanczos), pixels(image.resize((60, 30), Image.Resampling.LANCZOS)))
    assert np.array_equal(pixels(api.extra_single_image(image).image), pixels(image))
    box = {"resize_mode": 1, "upscaling_resize_w": 40, "upscaling_resize_h": 40}
    nearest = api.extra_batch_images([image, image], upscaler_1="Nearest", **box)
    whole = image.resize((80, 40), Image.Resampling.NEAREST)
    assert [np.array_equal(pixels(each), pixels(whole.crop((20, 0, 60, 40)))) for each in nearest.images] == [
        True,
        True,
    ]
    both = api.extra_single_image(image, upscaler_1="Lanczos", upscaler_2="Nearest", extras_upscaler_2_visibility=0.5)
    sizes = [image.resize((40, 20), each) for each in (Image.Resampling.LANCZOS, Image.Resampling.NEAREST)]
    assert np.array_equal(pixels(both.image), pixels(Image.blend(*sizes, 0.5)))
    with pytest.raises(RuntimeError, match="choose None, Lanczos or Nearest"):
        api.extra_single_image(image, upscaler_1="R-ESRGAN 4x+")
    with pytest.raises(RuntimeError, match="413"):
        api.extra_single_image(image, upscaler_1="Lanczos", upscaling_resize=1e6)


def test_a_grid_comes_first(api):
    result = api.txt2img(**SENT, batch_size=3, save_images=True)
    grid, *images = result.images
    assert np.array_equal(pixels(grid), pixels(sdonnx.make_grid(images)))
    assert (len(images), result.info["index_of_first_image"]) == (3, 1)
    assert result.info["infotexts"] == [image.info["parameters"] for image in result.images]
    assert result.info["infotexts"][0] == result.info["infotexts"][1]
    without = api.txt2img(**SENT, batch_size=3, save_images=True, override_settings={"return_grid": False})
    assert_same(without, images)
    assert len(api.txt2img(**SENT, save_images=True).images) == 1


def test_images_can_be_left_out(api):
    result = api.txt2img(**SENT, send_images=False)
    assert result.images == []
    assert len(result.info["infotexts"]) == 1
    assert json.loads(result.json["info"]) == result.info
