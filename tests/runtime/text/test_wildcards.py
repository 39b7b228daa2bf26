"""Wildcard files: what is read of a folder, and what is refused."""

import pytest
from sdonnx_runtime.text.wildcards import draw_texts

import sdonnx


@pytest.fixture
def folder(tmp_path):
    files = {
        "colour.txt": b"\xef\xbb\xbf# colours\r\nred\r\n\r\n  blue  \r\n#black\r\n",
        "deep/er/thing.txt": "a __colour__ {çup|3::bowl}\n".encode(),
        "a.txt": b"x\n__b__\n",
        "b.txt": b"y\n{z|__c__}\n",
        "c.txt": b"__a__\n",
        "lost.txt": b"fine\n__nowhere__\n",
        "empty.txt": b"# nothing\n\n",
        "latin.txt": "é\n".encode("latin-1"),
        "zero.txt": b"0::a\n0::b\n",
        "wrong.txt": b"{9-1$$a|b}\n",
        "0.txt": b"__1__ __1__ __1__ __1__ __1__ __1__ __1__ __1__ __1__ __1__ __1__\n",
        "6.txt": b"end\n",
    }
    for name, data in files.items():
        path = tmp_path / "wildcards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for number in range(1, 6):
        text = files["0.txt"].decode().replace("1", str(number + 1))
        (tmp_path / "wildcards" / f"{number}.txt").write_text(text)
    (tmp_path / "secret.txt").write_text("secret\n")
    (tmp_path / "wildcards/link.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "wildcards/out").symlink_to(tmp_path)
    (tmp_path / "wildcards/within.txt").symlink_to(tmp_path / "wildcards/colour.txt")
    return tmp_path / "wildcards"


def possible(text, folder):
    return {each["prompt"] for each in draw_texts({"prompt": text}, "a1111", folder, range(60)).values()}


def test_lines_of_files(folder):
    assert possible("__colour__", folder) == possible("__within__", folder) == {"red", "blue"}
    assert possible("__deep/er/thing__", folder) == {
        f"a {colour} {what}" for colour in ("red", "blue") for what in ("çup", "bowl")
    }
    assert draw_texts({"prompt": "__colour__ {a|b}"}, "plain", folder, [1]) == {}
    assert draw_texts({"prompt": "no choice {a}"}, "a1111", None, [1]) == {}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("__color__", "the prompt names __color__, and .* has no color.txt; did you mean __colour__"),
        ("{fine|__deep/colour__}", "has no deep/colour.txt"),
        ("__lost__", "the wildcard __lost__ names __nowhere__"),
        ("__a__", "the wildcard __a__ refers to itself: a > b > c > a"),
        ("__empty__", "has no lines"),
        ("__latin__", "latin.txt is not UTF-8"),
        ("__zero__", "weights of 0"),
        ("__wrong__", "lower number first"),
        ("__0__", "over (100000 characters|10000 choices)"),
        ("__../secret__", "no path in the folder"),
        ("__deep/../../secret__", "no path in the folder"),
        ("__/etc/hosts__", "no path in the folder"),
        ("__link__", "is a link out of the folder"),
        ("__out/secret__", "is a link out of the folder"),
        ("__deep__", "has no deep.txt"),
        ("__" + "é" * 90 + "__", "has no é"),
    ],
)
def test_what_is_refused(folder, text, error):
    """For every seed: also where it would have drawn something else."""
    for seed in range(4):
        with pytest.raises(sdonnx.RequestError, match=error) as caught:
            draw_texts({"prompt": text, "negative_prompt": ""}, "a1111", folder, [seed])
        assert "\n" not in str(caught.value)


def test_a_wildcard_without_a_folder():
    with pytest.raises(sdonnx.RequestError, match="--wildcards"):
        draw_texts({"prompt": "__colour__"}, "a1111", None, [0])


def test_files_that_are_too_large(folder):
    with (folder / "huge.txt").open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(sdonnx.RequestError, match="16 MB"):
        draw_texts({"prompt": "__huge__"}, "a1111", folder, [0])


def test_a_folder_that_is_none(package, tmp_path):
    with pytest.raises(sdonnx.RequestError, match="wildcard_folder .* is not a directory"):
        sdonnx.load(package, wildcard_folder=tmp_path / "none")
