"""What a whole picture takes of memory and time: as usual, and with --low-memory.

    python bench/memory.py PACKAGE… --size 512x512 --steps 3 --json FILE

Each figure is a median over processes that do nothing else. The peak is the most resident memory (VmHWM), with its
anonymous and its file-backed part as they were when it was largest, which is looked at every 2 ms; Linux.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from sdonnx_runtime.machine import peak_memory

import sdonnx

WAYS = {"usual": False, "low memory": True}


def work(package: Path, way: str, steps: int, size: dict[str, int]) -> None:
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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = {} if args.size is None else dict(zip(("width", "height"), map(int, args.size.split("x")), strict=True))
    if args.worker is not None:
        work(args.packages[0], args.worker, args.steps, size)
        return
    options = ["--steps", str(args.steps), *(["--size", args.size] if args.size is not None else [])]
    rows = []
    for package in args.packages:
        ways = [args.only] if args.only is not None else list(WAYS)
        rounds = {way: [] for way in ways}
        for _ in range(args.repeats):
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
