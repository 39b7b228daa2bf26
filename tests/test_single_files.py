"""The original single-file layout of each family: weights, configs, settings; and what a file is that is none."""

import json

import diffusers
import families
import numpy as np
import pytest
import torch
from ldm_fixture import ldm_vae, ldm_value, prefixed, save_ldm
from safetensors.torch import load_file, save_file
from sdonnx_export.checkpoints.open import open_checkpoint, open_source, open_vae
from sdonnx_runtime.errors import ExportError

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def sdxl_of_two_widths(**unet):
    """SDXL whose encoders differ in width, as the published do: diffusers tells them by that."""
    second = families.open_clip(projected=True, hidden_size=128, num_attention_heads=2, projection_dim=128)
    made = families.xl_unet(cross_attention_dim=192, pooled=128, **unet)
    return families.sdxl(text_encoder_2=second, unet=made)


FAMILIES = {
    **{name: make for name, make in families.TEXT_TO_IMAGE.items() if name != "sdxs"},
    **families.WITH_PICTURES,
    "depth": families.depth,
    "lcm": families.lcm,
    "sdxl lcm": lambda: families.sdxl(unet=families.xl_unet(time_cond_proj_dim=32)),
    "sdxl of two widths": sdxl_of_two_widths,
    "ssd-1b of two widths": lambda: sdxl_of_two_widths(**families.ASYMMETRIC),
}
"""All but SDXS, whose VAE no single file has a place for."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("family")
    pipe = FAMILIES[request.param]()
    save_ldm(pipe, directory / "model.safetensors")
    return request.param, pipe, directory / "model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Single files by family, made when they are asked for."""
    made = {}

    def find(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("files") / "model.safetensors"
            save_ldm(FAMILIES[name](), made[name])
        return made[name]

    return find


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


SETTINGS = {
    "sd2 base": {"_class_name": "StableDiffusionPipeline"},
    "sdxl": {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
    "bk-sdm": {"_class_name": "StableDiffusionPipeline"},
    "sd1 inpaint": {"_class_name": "StableDiffusionInpaintPipeline"},
    "sd2 inpaint": {"_class_name": "StableDiffusionInpaintPipeline"},
    "sdxl inpaint": {"_class_name": "StableDiffusionXLInpaintPipeline", "force_zeros_for_empty_prompt": True},
    "pix2pix": {"_class_name": "StableDiffusionInstructPix2PixPipeline"},
    "refiner": {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "requires_aesthetics_score": True,
        "force_zeros_for_empty_prompt": False,
    },
    "depth": {"_class_name": "StableDiffusionDepth2ImgPipeline"},
    "lcm": {"_class_name": "LatentConsistencyModelPipeline"},
    "sdxl lcm": {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
}
OPENAI, OPEN_CLIP = "<|endoftext|>", "!"


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_and_tokenizers(name, files):
    """As model_index.json and the tokenizers of the published repositories have them."""
    checkpoint = open_checkpoint(str(files(name)))
    assert checkpoint.settings == SETTINGS[name]
    first = {"tokenizer": OPEN_CLIP if name in ("sd2 base", "sd2 inpaint", "depth") else OPENAI}
    second = {"tokenizer_2": OPEN_CLIP}
    expected = second if name == "refiner" else {**first, **second} if name.startswith("sdxl") else first
    assert checkpoint.tokenizers == expected
    assert checkpoint.defaults == {}
    if "2" in "".join(expected):
        assert checkpoint.parts["text_encoder_2"].config["architectures"] == ["CLIPTextModelWithProjection"]
        assert checkpoint.parts["text_encoder_2"].config["eos_token_id"] == 2


def without_config(path, place, changes=None):
    """A copy of a file alone, its weights changed; None takes one out."""
    weights = {**load_file(path), **(changes or {})}
    save_file({name: tensor.clone() for name, tensor in weights.items() if tensor is not None}, place)
    return str(place)


SIZES = {
    "sd2 base": (96, "v_prediction"),
    "sd2 inpaint": (64, "epsilon"),
    "depth": (64, "epsilon"),
    "bk-sdm": (64, "epsilon"),
    "sdxl": (128, "epsilon"),
    "refiner": (128, "epsilon"),
}


@pytest.mark.parametrize("name", SIZES)
def test_what_the_published_models_have_where_no_config_is_beside(name, files, tmp_path):
    checkpoint = open_checkpoint(without_config(files(name), tmp_path / "model.safetensors"))
    unet = checkpoint.parts["unet"].config
    assert (unet["sample_size"], checkpoint.scheduler["prediction_type"]) == SIZES[name]
    channels = unet["block_out_channels"]
    heads = 8 if name == "bk-sdm" else [max(width // 64, 1) for width in channels]
    assert unet["attention_head_dim"] == heads
    scaling = 0.13025 if name in ("sdxl", "refiner") else 0.18215
    assert checkpoint.parts["vae"].config["scaling_factor"] == scaling
    assert open_vae(str(tmp_path / "model.safetensors")).config["scaling_factor"] == scaling


EMPTY = torch.zeros(0)
V, EPSILON = "v_prediction", "epsilon"


@pytest.mark.parametrize(
    ("family", "name", "weights", "expected"),
    [
        ("sd2 768", "v2-1_768-ema-pruned", {}, (V, 96)),
        ("sd2 base", "v2-1_512-ema-pruned", {}, (EPSILON, 64)),
        ("sd2 base", "512-base-ema", {}, (EPSILON, 64)),
        ("sd2 base", "model", {"global_step": torch.tensor(875000)}, (EPSILON, 64)),
        ("sd2 768", "model", {"global_step": torch.tensor(140000)}, (V, 96)),
        ("sd2 base", "model-15120", {}, (V, 96)),
        ("sd-turbo", "sd_turbo", {}, (EPSILON, 64)),
        ("sdxl", "noob", {"v_pred": EMPTY}, (V, 128)),
        ("sdxl", "sd_xl_turbo_1.0_fp16", {}, (EPSILON, 64)),
        ("sdxl", "dreamshaperXL_turbo", {}, (EPSILON, 128)),
        ("sdxl", "sdxl_lightning_1step_x0", {}, ("sample", 128)),
        ("bk-sdm", "model", {"v_pred": EMPTY}, (V, 64)),
    ],
)
def test_what_a_model_predicts(family, name, weights, expected, files, tmp_path):
    checkpoint = open_checkpoint(without_config(files(family), tmp_path / f"{name}.safetensors", weights))
    assert (checkpoint.scheduler["prediction_type"], checkpoint.parts["unet"].config["sample_size"]) == expected


def test_the_original_config_says_what_a_model_predicts(tmp_path):
    made = {
        "sd2 eps": (families.sd2, EPSILON),
        "sd2 v": (lambda: families.sd2(prediction_type=V), V),
        "sdxl eps": (families.sdxl, EPSILON),
        "sdxl v": (lambda: families.sdxl(scheduler=families.scheduler(prediction_type=V)), V),
    }
    for name, (make, predicts) in made.items():
        save_ldm(make(), tmp_path / f"{name}.safetensors")
        assert open_checkpoint(str(tmp_path / f"{name}.safetensors")).scheduler["prediction_type"] == predicts


def test_a_pickled_file_tells_the_training_step(files, tmp_path):
    """diffusers' rule: after 875000 steps it is Stable Diffusion 2's base model, which predicts the noise."""
    weights = load_file(files("sd2 base"))
    for step, predicts in ((875000, EPSILON), (140000, V)):
        torch.save({"state_dict": weights, "global_step": step}, tmp_path / "model.ckpt")
        assert open_checkpoint(str(tmp_path / "model.ckpt")).scheduler["prediction_type"] == predicts


PNDM, EULER = "PNDMScheduler", "EulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("family", "name", "weights", "kind", "spacing"),
    [
        ("sd2 base", "model", {}, PNDM, None),
        ("sdxl", "model", {}, EULER, "leading"),
        ("refiner", "model", {}, EULER, "leading"),
        ("lcm", "model", {}, "LCMScheduler", None),
        ("sdxl lcm", "model", {}, "LCMScheduler", None),
        ("sd-turbo", "sd_turbo", {}, EULER, "trailing"),
        ("sdxl", "sdxl_lightning_4step", {}, EULER, "trailing"),
        ("bk-sdm", "Hyper-SD15-8step", {}, EULER, "trailing"),
        ("sdxl", "noob", {"v_pred": EMPTY, "ztsnr": EMPTY}, EULER, "trailing"),
    ],
)
def test_schedulers(family, name, weights, kind, spacing, files, tmp_path):
    config = open_checkpoint(without_config(files(family), tmp_path / f"{name}.safetensors", weights)).scheduler
    assert (config["_class_name"], config.get("timestep_spacing")) == (kind, spacing)
    assert config.get("rescale_betas_zero_snr", False) == ("ztsnr" in weights)
    assert {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}.items() <= config.items()
    made = getattr(diffusers, kind).from_config(config)
    assert not set(config) - {"_class_name"} - set(made.config)


@pytest.mark.parametrize("layers", [2, 23])
def test_an_open_clip_that_lacks_its_last_layer(layers, files, tmp_path):
    """Converted from diffusers' weights, a file has neither the last layer nor a projection; no layer is left out."""
    prefix = "cond_stage_model.model."
    kept = load_file(files("sd2 base"))
    template = {name: tensor for name, tensor in kept.items() if name.startswith(f"{prefix}transformer.resblocks.0.")}
    gone = {name: None for name in kept if "resblocks." in name or name.startswith(f"{prefix}text_projection")}
    repeated = {name.replace(".0.", f".{i}.", 1): tensor for i in range(layers) for name, tensor in template.items()}
    source = without_config(files("sd2 base"), tmp_path / "model.safetensors", {**gone, **repeated})
    assert open_checkpoint(source).parts["text_encoder"].config["num_hidden_layers"] == layers
    more = {name.replace(".0.", f".{layers}.", 1): tensor for name, tensor in template.items()}
    source = without_config(tmp_path / "model.safetensors", tmp_path / "one_more.safetensors", more)
    expected = 23 if layers == 23 else 3
    assert open_checkpoint(source).parts["text_encoder"].config["num_hidden_layers"] == expected


def test_a_projection_in_transformers_names_is_not_turned(files, tmp_path):
    """So ComfyUI writes it."""
    name = "conditioner.embedders.1.model.text_projection"
    turned = load_file(files("sdxl"))[name].T.contiguous()
    source = without_config(files("sdxl"), tmp_path / "model.safetensors", {name: None, f"{name}.weight": turned})
    found = open_checkpoint(source).parts["text_encoder_2"].weights["text_projection.weight"].read()
    np.testing.assert_array_equal(found, turned.numpy())


@pytest.mark.parametrize("names", ["ldm", "diffusers", "first_stage_model"])
def test_a_vae_alone_is_scaled_as_the_one_it_replaces(names, files, tmp_path):
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
        checkpoint = open_source(str(files(family)), str(tmp_path / "vae.safetensors"), None, lambda *_: None)
        assert checkpoint.parts["vae"].config["scaling_factor"] == scaling
    whole = open_source(str(files("sd2 base")), str(files("sdxl")), None, lambda *_: None)
    assert whole.parts["vae"].config["scaling_factor"] == 0.13025


def test_a_midas_network_is_left_out(files, tmp_path):
    more = {"depth_model.model.pretrained.cls_token": torch.zeros(1, 1, 4)}
    source = without_config(files("depth"), tmp_path / "512-depth.safetensors", more)
    assert open_checkpoint(source).settings == SETTINGS["depth"]


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
def test_a_relative_of_a_family_that_is_no_checkpoint_of_it(family, what, changes, files, tmp_path):
    source = without_config(files(family), tmp_path / "model.safetensors", changes)
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
    "another layer": ("refiner", {f"{UNET}time_embed.4.weight": EMPTY}, "'time_embed.4.weight' has no place"),
    "another weight": ("sdxl", {"conditioner.embedders.2.x": EMPTY}, "1 weights that no such checkpoint has"),
}


@pytest.mark.parametrize("how", PECULIARITIES)
def test_what_a_family_has_not_is_noticed(how, files, tmp_path):
    family, changes, message = PECULIARITIES[how]
    with pytest.raises(ExportError, match=message) as error:
        open_checkpoint(without_config(files(family), tmp_path / "model.safetensors", changes))
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
def test_what_a_file_lacks_is_named(prefixes, message, files, tmp_path):
    gone = {name: None for name in load_file(files("sdxl")) if name.startswith(prefixes)}
    with pytest.raises(ExportError, match=f"{message};"):
        open_checkpoint(without_config(files("sdxl"), tmp_path / "model.safetensors", gone))


def test_a_depth_for_each_block_is_read_off_the_keys(files):
    config = open_checkpoint(str(files("ssd-1b"))).parts["unet"].config
    assert config["mid_block_type"] == "UNetMidBlock2D"
    assert config["reverse_transformer_layers_per_block"] == [[2, 3], [2, 1], 1]
    assert config["transformer_layers_per_block"][1:] == [1, 2]
    assert open_checkpoint(str(files("bk-sdm"))).parts["unet"].config["mid_block_type"] is None
    assert "reverse_transformer_layers_per_block" not in open_checkpoint(str(files("sdxl"))).parts["unet"].config
