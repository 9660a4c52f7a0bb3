"""Tiny real models, engines and requests for the rollout tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import Qwen3ForCausalLM
from zoo import random_model

from katds.core.collective import Collective, Solo
from katds.core.divergences import top_k_tail_reverse_kl
from katds.core.stop.base import StopRule
from katds.core.stop.kat import KatRule
from katds.core.stop.kat_settings import Source, Supervise
from katds.core.stop.simple import NeverRule
from katds.core.threshold import AdaptiveThreshold
from katds.core.types import Need, Prompt, Rollout, RolloutBatch, RolloutRequest
from katds.models.causal import FlatCausalLM
from katds.rollout.engine import RolloutEngine
from katds.rollout.sampling import Sampling
from katds.rollout.sizes import EngineSettings

VOCABULARY = 65
TOP_K = 6
SEED = 7
# Weights large enough for the context to matter: with the default of 0.02 the next token follows from the last one alone.
RANDOM = {"initializer_range": 0.2, "sharpness": 2.0}


@dataclass
class Models:
    """Student and teacher twice with the same weights: as katds calls them, and as transformers does."""

    student: FlatCausalLM
    teacher: FlatCausalLM
    plain_student: Qwen3ForCausalLM
    plain_teacher: Qwen3ForCausalLM


@cache
def models(dtype: torch.dtype = torch.float64, tied: bool = True, device: str = "cpu", head_dim: int = 8) -> Models:
    """Both vocabularies are padded beyond the tokenizer's, by different numbers of rows.

    transformers' eager attention takes its softmax in float32 whatever the model, so float64 is compared with `sdpa`.
    """
    common = {"head_dim": head_dim, **RANDOM}
    student = {"seed": 1, "tied": tied, "vocabulary": VOCABULARY + 7, **common}
    teacher = {"seed": 2, "hidden": 48, "tied": not tied, "vocabulary": VOCABULARY + 15, **common}
    flat, plain = (
        [
            random_model(attn_implementation=attention, **options).to(device, dtype).eval()
            for options in (student, teacher)
        ]
        for attention in ("katds", "eager" if dtype is torch.float32 else "sdpa")
    )
    return Models(FlatCausalLM(flat[0], VOCABULARY), FlatCausalLM(flat[1], VOCABULARY), *plain)


class Resident:
    """A student whose weights are always at hand."""

    def __init__(self, model: FlatCausalLM) -> None:
        self._model = model

    @contextmanager
    def decoding(self) -> Iterator[FlatCausalLM]:
        yield self._model


def engine(
    pair: Models,
    rule: StopRule | None = None,
    needs: frozenset[Need] = frozenset(),
    collective: Collective | None = None,
    teacher: Callable[..., Any] | None = None,
    retokenise: Callable[..., Any] | None = None,
    **settings: Any,
) -> RolloutEngine:
    """An engine with the pair's teacher, or with `teacher`; with `retokenise` it has a tokenizer of its own."""
    defaults = {
        "slots": 4, "chunk_tokens": 5, "eos_ids": (), "sampling": Sampling(), "top_k": TOP_K, "seed": SEED,
        "device": pair.student.head_parameters()[0].device,
    }  # fmt: skip
    return RolloutEngine(
        Resident(pair.student),
        [lambda: nullcontext(teacher or pair.teacher)],
        rule or NeverRule(),
        needs,
        collective or Solo(),
        EngineSettings(**{**defaults, **settings}),
        lambda name: nullcontext(),
        retokenise=retokenise,
    )


def prompts(lengths: Sequence[int], seed: int = 3) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(10 + i, tuple(ids)) for i, ids in enumerate(draw)]


def mixed_requests(first_id: int = 40, samples: int = 3, audit_every: int = 0) -> list[RolloutRequest]:
    """Prompts of 1 .. 11 tokens, `samples` times each, with different room for the response."""
    repeated = [prompt for prompt in prompts([4, 1, 11, 2, 7]) for _ in range(samples)]
    return [
        RolloutRequest(i, prompt, 11 + 5 * i % 14, audit=audit_every > 0 and i % audit_every == 0)
        for i, prompt in enumerate(repeated, first_id)
    ]


def kat(
    threshold: float | None, source: Source = "all", supervise: Supervise = "before", of_teacher: bool = False
) -> KatRule:
    """A warm rule for short rollouts; with None it measures and never fires. `of_teacher`: on the teacher's top K."""
    rule = KatRule(4, 2, 2, 3, AdaptiveThreshold(0.1, 4096, 4, 1), source, supervise, of_teacher)
    rule.load_state_dict({"steps": 9, "minima": [], "value": threshold})
    return rule


def firing_threshold(rollouts: Sequence[Rollout]) -> float:
    """A threshold under which some of these rollouts fall into a trap: in the widest gap among the middle window means,
    so that rounding moves no window across it."""
    means = sorted(sum(r.divergences[t - 4 : t]) / 4 for r in rollouts for t in range(4, len(r.divergences) + 1, 2))
    middle = means[len(means) * 2 // 5 : len(means) * 3 // 5]
    _, low, high = max((high - low, low, high) for low, high in itertools.pairwise(middle))
    return (low + high) / 2


def facts(batch: RolloutBatch) -> list[tuple[Any, ...]]:
    """All that must not depend on how the rollouts were written; divergences come extra, they are only as exact as float32."""
    return [(r.id, tuple(r.response_ids), r.kept, r.reason, r.cut, r.hole) for r in batch.rollouts]


@torch.no_grad()
def full_forward(model: Qwen3ForCausalLM, rollout: Rollout, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T, V] and hidden states [T, H] at the positions that predict the response, from one plain forward."""
    prompt = rollout.request.prompt.token_ids
    ids = torch.tensor([*prompt, *rollout.response_ids])[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
    logits = model.lm_head(hidden)[:, :VOCABULARY]
    return torch.log_softmax(logits / temperature, -1), hidden


def full_divergences(pair: Models, rollout: Rollout, temperature: float, of_teacher: bool = False) -> torch.Tensor:
    p, _ = full_forward(pair.plain_student, rollout, temperature)
    q, _ = full_forward(pair.plain_teacher, rollout, temperature)
    ids = (q if of_teacher else p).topk(TOP_K).indices
    return top_k_tail_reverse_kl(p.gather(-1, ids), q.gather(-1, ids))
