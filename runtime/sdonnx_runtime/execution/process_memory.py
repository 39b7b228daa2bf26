"""Memory of this process and of the machine, and glibc's malloc."""

import ctypes
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from sdonnx_runtime.execution.cpu import read_for_platform, read_proc_field


def peak_memory() -> int:
    """The most resident memory that this process has had since it began, in bytes: a mark that never falls.

    Raises:
        OSError: the system does not say.
    """
    if sys.platform == "win32":
        return _windows_peak()
    import resource

    # Linux counts in ru_maxrss what the parent had when it forked; VmHWM is this program's own.
    mark = read_proc_field(Path("/proc/self/status"), "VmHWM")
    if mark:
        return int(mark.split()[0]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def resident_memory() -> int:
    """The resident memory of this process now, in bytes; its peak where the system doesn't say."""
    now = read_proc_field(Path("/proc/self/status"), "VmRSS")
    return int(now.split()[0]) * 1024 if now else peak_memory()


def available_memory() -> int | None:
    """Bytes that this process can still take without swapping, control groups' limits respected; None is unknown."""
    readers = {"linux": _linux_available, "darwin": _macos_available, "win32": _windows_available}
    found = read_for_platform({system: lambda reader=reader: str(reader()) for system, reader in readers.items()})
    return int(found) if found else None


def _linux_available() -> int:
    free = int(read_proc_field(Path("/proc/meminfo"), "MemAvailable").split()[0]) * 1024
    return min([free, *cgroup_memory(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def cgroup_memory(membership: Path, root: Path) -> list[int]:
    """What is left to a process under each limit of its control groups, of version 2 and 1, in bytes.

    Args:
        membership: the file that says which they are, /proc/self/cgroup.
        root: where they are mounted, /sys/fs/cgroup.
    """
    found = list[int]()
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        names = ("memory.max", "memory.current") if controllers == "" else _GROUP_FILES
        place = top / inside.lstrip("/")
        for folder in (place, *place.parents):
            limit, used, cache = (_number(folder / name) for name in (*names, "memory.stat"))
            if limit is not None and used is not None and limit < _NO_LIMIT:
                found.append(limit - used + (cache or 0))
            if folder == top:
                break
    return found


_GROUP_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")


_NO_LIMIT = 1 << 60
"""What a group of version 1 without a limit says is more."""


def _number(path: Path) -> int | None:
    """What a file says; of one of several lines, what is cached and not in use."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None
    if path.name == "memory.stat":
        lines = dict(line.split() for line in text.splitlines() if len(line.split()) == 2)
        return int(lines.get("inactive_file", lines.get("total_inactive_file", 0)))
    return int(text) if text.strip().isdigit() else None


def _macos_available() -> int:
    """Pages that are free or can be at once."""
    listing = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, timeout=5, check=True).stdout
    pages = {key.strip(): value.strip(" .") for key, _, value in (line.partition(":") for line in listing.splitlines())}
    size = next(int(word) for word in listing.split() if word.isdigit())  # "(page size of 16384 bytes)"
    return size * sum(int(pages[f"Pages {kind}"]) for kind in ("free", "inactive", "speculative", "purgeable"))


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of sysinfoapi.h."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "available", "a", "b", "c", "d", "e")),
    )


def _windows_available() -> int:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("Windows does not say how much memory is free")
    return int(status.available)


def trim_heap() -> None:
    """Hands memory that is free back to the system where the C library keeps it (glibc); elsewhere nothing."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def set_malloc_thresholds(*, one_heap: bool) -> None:
    """Makes this process hand large buffers back to the system as soon as they are free (glibc); elsewhere nothing.

    glibc keeps the larger buffers for reuse, the more of them have been freed: by and by they lie about in pieces.

    Args:
        one_heap: makes threads to come take small buffers from one heap too, which is slower if many do at a time.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            c_library = ctypes.CDLL(None)
            c_library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
            if one_heap:
                c_library.mallopt(_M_ARENA_MAX, 1)


_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
"""Of malloc.h."""


_LARGE = 1 << 18
"""Bytes."""


class _MemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of psapi.h."""

    _fields_ = (
        ("cb", ctypes.c_uint32),
        ("page_fault_count", ctypes.c_uint32),
        *((name, ctypes.c_size_t) for name in ("peak_working_set", "working_set", "a", "b", "c", "d", "e", "f")),
    )


def _windows_peak() -> int:
    kernel = ctypes.windll.kernel32
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.K32GetProcessMemoryInfo.argtypes = (ctypes.c_void_p, ctypes.POINTER(_MemoryCounters), ctypes.c_uint32)
    counters = _MemoryCounters(cb=ctypes.sizeof(_MemoryCounters))
    if not kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
        raise OSError("Windows does not say how much memory this process has taken")
    return int(counters.peak_working_set)
