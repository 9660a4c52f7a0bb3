"""A file of JSON lines, each with the `step` that it is of: appended to while a run trains, cut back where it is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from katds.files import append_text, replacing


class StepFile:
    """Only rank 0 has one.

    Args:
        start: first step of this process. Records of steps from there on will be made again and are dropped, as is a torn last line. A
            process that is killed meanwhile leaves the file as it was.

    Attributes:
        evaluations: kept records of an evaluation of the student after `start` steps: it will not be made again. A run that begins
            anew (start 0) evaluates the untrained student again.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        self.evaluations: list[dict[str, float]] = []
        if path.exists():
            with path.open() as lines, replacing(path) as kept:
                kept.writelines(line.rstrip("\n") + "\n" for line in lines if self._stays(line, start))

    def append(self, step: int, record: Mapping[str, Any]) -> None:
        append_text(self._path, json.dumps({"step": step, **record}) + "\n")

    def _stays(self, line: str, start: int) -> bool:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return False  # the last line of a killed run may be torn
        step = record.pop("step")
        if step == start > 0 and record and all(key.startswith("eval/") for key in record):
            self.evaluations.append(record)
            return True
        return bool(step < start)
