"""GGUF files are exported as what the gguf package reads of them; others are refused in one line."""

import re
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sdonnx_export.checkpoint_model import Weight
from sdonnx_export.checkpoints.files import open_file
from sdonnx_export.checkpoints.gguf.blocks import block_elements
from sdonnx_export.checkpoints.gguf.blocks import dequantize as dequantize_ours
from sdonnx_export.checkpoints.ldm.checkpoint import split_checkpoint
from sdonnx_export.checkpoints.ldm.file_settings import SingleFile
from sdonnx_export.checkpoints.ldm.keys import original_prefixes
from sdonnx_export.checkpoints.open import open_checkpoint
from sdonnx_export.export import export
from sdonnx_runtime.errors import ExportError
from support.checkpoints import assert_same_parts
from support.gguf_files import BIG_ENDIAN, TYPES, dequantize, quantize, sd_cpp_names, write, write_unet
from support.single_files import without_config

UNET = "model.diffusion_model."


@pytest.mark.parametrize("kind", TYPES)
def test_elements_are_ggmls_bit_by_bit(kind, rng, tmp_path):
    """Of any bytes, also of scales that are NaN or infinite; and from a file, of what is left of a weight."""
    raw = rng.integers(0, 256, (40, 210 * 144 * 8), np.uint8)
    size = quantize(np.zeros((1, 256), np.float32), kind).nbytes
    raw = raw[:, : size * 16].copy()
    with np.errstate(all="ignore"):
        expected = dequantize(raw, kind)
    found = dequantize_ours(raw.reshape(-1), kind).astype(np.float32)
    np.testing.assert_array_equal(found.view(np.uint32), expected.reshape(-1).view(np.uint32))
    values = rng.standard_normal((3, 512), np.float32)
    write(tmp_path / "one.gguf", {"a": (quantize(values, kind), kind)})
    read = open_file(tmp_path / "one.gguf")["a"]
    assert (read.dtype, read.shape) == (kind, (3, 512))
    np.testing.assert_array_equal(read.read(), dequantize(quantize(values, kind), kind))


def files_in(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_unet_alone_gives_the_package_of_its_values(single_files, tmp_path):
    """As ComfyUI-GGUF stores it, in every type, with the other parts from a whole file; byte for byte."""
    whole = without_config(single_files("bk-sdm"), tmp_path / "whole.safetensors")
    unet = {name.removeprefix(UNET): each for name, each in load_file(whole).items() if name.startswith(UNET)}
    places = [tmp_path / kind for kind in ("gguf", "safetensors")]
    for place in places:
        place.mkdir()
    values = write_unet(places[0] / "unet.gguf", unet)
    assert any(np.abs(values[name] - unet[name]).max() > 1e-3 for name in unet)
    save_file({name: np.ascontiguousarray(each) for name, each in values.items()}, places[1] / "unet.safetensors")
    made = [
        files_in(export(str(place / f"unet.{place.name}"), place / "package", vae=whole, text_encoders=[whole]))
        for place in places
    ]
    for files in made:
        del files[next(name for name in files if name.name == "sdonnx.json")]  # which names the file
    assert made[0] == made[1]


@pytest.mark.parametrize("family", ["bk-sdm", "sdxl of two widths"])
@pytest.mark.parametrize("converts", [False, True])
def test_a_whole_file_of_stable_diffusion_cpp(family, converts, single_files, tmp_path):
    """With the names of its source, as today, or its own; in float16 the weights of the whole file in float16."""
    weights = {name: each.astype(np.float16) for name, each in load_file(single_files(family)).items()}
    whole = tmp_path / "model.safetensors"
    save_file(weights, whole)
    named = sd_cpp_names(weights) if converts else {n: each for n, each in weights.items() if each.ndim}
    write(tmp_path / "model.gguf", {name: (each, "F16") for name, each in named.items()})
    found, expected = open_checkpoint(str(tmp_path / "model.gguf")), open_checkpoint(str(whole))
    assert_same_parts(found, expected)
    assert (found.scheduler, found.tokenizers, found.settings) == (
        expected.scheduler,
        expected.tokenizers,
        expected.settings,
    )


@pytest.mark.parametrize(("family", "width"), [("sd2 768", 1024), ("refiner", 1280)])
def test_wide_text_encoders_of_stable_diffusion_cpp_are_open_clip(family, width, single_files):
    """Its name for a first text encoder is the same in all families. The shapes are those of the published width."""
    source = open_file(single_files(family))
    old = 128 if family == "sd2 768" else 64
    texts = ("cond_stage_model.", "conditioner.")
    shapes = {
        name: np.broadcast_to(
            np.float32(0), [side // old * width if name.startswith(texts) and side < 1000 else side for side in w.shape]
        )
        for name, w in source.items()
    }

    def split(arrays):
        weights = {name: _weight(each) for name, each in arrays.items()}
        return split_checkpoint(SingleFile(path=single_files(family), weights=original_prefixes(weights)))

    found, expected = split(sd_cpp_names(shapes)), split(shapes)
    assert found.settings == expected.settings
    for name, part in expected.parts.items():
        assert found.parts[name].config == part.config
        assert {key: each.shape for key, each in found.parts[name].weights.items()} == {
            key: each.shape for key, each in part.weights.items()
        }


def _weight(array):
    return Weight(shape=array.shape, dtype="F32", read=lambda: array)


VALUES = np.arange(64, dtype=np.float32).reshape(2, 32)
TENSORS = {"first": (VALUES, "F32"), "second": (quantize(VALUES, "Q8_0"), "Q8_0")}
FIRST = b"\5\0\0\0\0\0\0\0first\2\0\0\0"
"""The first tensor's entry in a header, up to its dimensions."""


def replaced(start, value, kind="Q", behind=b"GGUF"):
    """A change of a number, so many bytes behind a mark."""

    def change(data):
        place = data.index(behind) + len(behind) + start
        return data[:place] + struct.pack(f"<{kind}", value) + data[place + struct.calcsize(kind) :]

    return change


DAMAGED = {
    "an empty header": (lambda data: data[:4], "is incomplete: it ends within its header"),
    "cut in its header": (lambda data: data[:60], "is incomplete: it ends within its header"),
    "cut in its tensors": (lambda data: data[:-32], r"is incomplete: it has \d+ of \d+ bytes"),
    "the first version": (replaced(0, 1, "I"), "a GGUF file of version 1; supported: 2, 3"),
    "an unknown version": (replaced(0, 9, "I"), "a GGUF file of version 9; supported: 2, 3"),
    "tensors without end": (replaced(4, 2**63), "is incomplete: it ends within its header"),
    "fields without end": (replaced(12, 2**63), "is incomplete|not of the GGUF format"),
    "a name without end": (replaced(20, 2**63), "is incomplete: it ends within its header"),
    "a field of an unknown type": (replaced(0, 77, "I", b"general.architecture"), "metadata have a value of type 77"),
    "five dimensions": (replaced(-4, 5, "I", FIRST), "'first' has 5 dimensions"),
    "a shape without end": (replaced(0, 2**62, "Q", FIRST), "'first' of F32 has the shape"),
    "a shape beyond the file": (replaced(0, 2**30, "Q", FIRST), "overlap|is incomplete"),
    "a row of half a block": (
        replaced(0, 31, "Q", b"second\2\0\0\0"),
        re.escape("'second' of Q8_0 has the shape (31, 2)"),
    ),
    "a type that can't be converted": (replaced(16, 20, "I", FIRST), "'first' of the type IQ4_NL, which is not supp"),
    "a type that isn't known": (replaced(16, 99, "I", FIRST), "'first' of the type number 99, which is not supported"),
    "no place of the alignment": (replaced(20, 8, "Q", FIRST), "'first' is at byte 8, no multiple of 32"),
    "a place beyond the file": (replaced(20, 2**40, "Q", FIRST), r"is incomplete: it has \d+ of \d+ bytes"),
    "two tensors in one place": (replaced(20, 256, "Q", FIRST), "'first' and 'second' overlap|'second' and 'first'"),
    "a name twice": (lambda data: data.replace(b"\6\0\0\0\0\0\0\0second", FIRST[:13]), "it has 'first' twice"),
    "a name of control characters": (lambda data: data.replace(b"first", b"fi\nst"), "has unprintable characters"),
    "another architecture": (lambda data: data.replace(b"sdxl", b"flux"), "of the architecture 'flux', which can't"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(how, tmp_path):
    change, message = DAMAGED[how]
    path = write(tmp_path / "model.gguf", TENSORS, architecture="sdxl")
    assert len(open_file(path)) == 2
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ExportError, match=message) as error:
        open_file(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))


WRITTEN = {
    "llama": ({"architecture": "llama"}, "of the architecture 'llama', which can't be exported; give one of Stable"),
    "big-endian": ({"architecture": "sdxl", "endianess": BIG_ENDIAN}, "of a big-endian machine; give a little-endian"),
    "another original shape": (
        {"architecture": "sdxl", "original_shapes": {"first": (3, 32)}},
        re.escape("'first' has 64 elements, its original shape is (3, 32)"),
    ),
    "an original shape that is none": (
        {"architecture": "sdxl", "original_shapes": {"first": (2.0, 32.0)}},
        "'comfy.gguf.orig_shape.first' is no shape",
    ),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_what_cant_be_exported_is_refused_in_one_line(how, tmp_path):
    options, message = WRITTEN[how]
    with pytest.raises(ExportError, match=message):
        open_file(write(tmp_path / "model.gguf", TENSORS, **options))


def test_a_file_without_a_model_is_named(tmp_path):
    write(tmp_path / "model.gguf", {"double_blocks.0.img_attn.qkv.weight": (VALUES, "F32")})
    with pytest.raises(ExportError, match="looks like Flux or Stable Diffusion 3"):
        open_checkpoint(str(tmp_path / "model.gguf"))


def test_no_other_type_is_taken_for_one_that_can_be_converted():
    assert [block_elements(kind) for kind in ("Q8_1", "Q8_K", "IQ4_XS", "TQ1_0", "MXFP4")] == [None] * 5
