"""Trains pictogram, the model that comes with sdonnx, on two CPU cores in about two hours.

`python models/pictogram/train.py --work DIR` does whatever stage is not done yet and may be stopped and started again
at any time: every step's randomness is drawn from the seed and the step's number. Needs the `test` extra.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from composites import BACKGROUNDS, SIZE, Subject, caption, compose, held_out, subjects
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from sdonnx_export.export import export
from sdonnx_runtime.manifest import read_manifest, write_manifest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.tokenization_clip import bytes_to_unicode

HERE = Path(__file__).parent
STEPS = {"vae": 6000, "unet": 8000, "judge": 4000}
BATCH = {"vae": 16, "unet": 64, "judge": 64}
RATE = {"vae": 8e-4, "unet": 6e-4, "judge": 2e-3}
RENDERINGS = 12
"""Of each subject on each background, encoded once before the U-Net is trained."""
MAX_LENGTH = 32
"""Tokens of a prompt, with the two at its ends."""
SNR_CAP = 5.0
"""Min-SNR weighting, arXiv:2303.09556."""


def main() -> None:
    """Runs the stages in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="downloads, checkpoints and samples are kept here")
    parser.add_argument("--stage", choices=[*STEPS, "release"], help="one stage alone")
    parser.add_argument("--seed", type=int, default=0)
    for stage, steps in STEPS.items():
        parser.add_argument(f"--{stage}-steps", type=int, default=steps)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stages = {
        "vae": train_vae,
        "judge": train_judge,
        "unet": train_unet,
        "release": release,
    }
    for name, stage in stages.items():
        if args.stage in (None, name):
            stage(args, subjects(args.work))


# ---------------------------------------------------------------------------------------------------------------------


class Trainer:
    """AdamW with warm-up and cosine decay, an exponential average of the weights, and a checkpoint to go on from."""

    def __init__(self, stage: str, module: nn.Module, args: argparse.Namespace) -> None:
        self.stage, self.module, self.seed = stage, module, args.seed
        self.steps = getattr(args, f"{stage}_steps")
        self.path: Path = args.work / f"{stage}.pt"
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.average = {key: value.detach().clone() for key, value in module.state_dict().items()}
        self.step = 0
        if self.path.is_file():
            state = torch.load(self.path, weights_only=True)
            module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step = state["average"], state["step"]

    def run(self, loss_of: Callable[[np.random.Generator], Tensor], every: int, report: Callable[[], str]) -> None:
        """Trains to the last step; saves and reports each `every` steps. The module is left with its average."""
        started, first, losses = time.monotonic(), self.step, []
        while self.step < self.steps:
            losses.append(self._advance(loss_of))
            if self.step % every == 0 or self.step == self.steps:
                self._save()
                pace = (time.monotonic() - started) / (self.step - first)
                with self.averaged():
                    said = report()
                print(
                    f"{self.stage} {self.step}/{self.steps}  loss {np.mean(losses):.4f}  {said}  {pace:.3f} s/step",
                    flush=True,
                )
                losses = []
        self.module.load_state_dict(self.average)
        self.module.eval()

    def _advance(self, loss_of: Callable[[np.random.Generator], Tensor]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = RATE[self.stage] * self._decay()
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        self.module.train()
        loss = loss_of(np.random.default_rng([self.seed, list(STEPS).index(self.stage), self.step]))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, value in self.module.state_dict().items():
                if value.is_floating_point():
                    self.average[key].lerp_(value, 1 - keep)
                else:
                    self.average[key].copy_(value)
        return float(loss.detach())

    def _decay(self) -> float:
        return min(1.0, (self.step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))

    def _save(self) -> None:
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "average": self.average, "step": self.step}, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def averaged(self) -> _Averaged:
        """Within it the module has the averaged weights."""
        return _Averaged(self.module, self.average)


class _Averaged:
    def __init__(self, module: nn.Module, average: dict[str, Tensor]) -> None:
        self.module, self.average = module, average

    def __enter__(self) -> None:
        self.kept = {key: value.clone() for key, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.average)
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.load_state_dict(self.kept)


def half() -> torch.autocast:
    """bfloat16 where it does no harm: twice as fast on processors that have it."""
    return torch.autocast("cpu", torch.bfloat16)


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """(N, 64, 64, 3) uint8 to (N, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(tensor: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] to (N, H, W, 3) uint8."""
    return ((tensor.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()


def sheet(images: np.ndarray, columns: int, path: Path) -> None:
    """Writes (N, H, W, 3) as one picture, three times enlarged."""
    rows = [np.concatenate(list(images[at : at + columns]), axis=1) for at in range(0, len(images), columns)]
    picture = Image.fromarray(np.concatenate(rows))
    picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(path)


# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------


def new_tokenizer(args: argparse.Namespace, emoji: list[Subject]) -> CLIPTokenizer:
    """CLIP's byte-pair encoding with a vocabulary of its own, in CLIP's order: bytes, bytes that end a word, merges."""
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
    """Two layers, trained together with the U-Net."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=192, intermediate_size=768, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=MAX_LENGTH, hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, projection_dim=192,
        )
    )  # fmt: skip


def new_unet() -> UNet2DConditionModel:
    """Three levels; cross-attention at the two lower ones."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 160), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=192, attention_head_dim=4,
    )  # fmt: skip


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def train_unet(args: argparse.Namespace, emoji: list[Subject]) -> None:
    """Noise prediction over cached latents; a tenth of the captions is empty, for classifier-free guidance."""
    vae = AutoencoderKL.from_pretrained(args.work / "vae")
    names, colours, posteriors = encoded(args, emoji, vae)
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

    def loss_of(rng: np.random.Generator) -> Tensor:
        chosen = rng.integers(0, len(names), BATCH["unet"])
        captions = [
            "" if rng.random() < 0.1 else caption(str(rng.choice(emoji[names[at]].names)), colours[at], rng)
            for at in chosen
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
        sheet(to_images(vae.decode(x / vae.config.scaling_factor).sample), 8, args.work / "unet.png")
        return probes[1]

    trainer.run(loss_of, 500, report)
    both["unet"].save_pretrained(args.work / "unet")
    both["text_encoder"].save_pretrained(args.work / "text_encoder")
    tokenizer.save_pretrained(args.work / "tokenizer")


@torch.no_grad()
def encoded(args: argparse.Namespace, emoji: list[Subject], vae: AutoencoderKL) -> tuple[np.ndarray, list[str], Tensor]:
    """The subject's index, the background and the posterior's mean and deviation, (N, 8, 16, 16), of each rendering."""
    pairs = [
        (index, colour)
        for index, never in enumerate(held_out(len(emoji)))
        for colour in BACKGROUNDS
        if colour != never
        for _ in range(RENDERINGS)
    ]
    path = args.work / "latents.pt"
    if not path.is_file():
        rng, rows = np.random.default_rng([args.seed, 9]), []
        for at in range(0, len(pairs), 64):
            images = [compose(emoji[index].art, BACKGROUNDS[colour], rng) for index, colour in pairs[at : at + 64]]
            posterior = vae.encode(to_tensor(images)).latent_dist
            rows.append(torch.cat([posterior.mean, posterior.std], dim=1).half())
        torch.save(torch.cat(rows), path)
    return np.array([index for index, _ in pairs]), [colour for _, colour in pairs], torch.load(path)


# ---------------------------------------------------------------------------------------------------------------------


class Judge(nn.Module):
    """A residual network that names the subject of a picture, for bench/quality.py."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (32, 64, 128, 192)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(*(_Residual(a, b) for a, b in zip((32, *widths[:-1]), widths, strict=True)))
        self.head = nn.Linear(192, classes)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, 64, 64) in [-1, 1] to logits, (N, classes), and features, (N, 192)."""
        features = self.blocks(self.stem(pictures)).mean(dim=(2, 3))
        return self.head(features), features


class _Residual(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(inner, outer, 3, 2, 1), nn.Conv2d(outer, outer, 3, 1, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)])
        self.skip = nn.Conv2d(inner, outer, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norms[0](self.one(x)))
        return F.relu(self.norms[1](self.two(inner)) + self.skip(x))


def train_judge(args: argparse.Namespace, emoji: list[Subject]) -> None:
    """A classifier of its own renderings: any colour behind, more sizes, blurred and noisy; and its own figures."""
    torch.manual_seed(args.seed)
    judge = Judge(len(emoji))
    trainer = Trainer("judge", judge, args)

    def loss_of(rng: np.random.Generator) -> Tensor:
        labels = rng.integers(0, len(emoji), BATCH["judge"])
        colours = rng.integers(0, 256, (len(labels), 3)).tolist()
        images = to_tensor(
            [compose(emoji[at].art, tuple(colour), rng, (38, 64)) for at, colour in zip(labels, colours, strict=True)]
        )
        if rng.random() < 0.5:
            images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
        images = images + torch.randn_like(images) * rng.uniform(0, 0.15)
        with half():
            logits, _ = judge(images)
        return F.cross_entropy(logits.float(), torch.from_numpy(labels), label_smoothing=0.05)

    rng = np.random.default_rng([args.seed, 77])
    labels = np.repeat(np.arange(len(emoji)), 20)
    named = list(BACKGROUNDS.values())
    real = [compose(emoji[at].art, named[rng.integers(len(named))], rng) for at in labels]

    @torch.no_grad()
    def judged() -> tuple[Tensor, Tensor]:
        parts = [judge(to_tensor(real[at : at + 256])) for at in range(0, len(real), 256)]
        return torch.cat([logits for logits, _ in parts]), torch.cat([features for _, features in parts])

    def accuracy() -> float:
        return float((judged()[0].argmax(1).numpy() == labels).mean())

    trainer.run(loss_of, 500, lambda: f"accuracy {accuracy():.4f}")
    features = judged()[1].double().numpy()
    np.savez_compressed(HERE / "judge.npz", mean=features.mean(0), covariance=np.cov(features.T))
    facts = {
        "accuracy": round(accuracy(), 4),
        "renderings": len(real),
        "backgrounds": BACKGROUNDS,
        "subjects": [each.name for each in emoji],
        "held_out": held_out(len(emoji)),
    }
    (HERE / "judge.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    torch.onnx.export(
        judge, (torch.zeros(2, 3, SIZE, SIZE),), HERE / "judge.onnx", dynamo=True, external_data=False, verbose=False,
        input_names=["pictures"], output_names=["logits", "features"],
        dynamic_shapes={"pictures": {0: torch.export.Dim("batch")}},
    )  # fmt: skip
    model = onnx.load(HERE / "judge.onnx")
    for node in model.graph.node:
        del node.metadata_props[:]  # file names of whoever exported it
    onnx.save(model, HERE / "judge.onnx")


def release(args: argparse.Namespace, emoji: list[Subject]) -> None:
    """Writes the checkpoint (fp16, diffusers' layout), the package that the wheel carries, and some real composites."""
    work, checkpoint = args.work, HERE / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    scheduler = DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.register_to_config(skip_prk_steps=True)  # for whoever takes PNDM instead
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
    pictures = np.stack([compose(subject.art, colour, rng) for subject, colour in chosen])
    np.savez_compressed(HERE / "composites.npz", pictures=pictures)


if __name__ == "__main__":
    main()
