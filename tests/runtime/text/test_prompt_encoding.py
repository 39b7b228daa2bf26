"""Prompt encoding against compel and diffusers."""

import json

import numpy as np
import pytest
import torch
from compel import Compel, DownweightMode, ReturnedEmbeddingsType
from compel.embeddings_provider import SplitLongTextMode
from PIL import Image
from sd_parsers import ParserManager
from sdonnx_runtime.outputs.metadata import parameters_text
from sdonnx_runtime.request import Request
from support.prompts import SIZE, encoded, states, unet_inputs
from typer.testing import CliRunner

import sdonnx
from sdonnx.benchmark.worker import measure_image
from sdonnx.cli.app import app

LONG = "a cat and a dog in the wide green field " * 12


def compel_of(pipe):
    """compel as it is advised for the model; texts are divided where they are full."""
    common = {
        "truncate_long_prompts": False,
        "downweight_mode": DownweightMode.REMOVE,
        "split_long_text_mode": SplitLongTextMode.BRUTAL,
    }
    if not hasattr(pipe, "text_encoder_2"):
        return Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, **common)
    return Compel(
        tokenizer=[pipe.tokenizer, pipe.tokenizer_2],
        text_encoder=[pipe.text_encoder, pipe.text_encoder_2],
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        requires_pooled=[False, True],
        **common,
    )


def of_compel(pipe, prompt):
    with torch.no_grad():
        made = compel_of(pipe)(prompt)
    return (made[0] if isinstance(made, tuple) else made)[0].numpy()


BOTH = [
    ("a (red:1.4) cat", "a (red)1.4 cat"),
    ("a (red cat:0.6) on a mat", "a (red cat)0.6 on a mat"),
    ("a (red:1.3) cat, a (dog:0.3) and (grass:0.8)", "a (red)1.3 cat, a (dog)0.3 and (grass)0.8"),
    ("(a cat:0)", "(a cat)0"),
    (LONG, LONG),
    (LONG + "(and a red horse:1.5)", LONG + "(and a red horse)1.5"),
    ("a (small:0.7) horse " + LONG, "a (small)0.7 horse " + LONG),
]
"""A prompt in our syntax and in compel's."""


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(("ours", "theirs"), BOTH)
def test_weights_by_compel(opened, recorded_inputs, name, ours, theirs):
    pipe, pipeline = opened(name)
    wanted = of_compel(pipe, theirs)
    found = states(recorded_inputs, pipeline, ours, weighting="compel")
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    if "(" in ours:
        plain = ours.translate(str.maketrans("", "", "():.0123456789"))
        assert np.abs(found - states(recorded_inputs, pipeline, plain)).max() > 1e-2


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_weights_by_comfy_above_1_are_compels(opened, recorded_inputs, name):
    """Both go on from the empty text's states; below 1 ComfyUI does the same."""
    pipe, pipeline = opened(name)
    for ours, theirs in (("a (red:1.4) cat", "a (red)1.4 cat"), (LONG + "(red:2)", LONG + "(red)2")):
        np.testing.assert_allclose(
            states(recorded_inputs, pipeline, ours, weighting="comfy"), of_compel(pipe, theirs), atol=1e-4
        )


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_weights_by_a1111_and_by_comfy_below_1(opened, recorded_inputs, name):
    """Multiplied, with the mean of each text encoder brought back; and interpolated."""
    pipe, pipeline = opened(name)
    plain, empty = torch.tensor(encoded(pipe, "a red cat")[0]), torch.tensor(encoded(pipe, "")[0])
    weights = torch.ones(77, 1)
    weights[2:4] = 0.6  # "red cat", behind the start and "a"
    width = 64 if name == "sdxl" else plain.shape[1]
    halves = [half * weights * (half.mean() / (half * weights).mean()) for half in plain.split(width, dim=1)]
    found = states(recorded_inputs, pipeline, "a (red cat:0.6)")
    np.testing.assert_allclose(found, torch.cat(halves, dim=1).numpy(), atol=1e-4)
    found = states(recorded_inputs, pipeline, "a (red cat:0.6)", weighting="comfy")
    np.testing.assert_allclose(found, (empty + (plain - empty) * weights).numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_shorter_prompt_is_padded_with_empty_chunks(opened, recorded_inputs, name):
    pipe, pipeline = opened(name)
    for prompt, negative in ((LONG, "a dog"), ("a dog", LONG)):
        found = unet_inputs(recorded_inputs, pipeline, prompt, negative_prompt=negative)
        conditional, other = compel_of(pipe).pad_conditioning_tensors_to_same_length(
            [torch.tensor(of_compel(pipe, text))[None] for text in (prompt, negative)]
        )
        assert conditional.shape[1] == 154
        wanted = torch.cat([other, conditional]).detach().numpy()
        np.testing.assert_allclose(found["encoder_hidden_states"], wanted, atol=1e-4)


def test_an_empty_sdxl_negative_prompt_is_zeros_with_a_long_prompt(opened, recorded_inputs):
    found = unet_inputs(recorded_inputs, opened("sdxl")[1], LONG)
    assert found["encoder_hidden_states"].shape == (2, 154, 128)
    assert not found["encoder_hidden_states"][0].any()
    assert not found["text_embeds"][0].any()


@pytest.mark.parametrize("weighting", ["a1111", "comfy", "compel"])
def test_the_pooled_state_of_sdxl_is_the_first_chunks_without_weights(opened, recorded_inputs, weighting):
    pipe, pipeline = opened("sdxl")
    for prompt, plain in ((LONG, LONG), ("a (red:1.5) cat BREAK a dog", "a red cat")):
        found = unet_inputs(recorded_inputs, pipeline, prompt, weighting=weighting)["text_embeds"][-1]
        np.testing.assert_allclose(found, encoded(pipe, plain)[1], atol=1e-4)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_clip_skip_is_that_of_diffusers(opened, recorded_inputs, name):
    """Counted as AUTOMATIC1111 does: 1 more, and of SDXL, whose own is the last but one, 2 more."""
    pipe, pipeline = opened(name)
    more = 2 if name == "sdxl" else 1
    own = states(recorded_inputs, pipeline, "a red cat")
    np.testing.assert_array_equal(states(recorded_inputs, pipeline, "a red cat", clip_skip=more), own)
    for skip in (1, 2)[: 4 - more - 1]:
        found = states(recorded_inputs, pipeline, "a red cat", clip_skip=skip + more)
        np.testing.assert_allclose(found, encoded(pipe, "a red cat", clip_skip=skip)[0], atol=1e-4)
        assert np.abs(found - own).max() > 1e-2
    with pytest.raises(sdonnx.RequestError, match="clip_skip is 4, and .*text_encoder has 3 layers"):
        states(recorded_inputs, pipeline, "a red cat", clip_skip=4)


def test_clip_skip_1_of_sdxl_is_the_last_layer_as_it_is(opened, recorded_inputs):
    pipe, pipeline = opened("sdxl")
    found = states(recorded_inputs, pipeline, "a red cat", clip_skip=1)
    np.testing.assert_allclose(found, encoded(pipe, "a red cat", clip_skip=-1)[0], atol=1e-4)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("weighting", ["a1111", "comfy", "compel"])
def test_a_prompt_without_the_syntax_is_the_same_bit_by_bit(opened, name, weighting):
    _, pipeline = opened(name)
    common = {"negative_prompt": "blurry, low: quality", "seed": 1, "num_inference_steps": 3, **SIZE}
    prompt = "an astronaut's horse, 16:9 -- {a} <b> 苹果"
    plain = pipeline.generate(prompt, prompt_syntax="plain", **common).latents
    np.testing.assert_array_equal(pipeline.generate(prompt, weighting=weighting, **common).latents, plain)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_plain_prompts_are_those_of_diffusers(opened, caplog, name):
    pipe, pipeline = opened(name)
    common = {"negative_prompt": "[bad|worse] \\(", "num_inference_steps": 3, "guidance_scale": 4.0, **SIZE}
    for prompt in ("a (cat:1.3) [x:y:1] AND BREAK <lora:a:1>", LONG):
        generator = torch.Generator("cpu").manual_seed(5)
        wanted = pipe(prompt, generator=generator, output_type="latent", **common).images.numpy()
        found = pipeline.generate(prompt, seed=5, prompt_syntax="plain", **common).latents
        np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert "longer than 77 tokens; cut: " in caplog.text
    caplog.clear()
    pipeline.generate(LONG, seed=5, **common)
    assert "cut" not in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_syntax": "comfy"}, "prompt_syntax is 'comfy'; choose a1111, plain"),
        ({"weighting": "none"}, "weighting is 'none'; choose a1111, comfy, compel"),
        ({"clip_skip": 0}, "clip_skip is 0; give a whole number from 1 to"),
        ({"clip_skip": 1.0}, "clip_skip is 1.0"),
        ({"prompt": "a AND "}, "AND requires a prompt on both sides"),
        ({"prompt": "a <lora:fur:0.8>"}, "requires a folder of LoRA files"),
        ({"negative_prompt": "<lora:fur>"}, "requires a folder of LoRA files"),
        ({"negative_prompt": "(a:5000)"}, "the weight 5000; give one"),
        ({"prompt": "[a:(b:5000):2]"}, "the weight 5000; give one"),
    ],
)
def test_what_can_not_be_served(opened, change, message):
    _, pipeline = opened("sd1")
    with pytest.raises(sdonnx.RequestError) as error:
        pipeline.resolve("a cat", **change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_recipe_says_how_prompts_were_read(opened, tmp_path):
    _, pipeline = opened("sd1")
    common = {"seed": 1, "num_inference_steps": 2, "clip_skip": 2, **SIZE}
    prompt = "a (cat:1.2) [on|off], \\(x\\) AND a dog:0.5"
    for fields, wanted in (
        ({"weighting": "comfy"}, {"Weighting": "comfy"}),
        ({"prompt_syntax": "plain"}, {"Emphasis": "None"}),
    ):
        result = pipeline.generate(prompt, **common, **fields)
        sdonnx.save_png(result, 0, tmp_path / "made.png")
        info = ParserManager().parse(tmp_path / "made.png")
        assert info is not None
        assert info.prompts[0].value == prompt
        found = {**info.metadata, **info.samplers[0].parameters}
        assert str(found["Clip skip"]) == "2"
        assert {name: found[name] for name in wanted} == wanted
        with Image.open(tmp_path / "made.png") as image:
            recipe = json.loads(image.text["sdonnx"])
        recipe.pop("model")
        np.testing.assert_array_equal(pipeline.generate(Request(**recipe)).latents, result.latents)
    usual = parameters_text(pipeline.resolve("a cat", seed=1).request, "sd1")
    assert "Clip skip" not in usual
    assert "Emphasis" not in usual


def test_the_command_line_and_batches_say_how_prompts_are_read(opened, tmp_path):
    _, pipeline = opened("sd1")
    common = ["-m", str(pipeline.package.root), "--size", "64x64", "--steps", "2", "--seed", "1"]
    options = ["--prompt-syntax", "plain", "--weighting", "comfy", "--clip-skip", "2", "-o", str(tmp_path / "made.png")]
    assert CliRunner().invoke(app, ["run", "a (cat:1.2)", *common, *options]).exit_code == 0
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"prompt": "a (cat:1.2)", "prompt_syntax": "plain", "clip_skip": 2}))
    options = ["--batch-file", str(lines), "-o", str(tmp_path / "line.png"), "--weighting", "comfy"]
    assert CliRunner().invoke(app, ["run", *common, *options]).exit_code == 0
    images = [Image.open(tmp_path / name) for name in ("made.png", "line-0001.png")]
    for image in images:
        recipe = json.loads(image.text["sdonnx"])
        assert [recipe[name] for name in ("prompt_syntax", "weighting", "clip_skip")] == ["plain", "comfy", 2]
    np.testing.assert_array_equal(*map(np.asarray, images))
    failed = CliRunner().invoke(app, ["run", "a AND", *common])
    assert isinstance(failed.exception, sdonnx.RequestError)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_text_encoder_runs_as_often_as_in_diffusers(opened, guidance_scale):
    """Not for a negative prompt that nothing reads."""
    pipe, pipeline = opened("sd1")
    options, runs = {"num_inference_steps": 1, "guidance_scale": guidance_scale, **SIZE}, []
    with pipe.text_encoder.register_forward_hook(lambda *_: runs.append(1)):
        pipe("a cat", output_type="latent", **options)
    request = pipeline.resolve("a cat", **options).request
    assert len(measure_image(pipeline.package, request, {"device": "cpu"}).calls["text_encoder"]) == len(runs)
