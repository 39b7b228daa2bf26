"""The model that comes with sdonnx, and the recipes for those that don't."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import quality
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from sdonnx_models import DEFAULT, bundled, recipes
from sdonnx_runtime.packages.families import FAMILIES
from sdonnx_runtime.sampling.registry import SAMPLERS
from support.cli import run_cli, start_cli
from support.paths import ROOT
from support.reference import psnr

import sdonnx

PICTOGRAM = ROOT / "models" / "pictogram"


@pytest.fixture(scope="module")
def theirs():
    pipe = StableDiffusionPipeline.from_pretrained(PICTOGRAM / "checkpoint", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [(None, DPMSolverMultistepScheduler), ("euler", EulerDiscreteScheduler), ("pndm", PNDMScheduler)],
)
def test_its_images_equal_those_of_diffusers(sampler, scheduler, theirs):
    theirs.scheduler = scheduler.from_pretrained(PICTOGRAM / "checkpoint", subfolder="scheduler")
    with sdonnx.load(DEFAULT, memory="max") as pipe:
        for seed, prompt in enumerate(["a red apple on a blue background", "tiger", "an owl on a pink background"]):
            found = pipe.generate(prompt, seed=seed, sampler=sampler)
            wanted = theirs(
                prompt,
                num_inference_steps=found.request.num_inference_steps,
                guidance_scale=found.request.guidance_scale,
                height=64,
                width=64,
                generator=torch.Generator("cpu").manual_seed(seed),
            )
            assert psnr(found.images[0], wanted.images[0]) >= 50


def test_step_counts_that_trailing_spacing_gives_one_more(theirs):
    """np.arange(1000, 0, -1000 / 61) has 62 numbers; the recipe has to lead to them again."""
    theirs.scheduler = EulerDiscreteScheduler.from_pretrained(PICTOGRAM / "checkpoint", subfolder="scheduler")
    settings = {"num_inference_steps": 61, "guidance_scale": 1.0, "height": 64, "width": 64}
    with sdonnx.load(DEFAULT, memory="max") as pipe:
        found = pipe.generate("tiger", seed=1, sampler="euler", **settings)
        assert found.request.num_inference_steps == 61
    wanted = theirs("tiger", generator=torch.Generator("cpu").manual_seed(1), **settings)
    assert len(found.timings.steps) == len(theirs.scheduler.timesteps) == 62
    assert psnr(found.images[0], wanted.images[0]) >= 50


def test_it_draws_what_it_is_asked_for():
    judge = quality.Judge()
    cases = judge.cases(20)
    images = quality.generate(DEFAULT, cases, {"num_inference_steps": 15}, empty=False)
    found = quality.summary(judge, judge.classify(images, cases), cases)
    assert found["background"] >= 0.9
    assert found["top5"] >= 0.9


def test_text_matters():
    judge = quality.Judge()
    cases = judge.cases(20)
    images = quality.generate(DEFAULT, cases, {"num_inference_steps": 15}, empty=True)
    assert quality.summary(judge, judge.classify(images, cases), cases)["top5"] <= 0.3


def test_run_without_a_model_takes_it_and_upscales(tmp_path):
    for more, size in ([], (512, 512)), (["--no-enlarge"], (64, 64)):
        ran = run_cli("run", "a red apple on a blue background", "--seed", 1, *more, "-o", "apple.png", cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert "using pictogram" in ran.stderr
        with Image.open(tmp_path / "apple.png") as image:
            assert image.size == size
            assert "Size: 64x64" in image.text["parameters"]
            red, green, blue = np.asarray(image.convert("RGB"), float)[:8].mean(axis=(0, 1))
            assert blue > red + 80 and blue > green + 60


def test_it_stays_small():
    checkpoint = [path for path in (PICTOGRAM / "checkpoint").rglob("*") if path.is_file()]
    package = [path for path in bundled()[DEFAULT].rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in [*checkpoint, *package]) < 30e6
    assert sum(path.stat().st_size for path in package) < 25e6
    assert sum(path.stat().st_size for path in [*checkpoint, *package]) < 50e6


@pytest.mark.parametrize("recipe", recipes().values(), ids=lambda recipe: recipe.name)
def test_a_recipe_can_be_followed(recipe):
    assert recipe.family in FAMILIES
    assert recipe.sampler is None or recipe.sampler in SAMPLERS
    assert recipe.size % 8 == 0
    assert set(recipe.package_gb) == {"fp16", "fp32"} >= set(recipe.memory_gb)
    assert recipe.name not in bundled()


def test_export_by_a_recipe_s_name(checkpoint, tmp_path, monkeypatch):
    """The recipe's source from the Hub's cache, its settings in the package."""
    revision, cache = "0" * 40, tmp_path / "hub"
    place = cache / f"models--{recipes()['sd15'].source.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(revision)
    (place / "snapshots").mkdir()
    (place / "snapshots" / revision).symlink_to(checkpoint, target_is_directory=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = start_cli("export", "sd15", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    manifest = json.loads((tmp_path / "sd15-onnx" / "sdonnx.json").read_text())
    assert manifest["source"]["name"] == recipes()["sd15"].source
    assert manifest["defaults"] == {**recipes()["sd15"].defaults, "enlarge": 1, "height": None}


def test_models_lists_everything():
    ran = run_cli("models")
    assert ran.returncode == 0, ran.stderr
    assert all(name in ran.stdout for name in [DEFAULT, *recipes()])
    listed = json.loads(run_cli("models", "--json").stdout)
    assert list(listed["recipes"]) == list(recipes())


def test_training_keeps_a_tenth_of_the_pairs_out():
    spec = importlib.util.spec_from_file_location("composites", PICTOGRAM / "composites.py")
    composites = importlib.util.module_from_spec(spec)
    sys.modules["composites"] = composites
    spec.loader.exec_module(composites)
    facts = json.loads((PICTOGRAM / "judge.json").read_text())
    assert facts["held_out"] == composites.held_out(len(facts["subjects"]))
    assert facts["backgrounds"] == {name: list(colour) for name, colour in composites.BACKGROUNDS.items()}
    assert facts["accuracy"] >= 0.97
    rng = np.random.default_rng(0)
    image = composites.compose(Image.new("RGBA", (64, 64), (9, 9, 9, 255)), (250, 220, 50), rng)
    assert image.shape == (64, 64, 3)
    assert {tuple(pixel) for pixel in image.reshape(-1, 3)} == {(9, 9, 9), (250, 220, 50)}
