"""Values beyond float16 in SDXL's VAE: the layers that have them compute in float32 where its config says so."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sdonnx_export.models.components import build
from support import families
from support.graphs import as_part
from support.lowering import lowered
from support.reference import relative_error
from support.sessions import run_as_written

LARGE = 3e4
"""As SDXL's own weights do (huggingface.co/madebyollin/sdxl-vae-fp16-fix), this leaves values beyond 65504."""


@pytest.fixture(scope="module")
def part():
    """A tiny VAE with SDXL's config, and values as large as SDXL's from the last but one upsampling on."""
    vae = families.vae(scaling_factor=0.13025, force_upcast=True)
    decoder = vae.decoder
    with torch.no_grad():
        for layer in (decoder.up_blocks[-2].upsamplers[0].conv, decoder.up_blocks[-1].resnets[0].conv2):
            for parameter in layer.parameters():
                parameter.mul_(LARGE)
    return as_part(vae)


@pytest.mark.parametrize("target", ["cuda", "directml", "webgpu"])
def test_sdxls_vae_overflows_float16_without_layers_in_float32_alone(target, part, rng):
    latents = {"latent_sample": rng.standard_normal((1, 4, 4, 6), np.float32)}
    (expected,) = run_as_written(build("vae_decoder", part, "fp32"), latents)
    (found,) = run_as_written(lowered(build("vae_decoder", part, "fp16", target=target), emulate=True), latents)
    assert relative_error(found, expected) < 1e-2

    half = replace(part, config={**part.config, "force_upcast": False})
    model = build("vae_decoder", half, "fp16", target=target)
    (found,) = run_as_written(lowered(model, emulate=False), latents)
    assert relative_error(found, expected) < 1e-2
    (found,) = run_as_written(lowered(model, emulate=True), latents)
    assert not np.isfinite(found).all()
