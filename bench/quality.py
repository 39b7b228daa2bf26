"""How good a package of pictogram is: what its pictures show, how near they are to real ones and to another package's.

    python bench/quality.py                                       # the bundled package
    python bench/quality.py PACKAGE --reference OTHER --steps 12 --sampler euler --json FILE
    python bench/quality.py pictogram --reference pictogram --fast  # what --fast costs
    python bench/quality.py pictogram --lora grey.safetensors     # what an adapter does, and whether --reference agrees
    python bench/quality.py pictogram --embedding teal.safetensors --background "<teal>" 0 140 140
    python bench/quality.py --unet unet.xml --reference pictogram # OpenVINO's U-Net, as openvino_models.py makes it

Each of the 290 subjects is drawn twice: on a background that training showed it on and on the one it was kept from.
A small classifier, trained on renderings of its own (models/pictogram/train.py), says what the pictures show. The VAE
is judged by what becomes of real composites that it encodes and decodes.
"""

import argparse
import json
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
from sdonnx.cli.parsing import parse_embedding, parse_lora
from sdonnx.loading import find_model

JUDGE = Path(__file__).parents[1] / "models" / "pictogram"
FIRST_SEED = 1_000_000

Loras = Sequence[sdonnx.Lora]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One picture to make."""

    subject: int
    """Index of the subject."""
    background: str
    caption: str
    seed: int
    unseen: bool
    """Whether training never showed this subject on this background."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was seen in a package's pictures."""

    pictures: np.ndarray
    """(N, 64, 64, 3) uint8."""
    background: np.ndarray
    """(N,) bool: the named colour is the one nearest to the border's median."""
    border: np.ndarray
    """(N, 3): its median."""
    ranked: np.ndarray
    """(N, subjects): indices, likeliest first."""
    features: np.ndarray
    """(N, 192)."""


class Judge:
    """The classifier and what is known about it and the real composites."""

    def __init__(self) -> None:
        self.facts = json.loads((JUDGE / "judge.json").read_text(encoding="utf-8"))
        real = np.load(JUDGE / "judge.npz")
        self.mean, self.covariance = real["mean"], real["covariance"]
        self.names = list(self.facts["backgrounds"])
        self.colours = np.array(list(self.facts["backgrounds"].values()), np.float32)  # (10, 3)
        self._session = onnxruntime.InferenceSession(JUDGE / "judge.onnx", providers=["CPUExecutionProvider"])

    def cases(self, limit: int | None, background: str | None = None) -> list[Case]:
        """The fixed captions and seeds; a limit takes them evenly. ``background`` is instead of each caption's own."""
        made = [
            Case(subject=index, background=own, caption=_caption(name, own), seed=seed, unseen=unseen)
            for seed, (index, name, each, unseen) in enumerate(self._pairs(), FIRST_SEED)
            for own in [each if background is None else background]
        ]
        chosen = np.linspace(0, len(made) - 1, len(made) if limit is None else limit).astype(int)
        return [made[index] for index in chosen]

    def _pairs(self) -> Iterator[tuple[int, str, str, bool]]:
        for index, (name, never) in enumerate(zip(self.facts["subjects"], self.facts["held_out"], strict=True)):
            seen = [colour for colour in self.names if colour != never]
            yield index, name, seen[index * 7 % len(seen)], False
            yield index, name, never, True

    def add_colour(self, name: str, colour: list[int]) -> None:
        """One more background, that an adapter knows."""
        self.names.append(name)
        self.colours = np.append(self.colours, np.array([colour], np.float32), axis=0)

    def look(self, pictures: np.ndarray, cases: list[Case]) -> Verdict:
        """(N, 64, 64, 3) uint8 judged."""
        inputs = pictures.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        logits, features = self._session.run(None, {"pictures": inputs})
        sides = (pictures[:, 0], pictures[:, -1], pictures[:, :, 0], pictures[:, :, -1])
        border = np.median(np.concatenate(sides, axis=1), axis=1)  # (N, 3)
        nearest = np.linalg.norm(border[:, None] - self.colours, axis=2).argmin(axis=1)
        named = np.array([self.names.index(case.background) for case in cases])
        return Verdict(
            pictures=pictures,
            background=nearest == named,
            border=border,
            ranked=np.argsort(-logits, axis=1),
            features=features,
        )

    def frechet(self, features: np.ndarray) -> float:
        """Fréchet distance of Gaussians fitted to features, arXiv:1706.08500, to the real composites'."""
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


def draw(
    package: str, cases: list[Case], settings: dict, *, empty: bool, unet: Path | None = None, **adapters: Any
) -> np.ndarray:
    """(N, 64, 64, 3) uint8, one picture for each case; ``unet`` is OpenVINO's model of it."""
    with sdonnx.load(package, memory="max", **adapters) as pipe:
        if unet is not None:
            openvino_models.attach(pipe, {"unet": unet})
        made = [
            pipe.generate("" if empty else case.caption, seed=case.seed, width=64, height=64, **settings).images[0]
            for case in cases
        ]
    return np.stack([np.asarray(image) for image in made])


def reconstruction(package: str) -> float:
    """Mean PSNR, dB, of real composites after the package's VAE has encoded and decoded them."""
    opened = sdonnx.Package.open(find_model(package))
    encode, decode = (Session(opened.graph(name), device="cpu") for name in ("vae_encoder", "vae_decoder"))
    pictures = np.load(JUDGE / "composites.npz")["pictures"]  # (64, 64, 64, 3)
    values = pictures.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    (moments,) = encode.run({"sample": values}).values()
    (made,) = decode.run({"latent_sample": moments[:, : opened.manifest.latents.channels]}).values()
    error = np.square((np.clip(made, -1, 1) - values) / 2).mean(axis=(1, 2, 3))
    return float((-10 * np.log10(error)).mean())


def summary(judge: Judge, verdict: Verdict, cases: list[Case]) -> dict[str, float]:
    """Shares from 0 to 1, for all pictures and for the combinations that training showed and did not."""
    subject, unseen = np.array([case.subject for case in cases]), np.array([case.unseen for case in cases])
    right = {
        "background": verdict.background,
        "top1": verdict.ranked[:, 0] == subject,
        "top5": (verdict.ranked[:, :5] == subject[:, None]).any(axis=1),
    }
    groups = {"": np.ones(len(cases), bool), "_seen": ~unseen, "_unseen": unseen}
    found = {name + group: float(hits[rows].mean()) for name, hits in right.items() for group, rows in groups.items()}
    return {**found, "frechet": judge.frechet(verdict.features)}


def compared(verdict: Verdict, reference: Verdict) -> dict[str, float]:
    """How far pictures are from those of the reference package with the same captions and seeds."""
    from skimage.metrics import structural_similarity

    error = np.square(verdict.pictures.astype(float) - reference.pictures).mean(axis=(1, 2, 3))
    pairs = zip(verdict.pictures, reference.pictures, strict=True)
    return {
        "psnr_median": float(np.median(10 * np.log10(255**2 / np.maximum(error, 1e-3)))),
        "ssim_median": float(np.median([structural_similarity(a, b, channel_axis=2) for a, b in pairs])),
        "subject_changed": float((verdict.ranked[:, 0] != reference.ranked[:, 0]).mean()),
    }


def adapted(args: argparse.Namespace, made: np.ndarray, draw_plain: Callable[[str, Loras], np.ndarray]) -> dict:
    """What adapters change: how colourful pictures are, 0 to 1; and whether a package changes as the reference does."""

    def colour(pictures: np.ndarray) -> float:
        return float((pictures.max(axis=3) - pictures.min(axis=3)).mean() / 255)

    plain = draw_plain(args.package, ())
    found = {"colour_without": colour(plain), "colour_with": colour(made)}
    if args.reference is None:
        return found
    change = made.astype(float) - plain
    wanted = draw_plain(args.reference, args.lora).astype(float) - draw_plain(args.reference, ())
    size = np.linalg.norm(change) / np.linalg.norm(wanted)
    cosine = (change * wanted).sum() / np.linalg.norm(change) / np.linalg.norm(wanted)
    return {**found, "change_cosine": float(cosine), "change_size": float(size)}


def chosen(args: argparse.Namespace) -> dict:
    """The fields of a request that make it faster at some loss."""
    interval = None if args.guidance_interval is None else tuple(args.guidance_interval)
    given = {"reuse": args.reuse, "token_downsampling": args.token_downsampling, "guidance_interval": interval}
    return {**(sdonnx.FAST if args.fast else {}), **{name: value for name, value in given.items() if value is not None}}


def main() -> None:
    """Parses the arguments, draws, judges, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="?", default=DEFAULT)
    parser.add_argument("--reference", metavar="PACKAGE", help="compare with this package's pictures")
    parser.add_argument("--unet", type=Path, metavar="FILE.xml", help="let OpenVINO run this as the package's U-Net")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sampler", help="default: the package's own")
    parser.add_argument("--reuse", type=int, help="the package's request has it, not the reference's")
    parser.add_argument("--token-downsampling", action=argparse.BooleanOptionalAction, help="so too")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="so too")
    parser.add_argument("--fast", action="store_true", help="sdonnx.FAST, so too; the options above change it")
    parser.add_argument("--lora", type=parse_lora, action="append", metavar="FILE[:SCALE]", help="so too")
    parser.add_argument("--embedding", type=parse_embedding, action="append", metavar="FILE[:WORD]")
    parser.add_argument("--background", nargs=4, metavar=("WORD", "R", "G", "B"), help="instead of all others")
    parser.add_argument("--limit", type=int, metavar="N", help="make N pictures instead of 580")
    parser.add_argument("--empty", action="store_true", help="give no prompt, to see what the prompts do")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="FILE.png", help="write all pictures on one sheet")
    args = parser.parse_args()
    judge = Judge()
    if args.background is not None:
        judge.add_colour(args.background[0], [int(value) for value in args.background[1:]])
    cases = judge.cases(args.limit, None if args.background is None else args.background[0])
    settings = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "sampler": args.sampler}
    lossy = chosen(args)
    loras, embeddings = tuple(args.lora or ()), tuple(args.embedding or ())
    adapters = {"loras": loras, "embeddings": embeddings}
    made = draw(args.package, cases, {**settings, **lossy}, empty=args.empty, unet=args.unet, **adapters)
    verdict = judge.look(made, cases)
    found = {"pictures": len(cases), **settings, **lossy, "empty": args.empty, **summary(judge, verdict, cases)}
    if args.background is not None:
        found["border"] = np.median(verdict.border, axis=0).round().astype(int).tolist()
    found |= {"vae_psnr": reconstruction(args.package), "judge_accuracy": judge.facts["accuracy"]}
    if loras:
        found |= adapted(args, made, lambda package, own: draw(package, cases, settings, empty=args.empty, loras=own))
    elif args.reference is not None:
        found |= compared(verdict, judge.look(draw(args.reference, cases, settings, empty=args.empty), cases))
    for name, value in found.items():
        print(f"{name:20} {value:.4f}" if isinstance(value, float) else f"{name:20} {value}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if args.keep is not None:
        sheet(verdict.pictures).save(args.keep)


def sheet(pictures: np.ndarray, columns: int = 20) -> Image.Image:
    """All pictures side by side."""
    missing = -len(pictures) % columns
    padded = np.concatenate([pictures, np.zeros((missing, *pictures.shape[1:]), np.uint8)])
    rows = padded.reshape(-1, columns, *pictures.shape[1:])  # (rows, columns, 64, 64, 3)
    return Image.fromarray(rows.transpose(0, 2, 1, 3, 4).reshape(-1, columns * 64, 3))


if __name__ == "__main__":
    main()
