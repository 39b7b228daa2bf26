"""The lines of a batch that are done, in a file beside its images, so that a batch that was stopped can go on."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from sdonnx_runtime.outputs.atomic import describe_errors
from sdonnx_runtime.storage.staging import lock_file

import sdonnx

_START = b'{"line": '
"""How every line begins."""


class Journal:
    """A file with one line of JSON for each line of the batch that is done; it exists until all are.

    Raises:
        SdonnxError: it can't be written, is a file of something else, or another process is at this batch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._done: dict[int, tuple[str, list[str]]] = {}
        with describe_errors(path):
            self._file = path.open("ab+")
            if lock_file(self._file) is False:
                raise sdonnx.SdonnxError(f"{path} is in use by another process; wait for it, or give another -o")
            self._file.seek(0)
            content = self._file.read()
            if content[: len(_START)] != _START[: len(content)]:
                raise sdonnx.SdonnxError(f"{path} is not a journal of sdonnx, and is not replaced; give another -o")
            if content and not content.endswith(b"\n"):  # the process was killed while it wrote
                self._file.write(b"\n")
        for line in content.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self._done[int(entry["line"])] = str(entry["request"]), list(entry["images"])

    def __contains__(self, number: int) -> bool:
        """Whether a line was done, maybe another request than now."""
        return number in self._done

    def is_done(self, number: int, request: str, is_saved: Callable[[Path], bool]) -> bool:
        """Whether a line was done with the same request, and its images are still there."""
        known, images = self._done.get(number, ("", list[str]()))
        return known == request and all(is_saved(Path(image)) for image in images)

    def add(self, number: int, request: str, images: Sequence[Path]) -> None:
        """Note that a line is done; raises SdonnxError if the file can't be written."""
        names = [str(image) for image in images]
        entry = {"line": number, "request": request, "images": names}
        with describe_errors(self.path):
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
        self._done[number] = request, names

    def close(self, *, delete: bool) -> None:
        """Close the file; delete it if every line is done, or none."""
        self._file.close()
        if delete or not self._done:
            self.path.unlink(missing_ok=True)
