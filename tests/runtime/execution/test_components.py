"""Components with models that are put in from outside: how they are opened, and what an observer sees."""

from weakref import WeakSet

import numpy as np
import pytest
from sdonnx_models import bundled
from sdonnx_runtime.execution.components import REFINER, Components, Runner
from sdonnx_runtime.execution.running.shared_weights import SharedWeights
from sdonnx_runtime.execution.strategy import MIN_MEMORY, ExecutionPlan, ExecutionStrategy
from sdonnx_runtime.memory.budget import Budget
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.variant import PLAIN


class Doubler:
    """A model that doubles its input."""

    device, compute = "cpu", "f32"

    def run(self, feeds, keep=()):
        return {"y": 2 * feeds["x"]}

    def is_open_for(self, feeds):
        return True

    def open_for(self, feeds):
        pass

    def cancel(self):
        pass


@pytest.fixture
def opened():
    """The pictogram package as its own refiner, and what its graphs were opened with."""
    package, calls = Package.open(bundled()["pictogram"]), []

    def open_model(path, _deltas, strategy, **options):
        assert isinstance(options.pop("shared_weights"), SharedWeights)
        calls.append((path.parent.name, strategy, options))
        return Doubler()

    def components(unplanned):
        return Components(
            package, open_model, keep_loaded=False, extra_packages={REFINER: package}, unplanned=unplanned
        )

    return package, components, calls


def test_weights_are_shared_while_the_adapters_are_the_same():
    """Also if something keeps what was opened with other adapters."""
    package, shared = Package.open(bundled()["pictogram"]), []

    def open_model(_path, _deltas, _strategy, *, shared_weights, **_options):
        shared.append(shared_weights)
        return Doubler()

    components = Components(package, open_model, keep_loaded=False)
    for deltas in ({}, {}, {"unet": {"weight": ()}}, {"unet": {"weight": ()}}, {}):
        with components.exclusive(deltas):
            components.model("unet")
    assert [each is shared[0] for each in shared] == [True, True, False, False, False]
    assert shared[2] is shared[3] is not shared[4]


def test_minimal_memory_is_for_every_package(opened):
    """Where nothing can be planned: a refiner's and a control's components too."""
    _, components, calls = opened
    found = components(Budget("min").unplanned())
    for name in ("text_encoder", "unet", f"{REFINER}unet"):
        found.model(name)
    assert [strategy for _, strategy, _ in calls] == [MIN_MEMORY] * 3


def test_a_tile_is_in_latent_pixels_in_a_plan_and_in_the_inputs_where_a_graph_is_opened(opened):
    package, components, calls = opened
    found = components(ExecutionPlan(default=ExecutionStrategy(tile=32), device_limit=10**9))
    for name in ("vae_decoder", "vae_encoder", "unet"):
        found.model(name)
    sizes = [32, 32 * package.manifest.latents.downscale, None]
    assert [options for _, _, options in calls] == [
        {"tile_size": size, "target": "generic", "graph_compute": "f32", "avoided": {}, "memory_limit": 10**9}
        for size in sizes
    ]


def test_a_plan_is_for_one_generation(opened):
    _, components, calls = opened
    found = components(ExecutionPlan())
    plan = ExecutionPlan(strategies={"unet": ExecutionStrategy(staged=True)})
    for each in (plan, None):
        with found.exclusive(plan=each):
            found.model("unet")
    assert [strategy.staged for _, strategy, _ in calls] == [True, False]


def test_what_stays_loaded_is_what_the_next_plan_counts(opened):
    """Variants have the weights once more each: those that a generation leaves go before it opens another."""
    _, components, _ = opened
    found = components(ExecutionPlan())
    counted = dict.fromkeys(("text_encoder", "unet", "vae_decoder"), ExecutionStrategy())
    keeping = ExecutionPlan(strategies=counted, keep_loaded=True)

    encoder, decoder = ("text_encoder", PLAIN), ("vae_decoder", PLAIN)
    plain, caching, cached = (("unet", variant) for variant in (PLAIN, "caching", "cached"))

    def generate(plan, *models):
        with found.exclusive(plan=plan):
            for name, variant in models:
                found.model(name, variant)
                found.unload(name)
        return {each for each in (encoder, plain, caching, cached, decoder) if found.is_open(*each)}

    assert generate(keeping, encoder, plain, decoder) == {encoder, plain, decoder}
    assert generate(keeping, encoder, caching, cached) == {encoder, caching, cached, decoder}
    del counted["vae_decoder"]
    assert generate(keeping, encoder, plain) == {encoder, plain}
    assert generate(ExecutionPlan(keep_loaded=True), encoder) == {encoder, plain}
    assert generate(ExecutionPlan(), encoder) == set()
    assert found.held_bytes == 0


class Tokenizers:
    """Opens tokenizers, and counts them."""

    def __init__(self):
        self.opened, self.alive = 0, WeakSet()

    def open(self):
        tokenizer = Doubler()
        self.alive.add(tokenizer)
        self.opened += 1
        return tokenizer


@pytest.mark.parametrize("kept", [True, False])
def test_a_tokenizer_is_loaded_as_long_as_its_text_encoder(opened, kept):
    _, components, _ = opened
    found, tokenizers = components(ExecutionPlan()), Tokenizers()
    for _ in range(3):
        with found.exclusive(plan=ExecutionPlan(keep_loaded=kept)):
            for _ in range(2):
                found.tokenizer("text_encoder", tokenizers.open)
            assert len(tokenizers.alive) == 1
            found.model("text_encoder")
            found.unload("text_encoder")
            assert len(tokenizers.alive) == kept
    assert tokenizers.opened == (1 if kept else 3)
    found.close()
    assert not tokenizers.alive


def test_a_tokenizer_is_unloaded_where_its_text_encoder_was_not_opened(opened):
    """A generation that fails in between leaves nothing."""
    _, components, _ = opened
    found, tokenizers = components(ExecutionPlan()), Tokenizers()
    with pytest.raises(RuntimeError), found.exclusive():
        found.tokenizer("text_encoder", tokenizers.open)
        raise RuntimeError
    assert (tokenizers.opened, len(tokenizers.alive)) == (1, 0)


def test_an_observer_sees_every_run(opened):
    _, components, _ = opened
    seen = []
    run = Runner(components(ExecutionPlan()), lambda *call: seen.append(call))
    x = np.ones(3, np.float32)
    outputs = run("unet", {"x": x})
    ((name, variant, feeds, given, seconds),) = seen
    assert (name, variant, seconds >= 0) == ("unet", "plain", True)
    assert feeds["x"] is x
    assert given is outputs


def test_what_pads_otherwise_is_opened_again(opened):
    """Convolutions of all but text encoders, where an image tiles and the next one doesn't."""
    package, _, calls = opened

    def open_model(path, _deltas, strategy, **_options):
        calls.append((path.parent.name, strategy.circular))
        return Doubler()

    found = Components(package, open_model, keep_loaded=True)
    for axes in ("", "xy", "xy", ""):
        with found.exclusive(circular=axes):
            for name in ("text_encoder", "unet", "vae_decoder"):
                found.model(name)
    pads = [("unet", ""), ("vae_decoder", ""), ("unet", "xy"), ("vae_decoder", "xy"), ("unet", ""), ("vae_decoder", "")]
    assert calls == [("text_encoder", ""), *pads]


def test_graphs_of_a_component_are_opened_with_the_same_weights():
    given = []

    def open_model(_path, _deltas, _strategy, *, shared_weights, **_options):
        given.append(shared_weights)
        return Doubler()

    package = Package.open(bundled()["pictogram"])
    found = Components(package, open_model, keep_loaded=False, extra_packages={REFINER: package})
    for name, variant in (("unet", PLAIN), ("unet", "cached"), ("vae_decoder", PLAIN), (f"{REFINER}unet", PLAIN)):
        found.model(name, variant)
    assert given[0] is given[1]
    assert len({*map(id, given)}) == 3
