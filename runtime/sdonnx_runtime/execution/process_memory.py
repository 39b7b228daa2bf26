"""Memory of this process and of the machine, and glibc's malloc."""

import ctypes
import os
import re
import sys
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from sdonnx_runtime.execution.control_groups import cgroup_memory
from sdonnx_runtime.execution.cpu import read_for_platform, read_proc_field, run_command

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # parameters of mallopt, from malloc.h
_MMAP_THRESHOLD = 1 << 18  # bytes

_MADV_DONTNEED = 4  # from mman.h
_UNMAP_SECONDS = 0.05  # a core packs about 50 MB of weights meanwhile
_CLEAN_CODE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) (?:r-xp \S+ \S+ [1-9].*|r--p .*\.so[\d.]*)\n(?:[A-Z].*\n)*?Anonymous: +0 kB",
    re.MULTILINE,
)  # the mappings of programs and libraries in /proc/self/smaps that no page was written to


def peak_memory() -> int:
    """The peak resident memory of this process since it began, in bytes; OSError if the system doesn't report it."""
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
    """The resident memory of this process now, in bytes; its peak where the system doesn't report it."""
    now = read_proc_field(Path("/proc/self/status"), "VmRSS")
    return int(now.split()[0]) * 1024 if now else peak_memory()


def available_memory() -> int | None:
    """Bytes that this process can still take without swapping, within its control groups' limits; None is unknown."""
    readers = {"linux": _linux_available, "darwin": _macos_available, "win32": _windows_available}
    available = read_for_platform({system: lambda reader=reader: str(reader()) for system, reader in readers.items()})
    return int(available) if available else None


def _linux_available() -> int:
    free = int(read_proc_field(Path("/proc/meminfo"), "MemAvailable").split()[0]) * 1024
    return min([free, *cgroup_memory()])


def _macos_available() -> int:
    """The bytes of pages that are free or can be freed at once."""
    listing = run_command("/usr/bin/vm_stat")
    pages = {key.strip(): value.strip(" .") for key, _, value in (line.partition(":") for line in listing.splitlines())}
    size = next(int(word) for word in listing.split() if word.isdigit())  # "(page size of 16384 bytes)"
    return size * sum(int(pages[f"Pages {kind}"]) for kind in ("free", "inactive", "speculative", "purgeable"))


def _windows_available() -> int:
    status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX of sysinfoapi.h: its size and the load, the total, the free
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(status):
        raise OSError("Windows does not report the free memory")
    return status[2]


def _windows_peak() -> int:
    counters = (ctypes.c_uint64 * 9)(72)  # PROCESS_MEMORY_COUNTERS of psapi.h: its size and page faults, the peak
    kernel = ctypes.windll.kernel32
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.K32GetProcessMemoryInfo.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
    if not kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), counters, 72):
        raise OSError("Windows does not report this process's memory")
    return counters[1]


def trim_heap() -> None:
    """Return malloc's free memory to the system (glibc; nothing elsewhere)."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def unmap_code() -> None:
    """Take the code of this process's libraries out of its resident memory (Linux; nothing elsewhere).

    What runs again comes back from the system's page cache. How much of a library is resident otherwise depends on how
    its file came into that cache: since Linux 6.18 the first access maps a whole folio, of up to 2 MiB.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            _unmap(_CLEAN_CODE.findall(Path("/proc/self/smaps").read_bytes()))


MAPPINGS = threading.Lock()
"""Is held while addresses of mappings are used, and where sessions that have some are closed: what another thread has
allocated at such an address would become zeros."""


def can_unmap() -> bool:
    """Whether `unmap_files` does anything."""
    return sys.platform == "linux"


def unmap_files(folder: Path) -> None:
    """Take shared read-only mappings of a folder's files out of this process's resident memory (Linux alone).

    What is read again comes back from the system's page cache.
    """
    if can_unmap():
        with suppress(OSError, AttributeError):
            path = re.escape(os.fsencode(folder.resolve()))  # as the kernel has it, without links
            mapped = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) r--s .* " + path + rb"/[^/\n]*$", re.MULTILINE)
            with MAPPINGS:
                _unmap(mapped.findall(Path("/proc/self/maps").read_bytes()))


@contextmanager
def keep_unmapping(folder: Path) -> Generator[None]:
    """Call `unmap_files` again and again, from a thread, and at the end: what is read once doesn't add up meanwhile."""
    done = threading.Event()

    def unmap() -> None:
        while not done.wait(_UNMAP_SECONDS):
            unmap_files(folder)

    thread = threading.Thread(target=unmap, name="sdonnx unmap", daemon=True)
    if can_unmap():
        thread.start()
    try:
        yield
    finally:
        done.set()
        if can_unmap():
            thread.join()
        unmap_files(folder)


def _unmap(ranges: Iterable[tuple[bytes, bytes]]) -> None:
    """Unmap pages from and up to addresses, in hexadecimal digits; the mappings stay."""
    madvise = ctypes.CDLL(None).madvise
    for start, end in ranges:
        first, last = int(start, 16), int(end, 16)
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


def set_malloc_thresholds(*, one_heap: bool) -> None:
    """Make malloc return large buffers to the system as soon as they are free (glibc; nothing elsewhere).

    By default glibc raises the threshold with each larger buffer that is freed, and its heap fragments. ``one_heap``
    lets new threads share a heap for small buffers, which is slower if many allocate at a time.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            c_library = ctypes.CDLL(None)
            c_library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
            if one_heap:
                c_library.mallopt(_M_ARENA_MAX, 1)
