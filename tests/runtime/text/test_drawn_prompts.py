"""Images of prompts with choices: each is the image of the prompt that was drawn for it."""

import json

import numpy as np
import pytest
from PIL import Image
from sdonnx_runtime.outputs.latents_file import load_latents, save_latents
from sdonnx_runtime.outputs.metadata import save_png

import sdonnx

SIZE = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 3.0}
LONG = ", ".join(["a wide green field"] * 30)


@pytest.fixture
def pipe(package, tmp_path):
    (tmp_path / "colour.txt").write_text("red\ngreen\nblue\n")
    with sdonnx.load(package, wildcard_folder=tmp_path) as pipe:
        yield pipe


TEMPLATES = {
    "alternatives": {"prompt": "a {cat|dog} on a __colour__ mat", "negative_prompt": "{bad|ugly} __colour__"},
    "chunks": {"prompt": "{a cat|a dog " + LONG + "}"},
    "subprompts": {"prompt": "a cat{ AND a dog| and a __colour__ bird}"},
    "schedules": {"prompt": "a [{cat|dog}:__colour__ bird:1] {(mat:1.3)|rug}"},
    "hires": {"prompt": "a {cat|dog}", "hires_scale": 2.0, "hires_strength": 0.9},
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_images_of_a_batch_are_those_made_alone(pipe, name, recorded_inputs):
    fields = {**SIZE, **TEMPLATES[name], "num_images": 4}
    result = pipe.generate("", seed=2, **fields)
    others = [each for each in recorded_inputs[0] if len(each["encoder_hidden_states"]) > 2]
    assert bool(others) == (name == "subprompts")
    assert len(set(result.prompts)) > 1
    assert np.array_equal(pipe.generate("", seed=2, **fields).latents, result.latents)
    for index, (seed, prompts) in enumerate(zip(result.seeds, result.prompts, strict=True)):
        own = {**fields, "num_images": 1}
        texts = {"prompt": prompts.prompt, "negative_prompt": prompts.negative_prompt}
        if index < 2:
            alone = pipe.generate("", seed=seed, **own)
            assert alone.prompts == (prompts,)
            assert np.array_equal(alone.latents[0], result.latents[index])
        drawn = pipe.generate("", seed=seed, **{**own, **texts})
        assert drawn.request.drawn == ()
        assert np.array_equal(drawn.latents[0], result.latents[index])


def test_all_prompts_are_encoded_before_denoising(pipe):
    opened = []
    stream = pipe.stream("a {cat|dog} on a __colour__ mat", seed=4, num_images=4, **SIZE)
    stream.on_opening(opened.append)
    for _ in stream:
        pass
    assert [name for name in opened if name] == ["text_encoder", "unet", "vae_decoder"]


def test_what_a_png_says(pipe, tmp_path):
    template = {"prompt": "a {cat|dog} on a __colour__ mat", "negative_prompt": "{bad|ugly}"}
    result = pipe.generate("", seed=4, num_images=3, **SIZE, **template)
    for index, prompts in enumerate(result.prompts):
        path = save_png(result, index, tmp_path / "a.png")
        with Image.open(path) as image:
            recipe = json.loads(image.info["sdonnx"])
            lines = image.info["parameters"].split("\n")
        assert lines[:2] == [prompts.prompt, f"Negative prompt: {prompts.negative_prompt}"]
        assert (recipe["prompt"], recipe["negative_prompt"]) == (prompts.prompt, prompts.negative_prompt)
        assert (recipe["template"], recipe["seed"]) == (template, 4 + index)
    plain = save_png(pipe.generate("a {cat}", seed=4, **SIZE), 0, tmp_path / "b.png")
    with Image.open(plain) as image:
        assert "template" not in json.loads(image.info["sdonnx"])


def test_latents_keep_their_prompts(pipe, tmp_path):
    result = pipe.generate("a {cat|dog}", seed=4, num_images=3, **SIZE)
    path = save_latents(tmp_path / "a.npz", result.latents, result.request, result.model)
    assert load_latents(path)[1] == result.request


def test_variations_have_one_prompt(pipe):
    """They are the same image, a little changed."""
    request = pipe.resolve("a __colour__ {cat|dog|bird|fish}", seed=5, variation=(9, 0.2), num_images=4, **SIZE).request
    (prompt,) = set(request.prompts)
    assert prompt == pipe.resolve(request.template or request.prompt, seed=5).request.prompts[0]
    assert request.for_image(2).prompt == prompt.prompt


def test_plain_prompts_are_verbatim(pipe):
    request = pipe.resolve("a {cat|dog} __colour__", prompt_syntax="plain", num_images=2, seed=1).request
    assert request.drawn == ()
    assert request.for_image(1).prompt == "a {cat|dog} __colour__"
