"""Measure `sdonnx serve`: the overhead of HTTP over `pipe.generate`, behaviour under load, latency of cancelling.

python bench/server.py overhead -m pictogram --runs 20
python bench/server.py overhead -m sd15-int8 --runs 5 --steps 4
python bench/server.py load --clients 50 --count 2000
python bench/server.py cancel -m sd15-int8

Servers are processes of their own. Overhead alternates between HTTP (queue, follow, download) and the library.
"""

import argparse
import http.client
import io
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

import sdonnx

LONG = 200
"""Steps of a job that is to be cancelled."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that runs."""

    process: subprocess.Popen[str]
    url: str
    output: Path
    log: list[tuple[float, str]]
    """Lines, with the time at which they came."""

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=600)

    @property
    def memory(self) -> int:
        """Resident bytes, on Linux."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024


@contextmanager
def running(model: str, memory: str, threads: int | None) -> Iterator[Server]:
    """Run ``sdonnx serve`` on a free port."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sdonnx", "serve", "-m", model, "--port", "0", "--output", folder]
        command += ["--memory", memory, *([] if threads is None else ["--threads", str(threads)])]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            url = next(match[0] for line in process.stderr if (match := re.search(r"http://127[^ ]+", line)))
            log, lines = list[tuple[float, str]](), process.stderr
            reader = threading.Thread(target=lambda: log.extend((time.time(), line) for line in lines), daemon=True)
            reader.start()
            yield Server(process=process, url=url, output=Path(folder), log=log)
        finally:
            process.terminate()
            process.wait(60)


def create(client: httpx.Client, **fields: Any) -> str:
    """Queue a job, also if the queue is full for a while."""
    while True:
        reply = client.post("/api/jobs", json={"prompt": "a cat", **fields})
        if reply.status_code != 429:
            reply.raise_for_status()
            return reply.json()["id"]
        time.sleep(0.1)


def finish(client: httpx.Client, job: str) -> dict[str, Any]:
    """Follow a job to its end."""
    client.get(f"/api/jobs/{job}/events")
    return client.get(f"/api/jobs/{job}").json()


def measure_overhead(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an image by the library and by HTTP: medians of runs that alternate."""
    fields: dict[str, Any] = {"seed": 1, **({} if args.steps is None else {"num_inference_steps": args.steps})}
    library, served, worker = list[float](), list[float](), list[float]()
    with (
        running(args.model, args.memory, args.threads) as server,
        server.client() as client,
        sdonnx.load(args.model, memory=args.memory, threads=args.threads) as pipe,
    ):
        for run in range(args.runs + 1):
            start = time.perf_counter()
            result = pipe.generate("a cat", **fields)
            middle = time.perf_counter()
            job = finish(client, create(client, **fields))
            image = Image.open(io.BytesIO(client.get(job["images"][0]["url"]).content))
            end = time.perf_counter()
            assert np.array_equal(np.asarray(image), np.asarray(result.images[0]))
            if run > 0:  # the first one warms up
                library.append(middle - start)
                served.append(end - middle)
                worker.append(job["ended"] - job["started"])
    medians = {
        name: statistics.median(each) for name, each in {"generate": library, "http": served, "job": worker}.items()
    }
    return {
        "model": args.model, "runs": args.runs, **{f"{name}_s": each for name, each in medians.items()},
        "overhead_percent": 100 * (medians["http"] / medians["generate"] - 1),
        "http_beside_job_ms": 1000 * statistics.median(a - b for a, b in zip(served, worker, strict=True)),
    }  # fmt: skip


def measure_load(args: argparse.Namespace) -> dict[str, Any]:
    """Clients at once, then requests in a row, while another client asks for progress."""
    fields = {"num_inference_steps": args.steps or 1}
    with running(args.model, args.memory, args.threads) as server, server.client() as client:
        with ThreadPoolExecutor(args.clients) as pool:
            clients = [server.client() for _ in range(args.clients)]
            start = time.perf_counter()
            jobs = list(
                pool.map(lambda pair: finish(pair[1], create(pair[1], seed=pair[0], **fields)), enumerate(clients))
            )
            at_once = time.perf_counter() - start
        with polling(server) as latencies:
            memories = list[int]()
            start = time.perf_counter()
            for number in range(args.count):
                jobs.append(finish(client, create(client, seed=args.clients + number, **fields)))
                memories.append(server.memory)
            in_a_row = time.perf_counter() - start
        names = [image["name"] for job in jobs for image in job["images"]]
        seeds = [json.loads(Image.open(server.output / name).info["sdonnx"])["seed"] for name in names]
        tenth = max(1, args.count // 10)
        medians = [statistics.median(memories[index : index + tenth]) for index in range(0, 10 * tenth, tenth)]
        return {
            "clients": args.clients, "clients_s": at_once, "requests": args.count, "requests_s": in_a_row,
            "lost": args.clients + args.count - len(set(seeds)), "doubled": len(names) - len(set(seeds)),
            "files": len(list(server.output.iterdir())),
            "memory_mb": [round(each / 1e6, 2) for each in medians],  # by tenths; the first fills the list of jobs
            "memory_growth_percent": 100 * (medians[-1] / medians[1] - 1),
            "polls": {path: percentiles(each) for path, each in latencies.items()},
        }  # fmt: skip


@contextmanager
def polling(server: Server) -> Iterator[dict[str, list[float]]]:
    """Ask for progress all the time; yields the latencies in seconds, by path."""
    latencies = dict[str, list[float]]()
    ended = threading.Event()

    def poll() -> None:
        with server.client() as client:
            while not ended.wait(0.02):
                with suppress(IndexError):
                    newest = client.get("/api/jobs").json()["jobs"][0]["id"]
                    for path in (f"/api/jobs/{newest}", "/sdapi/v1/progress"):
                        start = time.perf_counter()
                        if client.get(path).status_code == 200:
                            name = path.replace(newest, "ID")
                            latencies.setdefault(name, []).append(time.perf_counter() - start)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield latencies
    finally:
        ended.set()
        thread.join()


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum, in milliseconds."""
    values = np.array(seconds) * 1000
    return {"count": len(values), "p50_ms": float(np.median(values)), "p95_ms": float(np.percentile(values, 95)),
            "max_ms": float(values.max())}  # fmt: skip


def measure_cancel(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds from a cancellation to the end of the job, also as steps of the model."""
    rows = dict[str, Any]()
    for how in ("DELETE", "interrupt", "dropped connection", "SIGTERM"):
        taken = list[float]()
        per_step = 0.0
        for _ in range(args.runs if how != "SIGTERM" else min(args.runs, 3)):
            with running(args.model, args.memory, args.threads) as server, server.client() as client:
                seconds = _cancel(how, server, client)
                if seconds is not None:
                    taken.append(seconds[0])
                    per_step = seconds[1]
        if taken:
            median, most = statistics.median(taken), max(taken)
            rows[how] = {"median_s": median, "max_s": most, "step_s": per_step, "steps": median / per_step}
    return rows


def _cancel(how: str, server: Server, client: httpx.Client) -> tuple[float, float] | None:
    """Seconds until a job has ended, and those of a step; None if the server lacks the API."""
    if how in ("interrupt", "dropped connection") and client.get("/sdapi/v1/progress").status_code == 404:
        return None
    stop: Callable[[], object]
    if how == "dropped connection":
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        body = json.dumps({"prompt": "a cat", "steps": LONG, "override_settings": {}})
        connection.request("POST", "/sdapi/v1/txt2img", body, {"Content-Type": "application/json"})
        stop = connection.close
        while not (jobs := client.get("/api/jobs").json()["jobs"]):
            time.sleep(0.01)
        job = jobs[0]["id"]
    else:
        job = create(client, num_inference_steps=LONG)
        stops: dict[str, Callable[[], object]] = {
            "DELETE": lambda: client.delete(f"/api/jobs/{job}"),
            "interrupt": lambda: client.post("/sdapi/v1/interrupt"),
            "SIGTERM": lambda: server.process.send_signal(signal.SIGTERM),
        }
        stop = stops[how]
    while (found := client.get(f"/api/jobs/{job}").json())["step"] < 3:
        time.sleep(0.01)
    start = time.time()
    stop()
    if how == "SIGTERM":
        server.process.wait(60)
        ended = next((when for when, line in server.log if "cancelled" in line), time.time())
        return ended - start, found["seconds_per_step"]
    last = finish(client, job)
    assert last["state"] == "cancelled", last
    return max(0.0, last["ended"] - start), found["seconds_per_step"]


PARTS = {"overhead": measure_overhead, "load": measure_load, "cancel": measure_cancel}


def main() -> None:
    """Print what was measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("-m", "--model", default="pictogram", help="name or directory of a package")
    parser.add_argument("--memory", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args()
    figures = PARTS[args.part](args)
    text = json.dumps({"part": args.part, **figures}, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
