"""What a run folder says, of a run that is finished, still going or broken off."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from katds.analysis.records import Record, read_records
from katds.cli import read_recipe
from katds.errors import ConfigError

PHASES = ("rollout", "learn", "report")  # one training step; evaluations and checkpoints are counted apart


class Curve(NamedTuple):
    """A number over training. `steps` counts finished steps: what step k wrote, which counts from 0, stands at k + 1."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Run:
    """A run folder, read once.

    Attributes:
        name: what the page calls it.
        recipe: config.yaml, as it is: a recipe of an older version is not refused.
        steps: the metrics of every training step, by finished steps.
        evaluations: scores without `eval/`, by finished steps.
        summary: summary.json, which a run writes at its end; None before, and where the run has gone on since with more steps.
    """

    folder: Path
    name: str
    recipe: dict[str, Any]
    steps: dict[int, Record] = field(default_factory=dict)
    evaluations: dict[int, Record] = field(default_factory=dict)
    summary: Record | None = None

    def setting(self, path: str, default: Any = None) -> Any:
        """A setting of the recipe by its dotted path."""
        value: Any = self.recipe
        for key in path.split("."):
            if not isinstance(value, dict) or key not in value:
                return default
            value = value[key]
        return value

    def curve(self, key: str) -> Curve:
        return _curve(self.steps, key)

    def scores(self, key: str) -> Curve:
        return _curve(self.evaluations, key)

    def last(self, key: str) -> float | None:
        """The newest value of a metric, if any step has it."""
        values = self.curve(key).values
        return values[-1] if values else None

    @property
    def done(self) -> int:
        """Finished steps."""
        return max(self.steps, default=0)

    @property
    def rule(self) -> str:
        """What the rule is called in a sentence."""
        kind = str(self.setting("stop.kind", "the rule"))
        return "KAT" if kind == "kat" else f"the rule {kind}"

    @property
    def rollouts_per_step(self) -> int:
        return int(self.setting("rollout.prompts_per_step", 0)) * int(self.setting("rollout.samples_per_prompt", 1))

    @property
    def score(self) -> str | None:
        """The evaluation's headline: the average over benchmarks where there are several, else avg@n."""
        names = [name for scores in self.evaluations.values() for name in scores]
        found = [name for name in names if "avg@" in name and not name.endswith(("_low", "_high"))]
        return "average/avg@k" if "average/avg@k" in found else next(iter(found), None)

    @property
    def rules(self) -> list[dict[str, Any]]:
        """The sections of all stop rules: several with stop.kind first_of."""
        stop = self.setting("stop", {})
        return list(stop.get("rules") or [stop])

    @property
    def windows(self) -> list[int]:
        """The widths of the KL windows that the stop rule looks at, in tokens; empty for a rule without windows."""
        return [int(rule["window"]) for rule in self.rules if "window" in rule]

    def cumulative_tokens(self) -> Curve:
        """Rollout tokens written so far: lengths are recorded as means over the rollouts of a step, whose number is fixed."""
        lengths, total, values = self.curve("rollout/length_mean"), 0.0, []
        for mean in lengths.values:
            total += mean * self.rollouts_per_step
            values.append(total)
        return Curve(lengths.steps, values)


def owner(run: Run, runs: Sequence[Run]) -> str:
    """How a title begins that is about one of several runs."""
    return f"{run.name}: " if len(runs) > 1 else ""


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each with a name of its own.

    Raises ConfigError: a folder that is no run, or holds no finished step yet.
    """
    short = [folder.resolve().name for folder in folders]
    names = [str(folder) if short.count(name) > 1 else name for folder, name in zip(folders, short, strict=True)]
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} is no run folder: it has no config.yaml. Give runs/NAME as launch/train.py made it."
        )
    steps: dict[int, Record] = {}
    evaluations: dict[int, Record] = {}
    for at, scores, metrics in map(_parted, read_records(folder / "metrics.jsonl")):
        if scores:
            evaluations.setdefault(at, {}).update(scores)
        if metrics:
            steps.setdefault(at + 1, {}).update(metrics)
    if not steps:
        raise ConfigError(f"{folder}/metrics.jsonl holds no finished step. Ask again once the run has written one.")
    recipe = read_recipe(folder / "config.yaml")
    summary = _summary(folder / "summary.json")
    if summary is not None and summary.get("steps", max(steps)) < max(steps):
        summary = None  # of its first end
    return Run(folder, name, recipe, _sorted(steps), _sorted(evaluations), summary)


def _parted(record: Record) -> tuple[int, Record, Record]:
    """The step of a line of metrics.jsonl, its scores and its other numbers."""
    numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
    scores = {key.removeprefix("eval/"): value for key, value in numbers.items() if key.startswith("eval/")}
    return int(record.get("step", 0)), scores, {k: v for k, v in numbers.items() if not k.startswith("eval/")}


def _sorted(records: dict[int, Record]) -> dict[int, Record]:
    return dict(sorted(records.items()))


def _summary(path: Path) -> Record | None:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def _curve(records: dict[int, Record], key: str) -> Curve:
    known = [(step, record[key]) for step, record in records.items() if key in record]
    return Curve([step for step, _ in known], [value for _, value in known])


def spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of these steps, evenly: the first and the last among them."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)] if count > 1 else [steps[-1]]


def timeline(run: Run, wanted: Sequence[int]) -> Iterator[tuple[int, Record]]:
    """The lines of timeline.jsonl of some steps, by finished steps; of none where a run wrote no such file."""
    path = run.folder / "timeline.jsonl"
    known = sorted({int(record["step"]) + 1 for record in read_records(path) if "ranks" in record})
    chosen = set(wanted or spread(known, 3))
    found = {int(r["step"]) + 1: r for r in read_records(path) if "ranks" in r and int(r["step"]) + 1 in chosen}
    yield from sorted(found.items())
