"""Checkpoints as the exporter opens them, compared with one another."""

import numpy as np
from sdonnx_export.checkpoints.open import open_source


def open_with(source, **companions):
    """Open what `export` does with these options."""
    name = None if source is None else str(source)
    return open_source(name, companions.pop("vae", None), None, lambda *_: None, **companions)


def assert_same(found, expected):
    """Everything that goes into a package."""
    for field in ("source", "scheduler", "tokenizers", "settings", "defaults", "stated"):
        assert getattr(found, field) == getattr(expected, field), field
    assert_same_parts(found, expected)


def assert_same_parts(found, expected):
    """Configs and weights."""
    assert set(found.parts) == set(expected.parts)
    for name, part in expected.parts.items():
        assert found.parts[name].config == part.config
        assert_same_weights(found.parts[name], part)


def assert_same_weights(found, expected):
    """The weights of a component."""
    assert set(found.weights) == set(expected.weights)
    for key, weight in expected.weights.items():
        np.testing.assert_array_equal(found.weights[key].read(), weight.read(), err_msg=key)
