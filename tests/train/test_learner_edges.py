"""What an update makes of a reward that weighs nothing, of objectives that ask the teacher nothing, and of scores that are no numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import PlainStudent, learner, objective, plain, scored
from safetensors.torch import load_file, save_file
from whole_runs import train
from zoo import build_model, build_recipe

from katds.core.collective import Collective, Solo
from katds.core.objectives.base import Objective, Progress
from katds.core.objectives.rewarded import Rewarded
from katds.core.types import Field, RolloutBatch, Signal

KEPT = [9, 1, 0, 14, 6, 3, 0, 22, 5, 11]


@pytest.mark.parametrize(
    "name", ["reopold_second", "reopold_first", "tropd_left_out", "cross_tokenizer", "policy_gradient_clipped"]
)
def test_a_reward_that_weighs_nothing_changes_nothing(tmp_path: Path, name: str) -> None:
    """Also where the objective learns from some of the tokens only: its mean and its scalars are those of these."""
    student = plain(build_model(tmp_path / "student", seed=1, tied=True, vocabulary=70))
    teacher = plain(build_model(tmp_path / "teacher", seed=2, hidden=48, vocabulary=72))
    data = scored(student, teacher, KEPT)
    seen = []
    for weight in (0.0, 1e-12):
        learns = PlainStudent(student, Solo())
        updater = learner(name, learns, None, Solo(), 10**6)
        if weight:
            updater._objective = Rewarded(objective(name), weight, lambda rollout: float(rollout.id % 2))
        batch = data.batch(lambda _: True, updater._objective.needs, torch.float64)
        seen.append((updater.update(batch, data.requests, step=0), learns.updates[0]))
    (bare, gradient), (rewarded, same) = seen
    for key in ("loss", "kl", "entropy"):
        assert rewarded[key] == pytest.approx(bare[key], rel=1e-9), key
    assert rewarded["tokens"] == sum(KEPT)
    for key, value in gradient.items():
        torch.testing.assert_close(same[key], value, rtol=1e-7, atol=1e-10)


class OwnWords(Objective):
    """The likelihood of the student's tokens: nothing is asked of the teacher."""

    needs = frozenset()

    def __init__(self, half: bool) -> None:
        self._half = half

    def prepare(self, batch: RolloutBatch, progress: Progress, collective: Collective) -> dict[Field, torch.Tensor]:
        parts = [torch.arange(r.kept) < r.kept // 2 for r in batch.rollouts]
        return {Field.LEARNED: torch.cat(parts)} if self._half else {}

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        return {"loss": -logprobs_TV.gather(-1, actions_T[:, None]).sum()}


@pytest.mark.parametrize(("half", "hole", "learnt"), [(True, None, 11), (False, (0, 9), 15), (True, (0, 2), 9)])
def test_what_is_left_out_is_left_out_without_a_signal(tmp_path: Path, half: bool, hole: Any, learnt: int) -> None:
    student = plain(build_model(tmp_path / "student", seed=1, tied=True, vocabulary=70))
    kept = [9, 1, 14]
    data = scored(student, student, kept)
    updater = learner("policy_gradient", PlainStudent(student, Solo()), None, Solo(), 10**6)
    updater._objective = OwnWords(half)
    batch = data.batch(lambda _: True, frozenset(), torch.float64)
    assert not batch.signal
    batch.rollouts[0].hole = hole
    assert updater.update(batch, data.requests, step=0)["tokens"] == learnt


@pytest.mark.parametrize(
    "kind", [{"kind": "reopold", "switch": 1.0}, {"kind": "tropd", "outliers": "mask"}, {"kind": "policy_gradient"}]
)
def test_a_teacher_without_a_number_ends_the_run(tmp_path: Path, kind: dict[str, Any]) -> None:
    """A comparison with nan is false: without a check masks would leave its tokens out, and the run would go on learning nothing."""
    recipe = build_recipe(
        tmp_path, "nan",
        objective=kind, evaluation={"data": None}, checkpoint={"every": 0, "export": False},
        stop={"kind": "never"}, rollout={"top_p": 1.0}, run={"rollout_samples": 0},
    )  # fmt: skip
    recipe["stop"] = {"kind": "never"}
    file = tmp_path / "teacher" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(BaseException, match="in step 1 is not a number"):
        train(2, recipe)
