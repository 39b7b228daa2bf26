"""The original single-file layout of each family: weights, configs, settings; and what a file is that is none."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sdonnx_export.checkpoints.open import open_checkpoint, open_source, open_vae
from sdonnx_runtime.errors import ExportError
from support import families
from support.ldm import ldm_vae, ldm_value, prefixed, save_ldm
from support.single_files import EMPTY, FAMILIES, without_config

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("family")
    pipe = FAMILIES[request.param]()
    save_ldm(pipe, directory / "model.safetensors")
    return request.param, pipe, directory / "model.safetensors"


def state(module):
    weights = module.state_dict()
    return {name: tensor.numpy() for name, tensor in weights.items() if not name.endswith("position_ids")}


def parts_of(pipe):
    return {name: getattr(pipe, name) for name in PARTS if getattr(pipe, name, None) is not None}


def test_the_single_files_are_what_diffusers_reads(family, tmp_path):
    """Proof of the fixture: from_single_file gives back the very weights, but for what it doesn't know.

    That is LCM's guidance, and which of two encoders of one width is which; the family of depth maps has no
    from_single_file of its own, so its parts are read as a plain pipeline's.
    """
    name, pipe, path = family
    if name == "depth":
        pipe = families.sd2(in_channels=5)
    pipe.save_pretrained(tmp_path)
    how = {"config": str(tmp_path), "local_files_only": True, "low_cpu_mem_usage": False}  # else it fails over LCM's
    loaded = type(pipe).from_single_file(str(path), **how)
    same_width = hasattr(pipe, "text_encoder_2") and pipe.text_encoder and pipe.unet.config.cross_attention_dim == 128
    for part, module in parts_of(pipe).items():
        if part == "text_encoder_2" and same_width:
            continue
        expected, found = state(module), state(getattr(loaded, part))
        assert set(found) == set(expected)
        differing = {key for key in expected if not np.array_equal(found[key], expected[key])}
        assert differing == ({"time_embedding.cond_proj.weight"} if "lcm" in name and part == "unet" else set())


def test_each_part_has_its_weights(family):
    _, pipe, path = family
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.source == path.name
    assert set(checkpoint.parts) == set(parts_of(pipe))
    for name, module in parts_of(pipe).items():
        expected, weights = state(module), checkpoint.parts[name].weights
        assert set(weights) == set(expected)
        for key, weight in weights.items():
            assert weight.shape == expected[key].shape
            np.testing.assert_array_equal(weight.read(), expected[key], err_msg=key)


def per_level(config):
    """A U-Net's config with a number for each level where diffusers takes one for all, and lists for tuples."""
    levels = len(config["block_out_channels"])
    spread = {
        key: [config[key]] * levels
        for key in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim")
        if isinstance(config.get(key), int)
    }
    return json.loads(json.dumps({**config, **spread}))


def deep(config):
    """The levels whose number of transformer layers means something: with attention, or above the middle."""
    attends = [kind.startswith("CrossAttn") for kind in config["down_block_types"]]
    attends[-1] = attends[-1] or config["mid_block_type"] == "UNetMidBlock2DCrossAttn"
    return attends


def test_configs_are_the_saved_ones(family):
    """Key by key; what is absent is null, the default. The size is the family's, these are tiny."""
    _, pipe, path = family
    checkpoint = open_checkpoint(str(path))
    for name, module in parts_of(pipe).items():
        saved = module.config.to_dict() if name.startswith("text") else dict(module.config)
        found = dict(checkpoint.parts[name].config)
        if name == "unet":
            saved, found = per_level(saved), per_level(found)
            for config in (saved, found):
                layers = config["transformer_layers_per_block"]
                config["transformer_layers_per_block"] = [
                    n for n, read in zip(layers, deep(config), strict=True) if read
                ]
        ours = {key for key in found if key not in ("_class_name", "sample_size", "architectures", "eos_token_id")}
        assert {key: found[key] for key in ours} == {key: listed(saved[key]) for key in ours}
        if not name.startswith("text"):
            changed = {key for key in saved if key not in saved["_use_default_values"] and not key.startswith("_")}
            assert changed - set(found) <= {"sample_size"}


def listed(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("layers", [2, 23])
def test_an_open_clip_that_lacks_its_last_layer(layers, single_files, tmp_path):
    """Converted from diffusers' weights, a file has neither the last layer nor a projection; no layer is left out."""
    prefix = "cond_stage_model.model."
    kept = load_file(single_files("sd2 base"))
    template = {name: tensor for name, tensor in kept.items() if name.startswith(f"{prefix}transformer.resblocks.0.")}
    gone = {name: None for name in kept if "resblocks." in name or name.startswith(f"{prefix}text_projection")}
    repeated = {name.replace(".0.", f".{i}.", 1): tensor for i in range(layers) for name, tensor in template.items()}
    source = without_config(single_files("sd2 base"), tmp_path / "model.safetensors", {**gone, **repeated})
    assert open_checkpoint(source).parts["text_encoder"].config["num_hidden_layers"] == layers
    more = {name.replace(".0.", f".{layers}.", 1): tensor for name, tensor in template.items()}
    source = without_config(tmp_path / "model.safetensors", tmp_path / "one_more.safetensors", more)
    expected = 23 if layers == 23 else 3
    assert open_checkpoint(source).parts["text_encoder"].config["num_hidden_layers"] == expected


def test_a_projection_in_transformers_names_is_not_transposed(single_files, tmp_path):
    """So ComfyUI writes it."""
    name = "conditioner.embedders.1.model.text_projection"
    turned = load_file(single_files("sdxl"))[name].T.contiguous()
    source = without_config(
        single_files("sdxl"), tmp_path / "model.safetensors", {name: None, f"{name}.weight": turned}
    )
    found = open_checkpoint(source).parts["text_encoder_2"].weights["text_projection.weight"].read()
    np.testing.assert_array_equal(found, turned.numpy())


@pytest.mark.parametrize("names", ["ldm", "diffusers", "first_stage_model"])
def test_a_vae_alone_is_scaled_as_the_one_it_replaces(names, single_files, tmp_path):
    """A file of a VAE doesn't say for which U-Net it is; the checkpoint does."""
    vae = families.vae()
    weights = vae.state_dict()
    if names != "diffusers":
        weights = {ldm_vae(name): ldm_value(name, tensor).contiguous() for name, tensor in weights.items()}
    prefix = "first_stage_model." if names == "first_stage_model" else ""
    save_file(prefixed(prefix, weights), tmp_path / "vae.safetensors")
    alone = open_vae(str(tmp_path / "vae.safetensors"))
    assert "scaling_factor" not in alone.config
    assert {name: weight.shape for name, weight in alone.weights.items()} == {k: v.shape for k, v in state(vae).items()}
    for family, scaling in (("sdxl", 0.13025), ("sd2 base", 0.18215)):
        checkpoint = open_source(str(single_files(family)), str(tmp_path / "vae.safetensors"), None, lambda *_: None)
        assert checkpoint.parts["vae"].config["scaling_factor"] == scaling
    whole = open_source(str(single_files("sd2 base")), str(single_files("sdxl")), None, lambda *_: None)
    assert whole.parts["vae"].config["scaling_factor"] == 0.13025


@pytest.mark.parametrize(
    ("family", "what", "changes"),
    [
        ("bk-sdm", "a ControlNet", {"control_model.zero_convs.0.0.weight": EMPTY}),
        ("sd2 base", "the x4 upscaler", {"model.diffusion_model.label_emb.weight": torch.zeros(1000, 8)}),
        ("sd2 base", "Stable unCLIP", {"noise_augmentor.data_mean": EMPTY}),
        ("sdxl", "a model of EDM's formulation", {"edm_mean": torch.zeros(1, 4, 1, 1)}),
        ("sdxl", "a model of EDM's formulation", {"edm_vpred.sigma_max": torch.ones(1)}),
    ],
)
def test_a_relative_of_a_family_that_is_no_checkpoint_of_it(family, what, changes, single_files, tmp_path):
    source = without_config(single_files(family), tmp_path / "model.safetensors", changes)
    with pytest.raises(ExportError, match=f"model.safetensors looks like {what}.*; what can be exported.*; give "):
        open_checkpoint(source)


UNET = "model.diffusion_model."
PECULIARITIES = {
    "seven channels": (
        "sd2 base",
        {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 7, 3, 3)},
        "7 input channels; expected 4 or 5 or 8 or 9",
    ),
    "pix2pix of SDXL": (
        "sdxl",
        {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 8, 3, 3)},
        "8 input channels; expected 4 or 9",
    ),
    "sizes in Stable Diffusion 2": ("sd2 base", {f"{UNET}label_emb.0.0.weight": torch.zeros(8, 8)}, "label_emb"),
    "no sizes in SDXL": ("sdxl", {f"{UNET}label_emb.0.0.weight": None}, "lacks the weight"),
    "no projection in SDXL": ("sdxl", {"conditioner.embedders.1.model.text_projection": None}, "lacks the weight"),
    "no token embedding": ("refiner", {"conditioner.embedders.0.model.token_embedding.weight": None}, "lacks the we"),
    "another layer": ("refiner", {f"{UNET}time_embed.4.weight": EMPTY}, "unexpected key 'time_embed.4.weight'"),
    "another weight": ("sdxl", {"conditioner.embedders.2.x": EMPTY}, "1 unexpected keys"),
}


@pytest.mark.parametrize("how", PECULIARITIES)
def test_weights_that_a_family_does_not_have_are_refused(how, single_files, tmp_path):
    family, changes, message = PECULIARITIES[how]
    with pytest.raises(ExportError, match=message) as error:
        open_checkpoint(without_config(single_files(family), tmp_path / "model.safetensors", changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        (("first_stage_model.",), "lacks a VAE"),
        (("conditioner.embedders.0.",), "lacks one text encoder"),
        (("conditioner.",), "lacks a text encoder"),
        (("conditioner.", "first_stage_model."), "lacks a VAE and a text encoder"),
    ],
)
def test_missing_components_are_named(prefixes, message, single_files, tmp_path):
    gone = {name: None for name in load_file(single_files("sdxl")) if name.startswith(prefixes)}
    with pytest.raises(ExportError, match=f"{message};"):
        open_checkpoint(without_config(single_files("sdxl"), tmp_path / "model.safetensors", gone))


def test_a_depth_for_each_block_is_read_off_the_keys(single_files):
    config = open_checkpoint(str(single_files("ssd-1b"))).parts["unet"].config
    assert config["mid_block_type"] == "UNetMidBlock2D"
    assert config["reverse_transformer_layers_per_block"] == [[2, 3], [2, 1], 1]
    assert config["transformer_layers_per_block"][1:] == [1, 2]
    assert open_checkpoint(str(single_files("bk-sdm"))).parts["unet"].config["mid_block_type"] is None
    assert "reverse_transformer_layers_per_block" not in open_checkpoint(str(single_files("sdxl"))).parts["unet"].config
