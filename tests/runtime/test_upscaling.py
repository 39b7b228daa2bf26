"""Upscaling in tiles: seams, sizes, transparency, memory, cancelling."""

import json
import threading
from functools import partial
from math import ceil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.execution import strategy
from sdonnx_runtime.execution.components import Components, Runner
from sdonnx_runtime.execution.session import Cancelled
from sdonnx_runtime.execution.staged_model import open_model
from sdonnx_runtime.execution.tiling import spans_with_margins
from sdonnx_runtime.images.preprocess import to_values
from sdonnx_runtime.memory import workload
from sdonnx_runtime.packages import upscaler_config
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.upscaler_config import UpscalerConfig
from sdonnx_runtime.upscaling import upscale_rgb
from support.images import photograph
from support.upscalers import random_upscaler

import sdonnx


@pytest.fixture(scope="module")
def packages(export_once, tmp_path_factory):
    """Packages by the kind of their network, made when they are asked for."""
    folder, made = tmp_path_factory.mktemp("upscalers"), {}

    def find(kind):
        if kind not in made:
            save_file(random_upscaler(kind).state_dict(), folder / f"{kind}.safetensors")
            made[kind] = export_once(folder / f"{kind}.safetensors", folder / kind)
        return made[kind]

    return find


def pixels(image):
    return np.asarray(image).astype(int)


def in_tiles(monkeypatch, package, image, side):
    """Upscale in tiles of a side, and count these."""
    monkeypatch.setattr(workload, "UPSCALER_TILES", (side,))
    tiles = []
    with sdonnx.load_upscaler(package, memory="2GB") as upscaler:
        return upscaler.upscale(image, on_tile=lambda *state: tiles.append(state)), tiles


def test_tiles_of_a_compact_network_have_no_seams(packages, monkeypatch):
    image = photograph(150, 90)
    whole, one = in_tiles(monkeypatch, packages("Compact"), image, 512)
    tiled, many = in_tiles(monkeypatch, packages("Compact"), image, 40)
    assert one == [(1, 1)]
    assert many == [(done, 15) for done in range(1, 16)]
    assert np.abs(pixels(whole) - pixels(tiled)).max() <= 1  # other sizes round otherwise in the last bit
    assert (pixels(whole) != pixels(tiled)).mean() < 1e-3
    monkeypatch.setattr(upscaler_config, "MAX_MARGIN", 1)  # less than the receptive field, 6
    assert np.abs(pixels(whole) - pixels(in_tiles(monkeypatch, packages("Compact"), image, 40)[0])).max() > 10


def test_tiles_of_an_rrdbnet_differ_little(packages, monkeypatch):
    image = photograph(130, 70)
    whole, _ = in_tiles(monkeypatch, packages("Real-ESRGAN x2"), image, 512)
    tiled, many = in_tiles(monkeypatch, packages("Real-ESRGAN x2"), image, 100)
    assert len(many) == 3
    assert np.square(pixels(whole) - pixels(tiled)).mean() < 255**2 / 10**6  # 60 dB


@pytest.mark.parametrize("kind", ["Compact", "Real-ESRGAN x2"])
def test_an_image_that_tiles_stays_one(packages, kind):
    package = Package.open(packages(kind))
    components = Components(package, partial(open_model, device="cpu", threads=1), keep_loaded=True)
    upscale = partial(upscale_rgb, Runner(components), UpscalerConfig.read(package.root), component="upscaler")
    image = photograph(50, 42)
    with components.exclusive():
        many = upscale(Image.fromarray(np.tile(np.asarray(image), (3, 3, 1))))
        alone, found = upscale(image), upscale(image, circular="xy")
    middle = many.crop((found.width, found.height, 2 * found.width, 2 * found.height))
    assert found.size == alone.size
    assert np.square(pixels(found) - pixels(middle)).mean() < 255**2 / 10**6  # 60 dB
    assert np.square(pixels(alone) - pixels(middle)).mean() > 255**2 / 10**4


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("margin", [0, 4, 40])
def test_tiles_cover_an_axis_once_with_their_margins(margin, multiple):
    for size in range(multiple, 1200, 4 * multiple + multiple):
        for side in (96, 130, 512):
            spans = spans_with_margins(size, side, margin, multiple)
            assert [at for span in spans for at in range(*span.keep)] == list(range(size))
            for span in spans:
                assert 0 <= span.start < span.stop <= size
                assert span.stop - span.start <= side or len(spans) == 1
                assert (span.start % multiple, (span.stop - span.start) % multiple) == (0, 0)
                assert span.start == 0 or span.keep[0] - span.start >= margin
                assert span.stop == size or span.stop - span.keep[1] >= margin
            assert len(spans) == 1 or len(spans) <= ceil(
                (size - 2 * margin) / (side // multiple * multiple - 2 * margin)
            )


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (17, 5)])
@pytest.mark.parametrize("kind", ["Real-ESRGAN x1", "Real-ESRGAN x2", "Compact"])
def test_sides_need_no_multiples(size, kind, packages):
    net, image = random_upscaler(kind), photograph(24, 24).resize(size)
    multiple = getattr(net, "shuffle_factor", 1) or 1
    padded = np.pad(pixels(image), [(0, -side % multiple) for side in size[::-1]] + [(0, 0)], mode="reflect")
    values = torch.from_numpy(to_values(Image.fromarray(padded.astype(np.uint8)))) / 2 + 0.5
    with torch.no_grad():
        wanted = net(values)[0].clamp(0, 1).permute(1, 2, 0).numpy() * 255
    with sdonnx.load_upscaler(packages(kind)) as upscaler:
        found = upscaler.upscale(image)
    assert found.size == tuple(side * upscaler.scale for side in size)
    assert np.abs(pixels(found) - wanted[: found.height, : found.width]).max() < 0.51


@pytest.mark.parametrize(("scale", "passes"), [(0.5, 1), (1, 1), (4, 1), (5, 2), (16, 2)])
def test_another_scale_is_passes_and_lanczos(scale, passes, packages):
    image = photograph(9, 7)
    with sdonnx.load_upscaler(packages("Compact")) as upscaler:
        wanted, states = image, []
        for _ in range(passes):
            wanted = upscaler.upscale(wanted)
        size = round(9 * scale), round(7 * scale)
        found = upscaler.upscale(image, scale=scale, on_tile=lambda *state: states.append(state))
    assert states[-1] == (passes, passes)
    np.testing.assert_array_equal(pixels(found), pixels(wanted.resize(size, Image.Resampling.LANCZOS)))


def test_transparency_is_resized(packages):
    colors, alpha = photograph(20, 16), Image.linear_gradient("L").resize((20, 16))
    layered = colors.copy()
    layered.putalpha(alpha)
    with sdonnx.load_upscaler(packages("Compact")) as upscaler:
        found, opaque = upscaler.upscale(layered), upscaler.upscale(colors)
        assert [upscaler.upscale(colors.convert(mode)).mode for mode in ("L", "P", "CMYK", "LA")] == [
            "RGB", "RGB", "RGB", "RGBA",
        ]  # fmt: skip
    assert found.mode == "RGBA"
    np.testing.assert_array_equal(pixels(found)[..., :3], pixels(opaque))
    np.testing.assert_array_equal(pixels(found)[..., 3], pixels(alpha.resize((80, 64), Image.Resampling.LANCZOS)))


def test_less_memory_is_smaller_tiles_and_a_limit(packages):
    with sdonnx.load_upscaler(packages("ESRGAN")) as upscaler:
        plans = [upscaler.plan((1000, 800), memory=memory, always=True) for memory in ("8GB", "min")]
        tiles = [plan.components[0].strategy.tile for plan in plans]
        assert tiles == [strategy.UPSCALER_TILES[0], strategy.UPSCALER_TILES[-1]]
        assert plans[1].peak < plans[0].peak - 400e6
        middle = sum(plan.peak for plan in plans) // 2
        between = upscaler.plan((1000, 800), memory=middle, always=True)
        assert plans[1].peak < between.peak <= middle
        with pytest.raises(RequestError, match=r"100MB of memory is too little .* give \d+MB or more"):
            upscaler.plan((1000, 800), memory="100MB")


def test_it_stops_within_its_tiles(packages, monkeypatch):
    monkeypatch.setattr(workload, "UPSCALER_TILES", (40,))
    with sdonnx.load_upscaler(packages("Compact"), memory="2GB") as upscaler:

        def stop(done, _):
            if done == 2:
                thread = threading.Thread(target=upscaler.cancel)
                thread.start()
                thread.join()

        with pytest.raises(Cancelled):
            upscaler.upscale(photograph(150, 90), on_tile=stop)
        upscaler.upscale(photograph(10, 10))


@pytest.mark.parametrize("scale", [0, -1, 17, float("nan"), float("inf"), True])
def test_an_impossible_scale_is_refused(scale, packages):
    with (
        sdonnx.load_upscaler(packages("Compact")) as upscaler,
        pytest.raises(RequestError, match="give a number above 0"),
    ):
        upscaler.upscale(photograph(8, 8), scale=scale)


def test_a_path_is_no_image(packages):
    with sdonnx.load_upscaler(packages("Compact")) as upscaler, pytest.raises(RequestError, match="image is str; give"):
        upscaler.upscale("a.png")


def test_a_result_without_bounds_is_refused(packages):
    with sdonnx.load_upscaler(packages("Compact")) as upscaler, pytest.raises(RequestError, match="36000x80 pixels"):
        upscaler.upscale(Image.new("RGB", (9000, 20)))


@pytest.mark.parametrize(
    "change", [{"scale": 3}, {"scale": 0}, {"scale": "4"}, {"receptive_field": None}, {"multiple": -1}]
)
def test_a_config_that_lies_is_refused(change, packages, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    for path in packages("Compact").rglob("*"):
        target = package / path.relative_to(packages("Compact"))
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    config = package / "upscaler" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(PackageError, match=r"expected .*export again"), sdonnx.load_upscaler(package) as upscaler:
        upscaler.upscale(photograph(8, 8))


def test_other_packages_are_refused(packages):
    with pytest.raises(PackageError, match="is Stable Diffusion 1, not an upscaler"):
        sdonnx.load_upscaler("pictogram")
    with pytest.raises(PackageError, match="is an upscaler; it enlarges images: sdonnx upscale"):
        sdonnx.load(packages("Compact"))
    with pytest.raises(PackageError, match="is an upscaler; give a package with a VAE$"):
        sdonnx.load("pictogram", vae=packages("Compact"))
    with pytest.raises(PackageError, match="is an upscaler, not a ControlNet or T2I-Adapter"):
        sdonnx.load("pictogram", controls=[packages("Compact")])
