"""bench/capacity.py against closed forms of queueing and reliability theory, scipy, and Ray's own autoscalers."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import capacity
import numpy as np
import pytest
from capacity_batch import Cluster, simulate_batch, start_times
from capacity_serving import Autoscaler, Autoscaling, arrival_times, simulate_serving
from scipy import integrate, stats

from sdonnx.benchmark.report import ImageFigures, Machine, Report
from sdonnx.cli.commands.bench import _as_json


def run(*arguments):
    return subprocess.run([sys.executable, capacity.__file__, *map(str, arguments)], capture_output=True, text=True)


def batch(cluster, nodes=1, images=1, seed=0):
    return simulate_batch(cluster, nodes, images, np.random.default_rng(seed))


@pytest.mark.parametrize("nodes, actors, images", [(1, 1, 1), (1, 4, 9), (3, 2, 6), (7, 3, 100), (1000, 4, 5000)])
def test_equal_images_come_in_rounds(nodes, actors, images):
    found = batch(Cluster(seconds_per_image=8.0, actors=actors, open_s=16.0, price=3.6), nodes, images)
    rounds = math.ceil(images / (nodes * actors))
    assert found.makespan_s == 16 + 8 * rounds
    assert found.efficiency == pytest.approx(found.ideal_s / found.makespan_s)
    assert found.cost_per_thousand == pytest.approx(nodes * found.makespan_s / images)
    assert found.done_again == found.failure_share == found.slow_share == 0


def test_the_driver_is_the_serial_part():
    """Amdahl's law: images that are finished together are written one after the other."""
    assert batch(Cluster(seconds_per_image=8.0, driver_s=0.5), nodes=64, images=64).makespan_s == 8 + 64 * 0.5
    bound = batch(Cluster(seconds_per_image=8.0, driver_s=0.5), nodes=64, images=6400)
    assert bound.images_per_hour == pytest.approx(3600 / 0.5, rel=0.01)


def test_interrupted_images_take_as_long_as_a_restarted_exponential():
    """Memoryless restart: E[T] = (exp(λs) - 1) / λ, Var[T] = (exp(2λs) - 2λs exp(λs) - 1) / λ²."""
    seconds, rate, images = 30.0, 1 / 60, 4000
    found = batch(Cluster(seconds_per_image=seconds, mtbf_h=1 / rate / 3600), images=images)
    grown = math.exp(rate * seconds)
    mean, variance = (grown - 1) / rate, (grown**2 - 2 * rate * seconds * grown - 1) / rate**2
    assert found.makespan_s / images == pytest.approx(mean, abs=4 * math.sqrt(variance / images))
    assert found.done_again / images == pytest.approx(grown - 1, abs=4 * math.sqrt(grown * (grown - 1) / images))
    assert found.failure_share == pytest.approx(1 - seconds / mean, abs=0.02)


def test_the_last_image_is_the_slowest_of_all():
    """An image for each node: the makespan is the expected maximum of lognormals, by scipy."""
    nodes, spread = 50, 0.4
    cluster = Cluster(seconds_per_image=10.0, spread=spread)
    found = np.mean([batch(cluster, nodes, nodes, seed).makespan_s for seed in range(100)])
    time = stats.lognorm(spread, scale=10 * math.exp(-(spread**2) / 2))
    expected, _ = integrate.quad(lambda t: 1 - time.cdf(t) ** nodes, 0, 200)
    assert found == pytest.approx(expected, rel=0.05)
    assert batch(replace(cluster, spread=0.0), nodes, nodes).makespan_s == 10


def test_slow_nodes_make_less():
    """Four fast nodes and one that takes twice as long make as much as four and a half."""
    found = batch(Cluster(seconds_per_image=10.0, slow_share=0.2, slow_factor=2.0), nodes=5, images=4500)
    assert found.images_per_hour == pytest.approx(4.5 * 360, rel=0.01)
    assert found.slow_share == pytest.approx(0.1, abs=0.002)


def test_shares_of_the_time_sum_to_one():
    cluster = Cluster(
        seconds_per_image=30, actors=2, open_s=5, running=1, node_start_s=60, spread=0.3, slow_share=0.1,
        slow_factor=2, mtbf_h=0.3, restart_s=40, driver_s=0.1, price=1, head_price=1,
    )  # fmt: skip
    for nodes in (1, 20, 300):
        found = batch(cluster, nodes, 600)
        lost = found.slow_share + found.failure_share + found.start_share + found.idle_share
        assert found.efficiency + lost == pytest.approx(1, abs=1e-9)
        assert found.done_again > 0
        assert min(lost, found.slow_share, found.failure_share, found.start_share, found.idle_share) >= 0
        assert found.failure_share > 0


@pytest.mark.parametrize("speed", [0.5, 1.0, 1000.0])
def test_nodes_are_asked_for_as_ray_does(speed):
    """Every update, as many as Ray's reconciler launches of those that are wanted."""
    from ray.autoscaler._private.constants import AUTOSCALER_MAX_CONCURRENT_LAUNCHES
    from ray.autoscaler.v2.instance_manager.reconciler import Reconciler
    from ray.core.generated.instance_manager_pb2 import Instance

    cluster = Cluster(seconds_per_image=1.0, running=1, node_start_s=60.0, upscaling_speed=speed)
    assert cluster.launches == AUTOSCALER_MAX_CONCURRENT_LAUNCHES
    asked, up = start_times(cluster, 200)
    assert (up - asked == np.where(np.arange(200) < 1, 0, 60)).all()
    left, now, waves = 199, 0.0, set()
    while left:
        queued, running = ([Instance(instance_type="worker")] * n for n in (left, int((up <= now).sum())))
        wave = len(Reconciler._compute_to_launch(queued, [], running, speed, cluster.launches)["worker"])
        assert int((asked[1:] == now).sum()) == wave
        left, now, waves = left - wave, now + cluster.update_s, waves | {wave}
    assert max(waves) == cluster.launches


def test_idle_nodes_are_given_back():
    cluster = Cluster(seconds_per_image=100.0, price=36.0)
    dear = batch(cluster, nodes=10, images=11)
    cheap = batch(replace(cluster, idle_timeout_s=20.0), nodes=10, images=11)
    assert dear.makespan_s == cheap.makespan_s == 200
    assert dear.cost_per_thousand == pytest.approx(1000 * 10 * 200 / 11 / 100)
    assert cheap.cost_per_thousand == pytest.approx(1000 * (200 + 9 * 120) / 11 / 100)


def test_waits_are_erlang_c():
    rng, servers, load = np.random.default_rng(1), 3, 0.7
    arrivals = np.cumsum(rng.exponential(1 / (servers * load), 100_000))
    found = simulate_serving(Autoscaling(least=servers, most=servers), arrivals, rng.exponential(1.0, 100_000))
    offered = servers * load
    full = offered**servers / math.factorial(servers) / (1 - load)
    waiting = full / (sum(offered**k / math.factorial(k) for k in range(servers)) + full)
    assert (found.waits_s > 0).mean() == pytest.approx(waiting, rel=0.03)
    assert found.waits_s.mean() == pytest.approx(waiting / (servers * (1 - load)), rel=0.06)
    assert found.busy_share == pytest.approx(load, rel=0.02)


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_waits_at_one_replica_are_pollaczek_khinchine(spread):
    """M/D/1, and M/G/1 with lognormal times: λ E[S²] / 2(1 - ρ)."""
    rng, load = np.random.default_rng(2), 0.6
    arrivals = np.cumsum(rng.exponential(1 / load, 100_000))
    found = simulate_serving(Autoscaling(), arrivals, rng.lognormal(-(spread**2) / 2, spread, 100_000))
    assert found.waits_s.mean() == pytest.approx(load * math.exp(spread**2) / 2 / (1 - load), rel=0.06)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_the_autoscaler_decides_as_rays_does():
    """Ray's wall clock is given to it; its target is requests over those of each replica, rounded up."""
    from ray.serve.autoscaling_policy import _apply_delay_logic
    from ray.serve.config import AutoscalingConfig

    config = AutoscalingConfig(min_replicas=1, max_replicas=6, upscale_delay_s=4, downscale_delay_s=9)
    autoscaler = Autoscaler(Autoscaling(least=1, most=6, target_ongoing=2, upscale_delay_s=4, downscale_delay_s=9))
    rng, target, state, ongoing = np.random.default_rng(3), 1, {}, 0
    targets = set()
    for now in range(2000):
        ongoing = max(0, ongoing + int(rng.integers(-2, 3)) if ongoing < 16 else ongoing - 3)
        desired = max(1, min(6, math.ceil(ongoing / 2)))
        target, state = _apply_delay_logic(desired, target, config, state, float(now))
        assert autoscaler.decide(float(now), ongoing) == target
        targets.add(target)
    assert targets == {1, 2, 3, 4, 5, 6}


def test_a_burst_waits_less_with_more_replicas_and_costs_less_with_fewer():
    rng = np.random.default_rng(4)
    arrivals = arrival_times("burst", 120, 10, rng)
    seconds = np.full(len(arrivals), 15.0)
    auto = Autoscaling(least=1, most=4, upscale_delay_s=10, downscale_delay_s=60, start_s=60)
    one, scaled, four = (
        simulate_serving(each, arrivals, seconds) for each in (replace(auto, most=1), auto, replace(auto, least=4))
    )
    p95s = [np.percentile(each.waits_s, 95) for each in (four, scaled, one)]
    assert p95s[0] < p95s[1] < p95s[2]
    assert one.replica_s < scaled.replica_s < four.replica_s
    slower = simulate_serving(replace(auto, start_s=300), arrivals, seconds)
    assert np.percentile(slower.waits_s, 95) > p95s[1]
    full = simulate_serving(replace(auto, most=1, max_queued=5), arrivals, seconds)
    assert full.refused > 0
    assert full.refused + len(full.waits_s) == len(arrivals)
    assert full.waits_s.max() <= 6 * 15


def test_replicas_start_from_none_and_go_again():
    arrivals = np.array([0.0, 1000.0])
    scaled = Autoscaling(least=0, most=2, upscale_delay_s=5, downscale_delay_s=20, start_s=30)
    found = simulate_serving(scaled, arrivals, np.array([10.0, 10.0]))
    assert (abs(found.waits_s - 36) <= 1).all()
    assert found.replica_s < 200


def test_requests_follow_the_rate():
    rng = np.random.default_rng(5)
    assert len(arrival_times("poisson", 100, 1000, rng)) == pytest.approx(100_000, rel=0.02)
    day = arrival_times("day", 100, 2400, rng, swing=0.5)
    assert len(day) == pytest.approx(240_000, rel=0.02)
    hours = np.histogram(day % 86400, bins=24, range=(0, 86400))[0] / 100
    assert (hours[0], hours[12]) == (pytest.approx(50, rel=0.05), pytest.approx(150, rel=0.05))
    burst = arrival_times("burst", 100, 1000, rng, burst=10) / 3.6e6
    inside = (abs(burst - 0.5) <= 0.025).mean()
    assert inside == pytest.approx(0.5 / (0.5 + 0.95), rel=0.05)


def test_the_command_reads_a_bench_and_writes_figures(tmp_path):
    report = Report(
        machine=Machine(
            sdonnx="0.1", onnxruntime="1", python="3", system="Linux", cpu="a CPU", cpus=8, instruction_set="AVX2"
        ),
        package="sd15-int8", model="sd15", threads=2, width=512, height=512, batch=2, guidance_scale=7.5,
        components=(),
        image=ImageFigures(
            num_inference_steps=20, total_s=43.0, load_s=3.0, first_step_s=2.0, step_s=1.8, peak_rss_mb=1400
        ),
    )  # fmt: skip
    bench, written = tmp_path / "bench.json", tmp_path / "figures.json"
    bench.write_text(json.dumps(_as_json(report)))
    ran = run("batch", "--bench", bench, "--images", 160, "--spread", 0, "--driver", 0, "--json", written, "--price", 1)
    assert ran.returncode == 0, ran.stderr
    assert "20 s for sd15, 512x512, 20 steps, on a CPU, --threads 2, after 3 s" in ran.stdout
    rows = json.loads(written.read_text())["rows"]
    assert [row["nodes"] for row in rows] == list(capacity.NODES)
    assert rows[0]["makespan_s"] == 3 + 160 / 4 * 20  # four actors of two threads on eight CPUs
    ran = run("serving", "--bench", bench, "--per-hour", 100, "--hours", 2, "--replicas", "1:3", "--replicas", 2)
    assert ran.returncode == 0, ran.stderr
    assert "| 1:3 |" in ran.stdout
    assert "| 2:2 |" in ran.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["batch"], "Give --bench FILE or --seconds S"),
        (["batch", "--bench", capacity.__file__], "has no figures of sdonnx bench"),
        (["batch", "--seconds", "nan"], "give a number above 0"),
        (["batch", "--seconds", "60", "--mtbf", "0.001"], "hardly one would be done"),
        (["serving", "--seconds", "9", "--per-hour", "9", "--replicas", "4:2"], "give MIN:MAX"),
    ],
)
def test_bad_options_say_what_is_wrong(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["capacity.py", *arguments])
    with pytest.raises(SystemExit):
        capacity.main()
    assert message in capsys.readouterr().err
