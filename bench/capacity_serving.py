"""Simulate a server on autoscaled replicas, event by event."""

import heapq
import math
from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Autoscaling:
    """Replicas of a server, by the rules of Ray Serve's autoscaler."""

    least: int = 1
    most: int = 1
    target_ongoing: float = 1.0
    """Requests that run or wait, for each replica, that it aims at."""
    upscale_delay_s: float = 30.0
    """Seconds for which more must be wanted before replicas are started."""
    downscale_delay_s: float = 600.0
    """Seconds for which fewer must be wanted before replicas are stopped."""
    start_s: float = 0.0
    """Seconds from the decision to a replica that has opened the package."""
    max_queued: int | None = None
    """Requests that may wait; further ones are refused. None is any number."""

    def wanted(self, ongoing: int) -> int:
        """Return the replicas for this many requests that run or wait."""
        return max(self.least, min(self.most, math.ceil(ongoing / self.target_ongoing)))


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What requests and replicas had of a simulated server."""

    waits_s: np.ndarray
    """Seconds that each served request waited, in the order of arrival."""
    refused: int
    """Requests that found the queue full."""
    end_s: float
    """When the last request was served."""
    replica_s: float
    """Seconds of all replicas until then, starting ones included."""
    busy_share: float
    """Share of those in which they made images."""
    most_replicas: int
    """The most at one time."""


class Autoscaler:
    """Decides how many replicas there should be."""

    def __init__(self, autoscaling: Autoscaling) -> None:
        self.autoscaling = autoscaling
        self.target = autoscaling.least
        self.direction, self.since = 0, 0.0  # whether more (1) or fewer (-1) are wanted, and since when

    def decide(self, now: float, ongoing: int) -> int:
        """Return the target for this many requests that run or wait."""
        wanted = self.autoscaling.wanted(ongoing)
        direction = (wanted > self.target) - (wanted < self.target)
        if direction != self.direction:
            self.direction, self.since = direction, now
        delays = {1: self.autoscaling.upscale_delay_s, 0: math.inf, -1: self.autoscaling.downscale_delay_s}
        if now - self.since >= delays[direction]:
            self.target, self.direction = wanted, 0
        return self.target


class _Server:
    """The state of one simulated server."""

    def __init__(self, autoscaling: Autoscaling, arrivals: np.ndarray, seconds: np.ndarray) -> None:
        self.autoscaling, self.arrivals, self.seconds = autoscaling, arrivals.tolist(), seconds.tolist()
        self.autoscaler = Autoscaler(autoscaling)
        self.ready = self.most = autoscaling.least  # ready replicas, of which some are busy
        self.starting = deque[float]()  # when each will be ready
        self.queue = deque[int]()
        self.ends: list[float] = []  # when each busy replica ends: a heap
        self.waits: dict[int, float] = {}
        self.refused = 0
        self.now = self.replica_s = self.busy_s = 0.0

    def simulate(self, tick_s: float) -> Serving:
        scaled, arrived = self.autoscaling.least < self.autoscaling.most, 0
        tick = tick_s if scaled else math.inf
        while arrived < len(self.arrivals) or self.queue or self.ends:
            arrival = self.arrivals[arrived] if arrived < len(self.arrivals) else math.inf
            end, start = (each[0] if each else math.inf for each in (self.ends, self.starting))
            self.wait_until(min(arrival, end, start, tick))
            if self.now == end:
                heapq.heappop(self.ends)
                self.ready = max(len(self.ends), min(self.ready, self.autoscaler.target - len(self.starting)))
            elif self.now == start:
                self.starting.popleft()
                self.ready += 1
            elif self.now == arrival:
                self.take(arrived)
                arrived += 1
            else:
                tick += tick_s
                self.scale()
            self.serve()
        return Serving(
            waits_s=np.array(list(self.waits.values())),
            refused=self.refused,
            end_s=self.now,
            replica_s=self.replica_s,
            busy_share=self.busy_s / self.replica_s if self.replica_s else 0.0,
            most_replicas=self.most,
        )

    def wait_until(self, then: float) -> None:
        self.replica_s += (then - self.now) * (self.ready + len(self.starting))
        self.now = then

    def take(self, request: int) -> None:
        most = self.autoscaling.max_queued
        if most is not None and len(self.ends) == self.ready and len(self.queue) >= most:
            self.refused += 1
        else:
            self.queue.append(request)

    def scale(self) -> None:
        """Start or stop replicas; one that is busy ends its request first."""
        target = self.autoscaler.decide(self.now, len(self.ends) + len(self.queue))
        while self.starting and self.ready + len(self.starting) > target:
            self.starting.pop()
        self.ready = max(len(self.ends), min(self.ready, target - len(self.starting)))
        missing = target - self.ready - len(self.starting)
        self.starting.extend([self.now + self.autoscaling.start_s] * missing)
        self.most = max(self.most, self.ready + len(self.starting))

    def serve(self) -> None:
        while self.queue and len(self.ends) < self.ready:
            request = self.queue.popleft()
            self.waits[request] = self.now - self.arrivals[request]
            self.busy_s += self.seconds[request]
            heapq.heappush(self.ends, self.now + self.seconds[request])


def simulate_serving(
    autoscaling: Autoscaling, arrivals: np.ndarray, seconds: np.ndarray, *, tick_s: float = 1.0
) -> Serving:
    """Simulate a server that takes requests in order, each to the first free replica.

    Args:
        autoscaling: the replicas.
        arrivals: ascending times of requests, seconds, (N,).
        seconds: how long a replica takes for each, (N,).
        tick_s: seconds between looks of the autoscaler.
    """
    return _Server(autoscaling, arrivals, seconds).simulate(tick_s)


def arrival_times(
    kind: str, per_hour: float, hours: float, rng: np.random.Generator, *, swing: float = 0.8, burst: float = 10.0
) -> np.ndarray:
    """Return ascending times of requests in seconds, a Poisson process with ``per_hour`` in the mean.

    ``kind`` is its rate over time: "poisson" is constant, "day" a cosine of 24 hours that is lowest at the start and
    deviates by the share ``swing``, "burst" is ``burst`` times as high in the middle twentieth.
    """
    end = 3600 * hours
    if kind == "day":
        peak = 1 + swing
    elif kind == "burst":
        peak = burst / (0.95 + 0.05 * burst)
    else:
        peak = 1.0
    times = np.sort(rng.uniform(0, end, rng.poisson(per_hour * hours * peak)))
    if kind == "day":
        rates = 1 - swing * np.cos(2 * np.pi * times / 86400)
    elif kind == "burst":
        rates = np.where(np.abs(times / end - 0.5) <= 0.025, peak, peak / burst)
    else:
        return times
    return times[rng.uniform(0, peak, len(times)) < rates]
