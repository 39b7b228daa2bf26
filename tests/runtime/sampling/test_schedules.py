"""Schedules: those of diffusers' classes, those that have a name, custom sigmas, and what isn't supported."""

import numpy as np
import pytest
from diffusers.schedulers.scheduling_utils import AysSchedules
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.sampling.registry import SAMPLERS
from sdonnx_runtime.sampling.schedule import make_schedule
from sdonnx_runtime.sampling.scheduler_config import CLASSES, WHOLE_TIMESTEPS, SchedulerConfig
from sdonnx_runtime.sampling.sigmas import SCHEDULES, training_sigmas
from support.samplers import SD15, WITH_SIGMA_SCHEDULES, distance, ours, theirs


@pytest.mark.parametrize("sampler", CLASSES)
def test_a_schedule_asked_for_equals_the_one_in_the_config(sampler):
    for name in ("karras", "beta") if sampler in WITH_SIGMA_SCHEDULES else ():
        asked = ours(sampler, SD15, 7, schedule=name)
        assert np.array_equal(asked, ours(sampler, {**SD15, f"use_{name}_sigmas": True}, 7))
        assert np.array_equal(asked, ours(sampler, {**SD15, "use_exponential_sigmas": True}, 7, schedule=name))
    for name in () if sampler in ("lcm", "tcd") else ("linspace", "trailing"):
        asked = ours(sampler, SD15, 7, spacing=name)
        assert np.array_equal(asked, ours(sampler, {**SD15, "timestep_spacing": name}, 7))


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "euler", "heun", "lcm", "tcd"])
def test_custom_timesteps_equal_diffusers(sampler):
    asked = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    assert distance(ours(sampler, SD15, 1, timesteps=asked), theirs(sampler, SD15, 1, timesteps=asked)) < 1e-4


def test_custom_sigmas_equal_diffusers():
    asked = [14.0, 6.5, 3.9, 1.2, 0.3, 0.0]
    wanted = theirs("euler", SD15, 1, sigmas=asked)
    assert distance(ours("euler", SD15, 1, sigmas=asked), wanted) < 1e-4
    assert distance(ours("euler", SD15, 1, sigmas=asked[:-1]), wanted) < 1e-4  # the closing 0 may be left out


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in WHOLE_TIMESTEPS])
def test_sigmas_far_from_any_use_are_sampled_all_the_same(sampler):
    for asked in ([1e6, 1e-37], [1e-37], [3.0, 2.999999, 1.0]):
        assert np.isfinite(ours(sampler, SD15, 1, sigmas=asked)).all(), asked


def test_custom_timesteps_equal_to_the_uniform_ddim_schedule():
    own = make_schedule(SchedulerConfig.from_dict(SD15), "ddim", 10)
    given = make_schedule(SchedulerConfig.from_dict(SD15), "ddim", 1, timesteps=list(own.timesteps))
    assert np.array_equal(own.sigmas_to, given.sigmas_to)


def test_align_your_steps_is_as_published():
    config = SchedulerConfig.from_dict(SD15)
    for name, key in (("ays", "StableDiffusion"), ("ays_sdxl", "StableDiffusionXL")):
        made = make_schedule(config, "dpmpp_2m", 10, schedule=name)
        assert np.abs(made.sigmas - AysSchedules[f"{key}Sigmas"]).max() < 1e-3
        assert np.abs(made.timesteps - AysSchedules[f"{key}Timesteps"]).max() < 3  # theirs are of rounded sigmas
    twice = make_schedule(config, "dpmpp_2m", 20, schedule="ays").sigmas
    assert np.allclose(twice[:-1:2], AysSchedules["StableDiffusionSigmas"][:-1], atol=1e-3)
    assert np.allclose(twice[1:18:2] ** 2, twice[0:18:2] * twice[2:19:2], rtol=1e-4)  # log-linear in between


def test_simple_and_sgm_uniform():
    """ComfyUI's calculate_sigmas: every 1000 / n-th training sigma; timesteps even towards 0, which is left out."""
    config = SchedulerConfig.from_dict(SD15)
    train_sigmas = training_sigmas(config.for_sampler("euler"))
    simple = make_schedule(config, "euler", 7, schedule="simple")
    wanted = [train_sigmas[999 - int(i * 1000 / 7)] for i in range(7)]
    assert np.allclose(simple.sigmas, [*wanted, 0], rtol=1e-6)
    uniform = make_schedule(config, "euler", 6, schedule="sgm_uniform")
    assert np.allclose(uniform.timesteps, 999 - np.arange(6) * 999 / 6)
    between = np.log(train_sigmas[832]), np.log(train_sigmas[833])
    assert uniform.sigmas[1] == pytest.approx(np.exp((between[0] + between[1]) / 2), rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in WHOLE_TIMESTEPS])
def test_every_schedule_serves_every_sampler_that_takes_one(sampler, schedule):
    assert np.isfinite(ours(sampler, SD15, 12, schedule=schedule)).all()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_beyond_the_model(steps):
    with pytest.raises(RequestError, match="from 1 to 1000"):
        make_schedule(SchedulerConfig.from_dict(SD15), "euler", steps)


@pytest.mark.parametrize(
    ("sampler", "changes", "steps", "message"),
    [
        ("ddim", {"num_train_timesteps": 10, "timestep_spacing": "leading"}, 10, "timestep 10, above .* 9;"),
        ("pndm", {"num_train_timesteps": 50, "steps_offset": 5}, 25, "above"),
        ("dpmpp_2m", {"num_train_timesteps": 7}, 7, "duplicate sigmas"),
        ("lms", {"num_train_timesteps": 50, "timestep_spacing": "leading", "steps_offset": 5}, 50, "duplicate sigmas"),
        ("lcm", {}, 51, "50 steps"),
    ],
)
def test_steps_that_a_short_schedule_has_no_room_for(sampler, changes, steps, message):
    with pytest.raises(RequestError, match=message):
        make_schedule(SchedulerConfig.from_dict({**SD15, **changes}), sampler, steps)


@pytest.mark.parametrize(
    ("sampler", "asked", "message"),
    [
        ("euler", {"schedule": "karas"}, "choose from karras"),
        ("euler", {"spacing": "even"}, "choose from leading"),
        ("euler", {"sigmas": [3.0, 3.0, 1.0]}, "decrease"),
        ("euler", {"sigmas": [3.0, float("nan")]}, "finite"),
        ("euler", {"sigmas": [float("inf"), 1.0]}, "finite"),
        ("euler", {"sigmas": [3.0, -1.0]}, "0 or more"),
        ("euler", {"sigmas": []}, "at least one"),
        ("euler", {"sigmas": [0.0]}, "only a 0"),
        ("euler", {"sigmas": ["a"]}, "give a list of numbers"),
        ("euler", {"sigmas": 5}, "give a list of numbers"),
        ("euler", {"sigmas": "14.6"}, "give a list of numbers"),
        ("euler", {"sigmas": [[3.0], [1.0]]}, "give a list of numbers"),
        ("euler", {"sigmas": [[3.0], [1.0, 2.0]]}, "give a list of numbers"),
        ("euler", {"sigmas": [10**400, 1]}, "give a list of numbers"),
        ("euler", {"sigmas": [1e-50]}, "1e-50, is 0 in single precision"),
        ("euler", {"sigmas": [1.0, 1e-50, 0.0]}, "1e-50, is 0 in single precision"),
        ("euler", {"sigmas": [1e200, 1.0]}, "up to 1e\\+06"),
        ("euler", {"sigmas": [1.0, 1.0 - 1e-12]}, "decrease in single precision"),
        ("euler", {"timesteps": [20.0, 20.0 - 1e-12]}, "decrease in single precision"),
        ("euler", {"timesteps": 5}, "give a list of numbers"),
        ("euler", {"timesteps": [10, 20]}, "decrease"),
        ("euler", {"timesteps": [1000, 20]}, "999"),
        ("euler", {"sigmas": [3.0], "timesteps": [20]}, "one of them"),
        ("euler", {"sigmas": [3.0], "schedule": "karras"}, "one of them"),
        ("euler", {"timesteps": [20], "spacing": "leading"}, "one of them"),
        *[(name, {"schedule": "karras"}, "use euler") for name in WHOLE_TIMESTEPS],
        *[(name, {"sigmas": [3.0, 1.0]}, "use euler") for name in WHOLE_TIMESTEPS],
        *[(name, {"timesteps": [30.5]}, "use euler") for name in ("ddim", "ddpm", "lcm", "tcd")],
        ("pndm", {"timesteps": [30]}, "use ddim"),
        ("lcm", {"spacing": "leading"}, "use euler"),
        ("tcd", {"spacing": "leading"}, "use euler"),
    ],
)
def test_a_schedule_that_cannot_be_served_says_what_can(sampler, asked, message):
    with pytest.raises(RequestError, match=message):
        make_schedule(SchedulerConfig.from_dict(SD15), sampler, 5, **asked)
