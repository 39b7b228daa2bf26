"""sdonnx and the runtimes that bench/peers.py compares it with, behind one interface."""

import importlib.util
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino_models
import random_checkpoint

PROMPT, SEED, IMAGE_STEPS = "a photograph of an astronaut riding a horse", 1, 20
Feeds = dict[str, np.ndarray]


class Runtime:
    """One runtime in one precision, with its files in a subdirectory of ``work``."""

    name: str
    precision = "fp32"
    needs: tuple[str, ...] = ()
    """Modules that must be installed."""
    parts: tuple[str, ...] = ("unet", "vae_decoder")
    """Components that are measured, each in its own process."""
    image_tasks: tuple[str, ...] = ("image",)
    """Whole images: image, and fast if there is a faster preset."""

    def __init__(self, work: Path, size: str) -> None:
        self.checkpoint, self.work, self.size = work / "checkpoint", work, size
        self.folder = work / f"{self.name}-{self.precision}"
        self.unet = random_checkpoint.SIZES[size]["unet"]
        self.pixels = 8 * self.unet["sample_size"]

    def missing(self) -> str | None:
        """Return why the runtime can't be measured, or None."""
        absent = [module for module in self.needs if importlib.util.find_spec(module) is None]
        return f"{', '.join(absent)} not installed" if absent else None

    def prepare(self) -> None:
        """Convert the checkpoint to ``folder``, atomically, unless it exists."""
        final, part = self.folder, self.folder.with_name(f"{self.folder.name}.part")
        if not final.exists():
            shutil.rmtree(part, ignore_errors=True)
            self.folder = part
            self.convert()
            self.folder = final
            if part.exists():
                part.rename(final)

    def convert(self) -> None:
        """Convert the checkpoint, if the runtime needs that."""

    def open(self, part: str) -> Callable[[Feeds], np.ndarray]:
        raise NotImplementedError

    def generate(self) -> Any:
        """Load everything and generate an image."""
        raise NotImplementedError

    def generate_fast(self) -> Any:
        """Generate with the faster preset, if ``image_tasks`` has it."""
        raise NotImplementedError

    def feeds(self, part: str) -> Feeds:
        """Return random inputs: latents of batch 1 and, for the U-Net, text of batch 2 (classifier-free guidance)."""
        side = self.unet["sample_size"]
        latents = np.random.default_rng(0).standard_normal((1, 4, side, side), np.float32)
        if part == "vae_decoder":
            return {"latent_sample": latents}
        text = np.random.default_rng(1).standard_normal((2, 77, self.unet["cross_attention_dim"]), np.float32)
        feeds = {"sample": latents, "timestep": np.array(500, np.float32), "encoder_hidden_states": text}
        if "addition_embed_type" in self.unet:
            pooled = np.random.default_rng(2).standard_normal((2, random_checkpoint.BIG_TEXT["projection_dim"]))
            sizes = np.array([[self.pixels, self.pixels, 0, 0, self.pixels, self.pixels]] * 2)
            feeds |= {"text_embeds": pooled.astype(np.float32), "time_ids": sizes.astype(np.float32)}
        return feeds

    def measure(self, part: str, runs: int) -> dict[str, float]:
        """Time loading a part, its first run, and the median of ``runs`` more."""
        feeds = self.feeds(part)
        times = [time.perf_counter()]
        run = self.open(part)
        times.append(time.perf_counter())
        for _ in range(runs + 1):
            output = run(feeds)
            times.append(time.perf_counter())
        seconds = np.diff(times).tolist()
        figures = dict(zip(KEYS[part], (*seconds[:2], statistics.median(seconds[2:])), strict=True))
        return {**figures, f"{part}_checksum": float(np.abs(output).mean())}


KEYS = {"unet": ("load_s", "first_step_s", "step_s"), "vae_decoder": ("decode_load_s", "first_decode_s", "decode_s")}


class Sdonnx(Runtime):
    """sdonnx in float32."""

    name = "sdonnx"
    needs = ("onnxruntime", "onnxscript")

    def convert(self) -> None:
        from sdonnx.cli.app import main

        options = ["--precision", self.precision, "--calibration", "fast"]  # ranges do not change the speed
        sys.argv[1:] = ["export", str(self.checkpoint), "-o", str(self.folder), *options]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise

    def open(self, part: str) -> Callable[[Feeds], np.ndarray]:
        from sdonnx_runtime.execution.session import Session

        import sdonnx

        session = Session(sdonnx.Package.open(self.folder).graph(part), device="cpu")
        return lambda feeds: next(iter(session.run(feeds).values()))

    def generate(self) -> Any:
        return generate_with_sdonnx(self, self.folder, {})


class SdonnxInt8(Sdonnx):
    """Weights and activations in int8, as ``--precision int8`` exports them."""

    precision = "int8"
    image_tasks = ("image", "fast")

    def generate_fast(self) -> Any:
        from sdonnx import FAST

        return generate_with_sdonnx(self, self.folder, {}, **FAST)


def generate_with_sdonnx(runtime: Runtime, package: Path, models: dict[str, Path], **options: Any) -> Any:
    """Generate an image with sdonnx; OpenVINO runs the ``models``."""
    import sdonnx

    options |= {"width": runtime.pixels, "height": runtime.pixels, "num_inference_steps": IMAGE_STEPS}
    open_model = openvino_models.model_opener(models)
    with sdonnx.Pipeline(sdonnx.Package.open(package), device="cpu", open_model=open_model) as pipe:
        return pipe.generate(PROMPT, seed=SEED, sampler="euler", **options).images[0]


class OpenVino(Runtime):
    """Converted from torch with static shapes, as by optimum-intel; images with sdonnx' loop and text encoder."""

    name = "openvino"
    needs = ("openvino", "torch", "diffusers")

    def convert(self) -> None:
        for part in self.parts:
            openvino_models.convert(self.checkpoint, part, self.folder / f"{part}.xml")

    def open(self, part: str) -> Callable[[Feeds], np.ndarray]:
        shapes = {name: value.shape for name, value in openvino_models.repeat_latents(self.feeds(part)).items()}
        session = openvino_models.OpenVinoSession(self.folder / f"{part}.xml", shapes)
        return lambda feeds: session.run(feeds)["output"]

    def generate(self) -> Any:
        package = Sdonnx(self.work, self.size).folder
        if not package.exists():
            raise SystemExit(f"its image requires {package.name}'s text encoder; measure sdonnx too")
        return generate_with_sdonnx(self, package, {part: self.folder / f"{part}.xml" for part in self.parts})


class OpenVinoInt8(OpenVino):
    """int8 by NNCF: the U-Net's weights and activations, and the VAE's weights."""

    precision = "int8"
    needs = (*OpenVino.needs, "nncf")

    def convert(self) -> None:
        source = OpenVino(self.work, self.size)
        source.prepare()
        samples = [{**self.feeds("unet"), "timestep": np.array(t, np.float32)} for t in (961, 641, 321, 1)]
        openvino_models.quantize(source.folder / "unet.xml", samples, self.folder / "unet.xml")
        openvino_models.compress(source.folder / "vae_decoder.xml", self.folder / "vae_decoder.xml")


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

    def generate(self) -> Any:
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        return generate_with_diffusers(self, ORTStableDiffusionPipeline.from_pretrained(self.folder))


class Torch(Runtime):
    """diffusers on PyTorch."""

    name = "torch"
    needs = ("torch", "diffusers", "transformers")

    def open(self, part: str) -> Callable[[Feeds], np.ndarray]:
        import torch
        from diffusers import AutoencoderKL, UNet2DConditionModel

        if part == "unet":
            unet = UNet2DConditionModel.from_pretrained(self.checkpoint / "unet").eval()
        else:
            vae = AutoencoderKL.from_pretrained(self.checkpoint / "vae").eval()

        @torch.inference_mode()
        def run(feeds: Feeds) -> np.ndarray:
            inputs = {name: torch.from_numpy(value) for name, value in openvino_models.repeat_latents(feeds).items()}
            added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
            inputs |= {"added_cond_kwargs": added} if added else {}
            return (unet(**inputs) if part == "unet" else vae.decode(inputs["latent_sample"])).sample.numpy()

        return run

    def generate(self) -> Any:
        from diffusers import StableDiffusionPipeline

        return generate_with_diffusers(self, StableDiffusionPipeline.from_pretrained(self.checkpoint))


def generate_with_diffusers(runtime: Runtime, pipe: Any) -> Any:
    """Generate an image with a diffusers pipeline."""
    import torch
    from diffusers import EulerDiscreteScheduler

    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    generator, pixels = torch.Generator("cpu").manual_seed(SEED), runtime.pixels
    return pipe(PROMPT, num_inference_steps=IMAGE_STEPS, width=pixels, height=pixels, generator=generator).images[0]


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

    def generate(self) -> Any:
        return self._generate(self._load(), IMAGE_STEPS, lambda *_: None)

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
            cfg_scale=7.5,
            seed=SEED,
            progress_callback=progress,
        )[0]


RUNTIMES = (Sdonnx, SdonnxInt8, OpenVino, OpenVinoInt8, Torch, Optimum, StableDiffusionCpp)
