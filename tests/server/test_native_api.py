"""sdonnx' own API: its images are `generate`'s, its events can be resumed, its errors name what is wrong."""

import base64
import io
import json
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from sdonnx_runtime.request import FIELDS
from sdonnx_runtime.sampling.registry import SAMPLERS
from support.images import in_base64
from support.server import running_server

import sdonnx

SIZE = {"width": 64, "height": 64, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    loras, embeddings = tmp_path_factory.mktemp("loras"), tmp_path_factory.mktemp("embeddings")
    (loras / "ink.safetensors").write_bytes(b"")
    (embeddings / "damaged.pt").write_bytes(b"")
    with running_server(lora_folder=loras, embedding_folder=embeddings) as running:
        yield running


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as each:
        yield each


def drawing(mode="RGB"):
    image = Image.new(mode, (64, 64), "white")
    ImageDraw.Draw(image).ellipse((10, 14, 50, 54), fill="red" if mode == "RGB" else 0)
    return image


def as_base64(image, *, url=False):
    return "data:image/png;base64," * url + in_base64(image)


def run(client, **fields):
    """Run a job to its end."""
    reply = client.post("/api/jobs", json=fields)
    assert reply.status_code == 202, reply.text
    assert reply.headers["location"] == f"/api/jobs/{reply.json()['id']}"
    events(client, reply.json()["id"])
    return client.get(f"/api/jobs/{reply.json()['id']}").json()


def events(client, job, query="", headers=None):
    """The events of a job as (number, kind, data), to the last."""
    text = client.get(f"/api/jobs/{job}/events{query}", headers=headers).text
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in text.strip().split("\n\n")]
    return [(int(each["id"]), each["event"], json.loads(each["data"])) for each in blocks if each]


def download(client, job):
    return [np.asarray(Image.open(io.BytesIO(client.get(each["url"]).content))) for each in job["images"]]


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 7, "negative_prompt": "blue", "num_images": 2},
        {"seed": 1, "variation": [5, 0.3], "sampler": "Euler a", "schedule": "karras", "eta": None},
        {"seed": 2, "hires_scale": 2, "hires_steps": 2, "guidance_steps": [0.0, 0.5]},
        {"seed": 3, "sigmas": [9, 3.5, 1], "num_inference_steps": None},
    ],
    ids=["batch", "variation", "hires", "sigmas"],
)
def test_images_equal_those_of_generate(client, pipeline, fields):
    fields = {"prompt": "a red apple", **SIZE, **fields}
    job = run(client, **fields)
    expected = pipeline.generate(
        sdonnx.Request(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    )
    assert job["state"] == "done"
    assert job["seeds"] == list(expected.seeds)
    for got, image in zip(download(client, job), expected.images, strict=True):
        np.testing.assert_array_equal(got, np.asarray(image))


def test_images_of_a_request_come_as_data_urls_or_bare_base64(client, pipeline):
    image, mask = drawing(), drawing("L")
    fields = {"prompt": "a pear", **SIZE, "seed": 4, "strength": 0.7}
    job = run(client, **fields, image=as_base64(image, url=True), mask_image=as_base64(mask))
    expected = pipeline.generate(sdonnx.Request(**fields, image=image, mask_image=mask))
    np.testing.assert_array_equal(download(client, job)[0], np.asarray(expected.images[0]))


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"prompt": "x", "stepz": 3}, 400, "'stepz'"),
        ({"controls": [{"package": "x", "weight": 1}]}, 400, "'weight'"),
        ({"controls": [{"package": "x", "image": "AAAA"}]}, 404, "'x'"),
        ({"model": "sdxl"}, 404, "'sdxl'"),
        ({"vae": "../vae"}, 404, "'../vae'"),
        ({"image": "https://example.org/a.png"}, 400, "image is a URL"),
        ({"image": "AAAA"}, 400, "image can't be read"),
        ({"image": {"path": "/etc/passwd"}}, 400, "image is not an image"),
        ({"variation": 3}, 400, "variation is 3"),
        ({"variation": [3]}, 400, "variation"),
        ({"prompt": ["a"]}, 400, "prompt"),
        ({"seed": 1.5}, 400, "seed is 1.5"),
        ({"width": 65}, 400, "64 and 68"),
        ({"width": 8192, "height": 8192}, 400, "pixels"),
        ({"num_inference_steps": 500}, 400, "num_inference_steps is 500"),
        ({"num_images": 500}, 400, "num_images is 500"),
        ({"preview_every": -1}, 400, "preview_every"),
        ({"prompt": "<lora:none:1>"}, 400, "none"),
        ([], 400, "not a JSON object"),
    ],
)
def test_what_is_wrong_is_refused_by_name(client, body, status, named):
    reply = client.post("/api/jobs", json=body)
    assert (reply.status_code, named in reply.json()["detail"], "\n" in reply.json()["detail"]) == (status, True, False)


@pytest.mark.parametrize("body", [b"{", b'{"seed": NaN}', b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}'])
def test_a_body_that_is_no_json_is_refused(client, body):
    for path in ("/api/jobs", "/api/plan", "/api/tokens"):
        reply = client.post(path, content=body)
        assert reply.status_code == 400, reply.text


def test_events_tell_every_step_and_can_be_resumed(client):
    run(client, prompt="a cup", **SIZE)  # which loads the model
    job = run(client, prompt="a cup", **SIZE, preview_every=2)
    told = events(client, job["id"])
    kinds = [kind for _, kind, _ in told]
    assert kinds == ["queued", "running", "step", "step", "preview", "step", "decoding", "done"]
    assert [number for number, _, _ in told] == list(range(1, len(told) + 1))
    assert told[-1][2]["images"] == [each["name"] for each in job["images"]]
    assert events(client, job["id"], headers={"Last-Event-ID": "4"}) == told[4:]
    assert events(client, job["id"], "?after=7") == told[7:]
    assert client.get(f"/api/jobs/{job['id']}/events?after=x").status_code == 400


def test_a_preview_is_that_of_the_step(client, pipeline):
    job = run(client, prompt="a cup", **SIZE, seed=5)
    *_, last = pipeline.stream("a cup", **SIZE, seed=5)
    got = Image.open(io.BytesIO(client.get(job["preview"]).content))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(last.preview().resize((64, 64))))
    without = run(client, prompt="a cup", **SIZE, preview_every=0)
    assert without["preview"] is None
    assert client.get(f"/api/jobs/{without['id']}/preview").status_code == 404


def test_delete_cancels_queued_and_running_jobs_and_may_be_repeated(client):
    long = {"prompt": "a house", "num_inference_steps": 200}
    running, queued = (client.post("/api/jobs", json=long).json()["id"] for _ in range(2))
    while client.get(f"/api/jobs/{running}").json()["step"] == 0:
        time.sleep(0.01)
    assert client.get(f"/api/jobs/{queued}").json()["position"] == 1
    for job in (queued, running, running):
        reply = client.delete(f"/api/jobs/{job}")
        assert (reply.status_code, reply.json()["state"]) == (200, "cancelled")
    assert events(client, running)[-1][1] == "cancelled"
    done = run(client, prompt="a house", **SIZE)
    assert client.delete(f"/api/jobs/{done['id']}").json()["state"] == "done"
    assert client.delete("/api/jobs/none").status_code == 404
    newest = [each["id"] for each in client.get("/api/jobs").json()["jobs"]][:3]
    assert newest == [done["id"], queued, running]


def test_images_are_listed_newest_first_in_pages(client):
    jobs = [run(client, prompt="a tree", **SIZE, num_images=2) for _ in range(2)]
    names = [each["name"] for each in client.get("/api/images?count=500").json()["images"]]
    assert {each["name"] for job in jobs for each in job["images"]} <= set(names)
    pages, before = [], ""
    while before is not None:
        page = client.get(f"/api/images?count=3{before and '&before='}{before}").json()
        pages += [each["name"] for each in page["images"]]
        before = page["next"]
    assert pages == names == sorted(names, reverse=True)
    assert client.get("/api/images?count=0").status_code == 400


def test_images_are_listed_with_their_prompts(client, server):
    """Files that are damaged or have no parameters have none."""
    made = run(client, prompt="a teapot", **SIZE)["images"][0]["name"]
    damaged, plain = (server.context.store.folder / f"29990101-000000-other-{index}.png" for index in range(2))
    damaged.write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(plain)
    found = {each["name"]: each["prompt"] for each in client.get("/api/images?count=500").json()["images"]}
    damaged.unlink()
    plain.unlink()
    assert (found[made], found[damaged.name], found[plain.name]) == ("a teapot", None, None)


def test_an_image_comes_in_three_formats_with_its_parameters(client):
    fields = {"prompt": "an “owl”", **SIZE, "seed": 9, "negative_prompt": "day"}
    job = run(client, **fields)
    url = job["images"][0]["url"]
    for form in ("png", "jpeg", "webp"):
        reply = client.get(f"{url}?format={form}&quality=80")
        assert reply.headers["content-type"] == f"image/{form}"
        recipe = client.post("/api/info", content=reply.content).json()
        assert fields.items() <= recipe["fields"].items()
        assert recipe["model"] == "pictogram"
        assert recipe["source"] == ("sdonnx" if form == "png" else "a1111")
    assert client.get(f"{url}?format=gif").status_code == 400
    info = client.get(f"{url}/info").json()
    assert (info["job"], info["index"], info["fields"]["seed"]) == (job["id"], 0, 9)
    assert client.delete(url).status_code == 204
    for path in (url, f"{url}/info", "/api/images/..%2f..%2fetc%2fpasswd", "/api/images/sdonnx.json"):
        assert client.get(path).status_code == 404
    assert client.delete(url).status_code == 404


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_a_thumbnail_is_at_most_as_large_as_it_should_be(client, form):
    job = run(client, prompt="a sun", **{**SIZE, "width": 96})
    url = job["images"][0]["url"]

    def size(side):
        reply = client.get(f"{url}?format={form}&side={side}")
        assert client.post("/api/info", content=reply.content).json()["fields"]["prompt"] == "a sun"
        return Image.open(io.BytesIO(reply.content)).size

    assert [size(side) for side in (48, 96, 320, 2048)] == [(48, 32), (96, 64), (96, 64), (96, 64)]
    for side in ("15", "2049", "-1", "x", ""):
        reply = client.get(f"{url}?side={side}")
        assert (reply.status_code, "16 to 2048" in reply.json()["detail"]) == (400, True)


def test_a_recipe_makes_the_same_image_again(client):
    first = run(client, prompt="a (blue:1.2) fish", **SIZE, seed=8, sampler="euler_ancestral", variation=[3, 0.5])
    png = client.get(first["images"][0]["url"]).content
    recipe = client.post("/api/info", json={"image": base64.b64encode(png).decode()}).json()
    second = run(client, **recipe["fields"], model=recipe["model"])
    np.testing.assert_array_equal(download(client, first)[0], download(client, second)[0])


def test_parameters_that_are_damaged_are_left_out(client):
    damaged = ('{"seed": NaN}', '{"prompt": 3, "seed": -1, "steps": [], "width": 64, "model": {}}', "[" * 10_000)
    for value in damaged:
        chunks, stream = PngInfo(), io.BytesIO()
        chunks.add_text("sdonnx", value)
        Image.new("RGB", (8, 8)).save(stream, format="PNG", pnginfo=chunks)
        reply = client.post("/api/info", content=stream.getvalue())
        assert reply.status_code == 200
        assert reply.json()["fields"] == ({"width": 64} if "width" in value else {})
    assert client.post("/api/info", content=b"no image").status_code == 400


def test_a_plan_predicts_memory_and_seconds(client):
    request = {"prompt": "a boat", **SIZE, "num_inference_steps": 20, "sampler": "ddim"}
    estimated = client.post("/api/plan", json=request).json()
    assert (estimated["num_steps"], estimated["seconds_from"]) == (20, "estimated")
    memory = estimated["memory"]
    assert 0 < memory["smallest"] <= memory["peak"] == max(each["peak"] for each in memory["components"])
    job = run(client, **request)
    measured = client.post("/api/plan", json={**request, "num_inference_steps": 40}).json()
    assert measured["seconds_from"] == "measured"
    assert job["ended"] - job["started"] < measured["seconds"] < 2 * (job["ended"] - job["started"])
    assert client.post("/api/plan", json={"steps": 3}).status_code == 400


def test_models_say_what_they_can_do(client):
    (model,) = client.get("/api/models").json()["models"]
    assert (model["name"], model["default"], model["multiple"]) == ("pictogram", True, 4)
    assert model["tasks"] == ["text-to-image", "image-to-image", "inpainting"]
    run(client, prompt="a key", **{name: model["defaults"][name] for name in ("width", "height")}, model=model["title"])
    assert client.get("/api/models").json()["models"][0]["loaded"]


@pytest.mark.parametrize(
    ("graphs", "fast"),
    [
        ({"plain"}, set()),
        ({"plain", "caching", "cached"}, {"cache_interval"}),
        ({"plain", "downsampled"}, {"token_downsampling"}),
        ({"plain", "caching", "cached", "caching-downsampled", "cached-downsampled"}, set(sdonnx.FAST)),
    ],
)
def test_a_model_can_do_what_of_the_fast_preset_it_has_graphs_for(server, graphs, fast):
    served = server.context.library.default
    manifest = served.package.manifest
    unet = replace(manifest.components["unet"], graphs=dict.fromkeys(graphs, "model.onnx"))
    manifest = replace(manifest, components={**manifest.components, "unet": unet})
    assert replace(served, package=replace(served.package, manifest=manifest)).fast.keys() == fast


def test_the_fast_preset_of_a_model_is_ready_for_a_job(client):
    (model,) = client.get("/api/models").json()["models"]
    assert model["fast"] == dict(sdonnx.FAST)
    assert run(client, prompt="a key", **SIZE, **model["fast"])["request"].items() >= sdonnx.FAST.items()


def test_fields_are_those_of_requests_and_limits_those_of_the_server(client, server):
    reply = client.get("/api/fields").json()
    fields, defaults = reply["fields"], sdonnx.Request(prompt="")
    assert list(fields) == list(FIELDS)
    for name, field in fields.items():
        default = getattr(defaults, name)
        assert field["default"] == (list(default) if isinstance(default, tuple) else default)
        assert field["help"] == FIELDS[name].help
    assert fields["strength"]["range"] == [0, 1]
    assert fields["fit"]["choices"] == ["crop", "pad", "stretch"]
    assert fields["variation"]["range"] is fields["prompt"]["range"] is fields["seed"]["choices"] is None
    assert reply["limits"]["steps"] == server.context.settings.max_steps
    for name, key in (("steps", "num_inference_steps"), ("images", "num_images")):
        refused = client.post("/api/jobs", json={**SIZE, key: reply["limits"][name] + 1})
        assert refused.status_code == 400


def test_every_listed_sampler_and_schedule_is_taken(client, pipeline):
    samplers = client.get("/api/samplers").json()["samplers"]
    assert [each["name"] for each in samplers] == list(SAMPLERS)
    for each in samplers:
        assert pipeline.resolve("", sampler=each["title"]).request.sampler == each["name"]
    for each in client.get("/api/schedules").json()["schedules"]:
        assert each["name"] in FIELDS["schedule"].choices


def test_loras_and_embeddings_are_those_of_their_folders(client):
    assert client.get("/api/loras").json() == {"loras": [{"name": "ink", "tag": "<lora:ink:1>"}]}
    assert client.get("/api/embeddings").json() == {"embeddings": []}, "a damaged file is not offered"


def test_tokens_are_counted_as_the_text_encoder_reads_them(client):
    reply = client.post("/api/tokens", json={"prompt": "a (cat:1.2) <lora:ink:1><lora:no:1>"}).json()
    assert (reply["count"], reply["chunks"], reply["texts"]) == (2, [2], ["a cat"])
    assert reply["loras"] == [{"name": "ink", "served": True}, {"name": "no", "served": False}]
    long = client.post("/api/tokens", json={"prompt": "cat " * (reply["length"] + 1)}).json()
    assert (long["chunks"], long["texts"]) == ([reply["length"], 1], [("cat " * reply["length"]).strip(), "cat"])
    broken = client.post("/api/tokens", json={"prompt": "cat BREAK dog"}).json()
    assert (broken["chunks"], broken["texts"]) == ([1, 1], ["cat", "dog"])


@pytest.mark.parametrize("path", ["/api/jobs", "/api/plan", "/api/tokens", "/sdapi/v1/txt2img"])
def test_prompts_beyond_any_use_are_refused(client, path):
    """Alternation is parsed anew for each step, by the one planner that all clients share."""
    reply = client.post(path, json={"prompt": "[a|b]" * 6401})
    assert reply.status_code == 400
    assert "prompt has 32005 characters; this server takes 32000" in reply.text
