"""Train pictogram's two adapters with diffusers and peft, in a quarter of an hour on two CPU cores.

`python models/pictogram/train_adapters.py --work DIR` writes adapters/grey.safetensors, a LoRA of rank 4 that removes
the colours, and adapters/teal.safetensors, a textual inversion with the trigger word "<teal>", a background that the
model was not trained on. Requires the `test` extra.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from composites import BACKGROUNDS, Subject, caption, compose, subjects
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from trainer import half, to_tensor

HERE = Path(__file__).parent
TEAL = (0, 140, 140)
BATCH = 32
SNR_CAP = 5.0
"""Min-SNR weighting, arXiv:2303.09556."""


def encode(pipe: StableDiffusionPipeline, images: list[np.ndarray]) -> Tensor:
    """Encode composites to scaled latents, (N, 4, 16, 16)."""
    with torch.no_grad():
        batches = [to_tensor(images[start : start + 64]) for start in range(0, len(images), 64)]
        latents = torch.cat([pipe.vae.encode(batch).latent_dist.mean for batch in batches])
    return latents * pipe.vae.config.scaling_factor


def fit(
    pipe: StableDiffusionPipeline,
    parameters: list[Tensor],
    latents: Tensor,
    embed: Callable[[np.ndarray, np.random.Generator], Tensor],
    *,
    steps: int,
    rate: float,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Train noise prediction; ``embed`` returns the text encoder's states for latents by index."""
    alphas = pipe.scheduler.alphas_cumprod
    weights = (SNR_CAP / (alphas / (1 - alphas))).clamp(max=1.0)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        rng = np.random.default_rng([1, step])
        torch.manual_seed(step)
        chosen = rng.integers(0, len(latents), BATCH)
        clean = latents[torch.from_numpy(chosen)]
        noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (BATCH,))
        with half():
            states = embed(chosen, rng)
            predicted = pipe.unet(pipe.scheduler.add_noise(clean, noise, timesteps), timesteps, states).sample
        loss = ((predicted.float() - noise).square().mean(dim=(1, 2, 3)) * weights[timesteps]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 50) * (1 - step / steps)
        optimizer.step()
        after_step()
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            print(f"{step + 1}/{steps}  loss {np.mean(losses[-100:]):.4f}", flush=True)


def encode_captions(pipe: StableDiffusionPipeline, captions: list[str]) -> Tensor:
    """Encode captions to the text encoder's states, (N, 32, 192)."""
    ids = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return pipe.text_encoder(ids).last_hidden_state


def train_grey(pipe: StableDiffusionPipeline, emoji: list[Subject], steps: int) -> None:
    """Train the LoRA on grey images whose captions name colours."""
    rng, images, pairs = np.random.default_rng(7), [], []
    for index in range(len(emoji)):
        for colour in rng.choice(list(BACKGROUNDS), 4, replace=False):
            image = Image.fromarray(compose(emoji[index].art, BACKGROUNDS[str(colour)], rng)).convert("L")
            images.append(np.asarray(image.convert("RGB")))
            pairs.append((index, str(colour)))
    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=layers))

    def embed(chosen: np.ndarray, rng: np.random.Generator) -> Tensor:
        captions = [caption(str(rng.choice(emoji[pairs[index][0]].names)), pairs[index][1], rng) for index in chosen]
        with torch.no_grad():
            return encode_captions(pipe, ["" if rng.random() < 0.1 else each for each in captions])

    trained = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    fit(pipe, trained, encode(pipe, images), embed, steps=steps, rate=2e-3)
    state = {name: value.half() for name, value in get_peft_model_state_dict(pipe.unet).items()}
    StableDiffusionPipeline.save_lora_weights(
        HERE / "adapters", unet_lora_layers=state, weight_name="grey.safetensors", safe_serialization=True
    )


def train_teal(pipe: StableDiffusionPipeline, emoji: list[Subject], steps: int) -> None:
    """Train two embedding vectors, from those of "green" and "blue"."""
    rng = np.random.default_rng(8)
    order = rng.permutation(len(emoji)).repeat(3)
    images = [compose(emoji[index].art, TEAL, rng) for index in order]
    pipe.tokenizer.add_tokens(["<teal>", "<teal_1>"])
    table = pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False).weight
    with torch.no_grad():
        table[-2:] = table[pipe.tokenizer("green blue", add_special_tokens=False).input_ids]
    before = table.detach().clone()
    for parameter in [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]:
        parameter.requires_grad_(parameter is table)

    def embed(chosen: np.ndarray, rng: np.random.Generator) -> Tensor:
        captions = [caption(str(rng.choice(emoji[order[index]].names)), "red", rng) for index in chosen]
        captions = [each.replace("red background", "<teal> <teal_1> background") for each in captions]
        return encode_captions(pipe, captions)

    def restore_others() -> None:
        with torch.no_grad():
            table[:-2] = before[:-2]

    fit(pipe, [table], encode(pipe, images), embed, steps=steps, rate=1e-2, after_step=restore_others)
    save_file({"<teal>": table[-2:].detach().clone()}, HERE / "adapters" / "teal.safetensors")


def main() -> None:
    """Train the adapters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="directory for downloads")
    parser.add_argument("--only", choices=["grey", "teal"])
    parser.add_argument("--grey-steps", type=int, default=1200)
    parser.add_argument("--teal-steps", type=int, default=800)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    (HERE / "adapters").mkdir(exist_ok=True)
    for name, train in (("grey", train_grey), ("teal", train_teal)):
        if args.only in (None, name):
            pipe = StableDiffusionPipeline.from_pretrained(HERE / "checkpoint", torch_dtype=torch.float32)
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
            for module in (pipe.unet, pipe.text_encoder, pipe.vae):
                module.requires_grad_(False)
            train(pipe, subjects(args.work), getattr(args, f"{name}_steps"))


if __name__ == "__main__":
    main()
