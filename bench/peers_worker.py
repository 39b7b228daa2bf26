"""Run one task of one runtime, for bench/peers.py, and print its figures as JSON.

A cold start counts from the start of this process, so this module imports little.
"""

import json
import statistics
import sys
from pathlib import Path

from runtime_base import Runtime
from runtimes import RUNTIMES


def run_task(runtime: Runtime, task: str, runs: int) -> dict[str, float]:
    """Run a task; return its figures."""
    if task == "convert":
        runtime.prepare()
        return {}
    if task == "cold":
        runtime.measure_images(1)
        return {}
    if task == "open":
        first, *others = runtime.measure_images(runs + 1)
        return {"first_image_s": first, "image_s": statistics.median(others)}
    if task in runtime.image_tasks:
        return {f"{task}_s": runtime.measure_images(1, fast=task == "fast")[0]}
    return runtime.measure(task, runs)


def main() -> None:
    work, size, runs, name, precision, compute, task = sys.argv[1:]
    runtimes = [kind(Path(work), size) for kind in RUNTIMES]
    (runtime,) = (each for each in runtimes if (each.name, each.precision, each.compute) == (name, precision, compute))
    print(json.dumps(run_task(runtime, task, int(runs))))


if __name__ == "__main__":
    main()
