"""``sdonnx serve``."""

import logging
import os
import socket
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from sdonnx_models import DEFAULT
from sdonnx_runtime.execution.ort import candidates
from sdonnx_runtime.libraries import required

import sdonnx
from sdonnx.cli.console import print_note
from sdonnx.cli.options import Cache, Compute, Device, Memory, Provenance, SafetyMode, Threads
from sdonnx.cli.signals import SIGNALS
from sdonnx.loading import find_model

if TYPE_CHECKING:
    from sdonnx.server.running import MakeRunner
    from sdonnx.server.settings import Settings

_ACCESS, _LIMITS, _CLUSTER = "Access", "Limits", "Cluster"
_BUNDLED = f"serving {DEFAULT}, the small bundled model; for a published one: sdonnx export sd15, then -m sd15-onnx"


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="PACKAGE",
            help="A package's directory, or its Hub id; the first is the default. Repeatable. Default: pictogram.",
        ),
    ] = None,
    models: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Folder whose subfolders are packages. Repeatable.")
    ] = None,
    lora_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for <lora:name:0.8> in prompts.")] = None,
    embedding_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of textual inversions.")] = None,
    wildcards: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for __name__ in prompts.")] = None,
    styles: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="AUTOMATIC1111's styles.csv.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the finished images.")
    ] = Path("sdonnx-images"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that other machines reach requires --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 7860,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="SDONNX_TOKEN",
            help="What clients must send: as Bearer token, or as password of Basic authentication.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Host name by which clients address the server. Repeatable.", rich_help_panel=_ACCESS
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Pages that may use the server, such as https://lite.koboldai.net. Repeatable.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    max_queued: Annotated[int, typer.Option(min=1, help="Jobs that may wait.", rich_help_panel=_LIMITS)] = 32,
    max_images: Annotated[int, typer.Option(min=1, help="Images of a job.", rich_help_panel=_LIMITS)] = 64,
    max_steps: Annotated[int, typer.Option(min=1, help="Steps of an image.", rich_help_panel=_LIMITS)] = 200,
    max_side: Annotated[
        int,
        typer.Option(min=64, help="Images are at most as large as this square.", rich_help_panel=_LIMITS),
    ] = 4096,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS|auto",
            help="Run the jobs on a Ray cluster, HOST:PORT; auto: this machine's, or one that is started.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    replicas: Annotated[
        str | None,
        typer.Option(
            metavar="MIN:MAX",
            help="Jobs that run at once, each with --threads and --memory. Default: 1 to what the nodes have room for.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    as_asked: Annotated[
        bool, typer.Option("--as-asked", help="Take clients' steps and guidance also where a model is distilled.")
    ] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Print prompts in the log.")] = False,
    safety: SafetyMode = "off",
    provenance: Provenance = True,
    device: Device = "auto",
    compute: Compute = "auto",
    threads: Threads = None,
    cache: Cache = True,
    memory: Memory = "auto",
) -> None:
    """Serve packages over HTTP: a page for browsers, AUTOMATIC1111's API, OpenAI's images API, and sdonnx' own.

    [dim]sdonnx serve[/dim]
    [dim]sdonnx serve -m sd15-onnx --models ~/packages --lora-dir ~/loras[/dim]
    [dim]sdonnx serve -m sd15-onnx --ray 192.168.1.7:6379 --replicas 1:4[/dim]
    [dim]SDONNX_TOKEN=... sdonnx serve --host 0.0.0.0 --allow-host nas.local[/dim]
    """
    with required('pip install "sdonnx[serve]"', purpose="sdonnx serve"):
        from sdonnx.server.serving import serve as run_server
        from sdonnx.server.settings import Settings
    if replicas is not None and ray is None:
        raise sdonnx.RequestError("--replicas requires --ray; add --ray auto, or the address of a Ray cluster")
    folders = {"--lora-dir": lora_dir, "--embedding-dir": embedding_dir, "--wildcards": wildcards}
    for option, folder in folders.items():
        if folder is not None and not folder.is_dir():
            raise sdonnx.RequestError(f"{folder} is not a directory; give another {option}")
    if ray is None and device != "auto":
        candidates(device)  # an absent one ends the server now, not its first job
    named = model or ([] if models else [DEFAULT])
    packages = tuple(find_model(each) for each in named)
    settings = Settings(
        packages=packages,
        model_folders=tuple(models or ()),
        output=output,
        host=host,
        port=port,
        token=token,
        allowed_hosts=tuple(allow_host or ()),
        cors=tuple(cors or ()),
        lora_folder=lora_dir,
        embedding_folder=embedding_dir,
        wildcard_folder=wildcards,
        styles=styles,
        device=device,
        compute=compute,
        threads=threads,
        cache=cache,
        memory=memory,
        max_queued=max_queued,
        max_images=max_images,
        max_steps=max_steps,
        max_pixels=max_side * max_side,
        as_asked=as_asked,
        log_prompts=log_prompts,
        safety=safety,
        provenance=provenance,
    )
    logging.getLogger("sdonnx.server").setLevel(logging.INFO)

    def print_url(url: str) -> None:
        if not model and not models:
            print_note(_BUNDLED)
        print_note(f"sdonnx answers at {url} in a browser; Ctrl-C stops it")
        print_note(f"A1111's API is at {url}/sdapi/v1, OpenAI's at {url}/v1")

    if ray is None:
        run_server(settings, print_url, SIGNALS.exit_at_once)  # a second signal does not wait
        return
    files = [each for each in (lora_dir, embedding_dir, wildcards, styles) if each is not None]
    with _replicas(ray, settings, replicas, named, files) as (used, make_runner):
        run_server(used, print_url, SIGNALS.exit_at_once, make_runner)


@contextmanager
def _replicas(
    address: str, settings: "Settings", asked: str | None, packages: Sequence[str], files: Sequence[Path]
) -> "Generator[tuple[Settings, MakeRunner], None, None]":
    """Connect to a Ray cluster, whose replicas run the jobs; gives the server's own settings too."""
    with required('pip install "sdonnx[cpu,ray,serve]"', purpose="sdonnx serve --ray"):
        from sdonnx.cluster.connection import connect
        from sdonnx.cluster.scaling import Bounds, choose_replicas
        from sdonnx.cluster.serving import replicas
    if asked is not None:
        Bounds.parse(asked)
    with connect(address) as is_started:
        SIGNALS.interrupt()  # Ray has a handler of its own
        chosen = choose_replicas(settings, asked, packages, files)
        where = "on a Ray cluster of this machine alone" if is_started else f"on the Ray cluster at {address}"
        memory = "" if chosen.memory is None else f" and {chosen.memory / 1e9:.1f} GB"
        threads = chosen.settings.threads
        print_note(
            f"jobs run {where}: {chosen.bounds}, each with {threads} thread{'s' if threads != 1 else ''}{memory}"
        )
        name = f"sdonnx-{socket.gethostname()}-{settings.port or os.getpid()}"
        with replicas(chosen, name) as make_runner:
            yield replace(settings, memory=chosen.settings.memory, threads=None), make_runner
