"""Shared fixtures: a tiny random checkpoint and the package made from it."""

import signal
from pathlib import Path

import pytest
import random_checkpoint
from sdonnx_export.export import export
from sdonnx_runtime.execution import staged_model as chain

import sdonnx

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


@pytest.fixture(scope="session")
def opened(tmp_path_factory):
    """A pipeline of diffusers of those in PROMPTED, and our package of it, opened; made once."""
    import families

    made, directory = {}, tmp_path_factory.mktemp("prompted")

    def get(name, **options):
        if name not in made:
            pipe = families.PROMPTED[name]()
            pipe.set_progress_bar_config(disable=True)
            pipe.save_pretrained(directory / name / "diffusers")
            made[name] = pipe, export(str(directory / name / "diffusers"), directory / name / "package")
        pipe, package = made[name]
        return pipe, sdonnx.load(package, **options)

    return get


@pytest.fixture
def told(monkeypatch):
    """What every call of a U-Net was given from now on, and every call of a text encoder."""
    calls, texts, real = [], [], chain.Session.run

    def run(self, feeds):
        if "timestep" in feeds:
            calls.append(feeds)
        if "input_ids" in feeds:
            texts.append(feeds["input_ids"])
        return real(self, feeds)

    monkeypatch.setattr(chain.Session, "run", run)
    return calls, texts
