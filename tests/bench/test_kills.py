"""Commands that are killed at random moments lose nothing, and leave nothing that the next one doesn't delete."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "kills.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_kills_at_random_moments():
    command = [sys.executable, SCRIPT, "--count", "2", "--fresh", "0"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("| 2 |") >= 12
