"""A server's jobs on a cluster: replicas that Ray Serve starts and ends as jobs come, behind the server's own queue."""

import logging
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

os.environ.setdefault("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")  # read by the import

import ray.serve as _serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus
from sdonnx_runtime.execution.ort import first_line

import sdonnx
from sdonnx.cluster.connection import ray
from sdonnx.cluster.orders import Order, Update, follow
from sdonnx.cluster.replica import Replica
from sdonnx.cluster.resources import num_gpus
from sdonnx.cluster.scaling import Bounds, Replicas
from sdonnx.server.generation import GenerationJob
from sdonnx.server.images import ImageStore
from sdonnx.server.jobs import Job, State
from sdonnx.server.library import Library
from sdonnx.server.running import MakeRunner, save_latents
from sdonnx.server.upscaling import UpscalingJob

logger = logging.getLogger(__name__)

serve: Any = _serve
"""Ray Serve, whose functions are annotated in part, as Ray's."""

_ATTEMPTS = 3
"""How often a job is run whose replica is lost."""

_PATIENCE = 600.0
"""Seconds for which a job waits while there is no replica at all: cloud machines take minutes to start."""

_SILENCE = 15.0
"""Seconds in which a replica may start before the log says that there is none."""

_WATCH_SECONDS = 2.0
"""Between looks at the replicas, while a job waits for one."""

_SCALING = {
    "metrics_interval_s": 1.0,
    "look_back_period_s": 2.0,
    "upscale_delay_s": 2.0,
    "downscale_delay_s": 300.0,
}
"""Jobs take seconds to minutes, so replicas are started at once, and ended after five minutes without work."""

_PARTING_SECONDS = 10.0
"""For the last look at the replicas to end; of a cluster that is gone, it may not."""

_BACKOFF = 0.05
"""Seconds at most between the router's looks for a replica that is free; Ray's own half second is lost to each job."""

_DRAIN_SECONDS = 3600.0
"""A replica that is no longer needed may finish the job that it runs."""


@contextmanager
def replicas(chosen: Replicas, name: str) -> Generator[MakeRunner, None, None]:
    """Make a runner whose jobs run on the connected cluster; at the end, what it started there is removed.

    ``name`` is that of the application in Ray Serve; one of the same name is replaced.
    """
    _quieten()
    had_serve = _has_serve()
    deployed: list[ClusterRunner] = []

    def make_runner(library: Library, store: ImageStore) -> ClusterRunner:
        serve.start(proxy_location="Disabled")
        runner = ClusterRunner(library, store, chosen.bounds, name, _deploy(chosen, library, name))
        deployed.append(runner)
        return runner

    try:
        yield make_runner
    finally:
        with suppress(RayError, RayServeException, TimeoutError):
            for runner in deployed:
                runner.close()
            if deployed:
                _delete(name)
            if not had_serve and not serve.status().applications:
                serve.shutdown()


def _quieten() -> None:
    """Keep what Ray tells of its own processes out of the server's log."""
    logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.ERROR)


def _delete(name: str) -> None:
    """Remove an application; none of its replicas has a job any more, and some may never have been placed."""
    serve.delete(name, _blocking=False)
    while (found := serve.status().applications.get(name)) is not None and found.status != "DELETING":
        time.sleep(0.1)
    for each in ray.util.list_named_actors(all_namespaces=True):
        if each["name"].startswith(f"SERVE_REPLICA::{name}#"):
            with suppress(ValueError):  # it has ended
                ray.kill(ray.get_actor(each["name"], namespace=each["namespace"]))
    serve.delete(name)


def _has_serve() -> bool:
    """Whether Ray Serve runs on the cluster already."""
    with suppress(ValueError):
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        return True
    return False


def _deploy(chosen: Replicas, library: Library, name: str) -> Any:
    """Deploy the replicas; returns the handle by which they are called."""
    settings, bounds = chosen.settings, chosen.bounds
    options: dict[str, Any] = {"num_cpus": settings.threads or 1, "num_gpus": num_gpus(settings.device)}
    options |= {} if chosen.memory is None else {"memory": chosen.memory}
    deployment = serve.deployment(
        Replica,
        name=_DEPLOYMENT,
        max_ongoing_requests=1,
        request_router_config=cast("Any", RequestRouterConfig)(max_backoff_s=_BACKOFF),
        autoscaling_config={
            "min_replicas": bounds.least,
            "max_replicas": bounds.most,
            "target_ongoing_requests": 1,
            **_SCALING,
        },
        ray_actor_options=options,
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        health_check_period_s=5,
        logging_config={"log_level": "ERROR", "enable_access_log": False},
    )
    public = replace(settings, token=None, cors=(), allowed_hosts=())
    application = deployment.bind(public, chosen.packages, library.digests(), chosen.files)
    target = serve.RunTarget(application, name=name, route_prefix=None)
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    return handle.options(stream=True)


_DEPLOYMENT = "replicas"


class _ReplicaLost(Exception):  # noqa: N818
    """A replica ended before its job."""


class _Call:
    """An order that was given, and waits for its replica or runs there."""

    def __init__(self, response: Any) -> None:
        self.response = response
        self.since = time.monotonic()
        self.has_begun = False
        self.error: sdonnx.SdonnxError | None = None

    def give_up(self, error: sdonnx.SdonnxError) -> None:
        """End it with an error."""
        self.error = error
        self.response.cancel()


class ClusterRunner:
    """Lets replicas run the jobs, each one at a time."""

    def __init__(self, library: Library, store: ImageStore, bounds: Bounds, name: str, handle: Any) -> None:
        self.slots = bounds.most
        self._library, self._store, self._name, self._handle = library, store, name, handle
        self._calls: set[_Call] = set()
        self._closed = threading.Event()
        self._last_replica = time.monotonic()
        self._told: set[str] = set()
        self._watcher = threading.Thread(target=self._watch, name="sdonnx replicas", daemon=True)
        self._watcher.start()

    def run(self, job: Job, begin: Callable[[], bool]) -> None:
        """Run a job to its end, again on another replica if its own is lost."""
        order, error = Order.of(job, self._digests(job)), _LOST
        for attempt in range(_ATTEMPTS):
            if attempt and not job.is_cancelled:
                logger.warning("job %s is run again: %s", job.id, error)
                job.restart()
            try:
                return self._run_once(job, order, begin)
            except _ReplicaLost as lost:
                error = str(lost)
        raise sdonnx.SdonnxError(f"{error}; the job was tried {_ATTEMPTS} times")

    def rest(self) -> None:
        """Nothing: the replicas do so by themselves."""

    def close(self) -> None:
        """Stop watching the replicas, and the requests of the handle, before the connection to the cluster ends."""
        self._closed.set()
        self._watcher.join(_PARTING_SECONDS)
        with suppress(AttributeError, ImportError):  # of another version of Ray
            _stop_updates(self._handle)
        self._handle.shutdown()  # which reports to the controller every second how many jobs wait

    def _digests(self, job: Job) -> dict[str, str]:
        """The digests of the packages that a job takes."""
        if isinstance(job, GenerationJob):
            chosen = job.generation.selection
            one = (chosen.model, chosen.vae, chosen.refiner, chosen.upscaler)
            names = {*one, *chosen.controls, *chosen.ip_adapters}
        else:
            assert isinstance(job, UpscalingJob)  # noqa: S101 — for the type checker
            names = set(job.upscaling.packages)
        return {name: digest for name, digest in self._library.digests().items() if name in names}

    def _run_once(self, job: Job, order: Order, begin: Callable[[], bool]) -> None:
        """Run a job on a replica; raises _ReplicaLost if that ends before it does."""
        call = _Call(self._handle.run.remote(order))
        self._calls.add(call)
        job.attach(call.response.cancel)
        try:
            for update in call.response:
                if not call.has_begun and not begin():
                    call.response.cancel()
                    return
                call.has_begun = True
                self._note(job, update)
        except (RayError, RayServeException) as error:
            if job.state.is_final:  # after its last update, or while it waited
                return
            if call.error is not None:
                raise call.error from None
            if not job.is_cancelled:
                raise _describe(error) from error
        finally:
            self._calls.discard(call)
        if job.is_cancelled and not job.state.is_final:
            job.end(State.CANCELLED, step=job.step)

    def _note(self, job: Job, update: Update) -> None:
        """Note an update of a job; raises why it failed."""
        if update.is_unfit:
            raise _ReplicaLost(str(update.error))
        if update.kind == "failed" and update.error is not None:
            end = ""
            if update.latents is not None and isinstance(job, GenerationJob):
                kept = update.latents
                end = save_latents(self._library, self._store, job, kept.latents, kept.request, kept.compute)
            raise type(update.error)(f"{update.error}{end}")
        if update.kind == "cancelled":
            job.end(State.CANCELLED, step=job.step)
        elif update.kind == "done":
            files = self._store.save_pngs(job.id, update.pngs)
            if isinstance(job, UpscalingJob):
                job.finish(files)
            elif isinstance(job, GenerationJob) and update.result is not None:
                job.finish(update.result, files)
        else:
            follow(job, update)

    def _watch(self) -> None:
        """Say which nodes have no replica and why, and end the calls for which none will come."""
        while not self._closed.wait(_WATCH_SECONDS):
            waiting = [call for call in list(self._calls) if not call.has_begun]
            if not waiting:
                self._last_replica = time.monotonic()
                continue
            with suppress(RayError, RayServeException):
                self._check_replicas(waiting)

    def _check_replicas(self, waiting: list[_Call]) -> None:
        application = serve.status().applications.get(self._name)
        if application is None:
            return self._give_up(waiting, "Ray Serve does not know this server's replicas any more; start it again")
        deployment = application.deployments.get(_DEPLOYMENT)
        if deployment is None:
            return None
        if deployment.replica_states.get("RUNNING", 0) > 0:
            self._last_replica = time.monotonic()
            return None
        absent, reason = time.monotonic() - self._last_replica, _reason(deployment.message)
        if reason not in self._told and absent > _SILENCE:
            self._told.add(reason)
            logger.warning("no replica runs yet: %s", reason)
        if application.status is ApplicationStatus.DEPLOY_FAILED:
            return self._give_up(waiting, f"no replica can be started: {reason}")
        late = [call for call in waiting if time.monotonic() - max(call.since, self._last_replica) > _PATIENCE]
        return self._give_up(late, f"no replica was started within {_PATIENCE:.0f} s: {reason}")

    @staticmethod
    def _give_up(calls: list[_Call], message: str) -> None:
        for call in calls:
            call.give_up(sdonnx.SdonnxError(message))


def _stop_updates(handle: Any) -> None:
    """Stop asking for a handle's replicas; after their first answers, all handles of a process ask together."""
    from ray.serve._private.router import SharedRouterLongPollClient

    router = handle._router._asyncio_router
    shared: Any = SharedRouterLongPollClient.get_or_create(router._controller_handle, router._event_loop)
    shared.routers.pop(router.deployment_id, None)
    if not shared.routers:
        shared.long_poll_client.stop()
    router.long_poll_client.stop()


_LOST = "the replica that ran it was lost"


def _describe(error: Exception) -> Exception:
    """What became of a job whose replica did not end it."""
    if isinstance(error, RayServeException):
        return sdonnx.SdonnxError(f"the cluster does not take the job: {first_line(error)}")
    if isinstance(error, RayTaskError) and not isinstance(error, TaskCancelledError):
        return error  # a fault of the replica's, which another one would have as well
    return _ReplicaLost(_LOST)


def _reason(message: str) -> str:
    """Why a deployment has no replica: sdonnx' own error of the latest one, if its status has one."""
    found = [line for line in message.splitlines() if "Error: " in line and "sdonnx" in line]
    if found:
        return found[-1].partition("Error: ")[2].strip()
    return "no node has the CPUs and the memory for one that are free"
