"""Images of 20 steps that float16 draws, emulated, are those of float32."""

import numpy as np
import pytest
from sdonnx_export.checkpoint_model import Checkpoint
from sdonnx_export.checkpoints.open import open_source
from support.graphs import as_part
from support.lowering import lowered_package
from support.reference import psnr

import sdonnx

ASKED = {"prompt": "a cat on a yellow background", "seed": 1, "num_inference_steps": 20}
CASES = [("pictogram", "cuda"), ("sd1", "cuda"), ("sd2", "webgpu"), ("sdxl", "directml")]


@pytest.fixture(scope="module")
def drawn(opened):
    """The checkpoint and package of a model, and the image that it draws in float32; drawn once."""
    made = {}

    def get(name):
        if name not in made:
            if name == "pictogram":
                pipeline = sdonnx.load("pictogram", device="cpu")
                checkpoint = open_source(str(pipeline.package.root), None, None, lambda *_: None)
            else:
                pipe, pipeline = opened(name)
                names = ("unet", "vae", "text_encoder", "text_encoder_2")
                parts = {each: as_part(module) for each in names if (module := getattr(pipe, each, None)) is not None}
                checkpoint = Checkpoint(
                    source=name, revision=None, parts=parts, scheduler={}, tokenizers={}, settings={}
                )
            made[name] = checkpoint, pipeline.package.root, pipeline.generate(request(name)).images[0]
        return made[name]

    return get


def request(name):
    return sdonnx.Request(**ASKED, **({} if name == "pictogram" else {"width": 64, "height": 64}))


@pytest.mark.parametrize(("name", "target"), CASES)
def test_an_image_in_float16_is_that_in_float32(name, target, drawn, tmp_path):
    checkpoint, package, expected = drawn(name)
    lowered = lowered_package(package, checkpoint, tmp_path / "lowered", target=target)
    image = sdonnx.load(lowered, device="cpu").generate(request(name)).images[0]
    assert psnr(image, expected) > 45
    assert (np.asarray(image) != np.asarray(expected)).any()
