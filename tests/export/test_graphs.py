"""Every written graph gives what diffusers' and transformers' modules give, over the config values they vary in."""

import numpy as np
import onnx_ir as ir
import onnxscript
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.numpy import save_file
from sdonnx_export.checkpoint_model import Checkpoint, Part, Weight
from sdonnx_export.checkpoints.fuse_lora import fuse_loras
from sdonnx_export.models.components import build
from sdonnx_export.operators import stored
from sdonnx_export.operators.base import Operators
from sdonnx_export.operators.int8 import Int8Operators
from sdonnx_export.operators.partition import cut
from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.execution.session import Session
from support.graphs import (
    UNET,
    UNET_VARIATIONS,
    VAE,
    VAE_VARIATIONS,
    part_of,
    run,
    saved,
    unet_feeds,
    unet_reference,
)
from transformers import CLIPTextConfig, CLIPTextModel


@pytest.mark.core
@pytest.mark.parametrize("variation", UNET_VARIATIONS)
def test_unet_equals_diffusers(variation, tmp_path):
    unet = UNet2DConditionModel(**{**UNET, **UNET_VARIATIONS[variation]})
    part = part_of(unet)
    feeds = unet_feeds(unet.config)
    found = run(build("unet", part, "fp32"), tmp_path, **feeds)["out_sample"]
    np.testing.assert_allclose(found, unet_reference(unet, feeds), atol=2e-5)


@pytest.mark.parametrize("operators", [Operators, Int8Operators])
def test_types_and_shapes_are_those_that_onnxscript_infers(operators, monkeypatch):
    part = part_of(UNet2DConditionModel(**UNET))

    def described():
        model = build("unet", part, "fp32", operators)
        return [(node.op_type, [(str(y.type), str(y.shape)) for y in node.outputs]) for node in model.graph]

    found = described()
    monkeypatch.setattr(stored, "InferringBuilder", onnxscript.GraphBuilder)
    assert found == described()


@pytest.mark.core
@pytest.mark.parametrize("variation", UNET_VARIATIONS)
def test_rows_that_differ_in_their_text_alone_share_what_comes_before_it(variation, tmp_path, rng):
    """Two states with three texts each, as guidance with several prompts has them, equal six states."""
    unet = UNet2DConditionModel(**{**UNET, **UNET_VARIATIONS[variation]})
    model = build("unet", part_of(unet), "fp32")
    feeds = unet_feeds(unet.config, height=10)
    text = rng.standard_normal((6, 77, 48), np.float32)
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
def test_vae_equals_diffusers(variation, tmp_path, rng):
    vae = AutoencoderKL(**{**VAE, **VAE_VARIATIONS[variation]})
    part = part_of(vae)
    latents = rng.standard_normal((2, vae.config.latent_channels, 6, 4), np.float32)
    found = run(build("vae_decoder", part, "fp32"), tmp_path, latent_sample=latents)["sample"]
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(latents)).sample.numpy()
    np.testing.assert_allclose(found, expected, atol=5e-5)
    image = rng.uniform(-1, 1, (1, 3, 32, 48)).astype(np.float32)
    found = run(build("vae_encoder", part, "fp32"), tmp_path, sample=image)["latent_parameters"]
    with torch.no_grad():
        expected = vae.encode(torch.from_numpy(image)).latent_dist.parameters.numpy()
    np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.core
@pytest.mark.parametrize(("activation", "eos"), [("quick_gelu", 2), ("gelu", 990)])
def test_text_encoder_equals_transformers(activation, eos, tmp_path, rng):
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
    ids = rng.integers(3, 980, (2, 77))
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
        ("class_embed_type", "timestep", "null"),
        ("time_embedding_type", "fourier", "positional"),
        ("attention_head_dim", [4], "a list of 2"),
        ("attention_head_dim", 5, "a divisor of 32 channels"),
        ("only_cross_attention", True, "False"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2DCrossAttn"),
        ("norm_num_groups", 0, "at least 1"),
    ],
    "vae": [
        ("act_fn", "relu", "silu"),
        ("up_block_types", ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], "UpDecoderBlock2D"),
        ("latents_mean", [0.0], "null"),
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
    with pytest.raises(ExportError, match=r"1 weights are not in the graph.*add_embedding"):
        build("unet", Part(config=part.config, weights={**part.weights, "add_embedding.x": narrow}), "fp32")


def with_value(part, name, value):
    """The part with one value of the weight ``name`` replaced."""
    data = part.weights[name].read().copy()
    data.flat[-1] = value
    weight = Weight(shape=data.shape, dtype="F32", read=lambda: data)
    return Part(config=part.config, weights={**part.weights, name: weight})


def test_a_weight_beyond_fp16_is_named(tmp_path):
    part = with_value(part_of(UNet2DConditionModel(**UNET)), "conv_in.weight", 1e5)
    with pytest.raises(ExportError, match=r"'conv_in.weight' has values beyond the range of fp16; use .* fp32"):
        saved(build("unet", part, "fp16"), tmp_path)


WEIGHTS = {
    "conv": "up_blocks.0.resnets.0.conv1.weight",
    "linear": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "norm": "down_blocks.0.resnets.0.norm1.weight",
    "bias": "mid_block.resnets.0.conv1.bias",
}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-weights", "int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_weight_that_is_not_finite_is_named(kind, value, precision, tmp_path):
    part = with_value(part_of(UNet2DConditionModel(**UNET)), WEIGHTS[kind], value)
    operators = Int8Operators if precision == "int8" else Operators
    with pytest.raises(ExportError, match=f"'{WEIGHTS[kind]}' has NaN or infinite values; the file is damaged"):
        saved(build("unet", part, precision, operators), tmp_path)


def test_differences_of_biases_and_norms_are_fused(tmp_path):
    part = part_of(UNet2DConditionModel(**UNET))
    changed = {name: f"lora_unet_{name.replace('.', '_')}" for name in ("conv_out", "down_blocks.0.resnets.0.norm1")}
    tensors, wanted = {}, {}
    for name, key in changed.items():
        for parameter, suffix in (("weight", "diff" if name == "conv_out" else "w_norm"), ("bias", "diff_b")):
            before = part.weights[f"{name}.{parameter}"].read()
            tensors[f"{key}.{suffix}"] = np.random.default_rng(1).normal(size=before.shape).astype(np.float32)
            wanted[f"{name}.{parameter}"] = before + np.float32(0.5) * tensors[f"{key}.{suffix}"]
    save_file(tensors, tmp_path / "x.safetensors")
    plain = Checkpoint(source="x", revision=None, parts={"unet": part}, scheduler={}, tokenizers={}, settings={})
    fused = fuse_loras(plain, [Lora(path=tmp_path / "x.safetensors", scale=0.5)]).parts["unet"].weights
    for name, values in wanted.items():
        np.testing.assert_allclose(fused[name].read(), values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "delta", "message"),
    [(np.nan, 1.0, "has NaN or infinite values; the file is damaged"), (0.0, 1e30, "overflows; use a smaller scale")],
)
def test_a_weight_that_is_not_finite_is_named_where_a_lora_is_fused(value, delta, message, tmp_path):
    name = WEIGHTS["linear"]
    part = with_value(part_of(UNet2DConditionModel(**UNET)), name, value)
    key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
    down, up = np.full((4, 32), delta, np.float32), np.full((32, 4), delta, np.float32)
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, tmp_path / "x.safetensors")
    plain = Checkpoint(source="x", revision=None, parts={"unet": part}, scheduler={}, tokenizers={}, settings={})
    fused = fuse_loras(plain, [Lora(path=tmp_path / "x.safetensors")]).parts["unet"].weights[name]
    with pytest.raises(ExportError, match=f"'{name}' {message}"):
        fused.read()
