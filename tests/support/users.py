"""A user with the rights of any other: tests of permissions, also where they are run by root."""

import os
import tempfile
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

_NOBODY = 65534


def run_without_privileges(action: Callable[[], object]) -> bool:
    """Call ``action`` in a fork that is no longer root's; whether it raised nothing."""
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(_NOBODY)
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@contextmanager
def shared_directory() -> Generator[Path, None, None]:
    """A directory in which every user may write; pytest's own is closed to others."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o777)
        yield directory
