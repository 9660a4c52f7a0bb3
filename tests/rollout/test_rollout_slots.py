"""The scheduler: who gets which request, and who moves where."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st
from rollout_setup import prompts

from katds.core.types import Prompt, RolloutRequest
from katds.rollout.requests import RequestStream, in_audit
from katds.rollout.slots import Slots, admission_order, assign

RANKS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5)
RUNS = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 7)), max_size=8)


def requests(groups: list[int], first_id: int = 0) -> list[RolloutRequest]:
    """One request per entry, its prompt as long as the number of its group."""
    return [RolloutRequest(i, Prompt(g, tuple(range(g + 1))), 8) for i, g in enumerate(groups, first_id)]


@given(ranks=RANKS, runs=RUNS)
def test_requests_are_dealt_once_in_order_into_free_slots(
    ranks: list[tuple[int, int]], runs: list[tuple[int, int]]
) -> None:
    free, live = zip(*ranks, strict=True)
    groups = [group for group, size in runs for _ in range(size)]
    given_ = assign(free, live, iter(groups))
    assert len(given_) == len(ranks)
    assert all(len(mine) <= room and mine == sorted(mine) for mine, room in zip(given_, free, strict=True))
    dealt = sorted(offset for mine in given_ for offset in mine)
    assert dealt == list(range(min(len(groups), sum(free)))), "a slot stays free while requests wait, or one is skipped"


@given(ranks=RANKS, runs=RUNS)
def test_equal_prompts_stay_together_where_they_fit_and_go_to_the_least_busy(
    ranks: list[tuple[int, int]], runs: list[tuple[int, int]]
) -> None:
    free, live = map(list, zip(*ranks, strict=True))
    groups = [group for group, size in runs for _ in range(size)]
    owner = {offset: rank for rank, mine in enumerate(assign(free, live, groups)) for offset in mine}
    for _, run in groupby(range(len(owner)), key=lambda offset: groups[offset]):
        takers = [owner[offset] for offset in run]
        roomy = [rank for rank in range(len(ranks)) if free[rank] >= len(takers)]
        if roomy:
            assert set(takers) == {takers[0]}
            assert live[takers[0]] == min(live[rank] for rank in roomy)
        for rank in takers:
            free[rank] -= 1
            live[rank] += 1


def by_the_book(free: list[int], live: list[int], groups: list[int]) -> list[list[int]]:
    """`assign` as its docstring has it, looking at every rank for every portion."""
    free, live = list(free), list(live)
    given_: list[list[int]] = [[] for _ in free]
    for _, run in groupby(range(min(len(groups), sum(free))), key=lambda offset: groups[offset]):
        left = list(run)
        while left:
            able = [r for r in range(len(free)) if free[r] >= len(left)] or [r for r in range(len(free)) if free[r]]
            rank = min(able, key=lambda r: (live[r], -free[r], r))
            taken, left = left[: free[rank]], left[free[rank] :]
            given_[rank] += taken
            free[rank] -= len(taken)
            live[rank] += len(taken)
    return given_


@given(ranks=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=9), runs=RUNS)
def test_dealing_with_queues_is_dealing_by_the_book(ranks: list[tuple[int, int]], runs: list[tuple[int, int]]) -> None:
    free, live = [room for room, _ in ranks], [busy for _, busy in ranks]
    groups = [group for group, size in runs for _ in range(size)]
    for busy in (live, [6 - room for room in free]):  # any, and those of ranks with as many slots each
        assert assign(free, busy, iter(groups)) == by_the_book(free, busy, groups)


@given(groups=st.lists(st.integers(0, 4), max_size=12))
def test_followers_come_before_the_leaders_they_copy(groups: list[int]) -> None:
    admitted = requests(groups)
    ordered, leaders = admission_order(admitted)
    assert sorted(r.id for r in ordered) == [r.id for r in admitted]
    assert list(leaders) == list(range(len(admitted) - len(set(groups))))
    assert {r.prompt.index for r in ordered[len(leaders) :]} == set(groups)
    for follower, leader in leaders.items():
        assert leader >= len(leaders) and ordered[follower].prompt == ordered[leader].prompt


@given(
    capacity=st.integers(1, 9),
    rounds=st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=9), st.sets(st.integers(0, 8))), max_size=8),
)
def test_what_lies_in_a_slot_is_of_its_seat(capacity: int, rounds: list[tuple[list[int], set[int]]]) -> None:
    """`memory` stands for the caches: what a rank writes into slots and moves when it is told to."""
    slots, memory, next_id, seated = Slots(capacity), [None] * capacity, 0, set()
    for groups, picks in rounds:
        admitted = requests(groups[: slots.free], next_id)
        next_id += len(admitted)
        before = len(slots.seats)
        leaders = slots.admit(admitted)
        assert all(before <= place < len(slots.seats) for pair in leaders.items() for place in pair)
        assert all(seat.fresh and seat.pending == seat.request.prompt.token_ids[-1] for seat in slots.seats[before:])
        for place in range(before, len(slots.seats)):
            memory[place] = slots.seats[place].request.id
            slots.seats[place].fresh = False
        seated |= {r.id for r in admitted}
        ended = [place for place in picks if place < len(slots.seats)]
        seated -= {slots.seats[place].request.id for place in ended}
        moves = slots.retire(ended)
        sources, targets = [source for source, _ in moves], [target for _, target in moves]
        assert not set(sources) & set(targets) and len(set(sources)) == len(set(targets)) == len(moves)
        assert len(moves) <= len(ended)
        for source, target in moves:
            memory[target] = memory[source]
        assert [seat.request.id for seat in slots.seats] == memory[: len(slots.seats)]
        assert {seat.request.id for seat in slots.seats} == seated
        assert slots.free == capacity - len(seated)


class Repeating:
    """A prompt stream of five prompts, over and over."""

    def batch(self, start: int, count: int) -> list[Prompt]:
        some = prompts([3, 1, 4, 1, 5])
        return [some[i % 5] for i in range(start, start + count)]


def test_steps_ask_for_the_next_prompts_under_fresh_ids() -> None:
    stream = RequestStream(Repeating(), prompts_per_step=3, samples=2, max_new_tokens=9, audit_fraction=0.25)
    steps = [request for step in range(4) for request in stream.step(step)]
    assert [r.id for r in steps] == list(range(24)) and stream.rollouts_per_step == 6
    assert [r.prompt.index for r in steps] == [10 + i // 2 % 5 for i in range(24)]
    assert [r.audit for r in steps] == [in_audit(i, 0.25) for i in range(24)]
    assert stream.step(2) == steps[12:18]


@given(fraction=st.floats(0, 1), first=st.integers(0, 10**6), count=st.integers(0, 300))
def test_every_stretch_of_ids_has_its_share_of_audits(fraction: float, first: int, count: int) -> None:
    audits = sum(in_audit(i, fraction) for i in range(first, first + count))
    assert abs(audits - fraction * count) <= 1 + 1e-6
