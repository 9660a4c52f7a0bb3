"""What a rollout may cost: no look at the device between tokens, one teacher forward a round, one prefill a prompt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from ranks import run_ranks
from rollout_setup import VOCABULARY, Models, Resident, engine, kat, mixed_requests, models, prompts
from zoo import random_model

from katds.core.collective import Solo
from katds.core.stop.simple import NeverRule
from katds.core.types import Field, Need, RolloutRequest, require
from katds.models.causal import FlatCausalLM
from katds.models.graph_step import GraphStep, StaticStep
from katds.models.slot_cache import SlotCache
from katds.models.step import PlainStep, Step
from katds.parallel.world import ProcessCollective
from katds.rollout import sampling as filters
from katds.rollout.decode import Decoder
from katds.rollout.engine import RolloutEngine
from katds.rollout.sampling import Sampling
from katds.rollout.sizes import EngineSettings
from katds.rollout.slots import Slots

SAMPLINGS = [Sampling(), Sampling(temperature=0.0), Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01)]
NEEDS = frozenset({Need.SAMPLED, Need.STUDENT_TOP_K})


class Counted:
    """A teacher that notes the tokens of each forward."""

    def __init__(self, model: FlatCausalLM) -> None:
        self._model = model
        self.forwards: list[int] = []

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.forwards.append(input_ids.numel())
        return self._model(input_ids, *args, **kwargs)


def prefill_and_decode(
    model: FlatCausalLM, way: Callable[..., Step], device: torch.device, sampling: Sampling, guard: Any
) -> torch.Tensor:
    slots, cache = Slots(6), SlotCache(6, 40, device)
    leaders = slots.admit([RolloutRequest(i, prompt, 9) for i, prompt in enumerate(prompts([3, 5, 3, 1]))])
    decoder = Decoder(model, way(model, cache), cache, sampling, 4, frozenset(), 0, 0)
    decoder.prefill(slots.seats, leaders)
    decoder.decode(slots.seats, 2)  # buffers, and the kernels' first-call work
    with guard:
        return decoder.decode(slots.seats, 7).tokens_SC


@torch.no_grad()
@pytest.mark.parametrize("way", [PlainStep, StaticStep])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_decoding_never_asks_the_host(
    sampling: Sampling, way: Callable[..., Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device tensors have no values, so that whatever wants to know one, by whatever name, raises."""
    # The filters that CUDA takes; those of the CPU may look.
    monkeypatch.setattr(filters, "_kept_by_candidates", lambda p, _, settings: filters._kept_by_edge(p, settings))
    monkeypatch.setattr(filters, "_edge_by_histogram", filters._edge_by_bisection)
    model = FlatCausalLM(random_model(1, attn_implementation="katds").eval().to("meta"), VOCABULARY)
    tokens = prefill_and_decode(model, way, torch.device("meta"), sampling, nullcontext())
    assert tokens.shape == (4, 7) and tokens.is_meta
    with pytest.raises(Exception, match="meta"):
        tokens.tolist()


class Sync:
    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("way", [PlainStep, GraphStep])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_decoding_on_cuda_never_waits_for_the_device(sampling: Sampling, way: Callable[..., Step]) -> None:
    model = random_model(1, head_dim=64, attn_implementation="katds").eval().to("cuda", torch.bfloat16)
    device = torch.device("cuda")
    assert prefill_and_decode(FlatCausalLM(model, VOCABULARY), way, device, sampling, Sync()).shape == (4, 7)


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_the_teacher_reads_every_token_once_in_one_forward_a_round(chunk: int) -> None:
    pair, requests = models(), mixed_requests()
    teacher, student_tokens = Counted(pair.teacher), []
    hook = pair.student.register_forward_pre_hook(lambda _, args: student_tokens.append(args[0].numel()))
    try:
        writer = engine(pair, kat(None), NEEDS, teacher=teacher, slots=len(requests), chunk_tokens=chunk)
        rollouts = writer.generate(requests, 0).rollouts
    finally:
        hook.remove()
    assert len(teacher.forwards) == writer.stats.rounds == -(-max(r.max_new_tokens for r in requests) // chunk)
    # Three samples a prompt, all admitted together: its tokens but the last, which is the first input, are read once.
    prompt_tokens = sum(len(prompt.token_ids) - 1 for prompt in {r.prompt for r in requests})
    assert sum(student_tokens) == sum(teacher.forwards) == prompt_tokens + writer.stats.decoded_tokens
    assert writer.stats.tokens == sum(len(r.response_ids) for r in rollouts)
    assert writer.stats.decoded_tokens == sum(-(-r.request.max_new_tokens // chunk) * chunk for r in rollouts)


def test_reading_beside_writing_costs_a_chunk_per_rollout() -> None:
    """One teacher forward a round still, which reads what was written in the round before; nothing is read twice."""
    pair, requests, chunk = models(), mixed_requests(), 5
    teacher = Counted(pair.teacher)
    writer = engine(pair, kat(None), NEEDS, teacher=teacher, slots=len(requests), chunk_tokens=chunk, overlap=True)
    rollouts = writer.generate(requests, 0).rollouts
    chunks = [-(-r.request.max_new_tokens // chunk) for r in rollouts]
    assert len(teacher.forwards) == writer.stats.rounds == max(chunks) + 1
    prompt_tokens = sum(len(prompt.token_ids) - 1 for prompt in {r.prompt for r in requests})
    assert sum(teacher.forwards) == prompt_tokens + sum(chunks) * chunk
    assert writer.stats.decoded_tokens == (sum(chunks) + len(rollouts)) * chunk


@pytest.mark.gpu
def test_the_teacher_reads_beside_the_student_on_cuda() -> None:
    """The same rollouts and scores as in turn, with a stream of its own, in every phase of an engine, in the same memory."""
    pair, requests = models(torch.float32, device="cuda", head_dim=64), mixed_requests(audit_every=4)
    batches, reserved = [], []
    for overlap in (False, True):
        writer = engine(pair, kat(None), NEEDS, slots=3, chunk_tokens=4, overlap=overlap)
        for _ in range(4):
            batch = writer.generate(requests, 0)
            reserved.append(torch.cuda.memory_reserved())
        batches.append(batch)
    assert reserved[-1] == reserved[-2], f"phases take more and more memory: {reserved}"
    in_turn, beside = ([r.response_ids for r in batch.rollouts] for batch in batches)
    assert in_turn == beside
    torch.testing.assert_close(batches[0].signal, batches[1].signal, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lengths", [[20, 4, 4, 4, 4, 4], [4, 4, 4, 4, 4, 20]])
def test_time_saved_by_short_rollouts_is_saved(lengths: list[int]) -> None:
    """A freed slot takes the next request in the next round; the long audit rollout begins first wherever it stands."""
    (prompt,) = prompts([3])
    writer = engine(models(), slots=2, chunk_tokens=4)
    writer.generate([RolloutRequest(i, prompt, n, audit=n == 20) for i, n in enumerate(lengths)], 0)
    assert writer.stats.rounds == 5 and writer.stats.decoded_tokens == sum(lengths)


def _counted(pair: Models, requests: list[RolloutRequest]) -> tuple[int, int, list[int], list[int]]:
    teacher = Counted(pair.teacher)
    writer = engine(pair, kat(None), NEEDS, ProcessCollective(torch.device("cpu")), teacher, slots=2)
    batch = writer.generate(requests, 0)
    return writer.stats.rounds, writer.stats.tokens, teacher.forwards, [r.id for r in batch.rollouts]


@pytest.mark.parametrize("count", [1, 3, 15])
def test_ranks_make_the_same_teacher_forwards_whatever_they_have_to_do(count: int) -> None:
    requests = mixed_requests()[:count]
    ranks = run_ranks(4, _counted, models(), requests)
    rounds = {rank[0] for rank in ranks}
    assert len(rounds) == 1 and {len(rank[2]) for rank in ranks} == rounds
    assert sorted(id_ for rank in ranks for id_ in rank[3]) == [r.id for r in requests]
    assert sum(rank[1] for rank in ranks) == sum(r.max_new_tokens for r in requests)
    for _, tokens, forwards, _ in ranks:
        assert tokens > 0 or forwards == [1] * len(forwards), "an idle rank feeds more than a dummy token"
    assert count > 4 or any(rank[1] == 0 for rank in ranks)


def test_no_requests_no_rounds() -> None:
    teacher = Counted(models().teacher)
    writer = engine(models(), kat(None), NEEDS, teacher=teacher)
    batch = writer.generate([], 0)
    assert (batch.rollouts, batch.signal, writer.stats.rounds, teacher.forwards) == ([], {}, 0, [])


def without_teacher(rule: Any, needs: frozenset[Need]) -> RolloutEngine:
    settings = EngineSettings(4, 5, (), Sampling(), 6, 7, torch.device("cpu"))
    student = Resident(models().student)
    return RolloutEngine(student, (), rule, needs, Solo(), settings, lambda name: nullcontext())


def test_an_engine_without_a_teacher_writes_the_same_but_promises_no_scores() -> None:
    requests = mixed_requests()
    alone = without_teacher(NeverRule(), frozenset()).generate(requests, 0)
    taught = engine(models(), None, NEEDS).generate(requests, 0)
    assert [r.response_ids for r in alone.rollouts] == [r.response_ids for r in taught.rollouts]
    assert alone.signal == {} and all(r.divergences == [] for r in alone.rollouts)
    for rule, needs in ((NeverRule(), NEEDS), (kat(None), frozenset())):
        with pytest.raises(ValueError, match="teacher"):
            without_teacher(rule, needs)


def test_a_missing_score_is_an_error() -> None:
    """Never a zero: zeros would look like a trap, and KAT would end every rollout."""
    with pytest.raises(ValueError, match="top_k is 0"):
        engine(models(), kat(None), top_k=0)
    signal = engine(models(), None, frozenset({Need.SAMPLED})).generate(mixed_requests(), 0).signal
    assert require(signal, Field.SAMPLED) is signal[Field.SAMPLED]
    with pytest.raises(KeyError, match=r"entropy.*sampled"):
        require(signal, Field.ENTROPY)
