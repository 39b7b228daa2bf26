"""LoRA files of every dtype, in either format, and of tensors that no LoRA has."""

import contextlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.adapters.lora_keys import PARAMETERS
from sdonnx_runtime.adapters.lora_kinds import KINDS
from sdonnx_runtime.adapters.merging import match_loras
from sdonnx_runtime.errors import RequestError

LAYER = "mid_block.attentions.0.proj_in"
FLOATS = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    name = f"lora_unet_{LAYER.replace('.', '_')}"
    return {
        f"{name}.lora_down.weight": torch.randn(2, 6, generator=generator),
        f"{name}.lora_up.weight": torch.randn(5, 2, generator=generator),
        f"{name}.alpha": torch.tensor(1.0),
    }


def merged(path):
    weight = np.zeros((5, 6), np.float32)
    (deltas,) = match_loras("model", {"unet": [f"{LAYER}.weight"]}, [Lora(path=path)]).deltas.values()
    for delta, scale in deltas[f"{LAYER}.weight"]:
        weight = delta.apply(weight, scale)
    return weight


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_file_of_every_dtype_gives_what_torch_makes_of_it(tmp_path, dtype, suffix):
    stored = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    path = tmp_path / f"a.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(stored, path)
    down, up, alpha = (tensor.float() for tensor in stored.values())
    torch.testing.assert_close(torch.from_numpy(merged(path)), up @ down * (alpha / 2))


def test_a_dtype_that_is_not_supported_is_named(tmp_path):
    stored = tensors()
    name = next(iter(stored))
    save_file({**stored, name: stored[name].to(torch.complex64)}, tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match=f"the dtype C64 of '{name}' is not supported"):
        merged(tmp_path / "a.safetensors")


@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "alpha"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 6), (1, 1, 1), (1,) * 72])
def test_tensors_of_other_dimensions_are_refused(tmp_path, part, shape):
    if part == "alpha" and shape in ((), (1, 1, 1)):
        pytest.skip("one number, in any shape")
    stored = tensors()
    name = next(name for name in stored if name.endswith(part))
    save_file({**stored, name: torch.ones(shape)}, tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match=r"a\.safetensors") as error:
        merged(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    ["[", "[1]", "7", '{"alpha_pattern": [1]}', '{"alpha_pattern": {"a": "b"}}', '{"lora_alpha": [1]}', '{"r": NaN}'],
)
def test_damaged_settings_are_refused(tmp_path, settings):
    metadata = {"lora_adapter_metadata": settings}
    save_file(tensors(), tmp_path / "a.safetensors", metadata)
    with pytest.raises(RequestError, match="its setting.* save") as error:
        merged(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)


def test_other_metadata_is_no_fault(tmp_path):
    header = {"__metadata__": None}
    start, data = 0, b""
    for name, tensor in tensors().items():
        raw = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, start + len(raw)]}
        start, data = start + len(raw), data + raw
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    save_file(tensors(), tmp_path / "b.safetensors")
    assert np.array_equal(merged(tmp_path / "a.safetensors"), merged(tmp_path / "b.safetensors"))


SHAPES = [(), (0,), (1,), (2,), (5,), (5, 6), (2, 6), (5, 2), (0, 6), (2, 2, 1, 1), (1,) * 8]
SUFFIXES = {name: suffix for suffix, name in PARAMETERS.items()}


@pytest.mark.parametrize("index", range(len(KINDS) - 1))
def test_tensors_of_any_shapes_are_applied_or_refused(tmp_path, index):
    """For every kind that changes a weight: nothing but RequestError, and weights of the model's size."""
    generator = torch.Generator().manual_seed(index)
    kind, path = KINDS[index], tmp_path / "a.safetensors"
    model = {"unet": [f"{LAYER}.weight", f"{LAYER}.bias"]}
    for _ in range(60):
        names = [*kind.needed, *(name for name in kind.optional if torch.rand((), generator=generator) < 0.5)]
        chosen = torch.randint(len(SHAPES), (len(names),), generator=generator)
        state = {f"unet.{LAYER}{SUFFIXES[n]}": torch.ones(SHAPES[i]) for n, i in zip(names, chosen, strict=True)}
        save_file(state, path)
        with contextlib.suppress(RequestError):
            for delta, scale in match_loras("model", model, [Lora(path=path)]).deltas["unet"][f"{LAYER}.weight"]:
                assert delta.apply(np.zeros((5, 6), np.float32), scale).shape == (5, 6)
