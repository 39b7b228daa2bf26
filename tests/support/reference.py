"""What diffusers makes of a request, and how near ours must come to it."""

import warnings

import numpy as np
import torch
from diffusers import DDIMScheduler

PROMPT = "a photograph of an astronaut riding a horse"

NEGATIVE = "blurry, low quality"

SEED = 11

SIZE = {"width": 64, "height": 96}


def psnr(found, wanted):
    error = np.mean((np.asarray(found, np.float64) - np.asarray(wanted, np.float64)) ** 2)
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


def relative_error(found, wanted):
    """The norm of the difference over the norm of what is wanted."""
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def reference(pipe, **settings):
    """Latents and image of diffusers; with DDIM where sampling starts midway, as its PNDM differs there."""
    if "strength" in settings and pipe.scheduler.config._class_name == "PNDMScheduler":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    generator = torch.Generator("cpu").manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        latents = pipe(generator=generator, output_type="latent", **settings).images
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return latents.numpy(), pipe.image_processor.postprocess(decoded.detach(), output_type="pil")[0]


def assert_equal(result, wanted):
    latents, drawn = wanted
    assert np.abs(latents).max() > 0.1
    assert np.abs(result.latents - latents).max() < 1e-3
    assert psnr(result.images[0], drawn) > 50
    assert np.asarray(result.images[0], np.float64).std() > 5, "a flat image would equal anything flat"
