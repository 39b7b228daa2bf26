"""Samplers and schedules equal diffusers' scheduler classes and k-diffusion's samplers, step by step."""

import json
from itertools import pairwise, product
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import AysSchedules
from record_k_diffusion import SHAPE as K_SHAPE
from record_k_diffusion import denoised, levels, noises
from samplers import convergence, moments
from sdonnx_runtime.denoise import clean, predict
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.noise import Noise
from sdonnx_runtime.samplers import A1111_NAMES, SAMPLERS, resolve_sampler, sampler_options, takes
from sdonnx_runtime.sampling import Schedule
from sdonnx_runtime.schedule import make_schedule
from sdonnx_runtime.scheduler_config import CLASSES, WHOLE_TIMESTEPS, SchedulerConfig, default_sampler, limit_x0
from sdonnx_runtime.sigmas import SCHEDULES, trained_sigmas

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
STOCHASTIC = ("ddim", "ddpm", "dpm2_ancestral", "dpmpp_2m_sde", "euler_ancestral", "lcm", "tcd")
EPSILON_OR_V = ("dpm2", "dpm2_ancestral", "euler_ancestral", "pndm")  # diffusers refuses the third prediction type
RESPACED = ("deis", "dpm2", "dpm2_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "euler", "heun", "lms", "unipc")


def model(x, t):
    """A bounded stand-in for a U-Net: smooth in x, different at every timestep and place."""
    place = np.arange(x[0].size, dtype=np.float32).reshape(x[0].shape)
    return (np.tanh(1.3 * x + np.sin(place)) * np.cos(t / 400) + 0.3 * np.sin(x * t / 500)).astype(np.float32)


IMAGE = np.tanh(Noise(5)(SHAPE))


def ours(sampler, config, steps, *, begin=None, rows=slice(None), request=None, **asked):
    """The latents: of noise, or of IMAGE noised to where step ``begin`` starts."""
    parsed = SchedulerConfig.from_dict(config)
    schedule = make_schedule(parsed, sampler, steps, **asked)
    options = sampler_options(parsed, sampler, **(request or {}))
    limit = None if sampler == "ddim" else limit_x0(parsed, sampler)

    def run(inputs):
        return model(inputs["sample"], float(inputs["timestep"]))

    text = np.zeros((1, 77, 8), np.float32)
    denoise = clean(predict(run, {"encoder_hidden_states": text}), parsed.prediction_type, limit)
    source = Noise(SEED)

    def noise(_shape):
        return source(SHAPE)[rows]

    x = noise(SHAPE) * np.float32(schedule.init_scale)
    if begin is not None:
        schedule = schedule.starting_at(begin)
        x = IMAGE + np.float32(schedule.sigmas[0]) * Noise(SEED)(SHAPE)
    made = list(SAMPLERS[sampler](denoise, x, schedule, noise, **options))
    assert [step.index for step in made] == list(range(made[0].total if made else 0))
    x = made[-1].x if made else x
    assert x.dtype == np.float32
    return x * np.float32(schedule.final_scale)


def theirs(sampler, config, steps, *, begin=None, timesteps=None, sigmas=None, **options):
    if sampler == "dpmpp_2m_sde":
        config = {**config, "algorithm_type": "sde-dpmsolver++"}
    scheduler = getattr(diffusers, CLASSES[sampler]).from_config(config)
    given = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    scheduler.set_timesteps(**(given or {"num_inference_steps": steps}))
    generator = torch.Generator("cpu").manual_seed(SEED)
    x, walk = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma, scheduler.timesteps
    if hasattr(
        scheduler, "set_begin_index"
    ):  # else it looks for its place, which fails where a timestep is there twice
        scheduler.set_begin_index((begin or 0) * scheduler.order)
    if begin is not None:  # as StableDiffusionImg2ImgPipeline.get_timesteps and prepare_latents
        walk = walk[begin * scheduler.order :]
        noise = torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(SEED))
        x = scheduler.add_noise(torch.from_numpy(IMAGE), noise, walk[:1])
    if sampler in STOCHASTIC:
        options["generator"] = generator
    for t in walk:
        scaled = scheduler.scale_model_input(x, t)
        output = torch.from_numpy(model(scaled.numpy(), float(t)))
        x = scheduler.step(output, t, x, **options).prev_sample
    return x.numpy()


def distance(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def predictions(sampler):
    return ("epsilon", "v_prediction") if sampler in EPSILON_OR_V else ("epsilon", "v_prediction", "sample")


def schedules(sampler):
    """Every way that diffusers' class can lay timesteps and levels, as settings of its config."""
    spacings = [{"timestep_spacing": name} for name in ("leading", "linspace", "trailing")]
    own = [{}] if sampler in ("lcm", "tcd") else [{}, *spacings]  # {}: each class has its own default
    laid = [{f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta") if sampler in RESPACED]
    return [*own, *laid, *([{"use_lu_lambdas": True}] if sampler in ("dpmpp_2m", "dpmpp_2m_sde") else [])]


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


@pytest.mark.parametrize("sampler", CLASSES)
def test_a_schedule_asked_for_equals_the_one_in_the_config(sampler):
    for name in ("karras", "beta") if sampler in RESPACED else ():
        asked = ours(sampler, SD15, 7, schedule=name)
        assert np.array_equal(asked, ours(sampler, {**SD15, f"use_{name}_sigmas": True}, 7))
        assert np.array_equal(asked, ours(sampler, {**SD15, "use_exponential_sigmas": True}, 7, schedule=name))
    for name in () if sampler in ("lcm", "tcd") else ("linspace", "trailing"):
        asked = ours(sampler, SD15, 7, spacing=name)
        assert np.array_equal(asked, ours(sampler, {**SD15, "timestep_spacing": name}, 7))


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
    *[(name, {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}, 8) for name in RESPACED],
    ("euler", {"interpolation_type": "log_linear"}, 8),
    ("euler", {"interpolation_type": "log_linear", "use_karras_sigmas": True}, 8),
    ("euler", {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}, 8),
    ("ddpm", {"variance_type": "fixed_large"}, 8),
    ("ddpm", {"variance_type": "fixed_small_log"}, 8),
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
    with pytest.raises(ValueError, match="no step 11"):
        whole.starting_at(11)


@pytest.mark.parametrize(("sampler", "steps"), [("pndm", 8), ("unipc", 8), ("lms", 8), ("ipndm", 8), ("deis", 8)])
def test_history_begins_anew_where_a_walk_starts(sampler, steps):
    """From a state at step 3 on, a walk knows nothing of the steps that were left out."""
    schedule = make_schedule(SchedulerConfig.from_dict({**SD15, "steps_offset": 0}), sampler, steps).starting_at(3)
    x = 2 + float(schedule.sigmas[0]) * Noise(1)((1, 4, 2, 2))
    made = [step.x for step in SAMPLERS[sampler](lambda x, *_: 0 * x + 2, x, schedule, Noise(0))]
    assert len(made) == steps - 3
    ends = float(schedule.sigmas[-1])
    assert distance(made[-1], 2 + ends / float(schedule.sigmas[0]) * (x - 2)) < 1e-3  # exact where x0 is constant


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "euler", "heun", "lcm", "tcd"])
def test_given_timesteps_equal_diffusers(sampler):
    asked = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    assert distance(ours(sampler, SD15, 1, timesteps=asked), theirs(sampler, SD15, 1, timesteps=asked)) < 1e-4


def test_given_sigmas_equal_diffusers():
    asked = [14.0, 6.5, 3.9, 1.2, 0.3, 0.0]
    wanted = theirs("euler", SD15, 1, sigmas=asked)
    assert distance(ours("euler", SD15, 1, sigmas=asked), wanted) < 1e-4
    assert distance(ours("euler", SD15, 1, sigmas=asked[:-1]), wanted) < 1e-4  # the closing 0 may be left out


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in WHOLE_TIMESTEPS])
def test_levels_far_from_any_use_are_walked_all_the_same(sampler):
    for asked in ([1e6, 1e-37], [1e-37], [3.0, 2.999999, 1.0]):
        assert np.isfinite(ours(sampler, SD15, 1, sigmas=asked)).all(), asked


def test_given_timesteps_of_a_uniform_ddim_are_its_own():
    own = make_schedule(SchedulerConfig.from_dict(SD15), "ddim", 10)
    given = make_schedule(SchedulerConfig.from_dict(SD15), "ddim", 1, timesteps=list(own.timesteps))
    assert np.array_equal(own.targets, given.targets)


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
    """ComfyUI's calculate_sigmas: every 1000 / n-th trained level; timesteps even towards 0, which is left out."""
    config = SchedulerConfig.from_dict(SD15)
    trained = trained_sigmas(config.for_sampler("euler"))
    simple = make_schedule(config, "euler", 7, schedule="simple")
    wanted = [trained[999 - int(i * 1000 / 7)] for i in range(7)]
    assert np.allclose(simple.sigmas, [*wanted, 0], rtol=1e-6)
    uniform = make_schedule(config, "euler", 6, schedule="sgm_uniform")
    assert np.allclose(uniform.timesteps, 999 - np.arange(6) * 999 / 6)
    between = np.log(trained[832]), np.log(trained[833])
    assert uniform.sigmas[1] == pytest.approx(np.exp((between[0] + between[1]) / 2), rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in WHOLE_TIMESTEPS])
def test_every_schedule_serves_every_sampler_that_takes_one(sampler, schedule):
    assert np.isfinite(ours(sampler, SD15, 12, schedule=schedule)).all()


K_CASES = json.loads((Path(__file__).parent / "data" / "k_diffusion.json").read_text())["cases"]


def plain_schedule(sigmas):
    """Given levels for a denoiser that needs no timesteps."""
    sigmas = np.array(sigmas, np.float64)
    return Schedule(
        timesteps=sigmas[:-1],
        sigmas=sigmas,
        targets=sigmas[1:],
        sources=sigmas[:-1],
        prediction_type="epsilon",
        init_scale=1.0,
        final_scale=1.0,
        trained=np.linspace(0.01, 20, 1000),
    )


@pytest.mark.parametrize("case", K_CASES, ids=lambda case: f"{case['sampler']}-{case['steps']}-{case['options']}")
def test_sampler_equals_k_diffusion(case):
    options = dict(case["options"])
    if case["sampler"] in ("dpmpp_2m", "dpmpp_2m_sde"):
        options["lower_order_final"] = False
    noise = noises()
    x = noise(K_SHAPE) * np.float32(levels(case["steps"])[0])
    schedule = plain_schedule(levels(case["steps"]))
    walk = SAMPLERS[case["sampler"]](lambda x, sigma, _t: denoised(x, sigma), x, schedule, noise, **options)
    assert distance([*walk][-1].x.flatten(), np.array(case["x"])) < 1e-4


def test_ipndm_equals_diffusers_on_its_levels():
    """diffusers' class lays its own levels; on ours, given as its betas, it takes our steps."""
    steps = 12
    sigmas = make_schedule(SchedulerConfig.from_dict(SD15), "ipndm", steps).sigmas
    betas = sigmas / np.hypot(sigmas, 1)
    scheduler = diffusers.IPNDMScheduler(trained_betas=list(betas))
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(Noise(SEED)(SHAPE) * np.float32(np.hypot(sigmas[0], 1)) / np.float32(np.hypot(sigmas[0], 1)))
    for i, t in enumerate(scheduler.timesteps):
        alpha = float(np.sqrt(1 - betas[i] ** 2))
        epsilon = (x.numpy() / alpha - denoised(x.numpy() / alpha, sigmas[i])) / sigmas[i]
        velocity = (epsilon - betas[i] * x.numpy()) / alpha
        x = scheduler.step(torch.from_numpy(velocity.astype(np.float32)), t, x).prev_sample
    start = Noise(SEED)(SHAPE) * np.float32(np.hypot(sigmas[0], 1))
    walk = SAMPLERS["ipndm"](lambda x, sigma, _t: denoised(x, sigma), start, plain_schedule(sigmas), Noise(0))
    assert distance([*walk][-1].x, x.numpy()) < 1e-4


def test_restart_without_restarts_is_heun_and_lifts_by_the_published_variance():
    x, schedule = Noise(1)(SHAPE) * np.float32(14.6), plain_schedule(levels(12))

    def steps(sampler, **options):
        return [*SAMPLERS[sampler](lambda x, sigma, _t: denoised(x, sigma), x, schedule, Noise(2), **options)]

    assert np.array_equal(steps("restart", restarts=0)[-1].x, steps("heun")[-1].x)
    inside = [sigma for sigma in schedule.sigmas if 0.1 <= sigma <= 2]
    again = steps("restart", restarts=3)
    assert len(again) == again[0].total == 12 + 3 * (len(inside) - 1)
    drawn = []

    def zeros(x, sigma, _t):
        drawn.append((sigma, x))
        return np.zeros_like(x)

    start = np.zeros((1, 4, 64, 64), np.float32)
    [*SAMPLERS["restart"](zeros, start, schedule, Noise(3), restarts=1)]
    lifted = next(x for (before, _), (sigma, x) in pairwise(drawn) if sigma > before)
    assert lifted.var() == pytest.approx(inside[0] ** 2 - inside[-1] ** 2, rel=0.02)  # arXiv:2306.14878, equation 2


def test_deterministic_samplers_converge_at_their_order():
    """On a mixture of Gaussians whose denoiser is known: bench/samplers.py prints the table."""
    for name, found in convergence(counts=(64, 128)).items():
        assert abs(found["order"] - found["expected"]) < 0.25, (name, found)


def test_stochastic_samplers_draw_the_mixture():
    """Its mean and covariance, within 3.5 standard errors of the draw."""
    for name, found in moments(steps=200, walks=4000).items():
        assert max(found.values()) < 3.5, (name, found)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_alone_is_the_one_in_a_batch(sampler):
    request = {"eta": 0.6} if takes(sampler, "eta") else {}
    request |= {"s_churn": 5.0} if takes(sampler, "s_churn") else {}
    batch = ours(sampler, SD15, 5, request=request)
    assert distance(ours(sampler, SD15, 5, rows=slice(0, 1), request=request), batch[:1]) < 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_options_that_a_sampler_lacks_or_that_are_out_of_range(sampler):
    config = SchedulerConfig.from_dict(SD15)
    for name in ("eta", "s_churn", "s_noise"):
        if not takes(sampler, name):
            with pytest.raises(RequestError, match=f"{sampler} takes no {name}; these do"):
                sampler_options(config, sampler, **{name: 0.5})
            continue
        assert sampler_options(config, sampler, **{name: 0.5})[name] == 0.5
        for bad in (-0.1, float("nan"), float("inf"), True, "much"):
            with pytest.raises(RequestError, match=f"{name} is"):
                sampler_options(config, sampler, **{name: bad})
    if takes(sampler, "eta"):
        with pytest.raises(RequestError, match="from 0 to 1"):
            sampler_options(config, sampler, eta=1.1)


def test_a_config_that_leaves_a_choice_gets_each_class_own_default():
    parsed = SchedulerConfig.from_dict(SD15)
    assert make_schedule(parsed, "euler", 20).timesteps[0] == 999
    assert make_schedule(parsed, "pndm", 20).timesteps[0] == 951
    bare = {"_class_name": "LCMScheduler"}
    for sampler in CLASSES:
        if sampler != "pndm":
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
        ("pndm", {"skip_prk_steps": False}, "True"),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}, "dpmsolver++"),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver"}, "dpmsolver++"),
        ("dpmpp_2m", {"solver_order": 4}, "3"),
        ("dpmpp_2m", {"use_flow_sigmas": True}, "False"),
        ("dpmpp_2m_sde", {"solver_order": 3}, "2"),
        ("unipc", {"predict_x0": False}, "True"),
        ("unipc", {"solver_p": {}}, "None"),
    ],
)
def test_a_setting_that_would_change_the_picture_is_refused(sampler, change, works):
    with pytest.raises(PackageError) as error:
        make_schedule(SchedulerConfig.from_dict({**SD15, **change}), sampler, 20)
    assert next(iter(change)) in str(error.value)
    assert works in str(error.value)


def test_an_absent_key_is_refused_where_the_class_own_default_would_be():
    config = {name: value for name, value in SD15.items() if name != "skip_prk_steps"}
    with pytest.raises(PackageError, match="skip_prk_steps"):
        make_schedule(SchedulerConfig.from_dict(config), "pndm", 20)


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
        ("lcm", {}, 51, "50 steps"),
    ],
)
def test_steps_that_a_short_schedule_has_no_room_for(sampler, changes, steps, said):
    with pytest.raises(RequestError, match=said):
        make_schedule(SchedulerConfig.from_dict({**SD15, **changes}), sampler, steps)


@pytest.mark.parametrize(
    ("sampler", "asked", "said"),
    [
        ("euler", {"schedule": "karas"}, "choose from karras"),
        ("euler", {"spacing": "even"}, "choose from leading"),
        ("euler", {"sigmas": [3.0, 3.0, 1.0]}, "decreasing"),
        ("euler", {"sigmas": [3.0, float("nan")]}, "finite"),
        ("euler", {"sigmas": [float("inf"), 1.0]}, "finite"),
        ("euler", {"sigmas": [3.0, -1.0]}, "0 or more"),
        ("euler", {"sigmas": []}, "at least one"),
        ("euler", {"sigmas": [0.0]}, "0 alone"),
        ("euler", {"sigmas": ["a"]}, "give numbers"),
        ("euler", {"sigmas": 5}, "give numbers"),
        ("euler", {"sigmas": "14.6"}, "give numbers"),
        ("euler", {"sigmas": [[3.0], [1.0]]}, "give numbers"),
        ("euler", {"sigmas": [[3.0], [1.0, 2.0]]}, "give numbers"),
        ("euler", {"sigmas": [10**400, 1]}, "give numbers"),
        ("euler", {"sigmas": [1e-50]}, "1e-50, is 0 in single precision"),
        ("euler", {"sigmas": [1.0, 1e-50, 0.0]}, "1e-50, is 0 in single precision"),
        ("euler", {"sigmas": [1e200, 1.0]}, "at most 1e\\+06"),
        ("euler", {"sigmas": [1.0, 1.0 - 1e-12]}, "decreasing in single precision"),
        ("euler", {"timesteps": [20.0, 20.0 - 1e-12]}, "decreasing in single precision"),
        ("euler", {"timesteps": 5}, "give numbers"),
        ("euler", {"timesteps": [10, 20]}, "decreasing"),
        ("euler", {"timesteps": [1000, 20]}, "999"),
        ("euler", {"sigmas": [3.0], "timesteps": [20]}, "one of them"),
        ("euler", {"sigmas": [3.0], "schedule": "karras"}, "one of them"),
        ("euler", {"timesteps": [20], "spacing": "leading"}, "one of them"),
        *[(name, {"schedule": "karras"}, "take euler") for name in WHOLE_TIMESTEPS],
        *[(name, {"sigmas": [3.0, 1.0]}, "take euler") for name in WHOLE_TIMESTEPS],
        *[(name, {"timesteps": [30.5]}, "take euler") for name in ("ddim", "ddpm", "lcm", "tcd")],
        ("pndm", {"timesteps": [30]}, "take ddim"),
        ("lcm", {"spacing": "leading"}, "take euler"),
        ("tcd", {"spacing": "leading"}, "take euler"),
    ],
)
def test_a_schedule_that_cannot_be_served_says_what_can(sampler, asked, said):
    with pytest.raises(RequestError, match=said):
        make_schedule(SchedulerConfig.from_dict(SD15), sampler, 5, **asked)
