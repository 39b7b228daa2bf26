"""Files that are mapped, and leave memory."""

import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sdonnx_runtime.execution import process_memory

CONTENT = bytes(range(256)) * 4096


def resident(mapped):
    """The resident bytes of a mapped array's file."""
    listing = Path("/proc/self/smaps").read_text()
    found = re.search(rf"^{mapped.ctypes.data:x}-.*\n(?:[A-Z].*\n)*?Rss: +(\d+) kB", listing, re.MULTILINE)
    return 1024 * int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which files are mapped")
def test_what_is_mapped_leaves_memory_while_a_graph_is_opened(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    mapped = np.memmap(tmp_path / "file", np.uint8, "r")
    with process_memory.keep_unmapping(tmp_path):
        assert mapped.sum() == np.frombuffer(CONTENT, np.uint8).sum()
        deadline = time.monotonic() + 60
        while resident(mapped) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert resident(mapped) == 0
        assert mapped[-1] == CONTENT[-1]
    assert resident(mapped) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which files are mapped")
def test_the_files_of_a_linked_folder_are_unmapped(tmp_path, monkeypatch):
    ranges = []
    monkeypatch.setattr(process_memory, "_unmap", ranges.extend)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "folder" / "file").write_bytes(CONTENT)
    mapped = np.memmap(tmp_path / "folder" / "file", np.uint8, "r")
    process_memory.unmap_files(tmp_path / "link")
    assert [int(start, 16) for start, _ in ranges] == [mapped.ctypes.data]
