"""The command line: ``sdonnx`` and its commands."""

import logging
import signal
import sys

import typer
from rich.text import Text

import sdonnx
from sdonnx.commands.bench import bench
from sdonnx.commands.decode import decode
from sdonnx.commands.export import export
from sdonnx.commands.listings import info, models, samplers
from sdonnx.commands.run import run
from sdonnx.commands.sensitivity import sensitivity
from sdonnx.show import err, log_handler

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Stable Diffusion on ONNX Runtime, without PyTorch: export a checkpoint once, then run it anywhere.",
)
for command in (export, sensitivity, run, decode, bench, info, models, samplers):
    app.command()(command)


def main() -> None:
    """The entry point: errors become one line on stderr and an exit code, 2 for usage and 1 for the rest."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[log_handler()])
    try:
        app(standalone_mode=True)
    except sdonnx.RequestError as error:
        _fail(error, 2)
    except sdonnx.SdonnxError as error:
        _fail(error, 1)
    except MemoryError:
        _fail(MemoryError("there is too little memory for this; choose a smaller size"), 1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second one would end in a traceback
        err.print("stopped")
        sys.exit(130)


def _fail(error: Exception, code: int) -> None:
    err.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
    sys.exit(code)
