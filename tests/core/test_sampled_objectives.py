"""What is special about each objective on sampled tokens, beside the contract and the formulas of test_objectives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_ranks import LocalRank, run_local
from test_objectives import CASES, scored, written

from katds.core.collective import Solo
from katds.core.counter import key, uniforms
from katds.core.objectives import OBJECTIVES
from katds.core.objectives.base import Progress
from katds.core.objectives.clipped import clipped_policy_gradient
from katds.core.objectives.cross_tokenizer import CrossTokenizer, advantages
from katds.core.objectives.eopd import Eopd
from katds.core.objectives.highest import highest
from katds.core.objectives.iw_opd import IwOpd
from katds.core.objectives.policy_gradient import PolicyGradient
from katds.core.objectives.reopold import Reopold
from katds.core.objectives.sampled import Clip
from katds.core.objectives.tropd import OUTLIERS, Tropd
from katds.core.types import Field, Need, RolloutBatch

CLIP = Clip(0.2, 0.28)
NOW = Progress(2, 10, 7)
SAMPLED = [kind for kind, objective in OBJECTIVES.items() if "clip_low" in objective.Settings.model_fields]


# The clipped surrogate.


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "slope"),
    [
        (0.0, 2.0, 1.0), (0.0, -2.0, 1.0),
        (0.2, 2.0, math.exp(0.2)), (-0.2, -2.0, math.exp(-0.2)),
        (0.3, 2.0, 0.0), (-0.3, -2.0, 0.0),  # has moved far enough
        (0.3, -2.0, math.exp(0.3)), (-0.3, 2.0, math.exp(-0.3)),  # has moved the wrong way
        (0.3, 0.0, 0.0),
    ],
)  # fmt: skip
def test_the_clip_stops_what_has_moved_far_enough(log_ratio: float, advantage: float, slope: float) -> None:
    """d loss / d log p = -slope x advantage."""
    logprob = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    loss = clipped_policy_gradient(logprob, logprob.detach() - log_ratio, torch.tensor([advantage]), *CLIP)
    loss.sum().backward()
    assert logprob.grad is not None and logprob.grad.item() == pytest.approx(-slope * advantage, abs=1e-12)


def test_importance_weights_make_up_for_updates_since_writing() -> None:
    """Over y ~ p_written the policy gradient's expectation is still the exact gradient of KL(p || q) of the present p."""
    z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, old = z[1].log_softmax(-1), z[2].log_softmax(-1)
    leaf = z[0].clone().requires_grad_()
    p = leaf.log_softmax(-1)
    (exact,) = torch.autograd.grad((p.exp() * (p - q)).sum(), leaf, retain_graph=True)
    for clip, right in ((Clip(1.0, 1e9), True), (None, False)):
        total = torch.zeros_like(exact)
        for y in range(5):
            signal = {Field.SAMPLED: q[y : y + 1], Field.WRITTEN: old[y : y + 1]}
            loss = PolicyGradient(clip).tile(leaf.log_softmax(-1)[None], torch.tensor([y]), signal)["loss"]
            total += old[y].exp() * torch.autograd.grad(loss, leaf)[0]
        assert bool((total - exact).abs().max() < 1e-12) is right


@pytest.mark.parametrize("kind", SAMPLED)
def test_filtered_sampling_is_refused_and_several_updates_are_not(kind: str) -> None:
    settings = OBJECTIVES[kind].Settings()
    with pytest.raises(ValueError, match=rf"objective\.kind {kind} is biased.*rollout\.top_p to 1"):
        settings.check(filtered=True, minibatches=1)
    if kind == "policy_gradient":
        with pytest.raises(ValueError, match=r"train\.minibatches 4.*objective\.importance_weight to clipped"):
            settings.check(filtered=False, minibatches=4)
        settings = settings.model_copy(update={"importance_weight": "clipped"})
    settings.check(filtered=False, minibatches=4)


@pytest.mark.parametrize("kind", SAMPLED)
def test_another_writer_than_the_student_is_made_up_for_or_refused(kind: str) -> None:
    settings = OBJECTIVES[kind].Settings()
    if kind in ("tropd", "reopold", "iw_opd", "cross_tokenizer"):
        with pytest.raises(ValueError, match=rf"objective\.kind {kind} .*behaviour\.kind to student"):
            settings.check(filtered=False, minibatches=1, blended=True)
    elif kind == "policy_gradient":
        with pytest.raises(ValueError, match=r"objective\.importance_weight to clipped"):
            settings.check(filtered=False, minibatches=1, blended=True)
        settings.model_copy(update={"importance_weight": "clipped"}).check(filtered=False, minibatches=1, blended=True)
    else:
        settings.check(filtered=False, minibatches=1, blended=True)
        with pytest.raises(ValueError, match=r"objective\.reward_of is written, but behaviour\.kind"):
            settings.model_copy(update={"reward_of": "written"}).check(filtered=False, minibatches=1, blended=True)


def test_every_objective_on_sampled_tokens_knows_that_it_is_one() -> None:
    told = {Need.SAMPLED, Need.CHUNKS}
    asks = {case.kind for case in CASES.values() if told & OBJECTIVES[case.kind].from_settings(case).needs}
    assert set(SAMPLED) == asks


# `prepare`, on any rank.

KEPT = (5, 0, 9, 1, 3, 17, 0, 2, 8)
OWNERS = {
    "spread": lambda i, size: i % size,
    "one_rank": lambda i, size: size - 1,  # the others wrote nothing
    "backwards": lambda i, size: (len(KEPT) - i) % size,
}


def part_of(whole: RolloutBatch, mine: list[int]) -> RolloutBatch:
    """What a rank that wrote these rollouts holds, in this order."""
    starts = np.cumsum([0, *KEPT])
    rows = torch.tensor([row for i in mine for row in range(starts[i], starts[i + 1])], dtype=torch.int64)
    rollouts = [whole.rollouts[i] for i in mine]
    return RolloutBatch(rollouts, {k: v[rows] for k, v in whole.signal.items()} if mine else {})


def by_rollout(objective: Any, batch: RolloutBatch, progress: Progress, collective: Any) -> dict[int, Any]:
    made = objective.prepare(batch, progress, collective)
    counts = [rollout.kept for rollout in batch.rollouts]
    assert all(len(value) == sum(counts) for value in made.values())
    parts = {key: value.split(counts) for key, value in made.items()}
    return {r.id: {key: part[i].tolist() for key, part in parts.items()} for i, r in enumerate(batch.rollouts)}


@pytest.mark.parametrize("step", [0, 9])
@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].kind in SAMPLED])
def test_fields_do_not_depend_on_who_wrote_what(name: str, owner: str, step: int) -> None:
    case, progress = CASES[name], Progress(step, 10, 3)
    signal = scored(OBJECTIVES[case.kind].from_settings(case).needs, sum(KEPT), torch.float32)[3]
    whole = written(KEPT, signal)
    alone = OBJECTIVES[case.kind].from_settings(case)
    expected = by_rollout(alone, whole, progress, Solo())
    for size in (2, 3, 12):  # 12: more ranks than rollouts

        def job(rank: LocalRank) -> Any:
            mine = [i for i in range(len(KEPT)) if OWNERS[owner](i, rank.size) == rank.rank][::-1]
            objective = OBJECTIVES[case.kind].from_settings(case)
            return by_rollout(objective, part_of(whole, mine), progress, rank), objective.metrics()

        merged: dict[int, Any] = {}
        for fields, metrics in run_local(size, job):
            merged |= fields
            assert metrics == alone.metrics()
        assert merged == expected


def test_a_step_in_which_nothing_was_kept_has_fields_without_rows() -> None:
    for kind in SAMPLED:
        objective = OBJECTIVES[kind].from_settings(OBJECTIVES[kind].Settings())
        for batch in (RolloutBatch([], {}), written((0, 0), scored(objective.needs, 0)[3])):
            assert all(len(value) == 0 for value in objective.prepare(batch, Progress(9, 10, 0), Solo()).values())


# TrOPD.


def draws(rollouts: int, length: int, p: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    """Tokens of p as the sampler draws them: from the hash of seed, step, rollout and position."""
    keys = torch.tensor([key(seed, step, 20 + i) for i in range(rollouts)])
    u = uniforms(keys[:, None], torch.arange(length))
    return (u[..., None].double() > p.cumsum(0)).sum(-1).clamp(max=len(p) - 1).flatten()


def test_a_token_is_trusted_as_often_as_the_teacher_would_have_it() -> None:
    """P(M = 1 | y) = min(q/p, 1) for every y although y itself comes from the same seed, step, rollout and position; on average
    sum_v min(p, q) = 1 - TV(p, q)."""
    rollouts, length, size = 150, 1000, 7
    logits = torch.randn(2, size, generator=torch.Generator().manual_seed(3))
    p, q = logits.double().log_softmax(-1)
    actions = draws(rollouts, length, p.exp(), NOW.step, NOW.seed)
    batch = written((length,) * rollouts, {Field.SAMPLED: q[actions].float(), Field.WRITTEN: p[actions].float()})
    trusted = Tropd("mask", 0.0, CLIP).prepare(batch, NOW, Solo())[Field.TRUSTED]
    for y in range(size):
        share, count = (q[y] - p[y]).exp().clamp(max=1).item(), int((actions == y).sum())
        deviation = math.sqrt(share * (1 - share) / count)
        assert trusted[actions == y].double().mean().item() == pytest.approx(share, abs=5 * deviation + 1e-12)
    overlap = torch.minimum(p.exp(), q.exp()).sum().item()
    assert overlap == pytest.approx(1 - 0.5 * (p.exp() - q.exp()).abs().sum().item())
    assert 0.2 < overlap < 0.9
    assert trusted.double().mean().item() == pytest.approx(overlap, abs=5 / math.sqrt(4 * rollouts * length))


@pytest.mark.parametrize("other", [Progress(3, 10, 7), Progress(2, 10, 8)])
def test_trust_is_drawn_anew_in_every_step_and_run(other: Progress) -> None:
    half = {Field.SAMPLED: torch.full((400,), -1 - math.log(2)), Field.WRITTEN: torch.full((400,), -1.0)}
    one, two = (
        Tropd("mask", 0.0, CLIP).prepare(written((400,), half), at, Solo())[Field.TRUSTED] for at in (NOW, other)
    )
    assert 150 < (one == two).sum() < 250  # 200 of independent draws, 5 deviations of 10


@pytest.mark.parametrize("outliers", OUTLIERS)
def test_a_token_that_the_teacher_excludes_leaves_the_gradient_finite(outliers: str) -> None:
    objective = Tropd(outliers, -1.72, CLIP)
    z, _, actions, signal = scored(objective.needs)
    signal[Field.SAMPLED][0] = -math.inf  # at ratio 1
    made = objective.prepare(written((7,), signal), NOW, Solo())
    assert not made[Field.TRUSTED][0]
    sums = objective.tile(z.log_softmax(-1), actions, signal | made)
    (gradient,) = torch.autograd.grad(sums["loss"], z)
    assert gradient.isfinite().all()
    assert bool(gradient[0].abs().max() > 0) == (outliers not in ("mask", "leave_out"))
    assert sums["trusted"].item() == made[Field.TRUSTED].sum()


# EOPD.


def test_forward_kl_is_added_above_the_gate_only() -> None:
    z, _, actions, signal = scored(Eopd.needs)
    signal[Field.ENTROPY] = torch.tensor([0.0, 0.79, 0.8, 0.81, 3.0, 0.0, 0.8], dtype=torch.float64)

    def gradient(gate: float) -> torch.Tensor:
        return torch.autograd.grad(Eopd(gate, CLIP).tile(z.log_softmax(-1), actions, signal)["loss"], z)[0]

    never, published, always = gradient(9.0), gradient(0.8), gradient(-1.0)
    above = torch.tensor([False, False, False, True, True, False, False])
    assert torch.equal(published[above], always[above]) and torch.equal(published[~above], never[~above])
    assert ((always - never).abs().amax(-1) > 0.01).all()
    assert Eopd(0.8, CLIP).tile(z.log_softmax(-1), actions, signal)["undecided"].item() == 2


# REOPOLD.

VALUES = st.lists(st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([0.0, -0.0, 1.0, 0.1])), max_size=60)


@given(values=VALUES, share=st.floats(0.01, 1.0), size=st.sampled_from([1, 2, 5]), data=st.data())
def test_the_highest_of_all_ranks_are_those_of_one_sorted_list(
    values: list[float], share: float, size: int, data: st.DataObject
) -> None:
    owners = data.draw(st.lists(st.integers(0, size - 1), min_size=len(values), max_size=len(values)))

    def job(rank: LocalRank) -> tuple[torch.Tensor, int, int]:
        mine = [value for value, owner in zip(values, owners, strict=True) if owner == rank.rank]
        return highest(torch.tensor(mine, dtype=torch.float32), share, rank)

    results = run_local(size, job)
    wanted = max(1, round(share * len(values)))
    edge = np.sort(np.array(values, np.float32))[-wanted] if values else 0.0
    for rank, (mask, taken, total) in enumerate(results):
        mine = [value for value, owner in zip(values, owners, strict=True) if owner == rank]
        assert mask.tolist() == [value >= edge for value in mine]
        assert (taken, total) == (sum(value >= edge for value in values), len(values))


def test_ties_at_the_edge_are_all_learnt_from() -> None:
    mask, taken, _ = highest(torch.tensor([0.5, 2.0, 0.5, 0.1, 0.5]), 0.4, Solo())  # the second highest value is 0.5
    assert mask.tolist() == [True, True, True, False, True] and taken == 4


def batch_of(rewards: list[float], entropies: list[float], hole: tuple[int, int] | None = None) -> RolloutBatch:
    zero = torch.zeros(len(rewards))
    signal = {Field.SAMPLED: torch.tensor(rewards), Field.WRITTEN: zero, Field.STUDENT_ENTROPY: torch.tensor(entropies)}
    batch = written((len(rewards),), signal)
    batch.rollouts[0].hole = hole
    return batch


@pytest.mark.parametrize(("step", "second"), [(0, False), (2, False), (3, True), (9, True)])
def test_first_the_safe_tokens_then_the_uncertain_ones(step: int, second: bool) -> None:
    """The floor of lambda 0.3 is -1.72; the switch is at three of ten steps."""
    objective = Reopold(0.3, 0.3, 0.2, CLIP)
    batch = batch_of([-1.71, -1.73, -9.0, 4.0, 0.0], [0.1, 0.3, 0.9, 0.2, 0.0])
    learned = objective.prepare(batch, Progress(step, 10, 0), Solo())[Field.LEARNED]
    assert learned.tolist() == ([False, False, True, False, False] if second else [True, False, False, True, True])
    assert objective.metrics() == {"learned_share": 0.2 if second else 0.6}


def test_rewards_do_not_fall_below_the_floor() -> None:
    z = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    logprobs = z.log_softmax(-1)
    own = logprobs[:, 0].detach()
    signal = {Field.SAMPLED: torch.tensor([-40.0, -math.inf], dtype=torch.float64), Field.WRITTEN: own}
    loss = Reopold(0.3, 0.0, 0.2, CLIP).tile(logprobs, torch.tensor([0, 0]), signal)["loss"]
    (gradient,) = torch.autograd.grad(loss, z)
    floor = math.log(0.3) / 0.7
    assert floor == pytest.approx(-1.72, abs=0.001)
    assert gradient[:, 0].tolist() == pytest.approx([-floor * 2 / 3] * 2)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, [True, False, False, False, True]), (9, [False, False, False, True, False])]
)
def test_what_lies_in_a_hole_is_no_candidate(step: int, expected: list[bool]) -> None:
    batch = batch_of([0.0, 0.0, 0.0, -5.0, 0.0], [0.1, 0.8, 0.9, 0.3, 0.2], hole=(1, 3))
    objective = Reopold(0.3, 0.5, 0.3, CLIP)  # 30% of three tokens is one
    assert objective.prepare(batch, Progress(step, 10, 0), Solo())[Field.LEARNED].tolist() == expected


# IW-OPD.


def test_weights_fall_from_one_plus_the_gain_to_one() -> None:
    rewards = torch.tensor([1.0, -3.0, 0.0, 4.0, 2.0, 0.0, 0.0])  # rollouts of 5 and 2 tokens
    batch = written((5, 2), {Field.SAMPLED: rewards, Field.WRITTEN: torch.zeros(7)})
    weights = IwOpd(0.5, CLIP).prepare(batch, NOW, Solo())[Field.WEIGHT]
    assert weights.dtype == torch.float32
    assert weights[:5].tolist() == pytest.approx([1 + 0.5 * (1 - share) for share in (0.1, 0.4, 0.4, 0.8, 1.0)])
    assert weights[4] == 1.0 and weights.isfinite().all()  # the second rollout agrees with the teacher on every token


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40), st.floats(0, 3))
def test_weights_never_rise_and_stay_in_their_range(rewards: list[float], gain: float) -> None:
    signal = {Field.SAMPLED: torch.tensor(rewards), Field.WRITTEN: torch.zeros(len(rewards))}
    weights = IwOpd(gain, CLIP).prepare(written((len(rewards),), signal), NOW, Solo())[Field.WEIGHT].tolist()
    assert sorted(weights, reverse=True) == weights
    assert weights[-1] >= 1.0 and weights[0] <= np.float32(1 + gain)
    assert weights[-1] == 1.0 or not any(rewards)


def test_the_weight_scales_the_token_s_gradient() -> None:
    z, _, actions, signal = scored(IwOpd.needs)
    weight = torch.arange(7).double()
    loss = IwOpd(0.5, CLIP).tile(z.log_softmax(-1), actions, signal | {Field.WEIGHT: weight})["loss"]
    plain = IwOpd(0.5, CLIP).tile(z.log_softmax(-1), actions, signal | {Field.WEIGHT: torch.ones(7)})["loss"]
    one, two = (torch.autograd.grad(value, z)[0] for value in (loss, plain))
    torch.testing.assert_close(one, weight[:, None] * two)


# Chunks of text.


def chunk_advantages(teacher: float, written: list[float]) -> list[float]:
    """Of the tokens of one chunk."""
    tokens = len(written)
    sides = (torch.full((tokens,), x, dtype=torch.float64) for x in (teacher, sum(written)))
    sizes = torch.full((tokens,), tokens, dtype=torch.int32)
    return advantages(*sides, sizes, torch.tensor(written, dtype=torch.float64)).tolist()


@given(st.floats(-30, 0), st.lists(st.floats(-8, -1e-3), min_size=1, max_size=6))
def test_a_chunk_shares_its_advantage_by_the_log_probabilities(teacher: float, written: list[float]) -> None:
    """(L_T / L_S - 1) log p, clamped; in all L_T - L_S."""
    found = chunk_advantages(teacher, written)
    shares = [(teacher / sum(written) - 1.0) * logprob for logprob in written]
    assert found == pytest.approx([min(max(share, -10.0), 10.0) for share in shares], rel=1e-9, abs=1e-9)
    if max(map(abs, shares)) < 10:
        assert sum(found) == pytest.approx(teacher - sum(written), abs=1e-9)


@given(st.floats(-9, 0), st.floats(-9, 0))
def test_a_chunk_of_one_token_on_each_side_has_the_reward_of_that_token(teacher: float, written: float) -> None:
    """To the last bit."""
    assert chunk_advantages(teacher, [written]) == [teacher - written if abs(written) >= 1e-8 else teacher]


@pytest.mark.parametrize("written", [[0.0, 0.0], [-4e-9, -5e-9]])
def test_a_chunk_that_the_student_was_sure_of_shares_evenly(written: list[float]) -> None:
    assert chunk_advantages(-3.0, written) == [-1.5, -1.5]
    assert chunk_advantages(-30.0, written) == [-10.0, -10.0]


def test_chunks_of_one_token_are_the_policy_gradient() -> None:
    """With equal tokenizers: loss, gradient and reported divergence, in the update after writing."""
    objective = CrossTokenizer(CLIP)
    z, q, actions, _ = scored(frozenset({Need.FULL}), 9)
    p = z.detach().log_softmax(-1)
    own, other = (x.gather(-1, actions[:, None])[:, 0] for x in (p, q))
    ones = torch.ones(9, dtype=torch.int32)
    signal = {
        Field.WRITTEN: own, Field.CHUNK_STUDENT: own, Field.CHUNK_TEACHER: other, Field.CHUNK_TOKENS: ones,
    }  # fmt: skip
    made = objective.prepare(written((4, 5), signal), NOW, Solo())
    assert made.pop(Field.LEARNED).all() and objective.metrics() == {"learned_share": 1.0}
    found = objective.tile(z.log_softmax(-1), actions, signal | made)
    plain = PolicyGradient(CLIP).tile(z.log_softmax(-1), actions, {Field.SAMPLED: other, Field.WRITTEN: own})
    for name in ("loss", "kl", "entropy"):
        torch.testing.assert_close(found[name], plain[name], rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(sums["loss"], z, retain_graph=True)[0] for sums in (found, plain)]
    assert gradients[1].abs().max() > 0.1
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_chunks_that_teach_nothing_are_not_counted() -> None:
    objective = CrossTokenizer(CLIP)
    _, _, _, signal = scored(objective.needs, 9)
    made = objective.prepare(written((4, 5), signal), NOW, Solo())
    assert torch.equal(made[Field.LEARNED], signal[Field.CHUNK_TOKENS] > 0)
    assert objective.metrics() == {"learned_share": pytest.approx(6 / 9)}
