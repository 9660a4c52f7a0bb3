"""The student writes: prefill of new slots, then C tokens for all live slots without a look at the host.

Nothing in here communicates. End tokens and lengths are judged by the engine after the chunk, so a slot may write a few
tokens too many; they are never seen again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from katds.core.behaviours.base import Mix
from katds.core.counter import key, uniforms
from katds.core.types import Need
from katds.models.causal import Forward
from katds.models.plans import upload
from katds.models.slot_cache import SlotCache
from katds.models.step import Step
from katds.rollout.prefill import prefill
from katds.rollout.sampling import Sampling, sample_step
from katds.rollout.slots import Seat


@dataclass(slots=True)
class Chunk:
    """C decoded tokens of n slots."""

    inputs_SC: torch.Tensor  # int64, what the model read: the pending token, then all sampled ones but the last
    tokens_SC: torch.Tensor  # int64, what it wrote
    top_ids_SCK: torch.Tensor | None  # int64, the student's K most probable tokens
    top_logprobs_SCK: torch.Tensor | None  # float32
    logprobs_SC: torch.Tensor | None = None  # float32, of what it wrote
    entropies_SC: torch.Tensor | None = None  # float32, nats
    hidden_SCH: torch.Tensor | None = None  # that the student's head has read for each token

    def take(self, slots: Sequence[int]) -> Chunk | None:
        """The chunk of these slots, in their order; None of none."""
        if not slots:
            return None
        at = upload(torch.tensor(slots), self.tokens_SC.device)
        values = (getattr(self, field.name) for field in fields(self))
        return Chunk(*(None if value is None else value[at] for value in values))  # type: ignore[arg-type]


class Decoder:
    """Decodes chunks for the live seats of one rank.

    Args:
        model, step: the same student, for prefill and for a token in every slot.
        cache: the student's keys; holds every live seat up to, not including, its pending token.
        top_k: how many of the student's best log-probabilities to keep per token; 0 keeps none.
        needs: of these, what the student knows as it writes.
        keep_hidden: keep the hidden states that the student's head reads.
        guide: the teacher's step, over a cache that holds what the student's does, and how the two are mixed.
        seed, stream: name the random numbers together with rollout id and position.
    """

    def __init__(
        self, model: Forward, step: Step, cache: SlotCache, sampling: Sampling, top_k: int, needs: frozenset[Need],
        seed: int, stream: int, guide: tuple[Step, Mix] | None = None, keep_hidden: bool = False,
    ) -> None:  # fmt: skip
        self._model, self._step = model, step
        self._cache = cache
        self._sampling = sampling
        self._top_k, self._needs = top_k, needs
        self._origin, self._guide = (seed, stream), guide
        self._keep_hidden = keep_hidden

    def prefill(self, seats: Sequence[Seat], leaders: Mapping[int, int]) -> None:
        """Computes the prompts' keys of the fresh seats, which are the last ones; followers get their leader's."""
        first = next((i for i, seat in enumerate(seats) if seat.fresh), len(seats)) + len(leaders)
        copies = [(leader, slot, seats[slot].position) for slot, leader in leaders.items()]
        prefill(self._model, self._cache, first, [seat.request.prompt.token_ids[:-1] for seat in seats[first:]], copies)

    def decode(self, seats: Sequence[Seat], tokens: int, flight: Chunk | None = None) -> Chunk:
        """Writes `tokens` tokens in every seat. One host-to-device copy before, none after, no synchronisation.

        `flight`: a chunk of the first seats that the host has not seen yet; they go on from its end.
        """
        flying, width = (0, 0) if flight is None else flight.tokens_SC.shape
        ahead = [width if slot < flying else 0 for slot in range(len(seats))]
        state = [
            (seat.pending, seat.position + more, key(*self._origin, seat.request.id), seat.written + more)
            for seat, more in zip(seats, ahead, strict=True)
        ]
        pending, positions, keys, counters = self._tensor(list(zip(*state, strict=True)))
        if flight is not None:
            pending = torch.cat([flight.tokens_SC[:, -1], pending[flying:]])
        random_CS = uniforms(keys, counters + torch.arange(tokens, device=counters.device)[:, None])
        longest = max(seat.position + more for seat, more in zip(seats, ahead, strict=True))
        inputs, drawn = [], []
        hidden_SCH = None
        wanted = {"logprob": Need.WRITTEN in self._needs, "entropy": Need.STUDENT_ENTROPY in self._needs}
        with torch.inference_mode():  # a tenth faster than no_grad; what is stacked outside are ordinary tensors again
            for step in range(tokens):
                logits = self._step(pending, positions, longest + step + 1)
                policy = self._policy(logits, pending, positions, longest + step + 1)
                drawn.append(
                    sample_step(logits, random_CS[step], self._sampling, self._top_k, **wanted, policy_SV=policy)
                )
                inputs.append(pending)
                if self._keep_hidden:
                    if hidden_SCH is None:
                        hidden_SCH = _room(self._step.hidden, tokens)
                    hidden_SCH[:, step] = self._step.hidden
                pending, positions = drawn[-1].tokens_S, positions + 1
        rest = ("top_ids_SK", "top_logprobs_SK", "logprobs_S", "entropies_S")
        kept = [_stacked([getattr(each, name) for each in drawn]) for name in rest]
        kept.append(hidden_SCH)
        return Chunk(torch.stack(inputs, 1), torch.stack([each.tokens_S for each in drawn], 1), *kept)

    def _policy(
        self, logits: torch.Tensor, pending: torch.Tensor, positions: torch.Tensor, longest: int
    ) -> torch.Tensor | None:
        """What the next token is drawn from, if not from the student alone: log-probabilities [S, V]."""
        if self._guide is None:
            return None
        step, mix = self._guide
        both = (logits, step(pending, positions, longest))
        student, teacher = ((each.float() / self._sampling.scale).log_softmax(-1) for each in both)
        return mix(student, teacher)

    def _tensor(self, values: Sequence[Any]) -> torch.Tensor:
        return upload(torch.tensor(values, dtype=torch.int64), self._cache.device)


def _room(hidden_SH: torch.Tensor, tokens: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return hidden_SH.new_empty(hidden_SH.shape[0], tokens, hidden_SH.shape[1])


def _stacked(steps: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [step for step in steps if step is not None]
    return torch.stack(present, 1) if present else None
