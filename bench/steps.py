"""What the bundled model's pictures show, by sampler and steps: which sampler to take when there are few.

    python bench/steps.py --limit 116 --plot steps.png --json steps.json

Captions, seeds and the classifier that judges are bench/quality.py's. A sampler with two evaluations a step takes twice
the time for the same number of them.
"""

import argparse
import json
from pathlib import Path

from quality import Judge, draw
from samplers import plot
from sdonnx_models import DEFAULT
from sdonnx_runtime.sampling.registry import SAMPLERS

DISTILLED = ("lcm", "tcd")
"""For models distilled for them, which pictogram is not."""


def main() -> None:
    """Parses the arguments, draws with every sampler, judges, prints as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="?", default=DEFAULT)
    parser.add_argument("--steps", default="5,10,20", help="comma-separated; default: %(default)s")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--limit", type=int, default=116, metavar="N", help="pictures for each point, of 580")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    judge = Judge()
    cases = judge.cases(args.limit)
    counts = [int(steps) for steps in args.steps.split(",")]
    found: dict[str, dict[int, float]] = {}
    print(f"| sampler | {' | '.join(f'{steps} steps' for steps in counts)} |\n{'| --- ' * (len(counts) + 1)}|")
    for name in (name for name in SAMPLERS if name not in DISTILLED):
        found[name] = {}
        for steps in counts:
            settings = {"num_inference_steps": steps, "guidance_scale": args.guidance, "sampler": name}
            verdict = judge.look(draw(args.package, cases, settings, empty=False), cases)
            right = [first == case.subject for first, case in zip(verdict.ranked[:, 0], cases, strict=True)]
            found[name][steps] = sum(right) / len(right)
        print(f"| {name} | {' | '.join(f'{share:.0%}' for share in found[name].values())} |", flush=True)
    if args.plot is not None:
        plot(found, args.plot, "pictures that show what was asked for, by steps", powers=False)
    if args.json is not None:
        args.json.write_text(json.dumps({"pictures": len(cases), "shares": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
