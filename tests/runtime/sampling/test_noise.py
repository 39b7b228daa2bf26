"""Noise equals torch.randn on the CPU."""

import numpy as np
import pytest
import scipy.spatial
import torch
from sdonnx_runtime.sampling.noise import Noise, slerp

SHAPES = [
    (1, 4, 64, 64),
    (2, 4, 8, 8),
    (1, 4, 9, 11),
    (17,),
    (31,),
    (16,),
    (15,),
    (3,),
    (1,),
    (2,),
    (1, 4, 13, 7),
]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32 + 5, 2**40 + 7, 2**63 - 1, 2**64 - 1])
def test_noise_equals_torch_draw_after_draw(seed):
    generator, noise = torch.Generator("cpu").manual_seed(seed), Noise(seed)
    for shape in SHAPES:
        expected = torch.randn(shape, generator=generator).numpy()
        found = noise(shape)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_noise_is_standard_normal():
    values = Noise(3)((1_000_000,))
    assert abs(values.mean()) < 5e-3
    assert abs(values.std() - 1) < 5e-3


@pytest.mark.parametrize("share", [0, 0.2, 0.5, 1])
def test_between_two_noises_lies_the_great_circle(share):
    doubles = (Noise(seed)((1, 4, 8, 8)).astype(np.float64) for seed in (1, 2))
    units = [noise / np.linalg.norm(noise) for noise in doubles]
    wanted = scipy.spatial.geometric_slerp(*(unit.ravel() for unit in units), share)
    a, b = (unit.astype(np.float32) for unit in units)
    np.testing.assert_allclose(slerp(a, b, share).ravel(), wanted, atol=1e-6)
    np.testing.assert_array_equal(slerp(a, a, share), a)
