"""A U-Net step, a VAE decode and a picture by sdonnx and its peers, of one random checkpoint, in one run.

    pip install -e ".[cpu,peers]"
    python bench/peers.py --work DIR --json FILE                  # Stable Diffusion 1.5's size, 18 GB of disk
    python bench/peers.py --work DIR --only sdonnx,openvino --image
    python bench/peers.py --work DIR --size sdxl --only sdonnx,openvino       # SDXL's, of float16, 30 GB of disk
    python bench/peers.py --work DIR --size tiny --repeats 1      # whether all of it works, in two minutes

Runtimes take turns, every figure comes from a process of its own, and the table gives medians. One that is not
installed, or fails, is left out with a line. What was made of the checkpoint is kept in DIR and not made again.
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
from sdonnx_runtime.execution.cpu import cpu_name, instruction_set

Figures = dict[str, float]


class Failed(Exception):
    """A process ended with an error."""


def measured(command: list[str]) -> tuple[str, float, float]:
    """What a command of Python printed last; its seconds; its peak RSS in MB as the system accounts for it."""
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
            raise Failed(next((line for line in reversed(lines) if line), f"it ended with {process.returncode}"))
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        printed = stdout.read().splitlines()
    return printed[-1] if printed else "", seconds, peak / 1e6


def work(runtime: Runtime, what: str, runs: int) -> None:
    """One thing in this process; prints its figures."""
    if what == "make":
        runtime.prepare()
    elif what in runtime.pictures:
        start = time.perf_counter()
        runtime.fast() if what == "fast" else runtime.picture()
        print(json.dumps({f"{what}_s": time.perf_counter() - start}))
    else:
        print(json.dumps(runtime.figures(what, runs)))


class Run:
    """One run of the bench."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rounds: dict[Runtime, list[Figures]] = {}
        self.exports: dict[Runtime, Figures] = {}

    def apart(self, runtime: Runtime, what: str) -> tuple[str, float, float]:
        """`work` in a process of its own, as `measured` gives it."""
        where = ["--work", str(self.args.work), "--size", self.args.size, "--steps", str(self.args.steps)]
        return measured([__file__, *where, "--worker", runtime.name, runtime.precision, what])

    def prepare(self, runtimes: list[Runtime]) -> None:
        """Makes every runtime's files; those that can't be made are left out."""
        for runtime in runtimes:
            reason = runtime.missing()
            if reason is None and not runtime.folder.exists():
                reason = self.make(runtime)
            if reason is None:
                self.rounds[runtime] = []
            else:
                print(f"{runtime.name} {runtime.precision} is left out: {reason}", flush=True)

    def make(self, runtime: Runtime) -> str | None:
        """Makes a runtime's files; what went wrong, if it did."""
        try:
            _, seconds, peak = self.apart(runtime, "make")
        except Failed as error:
            return str(error)
        if runtime.folder.exists():
            self.exports[runtime] = {"export_s": seconds, "export_peak_rss_mb": peak}
        return None

    def round(self) -> None:
        """Each runtime's turn."""
        for runtime in list(self.rounds):
            found: Figures = {}
            try:
                for part in [*runtime.parts, *(runtime.pictures if self.args.image else [])]:
                    printed, _, peak = self.apart(runtime, part)
                    found |= {**json.loads(printed), PEAKS[part]: peak}
            except Failed as error:
                print(f"{runtime.name} {runtime.precision} is left out: {error}", flush=True)
                del self.rounds[runtime]
                continue
            self.rounds[runtime].append(found)
            print(f"{runtime.name} {runtime.precision}: {found['step_s']:.3g} s/step", flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """Medians for each runtime."""
        return [
            {"runtime": runtime.name, "precision": runtime.precision, **self.exports.get(runtime, {})}
            | {key: statistics.median(each[key] for each in found) for key in found[0]}
            for runtime, found in self.rounds.items()
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
    "image_s": "picture s",
    "image_peak_rss_mb": "picture MB",
    "fast_s": "--fast s",
    "fast_peak_rss_mb": "--fast MB",
}
RATIOS = ("step_s", "peak_rss_mb", "decode_s", "image_s", "fast_s")


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table; in brackets what is times the first row's."""
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


def differing(rows: list[dict[str, Any]]) -> list[str]:
    """Which float32 runtimes did not compute what the first of them did."""
    exact = [row for row in rows if row["precision"] == "fp32"]
    return [
        f"{row['runtime']}'s {part} gives something else than {exact[0]['runtime']}'s"
        for row in exact[1:]
        for part in KEYS
        if abs(row[f"{part}_checksum"] / exact[0][f"{part}_checksum"] - 1) > 1e-3
    ]


def prepared(args: argparse.Namespace) -> None:
    """Makes the checkpoint, unless it is there."""
    config = args.work / "checkpoint" / "unet" / "config.json"
    if not config.exists():
        script = Path(__file__).with_name("random_checkpoint.py")
        dtype = "float16" if args.size == "sdxl" else "float32"
        measured([str(script), str(args.work / "checkpoint"), "--size", args.size, "--dtype", dtype])
    if json.loads(config.read_text(encoding="utf-8")) != random_checkpoint.SIZES[args.size]["unet"]:
        raise SystemExit(f"{args.work} has a checkpoint of another size than {args.size}; give another directory")


def main() -> None:
    names = list(dict.fromkeys(runtime.name for runtime in RUNTIMES))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoint and what is made of it are kept")
    parser.add_argument("--size", choices=sorted(random_checkpoint.SIZES), default="sd15")
    parser.add_argument("--only", help=f"which of {','.join(names)}")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each runtime")
    parser.add_argument("--steps", type=int, default=5, help="timed runs in each process, after one that is not")
    parser.add_argument("--image", action="store_true", help="a whole picture of 20 steps too, and sdonnx' --fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    runtimes = [kind(args.work, args.size) for kind in RUNTIMES]
    if args.worker is not None:
        name, precision, what = args.worker
        (runtime,) = (each for each in runtimes if (each.name, each.precision) == (name, precision))
        work(runtime, what, args.steps)
        return
    wanted = names if args.only is None else args.only.split(",")
    if not set(wanted) <= set(names):
        parser.error(f"--only takes {', '.join(names)}, with commas")
    prepared(args)
    run = Run(args)
    run.prepare([runtime for runtime in runtimes if runtime.name in wanted])
    for _ in range(args.repeats):
        run.round()
    rows = run.rows()
    if not rows:
        raise SystemExit("nothing was measured")
    pixels = runtimes[0].pixels
    print(f"\n{cpu_name()}, {os.cpu_count()} CPUs, {instruction_set()}; {pixels}x{pixels}, a step has 2 rows of text\n")
    print("\n".join([table(rows), *differing(rows)]))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
