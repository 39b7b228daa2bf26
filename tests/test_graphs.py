"""Every written graph gives what diffusers' and transformers' modules give, over the config values they vary in."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from sdonnx_export.checkpoint_model import Part, Weight
from sdonnx_export.models.components import build
from sdonnx_export.operators.partition import cut
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.execution.session import Session
from transformers import CLIPTextConfig, CLIPTextModel

RNG = np.random.default_rng(0)

UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 48,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
    "sample_size": 8,
}
UNET_VARIATIONS = {
    "plain": {},
    "linear projection, layers and heads per level": {
        "use_linear_projection": True,
        "attention_head_dim": [2, 8],
        "layers_per_block": [1, 2],
        "upcast_attention": True,
    },
    "no mid block, sines first, padding below": {
        "mid_block_type": None,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
    },
    "attention in the mid block and on the way up alone": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
    },
    "three levels, attention at the lowest, deeper transformers": {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 1],
        "in_channels": 9,
        "norm_eps": 1e-3,
    },
}
VAE = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 16,
}
VAE_VARIATIONS = {
    "plain": {},
    "16 latent channels, no quantization convolutions": {
        "latent_channels": 16,
        "layers_per_block": 2,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "no attention, downscale 8": {
        "mid_block_add_attention": False,
        "block_out_channels": (16, 16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
}


def part_of(module):
    """A checkpoint's part from a torch module whose every weight matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if name.endswith("weight") else 0.0))
    module.eval()
    config = json.loads(json.dumps({"_class_name": type(module).__name__, **module_config(module)}))
    weights = {
        name: Weight(shape=tuple(tensor.shape), dtype="F32", read=tensor.numpy)
        for name, tensor in module.state_dict().items()
        if not name.endswith("position_ids")
    }
    return Part(config=config, weights=weights)


def module_config(module):
    return module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)


def saved(model, directory: Path) -> Path:
    path = directory / "model.onnx"
    ir.save(model, path, external_data="model.onnx_data")
    return path


def run(model, directory, **feeds):
    return Session(saved(model, directory), device="cpu").run(feeds)


def unet_feeds(config, height=8, width=12):
    return {
        "sample": RNG.standard_normal((2, config["in_channels"], height, width), np.float32),
        "timestep": np.array(417, np.float32),
        "encoder_hidden_states": RNG.standard_normal((2, 77, config["cross_attention_dim"]), np.float32),
    }


def unet_reference(unet, feeds):
    with torch.no_grad():
        return unet(**{name: torch.from_numpy(value) for name, value in feeds.items()}).sample.numpy()


@pytest.mark.core
@pytest.mark.parametrize("variation", UNET_VARIATIONS)
def test_unet_equals_diffusers(variation, tmp_path):
    unet = UNet2DConditionModel(**{**UNET, **UNET_VARIATIONS[variation]})
    part = part_of(unet)
    feeds = unet_feeds(unet.config)
    found = run(build("unet", part, "fp32"), tmp_path, **feeds)["out_sample"]
    np.testing.assert_allclose(found, unet_reference(unet, feeds), atol=2e-5)


@pytest.mark.core
@pytest.mark.parametrize("variation", UNET_VARIATIONS)
def test_rows_that_differ_in_their_text_alone_share_what_comes_before_it(variation, tmp_path):
    """Two states with three texts each, as guidance with several prompts has them, equal six states."""
    unet = UNet2DConditionModel(**{**UNET, **UNET_VARIATIONS[variation]})
    model = build("unet", part_of(unet), "fp32")
    feeds = unet_feeds(unet.config, height=10)
    text = RNG.standard_normal((6, 77, 48), np.float32)
    found = run(model, tmp_path, **{**feeds, "encoder_hidden_states": text})["out_sample"]
    states = np.concatenate([feeds["sample"]] * 3)
    expected = unet_reference(unet, {**feeds, "sample": states, "encoder_hidden_states": text})
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.core
def test_unet_takes_sizes_that_do_not_halve_evenly(tmp_path):
    variation = UNET_VARIATIONS["three levels, attention at the lowest, deeper transformers"]
    unet = UNet2DConditionModel(**{**UNET, **variation})
    model = build("unet", part_of(unet), "fp32")
    feeds = unet_feeds(unet.config, height=9, width=15)
    found = run(model, tmp_path, **feeds)["out_sample"]
    np.testing.assert_allclose(found, unet_reference(unet, feeds), atol=2e-5)


@pytest.mark.core
def test_fp16_stores_half_the_bytes_and_computes_in_float32(tmp_path):
    unet = UNet2DConditionModel(**UNET)
    part = part_of(unet)
    feeds = unet_feeds(unet.config)
    sizes, results = {}, {}
    for precision in ("fp32", "fp16"):
        directory = tmp_path / precision
        directory.mkdir()
        results[precision] = run(build("unet", part, precision), directory, **feeds)["out_sample"]
        sizes[precision] = (directory / "model.onnx_data").stat().st_size
    assert sizes["fp16"] < 0.55 * sizes["fp32"]
    rounded = UNet2DConditionModel(**UNET)
    state = {name: value.half().float() if value.ndim > 1 else value for name, value in unet.state_dict().items()}
    rounded.load_state_dict(state)
    np.testing.assert_allclose(results["fp16"], unet_reference(rounded.eval(), feeds), atol=2e-5)
    assert np.abs(results["fp16"] - results["fp32"]).max() > 1e-4


@pytest.mark.core
def test_stages_run_one_after_another_give_the_whole(tmp_path):
    unet = UNet2DConditionModel(**UNET)
    path = saved(build("unet", part_of(unet), "fp32"), tmp_path)
    feeds = unet_feeds(unet.config)
    whole = Session(path, device="cpu").run(feeds)["out_sample"]
    pieces = cut(ir.load(path))
    assert [piece.graph.node(0).metadata_props["stage"] for piece in pieces] == [
        *["conv_in", "down_blocks.0.0", "down_blocks.0.1", "down_blocks.0.downsamplers"],
        *["down_blocks.1.0", "down_blocks.1.1", "mid_block", "mid_block.resnets.1"],
        *[f"up_blocks.0.{layer}" for layer in (0, 1, 2, "upsamplers")],
        *[f"up_blocks.1.{layer}" for layer in range(3)],
        "conv_out",
    ]
    values = dict(feeds)
    for piece in pieces:
        stage = tmp_path / "stage.onnx"
        ir.save(piece, stage)
        values.update(Session(stage, device="cpu").run(values))
    np.testing.assert_array_equal(values["out_sample"], whole)


@pytest.mark.core
@pytest.mark.parametrize("variation", VAE_VARIATIONS)
def test_vae_equals_diffusers(variation, tmp_path):
    vae = AutoencoderKL(**{**VAE, **VAE_VARIATIONS[variation]})
    part = part_of(vae)
    latents = RNG.standard_normal((2, vae.config.latent_channels, 6, 4), np.float32)
    found = run(build("vae_decoder", part, "fp32"), tmp_path, latent_sample=latents)["sample"]
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(latents)).sample.numpy()
    np.testing.assert_allclose(found, expected, atol=5e-5)
    picture = RNG.uniform(-1, 1, (1, 3, 32, 48)).astype(np.float32)
    found = run(build("vae_encoder", part, "fp32"), tmp_path, sample=picture)["latent_parameters"]
    with torch.no_grad():
        expected = vae.encode(torch.from_numpy(picture)).latent_dist.parameters.numpy()
    np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.core
@pytest.mark.parametrize(("activation", "eos"), [("quick_gelu", 2), ("gelu", 990)])
def test_text_encoder_equals_transformers(activation, eos, tmp_path):
    config = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act=activation,
        eos_token_id=eos,
        bos_token_id=0,
    )
    encoder = CLIPTextModel(config)
    model = build("text_encoder", part_of(encoder), "fp32")
    ids = RNG.integers(3, 980, (2, 77))
    ids[0, 20:], ids[1, 50:] = 990, 990
    found = run(model, tmp_path, input_ids=ids)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(ids))
    np.testing.assert_allclose(found["last_hidden_state"], expected.last_hidden_state.numpy(), atol=2e-5)
    np.testing.assert_allclose(found["pooler_output"], expected.pooler_output.numpy(), atol=2e-5)


UNKNOWN = {
    "unet": [
        ("act_fn", "mish", "silu"),
        ("down_block_types", ["KDownBlock2D", "DownBlock2D"], "CrossAttnDownBlock2D or DownBlock2D"),
        ("class_embed_type", "timestep", "no such key"),
        ("time_embedding_type", "fourier", "positional"),
        ("attention_head_dim", [4], "a list of 2"),
        ("attention_head_dim", 5, "a divisor of 32 channels"),
        ("only_cross_attention", True, "False"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2DCrossAttn"),
        ("something_new", 3, "no such key"),
        ("norm_num_groups", 0, "at least 1"),
    ],
    "vae": [
        ("act_fn", "relu", "silu"),
        ("up_block_types", ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], "UpDecoderBlock2D"),
        ("latents_mean", [0.0], "no such key"),
        ("_class_name", "AutoencoderDC", "'AutoencoderKL' or 'AutoencoderTiny'"),
    ],
    "text_encoder": [
        ("hidden_act", "relu", "quick_gelu"),
        ("num_attention_heads", 5, "a divisor of hidden_size 64"),
        ("model_type", "t5", "clip_text_model"),
    ],
}


@pytest.mark.parametrize(
    ("part", "key", "value", "works"),
    [(part, *row) for part, rows in UNKNOWN.items() for row in rows],
)
def test_a_config_value_without_a_graph_is_named(part, key, value, works):
    module = {
        "unet": lambda: UNet2DConditionModel(**UNET),
        "vae": lambda: AutoencoderKL(**VAE),
        "text_encoder": lambda: CLIPTextModel(
            CLIPTextConfig(vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, bos_token_id=0)
        ),
    }[part]()
    whole = part_of(module)
    changed = Part(config={**whole.config, key: value}, weights=whole.weights)
    with pytest.raises(ExportError) as error:
        build({"vae": "vae_decoder"}.get(part, part), changed, "fp32")
    assert key in str(error.value)
    assert works in str(error.value)


def test_weights_that_contradict_the_config_are_named():
    part = part_of(UNet2DConditionModel(**UNET))
    missing = {name: weight for name, weight in part.weights.items() if name != "mid_block.resnets.0.conv1.bias"}
    with pytest.raises(ExportError, match=r"'mid_block.resnets.0.conv1.bias' is missing"):
        build("unet", Part(config=part.config, weights=missing), "fp32")
    narrow = Weight(shape=(32, 4, 1, 1), dtype="F32", read=lambda: np.zeros((32, 4, 1, 1), np.float32))
    with pytest.raises(ExportError, match=r"'conv_in.weight' has shape \(32, 4, 1, 1\).*\(32, 4, 3, 3\)"):
        build("unet", Part(config=part.config, weights={**part.weights, "conv_in.weight": narrow}), "fp32")
    with pytest.raises(ExportError, match=r"1 weights have no place.*add_embedding"):
        build("unet", Part(config=part.config, weights={**part.weights, "add_embedding.x": narrow}), "fp32")


@pytest.mark.parametrize(("value", "precision"), [(np.nan, "fp32"), (1e5, "fp16")])
def test_values_that_can_not_be_stored_are_named(value, precision, tmp_path):
    part = part_of(UNet2DConditionModel(**UNET))
    data = np.full((32, 4, 3, 3), value, np.float32)
    weight = Weight(shape=data.shape, dtype="F32", read=lambda: data)
    model = build("unet", Part(config=part.config, weights={**part.weights, "conv_in.weight": weight}), precision)
    with pytest.raises(ExportError, match=r"'conv_in.weight' has values that are not finite"):
        saved(model, tmp_path)
