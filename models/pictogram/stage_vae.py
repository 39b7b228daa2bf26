"""The first stage: the VAE."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from composites import BACKGROUNDS, SIZE, Subject, compose
from diffusers import AutoencoderKL
from torch import Tensor
from trainer import BATCH, Trainer, half, sheet, to_images, to_tensor


def new_vae() -> AutoencoderKL:
    """64 pixels to 16x16 latents of four channels."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=8,
    )  # fmt: skip


def train_vae(args: argparse.Namespace, emoji: list[Subject]) -> None:
    """Encoder and decoder together, with a little KL divergence."""
    torch.manual_seed(args.seed)
    vae = new_vae()

    def loss_of(rng: np.random.Generator) -> Tensor:
        real = colourful(emoji, rng, BATCH["vae"])
        with half():
            posterior = vae.encode(real).latent_dist
            made = vae.decode(posterior.sample()).sample.float()
        return difference(made, real) + 1e-4 * posterior.kl().mean() / 1024

    Trainer("vae", vae, args).run(loss_of, 500, reconstructions(args, emoji, vae))
    vae.save_pretrained(args.work / "vae")


def colourful(emoji: list[Subject], rng: np.random.Generator, size: int) -> Tensor:
    """Composites, (N, 3, 64, 64); a quarter of them on any colour, so that the VAE knows more than ten."""
    chosen = [emoji[index] for index in rng.integers(0, len(emoji), size)]
    named = list(BACKGROUNDS.values())
    colours = [
        named[rng.integers(len(named))] if rng.random() < 0.75 else tuple(rng.integers(0, 256, 3).tolist())
        for _ in chosen
    ]
    return to_tensor([compose(each.art, colour, rng) for each, colour in zip(chosen, colours, strict=True)])


def difference(made: Tensor, real: Tensor) -> Tensor:
    """L1, L2 and the L1 of neighbours' differences, which is what keeps edges crisp."""
    error = made - real
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def reconstructions(args: argparse.Namespace, emoji: list[Subject], vae: AutoencoderKL) -> Callable[[], str]:
    """Reports PSNR on 64 composites and draws them beside what becomes of them."""
    probe = colourful(emoji, np.random.default_rng(1), 64)

    @torch.no_grad()
    def report() -> str:
        posterior = vae.encode(probe).latent_dist
        made = vae.decode(posterior.mode()).sample
        pairs = np.stack([to_images(probe), to_images(made)], axis=1).reshape(-1, SIZE, SIZE, 3)
        sheet(pairs, 16, args.work / "vae.png")
        error = (made.clamp(-1, 1) - probe).square().mean(dim=(1, 2, 3))
        return f"PSNR {float((10 * torch.log10(4 / error)).mean()):.2f} dB  std {float(posterior.mean.std()):.3f}"

    return report
