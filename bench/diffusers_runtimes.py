"""Runtimes with diffusers' pipelines, as bench/peers.py measures them: PyTorch, optimum-onnx, optimum-intel."""

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino_models
from openvino_runtimes import OpenVinoGenAi
from runtime_base import PROMPT, SEED, Feeds, Generate, Runtime


class Torch(Runtime):
    """diffusers on PyTorch."""

    name = "torch"
    needs = ("torch", "diffusers", "transformers")
    kinds = ("many steps", "few steps")

    def open(self, part: str) -> Callable[[Feeds], np.ndarray]:
        import torch
        from diffusers import AutoModel

        folder = self.checkpoint / ("unet" if part == "unet" else "vae")
        model = AutoModel.from_pretrained(str(folder), torch_dtype=self._dtype).eval()

        @torch.inference_mode()
        def run(feeds: Feeds) -> np.ndarray:
            arrays = openvino_models.repeat_latents(feeds)
            inputs = {name: torch.from_numpy(value).to(self._dtype) for name, value in arrays.items()}
            added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
            inputs |= {"added_cond_kwargs": added} if added else {}
            output = model(**inputs) if part == "unet" else model.decode(inputs["latent_sample"])
            return output.sample.float().numpy()

        return run

    def open_pipeline(self, *, fast: bool = False) -> Generate:
        from diffusers import AutoModel, StableDiffusionPipeline

        vae = {}
        if self.has_few_steps:
            vae["vae"] = AutoModel.from_pretrained(str(self.checkpoint / "tiny_vae"), torch_dtype=self._dtype)
        pipe = StableDiffusionPipeline.from_pretrained(self.checkpoint, torch_dtype=self._dtype, **vae)
        return use_diffusers(self, pipe)

    @property
    def _dtype(self) -> Any:
        import torch

        return torch.bfloat16 if self.compute == "bf16" else torch.float32


class TorchBf16(Torch):
    """The same in bfloat16."""

    precision = "bf16"
    compute = "bf16"


class Optimum(Runtime):
    """optimum-onnx: traced graphs in ONNX Runtime."""

    name = "optimum"
    needs = ("onnxruntime", "optimum", "torch", "diffusers")

    def convert(self) -> None:
        from optimum.exporters.onnx import main_export

        main_export(str(self.checkpoint), self.folder, task="text-to-image", do_validation=False)

    def open(self, part: str) -> Callable[[Feeds], np.ndarray]:
        import onnxruntime

        path = self.folder / part / "model.onnx"
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        types = {item.name: {"tensor(int64)": np.int64}.get(item.type, np.float32) for item in session.get_inputs()}

        def run(feeds: Feeds) -> np.ndarray:
            inputs = openvino_models.repeat_latents(feeds)
            return session.run(None, {name: inputs[name].astype(dtype) for name, dtype in types.items()})[0]

        return run

    def open_pipeline(self, *, fast: bool = False) -> Generate:
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        return use_diffusers(self, ORTStableDiffusionPipeline.from_pretrained(self.folder))


class OptimumIntel(OpenVinoGenAi):
    """optimum-intel's pipeline on openvino-genai's files, as fastsdcpu runs models of few steps."""

    name = "optimum-intel"
    files = OpenVinoGenAi.name
    kinds = ("few steps",)

    def open_pipeline(self, *, fast: bool = False) -> Generate:
        from optimum.intel import OVStableDiffusionPipeline

        pipe = OVStableDiffusionPipeline.from_pretrained(self.folder, compile=False)
        pipe.reshape(batch_size=-1, height=self.pixels, width=self.pixels, num_images_per_prompt=1)
        pipe.compile()
        return use_diffusers(self, pipe)


def use_diffusers(runtime: Runtime, pipe: Any) -> Generate:
    """Return what generates an image with a pipeline of diffusers' interface."""
    import torch
    from diffusers import EulerDiscreteScheduler

    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    options = {"width": runtime.pixels, "height": runtime.pixels, "num_inference_steps": runtime.steps}
    options |= {"guidance_scale": runtime.guidance_scale}
    return lambda: pipe(PROMPT, generator=torch.Generator("cpu").manual_seed(SEED), **options).images[0]
