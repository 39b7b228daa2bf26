"""Graphs for a GPU in float16, of which the CPU runs those for WebGPU: against diffusers in float32."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from sdonnx_export.checkpoint_model import Checkpoint
from sdonnx_export.checkpoints.files import open_file
from sdonnx_export.checkpoints.ip_adapter import read_ip_adapter
from sdonnx_export.models.components import build
from sdonnx_export.models.unet import cache_stage
from sdonnx_export.models.unet_config import UNetConfig
from sdonnx_export.models.variants import VariantBuilder
from sdonnx_export.operators.partition import make_cache_graphs
from sdonnx_export.operators.precision import MixedPrecision
from sdonnx_runtime.packages.variant import CACHED_FEATURES
from support import families
from support.checkpoints import open_with
from support.controls import controlnet
from support.graphs import UNET, UNET_VARIATIONS, VAE, as_part, part_of, run, unet_feeds, unet_reference
from support.ip_adapters import image_encoder, ip_adapter, save_ip_adapter
from support.safety import random_images, reference, safety_checker
from support.upscalers import load_with_spandrel, random_upscaler

FLOAT, FLOAT16, INT64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64
SDXL = {"scaling_factor": 0.13025}


def error(found, wanted):
    """The largest difference, relative to the largest value."""
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def types(model):
    """The types of a graph's values."""
    return {value.name: value.dtype for node in model.graph for value in node.outputs}


@pytest.mark.parametrize(
    "variation",
    ["plain", "linear projection, layers and heads per level", "no mid block, sines first, padding below"],
)
def test_a_unet_equals_diffusers(variation, tmp_path):
    unet = families.random(families.UNet2DConditionModel(**{**UNET, **UNET_VARIATIONS[variation]}), 1)
    feeds = unet_feeds(unet.config)
    found = run(build("unet", as_part(unet), "fp16", target="webgpu"), tmp_path, **feeds)["out_sample"]
    assert found.dtype == np.float32
    assert error(found, unet_reference(unet, feeds)) < 1e-2


def test_timesteps_keep_their_phase(tmp_path):
    """Sinusoids of 999 in float16 would be those of another timestep."""
    unet = part_of(families.UNet2DConditionModel(**UNET))
    model = build("unet", unet, "fp16", target="webgpu")
    (sine,) = [node for node in model.graph if node.op_type == "Sin"]
    assert sine.outputs[0].dtype == FLOAT


def test_only_attention_that_overflows_is_widened():
    def widths(upcast):
        unet = part_of(families.UNet2DConditionModel(**UNET, upcast_attention=upcast))
        model = build("unet", unet, "fp16", target="directml")
        return {node.inputs[0].dtype for node in model.graph if node.op_type == "MultiHeadAttention"}

    assert widths(upcast=False) == {FLOAT16}
    assert widths(upcast=True) == {FLOAT}


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("changes", [{}, SDXL], ids=["sd", "sdxl"])
def test_a_vae_equals_diffusers(changes, tiled, tmp_path, rng):
    vae = families.random(families.AutoencoderKL(**VAE, **changes), 2)
    latents, image = (rng.standard_normal(shape, np.float32) for shape in ((1, 4, 6, 4), (1, 3, 12, 8)))
    with torch.no_grad():
        decoded = vae.decode(torch.from_numpy(latents)).sample.numpy()
        encoded = vae.encode(torch.from_numpy(image)).latent_dist.parameters.numpy()
    for name, feeds, wanted in (
        ("vae_decoder", {"latent_sample": latents}, decoded),
        ("vae_encoder", {"sample": image}, encoded),
    ):
        model = build(name, as_part(vae), "fp16", target="webgpu", tiled=tiled)
        for value in model.graph.inputs[1:]:  # the statistics of a whole image, of which none are used
            feeds[value.name] = np.zeros([size if isinstance(size, int) else 1 for size in value.shape], np.float32)
        found = next(iter(run(model, tmp_path, **feeds).values()))
        assert error(found, wanted) < 1e-2


def test_sdxls_vae_is_float32_but_for_its_mid_block():
    vae = families.vae(**SDXL)
    stored = {
        name: value.dtype
        for half in ("vae_decoder", "vae_encoder")
        for name, value in build(half, as_part(vae), "fp16", target="directml").graph.initializers.items()
        if name in dict(vae.named_parameters())
    }
    wanted = {
        name for name in stored if name.startswith(("post_quant_conv.", "decoder.conv_in.", "decoder.mid_block."))
    }
    assert {name for name, dtype in stored.items() if dtype == FLOAT16} == wanted


@pytest.mark.parametrize("changes", [{**SDXL, "force_upcast": False}, {}], ids=["repaired", "sd"])
def test_other_vaes_are_float16(changes):
    for half in ("vae_decoder", "vae_encoder"):
        part = as_part(families.vae(**changes))
        stored = build(half, part, "fp16", target="directml").graph.initializers
        assert {value.dtype for name, value in stored.items() if name in part.weights} == {FLOAT16}


def test_a_layer_of_float32_widens_what_it_meets(tmp_path):
    unet = families.random(families.UNet2DConditionModel(**UNET), 1)
    precision = MixedPrecision(base="fp16", patterns={"unet": {"down_blocks.0.resnets.0": "fp32"}})
    model = build("unet", as_part(unet), precision, target="webgpu")
    assert model.graph.initializers["down_blocks.0.resnets.0.norm1.weight"].dtype == FLOAT
    assert model.graph.initializers["down_blocks.0.resnets.1.norm1.weight"].dtype == FLOAT16
    sums = [node for node in model.graph if node.op_type == "Add" and node.metadata_props["stage"] == "down_blocks.0.0"]
    assert FLOAT in {node.outputs[0].dtype for node in sums}
    feeds = unet_feeds(unet.config)
    found = run(model, tmp_path, **feeds)["out_sample"]
    assert error(found, unet_reference(unet, feeds)) < 1e-2


@pytest.mark.parametrize("target", ["directml", "webgpu"])
def test_every_port_is_float32(target):
    unet, vae, encoder = families.unet(), families.vae(), families.clip()
    parts = {"unet": as_part(unet), "vae": as_part(vae), "text_encoder": as_part(encoder)}
    parts |= {"controlnet": as_part(controlnet(unet))}
    checkpoint = Checkpoint(source="x", revision=None, parts=parts, scheduler={}, tokenizers={}, settings={})
    builder = VariantBuilder(checkpoint=checkpoint, precision="fp16", target=target)
    for name in ("unet", "vae_decoder", "vae_encoder", "text_encoder", "controlnet"):
        for variant, model in builder.build(name).items():
            ports = {port.dtype for port in (*model.graph.inputs, *model.graph.outputs)}
            assert ports <= {FLOAT, INT64}, (name, variant)
            assert FLOAT16 in types(model).values()


def test_deepcache_runs_on_features_that_leave_and_enter_as_float32(tmp_path):
    part = as_part(families.random(families.UNet2DConditionModel(**UNET), 1))
    feeds = unet_feeds(part.config)
    graphs = make_cache_graphs(
        build("unet", part, "fp16", target="webgpu"), cache_stage(UNetConfig.from_dict(part.config))
    )
    caching = run(graphs["caching"], tmp_path, **feeds)
    assert caching[CACHED_FEATURES].dtype == np.float32
    feeds[CACHED_FEATURES] = caching[CACHED_FEATURES]
    cached = run(graphs["cached"], tmp_path, **feeds)["out_sample"]
    np.testing.assert_allclose(cached, caching["out_sample"], atol=2e-3)


def test_text_encoders_equal_transformers(tmp_path):
    ids = np.full((2, 77), 49407)
    ids[:, :6] = 49406, 320, 1125, 539, 320, 2368
    encoder = families.open_clip()
    found = run(build("text_encoder", as_part(encoder), "fp16", target="webgpu"), tmp_path, input_ids=ids)
    with torch.no_grad():
        wanted = encoder(torch.from_numpy(ids))
    assert error(found["last_hidden_state"], wanted.last_hidden_state.numpy()) < 1e-2
    assert error(found["pooler_output"], wanted.pooler_output.numpy()) < 1e-2


@pytest.mark.parametrize("kind", ["Real-ESRGAN x2", "Compact"])
def test_upscalers_equal_spandrels(kind, tmp_path):
    torch.save({"params_ema": random_upscaler(kind).state_dict()}, tmp_path / "net.pth")
    (part,) = open_with(tmp_path / "net.pth").parts.values()
    image = torch.rand(1, 3, 20, 28)
    found = run(build("upscaler", part, "fp16", target="webgpu"), tmp_path, image=image.numpy())["upscaled"]
    with torch.no_grad():
        wanted = load_with_spandrel(tmp_path / "net.pth")(image).numpy()
    assert error(found, wanted) < 1e-2


def test_scores_of_the_safety_checker_are_those_of_diffusers(tmp_path):
    images = random_images(2)
    checker = safety_checker(images)
    pixels, special, concepts, _ = reference(checker, images)
    model = build("safety_checker", as_part(checker), "fp16", target="webgpu")
    found = run(model, tmp_path, pixel_values=np.asarray(pixels, np.float32))
    np.testing.assert_allclose(found["special_care_scores"], special, atol=2e-3)
    np.testing.assert_allclose(found["concept_scores"], concepts, atol=2e-3)


def test_image_prompts_equal_those_in_float32(tmp_path):
    """The image encoder equals transformers'; IP-Adapter Plus its own graph in float32, which equals diffusers'."""
    encoder = image_encoder()
    encoder.save_pretrained(tmp_path / "image_encoder")
    path = save_ip_adapter(ip_adapter(families.unet(), plus=True), tmp_path / "adapter.safetensors")
    parts = read_ip_adapter(path, open_file(path), str(tmp_path / "image_encoder"))
    pixels = torch.rand(2, 3, encoder.config.image_size, encoder.config.image_size)
    model = build("image_encoder", parts["image_encoder"], "fp16", target="webgpu")
    states = run(model, tmp_path, pixel_values=pixels.numpy())
    with torch.no_grad():
        wanted = encoder(pixels, output_hidden_states=True)
    assert error(states["image_embeds"], wanted.image_embeds.numpy()) < 1e-2
    part = parts["ip_adapter"]
    state = {part.config["image_state"]: wanted.hidden_states[-2].numpy()}
    single, half = (
        run(build("ip_adapter", part, precision, target="webgpu"), tmp_path, **state) for precision in ("fp32", "fp16")
    )
    assert error(half["image_keys"], single["image_keys"]) < 1e-2
    assert error(half["image_values"], single["image_values"]) < 1e-2
