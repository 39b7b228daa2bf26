"""Wildcards, alternatives and styles on a server: what is drawn is what the library draws, whichever API asks."""

import json

import httpx
import numpy as np
import pytest
from support.remote import run, same_files
from support.server import running_server
from webuiapi import WebUIApi

import sdonnx

SIZE = {"width": 64, "height": 64}
TEMPLATE = "a __colour__ {circle|star}"
STYLES = 'name,prompt,negative_prompt\nInk,"{prompt}, {ink|oil}",blurry\nFilm,film,\n'
WANTED = {"seed": 3, "num_images": 3, "num_inference_steps": 2, "guidance_scale": 4, "sampler": "dpmpp_2m", **SIZE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "wildcards").mkdir()
    (folder / "wildcards/colour.txt").write_text("red\nblue\ngreen\n")
    (folder / "wildcards/loop.txt").write_text("__loop__\n")
    (folder / "styles.csv").write_text(STYLES)
    return folder


@pytest.fixture(scope="module")
def drawing(folder):
    with running_server(wildcard_folder=folder / "wildcards", styles=folder / "styles.csv") as running:
        yield running


@pytest.fixture
def client(drawing):
    with httpx.Client(base_url=drawing.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def wanted(folder):
    options = {"wildcard_folder": folder / "wildcards", "styles": folder / "styles.csv", "threads": 1}
    with sdonnx.load("pictogram", **options) as pipe:
        return pipe.generate(TEMPLATE, styles=("Ink",), **WANTED)


def test_a1111s_client(drawing, wanted):
    host, port = drawing.address
    api = WebUIApi(host=host, port=port)
    result = api.txt2img(prompt=TEMPLATE, styles=["Ink"], seed=3, batch_size=3, steps=2, cfg_scale=4,
                         sampler_name="DPM++ 2M", **SIZE)  # fmt: skip
    for made, image in zip(result.images, wanted.images, strict=True):
        assert np.array_equal(np.asarray(made), np.asarray(image))
    prompts = [each.prompt for each in wanted.prompts]
    assert len(set(prompts)) > 1
    assert all(each.startswith("a ") and each.endswith((", ink", ", oil")) for each in prompts)
    assert (result.info["all_prompts"], result.info["prompt"]) == (prompts, prompts[0])
    assert result.info["all_negative_prompts"] == ["blurry"] * 3
    assert [text.split("\n")[0] for text in result.info["infotexts"]] == prompts
    assert result.info["styles"] == ["Ink"]
    listed = api.get_prompt_styles()
    assert [each["name"] for each in listed] == ["Ink", "Film"]
    assert listed[0]["prompt"] == "{prompt}, {ink|oil}"


def test_the_servers_own_api(client, wanted):
    sent = {"prompt": TEMPLATE, "styles": ["Ink"], **{name: each for name, each in WANTED.items() if name != "sampler"}}
    job = client.post("/api/jobs", json=sent).json()
    client.get(f"/api/jobs/{job['id']}/events")
    done = client.get(f"/api/jobs/{job['id']}").json()
    assert [each["prompt"] for each in done["prompts"]] == [each.prompt for each in wanted.prompts]
    info = client.get(f"{done['images'][1]['url']}/info").json()
    assert info["fields"]["prompt"] == wanted.prompts[1].prompt
    assert info["fields"]["seed"] == 4
    assert [each["name"] for each in client.get("/api/styles").json()["styles"]] == ["Ink", "Film"]
    tokens = client.post("/api/tokens", json={"prompt": TEMPLATE, "seed": 3}).json()
    assert tokens["drawn"] == wanted.prompts[0].prompt.rpartition(",")[0]
    assert client.post("/api/tokens", json={"prompt": "a {cat}"}).json()["drawn"] is None


def test_openais_api(client):
    sent = {"prompt": TEMPLATE, "n": 2, "seed": 3, "steps": 2, "size": "64x64"}
    data = client.post("/v1/images/generations", json=sent).json()["data"]
    with sdonnx.load("pictogram") as pipe:
        assert TEMPLATE not in [each["revised_prompt"] for each in data]
        for each in data:
            assert pipe.resolve(each["revised_prompt"]).request.drawn == ()
    (plain,) = client.post("/v1/images/generations", json={**sent, "prompt": "a {cat}", "n": 1}).json()["data"]
    assert "revised_prompt" not in plain


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ({"prompt": "__color__"}, "did you mean __colour__"),
        ({"prompt": "__loop__"}, "refers to itself"),
        ({"prompt": "__../styles__"}, "no path"),
        ({"prompt": "a", "styles": ["Inc"]}, "choose Ink"),
        ({"prompt": "{" + "a" * 31_990 + "|b}" + "{c|" + "d" * 10 + "}"}, "32000"),
        ({"prompt": "{4$$" + "a" * 14_000 + "$$b|c|d|e}"}, "takes 32000"),
        ({"prompt": "a", "styles": [1]}, "styles"),
    ],
)
def test_what_is_refused(client, folder, sent, error):
    for path in ("/api/jobs", "/sdapi/v1/txt2img"):
        reply = client.post(path, json=sent)
        assert reply.status_code in (400, 422), reply.text
        assert error in reply.text
        assert str(folder) not in reply.text


def test_a_remote_run_is_a_local_one(drawing, folder, tmp_path):
    options = ["--size", "64x64", "--steps", "2", "--seed", "3", "--count", "2", "--style", "Ink", "--json"]
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    own = ["--wildcards", folder / "wildcards", "--styles", folder / "styles.csv"]
    local = run(TEMPLATE, *options, *own, cwd=here)
    remote = run(TEMPLATE, *options, "--server", drawing.url, cwd=there)
    assert remote.returncode == 0, remote.stderr
    same_files(here, there)
    assert json.loads(local.stdout)["images"] == json.loads(remote.stdout)["images"]
    refused = run(TEMPLATE, *options, *own, "--server", drawing.url, cwd=there)
    assert (refused.returncode, "the server has its own" in refused.stderr) == (2, True)
