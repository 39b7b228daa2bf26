"""A server whose jobs run on two replicas, one on each node of a cluster."""

import base64
import io
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import openai
import psutil
import pytest
from PIL import Image
from sdonnx_models import DEFAULT, bundled
from support.server import running_server, server_process, wait_until
from typer.testing import CliRunner

import sdonnx
from sdonnx.cli.app import app
from sdonnx.cluster import serving
from sdonnx.cluster.connection import connect
from sdonnx.cluster.replica import Replica
from sdonnx.cluster.resources import num_gpus
from sdonnx.cluster.scaling import Bounds, Replicas
from sdonnx.cluster.serving import replicas
from sdonnx.server.settings import Settings

SIZE = {"width": 64, "height": 64, "num_inference_steps": 2}
LONG = {**SIZE, "prompt": "a house", "num_inference_steps": 200, "preview_every": 0}
SETTINGS = Settings(packages=(bundled()[DEFAULT],), threads=1, memory="max")
QUEUED = 20


def describe(bounds, **settings):
    return Replicas(bounds=bounds, settings=replace(SETTINGS, **settings), packages=(DEFAULT,))


@pytest.fixture(scope="module", autouse=True)
def connected(cluster):
    with connect(cluster.address):
        yield


@pytest.fixture(scope="module")
def server(cluster):
    with (
        replicas(describe(Bounds(least=2, most=2)), "sdonnx-test") as make_runner,
        running_server(make_runner, max_queued=QUEUED) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def pipeline():
    with sdonnx.load("pictogram", threads=1, memory="max") as pipe:
        yield pipe


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
        for job in server.context.queue.jobs:
            server.context.queue.cancel(job)
        server.wait_until_idle()


def create(client, **fields):
    reply = client.post("/api/jobs", json={"prompt": "a cat", **SIZE, **fields})
    assert reply.status_code == 202, reply.text
    return reply.json()["id"]


def get(client, job):
    return client.get(f"/api/jobs/{job}").json()


def finish(client, job):
    client.get(f"/api/jobs/{job}/events")
    return get(client, job)


def run_two(client):
    """Two long jobs that run, the older one first."""
    jobs = []
    for _ in range(2):
        jobs.append(create(client, **LONG))
        wait_until(lambda: get(client, jobs[-1])["step"] > 0)
    return jobs


def replica_processes():
    """The processes of this cluster's replicas."""
    children = psutil.Process().children(recursive=True)
    return [each for each in children if any("ServeReplica:sdonnx-test" in part for part in each.cmdline())]


def applications():
    """The names of Ray Serve's applications; none where it does not run."""
    return list(serving.serve.status().applications) if serving._has_serve() else []


def test_twenty_clients_get_their_own_images(server, pipeline, tmp_path):
    before = {each.name for each in server.context.store.folder.iterdir()}

    def ask(seed):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            reply = client.images.generate(
                model="pictogram", prompt=f"a cat {seed}", size="64x64", extra_body={"seed": seed, "steps": 2}
            )
        return base64.b64decode(reply.data[0].b64_json)

    with ThreadPoolExecutor(20) as threads:
        pngs = list(threads.map(ask, range(20)))
    for seed, png in enumerate(pngs):
        expected = pipeline.generate(f"a cat {seed}", **SIZE, seed=seed)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(expected.images[0]))
    file = sdonnx.save_png(expected, 0, tmp_path / "local.png")
    assert pngs[-1] == file.read_bytes(), "the texts are those of a server without Ray"
    stored = [each for each in server.context.store.folder.iterdir() if each.name not in before]
    assert sorted(each.read_bytes() for each in stored) == sorted(pngs)


def test_both_replicas_work_at_once(client, server):
    first, second = run_two(client)
    listed = client.get("/api/jobs").json()["jobs"]
    assert {each["id"] for each in listed if each["state"] == "running"} == {first, second}
    waiting = create(client)
    assert get(client, waiting)["position"] == 1
    with client.stream("GET", "/api/events") as events:
        told = next(line for line in events.iter_lines() if line.startswith("data: "))
    assert re.findall(r'"id": "(\w+)"', told) == [first, second, waiting]


def test_previews_are_those_of_the_pipeline(client, pipeline):
    job = create(client, seed=3)
    assert finish(client, job)["state"] == "done"
    *_, last = pipeline.stream("a cat", **SIZE, seed=3)
    expected = last.preview().resize((64, 64))
    found = Image.open(io.BytesIO(client.get(f"/api/jobs/{job}/preview").content))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_a_killed_replica_loses_no_job_and_doubles_no_image(client, server, pipeline):
    before = set(server.context.store.folder.iterdir())
    steps = {"num_inference_steps": 40}
    jobs = [create(client, seed=seed, preview_every=0, **steps) for seed in range(4)]
    wait_until(lambda: min(get(client, job)["step"] for job in jobs[:2]) > 2)
    os.kill(replica_processes()[0].pid, signal.SIGKILL)
    ended = [finish(client, job) for job in jobs]
    assert [each["state"] for each in ended] == ["done"] * 4
    stored = set(server.context.store.folder.iterdir()) - before
    assert sorted(each.name for each in stored) == sorted(each["images"][0]["name"] for each in ended)
    for seed, each in enumerate(ended):
        png = client.get(each["images"][0]["url"]).content
        expected = pipeline.generate("a cat", **{**SIZE, **steps}, seed=seed).images[0]
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(expected))
    told = [client.get(f"/api/jobs/{job}/events").text for job in jobs]
    assert max(text.count('"step": 1,') for text in told) == 2, "the lost one began anew"
    assert all(text.count("event: done") == text.count("event: running") == 1 for text in told)


@pytest.mark.parametrize("how", ["delete", "interrupt", "disconnect"])
def test_a_cancelled_job_frees_its_replica_within_a_step(client, server, how):
    if how == "disconnect":
        other = create(client, **LONG)
        wait_until(lambda: get(client, other)["step"] > 0)
        with pytest.raises(httpx.ReadTimeout):
            body = {"prompt": "a house", "size": "64x64", "steps": 200}
            httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=1)
        job = next(each.id for each in server.context.queue.jobs if each.id != other and not each.state.is_final)
    else:
        job, other = run_two(client)
    step = get(client, job)["step"]
    if how == "delete":
        client.delete(f"/api/jobs/{job}")
    elif how == "interrupt":
        assert client.get("/sdapi/v1/progress").json()["state"]["job"] == job, "the older one"
        client.post("/sdapi/v1/interrupt")
    next_job = create(client)
    assert finish(client, next_job)["state"] == "done"
    ended = get(client, job)
    assert (ended["state"], ended["images"], ended["error"]) == ("cancelled", [], None)
    assert ended["step"] <= step + 3
    assert get(client, other)["state"] == "running"


def test_a_full_queue_says_when_to_come_back(client):
    run_two(client)
    waiting = [create(client) for _ in range(QUEUED)]
    reply = client.post("/api/jobs", json=LONG)
    assert (reply.status_code, int(reply.headers["retry-after"]) > 0) == (429, True)
    assert [get(client, job)["position"] for job in waiting] == list(range(1, QUEUED + 1))
    assert client.delete(f"/api/jobs/{waiting[0]}").json()["state"] == "cancelled"
    assert create(client)


def test_a_job_that_fails_says_why(client, server, monkeypatch):
    image = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(image, format="PNG")

    def fail(*_, **__):
        raise sdonnx.SdonnxError("it can't be written: No space left on device; free some space")

    monkeypatch.setattr(server.context.store, "save_pngs", fail)
    failed = finish(client, create(client))
    monkeypatch.undo()
    assert (failed["state"], failed["error"]) == (
        "failed", "it can't be written: No space left on device; free some space"
    )  # fmt: skip
    sent = {"image": base64.b64encode(image.getvalue()).decode(), "strength": 0.5}
    assert finish(client, create(client, **sent))["state"] == "done"


def test_a_node_whose_package_differs_is_named():
    with pytest.raises(sdonnx.PackageError, match=r"node \S+: pictogram differs .*copy the package there"):
        Replica(SETTINGS, [DEFAULT], {"pictogram": "0" * 64})
    with pytest.raises(sdonnx.PackageError, match=r"node \S+: sd15 is not there"):
        Replica(SETTINGS, [DEFAULT], {"sd15": "0" * 64})


def test_a_job_fails_if_no_replica_ever_comes(cluster, monkeypatch):
    monkeypatch.setattr(serving, "_PATIENCE", 3.0)
    with (
        replicas(describe(Bounds(least=0, most=1), threads=64), "sdonnx-none") as make_runner,
        running_server(make_runner) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        began = time.monotonic()
        failed = finish(client, create(client))
        assert failed["state"] == "failed"
        assert failed["error"].startswith("no replica was started within 3 s: no node has the CPUs")
        assert failed["started"] is None and time.monotonic() - began < 15


def test_a_signal_removes_the_replicas(cluster, tmp_path):
    options = ["--ray", cluster.address, "--replicas", "0:1", "--threads", "1", "--memory", "600MB", "-o", tmp_path]
    late = "import atexit, time; atexit.register(time.sleep, 1.5)"  # what Ray does every second has its time to fail
    (tmp_path / "sitecustomize.py").write_text(late)
    path = [str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    with server_process(*options, PYTHONPATH=os.pathsep.join(filter(None, path))) as running:
        ours = [name for name in applications() if name.endswith(f"-{running.process.pid}")]
        assert len(ours) == 1
        assert "0 to 1 replicas, each with 1 thread and 0.6 GB" in running.printed
        code, _ = running.end(signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert running.printed.splitlines()[-1] == "stopped", "Ray says nothing"
    assert ours[0] not in applications()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "1:2"], "--replicas requires --ray"),
        (["--ray", "auto", "--replicas", "2:1"], "--replicas is '2:1'; give a MAX"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    result = CliRunner().invoke(app, ["serve", *options])
    assert isinstance(result.exception, sdonnx.RequestError) and str(result.exception).startswith(message)


@pytest.mark.parametrize("text", ["", "a", "1:", ":2", "3:2", "0", "0:0", "-1:2", "1:2:3", "1.5"])
def test_malformed_bounds_are_refused(text):
    with pytest.raises(sdonnx.RequestError, match=re.escape(f"--replicas is '{text}'")):
        Bounds.parse(text)


def test_bounds():
    assert Bounds.parse("0:4") == Bounds(least=0, most=4)
    assert Bounds.parse("2") == Bounds(least=2, most=2)


def test_ray_chooses_the_gpu_of_a_process():
    devices = ("cpu", "auto", "webgpu:1", "cuda", "cuda:0")
    assert [num_gpus(each) for each in devices] == [0, 0, 0, 1, 1]
    with pytest.raises(sdonnx.RequestError, match="--device is cuda:1, but Ray chooses .*; use --device cuda"):
        num_gpus("cuda:1")
