"""Linux' control groups, of version 1 and 2: the limits that a container has."""

import math
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

MEMBERSHIP, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""The file that lists this process's groups, and where they are mounted."""

_NO_LIMIT = 1 << 60  # a memory limit of version 1 above this is none


def cgroup_memory(membership: Path = MEMBERSHIP, root: Path = ROOT) -> list[int]:
    """The bytes left under each memory limit of a process's control groups."""
    left = list[int]()
    for folder in _folders("memory", membership, root):
        for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit, used = (_read_number(folder / name) for name in names)
            if limit is not None and used is not None and limit < _NO_LIMIT:
                left.append(limit - used + _inactive_cache(folder))
    return left


def cgroup_cpus(membership: Path = MEMBERSHIP, root: Path = ROOT) -> float:
    """The CPUs whose time a process's control groups may take; infinite without a limit."""
    quotas = [math.inf]
    for folder in _folders("cpu", membership, root):
        quota, period = (_read_number(folder / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        with suppress(OSError, ValueError):
            quota, period = map(int, (folder / "cpu.max").read_text(encoding="utf-8").split())
        if quota is not None and period is not None:  # -1 and "max" are none
            quotas.append(quota / period)
    return min(quotas)


def _folders(controller: str, membership: Path, root: Path) -> Generator[Path, None, None]:
    """A process's groups that have a controller, each followed by those that it is in."""
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers
        group = top / inside.lstrip("/")
        for folder in (group, *group.parents):
            yield folder
            if folder == top:
                break


def _read_number(path: Path) -> int | None:
    with suppress(OSError):
        text = path.read_text(encoding="utf-8").strip()
        return int(text) if text.isdigit() else None
    return None


def _inactive_cache(group: Path) -> int:
    """Bytes of a control group's page cache that the system can free at once."""
    with suppress(OSError):
        pairs = (line.partition(" ") for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        counts = {key: value for key, _, value in pairs}
        return int(counts.get("inactive_file", counts.get("total_inactive_file", 0)))
    return 0
