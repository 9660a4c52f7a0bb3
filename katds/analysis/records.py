"""JSON lines as a run writes them, read while it still writes or after it was killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_records(path: Path) -> Iterator[Record]:
    """The objects of a file, line by line; none where there is no file.

    What is not an object, such as the torn last line of a killed run, is left out. NaN and infinities become None, as JSON has no such
    numbers.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line, parse_constant=lambda _: None)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield record
