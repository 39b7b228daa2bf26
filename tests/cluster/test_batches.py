"""``sdonnx run --ray``: the files of a local run, whatever becomes of actors and nodes."""

import json
import re
import signal
import subprocess
import threading
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest
from PIL import Image
from sdonnx_models import DEFAULT
from support.cli import run_cli, running_cli, start_cli
from support.remote import FAST, names, same_files, write_lines
from support.server import wait_until

import sdonnx
from sdonnx.cluster.actors import ActorPool, Failed, Opening
from sdonnx.cluster.connection import Node, connect
from sdonnx.cluster.packages import file_source, package_source
from sdonnx.cluster.resources import Actors, choose_actors

SLOW = ["--size", "64x64", "--steps", "40"]
OPENING = {
    "model": DEFAULT, "vae": None, "refiner": None, "controls": [], "ip_adapters": [], "upscaler": None,
    "lora_folder": None, "wildcard_folder": None, "styles": None, "device": "cpu", "compute": "auto", "safety": "off",
}  # fmt: skip


def actor_processes():
    """The processes of the actors, of this process' cluster."""
    return [each for each in psutil.Process().children(recursive=True) if is_actor(each)]


def is_actor(process):
    with suppress(psutil.Error, IndexError):
        return process.cmdline()[0].startswith("ray::ImageActor")
    return False


def test_forty_images_on_two_nodes_are_those_of_a_local_run(cluster, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    lines = [{"prompt": f"a cat {index}", "seed": index} for index in range(36)]
    lines += [{"prompt": "a dog", "num_images": 2, "seed": 3}, {"prompt": 5}, {"prompt": "{a|b} fox", "seed": 1}]
    lines += [{"prompt": "a fox", "image": "start.png", "strength": 0.5, "seed": 1}]
    for folder in (here, there):
        folder.mkdir()
        write_lines(folder / "r.jsonl", *lines)
        Image.new("RGB", (64, 64), "teal").save(folder / "start.png")
    batch = ["run", "--batch-file", "r.jsonl", *FAST, "--grid", "-o", "x.png", "--json"]
    local = run_cli(*batch, "--threads", "1", cwd=here)
    distributed = run_cli(*batch, "--ray", cluster.address, cwd=there)
    (there / "x.journal").unlink()
    same_files(here, there)
    assert (distributed.returncode, local.returncode) == (1, 1)
    chosen = re.search(r"^2 actors on the Ray cluster \(\S+\): 1 thread and (\d+) MB each$", distributed.stderr, re.M)
    rows = [
        {row["line"]: {**row, "timings": None, "machine": None} for row in map(json.loads, ran.stdout.splitlines())}
        for ran in (local, distributed)
    ]
    assert rows[0] == rows[1]
    machines = [row["machine"] for row in map(json.loads, distributed.stdout.splitlines()) if "machine" in row]
    assert {each["provider"] for each in machines} == {"CPUExecutionProvider"}
    assert len({each["actor"] for each in machines}) == 2
    assert max(each["peak_memory"] for each in machines) <= int(chosen[1]) * 1e6
    assert "line 38: prompt is 5; give a text" in distributed.stderr
    assert "39 of 40 requests are done; the same command goes on with the others" in distributed.stderr


def test_a_killed_actor_and_a_removed_node_lose_and_double_nothing(cluster, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        write_lines(folder / "r.jsonl", *({"prompt": "a cat", "seed": seed} for seed in range(12)))
    assert run_cli("run", "--batch-file", "r.jsonl", *SLOW, "--threads", "1", cwd=here).returncode == 0
    node = cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=100_000_000)
    batch = ["--batch-file", "r.jsonl", *SLOW, "--ray", cluster.address, "--actors", "3", "--memory-per-actor", "400MB"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start_cli("run", *batch, "--json", cwd=there, start=subprocess.Popen, **pipes)
    try:
        wait_until(lambda: len(list(there.glob("*.png"))) >= 2, 90)
        actor_processes()[0].kill()
        wait_until(lambda: len(list(there.glob("*.png"))) >= 4, 90)
        cluster.remove_node(node, allow_graceful=False)
        rows, printed = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, printed
    same_files(here, there)
    assert "an actor is lost, its request is done by another one" in printed
    assert sorted(json.loads(row)["line"] for row in rows.splitlines()) == list(range(1, 13))


def test_a_batch_goes_on_after_it_was_killed_or_interrupted(cluster, tmp_path):
    write_lines(tmp_path / "p.txt", *(f"a cat {number}" for number in range(8)))
    batch = ["run", "--batch-file", "p.txt", *SLOW, "--seed", "1", "--ray", cluster.address, "-o", "out/x.png"]
    (tmp_path / "out").mkdir()
    journal = tmp_path / "out" / "x.journal"

    def listed():
        return [json.loads(row) for row in journal.read_text().splitlines()] if journal.exists() else []

    for number, code in enumerate((signal.SIGKILL, signal.SIGTERM), 1):
        with running_cli(*batch, cwd=tmp_path) as process:
            wait_until(lambda number=number: len(listed()) >= number, 90)
            process.send_signal(code)
            process.communicate(timeout=30)
        for path in (tmp_path / "out").glob("*.png"):
            Image.open(path).load()
    assert process.returncode == 128 + signal.SIGTERM
    done, saved = len(listed()), list((tmp_path / "out").glob("*.png"))
    assert 2 <= done <= len(saved) <= done + 2, "an image is listed once it is saved"
    kept = {image: (tmp_path / image).stat().st_mtime_ns for row in listed() for image in row["images"]}
    last = run_cli(*batch, cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    assert f"{done} of 8 requests were done before" in last.stderr
    assert names(tmp_path / "out") == [f"x-{number:04}.png" for number in range(1, 9)]
    assert {image: (tmp_path / image).stat().st_mtime_ns for image in kept} == kept


def test_images_go_to_a_url(cluster, tmp_path):
    write_lines(tmp_path / "p.txt", "a cat", "a dog")
    url = f"file://{tmp_path.as_posix()}/new/x.png"
    batch = ["run", "--batch-file", "p.txt", *FAST, "--seed", "1", "--ray", cluster.address, "-o", url]
    ran = run_cli(*batch, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert f"file://{tmp_path.as_posix()}/new/x-0001.png  seed 1" in ran.stderr
    assert names(tmp_path / "new") == ["x-0001.png", "x-0002.png"]
    assert names(tmp_path) == ["new", "p.txt"]
    local = run_cli("run", "a cat", *FAST, "--seed", "1", "--threads", "1", "-o", "x.png", cwd=tmp_path)
    assert local.returncode == 0
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "new" / "x-0001.png").read_bytes()


def test_actors_that_can_not_do_their_work(cluster, tmp_path):
    """A package that differs stops the batch; a request that ends every actor fails alone."""
    actors, notes = Actors(count=1, threads=1, memory=400_000_000), []
    (tmp_path / "a.csv").write_text("one")
    for source in (package_source(DEFAULT), file_source(tmp_path / "a.csv")):
        other = Opening(arguments=OPENING, sources=(replace(source, digest="0" * 64),))
        with connect(cluster.address), pytest.raises(sdonnx.PackageError, match=r"^node \S+: .* differs from .*; copy"):
            list(ActorPool(other, actors, notes.append).run([dict]))

    def prepare():
        threading.Timer(0.3, lambda: actor_processes()[0].kill()).start()
        return {"prompt": "a cat", "seed": 1, "width": 64, "height": 64, "num_inference_steps": 200}

    def work():
        return {"prompt": "a cat", "seed": 1, "width": 64, "height": 64, "num_inference_steps": 1}

    attempts = []

    def fail_after_a_loss():
        attempts.append(None)
        return prepare() if len(attempts) == 1 else {**work(), "width": 65}

    with connect(cluster.address):
        requests = [prepare, work, fail_after_a_loss, work]
        found = list(ActorPool(Opening(arguments=OPENING), actors, notes.append).run(requests))
        wait_until(lambda: not actor_processes())
    assert [(each.index, isinstance(each, Failed)) for each in found] == [(0, True), (1, False), (2, True), (3, False)]
    assert "3 actors ended while they generated it, maybe out of memory" in str(found[0].error)
    assert "width 65 is not" in str(found[2].error)
    assert len(notes) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray", "nowhere"], "'nowhere' is not the address of a Ray cluster; give HOST:PORT"),
        (["--ray", "127.0.0.1:1"], "there is no Ray cluster at 127.0.0.1:1 (Connection refused); start one there"),
        (["--ray", "auto", "--preview", "p.png"], "--preview has no effect with --ray"),
        (["--ray", "auto", "--threads", "2"], "--threads has no effect with --ray; give --threads-per-actor"),
        (
            ["--ray", "auto", "--memory-per-actor", "max"],
            "--memory-per-actor is max; give a size such as 1500MB or 2GB",
        ),
        (
            ["--ray", "auto", "--memory-per-actor", "1TB"],
            "--memory-per-actor is 1TB; give a size such as 1500MB or 2GB",
        ),
        (["--ray", "auto", "--memory-per-actor", "1MB"], "--memory-per-actor is 1 MB; the largest request needs at"),
        (["--ray", "auto", "--server", "a"], "--server has no effect with --ray; give either servers or a cluster"),
        (["--ray", "auto", "-o", "nope://a/x.png"], "nope://a/x.png is no URL for fsspec"),
        (["--ray", "auto", "-m", "absent"], "there is no model 'absent'"),
        (["--actors", "2"], "--actors, --threads-per-actor and --memory-per-actor require --ray"),
        (["-o", "s3://bucket/x.png"], "a URL as -o requires --ray"),
    ],
)
def test_wrong_options_are_one_line(options, message, tmp_path):
    write_lines(tmp_path / "p.txt", "a cat")
    ran = run_cli("run", "--batch-file", "p.txt", *FAST, *options, cwd=tmp_path)
    assert ran.returncode in (1, 2)
    assert f"error: {message}" in ran.stderr
    assert "requests are done" not in ran.stderr
    assert names(tmp_path) == ["p.txt"]


def node(cpus, memory):
    return Node(id=f"{cpus}-{memory}", address="10.0.0.1", cpus=cpus, memory=memory * 10**9)


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        ([node(8, 32)], {"requests": 100, "memory": 2 * 10**9}, (8, 1)),
        ([node(8, 32)], {"requests": 3, "memory": 2 * 10**9}, (3, 2)),
        ([node(8, 6)], {"requests": 100, "memory": 2 * 10**9}, (3, 2)),
        ([node(4, 16), node(2, 16)], {"requests": 100, "memory": 2 * 10**9}, (6, 1)),
        ([node(4, 16), node(4, 1)], {"requests": 100, "memory": 2 * 10**9}, (4, 1)),
        ([node(8, 32)], {"requests": 100, "memory": 2 * 10**9, "threads": 4}, (2, 4)),
        ([node(8, 32)], {"requests": 100, "memory": 2 * 10**9, "count": 2}, (2, 4)),
        ([node(2, 32)], {"requests": 100, "memory": 2 * 10**9, "count": 40, "threads": 2}, (40, 2)),
        ([node(0, 1)], {"requests": 100, "memory": 2 * 10**9, "count": 4, "threads": 2}, (4, 2)),
    ],
)
def test_actors_share_the_nodes(nodes, asked, expected):
    chosen = choose_actors(nodes, **asked)
    assert (chosen.count, chosen.threads) == expected
    assert chosen.memory == asked["memory"]


def test_no_node_has_room():
    with pytest.raises(sdonnx.SdonnxError, match=r"no node has 1 CPUs and 2000 MB of memory \(the most is 1000 MB\)"):
        choose_actors([node(8, 1)], requests=5, memory=2 * 10**9)
