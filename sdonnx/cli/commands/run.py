"""``sdonnx run``."""

from typing import Any

from sdonnx_models import DEFAULT
from sdonnx_runtime.images.canny import canny
from sdonnx_runtime.images.preprocess import flatten_alpha, open_image

import sdonnx
from sdonnx.cli import options
from sdonnx.cli.batch import make_batch, read_batch
from sdonnx.cli.console import err, print_json, print_results, result_json
from sdonnx.cli.generate import OutputPaths, generate
from sdonnx.cli.parsing import (
    parse_control,
    parse_embedding,
    parse_hires,
    parse_interval,
    parse_lora,
    parse_margins,
    parse_numbers,
    parse_refiner,
    parse_size,
    parse_variation,
)
from sdonnx.loading import find_model


def run(
    prompt: options.Prompt = None,
    model: options.Model = None,
    output: options.Output = None,
    negative: options.Negative = "",
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: options.Seed = None,
    variation: options.Variation = None,
    size: options.Size = None,
    vae: options.Vae = None,
    enlarge: options.Enlarge = True,
    count: options.Count = 1,
    sampler: options.Sampler = None,
    image: options.StartImage = None,
    strength: options.Strength = None,
    fit: options.Fit = "crop",
    mask: options.Mask = None,
    mask_blur: options.MaskBlur = 4,
    paste: options.Paste = True,
    only_masked: options.OnlyMasked = None,
    outpaint: options.Outpaint = None,
    image_guidance: options.ImageGuidance = None,
    depth: options.Depth = None,
    control: options.Control = None,
    control_prep: options.ControlPrep = None,
    control_guess: options.ControlGuess = False,
    batch_file: options.BatchFile = None,
    refiner: options.Refiner = None,
    lora: options.Lora = None,
    lora_dir: options.LoraDir = None,
    lora_lenient: options.LoraLenient = False,
    embedding: options.Embedding = None,
    hires: options.Hires = None,
    hires_upscaler: options.HiresUpscaler = None,
    prompts: options.Syntax = "a1111",
    weighting: options.Weighting = "a1111",
    clip_skip: options.ClipSkip = None,
    schedule: options.Schedule = None,
    spacing: options.Spacing = None,
    eta: options.Eta = None,
    sigmas: options.Sigmas = None,
    timesteps: options.Timesteps = None,
    guidance_rescale: options.GuidanceRescale = 0.0,
    fast: options.Fast = False,
    reuse: options.Reuse = None,
    token_downsampling: options.TokenDownsampling = None,
    guidance_interval: options.GuidanceInterval = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    memory: options.Memory = "auto",
    preview: options.Preview = None,
    preview_vae: options.PreviewVae = None,
    save_latents: options.SaveLatents = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a picture with a package.

    [dim]sdonnx run "a red apple on a blue background" -o apple.png[/dim]
    [dim]sdonnx run "a photograph of a cat" -m sd15-onnx --seed 7[/dim]
    [dim]sdonnx run "a tiger on a white background" --image cat.png --strength 0.6[/dim]
    """
    lossy = {"reuse": reuse, "token_downsampling": token_downsampling, **parse_interval(guidance_interval)}
    other, refined = parse_refiner(refiner)
    nets = [parse_control(each) for each in control or ()]
    if control_prep is not None and not nets:
        raise sdonnx.RequestError("--control-prep is given without --control; give the net that reads the edges")
    prepare = canny if control_prep is not None else flatten_alpha
    fields: dict[str, Any] = {
        "negative_prompt": negative,
        "prompt_syntax": prompts,
        "weighting": weighting,
        "clip_skip": clip_skip,
        **parse_size(size),
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
        "variation": parse_variation(variation),
        "num_images": count,
        "sampler": sampler,
        "schedule": schedule,
        "spacing": spacing,
        "eta": eta,
        "sigmas": parse_numbers("sigmas", sigmas),
        "timesteps": parse_numbers("timesteps", timesteps),
        "guidance_rescale": guidance_rescale,
        "image": None if image is None else open_image(image),
        "strength": strength,
        "fit": fit,
        "mask_image": None if mask is None else open_image(mask),
        "mask_blur": mask_blur,
        "paste": paste,
        "padding_mask_crop": only_masked,
        "image_guidance_scale": image_guidance,
        "depth_image": None if depth is None else open_image(depth),
        "controls": tuple(sdonnx.Control(image=prepare(open_image(path)), **how) for _, path, how in nets),
        "control_guess": control_guess,
        **refined,
        **parse_hires(hires),
        "hires_upscaler": hires_upscaler,
        **(sdonnx.FAST if fast else {}),
        **{name: value for name, value in lossy.items() if value is not None},
    }
    margins = None if outpaint is None else parse_margins(outpaint)
    lines = None if batch_file is None else read_batch(batch_file)
    if (prompt is None) == (lines is None):
        raise sdonnx.RequestError("give a PROMPT, or a file of them with --batch-file")
    if preview_vae is not None and preview is None:
        raise sdonnx.RequestError("--preview-vae is given without --preview; give the file that the preview goes to")
    with sdonnx.load(
        find_model(_bundled() if model is None else model),
        vae=vae,
        preview_vae=preview_vae,
        device=device,
        threads=threads,
        memory="max" if memory == "auto" and lines is not None else memory,
        refiner=other,
        lora_folder=lora_dir,
        controls=[package for package, _, _ in nets],
    ) as pipe:
        pipe.set_loras([parse_lora(each) for each in lora or []], lenient=lora_lenient)
        pipe.set_embeddings([parse_embedding(each) for each in embedding or []])
        if preview is not None and preview_vae is None and pipe.package.manifest.latents.preview is None:
            raise sdonnx.PackageError("the package has no preview; run 'sdonnx export' again, or leave out --preview")
        outputs = OutputPaths(pictures=output, preview=preview, latents=save_latents, enlarge=enlarge)
        if batch_file is not None and lines is not None:
            make_batch(pipe, batch_file, lines, fields, outputs, margins, as_json=as_json)
            return
        result, paths = generate(pipe, {**fields, "prompt": prompt}, outputs, margins)
    if as_json:
        print_json(result_json(result, paths))
    else:
        print_results(result, paths)


def _bundled() -> str:
    err.print(
        f"using {DEFAULT}, the small model that comes with sdonnx; for a published one: "
        "sdonnx export sd15, then -m sd15-onnx",
        highlight=False,
        soft_wrap=True,
    )
    return DEFAULT
