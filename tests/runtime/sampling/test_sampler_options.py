"""Which sampler it is, and with which settings: names, options, and what scheduler configs say."""

from itertools import product

import numpy as np
import pytest
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.sampling.registry import (
    A1111_NAMES,
    SAMPLERS,
    has_option,
    num_sampler_steps,
    resolve_sampler,
    sampler_options,
)
from sdonnx_runtime.sampling.schedule import make_schedule
from sdonnx_runtime.sampling.scheduler_config import CLASSES, SchedulerConfig, default_sampler
from support.samplers import SD15, distance, ours, theirs


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_options_that_a_sampler_lacks_or_that_are_out_of_range(sampler):
    config = SchedulerConfig.from_dict(SD15)
    for name in ("eta", "s_churn", "s_noise"):
        if not has_option(sampler, name):
            with pytest.raises(RequestError, match=rf"{sampler} does not support {name} \(supported by: "):
                sampler_options(config, sampler, **{name: 0.5})
            continue
        assert sampler_options(config, sampler, **{name: 0.5})[name] == 0.5
        for bad in (-0.1, float("nan"), float("inf"), True, "much"):
            with pytest.raises(RequestError, match=f"{name} is"):
                sampler_options(config, sampler, **{name: bad})
    if has_option(sampler, "eta"):
        with pytest.raises(RequestError, match="from 0 to 1"):
            sampler_options(config, sampler, eta=1.1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_num_sampler_steps_counts_the_steps_that_are_yielded(sampler):
    config, x = SchedulerConfig.from_dict(SD15), np.zeros((1, 1, 1, 1), np.float32)
    choices = [sampler_options(config, sampler)]
    if sampler == "restart":
        choices += [{"restarts": 0}, {"restarts": 3}, {"s_noise": 0.5}]
    for steps, options in product((1, 2, 7, 20), choices):
        whole = make_schedule(config, sampler, steps)
        for schedule in (whole, whole.starting_at(steps // 2), whole.starting_at(steps)):
            yielded = [*SAMPLERS[sampler](lambda x, *_: x, x, schedule, lambda _: x, **options)]
            assert num_sampler_steps(sampler, schedule, options) == len(yielded)
            assert {step.total for step in yielded} <= {len(yielded)}


def test_a_config_that_leaves_a_choice_gets_each_class_own_default():
    parsed = SchedulerConfig.from_dict(SD15)
    assert make_schedule(parsed, "euler", 20).timesteps[0] == 999
    assert make_schedule(parsed, "pndm", 20).timesteps[0] == 951
    bare = {"_class_name": "LCMScheduler"}
    for sampler in CLASSES:
        assert distance(ours(sampler, bare, 5), theirs(sampler, bare, 5)) < 1e-4


@pytest.mark.parametrize("sampler", [name for name in CLASSES if name != "dpmpp_2m_sde"])
def test_the_published_class_is_the_default(sampler):
    assert default_sampler(SchedulerConfig.from_dict({**SD15, "_class_name": CLASSES[sampler]})) == sampler


def test_the_published_algorithm_counts_too():
    config = {**SD15, "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    assert default_sampler(SchedulerConfig.from_dict(config)) == "dpmpp_2m_sde"


@pytest.mark.parametrize(
    ("sampler", "change", "works"),
    [
        ("euler", {"beta_schedule": "sigmoid"}, "scaled_linear"),
        ("euler", {"prediction_type": "flow_prediction"}, "epsilon"),
        ("euler", {"timestep_spacing": "karras"}, "leading"),
        ("euler", {"trained_betas": [0.1, 0.2]}, "1000 numbers"),
        ("euler", {"beta_end": "much"}, "a number"),
        ("euler", {"num_train_timesteps": 10.5}, "a number"),
        ("euler", {"interpolation_type": "cubic"}, "log_linear"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "epsilon"),
        ("ddpm", {"variance_type": "learned_range"}, "fixed_small"),
        ("pndm", {"skip_prk_steps": "no"}, "True"),
        ("dpmpp_2m", {"solver_order": 4}, "3"),
        ("dpmpp_2m", {"use_flow_sigmas": True}, "False"),
        ("dpmpp_2m_sde", {"solver_order": 3}, "2"),
        ("unipc", {"predict_x0": False}, "True"),
        ("unipc", {"solver_p": {}}, "None"),
    ],
)
def test_a_setting_that_would_change_the_image_is_refused(sampler, change, works):
    with pytest.raises(PackageError) as error:
        make_schedule(SchedulerConfig.from_dict({**SD15, **change}), sampler, 20)
    assert next(iter(change)) in str(error.value)
    assert works in str(error.value)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddim"])
def test_settings_of_another_class_are_left_alone_as_in_diffusers(sampler):
    """A checkpoint published with DEIS, as many are, made with another sampler."""
    deis = {**SD15, "_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho"}
    del deis["skip_prk_steps"]
    same = {key: value for key, value in deis.items() if key != "algorithm_type"}  # which diffusers' 2M stumbles over
    assert distance(ours(sampler, deis, 12), theirs(sampler, same, 12)) < 1e-4


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        *[(name, (name, None)) for name in SAMPLERS],
        *[(shown, (name, None)) for name, shown in A1111_NAMES.items()],
        *[(CLASSES[name], (name, None)) for name in CLASSES if name != "dpmpp_2m_sde"],
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("dpm++ 2m sde exponential", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M  SGM Uniform", ("dpmpp_2m", "sgm_uniform")),
        ("Euler a Align Your Steps", ("euler_ancestral", "ays")),
        ("dpm_2_ancestral", ("dpm2_ancestral", None)),
        ("uni_pc_bh2", ("unipc", None)),
        ("uni_pc simple", ("unipc", "simple")),
        ("IPNDMScheduler", ("ipndm", None)),
    ],
)
def test_names_resolve(name, wanted):
    assert resolve_sampler(name) == wanted
    assert resolve_sampler(name.upper()) == wanted


def test_an_unknown_class_or_name_says_what_there_is():
    with pytest.raises(PackageError, match=r"EDMEulerScheduler.*EulerDiscreteScheduler"):
        default_sampler(SchedulerConfig.from_dict({**SD15, "_class_name": "EDMEulerScheduler"}))
    with pytest.raises(RequestError, match="did you mean euler_ancestral"):
        resolve_sampler("euler_ancestrall")
    with pytest.raises(RequestError, match="there is no sampler 'x'; choose from ddim"):
        resolve_sampler("x")
