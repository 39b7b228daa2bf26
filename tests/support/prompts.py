"""Text conditioning of prompts, ours and diffusers'."""

import torch

SIZE = {"width": 64, "height": 64}


def unet_inputs(recorded_inputs, pipeline, prompt, **fields):
    """Inputs of the first step, (negative, conditional)."""
    calls, _ = recorded_inputs
    calls.clear()
    next(pipeline.stream(prompt, seed=1, **{**SIZE, "num_inference_steps": 2, "guidance_scale": 3.0, **fields}))
    return calls[0]


def states(recorded_inputs, pipeline, prompt, **fields):
    """The conditional text's, (S, C)."""
    return unet_inputs(recorded_inputs, pipeline, prompt, **fields)["encoder_hidden_states"][-1]


def encoded(pipe, prompt, **options):
    """States and, of SDXL, the pooled one, as diffusers makes them."""
    with torch.no_grad():
        found = pipe.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, **options
        )
    return found[0][0].numpy(), found[2][0].numpy() if len(found) == 4 else None
