"""Textual inversion at run time: words stand for inversions vectors as in diffusers, and other texts are as before."""

import copy
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sdonnx_export.export import export
from sdonnx_runtime.adapters.textual_inversion import TextualInversions, read_embedding, token_embeddings
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.text.tokenizer import Tokenizer
from support import families
from support import lora as lora_fixture
from support.cli import run_cli
from support.reference import PROMPT, SEED, SIZE, assert_equal, reference

import sdonnx

SETTINGS = {"num_inference_steps": 3, "guidance_scale": 4.0, **SIZE}
PROMPT_WITH_TRIGGERS = "a photograph of my-cat, and a MY-CAT in my-category"


def saved_pair(export_once, directory, name):
    """A family's pipeline, and our package of it."""
    pipe = getattr(families, name)()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(directory / name)
    return pipe, export_once(directory / name, directory / f"{name}-onnx")


@pytest.fixture(scope="module")
def sd1(export_once, tmp_path_factory):
    return saved_pair(export_once, tmp_path_factory.mktemp("embeddings"), "sd1")


@pytest.fixture(scope="module")
def sdxl(export_once, tmp_path_factory):
    return saved_pair(export_once, tmp_path_factory.mktemp("embeddings"), "sdxl")


def vectors(count, width=64, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) / 4


def saved(directory, layout, data):
    """A file of one word's vectors, named my-cat."""
    path = directory / f"my-cat.{'safetensors' if 'safetensors' in layout else 'pt' if 'a1111' in layout else 'bin'}"
    contents = {
        "diffusers safetensors": {"my-cat": data},
        "diffusers": {"my-cat": data[0] if len(data) == 1 else data},
        "a1111 safetensors": {"emb_params": data},
        "a1111": {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": torch.nn.Parameter(data)},
            "name": "x",
            "step": 9,
        },
        "a1111 of old": {
            "string_to_token": {"*": 265},
            "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(data)}),
        },
    }[layout]
    if "safetensors" in layout:
        save_file(contents, path)
    else:
        torch.save(contents, path)
    return path


def load_into_diffusers(pipe, path, word="my-cat"):
    """diffusers' pipeline with the same file; it finds words in lower case only, and within others."""
    pipe = copy.deepcopy(pipe)
    pipe.load_textual_inversion(str(path.parent), weight_name=path.name, token=word)
    return pipe


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layout", ["diffusers safetensors", "diffusers", "a1111 safetensors", "a1111"])
def test_images_equal_those_of_diffusers(sd1, tmp_path, layout, count):
    pipe, package = sd1
    path = saved(tmp_path, layout, vectors(count))
    common = {"negative_prompt": "my-cat, blurry", **SETTINGS}
    wanted = reference(load_into_diffusers(pipe, path), prompt="a photograph of my-cat on a my-cat", **common)
    with sdonnx.load(package, embeddings=[path]) as ours:
        assert_equal(ours.generate("a photograph of my-cat on a my-cat", seed=SEED, **common), wanted)
        plain = ours.generate(PROMPT, seed=SEED, **SETTINGS).latents
        ours.set_embeddings([])
        assert np.array_equal(ours.generate(PROMPT, seed=SEED, **SETTINGS).latents, plain)
        untaught = ours.generate("a photograph of my-cat on a my-cat", seed=SEED, **common)
    assert np.abs(untaught.latents - wanted[0]).max() > 0.1


def test_words_change_while_the_tokenizer_stays_loaded(sd1, tmp_path):
    """Its placeholders are those of the request's textual inversions, not of those that it was opened with."""
    pipe, package = sd1
    package = shutil.copytree(package, tmp_path / "package")
    path, prompt = saved(tmp_path, "a1111", vectors(1)), "a photograph of my-cat"
    plain = reference(pipe, prompt=prompt, **SETTINGS)
    with sdonnx.load(package, keep_loaded=True) as ours:
        assert_equal(ours.generate(prompt, seed=SEED, **SETTINGS), plain)
        shutil.rmtree(package / "tokenizer")
        for count in (1, 3):
            saved(tmp_path, "a1111", vectors(count, seed=count))
            wanted = reference(load_into_diffusers(pipe, path), prompt=prompt, **SETTINGS)
            ours.set_embeddings([path])
            assert_equal(ours.generate(prompt, seed=SEED, **SETTINGS), wanted)
        ours.set_embeddings([])
        assert_equal(ours.generate(prompt, seed=SEED, **SETTINGS), plain)


def test_states_equal_those_of_diffusers(sd1, tmp_path):
    """The text encoder's, of a word with three vectors."""
    pipe, package = sd1
    path = saved(tmp_path, "a1111", vectors(3))
    other = load_into_diffusers(pipe, path)
    wanted = other.encode_prompt("my-cat, really", "cpu", 1, False)[0].detach().numpy()
    opened = sdonnx.Package.open(package)
    inversions = TextualInversions(opened, [read_embedding(path)])
    tokenizer = Tokenizer.open(package / "tokenizer", length=77, placeholders=inversions.placeholders)
    ids, _ = tokenizer.encode("my-cat, really")
    feeds, variant = inversions.inputs("text_encoder", np.array([ids]))
    found = Session(opened.graph("text_encoder", variant)).run(feeds)["last_hidden_state"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("layout", ["safetensors", "pt"])
def test_images_of_sdxl_equal_those_of_diffusers(sdxl, tmp_path, layout):
    pipe, package = sdxl
    state = {"clip_l": vectors(2), "clip_g": vectors(2, seed=1)}
    path = tmp_path / f"my-cat.{layout}"
    save_file(state, path) if layout == "safetensors" else torch.save(state, path)
    other = copy.deepcopy(pipe)
    for key, which in (("clip_l", ""), ("clip_g", "_2")):
        parts = {part: getattr(other, part + which) for part in ("tokenizer", "text_encoder")}
        other.load_textual_inversion(state[key], token="my-cat", **parts)
    wanted = reference(other, prompt="a photograph of my-cat", negative_prompt="bad", **SETTINGS)
    with sdonnx.load(package, embeddings=[path]) as ours:
        assert_equal(ours.generate("a photograph of my-cat", seed=SEED, negative_prompt="bad", **SETTINGS), wanted)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd1 of AUTOMATIC1111"])
def test_an_embedding_in_a_lora_file_is_as_a_file_of_its_own(request, tmp_path, family):
    """As OneTrainer and AUTOMATIC1111 write it; the file of its own is compared with diffusers above."""
    pipe, package = request.getfixturevalue(family[:4].strip())
    slots = ["clip_l", "clip_g"] if family == "sdxl" else ["clip_l"]
    state = {slot: vectors(2, seed=seed) for seed, slot in enumerate(slots)}
    own = tmp_path / "my-cat.safetensors"
    save_file(state if family == "sdxl" else {"emb_params": state["clip_l"]}, own)
    names = {"clip_l": "string_to_param.*"} if family.endswith("1111") else {}
    bundled = {f"bundle_emb.my-cat.{names.get(slot, slot)}": value for slot, value in state.items()}
    lora = lora_fixture.save(lora_fixture.kohya(pipe), tmp_path / "lora.safetensors")
    both = lora_fixture.save({**lora_fixture.kohya(pipe), **bundled}, tmp_path / "both.safetensors")
    with sdonnx.load(package, loras=[lora], embeddings=[own], lora_folder=tmp_path) as ours:
        wanted = ours.generate("a my-cat", seed=SEED, **SETTINGS).latents
        ours.set_embeddings([])
        without = ours.generate("a my-cat", seed=SEED, **SETTINGS).latents
        ours.set_loras([both])
        found = ours.generate("a my-cat", seed=SEED, **SETTINGS).latents
        with pytest.raises(sdonnx.RequestError, match="the trigger word 'my-cat' is invalid or already used"):
            ours.set_embeddings([own])
        ours.set_loras([both, (both, 0)])
        twice = ours.generate("a my-cat<lora:both:0>", seed=SEED, **SETTINGS).latents
        ours.set_loras([])
        named = ours.generate("a my-cat<lora:both>", seed=SEED, **SETTINGS).latents
    assert np.array_equal(found, wanted)
    assert np.array_equal(named, wanted)
    assert np.array_equal(twice, wanted)
    assert np.abs(without - wanted).max() > 0.05
    with pytest.raises(sdonnx.ExportError, match="embedding 'my-cat', which a package can't have; give the file to"):
        export(str(package), tmp_path / "fused", loras=[sdonnx.Lora(path=both)])


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-weights", "int4"])
def test_the_table_of_every_precision(sd1, tmp_path, precision):
    """Vectors that the table has already, given as a word's, are that word."""
    package = export(str(sd1[1]), tmp_path / "package", precision=precision, calibration="none")
    opened = sdonnx.Package.open(package)
    ids = Tokenizer.open(package / "tokenizer", length=77).ids("horse")
    own = token_embeddings(opened, "text_encoder", np.array([ids]))[0]
    path = saved(tmp_path, "diffusers safetensors", torch.from_numpy(own))
    with sdonnx.load(package, embeddings=[path]) as ours:
        found = ours.generate("a my-cat on a hill", seed=SEED, **SETTINGS).latents
        wanted = ours.generate("a horse on a hill", seed=SEED, **SETTINGS).latents
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_words_are_found_whatever_their_case_and_not_within_others(sd1, tmp_path):
    inversions = TextualInversions(sdonnx.Package.open(sd1[1]), [read_embedding(saved(tmp_path, "a1111", vectors(2)))])
    tokenizer = Tokenizer.open(sd1[1] / "tokenizer", length=77, placeholders=inversions.placeholders)
    plain = Tokenizer.open(sd1[1] / "tokenizer", length=77)
    mine = list(inversions.placeholders["my-cat"])
    wanted = [*plain.ids("a photograph of"), *mine, *plain.ids(", and a"), *mine, *plain.ids("in my-category")]
    assert tokenizer.ids(PROMPT_WITH_TRIGGERS) == wanted
    assert tokenizer.ids("mY-\u212aat, MY-CAT") == [*plain.ids("mY-\u212aat,"), *mine]
    odd = Tokenizer.open(sd1[1] / "tokenizer", length=77, placeholders={"kit": (2**31,), "kits": (2**31 + 1,)})
    assert odd.ids("\u212ait, k\u0131t, kit\u017f, KITS") == [
        2**31,
        *plain.ids(","),
        2**31,
        *plain.ids(","),
        2**31 + 1,
        *plain.ids(","),
        2**31 + 1,
    ]
    long = "a red apple " * 24 + "my-cat twice and more"
    assert tokenizer.encode(long)[1] == "and more"
    assert tokenizer.encode("big big " + long)[1] == "my-cat twice and more"


def test_a_word_of_ones_own(sd1, tmp_path):
    path = saved(tmp_path, "a1111", vectors(1))
    with sdonnx.load(sd1[1], embeddings=[(path, "<thing>")]) as pipe:
        found = pipe.generate("a <thing>", seed=SEED, **SETTINGS).latents
    with sdonnx.load(sd1[1], embeddings=[path]) as pipe:
        assert np.array_equal(pipe.generate("a my-cat", seed=SEED, **SETTINGS).latents, found)


def test_of_another_model(sd1, sdxl, tmp_path):
    wide = saved(tmp_path, "diffusers", vectors(1, width=32))
    with pytest.raises(sdonnx.RequestError, match=r"has vectors \(1, 32\); text_encoder .* width 64"):
        sdonnx.load(sd1[1], embeddings=[wide])
    with pytest.raises(sdonnx.RequestError, match="the trigger word 'my-cat' is invalid or already used"):
        sdonnx.load(sd1[1], embeddings=[saved(tmp_path, "a1111", vectors(1))] * 2)
    with pytest.raises(sdonnx.RequestError, match="text_encoder of sdxl requires 1"):
        sdonnx.load(sdxl[1], embeddings=[saved(tmp_path, "a1111", vectors(1))])


@pytest.mark.parametrize(
    "data",
    [{}, {"a": torch.ones(3, 3, 3)}, {"a": torch.ones(1, 64), "b": torch.ones(1, 64)}, {"a": torch.ones(11_000, 1000)}],
)
def test_a_file_that_is_not_a_textual_inversion_is_refused(tmp_path, data):
    torch.save(data, tmp_path / "a.pt")
    with pytest.raises(sdonnx.RequestError, match=r"a\.pt"):
        read_embedding(tmp_path / "a.pt")


def test_from_the_command_line(sd1, tmp_path):
    path = saved(tmp_path, "a1111", vectors(2))

    def run(prompt, *arguments):
        return run_cli("run", prompt, "-m", sd1[1], "--steps", 2, "--seed", 3, *arguments, cwd=tmp_path)

    assert run("a my-cat", "--embedding", str(path), "-o", "a.png").returncode == 0
    assert run("a <x>", "--embedding", f"{path}:<x>", "-o", "b.png").returncode == 0
    images = [np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png")]
    assert np.array_equal(*images)
    failed = run("a cat", "--embedding", "nowhere.pt")
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
