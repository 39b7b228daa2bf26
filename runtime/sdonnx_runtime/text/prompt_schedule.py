"""The texts that condition each denoising step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdonnx_runtime.text.prompt_syntax import LoraTag, Prompt, Sections, parse_prompt, sections


@dataclass(frozen=True, kw_only=True)
class StepPrompts:
    """The texts of one step."""

    negative: str
    conditional: tuple[str, ...]
    """One for each subprompt of an AND."""


def step_prompts(
    prompt: Prompt, negative: Prompt, steps: int, previous_steps: int | None = None
) -> tuple[StepPrompts, ...]:
    """List the texts of each step of a pass of so many ``steps``, with those that img2img skips.

    ``previous_steps`` are the first pass's in a second pass, whose step numbers include them; None in the first.
    """
    parts = (*negative.parts, *prompt.parts)
    changes = {0}.union(*(part.change_steps(steps, previous_steps) for part in parts))
    prompts: list[StepPrompts] = []
    for step in range(1, steps + 1):
        if step - 1 in changes:
            first, *others = (part.text_at_step(step, steps, previous_steps) for part in parts)
            prompts.append(StepPrompts(negative=first, conditional=tuple(others)))
        else:
            prompts.append(prompts[-1])
    return tuple(prompts)


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptSchedule:
    """The prompts of an image, parsed."""

    passes: tuple[tuple[StepPrompts, ...], ...]
    """The texts of each step of each pass."""
    weights: tuple[float, ...]
    """The weight of each subprompt."""
    sections: Mapping[str, Sections]
    """Each text with its weights parsed."""
    loras: tuple[LoraTag, ...]
    """The LoRAs that the prompts name."""


def schedule_prompts(prompt: str, negative_prompt: str, syntax: str, steps: Sequence[int]) -> PromptSchedule:
    """Parse the prompts for passes of so many ``steps``.

    Raises:
        RequestError: as `parse_prompt` and `sections` do.
    """
    parsed = parse_prompt(prompt, syntax)
    negative = parse_prompt(negative_prompt, syntax, composed=False)
    passes = tuple(
        step_prompts(parsed, negative, count, before) for count, before in zip(steps, (None, *steps), strict=False)
    )
    distinct = {each for prompts in passes for each in prompts}
    texts = {text for each in distinct for text in (each.negative, *each.conditional)}
    return PromptSchedule(
        passes=passes,
        weights=tuple(part.weight for part in parsed.parts),
        sections={text: sections(text, syntax) for text in texts},
        loras=(*parsed.loras, *negative.loras),
    )
