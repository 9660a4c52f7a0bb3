"""Where the time goes: seconds per phase, nested phases named by their path."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up wall seconds per phase since the last `take`.

    On CUDA the device is synchronised at the ends of top-level phases only, so that inner ones show where the host waits without
    slowing the run. With `exact`, which is for benchmarks, it is synchronised at the ends of all, and inner ones show what they take.

    Args:
        heard: told of each phase that has ended: its path, begin and end by `time.perf_counter`.
    """

    def __init__(self, heard: Callable[[str, float, float], None] = lambda path, began, ended: None) -> None:
        self.exact = False
        self._heard = heard
        self._seconds: dict[str, float] = {}
        self._path: list[str] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._path.append(name)
        key = "/".join(self._path)
        self._settle()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._settle()
            end = time.perf_counter()
            self._seconds[key] = self._seconds.get(key, 0.0) + end - start
            self._heard(key, start, end)
            self._path.pop()

    def take(self) -> dict[str, float]:
        """The seconds so far, e.g. {"rollout": 2.0, "rollout/decode": 1.2}; starts anew."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _settle(self) -> None:
        if (self.exact or len(self._path) == 1) and torch.cuda.is_available():
            torch.cuda.synchronize()
