"""Fuzzed parsers of tensor files: safetensors, GGUF and pickles of checkpoints, embeddings, LoRA."""

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import save
from sdonnx_export.checkpoints.files import open_file
from sdonnx_models import bundled
from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.adapters.merging import load_adapters, merge_lora
from sdonnx_runtime.adapters.textual_inversion import TextualInversions, read_embedding
from sdonnx_runtime.packages.package import Package

from support import gguf_files
from support.fuzz.campaign import Target
from support.fuzz.mutators import mutate_bytes, mutate_safetensors, mutate_zip
from support.paths import ROOT

PACKAGE = bundled()["pictogram"]
_ADAPTERS = ROOT / "models" / "pictogram" / "adapters"


def safetensors(folder: Path) -> Target:
    """A ``.safetensors`` checkpoint, all of its tensors read."""
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)
    tensors = {f"layer.{index}.weight": torch.ones(3, 2).to(kind) for index, kind in enumerate(floats)}
    tensors |= {str(kind): torch.ones(3, 2).to(kind) for kind in (torch.int64, torch.int8, torch.bool)}
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4), "conv": torch.randn(2, 3, 1, 1)}
    seeds = [save(tensors), save(tensors, {"format": "pt", "modelspec.architecture": "stable-diffusion-v1"})]
    return Target(seeds=seeds, mutate=mutate_safetensors, read=lambda data: _read_all(folder / "t.safetensors", data))


def gguf(folder: Path) -> Target:
    """A GGUF checkpoint, all of its tensors read."""
    kinds = gguf_files.TYPES
    tensors = {kind: (gguf_files.quantize(np.ones((2, 256), np.float32), kind), kind) for kind in kinds}
    path, shapes = folder / "t.gguf", dict.fromkeys(kinds[::2], (64, 2, 2, 2))
    cpp = gguf_files.write(path, tensors).read_bytes()
    comfy = gguf_files.write(path, tensors, architecture="sdxl", original_shapes=shapes).read_bytes()
    return Target(seeds=[cpp, comfy], mutate=mutate_bytes, read=lambda data: _read_all(path, data))


def pickle(folder: Path) -> Target:
    """A pickled checkpoint of torch, zipped or as before torch 1.6, all of its tensors read."""
    whole = torch.randn(6, 4)
    data = {
        "state_dict": {"a.weight": whole[1:4, ::2], "b.bias": whole.T, "half": torch.randn(5).half()},
        "global_step": 7, "epoch": 1, "hyper": {"lr": 1e-4, "names": ["a", (1, 2.5, None, True)]},
        "parameter": torch.nn.Parameter(torch.randn(2).bfloat16()),
    }  # fmt: skip
    seeds = [_pickled(data), _pickled(data, _use_new_zipfile_serialization=False)]
    return Target(seeds=seeds, mutate=_mutate_any, read=lambda data: _read_all(folder / "t.ckpt", data))


def _pickled(data: object, **options: bool) -> bytes:
    stream = BytesIO()
    torch.save(data, stream, **options)
    return stream.getvalue()


def _read_all(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    for weight in open_file(path).values():
        weight.read()


def _mutate_any(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A mutation that suits the format."""
    if data.startswith(b"PK"):
        return mutate_zip(("data.pkl",))(rng, data, [each for each in others if each.startswith(b"PK")])
    return (mutate_safetensors if data[8:9] == b"{" else mutate_bytes)(rng, data, others)


def embedding(folder: Path) -> Target:
    """A textual inversion of diffusers or AUTOMATIC1111, up to its vectors for a package."""
    package = Package.open(PACKAGE)
    vectors = read_embedding(_ADAPTERS / "teal.safetensors").vectors[""]
    values = torch.from_numpy(np.array(vectors))
    a1111 = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": values},
        "name": "ink",
        "step": 9,
        "sd_checkpoint": None,
    }
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(values)})
    seeds = [
        (_ADAPTERS / "teal.safetensors").read_bytes(), save({"emb_params": values}), _pickled(a1111),
        _pickled({"<ink>": values[0]}), _pickled({**a1111, "string_to_param": parameters}),
    ]  # fmt: skip

    def read(data: bytes) -> None:
        path = folder / ("ink.safetensors" if data[8:9] == b"{" else "ink.pt")
        path.write_bytes(data)
        TextualInversions(package, [read_embedding(path)])

    return Target(seeds=seeds, mutate=_mutate_any, read=read)


_STARTS = ("lora_unet_", "lora_te_", "lora_te1_", "lycoris_", "unet.", "text_encoder.", "base_model.model.", "")
_ENDS = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_A.weight", "lora_B.default.weight", "alpha",
    "dora_scale", "lora_magnitude_vector", "hada_w1_a", "hada_w2_b", "hada_t1", "lokr_w1", "lokr_w2_a", "lokr_w2_b",
    "lokr_t2", "diff", "diff_b", "w_norm", "b_norm", "oft_blocks", "a1.weight", "on_input", "bias", "scalar",
    "lora_embedding_A",
)  # fmt: skip


def lora(folder: Path) -> Target:
    """A LoRA file, up to the merged weights of a text encoder; its names are mixed of all trainers' parts."""
    opened = Package.open(PACKAGE)
    smaller = replace(opened.manifest.components["unet"], graphs={"plain": "unet/cached.onnx"})  # read for every file
    components = {**opened.manifest.components, "unet": smaller}
    package = replace(opened, manifest=replace(opened.manifest, components=components))
    path, layer, te, unet = folder / "a.safetensors", "text_model.encoder.layers.0", "self_attn.q_proj", "conv_out"
    width = read_embedding(_ADAPTERS / "teal.safetensors").vectors[""].shape[1]
    up, down = torch.randn(width, 2), torch.randn(2, width)
    kohya, peft = f"lora_te_{layer.replace('.', '_')}_{te.replace('.', '_')}", f"text_encoder.{layer}.{te}"
    seeds = [
        save({f"{kohya}.lora_up.weight": up, f"{kohya}.lora_down.weight": down, f"{kohya}.alpha": torch.tensor(2.0)}),
        save({f"{peft}.lora_B.weight": up, f"{peft}.lora_A.weight": down}, {"lora_adapter_metadata": _METADATA}),
        save({f"{kohya}.{n}": each for n, each in zip(_HADA, (up, down, up.clone(), down.clone()), strict=True)}),
        save({f"{kohya}.lokr_w1": torch.randn(2, 2), f"{kohya}.lokr_w2": torch.randn(width // 2, width // 2)}),
    ]
    layers = [
        f"{layer}.{te}",
        f"{layer}.mlp.fc1",
        f"{layer}.layer_norm1",
        unet,
        "conv_in",
        "up_blocks.2.resnets.1.conv1",
    ]
    layers += [each.replace(".", "_") for each in layers]

    def mutate(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
        if rng.random() < 0.4:
            return mutate_safetensors(rng, data, others)
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:end])
        for name in [*header]:
            if rng.random() < 0.4 and name != "__metadata__":
                entry, renamed = header[name], f"{rng.choice(_STARTS)}{rng.choice(layers)}.{rng.choice(_ENDS)}"
                kept = rng.random() < 0.3
                header[renamed if kept else name.rpartition(".")[0] + "." + rng.choice(_ENDS)] = entry
                if rng.random() < 0.3:
                    entry["shape"] = rng.choice(([*entry["shape"], 1, 1], [1, *entry["shape"]], entry["shape"][::-1]))
                if rng.random() < 0.5:
                    header.pop(name, None)
        packed = json.dumps(header).encode()
        return struct.pack("<Q", len(packed)) + packed + data[end:]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        adapters = load_adapters(package, [Lora(path=path, scale=0.7)], ignore_unmatched=len(data) % 2 == 0)
        if "text_encoder" in adapters.deltas:
            merge_lora(package.graph("text_encoder"), adapters.deltas["text_encoder"])

    return Target(seeds=seeds, mutate=mutate, read=read)


_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_METADATA = json.dumps({"text_encoder.lora_alpha": 4, "text_encoder.alpha_pattern": {"q_proj": 2}, "unet.r": 2})
