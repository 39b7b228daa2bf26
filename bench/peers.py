"""Compare sdonnx with other runtimes on one random checkpoint: a U-Net step, a VAE decode and an image.

    pip install -e ".[cpu,peers]"
    python bench/peers.py --work DIR --json FILE                  # Stable Diffusion 1.5's size, 18 GB of disk
    python bench/peers.py --work DIR --only sdonnx,openvino --image
    python bench/peers.py --work DIR --size sdxl --only sdonnx,openvino       # SDXL's, of float16, 30 GB of disk
    python bench/peers.py --work DIR --size tiny --repeats 1      # check that everything works, in two minutes

Runtimes take turns, every figure comes from its own process, and the table gives medians. A runtime that is not
installed, or fails, is left out with a message. Converted models are kept in DIR and reused.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import random_checkpoint
from runtimes import KEYS, RUNTIMES, Runtime

from sdonnx.benchmark.cpu import cpu_name, instruction_set

Figures = dict[str, float]


class RunFailed(Exception):
    """A process exited with an error."""


def run_and_measure(command: list[str]) -> tuple[str, float, float]:
    """Run a Python script; return the last line that it printed, its seconds, and its peak RSS in 10**6 bytes."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        environment = {**os.environ, "COLUMNS": "1000", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([sys.executable, *command], stdout=stdout, stderr=stderr, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        for stream in (stdout, stderr):
            stream.seek(0)
        if process.returncode != 0:
            lines = [line.strip("│╭╮╰╯─ \n") for line in stderr]
            raise RunFailed(next((line for line in reversed(lines) if line), f"exit code {process.returncode}"))
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        printed = stdout.read().splitlines()
    return printed[-1] if printed else "", seconds, peak / 1e6


def run_worker(runtime: Runtime, task: str, runs: int) -> None:
    """Run one task in this process; print its figures."""
    if task == "convert":
        runtime.prepare()
    elif task in runtime.image_tasks:
        start = time.perf_counter()
        runtime.generate_fast() if task == "fast" else runtime.generate()
        print(json.dumps({f"{task}_s": time.perf_counter() - start}))
    else:
        print(json.dumps(runtime.measure(task, runs)))


class Benchmark:
    """One run of this script."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rounds: dict[Runtime, list[Figures]] = {}
        self.exports: dict[Runtime, Figures] = {}

    def run_in_subprocess(self, runtime: Runtime, task: str) -> tuple[str, float, float]:
        """Call `run_worker` in a new process; returns what `run_and_measure` does."""
        options = ["--work", str(self.args.work), "--size", self.args.size, "--steps", str(self.args.steps)]
        return run_and_measure([__file__, *options, "--worker", runtime.name, runtime.precision, task])

    def prepare(self, runtimes: list[Runtime]) -> None:
        """Convert the checkpoint for every runtime; leave out runtimes that fail."""
        for runtime in runtimes:
            reason = runtime.missing()
            if reason is None and not runtime.folder.exists():
                reason = self.convert(runtime)
            if reason is None:
                self.rounds[runtime] = []
            else:
                print(f"{runtime.name} {runtime.precision} is left out: {reason}", flush=True)

    def convert(self, runtime: Runtime) -> str | None:
        """Convert the checkpoint for a runtime; return the error message if that fails."""
        try:
            _, seconds, peak = self.run_in_subprocess(runtime, "convert")
        except RunFailed as error:
            return str(error)
        if runtime.folder.exists():
            self.exports[runtime] = {"export_s": seconds, "export_peak_rss_mb": peak}
        return None

    def round(self) -> None:
        """Measure every runtime once."""
        for runtime in list(self.rounds):
            figures: Figures = {}
            try:
                for task in [*runtime.parts, *(runtime.image_tasks if self.args.image else [])]:
                    printed, _, peak = self.run_in_subprocess(runtime, task)
                    figures |= {**json.loads(printed), PEAKS[task]: peak}
            except RunFailed as error:
                print(f"{runtime.name} {runtime.precision} is left out: {error}", flush=True)
                del self.rounds[runtime]
                continue
            self.rounds[runtime].append(figures)
            print(f"{runtime.name} {runtime.precision}: {figures['step_s']:.3g} s/step", flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """Return the medians for each runtime."""
        return [
            {"runtime": runtime.name, "precision": runtime.precision, **self.exports.get(runtime, {})}
            | {key: statistics.median(each[key] for each in figures) for key in figures[0]}
            for runtime, figures in self.rounds.items()
        ]


PEAKS = {
    "unet": "peak_rss_mb",
    "vae_decoder": "decode_peak_rss_mb",
    "image": "image_peak_rss_mb",
    "fast": "fast_peak_rss_mb",
}
COLUMNS = {
    "export_s": "export s",
    "export_peak_rss_mb": "export MB",
    "load_s": "load s",
    "first_step_s": "first step s",
    "step_s": "step s",
    "peak_rss_mb": "peak MB",
    "decode_s": "decode s",
    "decode_peak_rss_mb": "decode MB",
    "image_s": "image s",
    "image_peak_rss_mb": "image MB",
    "fast_s": "--fast s",
    "fast_peak_rss_mb": "--fast MB",
}
RATIOS = ("step_s", "peak_rss_mb", "decode_s", "image_s", "fast_s")


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format a markdown table; ratios to the first row are in brackets."""
    columns = {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)}
    lines = [f"| runtime | precision | {' | '.join(columns.values())} |", f"| --- {'| --- ' * (len(columns) + 1)}|"]
    for row in rows:
        cells = [row["runtime"], row["precision"]]
        for key in columns:
            value, base = row.get(key), rows[0].get("image_s" if key == "fast_s" else key)
            cell = "" if value is None else f"{value:,.0f}" if key.endswith("mb") else f"{value:.3g}"
            cells.append(f"{cell} ({value / base:.2f})" if key in RATIOS and value and base else cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def find_mismatches(rows: list[dict[str, Any]]) -> list[str]:
    """Report the float32 runtimes whose outputs differ from the first one's."""
    exact = [row for row in rows if row["precision"] == "fp32"]
    return [
        f"{row['runtime']}'s {part} output differs from {exact[0]['runtime']}'s"
        for row in exact[1:]
        for part in KEYS
        if abs(row[f"{part}_checksum"] / exact[0][f"{part}_checksum"] - 1) > 1e-3
    ]


def write_checkpoint(args: argparse.Namespace) -> None:
    """Write the checkpoint unless it exists."""
    config = args.work / "checkpoint" / "unet" / "config.json"
    if not config.exists():
        script = Path(__file__).with_name("random_checkpoint.py")
        dtype = "float16" if args.size == "sdxl" else "float32"
        run_and_measure([str(script), str(args.work / "checkpoint"), "--size", args.size, "--dtype", dtype])
    if json.loads(config.read_text(encoding="utf-8")) != random_checkpoint.SIZES[args.size]["unet"]:
        raise SystemExit(f"{args.work} has a checkpoint of another size; give another --work directory for {args.size}")


def main() -> None:
    names = list(dict.fromkeys(runtime.name for runtime in RUNTIMES))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="directory for the checkpoint and the converted models"
    )
    parser.add_argument("--size", choices=sorted(random_checkpoint.SIZES), default="sd15")
    parser.add_argument("--only", help=f"some of {','.join(names)}")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of all runtimes")
    parser.add_argument("--steps", type=int, default=5, help="timed runs in each process, after an untimed one")
    parser.add_argument("--image", action="store_true", help="also an image of 20 steps, and sdonnx' --fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    runtimes = [kind(args.work, args.size) for kind in RUNTIMES]
    if args.worker is not None:
        name, precision, task = args.worker
        (runtime,) = (each for each in runtimes if (each.name, each.precision) == (name, precision))
        run_worker(runtime, task, args.steps)
        return
    selected = names if args.only is None else args.only.split(",")
    if not set(selected) <= set(names):
        parser.error(f"--only: give some of {', '.join(names)}, with commas")
    write_checkpoint(args)
    benchmark = Benchmark(args)
    benchmark.prepare([runtime for runtime in runtimes if runtime.name in selected])
    for _ in range(args.repeats):
        benchmark.round()
    rows = benchmark.rows()
    if not rows:
        raise SystemExit("every runtime was left out")
    pixels = runtimes[0].pixels
    print(f"\n{cpu_name()}, {os.cpu_count()} CPUs, {instruction_set()}; {pixels}x{pixels}, U-Net batch 2\n")
    print("\n".join([format_table(rows), *find_mismatches(rows)]))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
