"""A task reward beside an objective: whose outcome counts, against what, and with which gradient."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from local_ranks import run_local

from katds.core.collective import Solo
from katds.core.objectives import OBJECTIVES
from katds.core.objectives.base import Objective, Progress
from katds.core.objectives.policy_gradient import PolicyGradient
from katds.core.objectives.rewarded import Rewarded, leave_one_out
from katds.core.types import Cut, Field, Need, Prompt, Rollout, RolloutBatch, RolloutRequest

NOW = Progress(3, 10, 0)


def rollout(i: int, prompt: int, kept: int, reason: str = "eos") -> Rollout:
    cut = Cut(kept, kept, reason) if reason == "kat" else None
    return Rollout(RolloutRequest(i, Prompt(prompt, (1,)), 9), [5] * kept, kept, reason, cut)


ROLLOUTS = [
    rollout(0, 7, 2), rollout(1, 7, 3), rollout(2, 7, 4, "kat"), rollout(3, 7, 0, "length"),
    rollout(4, 8, 2), rollout(5, 9, 1, "kat"), rollout(6, 10, 2),
]  # fmt: skip
REWARDS = {0: 1.0, 1: 0.25, 2: 100.0, 3: 0.0, 4: 0.5, 5: 100.0, 6: 1.0}


def batch_of(rollouts: list[Rollout]) -> RolloutBatch:
    rows = sum(r.kept for r in rollouts)
    return RolloutBatch(rollouts, {Field.WRITTEN: torch.zeros(rows)} if rollouts else {})


def rewarded(weight: float = 0.5) -> Rewarded:
    return Rewarded(PolicyGradient(), weight, lambda r: REWARDS[r.id])


def test_an_outcome_counts_against_those_of_the_others() -> None:
    """Prompt 7: three rollouts with an outcome. Prompts 8 and 10 have one each, and are measured against the whole step."""
    objective = rewarded()
    made = objective.prepare(batch_of(ROLLOUTS), NOW, Solo())
    expected = {
        0: 1.0 - (0.25 + 0.0) / 2, 1: 0.25 - (1.0 + 0.0) / 2, 3: 0.0 - 1.25 / 2,
        4: 0.5 - (1.0 + 0.25 + 0.0 + 1.0) / 4, 6: 1.0 - (1.0 + 0.25 + 0.0 + 0.5) / 4,
    }  # fmt: skip
    rows = [expected.get(r.id, 0.0) for r in ROLLOUTS for _ in range(r.kept)]  # what a rule has ended has no outcome
    assert made[Field.REWARD].tolist() == pytest.approx(rows)
    assert objective.metrics()["reward/mean"] == pytest.approx((1.0 + 0.25 + 0.0 + 0.5 + 1.0) / 5)


def test_the_audit_group_changes_nothing() -> None:
    """What the rule would have ended has no more of an outcome than what it has ended."""
    made = []
    for reason in ("kat", "eos"):
        others = [r for r in ROLLOUTS if r.id != 2]
        watched = rollout(2, 7, 4, reason)
        watched.cut = Cut(4, 6, "kat")
        objective = rewarded()
        fields = objective.prepare(batch_of([*others, watched]), NOW, Solo())
        made.append((fields[Field.REWARD].tolist(), objective.metrics()))
    assert made[0] == made[1] and made[0][0][-4:] == [0.0] * 4


def test_a_lone_outcome_and_none_at_all_teach_nothing() -> None:
    assert leave_one_out([(0, 7, 3.0)]) == {0: 0.0} and leave_one_out([]) == {}
    objective = rewarded()
    made = objective.prepare(batch_of(ROLLOUTS[2:3]), NOW, Solo())
    assert made[Field.REWARD].tolist() == [0.0] * 4 and "reward/mean" not in objective.metrics()


@pytest.mark.parametrize("size", [2, 3, 8])
def test_whoever_wrote_a_rollout_its_advantage_is_the_same(size: int) -> None:
    draw = random.Random(size)
    many = [rollout(i, i // 3, draw.randint(0, 3), draw.choice(["eos", "eos", "kat"])) for i in range(30)]
    values = {r.id: draw.random() for r in many}

    def on_rank(rank: Any) -> tuple[dict[int, list[float]], Any]:
        mine = [r for r in many if (r.id * 5) % rank.size == rank.rank and rank.rank < 6]
        objective = Rewarded(PolicyGradient(), 1.0, lambda r: values[r.id])
        made = objective.prepare(batch_of(mine), NOW, rank)[Field.REWARD]
        assert made.dtype == torch.float32
        parts = made.split([r.kept for r in mine]) if mine else ()
        return {r.id: part.tolist() for r, part in zip(mine, parts, strict=True)}, objective.metrics()

    if size == 8:  # ranks 6 and 7 have written nothing
        many = [r for r in many if (r.id * 5) % 8 < 6]
    alone, metrics = on_rank(Solo())
    merged: dict[int, list[float]] = {}
    for part, seen in run_local(size, lambda rank: on_rank(rank)):
        merged |= part
        assert seen == metrics
    assert merged == alone


def test_the_gradient_is_that_of_both_formulas() -> None:
    """With the ratio inside, below and above its bounds, for advantages of either sign."""
    torch.manual_seed(0)
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    actions, teacher = torch.tensor([0, 1, 2, 3, 4, 0]), torch.randn(6, dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    own = z.log_softmax(-1)[range(6), actions]
    written = own.detach() + torch.tensor([0.0, 0.0, -1.0, -1.0, 1.0, 0.3], dtype=torch.float64)
    signal = {Field.SAMPLED: teacher, Field.WRITTEN: written, Field.REWARD: advantage}
    loss = rewarded(0.5).tile(z.log_softmax(-1), actions, signal)["loss"]
    (grad,) = torch.autograd.grad(loss, z)
    ratio = (own - written).exp()
    by_hand = ((own - teacher).detach() * own).sum() - 0.5 * torch.minimum(
        ratio * advantage, ratio.clamp(0.8, 1.28) * advantage
    ).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(by_hand, z)[0])


@pytest.mark.parametrize("kind", ["cross_tokenizer", "reopold"])
def test_tokens_without_a_word_of_the_teacher_keep_the_reward(kind: str) -> None:
    """Whichever tokens the objective leaves out: its own gradient is that of the others, and weighs as much as if these were all that the
    learner divides by; the reward's is that of all; also in tiles without any of its own."""
    torch.manual_seed(1)
    rows = sum(r.kept for r in ROLLOUTS)
    z = torch.randn(rows, 5, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(5, (rows,))
    own = z.detach().log_softmax(-1)[range(rows), actions]
    signal = {
        Field.WRITTEN: own + 0.1 * torch.randn(rows), Field.SAMPLED: own + torch.randn(rows) - 1.0,
        Field.STUDENT_ENTROPY: torch.rand(rows), Field.CHUNK_STUDENT: own, Field.CHUNK_TEACHER: own + torch.randn(rows),
        Field.CHUNK_TOKENS: torch.tensor([1, 0] * rows)[:rows].int(),
    }  # fmt: skip
    inner = [OBJECTIVES[kind].from_settings(OBJECTIVES[kind].Settings()) for _ in range(2)]
    objective = Rewarded(inner[0], 0.5, lambda r: REWARDS[r.id])
    made = objective.prepare(RolloutBatch(ROLLOUTS, signal), NOW, Solo())
    alone = inner[1].prepare(RolloutBatch(ROLLOUTS, signal), NOW, Solo())
    learned = alone.pop(Field.LEARNED)
    assert 0 < int(learned.sum()) < rows and Field.LEARNED not in made

    def grad(objective: Objective, fields: dict[Field, torch.Tensor], tiles: list[torch.Tensor]) -> torch.Tensor:
        losses = []
        for tile in tiles:
            part = {key: value[tile] for key, value in fields.items()}
            losses.append(objective.tile(z.log_softmax(-1)[tile], actions[tile], part)["loss"])
        return torch.autograd.grad(torch.stack(losses).sum(), z)[0]

    tiles = list(torch.arange(rows).split([2, 1, 1, rows - 4]))
    found = grad(objective, {**signal, **made}, tiles)
    reward = Rewarded(PolicyGradient(), 0.5, lambda r: REWARDS[r.id])
    of_both = grad(reward, {**signal, Field.REWARD: made[Field.REWARD]}, [torch.arange(rows)])
    of_reward = of_both - grad(PolicyGradient(), signal, [torch.arange(rows)])
    of_inner = grad(inner[1], {**signal, **alone}, [learned.nonzero().squeeze(-1)])
    assert of_reward[~learned].abs().sum() > 0.1
    torch.testing.assert_close(found / rows, of_inner / int(learned.sum()) + of_reward / rows)


def test_it_asks_for_what_both_need() -> None:
    assert rewarded().needs == {Need.SAMPLED, Need.WRITTEN}
    with pytest.raises(KeyError, match="reward"):
        rewarded().tile(
            torch.zeros(1, 2), torch.zeros(1).long(), {Field.SAMPLED: torch.zeros(1), Field.WRITTEN: torch.zeros(1)}
        )
