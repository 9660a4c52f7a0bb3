"""How evenly rollouts are dealt to ranks, and how much of the computation is padding: katds' plan against others.

A simulation: lengths are drawn, plans are made, time is the planner's cost model (`katds.core.packing.cost`). Ranks wait for each
other in every micro-batch, since ZeRO-3 gathers every layer together. Invariant: every contender trains every rollout once.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from katds.bench.arguments import positive
from katds.bench.lengths import LENGTHS
from katds.bench.report import Result
from katds.errors import ConfigError

HELP = "padding and waiting of packing plans, for 8 to 1024 simulated ranks"
SMOKE = ["--ranks", "4", "--rollouts", "8", "--draws", "1"]
Bins = list[list[int]]


@dataclass(frozen=True)
class Job:
    """Rollouts of one step.

    Args:
        lengths: tokens of each, in order of arrival. owners: the rank that wrote each.
        longest: tokens that the recipe allows; known before the rollouts are.
        budget: tokens of a micro-batch, padding included.
        weight: attention's cost per token and token of context, see `katds.core.packing.cost`.
    """

    lengths: Sequence[int]
    owners: Sequence[int]
    world: int
    longest: int
    budget: int
    weight: float


@dataclass(frozen=True)
class Batches:
    """`of_ranks[rank][j]` lists the rollouts of a micro-batch; a rank with fewer than the others sits the last ones out."""

    of_ranks: Sequence[Bins]
    padded: bool = False


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks", type=positive, nargs="+", default=[8, 16, 64, 256, 1024], help="default: %(default)s"
    )
    parser.add_argument("--rollouts", type=positive, default=32, help="per rank and step (default: %(default)s)")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS), help="(default: all)")
    parser.add_argument(
        "--budget", type=float, default=4.0,
        help="tokens of a micro-batch, in rollouts of the greatest length (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--draws", type=positive, default=5, help="steps drawn, seeds 0 .. (default: %(default)s)")
    parser.add_argument(
        "--weight", type=float,
        help="attention's true cost; a contender that knows it joins those that assume the default (default: the planner's)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> Result:
    from katds.core.packing import DEFAULT_ATTENTION_WEIGHT

    if options.budget < 1:
        raise ConfigError(f"--budget is {options.budget}, which has no room for the longest rollout. Give at least 1.")
    weight = DEFAULT_ATTENTION_WEIGHT if options.weight is None else options.weight
    rows, samples = [], []
    for name in options.lengths:
        for world in options.ranks:
            jobs = [draw(name, world, options.rollouts, options.budget, weight, seed) for seed in range(options.draws)]
            measured = _measure_all(jobs, contenders(weight))
            samples += [{"lengths": name, "ranks": world, **sample} for sample in measured]
            rows += [{"lengths": name, "ranks": world, **row} for row in _summarised(measured)]
    return Result(
        "packing", "how much of the time goes to padding and to waiting for the slowest rank?", rows, samples,
        {key: getattr(options, key) for key in ("ranks", "rollouts", "lengths", "budget", "draws")} | {"weight": weight},
        [
            "simulated: time = tokens + weight x tokens^2, ranks meet in every micro-batch; no communication is counted",
            "wait: mean over the draws of (sum over micro-batches of the slowest rank / mean of the ranks - 1), and the worst draw",
            "x ideal: time / time of an even deal without padding. No plan is below the `bound`: it has the mean, and the longest rollout",
            "largest: tokens of the largest micro-batch in budgets; above 1 a device sized for the budget runs out of memory",
            *(f"{name}: {LENGTHS[name].source}" for name in options.lengths),
        ],
    )  # fmt: skip


def draw(name: str, world: int, rollouts: int, budget: float, weight: float, seed: int) -> Job:
    """`rollouts` per rank. Rank i writes rollouts i, i + world, ...: where a step fits the slots, the engine deals one by one."""
    lengths, longest = LENGTHS[name].draw(world * rollouts, seed), LENGTHS[name].longest
    return Job(lengths, [i % world for i in range(len(lengths))], world, longest, int(budget * longest), weight)


def contenders(weight: float) -> dict[str, Callable[[Job], Batches]]:
    from katds.core.packing import DEFAULT_ATTENTION_WEIGHT

    known = {} if weight == DEFAULT_ATTENTION_WEIGHT else {"katds, told the weight": partial(_katds, weight=weight)}
    return {
        "katds": partial(_katds, weight=DEFAULT_ATTENTION_WEIGHT),
        **known,
        "ranks balanced (as verl)": _balanced_ranks,
        "first come, packed": partial(_filled_in_order, padded=False, by_length=False),
        "first come, padded": partial(_filled_in_order, padded=True, by_length=False),
        "by length, padded": partial(_filled_in_order, padded=True, by_length=True),
        "fixed size, padded (as TRL)": _fixed_size,
    }


def _katds(job: Job, weight: float) -> Batches:
    from katds.core.packing import plan

    return Batches(plan(job.lengths, job.owners, job.world, job.budget, weight).micro_batches)


def _balanced_ranks(job: Job) -> Batches:
    """Even ranks with equally many rollouts first, then even micro-batches within each rank, as many as the fullest rank needs.
    Both by largest differencing. The budget is not enforced. A rank's costliest comes first."""
    costs = _costs(job)
    ranks = differencing(costs, range(len(costs)), job.world, equal_counts=True)
    most = max(-(-sum(job.lengths[i] for i in members) // job.budget) for members in ranks)
    batches = [differencing(costs, members, most) for members in ranks]
    return Batches([sorted(rank, key=lambda members: -sum(costs[i] for i in members)) for rank in batches])


def _filled_in_order(job: Job, padded: bool, by_length: bool) -> Batches:
    """Micro-batches are filled one after the other up to the budget, and dealt to the ranks in turn."""
    order = sorted(range(len(job.lengths)), key=lambda i: -job.lengths[i] if by_length else i)
    batches: Bins = []
    for i in order:
        if batches and _tokens(job, [*batches[-1], i], padded) <= job.budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return Batches([batches[rank :: job.world] for rank in range(job.world)], padded)


def _fixed_size(job: Job) -> Batches:
    """Every rank keeps what it wrote, so many rollouts a micro-batch as would fit if all had the greatest length."""
    size = max(1, job.budget // job.longest)
    own: Bins = [[] for _ in range(job.world)]
    for i, owner in enumerate(job.owners):
        own[owner].append(i)
    return Batches([[mine[at : at + size] for at in range(0, len(mine), size)] for mine in own], padded=True)


def differencing(costs: Sequence[float], items: Iterable[int], parts: int, equal_counts: bool = False) -> Bins:
    """Splits `items` evenly by the largest differencing method (Karmarkar and Karp 1982).

    Starts from many partial splits and merges the two most uneven, the large parts of one with the small ones of the other.
    """
    order = sorted(items, key=lambda i: -costs[i])
    width = parts if equal_counts else 1
    splits: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for at in range(0, len(order), width):
        split = [(costs[i], [i]) for i in order[at : at + width]]
        split += [(0.0, [])] * (parts - len(split))
        heapq.heappush(splits, (split[-1][0] - split[0][0], at, split))
    while len(splits) > 1:
        (_, at, one), (_, _, other) = heapq.heappop(splits), heapq.heappop(splits)
        merged = [(x + y, [*m, *n]) for (x, m), (y, n) in zip(one, reversed(other), strict=True)]
        merged.sort(key=lambda part: -part[0])
        heapq.heappush(splits, (merged[-1][0] - merged[0][0], at, merged))
    return [members for _, members in splits[0][2]] if splits else [[] for _ in range(parts)]


def measure(job: Job, batches: Batches) -> dict[str, float]:
    """Shares, multiples of the ideal, and counts; the table's columns without their names."""
    costs = _costs(job)
    times = [[_time(job, members, batches.padded, costs) for members in rank] for rank in batches.of_ranks]
    rounds = max(map(len, times))
    waited = sum(max(rank[j] for rank in times if j < len(rank)) for j in range(rounds))
    mean, ideal = sum(map(sum, times)) / job.world, sum(costs) / job.world
    tokens = [_tokens(job, members, batches.padded) for rank in batches.of_ranks for members in rank]
    learners = [(i, rank) for rank, own in enumerate(batches.of_ranks) for members in own for i in members]
    return {
        "padding": 1 - sum(job.lengths) / sum(tokens),
        "wait": waited / mean - 1,
        "x ideal": waited / ideal,
        "rounds": rounds,
        "largest": max(tokens) / job.budget,
        "moved": sum(job.lengths[i] for i, rank in learners if rank != job.owners[i]) / sum(job.lengths),
    }


def bound(job: Job) -> float:
    """No plan takes less than this many times the ideal: a rollout is not split."""
    costs = _costs(job)
    return max(1.0, max(costs) / (sum(costs) / job.world))


def _measure_all(jobs: Sequence[Job], makers: Mapping[str, Callable[[Job], Batches]]) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = []
    for seed, job in enumerate(jobs):
        for name, make in makers.items():
            start = time.perf_counter()
            batches = make(job)
            seconds = time.perf_counter() - start
            sample = {"plan": name, "draw": seed, "bound": bound(job), "plan_seconds": seconds}
            samples.append(sample | measure(job, batches))
    return samples


def _summarised(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys(sample["plan"] for sample in samples):
        own = [sample for sample in samples if sample["plan"] == name]
        mean = {key: statistics.fmean(s[key] for s in own) for key in own[0] if key != "plan"}
        rows.append({
            "plan": name, "padding %": 100 * mean["padding"], "wait %": 100 * mean["wait"],
            "worst wait %": 100 * max(s["wait"] for s in own), "x ideal": mean["x ideal"], "bound": mean["bound"],
            "micro-batches": mean["rounds"], "largest": max(s["largest"] for s in own),
            "moved %": 100 * mean["moved"], "plan ms": 1e3 * statistics.median(s["plan_seconds"] for s in own),
        })  # fmt: skip
    return rows


def _costs(job: Job) -> list[float]:
    from katds.core.packing import cost

    return [cost(length, job.weight) for length in job.lengths]


def _tokens(job: Job, members: Sequence[int], padded: bool) -> int:
    lengths = [job.lengths[i] for i in members]
    return len(lengths) * max(lengths, default=0) if padded else sum(lengths)


def _time(job: Job, members: Sequence[int], padded: bool, costs: Sequence[float]) -> float:
    """Padding costs what tokens cost: every row of a padded batch is as long as the longest."""
    own = [costs[i] for i in members]
    return len(own) * max(own, default=0.0) if padded else sum(own)
