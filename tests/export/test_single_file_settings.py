"""Settings that single files imply: pipelines, tokenizers, prediction types, schedulers."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from sdonnx_export.checkpoints.open import open_checkpoint, open_vae
from support import families
from support.ldm import save_ldm
from support.single_files import EMPTY, without_config

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
def test_settings_and_tokenizers(name, single_files):
    """As model_index.json and the tokenizers of the published repositories have them."""
    checkpoint = open_checkpoint(str(single_files(name)))
    assert checkpoint.settings == SETTINGS[name]
    first = {"tokenizer": OPEN_CLIP if name in ("sd2 base", "sd2 inpaint", "depth") else OPENAI}
    second = {"tokenizer_2": OPEN_CLIP}
    expected = second if name == "refiner" else {**first, **second} if name.startswith("sdxl") else first
    assert checkpoint.tokenizers == expected
    assert checkpoint.defaults == {}
    if "2" in "".join(expected):
        assert checkpoint.parts["text_encoder_2"].config["architectures"] == ["CLIPTextModelWithProjection"]
        assert checkpoint.parts["text_encoder_2"].config["eos_token_id"] == 2


SIZES = {
    "sd2 base": (96, "v_prediction"),
    "sd2 inpaint": (64, "epsilon"),
    "depth": (64, "epsilon"),
    "bk-sdm": (64, "epsilon"),
    "sdxl": (128, "epsilon"),
    "refiner": (128, "epsilon"),
}


@pytest.mark.parametrize("name", SIZES)
def test_settings_of_the_published_models_without_a_config_file(name, single_files, tmp_path):
    checkpoint = open_checkpoint(without_config(single_files(name), tmp_path / "model.safetensors"))
    unet = checkpoint.parts["unet"].config
    assert (unet["sample_size"], checkpoint.scheduler["prediction_type"]) == SIZES[name]
    channels = unet["block_out_channels"]
    heads = 8 if name == "bk-sdm" else [max(width // 64, 1) for width in channels]
    assert unet["attention_head_dim"] == heads
    scaling = 0.13025 if name in ("sdxl", "refiner") else 0.18215
    assert checkpoint.parts["vae"].config["scaling_factor"] == scaling
    assert open_vae(str(tmp_path / "model.safetensors")).config["scaling_factor"] == scaling


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
def test_the_prediction_type(family, name, weights, expected, single_files, tmp_path):
    checkpoint = open_checkpoint(without_config(single_files(family), tmp_path / f"{name}.safetensors", weights))
    assert (checkpoint.scheduler["prediction_type"], checkpoint.parts["unet"].config["sample_size"]) == expected


def test_the_prediction_type_from_the_original_config(tmp_path):
    made = {
        "sd2 eps": (families.sd2, EPSILON),
        "sd2 v": (lambda: families.sd2(prediction_type=V), V),
        "sdxl eps": (families.sdxl, EPSILON),
        "sdxl v": (lambda: families.sdxl(scheduler=families.scheduler(prediction_type=V)), V),
    }
    for name, (make, predicts) in made.items():
        save_ldm(make(), tmp_path / f"{name}.safetensors")
        assert open_checkpoint(str(tmp_path / f"{name}.safetensors")).scheduler["prediction_type"] == predicts


def test_a_pickled_file_tells_the_training_step(single_files, tmp_path):
    """diffusers' rule: after 875000 steps it is Stable Diffusion 2's base model, which predicts the noise."""
    weights = load_file(single_files("sd2 base"))
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
def test_schedulers(family, name, weights, kind, spacing, single_files, tmp_path):
    config = open_checkpoint(without_config(single_files(family), tmp_path / f"{name}.safetensors", weights)).scheduler
    assert (config["_class_name"], config.get("timestep_spacing")) == (kind, spacing)
    assert config.get("rescale_betas_zero_snr", False) == ("ztsnr" in weights)
    assert {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}.items() <= config.items()
    made = getattr(diffusers, kind).from_config(config)
    assert not set(config) - {"_class_name"} - set(made.config)


def test_a_midas_network_is_left_out(single_files, tmp_path):
    more = {"depth_model.model.pretrained.cls_token": torch.zeros(1, 1, 4)}
    source = without_config(single_files("depth"), tmp_path / "512-depth.safetensors", more)
    assert open_checkpoint(source).settings == SETTINGS["depth"]
