"""DeepCache: reuse the U-Net's deep features between steps, arXiv:2312.00858."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.execution.running.device_array import Tensor, as_numpy, last_entries
from sdonnx_runtime.packages.variant import CACHED_FEATURES, Variant

RunUNetGraph: TypeAlias = Callable[[Mapping[str, Tensor], Variant], Mapping[str, Tensor]]
"""Runs one of a U-Net's graphs on its inputs by name; returns its outputs, of which the cached features may be in a
device's memory."""


def unet_graphs(cache_interval: int, *, token_downsampling: bool, controlled: bool = False) -> tuple[Variant, Variant]:
    """Return the U-Net's graphs of full steps and of cached ones."""
    full = Variant(token_downsampling=token_downsampling, controlled=controlled)
    return (full, full) if cache_interval == 1 else (replace(full, cache="caching"), replace(full, cache="cached"))


class DeepCache:
    """A U-Net that runs in full every ``interval`` steps; in between only its outermost level runs.

    Steps are counted, not runs: all runs of a step are full, or none. The first step and the last are full, and one
    that starts from a later timestep than the one before.

    ``graphs`` are those of `unet_graphs`, ``interval`` is the request's ``cache_interval``.
    """

    def __init__(self, run: RunUNetGraph, graphs: tuple[Variant, Variant], interval: int) -> None:
        self._run, self._graphs, self._interval = run, graphs, interval
        self._age, self._is_first_run, self._last_timestep = 0, True, math.inf
        self._features: Tensor = np.empty(0)

    def next_step(self, *, last: bool) -> None:
        """Go on to the next step; ``last`` says whether it is the last one."""
        self._age = 0 if last else (self._age + 1) % self._interval
        self._is_first_run = True

    def forget(self) -> None:
        """Drop the features, which keep the U-Net that made them in a device's memory."""
        self._features = np.empty(0)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Array:
        """Run the step's graph; returns the prediction."""
        entries, timestep = (
            max(len(value) for value in inputs.values() if value.ndim > 0),
            float(as_numpy(inputs["timestep"])),
        )
        if self._is_first_run:
            self._age = 0 if timestep > self._last_timestep else self._age
            self._is_first_run, self._last_timestep = False, timestep
        if self._age > 0 and entries <= len(self._features):  # the conditional entry, which may run alone, is the last
            features = last_entries(self._features, entries)
            (output,) = self._run({**inputs, CACHED_FEATURES: features}, self._graphs[1]).values()
            return as_numpy(output)
        self._age = 0
        outputs = dict(self._run(inputs, self._graphs[0]))
        self._features = outputs.pop(CACHED_FEATURES, self._features)
        (output,) = outputs.values()
        return as_numpy(output)
