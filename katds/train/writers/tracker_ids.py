"""trackers.json of a run folder: under which id each tracker knows the run, so that a resumed run goes on there."""

from __future__ import annotations

import json
from pathlib import Path

from katds.files import replace_text

FILE = "trackers.json"


def known_id(folder: Path, tracker: str) -> str | None:
    """The id, or None before the first start."""
    return _read(folder).get(tracker)


def remember_id(folder: Path, tracker: str, run_id: str) -> None:
    replace_text(folder / FILE, json.dumps(_read(folder) | {tracker: run_id}, indent=2) + "\n")


def _read(folder: Path) -> dict[str, str]:
    file = folder / FILE
    return dict(json.loads(file.read_text())) if file.exists() else {}
