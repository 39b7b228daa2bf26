"""``--safety``: refused images are not written, the others are, and nothing of it is silent."""

import json

import numpy as np
import pytest
from PIL import Image
from sdonnx_runtime.outputs.latents_file import load_latents
from support.cli import run_cli
from support.safety import THREE

ASKED = (THREE.prompt, "--seed", 1, "--count", 3, "--size", "64x64", "--steps", 1)


def files(folder, checked, *, refused):
    return sorted(f"a-{seed}.png" for seed, flagged in enumerate(checked.flags, 1) if flagged == refused)


def test_refused_images_fail_the_command_and_others_are_kept(checked, tmp_path):
    model = ("-m", checked.path, "-o", tmp_path / "a.png", "--safety", "refuse", "--json")
    ran = run_cli("run", *ASKED, *model, "--save-latents", tmp_path / "a.npz")
    assert ran.returncode == 1
    assert "1 of 3 images is refused by the safety checker and not saved" in ran.stderr
    assert "images are checked by StableDiffusionSafetyChecker; --safety refuse" in ran.stderr
    written = files(tmp_path, checked, refused=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*written, "a.npz"])
    report = json.loads(ran.stdout)
    assert [image["path"] is None for image in report["images"]] == checked.flags
    assert [each["flagged"] for each in report["safety"]] == checked.flags
    for index, flagged in enumerate(checked.flags, 1):
        assert (f"image {index} of 3 is refused" in ran.stderr) == flagged
    latents, _, _ = load_latents(tmp_path / "a.npz")
    assert [each.any() for each in latents] == [not flagged for flagged in checked.flags]


def test_decode_and_batches_refuse_as_run_does(checked, tmp_path):
    latents = tmp_path / "a.npz"
    plain = run_cli("run", *ASKED, "-m", checked.path, "-o", tmp_path / "b.png", "--save-latents", latents)
    assert plain.returncode == 0
    decoded = run_cli("decode", latents, "-m", checked.path, "-o", tmp_path / "a.png", "--safety", "refuse")
    assert decoded.returncode == 1
    assert "not saved  seed" in decoded.stderr
    assert sorted(path.name for path in tmp_path.glob("a-*")) == files(tmp_path, checked, refused=False)
    (tmp_path / "lines.txt").write_text(f"{THREE.prompt}\n")
    batch = ("run", "--batch-file", tmp_path / "lines.txt", *ASKED[1:], "-m", checked.path, "--safety", "refuse")
    ran = run_cli(*batch, cwd=tmp_path)
    assert ran.returncode == 1
    assert "line 1: 1 of 3 images is refused" in ran.stderr
    assert len(list(tmp_path.glob("lines-*.png"))) == 3 - sum(checked.flags)


def test_blurred_images_are_saved_and_say_so(checked, tmp_path):
    ran = run_cli("run", *ASKED, "-m", checked.path, "-o", tmp_path / "a.png", "--safety", "blur")
    assert ran.returncode == 0, ran.stderr
    for seed, (flagged, plain) in enumerate(zip(checked.flags, checked.images, strict=True), 1):
        with Image.open(tmp_path / f"a-{seed}.png") as image:
            assert json.loads(image.text["sdonnx"])["safety"]["flagged"] == flagged
            assert np.array_equal(image, plain) != flagged
        what = "is blurred" if flagged else "is safe"
        assert f"seed {seed}  {what}: StableDiffusionSafetyChecker" in ran.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--safety", "blur", "--preview", "p.png"), "--safety blur hides previews, which nobody has checked"),
        (("--safety", "on"), "'on' is not one of 'off', 'mark', 'blur', 'refuse'"),
        (("--safety", "mark", "--server", "http://127.0.0.1:9"), "--safety has no effect on a --server"),
    ],
)
def test_options_that_contradict_it_are_errors(options, message, tmp_path):
    ran = run_cli("run", "a cat", *options, cwd=tmp_path)
    assert ran.returncode in (1, 2)
    assert message in " ".join(ran.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []
