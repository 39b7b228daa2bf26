"""The denoiser that samplers call, composed of small functions: what it predicts with, and what guides it."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.request import Request, given
from sdonnx_runtime.sampling.types import Denoise

Run: TypeAlias = Callable[[Mapping[str, AnyArray]], Array]
"""Runs the U-Net on its inputs by name and gives its prediction, of the shape of ``sample``."""

Model: TypeAlias = Callable[[Array, float, float], Array]
"""``model(x, sigma, t)``: what the U-Net gives for a state x (1, C, h, w), a row for each row of the text."""


def make_model(run: Run, inputs: Mapping[str, AnyArray], beside: Array | None = None) -> Model:
    """The U-Net over states.

    ``inputs`` is what it is given besides the latents and the timestep, ``beside`` what follows the latents' channels,
    (1, C, h, w) or in as many rows as the inputs have. States are in the variance-exploding
    parametrisation x = x0 + sigma * noise; the model works on x / sqrt(sigma^2 + 1).
    """

    def model(x: Array, sigma: float, t: float) -> Array:
        scaled = x / np.float32(np.sqrt(sigma**2 + 1.0))
        if beside is not None:
            scaled = np.concatenate([np.repeat(scaled, len(beside), axis=0), beside], axis=1)
        return run({"sample": scaled, "timestep": np.array(t, np.float32), **inputs})

    return model


def classifier_free_guidance(
    model: Model,
    scale: float,
    rescale: float = 0.0,
    image_scale: float | None = None,
    weights: Sequence[float] = (1.0,),
) -> Model:
    """Classifier-free guidance, arXiv:2207.12598: rows (unconditional, conditional, …) to one.

    Args:
        model: gives the rows; before the conditional ones one, or two, (unconditional, picture alone).
        scale: how far to go beyond the row before the conditional ones; 1 is to them.
        rescale: 0 to 1, how much of the spread that guidance adds is taken back, arXiv:2305.08891, section 3.4.
        image_scale: of two rows before them, how far to go from the first to the second, arXiv:2211.09800.
        weights: of each conditional row, see `compose_prompts`.
    """

    def guided(x: Array, sigma: float, t: float) -> Array:
        rows = model(x, sigma, t)
        each = np.split(rows, len(rows))
        *nothing, before = each[: -len(weights)]
        conditional = compose_prompts(before, each[-len(weights) :], weights)
        output = before + np.float32(scale) * (conditional - before)
        if nothing and image_scale is not None:
            output = output + np.float32(image_scale - 1) * (before - nothing[0])
        if rescale == 0:
            return output
        ratio = conditional.std(ddof=1) / output.std(ddof=1)
        return output * np.float32(rescale * ratio + 1 - rescale)

    return guided


def compose_prompts(base: Array, rows: Sequence[Array], weights: Sequence[float]) -> Array:
    """One row of several: from ``base`` towards each by its weight; arXiv:2206.01714."""
    if tuple(weights) == (1.0,):
        return rows[0]
    pulls = [np.float32(weight) * (row - base) for row, weight in zip(rows, weights, strict=True)]
    return base + np.sum(pulls, axis=0)


def conditional_only(model: Model, weights: Sequence[float]) -> Model:
    """Conditional rows to one where there is no other row: from the first by its weight towards the others'."""

    def alone(x: Array, sigma: float, t: float) -> Array:
        rows = model(x, sigma, t)
        first, *others = np.split(rows, len(rows))
        return compose_prompts(first, others, weights[1:])

    return model if len(weights) == 1 else alone


def _of_request(
    run: Run,
    inputs: Mapping[str, AnyArray],
    beside: Array | None,
    weights: Sequence[float],
    request: Request,
    *,
    guided: bool,
) -> Model:
    """The U-Net as a model of one row, guided as a checked request says, where it is to be ``guided``."""
    count, model = len(weights), make_model(run, inputs, beside)
    if len(inputs["encoder_hidden_states"]) == count:
        return conditional_only(model, weights)
    alone = {name: rows[-count:] for name, rows in inputs.items()}
    conditional = conditional_only(make_model(run, alone, None if beside is None else beside[-count:]), weights)
    if not guided:
        return conditional
    model = classifier_free_guidance(
        model, given(request.guidance_scale), request.guidance_rescale, request.image_guidance_scale, weights
    )
    return (
        model if request.guidance_interval is None else guidance_interval(request.guidance_interval, model, conditional)
    )


def is_within_steps(share: tuple[float, float], step: int, steps: int) -> bool:
    """Whether a step, from 0, lies within a share of the steps, as diffusers counts it for ControlNets."""
    return step / steps >= share[0] and (step + 1) / steps <= share[1]


class PerStepModel:
    """Of several models the one whose turn it is: steps are counted, not calls, of which a step may have two.

    ``models`` has one for each step; the last stays for steps beyond it.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self._models, self._step = models, 0

    def next_step(self) -> None:
        """The step's calls are done."""
        self._step += 1

    def __call__(self, x: Array, sigma: float, t: float) -> Array:
        """What the step's model gives."""
        return self._models[min(self._step, len(self._models) - 1)](x, sigma, t)


def per_step_model(
    run: Run,
    inputs: Sequence[Mapping[str, AnyArray]],
    beside: Array | None,
    weights: Sequence[float],
    request: Request,
) -> PerStepModel:
    """The U-Net as a model of one row, guided as a checked request says.

    Args:
        run: the U-Net.
        inputs: of each step, as `make_model` has them; the last rows are the conditional ones.
        beside: as `make_model` has it.
        weights: of each conditional row.
        request: of the pass.
    """
    share, count = request.guidance_steps, len(inputs)
    steps = [(each, share is None or is_within_steps(share, index, count)) for index, each in enumerate(inputs)]
    models = {
        (id(each), guided): _of_request(run, each, beside, weights, request, guided=guided) for each, guided in steps
    }
    return PerStepModel([models[id(each), guided] for each, guided in steps])


def refiner_handoff(first: Model, second: Model, below: float, leave: Callable[[], None]) -> Model:
    """``first`` down to timestep ``below``, then ``second``; ``leave`` is called in between.

    As one schedule, an ensemble of expert denoisers: arXiv:2211.01324.
    """
    reached = False

    def model(x: Array, sigma: float, t: float) -> Array:
        nonlocal reached
        if t >= below:
            return first(x, sigma, t)
        if not reached:
            reached = True
            leave()
        return second(x, sigma, t)

    return model


def guidance_interval(interval: tuple[float, float], guided: Model, conditional: Model) -> Model:
    """``guided`` at noise levels above the interval's first and up to its second, elsewhere ``conditional``.

    A guidance interval, arXiv:2404.07724.
    """
    low, high = interval

    def model(x: Array, sigma: float, t: float) -> Array:
        return guided(x, sigma, t) if low < sigma <= high else conditional(x, sigma, t)

    return model


def predict_x0(model: Model, prediction_type: str, limit: Callable[[Array], Array] | None = None) -> Denoise:
    """What a model's output says of x0; ``limit`` is applied to it."""
    to_x0 = _PREDICTIONS[prediction_type]

    def denoise(x: Array, sigma: float, t: float) -> Array:
        x0 = to_x0(model(x, sigma, t), x, sigma)
        return x0 if limit is None else limit(x0)

    return denoise


def inpaint_denoiser(denoise: Denoise, mask: Array, original: Array, noise: Array, highest: float) -> Denoise:
    """Inpainting with any U-Net: where the mask is 0 the model sees the noised original, and x0 is the original.

    Args:
        denoise: over whole states.
        mask: (1, 1, h, w), 1 where x0 is the model's.
        original: (1, C, h, w), the latents that are kept.
        noise: (1, C, h, w), what they are noised with.
        highest: from this noise level on the state is left as it is, for one that began as noise alone.
    """
    new = mask > 0

    def kept(x: Array, sigma: float, t: float) -> Array:
        seen = x if sigma >= highest else np.where(new, x, original + np.float32(sigma) * noise)
        return np.where(new, denoise(seen, sigma, t), original)

    return kept


def _from_epsilon(output: Array, x: Array, sigma: float) -> Array:
    """arXiv:2006.11239: the model predicts the noise."""
    return x - np.float32(sigma) * output


def _from_v(output: Array, x: Array, sigma: float) -> Array:
    """arXiv:2202.00512: the model predicts the velocity."""
    scale = 1.0 / (sigma**2 + 1.0)
    return np.float32(scale) * x - np.float32(sigma * np.sqrt(scale)) * output


def _from_sample(output: Array, x: Array, sigma: float) -> Array:
    """The model predicts the clean latents."""
    return output


_PREDICTIONS: dict[str, Callable[[Array, Array, float], Array]] = {
    "epsilon": _from_epsilon,
    "v_prediction": _from_v,
    "sample": _from_sample,
}
