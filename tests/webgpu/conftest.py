"""Shared: a process that draws on WebGPU in software."""

import pytest
from support import webgpu


@pytest.fixture(scope="session")
def on_webgpu():
    """A function that calls another in a process where WebGPU runs in software."""
    if (what := webgpu.missing()) is not None:
        pytest.skip(what)
    with webgpu.webgpu_process() as call:
        yield call
