"""The student writes: prefill of new slots, then C tokens for all live slots without a look at the host.

Nothing in here communicates. End tokens and lengths are judged by the engine after the chunk, so a slot may write a few
tokens too many; they are never seen again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from katds.core.counter import key, uniforms
from katds.models.causal import FlatCausalLM, linear
from katds.models.slot_cache import SlotCache, ragged_plan, uniform_plan
from katds.rollout.sampling import Sampling, draw
from katds.rollout.slots import Seat


@dataclass(slots=True)
class Chunk:
    """C decoded tokens of n slots."""

    inputs_SC: torch.Tensor  # int64, what the model read: the pending token, then all sampled ones but the last
    tokens_SC: torch.Tensor  # int64, what it wrote
    top_ids_SCK: torch.Tensor | None  # int64, the student's K most probable tokens
    top_logprobs_SCK: torch.Tensor | None  # float32


class Decoder:
    """Decodes chunks for the live seats of one rank.

    Args:
        cache: the student's keys; holds every live seat up to, not including, its pending token.
        top_k: how many of the student's best log-probabilities to keep per token; 0 keeps none.
        seed, stream: name the random numbers together with rollout id and position.
    """

    def __init__(
        self, model: FlatCausalLM, cache: SlotCache, sampling: Sampling, top_k: int, seed: int, stream: int
    ) -> None:
        self._model = model
        self._cache = cache
        self._sampling = sampling
        self._top_k = top_k
        self._origin = (seed, stream)

    def prefill(self, seats: Sequence[Seat], leaders: Mapping[int, int]) -> None:
        """Computes the prompts' keys of the fresh seats, which are the last ones; followers get their leader's."""
        first = next((i for i, seat in enumerate(seats) if seat.fresh), len(seats)) + len(leaders)
        counts = [seat.position for seat in seats[first:]]
        if not any(counts):
            return
        copies = [(leader, slot, seats[slot].position) for slot, leader in leaders.items()]
        plan, positions = ragged_plan(self._cache, first, [0] * len(counts), counts, 0, copies)
        tokens = [t for seat in seats[first:] for t in seat.request.prompt.token_ids[:-1]]
        with torch.inference_mode():
            self._model(self._tensor(tokens), positions, plan, None, cache=self._cache)

    def decode(self, seats: Sequence[Seat], tokens: int) -> Chunk:
        """Writes `tokens` tokens in every seat. One host-to-device copy before, none after, no synchronisation."""
        count = len(seats)
        slots = torch.arange(count, device=self._cache.device)
        pending = self._tensor([seat.pending for seat in seats])
        positions = self._tensor([seat.position for seat in seats])
        keys = self._tensor([key(*self._origin, seat.request.id) for seat in seats])
        counters = self._tensor([len(seat.response) for seat in seats])
        random_CS = uniforms(keys, counters + torch.arange(tokens, device=counters.device)[:, None])
        longest = max(seat.position for seat in seats)
        inputs, written, ids, values = [], [], [], []
        with torch.inference_mode():  # a tenth faster than no_grad; what is stacked outside are ordinary tensors again
            for step in range(tokens):
                plan = uniform_plan(self._cache, slots, positions, longest + step + 1)
                logits = self._model(pending, positions, plan, linear, cache=self._cache)
                logprobs = torch.log_softmax(logits.float() / self._sampling.scale, dim=-1)
                inputs.append(pending)
                if self._top_k:
                    best = logprobs.topk(min(self._top_k, logprobs.shape[-1]), sorted=False)
                    values.append(best.values)
                    ids.append(best.indices)
                pending = draw(logprobs, random_CS[step], self._sampling)
                written.append(pending)
                positions = positions + 1
        return Chunk(
            torch.stack(inputs, 1),
            torch.stack(written, 1),
            torch.stack(ids, 1) if ids else None,
            torch.stack(values, 1) if values else None,
        )

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._cache.device, non_blocking=True)
