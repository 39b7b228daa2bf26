"""Images: their values as diffusers makes them, their recipe as other programs read it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from sd_parsers import ParserManager
from sdonnx_runtime.images.preprocess import to_images
from sdonnx_runtime.sampling.registry import A1111_NAMES, SAMPLERS

import sdonnx


def test_values_become_pixels_as_in_diffusers():
    values = np.random.default_rng(0).normal(0, 0.8, (2, 3, 16, 24)).astype(np.float32)
    expected = VaeImageProcessor().postprocess(torch.from_numpy(values), output_type="pil")
    for found, wanted in zip(to_images(values), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.fixture(scope="module")
def result(package):
    return sdonnx.load(package).generate(
        'a "red" apple, on a table: blue\nsecond line, Ø 苹果',
        negative_prompt="blurry, low quality",
        seed=4294967296 + 5,
        width=64,
        height=72,
        num_inference_steps=2,
        guidance_scale=6.5,
        sampler="euler_ancestral",
    )


@pytest.mark.parametrize("compute", ["f32", "bf16"])
def test_sd_parsers_reads_the_recipe(result, tmp_path, compute):
    path = tmp_path / "image.png"
    sdonnx.save_png(replace(result, compute=compute), 0, path)
    info = ParserManager().parse(path)
    assert info is not None
    (prompt,) = info.prompts
    (negative,) = info.negative_prompts
    (sampler,) = info.samplers
    assert prompt.value == result.request.prompt
    assert negative.value == "blurry, low quality"
    assert sampler.name == "Euler a"
    assert sampler.parameters["seed"] == "4294967301" or sampler.parameters["seed"] == 4294967301
    assert float(sampler.parameters["cfg_scale"]) == 6.5
    assert int(sampler.parameters["steps"]) == 2
    assert info.metadata["Size"] == "64x72"
    assert info.metadata.get("Compute", "f32") == compute


def test_the_json_chunk_makes_the_image_again(result, package, tmp_path):
    path = tmp_path / "image.png"
    sdonnx.save_png(result, 0, path)
    with Image.open(path) as image:
        recipe = json.loads(image.text["sdonnx"])
        pixels = np.asarray(image)
    assert recipe.pop("model") == "tiny"
    again = sdonnx.load(package).generate(sdonnx.Request(**recipe))
    np.testing.assert_array_equal(again.images[0], pixels)


def test_metadata_holds_sigmas_from_an_array(package, tmp_path):
    levels = np.array([9.0, 2.0], np.float32)
    made = sdonnx.load(package).generate("a cat", seed=1, width=64, height=64, sampler="euler", sigmas=levels)
    sdonnx.save_png(made, 0, tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        assert json.loads(image.text["sdonnx"])["sigmas"] == [9.0, 2.0]


def test_every_sampler_has_the_name_others_know():
    assert set(A1111_NAMES) == set(SAMPLERS)


def test_a_place_that_can_not_be_written_to(result, tmp_path):
    with pytest.raises(sdonnx.SdonnxError, match="can't be written"):
        sdonnx.save_png(result, 0, tmp_path / "no such directory" / "image.png")
    assert list(tmp_path.iterdir()) == []
