"""Export and U-Net step at Stable Diffusion 1.5's size, beside optimum, ONNX Runtime, OpenVINO and torch.

    pip install -e ".[cpu,peers]"
    python bench/fullsize.py --work /tmp/fullsize --json fullsize.json

The checkpoint has random weights (4.3 GB; 16 GB of disk in all). Every figure comes from a process of its own,
runtimes take turns, and the table gives medians. A peer that is not installed is left out with a line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PIXELS, ROWS = 512, 2  # classifier-free guidance: the same latents with two texts
STATE = np.random.default_rng(0).standard_normal((1, 4, PIXELS // 8, PIXELS // 8), np.float32)
FEEDS = {
    "sample": np.repeat(STATE, ROWS, axis=0),
    "timestep": np.array(500, np.float32),
    "encoder_hidden_states": np.random.default_rng(1).standard_normal((ROWS, 77, 768), np.float32),
}

Step = Callable[[], Any]


def open_sdonnx(work: Path) -> Step:
    from sdonnx_runtime.session import Session

    session = Session(work / "sdonnx" / "unet" / "model.onnx", device="cpu")
    return lambda: session.run({**FEEDS, "sample": STATE})["out_sample"]


def open_optimum(work: Path) -> Step:
    """The export that optimum-onnx wrote, in ONNX Runtime as optimum opens it."""
    import onnxruntime

    path = work / "optimum" / "unet" / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    types = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
    feeds = {item.name: FEEDS[item.name].astype(types[item.type]) for item in session.get_inputs()}
    return lambda: session.run(None, feeds)[0]


def open_openvino(work: Path) -> Step:
    """The same export in OpenVINO, float32 and static shapes, where it is fastest."""
    import openvino

    core = openvino.Core()
    model = core.read_model(work / "optimum" / "unet" / "model.onnx")
    model.reshape({name: list(value.shape) for name, value in FEEDS.items()})
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(model, "CPU", options)
    del model
    return lambda: compiled(FEEDS)[0]


def open_torch(work: Path) -> Step:
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(work / "checkpoint" / "unet").eval()
    feeds = {name: torch.from_numpy(value) for name, value in FEEDS.items()}

    def step() -> Any:
        with torch.inference_mode():
            return unet(**feeds).sample.numpy()

    return step


RUNTIMES: dict[str, tuple[str, Callable[[Path], Step]]] = {
    "sdonnx": ("onnxruntime", open_sdonnx),
    "openvino": ("openvino", open_openvino),
    "optimum": ("optimum.onnxruntime", open_optimum),
    "torch": ("torch", open_torch),
}


def worker(name: str, work: Path, steps: int) -> None:
    """One runtime in this process: prints its figures as JSON."""
    before = time.perf_counter()
    step = RUNTIMES[name][1](work)
    loaded = time.perf_counter()
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        output = step()
        seconds.append(time.perf_counter() - start)
    figures = {
        "load_s": loaded - before,
        "first_step_s": seconds[0],
        "step_s": statistics.median(seconds[1:]),
        "checksum": float(np.abs(np.asarray(output)).mean()),
    }
    print(json.dumps(figures))


def measured(command: list[str]) -> dict[str, Any]:
    """Runs a command: seconds, its peak RSS in MB as the system accounts for it, and what it printed."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        for stream in (stdout, stderr):
            stream.seek(0)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{stderr.read()[-2000:]}")
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"seconds": seconds, "peak_rss_mb": peak / 1e6, "stdout": stdout.read()}


def exports(work: Path, checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Export time and memory of both exporters; what is there already is not made again."""
    commands = {
        "sdonnx": ["-m", "sdonnx", "export", str(checkpoint), "-o", str(work / "sdonnx")],
        "optimum": [
            *["-m", "optimum.commands.optimum_cli", "export", "onnx", "--task", "text-to-image"],
            *["--model", str(checkpoint), str(work / "optimum")],
        ],
    }
    figures = {}
    for name, command in commands.items():
        if not installed(name) or (work / name).exists():
            print(f"{name}: no export figure, {'it is there already' if installed(name) else 'not installed'}")
            continue
        found = measured([sys.executable, *command])
        figures[name] = {"export_s": found["seconds"], "export_peak_rss_mb": found["peak_rss_mb"]}
    return figures


def installed(name: str) -> bool:
    probe = f"import {RUNTIMES[name][0]}"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0


def steps(work: Path, repeats: int, count: int) -> dict[str, dict[str, float]]:
    """Medians over ``repeats`` processes of each runtime, taking turns."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in RUNTIMES if installed(name)}
    for _ in range(repeats):
        for name, found in runs.items():
            command = [sys.executable, __file__, "--worker", name, "--work", str(work), "--steps", str(count)]
            result = measured(command)
            found.append({**json.loads(result["stdout"]), "peak_rss_mb": result["peak_rss_mb"]})
            print(f"{name}: {found[-1]['step_s']:.2f} s/step", flush=True)
    return {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """A markdown table with ratios to sdonnx."""
    base = rows["sdonnx"]
    lines = [
        "| runtime | export s | export peak MB | load s | CFG step s | of sdonnx | peak MB | of sdonnx |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        cells = [f"{row[key]:.0f}" if key in row else "" for key in ("export_s", "export_peak_rss_mb")]
        cells += [f"{row['load_s']:.1f}", f"{row['step_s']:.2f}", f"{row['step_s'] / base['step_s']:.2f}"]
        cells += [f"{row['peak_rss_mb']:.0f}", f"{row['peak_rss_mb'] / base['peak_rss_mb']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoint and exports are made and kept")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each runtime")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in each process, after one that is not")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--worker", choices=list(RUNTIMES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(args.worker, args.work, args.steps)
        return
    checkpoint = args.work / "checkpoint"
    if not checkpoint.exists():
        make = [sys.executable, str(Path(__file__).with_name("random_checkpoint.py"))]
        measured([*make, str(checkpoint), "--size", "sd15"])
    exported = exports(args.work, checkpoint)
    rows = steps(args.work, args.repeats, args.steps)
    rows = {name: {**exported.get(name, {}), **row} for name, row in rows.items()}
    print(f"\n{os.cpu_count()} CPUs, {PIXELS}x{PIXELS}, {ROWS} rows, float32\n\n{table(rows)}")
    if args.json is not None:
        listed = [{"runtime": name, "precision": "fp32", **row} for name, row in rows.items()]
        args.json.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
