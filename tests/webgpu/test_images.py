"""Images that WebGPU draws, in software: those of the CPU provider.

Few tests with many cases each, since WebGPU compiles its shaders anew in each process.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import families, webgpu
from support.controls import controlnet
from support.images import disc, photograph
from support.ip_adapters import image_encoder, ip_adapter, save_ip_adapter
from support.lora import kohya, save
from support.reference import psnr

import sdonnx

ASKED = {"seed": 11, "width": 64, "height": 64, "num_inference_steps": 1, "guidance_scale": 5.0}
PHOTOGRAPH = photograph()


def assert_same_images(on_webgpu, package, options, **asked):
    request = sdonnx.Request(**{"prompt": "a red apple", **ASKED, **asked})
    found, latents = on_webgpu(webgpu.draw, package, request, "webgpu", **options)
    wanted, expected = webgpu.draw(package, request, "cpu", **options)
    assert np.abs(expected).max() > 0.1 and wanted.std() > 5, "a flat image would equal anything flat"
    assert np.linalg.norm(latents - expected) < 1e-3 * np.linalg.norm(expected)
    assert psnr(found, wanted) >= 45


@pytest.fixture
def exported(export_once, tmp_path):
    """A function that saves a model of diffusers and exports it, in fp16."""

    def get(name, made, **options):
        made.save_pretrained(tmp_path / name)
        return export_once(tmp_path / name, tmp_path / "packages" / name, precision="fp16", **options)

    return get


def test_pictogram(on_webgpu):
    assert_same_images(on_webgpu, "pictogram", {}, prompt="a cat on a yellow background")


def test_what_is_added_to_a_model(on_webgpu, exported, export_once, tmp_path):
    """All of it in one image, in the U-Net's variants for DeepCache and token downsampling."""
    made = families.sd1()
    package, edges = exported("sd1", made), exported("edges", controlnet(made.unet))
    style = save(kohya(made, kernels=True), tmp_path / "style.safetensors")
    thing = tmp_path / "thing.safetensors"
    save_file({"<thing>": torch.randn(2, 64)}, thing)
    image_encoder().save_pretrained(tmp_path / "image_encoder")
    state = save_ip_adapter(ip_adapter(made.unet), tmp_path / "ip-adapter.bin")
    prompter = export_once(state, tmp_path / "packages" / "ip-adapter")
    options = {"loras": [style], "embeddings": [thing], "controls": [edges], "ip_adapters": [prompter]}
    given = {"controls": (sdonnx.Control(image=PHOTOGRAPH),), "ip_adapters": (sdonnx.IPAdapter(image=PHOTOGRAPH),)}
    assert_same_images(on_webgpu, package, options, prompt="a <thing>", num_inference_steps=2, **given, **sdonnx.FAST)


def test_families(on_webgpu, exported, subtests):
    shallow = families.xl_unet(transformer_layers_per_block=1)
    repainted = {"image": PHOTOGRAPH, "mask_image": disc(), "tiling": "xy"}
    cases = {
        "sdxl": (lambda: families.sdxl(unet=shallow), {}),
        "inpainting": (families.WITH_IMAGES["sd1 inpaint"], repainted),
    }
    for name, (make, asked) in cases.items():
        with subtests.test(name):
            assert_same_images(on_webgpu, exported(name.replace(" ", "-"), make()), {}, **asked)
