"""Which rank learns from which rollouts, in which micro-batch.

Pure functions of values that all ranks share, so every rank computes the same plan without communication.

Invariants of a plan:
- Every rollout is in exactly one micro-batch.
- All ranks have the same number of micro-batches; an empty one stands for a dummy forward (ZeRO-3 gathers together).
- A micro-batch exceeds the token budget only if it holds a single rollout.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Bins = list[list[int]]


def attention_weight(layers: int, width: int, parameters: int) -> float:
    """Cost of attention relative to the linear layers: cost(l) = l + weight l^2.

    Forward FLOPs of one packed sequence of l tokens: 2 * parameters * l for the matrices; causal scores and values
    2 * layers * width * l^2 (half of 4 * layers * width * l^2), width = heads * head size. The backward pass scales
    both alike. `parameters` counts what multiplies (the output head, not the embedding table).
    """
    return layers * width / parameters


# A plain transformer has 12 width^2 parameters per layer, so its weight is 1 / (12 width); width of Qwen3-1.7B, the
# published student. There it makes attention a sixth of the linear cost at 4096 tokens. For a model of another size it costs up to
# 0.4% of waiting at 4k tokens, 1% at 34k, and 6% on the demo's tiny student: the learner asks its model.
DEFAULT_ATTENTION_WEIGHT = 1 / (12 * 2048)


@dataclass(frozen=True, slots=True)
class Plan:
    """`micro_batches[rank][j]` lists rollout indices, ascending; the costliest micro-batches come first."""

    micro_batches: list[Bins]

    @property
    def rounds(self) -> int:
        """Micro-batches per rank; 0 only if there are no rollouts."""
        return len(self.micro_batches[0])

    def shared(self, ranks: int) -> Plan:
        """For groups of so many neighbours in place of ranks: each of a group has its micro-batches."""
        return Plan([batches for batches in self.micro_batches for _ in range(ranks)])


class Transfers(NamedTuple):
    """Rollout indices that one rank sends to each rank and receives from each, itself included, ascending per pair."""

    send: Bins
    receive: Bins


def plan(
    lengths: Sequence[int],
    owners: Sequence[int],
    world: int,
    budget: int,
    attention_weight: float = DEFAULT_ATTENTION_WEIGHT,
) -> Plan:
    """Deal rollouts to `world` ranks in micro-batches of at most `budget` tokens.

    As few micro-batches as the packing finds; their costs are even (longest processing time first), and the j-th ones
    of all ranks are neighbours in cost, since ZeRO-3 makes ranks wait for each other in every one. Among these a rank
    takes the one of which it already holds most tokens.

    Args:
        lengths: tokens (prompt and kept response) of each rollout, in id order, each at least 1.
        owners: the rank that holds each rollout now.
        attention_weight: see the function of this name; 0 balances tokens only.

    Cost: O(N log N) a try and a few tries; N = 10^5 rollouts on 1024 ranks: about a second.
    """
    assert len(lengths) == len(owners), f"{len(lengths)} lengths but {len(owners)} owners"
    assert world >= 1 and budget >= 1, f"world {world}, budget {budget}: each is at least 1"
    assert min(lengths, default=1) >= 1, "a rollout without tokens"
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    costs = [cost(length, attention_weight) for length in lengths]
    bins = _fewest(_lower_bound(lengths, world, budget), lambda n: _fill(order, lengths, costs, n * world, budget))
    bins.sort(key=lambda members: (-sum(costs[i] for i in members), members))
    micro_batches: list[Bins] = [[] for _ in range(world)]
    for start in range(0, len(bins), world):
        for rank, members in enumerate(_deal(bins[start : start + world], lengths, owners)):
            micro_batches[rank].append(sorted(members))
    return Plan(micro_batches)


def cost(length: int, attention_weight: float = DEFAULT_ATTENTION_WEIGHT) -> float:
    """Time of one rollout in units of a token of the linear layers."""
    return length + attention_weight * length * length


def imbalance(plan: Plan, lengths: Sequence[int], attention_weight: float = DEFAULT_ATTENTION_WEIGHT) -> float:
    """Share of extra time that waiting costs: sum over rounds of the costliest rank / mean cost of a rank - 1."""
    ranks = [[sum(cost(lengths[i], attention_weight) for i in batch) for batch in rank] for rank in plan.micro_batches]
    waited = sum(max(of_round) for of_round in zip(*ranks, strict=True))
    mean = sum(map(sum, ranks)) / len(ranks)
    return waited / mean - 1 if mean else 0.0


def transfers(plan: Plan, owners: Sequence[int], rank: int) -> Transfers:
    """What `rank` sends and receives to bring every rollout from its owner to the rank that learns from it."""
    world = len(plan.micro_batches)
    moved = Transfers([[] for _ in range(world)], [[] for _ in range(world)])
    for destination, batches in enumerate(plan.micro_batches):
        for i in sorted(i for batch in batches for i in batch):
            if owners[i] == rank:
                moved.send[destination].append(i)
            if destination == rank:
                moved.receive[owners[i]].append(i)
    return moved


def _lower_bound(lengths: Sequence[int], world: int, budget: int) -> int:
    """No plan has fewer rounds: an oversized rollout fills a micro-batch, and two above half the budget share none."""
    by_tokens = sum(min(length, budget) for length in lengths)
    by_halves = sum(2 * length > budget for length in lengths)
    return max(-(-by_tokens // (budget * world)), -(-by_halves // world))


def _fewest(lower: int, fill: Callable[[int], Bins | None]) -> Bins:
    """The first success of `fill` from `lower` up: doubling steps, then bisection, so a poor bound costs few tries."""
    failed, rounds, step = lower - 1, lower, 1
    while (found := fill(rounds)) is None:
        failed, rounds, step = rounds, rounds + step, 2 * step
    while rounds - failed > 1:
        middle = (failed + rounds) // 2
        bins = fill(middle)
        if bins is None:
            failed = middle
        else:
            rounds, found = middle, bins
    return found


def _fill(order: Sequence[int], lengths: Sequence[int], costs: Sequence[float], count: int, budget: int) -> Bins | None:
    """Longest first into the cheapest of `count` bins, or where that is full into the one with the fewest tokens.

    None if a rollout fits in no bin. Heap entries are left behind when their bin grows, and skipped when they surface.
    """
    bins: Bins = [[] for _ in range(count)]
    bin_costs, bin_tokens = [0.0] * count, [0] * count
    by_cost, by_tokens = [(0.0, b) for b in range(count)], [(0, b) for b in range(count)]
    for i in order:
        while by_cost[0][0] != bin_costs[by_cost[0][1]]:
            heapq.heappop(by_cost)
        chosen = by_cost[0][1]
        if bins[chosen] and bin_tokens[chosen] + lengths[i] > budget:
            while by_tokens[0][0] != bin_tokens[by_tokens[0][1]]:
                heapq.heappop(by_tokens)
            chosen = by_tokens[0][1]
            if bins[chosen] and bin_tokens[chosen] + lengths[i] > budget:
                return None
        bins[chosen].append(i)
        bin_costs[chosen] += costs[i]
        bin_tokens[chosen] += lengths[i]
        heapq.heappush(by_cost, (bin_costs[chosen], chosen))
        heapq.heappush(by_tokens, (bin_tokens[chosen], chosen))
    return bins


def _deal(bins: Bins, lengths: Sequence[int], owners: Sequence[int]) -> Bins:
    """The bins of one round by rank: the largest holding of a bin by a rank is served first."""
    world = len(bins)
    claims: list[tuple[int, int, int]] = []
    for b, members in enumerate(bins):
        held: Counter[int] = Counter()
        for i in members:
            held[owners[i]] += lengths[i]
        claims += [(-tokens, b, rank) for rank, tokens in held.items()]
    rank_of: dict[int, int] = {}
    free = dict.fromkeys(range(world))
    for _, b, rank in sorted(claims):
        if b not in rank_of and rank in free:
            rank_of[b] = rank
            del free[rank]
    spare = iter(free)
    dealt: Bins = [[] for _ in range(world)]
    for b, members in enumerate(bins):
        dealt[rank_of[b] if b in rank_of else next(spare)] = members
    return dealt
