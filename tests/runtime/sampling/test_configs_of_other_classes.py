"""A sampler reads any class's scheduler config as diffusers' ``X.from_config(other.config)`` does."""

import json

import diffusers
import numpy as np
import pytest
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.sampling.registry import SAMPLERS
from sdonnx_runtime.sampling.schedule import make_schedule
from sdonnx_runtime.sampling.scheduler_config import CLASSES, SchedulerConfig, default_sampler, published_sampler
from support.samplers import SD15, distance, ours, theirs

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
V_PREDICTION = {**SD, "prediction_type": "v_prediction", "use_karras_sigmas": True, "timestep_spacing": "trailing"}
NAMES = [
    "CMStochasticIterativeScheduler", "DDIMInverseScheduler", "DDIMScheduler", "DDPMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "HeunDiscreteScheduler", "IPNDMScheduler",
    "KDPM2DiscreteScheduler", "KarrasVeScheduler", "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler",
    "SASolverScheduler", "TCDScheduler", "UnCLIPScheduler", "UniPCMultistepScheduler",
]  # fmt: skip
WITH_KARRAS = ("DPMSolverSinglestepScheduler", "EDMEulerScheduler", "EulerDiscreteScheduler")
CONFIGS = [*((name, {}) for name in NAMES), *((name, V_PREDICTION) for name in WITH_KARRAS)]
IMPRECISE = ("UnCLIPScheduler", "heun"), ("UnCLIPScheduler", "dpm2_ancestral")
"""diffusers' steps from a sigma of 20000, where single precision leaves nothing of an image."""


def saved(name):
    """A class's config with its defaults, as ``save_pretrained`` writes it."""
    return json.loads(getattr(diffusers, name)().to_json_string())


def from_config(sampler, config):
    """What diffusers makes, without what another class means otherwise: EDM's range, an unknown algorithm's name."""
    foreign = () if config["_class_name"] in CLASSES.values() else ("algorithm_type", "sigma_min", "sigma_max")
    foreign = ("algorithm_type",) if config.get("algorithm_type") == "deis" else foreign
    return theirs(sampler, {key: each for key, each in config.items() if key not in foreign}, 5)


@pytest.mark.parametrize(("name", "changes"), CONFIGS)
def test_every_sampler_on_the_config_of_any_class(name, changes):
    config = {**saved(name), **changes}
    distilled = () if config.get("num_train_timesteps", 1000) >= 50 else ("lcm", "tcd")
    for sampler in CLASSES:
        if sampler not in distilled and (name, sampler) not in IMPRECISE:
            found, wanted = ours(sampler, config, 5), from_config(sampler, config)
            assert np.isfinite(found).all()
            if np.isfinite(wanted).all():  # diffusers' UniPC isn't where its last steps are of high order
                assert distance(found, wanted) < 1e-4, sampler
    for sampler in set(SAMPLERS) - {*CLASSES}:
        assert np.isfinite(ours(sampler, config, 5)).all()


@pytest.mark.parametrize("steps", [4, 9, 20])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_runge_kutta_steps_of_pndm_equal_diffusers(steps, prediction_type):
    config = {**SD15, "skip_prk_steps": False, "prediction_type": prediction_type}
    assert distance(ours("pndm", config, steps), theirs("pndm", config, steps)) < 1e-4
    assert distance(ours("pndm", config, steps), ours("pndm", SD15, steps)) > 1e-3


def test_a_named_sampler_has_its_own_algorithm():
    """The config's is that of the sampler that it was written for, which another one replaces."""
    solver = {**SD15, "_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}
    for algorithm, default in (
        ("dpmsolver++", "dpmpp_2m"),
        ("sde-dpmsolver++", "dpmpp_2m_sde"),
        ("deis", "dpmpp_2m"),
        ("dpmsolver", None),
    ):
        config = {**solver, "algorithm_type": algorithm}
        assert published_sampler(SchedulerConfig.from_dict(config)) == default
        assert distance(ours("dpmpp_2m", config, 8), theirs("dpmpp_2m", solver, 8)) < 1e-4
        if default != "dpmpp_2m_sde":
            second = {**solver, "solver_order": 2}
            assert distance(ours("dpmpp_2m_sde", config, 8), theirs("dpmpp_2m_sde", second, 8)) < 1e-4


@pytest.mark.parametrize(
    ("change", "request_"),
    [
        ({"timestep_spacing": "karras"}, {"spacing": "trailing"}),
        ({"timestep_spacing": "karras"}, {"timesteps": [900, 500, 100]}),
        ({"steps_offset": "one", "timestep_spacing": "leading"}, {"spacing": "linspace"}),
        ({"sigma_max": "much", "use_karras_sigmas": True}, {"sigmas": [9.0, 1.0]}),
        ({"sigma_max": "much", "use_karras_sigmas": True}, {"schedule": "simple"}),
        ({"beta_end": None, "trained_betas": [0.01] * 1000}, {}),
        ({"original_inference_steps": "few", "solver_order": 7, "variance_type": "learned"}, {}),
    ],
)
def test_what_the_request_overrides_or_the_sampler_does_not_read_is_not_checked(change, request_):
    euler = {**SD15, "_class_name": "EulerDiscreteScheduler"}
    config = SchedulerConfig.from_dict({**euler, **change})
    assert make_schedule(config, "euler", 3, **request_).steps == (2 if "sigmas" in request_ else 3)
    if request_:
        with pytest.raises(PackageError, match=next(iter(change))):
            make_schedule(config, "euler", 3)


@pytest.mark.parametrize(
    ("sampler", "change"),
    [
        ("heun", {"final_sigmas_type": None}),
        ("euler_ancestral", {"final_sigmas_type": "low"}),
        ("dpmpp_2m", {"set_alpha_to_one": None}),
        ("lcm", {"timestep_spacing": None}),
    ],
)
def test_a_setting_that_diffusers_class_does_not_read_changes_nothing(sampler, change):
    assert distance(ours(sampler, {**SD15, **change}, 4), theirs(sampler, {**SD15, **change}, 4)) < 1e-4


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "lcm", "tcd"])
def test_explicit_betas_may_end_without_signal(sampler):
    """As configs have them from before ``rescale_betas_zero_snr``; diffusers' other classes make NaN of them."""
    rescaled = diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=True)
    config = {**SD15, "trained_betas": rescaled.betas.tolist(), "prediction_type": "v_prediction"}
    for change in ({}, {"timestep_spacing": "trailing"}):
        wanted = theirs(sampler, {**config, **change}, 4)
        assert distance(ours(sampler, {**config, **change}, 4), wanted) < 1e-4
    zero_snr = {**config, "trained_betas": None, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    explicit = {**config, "timestep_spacing": "trailing"}
    assert distance(ours("euler", explicit, 4), ours("euler", zero_snr, 4)) < 1e-3


@pytest.mark.parametrize(
    ("sampler", "change"),
    [
        ("euler", {"num_train_timesteps": 0}),
        ("euler", {"num_train_timesteps": 10**9}),
        ("euler", {"beta_start": -1.0}),
        ("euler", {"beta_end": float("nan")}),
        ("euler", {"steps_offset": -5}),
        ("ddim", {"clip_sample": True, "clip_sample_range": "wide"}),
        ("ddim", {"thresholding": True, "dynamic_thresholding_ratio": 7}),
        ("lcm", {"timestep_scaling": [10]}),
        ("lcm", {"original_inference_steps": 0}),
        ("lcm", {"num_train_timesteps": 40}),
        ("dpmpp_2m", {"lambda_min_clipped": "low"}),
        ("euler", {"use_karras_sigmas": True, "sigma_min": 0.0}),
        ("unipc", {"disable_corrector": "all"}),
    ],
)
def test_damaged_numbers_are_one_clear_error(sampler, change):
    config = {**SD15, "_class_name": CLASSES[sampler], "timestep_spacing": "leading", **change}
    with pytest.raises(PackageError, match=r"expected|original_inference_steps"):
        ours(sampler, config, 3)


def test_an_unknown_class_is_an_error_only_without_a_named_sampler():
    config = SchedulerConfig.from_dict({**SD15, "_class_name": "FancyScheduler"})
    with pytest.raises(PackageError, match=r"FancyScheduler is not supported .*; name a sampler, such as euler"):
        default_sampler(config)
    for sampler in SAMPLERS:
        assert make_schedule(config, sampler, 4).steps == 4
