"""Written IP-Adapters and the U-Net's cross-attention to their images against diffusers'."""

import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from sdonnx_export.checkpoints.companions import Companions
from sdonnx_export.checkpoints.files import open_file
from sdonnx_export.checkpoints.ip_adapter import read_ip_adapter
from sdonnx_export.checkpoints.open import open_checkpoint
from sdonnx_export.models.components import COMPONENTS, build, layer_shapes
from sdonnx_runtime.denoising.ip_adapter import CrossAttentions
from sdonnx_runtime.errors import ExportError
from support.families import unet, xl_unet
from support.graphs import part_of, run
from support.ip_adapters import image_encoder, ip_adapter, save_ip_adapter


@pytest.fixture(scope="module")
def encoder_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("encoder") / "image_encoder"
    image_encoder().save_pretrained(directory)
    return directory


def keys_and_values(state, folder, encoder, seed):
    """What the written adapter gives for a random image state, and that."""
    path = save_ip_adapter(state, folder / "adapter.safetensors")
    parts = read_ip_adapter(path, open_file(path), str(encoder))
    part = parts["ip_adapter"]
    shape = (2, 24) if part.config["image_projection"] == "linear" else (2, 17, 32)
    image = np.random.default_rng(seed).standard_normal(shape, np.float32)
    outputs = run(build("ip_adapter", part, "fp32"), folder, **{part.config["image_state"]: image})
    return image, outputs


@pytest.mark.parametrize("plus", [False, True], ids=["plain", "plus"])
@pytest.mark.parametrize("make", [unet, xl_unet], ids=["sd1", "sdxl"])
def test_one_adapter_equals_diffusers(make, plus, encoder_directory, tmp_path):
    model = make()
    part = part_of(model)
    state = ip_adapter(model, plus=plus)
    image, outputs = keys_and_values(state, tmp_path, encoder_directory, 3)
    rng = np.random.default_rng(0)
    feeds = {
        "sample": rng.standard_normal((2, 4, 8, 12), np.float32),
        "timestep": np.array(417, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 7, model.config.cross_attention_dim), np.float32),
    }
    added = {}
    if make is xl_unet:
        added = {"text_embeds": rng.standard_normal((2, 64), np.float32), "time_ids": np.ones((2, 6), np.float32)}
    graph = build("unet", part, "fp32", controlled=True)
    zeros = {port.name: np.zeros((1, 1, 1, 1), np.float32) for port in graph.graph.inputs if "residual" in port.name}
    scaled = {"image_keys": outputs["image_keys"][:, None], "image_values": 0.7 * outputs["image_values"][:, None]}
    (found,) = run(graph, tmp_path, **feeds, **added, **zeros, **scaled).values()
    model._load_ip_adapter_weights([state])
    for processor in model.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.7]
    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        conditions = {name: torch.from_numpy(value) for name, value in added.items()}
        conditions["image_embeds"] = [torch.from_numpy(image)[:, None]]
        expected = model(**tensors, added_cond_kwargs=conditions).sample.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PUBLISHED = {
    "ip-adapter_sd15": (SD15, None, 1024),
    "ip-adapter-plus_sd15": (SD15, 768, 1280),
    "ip-adapter_sdxl": (SDXL, None, 1280),
    "ip-adapter_sdxl_vit-h": (SDXL, None, 1024),
    "ip-adapter-plus_sdxl_vit-h": (SDXL, 1280, 1280),
}
"""The U-Net's config, the width of the resampler, and that of the image embedding, in h94/IP-Adapter."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_of_published_sizes_are_diffusers(name):
    config, hidden, width = PUBLISHED[name]
    text = config["cross_attention_dim"]
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
        if hidden is None:
            projection = ImageProjection(width, text, 4)
        else:
            heads, queries = hidden // 64, 16
            projection = IPAdapterPlusImageProjection(width, text, hidden, heads=heads, num_queries=queries)
    own = {
        "image_projection": "linear" if hidden is None else "resampler",
        "num_tokens": 4 if hidden is None else 16,
        **({} if hidden is None else {"hidden_size": hidden, "intermediate_size": 4 * hidden}),
        **({} if hidden is None else {"num_hidden_layers": 4, "num_attention_heads": hidden // 64}),
    }
    found = CrossAttentions.of_unet(dict(model.config))
    named = [model.get_submodule(each.removesuffix(".processor")) for each in model.attn_processors if "attn2" in each]
    assert found == CrossAttentions(text_width=text, widths=tuple(each.to_q.out_features for each in named))
    own |= {
        "_class_name": "IPAdapter",
        "image_state": "image_embeds",
        "image_width": width,
        "cross_attention_dim": text,
    }
    shapes = layer_shapes("ip_adapter", {**own, "layer_widths": found.widths})
    assert sum(math.prod(shape) for key, shape in shapes.items() if key.startswith("image_proj.")) == sum(
        each.numel() for each in projection.parameters() if each.ndim > 1
    )
    assert [shapes[f"ip_adapter.{2 * index + 1}.to_k_ip.weight"] for index in range(len(named))] == [
        (text, each.to_q.out_features) for each in named
    ]
    module, _ = COMPONENTS["unet"].module(dict(model.config))
    assert module.image_width == sum(found.widths)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            lambda state: state["image_proj"].pop("norm.weight"),
            "there is no 'image_proj.norm.weight'.*download it again",
        ),
        (lambda state: state["ip_adapter"].pop("3.to_k_ip.weight"), "not 1, 3, 5|there is no"),
        (lambda state: state["ip_adapter"].update({"0.to_q_lora.down.weight": torch.zeros(2, 2)}), "of faces"),
        (
            lambda state: state["image_proj"].update({"proj.weight": torch.zeros(256, 9)}),
            "of width 9, the image encoder",
        ),
    ],
)
def test_a_file_of_another_kind_or_a_damaged_one_is_named(broken, message, tmp_path, encoder_directory):
    state = ip_adapter(unet())
    broken(state)
    path = save_ip_adapter(state, tmp_path / "x.bin")
    with pytest.raises(ExportError, match=message):
        open_checkpoint(str(path), companions=Companions(image_encoder=str(encoder_directory)))


def test_the_image_encoder_is_found_as_the_hub_has_it(tmp_path, encoder_directory):
    path = tmp_path / "sdxl_models" / "ip-adapter_sdxl_vit-h.safetensors"
    path.parent.mkdir()
    save_ip_adapter(ip_adapter(unet()), path)
    with pytest.raises(ExportError, match="needs its image encoder; give its directory with --image-encoder SRC"):
        open_checkpoint(str(path))
    image_encoder(projection_dim=20).save_pretrained(path.parent / "image_encoder")
    with pytest.raises(ExportError, match="which .*image_encoder is not; give its directory with --image-encoder SRC"):
        open_checkpoint(str(path))
    shutil.copytree(encoder_directory, tmp_path / "models" / "image_encoder")
    assert open_checkpoint(str(path)).parts["image_encoder"].config["projection_dim"] == 24
    with pytest.raises(ExportError, match="is an IP-Adapter, which takes no --prediction-type; leave it out"):
        open_checkpoint(str(path), companions=Companions(prediction_type="epsilon"))
