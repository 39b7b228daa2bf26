"""Measure memory and time of an image under several memory limits, and compare them with the prediction.

    python bench/memory.py PACKAGE… --size 512x512 --memory min --memory 600MB --memory auto --json FILE --plot FILE.svg
    python bench/memory.py PACKAGE… --device openvino --compute bf16
    python bench/memory.py PACKAGE… --leaks

Each figure is a median over processes that do nothing else. The peak is of the resident memory (VmHWM); its anonymous
and file-backed parts are sampled every 2 ms. Linux only. ``--plot`` draws the time of a step against the peak.
``--leaks`` prints instead the resident memory after the third and the last of a hundred images made in one process, and
of fifty times opening a package for one image.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdonnx_runtime.execution.process_memory import peak_memory

import sdonnx


def run_worker(package: Path, options: Mapping[str, Any], steps: int, fields: Mapping[str, Any]) -> None:
    """Generate an image; print measured and predicted figures."""
    start = time.perf_counter()
    request: dict[str, Any] = {"num_inference_steps": steps, "seed": 1, "sampler": "euler", **fields}
    prompt = request.pop("prompt", "a photograph of a cat")
    with sdonnx.load(package, **options) as pipe:
        plan = pipe.plan(prompt, always=True, **request)
        result = pipe.generate(prompt, **request)
    peak = peak_memory() / 1e6
    figures = {
        "image_s": time.perf_counter() - start,
        "step_s": statistics.median(result.timings.steps[1:] or result.timings.steps),
        "decode_s": result.timings.run["vae_decoder"],
        "predicted_mb": float("nan") if plan is None else plan.peak / 1e6,
        "peak_rss_mb": peak,
        "ratio": float("nan") if plan is None else plan.peak / 1e6 / peak,
    }
    print(json.dumps(figures))


def resident_mb() -> float:
    """Return the resident memory now, 10**6 bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) * 1024 / 1e6


def measure_leaks(package: Path, memory: str, steps: int, size: Mapping[str, int]) -> None:
    """Generate many images; print the resident memory after the third and the last."""
    request: dict[str, Any] = {"num_inference_steps": steps, **size}
    by_image, by_opening = [], []
    with sdonnx.load(package, memory=memory) as pipe:
        for seed in range(100):
            pipe.generate("a photograph of a cat", seed=seed, **request)
            by_image.append(resident_mb())
    for seed in range(50):
        with sdonnx.load(package, memory=memory) as pipe:
            pipe.generate("a photograph of a cat", seed=seed, **request)
        by_opening.append(resident_mb())
    names = ("third_image_mb", "last_image_mb", "third_opening_mb", "last_opening_mb")
    values = by_image[2], by_image[-1], by_opening[2], by_opening[-1]
    print(json.dumps(dict(zip(names, values, strict=True))))


def watch_memory(command: list[str]) -> dict[str, float]:
    """Run a worker; return what it prints, with the parts of its resident memory at the peak."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    status, peak = Path(f"/proc/{process.pid}/status"), {"VmRSS": 0, "RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        lines = status.read_text().splitlines()
        current = {key: int(line.split()[1]) for line in lines for key in peak if line.startswith(f"{key}:")}
        peak = max(peak, current, key=lambda each: each.get("VmRSS", 0))
        time.sleep(0.002)
    printed, _ = process.communicate()
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed")
    parts = {"anonymous_mb": peak["RssAnon"] * 1024 / 1e6, "file_mb": peak["RssFile"] * 1024 / 1e6}
    return {**json.loads(printed), **parts}


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw the time of a step against the peak memory, a line for each package, as SVG."""
    width, height, left, bottom = 640, 360, 60, 40
    max_memory, max_seconds = (max(row[key] for row in rows) * 1.05 for key in ("peak_rss_mb", "step_s"))

    def to_pixels(memory: float, seconds: float) -> tuple[float, float]:
        x, y = (width - left - 20) * memory / max_memory, (height - bottom - 20) * seconds / max_seconds
        return round(left + x, 1), round(height - bottom - y, 1)

    def text(x: float, y: float, label: str, anchor: str = "middle") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{label}</text>'

    (x0, y0), (x1, y1) = to_pixels(0, 0), to_pixels(max_memory, max_seconds)
    parts = [f'<path d="M{x0} {y1}V{y0}H{x1}" stroke="gray" fill="none"/>']
    parts += [text(x1, y0 + 34, "peak MB", "end"), text(x0, y1 - 6, "s/step")]
    for part in (0.25, 0.5, 0.75, 1):
        parts.append(text(to_pixels(max_memory * part, 0)[0], y0 + 16, f"{max_memory * part:.0f}"))
        parts.append(text(x0 - 6, to_pixels(0, max_seconds * part)[1] + 4, f"{max_seconds * part:.1f}", "end"))
    for index, package in enumerate(dict.fromkeys(row["package"] for row in rows)):
        points = sorted((row["peak_rss_mb"], row["step_s"]) for row in rows if row["package"] == package)
        color = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")[index % 4]
        line = " ".join(f"{x},{y}" for x, y in (to_pixels(*point) for point in points))
        parts.append(f'<polyline points="{line}" stroke="{color}" fill="none"/>')
        parts += [
            f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in (to_pixels(*point) for point in points)
        ]
        parts.append(f'<g fill="{color}">{text(x1, y1 + 16 * (index + 1), package, "end")}</g>')
    style = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, nargs="+", metavar="PACKAGE")
    parser.add_argument("--size", help="WxH; default: the model's own")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="append", help="as for sdonnx run; default: auto and min")
    parser.add_argument(
        "--fields", default="{}", help='more fields of the request as JSON: {"guidance_scale": 1, "prompt": "a cat"}'
    )
    parser.add_argument("--device", default="cpu", help="as for sdonnx run")
    parser.add_argument("--compute", default="auto", help="as for sdonnx run")
    parser.add_argument("--leaks", action="store_true", help="generate many images in one process")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = {} if args.size is None else dict(zip(("width", "height"), map(int, args.size.split("x")), strict=True))
    if args.worker:
        if args.leaks:
            measure_leaks(args.packages[0], args.memory[0], args.steps, size)
        else:
            opening = {"memory": args.memory[0], "device": args.device, "compute": args.compute}
            run_worker(args.packages[0], opening, args.steps, {**size, **json.loads(args.fields)})
        return
    options = ["--steps", str(args.steps), *(["--size", args.size] if args.size is not None else [])]
    options += ["--device", args.device, "--compute", args.compute, "--fields", args.fields]
    options += ["--leaks"] if args.leaks else []
    rows = []
    for package in args.packages:
        rounds = {memory: [] for memory in args.memory or ["auto", "min"]}
        for _ in range(1 if args.leaks else args.repeats):
            for memory, figures in rounds.items():
                figures.append(watch_memory([__file__, str(package), *options, "--worker", "--memory", memory]))
        for memory, figures in rounds.items():
            medians = {key: statistics.median(each[key] for each in figures) for key in figures[0]}
            rows.append({"package": package.name, "memory": memory, **medians})
    keys = list(rows[0])
    print("| " + " | ".join(keys) + " |\n" + "| --- " * len(keys) + "|")
    for row in rows:
        print("| " + " | ".join(value if isinstance(value, str) else f"{value:.3g}" for value in row.values()) + " |")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2))
    if args.plot is not None:
        args.plot.write_text(plot(rows))


if __name__ == "__main__":
    sys.exit(main())
