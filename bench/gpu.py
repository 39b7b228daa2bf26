"""Check and measure a GPU: its kernels, where nodes run, and U-Net steps and VAE decodes compared with diffusers.

    pip install -e ".[cuda,export,bench]"
    python bench/gpu.py --json gpu.json              # CUDA: 7 minutes at most, 12 GB of disk
    python bench/gpu.py --device directml            # with the extra directml instead of cuda
    python bench/gpu.py --device webgpu              # with the extra webgpu; of every vendor
    python bench/gpu.py --device cpu --size tiny     # that the script works

Models have random weights, which are drawn on the spot: nothing is downloaded. What matters most comes first, and every
result is printed, and written to the JSON file, at once: a run that is stopped is still a result. A step that can't run
here says why. Each has a process of its own, so that its peak of GPU memory is its own and a crash ends it alone.
Milliseconds are medians; sdonnx' include the copies of inputs and outputs, diffusers' those of outputs. An error is the
norm of the difference over the norm of what torch computes in float32; of SDXL, what diffusers computes in float16.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_steps
from gpu_steps import Row, Setting
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.execution.devices.table import DEVICES, DeviceName
from sdonnx_runtime.packages.families import TARGETS


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process of the benchmark."""

    group: str
    """What `--only` names."""
    name: str
    run: Callable[..., Iterator[Row]]
    arguments: Mapping[str, Any] = field(default_factory=dict)


def list_steps(device: str, target: str) -> Iterator[Step]:
    """Yield the steps that apply to a device, the most useful first."""
    yield Step(group="device", name="", run=gpu_steps.describe)
    yield Step(group="operators", name="", run=gpu_steps.compare_layers)
    yield Step(group="nodes", name="", run=gpu_steps.count_nodes)
    yield _torch("unet", "float32", reference=True)
    yield _graph("unet", target)
    yield _torch("unet", "eager")
    yield _torch("unet", "channels_last", variant="channels_last")
    if target != "generic":
        yield _graph("unet", "generic")
    if device == "cuda":
        yield _graph("unet", "generic", use_tf32="0")
    yield _torch("vae", "float32", reference=True)
    yield _graph("vae", target)
    yield _torch("vae", "eager")
    yield _torch("sdxl", "eager")
    yield _graph("sdxl", target)
    yield _torch("sdxl-vae", "eager")
    yield _graph("sdxl-vae", target)
    for option, values in OPTIONS.get(device, {}).items():
        for value in values:
            yield _graph("unet", target, group="options", **{option: value})
    if device == "cuda":
        yield _graph("unet", "generic", group="options", prefer_nhwc="1")
    yield _torch("unet", "compile", group="compile", variant="compile")


MODELS = {
    "unet": ("sd", "unet"),
    "vae": ("sd", "vae_decoder"),
    "sdxl": ("sdxl", "unet"),
    "sdxl-vae": ("sdxl", "vae_decoder"),
}
"""What is measured: model and component."""

OPTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "cuda": {"fuse_conv_bias": ("1",), "sdpa_kernel": ("1", "2", "8")},  # flash, memory-efficient, cuDNN
    "webgpu": {"preferredLayout": ("NCHW", "NHWC")},
}
"""Options of execution providers, each tried alone with the device's own target."""

RATIOS = (
    ("unet", "unet", "eager", 0.85),
    ("unet", "compile", "compile", 1.05),
    ("vae", "vae", "eager", 0.9),
    ("sdxl", "sdxl", "eager", 0.8),
    ("sdxl-vae", "sdxl-vae", "eager", 0.9),
)
"""sdonnx' group, diffusers' group and name, and what the quotient of their times is to be at most."""

SIZES: Mapping[str, Mapping[str, Any]] = {
    "full": {"models": {"sd": "sd15", "sdxl": "sdxl"}, "side": 64, "runs": 20},
    "tiny": {"models": {"sd": "tiny", "sdxl": "tiny-sdxl"}, "side": 8, "runs": 2},
}


def _graph(what: str, target: str, *, group: str | None = None, **options: str) -> Step:
    model, component = MODELS[what]
    chosen = "".join(f", {name}={value}" for name, value in options.items())
    arguments = {"model": model, "component": component, "target": target, "options": options}
    name = f"sdonnx {target}{chosen}"
    return Step(group=what if group is None else group, name=name, run=gpu_steps.run_graph, arguments=arguments)


def _torch(what: str, name: str, *, group: str | None = None, **more: Any) -> Step:
    model, component = MODELS[what]
    arguments = {"model": model, "component": component, **more}
    name = f"diffusers {name}"
    return Step(group=what if group is None else group, name=name, run=gpu_steps.run_torch, arguments=arguments)


def run_step(step: Step, setting: Setting, deadline: float) -> Iterator[Row]:
    """Run a step in a new process, which ends at the deadline at the latest; yield its rows as they come."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=gpu_steps.work, args=(sender, step.run, setting, step.arguments))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(deadline - time.monotonic(), 0)):
            yield receiver.recv()
        yield {"left_out": "the time was over"}
    except EOFError:
        process.join()
        if process.exitcode != 0:
            yield {"failed": f"its process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


class Report:
    """The results so far: printed, and written to a file, one by one."""

    def __init__(self, setting: Setting, file: Path | None) -> None:
        self._setting, self._file, self._start = setting, file, time.monotonic()
        self._rows: list[Row] = []

    def add(self, step: Step, row: Row) -> None:
        seconds = time.monotonic() - self._start
        self._rows.append({"group": step.group, "name": step.name, "at_s": round(seconds, 1), **row})
        title = " ".join(filter(None, (step.group, step.name, row.get("what"))))
        print(f"{seconds:4.0f} s  {title}: {format_row(row)}", flush=True)
        for ratio in self._ratios(step, row):
            print(f"        {ratio}", flush=True)
        if self._file is not None:
            shown = {name: getattr(self._setting, name) for name in ("device", "target", "precision", "models")}
            self._file.write_text(json.dumps({**shown, "results": self._rows}, indent=2) + "\n", encoding="utf-8")

    def _ratios(self, step: Step, row: Row) -> Iterator[str]:
        """Yield how sdonnx compares with diffusers, once both are known."""
        own = f"sdonnx {self._setting.target}"
        found = {(each["group"], each["name"]): each for each in self._rows if "ms" in each}
        for group, peer_group, peer, aim in RATIOS:
            pair = (group, own), (peer_group, f"diffusers {peer}")
            if (step.group, step.name) not in pair or "ms" not in row or not found.keys() >= set(pair):
                continue
            (ours, theirs), name = (found[key] for key in pair), f"{group}: {own} / diffusers {peer}"
            known = ours.get("vram_mb") and theirs.get("vram_mb")
            memory = f", memory {ours['vram_mb'] / theirs['vram_mb']:.2f}" if known else ""
            yield f"{name}: time {ours['ms'] / theirs['ms']:.2f} (aim {aim}){memory}"


def format_row(row: Row) -> str:
    """Format a row in one line."""
    if "failed" in row:
        return f"FAILED: {row['failed']}"
    if "left_out" in row:
        return f"left out: {row['left_out']}"
    parts = [row["text"]] if "text" in row else []
    parts += [f"{row['ms']:.3g} ms (fastest {row['fastest_ms']:.3g})"] if "ms" in row else []
    parts += [f"opened in {row['open_s']:.1f} s"] if "open_s" in row else []
    parts += [f"first run {row['first_s']:.1f} s"] if "first_s" in row else []
    parts += [f"{row['vram_mb']:,.0f} MB of GPU memory"] if row.get("vram_mb") is not None else []
    parts += [f"error {row['error']:.1e}"] if "error" in row else []
    return ", ".join(parts) + ("" if row.get("ok", True) else "  <-- WRONG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="as of sdonnx run, such as cuda, webgpu or cuda:1")
    parser.add_argument("--target", choices=TARGETS, help="what the graphs are made for; default: the device's own")
    parser.add_argument("--precision", choices=("fp16", "fp32"), default="fp16", help="of graphs made for the device")
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--only", help="some of device, operators, nodes, unet, vae, sdxl, sdxl-vae, options")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="after which steps are stopped; default: %(default)g"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep graphs here; default: a temporary directory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result to this file at once")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    try:
        device = DeviceName.parse(args.device).base
    except RequestError as error:
        parser.error(str(error))
    target = DEVICES[device].targets[0] if args.target is None else args.target
    steps = list(list_steps(device, target))
    groups = {step.group for step in steps}
    selected = groups if args.only is None else set(args.only.split(","))
    if not selected <= groups:
        parser.error(f"--only: give some of {', '.join(dict.fromkeys(step.group for step in steps))}, with commas")
    with tempfile.TemporaryDirectory(prefix="sdonnx-gpu-") as temporary:
        work = Path(temporary) if args.work is None else args.work
        setting = Setting(device=args.device, target=target, precision=args.precision, work=work, **SIZES[args.size])
        report = Report(setting, args.json)
        try:
            for step in (step for step in steps if step.group in selected):
                for row in run_step(step, setting, deadline):
                    report.add(step, row)
        except KeyboardInterrupt:
            raise SystemExit("stopped; the results so far stand") from None


if __name__ == "__main__":
    main()
