"""The user's directory for caches."""

import os
import sys
from pathlib import Path


def user_cache_directory() -> Path | None:
    """The directory for what can be made again, of this user; None where the user has no home.

    That is XDG_CACHE_HOME or ~/.cache, on macOS ~/Library/Caches, on Windows %LOCALAPPDATA%.
    """
    named = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    if Path(named).is_absolute():
        return Path(named)
    folders = {"win32": "AppData/Local", "darwin": "Library/Caches"}
    try:
        return Path.home() / folders.get(sys.platform, ".cache")
    except RuntimeError:
        return None
