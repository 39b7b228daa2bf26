"""What a LoRA file says about a layer counts once, under whatever names, or is refused by name."""

import copy
import json

import pytest
import torch
from lycoris.modules import MODULE_LIST, LokrModule, TLoraModule
from peft import BOFTConfig, LNTuningConfig, OFTConfig, VeraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from sdonnx_runtime.adapters.lora_keys import describe_unsupported, parse_name
from sdonnx_runtime.adapters.lora_kinds import find_kind
from sdonnx_runtime.adapters.merging import match_loras
from support import families
from support import lora as lora_fixture

import sdonnx

PLACE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
KOHYA = f"lora_unet_{PLACE.replace('.', '_')}"
ORIGINAL = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_k"
NORM = "lora_unet_down_blocks_0_resnets_0_norm1"
STATE = {
    f"{PLACE}.weight": torch.randn(12, 8, generator=torch.Generator().manual_seed(1)),
    "down_blocks.0.attentions.0.proj_in.weight": torch.ones(8, 8, 1, 1),
    "down_blocks.0.attentions.0.proj_in.bias": torch.ones(8),
    "down_blocks.0.resnets.0.norm1.weight": torch.ones(8),
    "down_blocks.0.resnets.0.norm1.bias": torch.ones(8),
}
"""A part of a U-Net."""


def pair(layer, seed=0, suffixes=("lora_up.weight", "lora_down.weight")):
    """Tensors of a low-rank change of STATE's attention weight."""
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(12, 3, generator=generator), torch.randn(3, 8, generator=generator)
    return {f"{layer}.{suffix}": value for suffix, value in zip(suffixes, (up, down), strict=True)}


def fused_by_diffusers(pipe, state, path):
    """A U-Net's weights with a file fused into them, with diffusers and peft."""
    lora_fixture.save(state, path)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe.unet.state_dict()


def assert_same(found, wanted, before):
    """80 dB of what the adapter changes."""
    change = max((wanted[name] - before[name]).abs().max() for name in before)
    assert change > 0.05
    for name in before:
        assert (found[name] - wanted[name]).abs().max() < 1e-4 * change, name


def test_of_two_spellings_of_a_layer_that_of_diffusers_counts(tmp_path):
    pipe = families.sdxl()
    half, original = (lora_fixture.kohya(pipe, kernels=True, original=each, text=False) for each in (False, True))
    twice = {**half, **{name: value * 1.5 for name, value in original.items() if not name.endswith(".alpha")}}
    before = copy.deepcopy(pipe.unet.state_dict())
    wanted = fused_by_diffusers(pipe, twice, tmp_path / "a.safetensors")
    assert_same(lora_fixture.merged(before, tmp_path / "a.safetensors")[0], wanted, before)


@pytest.mark.parametrize("norms", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale"])
def test_norms_under_another_spelling_than_their_matrices(tmp_path, norms):
    pipe = families.sdxl()
    before = copy.deepcopy(pipe.unet.state_dict())
    alone = lora_fixture.dora(pipe)
    mixed = lora_fixture.kohya(pipe, kernels=True, text=False)
    for name, value in alone.items():
        layer = name.partition(".lora_")[0]
        kohya = f"lora_unet_{layer.removeprefix('unet.').replace('.', '_')}"
        if "magnitude" not in name:
            mixed[f"{kohya}.lora_{'up' if 'lora_B' in name else 'down'}.weight"] = value
            mixed[f"{kohya}.alpha"] = torch.tensor(3.0)
        else:
            shaped = value.reshape(-1, *[1] * 3) if value.ndim == 4 else value[:, None]
            mixed[f"{layer}.{norms}"] = shaped if norms == "dora_scale" else value
    wanted = fused_by_diffusers(pipe, alone, tmp_path / "a.safetensors")
    path = lora_fixture.save(mixed, tmp_path / "b.safetensors")
    assert_same(lora_fixture.merged(before, path)[0], wanted, before)


@pytest.mark.parametrize(
    ("layer", "suffixes"),
    [
        (KOHYA, ("lora_up.weight", "lora_down.weight")),
        (ORIGINAL, ("lora_up.weight", "lora_down.weight")),
        (f"lycoris_{PLACE.replace('.', '_')}", ("lora_up.weight", "lora_down.weight")),
        (f"unet.{PLACE}", ("lora_B.weight", "lora_A.weight")),
        (f"unet.{PLACE}", ("lora.up.weight", "lora.down.weight")),
        (f"unet.{PLACE.replace('attn1.', 'attn1.processor.')}_lora", ("up.weight", "down.weight")),
        (f"base_model.model.{PLACE}", ("lora_B.weight", "lora_A.weight")),
        (f"base_model.model.{PLACE}", ("lora_B.style-1.weight", "lora_A.style-1.weight")),
        (PLACE, ("lora_B.weight", "lora_A.weight")),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k", ("lora_up.weight", "lora_down.weight")),
    ],
)
def test_names_of_every_tool(tmp_path, layer, suffixes):
    state = pair(layer, suffixes=suffixes)
    found, changed = lora_fixture.merged(STATE, lora_fixture.save(state, tmp_path / "a.safetensors"))
    up, down = state.values()
    assert changed == {f"{PLACE}.weight"}
    torch.testing.assert_close(found[f"{PLACE}.weight"], STATE[f"{PLACE}.weight"] + up @ down)


@pytest.mark.parametrize("prefix", ["lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g."])
def test_names_of_a_text_encoder(tmp_path, prefix):
    """kohya's, diffusers', ComfyUI's, and of OneTrainer's files in the Open Model Initiative's format."""
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    name = prefix + (layer.replace(".", "_") if prefix.endswith("_") else layer)
    path = lora_fixture.save(pair(name), tmp_path / "a.safetensors")
    parameters = {"text_encoder": [f"{layer}.weight"], "text_encoder_2": [f"{layer}.weight"]}
    found = match_loras("the model", parameters, [sdonnx.Lora(path=path)]).deltas
    assert {component: set(deltas) for component, deltas in found.items()} == {"text_encoder_2": {f"{layer}.weight"}}


def test_a_bias_under_another_spelling_than_its_weight(tmp_path):
    place = "down_blocks.0.attentions.0.proj_in"
    tensors = {f"unet.{place}.diff_b": torch.arange(8.0), f"lora_unet_{place.replace('.', '_')}.diff": torch.eye(8)}
    original = {"lora_unet_input_blocks_1_1_proj_in.diff_b": torch.ones(8)}
    path = lora_fixture.save(tensors, tmp_path / "a.safetensors")
    found, _ = lora_fixture.merged(STATE, path)
    torch.testing.assert_close(found[f"{place}.bias"], 1 + torch.arange(8.0))
    torch.testing.assert_close(found[f"{place}.weight"].reshape(8, 8), 1 + torch.eye(8))
    path = lora_fixture.save({f"unet.{place}.diff_b": torch.arange(8.0), **original}, tmp_path / "b.safetensors")
    torch.testing.assert_close(lora_fixture.merged(STATE, path)[0][f"{place}.bias"], 1 + torch.arange(8.0))


def test_what_has_no_effect_is_known(tmp_path):
    """Another spelling of a layer, and an alpha of nothing."""
    state = {**pair(KOHYA), **pair(ORIGINAL, 1), f"{NORM}.alpha": torch.tensor(2.0)}
    path = lora_fixture.save(state, tmp_path / "a.safetensors")
    wanted, _ = lora_fixture.merged(STATE, lora_fixture.save(pair(KOHYA), tmp_path / "b.safetensors"))
    found, changed = lora_fixture.merged(STATE, path)
    assert changed == {f"{PLACE}.weight"}
    torch.testing.assert_close(found[f"{PLACE}.weight"], wanted[f"{PLACE}.weight"], rtol=0, atol=0)


ONE = torch.ones(1)
REFUSED = {
    "parameter twice": (pair(KOHYA, 1, ("lora_B.weight", "lora_A.weight")), "2 of 4 tensors are there twice"),
    "layer twice": (pair(f"lycoris_{KOHYA[10:]}"), f"2 of 4 tensors are there twice, also as '{KOHYA}'"),
    "two adapters of peft": (pair(f"unet.{PLACE}", 1, ("lora_B.a.weight", "lora_B.b.weight")), "are there twice"),
    "original names in part": (
        {"lora_unet_input_blocks_1_1_proj_in.diff": torch.ones(8, 8)},
        r"1 of 3 tensors have original names, in a file with diffusers' names .*proj_in.diff",
    ),
    "bias of a layer without": (
        {f"{KOHYA}.diff_b": torch.ones(12)},
        "change a bias, which the layer of the model does",
    ),
    "two kinds": ({f"{KOHYA}.diff": torch.ones(12, 8)}, "3 of 3 tensors make no known kind of adapter together"),
    "a half": ({f"{NORM}.lora_up.weight": ONE}, "1 of 3 tensors make no known kind of adapter together"),
    "lokr of three factors": (
        {f"{NORM}.lokr_{name}": ONE for name in ("w1", "w1_a", "w1_b", "w2")},
        "4 of 6 tensors make no known kind of adapter together",
    ),
    "another component": (
        {"lora_te2_text_model_x.diff": ONE},
        r"1 of 3 tensors match no layer of the model \(lora_te2",
    ),
    "embedding of peft": ({f"{PLACE}.lora_embedding_A": ONE}, "1 of 3 tensors are LoRA of an embedding"),
    "whole weight": ({f"unet.{PLACE}.weight": ONE}, "make no known kind of adapter together"),
    "name of many lines": ({"x\n" * 500: ONE}, r"1 of 3 tensors are of no known kind \((x\?){75}\)"),
    "unknown": ({f"{KOHYA}.strange": ONE}, r"1 of 3 tensors are of no known kind \(lora_unet.*strange\)"),
    "OFT of LyCORIS 1": ({f"{KOHYA}.oft_diag": ONE}, "are OFT of LyCORIS 1"),
    "T-LoRA": ({f"{KOHYA}.q_layer.weight": ONE}, "are T-LoRA"),
    "AdaLoRA": ({f"base_model.model.{PLACE}.lora_E": ONE}, "are AdaLoRA"),
    "ComfyUI's weights": ({f"{KOHYA}.set_weight": ONE}, r"replace a weight \(ComfyUI\)"),
    "scales of fp8": ({f"{KOHYA}.scale_weight": ONE}, "are scales of fp8 weights"),
    "Flux": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": ONE}, "are for another family"),
    "transformer": ({"transformer.x.lora_A.weight": ONE}, "are for another family"),
    "AnimateDiff": ({"unet.down_blocks.0.motion_modules.0.proj_in.lora_A.weight": ONE}, "of AnimateDiff's"),
    "other embedding": ({"bundle_emb.ink.t5": ONE}, "are an embedding of another family"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_applied_is_refused_by_name(tmp_path, case):
    extra, message = REFUSED[case]
    path = lora_fixture.save({**pair(KOHYA), **extra}, tmp_path / "a.safetensors")
    with pytest.raises(sdonnx.RequestError, match=message):
        lora_fixture.merged(STATE, path)


@pytest.mark.parametrize(
    ("metadata", "claimed"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "Stable Diffusion XL"),
        ({"ss_base_model_version": "sd_v1"}, "Stable Diffusion 1"),
        ({"ss_v2": "True"}, None),
        ({"ss_base_model_version": "sd_v2_768_v"}, None),
        ({"ss_v2": "False"}, None),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "Stable Diffusion XL"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, None),
        ({"ss_base_model_version": "sd_1.5"}, "Stable Diffusion 1"),
        ({"ss_base_model_version": "of my own"}, None),
        (
            {"ss_base_model_version": "of my own", "modelspec.architecture": "stable-diffusion-v1/lora"},
            "Stable Diffusion 1",
        ),
    ],
)
def test_a_file_that_says_it_is_for_another_family(tmp_path, metadata, claimed):
    path = lora_fixture.save(pair(KOHYA), tmp_path / "a.safetensors", metadata=metadata)
    if claimed is not None:
        with pytest.raises(sdonnx.RequestError, match=f"for {claimed}, the model is Stable Diffusion 2"):
            lora_fixture.merged(STATE, path, family="sd2")
    assert lora_fixture.merged(STATE, path, family="sd2", ignore_unmatched=True)[1]
    assert lora_fixture.merged(STATE, path)[1]


def damaged(tensors):
    return {f"{KOHYA}.{name}": value for name, value in tensors.items()}


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_up.weight": torch.ones(12, 0), "lora_down.weight": torch.ones(0, 8), "alpha": torch.tensor(1.0)},
        {"lora_up.weight": torch.tensor(1.0), "lora_down.weight": torch.tensor(1.0)},
        {"lora_up.weight": torch.ones(12, 3), "lora_down.weight": torch.ones(3, 4, 1)},
        {"lora_up.weight": torch.ones(12, 3, dtype=torch.int8), "lora_down.weight": torch.ones(3, 8)},
        {"lora_up.weight": torch.ones(12, 3), "lora_down.weight": torch.ones(3, 8), "alpha": torch.ones(0)},
        {"lora_up.weight": torch.ones(12, 3), "lora_down.weight": torch.ones(3, 8), "alpha": torch.arange(2.0)},
        {"lora_up.weight": torch.ones(100_000, 1), "lora_down.weight": torch.ones(1, 100_000)},
        {"lokr_w1": torch.ones(100_000, 1), "lokr_w2": torch.ones(1, 100_000)},
        {"hada_w1_a": torch.ones(2), "hada_w1_b": ONE, "hada_w2_a": ONE, "hada_w2_b": ONE},
        {"oft_blocks": torch.ones(5, 2, 2)},
        {"oft_blocks": torch.ones(40, 3, 2, 2)},
        {"oft_blocks": torch.ones(2)},
        {"a1.weight": ONE, "a2.weight": ONE, "b1.weight": ONE, "b2.weight": ONE},
        {"weight": torch.ones(2), "on_input": torch.tensor(1)},
        {"ia3_l": torch.ones(1, 8, 1, 1)},
        {"lora_up.weight": torch.ones(12, 3), "lora_down.weight": torch.ones(3, 8), "dora_scale": torch.ones(1, 2)},
        {
            "lora_up.weight": torch.ones(12, 3), "lora_down.weight": torch.ones(3, 8),
            "bias_size": torch.tensor([12, 8]), "bias_values": ONE, "bias_indices": torch.tensor([[12], [0]]),
        },
    ],
)  # fmt: skip
def test_damaged_tensors_are_refused(tmp_path, tensors):
    path = lora_fixture.save(damaged(tensors), tmp_path / "a.safetensors", dtype=None)
    with pytest.raises(sdonnx.RequestError, match=rf"the tensors of '{KOHYA}' don't fit the model's 96 weights of 12"):
        lora_fixture.merged(STATE, path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": 4, "alpha_pattern": [1]}, "its setting alpha_pattern is"),
        ({"lora_alpha": "4"}, 'its setting lora_alpha is "4"; expected numbers'),
        ({"lora_alpha": 4, "alpha_pattern": {"(a+)+$": 2}}, r'has the expression "\(a\+\)\+\$"; expected names'),
        ({"peft_type": "VERA"}, 'is of peft\'s method "VERA"; supported are LORA'),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model too; convert it"),
        ([], "its settings are not a JSON object"),
    ],
)
def test_settings_that_are_damaged_or_not_supported(tmp_path, settings, message):
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    state = pair(f"unet.{PLACE}", suffixes=("lora_B.weight", "lora_A.weight"))
    path = lora_fixture.save(state, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(sdonnx.RequestError, match=message):
        lora_fixture.merged(STATE, path)


@pytest.mark.parametrize("config", [VeraConfig(r=4), OFTConfig(r=4, oft_block_size=0), BOFTConfig(), LNTuningConfig()])
@pytest.mark.parametrize("has_config", [True, False])
def test_other_methods_of_peft_are_refused_by_name(tmp_path, config, has_config):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    config.target_modules = ["0"]
    get_peft_model(model, config).save_pretrained(tmp_path)
    if not has_config:
        (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(sdonnx.RequestError, match="is of peft's method|unsupported method of peft"):
        lora_fixture.merged({"0.weight": torch.ones(8, 8)}, tmp_path / "adapter_model.safetensors")


def test_adapters_of_embedding_layers_are_refused_by_name(tmp_path):
    name = "text_model.embeddings.token_embedding"
    state = {**pair(KOHYA), f"lora_te_{name.replace('.', '_')}.diff": torch.ones(9, 8)}
    path = lora_fixture.save(state, tmp_path / "a.safetensors")
    parameters = {"unet": STATE.keys(), "text_encoder": [f"{name}.weight"]}
    with pytest.raises(sdonnx.RequestError, match=r"1 of 3 tensors are of an embedding layer \(lora_te_text_model_emb"):
        match_loras("the model", parameters, [sdonnx.Lora(path=path)])


def test_every_method_of_peft_and_lycoris_is_known():
    applied = {"lora_", "hada_", "lokr_", "ia3_"}
    for prefix in {*PEFT_TYPE_TO_PREFIX_MAPPING.values()} - applied:
        assert describe_unsupported(f"base_model.model.{PLACE}.{prefix}x") is not None, prefix
    for module in MODULE_LIST:
        keys = [f"{KOHYA}.{name}" for name in module.weight_list if name != "lokr_t1"]  # which it never writes
        if module is TLoraModule:
            assert describe_unsupported(keys[0]) == "are T-LoRA"
        elif module is not LokrModule and module.weight_list:  # of LoKr's factors only some are there
            assert find_kind({parse_name(key).parameter for key in keys}) is not None, module
