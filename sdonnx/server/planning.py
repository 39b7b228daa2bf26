"""What a job will need: resolved requests within the server's limits, and their memory, also while a job runs."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import prod

from sdonnx_runtime.execution.devices.choosing import describe_graph, first_choice
from sdonnx_runtime.execution.process_memory import available_memory, resident_memory
from sdonnx_runtime.memory.budget import AUTO, MAX, MIN, Budget
from sdonnx_runtime.memory.constants import FREE_SHARE, PROCESS_BYTES
from sdonnx_runtime.memory.planner import ComponentPlan
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.resolved import ResolvedRequest

import sdonnx
from sdonnx.benchmark.worker import macs_per_second
from sdonnx.server.errors import TooLarge
from sdonnx.server.generation import Generation
from sdonnx.server.library import Library
from sdonnx.server.upscaling import Upscaling


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The memory of a job, in bytes for the whole process."""

    resolved: ResolvedRequest
    peak: int | None
    """None if it can't be predicted, as of packages that sdonnx did not export."""
    smallest: int | None
    """The least memory with which the job can run."""
    room: int | None
    """What the server may use; None is no limit."""
    components: tuple[ComponentPlan, ...]
    device: str
    """The name of the device that runs the U-Net."""

    @property
    def fits(self) -> bool:
        """Whether the server takes the job."""
        return self.smallest is None or self.room is None or self.smallest <= self.room


class Planner:
    """Resolves requests and predicts their memory; in any thread, and nothing runs."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.thread = ThreadPoolExecutor(1, "sdonnx planner")
        """Where it is called: those who wait for it take no thread from interrupts and images."""
        self._lock = threading.Lock()
        self._idle_memory = resident_memory()
        self._speed: float | None = None

    def note_idle(self) -> None:
        """Measure the memory of the process without the components that are loaded; no job runs now."""
        self._idle_memory = resident_memory() - self.library.held_bytes

    def check(self, generation: Generation) -> ResolvedRequest:
        """Resolve a generation's request, and check the server's limits and its memory.

        Raises:
            RequestError: the model does not support the request, a limit is exceeded, or the memory is too little; the
                message has the smallest that would do.
        """
        with self._lock:
            pipeline, resolved = self._resolve(generation)
            room, largest = self._room(), resolved.passes[-1]
            enough = PROCESS_BYTES + pipeline.memory_upper_bound(largest.width * largest.height)
            if room is None or self._idle_memory + enough <= room:
                return resolved
            least = pipeline.plan(resolved)
        smallest = 0 if least is None else least.minimum_budget - self._job_memory()
        self._check_smallest(smallest, room)
        return resolved

    @staticmethod
    def _check_smallest(smallest: int, room: int | None) -> None:
        if room is not None and smallest > room:
            raise sdonnx.RequestError(
                f"this needs at least {smallest / 1e6:.0f} MB of memory; the server may use {room / 1e6:.0f} MB; "
                "choose a smaller size"
            )

    def check_upscaling(self, upscaling: Upscaling) -> None:
        """Check the server's limits and the memory of an upscaling.

        Raises:
            NotFound: an upscaler is not served.
            TooLarge: an image would have too many pixels, or all together.
            RequestError: the memory is too little; the message has the smallest that would do.
        """
        most = self.library.settings.max_queued_pixels
        for image in upscaling.images:
            upscaling.check(image, self.library.settings.max_pixels)
        if sum(prod(upscaling.size(image)) for image in upscaling.images) > most:
            raise TooLarge(f"the images would have more than {most} pixels together; send fewer")
        for name in upscaling.packages:
            upscaler = self.library.make_upscaler(name)
            with self._lock:
                room, smallest = self._room(), 0
                for size, factor in {(image.size, upscaling.factor(image)) for image in upscaling.images}:
                    plan = upscaler.plan(size, scale=factor, always=True, memory=MIN)
                    smallest = max(smallest, 0 if plan is None else plan.minimum_budget - self._job_memory())
            self._check_smallest(smallest, room)

    def forecast(self, generation: Generation) -> Forecast:
        """Predict the memory of a generation.

        Raises:
            RequestError: the model does not support the request, or a limit is exceeded.
        """
        with self._lock:
            pipeline, resolved = self._resolve(generation)
            room, plan = self._room(), pipeline.plan(resolved)
            used = self._job_memory()
            if plan is None:
                device = self._device(pipeline.package, {})
                return Forecast(resolved=resolved, peak=None, smallest=None, room=room, components=(), device=device)
            smallest, limit = plan.minimum_budget, self.library.settings.memory
            if limit != MIN and (room is None or smallest - used <= room):
                plan = pipeline.plan(resolved, always=True, memory=MAX if room is None else room + used) or plan
            device = self._device(pipeline.package, plan.execution.avoided)
        return Forecast(
            resolved=resolved,
            peak=plan.peak - used,
            smallest=smallest - used,
            room=room,
            components=tuple(replace(each, peak=each.peak - used) for each in plan.components),
            device=device,
        )

    def macs_per_second(self) -> float:
        """The CPU's multiply-adds per second; measured once."""
        with self._lock:
            if self._speed is None:
                graph = self.library.default.package.graph("unet")
                self._speed = macs_per_second(graph, self.library.settings.threads)
            return self._speed

    def _resolve(self, generation: Generation) -> tuple[sdonnx.Pipeline, ResolvedRequest]:
        settings, request = self.library.settings, generation.request
        limits = {"num_images": settings.max_images, "num_inference_steps": settings.max_steps}
        for name, most in limits.items():
            if type(number := getattr(request, name)) is int and number > most:
                raise sdonnx.RequestError(f"{name} is {number}; this server takes at most {most}")
        for name in ("prompt", "negative_prompt"):
            check_prompt(name, getattr(request, name), settings.max_prompt)
        pipeline = self.library.planner(generation.selection)
        resolved = pipeline.resolve(request)
        for prompts in dict.fromkeys(resolved.request.prompts):
            for name, prompt in asdict(prompts).items():
                check_prompt(name, prompt, settings.max_prompt)
        largest = resolved.passes[-1]
        if largest.width * largest.height > settings.max_pixels:
            raise sdonnx.RequestError(
                f"{largest.width}x{largest.height} has more than this server's {settings.max_pixels} pixels; "
                "choose a smaller size"
            )
        if resolved.steps > settings.max_steps:
            raise sdonnx.RequestError(
                f"{resolved.steps} steps are too many; this server takes at most {settings.max_steps}"
            )
        return pipeline, resolved

    def _device(self, package: Package, avoided: Mapping[str, str]) -> str:
        """The device that is tried first for a package's U-Net, without those that its plan avoids."""
        device, graph = self.library.settings.device, describe_graph(package, "unet")
        if device != "auto":
            return device
        graph["avoided"] = {**graph["avoided"], **avoided}
        return first_choice(device, compute=self.library.settings.compute, **graph)[0]

    def _room(self) -> int | None:
        """Bytes for the whole process once the job that runs has ended; None is no limit."""
        limit = self.library.settings.memory
        if limit in (MAX, MIN):
            return None
        if limit != AUTO:
            return Budget(limit).device_limit
        free = available_memory()
        return None if free is None else resident_memory() + int(FREE_SHARE * free)

    def _job_memory(self) -> int:
        """Bytes that the job that runs will return, and those of the components that are loaded."""
        return max(0, resident_memory() - self._idle_memory)


def check_prompt(name: str, prompt: object, most: int) -> None:
    """Check that a prompt has at most so many characters; raises RequestError."""
    if isinstance(prompt, str) and len(prompt) > most:
        raise sdonnx.RequestError(f"{name} has {len(prompt)} characters; this server takes {most}")
