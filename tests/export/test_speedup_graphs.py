"""U-Net graphs for DeepCache and token downsampling, against diffusers' U-Net."""

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from sdonnx_export.models.components import build
from sdonnx_export.models.unet import cache_stage
from sdonnx_export.models.unet_config import UNetConfig
from sdonnx_export.operators.base import Operators
from sdonnx_export.operators.int8 import Int8Operators
from sdonnx_export.operators.partition import make_cache_graphs
from sdonnx_export.operators.precision import PRECISIONS
from sdonnx_runtime.graphs.initializers import read_initializers
from sdonnx_runtime.packages.variant import CACHED_FEATURES
from support.graphs import UNET, UNET_VARIATIONS, part_of, run, unet_feeds, unet_reference

import sdonnx

REUSABLE = {
    **UNET_VARIATIONS,
    "one level": {
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    },
    "one level, one layer, no mid block, no attention on the way up": {
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1,
        "mid_block_type": None,
    },
}


def outputs_of_all(unet, precision, directory, feeds):
    """Outputs of the plain graph, the caching one, and the cached one with the features of that."""
    operators = Int8Operators if precision == "int8" else Operators
    plain = build("unet", part_of(unet), precision, operators)
    stage = cache_stage(UNetConfig.from_dict(dict(unet.config)))
    graphs = {"plain": plain, **make_cache_graphs(plain, stage)}
    found = {}
    for name, graph in graphs.items():
        place = directory / name
        place.mkdir()
        found[name] = run(graph, place, **feeds)
        feeds = {**feeds, CACHED_FEATURES: found[name].get(CACHED_FEATURES)}
    return found


@pytest.mark.core
@pytest.mark.parametrize("variation", REUSABLE)
def test_caching_and_cached_in_one_step_are_the_whole(variation, tmp_path):
    unet = UNet2DConditionModel(**{**UNET, **REUSABLE[variation]})
    feeds = unet_feeds(unet.config, height=10)
    found = outputs_of_all(unet, "fp32", tmp_path, {**feeds, "sample": feeds["sample"][:1]})
    np.testing.assert_array_equal(found["caching"]["out_sample"], found["plain"]["out_sample"])
    np.testing.assert_allclose(found["cached"]["out_sample"], found["plain"]["out_sample"], atol=1e-6)
    inner = (tmp_path / "cached" / "model.onnx_data").stat().st_size
    assert inner < 0.7 * (tmp_path / "plain" / "model.onnx_data").stat().st_size


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_is_cut_in_two(precision, tmp_path):
    unet = UNet2DConditionModel(**UNET)
    found = outputs_of_all(unet, precision, tmp_path, unet_feeds(unet.config))
    np.testing.assert_array_equal(found["caching"]["out_sample"], found["plain"]["out_sample"])
    np.testing.assert_allclose(found["cached"]["out_sample"], found["plain"]["out_sample"], atol=1e-6)


class EveryOther:
    """Attention of diffusers whose keys and values come from every other row and column of images of known sizes."""

    def __init__(self, sizes):
        self._sizes = {height * width: (height, width) for height, width in sizes}

    def __call__(self, attention, hidden_states, encoder_hidden_states=None, **_):
        assert encoder_hidden_states is None
        image = hidden_states.unflatten(1, self._sizes[hidden_states.shape[1]])
        return AttnProcessor()(attention, hidden_states, image[:, ::2, ::2].flatten(1, 2))


def downsample_tokens(unet, height, width):
    """Lets the self-attention of the highest resolution that has any, up, down or in the middle, be `EveryOther`."""
    down, up = unet.config.down_block_types, unet.config.up_block_types[::-1]
    levels = [level for level, types in enumerate(zip(down, up, strict=True)) if "CrossAttn" in "".join(types)]
    lowest = len(down) - 1
    level = levels[0] if levels else lowest
    places = [f"down_blocks.{level}.", f"up_blocks.{lowest - level}.", *(["mid_block."] if level == lowest else [])]
    size = [(-(-height // 2**level), -(-width // 2**level))]
    chosen = [
        module for name, module in unet.named_modules() if name.startswith(tuple(places)) and name.endswith("attn1")
    ]
    for module in chosen:
        module.set_processor(EveryOther(size))
    assert chosen


@pytest.mark.core
@pytest.mark.parametrize("operators", [Operators, Int8Operators], ids=["channels first", "channels last"])
@pytest.mark.parametrize("variation", REUSABLE)
def test_token_downsampling_equals_diffusers_with_such_an_attention(variation, operators, tmp_path):
    unet = UNet2DConditionModel(**{**UNET, **REUSABLE[variation]})
    part, size = part_of(unet), (10, 12)
    feeds = unet_feeds(unet.config, *size)
    model = build("unet", part, "fp32", operators, token_downsampling=True)
    found = run(model, tmp_path, **feeds)["out_sample"]
    without = unet_reference(unet, feeds)
    downsample_tokens(unet, *size)
    np.testing.assert_allclose(found, unet_reference(unet, feeds), atol=2e-5)
    assert np.abs(found - without).max() > 1e-3


def test_token_downsampling_of_odd_sizes_keeps_the_last_row_and_column(tmp_path):
    unet = UNet2DConditionModel(**UNET)
    model = build("unet", part_of(unet), "fp32", token_downsampling=True)
    feeds = unet_feeds(unet.config, 9, 13)
    downsample_tokens(unet, 9, 13)
    np.testing.assert_allclose(run(model, tmp_path, **feeds)["out_sample"], unet_reference(unet, feeds), atol=2e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_graphs_point_into_one_weights_file(checkpoint, precision, export_once, tmp_path):
    options = {} if precision == "fp32" else {"precision": precision, "calibration": "none"}
    package = export_once(checkpoint, tmp_path / "package", **options)
    files = {path.name: path for path in (package / "unet").glob("*.onnx")}
    suffixes = ("", "-downsampled", "-controlled", "-downsampled-controlled")
    graphs = {"model", *(f"{name}{end}" for name in ("caching", "cached") for end in suffixes)}
    assert set(files) == {f"{name}.onnx" for name in (*graphs, "downsampled", "controlled", "downsampled-controlled")}
    guidance_interval = [
        each for path in files.values() for each in read_initializers(path).values() if not each.external
    ]
    assert max(each.length for each in guidance_interval) <= 64  # no weights in any of them
    settings = {"num_inference_steps": 4, "seed": 1, "width": 64, "height": 64}
    with sdonnx.load(package, memory="max") as pipe:
        plain, fast = pipe.generate("a cat", **settings), pipe.generate("a cat", **settings, **sdonnx.FAST)
    assert 1e-4 < np.abs(plain.latents - fast.latents).max() < 2 * np.abs(plain.latents).max()
