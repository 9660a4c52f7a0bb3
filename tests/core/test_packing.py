"""Packing: properties of every plan, balance on realistic lengths, and transfers that bring the rows together."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_ranks import LocalRank, run_local

from katds.core.packing import Plan, _fill, attention_weight, cost, imbalance, plan, transfers

LENGTHS = st.lists(st.integers(1, 60), max_size=50)
WORLD = st.integers(1, 6)
BUDGET = st.integers(1, 100)


def owners_of(lengths: list[int], world: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(world) for _ in lengths]


def skewed_lengths(count: int, seed: int = 0) -> list[int]:
    """Prompt and response: log-normal, median about 700 tokens, capped where a response of 4096 would be."""
    rng = random.Random(seed)
    return [min(5120, 200 + int(rng.lognormvariate(6.2, 0.9))) for _ in range(count)]


def batches(made: Plan) -> list[list[int]]:
    return [batch for rank in made.micro_batches for batch in rank]


@settings(max_examples=300)
@given(LENGTHS, WORLD, BUDGET, st.sampled_from([0.0, 1e-4, 0.1]))
def test_every_plan_keeps_its_invariants(lengths: list[int], world: int, budget: int, weight: float) -> None:
    owners = owners_of(lengths, world)
    made = plan(lengths, owners, world, budget, weight)
    assert len(made.micro_batches) == world
    assert {len(rank) for rank in made.micro_batches} == {made.rounds}
    assert sorted(i for batch in batches(made) for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches(made))
    assert plan(list(lengths), list(owners), world, budget, weight) == made
    assert (made.rounds == 0) == (not lengths)


@given(LENGTHS, WORLD, BUDGET)
def test_rounds_fall_in_cost_and_none_is_empty(lengths: list[int], world: int, budget: int) -> None:
    made = plan(lengths, owners_of(lengths, world), world, budget)
    rounds = [[sum(cost(lengths[i]) for i in rank[j]) for rank in made.micro_batches] for j in range(made.rounds)]
    assert all(min(earlier) >= max(later) for earlier, later in pairwise(rounds))
    assert all(max(costs) > 0 for costs in rounds)


@given(LENGTHS.filter(bool), WORLD, BUDGET)
def test_the_number_of_rounds_is_near_the_least(lengths: list[int], world: int, budget: int) -> None:
    """A rollout that fits nowhere leaves every bin more than half full, so twice the lower bound always suffices."""
    made = plan(lengths, owners_of(lengths, world), world, budget)
    bound = -(-sum(min(length, budget) for length in lengths) // (budget * world))
    assert bound <= made.rounds <= 2 * bound


@pytest.mark.parametrize(
    ("lengths", "world", "budget", "rounds"),
    [
        ([8, 8, 8, 8], 1, 16, 2),  # fits exactly
        ([9, 9, 9, 9], 1, 16, 4),  # no two share
        ([9, 9, 9, 9], 4, 16, 1),
        ([100, 1, 1], 2, 10, 1),  # an oversized rollout has a rank to itself
        ([100, 1, 1], 1, 10, 2),
        ([5, 5, 5, 3, 3, 3], 3, 8, 1),
        ([1], 4, 10, 1),  # three dummies
        ([40] * 40, 1, 100, 20),  # far above the bound of 16
    ],
)
def test_the_least_number_of_rounds_is_found(lengths: list[int], world: int, budget: int, rounds: int) -> None:
    assert plan(lengths, [0] * len(lengths), world, budget).rounds == rounds


@settings(max_examples=200)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(1, 1.2), st.sampled_from([0.0, 0.5, 8.0]))
def test_the_heaps_choose_what_a_search_would(seed: int, count: int, slack: float, weight: float) -> None:
    rng = random.Random(seed)
    lengths = [int(rng.expovariate(1 / 20)) + 1 for _ in range(4 * count)]
    budget = int(
        sum(lengths) / count * slack
    )  # tight, so that room decides as often as cost; the weights' sums are exact
    costs = [cost(length, weight) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def search() -> list[list[int]] | None:
        bins: list[list[int]] = [[] for _ in range(count)]
        for i in order:
            cheapest = min(bins, key=lambda members: sum(costs[j] for j in members))
            emptiest = min(bins, key=lambda members: sum(lengths[j] for j in members))
            for chosen in (cheapest, emptiest):
                if not chosen or sum(lengths[j] for j in chosen) + lengths[i] <= budget:
                    chosen.append(i)
                    break
            else:
                return None
        return bins

    assert _fill(order, lengths, costs, count, budget) == search()


def test_a_cheap_bin_without_room_does_not_hide_one_with_room() -> None:
    """Attention makes the long rollout's bin dear though it has the room that the short ones need."""
    made = plan([10, 7, 7, 3], [0] * 4, world=2, budget=14, attention_weight=10.0)
    assert made.rounds == 1
    assert sorted(map(sorted, batches(made))) == [[0, 3], [1, 2]]


def test_balance_on_64_ranks() -> None:
    lengths = skewed_lengths(64 * 32)
    made = plan(lengths, owners_of(lengths, 64), 64, 16384)
    assert made.rounds == 2
    assert imbalance(made, lengths) < 0.01  # measured 0.003


@pytest.mark.parametrize(("count", "world", "most"), [(128, 4, 0.02), (128, 8, 0.05), (512, 64, 0.08)])
def test_balance_of_few_rollouts_per_rank(count: int, world: int, most: float) -> None:
    measured = []
    for seed in range(5):
        lengths = skewed_lengths(count, seed)
        measured.append(imbalance(plan(lengths, owners_of(lengths, world), world, 16384), lengths))
    assert sum(measured) / 5 < most


def test_imbalance_is_the_share_of_waiting() -> None:
    lengths = [10, 6, 4, 2]
    uneven = Plan([[[0], [3]], [[1], [2]]])  # rounds cost 10 and 4, a rank 11 on average
    assert imbalance(uneven, lengths, attention_weight=0.0) == pytest.approx(14 / 11 - 1)
    assert imbalance(Plan([[], []]), []) == 0.0
    assert imbalance(Plan([[[0]], [[]]]), [5]) == pytest.approx(1.0)  # one works, one waits


def test_attention_decides_what_is_even() -> None:
    lengths = [8] + [1] * 8
    by_tokens = plan(lengths, [0] * 9, world=2, budget=100, attention_weight=0.0)
    assert sorted(len(batch) for batch in batches(by_tokens)) == [1, 8]
    lengths = [8, 4, 4, 4, 4]
    assert sorted(map(len, batches(plan(lengths, [0] * 5, 2, 100, 0.0)))) == [2, 3]
    assert sorted(map(len, batches(plan(lengths, [0] * 5, 2, 100, 10.0)))) == [1, 4]


def test_attention_weight_counts_flops() -> None:
    layers, width, length = 28, 2048, 4096
    parameters = 12 * layers * width**2
    linear = 2 * parameters * length
    attention = sum(4 * layers * width * position for position in range(length))  # causal
    assert attention_weight(layers, width, parameters) * length == pytest.approx(attention / linear, rel=1e-3)


def test_a_rank_keeps_the_bin_it_owns() -> None:
    lengths = [30, 29, 28, 27]
    for owners in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        made = plan(lengths, owners, world=4, budget=40)
        assert all(made.micro_batches[owner] == [[i]] for i, owner in enumerate(owners))


def test_the_larger_holding_is_served_first() -> None:
    # both bins of the round belong to rank 1; it keeps the one with more of its tokens
    made = plan([30, 20], [1, 1], world=2, budget=30)
    assert made.micro_batches == [[[1]], [[0]]]


@settings(max_examples=40)
@given(LENGTHS, st.integers(1, 4), BUDGET, st.integers(0, 1000))
def test_transfers_bring_every_rollout_to_its_learner(lengths: list[int], world: int, budget: int, seed: int) -> None:
    """Each rank derives its own lists and they fit together in a real exchange of rows."""
    owners = owners_of(lengths, world, seed)
    made = plan(lengths, owners, world, budget)

    def work(collective: LocalRank) -> list[int]:
        moved = transfers(made, owners, collective.rank)
        outgoing = torch.tensor([i for part in moved.send for i in part], dtype=torch.int64)
        arrived = collective.exchange(outgoing, [len(p) for p in moved.send], [len(p) for p in moved.receive])
        assert arrived.tolist() == [i for part in moved.receive for i in part]
        assert all(owners[i] == collective.rank for i in outgoing.tolist())
        return arrived.tolist()

    for rank, arrived in enumerate(run_local(world, work)):
        assert sorted(arrived) == sorted(i for batch in made.micro_batches[rank] for i in batch)


def test_impossible_input_is_refused() -> None:
    with pytest.raises(AssertionError, match="owners"):
        plan([1, 2], [0], 1, 10)
    with pytest.raises(AssertionError, match="without tokens"):
        plan([1, 0], [0, 0], 1, 10)
    with pytest.raises(AssertionError, match="budget"):
        plan([1], [0], 1, 0)
