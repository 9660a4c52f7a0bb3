"""TrOPD's off-policy guidance: the teacher's own tokens before a response are learnt from as the formula says, and in no other way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from formulas import Moment, Tokens, _forward_kl, step_losses, trusted
from local_ranks import LocalRank, run_local
from test_objectives import K, V, scored

from katds.core.collective import Solo
from katds.core.objectives.base import Progress
from katds.core.objectives.rewarded import Rewarded
from katds.core.objectives.rows import outside_holes
from katds.core.objectives.sampled import Clip
from katds.core.objectives.tropd import OUTLIERS, Tropd, TropdSettings
from katds.core.teacher_signal import score_tile
from katds.core.types import LENGTH, Field, Need, Prompt, Rollout, RolloutBatch, RolloutRequest

NOW = Progress(step=3, steps=10, seed=4)
BETA = 0.3
SHAPES = ((3, 4), (0, 5), (6, 0), (2, 9), (5, 1))  # tokens of prefix and response
TEACHERS, OWN = map(sum, zip(*SHAPES, strict=True))
TOTAL = TEACHERS + OWN


def tropd(outliers: str = "forward_kl", guidance: float = BETA, own_mean: bool = True) -> Tropd:
    return Tropd(outliers, -1.72, Clip(0.2, 0.28), guidance, own_mean)


def guided_rows() -> torch.Tensor:
    return torch.cat([torch.arange(prefix + kept) < prefix for prefix, kept in SHAPES])


def guided(
    needs: frozenset[Need], teacher_ids: Any = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, RolloutBatch]:
    """Student logits, teacher, actions and the rows as the engine gives them: poison wherever nothing was scored."""
    z, q, actions, signal = scored(needs, TOTAL)
    mask = guided_rows()
    for key in (Field.SAMPLED, Field.WRITTEN):
        signal[key] = signal[key].masked_fill(mask, torch.nan)
    if Need.TEACHER_TOP_K not in needs:
        signal |= score_tile(q, actions, None, frozenset({Need.TEACHER_TOP_K}), K)
        signal[Field.TEACHER_TOP] = signal[Field.TEACHER_TOP].masked_fill(~mask[:, None], torch.nan)
        signal[Field.TEACHER_TOP_IDS] = signal[Field.TEACHER_TOP_IDS] * mask[:, None]
    signal[Field.GUIDED] = mask
    rollouts, at = [], 0
    for i, (prefix, kept) in enumerate(SHAPES):
        ids = actions[at : at + prefix + kept].tolist()
        at += prefix + kept
        request = RolloutRequest(20 + i, Prompt(i, (1,)), 99)
        rollouts.append(Rollout(request, ids[prefix:], kept, LENGTH, prefix=tuple(ids[:prefix]), guided=True))
    return z, q, actions, RolloutBatch(rollouts, signal)


def by_hand(
    outliers: str, own_mean: bool, z: torch.Tensor, q: torch.Tensor, actions: torch.Tensor, moved: torch.Tensor
) -> torch.Tensor:
    """The step's loss, a sum that is to be divided by the student's tokens: responses as without guidance, and beta times the mean forward
    KL on prefixes; this weight, rounded to float32, is the only thing that is."""
    settings = SimpleNamespace(outliers=outliers, reward_floor=-1.72, clip_low=0.2, clip_high=0.28)
    total, p, at, counted = torch.zeros((), dtype=torch.float64), z.log_softmax(-1), 0, 0
    guidance = torch.zeros((), dtype=torch.float64)
    for i, (prefix, kept) in enumerate(SHAPES):
        parts = [
            Tokens(20 + i, p[rows], q[rows], actions[rows], moved[rows], torch.zeros(0))
            for rows in (slice(at, at + prefix), slice(at + prefix, at + prefix + kept))
        ]
        at += prefix + kept
        guidance = guidance + _forward_kl(parts[0], K).sum()
        ((loss, learned),) = step_losses("tropd", settings, parts[1:], Moment(NOW.step, NOW.steps, NOW.seed), K)
        total, counted = total + loss[learned].sum(), counted + int(learned.sum())
    assert (counted < OWN) == (outliers == "leave_out")
    return total + float(np.float32(BETA * counted / TEACHERS if own_mean else BETA)) * guidance


@pytest.mark.parametrize("own_mean", [True, False])
@pytest.mark.parametrize("outliers", OUTLIERS)
def test_gradient_is_that_of_the_formula(outliers: str, own_mean: bool) -> None:
    objective = tropd(outliers, own_mean=own_mean)
    z, q, actions, batch = guided(objective.needs)
    clean = scored(objective.needs, TOTAL)[3]
    signal = batch.signal | objective.prepare(batch, NOW, Solo())
    sums = objective.tile(z.log_softmax(-1), actions, signal)
    expected = by_hand(outliers, own_mean, z, q, actions, clean[Field.WRITTEN])
    torch.testing.assert_close(sums["loss"], expected, rtol=1e-13, atol=1e-13)
    right, own = (torch.autograd.grad(value, z, retain_graph=True)[0] for value in (expected, sums["loss"]))
    torch.testing.assert_close(own, right, rtol=0, atol=1e-13)
    assert (right[guided_rows()].abs().amax(-1) > 1e-3).all(), "the prefixes have no gradient: the test is idle"

    p, mask = z.detach().log_softmax(-1), guided_rows()
    chosen = actions[:, None]
    kl = (p.gather(-1, chosen) - q.gather(-1, chosen))[:, 0][~mask].sum()
    assert sums["kl"].item() == pytest.approx(kl.item(), abs=1e-12)
    assert sums["entropy"].item() == pytest.approx(-(p.exp() * p).sum(-1)[~mask].sum().item(), rel=1e-12)
    assert sums["trusted"] == signal[Field.TRUSTED].sum() and not signal[Field.TRUSTED][mask].any()


@pytest.mark.parametrize("outliers", OUTLIERS)
def test_tiles_of_either_kind_alone_add_up(outliers: str) -> None:
    objective = tropd(outliers)
    z, _, actions, batch = guided(objective.needs)
    signal = batch.signal | objective.prepare(batch, NOW, Solo())
    logprobs = z.log_softmax(-1)
    whole = objective.tile(logprobs, actions, signal)
    parts = [
        objective.tile(logprobs[rows], actions[rows], {key: value[rows] for key, value in signal.items()})
        for rows in (slice(0, 3), slice(3, 7), slice(7, 12), slice(12, TOTAL))
    ]
    for key, value in whole.items():
        torch.testing.assert_close(sum(part[key] for part in parts), value, rtol=1e-13, atol=1e-13)


def test_beta_weighs_means_over_the_whole_step() -> None:
    """Whoever holds which rollout, if any; tokens in a hole are not counted. Here the teacher wrote most of the step."""
    _, _, _, batch = guided(tropd().needs)
    batch.rollouts[3].hole, batch.rollouts[1].hole = (4, 7), (0, 50)
    counted = OWN - 3 - 5
    bounds = np.cumsum([0, *map(sum, SHAPES)])

    def job(rank: LocalRank) -> list[Any]:
        mine = range(rank.rank - 1, len(SHAPES), rank.size - 1) if rank.rank else range(0)
        rows = torch.tensor([t for i in mine for t in range(bounds[i], bounds[i + 1])], dtype=torch.int64)
        signal = {key: value[rows] for key, value in batch.signal.items()} if mine else {}
        made = tropd().prepare(RolloutBatch([batch.rollouts[i] for i in mine], signal), NOW, rank)
        assert len(made[Field.WEIGHT]) == len(rows)
        return list(zip(rows.tolist(), made[Field.WEIGHT].tolist(), strict=True))

    for size in (2, 3, 7):
        weights = dict(entry for part in run_local(size, job) for entry in part)
        mask = guided_rows().tolist()
        assert weights == {t: np.float32(BETA * counted / TEACHERS) if mask[t] else 1.0 for t in range(TOTAL)}


def test_without_a_teacher_s_token_nothing_is_weighed() -> None:
    """Though the step before had some."""
    _, _, _, batch = guided(tropd().needs)
    batch.signal.pop(Field.GUIDED)
    for rollout in batch.rollouts:
        rollout.response_ids, rollout.kept = [*rollout.prefix, *rollout.response_ids], rollout.rows
        rollout.prefix, rollout.guided = (), False
    assert tropd().prepare(batch, NOW, Solo()).keys() == {Field.TRUSTED}


def test_trust_does_not_depend_on_prefixes() -> None:
    """The same draws for the same responses, as by hand."""
    objective = tropd()
    _, q, actions, batch = guided(objective.needs)
    clean = scored(objective.needs, TOTAL)[3]
    made = objective.prepare(batch, NOW, Solo())[Field.TRUSTED]
    at = 0
    for rollout in batch.rollouts:
        own = slice(at + rollout.prefix_rows, at + rollout.rows)
        at += rollout.rows
        tokens = Tokens(rollout.id, q[own], q[own], actions[own], clean[Field.WRITTEN][own], torch.zeros(0))
        assert made[own].tolist() == trusted(tokens, Moment(NOW.step, NOW.steps, NOW.seed)).tolist()


def test_a_reward_is_for_what_the_student_wrote() -> None:
    inner, weight = tropd(), 0.7
    objective = Rewarded(inner, weight, lambda rollout: float(rollout.id % 2))
    assert objective.reads_prefix and not Rewarded(tropd(guidance=0.0), weight, lambda _: 0.0).reads_prefix
    z, _, actions, batch = guided(objective.needs)
    signal = batch.signal | objective.prepare(batch, NOW, Solo())
    whole = objective.tile(z.log_softmax(-1), actions, signal)["loss"]
    base = inner.tile(z.log_softmax(-1), actions, signal)["loss"]
    gradients = [torch.autograd.grad(value, z, retain_graph=True)[0] for value in (whole, base)]
    changed = (gradients[0] - gradients[1]).abs().amax(-1) > 1e-9
    assert gradients[0].isfinite().all()
    assert not changed[guided_rows()].any() and changed[~guided_rows()].float().mean() > 0.5


def test_a_hole_is_counted_from_the_first_token_of_the_response() -> None:
    batch = guided(tropd().needs)[3]
    batch.rollouts[3].hole, batch.rollouts[4].hole = (4, 7), (0, 50)
    learned, at = outside_holes(batch.rollouts), 0
    missing = [row for row, kept in enumerate(learned.tolist()) if not kept]
    at = sum(map(sum, SHAPES[:3])) + SHAPES[3][0]
    assert missing == [at + 4, at + 5, at + 6, TOTAL - 1]


def test_guidance_of_zero_leaves_prefixes_alone() -> None:
    assert not tropd(guidance=0.0).reads_prefix and tropd().reads_prefix
    assert TropdSettings().guidance == 0.001 and Tropd.from_settings(TropdSettings()).reads_prefix
    assert V > K
