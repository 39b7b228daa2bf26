"""The runtimes that bench/peers.py compares, in the order of its table."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from diffusers_runtimes import Optimum, OptimumIntel, Torch, TorchBf16
from openvino_runtimes import OpenVino, OpenVinoDefault, OpenVinoGenAi, OpenVinoInt8, OpenVinoInt8Default
from runtime_base import PROMPT, SEED, Generate, Runtime
from sdonnx_runtimes import Sdonnx, SdonnxInt8, SdonnxInt8OnOpenVino, SdonnxOnOpenVino


class StableDiffusionCpp(Runtime):
    """stable-diffusion.cpp: quantizes the checkpoint while loading; its parts can't be run separately."""

    name = "sdcpp"
    precision = "q8_0"
    needs = ("stable_diffusion_cpp",)
    parts = ("unet",)

    def missing(self) -> str | None:
        return super().missing() or (None if self.size == "sd15" else "it does not support models of this size")

    def measure(self, part: str, runs: int) -> dict[str, float]:
        start = time.perf_counter()
        model = self._load()
        end_of_load = time.perf_counter()
        times: list[float] = []
        self._generate(model, min(runs, 1) + 1, lambda *_: times.append(time.perf_counter()))
        seconds = np.diff([*times, time.perf_counter()]).tolist()  # steps, then the decode
        return {
            "load_s": end_of_load - start,
            "first_step_s": seconds[0],
            "step_s": statistics.median(seconds[1:-1]),
            "decode_s": seconds[-1],
        }

    def open_pipeline(self, *, fast: bool = False) -> Generate:
        model = self._load()
        return lambda: self._generate(model, self.steps, lambda *_: None)

    def _load(self) -> Any:
        from stable_diffusion_cpp import StableDiffusion

        options = {"wtype": "q8_0", "vae_decode_only": True, "n_threads": os.cpu_count(), "verbose": False}
        return StableDiffusion(model_path=str(self.checkpoint), **options)

    def _generate(self, model: Any, steps: int, progress: Callable[..., Any]) -> Any:
        return model.generate_image(
            PROMPT,
            width=self.pixels,
            height=self.pixels,
            sample_method="euler",
            sample_steps=steps,
            cfg_scale=self.guidance_scale,
            seed=SEED,
            progress_callback=progress,
        )[0]


HELD_TO_F32 = (Sdonnx, SdonnxInt8, OpenVino, OpenVinoInt8, Torch, Optimum, StableDiffusionCpp)
ON_OPENVINO = (SdonnxOnOpenVino, SdonnxInt8OnOpenVino, OpenVinoDefault, OpenVinoInt8Default, OpenVinoGenAi)
AS_USED = (*ON_OPENVINO, OptimumIntel, TorchBf16)
"""As users run them: each computes in what it chooses, or in bfloat16."""
RUNTIMES = (*HELD_TO_F32, *AS_USED)
