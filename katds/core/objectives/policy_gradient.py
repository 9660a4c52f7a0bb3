"""Reverse KL by policy gradient on the sampled token: the teacher tells one number per token."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch

from katds.core.divergences import sampled_reverse_kl
from katds.core.objectives.aligned import aligned, gathered, student_entropy
from katds.core.objectives.base import Objective, ObjectiveSettings
from katds.core.types import Field, Need, Signal


class PolicyGradientSettings(ObjectiveSettings):
    """The sampled token's log-ratio as its reward; the teacher scores one token per position."""

    kind: Literal["policy_gradient"] = "policy_gradient"

    def check(self, filtered: bool, minibatches: int) -> None:
        if filtered:
            raise ValueError(
                "objective.kind policy_gradient is biased where rollouts are not drawn from the whole distribution; set "
                "rollout.top_p to 1, top_k and min_p to 0 and temperature above 0, or take reverse_kl"
            )
        if minibatches > 1:
            raise ValueError(
                f"objective.kind policy_gradient is biased after the first of train.minibatches {minibatches} updates, as it "
                "has no importance weight; set train.minibatches to 1, or take reverse_kl"
            )


class PolicyGradient(Objective):
    """loss = -sum_t r_t log p_t(y_t) with the detached reward r_t = log q_t(y_t) - log p_t(y_t).

    Over y ~ p its gradient is that of KL(p || q) at the same prefix: E_y[(log p - log q) grad log p] (the term from
    grad of log p itself averages to zero). It holds per token: no reward of later tokens is credited to y_t, as in
    all objectives here.

    The expectation is exact only while tokens come from p itself: nucleus, top-k or min-p
    sampling, and updates between writing and learning (train.minibatches > 1), bias it; there is no importance
    weight.

    Variance: the gradient's second moment is E_y[r^2 |grad log p|^2], that of one sample per token instead of the
    exact sum over the vocabulary; it vanishes as q -> p, since r is then 0 for every y. Prefer reverse_kl where the
    teacher's top K is at hand.

    The reward must belong to the sampled token. A KL summed over the top k would be the same number for every action:
    an advantage that does not depend on the action has zero expected gradient. That is why this objective reads
    nothing but `Field.SAMPLED`.
    """

    Settings: ClassVar[type[ObjectiveSettings]] = PolicyGradientSettings
    needs = frozenset({Need.SAMPLED})

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        return cls()

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """{"loss", "kl" (sum of the k1 estimates log p - log q), "entropy" (of the student)}; see `Objective.tile`.

        The value of "loss" means nothing, only its gradient does.
        """
        teacher_T = aligned(signal, Field.SAMPLED, logprobs_TV)
        if teacher_T.shape != actions_T.shape:
            raise ValueError(
                f"a reward per sampled token is needed: shape {tuple(actions_T.shape)}, "
                f"the signal has {tuple(teacher_T.shape)}"
            )
        student_T = gathered(logprobs_TV, actions_T.unsqueeze(-1)).squeeze(-1)
        divergence_T = sampled_reverse_kl(student_T, teacher_T)
        loss = (divergence_T * student_T).sum()
        return {"loss": loss, "kl": divergence_T.sum(), "entropy": student_entropy(logprobs_TV)}
