"""Measure an upscale from 512 to 2048 pixels a side: RRDBNet (Real-ESRGAN x4plus) and SRVGGNetCompact, beside torch.

    pip install --no-deps spandrel && pip install einops
    python bench/upscale.py --work DIR --json FILE
    python bench/upscale.py --work DIR --side 128 --only compact

Weights are random in the published sizes. Each figure comes from its own process; torch runs spandrel's network on the
whole image, sdonnx what the memory limit allows. Packages are kept in DIR and reused.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from peers import RunFailed, run_and_measure
from PIL import Image

import sdonnx

NETWORKS = {
    "rrdbnet": lambda architectures: architectures.ESRGAN(num_filters=64, num_blocks=23, scale=4),
    "compact": lambda architectures: architectures.Compact(num_feat=64, num_conv=32, upscale=4),
}
RUNS = (("torch", ""), ("fp32", "max"), ("fp32", "2GB"), ("fp32", "min"), ("int8", "max"), ("int8", "min"))
"""torch, or the precision of a package; and the memory limit."""


def photograph(side: int) -> Image.Image:
    """Make an image of random colors, always the same."""
    colors = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize((side, side), Image.Resampling.BICUBIC)


def make_network(name: str) -> object:
    """Make spandrel's network with random weights."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch
    from support import upscalers

    torch.manual_seed(0)
    network = NETWORKS[name](upscalers).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02)
    return network


def export(name: str, precision: str, work: Path) -> Path:
    """Export a network, unless that was done before."""
    package = work / f"{name}-{precision}"
    if not package.exists():
        import torch
        from sdonnx_export.export import export as export_package

        torch.save(make_network(name).state_dict(), work / f"{name}.pth")
        export_package(str(work / f"{name}.pth"), package, precision=precision)
    return package


def run_worker(name: str, kind: str, memory: str, side: int, work: Path) -> None:
    """Upscale an image; print the seconds, and the predicted peak."""
    image = photograph(side)
    if kind == "torch":
        import torch

        network, values = make_network(name), np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255
        start = time.perf_counter()
        with torch.no_grad():
            network(torch.from_numpy(values)).clamp(0, 1).mul(255).round().byte().numpy()
        print(json.dumps({"seconds": time.perf_counter() - start}))
        return
    with sdonnx.load_upscaler(work / f"{name}-{kind}", device="cpu", memory=memory) as upscaler:
        plan = upscaler.plan(image.size, always=True)
        start = time.perf_counter()
        upscaler.upscale(image)
        print(json.dumps({"seconds": time.perf_counter() - start, "predicted_mb": plan.peak / 1e6}))


def measure(name: str, kind: str, memory: str, side: int, work: Path) -> dict[str, object] | None:
    """Run a worker; None if it failed."""
    try:
        printed, _, peak = run_and_measure(
            [__file__, "--worker", name, kind, memory, "--side", str(side), "--work", str(work)]
        )
    except RunFailed as error:
        print(f"{name} {kind} {memory}: {error}", file=sys.stderr)
        return None
    return {"network": name, "runtime": kind, "memory": memory, "peak_mb": peak, **json.loads(printed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--only", choices=NETWORKS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=3)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        run_worker(*arguments.worker, arguments.side, arguments.work)
        return
    arguments.work.mkdir(exist_ok=True)
    figures = []
    print("| network | runtime | memory limit | s | predicted MB | peak MB |\n| --- | --- | --- | --- | --- | --- |")
    for name in [arguments.only] if arguments.only else NETWORKS:
        for kind, memory in RUNS:
            if kind != "torch":
                export(name, kind, arguments.work)
            found = measure(name, kind, memory, arguments.side, arguments.work)
            if found is not None:
                predicted = f"{found['predicted_mb']:.0f}" if "predicted_mb" in found else ""
                row = f"{found['seconds']:.3g} | {predicted} | {found['peak_mb']:.0f}"
                print(f"| {name} | {kind} | {memory} | {row} |", flush=True)
                figures.append(found)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
