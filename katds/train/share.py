"""Brings every rollout to the rank that learns from it.

Which rollouts go where is a plan that every rank computes from the same few numbers per rollout; what moves is the kept
response, a prefix that the teacher wrote, and the teacher's signal, laid end to end. Prompts are known everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from katds.core.collective import Collective
from katds.core.packing import Plan, Transfers, imbalance, plan, transfers
from katds.core.types import Field, RolloutBatch, RolloutRequest


@dataclass(slots=True)
class Share:
    """The rollouts that a rank learns from. `spans[i]` are the rows of rollout i in `actions`; `own[i]` those of its rows (0 is the first)
    whose loss is this rank's, all but for sharers, and `places[i]` where in `signal` they are; `leads[i]` the tokens between its prompt
    and its rows that are only read, if there are any (int64)."""

    micro_batches: list[list[int]]
    requests: Sequence[RolloutRequest]
    spans: dict[int, slice]
    own: dict[int, range]
    places: dict[int, slice]
    leads: dict[int, torch.Tensor]
    actions: torch.Tensor  # int64 [T], the token of each row
    signal: dict[Field, torch.Tensor]  # of the own rows, as is
    learned: torch.Tensor | None  # bool on the host; None: all of them
    tokens: int  # learnt from, over all ranks, that the student wrote: what the sum of losses is divided by
    imbalance: float  # share of time that ranks wait for each other, by the packer's cost


@dataclass(frozen=True, slots=True)
class Kept:
    """What all ranks know of a step's rollouts, in request order: rows of the signal, those that the loss reads and those that it is
    divided by, tokens of a prefix without rows, and the rank that wrote each."""

    rows: list[int]
    learned: list[int]
    counted: list[int]
    leads: list[int]
    owners: list[int]


def survey(batch: RolloutBatch, requests: Sequence[RolloutRequest], collective: Collective) -> Kept:
    """Collective: one sum tells every rank how long each rollout is and where it lies."""
    place = {request.id: i for i, request in enumerate(requests)}
    table = torch.zeros(6, len(requests), dtype=torch.int64)
    rows = [rollout.rows for rollout in batch.rollouts]
    learned = batch.signal.get(Field.LEARNED, torch.ones(sum(rows), dtype=torch.bool))
    guided = batch.signal.get(Field.GUIDED)
    counted = learned if guided is None else learned & ~guided.to(learned.device)
    numbers = zip(batch.rollouts, rows, _sums(learned, rows), _sums(counted, rows), strict=True)
    for rollout, count, of_loss, of_count in numbers:
        lead = len(rollout.prefix) - rollout.prefix_rows
        table[:, place[rollout.id]] = torch.tensor([count, of_loss, of_count, lead, collective.rank, 1])
    *known, present = collective.sum(table).tolist()
    assert all(c == 1 for c in present), f"each rollout must be on one rank; counts are {sorted(set(present))}"
    return Kept(*known)


def _sums(mask_T: torch.Tensor, rows: Sequence[int]) -> list[int]:
    """How many rows of each rollout are set."""
    bounds = torch.tensor([0, *accumulate(rows)], device=mask_T.device)
    return torch.cat([bounds[:1], mask_T.cumsum(0)])[bounds].diff().tolist()


def deal(
    batch: RolloutBatch,
    requests: Sequence[RolloutRequest],
    kept: Kept,
    chosen: Sequence[int],
    budget: int,
    attention_weight: float,
    collective: Collective,
    device: torch.device,
    sharers: int = 1,
) -> Share:
    """Collective: packs the `chosen` requests (indices) into micro-batches and moves their rollouts there.

    `sharers`: so many neighbouring ranks have the same micro-batches, of so many times the budget: all their tokens, but of the signal only
    what belongs to a rank's own stretch.

    Rollouts with nothing to learn from are left out. Cost: one all-to-all per field of the signal.
    """
    taken = [i for i in chosen if kept.learned[i] > 0]
    lengths = [len(requests[i].prompt.token_ids) + kept.leads[i] + kept.rows[i] - 1 for i in taken]
    owners = [kept.owners[i] for i in taken]
    groups = [owner // sharers for owner in owners]
    packing = plan(lengths, groups, collective.size // sharers, sharers * budget, attention_weight).shared(sharers)
    counts, before = [kept.rows[i] for i in taken], [kept.leads[i] for i in taken]
    ids = [requests[i].id for i in taken]
    stretches = _Stretches(packing, lengths, counts, sharers)
    actions, signal = _move(batch, ids, counts, packing, owners, stretches, collective, device)
    received = [j for source in transfers(packing, owners, collective.rank).receive for j in source]
    own = {taken[j]: stretches.rows(j, collective.rank) for j in received}
    spans = dict(zip(own, _laid_out([counts[j] for j in received]), strict=True))
    places = dict(zip(own, _laid_out(map(len, own.values())), strict=True))
    leads = {}
    if any(before):
        read = _move_leads(batch, ids, before, packing, owners, collective, device)
        leads = {taken[j]: part for j, part in zip(received, read.split([before[j] for j in received]), strict=True)}
    mine = [[taken[j] for j in micro_batch] for micro_batch in packing.micro_batches[collective.rank]]
    waiting = imbalance(packing, lengths, attention_weight)
    mask = signal.pop(Field.LEARNED, None)
    learned = None if mask is None else mask.cpu()
    tokens = sum(kept.counted[i] for i in taken)
    return Share(mine, requests, spans, own, places, leads, actions, signal, learned, tokens, waiting)


def _laid_out(counts: Iterable[int]) -> list[slice]:
    """End to end."""
    return [slice(start, stop) for start, stop in pairwise(accumulate(counts, initial=0))]


class _Stretches:
    """Which rows of a rollout have their loss on which of the ranks that share its micro-batch: the rank that has the input which predicts
    them. Micro-batches lie end to end, and sharers have equal stretches of each; its last may be longer than what there is."""

    def __init__(self, packing: Plan, lengths: Sequence[int], counts: Sequence[int], sharers: int) -> None:
        self._counts, self._sharers = counts, sharers
        self._firsts, self._sizes = (
            [0] * len(lengths),
            [0] * len(lengths),
        )  # of a rollout: its first row, a stretch there
        for members in (members for batches in packing.micro_batches[::sharers] for members in batches):
            ends = list(accumulate(lengths[j] for j in members))
            for j, end in zip(members, ends, strict=True):
                self._firsts[j], self._sizes[j] = end - counts[j], -(-ends[-1] // sharers)

    def rows(self, j: int, rank: int) -> range:
        """Of rollout j, for a rank that has its micro-batch."""
        begin = rank % self._sharers * self._sizes[j] - self._firsts[j]
        start, stop = (min(max(at, 0), self._counts[j]) for at in (begin, begin + self._sizes[j]))
        return range(start, stop)


def _move(
    batch: RolloutBatch,
    ids: list[int],
    counts: list[int],
    packing: Plan,
    owners: list[int],
    stretches: _Stretches,
    collective: Collective,
    device: torch.device,
) -> tuple[torch.Tensor, dict[Field, torch.Tensor]]:
    moves, send, receive = _routes(counts, packing, owners, collective)
    held, at = {}, 0
    for rollout in batch.rollouts:
        held[rollout.id] = (rollout, range(at, at + rollout.rows))
        at += rollout.rows
    tokens = [t for to in moves.send for j in to for t in held[ids[j]][0].row_ids]
    actions = collective.exchange(torch.tensor(tokens, dtype=torch.int64, device=device), send, receive)
    parts = [[(held[ids[j]][1], stretches.rows(j, rank)) for j in to] for rank, to in enumerate(moves.send)]
    leaving = [row for part in parts for span, own in part for row in span[own.start : own.stop]]
    rows = torch.tensor(leaving, dtype=torch.int64, device=device)
    send = [sum(len(own) for _, own in part) for part in parts]
    receive = [sum(len(stretches.rows(j, collective.rank)) for j in source) for source in moves.receive]
    signal = {}
    for key, shape, dtype in _layout(batch, collective):
        values = batch.signal[key][rows] if batch.signal else torch.empty(0, *shape, dtype=dtype, device=device)
        signal[key] = collective.exchange(values, send, receive)
    return actions, signal


def _move_leads(
    batch: RolloutBatch,
    ids: list[int],
    counts: list[int],
    packing: Plan,
    owners: list[int],
    collective: Collective,
    device: torch.device,
) -> torch.Tensor:
    """Collective: the prefixes that no row of the signal belongs to, as `_move` does with what is learnt from."""
    moves, send, receive = _routes(counts, packing, owners, collective)
    held = {rollout.id: rollout.prefix for rollout in batch.rollouts if not rollout.guided}
    tokens = [t for to in moves.send for j in to for t in held.get(ids[j], ())]
    return collective.exchange(torch.tensor(tokens, dtype=torch.int64, device=device), send, receive)


def _routes(
    counts: Sequence[int], packing: Plan, owners: Sequence[int], collective: Collective
) -> tuple[Transfers, list[int], list[int]]:
    """Which rollouts go where, and how many rows this rank sends to each rank and receives from each; `counts`: rows of a rollout."""
    moves = transfers(packing, owners, collective.rank)
    send, receive = ([sum(counts[j] for j in part) for part in parts] for parts in (moves.send, moves.receive))
    return moves, send, receive


def _layout(batch: RolloutBatch, collective: Collective) -> list[tuple[Field, tuple[int, ...], torch.dtype]]:
    """Collective: the signal's fields; a rank that wrote no rollout learns them from the others."""
    mine = [(key, tuple(value.shape[1:]), value.dtype) for key, value in batch.signal.items()]
    return next((layout for layout in collective.gather(mine) if layout), [])
