"""Rollouts arrive where they are learnt from, each token with its own signal."""

from __future__ import annotations

import dataclasses
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from local_ranks import LocalRank, run_local
from ranks import run_ranks

from katds.core.packing import DEFAULT_ATTENTION_WEIGHT
from katds.core.types import LENGTH, Field, Prompt, Rollout, RolloutBatch, RolloutRequest
from katds.parallel.world import start_world
from katds.train.share import Share, deal, survey

CPU = torch.device("cpu")
# (prompt tokens, kept, written beyond, rank that wrote it)
ROLLOUTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30), st.integers(0, 4), st.integers(0, 3)), max_size=24)


def token(rollout: int, position: int) -> int:
    return rollout * 1000 + position


def batch_of(
    rank: int, size: int, shapes: list[tuple[int, int, int, int]], dtype: torch.dtype
) -> tuple[RolloutBatch, list[RolloutRequest]]:
    """Tokens and signal rows that name their rollout and position. A rank that wrote nothing has no signal at all."""
    requests = [RolloutRequest(50 + i, Prompt(i, (7,) * prompt), 99) for i, (prompt, *_) in enumerate(shapes)]
    mine = [i for i, (*_, owner) in enumerate(shapes) if owner % size == rank]
    rollouts = []
    for i in mine:
        _, kept, beyond, _ = shapes[i]
        ids = [token(i, t) for t in range(kept + beyond)]
        rollouts.append(Rollout(requests[i], ids, kept, LENGTH))
    rows = torch.tensor([t for r in rollouts for t in r.response_ids[: r.kept]], dtype=torch.int64)
    signal = {
        Field.SAMPLED: rows.float(),
        Field.STUDENT_TOP_IDS: torch.stack([rows, rows + 1], 1).int(),
        Field.HIDDEN: rows[:, None].expand(-1, 3).to(dtype),
    }
    return RolloutBatch(rollouts, signal if mine else {}), requests


def check(
    shares: list[Share], shapes: list[tuple[int, int, int, int]], chosen: list[int], budget: int, dtype: torch.dtype
) -> None:
    kept = {i: shapes[i][1] for i in chosen if shapes[i][1]}
    assert len({len(share.micro_batches) for share in shares}) == 1
    learnt = [i for share in shares for members in share.micro_batches for i in members]
    assert sorted(learnt) == sorted(kept)
    for share in shares:
        assert share.tokens == sum(kept.values())
        mine = [i for members in share.micro_batches for i in members]
        assert sorted(share.spans) == sorted(mine)
        covered = sorted(row for span in share.spans.values() for row in range(span.start, span.stop))
        assert covered == list(range(len(share.actions)))
        for i in mine:
            expected = torch.tensor([token(i, t) for t in range(kept[i])])
            span = share.spans[i]
            assert torch.equal(share.actions[span], expected)
            assert share.own[i] == range(kept[i]) and share.places[i] == span
            assert torch.equal(share.signal[Field.SAMPLED][span], expected.float())
            assert torch.equal(
                share.signal[Field.STUDENT_TOP_IDS][span], torch.stack([expected, expected + 1], 1).int()
            )
            assert torch.equal(share.signal[Field.HIDDEN][span], expected[:, None].expand(-1, 3).to(dtype))
        for members in share.micro_batches:
            assert len(members) <= 1 or sum(shapes[i][0] + kept[i] - 1 for i in members) <= budget


def on_rank(
    collective: Any, shapes: list[tuple[int, int, int, int]], chosen: list[int], budget: int, dtype: torch.dtype
) -> Share:
    batch, requests = batch_of(collective.rank, collective.size, shapes, dtype)
    return deal(
        batch, requests, survey(batch, requests, collective), chosen, budget, DEFAULT_ATTENTION_WEIGHT, collective, CPU
    )


@settings(max_examples=150, deadline=None, phases=[Phase.explicit, Phase.generate])  # shrinking a hang takes minutes
@given(size=st.integers(1, 4), shapes=ROLLOUTS, budget=st.integers(1, 80), data=st.data())
def test_every_kept_token_arrives_once_with_its_signal(
    size: int, shapes: list[Any], budget: int, data: st.DataObject
) -> None:
    minibatches = data.draw(st.integers(1, 3))
    for minibatch in range(minibatches):
        chosen = list(range(minibatch, len(shapes), minibatches))
        shares = run_local(size, lambda rank, at=chosen: on_rank(rank, shapes, at, budget, torch.float32))
        check(shares, shapes, chosen, budget, torch.float32)


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(groups=st.integers(1, 2), sharers=st.integers(1, 3), shapes=ROLLOUTS, budget=st.integers(1, 40))
def test_sharers_have_all_tokens_and_each_row_of_the_signal_once(
    groups: int, sharers: int, shapes: list[Any], budget: int
) -> None:
    """The row of the rank that has the input which predicts its token."""
    size = groups * sharers

    def job(rank: LocalRank) -> Share:
        batch, requests = batch_of(rank.rank, size, shapes, torch.float32)
        known = survey(batch, requests, rank)
        chosen = list(range(len(shapes)))
        return deal(batch, requests, known, chosen, budget, DEFAULT_ATTENTION_WEIGHT, rank, CPU, sharers)

    shares = run_local(size, job)
    for group in range(groups):
        sharing = shares[group * sharers : (group + 1) * sharers]
        assert all(share.micro_batches == sharing[0].micro_batches for share in sharing)
        for place, share in enumerate(sharing):
            for members in share.micro_batches:
                ends = list(accumulate(shapes[i][0] + shapes[i][1] - 1 for i in members))
                for i, end in zip(members, ends, strict=True):
                    kept = shapes[i][1]
                    ids = torch.tensor([token(i, t) for t in range(kept)])
                    assert torch.equal(share.actions[share.spans[i]], ids)
                    stretch = -(-ends[-1] // sharers)
                    own = [t for t in range(kept) if (end - kept + t) // stretch == place]
                    assert list(share.own[i]) == own
                    assert torch.equal(share.signal[Field.SAMPLED][share.places[i]], ids[own].float())
    assert sum(len(share.signal.get(Field.SAMPLED, ())) for share in shares) == sum(kept for _, kept, *_ in shapes)


SHAPES = [
    [(3, 10, 2, 1), (1, 1, 0, 1), (5, 0, 3, 1), (2, 25, 0, 1), (4, 7, 1, 1)],  # one rank wrote everything
    [(3, 0, 5, 0), (1, 0, 1, 1)],  # nothing kept
    [(2, 9, 0, 0), (2, 9, 0, 1), (2, 9, 0, 2), (2, 9, 0, 3)],
]


def over_gloo() -> list[Share]:
    collective = start_world().collective
    shares = [on_rank(collective, shapes, list(range(len(shapes))), 20, torch.bfloat16) for shapes in SHAPES]
    # Tensors would travel as shared memory of a process that ends.
    return [
        dataclasses.replace(s, actions=s.actions.tolist(), signal={k: v.tolist() for k, v in s.signal.items()})
        for s in shares
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_over_real_processes_in_all_types(size: int) -> None:
    """gloo's all-to-all with int64, int32, float32 and bfloat16 rows, with ranks and whole steps without rows."""
    types = {Field.SAMPLED: torch.float32, Field.STUDENT_TOP_IDS: torch.int32, Field.HIDDEN: torch.bfloat16}
    ranks = run_ranks(size, over_gloo)
    for at, shapes in enumerate(SHAPES):
        shares = [rank[at] for rank in ranks]
        for share in shares:
            share.actions = torch.tensor(share.actions, dtype=torch.int64)
            empty = {Field.SAMPLED: (0,), Field.STUDENT_TOP_IDS: (0, 2), Field.HIDDEN: (0, 3)}
            share.signal = {
                k: torch.tensor(v, dtype=types[k]) if v else torch.empty(empty[k], dtype=types[k])
                for k, v in share.signal.items()
            }
        check(shares, shapes, list(range(len(shapes))), 20, torch.bfloat16)


def test_a_rollout_on_two_ranks_is_a_bug_that_shows() -> None:
    def job(rank: LocalRank) -> None:
        batch, requests = batch_of(0, 1, [(3, 4, 0, 0)], torch.float32)
        survey(batch, requests, rank)

    with pytest.raises(AssertionError, match="each rollout must be on one rank"):
        run_local(2, job)
