"""Prompt templates: sd-dynamic-prompts' documented examples, draws computed by sha256sum, and random texts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdonnx_runtime.text.prompt_schedule import schedule_prompts
from sdonnx_runtime.text.templates import Options, draw, is_template, parse_line, parse_template

import sdonnx

LINES = {"colour": ["red", "blue"], "flavour": ["chocolate", "vanilla", "strawberry"], "bar": ["a|b"], "end": ["__"]}


class Files:
    """Wildcards without files."""

    def options(self, name):
        lines = LINES.get(name, [name])
        return Options(options=tuple(map(parse_line, lines)))


def drawn(text, seed=0, stream="prompt"):
    return draw(parse_template(text), Files(), seed=seed, stream=stream)


SHA256 = {
    0: (0.23508, 0.65669),
    1: (0.49150, 0.92103),
    4: (0.53208, 0.60864),
    5: (0.66855, 0.23196),
    7: (0.53573, 0.69586),
}
"""Of the first 8 bytes that ``printf 'SEED:prompt:N' | sha256sum`` prints, as a fraction, by seed for N = 0 and 1."""


@pytest.mark.parametrize("seed", SHA256)
def test_draws_are_those_of_sha256(seed):
    first, second = SHA256[seed]
    letters = "abcdefghij"
    assert drawn(f"{{{'|'.join(letters)}}}", seed) == letters[int(first * 10)]
    assert drawn("{a|b} {x|y|z}", seed) == f"{'ab'[int(first * 2)]} {'xyz'[int(second * 3)]}"
    assert drawn("{1::a|3::b}", seed) == ("a" if first < 0.25 else "b")
    assert drawn("__colour__ {x|y|z}", seed) == f"{LINES['colour'][int(first * 2)]} {'xyz'[int(second * 3)]}"
    assert drawn("a {b} \\{c|d}", seed) == "a {b} \\{c|d}"


def test_prompts_draw_independently_of_negative_ones():
    """0x41bb82c049f8dc45 / 2**64 = 0.25677, by ``printf '7:negative_prompt:0' | sha256sum``."""
    letters = "abcdefghij"
    text = f"{{{'|'.join(letters)}}}"
    assert (drawn(text, 7, "prompt"), drawn(text, 7, "negative_prompt")) == ("f", "c")


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("{summer|winter} is coming", "summer is coming/winter is coming"),
        ("{2$$chocolate|vanilla|strawberry}", "chocolate, vanilla/chocolate, strawberry/vanilla, chocolate/"
         "vanilla, strawberry/strawberry, chocolate/strawberry, vanilla"),
        ("{2$$ and $$a|b}", "a and b/b and a"),
        ("{1-2$$ and $$a|b}", "a/b/a and b/b and a"),
        ("{-2$$a|b}", "a/b/a, b/b, a"),
        ("{1-$$a|b}", "a/b/a, b/b, a"),
        ("{4$$a|b}", "a, b/b, a"),
        ("{0-1$$a|b}", "/a/b"),
        ("__flavour__ ice", "chocolate ice/vanilla ice/strawberry ice"),
        ("{2$$__colour__}", "red, blue/blue, red"),
        ("{__colour__|no} hat", "red hat/blue hat/no hat"),
        ("{{rose|white} gold|iron}", "rose gold/white gold/iron"),
        ("{3::a|0::b|.5::c}", "a/c"),
        ("[{a|b}:c:0.5]", "[a:c:0.5]/[b:c:0.5]"),
        ("{[a|b]|c}", "[a|b]/c"),
        ("({a|b}:1.3) <lora:{ink|oil}:0.8>", "(a:1.3) <lora:ink:0.8>/(a:1.3) <lora:oil:0.8>/(b:1.3) <lora:ink:0.8>/"
         "(b:1.3) <lora:oil:0.8>"),
        ("a {cat AND a dog|cat BREAK dog}", "a cat AND a dog/a cat BREAK dog"),
    ],
)  # fmt: skip
def test_what_can_be_drawn(text, possible):
    assert "/".join(sorted({drawn(text, seed) for seed in range(200)})) == "/".join(sorted(possible.split("/")))


@pytest.mark.parametrize(
    "text",
    ["{a}", "a {cat, (dog:1.2)} }{", "{[a|b]}", "[a|b]", "{a", "a|b}", "{", "{2$$a}", "\\{a|b\\}", "a_b__c",
     "o__o x__x", "___a___", "__", "__ a __", "\\__colour__", "{prompt}", "C:\\__x"],
)  # fmt: skip
def test_what_is_no_choice_stays(text):
    assert not is_template(text)
    assert drawn(text) == text


def test_an_escaped_choice_reads_as_its_signs():
    (step,) = schedule_prompts(drawn("\\{a|b} \\__c__"), "", "a1111", [1]).passes[0]
    ((fragment,),) = schedule_prompts(drawn("\\{a|b} \\__c__"), "", "a1111", [1]).sections[step.conditional[0]]
    assert fragment.text == "{a|b} __c__"


def test_nothing_is_drawn_twice():
    """Parts that together look like a choice are escaped: the prompt of a PNG makes the same image."""
    assert drawn("{__bar__}") == "\\{a|b}"
    assert drawn("{_|_}_colour__").replace("\\", "") == "__colour__"
    assert not is_template(drawn("{_|_}_colour__"))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{0::a|0::b}", "weights of 0"),
        ("{3-1$$a|b}", "lower number first"),
        ("{101$$a|b}", "0 to 100"),
        (f"{{{'a' * 60_000}|{'b' * 60_000}}}" * 2, "100000 characters"),
        ("{|}" * 10_001, "10000 choices"),
    ],
    ids=["weights", "range", "count", "length", "choices"],
)
def test_what_cannot_be_drawn(text, error):
    with pytest.raises(sdonnx.RequestError, match=error):
        drawn(text)


SIGNS = st.sampled_from(
    ["{", "}", "|", "[", "]", "\\", "_", "__", "__colour__", "2::", "0::", "2$$", "1-2$$", "-", "$$", " and ", "a", " ",
     "\n", "(", ":1.2)", "<lora:x:1>", "é", "{a|b}", "__end__", "__bar__"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(SIGNS, max_size=40).map("".join), st.integers(0, 2**63 - 1))
def test_random_templates(text, seed):
    try:
        result = drawn(text, seed)
    except sdonnx.RequestError:
        return
    assert result == drawn(text, seed)
    assert drawn(result, seed + 1) == result
    if not is_template(text):
        assert result == text
    if "{" not in text and "__" not in text:
        assert parse_template(text) == (text,)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="|_$"), max_size=60))
def test_texts_without_bars_and_underscores_stay(text):
    assert drawn(text) == text


DEEP = ["{" * 30_000, "{a|" * 8_000 + "}" * 8_000, "[{|" * 8_000, "{2$$" * 8_000 + "}" * 8_000]


@pytest.mark.parametrize("text", DEEP, ids=["open", "nested", "mixed", "counts"])
def test_long_and_deep_templates(text):
    assert isinstance(drawn(text), str)
