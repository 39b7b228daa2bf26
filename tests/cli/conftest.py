"""A server, and waits that tests can afford, for ``sdonnx run --server``."""

import pytest
from support.server import running_server

from sdonnx.client import pool
from sdonnx.client import server as client


@pytest.fixture(scope="module")
def server():
    with running_server() as running:
        yield running


@pytest.fixture
def impatient(monkeypatch):
    """Waits of a second take a hundredth."""
    monkeypatch.setattr(client, "_DELAY", 0.01)
    monkeypatch.setattr(pool, "_DELAYS", (0.01, 0.05))
    monkeypatch.setattr(pool, "PATIENCE", 0.3)


@pytest.fixture
def folders(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    return tmp_path / "here", tmp_path / "there"
