"""Measuring one thing in a process of its own: the most memory that a process has had is a mark that never falls."""

import multiprocessing
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import DeviceError
from sdonnx_runtime.execution.components import Components, Runner
from sdonnx_runtime.execution.ort import DEVICES, runtime_version
from sdonnx_runtime.execution.process_memory import peak_memory
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.generation import Generation
from sdonnx_runtime.graphs.onnx_proto import single_node_model
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.request import Request, given
from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ComponentFigures:
    """One component, in a process that runs nothing else."""

    component: str
    precision: str
    """How the weights are stored."""
    provider: str
    """ONNX Runtime's name for the device."""
    load_s: float
    """Opening the session, seconds."""
    first_s: float
    """The first run, seconds."""
    median_s: float
    """The runs after it, seconds."""
    peak_rss_mb: float
    """The most resident memory, loading included, MB of a million bytes."""
    on_cpu: Mapping[str, int]
    """How many nodes of each operator ran on the CPU because the device lacks it; none where the device is the CPU."""


@dataclass(frozen=True, kw_only=True)
class ImageFigures:
    """Pictures from a prompt as ``sdonnx run`` makes them: components are opened and let go in turn."""

    num_inference_steps: int
    total_s: float
    """From the request to the pictures, opening the components included, seconds."""
    load_s: float
    """Opening the components, seconds."""
    first_step_s: float
    """The first step, opening the U-Net included, seconds."""
    step_s: float
    """The median of the steps after it, seconds; where there is one step, that one."""
    peak_rss_mb: float
    """The most resident memory, MB of a million bytes."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One run of a component."""

    inputs: Mapping[str, AnyArray]
    outputs: Mapping[str, AnyArray]


@dataclass(frozen=True, kw_only=True)
class ImageRun:
    """What `measure_image` made, and what it cost."""

    figures: ImageFigures
    pixels: AnyArray
    """(N, height, width, 3) uint8."""
    calls: Mapping[str, tuple[Call, ...]]
    """Every run of each component."""


def measure_component(
    package: Package, name: str, feeds: Sequence[Mapping[str, AnyArray]], runs: int, device: str, threads: int | None
) -> tuple[ComponentFigures, list[dict[str, AnyArray]]]:
    """Figures of a component, and its outputs for each of ``feeds``, which take turns in ``runs`` runs, 2 or more."""
    runtime_version()  # importing ONNX Runtime is not loading the component
    path = package.graph(name)
    start = time.perf_counter()
    session = Session(path, device=device, threads=threads)
    seconds = [time.perf_counter() - start]
    outputs: list[dict[str, AnyArray]] = []
    for index in range(runs):
        start = time.perf_counter()
        found = session.run(feeds[index % len(feeds)])
        seconds.append(time.perf_counter() - start)
        if index < len(feeds):
            outputs.append(found)
    peak, chosen = peak_memory(), session.device
    del session
    placed = {} if chosen == "cpu" else operators(path, feeds[0], device=chosen, threads=threads)
    figures = ComponentFigures(
        component=name,
        precision=package.manifest.components[name].precision,
        provider=DEVICES[chosen].provider,
        load_s=seconds[0],
        first_s=seconds[1],
        median_s=statistics.median(seconds[2:]),
        peak_rss_mb=peak / 1e6,
        on_cpu=placed.get(DEVICES["cpu"].provider, {}),
    )
    return figures, outputs


def operators(
    path: Path, feeds: Mapping[str, AnyArray], *, device: str = "auto", threads: int | None = None
) -> dict[str, dict[str, int]]:
    """Where a graph's nodes run: for each of ONNX Runtime's providers, how many of each operator; it is run once.

    Raises:
        PackageError, DeviceError: as `Session` and `Session.run` do.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = Session(path, device=device, threads=threads, profile=Path(folder) / "run")
        session.run(feeds)
        events = session.finish_profile()
    placed: dict[str, Counter[str]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            placed.setdefault(event["args"]["provider"], Counter())[event["args"]["op_name"]] += 1
    return {provider: dict(count) for provider, count in placed.items()}


def macs_per_second(path: Path, threads: int | None = None) -> float:
    """How many multiplications with additions the CPU does in float32, in large matrices, here and now.

    Args:
        path: any graph; it isn't opened.
        threads: as for `Session`.
    """
    session = Session(
        path, device="cpu", threads=threads, model=single_node_model("MatMul", 2, _SIDE, _SIDE), frugal=True
    )
    feeds, times = {"x": np.ones((_SIDE, _SIDE), np.float32)}, list[float]()
    for _ in range(8):
        start = time.perf_counter()
        session.run(feeds)
        times.append(time.perf_counter() - start)
    return _SIDE**3 / min(times)


_SIDE = 1024


class _Recorder(Runner):
    """A runner that keeps what components were given and gave."""

    def __init__(self, components: Components) -> None:
        super().__init__(components)
        self.calls: dict[str, tuple[Call, ...]] = {}

    def __call__(self, name: str, feeds: Mapping[str, AnyArray], variant: str = "plain") -> dict[str, AnyArray]:
        outputs = super().__call__(name, feeds, variant)
        self.calls[name] = (*self.calls.get(name, ()), Call(inputs=dict(feeds), outputs=outputs))
        return outputs


def measure_image(package: Package, request: Request, device: str, threads: int | None) -> ImageRun:
    """The pictures of a checked request."""
    runtime_version()
    start = time.perf_counter()

    def opened(path: Path, *_: object) -> Session:
        return Session(path, device=device, threads=threads)

    run = _Recorder(Components(package, opened, keep_loaded=False))
    generation = Generation(package, run, SchedulerConfig.from_dict(package.manifest.scheduler), request)
    for _ in generation.steps():
        pass
    result = given(generation.result)
    total = time.perf_counter() - start
    steps = result.timings.steps
    figures = ImageFigures(
        num_inference_steps=given(request.num_inference_steps),
        total_s=total,
        load_s=sum(result.timings.load.values()),
        first_step_s=steps[0],
        step_s=statistics.median(steps[1:] or steps),
        peak_rss_mb=peak_memory() / 1e6,
    )
    pixels = np.stack([np.asarray(image) for image in result.images])
    return ImageRun(figures=figures, pixels=pixels, calls=run.calls)


def run_in_subprocess(what: str, function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)`` in a new process; ``what`` names it in the error.

    Raises:
        DeviceError: the process came to a sudden end.
        Exception: what the function raised.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, function, arguments), daemon=True)
    with _deaf():
        process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        raise DeviceError(
            f"the process that measured {what} was ended by the system, most likely for lack of memory; "
            "choose a smaller size or batch"
        ) from None
    finally:
        process.kill()
        process.join()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _work(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        outcome = function(*arguments)
    except Exception as error:
        outcome = error
    sender.send(outcome)


@contextmanager
def _deaf() -> Generator[None, None, None]:
    """Processes that begin meanwhile leave Ctrl-C to this one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
