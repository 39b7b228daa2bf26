"""OpenAI's images API, as its clients in JavaScript use it."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image
from support.images import in_base64
from support.javascript import install_packages
from support.openai_client import decode, pixels

import sdonnx


def test_javascript(server, pipeline, rng):
    folder = install_packages(Path(__file__).parent / "js")
    photo = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    mask, white = Image.new("RGBA", (64, 64), "black"), Image.new("L", (64, 64))
    mask.paste((0, 0, 0, 0), (16, 16, 48, 48))
    white.paste(255, (16, 16, 48, 48))
    command = ["node", "openai.mjs", f"{server.url}/v1", in_base64(photo), in_base64(mask)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    server.wait_until_idle()
    assert server.context.queue.jobs[-1].state.value == "cancelled"
    settings = {"seed": 7, "num_inference_steps": 3}
    generated = pipeline.generate("a star", num_images=2, **settings).images
    edited = pipeline.generate("a star", image=photo, mask_image=white, **settings).images
    sdk = [decode(each) for each in found["sdk"]]
    seeds = [int(re.search(r"Seed: (\d+)", each.info["parameters"])[1]) for each in sdk]
    fast = [pipeline.generate("a star", seed=seed, **sdonnx.FAST).images[0] for seed in seeds]
    received = [*map(decode, [*found["generated"], found["edited"]]), *sdk]
    for image, wanted in zip(received, [*generated, *edited, *fast], strict=True):
        assert np.array_equal(pixels(image), pixels(wanted))
    assert found["events"] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert found["models"] == ["pictogram"]
    assert found["errors"] == ["NotFoundError", "BadRequestError", "APIUserAbortError"]
