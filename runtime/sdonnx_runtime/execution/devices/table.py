"""The one table of devices: ONNX Runtime's execution providers, what each takes, and how each is installed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdonnx_runtime.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Device:
    """An ONNX Runtime execution provider and its options."""

    provider: str
    """ONNX Runtime's name of it."""
    title: str
    """Its name in messages."""
    targets: tuple[str, ...] = ("generic",)
    """The targets of TARGETS whose graphs it runs, in order of preference."""
    wheel: str = "onnxruntime"
    """The distribution of ONNX Runtime that it comes with; all of them have the same files."""
    plugin: str | None = None
    """The Python module of the provider's library, beside the wheel: it has ``get_library_path()``."""
    options: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    """Provider options."""
    memory: str | None = None
    """ONNX Runtime's name of its own memory; None is the CPU's."""
    shares_memory: bool = False
    """Whether sessions can have weights in the same memory; if it has a plugin, with that alone."""
    packs_kernels: bool = False
    """Whether each session prepacks the conv weights for itself, and frees the original ones."""
    memory_limit_option: str | None = None
    """The provider option that caps its memory, in bytes."""
    adapter_option: str | None = None
    """The provider option that chooses one of several adapters by its number."""
    kinds: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: dict[str, Mapping[str, str]]())
    """The provider options that choose an adapter by a word instead, as in ``webgpu:low-power``; without any, the word
    is a type of hardware: cpu, gpu or npu."""
    default_kind: str | None = None
    """The type of hardware that it is without a word; None is the first adapter."""
    one_adapter: bool = False
    """Whether a process opens one adapter, once: other options of later sessions would be ignored."""
    requires: str = ""
    """What the machine must have."""
    hint: str = ""
    """What else is said where it finds no adapter."""
    has_wrap: bool = False
    """Whether it is known to have the mode wrap of Pad."""
    memory_pattern: bool = True
    """Whether buffers are planned from the first run. DirectML can't; on the CPU it needs more memory, no less time."""
    checks_kernels: bool = False
    """Whether it is found out first what its kernels can do; graphs are rewritten around the rest."""
    fixed_sizes: bool = False
    """Whether a session is opened for each size of its inputs: the provider compiles a graph of fixed sizes alone, or
    runs one faster."""
    runs_stages: bool = True
    """Whether a graph may be opened in stages at every step: not where opening one compiles it for long."""
    chooses_compute: bool = False
    """Whether a session can compute in another type than its graph is written in, see `computing.resolve_compute`."""
    auto_avoids: frozenset[str] = frozenset()
    """Precisions of generic graphs that ``auto`` leaves to the next device, which runs them faster."""
    needs_optimizing: bool = True
    """Whether ONNX Runtime optimizes graphs for it. OpenVINO optimizes them itself; to fold constants before would cost
    seconds and gigabytes."""
    lacks: frozenset[str] = frozenset()
    """Operators that are most of some graphs' arithmetic, and that it doesn't run; such a graph is not opened."""


DEVICES: dict[str, Device] = {
    "cuda": Device(
        provider="CUDAExecutionProvider",
        title="CUDA",
        wheel="onnxruntime-gpu",
        targets=("cuda", "generic"),
        memory="cuda",
        shares_memory=True,
        # Growing by powers of two could take twice the memory of a small GPU.
        options={"arena_extend_strategy": "kSameAsRequested"},
        memory_limit_option="gpu_mem_limit",
        adapter_option="device_id",
        requires="an NVIDIA GPU with its driver",
    ),
    "directml": Device(
        provider="DmlExecutionProvider",
        title="DirectML",
        wheel="onnxruntime-directml",
        targets=("directml", "generic"),
        memory="dml",
        adapter_option="device_id",
        requires="Windows and a GPU with a Direct3D 12 driver",
        memory_pattern=False,
        fixed_sizes=True,
    ),
    "webgpu": Device(
        provider="WebGpuExecutionProvider",
        title="WebGPU",
        memory="webgpu",
        shares_memory=True,
        packs_kernels=True,
        targets=("webgpu", "generic"),
        plugin="onnxruntime_ep_webgpu",
        # The adapter is kept after its last session, with the shaders that were compiled for it.
        options={"powerPreference": "high-performance", "preserveDevice": "1"},
        # The provider takes the fastest GPU, or the one of the least power; it has no option for any other.
        kinds={name: {"powerPreference": name} for name in ("high-performance", "low-power")},
        one_adapter=True,
        requires="a GPU with a Vulkan, Direct3D 12 or Metal driver",
        checks_kernels=True,
    ),
    "openvino": Device(
        provider="OpenVINOExecutionProvider",
        title="OpenVINO",
        targets=("openvino", "generic"),
        plugin="onnxruntime_ep_openvino",
        kinds={"cpu": {}, "gpu": {}, "npu": {}},
        default_kind="cpu",
        requires="Windows or Linux on x86-64, and an Intel CPU, GPU or NPU",
        hint="its plugin offers a CPU device on Intel's CPUs alone; use --device cpu on others",
        fixed_sizes=True,
        runs_stages=False,
        chooses_compute=True,
        needs_optimizing=False,
        auto_avoids=frozenset({"int8"}),
        lacks=frozenset({"QLinearConv", "QLinearMatMul"}),  # ONNX's own and Microsoft's, with channels last
    ),
    "cpu": Device(provider="CPUExecutionProvider", title="the CPU", has_wrap=True, memory_pattern=False),
}
"""In the order in which ``auto`` tries them; the extra of sdonnx that installs a device has its name."""


@dataclass(frozen=True)
class DeviceName:
    """A device as it is asked for: ``cuda``, or one of its adapters: ``cuda:1``, ``webgpu:low-power``."""

    base: str
    """A key of DEVICES."""
    adapter: int | str | None = None
    """The number of an adapter or a word of `Device.kinds`; None is the provider's own choice."""

    def __str__(self) -> str:
        return self.base if self.adapter is None else f"{self.base}:{self.adapter}"

    @property
    def device(self) -> Device:
        """Its entry in DEVICES."""
        return DEVICES[self.base]

    @classmethod
    def parse(cls, text: str) -> "DeviceName":
        """Raises RequestError if there is no such device."""
        base, colon, adapter = text.partition(":")
        if base not in DEVICES:
            raise RequestError(f"there is no device '{text}'; choose auto, {', '.join(DEVICES)}")
        device = DEVICES[base]
        if not colon:
            return cls(base)
        if adapter in device.kinds:
            return cls(base, adapter)
        has_numbers = device.adapter_option is not None or device.plugin is not None
        if has_numbers and adapter.isascii() and adapter.isdecimal() and len(adapter) < _DIGITS:
            return cls(base, int(adapter))
        others = [f"{base}:0, {base}:1 and so on"] * has_numbers + [f"{base}:{each}" for each in device.kinds]
        raise RequestError(f"there is no device '{text}'; choose {', '.join([base, *others])}")


_DIGITS = 4
"""More than a number of an adapter has."""


def base_name(name: str) -> str:
    """The device without its adapter: cuda of cuda:1; auto is itself."""
    return name.partition(":")[0]


def check_name(name: str) -> None:
    """Raise RequestError if there is no device of that name, whether it can be used here or not."""
    if name != "auto":
        DeviceName.parse(name)
