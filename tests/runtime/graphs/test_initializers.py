"""Weights of graphs are read as the onnx library reads them."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import sdonnx_models
from onnx import numpy_helper
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.graphs.initializers import pack_int4, read_initializers, unpack_int4

UNET = Path(sdonnx_models.__file__).parent / "pictogram" / "unet" / "model.onnx"


def test_a_graphs_weights_are_those_that_onnx_reads() -> None:
    found = read_initializers(UNET)
    expected = {each.name: numpy_helper.to_array(each) for each in onnx.load(UNET).graph.initializer}
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        assert np.array_equal(found[name].read(), data)


def test_a_cut_graph_is_refused(tmp_path: Path) -> None:
    data = UNET.read_bytes()
    for length in (1, 1000, len(data) - 3):
        (tmp_path / "model.onnx").write_bytes(data[:length])
        with pytest.raises(PackageError, match="is damaged"):
            read_initializers(tmp_path / "model.onnx")


def test_four_bits_are_packed_as_onnx_packs_them() -> None:
    values = np.arange(-8, 7, dtype=np.int8)
    whole = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, values.shape, pack_int4(values).tobytes(), raw=True)
    assert np.array_equal(numpy_helper.to_array(whole).astype(np.int8), values)
    assert np.array_equal(unpack_int4(pack_int4(values), len(values)), values)
