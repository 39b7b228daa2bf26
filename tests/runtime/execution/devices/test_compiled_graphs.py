"""Compiled graphs on disk: what is opened again, what is compiled again, and what processes do to each other."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_tensor, make_tensor_value_info
from sdonnx_runtime.errors import DeviceError
from sdonnx_runtime.execution.devices.adapters import Choice
from sdonnx_runtime.execution.devices.compiled_graphs import CompiledFrom, CompiledGraphs, Written

SOURCE = CompiledFrom(key="0" * 32, needed=1)
CONTENT = bytes(range(256)) * 4096


class Compiler:
    """Writes a compiled graph of two files, and opens it: what `CompiledGraphs.open` is given."""

    def __init__(self, content=CONTENT):
        self.content, self.compiled = content, 0

    def write(self, path):
        self.compiled += 1
        path.write_bytes(b"graph")
        path.with_name("graph_provider.bin").write_bytes(self.content)
        return Written(info={"size": len(self.content)})

    def start(self, path):
        return path.with_name("graph_provider.bin").read_bytes()

    def open(self, graphs, source=SOURCE):
        return graphs.open(source, self.write, self.start)


@pytest.fixture
def graphs(tmp_path):
    return CompiledGraphs(tmp_path / "compiled")


@pytest.fixture
def compiler():
    return Compiler()


def test_a_graph_is_compiled_once(graphs, compiler):
    for _ in range(3):
        assert compiler.open(graphs) == (CONTENT, {"size": len(CONTENT)})
    assert compiler.compiled == 1
    assert [each.name for each in graphs.root.iterdir()] == [SOURCE.key]


class ServingCompiler(Compiler):
    """One whose `Written.opened` may serve."""

    def write(self, path):
        return Written(info=super().write(path).info, opened="served")


def test_what_compiled_a_graph_may_serve(graphs):
    compiler = ServingCompiler()
    info = {"size": len(CONTENT)}
    assert compiler.open(graphs) == ("served", info)
    assert compiler.open(graphs) == (CONTENT, info)
    assert compiler.compiled == 1


def test_after_a_graph_that_did_not_open_nothing_but_an_opened_one_serves(graphs, caplog):
    compiler = ServingCompiler()
    compiler.open(graphs)

    def start(path):
        raise RuntimeError("the provider can't read it")

    assert graphs.open(SOURCE, compiler.write, start) is None
    assert compiler.compiled == 2
    assert "the provider can't open the compiled graph that it wrote" in caplog.text


def truncate(file):
    os.truncate(file, 1000)


def overwrite(file):
    with file.open("r+b") as stream:  # as a disk does that lost a block of a large file
        stream.seek(len(CONTENT) // 2)
        stream.write(bytes(len(CONTENT) // 16))


@pytest.mark.parametrize("damage", [truncate, overwrite, os.remove])
@pytest.mark.parametrize("name", ["entry.json", "graph_provider.bin"])
def test_a_damaged_graph_is_compiled_again(graphs, compiler, damage, name):
    compiler.open(graphs)
    damage(graphs.root / SOURCE.key / name)
    assert compiler.open(graphs)[0] == CONTENT
    assert compiler.compiled == 2
    assert [each.name for each in graphs.root.iterdir()] == [SOURCE.key]


def test_a_graph_that_does_not_open_is_compiled_again(graphs, compiler):
    compiler.open(graphs)
    failures = [RuntimeError("the provider can't read it")]

    def start(path):
        if failures:
            raise failures.pop()
        return compiler.start(path)

    assert graphs.open(SOURCE, compiler.write, start)[0] == CONTENT
    assert compiler.compiled == 2


def test_a_graph_that_never_opens_is_reported(graphs, compiler, caplog):
    def start(path):
        raise RuntimeError("the provider can't read it")

    assert graphs.open(SOURCE, compiler.write, start) is None
    assert compiler.compiled == 1
    assert "the provider can't open the compiled graph that it wrote" in caplog.text


def test_a_lack_of_memory_is_no_damage(graphs, compiler):
    compiler.open(graphs)

    def start(path):
        raise RuntimeError("bad allocation")

    with pytest.raises(DeviceError, match="can't be opened: bad allocation; choose a smaller size or another device"):
        graphs.open(SOURCE, compiler.write, start)
    assert compiler.compiled == 1
    assert graphs.sizes().keys() == {SOURCE.key}


class Disk:
    """A disk, of which compiled graphs take a part."""

    def __init__(self, graphs, size):
        self.graphs, self.size = graphs, size

    def usage(self, path):
        return SimpleNamespace(free=self.size - sum(self.graphs.sizes().values()))


@pytest.fixture
def disk(graphs, monkeypatch):
    """One on which eight graphs are free without those that are kept."""
    disk = Disk(graphs, 8 * len(CONTENT))
    monkeypatch.setattr(shutil, "disk_usage", disk.usage)
    return disk


def keep(compiler, graphs, count):
    """Keep graphs that were used an hour after each other, the last one now."""
    sources = [CompiledFrom(key=f"{index:032}", needed=int(1.1 * len(CONTENT))) for index in range(count)]
    for index, source in enumerate(sources):
        compiler.open(graphs, source)
        hours = time.time() - 3600 * (count - 1 - index)
        os.utime(graphs.root / source.key / "entry.json", (hours, hours))
    return [source.key for source in sources]


def test_old_graphs_make_room_for_a_new_one(graphs, compiler, disk, caplog):
    keys = keep(compiler, graphs, 6)
    assert graphs.sizes().keys() == set(keys[-3:])  # of the four that half of the disk holds
    assert compiler.compiled == 6
    assert caplog.text == ""


def test_room_is_made_before_a_graph_is_written(graphs, compiler, disk):
    keep(compiler, graphs, 3)
    left = []

    def write(path):
        left.append(len(graphs.sizes()))
        return compiler.write(path)

    graphs.open(CompiledFrom(key="1", needed=3 * len(CONTENT)), write, compiler.start)
    assert left == [0]


def test_graphs_take_half_of_a_disk(graphs, compiler, disk, caplog):
    assert compiler.open(graphs, CompiledFrom(key="1", needed=4 * len(CONTENT)))
    assert compiler.open(graphs, CompiledFrom(key="2", needed=4 * len(CONTENT) + 1)) is None
    assert "a compiled graph takes 4 MB, all of them may take 4 MB" in caplog.text
    assert graphs.sizes().keys() == {"1"}


def test_a_graph_that_was_not_used_for_months_is_deleted(graphs, compiler):
    old, recent = keep(compiler, graphs, 2)
    for key, days in {old: 91, recent: 89}.items():
        used = time.time() - days * 24 * 3600
        os.utime(graphs.root / key / "entry.json", (used, used))
    compiler.open(graphs, CompiledFrom(key="new", needed=1))
    assert graphs.sizes().keys() == {recent, "new"}


def test_the_graphs_that_were_not_used_for_longest_are_deleted(graphs, compiler):
    graphs.limit = 3.5 * len(CONTENT)
    sources = [CompiledFrom(key=f"{index:032}", needed=len(CONTENT)) for index in range(4)]
    for age, source in enumerate(sources[:3]):
        compiler.open(graphs, source)
        used = time.time() - 3600 + age
        os.utime(graphs.root / source.key / "entry.json", (used, used))
    compiler.open(graphs, sources[0])  # is used now
    compiler.open(graphs, sources[3])
    assert graphs.sizes().keys() == {sources[index].key for index in (0, 2, 3)}


def test_a_graph_that_is_too_large_is_not_kept(graphs, compiler, caplog):
    graphs.limit = 100 * 10**6
    for _ in range(2):
        assert compiler.open(graphs, CompiledFrom(key="1", needed=101 * 10**6)) is None
    assert compiler.compiled == 0
    assert [each.levelname for each in caplog.records] == ["WARNING"]
    assert "a compiled graph takes 101 MB, all of them may take 100 MB" in caplog.text


def test_a_directory_that_can_not_be_written_is_no_failure(tmp_path, compiler, caplog):
    (tmp_path / "file").touch()
    graphs = CompiledGraphs(tmp_path / "file" / "compiled")
    for _ in range(2):
        assert compiler.open(graphs) is None
    assert [each.levelname for each in caplog.records] == ["WARNING"]
    assert "compiled: Not a directory; they are compiled at each start" in caplog.text


def fail(path):
    path.write_bytes(b"half")
    raise DeviceError("the provider failed")


def test_what_fails_to_compile_leaves_nothing(graphs, caplog):
    with pytest.raises(DeviceError, match="the provider failed"):
        graphs.open(SOURCE, fail, str)
    assert list(graphs.root.iterdir()) == []
    assert caplog.text == ""


def test_a_disk_that_others_fill_meanwhile_is_no_failure(graphs, disk, caplog):
    def write(path):
        disk.size = 0
        fail(path)

    assert graphs.open(SOURCE, write, str) is None
    assert list(graphs.root.iterdir()) == []
    assert "the disk was full while a compiled graph was written" in caplog.text


@pytest.mark.parametrize(
    ("kind", "compute", "width"),
    [("FLOAT", "f32", 4), ("FLOAT16", "f32", 4), ("FLOAT16", "bf16", 2), ("FLOAT", "f16", 2), ("INT8", "f32", 4),
     ("INT8", "bf16", 4), ("INT64", "f32", 8)],
)  # fmt: skip
def test_the_bytes_of_a_weight(tmp_path, kind, compute, width):
    """OpenVINO widens float16 and the dequantized weights of convolutions."""
    weight = make_tensor("w", getattr(TensorProto, kind), [3, 5], [1] * 15)
    y = make_tensor_value_info("y", weight.data_type, [3, 5])
    onnx.save(make_model(make_graph([make_node("Identity", ["w"], ["y"])], "", [], [y], [weight])), tmp_path / "m.onnx")
    choice = Choice(ep_device=SimpleNamespace(ep_metadata={}), options={})
    assert CompiledFrom.read(tmp_path / "m.onnx", None, {}, choice, compute).needed == 15 * width


WRITER = textwrap.dedent("""
    import os, signal, sys, time
    from pathlib import Path
    from sdonnx_runtime.execution.devices.compiled_graphs import CompiledFrom, CompiledGraphs, Written

    root, mine, others = map(Path, sys.argv[1:4])

    def write(path):
        path.write_bytes(b"graph")
        mine.touch()
        while not others.exists():  # both write at a time
            time.sleep(0.01)
        path.with_name("graph_provider.bin").write_bytes(bytes(range(256)) * 4096)
        return Written(info={})

    source = CompiledFrom(key="0" * 32, needed=1)
    start = lambda path: path.with_name("graph_provider.bin").read_bytes()
    print(len(CompiledGraphs(root).open(source, write, start)[0]))
""")


def start_writer(root, mine, others):
    command = [sys.executable, "-c", WRITER, str(root), str(mine), str(others)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_compile_the_same(graphs, compiler, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    writers = [start_writer(graphs.root, first, second), start_writer(graphs.root, second, first)]
    assert [int(each.communicate(timeout=60)[0]) for each in writers] == [len(CONTENT)] * 2
    assert compiler.open(graphs)[0] == CONTENT
    assert compiler.compiled == 0
    assert [each.name for each in graphs.root.iterdir()] == [SOURCE.key]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_what_a_killed_process_wrote_is_not_believed(graphs, compiler, tmp_path):
    began = tmp_path / "began"
    with start_writer(graphs.root, began, tmp_path / "never") as writer:
        while not began.exists():
            assert writer.poll() is None
        writer.kill()
    assert graphs.find(SOURCE.key) is None
    assert compiler.open(graphs)[0] == CONTENT
    assert compiler.compiled == 1
    assert [each.name for each in graphs.root.iterdir()] == [SOURCE.key]
