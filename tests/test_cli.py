"""The command line as a person or a program types it, in processes of its own."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sdonnx_runtime.outputs.latents_file import load_latents

FAST = ["--size", "64x64", "--steps", "2", "--seed", "1"]


def sdonnx(*arguments, cwd, **options):
    return subprocess.run(
        [sys.executable, "-m", "sdonnx", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "NO_COLOR": "1"},
        **options,
    )


def test_a_checkpoint_to_a_picture(checkpoint, tmp_path):
    exported = sdonnx("export", checkpoint, cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert "sdonnx run" in exported.stderr
    assert exported.stdout == ""
    options = ["-m", "tiny-onnx", *FAST, "-o", "apple.png", "--preview", "preview.png"]
    ran = sdonnx("run", "a red apple", *options, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert Image.open(tmp_path / "apple.png").size == Image.open(tmp_path / "preview.png").size == (64, 64)
    described = sdonnx("info", "tiny-onnx", cwd=tmp_path)
    assert "Stable Diffusion 1" in described.stdout
    assert "fp32" in described.stdout


def test_json_is_all_that_stdout_gets(package, tmp_path):
    ran = sdonnx("run", "a cat", "-m", package, *FAST, "--count", 2, "-o", "c.png", "--json", cwd=tmp_path)
    report = json.loads(ran.stdout)
    assert [image["seed"] for image in report["images"]] == [1, 2]
    assert [image["path"] for image in report["images"]] == ["c-1.png", "c-2.png"]
    assert report["request"]["sampler"] == "pndm"
    assert all((tmp_path / image["path"]).is_file() for image in report["images"])
    assert len(report["timings"]["steps"]) >= 4
    manifest = json.loads(sdonnx("info", package, "--json", cwd=tmp_path).stdout)
    assert manifest["components"]["unet"]["precision"] == "fp32"


def test_names_that_look_like_markup(package, tmp_path):
    root = tmp_path / "a[" / "b]"  # rich would take "[/b]" for the end of something
    root.parent.mkdir()
    shutil.copytree(package, root)
    ran = sdonnx("run", "a cat", "-m", "a[/b]", *FAST, "-o", "[red]c.png", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.strip() == "[red]c.png  seed 1"
    described = sdonnx("info", "a[/b]", cwd=tmp_path)
    assert described.returncode == 0, described.stderr
    assert "a[/b]" in described.stdout
    refused = sdonnx("info", "[/bold]", cwd=tmp_path)
    assert "error: there is no model '[/bold]'" in refused.stderr


def test_two_passes(package, tmp_path):
    passes = ["--hires", "1.5x:0.5:4", "--hires-upscaler", "lanczos", "--preview", "p.png", "--save-latents", "l.npz"]
    ran = sdonnx("run", "a cat", "-m", package, *FAST, "--count", 2, "-o", "c.png", *passes, "--json", cwd=tmp_path)
    report = json.loads(ran.stdout)
    assert (report["request"]["hires_scale"], report["request"]["hires_strength"]) == (1.5, 0.5)
    assert report["request"]["hires_steps"] == 4
    assert len(report["timings"]["steps"]) == 2 * (2 + 2)
    assert sdonnx("decode", "l.npz", "-m", package, "-o", "d.png", cwd=tmp_path).returncode == 0
    for seed in (1, 2):
        made, decoded = (Image.open(tmp_path / f"{name}-{seed}.png") for name in "cd")
        assert made.size == Image.open(tmp_path / "p.png").size == (96, 96)
        np.testing.assert_array_equal(made, decoded)


def test_only_what_is_masked_is_worked_in(tmp_path):
    """With the bundled model, whose pictures are enlarged otherwise."""
    picture, mask = Image.effect_noise((150, 110), 80).convert("RGB"), Image.new("L", (150, 110))
    mask.paste(255, (70, 40, 100, 80))
    picture.save(tmp_path / "p.png")
    mask.save(tmp_path / "m.png")
    options = ["--image", "p.png", "--mask", "m.png", "--only-masked", 8, "--steps", 2, "-o", "c.png"]
    ran = sdonnx("run", "a cat", *options, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    made = np.asarray(Image.open(tmp_path / "c.png"))
    changed = (made != np.asarray(picture)).any(axis=2)
    assert changed[40:80, 70:100].mean() > 0.9
    assert not changed[np.asarray(mask) == 0].any()


def test_without_a_name_pictures_do_not_overwrite_one_another(package, tmp_path):
    for _ in range(2):
        assert sdonnx("run", "a cat", "-m", package, *FAST, cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sdonnx-1-2.png", "sdonnx-1.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run"], 2, "PROMPT"),
        (["run", "a cat", "--stepz", "3"], 2, "--steps"),
        (["run", "a cat", "-m", "nowhere"], 1, "no model 'nowhere'"),
        (["run", "a cat", "-m", "sd15"], 1, "sdonnx export sd15, then -m sd15-onnx"),
        (["run", "a cat", "-m", "PACKAGE", "--size", "500x512"], 2, "nearest are 496 and 504"),
        (["run", "a cat", "-m", "PACKAGE", "--size", "big"], 2, "such as 512x512"),
        (["run", "a cat", "-m", "PACKAGE", "--size", "9" * 5000 + "x64"], 2, "such as 512x512"),
        (["run", "a cat", "-m", "PACKAGE", "--fit", "squeeze"], 2, "choose crop, pad, stretch"),
        (["run", "a cat", "-m", "PACKAGE", "--mask-blur", "-1"], 2, "mask_blur is -1"),
        (["run", "a cat", "-m", "PACKAGE", "--outpaint", "8,8,8,8"], 2, "--outpaint goes with --image"),
        (["run", "a cat", "-m", "PACKAGE", "--image", "PICTURE", "--outpaint", "8,8,8,8,"], 2, "such as 64,0,64,0"),
        (["run", "a cat", "-m", "PACKAGE", "--image", "PICTURE", "--outpaint", "9" * 5000 + ",0,0,0"], 2, "such as 64"),
        (["run", "a cat", "-m", "PACKAGE", "--image", "PICTURE", "--outpaint", "0,99999999,0,0"], 2, "smaller margins"),
        (
            ["run", "a cat", "-m", "PACKAGE", "--image", "PICTURE", "--outpaint", "4,0,0,0"],
            2,
            "make both multiples of 8",
        ),
        (["run", "a cat", "-m", "PACKAGE", "--steps", "0"], 2, "num_inference_steps is 0"),
        (["run", "a cat", "-m", "PACKAGE", "--hires", "big"], 2, "such as 2x or 2x:0.4:12"),
        (["run", "a cat", "-m", "PACKAGE", "--hires", "2x:0.4:1.5"], 2, "such as 2x or 2x:0.4:12"),
        (["run", "a cat", "-m", "PACKAGE", "--hires-upscaler", "latent"], 2, "without a hires_scale"),
        (["run", "a cat", "-m", "PACKAGE", "--guidance", "nan"], 2, "guidance_scale is nan"),
        (["run", "a cat", "-m", "PACKAGE", "--sampler", "euler_a"], 2, "euler_ancestral"),
        (["run", "a cat", "-m", "PACKAGE", "--device", "cuda"], 1, "sdonnx[cuda]"),
        (["run", "a cat", "-m", "PACKAGE", "--device", "npu"], 2, "directml"),
        (["run", "a cat", "-m", "PACKAGE", "-o", "no/such/place.png"], 1, "can't be written"),
        (["run", "a cat", "-m", "PACKAGE", "-o", "picture.bmp"], 2, "ends in .png"),
        (
            ["run", "a cat", "-m", "PACKAGE", "--preview", "p.jpg"],
            2,
            "p.jpg; give a name that ends in .png",
        ),
        (["run", "a cat", "-m", "PACKAGE", "--save-latents", "l.png"], 2, "l.png; give a name that ends in .npz"),
        (["run", "a cat", "-m", "PACKAGE", "-o", "a.png", "--preview", "x/../a.png"], 2, "are one file"),
        (["export", "nowhere"], 1, "nowhere"),
        (["export", "CHECKPOINT", "-o", "PACKAGE"], 1, "--force"),
        (["export", "CHECKPOINT", "--precision", "int3"], 2, "fp16"),
        (["sensitivity", "CHECKPOINT", "--precision", "fp16"], 2, "int8"),
        (["sensitivity", "CHECKPOINT", "--budget", "1"], 2, "budget is 1; give 0 or more, in MB, and with it --write"),
        (["sensitivity", "CHECKPOINT", "--budget", "inf", "--write", "x"], 2, "budget is inf; give 0 or more"),
        (["sensitivity", "CHECKPOINT", "--write", "no/such/place.toml"], 1, "can't be written"),
        (["info", "nowhere"], 1, "nowhere"),
    ],
)
def test_mistakes_get_one_clear_line(arguments, code, message, package, checkpoint, tmp_path, tmp_path_factory):
    picture = tmp_path_factory.getbasetemp() / "picture.png"
    Image.new("RGB", (64, 64), "teal").save(picture)
    names = {"PACKAGE": package, "CHECKPOINT": checkpoint, "PICTURE": picture}
    ran = sdonnx(*[names.get(argument, argument) for argument in arguments], cwd=tmp_path)
    assert ran.returncode == code, ran.stderr
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""
    assert list(tmp_path.iterdir()) == []


def outpainted(tmp_path, size, margins, *more):
    """What pictogram, of 64x64 pixels with 4 to a latent cell, makes of a teal picture."""
    Image.new("RGB", size, (0, 128, 128)).save(tmp_path / "teal.png")
    options = ["--image", "teal.png", "--outpaint", margins, "--steps", 2, "--seed", 1, "--no-enlarge", "-o", "o.png"]
    ran = sdonnx("run", "a cat on a pink background", *options, *more, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    with Image.open(tmp_path / "o.png") as picture:
        return np.asarray(picture)


def test_outpainting_honours_margins_by_the_packages_factor(tmp_path):
    found = outpainted(tmp_path, (50, 45), "3,0,7,7", "--mask-blur", 0)
    assert found.shape == (52, 60, 3)
    new = (found != (0, 128, 128)).any(axis=2)
    assert not new[:45, 3:53].any()
    new[:45, 3:53] = True
    assert new.all(), "margins that end within a cell are painted too"


def test_outpainting_works_in_the_models_own_area(tmp_path):
    assert outpainted(tmp_path, (399, 301), "100,0,0,0").shape == (48, 84, 3)
    assert outpainted(tmp_path, (399, 301), "100,0,0,0", "--size", "64x40").shape == (40, 64, 3)


def test_outpainting_without_pasting_makes_every_cell_anew_that_is_partly_new(tmp_path):
    latents = []
    for strength in (1, 0):
        keeping = ["--no-paste", "--strength", strength, "--save-latents", "kept.npz"]
        outpainted(tmp_path, (53, 45), "0,0,7,7", *keeping)
        latents.append(load_latents(tmp_path / "kept.npz")[0])
    anew = (latents[0] != latents[1]).any(axis=(0, 1))
    assert anew.shape == (13, 15)
    assert not anew[:11, :13].any()
    assert anew[11:].all()
    assert anew[:, 13:].all()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C to the whole console")
@pytest.mark.parametrize("impatience", [0, 0.01, 0.1, 0.3])
def test_ctrl_c_stops_inside_the_step_and_leaves_nothing(impatience, package, tmp_path):
    command = ["run", "a cat", "-m", package, "--size", "1024x1024", "--steps", "500", "-o", "cat.png"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sdonnx", *map(str, command)], cwd=tmp_path, stderr=subprocess.PIPE
    )
    time.sleep(4)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    for _ in range(4 if impatience else 0):
        time.sleep(impatience)
        process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.endswith(b"stopped\n")
    assert b"Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def limit_file_size(size):
    """Makes writes past ``size`` bytes fail in the child, as a full disk does."""
    resource = pytest.importorskip("resource")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_full_disk_leaves_nothing(checkpoint, package, tmp_path):
    exported = sdonnx("export", checkpoint, "-o", "out", cwd=tmp_path, preexec_fn=limit_file_size(100_000))
    assert exported.returncode == 1
    assert "can't be written" in exported.stderr
    ran = sdonnx("run", "a cat", "-m", package, *FAST, "-o", "c.png", cwd=tmp_path, preexec_fn=limit_file_size(99))
    assert ran.returncode == 1
    assert "can't be written" in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are another matter there")
def test_a_read_only_place(checkpoint, package, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    place = tmp_path if os.geteuid() != 0 else Path("/sys/kernel")  # where not even root may write
    exported = sdonnx("export", checkpoint, "-o", place / "out", cwd=tmp_path)
    ran = sdonnx("run", "a cat", "-m", package, *FAST, "-o", place / "c.png", cwd=tmp_path)
    tmp_path.chmod(stat.S_IRWXU)
    assert (exported.returncode, ran.returncode) == (1, 1)
    assert "can't be written" in exported.stderr
    assert "can't be written" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_a_package_and_nothing_else(checkpoint, tmp_path):
    assert sdonnx("export", checkpoint, "-o", "out", cwd=tmp_path).returncode == 0
    (tmp_path / "out" / "old").write_text("")
    assert sdonnx("export", checkpoint, "-o", "out", "--force", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "out" / "old").exists()
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("years of work")
    refused = sdonnx("export", checkpoint, "-o", "documents", "--force", cwd=tmp_path)
    assert refused.returncode == 1
    assert "not a package" in refused.stderr
    assert (tmp_path / "documents" / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "out"]


def test_a_run_imports_none_of_what_it_promises_to_do_without(package, tmp_path):
    script = """
import sys
from sdonnx.cli.app import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "diffusers", "onnx", "onnxscript", "onnx_ir", "optimum", "safetensors"}
print(sorted(heavy & set(sys.modules)))
"""
    command = [sys.executable, "-c", script, "run", "a cat", "-m", str(package), *FAST, "-o", "c.png"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"
    assert np.asarray(Image.open(tmp_path / "c.png")).shape == (64, 64, 3)
