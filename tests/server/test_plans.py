"""What a plan says of a job's time where OpenVINO runs it, whose speed is not the CPU provider's."""

from types import SimpleNamespace

import pytest
from sdonnx_models import bundled
from support.plugins import install_openvino, openvino_device

import sdonnx
from sdonnx.server.generation import Generation
from sdonnx.server.library import Library, Selection
from sdonnx.server.native.plans import _plan
from sdonnx.server.planning import Planner
from sdonnx.server.settings import Settings


@pytest.mark.parametrize(
    ("device", "memory", "chosen"),
    [("auto", "auto", "openvino"), ("auto", "min", "cpu"), ("cpu", "auto", "cpu"), ("openvino", "auto", "openvino")],
)
def test_seconds_are_estimated_on_the_cpu_alone(device, memory, chosen, monkeypatch):
    install_openvino(monkeypatch, openvino_device())
    planner = Planner(Library(Settings(packages=(bundled()["pictogram"],), device=device, memory=memory)))
    request = sdonnx.Request(prompt="a cat", width=64, height=64)
    generation = Generation(request=request, selection=Selection(model="pictogram"))
    assert planner.forecast(generation).device == chosen
    plan = _plan(generation, SimpleNamespace(planner=planner, jobs=[]))
    assert plan["estimated_seconds"] > 0
    if chosen == "cpu":
        assert (plan["seconds"], plan["seconds_from"]) == (plan["estimated_seconds"], "estimated")
    else:
        assert (plan["seconds"], plan["seconds_from"]) == (None, None)
