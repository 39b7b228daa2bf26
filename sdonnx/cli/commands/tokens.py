"""``sdonnx tokens``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from sdonnx_models import DEFAULT
from sdonnx_runtime.packages.package import check_model
from sdonnx_runtime.request import MAX_SEED
from sdonnx_runtime.text.token_counts import TokenCount, count_tokens, parse_first_step
from sdonnx_runtime.text.wildcards import draw_texts
from sdonnx_runtime.validation import check_fields

import sdonnx
from sdonnx.cli.console import out, print_json
from sdonnx.cli.options import request_option
from sdonnx.cli.parsing import decode_argument
from sdonnx.loading import find_model


def tokens(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt.")],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="PACKAGE", help="A package's directory, or its Hub id.")
    ] = DEFAULT,
    negative: Annotated[bool, typer.Option("--negative", help="Read it as a negative prompt.")] = False,
    prompt_syntax: Annotated[str | None, request_option("prompt_syntax")] = None,
    wildcards: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for __name__ in the prompt.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed by which alternatives and wildcards are drawn.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Count the tokens of a prompt, and show what is in each chunk of each text encoder.

    [dim]sdonnx tokens "a photograph of an astronaut riding a horse" -m sdxl-onnx[/dim]
    """
    text, syntax = decode_argument(prompt), prompt_syntax or "a1111"
    stream = "negative_prompt" if negative else "prompt"
    check_fields(sdonnx.Request(prompt=text, prompt_syntax=syntax))
    if wildcards is not None and not wildcards.is_dir():
        raise sdonnx.RequestError(f"{wildcards} is not a directory; give another --wildcards")
    package = sdonnx.Package.open(find_model(model))
    check_model(package)
    drawn = draw_texts({stream: text}, syntax, wildcards, [seed])
    read = drawn[seed][stream] if drawn else text
    schedule, texts = parse_first_step(read, syntax, negative=negative)
    counts = [count_tokens(package, each, schedule, texts) for each in package.manifest.text_encoders]
    if as_json:
        template = {"template": text, "seed": seed} if drawn else {"template": None, "seed": None}
        print_json({"prompt": read, **template, "encoders": [asdict(each) for each in counts]})
        return
    if drawn:
        out.print(f"seed {seed} draws: {read}\n", highlight=False, soft_wrap=True)
    for each in counts:
        _print_count(each, is_cut=syntax == "plain" and len(each.chunks) > 1)


def _print_count(found: TokenCount, *, is_cut: bool) -> None:
    """Print a text encoder's count, and the text of each chunk if there are several."""
    chunks = "1 chunk" if len(found.chunks) == 1 else f"{len(found.chunks)} chunks"
    out.print(f"{found.component}: {found.count} tokens in {chunks} of {found.length}", highlight=False, soft_wrap=True)
    if is_cut:
        out.print("  plain prompts are cut after the first", highlight=False, soft_wrap=True)
    if len(found.chunks) > 1:
        table = Table.grid(padding=(0, 2))
        for justify in ("right", "right", "left"):
            table.add_column(justify=justify, overflow="fold")
        texts = found.texts or ("",) * len(found.chunks)
        for number, (count, text) in enumerate(zip(found.chunks, texts, strict=True), 1):
            table.add_row(f"  {number}", str(count), text)
        out.print(table, highlight=False, soft_wrap=True)
    if found.unknown:
        out.print(f"  not in the vocabulary: {', '.join(found.unknown)}", highlight=False, soft_wrap=True)
