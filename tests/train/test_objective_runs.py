"""Every objective in a whole run, and one that katds has never heard of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import pytest
import torch
from whole_runs import records, train
from zoo import build_recipe

from katds.core.collective import Collective
from katds.core.objectives import OBJECTIVES
from katds.core.objectives.aligned import aligned, gathered
from katds.core.objectives.base import Objective, ObjectiveSettings, Progress
from katds.core.types import Field, Need, RolloutBatch, Signal

# Beside the kinds with their defaults; "more" are metrics that only this objective has.
CASES: dict[str, dict[str, Any]] = {kind: {"objective": {"kind": kind}} for kind in OBJECTIVES}
CASES["policy_gradient"]["objective"]["importance_weight"] = "clipped"
CASES["tropd"]["more"] = {"train/trusted"}
CASES["tropd, left out"] = {"objective": {"kind": "tropd", "outliers": "leave_out"}, "more": {"train/learned_share"}}
CASES["eopd"]["objective"]["entropy_gate"] = 3.6
CASES["eopd"]["more"] = {"train/undecided"}
CASES["reopold"]["objective"]["entropy_share"] = 0.5
CASES["reopold"]["more"] = {"train/learned_share"}
CASES["topd"]["objective"] |= {"horizon": 5, "budget": 1.0, "surface": 0.5}
CASES["topd"]["more"] = {"train/guided"}


def small_recipe(root: Path, objective: dict[str, Any], **train_settings: Any) -> dict[str, Any]:
    recipe = build_recipe(
        root, "run",
        objective=objective, evaluation={"data": None}, checkpoint={"every": 0, "export": False},
        rollout={"top_p": 1.0, "max_new_tokens": 16}, run={"rollout_samples": 0},
    )  # fmt: skip
    recipe["train"] |= {"steps": 3, **train_settings}
    if OBJECTIVES[objective["kind"]].teacher_writes:
        recipe["teacher"]["gather"] = "phase"
    return recipe


def steps_of(recipe: dict[str, Any], size: int) -> list[dict[str, Any]]:
    train(size, recipe)
    return records(Path(recipe["run"]["folder"]) / recipe["run"]["name"])


@pytest.mark.parametrize("kind", CASES)
def test_an_objective_runs_with_two_updates_a_step_on_two_ranks(tmp_path: Path, kind: str) -> None:
    case = CASES[kind]
    steps = steps_of(small_recipe(tmp_path, case["objective"], minibatches=2), 2)
    assert [record["step"] for record in steps] == [0, 1, 2]
    for record in steps:
        assert all(math.isfinite(value) for value in record.values())
        assert record["train/gradient_norm"] > 0 and record["loss/entropy"] > 0
        share = record["train/tokens"] / (record["rollout/kept_mean"] * 12)
        assert share == pytest.approx(record.get("train/learned_share", 1.0))
        for name in case.get("more", ()):
            assert 0 < record[name] < 1, name
    if kind == "reopold":  # the second phase is the last of the three steps
        shares = [record["train/learned_share"] for record in steps]
        tokens = [record["train/tokens"] / share for record, share in zip(steps, shares, strict=True)]
        # Two rollouts of a prompt begin with the same entropy: such ties at the edge both stay in.
        assert 0.5 - 0.6 / tokens[2] < shares[2] < 0.5 + 3 / tokens[2] and max(shares[:2]) < 0.4


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", [{}, {"embedding": "output", "cost": "euclidean", "solver": "exact"}], ids=["usual", "other"]
)
def test_near_futures_do_not_depend_on_the_number_of_ranks(tmp_path: Path, choice: dict[str, str]) -> None:
    """The real teacher writes on from the states of rollouts that it began."""
    runs = []
    for size in (1, 2):
        recipe = small_recipe(tmp_path, {**CASES["topd"]["objective"], "budget": 2.0, **choice}, steps=2)
        recipe["behaviour"] = {"kind": "teacher_prefix"}
        recipe["run"]["name"] = f"on-{size}"
        runs.append(steps_of(recipe, size))
    for one, two in zip(*runs, strict=True):
        assert one["topd/states"] == two["topd/states"] > 4
        for key in ("topd/teacher_tokens", "topd/surface_distance", "topd/divergent_distance", "train/guided"):
            assert one[key] == pytest.approx(two[key], rel=1e-6), key
        assert one["loss/total"] == pytest.approx(two["loss/total"], rel=1e-5)


class MineSettings(ObjectiveSettings):
    """As a user would write it, outside of katds."""

    kind: Literal["mine"] = "mine"
    every: int = 3


class Mine(Objective):
    """Cross-entropy with the teacher's best token, on every n-th token of a rollout."""

    Settings: ClassVar[type[ObjectiveSettings]] = MineSettings
    needs = frozenset({Need.TEACHER_TOP_K})
    teacher_top_k = 1

    def __init__(self, every: int) -> None:
        self._every = every

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        return cls(settings.every)

    def prepare(self, batch: RolloutBatch, progress: Progress, collective: Collective) -> dict[Field, torch.Tensor]:
        positions = [torch.arange(0), *(torch.arange(rollout.kept) for rollout in batch.rollouts)]
        return {Field.LEARNED: torch.cat(positions) % self._every == 0}

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        own_T = gathered(logprobs_TV, aligned(signal, Field.TEACHER_TOP_IDS, logprobs_TV)).squeeze(-1)
        return {"loss": -own_T.sum(), "hits": (logprobs_TV.argmax(-1) == actions_T).sum().float()}


def test_an_objective_from_outside_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "mine", Mine)
    recipe = small_recipe(tmp_path, {"kind": "mine", "every": 2}, steps=2)
    steps = steps_of(recipe, 2)
    assert [record["step"] for record in steps] == [0, 1]
    for record in steps:
        assert record["loss/total"] > 0 and record["train/gradient_norm"] > 0 and 0 <= record["train/hits"] <= 1
        assert 0.45 < record["train/tokens"] / (record["rollout/kept_mean"] * 12) < 0.65
    assert (tmp_path / "runs" / "run" / "config.yaml").read_text().count("kind: mine") == 1
