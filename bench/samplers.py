"""Test samplers on a mixture of Gaussians with a closed-form denoiser: order of convergence, mean and covariance.

    python bench/samplers.py --plot samplers.png --json samplers.json

No model is involved, so the figures are the sampler's alone. The first table gives, for each deterministic sampler, the
distance from a very fine solution of the ODE by steps, and the order: how fast it falls over the last two step counts.
The second gives, for each stochastic sampler, the deviation of the samples' mean and covariance from the mixture's, in
standard errors of as many exact samples.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from sdonnx_runtime.sampling.registry import SAMPLERS
from sdonnx_runtime.sampling.types import Schedule

WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[1.0, 0.5], [-1.0, 0.8], [0.2, -1.2]])
SPREADS = np.array([0.5, 0.4, 0.6])
"""Standard deviation of each component, the same in both directions."""
SIGMA_MAX, SIGMA_MIN = 10.0, 0.05
COUNTS = (8, 16, 32, 64, 128)

DETERMINISTIC: dict[str, tuple[int, dict[str, Any]]] = {
    "ddim": (1, {}),
    "euler": (1, {}),
    "dpm2": (2, {}),
    "heun": (2, {}),
    "deis order 1": (1, {"order": 1, "lower_order_final": False}),
    "deis": (2, {"lower_order_final": False}),
    "deis order 3": (3, {"order": 3, "lower_order_final": False}),
    "dpmpp_2m": (2, {"lower_order_final": False}),
    "dpmpp_2m heun": (2, {"lower_order_final": False, "solver_type": "heun"}),
    "dpmpp_2m order 3": (2, {"order": 3, "lower_order_final": False}),
    "unipc order 1": (2, {"order": 1, "lower_order_final": False}),
    "unipc": (3, {"lower_order_final": False}),
    "unipc bh1": (3, {"variant": "bh1", "lower_order_final": False}),
    "unipc order 3": (4, {"order": 3, "lower_order_final": False}),
    "ipndm": (2, {}),
    "lms": (4, {}),
    "pndm": (2, {}),
}
"""The order in theory, and the options.

UniC raises UniPC's by one. ipndm and pndm treat uneven steps as even, which leaves order 2. DPM-Solver++ of order 3, as
published and in diffusers, has half the weight that its second difference requires.
"""

STOCHASTIC: dict[str, dict[str, Any]] = {
    "ddim eta 1": {"eta": 1.0},
    "ddpm": {},
    "dpm2_ancestral": {},
    "dpmpp_2m_sde": {},
    "dpmpp_2s_ancestral": {},
    "dpmpp_3m_sde": {},
    "dpmpp_sde": {},
    "euler churn 20": {"s_churn": 20.0},
    "euler_ancestral": {},
    "restart": {"restarts": 2},
}


def denoise(x: np.ndarray, sigma: float, _t: float) -> np.ndarray:
    """Return the mean of x0 for x = x0 + sigma * noise: (n, 2) to (n, 2), in the precision of x."""
    variances = SPREADS**2 + sigma**2
    offsets = x[:, None, :] - MEANS  # (n, 3, 2)
    logs = np.log(WEIGHTS / variances) - (offsets**2).sum(-1) / (2 * variances)
    shares = np.exp(logs - logs.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    centers = MEANS + (SPREADS**2 / variances)[:, None] * offsets
    return (shares[..., None] * centers).sum(1).astype(x.dtype)


def make_schedule(sigmas: np.ndarray) -> Schedule:
    """Make a schedule of sigmas; the denoiser ignores timesteps."""
    timesteps = np.arange(len(sigmas) - 1, 0, -1.0)
    return Schedule.from_sigmas(sigmas, timesteps=timesteps, train_sigmas=np.geomspace(0.01, 20, 1000))


def sample(name: str, options: dict[str, Any], x: np.ndarray, sigmas: np.ndarray, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)

    def noise(shape: tuple[int, ...]) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    sampler = SAMPLERS[name.split()[0]]
    return [*sampler(denoise, x, make_schedule(sigmas), noise, **options)][-1].x


def quadratic_sigmas(steps: int) -> np.ndarray:
    """(steps + 1,): sigmas whose log falls as the square of the step's number.

    A multistep method starts at order 1; short first steps keep this out of the measured order.
    """
    return SIGMA_MAX * (SIGMA_MIN / SIGMA_MAX) ** (np.linspace(0, 1, steps + 1) ** 2)


def log_linear_sigmas(steps: int) -> np.ndarray:
    """(steps + 1,): sigmas evenly spaced in log(sigma)."""
    return np.geomspace(SIGMA_MAX, SIGMA_MIN, steps + 1)


def sample_start(count: int, seed: int) -> np.ndarray:
    """(count, 2): exact samples of the mixture at SIGMA_MAX."""
    random = np.random.default_rng(seed)
    which = random.choice(len(WEIGHTS), count, p=WEIGHTS)
    spread = np.sqrt(SPREADS[which] ** 2 + SIGMA_MAX**2)[:, None]
    return MEANS[which] + spread * random.standard_normal((count, 2))


def solve(x: np.ndarray, steps: int = 1500) -> np.ndarray:
    """Solve the ODE to SIGMA_MIN: Runge-Kutta of order 4 in log(sigma), double precision."""

    def slope(x: np.ndarray, log: float) -> np.ndarray:
        return x - denoise(x, math.exp(log), 0.0)

    logs = np.log(log_linear_sigmas(steps))
    for log, h in zip(logs, np.diff(logs), strict=False):
        a = slope(x, log)
        b = slope(x + h / 2 * a, log + h / 2)
        c = slope(x + h / 2 * b, log + h / 2)
        x = x + h / 6 * (a + 2 * b + 2 * c + slope(x + h * c, log + h))
    return x


def convergence(counts: tuple[int, ...] = COUNTS, num_samples: int = 64) -> dict[str, dict[str, Any]]:
    """Measure for each deterministic sampler the RMS error by steps, and the order over the last two counts."""
    x = sample_start(num_samples, seed=1)
    expected = solve(x)
    figures = {}
    for name, (order, options) in DETERMINISTIC.items():
        outputs = [sample(name, options, x, quadratic_sigmas(steps)) for steps in counts]
        errors = [float(np.sqrt(np.mean((output - expected) ** 2))) for output in outputs]
        measured = math.log(errors[-2] / errors[-1]) / math.log(counts[-1] / counts[-2])
        figures[name] = {"expected": order, "order": measured, "errors": dict(zip(counts, errors, strict=True))}
    return figures


def deviations(steps: int = 400, num_samples: int = 20_000) -> dict[str, dict[str, float]]:
    """Measure for each stochastic sampler the largest deviation of mean and covariance, in standard errors."""
    mean = WEIGHTS @ MEANS
    second = sum(w * (s**2 * np.eye(2) + np.outer(m, m)) for w, m, s in zip(WEIGHTS, MEANS, SPREADS, strict=True))
    covariance = second - np.outer(mean, mean) + SIGMA_MIN**2 * np.eye(2)
    x = sample_start(num_samples, seed=2)
    figures = {}
    for name, options in STOCHASTIC.items():
        samples = sample(name, options, x.astype(np.float32), log_linear_sigmas(steps), seed=3).astype(np.float64)
        centered = samples - mean
        products = np.stack([centered[:, i] * centered[:, j] for i, j in ((0, 0), (0, 1), (1, 1))])
        expected = np.array([covariance[0, 0], covariance[0, 1], covariance[1, 1]])
        root = math.sqrt(num_samples)
        figures[name] = {
            "mean": float(np.max(np.abs(centered.mean(0)) / (samples.std(0) / root))),
            "covariance": float(np.max(np.abs(products.mean(1) - expected) / (products.std(1) / root))),
        }
    return figures


def tables(orders: dict[str, dict[str, Any]], standard_errors: dict[str, dict[str, float]]) -> str:
    """Format both results as markdown tables."""
    counts = list(next(iter(orders.values()))["errors"])
    lines = [f"| sampler | {' | '.join(f'{n} steps' for n in counts)} | order | in theory |", "| --- " * 8 + "|"]
    for name, row in orders.items():
        errors = " | ".join(f"{error:.1e}" for error in row["errors"].values())
        lines.append(f"| {name} | {errors} | {row['order']:.2f} | {row['expected']} |")
    lines += ["", "| sampler | mean, standard errors | covariance, standard errors |", "| --- | --- | --- |"]
    lines += [f"| {name} | {row['mean']:.1f} | {row['covariance']:.1f} |" for name, row in standard_errors.items()]
    return "\n".join(lines)


def plot(curves: dict[str, dict[int, float]], path: Path, title: str, *, log_scale: bool) -> None:
    """Draw values by steps for each sampler; ``log_scale`` is for the values, steps always have one."""
    from PIL import Image, ImageDraw

    width, height, left, top, right, bottom = 900, 620, 70, 30, 200, 50
    counts = list(next(iter(curves.values())))
    values = [value for row in curves.values() for value in row.values()]
    low, high = (math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))) if log_scale else (0, 10)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)

    def to_pixels(steps: float, value: float) -> tuple[float, float]:
        x = math.log(steps / counts[0]) / math.log(counts[-1] / counts[0])
        y = ((math.log10(value) if log_scale else 10 * value) - low) / (high - low)
        return left + x * (width - left - right), height - bottom - y * (height - top - bottom)

    for line in range(low, high + 1):
        value, label = (10.0**line, f"1e{line}") if log_scale else (line / 10, f"{line * 10} %")
        x, y = to_pixels(counts[0], value)
        draw.line([(x, y), to_pixels(counts[-1], value)], fill="#dddddd")
        draw.text((x - 45, y - 6), label, fill="black")
    for steps in counts:
        x = to_pixels(steps, 1.0)[0]
        draw.text((x - 8, height - bottom + 8), str(steps), fill="black")
    draw.text((left, 8), title, fill="black")
    labels = sorted(curves, key=lambda name: -curves[name][counts[-1 if log_scale else 0]])
    for i, name in enumerate(labels):
        color = f"hsl({360 * i // len(labels)}, 80%, 40%)"
        points = [to_pixels(steps, value) for steps, value in curves[name].items()]
        draw.line(points, fill=color, width=2)
        row = (width - right + 30, top + 10 + i * 24)
        draw.line([points[-1], (row[0] - 4, row[1] + 6)], fill="#cccccc")
        draw.text(row, name, fill=color)
    image.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plot", type=Path, help="draw the errors by steps here, a PNG")
    parser.add_argument("--samples", type=int, default=50_000, help="samples for mean and covariance")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    orders, standard_errors = convergence(), deviations(num_samples=args.samples)
    print(tables(orders, standard_errors))
    if args.plot is not None:
        errors = {name: row["errors"] for name, row in orders.items()}
        plot(errors, args.plot, "distance from the exact solution, by steps", log_scale=True)
    if args.json is not None:
        listed = [{"sampler": name, **row} for name, row in (orders | standard_errors).items()]
        args.json.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
