"""The first stage: train the VAE."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from composites import BACKGROUNDS, SIZE, Subject, compose
from diffusers import AutoencoderKL
from torch import Tensor
from trainer import BATCH, Trainer, half, save_sheet, to_images, to_tensor


def new_vae() -> AutoencoderKL:
    """Make a VAE from 64x64 pixels to 16x16 latents of four channels."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=8,
    )  # fmt: skip


def train_vae(args: argparse.Namespace, emoji: list[Subject]) -> None:
    """Train encoder and decoder together, with a small KL term."""
    torch.manual_seed(args.seed)
    vae = new_vae()

    def loss_fn(rng: np.random.Generator) -> Tensor:
        real = sample_composites(emoji, rng, BATCH["vae"])
        with half():
            posterior = vae.encode(real).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
        return reconstruction_loss(output, real) + 1e-4 * posterior.kl().mean() / 1024

    Trainer("vae", vae, args).run(loss_fn, 500, make_report(args, emoji, vae))
    vae.save_pretrained(args.work / "vae")


def sample_composites(emoji: list[Subject], rng: np.random.Generator, size: int) -> Tensor:
    """Draw composites, (N, 3, 64, 64), a quarter of them on any colour, so that the VAE sees more than ten."""
    chosen = [emoji[index] for index in rng.integers(0, len(emoji), size)]
    named = list(BACKGROUNDS.values())
    colours = [
        named[rng.integers(len(named))] if rng.random() < 0.75 else tuple(rng.integers(0, 256, 3).tolist())
        for _ in chosen
    ]
    return to_tensor([compose(each.art, colour, rng) for each, colour in zip(chosen, colours, strict=True)])


def reconstruction_loss(output: Tensor, real: Tensor) -> Tensor:
    """Sum L1, L2 and the L1 of neighbours' differences, which keeps edges sharp."""
    error = output - real
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def make_report(args: argparse.Namespace, emoji: list[Subject], vae: AutoencoderKL) -> Callable[[], str]:
    """Make a function that reports PSNR on 64 composites and draws them next to their reconstructions."""
    probe = sample_composites(emoji, np.random.default_rng(1), 64)

    @torch.no_grad()
    def report() -> str:
        posterior = vae.encode(probe).latent_dist
        output = vae.decode(posterior.mode()).sample
        pairs = np.stack([to_images(probe), to_images(output)], axis=1).reshape(-1, SIZE, SIZE, 3)
        save_sheet(pairs, 16, args.work / "vae.png")
        error = (output.clamp(-1, 1) - probe).square().mean(dim=(1, 2, 3))
        return f"PSNR {float((10 * torch.log10(4 / error)).mean()):.2f} dB  std {float(posterior.mean.std()):.3f}"

    return report
