"""The teacher reads along: chunks for many slots, scored as in a rollout."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from katds.bench.gpu.counts import forward_flops
from katds.bench.gpu.machine import TOP_K, Bench, Case, Shape, multiplied, teacher_shape
from katds.core.types import Need, Prompt, RolloutRequest
from katds.models.causal import FlatCausalLM
from katds.models.slot_cache import SlotCache
from katds.rollout.decode import Chunk
from katds.rollout.scorer import Compared, TeacherScorer
from katds.rollout.slots import Seat


def cases(bench: Bench) -> Iterator[Case]:
    name, shape = teacher_shape(bench)
    model = bench.model(shape)
    for chunk in (8,) if bench.toy else (32, 64, 128, 256):
        for slots in (2,) if bench.toy else (16, 64):
            yield f"{name}, {slots} slots x {chunk} tokens", partial(_score, bench, model, shape, slots, chunk)


def _score(bench: Bench, model: FlatCausalLM, shape: Shape, slots: int, chunk: int) -> dict[str, Any]:
    """`TeacherScorer.score`, as a round of the engine calls it: forward, head in tiles, divergence on the student's top K."""
    top_k = min(TOP_K, shape.vocabulary)
    cache = SlotCache(slots, bench.context + chunk + 1, bench.device)
    prompt = tuple(range(bench.context + 1))
    seats = [
        Seat(RolloutRequest(i, Prompt(i, tuple(t % shape.vocabulary for t in prompt)), chunk), 0, fresh=False)
        for i in range(slots)
    ]
    logprobs = torch.randn(slots, chunk, top_k, device=bench.device).log_softmax(-1)
    made = Chunk(
        bench.tokens(slots, chunk, below=shape.vocabulary), bench.tokens(slots, chunk, below=shape.vocabulary),
        bench.tokens(slots, chunk, top_k, below=shape.vocabulary), logprobs,
    )  # fmt: skip
    scorer = TeacherScorer(model, cache, frozenset({Need.SAMPLED, Need.STUDENT_TOP_K}), Compared(top_k), top_k, 1.0)
    tokens = slots * chunk
    memory = bench.whole_gib(lambda: scorer.score(seats, {}, made))
    timed = bench.timed(lambda: scorer.score(seats, {}, made), tokens, forward_flops(multiplied(model), tokens))
    return {**timed, "GiB": memory}
