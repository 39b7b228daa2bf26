"""The memory settings of the whole process: ONNX Runtime's shared CPU arena, and glibc's malloc."""

import logging
import threading
from typing import Any

import numpy as np

from sdonnx_runtime.execution.devices.table import DEVICES
from sdonnx_runtime.execution.ort import load_onnxruntime, session_options
from sdonnx_runtime.execution.process_memory import set_malloc_thresholds, trim_heap
from sdonnx_runtime.execution.strategy import ExecutionPlan
from sdonnx_runtime.graphs.onnx_proto import single_node_model

logger = logging.getLogger(__name__)

USE_ENV_ALLOCATORS = "session.use_env_allocators"

_ZERO = np.zeros((), np.float32)
_MIN_REGION, _MAX_REGION = 1 << 24, 127 << 24  # the most that ONNX Runtime's setting holds


class ProcessMemory:
    """What all sessions of the process share: the CPU arena and the settings of glibc's malloc.

    There is one, PROCESS_MEMORY. ONNX Runtime registers an arena once in a process, and it can't be changed after that:
    the first plan that is executed sets the arena's region, and later plans are made for that region.
    """

    def __init__(self) -> None:
        self.next_region: int = 1 << 28
        """Bytes of the region if the arena is made now."""
        self.arena_region: int | None = None
        """Bytes of the arena's region; None before there is an arena, or if another library made it."""
        self._lock = threading.Lock()
        self._shared: bool | None = None  # None until a session asks for the arena
        self._identity: dict[bool, Any] = {}
        self._first_idle: int | None = None

    def configure(self, plan: ExecutionPlan) -> bool:
        """Apply a plan's settings of the process, before its sessions are opened.

        The arena asks the system for regions: first for ``arena_region`` bytes, then for twice as many each time.
        Freed chunks coalesce; bookkeeping takes 1/32 of a region up front.

        Returns whether the plan's sessions may use the arena: not if their memory was predicted for another region.
        """
        if plan.return_buffers:  # before sessions have allocated
            # without the arena, several heaps would fragment
            set_malloc_thresholds(one_heap=any(each.no_arena for each in (plan.default, *plan.strategies.values())))
        if plan.arena_region is None:
            return True
        self.next_region = plan.arena_region
        if self.arena_region in (None, _valid_region(plan.arena_region)):
            return True
        logger.warning(
            "the memory arena has regions of %d MB, the plan was made for %d MB; running without the arena",
            (self.arena_region or 0) // 10**6,
            plan.arena_region // 10**6,
        )
        return False

    def share_arena(self) -> bool:
        """Make the arena if there is none; returns whether there is one to share."""
        with self._lock:
            if self._shared is None:
                self._shared = self._register(_valid_region(self.next_region))
            return self._shared

    def shrink_arena(self) -> None:
        """Return what no session uses of the arena to the system."""
        if self._shared:
            runtime, session = load_onnxruntime(), self._identity_session(True)
            options = runtime.RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
            binding, value = session.io_binding(), runtime.OrtValue.ortvalue_from_numpy(_ZERO)
            binding.bind_ortvalue_input("x", value)
            binding.bind_ortvalue_output("y", value)  # or the output would be in the arena
            session.run_with_iobinding(binding, options)
            trim_heap()

    def warm_up(self) -> None:
        """Load all that sessions share but the arena, so that `resident_memory` includes it."""
        self._identity_session(False)

    def growth(self, idle: int) -> int:
        """Bytes by which the process has grown since its first plan; ``idle`` is what it has now, without models."""
        if self._first_idle is None:
            self._first_idle = idle
        return max(0, idle - self._first_idle)

    def _register(self, region: int) -> bool:
        runtime = load_onnxruntime()
        info = runtime.OrtMemoryInfo("Cpu", runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, runtime.OrtMemType.DEFAULT)
        growth = dict.fromkeys(("initial_chunk_size_bytes", "max_dead_bytes_per_chunk"), 1 << 16)
        growth |= {"initial_growth_chunk_size_bytes": region, "arena_extend_strategy": 0}
        try:
            runtime.create_and_register_allocator(info, runtime.OrtArenaCfg(growth))
        except Exception as error:
            return "already" in str(error)  # another library of this process registered one
        self.arena_region = region
        self._identity_session(True).run(None, {"x": _ZERO})  # a first, small region, which is never returned
        return True

    def _identity_session(self, shared: bool) -> Any:
        if shared not in self._identity:
            settings = session_options(1, None, {})
            settings.enable_cpu_mem_arena = shared
            settings.add_session_config_entry(USE_ENV_ALLOCATORS, str(int(shared)))
            self._identity[shared] = load_onnxruntime().InferenceSession(
                single_node_model("Identity", 1), settings, providers=[DEVICES["cpu"].provider]
            )
        return self._identity[shared]


def _valid_region(size: int) -> int:
    return min(max(size, _MIN_REGION), _MAX_REGION) & -_MIN_REGION


PROCESS_MEMORY = ProcessMemory()
