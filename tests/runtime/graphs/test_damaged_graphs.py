"""Damaged ``.onnx`` files: whatever is changed in one, reading it gives what it holds or a PackageError."""

import pytest
from sdonnx_models import bundled
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.graphs.initializers import read_initializers
from sdonnx_runtime.graphs.partition import read_stages

GRAPH = bundled()["pictogram"] / "vae_decoder" / "model.onnx"


def flip(data, rng):
    """Change a few bytes."""
    changed = bytearray(data)
    for place in rng.integers(0, len(data), rng.integers(1, 8)):
        changed[place] = rng.integers(0, 256)
    return bytes(changed)


def remove(data, rng):
    start = int(rng.integers(0, len(data)))
    return data[:start] + data[start + int(rng.integers(1, 100)) :]


def insert(data, rng):
    start = int(rng.integers(0, len(data)))
    return data[:start] + rng.bytes(int(rng.integers(1, 20))) + data[start:]


def noise(_data, rng):
    return rng.bytes(int(rng.integers(0, 200)))


@pytest.mark.parametrize("damage", [flip, remove, insert, noise])
def test_damaged_graph_raises_package_error_or_is_read(damage, tmp_path, rng):
    """Damage lies in the first 4000 bytes in half of the cases, so that what follows is reached from there."""
    path, data = tmp_path / "model.onnx", GRAPH.read_bytes()
    refused = 0
    for index in range(60):
        near = 4000 if index % 2 else len(data)
        path.write_bytes(damage(data[:near], rng) + (data[near:] if damage is not noise else b""))
        try:
            read_initializers(path)
            read_stages(path)
        except PackageError:
            refused += 1
    assert refused > 5


def test_missing_weights_file_raises_package_error(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(GRAPH.read_bytes())
    weight = next(each for each in read_initializers(path).values() if each.external)
    with pytest.raises(PackageError, match="is damaged at"):
        weight.read()
