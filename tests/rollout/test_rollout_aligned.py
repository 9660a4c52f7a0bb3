"""A teacher with another tokenizer reads along: its word on every chunk of text is that of one full forward over its own tokens, and no
rollout, cut or score depends on slots, chunks or ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from rollout_setup import RANDOM, Models, engine, facts, firing_threshold, kat, mixed_requests, models
from tokenizer_zoo import KINDS, tokenizer
from zoo import deepspeed_json, random_model
from zoo import tokenizer as words

from katds.core.alignment import Reading, TextChunk, chunk_divergence
from katds.core.collective import Collective, Solo
from katds.core.stop.base import StopRule
from katds.core.stop.simple import NeverRule, PrefixRule
from katds.core.types import EOS, LENGTH, Field, Need, Prompt, Rollout, RolloutBatch, RolloutRequest
from katds.data.retokenize import Bridge
from katds.models.causal import FlatCausalLM
from katds.models.slot_cache import SlotCache
from katds.parallel.world import ProcessCollective, start_world
from katds.parallel.zero import load_frozen
from katds.rollout.aligned_scorer import LEAST_GROWTH
from katds.rollout.sampling import Sampling

NEEDS = frozenset({Need.CHUNKS, Need.WRITTEN})
WARM = Sampling(temperature=0.8)
TEXTS = ("3 * 4 < 2 :", "漢字 🙂", "a", "17 * 33 < 3 : é e\u0301", "naïve")
SHAPES = [(15, 1), (1, 3), (3, 16), (2, 64), (7, 4)]  # slots, chunk_tokens


@cache
def pair(student: str, teacher: str, dtype: torch.dtype = torch.float64) -> Models:
    """Random models over both tokenizers, padded by different numbers of rows; float64 is compared with `sdpa`, see rollout_setup."""
    sizes = len(tokenizer(student)), len(tokenizer(teacher))
    options = (
        {"seed": 1, "vocabulary": sizes[0] + 7, **RANDOM},
        {"seed": 2, "hidden": 48, "vocabulary": sizes[1] + 3, **RANDOM},
    )
    flat, plain = (
        [random_model(attn_implementation=attention, **each).to(dtype).eval() for each in options]
        for attention in ("katds", "eager" if dtype is torch.float32 else "sdpa")
    )
    return Models(FlatCausalLM(flat[0], sizes[0]), FlatCausalLM(flat[1], sizes[1]), *plain)


def bridge(student: str, teacher: str, context: int = 512) -> Bridge:
    one, two = tokenizer(student), tokenizer(teacher)
    return Bridge.of(one, two, (two.eos_token_id,), context, len(two))


def ends(student: str) -> tuple[int, ...]:
    """The end token and some more, so that random rollouts end."""
    return (*range(5, 250, 30), tokenizer(student).eos_token_id)


def requests_of(student: str, teacher: str, samples: int = 3, audit_every: int = 0) -> list[RolloutRequest]:
    made = []
    for i, text in enumerate(TEXTS):
        own, other = (tuple(tokenizer(kind).encode(text, add_special_tokens=False)) for kind in (student, teacher))
        made += [Prompt(10 + i, own, teacher_ids=other)] * samples
    return [
        RolloutRequest(i, prompt, 11 + 7 * i % 23, audit=audit_every > 0 and i % audit_every == 0)
        for i, prompt in enumerate(made, 40)
    ]


def write(
    student: str, teacher: str, requests: list[RolloutRequest], rule: StopRule | None = None, context: int = 512,
    dtype: torch.dtype = torch.float64, **settings: Any,
) -> RolloutBatch:  # fmt: skip
    given = {
        "eos_ids": ends(student),
        "sampling": WARM,
        "retokenise": bridge(student, teacher, context).begin,
        **settings,
    }
    return engine(pair(student, teacher, dtype), rule, NEEDS, **given).generate(requests, 1)


def rows_of(batch: RolloutBatch) -> list[tuple[Rollout, dict[Field, torch.Tensor]]]:
    counts = [r.kept for r in batch.rollouts]
    assert all(len(rows) == sum(counts) for rows in batch.signal.values())
    parts = {key: rows.split(counts) for key, rows in batch.signal.items()}
    return [(r, {key: split[i] for key, split in parts.items()}) for i, r in enumerate(batch.rollouts)]


@torch.no_grad()
def logprobs(model: Any, vocabulary: int, prompt: tuple[int, ...], response: list[int]) -> torch.Tensor:
    """Of each response token, from one plain forward."""
    ids = torch.tensor([*prompt, *response])[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1, :vocabulary]
    return torch.log_softmax(logits / WARM.temperature, -1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def read_at_once(of: Bridge, rollout: Rollout) -> Reading:
    text, ended = of.begin(rollout.request.prompt), rollout.reason == EOS
    first = text.read(rollout.response_ids[: len(rollout.response_ids) - ended])
    last = text.finish(ended)
    return Reading(first.teacher_ids + last.teacher_ids, first.chunks + last.chunks, last.full)


PAIRS = [
    ("byte_level", "small_byte_level"),
    ("small_byte_level", "byte_fallback"),
    ("byte_fallback", "unigram"),
    ("byte_level", "lower_case"),
]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-4)])
def test_scores_are_those_of_full_forwards(student: str, teacher: str, dtype: torch.dtype, tolerance: float) -> None:
    """Also where the teacher needs more tokens than the student, and its cache has to grow; float32 in C code. The student's
    log-probabilities are float32 whatever the model, and a chunk's are sums of them."""
    both, of = pair(student, teacher, dtype), bridge(student, teacher)
    batch = write(student, teacher, requests_of(student, teacher), kat(None), dtype=dtype, slots=4, chunk_tokens=5)
    assert {r.reason for r in batch.rollouts} == {EOS, LENGTH}
    taught, longer = 0, 0
    for rollout, signal in rows_of(batch):
        reading = read_at_once(of, rollout)
        prompt = rollout.request.prompt
        p = logprobs(both.plain_student, len(tokenizer(student)), prompt.token_ids, rollout.response_ids)
        q = logprobs(both.plain_teacher, len(tokenizer(teacher)), prompt.teacher_ids, reading.teacher_ids)
        teacher_T, student_T, sizes, divergences = [], [], [], []
        i = j = 0
        for chunk in reading.chunks:
            wrote, said = float(p[i : i + chunk.student].sum()), float(q[j : j + chunk.teacher].sum())
            i, j = i + chunk.student, j + chunk.teacher
            teacher_T += [said] * chunk.student
            student_T += [wrote] * chunk.student
            sizes += [chunk.student * (chunk.same and max(chunk[:2]) <= 6)] * chunk.student
            if chunk.student:
                unknown = 10.0 - 1.0 + math.exp(-10.0)
                known = chunk_divergence(said, wrote) / chunk.student if chunk.same and chunk.teacher else unknown
                divergences += [known] * chunk.student
        assert signal[Field.CHUNK_TOKENS].tolist() == sizes
        for key, expected in ((Field.CHUNK_TEACHER, teacher_T), (Field.CHUNK_STUDENT, student_T), (Field.WRITTEN, p)):
            torch.testing.assert_close(
                signal[key].double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance
            )
        found = torch.tensor(rollout.divergences, dtype=torch.float64)
        torch.testing.assert_close(found, torch.tensor(divergences, dtype=torch.float64), rtol=1e-3, atol=1e-3)
        taught += sum(size > 0 for size in sizes)
        longer += len(reading.teacher_ids) > rollout.request.max_new_tokens + 1
    assert taught > 30
    assert longer > 2 or teacher != "small_byte_level", "the cache did not have to grow"


def assert_same(batch: RolloutBatch, expected: RolloutBatch) -> None:
    assert facts(batch) == facts(expected)
    for rollout, other in zip(batch.rollouts, expected.rollouts, strict=True):
        assert rollout.divergences == pytest.approx(other.divergences, rel=1e-5, abs=1e-5)
    assert batch.signal.keys() == expected.signal.keys()
    for key, values in batch.signal.items():
        torch.testing.assert_close(values, expected.signal[key], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [(*PAIRS[0], "kat"), (*PAIRS[0], "kat after"), (*PAIRS[0], "prefix"), (*PAIRS[1], "kat"), (*PAIRS[2], "never")],
)
def test_any_slots_and_chunks_give_the_same_rollouts(student: str, teacher: str, kind: str) -> None:
    requests = requests_of(student, teacher, audit_every=4)
    threshold = firing_threshold(write(student, teacher, requests, kat(None)).rollouts)
    rule = {
        "kat": lambda: kat(threshold), "kat after": lambda: kat(threshold, supervise="after"), "never": NeverRule,
        "prefix": lambda: PrefixRule(7),
    }[kind]  # fmt: skip
    expected = write(student, teacher, requests, rule(), slots=15, chunk_tokens=5)
    assert {r.reason for r in expected.rollouts} >= {EOS, *rule().reasons}
    assert any(r.hole for r in expected.rollouts) == (kind == "kat after")
    for slots, chunk in SHAPES:
        assert_same(write(student, teacher, requests, rule(), slots=slots, chunk_tokens=chunk), expected)


def test_a_full_context_ends_the_rollout_at_the_same_token_in_any_chunks() -> None:
    student, teacher = PAIRS[0]
    requests = requests_of(student, teacher)
    context = max(len(r.prompt.teacher_ids) for r in requests) + 14
    free = {r.id: r for r in write(student, teacher, requests).rollouts}
    batches = [
        write(student, teacher, requests, context=context, slots=slots, chunk_tokens=chunk) for slots, chunk in SHAPES
    ]
    short = [r for r in batches[0].rollouts if len(r.response_ids) < len(free[r.id].response_ids)]
    assert len(short) > 3 and all(r.reason == LENGTH for r in short)
    for rollout in batches[0].rollouts:
        assert rollout.response_ids == free[rollout.id].response_ids[: len(rollout.response_ids)]
    for batch in batches[1:]:
        assert_same(batch, batches[0])


def test_the_end_is_as_likely_as_all_end_tokens_of_the_teacher_together() -> None:
    """As of models that end a turn with another token than a text. Tokens before the end keep their own likelihood."""
    student, teacher = PAIRS[0]
    both, requests = pair(student, teacher), requests_of(student, teacher, samples=6)
    end_ids = (tokenizer(teacher).eos_token_id, 9, 40)
    batch = write(student, teacher, requests, retokenise=replace(bridge(student, teacher), end_ids=end_ids).begin)
    plain = write(student, teacher, requests)
    ended = 0
    for (rollout, signal), (_, single) in zip(rows_of(batch), rows_of(plain), strict=True):
        before = len(rollout.response_ids) - (rollout.reason == EOS)
        said, alone = signal[Field.CHUNK_TEACHER], single[Field.CHUNK_TEACHER]
        torch.testing.assert_close(said[:before], alone[:before], rtol=1e-5, atol=1e-5)
        if rollout.reason == EOS:
            text = read_at_once(bridge(student, teacher), rollout).teacher_ids[:-1]
            every = [
                logprobs(both.plain_teacher, len(tokenizer(teacher)), rollout.request.prompt.teacher_ids, [*text, end])[
                    -1
                ]
                for end in end_ids
            ]
            torch.testing.assert_close(said[-1].double(), torch.stack(every).exp().sum().log(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(alone[-1].double(), every[0], rtol=1e-5, atol=1e-5)
            ended += 1
    assert ended > 3


def test_the_cache_grows_by_little_and_no_further_than_the_teacher_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = PAIRS[0]
    lengths: list[tuple[int, int]] = []
    grow = SlotCache.grow

    def watched(cache: SlotCache, length: int) -> None:
        lengths.append((cache.length, length))
        grow(cache, length)

    monkeypatch.setattr(SlotCache, "grow", watched)
    requests = [replace(request, max_new_tokens=60) for request in requests_of(student, teacher)]
    for context in (512, max(len(r.prompt.teacher_ids) for r in requests) + 60 + 12):
        lengths.clear()
        write(student, teacher, requests, context=context, eos_ids=(tokenizer(student).eos_token_id,))
        assert lengths, "the cache did not have to grow"
        assert all(length <= min(context + 1, before + 2 * LEAST_GROWTH) for before, length in lengths)


class _Wordless:
    """Reads for a teacher that has no token for any of the text."""

    context = 512

    def read(self, tokens: Sequence[int]) -> Reading:
        return Reading([], [TextChunk(1, 0, False)] * len(tokens))

    def finish(self, ended: bool) -> Reading:
        return Reading([7], [TextChunk(1, 1, True)]) if ended else Reading([], [])


def test_text_that_the_teacher_has_no_word_for_is_no_agreement() -> None:
    """A rule that ends rollouts where both agree lets it pass, and its smallest window is no low one."""
    student, teacher = PAIRS[0]
    requests = requests_of(student, teacher)
    rule = kat(8.9)
    batch = write(student, teacher, requests, rule, retokenise=lambda _: _Wordless())
    assert {r.reason for r in batch.rollouts} == {EOS, LENGTH}
    assert all(d > 8.9 for r in batch.rollouts for d in r.divergences[: len(r.response_ids) - (r.reason == EOS)])
    assert max(len(r.response_ids) for r in batch.rollouts) > 20, "no rollout is as long as the rule's windows"


def test_with_equal_tokenizers_it_says_what_the_token_scorer_says() -> None:
    """Chunks of one token each, whose log-likelihoods are those of the tokens."""
    tokens = words()
    of = Bridge.of(tokens, tokens, (tokens.eos_token_id,), 512, len(tokens))
    requests = [replace(r, prompt=replace(r.prompt, teacher_ids=r.prompt.token_ids)) for r in mixed_requests()]
    given = {"sampling": WARM, "eos_ids": (tokens.eos_token_id,)}
    plain = engine(models(), None, frozenset({Need.SAMPLED, Need.WRITTEN}), **given).generate(requests, 1)
    batch = engine(models(), None, NEEDS, retokenise=of.begin, **given).generate(requests, 1)
    assert facts(batch) == facts(plain) and {r.reason for r in batch.rollouts} == {EOS, LENGTH}
    assert batch.signal[Field.CHUNK_TOKENS].unique().tolist() == [1]
    for key, other in (
        (Field.CHUNK_TEACHER, Field.SAMPLED), (Field.CHUNK_STUDENT, Field.WRITTEN), (Field.WRITTEN, Field.WRITTEN),
    ):  # fmt: skip
        torch.testing.assert_close(batch.signal[key].double(), plain.signal[other].double(), rtol=0, atol=1e-6)


def _steps(both: Models, student: str, teacher: str, collective: Collective) -> list[Any]:
    """Two steps, the second under the threshold that the first has made."""
    rule, result = kat(None), []
    for step in range(2):
        requests = [replace(r, id=r.id + 100 * step) for r in requests_of(student, teacher, audit_every=4)]
        shape = {"slots": 3, "chunk_tokens": 5 + collective.size, "eos_ids": ends(student), "sampling": WARM}
        writer = engine(both, rule, NEEDS, collective, retokenise=bridge(student, teacher).begin, **shape)
        batch = writer.generate(requests, step)
        rule.finish_step(collective, requests[0].id, len(requests))
        rows = [
            (fact, r.divergences, {key: value.tolist() for key, value in signal.items()})
            for fact, (r, signal) in zip(facts(batch), rows_of(batch), strict=True)
        ]
        result.append((rows, dict(rule.metrics()), writer.stats.rounds))
    return result


def _on_rank(both: Models, student: str, teacher: str) -> list[Any]:
    return _steps(both, student, teacher, ProcessCollective(torch.device("cpu")))


@pytest.mark.parametrize("size", [2, 4])
def test_any_world_size_gives_the_same_rollouts(size: int) -> None:
    student, teacher = PAIRS[0]
    expected = _steps(pair(student, teacher), student, teacher, Solo())
    assert "kat" in {fact[3] for fact, _, _ in expected[1][0]}, "the second step has no rollout that KAT ends"
    everyone = run_ranks(size, _on_rank, pair(student, teacher), student, teacher)
    for (rows, metrics, _), *ranks in zip(expected, *everyone, strict=True):
        assert len({(tuple(rank[1].items()), rank[2]) for rank in ranks}) == 1, "ranks disagree on metrics or rounds"
        assert ranks[0][1] == pytest.approx(metrics, rel=1e-5)
        merged = sorted(itertools.chain.from_iterable(rank[0] for rank in ranks), key=lambda row: row[0])
        assert [row[0] for row in merged] == [row[0] for row in rows]
        for (_, divergences, fields), (_, other, others) in zip(merged, rows, strict=True):
            assert divergences == pytest.approx(other, rel=1e-5, abs=1e-5)
            for key, values in fields.items():
                assert values == pytest.approx(others[key], rel=1e-5, abs=1e-5)


def _sharded(folder: Path, student: str, teacher: str) -> list[Any]:
    """With a ZeRO-3 teacher: many rollouts, and one only, so that a rank has nothing to read."""
    world = start_world()
    model = load_frozen(folder, deepspeed_json(), len(tokenizer(teacher)))
    written = []
    for requests in (requests_of(student, teacher), requests_of(student, teacher)[:1]):
        both = pair(student, teacher, torch.float32)
        with model.reading() as reader:
            writer = engine(
                both, None, NEEDS, world.collective, reader, bridge(student, teacher).begin, slots=2, chunk_tokens=4,
                eos_ids=ends(student), sampling=WARM,
            )  # fmt: skip
            batch = writer.generate(requests, 1)
        written.append([(r.id, r.response_ids, s[Field.CHUNK_TEACHER].tolist()) for r, s in rows_of(batch)])
    return written


def test_a_sharded_teacher_is_asked_by_all_ranks_together(tmp_path: Path) -> None:
    student, teacher = PAIRS[0]
    random_model(seed=2, hidden=48, vocabulary=len(tokenizer(teacher)) + 3, **RANDOM).save_pretrained(tmp_path)
    alone = run_ranks(1, _sharded, tmp_path, student, teacher)[0]
    both = run_ranks(2, _sharded, tmp_path, student, teacher)
    for case, expected in enumerate(alone):
        seen = sorted(itertools.chain.from_iterable(rank[case] for rank in both))
        assert [entry[:2] for entry in seen] == [entry[:2] for entry in expected]
        for (*_, mine), (*_, right) in zip(seen, expected, strict=True):
            assert mine == pytest.approx(right, rel=1e-4, abs=1e-3)


def test_what_does_not_fit_a_teacher_with_another_tokenizer_is_said() -> None:
    both, of = pair(*PAIRS[0]), bridge(*PAIRS[0])
    with pytest.raises(ValueError, match="chunks of text need a teacher with another tokenizer"):
        engine(both, None, NEEDS)
    with pytest.raises(ValueError, match="chunks of text need a teacher with another tokenizer"):
        engine(both, None, frozenset({Need.SAMPLED}), retokenise=of.begin)
    with pytest.raises(ValueError, match="cannot tell sampled: these are of tokens"):
        engine(both, None, NEEDS | {Need.SAMPLED}, retokenise=of.begin).generate(requests_of(*PAIRS[0]), 1)


def test_the_zoo_has_all_kinds() -> None:
    assert {kind for some in PAIRS for kind in some} < set(KINDS)
