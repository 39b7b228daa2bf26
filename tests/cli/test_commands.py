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
import onnxruntime
import pytest
from PIL import Image
from sdonnx_runtime.outputs.latents_file import load_latents
from support.cli import limit_file_size, run_cli, running_cli, start_cli

from sdonnx.benchmark.cpu import instruction_set

FAST = ["--size", "64x64", "--steps", "2", "--seed", "1"]


def test_a_checkpoint_to_an_image(checkpoint, tmp_path):
    exported = start_cli("export", checkpoint, cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert "sdonnx run" in exported.stderr
    assert exported.stdout == ""
    options = ["-m", "tiny-onnx", *FAST, "-o", "apple.png", "--preview", "preview.png"]
    ran = start_cli("run", "a red apple", *options, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert Image.open(tmp_path / "apple.png").size == Image.open(tmp_path / "preview.png").size == (64, 64)
    described = start_cli("info", "tiny-onnx", cwd=tmp_path)
    assert "Stable Diffusion 1" in described.stdout
    assert "fp32" in described.stdout


def test_json_is_all_that_stdout_gets(package, tmp_path):
    ran = run_cli("run", "a cat", "-m", package, *FAST, "--count", 2, "-o", "c.png", "--json", cwd=tmp_path)
    report = json.loads(ran.stdout)
    assert [image["seed"] for image in report["images"]] == [1, 2]
    assert [image["path"] for image in report["images"]] == ["c-1.png", "c-2.png"]
    assert report["request"]["sampler"] == "pndm"
    assert all((tmp_path / image["path"]).is_file() for image in report["images"])
    assert len(report["timings"]["steps"]) >= 4
    manifest = json.loads(run_cli("info", package, "--json", cwd=tmp_path).stdout)
    assert manifest["components"]["unet"]["precision"] == "fp32"


def test_the_devices_of_this_machine(package):
    listed = json.loads(run_cli("info", "--json").stdout)["devices"]
    assert [each["device"] for each in listed] == ["cuda", "directml", "webgpu", "openvino", "cpu"]
    assert listed[-1]["version"] == onnxruntime.__version__
    table = run_cli("info").stdout
    assert "sdonnx[cuda]" in table
    assert instruction_set() in table
    assert "all nodes on the CPU" in run_cli("info", package, "--device", "cpu").stdout


def test_names_that_look_like_markup(package, tmp_path):
    root = tmp_path / "a[" / "b]"  # rich would take "[/b]" for the end of something
    root.parent.mkdir()
    shutil.copytree(package, root)
    ran = run_cli("run", "a cat", "-m", "a[/b]", *FAST, "-o", "[red]c.png", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.strip() == "[red]c.png  seed 1"
    described = run_cli("info", "a[/b]", cwd=tmp_path)
    assert described.returncode == 0, described.stderr
    assert "a[/b]" in described.stdout
    refused = run_cli("info", "[/bold]", cwd=tmp_path)
    assert "error: there is no model '[/bold]'" in refused.stderr


def test_two_passes(package, tmp_path):
    passes = ["--hires", "1.5x:0.5:4", "--hires-upscaler", "lanczos", "--preview", "p.png", "--save-latents", "l.npz"]
    ran = run_cli("run", "a cat", "-m", package, *FAST, "--count", 2, "-o", "c.png", *passes, "--json", cwd=tmp_path)
    report = json.loads(ran.stdout)
    assert (report["request"]["hires_scale"], report["request"]["hires_strength"]) == (1.5, 0.5)
    assert report["request"]["hires_steps"] == 4
    assert len(report["timings"]["steps"]) == 2 * (2 + 2)
    assert run_cli("decode", "l.npz", "-m", package, "-o", "d.png", cwd=tmp_path).returncode == 0
    for seed in (1, 2):
        made, decoded = (Image.open(tmp_path / f"{name}-{seed}.png") for name in "cd")
        assert made.size == Image.open(tmp_path / "p.png").size == (96, 96)
        np.testing.assert_array_equal(made, decoded)


def test_inpainting_only_the_masked_area(tmp_path):
    """With the bundled model, whose images are upscaled by default."""
    image, mask = Image.effect_noise((150, 110), 80).convert("RGB"), Image.new("L", (150, 110))
    mask.paste(255, (70, 40, 100, 80))
    image.save(tmp_path / "p.png")
    mask.save(tmp_path / "m.png")
    options = ["--image", "p.png", "--mask", "m.png", "--only-masked", 8, "--steps", 2, "-o", "c.png"]
    ran = run_cli("run", "a cat", *options, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    made = np.asarray(Image.open(tmp_path / "c.png"))
    changed = (made != np.asarray(image)).any(axis=2)
    assert changed[40:80, 70:100].mean() > 0.9
    assert not changed[np.asarray(mask) == 0].any()


def test_without_a_name_images_do_not_overwrite_one_another(package, tmp_path):
    for _ in range(2):
        assert run_cli("run", "a cat", "-m", package, *FAST, cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sdonnx-1-2.png", "sdonnx-1.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run"], 2, "PROMPT"),
        (["run", "a cat", "--stepz", "3"], 2, "--steps"),
        (["run", "a cat", "-m", "nowhere"], 1, "no model 'nowhere'"),
        (["run", "a cat", "-m", "sd15"], 1, "sdonnx export sd15, then use -m sd15-onnx"),
        (["run", "a cat", "-m", "PACKAGE", "--size", "500x512"], 2, "nearest are 496 and 504"),
        (["run", "a cat", "-m", "PACKAGE", "--size", "big"], 2, "such as 512x512"),
        (["run", "a cat", "-m", "PACKAGE", "--size", "9" * 5000 + "x64"], 2, "such as 512x512"),
        (["run", "a cat", "-m", "PACKAGE", "--fit", "squeeze"], 2, "choose crop, pad, stretch"),
        (["run", "a cat", "-m", "PACKAGE", "--mask-blur", "-1"], 2, "mask_blur is -1"),
        (["run", "a cat", "-m", "PACKAGE", "--outpaint", "8,8,8,8"], 2, "--outpaint requires --image"),
        (["run", "a cat", "-m", "PACKAGE", "--image", "IMAGE", "--outpaint", "8,8,8,8,"], 2, "such as 64,0,64,0"),
        (["run", "a cat", "-m", "PACKAGE", "--image", "IMAGE", "--outpaint", "9" * 5000 + ",0,0,0"], 2, "such as 64"),
        (["run", "a cat", "-m", "PACKAGE", "--image", "IMAGE", "--outpaint", "0,99999999,0,0"], 2, "smaller margins"),
        (
            ["run", "a cat", "-m", "PACKAGE", "--image", "IMAGE", "--outpaint", "4,0,0,0"],
            2,
            "make both multiples of 8",
        ),
        (["run", "a cat", "-m", "PACKAGE", "--steps", "0"], 2, "num_inference_steps is 0"),
        (["run", "a cat", "-m", "PACKAGE", "--hires", "big"], 2, "such as 2x or 2x:0.4:12"),
        (["run", "a cat", "-m", "PACKAGE", "--hires", "2x:0.4:1.5"], 2, "such as 2x or 2x:0.4:12"),
        (["run", "a cat", "-m", "PACKAGE", "--hires-upscaler", "latent"], 2, "hires_upscaler requires hires_scale"),
        (["run", "a cat", "-m", "PACKAGE", "--hires-upscaler", "PACKAGE"], 1, "not an upscaler"),
        (["run", "a cat", "-m", "PACKAGE", "--guidance", "nan"], 2, "guidance_scale is nan"),
        (["run", "a cat", "-m", "PACKAGE", "--sampler", "euler_a"], 2, "euler_ancestral"),
        (["run", "a cat", "-m", "PACKAGE", "--device", "cuda"], 1, "sdonnx[cuda]"),
        (["run", "a cat", "-m", "PACKAGE", "--device", "npu"], 2, "directml"),
        (["run", "a cat", "-m", "PACKAGE", "-o", "no/such/place.png"], 1, "can't be written"),
        (["run", "a cat", "-m", "PACKAGE", "-o", "image.bmp"], 2, "ends in .png"),
        (
            ["run", "a cat", "-m", "PACKAGE", "--preview", "p.jpg"],
            2,
            "p.jpg; give a name that ends in .png",
        ),
        (["run", "a cat", "-m", "PACKAGE", "--save-latents", "l.png"], 2, "l.png; give a name that ends in .npz"),
        (["run", "a cat", "-m", "PACKAGE", "-o", "a.png", "--preview", "x/../a.png"], 2, "are the same file"),
        (["export", "nowhere"], 1, "nowhere"),
        (["export", "CHECKPOINT", "-o", "PACKAGE"], 1, "--force"),
        (["export", "CHECKPOINT", "--precision", "int3"], 2, "fp16"),
        (["sensitivity", "CHECKPOINT", "--precision", "fp16"], 2, "int8"),
        (["sensitivity", "CHECKPOINT", "--budget", "1"], 2, "give 0 to 1000000 MB, together with --write"),
        (["sensitivity", "CHECKPOINT", "--budget", "inf", "--write", "x"], 2, "budget is inf; give 0 to 1000000"),
        (["sensitivity", "CHECKPOINT", "--write", "no/such/place.toml"], 1, "can't be written"),
        (["info", "nowhere"], 1, "nowhere"),
        (["info", "--device", "cpu"], 2, "requires a PACKAGE"),
        (["info", "PACKAGE", "--device", "npu"], 2, "there is no device 'npu'; choose auto, cuda"),
        (["run", "a cat", "-m", "PACKAGE", "--device", "webgpu:fast"], 2, "webgpu:low-power"),
        (["serve", "-m", "PACKAGE", "--device", "cuda:1"], 1, "sdonnx[cuda]"),
        (["info", "a" * 300], 1, "there is no model 'aaa"),
        (["run", "a cat", "--lora-dir", "a" * 300], 1, "can't be used: File name too long; give another path"),
    ],
)
def test_mistakes_get_one_clear_line(arguments, code, message, package, checkpoint, tmp_path, tmp_path_factory):
    image = tmp_path_factory.getbasetemp() / "image.png"
    Image.new("RGB", (64, 64), "teal").save(image)
    names = {"PACKAGE": package, "CHECKPOINT": checkpoint, "IMAGE": image}
    ran = run_cli(*[names.get(argument, argument) for argument in arguments], cwd=tmp_path)
    assert ran.returncode == code, ran.stderr
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""
    assert list(tmp_path.iterdir()) == []


def outpainted(tmp_path, size, margins, *more):
    """What pictogram, of 64x64 pixels with 4 to a latent pixel, makes of a teal image."""
    Image.new("RGB", size, (0, 128, 128)).save(tmp_path / "teal.png")
    options = ["--image", "teal.png", "--outpaint", margins, "--steps", 2, "--seed", 1, "--no-enlarge", "-o", "o.png"]
    ran = run_cli("run", "a cat on a pink background", *options, *more, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    with Image.open(tmp_path / "o.png") as image:
        return np.asarray(image)


def test_outpainting_honours_margins_by_the_packages_factor(tmp_path):
    found = outpainted(tmp_path, (50, 45), "3,0,7,7", "--mask-blur", 0)
    assert found.shape == (52, 60, 3)
    new = (found != (0, 128, 128)).any(axis=2)
    assert not new[:45, 3:53].any()
    new[:45, 3:53] = True
    assert new.all(), "margins that end within a latent pixel are painted too"


def test_outpainting_works_in_the_models_own_area(tmp_path):
    assert outpainted(tmp_path, (399, 301), "100,0,0,0").shape == (48, 84, 3)
    assert outpainted(tmp_path, (399, 301), "100,0,0,0", "--size", "64x40").shape == (40, 64, 3)


def test_outpainting_without_pasting_changes_every_latent_pixel_that_is_partly_new(tmp_path):
    latents = []
    for strength in (1, 0):
        keeping = ["--no-paste", "--strength", strength, "--save-latents", "kept.npz"]
        outpainted(tmp_path, (53, 45), "0,0,7,7", *keeping)
        latents.append(load_latents(tmp_path / "kept.npz")[0])
    changed = (latents[0] != latents[1]).any(axis=(0, 1))
    assert changed.shape == (13, 15)
    assert not changed[:11, :13].any()
    assert changed[11:].all()
    assert changed[:, 13:].all()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C to the whole console")
@pytest.mark.parametrize("impatience", [0, 0.01, 0.1, 0.3])
def test_ctrl_c_stops_inside_the_step_and_leaves_nothing(impatience, package, tmp_path, tmp_path_factory):
    preview = tmp_path_factory.mktemp("preview") / "preview.png"
    command = ["run", "a cat", "-m", package, "--size", "640x640", "--steps", "500", "-o", "cat.png"]
    command += ["--preview", preview]  # it is there once the first step is done
    with running_cli(*command, cwd=tmp_path) as process:
        until = time.monotonic() + 120
        while not preview.exists() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        for _ in range(4 if impatience else 0):
            time.sleep(impatience)
            process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.endswith("stopped\n")
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(checkpoint, package, tmp_path):
    exported = start_cli("export", checkpoint, "-o", "out", cwd=tmp_path, preexec_fn=limit_file_size(100_000))
    assert exported.returncode == 1
    assert "can't be written" in exported.stderr
    ran = start_cli("run", "a cat", "-m", package, *FAST, "-o", "c.png", cwd=tmp_path, preexec_fn=limit_file_size(99))
    assert ran.returncode == 1
    assert "can't be written" in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are another matter there")
def test_a_read_only_place(checkpoint, package, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    place = tmp_path if os.geteuid() != 0 else Path("/sys/kernel")  # where not even root may write
    exported = run_cli("export", checkpoint, "-o", place / "out", cwd=tmp_path)
    ran = run_cli("run", "a cat", "-m", package, *FAST, "-o", place / "c.png", cwd=tmp_path)
    tmp_path.chmod(stat.S_IRWXU)
    assert (exported.returncode, ran.returncode) == (1, 1)
    assert "can't be written" in exported.stderr
    assert "can't be written" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_a_package_and_nothing_else(checkpoint, tmp_path):
    assert run_cli("export", checkpoint, "-o", "out", cwd=tmp_path).returncode == 0
    (tmp_path / "out" / "old").write_text("")
    assert run_cli("export", checkpoint, "-o", "out", "--force", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "out" / "old").exists()
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("years of work")
    refused = run_cli("export", checkpoint, "-o", "documents", "--force", cwd=tmp_path)
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
