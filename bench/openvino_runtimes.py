"""OpenVINO as bench/peers.py measures it: its own conversion, openvino-genai, and optimum-intel's pipeline."""

import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino_models
from runtime_base import PROMPT, SEED, Feeds, Generate, Runtime
from sdonnx_runtimes import Sdonnx, open_sdonnx


class OpenVino(Runtime):
    """Converted from torch with static shapes, as by optimum-intel; images with sdonnx' loop and text encoder."""

    name = "openvino"
    needs = ("openvino", "torch", "diffusers")

    def convert(self) -> None:
        for part in self.parts:
            path = self.folder / f"{part}.xml"
            openvino_models.convert(self.checkpoint, part, path, compress_to_fp16=self.precision == "fp16")

    def open(self, part: str) -> Callable[[Feeds], np.ndarray]:
        shapes = {name: value.shape for name, value in openvino_models.repeat_latents(self.feeds(part)).items()}
        session = openvino_models.OpenVinoSession(self.folder / f"{part}.xml", shapes, compute=self.compute)
        return lambda feeds: session.run(feeds)["output"]

    def open_pipeline(self, *, fast: bool = False) -> Generate:
        package = Sdonnx(self.work, self.size).folder
        if not package.exists():
            raise SystemExit(f"its image requires {package.name}'s text encoder; measure sdonnx too")
        return open_sdonnx(self, package, {part: self.folder / f"{part}.xml" for part in self.parts})


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


class OpenVinoDefault(OpenVino):
    """As OpenVINO saves and runs a model unless it is asked for something else."""

    precision = "fp16"
    compute = "default"


class OpenVinoInt8Default(OpenVinoInt8):
    """The same int8 models; what isn't int8 is computed as OpenVINO chooses."""

    compute = "default"


class OpenVinoGenAi(Runtime):
    """openvino-genai with optimum-intel's export and static shapes; its parts can't be run separately.

    It has no class for a tiny VAE, but takes one that stands where the export has the decoder.
    """

    name = "openvino-genai"
    precision = "fp16"
    compute = "default"
    needs = ("openvino_genai", "openvino_tokenizers", "optimum.intel", "torch", "diffusers")
    parts = ("unet",)
    kinds = ("many steps", "few steps")

    def missing(self) -> str | None:
        try:
            return super().missing()
        except ModuleNotFoundError:  # optimum itself
            return "optimum not installed"

    def convert(self) -> None:
        import openvino
        from openvino_tokenizers import convert_tokenizer
        from optimum.exporters.openvino import main_export
        from optimum.intel import OVConfig
        from transformers import AutoTokenizer

        main_export(str(self.checkpoint), self.folder, task="text-to-image", ov_config=OVConfig(dtype="fp16"))
        for folder in self.folder.glob("tokenizer*"):
            tokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(self.checkpoint / folder.name))
            openvino.save_model(tokenizer, folder / "openvino_tokenizer.xml")
        if self.has_few_steps:
            path = self.folder / "vae_decoder" / "openvino_model.xml"
            openvino_models.convert(self.checkpoint, "vae_decoder", path, vae="tiny_vae", compress_to_fp16=True)
            shutil.copy(self.checkpoint / "tiny_vae" / "config.json", path.with_name("config.json"))

    def measure(self, part: str, runs: int) -> dict[str, float]:
        start = time.perf_counter()
        pipe = self._load()
        loaded = time.perf_counter() - start
        self._generate(pipe, runs + 1)
        steps = [1e-6 * each for each in pipe.get_performance_metrics().raw_metrics.unet_inference_durations]
        self._generate(pipe, 1)
        decode = 1e-3 * pipe.get_performance_metrics().get_vae_decoder_infer_duration()  # the second one
        figures = {"load_s": loaded, "first_step_s": steps[0], "step_s": statistics.median(steps[1:])}
        return {**figures, "decode_s": decode}

    def open_pipeline(self, *, fast: bool = False) -> Generate:
        from PIL import Image

        pipe = self._load()
        return lambda: Image.fromarray(self._generate(pipe, self.steps))

    def _load(self) -> Any:
        import openvino_genai

        pipe = openvino_genai.Text2ImagePipeline(self.folder)
        config = self.folder / "scheduler" / "scheduler_config.json"
        euler = openvino_genai.Scheduler.Type.EULER_DISCRETE
        pipe.set_scheduler(openvino_genai.Scheduler.from_config(config, euler))
        pipe.reshape(1, self.pixels, self.pixels, self.guidance_scale)
        pipe.compile("CPU")
        return pipe

    def _generate(self, pipe: Any, steps: int) -> np.ndarray:
        sizes = {"width": self.pixels, "height": self.pixels, "num_inference_steps": steps}
        return pipe.generate(PROMPT, guidance_scale=self.guidance_scale, rng_seed=SEED, **sizes).data[0]
