"""Measure one thing in its own process, because the peak memory of a process never falls."""

import multiprocessing
import os
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
from sdonnx_runtime.execution.devices.choosing import describe_graph
from sdonnx_runtime.execution.devices.table import DEVICES, DeviceName
from sdonnx_runtime.execution.ort import runtime_version
from sdonnx_runtime.execution.process_memory import peak_memory
from sdonnx_runtime.execution.running.device_array import Tensor, all_numpy
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.generation import Models, generate_images, run_to_end
from sdonnx_runtime.graphs.onnx_proto import single_node_model
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.pipeline import Pipeline
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig
from sdonnx_runtime.storage.staging import open_staging, remove_stale

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ComponentFigures:
    """Time and memory of one component, in a process that runs nothing else."""

    component: str
    precision: str
    """The precision of the weights."""
    provider: str
    """The execution provider of ONNX Runtime."""
    compute: str
    """What it computes in: f32, bf16 or f16."""
    load_s: float
    """Seconds to create the session."""
    first_s: float
    """Seconds of the first run."""
    median_s: float
    """Median of the later runs, seconds."""
    peak_rss_mb: float
    """Peak resident memory including loading, in 10**6 bytes."""
    on_cpu: Mapping[str, int]
    """Number of nodes by operator that ran on the CPU instead of the device; empty if the device is the CPU."""


@dataclass(frozen=True, kw_only=True)
class ImageFigures:
    """Time and memory of images from a prompt, as in ``sdonnx run``: components are loaded and unloaded in turn."""

    num_inference_steps: int
    total_s: float
    """Seconds from the request to the images, including loading the components."""
    load_s: float
    """Seconds to load the components."""
    first_step_s: float
    """Seconds of the first step, including loading the U-Net."""
    step_s: float
    """Median of the later steps, seconds; of one step, that step."""
    peak_rss_mb: float
    """Peak resident memory, in 10**6 bytes."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """The inputs and outputs of one run of a component."""

    inputs: Mapping[str, AnyArray]
    outputs: Mapping[str, AnyArray]


@dataclass(frozen=True, kw_only=True)
class ImageRun:
    """The images that `measure_image` generated, with every run of the components."""

    figures: ImageFigures
    pixels: AnyArray
    """(N, height, width, 3) uint8."""
    calls: Mapping[str, tuple[Call, ...]]
    """Every run of each component."""


def measure_component(
    package: Package, name: str, feeds: Sequence[Mapping[str, AnyArray]], runs: int, options: Mapping[str, Any]
) -> tuple[ComponentFigures, list[dict[str, AnyArray]]]:
    """Measure a component in ``runs`` (2 or more) runs that cycle through ``feeds``; also return its outputs.

    ``options`` are of `Session`: the device, what it computes in, the threads, and the cache.
    """
    runtime_version()  # imports ONNX Runtime, which is not to be measured
    path = package.graph(name)
    start = time.perf_counter()
    graph = describe_graph(package, name)
    session = Session(path, **graph, **options)
    session.open_for(feeds[0])
    seconds = [time.perf_counter() - start]
    outputs: list[dict[str, AnyArray]] = []
    for index in range(runs):
        start = time.perf_counter()
        output = session.run(feeds[index % len(feeds)])
        seconds.append(time.perf_counter() - start)
        if index < len(feeds):
            outputs.append(output)
    peak, used_device, used_compute = peak_memory(), session.device, session.compute
    del session
    used = {**graph, **options, "device": used_device}
    by_provider = {} if used_device == "cpu" else count_operators(path, feeds[0], **used)
    figures = ComponentFigures(
        component=name,
        precision=package.manifest.components[name].precision,
        provider=DeviceName.parse(used_device).device.provider,
        compute=used_compute,
        load_s=seconds[0],
        first_s=seconds[1],
        median_s=statistics.median(seconds[2:]),
        peak_rss_mb=peak / 1e6,
        on_cpu=by_provider.get(DEVICES["cpu"].provider, {}),
    )
    return figures, outputs


def count_operators(path: Path, feeds: Mapping[str, AnyArray], **options: Any) -> dict[str, dict[str, int]]:
    """Run a graph once and count its nodes by execution provider and operator; ``options`` are of `Session`.

    Raises:
        PackageError, DeviceError: as `Session` and `Session.run`.
    """
    temporary = Path(tempfile.gettempdir())
    remove_stale(temporary)
    with open_staging(temporary) as folder:
        session = Session(path, profile=folder / "run", **options)
        session.run(feeds)
        events = session.finish_profile()
    counts: dict[str, Counter[str]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            counts.setdefault(event["args"]["provider"], Counter())[event["args"]["op_name"]] += 1
    return {provider: dict(count) for provider, count in counts.items()}


def macs_per_second(path: Path, threads: int | None = None, device: str = "cpu", compute: str = "auto") -> float:
    """Measure multiply-adds per second, in a MatMul of large matrices; on the CPU in float32.

    Args:
        path: any graph; it is not loaded.
        threads: as for `Session`.
        device: as for `Session`.
        compute: as for `Session`.
    """
    model = single_node_model("MatMul", 2, _SIDE, _SIDE)
    session = Session(path, device=device, compute=compute, threads=threads, model=model, no_arena=True, cache=False)
    feeds, times = {"x": np.ones((_SIDE, _SIDE), np.float32)}, list[float]()
    for _ in range(8):
        start = time.perf_counter()
        session.run(feeds)
        times.append(time.perf_counter() - start)
    return _SIDE**3 / min(times)


_SIDE = 1024


def measure_image(package: Package, request: CompleteRequest, options: Mapping[str, Any]) -> ImageRun:
    """Generate the images of a resolved request, and measure that; ``options`` as of `measure_component`."""
    runtime_version()
    resolved = Pipeline(package, **options).resolve(request)
    start = time.perf_counter()

    calls = dict[str, tuple[Call, ...]]()

    def open_model(
        path: Path, *_: object, target: str, graph_compute: str, avoided: Mapping[str, str], **__: object
    ) -> Session:
        return Session(path, target=target, graph_compute=graph_compute, avoided=avoided, **options)

    def record(
        name: str, _variant: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], _seconds: float
    ) -> None:
        calls[name] = (*calls.get(name, ()), Call(inputs=all_numpy(inputs), outputs=all_numpy(outputs)))

    run = Runner(Components(package, open_model, keep_loaded=False), record)
    models = Models(run=run, package=package, scheduler=SchedulerConfig.from_dict(package.manifest.scheduler))
    result = run_to_end(generate_images(models, resolved))
    total = time.perf_counter() - start
    steps = result.timings.steps
    figures = ImageFigures(
        num_inference_steps=request.num_inference_steps,
        total_s=total,
        load_s=sum(result.timings.load.values()),
        first_step_s=steps[0],
        step_s=statistics.median(steps[1:] or steps),
        peak_rss_mb=peak_memory() / 1e6,
    )
    pixels = np.stack([np.asarray(image) for image in result.images])
    return ImageRun(figures=figures, pixels=pixels, calls=calls)


def run_in_subprocess(task: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call ``function(*arguments)`` in a new process; ``task`` is its name in the error.

    Raises:
        DeviceError: the process died.
        Exception: the function raised it.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(sender, function, arguments), daemon=True)
    try:
        with _hold_sigint():
            process.start()
        sender.close()
        outcome = receiver.recv()
    except EOFError:
        raise DeviceError(
            f"the process that measured {task} was killed by the system, most likely because memory ran out; "
            "choose a smaller size or batch"
        ) from None
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _worker(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and kills this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        outcome = function(*arguments)
    except Exception as error:
        outcome = error
    sender.send(outcome)


def _end_with_parent() -> None:
    """End this process when its parent has ended, also by a signal that let it do nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 — for the type checker
    parent.join()
    os._exit(1)


@contextmanager
def _hold_sigint() -> Generator[None, None, None]:
    """Delay Ctrl-C until the end of the context; processes that are started in it never get it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
