"""``--no-cache``, and what ``sdonnx info`` says of compiled graphs."""

import json
import shutil
from collections import namedtuple

import pytest
from support.cli import run_cli

from sdonnx.cli.devices import cache_text


@pytest.fixture
def draw(openvino, package, tmp_path, monkeypatch):
    """A command that draws an image on OpenVINO, where no graphs are compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(name, *options):
        size = ("--steps", 1, "--size", "64x64", "--seed", 1, "--threads", 1)
        done = run_cli("run", "a cat", "-m", package, "--device", "openvino", *size, "-o", tmp_path / name, *options)
        assert done.returncode == 0, done.stderr
        return (tmp_path / name).read_bytes()

    return run


def test_compiled_graphs_are_kept_unless_no_cache_is_given(draw, tmp_path):
    alone = draw("alone.png", "--no-cache")
    assert "compiled graphs" not in run_cli("info").stdout
    assert json.loads(run_cli("info", "--json").stdout)["compiled_graphs"] is None
    assert draw("first.png") == draw("second.png") == alone
    kept = json.loads(run_cli("info", "--json").stdout)["compiled_graphs"]
    folder = tmp_path / "cache" / "sdonnx" / "compiled"
    assert kept["path"] == str(folder)
    assert kept["graphs"] == len(list(folder.iterdir())) > 1
    assert kept["bytes"] == sum(file.stat().st_size for file in folder.glob("*/*"))
    assert f"{kept['graphs']} compiled graphs, " in run_cli("info").stdout


@pytest.mark.parametrize(("free", "limit"), [(6, 4), (100, 24)])
def test_the_limit_is_what_holds_on_this_disk(free, limit, tmp_path, monkeypatch):
    """Half of what would be free without compiled graphs, or 24 GB if that is less."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    graph = tmp_path / "sdonnx" / "compiled" / "a" / "graph.bin"
    graph.parent.mkdir(parents=True)
    with graph.open("wb") as file:
        file.truncate(2 * 10**9)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, free * 10**9))
    assert cache_text().startswith(f"1 compiled graphs, 2.0 GB of at most {limit}.0 GB, in {tmp_path}")
