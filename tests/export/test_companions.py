"""What is given beside a source: a VAE, and a base model that lends what the source lacks."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sdonnx_export.checkpoints.open import open_checkpoint, open_source
from sdonnx_export.export import export
from sdonnx_runtime.errors import ExportError, RequestError
from support import families
from support.checkpoints import assert_same, open_with
from support.cli import run_cli
from support.single_files import without_config

UNET, VAE = "model.diffusion_model.", "first_stage_model."
V = "v_prediction"


@pytest.fixture(scope="module")
def whole(single_files, tmp_path_factory):
    """Find a family's whole file without a config next to it, and its VAE in a file of its own."""
    made = {}

    def find(family):
        if family not in made:
            directory = tmp_path_factory.mktemp("whole")
            source = without_config(single_files(family), directory / "model.safetensors")
            weights = {name: tensor for name, tensor in load_file(source).items() if name.startswith(VAE)}
            save_file(weights, directory / "vae.safetensors")
            made[family] = source, str(directory / "vae.safetensors")
        return made[family]

    return find


def unet_of(source, prefix):
    weights = load_file(source).items()
    return {prefix + name.removeprefix(UNET): tensor for name, tensor in weights if name.startswith(UNET)}


LACKING = {
    "no VAE": lambda name: None if name.startswith(VAE) else name,
    "no text encoders": lambda name: name if name.startswith((UNET, VAE)) else None,
    "no first text encoder": lambda name: None if name.startswith("conditioner.embedders.0.") else name,
    "U-Net": lambda name: name if name.startswith(UNET) else None,
    "U-Net as ComfyUI has it": lambda name: name.removeprefix("model.") if name.startswith(UNET) else None,
    "U-Net without a prefix": lambda name: name.removeprefix(UNET) if name.startswith(UNET) else None,
}


@pytest.mark.parametrize(
    ("family", "lacks"),
    [
        *(("bk-sdm", lacks) for lacks in LACKING if "first" not in lacks),
        ("sdxl", "no first text encoder"),
        ("sdxl", "U-Net as ComfyUI has it"),
        ("sd2 base", "U-Net"),
        ("refiner", "U-Net"),
        ("lcm", "no text encoders"),
        ("sd1 inpaint", "U-Net without a prefix"),
    ],
)
def test_a_base_model_lends_what_a_file_lacks(family, lacks, whole, tmp_path):
    base, _ = whole(family)
    kept = {LACKING[lacks](name): tensor for name, tensor in load_file(base).items()}
    save_file({name: tensor for name, tensor in kept.items() if name is not None}, tmp_path / "model.safetensors")
    assert_same(open_with(tmp_path / "model.safetensors", base=base), open_checkpoint(base))


@pytest.mark.parametrize("family", ["bk-sdm", "sdxl"])
def test_a_unet_in_diffusers_names(family, whole, tmp_path):
    """In a file, and in a directory as save_pretrained makes it."""
    base, _ = whole(family)
    module = families.TEXT_TO_IMAGE[family]().unet
    save_file(
        {name: tensor.contiguous() for name, tensor in module.state_dict().items()}, tmp_path / "model.safetensors"
    )
    expected = open_checkpoint(base)
    assert_same(open_with(tmp_path / "model.safetensors", base=base), expected)
    module.save_pretrained(tmp_path / "unet")
    found = open_with(tmp_path / "unet", base=base)
    assert found.source == "unet"
    assert found.parts["unet"].config["sample_size"] == 8
    assert found.scheduler == expected.scheduler
    assert set(found.parts["unet"].weights) == set(expected.parts["unet"].weights)
    assert {name: part for name, part in found.parts.items() if name != "unet"}.keys() == expected.parts.keys() - {
        "unet"
    }


def files_in(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_file_without_a_vae_gives_the_same_package(whole, tmp_path):
    """Byte for byte as the whole file with that VAE."""
    source, vae = whole("bk-sdm")
    expected = files_in(export(source, tmp_path / "whole", vae=vae))
    gone = {name: None for name in load_file(source) if name.startswith(VAE)}
    (tmp_path / "lacking").mkdir()
    lacking = without_config(source, tmp_path / "lacking" / "model.safetensors", gone)
    assert files_in(export(lacking, tmp_path / "lacking-onnx", vae=vae)) == expected


@pytest.mark.parametrize(
    ("family", "gone"),
    [("bk-sdm", "vae"), ("bk-sdm", "tokenizer"), ("bk-sdm", "scheduler"), ("sdxl", "text_encoder"), ("sdxl", "vae")],
)
def test_a_directory_that_lacks_a_component(family, gone, tmp_path):
    families.TEXT_TO_IMAGE[family]().save_pretrained(tmp_path / "whole")
    source = shutil.copytree(tmp_path / "whole", tmp_path / "lacking")
    shutil.rmtree(source / gone)
    found, expected = open_with(source, base=str(tmp_path / "whole")), open_checkpoint(str(tmp_path / "whole"))
    for name, part in expected.parts.items():
        assert found.parts[name].config == part.config
        assert set(found.parts[name].weights) == set(part.weights)
    assert found.scheduler == expected.scheduler
    assert found.tokenizers.keys() == expected.tokenizers.keys()
    with pytest.raises(
        ExportError, match="lacks a VAE; .*--vae|lacks (a|one) text encoder; .*--text-encoder|is missing"
    ):
        open_checkpoint(str(source))


@pytest.mark.parametrize("family", ["bk-sdm", "sdxl"])
def test_a_directory_without_a_vae_is_scaled_as_its_family(family, whole, tmp_path):
    families.TEXT_TO_IMAGE[family]().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "vae")
    found = open_with(tmp_path, vae=_diffusers_vae(tmp_path))
    assert found.parts["vae"].config["scaling_factor"] == (0.13025 if family == "sdxl" else 0.18215)


def _diffusers_vae(directory):
    """A file of a VAE, which names no scaling factor."""
    place = directory / "vae.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in families.vae().state_dict().items()}, place)
    return str(place)


def test_a_package_lends_and_says_what_its_source_said(whole, tmp_path):
    """What the command line exports with a base model and a prediction type."""
    source, _ = whole("bk-sdm")
    save_file(unet_of(source, ""), tmp_path / "model.safetensors")
    options = ("-o", "package", "--base", source, "--prediction-type", V)
    ran = run_cli("export", "model.safetensors", *options, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    said = "v_prediction, from the option --prediction-type"
    assert said in run_cli("info", "package", cwd=tmp_path).stdout
    found, expected = open_with(tmp_path / "model.safetensors", base=str(tmp_path / "package")), open_checkpoint(source)
    assert found.scheduler["prediction_type"] == V
    assert found.stated == {"prediction type": said}
    assert found.parts["unet"].config == expected.parts["unet"].config
    for name, part in expected.parts.items():
        for key, weight in part.weights.items():
            np.testing.assert_array_equal(found.parts[name].weights[key].read(), weight.read(), err_msg=key)


@pytest.mark.parametrize(
    ("name", "markers", "base_markers", "expected"),
    [
        ("model", (), ("v_pred", "ztsnr"), (V, "trailing", True, None)),
        ("model", ("v_pred",), (), (V, "leading", None, None)),
        ("model", ("v_pred", "ztsnr"), (), (V, "trailing", True, None)),
        ("sdxl_lightning_4step_unet", (), (), ("epsilon", "trailing", None, 4)),
        ("sdxl_lightning_1step_unet_x0", (), (), ("sample", "trailing", None, 1)),
    ],
)
def test_what_a_unet_alone_says_counts_before_what_its_base_says(
    name, markers, base_markers, expected, whole, tmp_path
):
    base = without_config(
        whole("sdxl")[0], tmp_path / "base.safetensors", {key: torch.zeros(0) for key in base_markers}
    )
    unet = {**unet_of(base, ""), **{key: torch.zeros(0) for key in markers}}
    save_file(unet, tmp_path / f"{name}.safetensors")
    found = open_with(tmp_path / f"{name}.safetensors", base=base)
    keys = ("prediction_type", "timestep_spacing", "rescale_betas_zero_snr")
    assert (*(found.scheduler.get(key) for key in keys), found.defaults.get("num_inference_steps")) == expected


def test_a_latent_consistency_unet_alone(tmp_path):
    """As latent-consistency/lcm-sdxl: diffusers runs it in SDXL's pipeline, with LCMScheduler."""
    families.sdxl().save_pretrained(tmp_path / "base")
    families.xl_unet(time_cond_proj_dim=32).save_pretrained(tmp_path / "lcm")
    found = open_with(tmp_path / "lcm", base=str(tmp_path / "base"))
    assert found.scheduler["_class_name"] == "LCMScheduler"
    assert found.settings["_class_name"] == "StableDiffusionXLPipeline"


REFUSED = {
    "U-Net of another family": ("sdxl", "bk-sdm", "reads text of .*give a base model of the same family"),
    "U-Net of another family of Stable Diffusion": ("bk-sdm", "sd2 base", "give a base model of the same family"),
    "U-Net of SDXL's refiner": ("refiner", "sdxl", "give a base model of the same family"),
}


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("lacks", ["U-Net", "no VAE"])
def test_a_base_model_of_another_family_is_refused(how, lacks, whole, tmp_path):
    family, base, message = REFUSED[how]
    kept = {LACKING[lacks](name): tensor for name, tensor in load_file(whole(family)[0]).items()}
    save_file({name: tensor for name, tensor in kept.items() if name is not None}, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=message) as error:
        open_with(tmp_path / "model.safetensors", base=whole(base)[0])
    assert "\n" not in str(error.value)


def test_a_base_model_that_lends_nothing(whole, tmp_path):
    source, vae = whole("bk-sdm")
    save_file(unet_of(source, ""), tmp_path / "unet.safetensors")
    unet = str(tmp_path / "unet.safetensors")
    for base, message in ((vae, "looks like a VAE alone"), (unet, "has no text encoder to lend")):
        with pytest.raises(ExportError, match=message):
            open_with(unet, base=base)
    for options in ({"base": source}, {"prediction_type": V}):
        with pytest.raises(ExportError, match="there is nothing to export"):
            open_source(None, vae, None, lambda *_: None, **options)


def test_nothing_is_written_without_what_is_missing(whole, tmp_path):
    source, vae = whole("bk-sdm")
    save_file(unet_of(source, ""), tmp_path / "unet.safetensors")
    for options in ({}, {"vae": vae}):
        with pytest.raises(
            ExportError, match="lacks .*a text encoder; give .*--text-encoder SRC, or a whole checkpoint .* --base SRC"
        ):
            export(str(tmp_path / "unet.safetensors"), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["unet.safetensors"]


def test_the_prediction_type_that_the_user_gives(whole, tmp_path):
    """Counts before all that a file or a directory says."""
    found = open_with(whole("sd2 base")[0], prediction_type="epsilon")
    assert (found.scheduler["prediction_type"], found.parts["unet"].config["sample_size"]) == ("epsilon", 64)
    families.TEXT_TO_IMAGE["bk-sdm"]().save_pretrained(tmp_path)
    assert open_with(tmp_path, prediction_type=V).scheduler["prediction_type"] == V
    with pytest.raises(RequestError, match="prediction type 'flow' is unknown; choose epsilon, v_prediction, sample"):
        export(str(tmp_path), tmp_path / "out", prediction_type="flow")
