"""Seeded noise, equal to torch.randn on the CPU: the same seed makes the same image."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sdonnx_runtime.arrays import Array

_BLOCK = 16


class Noise:
    """``torch.Generator("cpu").manual_seed(seed)``; calling it is ``torch.randn``.

    MT19937 through 24-bit uniforms and Box-Muller over blocks of 16, as ATen's normal_fill does it; within 1e-6
    of torch. A shape of fewer than 16 numbers takes ATen's scalar path in double precision. The seed is 0 to
    2**64 - 1, of which the generator takes the low 32 bits, as in torch.
    """

    def __init__(self, seed: int) -> None:
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        self._spare: float | None = None

    def __call__(self, shape: tuple[int, ...]) -> Array:
        """Draw standard normal numbers of a shape, float32; each call continues the sequence."""
        count = math.prod(shape)
        if count < _BLOCK:
            return np.array([self._scalar() for _ in range(count)], np.float32).reshape(shape)
        uniforms = self._uniform(count)
        end = count - count % _BLOCK
        normals = np.empty(count, np.float32)
        normals[:end] = _box_muller(uniforms[:end])
        if end < count:
            normals[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return normals.reshape(shape)

    def _uint32(self, count: int) -> NDArray[np.uint32]:
        return np.frombuffer(self._twister.bytes(4 * count), "<u4")

    def _uniform(self, count: int) -> Array:
        return (self._uint32(count) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _scalar(self) -> float:
        """Box-Muller on 53-bit uniforms, two numbers at a time."""
        if self._spare is not None:
            spare, self._spare = self._spare, None
            return spare
        angle, radius = (self._double() for _ in range(2))
        length = math.sqrt(-2 * math.log1p(-radius))
        self._spare = length * math.sin(2 * math.pi * angle)
        return length * math.cos(2 * math.pi * angle)

    def _double(self) -> float:
        high, low = (int(word) for word in self._uint32(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2**-53


def slerp(a: Array, b: Array, fraction: float) -> Array:
    """Interpolate from a (fraction 0) to b (fraction 1) along the great circle between them, Shoemake 1985.

    Each array is one vector. The result of two arrays of noise is noise too.
    """
    cosine = float(np.vdot(a, b)) / float(np.linalg.norm(a) * np.linalg.norm(b))
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if angle < 1e-6:
        return a
    weights = (math.sin((1 - fraction) * angle) / math.sin(angle), math.sin(fraction * angle) / math.sin(angle))
    return np.float32(weights[0]) * a + np.float32(weights[1]) * b


def interpolate_noise(a: Noise, b: Noise, fraction: float) -> Callable[[tuple[int, ...]], Array]:
    """Make a noise source that interpolates between two by `slerp`: a at fraction 0, b at fraction 1."""
    return lambda shape: slerp(a(shape), b(shape), fraction)


def _box_muller(uniforms: Array) -> Array:
    """Convert (n,) uniforms to (n,) normals, n a multiple of 16: 8 radii, 8 angles."""
    radii, angles = uniforms.reshape(-1, 2, 8).swapaxes(0, 1)
    length = np.sqrt(-2 * np.log(1 - radii))
    angle = np.float32(2 * np.pi) * angles
    return np.stack([length * np.cos(angle), length * np.sin(angle)], axis=1).reshape(-1)
