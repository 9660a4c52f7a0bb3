"""The figures of finished runs, gathered by cell and seed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from katds.compare.cells import Cell, Run
from katds.compare.flops import run_flops
from katds.compare.intervals import Interval, interval, paired
from katds.compare.running import Maker, makers


class Figure(NamedTuple):
    """A column. `style`: "score", "count" (with an SI prefix), "plain", "seconds", "share" or "nats"."""

    key: str
    title: str
    style: str


FIGURES = (
    Figure("average", "{average}", "score"),
    Figure("passed", "{passed}", "score"),
    Figure("length", "rollout length", "plain"),
    Figure("tokens", "rollout tokens", "count"),
    Figure("learned", "learnt from", "count"),
    Figure("seconds", "training time [s]", "seconds"),
    Figure("flops", "FLOP", "count"),
    Figure("terminated", "ended by the rule", "share"),
)
COMPARED = tuple(
    figure for figure in FIGURES if figure.key in ("average", "passed", "length", "tokens", "seconds", "flops")
)
DRIFT = (
    Figure("first", "first threshold", "nats"),
    Figure("highest", "highest", "nats"),
    Figure("last", "last threshold", "nats"),
    Figure("ratio", "last / first", "plain"),
    Figure("ended", "rollouts ended", "count"),
    Figure("terminated", "share of all", "share"),
    Figure("recovered", "of these would have been right", "share"),
    Figure("graded", "judged by so many audit rollouts", "count"),
)


@dataclass
class Outcome:
    """What is known of one cell: {figure: {seed: value}}, without what its runs do not have; thresholds: {seed: {step: nats}}; makers:
    {seed: what its run was made by}."""

    cell: Cell
    figures: dict[str, dict[int, float]] = field(default_factory=dict)
    thresholds: dict[int, dict[int, float]] = field(default_factory=dict)
    makers: dict[int, list[Maker]] = field(default_factory=dict)

    def interval(self, key: str) -> Interval | None:
        values = self.figures.get(key)
        return interval(list(values.values())) if values else None

    def minus(self, other: Outcome, key: str) -> Interval | None:
        return paired(self.figures.get(key, {}), other.figures.get(key, {}))


@dataclass
class Outcomes:
    """Of all cells that have a finished run, in the order of the comparison.

    Args:
        machines: ranks and device of the runs; more than one, and times cannot be compared.
        notes: what a reader must know.
    """

    cells: dict[str, Outcome]
    machines: list[str]
    notes: list[str]


def gather(runs: Sequence[Run], missing: dict[str, str]) -> Outcomes:
    cells: dict[str, Outcome] = {}
    notes = [f"{name} is missing: {reason}." for name, reason in missing.items()]
    summaries: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.is_done:
            summaries[run.name] = json.loads((run.folder / "summary.json").read_text())
            _add(cells.setdefault(run.cell.name, Outcome(run.cell)), run, summaries[run.name])
    if waiting := [run.name for run in runs if run.name not in summaries and run.name not in missing]:
        notes.append(f"Not run yet: {', '.join(waiting)}.")
    machines = sorted({f"{found['ranks']} x {found['device']}" for found in summaries.values()})
    return Outcomes(cells, machines, [*notes, *_doubts(runs, summaries, machines)])


def _add(outcome: Outcome, run: Run, summary: dict[str, Any]) -> None:
    scores = summary["after"] or {}
    average, passed = run.recipe.evaluation.headline()
    thresholds = _thresholds(run)
    outcome.thresholds[run.seed] = thresholds
    outcome.makers[run.seed] = makers(run)
    line = list(thresholds.values())
    values = {
        "before": (summary["before"] or {}).get(average),
        "average": scores.get(average),
        "passed": scores.get(passed),
        "length": summary["length_mean"],
        "tokens": summary["rollout_tokens"],
        "learned": summary.get("learned_tokens", summary["kept_tokens"]),
        "seconds": summary["training_seconds"],
        "flops": run_flops(run.recipe, run.folder, summary),
        "terminated": summary["terminated_share"],
        "ended": summary["terminated_share"] * summary["rollouts"],
        "recovered": summary["false_termination_share"],
        "graded": summary.get("audit_cut_graded") if summary["false_termination_share"] is not None else None,
        "first": line[0] if line else None,
        "highest": max(line) if line else None,
        "last": line[-1] if line else None,
        "ratio": line[-1] / line[0] if line and line[0] else None,
    }
    for key, value in values.items():
        if value is not None:
            outcome.figures.setdefault(key, {})[run.seed] = float(value)


def _thresholds(run: Run) -> dict[int, float]:
    """{step: threshold that its end has set}."""
    records = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["kat/threshold"] for record in records if "kat/threshold" in record}


def _doubts(runs: Sequence[Run], summaries: dict[str, dict[str, Any]], machines: list[str]) -> list[str]:
    """What makes runs less comparable than they should be."""
    notes = []
    done = [run for run in runs if run.name in summaries]
    for seed in sorted({run.seed for run in done}):
        before = {json.dumps(summaries[run.name]["before"], sort_keys=True) for run in done if run.seed == seed}
        if len(before) > 1:
            notes.append(
                f"The students of seed {seed} differ before training: models, problems or katds have changed between the runs. "
                "Remove their folders and run them again."
            )
    notes += _mixed_makers([(run, makers(run)) for run in done])
    if len(machines) > 1:
        notes.append(f"The runs were made on {' and '.join(machines)}: their times cannot be compared.")
    if len({run.seed for run in done}) < 3:
        notes.append("There are fewer than three seeds: intervals are very wide, or missing.")
    return notes


def _mixed_makers(done: Sequence[tuple[Run, list[Maker]]]) -> Iterator[str]:
    """What differs between the runs, or within one that was gone on with, and which runs it is."""
    for what in ("commit", "ranks", "processor"):
        names: dict[str, list[str]] = {}
        for run, found in done:
            for value in filter(None, dict.fromkeys(str(getattr(maker, what)) for maker in found)):
                names.setdefault(value, []).append(run.name)
        if len(names) > 1:
            each = "; ".join(f"{value}: {', '.join(runs)}" for value, runs in names.items())
            yield (
                f"The runs differ in {what} ({each}). Differences between cells may come from that; remove the folders of the odd ones and "
                "run them again."
            )
    if unknown := [run.name for run, found in done if not found]:
        yield f"It is not recorded which commit has made {', '.join(unknown)}."
