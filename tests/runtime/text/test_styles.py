"""Styles: AUTOMATIC1111's styles.csv, merged as its ``apply_styles_to_prompt`` documents it."""

import pytest
from sdonnx_runtime.text.styles import apply_styles, read_styles

import sdonnx

CSV = (
    '\ufeffname,prompt,negative_prompt\r\n'
    'Film,"breathtaking {prompt} . award-winning, professional","anime, cartoon"\r\n'
    'Ink, "ink drawing, ""sumi-e""", \r\n'
    "# a comment,x,y\r\n"
    ",nameless,y\r\n"
    "Twice,{prompt} and {prompt},\r\n"
    'Lines,"two\nlines",\r\n'
    "Short\r\n"
    "Any,{oil|ink} of {prompt},{blurry|dark}\r\n"
)  # fmt: skip


@pytest.fixture
def styles(tmp_path):
    path = tmp_path / "styles.csv"
    path.write_bytes(CSV.encode())
    return path


def test_files_are_read_as_theirs(styles):
    found = read_styles(styles)
    assert list(found) == ["Film", "Ink", "Twice", "Lines", "Short", "Any"]
    assert (found["Ink"].prompt, found["Lines"].prompt) == ('ink drawing, "sumi-e"', "two\nlines")
    assert (found["Short"].prompt, found["Short"].negative_prompt) == ("", "")


def test_old_files(tmp_path):
    (tmp_path / "old.csv").write_text("name,text\nInk,ink drawing\n")
    assert read_styles(tmp_path / "old.csv")["Ink"].prompt == "ink drawing"


@pytest.mark.parametrize(
    ("prompt", "names", "merged", "negative"),
    [
        ("a cat", [], "a cat", "bad"),
        ("a cat", ["Film"], "breathtaking a cat . award-winning, professional", "bad, anime, cartoon"),
        (" a cat ", ["Ink"], 'a cat, ink drawing, "sumi-e"', "bad"),
        ("", ["Ink"], 'ink drawing, "sumi-e"', "bad"),
        ("a cat", ["Twice"], "a cat and a cat", "bad"),
        (
            "a cat",
            ["Ink", "Film"],
            'breathtaking a cat, ink drawing, "sumi-e" . award-winning, professional',
            "bad, anime, cartoon",
        ),
        ("a cat", ["Short"], "a cat", "bad"),
    ],
)
def test_merging(styles, package, prompt, names, merged, negative):
    found = read_styles(styles)
    assert apply_styles(prompt, [found[name].prompt for name in names]) == merged
    with sdonnx.load(package, styles=styles) as pipe:
        request = pipe.resolve(prompt, negative_prompt="bad", styles=tuple(names)).request
    assert (request.prompt, request.negative_prompt, request.styles) == (merged, negative, ())


def test_styles_with_alternatives(styles, package):
    with sdonnx.load(package, styles=styles) as pipe:
        resolved = pipe.resolve("a cat", styles=("Any",), seed=3, num_images=20).request
        assert {each.prompt for each in resolved.prompts} == {"oil of a cat", "ink of a cat"}
        assert {each.negative_prompt for each in resolved.prompts} == {"blurry", "dark"}
        assert pipe.resolve(resolved).request == resolved


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"title,prompt\na,b\n", "not a file of styles"),
        (b"", "not a file of styles"),
        (b"name,prompt\na,\"" + b"x" * 200_000, "not a file of styles"),
        (None, "can't be read"),
    ],
)  # fmt: skip
def test_files_that_are_refused(package, tmp_path, data, error):
    path = tmp_path / "styles.csv"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(sdonnx.RequestError, match=error):
        sdonnx.load(package, styles=path)


def test_styles_that_are_unknown(styles, package):
    with sdonnx.load(package, styles=styles) as pipe:
        with pytest.raises(sdonnx.RequestError, match="has no style 'Flim'; choose Film"):
            pipe.resolve("a cat", styles=("Flim",))
        with pytest.raises(sdonnx.RequestError, match="has no style '東'; choose Film, Ink, Twice"):
            pipe.resolve("a cat", styles=["東"])
        for wrong in ("Film", (1,), None):
            with pytest.raises(sdonnx.RequestError, match="styles"):
                pipe.resolve("a cat", styles=wrong)
    with sdonnx.load(package) as pipe, pytest.raises(sdonnx.RequestError, match="--styles"):
        pipe.resolve("a cat", styles=("Film",))
