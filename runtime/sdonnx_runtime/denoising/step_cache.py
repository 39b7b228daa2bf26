"""DeepCache: reuse the U-Net's deep features between steps, arXiv:2312.00858."""

import math
from collections.abc import Callable, Mapping

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.packages.manifest import CACHED_FEATURES


def unet_graphs(reuse: int, *, token_downsampling: bool, controlled: bool = False) -> tuple[str, str]:
    """The U-Net's graphs for a whole step and for one that reuses it."""
    last = [*["downsampled"] * token_downsampling, *["controlled"] * controlled]
    if reuse == 1:
        whole = "-".join(last) or "plain"
        return whole, whole
    return "-".join(["keeping", *last]), "-".join(["reusing", *last])


class DeepCache:
    """A U-Net of which every ``reuse`` steps one runs the whole, and the others its outermost part alone.

    What the inner part came to is kept from the last whole step; DeepCache, arXiv:2312.00858. Steps are counted, not
    runs: both runs of a step that has two are whole, or neither is. Whole are the first step and the last, and one
    that starts from more noise than the one before it.
    """

    def __init__(
        self,
        run: Callable[[Mapping[str, AnyArray], str], Mapping[str, AnyArray]],
        graphs: tuple[str, str],
        reuse: int,
    ) -> None:
        """``run(inputs, graph)`` gives the outputs of one of ``graphs``, see `unet_graphs`."""
        self._run, self._graphs, self._reuse = run, graphs, reuse
        self._age, self._begins, self._before = 0, True, math.inf
        self._kept: AnyArray = np.empty(0)

    def next_step(self, *, last: bool) -> None:
        """The step's runs are done; tells whether the next is the ``last``."""
        self._age = 0 if last else (self._age + 1) % self._reuse
        self._begins = True

    def __call__(self, inputs: Mapping[str, AnyArray]) -> Array:
        """The prediction."""
        rows, timestep = max(len(value) for value in inputs.values() if value.ndim > 0), float(inputs["timestep"])
        if self._begins:
            self._age = 0 if timestep > self._before else self._age
            self._begins, self._before = False, timestep
        if self._age > 0 and rows <= len(self._kept):  # the conditional row, which may go on alone, is the last
            (output,) = self._run({**inputs, CACHED_FEATURES: self._kept[-rows:]}, self._graphs[1]).values()
            return output
        self._age = 0
        outputs = dict(self._run(inputs, self._graphs[0]))
        self._kept = outputs.pop(CACHED_FEATURES, self._kept)
        (output,) = outputs.values()
        return output
