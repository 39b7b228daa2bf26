"""Files of torch.save are read as torch reads them, whatever they name; hostile ones run nothing and take nothing."""

import argparse
import enum
import importlib
import os
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.files.tensors import open_tensors
from support.pickles import class_of_another_library, pickled_tensor, pickled_text, write_archive

WHOLE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
DATA = {
    "parameter": torch.nn.Parameter(WHOLE[:2].clone()),
    "slice": WHOLE[1:4, ::2],
    "transposed": WHOLE.T,
    "half": WHOLE[0].half(),
    "bfloat16": WHOLE[0].bfloat16(),
    "double": WHOLE[0].double(),
    "float8": WHOLE[0].to(torch.float8_e4m3fn),
    "uint16": torch.arange(4).to(torch.uint16),
    "scalar": torch.tensor(3.5),
    "none": torch.zeros(0, 3),
    "inside": {"count": torch.arange(3), "more": {"deep": torch.ones(1)}},
    "words": torch.nn.ParameterDict({"*": torch.nn.Parameter(WHOLE[1:3].clone())}),
    "layer": torch.nn.Linear(2, 3),
    "name": "a name",
    "step": 7,
    "list": [1.5, None, True],
}


def _flatten(data: Any, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a dictionary as torch names them."""
    if isinstance(data, torch.Tensor):
        return {path: data.detach()}
    items = data.state_dict().items() if isinstance(data, torch.nn.Module) else getattr(data, "items", dict)()
    return {name: each for key, value in items for name, each in _flatten(value, f"{path}.{key}".strip(".")).items()}


def _assert_reads(path: Path, expected: dict[str, torch.Tensor]) -> None:
    file = open_tensors(path)
    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        assert np.array_equal(file.read(name), tensor.float().numpy()), name


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_what_torch_writes_is_read_without_torch(tmp_path: Path, is_zip: bool, protocol: int) -> None:
    path = tmp_path / "t.pt"
    torch.save(DATA, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    _assert_reads(path, _flatten(DATA))
    assert open_tensors(path).metadata == {"name": "a name", "step": "7"}


def test_the_innermost_state_dict_counts(tmp_path: Path) -> None:
    """diffusers' from_single_file reads them alike."""
    torch.save({"state_dict": {"state_dict": {"a": WHOLE}, "b": WHOLE}, "c": WHOLE}, tmp_path / "t.pt")
    _assert_reads(tmp_path / "t.pt", {"a": WHOLE})


def test_big_endian_storages_are_read(tmp_path: Path) -> None:
    """torch.save keeps the machine's byte order and writes it down."""
    torch.save({"a": WHOLE, "b": WHOLE.bfloat16(), "c": torch.arange(3)}, tmp_path / "t.pt")
    sizes = {"0": 4, "1": 2, "2": 8}
    with zipfile.ZipFile(tmp_path / "t.pt") as read, zipfile.ZipFile(tmp_path / "big.pt", "w") as write:
        for name in read.namelist():
            data, key = read.read(name), name.rpartition("/")[2]
            if "/data/" in name:
                data = np.frombuffer(data, f"u{sizes[key]}").byteswap().tobytes()
            write.writestr(name, b"big" if key == "byteorder" else data)
    assert {n: v.tolist() for n, v in torch.load(tmp_path / "big.pt").items()}["a"] == WHOLE.tolist()
    _assert_reads(tmp_path / "big.pt", {"a": WHOLE, "b": WHOLE.bfloat16(), "c": torch.arange(3)})


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    torch.save({"a": WHOLE}, tmp_path / "t.safetensors")
    _assert_reads(tmp_path / "t.safetensors", {"a": WHOLE})


class Color(enum.Enum):
    """An enum of this module."""

    RED = 1


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_training_checkpoint_is_read_whatever_it_names(tmp_path: Path, protocol: int) -> None:
    """PyTorch Lightning's: callbacks by their classes, hyperparameters of OmegaConf, argparse, NumPy, enums, paths."""
    with (
        class_of_another_library("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint") as callback,
        class_of_another_library("omegaconf.dictconfig.DictConfig") as config,
    ):
        settings = config()
        settings.__dict__["_content"] = {"self": settings, "rate": np.float64(0.1)}
        others = {
            "callbacks": {callback: {"best": np.float32(3), "path": Path("/a"), "owner": callback()}},
            "hyper_parameters": settings,
            "arguments": argparse.Namespace(color=Color.RED, dtype=torch.float16, device=torch.device("cpu")),
            "random": (np.random.default_rng(0).bit_generator.state, np.arange(5), {1, 2}, frozenset("ab"), 1j),
            "sparse": torch.eye(2).to_sparse(),
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
            ("a", ("tuple",)): 2**600,
            "made of": _Call(dict, _Call(zip, [1], [2])),
        }
        weights = {"model.diffusion_model.a": WHOLE, "inner": {"b": WHOLE[0]}}
        saved = {**others, "global_step": 875000, "state_dict": weights}
        torch.save(saved, tmp_path / "t.ckpt", pickle_protocol=protocol)
    _assert_reads(tmp_path / "t.ckpt", {"model.diffusion_model.a": WHOLE, "inner.b": WHOLE[0]})
    assert open_tensors(tmp_path / "t.ckpt").metadata["global_step"] == "875000"


class _Call:
    def __init__(self, *call: Any) -> None:
        self._call = call

    def __reduce__(self) -> Any:
        function, *arguments = self._call
        return function, tuple(arguments)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("kind", ["system", "eval", "open", "importer", "setattr", "getattr"])
def test_nothing_that_a_file_names_is_executed(tmp_path: Path, kind: str, is_zip: bool) -> None:
    sign = tmp_path / "sign"
    calls: dict[str, tuple[Any, ...]] = {
        "system": (os.system, f"touch {sign}"),
        "eval": (eval, f"open({str(sign)!r}, 'w')"),
        "open": (open, str(sign), "w"),
        "importer": (importlib.import_module, "antigravity"),
        "setattr": (setattr, Color, "executed", 1),
        "getattr": (getattr, Color, "RED"),
    }
    torch.save({"a": WHOLE, "x": _Call(*calls[kind])}, tmp_path / "t.pt", _use_new_zipfile_serialization=is_zip)
    _assert_reads(tmp_path / "t.pt", {"a": WHOLE})
    assert not sign.exists()
    assert not hasattr(Color, "executed")
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("qtensor", lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
        ("sparse_tensor", lambda: torch.eye(2).to_sparse()),
        ("negated_view", lambda: torch.ones(2, dtype=torch.complex64).conj().imag),
        ("meta_tensor_no_storage", lambda: torch.ones(2, device="meta")),
    ],
)
def test_a_tensor_of_another_kind_is_named(tmp_path: Path, name: str, tensor: Any) -> None:
    torch.save({"a": {"b": tensor()}}, tmp_path / "t.pt")
    with pytest.raises(RequestError, match=f"'a.b' is not a plain tensor \\('{name}'\\); get it as .safetensors"):
        open_tensors(tmp_path / "t.pt")


def test_a_complex_tensor_is_named_where_it_is_read(tmp_path: Path) -> None:
    torch.save({"a": WHOLE, "x": torch.ones(2, dtype=torch.complex64)}, tmp_path / "t.pt")
    file = open_tensors(tmp_path / "t.pt")
    assert np.array_equal(file.read("a"), WHOLE.numpy())
    with pytest.raises(RequestError, match="the dtype C64 of 'x' is not supported"):
        file.read("x")


def test_what_is_not_a_dictionary_of_tensors_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    torch.save([WHOLE], path)
    with pytest.raises(RequestError, match="it holds 'list', not a dictionary of tensors"):
        open_tensors(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(RequestError, match="TorchScript archive"):
        open_tensors(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(RequestError, match="is a pickle"):
        open_tensors(path)
    write_archive(path, pickle.dumps({}), b"0" * 1000, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(RequestError, match="it is compressed or encrypted"):
        open_tensors(path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, is_zip: bool) -> None:
    path = tmp_path / "t.pt"
    torch.save({"a": torch.randn(100)}, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    for length in (1, 30, 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RequestError, match=r"t\.pt") as error:
            open_tensors(path)
        assert "\n" not in str(error.value)


P = b"\x80\x02"
A = pickled_text("a")
SHARED = b"".join(b"}(U\x01ah%cU\x01bh%cuq%c" % (index, index, index + 1) for index in range(40))
MODULES = b"".join(
    b"cm\nM\n)R}(U\x0b_parametersh%cU\x08_buffersh%cU\x08_modulesh%cubq%c" % (index, index, index, index + 1)
    for index in range(40)
)
NUMBERS = b"".join(b"G" + struct.pack(">d", index) + b"N" for index in range(100_000))
NAMES = b"".join(pickled_text(f"k{index}") + b"h\0" for index in range(100_000))
HOSTILE = {
    "a dictionary within itself": (b"}q\0U\x01ah\0s.", "dictionaries in dictionaries without end"),
    "40 levels of shared dictionaries": (b"}q\0" + SHARED + b".", "dictionaries in dictionaries without end"),
    "40 levels of shared modules": (b"cm\nM\n)Rq\0" + MODULES + b".", None),
    "many names of a dictionary of many numbers": (
        b"}(" + A + b"}q\0(" + NUMBERS + b"u" + NAMES + b"u.",
        "dictionaries in dictionaries without end",
    ),
    "dictionaries in dictionaries": (b"}U\x01a" * 30_000 + b"}" + b"s" * 30_000 + b".", "without end"),
    "a memo index of 2**27": (b"}r\0\0\0\x08.", None),
    "a key of 300,000 nested tuples": (b"})" + b"\x85" * 300_000 + b"Ns.", None),
    "a key of shared tuples": (b")\x85" + b"2\x86" * 60 + b"q\0}h\0Ns.", None),
    "millions of dictionaries": (b"}" * 1_000_100 + b".", "more than a million operations"),
    "a number of a million digits": (b"I" + b"9" * 1_000_000 + b"\n.", "is refused"),
    "a key of a million letters": (b"}X\x40\x42\x0f\0" + b"a" * 1_000_000 + b"Ns.", "a key has 1000000 characters"),
    "an array of a terabyte": (b"\x96\0\0\0\0\0\x01\0\0.", "is refused"),
    "a list copied 10,000 times": (
        b"](" + b"NN\x86" * 10_000 + b"eq\0" + b"ccollections\nOrderedDict\nh\0\x85R0" * 10_000 + b"}.",
        "more than a million operations",
    ),
    "stride 0": (b"}" + A + pickled_tensor([2**31], [0]) + b"s.", "has more elements than that"),
    "a negative stride": (b"}" + A + pickled_tensor([2], [-1]) + b"s.", "not a number of 0 or more"),
    "an offset behind the end": (b"}" + A + pickled_tensor([2], [1], offset=7) + b"s.", "outside of its storage"),
    "a storage behind the end": (b"}" + A + pickled_tensor([9], [1], count=9) + b"s.", "outside of the file"),
    "72 dimensions": (b"}" + A + pickled_tensor([1] * 72, [1] * 72) + b"s.", "'a' has 72 dimensions"),
    "half a surrogate pair": (b"}X\x03\0\0\0\xed\xa0\x80" + pickled_tensor([8], [1]) + b"s.", "surrogates not allowed"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_takes_neither_time_nor_memory(tmp_path: Path, kind: str) -> None:
    pickled, message = HOSTILE[kind]
    path = write_archive(tmp_path / "t.pt", P + pickled, bytes(32))
    tracemalloc.start(1)
    start = time.process_time()
    try:
        if message is None:
            assert open_tensors(path).shapes == {}
        else:
            with pytest.raises(RequestError, match=message):
                open_tensors(path)
        assert time.process_time() - start < 10
        assert tracemalloc.get_traced_memory()[1] < 10 * path.stat().st_size + 200e6
    finally:
        tracemalloc.stop()


def test_one_storage_under_many_names_is_refused(tmp_path: Path) -> None:
    names = b"".join(pickled_text(f"k{i}") + pickled_tensor([250_000], [1], count=250_000) for i in range(150))
    write_archive(tmp_path / "t.pt", P + b"}(" + names + b"u.", bytes(1_000_000))
    with pytest.raises(RequestError, match="its tensors have 150000000 bytes, more than twice the file's"):
        open_tensors(tmp_path / "t.pt")
    torch.save({"a": WHOLE, "b": WHOLE}, tmp_path / "t.pt")
    _assert_reads(tmp_path / "t.pt", {"a": WHOLE, "b": WHOLE})


def test_dictionaries_of_python_2_are_read(tmp_path: Path) -> None:
    """Its OrderedDict is pickled as a call with a list of pairs."""
    pairs = b"ccollections\nOrderedDict\n]](" + A + pickled_tensor([8], [1]) + b"ea\x85R."
    values = torch.arange(8.0)
    write_archive(tmp_path / "t.pt", P + pairs, values.numpy().tobytes())
    _assert_reads(tmp_path / "t.pt", {"a": values})
