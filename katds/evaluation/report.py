"""results.json and results.md: what an evaluation found, for programs and for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from katds.data.benchmarks import Benchmark
from katds.evaluation.metrics import Estimate, Evaluation, Scores
from katds.files import replace_text

_TITLES = ("benchmark", "problems", "n", "avg@n", "95% interval", "k", "pass@k", "95% interval", "tokens", "finished")


def results(
    given: Path, model: Path, benchmarks: Sequence[Benchmark], evaluation: Evaluation, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All numbers. `metrics` has the names that a run's metrics.jsonl has below eval/.

    Args:
        given: what was asked for, such as a run; model: the folder with the weights that were scored, which says of which step.
    """
    return {
        "model": str(given),
        "weights": str(model),
        "settings": dict(settings),
        "metrics": evaluation.metrics(),
        "benchmarks": {
            b.label: {"data": str(b.path), "problems": len(b.prompts), **evaluation.scores[b.name].metrics()}
            for b in benchmarks
        },
    }


def table(benchmarks: Sequence[Benchmark], evaluation: Evaluation) -> str:
    """A Markdown table with a row per benchmark and, of several, their average."""
    rows = [_TITLES, *(_row(b.label, evaluation.scores[b.name]) for b in benchmarks)]
    if len(benchmarks) > 1:
        average, passed = _shown(evaluation.average), _shown(evaluation.passed)
        means = evaluation.metrics()
        length, finished = f"{means['average/length_mean']:.0f}", f"{means['average/finished']:.0%}"
        rows.append(("average", "", "", *average, "", *passed, length, finished))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_TITLES))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write(folder: Path, found: Mapping[str, Any], text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "results.json", json.dumps(found, indent=2) + "\n")
    replace_text(folder / "results.md", f"{found['weights']}\n\n{text}\n")


def _row(label: str, scores: Scores) -> tuple[str, ...]:
    return (
        label, str(scores.problems), str(scores.samples), *_shown(scores.average), str(scores.k), *_shown(scores.passed),
        f"{scores.mean_tokens:.0f}", f"{scores.finished:.0%}",
    )  # fmt: skip


def _shown(value: Estimate) -> tuple[str, str]:
    return f"{value.mean:.3f}", f"{value.low:.3f} .. {value.high:.3f}"
