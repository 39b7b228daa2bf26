"""The pipeline: what `sdonnx.load` gives."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image

from sdonnx_runtime.adapters.lora import AnyLora, Lora, find_lora
from sdonnx_runtime.adapters.merging import Adapters, load_adapters
from sdonnx_runtime.adapters.textual_inversion import TextualInversions, read_embedding
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.denoising.control import check_control, check_sizes, component_prefix
from sdonnx_runtime.denoising.step_cache import unet_graphs
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.execution.components import REFINER, Components, Runner
from sdonnx_runtime.execution.staged_model import open_model
from sdonnx_runtime.execution.strategy import MIN_MEMORY, ExecutionStrategy
from sdonnx_runtime.generation import Generation, decode, schedule_pass
from sdonnx_runtime.memory.budget import AUTO, MAX, MIN, Budget
from sdonnx_runtime.memory.planner import MemoryPhase, Plan
from sdonnx_runtime.memory.workload import decode_phase, memory_phases
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.request import Request, given, passes
from sdonnx_runtime.result import Result
from sdonnx_runtime.sampling.registry import resolve_sampler
from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig, default_sampler
from sdonnx_runtime.stream import Stream
from sdonnx_runtime.text.prompt_schedule import parse_lora_tags, schedule_prompts
from sdonnx_runtime.validation import check_request

_PIXEL = 8192
"""Bytes for each pixel, more than the widest VAE takes."""

MAX_THREADS = 1024
"""More than a machine has; ONNX Runtime would start as many as it is told, for minutes."""


class Pipeline:
    """Makes pictures with a package.

    Args:
        package: an opened package.
        preview_vae: another one, whose VAE (a tiny one, say) makes the pictures of `Progress.preview`, in full size.
            It is loaded for the first of them, and stays.
        device: auto, cuda, directml or cpu.
        threads: CPU threads; None is one for each physical core.
        memory: what the process may take, in bytes or such as "600MB" or "2GiB", of which each request makes a `Plan`;
            "auto" is what is free. The text encoder is gone then before the U-Net runs, and the U-Net before the VAE
            decodes. "max" keeps every component in memory between and during generations; "min" takes the least there
            is a way to. But for "max" the C library (glibc) is told to hand large buffers back at once, in the whole
            process. On CUDA a size limits the device's memory.
        refiner: a package whose U-Net takes the last steps, such as SDXL's refiner.
        lora_folder: where the adapters are that prompts name, as ``<lora:name:0.8>``.
        controls: packages of ControlNets and T2I-Adapters, for which each request has a `Control`.

    Raises:
        RequestError: ``threads`` is out of its range, 1 to MAX_THREADS, ``memory`` is no size, or ``lora_folder`` no
            folder.
        PackageError: the package makes no pictures, its scheduler is one that this version can't honour, the preview's
            VAE has other latents, or the refiner or a control is of another kind.
    """

    def __init__(
        self,
        package: Package,
        *,
        preview_vae: Package | None = None,
        device: str = "auto",
        threads: int | None = None,
        memory: str | int = AUTO,
        refiner: Package | None = None,
        lora_folder: Path | None = None,
        controls: Sequence[Package] = (),
    ) -> None:
        if not package.makes_pictures:
            option = "--vae (or vae=)" if package.control is None else "--control (or controls=)"
            raise PackageError(f"{package.root} is {package.kind}; give a whole package, and this one with {option}")
        if refiner is not None:
            check_refiner(package, refiner)
        for net in controls:
            check_control(package, net)
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise RequestError(f"threads is {threads}; give a whole number from 1 to {MAX_THREADS}")
        if lora_folder is not None and not lora_folder.is_dir():
            raise RequestError(f"{lora_folder} is no folder; give the one where the adapters are that prompts name")
        self.package, self.refiner, self.controls = package, refiner, tuple(controls)
        self._scheduler = SchedulerConfig.from_dict(package.manifest.scheduler)

        self._budget = Budget(memory)
        self._device = device
        opened = partial(open_model, device=device, threads=threads, memory_limit=self._budget.bytes_of_device())
        others = {component_prefix(index): net for index, net in enumerate(self.controls)}
        others |= {} if refiner is None else {REFINER: refiner}
        self._components = Components(package, opened, keep_loaded=memory == MAX, others=others)
        self._shown = None if preview_vae is None else package.with_vae(preview_vae)
        shown = package if self._shown is None else self._shown
        self._previews = Components(shown, opened, keep_loaded=True)
        self._adapters, self._lenient = Adapters(), False
        self._lora_folder = lora_folder
        self._tagged: tuple[tuple[Lora, ...], Adapters] = (), self._adapters

    def set_loras(self, loras: Sequence[AnyLora], *, lenient: bool = False) -> None:
        """Applies adapters to all that is generated from now on, in place of those before; none gives the package back.

        What they touch is merged in memory whenever a component is opened; the package stays as it is.

        Args:
            loras: files, each with its scale where that isn't 1.
            lenient: leaves out what a file has for layers that the package doesn't have.

        Raises:
            RequestError: a file can't be read or is for another model; no package of another exporter has the names
                of weights that files mean.
            PackageError: the package is damaged.
        """
        adapters = load_adapters(self.package, [Lora.of(each) for each in loras], lenient=lenient)
        self._adapters = replace(adapters, embeddings=self._adapters.embeddings)
        self._lenient, self._tagged = lenient, ((), self._adapters)

    def set_embeddings(self, embeddings: Sequence[Path | str | tuple[Path | str, str | None]]) -> None:
        """Teaches words to the text encoders (textual inversion, arXiv:2208.01618), in place of those before.

        Args:
            embeddings: files, ``.safetensors``, ``.pt`` or ``.bin``; each with the word that stands for it in prompts,
                where that isn't what the file says, or its name.

        Raises:
            RequestError: a file can't be read, is hostile, or was made for another model.
            PackageError: the package was exported before there were graphs for it.
        """
        asked = (each if isinstance(each, tuple) else (each, None) for each in embeddings)
        taught = tuple(read_embedding(Path(path), word) for path, word in asked)
        for package in (self.package, self.refiner):
            if package is not None:
                TextualInversions(package, taught)
        self._adapters = replace(self._adapters, embeddings=taught)
        self._tagged = (), self._adapters

    def generate(self, request: Request | str, **changes: Any) -> Result:
        """Makes pictures: ``generate("a cat", seed=1)``, or with a `Request`.

        Args:
            request: the prompt, or a whole request.
            **changes: fields of `Request`, over those of ``request``.

        Raises:
            RequestError: the request can't be served.
            PackageError: the package is damaged.
            DeviceError: the device is absent or failed.
        """
        stream = self.stream(request, **changes)
        for _ in stream:
            pass
        return stream.result

    def stream(self, request: Request | str, **changes: Any) -> Stream:
        """Like `generate`, step by step: iterate for progress, stop iterating to cancel, then take ``result``."""
        checked = self.check(request, **changes)
        found = self.plan(checked)
        run = Runner(self._components)
        generation = Generation(
            self.package,
            run,
            self._scheduler,
            checked,
            self.refiner,
            controls=self.controls,
            adapters=self._adapters_for(checked),
            ways=self._ways(found),
        )
        return Stream(generation, run, self._previewer(), found)

    def plan(self, request: Request | str, *, whole: bool = False, **changes: Any) -> Plan | None:
        """How a request would be run in the memory there is for it; None where all of it may be open and whole.

        Args:
            request: the prompt, or a whole request.
            whole: gives the plan in that case too.
            **changes: fields of `Request`, over those of ``request``.

        Raises:
            RequestError: as `check` does; or the memory that the pipeline was given is too little.
            DeviceError: what is free is too little.
            PackageError: the package is damaged.
        """
        checked = self.check(request, **changes)
        largest = passes(checked, self.package.manifest.latents.downscale)

        def phases() -> list[MemoryPhase]:
            return memory_phases(
                self.package,
                largest[-1],
                schedule_prompts(largest),
                refiner=self.refiner,
                controls=self.controls,
                adapters=self._adapters_for(checked),
                preview=self._shown,
            )

        pixels = given(largest[-1].width) * given(largest[-1].height)
        return self._budget.plan(phases, self._enough(pixels), self.package.name, whole=whole)

    def _ways(self, found: Plan | None) -> Mapping[str, ExecutionStrategy]:
        """How components are run."""
        if found is None and self._budget.asked == MIN:
            return dict.fromkeys(self.package.manifest.components, MIN_MEMORY)
        return {} if found is None else found.ways

    def _enough(self, pixels: int) -> int:
        """Bytes that are certainly no less than a picture takes."""
        packages = [each for each in (self.package, self.refiner, self._shown, *self.controls) if each is not None]
        files = sum(
            file.size for each in packages for part in each.manifest.components.values() for file in part.files.values()
        )
        return 4 * files + _PIXEL * pixels

    def decode(self, latents: Array) -> tuple[Image, ...]:
        """Pictures of latents, (N, C, h, w), as `Result.latents` has them.

        Raises:
            RequestError: they are not the package's kind of latents.
            PackageError, DeviceError: as `generate` does.
        """
        channels = self.package.manifest.latents.channels
        if latents.ndim != 4 or latents.shape[1] != channels or 0 in latents.shape:
            raise RequestError(f"the latents are {latents.shape}; {self.package.name} has (N, {channels}, h, w)")
        pixels = latents.shape[2] * latents.shape[3] * self.package.manifest.latents.downscale**2
        count, _, height, width = latents.shape
        found = self._budget.plan(
            lambda: [decode_phase(self.package, height, width, count)], self._enough(pixels), self.package.name
        )
        with self._components.reserved(ways=self._ways(found)):
            return decode(Runner(self._components), self.package.manifest, latents)

    def check(self, request: Request | str, **changes: Any) -> Request:
        """The request with every choice made, or a RequestError; runs nothing."""
        known = [item.name for item in fields(Request)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise RequestError(f"a request has no '{unknown[0]}'; its fields are {', '.join(known)}")
        manifest = self.package.manifest
        asked = request if isinstance(request, Request) else Request(prompt=request)
        checked = check_request(
            replace(asked, **changes),
            multiple=manifest.latents.downscale,
            defaults=manifest.defaults,
            random_seed=secrets.randbits(32),
            beside=manifest.conditions.beside,
            refined=self.refiner is not None,
            controls=len(self.controls),
        )
        sampler, schedule = default_sampler(self._scheduler), None
        if checked.sampler is not None:
            sampler, schedule = resolve_sampler(checked.sampler)
        checked = replace(checked, sampler=sampler, schedule=schedule if checked.schedule is None else checked.schedule)
        walk, _ = schedule_pass(self._scheduler, checked)
        if checked.sigmas is not None or checked.timesteps is not None:
            checked = replace(checked, num_inference_steps=walk.total)
        for each in passes(checked, manifest.latents.downscale):
            check_sizes(self.controls, each)
        for second in passes(checked, manifest.latents.downscale)[1:]:
            schedule_pass(self._scheduler, second)
            if checked.sigmas is None and checked.timesteps is None:
                checked = replace(checked, hires_steps=second.num_inference_steps)
        encodes = checked.image is not None or checked.hires_upscaler == "lanczos"
        if encodes and "vae_encoder" not in manifest.components:
            raise RequestError(
                f"{self.package.name} has no VAE encoder, so it can't start from a picture; export again"
            )
        self._adapters_for(checked)
        self._check_graphs(checked)
        return checked

    def _check_graphs(self, request: Request) -> None:
        """Finds out whether the U-Nets have the graphs that a checked request runs."""
        models = [(self.package, bool(self.controls)), *([] if self.refiner is None else [(self.refiner, False)])]
        for package, controlled in models:
            choices = {"token_downsampling": request.token_downsampling, "controlled": controlled}
            for graph in unet_graphs(request.reuse, **choices):
                if graph in package.manifest.components["unet"].graphs:
                    continue
                needed = "a control" if controlled else "reuse or token_downsampling"
                raise RequestError(
                    f"{package.name} has no U-Net graph '{graph}', which {needed} needs; "
                    "export its checkpoint again, not --via optimum, or leave them out"
                )

    def _adapters_for(self, request: Request) -> Adapters:
        """Those that are set, and those that a checked request's prompts name."""
        named = tuple(find_lora(self._lora_folder, tag.name, tag.weight) for tag in parse_lora_tags(request))
        if named != self._tagged[0]:
            both = load_adapters(self.package, [*self._adapters.loras, *named], lenient=self._lenient)
            mine = replace(both, loras=self._adapters.loras, embeddings=self._adapters.embeddings)
            self._tagged = named, mine
        return self._tagged[1]

    def _previewer(self) -> Callable[[Array], Image] | None:
        """Decodes latents, (1, C, h, w), with the preview's VAE."""
        shown = self._shown
        return None if shown is None else lambda latents: decode(Runner(self._previews), shown.manifest, latents)[0]

    def close(self) -> None:
        """Unloads every component."""
        self._components.close()
        self._previews.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_refiner(package: Package, refiner: Package) -> None:
    """Finds out whether a package's U-Net can take the last steps of another's walk.

    Raises:
        PackageError: it can't.
    """
    if not refiner.makes_pictures:
        raise PackageError(f"{refiner.root} is {refiner.kind}; give a package with a U-Net to refine with")
    mine, other = package.manifest, refiner.manifest
    if other.conditions.beside is not None or mine.conditions.beside is not None:
        raise PackageError(f"{package.name} or {refiner.name} is given a picture beside the latents; neither may be")
    if other.latents.channels != mine.latents.channels or other.latents.downscale != mine.latents.downscale:
        raise PackageError(
            f"{refiner.name} has latents of {other.latents.channels} channels, {package.name} of "
            f"{mine.latents.channels}; give a refiner of the same family"
        )
