"""Download from the Hugging Face Hub, or take from its cache."""

import re
from collections.abc import Sequence
from pathlib import Path

from sdonnx_runtime.errors import SdonnxError
from sdonnx_runtime.libraries import required

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` has the form org/name."""
    return _HUB_ID.fullmatch(source) is not None


def download(source: str, patterns: Sequence[str], *, revision: str | None = None, error: type[SdonnxError]) -> Path:
    """Download the files of a repository that match ``patterns``; the Hub's cache is used offline.

    Raises:
        SdonnxError: of the type ``error``; ``source`` is not a Hub id, or the Hub did not serve it.
    """
    if not is_hub_id(source):
        raise error(f"'{source}' does not exist: expected a directory, a file or a Hub id such as org/name")
    purpose = f"'{source}' is not a local path; downloading from the Hub"
    with required("pip install huggingface-hub", error=error, purpose=purpose):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as failure:
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise error(f"'{source}' is not a local path, and the Hub did not give it: {reason}") from None
