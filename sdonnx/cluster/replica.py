"""A replica: runs jobs of a server on a node of the cluster, one at a time, with pipelines of its own."""

import asyncio
import logging
from asyncio import TimerHandle
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.outputs.metadata import encode_png
from sdonnx_runtime.request import CompleteRequest

import sdonnx
from sdonnx.cluster.connection import ray
from sdonnx.cluster.orders import Latents, Order, Update, portable
from sdonnx.cluster.packages import Source, check_sources
from sdonnx.loading import find_model
from sdonnx.server.generation import GenerationJob, forget_pixels
from sdonnx.server.jobs import Event, Job, Preview
from sdonnx.server.library import Library
from sdonnx.server.running import PipelineRunner, as_sdonnx_error
from sdonnx.server.settings import Settings
from sdonnx.server.upscaling import UpscalingJob

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 300.0
"""After which the components that stay loaded for the next job are unloaded."""


_UNFIT_SECONDS = 20.0
"""For which a replica whose packages differ takes no job; meanwhile Ray Serve replaces it."""


class Replica:
    """Runs jobs on a node; Ray Serve makes it.

    Args:
        settings: of the server, for pipelines.
        packages: those of the settings, as `find_model` takes them.
        digests: the SHA-256 of all packages that are served at the start, by their names.
        files: the folders and files that the settings name.

    Raises:
        PackageError: a package or a file of this node is not the server's.
    """

    def __init__(
        self,
        settings: Settings,
        packages: Sequence[str],
        digests: Mapping[str, str],
        files: Sequence[Source] = (),
    ) -> None:
        self._node = ray.util.get_node_ip_address()
        check_sources(files, self._node)
        self._library = self._open(settings, packages)
        self._thread = ThreadPoolExecutor(1, "sdonnx worker")
        self._idle: TimerHandle | None = None
        self._unfit: sdonnx.PackageError | None = None
        self._check(digests)

    def check_health(self) -> None:
        """Tell Ray Serve to replace this replica if a package of its node is not the server's."""
        if self._unfit is not None:
            raise self._unfit

    async def run(self, order: Order) -> AsyncIterator[Update]:
        """Run a job; it ends within a step if nobody waits for it any more."""
        if self._idle is not None:
            self._idle.cancel()
        loop, updates = asyncio.get_running_loop(), asyncio.Queue[Update]()
        reporter = _Reporter(lambda update: loop.call_soon_threadsafe(updates.put_nowait, update))
        job = order.make_job(reporter.note)
        ended = loop.run_in_executor(self._thread, self._run, order, job, reporter)
        try:
            while True:
                update = await updates.get()
                yield update
                if update.kind in _LAST:
                    break
        finally:
            job.cancel()
            await asyncio.wait([ended])
            if self._unfit is not None:
                await asyncio.sleep(_UNFIT_SECONDS)
            self._idle = loop.call_later(_IDLE_SECONDS, self._thread.submit, self._library.close)

    def _run(self, order: Order, job: Job, reporter: "_Reporter") -> None:
        """Run a job in the thread that owns the pipelines."""
        runner = _ReportingRunner(self._library, reporter)
        try:
            self._check(order.digests)
        except sdonnx.PackageError as error:
            self._unfit = error
            reporter.report(Update(kind="failed", error=error, is_unfit=True))
            return
        try:
            runner.run(job, lambda: _begin(job))
        except Exception as error:  # the replica has to outlive every job
            if not isinstance(error, (sdonnx.SdonnxError, MemoryError)):
                logger.exception("a job failed")
            reporter.report(Update(kind="failed", error=as_sdonnx_error(error), latents=runner.latents))

    def _check(self, digests: Mapping[str, str]) -> None:
        """Check packages by their digests; raises PackageError that names the node and the first that differs."""
        wrong = _differing(self._library, digests)
        if wrong:
            self._library.refresh()  # which may have come since
            wrong = _differing(self._library, digests)
        if wrong:
            name, digest = next(iter(wrong.items()))
            is_there = name in self._library.digests()
            what = (
                f"{name} differs from this machine's (SHA-256 {digest[:10]}…)" if is_there else f"{name} is not there"
            )
            raise sdonnx.PackageError(f"node {self._node}: {what}; copy the package there")

    def _open(self, settings: Settings, packages: Sequence[str]) -> Library:
        """Open the packages of this node; raises PackageError that names it."""
        try:
            return Library(replace(settings, packages=tuple(find_model(each) for each in packages)))
        except sdonnx.SdonnxError as error:
            raise sdonnx.PackageError(f"node {self._node}: {error}") from None


def _differing(library: Library, digests: Mapping[str, str]) -> dict[str, str]:
    found = library.digests()
    return {name: digest for name, digest in digests.items() if found.get(name) != digest}


def _begin(job: Job) -> bool:
    job.begin()
    return True


_LAST = ("done", "failed", "cancelled")


class _Reporter:
    """Turns the events of a job into updates."""

    def __init__(self, report: Callable[[Update], object]) -> None:
        self.report = report
        self.pngs: dict[int, bytes] = {}
        self._request: CompleteRequest | None = None
        self._preview: Preview | None = None

    def note(self, job: Job, event: Event) -> None:
        """Report an event of the job."""
        if event.kind in ("queued", "preview"):
            return
        request, preview, result = None, None, None
        if isinstance(job, GenerationJob):
            if event.kind != "running" and job.request is not self._request:
                self._request = job.request
                request = forget_pixels(job.request)
            result = job.result
        if job.preview is not self._preview and job.preview is not None:
            self._preview = job.preview
            preview = portable(job.preview)
        pngs = self.pngs if event.kind == "done" else {}
        self.report(
            Update(kind=event.kind, data=event.data, request=request, preview=preview, result=result, pngs=pngs)
        )


class _ReportingRunner(PipelineRunner):
    """Runs a job, and keeps its images for the reporter instead of storing them."""

    def __init__(self, library: Library, reporter: _Reporter) -> None:
        super().__init__(library)
        self._reporter = reporter
        self.latents: Latents | None = None

    def save_result(self, job: GenerationJob, result: sdonnx.Result) -> list[str]:
        provenance = self.library.settings.provenance
        kept = [index for index in range(len(result.images)) if index not in result.refused]
        self._reporter.pngs = {index: encode_png(result, index, provenance=provenance) for index in kept}
        return []

    def save_pngs(self, job: UpscalingJob, pngs: Sequence[bytes]) -> list[str]:
        self._reporter.pngs = dict(enumerate(pngs))
        return []

    def save_latents(self, job: GenerationJob, latents: Array, request: CompleteRequest, compute: str) -> str:
        self.latents = Latents(latents=latents, request=forget_pixels(request), compute=compute)
        return ""
