"""Train the classifier of bench/quality.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from composites import BACKGROUNDS, SIZE, Subject, compose, held_out
from torch import Tensor, nn
from trainer import BATCH, Trainer, half, to_tensor

HERE = Path(__file__).parent


class Judge(nn.Module):
    """A residual network that classifies the subject of an image."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (32, 64, 128, 192)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(*(_Residual(a, b) for a, b in zip((32, *widths[:-1]), widths, strict=True)))
        self.head = nn.Linear(192, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, 64, 64) in [-1, 1] to logits, (N, classes), and features, (N, 192)."""
        features = self.blocks(self.stem(images)).mean(dim=(2, 3))
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
    """Train on renderings with any background colour, more sizes, blur and noise; write the model and its figures."""
    torch.manual_seed(args.seed)
    judge = Judge(len(emoji))
    trainer = Trainer("judge", judge, args)

    def loss_fn(rng: np.random.Generator) -> Tensor:
        labels = rng.integers(0, len(emoji), BATCH["judge"])
        colours = rng.integers(0, 256, (len(labels), 3)).tolist()
        pairs = zip(labels, colours, strict=True)
        images = to_tensor([compose(emoji[index].art, tuple(colour), rng, (38, 64)) for index, colour in pairs])
        if rng.random() < 0.5:
            images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
        images = images + torch.randn_like(images) * rng.uniform(0, 0.15)
        with half():
            logits, _ = judge(images)
        return F.cross_entropy(logits.float(), torch.from_numpy(labels), label_smoothing=0.05)

    rng = np.random.default_rng([args.seed, 77])
    labels = np.repeat(np.arange(len(emoji)), 20)
    named = list(BACKGROUNDS.values())
    real = [compose(emoji[index].art, named[rng.integers(len(named))], rng) for index in labels]

    @torch.no_grad()
    def classify() -> tuple[Tensor, Tensor]:
        parts = [judge(to_tensor(real[start : start + 256])) for start in range(0, len(real), 256)]
        return torch.cat([logits for logits, _ in parts]), torch.cat([features for _, features in parts])

    def accuracy() -> float:
        return float((classify()[0].argmax(1).numpy() == labels).mean())

    trainer.run(loss_fn, 500, lambda: f"accuracy {accuracy():.4f}")
    features = classify()[1].double().numpy()
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
        input_names=["images"], output_names=["logits", "features"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )  # fmt: skip
    model = onnx.load(HERE / "judge.onnx")
    for node in model.graph.node:
        del node.metadata_props[:]  # they hold file names of the machine that exported it
    onnx.save(model, HERE / "judge.onnx")
