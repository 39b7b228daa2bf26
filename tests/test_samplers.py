"""Samplers and schedules equal diffusers' scheduler classes, step by step."""

import diffusers
import numpy as np
import pytest
import torch
from sdonnx_runtime.denoise import predict
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.noise import Noise
from sdonnx_runtime.samplers import SAMPLERS, resolve_sampler
from sdonnx_runtime.schedule import make_schedule
from sdonnx_runtime.scheduler_config import CLASSES, SchedulerConfig, default_sampler

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SHAPE, SEED = (2, 4, 6, 5), 21


def model(x, t):
    """A bounded stand-in for a U-Net: smooth in x, different at every timestep and place."""
    place = np.arange(x.size, dtype=np.float32).reshape(x.shape)
    return (np.tanh(1.3 * x + np.sin(place)) * np.cos(t / 400) + 0.3 * np.sin(x * t / 500)).astype(np.float32)


def ours(sampler, config, steps, schedule=None):
    parsed = SchedulerConfig.from_dict(config)
    schedule = make_schedule(parsed, sampler, steps, schedule)

    def run(inputs):
        return model(inputs["sample"], float(inputs["timestep"]))

    text = np.zeros((1, 77, 8), np.float32)
    denoise = predict(run, parsed.prediction_type, {"encoder_hidden_states": text})
    noise = Noise(SEED)
    x = noise(SHAPE) * np.float32(schedule.init_scale)
    last = list(SAMPLERS[sampler](denoise, x, schedule, noise))[-1]
    assert last.x.dtype == np.float32
    return last.x * np.float32(schedule.final_scale)


def theirs(sampler, config, steps):
    if sampler == "dpmpp_2m_sde":
        config = {**config, "algorithm_type": "sde-dpmsolver++"}
    scheduler = getattr(diffusers, CLASSES[sampler]).from_config(config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator("cpu").manual_seed(SEED)
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    stochastic = ("ddim", "dpm2_ancestral", "dpmpp_2m_sde", "euler_ancestral")
    options = {"generator": generator} if sampler in stochastic else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        output = torch.from_numpy(model(scaled.numpy(), float(t)))
        x = scheduler.step(output, t, x, **options).prev_sample
    return x.numpy()


def distance(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", None])
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("sampler", CLASSES)
def test_sampler_equals_diffusers(sampler, steps, spacing, prediction_type):
    config = {**SD15, "prediction_type": prediction_type}
    if spacing is not None:  # None: each class has its own default
        config["timestep_spacing"] = spacing
    assert distance(ours(sampler, config, steps), theirs(sampler, config, steps)) < 1e-4


@pytest.mark.parametrize(
    ("sampler", "changes", "steps"),
    [
        *[(sampler, {"steps_offset": 0}, 7) for sampler in CLASSES],
        *[(sampler, {"set_alpha_to_one": True}, 7) for sampler in CLASSES],
        *[(sampler, {"beta_schedule": "linear", "beta_end": 0.02, "beta_start": 0.0001}, 10) for sampler in CLASSES],
        *[(sampler, {"beta_schedule": "squaredcos_cap_v2"}, 10) for sampler in ("ddim", "pndm")],
        *[(sampler, {"final_sigmas_type": "sigma_min"}, n) for sampler in CLASSES for n in (6, 20)],
        *[
            (sampler, {}, steps)
            for sampler in CLASSES
            for steps in (1, 2, 3, 14, 15, 33)
            if (sampler, steps) != ("dpm2_ancestral", 2)  # diffusers' single precision leaves 2 digits of a level there
        ],
    ],
)
def test_other_settings_equal_diffusers(sampler, changes, steps):
    config = {**SD15, **changes}
    assert distance(ours(sampler, config, steps), theirs(sampler, config, steps)) < 1e-4


@pytest.mark.parametrize("sampler", CLASSES)
def test_the_comparison_has_teeth(sampler):
    """What differs in one setting differs by far more than the tolerance."""
    base = theirs(sampler, SD15, 20)
    other = "linspace" if sampler in ("ddim", "pndm") else "leading"  # than the class has by itself
    for change in (
        {"timestep_spacing": other},
        {"prediction_type": "v_prediction"},
        {"beta_schedule": "linear"},
    ):
        assert distance(ours(sampler, {**SD15, **change}, 20), base) > 1e-3


def test_a_config_that_leaves_a_choice_gets_each_class_own_default():
    parsed = SchedulerConfig.from_dict(SD15)
    assert make_schedule(parsed, "euler", 20).timesteps[0] == 999
    assert make_schedule(parsed, "pndm", 20).timesteps[0] == 951


@pytest.mark.parametrize("sampler", [name for name in CLASSES if name != "dpmpp_2m_sde"])
def test_the_published_class_is_the_default(sampler):
    assert default_sampler(SchedulerConfig.from_dict({**SD15, "_class_name": CLASSES[sampler]})) == sampler


@pytest.mark.parametrize(
    ("sampler", "change", "works"),
    [
        ("euler", {"beta_schedule": "sigmoid"}, "scaled_linear"),
        ("euler", {"prediction_type": "flow_prediction"}, "epsilon"),
        ("euler", {"timestep_spacing": "karras"}, "leading"),
        ("euler", {"trained_betas": [0.1, 0.2]}, "None"),
        ("euler", {"beta_end": "much"}, "a number"),
        ("euler", {"num_train_timesteps": 10.5}, "a number"),
        ("euler", {"rescale_betas_zero_snr": True}, "False"),
        ("euler_ancestral", {"rescale_betas_zero_snr": True}, "False"),
        ("ddim", {"thresholding": True}, "False"),
        ("ddim", {"clip_sample": True}, "False"),
        ("pndm", {"skip_prk_steps": False}, "True"),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}, "dpmsolver++"),
        ("dpmpp_2m", {"solver_order": 3}, "2"),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True}, ""),
    ],
)
def test_a_setting_that_would_change_the_picture_is_refused(sampler, change, works):
    with pytest.raises(PackageError) as error:
        make_schedule(SchedulerConfig.from_dict({**SD15, **change}), sampler, 20)
    assert list(change)[-1] in str(error.value)
    assert works in str(error.value)


@pytest.mark.parametrize(("sampler", "key"), [("ddim", "clip_sample"), ("pndm", "skip_prk_steps")])
def test_an_absent_key_is_refused_where_the_class_own_default_would_be(sampler, key):
    config = {name: value for name, value in SD15.items() if name != key}
    with pytest.raises(PackageError, match=key):
        make_schedule(SchedulerConfig.from_dict(config), sampler, 20)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddim"])
def test_settings_of_another_class_are_left_alone_as_in_diffusers(sampler):
    """A checkpoint published with DEIS, as many are, made with another sampler."""
    deis = {**SD15, "_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho"}
    del deis["skip_prk_steps"]
    same = {key: value for key, value in deis.items() if key != "algorithm_type"}  # which diffusers' 2M stumbles over
    assert distance(ours(sampler, deis, 12), theirs(sampler, same, 12)) < 1e-4


def test_an_unknown_class_or_name_says_what_there_is():
    with pytest.raises(PackageError, match=r"EDMEulerScheduler.*EulerDiscreteScheduler"):
        default_sampler(SchedulerConfig.from_dict({**SD15, "_class_name": "EDMEulerScheduler"}))
    with pytest.raises(RequestError, match="did you mean euler_ancestral"):
        resolve_sampler("euler_ancestrall")
    with pytest.raises(RequestError, match="there is no sampler 'x'; choose from ddim"):
        resolve_sampler("x")


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_beyond_the_model(steps):
    with pytest.raises(RequestError, match="from 1 to 1000"):
        make_schedule(SchedulerConfig.from_dict(SD15), "euler", steps)


@pytest.mark.parametrize(
    ("sampler", "changes", "steps", "said"),
    [
        ("ddim", {"num_train_timesteps": 10, "timestep_spacing": "leading"}, 10, r"timestep 10, above .*\(9\)"),
        ("pndm", {"num_train_timesteps": 50, "steps_offset": 5}, 25, "above"),
        ("dpmpp_2m", {"num_train_timesteps": 7}, 7, "twice"),
        ("lms", {"num_train_timesteps": 50, "timestep_spacing": "leading", "steps_offset": 5}, 50, "twice"),
    ],
)
def test_steps_that_a_short_schedule_has_no_room_for(sampler, changes, steps, said):
    with pytest.raises(RequestError, match=said):
        make_schedule(SchedulerConfig.from_dict({**SD15, **changes}), sampler, steps)
