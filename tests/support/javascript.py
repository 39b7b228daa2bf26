"""Packages of npm for tests of clients in JavaScript."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock


def install_packages(source):
    """Install what ``source``'s package-lock.json lists, once for all test runs; returns the folder, or skips the test.

    The folder is in the user's cache, and has all files of ``source``.
    """
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    name = hashlib.sha256((source / "package-lock.json").read_bytes()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdonnx-tests" / f"npm-{name}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _install(npm, source, Path(f"{folder}.part")).rename(folder)
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder


def _install(npm, source, folder):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    try:
        subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm can't install the packages: {str(error.stderr).strip()[-300:] or error}")
    return folder
