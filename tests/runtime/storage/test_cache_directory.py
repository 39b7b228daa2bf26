"""The user's directory for caches."""

import sys

from sdonnx_runtime.storage.cache_directory import user_cache_directory


def test_the_directory_is_the_user_s(monkeypatch, tmp_path):
    for system, variable, below in [
        ("linux", "XDG_CACHE_HOME", ".cache"), ("darwin", "XDG_CACHE_HOME", "Library/Caches"),
        ("win32", "LOCALAPPDATA", "AppData/Local"),
    ]:  # fmt: skip
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv(variable, "relative")
        assert user_cache_directory() == tmp_path / below
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
        assert user_cache_directory() == tmp_path / "elsewhere"
        monkeypatch.delenv(variable)
