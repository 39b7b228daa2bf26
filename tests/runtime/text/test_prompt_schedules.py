"""Prompts that change by step and composed prompts, against loops over diffusers' U-Net written here."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image
from support.prompts import SIZE, encoded, states, unet_inputs

import sdonnx


def sample_with_diffusers(pipe, kind, turns, *, weights=(1.0,), steps=6, scale=4.0, seed=3):
    """Latents of a plain loop over diffusers' U-Net; ``turns(step)`` is (negative, [conditional texts])."""
    scheduler = kind.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(seed)) * scheduler.init_noise_sigma
    calls = 2 if kind is HeunDiscreteScheduler else 1
    for call, t in enumerate(scheduler.timesteps):
        negative, conditional = turns(call // calls + 1)
        seen = scheduler.scale_model_input(x, t)

        def asked(text, seen=seen, t=t):
            return pipe.unet(seen, t, torch.tensor(encoded(pipe, text)[0])[None]).sample

        with torch.no_grad():
            base = asked(negative)
            pairs = zip(conditional, weights, strict=True)
            noise = base + sum(scale * weight * (asked(text) - base) for text, weight in pairs)
            x = scheduler.step(noise, t, x).prev_sample
    return x.numpy()


SCHEDULES = {
    "[from:to:when]": ("a [cat:dog:2] here", "", lambda step: ("", ["a cat here" if step <= 2 else "a dog here"])),
    "a share": ("[cat::.5]", "", lambda step: ("", ["cat" if step <= 3 else ""])),
    "nested": ("[[a:b:1]:c:4]", "", lambda step: ("", ["a" if step <= 1 else "b" if step <= 4 else "c"])),
    "alternation": ("[cat|dog|cow]", "", lambda step: ("", [["cat", "dog", "cow"][(step - 1) % 3]])),
    "negative": ("a cat", "[bad:worse:3]", lambda step: ("bad" if step <= 3 else "worse", ["a cat"])),
    "AND": ("a cat AND a [dog:cow:2] :0.6", "bad", lambda step: ("bad", ["a cat", "a dog" if step <= 2 else "a cow"])),
}


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("name", SCHEDULES)
def test_texts_change_by_step(opened, name, kind):
    """Also with a sampler that asks the model twice in a step."""
    pipe, pipeline = opened("sd1")
    prompt, negative, turns = SCHEDULES[name]
    wanted = sample_with_diffusers(pipe, kind, turns, weights=(1.0, 0.6) if name == "AND" else (1.0,))
    sampler = "heun" if kind is HeunDiscreteScheduler else "euler"
    common = {"seed": 3, "num_inference_steps": 6, "guidance_scale": 4.0, "sampler": sampler, **SIZE}
    found = pipeline.generate(prompt, negative_prompt=negative, **common).latents
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    first, texts = turns(1)
    still = pipeline.generate(" AND ".join(texts), negative_prompt=first, **common).latents
    assert np.abs(found - still).max() > 1e-2


def rows_of(call):
    return [row.tobytes() for row in call["encoder_hidden_states"]]


def known(recorded_inputs, pipeline, *texts, **fields):
    """Texts by the bytes of their hidden states."""
    return {states(recorded_inputs, pipeline, text, **fields).tobytes(): text for text in texts}


def texts_of_calls(recorded_inputs, pipeline, names, prompt, **fields):
    """For each U-Net call the texts of its batch entries, and the result."""
    calls, _ = recorded_inputs
    calls.clear()
    result = pipeline.generate(prompt, seed=1, **{**SIZE, "guidance_scale": 3.0, "num_inference_steps": 4, **fields})
    return [[names[row] for row in rows_of(call)] for call in calls], result


def test_each_text_is_encoded_once(opened, recorded_inputs):
    _, pipeline = opened("sd1")
    _, texts = recorded_inputs
    texts.clear()
    common = {"num_inference_steps": 6, "num_images": 2, "hires_scale": 1.5, "guidance_scale": 3.0, **SIZE}
    pipeline.generate("[cat|dog] AND [dog|a BREAK cat]", negative_prompt="a", seed=1, **common)
    assert sorted(len(ids) for ids in texts) == [1] * 4  # cat, dog, a, and nothing to pad with
    assert len({ids.tobytes() for ids in texts}) == 4


def test_an_image_to_start_from_begins_with_step_1(opened, recorded_inputs):
    """As in AUTOMATIC1111, where shares are of all steps."""
    _, pipeline = opened("sd1")
    names = known(recorded_inputs, pipeline, "", "cat", "dog", "cow")
    start = {"image": gradient(), "strength": 0.5, "num_inference_steps": 8, "sampler": "euler"}
    texts, _ = texts_of_calls(recorded_inputs, pipeline, names, "[cat:[dog:cow:.5]:1]", **start)
    assert texts == [["", "cat"], ["", "dog"], ["", "dog"], ["", "dog"]]


def gradient(size=(64, 64)):
    return Image.linear_gradient("L").resize(size).convert("RGB")


def test_a_second_pass_goes_on_with_the_schedule(opened, recorded_inputs):
    _, pipeline = opened("sd1")
    names = known(recorded_inputs, pipeline, "", "cat", "dog", "cow")
    hires = {"hires_scale": 1.5, "hires_strength": 0.5, "hires_steps": 4, "sampler": "euler"}
    texts, _ = texts_of_calls(recorded_inputs, pipeline, names, "[cat:[dog:cow:5]:2]", **hires)
    assert [row for _, row in texts] == ["cat", "cat", "dog", "dog", "dog", "cow"]


def test_rows_without_guidance_and_outside_of_its_interval(opened, recorded_inputs):
    """The conditional rows alone: from the first towards the others."""
    _, pipeline = opened("sd1")
    names = known(recorded_inputs, pipeline, "bad", "cat", "dog")
    common = {"negative_prompt": "bad", "sampler": "euler"}
    texts, alone = texts_of_calls(recorded_inputs, pipeline, names, "cat AND dog:0.5", guidance_scale=1.0, **common)
    assert texts == [["cat", "dog"]] * 4
    texts, never = texts_of_calls(
        recorded_inputs, pipeline, names, "cat AND dog:0.5", guidance_interval=(900.0, 1000.0), **common
    )
    assert texts == [["cat", "dog"]] * 4
    np.testing.assert_array_equal(alone.latents, never.latents)
    texts, _ = texts_of_calls(
        recorded_inputs, pipeline, names, "cat AND dog:0.5", guidance_interval=(0.5, 1000.0), **common
    )
    assert texts == [["bad", "cat", "dog"]] * 3 + [["cat", "dog"]]


@pytest.mark.parametrize("weights", [(1.0,), (0.5,), (1.0, 0.7)])
def test_composition_without_guidance(opened, weights):
    """Where there is no other row, the parts pull from the first one."""
    pipe, pipeline = opened("sd1")
    prompt = " AND ".join(
        ["a cat", *(f"{text}:{weight}" for text, weight in zip(("a dog", "sky"), weights, strict=False))]
    )
    turns = ("a cat", ["a dog", "sky"][: len(weights)])
    wanted = sample_with_diffusers(pipe, EulerDiscreteScheduler, lambda _step: turns, weights=weights, scale=1.0)
    common = {"seed": 3, "num_inference_steps": 6, "guidance_scale": 1.0, "sampler": "euler", **SIZE}
    np.testing.assert_allclose(pipeline.generate(prompt, **common).latents, wanted, atol=1e-3)


def test_reuse_and_downsampled_tokens_take_schedules(opened, recorded_inputs):
    _, pipeline = opened("sd1")
    names = known(recorded_inputs, pipeline, "", "cat", "dog", "cow")
    fast = {"cache_interval": 2, "token_downsampling": True, "sampler": "euler"}
    texts, _ = texts_of_calls(recorded_inputs, pipeline, names, "[cat:dog:2] AND cow", **fast)
    assert texts == [["", "cat", "cow"]] * 2 + [["", "dog", "cow"]] * 2


def test_a_refiner_goes_on_with_the_schedule(opened, recorded_inputs):
    _, refiner = opened("refiner")
    _, pipeline = opened("sdxl", refiner=refiner.package.root)
    calls, _ = recorded_inputs
    calls.clear()  # what was run to export them
    settings = {"seed": 1, "guidance_scale": 3.0, "negative_prompt": "bad", "refiner_start": 0.5, **SIZE}
    with pipeline:
        pipeline.generate("[cat:dog:3] AND cow", num_inference_steps=4, **settings)
        scheduled = list(calls)
        calls.clear()
        for text in ("cat AND cow", "dog AND cow"):
            pipeline.generate(text, num_inference_steps=4, **settings)
    first, second = calls[:4], calls[4:]
    assert [call["encoder_hidden_states"].shape[-1] for call in scheduled] == [128, 128, 64, 64]
    assert [rows_of(call) for call in scheduled] == [rows_of(call) for call in (*first[:3], second[3])]
    assert scheduled[-1]["time_ids"][:, -1].tolist() == [2.5, 6.0, 6.0]  # an aesthetic score for each row


def test_a_consistency_model_takes_all_of_it(opened, recorded_inputs):
    """Its guidance scale is embedded with the timestep, for each batch entry."""
    _, pipeline = opened("lcm")
    names = known(recorded_inputs, pipeline, "cat", "dog", "a cow", guidance_scale=8.0)
    texts, _ = texts_of_calls(recorded_inputs, pipeline, names, "[cat:dog:2] AND a cow", guidance_scale=8.0)
    assert texts == [["cat", "a cow"]] * 2 + [["dog", "a cow"]] * 2
    assert len({row.tobytes() for row in recorded_inputs[0][0]["timestep_cond"]}) == 1
    assert recorded_inputs[0][0]["timestep_cond"].shape == (2, 32)


def test_a_model_that_edits_takes_schedules_but_no_and(opened, recorded_inputs):
    _, pipeline = opened("pix2pix")
    edited = {"image": gradient()}
    names = {}
    for text in ("bad", "cat", "dog"):
        names[unet_inputs(recorded_inputs, pipeline, text, **edited)["encoder_hidden_states"][-1].tobytes()] = text
    texts, _ = texts_of_calls(
        recorded_inputs, pipeline, names, "[cat|dog]", negative_prompt="bad", sampler="euler", **edited
    )
    assert texts == [["bad", "bad", "cat"], ["bad", "bad", "dog"]] * 2
    with pytest.raises(sdonnx.RequestError, match="pix2pix models do not support AND in the prompt; give one text"):
        pipeline.generate("cat AND dog", **edited)


def test_inpainting_composes(opened, recorded_inputs):
    _, pipeline = opened("inpaint")
    painted = {"image": gradient(), "mask_image": gradient(), "sampler": "euler"}
    inputs = unet_inputs(recorded_inputs, pipeline, "cat AND dog", **painted)
    assert len(inputs["encoder_hidden_states"]) == 3
    names = known(recorded_inputs, pipeline, "cat", "dog", **painted)
    texts, _ = texts_of_calls(
        recorded_inputs, pipeline, names, "cat AND dog", guidance_scale=1.0, num_inference_steps=2, **painted
    )
    assert texts == [["cat", "dog"]] * 2
