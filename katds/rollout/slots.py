"""Who sits in which slot: a scheduler without tensors.

Invariants: live slots are 0 .. n-1; when one ends, the last live slot moves into its place. Which rollout runs where
is a function of the request list and of the numbers that every rank has reported, so all ranks know it without asking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from katds.core.types import EOS, LENGTH, Cut, Rollout, RolloutRequest


@dataclass(slots=True)
class Seat:
    """A rollout in progress. The student's next input is `pending`, the last token that it wrote, or the prompt's last, at `position`."""

    request: RolloutRequest
    pending: int
    response: list[int] = field(default_factory=list)  # judged
    ahead: list[int] = field(default_factory=list)  # written after it, not yet judged
    divergences: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # (first row, rows) in the step's signal, one per chunk
    cut: Cut | None = None
    fresh: bool = True  # neither cache holds the prompt yet

    @property
    def written(self) -> int:
        """Tokens of the response so far."""
        return len(self.response) + len(self.ahead)

    @property
    def position(self) -> int:
        return len(self.request.prompt.token_ids) - 1 + self.written

    def finish(self, reason: str) -> Rollout:
        kept = len(self.response) if self.cut is None else self.cut.kept
        return Rollout(self.request, self.response, kept, reason, self.cut, self.divergences)


def natural_end(tokens: Sequence[int], room: int, eos_ids: Sequence[int]) -> tuple[int, str | None]:
    """How many of the next tokens belong to a response that has `room` for so many more, and why it ends with them, if it does."""
    for i, token in enumerate(tokens[:room]):
        if token in eos_ids:
            return i + 1, EOS
    return (room, LENGTH) if len(tokens) >= room else (len(tokens), None)


def assign(free: Sequence[int], live: Sequence[int], groups: Iterable[int]) -> list[list[int]]:
    """Deals the next requests to ranks: lists of request offsets per rank, in order.

    Args:
        free, live: free and occupied slots of each rank.
        groups: prompt index of each waiting request, in order; neighbours with the same prompt stay together where
            they fit, because a rank prefills a prompt once.

    A run of equal prompts goes to the rank with the fewest live slots that has room for all of it, else is split. Stops at the first
    request for which no slot is free anywhere.

    Cost: some log(ranks) per run where all ranks have equally many slots; every rank that is less busy than the one chosen
    and has too little room adds as much.
    """
    free, live = list(free), list(live)
    given: list[list[int]] = [[] for _ in free]
    queue = [(live[rank], -room, rank) for rank, room in enumerate(free) if room > 0]  # the least busy first
    heapify(queue)
    rooms, largest = Counter(free), max(free, default=0)
    for first, size in _runs(groups, sum(free)):
        at, end = first, first + size
        while at < end:
            while not rooms[largest]:
                largest -= 1
            wanted = end - at if end - at <= largest else 1
            passed = []
            while -queue[0][1] < wanted:
                passed.append(heappop(queue))
            rank = heappop(queue)[2]
            count = min(end - at, free[rank])
            given[rank] += range(at, at + count)
            rooms[free[rank]] -= 1
            free[rank] -= count
            live[rank] += count
            rooms[free[rank]] += 1
            if free[rank]:
                passed.append((live[rank], -free[rank], rank))
            for entry in passed:
                heappush(queue, entry)
            at += count
    return given


def share(requests: Sequence[RolloutRequest], parts: int) -> list[list[RolloutRequest]]:
    """Deals requests, in order, to blocks of ranks that will not ask each other for work: as many to each, up to a prompt's samples.

    Samples of a prompt stay together while their block has less than its share. The first requests, the audited ones, are
    dealt evenly too.
    """
    if parts == 1:
        return [list(requests)]
    room = [-(-len(requests) // parts)] * parts
    dealt = assign(room, [0] * parts, (request.prompt.index for request in requests))
    return [[requests[i] for i in part] for part in dealt]


def _runs(groups: Iterable[int], limit: int) -> list[tuple[int, int]]:
    """Runs (first, size) of equal neighbours among the first `limit` entries."""
    runs: list[tuple[int, int]] = []
    previous = None
    for at, group in enumerate(groups):
        if at == limit:
            break
        if runs and group == previous:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((at, 1))
        previous = group
    return runs


def admission_order(requests: Sequence[RolloutRequest]) -> tuple[list[RolloutRequest], dict[int, int]]:
    """Orders newly admitted requests so that those who copy a prompt's keys come before those who compute them.

    Returns the ordered requests and, for every follower's place in it, the place of its leader.
    """
    leaders: dict[int, RolloutRequest] = {}
    followers: list[RolloutRequest] = []
    for request in requests:
        if request.prompt.index in leaders:
            followers.append(request)
        else:
            leaders[request.prompt.index] = request
    place = {index: len(followers) + i for i, index in enumerate(leaders)}
    return [*followers, *leaders.values()], {i: place[r.prompt.index] for i, r in enumerate(followers)}


class Slots:
    """The live seats of one rank, slot i = seats[i]."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seats: list[Seat] = []

    @property
    def free(self) -> int:
        return self.capacity - len(self.seats)

    def admit(self, requests: Sequence[RolloutRequest]) -> dict[int, int]:
        """Seats the requests; returns for each follower's slot the slot of the leader whose prompt it shares."""
        assert len(requests) <= self.free, f"{len(requests)} requests for {self.free} free slots"
        base = len(self.seats)
        ordered, leader_of = admission_order(requests)
        self.seats += [Seat(r, r.prompt.token_ids[-1]) for r in ordered]
        return {base + follower: base + leader for follower, leader in leader_of.items()}

    def retire(self, ended: Iterable[int]) -> list[tuple[int, int]]:
        """Frees slots; returns the moves (source, target) that keep live slots in front. No target is also a source."""
        gone = set(ended)
        left = len(self.seats) - len(gone)
        holes = [slot for slot in sorted(gone) if slot < left]
        movers = [slot for slot in range(left, len(self.seats)) if slot not in gone]
        moves = list(zip(movers, holes, strict=True))
        for source, target in moves:
            self.seats[target] = self.seats[source]
        del self.seats[left:]
        return moves
