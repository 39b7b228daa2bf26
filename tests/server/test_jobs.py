"""Jobs: one after another, cancelled within a step, refused where they can't fit, and no finished image is lost."""

import asyncio
import gc
import io
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from sdonnx_runtime.outputs.latents_file import load_latents
from support.images import in_base64
from support.server import running_server, server_process

import sdonnx
from sdonnx.server.generation import Generation, GenerationJob
from sdonnx.server.images import ImageStore
from sdonnx.server.jobs import Preview, State
from sdonnx.server.library import Selection

SIZE = {"width": 64, "height": 64, "num_inference_steps": 3}
LONG = {"prompt": "a house", "num_inference_steps": 200}


@contextmanager
def serving(**settings):
    with (
        running_server(**settings) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield server, client


@pytest.fixture(scope="module")
def server():
    with serving() as pair:
        yield pair


def create(client, **fields):
    reply = client.post("/api/jobs", json={"prompt": "a cat", **SIZE, **fields})
    assert reply.status_code == 202, reply.text
    return reply.json()["id"]


def finish(client, job):
    client.get(f"/api/jobs/{job}/events")
    return client.get(f"/api/jobs/{job}").json()


def wait_for_step(client, job):
    while (found := client.get(f"/api/jobs/{job}").json())["step"] == 0:
        assert found["state"] in ("queued", "running")
        time.sleep(0.005)
    return found["step"]


def test_a_full_queue_says_when_to_come_back():
    with serving(max_queued=2) as (_, client):
        running = create(client, **LONG)
        wait_for_step(client, running)
        waiting = [create(client), create(client)]
        reply = client.post("/api/jobs", json=LONG)
        assert (reply.status_code, int(reply.headers["retry-after"]) > 0) == (429, True)
        client.delete(f"/api/jobs/{running}")
        ended = [finish(client, job) for job in waiting]
        assert ended[0]["ended"] <= ended[1]["started"], "one after another"
        assert finish(client, create(client))["state"] == "done"


def test_images_of_waiting_jobs_are_bounded():
    image = in_base64(Image.new("RGB", (64, 64), "white"))
    with serving(max_queued_pixels=10_000) as (_, client):
        running = create(client, **LONG)
        wait_for_step(client, running)
        waiting = [create(client, image=image, mask_image=image)]
        reply = client.post("/api/jobs", json={"prompt": "a cat", **SIZE, "image": image})
        assert (reply.status_code, int(reply.headers["retry-after"]) > 0) == (429, True)
        assert "10000 pixels together" in reply.json()["detail"]
        waiting.append(create(client))
        client.delete(f"/api/jobs/{running}")
        assert [finish(client, job)["state"] for job in waiting] == ["done", "done"]
        large = in_base64(Image.new("RGB", (128, 128)))
        assert finish(client, create(client, image=large))["state"] == "done", "nobody else waits"


def test_a_job_that_cannot_fit_is_refused_with_the_smallest_memory_that_would_do():
    with serving(memory="1MB") as (_, client):
        reply = client.post("/api/jobs", json={"prompt": "a cat", **SIZE})
        smallest = int(re.search(r"at least (\d+) MB", reply.json()["detail"])[1])
        assert reply.status_code == 400
        plan = client.post("/api/plan", json={"prompt": "a cat", **SIZE}).json()
        assert (plan["memory"]["fits"], plan["memory"]["room"]) == (False, 10**6)
        assert client.get("/api/jobs").json() == {"jobs": []}
    with serving(memory=f"{smallest + 60}MB") as (_, client):
        assert finish(client, create(client))["state"] == "done"
        reply = client.post("/api/jobs", json={"prompt": "a cat", "width": 2048, "height": 2048})
        assert (reply.status_code, "at least" in reply.json()["detail"]) == (400, True)


@pytest.mark.parametrize("how", ["delete", "interrupt"])
def test_a_running_job_ends_within_a_step(server, how):
    server, client = server
    job = create(client, **LONG)
    wait_for_step(client, job)
    known = server.context.queue.find(job)
    before = known.step
    if how == "delete":
        assert client.delete(f"/api/jobs/{job}").json()["state"] == "cancelled"
    else:
        server.context.queue.interrupt()
    ended = finish(client, job)
    assert (ended["state"], ended["images"], ended["error"]) == ("cancelled", [], None)
    assert ended["step"] <= before + 2, "the step that ran, and one that had just ended"
    assert finish(client, create(client))["state"] == "done"


def test_a_client_that_follows_a_job_may_leave(server):
    _, client = server
    job = create(client, num_inference_steps=30)
    with client.stream("GET", f"/api/jobs/{job}/events") as events:
        next(events.iter_lines())
    assert client.head(f"/api/jobs/{job}/events").headers["content-type"].startswith("text/event-stream")
    assert finish(client, job)["state"] == "done"


def test_ended_jobs_keep_no_pixels(server):
    server, client = server
    white = in_base64(Image.new("RGB", (64, 64), "white"))
    kept = create(client, image=white, mask_image=white)
    job = server.context.queue.find(kept)
    image = weakref.ref(job.request.image)
    assert finish(client, kept)["state"] == "done"
    finish(client, create(client))
    gc.collect()
    assert image() is None
    assert job.request.mask_image.size == (1, 1), "it still says that there was one"
    assert (job.result.images, job.result.latents.base, job.result.latents.size) == ((), None, 0)
    for _ in range(11):
        finish(client, create(client, num_inference_steps=1))
    assert job.preview is None
    told = client.get(f"/api/jobs/{kept}/events").text
    kinds = [each for each in re.findall(r"event: (\w+)", told) if each not in ("loading", "loaded")]
    assert kinds == ["queued", "running", "decoding", "done"]


def make_job(stream, **options):
    return GenerationJob(
        "x", Generation(request=stream.request, selection=Selection(model="pictogram"), **options), stream.request
    )


def test_events_of_many_steps_are_bounded(pipeline):
    stream = pipeline.stream("a cat", **SIZE)
    step = replace(next(stream), num_steps=2001)

    async def publish():
        job = make_job(stream, partial_images=1)
        for number in range(2000):
            job.advance(replace(step, step=number), Preview(number=number + 1, step=step, size=(128, 128)))
        job.end(State.DONE)
        return job.preview, [event async for event in job.events()]

    preview, events = asyncio.run(publish())
    assert len(events) <= 101
    assert (events[-1].kind, events[-2].data["number"], preview.number) == ("done", 2000, 2000)
    assert events[-2].preview is None, "only partial images are kept with their events"
    assert Image.open(io.BytesIO(preview.png)).size == (128, 128)


def test_fast_steps_come_together_and_other_events_at_once(pipeline):
    stream = pipeline.stream("a cat", **SIZE)
    step = replace(next(stream), num_steps=1001)

    async def follow():
        job = make_job(stream)
        worker = asyncio.ensure_future(asyncio.to_thread(work, job))
        batches = [(time.perf_counter(), batch) async for batch in job.batches()]
        return batches, await worker

    def work(job):
        for number in range(100):
            job.advance(replace(step, step=number))
            time.sleep(0.005)
        job.end(State.DONE)
        return time.perf_counter()

    batches, ended = asyncio.run(follow())
    assert [event.number for _, batch in batches for event in batch] == list(range(1, 102))
    assert 3 <= len(batches) < 25
    assert batches[-1][0] - ended < 0.08, "the end waits for no batch"


def test_a_quiet_job_gives_empty_batches(pipeline):
    async def follow():
        batches = make_job(pipeline.stream("a cat")).batches(quiet=0.01)
        return [await anext(batches), await anext(batches)]

    assert asyncio.run(follow()) == [[], []]


def test_previews_are_made_only_for_those_who_look(server, monkeypatch):
    made, preview = list[int](), sdonnx.Progress.preview
    monkeypatch.setattr(sdonnx.Progress, "preview", lambda step: made.append(step.step) or preview(step))
    _, client = server
    job = create(client)
    assert client.get(f"/api/jobs/{job}/events").text.count("event: preview") == 3
    assert made == []
    assert client.get(f"/api/jobs/{job}/preview").content == client.get(f"/api/jobs/{job}/preview").content
    assert made == [2]


def test_images_that_cannot_be_written_leave_their_latents(server, pipeline, monkeypatch):
    server, client = server

    def fail(_result, _index, path, **_):
        raise sdonnx.SdonnxError(f"{path} can't be written: No space left on device; free some space")

    monkeypatch.setattr(sdonnx, "save_png", fail)
    failed = finish(client, create(client, seed=5))
    monkeypatch.undo()
    folder = server.context.store.folder
    assert failed["state"] == "failed"
    assert "No space left" in failed["error"]
    assert str(folder) not in failed["error"]
    name = re.search(r"sdonnx decode (\S+)", failed["error"])[1]
    latents, request, _ = load_latents(folder / name)
    expected = pipeline.generate("a cat", **SIZE, seed=5).images[0]
    np.testing.assert_array_equal(np.asarray(pipeline.decode(latents)[0]), np.asarray(expected))
    assert request.seed == 5
    assert finish(client, create(client))["state"] == "done", "the worker goes on"


def test_an_output_directory_that_is_deleted_is_made_again():
    with serving() as (server, client):
        shutil.rmtree(server.context.store.folder)
        assert client.get("/api/images").json() == {"images": [], "next": None}
        job = finish(client, create(client))
        assert [image["name"] for image in job["images"]] == [
            each.name for each in server.context.store.folder.iterdir()
        ]


def test_an_image_that_cannot_be_read_or_deleted_is_an_error_of_one_line(server, monkeypatch):
    server, client = server
    (image,) = finish(client, create(client))["images"]

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied", str(server.context.store.folder))

    for method, what in (("unlink", "deleted"), ("read_bytes", "read")):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, fail)
            reply = client.request("DELETE" if method == "unlink" else "GET", image["url"])
        assert reply.status_code == 500
        assert reply.json() == {"detail": f"{image['name']} can't be {what}: Permission denied"}
    assert client.delete(image["url"]).status_code == 204


def test_jobs_that_are_being_planned_hold_nobody_up(server):
    server, client = server
    with ThreadPoolExecutor(40) as threads:
        with server.context.queue.planner._lock:  # as if a prompt took long
            plans = [threads.submit(client.post, "/api/plan", json={"prompt": "a cat", **SIZE}) for _ in range(40)]
            time.sleep(0.3)
            assert httpx.get(f"{server.url}/api/images", timeout=5).status_code == 200
            assert httpx.post(f"{server.url}/sdapi/v1/interrupt", timeout=5).status_code == 200
        assert {plan.result().status_code for plan in plans} == {200}


def test_a_job_id_is_used_once(server):
    server, client = server
    queue, loop_of = server.context.queue, asyncio.new_event_loop()
    done = finish(client, create(client))
    generation = Generation(request=sdonnx.Request(prompt=""), selection=Selection(model="pictogram"))
    for taken in (done["id"], "../x", "a" * 65, ""):
        with pytest.raises(sdonnx.RequestError, match=r"already|not valid"):
            loop_of.run_until_complete(queue.submit(generation, taken))
    loop_of.close()


def test_shutting_down_cancels_and_refuses():
    with serving() as (server, client):
        running, waiting = create(client, **LONG), create(client)
        wait_for_step(client, running)
        server.context.queue.close()
        assert [finish(client, job)["state"] for job in (running, waiting)] == ["cancelled", "cancelled"]
        assert client.post("/api/jobs", json=SIZE).status_code == 503


def test_many_clients_at_once_get_their_own_images():
    with serving(max_queued=15) as (server, client):
        with ThreadPoolExecutor(15) as pool:
            jobs = list(
                pool.map(
                    lambda seed: create(
                        httpx.Client(base_url=server.url, timeout=60), seed=seed, num_inference_steps=1
                    ),
                    range(15),
                )
            )
        names = [image["name"] for job in jobs for image in finish(client, job)["images"]]
        assert len(set(names)) == len(jobs) == len(list(server.context.store.folder.iterdir()))
        for seed, name in enumerate(names):
            assert client.get(f"/api/images/{name}/info").json()["fields"]["seed"] == seed


@contextmanager
def serving_process(folder):
    """A `sdonnx serve` of its own, which ends by itself or is killed."""
    options = ["--output", folder, "--threads", "1", "--memory", "max"]
    with server_process(*options) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield server.process, client


def test_a_killed_server_keeps_every_finished_image(tmp_path):
    with serving_process(tmp_path) as (process, client):
        done = finish(client, create(client, num_images=2, num_inference_steps=1))
        running = create(client, **LONG)
        wait_for_step(client, running)
        process.kill()
    with serving_process(tmp_path) as (process, client):
        names = [each["name"] for each in client.get("/api/images").json()["images"]]
        assert sorted(names) == sorted(each["name"] for each in done["images"])
        again = client.get(f"/api/jobs/{done['id']}").json()
        assert (again["state"], again["images"]) == ("done", done["images"])
        assert client.get(f"/api/jobs/{running}").status_code == 404
        long = create(client, **LONG)
        wait_for_step(client, long)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert time.monotonic() - start < 5
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(names)


WRITER = """
import sys
import numpy as np
from pathlib import Path
from PIL import Image
import sdonnx
from sdonnx.server.images import ImageStore
from sdonnx_runtime.execution.timings import Timings

request = sdonnx.load("pictogram").resolve("a cat", num_images=2, seed=1).request
pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
images = (Image.fromarray(pixels), Image.fromarray(255 - pixels))
result = sdonnx.Result(images=images, seeds=(1, 2), latents=np.zeros((2, 4, 1, 1), np.float32), request=request,
                       model="pictogram", timings=Timings(load={}, run={}, steps=()))
store = ImageStore(Path(sys.argv[1]))
for job in range(10_000):
    print(*store.save(f"{sys.argv[2]}-{job}", result), flush=True)
"""


def test_a_write_that_is_killed_leaves_whole_images_alone(tmp_path):
    """Two processes write to one directory; both are killed in the middle."""
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, name], stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    told = [process.stdout.readline() for process in writers]
    time.sleep(random.Random(0).uniform(0.1, 0.3))
    for process in writers:
        process.kill()
    told += [process.communicate()[0] for process in writers]
    store = ImageStore(tmp_path)
    found = store.latest(10_000)
    assert {name for text in told for name in text.split() if name.endswith(".png")} <= {each.name for each in found}
    for each in found:
        Image.open(tmp_path / each.name).load()
    assert {each.name for each in tmp_path.iterdir()} == {each.name for each in found}, "nothing else is left"
    assert [each.index for each in store.of_job("one-0")] == [0, 1]
