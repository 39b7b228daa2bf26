"""Pipelines on the nodes of a cluster, and the requests that each of them takes when it is free."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, TypeAlias, cast

from ray.exceptions import RayError, RayTaskError
from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.execution.devices.choosing import DEVICE_NOTES, describe_graph, first_choice
from sdonnx_runtime.execution.devices.table import DeviceName
from sdonnx_runtime.execution.ort import candidates, first_line, runtime_version
from sdonnx_runtime.execution.process_memory import peak_memory
from sdonnx_runtime.outputs.metadata import encode_png

import sdonnx
from sdonnx.benchmark.cpu import cpu_name
from sdonnx.cli.generate import Margins, resolve_fields
from sdonnx.cluster.connection import ray
from sdonnx.cluster.packages import Source, check_sources
from sdonnx.cluster.resources import Actors, num_gpus

_MAX_LOSSES = 3
"""Actors that a request may lose; the next one would be lost too."""

_FIRST_NOTE, _PATIENCE = 30.0, 900.0
"""Seconds without any actor: until it is said, and until it is an error; cloud machines take minutes to start."""

Prepare: TypeAlias = Callable[[], dict[str, Any]]
"""Makes the fields of a `Request`, or raises SdonnxError; called again for another attempt."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How an actor opens its pipeline, and writes its images."""

    arguments: Mapping[str, Any]
    """Of `sdonnx.load`, but threads and memory."""
    loras: Sequence[Lora] = ()
    ignore_unmatched: bool = False
    embeddings: Sequence[tuple[str, str | None]] = ()
    sources: tuple[Source, ...] = ()
    """All packages and files."""
    margins: Margins | None = None
    """Pixels to outpaint."""
    enlarge: bool = True
    """Whether the images of very small models are saved larger."""
    provenance: bool = True


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What images depend on in their last bits."""

    node: str
    """Its IP address."""
    cpu: str
    provider: str
    """Of the device that ran the U-Net."""
    compute: str
    """f32, bf16 or f16."""
    onnxruntime: str
    sdonnx: str


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The images of a request."""

    index: int
    """Which request."""
    result: sdonnx.Result
    """Without images."""
    pngs: tuple[bytes | None, ...]
    """PNG files; None where an image is refused."""
    machine: Machine
    actor: str
    """A name of the actor."""
    seconds: float
    """Of its pipeline."""
    peak_memory: int
    """Of the actor's process up to now, in bytes."""
    notes: tuple[str, ...] = ()
    """What its process has said of devices since its last request: what ``auto`` took, and why not another."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A request is invalid, or failed."""

    index: int
    error: sdonnx.SdonnxError | MemoryError


class ImageActor:
    """A pipeline on a node, in a process of its own."""

    def __init__(self, opening: Opening, actors: Actors) -> None:
        self._opening, self._actors = opening, actors
        self._pipe: sdonnx.Pipeline | None = None
        self._notes = _keep_notes()

    def open(self) -> sdonnx.SdonnxError | None:
        """Open the pipeline; returns why that is not possible."""
        node = str(ray.util.get_node_ip_address())
        try:
            check_sources(self._opening.sources, node)
            pipe = sdonnx.load(
                **self._opening.arguments, threads=self._actors.threads, memory=self._actors.memory, keep_loaded=True
            )
            pipe.set_loras(self._opening.loras, ignore_unmatched=self._opening.ignore_unmatched)
            pipe.set_embeddings(self._opening.embeddings)
            _check_device(pipe.package, self._opening.arguments)
            self._pipe = pipe
        except sdonnx.SdonnxError as error:
            return error if str(error).startswith("node ") else type(error)(f"node {node}: {error}")
        return None

    def generate(self, index: int, fields: dict[str, Any]) -> Generated | Failed:
        """Generate the images of a request."""
        pipe, opening = self._pipe, self._opening
        assert pipe is not None  # noqa: S101 — for the type checker
        start = time.monotonic()
        try:
            resolved = resolve_fields(pipe, fields, opening.margins)
            stream = pipe.stream(resolved)
            for _ in stream:
                pass
            result = stream.result
        except (sdonnx.SdonnxError, MemoryError) as error:
            return Failed(index=index, error=error)
        keeps_size = resolved.request.padding_mask_crop is not None
        factor = pipe.package.manifest.defaults.enlarge if opening.enlarge and not keeps_size else 1
        pngs = tuple(
            None if each in result.refused else encode_png(result, each, enlarge=factor, provenance=opening.provenance)
            for each in range(len(result.images))
        )
        return Generated(
            index=index,
            result=replace(result, images=()),
            pngs=pngs,
            machine=_describe_machine(stream.devices.get("unet", next(iter(stream.devices.values()))), result.compute),
            actor=ray.get_runtime_context().get_actor_id(),
            seconds=time.monotonic() - start,
            peak_memory=peak_memory(),
            notes=tuple(self._notes.take()),
        )


def _check_device(package: sdonnx.Package, arguments: Mapping[str, Any]) -> None:
    """Check that a device that was asked for by its name is here, and computes so; ``auto`` takes one in a run."""
    device = arguments["device"]
    if device != "auto":
        candidates(device, package.manifest.target, str(package.root))
        first_choice(device, compute=arguments["compute"], **describe_graph(package, "unet"))


def _describe_machine(device: str, compute: str) -> Machine:
    return Machine(
        node=str(ray.util.get_node_ip_address()),
        cpu=cpu_name(),
        provider=DeviceName.parse(device).device.provider,
        compute=compute,
        onnxruntime=runtime_version(),
        sdonnx=version("sdonnx"),
    )


class _Notes(logging.Handler):
    """Keeps what is logged of devices."""

    def __init__(self) -> None:
        super().__init__()
        self._texts = list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self._texts.append(record.getMessage())

    def take(self) -> list[str]:
        """The lines since the last call."""
        texts, self._texts = self._texts, []
        return texts


def _keep_notes() -> _Notes:
    """Keep what this process logs of devices from now on."""
    logger, notes = logging.getLogger(DEVICE_NOTES), _Notes()
    logger.setLevel(logging.INFO)
    logger.addHandler(notes)
    return notes


class ActorPool:
    """The actors of a run; one that ends before its request is replaced, on any node that has room.

    Args:
        opening: what they open.
        actors: how many they are, and what each takes.
        note: is called with a line about actors that are lost, or missing.
    """

    def __init__(self, opening: Opening, actors: Actors, note: Callable[[str], object]) -> None:
        self._actors, self._note = actors, note
        self._class = ray.remote(ImageActor).options(
            num_cpus=actors.threads,
            num_gpus=num_gpus(opening.arguments["device"]),
            memory=actors.memory,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )
        self._opening = ray.put(opening)
        self._starting: dict[Any, Any] = {}
        """Actors, by the reference of what `open` will return."""
        self._running: dict[Any, tuple[Any, int]] = {}
        """Actors and requests, by the reference of the images."""
        self._idle: list[Any] = []
        self._lost_starts = 0
        self._absent_since: float | None = None
        self._noted = False
        self._said = set[str]()
        """What actors have said of their devices."""

    def run(self, requests: Sequence[Prepare]) -> Generator[Generated | Failed, None, None]:
        """Generate the images of requests, the first ones first; closing the generator ends the actors.

        Raises:
            SdonnxError: an actor can't open the pipeline, or no actor can be started.
        """
        waiting, losses = deque(range(len(requests))), Counter[int]()
        try:
            for _ in range(min(self._actors.count, len(requests))):
                self._start()
            while waiting or self._running:
                while waiting and self._idle:
                    index = waiting.popleft()
                    try:
                        fields = requests[index]()
                    except (sdonnx.SdonnxError, MemoryError) as error:
                        yield Failed(index=index, error=error)
                    else:
                        actor = self._idle.pop()
                        self._running[actor.generate.remote(index, fields)] = actor, index
                for done in self._wait():
                    if done in self._starting:
                        self._open(done)
                        continue
                    _, index = self._running[done]
                    outcome = self._finish(done, losses)
                    if outcome is None:
                        waiting.appendleft(index)
                    else:
                        yield outcome
        finally:
            self._stop()

    def _start(self) -> None:
        actor = self._class.remote(self._opening, self._actors)
        self._starting[actor.open.remote()] = actor

    def _wait(self) -> list[Any]:
        """Wait a little for anything to be done."""
        pending = [*self._starting, *self._running]
        if not pending:
            return []
        done, _ = cast("tuple[list[Any], list[Any]]", ray.wait(pending, timeout=0.5))
        if self._running or self._idle or done:
            self._absent_since = None
            return done
        now = time.monotonic()
        self._absent_since = now if self._absent_since is None else self._absent_since
        needed = f"a node with {self._actors.threads} free CPUs and {self._actors.memory / 1e6:.0f} MB of memory"
        if now - self._absent_since > _PATIENCE:
            raise sdonnx.SdonnxError(f"{needed} did not come within {_PATIENCE / 60:.0f} minutes; see: ray status")
        if now - self._absent_since > _FIRST_NOTE and not self._noted:
            self._noted = True
            self._note(f"waiting for {needed}; Ctrl-C stops it")
        return done

    def _open(self, done: Any) -> None:
        """Let an actor that has opened its pipeline wait for requests."""
        actor = self._starting.pop(done)
        try:
            opened = ray.get(done)
        except RayTaskError:
            raise
        except RayError as error:
            self._lost_starts += 1
            if self._lost_starts < _MAX_LOSSES:
                self._start()
            elif not (self._idle or self._running or self._starting):
                raise sdonnx.SdonnxError(f"no actor can be started: {first_line(error)}") from None
            return
        if isinstance(opened, sdonnx.SdonnxError):
            raise opened
        self._lost_starts = 0
        self._idle.append(actor)

    def _finish(self, done: Any, losses: Counter[int]) -> Generated | Failed | None:
        """The outcome of a request; None if its actor is lost, and another one is to try."""
        actor, index = self._running.pop(done)
        try:
            outcome: Generated | Failed = ray.get(done)
            self._idle.append(actor)
            if isinstance(outcome, Generated):
                self._say(outcome)
            return outcome
        except RayTaskError:
            raise
        except RayError as error:
            self._start()
            losses[index] += 1
            if losses[index] < _MAX_LOSSES:
                self._note(f"an actor is lost, its request is done by another one: {first_line(error)}")
                return None
        remedy = "give a smaller size, or more --memory-per-actor"
        lost = sdonnx.DeviceError(f"{_MAX_LOSSES} actors ended while they generated it, maybe out of memory; {remedy}")
        return Failed(index=index, error=lost)

    def _say(self, generated: Generated) -> None:
        """Note what an actor says of its devices, unless another has said it."""
        for text in generated.notes:
            if text not in self._said:
                self._said.add(text)
                self._note(f"node {generated.machine.node}: {text}")

    def _stop(self) -> None:
        """End all actors."""
        for actor in (*self._idle, *self._starting.values(), *(actor for actor, _ in self._running.values())):
            with suppress(RayError, ValueError):
                ray.kill(actor)
