"""The VAE in tiles: as diffusers has it, and with norms that see the whole picture, beside the whole."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from drawings import photograph
from families import sd1
from sdonnx_export.export import export
from sdonnx_models import bundled
from sdonnx_runtime.execution.components import Components, Runner
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.execution.staged_model import TiledModel, open_model
from sdonnx_runtime.execution.strategy import VAE_TILES, ExecutionStrategy
from sdonnx_runtime.packages.package import Package

CHECKPOINT = Path(__file__).parents[1] / "models" / "pictogram" / "checkpoint"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiles")
    sd1().save_pretrained(directory / "sd1")
    return Package.open(export(str(directory / "sd1"), directory / "package"))


@pytest.mark.parametrize("size", [(20, 12), (8, 9), (13, 30), (16, 16)])
def test_tiles_equal_those_of_diffusers(size, small):
    """`AutoencoderKL.enable_tiling`, of tiles of 8 cells: where a graph's norms can't be told of the whole."""
    vae, generator, package = sd1().vae, np.random.default_rng(1), small
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 8 * pixels
    latents = generator.standard_normal((1, 4, *size), np.float32)
    picture = generator.uniform(-1, 1, (1, 3, size[0] * pixels, size[1] * pixels)).astype(np.float32)
    with torch.no_grad():
        decoded = vae.decode(torch.from_numpy(latents)).sample.numpy()
        encoded = vae.encode(torch.from_numpy(picture)).latent_dist.parameters.numpy()
        vae.disable_tiling()
        plain = vae.decode(torch.from_numpy(latents)).sample.numpy()
    decoder, encoder = (Session(package.graph(name), device="cpu") for name in ("vae_decoder", "vae_encoder"))
    (mine,) = TiledModel(decoder, 8).run({"latent_sample": latents}).values()
    np.testing.assert_allclose(mine, decoded, atol=1e-4)
    (mine,) = TiledModel(encoder, 8 * pixels).run({"sample": picture}).values()
    np.testing.assert_allclose(mine, encoded, atol=1e-4)
    assert np.abs(decoded - plain).max() > 0.01


def in_tiles(package, name, picture, cells):
    """What a component gives for a picture in tiles of so many latent cells; None is all."""
    ways = {name: ExecutionStrategy(staged=cells is not None, tile=cells)}
    components = Components(package, partial(open_model, device="cpu"), keep_loaded=False, ways=ways)
    feeds = {"latent_sample" if name == "vae_decoder" else "sample": picture}
    return next(iter(Runner(components)(name, feeds).values()))


def decibels(found, expected):
    """Of pictures in -1..1."""
    return 10 * np.log10(4 / np.mean((found.clip(-1, 1) - expected.clip(-1, 1)) ** 2))


def canvas(seed):
    """A picture of 320x448 pixels: smooth colours, or many of the bundled model's subjects side by side."""
    if seed % 2:
        picture = photograph(320, 448, seed=seed)
    else:
        subjects = np.load(CHECKPOINT.parent / "composites.npz")["pictures"][seed : seed + 35]
        picture = subjects.reshape(7, 5, 64, 64, 3).swapaxes(1, 2).reshape(448, 320, 3)
    return (np.asarray(picture).astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


@pytest.fixture(scope="module")
def pictogram_vae():
    return AutoencoderKL.from_pretrained(CHECKPOINT, subfolder="vae", torch_dtype=torch.float32).eval()


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("seed", [2, 5])
def test_tiles_are_within_40_db_of_the_whole(seed, precision, pictogram_vae, tmp_path):
    """Of the bundled model's VAE, diffusers' where it isn't int8; without norms of the whole they aren't."""
    package, picture = Package.open(bundled()["pictogram"]), canvas(seed)
    with torch.no_grad():
        latents = pictogram_vae.encode(torch.from_numpy(picture)).latent_dist.mean
        whole = pictogram_vae.decode(latents).sample.numpy()
    latents, again = latents.numpy(), whole
    if precision == "int8":
        package = Package.open(export(str(CHECKPOINT), tmp_path / "package", precision=precision, calibration="fast"))
        whole = in_tiles(package, "vae_decoder", latents, None)
        encoded = in_tiles(package, "vae_encoder", picture, None)[:, :4]
        again = in_tiles(package, "vae_decoder", encoded, None)
    for cells in VAE_TILES:
        assert decibels(in_tiles(package, "vae_decoder", latents, cells), whole) > 40
        encoded = in_tiles(package, "vae_encoder", picture, cells)[:, :4]
        assert decibels(in_tiles(package, "vae_decoder", encoded, None), again) > 40
    (alone,) = (
        TiledModel(Session(package.graph("vae_decoder"), device="cpu"), VAE_TILES[-1])
        .run({"latent_sample": latents})
        .values()
    )
    assert decibels(alone, whole) < 40


def test_tiles_of_several_pictures_are_those_of_each():
    package = Package.open(bundled()["pictogram"])
    latents = np.random.default_rng(3).standard_normal((2, 4, 20, 40), np.float32)
    both = in_tiles(package, "vae_decoder", latents, 24)
    alone = [in_tiles(package, "vae_decoder", each[None], 24) for each in latents]
    np.testing.assert_allclose(both, np.concatenate(alone), atol=1e-4)


def test_a_small_picture_is_one_tile():
    package = Package.open(bundled()["pictogram"])
    latents = np.random.default_rng(3).standard_normal((1, 4, 16, 16), np.float32)
    whole, tiled = (in_tiles(package, "vae_decoder", latents, cells) for cells in (None, 24))
    np.testing.assert_allclose(tiled, whole, atol=1e-5)
