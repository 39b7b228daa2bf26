"""What bench/gpu.py measures, each in a process of its own: functions that yield a row for each result."""

import platform
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_sizes import SIZES
from gpu_memory import PeakMemory
from gpu_models import load_torch, write_graph
from openvino_models import repeat_latents
from runtime_base import Feeds
from sdonnx_export.models.components import COMPONENTS
from sdonnx_export.operators.precision import Precision
from sdonnx_runtime.execution import ort
from sdonnx_runtime.execution.devices.adapters import device_statuses
from sdonnx_runtime.execution.devices.table import DEVICES, DeviceName
from sdonnx_runtime.execution.running.device_array import freeze
from sdonnx_runtime.execution.session import Session
from sdonnx_runtimes import Sdonnx

from sdonnx.benchmark.cpu import cpu_name

Row = dict[str, Any]
Step = Callable[..., Iterator[Row]]
TOLERANCE = {"fp16": 5e-3, "fp32": 1e-3}
"""Relative error of one layer's output that is rounding: of float16, and of float32 with TF32."""


class LeftOut(Exception):
    """A step that does not apply to this machine; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one run of the benchmark is about."""

    device: str
    """As `--device` of sdonnx."""
    target: str
    """What graphs are exported for, unless a step says otherwise."""
    precision: Precision
    """What graphs that are made for a device compute in, fp16 or fp32; generic ones are fp32."""
    work: Path
    """Where graphs and outputs are kept."""
    models: Mapping[str, str]
    """The key of SIZES for ``sd`` and ``sdxl``."""
    side: int
    """Pixels per axis of the largest feature map of the operators' test."""
    runs: int
    """Timed runs of each model."""


def work(sender: Connection, step: Step, setting: Setting, arguments: Mapping[str, Any]) -> None:
    """Run a step in this process and send its rows; an error is the last row."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    try:
        for row in step(setting, **arguments):
            sender.send(row)
    except LeftOut as reason:
        sender.send({"left_out": str(reason)})
    except Exception as error:  # also what a broken driver or library raises: the next step has to go on
        traceback.print_exc()
        sender.send({"failed": f"{type(error).__name__}: {ort.first_line(error)}"})


def describe(setting: Setting) -> Iterator[Row]:
    """Yield versions and names; then run one convolution."""
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-webgpu",
                 "onnxruntime-ep-webgpu", "torch", "diffusers"):  # fmt: skip
        with suppress(PackageNotFoundError):
            yield {"what": name, "text": version(name)}
    yield {"what": "providers", "text": ", ".join(ort.load_onnxruntime().get_available_providers())}
    yield {"what": "machine", "text": f"{platform.platform()}, Python {platform.python_version()}, {cpu_name()}"}
    base = DeviceName.parse(setting.device).base
    status = next(each for each in device_statuses() if each.device == base)
    adapters = "; ".join(f"{base}:{number} is {name}" for number, name in status.adapters.items()) or "of unknown name"
    yield {"what": base, "text": status.problem or f"{status.provider} {status.version}, {adapters}"}
    yield {"what": "GPU memory", "text": PeakMemory().description}
    conv = next(piece for piece in _pieces(setting) if piece.name.startswith("conv 3x3 320"))
    yield {"what": "a convolution", **_compare_piece(setting, conv)}


def compare_layers(setting: Setting) -> Iterator[Row]:
    """Compare the target's layers, one by one, with torch in float32 on the CPU."""
    for piece in _pieces(setting):
        try:
            yield {"what": piece.name, **_compare_piece(setting, piece)}
        except Exception as error:
            yield {"what": piece.name, "failed": ort.first_line(error)}


def _pieces(setting: Setting) -> list[Any]:
    try:
        from gpu_pieces import pieces
    except ImportError as error:
        raise LeftOut(f"{error.name} is not installed") from None
    return list(pieces(setting.side))


def _compare_piece(setting: Setting, piece: Any) -> Row:
    import torch

    rng, precision = np.random.default_rng(1), _precision(setting, setting.target)
    inputs = [rng.standard_normal(shape, np.float32).astype(np.float16).astype(np.float32) for shape in piece.inputs]
    with torch.inference_mode():
        expected = load_torch(piece.theirs(), "layer.")(*map(torch.from_numpy, inputs)).numpy()
    piece.register()
    folder = setting.work / f"layers-{setting.target}-{precision}" / piece.name.replace(" ", "_")
    path = write_graph("piece", {}, setting.target, precision, folder)
    session = Session(path, device=setting.device, target=setting.target)
    found = session.run({f"x{index}": each for index, each in enumerate(inputs)})["y"]
    error = relative_error(found, expected)
    return {"error": error, "ok": error <= TOLERANCE[precision]}


def count_nodes(setting: Setting) -> Iterator[Row]:
    """Count the nodes of a model's graphs that run on the CPU, and the copies between it and the device."""
    if setting.device == "cpu":
        raise LeftOut("the CPU is the device")
    for component in ("unet", "text_encoder", "vae_decoder"):
        path = _write(setting, "sd", component, setting.target)
        session = Session(path, device=setting.device, target=setting.target, profile=setting.work / component)
        session.run(_feeds(setting, "sd", component))
        copies = sum("Memcpy" in event["name"] for event in session.finish_profile() if event.get("cat") == "Node")
        if (nodes := session.assignment) is None:
            raise LeftOut("it requires ONNX Runtime 1.24")
        text = f"{nodes.describe(setting.device)}; {copies} copies between it and the CPU"
        ok = not nodes.on_cpu and (copies == 0 or component == "text_encoder")  # token ids are copied
        yield {"what": component, "text": text, "ok": ok}


def run_graph(
    setting: Setting, *, model: str, component: str, target: str | None = None, options: Mapping[str, str] = {}
) -> Iterator[Row]:
    """Time a component on the device, with its target's graph and with more options of the execution provider."""
    target = setting.target if target is None else target
    base = DeviceName.parse(setting.device).base
    DEVICES[base] = replace(known := DEVICES[base], options={**known.options, **options})
    path, feeds, memory = _write(setting, model, component, target), _feeds(setting, model, component), PeakMemory()
    for name in feeds.keys() - {"sample", "timestep", "latent_sample"}:
        freeze(feeds[name])  # as in the denoising loop: the text stays on the device
    start = time.perf_counter()
    session = Session(path, device=setting.device, target=target)
    opened = time.perf_counter() - start
    output, times = _time(lambda: next(iter(session.run(feeds).values())), setting.runs)
    yield _row(setting, model, component, output, times, memory) | {"open_s": opened}


def run_torch(
    setting: Setting, *, model: str, component: str, variant: str = "eager", reference: bool = False
) -> Iterator[Row]:
    """Time diffusers' model with the same weights in float16; a ``reference`` is float32 without TF32, and runs once.

    The first one of a component is what later outputs are compared with.
    """
    torch, device = _torch(anywhere=reference or setting.device == "cpu")
    dtype = torch.float32 if reference or device == "cpu" else torch.float16
    memory, network = PeakMemory(), _torch_model(setting, model, component, device, dtype)
    if variant == "channels_last":
        network = network.to(memory_format=torch.channels_last)
    if variant == "compile":
        network.forward = torch.compile(network.forward, mode="reduce-overhead", fullgraph=True)
    inputs = {
        name: torch.from_numpy(value).to(device, dtype if value.ndim > 0 else torch.float32)
        for name, value in repeat_latents(_feeds(setting, model, component)).items()
    }
    added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
    inputs |= {"added_cond_kwargs": added} if added else {}

    def run() -> np.ndarray:
        with torch.no_grad():
            result = network(**inputs) if component == "unet" else network.decode(inputs["latent_sample"])
        return result.sample.float().cpu().numpy()  # waits for the device

    output, times = _time(run, 0 if reference else setting.runs)
    yield _row(setting, model, component, output, times, memory)
    if not (expected := _reference(setting, model, component)).exists():
        np.save(expected, output)


def _torch(*, anywhere: bool) -> tuple[Any, str]:
    """Import torch; return it and its device, which may be the CPU if it is to run ``anywhere``."""
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise LeftOut(f"{error.name} is not installed") from None
    diffusers.utils.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cpu" and not anywhere:
        raise LeftOut(f"torch {torch.__version__} has no GPU here")
    return torch, device


def _torch_model(setting: Setting, model: str, component: str, device: str, dtype: Any) -> Any:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kind = UNet2DConditionModel if component == "unet" else AutoencoderKL
    with torch.device("meta"):
        network = kind.from_config(_config(setting, model, component)).to(dtype)
    network = network.to_empty(device=device)
    if component != "unet":
        network.encoder = network.quant_conv = None
    return load_torch(network)


def _row(
    setting: Setting, model: str, component: str, output: np.ndarray, times: list[float], memory: PeakMemory
) -> Row:
    first, *later = times
    row: Row = {"first_s": first, "vram_mb": memory.peak_mb()}
    if later:
        row |= {"ms": 1000 * statistics.median(later), "fastest_ms": 1000 * min(later)}
    if _reference(setting, model, component).exists():
        error = relative_error(output, np.load(_reference(setting, model, component)))
        row |= {"error": error, "ok": bool(error <= 1e-2)}
    return row


def _time(run: Callable[[], np.ndarray], runs: int) -> tuple[np.ndarray, list[float]]:
    """Run once and ``runs`` times more; return the last output and the seconds of each."""
    times = [time.perf_counter()]
    for _ in range(runs + 1):
        output = run()
        times.append(time.perf_counter())
    return output, np.diff(times).tolist()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm((found - expected).ravel()) / np.linalg.norm(expected.ravel()))


def _precision(setting: Setting, target: str) -> Precision:
    return "fp32" if target == "generic" else setting.precision


def _config(setting: Setting, model: str, component: str) -> dict[str, Any]:
    return SIZES[setting.models[model]][COMPONENTS[component].part]


def _write(setting: Setting, model: str, component: str, target: str) -> Path:
    precision = _precision(setting, target)
    folder = setting.work / f"{model}-{component}-{target}-{precision}"
    return write_graph(component, _config(setting, model, component), target, precision, folder)


def _feeds(setting: Setting, model: str, component: str) -> Feeds:
    if component == "text_encoder":
        return {"input_ids": np.arange(77, dtype=np.int64)[None]}
    return Sdonnx(setting.work, setting.models[model]).feeds(component)


def _reference(setting: Setting, model: str, component: str) -> Path:
    return setting.work / f"{model}-{component}-reference.npy"
