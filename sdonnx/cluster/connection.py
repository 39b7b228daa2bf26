"""The Ray cluster that a command uses: one that is there, or one that lives on this machine as long as the command."""

import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as later versions do; this one warns otherwise
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a call after the end would start a cluster

import ray as _ray

import sdonnx

ray: Any = _ray
"""Ray, whose functions are annotated in part."""

AUTO = "auto"
"""The address of the cluster that this machine belongs to, or else of one that is started."""

_TIMEOUT = 5.0
"""Seconds in which a cluster's head has to accept a connection."""

_OBJECT_STORE = 256 * 10**6
"""Bytes of shared memory for requests and images on their way, where a cluster is started here."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster."""

    id: str
    address: str
    """Its IP address."""
    cpus: int
    memory: int
    """Bytes that actors may reserve together."""


@contextmanager
def connect(address: str) -> Generator[bool, None, None]:
    """Connect to a Ray cluster for as long as the context lasts; gives whether it was started for that.

    Args:
        address: HOST:PORT of its head; or auto: the cluster of RAY_ADDRESS, or the one that this machine belongs to, or
            else one that is started here and stopped in the end.

    Raises:
        RequestError: the address is malformed.
        SdonnxError: there is no cluster at the address, it refuses this program, or none can be started here.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    found = _find() if address == AUTO else address
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if found is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    else:
        check_address(found)
        options["address"] = found
    try:
        with _kept_signals():
            ray.init(**options)
        ray._private.worker._worker_logs_enabled = False  # no public option covers what it prints of nodes
    except Exception as error:
        what = "Ray can't start here" if found is None else f"the Ray cluster at {found} can't be used"
        raise sdonnx.SdonnxError(f"{what}: {_reason(error)}") from None
    try:
        yield found is None
    finally:
        ray.shutdown()


def nodes() -> list[Node]:
    """The nodes that are alive."""
    return [
        Node(
            id=each["NodeID"],
            address=each["NodeManagerAddress"],
            cpus=int(each["Resources"].get("CPU", 0)),
            memory=int(each["Resources"].get("memory", 0)),
        )
        for each in cast("list[dict[str, Any]]", ray.nodes())
        if each["Alive"]
    ]


def _find() -> str | None:
    """The address of RAY_ADDRESS, or of the cluster to which ``ray start`` added this machine, if that still runs."""
    named = os.environ.get("RAY_ADDRESS", "").strip()
    if named and named != "local":
        return None if named == AUTO else named
    file = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    with suppress(OSError, ValueError, sdonnx.SdonnxError):
        found = file.read_text().strip()
        check_address(found)
        return found
    return None


@contextmanager
def _kept_signals() -> Generator[None, None, None]:
    """Keep the handler of SIGTERM, which Ray replaces in the main thread."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def check_address(address: str) -> None:
    """Check that something listens at an address: Ray itself waits for minutes.

    Raises:
        RequestError: it is malformed.
        SdonnxError: nothing answers there.
    """
    if address == AUTO:
        return
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise sdonnx.RequestError(
            f"'{address}' is not the address of a Ray cluster; give HOST:PORT, such as {_EXAMPLE}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it does not answer"
        remedy = f"start one there with: ray start --head --port {port}"
        raise sdonnx.SdonnxError(f"there is no Ray cluster at {address} ({reason}); {remedy}") from None


_EXAMPLE = "192.168.1.7:6379"


def _reason(error: Exception) -> str:
    """What Ray says, on one line; of another version only which."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "version mismatch" in lines[0].lower():
        return "all machines need the same versions of Ray and Python; " + " ".join(lines[1:])
    remedy = "if it asks for a token, set RAY_AUTH_MODE=token and copy ~/.ray/auth_token from its head"
    return f"{' '.join(lines)[:500] or type(error).__name__}; {remedy}"
