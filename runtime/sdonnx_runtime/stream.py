"""A generation step by step: what `Pipeline.stream` returns."""

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace

from PIL.Image import Image

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.execution.components import Runner
from sdonnx_runtime.execution.session import Cancelled
from sdonnx_runtime.memory.planner import Plan
from sdonnx_runtime.progress import Progress, SampledLatents
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.result import Result


class Stream(Iterator[Progress]):
    """A generation step by step; deletion, `close` or an exception in the loop around it cancels."""

    def __init__(
        self,
        request: CompleteRequest,
        events: Generator[Progress | SampledLatents, None, Result],
        run: Runner,
        previewer: Callable[[Array], Image] | None = None,
        plan: Plan | None = None,
    ) -> None:
        self.request = request
        """The request with every choice made."""
        self.plan = plan
        """How components are run; None where every component is whole."""
        self._events, self._run, self._previewer = events, run, previewer
        self._stepping = threading.Lock()
        self._sampled: SampledLatents | None = None
        self._result: Result | None = None
        self._on_sampled: Callable[[Array, CompleteRequest], None] | None = None

    @property
    def result(self) -> Result:
        """The images, once the iteration has ended by itself; raises RequestError before."""
        if self._result is None:
            raise RequestError("the generation has no result: it was cancelled, or has steps left")
        return self._result

    @property
    def latents(self) -> Array | None:
        """(num_images, C, h, w), of the last pass whose steps are all done, even if decoding fails then; else None."""
        return None if self._sampled is None else self._sampled.latents

    @property
    def compute(self) -> str:
        """What was computed in so far: f32, bf16 or f16."""
        return self._run.compute

    @property
    def devices(self) -> Mapping[str, str]:
        """The names of the devices that components have run on so far, by component."""
        return self._run.devices

    @property
    def latents_request(self) -> CompleteRequest:
        """The request of ``latents``: without hires fix until the second pass has done its steps."""
        return self.request if self._sampled is None else self._sampled.request

    def on_opening(self, call: Callable[[str | None], None]) -> None:
        """Set a callback for the name of a component that is about to be opened, and for None once it is open."""
        self._run.on_opening = call

    def on_upscaling(self, call: Callable[[int, int], None]) -> None:
        """Set a callback for the tiles that an upscaler has done between the passes, and for the number of all."""
        self._run.on_upscaling = call

    def before_decoding(self, call: Callable[[Array, CompleteRequest], None]) -> None:
        """Set a callback for ``latents`` and ``latents_request`` once every step is done."""
        self._on_sampled = call

    def close(self) -> None:
        """Cancel; from another thread it stops inside the current step, and the loop ends."""
        self._run.cancel()
        if self._stepping.acquire(blocking=False):  # otherwise another thread is inside the step, which ends now
            try:
                self._events.close()
            finally:
                self._stepping.release()

    def __next__(self) -> Progress:
        try:
            while not isinstance(event := self._next_event(), Progress):
                self._sampled = event
                if event.last and self._on_sampled is not None:
                    self._on_sampled(event.latents, event.request)
            return replace(event, decoder=self._previewer)
        except Cancelled:
            raise StopIteration from None
        except StopIteration as end:
            self._result = self._result if end.value is None else end.value
            raise StopIteration from None

    def _next_event(self) -> Progress | SampledLatents:
        with self._stepping:
            return next(self._events)

    def __del__(self) -> None:
        self.close()
