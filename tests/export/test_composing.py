"""A package of parts from several sources: U-Net, VAE and text encoders, each from a file or a directory of its own."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from sdonnx_export.checkpoints.open import open_checkpoint, open_text_encoders
from sdonnx_runtime.errors import ExportError
from support import families
from support.checkpoints import assert_same, assert_same_weights, open_with
from support.cli import run_cli
from support.controls import controlnet
from support.gguf_files import quantize, write
from support.reference import PROMPT, SEED, SIZE, assert_equal, psnr, reference
from support.single_files import FAMILIES, without_config

import sdonnx

UNET, VAE = "model.diffusion_model.", "first_stage_model."


def save_module(module, path):
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)
    return str(path)


def save_with_prefix(source, prefix, path):
    found = {name.removeprefix(prefix): each for name, each in load_file(source).items() if name.startswith(prefix)}
    save_file(found, path)
    return str(path)


def save_text_encoders(pipe, directory):
    """In files of their own, as ComfyUI has them."""
    named = {"clip_l": pipe.text_encoder, "clip_g": getattr(pipe, "text_encoder_2", None)}
    return [save_module(each, directory / f"{name}.safetensors") for name, each in named.items() if each is not None]


@pytest.fixture(scope="module")
def parts(single_files, tmp_path_factory):
    """Find a family's whole file, and the same in parts: U-Net, VAE and text encoders."""
    made = {}

    def find(family):
        if family not in made:
            directory = tmp_path_factory.mktemp("parts")
            (directory / "unet").mkdir()
            whole = without_config(single_files(family), directory / "model.safetensors")
            unet = save_with_prefix(whole, UNET, directory / "unet" / "model.safetensors")
            vae = save_with_prefix(whole, VAE, directory / "vae.safetensors")
            made[family] = whole, unet, vae, save_text_encoders(FAMILIES[family](), directory)
        return made[family]

    return find


@pytest.mark.parametrize("family", ["bk-sdm", "sdxl of two widths", "sdxl", "refiner"])
def test_parts_are_the_same_as_the_whole_file(family, parts):
    """Which text encoder is which, the width tells, or the projection where both are equal; not their order."""
    whole, unet, vae, texts = parts(family)
    assert_same(open_with(None, unet=unet, vae=vae, text_encoders=texts[::-1]), open_checkpoint(whole))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The directory of a pipeline of Stable Diffusion 2, whose text encoder is OpenCLIP."""
    directory = tmp_path_factory.mktemp("pipeline") / "sd2"
    families.sd2(prediction_type="v_prediction").save_pretrained(directory)
    return directory


def test_a_text_encoder_of_stable_diffusion_2(pipeline, single_files, tmp_path):
    """Its config tells that it is OpenCLIP's: the same model as the whole file's, padded as that is."""
    whole = without_config(single_files("sd2 768"), tmp_path / "whole.safetensors")
    unet = save_with_prefix(whole, UNET, tmp_path / "model.safetensors")
    expected = open_checkpoint(whole)
    for place in (pipeline, pipeline / "text_encoder"):
        found = open_with(unet, vae=whole, text_encoders=[str(place)])
        assert (found.scheduler, found.settings) == (expected.scheduler, expected.settings)
        assert_same_weights(found.parts["text_encoder"], expected.parts["text_encoder"])
        assert found.parts["text_encoder"].config["hidden_act"] == "gelu"
        assert found.tokenizers == {"tokenizer": pipeline / "tokenizer" if place == pipeline else "!"}


def test_every_source_of_a_text_encoder(parts, package, checkpoint, tmp_path):
    """Directories, packages, whole files, transformers' and OpenCLIP's own files, GGUF."""
    whole, _, _, (clip,) = parts("bk-sdm")
    expected = open_checkpoint(whole).parts["text_encoder"]
    values = load_file(clip)
    write(tmp_path / "clip.gguf", {name: (quantize(each.numpy(), "F32"), "F32") for name, each in values.items()})
    bare = {name.removeprefix("text_model."): each for name, each in values.items()}
    save_file({**bare, "logit_scale": torch.ones(())}, tmp_path / "bare.safetensors")
    for source in (whole, clip, tmp_path / "clip.gguf", tmp_path / "bare.safetensors"):
        (found,) = open_text_encoders(str(source))
        assert_same_weights(found.read("text_encoder"), expected)
    for source in (package, checkpoint, checkpoint / "text_encoder"):
        (found,) = open_text_encoders(str(source))
        assert_same_weights(found.read("text_encoder"), open_checkpoint(str(checkpoint)).parts["text_encoder"])


def test_a_unet_in_place_of_a_checkpoints_own(parts, tmp_path):
    """With its prediction type; all else is the checkpoint's."""
    whole, unet, _, _ = parts("sdxl")
    changed = {UNET + name: tensor + 1 for name, tensor in load_file(unet).items()}
    other = without_config(whole, tmp_path / "other.safetensors", {**changed, "v_pred": torch.zeros(0)})
    own, expected = open_checkpoint(whole), open_checkpoint(other)
    found = open_with(whole, unet=other)
    assert found.source == "model.safetensors"
    assert found.stated["U-Net"] == "from other.safetensors"
    assert found.scheduler["prediction_type"] == expected.scheduler["prediction_type"] == "v_prediction"
    assert_same_weights(found.parts["unet"], expected.parts["unet"])
    for name in ("vae", "text_encoder", "text_encoder_2"):
        assert_same_weights(found.parts[name], own.parts[name])
    assert_same(open_with(None, unet=unet, base=whole), own)
    gone = {name: None for name in load_file(whole) if name.startswith(VAE)}
    lacking = without_config(whole, tmp_path / "lacking.safetensors", gone)
    assert_same_weights(open_with(lacking, unet=other, base=whole).parts["vae"], own.parts["vae"])
    with pytest.raises(ExportError, match="lacks a VAE; give --vae SRC, or a whole checkpoint"):
        open_with(lacking, unet=other)


def test_a_diffusers_unet_takes_text_encoders(parts, tmp_path):
    """A directory of a U-Net alone, as save_pretrained makes it, and a pipeline that lacks its text encoders."""
    whole, _, vae, texts = parts("sdxl of two widths")
    FAMILIES["sdxl of two widths"]().unet.save_pretrained(tmp_path / "unet")
    found, expected = open_with(tmp_path / "unet", vae=vae, text_encoders=texts), open_checkpoint(whole)
    assert found.settings == expected.settings
    assert found.scheduler == expected.scheduler
    for name, part in expected.parts.items():
        assert_same_weights(found.parts[name], part)


REFUSED = {
    "another width": (
        ("bk-sdm", "sdxl of two widths", slice(1, 2)),
        "the text encoder has 128 channels, the U-Net reads text of 64; give the text encoder of its family",
    ),
    "two where the U-Net reads one": (
        ("bk-sdm", "sdxl of two widths", slice(None)),
        r"clip_l.safetensors \(64 channels\) and .*clip_g.safetensors \(128 channels\) are the same text encoder",
    ),
    "one of two": (
        ("sdxl of two widths", "sdxl of two widths", slice(1)),
        "lacks one text encoder; give --text-encoder SRC, or a whole checkpoint",
    ),
    "Stable Diffusion 1's for SDXL": (
        ("sdxl of two widths", "bk-sdm", slice(None)),
        "lacks one text encoder; give --text-encoder SRC, or a whole checkpoint",
    ),
    "SDXL's narrower second": (
        ("sdxl of two widths", "sdxl", slice(None)),
        "are the same text encoder of this U-Net; give one of each",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_text_encoders_that_dont_fit(how, parts):
    (family, other, chosen), message = REFUSED[how]
    _, unet, vae, _ = parts(family)
    with pytest.raises(ExportError, match=message) as error:
        open_with(unet, vae=vae, text_encoders=parts(other)[3][chosen])
    assert "\n" not in str(error.value)


def test_a_second_text_encoder_without_a_projection(parts, tmp_path):
    _, unet, vae, (first, second) = parts("sdxl of two widths")
    gone = without_config(second, tmp_path / "clip_g.safetensors", {"text_projection.weight": None})
    with pytest.raises(ExportError, match="clip_g.safetensors has no projection .*second text encoder of SDXL"):
        open_with(unet, vae=vae, text_encoders=[first, gone])


def test_what_isnt_the_part(parts, tmp_path):
    whole, unet, vae, texts = parts("bk-sdm")
    with pytest.raises(ExportError, match="vae.safetensors has no text encoder of CLIP; expected a file with"):
        open_with(unet, text_encoders=[vae])
    with pytest.raises(ExportError, match="looks like a VAE alone"):
        open_with(whole, unet=vae)
    with pytest.raises(ExportError, match="looks like a text encoder alone; .*--text-encoder"):
        open_with(texts[0])
    with pytest.raises(ExportError, match="there is nothing to export; give SRC, or --unet SRC"):
        open_with(None, vae=vae, text_encoders=texts)
    controlnet(UNet2DConditionModel.from_config(families.unet().config)).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="is a ControlNet or a T2I-Adapter, which takes no --text-encoder"):
        open_with(tmp_path, text_encoders=texts)
    with pytest.raises(ExportError, match="has no U-Net; give a checkpoint, a package or a file with one"):
        open_with(whole, unet=str(tmp_path))


def test_the_image_is_that_of_the_pipeline_of_the_same_parts(tmp_path):
    """Through the command line: SDXL's U-Net from its directory, VAE and text encoders of another seed from files."""
    pipe = FAMILIES["sdxl of two widths"]()
    pipe.unet.save_pretrained(tmp_path / "unet")
    pipe.set_progress_bar_config(disable=True)
    request = {"num_inference_steps": 3, "guidance_scale": 5.0, **SIZE}
    before = reference(pipe, prompt=PROMPT, **request)
    for seed, module in enumerate((pipe.vae, pipe.text_encoder, pipe.text_encoder_2), 20):
        families.random(module, seed)
    texts = save_text_encoders(pipe, tmp_path)
    vae = save_module(pipe.vae, tmp_path / "vae.safetensors")
    options = ("--vae", vae, "--text-encoder", texts[1], "--text-encoder", texts[0], "-o", "package")
    ran = run_cli("export", "--unet", "unet", *options, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    result = sdonnx.load(tmp_path / "package").generate(PROMPT, seed=SEED, sampler="euler", **request)
    assert_equal(result, reference(pipe, prompt=PROMPT, **request))
    assert psnr(result.images[0], before[1]) < 30, "the parts of the other seed count"
