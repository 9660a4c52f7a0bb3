"""The contract of every objective, and each one's gradient against its closed form in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from katds.config import ObjectiveConfig
from katds.core.objectives import OBJECTIVES
from katds.core.objectives.forward_kl import ForwardKl
from katds.core.objectives.jsd import Jsd
from katds.core.objectives.policy_gradient import PolicyGradient
from katds.core.objectives.reverse_kl import ReverseKl
from katds.core.teacher_signal import score_tile
from katds.core.types import Field, Need

torch.set_num_threads(1)
T, V, K = 7, 13, 4


def _cases() -> dict[str, SimpleNamespace]:
    """Every section of the recipe's union with every option of its closed choices; a new objective is picked up."""
    cases = {}
    for section in get_args(get_args(ObjectiveConfig)[0]):
        defaults = {name: field.default for name, field in section.model_fields.items()}
        cases[defaults["kind"]] = SimpleNamespace(**defaults)
        for name, field in section.model_fields.items():
            for option in get_args(field.annotation):
                if name != "kind" and isinstance(option, str):
                    cases[f"{defaults['kind']}-{option}"] = SimpleNamespace(**{**defaults, name: option})
    return cases


CASES = _cases()


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def objective(request: pytest.FixtureRequest):
    return OBJECTIVES[request.param.kind].from_settings(request.param)


def example(needs: frozenset[Need], rows: int = T, dtype: torch.dtype = torch.float64, same: bool = False):
    """Student logits, actions and what the teacher says to exactly these needs."""
    z, z_teacher = torch.randn(2, rows, V, dtype=torch.float64, generator=torch.Generator().manual_seed(rows)) * 2
    p, q = z.log_softmax(-1), (z if same else z_teacher).log_softmax(-1).to(dtype)
    actions = torch.randint(V, (rows,), generator=torch.Generator().manual_seed(1))
    ids = p.topk(K, -1).indices.int()
    signal = score_tile(q, actions, ids, needs, K)
    if Need.STUDENT_TOP_K in needs:
        signal[Field.STUDENT_TOP_IDS] = ids
    if Need.FULL in needs:
        signal[Field.TEACHER_LOGPROBS] = q
    return z.to(dtype).requires_grad_(), q, actions, signal


def rows_of(signal: dict[Field, torch.Tensor], rows: slice) -> dict[Field, torch.Tensor]:
    return {key: value[rows] for key, value in signal.items()}


def test_the_recipe_and_the_dict_know_the_same_objectives() -> None:
    assert {case.kind for case in CASES.values()} == set(OBJECTIVES)


def test_returns_one_differentiable_loss_and_detached_scalars(objective) -> None:
    z, _, actions, signal = example(objective.needs, dtype=torch.float32)
    sums = objective.tile(z.log_softmax(-1), actions, signal)
    assert {"loss", "kl", "entropy"} <= set(sums)
    assert all(value.shape == () and value.dtype == torch.float32 for value in sums.values())
    assert [key for key, value in sums.items() if value.requires_grad] == ["loss"]


def test_sums_and_gradient_do_not_depend_on_the_tiles(objective) -> None:
    z, _, actions, signal = example(objective.needs)
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
    z, _, actions, signal = example(objective.needs, rows=0)
    sums = objective.tile(z.log_softmax(-1), actions, signal)
    assert all(value.item() == 0 for value in sums.values())
    assert torch.autograd.grad(sums["loss"], z)[0].shape == (0, V)


def test_a_missing_score_is_an_error(objective) -> None:
    z, _, actions, signal = example(objective.needs)
    assert signal
    for key in signal:
        with pytest.raises(KeyError, match=key.value):
            objective.tile(z.log_softmax(-1), actions, {k: v for k, v in signal.items() if k != key})


@pytest.mark.parametrize("rows", [1, T - 1, T + 1])
def test_scores_of_other_tokens_are_an_error(objective, rows: int) -> None:
    """One row would broadcast, fewer rows would be gathered: both silently wrong."""
    z, _, actions, signal = example(objective.needs)
    for key, value in signal.items():
        wrong = value.repeat(2, *[1] * (value.dim() - 1))[:rows]
        with pytest.raises(ValueError, match="rows"):
            objective.tile(z.log_softmax(-1), actions, {**signal, key: wrong})


def test_gradient_vanishes_where_the_student_is_the_teacher(objective) -> None:
    z, _, actions, signal = example(objective.needs, same=True)
    sums = objective.tile(z.log_softmax(-1), actions, signal)
    assert torch.autograd.grad(sums["loss"], z)[0].abs().max() < 1e-13  # float64 rounding of terms below 10
    assert abs(sums["kl"].item()) < 1e-12


def test_reports_the_student_s_entropy(objective) -> None:
    z, _, actions, signal = example(objective.needs)
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


@pytest.mark.parametrize("case", (CASES | BETAS).values(), ids=(CASES | BETAS).keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_value_and_gradient_equal_the_closed_form(case: SimpleNamespace, dtype: torch.dtype, tolerance: float) -> None:
    """Gradients are below 5; the tolerances are some 20 units of each type's epsilon at that size."""
    objective = OBJECTIVES[case.kind].from_settings(case)
    z, _, actions, signal = example(objective.needs, dtype=dtype)
    exact = example(objective.needs)
    value, gradient = closed_form(case, exact[0].detach(), exact[1], actions)
    sums = objective.tile(z.log_softmax(-1), actions, signal)
    torch.testing.assert_close(torch.autograd.grad(sums["loss"], z)[0].double(), gradient, rtol=0, atol=tolerance)
    assert sums["kl"].item() == pytest.approx(value.item(), abs=tolerance * 2 * T)


@pytest.mark.parametrize(("beta", "other"), [(0.0, ForwardKl("full")), (1.0, ReverseKl("full"))])
def test_jsd_ends_in_the_two_kls(beta: float, other) -> None:
    z, _, actions, signal = example(other.needs)
    assert torch.equal(
        Jsd(beta).tile(z.log_softmax(-1), actions, signal)["loss"],
        other.tile(z.log_softmax(-1), actions, signal)["loss"],
    )


def test_policy_gradient_reports_its_estimate_of_the_kl() -> None:
    z, q, actions, signal = example(PolicyGradient.needs)
    ratio = (z.detach().log_softmax(-1) - q).gather(-1, actions[:, None])
    assert PolicyGradient().tile(z.log_softmax(-1), actions, signal)["kl"].item() == pytest.approx(ratio.sum().item())


def test_loss_may_be_scaled_by_any_later_count() -> None:
    """Nothing inside divides by the tile's own length: twice the same tokens are twice the loss."""
    for case in CASES.values():
        objective = OBJECTIVES[case.kind].from_settings(case)
        z, _, actions, signal = example(objective.needs)
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
    z, q, actions, _ = example(PolicyGradient.needs)
    with pytest.raises(ValueError, match="per sampled token"):
        PolicyGradient().tile(z.log_softmax(-1), actions, {Field.SAMPLED: q[:, :K]})


def test_jsd_beta_outside_the_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.beta is 1\.5"):
        Jsd(1.5)
