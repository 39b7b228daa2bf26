"""Kill exports, runs and batches at random moments, and check that nothing is lost and nothing stays.

python bench/kills.py --count 100 --fresh 20     # of each 100 trials, 20 start a process of their own; the others fork

After each kill, the user's files are as before, a package or an image is the old one or the new one and whole, and the
same command then succeeds and leaves nothing but its output. "Before sdonnx" are signals in Python's own start.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_OFFLINE="1", NO_COLOR="1")

import onnxruntime
import random_checkpoint
import sdonnx_export.export  # noqa: F401 — before the forks
from PIL import Image
from sdonnx_runtime.errors import SdonnxError
from sdonnx_runtime.packages.package import Package

from sdonnx.__main__ import main as run_cli
from sdonnx.cli import app  # noqa: F401 — before the forks

SIGNALS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}
"""With the exit code of a process that it ends."""

USERS_FILES = {
    "notes.txt": "mine",
    ".sdonnx-notes.tmp": "mine",
    ".sdonnx-0123456789abcdef.tmp/thesis.txt": "years of work",
    "out.old/thesis.txt": "years of work",
    ".out.calibration/thesis.txt": "years of work",
}
"""Files with names like those of temporaries."""

FAST = ["--steps", "1", "--seed", "1", "--size", "16x16", "--threads", "1"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line, and what it writes in its working directory."""

    arguments: tuple[str, ...]
    again: tuple[str, ...]
    """The command line that is to succeed afterwards."""
    outputs: tuple[str, ...]
    has_old: bool = False
    """Whether its outputs are there before."""


COMMANDS = {
    "export": Command(
        arguments=("export", "--vae", "../vae", "-o", "out"),
        again=("export", "--vae", "../vae", "-o", "out", "--force"),
        outputs=("out",),
    ),
    "export --force": Command(
        arguments=("export", "--vae", "../vae", "-o", "out", "--force"),
        again=("export", "--vae", "../vae", "-o", "out", "--force"),
        outputs=("out",),
        has_old=True,
    ),
    "run": Command(
        arguments=("run", "a cat", "-m", "pictogram", *FAST, "-o", "a.png", "--preview", "p.png"),
        again=("run", "a cat", "-m", "pictogram", *FAST, "-o", "a.png", "--preview", "p.png"),
        outputs=("a.png", "p.png"),
        has_old=True,
    ),
    "batch": Command(
        arguments=("run", "--batch-file", "../lines.txt", "-m", "pictogram", *FAST, "-o", "b.png"),
        again=("run", "--batch-file", "../lines.txt", "-m", "pictogram", *FAST, "-o", "b.png"),
        outputs=("b-0001.png", "b-0002.png", "b-0003.png"),
    ),
}


def prepare(base: Path) -> None:
    """Write VAEs, packages of them, and a batch file to ``base``."""
    small = {"block_out_channels": [32], "down_block_types": ["DownEncoderBlock2D"], "layers_per_block": 1}
    vae = {**random_checkpoint.SIZES["tiny"]["vae"], **small, "up_block_types": ["UpDecoderBlock2D"]}
    for seed, name in enumerate(("old", "new")):
        random_checkpoint.SIZES["vae"] = {"vae": vae}
        random_checkpoint.make(base / f"{name} checkpoint", "vae", seed=seed)
        exported = start_fork(("export", "--vae", f"{name} checkpoint/vae", "-o", name), base)
        assert exported.wait() == 0, exported.log.read_text()
    shutil.copytree(base / "new checkpoint" / "vae", base / "vae")
    (base / "lines.txt").write_text("a cat\na dog\na fox\n")


@dataclass(frozen=True, kw_only=True)
class Started:
    """A started command."""

    pid: int
    log: Path
    """Its stdout and stderr."""

    def wait(self) -> int:
        """Return the exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def start_process(arguments: tuple[str, ...], cwd: Path) -> Started:
    """Start ``python -m sdonnx``."""
    log = cwd.parent / f"{cwd.name}.log"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "sdonnx", *arguments]
        process = subprocess.Popen(command, cwd=cwd, stdout=stream, stderr=stream, start_new_session=True)
    process.returncode = 0  # `Started` waits
    return Started(pid=process.pid, log=log)


def start_fork(arguments: tuple[str, ...], cwd: Path) -> Started:
    """Start the command line in a fork of this process, which has loaded the libraries."""
    log = cwd.parent / f"{cwd.name}.log"
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            os.chdir(cwd)
            with log.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            sys.argv = ["sdonnx", *arguments]
            run_cli()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        finally:
            os._exit(code)
    return Started(pid=pid, log=log)


def trial(base: Path, command: Command, name: str, delay: float, start: Callable[..., Started]) -> dict[str, Any]:
    """Kill a command after ``delay`` seconds; return what was found, with the faults."""
    cwd = base / "work"
    shutil.rmtree(cwd, ignore_errors=True)
    for file, text in USERS_FILES.items():
        (cwd / file).parent.mkdir(parents=True, exist_ok=True)
        (cwd / file).write_text(text)
    if command.has_old:
        for output in command.outputs:
            if output == "out":
                shutil.copytree(base / "old", cwd / "out")
            else:
                Image.new("RGB", (4, 4)).save(cwd / output)
    started = start(command.arguments, cwd)
    time.sleep(delay)
    os.kill(started.pid, getattr(signal, name))
    code = started.wait()
    faults, log = list(check(base, command)), started.log.read_text()
    is_early = name != "SIGKILL" and (code == -getattr(signal, name) or "Traceback" in log) and "sdonnx" not in log
    if not is_early and (code not in (0, SIGNALS[name]) or (name != "SIGKILL" and "Traceback" in log)):
        faults.append(f"exit code {code}: {log[-2000:]}")
    if code in (130, 143) and not log.endswith("stopped\n"):
        faults.append(f"exit code {code} without 'stopped': {log[-2000:]}")
    left = strays(cwd, command)
    if left and code in (130, 143):
        faults.append(f"exit code {code} leaves {left}")
    again = start(command.again, cwd)
    if again.wait() != 0:
        faults.append(f"the next run fails: {again.log.read_text()[-2000:]}")
    faults += [f"then {fault}" for fault in check(base, command, ended=True)]
    if strays(cwd, command):
        faults.append(f"the next run leaves {strays(cwd, command)}")
    return {"code": code, "early": is_early, "left": bool(left), "faults": faults}


def check(base: Path, command: Command, *, ended: bool = False) -> Iterator[str]:
    """Yield what is wrong in the working directory."""
    cwd = base / "work"
    for file, text in USERS_FILES.items():
        if not (cwd / file).is_file() or (cwd / file).read_text() != text:
            yield f"the user's {file} is lost"
    for output in command.outputs:
        path = cwd / output
        if not path.exists():
            if ended or (command.has_old and output != "p.png"):
                yield f"{output} is lost"
        elif path.is_dir():
            digest = package_digest(path)
            olds = ["new"] if ended else ["old", "new"]
            if digest not in {package_digest(base / old) for old in olds}:
                yield f"{output} is neither the old package nor the new one"
        else:
            try:
                Image.open(path).load()
            except OSError as error:
                yield f"{output} is broken: {error}"


def package_digest(directory: Path) -> str:
    """Open a package, compare its files with their SHA-256, and return a digest of those."""
    try:
        components = Package.open(directory).manifest.components
    except SdonnxError as error:
        return str(error)
    digest = hashlib.sha256()
    for component in components.values():
        for name, file in component.files.items():
            found = hashlib.sha256((directory / name).read_bytes()).hexdigest()
            if found != file.sha256:
                return f"{name} is damaged"
            digest.update(name.encode() + found.encode())
    return digest.hexdigest()


def strays(cwd: Path, command: Command) -> list[str]:
    """Return the entries that are neither the user's nor an output."""
    known = {*command.outputs, *(file.split("/")[0] for file in USERS_FILES)}
    return sorted({path.name for path in cwd.iterdir()} - known)


def campaign(
    base: Path, titles: list[str], count: int, fresh: int, rng: random.Random
) -> Iterator[tuple[str, str, Counter[str], list[str]]]:
    """Try these commands with each signal ``count`` times, ``fresh`` of them in new processes."""
    sources = {path: path.read_bytes() for path in (base / "vae").rglob("*") if path.is_file()}
    for title, command in ((title, COMMANDS[title]) for title in titles):
        starts = [(start, number) for start, number in ((start_process, fresh), (start_fork, count - fresh)) if number]
        seconds = {start: duration(base, command, start) for start, _ in starts}
        for name in SIGNALS:
            counts, faults = Counter[str](), list[str]()
            for start, number in starts:
                for _ in range(number):
                    found = trial(base, command, name, rng.uniform(0, 1.1 * seconds[start]), start)
                    counts["trials"] += 1
                    counts["killed"] += found["code"] != 0
                    counts["before sdonnx"] += found["early"]
                    counts["left something"] += found["left"]
                    counts["faults"] += bool(found["faults"])
                    faults += found["faults"]
            if any(path.read_bytes() != content for path, content in sources.items()):
                faults.append("the source is changed")
            yield title, name, counts, faults


def duration(base: Path, command: Command, start: Callable[..., Started]) -> float:
    """Return the seconds that a command takes."""
    (base / "timed").mkdir()
    began = time.perf_counter()
    ended = start(command.arguments, base / "timed")
    assert ended.wait() == 0, ended.log.read_text()
    seconds = time.perf_counter() - began
    shutil.rmtree(base / "timed")
    return seconds


def main() -> None:
    """Print a table, and exit with 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--count", type=int, default=100, help="trials of each command with each signal")
    parser.add_argument("--fresh", type=int, default=20, help="of these, those in new processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in the background
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        prepare(base)
        print(f"onnxruntime {onnxruntime.__version__}, Python {sys.version.split()[0]}, {sys.platform}\n")
        columns = ("trials", "killed", "before sdonnx", "left something", "faults")
        print(f"| command | signal | {' | '.join(columns)} |\n{'| --- ' * (len(columns) + 2)}|")
        for title, name, counts, faults in campaign(
            base, args.commands, args.count, args.fresh, random.Random(args.seed)
        ):
            print(f"| {title} | {name} | {' | '.join(str(counts[each]) for each in columns)} |", flush=True)
            rows.append({"command": title, "signal": name, **counts, "details": faults})
            failed = failed or bool(faults)
            for fault in faults:
                print(f"    {fault}", file=sys.stderr, flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    main()
