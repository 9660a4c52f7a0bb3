"""Models with one learned row per position write and read up to the last row, though slots overshoot their end by up to two chunks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from rollout_setup import VOCABULARY, Models, engine, facts, kat, prompts
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3ForCausalLM
from zoo import random_model

from katds.core.types import LENGTH, Need, RolloutBatch, RolloutRequest
from katds.models.causal import FlatCausalLM, linear
from katds.models.graph_step import GraphStep, StaticStep
from katds.models.plans import PackedPlan
from katds.models.slot_cache import SlotCache, ragged_plan
from katds.models.step import PlainStep, Step, StepMaker

NEEDS = frozenset({Need.SAMPLED})
NEW, CHUNK = 10, 4  # the last chunk overshoots by two tokens, and the one in flight by four more
CPU = torch.device("cpu")
REQUESTS = [
    RolloutRequest(i, prompt, new) for i, (prompt, new) in enumerate(zip(prompts([9, 2, 9, 5]), (10, 7, 9, 10), strict=True))
]  # fmt: skip
CONTEXT = 9 + NEW


def gpt2(seed: int, positions: int, wide: int) -> GPT2LMHeadModel:
    """With the first `positions` rows of a position table of `wide` rows."""
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(n_positions=wide, attn_implementation="katds", **shape)).double().eval()
    model.config.n_positions = positions
    table = model.transformer.wpe
    table.weight, table.num_embeddings = torch.nn.Parameter(table.weight[:positions].detach().clone()), positions
    return model


@cache
def pair(positions: int, device: str) -> Models:
    student, teacher = (FlatCausalLM(gpt2(seed, positions, 64).to(device), VOCABULARY) for seed in (1, 2))
    return Models(student, teacher, student.model, teacher.model)


def write(positions: int, device: str = "cpu", **settings: Any) -> RolloutBatch:
    return engine(pair(positions, device), kat(None), NEEDS, **settings).generate(REQUESTS, 0)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("slots", [2, 4])
@pytest.mark.parametrize(("way", "device"), [
    (PlainStep, "cpu"), (StaticStep, "cpu"), pytest.param(GraphStep, "cuda", marks=pytest.mark.gpu),
])  # fmt: skip
def test_rollouts_fill_the_whole_context(
    way: Callable[..., Step], device: str, slots: int, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of a table whose end nobody reaches."""
    expected = write(64, chunk_tokens=1)
    assert max(len(r.request.prompt.token_ids) + len(r.response_ids) for r in expected.rollouts) == CONTEXT
    monkeypatch.setattr(StepMaker, "_step", lambda self, model, cache: way(model, cache))
    batch = write(CONTEXT, device, slots=slots, chunk_tokens=CHUNK, overlap=overlap)
    assert {rollout.reason for rollout in batch.rollouts} == {LENGTH}
    assert facts(batch) == facts(expected)
    for rollout, other in zip(batch.rollouts, expected.rollouts, strict=True):
        assert rollout.divergences == pytest.approx(other.divergences, abs=1e-5)
    assert batch.signal["sampled"].tolist() == pytest.approx(expected.signal["sampled"].tolist(), abs=1e-8)


def rotary() -> Qwen3ForCausalLM:
    """Reads further than its max_position_embeddings say, as YaRN checkpoints do that keep the length before scaling."""
    model = random_model(1, attn_implementation="katds").double().eval()
    model.config.max_position_embeddings = CONTEXT // 2
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", [lambda: gpt2(1, CONTEXT, CONTEXT), rotary])
def test_every_position_of_the_context_is_its_own(family: Callable[[], Any]) -> None:
    student, tokens = FlatCausalLM(family(), VOCABULARY), torch.arange(CONTEXT)
    read = SlotCache(1, CONTEXT, CPU)
    plan, positions = ragged_plan(read, 0, [0], [CONTEXT], 1)
    expected = student(tokens, tokens, PackedPlan.of([CONTEXT], CPU), linear)
    torch.testing.assert_close(student(tokens, positions, plan, linear, cache=read), expected, rtol=0, atol=1e-9)


def test_training_beyond_the_table_is_an_error() -> None:
    """What is learned has no overshoot, so a position without a row must not pass for the last one."""
    tokens = torch.arange(CONTEXT + 1)
    with pytest.raises(IndexError, match="range"):
        pair(CONTEXT, "cpu").student(tokens, tokens, PackedPlan.of([CONTEXT + 1], CPU), None)
