"""Samplers equal diffusers' scheduler classes, step by step, whatever the config says and wherever they start."""

from itertools import product

import numpy as np
import pytest
from sdonnx_runtime.sampling.noise import Noise
from sdonnx_runtime.sampling.registry import SAMPLERS, has_option
from sdonnx_runtime.sampling.schedule import make_schedule
from sdonnx_runtime.sampling.scheduler_config import CLASSES, WHOLE_TIMESTEPS, SchedulerConfig
from support.samplers import IMAGE, SD15, WITH_SIGMA_SCHEDULES, distance, ours, predictions, theirs


def schedules(sampler):
    """Every way that diffusers' class can lay timesteps and levels, as settings of its config."""
    spacings = [{"timestep_spacing": name} for name in ("leading", "linspace", "trailing")]
    own = [{}] if sampler in ("lcm", "tcd") else [{}, *spacings]  # {}: each class has its own default
    names = ("karras", "exponential", "beta") if sampler in WITH_SIGMA_SCHEDULES else ()
    schedules = [{f"use_{name}_sigmas": True} for name in names]
    return [*own, *schedules, *([{"use_lu_lambdas": True}] if sampler in ("dpmpp_2m", "dpmpp_2m_sde") else [])]


@pytest.mark.parametrize(
    ("sampler", "setting"),
    [
        pytest.param(name, setting, id="-".join([name, *map(str, [*setting, *setting.values()][:2])]))
        for name in CLASSES
        for setting in schedules(name)
    ],
)
def test_sampler_equals_diffusers(sampler, setting):
    for steps, prediction_type in product((4, 20, 50), predictions(sampler)):
        config = {**SD15, **setting, "prediction_type": prediction_type}
        found = distance(ours(sampler, config, steps), theirs(sampler, config, steps))
        assert found < 1e-4, (steps, prediction_type, found)


LOW = {"final_sigmas_type": "sigma_min"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SETTINGS = [
    *[(name, change, 7) for name in CLASSES for change in ({"steps_offset": 0}, {"set_alpha_to_one": True})],
    *[(name, {"beta_schedule": "linear", "beta_end": 0.02, "beta_start": 0.0001}, 10) for name in CLASSES],
    *[(name, {"trained_betas": list(np.linspace(0.0008, 0.013, 1000))}, 10) for name in CLASSES],
    *[(name, COSINE, 10) for name in ("ddim", "pndm", "ddpm")],
    *[(name, {**COSINE, "lambda_min_clipped": -5.1}, 20) for name in ("dpmpp_2m", "dpmpp_2m_sde")],
    *[(name, {**COSINE, "use_karras_sigmas": True}, 6) for name in ("dpmpp_2m", "unipc", "deis")],
    *[(name, LOW, steps) for name in ("euler", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis") for steps in (6, 20)],
    *[(name, {**LOW, "use_karras_sigmas": True}, 20) for name in ("euler", "dpmpp_2m", "unipc")],
    *[(name, ZERO_SNR, steps) for name in CLASSES for steps in (5, 20)],
    *[(name, {"thresholding": True, "sample_max_value": 1.3}, 8) for name in CLASSES],
    *[(name, {"clip_sample": True, "clip_sample_range": 0.8}, 8) for name in CLASSES],
    *[("heun", {"clip_sample": True, "prediction_type": kind}, 8) for kind in ("v_prediction", "sample")],
    *[(name, {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}, 8) for name in WITH_SIGMA_SCHEDULES],
    ("euler", {"interpolation_type": "log_linear"}, 8),
    ("euler", {"interpolation_type": "log_linear", "use_karras_sigmas": True}, 8),
    ("euler", {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}, 8),
    ("ddpm", {"variance_type": "fixed_large"}, 8),
    ("ddpm", {"variance_type": "fixed_small_log"}, 8),
    ("ddpm", {"variance_type": None}, 8),  # as DPMSolverMultistepScheduler's config has it
    ("lcm", {"original_inference_steps": 40, "timestep_scaling": 0.01}, 8),
    ("tcd", {"original_inference_steps": 40}, 8),
    *[
        (name, {"solver_order": order, "lower_order_final": final, **ends}, steps)
        for name, order, final, ends, steps in product(
            ("deis", "dpmpp_2m", "dpmpp_2m_sde", "unipc"), (1, 2, 3), (True, False), ({}, LOW), (8, 20)
        )
        if (name, order) != ("dpmpp_2m_sde", 3) and (name, final, ends) != ("unipc", False, {})
    ],
    *[
        (name, {"solver_type": "heun", "euler_at_final": True, **ends}, 20)
        for name in ("dpmpp_2m", "dpmpp_2m_sde")
        for ends in ({}, LOW)
    ],
    *[("unipc", {"solver_type": "bh1", "solver_order": order, **LOW}, 9) for order in (1, 2, 3)],  # theirs to 0 is NaN
    ("unipc", {"disable_corrector": [0, 3]}, 9),
    *[
        (name, {}, steps)
        for name in CLASSES
        for steps in (1, 2, 3, 14, 15)
        if (name, steps) != ("dpm2_ancestral", 2)  # diffusers' single precision leaves 2 digits of a level there
    ],
]


@pytest.mark.parametrize("sampler", CLASSES)
def test_other_settings_equal_diffusers(sampler):
    for name, change, steps in SETTINGS:
        if name == sampler:
            config = {**SD15, **change}
            found = distance(ours(sampler, config, steps), theirs(sampler, config, steps))
            assert found < 1e-4, (change if "trained_betas" not in change else "trained_betas", steps, found)


@pytest.mark.parametrize("sampler", CLASSES)
def test_the_comparison_has_teeth(sampler):
    """What differs in one setting differs by far more than the tolerance."""
    base = theirs(sampler, SD15, 20)
    other = "linspace" if sampler in WHOLE_TIMESTEPS else "leading"  # than the class has by itself
    spacing = [] if sampler in ("lcm", "tcd") else [{"timestep_spacing": other}]
    for change in (*spacing, {"prediction_type": "v_prediction"}, {"beta_schedule": "linear"}):
        assert distance(ours(sampler, {**SD15, **change}, 20), base) > 1e-3


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_eta_equals_diffusers(eta):
    for sampler in ("ddim", "tcd"):
        found = ours(sampler, SD15, 10, request={"eta": eta})
        assert distance(found, theirs(sampler, SD15, 10, eta=eta)) < 1e-4


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "dpmpp_2m_sde", "euler", "euler_ancestral", "heun"])
def test_a_start_in_the_middle_equals_diffusers(sampler):
    for steps, strength in product((10, 30), (0.3, 0.75, 1.0)):
        begin = max(steps - int(steps * strength), 0)
        found = distance(ours(sampler, SD15, steps, begin=begin), theirs(sampler, SD15, steps, begin=begin))
        assert found < 1e-4, (steps, strength, found)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_start_at_the_end_takes_no_step(sampler):
    whole = make_schedule(SchedulerConfig.from_dict(SD15), sampler, 10)
    assert whole.steps == whole.total == 10
    rest = whole.starting_at(4).starting_at(3)
    assert (rest.steps, rest.total, rest.sigmas[0]) == (3, 10, whole.sigmas[7])
    assert np.isfinite(ours(sampler, SD15, 10, begin=9)).all()
    assert whole.starting_at(10).steps == 0
    assert distance(ours(sampler, SD15, 10, begin=10), IMAGE) < 0.1
    with pytest.raises(ValueError, match="step 11 is not in"):
        whole.starting_at(11)


@pytest.mark.parametrize(("sampler", "steps"), [("pndm", 8), ("unipc", 8), ("lms", 8), ("ipndm", 8), ("deis", 8)])
def test_history_is_empty_where_sampling_starts(sampler, steps):
    """From a state at step 3 on, a sampler knows nothing of the skipped steps."""
    schedule = make_schedule(SchedulerConfig.from_dict({**SD15, "steps_offset": 0}), sampler, steps).starting_at(3)
    x = 2 + float(schedule.sigmas[0]) * Noise(1)((1, 4, 2, 2))
    made = [step.x for step in SAMPLERS[sampler](lambda x, *_: 0 * x + 2, x, schedule, Noise(0))]
    assert len(made) == steps - 3
    ends = float(schedule.sigmas[-1])
    assert distance(made[-1], 2 + ends / float(schedule.sigmas[0]) * (x - 2)) < 1e-3  # exact where x0 is constant


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_alone_is_the_one_in_a_batch(sampler):
    request = {"eta": 0.6} if has_option(sampler, "eta") else {}
    request |= {"s_churn": 5.0} if has_option(sampler, "s_churn") else {}
    batch = ours(sampler, SD15, 5, request=request)
    assert distance(ours(sampler, SD15, 5, rows=slice(0, 1), request=request), batch[:1]) < 1e-5
