"""Pictogram, served and in this process, for the tests of all APIs."""

import pytest
from support.server import running_server

import sdonnx


@pytest.fixture(scope="module")
def server():
    with running_server() as running:
        yield running


@pytest.fixture(scope="session")
def pipeline():
    with sdonnx.load("pictogram", threads=1, memory="max") as pipe:
        yield pipe
