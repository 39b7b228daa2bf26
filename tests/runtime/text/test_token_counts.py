"""Token counts, against transformers' tokenizers."""

import json

import pytest
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.text.token_counts import count_tokens, parse_first_step
from support.cli import run_cli

import sdonnx

PROMPTS = ["a cat", "", "a (red:1.3) cat <lora:x:1>, 漢字 don't", "a wide green field, " * 30]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_counts_are_those_of_transformers(opened, prompt):
    pipe, ours = opened("sdxl")
    schedule, texts = parse_first_step(prompt, "a1111")
    plain = "".join(each.text for section in schedule.sections[texts[0]] for each in section)
    for encoder, name in zip(ours.package.manifest.text_encoders, ("tokenizer", "tokenizer_2"), strict=True):
        found = count_tokens(ours.package, encoder, schedule, texts)
        assert found.component == encoder.component
        ids = getattr(pipe, name)(plain, add_special_tokens=False)["input_ids"]
        assert found.count == sum(found.chunks) == len(ids)
        assert found.length == getattr(pipe, name).model_max_length - 2
        assert max(found.chunks) <= found.length
        assert len(found.texts) == len(found.chunks)
        for text, count in zip(found.texts, found.chunks, strict=True):
            assert len(getattr(pipe, name)(text, add_special_tokens=False)["input_ids"]) == count


def test_the_command(tmp_path):
    (tmp_path / "colour.txt").write_text("red\n")
    prompt = "a __colour__ cat AND a {dog}"
    made = run_cli("tokens", prompt, "--wildcards", tmp_path, "--seed", 3, "--json")
    report = json.loads(made.stdout)
    assert (report["prompt"], report["template"], report["seed"]) == ("a red cat AND a {dog}", prompt, 3)
    (encoder,) = report["encoders"]
    assert encoder["texts"] == ["a red cat", "a {dog}"]
    negative = json.loads(run_cli("tokens", prompt, "--negative", "--wildcards", tmp_path, "--json").stdout)
    assert negative["encoders"][0]["texts"] == ["a red cat AND a {dog}"]
    assert negative["encoders"][0]["count"] == encoder["count"] + 1
    shown = run_cli("tokens", "cat " * 40).stdout
    assert "40 tokens in 2 chunks of 30" in shown
    assert shown.count("cat") == 40


def test_words_that_the_vocabulary_lacks(package):
    opened = Package.open(package)
    schedule, texts = parse_first_step("a \U0001f680", "a1111")
    found = count_tokens(opened, opened.manifest.text_encoders[0], schedule, texts)
    assert found.chunks == (found.count,)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["a __x__"], "--wildcards"),
        (["a", "--wildcards", "/nowhere"], "not a directory"),
        (["a", "--prompt-syntax", "other"], "choose a1111, plain"),
        (["a (b:2000)"], "weight"),
        (["a", "-m", "/nowhere/x"], "no model"),
    ],
)
def test_what_the_command_refuses(arguments, error):
    made = run_cli("tokens", *arguments)
    assert made.returncode != 0
    assert error in made.stderr
    assert sdonnx.RequestError.__name__ not in made.stderr
