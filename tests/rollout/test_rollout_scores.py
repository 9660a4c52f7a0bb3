"""The teacher's streamed word on a rollout is that of one full forward over the finished text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rollout_setup import (
    TOP_K,
    VOCABULARY,
    Models,
    engine,
    firing_threshold,
    full_divergences,
    full_forward,
    kat,
    mixed_requests,
    models,
)

from katds.core import counter
from katds.core.divergences import entropy, reverse_kl
from katds.core.types import Field, Need, Rollout, RolloutBatch
from katds.rollout.sampling import Sampling, sample_step

ALL = frozenset(Need) - {Need.CHUNKS}  # of a teacher with the same tokenizer
NEITHER = frozenset({Need.SAMPLED})  # of the two top K
WARM = Sampling(temperature=0.8)
PRECISIONS = [(torch.float32, 1e-4), (torch.float64, 1e-9)]


def batch_with_traps(pair: Models, **settings: object) -> RolloutBatch:
    """Shared prompts (one of a single token) in few slots: followers, refills and moves; some rollouts cut, some audited."""
    requests = mixed_requests(audit_every=4)
    measured = engine(pair, kat(None), sampling=WARM).generate(requests, 2).rollouts
    rule = kat(firing_threshold(measured))
    batch = engine(pair, rule, ALL, sampling=WARM, eos_ids=(5, 23), **settings).generate(requests, 2)
    assert {r.reason for r in batch.rollouts} == {"kat", "length", "eos"}
    return batch


def rows_of(batch: RolloutBatch) -> list[tuple[Rollout, dict[Field, torch.Tensor]]]:
    """Each rollout with its part of the signal."""
    counts = [r.kept for r in batch.rollouts]
    assert all(rows.shape[0] == sum(counts) for rows in batch.signal.values())
    parts = {key: rows.split(counts) for key, rows in batch.signal.items()}
    return [(r, {key: split[i] for key, split in parts.items()}) for i, r in enumerate(batch.rollouts)]


@pytest.mark.parametrize(("slots", "chunk"), [(4, 5), (15, 3), (2, 16)])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_streamed_scores_equal_one_full_forward(dtype: torch.dtype, tolerance: float, slots: int, chunk: int) -> None:
    pair = models(dtype)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=tolerance)  # noqa: E731
    for rollout, signal in rows_of(batch_with_traps(pair, slots=slots, chunk_tokens=chunk)):
        kept = rollout.kept
        q, hidden = (rows[:kept] for rows in full_forward(pair.plain_teacher, rollout, WARM.temperature))
        p = full_forward(pair.plain_student, rollout, WARM.temperature)[0][:kept]
        written = torch.tensor(rollout.response_ids)[:kept, None]
        student_ids, teacher_ids = signal[Field.STUDENT_TOP_IDS].long(), signal[Field.TEACHER_TOP_IDS].long()
        close(signal[Field.SAMPLED], q.gather(-1, written).squeeze(-1))
        close(signal[Field.ENTROPY], entropy(q))
        close(signal[Field.HIDDEN], hidden)
        close(signal[Field.STUDENT_TOP], q.gather(-1, student_ids))
        close(p.gather(-1, student_ids).sort(-1, descending=True).values, p.topk(TOP_K).values)
        close(signal[Field.TEACHER_TOP], q.topk(TOP_K).values)
        close(signal[Field.TEACHER_TOP], q.gather(-1, teacher_ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streamed_divergences_equal_one_full_forward(dtype: torch.dtype) -> None:
    """Also beyond the cut. The student's log-probabilities are float32 whatever the model, so 1e-4 is what one can ask."""
    pair = models(dtype)
    for rollout in batch_with_traps(pair).rollouts:
        expected = full_divergences(pair, rollout, WARM.temperature)
        torch.testing.assert_close(torch.tensor(rollout.divergences, dtype=dtype), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergences_on_the_teacher_s_top_k_equal_one_full_forward(dtype: torch.dtype, fast: bool) -> None:
    """Whatever the objective asks of the teacher's top K, it gets its own K of them, and no field more than before."""
    pair, more, rule = models(dtype), {"fast_decode": fast, "sampling": WARM}, kat(None, of_teacher=True)
    plain = engine(pair, kat(None), NEITHER, sampling=WARM).generate(mixed_requests(), 2)
    far = 0.0
    for needs, top_k in ((NEITHER, None), (NEITHER | {Need.TEACHER_TOP_K}, 3), (ALL, TOP_K + 4)):
        batch = engine(pair, rule, needs, teacher_top_k=top_k, **more).generate(mixed_requests(), 2)
        assert ([r.response_ids for r in batch.rollouts]) == [r.response_ids for r in plain.rollouts]
        for rollout in batch.rollouts:
            expected = full_divergences(pair, rollout, WARM.temperature, of_teacher=True)
            torch.testing.assert_close(torch.tensor(rollout.divergences, dtype=dtype), expected, rtol=0, atol=1e-4)
            far = max(far, float((expected - full_divergences(pair, rollout, WARM.temperature)).abs().max()))
        fields = engine(pair, None, needs, teacher_top_k=top_k, sampling=WARM).generate(mixed_requests(), 2).signal
        assert {key: rows.shape for key, rows in batch.signal.items()} == {k: v.shape for k, v in fields.items()}
        if top_k is not None:
            assert batch.signal[Field.TEACHER_TOP].shape[1] == top_k
            torch.testing.assert_close(batch.signal[Field.TEACHER_TOP], fields[Field.TEACHER_TOP], rtol=0, atol=1e-4)
    assert far > 0.01, "whose top K it is makes no difference here: the test is idle"


def test_more_top_tokens_than_there_are_words_give_the_full_divergence() -> None:
    pair = models()
    for rollout in engine(pair, kat(None), top_k=VOCABULARY + 3, sampling=WARM).generate(mixed_requests(), 0).rollouts:
        p, q = (full_forward(plain, rollout, 0.8)[0] for plain in (pair.plain_student, pair.plain_teacher))
        expected = reverse_kl(p, q)
        torch.testing.assert_close(torch.tensor(rollout.divergences).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampling", [WARM, Sampling(temperature=1.3, top_k=9, top_p=0.8, min_p=0.05)])
def test_every_token_is_drawn_from_the_full_forward(sampling: Sampling) -> None:
    """The student's cache as such, and the names of the random numbers: seed, stream, rollout id, position."""
    pair, stream = models(), 6
    for rollout in engine(pair, sampling=sampling, seed=11).generate(mixed_requests(), stream).rollouts:
        p, _ = full_forward(pair.plain_student, rollout, sampling.temperature)
        keys = torch.full((len(p),), counter.key(11, stream, rollout.id))
        u, as_it_is = counter.uniforms(keys, torch.arange(len(p))), replace(sampling, temperature=1.0)
        assert rollout.response_ids == sample_step(p.float(), u, as_it_is, 0).tokens_S.tolist()


@pytest.mark.parametrize(
    ("need", "fields"),
    [
        (Need.SAMPLED, {Field.SAMPLED}),
        (Need.STUDENT_TOP_K, {Field.STUDENT_TOP, Field.STUDENT_TOP_IDS}),
        (Need.TEACHER_TOP_K, {Field.TEACHER_TOP, Field.TEACHER_TOP_IDS}),
        (Need.ENTROPY, {Field.ENTROPY}),
        (Need.FULL, {Field.HIDDEN}),
    ],
)
def test_a_need_brings_its_fields_and_no_others(need: Need, fields: set[Field]) -> None:
    """With and without a stop rule that measures for itself."""
    pair, requests = models(), mixed_requests(samples=1)
    everything = engine(pair, None, ALL).generate(requests, 0).signal
    for rule in (None, kat(None)):
        signal = engine(pair, rule, frozenset({need})).generate(requests, 0).signal
        assert set(signal) == fields
        for field in fields - {Field.STUDENT_TOP, Field.STUDENT_TOP_IDS}:
            torch.testing.assert_close(signal[field], everything[field], rtol=0, atol=1e-9)
    assert all(rows.dtype is torch.int32 for field, rows in everything.items() if field.endswith("ids"))


def test_without_needs_there_is_no_signal_but_a_rule_still_measures() -> None:
    batch = engine(models(), kat(None)).generate(mixed_requests(samples=1), 0)
    assert batch.signal == {} and all(len(r.divergences) == len(r.response_ids) for r in batch.rollouts)
    batch = engine(models(), kat(None), keep_divergences=False).generate(mixed_requests(samples=1), 0)
    assert all(r.divergences == [] for r in batch.rollouts)
