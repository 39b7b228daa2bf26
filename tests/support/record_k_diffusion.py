"""Records what k-diffusion's samplers give, which test_k_diffusion_samplers.py compares ours with.

The package itself is no dependency of the tests (it wants torchvision, wandb and more), so its ``sampling.py`` is
loaded alone. To run it again, with numpy and torch installed:

    pip download --no-deps k-diffusion==0.1.1.post1 -d /tmp/k-diffusion
    python tests/support/record_k_diffusion.py /tmp/k-diffusion/k_diffusion-0.1.1.post1-py3-none-any.whl

It writes tests/data/k_diffusion.json: for each case the sampler, its options and the state after the last step.
"""

import json
import sys
import types
import zipfile
from pathlib import Path

import numpy as np

SHAPE, SEED = (2, 2, 3, 3), 11
CASES = [
    ("euler", {"s_churn": 3.0, "s_noise": 1.1}),
    ("euler", {"s_churn": 40.0}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.5, "s_noise": 0.9}),
    ("heun", {}),
    ("dpm2", {}),
    ("dpm2_ancestral", {}),
    ("dpm2_ancestral", {"eta": 0.5, "s_noise": 0.9}),
    ("lms", {}),
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_2s_ancestral", {"eta": 0.4, "s_noise": 0.9}),
    ("dpmpp_sde", {}),
    ("dpmpp_sde", {"eta": 0.5, "s_noise": 0.9}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"eta": 0.5, "s_noise": 0.9}),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", {"eta": 0.5, "s_noise": 0.9}),
]
"""Our names and our options."""
NAMES = {"dpm2": "dpm_2", "dpm2_ancestral": "dpm_2_ancestral"}
STEPS = (4, 20)


def levels(steps):
    """Even in log(sigma), and the closing 0."""
    return np.append(np.geomspace(14.6, 0.03, steps), 0.0)


def denoised(x, sigma):
    """A bounded stand-in for a model: smooth in x and sigma, different at every place; float32."""
    place = np.arange(x[0].size, dtype=np.float32).reshape(x[0].shape)
    scaled = x / np.float32(np.hypot(sigma, 1.0))
    return np.tanh(1.3 * scaled + np.sin(place)) * np.float32(np.cos(np.log(sigma)))


def noises():
    """A source of plain noise, the same numbers every time."""
    random = np.random.RandomState(SEED)
    return lambda shape: random.standard_normal(shape).astype(np.float32)


def main(wheel):
    import torch

    sampling = load(wheel)
    cases = []
    for steps in STEPS:
        for name, options in CASES:
            noise = noises()
            sampling.torch.randn_like = lambda x, noise=noise: torch.from_numpy(noise(tuple(x.shape)))
            theirs = dict(options)
            if name not in ("euler", "heun", "dpm2", "lms", "dpmpp_2m"):  # which draw by randn_like or not at all
                theirs["noise_sampler"] = lambda *_, noise=noise: torch.from_numpy(noise(SHAPE))
            x = torch.from_numpy(noise(SHAPE) * np.float32(levels(steps)[0]))
            sigmas = torch.tensor(levels(steps), dtype=torch.float32)
            sample = getattr(sampling, f"sample_{NAMES.get(name, name)}")
            found = sample(model, x, sigmas, disable=True, **theirs)
            cases.append({"sampler": name, "options": options, "steps": steps, "x": found.flatten().tolist()})
    path = Path(__file__).parents[1] / "data" / "k_diffusion.json"
    path.write_text(json.dumps({"k-diffusion": "0.1.1.post1", "cases": cases}, indent=None, separators=(",", ":")))


def model(x, sigma):
    import torch

    return torch.from_numpy(denoised(x.numpy(), float(sigma[0])))


def load(wheel):
    """k_diffusion/sampling.py out of a wheel, with empty modules for what only its Brownian noise needs."""
    for name in ("torchdiffeq", "torchsde", "k_diffusion", "k_diffusion.utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchdiffeq"].odeint = None
    sys.modules["k_diffusion"].utils = utils = sys.modules["k_diffusion.utils"]
    utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]
    module = types.ModuleType("k_diffusion.sampling")
    module.__package__ = "k_diffusion"
    source = zipfile.ZipFile(wheel).read("k_diffusion/sampling.py")
    exec(compile(source, "k_diffusion/sampling.py", "exec"), module.__dict__)
    return module


if __name__ == "__main__":
    main(sys.argv[1])
