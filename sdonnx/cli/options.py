"""What can be typed on the command line: each option with its help, by the name of the parameter that has it."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer
from sdonnx_runtime.images.preprocess import FITS, UPSCALERS
from sdonnx_runtime.sampling.schedule import SPACINGS
from sdonnx_runtime.sampling.sigmas import SCHEDULES
from sdonnx_runtime.text.prompt_syntax import SYNTAXES
from sdonnx_runtime.text.weighting import WEIGHTINGS

import sdonnx

_PROMPTS, _ADAPTERS, _FROM_A_PICTURE = "Prompts", "Adapters", "From a picture"
_SAMPLING, _FASTER = "Sampling", "Faster, at some loss"

Device: TypeAlias = Annotated[
    Literal["auto", "cpu", "cuda", "directml"],
    typer.Option(help="Where to run; auto takes the best there is."),
]
Threads: TypeAlias = Annotated[
    int | None, typer.Option(metavar="N", help="CPU threads. Default: one for each physical core.")
]

Memory: TypeAlias = Annotated[
    str, typer.Option(metavar="SIZE|auto|max|min", help="Memory to keep to, such as 2GB; auto is what is free.")
]

Vae: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="PACKAGE", help="Encode and decode with this package's VAE, which may be a VAE alone."),
]

Syntax: TypeAlias = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="|".join(SYNTAXES),
        help="How prompts are read: with AUTOMATIC1111's syntax, such as (word:1.3), or as they stand.",
        rich_help_panel=_PROMPTS,
    ),
]
Weighting: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="|".join(WEIGHTINGS), help="What weights do, as these programs have it.", rich_help_panel=_PROMPTS
    ),
]
ClipSkip: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Which layer of the text encoder is read: 1 is the last, 2 the one before. Default: the model's own.",
        rich_help_panel=_PROMPTS,
    ),
]

Prompt: TypeAlias = Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)]

Model: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="PACKAGE",
        help="A package's directory, or a Hub id of one. Default: pictogram, which comes with sdonnx.",
    ),
]

Output: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT.png",
        help="Where to; several get their seed's number added. Default: sdonnx-SEED.png.",
    ),
]

Negative: TypeAlias = Annotated[str, typer.Option(metavar="TEXT", help="What to keep away from.")]

Steps: TypeAlias = Annotated[
    int | None,
    typer.Option(metavar="N", help="Denoising steps: more is slower and finer. Default: the model's own."),
]

Guidance: TypeAlias = Annotated[
    float | None,
    typer.Option(
        metavar="G",
        help="How closely to follow the prompt; 1 or 0 is without, and twice as fast. Default: the model's own.",
    ),
]

Seed: TypeAlias = Annotated[
    int | None, typer.Option(metavar="S", help="The same seed is the same picture. Default: random.")
]

Variation: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="SEED:STRENGTH", help="Like the seed's picture, but a share of another seed's, 0 to 1."),
]

Size: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="WxH", help="Pixels; Stable Diffusion wants multiples of 8. Default: the model's own."),
]

Enlarge: TypeAlias = Annotated[
    bool, typer.Option("--enlarge/--no-enlarge", help="Enlarge pictures of a model that makes very small ones.")
]

Count: TypeAlias = Annotated[int, typer.Option(metavar="N", help="Pictures to make, with seeds S, S+1, …")]

Sampler: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help='From [b]sdonnx samplers[/b], or as elsewhere: "DPM++ 2M Karras". Default: the model\'s own.',
    ),
]

StartImage: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Start from this picture.", rich_help_panel=_FROM_A_PICTURE),
]

Strength: TypeAlias = Annotated[
    float | None,
    typer.Option(
        metavar="S",
        help="How much of the picture is made anew, 0 to 1. Default: 0.75, or 1 with a mask.",
        rich_help_panel=_FROM_A_PICTURE,
    ),
]

Fit: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="|".join(FITS),
        help="How a picture of other proportions gets the size.",
        rich_help_panel=_FROM_A_PICTURE,
    ),
]

Mask: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Repaint only where this picture, of the same size, is white.",
        rich_help_panel=_FROM_A_PICTURE,
    ),
]

MaskBlur: TypeAlias = Annotated[
    int,
    typer.Option(
        metavar="PX", help="Pixels over which what is new fades out at the edge.", rich_help_panel=_FROM_A_PICTURE
    ),
]

Paste: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--paste/--no-paste",
        help="Keep the pixels outside the mask bit by bit.",
        rich_help_panel=_FROM_A_PICTURE,
    ),
]

OnlyMasked: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="PX",
        help="Work only in the mask and so many pixels around it, and keep the picture's size; 32 is usual.",
        rich_help_panel=_FROM_A_PICTURE,
    ),
]

Outpaint: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="L,T,R,B",
        help="Paint this many pixels more at the picture's left, top, right and bottom.",
        rich_help_panel=_FROM_A_PICTURE,
    ),
]

ImageGuidance: TypeAlias = Annotated[
    float | None,
    typer.Option(
        metavar="G",
        help="Of a model that edits pictures: how closely to keep to the picture. Default: 1.5.",
        rich_help_panel=_FROM_A_PICTURE,
    ),
]

Depth: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Of a model that is given one: a depth map, brighter where it is nearer.",
        rich_help_panel=_FROM_A_PICTURE,
    ),
]

Control: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PACKAGE:FILE[:S[:START[:END]]]",
        help="Let this ControlNet or T2I-Adapter steer by this picture, with scale S (1), between these shares of "
        "the steps (0 and 1). Several add up.",
        rich_help_panel=_FROM_A_PICTURE,
    ),
]

ControlPrep: TypeAlias = Annotated[
    Literal["canny"] | None,
    typer.Option(help="Show --control this of its pictures: their edges.", rich_help_panel=_FROM_A_PICTURE),
]

ControlGuess: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--control-guess",
        help="ControlNet's guess mode: it doesn't read the negative prompt, and the prompt may be empty.",
        rich_help_panel=_FROM_A_PICTURE,
    ),
]

BatchFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Make one picture for each line instead: of a .txt a prompt, of a .jsonl an object with a request's "
        "fields, over what is asked for here.",
    ),
]

Refiner: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="PACKAGE[:0.8]",
        help="Let this package, such as SDXL's refiner, go on from that share of the noise levels.",
    ),
]

Lora: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:SCALE]",
        help="Apply these adapters: LoRA, LoCon, LoHa, LoKr or DoRA, as .safetensors. May be given several times.",
        rich_help_panel=_ADAPTERS,
    ),
]

LoraDir: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Where the adapters are that a prompt names, as <lora:name:0.8>.", rich_help_panel=_ADAPTERS
    ),
]

LoraLenient: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--lora-lenient",
        help="Leave out what a file has for layers that the model doesn't have.",
        rich_help_panel=_ADAPTERS,
    ),
]

Embedding: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:WORD]",
        help="Let a word of the prompt stand for this textual inversion. May be given several times.",
        rich_help_panel=_ADAPTERS,
    ),
]

Hires: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="2x[:S[:N]]",
        help="Enlarge the picture so many times and go over it again with strength S (0.55) and N steps.",
    ),
]

HiresUpscaler: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(UPSCALERS),
        help="What --hires enlarges: the latents (the default), or the pixels, which asks more of the memory.",
    ),
]

Schedule: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"How noise levels are laid: {', '.join(SCHEDULES)}. Default: the model's own.",
        rich_help_panel=_SAMPLING,
    ),
]

Spacing: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(SPACINGS),
        help="How timesteps are spaced. Default: the model's own.",
        rich_help_panel=_SAMPLING,
    ),
]

Eta: TypeAlias = Annotated[
    float | None,
    typer.Option(
        metavar="E",
        help="How much noise comes in with each step, 0 to 1. Default: the sampler's own.",
        rich_help_panel=_SAMPLING,
    ),
]

Sigmas: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="S,S,…",
        help="The noise level of each step, falling; instead of --steps.",
        rich_help_panel=_SAMPLING,
    ),
]

Timesteps: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="T,T,…", help="The timestep of each step, falling; instead of --steps.", rich_help_panel=_SAMPLING
    ),
]

GuidanceRescale: TypeAlias = Annotated[
    float,
    typer.Option(
        metavar="R",
        help="How much of guidance's contrast is taken back, 0 to 1; 0.7 suits zero-SNR models.",
        rich_help_panel=_SAMPLING,
    ),
]

Fast: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--fast",
        help=f"A preset: one of {sdonnx.FAST['reuse']} steps whole, tokens downsampled.",
        rich_help_panel=_FASTER,
    ),
]

Reuse: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Run the whole U-Net in one of N steps only, and its outermost part in the others.",
        rich_help_panel=_FASTER,
    ),
]

TokenDownsampling: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--token-downsampling/--no-token-downsampling",
        help="Attend to every other row and column at the highest resolution.",
        rich_help_panel=_FASTER,
    ),
]

GuidanceInterval: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH|A:B",
        help="Guide only between these noise levels, or shares of the steps; elsewhere a step is half the work.",
        rich_help_panel=_FASTER,
    ),
]

Preview: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="FILE.png", help="Show there, step by step, what is becoming of it.")
]

PreviewVae: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="PACKAGE", help="Decode the preview with this package's VAE, a tiny one, say."),
]

SaveLatents: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="FILE.npz", help="Keep the latents too, for [b]sdonnx decode[/b].")
]

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")]
