"""Estimate time and cost of batches on 1 to 1,000 nodes, and waiting times of an autoscaled server, by simulation.

sdonnx bench PACKAGE --threads 2 --json > bench.json     # on a node, with the threads of an actor
python bench/capacity.py batch --bench bench.json --images 5000 --price 0.10
python bench/capacity.py batch --seconds 38.9 --actors 4 --running 1 --node-start 120 --mtbf 20 --restart 120
python bench/capacity.py serving --seconds 17.1 --per-hour 400 --arrivals day --replicas 1:4 --replicas 4:4

Nothing is measured here but what --bench reads. The assumptions are printed first.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from capacity_batch import Batch, Cluster, simulate_batch
from capacity_serving import Autoscaling, arrival_times, simulate_serving

NODES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def read_bench(path: Path) -> dict[str, Any]:
    """Return what the figures of ``sdonnx bench --json`` say of an actor: seconds, opening, actors, description."""
    report = json.loads(path.read_text(encoding="utf-8"))
    image, machine, threads = report["image"], report["machine"], report["threads"]
    return {
        "seconds": (image["total_s"] - image["load_s"]) / report["batch"],
        "open": image["load_s"],
        "actors": 1 if threads is None else max(1, (machine["cpus"] or threads) // threads),
        "what": f"{report['model']}, {report['width']}x{report['height']}, {image['num_inference_steps']} steps, on "
        f"{machine['cpu']}, {'one thread per physical core' if threads is None else f'--threads {threads}'}",
    }


def fill_from_bench(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Set the options that were not given to those of --bench, or to plain defaults."""
    found = {"seconds": None, "open": 0.0, "actors": 1, "what": "an image"}
    if args.bench is not None:
        try:
            found |= read_bench(args.bench)
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{args.bench} has no figures of sdonnx bench ({error}); write it by: sdonnx bench PKG --json")
    for name, value in found.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.seconds is None:
        parser.error("how long does an image take? Give --bench FILE or --seconds S")
    longest = args.open + args.seconds * getattr(args, "slow_factor", 1)
    if longest > 3 * 3600 * getattr(args, "mtbf", math.inf):
        parser.error(
            f"--mtbf {args.mtbf:g} h is less than a third of an image's {longest:g} s; hardly one would be done"
        )


def cluster_of(args: argparse.Namespace) -> Cluster:
    return Cluster(
        seconds_per_image=args.seconds, actors=args.actors, open_s=args.open, running=args.running,
        node_start_s=args.node_start, upscaling_speed=args.upscaling_speed, launches=args.launches,
        idle_timeout_s=args.idle_timeout,
        spread=args.spread, slow_share=args.slow_share, slow_factor=args.slow_factor, mtbf_h=args.mtbf,
        restart_s=args.restart, driver_s=args.driver, price=args.price, head_price=args.head_price,
    )  # fmt: skip


def batch_assumptions(args: argparse.Namespace) -> Iterator[str]:
    """Yield what the figures of a batch rest on."""
    yield f"An actor takes {args.seconds:.4g} s for {args.what}, after {args.open:.3g} s to start and open the package."
    yield (
        f"Actors on each node: {args.actors}. They do not slow each other, and each takes the next of {args.images} "
        "images when it is free."
    )
    yield f"An image's seconds spread lognormally with sigma {args.spread:g} around their mean."
    yield f"Of the nodes, {args.slow_share:.0%} (rounded) take {args.slow_factor:g} times longer."
    if args.running is None:
        yield "All nodes run when the batch starts."
    else:
        yield (
            f"Nodes that run at the start: {args.running}. Others take {args.node_start:g} s. "
            f"Every 5 s Ray asks for as many more as {args.upscaling_speed:g} times those that run, from 1 to "
            f"{args.launches}."
        )
    if math.isfinite(args.mtbf):
        yield (
            f"A node fails once in {args.mtbf:g} hours in the mean, independently of others, and is back after "
            f"{args.restart:g} s; its unfinished images are done again elsewhere. A finished image is never lost."
        )
    else:
        yield "No node fails."
    yield (
        f"The one driver takes {args.driver:g} s for each image, one after the other, and never fails; actors do not "
        "wait for it."
    )
    timeout = f" or {args.idle_timeout:g} s without work" if math.isfinite(args.idle_timeout) else ""
    yield (
        f"A node costs {args.price:g} per hour from its request to the batch's end{timeout}, "
        f"the driver's own node {args.head_price:g}; storage and traffic cost nothing."
    )
    yield f"Each row is the mean of {args.runs} simulations with other random numbers (seed {args.seed})."


def mean_batch(batches: list[Batch]) -> dict[str, float]:
    return {each.name: statistics.fmean(getattr(batch, each.name) for batch in batches) for each in fields(Batch)}


def run_batch(args: argparse.Namespace) -> dict[str, Any]:
    """Print the table of a batch; return its rows."""
    cluster = cluster_of(args)
    print("Assumptions:\n")
    assumptions = list(batch_assumptions(args))
    print("".join(f"- {line}\n" for line in assumptions))
    per_node = 3600 * args.actors / args.seconds
    print(f"A node makes {per_node:.4g} images per hour; a thousand cost {1000 * args.price / per_node:.3g} at best.")
    if args.driver:
        print(
            f"The driver writes {3600 / args.driver:.4g} images per hour: as many as "
            f"{args.seconds / args.driver / args.actors:.4g} nodes make."
        )
    print(
        "\n| nodes | makespan | ideal | images/hour | per node | efficiency | cost per 1,000 | done again | "
        f"slow nodes | failures | starting | idle |\n{'| --- ' * 12}|"
    )
    rows = list[dict[str, float]]()
    for nodes in args.nodes:
        rngs = (np.random.default_rng([args.seed, nodes, run]) for run in range(args.runs))
        row = mean_batch([simulate_batch(cluster, nodes, args.images, rng) for rng in rngs])
        rows.append(row)
        shares = (row[f"{name}_share"] for name in ("slow", "failure", "start", "idle"))
        print(
            f"| {nodes} | {duration(row['makespan_s'])} | {duration(row['ideal_s'])} | {row['images_per_hour']:.0f} | "
            f"{row['images_per_hour_and_node']:.1f} | {row['efficiency']:.1%} | {row['cost_per_thousand']:.3g} | "
            f"{row['done_again']:.1f} | {' | '.join(f'{share:.1%}' for share in shares)} |"
        )
    return {"assumptions": assumptions, "cluster": finite(asdict(cluster)), "images": args.images, "rows": rows}


def serving_assumptions(args: argparse.Namespace) -> Iterator[str]:
    """Yield what the figures of a server rest on."""
    rates = {
        "poisson": "at a constant rate",
        "day": f"at a rate that falls and rises by {args.swing:.0%} within a day",
        "burst": f"at {args.burst:g} times the rate in the middle twentieth",
    }
    yield (
        f"A replica takes {args.seconds:.4g} s for {args.what}, one at a time, spread lognormally with sigma "
        f"{args.spread:g}."
    )
    yield f"{args.per_hour:g} requests per hour come in the mean for {args.hours:g} hours, {rates[args.arrivals]}."
    yield (
        f"Replicas are wanted for {args.target_ongoing:g} running or waiting requests each; they start when more have "
        f"been wanted for {args.upscale_delay:g} s, and stop when fewer have been for {args.downscale_delay:g} s. "
        "What is wanted is looked at every second, not averaged."
    )
    yield f"A replica is ready {args.node_start + args.open:g} s after that: its node starts and it opens the package."
    yield f"{args.max_queued} requests may wait; further ones are refused and do not come again."
    yield f"A replica costs {args.price / args.actors:g} per hour from its start on; nothing fails."
    yield f"Each row is of one simulation with the same requests (seed {args.seed})."


def run_serving(args: argparse.Namespace) -> dict[str, Any]:
    """Print the table of a server; return its rows."""
    print("Assumptions:\n")
    assumptions = list(serving_assumptions(args))
    print("".join(f"- {line}\n" for line in assumptions))
    rng = np.random.default_rng(args.seed)
    arrivals = arrival_times(args.arrivals, args.per_hour, args.hours, rng, swing=args.swing, burst=args.burst)
    seconds = args.seconds * rng.lognormal(-(args.spread**2) / 2, args.spread, len(arrivals))
    print(
        "| replicas | served | refused | wait, p50 | wait, p95 | most at once | mean replicas | busy | "
        f"cost per 1,000 |\n{'| --- ' * 9}|"
    )
    rows = list[dict[str, Any]]()
    for least, most in args.replicas:
        autoscaling = Autoscaling(
            least=least, most=most, target_ongoing=args.target_ongoing, upscale_delay_s=args.upscale_delay,
            downscale_delay_s=args.downscale_delay, start_s=args.node_start + args.open, max_queued=args.max_queued,
        )  # fmt: skip
        found = simulate_serving(autoscaling, arrivals, seconds)
        served = len(found.waits_s)
        p50, p95 = np.percentile(found.waits_s, (50, 95)) if served else (math.nan, math.nan)
        cost = args.price / args.actors * found.replica_s / 3600
        row = {
            "replicas": f"{least}:{most}", "served": served, "refused": found.refused, "wait_p50_s": float(p50),
            "wait_p95_s": float(p95), "most_replicas": found.most_replicas,
            "mean_replicas": found.replica_s / found.end_s if found.end_s else 0.0,
            "busy_share": found.busy_share, "cost_per_thousand": 1000 * cost / max(1, served),
        }  # fmt: skip
        rows.append(row)
        print(
            f"| {row['replicas']} | {served} | {row['refused']} | {p50:.3g} s | {p95:.3g} s | {row['most_replicas']} | "
            f"{row['mean_replicas']:.2f} | {row['busy_share']:.0%} | {row['cost_per_thousand']:.3g} |"
        )
    return {"assumptions": assumptions, "rows": rows}


def duration(seconds: float) -> str:
    """Format seconds as ``54 h 1 min``, ``32 min`` or ``58 s``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replace infinities, which JSON lacks, by None."""
    return {name: None if value == math.inf else value for name, value in values.items()}


def number(least: float, most: float = 1e9, *, above: bool = False, or_never: bool = False) -> Any:
    """Return a parser of numbers from ``least`` (or ``above`` it) to ``most``, or infinity."""

    def parse(text: str) -> float:
        value = float(text)
        if or_never and value == math.inf:
            return value
        if not least <= value <= most or (above and value == least):
            limits = f"{'above' if above else 'from'} {least:g}, at most {most:g}"
            raise argparse.ArgumentTypeError(f"{text}; give a number {limits}{', or inf' if or_never else ''}")
        return value

    return parse


def count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text}; give a whole number from 1 to 1000000")
    return value


def replica_range(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    found = int(least), int(most or least)
    if not 0 <= found[0] <= found[1] or found[1] == 0:
        raise argparse.ArgumentTypeError(f"{text}; give MIN:MAX with 0 <= MIN <= MAX and MAX >= 1")
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    both = argparse.ArgumentParser(add_help=False)
    add = both.add_argument
    positive, any_size, share = number(0, above=True), number(0), number(0, 1)
    add("--bench", type=Path, metavar="FILE", help="figures of sdonnx bench --json: seconds, opening, actors")
    add("--seconds", type=positive, help="seconds per image of one actor or replica")
    add("--open", type=any_size, help="seconds in which it starts and opens the package")
    add("--actors", type=count, help="actors, or replicas, of each node")
    add("--what", help="what is made, for the assumptions")
    add("--node-start", type=any_size, default=0.0, help="seconds until a further node runs")
    add("--spread", type=any_size, default=0.1, help="sigma of the logarithm of an image's seconds")
    add("--price", type=any_size, default=0.0, help="of a node, per hour")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    add = parts.add_parser("batch", parents=[both], help="a batch on numbers of nodes").add_argument
    add("--images", type=count, default=5000)
    add("--nodes", type=count, nargs="+", default=NODES)
    add("--running", type=count, help="nodes that run at the start; default: all")
    add("--upscaling-speed", type=number(0, or_never=True), default=1.0, help="as of Ray; inf on Kubernetes")
    add("--launches", type=count, default=10, help="nodes that Ray asks for at once at most")
    add(
        "--idle-timeout",
        type=number(0, or_never=True),
        default=math.inf,
        help="seconds without work after which a node is given back",
    )
    add("--slow-share", type=share, default=0.0, help="share of nodes that are slow")
    add("--slow-factor", type=number(1), default=1.5, help="how many times slower these are")
    add(
        "--mtbf",
        type=number(0, above=True, or_never=True),
        default=math.inf,
        help="mean hours between failures of a node",
    )
    add("--restart", type=any_size, default=120.0, help="seconds from a failure to the node that replaces it")
    add("--driver", type=any_size, default=0.05, help="seconds of the driver per image")
    add("--head-price", type=any_size, default=0.0, help="of the driver's own node, per hour")
    add("--runs", type=count, default=5, help="simulations of which the mean is taken")
    parts.choices["batch"].set_defaults(run=run_batch)
    add = parts.add_parser("serving", parents=[both], help="an autoscaled server").add_argument
    add("--arrivals", choices=("poisson", "day", "burst"), default="poisson")
    add("--per-hour", type=positive, required=True, help="requests per hour in the mean")
    add("--hours", type=positive, default=24.0)
    add("--swing", type=share, default=0.8, help="of --arrivals day")
    add("--burst", type=number(1), default=10.0, help="of --arrivals burst: how many times the usual rate")
    add("--replicas", type=replica_range, action="append", metavar="MIN:MAX", required=True, help="repeatable")
    add("--target-ongoing", type=positive, default=1.0, help="running or waiting requests for each replica")
    add("--upscale-delay", type=any_size, default=2.0, help="seconds; default as of sdonnx serve --ray")
    add("--downscale-delay", type=any_size, default=300.0, help="seconds; default as of sdonnx serve --ray")
    add("--max-queued", type=count, default=32)
    parts.choices["serving"].set_defaults(run=run_serving)
    args = parser.parse_args()
    fill_from_bench(args, parser)
    return args


def main() -> None:
    """Print the assumptions and a table."""
    args = parse_arguments()
    figures = args.run(args)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
