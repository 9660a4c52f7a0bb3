"""The teacher's report on a tile: exactly what was asked for, with the right numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from katds.core.objectives.rows import has_nan
from katds.core.teacher_signal import score_tile
from katds.core.types import FIELDS as OF_NEED
from katds.core.types import LENGTH, Field, Need, Prompt, Rollout, RolloutBatch, RolloutRequest

T, V, K = 5, 11, 3
LOGPROBS = torch.randn(T, V, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
ACTIONS = torch.tensor([3, 0, 10, 5, 5])
IDS = torch.tensor([[0, 1, 2], [3, 4, 5], [10, 9, 8], [5, 0, 7], [2, 2, 2]], dtype=torch.int32)
FIELDS = {
    Need.SAMPLED: {Field.SAMPLED},
    Need.STUDENT_TOP_K: {Field.STUDENT_TOP},
    Need.TEACHER_TOP_K: {Field.TEACHER_TOP, Field.TEACHER_TOP_IDS},
    Need.ENTROPY: {Field.ENTROPY},
    Need.FULL: set(),
    Need.WRITTEN: set(),  # the student knows these
    Need.STUDENT_ENTROPY: set(),
    Need.CHUNKS: set(),  # of text, not of a tile
}
SUBSETS = [frozenset(subset) for size in range(len(Need) + 1) for subset in itertools.combinations(Need, size)]


def test_makes_exactly_what_is_needed() -> None:
    for needs in SUBSETS:
        expected = set().union(*(FIELDS[need] for need in needs))
        assert set(score_tile(LOGPROBS, ACTIONS, IDS, needs, K)) == expected


def test_values() -> None:
    signal = score_tile(LOGPROBS, ACTIONS, IDS, frozenset(Need), K)
    by_rank = [sorted(range(V), key=lambda v, row=row: -row[v])[:K] for row in LOGPROBS.tolist()]
    assert signal[Field.TEACHER_TOP_IDS].tolist() == by_rank
    assert signal[Field.TEACHER_TOP_IDS].dtype == torch.int32
    for t, row in enumerate(LOGPROBS):
        assert signal[Field.SAMPLED][t] == row[ACTIONS[t]]
        assert signal[Field.STUDENT_TOP][t].tolist() == [row[v] for v in IDS[t].tolist()]
        assert signal[Field.TEACHER_TOP][t].tolist() == [row[v] for v in by_rank[t]]
    entropy = torch.distributions.Categorical(logits=LOGPROBS).entropy()
    torch.testing.assert_close(signal[Field.ENTROPY], entropy)


def test_a_vocabulary_smaller_than_the_top_k_is_reported_whole() -> None:
    assert score_tile(LOGPROBS, ACTIONS, None, frozenset({Need.TEACHER_TOP_K}), 64)[Field.TEACHER_TOP].shape == (T, V)


def test_no_rows() -> None:
    signal = score_tile(LOGPROBS[:0], ACTIONS[:0], IDS[:0], frozenset(Need), K)
    assert {key: value.shape[1:] for key, value in signal.items()} == {
        Field.SAMPLED: (),
        Field.STUDENT_TOP: (K,),
        Field.TEACHER_TOP: (K,),
        Field.TEACHER_TOP_IDS: (K,),
        Field.ENTROPY: (),
    }


@pytest.mark.parametrize(
    ("actions", "ids", "top_k", "needs", "message"),
    [
        (ACTIONS[:2], IDS, K, Need.SAMPLED, "2 rows"),
        (ACTIONS, IDS[:1], K, Need.STUDENT_TOP_K, "1 rows"),
        (ACTIONS, None, K, Need.STUDENT_TOP_K, "missing"),
        (ACTIONS, IDS, 0, Need.TEACHER_TOP_K, "teacher_top_k is 0"),
    ],
)
def test_what_cannot_be_served_is_an_error(actions, ids, top_k: int, needs: Need, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_tile(LOGPROBS, actions, ids, frozenset({needs}), top_k)


def test_every_need_has_its_fields() -> None:
    """Among them all that the teacher reports on a tile."""
    assert set(OF_NEED) == set(Need)
    assert all(fields <= set(OF_NEED[need]) for need, fields in FIELDS.items())


@pytest.mark.parametrize("need", Need)
@pytest.mark.parametrize("guided", [False, True])
def test_a_score_that_is_not_a_number_is_found(need: Need, guided: bool) -> None:
    """In any row of the student's and any field of the need; not in a teacher's row, nor in a field that nobody asked for."""
    rollout = Rollout(
        RolloutRequest(0, Prompt(0, (1,)), 9), [1, 2, 3], 3, LENGTH, prefix=(7,) if guided else (), guided=guided
    )
    rows = 3 + guided
    for key in (
        key for key in OF_NEED[need] if key not in (Field.STUDENT_TOP_IDS, Field.TEACHER_TOP_IDS, Field.CHUNK_TOKENS)
    ):
        for at in range(rows):
            for bad in (torch.nan, -torch.inf):
                scores = (
                    torch.zeros(rows, 2)
                    if key in (Field.STUDENT_TOP, Field.TEACHER_TOP, Field.HIDDEN)
                    else torch.zeros(rows)
                )
                scores[at] = bad
                signal = {key: scores, Field.STUDENT_TOP_IDS: torch.zeros(rows, 2, dtype=torch.int32)}
                if guided:
                    signal[Field.GUIDED] = torch.tensor([True, False, False, False])
                batch, own = RolloutBatch([rollout], signal), not (guided and at == 0)
                assert has_nan(batch, {need}) == (bad != -torch.inf and own)
                assert not has_nan(batch, set(Need) - {need})
