"""The contract of every objective, and each one's gradient against its closed form in float64."""

from __future__ import annotations

from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from formulas import KINDS, Moment, Tokens, step_losses
from pens import ScriptedPen

from katds.config import Recipe
from katds.core.collective import Solo
from katds.core.objectives import OBJECTIVES
from katds.core.objectives.base import Progress
from katds.core.objectives.forward_kl import ForwardKl
from katds.core.objectives.jsd import Jsd
from katds.core.objectives.policy_gradient import PolicyGradient
from katds.core.objectives.reverse_kl import ReverseKl
from katds.core.teacher_signal import score_tile
from katds.core.types import LENGTH, Field, Need, Prompt, Rollout, RolloutBatch, RolloutRequest
from katds.schema import members

torch.set_num_threads(1)
T, V, K = 7, 13, 4
NOW = Progress(step=9, steps=10, seed=4, teacher=ScriptedPen())
# How far the student has moved since it wrote: ratios on both sides of both bounds of the clip, 0.8 and 1.28.
MOVED = (0.0, 0.1, -0.6, 0.6, -0.1, 0.6, -0.6)
# Tokens per rollout of `example`.
LENGTHS = (3, 0, 4)
# Student tokens of chunks of text, again and again; negative: such a chunk, which teaches nothing.
CHUNKS = (1, 2, -2, 3, -1)


def _cases() -> dict[str, SimpleNamespace]:
    """Every section that the recipe takes with every option of its closed choices; a new objective is picked up."""
    cases = {}
    for section in members(Recipe.model_fields["objective"]).values():
        defaults = {name: field.default for name, field in section.model_fields.items()}
        cases[defaults["kind"]] = SimpleNamespace(**defaults)
        for name, field in section.model_fields.items():
            for option in get_args(field.annotation):
                if name != "kind" and isinstance(option, str):
                    cases[f"{defaults['kind']}-{option}"] = SimpleNamespace(**{**defaults, name: option})
    return cases


CASES = _cases()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_recipe_knows_who_aligns_text(case: SimpleNamespace) -> None:
    method = OBJECTIVES[case.kind]
    assert method.Settings(**vars(case)).aligns_text == (Need.CHUNKS in method.from_settings(case).needs)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def objective(request: pytest.FixtureRequest):
    return OBJECTIVES[request.param.kind].from_settings(request.param)


def scored(needs: frozenset[Need], rows: int = T, dtype: torch.dtype = torch.float64, same: bool = False):
    """Student logits, actions, what was scored for exactly these needs, and the teacher. `same`: the student is the teacher, and has not
    moved."""
    z, z_teacher = torch.randn(2, rows, V, dtype=torch.float64, generator=torch.Generator().manual_seed(rows)) * 2
    p, q = z.log_softmax(-1), (z if same else z_teacher).log_softmax(-1).to(dtype)
    actions = torch.randint(V, (rows,), generator=torch.Generator().manual_seed(1))
    ids = p.topk(K, -1).indices.int()
    signal = score_tile(q, actions, ids, needs, K)
    if Need.STUDENT_TOP_K in needs:
        signal[Field.STUDENT_TOP_IDS] = ids
    if Need.FULL in needs:
        signal[Field.TEACHER_LOGPROBS] = q
    if Need.WRITTEN in needs:
        moved = torch.zeros(rows) if same else torch.tensor((MOVED * (1 + rows // T))[:rows])
        signal[Field.WRITTEN] = (p.gather(-1, actions[:, None])[:, 0] - moved).to(dtype)
    if Need.STUDENT_ENTROPY in needs:
        signal[Field.STUDENT_ENTROPY] = -(p.exp() * p).sum(-1).to(dtype)
    if Need.CHUNKS in needs:
        signal |= chunks(q.gather(-1, actions[:, None])[:, 0], signal[Field.WRITTEN])
    return z.to(dtype).requires_grad_(), q, actions, signal


def chunk_sizes(rows: int) -> list[int]:
    """CHUNKS, cut off after so many rows."""
    sizes: list[int] = []
    for size in cycle(CHUNKS):
        if (left := rows - sum(map(abs, sizes))) <= abs(size):
            return [*sizes, left if size > 0 else -left][: len(sizes) + (left > 0)]
        sizes.append(size)
    raise AssertionError


def chunks(teacher_T: torch.Tensor, written_T: torch.Tensor) -> dict[Field, torch.Tensor]:
    """The chunks of `chunk_sizes`; the teacher's log-likelihood of one is the sum of what it says of the student's tokens."""
    sizes = chunk_sizes(len(teacher_T))
    lengths = torch.tensor([abs(size) for size in sizes], dtype=torch.int64)
    sums = (
        torch.stack([part.sum() for part in x.split(lengths.tolist())] or [x.sum()]) for x in (teacher_T, written_T)
    )
    teacher, student = (x[: len(sizes)].repeat_interleave(lengths) for x in sums)
    tokens = torch.tensor(sizes, dtype=torch.int32).clamp(min=0).repeat_interleave(lengths)
    return {Field.CHUNK_TEACHER: teacher, Field.CHUNK_STUDENT: student, Field.CHUNK_TOKENS: tokens}


def written(
    lengths: tuple[int, ...], signal: dict[Field, torch.Tensor], divergences_T: torch.Tensor | None = None
) -> RolloutBatch:
    """Rollouts 20, 21, ... with so many tokens each; a divergence of 1 nat at each of them where nothing else is said."""
    known = torch.ones(sum(lengths)) if divergences_T is None else divergences_T
    rollouts = [
        Rollout(RolloutRequest(20 + i, Prompt(i, (1,)), 99), [0] * kept, kept, LENGTH, divergences=part.tolist())
        for i, (kept, part) in enumerate(zip(lengths, known.split(lengths), strict=True))
    ]
    return RolloutBatch(rollouts, signal)


def example(objective: Any, rows: int = T, dtype: torch.dtype = torch.float64, same: bool = False):
    """Student logits, the teacher, actions, and the whole signal of a tile: what was scored and what `prepare` has made of it."""
    z, q, actions, signal = scored(objective.needs, rows, dtype, same)
    p = z.detach().log_softmax(-1)
    batch = written(LENGTHS if rows == T else (rows,), signal, (p.exp() * (p - q)).sum(-1))
    made = objective.prepare(batch, NOW, Solo())
    made.pop(Field.LEARNED, None)  # the learner's: it leaves rows out before a tile is made
    return z, q, actions, signal | made


def rows_of(signal: dict[Field, torch.Tensor], rows: slice) -> dict[Field, torch.Tensor]:
    return {key: value[rows] for key, value in signal.items()}


def learn(objective: Any, batch: RolloutBatch, z: torch.Tensor, actions: torch.Tensor) -> None:
    """All that reads a signal: `prepare`, then a tile."""
    made = objective.prepare(batch, NOW, Solo())
    objective.tile(z.log_softmax(-1), actions, batch.signal | made)


def test_the_recipe_and_the_dict_know_the_same_objectives() -> None:
    assert {case.kind for case in CASES.values()} == set(OBJECTIVES)


def test_returns_one_differentiable_loss_and_detached_scalars(objective) -> None:
    z, _, actions, signal = example(objective, dtype=torch.float32)
    sums = objective.tile(z.log_softmax(-1), actions, signal)
    assert {"loss", "kl", "entropy"} <= set(sums)
    assert all(value.shape == () and value.dtype == torch.float32 for value in sums.values())
    assert [key for key, value in sums.items() if value.requires_grad] == ["loss"]


def test_sums_and_gradient_do_not_depend_on_the_tiles(objective) -> None:
    z, _, actions, signal = example(objective)
    logprobs = z.log_softmax(-1)
    whole = objective.tile(logprobs, actions, signal)
    parts = [
        objective.tile(logprobs[rows], actions[rows], rows_of(signal, rows))
        for rows in (slice(0, 1), slice(1, 5), slice(5, 5), slice(5, T))
    ]
    for key, value in whole.items():
        # Only the order of float64 sums differs.
        torch.testing.assert_close(sum(part[key] for part in parts), value, rtol=1e-13, atol=1e-13)
    (expected,) = torch.autograd.grad(whole["loss"], z, retain_graph=True)
    (grad,) = torch.autograd.grad(sum(part["loss"] for part in parts), z)
    torch.testing.assert_close(grad, expected, rtol=1e-13, atol=1e-13)


def test_no_rows_give_zeros_that_can_be_differentiated(objective) -> None:
    z, _, actions, signal = example(objective, rows=0)
    sums = objective.tile(z.log_softmax(-1), actions, signal)
    assert all(value.item() == 0 for value in sums.values())
    assert torch.autograd.grad(sums["loss"], z)[0].shape == (0, V)


def test_a_missing_score_is_an_error(objective) -> None:
    """Whatever was asked for is read, by `prepare` or by a tile, and never replaced by a zero."""
    z, _, actions, signal = scored(objective.needs)
    assert signal
    for key in signal:
        with pytest.raises(KeyError, match=key.value):
            learn(objective, written(LENGTHS, {k: v for k, v in signal.items() if k != key}), z, actions)
    _, _, _, whole = example(objective)
    for key in whole.keys() - signal.keys():
        with pytest.raises(KeyError, match=key.value):
            objective.tile(z.log_softmax(-1), actions, {k: v for k, v in whole.items() if k != key})


@pytest.mark.parametrize("rows", [1, T - 1, T + 1])
def test_scores_of_other_tokens_are_an_error(objective, rows: int) -> None:
    """One row would broadcast, fewer rows would be gathered: both silently wrong."""
    z, _, actions, signal = example(objective)
    asked = scored(objective.needs)[3]
    for key, value in signal.items():
        wrong = value.repeat(2, *[1] * (value.dim() - 1))[:rows]
        if key is not Field.STUDENT_ENTROPY:  # which tiles do not read
            with pytest.raises(ValueError, match="rows"):
                objective.tile(z.log_softmax(-1), actions, {**signal, key: wrong})
        if key in asked:
            with pytest.raises((AssertionError, ValueError), match="rows"):
                learn(objective, written(LENGTHS, asked | {key: wrong}), z, actions)


def test_gradient_vanishes_where_the_student_is_the_teacher(objective) -> None:
    z, _, actions, signal = example(objective, same=True)
    sums = objective.tile(z.log_softmax(-1), actions, signal)
    assert torch.autograd.grad(sums["loss"], z)[0].abs().max() < 1e-13  # float64 rounding of terms below 10
    assert abs(sums["kl"].item()) < 1e-12


def test_reports_the_student_s_entropy(objective) -> None:
    z, _, actions, signal = example(objective)
    sums = objective.tile(z.log_softmax(-1), actions, signal)
    expected = torch.distributions.Categorical(logits=z.detach()).entropy().sum()
    torch.testing.assert_close(sums["entropy"], expected, rtol=1e-12, atol=0)


def closed_form(case: SimpleNamespace, z: torch.Tensor, q_logprobs: torch.Tensor, actions: torch.Tensor):
    """(value, dloss/dlogits) by hand: dloss/dz = p (g - sum p g) for a loss with derivative g by p."""
    p, q = z.softmax(-1), q_logprobs.exp()
    kind, support = case.kind, getattr(case, "support", "full")
    if kind == "policy_gradient":
        reward = (q.log() - p.log()).gather(-1, actions[:, None])
        return -reward.sum(), -reward * (torch.nn.functional.one_hot(actions, V) - p)
    inside = torch.ones_like(p, dtype=torch.bool)
    if support != "full":
        chooser = p if support == "student_top_k" else q
        inside = torch.zeros_like(inside).scatter(-1, chooser.topk(K, -1).indices, True)
    p_tail, q_tail = ((x * ~inside).sum(-1, keepdim=True) for x in (p, q))
    p_bucket, q_bucket = torch.where(inside, p, p_tail), torch.where(inside, q, q_tail)  # mass of v's bucket, per v
    if kind == "reverse_kl":
        g = (p_bucket / q_bucket).log()
        kl = (p * g).sum(-1, keepdim=True)
        return kl.sum(), p * (g - kl)
    if kind == "forward_kl":
        return (q * (q_bucket / p_bucket).log()).sum(), p - p * q_bucket / p_bucket
    assert kind == "jsd"
    m = case.beta * q + (1 - case.beta) * p
    g = (1 - case.beta) * (p / m).log()
    value = (1 - case.beta) * (p * (p / m).log()).sum() + case.beta * (q * (q / m).log()).sum()
    return value, p * (g - (p * g).sum(-1, keepdim=True))


BETAS = {f"jsd-{beta}": SimpleNamespace(kind="jsd", beta=beta) for beta in (0.1, 0.9)}
PUBLISHED = {name: case for name, case in CASES.items() if name.startswith(KINDS)}
# What a teacher writes has a formula of its own: test_topd.
CLOSED = {
    name: case for name, case in CASES.items() if name not in PUBLISHED and not OBJECTIVES[case.kind].teacher_writes
} | BETAS


@pytest.mark.parametrize("case", CLOSED.values(), ids=CLOSED.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_value_and_gradient_equal_the_closed_form(case: SimpleNamespace, dtype: torch.dtype, tolerance: float) -> None:
    """Gradients are below 5; the tolerances are some 20 units of each type's epsilon at that size."""
    objective = OBJECTIVES[case.kind].from_settings(case)
    z, _, actions, signal = example(objective, dtype=dtype)
    exact = example(objective)
    value, gradient = closed_form(case, exact[0].detach(), exact[1], actions)
    sums = objective.tile(z.log_softmax(-1), actions, signal)
    torch.testing.assert_close(torch.autograd.grad(sums["loss"], z)[0].double(), gradient, rtol=0, atol=tolerance)
    assert sums["kl"].item() == pytest.approx(value.item(), abs=tolerance * 2 * T)


@pytest.mark.parametrize("progress", [Progress(0, 10, 4), NOW], ids=["first_step", "last_step"])
@pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_value_and_gradient_are_those_of_the_published_formula(case: SimpleNamespace, progress: Progress) -> None:
    """Over a whole step, with ratios on both sides of the clip, in float64."""
    objective = OBJECTIVES[case.kind].from_settings(case)
    z, _, actions, signal = scored(objective.needs, 4 * T)
    lengths = (9, 0, 12, 7)
    made = objective.prepare(written(lengths, signal), progress, Solo())
    learned = made.pop(Field.LEARNED, torch.ones(4 * T, dtype=torch.bool))
    sums = objective.tile(z.log_softmax(-1)[learned], actions[learned], rows_of(signal | made, learned))

    p, q = z.log_softmax(-1), scored(frozenset({Need.FULL}), 4 * T)[1]
    entropies = -(p.detach().exp() * p.detach()).sum(-1).float()
    parts = zip(*(x.split(lengths) for x in (p, q, actions, signal[Field.WRITTEN], entropies)), strict=True)
    rollouts = [Tokens(20 + i, *part) for i, part in enumerate(parts)]
    teacher = iter(q.gather(-1, actions[:, None])[:, 0].tolist())
    sizes = iter(chunk_sizes(4 * T))  # none reaches from one rollout into the next
    for i, rollout in enumerate(rollouts):
        chosen = []
        while sum(map(abs, chosen)) < lengths[i]:
            chosen.append(next(sizes))
        assert sum(map(abs, chosen)) == lengths[i]
        rollouts[i] = rollout._replace(chunks=[(size, sum(islice(teacher, abs(size)))) for size in chosen])
    losses = step_losses(case.kind, case, rollouts, Moment(*_values(progress)), K)
    assert torch.equal(learned, torch.cat([kept for _, kept in losses]))
    loss = sum(loss[kept].sum() for loss, kept in losses)
    torch.testing.assert_close(sums["loss"], loss, rtol=1e-13, atol=1e-13)
    expected, gradient = (torch.autograd.grad(value, z, retain_graph=True)[0] for value in (loss, sums["loss"]))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)


def _values(progress: Progress) -> tuple[int, int, int]:
    return progress.step, progress.steps, progress.seed


@pytest.mark.parametrize(("beta", "other"), [(0.0, ForwardKl("full")), (1.0, ReverseKl("full"))])
def test_jsd_ends_in_the_two_kls(beta: float, other) -> None:
    z, _, actions, signal = example(other)
    assert torch.equal(
        Jsd(beta).tile(z.log_softmax(-1), actions, signal)["loss"],
        other.tile(z.log_softmax(-1), actions, signal)["loss"],
    )


def test_policy_gradient_reports_its_estimate_of_the_kl() -> None:
    z, q, actions, signal = example(PolicyGradient())
    ratio = (z.detach().log_softmax(-1) - q).gather(-1, actions[:, None])
    assert PolicyGradient().tile(z.log_softmax(-1), actions, signal)["kl"].item() == pytest.approx(ratio.sum().item())


def test_loss_may_be_scaled_by_any_later_count() -> None:
    """Nothing inside divides by the tile's own length: twice the same tokens are twice the loss."""
    for case in CASES.values():
        objective = OBJECTIVES[case.kind].from_settings(case)
        z, _, actions, signal = example(objective)
        doubled = {key: torch.cat([value, value]) for key, value in signal.items()}
        once = objective.tile(z.log_softmax(-1), actions, signal)["loss"]
        twice = objective.tile(torch.cat([z, z]).log_softmax(-1), torch.cat([actions, actions]), doubled)["loss"]
        torch.testing.assert_close(twice, 2 * once, rtol=1e-13, atol=0)


@pytest.mark.parametrize("cls", [ReverseKl, ForwardKl])
@pytest.mark.parametrize("support", ["top_k", "top_k_without_tail", ""])
def test_top_k_without_a_tail_is_refused_with_the_reason(cls, support: str) -> None:
    with pytest.raises(ValueError, match=r"full.*biased"):
        cls(support)


def test_a_divergence_as_reward_of_the_policy_gradient_is_refused() -> None:
    """A [T, K] score in place of the sampled token's: an advantage that ignores the action."""
    z, q, actions, _ = example(PolicyGradient())
    with pytest.raises(ValueError, match="per sampled token"):
        PolicyGradient().tile(z.log_softmax(-1), actions, {Field.SAMPLED: q[:, :K]})


def test_jsd_beta_outside_the_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.beta is 1\.5"):
        Jsd(1.5)
