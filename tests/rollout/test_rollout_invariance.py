"""A rollout depends on its request, the seed and the models, and on nothing else: not on slots, chunks, ranks or worlds.

The models are float64: a matrix product of another batch shape rounds differently, and in float32 one token in some
hundred thousand has a random number within that rounding of a boundary and flips. In float64 the logits agree to 1e-13,
so their float32 values, and with them the tokens, agree but for one case in millions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from rollout_setup import VOCABULARY, Models, engine, facts, firing_threshold, kat, mixed_requests, models
from transformers import Qwen3ForCausalLM
from zoo import deepspeed_json

from katds.core.collective import Collective, Solo
from katds.core.stop.base import StopRule
from katds.core.stop.first_of import FirstOfRule
from katds.core.stop.repetition import RepetitionRule
from katds.core.stop.simple import NeverRule, PrefixRule, RandomRule
from katds.core.types import Need, Rollout, RolloutBatch, RolloutRequest
from katds.models.causal import FlatCausalLM
from katds.parallel.world import ProcessCollective, start_world
from katds.parallel.zero import load_frozen
from katds.rollout.sampling import Sampling

NEEDS = frozenset({Need.SAMPLED})
EOS = (5, 23, 40)
FILTERED = Sampling(temperature=1.2, top_k=20, top_p=0.9, min_p=0.02)
SHAPES = [(15, 1), (1, 3), (3, 16), (2, 64), (7, 4)]  # slots, chunk_tokens


def write(rule: StopRule | None, requests: list[RolloutRequest], **settings: Any) -> RolloutBatch:
    return engine(models(), rule, NEEDS, **{"eos_ids": EOS, **settings}).generate(requests, 1)


def trap_threshold(requests: list[RolloutRequest], of_teacher: bool = False, **settings: Any) -> float:
    return firing_threshold(write(kat(None, of_teacher=of_teacher), requests, **settings).rollouts)


def assert_same(batch: RolloutBatch, expected: RolloutBatch) -> None:
    assert facts(batch) == facts(expected)
    for rollout, other in zip(batch.rollouts, expected.rollouts, strict=True):
        assert rollout.divergences == pytest.approx(other.divergences, abs=1e-5)
    assert batch.signal["sampled"].tolist() == pytest.approx(expected.signal["sampled"].tolist(), abs=1e-9)


RULES: dict[str, Callable[[float], StopRule]] = {
    "kat": kat,
    "kat agreement": lambda threshold: kat(threshold, supervise="agreement"),
    "kat after": lambda threshold: kat(threshold, supervise="after"),
    "kat of teacher": lambda threshold: kat(threshold, of_teacher=True),
    "never": lambda _: NeverRule(),
    "prefix": lambda _: PrefixRule(7),
    "random": lambda _: RandomRule(5, 2, 18),
    "repetition": lambda _: RepetitionRule(3, 2, 2),
    "first_of": lambda threshold: FirstOfRule([RepetitionRule(3, 2, 4), kat(threshold), PrefixRule(10)]),
}


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [
        *((kind, Sampling()) for kind in RULES),
        *((kind, FILTERED) for kind in ("kat", "kat of teacher", "never", "first_of")),
    ],
)
def test_any_slots_and_chunks_give_the_same_rollouts(kind: str, sampling: Sampling) -> None:
    requests = mixed_requests(audit_every=4)
    threshold = trap_threshold(requests, of_teacher=kind == "kat of teacher", sampling=sampling)
    expected = write(RULES[kind](threshold), requests, slots=15, chunk_tokens=5, sampling=sampling)
    assert {r.reason for r in expected.rollouts} == {"eos", "length", *RULES[kind](threshold).reasons}
    assert any(r.hole for r in expected.rollouts) == (kind == "kat after")
    for slots, chunk in SHAPES:
        for overlap in (False, True):
            sizes = {"slots": slots, "chunk_tokens": chunk, "overlap": overlap}
            assert_same(write(RULES[kind](threshold), requests, sampling=sampling, **sizes), expected)


def test_the_order_of_requests_does_not_matter() -> None:
    requests = mixed_requests(audit_every=4)
    threshold = trap_threshold(requests)
    assert_same(write(kat(threshold), requests[::-1]), write(kat(threshold), requests))


def _variants(chunk: int) -> list[tuple[Rollout, Rollout, Rollout]]:
    """Each rollout terminated, audited, and under no rule."""
    requests = mixed_requests()
    threshold = trap_threshold(requests)
    audited = [replace(r, audit=True) for r in requests]
    runs = [(kat(threshold), requests), (kat(threshold), audited), (None, requests)]
    batches = [write(rule, some, chunk_tokens=chunk).rollouts for rule, some in runs]
    return list(zip(*batches, strict=True))


@pytest.mark.parametrize("chunk", [1, 16])
def test_audit_rollouts_run_on_and_keep_what_the_rule_would_have_kept(chunk: int) -> None:
    cuts = 0
    for terminated, audited, free in _variants(chunk):
        assert not audited.terminated
        assert (audited.response_ids, audited.reason) == (free.response_ids, free.reason)
        assert (audited.kept, audited.cut) == (terminated.kept, terminated.cut)
        if terminated.cut is None:
            assert facts(RolloutBatch([terminated], {})) == facts(RolloutBatch([free], {}))
            continue
        cuts += 1
        assert terminated.reason == "kat" and terminated.kept == terminated.cut.kept
        assert terminated.response_ids == free.response_ids[: terminated.cut.at]
        assert len(terminated.divergences) == terminated.cut.at > terminated.kept
    assert 3 <= cuts <= 12


@pytest.mark.parametrize("audit", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_a_natural_end_at_the_very_token_of_the_cut_is_a_natural_end(chunk: int, audit: bool) -> None:
    requests = mixed_requests()
    threshold = trap_threshold(requests, eos_ids=())
    cuts = [r for r in write(kat(threshold), requests, eos_ids=()).rollouts if r.cut is not None]
    assert len(cuts) >= 3
    for room, reason in ((0, "length"), (1, None)):
        short = [replace(r.request, max_new_tokens=r.cut.at + room, audit=audit) for r in cuts]
        for rollout, cut in zip(
            write(kat(threshold), short, chunk_tokens=chunk, eos_ids=()).rollouts, cuts, strict=True
        ):
            if reason is not None:  # nothing is left to be saved, and nothing is dropped
                assert (rollout.reason, rollout.cut, rollout.kept) == (reason, None, cut.cut.at)
            else:
                assert (rollout.cut, rollout.kept) == (cut.cut, cut.cut.kept)
    ends = [r for r in cuts if r.response_ids.index(r.response_ids[-1]) == r.cut.at - 1]
    assert ends
    for end in ends:
        again = replace(end.request, audit=audit)
        (rollout,) = write(kat(threshold), [again], chunk_tokens=chunk, eos_ids=(end.response_ids[-1],)).rollouts
        assert (rollout.reason, rollout.cut, rollout.kept) == ("eos", None, end.cut.at)


def _two_steps(pair: Models, collective: Collective) -> list[tuple[Any, ...]]:
    """Two training steps under each rule, the second of KAT's under the threshold that the first has made."""
    result = []
    for rule in (kat(None), RandomRule(5, 2, 18), NeverRule()):
        for step, first in enumerate((40, 55)):
            requests = mixed_requests(first, audit_every=4)
            size = collective.size
            shape = {"slots": 3, "chunk_tokens": 5 + size, "eos_ids": EOS, "sampling": FILTERED, "overlap": size == 4}
            writer = engine(pair, rule, NEEDS, collective, **shape)
            batch = writer.generate(requests, step)
            rule.finish_step(collective, first, len(requests))
            scores = iter(batch.signal["sampled"].tolist())
            rows = [
                (fact, r.divergences, list(islice(scores, r.kept)))
                for fact, r in zip(facts(batch), batch.rollouts, strict=True)
            ]
            result.append((rows, dict(rule.metrics()), writer.stats.rounds))
    return result


def _ranks_two_steps(pair: Models) -> list[tuple[Any, ...]]:
    return _two_steps(pair, ProcessCollective(torch.device("cpu")))


@pytest.mark.parametrize("size", [2, 4])
def test_any_world_size_gives_the_same_rollouts(size: int) -> None:
    pair = models()
    expected = _two_steps(pair, Solo())
    assert "kat" in {fact[3] for fact, _, _ in expected[1][0]}, "the second step has no rollout that KAT ends"
    for (rows, metrics, _), *ranks in zip(expected, *run_ranks(size, _ranks_two_steps, pair), strict=True):
        assert len({(tuple(rank[1].items()), rank[2]) for rank in ranks}) == 1, "ranks disagree on metrics or rounds"
        assert ranks[0][1] == pytest.approx(metrics, abs=1e-5)
        assert min(len(rank[0]) for rank in ranks) >= 1, "a rank wrote nothing"
        merged = sorted((row for rank in ranks for row in rank[0]), key=lambda row: row[0])
        assert [row[0] for row in merged] == [row[0] for row in rows]
        for (_, divergences, scores), (_, other_divergences, other_scores) in zip(merged, rows, strict=True):
            assert divergences == pytest.approx(other_divergences, abs=1e-5)
            assert scores == pytest.approx(other_scores, abs=1e-9)


def _sharded(root: Path, requests: list[RolloutRequest], counts: list[int], overlap: bool) -> list[tuple[Any, ...]]:
    world = start_world()
    teacher = load_frozen(root, deepspeed_json(), VOCABULARY)
    result = []
    for count in counts:
        writer = engine(models(torch.float32), kat(None), NEEDS, world.collective, teacher, overlap=overlap)
        batch = writer.generate(requests[:count], 3)
        result.append((facts(batch), [r.divergences for r in batch.rollouts], writer.stats.rounds))
    return result


@pytest.mark.parametrize("overlap", [False, True])
def test_idle_ranks_keep_a_sharded_teacher_company(zoo: Path, overlap: bool) -> None:
    """Fewer requests than ranks, and none at all: every forward of the ZeRO-3 teacher is a collective, so a rank that
    skips one hangs the others until the time limit."""
    requests, counts = mixed_requests(samples=1), [1, 0, 3]
    whole = FlatCausalLM(
        Qwen3ForCausalLM.from_pretrained(zoo / "teacher", attn_implementation="katds").eval(), VOCABULARY
    )
    ranks = run_ranks(2, _sharded, zoo / "teacher", requests, counts, overlap)
    for count, *results in zip(counts, *ranks, strict=True):
        alone = engine(models(torch.float32), kat(None), NEEDS, teacher=whole).generate(requests[:count], 3)
        assert sorted(fact for result in results for fact in result[0]) == facts(alone)
        divergences = {fact[0]: d for result in results for fact, d in zip(*result[:2], strict=True)}
        for rollout in alone.rollouts:
            assert divergences[rollout.id] == pytest.approx(rollout.divergences, abs=1e-4)
        assert len({result[2] for result in results}) == 1
    assert ranks[1][0][0] == [] and ranks[0][0][2] >= 2, "the second rank had something to write"
    assert ranks[0][1][2] == 0, "a step without requests has rounds"
