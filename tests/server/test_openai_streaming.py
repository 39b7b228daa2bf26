"""OpenAI's partial images, as its own Python client reads them."""

import time

import numpy as np
import openai
import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from support.openai_client import connect, decode, pixels

import sdonnx


@pytest.fixture(scope="module")
def client(server):
    return connect(server)


def stream(client, steps=4, **options):
    extra = {"seed": 7, "steps": steps, "sampler": "euler"}
    return client.images.generate(prompt="a red circle", stream=True, extra_body=extra, **options)


@pytest.mark.parametrize("count, wanted", [(0, []), (1, [2]), (2, [2, 3]), (3, [1, 2, 3])])
def test_partial_images_are_previews_at_equal_distances(client, pipeline, count, wanted):
    *partials, completed = stream(client, partial_images=count)
    assert [each.partial_image_index for each in partials] == list(range(count))
    assert all(isinstance(each, ImageGenPartialImageEvent) for each in partials)
    assert isinstance(completed, ImageGenCompletedEvent)
    generation = pipeline.stream("a red circle", seed=7, num_inference_steps=4, sampler="euler")
    previews = {step.step + 1: step.preview().resize((64, 64)) for step in generation}
    for partial, step in zip(partials, wanted, strict=True):
        assert np.array_equal(pixels(decode(partial.b64_json)), np.asarray(previews[step]))
    assert np.array_equal(pixels(decode(completed.b64_json)), np.asarray(generation.result.images[0]))


def test_events_have_all_that_their_types_promise(client):
    for event in stream(client, partial_images=1):
        assert type(event).model_validate(event.model_dump()) == event
        assert (event.size, event.quality, event.background, event.output_format) == ("64x64", "high", "opaque", "png")
        assert abs(event.created_at - time.time()) < 60


def test_each_image_has_its_partial_images(client):
    events = list(stream(client, n=2, partial_images=2, output_format="jpeg"))
    assert [getattr(each, "partial_image_index", None) for each in events] == [0, 1, 0, 1, None, None]
    assert {decode(each.b64_json).format for each in events} == {"JPEG"}


def test_fewer_steps_than_partial_images(client):
    assert [each.type for each in stream(client, steps=1, partial_images=3)] == ["image_generation.completed"]


def test_the_stream_ends_with_done_and_tells_of_steps(client, server):
    body = {"prompt": "a star", "stream": True, "steps": 2, "sampler": "euler"}
    found = client._client.post(f"{server.url}/v1/images/generations", json=body)
    assert found.headers["content-type"].startswith("text/event-stream")
    assert found.text.startswith(": step 1 of 2\n\n: step 2 of 2\n\nevent: image_generation.completed\ndata: {")
    assert found.text.endswith("\n\ndata: [DONE]\n\n")


def test_errors_before_the_first_event_are_responses(client):
    with pytest.raises(openai.BadRequestError, match="n is 0"):
        stream(client, n=0)


def test_a_failure_in_the_middle(client, server, monkeypatch):
    def save(*_):
        raise sdonnx.SdonnxError("the disk is full")

    monkeypatch.setattr(server.context.store, "save", save)
    events = stream(client, partial_images=1)
    assert next(events).type == "image_generation.partial_image"
    with pytest.raises(openai.APIError, match="the disk is full"):
        next(events)


def test_an_interrupted_stream(client, server):
    events = stream(client, steps=60, n=10, partial_images=3)
    assert next(events).type == "image_generation.partial_image"
    server.context.queue.interrupt()
    with pytest.raises(openai.APIError, match="the job was cancelled"):
        list(events)


@pytest.mark.parametrize("partials", [0, 3])
def test_a_client_that_goes_away_cancels_its_job(client, server, partials):
    before = len(server.context.queue.jobs)
    with client.images.with_streaming_response.generate(
        prompt="a star", n=10, stream=True, partial_images=partials, extra_body={"steps": 200}
    ) as response:
        next(response.iter_bytes())
    server.wait_until_idle()
    (job,) = server.context.queue.jobs[before:]
    assert job.state.value == "cancelled" and job.files == ()
