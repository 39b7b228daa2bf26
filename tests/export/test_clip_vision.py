"""The written CLIP image encoder gives what transformers' gives."""

import numpy as np
import pytest
import torch
from sdonnx_export.models.clip_vision import ClipVisionConfig
from sdonnx_export.models.components import build
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.graphs.shape_inference import TensorInfo
from sdonnx_runtime.memory.estimates import Graph, graph_outputs
from support.graphs import part_of, run, saved
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 24,
    "image_size": 30,
    "patch_size": 8,
}
"""30 is no multiple of 8: the rest at the right and below is left out."""


@pytest.mark.core
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_image_encoder_equals_transformers(activation, tmp_path, rng):
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY, hidden_act=activation))
    images = rng.standard_normal((2, 3, 30, 30), np.float32)
    part = part_of(encoder)
    found = run(build("image_encoder", part, "fp32"), tmp_path, pixel_values=images)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(images), output_hidden_states=True)
    np.testing.assert_allclose(found["image_embeds"], expected.image_embeds.numpy(), atol=2e-5)
    np.testing.assert_allclose(found["last_hidden_state"], expected.last_hidden_state.numpy(), atol=2e-5)
    for index, state in enumerate(expected.hidden_states):
        np.testing.assert_allclose(found[f"hidden_states.{index}"], state.numpy(), atol=2e-5)


@pytest.mark.parametrize(("precision", "error"), [("fp16", 2e-3), ("int8", 0.05), ("int8-weights", 0.05)])
def test_image_encoder_in_other_precisions_is_close(precision, error, tmp_path, rng):
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY))
    images = rng.standard_normal((1, 3, 30, 30), np.float32)
    found = run(build("image_encoder", part_of(encoder), precision), tmp_path, pixel_values=images)["image_embeds"]
    with torch.no_grad():
        expected = encoder(torch.from_numpy(images)).image_embeds.numpy()
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < difference < error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "image_encoder: 'hidden_act' is 'relu'; supported: 'quick_gelu' or 'gelu'"),
        ({"num_attention_heads": 5}, "'num_attention_heads' is 5; supported: a divisor of hidden_size 32"),
        ({"patch_size": 64}, "'patch_size' is 64; supported: at most image_size 30"),
        ({"model_type": "siglip_vision_model"}, "'model_type' is 'siglip_vision_model'"),
    ],
)
def test_config_without_a_graph_is_an_error(changes, message):
    with pytest.raises(ExportError, match=message):
        ClipVisionConfig.from_dict({**TINY, **changes})


def test_memory_of_the_image_encoder_is_predicted(tmp_path):
    part = part_of(CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY)))
    path = saved(build("image_encoder", part, "fp32"), tmp_path)
    graph = Graph(path=path, inputs=(("pixel_values", TensorInfo((2, 3, 30, 30), 4)),))
    outputs = graph_outputs(graph)
    assert outputs["image_embeds"].shape == (2, 24)
    assert outputs["last_hidden_state"].shape == outputs["hidden_states.3"].shape == (2, 10, 32)
