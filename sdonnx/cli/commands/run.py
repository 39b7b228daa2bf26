"""``sdonnx run``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from sdonnx_models import DEFAULT
from sdonnx_runtime.images.canny import canny
from sdonnx_runtime.images.preprocess import UPSCALERS, flatten_alpha, open_image
from sdonnx_runtime.libraries import required
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.request import FIELDS, IMAGE_TO_IMAGE, SPEED

import sdonnx
from sdonnx.cli.batch import generate_batch, read_batch
from sdonnx.cli.console import print_note, print_report, print_safety, result_json
from sdonnx.cli.generate import OutputPaths, generate
from sdonnx.cli.options import (
    SERVERS,
    Cache,
    Compute,
    Device,
    Memory,
    Provenance,
    SafetyMode,
    Threads,
    Vae,
    add_request_options,
    parse_request,
    request_option,
)
from sdonnx.cli.parsing import (
    decode_argument,
    is_url,
    parse_control,
    parse_embedding,
    parse_lora,
    parse_margins,
    parse_refiner,
)
from sdonnx.loading import find_model


@add_request_options(after="output")
def run(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help=FIELDS["prompt"].help, show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="PACKAGE",
            help="A package's directory, or its Hub id. Default: pictogram, the small bundled model.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT.png",
            help="Output file; with several images the seed is appended. Default: sdonnx-SEED.png.",
        ),
    ] = None,
    enlarge: Annotated[
        bool, typer.Option("--enlarge/--no-enlarge", help="Save the output of very small models upscaled.")
    ] = True,
    grid: Annotated[
        bool, typer.Option("--grid", help="Also save several images as one, in rows and columns: OUT-grid.png.")
    ] = False,
    vae: Vae = None,
    refiner: Annotated[str | None, request_option("refiner_start")] = None,
    hires_upscaler: Annotated[str | None, request_option("hires_upscaler")] = None,
    control: Annotated[list[str] | None, request_option("controls")] = None,
    control_preprocessor: Annotated[
        Literal["canny"] | None,
        typer.Option(help="Preprocess the conditioning image (canny edges).", rich_help_panel=IMAGE_TO_IMAGE),
    ] = None,
    ip_adapter: Annotated[list[str] | None, request_option("ip_adapters")] = None,
    outpaint: Annotated[
        str | None,
        typer.Option(
            metavar="L,T,R,B",
            help="Outpaint by this many pixels: left, top, right, bottom.",
            rich_help_panel=IMAGE_TO_IMAGE,
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:SCALE]",
            help="LoRA, LyCORIS or DoRA file (.safetensors). Repeatable.",
            rich_help_panel="Adapters",
        ),
    ] = None,
    lora_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for <lora:name:0.8> in prompts.", rich_help_panel="Adapters"),
    ] = None,
    lora_ignore_unmatched: Annotated[
        bool,
        typer.Option(
            "--lora-ignore-unmatched", help="Ignore keys without a matching layer.", rich_help_panel="Adapters"
        ),
    ] = False,
    embedding: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:WORD]",
            help="Textual inversion file and its trigger word. Repeatable.",
            rich_help_panel="Adapters",
        ),
    ] = None,
    wildcards: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for __name__ in prompts: NAME.txt with a choice per line.",
            rich_help_panel="Prompts",
        ),
    ] = None,
    styles: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="AUTOMATIC1111's styles.csv, for --style.", rich_help_panel="Prompts"),
    ] = None,
    style: Annotated[list[str] | None, request_option("styles")] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help=f"Preset: --cache-interval {sdonnx.FAST['cache_interval']} --token-downsampling.",
            rich_help_panel=SPEED,
        ),
    ] = False,
    batch_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Batch file: one prompt per line (.txt) or one request per line (.jsonl)."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL[,URL…]",
            help="Generate on machines that run [b]sdonnx serve[/b]; -m is a name that they serve. Each takes the next "
            "line of a batch when it is free. A batch that was stopped goes on when the command is repeated: "
            "NAME.journal beside the images lists the lines that are done, until all are.",
            rich_help_panel=SERVERS,
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="T", envvar="SDONNX_TOKEN", help="The servers' token; or http://:T@HOST.", rich_help_panel=SERVERS
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto",
            help="Generate a batch on a Ray cluster; [b]auto[/b] is this machine's, or one that is started here. "
            "It goes on as with --server. OUT.png may be a URL, such as s3://BUCKET/OUT.png.",
            rich_help_panel=SERVERS,
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on the cluster. Default: as many as fit.", rich_help_panel=SERVERS),
    ] = None,
    threads_per_actor: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of each. Default: the CPUs are shared.", rich_help_panel=SERVERS),
    ] = None,
    memory_per_actor: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory of each. Default: what the largest request needs.", rich_help_panel=SERVERS
        ),
    ] = None,
    preview: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Write a live preview to this file.")] = None,
    preview_vae: Annotated[
        str | None, typer.Option(metavar="PACKAGE", help="VAE package for previews, e.g. TAESD.")
    ] = None,
    save_latents: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Also save the final latents, for [b]sdonnx decode[/b]."),
    ] = None,
    provenance: Provenance = True,
    safety: SafetyMode = "off",
    device: Device = "auto",
    compute: Compute = "auto",
    threads: Threads = None,
    cache: Cache = True,
    memory: Memory = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **options: Any,
) -> None:
    """Generate images with a package.

    [dim]sdonnx run "a red apple on a blue background" -o apple.png[/dim]
    [dim]sdonnx run "a photograph of a cat" -m sd15-onnx --seed 7[/dim]
    [dim]sdonnx run "a tiger on a white background" --image cat.png --strength 0.6[/dim]
    """
    refiner_package, refiner_fields = parse_refiner(refiner)
    controls = [parse_control(each) for each in control or ()]
    if control_preprocessor is not None and not controls:
        raise sdonnx.RequestError("--control-preprocessor requires --control")
    preprocess = flatten_alpha if control_preprocessor is None else canny
    images = (sdonnx.Control(image=preprocess(open_image(path)), **settings) for _, path, settings in controls)
    adapters = [parse_control(each, "ip-adapter") for each in ip_adapter or ()]
    values = {
        **(sdonnx.FAST if fast else {}),
        **parse_request(options),
        **refiner_fields,
        "controls": tuple(images),
        "ip_adapters": tuple(sdonnx.IPAdapter(image=open_image(path), **how) for _, path, how in adapters),
        **({"styles": tuple(map(decode_argument, style))} if style else {}),
    }
    values |= {} if hires_upscaler is None else {"hires_upscaler": hires_upscaler}
    upscaler = None if hires_upscaler in UPSCALERS else hires_upscaler
    margins = None if outpaint is None else parse_margins(outpaint)
    lines = None if batch_file is None else read_batch(batch_file)
    if (prompt is None) == (lines is None):
        raise sdonnx.RequestError("give either a PROMPT or a --batch-file")
    if preview_vae is not None and preview is None:
        raise sdonnx.RequestError("--preview-vae requires --preview")
    if preview is not None and safety in ("blur", "refuse"):
        raise sdonnx.RequestError(f"--safety {safety} hides previews, which nobody has checked; leave out --preview")
    inputs = (
        *(path for _, path, _ in (*controls, *adapters)),
        *(each for each in options.values() if isinstance(each, Path)),
    )
    outputs = OutputPaths(
        images=output,
        grid=grid,
        preview=preview,
        latents=save_latents,
        upscale=enlarge,
        provenance=provenance,
        inputs=inputs,
    )
    fields = {**values, "prompt": decode_argument(prompt or "")}
    if ray is not None:
        with required('pip install "sdonnx[cpu,ray]"', purpose="--ray"):
            from sdonnx.cli.cluster_batch import ClusterOptions, check_options, run_on_cluster
            from sdonnx.cluster.actors import Opening

        check_options(context, outputs)
        if batch_file is None or lines is None:
            raise sdonnx.RequestError("--ray requires --batch-file; a single image is made here")
        if upscaler is not None:
            fields["hires_upscaler"] = Package.open(find_model(upscaler)).name
        opening = Opening(
            arguments={
                "model": _bundled() if model is None else model,
                "vae": vae,
                "refiner": refiner_package,
                "controls": [package for package, _, _ in controls],
                "ip_adapters": [package for package, _, _ in adapters],
                "upscaler": upscaler,
                "lora_folder": lora_dir,
                "wildcard_folder": wildcards,
                "styles": styles,
                "device": device,
                "compute": compute,
                "cache": cache,
                "safety": safety,
            },
            loras=[parse_lora(each) for each in lora or []],
            ignore_unmatched=lora_ignore_unmatched,
            embeddings=[(str(path), word) for path, word in map(parse_embedding, embedding or [])],
            margins=margins,
            enlarge=enlarge,
            provenance=provenance,
        )
        asked = ClusterOptions(address=ray, actors=actors, threads=threads_per_actor, memory=memory_per_actor)
        run_on_cluster(asked, opening, fields, outputs, batch_file, lines, as_json=as_json)
        return
    if (actors, threads_per_actor, memory_per_actor) != (None, None, None):
        raise sdonnx.RequestError("--actors, --threads-per-actor and --memory-per-actor require --ray")
    if output is not None and is_url(output):
        raise sdonnx.RequestError("a URL as -o requires --ray")
    if server is not None:
        from sdonnx.cli.remote import Selection, connect, run_remotely

        control_names, adapter_names = (tuple(name for name, _, _ in each) for each in (controls, adapters))
        selection = Selection(
            model=model, vae=vae, controls=control_names, ip_adapters=adapter_names, upscaler=upscaler
        )
        pool = connect(context, server, token, selection, previews=preview is not None)
        run_remotely(pool, fields, outputs, batch_file, lines, as_json=as_json)
        return
    with sdonnx.load(
        find_model(_bundled() if model is None else model),
        vae=vae,
        preview_vae=preview_vae,
        device=device,
        compute=compute,
        threads=threads,
        cache=cache,
        memory=memory,
        keep_loaded=lines is not None,
        refiner=refiner_package,
        lora_folder=lora_dir,
        wildcard_folder=wildcards,
        styles=styles,
        controls=[package for package, _, _ in controls],
        ip_adapters=[package for package, _, _ in adapters],
        safety=safety,
        upscaler=None if upscaler is None else find_model(upscaler),
    ) as pipe:
        print_safety(pipe)
        if pipe.upscaler is not None:
            fields["hires_upscaler"] = values["hires_upscaler"] = pipe.upscaler.name
        pipe.set_loras([parse_lora(each) for each in lora or []], ignore_unmatched=lora_ignore_unmatched)
        pipe.set_embeddings([parse_embedding(each) for each in embedding or []])
        if preview is not None and preview_vae is None and pipe.package.manifest.latents.preview is None:
            raise sdonnx.PackageError("this package has no preview; export it again, or leave out --preview")
        if batch_file is not None and lines is not None:
            generate_batch(pipe, batch_file, lines, values, outputs, margins, as_json=as_json)
            return
        report = result_json(*generate(pipe, fields, outputs, margins))
    print_report(report, as_json=as_json)


def _bundled() -> str:
    """Return the bundled model, and print how to use another one."""
    print_note(f"using {DEFAULT}, the small bundled model; for a published one: sdonnx export sd15, then -m sd15-onnx")
    return DEFAULT
