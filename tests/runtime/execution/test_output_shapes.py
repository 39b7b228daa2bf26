"""Graphs that aren't what their manifest says: an error that names the component, instead of one of numpy."""

from dataclasses import replace

import pytest
from PIL import Image
from sdonnx_models import bundled
from sdonnx_runtime.denoising.control import check_control
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.pipeline import Pipeline

PACKAGE = Package.open(bundled()["pictogram"])
SPACE, (ENCODER,) = PACKAGE.manifest.latents, PACKAGE.manifest.text_encoders


def changed(**fields):
    return replace(PACKAGE, manifest=replace(PACKAGE.manifest, **fields))


def exchanged(name, other):
    """A package whose component is another one's graph."""
    return changed(components={**PACKAGE.manifest.components, name: PACKAGE.manifest.components[other]})


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (changed(text_encoders=(replace(ENCODER, output="states"),)), "text_encoder has no output 'states'"),
        (changed(text_encoders=(replace(ENCODER, pooled="pooled"),)), "text_encoder has no output 'pooled'"),
        (changed(text_encoders=(replace(ENCODER, output="pooler_output"),)), "text_encoder's 'pooler_output' is"),
        (changed(latents=replace(SPACE, downscale=8)), "vae_decoder's 'sample' is"),
        (exchanged("vae_decoder", "unet"), "requires input 'sample'"),
        (exchanged("unet", "vae_encoder"), "unet's 'latent_parameters' is|failed on device"),
    ],
)
def test_graph_that_is_not_what_the_manifest_says(package, message):
    with pytest.raises(PackageError if "failed" not in message else Exception, match=message) as error:
        Pipeline(package, device="cpu", threads=1).generate("a cat", width=64, height=64, num_inference_steps=1)
    assert str(error.value).isprintable()


def test_vae_encoder_of_another_size():
    image = Image.new("RGB", (64, 64), "red")
    pipeline = Pipeline(changed(latents=replace(SPACE, downscale=16)), device="cpu", threads=1)
    with pytest.raises(
        PackageError, match=r"vae_encoder's 'latent_parameters' is \(1, 8, 16, 16\); expected \(1, any, 4"
    ):
        pipeline.generate("a cat", image=image, strength=0.5, width=64, height=64, num_inference_steps=2)


@pytest.mark.parametrize(
    "config",
    [
        '{"block_out_channels": 320}',
        '{"block_out_channels": []}',
        '{"block_out_channels": [-1, 2]}',
        '{"block_out_channels": [320, 640], "down_block_types": [1, 2]}',
        '{"layers_per_block": 100000000}',
        '{"layers_per_block": [2]}',
        '{"cross_attention_dim": "wide"}',
        "[1]",
    ],
)
def test_config_of_a_control_that_is_damaged(config, tmp_path):
    (tmp_path / "controlnet").mkdir()
    (tmp_path / "controlnet" / "config.json").write_text(config)
    control = replace(changed(family="controlnet"), root=tmp_path)
    with pytest.raises(PackageError, match=r"config\.json") as error:
        check_control(PACKAGE, control)
    assert str(error.value).isprintable()
