"""The VAE in tiles: as in diffusers, and with the norms of the whole image, against the VAE in one piece."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from sdonnx_models import bundled
from sdonnx_runtime.execution.components import Components, Runner
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.execution.staged_model import TiledModel, open_model
from sdonnx_runtime.execution.strategy import VAE_TILES, ExecutionPlan, ExecutionStrategy
from sdonnx_runtime.packages.package import Package
from support.families import sd1
from support.images import photograph
from support.paths import ROOT

CHECKPOINT = ROOT / "models" / "pictogram" / "checkpoint"


@pytest.fixture(scope="module")
def small(export_once, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiles")
    sd1().save_pretrained(directory / "sd1")
    return Package.open(export_once(directory / "sd1", directory / "package"))


@pytest.mark.parametrize("size", [(20, 12), (8, 9), (13, 30), (16, 16)])
def test_tiles_equal_those_of_diffusers(size, small):
    """`AutoencoderKL.enable_tiling` with tiles of 8 latent pixels, for graphs without norms of the whole image."""
    vae, generator, package = sd1().vae, np.random.default_rng(1), small
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 8 * pixels
    latents = generator.standard_normal((1, 4, *size), np.float32)
    image = generator.uniform(-1, 1, (1, 3, size[0] * pixels, size[1] * pixels)).astype(np.float32)
    with torch.no_grad():
        decoded = vae.decode(torch.from_numpy(latents)).sample.numpy()
        encoded = vae.encode(torch.from_numpy(image)).latent_dist.parameters.numpy()
        vae.disable_tiling()
        plain = vae.decode(torch.from_numpy(latents)).sample.numpy()
    decoder, encoder = (Session(package.graph(name), device="cpu") for name in ("vae_decoder", "vae_encoder"))
    (mine,) = TiledModel(decoder, 8).run({"latent_sample": latents}).values()
    np.testing.assert_allclose(mine, decoded, atol=1e-4)
    (mine,) = TiledModel(encoder, 8 * pixels).run({"sample": image}).values()
    np.testing.assert_allclose(mine, encoded, atol=1e-4)
    assert np.abs(decoded - plain).max() > 0.01


def in_tiles(package, name, image, tile, circular=""):
    """Output of a component for an image in tiles of ``tile`` latent pixels; None is one tile."""
    plan = ExecutionPlan(strategies={name: ExecutionStrategy(staged=tile is not None, tile=tile)})
    components = Components(package, partial(open_model, device="cpu"), keep_loaded=False, unplanned=plan)
    components.pad_circularly(circular)
    feeds = {"latent_sample" if name == "vae_decoder" else "sample": image}
    return next(iter(Runner(components)(name, feeds).values()))


def decibels(found, expected):
    """Of images in -1..1."""
    return 10 * np.log10(4 / np.mean((found.clip(-1, 1) - expected.clip(-1, 1)) ** 2))


def canvas(seed):
    """An image of 320x448 pixels: smooth colours, or many of the bundled model's subjects side by side."""
    if seed % 2:
        image = photograph(320, 448, seed=seed)
    else:
        subjects = np.load(CHECKPOINT.parent / "composites.npz")["images"][seed : seed + 35]
        image = subjects.reshape(7, 5, 64, 64, 3).swapaxes(1, 2).reshape(448, 320, 3)
    return (np.asarray(image).astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


@pytest.fixture(scope="module")
def pictogram_vae():
    return AutoencoderKL.from_pretrained(CHECKPOINT, subfolder="vae", torch_dtype=torch.float32).eval()


@pytest.mark.parametrize(("seed", "precision"), [(2, "int8"), (5, "fp16")])
def test_tiles_are_within_40_db_of_the_whole(seed, precision, pictogram_vae, export_once, tmp_path):
    """Of the bundled model's VAE, diffusers' where it isn't int8; without norms of the whole they aren't."""
    package, image = Package.open(bundled()["pictogram"]), canvas(seed)
    with torch.no_grad():
        latents = pictogram_vae.encode(torch.from_numpy(image)).latent_dist.mean
        whole = pictogram_vae.decode(latents).sample.numpy()
    latents, again = latents.numpy(), whole
    if precision == "int8":
        exported = export_once(CHECKPOINT, tmp_path / "package", precision=precision, calibration="fast")
        package = Package.open(exported)
        whole = in_tiles(package, "vae_decoder", latents, None)
        encoded = in_tiles(package, "vae_encoder", image, None)[:, :4]
        again = in_tiles(package, "vae_decoder", encoded, None)
    for tile in VAE_TILES:
        assert decibels(in_tiles(package, "vae_decoder", latents, tile), whole) > 40
        encoded = in_tiles(package, "vae_encoder", image, tile)[:, :4]
        assert decibels(in_tiles(package, "vae_decoder", encoded, None), again) > 40
    (alone,) = (
        TiledModel(Session(package.graph("vae_decoder"), device="cpu"), VAE_TILES[-1])
        .run({"latent_sample": latents})
        .values()
    )
    assert decibels(alone, whole) < 40


def test_tiles_of_several_images_are_those_of_each():
    package = Package.open(bundled()["pictogram"])
    latents = np.random.default_rng(3).standard_normal((2, 4, 20, 40), np.float32)
    both = in_tiles(package, "vae_decoder", latents, 24)
    alone = [in_tiles(package, "vae_decoder", each[None], 24) for each in latents]
    np.testing.assert_allclose(both, np.concatenate(alone), atol=1e-4)


def test_a_small_image_is_one_tile():
    package = Package.open(bundled()["pictogram"])
    latents = np.random.default_rng(3).standard_normal((1, 4, 16, 16), np.float32)
    whole, tiled = (in_tiles(package, "vae_decoder", latents, tile) for tile in (None, 24))
    np.testing.assert_allclose(tiled, whole, atol=1e-5)


@pytest.mark.parametrize("tile", [None, 24])
def test_a_shifted_image_is_the_image_shifted_where_it_tiles(tile):
    """What leaves on the right comes in on the left, also where tiles end; elsewhere it has another border there."""
    package, image = Package.open(bundled()["pictogram"]), canvas(2)[..., :64, :160]

    def there_and_back(image, axes):
        latents = in_tiles(package, "vae_encoder", image, tile, axes)[:, :4]
        return in_tiles(package, "vae_decoder", latents, tile, axes)

    def at_the_border(axes):
        pair = there_and_back(image, axes), np.roll(there_and_back(np.roll(image, 64, 3), axes), -64, 3)
        return decibels(*(each[..., [0, 1, 2, 3, -4, -3, -2, -1]] for each in pair))

    assert at_the_border("x") > (100 if tile is None else 40)
    assert at_the_border("y") < 28


def test_tiles_that_tile_are_within_40_db_of_the_whole():
    package, image = Package.open(bundled()["pictogram"]), np.roll(canvas(4)[..., :192, :160], 30, (2, 3))
    latents = in_tiles(package, "vae_encoder", image, None, "xy")[:, :4]
    whole = in_tiles(package, "vae_decoder", latents, None, "xy")
    assert decibels(in_tiles(package, "vae_decoder", latents, 32, "xy"), whole) > 40
    encoded = in_tiles(package, "vae_encoder", image, 32, "xy")[:, :4]
    assert decibels(in_tiles(package, "vae_decoder", encoded, None, "xy"), whole) > 40


def test_a_small_image_that_tiles_is_one_tile():
    package = Package.open(bundled()["pictogram"])
    latents = np.random.default_rng(3).standard_normal((1, 4, 16, 20), np.float32)
    whole, tiled, plain = (
        in_tiles(package, "vae_decoder", latents, tile, axes) for tile, axes in ((None, "xy"), (24, "xy"), (24, ""))
    )
    np.testing.assert_allclose(tiled, whole, atol=1e-5)
    assert np.abs(plain - whole).max() > 0.1
