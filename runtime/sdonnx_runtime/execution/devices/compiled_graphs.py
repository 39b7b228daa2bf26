"""Compiled graphs on disk: a device that compiles a graph for long opens it from there the next time.

Each graph is a directory in the user's cache directory, named by a hash of all that it was compiled from::

    compiled/
        8f3a…/
            graph.onnx      one EPContext node, which names the other file
            graph_….bin     the provider's
            entry.json      what it is, and a fingerprint of both files; its time is that of the last use
        .sdonnx-….tmp/      what a process is writing, see `storage.staging`
"""

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from sdonnx_runtime.errors import DeviceError, SdonnxError
from sdonnx_runtime.execution.cpu import cpu_features, usable_cpus
from sdonnx_runtime.execution.devices.adapters import Choice
from sdonnx_runtime.execution.ort import first_line, runtime_version
from sdonnx_runtime.execution.process_memory import keep_unmapping, trim_heap
from sdonnx_runtime.graphs.initializers import Initializer
from sdonnx_runtime.graphs.onnx_proto import decode_model, package_errors
from sdonnx_runtime.storage.cache_directory import user_cache_directory
from sdonnx_runtime.storage.renaming import rename_to_free, replace
from sdonnx_runtime.storage.staging import open_staging, remove_stale

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

GRAPH = "graph.onnx"
_ENTRY = "entry.json"

_LIMIT = 24 * 10**9
"""Bytes: SDXL's U-Net takes 10.3 GB for each size in float32, SD 1.5's 3.4 GB; half of that in 16 bits."""

_DISK_SHARE = 0.5
"""Of the bytes that would be free without compiled graphs: what all of them may take."""

_WRITTEN = 2
"""How many times the bytes of a graph are on disk while it is compiled: its weights may be cast to a file first."""

_UNUSED_DAYS = 90
"""What was not used for so long is deleted, such as the graphs of earlier versions of OpenVINO, which nothing opens."""

_FLOAT32, _FLOAT16 = 4, 2

_SAMPLES, _SAMPLE = 64, 4096
"""How many pieces of a file its fingerprint has, and their bytes: all of it would take longer to read than to open."""

_FORMAT = 2
"""Of an entry. Raise it when the rewriting of graphs before compiling changes, or the fields of `NodeAssignment`."""


@dataclass(frozen=True, kw_only=True)
class CompiledFrom:
    """What a graph is compiled from."""

    key: str
    """A hash of all of it."""
    needed: int
    """About the bytes that the compiled graph takes; a text encoder's tables stay in float32, and are counted less."""

    @classmethod
    def read(
        cls, path: Path, model: bytes | None, sizes: Mapping[str, int], choice: Choice, compute: str
    ) -> "CompiledFrom":
        """Read a graph, of whose weights file the path, the size and the times are taken for its content.

        Args:
            path: the ``.onnx`` file.
            model: an encoded graph that replaces the file's.
            sizes: those of its free dimensions.
            choice: the device and its options.
            compute: what it computes in: f32, bf16 or f16.

        Raises PackageError if it is damaged, or has no weights file.
        """
        with package_errors(path):
            graph = path.read_bytes() if model is None else model
            decoded = decode_model(memoryview(graph), nodes=False)
            tensors = decoded.initializers.values()
            initializers = [Initializer.from_tensor(each, path, decoded.data) for each in tensors]
        parts = {
            "format": _FORMAT,
            "graph": hashlib.sha256(graph).hexdigest(),
            "weights": [_identify(file) for file in sorted({each.file for each in initializers} | {path})],
            "sizes": sizes,
            "options": choice.options,
            "device": {name: value for name, value in choice.ep_device.ep_metadata.items() if name != "library_path"},
            "onnxruntime": runtime_version(),
            "cpu": [usable_cpus(), *sorted(cpu_features())],
        }
        text = json.dumps(parts, sort_keys=True, default=dict)
        needed = sum(math.prod(each.shape) * _width(each, compute) for each in initializers)
        return cls(key=hashlib.sha256(text.encode()).hexdigest()[:32], needed=needed)


def _identify(file: Path) -> list[str | int]:
    """What is another if a file's content is: its times too, of which nothing sets back the second one."""
    with package_errors(file):
        found = file.stat()
    return [os.path.realpath(file), found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _width(initializer: Initializer, compute: str) -> int:
    """The bytes of an element in a compiled graph, where integers may be dequantized weights: OpenVINO widens these."""
    dtype = np.dtype(initializer.dtype or np.float32)
    if dtype.kind == "f":
        return _FLOAT32 if compute == "f32" else _FLOAT16
    return max(dtype.itemsize, _FLOAT32)


def can_export(choice: Choice) -> bool:
    """Whether a device writes compiled graphs and reads them again."""
    said = "" if choice.ep_device is None else choice.ep_device.ep_metadata.get("OPTIMIZATION_CAPABILITIES", "")
    return "EXPORT_IMPORT" in said.split()


def export_entries(path: Path) -> dict[str, str]:
    """The entries of a session's configuration that have it write its compiled graph, weights in a file of its own."""
    return {"ep.context_enable": "1", "ep.context_file_path": str(path), "ep.context_embed_mode": "0"}


@dataclass(frozen=True, kw_only=True)
class Written(Generic[_T]):
    """What wrote a compiled graph says of it."""

    info: dict[str, Any]
    """What is kept as `CompiledGraph.info`."""
    opened: _T | None = None
    """What compiled it, where that may be used at once; None if it is closed, and opened from disk."""


@dataclass(frozen=True, kw_only=True)
class CompiledGraph:
    """A compiled graph on disk."""

    graph: Path
    """What ONNX Runtime opens."""
    info: dict[str, Any]
    """What ``write`` returned as `Written.info`, see `CompiledGraphs.open`."""


class CompiledGraphs:
    """A directory of compiled graphs, which any number of processes use at a time.

    An entry appears whole, by a rename, and is never changed; a process that is killed leaves a staging directory,
    which the next one deletes. To make room for a new one, the entries that were not used for the longest time are
    deleted.

    Args:
        root: the directory; it is made when it is needed.
        limit: bytes that all entries may take; it is less where half of what is free without them is less.
    """

    def __init__(self, root: Path, limit: int = _LIMIT) -> None:
        self.root, self.limit = root, limit
        self._has_warned = False

    def open(
        self, source: CompiledFrom, write: Callable[[Path], Written[_T]], start: Callable[[Path], _T]
    ) -> tuple[_T, dict[str, Any]] | None:
        """Open a graph, which is compiled and written first if it isn't here.

        Args:
            source: what it is compiled from.
            write: writes it to a path; what it writes to the folder above is deleted afterwards.
            start: opens it.

        Returns what ``start`` did, or `Written.opened`, and the `CompiledGraph.info`; None where it can't be kept, of
        which a warning says why.

        Raises what ``write`` does unless the disk was full, and DeviceError if there is too little memory to open it.
        """
        is_new = not (self.root / source.key).is_dir()  # otherwise it may be one that does not open
        found = self._start(source.key, start)
        if found is None and self._make_room(source.needed):
            written = self._write(source, write)
            if written is None or (is_new and written.opened is not None):
                return None if written is None or written.opened is None else (written.opened, written.info)
            del written
            trim_heap()
            found = self._start(source.key, start)
            if found is None:
                self._warn("the provider can't open the compiled graph that it wrote")
        return found

    def _write(self, source: CompiledFrom, write: Callable[[Path], Written[_T]]) -> Written[_T] | None:
        """Keep a new graph; a warning says why if the disk keeps it from that. Raises what else ``write`` does."""
        try:
            return self.add(source.key, write)
        except OSError as error:
            self._warn(error.strerror or str(error))
        except SdonnxError as error:
            if self._disk_space() >= _WRITTEN * source.needed:  # what was written of it is deleted by now
                raise
            logger.info("%s", error)
            self._warn("the disk was full while a compiled graph was written")
        return None

    def _start(self, key: str, start: Callable[[Path], _T]) -> tuple[_T, dict[str, Any]] | None:
        kept = self.find(key)
        if kept is None:
            return None
        try:
            with keep_unmapping(kept.graph.parent):
                opened = start(kept.graph)
        except Exception as error:  # whatever ONNX Runtime raises of a damaged one
            reason = first_line(error)
            if "alloc" in reason.lower():  # to compile it again takes more memory
                raise DeviceError(
                    f"the compiled graph {kept.graph.parent} can't be opened: {reason}; "
                    "choose a smaller size or another device"
                ) from None
            logger.info("the compiled graph %s can't be opened, and is deleted: %s", kept.graph.parent, reason)
            self.discard(key)
            return None
        return opened, kept.info

    def find(self, key: str) -> CompiledGraph | None:
        """The graph of a key, as used now; None if there is none. One that is damaged is deleted."""
        folder = self.root / key
        if not folder.is_dir():
            return None
        try:
            entry = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))
            if {name: _fingerprint(folder / name) for name in _names(folder)} == entry["files"]:
                with suppress(OSError):
                    os.utime(folder / _ENTRY)
                return CompiledGraph(graph=folder / GRAPH, info=entry["info"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        logger.info("the compiled graph %s is damaged, and is deleted", folder)
        self.discard(key)
        return None

    def add(self, key: str, write: Callable[[Path], Written[_T]]) -> Written[_T]:
        """Keep a graph that ``write`` writes to a path; returns what it does.

        Raises OSError if the directory can't be written, and what ``write`` does.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open_staging(self.root) as staging:
            folder = staging / key
            folder.mkdir()
            written = write(folder / GRAPH)
            entry = {"info": written.info, "files": {name: _fingerprint(folder / name) for name in _names(folder)}}
            (folder / _ENTRY).write_text(json.dumps(entry, indent=1), encoding="utf-8")
            with suppress(FileExistsError):  # another process compiled the same meanwhile
                rename_to_free(folder, self.root / key)
        self.free(self.limit, keep=key)
        return written

    def discard(self, key: str) -> None:
        """Delete a graph, if it is there; one that Windows has in use stays."""
        with suppress(OSError), open_staging(self.root) as staging:
            replace(self.root / key, staging / key)

    def free(self, most: float, keep: str = "") -> None:
        """Delete the graphs that were not used for the longest time until the others take at most ``most`` bytes.

        Those that were not used for `_UNUSED_DAYS` are deleted too; that of the key ``keep`` is not.
        """
        sizes, oldest = self.sizes(), time.time() - _UNUSED_DAYS * 24 * 3600
        for key in sorted(sizes.keys() - {keep}, key=self._last_use):
            if sum(sizes.values()) <= most and self._last_use(key) >= oldest:
                return
            self.discard(key)
            del sizes[key]

    def sizes(self) -> dict[str, int]:
        """The bytes that each graph takes, by key."""
        with suppress(OSError):
            return {each.name: _size(each) for each in self.root.iterdir() if not each.name.startswith(".")}
        return {}

    @property
    def allowed(self) -> int:
        """The bytes that all graphs may take now."""
        return int(min(self.limit, _DISK_SHARE * (self._disk_space() + sum(self.sizes().values()))))

    def _make_room(self, needed: int) -> bool:
        """Delete graphs until one of ``needed`` bytes may be added; a warning says if it may not."""
        remove_stale(self.root)
        allowed = self.allowed
        if needed > allowed:
            self._warn(f"a compiled graph takes {needed / 1e6:,.0f} MB, all of them may take {allowed / 1e6:,.0f} MB")
            return False
        self.free(allowed - needed)
        return True

    def _disk_space(self) -> int:
        """The free bytes of the disk."""
        existing = next(each for each in (self.root, *self.root.parents) if each.is_dir())
        return shutil.disk_usage(existing).free

    def _warn(self, reason: str) -> None:
        text = "compiled graphs can't be kept in %s: %s; they are compiled at each start"
        logger.log(logging.INFO if self._has_warned else logging.WARNING, text, self.root, reason)
        self._has_warned = True

    def _last_use(self, key: str) -> float:
        try:
            return (self.root / key / _ENTRY).stat().st_mtime
        except OSError:
            return 0


def _names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if each.name != _ENTRY)


def _size(folder: Path) -> int:
    with suppress(OSError):
        return sum(each.stat().st_size for each in folder.iterdir())
    return 0


def _fingerprint(path: Path) -> str:
    """The size of a file, and a hash of pieces all over it, its beginning and its end among them."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(max(size - _SAMPLE, 0) * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return f"{size} {digest.hexdigest()}"


def compiled_graphs() -> CompiledGraphs | None:
    """The user's compiled graphs; None where the user has no home."""
    directory = user_cache_directory()
    return None if directory is None else _at(directory / "sdonnx" / "compiled")


_at = cache(CompiledGraphs)
"""One for each directory, which warns once in a process."""
