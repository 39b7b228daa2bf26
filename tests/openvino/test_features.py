"""What a request can ask for, on OpenVINO in float32: images are those of the CPU provider."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.controls import adapter
from support.drawing import OnBoth
from support.images import disc, photograph

import sdonnx

pytestmark = pytest.mark.usefixtures("openvino")

PHOTOGRAPH = photograph()
REQUESTS = {
    "img2img": {"image": PHOTOGRAPH, "strength": 0.6},
    "inpainting": {"image": PHOTOGRAPH, "mask_image": disc(), "padding_mask_crop": 8},
    "two images, a long prompt": {"num_images": 2, "prompt": "a red apple, " * 30},
    "hires fix": {"hires_scale": 1.5, "hires_steps": 2},
    "tiling": {"tiling": "xy"},
    "fast": {**sdonnx.FAST, "num_inference_steps": 4},
    "guidance on some steps, clip skip, weights": {
        "guidance_steps": (0.0, 0.5),
        "clip_skip": 2,
        "prompt": "a (red:1.4) [apple:pear:0.5]",
        "weighting": "compel",
    },
}


def test_what_a_request_asks_for(package, subtests):
    with OnBoth(package) as both:
        plain = both.assert_same().latents
        for name, asked in REQUESTS.items():
            with subtests.test(name):
                found = both.assert_same(**asked).latents
                assert found.shape != plain.shape or np.abs(found - plain).max() > 1e-2


def test_what_is_added_to_a_model(checkpoint, package, control, image_prompter, export_once, tmp_path):
    """All of it in one image, in the U-Net's variants for DeepCache and token downsampling, after it without LoRA."""
    from diffusers import StableDiffusionPipeline
    from support.lora import kohya, save

    made = StableDiffusionPipeline.from_pretrained(checkpoint)
    adapter().save_pretrained(tmp_path / "adapter")
    second = export_once(tmp_path / "adapter", tmp_path / "adapter-onnx")
    style = save(kohya(made, kernels=True), tmp_path / "style.safetensors")
    thing = tmp_path / "thing.safetensors"
    save_file({"<thing>": torch.randn(2, 64)}, thing)
    options = {"loras": [style], "embeddings": [thing], "controls": [control, second], "ip_adapters": [image_prompter]}
    given = {
        "controls": (sdonnx.Control(image=PHOTOGRAPH), sdonnx.Control(image=PHOTOGRAPH)),
        "ip_adapters": (sdonnx.IPAdapter(image=PHOTOGRAPH),),
    }
    with OnBoth(package, **options) as both:
        both.assert_same(prompt="a <thing>", num_inference_steps=2, **given, **sdonnx.FAST)
