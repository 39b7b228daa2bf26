"""Fuzzed parsers of what a user gives with a request: prompts, lines of batch files, images, latents."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sdonnx_models import bundled
from sdonnx_runtime.images.preprocess import open_image
from sdonnx_runtime.outputs.latents_file import load_latents, save_latents
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.pipeline import Pipeline
from sdonnx_runtime.text.chunks import split_into_chunks
from sdonnx_runtime.text.prompt_schedule import schedule_prompts
from sdonnx_runtime.text.styles import apply_styles, read_styles
from sdonnx_runtime.text.tokenizer import Tokenizer
from sdonnx_runtime.text.wildcards import draw_texts

from sdonnx.cli.batch import parse_line, read_batch
from support.fuzz.campaign import Target
from support.fuzz.mutators import mutate_json, mutate_png, mutate_text, mutate_zip

PACKAGE = bundled()["pictogram"]
_PROMPTS = (
    "masterpiece, (best quality:1.2), [blurry], a \\(real\\) photo of a (((cat))) on the [moon|sun|sea]",
    "a [fantasy:cyberpunk:0.4] city AND rain :0.7 AND [night::5] BREAK neon, <lora:ink:0.8>",
    "(a (very:1.5) [[dark]] [forest:meadow:12]:0.9) <lora:teal:1>, 漢字 \U0001f680 don't",
)
_WORDS = (
    "(", ")", "[", "]", ":", "|", "\\", "<", ">", "<lora:a:1>", "<lora:", "<lyco:b:te=0:unet=1>", " AND ", " BREAK ",
    ":0.5)", ":1.5", ":1e999)", ":nan)", "[a:b:0.5]", "[a|b]", "[:", "::", "0.3", "12", ",", " ", "{", "}",
)  # fmt: skip


def prompt(_folder: Path) -> Target:
    """A prompt, up to the chunks of its tokens at each step."""
    tokenizer = Tokenizer.open(PACKAGE / "tokenizer", length=77)

    def read(data: bytes) -> None:
        text = data.decode("utf-8", "surrogatepass")
        for syntax in ("a1111", "plain"):
            schedule = schedule_prompts(text, text[::-1], syntax, [12, 7])
            for words in [*schedule.sections.values()][:3]:
                split_into_chunks(tokenizer, words)

    return Target(seeds=[text.encode() for text in _PROMPTS], mutate=mutate_text(_WORDS), read=read)


_TEMPLATES = (
    "a {cat|{2::red|.5::blue} dog} on {1-2$$ and $$a|__b__|c}, \\{verbatim|braces} __sub/c__ {2$$__b__}",
    "[{a|b}:__b__:0.5] {[moon|sun]|<lora:ink:0.8>} {plain} AND __b__ { BREAK |}",
)
_CHOICES = (
    "{", "}", "|", "[", "]", "\\", "__", "__b__", "__sub/c__", "__loop__", "__none__", "__../b__", "2::", "0::", "2$$",
    "1-3$$", "9-1$$", "$$", "\n", "#", "{|}", "{2$$__b__}",
)  # fmt: skip


def template(folder: Path) -> Target:
    """A template, as a prompt and as a file of wildcards that others name."""
    files = {"b.txt": "x\n__sub/c__\n", "sub/c.txt": "2::y {1|2}\nz\n", "loop.txt": "__loop__\n"}
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    def read(data: bytes) -> None:
        (folder / "own.txt").write_bytes(data)
        text = data.decode("utf-8", "replace")
        for prompt_text in (text, "__own__"):
            draw_texts({"prompt": prompt_text, "negative_prompt": ""}, "a1111", folder, [1, 2])

    return Target(seeds=[text.encode() for text in _TEMPLATES], mutate=mutate_text(_CHOICES), read=read)


def styles(folder: Path) -> Target:
    """AUTOMATIC1111's file of styles."""
    seeds = (
        '\ufeffname,prompt,negative_prompt\r\nInk,"ink, {prompt}",\r\n"a ""b"" ","c\nd",e\r\n',
        "name,text\nInk,ink\n",
    )
    words = (",", '"', '""', "\r\n", "\n", "name", "prompt", "{prompt}", "#", " ", "\0")
    path = folder / "styles.csv"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        apply_styles("a cat", [each.prompt for each in read_styles(path).values()])

    return Target(seeds=[text.encode() for text in seeds], mutate=mutate_text(words), read=read)


def batch(folder: Path) -> Target:
    """A batch file of requests, each resolved for a package."""
    pipeline = Pipeline(Package.open(PACKAGE), device="cpu")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    lines = (
        {"prompt": "a cat", "seed": 7, "width": 64, "height": 64, "num_inference_steps": 4, "sampler": "euler"},
        {"prompt": "a dog", "negative_prompt": "blurry", "guidance_scale": 5.5, "num_images": 2, "strength": 0.5,
         "image": "a.png", "sampler": "DPM++ 2M Karras", "variation": [3, 0.2], "clip_skip": 2},
        {"prompt": "a (hat:1.2)", "sigmas": [9.0, 3.0, 0.5], "guidance_interval": [0.1, 5.0], "clip_skip": 1,
         "hires_scale": 2.0, "hires_strength": 0.6, "prompt_syntax": "plain", "cache_interval": 2},
    )  # fmt: skip
    path = folder / "batch.jsonl"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for line in read_batch(path)[:3]:
            pipeline.resolve("", **parse_line(line, path))

    return Target(seeds=[json.dumps(line).encode() for line in lines], mutate=mutate_json, read=read)


def png(folder: Path) -> Target:
    """A PNG with the text that AUTOMATIC1111 and ComfyUI write, a profile and an orientation."""
    infotext = "a cat\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 8x8"
    workflow = json.dumps({"3": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 20}}})
    seeds = []
    for mode in ("RGB", "RGBA", "L", "P", "I;16"):
        info, stream = PngInfo(), BytesIO()
        info.add_text("parameters", infotext)
        info.add_text("prompt", workflow, zip=True)
        info.add_itxt("workflow", workflow, "en", zip=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new(mode, (8, 6)).save(stream, "PNG", pnginfo=info, exif=exif)
        seeds.append(stream.getvalue())
    path = folder / "image.png"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        open_image(path).load()

    return Target(seeds=seeds, mutate=mutate_png, read=read)


def latents(folder: Path) -> Target:
    """A file of latents."""
    path = folder / "latents.npz"
    request = Pipeline(Package.open(PACKAGE), device="cpu").resolve("a cat", num_images=2, seed=1).request
    values = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    save_latents(path, values, request, "pictogram")
    seeds = [path.read_bytes()]
    np.savez_compressed(path, **np.load(path))
    seeds.append(path.read_bytes())

    def read(data: bytes) -> None:
        path.write_bytes(data)
        load_latents(path)

    return Target(seeds=seeds, mutate=mutate_zip(), read=read)
