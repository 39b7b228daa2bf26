"""Weights files in bfloat16, for graphs that cast their weights to it.

OpenVINO casts the constants of a graph on one thread, value by value, keeps what it casts in memory of its own, and
rounds a quarter of the values to the farther neighbour. It maps weights that a file has in bfloat16.
"""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path

import numpy as np

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.graphs.bfloat16 import BFLOAT16
from sdonnx_runtime.graphs.initializers import FLOAT, FLOAT16, Initializer
from sdonnx_runtime.graphs.onnx_proto import Model, Node, Tensor, decode_model, package_errors
from sdonnx_runtime.graphs.shape_inference import TensorInfo, infer_shapes
from sdonnx_runtime.storage.staging import open_staging, remove_stale

logger = logging.getLogger(__name__)

_ALIGNMENT = 4096
"""Bytes of a page of memory: files are mapped from a multiple of it on."""

_BLOCK = 1 << 17
"""Bytes that are read, cast and written at a time: they stay in a core's cache."""

_BFLOAT16 = 2
"""Bytes of an element."""

_DISK_FREE = 2
"""How many times the bytes of the file must be free on its disk: a compiled graph of that size may come to it too."""


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """A weight that goes to the new file."""

    tensors: Sequence[Tensor]
    """It in the new graph, under each of its names."""
    read: Callable[[], Iterable[AnyArray]]
    """Reads it in blocks."""
    length: int
    """Bytes in the new file."""


@contextmanager
def open_bfloat16(
    path: Path, model: bytes, *, folder: Path | None, threads: int, replaced: Collection[str] = ()
) -> Generator[tuple[bytes, Path | None]]:
    """Yield the graph of `store_bfloat16` and the folder of its weights file; ``model`` and None if that can't be.

    The file may be deleted at the end, while it is mapped.

    Args:
        path: the ``.onnx`` file whose folder has the weights.
        model: the encoded graph, as of `compute_in_bfloat16`.
        folder: where the file is written; None is a temporary one, which is deleted at the end.
        threads: that cast.
        replaced: the names of weights for which a session gets other values, of the same type.

    Raises PackageError if the weights file is damaged.
    """
    stored = None
    with ExitStack() as stack:
        try:
            if folder is None:
                temporary = Path(tempfile.gettempdir())
                remove_stale(temporary)
                folder = stack.enter_context(open_staging(temporary))
            stored = store_bfloat16(path, model, folder / "weights.data", threads, replaced)
        except OSError as error:
            logger.info("the weights of %s are cast to bfloat16 by the device: %s", path, error)
            if folder is not None:
                (folder / "weights.data").unlink(missing_ok=True)
        yield (model, None) if stored is None else (stored, folder)


def store_bfloat16(
    path: Path, model: bytes, file: Path, threads: int, replaced: Collection[str] = ()
) -> bytes | None:  # fmt: skip
    """Write the weights of a graph to a new file, in bfloat16 what it casts to that; encode the graph that reads them.

    The arguments are those of `open_bfloat16`, and the ``file``, which the new graph names. Returns None if there is
    nothing to cast.

    Raises:
        PackageError: the weights file is damaged.
        OSError: the new file can't be written, or the disk has little room.
    """
    with package_errors(path):
        decoded = decode_model(memoryview(model))
        constants = _Constants(path, decoded, replaced)
        casts = {
            node.outputs[0]: node.inputs[0]
            for node in decoded.nodes
            if node.op == "Cast" and node.attributes["to"] == BFLOAT16 and node.inputs[0] in constants
        }
        if not casts:
            return None
        nodes = constants.without_unread([node for node in decoded.nodes if node.outputs[0] not in casts])
        placed, size = list[tuple[_Copy, int]](), 0
        tensors = [each.encoded for each in decoded.initializers.values() if "location" not in each.external]
        for copy in _plan(path, decoded, casts, constants, nodes):
            where = {"location": file.name, "offset": str(size), "length": str(copy.length)}
            tensors += [each.with_external(each.name, each.shape, where).encoded for each in copy.tensors]
            placed.append((copy, size))
            size += copy.length + -copy.length % _ALIGNMENT
        encoded = decoded.encode_part("bfloat16", nodes, tensors, decoded.inputs, decoded.outputs)
    if shutil.disk_usage(file.parent).free < _DISK_FREE * size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    file.touch()
    placed.sort(key=lambda each: -each[0].length)  # the largest first
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(partial(_write, file), *zip(*placed, strict=True)))
    return encoded


class _Constants:
    """The weights of a graph in files, but those ``replaced``, and what nodes make of them alone, in floating point."""

    def __init__(self, path: Path, model: Model, replaced: Collection[str]) -> None:
        self._weights = {
            name: Initializer.from_tensor(tensor, path, model.data)
            for name, tensor in model.initializers.items()
            if tensor.data_type in (FLOAT, FLOAT16) and "location" in tensor.external and name not in replaced
        }
        self._producers = dict[str, Node]()
        self._infos = {name: TensorInfo(each.shape) for name, each in self._weights.items()}
        for node in model.nodes:
            is_folded = node.op in _FOLDED and node.attributes.get("to", FLOAT) == FLOAT
            if is_folded and all(name in self._infos for name in node.inputs):
                list(infer_shapes([node], self._infos))
                self._producers |= dict.fromkeys(node.outputs, node)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one."""
        return self._infos[name].shape

    def read(self, name: str) -> AnyArray:
        """Read or compute one; PackageError if the weights file is damaged."""
        if name in self._weights:
            return self._weights[name].map()
        node = self._producers[name]
        inputs, axis = [self.read(each) for each in node.inputs], node.attributes.get("axis", 0)
        if node.op == "Split":
            return np.split(inputs[0], len(node.outputs), axis)[node.outputs.index(name)]
        return _FOLDED[node.op](inputs, axis)

    def without_unread(self, nodes: Sequence[Node]) -> list[Node]:
        """Leave out the nodes that make constants that no other node reads."""
        kept, read = list[Node](), set[str]()
        for node in reversed(nodes):
            if node.outputs[0] not in self._producers or not read.isdisjoint(node.outputs):
                kept.append(node)
                read |= {*node.inputs}
        return kept[::-1]


_FOLDED: Mapping[str, Callable[[Sequence[AnyArray], int], AnyArray]] = {
    "Add": lambda inputs, _axis: inputs[0] + inputs[1],
    "Cast": lambda inputs, _axis: inputs[0].astype(np.float32),
    "Concat": lambda inputs, axis: np.concatenate(inputs, axis),
    "Split": lambda inputs, _axis: inputs[0],
}
"""Operators of which weights are computed."""


def _plan(
    path: Path, model: Model, casts: Mapping[str, str], constants: _Constants, nodes: Sequence[Node]
) -> Iterator[_Copy]:
    """Yield what is written: weights that are cast, those that nodes read as they are, and computed ones."""
    read = {name for node in nodes for name in node.inputs}
    names = dict[str, list[str]]()
    for name, source in casts.items():
        names.setdefault(source, []).append(name)
    external = {name: each for name, each in model.initializers.items() if "location" in each.external}
    for name, tensor in external.items():
        source = Initializer.from_tensor(tensor, path, model.data)
        if name in read:
            yield _Copy(tensors=[tensor], read=partial(_read_blocks, source), length=source.length)
        if name in names:
            cast = [tensor.with_external(each, tensor.shape, {}, BFLOAT16) for each in names[name]]
            length = _BFLOAT16 * prod(tensor.shape)
            yield _Copy(tensors=cast, read=lambda source=source: map(_cast, _read_blocks(source)), length=length)
    some = next(iter(external.values()))
    for source in names.keys() - external.keys():
        cast = [some.with_external(each, constants.shape(source), {}, BFLOAT16) for each in names[source]]
        length = _BFLOAT16 * prod(constants.shape(source))
        yield _Copy(tensors=cast, read=lambda source=source: [_cast(constants.read(source))], length=length)


def _read_blocks(source: Initializer) -> Iterator[AnyArray]:
    """Read a weight block by block, each in place of the one before; PackageError if it or its file is damaged."""
    if source.dtype is not None:
        source.check()
    buffer, dtype = memoryview(bytearray(_BLOCK)), np.dtype(np.uint8 if source.dtype is None else source.dtype)
    with package_errors(source.file), source.file.open("rb", buffering=0) as reading:
        reading.seek(source.offset)
        for start in range(0, source.length, _BLOCK):
            block = buffer[: source.length - start]
            if reading.readinto(block) != len(block):
                raise PackageError(f"{source.file} is damaged at '{source.name}'; run 'sdonnx export' again")
            yield np.frombuffer(block, dtype)


def _write(file: Path, copy: _Copy, offset: int) -> None:
    """Write a weight to the new file, from this offset on."""
    with file.open("r+b") as writing:
        writing.seek(offset)
        for block in copy.read():
            writing.write(np.ascontiguousarray(block).data.cast("B"))


def _cast(values: AnyArray) -> AnyArray:
    """Round values to bfloat16, to the nearest one or to an even one; as uint16."""
    if values.dtype == np.float16:
        return np.take(_bfloat16_of_float16(), np.ascontiguousarray(values).view(np.uint16), mode="clip")
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


@cache
def _bfloat16_of_float16() -> AnyArray:
    """What each float16 is in bfloat16, (65536,)."""
    return _cast(np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32))
