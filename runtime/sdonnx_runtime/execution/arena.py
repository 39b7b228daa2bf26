"""The CPU memory arena that all sessions of the process share."""

import threading
from functools import cache
from typing import Any

import numpy as np

from sdonnx_runtime.execution.ort import DEVICES, load_onnxruntime, session_options
from sdonnx_runtime.execution.process_memory import trim_heap
from sdonnx_runtime.graphs.onnx_proto import single_node_model


def share_arena(region: float = 1 << 28) -> bool:
    """Makes the arena that the sessions on the CPU share, once in a process; later calls change nothing.

    Args:
        region: bytes that it first asks the system for; the next region is twice as large. What is put into one and
            done with is one piece again. Of each 32 bytes one is taken for its book, at once.

    Returns whether there is one.
    """
    with _sharing:
        _shared.extend([] if _shared else [_registered(min(max(int(region), _SMALLEST), _LARGEST) & -_SMALLEST)])
    return _shared[0]


_sharing, _shared = threading.Lock(), list[bool]()


USE_ENV_ALLOCATORS = "session.use_env_allocators"


_ZERO = np.zeros((), np.float32)


_SMALLEST, _LARGEST = 1 << 24, 127 << 24  # which is the most that ONNX Runtime's setting holds


def _registered(region: int) -> bool:
    runtime = load_onnxruntime()
    where = runtime.OrtMemoryInfo("Cpu", runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, runtime.OrtMemType.DEFAULT)
    growth = dict.fromkeys(("initial_chunk_size_bytes", "max_dead_bytes_per_chunk"), 1 << 16)
    growth |= {"initial_growth_chunk_size_bytes": region, "arena_extend_strategy": 0}
    try:
        runtime.create_and_register_allocator(where, runtime.OrtArenaCfg(growth))
    except Exception as error:
        return "already" in str(error)  # by who else uses ONNX Runtime in this process
    _nothing(True).run(None, {"x": _ZERO})  # its first region, which is never handed back
    return True


def empty_arena() -> None:
    """Hands what no session uses of the shared arena back to the system."""
    if any(_shared):
        options = load_onnxruntime().RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        binding, place = _nothing(True).io_binding(), load_onnxruntime().OrtValue.ortvalue_from_numpy(_ZERO)
        binding.bind_ortvalue_input("x", place)
        binding.bind_ortvalue_output("y", place)  # or what it gives would be in the arena
        _nothing(True).run_with_iobinding(binding, options)
        trim_heap()


def warm_up() -> None:
    """Has in memory what all sessions of this process share, but for the arena."""
    _nothing(False)


@cache
def _nothing(sharing: bool) -> Any:
    """A session that gives what it is given."""
    settings = session_options(1, None, {})
    settings.enable_cpu_mem_arena = sharing
    settings.add_session_config_entry(USE_ENV_ALLOCATORS, str(int(sharing)))
    return load_onnxruntime().InferenceSession(
        single_node_model("Identity", 1), settings, providers=[DEVICES["cpu"].provider]
    )
