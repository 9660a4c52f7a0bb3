"""The record of how long rollouts were: `lengths.jsonl` of a run folder, one line per step. The stop rule `replay` reads it.

Only rollouts outside the audit group are in it: what the rule did, not what it would have done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from katds.core.collective import Collective
from katds.core.types import EOS, LENGTH, Rollout, RolloutRequest
from katds.errors import ConfigError

FILE = "lengths.jsonl"


@dataclass(frozen=True, slots=True)
class StepLengths:
    """The rollouts of one step over all ranks, in order of id; three lists of equal length.

    Where a rule ended a rollout, `lengths` holds the cut's `at`: all tokens that were written and count.
    """

    lengths: list[int]
    kept: list[int]
    reasons: list[str]

    def line(self, step: int) -> str:
        return json.dumps({"step": step, **asdict(self)}) + "\n"


def collect(
    rollouts: Sequence[Rollout], requests: Sequence[RolloutRequest], reasons: Sequence[str], collective: Collective
) -> StepLengths:
    """Collective: one sum of [4, len(requests)] int64. `requests` are the step's, `rollouts` those of this rank, `reasons`
    the rule's."""
    names = (EOS, LENGTH, *reasons)
    place = {request.id: i for i, request in enumerate(requests)}
    own = torch.zeros(4, len(requests), dtype=torch.int64)
    for rollout in rollouts:
        row = [len(rollout.response_ids), rollout.kept, names.index(rollout.reason), 1]
        own[:, place[rollout.id]] = torch.tensor(row)
    table = collective.sum(own)
    assert bool((table[3] == 1).all()), f"each rollout must be on one rank; counts are {table[3].unique().tolist()}"
    ruled = torch.tensor([not request.audit for request in requests], dtype=torch.bool)
    lengths, kept, codes, _ = table[:, ruled].tolist()
    return StepLengths(lengths, kept, [names[code] for code in codes])


def read(folder: Path) -> list[StepLengths]:
    """The steps that a run has recorded, first to last.

    Raises ConfigError: there is no such file, or a line is not of it (such as the last one of a run that was killed).
    """
    file = folder / FILE
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"stop.run: {file} cannot be read. Give the folder of a run; every run writes it.") from None
    steps = list(_parsed(file, lines))
    if not steps:
        raise ConfigError(f"stop.run: {file} holds no step. Give the folder of a run that has trained.")
    return steps


def _parsed(file: Path, lines: Iterable[str]) -> Iterable[StepLengths]:
    for number, line in enumerate(lines):
        try:
            record: dict[str, Any] = json.loads(line)
            step = StepLengths(record["lengths"], record["kept"], record["reasons"])
            whole = record["step"] == number and 0 < len(step.lengths) == len(step.kept) == len(step.reasons)
        except (json.JSONDecodeError, KeyError, TypeError):
            whole = False
        if not whole:
            raise ConfigError(
                f"stop.run: line {number + 1} of {file} is not the record of step {number}, or that step had no rollouts outside its "
                "audit group. Give the folder of a run that was not killed while it wrote, and with rollout.audit_fraction below 1."
            )
        yield step
