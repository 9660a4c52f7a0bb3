"""An objective that lets the teacher write, in whole runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import ValidationError
from test_behaviour_runs import recipe_of
from whole_runs import rankless, records, train

from katds.config import Recipe
from katds.core.collective import Collective
from katds.core.objectives import OBJECTIVES
from katds.core.objectives.base import ObjectiveSettings, Progress
from katds.core.objectives.reverse_kl import ReverseKl
from katds.core.types import Field, RolloutBatch


class CuriousSettings(ObjectiveSettings):
    kind: Literal["curious"] = "curious"
    support: str = "student_top_k"


class Curious(ReverseKl):
    """Weighs nothing, but reports how far the teacher's own continuations lie from the student's first words."""

    Settings: ClassVar[type[ObjectiveSettings]] = CuriousSettings
    teacher_writes = True
    _metrics: ClassVar[dict[str, float]] = {}

    def prepare(self, batch: RolloutBatch, progress: Progress, collective: Collective) -> dict[Field, torch.Tensor]:
        assert progress.teacher is not None
        own = [r for r in batch.rollouts if r.id % 3]
        prefixes = [[*r.request.prompt.token_ids, *r.full_ids[:2]] for r in own]
        written = progress.teacher.write(prefixes, [4] * len(own))
        embedded = progress.teacher.embed(torch.tensor([ids[0] for ids in written], dtype=torch.int64))
        numbers = [(r.id, *ids) for r, ids in zip(own, written, strict=True)]
        everyone = sorted(entry for part in collective.gather(numbers) for entry in part)
        sizes = torch.tensor([float(embedded.double().square().sum())], dtype=torch.float64)
        assert all(1 <= len(ids) <= 4 for ids in written)
        self._metrics["mine/checksum"] = float(sum(t * 7**i for _, *ids in everyone for i, t in enumerate(ids)))
        self._metrics["mine/size"] = float(collective.sum(sizes)) / max(1, len(everyone))
        return {}

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)


@pytest.mark.parametrize("behaviour", ["student", "teacher_prefix"])
def test_the_teacher_writes_for_an_objective_on_any_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    monkeypatch.setitem(OBJECTIVES, "curious", Curious)
    for size, gather in ((2, "phase"), (1, "once")):
        recipe = recipe_of(
            tmp_path, f"on-{size}", objective={"kind": "curious"}, teacher={"gather": gather},
            behaviour={"kind": behaviour}, checkpoint={"every": 0, "export": False},
        )  # fmt: skip
        recipe["train"]["steps"] = 2
        train(size, recipe)
    one, two = (records(tmp_path / "runs" / name) for name in ("on-2", "on-1"))
    assert len({record["mine/checksum"] for record in one}) == 2
    for ours, theirs in zip(one, two, strict=True):
        assert rankless(ours) == pytest.approx(rankless(theirs), rel=1e-4)
        assert ours["mine/checksum"] == theirs["mine/checksum"] and ours["mine/size"] > 0
        assert 0 < ours["time/learn/prepare/teacher writes"] < ours["time/learn"]


def test_it_needs_one_teacher_that_is_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "curious", Curious)
    recipe = recipe_of(tmp_path, "refused", objective={"kind": "curious"}, teacher={})
    with pytest.raises(ValidationError, match=re.escape("objective.kind curious lets the teacher write")):
        Recipe.model_validate(recipe)
    recipe["teacher"]["gather"] = "once"
    assert Recipe.model_validate(recipe).teacher_writes
    several: dict[str, Any] = recipe | {"teachers": {"other": recipe["teacher"]}}
    several["data"] = recipe["data"] | {"teacher_column": "domain"}
    with pytest.raises(ValidationError, match="lets the teacher write, which needs a single one, but teachers names"):
        Recipe.model_validate(several)
