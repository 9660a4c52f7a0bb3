"""What the algorithm may ask of the other processes, and the one-process answer to it.

The engine, the stop rules and the packer are written against `Collective`; `katds.parallel` supplies the real one. So
each of them runs in a unit test without processes, and a rank never decides alone: control flow depends only on
values that came out of a collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Collective(Protocol):
    """The communication that katds needs. Every method is a collective: all ranks call it, in the same order."""

    rank: int
    size: int

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over ranks of a CPU tensor of the same shape everywhere; exact for float64 integers."""
        ...

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise maximum over ranks of a CPU tensor of the same shape everywhere."""
        ...

    def gather(self, value: T) -> list[T]:
        """Any picklable value of every rank, in rank order, on every rank."""
        ...

    def exchange(self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """All-to-all of rows: `rows` [sum(send), ...] is split by destination rank; returns [sum(receive), ...] in
        order of source rank. Same trailing shape and dtype on every rank."""
        ...

    def barrier(self) -> None: ...


class Solo:
    """`Collective` of a single process: every operation is the identity."""

    rank = 0
    size = 1

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def gather(self, value: T) -> list[T]:
        return [value]

    def exchange(self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        return rows

    def barrier(self) -> None:
        return None
