"""A `Collective` of threads in one process: the real protocol with real waiting, in microseconds instead of seconds.

Each rank runs in its own thread. A rank that calls an operation waits until all ranks have called the same one, so code
that calls different collectives on different ranks fails here with the names of both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
TIMEOUT_SECONDS = 20.0  # a rank that waits longer has been left alone: a failure


class _Board:
    """Where the ranks of one world lay what they contribute."""

    def __init__(self, size: int) -> None:
        self.posted: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_SECONDS)


class LocalRank:
    """One rank's end; implements `katds.core.collective.Collective`."""

    def __init__(self, rank: int, size: int, board: _Board) -> None:
        self.rank = rank
        self.size = size
        self._board = board

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._swap("sum", values.clone())).sum(0)

    def max(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._swap("max", values.clone())).amax(0)

    def gather(self, value: T) -> list[T]:
        return self._swap("gather", value)

    def exchange(self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        assert len(send) == len(receive) == self.size
        assert sum(send) == len(rows), f"{len(rows)} rows but {sum(send)} announced"
        outgoing = self._swap("exchange", torch.split(rows.clone(), list(send)))
        incoming = [parts[self.rank] for parts in outgoing]
        assert [len(part) for part in incoming] == list(receive), f"{[len(p) for p in incoming]} came, not {receive}"
        return torch.cat(incoming)

    def barrier(self) -> None:
        self._swap("barrier", None)

    def _swap(self, operation: str, value: Any) -> list[Any]:
        """Every rank's value. The second wait keeps a fast rank from overwriting what a slow one still reads."""
        self._board.posted[self.rank] = (operation, value)
        self._board.barrier.wait()
        posted = list(self._board.posted)
        self._board.barrier.wait()
        operations = {name for name, _ in posted}
        assert len(operations) == 1, f"ranks are in different collectives: {sorted(operations)}"
        return [value for _, value in posted]


def run_local(size: int, function: Callable[[LocalRank], T]) -> list[T]:
    """function(rank's collective) on every rank; its results in rank order. The first failure is raised here."""
    board = _Board(size)
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(LocalRank(rank, size, board))
        except threading.BrokenBarrierError as broken:
            failures.append(broken)
        except BaseException as failure:
            failures.insert(0, failure)  # before the barriers that it breaks for the others
            board.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
