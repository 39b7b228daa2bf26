"""Measure the cost of a LoRA: loading a package's U-Net and running a step, with and without it.

    python bench/lora.py PACKAGE --rank 16 --json FILE

The LoRA has random weights for every attention and feed-forward layer. Each figure comes from its own process, the two
variants take turns, and the table gives medians.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from peers import run_and_measure
from safetensors.numpy import save_file
from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.adapters.merging import load_adapters
from sdonnx_runtime.execution.components import Components, Runner
from sdonnx_runtime.execution.staged_model import open_model
from sdonnx_runtime.graphs.initializers import read_initializers

import sdonnx


def write_random_lora(package: sdonnx.Package, path: Path, rank: int) -> None:
    """Write a random LoRA for a package's U-Net, in diffusers' format."""
    generator = np.random.default_rng(0)
    state = {}
    initializers = read_initializers(package.graph("unet"))
    for name, initializer in initializers.items():
        match = re.fullmatch(r"(.+\.(?:attn\d|ff)\..+)\.weight(?:(?:_\d+)?_quantized)?", name)
        if match is None:
            continue
        layer, (inputs, outputs) = match[1], initializer.shape
        if f"{layer}.bias" in initializers:
            (outputs,) = initializers[f"{layer}.bias"].shape
        for which, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            data = generator.standard_normal(shape, np.float32) / 100
            state[f"unet.{layer}.lora_{which}.weight"] = data.astype(np.float16)
    save_file(state, path)


def run_worker(package: sdonnx.Package, lora: Path | None, size: int) -> None:
    """Load the U-Net, run two steps, and print the times."""
    changes = load_adapters(package, [] if lora is None else [Lora(path=lora)]).deltas
    components = Components(package, partial(open_model, device="cpu"), keep_loaded=True)
    side, channels = size // package.manifest.latents.downscale, package.manifest.latents.channels
    width = json.loads((package.root / "unet" / "config.json").read_text())["cross_attention_dim"]
    feeds = {
        "sample": np.ones((1, channels, side, side), np.float32),
        "timestep": np.array(500, np.float32),
        "encoder_hidden_states": np.ones((2, 77, width), np.float32),
    }
    with components.exclusive(changes):
        start = time.perf_counter()
        components.model("unet")
        load_s = time.perf_counter() - start
        Runner(components)("unet", feeds)
        start = time.perf_counter()
        Runner(components)("unet", feeds)
        print(json.dumps({"load_s": load_s, "step_s": time.perf_counter() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    package = sdonnx.Package.open(args.package)
    if args.worker is not None:
        run_worker(package, Path(args.worker) if args.worker != "plain" else None, package.manifest.defaults.size)
        return
    with tempfile.TemporaryDirectory() as folder:
        lora = Path(folder) / "lora.safetensors"
        write_random_lora(package, lora, args.rank)
        rounds: dict[str, list[dict[str, float]]] = {"plain": [], str(lora): []}
        for _ in range(args.repeats):
            for worker, figures in rounds.items():
                printed, _, peak = run_and_measure([__file__, str(args.package), "--worker", worker])
                figures.append({**json.loads(printed), "peak_rss_mb": peak})
    plain, applied = (
        {key: statistics.median(each[key] for each in figures) for key in figures[0]} for figures in rounds.values()
    )
    print(f"| | plain | LoRA of rank {args.rank} | |\n| --- | --- | --- | --- |")
    for key, value in plain.items():
        print(f"| {key} | {value:.4g} | {applied[key]:.4g} | {applied[key] / value:.2f} |")
    if args.json is not None:
        args.json.write_text(json.dumps({"plain": plain, "lora": applied}, indent=2))


if __name__ == "__main__":
    sys.exit(main())
