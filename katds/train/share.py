"""Brings every rollout to the rank that learns from it.

Which rollouts go where is a plan that every rank computes from the same two numbers per rollout; what moves is the kept
response and the teacher's signal, laid end to end. Prompts are known everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from katds.core.collective import Collective
from katds.core.packing import Plan, imbalance, plan, transfers
from katds.core.types import Field, RolloutBatch, RolloutRequest


@dataclass(slots=True)
class Share:
    """The rollouts that a rank learns from. `spans[i]` are the rows of rollout i in `actions` and `signal`."""

    micro_batches: list[list[int]]
    requests: Sequence[RolloutRequest]
    spans: dict[int, slice]
    actions: torch.Tensor  # int64 [T], kept response tokens
    signal: dict[Field, torch.Tensor]
    learned: torch.Tensor | None  # bool [T] on the host; None: all of them
    tokens: int  # learnt from, over all ranks
    imbalance: float  # share of time that ranks wait for each other, by the packer's cost


@dataclass(frozen=True, slots=True)
class Kept:
    """What all ranks know of a step's rollouts, in request order: kept tokens, those that the loss reads, and the rank that wrote
    each."""

    tokens: list[int]
    learned: list[int]
    owners: list[int]


def survey(batch: RolloutBatch, requests: Sequence[RolloutRequest], collective: Collective) -> Kept:
    """Collective: one sum tells every rank how long each rollout is and where it lies."""
    place = {request.id: i for i, request in enumerate(requests)}
    table = torch.zeros(4, len(requests), dtype=torch.int64)
    mask, at = batch.signal.get(Field.LEARNED), 0
    learned = None if mask is None else mask.cumsum(0).tolist()
    for rollout in batch.rollouts:
        i, end = place[rollout.id], at + rollout.kept
        count = (
            rollout.kept if learned is None or not rollout.kept else learned[end - 1] - (learned[at - 1] if at else 0)
        )
        table[:, i] = torch.tensor([rollout.kept, count, collective.rank, 1])
        at = end
    kept, chosen, owners, present = collective.sum(table).tolist()
    assert all(c == 1 for c in present), f"each rollout must be on one rank; counts are {sorted(set(present))}"
    return Kept(kept, chosen, owners)


def deal(
    batch: RolloutBatch,
    requests: Sequence[RolloutRequest],
    kept: Kept,
    chosen: Sequence[int],
    budget: int,
    attention_weight: float,
    collective: Collective,
    device: torch.device,
) -> Share:
    """Collective: packs the `chosen` requests (indices) into micro-batches and moves their rollouts there.

    Rollouts with nothing to learn from are left out. Cost: one all-to-all per field of the signal.
    """
    taken = [i for i in chosen if kept.learned[i] > 0]
    lengths = [len(requests[i].prompt.token_ids) + kept.tokens[i] - 1 for i in taken]
    owners = [kept.owners[i] for i in taken]
    packing = plan(lengths, owners, collective.size, budget, attention_weight)
    counts = [kept.tokens[i] for i in taken]
    actions, signal = _move(batch, [requests[i].id for i in taken], counts, packing, owners, collective, device)
    spans, at = {}, 0
    for source in transfers(packing, owners, collective.rank).receive:
        for j in source:
            spans[taken[j]] = slice(at, at + counts[j])
            at += counts[j]
    mine = [[taken[j] for j in micro_batch] for micro_batch in packing.micro_batches[collective.rank]]
    waiting = imbalance(packing, lengths, attention_weight)
    mask = signal.pop(Field.LEARNED, None)
    learned = None if mask is None else mask.cpu()
    return Share(mine, requests, spans, actions, signal, learned, sum(kept.learned[i] for i in taken), waiting)


def _move(
    batch: RolloutBatch,
    ids: list[int],
    counts: list[int],
    packing: Plan,
    owners: list[int],
    collective: Collective,
    device: torch.device,
) -> tuple[torch.Tensor, dict[Field, torch.Tensor]]:
    moves = transfers(packing, owners, collective.rank)
    send = [sum(counts[j] for j in to) for to in moves.send]
    receive = [sum(counts[j] for j in source) for source in moves.receive]
    held, at = {}, 0
    for rollout in batch.rollouts:
        held[rollout.id] = (rollout, range(at, at + rollout.kept))
        at += rollout.kept
    leaving = [held[ids[j]] for to in moves.send for j in to]
    rows = torch.tensor([row for _, span in leaving for row in span], dtype=torch.int64, device=device)
    tokens = torch.tensor(
        [t for rollout, _ in leaving for t in rollout.response_ids[: rollout.kept]], dtype=torch.int64, device=device
    )
    actions = collective.exchange(tokens, send, receive)
    signal = {}
    for key, shape, dtype in _layout(batch, collective):
        values = batch.signal[key][rows] if batch.signal else torch.empty(0, *shape, dtype=dtype, device=device)
        signal[key] = collective.exchange(values, send, receive)
    return actions, signal


def _layout(batch: RolloutBatch, collective: Collective) -> list[tuple[Field, tuple[int, ...], torch.dtype]]:
    """Collective: the signal's fields; a rank that wrote no rollout learns them from the others."""
    mine = [(key, tuple(value.shape[1:]), value.dtype) for key, value in batch.signal.items()]
    return next((layout for layout in collective.gather(mine) if layout), [])
