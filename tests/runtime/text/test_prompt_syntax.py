"""The language of prompts: what AUTOMATIC1111 publishes as its examples, chunks of tokens, and whatever is typed."""

import random
import time
from dataclasses import replace

import pytest
from sdonnx_runtime.text.chunks import chunk_texts, pad_chunk, split_into_chunks
from sdonnx_runtime.text.prompt_schedule import StepPrompts, step_prompts
from sdonnx_runtime.text.prompt_syntax import Fragment, LoraTag, parse_prompt, sections
from sdonnx_runtime.text.tokenizer import Tokenizer
from support.families import tokenizer as published_tokenizer

import sdonnx

WEIGHTS = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    "\\(literal\\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
}
"""The doctests of AUTOMATIC1111's parse_prompt_attention."""

SCHEDULES = {
    "test": [[10, "test"]],
    "a [b:3]": [[3, "a "], [10, "a b"]],
    "a [b: 3]": [[3, "a "], [10, "a b"]],
    "a [[[b]]:2]": [[2, "a "], [10, "a [[b]]"]],
    "[(a:2):3]": [[3, ""], [10, "(a:2)"]],
    "a [b : c : 1] d": [[1, "a b  d"], [10, "a  c  d"]],
    "a[b:[c:d:2]:1]e": [[1, "abe"], [2, "ace"], [10, "ade"]],
    "a [unbalanced": [[10, "a [unbalanced"]],
    "a [b:.5] c": [[5, "a  c"], [10, "a b c"]],
    "a [{b|d{:.5] c": [[5, "a  c"], [10, "a {b|d{ c"]],
    "((a][:b:c [d:3]": [[3, "((a][:b:c "], [10, "((a][:b:c d"]],
    "[a|(b:1.1)]": [[step, "(b:1.1)" if step % 2 == 0 else "a"] for step in range(1, 11)],
    "[fe|]male": [[step, "male" if step % 2 == 0 else "female"] for step in range(1, 11)],
    "[fe|||]male": [[step, "female" if step % 4 == 1 else "male"] for step in range(1, 11)],
}
"""The doctests of its get_learned_conditioning_prompt_schedules, with 10 steps: the last step of each text."""

SECOND_PASS = {"a [b:.5] c": [[10, "a b c"]], "a [b:1.5] c": [[5, "a  c"], [10, "a b c"]]}
"""Those with 10 steps after a first pass of 10."""


def texts(prompt, steps=10, done=None, **options):
    """The text of each step."""
    prompts = step_prompts(parse_prompt(prompt, **options), parse_prompt("", composed=False), steps, done)
    return [rows.conditional for rows in prompts]


def spread(ends):
    """A text for each step, of the last step of each."""
    begins = [0, *(end for end, _ in ends[:-1])]
    return [(text,) for begin, (end, text) in zip(begins, ends, strict=True) for _ in range(end - begin)]


def words(prompt):
    return [[(each.text, each.weight) for each in section] for section in sections(prompt)]


@pytest.mark.parametrize("prompt", WEIGHTS)
def test_weights_are_those_of_the_published_examples(prompt):
    assert words(prompt) == [WEIGHTS[prompt]]


@pytest.mark.parametrize("prompt", SCHEDULES)
def test_schedules_are_those_of_the_published_examples(prompt):
    assert texts(prompt) == spread(SCHEDULES[prompt])


@pytest.mark.parametrize("prompt", SECOND_PASS)
def test_a_second_pass_goes_on_counting(prompt):
    assert texts(prompt, done=10) == spread(SECOND_PASS[prompt])


def test_numbers_of_steps_count_both_passes():
    assert texts("[a:b:3]", 4, done=10) == [("b",)] * 4
    assert texts("[a:b:12]", 4) == [("a",)] * 4
    assert texts("[a:b:12]", 4, done=10) == [("a",)] * 2 + [("b",)] * 2
    assert texts("[a::2]!", 4) == [("a!",)] * 2 + [("!",)] * 2


def test_break_divides_a_text_and_keeps_weights():
    assert words("a cat  BREAK (a dog BREAK two:1.2)") == [[("a cat", 1.0)], [("a dog", 1.2)], [("two", 1.2)]]
    assert words("BREAKING a BREAK") == [[("BREAKING a", 1.0)], []]


def test_a_backslash_is_of_the_syntax():
    assert words("\\o/ \\\\(b\\:1.2)\\") == [[("o/ \\", 1.0), ("b", 1.2)]]


def test_and_composes_parts_with_weights():
    prompt = parse_prompt("a cat AND a [dog:fox:2] :1.2 AND (sky:0.5) : -.5")
    assert [part.weight for part in prompt.parts] == [1.0, 1.2, -0.5]
    rows = [("a cat", "a dog", "(sky:0.5)")] * 2 + [("a cat", "a fox", "(sky:0.5)")] * 2
    assert texts("a cat AND a [dog:fox:2] :1.2 AND (sky:0.5) : -.5", 4) == rows
    assert texts("ANDROMEDA, a ratio of 16:9", 1) == [("ANDROMEDA, a ratio of 16:9",)]
    assert texts("a AND b", 1, composed=False) == [("a AND b",)]


def test_step_prompts_have_negative_and_conditional_texts():
    prompts = step_prompts(parse_prompt("a AND b"), parse_prompt("[x:y:1] AND z", composed=False), 2)
    assert prompts == (
        StepPrompts(negative="x AND z", conditional=("a", "b")),
        StepPrompts(negative="y AND z", conditional=("a", "b")),
    )


@pytest.mark.parametrize(
    ("tag", "name", "text_encoder", "unet"),
    [
        ("<lora:fur:0.8>", "fur", 0.8, 0.8),
        ("<lora:some hat>", "some hat", 1.0, 1.0),
        ("<lyco:fur:0.8>", "fur", 0.8, 0.8),
        ("<lora:fur:1:0.5>", "fur", 1.0, 0.5),
        ("<lora:fur:te=0:unet=1>", "fur", 0.0, 1.0),
        ("<lora:fur:te=0.5>", "fur", 0.5, 0.5),
        ("<lora:fur:unet=0.5>", "fur", 1.0, 0.5),
        ("<lora:te=0.5:fur:0.9:0.7>", "fur", 0.5, 0.7),
        ("<lora:fur:-1e-1>", "fur", -0.1, -0.1),
    ],
)
def test_lora_tags_are_taken_out(tag, name, text_encoder, unet):
    """With the weights that AUTOMATIC1111's extra_networks_lora.py gives them."""
    prompt = parse_prompt(f"a cat {tag}in a hat<b> {tag[:-1]}")
    assert prompt.loras == (LoraTag(name=name, text_encoder_weight=text_encoder, unet_weight=unet),)
    assert prompt.parts[0].text_at_step(1, 1, None) == f"a cat in a hat<b> {tag[:-1]}"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat AND ", "AND requires a prompt on both sides"),
        ("AND a cat", "AND requires a prompt on both sides"),
        ("a AND :1.2", "AND requires a prompt on both sides"),
        ("a AND b:1e9", "the weight 1e\\+09; give one from -1000 to 1000"),
        ("<lora::1>", "expected a name and a weight, such as <lora:name:0.8>"),
        ("<lora:a:high>", "'<lora:a:high>' is not a LoRA tag"),
        ("<lora:a:1:1:4>", "'<lora:a:1:1:4>' is not a LoRA tag"),
        ("<lora:a:dyn=4>", "'<lora:a:dyn=4>' is not a LoRA tag"),
        ("<lora:te=1>", "'<lora:te=1>' is not a LoRA tag"),
        ("a <LoRA:a:1>", "'<LoRA:a:1>' is not supported; tags in prompts are LoRAs"),
        ("a <x:y\nz>", "'<x:y z>' is not supported; tags in prompts are LoRAs"),
        ("a <hypernet:a:1>", "'<hypernet:a:1>' is not supported; tags in prompts are LoRAs"),
        ("a < lora:a:1>", "'< lora:a:1>' is not a LoRA tag; write it as <lora:name:0.8>"),
        ("a <Hypernet :a>", "'<Hypernet :a>' is not a LoRA tag; write it as"),
        ("(a:2000)", "the weight 2000; give one from -1000 to 1000"),
        ("(a:" + "9" * 400 + ")", "the weight inf"),
        ("(" * 100 + "a", "the weight 13780.6"),
    ],
)
def test_a_prompt_that_means_nothing(prompt, message):
    with pytest.raises(sdonnx.RequestError, match=message):
        sections(parse_prompt(prompt).parts[0].text_at_step(1, 1, None))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    published_tokenizer().save_pretrained(directory)
    return Tokenizer.open(directory, length=77)


def spelled(tokenizer, prompt):
    """The ids and weights of each chunk, without start, end and padding."""
    found = []
    for chunk in split_into_chunks(tokenizer, sections(prompt)):
        assert len(chunk.ids) == len(chunk.weights) == 77
        size = chunk.ids.index(tokenizer.eos)
        assert chunk.ids[0] == tokenizer.bos
        assert set(chunk.ids[size + 1 :]) <= {tokenizer.pad}
        assert set(chunk.weights[size:]) == {1.0}
        found.append((list(chunk.ids[1:size]), list(chunk.weights[1:size])))
    return found


def test_a_chunk_has_75_tokens(tokenizer):
    (cat,) = tokenizer.ids("cat")
    for count, sizes in ((0, [0]), (1, [1]), (75, [75]), (76, [75, 1]), (151, [75, 75, 1])):
        assert spelled(tokenizer, "cat " * count) == [([cat] * size, [1.0] * size) for size in sizes]
    assert split_into_chunks(tokenizer, sections("")) == [pad_chunk(tokenizer)]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "cat",
        "a (cat:1.2), [dog] \\(in a box\\) " * 20,
        "  Ünïcode, “quotes” and\n日本 " * 9,
        "cat BREAK dog, " + "a bird " * 60 + "BREAK",
        "cat, " * 60,
    ],
)
def test_the_texts_of_chunks_have_their_tokens(tokenizer, prompt):
    parts = chunk_texts(tokenizer, sections(prompt))
    assert [tokenizer.ids(part) for part in parts] == [ids for ids, _ in spelled(tokenizer, prompt)]


def test_the_texts_of_chunks_are_as_they_were_written(tokenizer):
    prompt = "A Cat, " * 20 + "(NO:1.3)  Dog, " * 12
    assert " ".join(chunk_texts(tokenizer, sections(prompt))) == ("A Cat, " * 20 + "NO  Dog, " * 12).strip()


def test_a_word_in_two_chunks_is_in_the_text_of_the_later(tokenizer):
    word = "q" * 30
    assert len(tokenizer.ids(word)) > 5
    assert chunk_texts(tokenizer, sections("cat " * 73 + word)) == [("cat " * 73).strip(), word]


@pytest.mark.parametrize(
    ("before", "after", "sizes"),
    [
        (54, 21, [75, 1]),  # the comma is 21 tokens from the end
        (55, 25, [56, 25]),
        (74, 6, [75, 6]),  # the comma is the chunk's last token
        (75, 5, [75, 6]),  # the comma is the next chunk's first
        (10, 80, [75, 16]),
    ],
)
def test_a_chunk_ends_at_a_comma_that_is_near(tokenizer, before, after, sizes):
    """At AUTOMATIC1111's comma_padding_backtrack of 20."""
    prompt = "cat " * before + "," + " cat" * after
    chunks = spelled(tokenizer, prompt)
    assert [len(ids) for ids, _ in chunks] == sizes
    assert [token for ids, _ in chunks for token in ids] == tokenizer.ids(prompt)


def test_weights_go_with_their_tokens_into_the_next_chunk(tokenizer):
    chunks = spelled(tokenizer, "cat " * 60 + ", (dog " + "dog " * 19 + ":1.5)")
    assert [weights for _, weights in chunks] == [[1.0] * 61, [1.5] * 20]


def test_a_textual_inversion_is_not_divided(tokenizer):
    """As in AUTOMATIC1111, where it begins another chunk."""
    ids = tuple(range(2**31, 2**31 + 4))
    with_placeholder = replace(tokenizer, placeholders={"teal": ids})
    for before, sizes in ((71, [75]), (72, [72, 4])):
        chunks = spelled(with_placeholder, "cat " * before + "(teal:1.5)")
        assert [len(found) for found, _ in chunks] == sizes
        assert tuple(chunks[-1][0][-4:]) == ids
        assert chunks[-1][1][-4:] == [1.5] * 4


def test_fewer_words_never_take_more_chunks(tokenizer):
    """What compel's weights count on."""
    draw = random.Random(2)
    for _ in range(300):
        words = ["cat" if draw.random() < 0.96 else "," for _ in range(draw.randrange(1, 400))]
        first, last = sorted(draw.choices(range(len(words) + 1), k=2))
        whole, rest = (len(spelled(tokenizer, " ".join(each))) for each in (words, words[:first] + words[last:]))
        assert rest <= whole


def test_break_fills_a_chunk(tokenizer):
    cat, dog = tokenizer.ids("cat")[0], tokenizer.ids("dog")[0]
    assert spelled(tokenizer, "cat BREAK (dog)") == [([cat], [1.0]), ([dog], [1.1])]
    assert spelled(tokenizer, "cat BREAK") == [([cat], [1.0])]
    assert [ids for ids, _ in spelled(tokenizer, "BREAK cat BREAK BREAK dog")] == [[], [cat], [], [dog]]


ALPHABET = [
    "(",
    ")",
    "[",
    "]",
    ":",
    "|",
    "\\",
    " ",
    "a",
    "1",
    ".5",
    "-",
    "AND",
    " AND ",
    "BREAK",
    "<lora:",
    ">",
    "\n",
    "é",
]


def test_whatever_is_typed_is_read_or_refused():
    draw = random.Random(0)
    read = refused = 0
    for _ in range(4000):
        prompt = "".join(draw.choices(ALPHABET, k=draw.randrange(25)))
        try:
            prompts = step_prompts(parse_prompt(prompt), parse_prompt(prompt, composed=False), 5)
            for rows in prompts:
                for text in (rows.negative, *rows.conditional):
                    assert all(isinstance(each, Fragment) for section in sections(text) for each in section)
            read += 1
        except sdonnx.RequestError:
            refused += 1
    assert read > 1000
    assert refused > 100


def test_text_without_the_syntax_stays_as_it_is():
    draw = random.Random(1)
    for _ in range(500):
        prompt = "".join(draw.choices([*"ab,.:|;-+>{}'\" \n\t0é苹", "and", "break", "AN", "< "], k=draw.randrange(40)))
        assert texts(prompt, 3) == [(prompt,)] * 3
        assert words(prompt) == [[(prompt, 1.0)] if prompt else []]


@pytest.mark.parametrize("prompt", ["a (cat:1.3) [b:c:2] AND \\( BREAK <lora:x:1>", "[a|b]", ""])
def test_plain_prompts_are_text(prompt):
    parsed = parse_prompt(prompt, "plain")
    assert parsed.loras == ()
    assert [part.text_at_step(2, 5, None) for part in parsed.parts] == [prompt]
    assert sections(prompt, "plain") == ((Fragment(text=prompt, weight=1.0),),)


DEEP = 100_000


@pytest.mark.parametrize(
    "prompt",
    [
        "(" * DEEP,
        "[" * DEEP + "a:b:3" + "]" * DEEP,
        "[a:" * DEEP + ":3]" * DEEP,
        "[a|" * DEEP + "]" * DEEP,
        "(a" * DEEP,
        "[" * DEEP + ")" * DEEP,
        ":" * DEEP,
        "a" + " " * DEEP + "b",
        "a" + " AND a" * DEEP,
        "a BREAK " * DEEP,
        "<lora:" * DEEP,
        ":" + "1" * DEEP + "x",
        "\\" * DEEP,
    ],
)
def test_long_and_deep_prompts_take_time_in_proportion(prompt):
    begun = time.process_time()
    try:
        for rows in dict.fromkeys(step_prompts(parse_prompt(prompt), parse_prompt(""), 2)):
            for text in dict.fromkeys(rows.conditional):
                sections(text)
    except sdonnx.RequestError as error:
        assert "the weight" in str(error)
    assert time.process_time() - begun < 20, "squares of 100,000 are minutes"
