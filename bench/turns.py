"""Compare runtimes run by run: all are open at a time, each in its own process, and take turns.

    python bench/peers.py --work DIR                              # converts the checkpoint
    python bench/turns.py --work DIR openvino:fp16:default sdonnx-openvino:fp16:default
    python bench/turns.py --work DIR --part vae_decoder openvino:fp16:default sdonnx-openvino:fp16:default
    python bench/turns.py --work DIR --size turbo --part image openvino-genai:fp16:default sdonnx-openvino:fp16:default

A runtime is its name, precision and what it computes in, as bench/peers.py prints them. On a machine that others use,
speeds change from minute to minute; the ratio of two runs that follow each other does so less. The table has medians of
the seconds, and of the ratios to the first runtime's run of the same turn, with their quartiles.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_sizes import SIZES
from runtime_base import Runtime
from runtimes import RUNTIMES

PARTS = ("unet", "vae_decoder", "image")
WARM_UP = 2
"""Runs that are not counted."""


def key_of(runtime: Runtime) -> str:
    return f"{runtime.name}:{runtime.precision}:{runtime.compute}"


def open_run(runtime: Runtime, part: str) -> Callable[[], Any]:
    """Open what runs a part once."""
    if part == "image":
        generate, png = runtime.open_pipeline(), Path(os.devnull)
        return lambda: generate().save(png, "PNG")
    run, feeds = runtime.open(part), runtime.feeds(part)
    return lambda: run(feeds)


def run_on_request(runtime: Runtime, part: str) -> None:
    """Run a part once for each line that is read, and print its seconds."""
    run = open_run(runtime, part)
    for _ in range(WARM_UP):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def start(args: argparse.Namespace, key: str) -> "subprocess.Popen[str]":
    """Start the process of a runtime, and wait until it is open."""
    command = [sys.executable, __file__, "--work", str(args.work), "--size", args.size, "--part", args.part]
    process = subprocess.Popen(
        [*command, "--worker", key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    if not any(line == "ready\n" for line in process.stdout or ()):
        raise SystemExit(f"{key} failed; run bench/peers.py, which converts the checkpoint and says why")
    return process


def time_run(process: "subprocess.Popen[str]") -> float:
    """Have a process run once; returns the seconds."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args[-1]} ended in a run")
    return float(line)


def format_table(keys: Sequence[str], seconds: np.ndarray) -> str:
    """Format a markdown table of ``seconds`` (turns, runtimes)."""
    lines = ["| runtime | s | ratio | quartiles |", "| --- | --- | --- | --- |"]
    for key, own in zip(keys, seconds.T, strict=True):
        low, middle, high = np.percentile(own / seconds[:, 0], [25, 50, 75])
        lines.append(f"| {key} | {np.median(own):.3g} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="that of bench/peers.py")
    parser.add_argument("--size", choices=sorted(SIZES), default="sd15")
    parser.add_argument("--part", choices=PARTS, default="unet")
    parser.add_argument("--turns", type=int, default=12, help="runs of each runtime, after two")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the seconds to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("runtimes", nargs="*", metavar="NAME:PRECISION:COMPUTE")
    args = parser.parse_args()
    known = {key_of(each): each for each in (kind(args.work, args.size) for kind in RUNTIMES)}
    if args.worker is not None:
        run_on_request(known[args.worker], args.part)
        return
    if not args.runtimes or not set(args.runtimes) <= known.keys():
        parser.error(f"give some of {', '.join(known)}")
    os.environ["XDG_CACHE_HOME"] = str(args.work.resolve() / "cache")
    processes = [start(args, key) for key in args.runtimes]
    seconds = np.array([[time_run(process) for process in processes] for _ in range(args.turns)])
    for process in processes:
        process.communicate()
    print(format_table(args.runtimes, seconds))
    if args.json is not None:
        columns = dict(zip(args.runtimes, seconds.T.tolist(), strict=True))
        args.json.write_text(json.dumps(columns, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
