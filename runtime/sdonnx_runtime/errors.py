"""The errors sdonnx raises: each says what is the case, what was expected, and what to do about it."""


class SdonnxError(Exception):
    """Root of every error that sdonnx raises on purpose."""


class RequestError(SdonnxError, ValueError):
    """A generation request asks for something that can't be made, such as a width of 500 or 0 steps."""


class PackageError(SdonnxError):
    """A package on disk is missing, damaged, hostile or of a format this version can't read."""


class DeviceError(SdonnxError):
    """The device asked for is absent, fails to initialise, or fails while running."""


class ExportError(SdonnxError):
    """A checkpoint can't be turned into a package."""
