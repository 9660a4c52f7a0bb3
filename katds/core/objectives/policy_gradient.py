"""Reverse KL by policy gradient on the sampled token: the teacher tells one number per token."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field as Setting

from katds.core.divergences import sampled_reverse_kl
from katds.core.objectives.aligned import student_entropy
from katds.core.objectives.base import Objective, ObjectiveSettings
from katds.core.objectives.sampled import Clip, SampledSettings, read_sampled, student_and_teacher
from katds.core.types import Need, Signal


class PolicyGradientSettings(SampledSettings):
    """The sampled token's log-ratio as its reward; the teacher scores one token per position."""

    kind: Literal["policy_gradient"] = "policy_gradient"
    importance_weight: Literal["none", "clipped"] = Setting(
        "none", description="clipped: PPO's, with clip_low and clip_high, for train.minibatches above 1"
    )

    def check(self, filtered: bool, minibatches: int, blended: bool = False) -> None:
        super().check(filtered, minibatches, blended)
        if blended and self.importance_weight == "none":
            raise ValueError(
                "objective.kind policy_gradient is biased without an importance weight where behaviour.kind lets another distribution "
                "write than the student; set objective.importance_weight to clipped, or take reverse_kl"
            )
        if minibatches > 1 and self.importance_weight == "none":
            raise ValueError(
                f"objective.kind policy_gradient is biased after the first of train.minibatches {minibatches} updates without an "
                "importance weight; set objective.importance_weight to clipped, or take reverse_kl"
            )


class PolicyGradient(Objective):
    """loss = -sum_t r_t log p_t(y_t) with the detached reward r_t = log q_t(y_t) - log p_t(y_t).

    Source: the score-function estimator (REINFORCE, Williams 1992) of the loss of `reverse_kl` (KAT, arXiv 2606.09471).

    Over y ~ p its gradient is that of KL(p || q) at the same prefix: E_y[(log p - log q) grad log p] (the term from
    grad of log p itself averages to zero). It holds per token: no reward of later tokens is credited to y_t, as in
    all objectives here.

    The expectation is exact only while tokens come from p itself: nucleus, top-k or min-p
    sampling bias it, and so do updates between writing and learning (train.minibatches > 1), unless `clip` is given: PPO's
    ratio makes up for those, exactly where it stays inside the interval. The reward is that of the present p even then, so that the
    gradient remains that of KL(p || q).

    Variance: the gradient's second moment is E_y[r^2 |grad log p|^2], that of one sample per token instead of the
    exact sum over the vocabulary; it vanishes as q -> p, since r is then 0 for every y. Prefer reverse_kl where the
    teacher's top K is at hand.

    The reward must belong to the sampled token. A KL summed over the top k would be the same number for every action:
    an advantage that does not depend on the action has zero expected gradient. That is why this objective reads
    nothing of the teacher but `Field.SAMPLED`.
    """

    Settings: ClassVar[type[ObjectiveSettings]] = PolicyGradientSettings
    needs = frozenset({Need.SAMPLED})

    def __init__(self, clip: Clip | None = None) -> None:
        self._clip = clip
        if clip is not None:
            self.needs = frozenset({Need.SAMPLED, Need.WRITTEN})

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        return cls(None if settings.importance_weight == "none" else Clip(settings.clip_low, settings.clip_high))

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """{"loss", "kl" (sum of the k1 estimates log p - log q), "entropy" (of the student)}; see `Objective.tile`.

        The value of "loss" means nothing, only its gradient does.
        """
        if self._clip is not None:
            tokens = read_sampled(logprobs_TV, actions_T, signal)
            return tokens.sums(tokens.losses(tokens.reward, self._clip), logprobs_TV)
        student_T, teacher_T = student_and_teacher(logprobs_TV, actions_T, signal)
        divergence_T = sampled_reverse_kl(student_T, teacher_T)
        loss = (divergence_T * student_T).sum()
        return {"loss": loss, "kl": divergence_T.sum(), "entropy": student_entropy(logprobs_TV)}
