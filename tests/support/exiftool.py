"""What ExifTool reads in an image; tests that ask it are skipped where it is not installed."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype"
GENERATED = {
    "XMP-iptcExt:DigitalSourceType": f"{TERMS}/trainedAlgorithmicMedia",
    "XMP-xmp:CreatorTool": "sdonnx",
}
COMPOSITE = {**GENERATED, "XMP-iptcExt:DigitalSourceType": f"{TERMS}/compositeWithTrainedAlgorithmicMedia"}


def read_xmp_tags(*paths: Path) -> list[dict[str, str]]:
    """The XMP tags of each image, by group and name; with a warning of ExifTool's among them if it has one."""
    program = shutil.which("exiftool")
    if program is None:
        pytest.skip("ExifTool is not installed (apt-get install libimage-exiftool-perl)")
    command = [program, "-json", "-n", "-G1", "-XMP:all", "-Warning", *map(str, paths)]
    printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return [{key: each for key, each in tags.items() if key != "SourceFile"} for tags in json.loads(printed)]
