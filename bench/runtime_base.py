"""What the runtimes of bench/peers.py have in common: files, inputs, and how their parts and images are timed."""

import importlib.util
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from checkpoint_sizes import BIG_TEXT, SIZES

PROMPT, SEED = "a photograph of an astronaut riding a horse", 1
Feeds = dict[str, np.ndarray]
Generate = Callable[[], Any]
"""Generates an image (Pillow)."""

KEYS = {"unet": ("load_s", "first_step_s", "step_s"), "vae_decoder": ("decode_load_s", "first_decode_s", "decode_s")}
FEW_STEPS = ("open", "cold")
"""Images of a model of few steps: several with the pipeline open, and one from the start of the process."""


class Runtime:
    """One runtime in one precision, with its files in a subdirectory of ``work``."""

    name: str
    files = ""
    """The name that its files have, if they are another runtime's."""
    precision = "fp32"
    """What its files are stored in."""
    compute = "f32"
    """What it computes in: f32 or bf16 throughout, or default, its own choice."""
    needs: tuple[str, ...] = ()
    """Modules that must be installed."""
    parts: tuple[str, ...] = ("unet", "vae_decoder")
    """Components that are measured, each in its own process."""
    image_tasks: tuple[str, ...] = ("image",)
    """Whole images: image, and fast if there is a faster preset."""
    kinds: tuple[str, ...] = ("many steps",)
    """The models that it runs: of many steps, of few steps with a tiny VAE."""

    def __init__(self, work: Path, size: str) -> None:
        self.checkpoint, self.work, self.size = work / "checkpoint", work, size
        self.folder = work / f"{self.files or self.name}-{self.precision}"
        self.unet = SIZES[size]["unet"]
        self.pixels = 8 * self.unet["sample_size"]
        self.has_few_steps = "tiny_vae" in SIZES[size]
        self.steps, self.guidance_scale = (1, 0.0) if self.has_few_steps else (20, 7.5)

    def __str__(self) -> str:
        return f"{self.name} {self.precision} ({self.compute})"

    def missing(self) -> str | None:
        """Return why the runtime can't be measured, or None."""
        kind = "few steps" if self.has_few_steps else "many steps"
        if kind not in self.kinds:
            return f"it is not measured with models of {kind}"
        absent = [module for module in self.needs if importlib.util.find_spec(module) is None]
        return f"{', '.join(absent)} not installed" if absent else None

    def tasks(self, *, image: bool) -> tuple[str, ...]:
        """Return what is measured, each in its own process."""
        return FEW_STEPS if self.has_few_steps else (*self.parts, *(self.image_tasks if image else ()))

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

    def open_pipeline(self, *, fast: bool = False) -> Generate:
        """Load everything for images of ``steps`` steps, ``fast`` with the faster preset."""
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
            pooled = np.random.default_rng(2).standard_normal((2, BIG_TEXT["projection_dim"]))
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

    def measure_images(self, runs: int, *, fast: bool = False) -> list[float]:
        """Seconds of images that are saved as PNG; those of the first include opening the pipeline."""
        times = [time.perf_counter()]
        generate = self.open_pipeline(fast=fast)
        with TemporaryDirectory() as folder:
            for index in range(runs):
                generate().save(Path(folder) / f"{index}.png")
                times.append(time.perf_counter())
        return np.diff(times).tolist()
