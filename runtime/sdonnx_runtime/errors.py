"""The errors that sdonnx raises: each says the fact, what was expected, and the remedy."""

_MAX_LENGTH = 2000
"""Characters of a message; what a file names can be longer."""


class SdonnxError(Exception):
    """The root of sdonnx' errors; the message is one printable line, whatever the names in it are."""

    def __str__(self) -> str:
        text = "".join(map(_printable, super().__str__()))
        half = _MAX_LENGTH // 2 - 2
        return text if len(text) <= _MAX_LENGTH else f"{text[:half]} … {text[-half:]}"


def _printable(char: str) -> str:
    """The character, or what Python writes for a control character or half of a surrogate pair."""
    return char if char.isprintable() else char.encode("unicode_escape").decode()


class RequestError(SdonnxError, ValueError):
    """A request is invalid or not supported, such as a width of 500 or 0 steps."""


class PackageError(SdonnxError):
    """A package is missing, damaged, hostile or of an unsupported format."""


class DeviceError(SdonnxError):
    """A device is absent, fails to initialise, or fails while running."""


class SafetyError(SdonnxError):
    """An image is refused by the safety checker."""


class ExportError(SdonnxError):
    """A checkpoint can't be exported."""
