"""A rank's rollouts as rows, for `Objective.prepare`: one row per kept token, rollout after rollout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from katds.core.types import Field, Rollout, RolloutBatch, require


def rows_of(batch: RolloutBatch, key: Field) -> torch.Tensor:
    """The rows of `key` in the signal. None for a rank that wrote nothing; where tokens were kept, a missing score is an error."""
    count = sum(rollout.kept for rollout in batch.rollouts)
    rows_T = require(batch.signal, key) if count else batch.signal.get(key, torch.empty(0))
    assert len(rows_T) == count, f"{len(rows_T)} rows of {key.value!r} for {count} kept tokens"
    return rows_T


def advantages(batch: RolloutBatch) -> torch.Tensor:
    """log q(y) - log p(y) of every kept token, with p as written; [T] nats."""
    return rows_of(batch, Field.SAMPLED) - rows_of(batch, Field.WRITTEN)


def outside_holes(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """Bool [T] on the host: which kept tokens lie in no hole."""
    learned = torch.ones(sum(rollout.kept for rollout in rollouts), dtype=torch.bool)
    at = 0
    for rollout in rollouts:
        if rollout.hole is not None:
            start, end = (min(place, rollout.kept) for place in rollout.hole)
            learned[at + start : at + end] = False
        at += rollout.kept
    return learned
