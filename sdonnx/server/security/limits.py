"""How many values the JSON of a request may have, which Python's reader makes objects of at once."""

from sdonnx.server.errors import TooLarge

_MAX_VALUES = 200_000
"""Images in base64 are one value each; a body of values alone takes forty times its size in memory."""

_SIGNS = (b"[", b"{", b",")
"""What is before each value but the first; base64 has none of them."""


def check_values(body: bytes) -> None:
    """Check that JSON does not have more values than any request, before it is parsed; raises TooLarge."""
    if sum(map(body.count, _SIGNS)) > _MAX_VALUES:
        raise TooLarge(f"the JSON has more than {_MAX_VALUES} values; send less")
