"""Shared fixtures: a tiny random checkpoint and the package made from it."""

import signal
from pathlib import Path

import pytest
import random_checkpoint
from sdonnx_export.export import export

# A shell that starts the tests in the background ignores Ctrl-C, and what they start would do so too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    random_checkpoint.make(directory)
    return directory


@pytest.fixture(scope="session")
def package(checkpoint, tmp_path_factory) -> Path:
    return export(str(checkpoint), tmp_path_factory.mktemp("packages") / "tiny-onnx")
