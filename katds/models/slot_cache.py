"""The key/value cache of a fixed number of slots.

Invariants: the key of a token lies at its position (no left padding, no shifting). Live slots are 0 .. n-1, so every
attention call reads a slice, never a gather. A position is overwritten before anything may see it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache

from katds.models.attention import SlotGroup, SlotPlan, VarlenSlots

PAGE = 256  # key positions per page of the CUDA kernel; the cache length is a multiple of it there


class SlotCache(Cache):
    """Keys and values [slots, length, Hkv, D] per layer, allocated on first use in the model's dtype.

    Memory: 2 x layers x slots x length x Hkv x D elements.
    """

    def __init__(self, slots: int, length: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.length = length if device.type != "cuda" else -(-length // PAGE) * PAGE
        self.device = device
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._plan: SlotPlan | None = None

    def prepare(self, plan: SlotPlan) -> None:
        """The plan of the forward that comes next."""
        self._plan = plan

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes key and value [1, Hkv, N, D] where the plan says; returns the layer's whole buffers."""
        plan = self._plan
        assert plan is not None, "SlotCache.prepare was not called before the forward"
        for buffers, new in ((self._keys, key), (self._values, value)):
            if layer == len(buffers):
                _, heads, _, dim = new.shape
                with torch.inference_mode(False):  # written in either mode later on
                    buffers.append(torch.zeros(self.slots, self.length, heads, dim, dtype=new.dtype, device=new.device))
            rows = new[0].transpose(0, 1)
            if plan.write_source is not None:
                rows = rows[plan.write_source]
            buffers[layer][plan.write_slots, plan.write_positions] = rows
        return self._keys[layer], self._values[layer]

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies the first `tokens` positions of one slot to another."""
        for buffer in (*self._keys, *self._values):
            buffer[target, :tokens] = buffer[source, :tokens]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def uniform_plan(cache: SlotCache, slots: torch.Tensor, positions: torch.Tensor, keys: int) -> SlotPlan:
    """One token in each of the slots 0 .. n-1: a decode step. `slots` is arange(n), `positions` int64 [n], `keys` the
    longest slot including this token."""
    at = torch.arange(keys, device=positions.device)
    mask = (at <= positions[:, None])[:, None, None, :]
    count = positions.shape[0]
    group = SlotGroup(0, count, slice(0, count), 1, mask)
    plan = SlotPlan(slots, positions, None, keys, [group])
    if cache.device.type == "cuda":
        ones = torch.arange(count + 1, dtype=torch.int32, device=positions.device)
        plan.varlen = VarlenSlots(ones, (positions + 1).int(), _block_table(cache, 0, count), 1)
    return plan


def ragged_plan(
    cache: SlotCache,
    first_slot: int,
    starts: Sequence[int],
    counts: Sequence[int],
    uniform: int,
    copies: Sequence[tuple[int, int, int]] = (),
) -> tuple[SlotPlan, torch.Tensor]:
    """Any number of tokens in each of the slots first_slot, first_slot + 1, ...

    Args:
        starts, counts: position of the first token and number of tokens, per slot; tokens lie slot after slot.
        uniform: so many leading slots have the same count and are attended to without padding.
        copies: (source slot, target slot, tokens): the first tokens of a source slot, which start at position 0 in this very
            forward, are written to the target slot as well.

    Returns:
        the plan, and the position of each token [N].
    """
    slots_N: list[int] = []
    positions_N: list[int] = []
    columns_N: list[int] = []
    offsets = [0]
    for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
        slots_N += [i] * count
        positions_N += range(start, start + count)
        columns_N += range(count)
        offsets.append(offsets[-1] + count)
    source = list(range(len(slots_N)))
    write_slots = [s + first_slot for s in slots_N]
    write_positions = list(positions_N)
    for origin, target, tokens in copies:
        begin = offsets[origin - first_slot]
        source += range(begin, begin + tokens)
        write_slots += [target] * tokens
        write_positions += range(tokens)
    as_tensor = lambda values: torch.tensor(values, dtype=torch.int64).to(cache.device)  # noqa: E731
    positions, columns, rows = as_tensor(positions_N), as_tensor(columns_N), as_tensor(slots_N)
    keys = max((s + c for s, c in zip(starts, counts, strict=True)), default=0)
    groups = []
    for low, high, square in ((0, uniform, True), (uniform, len(starts), False)):
        if low < high:
            groups.append(_group(first_slot, low, high, offsets, counts, positions, rows, columns, keys, square))
    plan = SlotPlan(
        as_tensor(write_slots), as_tensor(write_positions), as_tensor(source) if copies else None, keys, groups
    )
    if cache.device.type == "cuda":
        int32 = lambda values: torch.tensor(values, dtype=torch.int32).to(cache.device)  # noqa: E731
        used = int32([s + c for s, c in zip(starts, counts, strict=True)])
        plan.varlen = VarlenSlots(
            int32(offsets), used, _block_table(cache, first_slot, len(starts)), max(counts, default=0)
        )
    return plan, positions


def _group(
    first_slot: int,
    low: int,
    high: int,
    offsets: list[int],
    counts: Sequence[int],
    positions: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    keys: int,
    square: bool,
) -> SlotGroup:
    tokens = slice(offsets[low], offsets[high])
    width, slots = max(counts[low:high]), high - low
    at = torch.arange(keys, device=positions.device)
    if square:
        seen = positions[tokens].view(slots, width)
        return SlotGroup(first_slot + low, slots, tokens, width, (at <= seen[..., None])[:, None])
    scatter = (rows[tokens] - low, columns[tokens])
    seen = torch.zeros(
        slots, width, dtype=torch.int64, device=positions.device
    )  # idle queries see key 0: no empty softmax
    seen[scatter] = positions[tokens]
    return SlotGroup(first_slot + low, slots, tokens, width, (at <= seen[..., None])[:, None], scatter)


def _block_table(cache: SlotCache, first: int, count: int) -> torch.Tensor:
    pages = cache.length // PAGE
    table = torch.arange(first * pages, (first + count) * pages, dtype=torch.int32, device=cache.device)
    return table.view(count, pages)
