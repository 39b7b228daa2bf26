"""Every published layout of a checkpoint gives the same components; errors name damaged and unsupported files."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from sdonnx_export.checkpoints.open import open_checkpoint, open_vae
from sdonnx_export.export import export
from sdonnx_export.models.clip import ClipTextConfig
from sdonnx_export.models.unet_config import UNetConfig
from sdonnx_export.models.vae import VaeConfig
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.package import Package
from support.ldm import VARIATIONS, save_ldm, tiny_pipeline
from support.pickles import class_of_another_library

PARTS = {"unet": UNetConfig, "vae": VaeConfig, "text_encoder": ClipTextConfig}


@pytest.fixture(scope="module", params=VARIATIONS)
def published(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("published")
    pipe = tiny_pipeline(**VARIATIONS[request.param])
    pipe.save_pretrained(directory / "diffusers")
    save_ldm(pipe, directory / "single.safetensors")
    return pipe, directory


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    pipe = tiny_pipeline()
    pipe.save_pretrained(directory / "diffusers")
    save_ldm(pipe, directory / "single.safetensors")
    return pipe, directory


@pytest.fixture
def copy(plain, tmp_path):
    return shutil.copytree(plain[1], tmp_path / "copy")


def state(pipe, part):
    weights = getattr(pipe, part).state_dict()
    return {name: tensor.numpy() for name, tensor in weights.items() if not name.endswith("position_ids")}


def assert_equal(part, expected, dtype=np.float32):
    assert set(part.weights) == set(expected)
    for name, weight in part.weights.items():
        data = weight.read()
        assert data.shape == weight.shape
        assert data.dtype == dtype
        np.testing.assert_array_equal(data, expected[name], err_msg=name)


def test_the_single_file_is_one_that_diffusers_reads(published):
    """Proof of the fixture: from_single_file gives back the very weights."""
    pipe, directory = published
    loaded = StableDiffusionPipeline.from_single_file(
        str(directory / "single.safetensors"), config=str(directory / "diffusers"), local_files_only=True
    )
    for part in PARTS:
        expected, found = state(pipe, part), state(loaded, part)
        assert set(found) == set(expected)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_package_is_the_checkpoint_that_it_was_made_of(precision, plain, tmp_path):
    pipe, directory = plain
    defaults = {"size": 64, "enlarge": 2}
    root = export(str(directory / "diffusers"), tmp_path / "package", precision=precision, defaults=defaults)
    checkpoint = open_checkpoint(str(root))
    assert checkpoint.source == "diffusers"
    assert checkpoint.defaults.items() >= defaults.items()
    for part in PARTS:
        found, expected = checkpoint.parts[part].weights, state(pipe, part)
        assert found.keys() == expected.keys()
        for name, data in expected.items():
            half = precision == "fp16" and data.ndim > 1
            np.testing.assert_array_equal(found[name].read(), data.astype(np.float16) if half else data)
            assert found[name].shape == data.shape
            assert found[name].dtype == ("F16" if half else "F32")


def test_the_scheduler_has_the_class_that_model_index_names(copy, tmp_path):
    """As in diffusers, whatever class the scheduler's own config was written by."""
    root = copy / "diffusers"
    index = json.loads((root / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (root / "model_index.json").write_text(json.dumps(index))
    loaded = StableDiffusionPipeline.from_pretrained(root, local_files_only=True).scheduler
    config = json.loads((root / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "PNDMScheduler"
    assert type(loaded).__name__ == open_checkpoint(str(root)).scheduler["_class_name"]
    package = export(str(root), tmp_path / "package")
    assert type(loaded).__name__ == Package.open(package).manifest.scheduler["_class_name"]


@pytest.mark.parametrize("layout", ["diffusers", "single.safetensors"])
def test_both_layouts_give_the_same_parts(published, layout):
    pipe, directory = published
    checkpoint = open_checkpoint(str(directory / layout))
    assert checkpoint.source == layout
    for part, parse in PARTS.items():
        assert_equal(checkpoint.parts[part], state(pipe, part))
        saved = json.loads((directory / "diffusers" / part / "config.json").read_text())
        assert parse.from_dict(checkpoint.parts[part].config) == parse.from_dict(saved)
    wanted = pipe.scheduler.config
    for key in (
        "prediction_type",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "steps_offset",
        "skip_prk_steps",
    ):
        assert checkpoint.scheduler.get(key, wanted[key]) == wanted[key]


@pytest.mark.parametrize(
    ("options", "dtype", "stored"),
    [
        ({"variant": "fp16"}, torch.float16, np.float16),
        ({"variant": "fp16", "max_shard_size": "100KB"}, torch.float16, np.float16),
        ({"max_shard_size": "100KB"}, torch.float32, np.float32),
        ({}, torch.bfloat16, np.float32),
        ({"safe_serialization": False}, torch.float32, np.float32),
    ],
)
def test_precisions_variants_and_shards(options, dtype, stored, tmp_path):
    pipe = tiny_pipeline().to(dtype)
    pipe.save_pretrained(tmp_path, **options)
    if "max_shard_size" in options:
        assert len(list((tmp_path / "unet").glob("*-of-*"))) > 1
    checkpoint = open_checkpoint(str(tmp_path))
    for part in PARTS:
        weights = getattr(pipe, part).float().state_dict()
        expected = {name: tensor.numpy() for name, tensor in weights.items() if not name.endswith("position_ids")}
        assert_equal(checkpoint.parts[part], expected, stored)


def test_old_names_are_understood(plain, copy):
    """Published VAEs of Stable Diffusion 1 have query, key, value, proj_attn; old text encoders no prefix."""
    pipe, _ = plain
    vae, text = copy / "diffusers" / "vae", copy / "diffusers" / "text_encoder"
    path = vae / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name):
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        return name

    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)
    path = text / "model.safetensors"
    weights = {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
    rest = {"embeddings.position_ids": torch.arange(77)[None], "text_projection.weight": torch.zeros(2, 2)}
    save_file({**weights, **rest}, path)
    checkpoint = open_checkpoint(str(copy / "diffusers"))
    assert_equal(checkpoint.parts["vae"], state(pipe, "vae"))
    assert_equal(checkpoint.parts["text_encoder"], state(pipe, "text_encoder"))


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickled_file_is_read_without_torch(plain, tmp_path, monkeypatch, is_zip):
    pipe, directory = plain
    weights = load_file(directory / "single.safetensors")
    with class_of_another_library("pytorch_lightning.callbacks.ModelCheckpoint") as callback:
        saved = {"callbacks": {callback: callback()}, "global_step": 7, "state_dict": weights}
        torch.save(saved, tmp_path / "model.ckpt", _use_new_zipfile_serialization=is_zip)
    shutil.copy(directory / "single.yaml", tmp_path / "model.yaml")
    expected = state(pipe, "unet")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert_equal(open_checkpoint(str(tmp_path / "model.ckpt")).parts["unet"], expected)


def test_a_hostile_pickle_executes_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'executed')!r}, 'w')",))

    torch.save({"state_dict": Hostile()}, tmp_path / "model.ckpt")
    with pytest.raises(ExportError, match="cannot|lacks"):
        open_checkpoint(str(tmp_path / "model.ckpt"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "source", ["diffusers", "diffusers/vae", "single.safetensors", "vae.safetensors", "ldm.safetensors"]
)
def test_a_vae_is_found_wherever_it_is(plain, tmp_path, source):
    pipe, directory = plain
    copied = shutil.copytree(directory, tmp_path / "copy")
    whole = load_file(directory / "single.safetensors")
    prefix = "first_stage_model."
    alone = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
    save_file(alone, copied / "ldm.safetensors")
    shutil.copy(copied / "diffusers" / "vae" / "diffusion_pytorch_model.safetensors", copied / "vae.safetensors")
    part = open_vae(str(copied / source))
    assert_equal(part, state(pipe, "vae"))
    assert VaeConfig.from_dict(part.config) == VaeConfig.from_dict(open_vae(str(directory / "diffusers")).config)


def edit(copy, changes):
    path = copy / "single.safetensors"
    weights = {name: changes.get(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in {**weights, **changes}.items() if tensor is not None}, path)


def test_single_files_that_are_not_whole(copy):
    edit(copy, {"something.else.weight": torch.zeros(1)})
    with pytest.raises(ExportError, match=r"1 unexpected keys \(something.else.weight\)"):
        open_checkpoint(str(copy / "single.safetensors"))
    path = copy / "single.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k.startswith("model.diffusion_model.")}, path)
    with pytest.raises(ExportError, match="lacks a VAE and a text encoder"):
        open_checkpoint(str(path))


def test_another_vocabulary_needs_its_tokenizer(copy):
    edit(
        copy,
        {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(99, 64)},
    )
    with pytest.raises(ExportError, match="vocabulary of 99 tokens.*vocab.json"):
        open_checkpoint(str(copy / "single.safetensors"))
    (copy / "vocab.json").write_text("{}")
    (copy / "merges.txt").write_text("")
    assert open_checkpoint(str(copy / "single.safetensors")).tokenizers == {"tokenizer": copy}


ALIASES = """
model:
  params:
    unet_config: {params: {}}
    first_stage_config: {params: {}}
    first: &first [eps, eps]
    parameterization: *first
"""


@pytest.mark.parametrize("text", ["model: 3", "{", "[]", "model: {params: {}}", ALIASES])
def test_an_original_config_that_is_none(copy, text):
    (copy / "single.yaml").write_text(text)
    with pytest.raises(ExportError, match="is not an original Stable Diffusion config"):
        open_checkpoint(str(copy / "single.safetensors"))


@pytest.mark.parametrize("name", ["single.safetensors", "diffusers/unet/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize(
    ("length", "message"), [(0, "empty"), (7, "not a file of tensors"), (100, "incomplete"), (-1, "incomplete")]
)
def test_a_truncated_file(copy, name, length, message):
    path = copy / name
    path.write_bytes(path.read_bytes()[:length])
    source = path if name.startswith("single") else copy / "diffusers"
    with pytest.raises(ExportError, match=f"{path.name} is {message}") as error:
        open_checkpoint(str(source))
    assert "\n" not in str(error.value)


def break_it(directory, how):
    unet = directory / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    index = {"weight_map": {"conv_in.weight": "../../secret.safetensors" if "outside" in how else "gone.safetensors"}}
    {
        "no model_index.json": lambda: (directory / "model_index.json").unlink(),
        "another pipeline": lambda: (directory / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
        "no component": lambda: shutil.rmtree(unet),
        "no weights": weights.unlink,
        "no JSON": lambda: (unet / "config.json").write_text("{"),
        "no tokenizer": lambda: shutil.rmtree(directory / "tokenizer"),
        "no scheduler": lambda: shutil.rmtree(directory / "scheduler"),
        "shard gone": lambda: (
            weights.rename(weights.with_suffix(".off"))
            and weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
        ),
        "shard outside": lambda: (
            weights.rename(weights.with_suffix(".off"))
            and weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
        ),
    }[how]()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no model_index.json", "model_index.json is missing"),
        ("another pipeline", "holds a FluxPipeline"),
        ("no component", "lacks a U-Net; download it again"),
        ("no weights", "has no weights"),
        ("no JSON", "not readable JSON"),
        ("no tokenizer", "tokenizer is missing"),
        ("no scheduler", "scheduler_config.json is missing"),
        ("shard gone", "gone.safetensors is missing"),
        ("shard outside", "lies outside"),
    ],
)
def test_a_directory_that_is_damaged(copy, how, message):
    break_it(copy / "diffusers", how)
    with pytest.raises(ExportError, match=message) as error:
        open_checkpoint(str(copy / "diffusers"))
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ExportError, match="does not exist"):
        open_checkpoint("/no/such/place")
    with pytest.raises(ExportError, match="the Hub did not give it"):
        open_checkpoint("nobody/nothing")
    (tmp_path / "notes.txt").write_text("a note")
    with pytest.raises(ExportError, match="is text"):
        open_checkpoint(str(tmp_path / "notes.txt"))


def test_a_hub_id_is_taken_from_the_cache(plain, tmp_path, monkeypatch):
    """What huggingface-hub has downloaded before is found offline, where it keeps it."""
    pipe, directory = plain
    cache = tmp_path / "hub" / "models--org--name"
    shutil.copytree(directory / "diffusers", cache / "snapshots" / "abc123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    checkpoint = open_checkpoint("org/name")
    assert checkpoint.source == "org/name"
    assert_equal(checkpoint.parts["unet"], state(pipe, "unet"))
