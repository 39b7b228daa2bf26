"""The last stage: write the checkpoint and the bundled package."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from composites import BACKGROUNDS, Subject, compose
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from sdonnx_export.export import export
from sdonnx_runtime.packages.manifest import read_manifest, write_manifest
from stage_unet import BETAS
from transformers import CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent


def release(args: argparse.Namespace, emoji: list[Subject]) -> None:
    """Write the checkpoint (fp16, diffusers' layout), the bundled package, and 64 composites for the benchmarks."""
    work, checkpoint = args.work, HERE / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    scheduler = DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.register_to_config(skip_prk_steps=True)  # for users who switch to PNDM
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(checkpoint)  # fmt: skip
    for path in checkpoint.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    package = HERE.parent / "sdonnx_models" / "pictogram"
    defaults = {"num_inference_steps": 25, "guidance_scale": 4.0, "enlarge": 8}
    export(str(checkpoint), package, precision="fp16", defaults=defaults, force=True)
    manifest = read_manifest(package)
    write_manifest(package, replace(manifest, source=replace(manifest.source, name="pictogram")))
    shutil.copy(HERE / "README.md", package / "README.md")
    rng, named = np.random.default_rng(64), list(BACKGROUNDS.values())
    chosen = [(emoji[rng.integers(len(emoji))], named[rng.integers(len(named))]) for _ in range(64)]
    images = np.stack([compose(subject.art, colour, rng) for subject, colour in chosen])
    np.savez_compressed(HERE / "composites.npz", images=images)
