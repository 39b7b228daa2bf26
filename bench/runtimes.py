"""sdonnx and what it is compared with, each opened in the same few ways; bench/peers.py measures them."""

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

PROMPT, SEED, PICTURE_STEPS = "a photograph of an astronaut riding a horse", 1, 20
Feeds = dict[str, np.ndarray]


class Runtime:
    """One runtime in one precision, with its files in a directory of its own below ``work``."""

    name: str
    precision = "fp32"
    needs: tuple[str, ...] = ()
    """Modules."""
    parts: tuple[str, ...] = ("unet", "vae_decoder")
    """What is measured in a process of its own."""
    pictures: tuple[str, ...] = ("image",)
    """Whole pictures, the same way."""

    def __init__(self, work: Path, size: str) -> None:
        self.checkpoint, self.work, self.size = work / "checkpoint", work, size
        self.folder = work / f"{self.name}-{self.precision}"
        self.unet = random_checkpoint.SIZES[size]["unet"]
        self.pixels = 8 * self.unet["sample_size"]

    def missing(self) -> str | None:
        """Why it can't be measured."""
        absent = [module for module in self.needs if importlib.util.find_spec(module) is None]
        return f"{', '.join(absent)} not installed" if absent else None

    def prepare(self) -> None:
        """Has its files made, whole or not at all, unless they are there."""
        whole, part = self.folder, self.folder.with_name(f"{self.folder.name}.part")
        if not whole.exists():
            shutil.rmtree(part, ignore_errors=True)
            self.folder = part
            self.make()
            self.folder = whole
            if part.exists():
                part.rename(whole)

    def make(self) -> None:
        """Makes its files of the checkpoint, if it needs any."""

    def open(self, part: str) -> Callable[[Feeds], np.ndarray]:
        raise NotImplementedError

    def picture(self) -> Any:
        """From files to a picture."""
        raise NotImplementedError

    def fast(self) -> Any:
        """The same at some loss; for those that have it among their ``pictures``."""
        raise NotImplementedError

    def feeds(self, part: str) -> Feeds:
        """One row of latents with the two rows of text of classifier-free guidance; or latents alone."""
        cells = self.unet["sample_size"]
        latents = np.random.default_rng(0).standard_normal((1, 4, cells, cells), np.float32)
        if part == "vae_decoder":
            return {"latent_sample": latents}
        text = np.random.default_rng(1).standard_normal((2, 77, self.unet["cross_attention_dim"]), np.float32)
        feeds = {"sample": latents, "timestep": np.array(500, np.float32), "encoder_hidden_states": text}
        if "addition_embed_type" in self.unet:
            pooled = np.random.default_rng(2).standard_normal((2, random_checkpoint.BIG_TEXT["projection_dim"]))
            sizes = np.array([[self.pixels, self.pixels, 0, 0, self.pixels, self.pixels]] * 2)
            feeds |= {"text_embeds": pooled.astype(np.float32), "time_ids": sizes.astype(np.float32)}
        return feeds

    def figures(self, part: str, runs: int) -> dict[str, float]:
        """Seconds of opening a part and of running it, once and then in the median of ``runs``."""
        feeds = self.feeds(part)
        marks = [time.perf_counter()]
        run = self.open(part)
        marks.append(time.perf_counter())
        for _ in range(runs + 1):
            output = run(feeds)
            marks.append(time.perf_counter())
        seconds = np.diff(marks).tolist()
        found = dict(zip(KEYS[part], (*seconds[:2], statistics.median(seconds[2:])), strict=True))
        return {**found, f"{part}_checksum": float(np.abs(output).mean())}


KEYS = {"unet": ("load_s", "first_step_s", "step_s"), "vae_decoder": ("decode_load_s", "first_decode_s", "decode_s")}


class Sdonnx(Runtime):
    """What this bench is about."""

    name = "sdonnx"
    needs = ("onnxruntime", "onnxscript")

    def make(self) -> None:
        from sdonnx.cli.app import main

        how = ["--precision", self.precision, "--calibration", "fast"]  # ranges change no speed
        sys.argv[1:] = ["export", str(self.checkpoint), "-o", str(self.folder), *how]
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

    def picture(self) -> Any:
        return ours(self, self.folder, {})


class SdonnxInt8(Sdonnx):
    """Weights and activations in int8, as ``--precision int8`` exports them."""

    precision = "int8"
    pictures = ("image", "fast")

    def fast(self) -> Any:
        from sdonnx import FAST

        return ours(self, self.folder, {}, **FAST)


def ours(runtime: Runtime, package: Path, models: dict[str, Path], **options: Any) -> Any:
    """A picture in our loop, with OpenVINO for the ``models``."""
    import sdonnx

    pixels = runtime.pixels
    with sdonnx.load(package, device="cpu") as pipe:
        openvino_models.attach(pipe, models)
        request = pipe.check(PROMPT, seed=SEED, num_inference_steps=PICTURE_STEPS, sampler="euler", **options)
        return pipe.generate(request, width=pixels, height=pixels).images[0]


class OpenVino(Runtime):
    """As optimum-intel has it: converted from torch, static shapes; pictures in our loop, with our text encoder."""

    name = "openvino"
    needs = ("openvino", "torch", "diffusers")

    def make(self) -> None:
        for part in self.parts:
            openvino_models.convert(self.checkpoint, part, self.folder / f"{part}.xml")

    def open(self, part: str) -> Callable[[Feeds], np.ndarray]:
        shapes = {name: value.shape for name, value in openvino_models.whole(self.feeds(part)).items()}
        session = openvino_models.OpenVinoSession(self.folder / f"{part}.xml", shapes)
        return lambda feeds: session.run(feeds)["output"]

    def picture(self) -> Any:
        package = Sdonnx(self.work, self.size).folder
        if not package.exists():
            raise SystemExit(f"its picture takes {package.name}'s text encoder; measure sdonnx too")
        return ours(self, package, {part: self.folder / f"{part}.xml" for part in self.parts})


class OpenVinoInt8(OpenVino):
    """The U-Net's weights and activations in int8 by NNCF, and the VAE's weights."""

    precision = "int8"
    needs = (*OpenVino.needs, "nncf")

    def make(self) -> None:
        source = OpenVino(self.work, self.size)
        source.prepare()
        steps = [{**self.feeds("unet"), "timestep": np.array(t, np.float32)} for t in (961, 641, 321, 1)]
        openvino_models.quantize(source.folder / "unet.xml", steps, self.folder / "unet.xml")
        openvino_models.compress(source.folder / "vae_decoder.xml", self.folder / "vae_decoder.xml")


class Optimum(Runtime):
    """optimum-onnx: traced, in ONNX Runtime."""

    name = "optimum"
    needs = ("onnxruntime", "optimum", "torch", "diffusers")

    def make(self) -> None:
        from optimum.exporters.onnx import main_export

        main_export(str(self.checkpoint), self.folder, task="text-to-image", do_validation=False)

    def open(self, part: str) -> Callable[[Feeds], np.ndarray]:
        import onnxruntime

        path = self.folder / part / "model.onnx"
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        types = {item.name: {"tensor(int64)": np.int64}.get(item.type, np.float32) for item in session.get_inputs()}

        def run(feeds: Feeds) -> np.ndarray:
            whole = openvino_models.whole(feeds)
            return session.run(None, {name: whole[name].astype(dtype) for name, dtype in types.items()})[0]

        return run

    def picture(self) -> Any:
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        return diffused(self, ORTStableDiffusionPipeline.from_pretrained(self.folder))


class Torch(Runtime):
    """diffusers."""

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
            given = {name: torch.from_numpy(value) for name, value in openvino_models.whole(feeds).items()}
            added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
            given |= {"added_cond_kwargs": added} if added else {}
            return (unet(**given) if part == "unet" else vae.decode(given["latent_sample"])).sample.numpy()

        return run

    def picture(self) -> Any:
        from diffusers import StableDiffusionPipeline

        return diffused(self, StableDiffusionPipeline.from_pretrained(self.checkpoint))


def diffused(runtime: Runtime, pipe: Any) -> Any:
    """A picture by a pipeline of diffusers."""
    import torch
    from diffusers import EulerDiscreteScheduler

    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    generator, pixels = torch.Generator("cpu").manual_seed(SEED), runtime.pixels
    return pipe(PROMPT, num_inference_steps=PICTURE_STEPS, width=pixels, height=pixels, generator=generator).images[0]


class StableDiffusionCpp(Runtime):
    """stable-diffusion.cpp reads the checkpoint and quantizes it as it loads; its parts can't be run apart."""

    name = "sdcpp"
    precision = "q8_0"
    needs = ("stable_diffusion_cpp",)
    parts = ("unet",)

    def missing(self) -> str | None:
        return super().missing() or (None if self.size == "sd15" else "it runs no model of this size")

    def figures(self, part: str, runs: int) -> dict[str, float]:
        start = time.perf_counter()
        model = self._load()
        loaded = time.perf_counter()
        marks: list[float] = []
        self._draw(model, min(runs, 1) + 1, lambda *_: marks.append(time.perf_counter()))
        seconds = np.diff([*marks, time.perf_counter()]).tolist()  # steps, then the decode
        return {
            "load_s": loaded - start,
            "first_step_s": seconds[0],
            "step_s": statistics.median(seconds[1:-1]),
            "decode_s": seconds[-1],
        }

    def picture(self) -> Any:
        return self._draw(self._load(), PICTURE_STEPS, lambda *_: None)

    def _load(self) -> Any:
        from stable_diffusion_cpp import StableDiffusion

        options = {"wtype": "q8_0", "vae_decode_only": True, "n_threads": os.cpu_count(), "verbose": False}
        return StableDiffusion(model_path=str(self.checkpoint), **options)

    def _draw(self, model: Any, steps: int, progress: Callable[..., Any]) -> Any:
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
