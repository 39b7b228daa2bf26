"""Simulate a batch on the actors of a cluster's nodes, event by event."""

import bisect
import heapq
import math
from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of one kind, their actors, and what goes wrong with them."""

    seconds_per_image: float
    """Mean of an actor on a node that is not slow."""
    actors: int = 1
    """Of each node; each makes one image at a time."""
    open_s: float = 0.0
    """Seconds in which an actor starts and opens the package."""
    running: int | None = None
    """Nodes that run when the batch starts; None is all."""
    node_start_s: float = 0.0
    """Seconds from asking for another node to its actors' start."""
    upscaling_speed: float = 1.0
    """Nodes that Ray's autoscaler asks for at once, as a multiple of those that run; but always one."""
    launches: int = 10
    """The most nodes that it asks for at once."""
    update_s: float = 5.0
    """Seconds after which it asks for more."""
    idle_timeout_s: float = math.inf
    """Seconds after which a node without work is given back."""
    spread: float = 0.0
    """Standard deviation of the logarithm of an image's seconds; their mean stays the same."""
    slow_share: float = 0.0
    """Share of nodes that are slow, 0 to 1."""
    slow_factor: float = 1.0
    """How many times longer a slow node takes."""
    mtbf_h: float = math.inf
    """Mean hours between a node's failures, which are exponentially distributed."""
    restart_s: float = 0.0
    """Seconds from a failure to the start of actors on the node that replaces it."""
    driver_s: float = 0.0
    """Seconds for each image in which the one driver takes and writes it."""
    price: float = 0.0
    """Of a node, per hour."""
    head_price: float = 0.0
    """Of the node that the driver runs on, per hour; 0 if it is one of the nodes."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A simulated batch. Shares are of the time of all actors from start to end; with the efficiency they sum to 1."""

    nodes: int
    makespan_s: float
    """Seconds until the last image is written."""
    ideal_s: float
    """Seconds if all actors worked all the time."""
    images_per_hour: float
    images_per_hour_and_node: float
    efficiency: float
    """The share in which actors make images at the speed of a node that is not slow."""
    cost_per_thousand: float
    """Of a thousand images, in the price's currency."""
    done_again: float
    """Images that a failure interrupted, and that another actor made."""
    slow_share: float
    """What slow nodes take longer."""
    failure_share: float
    """Interrupted images, and nodes that restart."""
    start_share: float
    """Nodes and actors that start."""
    idle_share: float
    """Actors without an image: others have the last ones, or the driver has not caught up."""


class _Run:
    """The state of one simulated batch."""

    def __init__(self, cluster: Cluster, nodes: int, images: int, rng: np.random.Generator) -> None:
        self.cluster, self.nodes, self.images, self.rng = cluster, nodes, images, rng
        self.asked, self.up = start_times(cluster, nodes)
        slow = np.arange(nodes) < round(cluster.slow_share * nodes)
        self.factors = np.where(rng.permutation(slow), cluster.slow_factor, 1.0).tolist()
        self.waiting, self.finished, self.done_again = images, 0, 0
        self.epochs = [0] * nodes  # failures so far; an event of an older epoch is void
        self.running: list[dict[int, float]] = [{} for _ in range(nodes)]  # when each busy actor began
        self.idle = deque[tuple[int, int, int]]()  # node, actor, epoch
        self.last_work = self.up.tolist()
        self.driver_free = 0.0
        self.work = self.slow = self.interrupted = 0.0
        self.downtimes: list[tuple[float, float]] = []
        self.events: list[tuple[float, int, str, int, int, int]] = []
        self.count = 0

    def schedule(self, time: float, kind: str, node: int, actor: int = -1) -> None:
        """Add an event; equal times happen in the order in which they were added."""
        self.count += 1
        heapq.heappush(self.events, (time, self.count, kind, node, actor, self.epochs[node]))

    def simulate(self) -> Batch:
        """Take events in order until all images are finished."""
        for node, time in enumerate(self.up.tolist()):
            self.schedule(time, "up", node)
        while self.finished < self.images:
            time, _, kind, node, actor, epoch = heapq.heappop(self.events)
            if epoch != self.epochs[node]:
                continue
            if kind == "up":
                for each in range(self.cluster.actors):
                    self.schedule(time + self.cluster.open_s, "free", node, each)
                if math.isfinite(self.cluster.mtbf_h):
                    self.schedule(time + self.rng.exponential(3600 * self.cluster.mtbf_h), "failure", node)
            elif kind == "failure":
                self.fail(time, node)
            else:
                if actor in self.running[node]:
                    self.finish(time, node, actor)
                self.idle.append((node, actor, epoch))
            self.dispatch(time)
        return self.summarize()

    def dispatch(self, time: float) -> None:
        """Give waiting images to actors without one, to the one that is free for longest first."""
        while self.waiting and self.idle:
            node, actor, epoch = self.idle.popleft()
            if epoch != self.epochs[node]:
                continue
            self.waiting -= 1
            seconds = self.cluster.seconds_per_image * self.factors[node]
            if self.cluster.spread:
                seconds *= self.rng.lognormal(-(self.cluster.spread**2) / 2, self.cluster.spread)
            self.running[node][actor] = time
            self.schedule(time + seconds, "free", node, actor)

    def finish(self, time: float, node: int, actor: int) -> None:
        seconds = time - self.running[node].pop(actor)
        self.work += seconds / self.factors[node]
        self.slow += seconds * (1 - 1 / self.factors[node])
        self.finished += 1
        self.last_work[node] = time
        self.driver_free = max(self.driver_free, time) + self.cluster.driver_s

    def fail(self, time: float, node: int) -> None:
        self.interrupted += sum(time - began for began in self.running[node].values())
        self.waiting += len(self.running[node])
        self.done_again += len(self.running[node])
        self.running[node].clear()
        self.epochs[node] += 1
        back = time + self.cluster.restart_s
        self.downtimes.append((time, back + self.cluster.open_s))
        self.last_work[node] = back
        self.schedule(back, "up", node)

    def summarize(self) -> Batch:
        cluster, end = self.cluster, self.driver_free
        time = self.nodes * cluster.actors * end
        starting = cluster.actors * float(np.minimum(self.up + cluster.open_s, end).sum())
        down = cluster.actors * sum(min(back, end) - min(since, end) for since, back in self.downtimes)
        paid_until = np.minimum(np.array(self.last_work) + cluster.open_s + cluster.idle_timeout_s, end)
        paid = float(np.maximum(paid_until - self.asked, 0).sum())
        cost = (cluster.price * paid + cluster.head_price * end) / 3600
        used = self.work + self.slow + self.interrupted + starting + down
        return Batch(
            nodes=self.nodes,
            makespan_s=end,
            ideal_s=self.images * cluster.seconds_per_image / (self.nodes * cluster.actors),
            images_per_hour=3600 * self.images / end,
            images_per_hour_and_node=3600 * self.images / end / self.nodes,
            efficiency=self.work / time,
            cost_per_thousand=1000 * cost / self.images,
            done_again=self.done_again,
            slow_share=self.slow / time,
            failure_share=(self.interrupted + down) / time,
            start_share=starting / time,
            idle_share=max(0.0, 1 - used / time),
        )


def start_times(cluster: Cluster, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return when each node is asked for, and when it runs, in seconds: (nodes,) each.

    Ray's autoscaler (version 2) asks again and again for a few more, without waiting until the last ones run.
    """
    asked = [0.0] * (nodes if cluster.running is None else min(cluster.running, nodes))
    up = list(asked)
    now = 0.0
    while len(asked) < nodes:
        running = bisect.bisect_right(up, now)
        wave = int(min(math.ceil(max(1, min(cluster.upscaling_speed * running, nodes))), cluster.launches))
        asked += [now] * min(wave, nodes - len(asked))
        up += [now + cluster.node_start_s] * (len(asked) - len(up))
        now += cluster.update_s
    return np.array(asked), np.array(up)


def simulate_batch(cluster: Cluster, nodes: int, images: int, rng: np.random.Generator) -> Batch:
    """Simulate a batch: a free actor takes the next image; an interrupted image goes to another actor."""
    return _Run(cluster, nodes, images, rng).simulate()
