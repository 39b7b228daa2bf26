"""The command line: ``sdonnx`` and its commands."""

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
from sdonnx.cli.console import err, log_handler

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Stable Diffusion on ONNX Runtime, without PyTorch: export a checkpoint once, then run it anywhere.",
)
for command in (export, sensitivity, run, decode, plan, bench, info, models, samplers):
    app.command()(command)


INTERRUPTED = 130
"""The exit code after a Ctrl-C, as typer and shells have it."""

PATIENCE = 2.0
"""Seconds after a Ctrl-C in which another one changes nothing, so that what tidies up isn't cut short."""


def main() -> None:
    """The entry point: errors become one line on stderr and an exit code, 2 for usage and 1 for the rest."""
    _interrupt_once()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[log_handler()])
    try:
        app(standalone_mode=True)
    except sdonnx.RequestError as error:
        _fail(error, 2)
    except sdonnx.SdonnxError as error:
        _fail(error, 1)
    except MemoryError:
        _fail(MemoryError("there is too little memory for this; choose a smaller size"), 1)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            err.print("stopped")
        raise


def _interrupt_once() -> None:
    """Makes an impatient second Ctrl-C end the command as the first one does."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # started in the background, where Ctrl-C is another's
    last = float("-inf")

    def interrupt(*_: object) -> None:
        nonlocal last
        if time.monotonic() - last > PATIENCE:
            last = time.monotonic()
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # the interpreter's end would die of it


def _fail(error: Exception, code: int) -> None:
    err.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
    sys.exit(code)
