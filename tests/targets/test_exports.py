"""Packages made for a GPU, written on a machine without one."""

import re

import numpy as np
import pytest
from sdonnx_export.checkpoints.from_package import open_package
from sdonnx_runtime.packages.manifest import read_manifest
from support.cli import run_cli

EXPORTS = {"cuda": (), "directml": (), "webgpu": ("--precision", "fp32")}
"""Options by target; without any the precision is fp16."""
TITLES = {"cuda": "CUDA", "directml": "DirectML", "webgpu": "WebGPU"}


@pytest.fixture(scope="module", params=EXPORTS)
def exported(request, checkpoint, tmp_path_factory):
    """The target, the package and what the command line printed."""
    target, package = request.param, tmp_path_factory.mktemp(request.param) / "package"
    return target, package, run_cli("export", checkpoint, "--target", target, *EXPORTS[target], "-o", package)


def test_a_package_says_what_it_is_made_for(exported):
    target, own, printed = exported
    assert printed.returncode == 0
    manifest = read_manifest(own)
    assert manifest.target == target
    precision = "fp32" if EXPORTS[target] else "fp16"
    assert {component.precision for component in manifest.components.values()} == {precision}
    assert re.search(f"made for +{TITLES[target]}", run_cli("info", own).stdout)
    assert (f"was not run: {TITLES[target]} is not available" in printed.stderr) == (target != "webgpu")


def test_its_preview_is_that_of_a_generic_package(exported, package):
    previews = [np.array(read_manifest(root).latents.preview) for root in (exported[1], package)]
    np.testing.assert_allclose(*previews, atol=1e-3)


def test_it_can_be_exported_again(exported, package):
    """For every device, say: its weights are the checkpoint's, some of them rounded to float16."""
    ours, wanted = open_package(exported[1]), open_package(package)
    for name, part in wanted.parts.items():
        assert set(ours.parts[name].weights) == set(part.weights)
        for key, weight in part.weights.items():
            np.testing.assert_allclose(ours.parts[name].weights[key].read(), weight.read(), rtol=1e-3, atol=1e-6)


def test_its_graphs_run_on_its_device_alone(exported, tmp_path):
    printed = run_cli("run", "x", "-m", exported[1], "--device", "cpu", "-o", tmp_path / "x.png")
    assert printed.returncode != 0
    assert "--target generic" in printed.stderr
    assert not list(tmp_path.iterdir())
    assert f"{exported[1]}: the package is made for" in run_cli("info", exported[1], "--device", "cpu").stderr


@pytest.mark.parametrize("precision", ["int8", "int8-weights", "int4"])
def test_precisions_of_the_cpu_are_refused(precision, checkpoint, tmp_path):
    printed = run_cli("export", checkpoint, "--target", "directml", "--precision", precision, "-o", tmp_path / "x")
    assert printed.returncode != 0
    assert f"precision '{precision}' is made for the CPU" in printed.stderr
    assert not list(tmp_path.iterdir())
