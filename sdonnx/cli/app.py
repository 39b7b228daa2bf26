"""The ``sdonnx`` command line: the app, its commands, its exit codes."""

import atexit
import logging
import signal
import sys
import time

import typer
from rich.text import Text

import sdonnx
from sdonnx.cli.commands.bench import bench
from sdonnx.cli.commands.decode import decode
from sdonnx.cli.commands.export import export
from sdonnx.cli.commands.info import info, models, samplers
from sdonnx.cli.commands.plan import plan
from sdonnx.cli.commands.run import run
from sdonnx.cli.commands.sensitivity import sensitivity
from sdonnx.cli.console import OUT_OF_MEMORY, err, log_handler

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Stable Diffusion on ONNX Runtime, without PyTorch: export a checkpoint once, then run it anywhere.",
)
for command in (run, export, decode, models, samplers, info, plan, bench, sensitivity):
    app.command()(command)


INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells and typer."""

PATIENCE = 2.0
"""Seconds after a Ctrl-C in which a second one is ignored, so that clean-up can finish."""


def main() -> None:
    """Run the command line; an error becomes one line on stderr and an exit code: 2 for usage, 1 for the rest."""
    _debounce_interrupts()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[log_handler()])
    try:
        app(standalone_mode=True)
    except sdonnx.RequestError as error:
        _fail(error, 2)
    except sdonnx.SdonnxError as error:
        _fail(error, 1)
    except MemoryError:
        _fail(MemoryError(OUT_OF_MEMORY), 1)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            err.print("stopped")
        raise


def _debounce_interrupts() -> None:
    """Ignore a second Ctrl-C shortly after the first."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # in the background, Ctrl-C belongs to another process
    last = float("-inf")

    def interrupt(*_: object) -> None:
        nonlocal last
        if time.monotonic() - last > PATIENCE:
            last = time.monotonic()
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # else a Ctrl-C during shutdown prints a traceback


def _fail(error: Exception, code: int) -> None:
    err.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
    sys.exit(code)
