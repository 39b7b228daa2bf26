"""Every spelling of files and keys that diffusers' loaders take gives the weights that they load."""

import json
import logging
import re
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from sdonnx_export.checkpoints.diffusers_directory import read_part
from sdonnx_export.checkpoints.open import open_checkpoint
from sdonnx_runtime.errors import ExportError
from support import families
from support.ldm import save_ldm
from support.paths import ROOT
from support.single_files import FAMILIES
from transformers import CLIPTextModel

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def state(module):
    weights = module.state_dict()
    return {name: tensor.numpy() for name, tensor in weights.items() if not name.endswith("position_ids")}


def assert_equal(part, expected):
    assert set(part.weights) == set(expected)
    for name, weight in part.weights.items():
        assert weight.shape == expected[name].shape
        np.testing.assert_array_equal(weight.read(), expected[name], err_msg=name)


def prefix(old, new):
    return lambda weights, _: {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in weights.items()
    }


def comfy_text_encoders(weights, pipe):
    """As ComfyUI writes several text encoders: both under transformers' names."""
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith("conditioner.")}
    for kind, encoder in (("clip_l", pipe.text_encoder), ("clip_g", pipe.text_encoder_2)):
        rest |= {f"text_encoders.{kind}.transformer.{name}": each for name, each in encoder.state_dict().items()}
        rest[f"text_encoders.{kind}.logit_scale"] = torch.tensor(4.6)
    return rest


def with_ema(weights, _):
    """The running averages that a training keeps, of which `from_single_file` reads none."""
    unet = "model.diffusion_model."
    flat = {
        "model_ema.diffusion_model" + k.removeprefix(unet).replace(".", ""): v for k, v in weights.items() if unet in k
    }
    assert len(flat) > 100
    return {**weights, **{name: tensor + 1 for name, tensor in flat.items()}}


def attention_of_rank(rank):
    """The VAE's attention as linear layers, or as convolutions along a line or over an image."""

    def change(weights, _):
        flat = {k: v.flatten(2).squeeze(-1) if "mid.attn_1" in k and v.ndim > 1 else v for k, v in weights.items()}
        size = (1,) * (rank - 2)
        return {k: v.reshape(*v.shape, *size) if "mid.attn_1" in k and v.ndim == 2 else v for k, v in flat.items()}

    return change


VISUAL = {"visual.proj": torch.zeros(2, 2), "visual.transformer.resblocks.0.ln_1.weight": torch.zeros(2)}
SINGLE_FILES = {
    "the VAE under vae.": ("sd2 base", prefix("first_stage_model.", "vae.")),
    "ComfyUI's text encoder": (
        "pix2pix", prefix("cond_stage_model.transformer.", "text_encoders.clip_l.transformer."),
    ),
    "ComfyUI's text encoders": ("sdxl of two widths", comfy_text_encoders),
    "running averages": ("sd2 base", with_ema),
    "attention of rank 2": ("sd2 base", attention_of_rank(2)),
    "attention of rank 3": ("sd2 base", attention_of_rank(3)),
    "CLIP's image half": (
        "sd2 base", lambda weights, _: {**weights, **{f"cond_stage_model.model.{k}": v for k, v in VISUAL.items()}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SINGLE_FILES)
def test_single_files_have_the_weights_that_diffusers_loads(spelling, tmp_path):
    family, change = SINGLE_FILES[spelling]
    pipe = FAMILIES[family]()
    pipe.save_pretrained(tmp_path / "diffusers")
    save_ldm(pipe, tmp_path / "model.safetensors")
    weights = change(load_file(tmp_path / "model.safetensors"), pipe)
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    config = {"config": str(tmp_path / "diffusers"), "local_files_only": True}
    loaded = type(pipe).from_single_file(str(tmp_path / "model.safetensors"), **config)
    checkpoint = open_checkpoint(str(tmp_path / "model.safetensors"))
    for name in PARTS:
        module = getattr(loaded, name, None)
        assert (name in checkpoint.parts) == (module is not None)
        if module is not None:
            assert_equal(checkpoint.parts[name], state(module))


def pickled(directory, stem, count, variant=""):
    """Turn a part's safetensors into a pickle, or into ``count`` with an index."""
    (path,) = directory.glob("*.safetensors")
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    if count == 1:
        torch.save(weights, directory / f"{stem}{variant}.bin")
        return
    names = [f"{stem}{variant}-{index + 1:05}-of-{count:05}.bin" for index in range(count)]
    where = {name: names[index % count] for index, name in enumerate(weights)}
    for file in names:
        torch.save({name: weights[name] for name in weights if where[name] == file}, directory / file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (directory / f"{stem}.bin.index{variant}.json").write_text(json.dumps(index))


def beside(name):
    """Weights of another file that diffusers doesn't read."""

    def change(directory, stem):
        (path,) = directory.glob("*.safetensors")
        other = {key: tensor + 1 for key, tensor in load_file(path).items()}
        if "safetensors" in name:
            pickled(directory, stem, 1)
            save_file(other, directory / name)
        else:
            torch.save(other, directory / name)

    return change


def renamed(old, new):
    def change(directory, _):
        (path,) = directory.glob("*.safetensors")
        weights = load_file(path)
        changed = {name.replace(old, new) if name.startswith(old) else name: each for name, each in weights.items()}
        assert changed.keys() != weights.keys()
        save_file(changed, path, {"format": "pt"})

    return change


UNET, TEXT = "diffusion_pytorch_model", "pytorch_model"
DIRECTORIES = {
    "pickle": ("unet", lambda directory, stem: pickled(directory, stem, 1), {}),
    "pickled shards": ("unet", lambda directory, stem: pickled(directory, stem, 3), {"use_safetensors": False}),
    "pickled shards of a variant": (
        "unet",
        lambda d, stem: pickled(d, stem, 2, ".fp16"),
        {"variant": "fp16", "use_safetensors": False},
    ),
    "pickle of a variant": ("unet", lambda d, stem: pickled(d, stem, 1, ".non_ema"), {"variant": "non_ema"}),
    "a pickle beside it": ("unet", beside("diffusion_pytorch_model.bin"), {}),
    "a variant beside a pickle": ("unet", beside("diffusion_pytorch_model.fp16.safetensors"), {}),
    "text encoder in pickled shards": ("text_encoder", lambda directory, stem: pickled(directory, stem, 2), {}),
    "text encoder of a whole CLIP": ("text_encoder", renamed("text_model.", "clip.text_model."), {}),
    "VAE with old attention": (
        "vae",
        renamed("decoder.mid_block.attentions.0.to_q", "decoder.mid_block.attentions.0.query"),
        {},
    ),
}
KINDS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
MAKE = {"unet": families.unet, "vae": families.vae, "text_encoder": families.clip}


@pytest.mark.parametrize("layout", DIRECTORIES)
def test_directories_have_the_weights_that_diffusers_loads(layout, tmp_path):
    part, change, options = DIRECTORIES[layout]
    MAKE[part]().save_pretrained(tmp_path)
    change(tmp_path, TEXT if part == "text_encoder" else UNET)
    loaded = KINDS[part].from_pretrained(tmp_path, **options)
    assert_equal(read_part(tmp_path, part), state(loaded))


OURS = {
    "v1", "v2", "xl_base", "xl_refiner", "inpainting", "instruct-pix2pix", "controlnet", "controlnet_xl",
    "controlnet_xl_large", "controlnet_xl_mid", "clip", "clip_sdxl", "clip_sd3", "open_clip", "open_clip_sdxl",
    "open_clip_sdxl_refiner", "open_clip_sd3",
}  # fmt: skip
"""Signs of what can be exported; the others are listed in docs/families.md."""


@pytest.mark.parametrize("kind", [kind for kind in single_file_utils.CHECKPOINT_KEY_NAMES if kind not in OURS])
def test_what_diffusers_reads_beyond_our_families_is_refused(kind, tmp_path, caplog):
    keys = single_file_utils.CHECKPOINT_KEY_NAMES[kind]
    save_file(
        {key: torch.zeros(2, 2) for key in ([keys] if isinstance(keys, str) else keys)}, tmp_path / "x.safetensors"
    )
    with caplog.at_level(logging.WARNING), pytest.raises(ExportError, match=r"x\.safetensors") as caught:
        open_checkpoint(str(tmp_path / "x.safetensors"))
    assert "\n" not in str(caught.value)


def test_the_documentation_lists_every_conversion_of_diffusers():
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    patterns = re.findall(r"`(convert_[\w*]+)`", text)
    functions = [name for name in dir(single_file_utils) if name.startswith("convert_")]
    assert [name for name in functions if not any(fnmatch(name, pattern) for pattern in patterns)] == []
