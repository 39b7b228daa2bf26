"""A fuzzing campaign: mutated inputs go to a parser in a process of its own, which may crash, hang or be killed."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from sdonnx_runtime.errors import SdonnxError

from support.fuzz.mutators import Mutate
from support.paths import ROOT

MAX_SECONDS = 10
"""The CPU's, of one case; more is a hang. Of a machine that is busy with others, it may be six times as many."""

MAX_MEMORY, MAX_FACTOR = 200_000_000, 10
"""Bytes that a case may add to the process, and so many times the size of its input."""

_GUARD = 4 << 30
"""Bytes of address space that a campaign may add, so that the machine survives what it finds."""

_MAX_FAILURES = 20


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parser of untrusted input."""

    seeds: Sequence[bytes]
    """Inputs as the real writers make them; all are accepted."""
    mutate: Mutate
    read: Callable[[bytes], object]
    """Reads an input, or raises SdonnxError."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What came of a campaign."""

    cases: int
    accepted: int
    refused: int
    seconds: float
    """Of the whole."""
    slowest: float
    """Seconds of the slowest case."""
    memory: int
    """Bytes that the process grew by, at its peak."""
    failures: tuple[str, ...]
    """Cases with another outcome, one for each place in the code."""

    def __str__(self) -> str:
        lines = [
            f"{self.cases} cases: {self.accepted} accepted, {self.refused} refused, {len(self.failures)} failed; "
            f"{self.seconds:.0f} s, slowest {self.slowest:.2f} s, {self.memory / 1e6:.0f} MB",
            *self.failures,
        ]
        return "\n".join(lines)


def run_campaign(name: str, *, cases: int | None = None, seconds: float | None = None, first: int = 0) -> Figures:
    """Run mutations of a parser in PARSERS: so many, or for some seconds; ``first`` numbers the first.

    A process that dies is a failure, and another goes on behind the case that killed it.
    """
    start, failures, states = time.monotonic(), list[str](), list[np.ndarray]()
    remaining, case = cases, first
    while (remaining is None or remaining > 0) and len(failures) < _MAX_FAILURES:
        left = None if seconds is None else seconds - (time.monotonic() - start)
        if left is not None and left <= 0:
            break
        code, state, found = _run_worker(name, case, remaining, left)
        failures += [each for each in found if _kind(each) not in set(map(_kind, failures))]
        states.append(state)
        if code == 0:
            break
        if state[0] == 0:
            failures.append(f"no case: the process ended with {code}")
            break
        last = case + int(state[0]) - 1
        failures.append(f"case {last}: the process ended with {_code_name(code)}")
        remaining, case = None if cases is None else cases - (last + 1 - first), last + 1
    done, accepted, refused = (int(sum(state[index] for state in states)) for index in range(3))
    return Figures(
        cases=done, accepted=accepted, refused=refused, seconds=time.monotonic() - start,
        slowest=max(state[3] for state in states), memory=int(max(state[4] for state in states)),
        failures=tuple(failures),
    )  # fmt: skip


def _run_worker(name: str, first: int, cases: int | None, seconds: float | None) -> tuple[int, np.ndarray, list[str]]:
    """The exit code, the state, and the failures of a worker."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_scratch()) as folder:
        arguments = [name, str(first), str(cases or 0), str(seconds or 0), folder]
        paths = os.pathsep.join([str(ROOT / "tests"), *sys.path])
        program = "import sys; from support.fuzz.campaign import work; work(*sys.argv[1:])"
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        ended = subprocess.run([sys.executable, "-c", program, *arguments], env=environment, check=False)
        state = np.zeros(5)
        if (Path(folder) / "state").exists():
            state = np.fromfile(Path(folder) / "state")
        failures = Path(folder) / "failures"
        return ended.returncode, state, failures.read_text().splitlines() if failures.exists() else []


def _scratch() -> str | None:
    """A folder in memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _code_name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else str(code)


def work(name: str, first: str, cases: str, seconds: str, folder: str) -> None:
    """A worker's main function: runs cases, and keeps its state in files, which survive a crash."""
    from support.fuzz.parsers import PARSERS

    logging.disable()
    warnings.simplefilter("ignore")
    inputs = Path(folder) / "inputs"
    inputs.mkdir()
    target = PARSERS[name](inputs)
    for seed in target.seeds:
        target.read(seed)
    state = np.memmap(Path(folder) / "state", np.float64, "w+", shape=5)
    baseline, failed = _peak_memory(), set[str]()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _GUARD, used + _GUARD))
    with (Path(folder) / "failures").open("w", 1) as failures:
        for case in _numbers(int(first), int(cases), float(seconds)):
            peak = _peak_memory()
            data = make_input(target, case)
            baseline += _peak_memory() - peak  # a mutation may repeat a part many times
            state[0] += 1
            start = time.perf_counter()
            _limit_time(MAX_SECONDS)
            problem, is_accepted = examine(target, data)
            _limit_time(0)
            state[3] = max(state[3], time.perf_counter() - start)
            state[4] = _peak_memory() - baseline
            if problem is None and state[4] > MAX_MEMORY + MAX_FACTOR * len(data):
                problem = f"memory: {state[4] / 1e6:.0f} MB for {len(data)} bytes"
                baseline += int(state[4])
            state[1 if is_accepted else 2] += problem is None
            found = f"case {case}: {problem}"
            if problem is not None and _kind(found) not in failed and len(failed) < _MAX_FAILURES:
                failed.add(_kind(found))
                failures.write(f"{found}\n")


def _limit_time(seconds: float) -> None:
    """End this process after so many seconds of the CPU, whatever it is doing; 0 ends nothing."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds)


def _kind(failure: str) -> str:
    """What failures at one place have in common."""
    return failure.split(": ")[1]


def _numbers(first: int, cases: int, seconds: float) -> Iterator[int]:
    """Those of the cases to run: so many, or until the CPU has worked so long on them."""
    case, start = first, time.process_time()
    while time.process_time() - start < (seconds or float("inf")) and (cases == 0 or case < first + cases):
        yield case
        case += 1


def make_input(target: Target, case: int) -> bytes:
    """The input of a case, always the same."""
    rng = Random(case)
    return target.mutate(rng, rng.choice(target.seeds), target.seeds)


def examine(target: Target, data: bytes) -> tuple[str | None, bool]:
    """What is wrong with the outcome of an input, and whether it was accepted."""
    try:
        target.read(data)
    except SdonnxError as error:
        return _message_problem(error), False
    except Exception as error:
        return f"{type(error).__name__} in {_place(error)}: {error}".replace("\n", " ")[:300], False
    return None, True


def _message_problem(error: SdonnxError) -> str | None:
    text, cause = str(error), error.__context__
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"MemoryError in {_place(cause)}"
        cause = cause.__context__
    if not text.isprintable() or not text or len(text) > 2000:
        return f"no printable line of at most 2000 characters from {_place(error)}: {json.dumps(text[:200])}"
    return None


def _place(error: BaseException) -> str:
    """The innermost line of sdonnx in an error's traceback."""
    traceback, place = error.__traceback__, "?"
    while traceback is not None:
        path = Path(traceback.tb_frame.f_code.co_filename)
        if "sdonnx" in path.as_posix().removeprefix(str(ROOT)):
            place = f"{path.name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
