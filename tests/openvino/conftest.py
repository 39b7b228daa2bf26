"""Shared: a process that draws on OpenVINO."""

import pytest
from support.openvino import openvino_process


@pytest.fixture(scope="session")
def on_openvino(openvino_folder, compiled_folder):
    """A function that calls another in a process where OpenVINO has its CPU device."""
    with openvino_process(openvino_folder, compiled_folder) as call:
        yield call
