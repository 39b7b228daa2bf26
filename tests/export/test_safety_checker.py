"""``--safety-checker``: the checkpoint's own safety checker becomes a component, and is asked for."""

import numpy as np
import pytest
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from sdonnx_export.checkpoints.from_package import open_package
from sdonnx_export.export import export
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.package import Package


def test_a_package_keeps_its_checker_when_it_is_exported_again(checked):
    source = StableDiffusionSafetyChecker.from_pretrained(checked.path.parent / "tiny" / "safety_checker")
    part, state = open_package(checked.path).parts["safety_checker"], source.state_dict()
    assert set(part.weights) == {name for name in state if not name.endswith("position_ids")}
    for name, weight in part.weights.items():
        np.testing.assert_array_equal(weight.read(), state[name].numpy(), err_msg=name)


def test_it_is_left_out_unless_it_is_asked_for(package, checked):
    assert "safety_checker" not in Package.open(package).manifest.components
    assert "safety_checker" in Package.open(checked.path).manifest.components


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"has no safety_checker/ with a config.json and model.safetensors; leave out --safety-checker"),
        ({"via": "optimum"}, "--via optimum does not support .*--safety-checker"),
    ],
)
def test_what_has_no_checker_is_an_error(options, message, checkpoint, tmp_path):
    with pytest.raises(ExportError, match=message):
        export(str(checkpoint), tmp_path / "out", safety_checker=True, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_generates_no_images_needs_no_checker(checkpoint, tmp_path):
    with pytest.raises(ExportError, match="generates no images, so that --safety-checker is of no use"):
        export(None, tmp_path / "out", vae=str(checkpoint / "vae"), safety_checker=True)
