"""TOPD: its formula by other means, and what each part of it is for."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import ot
import pytest
import torch
from local_ranks import LocalRank, run_local
from pens import ModelPen, ScriptedPen
from scipy.spatial.distance import cdist
from test_objectives import scored, written
from zoo import random_model

from katds.core.collective import Solo
from katds.core.objectives.base import Progress
from katds.core.objectives.rewarded import Rewarded
from katds.core.objectives.topd import Topd, TopdSettings
from katds.core.types import EOS, LENGTH, Cut, Field, Prompt, Rollout, RolloutBatch, RolloutRequest

SETTINGS = {
    "horizon": 4, "budget": 2.0, "surface": 0.3, "surface_weight": 0.25, "guidance": 0.7, "regularisation": 0.2,
}  # fmt: skip
CHOICES = {"embedding": "input", "cost": "cosine", "solver": "sinkhorn"}  # the defaults
V = 13


def topd(**changes: Any) -> Topd:
    return Topd.from_settings(TopdSettings(**{**SETTINGS, **changes}))


def at(pen: Any) -> Progress:
    return Progress(2, 10, 7, pen)


def rollout(i: int, tokens: list[int], divergences: list[float], kept: int | None = None, **facts: Any) -> Rollout:
    """Rollout i of the prompt [1, i]."""
    request = RolloutRequest(i, Prompt(i, (1, i)), 99)
    return Rollout(
        request, tokens, len(tokens) if kept is None else kept, facts.pop("reason", LENGTH),
        divergences=divergences, **facts,
    )  # fmt: skip


def batch_of(*rollouts: Rollout) -> RolloutBatch:
    """With a signal that only says how many rows there are."""
    return RolloutBatch(list(rollouts), {Field.STUDENT_TOP: torch.zeros(sum(r.kept for r in rollouts), 1)})


# The formula.


def step(lengths: tuple[int, ...], ends: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor, RolloutBatch]:
    """Logits, the teacher, and rollouts with the tokens and the divergences of these two."""
    z, q, actions, signal = scored(Topd.needs, sum(lengths))
    p = z.detach().log_softmax(-1)
    batch = written(lengths, signal, (p.exp() * (p - q)).sum(-1))
    for each, tokens, reason in zip(batch.rollouts, actions.split(lengths), ends, strict=True):
        each.response_ids, each.reason = tokens.tolist(), reason
    return z, q, batch


def by_formula(settings: SimpleNamespace, z: torch.Tensor, q: torch.Tensor, batch: RolloutBatch, pen: ScriptedPen):
    """The loss token by token in float64: states taken one by one from the sorted list, transport by POT, and the sums as written."""
    p = z.log_softmax(-1)
    embeddings = pen.embed(torch.arange(V), settings.embedding == "output").double().numpy()
    starts = np.cumsum([0, *(r.kept for r in batch.rollouts)])
    listed = [
        (-r.divergences[t], r.id, t, r, start + t)
        for r, start in zip(batch.rollouts, starts, strict=False)
        for t in range(r.kept)
    ]
    left, states = settings.budget * len(listed), []
    for entry in sorted(listed, key=lambda e: e[:3]):
        _, i, t, r, _ = entry
        if all(i != j or abs(t - u) >= settings.horizon for _, j, u, _, _ in states):
            written = settings.horizon if r.reason == EOS else min(settings.horizon, r.kept - t)
            left -= len(r.request.prompt.token_ids) + t + written
            if left < 0:
                break
            states.append(entry)
    transports = []
    for _, _, t, r, row in states:
        ours = r.response_ids[t : t + settings.horizon]
        theirs = pen.continuation((*r.request.prompt.token_ids, *r.response_ids[:t]), settings.horizon)
        if r.reason != EOS:
            theirs = theirs[: len(ours)]
        x, y = (embeddings[ids] for ids in (ours, theirs))
        if settings.cost == "euclidean":
            x, y = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (x, y))
        cost = cdist(x, y, settings.cost)
        weights = [np.full(len(x), 1 / len(x)) for x in (ours, theirs)]
        plan = (
            ot.emd(*weights, cost)
            if settings.solver == "exact"
            else ot.sinkhorn(*weights, cost, settings.regularisation, "sinkhorn_log", numItermax=100_000, stopThr=1e-13)
        )
        transports.append(((plan * cost).sum(), row, theirs, plan / plan.sum(1, keepdims=True)))
    transports.sort(key=lambda entry: entry[0])
    few = round(settings.surface * len(transports))
    weight = torch.ones(len(z), dtype=torch.float64)
    weight[[row for _, row, *_ in transports[:few]]] = settings.surface_weight
    ids = p.detach().topk(4, -1).indices
    p_top, q_top = (x.exp().gather(-1, ids) for x in (p, q))
    p_rest, q_rest = 1 - p_top.sum(-1), 1 - q_top.sum(-1)
    kl = (p_top * (p_top / q_top).log()).sum(-1) + p_rest * (p_rest / q_rest).log()
    loss = (weight * kl).sum()
    for _, row, theirs, shares in transports[few:]:
        for i, share in enumerate(shares):
            for token, w in zip(theirs, share, strict=True):
                loss = loss - settings.guidance * w * p[row + i, token]
    return loss, len(states), few


@pytest.mark.parametrize(
    "choice",
    [{}, {"embedding": "output"}, {"cost": "euclidean"}, {"solver": "exact"}],
    ids=lambda choice: "-".join(choice),
)
def test_value_and_gradient_are_those_of_the_formula(choice: dict[str, str]) -> None:
    """Over a whole step in float64, but for the weights, which are rounded to float32: by up to 6e-8 of the logarithms of some 20 guided
    tokens, each below 10."""
    z, q, batch = step((9, 0, 12, 7, 15), (EOS, LENGTH, "kat", LENGTH, EOS))
    pen = ScriptedPen()
    objective = topd(**choice)
    made = objective.prepare(batch, at(pen), Solo())
    actions = torch.zeros(len(z), dtype=torch.int64)
    sums = objective.tile(z.log_softmax(-1), actions, batch.signal | made)
    loss, states, few = by_formula(SimpleNamespace(**CHOICES | SETTINGS | choice), z, q, batch, ScriptedPen())
    assert (states, few) == (9, 3) and objective.metrics()["topd/states"] == 9
    assert sums["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    expected, gradient = (torch.autograd.grad(value, z, retain_graph=True)[0] for value in (loss, sums["loss"]))
    assert expected.abs().max() > 0.3
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-7)


# Whoever wrote what.

KEPT = (5, 0, 9, 1, 3, 17, 0, 2, 8)


@pytest.mark.parametrize("owner", ["spread", "one_rank", "backwards"])
def test_fields_do_not_depend_on_who_wrote_what(owner: str) -> None:
    """Bit for bit, with windows of several lengths and equal losses among the states."""
    _, _, whole = step(KEPT, (EOS, "kat", LENGTH) * 3)
    for each in whole.rollouts:
        each.divergences = [round(d, 1) for d in each.divergences]
    starts = np.cumsum([0, *KEPT])

    def fields(mine: list[int], collective: Any) -> tuple[dict[int, Any], Any]:
        rows = torch.tensor([row for i in mine for row in range(starts[i], starts[i + 1])], dtype=torch.int64)
        part = RolloutBatch([whole.rollouts[i] for i in mine], {k: v[rows] for k, v in whole.signal.items()})
        batch = part if mine else RolloutBatch([], {})
        objective = topd()
        made = objective.prepare(batch, at(ScriptedPen(collective)), collective)
        assert {len(value) for value in made.values()} == {len(rows)}
        split = {key: value.split([KEPT[i] for i in mine]) if mine else () for key, value in made.items()}
        return {i: {k: v[n].tolist() for k, v in split.items()} for n, i in enumerate(mine)}, objective.metrics()

    alone, metrics = fields(list(range(len(KEPT))), Solo())
    assert metrics["topd/states"] == 11 and metrics["topd/spent"] > 1.8  # of 2
    for size in (2, 3, 12):  # 12: more ranks than rollouts
        place = {
            "spread": lambda i, size=size: i % size,
            "one_rank": lambda i, size=size: size - 1,
            "backwards": lambda i, size=size: (len(KEPT) - i) % size,
        }[owner]

        def job(rank: LocalRank, place: Any = place) -> Any:
            return fields([i for i in range(len(KEPT)) if place(i) == rank.rank][::-1], rank)

        merged: dict[int, Any] = {}
        for part, seen in run_local(size, job):
            merged |= part
            assert seen == metrics
        assert merged == alone


def test_a_step_without_states_asks_the_teacher_nothing() -> None:
    pen = ScriptedPen()
    for batch in (RolloutBatch([], {}), batch_of(), batch_of(rollout(0, [3, 4], [0.0, 0.0]))):
        objective = topd()
        made = objective.prepare(batch, at(pen), Solo())
        count = sum(r.kept for r in batch.rollouts)
        assert made[Field.WEIGHT].tolist() == [1.0] * count and not made[Field.GUIDE_WEIGHTS].any()
        assert made[Field.GUIDE_IDS].shape == made[Field.GUIDE_WEIGHTS].shape == (count, 4)
        assert objective.metrics() == {"topd/states": 0.0, "topd/spent": 0.0} and pen.prefixes == []


@pytest.mark.parametrize("prompt", [1, 40, 400])
@pytest.mark.parametrize("budget", [0.5, 3.0])
def test_the_teacher_reads_and_writes_no_more_than_the_budget(prompt: int, budget: float) -> None:
    """And nearly as much, however long the prefixes are: the state that comes next would be too much."""
    _, _, batch = step((90, 70, 101), (EOS, LENGTH, LENGTH))
    for each in batch.rollouts:
        each.request = RolloutRequest(each.id, Prompt(each.id, (3,) * prompt), 200)
    objective, pen = topd(budget=budget, surface=0.0), ScriptedPen()
    objective.prepare(batch, at(pen), Solo())
    told = objective.metrics()
    assert pen.tokens == pytest.approx(told["topd/spent"] * 261) and told["topd/states"] == len(pen.prefixes)
    assert pen.tokens <= budget * 261
    more = ScriptedPen()
    topd(budget=budget + (prompt + 105) / 261, surface=0.0).prepare(batch, at(more), Solo())
    assert len(more.prefixes) > len(pen.prefixes) and set(pen.prefixes) < set(more.prefixes)
    assert more.tokens > budget * 261


# What it is for. Words 0 .. 19 are at right angles to each other; 20 + i is nearly i.

WORDS = torch.cat(
    [torch.eye(20), torch.eye(20) + 0.05 * torch.randn(20, 20, generator=torch.Generator().manual_seed(0))]
)
TEXT = [2, 3, 4, 5, 6, 7, 8, 9]


def one_state(theirs: list[int], tokens: list[int] = TEXT, **facts: Any) -> tuple[Any, Any]:
    """Fields and metrics of a rollout whose third token is the only state, with no surface mismatch."""
    divergences = [0.0, 0.0, 5.0] + [0.0] * (len(tokens) - 1)
    pen = ScriptedPen(plan={(1, 0, 10, 11): theirs}, embeddings_VH=WORDS)
    objective = topd(horizon=8, surface=0.0, budget=99.0, regularisation=0.05)
    made = objective.prepare(batch_of(rollout(0, [10, 11, *tokens], divergences, **facts)), at(pen), Solo())
    assert pen.prefixes == [(1, 0, 10, 11)]
    return made, objective.metrics()


@pytest.mark.parametrize(
    ("theirs", "low", "high"),
    [
        (TEXT, 0.0, 1e-6),
        ([12, *TEXT[:-1]], 0.12, 0.13),  # shifted by one: one token of eight is another
        ([20 + word for word in TEXT], 0.0, 0.1),  # synonyms
        ([TEXT[0], 12, *TEXT[2:]], 0.12, 0.13),  # one word
        ([12, 13, 14, 15, 16, 17, 18, 19], 1 - 1e-6, 1 + 1e-6),  # something else
    ],
)
def test_the_distance_tells_words_from_meaning(theirs: list[int], low: float, high: float) -> None:
    assert low <= one_state(theirs)[1]["topd/divergent_distance"] + 1e-9 <= high + 2e-9


def test_the_nearest_futures_are_surface_mismatches_and_the_others_guide() -> None:
    """Four rollouts with a state each: as written, shifted, in synonyms, and somewhere else."""
    ways = {
        0: [12, *TEXT[:-1]],
        1: [12, 13, 14, 15, 16, 17, 18, 19],
        2: [20 + word for word in TEXT],
        3: [15, 16, 17, 12, 13, 3, 14, 19],
    }
    rollouts = [rollout(i, [10, *TEXT], [0.1, 3.0] + [0.1] * 7) for i in ways]
    pen = ScriptedPen(plan={(1, i, 10): way for i, way in ways.items()}, embeddings_VH=WORDS)
    objective = topd(horizon=8, surface=0.5, budget=99.0, regularisation=0.1)
    made = objective.prepare(batch_of(*rollouts), at(pen), Solo())
    weight, guided = (made[key].view(4, 9, -1) for key in (Field.WEIGHT, Field.GUIDE_WEIGHTS))
    assert weight[..., 0].tolist() == [[1, 0.25, *[1] * 7], [1] * 9, [1, 0.25, *[1] * 7], [1] * 9]
    assert guided.sum(-1).tolist() == [pytest.approx([0, *[k] * 8], abs=1e-6) for k in (0, 1, 0, 1)]
    assert made[Field.GUIDE_IDS].view(4, 9, 8)[3, 1:].tolist() == [ways[3]] * 8
    told = objective.metrics()
    assert told["topd/states"] == 4 and told["topd/teacher_tokens"] == 32
    assert told["topd/surface_distance"] < 0.2 and 0.8 < told["topd/divergent_distance"] < 1.0


def test_guidance_lies_where_the_plan_has_it() -> None:
    """The teacher says one word else and one more: the positions of what both say are led to it, that of the other word to the new one."""
    made, _ = one_state([2, 3, 12, 5, 6, 7, 8, 9])
    weights, ids = made[Field.GUIDE_WEIGHTS], made[Field.GUIDE_IDS]
    assert not weights[:2].any()
    best = ids.gather(-1, weights.argmax(-1, keepdim=True).long())[2:, 0]
    assert best.tolist() == [2, 3, 12, 5, 6, 7, 8, 9]
    assert (weights[2:].amax(-1) > 0.99).all()


def test_the_positions_of_two_states_do_not_mix() -> None:
    tokens = [5, 6, 7, 8, 9, 10, 11]
    objective = topd(horizon=3, surface=0.0, budget=99.0)
    pen = ScriptedPen(plan={(1, 0, 5): [12, 13], (1, 0, 5, 6, 7, 8): [14, 15, 16]}, embeddings_VH=WORDS)
    made = objective.prepare(batch_of(rollout(0, tokens, [0, 2.0, 0.5, 0, 3.0, 0, 0])), at(pen), Solo())
    assert made[Field.GUIDE_IDS].tolist() == [[0] * 3, *[[12, 13, 0]] * 3, *[[14, 15, 16]] * 3]
    assert made[Field.GUIDE_WEIGHTS].sum(-1).tolist() == pytest.approx([0, 1, 1, 1, 1, 1, 1])
    assert not made[Field.GUIDE_WEIGHTS][1:4, 2].any()


@pytest.mark.parametrize(
    ("facts", "compared"),
    [
        ({"reason": EOS}, 8),  # the student is done, which is a way to go on
        ({"reason": LENGTH}, 3),
        ({"reason": "kat", "cut": Cut(5, 5, "kat")}, 3),
        ({"reason": EOS, "cut": Cut(4, 5, "kat"), "kept": 4}, 2),  # audit: it went on, but is learnt from up to the cut
    ],
)
def test_a_window_that_is_broken_off_is_compared_with_as_much_of_the_teacher(facts: Any, compared: int) -> None:
    kept = facts.get("kept", 5)
    made, told = one_state([2, 3, 4, 5, 6, 7, 8, 9], tokens=[2, 3, 4], **facts)
    assert told["topd/teacher_tokens"] == compared
    assert len(made[Field.WEIGHT]) == kept
    assert made[Field.GUIDE_WEIGHTS].sum(-1).tolist() == pytest.approx([0, 0, *[1] * (kept - 2)])
    assert (made[Field.GUIDE_WEIGHTS][2:] > 0).any(0).tolist() == [i < compared for i in range(8)]


def test_a_teacher_that_ends_early_guides_with_what_it_wrote() -> None:
    made, told = one_state([2, 13], reason=EOS)
    assert told["topd/teacher_tokens"] == 2
    assert made[Field.GUIDE_WEIGHTS][2:, :2].sum(-1).tolist() == pytest.approx([1] * 8)
    assert made[Field.GUIDE_WEIGHTS][2:].mean(0)[:2].tolist() == pytest.approx(
        [0.5, 0.5], abs=1e-6
    )  # half the mass each


def test_what_lies_in_a_hole_is_no_state() -> None:
    pen = ScriptedPen()
    batch = batch_of(rollout(0, [3, 4, 5, 6, 7], [0.1, 9.0, 9.0, 0.2, 0.1], hole=(1, 3)))
    objective = topd(budget=2.0, horizon=1)  # six tokens for a state; ten would do for two
    objective.prepare(batch, at(pen), Solo())
    assert pen.prefixes == [(1, 0, 3, 4, 5)]


def test_the_teacher_reads_what_the_rollout_began_with() -> None:
    """Prompt, the prefix that a behaviour policy had written, and the response up to the state."""
    pen = ScriptedPen()
    topd(horizon=2, budget=3.0).prepare(
        batch_of(rollout(4, [3, 5, 6], [0.1, 0.2, 0.7], prefix=(8, 9))), at(pen), Solo()
    )
    assert pen.prefixes == [(1, 4, 8, 9, 3, 5)]


def test_a_token_that_the_student_rules_out_leaves_loss_and_gradient_finite() -> None:
    """Where no weight is on it; the padding's token 0."""
    logits = torch.randn(1, V, dtype=torch.float64)
    logits[0, 0] = -math.inf
    logits.requires_grad_()
    signal = {
        Field.STUDENT_TOP_IDS: torch.tensor([[3, 4]], dtype=torch.int32), Field.STUDENT_TOP: torch.tensor([[-1.0, -2.0]]).double(),
        Field.WEIGHT: torch.ones(1), Field.GUIDE_IDS: torch.tensor([[5, 0]], dtype=torch.int32),
        Field.GUIDE_WEIGHTS: torch.tensor([[1.0, 0.0]]),
    }  # fmt: skip
    sums = topd().tile(logits.log_softmax(-1), torch.tensor([3]), signal)
    (gradient,) = torch.autograd.grad(sums["loss"], logits)
    assert sums["loss"].isfinite() and gradient.isfinite().all() and sums["guided"] == 1


# With a real model.


def test_a_model_that_compares_itself_with_itself_goes_on_as_it_did() -> None:
    """The teacher reads the very prefix before the state: from there greedy decoding repeats the rollout. Another model goes elsewhere."""
    writer, other = ModelPen(random_model(1)), ModelPen(random_model(2, hidden=48))
    prompts = [(9, 30, 12), (44, 5, 6, 7)]
    rollouts = []
    for i, prompt in enumerate(prompts):
        (tokens,) = writer.write([prompt], [24])
        request = RolloutRequest(i, Prompt(i, prompt), 24)
        divergences = [float(t % 7 == 3) for t in range(len(tokens))]
        rollouts.append(Rollout(request, tokens, len(tokens), LENGTH, divergences=divergences))
    told = []
    for pen in (writer, other):
        objective = topd(horizon=6, budget=99.0, surface=0.0, regularisation=0.1)
        made = objective.prepare(batch_of(*rollouts), at(pen), Solo())
        told.append(objective.metrics())
        best = made[Field.GUIDE_IDS].gather(-1, made[Field.GUIDE_WEIGHTS].argmax(-1, keepdim=True).long())[:, 0]
        guided = made[Field.GUIDE_WEIGHTS].any(-1)
        same = best[guided] == torch.tensor([t for r in rollouts for t in r.response_ids])[guided]
        assert bool(same.all()) == (pen is writer)
    assert told[0]["topd/states"] == told[1]["topd/states"] >= 6
    assert told[0]["topd/divergent_distance"] < 0.01 < 0.3 < told[1]["topd/divergent_distance"]


# Settings.


@pytest.mark.parametrize("changes", [{"surface": 0.0}, {"surface_weight": 1.0}])
def test_a_teacher_that_writes_for_nothing_is_refused(changes: dict[str, float]) -> None:
    settings = TopdSettings(guidance=0.0, **changes)
    with pytest.raises(ValueError, match=r"objective\.guidance is 0 .*take objective\.kind reverse_kl"):
        settings.check(filtered=False, minibatches=1)
    TopdSettings(**changes).check(filtered=True, minibatches=4, blended=True)
    TopdSettings(guidance=0.0).check(filtered=False, minibatches=1)


def test_a_missing_solver_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)  # as if it were not there
    with pytest.raises(
        ValueError, match=r"objective\.kind is topd, but POT is not installed; run: pip install 'katds\[topd\]'"
    ):
        TopdSettings().check(filtered=False, minibatches=1)


def test_with_a_reward_on_top_the_teacher_still_writes() -> None:
    assert Rewarded(topd(), 1.0, lambda _: 0.0).teacher_writes
