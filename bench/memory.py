"""What a whole picture takes of memory and time in several budgets, beside what was predicted.

    python bench/memory.py PACKAGE… --size 512x512 --memory min --memory 600MB --memory auto --json FILE --plot FILE.svg
    python bench/memory.py PACKAGE… --leaks

Each figure is a median over processes that do nothing else. The peak is the most resident memory (VmHWM), with its
anonymous and its file-backed part as they were when it was largest, which is looked at every 2 ms; Linux.
``--plot`` draws the time of a step against the peak. ``--leaks`` says instead how much is resident after the third and
the last of a hundred pictures made in one process, and of fifty times opening a package for a picture.
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


def work(package: Path, memory: str, steps: int, fields: Mapping[str, Any]) -> None:
    """Makes a picture; prints what it took, and was to take."""
    start = time.perf_counter()
    asked: dict[str, Any] = {"num_inference_steps": steps, "seed": 1, "sampler": "euler", **fields}
    prompt = asked.pop("prompt", "a photograph of a cat")
    with sdonnx.load(package, memory=memory) as pipe:
        plan = pipe.plan(prompt, whole=True, **asked)
        result = pipe.generate(prompt, **asked)
    peak = peak_memory() / 1e6
    found = {
        "picture_s": time.perf_counter() - start,
        "step_s": statistics.median(result.timings.steps[1:] or result.timings.steps),
        "decode_s": result.timings.run["vae_decoder"],
        "predicted_mb": float("nan") if plan is None else plan.peak / 1e6,
        "peak_rss_mb": peak,
        "ratio": float("nan") if plan is None else plan.peak / 1e6 / peak,
    }
    print(json.dumps(found))


def resident() -> float:
    """What is now, MB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) * 1024 / 1e6


def leaks(package: Path, memory: str, steps: int, size: Mapping[str, int]) -> None:
    """Makes many pictures; prints how much was resident after the third and the last."""
    asked: dict[str, Any] = {"num_inference_steps": steps, **size}
    made, opened = [], []
    with sdonnx.load(package, memory=memory) as pipe:
        for seed in range(100):
            pipe.generate("a photograph of a cat", seed=seed, **asked)
            made.append(resident())
    for seed in range(50):
        with sdonnx.load(package, memory=memory) as pipe:
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


def drawn(rows: Sequence[Mapping[str, Any]]) -> str:
    """The time of a step against the peak, a line for each package, as SVG."""
    width, height, left, bottom = 640, 360, 60, 40
    most, longest = (max(row[key] for row in rows) * 1.05 for key in ("peak_rss_mb", "step_s"))

    def at(memory: float, seconds: float) -> tuple[float, float]:
        across, up = (width - left - 20) * memory / most, (height - bottom - 20) * seconds / longest
        return round(left + across, 1), round(height - bottom - up, 1)

    def text(x: float, y: float, said: str, anchor: str = "middle") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{said}</text>'

    (x0, y0), (x1, y1) = at(0, 0), at(most, longest)
    parts = [f'<path d="M{x0} {y1}V{y0}H{x1}" stroke="gray" fill="none"/>']
    parts += [text(x1, y0 + 34, "MB at most", "end"), text(x0, y1 - 6, "seconds a step")]
    for part in (0.25, 0.5, 0.75, 1):
        parts.append(text(at(most * part, 0)[0], y0 + 16, f"{most * part:.0f}"))
        parts.append(text(x0 - 6, at(0, longest * part)[1] + 4, f"{longest * part:.1f}", "end"))
    for index, package in enumerate(dict.fromkeys(row["package"] for row in rows)):
        mine = sorted((row["peak_rss_mb"], row["step_s"]) for row in rows if row["package"] == package)
        color = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")[index % 4]
        line = " ".join(f"{x},{y}" for x, y in (at(*point) for point in mine))
        parts.append(f'<polyline points="{line}" stroke="{color}" fill="none"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in (at(*point) for point in mine)]
        parts.append(f'<g fill="{color}">{text(x1, y1 + 16 * (index + 1), package, "end")}</g>')
    style = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, nargs="+", metavar="PACKAGE")
    parser.add_argument("--size", help="WxH. Default: the model's own.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="append", help="as for sdonnx run. Default: auto and min.")
    parser.add_argument(
        "--fields", default="{}", help='more of a request\'s, as JSON: {"guidance_scale": 1, "prompt": "a cat"}'
    )
    parser.add_argument("--leaks", action="store_true", help="make many pictures in one process")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = {} if args.size is None else dict(zip(("width", "height"), map(int, args.size.split("x")), strict=True))
    if args.worker:
        if args.leaks:
            leaks(args.packages[0], args.memory[0], args.steps, size)
        else:
            work(args.packages[0], args.memory[0], args.steps, {**size, **json.loads(args.fields)})
        return
    options = ["--steps", str(args.steps), *(["--size", args.size] if args.size is not None else [])]
    options += ["--fields", args.fields, *(["--leaks"] if args.leaks else [])]
    rows = []
    for package in args.packages:
        rounds = {memory: [] for memory in args.memory or ["auto", "min"]}
        for _ in range(1 if args.leaks else args.repeats):
            for memory, found in rounds.items():
                found.append(watched([__file__, str(package), *options, "--worker", "--memory", memory]))
        for memory, found in rounds.items():
            medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
            rows.append({"package": package.name, "memory": memory, **medians})
    keys = list(rows[0])
    print("| " + " | ".join(keys) + " |\n" + "| --- " * len(keys) + "|")
    for row in rows:
        print("| " + " | ".join(value if isinstance(value, str) else f"{value:.3g}" for value in row.values()) + " |")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2))
    if args.plot is not None:
        args.plot.write_text(drawn(rows))


if __name__ == "__main__":
    sys.exit(main())
