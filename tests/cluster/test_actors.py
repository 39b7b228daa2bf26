"""What an actor says of its device, without a cluster."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from sdonnx_models import DEFAULT
from sdonnx_runtime.execution.devices import choosing
from support.plugins import install_openvino, openvino_device

from sdonnx.cluster import actors
from sdonnx.cluster.actors import ActorPool, Failed, Generated, ImageActor, Opening
from sdonnx.cluster.resources import Actors

REQUEST = {"prompt": "a cat", "seed": 1, "width": 64, "height": 64, "num_inference_steps": 1}


@pytest.fixture
def start(monkeypatch):
    """Starts an actor in this process, with a memory limit."""
    monkeypatch.setattr(choosing, "NOTES", choosing.Notes())
    monkeypatch.setattr(actors, "ray", MagicMock())

    def start(memory, device="auto"):
        arguments = {"model": DEFAULT, "device": device, "compute": "auto", "cache": False}
        actor = ImageActor(Opening(arguments=arguments), Actors(count=1, threads=1, memory=memory))
        return actor, actor.open()

    return start


def test_an_actor_says_which_device_it_took_and_why_not_another(monkeypatch, start):
    """Not the one that it tried first: OpenVINO's plugin is there, but ONNX Runtime knows nothing of its hardware."""
    install_openvino(monkeypatch, openvino_device())
    actor, problem = start(8 * 10**9)
    assert problem is None
    first, second = (actor.generate(index, REQUEST) for index in range(2))
    assert {each.machine.provider for each in (first, second)} == {"CPUExecutionProvider"}
    (note,) = {each for each in first.notes if "trying cpu" in each}
    assert note.startswith("device 'openvino' failed to initialise: ")
    assert second.notes == ()


def test_a_lack_of_memory_is_said(monkeypatch, start):
    install_openvino(monkeypatch, openvino_device())
    actor, _ = start("min")
    made = actor.generate(0, REQUEST)
    assert made.machine.provider == "CPUExecutionProvider"
    assert made.notes == ("not using openvino: the CPU takes less memory; using cpu",)


def test_the_device_that_was_taken(openvino, start):
    actor, _ = start(8 * 10**9)
    made = actor.generate(0, REQUEST)
    assert made.machine.provider == "OpenVINOExecutionProvider"
    assert made.machine.compute == made.result.compute
    assert any(note.startswith(f"computing in {made.result.compute} on openvino") for note in made.notes)


def test_a_device_that_is_not_here_is_an_error_at_once(monkeypatch, start):
    monkeypatch.setattr(actors.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    _, problem = start(8 * 10**9, "cuda")
    assert str(problem).startswith("node 10.0.0.7: device 'cuda' is not available")


def test_what_several_actors_say_is_said_once(monkeypatch):
    fake, said = MagicMock(), []
    monkeypatch.setattr(actors, "ray", fake)
    pool = ActorPool(Opening(arguments={"device": "auto"}), Actors(count=2, threads=1, memory=10**9), said.append)
    for index, node in enumerate(("10.0.0.1", "10.0.0.2")):
        outcome = MagicMock(spec=Generated, machine=SimpleNamespace(node=node), notes=("using cpu",))
        fake.get.return_value = outcome
        pool._running[index] = "actor", index
        assert pool._finish(index, {}) is outcome
    fake.get.return_value = Failed(index=2, error=ValueError())
    pool._running[2] = "actor", 2
    pool._finish(2, {})
    assert said == ["node 10.0.0.1: using cpu"]
