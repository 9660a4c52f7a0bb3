"""Rollouts of some steps, for the page to show: text, KL per token, and where the rule cut.

Everything here is data; the page puts it in as text, never as HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from katds.analysis.kl_plot import window_means
from katds.analysis.records import Record, read_records
from katds.errors import ConfigError
from katds.report.run import Run, spread

# At most so many are shown:
STEPS = 12
PER_STEP = 6
TOKENS = 4000  # of a rollout
CHARACTERS = 40_000  # of a text that is not in single tokens


def read_samples(run: Run, wanted: Sequence[int]) -> list[Record]:
    """The saved rollouts of the `wanted` steps (finished steps; none: some, evenly chosen), those with most to see first.

    Raises ConfigError: a wanted step has no saved rollouts.
    """
    files = {int(file.stem.removeprefix("step-")) + 1: file for file in (run.folder / "rollouts").glob("step-*.jsonl")}
    if files and (unknown := [step for step in wanted if step not in files]):
        held = f"{min(files)} to {max(files)}"
        raise ConfigError(f"--steps {unknown[0]}: {run.folder} has saved no rollouts of it. Give steps from {held}.")
    chosen = sorted({*wanted} & files.keys()) or spread(sorted(files), STEPS)
    return [sample for step in chosen for sample in _of_step(run, step, files[step])]


def _of_step(run: Run, step: int, file: Path) -> list[Record]:
    rows = [row for row in read_records(file) if isinstance(row.get("kl"), list) and "response" in row]
    # Audit rollouts first, as they show what lies behind the cut; among them those that have one, or a hole.
    rows.sort(
        key=lambda row: (not row.get("audit"), row.get("cut_at") is None and not row.get("hole"), row.get("id", 0))
    )
    threshold = run.steps.get(step - 1, {}).get("kat/threshold")  # as the step before left it
    return [_sample(row, step, threshold, run.windows) for row in rows[:PER_STEP]]


def _sample(row: Record, step: int, threshold: float | None, windows: Sequence[int]) -> dict[str, Any]:
    kl = [_short(value) for value in row["kl"]]
    width = next((w for w in windows if w <= len(kl)), None)
    means = (
        [_short(value) for value in window_means([value or 0.0 for value in kl], width)][: TOKENS - width + 1]
        if width
        else []
    )
    pieces = row.get("pieces")
    return {
        "step": step,
        "id": row.get("id"),
        "prompt": _clipped(row.get("prompt", "")),
        "prefix": _clipped(row.get("prefix", "")),
        "pieces": [str(piece)[:200] for piece in pieces[:TOKENS]] if pieces else None,
        "response": None if pieces else _clipped(row["response"]),
        "reason": row.get("reason"),
        "audit": bool(row.get("audit")),
        "right": row.get("right"),
        "tokens": row.get("tokens", len(kl)),
        "kept": row.get("kept"),
        "cut_at": row.get("cut_at"),
        "hole": row.get("hole"),
        "kl": kl[:TOKENS],
        "window": width,
        "means": means,
        "threshold": threshold,
        "limit": TOKENS,
    }


def _short(value: Any) -> float | None:
    """Three digits, which is more than a screen can show; it keeps the page small."""
    return float(f"{value:.3g}") if isinstance(value, int | float) else None


def _clipped(text: str) -> str:
    return text if len(text) <= CHARACTERS else text[:CHARACTERS] + " [...]"
