"""The tokenizer makes transformers' ids, says what it cuts, and refuses damaged files in one line."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from sdonnx_export.packaging.clip_tokenizer import copy_tokenizer, write_clip_tokenizer
from sdonnx_runtime.errors import ExportError, PackageError, RequestError
from sdonnx_runtime.text.tokenizer import Tokenizer
from support.tokenizer_texts import lines
from transformers import CLIPTokenizer, CLIPTokenizerFast


def ids_of(reference, text: str) -> list[int]:
    """As diffusers calls its tokenizer."""
    return reference(text, padding="max_length", max_length=77, truncation=True).input_ids


def differing(tokenizer: Tokenizer, reference) -> list[str]:
    return [text for text in lines() if tokenizer.encode(text)[0] != tuple(ids_of(reference, text))]


@pytest.fixture(scope="module")
def sd1(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sd1")
    write_clip_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def sd1_json(sd1, tmp_path_factory) -> Path:
    """tokenizer.json alone, with its configuration."""
    directory = tmp_path_factory.mktemp("sd1_json")
    CLIPTokenizerFast.from_pretrained(sd1).save_pretrained(directory)
    for name in ("vocab.json", "merges.txt"):
        (directory / name).unlink(missing_ok=True)
    return directory


@pytest.fixture
def small(tmp_path) -> Path:
    """A vocabulary that lacks most bytes, without configuration."""
    symbols = ["!", "a", "b", "c", "d", "!</w>", "a</w>", "b</w>", "c</w>", "d</w>"]
    joined = ["ab", "abc</w>", "cd</w>", "abcd</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: place for place, token in enumerate(symbols + joined)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "#version: 0.2\na b\nab c</w>\nc d</w>\nab cd</w>\n"
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    return tmp_path


def test_written_files_are_those_of_stable_diffusion_v1_5(sd1):
    # Git's ids of the files in huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5, tokenizer/.
    published = {
        "merges.txt": "76e821f1b6f0a9709293c3b6b51ed90980b3166b",
        "special_tokens_map.json": "2c2130b544c0c5a72d5d00da071ba130a9800fb2",
        "tokenizer_config.json": "5ba7bf706515bc60487ad0e1816b4929b82542d6",
        "vocab.json": "469be27c5c010538f845f518c4f5e8574c78f7c8",
    }
    contents = {path.name: path.read_bytes() for path in sd1.iterdir()}
    blobs = {name: b"blob %d\0" % len(content) + content for name, content in contents.items()}
    assert {name: hashlib.sha1(blob).hexdigest() for name, blob in blobs.items()} == published


def test_published_ids(sd1):
    tokenizer = Tokenizer.open(sd1)
    encoded = tokenizer.encode("a photo of an astronaut riding a horse on mars")
    ids = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
    assert encoded == ((*ids, *[49407] * (77 - len(ids))), "")
    assert (tokenizer.length, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (77, 49406, 49407, 49407)


def test_lines_are_as_varied_as_they_claim(sd1):
    slow, fast = CLIPTokenizer.from_pretrained(sd1), CLIPTokenizerFast.from_pretrained(sd1)
    texts = lines()
    assert len(texts) == 1000
    assert sum(ids_of(slow, text) != ids_of(fast, text) for text in texts) > 300
    assert sum(len(slow.tokenize(text)) > 75 for text in texts) > 50


def test_ids_equal_cliptokenizer(sd1):
    assert differing(Tokenizer.open(sd1), CLIPTokenizer.from_pretrained(sd1)) == []


def test_plain_english_is_the_same_in_both_of_transformers_tokenizers(sd1):
    tokenizer, fast = Tokenizer.open(sd1), CLIPTokenizerFast.from_pretrained(sd1)
    for text in (
        "A PHOTO  of a cat's 12 whiskers!!",
        "(masterpiece:1.2), best quality, don't",
        "café <|endoftext|> x",
    ):
        assert tokenizer.encode(text)[0] == tuple(ids_of(fast, text))


def test_every_character_of_the_basic_plane_has_cliptokenizers_ids(sd1):
    tokenizer, slow = Tokenizer.open(sd1), CLIPTokenizer.from_pretrained(sd1)
    blocks = (range(0x3400), range(0xA000, 0xAC10), range(0xD7A0, 0xD800), range(0xF900, 0x10000))
    texts = [f"A{chr(code)}s '{chr(code)}1" for block in blocks for code in block]
    assert [text for text in texts if tokenizer.ids(text) != slow.convert_tokens_to_ids(slow.tokenize(text))] == []


def change_json(path: Path, part: tuple[str | int, ...], value: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    *parents, last = part
    inner = content
    for key in parents:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("transformers", [4, 5])
def test_tokenizer_json_is_exported_as_the_vocabulary_that_it_was_made_of(sd1, sd1_json, tmp_path, transformers):
    shutil.copytree(sd1_json, tmp_path / "saved")
    if transformers == 5:
        part = ("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex")
        words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        change_json(tmp_path / "saved" / "tokenizer.json", part, words)
    copy_tokenizer(tmp_path / "saved", tmp_path / "package")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "package" / name).read_bytes() == (sd1 / name).read_bytes()
    assert differing(Tokenizer.open(tmp_path / "package"), CLIPTokenizer.from_pretrained(tmp_path / "package")) == []


def test_merges_may_be_pairs_or_strings(sd1, sd1_json, tmp_path):
    content = json.loads((sd1_json / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    other = [merge.split(" ") if isinstance(merge, str) else " ".join(merge) for merge in content]
    shutil.copytree(sd1_json, tmp_path / "saved")
    change_json(tmp_path / "saved" / "tokenizer.json", ("model", "merges"), other)
    copy_tokenizer(tmp_path / "saved", tmp_path / "package")
    assert (tmp_path / "package" / "merges.txt").read_bytes() == (sd1 / "merges.txt").read_bytes()


def test_vocab_json_with_merges_goes_before_tokenizer_json(sd1, small, tmp_path):
    CLIPTokenizerFast.from_pretrained(small).backend_tokenizer.save(str(small / "tokenizer.json"))
    for path in sd1.iterdir():
        shutil.copyfile(path, small / path.name)
    copy_tokenizer(small, tmp_path / "package")
    assert (tmp_path / "package" / "vocab.json").read_bytes() == (sd1 / "vocab.json").read_bytes()
    assert Tokenizer.open(tmp_path / "package").ids("a cat") == Tokenizer.open(sd1).ids("a cat")


def test_tokenizer_json_alone_is_read_as_by_cliptokenizerfast(sd1_json):
    assert differing(Tokenizer.open(sd1_json), CLIPTokenizerFast.from_pretrained(sd1_json)) == []


def test_small_vocabulary_without_configuration(small):
    assert differing(Tokenizer.open(small, length=77), CLIPTokenizer.from_pretrained(small)) == []


def test_small_tokenizer_json(small, tmp_path):
    fast = CLIPTokenizerFast.from_pretrained(small)
    (tmp_path / "json").mkdir()
    fast.backend_tokenizer.save(str(tmp_path / "json" / "tokenizer.json"))
    copy_tokenizer(tmp_path / "json", tmp_path / "package")
    assert differing(Tokenizer.open(tmp_path / "package", length=77), CLIPTokenizer.from_pretrained(small)) == []


def test_pad_token_of_stable_diffusion_2(sd1, tmp_path):
    write_clip_tokenizer(tmp_path)
    special = json.loads((tmp_path / "special_tokens_map.json").read_text(encoding="utf-8"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": "!"}), encoding="utf-8")
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.pad == 0
    assert differing(tokenizer, CLIPTokenizer.from_pretrained(tmp_path)) == []
    assert tokenizer.ids("wow!") != Tokenizer.open(sd1).ids("wow!")


def test_pad_token_as_transformers_saves_it_now(tmp_path):
    write_clip_tokenizer(tmp_path / "old")
    slow = CLIPTokenizer.from_pretrained(tmp_path / "old", pad_token="!")
    slow.save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "special_tokens_map.json").write_text('{"pad_token": "a"}', encoding="utf-8")
    reference = CLIPTokenizer.from_pretrained(tmp_path / "new")
    assert (Tokenizer.open(tmp_path / "new").pad, reference.pad_token_id) == (0, 0)


def test_the_pad_token_comes_from_the_configuration_of_tokenizer_json(sd1_json, tmp_path):
    for path in sd1_json.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "!"}), encoding="utf-8")
    copy_tokenizer(tmp_path, tmp_path / "package")
    tokenizer, fast = Tokenizer.open(tmp_path / "package"), CLIPTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.encode("wow! a!b")[0] == tuple(ids_of(fast, "wow! a!b"))
    assert tokenizer.pad == 0


@pytest.mark.parametrize(
    "stated, limit, length", [(77, None, 77), (8192, 77, 77), (77, 512, 77), (None, 16, 16), (10**30, 9, 9)]
)
def test_length_is_the_smaller_of_the_two_known(small, stated, limit, length):
    config = {} if stated is None else {"model_max_length": stated}
    (small / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = Tokenizer.open(small, length=limit)
    assert tokenizer.length == length
    assert len(tokenizer.encode("ab " * 100)[0]) == len(tokenizer.encode("")[0]) == length


FITS = "red, " * 37
"""74 of the 75 tokens that fit."""


@pytest.mark.parametrize(
    "text, truncated",
    [
        (FITS + "Mars", ""),
        (FITS + "Mars on  Ice, Café", "on  Ice, Café"),
        (FITS + "ok\nCAFE\u0301s", "CAFE\u0301s"),
        (FITS + "extraterrestrialization, END", "extraterrestrialization, END"),
        (FITS + "so,THIS", ",THIS"),
        (FITS + "so<|endoftext|>THIS", "<|endoftext|>THIS"),
        (FITS + "<|endoftext|> THIS", "THIS"),
        (
            "Cafe\u0301, \tİ\u1100\u1161\u11a8 " + FITS[: 34 * 5] + "on Cafe\u0301\u0323 İ",
            "Cafe\u0301\u0323 İ",
        ),
    ],
)
def test_truncated_is_the_end_of_the_text_as_it_was_written(sd1, text, truncated):
    tokenizer = Tokenizer.open(sd1)
    assert tokenizer.encode(text)[1] == truncated
    assert tokenizer.ids(text) == tokenizer.ids(text.removesuffix(truncated)) + tokenizer.ids(truncated)


def test_truncated_leaves_what_fits(sd1):
    tokenizer = Tokenizer.open(sd1)
    for line in lines():
        # The lower case of Σ depends on what follows, that of İ is two characters of different words.
        text = line.replace("Σ", "s").replace("İ", "i")
        ids, cut = tokenizer.ids(text), tokenizer.encode(text)[1]
        kept = tokenizer.ids(text.removesuffix(cut))
        assert bool(cut) == (len(ids) > 75)
        assert kept == ids[: min(len(kept), 75)]


def test_half_a_surrogate_pair_is_a_request_error(sd1):
    with pytest.raises(RequestError, match=r"character 3 is half of a surrogate pair; .*; "):
        Tokenizer.open(sd1).encode("a \ud83d cat")


def broken(directory: Path, name: str, content: str | bytes | None) -> str:
    """The error that opening gives once the file has this content or, for None, is gone."""
    path = directory / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PackageError) as caught:
        Tokenizer.open(directory, length=77)
    message = str(caught.value)
    assert str(directory) in message
    assert message.endswith("; expected a CLIP tokenizer; download it or run 'sdonnx export' again")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name, content, fact",
    [
        ("vocab.json", None, "vocab.json is missing"),
        ("merges.txt", None, "merges.txt is missing"),
        ("vocab.json", '{"a": 0, "b"', "is not JSON"),
        ("vocab.json", "[" * 200_000, "is not JSON"),
        ("vocab.json", " " * 10_000_000 + "{}", "has more than 10000000 bytes"),
        ("vocab.json", b"\xff\xfe", "is not UTF-8"),
        ("vocab.json", "[1, 2]", "is not a JSON object"),
        ("vocab.json", '{"a": "zero"}', "gives the token 'a' the id \"zero\""),
        ("vocab.json", '{"a": -1}', "the id -1"),
        ("vocab.json", '{"a": 4294967296}', "the id 4294967296"),
        ("vocab.json", "{}", "joins 'a' and 'b'"),
        ("merges.txt", "#version: 0.2\na b\na\n", "has 1 symbols in line 3"),
        ("merges.txt", "#version: 0.2\na b c\n", "has 3 symbols in line 2"),
        ("merges.txt", "#version: 0.2\na x\n", "joins 'a' and 'x'"),
        ("merges.txt", b"#version: 0.2\na \xff\n", "is not UTF-8"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", '{"model_max_length": "77"}', 'is for "77" tokens'),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "has [] instead of an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<sks>"}}}', 'the id "x"'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9": {"content": "<sks>", "lstrip": 1}}}', '"lstrip": 1'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9": 9}}', "has the added token 9"),
        ("added_tokens.json", '{"<sks>": "9"}', "gives the token '<sks>' the id \"9\""),
        ("added_tokens.json", '{"": 9}', 'has the added token ""'),
        ("added_tokens.json", '{"\\ud800": 9}', 'has the added token "\\ud800"'),
        ("tokenizer.json", '{"added_tokens": [9]}', "has 9 instead of an object"),
        ("tokenizer_config.json", '{"model_max_length": 0}', "is for 0 tokens"),
        ("special_tokens_map.json", '{"pad_token": null}', "has the pad_token null"),
        ("special_tokens_map.json", '{"bos_token": {"lstrip": true}}', "has the bos_token"),
    ],
)
def test_damaged_files(small, name, content, fact):
    assert fact in broken(small, name, content)


def test_no_length_at_all(small):
    with pytest.raises(PackageError, match="no model_max_length"):
        Tokenizer.open(small)


OTHER = "tokenizer.json is not CLIP's byte-pair encoding; only"


@pytest.mark.parametrize(
    "part, value, fact",
    [
        (("model",), None, OTHER),
        (("model", "merges"), ["a b c d"], 'the merge "a b c d" instead of'),
        (("model", "merges"), [["a", "x"]], "merges and a vocabulary that differ"),
        (("model", "merges"), [["a", "b"], 1], "has 1 instead of a list"),
        (("model", "vocab"), {"a": 0}, "merges and a vocabulary that differ"),
        (("model", "vocab"), [], "has [] instead of an object"),
        (("model", "vocab", "a"), "0", "gives the token 'a' the id \"0\""),
        (("model", "continuing_subword_prefix"), "##", OTHER),
        (("model", "end_of_word_suffix"), "", OTHER),
        (("model", "dropout"), 0.5, OTHER),
        (("normalizer", "normalizers", 1, "pattern", "Regex"), "", OTHER),
        (("normalizer",), None, OTHER),
        (("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), "(((", OTHER),
        (("pre_tokenizer", "pretokenizers"), [], OTHER),
        (("added_tokens",), [{"id": 1}], "has the added token"),
        (("added_tokens",), [{"id": None, "content": "<sks>"}], "gives the token '<sks>' the id null"),
    ],
)
def test_tokenizer_json_that_is_not_clips_is_refused(small, tmp_path, part, value, fact):
    (tmp_path / "json").mkdir()
    CLIPTokenizerFast.from_pretrained(small).backend_tokenizer.save(str(tmp_path / "json" / "tokenizer.json"))
    change_json(tmp_path / "json" / "tokenizer.json", part, value)
    with pytest.raises(ExportError) as caught:
        copy_tokenizer(tmp_path / "json", tmp_path / "package")
    assert fact in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_files_or_with_half_of_one_is_refused(sd1_json, tmp_path):
    with pytest.raises(ExportError, match="no vocab.json with merges.txt and no tokenizer.json"):
        copy_tokenizer(tmp_path, tmp_path / "package")
    content = (sd1_json / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(ExportError, match="is not JSON"):
        copy_tokenizer(tmp_path, tmp_path / "package")
