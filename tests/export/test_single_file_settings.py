"""Settings that single files imply: pipelines, tokenizers, prediction types, schedulers."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from sdonnx_export.checkpoints.companions import Companions
from sdonnx_export.checkpoints.open import open_checkpoint, open_vae
from sdonnx_runtime.errors import ExportError
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


def spec(**keys):
    return {f"modelspec.{key}": value for key, value in keys.items()}


KOHYA_V = spec(architecture="stable-diffusion-xl-v1-base", prediction_type="v", resolution="1024x1024")
COMFYUI_V = spec(architecture="stable-diffusion-xl-v1-base", predict_key="v")
V_PRED, ZTSNR = {"v_pred": EMPTY}, {"ztsnr": EMPTY}
TRAINER = "the file's training metadata"
SPEC, OPTION = "the file's ModelSpec metadata", "the option --prediction-type"


@pytest.mark.parametrize(
    ("family", "name", "weights", "metadata", "expected"),
    [
        ("sdxl", "model", {}, KOHYA_V, f"{V}, from {SPEC}"),
        ("sdxl", "model", {}, COMFYUI_V, f"{V}, from {SPEC}"),
        ("sdxl", "model", {}, spec(prediction_type="V-Prediction"), f"{V}, from {SPEC}"),
        ("sd2 base", "model", {}, spec(prediction_type="epsilon"), f"{EPSILON}, from {SPEC}"),
        (
            "sd2 base",
            "model",
            {},
            spec(architecture="stable-diffusion-v2-512"),
            f"{EPSILON}, from the architecture in the file's ModelSpec metadata",
        ),
        (
            "sd2 base",
            "v2-512",
            {},
            spec(architecture="stable-diffusion-v2-768-v", prediction_type="v"),
            f"{V}, from {SPEC}",
        ),
        ("sd2 base", "model", {}, spec(architecture="stable-diffusion-v2"), f"{V}, the default of Stable Diffusion 2"),
        ("sdxl", "model", {}, {"ss_v_parameterization": "True"}, f"{V}, from the file's training metadata"),
        ("bk-sdm", "model", {}, {"ss_base_model_version": "sd_v2_v"}, f"{V}, from the file's training metadata"),
        ("sdxl", "model", V_PRED, {}, f"{V}, from the tensor 'v_pred'"),
        (
            "sdxl",
            "model",
            V_PRED,
            spec(prediction_type="epsilon"),
            f"{V}, from the tensor 'v_pred'; {SPEC} says {EPSILON}",
        ),
        ("sdxl", "noob-vpred", {}, spec(prediction_type="epsilon"), f"{EPSILON}, from {SPEC}"),
        ("sdxl", "noobaiXLNAIXL_vPred10Version", {}, {}, f"{V}, from the file's name"),
        ("sdxl", "noobaiXLNAIXL_epsilonPred11", {}, {}, f"{EPSILON}, from the file's name"),
        ("sdxl", "sd_xl_base_1.0", {}, spec(prediction_type=" "), f"{EPSILON}, the default of Stable Diffusion XL"),
    ],
)
def test_where_the_prediction_type_is_said(family, name, weights, metadata, expected, single_files, tmp_path):
    """In kohya's, ComfyUI's and OneTrainer's files; what was read where is in the package's manifest."""
    source = without_config(single_files(family), tmp_path / f"{name}.safetensors", weights, metadata)
    checkpoint = open_checkpoint(source)
    assert checkpoint.stated["prediction type"] == expected
    assert checkpoint.scheduler["prediction_type"] == expected.split(",")[0]


def test_the_original_config_counts_before_metadata(tmp_path):
    path = tmp_path / "model.safetensors"
    save_ldm(families.sdxl(), path)
    save_file(load_file(path), path, spec(prediction_type="v"))
    said = open_checkpoint(str(path)).stated["prediction type"]
    assert said == f"{EPSILON}, from the .yaml config next to it; {SPEC} says {V}"


@pytest.mark.parametrize(("key", "value"), [("prediction_type", "flow"), ("predict_key", "edm")])
def test_a_prediction_type_that_is_not_supported(key, value, single_files, tmp_path):
    source = without_config(single_files("sdxl"), tmp_path / "model.safetensors", {}, spec(**{key: value}))
    with pytest.raises(ExportError, match=f"predicts '{value}', says {SPEC}; supported: .*; give"):
        open_checkpoint(source)
    found = open_checkpoint(source, companions=Companions(prediction_type=V))
    assert found.stated["prediction type"] == f"{V}, from {OPTION}; {SPEC} says {value}"


@pytest.mark.parametrize(
    ("name", "weights", "metadata", "zero_snr", "said"),
    [
        ("model", {**V_PRED, **ZTSNR}, {}, True, "zero terminal SNR, from the tensor 'ztsnr'"),
        ("model", ZTSNR, spec(prediction_type="v"), True, "zero terminal SNR, from the tensor 'ztsnr'"),
        ("model", ZTSNR, {}, False, "the tensor 'ztsnr' says zero terminal SNR; ignored, since epsilon"),
        (
            "model",
            V_PRED,
            {"ss_zero_terminal_snr": "True"},
            True,
            f"zero terminal SNR, from {TRAINER}",
        ),
        ("model", V_PRED, {"ss_zero_terminal_snr": "False"}, False, None),
        ("fluffy-terminal-snr-vpred", {}, {}, True, "zero terminal SNR, from the file's name"),
        (
            "model",
            {**V_PRED, "alphas_cumprod": "zero"},
            {},
            True,
            "zero terminal SNR, from the tensor 'alphas_cumprod'",
        ),
        ("model", {**V_PRED, "alphas_cumprod": "usual"}, {}, False, None),
    ],
)
def test_where_zero_terminal_snr_is_said(name, weights, metadata, zero_snr, said, single_files, tmp_path):
    """OneTrainer writes the noise schedule itself. As in ComfyUI, it has no effect on epsilon."""
    zero = weights.get("alphas_cumprod") == "zero"
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = diffusers.DDIMScheduler(**betas, rescale_betas_zero_snr=zero).alphas_cumprod
    weights = {key: schedule if key == "alphas_cumprod" else value for key, value in weights.items()}
    checkpoint = open_checkpoint(
        without_config(single_files("sdxl"), tmp_path / f"{name}.safetensors", weights, metadata)
    )
    config = checkpoint.scheduler
    assert config.get("rescale_betas_zero_snr", False) == zero_snr
    assert config["timestep_spacing"] == ("trailing" if zero_snr else "leading")
    assert (checkpoint.stated.get("noise schedule") or "").startswith(said or "")
    assert (said is None) == ("noise schedule" not in checkpoint.stated)


@pytest.mark.parametrize(
    ("family", "resolution", "size"),
    [
        ("sdxl", "768x768", 96),
        ("bk-sdm", "768x768", 96),
        ("sdxl", "832x1216", 128),
        ("sdxl", "1024", 128),
        ("sdxl", "8x8", 128),
        ("sdxl", "32768x32768", 128),
        ("sd2 base", "512x512", 64),
    ],
)
def test_the_size_of_modelspec(family, resolution, size, single_files, tmp_path):
    """The side of a square of as many pixels, where that is a sensible size."""
    metadata = spec(resolution=resolution)
    checkpoint = open_checkpoint(without_config(single_files(family), tmp_path / "model.safetensors", {}, metadata))
    assert checkpoint.parts["unet"].config["sample_size"] == size


@pytest.mark.parametrize(
    "architecture",
    [
        "flux-1-dev", "Flux.1-dev", "chroma", "stable-diffusion-3-m", "stable-diffusion-v3-medium", "lumina-2",
        "hunyuan-image-2.1", "anima-preview", "stable-cascade-v1-stage-a", "wuerstchen-v2-prior", "pixart-sigma",
        "stable-diffusion-v2-unclip-h", "stable-video-diffusion-img2vid-v1", "sana", "Qwen-Image", "Z-Image",
    ],
)  # fmt: skip
def test_an_architecture_that_is_not_supported_is_refused_by_name(architecture, tmp_path):
    metadata = spec(architecture=architecture)
    save_file({"blocks.0.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors", metadata)
    with pytest.raises(ExportError, match=f"of the architecture '{architecture.lower()}' .*; .* exported.*; give"):
        open_checkpoint(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("family", "architecture", "said"),
    [
        ("sdxl", "stable-diffusion-xl-v1-base", None),
        ("sdxl", "stable-diffusion-xl-turbo-v1", None),
        ("refiner", "stable-diffusion-xl-v1-refiner", None),
        ("bk-sdm", "stable-diffusion-v1/lora", None),
        ("sd2 base", "stable-diffusion-v2-768-v", None),
        (
            "sdxl",
            "stable-diffusion-v1",
            "Stable Diffusion XL, from the weights; the file's ModelSpec metadata says s",
        ),
        ("sdxl", "Illustrious", "Stable Diffusion XL, from the weights; the file's ModelSpec metadata says i"),
    ],
)
def test_the_weights_tell_the_family(family, architecture, said, single_files, tmp_path):
    metadata = spec(architecture=architecture)
    checkpoint = open_checkpoint(without_config(single_files(family), tmp_path / "model.safetensors", {}, metadata))
    found = checkpoint.stated.get("architecture")
    assert (found is None) if said is None else found.startswith(said)


def test_an_architecture_of_few_steps(single_files, tmp_path):
    metadata = spec(architecture="stable-diffusion-xl-turbo-v1", resolution="512x512")
    checkpoint = open_checkpoint(without_config(single_files("sdxl"), tmp_path / "model.safetensors", {}, metadata))
    assert checkpoint.defaults == {"num_inference_steps": 1, "guidance_scale": 1.0}
    assert checkpoint.scheduler["timestep_spacing"] == "trailing"
    assert checkpoint.parts["unet"].config["sample_size"] == 64


@pytest.mark.parametrize(
    ("architecture", "factor"),
    [("stable-diffusion-xl-v1/vae", 0.13025), ("stable-diffusion-v1/vae", 0.18215), ("", None)],
)
def test_the_scaling_factor_of_a_vae_that_says_its_family(architecture, factor, single_files, tmp_path):
    weights = {name: None for name in load_file(single_files("sdxl")) if not name.startswith("first_stage_model.")}
    metadata = spec(architecture=architecture)
    source = without_config(single_files("sdxl"), tmp_path / "vae.safetensors", weights, metadata)
    assert open_vae(source).config.get("scaling_factor") == factor


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
