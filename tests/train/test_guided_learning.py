"""What is learnt from rollouts that the teacher began: the gradient is that of plain PyTorch, on any ranks and in any packing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from formulas import Moment, Tokens, _forward_kl, step_losses
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from local_ranks import LocalRank, run_local
from reference import TOP_K, PlainStudent, PlainTeacher, Scored, _responses, _token_losses, distance, plain, scored
from test_share import CPU, token
from zoo import build_model

from katds.core.collective import Collective, Solo
from katds.core.objectives import OBJECTIVES
from katds.core.packing import DEFAULT_ATTENTION_WEIGHT
from katds.core.types import LENGTH, Field, Need, Prompt, Rollout, RolloutBatch, RolloutRequest
from katds.models import tiled_head
from katds.train.share import Share, deal, survey

KEPT = [9, 3, 0, 14, 6, 5, 7, 22, 5, 11]
PREFIX = [4, 0, 0, 13, 6, 1, 0, 9, 0, 2]  # of these; a rollout may keep nothing of what the student wrote
BETA = 0.05


TROPD = {"tropd": {}, "left_out": {"outliers": "leave_out"}, "over_students": {"guidance_over": "student_tokens"}}
NAMES = (*TROPD, "reverse_kl", "reverse_kl_full")


def tropd_settings(name: str) -> Any:
    return OBJECTIVES["tropd"].Settings(guidance=BETA, **TROPD[name])


class Models:
    def __init__(self, root: Path) -> None:
        self.student = plain(build_model(root / "student", seed=1, tied=True, vocabulary=70))
        self.teacher = plain(build_model(root / "teacher", seed=2, hidden=48, vocabulary=72))
        self.data = scored(self.student, self.teacher, KEPT)
        self.expected = {name: self._by_hand(name) for name in NAMES}

    def _by_hand(self, name: str) -> tuple[dict[str, torch.Tensor], float, int]:
        self.student.zero_grad()
        total, count = torch.zeros((), dtype=torch.float64), 0
        guidance = torch.zeros((), dtype=torch.float64)
        for i, (kept, prefix) in enumerate(zip(KEPT, PREFIX, strict=True)):
            if not kept:
                continue
            data = self.data
            response = data.rollouts[i].response_ids[:kept]
            p, _ = _responses(self.student, list(data.requests[i].prompt.token_ids), response)
            q, actions = data.teacher[i][:kept], torch.tensor(response)
            first, own = slice(prefix), slice(prefix, kept)
            learned = torch.ones(kept - prefix, dtype=torch.bool)
            if name in TROPD:
                rows = Tokens(100 + i, p[first], q[first], actions[first], p[first], p[first])
                guidance = guidance + _forward_kl(rows, TOP_K).sum()
                rows = Tokens(100 + i, p[own], q[own], actions[own], data.written[i][own], data.entropies[i][own])
                ((loss, learned),) = step_losses("tropd", tropd_settings(name), [rows], Moment(0, 1, 0), TOP_K)
            else:
                loss = _token_losses(name, p[own], q[own], data.student_ids[i][own], actions[own])
            total, count = total + loss[learned].sum(), count + int(learned.sum())
        if name in TROPD:  # beta times a mean over the teacher's tokens, in a sum that is divided by the student's
            total = (
                total + float(np.float32(BETA if name == "over_students" else BETA * count / sum(PREFIX))) * guidance
            )
        (total / count).backward()
        gradient = {key: value.grad.clone() for key, value in self.student.named_parameters()}
        return gradient, float(total.detach()) / count, count


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_head, "CPU_TILE_ELEMENTS", 3 * reference.VOCABULARY)


def guided_batch(data: Scored, mine: list[int], needs: Any, learned: bool) -> RolloutBatch:
    """What the guided engine would hand to the rank that holds these rollouts."""
    rollouts, parts = [], []
    for i in mine:
        whole, prefix = data.rollouts[i], PREFIX[i]
        first, rest = tuple(whole.response_ids[:prefix]), whole.response_ids[prefix:]
        rollouts.append(replace(whole, response_ids=rest, kept=KEPT[i] - prefix, prefix=first, guided=learned))
        signal = data._signal(i, needs | {Need.TEACHER_TOP_K} if learned else needs, torch.float64)
        if learned:
            mask = torch.arange(KEPT[i]) < prefix
            if Need.TEACHER_TOP_K not in needs:  # the engine scores that for prefixes alone
                signal[Field.TEACHER_TOP] = signal[Field.TEACHER_TOP].masked_fill(~mask[:, None], torch.nan)
            signal |= {key: signal[key].masked_fill(mask, torch.nan) for key in (Field.SAMPLED, Field.WRITTEN)}
            parts.append(signal | {Field.GUIDED: mask})
        else:
            parts.append({key: value[prefix:] for key, value in signal.items()})
    return RolloutBatch(
        rollouts, {key: torch.cat([part[key] for part in parts]) for key in (parts[0] if parts else ())}
    )


def update(
    models: Models, name: str, collective: Collective, mine: list[int], budget: int
) -> tuple[PlainStudent, dict[str, float]]:
    learns = PlainStudent(models.student, collective)
    kind = "tropd" if name in TROPD else name
    learner = reference.learner(kind, learns, PlainTeacher(models.teacher, torch.float64), collective, budget)
    if name in TROPD:
        learner._objective = OBJECTIVES["tropd"].from_settings(tropd_settings(name))
    batch = guided_batch(models.data, mine, learner._objective.needs, learner._objective.reads_prefix)
    return learns, learner.update(batch, models.data.requests, step=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_plain_autograd_in_fp64(models: Models, small_tiles: None, name: str) -> None:
    """tropd learns from the prefixes; the others read them as context only. All divide by what the student wrote."""
    gradient, loss, tokens = models.expected[name]
    assert (tokens == sum(KEPT) - sum(PREFIX)) == (name != "left_out")
    for budget in (1, 40, 10**6):
        learns, report = update(models, name, Solo(), list(range(len(KEPT))), budget)
        assert distance(learns.updates[0], gradient) < 1e-12
        assert report["loss"] == pytest.approx(loss, rel=1e-9)
        assert report["tokens"] == tokens


@settings(
    max_examples=12, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_gradient_ignores_ranks_owners_and_budget_in_fp64(
    models: Models, small_tiles: None, data: st.DataObject
) -> None:
    size, budget = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 90))
    owners = data.draw(st.lists(st.integers(0, size - 1), min_size=len(KEPT), max_size=len(KEPT)))
    name = data.draw(st.sampled_from(sorted(models.expected)))

    def job(rank: LocalRank) -> tuple[PlainStudent, dict[str, float]]:
        return update(models, name, rank, [i for i, owner in enumerate(owners) if owner == rank.rank][::-1], budget)

    results = run_local(size, job)
    for learns, report in results:
        assert distance(learns.updates[0], models.expected[name][0]) < 1e-12
        assert report == results[0][1]


# (prompt tokens, prefix, kept, rank that holds it)
ROLLOUTS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 7), st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=16
)


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(size=st.integers(1, 4), shapes=ROLLOUTS, budget=st.integers(1, 80), learned=st.booleans())
def test_prefixes_travel_with_their_rollouts(size: int, shapes: list[Any], budget: int, learned: bool) -> None:
    """As rows of the signal, or beside them."""
    requests = [RolloutRequest(50 + i, Prompt(i, (7,) * prompt), 99) for i, (prompt, *_) in enumerate(shapes)]

    def job(rank: LocalRank) -> Share:
        rollouts = []
        for i, (_, prefix, kept, owner) in enumerate(shapes):
            if owner % size == rank.rank:
                ids = [token(i, t) for t in range(prefix + kept + 2)]
                rollouts.append(
                    Rollout(requests[i], ids[prefix:], kept, LENGTH, prefix=tuple(ids[:prefix]), guided=learned)
                )
        rows = torch.tensor([t for r in rollouts for t in r.row_ids], dtype=torch.int64)
        signal = {Field.SAMPLED: rows.float()}
        if learned:
            parts = [torch.arange(r.rows) < r.prefix_rows for r in rollouts]
            signal[Field.GUIDED] = torch.cat([torch.zeros(0, dtype=torch.bool), *parts])
        batch = RolloutBatch(rollouts, signal if rollouts else {})
        known = survey(batch, requests, rank)
        return deal(batch, requests, known, range(len(shapes)), budget, DEFAULT_ATTENTION_WEIGHT, rank, CPU)

    shares = run_local(size, job)
    seen = []
    for share in shares:
        assert share.tokens == sum(kept for _, _, kept, _ in shapes)
        for i in (i for members in share.micro_batches for i in members):
            _, prefix, kept, _ = shapes[i]
            ids, span = torch.tensor([token(i, t) for t in range(prefix + kept)]), share.spans[i]
            seen.append(i)
            expected = ids if learned else ids[prefix:]
            assert torch.equal(share.actions[span], expected)
            assert torch.equal(share.signal[Field.SAMPLED][span], expected.float())
            lead = share.leads.get(i, torch.zeros(0, dtype=torch.int64))
            assert torch.equal(lead, ids[:0] if learned else ids[:prefix])
            if learned:
                assert share.signal[Field.GUIDED][span].tolist() == [t < prefix for t in range(prefix + kept)]
        for members in share.micro_batches:
            assert len(members) <= 1 or sum(sum(shapes[i][:3]) - 1 for i in members) <= budget
    assert sorted(seen) == [i for i, (_, prefix, kept, _) in enumerate(shapes) if kept or (learned and prefix)]
