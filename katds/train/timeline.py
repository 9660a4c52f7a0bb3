"""timeline.jsonl: when each rank was in which phase, step by step.

A line is {"step": 3, "began": unix seconds on rank 0, "ranks": {"0": [["rollout", 0.0, 3.21], ["learn", 3.21, 6.0], ...], ...},
"parts": {"0": {"rollout/decode": 1.2, ...}, ...}}: begin and end of each phase in seconds since that rank's own begin of the step, and the
total seconds of the parts of phases. An evaluation or a checkpoint belongs to the step that it follows; the evaluation of the untrained
student is in no line.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from katds.core.collective import Collective
from katds.train.step_file import StepFile

FILE = "timeline.jsonl"
MOST_RANKS = 64  # the first so many are written down


class Timeline:
    """Hears the clock, and writes a step down when the next one begins: only then it is known what followed.

    Args:
        start: first step of this process; what a broken-off run wrote from there on is dropped.
    """

    def __init__(self, folder: Path, collective: Collective, start: int) -> None:
        self._collective = collective
        self._file = StepFile(folder / FILE, start) if collective.rank == 0 else None
        self._step: int | None = None
        self._began = self._zero = 0.0
        self._phases: list[tuple[str, float, float]] = []
        self._parts: dict[str, float] = {}

    def begin(self, step: int) -> None:
        """Collective: the step before is over."""
        self.end()
        self._step, self._began, self._zero = step, time.time(), time.perf_counter()
        self._phases, self._parts = [], {}

    def heard(self, path: str, began: float, ended: float) -> None:
        """A phase, or a part of one, that lasted so long by `time.perf_counter`."""
        if "/" in path:
            self._parts[path] = self._parts.get(path, 0.0) + ended - began
        elif self._step is not None:
            self._phases.append((path, round(began - self._zero, 4), round(ended - self._zero, 4)))

    def end(self) -> None:
        """Collective: one gather, unless no step is open. Writes the step down."""
        if self._step is None:
            return
        parts = {path: round(seconds, 4) for path, seconds in self._parts.items()}
        shown = (self._phases, parts) if self._collective.rank < MOST_RANKS else None
        gathered = self._collective.gather(shown)
        if self._file is not None:
            self._file.append(self._step, _record(self._began, gathered[:MOST_RANKS]))
        self._step = None


def _record(began: float, ranks: list[Any]) -> dict[str, Any]:
    return {
        "began": round(began, 3),
        "ranks": {str(rank): phases for rank, (phases, _) in enumerate(ranks)},
        "parts": {str(rank): parts for rank, (_, parts) in enumerate(ranks)},
    }
