"""Which texts each denoising step is conditioned on."""

from collections.abc import Sequence
from dataclasses import dataclass

from sdonnx_runtime.request import Request, given
from sdonnx_runtime.text.prompt_syntax import LoraTag, Prompt, parse_prompt


@dataclass(frozen=True, kw_only=True)
class StepPrompts:
    """The texts of one step."""

    negative: str
    conditional: tuple[str, ...]
    """One for each part of the prompt."""


def step_prompts(prompt: Prompt, negative: Prompt, steps: int, done: int | None = None) -> tuple[StepPrompts, ...]:
    """The texts of each step of a pass.

    Args:
        prompt: with any number of parts.
        negative: with one.
        steps: of the pass, with those that img2img leaves out; what it takes is counted from 1 all the same.
        done: in a second pass the steps of the first, which numbers of steps count too; None is in the first.
    """
    parts = (*negative.parts, *prompt.parts)
    changes = {0}.union(*(part.changes(steps, done) for part in parts))
    rows: list[StepPrompts] = []
    for step in range(1, steps + 1):
        if step - 1 in changes:
            first, *others = (part.at(step, steps, done) for part in parts)
            rows.append(StepPrompts(negative=first, conditional=tuple(others)))
        else:
            rows.append(rows[-1])
    return tuple(rows)


@dataclass(frozen=True, kw_only=True)
class PromptSchedule:
    """What a request says at each step."""

    passes: tuple[tuple[StepPrompts, ...], ...]
    """Of each pass the texts of each step."""
    weights: tuple[float, ...]
    """How far each conditional row pulls."""


def schedule_prompts(passes: Sequence[Request]) -> PromptSchedule:
    """The texts of a checked request's passes.

    Raises:
        RequestError: as `parse_prompt` does.
    """
    request = passes[0]
    prompt = parse_prompt(request.prompt, request.prompt_syntax)
    negative = parse_prompt(request.negative_prompt, request.prompt_syntax, composed=False)
    steps = [given(each.num_inference_steps) for each in passes]
    done = (None, *steps)
    return PromptSchedule(
        passes=tuple(step_prompts(prompt, negative, count, before) for count, before in zip(steps, done, strict=False)),
        weights=tuple(part.weight for part in prompt.parts),
    )


def parse_lora_tags(request: Request) -> list[LoraTag]:
    """The adapters that a checked request's prompts name.

    Raises:
        RequestError: as `parse_prompt` does.
    """
    texts = (request.prompt, request.negative_prompt)
    return [tag for text in texts for tag in parse_prompt(text, request.prompt_syntax, composed=False).loras]
