"""Train pictogram, the bundled model, on two CPU cores in about two hours.

`python models/pictogram/train.py --work DIR` runs the stages that are not done yet. It can be stopped and started again
at any time: the randomness of a step depends on the seed and the step's number alone. Requires the `test` extra.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from composites import subjects
from stage_judge import train_judge
from stage_release import release
from stage_unet import train_unet
from stage_vae import train_vae
from trainer import STEPS


def main() -> None:
    """Run the stages in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="directory for downloads, checkpoints and samples")
    parser.add_argument("--stage", choices=[*STEPS, "release"], help="run this stage only")
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


if __name__ == "__main__":
    main()
