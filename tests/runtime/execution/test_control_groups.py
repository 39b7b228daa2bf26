"""The limits of control groups, as the kernel documents them: cgroup-v1, cgroup-v2.rst, sched-bwc.rst."""

import math
import os

import pytest
from sdonnx_runtime.execution.control_groups import cgroup_cpus, cgroup_memory
from sdonnx_runtime.execution.cpu import usable_cpus

import sdonnx


def write_groups(root, membership, files):
    for name, text in {**files, "membership": membership}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "membership", root


@pytest.mark.parametrize(
    ("membership", "files", "left"),
    [
        ("0::/app/x", {"app/memory.max": "500", "app/memory.current": "200", "app/x/memory.max": "max"}, [300]),
        (
            "0::/app",
            {"app/memory.max": "500", "app/memory.current": "200", "app/memory.stat": "anon 90\ninactive_file 50\n"},
            [350],
        ),
        (
            "1:cpu:/a\n4:memory:/a/b",
            {"memory/a/memory.limit_in_bytes": "900", "memory/a/memory.usage_in_bytes": "1"},
            [899],
        ),
        (
            "4:memory:/gone",
            {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "1"},
            [],
        ),
    ],
)
def test_the_memory_that_is_left(membership, files, left, tmp_path):
    assert cgroup_memory(*write_groups(tmp_path, membership, files)) == left


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("0::/app", {"app/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/app/x", {"app/cpu.max": "200000 100000\n", "app/x/cpu.max": "max 100000\n"}, 2),
        ("0::/app", {"app/cpu.max": "max 100000\n"}, math.inf),
        ("0::/", {}, math.inf),
        (
            "3:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        (
            "3:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            math.inf,
        ),
    ],
)
def test_the_cpus_that_may_be_used(membership, files, cpus, tmp_path):
    assert cgroup_cpus(*write_groups(tmp_path, membership, files)) == cpus


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinities")
def test_threads_are_at_most_the_cpus_of_the_affinity(monkeypatch):
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5})
    monkeypatch.setattr("sdonnx_runtime.execution.cpu.cgroup_cpus", lambda: 2.5)
    sdonnx.load("pictogram", threads=3)
    for threads in (0, -1, 4, 1024, 10**30, 2.0, True, "2"):
        with pytest.raises(sdonnx.RequestError, match=r"threads is .*from 1 to 3, the CPUs that can be used"):
            sdonnx.load("pictogram", threads=threads)
    monkeypatch.setattr("sdonnx_runtime.execution.cpu.cgroup_cpus", lambda: 0.5)
    with pytest.raises(sdonnx.RequestError, match="from 1 to 1,"):
        sdonnx.load("pictogram", threads=2)
