"""The options of ``sdonnx run`` come from the request's fields."""

import pytest
from PIL import Image
from sdonnx_runtime.request import FIELDS
from typer.main import get_command

import sdonnx
from sdonnx.cli import options
from sdonnx.cli.app import app


def parameters():
    run = get_command(app).commands["run"]
    return {option: each for each in run.params for option in (*each.opts, *each.secondary_opts)}


@pytest.mark.parametrize(("name", "spec"), [(name, spec) for name, spec in FIELDS.items() if spec.option is not None])
def test_each_field_has_its_option(name, spec):
    found = [parameters()[option] for option in spec.option.split("/")]
    if spec.metavar is not None:
        assert found[0].metavar == spec.metavar
        assert found[0].help.replace("\\[", "[").startswith(spec.help)
        assert found[0].rich_help_panel == spec.panel


def test_options_become_fields(tmp_path):
    Image.new("RGB", (8, 8), "teal").save(tmp_path / "a.png")
    values = options.parse_request(
        {
            "size": "64x32",
            "steps": 3,
            "guidance": None,
            "paste": False,
            "variation": "7:0.5",
            "hires": "2x:0.4:5",
            "sigmas": "3,1",
            "guidance_interval": "0.2:0.8",
            "image": tmp_path / "a.png",
        }
    )
    assert values.pop("image").size == (8, 8)
    assert values == {
        "width": 64,
        "height": 32,
        "num_inference_steps": 3,
        "paste": False,
        "variation": (7, 0.5),
        "hires_scale": 2.0,
        "hires_strength": 0.4,
        "hires_steps": 5,
        "sigmas": (3.0, 1.0),
        "guidance_steps": (0.2, 0.8),
    }
    sdonnx.Request(prompt="", **values)
