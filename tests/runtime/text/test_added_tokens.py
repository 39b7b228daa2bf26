"""Tokens that a training added to a saved tokenizer have transformers' ids, and diffusers' images."""

import json
import random
import shutil

import numpy as np
import pytest
from sdonnx_export.export import export
from sdonnx_export.packaging.clip_tokenizer import write_clip_tokenizer
from sdonnx_runtime.errors import ExportError, PackageError
from sdonnx_runtime.text.tokenizer import Tokenizer
from support import families
from support.reference import SEED, assert_equal, reference
from support.tokenizer_texts import lines
from transformers import AddedToken, CLIPTokenizer, CLIPTokenizerFast

import sdonnx

CLASSES = {"slow": CLIPTokenizer, "fast": CLIPTokenizerFast}

TOKENS = [
    "<my cat>",
    AddedToken("<toy>"),
    AddedToken("sks", single_word=True),
    AddedToken("sk"),
    AddedToken("[V]", lstrip=True, rstrip=True),
    AddedToken("Zwx", normalized=False),
    AddedToken("qux", single_word=True, rstrip=True),
    AddedToken("<Style>", special=True),
    AddedToken("Été"),
]
PIECES = [
    *map(str, TOKENS), "<TOY>", "SKS", "ZWX", "zwx", "<style>", "Skater", "asksb", "ÉTÉ", "<more>", "<|endoftext|>",
    "a photo of", " ", "\n", "\t", "x", ",", "!",
]  # fmt: skip


def texts():
    """Added tokens in every neighbourhood, and within texts of all scripts."""
    chance = random.Random(1)
    glue = ("", "", " ", " ", "\n")
    for _ in range(500):
        yield "".join(chance.choice(PIECES) + chance.choice(glue) for _ in range(chance.randint(1, 9)))
    for line in lines()[10:130]:
        yield line + chance.choice(PIECES) + line[:5] + " " + chance.choice(PIECES)


def saved(kind, directory):
    """A tokenizer with added tokens, as its class saves it."""
    write_clip_tokenizer(directory / "plain" / "tokenizer")
    tokenizer = CLASSES[kind].from_pretrained(directory / "plain" / "tokenizer")
    tokenizer.add_tokens(TOKENS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    tokenizer.save_pretrained(directory / kind / "tokenizer")
    return directory / kind / "tokenizer"


def without(directory, *names):
    for name in names:
        (directory / name).unlink()


def forget_decoder(directory):
    """As before transformers 4.34: added_tokens.json and special_tokens_map.json alone number the added tokens."""
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["added_tokens_decoder"]
    path.write_text(json.dumps(config))


def only_json(directory):
    """As transformers 5 saves it."""
    without(directory, "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")


LAYOUTS = {
    "slow": ("slow", "slow", lambda _: None),
    "slow of old": ("slow", "slow", forget_decoder),
    "slow files opened as fast": ("slow", "fast", lambda _: None),
    "fast": ("fast", "fast", lambda _: None),
    "fast files opened as slow": ("fast", "slow", lambda _: None),
    "fast of old opened as slow": ("fast", "slow", forget_decoder),
    "tokenizer.json": ("fast", "fast", only_json),
}
"""Which class saved the files, which diffusers opens them with, and what they lack."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizers")
    return {kind: saved(kind, directory) for kind in CLASSES}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_equal_those_of_transformers(layout, files, tmp_path):
    made, opened, change = LAYOUTS[layout]
    directory = shutil.copytree(files[made], tmp_path / "tokenizer")
    change(directory)
    name = CLASSES[opened].__name__ if layout != "tokenizer.json" else "CLIPTokenizer"
    (tmp_path / "model_index.json").write_text(json.dumps({"tokenizer": ["transformers", name]}))
    ours, theirs = Tokenizer.open(directory), CLASSES[opened].from_pretrained(directory)
    assert [text for text in texts() if ours.ids(text) != theirs(text, add_special_tokens=False).input_ids] == []
    assert (ours.bos, ours.eos, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.size == len(theirs)


@pytest.mark.parametrize("special", [{"pad_token": "<pad>"}, {"bos_token": "<s>", "eos_token": "</s>"}])
@pytest.mark.parametrize("old", [False, True])
def test_special_tokens_that_the_vocabulary_lacks(special, old, tmp_path):
    write_clip_tokenizer(tmp_path)
    if old:
        path = tmp_path / "special_tokens_map.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | special))
    else:
        CLIPTokenizer.from_pretrained(tmp_path, **special).save_pretrained(tmp_path)
    ours, theirs = Tokenizer.open(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    text = f"a cat{next(iter(special.values()))} on a hill"
    assert ours.encode(text)[0] == tuple(theirs(text, padding="max_length", max_length=77).input_ids)


def trained(make, tokens, *, length=77, spare=0):
    """A pipeline whose tokenizers have added tokens and whose text encoders have embeddings for them, and to spare."""
    pipe = make()
    for suffix in ("", "_2"):
        tokenizer, encoder = (getattr(pipe, part + suffix, None) for part in ("tokenizer", "text_encoder"))
        if tokenizer is not None:
            tokenizer.model_max_length = length
            tokenizer.add_tokens(tokens)
            encoder.resize_token_embeddings(len(tokenizer) + spare, mean_resizing=False)
            table = encoder.get_input_embeddings().weight.data
            table[49408:] = 3 * table[1000 : 1000 + len(tokens) + spare]
    pipe.set_progress_bar_config(disable=True)
    return pipe


SETTINGS = {"num_inference_steps": 2, "guidance_scale": 4.0, "width": 64, "height": 64}
MAKERS = {
    "sd1": (families.sd1, {}),
    "40 tokens": (families.sd1, {"length": 40, "spare": 61}),
    "sdxl": (families.sdxl, {}),
}


@pytest.mark.parametrize("family", MAKERS)
def test_images_equal_those_of_diffusers(family, tmp_path):
    """``<toy>`` has two vectors, of which diffusers makes ``<toy> <toy>_1``. Optimum's packages have the same files."""
    make, options = MAKERS[family]
    pipe = trained(make, ["<toy>", "<toy>_1", "sks"], **options)
    pipe.save_pretrained(tmp_path / "diffusers")
    package = export(str(tmp_path / "diffusers"), tmp_path / "package")
    prompt, negative = "a photograph of a <toy>, sks dog " + "on a hill, " * 8, "sks"
    wanted = reference(pipe, prompt=prompt, negative_prompt=negative, **SETTINGS)
    request = {"negative_prompt": negative, "prompt_syntax": "plain", "seed": SEED, **SETTINGS}
    assert_equal(sdonnx.load(package).generate(prompt, **request), wanted)
    plain = sdonnx.load(package).generate("a photograph of a dog", **request)
    assert np.abs(plain.latents - wanted[0]).max() > 0.01
    if family == "sd1":
        again = export(str(package), tmp_path / "again")
        (again / "sdonnx.json").unlink()
        with sdonnx.load(again) as optimum:
            assert optimum.package.is_optimum
            assert_equal(optimum.generate(prompt, **request), wanted)


def test_tokens_without_embeddings_are_refused(checkpoint, package, files, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "tiny")
    shutil.copytree(files["slow"], source / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(ExportError, match=r"the tokenizer of tiny has ids up to 494\d\d, its text_encoder 49408 emb"):
        export(str(source), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    other = shutil.copytree(package, tmp_path / "package")
    shutil.copytree(files["slow"], other / "tokenizer", dirs_exist_ok=True)
    with sdonnx.load(other) as pipe, pytest.raises(PackageError, match=r"up to 494\d\d, text_encoder has 49408 emb"):
        pipe.generate("a cat", **SETTINGS)
