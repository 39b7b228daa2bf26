"""A file of prompts or requests: each line's image equals the one generated alone, and a failure names its line."""

import json
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image
from sdonnx_runtime.execution import staged_model as chain
from support.cli import run_cli, running_cli
from typer.testing import CliRunner

import sdonnx
from sdonnx.cli.app import app

FAST = ["--size", "64x64", "--steps", "2", "--seed", "1"]


def run(*arguments, cwd):
    return run_cli("run", *arguments, cwd=cwd)


def names(directory, suffix="png"):
    return sorted(path.name for path in directory.glob(f"*.{suffix}"))


def test_each_line_of_a_text_is_a_prompt(package, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\r\n\r\n  ein Käse  \n", encoding="utf-8")
    ran = run("--batch-file", "prompts.txt", "-m", package, *FAST, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert names(tmp_path) == ["prompts-0001.png", "prompts-0003.png"]
    with sdonnx.load(package) as pipe:
        for name, prompt in (("prompts-0001.png", "a cat"), ("prompts-0003.png", "ein Käse")):
            wanted = pipe.generate(prompt, width=64, height=64, num_inference_steps=2, seed=1).images[0]
            np.testing.assert_array_equal(Image.open(tmp_path / name), wanted)
    run("--batch-file", "prompts.txt", "-m", package, *FAST, cwd=tmp_path)
    assert len(names(tmp_path)) == 4, "without a name nothing is overwritten"


def test_each_line_of_jsonl_is_a_request_and_failures_are_listed_at_the_end(package, tmp_path):
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "start.png")
    lines = [
        '{"prompt": "a cat", "seed": 7, "num_images": 2}',
        '{"prompt": "a cat", "steps": 3}',
        '{"prompt": "a dog", "sigmas": [9.0, 2.0, 0.5], "sampler": "euler", "negative_prompt": "red"}',
        '{"prompt": "a dog"',
        '["a dog"]',
        '{"seed": 3}',
        '{"prompt": "a dog", "guidance_scale": "high"}',
        '{"prompt": "a fox", "image": "start.png", "strength": 0.5}',
        '{"prompt": "a fox", "image": "absent.png"}',
        '{"prompt": "a fox", "image": 5}',
    ]
    (tmp_path / "lines").mkdir()
    (tmp_path / "start.png").rename(tmp_path / "lines" / "start.png")
    (tmp_path / "lines" / "r.jsonl").write_text("\n".join(lines))
    options = ["-m", package, *FAST, "-o", "out.png", "--save-latents", "l.npz", "--json"]
    ran = run("--batch-file", "lines/r.jsonl", *options, cwd=tmp_path)
    assert ran.returncode == 1
    failed = [line.split(":")[0] for line in ran.stderr.splitlines() if line.startswith("line ")]
    assert failed == [f"line {number}" for number in (2, 4, 5, 6, 7, 9, 10)]
    for message in ("line 2: a request has no 'steps'", "line 4: not a JSON object", "line 6: prompt is missing"):
        assert message in ran.stderr
    for message in ("line 7: guidance_scale is 'high'", "absent.png can't be read", "image is 5", "7 of 10 requests"):
        assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert names(tmp_path) == ["out-0001-7.png", "out-0001-8.png", "out-0003.png", "out-0008.png"]
    assert names(tmp_path, "npz") == ["l-0001.npz", "l-0003.npz", "l-0008.npz"]
    reports = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [report["line"] for report in reports] == list(range(1, 11))
    assert reports[2]["request"]["sigmas"] == [9.0, 2.0, 0.5]
    assert reports[7]["request"]["strength"] == 0.5
    assert "error" in reports[8]
    before = (tmp_path / "out-0003.png").read_bytes()
    run("--batch-file", "lines/r.jsonl", *options, cwd=tmp_path)
    assert len(names(tmp_path)) == 4, "names are the same each time"
    assert (tmp_path / "out-0003.png").read_bytes() == before


def test_no_line_replaces_an_image_that_a_line_reads(package, tmp_path):
    for name in ("cat-0001.png", "cat-0002.png"):
        Image.new("RGB", (64, 64), "teal").save(tmp_path / name)
    before = (tmp_path / "cat-0001.png").read_bytes()
    lines = [
        '{"prompt": "a", "image": "cat-0002.png"}',
        '{"prompt": "a", "image": "./cat-0001.png"}',
        '{"prompt": "a"}',
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    ran = run("--batch-file", "r.jsonl", "-m", package, *FAST, "-o", "cat.png", cwd=tmp_path)
    assert (ran.returncode, "line 1: cat-0001.png is an input of this command" in ran.stderr) == (1, True), ran.stderr
    assert "2 of 3 requests failed" in ran.stderr
    assert {(tmp_path / name).read_bytes() for name in ("cat-0001.png", "cat-0002.png")} == {before}
    assert (tmp_path / "cat-0003.png").exists()


def test_the_package_is_opened_once(package, tmp_path, monkeypatch):
    opened = []
    real = chain.Session

    class Watched(real):
        def __init__(self, path, **options):
            super().__init__(path, **options)
            opened.append(path.parent.name)

    monkeypatch.setattr("sdonnx_runtime.execution.staged_model.Session", Watched)
    (tmp_path / "p.txt").write_text("a cat\na dog\na fox\n")
    made = CliRunner().invoke(app, ["run", "--batch-file", str(tmp_path / "p.txt"), "-m", str(package), *FAST,
                                    "-o", str(tmp_path / "o.png")])  # fmt: skip
    assert made.exit_code == 0, made.output
    assert len(names(tmp_path)) == 3
    assert opened == ["text_encoder", "unet", "vae_decoder"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C to the whole console")
def test_ctrl_c_keeps_finished_images_and_lists_the_failed_lines(package, tmp_path):
    slow = '{"prompt": "a cat", "width": 640, "height": 640, "num_inference_steps": 500}'
    (tmp_path / "r.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": 5}\n' + slow)
    options = ["--batch-file", "r.jsonl", "-m", package, *FAST]
    with running_cli("run", *options, cwd=tmp_path) as process:
        until = time.monotonic() + 120
        while not names(tmp_path) and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "line 2: prompt is 5" in stderr
    assert "Traceback" not in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r-0001.png", "r.jsonl"]
    Image.open(tmp_path / "r-0001.png").load()


@pytest.mark.parametrize(
    ("name", "content", "more", "message"),
    [
        ("p.txt", b"", [], "is empty"),
        ("p.txt", b"\n \n", [], "is empty"),
        ("p.txt", b"caf\xe9", [], "not UTF-8"),
        ("p.csv", b"a cat", [], "give a .txt of prompts, or a .jsonl"),
        ("none.txt", None, [], "No such file"),
        ("p.txt", b"a cat", ["a dog"], "give either a PROMPT or a --batch-file"),
        ("p.txt", b"a cat", ["-o", "image.bmp"], "ends in .png"),
    ],
)
def test_batch_files_that_can_not_be_served(package, tmp_path, name, content, more, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ran = run("--batch-file", name, "-m", package, *more, cwd=tmp_path)
    assert ran.returncode == 2, ran.stderr
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert names(tmp_path) == []
