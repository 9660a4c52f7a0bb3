"""A rank's rollouts as rows, for `Objective.prepare`: one row per kept token, rollout after rollout; those of a guided prefix first."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch

from katds.core.types import FIELDS, Field, Need, Rollout, RolloutBatch, require


def rows_of(batch: RolloutBatch, key: Field) -> torch.Tensor:
    """The rows of `key` in the signal. None for a rank that wrote nothing; where tokens were kept, a missing score is an error."""
    count = sum(rollout.rows for rollout in batch.rollouts)
    rows_T = require(batch.signal, key) if count else batch.signal.get(key, torch.empty(0))
    assert len(rows_T) == count, f"{len(rows_T)} rows of {key.value!r} for {count} kept tokens"
    return rows_T


def advantages(batch: RolloutBatch) -> torch.Tensor:
    """log q(y) - log p(y) of every kept token, with p as written; [T] nats. nan for a teacher's token, which the student did not write."""
    return rows_of(batch, Field.SAMPLED) - rows_of(batch, Field.WRITTEN)


def outside_holes(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """Bool [T] on the host: which rows lie in no hole of a response."""
    learned = torch.ones(sum(rollout.rows for rollout in rollouts), dtype=torch.bool)
    at = 0
    for rollout in rollouts:
        if rollout.hole is not None:
            start, end = (at + rollout.prefix_rows + min(place, rollout.kept) for place in rollout.hole)
            learned[start:end] = False
        at += rollout.rows
    return learned


def has_nan(batch: RolloutBatch, needs: Set[Need]) -> bool:
    """Whether a score that serves `needs`, of a token that the student wrote, is not a number. -inf is one: the other model may give a
    token no chance.

    The host waits once. What only one of the student's and the guided rows was scored for is nan in the other on purpose; see
    `katds.rollout.prefix_rows`.
    """
    guided = batch.signal.get(Field.GUIDED)
    own = slice(None) if guided is None else ~guided
    asked = [batch.signal[key] for need in sorted(needs) for key in FIELDS[need] if key in batch.signal]
    scores = [values[own] for values in asked if values.is_floating_point()]
    # The largest value is nan if any is, and takes no memory of the size of the hidden states.
    found = [values.amax().isnan() for values in scores if values.numel()]
    return bool(found) and bool(torch.stack(found).any())
