"""Measure a batch on a Ray cluster of this machine beside one process, and what Ray costs for each image.

    python bench/cluster.py batch -m PACKAGE --images 8 --steps 20 --json FILE

``batch`` makes the same images three times, by the commands that users run: by one process with all CPUs, by one with a
single thread, and by single-threaded actors on as many nodes as there are CPUs. The throughput is that of the time from
the first image's file to the last one's; the rest is the start. Ray's overhead of an image is the time between two
files of one actor, less the time that the actor's pipeline took.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

OBJECT_STORE = 100_000_000
RUN = ("seconds", "start", "images_per_minute")


def run_batch(folder: Path, command: list[str], images: int) -> dict:
    """Run ``sdonnx run`` in a new folder; returns seconds and the rows of ``--json``."""
    folder.mkdir()
    lines = [json.dumps({"prompt": "a red apple on a blue background", "seed": seed}) for seed in range(images)]
    (folder / "batch.jsonl").write_text("\n".join(lines))
    began = time.time()
    base = [sys.executable, "-m", "sdonnx", "run", "--batch-file", "batch.jsonl", "-o", "x.png", "--json"]
    ran = subprocess.run([*base, *command], cwd=folder, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(ran.stderr)
    total = time.time() - began
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    finished = {row["line"]: (folder / row["images"][0]["path"]).stat().st_mtime for row in rows}
    first, last = min(finished.values()), max(finished.values())
    return {
        "seconds": total,
        "start": first - began,
        "images_per_minute": 60 * (images - 1) / (last - first),
        "rows": rows,
        "finished": finished,
    }


def measure_overhead(ran: dict) -> list[float]:
    """Seconds between the files of an actor, less what its pipeline took, of each image but an actor's first."""
    by_actor: dict[str, list[tuple[float, dict]]] = {}
    for row in ran["rows"]:
        by_actor.setdefault(row["machine"]["actor"], []).append((ran["finished"][row["line"]], row))
    overheads = []
    for rows in by_actor.values():
        rows.sort(key=lambda each: each[0])
        overheads += [
            after - before - row["machine"]["seconds"] for (before, _), (after, row) in itertools.pairwise(rows)
        ]
    return overheads


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    from ray.cluster_utils import Cluster

    options = ["-m", str(Path(arguments.model).absolute()) if Path(arguments.model).exists() else arguments.model]
    options += ["--size", arguments.size] if arguments.size else []
    options += ["--steps", str(arguments.steps)] if arguments.steps else []
    runs = {
        f"one process, {arguments.nodes} threads": ["--threads", str(arguments.nodes)],
        "one process, 1 thread": ["--threads", "1"],
    }
    results = {
        name: run_batch(folder / str(index), [*options, *more], arguments.images)
        for index, (name, more) in enumerate(runs.items())
    }
    node = {"num_cpus": 1, "object_store_memory": OBJECT_STORE, "memory": arguments.memory}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(arguments.nodes - 1):
            cluster.add_node(**node)
        command = [*options, "--ray", cluster.address, "--threads-per-actor", "1"]
        ray = run_batch(folder / "ray", command, arguments.images)
    finally:
        cluster.shutdown()
    results[f"{arguments.nodes} actors, 1 thread each"] = ray
    overheads, made = measure_overhead(ray), statistics.median(row["machine"]["seconds"] for row in ray["rows"])
    return {
        "model": arguments.model,
        "images": arguments.images,
        "runs": {name: {key: ran[key] for key in RUN} for name, ran in results.items()},
        "peak_memory": max(row["machine"]["peak_memory"] for row in ray["rows"]),
        "image_seconds": made,
        "overhead_seconds": statistics.median(overheads),
        "overhead_share": statistics.median(overheads) / made,
    }


def print_table(figures: dict) -> None:
    print(f"{'':28}{'images/min':>12}{'start, s':>10}{'total, s':>10}")
    for name, ran in figures["runs"].items():
        print(f"{name:28}{ran['images_per_minute']:12.1f}{ran['start']:10.1f}{ran['seconds']:10.1f}")
    overhead, made = figures["overhead_seconds"], figures["image_seconds"]
    print(f"Ray's overhead of an image: {1000 * overhead:.0f} ms, {figures['overhead_share']:.1%} of {made:.2f} s")
    print(f"{overhead / 5:.1%} of an image of 5 s; peak of an actor: {figures['peak_memory'] / 1e6:,.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    batch = parser.add_subparsers(required=True).add_parser("batch", help="throughput and overhead of a batch")
    batch.add_argument("-m", "--model", default="pictogram", help="package")
    batch.add_argument("--images", type=int, default=20, help="at least two for each node")
    batch.add_argument("--size", help="such as 512x512; the package's default")
    batch.add_argument("--steps", type=int, help="the package's default")
    batch.add_argument("--nodes", type=int, default=2, help="nodes with 1 CPU each; no more than CPUs")
    batch.add_argument("--memory", type=int, default=4_000_000_000, help="bytes of each node, as Ray counts them")
    batch.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    if arguments.images < 2 * arguments.nodes:
        parser.error("give at least two images for each node")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments, Path(folder))
    print_table(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
