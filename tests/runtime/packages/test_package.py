"""Untrusted packages: every damage or malice is one clear error, and no file outside of a package is read."""

import json
import shutil
from dataclasses import replace

import pytest
from sdonnx_export.export import export
from sdonnx_models import bundled
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.packages.manifest import MANIFEST, write_manifest
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.variant import UNET_VARIANTS, VARIANT_NAMES


@pytest.fixture
def copy(package, tmp_path):
    return shutil.copytree(package, tmp_path / "copy")


def change(copy, path, value):
    """Sets (or, for ``...``, deletes) what lies under a path of keys in the manifest."""
    manifest = json.loads((copy / MANIFEST).read_text())
    place = manifest
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    (copy / MANIFEST).write_text(json.dumps(manifest))


def test_what_export_wrote_opens(package):
    opened = Package.open(package)
    assert opened.manifest.family == "sd1"
    assert opened.manifest.latents.scaling_factor == 0.18215
    assert opened.manifest.latents.downscale == 8
    assert opened.manifest.defaults.size == 128
    assert opened.graph("unet") == package / "unet" / "model.onnx"
    assert not opened.is_optimum


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], 99, "has format 99; this version reads format 2; update sdonnx"),
        (["format"], 1, "has format 1; this version reads format 2; export the checkpoint again"),
        (["format"], ..., "has format None"),
        (["conditions", "concat"], "mask", "'concat' is 'mask'; supported: inpainting, pix2pix, depth"),
        (["family"], "sd9", "'family' is 'sd9'; supported: sd1, sd2, sdxl"),
        (["family"], "sdxl", "has the text encoders text_encoder; Stable Diffusion XL has text"),
        (["target"], "tpu", "'target' is 'tpu'; supported: generic"),
        (["latents"], ..., "has no 'latents'"),
        (["latents", "channels"], ..., "'latents' has no 'channels'"),
        (["latents", "channels"], "four", "'channels' is str instead of int"),
        (["latents", "channels"], -4, "'channels' is -4, expected 1 to 256"),
        (["latents", "downscale"], 0, "'downscale' is 0, expected 1 to 64"),
        (["latents", "scaling_factor"], 0, "'scaling_factor' is 0.0, expected 1e-06 to 1e+06"),
        (["latents", "shift_factor"], -1e9, "'shift_factor' is -1000000000.0, expected -1e+06 to 1e+06"),
        (["latents", "preview"], [[1.0, 2.0]] * 5, "'preview' requires 3 numbers"),
        (["latents", "preview", 0, 0], 1e300, "'preview': 0: 0 is 1e+300, expected -1e+06 to 1e+06"),
        (["conditions", "guidance_width"], 10**12, "'guidance_width' is 1000000000000, expected 4 to 100000"),
        (["defaults", "size"], 0, "'size' is 0, expected 1 to 16384"),
        (["defaults", "num_inference_steps"], -1, "'num_inference_steps' is -1, expected 1 to 1000"),
        (["defaults", "guidance_scale"], 1e9, "'guidance_scale' is 1000000000.0, expected -1000 to 1000"),
        (["text_encoders", 0, "length"], 2, "'length' is 2, expected 3 to 10000"),
        (["text_encoders", 0, "component"], "unet", "has the text encoders unet"),
        (["text_encoders"], [], "has the text encoders none"),
        (["components", "unet", "precision"], "", "'precision' of 'unet' is not a precision's name"),
        (["components", "refiner"], {"graphs": {}, "files": {}, "precision": "fp32"}, "'refiner'; supported: "),
        (["components", "unet", "files", "unet/\0"], {"size": 1, "sha256": ""}, "points outside the package"),
        (["components", "unet", "files", "x" * 300], {"size": 1, "sha256": ""}, "File name too long"),
        (["source", "a\nb\x1b[31m"], 1, "has an unknown key 'a\\nb\\x1b[31m'"),
        (["latents", "scaling_factor"], None, "'scaling_factor' is NoneType instead of float"),
        (["components", "unet", "graphs"], {}, "has no unet"),
        (["components", "vae_decoder"], ..., "has no vae_decoder"),
        (["components", "unet", "graphs", "plain"], "../../etc/passwd", "lists no file"),
        (["components", "unet", "files", "../secret"], {"size": 1, "sha256": ""}, "points outside the package"),
        (["components", "unet", "files", "/etc/passwd"], {"size": 1, "sha256": ""}, "points outside the package"),
        (["components", "unet", "files", "C:\\secret"], {"size": 1, "sha256": ""}, "points outside the package"),
        (["text_encoders"], {}, "is dict instead of list"),
        (["text_encoders", 0, "tokenizer"], "../tokenizer", "points outside the package"),
        (["exec"], "rm -rf /", "unknown key 'exec'"),
        (["defaults", "enlarge"], 10**9, "'enlarge' is 1000000000, expected 1 to 16"),
    ],
)
def test_a_manifest_that_is_wrong(copy, path, value, message):
    change(copy, path, value)
    with pytest.raises(PackageError) as error:
        Package.open(copy)
    assert message in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\x00", pytest.param("[" * 100_000, id="deep")])
def test_a_manifest_that_is_no_json_object(copy, text):
    (copy / MANIFEST).write_text(text)
    with pytest.raises(PackageError, match="JSON|is empty|starts with zeros"):
        Package.open(copy)


def test_numbers_that_json_has_not_are_left_out(copy, checkpoint, tmp_path):
    """diffusers writes its "no limit" as -Infinity, which Python reads and other programs don't."""
    published = shutil.copytree(checkpoint, tmp_path / "published")
    config = json.loads((published / "scheduler" / "scheduler_config.json").read_text())
    (published / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**config, "lambda_min_clipped": float("-inf")})
    )
    exported = export(str(published), tmp_path / "exported")
    change(copy, ["scheduler", "lambda_min_clipped"], float("-inf"))
    for root in (exported, copy):
        assert "lambda_min_clipped" not in Package.open(root).manifest.scheduler
    write_manifest(copy, Package.open(copy).manifest)
    for path in [copy / MANIFEST, *exported.rglob("*.json"), *bundled()["pictogram"].rglob("*.json")]:
        json.loads(
            path.read_text(encoding="utf-8"), parse_constant=lambda found, path=path: pytest.fail(f"{path}: {found}")
        )


def test_numbers_that_are_none_where_one_is_needed(copy):
    change(copy, ["latents", "scaling_factor"], float("nan"))
    with pytest.raises(PackageError, match="has no 'scaling_factor'"):
        Package.open(copy)
    change(copy, ["latents", "scaling_factor"], 1.0)
    change(copy, ["latents", "preview", 0, 0], float("inf"))
    with pytest.raises(PackageError, match="'preview': 0: 0 is NoneType instead of float"):
        Package.open(copy)


def test_weights_cut_after_export(copy):
    weights = copy / "unet" / "model.onnx_data"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(PackageError, match=f"has {len(whole) - 1} bytes instead of {len(whole)}"):
        Package.open(copy)
    weights.unlink()
    with pytest.raises(PackageError, match="model.onnx_data is missing"):
        Package.open(copy)


def test_a_directory_that_is_not_a_package_is_refused(tmp_path, checkpoint):
    with pytest.raises(PackageError, match="is not a directory"):
        Package.open(tmp_path / "nowhere")
    with pytest.raises(PackageError, match=r"neither sdonnx.json nor model_index.json"):
        Package.open(tmp_path)
    with pytest.raises(PackageError, match="it is a checkpoint; run 'sdonnx export' on it first"):
        Package.open(checkpoint)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(PackageError, match="holds a FluxPipeline"):
        Package.open(tmp_path)


def test_an_export_has_the_same_bytes_each_time(package, checkpoint, tmp_path):
    again = export(str(checkpoint), tmp_path / package.name)
    files = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    assert {path.relative_to(again) for path in again.rglob("*") if path.is_file()} == files
    assert [str(path) for path in files if (package / path).read_bytes() != (again / path).read_bytes()] == []


def test_the_graphs_of_a_unet_are_its_variants_and_caching_comes_before_cached(package):
    graphs = Package.open(package).manifest.components["unet"].graphs
    assert graphs.keys() == {variant.name for variant in UNET_VARIANTS}
    for variant in UNET_VARIANTS:
        if variant.cache == "cached":
            caching = replace(variant, cache="caching")
            assert VARIANT_NAMES.index(caching.name) < VARIANT_NAMES.index(variant.name)
