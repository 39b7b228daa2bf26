"""Fixtures of the tests of devices."""

import logging

import pytest
from sdonnx_runtime.execution.devices import choosing


@pytest.fixture
def notes(caplog):
    """The lines about devices that a test has logged."""
    caplog.set_level(logging.INFO, choosing.DEVICE_NOTES)
    return lambda: [each.getMessage() for each in caplog.records if each.name == choosing.DEVICE_NOTES]
