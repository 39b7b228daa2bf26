"""The errors that sdonnx raises: each says the fact, what was expected, and the remedy."""


class SdonnxError(Exception):
    """The root of sdonnx' errors."""


class RequestError(SdonnxError, ValueError):
    """A request is invalid or not supported, such as a width of 500 or 0 steps."""


class PackageError(SdonnxError):
    """A package is missing, damaged, hostile or of an unsupported format."""


class DeviceError(SdonnxError):
    """A device is absent, fails to initialise, or fails while running."""


class ExportError(SdonnxError):
    """A checkpoint can't be exported."""
