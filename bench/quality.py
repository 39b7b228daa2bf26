"""Measure the quality of a pictogram package: what its images show, and how close they are to a reference.

    python bench/quality.py                                       # the bundled package
    python bench/quality.py PACKAGE --reference OTHER --steps 12 --sampler euler --json FILE
    python bench/quality.py pictogram --reference pictogram --fast  # the cost of --fast
    python bench/quality.py pictogram --lora grey.safetensors     # the effect of an adapter
    python bench/quality.py pictogram --embedding teal.safetensors --background "<teal>" 0 140 140
    python bench/quality.py --unet unet.xml --reference pictogram # OpenVINO's U-Net, by openvino_pictogram.py
    python bench/quality.py --device openvino --reference pictogram --limit 290  # against the CPU provider

Each of the 290 subjects is generated twice: on a background of the training data, and on the one that was held out. A
small classifier (models/pictogram/train.py) names the subjects of the images. The VAE is measured by the PSNR of real
composites after encoding and decoding.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino_models
from PIL import Image
from sdonnx_models import DEFAULT
from sdonnx_runtime.execution.session import Session

import sdonnx
from sdonnx.benchmark.report import psnr
from sdonnx.cli.parsing import parse_embedding, parse_lora
from sdonnx.loading import find_model

JUDGE = Path(__file__).parents[1] / "models" / "pictogram"
FIRST_SEED = 1_000_000
MAX_PSNR = 10 * math.log10(255**2 / 1e-3)
"""Stands for the PSNR of equal images."""

Loras = Sequence[sdonnx.Lora]
Embeddings = Sequence[tuple[Path, str | None]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image to generate."""

    subject: int
    """Index of the subject."""
    background: str
    caption: str
    seed: int
    unseen: bool
    """Whether this subject on this background was held out of the training."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The classification of a package's images."""

    images: np.ndarray
    """(N, 64, 64, 3) uint8."""
    background: np.ndarray
    """(N,) bool: the requested colour is the nearest one to the border's median."""
    border: np.ndarray
    """(N, 3): the border's median."""
    ranked: np.ndarray
    """(N, subjects): indices, most likely first."""
    features: np.ndarray
    """(N, 192)."""


class Judge:
    """The classifier, and statistics of real composites."""

    def __init__(self) -> None:
        self.facts = json.loads((JUDGE / "judge.json").read_text(encoding="utf-8"))
        real = np.load(JUDGE / "judge.npz")
        self.mean, self.covariance = real["mean"], real["covariance"]
        self.names = list(self.facts["backgrounds"])
        self.colours = np.array(list(self.facts["backgrounds"].values()), np.float32)  # (10, 3)
        self._session = onnxruntime.InferenceSession(JUDGE / "judge.onnx", providers=["CPUExecutionProvider"])

    def cases(self, limit: int | None, background: str | None = None) -> list[Case]:
        """Return ``limit`` of the fixed captions and seeds, evenly; ``background`` replaces each caption's own."""
        cases = [
            Case(subject=index, background=own, caption=_caption(name, own), seed=seed, unseen=unseen)
            for seed, (index, name, each, unseen) in enumerate(self._pairs(), FIRST_SEED)
            for own in [each if background is None else background]
        ]
        indices = np.linspace(0, len(cases) - 1, len(cases) if limit is None else limit).astype(int)
        return [cases[index] for index in indices]

    def _pairs(self) -> Iterator[tuple[int, str, str, bool]]:
        for index, (name, held_out) in enumerate(zip(self.facts["subjects"], self.facts["held_out"], strict=True)):
            trained = [colour for colour in self.names if colour != held_out]
            yield index, name, trained[index * 7 % len(trained)], False
            yield index, name, held_out, True

    def add_colour(self, name: str, colour: list[int]) -> None:
        """Add a background that an adapter was trained on."""
        self.names.append(name)
        self.colours = np.append(self.colours, np.array([colour], np.float32), axis=0)

    def classify(self, images: np.ndarray, cases: list[Case]) -> Verdict:
        """Classify images, (N, 64, 64, 3) uint8."""
        inputs = images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        logits, features = self._session.run(None, {"images": inputs})
        sides = (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1])
        border = np.median(np.concatenate(sides, axis=1), axis=1)  # (N, 3)
        nearest = np.linalg.norm(border[:, None] - self.colours, axis=2).argmin(axis=1)
        requested = np.array([self.names.index(case.background) for case in cases])
        return Verdict(
            images=images,
            background=nearest == requested,
            border=border,
            ranked=np.argsort(-logits, axis=1),
            features=features,
        )

    def frechet(self, features: np.ndarray) -> float:
        """Return the Fréchet distance to the features of real composites, arXiv:1706.08500."""
        mean, covariance = features.mean(axis=0), np.cov(features.T)
        root = _square_root(self.covariance)
        cross = np.trace(_square_root(root @ covariance @ root))
        spread = np.trace(covariance) + np.trace(self.covariance) - 2 * cross
        return float(np.square(mean - self.mean).sum() + spread)


def _square_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _caption(name: str, background: str) -> str:
    first, second = ("an" if word[0] in "aeiou" else "a" for word in (name, background))
    return f"{first} {name} on {second} {background} background"


def generate(
    package: str,
    cases: list[Case],
    settings: dict[str, Any],
    *,
    empty: bool,
    unet: Path | None = None,
    loras: Loras = (),
    embeddings: Embeddings = (),
    device: str = "cpu",
    compute: str = "auto",
) -> np.ndarray:
    """Generate an image for each case, (N, 64, 64, 3) uint8; ``unet`` is an OpenVINO model that replaces the U-Net."""
    opened = sdonnx.Package.open(find_model(package))
    open_model = openvino_models.model_opener({} if unet is None else {"unet": unet})
    with sdonnx.Pipeline(opened, device=device, compute=compute, memory="max", open_model=open_model) as pipe:
        pipe.set_loras(loras)
        pipe.set_embeddings(embeddings)
        images = [
            pipe.generate("" if empty else case.caption, seed=case.seed, width=64, height=64, **settings).images[0]
            for case in cases
        ]
    return np.stack([np.asarray(image) for image in images])


def reconstruction_psnr(package: str, device: str, compute: str) -> float:
    """Return the mean PSNR of real composites after the package's VAE encoded and decoded them, dB."""
    opened = sdonnx.Package.open(find_model(package))
    graphs = (opened.graph(name) for name in ("vae_encoder", "vae_decoder"))
    encode, decode = (Session(graph, device=device, compute=compute) for graph in graphs)
    images = np.load(JUDGE / "composites.npz")["images"]  # (64, 64, 64, 3)
    values = images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    (moments,) = encode.run({"sample": values}).values()
    (decoded,) = decode.run({"latent_sample": moments[:, : opened.manifest.latents.channels]}).values()
    pairs = zip(np.clip(decoded, -1, 1), values, strict=True)
    return float(np.mean([psnr(output, expected, peak=2) for output, expected in pairs]))


def summary(judge: Judge, verdict: Verdict, cases: list[Case]) -> dict[str, float]:
    """Return shares of correct images, 0 to 1: of all, of trained and of held-out combinations."""
    subject, unseen = np.array([case.subject for case in cases]), np.array([case.unseen for case in cases])
    correct = {
        "background": verdict.background,
        "top1": verdict.ranked[:, 0] == subject,
        "top5": (verdict.ranked[:, :5] == subject[:, None]).any(axis=1),
    }
    groups = {"": np.ones(len(cases), bool), "_seen": ~unseen, "_unseen": unseen}
    shares = {
        name + group: float(hits[members].mean()) for name, hits in correct.items() for group, members in groups.items()
    }
    return {**shares, "frechet": judge.frechet(verdict.features)}


def compare(verdict: Verdict, reference: Verdict) -> dict[str, float]:
    """Compare images with the reference package's, which have the same captions and seeds."""
    from skimage.metrics import structural_similarity

    pairs = list(zip(verdict.images, reference.images, strict=True))
    near = [min(psnr(a, b, peak=255), MAX_PSNR) for a, b in pairs]
    return {
        "psnr_median": float(np.median(near)),
        "psnr_lowest": float(min(near)),
        "ssim_median": float(np.median([structural_similarity(a, b, channel_axis=2) for a, b in pairs])),
        "subject_changed": float((verdict.ranked[:, 0] != reference.ranked[:, 0]).mean()),
    }


def measure_adapters(
    args: argparse.Namespace, images: np.ndarray, generate_with: Callable[[str, Loras], np.ndarray]
) -> dict:
    """Measure the effect of adapters on the images' colours, and its similarity to the effect on the reference."""

    def colourfulness(images: np.ndarray) -> float:
        return float((images.max(axis=3) - images.min(axis=3)).mean() / 255)

    plain = generate_with(args.package, ())
    figures = {"colour_without": colourfulness(plain), "colour_with": colourfulness(images)}
    if args.reference is None:
        return figures
    change = images.astype(float) - plain
    expected = generate_with(args.reference, args.lora).astype(float) - generate_with(args.reference, ())
    size = np.linalg.norm(change) / np.linalg.norm(expected)
    cosine = (change * expected).sum() / np.linalg.norm(change) / np.linalg.norm(expected)
    return {**figures, "change_cosine": float(cosine), "change_size": float(size)}


def speed_options(args: argparse.Namespace) -> dict:
    """Return the request's fields that trade quality for speed."""
    interval = None if args.guidance_interval is None else tuple(args.guidance_interval)
    fields = {
        "cache_interval": args.cache_interval,
        "token_downsampling": args.token_downsampling,
        "guidance_interval": interval,
    }
    return {
        **(sdonnx.FAST if args.fast else {}),
        **{name: value for name, value in fields.items() if value is not None},
    }


def main() -> None:
    """Generate, classify, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="?", default=DEFAULT)
    parser.add_argument("--reference", metavar="PACKAGE", help="compare with this package's images")
    parser.add_argument("--unet", type=Path, metavar="FILE.xml", help="run this OpenVINO model as the package's U-Net")
    parser.add_argument("--device", default="cpu", help="as of sdonnx run, for the package; the reference is the CPU's")
    parser.add_argument("--compute", default="auto", help="likewise")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sampler", help="default: the package's own")
    parser.add_argument("--cache-interval", type=int, help="for the package, not for the reference")
    parser.add_argument("--token-downsampling", action=argparse.BooleanOptionalAction, help="likewise")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="likewise")
    parser.add_argument("--fast", action="store_true", help="sdonnx.FAST, likewise; the options above change it")
    parser.add_argument("--lora", type=parse_lora, action="append", metavar="FILE[:SCALE]", help="likewise")
    parser.add_argument("--embedding", type=parse_embedding, action="append", metavar="FILE[:WORD]")
    parser.add_argument("--background", nargs=4, metavar=("WORD", "R", "G", "B"), help="replaces all others")
    parser.add_argument("--limit", type=int, metavar="N", help="generate N images instead of 580")
    parser.add_argument("--empty", action="store_true", help="use an empty prompt, as a control")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="save a contact sheet of all images")
    args = parser.parse_args()
    judge = Judge()
    if args.background is not None:
        judge.add_colour(args.background[0], [int(value) for value in args.background[1:]])
    cases = judge.cases(args.limit, None if args.background is None else args.background[0])
    settings = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "sampler": args.sampler}
    speed = speed_options(args)
    loras, embeddings = tuple(args.lora or ()), tuple(args.embedding or ())
    where = {"device": args.device, "compute": args.compute}
    own = {"unet": args.unet, "loras": loras, "embeddings": embeddings, **where}
    images = generate(args.package, cases, {**settings, **speed}, empty=args.empty, **own)
    verdict = judge.classify(images, cases)
    figures = {"images": len(cases), **where, **settings, **speed, "empty": args.empty}
    figures |= summary(judge, verdict, cases)
    if args.background is not None:
        figures["border"] = np.median(verdict.border, axis=0).round().astype(int).tolist()
    figures |= {"vae_psnr": reconstruction_psnr(args.package, **where), "judge_accuracy": judge.facts["accuracy"]}
    if loras:
        same = {"empty": args.empty, **where}
        figures |= measure_adapters(
            args, images, lambda package, loras: generate(package, cases, settings, loras=loras, **same)
        )
    elif args.reference is not None:
        reference = generate(args.reference, cases, settings, empty=args.empty)
        figures |= compare(verdict, judge.classify(reference, cases))
    for name, value in figures.items():
        print(f"{name:20} {value:.4f}" if isinstance(value, float) else f"{name:20} {value}")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if args.sheet is not None:
        contact_sheet(verdict.images).save(args.sheet)


def contact_sheet(images: np.ndarray, columns: int = 20) -> Image.Image:
    """Arrange images in a grid."""
    missing = -len(images) % columns
    padded = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
    rows = padded.reshape(-1, columns, *images.shape[1:])  # (rows, columns, 64, 64, 3)
    return Image.fromarray(rows.transpose(0, 2, 1, 3, 4).reshape(-1, columns * 64, 3))


if __name__ == "__main__":
    main()
