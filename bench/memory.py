"""What a whole picture takes of memory and time: as usual, and with --low-memory.

    python bench/memory.py PACKAGE… --size 512x512 --steps 3 --json FILE
    python bench/memory.py PACKAGE… --leaks

Each figure is a median over processes that do nothing else. The peak is the most resident memory (VmHWM), with its
anonymous and its file-backed part as they were when it was largest, which is looked at every 2 ms; Linux.
``--leaks`` says instead how much is resident after the third and the last of a hundred pictures made in one process,
and of fifty times opening a package for a picture.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdonnx_runtime.machine import peak_memory

import sdonnx

WAYS = {"usual": False, "low memory": True}


def work(package: Path, way: str, steps: int, size: Mapping[str, int]) -> None:
    """Makes a picture; prints what it took."""
    start = time.perf_counter()
    with sdonnx.load(package, low_memory=WAYS[way]) as pipe:
        result = pipe.generate("a photograph of a cat", seed=1, num_inference_steps=steps, sampler="euler", **size)
    found = {
        "picture_s": time.perf_counter() - start,
        "step_s": statistics.median(result.timings.steps[1:] or result.timings.steps),
        "decode_s": result.timings.run["vae_decoder"],
        "peak_rss_mb": peak_memory() / 1e6,
    }
    print(json.dumps(found))


def resident() -> float:
    """What is now, MB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) * 1024 / 1e6


def leaks(package: Path, way: str, steps: int, size: Mapping[str, int]) -> None:
    """Makes many pictures; prints how much was resident after the third and the last."""
    asked: dict[str, Any] = {"num_inference_steps": steps, **size}
    made, opened = [], []
    with sdonnx.load(package, low_memory=WAYS[way]) as pipe:
        for seed in range(100):
            pipe.generate("a photograph of a cat", seed=seed, **asked)
            made.append(resident())
    for seed in range(50):
        with sdonnx.load(package, low_memory=WAYS[way]) as pipe:
            pipe.generate("a photograph of a cat", seed=seed, **asked)
        opened.append(resident())
    names = ("third_picture_mb", "last_picture_mb", "third_opening_mb", "last_opening_mb")
    print(json.dumps(dict(zip(names, (made[2], made[-1], opened[2], opened[-1]), strict=True))))


def watched(command: list[str]) -> dict[str, float]:
    """What a worker prints, and what its resident memory was made of while it was largest."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    status, most = Path(f"/proc/{process.pid}/status"), {"VmRSS": 0, "RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        lines = status.read_text().splitlines()
        found = {key: int(line.split()[1]) for line in lines for key in most if line.startswith(f"{key}:")}
        most = max(most, found, key=lambda each: each.get("VmRSS", 0))
        time.sleep(0.002)
    printed, _ = process.communicate()
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed")
    parts = {"anonymous_mb": most["RssAnon"] * 1024 / 1e6, "file_mb": most["RssFile"] * 1024 / 1e6}
    return {**json.loads(printed), **parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, nargs="+", metavar="PACKAGE")
    parser.add_argument("--size", help="WxH. Default: the model's own.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="usual, or low memory")
    parser.add_argument("--leaks", action="store_true", help="make many pictures in one process")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = {} if args.size is None else dict(zip(("width", "height"), map(int, args.size.split("x")), strict=True))
    if args.worker is not None:
        (leaks if args.leaks else work)(args.packages[0], args.worker, args.steps, size)
        return
    options = ["--steps", str(args.steps), *(["--size", args.size] if args.size is not None else [])]
    options += ["--leaks"] if args.leaks else []
    rows = []
    for package in args.packages:
        ways = [args.only] if args.only is not None else list(WAYS)
        rounds = {way: [] for way in ways}
        for _ in range(1 if args.leaks else args.repeats):
            for way, found in rounds.items():
                found.append(watched([__file__, str(package), *options, "--worker", way]))
        for way, found in rounds.items():
            medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
            rows.append({"package": package.name, "way": way, **medians})
    keys = list(rows[0])
    print("| " + " | ".join(keys) + " |\n" + "| --- " * len(keys) + "|")
    for row in rows:
        print("| " + " | ".join(value if isinstance(value, str) else f"{value:.3g}" for value in row.values()) + " |")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    sys.exit(main())
