"""/api/events: every client sees the queue of all, from any moment on, however slowly it reads."""

import asyncio
import json
import re
import signal
import socket
import threading
import time

import httpx
import pytest
from support.server import running_server, server_process, wait_until

from sdonnx.server import feed
from sdonnx.server.feed import Feed, Message
from sdonnx.server.jobs import Job
from sdonnx.server.native import events

SHORT = {"prompt": "a cat", "width": 64, "height": 64, "num_inference_steps": 3}
LONG = {"prompt": "a house", "num_inference_steps": 200}


@pytest.fixture(scope="module")
def server():
    with running_server() as running:
        yield running


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as each:
        yield each
    server.wait_until_idle()


class Page:
    """A client that follows the events."""

    def __init__(self, url):
        self.told, self.comments = [], []
        url = httpx.URL(url)
        self._socket = socket.create_connection((url.host, url.port), timeout=60)
        self._socket.sendall(b"GET /api/events HTTP/1.0\r\nHost: localhost\r\n\r\n")
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self.wait_for(lambda kind, _: kind == "jobs")

    def _read(self):
        kind = ""
        for line in self._socket.makefile("r", encoding="utf-8"):
            name, _, value = line.rstrip().partition(": ")
            if name == "event":
                kind = value
            elif name == "data":
                self.told.append((kind, json.loads(value)))
            elif not name and value:
                self.comments.append(value)

    def wait_for(self, condition):
        """Wait for an event, and return its data."""
        wait_until(lambda: any(condition(*each) for each in self.told))
        return next(data for kind, data in self.told if condition(kind, data))

    def wait_for_end(self, job):
        """Wait until a job has ended and the queue is empty."""
        self.wait_for(lambda kind, data: kind in ("done", "failed", "cancelled") and data["id"] == job)
        wait_until(lambda: self.of("jobs")[-1] == {"jobs": []})

    def of(self, *kinds):
        return [data for kind, data in self.told if kind in kinds]

    def wait_until_it_ends(self):
        wait_until(lambda: not self._thread.is_alive())

    def leave(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()


@pytest.fixture
def open_page(server):
    pages = []

    def open_one():
        pages.append(Page(server.url))
        return pages[-1]

    yield open_one
    for each in pages:
        each.leave()


def create(client, **fields):
    return client.post("/api/jobs", json={**SHORT, **fields}).json()["id"]


def test_two_clients_see_the_queue_of_both(client, open_page):
    pages = [open_page(), open_page()]
    jobs = [create(client, num_inference_steps=40, seed=seed) for seed in range(3)]
    for page in pages:
        page.wait_for_end(jobs[-1])
        assert page.told[0] == ("jobs", {"jobs": []})
        queues = [[each["id"] for each in data["jobs"]] for data in page.of("jobs")]
        assert jobs in queues
        assert all(queue == sorted(queue, key=jobs.index) for queue in queues)
        for data in page.of("jobs"):
            assert [each["position"] for each in data["jobs"]] in ([None, 1, 2], [None, 1], [None], [1], [1, 2], [])
        for job in jobs:
            steps = [(each["step"], each["progress"]) for each in page.of("step") if each["id"] == job]
            assert steps == sorted(steps)
            assert set(page.of("step")[0]) == {
                "id", "image", "num_images", "step", "num_steps", "seconds", "eta", "progress"
            }  # fmt: skip
    done = pages[0].of("done")
    assert [each["id"] for each in done] == jobs
    assert pages[1].of("done") == done
    for each in done:
        assert each["images"] == client.get(f"/api/jobs/{each['id']}").json()["images"]
        assert len(each["seeds"]) == 1


def test_who_comes_in_the_middle_of_a_job_sees_how_far_it_is(client, open_page):
    first, job = open_page(), create(client, **LONG)
    waiting = create(client)
    first.wait_for(lambda kind, data: kind == "step" and data["step"] > 3)
    second = open_page()
    running, queued = second.told[0][1]["jobs"]
    assert (running["id"], running["state"], running["request"]["prompt"]) == (job, "running", LONG["prompt"])
    assert running["step"] > 3 and 0 < running["progress"] < 1
    assert client.get(running["preview"]).headers["content-type"] == "image/png"
    assert (queued["id"], queued["state"], queued["position"]) == (waiting, "queued", 1)
    later = second.wait_for(lambda kind, data: kind == "step" and data["step"] > running["step"])
    shown = second.wait_for(lambda kind, _: kind == "preview")
    assert client.get(shown["url"]).status_code == 200
    client.delete(f"/api/jobs/{waiting}")
    client.delete(f"/api/jobs/{job}")
    for page in (first, second):
        page.wait_for_end(job)
        ended = {each["id"]: each["step"] for each in page.of("cancelled")}
        assert ended[waiting] == 0 and ended[job] >= later["step"]


def test_jobs_of_other_apis_and_failures_are_told(client, server, open_page, monkeypatch):
    page = open_page()
    client.post("/sdapi/v1/txt2img", json={"prompt": "a boat", "steps": 2, "force_task_id": "boat-1"})
    page.wait_for_end("boat-1")
    assert page.of("done")[0]["images"][0]["name"].endswith("boat-1-0.png")
    monkeypatch.setattr(server.context.store, "save", lambda *_: 1 / 0)
    job = create(client)
    page.wait_for_end(job)
    assert page.of("failed") == [{"id": job, "error": client.get(f"/api/jobs/{job}").json()["error"]}]


def test_the_component_that_is_being_loaded_is_told(monkeypatch):
    shown, load = [], Job.load

    def load_and_look(job, component):
        load(job, component)
        shown.append(httpx.get(f"{server.url}/api/jobs/{job.id}").json()["loading"])

    monkeypatch.setattr(Job, "load", load_and_look)
    with running_server(memory="min") as server, httpx.Client(base_url=server.url) as client:
        page, job = Page(server.url), create(client)
        page.wait_for_end(job)
        page.leave()
        own = client.get(f"/api/jobs/{job}/events").text
    opened = ["text_encoder", None, "unet", None, "vae_decoder", None]
    assert shown == opened
    told = [(kind, component) for component in opened[::2] for kind in ("loading", "loaded")]
    assert re.findall(r'event: (loading|loaded)\ndata: {"component": "(\w+)"}', own) == told
    assert page.of("loaded")[-1] == {"id": job, "component": "vae_decoder"}
    assert page.of("loading")[-1] == {"id": job, "component": "vae_decoder"}


def test_a_deleted_image_is_told(client, open_page):
    page, job = open_page(), create(client)
    page.wait_for_end(job)
    (image,) = page.of("done")[0]["images"]
    assert client.delete(image["url"]).status_code == 204
    assert page.wait_for(lambda kind, _: kind == "deleted") == {"name": image["name"]}


def test_a_quiet_stream_has_comments(open_page, monkeypatch):
    monkeypatch.setattr(events, "KEEP_ALIVE", 0.05)
    page = open_page()
    wait_until(lambda: len(page.comments) > 2)
    assert page.told == [("jobs", {"jobs": []})]


def test_who_does_not_read_holds_nobody_up(client, server, open_page):
    page = open_page()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(server.address)
        deaf.sendall(b"GET /api/events HTTP/1.0\r\nHost: localhost\r\n\r\n")
        page.wait_for_end(create(client, num_inference_steps=50))
    assert len(page.of("done")) == 1


def test_a_slow_reader_misses_steps_alone():
    async def follow():
        told, batches = Feed(), []
        with told.follow() as follower:
            for number in range(2000):
                told.tell(Message(kind="step", data={"step": number}))
                told.tell(Message(kind="preview", data={"number": number}))
                if number % 1000 == 500:
                    told.tell(Message(kind="done", data={"images": [number]}))
            async for batch in follower.batches(quiet=0.01):
                batches.append([(each.kind, *each.data.values()) for each in batch])
                told.close()
        return batches

    told = [("jobs",), ("done", [500]), ("done", [1500]), ("step", 1999), ("preview", 1999)]
    assert asyncio.run(follow())[0] == told


def test_steps_of_several_running_jobs_do_not_replace_each_other():
    async def follow():
        told, jobs = Feed(), [Job(name, model="x", num_images=1, size=(64, 64)) for name in ("a", "b")]
        with told.follow() as follower:
            for number in range(3):
                for job in jobs:
                    told.tell(Message(kind="step", job=job, data={"step": number}))
            batch = await anext(follower.batches(1))
        return [(each.job.id, each.data["step"]) for each in batch if each.kind == "step"]

    assert asyncio.run(follow()) == [("a", 2), ("b", 2)]


def test_who_reads_nothing_for_long_loses_the_stream():
    async def follow():
        told = Feed()
        with told.follow() as follower:
            for number in range(1001):
                told.tell(Message(kind="deleted", data={"name": str(number)}))
            return [len(batch) async for batch in follower.batches(quiet=1)]

    assert asyncio.run(follow()) == [1001]


def test_steps_come_a_few_times_a_second_and_ends_at_once(monkeypatch):
    monkeypatch.setattr(feed, "REST", 0.5)

    async def follow():
        told, batches = Feed(), []
        with told.follow() as follower:
            worker = asyncio.ensure_future(asyncio.to_thread(work, told))
            async for batch in follower.batches(quiet=5):
                batches.append(time.perf_counter())
                if any(each.kind == "done" for each in batch):
                    break
        return batches, await worker

    def work(told):
        for number in range(100):
            told.tell(Message(kind="step", data={"step": number}))
            time.sleep(0.005)
        told.tell(Message(kind="done"))
        return time.perf_counter()

    batches, ended = asyncio.run(follow())
    assert len(batches) < 10
    assert batches[-1] - ended < 0.3


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_server_ends_though_pages_are_open(is_busy, tmp_path):
    with server_process("--output", tmp_path, "--threads", 1) as server:
        pages = [Page(server.url), Page(server.url)]
        job = httpx.post(f"{server.url}/api/jobs", json=LONG).json()["id"] if is_busy else None
        if is_busy:
            pages[0].wait_for(lambda kind, _: kind == "step")
        _, seconds = server.end(signal.SIGTERM)
        assert seconds < 9, "uvicorn would wait 10 for an open stream"
        for each in pages:
            each.wait_until_it_ends()
            assert [data["id"] for data in each.of("cancelled")] == ([job] if is_busy else [])


def test_events_require_the_token():
    with running_server(token="correct-horse") as server:
        assert httpx.get(f"{server.url}/api/events").status_code == 401
        head = httpx.head(f"{server.url}/api/events", headers={"Authorization": "Bearer correct-horse"})
        assert (head.status_code, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
