"""Train the U-Net, the text encoder and its tokenizer."""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from composites import BACKGROUNDS, Subject, caption, compose, held_out
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from trainer import BATCH, Trainer, half, save_sheet, to_images, to_tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.tokenization_clip import bytes_to_unicode

RENDERINGS = 12
"""Renderings of each subject on each background; they are encoded once, before training."""
MAX_LENGTH = 32
"""Tokens of a prompt, including start and end."""
SNR_CAP = 5.0
"""Min-SNR weighting, arXiv:2303.09556."""


def new_tokenizer(args: argparse.Namespace, emoji: list[Subject]) -> CLIPTokenizer:
    """Train a byte-pair encoding with CLIP's order of tokens: bytes, bytes that end a word, merges."""
    rng = np.random.default_rng(0)
    words = [caption(name, colour, rng) for each in emoji for name in each.names for colour in BACKGROUNDS]
    alphabet = list(bytes_to_unicode().values())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|[0-9]|[^\sa-z0-9]+"), "removed", invert=True)
    trainer = trainers.BpeTrainer(
        vocab_size=1600, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = alphabet + [char + "</w>" for char in alphabet] + ["".join(merge) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder = args.work / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(dict.fromkeys(tokens))}))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_LENGTH, pad_token="<|endoftext|>"
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Make a text encoder of two layers, to be trained with the U-Net."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=192, intermediate_size=768, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=MAX_LENGTH, hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, projection_dim=192,
        )
    )  # fmt: skip


def new_unet() -> UNet2DConditionModel:
    """Make a U-Net of three levels with cross-attention at the two lower ones."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 160), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=192, attention_head_dim=4,
    )  # fmt: skip


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def train_unet(args: argparse.Namespace, emoji: list[Subject]) -> None:
    """Train noise prediction on cached latents; a tenth of the captions is empty, for classifier-free guidance."""
    vae = AutoencoderKL.from_pretrained(args.work / "vae")
    names, colours, posteriors = encode(args, emoji, vae)
    vae.config.scaling_factor = round(1 / float(posteriors[:, :4].float().std()), 5)
    vae.register_to_config(scaling_factor=vae.config.scaling_factor)
    vae.save_pretrained(args.work / "vae")
    tokenizer = new_tokenizer(args, emoji)
    torch.manual_seed(args.seed)
    both = nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)})
    trainer = Trainer("unet", both, args)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    alphas = scheduler.alphas_cumprod
    signal_to_noise = alphas / (1 - alphas)

    def embed(captions: list[str]) -> Tensor:
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return both["text_encoder"](ids).last_hidden_state

    def loss_fn(rng: np.random.Generator) -> Tensor:
        chosen = rng.integers(0, len(names), BATCH["unet"])
        captions = [
            "" if rng.random() < 0.1 else caption(str(rng.choice(emoji[names[index]].names)), colours[index], rng)
            for index in chosen
        ]
        mean, std = posteriors[torch.from_numpy(chosen)].float().chunk(2, dim=1)
        latents = (mean + std * torch.randn_like(std)) * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(chosen),))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with half():
            predicted = both["unet"](noisy, timesteps, embed(captions)).sample
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        return (error * (SNR_CAP / signal_to_noise[timesteps]).clamp(max=1.0)).mean()

    rng = np.random.default_rng(3)
    probes = [
        caption(emoji[index].name, list(BACKGROUNDS)[rng.integers(10)], rng) for index in rng.integers(0, 290, 32)
    ]
    probes[0] = "a red apple on a blue background"

    @torch.no_grad()
    def report() -> str:
        scheduler.set_timesteps(25)
        text = torch.cat([embed([""] * len(probes)), embed(probes)])
        x = torch.randn((len(probes), 4, 16, 16), generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            empty, full = both["unet"](torch.cat([x, x]), t, text).sample.chunk(2)
            x = scheduler.step(empty + 4 * (full - empty), t, x).prev_sample
        save_sheet(to_images(vae.decode(x / vae.config.scaling_factor).sample), 8, args.work / "unet.png")
        return probes[1]

    trainer.run(loss_fn, 500, report)
    both["unet"].save_pretrained(args.work / "unet")
    both["text_encoder"].save_pretrained(args.work / "text_encoder")
    tokenizer.save_pretrained(args.work / "tokenizer")


@torch.no_grad()
def encode(args: argparse.Namespace, emoji: list[Subject], vae: AutoencoderKL) -> tuple[np.ndarray, list[str], Tensor]:
    """Encode every rendering: subject indices, backgrounds, and the posterior's mean and deviation, (N, 8, 16, 16)."""
    pairs = [
        (index, colour)
        for index, left_out in enumerate(held_out(len(emoji)))
        for colour in BACKGROUNDS
        if colour != left_out
        for _ in range(RENDERINGS)
    ]
    path = args.work / "latents.pt"
    if not path.is_file():
        rng, moments = np.random.default_rng([args.seed, 9]), []
        for start in range(0, len(pairs), 64):
            batch = pairs[start : start + 64]
            images = [compose(emoji[index].art, BACKGROUNDS[colour], rng) for index, colour in batch]
            posterior = vae.encode(to_tensor(images)).latent_dist
            moments.append(torch.cat([posterior.mean, posterior.std], dim=1).half())
        torch.save(torch.cat(moments), path)
    return np.array([index for index, _ in pairs]), [colour for _, colour in pairs], torch.load(path)
