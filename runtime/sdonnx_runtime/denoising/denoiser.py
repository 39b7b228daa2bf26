"""The denoiser that samplers call, composed of functions: model, guidance, guidance interval, refiner, inpainting."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.execution.running.device_array import freeze
from sdonnx_runtime.packages.families import PackageKind
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.sampling.types import Denoise
from sdonnx_runtime.text.prompt_schedule import StepPrompts

RunUNet: TypeAlias = Callable[[Mapping[str, AnyArray]], Array]
"""Runs the U-Net on its inputs by name; returns its prediction, of the shape of ``sample``."""

Model: TypeAlias = Callable[[Array, float, float], Array]
"""``model(x, sigma, t)``: the U-Net's output for a state x (1, C, h, w), with as many batch entries as the text."""


def make_model(run: RunUNet, inputs: Mapping[str, AnyArray], concat: Array | None = None) -> Model:
    """Make a model over states of the U-Net.

    States are in the variance-exploding parametrisation x = x0 + sigma * noise; the U-Net's input is
    x / sqrt(sigma^2 + 1). ``inputs`` are all but latents and timestep; ``concat``, (N, C, h, w), has the extra
    input channels, with one batch entry or as many as the inputs have.
    """

    def model(x: Array, sigma: float, t: float) -> Array:
        scaled = x / np.float32(np.sqrt(sigma**2 + 1.0))
        if concat is not None:
            scaled = np.concatenate([np.repeat(scaled, len(concat), axis=0), concat], axis=1)
        return run({"sample": scaled, "timestep": np.array(t, np.float32), **inputs})

    return model


def classifier_free_guidance(
    model: Model,
    scale: float,
    rescale: float = 0.0,
    image_scale: float | None = None,
    weights: Sequence[float] = (1.0,),
) -> Model:
    """Combine batch entries (unconditional, conditional, …) to one, arXiv:2207.12598.

    With two unconditional entries, without the image and with it, ``image_scale`` guides from one to the other,
    arXiv:2211.09800. ``rescale`` is 0 to 1, arXiv:2305.08891, section 3.4; ``weights`` are those of `compose_prompts`.
    """

    def cfg_model(x: Array, sigma: float, t: float) -> Array:
        batch = model(x, sigma, t)
        entries = np.split(batch, len(batch))
        *without_image, unconditional = entries[: -len(weights)]
        conditional = compose_prompts(unconditional, entries[-len(weights) :], weights)
        output = unconditional + np.float32(scale) * (conditional - unconditional)
        if without_image and image_scale is not None:
            output = output + np.float32(image_scale - 1) * (unconditional - without_image[0])
        if rescale == 0:
            return output
        deviation = output.std(ddof=1)
        if not deviation > 0:  # of a constant output, or of a single number
            return output
        ratio = conditional.std(ddof=1) / deviation
        return output * np.float32(rescale * ratio + 1 - rescale)

    return cfg_model


def compose_prompts(base: Array, entries: Sequence[Array], weights: Sequence[float]) -> Array:
    """Go from ``base`` towards each entry by its weight; Composable Diffusion, arXiv:2206.01714."""
    if tuple(weights) == (1.0,):
        return entries[0]
    directions = [np.float32(weight) * (entry - base) for entry, weight in zip(entries, weights, strict=True)]
    return base + np.sum(directions, axis=0)


def conditional_only(model: Model, weights: Sequence[float]) -> Model:
    """Combine conditional batch entries to one without an unconditional one: the first is the base of the others."""

    def composed_model(x: Array, sigma: float, t: float) -> Array:
        batch = model(x, sigma, t)
        first, *others = np.split(batch, len(batch))
        return compose_prompts(first, others, weights[1:])

    return model if len(weights) == 1 else composed_model


def _guided_model(
    run: RunUNet,
    inputs: Mapping[str, AnyArray],
    concat: Array | None,
    weights: Sequence[float],
    request: CompleteRequest,
    *,
    guided: bool,
) -> Model:
    """Make a model of one batch entry, with the request's guidance if ``guided``; makes the ``inputs`` read-only."""
    for value in inputs.values():
        freeze(value)
    count, model = len(weights), make_model(run, inputs, concat)
    if len(inputs["encoder_hidden_states"]) == count:
        return conditional_only(model, weights)
    last = {name: value[-count:] for name, value in inputs.items()}
    conditional = conditional_only(make_model(run, last, None if concat is None else concat[-count:]), weights)
    if not guided:
        return conditional
    model = classifier_free_guidance(
        model, request.guidance_scale, request.guidance_rescale, request.image_guidance_scale, weights
    )
    interval = request.guidance_interval
    return model if interval is None else guidance_interval(interval, model, conditional)


def is_within_steps(fractions: tuple[float, float], step: int, steps: int) -> bool:
    """Whether a step, from 0, lies between two fractions of the steps, as diffusers counts it for ControlNets."""
    return step / steps >= fractions[0] and (step + 1) / steps <= fractions[1]


class PerStepModel:
    """A model of one batch entry with the prompts and guidance of the current step; steps are counted, not calls.

    ``conditioning`` has the inputs, as in `make_model`, of each step's ``prompts``; the last batch entries are
    conditional, and have the ``weights`` of `compose_prompts`.
    """

    def __init__(
        self,
        run: RunUNet,
        conditioning: Mapping[StepPrompts, Mapping[str, AnyArray]],
        prompts: Sequence[StepPrompts],
        concat: Array | None,
        weights: Sequence[float],
        request: CompleteRequest,
    ) -> None:
        bounds, count = request.guidance_steps, len(prompts)
        steps = [(each, bounds is None or is_within_steps(bounds, index, count)) for index, each in enumerate(prompts)]
        models = {
            (each, guided): _guided_model(run, conditioning[each], concat, weights, request, guided=guided)
            for each, guided in steps
        }
        self._models, self._step = [models[step] for step in steps], 0

    def next_step(self) -> None:
        """Go on to the next step."""
        self._step += 1

    def __call__(self, x: Array, sigma: float, t: float) -> Array:
        """Run the step's model."""
        return self._models[min(self._step, len(self._models) - 1)](x, sigma, t)


def refiner_handoff(base: Model, refiner: Model, switch_at: float, on_switch: Callable[[], None]) -> Model:
    """Run ``base`` down to timestep ``switch_at``, then ``refiner``; ``on_switch`` is called in between.

    An ensemble of expert denoisers in one schedule: arXiv:2211.01324.
    """
    switched = False

    def model(x: Array, sigma: float, t: float) -> Array:
        nonlocal switched
        if t >= switch_at:
            return base(x, sigma, t)
        if not switched:
            switched = True
            on_switch()
        return refiner(x, sigma, t)

    return model


def guidance_interval(interval: tuple[float, float], guided: Model, conditional: Model) -> Model:
    """Run ``guided`` where low < sigma <= high, elsewhere ``conditional``; arXiv:2404.07724."""
    low, high = interval
    return lambda x, sigma, t: guided(x, sigma, t) if low < sigma <= high else conditional(x, sigma, t)


def predict_x0(model: Model, prediction_type: str, limit: Callable[[Array], Array] | None = None) -> Denoise:
    """Convert a model's output to x0; ``limit`` is applied to it."""
    to_x0 = _PREDICTIONS[prediction_type]

    def denoise(x: Array, sigma: float, t: float) -> Array:
        x0 = to_x0(model(x, sigma, t), x, sigma)
        return x0 if limit is None else limit(x0)

    return denoise


def inpaint_denoiser(denoise: Denoise, mask: Array, original: Array, noise: Array, max_masked_sigma: float) -> Denoise:
    """Inpaint with any U-Net: where the mask is 0 its input is the noised original, and x0 is the original.

    ``mask`` is (1, 1, h, w), ``original`` (1, C, h, w) the init latents and ``noise`` what is added to them. At
    ``max_masked_sigma`` or above the state is not blended.
    """
    repainted = mask > 0

    def masked_denoise(x: Array, sigma: float, t: float) -> Array:
        state = x if sigma >= max_masked_sigma else np.where(repainted, x, original + np.float32(sigma) * noise)
        return np.where(repainted, denoise(state, sigma, t), original)

    return masked_denoise


def _from_v(output: Array, x: Array, sigma: float) -> Array:
    """arXiv:2202.00512: the model predicts the velocity."""
    scale = 1.0 / (sigma**2 + 1.0)
    return np.float32(scale) * x - np.float32(sigma * np.sqrt(scale)) * output


_PREDICTIONS: dict[str, Callable[[Array, Array, float], Array]] = {
    "epsilon": lambda output, x, sigma: x - np.float32(sigma) * output,  # predicts the noise: arXiv:2006.11239
    "v_prediction": _from_v,
    "sample": lambda output, x, sigma: output,  # predicts the clean latents
}


def check_refiner(package: Package, refiner: Package) -> None:
    """Check that a package's U-Net can take the last steps of another's; raises PackageError."""
    if refiner.kind is not PackageKind.MODEL:
        raise PackageError(f"{refiner.root} is {refiner.title}; a refiner requires a U-Net")
    base, other = package.manifest, refiner.manifest
    if other.conditions.concat is not None or base.conditions.concat is not None:
        raise PackageError("a refiner cannot be combined with inpainting, pix2pix or depth models")
    if other.latents.channels != base.latents.channels or other.latents.downscale != base.latents.downscale:
        raise PackageError(
            f"{refiner.name} has latents of {other.latents.channels} channels, {package.name} of "
            f"{base.latents.channels}; give a refiner of the same family"
        )
