"""Run fuzzing campaigns: ``python -m support.fuzz [PARSER…] --cases 100000``; or one case, with its traceback."""

import argparse
import sys
import tempfile
from pathlib import Path

from support.fuzz.campaign import make_input, run_campaign
from support.fuzz.parsers import PARSERS


def main() -> None:
    """Print the figures of each campaign; the exit code is 1 if one failed."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("parsers", nargs="*", metavar="PARSER", help=f"all by default: {', '.join(PARSERS)}")
    arguments.add_argument("--cases", type=int, default=100_000, help="mutations of each")
    arguments.add_argument("--first", type=int, default=0, help="number of the first one")
    arguments.add_argument("--case", type=int, help="read this one here; print its input, and its traceback")
    asked = arguments.parse_args()
    if asked.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            target = PARSERS[asked.parsers[0]](Path(folder))
            data = make_input(target, asked.case)
            sys.stdout.write(f"{data!r:.10000}\n")
            target.read(data)
        return
    failed = False
    for name in asked.parsers or PARSERS:
        figures = run_campaign(name, cases=asked.cases, first=asked.first)
        failed |= bool(figures.failures)
        sys.stdout.write(f"{name}: {figures}\n")
        sys.stdout.flush()
    sys.exit(failed)


if __name__ == "__main__":
    main()
