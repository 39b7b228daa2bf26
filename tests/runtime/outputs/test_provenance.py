"""Images say in IPTC's photo metadata that they are AI-generated, as ExifTool reads it."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sdonnx_runtime.outputs.metadata import enlarge_png
from sdonnx_runtime.outputs.provenance import digital_source_type
from support.exiftool import COMPOSITE, GENERATED, read_xmp_tags
from support.images import photograph

import sdonnx


@pytest.fixture(scope="module")
def result(package):
    return sdonnx.load(package).generate("a cat", seed=1, width=64, height=64, num_inference_steps=1)


@pytest.fixture(scope="module")
def composite(result):
    return replace(result, request=replace(result.request, image=photograph(), strength=0.75))


def test_exiftool_reads_the_source_of_every_png(result, composite, tmp_path):
    made, enlarged, edited, without = (tmp_path / f"{index}.png" for index in range(4))
    sdonnx.save_png(result, 0, made)
    enlarged.write_bytes(enlarge_png(made.read_bytes(), 2))
    sdonnx.save_png(composite, 0, edited)
    sdonnx.save_png(result, 0, without, provenance=False)
    assert read_xmp_tags(made, enlarged, edited, without) == [GENERATED, GENERATED, COMPOSITE, {}]


def test_the_packet_changes_neither_pixels_nor_other_texts(result, tmp_path):
    read = []
    for provenance in (True, False):
        sdonnx.save_png(result, 0, tmp_path / "image.png", provenance=provenance)
        with Image.open(tmp_path / "image.png") as image:
            texts = {key: text for key, text in image.text.items() if key in ("parameters", "sdonnx")}
            read.append((np.asarray(image).tobytes(), texts, len(image.text)))
    with_packet, without = read
    assert with_packet[:2] == without[:2]
    assert (with_packet[2], without[2]) == (3, 2)


@pytest.mark.parametrize(
    ("fields", "term"),
    [
        ({}, "trainedAlgorithmicMedia"),
        ({"depth_image": photograph(), "hires_strength": 0.5}, "trainedAlgorithmicMedia"),
        ({"image": photograph()}, "compositeWithTrainedAlgorithmicMedia"),
        ({"strength": 0.75}, "compositeWithTrainedAlgorithmicMedia"),  # decoded from latents, without its image
        ({"image_guidance_scale": 1.5}, "compositeWithTrainedAlgorithmicMedia"),
    ],
)
def test_an_image_that_is_made_of_another_is_a_composite(fields, term, result):
    assert digital_source_type(replace(result.request, **fields)).rpartition("/")[2] == term
