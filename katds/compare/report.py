"""The outcome as tables: on the console, in REPORT.md, and with all numbers in results.json."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from katds.bench.report import commit, machine, versions
from katds.compare.intervals import Interval, interval
from katds.compare.outcome import COMPARED, DRIFT, FIGURES, Figure, Outcome, Outcomes
from katds.compare.plan import Comparison
from katds.files import replace_text

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
Row = dict[str, str]


def report_text(comparison: Comparison, outcomes: Outcomes, words: dict[str, str], pictures: Sequence[Path]) -> str:
    """REPORT.md. `words` fill the titles of columns."""
    parts = ["# Comparison", _preamble(comparison, outcomes), _table(_rows(_main(outcomes), FIGURES, words))]
    parts += [f"![{picture.stem}]({picture.name})" for picture in pictures]
    parts += [*_differences(outcomes, words), *_sweeps(outcomes, words), *_drift(outcomes, words)]
    if outcomes.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in outcomes.notes)]
    return "\n\n".join(parts) + "\n"


def _preamble(comparison: Comparison, outcomes: Outcomes) -> str:
    seeds = ", ".join(map(str, comparison.seeds))
    return (
        f"`{command()}`: {comparison.recipe} with seeds {seeds} on {' and '.join(outcomes.machines)}, the same "
        "prompts for every cell. Mean over the seeds ± half of its 95% interval (Student's t), which knows of chance in training and "
        "sampling, not of other models, tasks or problems. Scores are those of the trained student. How FLOP are counted: "
        "katds/compare/flops.py."
    )


def command() -> str:
    """What makes these runs and this report; --report made the report alone."""
    return " ".join(["python", *(word for word in sys.argv if word != "--report")])


def _main(outcomes: Outcomes) -> list[Outcome]:
    return [outcome for outcome in outcomes.cells.values() if outcome.cell.swept is None]


def _rows(cells: Sequence[Outcome], figures: Sequence[Figure], words: dict[str, str]) -> list[Row]:
    columns = {figure: [cell.interval(figure.key) for cell in cells] for figure in figures}
    rows: list[Row] = [{"cell": cell.cell.name} for cell in cells]
    for figure, intervals in columns.items():
        factor, title = _unit(figure, intervals, words)
        for row, found in zip(rows, intervals, strict=True):
            row[title] = shown(found, figure.style, factor)
    return rows


def _unit(figure: Figure, intervals: Sequence[Interval | None], words: dict[str, str]) -> tuple[float, str]:
    """What a column's values are divided by, and its title."""
    title = figure.title.format(**words)
    if figure.style != "count":
        return 1.0, title
    largest = max((abs(found.mean) for found in intervals if found), default=0.0)
    factor, prefix = next((pair for pair in PREFIXES if largest >= pair[0]), PREFIXES[-1])
    return factor, f"{title} [{prefix}]" if prefix else title


def shown(found: Interval | None, style: str, factor: float = 1.0, sign: str = "") -> str:
    if found is None:
        return "-"
    digits = {"score": f"{sign}.3f", "count": f"{sign}.3f", "plain": f"{sign}.2f", "seconds": f"{sign}.1f"}
    pattern = digits.get(style, f"{sign}.1%" if style == "share" else f"{sign}.3g")
    mean, half = found.mean / factor, (found.half or 0.0) / factor
    return format(mean, pattern) + ("" if found.half is None else f" ± {format(half, pattern.lstrip('+'))}")


def _table(rows: Sequence[Row]) -> str:
    from tabulate import tabulate

    return str(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


def _differences(outcomes: Outcomes, words: dict[str, str]) -> Iterator[str]:
    """The reference minus each other cell."""
    for name, reference in outcomes.cells.items():
        others = [cell for cell in _main(outcomes) if cell.cell.against == name and cell is not reference]
        if not others:
            continue
        yield (
            f"## {name} minus the others\n\nSeed by seed: equal seeds share prompts, their order and the numbers that "
            "sampling draws. Of twenty cells that are as good, one will differ by chance."
        )
        yield _table(_difference_rows(reference, others, words))
        yield "\n".join(f"- {sentence}" for sentence in verdicts(reference, others, words))


def _difference_rows(reference: Outcome, others: Sequence[Outcome], words: dict[str, str]) -> list[Row]:
    rows: list[Row] = [{"cell": f"{reference.cell.name} - {other.cell.name}"} for other in others]
    for figure in COMPARED:
        found = [reference.minus(other, figure.key) for other in others]
        factor, title = _unit(figure, found, words)
        for row, difference in zip(rows, found, strict=True):
            row[title] = shown(difference, figure.style, factor, "+")
    return rows


def verdicts(reference: Outcome, others: Sequence[Outcome], words: dict[str, str]) -> Iterator[str]:
    """Of each other cell, what the interval of the difference in accuracy says."""
    title = FIGURES[0].title.format(**words)
    for other in others:
        difference, tokens = reference.minus(other, "average"), reference.minus(other, "tokens")
        shared = reference.figures.get("tokens", {}).keys() & other.figures.get("tokens", {}).keys()
        if difference is None or tokens is None or not shared:
            continue
        theirs = sum(other.figures["tokens"][seed] for seed in shared) / len(shared)
        if difference.half is None:
            said = "one seed says nothing about chance"
        elif difference.low > 0:
            said = f"{reference.cell.name} is better"
        elif difference.high < 0:
            said = f"{other.cell.name} is better"
        else:
            said = "no difference that these seeds can tell from chance"
        yield (
            f"{reference.cell.name} against {other.cell.name}: {title} {shown(difference, 'score', sign='+')} with "
            f"{tokens.mean / theirs:+.1%} rollout tokens: {said}."
        )


def _sweeps(outcomes: Outcomes, words: dict[str, str]) -> Iterator[str]:
    """A table for each setting: the cell as it is, and its variants, compared with it seed by seed."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes.cells.values():
        if outcome.cell.swept is not None:
            groups.setdefault((outcome.cell.against, outcome.cell.swept[0]), []).append(outcome)
    for (name, setting), variants in groups.items():
        base = [outcomes.cells[name]] if name in outcomes.cells else []
        rows = _rows([*base, *variants], (*FIGURES, DRIFT[-1]), words)
        if base:
            column = f"{FIGURES[0].title.format(**words)} minus that of {name}"
            for row, variant in zip(rows[1:], variants, strict=True):
                row[column] = shown(variant.minus(base[0], "average"), "score", sign="+")
        yield f"## {setting} of {name}"
        yield _table(rows)


def _drift(outcomes: Outcomes, words: dict[str, str]) -> Iterator[str]:
    cells = [cell for cell in outcomes.cells.values() if any(cell.figures.get("terminated", {}).values())]
    if not cells:
        return
    yield (
        "## What was ended, and the threshold's drift\n\nThresholds in nats, when the queue was full enough and after the last step. What "
        "would have been right is measured on the audit rollouts, which are never ended."
    )
    yield _table(_rows(cells, DRIFT, words))


def results(comparison: Comparison, outcomes: Outcomes) -> dict[str, Any]:
    """results.json: every figure of every seed, so that others can summarise them in their own way."""
    return {
        "command": command(), "date": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": commit(),
        "machine": machine(), "versions": versions(), "comparison": comparison.model_dump(mode="json"),
        "cells": {name: _numbers(outcome) for name, outcome in outcomes.cells.items()},
        "differences": {
            f"{against.cell.name} - {name}": {
                figure.key: difference._asdict()
                for figure in COMPARED
                if (difference := against.minus(outcome, figure.key)) is not None
            }
            for name, outcome in outcomes.cells.items()
            if (against := outcomes.cells.get(outcome.cell.against)) not in (None, outcome)
        },
        "notes": outcomes.notes,
    }  # fmt: skip


def _numbers(outcome: Outcome) -> dict[str, Any]:
    figures = {
        key: {**interval(list(seeds.values()))._asdict(), "seeds": seeds} for key, seeds in outcome.figures.items()
    }
    made = {seed: [maker._asdict() for maker in found] for seed, found in outcome.makers.items()}
    return {
        "overrides": outcome.cell.overrides,
        "figures": figures,
        "thresholds": outcome.thresholds,
        "made_by": made,
    }


def write(folder: Path, text: str, numbers: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "REPORT.md", text)
    replace_text(folder / "results.json", json.dumps(numbers, indent=1) + "\n")
