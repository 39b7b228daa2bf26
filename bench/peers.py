"""Compare sdonnx with other runtimes on one random checkpoint: a U-Net step, a VAE decode and images.

    pip install -e ".[cpu,peers]"
    python bench/peers.py --work DIR --json FILE                  # Stable Diffusion 1.5's size, 30 GB of disk
    python bench/peers.py --work DIR --only sdonnx,openvino --image
    python bench/peers.py --work DIR --size sdxl --only sdonnx,openvino       # SDXL's, of float16, 30 GB of disk
    python bench/peers.py --work DIR --size turbo                 # one step and a tiny VAE: SD-Turbo's, TAESD's, 18 GB
    python bench/peers.py --work DIR --size tiny --repeats 1      # check that everything works, in three minutes

Some rows hold the runtimes to float32, where their outputs can be compared; the others compute in what each runtime
chooses unless it is asked: "default", which is bfloat16 for OpenVINO on CPUs that have it.

Runtimes take turns, every figure comes from its own process, and the table gives medians. A runtime that is not
installed, or fails, is left out with a message. Converted models are kept in DIR and reused; so are the graphs that
sdonnx compiles with OpenVINO, which of several rounds only the first waits for. A cold start is a process that makes
one image, from its first instruction to its end.
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

from checkpoint_sizes import SIZES
from runtime_base import KEYS, Runtime
from runtimes import RUNTIMES
from sdonnx_runtime.execution.cpu import cpu_features

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


class Benchmark:
    """One run of this script."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rounds: dict[Runtime, list[Figures]] = {}
        self.exports: dict[Runtime, Figures] = {}

    def run_in_subprocess(self, runtime: Runtime, task: str) -> tuple[str, float, float]:
        """Run a task of `peers_worker` in a new process; returns what `run_and_measure` does."""
        worker, args = Path(__file__).with_name("peers_worker.py"), self.args
        which = [runtime.name, runtime.precision, runtime.compute, task]
        return run_and_measure([str(worker), str(args.work), args.size, str(args.steps), *which])

    def prepare(self, runtimes: list[Runtime]) -> None:
        """Convert the checkpoint for every runtime; leave out runtimes that fail."""
        for runtime in runtimes:
            reason = runtime.missing()
            if reason is None and not runtime.folder.exists():
                reason = self.convert(runtime)
            if reason is None:
                self.rounds[runtime] = []
            else:
                print(f"{runtime} is left out: {reason}", flush=True)

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
                for task in runtime.tasks(image=self.args.image):
                    printed, seconds, peak = self.run_in_subprocess(runtime, task)
                    figures |= {**json.loads(printed), PEAKS[task]: peak}
                    figures |= {"cold_s": seconds} if task == "cold" else {}
            except RunFailed as error:
                print(f"{runtime} is left out: {error}", flush=True)
                del self.rounds[runtime]
                continue
            self.rounds[runtime].append(figures)
            key, unit = ("image_s", "image") if runtime.has_few_steps else ("step_s", "step")
            print(f"{runtime}: {figures[key]:.3g} s/{unit}", flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """Return the medians for each runtime."""
        return [
            {"runtime": runtime.name, "precision": runtime.precision, "compute": runtime.compute}
            | self.exports.get(runtime, {})
            | {key: statistics.median(each[key] for each in figures) for key in figures[0]}
            for runtime, figures in self.rounds.items()
        ]


PEAKS = {
    "unet": "peak_rss_mb",
    "vae_decoder": "decode_peak_rss_mb",
    "image": "image_peak_rss_mb",
    "fast": "fast_peak_rss_mb",
    "open": "image_peak_rss_mb",
    "cold": "cold_peak_rss_mb",
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
    "first_image_s": "first image s",
    "image_s": "image s",
    "image_peak_rss_mb": "image MB",
    "fast_s": "--fast s",
    "fast_peak_rss_mb": "--fast MB",
    "cold_s": "cold start s",
    "cold_peak_rss_mb": "cold start MB",
}
RATIOS = ("step_s", "peak_rss_mb", "decode_s", "image_s", "image_peak_rss_mb", "fast_s", "cold_s")


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format a markdown table; ratios to the first row are in brackets."""
    columns = {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)}
    lines = [f"| runtime | precision | computes in | {' | '.join(columns.values())} |"]
    lines += [f"| --- {'| --- ' * (len(columns) + 2)}|"]
    for row in rows:
        cells = [row["runtime"], row["precision"], row["compute"]]
        for key in columns:
            value, base = row.get(key), rows[0].get("image_s" if key == "fast_s" else key)
            cell = "" if value is None else f"{value:,.0f}" if key.endswith("mb") else f"{value:.3g}"
            cells.append(f"{cell} ({value / base:.2f})" if key in RATIOS and value and base else cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def find_mismatches(rows: list[dict[str, Any]]) -> list[str]:
    """Report the float32 runtimes whose outputs differ from the first one's; those of whole images are not compared."""
    exact = [row for row in rows if (row["precision"], row["compute"]) == ("fp32", "f32")]
    return [
        f"{row['runtime']}'s {part} output differs from {exact[0]['runtime']}'s"
        for row in exact[1:]
        for part in KEYS
        if f"{part}_checksum" in row and abs(row[f"{part}_checksum"] / exact[0][f"{part}_checksum"] - 1) > 1e-3
    ]


def describe_cpu() -> str:
    """Return the CPU's name, its number of CPUs, and its instructions for int8 and bfloat16."""
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "bf16": "Arm", "feat_bf16": "Arm"}
    bf16 = next((text for name, text in names.items() if name in cpu_features()), None)
    has = "no bfloat16 known" if bf16 is None else f"bfloat16 ({bf16})"
    return f"{cpu_name()}, {os.cpu_count()} CPUs, {instruction_set()}, {has}"


def write_checkpoint(args: argparse.Namespace) -> None:
    """Write the checkpoint unless it exists."""
    checkpoint = args.work / "checkpoint"
    if not (checkpoint / "model_index.json").exists():
        script = Path(__file__).with_name("random_checkpoint.py")
        dtype = "float32" if args.size in ("sd15", "tiny") else "float16"
        run_and_measure([str(script), str(checkpoint), "--size", args.size, "--dtype", dtype])
    configs = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in checkpoint.glob("*/config.json")
    }
    if configs != SIZES[args.size]:
        raise SystemExit(f"{args.work} has a checkpoint of another size; give another --work directory for {args.size}")


def main() -> None:
    names = list(dict.fromkeys(runtime.name for runtime in RUNTIMES))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="directory for the checkpoint and the converted models"
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="sd15")
    parser.add_argument("--only", help=f"some of {','.join(names)}")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of all runtimes")
    parser.add_argument("--steps", type=int, default=5, help="timed runs in each process, after an untimed one")
    parser.add_argument("--image", action="store_true", help="also an image of 20 steps, and sdonnx' --fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    runtimes = [kind(args.work, args.size) for kind in RUNTIMES]
    selected = names if args.only is None else args.only.split(",")
    if not set(selected) <= set(names):
        parser.error(f"--only: give some of {', '.join(names)}, with commas")
    os.environ["XDG_CACHE_HOME"] = str(args.work.resolve() / "cache")  # of sdonnx' compiled graphs
    write_checkpoint(args)
    benchmark = Benchmark(args)
    benchmark.prepare([runtime for runtime in runtimes if runtime.name in selected])
    for _ in range(args.repeats):
        benchmark.round()
    rows = benchmark.rows()
    if not rows:
        raise SystemExit("every runtime was left out")
    pixels = runtimes[0].pixels
    what = "1 step without guidance, tiny VAE" if runtimes[0].has_few_steps else "U-Net batch 2"
    print(f"\n{describe_cpu()}; {pixels}x{pixels}, {what}\n")
    print("\n".join([format_table(rows), *find_mismatches(rows)]))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
