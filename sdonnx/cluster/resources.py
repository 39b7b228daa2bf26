"""How many actors a cluster has room for, and what each of them takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from sdonnx_runtime.execution.devices.table import base_name

import sdonnx
from sdonnx.cluster.connection import Node

ACTOR_BYTES = 180 * 10**6
"""What an actor's process has before it opens a component, Ray and the libraries: 165 MB, measured with Ray 2.60."""


@dataclass(frozen=True, kw_only=True)
class Actors:
    """The actors of a run."""

    count: int
    """The most that there are at a time."""
    threads: int
    """CPU threads of each."""
    memory: int
    """Bytes of each."""


def choose_actors(
    nodes: Sequence[Node], *, requests: int, memory: int, count: int | None = None, threads: int | None = None
) -> Actors:
    """Choose what was not asked for: as many actors as the nodes have room for and there are requests.

    Actors of one thread generate more images together than fewer with more threads; where memory or the number of
    requests allows fewer of them, they share the CPUs.

    Args:
        nodes: the cluster's.
        requests: how many there are.
        memory: bytes of an actor.
        count: the most actors; None is as many as there is room for. More than that wait for nodes to come.
        threads: of each actor.

    Raises:
        SdonnxError: no node has room for an actor, and ``count`` does not say that one will come.
    """
    able = [each for each in nodes if each.cpus >= (threads or 1) and each.memory >= memory]
    if not able:
        if count is not None:
            return Actors(count=count, threads=threads or 1, memory=memory)
        most = max((each.memory for each in nodes if each.cpus >= (threads or 1)), default=0)
        raise sdonnx.SdonnxError(
            f"no node has {threads or 1} CPUs and {memory / 1e6:.0f} MB of memory (the most is {most / 1e6:.0f} MB); "
            "lower --threads-per-actor or --memory-per-actor, or give --actors if nodes are still to come"
        )
    wanted = min(requests, requests if count is None else count)
    if threads is None:
        share = ceil(wanted / len(able))
        threads = min(each.cpus // _actors_on(each, 1, memory, share) for each in able)
    room = sum(_actors_on(each, threads, memory, wanted) for each in able)
    return Actors(count=min(wanted, room) if count is None else wanted, threads=threads, memory=memory)


def num_gpus(device: str) -> int:
    """The GPUs that Ray reserves for a process whose pipeline is on a device.

    Raises RequestError for a GPU by its number: a process sees the one alone that Ray reserves for it, as the first.
    """
    if base_name(device) != "cuda":
        return 0
    if device not in ("cuda", "cuda:0"):
        raise sdonnx.RequestError(f"--device is {device}, but Ray chooses the GPU of each process; use --device cuda")
    return 1


def _actors_on(node: Node, threads: int, memory: int, most: int) -> int:
    """How many actors run on a node, 1 to ``most``."""
    return max(1, min(node.cpus // threads, node.memory // memory, most))
