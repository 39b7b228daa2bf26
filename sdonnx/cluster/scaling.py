"""How many replicas run a server's jobs, and what each of them takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdonnx_runtime.memory.budget import AUTO, Budget

import sdonnx
from sdonnx.cluster.connection import nodes
from sdonnx.cluster.packages import Source, file_source
from sdonnx.server.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How many replicas there may be."""

    least: int
    most: int

    def __str__(self) -> str:
        if self.least == self.most:
            return "1 replica" if self.most == 1 else f"{self.most} replicas"
        return f"{self.least} to {self.most} replicas"

    @classmethod
    def parse(cls, text: str) -> "Bounds":
        """Parse ``MIN:MAX``, or one number for both; raises RequestError."""
        low, colon, high = text.partition(":")
        parts = (low, high if colon else low)
        if not all(part.isascii() and part.isdecimal() and len(part) < 6 for part in parts):
            raise sdonnx.RequestError(f"--replicas is '{text}'; give MIN:MAX, such as 1:4")
        least, most = map(int, parts)
        if most < 1 or least > most:
            raise sdonnx.RequestError(f"--replicas is '{text}'; give a MAX of 1 or more, and a MIN of at most MAX")
        return cls(least=least, most=most)


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """What the replicas are."""

    bounds: Bounds
    settings: Settings
    """Of the server, with the threads and the memory of each replica."""
    packages: tuple[str, ...]
    """Those of the settings, as `find_model` takes them on each node."""
    files: tuple[Source, ...] = ()
    """The folders and files of the settings."""
    memory: int | None = None
    """Bytes that each reserves; None if that is not known."""


def choose_replicas(settings: Settings, asked: str | None, packages: Sequence[str], files: Sequence[Path]) -> Replicas:
    """Choose the replicas on the connected cluster: what was asked for, or else as its nodes have room.

    Args:
        settings: of the server.
        asked: ``MIN:MAX``, or None.
        packages: those of the settings, as `find_model` takes them.
        files: folders and files of the settings.

    Raises:
        RequestError: ``asked`` is malformed, or the memory is not a size.
        SdonnxError: no node has a CPU.
    """
    bounds, found = None if asked is None else Bounds.parse(asked), [node for node in nodes() if node.cpus > 0]
    if not found:
        raise sdonnx.SdonnxError("no node of the Ray cluster has CPUs; start one with: ray start --num-cpus N")
    threads = settings.threads or min(node.cpus for node in found)
    memory = Budget(settings.memory).device_limit
    if settings.memory == AUTO:
        memory = min(node.memory * min(threads, node.cpus) // node.cpus for node in found)
    room = sum(node.cpus // threads for node in found)
    return Replicas(
        bounds=bounds or Bounds(least=1, most=max(1, room)),
        settings=replace(settings, threads=threads, memory=settings.memory if memory is None else str(memory)),
        packages=tuple(packages),
        files=tuple(file_source(each) for each in files),
        memory=memory,
    )
