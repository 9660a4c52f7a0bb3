"""Plans of a recipe with several values of some settings, one row each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from katds.config import Recipe
from katds.errors import ConfigError
from katds.plan.advise import shortfalls
from katds.plan.hardware import GIB, Profile
from katds.plan.items import LEARN, ROLLOUT
from katds.plan.lengths import longest
from katds.plan.memory import memory
from katds.plan.planning import left_out, make_job
from katds.plan.reach import Reach, reach
from katds.plan.report import NOT_MODELLED, aligned
from katds.plan.simulate import simulate
from katds.plan.step_time import StepTime
from katds.plan.volume import Flow

ATTENTION = "learn: attention"


@dataclass(frozen=True)
class Row:
    """`refused`: why there is nothing else. `left_out`: what the plan does not count."""

    values: tuple[str, ...]
    refused: str = ""
    rollout: int = 0
    learning: int = 0
    fits: bool = False
    step: StepTime | None = None
    reach: Reach | None = None
    left_out: tuple[str, ...] = ()


def parse(text: str) -> tuple[str, list[str]]:
    """SETTING=VALUE,VALUE. Raises ConfigError."""
    name, _, values = text.partition("=")
    if not name or not all(values.split(",")):
        raise ConfigError(f"--sweep is {text!r}. Write --sweep SECTION.SETTING=VALUE,VALUE.")
    return name, values.split(",")


def sweep(
    settings: Sequence[tuple[str, Sequence[str]]], read: Callable[[list[str]], Recipe], profile: Profile, ranks: int
) -> list[Row]:
    """`read`: the recipe with further flags. Every response is as long as it may be. Cost: some ten
    seconds for a row of large models, less where others have asked for the same."""
    rows = []
    for values in itertools.product(*(values for _, values in settings)):
        flags = [word for (name, _), value in zip(settings, values, strict=True) for word in (f"--{name}", value)]
        recipe = read(flags)
        try:
            job = make_job(recipe, profile, ranks, longest(recipe))
        except ConfigError as error:
            rows.append(Row(values, str(error)))
            continue
        found = memory(job)
        rows.append(
            Row(
                values,
                "",
                found.peak(ROLLOUT)[0],
                found.peak(LEARN)[0],
                not shortfalls(job, found, profile),
                simulate(job, profile, *job.drawn),
                reach(job, profile),
                tuple(left_out(job)),
            )
        )
    return rows


def text(names: Sequence[str], rows: Sequence[Row], profile: Profile, ranks: int) -> str:
    head = (
        *names, "rollout GiB", "learn GiB", "fits", "step [s]", "learn [s]", "attention GiB", "attention [s]", "fixed GiB", "kB/token",
        "longest learnt", "longest written",
    )  # fmt: skip
    lines = [
        f"on {ranks} x {profile.name}, {profile.usable / GIB:.1f} GiB of each for a run: predicted, not measured",
        "attention: what ranks that share micro-batches move of it in a step. fixed, kB/token: learning's memory near the longest rollout",
        "that a rank, or the ranks that share it, can learn from; the longest written is what one slot has room for",
        "",
    ]
    cells = [head, *(_cells(row, len(head) - len(names)) for row in rows)]
    lines += aligned(cells, "l" * len(names) + ">" * (len(head) - len(names)))
    lines += [f"{', '.join(row.values)}: {row.refused}" for row in rows if row.refused]
    return "\n".join([*lines, *_left_out(rows), NOT_MODELLED])


def _left_out(rows: Sequence[Row]) -> list[str]:
    """Once what is so of every row that is not refused; else with the row."""
    planned = [row for row in rows if not row.refused]
    every = dict.fromkeys(line for row in planned for line in row.left_out)
    common = [line for line in every if all(line in row.left_out for row in planned)]
    own = [f"{', '.join(row.values)}: {line}" for row in planned for line in row.left_out if line not in common]
    return [*common, *own]


def _cells(row: Row, width: int) -> tuple[str, ...]:
    if row.step is None or row.reach is None:
        return (*row.values, "refused", *[""] * (width - 1))
    flow, seconds = row.step.flows.get(ATTENTION, Flow()), row.step.wire.get(ATTENTION, 0.0)
    attention = (f"{flow.received / GIB:.3g}", f"{seconds:.3g}") if flow.calls else ("", "")
    found = row.reach
    return (
        *row.values, f"{row.rollout / GIB:.1f}", f"{row.learning / GIB:.1f}",
        "yes" if row.fits else "no", f"{row.step.total:.1f}",
        f"{row.step.seconds.get('learn', 0.0):.1f}", *attention, f"{found.fixed / GIB:.1f}", f"{found.per_token / 1e3:.0f}",
        *("-" if tokens is None else f"{tokens:,}" for tokens in (found.learnt, found.written)),
    )  # fmt: skip


def as_json(names: Sequence[str], rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) | {"values": dict(zip(names, row.values, strict=True))} for row in rows]
