"""Shared by the stages of pictogram's training: the loop, and conversions of images and tensors."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

STEPS = {"vae": 6000, "unet": 8000, "judge": 4000}
BATCH = {"vae": 16, "unet": 64, "judge": 64}
RATE = {"vae": 8e-4, "unet": 6e-4, "judge": 2e-3}


class Trainer:
    """AdamW with warm-up, cosine decay and an exponential average of the weights; saves checkpoints and resumes."""

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

    def run(self, loss_fn: Callable[[np.random.Generator], Tensor], every: int, report: Callable[[], str]) -> None:
        """Train to the last step, saving and reporting each `every` steps; leave the averaged weights in the module."""
        started, first, losses = time.monotonic(), self.step, []
        while self.step < self.steps:
            losses.append(self._step(loss_fn))
            if self.step % every == 0 or self.step == self.steps:
                self._save()
                pace = (time.monotonic() - started) / (self.step - first)
                with self.averaged():
                    status = report()
                print(
                    f"{self.stage} {self.step}/{self.steps}  loss {np.mean(losses):.4f}  {status}  {pace:.3f} s/step",
                    flush=True,
                )
                losses = []
        self.module.load_state_dict(self.average)
        self.module.eval()

    def _step(self, loss_fn: Callable[[np.random.Generator], Tensor]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = RATE[self.stage] * self._lr_factor()
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        self.module.train()
        loss = loss_fn(np.random.default_rng([self.seed, list(STEPS).index(self.stage), self.step]))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, value in self.module.state_dict().items():
                if value.is_floating_point():
                    self.average[key].lerp_(value, 1 - decay)
                else:
                    self.average[key].copy_(value)
        return float(loss.detach())

    def _lr_factor(self) -> float:
        return min(1.0, (self.step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))

    def _save(self) -> None:
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "average": self.average, "step": self.step}, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def averaged(self) -> _Averaged:
        """Within this context the module has the averaged weights."""
        return _Averaged(self.module, self.average)


class _Averaged:
    def __init__(self, module: nn.Module, average: dict[str, Tensor]) -> None:
        self.module, self.average = module, average

    def __enter__(self) -> None:
        self.saved = {key: value.clone() for key, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.average)
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.load_state_dict(self.saved)


def half() -> torch.autocast:
    """Autocast to bfloat16: twice as fast on processors that have it."""
    return torch.autocast("cpu", torch.bfloat16)


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """Convert (N, 64, 64, 3) uint8 to (N, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(tensor: Tensor) -> np.ndarray:
    """Convert (N, 3, H, W) in [-1, 1] to (N, H, W, 3) uint8."""
    return ((tensor.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()


def save_sheet(images: np.ndarray, columns: int, path: Path) -> None:
    """Save (N, H, W, 3) as one image, upscaled by 3."""
    rows = [np.concatenate(list(images[start : start + columns]), axis=1) for start in range(0, len(images), columns)]
    image = Image.fromarray(np.concatenate(rows))
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(path)
