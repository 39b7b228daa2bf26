"""OpenAI's images API, as its own Python client uses it: generations, models and errors."""

import io
import re
import threading
import time

import numpy as np
import openai
import pytest
from PIL import ExifTags, Image
from support.openai_client import connect, encode, images, pixels
from support.server import running_server, wait_until

import sdonnx

STEPS = {"seed": 7, "steps": 3}


@pytest.fixture(scope="module")
def client(server):
    return connect(server)


def test_images_are_those_of_the_library(client, pipeline):
    reply = client.images.generate(prompt="a red circle", n=2, size="64x64", extra_body=STEPS)
    wanted = pipeline.generate("a red circle", num_images=2, seed=7, num_inference_steps=3).images
    assert [image.format for image in images(reply)] == ["PNG", "PNG"]
    for image, other in zip(images(reply), wanted, strict=True):
        assert np.array_equal(pixels(image), pixels(other))
    assert (reply.size, reply.output_format, reply.background) == ("64x64", "png", "opaque")
    assert abs(reply.created - time.time()) < 60


def test_parameters_that_openai_does_not_have(client, pipeline):
    extra = {**STEPS, "cfg_scale": 2.5, "negative_prompt": "blue", "sampler": "DPM++ 2M Karras"}
    (image,) = images(client.images.generate(prompt="a star", extra_body=extra))
    wanted = pipeline.generate(
        "a star", seed=7, num_inference_steps=3, guidance_scale=2.5, negative_prompt="blue", sampler="DPM++ 2M Karras"
    )
    assert np.array_equal(pixels(image), pixels(wanted.images[0]))
    assert "Negative prompt: blue" in image.info["parameters"]


def test_low_quality_is_the_fast_preset(client, pipeline):
    (fast,) = images(client.images.generate(prompt="a star", quality="low", extra_body={**STEPS, "steps": 4}))
    wanted = pipeline.generate("a star", seed=7, num_inference_steps=4, **sdonnx.FAST)
    plain = pipeline.generate("a star", seed=7, num_inference_steps=4)
    assert np.array_equal(pixels(fast), pixels(wanted.images[0]))
    assert not np.array_equal(pixels(fast), pixels(plain.images[0]))


@pytest.mark.parametrize("size, wanted", [("auto", (64, 64)), ("72x48", (72, 48))])
def test_size(client, size, wanted):
    reply = client.images.generate(prompt="a star", size=size, extra_body=STEPS)
    assert images(reply)[0].size == wanted and reply.size == f"{wanted[0]}x{wanted[1]}"


@pytest.mark.parametrize("form, quality", [("jpeg", 40), ("webp", 80), ("jpeg", None)])
def test_formats(client, pipeline, form, quality):
    options = {} if quality is None else {"output_compression": quality}
    reply = client.images.generate(prompt="a star", output_format=form, **options, extra_body=STEPS)
    (image,) = images(reply)
    wanted = pipeline.generate("a star", seed=7, num_inference_steps=3).images[0]
    wanted = encode(wanted, format=form, quality=100 if quality is None else quality)
    assert image.format == form.upper() and np.array_equal(pixels(image), pixels(wanted))
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be").startswith("a star\nSteps: 3, ")


def test_a_long_prompt_fits_no_jpeg_but_makes_one(client):
    reply = client.images.generate(prompt="star " * 6000, output_format="jpeg", extra_body={**STEPS, "steps": 1})
    assert images(reply)[0].format == "JPEG"


@pytest.mark.parametrize("form", ["png", "webp"])
def test_urls(client, server, form):
    reply = client.images.generate(prompt="a star", response_format="url", output_format=form, extra_body=STEPS)
    url = reply.data[0].url
    assert url.startswith(f"{server.url}/v1/images/files/") and reply.data[0].b64_json is None
    found = client._client.get(url, headers={"Authorization": ""})
    assert found.headers["content-type"] == f"image/{form}"
    assert found.headers["cross-origin-resource-policy"] == "cross-origin"
    same = images(client.images.generate(prompt="a star", output_format=form, extra_body=STEPS))[0]
    assert np.array_equal(pixels(Image.open(io.BytesIO(found.content))), pixels(same))


def test_the_default_of_dall_e_is_a_url(client):
    image = client.images.generate(prompt="a star", model="dall-e-3", extra_body=STEPS).data[0]
    assert image.url and image.b64_json is None


def test_urls_need_no_token_and_everything_else_does():
    with running_server(token="secret") as server:
        with pytest.raises(openai.AuthenticationError) as caught:
            connect(server).images.generate(prompt="a star", extra_body=STEPS)
        assert caught.value.code == "invalid_api_key"
        client = connect(server, api_key="secret")
        url = client.images.generate(prompt="a star", response_format="url", extra_body=STEPS).data[0].url
        assert client._client.get(url, headers={"Authorization": ""}).status_code == 200


def test_urls_have_the_host_that_the_client_used(client, server):
    port = server.url.rpartition(":")[2]
    body = {"prompt": "a star", "response_format": "url", **STEPS}
    found = client._client.post(f"{server.url}/v1/images/generations", json=body, headers={"Host": f"localhost:{port}"})
    assert found.json()["data"][0]["url"].startswith(f"http://localhost:{port}/v1/images/files/")


@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "a.png", "20260101-000000-0123456789abcdef-0.png", "%00"])
def test_urls_of_no_image(client, server, name):
    found = client._client.get(f"{server.url}/v1/images/files/{name}")
    assert found.status_code == 404


def test_a_job_that_a_client_named_has_no_url(client, server):
    client.images.generate(prompt="a star", extra_body=STEPS)
    (name,) = server.context.queue.jobs[-1].files
    folder, url = server.context.store.folder, f"{server.url}/v1/images/files/"
    named = re.sub("-[0-9a-f]{16}-", "-mine-", name)
    (folder / named).write_bytes((folder / name).read_bytes())
    assert client._client.get(url + name).status_code == 200
    assert client._client.get(url + named).status_code == 404


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("pictogram", "model", "sdonnx")
    assert client.models.retrieve("pictogram") == model
    with pytest.raises(openai.NotFoundError, match="'sdxl' is not served; there are: pictogram") as caught:
        client.models.retrieve("sdxl")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("model", ["pictogram", "dall-e-3", "gpt-image-2.5-flare", "chatgpt-image-latest", ""])
def test_names_of_openai_stand_for_the_default(client, model):
    reply = client.images.generate(prompt="a star", model=model, response_format="b64_json", extra_body=STEPS)
    assert len(images(reply)) == 1


@pytest.mark.parametrize(
    "changes, param, message",
    [
        ({"n": 0}, "n", "n is 0; give a whole number from 1 to 10"),
        ({"n": 11}, "n", "n is 11"),
        ({"n": "two"}, "n", "n is 'two'"),
        ({"n": True}, "n", "n is True"),
        ({"n": 1.5}, "n", "n is 1.5"),
        ({"prompt": 5}, "prompt", "prompt is 5; give a text"),
        ({"prompt": "x" * 32_001}, "prompt", "prompt has 32001 characters; the maximum is 32000"),
        ({"model": ["pictogram"]}, "model", r"model is \['pictogram'\]; give a text"),
        ({"size": "64"}, "size", "size is '64'; give WIDTHxHEIGHT, such as 512x512, or auto"),
        ({"size": "66x64"}, "size", "width 66 is not a multiple of 4; the nearest are 64 and 68"),
        ({"size": "99996x99996"}, "size", "width is 99996"),
        ({"quality": "best"}, "quality", "quality is 'best'; choose auto, low"),
        ({"background": "transparent"}, "background", "background transparent is not supported"),
        ({"response_format": "png"}, "response_format", "response_format is 'png'; choose b64_json, url"),
        ({"output_format": "gif"}, "output_format", "output_format is 'gif'; choose png, jpeg, webp"),
        ({"output_compression": 101}, "output_compression", "output_compression is 101"),
        ({"stream": "yes"}, "stream", "stream is 'yes'; give true or false"),
        ({"partial_images": 4}, "partial_images", "partial_images is 4; give a whole number from 0 to 3"),
        ({"extra_body": {"steps": 0}}, "steps", "steps is 0; give a whole number from 1 to 1000"),
        ({"extra_body": {"cfg_scale": "7"}}, "cfg_scale", "cfg_scale is '7'"),
        ({"extra_body": {"seed": -1}}, "seed", "seed is -1"),
        ({"extra_body": {"sampler": "eular"}}, "sampler", "there is no sampler 'eular'; did you mean euler"),
        ({"extra_body": {"strength": 0.5}}, "strength", "strength requires image"),
        ({"extra_body": {"steps": 500}}, "steps", "this server takes at most 200"),
    ],
)
def test_bad_requests_name_the_parameter(client, changes, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.images.generate(**{"prompt": "a star", **changes})
    assert caught.value.param == param
    assert caught.value.body.keys() == {"message", "type", "param", "code"}
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"star"', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000, b'{"size": "64x64"}'],
)
def test_bodies_that_are_no_request(client, server, body):
    found = client._client.post(f"{server.url}/v1/images/generations", content=body)
    assert found.status_code == 400
    assert found.json()["error"]["message"].startswith(("the body is not", "prompt is"))


def test_half_a_surrogate_pair(client, server):
    for body in (b'{"prompt": "\\ud800"}', b'{"prompt": "", "model": "\\ud800"}', b'{"prompt": "", "size": "\\ud800"}'):
        found = client._client.post(f"{server.url}/v1/images/generations", content=body)
        assert found.status_code == 400 and found.json()["error"]["message"]


def test_unknown_and_null_parameters_are_ignored(client, server):
    body = {"prompt": "", "user": "me", "style": "vivid", "moderation": "low", "size": None, "n": None, "foo": [1]}
    found = client._client.post(f"{server.url}/v1/images/generations", json={**body, **STEPS})
    assert found.status_code == 200 and len(found.json()["data"]) == 1


def test_a_full_queue():
    with running_server(max_queued=0) as server:
        with pytest.raises(openai.RateLimitError) as caught:
            connect(server).images.generate(prompt="a star", extra_body=STEPS)
        assert caught.value.code == "rate_limit_exceeded"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert "x-should-retry" not in caught.value.response.headers


def test_a_failure_that_will_repeat_is_not_repeated(server, monkeypatch):
    def save(*_):
        raise sdonnx.SdonnxError("the disk is full")

    monkeypatch.setattr(server.context.store, "save", save)
    before = len(server.context.queue.jobs)
    with pytest.raises(openai.InternalServerError, match="the disk is full") as caught:
        connect(server, max_retries=2).images.generate(prompt="a star", extra_body=STEPS)
    assert caught.value.type == "server_error" and len(server.context.queue.jobs) == before + 1


def test_an_interrupted_job_is_not_repeated(server):
    before = len(server.context.queue.jobs)
    stopper = threading.Thread(target=interrupt_next, args=(server.context.queue, before))
    stopper.start()
    with pytest.raises(openai.ConflictError, match="the job was cancelled"):
        connect(server, max_retries=2).images.generate(prompt="a star", n=10, extra_body={"steps": 200})
    stopper.join()
    assert len(server.context.queue.jobs) == before + 1


def test_a_server_that_ends_may_be_asked_again():
    with running_server() as server:
        queue = server.context.queue
        stopper = threading.Thread(target=lambda: (wait_until(lambda: queue.current is not None), queue.shut_down()))
        stopper.start()
        with pytest.raises(openai.InternalServerError, match="the server is shutting down") as caught:
            connect(server).images.generate(prompt="a star", n=10, extra_body={"steps": 200})
        stopper.join()
    assert caught.value.status_code == 503 and "x-should-retry" not in caught.value.response.headers


def test_a_client_that_gives_up_cancels_its_job(server):
    queue = server.context.queue
    before = len(queue.jobs)
    with pytest.raises(openai.APITimeoutError):
        connect(server, timeout=0.5).images.generate(prompt="a star", n=10, extra_body={"steps": 200})
    server.wait_until_idle()
    (job,) = queue.jobs[before:]
    assert job.state.value == "cancelled" and job.files == ()


def interrupt_next(queue, before):
    wait_until(lambda: len(queue.jobs) > before and queue.jobs[-1].step > 0)
    queue.interrupt()
