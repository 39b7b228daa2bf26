"""The standard streams: any text in any encoding; streams that are closed, full, or that nobody reads any more."""

import codecs
import errno
import io
import os
import re
import sys
from collections.abc import MutableMapping
from typing import TextIO

_ASCII_FORMS = {"\u2013": "-", "\u2014": "-", "\u2018": "'", "\u2019": "'", "“": '"', "”": '"', "…": "...", "•": "*"}

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, other line ends, and those that reverse the direction of text."""


class OutputError(Exception):
    """stdout can't be written; ``reader_left`` if that is because its reader has had enough."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"stdout can't be written ({cause.strerror}); write it to another place")
        self.reader_left = cause.errno == errno.EPIPE or (sys.platform == "win32" and cause.errno == errno.EINVAL)


def escape_controls(text: str) -> str:
    """Show characters that control a terminal as Python's escapes."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """As `escape_controls`, newlines included."""
    return escape_controls(text).replace("\n", "\\n")


def ignore_impossible_sizes(environment: MutableMapping[str, str]) -> None:
    """Remove sizes of a terminal of which rich makes no text, gigabytes of spaces, or an error.

    Some programs set COLUMNS to 0 where there is no terminal.
    """
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[1-9][0-9]{1,3}", environment.get(name, "80")):
            del environment[name]


def prepare_streams() -> None:
    """Let stdout and stderr take any text, replace those that are closed, and tell apart how writing to them fails.

    What stdout is not given is an OutputError; what stderr is not given is lost, since nothing is left to report it to.
    """
    codecs.register_error("sdonnx.ascii", _to_ascii)
    _fill_closed_descriptors()
    sys.stdout, sys.stderr = _wrap(sys.stdout, 1, _Output), _wrap(sys.stderr, 2, _Messages)


def _to_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what an encoding lacks by its usual form in ASCII, or by an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII_FORMS.get(each) or ascii(each)[1:-1] for each in text), error.end


def _fill_closed_descriptors() -> None:
    """Open the null device in place of closed streams, against their direction; else other files get their numbers."""
    for number, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)


def _wrap(stream: TextIO | None, number: int, kind: type["_Output | _Messages"]) -> TextIO:
    if stream is None:
        return kind(io.FileIO(number, "w", closefd=False), encoding="utf-8", errors="sdonnx.ascii", write_through=True)
    if isinstance(stream, (_Output, _Messages)) or not hasattr(stream, "buffer"):
        return stream  # a test's
    return kind(
        stream.buffer,
        encoding=stream.encoding,
        errors="sdonnx.ascii",
        line_buffering=bool(stream.line_buffering),
        write_through=getattr(stream, "write_through", False),
    )


class _Output(io.TextIOWrapper):
    """stdout."""

    def write(self, s: str, /) -> int:
        try:
            return super().write(s)
        except OSError as error:
            raise self._discard(error) from None

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise self._discard(error) from None

    def _discard(self, cause: OSError) -> OutputError:
        """Lead what is still buffered nowhere, or Python would try to write it again at its end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return OutputError(cause)


class _Messages(io.TextIOWrapper):
    """stderr."""

    def write(self, s: str, /) -> int:
        try:
            return super().write(s)
        except OSError:
            return len(s)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            return
