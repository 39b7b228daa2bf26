"""Say what a file is that isn't what its name promises: a git-LFS pointer, a web page, an archive."""

from pathlib import Path

_AGAIN = "download it again"
_UNPACK = "unpack it and give the file inside"

_MAGIC: tuple[tuple[bytes | tuple[bytes, ...], str, str], ...] = (
    ((b"version https://git-lfs.github.com/", b"version https://hawser.github.com/"),
     "a git-LFS pointer, not the file that it stands for",
     "run 'git lfs pull' in its directory, or download the file itself"),
    (b"/annex/objects/", "a git-annex pointer, not the file that it stands for",
     "run 'git annex get' in its directory, or download the file itself"),
    (b"GGUF", "a GGUF file", "only sdonnx export reads these: give a .safetensors file here"),
    (b"GGML", "a GGML file", "give the model as .safetensors"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    (b"PK\x05\x06", "an empty zip archive", _AGAIN),
    (b"PK\x03\x04", "a zip archive, or a file of torch", "if its download was complete, " + _UNPACK),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", "give the file of the model"),
    (b"\xff\xd8\xff", "a JPEG image", "give the file of the model"),
    (b"RIFF", "a WebP image or another RIFF file", "give the file of the model"),
    (b"GIF8", "a GIF image", "give the file of the model"),
    (b"%PDF-", "a PDF document", "give the file of the model"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as of Keras", "give the model as .safetensors"),
    (b"\x93NUMPY", "a NumPy array", "give the model as .safetensors"),
    (b"\x7fELF", "a program", "give the file of the model"),
    (b"MZ", "a program", "give the file of the model"),
    ((b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"), "a pickle", "give the model as .safetensors"),
)  # fmt: skip
"""First bytes of a file, what it is, and the remedy."""

_WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<!--")


def describe_file(path: Path, *, is_text: bool = False) -> str | None:
    """Say what a file that can't be read is, and the remedy: "is a web page …; download …". None if that isn't known.

    It is for files whose own format was not found; the first bytes of a safetensors file can be anything. With
    ``is_text``, text was expected, and only web pages and pointers are described.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        return f"can't be read ({error.strerror or error}); give an existing file"
    if size == 0:
        return f"is empty; {_AGAIN}"
    if not head.strip(b"\0"):
        return f"starts with zeros: its download has not finished; {_AGAIN}"
    for magic, what, remedy in _MAGIC:
        if head.startswith(magic):
            return f"is {what}; {remedy}"
    if head[257:262] == b"ustar":
        return f"is a tar archive; {_UNPACK}"
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.lower().startswith(_WEB_PAGE):
        return (
            "is a web page, such as a login or an error page; download the file itself, "
            "logged in (with a token) where the site asks for it"
        )
    return None if is_text else _describe_text(head)


def _describe_text(head: bytes) -> str | None:
    """Describe JSON or plain text, such as a server's error; None for anything else."""
    try:
        text = head.decode("utf-8", "strict" if len(head) < 500 else "ignore")
    except UnicodeDecodeError:
        return None
    line = " ".join(text.split())
    if not line.isprintable() or len(line) < 2:
        return None
    kind = "JSON" if line.startswith(("{", "[")) else "text"
    return f"is {kind} ('{line[:60]}'), perhaps a server's error message; {_AGAIN}"
