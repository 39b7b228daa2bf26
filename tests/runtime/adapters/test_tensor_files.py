"""Files of tensors: what safetensors and torch write is read back; what is damaged or hostile is refused."""

import importlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import sdonnx_models
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from sdonnx_runtime.adapters.tensor_files import load_pickled, open_safetensors, tensors_in
from sdonnx_runtime.errors import PackageError, RequestError
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_safetensors_are_read_as_torch_has_them(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 5).to(dtype), "b.c": torch.randn(2, 1, 4).to(dtype), "none": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "t.safetensors", {"about": "it"})
    file = open_safetensors(tmp_path / "t.safetensors")
    assert file.metadata["about"] == "it"
    for name, tensor in tensors.items():
        assert file.shapes[name] == tensor.shape
        assert np.array_equal(file.read(name), tensor.to(torch.float32).numpy())


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.randn(3, 5)}, path)
    whole = path.read_bytes()
    for data in (b"", whole[:4], whole[:30], whole[:-1], b"\xff" * 100, whole.replace(b"F32", b"F99")):
        path.write_bytes(data)
        with pytest.raises(RequestError, match=r"t\.safetensors"):
            open_safetensors(path)


def test_what_torch_pickles_is_read_without_torch(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    data = {
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "slice": whole[1:4, ::2],
        "transposed": whole.T,
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(3.5),
        "inside": {"count": torch.arange(3)},
    }
    others = {"name": "a name", "step": 7, "none": None, "list": [1.5, True]}
    torch.save({**data, **others}, tmp_path / "t.pt")
    found = load_pickled(tmp_path / "t.pt")
    assert {key: found[key] for key in others} == others
    arrays = tensors_in(found)
    expected = {key: value for key, value in data.items() if isinstance(value, torch.Tensor)}
    for name, tensor in {**expected, "inside.count": torch.arange(3)}.items():
        assert np.array_equal(arrays[name], tensor.detach().float().numpy()), name


def test_a_parameter_dict_is_read_without_torch(tmp_path: Path) -> None:
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.randn(2, 8))})
    torch.save({"string_to_param": parameters}, tmp_path / "t.pt")
    (array,) = tensors_in(load_pickled(tmp_path / "t.pt")).values()
    assert np.array_equal(array, parameters["*"].detach().numpy())


class _Hostile:
    def __init__(self, *call: Any) -> None:
        self._call = call

    def __reduce__(self) -> Any:
        function, *arguments = self._call
        return function, tuple(arguments)


@pytest.mark.parametrize("kind", ["system", "eval", "open", "importer"])
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path, kind: str) -> None:
    sign = tmp_path / "sign"
    calls: dict[str, tuple[Any, ...]] = {
        "system": (os.system, f"touch {sign}"),
        "eval": (eval, f"open({str(sign)!r}, 'w')"),
        "open": (open, str(sign), "w"),
        "importer": (importlib.import_module, "antigravity"),
    }
    torch.save({"string_to_param": {"*": _Hostile(*calls[kind])}}, tmp_path / "t.pt")
    with pytest.raises(RequestError, match="is refused: disallowed global"):
        load_pickled(tmp_path / "t.pt")
    assert not sign.exists()


def _archive(path: Path, pickled: bytes, *elements: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for index, each in enumerate(elements or (b"",)):
            archive.writestr(f"archive/data/{index}", each)


def test_a_file_that_is_not_torchs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    torch.save({"a": torch.randn(100)}, path)
    whole = path.read_bytes()
    for data in (b"", whole[:200], pickle.dumps([1])):
        path.write_bytes(data)
        with pytest.raises(RequestError, match=r"t\.pt"):
            load_pickled(path)
    for pickled in (b"", b"\x80\x02.", b"garbage"):
        _archive(path, pickled)
        with pytest.raises(RequestError, match=r"t\.pt"):
            load_pickled(path)
    _archive(path, pickle.dumps({}), b"0" * 1000, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(RequestError, match="compressed"):
        load_pickled(path)


def test_a_tensor_outside_of_its_elements_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(100)}, tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "t.pt") as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    _archive(tmp_path / "cut.pt", pickled, b"\0" * 396)
    with pytest.raises(RequestError, match="outside"):
        load_pickled(tmp_path / "cut.pt")


def test_a_mutated_pickle_is_read_or_refused(tmp_path: Path) -> None:
    """Thousands of changed bytes, cuts and repetitions: no other error, and no endless work."""
    random = np.random.default_rng(0)
    data = {
        "w": torch.nn.Parameter(torch.randn(2, 3)),
        "half": torch.randn(4).half()[::2],
        "name": "x",
        "list": [1, 2.5],
    }
    torch.save({"string_to_param": torch.nn.ParameterDict({"*": torch.randn(2, 8)}), **data}, tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "t.pt") as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    pickled, elements = (
        entries["data.pkl"],
        [data for name, data in sorted(entries.items()) if name.startswith("data/")],
    )
    refused = 0
    for count in range(2000):
        mutated = bytearray(pickled)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(len(mutated)))
            if count % 3 == 0:
                mutated[at : at + int(random.integers(9))] = mutated[: int(random.integers(9))]
            else:
                mutated[at] = random.integers(256)
        _archive(tmp_path / "m.pt", bytes(mutated), *elements)
        try:
            tensors_in(load_pickled(tmp_path / "m.pt"))
        except RequestError:
            refused += 1
    assert 1000 < refused < 2000


def test_dictionaries_in_dictionaries_without_end_are_data(tmp_path: Path) -> None:
    _archive(tmp_path / "t.pt", b"\x80\x02" + b"}U\x01a" * 100_000 + b"}" + b"s" * 100_000 + b".")
    assert tensors_in(load_pickled(tmp_path / "t.pt")) == {}
