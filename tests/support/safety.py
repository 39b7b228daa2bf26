"""diffusers' safety checker with tiny random weights, and images for it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

import sdonnx

SIZE = 32

THREE = sdonnx.Request(prompt="a cat", seed=1, num_images=3, width=64, height=64, num_inference_steps=1)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A package with a safety checker of its own."""

    path: Path
    images: tuple[Image.Image, ...]
    """Of THREE, without safety."""
    flags: list[bool]
    """Whether diffusers flags each."""


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 8,
}


def safety_checker(images=(), *, threshold=-2.0):
    """A checker with random concepts, and a threshold that flags about half of the images; or this one."""
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=_VISION, projection_dim=16)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in checker.named_parameters():
            scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale + (parameter.ndim == 1 and name.endswith("weight")))
        checker.special_care_embeds_weights.fill_(0)
        checker.concept_embeds_weights.fill_(0)
        if images:
            _, special, concepts, _ = reference(checker, images)
            checker.special_care_embeds_weights.fill_(float(np.median(special.max(axis=1))))
            threshold = float(np.median(concepts.max(axis=1)))
        checker.concept_embeds_weights.fill_(threshold)
    return checker


def random_images(count):
    """Images of random colors and sizes, of large spots."""
    rng = np.random.default_rng(5)
    images = []
    for _ in range(count):
        spots = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        images.append(spots.resize(tuple(rng.integers(40, 90, 2).tolist()), Image.Resampling.BICUBIC))
    return images


def reference(checker, images):
    """What diffusers says of images: special care and concept scores, without adjustment; and which are flagged."""
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    pixels = processor(list(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = checker.visual_projection(checker.vision_model(pixels)[1])
        special = cosine_distance(embeds, checker.special_care_embeds) - checker.special_care_embeds_weights
        concepts = cosine_distance(embeds, checker.concept_embeds) - checker.concept_embeds_weights
        _, flagged = checker(pixels, images=[np.zeros((1, 1, 3)) for _ in images])
    return pixels.numpy(), special.numpy(), concepts.numpy(), flagged
