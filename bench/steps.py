"""Share of the bundled model's images that show their prompt, by sampler and number of steps.

    python bench/steps.py --limit 116 --plot steps.png --json steps.json

Captions, seeds and classifier are those of bench/quality.py. A sampler with two U-Net evaluations per step takes twice
the time for the same number of steps.
"""

import argparse
import json
from pathlib import Path

from quality import Judge, generate
from samplers import plot
from sdonnx_models import DEFAULT
from sdonnx_runtime.sampling.registry import SAMPLERS

DISTILLED = ("lcm", "tcd")
"""Samplers for distilled models, which pictogram is not."""


def main() -> None:
    """Generate with every sampler, classify, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="?", default=DEFAULT)
    parser.add_argument("--steps", default="5,10,20", help="comma-separated; default: %(default)s")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--limit", type=int, default=116, metavar="N", help="images for each point, of 580")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    judge = Judge()
    cases = judge.cases(args.limit)
    counts = [int(steps) for steps in args.steps.split(",")]
    shares: dict[str, dict[int, float]] = {}
    print(f"| sampler | {' | '.join(f'{steps} steps' for steps in counts)} |\n{'| --- ' * (len(counts) + 1)}|")
    for name in (name for name in SAMPLERS if name not in DISTILLED):
        shares[name] = {}
        for steps in counts:
            settings = {"num_inference_steps": steps, "guidance_scale": args.guidance, "sampler": name}
            verdict = judge.classify(generate(args.package, cases, settings, empty=False), cases)
            right = [first == case.subject for first, case in zip(verdict.ranked[:, 0], cases, strict=True)]
            shares[name][steps] = sum(right) / len(right)
        print(f"| {name} | {' | '.join(f'{share:.0%}' for share in shares[name].values())} |", flush=True)
    if args.plot is not None:
        plot(shares, args.plot, "images that show their prompt, by steps", log_scale=False)
    if args.json is not None:
        args.json.write_text(json.dumps({"images": len(cases), "shares": shares}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
