"""Every parser of untrusted input, fuzzed: inputs are read or refused, in bounded time and memory."""

import os

import pytest
from support.fuzz.campaign import run_campaign
from support.fuzz.parsers import PARSERS

SECONDS = float(os.environ.get("SDONNX_FUZZ_SECONDS", "3"))
"""Of each parser; CONTRIBUTING.md has the command of longer campaigns."""


@pytest.mark.parametrize("parser", PARSERS)
def test_mutated_inputs_are_read_or_refused(parser):
    """Nothing but SdonnxError with one printable line, no crash, no hang, no memory out of proportion."""
    figures = run_campaign(parser, seconds=SECONDS)
    assert figures.failures == ()
    assert figures.accepted > 0
    assert figures.refused > 0
