"""Every config value that diffusers takes gives diffusers' numbers, or is refused by its key."""

import inspect
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from sdonnx_export.checkpoint_model import Part
from sdonnx_export.checkpoints.diffusers_directory import canonical_config, read_part
from sdonnx_export.export import export
from sdonnx_export.models.clip import ClipTextConfig
from sdonnx_export.models.components import build
from sdonnx_export.models.controlnet import ControlNetConfig
from sdonnx_export.models.t2i_adapter import T2IAdapterConfig
from sdonnx_export.models.tiny_vae import TinyVaeConfig
from sdonnx_export.models.unet_config import UNetConfig
from sdonnx_export.models.vae import VaeConfig
from sdonnx_runtime.errors import ExportError, PackageError
from sdonnx_runtime.packages.optimum_layout import infer_optimum_manifest
from support import families
from support.graphs import UNET, VAE, part_of, run, unet_feeds, unet_reference
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

import sdonnx

UNET_WITHOUT_EFFECT = {
    "sample_size", "dropout", "addition_embed_type_num_heads",
    "addition_time_embed_dim", "projection_class_embeddings_input_dim",
}  # fmt: skip
"""Without ``addition_embed_type``, diffusers reads the last two for nothing."""

CLASSES = {
    UNet2DConditionModel: (UNetConfig, UNET_WITHOUT_EFFECT),
    ControlNetModel: (ControlNetConfig, UNET_WITHOUT_EFFECT - {"sample_size", "dropout"}),
    AutoencoderKL: (VaeConfig, {"sample_size"}),
    AutoencoderTiny: (TinyVaeConfig, {"latent_magnitude", "latent_shift", "force_upcast"}),
    T2IAdapter: (T2IAdapterConfig, set()),
}


def parameters(kind):
    """The config keys of a class of diffusers, with their defaults as JSON has them."""
    signature = inspect.signature(kind.__init__).parameters
    return json.loads(json.dumps({name: each.default for name, each in signature.items() if name != "self"}))


@pytest.mark.parametrize("kind", CLASSES)
def test_every_key_is_read_or_known_to_have_no_effect(kind, caplog):
    parser, without_effect = CLASSES[kind]
    defaults = parameters(kind)
    parser.from_dict(defaults)
    for key in defaults:
        changed = {**defaults, key: "something else"}
        if key in without_effect:
            assert parser.from_dict(changed) == parser.from_dict(defaults)
        else:
            with pytest.raises(ExportError, match=f"'{key}'|'attention_head_dim' is 'something else'"):
                parser.from_dict(changed)
    assert caplog.records == []


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not AutoencoderKL])
def test_absent_keys_are_the_defaults(kind):
    parser, _ = CLASSES[kind]
    assert parser.from_dict({}) == parser.from_dict(parameters(kind))


def test_keys_that_diffusers_does_not_know_are_ignored_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert UNetConfig.from_dict({**UNET, "something_new": 3}) == UNetConfig.from_dict(UNET)
    assert "'something_new'" in caplog.text


SPELLINGS = {
    "floats": ({}, {"layers_per_block": 2.0, "block_out_channels": [32.0, 64.0], "norm_num_groups": 16.0}),
    "one for each level": ({}, {"layers_per_block": [2, 2], "cross_attention_dim": [48, 48]}),
    "a module's own lists": ({"cross_attention_dim": (48, 48), "only_cross_attention": [False, False]}, {}),
    "swish": ({"act_fn": "swish"}, {}),
    "no effect": ({"dropout": 0.3, "upcast_attention": True}, {"sample_size": [64, 96], "new_in_diffusers": 1}),
    "wider embedding of the timestep": ({"time_embedding_dim": 96}, {}),
    "null is false": ({"flip_sin_to_cos": None}, {}),
    "no layers where there is no attention": ({"transformer_layers_per_block": (2, 0), "mid_block_type": None}, {}),
    "ids that no embedding reads": ({"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 9}, {}),
}
"""How a U-Net differs from UNET, and how its config is written."""


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_unets_equal_diffusers(spelling, tmp_path):
    changes, written = SPELLINGS[spelling]
    unet = UNet2DConditionModel(**{**UNET, **changes})
    part = part_of(unet)
    config = canonical_config({**part.config, **written})
    feeds = unet_feeds(config)
    for form in ({**part.config, **written}, config):
        found = run(build("unet", Part(config=form, weights=part.weights), "fp32"), tmp_path, **feeds)["out_sample"]
        np.testing.assert_allclose(found, unet_reference(unet, feeds), atol=2e-5)


def test_null_in_a_vae_is_false(tmp_path):
    vae = AutoencoderKL(**{**VAE, "use_quant_conv": None, "use_post_quant_conv": None, "mid_block_add_attention": None})
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    found = run(build("vae_decoder", part_of(vae), "fp32"), tmp_path, latent_sample=latents)["sample"]
    with torch.no_grad():
        wanted = vae.decode(torch.from_numpy(latents)).sample.numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("key", "value", "works"),
    [
        ("cross_attention_dim", [48, 64], "the same number for every level"),
        ("only_cross_attention", [True, False], "False, for every level"),
        ("norm_num_groups", None, "a whole number"),
        ("layers_per_block", 1.5, "a whole number"),
        ("transformer_layers_per_block", [0, 1], "a list of 2"),
        ("num_attention_heads", 4, "null"),
    ],
)
def test_what_has_no_graph_is_named(key, value, works):
    with pytest.raises(ExportError, match=f"'{key}' is .*{works}"):
        UNetConfig.from_dict({**UNET, key: value})


def test_heads_of_a_controlnet():
    """There diffusers takes num_attention_heads before attention_head_dim."""
    found = ControlNetConfig.from_dict({"num_attention_heads": [2, 4, 8, 8], "attention_head_dim": 5})
    assert found.unet.num_attention_heads == (2, 4, 8, 8)


def test_the_text_encoder_of_a_whole_clip(tmp_path):
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    whole = CLIPConfig(text_config={**text, "vocab_size": 99})
    whole.save_pretrained(tmp_path)
    wanted = CLIPTextConfig.from_pretrained(tmp_path)
    families.random(CLIPTextModel(wanted), 1).save_pretrained(tmp_path / "weights")
    shutil.copy(tmp_path / "weights" / "model.safetensors", tmp_path)
    part = read_part(tmp_path, "text_encoder")
    assert ClipTextConfig.from_dict(part.config) == ClipTextConfig.from_dict(wanted.to_dict())
    assert ClipTextConfig.from_dict(whole.to_dict()) == ClipTextConfig.from_dict(wanted.to_dict())
    assert part.config["num_hidden_layers"] == 2
    with pytest.raises(ExportError, match="'use_attention_mask' is True; supported: False"):
        ClipTextConfig.from_dict({**wanted.to_dict(), "use_attention_mask": True})


def edited(package, path, **changes):
    """A copy of a package as an optimum export, with a config changed; ``...`` takes a key out."""
    (package / "sdonnx.json").unlink(missing_ok=True)
    config = {**json.loads((package / path).read_text()), **changes}
    (package / path).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return infer_optimum_manifest(package)


@pytest.fixture
def copy(package, tmp_path):
    return shutil.copytree(package, tmp_path / "package")


@pytest.mark.parametrize(
    ("changes", "sides"),
    [
        ({"sample_size": [64, 96]}, (768, 512)),  # height first
        ({"sample_size": [64.0, 64.0]}, (512, 512)),
        ({"sample_size": 96.0}, (768, 768)),
        ({"sample_size": None}, (512, 512)),
        ({"sample_size": 32, "_diffusers_version": "0.6.0.dev0"}, (512, 512)),
        ({"sample_size": 32, "_diffusers_version": "0.9.0"}, (256, 256)),
        ({"sample_size": 32, "_diffusers_version": "0.10.2"}, (256, 256)),
    ],
)
def test_the_size_that_diffusers_generates(changes, sides, copy):
    assert edited(copy, "unet/config.json", **changes).defaults.sides == sides


def test_a_request_has_the_size_of_the_config(tmp_path):
    """Which is the size of diffusers' image."""
    pipe = families.sd1(unet=families.unet(sample_size=(8, 12)))
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "diffusers")
    wanted = pipe("a cat", num_inference_steps=1, output_type="np").images
    with sdonnx.load(export(str(tmp_path / "diffusers"), tmp_path / "package")) as ours:
        image = ours.generate("a cat", num_inference_steps=1, seed=0).images[0]
    assert image.size == (96, 64)
    assert wanted.shape == (1, 64, 96, 3)


@pytest.mark.parametrize("size", ["64", [64], [64, 64, 64], 0, True, 1.5])
def test_a_size_that_is_none(size, copy):
    with pytest.raises(PackageError, match="for 'sample_size'; expected a .*number.*; correct it"):
        edited(copy, "unet/config.json", sample_size=size)


@pytest.mark.parametrize("value", [True, False, None, ...])
def test_zeros_for_an_empty_negative_prompt(value, opened, tmp_path):
    """SDXL's pipelines have them unless model_index.json says otherwise."""
    copy = shutil.copytree(opened("sdxl")[1].package.root, tmp_path / "package")
    default = inspect.signature(StableDiffusionXLPipeline.__init__).parameters["force_zeros_for_empty_prompt"].default
    wanted = default if value is ... else bool(value)
    manifest = edited(copy, "model_index.json", force_zeros_for_empty_prompt=value)
    assert manifest.conditions.zero_negative is wanted
