"""Fair timing: contenders in turn, A B A B, so that a machine that slows down slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """Of repeated measurements."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} .. {self.high:.2f})"


def alternate(
    contenders: Mapping[str, Callable[[], Any]],
    repetitions: int,
    warmup: int = 1,
    settle: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Wall seconds of each contender, `repetitions` each, in turn. `settle` (e.g. a device synchronisation or a barrier) runs
    before the clock starts and before it stops."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + repetitions):
        for name, run in contenders.items():
            settle()
            start = time.perf_counter()
            run()
            settle()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Of the pairs of one turn each."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])
