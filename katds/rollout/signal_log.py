"""The teacher's signal of a rollout phase, from the order of scoring to that of rollouts."""

from __future__ import annotations

import torch

from katds.core.types import Field


def first_rows(spans: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The spans of the first `count` rows."""
    taken = []
    for first, rows in spans:
        if count <= 0:
            break
        taken.append((first, min(rows, count)))
        count -= rows
    return taken


class SignalLog:
    """The step's teacher signal in the order of scoring; rollouts own spans of it until they are laid end to end.

    Memory: every scored row of the step, overshoot and traps included, until `collect`.
    """

    def __init__(self) -> None:
        self._chunks: list[dict[Field, torch.Tensor]] = []
        self._rows = 0

    def add(self, signal: dict[Field, torch.Tensor]) -> int:
        """Appends a chunk's rows; returns the number of the first."""
        first = self._rows
        if signal:
            self._chunks.append(signal)
            self._rows += next(iter(signal.values())).shape[0]
        return first

    def collect(self, kept: list[list[tuple[int, int]]]) -> dict[Field, torch.Tensor]:
        """The rows of the given spans, rollout after rollout."""
        if not self._chunks:
            return {}
        device = next(iter(self._chunks[0].values())).device
        index = torch.cat(
            [torch.arange(first, first + count) for spans in kept for first, count in spans]
            or [torch.empty(0, dtype=torch.int64)]
        )
        index = index.to(device)
        keys = list(self._chunks[0])
        return {key: torch.cat([chunk.pop(key) for chunk in self._chunks])[index] for key in keys}
