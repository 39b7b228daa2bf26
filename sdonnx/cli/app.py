"""The ``sdonnx`` command line: the app, its commands, its exit codes."""

import errno
import logging
import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.text import Text
from sdonnx_runtime.execution.devices.choosing import DEVICE_NOTES
from sdonnx_runtime.storage.staging import delete_remaining

import sdonnx
from sdonnx.cli.commands.bench import bench
from sdonnx.cli.commands.decode import decode
from sdonnx.cli.commands.export import export
from sdonnx.cli.commands.info import info, models, samplers
from sdonnx.cli.commands.plan import plan
from sdonnx.cli.commands.run import run
from sdonnx.cli.commands.sensitivity import sensitivity
from sdonnx.cli.commands.serve import serve
from sdonnx.cli.commands.tokens import tokens
from sdonnx.cli.commands.upscale import upscale
from sdonnx.cli.console import OUT_OF_MEMORY, LogHandler, err, out
from sdonnx.cli.signals import run_until_signal
from sdonnx.cli.streams import OutputError, one_line, prepare_streams

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Stable Diffusion on ONNX Runtime, without PyTorch: export a checkpoint once, then run it anywhere.",
)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(f"sdonnx {version('sdonnx')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


for command in (run, serve, export, upscale, decode, models, samplers, info, tokens, plan, bench, sensitivity):
    app.command()(command)


def main() -> None:
    """Run the command line.

    An error becomes one line on stderr and an exit code: 2 for usage, 1 for the rest, 128 plus its number for a signal.
    """
    prepare_streams()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[LogHandler()])
    logging.getLogger(DEVICE_NOTES).setLevel(logging.INFO)
    try:
        run_until_signal(app, clean_up=delete_remaining)
    except sdonnx.RequestError as error:
        _fail(str(error), 2)
    except sdonnx.SdonnxError as error:
        _fail(str(error), 1)
    except MemoryError:
        _fail(OUT_OF_MEMORY, 1)
    except UnicodeEncodeError as error:  # of a file name, in a locale with an old encoding
        _fail(f"{error.object!r} can't be a file name in {error.encoding}; set LC_ALL=C.UTF-8", 1)
    except OSError as error:  # of a path that nothing else has refused
        place = error.filename or ("the working directory" if error.errno == errno.ENOENT else "a file")
        _fail(f"{place} can't be used: {error.strerror or error}; give another path", 1)
    except OutputError as error:
        if error.reader_left:
            sys.exit(1)
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    err.print(Text.assemble(("error:", "bold red"), f" {one_line(message)}"), soft_wrap=True)
    sys.exit(code)
