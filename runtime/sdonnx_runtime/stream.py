"""A generation step by step: what `Pipeline.stream` gives."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from PIL.Image import Image

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.execution.components import Runner
from sdonnx_runtime.execution.session import Cancelled
from sdonnx_runtime.generation import Generation, Progress
from sdonnx_runtime.memory.planner import Plan
from sdonnx_runtime.request import Request
from sdonnx_runtime.result import Result


class Stream(Iterator[Progress]):
    """A generation under way; made by `Pipeline.stream`.

    Dropping it, `close` or an exception in the loop around it cancels; from another thread `close` stops inside
    the current step, and the loop ends.
    """

    def __init__(
        self,
        generation: Generation,
        run: Runner,
        previewer: Callable[[Array], Image] | None = None,
        plan: Plan | None = None,
    ) -> None:
        self.plan = plan
        """How it is run; None where every component is whole."""
        self._generation, self._run, self._previewer = generation, run, previewer
        self._steps = generation.steps()

    @property
    def request(self) -> Request:
        """The request with every choice made."""
        return self._generation.request

    @property
    def result(self) -> Result:
        """The pictures, once the iteration has ended by itself.

        Raises:
            RequestError: it has not.
        """
        if self._generation.result is None:
            raise RequestError("the generation has no result: it was cancelled, or not all its steps were taken")
        return self._generation.result

    @property
    def latents(self) -> Array | None:
        """(num_images, C, h, w), once every step is taken, even if decoding fails then; None before.

        Of two passes, the first one's until the second has taken its steps.
        """
        return self._generation.latents

    @property
    def latents_request(self) -> Request:
        """The request that ``latents`` are what was asked for: without a second pass until it has taken its steps."""
        return self._generation.latents_request

    def before_decoding(self, call: Callable[[Array, Request], None]) -> None:
        """Has something called with ``latents`` and ``latents_request`` once every step is taken."""
        self._generation.before_decoding = call

    def close(self) -> None:
        """Cancels, from any thread."""
        self._run.cancel()
        try:
            self._steps.close()
        except ValueError:  # another thread is inside the step, which ends now
            return

    def __next__(self) -> Progress:
        try:
            return replace(next(self._steps), decoder=self._previewer)
        except Cancelled:
            raise StopIteration from None

    def __del__(self) -> None:
        self.close()
