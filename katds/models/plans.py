"""Attention plans: which tokens of a forward belong together.

Every forward of katds runs on a flat row of tokens [1, N] without padding, and one of these says who sees whom:

- `PackedPlan`: training. Sequences lie end to end; each attends causally to itself.
- `SlotPlan`: rollout. Tokens belong to slots of a `SlotCache`; each attends to its slot's keys up to its own position.
  Ragged prefill, one-token decode and the teacher's chunk are this one case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from katds.models.native.attention import run_table


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`, without waiting for it: from pageable memory, CUDA would make the host wait for all that is
    queued before."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""q [N, Hq, D], k and v [N, Hkv, D] -> [N, Hq, D]"""


class Shards(Protocol):
    """Ranks that share a packed row of tokens, an equal stretch of it each; see `katds.parallel.sequence`."""

    rank: int
    size: int

    def attend(self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Collective: of this rank's stretch, with `attend` for all tokens and a part of the heads."""
        ...


@dataclass(slots=True)
class PackedPlan:
    """Sequences of the given lengths laid end to end. With `shards` a rank has a stretch of them only."""

    bounds: list[int]  # 0, l0, l0 + l1, ...
    cu_seqlens: torch.Tensor  # int32, the same on the device
    longest: int
    shards: Shards | None = None
    _runs: torch.Tensor | None = None

    @property
    def runs(self) -> torch.Tensor:
        """For the C code."""
        if self._runs is None:
            bounds = torch.tensor(self.bounds)
            self._runs = run_table(bounds[:-1], bounds.diff(), bounds[:-1], torch.zeros(len(bounds) - 1).long())
        return self._runs

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, shards: Shards | None = None) -> PackedPlan:
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        return cls(bounds, upload(torch.tensor(bounds, dtype=torch.int32), device), max(lengths, default=0), shards)


@dataclass(slots=True)
class SlotGroup:
    """Neighbouring slots whose queries are attended to in one call.

    With `scatter` None all slots have `width` queries each, in order; otherwise slot and column of each query are given
    and the rest of the [slots, width] square is idle.
    """

    first_slot: int
    slots: int
    tokens: slice
    width: int
    seen: torch.Tensor  # int64 [slots, width], the last position that each query sees
    scatter: tuple[torch.Tensor, torch.Tensor] | None = None
    _biases: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def bias(self, keys: int, share: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """0 where a query sees a key and -inf elsewhere, [slots, 1, share x width, keys]: the same for all layers of a kind."""
        if (share, window) not in self._biases:
            at = torch.arange(keys, device=self.seen.device)
            hidden = at > self.seen[..., None]
            if window is not None:
                hidden |= at <= self.seen[..., None] - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._biases[share, window] = bias.repeat(1, share, 1).unsqueeze(1)
        return self._biases[share, window]


@dataclass(slots=True)
class SlotPlan:
    """Which slot and position each token is written to, and what its query sees.

    `write_source` repeats tokens that are written to several slots: a prompt that is sampled n times is computed once.
    """

    write_slots: torch.Tensor  # int64 [M]
    write_positions: torch.Tensor  # int64 [M]
    write_source: torch.Tensor | None  # int64 [M]; None: M = N and in order
    keys: int  # keys that anyone may see: the longest slot
    make_groups: Callable[[], list[SlotGroup]]
    make_runs: Callable[[], torch.Tensor]
    varlen: VarlenSlots | None = None
    _groups: list[SlotGroup] | None = None
    _runs: torch.Tensor | None = None

    @property
    def groups(self) -> list[SlotGroup]:
        """For SDPA; made when asked for, which the other ways never do."""
        if self._groups is None:
            self._groups = self.make_groups()
        return self._groups

    @property
    def runs(self) -> torch.Tensor:
        """For the C code."""
        if self._runs is None:
            self._runs = self.make_runs()
        return self._runs


@dataclass(slots=True)
class VarlenSlots:
    """The same for a varlen kernel over a paged cache (CUDA)."""

    cu_seqlens_q: torch.Tensor  # int32 [slots + 1]
    cu_seqlens_k: torch.Tensor  # int32 [slots + 1], of whole slots
    seqused_k: torch.Tensor  # int32 [slots]
    block_table: torch.Tensor  # int32 [slots, pages]
    longest_q: int
    single: bool  # each slot has one query
