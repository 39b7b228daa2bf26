"""Small JSON files are read, and what would take time or memory is refused."""

from pathlib import Path

import pytest
from sdonnx_runtime.files.json_file import load_json, parse_json


def test_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, "水墨", null]}', encoding="utf-8")
    assert load_json(tmp_path / "a.json") == {"a": [1, "水墨", None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'"' + b"a" * 10_000_000 + b'"', "more than 10000000 bytes"),
        (b'{"a": \xff}', "can't decode"),
        (b"{", "Expecting"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "Exceeds the limit"),
    ],
    ids=["nested", "large", "latin-1", "cut", "digits"],
)
def test_other_content_is_a_value_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_json(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"[NaN]", b"[-Infinity]", b"[1e999]"])
def test_numbers_are_finite_where_that_is_asked_for(content: bytes) -> None:
    assert parse_json(b"[1e308]", finite=True) == [1e308] and isinstance(parse_json(content)[0], float)
    with pytest.raises(ValueError, match="is not a finite number"):
        parse_json(content, finite=True)
