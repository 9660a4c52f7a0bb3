"""Many ranks in one process: what a collective costs the processor, without a network."""

from __future__ import annotations

from typing import TypeVar

import torch

from katds.core.collective import Solo

T = TypeVar("T")


class StandIn(Solo):
    """`Collective` of the first of `size` ranks, all of which contribute what it does, each for its own columns.

    Columns of a table [rows, rollouts or ranks] are dealt to ranks one by one. Counts are summed. Nobody exchanges rows.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.size if values.ndim == 1 else values[:, :: self.size].repeat_interleave(self.size, 1)

    def gather(self, value: T) -> list[T]:
        return [value] * self.size
